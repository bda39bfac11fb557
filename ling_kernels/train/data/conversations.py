"""A row of chat data as the messages and tools that a chat template takes."""

import json
from collections.abc import Iterator
from typing import Any

from ...errors import InputError

FIELDS = ("messages", "conversations")
COLUMNS = (*FIELDS, "system", "tools", "thinking")  # of a row, that are read
ROLES = {  # of ShareGPT, and OpenAI's older name of a tool
    "human": "user", "gpt": "assistant", "function_call": "assistant", "function_response": "tool",
    "observation": "tool", "function": "tool",
}  # fmt: skip


def conversation(row: Any, source: str) -> tuple[list[dict], list | None]:
    """The messages of a row, with role and content, and its tools. Raises InputError."""
    if not isinstance(row, dict):
        raise InputError(f"{source}: it is not an object")
    name = next((name for name in FIELDS if row.get(name) is not None), None)
    messages = row[name] if name else None
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise InputError(f"{source}: no conversation: messages is a list of objects with role and content")
    found = [message_of(given, f"{source}: message {number}") for number, given in enumerate(messages, 1)]
    check_turns([message["role"] for message in found], source)
    system = row.get("system")  # beside ShareGPT's conversations
    if not isinstance(system, str | None):
        raise InputError(f"{source}: system is {type(system).__name__}, not text")
    if system and found[0]["role"] != "system":
        found.insert(0, dict(role="system", content=system))
    return found, tools_of(row.get("tools"), f"{source}: tools") or None


def thinking_of(row: dict, source: str) -> bool | None:
    """Whether a row's answers are to begin with thoughts, by its `thinking`; None where it does not say. Raises
    InputError."""
    modes = {True: True, False: False, "on": True, "off": False, None: None}
    value = row.get("thinking")
    if not isinstance(value, bool | str | None) or value not in modes:
        raise InputError(f"{source}: thinking is {json.dumps(value)}, and not on, off, true or false")
    return modes[value]


def tools_of(tools: Any, what: str) -> list[dict]:
    """Descriptions of tools from a list of objects or its JSON; none from null or an empty text. Raises InputError."""
    if isinstance(tools, str) and tools.strip():
        tools = parsed(tools, what)
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) and tool for tool in tools)):
        raise InputError(f"{what} are not a list of objects, each the description of one")
    return tools if isinstance(tools, list) else []


def message_of(given: dict, source: str) -> dict:
    """A message with role and content, as OpenAI has them, of OpenAI's or ShareGPT's. Fields of null are left out, as
    the rows of a table have every field of any row."""
    message = {k: v for k, v in given.items() if v is not None}
    if "from" in message and "role" not in message:
        message["role"], message["content"] = message.pop("from"), message.pop("value", None)
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str):
        raise InputError(f"{source} has no role")
    if role == "function_call":
        calls = parsed(content, f"{source}, of function_call,") if isinstance(content, str) else content
        message["tool_calls"], content = calls if isinstance(calls, list) else [calls], None
    elif "function_call" in message:  # OpenAI's older form of a single call
        message["tool_calls"] = [message.pop("function_call")]
    if "tool_calls" in message and not message["tool_calls"]:
        del message["tool_calls"]
    if "tool_calls" in message:
        if ROLES.get(role, role) != "assistant":
            raise InputError(f"{source}, of {role}, has tool calls, which only role assistant has")
        message["tool_calls"] = calls_of(message["tool_calls"], source)
    elif content is None:
        raise InputError(f"{source}, of {role}, has no content")
    if not isinstance(message.get("reasoning_content", ""), str):
        raise InputError(f"{source}: reasoning_content is not text")
    return message | dict(role=ROLES.get(role, role), content="" if content is None else content)


def calls_of(calls: Any, source: str) -> list[dict]:
    """Tool calls in OpenAI's form. Raises InputError for those without name and arguments."""
    found = []
    for call in calls if isinstance(calls, list) else [calls]:
        inner = call.get("function", call) if isinstance(call, dict) else None
        named = isinstance(inner, dict) and isinstance(inner.get("name"), str) and inner["name"]
        if not (named and isinstance(inner.get("arguments"), dict | str)):
            raise InputError(f"{source}: a tool call has a name, and arguments that are an object or its JSON")
        if isinstance(arguments := inner["arguments"], str) and not isinstance(
            parsed(arguments, f"{source}: the arguments of {inner['name']}"), dict
        ):
            raise InputError(f"{source}: the arguments of {inner['name']} are JSON of another kind than an object")
        found.append(call if inner is not call else dict(type="function", function=call))
    return found


def message_texts(messages: list[dict]) -> Iterator[str]:
    """The text in messages: of their content, thoughts and calls."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                yield from texts(part)

    for message in messages:
        for name in ("content", "reasoning_content", "tool_calls"):
            yield from texts(message.get(name))


def check_turns(roles: list[str], source: str) -> None:
    """Raises InputError where users and assistants do not take turns, and for a tool's result that follows no call."""
    before = None
    for number, role in enumerate(roles, 1):
        if role == before and role in ("user", "assistant"):
            raise InputError(f"{source}: messages {number - 1} and {number} are both of role {role}: the roles must"
                             " alternate")  # fmt: skip
        if role == "tool" and before not in ("assistant", "tool"):
            raise InputError(f"{source}: message {number} is a tool's result after none of role assistant")
        before = role


def parsed(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise InputError(f"{what} is text that is not JSON") from None
