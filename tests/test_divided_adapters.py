"""Adapters of requests in an engine over two processes, on gloo: parts of A and B, the tokens of one process."""

# ruff: noqa: F811 (a fixture is imported)
import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.generate import Engine, Sampling, divided
from ling_kernels.generate.adapters import Adapters
from ling_kernels.generate.cli import main
from ling_kernels.model import load_model, named_views
from ling_kernels.nn.lora import adapted
from ling_kernels.parallel.decode import RankShare
from tests.speller import speller
from tests.test_divided_engine import FP32, LONG_PROMPT, OPTIONS, compare, divided_engine, forked  # noqa: F401
from tests.test_engine_adapters import KIND, MIX, write
from tests.test_model import DATA

PROMPTS = [LONG_PROMPT, [1, 2, 3], [9, 8], LONG_PROMPT[:33], [4] * 9, LONG_PROMPT, [7, 7, 6]]


def written(folder, model):
    """Folders of the adapters of KIND by name, and what each adds by official key."""
    added = {
        kind: write(folder / kind, model, modules, rank, i, **fields)
        for i, (kind, (modules, rank, fields)) in enumerate(KIND.items())
    }
    return {kind: folder / kind for kind in KIND}, added


def test_parts_of_adapters(tmp_path):
    """What the parts of A and B add to the parts of the weights is the part of what the whole adapter adds."""
    folders, added = written(tmp_path, load_model(DATA / "mtp1", torch.float32))
    compared = 0
    for rank in (0, 1):
        share = RankShare(2, rank)
        model = load_model(DATA / "mtp1", torch.float32, share=share)
        with_adapters = Adapters(model, folders, share).model
        banks = {name: getattr(layer, name.rpartition(".")[2]) for name, (layer, _) in adapted(with_adapters).items()}
        for number, kind in enumerate(folders):
            with torch.no_grad():
                for name, (_, weight) in adapted(model).items():
                    a, b = (t.view(len(folders), -1, *t.shape[1:])[number] for t in (banks[name].a, banks[name].b))
                    weight.copy_((b @ a).view_as(weight))
            for key, delta in named_views(model):
                if key in share.parts and key.split(".")[-2] not in ("word_embeddings", "lm_head"):
                    whole = added[kind].get(key)
                    want = torch.zeros_like(delta) if whole is None else share.parts[key].take(whole)
                    torch.testing.assert_close(delta, want)
                    compared += whole is not None
    assert compared == 2 * sum(map(len, added.values()))


def mixed(engine):
    """Requests with each adapter and without one, greedy and random, of prompts whose beginnings are cached."""
    samplings = [None, None, None, Sampling(0.8, top_k=20, seed=5)] * 2
    options = dict(max_new_tokens=9, stop_token_ids=(), logprobs=2)
    found = engine.finish(PROMPTS, samplings[: len(MIX)], adapter=MIX, **options)
    found += engine.finish([LONG_PROMPT] * 4, prompt_logprobs=0, adapter=[None, *KIND], **options)
    return [*found, *engine.finish([[*LONG_PROMPT[:37], 8]] * 4, adapter=[None, *KIND], **options)]


@pytest.mark.parametrize("name, draft", [("base", 0), ("base", 2), ("mtp1", 2)])
def test_the_tokens_of_one_process(name, draft, tmp_path):
    """In chunks, in passes with adapters and without, with drafts by lookup and by the MTP layer."""
    folder = DATA / name
    folders, _ = written(tmp_path, load_model(folder, torch.float32))
    options = dict(draft=draft, adapters=folders)
    alone = Engine(load_model(folder, torch.float32), **OPTIONS | options)
    want = mixed(alone)
    assert len({tuple(r.new_tokens) for r in want[-4:]}) == 4, "each adapter changes the tokens"
    with divided_engine(folder, **options) as engine:
        got = mixed(engine)
        assert torch.equal(engine.forward.token_ids, alone.forward.token_ids), "and the draft tokens behind them"
        assert (engine.drafted > 0) == (draft > 0)
        with pytest.raises(InputError, match="no adapter 'none'; there are 'all', 'attention', 'experts'"):
            engine.submit([1], adapter="none")
    compare(got, want)


def test_mistakes_and_flags(tmp_path, capsys):
    """As for one process; no rank is left behind."""
    model = load_model(DATA / "base", torch.float32)
    write(tmp_path / "nan", model, "dense", 2, size=float("nan"))
    for folder, message in ((tmp_path / "missing", "is no folder"), (tmp_path / "nan", "values that are not finite")):
        with pytest.raises(InputError, match=message) as error:
            divided.DividedEngine(DATA / "base", 2, FP32, adapters=dict(a=folder))
        with pytest.raises(InputError) as alone:
            Engine(model, adapters=dict(a=folder))
        assert str(error.value) == str(alone.value) and not torch.distributed.is_initialized()
    folder = speller(tmp_path / "speller")
    write(tmp_path / "a", load_model(folder, torch.float32), KIND["all"][0], 4, size=2.0)
    flags = ["--model", folder, "--device", "cpu", "--prompt", "a", "--max-new-tokens", "9"]
    texts = []
    for more in ([], ["--adapter", tmp_path / "a"], ["--tp", "2", "--adapter", tmp_path / "a"]):
        assert main([*map(str, [*flags, *more])]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] != texts[1] == texts[2]
