"""Checkpoints to torch.distributed.checkpoint and back, from official and Megatron-core's names too: the same bits."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

from ling_kernels.model import Ling, load_model, named_views, save_model
from ling_kernels.train.convert import main, to_dcp
from ling_kernels.train.dcp_names import megatron_names
from tests.ranks import run
from tests.test_distributed_checkpoints import CONFIG, Run, ranks_of
from tests.training import one_line_main, whole_tensors


def save_by_two(folder, rank, group):
    Run(ranks_of(rank, 2, ep=2, vocab=2), "adamw8bit").save(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of two processes, with the optimizer's tensors in parts."""
    folder = tmp_path_factory.mktemp("run")
    run(folder, [partial(save_by_two, folder)], 2)
    return folder / "checkpoints" / "step-000001"


def same(a, b, stem="model"):
    x, y = whole_tensors(a, stem), whole_tensors(b, stem)
    assert x.keys() == y.keys()
    for name in x:
        assert x[name].dtype == y[name].dtype and torch.equal(x[name], y[name]), name


def test_there_and_back(checkpoint, tmp_path, capsys):
    assert main(["to-dcp", str(checkpoint), str(tmp_path / "dcp")]) == 0
    model = Ling(CONFIG)
    state = model.state_dict()
    dcp.load(state, checkpoint_id=tmp_path / "dcp", no_dist=True)  # as a loop over torch's own API does
    for a, b in zip(model.parameters(), load_model(checkpoint, dtype=torch.float32).parameters(), strict=True):
        assert torch.equal(a, b)
    assert main(["from-dcp", *(str(tmp_path / name) for name in ("dcp", "back")), "--model", str(checkpoint)]) == 0
    same(checkpoint, tmp_path / "back")
    same(checkpoint, tmp_path / "back", "optimizer")
    assert capsys.readouterr().out.count("parameters") == 2


def test_torch_reads_a_checkpoint_as_it_is(checkpoint):
    """By its reader of published folders, which torchtitan's --checkpoint.initial_load_in_hf takes."""
    whole = whole_tensors(checkpoint, "model")
    read = {key: torch.empty_like(t) for key, t in whole.items()}
    dcp.load(read, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)), no_dist=True)
    assert all(torch.equal(t, read[key]) for key, t in whole.items())


@pytest.mark.parametrize("shard_bytes", [10 << 30, 200_000])
def test_torch_reads_fp8_weights(tmp_path, shard_bytes):
    """By its reader of DeepSeek's format, which finds scales by the index: code times its block's scale, in fp32."""
    sizes = dict(hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_attention_heads=2, head_dim=128)
    model = Ling(replace(CONFIG, **sizes))
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, tmp_path / "wide")
    save_model(load_model(tmp_path / "wide", fp8=True), folder := tmp_path / "fp8", max_shard_bytes=shard_bytes)
    files = list(folder.glob("*.safetensors"))
    assert (len(files) == 1) == (shard_bytes > 1 << 30)
    stored = {k: t for file in files for k, t in load_file(file).items()}
    want = {k: t for k, t in stored.items() if not k.endswith("_scale_inv")}
    for key in [k for k, t in want.items() if t.dtype == torch.float8_e4m3fn]:
        scale = stored[f"{key}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        want[key] = want[key].float() * scale[: want[key].shape[0], : want[key].shape[1]]
    read = {k: torch.full_like(t, torch.nan) for k, t in want.items()}
    dcp.load(read, storage_reader=QuantizedHuggingFaceStorageReader(str(folder)), no_dist=True)
    assert len(stored) - len(want) > 10 and all(torch.equal(t, read[k]) for k, t in want.items())
    loaded = dict(named_views(load_model(folder, dtype=torch.float32)))
    assert loaded.keys() == want.keys() and all(torch.equal(t, want[k].float()) for k, t in loaded.items())


def megatron(config, model) -> dict[str, torch.Tensor]:
    """The model under Megatron-core's names, the vocabulary filled up, the heads of a key together."""
    heads, groups, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    found = {}
    for name, t in model.state_dict().items():
        if name.endswith("query_key_value.weight"):
            q, k, v = t.split([heads * D, groups * D, groups * D])
            t = torch.cat([x.view(groups, -1, t.shape[1]) for x in (q, k, v)], 1).reshape(t.shape)
        elif len(t) == config.vocab_size:
            t = torch.cat([t, torch.randn(32, t.shape[1])])
        dense = name.startswith("layers.0.") and "post_attention" in name
        found[megatron_names(name)[dense]] = t
    return found


def test_from_official_and_megatron_names(tmp_path):
    config = replace(CONFIG, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    model = Ling(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in (*model.parameters(), *(r.expert_bias for r in model.routers())):
            t.normal_()
    config.to_json(tmp_path / "config.json", fp8=False, dtype=torch.float32)
    for name, state in (("official", dict(named_views(model))), ("megatron", megatron(config, model))):
        state = {key: t.detach().contiguous() for key, t in state.items()}
        dcp.save(state | {"args": "x"}, checkpoint_id=tmp_path / name, no_dist=True)
        out = str(tmp_path / f"{name} model")
        assert main(["from-dcp", str(tmp_path / name), out, "--model", str(tmp_path / "config.json")]) == 0
        loaded = load_model(out, dtype=torch.float32).state_dict()
        assert all(torch.equal(t, loaded[key]) for key, t in model.state_dict().items())


def test_errors(checkpoint, tmp_path, capsys):
    to_dcp(checkpoint, tmp_path / "dcp")
    argv = ["from-dcp", str(tmp_path / "dcp"), str(tmp_path / "out"), "--model"]
    assert "exists; it is not overwritten" in one_line_main(main, ["to-dcp", str(checkpoint), str(tmp_path)], capsys)
    assert "has no layers.2" in one_line_main(main, [*argv, "tiny"], capsys)
    replace(CONFIG, vocab_size=128).to_json(tmp_path / "config.json", fp8=False, dtype=torch.float32)
    error = one_line_main(main, [*argv, str(tmp_path / "config.json")], capsys)
    assert "word_embeddings.weight is [64, 32], by the model it should be [128, 32]" in error
    (tmp_path / "empty").mkdir()
    argv[1] = str(tmp_path / "empty")
    assert "is no folder of torch.distributed.checkpoint" in one_line_main(main, [*argv, "tiny"], capsys)
    assert not (tmp_path / "out").exists() and not [*tmp_path.glob(".*")]
