"""Adapters by request: tokens and log-probabilities are those of models with the adapter merged, whatever the batch;
what a pass costs; pages of the cache; adapters that do not fit."""

# ruff: noqa: F811 (a fixture is imported)
import json
import re
from collections import Counter
from functools import cache, partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from ling_kernels.backend import force
from ling_kernels.errors import InputError
from ling_kernels.generate import Engine, Sampling
from ling_kernels.generate.adapters import AdapterFolder, Adapters
from ling_kernels.model import Ling, load_model, named_views, save_model
from ling_kernels.model.sample import SamplingMode
from ling_kernels.nn import MoE, lora_
from ling_kernels.nn.adapter_bank import AdapterBank, AdapterRows, with_banks
from ling_kernels.nn.lora import adapted, adapters
from ling_kernels.ops.dispatch import dispatch_here
from ling_kernels.parallel.adapters import adapted_weights
from tests.cases import DEVICE, runs
from tests.engines import (  # noqa: F401
    NO_STOP,
    NoHostData,
    check,
    drain,
    engine,
    engine_on_fake_tensors,
    make_engine,
    model,
    references,
)
from tests.test_lora import wide
from tests.test_model import load

# name: (published modules, rank, other fields of adapter_config.json). With gate and up apart, and some layers alone.
KIND = {
    "all": (r"query_key_value|dense|gate_proj|up_proj|down_proj", 4, {}),
    "attention": (r"query_key_value|layers\.0\.attention\.dense", 3, dict(lora_alpha=7)),
    "experts": (r"experts\.[1-9]\d*\.(up_proj|down_proj)|layers\.0\.mlp\.gate_proj", 9, dict(use_rslora=True)),
}


def write(folder, base, modules: str, rank: int, seed: int = 0, size: float = 0.1, **fields):
    """Write a random adapter for the modules whose names end with an expression; returns what it adds by key."""
    g = torch.Generator().manual_seed(seed)
    tensors, added = {}, {}
    about = dict(peft_type="LORA", r=rank, lora_alpha=2 * rank) | fields
    scale = about["lora_alpha"] / (rank**0.5 if about.get("use_rslora") else rank)
    for key, w in named_views(base):
        module = key.removesuffix(".weight")
        if w.ndim == 2 and re.search(f"({modules})$", module):
            a, b = (size * torch.randn(*shape, generator=g) for shape in ((rank, w.shape[1]), (w.shape[0], rank)))
            name = f"base_model.model.{module}.lora_"
            tensors |= {f"{name}A.weight": a, f"{name}B.weight": b}
            added[key] = scale * b @ a
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(about))
    return added


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """made(name): folders of adapters of a tiny official model, and the models with them merged."""
    root = tmp_path_factory.mktemp("adapters")

    @cache
    def of(name):
        folders, merged = {}, {None: model(name)}
        for i, (kind, (modules, rank, fields)) in enumerate(KIND.items()):
            folders[kind] = root / name / kind
            added = write(folders[kind], model(name), modules, rank, i, **fields)
            merged[kind] = load(name)
            with torch.no_grad():
                for key, w in named_views(merged[kind]):
                    w += added.get(key, 0)
        return folders, merged

    return of


MIX = [None, "all", "attention", "experts", "all", None, "experts"]


@cache
def alone(merged, prompt, new) -> tuple[list[int], list[float]]:
    """Greedy tokens of a prompt, and their log-probabilities."""
    (r,) = Engine(merged, page_size=4, cache_tokens=400).finish([prompt], max_new_tokens=new, logprobs=0, **NO_STOP)
    return r.new_tokens, [t.logprob for t in r.logprobs]


