"""Documents, .bin files and packing."""

import json
from collections import Counter

import numpy as np
import pytest
import torch

from ling_kernels.model import Ling
from ling_kernels.tokenizer import load_tokenizer
from ling_kernels.train.data import Documents, Packed, documents, gather_tokens, hold_out, open_tokens, sources
from ling_kernels.train.data import __main__ as command
from ling_kernels.train.data.tokenise import write_tokens
from tests.training import tiniest

EOS = 257
TEXTS = ["To be, or not to be.\nThat is the question:\n", "naïve Ωmega 語\n", "no line end", "x" * 300 + "\n"]


def documents_of(*lengths) -> Documents:
    """Document d holds the token d, `length` times."""
    ids = np.concatenate([np.full(n, d) for d, n in enumerate(lengths)])
    end = np.cumsum(lengths)
    return Documents([ids], np.zeros(len(lengths), np.int32), end - np.array(lengths), end, 0)


def texts_of(docs: Documents) -> list[str]:
    assert all(docs[d][-1] == EOS for d in range(len(docs)))
    return [load_tokenizer(None).decode(docs[d][:-1]) for d in range(len(docs))]


@pytest.mark.parametrize("seed", [0, 7, None])
@pytest.mark.parametrize("seq_len", [1, 4, 23, 92])
def test_an_epoch_has_every_token_once(seed, seq_len):
    docs = documents_of(3, 17, 1, 40, 9, 22)
    docs.arrays[0][:] = range(92)
    rows = 92 // seq_len
    epochs = [Packed(docs, seq_len, seed).batch(range(e * rows, (e + 1) * rows)).ids for e in (0, 1)]
    for epoch in epochs:
        assert sorted(epoch.flatten().tolist()) == list(range(92))
        for row in epoch:  # within a row documents are complete, or cut at the row's end
            breaks = [i for i in range(1, seq_len) if row[i] != row[i - 1] + 1]
            assert {int(row[i]) for i in breaks} <= set(docs.start) and {int(row[i - 1]) + 1 for i in breaks} <= set(
                docs.end
            )
    assert torch.equal(*epochs) == (seed is None)


@pytest.mark.parametrize("seq_len", [5, 16, 91, 93, 300])
def test_epochs_follow_one_another_without_a_gap(seq_len):
    docs = documents_of(3, 17, 1, 40, 9, 22)
    docs.arrays[0][:] = range(92)
    packed = Packed(docs, seq_len, 3)
    rows = packed.block * 60
    seen = Counter(packed.batch(range(rows)).ids.flatten().tolist())
    whole, rest = divmod(rows * seq_len, 92)
    assert set(seen.values()) <= {whole, whole + 1} and sum(n > whole for n in seen.values()) == rest


def test_rows_of_a_batch_come_from_many_documents():
    docs = documents_of(*[1000] * 20)
    rows = Packed(docs, 10, 0).batch(range(20)).ids
    assert len(rows[:, 0].unique()) > 8


def test_cu_seqlens_cut_at_every_document_and_every_row():
    docs = documents_of(3, 17, 1, 40, 9, 22)
    batch = Packed(docs, 16, 3).batch(range(4, 12))
    cu = batch.cu_seqlens.tolist()
    flat = batch.ids.flatten()
    assert batch.cu_seqlens.dtype == torch.int32 and cu[0] == 0 and cu[-1] == flat.numel()
    changes = [i for i in range(1, len(flat)) if flat[i] != flat[i - 1]]
    assert len(changes) > len(batch.ids) and cu[:-1] == sorted({0, *changes, *range(0, len(flat), 16)})
    lengths = np.diff(cu)
    assert batch.targets() == sum(lengths - 1) and batch.targets(2) == sum(np.maximum(lengths - 2, 0))


