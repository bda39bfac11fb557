"""Merging checkpoints: weights against the formula of WSM, sums against the tensors, mistakes in one line."""

import math
import shutil
import weakref
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ling_kernels.errors import InputError
from ling_kernels.model import Ling, LingConfig, load_model, named_views, save_model
from ling_kernels.train import merge as merging
from ling_kernels.train.convert import to_dcp
from ling_kernels.train.merge import decay_weights, merge, named_weights

CONFIG = LingConfig.tiny()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Three folders of one model with different random weights, in fp32; the second in two files."""
    run = tmp_path_factory.mktemp("run")
    folders = []
    for i in range(3):
        model = Ling(CONFIG)
        model.init_weights(torch.Generator().manual_seed(i))
        for router in model.routers():
            router.expert_bias.normal_(generator=torch.Generator().manual_seed(i))
        folders.append(run / "checkpoints" / f"step-{100 * (i + 1):06d}")
        save_model(model, folders[-1], torch.float32, **(dict(max_shard_bytes=5 << 20) if i == 1 else {}))
    (folders[-1] / "tokenizer.json").write_text("{}")
    return folders


def weights_of(folder, dtype=torch.float32):
    return {key: view.detach() for key, view in named_views(load_model(folder, dtype))}


@pytest.mark.parametrize("number", [1, 2, 5, 32])
@pytest.mark.parametrize("decay", merging.DECAYS)
def test_weights_stand_for_a_decay(decay, number):
    """With constant updates g_i the merge is the run whose update i is scaled by the decay."""
    c = named_weights(decay, number)
    assert len(c) == number and math.isclose(sum(c), 1) and min(c) >= 0
    g = torch.randn(number - 1, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
    path = torch.cat([torch.zeros(1, 7, dtype=torch.float64), g.cumsum(0)])
    parts = number - 1 if decay == "1-sqrt" else number
    decayed = sum(merging.DECAYS[decay](i / parts) * g[i - 1] for i in range(1, number))
    torch.testing.assert_close(
        torch.tensor(c, dtype=torch.float64) @ path, decayed + torch.zeros(7, dtype=torch.float64)
    )


def test_a_linear_decay_is_the_mean():
    torch.testing.assert_close(torch.tensor(named_weights("linear", 8)), torch.full((8,), 0.125))


def test_the_published_weights_of_1_sqrt():
    """w_i = 1 - sqrt(i / k) of checkpoints 0 .. k: worked out by hand for k = 4 and for one, two and three of them."""
    third, half = math.sqrt(3) / 2, math.sqrt(0.5)
    assert named_weights("1-sqrt", 5) == pytest.approx([0.5, half - 0.5, third - half, 1 - third, 0])
    assert named_weights("1-sqrt", 3) == pytest.approx([half, 1 - half, 0])
    assert named_weights("1-sqrt", 2) == [1, 0] and named_weights("1-sqrt", 1) == [1]


@pytest.mark.parametrize("decay", [[1.1], [0.5, 0.6], [0.5, -0.1], [math.nan], ["0.5"], "0.5"])
def test_what_is_no_decay(decay):
    with pytest.raises(InputError, match="a decay falls"):
        decay_weights(decay)


@pytest.mark.parametrize("decay", ["mean", "1-sqrt", "ema:0.3", "1"])
def test_no_checkpoints_have_no_weights(decay):
    with pytest.raises(InputError, match="at least 1 checkpoint; got 0"):
        named_weights(decay, 0)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_merge_is_the_weighted_sum(checkpoints, tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(merging, "SHARD_BYTES", 3 << 20)  # several files
    c = [0.5, 0.2, 0.3]
    merge(checkpoints, c, tmp_path / "out", dtype)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "out/tokenizer.json").read_text() == "{}"
    got, parts = weights_of(tmp_path / "out"), [weights_of(folder) for folder in checkpoints]
    for key, value in got.items():
        expected = sum(x * part[key].double() for x, part in zip(c, parts, strict=True))
        exact = torch.float32 if key.endswith("expert_bias") else merging.DTYPES[dtype]
        assert torch.equal(value, expected.to(exact).float()), key


def test_merging_in_fp8(tmp_path):
    """FP8 checkpoints are dequantised, and an FP8 merge is the quantised merge."""
    model = Ling(replace(CONFIG, moe_intermediate_size=128, num_hidden_layers=2, num_nextn_predict_layers=0))
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "a", torch.float32)
    merge([tmp_path / "a"], [1.0], tmp_path / "fp8", "fp8")
    merge([tmp_path / "a", tmp_path / "fp8"], [0.5, 0.5], tmp_path / "both", "fp32")
    exact, rounded, both = (weights_of(tmp_path / name) for name in ("a", "fp8", "both"))
    key = "model.layers.1.mlp.experts.0.gate_proj.weight"
    assert not torch.equal(exact[key], rounded[key])
    for key in exact:
        torch.testing.assert_close(both[key], (exact[key] + rounded[key]) / 2, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(rounded[key], exact[key], rtol=0.07, atol=1e-3)
    load_model(tmp_path / "fp8", fp8=True)


def mistakes(checkpoints, tmp_path):
    other, lacking = tmp_path / "other", tmp_path / "lacking"
    save_model(Ling(replace(CONFIG, num_hidden_layers=2)), other)
    shutil.copytree(checkpoints[0], lacking)
    (lacking / "model.safetensors").unlink()
    a, b, _ = map(str, checkpoints)
    run = str(checkpoints[0].parents[1])
    diverged, longer = tmp_path / "diverged", tmp_path / "longer"
    for folder, change in ((diverged, lambda t: t * float("nan")), (longer, lambda t: torch.cat([t, t]))):
        shutil.copytree(checkpoints[0], folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] = change(tensors["model.norm.weight"])
        save_file(tensors, folder / "model.safetensors")
    (tmp_path / "empty/checkpoints").mkdir(parents=True)
    dcp, damaged = tmp_path / "dcp", tmp_path / "damaged"
    to_dcp(checkpoints[0], dcp)
    damaged.mkdir()
    (damaged / ".metadata").touch()
    wide = tmp_path / "wide.json"
    replace(CONFIG, vocab_size=2 * CONFIG.vocab_size).to_json(wide, fp8=False, dtype=torch.float32)
    return {
        "do not add up": ([a, b, "--weights", "0.5", "0.6"], "add up to 1.1, not to 1"),
        "too few": ([a, b, "--weights", "1"], "2 checkpoints and 1 weights"),
        "both": ([a, "--weights", "1", "--decay", "linear"], "give one"),
        "not a run": ([a, b, "--last", "1"], "choose from a run"),
        "more than there are": ([run, "--last", "9"], "holds 3 checkpoints; 9 are asked for"),
        "none": ([str(tmp_path / "empty")], "holds no checkpoints"),
        "no losses": ([run, "--best", "2"], "holds 0 checkpoints with a validation loss"),
        "another model": ([a, str(other)], "are not of one model"),
        "no weights": ([str(lacking), a], "neither model.safetensors nor"),
        "another shape": ([a, str(longer)], f"model.norm.weight is [{2 * CONFIG.hidden_size}], by config.json it"),
        "of torch and not": ([str(dcp), a, "--model", "tiny"], "train.convert from-dcp makes a model's folder of it"),
        "of torch alone": ([str(dcp)], "--model names its configuration"),
        "of torch, damaged": ([str(damaged), "--model", "tiny"], "is no folder of torch.distributed.checkpoint"),
        "of torch, another shape": ([str(dcp), str(dcp), "--model", str(wide)], "word_embeddings.weight is ["),
        "of torch, more layers": ([str(dcp), "--model", "mini"], "has no layers."),
        "not of torch": ([a, "--model", "tiny"], "--model is for folders of torch.distributed.checkpoint"),
        "nothing there": ([str(tmp_path / "absent")], "it has no config.json"),
        "no number": ([run, "--last", "0"], "'0' is no number of checkpoints"),
        "diverged": ([a, str(diverged)], "model.norm.weight of the merged model has values that are not finite"),
        "among checkpoints": ([a, "--out", str(tmp_path / "run/checkpoints/step-000099")], "taken for a checkpoint"),
        "no name": ([a, "--out", ""], "--out is empty"),
    }


def test_mistakes_are_one_line_and_leave_nothing(checkpoints, tmp_path, capsys):
    for flags, message in mistakes(checkpoints, tmp_path).values():
        out = tmp_path / "merged"
        with pytest.raises(SystemExit) as stop:
            raise SystemExit(merging.main(["--out", str(out), *flags]))
        error = capsys.readouterr().err.strip()
        assert stop.value.code == 2 and message in error.splitlines()[-1], (flags, error)
        assert not out.exists() and not list(tmp_path.glob(".merged*"))


def test_the_best_of_a_run(checkpoints, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(checkpoints[0].parents[1], run)
    losses = {100: 2.0, 200: "NaN", 250: 1.0, 300: 2.5}  # a loss that is not finite is not the best
    lines = [f'{{"step": {step}, "val_loss": {loss}}}\n' for step, loss in losses.items()]
    (run / "metrics.jsonl").write_text("".join(lines))
    assert merging.main([str(run), "--best", "3", "--out", str(tmp_path / "three")]) == 2
    assert "holds 2 checkpoints with a validation loss" in capsys.readouterr().err
    assert not merging.main([str(run), "--best", "2", "--out", str(tmp_path / "best"), "--dtype", "fp32"])
    assert "step-000100" in (printed := capsys.readouterr().out) and "step-000200" not in printed
    a, c, got = (weights_of(f) for f in (checkpoints[0], checkpoints[2], tmp_path / "best"))
    assert all(torch.equal(got[key], ((a[key].double() + c[key].double()) / 2).float()) for key in got)


def test_a_merge_that_is_interrupted_leaves_nothing(checkpoints, tmp_path, monkeypatch):
    """After the first file is written."""
    summed = merging.weighted_sum

    def interrupt(*args):
        if written := [*tmp_path.glob(".out.partial/model-*.safetensors")]:
            raise KeyboardInterrupt(written)
        return summed(*args)

    monkeypatch.setattr(merging, "SHARD_BYTES", 1 << 20)
    monkeypatch.setattr(merging, "weighted_sum", interrupt)
    with pytest.raises(KeyboardInterrupt, match="model-00001-of-"):
        merge(checkpoints, [0.5, 0.25, 0.25], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_dcp_folders_merge_to_the_same_bits(checkpoints, tmp_path, capsys):
    """As the model folders that they were made of do, fused experts and all."""
    folders = [tmp_path / f"dcp-{i}" for i in range(3)]
    for folder, checkpoint in zip(folders, checkpoints, strict=True):
        to_dcp(checkpoint, folder)
    flags = ["--decay", "ema:0.3", "--dtype", "fp32", "--out"]
    assert not merging.main([*map(str, folders), "--model", str(checkpoints[-1]), *flags, str(tmp_path / "of-dcp")])
    assert not merging.main([*map(str, checkpoints), *flags, str(tmp_path / "of-folders")])
    got, want = weights_of(tmp_path / "of-dcp"), weights_of(tmp_path / "of-folders")
    assert all(torch.equal(got[key], want[key]) for key in want)
    assert (tmp_path / "of-dcp/tokenizer.json").read_text() == "{}"


class LiveBytes(TorchDispatchMode):
    """The largest sum of the sizes of the tensors that operations gave and that were alive at one time."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.device.type == "cpu":
                storage = t.untyped_storage()
                if (key := storage._cdata) not in self.alive:
                    self.alive[key] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.parametrize("of_dcp", [False, True], ids=["folders", "dcp"])
