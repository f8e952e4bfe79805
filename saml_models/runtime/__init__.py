"""The machine: devices, threads, memory, files of tensors, installed wheels."""
