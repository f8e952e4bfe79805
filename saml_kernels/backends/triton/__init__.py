"""The Triton backend: plans and launches, and tiles chosen by shape."""
