"""Chat templates (Jinja), and which control tokens of a rendered chat are the template's own.

A control token that is spelled out in a message stays text: otherwise a user's message could open a system turn.
chat_stand_ins.py says how the two are told apart.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .chat_stand_ins import STAND_INS, Content, StandIns, map_text, texts_in
from .errors import InputError

STAND_INS_NAME = "stand_ins of this rendering"  # in a template's context, where no template can name it


class ChatText(str):
    """A rendered chat. `parts` are (text, whether it is a control token of the template), or None where all of the
    text's control tokens are the template's. A slice or a sum is plain text without parts.
    """

    parts: list[tuple[str, bool]] | None = None


class _Rendered(NamedTuple):
    shown: str
    hidden: str  # shown with stand-ins in messages, where they are needed and the template can be followed
    stand_ins: StandIns
    again: Callable[[Sequence[dict]], str]  # renders other messages as hidden was


def render_chat(
    template: str,
    messages: Sequence[dict],
    names: Iterable[str],
    tokens: Mapping[str, Any],
    add_generation_prompt: bool,
    tools: Sequence[dict] | None = None,
) -> ChatText:
    """Render a chat template. names: the control tokens; tokens: what the template may use, such as bos_token; tools:
    their descriptions, for templates that show them.

    Raises InputError for a template that fails, also on purpose, and for one whose text depends on control tokens in
    the messages in a way that cannot be followed.
    """
    return _with_parts(_rendered(template, messages, names, tokens, add_generation_prompt, tools))


def _rendered(template, messages, names, tokens, add_generation_prompt, tools) -> _Rendered:
    if not isinstance(messages, list | tuple) or not all(isinstance(message, Mapping) for message in messages):
        raise InputError("messages are not a list of objects with role and content")
    try:
        stand_ins = StandIns(names, [*texts_in(messages), *texts_in(tools)])
    except RecursionError:
        raise InputError("the messages are nested too deep") from None
    now = datetime.datetime.now()
    context = dict(add_generation_prompt=add_generation_prompt, tools=tools, documents=None)

    def plain(messages: Sequence[dict]) -> str:
        return _render(template, context | dict(messages=messages), tokens, now, None)

    shown = plain(messages)
    for name, less in _without(template, messages, tools):
        try:
            left_out = _render(template, context | less, tokens, now, None) == shown
        except InputError:  # it cannot do without
            continue
        if left_out:
            raise InputError(f"the chat template leaves out {name}")
    if not stand_ins.needed:
        return _Rendered(shown, shown, stand_ins, plain)
    for thoughts in (False, True):  # True: templates may handle an answer's <think> block as text that has it

        def again(messages: Sequence[dict], thoughts: bool = thoughts) -> str:
            contents = [stand_ins.content(message, thoughts) for message in messages]
            hidden_tools = stand_ins.content(tools, False)
            return _render(template, context | dict(messages=contents, tools=hidden_tools), tokens, now, stand_ins)

        try:
            hidden = again(messages)
        except InputError:  # the template asks for text that the stand-ins do not have
            continue
        if stand_ins.show(hidden) == shown:
            return _Rendered(shown, hidden, stand_ins, again)
    if not stand_ins.inside:
        return _Rendered(shown, shown, stand_ins, plain)
    inside = ", ".join(stand_ins.inside)
    raise InputError(f"the chat template cannot render messages with these control tokens inside: {inside}")


def _without(template: str, messages: Sequence[dict], tools: Any) -> Iterator[tuple[str, dict]]:
    """(name, what to render without it) of the tools, tool calls and thoughts that the template does not name."""
    if tools and "tools" not in template:
        yield "the tools", dict(messages=messages, tools=None)
    for field in ("tool_calls", "reasoning_content"):
        for i, message in enumerate(messages if field not in template else ()):
            if message.get(field):
                rest = {k: v for k, v in message.items() if k != field}
                yield f"{field} of message {i + 1}", dict(messages=[*messages[:i], rest, *messages[i + 1 :]])


def _with_parts(rendered: _Rendered) -> ChatText:
    shown, hidden, stand_ins, _ = rendered
    text = ChatText(shown)
    own = stand_ins.tokens(hidden)
    if own != stand_ins.tokens(shown):
        cuts = [0, *(end for span in own for end in span), len(shown)]
        parts = [(shown[start:end], i % 2 == 1) for i, (start, end) in enumerate(zip(cuts, cuts[1:], strict=False))]
        text.parts = [(text, control) for text, control in parts if text]
    return text


class Answer(NamedTuple):
    """What a model writes for messages[message]: characters start to end of a rendered chat, with its end token."""

    message: int
    start: int
    end: int


def with_thinking(template: str, thinking: bool) -> tuple[str, dict[str, bool]]:
    """The template whose chats ask for thoughts, or for an answer at once, and what it may use besides the tokens.

    A template with the variable `enable_thinking` is left alone; in Ling's published ones the words of the system turn,
    "detailed thinking off", are changed. Raises InputError for others.
    """
    if "enable_thinking" in template:
        return template, dict(enable_thinking=thinking)
    words = r"(detailed thinking |thinking_option\s*=\s*['\"])(?:on|off)\b"
    changed, times = re.subn(words, rf"\g<1>{'on' if thinking else 'off'}", template)
    if not times:
        raise InputError('the chat template has no mode of thinking: neither enable_thinking nor "detailed thinking"')
    return changed, {}


def render_answers(
    template: str,
    messages: Sequence[dict],
    names: Iterable[str],
    tokens: Mapping[str, Any],
    tools: Sequence[dict] | None = None,
) -> tuple[list[ChatText], list[Answer]]:
    """Render a chat -> the text in parts, cut where answers begin and end, and the answers, those of role assistant.

    An answer begins where the generation prompt would end, and ends after the control token that ends an assistant's
    turn. To find it, the chat is rendered again with a mark in place of each text of an answer: what stands around the
    marks is the template's. Raises InputError as render_chat does, for a template whose answers have no end token, and
    for one that writes something else around marks.
    """
    names = list(names)
    rendered = _rendered(template, messages, names, tokens, False, tools)
    roles = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    answers = (
        _answers(rendered, messages, roles, *_turn(template, tuple(names), tuple(tokens.items()))) if roles else []
    )
    cuts = sorted({0, len(rendered.shown), *(i for a in answers for i in (a.start, a.end))})
    text = _with_parts(rendered)
    return [_cut(text, start, stop) for start, stop in zip(cuts, cuts[1:], strict=False)], answers


def _answers(rendered: _Rendered, messages: Sequence[dict], roles: list[int], prompt: str, end: str) -> list[Answer]:
    hidden, stand_ins = rendered.hidden, rendered.stand_ins
    taken = {*hidden, *map(chr, stand_ins.shown), *"".join(texts_in(messages))}
    marks = dict(zip((chr(code) for code in STAND_INS if chr(code) not in taken), roles, strict=False))
    by_message = {i: mark for mark, i in marks.items()}
    marked = [_marked(m, by_message[i]) if i in by_message else m for i, m in enumerate(messages)]
    pieces = re.split(f"([{''.join(marks)}])", rendered.again(marked))
    fixed, owners = pieces[::2], [marks[mark] for mark in pieces[1::2]]
    starts: dict[int, int] = {}
    ends: dict[int, int] = {}
    position = 0
    for k, piece in enumerate(fixed):
        last = k == len(fixed) - 1
        at = (
            len(hidden) - len(piece)
            if last and hidden.endswith(piece)
            else -1
            if last
            else hidden.find(piece, position)
        )
        if at < position or (k == 0 and at):
            raise InputError("the chat template writes something else around other answers: none can be told from it")
        if k:
            ends[owners[k - 1]] = at
        position = at + len(piece)
        if not last and owners[k] not in starts:
            prompted = piece.rfind(prompt) if prompt else -1
            starts[owners[k]] = position if prompted < 0 else at + prompted + len(prompt)
    answers = []
    for i in roles:
        stop = hidden.find(end, ends[i]) if i in ends else -1
        if stop < 0:
            raise InputError(f"the chat template leaves out message {i + 1}, or the {end} after it")
        answers.append(Answer(i, starts[i], stop + len(end)))
    return answers


def end_of_answers(template: str, names: Iterable[str], tokens: Mapping[str, Any]) -> str:
    """The control token that ends an assistant's turn. Raises InputError if there is none."""
    return _turn(template, tuple(names), tuple(tokens.items()))[1]


