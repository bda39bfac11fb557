"""Recipes of several stages: the files of the package, a small recipe from end to end, killed and gone on, mistakes."""

import gc
import json
import shutil

import numpy as np
import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.model import LingConfig, load_model
from ling_kernels.tokenizer import load_tokenizer
from ling_kernels.train import Trainer, cli
from ling_kernels.train import checkpoint as ckpt
from ling_kernels.train import recipe as recipes
from ling_kernels.train.__main__ import main
from ling_kernels.train.data.toy import KEYS, needle, question, sum_with_thoughts, with_needles
from ling_kernels.train.needle import needle_text, retrieval
from ling_kernels.train.optimizer import make_optimizer
from ling_kernels.train.prepare import device
from ling_kernels.train.prepare.checks import check
from ling_kernels.train.prepare.models import model_config
from ling_kernels.train.recipe import load_stages, stage_tokens, table
from ling_kernels.train.settings import Settings
from tests.training import one_line_error

TOKENS = dict(zip(("1-pretrain", "2-reasoning", "3-long-context", "4-cot"), (10e12, 10e12, 150e9, 600e9), strict=True))
PEAK = dict(mini=3.36e-4, flash=2.61e-4, **{"1t": 1.86e-4})
ROWS = dict(mini=4400, flash=8352, **{"1t": 18144})
SIZES = "--layers 2 --hidden 32 --experts 8 --topk 2 --positions 96"


@pytest.mark.parametrize("name", ["mini", "flash", "1t", "tiny"])
def test_the_stages_are_settings_of_the_trainer(name):
    stages = load_stages(name)
    for number, stage in enumerate(stages):
        if stage.sources:
            s = Settings(**stage.with_flags({}, not number))
            check(s, model_config(Settings(model=name, mtp=1))[0])
    assert [s.name for s in stages] == [*TOKENS, "5-yarn"]


@pytest.mark.parametrize("name", ["mini", "flash", "1t"])
def test_the_published_stages(name):
    """arXiv 2510.22115, section 3.2: tokens of each stage, lengths, peak rate and batch, warm-up, AdamW's constants,
    bias rates, mixtures."""
    for stage in load_stages(name)[:4]:
        s = Settings(**stage.settings)
        assert stage_tokens(s) == pytest.approx(TOKENS[stage.name], rel=1e-3)
        assert s.lr == PEAK[name] and s.batch * s.seq_len == ROWS[name] * 4096
        long = stage.name > "3"
        assert s.seq_len == (32768 if long else 4096) and s.balance_rate == (1e-4 if long else 1e-3)
        assert (s.optimizer, s.weight_decay, s.clip, s.decay) == ("adamw", 0.1, 1.0, "none")
        assert s.warmup == (2000 if stage.name == "1-pretrain" else 100)  # those after the first are ours
    (group, _) = make_optimizer(torch.nn.Linear(2, 2), "adamw", 1.0, 0.1).param_groups
    assert (group["betas"], group["weight_decay"]) == ((0.9, 0.95), 0.1)
    first, second, third, fourth, yarn = load_stages(name)
    assert (first.settings["rope_theta"], third.settings["rope_theta"]) == (10000.0, 600000.0)
    general = [s.sources["general"] + s.sources.get("long", 0) for s in (first, second, third, fourth)]
    assert general == pytest.approx([0.68, 0.54, 0.54, 0.55])
    ramp = Settings(**first.settings).ramp
    assert stage_tokens(Settings(**first.settings | dict(steps=ramp[1]))) == pytest.approx(500e9, rel=1e-3)
    assert fourth.merge == dict(best=32, decay="linear") and yarn.settings == dict(yarn=4.0)
    assert any("10,000" in line or "tokens" in line for line in table(name, {}))


