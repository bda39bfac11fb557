"""Byte-level BPE of many texts by a memory of words.

Byte-level BPE cuts a text into words by a regular expression and encodes each word alone, whatever stands around it.
Most words of a text came before, so here the package tokenizers encodes each of them once: Python's `re` cuts, a dict
gives the number of a word, and numpy puts the ids together. They are the package's ids. It also encodes what it might
cut differently: texts with letters, marks, numbers or spaces beyond U+FFFF or with a token that is no special one, and
every text of a tokenizer of another form.
"""

import functools
import json
import re
import threading
from collections.abc import Sequence
from itertools import islice

import numpy as np

from .tokenizer import Tokenizer, reporting

# The pattern of ByteLevel itself, which is GPT-2's.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# A pattern of these parts means the same in `re` and in the package's Oniguruma. Two differences are why some are not
# among them: {2}+ and {2}? have other meanings, and one letter that ignores case may match two (ß and ss).
PART = re.compile(
    r"(?P<group>\(\?i:(?:'s\|'t\|'re\|'ve\|'m\|'ll\|'d|\[sdmt\]\|ll\|ve\|re)\)|\(\?[:!=]|\((?!\?)|[)|])"
    r"|(?P<open>\[\^?)|(?P<close>\])|(?P<repeat>[?*+]|\{\d+(?:,\d*)?\}(?![?+]))"
    r"|(?P<class>\\p\{[LMN]\}|\\s)|(?P<space>\\S)|\\[rn]|['\w !\",/:;<=>@_`~%#]"
)
ASTRAL = re.compile("[\U00010000-\U0010ffff]")
MOST_WORDS, MOST_IDS = 1 << 19, 1 << 23  # that are remembered, in about 100 MB
MOST_ADDED = 100  # tokens that are looked for in each text


class Words(dict):
    """The number of each word; a new word has the next one."""

    def __missing__(self, word: str) -> int:
        number = self[word] = len(self)
        return number


