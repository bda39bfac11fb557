"""The byte-level tokenizer alone and against `tokenizers`; other tokenizers; incremental decoding."""

import json
import random
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from ling_kernels.errors import InputError
from ling_kernels.generate.text import StoppedText
from ling_kernels.tokenizer import (
    SPECIAL_TOKENS,
    TextStream,
    Tokenizer,
    byte_settings,
    byte_tokenizer_json,
    load_tokenizer,
)

TRICKY = [
    "",
    " ",
    "plain text, 123",
    "  two  spaces\tand\r\nlines\n\n",
    "e\u0301 \u00e9 \u00ad\u00a0\u2028 \x00\x7f \ufeff\ufffd",
    "日本語 العربية 😀👩‍👩‍👧 \U0010ffff",
    "<|role_end|><role>HUMAN</role>x<|endoftext|",
    "<|endoftext|><|endoftext|> <<role>> </role",
    "[CLS] [gMASK]<think>\nhm</think><tool_call>",
    "Ġ ĊĀ ŀ are how byte-level BPE writes bytes",
]


def random_text(rng: random.Random) -> str:
    def one():
        ascii, two_or_three, four = rng.randrange(128), rng.randrange(0x80, 0xD800), rng.randrange(0x10000, 0x110000)
        return rng.choice([chr(ascii), chr(two_or_three), chr(four), rng.choice(SPECIAL_TOKENS), " "])

    return "".join(one() for _ in range(rng.randrange(60)))


TEXTS = TRICKY + [random_text(random.Random(i)) for i in range(100)]


def train_bpe(folder: Path) -> Path:
    """Write a small byte-level BPE tokenizer that splits some characters into several tokens; returns the folder."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat. naïve café 日本語 日本 😀😁 the end"] * 20, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return train_bpe(tmp_path_factory.mktemp("bpe"))


def settings(folder, **values):
    (folder / "tokenizer_config.json").write_text(json.dumps(values))
    return folder


def test_bytes_are_their_own_ids():
    tokenizer, data = load_tokenizer(), random.Random(0).randbytes(10_000)
    assert tokenizer.encode("aé<role>") == [97, 0xC3, 0xA9, *b"<role>"]
    assert [ids.tolist() for ids in tokenizer.encode_batch(["aé", ""])] == [[97, 0xC3, 0xA9], []]
    assert [ids.tolist() for ids in tokenizer.encode_batch(["a<role>"], special=True)] == [[97, 261]]
    assert tokenizer.decode(data) == data.decode("utf-8", "replace")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (256, 257, 256 + len(SPECIAL_TOKENS))
    assert tokenizer.vocab_size <= 320
    assert tokenizer.decode([104, 300, 105]) == "hi", "ids of the padded vocabulary have no text"


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_ids_outside_the_vocabulary_are_skipped(kind, bpe):
    """Negative ids too, such as a label's -100 and the engine's -1 for NaN logits."""
    tokenizer = load_tokenizer(bpe if kind == "bpe" else None)
    hi = tokenizer.encode("hi")
    assert tokenizer.decode([hi[0], -1, -2, -100, tokenizer.vocab_size, 2**40, *hi[1:]]) == "hi"


def test_special_tokens_only_when_asked():
    tokenizer = load_tokenizer()
    assert tokenizer.encode("a<|role_end|>b</role>", special=True) == [97, 260, 98, 262]
    for text in TEXTS:
        plain, special = tokenizer.encode(text), tokenizer.encode(text, special=True)
        assert tokenizer.decode(plain) == tokenizer.decode(special) == text
        assert max(plain, default=0) < 256


def test_tokenizers_loads_the_saved_byte_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    byte_tokenizer = load_tokenizer()
    byte_tokenizer.save(tmp_path)
    reference = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert reference.get_vocab_size() == byte_tokenizer.vocab_size
    for text in TEXTS:
        ids = byte_tokenizer.encode(text, special=True)
        reference.encode_special_tokens = False
        assert reference.encode(text).ids == ids
        assert reference.decode(ids, skip_special_tokens=False) == text
        reference.encode_special_tokens = True
        assert reference.encode(text).ids == byte_tokenizer.encode(text)
    data = random.Random(1).randbytes(2000)
    assert reference.decode(list(data)) == byte_tokenizer.decode(data)


def test_the_saved_byte_tokenizer_loads_without_tokenizers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    load_tokenizer().save(tmp_path / "new" / "folder")
    resaved = tmp_path / "new" / "folder" / "tokenizer.json"
    for path in (resaved.parent, str(resaved)):
        tokenizer = load_tokenizer(path)
        assert tokenizer.backend is None
        assert tokenizer.settings == byte_settings()


def test_bpe(bpe, tmp_path):
    tokenizer = load_tokenizer(settings(bpe, bos_token={"content": "<s>"}, eos_token="</s>", chat_template="x"))
    assert tokenizer.chat_template == "x"
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    assert len(tokenizer.encode("the cat")) < len("the cat")
    assert tokenizer.encode("</s>", special=True) == [1] != tokenizer.encode("</s>")
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.encode_batch(["日本"])[0]
    assert ids.dtype == np.uint16
    assert ids.tolist() == tokenizer.encode("日本")
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded.encode("the 日本 end") == tokenizer.encode("the 日本 end")
    assert loaded.settings == tokenizer.settings


def test_end_token_and_chat_template_from_other_files(bpe):
    (bpe / "tokenizer_config.json").unlink(missing_ok=True)
    assert load_tokenizer(bpe).eos_id == 1, "a common name is found without tokenizer_config.json"
    several = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    assert load_tokenizer(settings(bpe, chat_template=several)).chat_template == "d"
    (bpe / "chat_template.jinja").write_text("file")
    assert load_tokenizer(bpe).chat_template == "file"
    (bpe / "chat_template.jinja").unlink()


@pytest.mark.parametrize("text", TEXTS[:30], ids=range(30))
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_incremental_decoding(text, kind, bpe):
    tokenizer = load_tokenizer(bpe if kind == "bpe" else None)
    stream, ids = TextStream(tokenizer), tokenizer.encode(text, special=True)
    pieces = [stream.add(i) for i in ids]
    assert "".join(pieces) + stream.end() == text
    if "\ufffd" not in text:
        assert all("\ufffd" not in piece for piece in pieces)


def test_incremental_decoding_holds_back_at_most_seven_characters():
    stream = TextStream(load_tokenizer())
    assert [stream.add(i) for i in "aé😀b".encode()] == ["a", "", "é", "", "", "", "😀", "b"]
    for seed in range(20):
        data = random.Random(seed).randbytes(200)
        pieces = [stream.add(i) for i in data]
        for n in range(len(data)):
            assert data[: n + 1].decode("utf-8", "replace").startswith("".join(pieces[: n + 1]))
            assert len(data[: n + 1].decode("utf-8", "replace")) - len("".join(pieces[: n + 1])) <= 7
        assert "".join(pieces) + stream.end() == data.decode("utf-8", "replace")


@pytest.mark.parametrize("data", [
    b"\x80" * 4000, b"\xe3\x81" * 2000, b"\xf0\x9f\x98" * 1500, random.Random(0).randbytes(4000),
    (b"\xff" * 97 + "é".encode()) * 40,
])  # fmt: skip
def test_broken_bytes_take_the_same_time_each(data, monkeypatch):
    """A stream of them decodes a bounded number of ids for each, and spells what a whole decode does."""
    tokenizer, decoded = load_tokenizer(), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    stream = TextStream(tokenizer)
    text = "".join(map(stream.add, data)) + stream.end()
    assert text == data.decode("utf-8", "replace")
    assert max(decoded) <= 70 and len(decoded) <= 2 * len(data) + 2


def sentencepiece(*words: str) -> Tokenizer:
    """This decoder drops the space before the first token and decodes unknown characters byte by byte."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    backend = tokenizers.Tokenizer(tokenizers.models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True))
    decoders = tokenizers.decoders
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    backend.add_special_tokens(["</s>"])
    return Tokenizer(backend, {})


