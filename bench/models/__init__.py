"""Whole models: transcription, training steps, adaptation."""
