"""Official checkpoints: exact round trips, shards, block-FP8, streamed loading, and errors for damaged ones."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ling_kernels.errors import InputError
from ling_kernels.model import Ling, LingConfig, load_model, named_views, resolve_model, save_model
from ling_kernels.nn.fp8 import Fp8Linear, to_fp8

DATA = Path(__file__).parent / "data"
NAMES = ["base", "mtp1", "yarn"]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(name, dtype, tmp_path):
    save_model(load_model(DATA / name, dtype=dtype), tmp_path / "out")
    assert same(load_file(tmp_path / "out/model.safetensors"), load_file(DATA / name / "model.safetensors"))
    assert resolve_model(str(tmp_path / "out"))[0] == resolve_model(str(DATA / name))[0]
    before, after = (json.loads((d / "config.json").read_text()) for d in (DATA / name, tmp_path / "out"))
    assert before.items() <= (after | {"rope_scaling": before["rope_scaling"]}).items()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_shards(tmp_path):
    model = load_model(DATA / "mtp1")
    save_model(model, tmp_path, max_shard_bytes=100_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 5 and all(f.stat().st_size < 150_000 for f in files)
    tensors = {k: v for f in files for k, v in load_file(f).items()}
    assert same(tensors, load_file(DATA / "mtp1/model.safetensors"))
    assert same(dict(named_views(load_model(tmp_path))), dict(named_views(model)))
    save_model(model, tmp_path)  # again, as one file: the shards and their index are removed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_saving_keeps_files_of_other_names(tmp_path):
    others = ["model_ema.safetensors", "model-best.safetensors", "model-1-of-2.safetensors", "modelsafetensors",
              "optimizer.safetensors", "model-00001-of-00002.safetensors.bak"]  # fmt: skip
    for name in others:
        (tmp_path / name).write_bytes(name.encode())
    model = load_model(DATA / "base")
    for shard in (10 << 30, 100_000):
        save_model(model, tmp_path, max_shard_bytes=shard)
        assert all((tmp_path / name).read_bytes() == name.encode() for name in others)
    assert (tmp_path / "model.safetensors.index.json").is_file() and not (tmp_path / "model.safetensors").exists()


def test_block_fp8(tmp_path):
    """Including sizes that are not multiples of 128: 96 rows are one block."""
    tensors = load_file(DATA / "base/model.safetensors")
    want = dict(tensors)
    for key in list(tensors):
        if "proj" not in key and "dense" not in key:
            continue
        w = tensors[key].float()
        amax = torch.nn.functional.pad(w, (0, -w.shape[1] % 128, 0, -w.shape[0] % 128))
        amax = amax.abs().unflatten(0, (-1, 128)).unflatten(2, (-1, 128)).amax((1, 3))
        scale = amax.clamp(1e-4) / 448
        full = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: w.shape[0], : w.shape[1]]
        tensors[key] = (w / full).to(torch.float8_e4m3fn)
        tensors[key + "_scale_inv"] = scale
        want[key] = tensors[key].float() * full
    assert len(tensors) > len(want) + 10
    shutil.copy(DATA / "base/config.json", tmp_path)
    half = len(tensors) // 2  # scales may be in another shard than their weights
    parts = [sorted(tensors)[:half], sorted(tensors)[half:]]
    for i, keys in enumerate(parts):
        save_file({k: tensors[k] for k in keys}, tmp_path / f"{i}.safetensors")
    weight_map = {k: f"{i}.safetensors" for i, keys in enumerate(parts) for k in keys}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for key, view in named_views(load_model(tmp_path, dtype=torch.float32)):
        assert torch.equal(view, want[key].float()), key


def damage(folder: Path, how: str):
    weights, config = folder / "model.safetensors", folder / "config.json"
    tensors = load_file(weights)
    if how == "no config":
        config.unlink()
    elif how == "config is not json":
        config.write_text("{")
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif how == "empty file":
        weights.write_bytes(b"")
    elif how == "key is missing":
        save_file({k: v for k, v in tensors.items() if k != "model.layers.1.mlp.experts.3.up_proj.weight"}, weights)
    elif how == "wrong shape":
        save_file(tensors | {"lm_head.weight": torch.zeros(7, 64)}, weights)
    elif how == "fp8 without scale":
        save_file(
            tensors | {"model.layers.0.mlp.down_proj.weight": torch.zeros(64, 96).to(torch.float8_e4m3fn)}, weights
        )
    elif how == "shard is missing":
        weight_map = dict.fromkeys(tensors, "model-00001-of-00002.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    elif how == "index is damaged":
        (folder / "model.safetensors.index.json").write_text("[]")
    elif how == "index is nested too deep":
        (folder / "model.safetensors.index.json").write_text("[" * 100_000)
    else:
        field, value = how.split("=")
        config.write_text(json.dumps(json.loads(config.read_text()) | {field: json.loads(value)}))


DAMAGED = {  # damage: error message
    "no config": "it has no config.json",
    "config is not json": "cannot read .*config.json",
    "no weights": "neither model.safetensors nor model.safetensors.index.json",
    "truncated": "cannot read .*model.safetensors",
    "empty file": "cannot read .*model.safetensors",
    "key is missing": "no model.layers.1.mlp.experts.3.up_proj.weight",
    "wrong shape": r"model.safetensors: lm_head.weight is \[7, 64\], by config.json it should be \[128, 64\]",
    "fp8 without scale": "no model.layers.0.mlp.down_proj.weight_scale_inv",
    "shard is missing": "cannot read .*model-00001-of-00002.safetensors",
    "index is damaged": "index.json is damaged",
    "index is nested too deep": "index.json is damaged",
    "num_key_value_heads=3": "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
    "n_group=5": "num_experts 16 is not a multiple of n_group 5",
    "num_experts_per_tok=12": "num_experts_per_tok 12 is more than the 8",
    "topk_group=9": "topk_group 9 is more than n_group 4",
    "hidden_size=0": "hidden_size is 0",
    'hidden_size="big"': "hidden_size is 'big'",
    "partial_rotary_factor=0.2": "not an even number of dimensions",
    'rope_scaling={"type": "linear", "factor": 2}': "only type yarn",
}


@pytest.mark.parametrize("how", DAMAGED)
def test_damaged_checkpoints_raise(how, tmp_path):
    folder = Path(shutil.copytree(DATA / "base", tmp_path / "model"))
    damage(folder, how)
    with pytest.raises(InputError, match=DAMAGED[how]):
        load_model(folder)


def test_unknown_models_raise(tmp_path):
    with pytest.raises(InputError, match="unknown model 'large': neither a preset .tiny, mini, flash, 1t. nor"):
        resolve_model("large")
    with pytest.raises(InputError, match="which has no weights"):
        load_model("tiny")
    assert resolve_model("1t") == (LingConfig.one_t(), None)


@pytest.mark.parametrize("arguments, says", [
    (dict(folder=3), "not 3"), (dict(folder=None), "not None"), (dict(folder=b"x"), "not b'x'"),
    (dict(folder="x" * 5000), "xxx is no path"), (dict(folder=Path("tiny")), "tiny is a preset"),
    (dict(dtype="bfloat16"), "dtype is 'bfloat16'"), (dict(dtype=torch.int8), "dtype is torch.int8"),
    (dict(dtype=torch.float8_e4m3fn), "dtype is"), (dict(device="gpu9"), "no device 'gpu9'"),
    (dict(device=[]), "no device"), (dict(device="xpu"), "no device 'xpu'"),
])  # fmt: skip
def test_arguments_of_another_kind_are_refused(arguments, says):
    with pytest.raises(InputError, match=says) as error:
        load_model(**dict(folder=DATA / "base") | arguments)
    assert len(str(error.value).splitlines()) == 1


def test_a_folder_with_two_checkpoints_is_refused(tmp_path):
    """transformers would read the single file, others the shards. An index may name the single file."""
    model = load_model(DATA / "base")
    save_model(model, tmp_path, max_shard_bytes=100_000)
    shutil.copy(DATA / "base/model.safetensors", tmp_path)
    with pytest.raises(InputError, match="remove the one that is out of date"):
        load_model(tmp_path)
    keys = load_file(tmp_path / "model.safetensors")
    index = json.dumps({"weight_map": dict.fromkeys(keys, "model.safetensors")})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    assert same(dict(named_views(load_model(tmp_path))), dict(named_views(model)))


def test_tensors_that_the_index_does_not_name_are_seen(tmp_path):
    save_model(load_model(DATA / "base"), tmp_path, max_shard_bytes=100_000)
    shard = sorted(tmp_path.glob("model-*"))[0]
    tensors = load_file(shard)
    save_file(tensors | {"extra": torch.ones(1)}, shard)
    with pytest.warns(UserWarning, match="1 tensors are not used, the first is extra"):
        load_model(tmp_path)
    save_file(tensors | {f"{[*tensors][0]}_scale": torch.ones(1)}, shard)
    with pytest.raises(InputError, match="_scale is not used"):
        load_model(tmp_path)


def test_unused_tensors_warn(tmp_path):
    folder = Path(shutil.copytree(DATA / "base", tmp_path / "model"))
    save_file(load_file(folder / "model.safetensors") | {"extra": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.warns(UserWarning, match="1 tensors are not used, the first is extra"):
        load_model(folder)


PROJECTION, NORM = "model.layers.0.mlp.down_proj.weight", "model.norm.weight"  # [64, 96], [64]
BIAS = "model.layers.1.mlp.gate.expert_bias"
KINDS = [torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.int8, torch.uint8, torch.int16,
         torch.int32, torch.int64, torch.bool]  # fmt: skip
SCALE = torch.ones(1, 1)


@pytest.fixture
def edited(tmp_path):
    """edited(tensors) -> a copy of the base checkpoint with these tensors added or replaced."""

    def copy(tensors: dict) -> Path:
        folder = Path(shutil.copytree(DATA / "base", tmp_path / "model"))
        save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors")
        return folder

    return copy


@pytest.mark.parametrize("scale", [None, "_scale_inv", "_scale"])
@pytest.mark.parametrize("key, shape", [(PROJECTION, (64, 96)), (NORM, (64,)), (BIAS, (16,))])
@pytest.mark.parametrize("kind", [*KINDS, torch.float8_e4m3fn], ids=str)
def test_weights_of_types_without_a_rule_are_refused(edited, kind, key, shape, scale):
    """Their values mean nothing without the scale of their own format."""
    if kind == torch.float8_e4m3fn and key == PROJECTION and scale == "_scale_inv":
        assert load_model(edited({key: torch.ones(shape).to(kind), key + scale: SCALE}))
        return
    tensors = {key: torch.ones(shape).to(kind)} | ({} if scale is None else {key + scale: SCALE})
    with pytest.raises(InputError, match=f"model.safetensors: {key}") as refused:
        load_model(edited(tensors))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_float_weights_of_other_types_are_converted(edited, kind):
    w = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)).to(kind)
    model = load_model(edited({PROJECTION: w}), dtype=torch.float32)
    assert torch.equal(dict(named_views(model))[PROJECTION], w.float())


@pytest.mark.parametrize("key", [
    PROJECTION + "_scale_inv", PROJECTION + "_scale", NORM + "_scale_inv", BIAS + "_scale",
    *(f"model.layers.0.mlp.down_proj.{name}" for name in ("bias", "scales", "input_scale", "zero_point", "g_idx")),
    "model.layers.0.attention.k_scale", "model.layers.1.mlp.experts.down_scale", "lm_head.bias", "model.norm.bias",
    "model.layers.1.mlp.gate.e_score_correction_bias",
])  # fmt: skip
def test_unused_tensors_that_belong_to_a_weight_are_refused(edited, key):
    with pytest.raises(InputError, match=f"model.safetensors: {key} is not used"):
        load_model(edited({key: SCALE}))


def test_unused_layers_with_their_scales_warn(edited):
    """An FP8 checkpoint with an MTP layer that config.json leaves out."""
    extra = {"model.layers.2.mlp.down_proj.weight": torch.ones(64, 96).to(torch.float8_e4m3fn)}
    with pytest.warns(UserWarning, match="2 tensors are not used"):
        load_model(edited(extra | {"model.layers.2.mlp.down_proj.weight_scale_inv": SCALE}))


@pytest.mark.parametrize("scale", [
    torch.ones(1, 1, dtype=torch.int32), torch.full((1, 1), torch.nan), torch.ones(1), torch.ones(()), torch.ones(2, 1),
], ids=["integer", "nan", "1-D", "0-D", "2 blocks"])  # fmt: skip
def test_scales_that_cannot_be_meant_are_refused(edited, scale):
    q = torch.ones(64, 96).to(torch.float8_e4m3fn)
    with pytest.raises(InputError, match=f"{PROJECTION}_scale_inv is"):
        load_model(edited({PROJECTION: q, PROJECTION + "_scale_inv": scale}))


@pytest.mark.parametrize("kind", ["F4", "F6_E2M3", "X9"])
def test_types_that_torch_lacks_are_refused(edited, kind):
    folder = edited({})
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[PROJECTION]["dtype"] = kind
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(InputError, match="model.safetensors"):
        load_model(folder)


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the checkpoint to"):
        save_model(load_model(DATA / "base"), tmp_path / "file" / "model")


def test_a_failed_save_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    """The disk becomes full while saving."""
    import safetensors.torch

    model = load_model(DATA / "base")
    save_model(model, tmp_path)

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half of it")
        raise OSError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(InputError, match="No space left"):
        save_model(model, tmp_path)
    assert same(dict(named_views(load_model(tmp_path))), dict(named_views(model)))


def test_loading_is_streamed(tmp_path):
    """Peak memory is the model and one shard above the baseline of the process."""
    code = """
