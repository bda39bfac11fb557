"""FP8 in a whole model: which layers it replaces, the bytes they keep, and training losses close to bf16's."""

# ruff: noqa: F811 (fixtures are imported)
import json
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from ling_kernels.backend import force
from ling_kernels.model import Ling, LingConfig, save_model
from ling_kernels.model.transformer import Layer
from ling_kernels.nn import BatchLayout, Fp8Experts, Fp8Linear, Fp8MLP
from ling_kernels.nn.fp8 import RECOMPUTE, to_fp8
from ling_kernels.ops.rope_tables import rope_tables
from ling_kernels.plan.train import FP8_BYTES, padding_bytes
from ling_kernels.train.__main__ import main
from tests.training import one_line_error, small, text, train  # noqa: F401

WHOLE = replace(
    LingConfig.tiny(), intermediate_size=128, num_hidden_layers=2, num_experts=8, num_experts_per_tok=2, n_group=2,
    topk_group=1, moe_intermediate_size=128, max_position_embeddings=128,
)  # fmt: skip


def kept_bytes(c: LingConfig, precision: str = "fp8", recompute: str = "none", wgrad: str = "fp8") -> dict[str, float]:
    """{part: bytes} that a MoE layer keeps of one token's forward for the backward, with bf16 activations.

    A tensor that several operations keep counts once, where it is kept first: the router keeps the input of experts and
    shared expert. Not included is what does not grow with the tokens: FP8 weights and padding (`padding_bytes`).
    """
    H, D, k = c.hidden_size, c.head_dim, c.num_experts_per_tok
    F, Fs = k * c.moe_intermediate_size, c.num_shared_experts * c.moe_intermediate_size
    if recompute == "full":
        return {"layer's input": 2 * H}
    heads, all_heads = c.num_attention_heads * D, (c.num_attention_heads + 2 * c.num_key_value_heads) * D
    fp8 = precision == "fp8"
    columns, recomputes_norm = fp8 and wgrad == "fp8", recompute in ("norm_act", "experts")
    parts = {
        "norms": 2 * (2 * H + 4) - 4 * recomputes_norm,  # their inputs, and one over the root mean square
        "qkv": 0 if recomputes_norm else FP8_BYTES * H if columns else 2 * H,
        "attention": 2 * all_heads + 2 * heads + 4 * c.num_attention_heads,  # q, k, v; output; log-sum-exp
        "attention output": FP8_BYTES * heads if columns else 0,  # in bf16 it is the attention's own
        "router": 2 * H + 4 * c.num_experts + 4 * k,  # input, logits, choices
        "plan": (3 if fp8 else 2) * 4 * k,  # slot, weights, and FP8's source
    }
    keep = columns and recompute == "none"
    if not fp8:
        parts |= {"experts": 2 * H * k + 3 * 2 * F + 2 * H * k, "shared expert": 3 * 2 * Fs}  # in, h, SwiGLU, out
    else:
        h = 0 if recompute == "experts" else 4
        parts["experts"] = h * F + (FP8_BYTES * (k * H + F) if keep else 0)
        parts["shared expert"] = 4 * Fs + (FP8_BYTES * (H + Fs) if keep else 0)
    return parts


def kept_by_layer(c, T, precision, recompute, wgrad):
    """Bytes that a MoE layer's graph holds on fake tensors, without parameters and tensors that all layers share."""
    kept = {}

    def pack(t):
        if (key := t.untyped_storage()._cdata) not in shared:
            kept[key] = t.untyped_storage()
        return t

    with FakeTensorMode(), force("triton"):
        layer = Layer(c, dense=False)
        for p in layer.parameters():
            p.data = p.data.bfloat16()
        if precision == "fp8":
            to_fp8(layer, recompute, wgrad=wgrad)
        layer.recompute = recompute == "full"
        tables = rope_tables(T, c.rotary_dim, c.rope_theta)
        rows = BatchLayout(*tables, torch.arange(T), torch.zeros(2, dtype=torch.int32))
        shared = {t.untyped_storage()._cdata for t in [*layer.parameters(), *layer.buffers(), *rows[:4]]}
        x = torch.randn(T, c.hidden_size, dtype=torch.bfloat16, requires_grad=True)
        with saved_tensors_hooks(pack, lambda t: t):
            y = layer(x, rows)
        assert y[0].requires_grad
        return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("preset", ["mini", "flash", "1t"])