@pytest.mark.parametrize("name, draft, rows", [("base", 0, 7), ("base", 0, 60), ("base", 2, 60), ("mtp1", 2, 7)])
def test_a_mixed_batch_equals_merged_models(name, draft, rows, engine, made):
    """In chunks and at once, with drafts by lookup and by the MTP layer, which has the adapter too."""
    folders, merged = made(name)
    prompts = [references(name)[i % 2][0] for i in range(len(MIX))]
    e = engine(
        name, adapters=folders, draft=draft, max_rows=max(rows, 2 * (1 + draft)), max_running=2 if rows < 9 else 8
    )
    found = e.finish(prompts, max_new_tokens=8, logprobs=0, adapter=MIX, **NO_STOP)
    drain(e)
    different = set()
    for request, prompt, adapter in zip(found, prompts, MIX, strict=True):
        tokens, logprobs = alone(merged[adapter], tuple(prompt), 8)
        assert request.new_tokens == tokens, adapter
        assert [t.logprob for t in request.logprobs] == pytest.approx(logprobs, abs=2e-4)
        different.add(tuple(tokens))
    assert len(different) == 7, "each adapter changes the tokens of each prompt"


def test_random_tokens_and_preemption(engine, made):
    """The cache holds one and a half sequences."""
    folders, merged = made("base")
    prompts, sampling = [references()[i][0] for i in (0, 1)], [Sampling(1.1, top_k=40, seed=i) for i in (0, 1)]
    kinds, new = ["all", "experts"], 16
    e = engine(adapters=folders, page_size=2, cache_tokens=max(map(len, prompts)) + new + 8)
    found = [e.submit(p, s, new, adapter=k, **NO_STOP) for p, s, k in zip(prompts, sampling, kinds, strict=True)]
    preempted = 0
    while e.step():
        check(e)
        preempted += any(r.new_tokens for r in e.scheduler.waiting)
    drain(e)
    for request, prompt, s, kind in zip(found, prompts, sampling, kinds, strict=True):
        want = Engine(merged[kind], page_size=4, cache_tokens=400).generate(
            [prompt], sampling=s, max_new_tokens=new, **NO_STOP
        )
        assert [request.new_tokens] == want
    assert preempted


def test_pages_of_one_adapter_serve_no_other(engine, made, tmp_path):
    folders, merged = made("base")
    prompt, _ = references()[0]
    e = engine(adapters=folders | {"again": folders["all"]}, page_size=2)
    whole = (len(prompt) - 1) // 2 * 2
    for kind, cached in ((None, 0), ("all", 0), ("experts", 0), ("all", whole), ("again", whole), (None, whole)):
        (r,) = e.finish([prompt], max_new_tokens=12, adapter=kind, **NO_STOP)
        assert r.cached_tokens == cached, kind
        assert r.new_tokens == alone(merged["all" if kind == "again" else kind], tuple(prompt), 12)[0], kind


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def calls(e: Engine, kinds) -> Counter:
    """torch's operations of a decode step of a text with each of the adapters."""
    prompt, _ = references()[0]
    for kind in kinds:
        e.submit(prompt[:3], max_new_tokens=9, adapter=kind, **NO_STOP)
    e.step()
    with Calls() as counted:
        e.step()
    drain(e)
    return counted.names


def test_what_a_pass_costs(made):
    """Nothing without an adapter; with some, two grouped products for each weight that has one, however many."""
    folders, _ = made("base")
    with_some, without = (make_engine(adapters=folders, max_running=4), make_engine(max_running=4))
    assert calls(with_some, [None] * 4) == calls(without, [None] * 4)
    with force("torch"):  # else a CPU takes its loop over groups
        one = calls(make_engine(adapters={"all": folders["all"]}, max_running=4), ["all", "all", "all", None])
        three = calls(with_some, ["all", "attention", "experts", None])
    of_experts = 2 * sum(isinstance(layer.mlp, MoE) for layer in model().layers)
    assert one["grouped_gemm_ref_fwd"] == 2 * len(adapted(model())) + of_experts
    assert one == three


def test_the_model_stays_as_it_is(made):
    folders, _ = made("base")
    m = load("base")
    before = {name: type(module) for name, module in m.named_modules()}
    first, second = Engine(m, adapters={"all": folders["all"]}), Engine(m, adapters=folders)
    prompt, new = references()[0]
    results = [
        e.generate([prompt], max_new_tokens=9, adapter=k, **NO_STOP) for e in (first, second) for k in ("all", None)
    ]
    assert results[0] == results[2] != results[1] == results[3] == [new[:9]]
    assert before == {name: type(module) for name, module in m.named_modules()}
    assert [*m.state_dict()] == [*load("base").state_dict()]


