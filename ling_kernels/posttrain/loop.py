"""A loop of reinforcement learning on one device: the engine answers, rewards judge, the trainer's optimizer learns.

One step: the engine gets the weights and writes `samples` answers to each of `prompts` problems; reward functions judge
them in processes of their own; `updates` optimizer steps follow, each over its share of the problems.
"""

import argparse
import copy
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor

from ..errors import Diverged, InputError
from ..generate import Engine
from ..model import Ling
from ..nn.batch_invariant import batch_invariant_
from ..nn.fp8_inference import quantize_for_inference_
from ..train.prepare.device import deterministic
from ..train.settings import flag
from .learner import MAX_BAD, Learner, LearnerSettings
from .policy import ICEPOP, METHODS, PolicyLoss, group_advantages, icepop, policy_loss
from .reward_processes import RewardProcesses, Score
from .rewards import evo_cot_rewards
from .rollout import Answer, rollout, rounded_answer_logp
from .sentences import sentence_lengths
from .tasks import TASKS, Problem, exact

PROMPT = 256  # tokens for which the engine's cache has room in each answer; with longer prompts fewer run at once
RIGHT = 0.5  # a reward above counts as correct


@dataclass(frozen=True)
class LoopSettings(LearnerSettings):
    """Settings of a loop, named as the flags of `python -m ling_kernels.posttrain.rl`."""

    task: str = flag("sorting", "where the problems come from", choices=tuple(TASKS))
    method: str = flag("lpo", "the policy loss", choices=tuple(METHODS))
    prompts: int = flag(16, "problems of a step", least=1)
    samples: int = flag(8, "answers to each problem, a group", least=2)
    updates: int = flag(2, "optimizer steps of a step, each over its share of the problems", least=1)
    new_tokens: int = flag(40, "tokens of an answer at most", least=1)
    temperature: float = flag(1.0, "of the answers; losses are of the policy at temperature 1", above=0)
    icepop: str = flag(
        "none", "leaves out tokens that trainer and engine rate too differently: 0.5 to 5 times, or 0.5 to 2",
        choices=("none", *ICEPOP),
    )  # fmt: skip
    replay_routing: bool = flag(
        False, "the trainer takes the experts that the engine chose, with weights of its own",
        action=argparse.BooleanOptionalAction, shown="off",
    )  # fmt: skip
    batch_invariant: bool = flag(
        False, "engine and trainer agree to the bit, whatever the batch; in bf16, fp8 and on a CPU fp32, and slower",
        action=argparse.BooleanOptionalAction, shown="off",
    )  # fmt: skip
    evo_cot: float | None = flag(None, "Evo-CoT's reward, with this weight of the length", least=0, shown="off")
    group_reward: str | None = flag(
        None, "MODULE:FUNCTION, a function(responses, answer) that gives all answers of a group their rewards, such as"
        " those of a judge of pairs; in place of the task's reward", shown="none",
    )  # fmt: skip
    kl: float = flag(0.0, "weight of the divergence from the model at the start", least=0)
    reward_timeout: float = flag(5.0, "seconds after which a reward function counts as failed", above=0)
    reward_processes: int = flag(2, "processes that compute rewards", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts % self.updates:
            raise InputError(f"--updates {self.updates} does not divide --prompts {self.prompts}")
        if self.batch_invariant and self.lora_rank:
            raise InputError(f"--batch-invariant with --lora-rank {self.lora_rank}: adapters' products are not pinned")
        if self.group_reward and self.evo_cot is not None:
            raise InputError("--group-reward with --evo-cot: each says what the rewards are; give one")


class Loop(Learner):
    """Trains a model on problems that a function can judge; `python -m ling_kernels.posttrain.rl` is a loop over it.

        loop = Loop(LoopSettings(task="arithmetic", steps=100), "runs/start/model", out="runs/mine")
        while loop.step_done < loop.settings.steps:
            print(loop.step())
        loop.save()

    model: a folder with weights and tokenizer. out: the run's folder, new or empty. problems: draws a `Problem` from a
    random.Random; default: the setting `task`. reward(response, answer) -> float, of a module that can be imported;
    default: `exact`. Both must be given again to `resume`. The setting `group_reward` names a function(responses,
    answer) that gives the responses to one problem their rewards together, in place of `reward`.

    Weights are fp32 and computed with in the precision of the settings. In fp32 engine and trainer share the model, in
    bf16 and fp8 the engine has a copy, which gets the weights in place. A step depends on settings and weights alone,
    so that a resumed run has the bits of one that was never interrupted (on a CPU).

    Raises InputError for what cannot work, before anything is written.
    """

    kind, key, about = LoopSettings, "loop", "a loop of reinforcement learning"

    def __init__(
        self,
        settings: LoopSettings,
        model: str | Path,
        out: str | Path,
        problems: Callable[[Random], Problem] | None = None,
        reward: Callable[..., float] | str = exact,
    ):
        self._begin(settings, Path(model), str(Path(model).absolute()), problems=problems, reward=reward)
        self._new_folder(out)

    @classmethod
    def resume(
        cls,
        run: str | Path,
        steps: int | None = None,
        problems: Callable[[Random], Problem] | None = None,
        reward: Callable[..., float] | str = exact,
    ) -> "Loop":
        """Continue a run from its latest checkpoint, or from the checkpoint that `run` names, with more `steps`. A run
        that stopped before its first checkpoint begins again."""
        loop = cls._resumed(run, steps, problems=problems, reward=reward)
        loop.engine.policy_version = loop.step_done
        return loop

    def _begin(self, settings, folder, source, state=None, problems=None, reward=exact) -> None:
        super()._begin(settings, folder, source, state)
        s = self.settings
        self.problems = problems or TASKS[s.task]
        if s.group_reward and reward is not exact:
            raise InputError(f"group_reward {s.group_reward} and a reward of each answer: give one")
        if s.new_tokens >= self.model.config.max_positions:
            raise InputError(f"--new-tokens {s.new_tokens}: the model has {self.model.config.max_positions} positions")
        if s.batch_invariant:
            if s.replay_routing and self.precision == torch.bfloat16:  # weights of forced experts have their own kernel
                raise InputError("--replay-routing with --batch-invariant: trainer and engine choose alike without it")
            batch_invariant_(self.model, self.precision)
        actor = self.model
        if self.precision != torch.float32:
            actor = copy.deepcopy(self.model).to(self.precision)
            quantize_for_inference_(actor)  # FP8 layers; `new_weights` fills them from the fp32 weights
        answers = s.prompts * s.samples
        room = min(self.model.config.max_positions, PROMPT + s.new_tokens)
        self.engine = Engine(
            actor, cache_tokens=answers * room, max_running=answers, max_rows=max(answers, 2048),
            record_routing=s.replay_routing, batch_invariant=s.batch_invariant,
        )  # fmt: skip
        self.make_reference(bool(s.kl))
        judges = s.group_reward or reward, s.reward_processes, s.reward_timeout
        self.rewards = RewardProcesses(*judges, of_group=bool(s.group_reward))
        self.ends = sorted(self.tokenizer.ends())

    def step(self) -> dict:
        """One step; returns its record, the line of metrics.jsonl:

        reward, its mean, and reward_std; correct, the share of rewards above 0.5; failed/KIND, failed rewards by kind;
        undecided, the share of groups whose rewards are all equal; answer_tokens, their mean, and cut, the share that
        reached new_tokens; mismatch_mean and mismatch_max, of |log-probability by the trainer - by the engine| before
        the updates; left_out, the share of tokens that IcePop leaves out; means over the updates of loss, clipped,
        ratio, kl, grad_norm; lr; skipped updates, if any; policy_version; tokens so far; tokens_per_s and seconds.

        Raises Diverged after 5 skipped updates in a row.
        """
        s, start = self.settings, time.perf_counter()
        if self.step_done >= s.steps:
            raise InputError(f"all {s.steps} steps are done")
        problems = self.draw()
        with deterministic():
            answers = self.answer(problems)
            scores = self.judge(problems, answers)
            advantages = group_advantages(self.rewards_of(answers, scores)).flatten()
            with torch.no_grad():
                old = self.logp(self.model, answers)
                reference = self.reference_logp(answers) if s.kl else None
            engine_logp = torch.tensor([p for a in answers for p in a.logprobs], device=self.device)
            weights = None if s.icepop == "none" else icepop(old, engine_logp, s.icepop)
            learned = self.learn(answers, advantages, old, weights, reference)
        self.step_done += 1
        new = sum(len(a.prompt) + len(a.ids) for a in answers)
        self.tokens += new
        seconds, mismatch = time.perf_counter() - start, (old - engine_logp).abs()
        record = dict(step=self.step_done, **self.measured(answers, scores)) | learned
        record |= dict(mismatch_mean=mismatch.mean().item(), mismatch_max=mismatch.max().item())
        if weights is not None:
            record["left_out"] = (weights == 0).float().mean().item()
        record |= dict(tokens=self.tokens, tokens_per_s=new / seconds, seconds=seconds)
        if self.bad >= MAX_BAD:
            raise Diverged(f"no finite loss and gradient in {self.bad} updates up to step {self.step_done}", record)
        return record

    def logp(self, model: Ling, answers: Sequence[Answer]) -> Tensor:
        if self.settings.batch_invariant and self.precision == torch.bfloat16:  # under autocast the residuals are fp32
            return rounded_answer_logp(model, answers, self.precision)
        return super().logp(model, answers)

    def draw(self) -> list[Problem]:
        """The problems of the next step, which follow from seed and step."""
        random = Random(f"{self.settings.seed} {self.step_done}")
        drawn = [self.problems(random) for _ in range(self.settings.prompts)]
        for p in drawn:
            if not isinstance(p, Problem) or not isinstance(p.prompt, str):
                raise InputError(f"problems gave {p!r}, not a Problem with a text for its prompt")
        return drawn

    def answer(self, problems: Sequence[Problem]) -> list[Answer]:
        """The engine's answers, with the weights as they are now."""
        s = self.settings
        self.model.eval()  # the engine's mode; in fp32 it is the same module
        self.engine.new_weights(self.model)
        chats = (self.tokenizer.apply_chat_template([dict(role="user", content=p.prompt)]) for p in problems)
        prompts = [self.tokenizer.encode(chat, special=True) for chat in chats]
        seed = Random(f"answers {s.seed} {self.step_done}").randrange(1 << 62)
        answers = rollout(self.engine, prompts, s.samples, s.new_tokens, s.temperature, seed, self.ends)
        self.model.train()
        return answers

    def text(self, answer: Answer) -> str:
        """The answer without the token that ends it."""
        return self.tokenizer.decode([t for t in answer.ids if t not in self.ends])

    def judge(self, problems: Sequence[Problem], answers: Sequence[Answer]) -> list[Score]:
        samples, texts = self.settings.samples, [self.text(a) for a in answers]
        if self.settings.group_reward:
            groups = [texts[i : i + samples] for i in range(0, len(texts), samples)]
            return self.rewards([(group, p.answer) for group, p in zip(groups, problems, strict=True)])
        return self.rewards([(text, problems[i // samples].answer) for i, text in enumerate(texts)])

    def rewards_of(self, answers: Sequence[Answer], scores: Sequence[Score]) -> Tensor:
        """[prompts, samples]: the scores, or Evo-CoT's rewards from them."""
        s, values = self.settings, [score.value for score in scores]
        if s.evo_cot is not None:
            groups = [slice(i, i + s.samples) for i in range(0, len(answers), s.samples)]
            values = [reward for g in groups for reward in evo_cot_rewards(
                [self.text(a) for a in answers[g]], [len(a.ids) for a in answers[g]],
                [value > RIGHT for value in values[g]], s.evo_cot)]  # fmt: skip
        return torch.tensor(values, device=self.device).view(-1, s.samples)

    def learn(
        self, answers: Sequence[Answer], advantages: Tensor, old: Tensor, weights: Tensor | None, ref: Tensor | None
    ) -> dict:
        """The updates; returns means over them."""
        s, done, skipped = self.settings, Counter(), 0
        share, at = len(answers) // s.updates, 0
        for i in range(s.updates):
            part = slice(i * share, (i + 1) * share)
            tokens = slice(at, at := at + sum(len(a.ids) for a in answers[part]))
            out = self.loss(answers[part], advantages[part], old[tokens], *(
                None if t is None else t[tokens] for t in (weights, ref)))  # fmt: skip
            measured, sound = self.update(out, self.step_done * s.updates + i + 1)
            lr, skipped = measured.pop("lr"), skipped + (not sound)
            done.update({name: value / s.updates for name, value in measured.items()})
        return dict(done) | dict(lr=lr) | (dict(skipped=skipped) if skipped else {})

    def loss(
        self, answers: Sequence[Answer], advantages: Tensor, old: Tensor, weights: Tensor | None, ref: Tensor | None
    ) -> PolicyLoss:
        """The policy loss of one update's answers."""
        options, sentences = METHODS[self.settings.method], None
        if options["level"] == "sentence":
            each = [n for a in answers for n in sentence_lengths(self.tokenizer, a.ids)]
            sentences = torch.tensor(each, device=self.device)
        lengths = torch.tensor([len(a.ids) for a in answers], device=self.device)
        return policy_loss(
            self.logp(self.model, answers), old, advantages, lengths, **options, sentences=sentences,
            token_weights=weights, reference_logp=ref, kl=self.settings.kl,
        )  # fmt: skip

    def measured(self, answers: Sequence[Answer], scores: Sequence[Score]) -> dict:
        """Figures about answers and rewards."""
        rewards = torch.tensor([score.value for score in scores], dtype=torch.float64)
        groups, n = rewards.view(-1, self.settings.samples), len(answers)
        failed = Counter(score.failure for score in scores if score.failure)
        return dict(
            policy_version=answers[0].policy_version, reward=rewards.mean().item(), reward_std=rewards.std().item(),
            correct=sum(score.value > RIGHT for score in scores) / n,
            undecided=(groups == groups[:, :1]).all(1).double().mean().item(),
            answer_tokens=sum(len(a.ids) for a in answers) / n, cut=sum(a.finished == "length" for a in answers) / n,
            **{f"failed/{kind}": number for kind, number in sorted(failed.items())},
        )  # fmt: skip

    def close(self) -> None:
        """End the processes of the rewards."""
        self.rewards.close()
