"""Runs that train adapters: what changes, resuming, checkpoints and what is exported, several processes, mistakes."""

# ruff: noqa: F811 (fixtures are imported)

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from ling_kernels.errors import InputError
from ling_kernels.generate import Engine
from ling_kernels.model import Ling, load_model, named_views, save_model
from ling_kernels.parallel.adapters import check_base
from ling_kernels.train import Settings, Trainer, cli
from ling_kernels.train.__main__ import main
from ling_kernels.train.prepare import device
from tests.cluster import run_jobs
from tests.test_lora import wide
from tests.training import flags, one_line_error, small, text, tiniest, whole_tensors  # noqa: F401


@pytest.fixture(autouse=True, scope="module")
def quick_start():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "measured_flops", lambda *_: 1e10)
        patch.setattr(cli, "draw", lambda *_: [])  # plots take seconds
        yield


def settings(small, text, **more):
    return Settings(**dict(
        model=str(small), data=(str(text),), seq_len=32, batch=4, lr=1e-2, warmup=2, steps=6, eval_rows=2, threads=1,
        lora_rank=4, save_every=0, sample_tokens=0,
    ) | more)  # fmt: skip


def finish(trainer, steps=None):
    losses = []
    while trainer.progress.step < (steps or trainer.settings.steps):
        losses.append(trainer.step()["loss"])
    return losses