def test_new_weights_keep_the_adapters(made):
    folders, merged = made("base")
    m, other = load("base"), load("base")
    other.init_weights(torch.Generator().manual_seed(5))
    e, prompt = Engine(m, adapters=folders), references()[0][0]
    before = e.score([prompt], adapter="all")
    e.new_weights(other)
    assert e.score([prompt], adapter="all") == Engine(other, adapters=folders).score([prompt], adapter="all") != before


@pytest.mark.skipif(not runs("triton"), reason="Triton cannot run here")
def test_kernels_compute_what_the_reference_does():
    """A linear layer's rows and those of experts, with rows without adapter; more groups than torch's product takes."""
    g = torch.Generator().manual_seed(0)
    n, E, T, K, N = 3, 400, 9, 16, 24
    ids = torch.tensor([2, -1, 0, 0, -1, 1, 2, 0, -1], dtype=torch.int32, device=DEVICE)
    plan = dispatch_here(torch.randint(E, (T, 2), generator=g).to(DEVICE), E)
    random = partial(torch.randn, generator=g)
    x, routed = random(T, K).bfloat16().to(DEVICE), random(2 * T, K).bfloat16().to(DEVICE)
    factors = [random(n, *e, *s).bfloat16().to(DEVICE) for e in ([], [E]) for s in ((8, K), (N, 8))]
    found = []
    for kind in ("torch", "triton"):
        with force(kind):
            rows = AdapterRows(n)
            rows.set(ids)
            linear, experts = AdapterBank(*factors[:2], rows), AdapterBank(*factors[2:], rows)
            found.append((linear(x), experts(routed, plan)))
    for ours, want in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, want, rtol=0.02, atol=0.05)
    assert found[1][0][ids < 0].eq(0).all() and found[1][1].ne(0).any(1).sum() == 2 * (ids >= 0).sum()


@pytest.mark.parametrize("fp8", [False, True])
def test_a_pass_does_not_synchronise(fp8):
    """On fake tensors, which raise when their values are read: so it can be captured as a CUDA graph."""
    with engine_on_fake_tensors("mtp1", fp8) as e:
        m = e.model
        e.forward.adapters = fake = Adapters.__new__(Adapters)
        fake.rows, factors = AdapterRows(2), {}
        for name, (_, w) in adapted(m).items():
            *E, N, K = w.shape
            factors[name] = m.lm_head.weight.new_zeros(2, *E, 8, K), m.lm_head.weight.new_zeros(2, *E, N, 8)
        fake.model = with_banks(m, factors, fake.rows)
        with NoHostData():
            output = e.forward.compute(
                torch.zeros(2, dtype=torch.int64), SamplingMode(True, False, False, adapted=True)
            )
        assert output.shape == (2, 4)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
def test_other_types_of_weights(kind, tmp_path):
    """Within rounding of the adapters as the trainer computes them over the same weights."""
    m = Ling(wide()).to(torch.bfloat16 if kind == "bf16" else torch.float32)
    m.init_weights(torch.Generator().manual_seed(0))
    write(tmp_path / "a", m, KIND["all"][0], 4, size=0.05)
    save_model(m, tmp_path / "model", dtype=torch.bfloat16)
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    m = load_model(tmp_path / "model", dtype=dtype, fp8=kind == "fp8")
    trained = load_model(tmp_path / "model", dtype=dtype, fp8=kind == "fp8")
    lora_(trained, 8)
    factors = load_adapter(trained, tmp_path / "a")
    assert factors
    ids = [int(t) for t in torch.randint(200, (24,), generator=torch.Generator().manual_seed(1))]
    with torch.no_grad():
        want = trained(torch.tensor([ids])).logits[0].log_softmax(-1)
        plain = m(torch.tensor([ids])).logits[0].log_softmax(-1)
    e = Engine(m, adapters={"a": tmp_path / "a"})
    (found,) = e.score([ids], adapter="a")
    want, plain = (t[range(len(ids) - 1), ids[1:]] for t in (want, plain))
    difference = (torch.tensor(found) - want).norm() / (plain - want).norm()
    assert difference < 0.05, difference


