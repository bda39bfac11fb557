"""Answers of a policy by the serving engine, and their log-probabilities by the trainer: the two ends of a loop."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from ..errors import InputError
from ..generate import Engine, Request
from ..model import Ling
from ..model.sample import Sampling
from ..nn import BatchLayout
from ..nn.batch_invariant import PinnedLinear, target_logp
from ..nn.fp8_inference import weights_of
from ..ops.linear_cross_entropy import linear_cross_entropy


@dataclass
class Answer:
    """One answer of a rollout. logprobs [len(ids)] are the engine's, in natural logarithms, at temperature 1."""

    prompt: list[int]
    ids: list[int]  # with the token that ends it, where it has ended by itself
    logprobs: list[float]
    finished: str  # stop or length
    policy_version: int  # of the engine's weights
    routing: Tensor | None = None  # [prompt + ids - 1, M, topk]: the inputs' experts, where the engine records them


def rollout(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    samples: int,
    new_tokens: int,
    temperature: float = 1.0,
    seed: int | None = None,
    ends: Iterable[int] | None = None,
) -> list[Answer]:
    """`samples` answers to each prompt of token ids, those to one prompt one after the other.

    seed: answer i takes seed + i, and depends on it and the weights alone, up to rounding, and exactly where the engine
    is batch_invariant; None: new ones each time.
    ends: tokens that end an answer, default the model's. Raises InputError as `Engine.submit`.
    """
    if samples < 1:
        raise InputError(f"samples is {samples}; it must be at least 1")
    requests: list[Request] = []
    try:
        for i in range(len(prompts) * samples):
            sampling = Sampling(temperature, seed=None if seed is None else seed + i)
            while engine.scheduler.full:
                engine.step()
            requests.append(
                engine.submit(prompts[i // samples], sampling, new_tokens, ends, logprobs=0, keep_stop=True)
            )  # fmt: skip
        while not all(r.finished for r in requests):
            engine.step()
    except BaseException:
        for r in requests:  # unfinished ones would keep the engine from new weights
            engine.cancel(r)
        raise
    for r in requests:
        if r.error is not None:
            raise r.error
    return [
        Answer(r.prompt, r.new_tokens, [t.logprob for t in r.logprobs], r.finished, r.policy_version, r.routing)
        for r in requests
    ]


class AnswerLogp(torch.nn.Module):
    """`answer_logp` as a module's forward, for torch.func.functional_call."""

    def __init__(self, model: Ling):
        super().__init__()
        self.model = model

    def forward(self, answers: Sequence[Answer]) -> Tensor:
        return answer_logp(self.model, answers)


def rounded_answer_logp(model: Ling, answers: Sequence[Answer], dtype: torch.dtype) -> Tensor:
    """`answer_logp` with weights rounded to dtype, as those of an engine in dtype; gradients go to the weights. FP8
    layers quantise theirs as they are, as `Engine.new_weights` does."""
    fp8 = {id(getattr(*of)) for module in model.modules() for of in weights_of(module)}
    rounded = {f"model.{name}": p.to(dtype) for name, p in model.named_parameters() if id(p) not in fp8}
    return functional_call(AnswerLogp(model), rounded, (answers,))


def answer_logp(model: Ling, answers: Sequence[Answer]) -> Tensor:
    """[T] fp32, with gradient: the model's log-probabilities of the answers' tokens, one answer after the other.

    All answers are one packed batch, and logits exist of 1,024 tokens at a time. The last token of an answer is no
    input, as in the engine. Where all answers have their routing, it is replayed: those experts compute, with weights
    from the model's own logits. Raises InputError for no answers, and for one without tokens or without a prompt, which
    predicts its first.
    """
    if not answers:
        raise InputError("there are no answers")
    for a in answers:
        if not a.ids or not a.prompt:
            raise InputError(f"an answer has no {'tokens' if a.prompt else 'prompt'}")
    device, inputs, rows, first = model.lm_head.weight.device, [], [], 0
    for a in answers:
        tokens = [*a.prompt, *a.ids[:-1]]
        inputs.append(torch.tensor(tokens))
        rows.append(torch.arange(first + len(a.prompt) - 1, first + len(tokens)))
        first += len(tokens)
    bounds = torch.tensor([0, *(len(t) for t in inputs)]).cumsum(0).int().to(device)
    targets = torch.tensor([t for a in answers for t in a.ids], device=device)
    batch = model.pack(torch.cat(inputs)[None].to(device), None, bounds)
    layout = BatchLayout(model.cos, model.sin, batch.positions, batch.cu_seqlens)
    if all(a.routing is not None for a in answers):
        experts = torch.cat([a.routing for a in answers])[None].to(device)  # type: ignore[misc]
        layout = layout._replace(experts=model.forced(experts, batch.ids[None], batch))
    h, _ = model.backbone(batch.ids, layout)
    h = h[torch.cat(rows).to(device)]
    if isinstance(model.lm_head, PinnedLinear):
        return target_logp(h, model.lm_head.weight, targets)
    return -linear_cross_entropy(h, model.lm_head.weight, targets, reduction="none")
