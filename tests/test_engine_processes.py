"""Engines in other processes: spawned, forked after the import, forked from a process with an engine."""

import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ling_kernels.errors import InputError

ROOT = Path(__file__).parents[1]


def make_engine():
    """With random weights, the same in every process."""
    from ling_kernels.generate import Engine
    from ling_kernels.model import Ling, LingConfig

    model = Ling(dataclasses.replace(LingConfig.tiny(), num_hidden_layers=1))
    model.init_weights(torch.Generator().manual_seed(0))
    return Engine(model, cache_tokens=640, max_running=2)


def texts(results) -> None:
    """Of an engine that is made in this process: without a grammar, and with one, whose masks threads make."""
    from ling_kernels.generate.grammar import Grammars
    from ling_kernels.tokenizer import load_tokenizer

    engine, tokenizer = make_engine(), load_tokenizer()
    (new,) = engine.generate([[5, 9, 7]], max_new_tokens=5, stop_token_ids=())
    choice = Grammars(tokenizer, engine.config.vocab_size).choice(["yes", "no"])
    (answer,) = engine.generate([[5]], max_new_tokens=9, stop_token_ids=[tokenizer.eos_id], grammar=choice)
    results.put((new, tokenizer.decode(answer)))


def refused(engine, results) -> None:
    """Of an engine of the process that this one was forked from."""
    try:
        engine.submit([1, 2])
    except InputError as error:
        results.put(str(error))


def in_process(method: str, work, *arguments):
    context = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=work, args=(*arguments, results))
    process.start()
    process.join(200)
    assert process.exitcode == 0  # None: it hangs
    return results.get(timeout=20)


def forks() -> None:
    """In a process of its own, as a fork takes over whatever pytest's process has."""
    first = in_process("fork", texts)  # torch has not computed here yet
    torch.set_num_threads(1)  # others would be missing in a fork
    here = multiprocessing.Queue()
    texts(here)  # the grammars' threads have started
    found = first, here.get(timeout=20), in_process("fork", texts), in_process("fork", refused, make_engine())
    print(json.dumps(found))


def test_spawned():
    pytest.importorskip("llguidance")
    here = multiprocessing.Queue()
    texts(here)
    assert in_process("spawn", texts) == here.get(timeout=20)


def test_forked():
    pytest.importorskip("llguidance")
    code = "from tests.test_engine_processes import forks; forks()"
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr
    first, here, again, refusal = json.loads(done.stdout)
    assert first[1] == here[1] == again[1] in ("yes", "no") and here == again and len(first[0]) == 5
    assert "make one here" in refusal