def test_a_row_depends_on_its_number_alone():
    docs = documents_of(*range(1, 40))
    whole = Packed(docs, 32, 5).batch(range(60)).ids
    for first, rows in ((37, 4), (0, 1), (59, 1), (20, 9)):  # 780 tokens an epoch, 24 rows a block
        part = Packed(docs, 32, 5).batch(range(first, first + rows))
        assert torch.equal(part.ids, whole[first : first + rows])
    assert not torch.equal(Packed(docs, 32, 6).batch(range(60)).ids, whole)


def test_no_attention_and_no_mtp_across_documents():
    torch.manual_seed(0)
    model = Ling(tiniest()).eval()
    row = torch.randint(0, 256, (1, 24))
    other = row.clone()
    other[0, :9] = torch.randint(0, 256, (9,))
    cu = torch.tensor([0, 9, 24], dtype=torch.int32)
    a, b = (model(ids, labels=ids, cu_seqlens=cu) for ids in (row, other))
    assert torch.equal(a.logits[0, 9:], b.logits[0, 9:]) and torch.equal(a.mtp_logits[0, 0, 9:], b.mtp_logits[0, 0, 9:])
    assert not torch.equal(a.logits[0, :9], b.logits[0, :9])
    changed = row.clone()  # the first token of the second document is nobody's target or MTP input in the first
    changed[0, 9] = (changed[0, 9] + 1) % 256
    c = model(changed, labels=changed, cu_seqlens=cu)
    assert torch.equal(a.mtp_logits[0, 0, :9], c.mtp_logits[0, 0, :9])
    alone = [model(ids, labels=ids) for ids in (row[:, :9], row[:, 9:])]
    for name, ahead in (("main_loss", 1), ("mtp_loss", 2)):
        one, two = (getattr(o, name) for o in alone)
        mean = (one * (9 - ahead) + two * (15 - ahead)) / (24 - 2 * ahead)
        torch.testing.assert_close(getattr(a, name), mean, rtol=1e-5, atol=1e-6)


