"""python -m ling_kernels.chat --model DIR: talk to a checkpoint in a terminal.

Answers come as they are generated; Ctrl-C stops one. A line that ends with \\ goes on in the next; one that begins
with / is a command, and /help lists them. Without a terminal every line of standard input is a message.
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .commands import Parser, command
from .errors import InputError
from .files import atomic_write, user_path
from .generate import Engine, Sampling, stream_text
from .generate.cli import (
    adapter_of,
    add_adapter_flag,
    add_model_flags,
    add_sampling_flags,
    find_tokenizer,
    make_engine,
    resolve_checkpoint,
    sampling_of,
    stop_token_ids,
    to_terminal,
    write,
)  # fmt: skip
from .generate.server.text_parts import THINK, Part, TextParts
from .generate.text import keep, repeats
from .tokenizer import Tokenizer

HISTORY_LINES = 1000
DIM, PLAIN = "\x1b[2m", "\x1b[0m"
FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
EMPTY = [{"role": "user", "content": ""}]  # shows whether there is a template, and whether it has thoughts
HELP = """\
/clear            begin a new conversation
/undo             forget the last message and its answer
/retry            answer the last message again
/system [TEXT]    set the system message, or none, and begin a new conversation
/think on|off     whether answers begin with a thought
/set [NAME VALUE] show the settings, or change one
/save FILE        write the conversation as a line of JSON, which `train --data` reads
/quit             end; so does Ctrl-D"""


class Chat:
    """A conversation with an engine. sampling, thinking and new_tokens (of an answer; None: what fits) may change."""

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, stop: set[int], sampling: Sampling, system: str | None = None
    ):
        self.engine, self.tokenizer, self.stop, self.sampling, self.system = engine, tokenizer, stop, sampling, system
        self.thinking: bool | None = None  # the chat template's default
        self.new_tokens: int | None = None
        self.adapter: str | None = None  # one of the engine's
        self.repeats = False  # the last answer repeats itself, as greedy ones may
        self.clear()

    def clear(self) -> None:
        self.messages: list[dict] = [] if self.system is None else [{"role": "system", "content": self.system}]

    def undo(self) -> str:
        """Forget the last message and its answer; returns the message. Raises InputError where there is none."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            raise InputError("there is no message yet")
        *self.messages, message, _ = self.messages
        return message["content"]

    def answer(self, message: str) -> Iterator[Part]:
        """Add a message and its answer; yields the answer's parts. What has come stays in the conversation when the
        iterator is closed. Raises InputError, and adds nothing, where the conversation is too long for the model."""
        messages = [*self.messages, {"role": "user", "content": message}]
        text = self.tokenizer.apply_chat_template(messages, thinking=self.thinking)
        ids = self.tokenizer.encode(text, special=True)
        room = self.engine.max_sequence - len(ids)
        if room < 1:
            raise InputError(f"the conversation has {len(ids)} tokens, too many for the model: /undo, or /clear")
        parts, tokens, said = TextParts(text.rstrip().endswith(THINK)), [], {"content": "", "reasoning": ""}
        count = min(self.new_tokens or room, room)
        stream = self.engine.stream(
            ids, sampling=self.sampling, max_new_tokens=count, stop_token_ids=self.stop, adapter=self.adapter
        )
        try:
            for piece in stream_text(keep(stream, tokens), self.tokenizer, prompt=ids):
                for part in parts.add(piece):
                    said[part.kind] += part.text
                    yield part
            for part in parts.end():
                said[part.kind] += part.text
                yield part
        finally:
            thought = {"reasoning_content": said["reasoning"]} if said["reasoning"] else {}
            self.messages = [*messages, {"role": "assistant", "content": said["content"], **thought}]
            self.repeats = self.sampling.temperature == 0 and repeats(tokens)

    def settings(self) -> dict[str, float | int | None]:
        sampling = dataclasses.asdict(self.sampling)
        return {name: sampling[name] for name in (*FLOATS, "top_k", "seed")} | {"new_tokens": self.new_tokens}

    def change(self, name: str, text: str) -> None:
        """Set a setting. Raises InputError for names and values that there are not."""
        if name not in self.settings():
            raise InputError(f"there is no setting {name!r}: {', '.join(self.settings())}")
        try:
            value: Any = None
            if (name, text) not in (("seed", "None"), ("new_tokens", "None")):
                value = float(text) if name in FLOATS else int(text)
        except ValueError:
            kind = "a number" if name in FLOATS else "an integer"
            raise InputError(f"{name} is {text!r}; it must be {kind}") from None
        if name != "new_tokens":
            self.sampling = dataclasses.replace(self.sampling, **{name: value})
        elif value is not None and value < 1:
            raise InputError(f"new_tokens is {value}; it must be at least 1")
        else:
            self.new_tokens = value


def show_answer(chat: Chat, message: str) -> None:
    """Write an answer as it comes; Ctrl-C ends it."""
    parts, last, colour, before = chat.answer(message), "\n", sys.stdout.isatty(), ""
    try:
        for kind, text, _ in parts:
            if colour and kind != before:
                sys.stdout.write(DIM if kind == "reasoning" else PLAIN)
            if kind != before == "reasoning":
                write("\n")
            write(text)
            last, before = text, kind
    except KeyboardInterrupt:
        last = ""
    finally:
        parts.close()  # type: ignore[attr-defined]
        sys.stdout.write(PLAIN * colour)
    write("" if last.endswith("\n") else "\n")
    if chat.repeats:
        print("the answer repeats itself: try /set temperature 0.7, or /set repetition_penalty 1.1", file=sys.stderr)


