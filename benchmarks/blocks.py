"""The generated blocks of a page: each between <!-- name --> and <!-- /name -->, on lines of their own."""

from collections.abc import Mapping
from pathlib import Path

from ling_kernels.errors import InputError
from ling_kernels.files import whole


def cut(text: str, name: str, page: str = "the page") -> tuple[str, str, str]:
    """What comes before the block, its first mark included, the block, and the rest. InputError without such marks."""
    begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise InputError(f"{page} needs one {begin.strip()} and after it one {end.strip()}, on lines of their own")
    first, last = text.index(begin) + len(begin), text.index(end)
    return text[:first], text[first:last], text[last:]


def fill(page: Path, blocks: Mapping[str, str]) -> None:
    """Write the page anew with these blocks, by name."""
    text = page.read_text()
    for name, block in blocks.items():
        before, _, after = cut(text, name, page.name)
        text = before + block + after
    with whole(page) as partial:
        partial.write_text(text)
