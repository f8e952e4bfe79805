"""Low-bit weights: code tables, `QuantizedTensor`, and bitsandbytes' form of it."""