import dataclasses, resource, sys, torch
from ling_kernels.model import Ling, LingConfig, load_model, save_model
sizes = dict(hidden_size=512, vocab_size=8192, num_experts=64, moe_intermediate_size=256)
config = dataclasses.replace(LingConfig.tiny(), **sizes)
if sys.argv[1] == "save":
    model = Ling(config).to(torch.bfloat16)
    save_model(model, sys.argv[2], max_shard_bytes=32 << 20)
else:
    load_model(f"{sys.argv[2]}/small")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = load_model(sys.argv[2])
    size = sum(p.nbytes for p in model.parameters()) >> 10
    print(size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    subprocess.run([sys.executable, "-c", code, "save", tmp_path], check=True)
    shutil.copytree(DATA / "base", tmp_path / "small")
    size, growth = map(int, subprocess.check_output([sys.executable, "-c", code, "load", tmp_path]).split())
    assert size > 150_000 and growth < size + (48 << 10)


@pytest.mark.parametrize("fp8", [False, True])
def test_progress_of_loading(checkpoint_of_whole_blocks, fp8):
    """It grows with each weight, up to the bytes of the model."""
    calls = []
    model = load_model(checkpoint_of_whole_blocks, fp8=fp8, progress=lambda *counts: calls.append(counts))
    size = sum(view.nbytes for _, view in named_views(model))
    loaded = [done for done, _ in calls]
    assert loaded == sorted({*loaded}) and calls[-1] == (size, size) and len(calls) > 50
    assert {total for _, total in calls} == {size} and loaded[0] < size / 2


@pytest.fixture(scope="module")
def checkpoint_of_whole_blocks(tmp_path_factory):
    """A checkpoint whose sizes are multiples of 128, in bf16."""
    config = dataclasses.replace(LingConfig.tiny(), head_dim=64, intermediate_size=256, moe_intermediate_size=128,
                                 num_hidden_layers=2, vocab_size=384)  # fmt: skip
    model = Ling(config)
    model.init_weights(torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("whole")
    save_model(model, folder)
    return folder


@pytest.mark.parametrize("head", [False, True])
def test_fp8_only_weights(checkpoint_of_whole_blocks, head, tmp_path):
    """Quantising while loading gives the same bits as quantising in each forward, also after saving and loading."""
    wide = load_model(checkpoint_of_whole_blocks)
    converted, skipped = to_fp8(wide)
    if head:
        wide.lm_head = Fp8Linear.of(wide.lm_head)
    assert converted and not skipped
    frozen = load_model(checkpoint_of_whole_blocks, fp8=True, fp8_head=head)
    ids = torch.randint(0, 384, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        want = wide(ids).logits
        assert torch.equal(frozen(ids).logits, want)
    wide_weights = sum(p.numel() for p in frozen.parameters() if p.ndim > 1 and p.dtype != torch.float8_e4m3fn)
    routers = sum(r.weight.numel() for r in frozen.routers())
    assert wide_weights == 384 * 128 * (2 - head) + 128 * 256 + routers, "embedding, head, MTP projection, routers"
    save_model(frozen, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]
    size = sum(f.stat().st_size for f in tmp_path.glob("*.safetensors"))
    assert size < 0.7 * sum(f.stat().st_size for f in checkpoint_of_whole_blocks.glob("*.safetensors"))
    reloaded, dequantised = load_model(tmp_path, fp8=True, fp8_head=head), load_model(tmp_path, dtype=torch.float32)
    assert same(dict(named_views(reloaded)), dict(named_views(frozen)))
    with torch.inference_mode():
        assert torch.equal(reloaded(ids).logits, want)
        near = dequantised(ids).logits
    assert 0 < (near - want).norm() < 0.1 * want.norm()


def test_sizes_that_are_not_multiples_of_128_stay_wide():
    model = load_model(DATA / "base", fp8=True, fp8_head=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("name", ["vocab_size", "intermediate_size", "num_experts", "moe_intermediate_size"])
def test_a_configuration_of_another_size_is_refused_before_memory_is_allocated(name, tmp_path):
    shutil.copytree(DATA / "base", tmp_path / "x")
    file = tmp_path / "x/config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: 1 << 30}))
    with pytest.raises(InputError, match="by config.json it should be|the checkpoint has no"):
        load_model(tmp_path / "x")
