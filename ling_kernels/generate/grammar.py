"""Structured output: a grammar says which tokens may come next, as a mask of bits that the engine lays over the logits.

    grammars = Grammars(tokenizer, model.config.vocab_size)
    engine.generate([ids], grammar=grammars.json({"type": "object", "properties": ...}))

The package llguidance reads schemas, regular expressions and Lark grammars, and makes the masks, in threads of its own
here: a request's next mask while the pass of other requests runs, on a CPU while its own layers run.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import InputError, one_line
from ..tokenizer import Tokenizer, byte_tokenizer_json

MISSING = "structured output needs the package llguidance: pip install '.[structured]'"
# Between the parts of a JSON text. Any amount of it would let a model write blanks without end.
WHITESPACE = r"( |\n {0,20})"
GRAMMARS = 64  # that are kept


WORKERS: ThreadPoolExecutor


def start_workers() -> None:
    global WORKERS
    WORKERS = ThreadPoolExecutor(4, "grammar")  # its threads start when there is work


start_workers()
os.register_at_fork(after_in_child=start_workers)  # the parent's threads are not there


class Grammars:
    """Makes grammars over a tokenizer's tokens; vocabulary: the model's rows, which may be more.

    For a large vocabulary it takes about a second, and a grammar some milliseconds. guarded: a process of their own
    tries grammars first, as those of strangers may need hours or more stack than there is. Raises InputError without
    llguidance.
    """

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, guarded: bool = False):
        try:
            from llguidance import LLMatcher, LLTokenizer

            from .grammar_check import read_grammar
        except ImportError:
            raise InputError(MISSING) from None
        backend, self.vocab, self.end = tokenizer.backend, tokenizer.vocab, tokenizer.eos_id
        text = json.dumps(byte_tokenizer_json()) if backend is None else backend.to_str()
        try:
            self.tokens = LLTokenizer(text, n_vocab=vocabulary, eos_token=self.end)
        except ValueError as error:
            raise InputError(f"llguidance cannot read the tokenizer: {error}") from None
        self.matcher, self.read = LLMatcher, read_grammar
        self.trial = Trial(text, vocabulary, self.end) if guarded else None
        self.cache: OrderedDict[str, Grammar] = OrderedDict()  # by source, the last used one last
        self.lock = threading.Lock()

    def json(self, schema: dict[str, Any] | None = None) -> "Grammar":
        """JSON of a schema, or any object. Raises InputError for a schema that llguidance cannot follow."""
        schema = {"type": "object"} if schema is None else schema
        if not isinstance(schema, dict):
            raise InputError(f"the schema is {schema!r:.80}; it must be a JSON object")
        return self._grammar(self.json_source, schema)

    def json_source(self, schema: dict[str, Any]) -> str:
        try:
            text = json.dumps(schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(f"the schema is no JSON: {error}") from None
        return self.matcher.grammar_from_json_schema(text, overrides={"whitespace_pattern": WHITESPACE})

    def regex(self, pattern: str) -> "Grammar":
        """Text that a regular expression matches from its beginning to its end."""
        return self._grammar(self.matcher.grammar_from_regex, pattern)

    def lark(self, grammar: str) -> "Grammar":
        """Text of a context-free grammar in Lark's notation, whose first rule is `start`."""
        return self._grammar(self.matcher.grammar_from_lark, grammar)

    def choice(self, texts: Sequence[str]) -> "Grammar":
        """One of these texts. Raises InputError for none."""
        if not texts or not all(isinstance(text, str) for text in texts):
            raise InputError(f"the choices are {texts!r:.80}; they must be texts")
        return self.lark("start: TEXT\nTEXT: " + " | ".join(json.dumps(text, ensure_ascii=False) for text in texts))

    def around(self, lark: str, inner: dict[str, "Grammar"]) -> "Grammar":
        """A Lark grammar around others, which it calls @name."""
        parts = []
        for name, grammar in inner.items():
            first, *rest = json.loads(grammar.source)["grammars"]
            parts += [first | {"name": name}, *rest]
        return self.compiled(json.dumps({"grammars": [{"lark_grammar": lark}, *parts]}))

    def token(self, name: str) -> str:
        """In a Lark grammar: the control token of this name, or its text where the tokenizer has none."""
        token = self.vocab.get(name)
        return json.dumps(name) if token is None or not self.tokens.is_special_token(token) else f"<[{token}]>"

    def _grammar(self, source, definition) -> "Grammar":
        try:
            text = source(definition)
        except (TypeError, ValueError) as error:
            raise InputError(f"the grammar is not readable: {one_line(str(error))}") from None
        return self.compiled(text if text.startswith("{") else json.dumps({"grammars": [{"lark_grammar": text}]}))

    def known(self, source: str) -> "Grammar | None":
        """One of the last that were used."""
        with self.lock:
            if source in self.cache:
                self.cache.move_to_end(source)
            return self.cache.get(source)

    def compiled(self, source: str) -> "Grammar":
        """A known grammar, or a new one. Raises InputError."""
        if (grammar := self.known(source)) is not None:
            return grammar
        fault = self.trial.fault(source) if self.trial else ""
        if not fault:
            matcher, fault = self.read(self.tokens, source)
        if fault:
            raise InputError(f"the grammar is not readable: {plain(fault)}")
        grammar = Grammar(source, matcher, self.end, self.tokens.vocab_size)
        with self.lock:
            self.cache[source] = grammar
            if len(self.cache) > GRAMMARS:
                self.cache.popitem(last=False)
        return grammar


