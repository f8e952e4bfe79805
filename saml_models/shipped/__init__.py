"""Pretrained experts that come with the package."""
