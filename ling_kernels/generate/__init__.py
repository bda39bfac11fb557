"""Text from a model: the engine, how a token is chosen, and `python -m ling_kernels.generate`."""

from .engine import Engine
from .sample import Sampling, sampler
from .scheduler import Busy, Request
from .text import stream_text

__all__ = ["Busy", "Engine", "Request", "Sampling", "sampler", "stream_text"]
