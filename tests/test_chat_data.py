"""Files of chats: rows of whole conversations, every kind of file, training from the command."""

# ruff: noqa: F811 (fixtures are imported)
import gzip
import json

import numpy as np
import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.generate.cli import stop_token_ids
from ling_kernels.model import Ling, load_model
from ling_kernels.tokenizer import load_tokenizer
from ling_kernels.train import Settings, Trainer, sampling
from ling_kernels.train.__main__ import main
from ling_kernels.train.corpus import open_corpus
from ling_kernels.train.data import PackedWhole, best_fit, open_chats
from ling_kernels.train.data import __main__ as command
from ling_kernels.train.data.chats import mask_of, write_chats
from tests.test_chat_masks import CHATML, PAIR, again_with, tokenizer_with
from tests.training import one_line_error, small, text, tiniest  # noqa: F401


def chats_file(folder, rng, number=60):
    """Questions and answers of different lengths."""
    rows = []
    for i in range(number):
        a, b = (" ".join(rng.choice(["tile", "warp", "bank", "row"], n)) for n in rng.integers(1, 7, 2))
        rows.append({"messages": again_with(f"{i} {a} {b}")})
    file = folder / "chats.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_rows_have_whole_conversations(tmp_path):
    file, tokenizer = chats_file(tmp_path, np.random.default_rng(0)), load_tokenizer(None)
    write_chats([file], tokenizer, tmp_path / "x.bin", "assistant")
    docs = open_chats([tmp_path / "x.bin"], 320, tokenizer.eos_id)
    packed = PackedWhole(docs, 300, seed=5)
    rows = int(packed.rows_per_epoch)
    for epoch in (0, 1):
        batch = packed.batch(range(epoch * rows, (epoch + 1) * rows))
        bounds = batch.cu_seqlens.tolist()
        flat, labels = batch.ids.flatten(), batch.labels.flatten()
        seen = []
        for start, stop in zip(bounds, bounds[1:], strict=False):
            if flat[start] == tokenizer.vocab["<role>"]:
                seen.append(tokenizer.decode(flat[start:stop]))
                kept = labels[start:stop] != -100
                assert tokenizer.decode(flat[start:stop][kept]) == seen[-1].split("<role>ASSISTANT</role>")[1]
            else:  # padding
                assert stop % 300 == 0 and (labels[start:stop] == -100).all()
        assert sorted(seen) == sorted(tokenizer.decode(docs[d]) for d in range(60))
        # targets are those that torch counts after the shift within documents
        for ahead in (1, 2):
            wanted = sum(
                int((labels[a + ahead : b] != -100).sum())
                for a, b in zip(bounds, bounds[1:], strict=False)
                if b > a + ahead
            )
            assert batch.targets(ahead) == wanted > 0
    assert not torch.equal(packed.batch(range(rows)).ids, packed.batch(range(rows, 2 * rows)).ids)
    assert torch.equal(packed.batch([3]).ids[0], PackedWhole(docs, 300, seed=5).batch([1, 3]).ids[1])
    assert sum(map(len, best_fit(docs.lengths, 300))) == 60 and docs.lengths.sum() / 300 > 0.9 * rows


