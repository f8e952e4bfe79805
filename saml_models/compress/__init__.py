"""SAML layers in place of a model's own, and the compressed model on disk."""
