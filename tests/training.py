"""Fixtures of the training tests: a model whose step takes milliseconds, and text that it learns in seconds."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from ling_kernels.model import Ling, LingConfig, save_model
from ling_kernels.model.weight_files import WeightReader
from ling_kernels.parallel.checkpoints import parsed
from ling_kernels.train.__main__ import main


def tiniest() -> LingConfig:
    return replace(
        LingConfig.tiny(), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1,
        moe_intermediate_size=16, max_position_embeddings=128,
    )  # fmt: skip


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A model directory with random weights, small enough for a step to take milliseconds."""
    folder = tmp_path_factory.mktemp("small")
    model = Ling(tiniest())
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, folder, dtype=torch.float32)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Documents of few different words and of different lengths."""
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    words = ["the", "kernel", "reads", "writes", "a", "tile", "of", "experts", "and", "tokens"]
    lengths = rng.integers(1, 60, 150)
    rows = [json.dumps({"text": " ".join(rng.choice(words, n)) + "."}) for n in lengths]
    (folder / "text.jsonl").write_text("\n".join(rows) + "\n")
    return folder / "text.jsonl"


def small_run(small, text) -> list[str]:
    """Flags of a small run that uses everything: micro batches, a ramp, MTP, balancing, validation."""
    data = f"--model {small} --data {text} --seq-len 48 --batch 8 --micro-batch 2 --batch-ramp 2:6"
    rest = "--warmup 4 --lr 3e-3 --eval-rows 4 --threads 1 --sample-tokens 8 --log-every 1 --balance-rate 0.01"
    return [*data.split(), *rest.split()]


@pytest.fixture
def flags(small, text):
    return small_run(small, text)


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory, small, text):
    """The run folder of 14 uninterrupted steps of the small run."""
    run = tmp_path_factory.mktemp("uninterrupted")
    assert main([*small_run(small, text), "--out", str(run), "--steps", "14", "--save-every", "4"]) == 0
    return run


def whole_tensors(checkpoint, stem: str) -> dict[str, torch.Tensor]:
    """The tensors "model" or "optimizer" of a checkpoint, of however many processes, by key."""
    parts: dict[str, list] = {}
    with WeightReader(checkpoint, stem) as reader:
        for name in reader.files:
            key, dim, bounds = parsed(name)
            parts.setdefault(key, []).append((bounds, dim, reader.part(name, ())))
    return {
        key: found[0][2]
        if len(found) == 1
        else torch.cat([t for *_, t in sorted(found, key=lambda f: f[0])], found[0][1])
        for key, found in parts.items()
    }


def one_line_error(argv, capsys) -> str:
    """Assert that the trainer's command returns 2 with one line on stderr; returns the line."""
    return one_line_main(main, argv, capsys)


def one_line_main(main, argv, capsys) -> str:
    """The same of another command."""
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and len(error) > 20, error
    return error


def train(model, optimizer, steps: int) -> list[float]:
    """Losses of `steps` steps on the same 40 tokens."""
    losses = []
    for _ in range(steps):
        ids = torch.arange(40).view(2, 20)
        loss = model(ids, labels=ids, logits=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
