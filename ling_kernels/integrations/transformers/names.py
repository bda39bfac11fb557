"""Names that differ among the versions of transformers."""

import dataclasses

import transformers
from transformers.modeling_outputs import MoeModelOutputWithPast

NATIVE = (
    int(transformers.__version__.partition(".")[0]) >= 5
)  # version 4 has neither registries nor conversions of keys
FIELDS = {field.name for field in dataclasses.fields(MoeModelOutputWithPast)}
CACHE = "cache" if "cache" in FIELDS else "past_key_values"  # of outputs and of masks; renamed in 5.24
