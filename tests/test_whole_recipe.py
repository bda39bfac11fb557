"""python -m ling_kernels.posttrain.recipe: from random weights to answers of a rewarded model, at the smallest size."""

# ruff: noqa: F811 (fixtures are imported)

import json
import shutil
from functools import partial
from pathlib import Path

import pytest

from ling_kernels.errors import InputError
from ling_kernels.model import LingConfig
from ling_kernels.posttrain import recipe as whole
from ling_kernels.posttrain.rl import main as rl
from ling_kernels.posttrain.tasks import exact
from ling_kernels.train import recipe as recipes
from ling_kernels.train.__main__ import main as train
from tests.test_recipe import SIZES, small_recipe, without_plots  # noqa: F401


@pytest.fixture(scope="module")
def here(small_recipe, tmp_path_factory):
    """A finished run, whose commands are run in this process, and the commands."""
    ran, out = [], tmp_path_factory.mktemp("whole") / "out"

    def execute(module, flags):
        ran.append(module)
        return {"train": train, "posttrain.rl": rl}[module](list(flags))

    sources = [f"{name}={small_recipe / f'{name}.jsonl'}" for name in ("one", "two")]
    argv = [str(small_recipe / "stages"), "--source", *sources, "--sft-steps", "2", "--rl-steps", "1",
            "--problems", "4", "--out", str(out), "--", *SIZES.split()]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(whole, "execute", execute)
        assert whole.main(argv) == 0
    return out, ran, argv


def test_everything(here):
    out, ran, _ = here
    assert ran == ["train", "train", "posttrain.rl"]
    found = json.loads((out / "results.json").read_text())
    assert len(found["origin"]["commit"]) >= 7 and found["origin"]["date"].startswith("20")
    assert found["exact_match"].keys() == {"pretrain", "sft", "lpo"} and len(found["rewards"]) == 1
    assert found["nats"].keys() == {"1-first", "2-longer", "sft"} and all(0 < x < 7 for x in found["nats"].values())
    assert [row["length"] for row in found["needles"]["3-yarn"]] == [64]
    assert (out / "recipe.png").stat().st_size > 1000
    settings = json.loads((out / "sft/settings.json").read_text())
    assert settings["model"].endswith("3-yarn/model") and settings["balance_rate"] == 0


def test_the_shipped_recipe(tmp_path, monkeypatch):
    """tiny's own stages, data and needles: fewer steps and texts, nothing else."""

    def execute(module, flags):
        return {"train": train, "posttrain.rl": rl}[module](list(flags))

    monkeypatch.setattr(whole, "execute", execute)
    monkeypatch.setattr(recipes, "check_needles", partial(recipes.check_needles, texts=1))
    cut = "--steps 8 --save-every 1 --eval-every 1 --eval-rows 1 --threads 1"  # its fourth stage merges 8 checkpoints
    argv = [
        "tiny",
        "--sft-steps",
        "2",
        "--rl-steps",
        "1",
        "--problems",
        "2",
        "--out",
        str(tmp_path),
        "--",
        *cut.split(),
    ]
    assert whole.main(argv) == 0
    found = json.loads((tmp_path / "results.json").read_text())
    assert [*found["nats"]] == ["1-pretrain", "2-reasoning", "3-long-context", "4-cot", "sft"]
    assert all(0 < nats < 7 for nats in found["nats"].values()) and len(found["rewards"]) == 1
    assert [row["length"] for row in found["needles"]["5-yarn"]] == [1024, 2048, 4096]
    assert found["exact_match"].keys() == {"pretrain", "sft", "lpo"}
    state = json.loads((tmp_path / "pretrain/recipe.json").read_text())
    assert list(state["done"]) == state["stages"] and "4-cot/merged" in state["done"]["4-cot"], state
    config = LingConfig.from_json(tmp_path / "lpo/model/config.json")
    assert config.max_positions == 4096 and config.rope_theta == 600000.0 and config.rope_scaling["factor"] == 4.0
    assert (tmp_path / "recipe.png").stat().st_size > 1000


def test_what_is_complete_is_not_done_again(here, monkeypatch, capsys):
    out, _, argv = here
    again = []
    monkeypatch.setattr(whole, "execute", lambda module, flags: again.append(module) or 0)
    assert whole.main(argv) == 0 and again == ["train"]  # the recipe itself finds its stages complete
    assert "exact match" in capsys.readouterr().out
    monkeypatch.setattr(whole, "execute", lambda module, flags: 75)
    assert whole.main(argv) == 75
    for flag, value in (("--task", "arithmetic"), ("--sft-steps", "3"), ("--rl-steps", "2")):
        assert whole.main([*argv[: argv.index("--")], flag, value, "--", *SIZES.split()]) == 2
        assert "give another --out" in capsys.readouterr().err


def test_a_part_that_is_killed_before_its_first_checkpoint_begins_again(here, monkeypatch, tmp_path):
    """Reinforcement learning, whose command is given the folder of the run that has only its settings."""
    source, _, argv = here
    out = tmp_path / "out"
    shutil.copytree(source, out)
    for path in ("lpo/model", "lpo/checkpoints"):
        shutil.rmtree(out / path)
    with open(out / "lpo/metrics.jsonl", "w") as file:
        file.write('{"step": 1, "reward": 9}\n{"step": 2')
    monkeypatch.setattr(whole, "execute", lambda module, flags: {"train": train, "posttrain.rl": rl}[module](flags))
    monkeypatch.setattr(whole, "exact_match", lambda *_: (0.0, [("a", "b", "c")]))
    assert whole.main([str(out) if a == str(source) else a for a in argv]) == 0
    first, again = (json.loads((folder / "results.json").read_text()) for folder in (source, out))
    assert first["rewards"] == again["rewards"]


