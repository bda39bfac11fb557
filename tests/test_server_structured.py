"""Structured output over HTTP: response_format, structured_outputs, a forced tool_choice; and what is refused."""

import json
import re
import sys

import pytest

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

from ling_kernels.generate.server import answers  # noqa: E402
from tests.speller import speller  # noqa: E402
from tests.test_server import call, events, service  # noqa: E402

SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"enum": [3, 15]}},
          "required": ["name", "n"], "additionalProperties": False}  # fmt: skip
SHORT = {str(c): -60.0 for c in b" \n0123456789"} | {str(c): 30.0 for c in b'"}'}  # no blanks, short texts
TEXT = dict(model="speller", prompt="a", temperature=0, max_tokens=100, logit_bias=SHORT)
CHAT = dict(TEXT, messages=[dict(role="user", content="x")])
del CHAT["prompt"]
TOOLS = [
    dict(type="function", function=dict(name="add", parameters={
        "type": "object", "properties": {"a": {"$ref": "#/$defs/n"}}, "required": ["a"], "additionalProperties": False,
        "$defs": {"n": {"type": "integer", "minimum": 1, "maximum": 9}}})),
    dict(type="function", function=dict(name="stop it")),
]  # fmt: skip
BAD_TOOL = [dict(type="function", function=dict(name="f", parameters={"type": 3}))]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return speller(tmp_path_factory.mktemp("structured") / "speller", positions=1500)


@pytest.fixture(scope="module", params=[0, 2], ids=["plain", "drafts"])
def shared(request, checkpoint):
    return service(checkpoint, dict(draft=request.param))


def post(shared, body):
    return call(shared, "/v1/chat/completions" if "messages" in body else "/v1/completions", body)


def answer(shared, body):
    """(text or message, finish reason); in a stream the same text."""
    response = post(shared, body)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    if "message" not in choice:
        pieces = events(post(shared, body | dict(stream=True)).text)
        assert "".join(p["choices"][0]["text"] for p in pieces) == choice["text"]
    return choice.get("message", choice.get("text")), choice["finish_reason"]


@pytest.mark.parametrize("body", [TEXT, CHAT], ids=["text", "chat"])
def test_json(shared, body):
    of_schema = dict(response_format=dict(type="json_schema", json_schema=dict(name="x", schema=SCHEMA, strict=True)))
    for more in (of_schema, dict(structured_outputs=dict(json=SCHEMA)),
                 dict(structured_outputs=dict(json=json.dumps(SCHEMA)))):  # fmt: skip
        got, reason = answer(shared, body | more)
        jsonschema.validate(json.loads(got if isinstance(got, str) else got["content"]), SCHEMA)
        assert reason == "stop"
    got, reason = answer(shared, body | dict(response_format=dict(type="json_object")))
    assert isinstance(json.loads(got if isinstance(got, str) else got["content"]), dict) and reason == "stop"
    assert answer(shared, body | dict(response_format=dict(type="text"), max_tokens=3))[1] == "length"


@pytest.mark.parametrize("form, pattern", [
    (dict(regex="[bx]{3,5}!"), "[bx]{3,5}!"), (dict(choice=["yes", "no"]), "yes|no"),
    (dict(grammar='start: "<" ("a" | "b")~2 ">"'), "<[ab]{2}>"),
])  # fmt: skip
def test_other_forms(shared, form, pattern):
    got, reason = answer(shared, TEXT | dict(structured_outputs=form))
    assert re.fullmatch(pattern, got) and reason == "stop"


@pytest.mark.parametrize("choice", ["required", dict(type="function", function=dict(name="add"))])
def test_a_call_that_must_come(shared, choice):
    for stream in (False, True):
        response = post(shared, CHAT | dict(tools=TOOLS, tool_choice=choice, stream=stream))
        assert response.status_code == 200, response.text
        if stream:
            pieces = [p["choices"][0]["delta"] for p in events(response.text)]
            calls = [c for p in pieces for c in p.get("tool_calls", [])]
        else:
            message = response.json()["choices"][0]["message"]
            assert message["content"] is None
            calls = message["tool_calls"]
        for c in calls:
            name, arguments = c["function"]["name"], json.loads(c["function"]["arguments"])
            assert name == "stop it" or (name == "add" and 1 <= arguments["a"] <= 9)
        assert calls and (choice == "required" or [c["function"]["name"] for c in calls] == ["add"])


