"""What the server counts, in Prometheus' text format."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate

from .engine import Engine

FORMAT = "text/plain; version=0.0.4; charset=utf-8"
TO_MINUTES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Of seconds: how many were at most so long."""

    def __init__(self):
        self.counts, self.sum = [0] * (len(TO_MINUTES) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(TO_MINUTES, seconds)] += 1
        self.sum += seconds

    def samples(self) -> list[tuple[str, float]]:
        reached = list(accumulate(self.counts))
        buckets = zip([*map(str, TO_MINUTES), "+Inf"], reached, strict=True)
        return [*((f'_bucket{{le="{le}"}}', n) for le, n in buckets), ("_sum", self.sum), ("_count", reached[-1])]


class Metrics:
    def __init__(self):
        self.responses, self.ended = Counter(), Counter()  # by status; requests, by what ended them
        self.read = self.cached = self.written = 0  # tokens
        self.first, self.between, self.whole = Histogram(), Histogram(), Histogram()

    def text(self, engine: Engine) -> str:
        return "".join(f"{line}\n" for line in self.lines(engine))

    def lines(self, engine: Engine) -> Iterator[str]:
        pages, queue = engine.pages, engine.scheduler
        for name, kind, told, samples in (
            ("http_responses_total", "counter", "answers, by status", labelled("status", self.responses)),
            ("requests_total", "counter", "texts that ended, by what ended them", labelled("reason", self.ended)),
            ("prompt_tokens_total", "counter", "tokens read", [("", self.read)]),
            ("cached_prompt_tokens_total", "counter", "of these, found in the cache", [("", self.cached)]),
            ("generated_tokens_total", "counter", "tokens written", [("", self.written)]),
            ("drafted_tokens_total", "counter", "tokens guessed ahead", [("", engine.guessed)]),
            ("accepted_tokens_total", "counter", "of these, right", [("", engine.right)]),
            ("running_requests", "gauge", "texts in the batch", [("", len(queue.running))]),
            ("waiting_requests", "gauge", "texts in the queue", [("", queue.queued)]),
            ("waiting_requests_limit", "gauge", "above which calls are refused", [("", queue.max_waiting)]),
            ("cache_pages", "gauge", "pages of the KV cache", [("", pages.count)]),
            ("cache_pages_available", "gauge", "of these, held by no text", [("", pages.available)]),
            ("time_to_first_token_seconds", "histogram", "from the call to a text's first token", self.first.samples()),
            ("time_between_tokens_seconds", "histogram", "from a token to the next", self.between.samples()),
            ("request_seconds", "histogram", "from the call to a text's end", self.whole.samples()),
        ):
            yield f"# HELP ling_{name} {told}"
            yield f"# TYPE ling_{name} {kind}"
            yield from (f"ling_{name}{label} {value}" for label, value in samples)


def labelled(label: str, counts: Counter) -> list[tuple[str, int]]:
    return [(f'{{{label}="{key}"}}', n) for key, n in sorted(counts.items())]
