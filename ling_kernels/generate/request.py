"""A request to the engine: what a caller may ask, and its progress."""

import operator
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from ..errors import InputError, integer
from ..model.config import LingConfig
from ..model.sample import Sampling
from .adapters import Adapter
from .grammar import Grammar, Guide
from .logprobs import MOST, TokenLogprob
from .pages.levels import Fetch

MOST_BIASES = 512  # tokens of a request whose logits are biased; end tokens count where min_new_tokens holds them off
DRAFT_SLACK = 3  # spare cache slots and positions per draft token, for rows computed past a sequence's end


def max_sequence_tokens(capacity: int, draft: int) -> int:
    """Longest prompt and output together in `capacity` cache slots or model positions."""
    return capacity - DRAFT_SLACK * draft


@dataclass(eq=False)
class Request:
    """One sequence: what was submitted, and its progress.

    finished is None while it is queued or running, then the finish reason: stop, length, cancelled, timeout or error.
    """

    prompt: list[int]
    sampling: Sampling
    max_new_tokens: int
    stop_token_ids: frozenset[int]  # they end the sequence and are not part of it
    deadline: float = float("inf")  # by time.monotonic()
    num_logprobs: int | None = None  # alternatives of each new token; None: no log-probabilities
    num_prompt_logprobs: int | None = None  # of the prompt's tokens from prompt_logprobs_start on
    prompt_logprobs_start: int = 1  # the first token has none
    min_new_tokens: int = 0  # no stop token comes before so many
    keep_stop: bool = False  # the stop token that ends the sequence is the last of its tokens
    policy_version: int = 0  # of the weights that it is computed with, see Engine.new_weights
    client: str = ""  # who shares the engine fairly with others
    priority: int = 0  # the smallest of a client's waiting requests is next
    adapter: Adapter | None = None  # over the model's weights

    tokens: list[int] = field(default_factory=list)  # prompt, and the new tokens that the host has
    computed: int = 0  # tokens with keys and values in the cache
    submitted: float = field(default_factory=time.monotonic)
    admitted: float | None = None  # time of the first admission
    cached_tokens: int | None = None  # prompt tokens found in the prefix cache at the first admission
    passes_in_flight: int = 0  # passes that decode it and whose tokens the host does not have yet
    has_drafts: bool = False  # the next pass verifies draft tokens
    cancelled: bool = False  # the next step finishes it
    finished: str | None = None
    error: Exception | None = None
    logprobs: list[TokenLogprob] = field(default_factory=list)  # of the new tokens
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)  # of the prompt's tokens from the start on
    guide: Guide | None = None  # of its grammar
    routing: Tensor | None = None  # of an engine that records it, when it has finished, see Engine
    pages: list[int] = field(default_factory=list)
    lane: int | None = None  # its row of the device state while it runs
    pages_on_device: int = 0  # leading pages already in the lane's block table
    page_hashes: list[bytes] = field(default_factory=list)  # of the full pages of tokens
    fetch: Fetch | None = None  # of its pages' files, before its first admission

    def __post_init__(self):
        self.tokens = list(self.prompt)
        self.seed = secrets.randbits(63) if self.sampling.seed is None else self.sampling.seed

    @property
    def edits(self) -> bool:
        """Whether it changes logits, see edits.py."""
        s = self.sampling
        return bool(s.logit_bias or s.presence_penalty or s.frequency_penalty or self.min_new_tokens)

    def biases(self) -> list[tuple[int, float, float]]:
        """(token, what is added to its logit, the position from which on it is not)."""
        until = len(self.prompt) + self.min_new_tokens - 1  # the row at this position gives the next token
        held_off = sorted(self.stop_token_ids) if self.min_new_tokens else []
        inf = float("inf")
        return [*((t, b, inf) for t, b in self.sampling.logit_bias), *((t, -inf, until) for t in held_off)]

    @property
    def prefix_seed(self) -> bytes:
        """Of the hashes of its pages, which another adapter's request must not share."""
        return b"" if self.adapter is None else self.adapter.seed

    @property
    def needs_prompt_rows(self) -> bool:
        """Whether the log-probabilities of its prompt are incomplete: then rows from first_scored_row on are needed."""
        wanted = len(self.prompt) - self.prompt_logprobs_start
        return self.num_prompt_logprobs is not None and len(self.prompt_logprobs) < wanted

    @property
    def first_scored_row(self) -> int:
        """The position of the first prompt token whose row gives a log-probability that is not known yet."""
        return self.prompt_logprobs_start - 1 + len(self.prompt_logprobs)

    @property
    def uncomputed(self) -> int:
        """Tokens without keys and values; 1 if the request only has to decode."""
        return len(self.tokens) - self.computed

    @property
    def new_tokens(self) -> list[int]:
        return self.new_tokens_from(0)

    def new_tokens_from(self, start: int) -> list[int]:
        """The new tokens without the first `start`."""
        return self.tokens[len(self.prompt) + start :]

    @property
    def num_new_tokens(self) -> int:
        return len(self.tokens) - len(self.prompt)