@pytest.fixture(scope="module")
def run(small, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("lora") / "run"
    args = f"--model {small} --data {text} --seq-len 48 --batch 8 --micro-batch 2 --warmup 4 --eval-rows 4 --threads 1"
    rest = f"--lora-rank 4 --lr 0.01 --sample-tokens 4 --steps 12 --save-every 4 --out {out}"
    assert main([*args.split(), *rest.split()]) == 0
    return out


def test_a_run_learns_writes_little_and_exports_merged_weights(run, small):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.15
    last = run / "checkpoints" / "step-000012"
    names = {path.name for path in last.iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    factors = load_file(last / "adapter_model.safetensors")
    before, after = (dict(named_views(load_model(f, torch.float32))) for f in (small, run / "model"))
    changed = 0
    for key, w in before.items():
        module = f"base_model.model.{key.removesuffix('.weight')}"
        delta = 0
        if f"{module}.lora_A.weight" in factors:
            changed += 1
            delta = 2 * (factors.pop(f"{module}.lora_B.weight") @ factors.pop(f"{module}.lora_A.weight"))
            assert delta.abs().max() > 0 or "experts" in key
        assert torch.equal(after[key].detach(), (w.detach() + delta).bfloat16().float()), key
    assert not factors and changed == 3 * 2 + 3 + 2 * 3 + 2 * 8 * 3


def test_a_checkpoint_of_adapters_is_no_model(run):
    with pytest.raises(InputError, match="it holds adapters alone, and the folder model of their run has them merged"):
        load_model(run / "checkpoints" / "step-000012")


def test_the_adapter_is_written_as_peft_reads_it(run, small):
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 4 and config["lora_alpha"] == 8
    assert config["target_modules"] == ["dense", "down_proj", "gate_proj", "query_key_value", "up_proj"]
    ours = load_file(run / "adapter" / "adapter_model.safetensors")
    saved = load_file(run / "checkpoints" / "step-000012" / "adapter_model.safetensors")
    assert ours.keys() == saved.keys() and all(torch.equal(ours[key], saved[key]) for key in ours)


def test_an_engine_serves_the_adapter(run, small):
    """Over the model that it was trained on it computes what the exported model does, up to its rounding to bf16."""
    check_base(run / "adapter", small)
    with pytest.raises(InputError, match="is for other weights than those in .*model: see its base.json"):
        check_base(run / "adapter", run / "model")
    ids = [[int(t) for t in torch.randint(200, (40,), generator=torch.Generator().manual_seed(i))] for i in range(3)]
    e = Engine(load_model(small, torch.float32), adapters=dict(learned=run / "adapter"))
    found, plain = (torch.tensor(e.score(ids, adapter=name)) for name in ("learned", None))
    want = torch.tensor(Engine(load_model(run / "model", torch.float32)).score(ids))
    assert (found - want).norm() < 0.05 * (plain - want).norm()


@pytest.mark.parametrize("more", [
    dict(), dict(optimizer="muon"), dict(optimizer="adamw8bit", master="bf16", precision="bf16"),
    dict(master="bf16", precision="bf16", recompute="full", lora_on="attention,experts"),
    dict(step_in_backward=True, clip=0.0),
], ids=["adamw", "muon", "adamw8bit", "bf16", "step in backward"])  # fmt: skip
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(small, text, tmp_path, more):
    through = Trainer(settings(small, text, **more), tmp_path / "through")
    losses = finish(through)
    assert losses[-1] < losses[0]
    half = Trainer(settings(small, text, **more), tmp_path / "half")
    finish(half, 3)
    half.save()
    del half
    resumed = Trainer.resume(tmp_path / "half")
    finish(resumed)
    for (name, a), b in zip(through.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert a.dtype == torch.float32 or "adapter." not in name
    assert all(torch.equal(a.expert_bias, b.expert_bias) and not a.expert_bias.any()
               for a, b in zip(through.model.routers(), resumed.model.routers(), strict=True))  # fmt: skip
    of_adapters = {p for name, p in resumed.model.named_parameters() if "adapter." in name}
    assert {*resumed.optimizer.state} == of_adapters


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    model = Ling(wide())
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, folder := tmp_path_factory.mktemp("wide") / "model")
    return folder


@pytest.mark.parametrize("weights", ["kept", "only"])
def test_fp8(wide_model, text, tmp_path, weights):
    """only: what is not FP8 is bf16, and the weights that are exported are the model's, not their FP8."""
    options = dict(precision="fp8", fp8_weights=weights, master="bf16", steps=4)
    trainer = Trainer(settings(wide_model, text, **options), tmp_path / "run")
    kinds = {p.dtype for name, p in trainer.model.named_parameters() if name.endswith(("down", "gate_up.weight"))}
    assert kinds == {torch.float8_e4m3fn if weights == "only" else torch.bfloat16}
    losses = finish(trainer, 2)
    trainer.save()
    losses += finish(trainer)
    assert losses[-1] < losses[0]
    trainer.export(tmp_path / "merged")
    found = [load_model(f, torch.float32) for f in (wide_model, tmp_path / "merged")]
    before, after = (m.layers[1].mlp.experts.down.detach() for m in found)
    adapter = trainer.model.layers[1].mlp.experts.down_adapter
    assert adapter.delta().abs().max() > 0
    assert torch.equal(after, (before + adapter.delta()).bfloat16().float())
    trainer.lock.close()
    resumed = Trainer.resume(tmp_path / "run")
    assert finish(resumed) == losses[2:]


def test_fp8_alone_learns_what_fp8_beside_bf16_does(wide_model, text, tmp_path):
    found = []
    for weights in ("kept", "only"):
        options = dict(precision="fp8", fp8_weights=weights, master="bf16", steps=4)
        found.append(finish(Trainer(settings(wide_model, text, **options), tmp_path / weights)))
    assert found[0] == pytest.approx(found[1], rel=2e-3)


def test_the_model_must_be_there_and_unchanged(small, text, tmp_path):
    folder = shutil.copytree(small, tmp_path / "base")
    trainer = Trainer(settings(folder, text), tmp_path / "run")
    finish(trainer, 1)
    trainer.save()
    del trainer
    (kept,) = folder.glob("*.safetensors")
    moved = kept.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="there are no weights in .*base, which a run with adapters reads"):
        Trainer.resume(tmp_path / "run")
    data = bytearray(moved.read_bytes())
    data[-1] ^= 1
    kept.write_bytes(data)
    with pytest.raises(InputError, match="they have changed"):
        Trainer.resume(tmp_path / "run")


@pytest.mark.parametrize("wrong, message", [
    (["--lora-rank", "4", "--lora-on", "router"], "--lora-on router: 'router' is not one of attention, mlp, experts"),
    (["--lora-alpha", "4"], "--lora-alpha 4.0 needs --lora-rank"),
    (["--lora-on", "mlp"], "--lora-on mlp needs --lora-rank"),
    (["--lora-rank", "-1"], "--lora-rank -1: it must be at least 0"),
    (["--lora-rank", "4", "--recompute", "experts", "--precision", "fp8"], "give none or full"),
    (["--lora-rank", "4", "--merge-last", "2"], "the weights to merge do not change"),
    (["--lora-rank", "4", "--fp8-watch", "2"], "it measures layers that are trained"),
    (["--lora-rank", "4", "--model", "tiny"], "there are no weights in tiny"),
    (["--fp8-weights", "only", "--precision", "fp8"], "--fp8-weights only needs --lora-rank, --precision fp8"),
    (["--lora-rank", "4", "--plan"], "a plan does not know adapters"),
])  # fmt: skip
def test_mistakes(flags, tmp_path, capsys, wrong, message):
    assert message in one_line_error([*flags, "--out", str(tmp_path / "run"), *wrong], capsys)


def test_another_rank_does_not_resume(run, capsys):
    error = one_line_error(["--resume", str(run), "--lora-rank", "8"], capsys)
    assert "lora_rank is 4 in the run to resume and 8 here" in error


EXACT = ("dp", "copies")
JOBS = {
    "dp": "", "ep": "--ep 2", "cp and vocabulary": "--cp 2 --vocab-parallel 2", "tp": "--tp 2",
    "copies": "--dp-replicate 2", "pp": "--pp 2 --micro-batch 2 --pipeline E|t|t|mL",
}  # fmt: skip


@pytest.fixture(scope="module")
def several(text, tmp_path_factory):
    """Runs of one and of two processes."""
    folder = tmp_path_factory.mktemp("several")
    model = Ling(replace(tiniest(), num_attention_heads=4, num_key_value_heads=2))
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, folder / "model")
    run = (f"--model {folder / 'model'} --data {text} --seq-len 48 --batch 8 --micro-batch 4 --eval-rows 4 --threads 1"
           " --lr 3e-3 --warmup 2 --clip 0.1 --sample-tokens 4 --lora-rank 4 --steps 3 --save-every 1"
           " --keep 0")  # fmt: skip
    run = run.split()
    assert main([*run, "--out", str(folder / "alone")]) == 0
    half = shutil.copytree(folder / "alone", folder / "resumed")
    for step in (2, 3):
        shutil.rmtree(half / "checkpoints" / f"step-00000{step}")
    jobs = [(name, [[*run, *flags.split(), "--out", str(folder / name)]] * 2) for name, flags in JOBS.items()]
    jobs.append(("resumed", [["--resume", str(half), "--ep", "2"]] * 2))
    refused = "--pp 2 --micro-batch 2 --pipeline E|t|t|mL --schedule InterleavedZeroBubble"
    jobs.append(("refused", [[*run, *refused.split(), "--out", str(folder / "refused")]] * 2))
    run_jobs(jobs, folder, 2)
    return folder