def test_exact_match_counts_right_answers(here, monkeypatch):
    from ling_kernels.posttrain import evaluate

    share, rows = evaluate.exact_match(here[0] / "sft/model", "sorting", problems=6)
    assert share == sum(exact(text, answer) for _, text, answer in rows) / 6
    assert len({prompt for prompt, _, _ in rows}) > 1
    for task, problems in (("chess", 4), ("sorting", 0)):
        with pytest.raises(InputError, match="at least 1, of arithmetic, sorting"):
            evaluate.exact_match(here[0] / "sft/model", task, problems)
    monkeypatch.setattr(evaluate, "exact", lambda text, answer: 1.0)
    assert evaluate.exact_match(here[0] / "sft/model", "sorting", problems=6)[0] == 1


def test_the_start_is_the_checkpoint_with_the_best_pass_at_k(here, tmp_path, monkeypatch, capsys):
    """ApexEval by the command, against sampled answers that are checked one by one."""
    from ling_kernels.posttrain import choose, evaluate, pass_at_k
    from ling_kernels.posttrain.rollout import rollout as answers_of

    out, seen = here[0], []

    def rollout(*args, **options):
        seen.append(answers_of(*args, **options))
        return seen[-1]

    right = lambda text, answer: float(sum(map(ord, text)) % 3 == 0)  # noqa: E731 (these models are never right)
    monkeypatch.setattr(evaluate, "rollout", rollout)
    monkeypatch.setattr(evaluate, "exact", right)
    folders = [str(out / "pretrain/3-yarn/model"), str(out / "sft/model")]
    flags = ["--problems", "3", "--samples", "4", "--k", "2"]
    assert not choose.main([*folders, *flags])
    lines = capsys.readouterr().out.splitlines()
    means = {}
    for folder, answers in zip(folders, seen, strict=True):
        drawn, exam = evaluate.exam_of(folder, "sorting", 3, 1, evaluate.solved.__defaults__[1])
        assert len(answers) == 12 and len({tuple(a.ids) for a in answers}) > 3
        each = [right(exam.text(a.ids), drawn[i // 4].answer) for i, a in enumerate(answers)]
        means[folder] = sum(pass_at_k(4, int(sum(each[i : i + 4])), 2) for i in (0, 4, 8)) / 3
    assert lines == [
        *(f"pass@2 {mean:.4f}  {f}" for f, mean in means.items()),
        f"start with {max(means, key=means.get)}",
    ]
    assert 0 < min(means.values()) and len({*means.values()}) == 2, means
    assert not choose.main([str(out / "sft"), *flags]) and "checkpoints/step-000002" in capsys.readouterr().out
    (tmp_path / "checkpoints").mkdir()
    for wrong, text in (
        ([*folders, "--k", "9"], "--k 9: it must be"),
        ([*folders, "--problems", "0"], "must be at least 1"),
        ([str(tmp_path)], "holds no checkpoints"),
        ([str(tmp_path / "absent")], "absent"),
    ):
        assert choose.main(wrong) == 2
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1, error


def test_figures_of_lm_eval(here, monkeypatch, capsys):
    """Its command runs for each model, and its newest results are among the recipe's. (tests/integrations/lm_eval runs
    the harness itself.)"""
    out, _, argv = here
    ran = []

    def execute(module, flags):
        ran.append((module, flags))
        if module == "integrations.lm_eval":
            folder = Path(flags[flags.index("--output_path") + 1]) / "model"
            folder.mkdir(parents=True, exist_ok=True)
            for day, value in ((1, 0.9), (2, 0.25)):
                row = {"alias": "toy", "acc,none": value, "acc_stderr,none": 0.1, "perplexity,none": 3.0}
                (folder / f"results_2026-11-0{day}.json").write_text(json.dumps(dict(results=dict(toy=row))))
        return 0

    monkeypatch.setattr(whole, "execute", execute)
    argv = [*argv[: argv.index("--")], "--lm-eval", "--tasks toy --limit 3", "--", *SIZES.split()]
    monkeypatch.setattr(whole, "find_spec", lambda name: None)
    assert whole.main(argv) == 2 and "lm_eval is not installed" in capsys.readouterr().err
    monkeypatch.setattr(whole, "find_spec", lambda name: name)
    assert whole.main(argv) == 0
    found = json.loads((out / "results.json").read_text())["lm_eval"]
    assert found == dict.fromkeys(("pretrain", "sft", "lpo"), dict(toy=dict(acc=0.25, perplexity=3.0)))
    assert "toy acc 0.2500, after lpo" in capsys.readouterr().out
    assert [flags[1] for module, flags in ran if "lm_eval" in module][2] == f"pretrained={out / 'lpo/model'}"
    assert ran[-1][1][-4:] == ["--tasks", "toy", "--limit", "3"]


def test_mistakes(capsys, tmp_path):
    for argv, message in ((["huge"], "--recipe huge"), (["tiny", "--rl-steps", "0"], "--rl-steps 0"),
                          (["tiny", "--task", "chess"], "invalid choice")):  # fmt: skip
        assert whole.main([*argv, "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
