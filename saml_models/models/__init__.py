"""Recognisers: what every model offers, and how each is loaded."""
