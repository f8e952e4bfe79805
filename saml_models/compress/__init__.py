"""A full-precision model in low bits."""
