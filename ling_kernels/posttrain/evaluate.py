"""Right answers to a toy task through the engine, greedy or sampled. Figures of lm_eval."""

import json
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch

from ..errors import InputError
from ..generate import Engine
from ..model import load_model
from ..tokenizer import Tokenizer, load_tokenizer
from .rollout import rollout
from .tasks import TASKS, Problem, exact

NEW_TOKENS = 48  # of an answer at most
SEED = 1_000_003  # of which no loop with a smaller seed draws the same problems
RUNNING = 256  # answers that the engine writes at a time, at most


def exact_match(
    folder: str | Path, task: str, problems: int = 64, new_tokens: int = NEW_TOKENS, seed: int = SEED
) -> tuple[float, list[tuple[str, str, str]]]:
    """The share of right answers of a model's folder, and (prompt, the model's answer, the right one) of each problem.

    The problems follow from task and seed. Weights are fp32. Raises InputError for another task, and for no problems.
    """
    drawn, exam = exam_of(folder, task, problems, new_tokens, seed)
    answers = exam.engine.generate(exam.prompts, max_new_tokens=new_tokens, stop_token_ids=exam.ends)
    rows = [(p.prompt, exam.text(ids), p.answer) for p, ids in zip(drawn, answers, strict=True)]
    return sum(exact(text, answer) for _, text, answer in rows) / problems, rows


def solved(
    folder: str | Path, task: str, problems: int, samples: int, new_tokens: int = NEW_TOKENS, seed: int = SEED
) -> list[tuple[int, int]]:
    """(samples, right ones) of each problem of `exact_match`, answered at temperature 1; `apex_eval` takes them."""
    drawn, exam = exam_of(folder, task, problems, new_tokens, seed, samples)
    answers = rollout(exam.engine, exam.prompts, samples, new_tokens, seed=seed, ends=exam.ends)
    right = [exact(exam.text(a.ids), drawn[i // samples].answer) for i, a in enumerate(answers)]
    return [(samples, int(sum(right[i : i + samples]))) for i in range(0, len(right), samples)]


class Exam(NamedTuple):
    """A model's engine, and the problems as its prompts."""

    engine: Engine
    tokenizer: Tokenizer
    prompts: list[list[int]]
    ends: list[int]

    def text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode([t for t in ids if t not in self.ends])


def exam_of(
    folder: str | Path, task: str, problems: int, new_tokens: int, seed: int, samples: int = 1
) -> tuple[list[Problem], Exam]:
    if task not in TASKS or problems < 1 or samples < 1:
        raise InputError(f"{samples} answers to {problems} problems of {task!r}: it must be at least 1, of"
                         f" {', '.join(TASKS)}")  # fmt: skip
    random = Random(f"evaluation {task} {seed}")
    drawn = [TASKS[task](random) for _ in range(problems)]
    model, tokenizer = load_model(folder, torch.float32).eval(), load_tokenizer(folder)
    chats = (tokenizer.apply_chat_template([dict(role="user", content=p.prompt)]) for p in drawn)
    prompts = [tokenizer.encode(chat, special=True) for chat in chats]
    running = min(problems * samples, RUNNING)
    engine = Engine(model, cache_tokens=running * (max(map(len, prompts)) + new_tokens), max_running=running)
    return drawn, Exam(engine, tokenizer, prompts, sorted(tokenizer.ends()))


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
