"""The command `saml`."""
