"""The engine as the rollout of another trainer of reinforcement learning: prompts in, lists of ids and numbers out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..errors import InputError
from ..generate import Engine
from ..tokenizer import Tokenizer
from .rollout import rollout

Prompt = str | Sequence[dict]
Weights = Callable[[Any], Mapping[str, Tensor] | None]


class RolloutFunction:
    """Answers prompts with an engine. As TRL's `rollout_func` it is called with the prompts and the trainer:

        trainer = GRPOTrainer(..., rollout_func=RolloutFunction(engine, tokenizer, new_tokens=256))

    weights: takes the trainer and returns the policy's tensors by official key, or None where the engine's model is the
    policy itself; called whenever the trainer's global step has changed. seed: of the first answer; None: new ones.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, new_tokens: int, seed: int | None = None,
        weights: Weights = lambda trainer: None,
    ):  # fmt: skip
        self.engine, self.tokenizer, self.new_tokens, self.seed, self.weights = (
            engine, tokenizer, new_tokens, seed, weights,
        )  # fmt: skip
        self.answers = 0  # so far
        self.step: int | None = None  # of the trainer, whose weights the engine has

    def __call__(
        self, prompts: Sequence[str | Sequence[dict]], trainer: Any = None, samples: int = 1
    ) -> dict[str, list]:
        """prompts: texts, or conversations of messages, which the chat template renders. `samples` answers to each.

        Returns lists with an entry for each answer: prompt_ids, completion_ids (with the token that ends it), logprobs
        (a number for each of these), text, policy_version, and where the engine records it routing [tokens, M, topk].
        Answers and log-probabilities are at temperature 1. Raises InputError for a trainer with another one.
        """
        if (temperature := getattr(getattr(trainer, "args", None), "temperature", 1.0)) != 1:
            raise InputError(f"the trainer's temperature is {temperature}; the engine's log-probabilities are for 1")
        step = getattr(getattr(trainer, "state", None), "global_step", None)
        if trainer is not None and (step is None or step != self.step):
            self.engine.new_weights(self.weights(trainer))
            self.step = step
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        seed = None if self.seed is None else self.seed + self.answers
        answers = rollout(self.engine, ids, samples, self.new_tokens, seed=seed, ends=sorted(self.tokenizer.ends()))
        self.answers += len(answers)
        out: dict[str, list] = dict(
            prompt_ids=[a.prompt for a in answers], completion_ids=[a.ids for a in answers],
            logprobs=[a.logprobs for a in answers], text=[self.tokenizer.decode(a.ids) for a in answers],
            policy_version=[a.policy_version for a in answers],
        )  # fmt: skip
        return out | (dict(routing=[a.routing for a in answers]) if self.engine.forward.routing is not None else {})

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt)
        return self.tokenizer.encode(self.tokenizer.apply_chat_template(prompt), special=True)