class WordEncoder:
    """Encodes texts as `tokenizer.encode_batch` does."""

    def __init__(self, tokenizer: Tokenizer, alone, pattern: re.Pattern[str], added: Sequence[str]):
        """alone: the tokenizer's backend without tokens that are added, which takes all of its input as one word.
        pattern: finds the words. added: tokens that are found in any text."""
        self.tokenizer, self.alone, self.pattern, self.added = tokenizer, alone, pattern, added
        self.dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
        self.lock = threading.Lock()
        self.harmless: dict[str, bool] = {}  # characters beyond U+FFFF: whether no class of a pattern has it
        self.words: Words
        self.ids: np.ndarray  # of all words
        self.starts: np.ndarray  # of each word, where it begins in ids
        self.sizes: np.ndarray  # its number of ids
        self.characters: np.ndarray
        self._forget()

    def __getstate__(self) -> dict:
        """For pickle, with the words so far."""
        with self.lock:
            return vars(self) | {"lock": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, lock=threading.Lock())

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Ids of each text. Raises InputError for text that is not valid Unicode."""
        known = [self._can_cut(text) for text in texts]
        others = iter(self.tokenizer.encode_batch([t for t, ok in zip(texts, known, strict=True) if not ok]))
        with self.lock:
            found = iter(self._by_words([t for t, ok in zip(texts, known, strict=True) if ok]))
        return [next(found if ok else others) for ok in known]

    def _can_cut(self, text: str) -> bool:
        if any(token in text for token in self.added):
            return False
        return text.isascii() or all(map(self._is_harmless, {*ASTRAL.findall(text)}))

    def _is_harmless(self, character: str) -> bool:
        if character not in self.harmless:
            self.harmless[character] = not any(runs(name, character) for name in (r"\p{L}", r"\p{M}", r"\p{N}", r"\s"))
        return self.harmless[character]

    def _by_words(self, texts: list[str]) -> list[np.ndarray]:
        words: list[str] = []
        stops = [0]  # number of words up to the end of each text
        for text in texts:
            words += self.pattern.findall(text)
            stops.append(len(words))
        known = len(self.words)
        try:
            numbers = np.fromiter(map(self.words.__getitem__, words), np.int64, len(words))
            self._learn([*islice(self.words, known, None)])
        except BaseException:  # a signal, too, may come between a word and its ids
            self._forget()
            raise
        if int(self.characters[numbers].sum()) != sum(map(len, texts)):  # the pattern leaves text between its words
            return self.tokenizer.encode_batch(texts)
        sizes = self.sizes[numbers]
        ends = np.cumsum(sizes)
        ids = self.ids[np.repeat(self.starts[numbers] - (ends - sizes), sizes) + np.arange(sizes.sum())]
        if len(self.words) > MOST_WORDS or len(self.ids) > MOST_IDS:
            self._forget()
        return np.split(ids, np.append(0, ends)[stops[1:-1]]) if texts else []

    def _learn(self, new: list[str]) -> None:
        if not new:
            return
        with reporting("tokenizer.json cannot encode the texts"):
            found = [encoding.ids for encoding in self.alone.encode_batch_fast(new, add_special_tokens=False)]
        sizes = np.fromiter(map(len, found), np.int64, len(found))
        ids = np.fromiter((i for part in found for i in part), self.dtype, int(sizes.sum()))
        self.starts = np.concatenate([self.starts, len(self.ids) + np.cumsum(sizes) - sizes])
        self.sizes, self.ids = np.concatenate([self.sizes, sizes]), np.concatenate([self.ids, ids])
        self.characters = np.concatenate([self.characters, np.fromiter(map(len, new), np.int64, len(new))])

    def _forget(self) -> None:
        """Begin without any word."""
        self.words, self.ids = Words(), np.zeros(0, self.dtype)
        self.starts = self.sizes = self.characters = np.zeros(0, np.int64)


def word_encoder(tokenizer: Tokenizer) -> WordEncoder | None:
    """None for a tokenizer of another form than byte-level BPE with a pattern that `re` understands."""
    if tokenizer.backend is None:
        return None
    import tokenizers

    content = json.loads(tokenizer.backend.to_str())
    steps = content["pre_tokenizer"] or {}
    *before, last = steps.get("pretokenizers") or [steps]
    byte_level = last.get("type") == "ByteLevel" and not last.get("add_prefix_space")
    plain = content["model"]["type"] == "BPE" and not content["model"].get("dropout") and not content["normalizer"]
    if not (byte_level and plain) or len(before) > 1 or bool(before) == last.get("use_regex", True):
        return None
    pattern = translated(split_pattern(before[0]) if before else GPT2)
    added = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values() if not token.special]
    if pattern is None or len(added) > MOST_ADDED:
        return None
    content |= dict(added_tokens=[], post_processor=None, pre_tokenizer=last | {"use_regex": False})
    alone = tokenizers.Tokenizer.from_str(json.dumps(content))
    alone.no_truncation()
    alone.no_padding()
    return WordEncoder(tokenizer, alone, pattern, added)


def split_pattern(step: dict) -> str:
    """The pattern of a Split whose matches and whose gaps are words, else one that is not translated."""
    whole = step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert")
    return step["pattern"].get("Regex", "$") if whole else "$"


def translated(pattern: str) -> re.Pattern[str] | None:
    """A pattern of the package for `re`, with its own classes of characters up to U+FFFF. None if it has other parts
    than PART."""
    result, at, inside = "", 0, False
    while at < len(pattern):
        part = PART.match(pattern, at)
        if part is None or (inside and (part["open"] or part["space"])):
            return None
        text, at = part[0], part.end()
        if part["class"]:
            text = characters_of(text) if inside else f"[{characters_of(text)}]"
        elif text == "(" and not inside:
            text = "(?:"  # findall gives whole matches then
        elif part["space"]:
            text = f"[^{characters_of(chr(92) + 's')}]"
        inside = bool(part["open"]) or inside and not part["close"]
        result += text
    try:
        return re.compile(result)
    except re.error:  # possessive quantifiers before Python 3.11
        return None


@functools.cache
def characters_of(name: str) -> str:
    """A class such as \\p{L} up to U+FFFF, as ranges for `re`."""
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))
    return "".join(f"\\u{ord(run[0]):04x}-\\u{ord(run[-1]):04x}" for run in runs(name, every))


def runs(name: str, text: str) -> list[str]:
    """The longest parts of a text that the package finds in a class such as \\p{L}."""
    import tokenizers

    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(name + "+"), "removed", invert=True)
    return [part for part, _ in split.pre_tokenize_str(text)]