def test_bytes_kept_are_as_predicted(preset):
    c, T = LingConfig.preset(preset), 4096
    heads, moe = c.num_attention_heads + 2 * c.num_key_value_heads, c.moe_intermediate_size * (c.num_experts + 1)
    weights = c.hidden_size * ((heads + c.num_attention_heads) * c.head_dim + 3 * moe)
    offsets = 4 * (c.num_experts + 1)
    for case in [("bf16", "none", "fp8"), *(("fp8", r, "fp8") for r in RECOMPUTE), ("fp8", "none", "bf16")]:
        want = T * sum(kept_bytes(c, *case).values())
        if case[1] != "full":
            want += weights * (1 + 4 / 128**2) + 2 * offsets if case[0] == "fp8" else offsets
            want += padding_bytes(c, c.num_experts_per_tok * T, *case[1:]) if case[0] == "fp8" else 0
        assert kept_by_layer(c, T, *case) == want, case


def test_which_layers():
    model = Ling(WHOLE)
    names = [n for n, _ in model.named_parameters()]
    weights = [p.data_ptr() for p in model.parameters()]
    made, left = to_fp8(model)
    kinds = [type(m) for m in model.modules()]
    assert not left and len(made) == 3 * 2 + 1 + 2 * 2 and "layers.0.attention.query_key_value 256x128" in made
    assert [kinds.count(k) for k in (Fp8Linear, Fp8MLP, Fp8Experts)] == [6, 3, 2]
    assert [n for n, _ in model.named_parameters()] == names
    assert [p.data_ptr() for p in model.parameters()] == weights
    assert type(model.lm_head) is type(model.mtp[0].eh_proj) is torch.nn.Linear
    made, left = to_fp8(Ling(LingConfig.tiny()))
    assert len(made) == 2 * 5 + 1 and len(left) == 2 * 4
    assert "layers.1.mlp.experts 16x128x128, 16x128x64" in left


def test_full_recompute_is_the_same_and_counts_a_token_once():
    seen = []
    for full in (False, True):
        model = Ling(WHOLE)
        model.init_weights(torch.Generator().manual_seed(0))
        to_fp8(model)
        if full:
            model.recompute_()
        ids = torch.arange(40).view(2, 20)
        model(ids, labels=ids, logits=False, z_loss=1e-3).loss.backward()
        seen.append([model.expert_counts(), *(p.grad for p in model.parameters())])
    assert seen[0][0].sum() == 2 * 2 * 40
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
def test_activation_checkpointing_by_the_user_counts_a_token_once(use_reentrant, fp8):
    """Alone, nested, and beside saved-tensor hooks of the user's own."""
    moe = Layer(WHOLE, dense=False).mlp
    if fp8:
        to_fp8(moe)
    twice = partial(checkpoint, moe, use_reentrant=use_reentrant)

    def hooked(x):
        with saved_tensors_hooks(lambda t: t, lambda t: t):
            return moe(x)

    for forward in (
        moe, twice, partial(checkpoint, twice, use_reentrant=use_reentrant),
        *([] if use_reentrant else [partial(checkpoint, hooked, use_reentrant=False)]),
    ):  # fmt: skip
        moe.router.counts.zero_()
        x = torch.randn(20, WHOLE.hidden_size).requires_grad_()
        for _ in range(2):
            forward(x)[0].sum().backward()
        assert moe.router.counts.sum() == 2 * 20 * WHOLE.num_experts_per_tok
    moe.router.counts.zero_()
    moe(x)  # without a backward
    assert moe.router.counts.sum() == 20 * WHOLE.num_experts_per_tok


