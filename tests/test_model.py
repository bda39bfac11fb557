"""Parity with the official model (tests/data has its fp32 results for three tiny checkpoints), and the presets."""

import copy
import dataclasses
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy, pad

from ling_kernels.backend import force
from ling_kernels.model import Ling, LingConfig, load_model, named_views
from tests.cases import DEVICE, runs

DATA = Path(__file__).parent / "data"
NAMES = ["base", "mtp1", "yarn"]


@cache
def expected(name):
    return load_file(DATA / name / "expected.safetensors")


def load(name) -> Ling:
    return load_model(DATA / name, dtype=torch.float32)


def near(got, want, tolerance=1e-4):
    """The tolerance is relative to the largest element: after cancellation a small element has no correct digits."""
    assert got.shape == want.shape
    assert (got.double() - want.double()).abs().max() <= tolerance * want.double().abs().max()


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def test_logits_and_hidden_states(name):
    want = expected(name)
    with torch.no_grad():
        out = load(name)(want["input_ids"], output_hidden_states=True)
    near(out.logits, want["logits"])
    assert f"hidden.{len(out.hidden_states)}" not in want and out.loss is None
    for i, h in enumerate(out.hidden_states[1:], 1):
        near(h, want[f"hidden.{i}"])
    if "mtp_logits" in want:
        near(out.mtp_logits, want["mtp_logits"][None])
    else:
        assert out.mtp_logits is None


def test_routing(name):
    """Experts and counts are equal, weights within the tolerance, in every MoE layer."""
    want, model, outputs = expected(name), load(name), []
    for router in model.routers():
        router.register_forward_hook(lambda _, args, out: outputs.append(out))
    model(want["input_ids"])
    keys = sorted(k.removesuffix(".idx") for k in want if k.startswith("route.") and k.endswith(".idx"))
    assert len(keys) == len(outputs) > 0
    for key, (weights, experts, counts, _) in zip(keys, outputs, strict=True):
        order = experts.argsort(-1)
        want_experts = want[f"{key}.idx"].flatten(0, -2)
        assert torch.equal(experts.gather(1, order).long(), want_experts)
        near(weights.gather(1, order), want[f"{key}.weight"].flatten(0, -2))
        assert torch.equal(counts.long(), want_experts.flatten().bincount(minlength=len(counts)))


def grads_of(model, loss):
    """{official key: gradient} of the loss; 0 for unused parameters."""
    loss.backward()
    gradients = copy.deepcopy(model)
    with torch.no_grad():
        for p, q in zip(gradients.parameters(), model.parameters(), strict=True):
            p.copy_(torch.zeros_like(q) if q.grad is None else q.grad)
        return dict(named_views(gradients))


def official_mtp_loss(out, labels):
    """The official code shifts by one over the flattened batch: a row's last position learns from the next row."""
    losses = []
    for k, logits in enumerate(out.mtp_logits, 1):
        in_row = pad(labels[:, k:], (0, k), value=-100).flatten()
        losses.append(cross_entropy(logits.flatten(0, 1), pad(in_row[1:], (0, 1), value=-100)))
    return torch.stack(losses).mean()


def official_loss(model, out, labels):
    if out.mtp_logits is None:
        return out.loss
    return out.main_loss + model.config.mtp_loss_scaling_factor * official_mtp_loss(out, labels)


def test_losses_and_gradients_equal_the_official_code(name):
    want = expected(name)
    model = load(name).train()
    out = model(want["input_ids"], want["labels"])
    loss = official_loss(model, out, want["labels"])
    near(loss, want["loss.total"])
    near(out.main_loss, want["loss.main"])
    if "loss.mtp_hf" in want:
        near(official_mtp_loss(out, want["labels"]), want["loss.mtp_hf"])
    grads = grads_of(model, loss)
    check_gradients(name, grads, "gradstat")
    for key, grad in want.items():
        if key.startswith("grad."):
            near(grads[key.removeprefix("grad.")], grad)


