"""The server's counters and histograms in Prometheus' text format."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from itertools import accumulate

from ..engine import Engine
from ..pages.levels import PageLevels

FORMAT = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


Row = tuple[str, str, str, list[tuple[str, float]]]  # name, kind, description, (labels or suffix, value)


class Histogram:
    """Cumulative histogram of times in seconds."""

    def __init__(self):
        self.counts, self.sum = [0] * (len(BUCKETS_SECONDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(BUCKETS_SECONDS, seconds)] += 1
        self.sum += seconds

    def samples(self) -> list[tuple[str, float]]:
        """(suffix of the metric's name, value)."""
        cumulative = list(accumulate(self.counts))
        buckets = zip([*map(str, BUCKETS_SECONDS), "+Inf"], cumulative, strict=True)
        return [*((f'_bucket{{le="{le}"}}', n) for le, n in buckets), ("_sum", self.sum), ("_count", cumulative[-1])]


class Metrics:
    def __init__(self):
        self.responses = Counter()  # by HTTP status
        self.finished = Counter()  # requests by finish reason
        self.prompt_tokens = self.cached_tokens = self.generated_tokens = 0
        self.time_to_first_token, self.time_between_tokens, self.request_time = Histogram(), Histogram(), Histogram()
        self.queue_time, self.pass_time = Histogram(), Histogram()

    def text(self, engine: Engine | None) -> str:
        """engine: None while the model is loading."""
        rows = [*self.of_requests(), *(self.of_engine(engine) if engine else ())]
        return "".join(f"{line}\n" for row in rows for line in lines(*row))

    def of_requests(self) -> Iterator[Row]:
        yield from (
            ("http_responses_total", "counter", "HTTP responses by status", labelled("status", self.responses)),
            ("requests_total", "counter", "finished requests by finish reason", labelled("reason", self.finished)),
            ("prompt_tokens_total", "counter", "prompt tokens", [("", self.prompt_tokens)]),
            ("cached_prompt_tokens_total", "counter", "prompt tokens from the cache", [("", self.cached_tokens)]),
            ("generated_tokens_total", "counter", "generated tokens", [("", self.generated_tokens)]),
            ("time_to_first_token_seconds", "histogram", "from the call to a request's first token",
             self.time_to_first_token.samples()),
            ("time_between_tokens_seconds", "histogram", "between two tokens of a request",
             self.time_between_tokens.samples()),
            ("request_seconds", "histogram", "from the call to a request's end", self.request_time.samples()),
            ("queue_seconds", "histogram", "from the call to the first pass", self.queue_time.samples()),
            ("pass_seconds", "histogram", "a forward pass of the engine", self.pass_time.samples()),
        )  # fmt: skip

    def of_engine(self, engine: Engine) -> Iterator[Row]:
        pages, queue, record = engine.pages, engine.scheduler, engine.record
        yield from (
            ("drafted_tokens_total", "counter", "draft tokens verified", [("", engine.drafted)]),
            ("accepted_tokens_total", "counter", "draft tokens accepted", [("", engine.accepted)]),
            ("running_requests", "gauge", "requests in the batch", [("", len(queue.running))]),
            ("waiting_requests", "gauge", "requests in the queue", [("", queue.queued)]),
            ("waiting_requests_limit", "gauge", "queue length at which requests get 429", [("", queue.max_waiting)]),
            ("cache_pages", "gauge", "pages of the KV cache", [("", pages.count)]),
            ("cache_pages_available", "gauge", "pages without a running request", [("", pages.available)]),
            ("failed_passes", "gauge", "failed passes in a row", [("", record.failures)]),
            ("running_pass_seconds", "gauge", "since the running pass began", [("", record.stuck_for())]),
        )  # fmt: skip
        if pages.levels is not None:
            yield from of_levels(pages.levels)


def of_levels(levels: PageLevels) -> Iterator[Row]:
    """Of the cache's levels below the device; the folder's bytes count all engines' files there."""
    host, disk = levels.host, levels.disk
    used, limits = Counter(host=host.used_bytes), Counter(host=host.count * host.row_bytes)
    if disk is not None:
        used["disk"], limits["disk"] = disk.bytes, disk.limit
        yield "cache_damaged_files_total", "counter", "files removed because they were wrong", [("", disk.damaged)]
        yield "cache_failed_files_total", "counter", "files not read or written, by an error", [("", disk.failed)]
    yield "cache_hit_tokens_total", "counter", "tokens not computed, by level", labelled("level", levels.hits)
    yield "cache_level_bytes", "gauge", "bytes of pages, by level", labelled("level", used)
    yield "cache_level_bytes_limit", "gauge", "limit of these bytes", labelled("level", limits)
    yield "cache_skipped_pages_total", "counter", "pages not saved, as others were waiting", [("", levels.skipped)]


def lines(name: str, kind: str, description: str, samples: list[tuple[str, float]]) -> Iterator[str]:
    """A metric in the text format."""
    yield f"# HELP ling_{name} {description}"
    yield f"# TYPE ling_{name} {kind}"
    yield from (f"ling_{name}{label} {value}" for label, value in samples)


def labelled(label: str, counts: Counter) -> list[tuple[str, int]]:
    return [(f'{{{label}="{key}"}}', n) for key, n in sorted(counts.items())]
