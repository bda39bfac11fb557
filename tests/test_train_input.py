"""Bad input to training: one clear line, exit code 2, nothing left behind."""

# ruff: noqa: F811 (fixtures are imported)
import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ling_kernels.errors import InputError
from ling_kernels.model import Ling, save_model
from ling_kernels.model.config import PRESETS
from ling_kernels.tokenizer import load_tokenizer
from ling_kernels.train import checkpoint as ckpt
from ling_kernels.train.__main__ import main
from ling_kernels.train.data.tokenise import write_tokens
from ling_kernels.train.flags import GROUPS
from ling_kernels.train.prepare import room
from ling_kernels.train.prepare import run as prepare
from ling_kernels.train.prepare.models import model_config
from ling_kernels.train.report import open_lines, read_lines
from ling_kernels.train.settings import Settings
from tests.training import flags, one_line_error, small, text, tiniest, uninterrupted  # noqa: F401

NUMBERS = [
    ("--steps 0", "--steps 0"), ("--steps -3", "at least 1"), ("--steps many", "--steps"), ("--lr -1", "--lr -1"),
    ("--lr nan", "more than 0"), ("--lr inf", "--lr"), ("--lr 0", "--lr"), ("--seq-len 1", "--seq-len"),
    ("--seq-len 4096", "128 positions"), ("--batch 0", "--batch"), ("--batch 6 --micro-batch 4", "multiple"),
    ("--batch-ramp 4", "START:STEPS"), ("--batch-ramp 4:0", "START:STEPS"), ("--batch-ramp 64:10", "START"),
    ("--batch 8 --micro-batch 4 --batch-ramp 2:10", "multiple"), ("--warmup -1", "--warmup"), ("--keep -1", "--keep"),
    ("--seed -1", "--seed"), ("--seed 9223372036854775808", "--seed"), ("--clip -1", "--clip"),
    ("--eval-rows 0", "--eval-rows"), ("--threads 0", "--threads"), ("--holdout 1", "--holdout"),
    ("--precision fp4", "--precision"), ("--recompute experts", "--precision fp8"), ("--recompute most", "--recompute"),
    ("--nonsense 3", "--nonsense"), ("--weight-decay -0.1", "--weight-decay"), ("--max-bad-steps 0", "--max-bad-steps"),
    ("--balance-rate nan", "--balance-rate"), ("--device tpu", "--device"), ("--threads 1000000000", "--threads"),
    ("--encoding klingon", "--encoding klingon"),
]  # fmt: skip


@pytest.mark.parametrize("argv, says", NUMBERS, ids=[a for a, _ in NUMBERS])
def test_a_bad_number(tmp_path, small, text, argv, says, capsys):
    out = tmp_path / "run"
    base = ["--model", str(small), "--data", str(text), "--out", str(out), "--seq-len", "32"]
    assert says in one_line_error([*base, *argv.split()], capsys)
    assert not out.exists()


def names_of_no_file():
    for flag in ("--data", "--out", "--model", "--tokenizer", "--resume"):
        yield from ((flag, name) for name in ("x" * 300, "a\0b", ""))


@pytest.mark.parametrize("flag, name", names_of_no_file(), ids=lambda value: value[:10])
def test_a_name_that_no_file_can_have(tmp_path, small, text, flag, name, capsys, monkeypatch):
    """An empty one, as of a variable that is not set, would be the current folder."""
    monkeypatch.chdir(tmp_path)
    options = {"--model": str(small), "--data": str(text), "--out": "run"} | {flag: name}
    if flag == "--resume":
        options = {flag: name}
    one_line_error([part for pair in options.items() for part in pair], capsys)
    assert [*tmp_path.iterdir()] == []


def test_too_little_memory_is_one_line(tmp_path, small, text, capsys):
    options = ["--data", str(text), "--out", str(tmp_path / "run"), "--seq-len", "32", "--batch", str(10**12)]
    assert "too little memory" in one_line_error(["--model", str(small), *options], capsys)


