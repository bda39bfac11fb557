"""The scripts in examples/ run, and what they show holds."""

import json
import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from ling_kernels.model import load_model
from ling_kernels.train import Trainer

EXAMPLES = Path(__file__).parents[1] / "examples"
IN_TRANSFORMERS = {"huggingface_trainer", "transformers_moe"}  # tests/integrations/transformers5/test_examples.py
TESTED = {"own_training_loop", "generate", "lightning_module", "train_on_your_text", "ray_train", *IN_TRANSFORMERS}


def run(monkeypatch, name: str, *args) -> dict:
    """The script's global variables after `python examples/name.py args`."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, args)])
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_every_example_is_tested():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == TESTED


def test_own_training_loop(monkeypatch):
    losses = run(monkeypatch, "own_training_loop")["losses"]
    assert losses[0] > 4 and losses[-1] < 1.5  # nats; 4.85 is a uniform guess among 128


def test_lightning_module(monkeypatch, tmp_path):
    """The loss falls, and the routers' bias follows the load that they counted."""
    pytest.importorskip("lightning", reason="lightning is not installed")
    monkeypatch.chdir(tmp_path)
    seen = run(monkeypatch, "lightning_module")
    assert seen["losses"][-1] < seen["losses"][0] - 1 and seen["losses"][0] > 4  # 5.77 is a uniform guess among 320
    assert all(router.expert_bias.any() and not router.counts.any() for router in seen["ling"].routers())


@pytest.mark.parametrize("name", sorted({"lightning_module", *IN_TRANSFORMERS}))
def test_a_missing_package_is_one_line(monkeypatch, name):
    package = "lightning" if name == "lightning_module" else "transformers"
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "accelerate", ModuleType("accelerate"))
    with pytest.raises(SystemExit, match=rf"needs the package {package}: pip install '.\[examples\]'$"):
        run(monkeypatch, name)
    assert "examples = [" in (EXAMPLES.parent / "pyproject.toml").read_text()


def test_generate(monkeypatch, capsys):
    """The stream's text is the model's own greedy continuation."""
    seen = run(monkeypatch, "generate")
    ids = torch.tensor([seen["ids"]])
    greedy = seen["model"].generate(ids, max_new_tokens=seen["length"])[0].tolist()
    printed = capsys.readouterr().out
    assert len(greedy) > ids.shape[1] and seen["tokenizer"].decode(greedy) in printed
    assert len(seen["outputs"]) == 2 and all(0 < len(output) <= seen["length"] for output in seen["outputs"])


def test_train_on_your_text(monkeypatch, tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    documents = [{"text": f"A router sends token {i} to expert {i % 7}, which lies in group {i % 3}. " * 6}
                 for i in range(12)]  # fmt: skip
    (tmp_path / "texts" / "some.jsonl").write_text("".join(json.dumps(d) + "\n" for d in documents))
    seen = run(monkeypatch, "train_on_your_text", tmp_path / "texts", tmp_path / "out", 20)
    assert seen["start"] > 5 and seen["end"] < 3.5  # nats; 5.77 is a uniform guess among 320
    assert "step 20: loss" in capsys.readouterr().out
    assert 0 < len(seen["continuation"]) <= 20
    weights = load_model(tmp_path / "out" / "model", dtype=torch.float32).word_embeddings.weight
    torch.testing.assert_close(weights, seen["trainer"].model.word_embeddings.weight, rtol=1e-2, atol=1e-4)  # as bf16
    assert Trainer.resume(tmp_path / "out").progress.step == 20


def test_ray_train(monkeypatch, tmp_path):
    """With a stand-in for Ray that has one worker in this process."""
    given = {}

    class TorchTrainer:
        def __init__(self, work, **settings):
            given.update(settings, work=work)

        def fit(self):
            given["work"](given["train_loop_config"])

    numbers = dict(get_world_rank=0, get_world_size=1, get_local_rank=0, get_local_world_size=1)
    context = SimpleNamespace(**{name: lambda value=value: value for name, value in numbers.items()})
    train = dict.fromkeys(("FailureConfig", "RunConfig", "ScalingConfig"), dict) | dict(get_context=lambda: context)
    modules = {
        "ray": dict(init=lambda **_: None, cluster_resources=lambda: {"CPU": 1.0}, __version__="stand-in"),
        "ray.train": train,
        "ray.train.torch": dict(TorchConfig=dict, TorchTrainer=TorchTrainer),
    }
    for name, content in modules.items():
        monkeypatch.setitem(sys.modules, name, module := ModuleType(name))
        vars(module).update(content)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "another launcher's")
    (texts := tmp_path / "texts").mkdir()
    for name in "abcd":
        (texts / f"{name}.txt").write_text("A router sends tokens to experts. " * 40)
    flags = f"--model tiny --data {texts} --holdout 2 --steps 1 --seq-len 16 --batch 1 --sample-tokens 0 --threads 1"
    run(monkeypatch, "ray_train", 1, *flags.split(), "--out", tmp_path / "out")
    assert given["scaling_config"] == dict(num_workers=1, use_gpu=False) and given["torch_config"]["backend"] == "gloo"
    assert given["train_loop_config"]["flags"][-2:] == ["--resume", "auto"]
    assert Trainer.resume(tmp_path / "out").progress.step == 1
    with pytest.raises(RuntimeError, match="exit code 2"):
        run(monkeypatch, "ray_train", 1, *flags.split(), "--out", tmp_path / "other", "--ep", 3)
