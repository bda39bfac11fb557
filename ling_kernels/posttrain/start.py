"""A tiny model that has been taught a toy task's format, for a loop of reinforcement learning to start from."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from ..errors import InputError
from ..train import Settings, Trainer
from .tasks import Problem

# Small enough that a step of the loop takes a second of a CPU core.
SIZES: dict[str, Any] = dict(model="tiny", hidden=64, layers=2, experts=8, topk=2, groups=2, top_groups=1, mtp=0)
EXAMPLES = 4000
LR = 3e-3


def make_start(
    folder: Path, draw: Callable[[Random], Problem], steps: int, seed: int = 0,
    say: Callable[[str], object] = lambda line: None,
) -> Path:  # fmt: skip
    """Train a tiny model on demonstrations of the problems that `draw` draws; returns the model's folder, FOLDER/model.

    One that was stopped begins again. Raises InputError where FOLDER holds anything else.
    """
    if (folder / "model" / "config.json").is_file():
        raise InputError(f"{folder} is complete: --model {folder / 'model'} begins with it, or name another --out")
    random = Random(f"start {seed}")
    problems = [draw(random) for _ in range(EXAMPLES)]
    chats = [dict(messages=[dict(role="user", content=p.prompt), dict(role="assistant", content=p.demonstration)])
             for p in problems]  # fmt: skip
    data = folder.parent / f"{folder.name}.jsonl"
    try:
        data.parent.mkdir(parents=True, exist_ok=True)
        data.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    except OSError as error:
        raise InputError(f"cannot write {data}: {error.strerror or error}") from None
    settings = Settings(
        **SIZES, data=(str(data),), steps=steps, seq_len=256, batch=2, lr=LR, warmup=min(20, steps), seed=seed,
        eval_rows=8,
    )  # fmt: skip
    trainer = Trainer(settings, folder, restart=True)
    while trainer.progress.step < steps:
        record = trainer.step()
        if record["step"] % 100 == 0 or record["step"] == steps:
            say(f"start      step {record['step']}/{steps}  loss {record['loss']:.4f}")
    trainer.export(folder / "model")
    return folder / "model"