@pytest.mark.parametrize("prompt, new, pieces", [
    (["▁the"], ["▁cat", "s"], [" cat", "s"]),
    (["▁the", "▁"], ["▁cat"], [" cat"]),
    (["</s>"], ["▁cat", "▁the"], ["cat", " the"]),
    ([], ["▁cat"], ["cat"]),
    (["▁the", "<0xC3>"], ["<0xA9>", "▁cat"], ["é", " cat"]),
    (["▁the", "<0xC3>"], ["<0xA9>", "<0xC3>", "<0xA9>", "<0xC3>", "<0xA9>"], ["é", "", "é", "", "é"]),
    (["<0xA9>"] * 40, ["▁cat"], ["cat"]),
    (["▁"], ["▁cat", "▁the"], [" cat", " the"]),
])  # fmt: skip
def test_a_text_continues_its_prompt(prompt, new, pieces):
    """The first space is kept, and a character that the prompt begins is completed."""
    tokenizer = sentencepiece("▁the", "▁cat", "s", "▁")
    stream = TextStream(tokenizer, [tokenizer.vocab[word] for word in prompt])
    assert [stream.add(tokenizer.vocab[word]) for word in new] == pieces and stream.end() == ""
    stopped = StoppedText(tokenizer, ["zz"], [tokenizer.vocab[word] for word in prompt])
    assert "".join(stopped.add(tokenizer.vocab[word]) for word in new) + stopped.end() == "".join(pieces)


@pytest.mark.parametrize("more", [
    dict(truncation=dict(direction="Right", max_length=16, strategy="LongestFirst", stride=0)),
    dict(padding=dict(strategy=dict(Fixed=128), direction="Right", pad_to_multiple_of=None, pad_id=1, pad_type_id=0,
                      pad_token="</s>")),
], ids=["truncation", "padding"])  # fmt: skip
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_truncation_and_padding_of_a_file_are_off(kind, more, bpe, tmp_path):
    content = byte_tokenizer_json() if kind == "bytes" else json.loads((bpe / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | more))
    (tmp_path / "plain.json").write_text(json.dumps(content))
    settings(tmp_path, eos_token="<|endoftext|>" if kind == "bytes" else "</s>")
    tokenizer, plain = load_tokenizer(tmp_path), load_tokenizer(tmp_path / "plain.json")
    text = "abcdefghij" * 10
    for special in (False, True):
        assert tokenizer.encode(text, special) == plain.encode(text, special) and len(plain.encode(text)) > 16
    assert np.array_equal(tokenizer.encode_batch([text])[0], plain.encode_batch([text])[0])
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode(text) == plain.encode(text)


