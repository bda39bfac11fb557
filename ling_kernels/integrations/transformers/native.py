"""Makes the model known to transformers 5: AutoConfig, AutoModelForCausalLM, and the keys of published checkpoints."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from .config import LingHfConfig
from .model import LingForCausalLM, LingModel


def register_model() -> None:
    """Register the classes for configurations of the published model_type."""
    name = LingHfConfig.model_type
    AutoConfig.register(name, LingHfConfig, exist_ok=True)
    AutoModel.register(LingHfConfig, LingModel, exist_ok=True)
    AutoModelForCausalLM.register(LingHfConfig, LingForCausalLM, exist_ok=True)
    register_checkpoint_conversion_mapping(name, conversions(), overwrite=True)


def conversions() -> list[WeightConverter]:
    """Published keys, and those of the model, which differ for the routed experts alone: theirs are stacked."""
    experts = "mlp.experts.*."
    return [
        WeightConverter([f"{experts}gate_proj.weight", f"{experts}up_proj.weight"], "mlp.experts.gate_up_proj",
                        [MergeModulelist(0), Concatenate(1)]),
        WeightConverter(f"{experts}down_proj.weight", "mlp.experts.down_proj", [MergeModulelist(0)]),
    ]  # fmt: skip
