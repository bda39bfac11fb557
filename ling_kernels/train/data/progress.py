"""Progress of tokenising: a bar of the bytes read where stderr is a terminal, otherwise a line every ten seconds."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from .sources import Position

SECONDS = 10.0  # between lines


class ReadingProgress:
    def __init__(self, position: Position, files: Sequence[Path]):
        self.position = position
        self.total = sum(path.stat().st_size for path in files if path.is_file())
        self.start = self.shown = time.monotonic()
        self.bar = self._bar() if sys.stderr.isatty() and self.total else None

    def _bar(self):
        try:
            from tqdm import tqdm
        except ImportError:
            return None
        return tqdm(desc="tokenising", total=self.total, unit="B", unit_scale=True, dynamic_ncols=True, leave=False)

    def __enter__(self) -> "ReadingProgress":
        return self

    def __exit__(self, *error) -> None:
        if self.bar is not None:
            self.bar.close()

    def show(self, tokens: int) -> None:
        """tokens: those written so far."""
        now, done = time.monotonic(), min(self.position.bytes, self.total)
        if self.bar is not None:
            self.bar.set_postfix_str(f"{tokens:,} tokens", refresh=False)
            self.bar.update(done - self.bar.n)
        elif self.total and now - self.shown >= SECONDS:
            self.shown, speed = now, done / (now - self.start) / 1e6
            size = f"{done / 1e6:,.0f} of {self.total / 1e6:,.0f} MB"
            print(f"tokenising: {size}, {speed:.1f} MB/s, {tokens:,} tokens", file=sys.stderr, flush=True)
