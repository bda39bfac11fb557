"""Parts of an answer's text in Ling's format: a thought, plain content, calls of tools.

<think> thought </think> content <tool_call> {"name": ..., "arguments": {...}} </tool_call>
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from ...tokenizer import Tokenizer

THINK, END_THINK, CALL, END_CALL = "<think>", "</think>", "<tool_call>", "</tool_call>"

TAGS = (THINK, END_THINK, CALL, END_CALL)


class Part(NamedTuple):
    kind: str  # content, reasoning or call
    text: str
    call: dict[str, Any] | None = None  # name, and arguments as JSON text


class TextParts:
    """Splits text as it comes: `add` a piece, `end` gives what was held back, as a tag may have been unfinished.

    thinking: the prompt has already opened a thought. calls: whether calls of tools are looked for. A call that is not
    JSON with a name stays content, so that nothing of an answer is lost.
    """

    def __init__(self, thinking: bool = False, calls: bool = False):
        self.thinking, self.calls = thinking, calls
        self.start = not thinking  # a thought can only begin the answer
        self.calling = False
        self.trim = thinking  # line ends after a tag are not part of the text
        self.held = ""

    def add(self, text: str) -> list[Part]:
        self.held += text
        return [part for part in self._parts(False) if part.text or part.call]

    def end(self) -> list[Part]:
        parts = [part for part in self._parts(True) if part.text or part.call]
        self.held = ""
        return parts

    def _parts(self, last: bool) -> Iterator[Part]:
        while self.held:
            if self.start:
                stripped = self.held.lstrip()
                if stripped.startswith(THINK):
                    self.held, self.thinking, self.start, self.trim = stripped[len(THINK) :], True, False, True
                    continue
                if not last and THINK.startswith(stripped):  # also where only blanks came so far
                    return
                self.start = False
            if self.calling:
                body, tag, rest = self.held.partition(END_CALL)
                if not tag and not last:
                    return
                call = parse_call(body)
                yield Part("call", "", call) if call and tag else Part("content", CALL + body + tag)
                self.held, self.calling, self.trim = rest, False, bool(call)
                continue
            tag = END_THINK if self.thinking else CALL if self.calls else ""
            text, found, rest = self.held.partition(tag) if tag else (self.held, "", "")
            if not found:
                certain = len(text) if last or not tag else len(text.removesuffix(started(text, tag)).rstrip("\n"))
                text, self.held = text[:certain], text[certain:]
                yield self._text(text)
                return
            yield self._text(text.rstrip("\n"))
            self.held, self.trim = rest, self.thinking
            self.calling, self.thinking = not self.thinking, False

    def _text(self, text: str) -> Part:
        if self.trim:
            text = text.lstrip("\n")
            self.trim = not text
        return Part("reasoning" if self.thinking else "content", text)


def opens_thought(tokenizer: Tokenizer, prompt: list[int]) -> bool:
    return tokenizer.decode(prompt[-16:]).rstrip().endswith(THINK)  # it may be 7 tokens


def started(text: str, tag: str) -> str:
    """The end of text that may begin the tag."""
    return next((tag[:n] for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), "")


def parse_call(body: str) -> dict[str, str] | None:
    """{"name", "arguments": JSON text} of a call; None for anything else."""
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(call, dict) and isinstance(call.get("name"), str) and call["name"]):
        return None
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        return {"name": call["name"], "arguments": arguments}
    return {"name": call["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
