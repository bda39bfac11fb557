"""Text <-> token ids: a byte-level tokenizer that needs no package, or any Hugging Face tokenizer.json.

In the byte-level tokenizer ids 0..255 are the bytes of UTF-8, followed by Ling's special tokens. `save` writes it as an
ordinary tokenizer.json, which `tokenizers` and AutoTokenizer load with the same ids.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .errors import InputError
from .files import atomic_write, read_json

# <|startoftext|> to <|role_end|> in the order of Ling's vocabulary (ids 156891 .. 156895 there).
SPECIAL_TOKENS = (
    *("<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|role_end|>", "<role>", "</role>"),
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
)

TOKEN_BYTES = [bytes([i]) for i in range(256)] + [name.encode() for name in SPECIAL_TOKENS]  # by id
# Tried in this order if tokenizer_config.json names no eos_token.
COMMON_EOS_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[EOS]")

# Ling's chat format: the system turn is always present and sets the thinking mode; each turn ends with <|role_end|>;
# consecutive tool results share one turn; the assistant's <think> block is kept only after the last user message.
CHAT_TEMPLATE = """\
{%- set last = namespace(user=messages|length - 1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}
{%- endfor %}
{{- '<role>SYSTEM</role>' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n' }}{% endif %}
{{- 'detailed thinking off<|role_end|>' }}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<role>HUMAN</role>' + message.content + '<|role_end|>' }}
    {%- elif message.role == 'system' %}
        {%- if not loop.first %}{{ '<role>SYSTEM</role>' + message.content + '<|role_end|>' }}{% endif %}
    {%- elif message.role == 'assistant' %}
        {%- set thought, end, answer = message.content.rpartition('</think>') %}
        {%- set thought = thought.split('<think>')[-1].strip('\\n') %}
        {{- '<role>ASSISTANT</role>' }}
        {%- if thought and loop.index0 > last.user %}{{ '\\n<think>\\n' + thought + '\\n</think>\\n\\n' }}{% endif %}
        {{- (answer.lstrip('\\n') if end else answer) + '<|role_end|>' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem is undefined or loop.previtem.role != 'tool' %}{{ '<role>OBSERVATION</role>' }}{% endif %}
        {{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}
        {%- if loop.nextitem is undefined or loop.nextitem.role != 'tool' %}{{ '<|role_end|>' }}{% endif %}
    {%- else %}
        {{- raise_exception('a role is system, user, assistant or tool, not ' + message.role) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"""


class Tokenizer:
    """`backend` is a tokenizers.Tokenizer, or None for the byte-level one; `settings` is tokenizer_config.json."""

    def __init__(self, backend=None, settings: dict | None = None):
        self.backend = backend
        self.settings = byte_settings() if settings is None else dict(settings)
        self.chat_template: str | None = self.settings.get("chat_template")
        self.vocab = (
            {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)} if backend is None else backend.get_vocab()
        )
        self.vocab_size = max(self.vocab.values(), default=-1) + 1  # one more than the largest id
        if not self.settings.get("eos_token"):
            self.settings["eos_token"] = next((name for name in COMMON_EOS_TOKENS if name in self.vocab), None)
        self.bos_id, self.eos_id = self._id("bos_token"), self._id("eos_token")
        if self.eos_id is None:
            raise InputError("the tokenizer names no end token: set eos_token in the tokenizer_config.json beside it")

    def _token(self, key: str) -> str | None:
        token = self.settings.get(key)
        return token.get("content") if isinstance(token, dict) else token

    def _id(self, key: str) -> int | None:
        token = self._token(key)
        if token is not None and token not in self.vocab:
            raise InputError(f"tokenizer_config.json has {key} {token!r}, which is not in tokenizer.json")
        return self.vocab.get(token)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of text, without BOS or EOS.

        special=True parses the names of special tokens, which a rendered chat needs; by default they are plain text, so
        that a user's message cannot open a system turn. Raises InputError for text with lone surrogates.
        """
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"the text is not valid Unicode at character {error.start}: {error.reason}") from None
        if self.backend is not None:
            self.backend.encode_special_tokens = not special
            return self.backend.encode(text, add_special_tokens=False).ids
        if not special:
            return list(data)
        ids = []
        for piece in re.split(f"({'|'.join(map(re.escape, SPECIAL_TOKENS))})", text):
            ids += [self.vocab[piece]] if piece in self.vocab else piece.encode()
        return ids

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Ids of UTF-8 data as uint8, uint16 or uint32; the byte-level tokenizer returns any data unchanged."""
        if self.backend is None:
            return np.frombuffer(data, np.uint8)
        ids = self.encode(data.decode("utf-8", "replace"))
        return np.array(ids, np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens by name. Invalid UTF-8 becomes U+FFFD; ids outside the vocabulary are skipped."""
        ids = [int(i) for i in ids if 0 <= i < self.vocab_size]
        if self.backend is not None:
            return self.backend.decode(ids, skip_special_tokens=False)
        return b"".join(TOKEN_BYTES[i] for i in ids).decode("utf-8", "replace")

    def apply_chat_template(self, messages: Sequence[dict], add_generation_prompt: bool = True) -> str:
        """Render the conversation [{"role": ..., "content": ...}, ...] as text; encode it with special=True."""
        if self.chat_template is None:
            raise InputError("the tokenizer has no chat template (chat_template in tokenizer_config.json)")
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise InputError("a chat template needs jinja2: pip install ling_kernels[train]") from None

        def raise_exception(message: str):
            raise TemplateError(message)

        # The Jinja environment that transformers provides to chat templates.
        blocks = {"trim_blocks": True, "lstrip_blocks": True}
        environment = ImmutableSandboxedEnvironment(**blocks, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = raise_exception
        environment.globals.update((key, self._token(key)) for key in self.settings if key.endswith("_token"))
        try:
            template = environment.from_string(self.chat_template)
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, tools=None)
        except (TemplateError, TypeError) as error:
            raise InputError(f"the chat template cannot render these messages: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into the folder `path`, each atomically."""
        tokenizer = byte_tokenizer_json() if self.backend is None else json.loads(self.backend.to_str())
        for name, content in {"tokenizer.json": tokenizer, "tokenizer_config.json": self.settings}.items():
            try:
                Path(path).mkdir(parents=True, exist_ok=True)
                with atomic_write(Path(path, name)) as file:
                    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            except OSError as error:
                raise InputError(f"cannot write the tokenizer to {path}: {error}") from None


class TextStream:
    """Incremental detokenizer: `add` returns the text that is certain after one more id, `end` the rest.

    A character whose bytes are incomplete is held back.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        # The last ids, the first `context` of them already emitted: some decoders drop the space before a first token,
        # and some write U+FFFD for every byte of adjacent characters (up to 4 + 3) while one of them is incomplete.
        self.ids: list[int] = []
        self.context = 0
        self.emitted = 0  # characters of decode(ids)

    def add(self, token: int) -> str:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        certain = max(len(text.rstrip("\ufffd")), len(text) - 7)
        new = text[self.emitted : certain]
        self.emitted = max(self.emitted, certain)
        if certain == len(text):
            del self.ids[: self.context]
            self.context, self.emitted = len(self.ids), len(self.tokenizer.decode(self.ids))
        return new

    def end(self) -> str:
        rest = self.tokenizer.decode(self.ids)[self.emitted :]
        self.ids, self.context, self.emitted = [], 0, 0
        return rest


def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or of a folder with one; None gives the byte-level tokenizer.

    tokenizer_config.json beside it names the BOS and EOS tokens and holds the chat template, unless
    chat_template.jinja does. Raises InputError for a missing or damaged file.
    """
    if path is None:
        return Tokenizer()
    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"there is no tokenizer at {file}")
    content = read_json(file)
    settings_file, template_file = file.parent / "tokenizer_config.json", file.parent / "chat_template.jinja"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    if template_file.is_file():
        settings["chat_template"] = template_file.read_text(encoding="utf-8")
    elif isinstance(settings.get("chat_template"), list):  # several named templates
        settings["chat_template"] = {t["name"]: t["template"] for t in settings["chat_template"]}.get("default")
    if content | {"post_processor": None} == byte_tokenizer_json():  # transformers adds one on saving
        return Tokenizer(None, settings)
    try:
        import tokenizers
    except ImportError:
        raise InputError(f"{file} needs the package tokenizers: pip install ling_kernels[train]") from None
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises plain Exception
        raise InputError(f"{file} is not a tokenizer.json that tokenizers can read: {error}") from error
    return Tokenizer(backend, settings)


def byte_settings() -> dict:
    """tokenizer_config.json of the byte-level tokenizer."""
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    flags = {"add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    return {**names, **flags, "chat_template": CHAT_TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}


def byte_tokenizer_json() -> dict:
    """tokenizer.json of the byte-level tokenizer: byte-level BPE without merges."""
    # Byte-level BPE writes a byte as one visible character: itself if Latin-1 prints it, else the next from U+0100 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    vocab = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model: dict = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    special = [{"id": 256 + i, "content": name, **flags} for i, name in enumerate(SPECIAL_TOKENS)]
    steps = {"pre_tokenizer": level, "decoder": level, "model": {**model, "vocab": vocab, "merges": []}}
    return {"version": "1.0", **nothing, "added_tokens": special, **steps}
