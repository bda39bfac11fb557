"""Pages of the KV cache: on the device, and where they go on in host memory and in files."""
