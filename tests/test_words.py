"""The memory of words: the ids of the package tokenizers, for every character, pattern and kind of text."""

import json
import random

import numpy as np
import pytest

from ling_kernels.errors import InputError
from ling_kernels.tokenizer import Tokenizer, load_tokenizer, words
from ling_kernels.tokenizer.train import SPLIT, train_tokenizer
from ling_kernels.train.data import tokenise
from ling_kernels.train.data.tokenise import write_tokens

tokenizers = pytest.importorskip("tokenizers")

PATTERNS = {  # of GPT-2, of ling_kernels.tokenizer.train, of Ling and of GPT-4; the last leaves text between its words
    "gpt2": None,
    "ours": SPLIT,
    "ling": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
    "gpt4": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
            r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gaps": r"(\p{L}+)|\p{N}+",
}  # fmt: skip
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
ODD = [
    *(
        "'s",
        "'ll",
        "'S",
        "'ſ",
        "K",
        "é",
        "語",
        "\u0301",
        "\u0903",
        "²",
        "Ⅷ",
        "\u00a0",
        "\u2028",
        "\u3000",
        "\x1c",
        "\x85",
    ),
    *(
        "\u200b",
        "\ufeff",
        "😀",
        "\U0001d400",
        "\U00020000",
        "\U0001d7d8",
        "ß",
        "ﬆ",
        "\ue000",
        "\uffff",
        "\u0378",
        "<x>",
    ),
]


@pytest.fixture(scope="module")
def content() -> dict:
    """tokenizer.json of a small BPE."""
    rng = random.Random(0)
    text = "".join(rng.choices("  \n.,;1207'staeioulr語éß", k=4000))
    return json.loads(train_tokenizer([text], 400).backend.to_str())


def tokenizer_with(content: dict, pattern: str | None, **changes) -> Tokenizer:
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    steps = {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL | {"use_regex": False}]}
    pre = steps if pattern else BYTE_LEVEL | {"use_regex": True}
    backend = tokenizers.Tokenizer.from_str(json.dumps(content | {"pre_tokenizer": pre} | changes))
    backend.add_tokens([tokenizers.AddedToken("<x>", special=False)])
    return Tokenizer(backend)


def some_text(rng: random.Random) -> str:
    def character() -> str:
        first, last = rng.choice([(0, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)])
        return chr(rng.randint(first, last))

    kinds = (lambda: rng.choice("aAzst'  \n\n\r\t019.,;"), lambda: rng.choice(ODD), character)
    chosen = rng.choices(kinds, rng.choice([(1, 0, 0), (20, 2, 0), (4, 4, 1)]), k=rng.randint(0, 60))
    return "".join(kind() for kind in chosen)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_ids_are_those_of_the_package(content, pattern):
    tokenizer, rng = tokenizer_with(content, PATTERNS[pattern]), random.Random(1)
    encoder = words.word_encoder(tokenizer)
    for _ in range(8):  # words that were learned before, too
        texts = [some_text(rng) for _ in range(100)]
        got, wanted = encoder.encode_batch(texts), tokenizer.encode_batch(texts)
        assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(got, wanted, strict=True))
        assert sum(map(encoder._can_cut, texts)) > 30


@pytest.mark.parametrize("pattern", ["gpt2", "ours", "ling"])
def test_every_character_is_cut_as_the_package_cuts_it(content, pattern):
    """Each beside letters, digits and spaces, beyond U+FFFF every 997th."""
    tokenizer = tokenizer_with(content, PATTERNS[pattern])
    encoder = words.word_encoder(tokenizer)
    every = [chr(i) for i in (*range(0xD800), *range(0xE000, 0x10000), *range(0x10000, 0x110000, 997))]
    text = "".join(f"a{c}1{c} " for c in every if encoder._can_cut(c))
    wanted = [piece for piece, _ in tokenizer.backend.pre_tokenizer.pre_tokenize_str(text)]
    ours = encoder.pattern.findall(text)
    visible = [piece for word in ours for piece, _ in encoder.alone.pre_tokenizer.pre_tokenize_str(word)]
    assert visible == wanted and "".join(ours) == text


@pytest.mark.parametrize("changes", [
    dict(normalizer={"type": "NFC"}), dict(pre_tokenizer={"type": "Whitespace"}), dict(pre_tokenizer=None),
    dict(pre_tokenizer=BYTE_LEVEL | {"add_prefix_space": True, "use_regex": True}),
    dict(pre_tokenizer=BYTE_LEVEL | {"use_regex": False}),
    dict(pre_tokenizer={"type": "Split", "pattern": {"Regex": " "}, "behavior": "Isolated", "invert": False}),
])  # fmt: skip
def test_tokenizers_of_another_form_are_left_to_the_package(content, changes):
    assert words.word_encoder(tokenizer_with(content, None, **changes)) is None
    assert words.word_encoder(load_tokenizer()) is None


@pytest.mark.parametrize(
    "pattern", [r"\w+", "a|^b", "(?<=a)b", r"\p{L}{2}+", "(?i:ss)", r"[\p{L}-z]", r"[a[b]]", "a.", r"\p{Lu}"]
)
def test_patterns_with_other_parts_are_not_translated(pattern):
    assert words.translated(pattern) is None


def test_text_that_is_not_valid_leaves_the_memory_as_it_was(content, monkeypatch):
    tokenizer = tokenizer_with(content, SPLIT)
    encoder = words.word_encoder(tokenizer)
    for text in ("a b\ud800", "a b"):
        if text != "a b":
            with pytest.raises(InputError, match="cannot encode the texts"):
                encoder.encode_batch([text])
        assert encoder.encode_batch(["a b"])[0].tolist() == tokenizer.encode("a b")
    assert encoder.encode_batch([]) == []
    monkeypatch.setattr(words, "MOST_WORDS", 3)
    texts = ["some more words than three", "or none", ""]
    for _ in range(2):
        assert [ids.tolist() for ids in encoder.encode_batch(texts)] == [tokenizer.encode(text) for text in texts]
        assert not encoder.words


def test_token_files_are_the_same(content, tmp_path, monkeypatch):
    tokenizer, rng = tokenizer_with(content, SPLIT), random.Random(2)
    docs = [[some_text(rng) for _ in range(rng.randint(0, 3))] for _ in range(300)]
    monkeypatch.setattr(tokenise, "BATCH", 500)
    used = []
    monkeypatch.setattr(tokenise, "word_encoder", lambda t: used.append(t) or words.word_encoder(t))
    files = []
    for many in (1 << 20, 1):
        monkeypatch.setattr(tokenise, "MANY", many)
        files.append(tmp_path / f"{many}.bin")
        write_tokens(docs, tokenizer, files[-1])
    assert len(used) == 1 and files[0].read_bytes() == files[1].read_bytes() and files[0].stat().st_size > 1000