class Trial:
    """A process that reads grammars first (grammar_check.py); it starts with the first one, and again after its end."""

    def __init__(self, *tokenizer):
        self.tokenizer, self.lock, self.process = tokenizer, threading.Lock(), None

    def fault(self, source: str) -> str:
        """What is wrong with a grammar, or ""."""
        with self.lock:
            if self.process is None:
                command, pipe = [sys.executable, str(Path(__file__).with_name("grammar_check.py"))], subprocess.PIPE
                self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
                self._send(self.tokenizer)
            self._send(source)
            if answer := self.process.stdout.readline():
                return json.loads(answer)
            self.process.communicate()
            self.process = None
            return "it needs too much time, memory or nesting"

    def _send(self, message) -> None:
        with contextlib.suppress(BrokenPipeError):  # the process has ended, which its answer shows
            self.process.stdin.write(f"{json.dumps(message)}\n")
            self.process.stdin.flush()


class Grammar:
    """A compiled grammar, which requests may share."""

    def __init__(self, source: str, matcher, end: int, vocabulary: int):
        self.source, self.matcher, self.end, self.vocabulary = source, matcher, end, vocabulary


class Guide:
    """A request's place in its grammar, and the masks of its next pass.

    mask [rows, ceil(V / 32) * 4] uint8: bit t of a row says whether token t may come after the last token (row 0), or
    after the draft token of row - 1. ends: the tokens that end the request; they may come where the grammar may end.
    """

    def __init__(self, grammar: Grammar, rows: int, ends: frozenset[int], pin: bool):
        self.grammar, self.matcher, self.ends = grammar, grammar.matcher.deep_copy(), ends
        self.mask = torch.full((rows, mask_bytes(grammar.vocabulary)), 255, dtype=torch.uint8, pin_memory=pin)
        self.fault: str | None = None  # why no mask could be made
        self.prepare([])

    def prepare(self, drafts: Sequence[int]) -> None:
        """Start to make the masks for the next pass, which verifies these draft tokens."""
        self.ready: Future = WORKERS.submit(self._fill, drafts)

    def wait(self) -> torch.Tensor:
        """The masks. The pass that used the last ones must have ended before they were prepared."""
        self.ready.result()
        return self.mask

    def accept(self, token: int) -> bool:
        """Go on by a token of the request; False if the grammar does not have it there."""
        if self.fault is None and not self.matcher.consume_token(token):
            self.fault = f"the grammar does not allow token {token}: {plain(self.matcher.get_error())}"
        return self.fault is None

    @property
    def complete(self) -> bool:
        """Whether nothing can follow."""
        return self.fault is None and self.matcher.is_stopped()

    def _fill(self, drafts: Sequence[int]) -> None:
        """Fill `mask`, up to the first draft token that cannot come: later rows do not count. Copies of the matcher
        follow the draft tokens, as it cannot be rolled back in grammars with `stop=` or `max_tokens=`."""
        matcher = self.matcher
        try:
            for row, token in enumerate([*drafts, -1]):
                self._fill_row(row, matcher)
                ends = token in self.ends or token == self.grammar.end
                if ends or not 0 <= token < self.grammar.vocabulary:
                    break
                matcher = matcher.deep_copy()
                if not matcher.try_consume_tokens([token]):
                    break
        except Exception as error:  # of this request, not of the pass
            self.fault, self.mask[:] = str(error), 255

    def _fill_row(self, row: int, matcher) -> None:
        bits = self.mask[row].numpy()
        bits[:] = np.frombuffer(matcher.compute_bitmask(), np.uint8)[: len(bits)]  # it may give a word more
        may_end = matcher.is_accepting()
        for token in {*self.ends, self.grammar.end}:
            bit = 1 << (token & 7)
            bits[token >> 3] &= ~bit & 255
            if may_end and token in self.ends:
                bits[token >> 3] |= bit
        if matcher.is_error() or not bits.any():
            raise InputError(f"the grammar cannot go on: {plain(matcher.get_error()) or 'no token fits'}")


def plain(fault: str) -> str:
    """llguidance's words for a fault, without its name for a place where nothing can come."""
    return one_line(fault.replace("NoExtensionBias", "no text fits it").replace("<non-verbose/>", ""))[:300]


def mask_bytes(vocabulary: int) -> int:
    return -(-vocabulary // 32) * 4
