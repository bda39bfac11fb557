"""The engine as a model of lm-evaluation-harness, under the name ling_kernels.

    python -m ling_kernels.integrations.lm_eval --model_args pretrained=DIR --tasks mmlu,gsm8k

The flags are those of `lm_eval run`. In Python: import this module, then lm_eval.simple_evaluate(model="ling_kernels",
model_args=dict(pretrained=DIR), ...).
"""

import argparse
import logging
import sys
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from ..commands import command
from ..errors import InputError, integer
from ..generate import Engine, Request, Sampling
from ..generate.cli import find_tokenizer, load_options, resolve_checkpoint, stop_token_ids
from ..generate.engine import raise_error
from ..generate.text import StoppedText
from ..model import load_model
from .versions import MissingPackage, require

try:
    api, registry, utils, model_utils = (
        require(f"lm_eval.{module}", "lm_eval", ">=0.4.11")
        for module in ("api.model", "api.registry", "utils", "models.utils")
    )
except MissingPackage as error:
    if __name__ != "__main__":
        raise
    print(f"error: {error}", file=sys.stderr)
    sys.exit(2)
TemplateLM: Any = api.TemplateLM
PRECISIONS = ("auto", "fp32", "bf16", "fp8")
SAMPLING = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}  # of gen_kwargs, as in Sampling
MAX_RUNNING = 64  # sequences per pass
LM_EVALS_DEVICE = "cuda:0"  # what its command line passes where no --device is given

logger = logging.getLogger(__name__)


class Job:
    """A request in the engine, and its text so far."""

    def __init__(self, index: int, request: Request, text: StoppedText):
        self.index, self.request, self.text = index, request, text
        self.seen, self.pieces = 0, [""]

    def read(self, hidden: set[int]) -> None:
        """Take the new tokens into the text, without `hidden` ones."""
        new = self.request.new_tokens_from(self.seen)
        self.seen += len(new)
        self.pieces += [self.text.add(token) for token in new if token not in hidden]