def check_gradients(name, grads, key):
    """Norm, sum and largest element of every parameter's gradient."""
    with safe_open(DATA / name / "expected.safetensors", "pt") as file:
        rows = file.metadata()["gradstat_rows"].split("\n")
    assert set(rows) <= set(grads)
    for row, (norm, total, largest) in zip(rows, expected(name)[key].double(), strict=True):
        g = grads[row].double()
        assert (g.norm() - norm).abs() <= 1e-4 * norm, row
        assert (g.abs().max() - largest).abs() <= 1e-4 * largest, row
        assert (g.sum() - total).abs() <= 1e-4 * norm * g.numel() ** 0.5, row


@pytest.mark.parametrize("logits", [True, False])
def test_mtp_loss_within_rows(logits):
    """Unlike in the official code, no row learns from the next one."""
    want = expected("mtp1")
    model = load("mtp1").train()
    out = model(want["input_ids"], want["labels"], logits=logits)
    near(out.mtp_loss, want["loss.mtp_clean"])
    near(out.loss, want["loss.total_clean"])
    check_gradients("mtp1", grads_of(model, out.loss), "gradstat_clean")


def test_mtp_loss_does_not_leak_across_rows():
    """The official one does."""
    want, model = expected("mtp1"), load("mtp1")
    ids, other = want["input_ids"], want["input_ids"].clone()
    other[1, 1] = (other[1, 1] + 1) % model.config.vocab_size  # must not change row 0's loss
    labels = torch.full_like(ids, -100)
    labels[0] = ids[0]
    labels_other = labels.clone()
    labels[1, 1], labels_other[1, 1] = ids[1, 1], other[1, 1]
    outs = [model(ids, y) for y in (labels, labels_other)]
    official = [official_mtp_loss(out, y) for out, y in zip(outs, (labels, labels_other), strict=True)]
    assert torch.equal(outs[0].mtp_loss, outs[1].mtp_loss) and not torch.equal(*official)


def test_greedy_generation(name):
    want, model = expected(name), load(name)
    prompt, greedy = want["generate.prompt"], want["generate.greedy"]
    out = model.generate(prompt, max_new_tokens=greedy.shape[1] - prompt.shape[1])
    assert torch.equal(out, greedy)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_the_output(name, side):
    want, model = expected(name), load(name)
    ids, mask = want["leftpad.input_ids"], want["leftpad.mask"]
    near(model(ids, attention_mask=mask).logits[:, -1], want["leftpad.logits_last"])
    long, short = want["generate.prompt"][1:], ids[:, 3:]
    padding = torch.zeros(1, long.shape[1] - short.shape[1], dtype=torch.long)
    parts = [padding, short] if side == "left" else [short, padding]
    both = torch.cat([long, torch.cat(parts, 1)])
    both_mask = torch.cat([torch.ones_like(long), torch.cat([(p is short) * torch.ones_like(p) for p in parts], 1)])
    new = model.generate(both, max_new_tokens=8, attention_mask=both_mask)[:, both.shape[1] :]
    assert torch.equal(new[:1], model.generate(long, max_new_tokens=8)[:, long.shape[1] :])
    assert torch.equal(new[1:], model.generate(short, max_new_tokens=8)[:, short.shape[1] :])


def test_generation_across_cache_pages_equals_generation_without_cache():
    model = Ling(LingConfig.tiny()).eval()
    model.init_weights(torch.Generator().manual_seed(0))
    ids = torch.randint(0, 256, (1, 60), generator=torch.Generator().manual_seed(1))
    got = model.generate(ids, max_new_tokens=10)
    for _ in range(10):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(got, ids)


def test_a_finished_sequence_repeats_its_end_token():
    want, model = expected("base"), load("base")
    prompt, greedy = want["generate.prompt"], want["generate.greedy"]
    L = prompt.shape[1]
    eos = greedy[0, L + 3].item()
    out = model.generate(prompt, max_new_tokens=12, eos_token_id=eos)
    first = greedy[0, L:].tolist().index(eos)
    assert torch.equal(out[0, : L + first + 1], greedy[0, : L + first + 1]) and (out[0, L + first :] == eos).all()