@functools.lru_cache(maxsize=16)
def _turn(template: str, names: tuple[str, ...], its_tokens: tuple[tuple[str, Any], ...]) -> tuple[str, str]:
    """The generation prompt, and the control token that ends an assistant's turn."""
    tokens, mark, question = dict(its_tokens), chr(STAND_INS[0]), {"role": "user", "content": "x"}
    chat = _rendered(template, [question, {"role": "assistant", "content": mark}], names, tokens, False, None).shown
    found = StandIns(names, [chat]).pattern.search(chat, chat.find(mark) + 1)
    if mark not in chat or found is None:
        raise InputError("the chat template writes no control token after an answer, so a model cannot learn to end it")
    without, asked = (_rendered(template, [question], names, tokens, ask, None).shown for ask in (False, True))
    return asked.removeprefix(without) if asked.startswith(without) else "", found[0]


def _marked(value: Any, mark: str) -> Any:
    """A message with the mark in place of its texts; a thought keeps its tags. An answer without any text has one."""
    if isinstance(value, Mapping):
        kept = ("role", "type", "id")
        changed = {k: v if k in kept else _marked(v, mark) for k, v in value.items()}
        if "role" in value and not value.get("content") and not value.get("tool_calls"):
            changed["content"] = mark
        return changed
    if isinstance(value, str):
        return f"<think>\n{mark}\n</think>\n\n{mark}" if "</think>" in value else mark if value else value
    return [_marked(v, mark) for v in value] if isinstance(value, list | tuple) else value


