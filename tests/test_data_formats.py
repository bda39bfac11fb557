"""What training reads: encodings, separators, special tokens, and every kind of file."""

import gzip
import json
import signal
import struct

import numpy as np
import pytest

from ling_kernels.errors import InputError
from ling_kernels.tokenizer import load_tokenizer
from ling_kernels.train.data import gather_tokens, open_tokens, sources
from ling_kernels.train.data.__main__ import main
from ling_kernels.train.data.sources import TextOptions, find_files
from ling_kernels.train.data.tokenise import write_tokens
from ling_kernels.train.settings import Settings, settings_of, to_json

TEXTS = ["To be, or not to be.\n", "naïve Ωmega 語\n", "x" * 30]


def read(*files, **options) -> list[str]:
    return ["".join(document) for document in sources.documents(files, TextOptions(**options))]


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "utf-16", "utf-16-le", "utf-32", "latin-1", "shift_jis"])
@pytest.mark.parametrize("piece", [1, 5, 1 << 20])
def test_encodings(tmp_path, monkeypatch, encoding, piece):
    monkeypatch.setattr(sources.text, "PIECE", piece)
    content = "caf\xe9 \xdf" * 9 if encoding == "latin-1" else "日本語 abc\nх " * 9
    (tmp_path / "x.txt").write_bytes(content.encode(encoding))
    (tmp_path / "x.jsonl").write_bytes(json.dumps({"text": content}, ensure_ascii=False).encode(encoding))
    assert read(tmp_path / "x.txt", tmp_path / "x.jsonl", encoding=encoding) == [content, content]


@pytest.mark.parametrize("piece", [1, 4, 1 << 20])
@pytest.mark.parametrize(
    "content, encoding, at",
    [
        (b"abc\xff", "utf-8", 3), (b"a" * 9 + "é".encode()[:1], "utf-8", 9), ("é\xe9".encode()[:3] + b"x", "utf-8", 2),
        ("日本".encode("gb18030") + b"\xff", "gb18030", 4), (b"a\0\x00\xd8x\0", "utf-16-le", 2), 
        (b"caf\xe9", "ascii", 3),
    ],
)  # fmt: skip
def test_a_byte_that_is_not_valid_is_named(tmp_path, monkeypatch, content, encoding, at, piece):
    monkeypatch.setattr(sources.text, "PIECE", piece)
    for name in ("x.txt", "x.json", "x.md.gz"):
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        with pytest.raises(InputError, match=rf"{name} is not {encoding} at byte {at}\b.*--encoding"):
            read(tmp_path / name, encoding=encoding)


def test_the_encoding_that_a_byte_order_mark_tells_is_proposed(tmp_path):
    (tmp_path / "x.txt").write_bytes("abc".encode("utf-16"))
    with pytest.raises(InputError, match="its first bytes are those of utf-16"):
        read(tmp_path / "x.txt")


def test_a_byte_order_mark_is_no_text(tmp_path):
    mark = "\ufeff"
    for name, content in {"x.txt": "a", "x.json": '["a"]', "x.jsonl": '{"text": "a"}\n\ufeff{"text": "a"}'}.items():
        (tmp_path / name).write_bytes((mark + content).encode())
    (tmp_path / "y.txt.gz").write_bytes(gzip.compress((mark + mark).encode()))  # the second one is text
    files = [tmp_path / name for name in ("x.txt", "x.json", "x.jsonl", "y.txt.gz")]
    assert read(*files) == ["a", "a", "a", "a", mark]


@pytest.mark.parametrize("encoding", ["klingon", "rot13", "hex", "", "a\0b"])
def test_unknown_encodings_are_one_line(encoding):
    with pytest.raises(InputError, match="--encoding"):
        TextOptions(encoding=encoding)