def load_adapter(trained, folder):
    """Put an adapter's factors into a model with `lora_`, whose scale is 2."""
    weights = adapted_weights(trained.config)
    reader = AdapterFolder(folder, weights)
    found = adapters(trained)
    for name, adapter in found.items():
        a, b = reader.factors(weights[name], torch.float32)
        adapter.a.data.zero_()
        adapter.a.data[..., : a.shape[-2], :] = a
        adapter.b.data[..., : b.shape[-1]] = b / adapter.scale
    return found


@pytest.mark.parametrize("change, message", [
    (dict(key=("dense.lora_A", "gate.lora_A")), "no weight for .*attention.gate.lora_A.weight; adapters are of"),
    (dict(drop="layers.1.attention.dense.lora_B"), "only one of lora_A and lora_B of model.layers.1.attention.dense"),
    (dict(resize="layers.0.mlp.down_proj.lora_B"), r"another model: lora_A .* and lora_B \[.*, 3\] of model"),
    (dict(nan="layers.0.mlp.down_proj.lora_B"), "layers.0.mlp.down_proj has values that are not finite"),
    (dict(empty=True), "is empty"),
    (dict(use_dora=True), "adapter_config.json: use_dora True is not supported"),
    (dict(peft_type="IA3"), "peft_type 'IA3' is not supported"),
    (dict(modules_to_save=["lm_head"]), r"modules_to_save \['lm_head'\] is not supported"),
    (dict(lora_alpha="8"), "lora_alpha is '8', not a number"),
    (dict(remove="adapter_config.json"), "cannot read .*adapter_config.json"),
    (dict(remove="adapter_model.safetensors"), "neither adapter_model.safetensors nor"),
    (dict(cut=True), "cannot read .*adapter_model.safetensors"),
])  # fmt: skip
def test_adapters_that_do_not_fit(change, message, tmp_path):
    folder = tmp_path / "a"
    write(folder, model(), "dense|down_proj", 2)
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors = {} if change.get("empty") else load_file(weights)
    for what, value in change.items():
        for key in [k for k in tensors if value and str(value) in k]:
            if what == "drop":
                del tensors[key]
            elif what == "resize":
                tensors[key] = torch.ones(len(tensors[key]), 3)
            elif what == "nan":
                tensors[key][1, 1] = float("nan")
    if "key" in change:
        tensors = {k.replace(*change["key"]): t for k, t in tensors.items()}
    save_file(tensors, weights)
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    if "remove" in change:
        (folder / change["remove"]).unlink()
    if "cut" in change:
        weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(InputError, match=message) as found:
        Engine(model(), adapters={"a": folder})
    assert "\n" not in str(found.value)


def test_mistakes(made, tmp_path):
    folders, _ = made("base")
    e, prompt = make_engine(adapters=folders), references()[0][0]
    with pytest.raises(InputError, match="no adapter 'none'; there are 'all', 'attention', 'experts'"):
        e.generate([prompt], adapter="none")
    with pytest.raises(InputError, match="there are 1 prompts, but 2 in adapter"):
        e.generate([prompt], adapter=["all", "all"])
    with pytest.raises(InputError, match="no adapter 'all': the engine has none"):
        make_engine().submit(prompt, adapter="all")
    for names in ({"": folders["all"]}, {"a\nb": folders["all"]}, {3: folders["all"]}):
        with pytest.raises(InputError, match="cannot be the name of an adapter"):
            make_engine(adapters=names)
    with pytest.raises(InputError, match="they must be folders by name"):
        make_engine(adapters=[folders["all"]])
    with pytest.raises(InputError, match="is no folder"):
        make_engine(adapters=dict(a=tmp_path / "missing"))
    m = load("base")
    lora_(m, 2)
    with pytest.raises(InputError, match="a LoraLinear, has adapters: merge them first"):
        Engine(m, adapters=folders)
    drain(e)
