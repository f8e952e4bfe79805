"""Real models, speakers and training on top of `saml_kernels`."""
