"""Thin modules over ops."""

from .attention import Attention, Rows
from .experts import Experts
from .fp8 import Fp8Experts, Fp8Linear, Fp8MLP
from .mlp import MLP
from .moe import Local, MoE
from .norm import RMSNorm
from .router import Router
from .transposed import Transposed

__all__ = ["MLP", "Attention", "Experts", "Fp8Experts", "Fp8Linear", "Fp8MLP", "Local", "MoE", "RMSNorm", "Router",
           "Rows", "Transposed"]  # fmt: skip
