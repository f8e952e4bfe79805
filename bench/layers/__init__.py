"""Linear layers beside their peers."""
