"""Ling-2.0 models: configuration, transformer, multi-token prediction, checkpoints, sampling, a plain decode loop."""

from .checkpoint import load_model, named_views, resolve_model, save_model
from .config import LingConfig
from .transformer import Ling, LingOutput

__all__ = ["Ling", "LingConfig", "LingOutput", "load_model", "named_views", "resolve_model", "save_model"]
