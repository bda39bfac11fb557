"""Tokenising in processes: the same files, and no process that outlives its work, however that ends."""

import json
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from ling_kernels.errors import InputError
from ling_kernels.tokenizer import Tokenizer, load_tokenizer
from ling_kernels.tokenizer.train import train_tokenizer
from ling_kernels.train.data import chats, processes, tokenise
from ling_kernels.train.data.__main__ import main

WORDS = ["the ", "cat", " sat\n", "語", " 12", ".", "é ", "<role>", "😀", "   "]


@pytest.fixture
def started(monkeypatch) -> list[processes.Process]:
    """Those that are started: two, after the second batch."""
    found = []

    class Recorded(processes.Process):
        def __init__(self):
            super().__init__()
            found.append(self)

    monkeypatch.setattr(processes, "Process", Recorded)
    monkeypatch.setattr(processes, "ALONE", 2)
    monkeypatch.setattr(processes, "free_cores", lambda: 2)
    return found


def all_ended(started: list[processes.Process]) -> bool:
    return len(started) == 2 and all(process.popen.returncode is not None for process in started)


def bpe(text: str) -> Tokenizer:
    pytest.importorskip("tokenizers")
    return train_tokenizer([text], 300)


def some_text(words: int) -> str:
    return "".join(random.Random(0).choices(WORDS, k=words))


@pytest.mark.parametrize("kind, special", [("bpe", False), ("bpe", True), ("bytes", True)])
def test_the_tokens_are_those_of_one_process(tmp_path, monkeypatch, started, kind, special):
    """A memory of words, the package by itself, and names of special tokens among bytes."""
    text = some_text(3000)
    tokenizer = bpe(text) if kind == "bpe" else load_tokenizer()
    docs = [[text[i : i + 40] for i in range(first, first + 200, 40)] for first in range(0, 9000, 200)]
    monkeypatch.setattr(tokenise, "BATCH", 500)
    monkeypatch.setattr(tokenise, "MANY", 1)
    about = tokenise.write_tokens(docs, tokenizer, tmp_path / "two.bin", special)
    assert all_ended(started)
    monkeypatch.setattr(processes, "free_cores", lambda: 1)
    assert tokenise.write_tokens(docs, tokenizer, tmp_path / "one.bin", special) == about
    assert len(started) == 2 and about["documents"] > 40
    assert (tmp_path / "one.bin").read_bytes() == (tmp_path / "two.bin").read_bytes()


def test_bytes_are_not_worth_a_process(tmp_path, monkeypatch, started):
    monkeypatch.setattr(tokenise, "BATCH", 10)
    tokenise.write_tokens([["a text"] * 20], load_tokenizer(), tmp_path / "x.bin")
    assert not started


def test_the_chats_are_those_of_one_process(tmp_path, monkeypatch, started, capsys):
    text, file = some_text(3000), tmp_path / "chats.jsonl"
    rows = [[dict(role="user", content=text[i : i + 9]), dict(role="assistant", content=text[i:70])] for i in range(60)]
    file.write_text("".join(json.dumps(dict(messages=messages)) + "\n" for messages in rows))
    monkeypatch.setattr(chats, "BATCH", 7)
    assert main([str(file), "--out", str(tmp_path / "two.bin")]) == 0 and all_ended(started)
    monkeypatch.setattr(processes, "free_cores", lambda: 1)
    assert main([str(file), "--out", str(tmp_path / "one.bin")]) == 0 and len(started) == 2
    for suffix in (".bin", ".mask.bin", ".json"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"two{suffix}").read_bytes()
    rows[50][1]["role"] = "nobody"
    file.write_text("".join(json.dumps(dict(messages=messages)) + "\n" for messages in rows))
    monkeypatch.setattr(processes, "free_cores", lambda: 2)
    assert main([str(file), "--out", str(tmp_path / "bad.bin")]) == 2
    assert "line 51" in capsys.readouterr().err and not [*tmp_path.glob("bad*")]
    assert all(process.popen.returncode is not None for process in started)


@pytest.mark.parametrize(
    "batch, kind, fault",
    [
        ("__import__('os').kill(__import__('os').getpid(), 9)", InputError, "ended by signal 9"),
        ("__import__('os')._exit(3)", InputError, "ended by exit code 3"),
        ("'x' * (1 << 60)", MemoryError, ""),
        ("[].nothing", AttributeError, "nothing"),
    ],
)
def test_what_goes_wrong_in_a_process_is_raised(started, batch, kind, fault):
    done = []
    with pytest.raises(kind, match=fault):
        for result in processes.in_order(eval, iter(["1", "2", "3", "print(4)", batch, *["5"] * 9])):
            done.append(result)
    assert done == [1, 2, 3, None] and all_ended(started)


def test_a_function_that_is_slow_keeps_the_order_and_few_batches_wait(started):
    read = []

    def batches():
        for number in range(12):
            read.append(number)
            yield f"__import__('time').sleep({0.1 * (number % 2 == 0)}) or {number}"

    for n, result in enumerate(processes.in_order(eval, batches())):
        assert result == n and len(read) <= n + 2 + processes.AHEAD + 1


@pytest.mark.parametrize("end", [KeyboardInterrupt, OSError])
def test_the_processes_end_with_the_reading(started, end):
    """Ctrl-C, or a full disk."""
    found = processes.in_order(eval, iter(["1", "2", "__import__('time').sleep(60)", "3"] * 9))
    with pytest.raises(end), closing(found):
        for n, _ in enumerate(found):
            if n == 1:
                signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(end))
                signal.setitimer(signal.ITIMER_REAL, 0.5)
    assert all_ended(started)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_command_and_its_processes(tmp_path, monkeypatch, started, name):
    def documents(*_):
        for n in range(40):
            if n == 30:
                signal.raise_signal(signal.Signals[name])
            yield ["<role> " * 20]

    monkeypatch.setattr(tokenise, "cpython_documents", documents)
    monkeypatch.setattr(tokenise, "BATCH", 1)
    assert main(["--out", str(tmp_path / "x.bin"), "--special-tokens"]) == 75
    assert [*tmp_path.iterdir()] == [] and all_ended(started)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="without /proc")
def test_processes_end_where_theirs_is_killed():
    code = """if True:
        from ling_kernels.train.data import processes
        processes.ALONE, processes.free_cores = 0, lambda: 2
        batches = ["__import__('os').getpid()"] * 8 + ["__import__('time').sleep(1)"] * 99
        for pid in processes.in_order(eval, iter(batches)):
            print(pid, flush=True)
    """
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pids = {int(parent.stdout.readline()) for _ in range(8)}
    assert len(pids) == 2 and all(map(running, pids))
    parent.kill()
    parent.communicate()
    until = time.monotonic() + 60
    while any(map(running, pids)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(running, pids))


def test_a_process_imports_no_torch():
    process = processes.Process()
    try:
        process.send(processes.pickle.dumps(eval))
        rooms = ("train.data.tokenise", "train.data.chats", "tokenizer.words")
        for room in rooms:
            process.call(f"__import__('ling_kernels.{room}') and None")
        assert process.call("'numpy' in __import__('sys').modules") and not process.call(
            "'torch' in __import__('sys').modules"
        )
    finally:
        process.end()
