"""Pretraining of experts, adaptation to a speaker, and what both share."""
