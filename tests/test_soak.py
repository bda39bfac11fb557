"""What `make soak` counts as a fault, and a few seconds of it."""

import json
from collections import Counter

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("httpx")
pytest.importorskip("matplotlib")
from tests.soak import CLIENTS, MEMORY_GROWTH, check, soak  # noqa: E402

GOOD = dict(memory=5e8, descriptors=20, running_requests=0, waiting_requests=0, cache_pages=9, cache_pages_available=9)


def test_some_seconds(tmp_path):
    assert soak(4, tmp_path) == []
    found = json.loads((tmp_path / "soak.json").read_text())
    assert sum(found["answers"].values()) > 5 and (tmp_path / "soak.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("last, message", [
    (dict(cache_pages_available=8), "1 pages are left"), (dict(running_requests=1), "requests are left"),
    (dict(memory=5e8 + 2 * MEMORY_GROWTH), "memory grew"), (dict(descriptors=21 + CLIENTS), "descriptors grew"),
    ({}, ""),
])  # fmt: skip
def test_faults(last, message):
    found = check([GOOD] * 6 + [GOOD | last] * 2, Counter({("whole", True): 3}), [])
    assert len(found) == bool(message) and (not message or message in found[0])
    assert check([GOOD] * 8, Counter({("left", False): 2}), []) == ["2 wrong answers of kind left"]
