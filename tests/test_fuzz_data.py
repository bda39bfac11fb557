"""Fuzzer of training data: the documents that the files hold, or one line that names the file."""

import json
import warnings

import numpy as np
import pytest

from ling_kernels.errors import InputError
from ling_kernels.tokenizer import load_tokenizer
from ling_kernels.train.data import gather_tokens, open_tokens, sources
from ling_kernels.train.data.tokenise import write_tokens
from tests.fuzz import changed, damaged, fuzz, hypothesis, result_or_error, st, values
from tests.test_data import texts_of
from tests.test_data_formats import compressed, write_megatron, write_table
from tests.test_tokenizer import train_bpe

given, example = hypothesis.given, hypothesis.example
VOCABULARY = 320
REFUSED = object()  # instead of a text: a row for which the file is refused
words = st.sampled_from(["a", "\n", "\r\n", "\u2028", "\0", "é", "語", "😀", '"', "\\", " ", "<|endoftext|>", "\ufeff"])
texts = st.lists(words | st.characters(exclude_categories=["Cs"]), max_size=12).map("".join)


def documents(files, folder, field="text"):
    """The texts of files as training reads them, or None where they are refused."""
    cache = folder / "cache.bin"
    cache.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        docs = result_or_error(
            gather_tokens, files, load_tokenizer(), VOCABULARY, cache, sources.TextOptions(field), kinds=(InputError,)
        )
    assert docs is not None or not cache.with_name(".cache.bin.partial").exists()
    return docs and texts_of(docs)


def expected(rows):
    """The documents of rows, each a text, None or REFUSED; None for files that are refused or have no text."""
    found = [row for row in rows if row]
    return None if REFUSED in rows or not found else found


