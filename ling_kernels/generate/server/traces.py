"""Traces of calls with OpenTelemetry, where it is installed: a span of each completion, with the attributes of the
conventions for generative AI. Its parent is the span that the client names in `traceparent`.

A span is made when its call has ended, from times that are kept anyway. Texts are not in it.
"""

import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from ...errors import InputError
from .answers import Choice
from .protocol import ChatCompletionRequest, CompletionRequest

OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat"}
ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")  # OpenTelemetry's own variables
NAMES = ("OTEL_SERVICE_NAME", "OTEL_RESOURCE_ATTRIBUTES")
MISSING = "opentelemetry is not installed: pip install '.[telemetry]'"
FLUSH_SECONDS = 2.0  # that the last spans may take when the server ends


class Traces:
    """exporter: opentelemetry's; None: one that sends OTLP over HTTP to `endpoint`, or where the variables say."""

    def __init__(self, endpoint: str | None = None, exporter=None):
        try:
            from opentelemetry import propagate, trace
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor

            if exporter is None:
                from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

                exporter = OTLPSpanExporter(endpoint=endpoint and traces_url(endpoint))
        except ImportError:
            raise InputError(MISSING) from None
        named = any(name in os.environ for name in NAMES)
        resource = Resource.create({} if named else {"service.name": "ling_kernels"})
        self.provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self.provider.add_span_processor(BatchSpanProcessor(exporter))
        self.tracer = self.provider.get_tracer("ling_kernels")
        self.extract, self.kind, self.error = propagate.extract, trace.SpanKind.SERVER, trace.StatusCode.ERROR

    def add(self, path: str, headers: Mapping[bytes, str], state: Mapping[str, Any], started: int, status: int) -> None:
        """Record a call of a completion that has ended. started: in ns; state: of the call, see Guard; with `answer`,
        (body, id, choices), where it came to that."""
        operation = OPERATIONS.get(path)
        if operation is None:
            return
        about: dict[str, Any] = {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "ling_kernels",
            "http.response.status_code": status,
            "http.response.header.x-request-id": [state["id"]],
        }
        name, choices, fault = operation, [], str(status) if status >= 400 else None
        if "answer" in state:
            body, answer_id, choices = state["answer"]
            name = f"{operation} {body.model}"
            about |= {**asked(body), **answered(body, choices), "gen_ai.response.id": answer_id}
            faults = [type(c.request.error).__name__ for c in choices if c.request.error is not None]
            faults += [c.request.finished for c in choices if c.request.finished == "timeout"]
            fault = fault or next(iter(faults), None)
        if fault is not None:
            about["error.type"] = fault
        carrier = {key.decode("latin-1"): value for key, value in headers.items()}
        span = self.tracer.start_span(
            name, context=self.extract(carrier), kind=self.kind, attributes=about, start_time=started
        )
        for i, choice in enumerate(choices):
            for event, when in phases(choice).items():
                span.add_event(event, {"gen_ai.choice.index": i} if len(choices) > 1 else None, timestamp=when)
        if fault is not None and not 400 <= status < 500:
            span.set_status(self.error)
        span.end()

    def finish(self) -> None:
        """Send the last spans. A collector that does not answer would hold the flush for longer than it is told."""
        flush = threading.Thread(target=self.provider.force_flush, daemon=True)
        flush.start()
        flush.join(FLUSH_SECONDS)


def asked(body: CompletionRequest | ChatCompletionRequest) -> dict[str, Any]:
    """What the body says; defaults are left out."""
    given: dict[str, Any] = {
        "model": body.model,
        "max_tokens": body.max_new_tokens()[0],
        "seed": body.seed,
        "choice.count": body.n if body.n > 1 else None,
        "stop_sequences": body.stop_strings() or None,
        "stream": body.stream or None,
    }
    for field in ("temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty"):
        given[field] = getattr(body, field) if field in body.model_fields_set else None
    return {f"gen_ai.request.{key}": value for key, value in given.items() if value is not None}


def answered(body: CompletionRequest | ChatCompletionRequest, choices: list[Choice]) -> dict[str, Any]:
    prompts = choices[:: body.n]
    return {
        "gen_ai.response.model": body.model,
        "gen_ai.response.finish_reasons": [c.finish_reason or c.request.finished or "cancelled" for c in choices],
        "gen_ai.usage.input_tokens": sum(len(c.request.prompt) for c in prompts),
        "gen_ai.usage.output_tokens": sum(c.num_new_tokens for c in choices),
        "gen_ai.usage.cache_read.input_tokens": sum(c.cached_tokens for c in prompts),
    }


def phases(choice: Choice) -> dict[str, int]:
    """When a choice began to wait, to compute its prompt, and to give tokens, in ns since 1970."""
    now, monotonic = time.time_ns(), time.monotonic()
    times = {"queue": choice.request.submitted, "prefill": choice.request.admitted, "decode": choice.first_token}
    return {name: now - round((monotonic - when) * 1e9) for name, when in times.items() if when is not None}


def traces_url(endpoint: str) -> str:
    """Of a collector's base URL, as the variable OTEL_EXPORTER_OTLP_ENDPOINT has. Raises InputError."""
    if urlsplit(endpoint).scheme not in ("http", "https") or not urlsplit(endpoint).netloc:
        raise InputError(f"--otlp {endpoint} is no URL, such as http://localhost:4318")
    return f"{endpoint.rstrip('/')}/v1/traces"


def make_traces(endpoint: str | None) -> Traces | None:
    """Of the flag, or of OpenTelemetry's variables; these are no reason to fail where the package is missing."""
    if endpoint is not None:
        traces_url(endpoint)
        return Traces(endpoint)
    found = next(filter(os.environ.get, ENDPOINTS), None)
    try:
        return None if found is None else Traces()
    except InputError as error:
        print(f"{found} is set, but {error}: no traces", file=sys.stderr)
        return None
