"""Text <-> token ids: a byte-level tokenizer that needs no package, or any Hugging Face tokenizer.json.

In the byte-level tokenizer ids 0..255 are the bytes of UTF-8, followed by Ling's special tokens. `save` writes it as an
ordinary tokenizer.json, which `tokenizers` and AutoTokenizer load with the same ids.
"""

import json
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from ..chat_template import ChatText, end_of_answers, render_answers, render_chat, with_thinking
from ..errors import InputError
from ..files import atomic_write, read_json, user_path
from .byte_level import SPECIAL_TOKENS, TOKEN_BYTES, byte_settings, byte_tokenizer_json

_ENCODING = threading.Lock()  # `encode_special_tokens` belongs to a backend, not to a call; a tokenizer can be pickled
WINDOW = 32  # ids that hold the last 7 characters, which are at most 4 ids each, and where the first one begins
# Tried in this order if tokenizer_config.json names no eos_token.
COMMON_EOS_TOKENS = (
    *("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "[EOS]", "<EOT>", "<|eot|>", "<|eos|>"),
    *("<｜end▁of▁sentence｜>", "<|eot_id|>", "<end_of_turn>", "<EOS>", "<|end|>"),
)


class Tokenizer:
    """`backend` is a tokenizers.Tokenizer, or None for the byte-level one; `settings` is tokenizer_config.json."""

    def __init__(self, backend=None, settings: dict | None = None):
        self.backend = backend
        if backend is not None:  # tokenizer.json may hold the settings of a batch, which would cut and pad every text
            backend.no_truncation()
            backend.no_padding()
        self.settings = byte_settings() if settings is None else dict(settings)
        self.chat_template: str | None = self.settings.get("chat_template")
        if self.chat_template is not None and not isinstance(self.chat_template, str):
            raise InputError(f"chat_template in tokenizer_config.json is {type(self.chat_template).__name__}, not text")
        self.vocab = (
            {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)} if backend is None else backend.get_vocab()
        )
        self.control_tokens = self._control_tokens()  # id by name
        self.vocab_size = max(self.vocab.values(), default=-1) + 1  # one more than the largest id
        if not self.settings.get("eos_token"):
            self.settings["eos_token"] = next((name for name in COMMON_EOS_TOKENS if name in self.vocab), None)
        self.bos_id, self.eos_id = self._id("bos_token"), self._id("eos_token")
        if self.eos_id is None:
            names = sorted(self.control_tokens, key=self.control_tokens.get)
            has = f"of its special tokens {', '.join(names)}" if names else "it has no special tokens"
            raise InputError(
                f"the tokenizer names no end token: set eos_token in the tokenizer_config.json beside it ({has})"
            )

    def _control_tokens(self) -> dict[str, int]:
        """The special tokens, and the other added tokens that the chat template uses."""
        if self.backend is None:
            return self.vocab
        added = self.backend.get_added_tokens_decoder().items()
        used = self.chat_template or ""
        return {token.content: i for i, token in added if token.content and (token.special or token.content in used)}

    def token(self, key: str) -> str | None:
        """The name of the token that a setting names, such as eos_token."""
        token = self.settings.get(key)
        return token.get("content") if isinstance(token, dict) else token

    def _id(self, key: str) -> int | None:
        token = self.token(key)
        if token is not None and not isinstance(token, str):
            raise InputError(f"tokenizer_config.json has {key} {token!r}, which is not text")
        if token is not None and token not in self.vocab:
            raise InputError(f"tokenizer_config.json has {key} {token!r}, which is not in tokenizer.json")
        return self.vocab.get(token)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of text, without BOS or EOS.

        special=True parses the names of special tokens, which a rendered chat needs, but not those inside its messages;
        by default they are plain text, so that a user's message cannot open a system turn. Raises InputError for text
        with lone surrogates.
        """
        if not isinstance(text, str):
            raise InputError(f"a tokenizer encodes text, not {type(text).__name__}")
        if special and isinstance(text, ChatText) and text.parts is not None:
            control = self.control_tokens
            pieces = ([control[part]] if own else self._encode_content(part) for part, own in text.parts)
            return [i for piece in pieces for i in piece]
        data = utf8(text)
        if self.backend is not None:
            with _ENCODING, reporting("tokenizer.json cannot encode this text"):
                self.backend.encode_special_tokens = not special
                return self.backend.encode(text, add_special_tokens=False).ids
        if not special:
            return list(data)
        ids: list[int] = []
        for piece in re.split(f"({'|'.join(map(re.escape, SPECIAL_TOKENS))})", text):
            ids += [self.vocab[piece]] if piece in self.vocab else piece.encode()
        return ids

    def _encode_content(self, text: str) -> list[int]:
        """Ids of text whose control tokens are text. A backend parses added tokens that are not marked as special, such
        as <think> in some vocabularies, in any text, so these are cut after their first character.
        """
        cut = [name for name in self.control_tokens if name in text and len(name) > 1]
        if self.backend is None or not cut:
            return self.encode(text)
        special = {token.content for token in self.backend.get_added_tokens_decoder().values() if token.special}
        pattern = "|".join(f"(?<={re.escape(n[0])})(?={re.escape(n[1:])})" for n in cut if n not in special)
        return [i for piece in (re.split(pattern, text) if pattern else [text]) for i in self.encode(piece)]

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[np.ndarray]:
        """Ids of each text as `encode` gives them, in uint8, uint16 or uint32; tokenizers works on all cores."""
        if self.backend is None and not special:
            return [np.frombuffer(utf8(text), np.uint8) for text in texts]
        dtype = np.uint16 if self.vocab_size <= 1 << 16 else np.uint32
        if self.backend is None:
            return [np.array(self.encode(text, special), dtype) for text in texts]
        with _ENCODING, reporting("tokenizer.json cannot encode the texts"):
            self.backend.encode_special_tokens = not special
            encodings = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype) for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids, special tokens by name. Invalid UTF-8 becomes U+FFFD; ids outside the vocabulary are skipped."""
        ids = [int(i) for i in ids if 0 <= i < self.vocab_size]
        if self.backend is not None:
            with reporting("tokenizer.json cannot decode these ids"):
                return self.backend.decode(ids, skip_special_tokens=False)
        return b"".join(TOKEN_BYTES[i] for i in ids).decode("utf-8", "replace")

    def apply_chat_template(
        self, messages: Sequence[dict], add_generation_prompt: bool = True, tools: Sequence[dict] | None = None,
        thinking: bool | None = None,
    ) -> ChatText:  # fmt: skip
        """Render the conversation [{"role": ..., "content": ...}, ...] as text; encode it with special=True.

        tools: descriptions of functions that an answer may call. thinking: whether the answer is to begin with a
        thought, where the template has these modes; None: as it is. The text knows which control tokens are the
        template's; those inside a message are encoded as text. Raises InputError for what the template cannot render.
        """
        template, tokens = self._chat_format(thinking)
        return render_chat(template, messages, self.control_tokens, tokens, add_generation_prompt, tools)

    def encode_answers(
        self, messages: Sequence[dict], tools: Sequence[dict] | None = None, thinking: bool | None = None
    ) -> tuple[list[int], list[tuple[int, int, int]]]:
        """Ids of a rendered conversation, and for each message of role assistant (its index, first, stop): the ids
        first to stop are what a model writes, with the token that ends its turn."""
        template, tokens = self._chat_format(thinking)
        parts, answers = render_answers(template, messages, self.control_tokens, tokens, tools)
        ids: list[int] = []
        at = {0: 0}  # number of ids by number of characters
        characters = 0
        for part in parts:
            ids += self.encode(part, special=True)
            characters += len(part)
            at[characters] = len(ids)
        return ids, [(a.message, at[a.start], at[a.end]) for a in answers]

    def ends(self) -> set[int]:
        """The tokens that end a text: the end token, and where a chat template can be rendered that of its answers."""
        try:
            template, tokens = self._chat_format()
            return {self.eos_id, self.control_tokens[end_of_answers(template, self.control_tokens, tokens)]}
        except InputError:  # no template, one that ends answers with no token, or no jinja2
            return {self.eos_id}

    def _chat_format(self, thinking: bool | None = None) -> tuple[str, dict]:
        """The chat template, and the tokens and other variables that it may name."""
        if self.chat_template is None:
            raise InputError("the tokenizer has no chat template (chat_template in tokenizer_config.json)")
        tokens: dict = {key: self.token(key) for key in self.settings if key.endswith("_token")}
        if thinking is None:
            return self.chat_template, tokens
        template, mode = with_thinking(self.chat_template, thinking)
        return template, tokens | mode

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into the folder `path`, each atomically."""
        tokenizer = byte_tokenizer_json() if self.backend is None else json.loads(self.backend.to_str())
        for name, content in {"tokenizer.json": tokenizer, "tokenizer_config.json": self.settings}.items():
            try:
                Path(path).mkdir(parents=True, exist_ok=True)
                with atomic_write(Path(path, name)) as file:
                    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            except OSError as error:
                raise InputError(f"cannot write the tokenizer to {path}: {error}") from None


class TextStream:
    """Incremental detokenizer: `add` returns the text that is certain after one more id, `end` the rest.

    A character whose bytes are incomplete is held back. prompt: the ids before the text, whose end decides whether a
    first token keeps its space, and whose last character the text may complete.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self.tokenizer = tokenizer
        # The last ids, the first `context` of them already emitted: some decoders drop the space before a first token,
        # and some write U+FFFD for every byte of adjacent characters (up to 4 + 3) while one of them is incomplete.
        self.ids = self._end_of(prompt)
        self.context = 0
        self.emitted = len(self.tokenizer.decode(self.ids).rstrip("\ufffd"))  # characters of decode(ids)

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """The fewest last ids that begin a text, or all where they are a space that the decoder drops; none after a
        control token, where a new text begins."""
        if not prompt or prompt[-1] in self.tokenizer.control_tokens.values():
            return []
        for n in range(1, min(len(prompt), WINDOW) + 1):
            if self.tokenizer.decode(prompt[-n:])[:1] not in ("", "\ufffd"):
                return [*prompt[-n:]]
        return [*prompt[-WINDOW:]] if not self.tokenizer.decode(prompt[-WINDOW:]) else []

    def add(self, token: int) -> str:
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        certain = max(len(text.rstrip("\ufffd")), len(text) - 7)
        new = text[self.emitted : certain]
        self.emitted = max(self.emitted, certain)
        if certain == len(text):
            del self.ids[: self.context]
            self.context, self.emitted = len(self.ids), len(self.tokenizer.decode(self.ids))
        elif len(self.ids) > 2 * WINDOW:  # broken bytes without end: a fixed number of ids is decoded for each
            del self.ids[:-WINDOW]
            self.context, self.emitted = 0, max(0, len(self.tokenizer.decode(self.ids)) - len(text) + certain)
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
    path = user_path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(f"there is no tokenizer at {file}")
    content = read_json(file)
    settings_file, template_file = file.parent / "tokenizer_config.json", file.parent / "chat_template.jinja"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    if template_file.is_file():
        try:
            settings["chat_template"] = template_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {template_file}: {error}") from None
    elif isinstance(settings.get("chat_template"), list):  # several named templates
        templates = settings["chat_template"]
        if not all(isinstance(t, dict) and {"name", "template"} <= t.keys() for t in templates):
            raise InputError(f"{settings_file}: chat_template is a list, but not of objects with name and template")
        settings["chat_template"] = next((t["template"] for t in templates if t["name"] == "default"), None)
    # transformers adds a post-processor on saving; a batch's truncation and padding are turned off anyway.
    if content | dict.fromkeys(("post_processor", "truncation", "padding")) == byte_tokenizer_json():
        return Tokenizer(None, settings)
    try:
        import tokenizers
    except ImportError:
        raise InputError(f"{file} needs the package tokenizers: pip install '.[train]'") from None
    with reporting(f"{file} is not a tokenizer.json that tokenizers can read"):
        backend = tokenizers.Tokenizer.from_file(str(file))
    return Tokenizer(backend, settings)


def utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the text is not valid Unicode at character {error.start}: {error.reason}") from None


@contextmanager
def reporting(fault: str) -> Iterator[None]:
    """Turn errors of tokenizers into an InputError: it raises plain Exception, and panics that are not even that."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise InputError(f"{fault}: {error}") from error