def bad_data(folder, kind):
    """A source that cannot be trained on, and a part of its error message."""
    path = folder / {"jsonl": "x.jsonl", "parquet": "x.parquet", "bin": "x.bin"}.get(kind.split("-")[0], "x.txt")
    if kind.startswith("bin"):
        write_tokens([["some text, " * 50]] * 30, load_tokenizer(None), path)
        about = json.loads(path.with_suffix(".json").read_text())
    if kind == "missing":
        return folder / "nowhere", "nowhere"
    if kind == "folder":
        (folder / "empty").mkdir()
        return folder / "empty", "holds no"
    if kind == "suffix":
        (folder / "x.csv").write_text("a,b")
        return folder / "x.csv", ".csv"
    if kind == "empty":
        path.write_text("")
        return path, "empty"
    if kind == "encoding":
        path.write_bytes("naïve".encode("latin-1"))
        return path, "x.txt is not utf-8 at byte 2; --encoding"
    if kind == "short":
        path.write_text("too short")
        return path, "too small"
    if kind == "dangling":
        (folder / "y.txt").symlink_to(folder / "gone.txt")
        return folder / "y.txt", "y.txt"
    if kind == "jsonl-malformed":
        path.write_text('{"text": "fine"}\n{"text": "fine"}\n{"text": oh}\n')
        return path, "x.jsonl, line 3"
    if kind == "jsonl-field":
        path.write_text('{"text": "fine"}\n{"body": "fine"}\n')
        return path, "x.jsonl, line 2: no field 'text'"
    if kind == "jsonl-list":
        path.write_text("[1]\n")
        return path, "line 1"
    if kind == "jsonl-number":
        path.write_text('{"text": 5}\n')
        return path, "not text but int"
    if kind == "jsonl-surrogate":
        path.write_text('{"text": "\\ud800"}\n')
        return path, "not valid Unicode"
    if kind == "jsonl-bytes":
        path.write_bytes(b'{"text": "\xff\xfe"}\n')
        return path, "x.jsonl is not utf-8 at byte 10; --encoding names its encoding"
    if kind == "jsonl-deep":
        path.write_text('{"text": "fine"}\n' + "[" * 100_000 + "\n")
        return path, "x.jsonl, line 2: not JSON"
    if kind == "jsonl-digits":
        path.write_text('{"text": "fine"}\n' + "9" * 5000 + "\n")
        return path, "x.jsonl, line 2: not JSON"
    if kind == "parquet-latin":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        latin = pyarrow.Array.from_buffers(pyarrow.string(), 1, pyarrow.array([b"caf\xe9"]).buffers())
        parquet.write_table(pyarrow.table({"text": latin}), path)
        return path, "cannot read"
    if kind == "bin-deep":
        path.with_suffix(".json").write_text("[" * 100_000)
        return path, "x.json must give dtype"
    if kind == "parquet-garbage":
        path.write_bytes(b"PAR1 this is none")
        return path, "cannot read"
    if kind.startswith("parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({"body" if kind == "parquet-column" else "text": [1, 2]}), path)
        return path, "no column 'text', only body" if kind == "parquet-column" else "row 1"
    if kind == "bin-alone":
        path.with_suffix(".json").unlink()
        return path, "x.json"
    if kind == "bin-truncated":
        path.write_bytes(path.read_bytes()[:-3])
        return path, "truncated"
    if kind == "bin-range":
        ids = np.fromfile(path, np.uint16)
        ids[77] = 320
        ids.tofile(path)
        return path, "the token 320"
    changed = {
        "bin-vocab": (dict(vocab_size=50000), "50000 tokens"),
        "bin-eos": (dict(eos_id=0), "ends documents with token 0"),
        "bin-dtype": (dict(dtype="int8"), "uint16 or uint32"),
        "bin-tokens": (dict(tokens=None), "tokens as a number"),
        "bin-list": (dict(eos_id=[257]), "x.json must give"),
        "bin-inf": (dict(vocab_size=float("inf")), "x.json must give"),
    }[kind]
    path.with_suffix(".json").write_text(json.dumps(about | changed[0]))
    return path, changed[1]


KINDS = (
    "missing folder suffix empty encoding short dangling jsonl-malformed jsonl-field jsonl-list jsonl-number "
    "jsonl-surrogate jsonl-bytes parquet-garbage parquet-column parquet-number bin-alone bin-truncated bin-range "
    "bin-vocab bin-eos bin-dtype bin-tokens bin-list bin-inf bin-deep jsonl-deep jsonl-digits parquet-latin"
).split()


@pytest.mark.parametrize("kind", KINDS)
def test_bad_data(tmp_path, small, kind, capsys):
    if kind.startswith("parquet"):
        pytest.importorskip("pyarrow")
    source, says = bad_data(tmp_path, kind)
    out = tmp_path / "run"
    error = one_line_error(["--model", str(small), "--data", str(source), "--out", str(out), "--seq-len", "32"], capsys)
    assert says in error
    assert not out.exists()


def bad_model(folder, kind):
    if kind == "unknown":
        return "gigantic", "tiny, mini, flash, 1t"
    model = Ling(tiniest())
    save_model(model, folder)
    weights, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    if kind == "no config":
        (folder / "config.json").unlink()
        return folder, "config.json"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:5000])
        return folder, "model.safetensors"
    if kind == "key":
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.gate.weight"]
        save_file(tensors, weights)
        return folder, "model.layers.1.mlp.gate.weight"
    if kind == "shape":
        config["hidden_size"] = 48
    if kind == "divide":
        config["num_experts"] = 9
    (folder / "config.json").write_text(json.dumps(config))
    return folder, {"shape": "by config.json it should be", "divide": "num_experts 9"}[kind]


