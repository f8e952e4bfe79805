"""Whisper: loading, windows, greedy and beam decoding, recordings of any length."""
