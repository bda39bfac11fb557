"""ling_kernels inside other libraries, one module each; docs/integrations.md lists them. Nothing imports them."""