def test_packed_documents_equal_separate_documents():
    """Logits, losses and gradients: neither attention nor MTP crosses a document boundary."""
    model = load("mtp1").train()
    g = torch.Generator().manual_seed(0)
    docs = [torch.randint(2, 128, (1, n), generator=g) for n in (5, 1, 17, 9)]
    ids = torch.cat(docs, 1).view(2, 16)
    cu = torch.tensor([0, 5, 6, 23, 32], dtype=torch.int32)
    packed = model(ids, ids, cu_seqlens=cu)
    packed.loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    separate = [model(d, d) for d in docs]
    near(packed.logits.flatten(0, 1), torch.cat([o.logits[0] for o in separate]), 1e-6)
    near(packed.mtp_logits.flatten(1, 2), torch.cat([o.mtp_logits[:, 0] for o in separate], 1), 1e-6)
    sizes = torch.tensor([len(d[0]) for d in docs])
    main, mtp = (sizes - 1).clamp(min=0), (sizes - 2).clamp(min=0)
    total = sum(o.main_loss * n for o, n in zip(separate, main, strict=True)) / main.sum()
    total = total + 0.1 * sum(o.mtp_loss * n for o, n in zip(separate, mtp, strict=True)) / mtp.sum()
    near(packed.loss, total, 1e-6)
    total.backward()
    for n, p in model.named_parameters():
        near(p.grad, grads[n], 1e-4)


def test_loss_is_the_same_without_logits():
    want, model = expected("mtp1"), load("mtp1").train()
    outs = [model(want["input_ids"], want["labels"], logits=k, z_loss=0.1) for k in (True, False)]
    assert outs[1].logits is None and outs[0].z_loss > 0
    for field in ("loss", "main_loss", "mtp_loss", "z_loss"):
        near(getattr(outs[1], field), getattr(outs[0], field), 1e-6)


def test_target_counts_make_accumulated_micro_batches_exact():
    want, model = expected("mtp1"), load("mtp1").train()
    ids, labels = want["input_ids"], want["labels"]
    full = model(ids, labels).loss
    n_main, n_mtp = (labels[:, 1:] != -100).sum(), (labels[:, 2:] != -100).sum()
    parts = sum(model(ids[i : i + 1], labels[i : i + 1], target_counts=[n_main, n_mtp]).loss for i in range(2))
    near(parts, full, 1e-6)


SIZES = {  # billions of parameters without MTP, and of active parameters (arXiv 2510.22115, table 1)
    "mini": (16.2556, 1.4330),
    "flash": (102.8897, 6.1523),
    "1t": (999.705, 51.054),
}


@pytest.mark.parametrize("preset", SIZES)
def test_parameter_counts(preset):
    config = LingConfig.preset(preset)
    with torch.device("meta"):
        model = Ling(config)
    total, active = SIZES[preset]
    counted = sum(p.numel() for p in model.parameters())
    assert counted == config.num_parameters()
    assert round(counted / 1e9, 3 if preset == "1t" else 4) == total
    assert round(config.num_active_parameters() / 1e9, 3 if preset == "1t" else 4) == active


def test_parameter_counts_with_mtp():
    for config in (LingConfig.tiny(), dataclasses.replace(LingConfig.mini(), num_nextn_predict_layers=1)):
        with torch.device("meta"):
            model = Ling(config)
        assert sum(p.numel() for p in model.parameters()) == config.num_parameters(mtp=True)
    assert round(config.num_parameters(mtp=True) / 1e9, 3) == 17.083  # the published base checkpoint


def test_expert_bias_and_tables_stay_fp32():
    model = load("base").to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16 and model.cos.dtype == torch.float32
    want = dict(named_views(load("base")))
    for key, view in named_views(model):
        if key.endswith("expert_bias"):
            assert view.dtype == torch.float32 and torch.equal(view, want[key])