@registry.register_model("ling_kernels")
class LingLM(TemplateLM):
    """pretrained: a checkpoint folder with config.json, safetensors and a tokenizer.json, or tokenizer: the path of
    another, or "bytes". device: auto, cpu, cuda or cuda:N. precision: auto (bf16 on a GPU, fp32 on a CPU), fp32, bf16,
    fp8. batch_size: sequences per pass; auto and 1, lm_eval's default, give 64. max_length: positions to use, default
    all that the model has. seed: of sampled answers. Texts are encoded as lm_eval's other models do, so the names of
    special tokens in a task's data are special tokens. Raises InputError.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        tokenizer: str | None = None,
        device: str | None = None,
        precision: str = "auto",
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        seed: int = 1234,
        **unknown,
    ):
        super().__init__()
        if unknown:
            known = "pretrained, tokenizer, device, precision, max_length, seed"
            raise InputError(f"--model_args has no {', '.join(unknown)}: there are {known}")
        if pretrained is None:
            raise InputError("--model_args needs pretrained=DIR, a checkpoint folder")
        if precision not in PRECISIONS:
            raise InputError(f"precision is {precision!r}, none of {', '.join(PRECISIONS)}")
        config, folder = resolve_checkpoint(str(pretrained))
        device = "auto" if device in (None, LM_EVALS_DEVICE) else device
        flags = argparse.Namespace(device=device, precision=precision, fp8_head=False)
        self.tokenizer = find_tokenizer(tokenizer, folder, config)
        self.engine = Engine(load_model(folder, **load_options(flags)), max_running=running(batch_size))
        # lm_eval's length counts inputs alone; the engine needs a position more for the last target and a new token.
        self.max_length = config.max_positions - 2
        if max_length is not None and integer("max_length", max_length, 2) > self.max_length:
            raise InputError(
                f"max_length is {max_length}; the model has {self.max_length} positions, less the new token"
            )
        self.max_length = max_length or self.max_length
        self.stop = stop_token_ids(config, self.tokenizer, folder)
        self.name, self.seed, self._device = folder.name, integer("seed", seed, 0), self.engine.device
        backend = self.tokenizer.backend
        added = {} if backend is None else backend.get_added_tokens_decoder()
        special = self.tokenizer.control_tokens.values() if backend is None else [i for i in added if added[i].special]
        self.special = set(special)  # they leave the text of an answer

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without a context."""
        return self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return self.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs) -> list[int]:
        return self.tokenizer.encode(string, special=True)

    def apply_chat_template(self, chat_history: list[dict], add_generation_prompt: bool = True) -> str:
        """Without a generation prompt the last message is the beginning of the answer."""
        if add_generation_prompt:
            return str(self.tokenizer.apply_chat_template(chat_history))
        return str(self.tokenizer.apply_chat_template(chat_history[:-1])) + chat_history[-1]["content"]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        template = super().chat_template(chat_template)
        logger.info("chat template of %s: %s", self.name, template)
        return template

    def serve(self, submissions: Iterable[tuple[list[int], list[str], dict]]) -> Iterator[Job]:
        """Run (prompt, stop strings, options of Engine.submit), and yield them as they finish."""
        rest = enumerate(submissions)
        jobs: list[Job] = []
        limit = 2 * len(self.engine.scheduler.lanes)  # so that a finished sequence is replaced at once
        while True:
            for index, (prompt, stop, options) in islice(rest, limit - len(jobs)):
                text = StoppedText(self.tokenizer, stop, prompt)
                jobs.append(Job(index, self.engine.submit(prompt, **options), text))
            if not jobs:
                return
            self.engine.step()
            for job in jobs:
                job.read(self.special)
                if job.text.found:
                    self.engine.cancel(job.request)
                if job.request.finished:
                    raise_error(job.request)
                    yield job
            jobs = [job for job in jobs if not job.request.finished]

    def _loglikelihood_tokens(self, requests: list, disable_tqdm: bool = False, **kwargs) -> list[tuple[float, bool]]:
        """requests: (key, context, continuation) with ids -> (log-probability in nats, whether greedy decoding would
        give the continuation). What is longer than the model loses tokens on the left."""
        if (longest := max((len(ids) for _, _, ids in requests), default=0)) > self.max_length:
            raise InputError(f"a continuation of {longest} tokens exceeds the model's {self.max_length} positions")
        # lm_eval moves the spaces at a context's end into the continuation, which may leave no context.
        whole = [(context or [self.prefix_token_id]) + continuation for _, context, continuation in requests]
        prompts = [ids[-self.max_length - 1 :] for ids in whole]
        # The prefix cache gives the context, which several continuations have in common.
        starts = [len(ids) - len(continuation) for ids, (_, _, continuation) in zip(prompts, requests, strict=True)]
        if min(starts, default=1) < 1:
            raise InputError(f"a continuation has more than the model's {self.max_length} positions")
        submissions = (
            (ids, [], dict(max_new_tokens=1, prompt_logprobs=1, prompt_logprobs_start=start))
            for ids, start in zip(prompts, starts, strict=True)
        )
        results: list[Any] = [None] * len(requests)
        for job in progress(self.serve(submissions), "loglikelihood", prompts, disable_tqdm):
            key, scores = requests[job.index][0], job.request.prompt_logprobs
            greedy = all(score.top[0][0] == score.token for score in scores)
            results[job.index] = sum(score.logprob for score in scores), greedy
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, results[job.index])
        return results

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """The log-probability of whole texts, in nats, in windows of max_length."""
        windows = []
        for i, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            pairs = utils.get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            windows += [(i, *utils.make_disjoint_window(pair)) for pair in pairs]
        scores = self._loglikelihood_tokens([(None, *pair) for _, *pair in windows], disable_tqdm)
        totals = [0.0] * len(requests)
        for (i, *_), (logprob, _) in zip(windows, scores, strict=True):
            totals[i] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """The answers, up to an end token or a string of `until`. A longer context loses tokens on the left."""
        results = [""] * len(requests)
        jobs = self.serve(self.submission(i, *request.args) for i, request in enumerate(requests))
        for job in progress(jobs, "generate_until", requests, disable_tqdm):
            results[job.index] = "".join(job.pieces) + job.text.end()
            self.cache_hook.add_partial("generate_until", requests[job.index].args, results[job.index])
        return results

    def submission(self, index: int, context: str, gen_kwargs: dict) -> tuple[list[int], list[str], dict]:
        """The prompt, stop strings and options of a request. Raises InputError for unknown gen_kwargs."""
        wanted = model_utils.normalize_gen_kwargs(gen_kwargs, 256)
        until, new = wanted.pop("until", None) or [], wanted.pop("max_gen_toks")
        if not wanted.pop("do_sample"):
            wanted["temperature"] = 0.0
        if unknown := wanted.keys() - SAMPLING:
            raise InputError(f"gen_kwargs has {min(unknown)}; the engine knows {', '.join(sorted(SAMPLING))}")
        if new >= self.max_length:
            raise InputError(f"max_gen_toks is {new}; prompt and answer have {self.max_length} positions")
        ids = self.tok_encode(context)[new - self.max_length :] or [self.prefix_token_id]
        vocabulary = self.tokenizer.vocab
        stop = self.stop | {vocabulary[text] for text in until if vocabulary.get(text) in self.special}
        sampling = Sampling(**wanted, seed=self.seed + index)
        texts = [text for text in until if text]
        return ids, texts, dict(sampling=sampling, max_new_tokens=new, stop_token_ids=stop)


def running(batch_size: int | str | None) -> int:
    """Sequences per pass of --batch_size, whose default is 1."""
    text = str(batch_size or 1)
    if text.startswith("auto") or text == "1":
        return MAX_RUNNING
    if not text.isdecimal():
        raise InputError(f"--batch_size is {batch_size!r}; it must be a number or auto")
    return int(text)


def progress(jobs: Iterator[Job], name: str, requests: list, quiet: bool) -> Iterable[Job]:
    from tqdm import tqdm  # which lm_eval needs

    return tqdm(jobs, desc=f"Running {name} requests", total=len(requests), disable=quiet)


@command
def main() -> None:
    """`lm_eval run --model ling_kernels` with the flags of the command line."""
    sys.argv[1:1] = ["run", "--model", "ling_kernels"]
    require("lm_eval.__main__", "lm_eval").cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