@pytest.mark.parametrize("kind", ["unknown", "no config", "truncated", "key", "shape", "divide"])
def test_a_bad_model(tmp_path, text, kind, capsys):
    (tmp_path / "model").mkdir()
    model, says = bad_model(tmp_path / "model", kind)
    argv = ["--model", str(model), "--data", str(text), "--out", str(tmp_path / "run"), "--seq-len", "32"]
    assert says in one_line_error(argv, capsys)
    assert not (tmp_path / "run").exists()


def test_a_bad_tokenizer(tmp_path, small, text, capsys):
    argv = f"--model {small} --data {text} --out {tmp_path / 'run'} --seq-len 32 --tokenizer".split()
    assert "nowhere" in one_line_error([*argv, str(tmp_path / "nowhere")], capsys)
    (tmp_path / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in one_line_error([*argv, str(tmp_path)], capsys)
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(400)} | {"<|endoftext|>": 400}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    assert "401 tokens" in one_line_error([*argv, str(tmp_path)], capsys)
    assert not (tmp_path / "run").exists()


def test_another_tokenizer_trains(tmp_path, small, text):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[UNK]", "the", "kernel", "reads", "writes", "a", "tile", "of", "experts", "and", "tokens", ".", "</s>"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    argv = f"--model {small} --data {text} --tokenizer {tmp_path} --out {tmp_path / 'run'} --steps 3 --seq-len 32"
    assert main([*argv.split(), "--batch", "4", "--eval-rows", "2", "--sample-tokens", "5"]) == 0
    ids = np.fromfile(tmp_path / "run" / "data" / "tokens.bin", np.uint16)
    assert set(ids.tolist()) == set(range(1, 13))
    assert load_tokenizer(tmp_path / "run" / "model").eos_id == 12


