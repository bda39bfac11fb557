"""Small sources of a recipe's mixtures, for a tiny model: texts that are the same on every machine of one Python.

general   the topics of Python's help()        math   sums and products, one in a line
code      the standard library's modules       cot    a sum, its digits one by one between <think> and </think>
long      a topic with needles, lines `key K=4817;`, and each key again at the end
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ...files import atomic_write
from .sources import cpython_documents

NAMES = ("general", "math", "code", "long", "cot")
KEYS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
DOCUMENTS = 2000  # of each source that is generated
LINES = 20  # of a document of sums
LONG = 960  # characters of a document of `long`, about: it fits a row of 1,024 tokens of bytes


def write_toy_sources(folder: Path, seed: int = 0) -> dict[str, Path]:
    """Write each source as FOLDER/NAME.jsonl, where it is not there yet; returns their paths by name."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / f"{name}.jsonl" for name in NAMES}
    for number, (name, path) in enumerate(paths.items()):
        if not path.is_file():
            texts = toy_texts(name, np.random.default_rng((seed, number)))
            with atomic_write(path) as partial:
                partial.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return paths


def toy_texts(name: str, rng: np.random.Generator) -> Iterator[str]:
    if name in ("general", "code"):
        yield from (text for text in python_texts() if is_source(text) == (name == "code"))
        return
    if name == "long":
        prose = "\n".join(text for text in python_texts() if not is_source(text))
        yield from (with_needles(prose, rng) for _ in range(DOCUMENTS))
        return
    line = sum_in_a_line if name == "math" else sum_with_thoughts
    yield from ("\n".join(line(rng) for _ in range(LINES)) + "\n" for _ in range(DOCUMENTS))


def python_texts() -> list[str]:
    return ["".join(pieces) for pieces in cpython_documents()]


def is_source(text: str) -> bool:
    return "\nimport " in text or "\nfrom " in text or "\ndef " in text


def sum_in_a_line(rng: np.random.Generator) -> str:
    if rng.random() < 0.3:
        a, b = rng.integers(0, 10, 2).tolist()
        return f"{a}*{b}={a * b}"
    a, b = rng.integers(0, 100, 2).tolist()
    return f"{a}+{b}={a + b}"


def sum_with_thoughts(rng: np.random.Generator) -> str:
    a, b = rng.integers(10, 100, 2).tolist()
    low = a % 10 + b % 10
    high = a // 10 + b // 10 + low // 10
    return f"{a}+{b}=<think>{a % 10}+{b % 10}={low};{a // 10}+{b // 10}+{low // 10}={high}</think>{a + b}"


def needle(key: str, value: int) -> str:
    return f"\nkey {key}={value};\n"


def question(key: str) -> str:
    """What stands before the value of a key that is asked for."""
    return f"\nkey {key}="


def with_needles(prose: str, rng: np.random.Generator, needles: int = 4, length: int = LONG) -> str:
    keys = rng.choice(list(KEYS), needles, replace=False)
    values = rng.integers(1000, 10000, needles)
    size = length // (needles + 1)
    starts = rng.integers(0, max(len(prose) - size, 1), needles + 1)
    pieces = [prose[s : s + size] for s in starts.tolist()]
    pairs = list(zip(keys.tolist(), values.tolist(), strict=True))
    parts = [pieces[0], *(needle(k, v) + piece for (k, v), piece in zip(pairs, pieces[1:], strict=True))]
    asked = [pairs[i] for i in rng.permutation(needles).tolist()]
    return "".join(parts) + "".join(question(k) + f"{v};" for k, v in asked) + "\n"