def run_command(chat: Chat, line: str) -> bool:
    """Run a line that begins with /; False for the end. Raises InputError."""
    name, _, rest = line[1:].partition(" ")
    rest = rest.strip()
    actions: dict[str, Callable] = {
        "help": lambda: print(HELP), "clear": chat.clear, "undo": chat.undo,
        "retry": lambda: show_answer(chat, chat.undo()), "save": lambda: save(chat, rest),
        "system": lambda: set_system(chat, rest), "set": lambda: set_or_show(chat, rest),
        "think": lambda: set_thinking(chat, rest), "quit": lambda: None, "exit": lambda: None,
    }  # fmt: skip
    if name not in actions:
        raise InputError(f"there is no command /{name:.40}: /help lists them")
    actions[name]()
    return name not in ("quit", "exit")


def save(chat: Chat, path: str) -> None:
    if not path:
        raise InputError("/save needs a file")
    file = user_path(os.path.expanduser(path), "/save")
    if file.is_dir():
        raise InputError(f"/save {path}: it is a folder")
    if not chat.messages:
        raise InputError(f"/save {path}: there is no message yet")
    try:
        with atomic_write(file) as new:
            new.write_text(json.dumps({"messages": chat.messages}, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"/save {path}: {error.strerror}") from None


def set_system(chat: Chat, text: str) -> None:
    chat.system = text or None
    chat.clear()


def set_thinking(chat: Chat, text: str) -> None:
    if text not in ("on", "off"):
        raise InputError("/think on, or /think off")
    chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], thinking=text == "on"
    )  # refuses some templates
    chat.thinking = text == "on"


def set_or_show(chat: Chat, text: str) -> None:
    if not text:
        print(", ".join(f"{name} {value}" for name, value in chat.settings().items()))
        return
    name, _, value = text.partition(" ")
    chat.change(name, value.strip())


def read_message(prompt: str) -> str | None:
    """The next message of standard input, of several lines where they end with \\; None at the end."""
    lines: list[str] = []
    while True:
        if sys.stdin.isatty():
            try:
                line = input("... " if lines else prompt)
            except EOFError:
                return None
        else:
            line = sys.stdin.readline()
            if not line:
                return "\n".join(lines) if lines else None
            line = line.removesuffix("\n")
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(lines)


@contextmanager
def line_history() -> Iterator[None]:
    """Editing of lines, and those of earlier chats, in a terminal."""
    if not sys.stdin.isatty():
        yield
        return
    try:
        import readline
    except ImportError:  # Windows
        yield
        return
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local/state"
    file = Path(state, "ling_kernels", "chat_history")
    with suppress(OSError):
        readline.read_history_file(file)
    readline.set_history_length(HISTORY_LINES)
    try:
        yield
    finally:
        with suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(file)


def talk(chat: Chat) -> None:
    """Read messages and commands, and answer, until the end of standard input."""
    while True:
        try:
            message = read_message("> ")
        except KeyboardInterrupt:  # an empty line; Ctrl-D ends
            print()
            continue
        if message is None:
            return
        try:
            if message.startswith("/"):
                if not run_command(chat, message):
                    return
            elif message.strip():
                show_answer(chat, message)
        except InputError as error:
            print(f"error: {error}", file=sys.stderr)


def arguments() -> Parser:
    parser = Parser("python -m ling_kernels.chat", description=__doc__.splitlines()[0])
    add_model_flags(parser)
    add_adapter_flag(parser)
    add = parser.add_argument
    add("--system", metavar="TEXT", help="system message")
    add("--think", action=argparse.BooleanOptionalAction, help="whether answers begin with a thought")
    add("--max-new-tokens", type=int, metavar="N", help="of an answer; default: what fits into the model's positions")
    add_sampling_flags(parser)
    add("--draft", type=int, default=0, metavar="N", help="draft tokens per step, from the MTP layer if there is one")
    return parser


def run(args: argparse.Namespace) -> None:
    sampling = sampling_of(args)
    config, folder = resolve_checkpoint(args.model)
    tokenizer = find_tokenizer(args.tokenizer, folder, config)
    tokenizer.apply_chat_template(
        [{"role": "user", "content": ""}], thinking=args.think
    )  # refuses what has no template
    stop = stop_token_ids(config, tokenizer, folder)
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens is {args.max_new_tokens}; it must be at least 1")
    adapters = adapter_of(args, config, folder)
    with make_engine(folder, args, max_running=1, draft=args.draft, adapters=adapters) as engine:
        chat = Chat(engine, tokenizer, stop, sampling, args.system)
        chat.thinking, chat.new_tokens, chat.adapter = args.think, args.max_new_tokens, next(iter(adapters), None)
        if sys.stdin.isatty():
            print(f"{folder.resolve().name}: /help lists the commands, Ctrl-D ends", file=sys.stderr)
        with line_history():
            talk(chat)


@command
def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    if sys.stdin is None:
        raise InputError("standard input is closed")
    sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    return to_terminal(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
