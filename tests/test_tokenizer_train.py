"""The command that trains a tokenizer, and the end tokens of others."""

import json
import subprocess
import sys

import pytest

from ling_kernels.errors import InputError
from ling_kernels.tokenizer import SPECIAL_TOKENS, Tokenizer, load_tokenizer

tokenizers = pytest.importorskip("tokenizers")
from ling_kernels.tokenizer.train import main, texts_of, train_tokenizer  # noqa: E402

PROSE = (
    "The cat sat on the mat; the cats' 2025 mats weren't 19,999 mats.\n\n\tनमस्ते दुनिया, 日本語 and naïve café.\n" * 40
)
TRICKY = ["", " ", "  a\r\n\n b", "नमस्ते 日本 123 😀👩‍👩‍👧", "<|endoftext|> <role>HUMAN</role>", "\x00\x7f\ufeff\u2028"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.txt").write_text(PROSE, encoding="utf-8")
    (folder / "b.jsonl").write_text(json.dumps(dict(text="a cat, a mat, and a hat. " * 50)))
    assert main([str(folder / "a.txt"), str(folder / "b.jsonl"), "--out", str(folder / "out"), "--vocab", "340"]) == 0
    return folder


def test_a_trained_tokenizer_is_an_ordinary_tokenizer_json(folder):
    ours, theirs = load_tokenizer(folder / "out"), tokenizers.Tokenizer.from_file(str(folder / "out/tokenizer.json"))
    assert ours.vocab_size == theirs.get_vocab_size() == 340
    assert ours.vocab["<|endoftext|>"] == ours.eos_id == 340 - len(SPECIAL_TOKENS) + 1
    assert [ours.vocab[name] for name in SPECIAL_TOKENS] == [*range(340 - len(SPECIAL_TOKENS), 340)]
    for text in [PROSE, *TRICKY]:
        assert ours.encode(text, special=True) == theirs.encode(text).ids
        assert ours.decode(ours.encode(text)) == ours.decode(ours.encode(text, special=True)) == text
    assert len(ours.encode(PROSE)) < len(PROSE.encode()) / 2.5
    chat = ours.apply_chat_template([dict(role="user", content="a cat")])
    byte_level = load_tokenizer()
    assert str(chat) == str(byte_level.apply_chat_template([dict(role="user", content="a cat")]))
    assert ours.vocab["<role>"] in ours.encode(chat, special=True)


def test_ids_below_256_are_the_bytes(folder):
    ours = load_tokenizer(folder / "out")
    assert [ours.decode([i]) for i in range(128)] == [chr(i) for i in range(128)]
    assert ours.encode("\x00\x7f\u0378") == [0, 127, 0xCD, 0xB8]


def test_no_token_crosses_a_split(folder):
    """Digits stay alone; a word has at most one space before it, and keeps its combining marks."""
    ours = load_tokenizer(folder / "out")
    tokens = [ours.decode([i]) for i in range(256, 340 - len(SPECIAL_TOKENS))]
    assert not [t for t in tokens if sum(map(str.isdigit, t)) and len(t) > 1]
    assert not [t for t in tokens if " " in t[1:] and t.strip()]
    assert " mat" in tokens and " the" in tokens
    assert any(t.strip() == "नमस्ते" for t in tokens), "with its marks it is one word"


def test_equal_data_gives_equal_files(folder, monkeypatch):
    for threads, out in (("1", "one"), ("2", "two")):
        environment = dict(RAYON_NUM_THREADS=threads, PATH="", PYTHONPATH=":".join(filter(None, sys.path)))
        command = [
            sys.executable,
            "-m",
            "ling_kernels.tokenizer.train",
            "a.txt",
            "b.jsonl",
            "--vocab",
            "340",
            "--out",
            out,
        ]
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            assert (folder / out / name).read_bytes() == (folder / "out" / name).read_bytes()


def test_the_command_does_without_torch():
    code = "import sys, ling_kernels.tokenizer.train; print('torch' in sys.modules, 'tokenizers' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert shown.split() == ["False", "False"]


def test_little_data_gives_fewer_tokens(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abab abab")
    assert main([str(tmp_path / "a.txt"), "--out", str(tmp_path / "new" / "out")]) == 0
    assert "needs more text" in capsys.readouterr().out
    assert 256 + len(SPECIAL_TOKENS) < load_tokenizer(tmp_path / "new" / "out").vocab_size < 280


@pytest.mark.parametrize("flags, message", [
    ("missing.txt --out out", "no data at"), ("a.txt", "--out"), ("a.txt --out out --vocab 268", "alone are 269"),
    ("a.txt --out out --vocab many", "--vocab"), ("t.bin --out out", "holds tokens"),
    ("a.txt --out a.txt", "cannot write"), ("a.txt --out=", "--out is empty"),
    ("latin.txt --out out", "not"), ("a.txt --out there", "exists already"),
])  # fmt: skip
def test_bad_input_is_one_line(tmp_path, flags, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "latin.txt").write_bytes("café ".encode("latin-1") * 9)
    (tmp_path / "t.bin").write_bytes(b"12")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "tokenizer.json").write_text("{}")
    assert main(flags.split()) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and message in error and not (tmp_path / "out").exists()


def test_chats_give_the_text_of_their_messages(tmp_path, capsys):
    call = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"x": "tiletile"}}]}
    rows = [[{"role": "user", "content": "warpwarp"}, call], [{"role": "assistant", "content": "bank"}]]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in rows))
    (tmp_path / "a.txt").write_text("a text")
    texts = [*texts_of([str(tmp_path / "c.jsonl"), str(tmp_path / "a.txt")])]
    assert "".join(texts[:-6]) == "a text" and texts[-6:] == ["warpwarp", "", "function", "f", "tiletile", "bank"]
    assert main([str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "out")]) == 0
    assert {"tile", "warp"} <= load_tokenizer(tmp_path / "out").vocab.keys()
    (tmp_path / "c.jsonl").write_text('{"messages": 1}')
    assert main([str(tmp_path / "c.jsonl"), "--out", str(tmp_path / "other")]) == 2
    assert "c.jsonl, line 1: no conversation" in capsys.readouterr().err


def test_without_tokenizers_it_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match="pip install"):
        train_tokenizer(["text"])


def bpe_with(*special: str):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.add_special_tokens([*special])
    return backend


def test_names_of_end_tokens():
    """Those of the tokenizers that are about, where no tokenizer_config.json names one; otherwise what there is."""
    for name in ("<EOT>", "<｜end▁of▁sentence｜>", "<|im_end|>"):
        tokenizer = Tokenizer(bpe_with("<a>", name), {})
        assert tokenizer.eos_id == 1 and tokenizer.settings["eos_token"] == name
    with pytest.raises(InputError, match="set eos_token in the tokenizer_config.json.*special tokens <a>, <b>"):
        Tokenizer(bpe_with("<a>", "<b>"), {})
    with pytest.raises(InputError, match="it has no special tokens"):
        Tokenizer(bpe_with(), {})
