"""Characters that stand in for control tokens in the messages of a chat while its template renders.

A control token that is spelled out in a message must stay text. While a template renders, one letter of every control
token, such as < of <role>, is a stand-in character wherever a message has it. Whatever the template does to the text, a
control token is its own only if it wrote that letter.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from .errors import InputError

THOUGHT = ("<think>", "</think>")
STAND_INS = range(0xF0000, 0x10FFFE)  # private use: no meaning in any text


class StandIns:
    """A character for one letter of each control token, of those that no message uses.

    needed: whether a message has such a letter. inside: the control tokens that a message spells out.
    """

    def __init__(self, names: Iterable[str], texts: Sequence[str]):
        names = sorted(names, key=len, reverse=True)
        letters = {next((letter for letter in name if not letter.isalnum()), name[0]) for name in names}
        used = set().union(*texts)
        free = [*islice((chr(code) for code in STAND_INS if chr(code) not in used), len(letters))]
        if len(free) < len(letters):
            raise InputError("the messages use every private character of Unicode, so none can stand for their tokens")
        self.hidden = str.maketrans(dict(zip(sorted(letters), free, strict=True)))
        self.shown = {ord(stand_in): chr(letter) for letter, stand_in in self.hidden.items()}
        self.needed = not letters.isdisjoint(used)
        self.inside = [name for name in names if any(name in text for text in texts)]
        self.pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def hide(self, text: str) -> str:
        return str.translate(text, self.hidden)

    def show(self, text: str) -> str:
        return str.translate(text, self.shown)

    def tokens(self, text: str) -> list[tuple[int, int]]:
        """Where the control tokens of a text begin and end."""
        return [match.span() for match in self.pattern.finditer(text)]

    def content(self, message: Any, thoughts: bool) -> Any:
        """A message with stand-ins; with `thoughts` the tags of an answer's thought stay as they are."""
        keep = THOUGHT if thoughts and isinstance(message, Mapping) and message.get("role") == "assistant" else ()

        def hide(text: str) -> Content:
            hidden = self.hide(text)
            for name in keep:
                hidden = hidden.replace(self.hide(name), name)
            return Content.of(hidden, self)

        return map_text(message, hide)


class Content(str):
    """Text of a message with stand-ins. Its methods take text as if there were none, so that a template can cut a
    thought at </think>."""

    _stand_ins: StandIns

    @classmethod
    def of(cls, text: str, stand_ins: StandIns) -> "Content":
        content = cls(text)
        content._stand_ins = stand_ins
        return content

    def __str__(self) -> str:  # str(content), as in Jinja's filters, keeps the methods below
        return self

    def __eq__(self, other) -> bool:
        return str.__eq__(self, self._hidden(other))

    def __ne__(self, other) -> bool:
        return not self == other

    __hash__ = str.__hash__

    def _hidden(self, value: Any) -> Any:
        is_text = isinstance(value, str) and not isinstance(value, Content)
        return self._stand_ins.hide(value) if is_text else value

    def replace(self, old, new, count=-1):
        """A control token that the template puts in is its own."""
        return Content.of(str.replace(self, self._hidden(old), new, count), self._stand_ins)


def _method(name: str) -> Callable:
    """str's method with hidden arguments, whose results are Content."""
    original = getattr(str, name)

    def method(self, *args, **options):
        args = [tuple(map(self._hidden, a)) if isinstance(a, tuple) else self._hidden(a) for a in args]
        result = original(self, *args, **{k: self._hidden(v) for k, v in options.items()})
        if isinstance(result, list | tuple):
            return type(result)(Content.of(text, self._stand_ins) for text in result)
        return Content.of(result, self._stand_ins) if isinstance(result, str) else result

    return method


for _name in ("strip lstrip rstrip split rsplit splitlines partition rpartition removeprefix removesuffix startswith"
              " endswith find rfind index rindex count lower upper capitalize title __contains__ __getitem__"
              ).split():  # fmt: skip
    setattr(Content, _name, _method(_name))


def map_text(value: Any, change: Callable[[str], str]) -> Any:
    """value with every text in it changed, also the keys of objects."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {map_text(k, change): map_text(v, change) for k, v in value.items()}
    return [map_text(v, change) for v in value] if isinstance(value, list | tuple) else value


def texts_in(value: Any) -> Iterator[str]:
    """Every text in value, also the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in [*value.keys(), *value.values()] if isinstance(value, Mapping) else value:
            yield from texts_in(part)
