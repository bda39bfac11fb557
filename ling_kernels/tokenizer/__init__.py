"""Text <-> token ids: a byte-level tokenizer that needs no package, or any Hugging Face tokenizer.json.

`python -m ling_kernels.tokenizer.train` makes a tokenizer.json of one's own text.
"""

from .byte_level import CHAT_TEMPLATE, SPECIAL_TOKENS, TOKEN_BYTES, byte_settings, byte_tokenizer_json
from .tokenizer import COMMON_EOS_TOKENS, TextStream, Tokenizer, load_tokenizer, reporting

__all__ = [
    "CHAT_TEMPLATE", "COMMON_EOS_TOKENS", "SPECIAL_TOKENS", "TOKEN_BYTES", "TextStream", "Tokenizer", "byte_settings",
    "byte_tokenizer_json", "load_tokenizer", "reporting",
]  # fmt: skip
