"""The CPU backend: native kernels with a plain-PyTorch fallback."""
