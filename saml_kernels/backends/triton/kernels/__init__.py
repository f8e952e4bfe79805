"""Triton kernels, one a file, and the device functions that they share."""