@pytest.mark.parametrize("name", ["base", "mtp1"])
def test_bf16_runs(name):
    model = load_model(DATA / name, dtype=torch.bfloat16).train()
    out = model(expected(name)["input_ids"], expected(name)["labels"])
    out.loss.backward()
    near(out.loss, expected(name)["loss.total"], 0.05)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_expert_counts_accumulate_in_training_and_balance_resets_them():
    want, model = expected("base"), load("base")
    model(want["input_ids"])
    assert model.expert_counts().sum() == 0
    model.train()
    for _ in range(2):
        model(want["input_ids"], logits=False)
    counts = model.expert_counts()
    assert counts.shape == (2, 16) and (counts.sum(-1) == 2 * want["input_ids"].numel() * 4).all()
    before = [r.expert_bias.clone() for r in model.routers()]
    model.balance_(0.125)
    assert model.expert_counts().sum() == 0
    for router, b, c in zip(model.routers(), before, counts, strict=True):
        sign = (c.float().mean() - c).sign()
        torch.testing.assert_close(router.expert_bias - b, 0.125 * (sign - sign.mean()), rtol=0, atol=1e-6)


def test_too_long_sequences_raise():
    model = load("base")
    with pytest.raises(ValueError, match="at most 64 positions"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match="64 positions"):
        model.generate(torch.ones(1, 60, dtype=torch.long), max_new_tokens=5)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_empty_batches(shape):
    """No rows or no tokens: a loss of 0, empty logits, and gradients of 0."""
    model, ids = Ling(LingConfig.tiny()), torch.zeros(shape, dtype=torch.int64)
    out = model(ids, labels=ids, z_loss=0.1)
    assert out.logits.shape == (*shape, LingConfig.tiny().vocab_size) and out.loss == 0
    out.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_gradient_of_a_model_in_fp64():
    """Along a random direction, against finite differences; a large bias decides the routing, so that it stays."""
    torch.manual_seed(0)
    # without MTP, whose fill token learns nothing on purpose
    config = dataclasses.replace(LingConfig.tiny(), num_hidden_layers=2, num_nextn_predict_layers=0)
    model, ids = Ling(config).double(), torch.randint(0, 250, (2, 7))
    for router in model.routers():
        router.expert_bias.copy_(torch.randperm(len(router.expert_bias)) * 10.0)

    def loss():
        return model(ids, labels=ids, z_loss=0.1).loss

    loss().backward()
    directions, h = [torch.randn_like(p) for p in model.parameters()], 1e-6
    want = sum((p.grad * d).sum() for p, d in zip(model.parameters(), directions, strict=True) if p.grad is not None)
    ends = []
    with torch.no_grad():
        for step in (h, -2 * h):
            for p, d in zip(model.parameters(), directions, strict=True):
                p += step * d
            ends.append(loss())
    assert (ends[0] - ends[1]) / (2 * h) == pytest.approx(want.item(), rel=1e-6)


@pytest.mark.skipif(not runs("triton"), reason="triton cannot run here")
def test_triton_trains_and_generates_like_torch():
    """Losses of three steps, expert counts and a greedy continuation, with every Triton kernel."""
    sizes = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=32, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32,
                 num_nextn_predict_layers=1, initializer_range=0.2, max_position_embeddings=32)  # fmt: skip
    config = dataclasses.replace(LingConfig.tiny(), **sizes)
    ids = torch.randint(0, 64, (2, 9), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    results = {}
    for backend in ("torch", "triton"):
        model = Ling(config)
        model.init_weights(torch.Generator().manual_seed(0))
        model.to(DEVICE).train()
        optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.1), []
        with force(backend):
            for _ in range(3):
                optimizer.zero_grad()
                out = model(ids, ids, logits=False, z_loss=1e-3)
                out.loss.backward()
                optimizer.step()
                losses.append(out.loss.detach())
            counts = model.expert_counts()
            model.balance_(0.01)
            results[backend] = torch.stack(losses), counts, model.eval().generate(ids[:1], max_new_tokens=3)
    (losses, counts, tokens), (want_losses, want_counts, want_tokens) = results["triton"], results["torch"]
    near(losses, want_losses, 1e-5)
    assert losses[2] < losses[0]
    assert torch.equal(counts, want_counts) and torch.equal(tokens, want_tokens)