def test_incremental_decoding_with_other_decoders():
    """This decoder drops the space before the first token and decodes unknown characters byte by byte."""
    tokenizers = pytest.importorskip("tokenizers")
    words = ["</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁the", "▁cat", "s"]
    vocab = {word: i for i, word in enumerate(words)}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True))
    decoders = tokenizers.decoders
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(parts)
    tokenizer = Tokenizer(backend, {})
    ids = [vocab[word] for word in ["▁the", "▁cat", "s", *(f"<0x{byte:02X}>" for byte in "é😀".encode()), "▁the"]]
    stream = TextStream(tokenizer)
    assert [stream.add(i) for i in ids] == ["the", " cat", "s", "", "é", "", "", "", "😀", " the"]
    assert stream.end() == ""


def test_bad_tokenizers(bpe, tmp_path, monkeypatch):
    def refuses(path, message):
        with pytest.raises(InputError, match=message):
            load_tokenizer(path)

    refuses(tmp_path, "there is no tokenizer at")
    refuses(tmp_path / "none.json", "there is no tokenizer at")
    file = tmp_path / "tokenizer.json"
    without_eos = (bpe / "tokenizer.json").read_text().replace("</s>", "</q>").encode().decode("latin-1")
    bad = {"{": "not readable JSON", "\xff": "not readable JSON", "[]": "not a JSON object"}
    for content, message in (bad | {'{"model": 3}': "not a tokenizer.json", without_eos: "names no end token"}).items():
        file.write_bytes(content.encode("latin-1"))
        refuses(tmp_path, message)
    content = json.loads((bpe / "tokenizer.json").read_text())
    content["model"] |= dict(continuing_subword_prefix="a much longer prefix than any merged token is")
    file.write_text(json.dumps(content))
    refuses(tmp_path, "not a tokenizer.json")
    refuses(settings(bpe, eos_token="<nowhere>"), "'<nowhere>', which is not in")
    refuses(settings(bpe, eos_token=["</s>"]), "eos_token .* is not text")
    refuses(settings(bpe, eos_token="</s>", bos_token={"content": 3}), "bos_token 3, which is not text")
    for template in (["x"], [{"name": "default"}], {"default": "x"}, 3, [{"name": "default", "template": 3}]):
        refuses(settings(bpe, eos_token="</s>", chat_template=template), "chat_template")
    settings(bpe, eos_token="</s>")
    (bpe / "chat_template.jinja").write_bytes(b"\xff")
    refuses(bpe, "cannot read .*chat_template.jinja")
    (bpe / "chat_template.jinja").unlink()
    settings(bpe, eos_token="</s>")
    with pytest.raises(InputError, match="not valid Unicode at character 1"):
        load_tokenizer().encode("a\ud800")
    with pytest.raises(InputError, match="cannot write the tokenizer"):
        load_tokenizer().save(file)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refuses(bpe, r"pip install .\.\[train\]")


def test_settings_with_lone_surrogates_are_saved(tmp_path):
    tokenizer = Tokenizer(None, byte_settings() | {"note": "\ud800"})
    tokenizer.save(tmp_path)
    assert load_tokenizer(tmp_path).settings == tokenizer.settings


def test_a_text_that_tokenizers_cannot_encode_is_one_line():
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"</s>": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer = Tokenizer(backend, {"eos_token": "</s>"})
    assert tokenizer.encode("a") == [1]
    with pytest.raises(InputError, match="cannot encode this text: .*UNK"):
        tokenizer.encode("b")


def test_threads_share_a_tokenizer(tmp_path):
    """One thread's control tokens are not another's: the setting belongs to the backend, which both use."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = load_tokenizer(train_bpe(tmp_path))

    class Slow:
        """The backend, with another thread's turn between its setting and its work."""

        encode_special_tokens = False

        def encode(self, text, add_special_tokens):
            time.sleep(0.02)
            real = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
            real.encode_special_tokens = self.encode_special_tokens
            return real.encode(text, add_special_tokens=add_special_tokens)

    want = {special: tokenizer.encode("the</s>cat", special) for special in (False, True)}
    assert want[False] != want[True]
    tokenizer.backend = Slow()
    with ThreadPoolExecutor(4) as pool:
        for special, ids in pool.map(lambda i: (i % 2 == 0, tokenizer.encode("the</s>cat", i % 2 == 0)), range(8)):
            assert ids == want[special]


@pytest.mark.parametrize("value", [5, None, b"x", ["a"]])
def test_arguments_of_another_kind_are_refused(value):
    with pytest.raises(InputError, match="encodes text"):
        load_tokenizer().encode(value)
    if value is not None:
        with pytest.raises(InputError, match="no path"):
            load_tokenizer(value)