def write_all_kinds(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for i, text in enumerate(TEXTS):
        (folder / f"a{i}.txt").write_bytes(text.encode())
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": t, "n": 1}) + "\n\n" for t in TEXTS))
    (folder / "deep" / "er").mkdir(parents=True)
    table = pyarrow.table({"text": [*TEXTS, None, ""], "other": [1] * (len(TEXTS) + 2)})
    parquet.write_table(table, folder / "deep" / "er" / "c.parquet")
    assert command.main([str(folder / "b.jsonl"), "--out", str(folder / "z.bin")]) == 0
    (folder / "ignored.csv").write_text("x")
    (folder / "weights.bin").write_bytes(b"no X.json beside it, so no data")


def test_every_kind_of_file_gives_the_same_documents(tmp_path, capsys):
    write_all_kinds(tmp_path)
    tokenizer = load_tokenizer(None)

    def gather(name, *paths):
        return texts_of(gather_tokens([tmp_path / p for p in paths], tokenizer, 320, tmp_path / f"{name}.cache"))

    assert gather("txt", "a0.txt", "a1.txt", "a2.txt", "a3.txt") == TEXTS
    assert gather("jsonl", "b.jsonl") == gather("parquet", "deep") == gather("bin", "z.bin") == TEXTS
    assert not (tmp_path / "bin.cache").exists()  # mapped in place
    assert sorted(gather("folder", ".")) == sorted(TEXTS * 4)
    assert f"{sum(len(t.encode()) + 1 for t in TEXTS)} tokens of 4 documents, uint16" in capsys.readouterr().out


def test_rows_without_text_are_skipped_counted_and_told(tmp_path, capsys):
    """null and empty texts alike, in every kind of file."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = ["a", None, "b", "", None]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    parquet.write_table(pyarrow.table({"text": rows}), tmp_path / "y.parquet")
    for i, text in enumerate(rows):
        (tmp_path / f"z{i}.txt").write_text(text or "")
    kinds = [["x.jsonl"], ["y.parquet"], [f"z{i}.txt" for i in range(5)]]
    for i, names in enumerate(kinds):
        files = [tmp_path / name for name in names]
        if i < 2:
            assert ["".join(d) for d in sources.documents(files)] == ["a", "", "b", "", ""]
        with pytest.warns(UserWarning, match="^3 rows and files of the data have no text and are skipped$"):
            docs = gather_tokens(files, load_tokenizer(None), 320, tmp_path / f"{i}.cache")
        assert texts_of(docs) == ["a", "b"]
        assert command.main([*map(str, files), "--out", str(tmp_path / f"{i}.bin")]) == 0
        assert "4 tokens of 2 documents, uint16; 3 without text are skipped\n" in capsys.readouterr().out
        assert json.loads((tmp_path / f"{i}.json").read_text())["empty"] == 3


def test_text_streams_in_pieces_of_whole_lines_or_characters(tmp_path, monkeypatch):
    monkeypatch.setattr(sources.text, "PIECE", 7)
    (tmp_path / "a.txt").write_text(content := "語" * 20 + "\nab\ncd" + "é" * 30)
    (pieces,) = map(list, sources.documents([tmp_path / "a.txt"]))
    assert "".join(pieces) == content and len(pieces) > 10
    (tmp_path / "a.txt").write_text("a\nb c d\nefgh\ni")
    (pieces,) = map(list, sources.documents([tmp_path / "a.txt"]))
    assert pieces == ["a\n", "b c d\nefgh\n", "i"]


def test_the_text_of_cpython():
    docs = ["".join(d) for d in sources.cpython_documents()]
    assert docs == ["".join(d) for d in sources.cpython_documents()]
    assert sum(map(len, docs)) > 1_000_000 and any("def walk(" in d for d in docs)
    assert not any("build_time_vars" in d[:200] for d in docs)


class Wide:
    """A tokenizer of one token per line, with a vocabulary that does not fit 16 bits."""

    backend, vocab_size, eos_id = None, 100_000, 99_999

    def encode_batch(self, texts, special) -> list[np.ndarray]:
        return [np.array([70_000 + len(line) for line in text.splitlines()], np.uint32) for text in texts]


def test_a_large_vocabulary_takes_32_bits(tmp_path):
    about = write_tokens([["a\nbb\n"], [], [""], ["ccc\n"]], Wide(), tmp_path / "x.bin")
    assert about == dict(dtype="uint32", eos_id=99_999, vocab_size=100_000, tokens=5, documents=2, empty=2)
    docs = open_tokens([tmp_path / "x.bin"], 100_000, 99_999)
    assert [docs[d].tolist() for d in range(len(docs))] == [[70_001, 70_002, 99_999], [70_003, 99_999]]
    assert isinstance(docs.arrays[0], np.memmap)
    assert {p.name for p in tmp_path.iterdir()} == {"x.bin", "x.json"}


def test_a_bin_file_is_scanned_in_parts(tmp_path, monkeypatch):
    write_tokens([["abc"], ["defgh"], ["i"]], load_tokenizer(None), tmp_path / "x.bin")
    whole = open_tokens([tmp_path / "x.bin"], 320, EOS)
    monkeypatch.setattr(documents, "SCAN", 4)  # the second part begins with the first document's end
    parts = open_tokens([tmp_path / "x.bin"], 320, EOS)
    assert texts_of(parts) == texts_of(whole) == ["abc", "defgh", "i"] and parts.checksum == whole.checksum


def test_held_out_documents_are_not_trained_on():
    docs = documents_of(*range(1, 41))
    train, held_out = hold_out(docs, 20)
    assert [int(held_out[d][0]) for d in range(len(held_out))] == [19, 39]
    seen = Packed(train, 16, 0).batch(range(200)).ids.unique().tolist()
    assert seen == [d for d in range(40) if d not in (19, 39)]


def test_one_long_document_gives_its_end_to_validation():
    docs = documents_of(5, 200)
    docs.arrays[0][:] = range(205)
    train, held_out = hold_out(docs, 20)
    assert len(held_out) == 1 and held_out[0].tolist() == list(range(195, 205))
    assert [train[d].tolist() for d in range(2)] == [list(range(5)), list(range(5, 195))]