@st.composite
def lines(draw):
    """(a line of a .jsonl file, its text)."""
    text = draw(texts)
    row = draw(st.sampled_from([{"text": text}, {"text": text, "n": [1, {"text": 2}]}, {"a": None, "text": text}]))
    space, ascii = draw(st.sampled_from([b"", b" ", b"\t"])), draw(st.booleans())
    end = draw(st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n \n"]))
    line = space + json.dumps(row, ensure_ascii=ascii).encode() + space + end
    return draw(st.sampled_from([(line, text)] * 6 + EMPTY_LINES))


EMPTY_LINES = [(b'{"text": null}\n', None), (b'{"n": 1, "n": 2, "text": ""}\n', "")]
BAD_LINES = [
    b"{", b"[]", b"3", b"null", b'"text"', b'{"text": 3}', b'{"text": ["a"]}', b'{"txt": "a"}', b"{}",
    b'{"text": "\\ud800"}', b'{"text": "\xff"}', b"{'text': 'a'}", b"\xef\xbb\xbf{}", b'{"text": tru}',
    b'{"text": "a"} x', b"[" * 3000,
]  # fmt: skip
bad_lines = st.sampled_from(BAD_LINES).map(lambda line: (line + b"\n", REFUSED))


@fuzz(200)
@given(st.lists(lines(), max_size=6), st.lists(bad_lines, max_size=1))
def test_jsonl(tmp_path_factory, good, bad):
    folder, rows = tmp_path_factory.getbasetemp(), good + bad
    (folder / "x.jsonl").write_bytes(b"".join(line for line, _ in rows))
    assert documents([folder / "x.jsonl"], folder) == expected([text for _, text in rows])


@fuzz(100)
@given(st.data(), st.lists(lines(), min_size=1, max_size=4))
def test_damaged_jsonl(tmp_path_factory, data, rows):
    folder = tmp_path_factory.getbasetemp()
    (folder / "x.jsonl").write_bytes(data.draw(damaged(b"".join(line for line, _ in rows))))
    documents([folder / "x.jsonl"], folder)


@fuzz(100)
@given(st.lists(values | st.fixed_dictionaries({"text": values}), min_size=1, max_size=3))
def test_jsonl_of_any_values(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp()
    (folder / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [row["text"] if isinstance(row, dict) and "text" in row else REFUSED for row in rows]
    fits = [row if row is None or (isinstance(row, str) and "\ud800" not in row) else REFUSED for row in given]
    assert documents([folder / "x.jsonl"], folder) == expected(fits)


@fuzz(150)
@given(st.lists(texts | st.none(), max_size=8), st.data())
def test_parquet(tmp_path_factory, rows, data):
    """Every type and encoding of a column of text."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder, string = tmp_path_factory.getbasetemp(), pyarrow.string()
    kinds = [string, pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), string), pyarrow.string_view()]
    column = pyarrow.array(rows, string).cast(data.draw(st.sampled_from(kinds)))
    options = dict(compression=data.draw(st.sampled_from(["none", "snappy", "zstd"])),
                   use_dictionary=data.draw(st.booleans()), row_group_size=data.draw(st.integers(1, 9)))  # fmt: skip
    table = pyarrow.table({"n": pyarrow.nulls(len(rows)), "text": column})
    parquet.write_table(table, folder / "x.parquet", **options)
    assert documents([folder / "x.parquet"], folder) == expected(rows)
    assert documents([folder / "x.parquet"], folder, "body") is None
    if damage := data.draw(st.booleans()):
        (folder / "x.parquet").write_bytes(data.draw(damaged((folder / "x.parquet").read_bytes())))
        assert damage and documents([folder / "x.parquet"], folder) is not REFUSED


@fuzz(60)
@given(st.data())
def test_parquet_of_other_types(tmp_path_factory, data):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.getbasetemp()
    columns = [[1, None], [b"a", None], [["a"], None], [{"text": "a"}, None], [0.5, None], [True, None], [None, None]]
    parquet.write_table(pyarrow.table({"text": data.draw(st.sampled_from(columns))}), folder / "x.parquet")
    assert documents([folder / "x.parquet"], folder) is None


@fuzz(150)
@given(st.binary(max_size=60) | texts.map(str.encode), st.integers(1, 9), st.sampled_from(["bytes", "bpe"]))
def test_text_files(tmp_path_factory, bpe, content, piece, kind):
    """Pieces make up the file, but for a byte order mark, and the ids spell it; a file that is no UTF-8 is refused."""
    file = tmp_path_factory.getbasetemp() / "x.txt"
    file.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources.text, "PIECE", piece)
        pieces = result_or_error(lambda: [p for d in sources.documents([file]) for p in d], kinds=(InputError,))
    try:
        expected = content.decode().removeprefix("\ufeff")
    except UnicodeDecodeError:
        assert pieces is None
    else:
        assert "".join(pieces) == expected
        ids = load_tokenizer(bpe if kind == "bpe" else None).encode_batch(pieces)
        assert load_tokenizer(bpe if kind == "bpe" else None).decode(np.concatenate([[], *ids])) == expected


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return train_bpe(tmp_path_factory.mktemp("bpe"))


@fuzz(150)
@given(st.data(), st.lists(texts.filter(bool), min_size=1, max_size=4))
def test_token_files(tmp_path_factory, data, rows):
    """A .bin file and the .json beside it, either of which may be changed."""
    folder, tokenizer = tmp_path_factory.getbasetemp(), load_tokenizer()
    file = folder / "x.bin"
    about = write_tokens([[row] for row in rows], tokenizer, file)
    assert texts_of(open_tokens([file], VOCABULARY, tokenizer.eos_id)) == rows
    if data.draw(st.booleans()):
        file.write_bytes(data.draw(damaged(file.read_bytes())))
    else:
        (folder / "x.json").write_text(json.dumps(data.draw(changed(about))))
    docs = result_or_error(open_tokens, [file], VOCABULARY, tokenizer.eos_id, kinds=(InputError,))
    if docs is not None:
        dtype = json.loads((folder / "x.json").read_text())["dtype"]
        ids = np.frombuffer(file.read_bytes(), dtype)
        assert np.concatenate([docs[d] for d in range(len(docs))]).tolist() == ids.tolist()
        assert ids.max() < VOCABULARY


@fuzz(150)
@given(st.data(), st.lists(st.lists(st.lists(st.integers(0, 319), max_size=4), max_size=3), min_size=1, max_size=4))
def test_megatron_files(tmp_path_factory, data, rows):
    folder, eos = tmp_path_factory.getbasetemp(), load_tokenizer().eos_id
    file = folder / "m.bin"
    write_megatron(file, rows)
    ids = [i for document in rows for sequence in document for i in sequence]
    for damage in (False, True):
        if damage:
            changed_file = data.draw(st.sampled_from([file, file.with_suffix(".idx")]))
            changed_file.write_bytes(data.draw(damaged(changed_file.read_bytes())))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            docs = result_or_error(open_tokens, [file], VOCABULARY, eos, kinds=(InputError,))
        assert damage or (docs is not None) == bool(ids)
        if docs is not None:
            found = np.concatenate([docs[d] for d in range(len(docs))])
            assert found.max() < VOCABULARY and len(found) == docs.tokens
            assert damage or found.tolist() == ids


@fuzz(100)
@given(st.data(), st.lists(texts | st.none(), max_size=6), st.sampled_from(["stream", "file"]))
def test_damaged_arrow(tmp_path_factory, data, rows, kind):
    """Offsets of a damaged file point anywhere: they are checked before they are followed."""
    file = tmp_path_factory.getbasetemp() / "x.arrow"
    write_table(str(file), rows or [""], kind)
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    documents([file], tmp_path_factory.getbasetemp())


@fuzz(100)
@given(st.data(), texts, st.sampled_from(["gz", "zst"]))
def test_compressed_text(tmp_path_factory, data, content, kind):
    file = tmp_path_factory.getbasetemp() / f"x.txt.{kind}"
    file.write_bytes(compressed(kind, content.encode()))
    assert documents([file], file.parent) == expected([content.removeprefix("\ufeff")])
    file.write_bytes(data.draw(damaged(file.read_bytes())))
    documents([file], file.parent)


@fuzz(150)
@given(st.lists(texts, max_size=5), st.sampled_from(["\n\n", "<|endoftext|>", "#"]), st.integers(1, 9))
def test_separators(tmp_path_factory, parts, separator, piece):
    file = tmp_path_factory.getbasetemp() / "s.txt"
    file.write_bytes(separator.join(parts).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources.text, "PIECE", piece)
        found = ["".join(d) for d in sources.documents([file], sources.TextOptions(separator=separator))]
    whole = separator.join(parts).removeprefix("\ufeff")
    assert found == [part for part in whole.split(separator) if part and not part.isspace()]
