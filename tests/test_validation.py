"""Validation sets: bits per byte, several of them, small ones."""

# ruff: noqa: F811 (fixtures are imported)
import json
import math
import sys
import warnings

import numpy as np
import pytest
import torch

from ling_kernels.model import Ling
from ling_kernels.tokenizer import load_tokenizer
from ling_kernels.train import Settings
from ling_kernels.train.__main__ import main
from ling_kernels.train.corpus import open_corpus
from ling_kernels.train.data import Packed
from ling_kernels.train.validation import (
    ValidationSet,
    bytes_of_tokens,
    evaluate,
    measure,
    validation_batches,
    validation_set,
)  # fmt: skip
from tests.test_data import documents_of
from tests.test_tokenizer import train_bpe
from tests.training import one_line_error, small, text, tiniest  # noqa: F401


def test_no_row_comes_twice_and_none_is_lost():
    docs = documents_of(30, 25, 16)
    docs.arrays[0][:] = range(71)
    small_set = Settings(seq_len=16, eval_rows=64, batch=3)
    batches = validation_batches([docs], small_set)
    assert [len(b.ids) for b in batches] == [3, 2]
    kept = torch.cat([b.ids.flatten()[b.labels.flatten() != -100] for b in batches])
    assert kept.tolist() == [*range(71)]
    assert sum(b.targets() for b in batches) == 71 - 7  # five rows and two documents within them begin
    enough = Settings(seq_len=16, eval_rows=4, batch=3)  # four full rows, as ever
    rows = torch.cat([b.ids for b in validation_batches([docs], enough)])
    assert torch.equal(rows, Packed(docs, 16, None).batch(range(4)).ids)
    assert all(b.masked is None for b in validation_batches([docs], enough))


def test_bits_per_byte():
    """Against the sum over documents, each predicted alone, and the bytes of their texts."""
    tokenizer = load_tokenizer(None)
    model = Ling(tiniest())
    model.init_weights(torch.Generator().manual_seed(0))
    texts = ["naïve", "to be or not", "x"]
    ids = [[*t.encode(), tokenizer.eos_id] for t in texts]
    docs = documents_of(*map(len, ids))
    docs.arrays[0][:] = np.concatenate(ids)
    batches = validation_batches([docs], Settings(seq_len=64, batch=4))
    record = measure(model, [ValidationSet("a", batches, 1.0)], bytes_of_tokens(tokenizer), torch.float32)
    nats = sum(float(model(torch.tensor([i]), labels=torch.tensor([i])).main_loss) * (len(i) - 1) for i in ids)
    size = sum(len(t.encode()) - 1 for t in texts)  # the first byte of a document is not predicted
    assert record["val_bpb"] == record["val_bpb/a"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert record["val_loss"] == pytest.approx(nats / sum(len(i) - 1 for i in ids), rel=1e-5)
    assert model.training and evaluate(model, batches, torch.float32) == record["val_loss/a"]
    empty = ValidationSet("b", validation_batches([documents_of(1)], Settings(seq_len=64, batch=4)), 0.5)
    sets = [ValidationSet("a", batches, 0.5), empty]
    assert measure(model, sets, bytes_of_tokens(tokenizer), torch.float32) == record  # nothing to predict, left out


def test_bytes_of_a_bpe_vocabulary(tmp_path):
    tokenizer = load_tokenizer(train_bpe(tmp_path))
    sizes = bytes_of_tokens(tokenizer)
    for sample in ("The tile, naïve 語 😀 and\n\n  more", "a" * 50):
        assert int(sizes[tokenizer.encode(sample)].sum()) == len(sample.encode())
    assert int(sizes[tokenizer.eos_id]) == 0 and int(sizes[list(tokenizer.control_tokens.values())].sum()) == 0


def test_a_small_set_is_said_to_be_small():
    with pytest.warns(UserWarning, match="what is held out has only 8 tokens to predict"):
        validation_set(None, [documents_of(9)], Settings(seq_len=16))
    with pytest.warns(UserWarning, match="data has only 30 tokens to predict in --eval-rows 2; the loss"):
        validation_set("data", [documents_of(99)], Settings(seq_len=16, eval_rows=2))


def test_named_sets_and_mixtures_in_the_command(tmp_path, small, text, capsys, recwarn):
    other = tmp_path / "other.txt"
    other.write_text("a tile reads tokens and experts write them. " * 60)
    flags = (
        f"--model {small} --data {text}=3 {other}=1 --val-data wiki={text} --steps 2 --seq-len 48 --batch 4 --threads 1"
    )
    flags += f" --eval-rows 8 --sample-tokens 0 --out {tmp_path / 'run'}"
    assert main(flags.split()) == 0
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["val_loss"] == pytest.approx(
        0.75 * record["val_loss/text.jsonl"] + 0.25 * record["val_loss/other.txt"], rel=1e-6
    )
    assert record["val_loss/wiki"] > 0 and record["val_bpb/wiki"] > 0
    out = capsys.readouterr().out
    assert "source     text.jsonl: 75 % of the rows" in out and "validation wiki" in out and "bits per byte; " in out
    corpus = open_corpus(
        Settings(data=(f"{text}=3", f"{other}=1"), seq_len=48, eval_rows=8), load_tokenizer(None), 320,
        tmp_path / "again" / "tokens.bin",
    )  # fmt: skip
    assert {k: v for k, v in record.items() if k.startswith("epoch/")} == corpus.epochs(8)
    assert main(["--resume", str(tmp_path / "run"), "--steps", "3"]) == 0


def test_the_command_warns_in_one_line(tmp_path, small, text, capsys):
    data = tmp_path / "few.jsonl"
    data.write_text("".join(text.read_text().splitlines(True)[:21]))
    flags = f"--model {small} --data {data} --steps 1 --seq-len 48 --batch 4 --threads 1 --sample-tokens 0"
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        warnings.showwarning = lambda *args: sys.stderr.write(warnings.formatwarning(*args[:4]))
        assert main([*flags.split(), "--out", str(tmp_path / "run")]) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line.lower()]
    assert line.startswith("warning: validation: what is held out has only ")


def test_without_holding_out(tmp_path, small, text, capsys, recwarn):
    flags = [
        "--model",
        str(small),
        "--data",
        str(text),
        "--seq-len",
        "48",
        "--batch",
        "4",
        "--threads",
        "1",
        "--steps",
        "1",
    ]
    flags += ["--sample-tokens", "4", "--out", str(tmp_path / "run"), "--eval-rows", "4"]
    for wrong, message in (
        (["--holdout", "0"], "--val-data"), (["--val-data", "x"], "NAME=PATH"), (["--val-data", "a b=x"], "NAME=PATH"),
        (["--val-data", "a=gone"], "there is no data"), (["--val-data", f"a={text}", f"a={text}"], "two sets"),
        (["--data", f"{text}=1", f"{small}"], "a weight"),
    ):  # fmt: skip
        assert message in one_line_error([*flags, *wrong], capsys)
        assert not (tmp_path / "run").exists()
    assert main([*flags, "--holdout", "0", "--val-data", f"own={text}"]) == 0
    record = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    assert record["val_loss"] == record["val_loss/own"]