def test_the_loss_of_packed_chats_is_that_of_each_conversation_alone(tmp_path):
    tokenizer = load_tokenizer(None)
    write_chats([chats_file(tmp_path, np.random.default_rng(1), 4)], tokenizer, tmp_path / "x.bin", "assistant")
    docs = open_chats([tmp_path / "x.bin"], 320, tokenizer.eos_id)
    batch = PackedWhole(docs, 400, 0).batch([0])
    model = Ling(tiniest())
    model.init_weights(torch.Generator().manual_seed(0))
    together = model(batch.ids, labels=batch.labels, cu_seqlens=batch.cu_seqlens)
    main_loss, mtp_loss, main_targets, mtp_targets = 0.0, 0.0, 0, 0
    for d in range(len(docs)):
        ids = torch.tensor(docs[d].astype(np.int64))[None]
        labels = torch.where(torch.tensor(docs.trained(d))[None] == 1, ids, -100)
        alone = model(ids, labels=labels)
        n, m = int((labels[0, 1:] != -100).sum()), int((labels[0, 2:] != -100).sum())
        main_loss, mtp_loss = main_loss + alone.main_loss * n, mtp_loss + alone.mtp_loss * m
        main_targets, mtp_targets = main_targets + n, mtp_targets + m
    assert (batch.targets(), batch.targets(2)) == (main_targets, mtp_targets)
    torch.testing.assert_close(together.main_loss, main_loss / main_targets, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(together.mtp_loss, mtp_loss / mtp_targets, rtol=1e-5, atol=1e-6)


def test_a_damaged_mask_is_one_line(tmp_path):
    tokenizer = load_tokenizer(None)
    write_chats([chats_file(tmp_path, np.random.default_rng(0), 5)], tokenizer, tmp_path / "x.bin", "assistant")
    whole = open_chats([tmp_path / "x.bin"], 320, tokenizer.eos_id)
    mask = bytearray(mask_of(tmp_path / "x.bin").read_bytes())
    mask[0] ^= 1
    mask_of(tmp_path / "x.bin").write_bytes(mask)
    assert open_chats([tmp_path / "x.bin"], 320, tokenizer.eos_id).checksum != whole.checksum
    for damage in (mask[:-1], mask[:-1] + b"\0", b"\4" + mask[1:]):
        mask_of(tmp_path / "x.bin").write_bytes(damage)
        with pytest.raises(InputError, match="x.mask.bin is damaged"):
            open_chats([tmp_path / "x.bin"], 320, tokenizer.eos_id)
    mask_of(tmp_path / "x.bin").unlink()
    with pytest.raises(InputError, match="x.mask.bin"):
        open_chats([tmp_path / "x.bin"], 320, tokenizer.eos_id)


def test_texts_and_chats_in_one_mixture(tmp_path, text):
    chats = chats_file(tmp_path, np.random.default_rng(0))
    tokenizer = load_tokenizer(None)
    both = Settings(data=(str(text), str(chats)), seq_len=128, eval_rows=4)
    corpus = open_corpus(both, tokenizer, 320, tmp_path / "a" / "tokens.bin")
    assert [bool(docs.masks) for docs in corpus.sources[0].training] == [False, True]
    rows = corpus.rows.batch(range(40))
    masked = (rows.labels == -100).any(1)
    assert 0 < masked.sum() < 40
    weighted = Settings(data=(f"{text}=1", f"{chats}=3"), seq_len=128, eval_rows=4)
    with pytest.warns(UserWarning, match="has only"):
        corpus = open_corpus(weighted, tokenizer, 320, tmp_path / "b" / "tokens.bin")
    masked = (corpus.rows.batch(range(40)).labels == -100).any(1)
    assert masked.sum() == 30 and [s.name for s in corpus.sources] == ["text.jsonl", "chats.jsonl"]
    with pytest.warns(UserWarning, match=r"\d+ of 60 conversations are longer than --seq-len 100"):
        open_corpus(Settings(data=(str(chats),), seq_len=100), tokenizer, 320, tmp_path / "c" / "tokens.bin")
    with pytest.raises(InputError, match="no conversation has a token to train on within --seq-len 48"):
        open_corpus(Settings(data=(str(chats),), seq_len=48), tokenizer, 320, tmp_path / "c" / "tokens.bin")


def test_a_damaged_table_of_chats_is_said_to_be_damaged(tmp_path, capsys):
    """By its columns it has chats, also where its first row cannot be read."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist([{"messages": again_with(f"answer {i}")} for i in range(50)])
    parquet.write_table(table, tmp_path / "c.parquet")
    with pyarrow.ipc.new_file(tmp_path / "c.arrow", table.schema) as writer:
        writer.write_table(table)
    for kind, first in (("parquet", 4), ("arrow", 400)):
        file = tmp_path / f"c.{kind}"
        content = bytearray(file.read_bytes())
        content[first : first + 400] = b"\xff" * 400
        file.write_bytes(content)
        assert command.main([str(file), "--out", str(tmp_path / "x.bin")]) == 2
        assert f"error: cannot read {file}: " in (err := capsys.readouterr().err) and "column 'text'" not in err


def test_the_tokens_that_are_trained_on(tmp_path):
    """Also of some of several files' conversations."""
    rng, tokenizer = np.random.default_rng(3), load_tokenizer(None)
    files = []
    for name in "ab":
        files.append(tmp_path / f"{name}.bin")
        write_chats([chats_file(tmp_path, rng, 20)], tokenizer, files[-1], "assistant")
    docs = open_chats(files, 320, tokenizer.eos_id)
    for part in (docs, docs.take(np.arange(40) % 3 == 1), docs.take(np.arange(40) < 2), docs.take(np.zeros(40, bool))):
        assert part.trained_tokens == sum(int(part.trained(d).sum()) for d in range(len(part))) <= part.tokens
    assert 0 < docs.trained_tokens < docs.tokens


def test_sft_by_command(tmp_path, small, capsys):
    """Train on chats from a model's folder, resume it to the same bits, and let the export answer."""
    chats = chats_file(tmp_path, np.random.default_rng(2))
    flags = f"--model {small} --data {chats} --seq-len 128 --batch 4 --micro-batch 2 --warmup 2 --lr 1e-2 --eval-rows 4"
    flags += " --threads 1 --sample-tokens 8 --seed 1"
    run, other = tmp_path / "run", tmp_path / "other"
    assert main([*flags.split(), "--steps", "24", "--out", str(run)]) == 0
    assert "--chat --prompt" in (out := capsys.readouterr().out)
    training = Trainer.resume(run).corpus.sources[0].training[0]
    counted = f"{training.trained_tokens:,} of their {training.tokens:,} tokens"
    assert f"chats      {len(training)} conversations to train on: {counted} (" in out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    first, last = (np.mean([line["main_loss"] for line in part]) for part in (lines[:4], lines[-4:]))
    assert last < 0.8 * first and np.isfinite(lines[-1]["val_bpb"])
    assert main([*flags.split(), "--steps", "10", "--out", str(other)]) == 0
    chats.unlink()  # the run's folder has the tokens
    trainer = Trainer.resume(other, steps=24)
    for line in lines[10:13]:
        record = trainer.step()
        assert [record[k] for k in ("loss", "grad_norm")] == [line[k] for k in ("loss", "grad_norm")]
    model, tokenizer = load_model(run / "model"), load_tokenizer(run / "model")
    prompt = tokenizer.encode(tokenizer.apply_chat_template([{"role": "user", "content": "q"}]), special=True)
    answer = model.generate(torch.tensor([prompt]), 12)[0, len(prompt) :]
    assert tokenizer.decode(answer).strip()


@pytest.mark.parametrize("end", ["<|role_end|>", "<|endoftext|>", "</role>"])
def test_a_sample_ends_with_its_turn(tmp_path, monkeypatch, end):
    """Also where the chat template ends answers with another token than Ling's."""
    template = CHATML.replace("<|role_end|>", "</role>") if end == "</role>" else None
    tokenizer = tokenizer_with(template)
    write_chats([chats_file(tmp_path, np.random.default_rng(0), 3)], tokenizer, tmp_path / "x.bin", "assistant")
    held_out = open_chats([tmp_path / "x.bin"], 320, tokenizer.eos_id)
    answer = iter([*b"tile", tokenizer.vocab[end], *b"past it"])
    monkeypatch.setattr(sampling, "sampler", lambda **options: lambda logits, ids: torch.tensor([next(answer)]))
    model = Ling(tiniest())
    model.init_weights(torch.Generator().manual_seed(0))
    prompt, text = sampling.sample(model, tokenizer, held_out, Settings(sample_tokens=9))
    assert text == "tile" and prompt.endswith("<role>ASSISTANT</role>" if template is None else "<role>assistant\n")
    (tmp_path / "generation_config.json").write_text("{}")
    assert tokenizer.vocab[end] in stop_token_ids(model.config, tokenizer, tmp_path)


def test_a_token_file_of_chats(tmp_path, text, capsys):
    """The command that tokenises writes ids and mask, and the trainer takes them as it takes the rows."""
    chats, out = chats_file(tmp_path, np.random.default_rng(0)), tmp_path / "data" / "x.bin"
    assert command.main([str(chats), "--out", str(out)]) == 0
    assert json.loads(out.with_suffix(".json").read_text())["chats"] is True
    from_rows, from_file = (
        open_corpus(Settings(data=(str(data),), seq_len=128), load_tokenizer(None), 320, tmp_path / name / "tokens.bin")
        for data, name in ((chats, "a"), (out.parent, "b"))
    )
    assert from_rows.about == from_file.about
    one, two = (corpus.rows.batch(range(9)) for corpus in (from_rows, from_file))
    assert torch.equal(one.ids, two.ids) and torch.equal(one.labels, two.labels)
    assert command.main([str(chats), str(text), "--out", str(tmp_path / "y.bin")]) == 2
    assert "write a file for each kind" in capsys.readouterr().err


def test_every_kind_of_file_gives_the_same_conversations(tmp_path, capsys):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"messages": [*again_with(f"a{i}"), {"role": "user", "content": "x"}]} for i in range(5)]
    rows[2]["messages"] += [{"role": "assistant", "content": "y", "weight": 0}]  # null in the other rows
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "c.parquet")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "c.jsonl").write_text(lines)
    (tmp_path / "c.json").write_text(json.dumps(rows))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "c.jsonl.zst").write_bytes(pyarrow.compress(lines.encode(), "zstd", asbytes=True))
    saved = tmp_path / "saved"
    saved.mkdir()
    for name in ("data-0.arrow", "cache-1.arrow"):  # as Hugging Face datasets save them
        with pyarrow.OSFile(str(saved / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    (saved / "state.json").write_text('{"_data_files": [{"filename": "data-0.arrow"}]}')
    (tmp_path / "wide.jsonl").write_text(lines, encoding="utf-16")
    kinds = ["c.jsonl", "c.parquet", "c.json", "c.jsonl.gz", "c.jsonl.zst", "saved", "saved/data-0.arrow", "wide.jsonl"]
    for i, kind in enumerate(kinds):
        more = ["--encoding", "utf-16"] if kind == "wide.jsonl" else []
        assert command.main([str(tmp_path / kind), "--out", str(tmp_path / f"{i}.bin"), *more]) == 0
        for suffix in (".bin", ".mask.bin", ".json"):
            assert (tmp_path / f"{i}{suffix}").read_bytes() == (tmp_path / f"0{suffix}").read_bytes(), kind
    capsys.readouterr()
    rows[3]["messages"] = []
    (tmp_path / "c.json").write_text(json.dumps(rows))
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    for kind, at in (("json", "element 4"), ("parquet", "row 4")):
        assert command.main([str(tmp_path / f"c.{kind}"), "--out", str(tmp_path / "y.bin")]) == 2
        assert f"c.{kind}, {at}: no conversation" in capsys.readouterr().err and not (tmp_path / "y.bin").exists()


def test_errors_of_the_command(tmp_path, small, capsys):
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n")
    flags = ["--model", str(small), "--data", str(file), "--seq-len", "64", "--out", str(tmp_path / "run")]
    assert "c.jsonl, line 1: no message has the role assistant" in one_line_error(flags, capsys)
    assert not (tmp_path / "run").exists()
    file.write_text(json.dumps({"messages": again_with("b")}) + "\n")
    assert "one conversation" in one_line_error(flags, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_fields_that_only_other_rows_have_are_no_part_of_a_conversation(tmp_path, kind, capsys):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def row(name, arguments):
        tool = {"type": "function", "function": {"name": name, "parameters": {"properties": arguments}}}
        call = {"role": "assistant", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}
        return {"messages": [{"role": "user", "content": "Go."}, call], "tools": [tool]}

    rows = [row("f", {"x": "1"}), row("g", {"y": 2})]
    table = pa.Table.from_pylist(rows).append_column("at", pa.array([1, 2], pa.timestamp("ns")))  # no Python object
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if kind == "parquet":
        parquet.write_table(table, tmp_path / "rows.parquet")
    else:
        with pa.ipc.new_stream(tmp_path / "rows.arrow", table.schema) as writer:
            writer.write_table(table)
    for name in ("jsonl", kind):
        assert command.main([str(tmp_path / f"rows.{name}"), "--out", str(tmp_path / f"{name}.bin")]) == 0
    assert (tmp_path / "jsonl.bin").read_bytes() == (tmp_path / f"{kind}.bin").read_bytes()
    assert (tmp_path / "jsonl.mask.bin").read_bytes() == (tmp_path / f"{kind}.mask.bin").read_bytes()


def test_conversations_whose_answers_begin_too_late_are_left_out(tmp_path, recwarn):
    answer, lines = {"role": "assistant", "content": "Yes."}, []
    for length in (5, 200, 6, 300, 7):
        lines.append(json.dumps({"messages": [{"role": "user", "content": "x" * length}, answer]}))
    (tmp_path / "chats.jsonl").write_text("\n".join(lines))
    settings = Settings(data=str(tmp_path / "chats.jsonl"), seq_len=80, batch=1, eval_rows=1)
    corpus = open_corpus(settings, load_tokenizer(None), 320, tmp_path / "tokens.bin")
    assert len(corpus.training) + len(corpus.held_out) == 3
    assert any(
        "2 of 5 conversations are longer" in str(w.message) and "2 of them are" in str(w.message) for w in recwarn
    )
    assert all(corpus.rows.batch([i]).targets() for i in range(4))


def test_files_beside_the_tokens_are_not_overwritten(tmp_path, capsys):
    data, content = tmp_path / "data.json", json.dumps([{"text": "words " * 50}])
    data.write_text(content)
    assert command.main([str(data), "--out", str(tmp_path / "data.bin")]) == 2
    assert "data.json exists" in capsys.readouterr().err
    assert data.read_text() == content and [p.name for p in tmp_path.iterdir()] == ["data.json"]
    (tmp_path / "x.mask.bin").touch()
    assert command.main([str(data), "--out", str(tmp_path / "x.bin")]) == 2
    assert "x.mask.bin exists" in capsys.readouterr().err
    assert command.main([str(data), "--out", str(tmp_path / "y.bin")]) == 0
    (tmp_path / "y.bin").unlink()  # as after kill -9 between the two
    assert command.main([str(data), "--out", str(tmp_path / "y.bin")]) == 0


def test_the_file_of_a_set_is_not_that_of_anothers_chats(tmp_path, small, text, capsys):
    flags = ["--model", str(small), "--data", str(text), "--seq-len", "48", "--out", str(tmp_path / "run")]
    flags += ["--val-data", f"x={text}", f"x-chats={text}"]
    assert "beside x no set can be x-chats" in one_line_error(flags, capsys)


def test_the_mode_of_thinking_is_read_from_files(tmp_path):
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(json.dumps(dict(messages=PAIR, thinking=mode)) + "\n" for mode in ("on", "off")))
    write_chats([file], load_tokenizer(None), tmp_path / "x.bin", "assistant")
    text = load_tokenizer(None).decode(np.fromfile(tmp_path / "x.bin", np.uint16))
    assert text.count("detailed thinking on") == text.count("detailed thinking off") == text.count("two twos") == 1