@pytest.mark.parametrize("wgrad", ["fp8", "bf16"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_recomputed_norm(backend, wgrad):
    torch.manual_seed(0)
    x, cu = torch.randn(40, 128), torch.tensor([0, 40], dtype=torch.int32)
    rows = BatchLayout(*rope_tables(40, WHOLE.rotary_dim, 1e4), torch.arange(40), cu)
    seen = []
    for recompute in ("none", "norm_act"):
        torch.manual_seed(1)
        layer = Layer(WHOLE, dense=True)
        torch.nn.init.normal_(layer.input_layernorm.weight)
        to_fp8(layer.attention, recompute, wgrad=wgrad)
        kept, given = [], x.clone().requires_grad_()
        with force(backend), saved_tensors_hooks(lambda t, kept=kept: kept.append(t.dtype) or t, lambda t: t):
            y, _ = layer(given, rows)
            y.square().sum().backward()
        seen.append([y.detach(), given.grad, *(p.grad for p in layer.parameters())])
        columns = 2 if wgrad == "fp8" else 0
        assert kept.count(torch.float8_e4m3fn) == 2 + columns - (columns > 0 and recompute == "norm_act")
    for a, b in zip(*seen, strict=True):
        if backend == "triton":
            assert torch.equal(a, b)
        else:  # it sums the gradient of a norm's input in another order
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize("transposed", ["direct", "kept"])
def test_fsdp2(tmp_path, transposed):
    """Sharded over one process: equal losses, also after the optimizer has updated the shards."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        losses = []
        for sharded in (False, True):
            model = Ling(WHOLE)
            model.init_weights(torch.Generator().manual_seed(0))
            to_fp8(model, transposed=transposed if sharded else "direct")
            for module in [*model.layers, *model.mtp, model] if sharded else []:
                fully_shard(module, mesh=mesh)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            losses += train(model, optimizer, 3)
        assert losses[2] < losses[0] - 1 and losses[3:] == pytest.approx(losses[:3], rel=1e-5)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model directory whose sizes are multiples of 128."""
    folder = tmp_path_factory.mktemp("whole")
    model = Ling(WHOLE)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, folder, dtype=torch.float32)
    return folder


def metrics_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def training(whole, text, run, *more):
    argv = f"--model {whole} --data {text} --out {run} --steps 16 --seq-len 64 --batch 4 --warmup 2 --lr 1e-3"
    options = f"--eval-rows 4 --threads 1 --sample-tokens 4 {' '.join(more)}"
    assert main([*argv.split(), *options.split()]) == 0
    return metrics_of(run)


def test_fp8_trains_as_bf16_does(tmp_path, whole, text, capsys):
    bf16 = training(whole, text, tmp_path / "bf16", "--precision", "bf16", "--save-every", "8")
    capsys.readouterr()
    fp8 = training(whole, text, tmp_path / "fp8", "--precision", "fp8")
    assert "fp8        11 of 11 layers\n" in capsys.readouterr().out
    assert fp8[-1]["loss"] < 0.8 * fp8[0]["loss"]
    assert [m["loss"] for m in fp8] != [m["loss"] for m in bf16]
    for a, b in zip(fp8, bf16, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.01)
    assert fp8[-1]["val_loss"] == pytest.approx(bf16[-1]["val_loss"], rel=0.01)

    for flags in ("--recompute experts", "--recompute full", "--fp8-transposed kept"):
        metrics = training(whole, text, tmp_path / flags.split()[-1], "--precision fp8", flags)
        bound = 0.01 if "experts" in flags else 0  # it sums a norm's gradients in another order
        assert [m["loss"] for m in metrics] == pytest.approx([m["loss"] for m in fp8], rel=bound, abs=0)

    half = tmp_path / "bf16" / "checkpoints" / "step-000008"  # continued in FP8
    assert main(["--resume", str(half), "--precision", "fp8", "--threads", "1"]) == 0
    assert metrics_of(tmp_path / "bf16")[-1]["loss"] == pytest.approx(bf16[-1]["loss"], rel=0.01)


def test_layers_that_stay_in_bf16_are_reported(tmp_path, small, text, capsys):
    argv = f"--model {small} --data {text} --out {tmp_path / 'run'} --steps 1 --seq-len 32 --precision fp8"
    assert main([*argv.split(), "--sample-tokens", "0", "--threads", "1"]) == 0
    output = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("fp8"))
    assert "0 of 11 layers" in output and "layers.*.mlp.experts 8x32x32, 8x32x16" in output and "128" in output


def test_recompute_of_parts_needs_fp8(tmp_path, small, text, capsys):
    argv = f"--model {small} --data {text} --out {tmp_path / 'run'} --seq-len 32 --recompute norm_act --precision bf16"
    assert "--precision fp8" in one_line_error(argv.split(), capsys)
