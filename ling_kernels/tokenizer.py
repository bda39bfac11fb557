"""Text <-> token ids: a byte-level tokenizer that needs no package, or any Hugging Face tokenizer.json.

The byte-level one has ids 0..255 for the bytes of UTF-8 and Ling's special tokens after them. Saved, it is an ordinary
tokenizer.json that `tokenizers` and AutoTokenizer load to the same ids.
"""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .errors import InputError
from .files import whole

# From <|startoftext|> to <|role_end|> in the order Ling has them (there 156891 .. 156895).
SPECIAL = (
    *("<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]", "<|role_end|>", "<role>", "</role>"),
    *("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"),
)

BYTES = [bytes([i]) for i in range(256)] + [name.encode() for name in SPECIAL]  # of each id
ENDS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[EOS]")  # tried where nothing names one

# Ling's chat format: a system turn is always there and says whether to think; each turn ends with <|role_end|>;
# neighbouring tool results share one; what the assistant thought is left out unless no user has spoken since.
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
        self.vocab = {name: 256 + i for i, name in enumerate(SPECIAL)} if backend is None else backend.get_vocab()
        self.vocab_size = max(self.vocab.values(), default=-1) + 1  # one more than the largest id
        if not self.settings.get("eos_token"):
            self.settings["eos_token"] = next((name for name in ENDS if name in self.vocab), None)
        self.bos_id, self.eos_id = self._id("bos_token"), self._id("eos_token")
        if self.eos_id is None:
            raise InputError("the tokenizer names no end token: give eos_token in tokenizer_config.json beside it")

    def _name(self, key: str) -> str | None:
        token = self.settings.get(key)
        return token.get("content") if isinstance(token, dict) else token

    def _id(self, key: str) -> int | None:
        token = self._name(key)
        if token is not None and token not in self.vocab:
            raise InputError(f"tokenizer_config.json has {key} {token!r}, which is not in tokenizer.json")
        return self.vocab.get(token)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of text, with nothing added. The name of a special token is that token only with special=True: a rendered
        chat needs it, while a user's text must not be able to speak for the system."""
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
        for piece in re.split(f"({'|'.join(map(re.escape, SPECIAL))})", text):
            ids += [self.vocab[piece]] if piece in self.vocab else piece.encode()
        return ids

    def encode_bytes(self, data: bytes) -> np.ndarray:
        """Ids of UTF-8 data as uint8, uint16 or uint32; for the byte-level tokenizer any data, which is the ids."""
        if self.backend is None:
            return np.frombuffer(data, np.uint8)
        ids = self.encode(data.decode("utf-8", "replace"))
        return np.array(ids, np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens by name. Bytes that are not UTF-8 give U+FFFD, ids without a token nothing."""
        if self.backend is not None:
            return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)
        return b"".join(BYTES[i] for i in ids if i < len(BYTES)).decode("utf-8", "replace")

    def apply_chat_template(self, messages: Sequence[dict], add_generation_prompt: bool = True) -> str:
        """The conversation [{"role": ..., "content": ...}, ...] as text, to be encoded with special=True."""
        if self.chat_template is None:
            raise InputError("the tokenizer has no chat template (chat_template in tokenizer_config.json)")
        try:
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise InputError("a chat template needs jinja2: pip install ling_kernels[train]") from None

        def raise_exception(message: str):
            raise TemplateError(message)

        # The surroundings that transformers gives, for which templates are written.
        blocks = {"trim_blocks": True, "lstrip_blocks": True}
        world = ImmutableSandboxedEnvironment(**blocks, extensions=["jinja2.ext.loopcontrols"])
        world.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        world.globals["raise_exception"] = raise_exception
        world.globals.update((key, self._name(key)) for key in self.settings if key.endswith("_token"))
        try:
            template = world.from_string(self.chat_template)
            return template.render(messages=messages, add_generation_prompt=add_generation_prompt, tools=None)
        except (TemplateError, TypeError) as error:
            raise InputError(f"the chat template cannot render these messages: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into the folder `path`, each whole or not at all."""
        tokenizer = byte_tokenizer_json() if self.backend is None else json.loads(self.backend.to_str())
        for name, content in {"tokenizer.json": tokenizer, "tokenizer_config.json": self.settings}.items():
            try:
                Path(path).mkdir(parents=True, exist_ok=True)
                with whole(Path(path, name)) as file:
                    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
            except OSError as error:
                raise InputError(f"cannot write the tokenizer to {path}: {error}") from None


class TextStream:
    """Text of ids that come one by one: `add` gives what is certain by now, holding back a character whose bytes are
    still incomplete; `end` gives the rest."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        # The last ids, `context` of which made the piece before: some decoders drop the space before a first token, and
        # some write U+FFFD for every byte of neighbouring characters, up to 4 + 3, while one of them is incomplete.
        self.ids: list[int] = []
        self.context = 0
        self.shown = 0  # characters of decode(ids) given out already

    def add(self, token: int) -> str:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        certain = max(len(text.rstrip("\ufffd")), len(text) - 7)
        new = text[self.shown : certain]
        self.shown = max(self.shown, certain)
        if certain == len(text):
            del self.ids[: self.context]
            self.context, self.shown = len(self.ids), len(self.tokenizer.decode(self.ids))
        return new

    def end(self) -> str:
        rest = self.tokenizer.decode(self.ids)[self.shown :]
        self.ids, self.context, self.shown = [], 0, 0
        return rest


def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a tokenizer.json or of a folder that has one; None gives the byte-level tokenizer.

    tokenizer_config.json beside it names bos and eos and holds the chat template (or chat_template.jinja does)."""
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
    elif isinstance(settings.get("chat_template"), list):  # several, named
        settings["chat_template"] = {t["name"]: t["template"] for t in settings["chat_template"]}.get("default")
    if content | {"post_processor": None} == byte_tokenizer_json():  # which transformers adds on saving
        return Tokenizer(None, settings)
    try:
        import tokenizers
    except ImportError:
        raise InputError(f"{file} needs the package tokenizers: pip install ling_kernels[train]") from None
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing narrower
        raise InputError(f"{file} is not a tokenizer.json that tokenizers can read: {error}") from error
    return Tokenizer(backend, settings)


def read_json(file: Path) -> dict:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object")
    return content


def byte_settings() -> dict:
    names = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    flags = {"add_bos_token": False, "add_eos_token": False, "clean_up_tokenization_spaces": False}
    return {**names, **flags, "chat_template": CHAT_TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}


def byte_tokenizer_json() -> dict:
    """The byte-level tokenizer in the format of `tokenizers`: byte-level BPE without a single merge."""
    # There a byte is written as one visible character: itself where Latin-1 prints it, else the next from U+0100 on.
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    vocab = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None}
    model |= {"end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False}
    nothing = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    special = [{"id": 256 + i, "content": name, **flags} for i, name in enumerate(SPECIAL)]
    steps = {"pre_tokenizer": level, "decoder": level, "model": {**model, "vocab": vocab, "merges": []}}
    return {"version": "1.0", **nothing, "added_tokens": special, **steps}
