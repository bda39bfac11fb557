"""What the fuzzers share: how many inputs they try, JSON values, and changes of JSON and of bytes.

The inputs are the same in every run, but for `--hypothesis-seed=N`, with which `make fuzz` draws others.
"""

import copy
from collections.abc import Callable

import pytest

from ling_kernels.errors import InputError, LingError

hypothesis = pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, Phase, core, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402


def fuzz(examples: int) -> settings:
    """The settings of a test that tries so many inputs."""
    return settings(
        max_examples=examples, derandomize=core.global_force_seed is None, database=None, deadline=None,
        print_blob=True, phases=[Phase.explicit, Phase.generate, Phase.shrink], suppress_health_check=[*HealthCheck],
    )  # fmt: skip


def result_or_error(fn: Callable, *args, kinds=(LingError,), **kwargs):
    """fn's result, or None where it raises an error of `kinds` whose message is one clear line."""
    try:
        return fn(*args, **kwargs)
    except kinds as error:
        assert is_clear(str(error)), str(error)
        return None


def is_clear(message: str) -> bool:
    return 4 < len(message) < 1000 and len(message.splitlines()) == 1


NUMBERS = [0, 1, -1, 2, 3, 8, 127, 2**31 - 1, 2**31, 2**53 + 1, -(2**63), 2**64, 10**30, 0.5, -0.0, 1.0, 1e-7,
           1e-300, 1e308, float("nan"), float("inf"), float("-inf")]  # fmt: skip
WORDS = ["", " ", "1", "true", "default", "yarn", "é", "\0", "\ud800", "a\nb", "<role>", "../x", "x" * 3000]
keys = st.sampled_from(WORDS) | st.text(max_size=4)
scalars = st.one_of(
    st.none(), st.booleans(), st.sampled_from(NUMBERS), st.integers(-5, 300), st.floats(), st.sampled_from(WORDS),
    st.text(max_size=6),
)  # fmt: skip
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


@st.composite
def changed(draw, tree, most: int = 3, values=values):
    """A copy of a JSON object with 1 to `most` of its parts replaced, deleted, doubled or exchanged for others; rarely
    another value."""
    if draw(st.integers(0, 29)) == 29:
        return draw(values)
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, most))):
        if not tree:
            break
        container, key = draw(places(tree))
        how = draw(st.sampled_from(["replace", "delete", "double", "exchange"]))
        if how == "replace":
            container[key] = draw(values)
        elif how == "delete":
            del container[key]
        elif how == "double" and isinstance(container, dict):
            container[draw(st.sampled_from(WORDS))] = copy.deepcopy(container[key])
        elif how == "double":
            container.insert(key, copy.deepcopy(container[key]))
        else:
            other, its_key = draw(places(tree))
            container[key] = copy.deepcopy(other[its_key])
    return tree


@st.composite
def places(draw, tree):
    """(container, key) of a part of a JSON tree, deep ones as likely as shallow ones."""
    while True:
        key = draw(st.sampled_from([*tree] if isinstance(tree, dict) else range(len(tree))))
        inner = tree[key]
        if not isinstance(inner, dict | list) or not inner or draw(st.integers(0, 3)) == 0:
            return tree, key
        tree = inner


@st.composite
def damaged(draw, data: bytes, end: int | None = None):
    """Bytes with some of the first `end` changed, taken out or put in, or with the rest cut away."""
    data = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(min(len(data), end or len(data)) - 1, 0)))
        how = draw(st.sampled_from(["change", "out", "in", "cut", "double"]))
        n = draw(st.integers(1, 9))
        if how == "cut":
            del data[at:]
        elif how == "double":
            data[at:at] = data[at : at + n]
        else:
            data[at : at + (n if how != "in" else 0)] = b"" if how == "out" else draw(st.binary(min_size=1, max_size=n))
    return bytes(data)


__all__ = ["InputError", "changed", "damaged", "fuzz", "hypothesis", "is_clear", "result_or_error", "st", "values"]
