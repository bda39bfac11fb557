"""Text generation: the serving engine, `python -m ling_kernels.generate`, and an OpenAI-compatible server."""

from ..errors import Busy
from ..model.sample import Sampling, sampler
from .engine import Engine
from .grammar import Grammars
from .pages.levels import Spill
from .request import Request
from .text import Text, generate_texts, stream_text

__all__ = [
    "Busy", "Engine", "Grammars", "Request", "Sampling", "Spill", "Text", "generate_texts", "sampler", "stream_text",
]  # fmt: skip