@pytest.mark.parametrize("special", [True, False])
def test_a_thought_may_come_first(shared, monkeypatch, special):
    """Where the prompt has opened it; also where </think> is no token of its own."""
    monkeypatch.setattr(answers, "opens_thought", lambda tokenizer, prompt: True)
    if not special:
        monkeypatch.setattr(shared.grammars(), "token", json.dumps)
    end = shared.tokenizer.vocab["</think>"] if special else ord("<")
    body = CHAT | dict(structured_outputs=dict(regex="[0-9]{3}"), logit_bias={str(end): 15}, skip_special_tokens=True)
    message, reason = answer(shared, body)
    assert reason == "length" or re.fullmatch("[0-9]{3}", message["content"])
    body = body | dict(logit_bias={str(end): 100} | ({} if special else {str(c): 99 for c in b"/"}))
    if special:
        message, reason = answer(shared, body)
        assert re.fullmatch("[0-9]{3}", message["content"]) and reason == "stop"


@pytest.mark.parametrize("thinks", [True, False])
def test_a_thought_that_the_body_allows(shared, thinks):
    """Ling's prompts do not open it."""
    begin, end = (str(shared.tokenizer.vocab[name]) for name in ("<think>", "</think>"))
    bias = {"10": -100.0} | ({begin: 100.0, end: 90.0} if thinks else {begin: -100.0})
    body = CHAT | dict(structured_outputs=dict(regex="[0-9]{3}"), chat_template_kwargs=dict(enable_thinking=True))
    response = post(shared, body | dict(logit_bias=bias))
    assert response.status_code == 200, response.text
    message = response.json()["choices"][0]["message"]
    assert re.fullmatch("[0-9]{3}", message["content"])
    assert response.json()["usage"]["completion_tokens"] == (5 if thinks else 3)


def of(schema) -> dict:
    return dict(type="json_schema", json_schema=dict(name="x", schema=schema))


@pytest.mark.parametrize("body, field, message", [
    (TEXT | dict(response_format=dict(type="xml")), "response_format.type", "json_object"),
    (TEXT | dict(response_format=dict(type="json_schema")), "response_format", "json_schema"),
    (TEXT | dict(response_format=dict(type="json_object", json_schema={})), "response_format", "json_schema"),
    (TEXT | dict(response_format=of({"type": "objec"})), "response_format", "objec"),
    (TEXT | dict(response_format=of({"not": {}})), "response_format", "not"),
    (TEXT | dict(structured_outputs=dict(json="{")), "structured_outputs", "JSON"),
    (TEXT | dict(structured_outputs=dict(json="[1]")), "structured_outputs", "object"),
    (TEXT | dict(structured_outputs=dict(regex="[ab")), "structured_outputs", "unclosed"),
    (TEXT | dict(structured_outputs=dict(grammar="start: x")), "structured_outputs", "unknown name"),
    (TEXT | dict(structured_outputs=dict(choice=[])), "structured_outputs", "texts"),
    (TEXT | dict(structured_outputs={}), "structured_outputs", "one of"),
    (TEXT | dict(structured_outputs=dict(regex="a", grammar="b")), "structured_outputs", "one of"),
    (TEXT | dict(structured_outputs=dict(ebnf="b")), "structured_outputs.ebnf", "not permitted"),
    (TEXT | dict(structured_outputs=dict(regex="a"), response_format=of(SCHEMA)), "response_format", "one of them"),
    (TEXT | dict(response_format=of(SCHEMA), ignore_eos=True), "response_format", "ignore_eos"),
    (TEXT | dict(response_format=of(SCHEMA), min_tokens=3), "response_format", "min_tokens"),
    (CHAT | dict(response_format=of(SCHEMA), tools=TOOLS), "response_format", "tools"),
    (CHAT | dict(tool_choice="required"), "tool_choice", "no such function"),
    (CHAT | dict(tools=TOOLS, tool_choice=dict(type="function", function=dict(name="x"))), "tool_choice", "no such"),
    (CHAT | dict(tools=BAD_TOOL, tool_choice="required"), "tool_choice", "parameters of f"),
])  # fmt: skip
def test_bad_forms_name_their_field(shared, body, field, message):
    response = post(shared, body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == field and message in error["message"], error
    assert len(error["message"].splitlines()) == 1 and len(error["message"]) < 500
    assert shared.engine.scheduler.queued == 0


def test_without_the_package(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    error = post(service(checkpoint), TEXT | dict(response_format=of(SCHEMA)))
    assert error.status_code == 400 and error.json()["error"]["param"] == "response_format"
    assert "pip install '.[structured]'" in error.json()["error"]["message"]
