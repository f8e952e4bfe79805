"""One model, many voices, at one address."""