@pytest.mark.parametrize("name", [*JOBS, "resumed"])
def test_two_processes_equal_one(several, name):
    """To the bit where they share rows; experts and parts of a row have other sums."""
    results = [json.loads((several / f"{name}.{rank}").read_text()) for rank in range(2)]
    assert not any(code for code, _, _ in results), results
    run, alone = several / name, several / "alone"
    metrics = [[json.loads(line) for line in (r / "metrics.jsonl").read_text().splitlines()] for r in (run, alone)]
    for ours, theirs in zip(*metrics, strict=True):
        assert theirs["grad_norm"] > 0.1  # clipped
        for key in ("loss", "grad_norm", "lr"):
            assert ours[key] == pytest.approx(theirs[key], rel=0 if name in EXACT else 1e-4), key
    for stem in ("adapter_model", "optimizer"):
        a, b = (whole_tensors(r / "checkpoints" / "step-000003", stem) for r in (run, alone))
        assert a.keys() == b.keys()
        for key in a:
            tolerance = dict(rtol=0, atol=0) if name in EXACT else dict(rtol=1e-3, atol=2e-5)
            torch.testing.assert_close(a[key], b[key], **tolerance, msg=lambda m, key=key: f"{key}: {m}")
    one, two = (dict(named_views(load_model(r / "model", torch.float32))) for r in (run, alone))
    for key, w in one.items():
        torch.testing.assert_close(w, two[key], rtol=0 if name in EXACT else 2e-2, atol=0 if name in EXACT else 1e-4)
    ours, theirs = (load_file(r / "adapter" / "adapter_model.safetensors") for r in (run, alone))
    assert ours.keys() == theirs.keys()


def test_what_cannot_be_divided_is_refused(several):
    code, _, error = json.loads((several / "refused.0").read_text())
    assert code == 2 and "--schedule InterleavedZeroBubble with --lora-rank" in error and error.count("\n") == 1