def test_memory_does_not_grow_with_the_checkpoints(checkpoints, tmp_path, monkeypatch, of_dcp):
    """It holds one file of the output and a few tensors, in fp64, whether 2 or 6 checkpoints are merged."""
    monkeypatch.setattr(merging, "SHARD_BYTES", 1 << 20)
    folders = checkpoints[:2]
    if of_dcp:
        folders = [tmp_path / f"dcp-{i}" for i in range(2)]
        for folder, checkpoint in zip(folders, checkpoints, strict=False):
            to_dcp(checkpoint, folder)
    peaks = []
    for times in (1, 3):
        with LiveBytes() as live:
            n = 2 * times
            merge(folders * times, [1 / n] * n, tmp_path / f"out-{n}", "fp32", "tiny" if of_dcp else None)
        peaks.append(live.peak)
    state = Ling(CONFIG).state_dict()
    parameter = max(t.numel() for t in state.values()) if of_dcp else CONFIG.vocab_size * CONFIG.hidden_size
    whole = sum(t.numel() for t in state.values())
    assert peaks[1] <= 1.01 * peaks[0] and peaks[1] < (1 << 20) + 4 * 8 * parameter, (peaks, parameter)
    assert peaks[1] > 1 << 20 and (of_dcp or peaks[1] < 8 * whole / 2), (peaks, whole)
