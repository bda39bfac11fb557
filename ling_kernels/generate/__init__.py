"""Text from a model: how a token is chosen, and `python -m ling_kernels.generate`."""

from .sample import sampler
from .text import stream_text

__all__ = ["sampler", "stream_text"]