@pytest.fixture(autouse=True, scope="module")
def without_plots():
    """They and the measurement of the CPU's peak are tested elsewhere, and take longer than the recipe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "draw", lambda *_: [])
        patch.setattr(device, "measured_flops", lambda *_: 1e10)
        yield


@pytest.fixture(scope="module")
def small_recipe(tmp_path_factory):
    """A recipe of three stages, of small sources: trained, trained longer and merged, extended."""
    folder = tmp_path_factory.mktemp("small-recipe")
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        texts = [json.dumps({"text": sum_with_thoughts(rng) + "\n" + "words of text " * 6}) for _ in range(60)]
        (folder / f"{name}.jsonl").write_text("\n".join(texts) + "\n")
    common = dict(batch=2, micro_batch=1, lr=1e-3, warmup=1, eval_rows=2, sample_tokens=0, threads=1)
    stages = {
        "1-first": dict(
            sources=dict(one=0.75, two=0.25),
            settings=common | dict(model="tiny", mtp=0, rope_theta=10000.0, seq_len=48, steps=4, balance_rate=1e-3),
        ),
        "2-longer": dict(
            sources=dict(two=1),
            settings=common | dict(rope_theta=50000.0, seq_len=96, steps=6, balance_rate=1e-4, save_every=2,
                                   eval_every=2, keep=0),
            merge=dict(best=2, decay="linear"),
        ),
        "3-yarn": dict(settings=dict(yarn=4.0), needles=[64]),
    }  # fmt: skip
    (folder / "stages").mkdir()
    for name, content in stages.items():
        (folder / "stages" / f"{name}.json").write_text(json.dumps(content))
    return folder


def command(folder, out, *more):
    sources = ["--source", f"one={folder / 'one.jsonl'}", f"two={folder / 'two.jsonl'}"]
    return ["--recipe", str(folder / "stages"), *sources, *SIZES.split(), "--out", str(out), *more]


@pytest.fixture(scope="module")
def finished(small_recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    assert main(command(small_recipe, out)) == 0
    return out


def test_a_small_recipe(finished):
    state = json.loads((finished / "recipe.json").read_text())
    assert list(state["done"]) == ["1-first", "2-longer", "3-yarn"]
    assert state["done"] == {"1-first": "1-first/checkpoints/step-000004", "2-longer": "2-longer/merged",
                             "3-yarn": "3-yarn/model"}  # fmt: skip
    first, second, third = (LingConfig.from_json(finished / p / "config.json") for p in state["done"].values())
    assert (first.rope_theta, second.rope_theta, third.rope_theta) == (10000, 50000, 50000)
    assert third.max_positions == 4 * 96 and third.rope_scaling["type"] == "yarn" and not second.rope_scaling
    settings = json.loads((finished / "2-longer/settings.json").read_text())
    assert settings["balance_rate"] == 1e-4 and settings["model"].endswith("1-first/checkpoints/step-000004")
    assert settings["data"] == [f"{state['sources']['two']}=1"]
    (row,) = state["needles"]["3-yarn"]
    assert row["length"] == 64 and len(row["found"]) == len(row["depths"]) and 0 < row["nats"] < 20
    merged, last = (load_model(finished / p) for p in ("2-longer/merged", "3-yarn/model"))
    assert all(torch.equal(a, b) for a, b in zip(merged.parameters(), last.parameters(), strict=True))


def test_the_summary_is_of_the_merged_weights(finished, small_recipe, tmp_path):
    """By the trainer's own validation, with the merged weights in the place of the last step's."""
    state, stages = json.loads((finished / "recipe.json").read_text()), load_stages(str(small_recipe / "stages"))
    run = shutil.copytree(finished / "2-longer", tmp_path / "run")
    trainer = Trainer.resume(run)
    last = trainer.evaluate()["val_loss"]
    trainer.model.load_state_dict(load_model(finished / "2-longer/merged", torch.float32).state_dict())
    loss = state["validated"]["2-longer"]
    assert loss == trainer.evaluate()["val_loss"] != last and state["validated"].keys() == {"2-longer"}
    lines = recipes.summary(finished, stages, state)
    assert lines[2] == f"{'2-longer':<20} merged: {loss:.4f} nats of what its sources held out; step 6: {last:.4f}"
    assert lines[1].endswith("nats of what its sources held out") and "step 4:" in lines[1] and len(lines) == 3
    before = {name: value for name, value in state.items() if name != "validated"}  # or of several processes
    assert "merged: not measured; step 6" in recipes.summary(finished, stages, before)[2]
    assert recipes.stage_loss(finished, "2-longer", before) is None


def test_the_next_stage_trains_with_its_own_rotary_base(finished, small_recipe, tmp_path):
    """The tables of a model that begins from weights are those of the settings, not of the weights' config.json."""
    from ling_kernels.ops.rope_tables import rope_tables

    weights = finished / "1-first/checkpoints/step-000004"
    s = Settings(model=weights, rope_theta=50000.0, yarn=2.0, data=(small_recipe / "one.jsonl",), seq_len=32, batch=2,
                 steps=1, eval_rows=2, threads=1)  # fmt: skip
    trainer = Trainer(s, tmp_path / "run")
    c = trainer.config
    assert c.rope_theta == 50000 and c.max_positions == 2 * 96
    cos, sin = rope_tables(c.max_positions, c.rotary_dim, 50000.0, c.rope_scaling, torch.device("cpu"))
    assert torch.equal(trainer.model.cos, cos) and torch.equal(trainer.model.sin, sin)


