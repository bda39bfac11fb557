"""Bodies within the limit of their size that take long, or much memory, where each wrong value makes an error."""

# ruff: noqa: F811 (fixtures are imported)
import gc
import json
import threading

import pytest

pytest.importorskip("fastapi")

from pydantic import ValidationError  # noqa: E402

from ling_kernels.generate.server import app  # noqa: E402
from ling_kernels.generate.server.command import Loading  # noqa: E402
from ling_kernels.generate.server.protocol import (  # noqa: E402
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from tests.test_server import BODY, call, checkpoint, shared  # noqa: E402, F401

JSON = {"content-type": "application/json"}
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
KINDS = {
    COMPLETIONS: CompletionRequest, CHAT: ChatCompletionRequest,
    "/tokenize": TokenizeRequest, "/detokenize": DetokenizeRequest,
}  # fmt: skip
MANY = 100_000
FEW = 5  # errors


def chat(*messages, **more) -> dict:
    return dict(model="speller", messages=messages or [dict(role="user", content="x")]) | more


def nested(depth: int):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


BODIES = [
    (COMPLETIONS, BODY | dict(stop=[1] * MANY), "stop"),
    (COMPLETIONS, BODY | dict(prompt=[{}] * MANY), "prompt"),
    (COMPLETIONS, BODY | dict(prompt=[[{}] * MANY]), "prompt"),
    (COMPLETIONS, BODY | dict(prompt=[[1]] * MANY), "prompt"),
    (COMPLETIONS, BODY | dict(prompt=[1] * MANY + ["a"] * MANY), "prompt"),
    (COMPLETIONS, BODY | dict(prompt=[1] * 4 * MANY), "max_tokens"),
    (COMPLETIONS, BODY | dict(prompt=nested(400)), "prompt"),
    (COMPLETIONS, BODY | dict(suffix=nested(400)), "suffix"),
    (COMPLETIONS, BODY | dict(stop_token_ids=["1"] * MANY), "stop_token_ids.0"),
    (COMPLETIONS, BODY | dict(logit_bias={str(i): "x" for i in range(MANY // 2)}), "logit_bias"),
    (COMPLETIONS, BODY | dict(logit_bias={str(i): 1 for i in range(MANY // 2)}), "logit_bias"),
    (COMPLETIONS, BODY | dict(structured_outputs=dict(choice=[1] * MANY)), "structured_outputs.choice.0"),
    (COMPLETIONS, BODY | {f"x{i}": 1 for i in range(MANY // 2)}, "x0"),
    (COMPLETIONS, BODY | dict(stream_options={f"x{i}": 1 for i in range(MANY // 2)}), "stream_options.x0"),
    (CHAT, chat(*[{}] * MANY), "messages.0.role"),
    (CHAT, chat(*[dict(role="user", content="x")] * (MANY // 4)), "messages"),
    (CHAT, chat(dict(role="user", content=[{}] * MANY)), "messages.0.content"),
    (CHAT, chat(dict(role="user", content=[dict(type="text")] * (MANY // 2))), "messages.0.content"),
    (CHAT, chat(dict(role="assistant", content="", tool_calls=[{}] * MANY)), "messages.0.tool_calls.0.function"),
    (CHAT, chat(tools=[{}] * MANY), "tools.0.type"),
    ("/tokenize", dict(messages=[{}] * MANY), "messages.0.role"),
    ("/detokenize", dict(tokens=["1"] * MANY), "tokens.0"),
]  # fmt: skip


@pytest.mark.parametrize("path, body, field", BODIES, ids=[f"{path} {field}" for path, _, field in BODIES])
def test_a_body_of_many_errors(shared, monkeypatch, path, body, field):
    """It makes a few errors, in a thread other than the event loop's, and the first is answered with its field."""
    threads = []

    def parse(*args):
        threads.append(threading.current_thread())
        return real(*args)

    real = app.parse_body
    monkeypatch.setattr(app, "parse_body", parse)
    content = json.dumps(body, separators=(",", ":")).encode()
    assert len(content) <= shared.max_body
    response = call(shared, path, content=content, headers=JSON)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == field, error
    assert len(response.content) < 1000
    assert len(threads) == 1 and threads[0] is not threading.current_thread()
    try:
        KINDS[path].model_validate(body)
        assert field == "max_tokens", "the body is right, but its prompt is too long"
    except ValidationError as failed:
        assert 1 <= failed.error_count() <= FEW


@pytest.mark.parametrize("content, message", [
    (b"[" * MANY, "nests too deeply"),
    (b'{"model":"speller","prompt":' + b"9" * MANY + b"}", "not JSON"),
    (b'{"model":"speller","prompt":"\xff"}', "not JSON"),
    (b'{"model":"speller",', "not JSON"),
    (b"[" + b"1," * MANY + b"1]", "must be a JSON object"),
])  # fmt: skip
@pytest.mark.parametrize("path", list(KINDS))
def test_what_is_no_object(shared, path, content, message):
    response = call(shared, path, content=content, headers=JSON)
    assert response.status_code == 400 and message in response.json()["error"]["message"]
    other = call(shared, path, content=b"{}", headers={"content-type": "text/plain"})
    assert other.status_code == 400 and "application/json" in other.json()["error"]["message"]


def test_a_long_name_of_a_field_is_cut(shared):
    error = call(shared, COMPLETIONS, BODY | {"x" * MANY: 1})
    assert error.status_code == 400 and error.json()["error"]["param"].startswith("xxx") and len(error.content) < 2000


@pytest.mark.parametrize("depth", [100, 400, 900])
def test_deep_values_that_are_passed_on(shared, depth):
    """Schemas and arguments reach the template, and what is only taken is not looked at."""
    deep = dict(a=nested(depth))
    function = dict(name="f", parameters=deep)
    made = dict(role="assistant", content="", tool_calls=[dict(function=dict(name="f", arguments=deep))])
    for body in (
        chat(tools=[dict(type="function", function=function)]),
        chat(tools=[dict(type="function", function=function)], tool_choice="required"),
        chat(dict(role="user", content="x"), made),
        chat(metadata=deep, max_tokens=1),
        chat(response_format=dict(type="json_schema", json_schema=dict(schema=deep))),
    ):
        response = call(shared, CHAT, body)
        assert response.status_code in (200, 400), response.text
        assert response.status_code == 200 or response.json()["error"]["message"]


def test_what_was_loaded_is_not_collected_again(shared):
    Loading(lambda progress: shared.engine, shared, "").run()
    try:
        assert gc.get_freeze_count() > 10_000
    finally:
        gc.unfreeze()
