"""The server's traces with opentelemetry's SDK: its in-memory exporter, and a collector that takes OTLP over HTTP."""

import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from ling_kernels.generate.server.traces import Traces, make_traces
from tests.speller import speller
from tests.test_server import BODY, call, events, service

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
CHAT = dict(model="speller", messages=[dict(role="user", content="Hi")], temperature=0)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    return service(speller(tmp_path_factory.mktemp("traces") / "speller"), keys=frozenset({"k"}))


@pytest.fixture
def spans(served):
    exporter = InMemorySpanExporter()
    served.traces = Traces(exporter=exporter)

    def finished():
        served.traces.finish()
        return exporter.get_finished_spans()

    return finished


def ask(served, path, body, **headers):
    return call(served, path, body, headers={"authorization": "Bearer k", **headers})


def test_a_span_of_a_call(served, spans):
    before = time.time_ns()
    body = BODY | dict(max_tokens=3, seed=5, top_p=0.5, stop=["q"])
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
    answer = ask(served, "/v1/completions", body, **headers).json()
    after = time.time_ns()
    (span,) = spans()
    assert span.name == "text_completion speller" and span.kind == SpanKind.SERVER
    assert (f"{span.context.trace_id:032x}", f"{span.parent.span_id:016x}") == (TRACE, PARENT)
    assert dict(span.attributes) == {
        "gen_ai.operation.name": "text_completion",
        "gen_ai.provider.name": "ling_kernels",
        "gen_ai.request.model": "speller",
        "gen_ai.request.max_tokens": 3,
        "gen_ai.request.seed": 5,
        "gen_ai.request.temperature": BODY["temperature"],
        "gen_ai.request.top_p": 0.5,
        "gen_ai.request.stop_sequences": ("q",),
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.model": "speller",
        "gen_ai.response.finish_reasons": ("length",),
        "gen_ai.usage.input_tokens": answer["usage"]["prompt_tokens"],
        "gen_ai.usage.output_tokens": 3,
        "gen_ai.usage.cache_read.input_tokens": 0,
        "http.response.status_code": 200,
        "http.response.header.x-request-id": ("mine",),
    }
    assert [event.name for event in span.events] == ["queue", "prefill", "decode"]
    times = [before, span.start_time, *(event.timestamp for event in span.events), span.end_time, after]
    slack = 2_000_000  # ns: the clocks of a span and of a request are read one after the other
    assert all(a <= b + slack for a, b in zip(times, times[1:], strict=False))
    assert span.events[1].timestamp < span.events[2].timestamp, "a pass takes time"
    assert span.resource.attributes["service.name"] == "ling_kernels"


def test_streams_choices_and_calls_without_a_parent(served, spans):
    chat = CHAT | dict(n=2, max_tokens=2, stream=True, stream_options=dict(include_usage=True))
    answer = events(ask(served, "/v1/chat/completions", chat).text)
    (span,) = spans()
    assert span.name == "chat speller" and span.parent is None
    about = span.attributes
    assert about["gen_ai.request.choice.count"] == 2 and about["gen_ai.request.stream"] is True
    assert about["gen_ai.response.finish_reasons"] == ("length",) * 2
    assert about["gen_ai.usage.output_tokens"] == answer[-1]["usage"]["completion_tokens"] == 4
    assert [(e.name, e.attributes["gen_ai.choice.index"]) for e in span.events] == [
        (name, i) for i in range(2) for name in ("queue", "prefill", "decode")
    ]
    assert ask(served, "/v1/completions", BODY, traceparent=f"00-{TRACE}-{PARENT}-00").status_code == 200
    assert len(spans()) == 1, "the client samples its trace, and this call is not part of the sample"


def test_errors(served, spans, monkeypatch):
    ask(served, "/v1/completions", BODY | dict(max_tokens=-1))
    call(served, "/v1/completions", BODY)
    call(served, "/v1/models", headers={"authorization": "Bearer k"})
    monkeypatch.setattr(served, "timeout", 1e-9)
    ask(served, "/v1/completions", BODY)
    ask(served, "/v1/completions", BODY | dict(stream=True))
    found = spans()
    assert [span.attributes["error.type"] for span in found] == ["400", "401", "503", "timeout"]
    assert [span.status.status_code for span in found] == [StatusCode.UNSET] * 2 + [StatusCode.ERROR] * 2


def test_a_collector_gets_them(served, monkeypatch):
    got = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            got.append((self.path, self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{collector.server_port}"
        served.traces = make_traces(url)
        ask(served, "/v1/completions", BODY)
        served.traces.finish()
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", url)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
        served.traces = make_traces(None)
        ask(served, "/v1/completions", BODY)
        served.traces.finish()
        for _ in range(200):
            if len(got) == 2:
                break
            time.sleep(0.05)
        collector.shutdown()
    assert [path for path, _ in got] == ["/v1/traces"] * 2
    names = []
    for _, data in got:
        (resource,) = ExportTraceServiceRequest.FromString(data).resource_spans
        names.append({a.key: a.value.string_value for a in resource.resource.attributes}["service.name"])
        assert [s.name for scope in resource.scope_spans for s in scope.spans] == ["text_completion speller"]
    assert names == ["ling_kernels", "mine"]


def test_a_collector_that_is_not_there_costs_nothing(served):
    served.traces = make_traces("http://127.0.0.1:9")
    started = time.perf_counter()
    assert ask(served, "/v1/completions", BODY).status_code == 200
    served.traces.finish()
    assert time.perf_counter() - started < 60