@pytest.mark.parametrize("piece", [1, 2, 7, 1 << 20])
def test_separators(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(sources.text, "PIECE", piece)
    (tmp_path / "x.txt").write_text("<end>  one\ntwo<end><end>\n<end>three< end>\n\nfour \n<end>\n")
    (tmp_path / "y.md").write_text("five\n\nsix")
    files = [tmp_path / "x.txt", tmp_path / "y.md"]
    assert read(*files, separator="<end>") == ["  one\ntwo", "three< end>\n\nfour \n", "five\n\nsix"]
    assert read(files[1], separator="\\n\\n") == read(files[1], separator="\n\n") == ["five", "six"]
    assert len(read(*files)) == 2
    with pytest.raises(InputError, match="separator is empty"):
        TextOptions(separator="")


def test_special_tokens_in_text(tmp_path, capsys):
    """By default their names are text; the end token ends a document, and no second one follows it."""
    (tmp_path / "x.txt").write_text("one<|endoftext|>two<role><|endoftext|>")
    (tmp_path / "y.txt").write_text("three")
    base = [str(tmp_path / "x.txt"), str(tmp_path / "y.txt"), "--out"]
    assert main([*base, str(tmp_path / "plain.bin")]) == 0
    assert main([*base, str(tmp_path / "special.bin"), "--special-tokens"]) == 0
    assert "of 2 documents" in (out := capsys.readouterr().out) and "15 tokens of 3 documents" in out
    docs = open_tokens([tmp_path / "special.bin"], 320, 257)
    assert [docs[d].tolist() for d in range(3)] == [[*b"one", 257], [*b"two", 261, 257], [*b"three", 257]]
    assert len(open_tokens([tmp_path / "plain.bin"], 320, 257)) == 2


def test_the_settings_of_a_run_say_how_text_is_read(tmp_path):
    (tmp_path / "x.txt").write_bytes("日<end>本<role>".encode("gb18030"))
    settings = Settings(encoding="gb18030", separator="<end>", special_tokens=True)
    docs = gather_tokens([tmp_path], load_tokenizer(), 320, tmp_path / "cache.bin", settings.text_options)
    assert [docs[d].tolist() for d in range(2)] == [[*"日".encode(), 257], [*"本".encode(), 261, 257]]


def test_new_data_of_a_resumed_run_may_be_read_another_way():
    saved = to_json(Settings(data=("a.txt",)))
    assert settings_of(dict(data=["b.txt"], encoding="latin-1"), saved).text_options == TextOptions(encoding="latin-1")
    for data in ({}, dict(data=["a.txt"])):
        with pytest.raises(InputError, match="leave --encoding out"):
            settings_of(data | dict(encoding="latin-1"), saved)


def write_table(path, texts, kind):
    pyarrow = pytest.importorskip("pyarrow")
    table = pyarrow.table({"n": [*range(len(texts))], "text": texts})
    new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with new(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def compressed(kind, content: bytes) -> bytes:
    if kind == "gz":
        return gzip.compress(content[:9]) + gzip.compress(content[9:])
    codec = pytest.importorskip("pyarrow").Codec("zstd")
    return codec.compress(content[:9]).to_pybytes() + codec.compress(content[9:]).to_pybytes()


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_compressed_files(tmp_path, kind):
    (tmp_path / f"x.txt.{kind}").write_bytes(compressed(kind, TEXTS[1].encode() * 50))
    rows = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / f"y.jsonl.{kind}").write_bytes(compressed(kind, rows.encode()))
    assert read(*find_files([tmp_path])) == [TEXTS[1] * 50, *TEXTS]
    for damaged in (lambda b: b[:-5], lambda b: b[:20] + b"\0\0" + b[20:], lambda b: b"no " + b):
        (tmp_path / f"z.txt.{kind}").write_bytes(damaged((tmp_path / f"x.txt.{kind}").read_bytes()))
        with pytest.raises(InputError, match="cannot read .*z.txt"):
            read(tmp_path / f"z.txt.{kind}")
    with pytest.raises(InputError, match="unknown suffix"):
        (tmp_path / f"a.parquet.{kind}").write_bytes(b"")
        find_files([tmp_path / f"a.parquet.{kind}"])


@pytest.mark.parametrize("name", ["x.txt", "x.jsonl", "x.json", "x.txt.gz", "x.jsonl.gz", "x.txt.zst", "x.parquet"])
def test_data_without_text_leaves_nothing(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"")
    assert main([str(tmp_path / name), "--out", str(tmp_path / "o" / "x.bin")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert name in line and not [*tmp_path.glob("o/*")]


def test_json(tmp_path):
    file = tmp_path / "x.json"
    for content, expected in (
        ([{"text": "a", "n": 1}, "b", None, {"text": None}], ["a", "b", "", ""]), ({"text": "a"}, ["a"]), ([], []),
    ):  # fmt: skip
        file.write_text(json.dumps(content, indent=2))
        assert read(file) == expected
    for content, says in (
        ('{"a": 1}', "no field 'text': its fields are a"), ("[1]", "element 1: .* not an object"), ("3", "object"),
        ('["a", {"text": 2}]', "element 2: the field 'text' is not text"), ("[", "not JSON"),
    ):  # fmt: skip
        file.write_text(content)
        with pytest.raises(InputError, match=says):
            read(file)


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow(tmp_path, kind):
    file = tmp_path / "x.arrow"
    write_table(file, [*TEXTS, None, ""], kind)
    assert read(file) == [*TEXTS, "", ""]
    with pytest.raises(InputError, match="no column 'body', only n, text"):
        read(file, text_field="body")
    with pytest.raises(InputError, match="row 1: the field 'n' is not text but int"):
        read(file, text_field="n")
    for content in (b"", b"ARROW1", b"nothing of the kind", file.read_bytes()[:300]):
        file.write_bytes(content)
        with pytest.raises(InputError, match="cannot read"):
            read(file)


def save_to_disk(folder, texts):
    """As Hugging Face datasets save a Dataset."""
    folder.mkdir(parents=True)
    half = len(texts) // 2
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip(names, (texts[:half], texts[half:]), strict=True):
        write_table(str(folder / name), part, "stream")
    state = {"_data_files": [{"filename": name} for name in names], "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {}}))


def test_saved_hugging_face_datasets(tmp_path):
    save_to_disk(tmp_path / "d" / "train", TEXTS)
    save_to_disk(tmp_path / "d" / "test", ["held out"] * 2)
    write_table(str(tmp_path / "d" / "train" / "cache-0123.arrow"), ["from a map"], "stream")
    (tmp_path / "d" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for source in (tmp_path, tmp_path / "d", tmp_path / "d" / "train"):
        assert read(*find_files([source])) == TEXTS
    assert read(*find_files([tmp_path / "d" / "test"])) == ["held out"] * 2
    (tmp_path / "d" / "train").rename(tmp_path / "d" / "other")
    with pytest.raises(InputError, match="without the split train: name a folder of .*test"):
        find_files([tmp_path / "d"])


def test_what_a_search_in_a_folder_finds(tmp_path):
    def names():
        return [path.relative_to(tmp_path).as_posix() for path in find_files([tmp_path])]

    for name in ("README.md", "src/a.py", "src/b.cpp", ".git/c.py", "config.json", "vocab.json.gz", "d.csv", "e.bin"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    assert names() == ["README.md", "src/a.py", "src/b.cpp"]
    for name in ("z.txt", "src/y.jsonl.gz"):
        (tmp_path / name).write_bytes(b"x")
    assert names() == ["src/y.jsonl.gz", "z.txt"]
    assert find_files([tmp_path / "config.json", tmp_path / "src" / "a.py"])[0].name == "config.json"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    from tests.test_tokenizer import train_bpe

    return train_bpe(tmp_path_factory.mktemp("bpe"))


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_batches_give_the_ids_of_one_text_at_a_time(tmp_path, monkeypatch, bpe, kind, special):
    tokenizer = load_tokenizer(bpe if kind == "bpe" else None)
    eos = tokenizer.decode([tokenizer.eos_id])
    rng = np.random.default_rng(0)
    words = ["the ", "cat\n", "語", " sat", eos, "<role>", "", "."]
    docs = [["".join(rng.choice(words, 5)) for _ in range(rng.integers(0, 6))] for _ in range(60)]
    expected, empty = [], 0
    for doc in docs:
        ids = [i for text in doc for i in tokenizer.encode(text, special)]
        expected += ids + [tokenizer.eos_id] * (ids[-1:] not in ([], [tokenizer.eos_id]))
        empty += not ids
    for batch, texts in ((1, 1 << 16), (40, 3), (1 << 20, 1 << 16)):
        monkeypatch.setattr("ling_kernels.train.data.tokenise.BATCH", batch)
        monkeypatch.setattr("ling_kernels.train.data.tokenise.BATCH_TEXTS", texts)
        about = write_tokens(docs, tokenizer, tmp_path / "x.bin", special)
        assert np.fromfile(tmp_path / "x.bin", np.uint16).tolist() == expected
        assert (about["tokens"], about["empty"]) == (len(expected), empty) and empty
        found = open_tokens([tmp_path / "x.bin"], tokenizer.vocab_size, tokenizer.eos_id)
        assert len(found) == about["documents"]


def test_an_error_while_reading_leaves_nothing(tmp_path):
    def texts():
        yield ["fine"] * 3
        raise InputError("cannot read on")

    with pytest.raises(InputError, match="cannot read on"):
        write_tokens(texts(), load_tokenizer(), tmp_path / "x.bin")
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_while_tokenising_leaves_nothing(tmp_path, monkeypatch, name):
    def texts(*_):
        yield ["fine"] * 3
        signal.raise_signal(signal.Signals[name])
        yield ["late"]

    monkeypatch.setattr("ling_kernels.train.data.tokenise.cpython_documents", texts)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--out", str(tmp_path / "x.bin")]) == 75
    assert [*tmp_path.iterdir()] == [] and signal.getsignal(signal.SIGTERM) is before


def test_progress_is_a_line_where_stderr_is_no_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("ling_kernels.train.data.progress.SECONDS", 0)
    (tmp_path / "x.txt").write_text("a" * 3_000_000)
    assert main([str(tmp_path / "x.txt"), "--out", str(tmp_path / "x.bin")]) == 0
    assert "tokenising: 3 of 3 MB" in capsys.readouterr().err


def write_megatron(path, documents, dtype=np.uint16, code=8):
    """As Megatron's preprocess_data.py writes documents, each a list of sequences of ids."""
    sequences = [np.array(ids, dtype) for document in documents for ids in document]
    lengths = np.array([len(ids) for ids in sequences], "<i4")
    first = np.cumsum([0, *lengths[:-1]], dtype="<i8") * np.dtype(dtype).itemsize
    borders = np.cumsum([0, *map(len, documents)], dtype="<i8")
    header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, code, len(sequences), len(borders))
    path.write_bytes(b"".join(ids.tobytes() for ids in sequences))
    path.with_suffix(".idx").write_bytes(
        header + b"".join(a.tobytes() for a in (lengths, first[: len(lengths)], borders))
    )


@pytest.mark.parametrize("dtype, code", [(np.uint16, 8), (np.int32, 4), (np.int64, 5)])
def test_megatron_files(tmp_path, dtype, code):
    write_megatron(tmp_path / "x.bin", [[[1, 2], [3, 257]], [[4, 257, 5, 257]], [], [[257]]], dtype, code)
    assert find_files([tmp_path]) == [tmp_path / "x.bin"]
    docs = gather_tokens([tmp_path], load_tokenizer(), 320, tmp_path / "cache.bin")
    assert [docs[d].tolist() for d in range(len(docs))] == [[1, 2, 3, 257], [4, 257], [5, 257], [257]]
    assert isinstance(docs.arrays[0], np.memmap) and not (tmp_path / "cache.bin").exists()
    write_megatron(tmp_path / "x.bin", [[[1, 2], [3]], [[4, 257]]], dtype, code)
    with pytest.warns(UserWarning, match="1 of 2 documents in .*x.bin do not end with the end token 257"):
        other = open_tokens([tmp_path / "x.bin"], 320, 257)
    assert [other[d].tolist() for d in range(2)] == [[1, 2, 3], [4, 257]]
    write_megatron(tmp_path / "y.bin", [[[1, 2]], [[3, 4, 257]]], dtype, code)  # the same ids, another border
    with pytest.warns(UserWarning, match="end token"):
        assert open_tokens([tmp_path / "y.bin"], 320, 257).checksum != other.checksum


def test_damaged_megatron_files_are_one_line(tmp_path):
    file, index = tmp_path / "x.bin", tmp_path / "x.idx"

    def refused(says):
        with pytest.raises(InputError, match=says):
            open_tokens([file], 320, 257)

    write_megatron(file, [[[1, -2, 257]]], np.int32, 4)
    refused("holds the token -2")
    write_megatron(file, [[[1, 400, 257]]])
    refused("holds the token 400")
    write_megatron(file, [[]])
    refused("holds no tokens")
    write_megatron(file, [[[1, 257]]], np.float32, 7)
    refused("type 7")
    write_megatron(file, [[[1, 2]], [[3, 257]]])
    good = index.read_bytes()
    for content, says in (
        (b"TNTIDX\0\0" + good, "no index"), (good[:40], "damaged"), (good[:20], "no index"), (good + b"x", "damaged"),
        (good[:34] + b"\3" + good[35:], "damaged"), (good[:50] + b"\1" + good[51:], "one after the other"),
        (good[:-8] + b"\1" + good[-7:], "its documents"),
    ):  # fmt: skip
        index.write_bytes(content)
        refused(says)
    index.write_bytes(good)
    file.write_bytes(file.read_bytes()[:-2])
    refused("has 6 bytes, but x.idx says 4 ids of 2 bytes")
