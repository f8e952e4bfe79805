"""The Conformer attention encoder-decoder (Canary)."""
