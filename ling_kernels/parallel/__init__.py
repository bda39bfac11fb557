"""How a model is divided among GPUs: the layout of ranks, and optimizer state of parameters that FSDP2 shards."""