def test_a_bad_output_folder(tmp_path, small, text, capsys, monkeypatch):
    argv = ["--model", str(small), "--data", str(text), "--steps", "1", "--seq-len", "32", "--out"]
    (tmp_path / "file").write_text("mine")
    assert "file" in one_line_error([*argv, str(tmp_path / "file")], capsys)
    assert one_line_error([*argv, str(tmp_path / "file" / "below")], capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    assert "not empty" in one_line_error([*argv, str(tmp_path / "full")], capsys)
    assert "not empty" in one_line_error([*argv, str(tmp_path / "full"), "--resume", "auto"], capsys)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(prepare.tempfile, "TemporaryFile", refuse)  # root may write anywhere
    assert "Permission denied" in one_line_error([*argv, str(tmp_path / "new")], capsys)


def test_the_default_folder_is_always_new(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare.time, "strftime", lambda _: "20300101-000000")
    made = [prepare.make_folder(None, "tiny", False)[0] for _ in range(3)]
    assert [f.name for f in made] == [f"tiny-20300101-000000{end}" for end in ("", "-2", "-3")]


def test_resume_auto_takes_the_newest_run_of_the_model(tmp_path, monkeypatch):
    """By the settings.json of each run and by the time in its checkpoint, not by the folders' names."""
    monkeypatch.chdir(tmp_path)

    def make(name, model, newest, checkpoint=True):
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "settings.json").write_text(json.dumps(dict(model=model)))
        if checkpoint:
            (run / "checkpoints" / "step-000001").mkdir(parents=True)
            state = run / "checkpoints" / "step-000001" / "state.json"
            state.write_text(json.dumps(dict(time=newest)) if newest != 150 else "{")
            os.utime(state.parent, (150, 150))  # of a checkpoint without a time

    make("tiny-20260101-000000-2", "tiny", 50)
    make("tiny-20260101-000000-10", "tiny", 100)
    make("tiny-large-20270101", str(tmp_path / "tiny-large"), 200)
    make("mine", "tiny", 150)
    make("tiny-20270101-000000", "tiny", 1e11)  # the clock was wrong
    make("tiny-20280101", "tiny", 0, checkpoint=False)
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "settings.json").write_text("{")
    latest = lambda model, out=None: prepare.latest_run(out, model)  # noqa: E731
    assert latest("tiny") == Path("runs/mine")
    (tmp_path / "tiny-large").mkdir()
    assert latest("tiny-large") == Path("runs/tiny-large-20270101")
    assert latest("mini") is None
    assert latest("tiny", Path("runs/tiny-20260101-000000-2")) == Path("runs/tiny-20260101-000000-2")
    assert latest("tiny", Path("runs/tiny-20280101")) is None


def test_a_bad_resume(tmp_path, flags, uninterrupted, small, capsys):
    assert "nowhere" in one_line_error(["--resume", str(tmp_path / "nowhere")], capsys)
    assert "no checkpoint" in one_line_error(["--resume", str(tmp_path)], capsys)
    resume = ["--resume", str(uninterrupted)]
    assert "one of the two" in one_line_error([*resume, "--out", str(tmp_path / "x")], capsys)
    for flag, value in (
        ("--holdout", "5"),
        ("--seq-len", "32"),
        ("--optimizer", "muon"),
        ("--model", "tiny"),
        ("--seed", "1"),
    ):
        error = one_line_error([*resume, flag, value], capsys)
        assert flag in error and flag.strip("-").replace("-", "_") in error
    assert "has done 14 already" in one_line_error([*resume, "--steps", "13"], capsys)
    before = sorted(p for p in uninterrupted.rglob("*"))
    assert one_line_error([*resume, "--steps", "0"], capsys)
    assert before == sorted(p for p in uninterrupted.rglob("*"))


