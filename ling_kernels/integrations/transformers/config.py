"""The configuration of Ling-2.0 for transformers, with the fields of the published config.json."""

import dataclasses
from typing import Any

from transformers import PreTrainedConfig

from ...errors import InputError
from ...model.config import OFFICIAL_FIELDS, LingConfig
from ...model.config_json import config_fields
from .functions import NAME

FIELDS = {f.name: f.default for f in dataclasses.fields(LingConfig) if f.name != "other"}
OURS = {"LingForCausalLM", "LingModel"}  # classes that transformers writes into a configuration


class LingHfConfig(PreTrainedConfig):
    """A LingConfig as a configuration of transformers: the same fields, spellings, defaults and checks.

    config.json is read and written as it was published. Raises InputError for bad values and for fields that ask for
    another formula than the kernels compute.
    """

    model_type = "bailing_moe"
    keys_to_ignore_at_inference = ["past_key_values"]
    attribute_map = {"num_local_experts": "num_experts"}
    base_model_ep_plan = {
        "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
        "layers.*.mlp.experts.down_proj": "grouped_gemm",
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }
    base_model_fsdp_plan = {
        "word_embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "norm": "keep_full_weight",
    }
    rope_scaling = None  # as published: transformers has a property here, for rope_parameters

    def __post_init__(self, **kwargs: Any):
        names = None if set(self.architectures or []) <= OURS else self.architectures
        ling = LingConfig(**config_fields({"model_type": self.model_type, **kwargs, "architectures": names}, FIELDS))
        used = {*FIELDS, "rope_parameters", "rotary_dim"}
        rest = dict(hidden_act="silu", use_cache=True) | {k: v for k, v in kwargs.items() if k not in used}
        rest.setdefault("attn_implementation", NAME)
        rest.setdefault("experts_implementation", NAME)
        super().__post_init__(**rest)
        for name in FIELDS:
            setattr(self, name, getattr(ling, name))

    def ling(self) -> LingConfig:
        """The checked LingConfig of the fields as they are now."""
        theirs = ("architectures", "quantization_config")  # transformers has put objects of its own there
        content = {k: v for k, v in vars(self).items() if not k.startswith("_") and k not in theirs}
        try:
            return LingConfig(**config_fields(content, FIELDS))
        except InputError as error:
            raise InputError(f"LingHfConfig: {error}") from None

    def to_diff_dict(self) -> dict[str, Any]:
        """The content of config.json."""
        content = super().to_diff_dict() | OFFICIAL_FIELDS
        if content.get("dtype") is not None:
            content["torch_dtype"] = content["dtype"]  # the name that transformers 4 reads
        return content
