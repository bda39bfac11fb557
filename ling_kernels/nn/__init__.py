"""Thin modules over ops."""

from .attention import Attention, Rows
from .experts import Experts
from .mlp import MLP
from .moe import Local, MoE
from .norm import RMSNorm
from .router import Router
from .transposed import Transposed

__all__ = ["MLP", "Attention", "Experts", "Local", "MoE", "RMSNorm", "Router", "Rows", "Transposed"]
