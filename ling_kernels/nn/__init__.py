"""Thin modules over ops."""

from .attention import Attention, BatchLayout, Rows
from .exchange import Exchange, Local
from .experts import Experts
from .fp8 import Fp8Experts, Fp8Linear, Fp8MLP
from .linear import FusedLinear
from .lora import Adapter, lora_, merge_adapters_, without_adapters
from .mlp import MLP
from .moe import MoE
from .norm import RMSNorm
from .router import Router
from .transposed import Transposed

__all__ = [
    "MLP", "Adapter", "Attention", "BatchLayout", "Exchange", "Experts", "Fp8Experts", "Fp8Linear", "Fp8MLP",
    "FusedLinear", "Local", "MoE", "RMSNorm", "Router", "Rows", "Transposed", "lora_", "merge_adapters_",
    "without_adapters",
]  # fmt: skip
