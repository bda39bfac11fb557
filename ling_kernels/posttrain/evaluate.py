"""Exact match of a toy task: the share of problems whose greedy answer, by the engine, is right. Figures of lm_eval."""

import json
from pathlib import Path
from random import Random

import torch

from ..errors import InputError
from ..generate import Engine
from ..model import load_model
from ..tokenizer import load_tokenizer
from .tasks import TASKS, exact


def exact_match(
    folder: str | Path, task: str, problems: int = 64, new_tokens: int = 48, seed: int = 1_000_003
) -> tuple[float, list[tuple[str, str, str]]]:
    """The share of right answers of a model's folder, and (prompt, the model's answer, the right one) of each problem.

    The problems follow from task and seed, of which no loop with a smaller seed draws the same. Weights are fp32.
    Raises InputError for another task, and for no problems.
    """
    if task not in TASKS or problems < 1:
        raise InputError(f"{problems} problems of {task!r}: it must be at least 1, of {', '.join(TASKS)}")
    random = Random(f"evaluation {task} {seed}")
    drawn = [TASKS[task](random) for _ in range(problems)]
    model, tokenizer = load_model(folder, torch.float32).eval(), load_tokenizer(folder)
    ends = sorted(tokenizer.ends())
    prompts = [
        tokenizer.encode(tokenizer.apply_chat_template([dict(role="user", content=p.prompt)]), special=True)
        for p in drawn
    ]
    room = max(map(len, prompts)) + new_tokens
    engine = Engine(model, cache_tokens=problems * room, max_running=problems)
    answers = engine.generate(prompts, max_new_tokens=new_tokens, stop_token_ids=ends)
    texts = [tokenizer.decode([t for t in ids if t not in ends]) for ids in answers]
    rows = [(p.prompt, text, p.answer) for p, text in zip(drawn, texts, strict=True)]
    return sum(exact(text, answer) for _, text, answer in rows) / problems, rows


def lm_eval_figures(folder: Path) -> dict[str, dict[str, float]]:
    """The metrics of each task, without their errors, of the newest results that lm_eval wrote below its
    --output_path. Raises InputError where there are none."""
    files = sorted(folder.rglob("results_*.json"), key=lambda path: path.name)
    if not files:
        raise InputError(f"lm_eval has written no results to {folder}")
    return {
        task: {name.removesuffix(",none"): value for name, value in row.items()
               if isinstance(value, float) and "stderr" not in name}
        for task, row in json.loads(files[-1].read_text())["results"].items()
    }  # fmt: skip