def test_a_killed_recipe_goes_on_in_the_right_stage(small_recipe, finished, tmp_path, monkeypatch, capsys):
    """Stopped in the second stage and before the third: the models have the bits of a recipe that was not stopped."""
    out, save = tmp_path / "out", ckpt.make_durable

    def killed(path):
        save(path)
        if "2-longer/checkpoints/.step-000004" in str(path) and path.name == "state.json":
            raise KeyboardInterrupt

    monkeypatch.setattr(ckpt, "make_durable", killed)
    assert main(command(small_recipe, out)) == 75
    monkeypatch.undo()
    gc.collect()  # the run, whose lock a killed process would have given up
    state = json.loads((out / "recipe.json").read_text())
    assert list(state["done"]) == ["1-first"] and (out / "2-longer/checkpoints/step-000002").is_dir()

    out = out.rename(tmp_path / "moved")
    monkeypatch.setattr(recipes, "extended", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(command(small_recipe, out))
    monkeypatch.undo()
    assert list(json.loads((out / "recipe.json").read_text())["done"]) == ["1-first", "2-longer"]
    assert main(command(small_recipe, out)) == 0
    assert "stage      1-first" not in capsys.readouterr().out.rpartition("stage      3-yarn")[2]
    for path in ("2-longer/merged", "3-yarn/model"):
        a, b = (load_model(folder / path, torch.float32).state_dict() for folder in (finished, out))
        assert all(torch.equal(a[key], b[key]) for key in a), path


def test_mistakes_of_recipes(small_recipe, finished, tmp_path, capsys):
    folder = tmp_path / "stages"
    folder.mkdir()
    wrong = {
        "stage has no color": dict(color=1),
        "there is no setting colour": dict(settings=dict(colour=1), sources=dict(a=1)),
        "add up to 0.9, not to 1": dict(settings={}, sources=dict(a=0.5, b=0.4)),
        "must be more than 0": dict(settings={}, sources=dict(a=1.5, b=-0.5)),
        "so lr has no effect": dict(settings=dict(lr=1.0)),
        "merge is": dict(settings={}, sources=dict(a=1), merge=dict(best=3, last=2)),
        "no checkpoints to merge": dict(settings={}, merge=dict(best=3)),
        "data is not for a stage": dict(settings=dict(data="x"), sources=dict(a=1)),
        "the first stage has no sources": dict(settings=dict(yarn=2.0)),
        "settings is [], not an object": dict(settings=[], sources=dict(a=1)),
        "about is 3, not text": dict(about=3, sources=dict(a=1)),
        "needles is '32', not a list": dict(needles="32", sources=dict(a=1)),
        "-1 is none": dict(needles=[-1], sources=dict(a=1)),
        "has no =": dict(settings={}, sources={"a=b": 1}),
        "must be more than 0: {'a': True}": dict(settings={}, sources=dict(a=True)),
    } | {
        f"merge is {merge}": dict(settings={}, sources=dict(a=1), merge=merge)
        for merge in (
            dict(best=0),
            dict(last=-1),
            dict(best="x"),
            dict(best=True),
            dict(last=1.5),
            dict(last=2, decay="up"),
        )
    }
    for message, content in wrong.items():
        (folder / "1.json").write_text(json.dumps(content))
        assert message in one_line_error(["--recipe", str(folder)], capsys), message
    a = small_recipe / "one.jsonl"
    flags = {
        "must be 1t, flash, mini, tiny, or a folder": ["--recipe", "small"],
        "mini has no data for general, math": ["--recipe", "mini", "--source", "code=."],
        "with NAME one of": ["--recipe", "mini", "--source", "poems=."],
        "--data is not for a recipe": ["--recipe", "tiny", "--data", "x"],
        "--resume is not for a recipe": ["--recipe", "tiny", "--resume", "x"],
        "--source is for --recipe": ["--source", "a=b"],
        "of other stages or sources": ["--recipe", "tiny", "--out", str(finished)],
        "is of other stages or sources": command(small_recipe, finished, "--source", f"one={a}", f"two={a}"),
        "no run of a recipe": ["--recipe", "tiny", "--out", str(small_recipe)],
        "two=none: there is no none": command(small_recipe, tmp_path / "cwd", "--source", "two=none"),
    }
    monkey = tmp_path / "cwd"
    for message, argv in flags.items():
        argv = argv if "--out" in argv else [*argv, "--out", str(monkey)]
        assert message in one_line_error(argv, capsys), message
    assert not monkey.exists()
    with pytest.raises(InputError, match="has YaRN already"):
        model_config(Settings(model=str(finished / "3-yarn/model"), yarn=2.0))


def test_mistakes_of_later_stages_are_found_before_the_first(small_recipe, tmp_path, capsys):
    stages = sorted((small_recipe / "stages").glob("*.json"))
    for number, message, change in (
        (1, "stage 2-longer: --steps -1: it must be at least 1", dict(steps=-1)),
        (1, "stage 2-longer: --seq-len 97 is longer than the 96 positions", dict(seq_len=97)),
        (1, "layers is for the first stage", dict(layers=2)),
        (1, "stage 2-longer: merge is of 2 checkpoints, and keep 1 keeps fewer", dict(keep=1)),
        (2, "stage 3-yarn: --yarn 0.0: it must be more than", dict(yarn=0.0)),
        (2, "stage 3-yarn: needles of 400 tokens are longer than the model's 384", dict(needles=[400])),
    ):
        folder = tmp_path / f"{number} {message[-12:]}"
        folder.mkdir()
        for path in stages:
            content = json.loads(path.read_text())
            if path == stages[number]:
                (content if "needles" in change else content["settings"]).update(change)
            (folder / path.name).write_text(json.dumps(content))
        for more in ([], ["--plan"]):
            argv = command(small_recipe, tmp_path / "out", *more)
            assert message in one_line_error(["--recipe", str(folder), *argv[2:]], capsys), message
    assert not (tmp_path / "out").exists()


def test_needles():
    """The text has the length, ends with the value, and holds it once before; a model that copies finds it."""
    tokenizer = load_tokenizer(None)
    prose = np.frombuffer(b"plain prose without any number. " * 20, np.uint8)
    for depth in (0.0, 0.5, 1.0):
        ids, number = needle_text(tokenizer, prose, 200, depth, np.random.default_rng(1))
        text = tokenizer.decode(ids.tolist())
        value, key = text[-number:], text[-number - 2]
        assert len(ids) == 200 and number == 4 and key in KEYS and text.count(value) == 2
        assert text.index(needle(key, int(value))) == pytest.approx(depth * 170, abs=16) and question(key) in text[-12:]
    with pytest.raises(InputError, match="no room"):
        needle_text(tokenizer, prose, 20, 0.5, np.random.default_rng(1))

    class Copies(torch.nn.Module):
        """Writes what followed the first occurrence of the last three tokens."""

        def __init__(self):
            super().__init__()
            self.config, self.lm_head = LingConfig.tiny(), torch.nn.Linear(1, 1)

        def forward(self, ids):
            row, logits = ids[0].tolist(), torch.zeros(1, ids.shape[1], 320)
            for i in range(2, len(row)):
                found = [j for j in range(2, i) if row[j - 2 : j + 1] == row[i - 2 : i + 1]]
                logits[0, i, row[found[0] + 1] if found else 0] = 9.0
            return type("Out", (), dict(logits=logits))

    assert retrieval(Copies(), tokenizer, 150, texts=2)["found"] == [1.0] * 5
    text = with_needles("some prose. " * 90, np.random.default_rng(0))
    assert text.count("key ") == 8 and len(text) == pytest.approx(1040, abs=60)
