"""The configuration of the stand-in beside it."""

from transformers import PretrainedConfig


class BailingMoeV2Config(PretrainedConfig):
    def __init__(self, **fields):
        self.use_cache, self.output_router_logits = True, False
        super().__init__(**{"tie_word_embeddings": False, **fields})
