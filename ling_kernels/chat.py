"""Chat templates (Jinja), and which control tokens of a rendered chat are the template's own.

A control token that is spelled out in a message must stay text: otherwise a user's message could open a system turn.
While a template renders, every control token inside a message is one stand-in character that nothing else uses, so
that whatever the template does to the text, the token stays recognisable as the message's.
"""

import datetime
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from .errors import InputError

THOUGHT = ("<think>", "</think>")
STAND_INS = range(0xF0000, 0x10FFFE)  # private use: no meaning in any text


class ChatText(str):
    """A rendered chat. `parts` are (text, whether it is a control token of the template), or None where the messages
    hold no control token, so that all of the text's are the template's. A slice or a sum is plain text without parts.
    """

    parts: list[tuple[str, bool]] | None = None


class StandIns:
    """A character for each control token, of those that no message uses. `inside`: the tokens in the messages."""

    def __init__(self, names: Iterable[str], texts: Sequence[str]):
        names = sorted(names, key=len, reverse=True)
        used = {letter for text in texts for letter in set(text) if ord(letter) in STAND_INS}
        free = (chr(code) for code in STAND_INS if chr(code) not in used)
        self.letters = dict(zip(names, free, strict=False))
        if len(self.letters) < len(names):
            raise InputError("the messages use every private character of Unicode, so none can stand for their tokens")
        self.inside = [name for name in names if any(name in text for text in texts)]
        self.names = {ord(letter): name for name, letter in self.letters.items()}
        self.pattern = re.compile("|".join(map(re.escape, names)) or "(?!)")

    def hide(self, text: str) -> str:
        return self.pattern.sub(lambda match: self.letters[match[0]], text)

    def show(self, text: str) -> str:
        return text.translate(self.names)

    def content(self, message: Any, thoughts: bool) -> Any:
        """A message with stand-ins; with `thoughts` the tags of an answer's thought stay as they are."""
        keep = THOUGHT if thoughts and isinstance(message, Mapping) and message.get("role") == "assistant" else ()

        def hide(text: str) -> Content:
            hidden = self.hide(text)
            for name in keep:
                hidden = hidden.replace(self.letters.get(name, name), name)
            return Content.of(hidden, self)

        return _map_text(message, hide)


class Content(str):
    """Text of a message with stand-ins. Its methods take the names of control tokens as if the text still had them, so
    that a template can cut a thought at </think>."""

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
        """What is left around a removed text may spell a control token; one that the template inserts is its own."""
        text, names = str.replace(self, self._hidden(old), new, count), self._stand_ins.pattern
        return Content.of(text if names.search(new) else self._stand_ins.hide(text), self._stand_ins)


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
              " endswith find rfind index rindex count __contains__ __getitem__").split():  # fmt: skip
    setattr(Content, _name, _method(_name))


def _map_text(value: Any, change: Callable[[str], str]) -> Any:
    """value with every text in it changed, but for the keys of objects."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {k: _map_text(v, change) for k, v in value.items()}
    return [_map_text(v, change) for v in value] if isinstance(value, list | tuple) else value


def _texts(value: Any) -> Iterator[str]:
    """Every text in value, but for the keys of objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)


def render_chat(
    template: str,
    messages: Sequence[dict],
    names: Iterable[str],
    tokens: Mapping[str, Any],
    add_generation_prompt: bool,
) -> ChatText:
    """Render a chat template. names: the control tokens; tokens: what the template may use, such as bos_token.

    Raises InputError for a template that fails, also on purpose, and for one whose text depends on control tokens in
    the messages in a way that cannot be followed.
    """
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise InputError("messages are not a list of objects with role and content")
    stand_ins = StandIns(names, [*_texts(messages)])
    now = datetime.datetime.now()
    context = dict(add_generation_prompt=add_generation_prompt, tools=None, documents=None)
    shown = ChatText(_render(template, context | dict(messages=messages), tokens, now, None))
    if stand_ins.inside:
        for thoughts in (False, True):  # True: templates may handle an answer's <think> block as text that has it
            contents = [stand_ins.content(message, thoughts) for message in messages]
            hidden = _render(template, context | dict(messages=contents), tokens, now, stand_ins)
            if stand_ins.show(hidden) == shown:
                break
        else:
            inside = ", ".join(stand_ins.inside)
            raise InputError(f"the chat template cannot render messages with these control tokens inside: {inside}")
        pieces = re.split(f"({stand_ins.pattern.pattern})", hidden)
        parts = [(stand_ins.show(piece), i % 2 == 1) for i, piece in enumerate(pieces)]
        shown.parts = [(text, control) for text, control in parts if text]
    return shown


def _render(
    template: str, context: dict, tokens: Mapping[str, Any], now: datetime.datetime, stand_ins: StandIns | None
) -> str:
    """Render in the Jinja environment that transformers gives to chat templates."""
    try:
        from jinja2 import TemplateError, nodes
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise InputError("a chat template needs jinja2: pip install ling_kernels[train]") from None

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks an answer for training; it renders as it is."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str):
        raise TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        value = value if stand_ins is None else _map_text(value, lambda text: stand_ins.show(str.__str__(text)))
        options = dict(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        text = json.dumps(value, **options)
        return text if stand_ins is None else Content.of(stand_ins.hide(text), stand_ins)

    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    extensions = ["jinja2.ext.loopcontrols", Generation]
    environment = ImmutableSandboxedEnvironment(**blocks, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = now.strftime
    environment.globals.update(tokens)
    try:
        return environment.from_string(template).render(context)
    except Exception as error:  # a template can fail like any program, e.g. divide by zero
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the chat template cannot render these messages: {reason}") from error
