"""python -m ling_kernels.chat: conversations by standard input, and in a terminal."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ling_kernels import chat
from ling_kernels.generate import Engine, Sampling
from ling_kernels.generate.text import repeats
from ling_kernels.model import load_model
from ling_kernels.tokenizer import load_tokenizer
from tests.speller import EOS, ROLE_END, speller

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return speller(tmp_path_factory.mktemp("chat"), positions=400)


@pytest.fixture
def talk(checkpoint, capsys, monkeypatch):
    """talk(standard input, *flags) -> (exit code, standard output, standard error)"""

    def run(text: str, *flags: str):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        code = chat.main(["--model", checkpoint, *flags])
        return code, *capsys.readouterr()

    return run


def test_answers_and_commands(talk, tmp_path):
    file = tmp_path / "chat.jsonl"
    lines = ["Hi", "two\\", "lines", "", f"/save {file}", "/undo", "/retry", "/system Be brief.", "Again", "/clear",
             "/set new_tokens 2", "Short", "/quit", "never"]  # fmt: skip
    code, out, err = talk("\n".join(lines))
    assert code == 0 and err == "" and out.split() == ["XYZ", "XYZ", "XYZ", "XYZ", "XY"]
    said = [("user", "Hi"), ("assistant", "XYZ"), ("user", "two\nlines"), ("assistant", "XYZ")]
    assert json.loads(file.read_text()) == {"messages": [dict(role=r, content=c) for r, c in said]}


def test_errors_are_lines_and_the_chat_goes_on(talk, tmp_path):
    wrong = ["/x", "/undo", "/set colour 3", "/set temperature hot", "/set top_k 1.5", "/set new_tokens 0", "/save",
             f"/save {tmp_path}/no/x", "/think maybe", "x" * 500, "/set top_p 0.5"]  # fmt: skip
    code, out, err = talk("\n".join([*wrong, "Hi"]))
    messages = err.splitlines()
    assert code == 0 and out == "XYZ\n" and len(messages) == len(wrong)
    for message, text in zip(messages, ["no command /x", "no message yet", "no setting 'colour'", "must be a number",
                                        "must be an integer", "at least 1", "needs a file", "no/x", "/think on",
                                        "too many for the model", "temperature above 0"], strict=True):  # fmt: skip
        assert message.startswith("error: ") and text in message


def test_saving_to_what_is_no_file(talk, tmp_path, monkeypatch):
    """Such a command must not end the chat, which would lose it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    code, out, err = talk("/save x\nHi\n/save .\n/save /\n/save ~/x\n/save no/x\nAgain")
    assert code == 0 and out == "XYZ\nXYZ\n" and "Hi" in (tmp_path / "x").read_text()
    for line, text in zip(err.splitlines(), ["no message", "a folder", "a folder", "/save no/x: No such"], strict=True):
        assert line.startswith("error: ") and text in line


def test_closed_streams(checkpoint, monkeypatch, capsys):
    for name in ("stdout", "stdin"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, None)
            assert chat.main(["--model", checkpoint]) == 2
        assert f"standard {name[3:]}put is closed" in capsys.readouterr().err


def test_a_full_disk_is_one_line(checkpoint):
    command = [sys.executable, "-m", "ling_kernels.chat", "--model", checkpoint]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, input="Hi\n", stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == "error: no space left for standard output\n"


def test_help_settings_and_thoughts(talk):
    lines = ["/help", "/set temperature 0.5", "/set seed 3", "/set", "/set seed None", "/set new_tokens None", "/set",
             "/think on", "Hi", "/exit"]  # fmt: skip
    code, out, err = talk("\n".join(lines), "--system", "S")
    assert code == 0 and not err and "temperature 0.5" in out
    assert "seed 3" in out and "seed None, new_tokens None" in out
    assert all(f"/{name}" in out for name in ("clear", "undo", "retry", "system", "think", "set", "save", "quit"))


@pytest.mark.parametrize("flags, message", [
    (["--max-new-tokens", "0"], "--max-new-tokens is 0"), (["--top-p", "0.5"], "temperature"),
    (["--draft", "9"], "draft"),
])  # fmt: skip
def test_bad_flags(talk, flags, message):
    code, out, err = talk("", *flags)
    assert code == 2 and message in err and len(err.splitlines()) == 1 and not out


def test_thoughts_are_kept_apart(checkpoint):
    """What the model sees of a conversation is what the chat template makes of it."""
    engine, tokenizer = Engine(load_model(checkpoint, torch.float32)), load_tokenizer()
    c = chat.Chat(engine, tokenizer, {EOS, ROLE_END}, Sampling(), "S")
    answer = [*tokenizer.encode("<think>\nhm\n</think>\n\nHello", special=True)]
    seen = []
    engine.stream = lambda ids, **_: seen.append(ids) or generator(answer)
    parts = [*c.answer("Hi")]
    assert "".join(p.text for p in parts if p.kind == "reasoning") == "hm"
    assert c.messages[-1] == dict(role="assistant", content="Hello", reasoning_content="hm")
    first = c.answer("more")
    next(first)
    first.close()
    assert c.messages[-1]["role"] == "assistant" and c.undo() == "more" and len(c.messages) == 3
    assert tokenizer.decode(seen[1]) == tokenizer.apply_chat_template([*c.messages, dict(role="user", content="more")])


def generator(tokens):
    yield from tokens


def test_a_text_that_repeats_itself():
    assert repeats([9, *[1, 2, 3] * 6]) and repeats([5] * 16) and repeats([*range(32)] * 4)
    assert not repeats([5] * 15) and not repeats([*range(33)] * 4) and not repeats([1, 2, 3] * 3) and not repeats([])


class Terminal:
    """The near end of a pseudo-terminal."""

    def __init__(self, end: int):
        self.end, self.unread = end, ""

    def read_until(self, text: str, seconds: float = 120) -> str:
        """What it shows up to some text; what comes with it is for the next call."""
        end = time.monotonic() + seconds
        while text not in self.unread:
            assert time.monotonic() < end, self.unread
            if select.select([self.end], [], [], 1)[0]:
                self.unread += os.read(self.end, 1000).decode()
        shown, found, self.unread = self.unread.partition(text)
        return shown + found


def test_in_a_terminal(checkpoint, tmp_path):
    """Editing, history of an earlier chat, Ctrl-C in an answer, Ctrl-D."""
    for command in (["Hi"], ["\x1b[A"]):  # the second takes the first one's line from the history
        end, inside = pty.openpty()
        terminal = Terminal(end)
        env = os.environ | {"XDG_STATE_HOME": str(tmp_path), "OMP_NUM_THREADS": "1", "TERM": "xterm"}
        flags = ["--model", checkpoint]
        process = subprocess.Popen(
            [sys.executable, "-m", "ling_kernels.chat", *flags], stdin=inside, stdout=inside, stderr=inside, cwd=ROOT,
            env=env, start_new_session=True,
        )  # fmt: skip
        os.close(inside)
        try:
            assert "/help lists the commands" in terminal.read_until("> ")
            os.write(end, "".join(command).encode() + b"\n")
            assert "Hi" in terminal.read_until("XYZ")
            terminal.read_until("> ")
            time.sleep(0.5)  # readline shows the prompt before it waits: a signal between the two waits for a key
            process.send_signal(signal.SIGINT)
            terminal.read_until("> ")
            os.write(end, b"\x04")
            assert process.wait(120) == 0
        finally:
            process.kill()
            os.close(end)
    assert (tmp_path / "ling_kernels" / "chat_history").read_text().count("Hi") >= 1
