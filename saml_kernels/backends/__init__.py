"""Where the operator runs: the plain-PyTorch reference, the CPU, Triton; and which one is taken."""
