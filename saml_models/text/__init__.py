"""Transcripts: their parts, file formats, normalisation, style and word error rate."""