@pytest.mark.parametrize("change, says", [
    (lambda state: state.pop("settings"), "state.json has no settings"),
    (lambda state: state.pop("step"), "state.json has no step"),
    (lambda state: state["settings"].update(warp=9), "does not know: warp"),
    (lambda state: state.update(files=[1]), "state.json is not readable"),
    *((lambda state, change=change: state.update(change), "a value has another type") for change in (
        dict(step="14"), dict(sequences=None), dict(tokens=-1), dict(skipped=1.5), dict(bad=True), dict(settings=[]),
        dict(recent=[[1.0]]), dict(recent="x"), dict(in_bf16=3), dict(in_bf16=[None]),
    )),
    (lambda state: state.update(in_bf16=["nothing"]), "in_bf16 names no layer: nothing"),
])  # fmt: skip
def test_a_state_of_another_version_is_one_line(tmp_path, uninterrupted, capsys, change, says):
    checkpoint = tmp_path / "checkpoints" / "step-000014"
    shutil.copytree(ckpt.list_checkpoints(uninterrupted)[-1], checkpoint)
    state = json.loads((checkpoint / "state.json").read_text())
    change(state)
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert says in one_line_error(["--resume", str(checkpoint)], capsys)
    (checkpoint / "state.json").write_text("[" * 100_000)
    assert "state.json is not readable" in one_line_error(["--resume", str(checkpoint)], capsys)


@pytest.mark.parametrize("line", [
    "\0" * 9, '{"step": 3, "lo', '{"a": 1}', "[1]", '{"step": null}', "\udcff", "[" * 10**5,
])  # fmt: skip
def test_damaged_lines_of_a_run_are_left_out(tmp_path, line):
    """As after a power failure; the records around them stay."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + line.encode(errors="surrogateescape") + b'\n{"step": 2}\n{"step": 3}\n')
    assert [row["step"] for row in read_lines(path)] == [1, 2, 3]
    open_lines(path, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_folder_in_the_place_of_a_file_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(InputError, match="cannot write .*metrics.jsonl"):
        open_lines(tmp_path / "metrics.jsonl", 2)


def test_resuming_with_other_data_or_another_preset(tmp_path, small, capsys, monkeypatch):
    data = tmp_path / "data.txt"
    data.write_text("some text to learn\n" * 200)
    run = tmp_path / "run"
    argv = f"--model {small} --data {data} --out {run} --steps 2 --seq-len 32 --batch 2 --eval-rows 1 --sample-tokens 0"
    assert main(argv.split()) == 0
    data.write_text("another text to learn\n" * 200)
    assert main(["--resume", str(run), "--steps", "3"]) == 0  # the run has kept its tokens
    (run / "data" / "tokens.bin").unlink()
    assert "not what the run began with" in one_line_error(["--resume", str(run), "--steps", "4"], capsys)
    data.write_text("some text to learn\n" * 200)
    assert main(["--resume", str(run), "--steps", "4"]) == 0  # the refused tokens were not kept
    monkeypatch.setitem(PRESETS, "tiny", lambda: replace(tiniest(), hidden_size=128))
    with pytest.raises(ValueError, match="hidden_size is 32 .* 128 in tiny"):
        model_config(Settings(model="tiny"), ckpt.list_checkpoints(run)[-1])


def test_a_model_that_exceeds_memory_is_refused(tmp_path, text, capsys, monkeypatch):
    monkeypatch.setattr(room.os, "sysconf", lambda name: 1 << 12)  # 16 MiB
    error = one_line_error(["--model", "tiny", "--data", str(text), "--out", str(tmp_path / "run")], capsys)
    assert "does not fit" in error and not (tmp_path / "run").exists()
    if not torch.cuda.is_available():
        assert "no GPU" in one_line_error(["--data", str(text), "--device", "cuda"], capsys)


def test_help_names_every_flag_and_default(capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    for f in Settings.__dataclass_fields__:
        assert re.search(rf"--{f.replace('_', '-')}[ ,]", shown)
    assert shown.count("(default: ") == len(Settings.__dataclass_fields__) + 4 and "(default: 3.5e-06)" in shown
    assert shown.startswith("usage: python -m ling_kernels.train [flags] Train") and "--data PATH [PATH ...]" in shown
    assert [name for name in GROUPS.values() if f" {name}: --" in shown] == [*GROUPS.values()]