def new_request(
    config: LingConfig,
    draft: int,
    prompt: Sequence[int],
    sampling: Sampling | None,
    max_new_tokens: int | None,
    stop_token_ids: Iterable[int] | None,
    timeout: float | None,
    **fields,
) -> Request:
    """A checked request, see Engine.submit; fields: others of Request. Raises InputError."""
    prompt = token_list("a prompt", prompt)
    positions, vocabulary = max_sequence_tokens(config.max_positions, draft), config.vocab_size
    if max_new_tokens is None:
        max_new_tokens = max(1, min(256, positions - len(prompt)))
    if not prompt:
        raise InputError("a request needs a prompt of at least one token")
    max_new_tokens = integer("max_new_tokens", max_new_tokens, 1)
    if not isinstance(sampling, Sampling | None):
        raise InputError(f"sampling is {sampling!r}; it must be a Sampling")
    if timeout is not None and not (isinstance(timeout, int | float) and timeout == timeout):
        raise InputError(f"timeout is {timeout!r}; it must be a number of seconds")
    if len(prompt) + max_new_tokens > positions:
        less = f", minus {DRAFT_SLACK} per draft token" if draft else ""
        raise InputError(f"{len(prompt)} prompt tokens and {max_new_tokens} new tokens exceed the model's"
                         f" {config.max_positions} positions{less}")  # fmt: skip
    if unknown := [t for t in prompt if not 0 <= t < vocabulary]:
        raise InputError(f"token {unknown[0]} is outside the model's vocabulary of {vocabulary}")
    stop = token_list("stop_token_ids", config.eos_token_ids if stop_token_ids is None else stop_token_ids)
    deadline = float("inf") if timeout is None else time.monotonic() + timeout
    stop = frozenset(t for t in stop if 0 <= t < vocabulary)  # no other token can come
    request = Request(prompt, sampling or Sampling(), max_new_tokens, stop, deadline, **fields)
    for name, wanted in (("logprobs", request.num_logprobs), ("prompt_logprobs", request.num_prompt_logprobs)):
        if wanted is not None and integer(name, wanted, 0) > MOST:
            raise InputError(f"{name} is {wanted}; it must be at most {MOST}")
    check_start(request)
    integer("priority", request.priority, -(1 << 63))
    if not isinstance(request.client, str):
        raise InputError(f"client is {request.client!r}; it must be text")
    check_edits(request, vocabulary)
    return request


def add_guide(request: Request, grammar: Grammar | None, vocabulary: int, rows: int, pin: bool) -> None:
    """Let a grammar say which tokens may come, in passes of so many rows of the request. Raises InputError."""
    if grammar is None:
        return
    if not isinstance(grammar, Grammar):
        raise InputError(f"grammar is {grammar!r:.80}; it must be a Grammar, which Grammars makes")
    if grammar.vocabulary != vocabulary:
        raise InputError(f"the grammar is for {grammar.vocabulary} tokens, the model has {vocabulary}")
    if not request.stop_token_ids or request.min_new_tokens:
        raise InputError("a grammar decides where its text ends: it needs a stop token, and no min_new_tokens")
    request.guide = Guide(grammar, rows, request.stop_token_ids, pin)


def check_start(request: Request) -> None:
    start, tokens = integer("prompt_logprobs_start", request.prompt_logprobs_start, 1), len(request.prompt)
    if start > tokens:
        raise InputError(f"prompt_logprobs_start is {start}; the prompt has {tokens} tokens")
    if start > 1 and request.num_prompt_logprobs is None:
        raise InputError(f"prompt_logprobs_start is {start}: give prompt_logprobs too")


def check_edits(request: Request, vocabulary: int) -> None:
    if integer("min_new_tokens", request.min_new_tokens, 0) > request.max_new_tokens:
        raise InputError(
            f"min_new_tokens is {request.min_new_tokens}; it must be at most max_new_tokens, {request.max_new_tokens}"
        )
    if (count := len(request.biases())) > MOST_BIASES:
        raise InputError(f"logit_bias has, with the end tokens, {count} tokens; it may have at most {MOST_BIASES}")
    if unknown := [t for t, _ in request.sampling.logit_bias if not 0 <= t < vocabulary]:
        raise InputError(f"logit_bias has token {unknown[0]}, which is outside the model's vocabulary of {vocabulary}")


def token_list(name: str, tokens: Iterable[int]) -> list[int]:
    """Token ids as ints. Raises InputError for text and for numbers that are not whole."""
    try:
        return [operator.index(token) for token in tokens]
    except TypeError:
        raise InputError(f"{name} must be token ids, which a tokenizer encodes, not {tokens!r}") from None
