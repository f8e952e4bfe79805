"""Low-bit weights: how they are rounded."""