def _cut(text: ChatText, start: int, stop: int) -> ChatText:
    cut = ChatText(text[start:stop])
    if text.parts is not None:
        cut.parts, position = [], 0
        for part, own in text.parts:
            inside = part[max(start - position, 0) : max(stop - position, 0)]
            position += len(part)
            if inside:
                cut.parts.append((inside, own))
    return cut


def _render(
    template: str, context: dict, tokens: Mapping[str, Any], now: datetime.datetime, stand_ins: StandIns | None
) -> str:
    """Render in the Jinja environment that transformers gives to chat templates."""
    names = dict(strftime_now=now.strftime, **{STAND_INS_NAME: stand_ins})
    try:
        return _compiled(template).render({**tokens, **names, **context})
    except InputError:
        raise
    except Exception as error:  # a template can fail like any program, e.g. divide by zero
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the chat template cannot render these messages: {reason}") from error


@functools.lru_cache(maxsize=16)  # compiling takes longer than rendering
def _compiled(template: str):
    try:
        from jinja2 import TemplateError, nodes, pass_context
        from jinja2.ext import Extension
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise InputError("a chat template needs jinja2: pip install '.[train]'") from None

    class Generation(Extension):
        """{% generation %} ... {% endgeneration %} marks an answer for training; it renders as it is."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    def raise_exception(message: str):
        raise TemplateError(message)

    @pass_context
    def tojson(context, value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        stand_ins = context.get(STAND_INS_NAME)
        value = value if stand_ins is None else map_text(value, lambda text: stand_ins.show(str.__str__(text)))
        options = dict(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        text = json.dumps(value, **options)
        return text if stand_ins is None else Content.of(stand_ins.hide(text), stand_ins)

    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    extensions = ["jinja2.ext.loopcontrols", Generation]
    environment = ImmutableSandboxedEnvironment(**blocks, extensions=extensions)
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(template)
