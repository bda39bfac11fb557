"""Preferences and reinforcement learning over a model and over adapters: the reference, resuming, pairs, mistakes."""

import json
import math

import pytest
import torch

from ling_kernels.errors import Diverged, InputError
from ling_kernels.model import load_model
from ling_kernels.posttrain import Dpo, DpoSettings, Loop, LoopSettings, Problem
from ling_kernels.posttrain.dpo import main, pair_of
from ling_kernels.tokenizer import Tokenizer, load_tokenizer
from tests.reward_functions import count_spread
from tests.training import one_line_main, small  # noqa: F401 (a fixture)

TIMED = ("seconds", "tokens_per_s")


@pytest.fixture(scope="module")
def start(small):  # noqa: F811
    Tokenizer().save(small)
    return small


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pairs in every form."""
    say = lambda role, text: dict(role=role, content=text)  # noqa: E731
    rows = [
        dict(prompt="a?", chosen="yes", rejected="no"),
        dict(prompt=[say("user", "b?")], chosen=[say("assistant", "yes")], rejected=[say("assistant", "well")]),
        dict(chosen=[say("user", "c?"), say("assistant", "yes!")], rejected=[say("user", "c?"), say("assistant", "n")]),
        dict(prompt="d?", chosen="yes", rejected="maybe", system="Be brief.", thinking="on"),
        dict(prompt="e?", chosen="x" * 300, rejected="y"),
    ]
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def settings(data, **more):
    return DpoSettings(**dict(data=str(data), steps=6, pairs=2, max_tokens=120, lr=3e-3, warmup=0, device="cpu") | more)


def test_pairs_are_read_in_every_form(data):
    tokenizer = load_tokenizer(None)
    pairs = [pair_of(json.loads(row), "x", tokenizer) for row in data.read_text().splitlines()]
    for pair, letter, answer in zip(pairs, "abcde", ("yes", "yes", "yes!", "yes", "x" * 300), strict=True):
        prompt = tokenizer.decode(pair.chosen.prompt)
        assert f"<role>HUMAN</role>{letter}?" in prompt and prompt.endswith("<role>ASSISTANT</role>")
        assert tokenizer.decode(pair.chosen.ids) == f"{answer}<|role_end|>"
    assert "SYSTEM</role>Be brief.\ndetailed thinking on" in tokenizer.decode(pairs[3].rejected.prompt)


@pytest.mark.parametrize("lora", [0, 4])
def test_it_learns_and_a_resumed_run_has_the_bits_of_one_without_a_stop(start, data, tmp_path, lora):
    options = settings(data, lora_rank=lora, **(dict(lr=3e-2) if lora else {}))
    with pytest.warns(UserWarning, match="1 of 5 pairs are left out, as they have more than 120 tokens"):
        whole = Dpo(options, start, tmp_path / "whole")
    before = {name: p.clone() for name, p in whole.model.named_parameters()}
    records = [whole.step() for _ in range(6)]
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and records[0]["accuracy"] == 0
    assert records[-1]["loss"] < 0.65 and records[-1]["accuracy"] == 1
    half = Dpo(options, start, tmp_path / "half")
    for _ in range(3):
        half.step()
    half.save()
    half.lock = None
    resumed = Dpo.resume(tmp_path / "half")
    for want in records[3:]:
        got = resumed.step()
        assert {k: v for k, v in got.items() if k not in TIMED} == {k: v for k, v in want.items() if k not in TIMED}
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
        changed = "adapter." in name or not lora
        assert changed or torch.equal(p, before[name]), name
    assert (whole.reference is None) == bool(lora), "adapters need no second model"
    answers = [a for pair in whole.pairs for a in pair]
    original = whole.logp(load_model(start, dtype=torch.float32), answers)
    assert torch.equal(whole.reference_logp(answers), original)
    assert not torch.equal(whole.logp(whole.model, answers), original)


def test_every_epoch_has_each_pair_once(start, data, tmp_path):
    run = Dpo(settings(data, pairs=3), start, tmp_path / "run")
    drawn = []
    for run.step_done in range(4):
        drawn += [run.pairs.index(pair) for pair in run.draw()]
    epochs = [drawn[i : i + 4] for i in range(0, 12, 4)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs) and len({*map(tuple, epochs)}) > 1


def test_the_command(start, data, tmp_path, capsys):
    flags = ["--model", str(start), "--data", str(data), "--pairs", "2", "--device", "cpu", "--max-tokens", "120"]
    run = tmp_path / "run"
    assert main([*flags, "--out", str(run), "--steps", "2", "--lora-rank", "4"]) == 0
    assert main(["--resume", str(run), "--steps", "3"]) == 0
    assert [json.loads(row)["step"] for row in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    load_model(run / "model")
    written = {"adapter_model.safetensors", "adapter_config.json", "base.json"}
    assert {p.name for p in (run / "adapter").iterdir()} == written
    (tmp_path / "same.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "b"}\n')
    users = '{"prompt": "a", "chosen": [{"role": "user", "content": "b"}], "rejected": "c"}'
    (tmp_path / "other.jsonl").write_text(users)
    capsys.readouterr()
    for wrong, text in [
        (["--data", str(tmp_path / "none.jsonl")], "none.jsonl"), (["--data", str(tmp_path)], "pairs are rows of a"),
        (["--beta", "0"], "--beta 0.0: it must be more than 0"), (["--label-smoothing", "0.5"], "it must be below 0.5"),
        (["--lora-alpha", "3"], "needs --lora-rank"), (["--max-tokens", "3"], "no pair of answers within 3 tokens"),
        (["--data", str(tmp_path / "same.jsonl")], "are the same answer"),
        (["--data", str(tmp_path / "other.jsonl")], "messages 1 and 2 are both of role user"),
    ]:  # fmt: skip
        assert text in one_line_main(main, [*flags, "--out", str(tmp_path / "new"), *wrong], capsys)
        assert not (tmp_path / "new").exists()
    assert "--data: name a file" in one_line_main(main, flags[:2], capsys)
    assert "--model: name the folder" in one_line_main(main, flags[2:], capsys)
    assert "goes with --steps alone" in one_line_main(main, ["--resume", str(run), "--lr", "1"], capsys)


def test_other_pairs_do_not_resume_and_a_diverging_run_stops(start, data, tmp_path):
    file = tmp_path / "pairs.jsonl"
    file.write_text(data.read_text())
    run = Dpo(settings(file, steps=9), start, tmp_path / "run")
    run.logp = lambda model, answers: Dpo.logp(run, model, answers) * torch.nan
    with pytest.raises(Diverged, match="in 5 steps up to step 5"):
        for _ in range(9):
            assert run.step()["skipped"] == 1
    run.save()
    run.lock = None
    file.write_text(data.read_text().replace("maybe", "perhaps"))
    with pytest.raises(InputError, match="its pairs have changed"):
        Dpo.resume(tmp_path / "run")


def letters(random) -> Problem:
    return Problem(random.choice("abc"), "x", "x")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_reinforcement_learning_of_adapters(start, tmp_path, precision):
    brief = dict(prompts=2, samples=2, new_tokens=6, lr=3e-2, warmup=0, reward_timeout=60.0, device="cpu", kl=0.1)
    options = LoopSettings(steps=2, lora_rank=4, precision=precision, **brief)
    whole = Loop(options, start, tmp_path / "whole", letters, count_spread)
    records = [whole.step() for _ in range(2)]
    whole.close()
    half = Loop(options, start, tmp_path / "half", letters, count_spread)
    half.step()
    half.save()
    half.close()
    half.lock = None
    resumed = Loop.resume(tmp_path / "half", problems=letters, reward=count_spread)
    got = resumed.step()
    resumed.close()
    assert {k: v for k, v in got.items() if k not in TIMED} == {k: v for k, v in records[1].items() if k not in TIMED}
    assert records[1]["kl"] > 0 and whole.reference is None
    assert records[1]["mismatch_max"] < (1e-4 if precision == "fp32" else 0.3), "the engine has the new adapters"
    original = load_model(start, dtype=torch.float32)
    base = {name: p for name, p in whole.model.named_parameters() if "adapter." not in name}
    assert all(torch.equal(p, base[name]) for name, p in original.named_parameters())


def test_pinned_rows_and_adapters_are_refused():
    with pytest.raises(InputError, match="--batch-invariant with --lora-rank 2"):
        LoopSettings(batch_invariant=True, lora_rank=2)
