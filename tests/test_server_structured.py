"""Structured output over HTTP: response_format, structured_outputs, a forced tool_choice; and what is refused."""

import json
import re
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")

from ling_kernels.generate import grammar  # noqa: E402
from ling_kernels.generate.server import answers, new_grammars  # noqa: E402
from ling_kernels.generate.server.answers import ChatWriter, Piece  # noqa: E402
from ling_kernels.generate.server.protocol import ChatCompletionRequest  # noqa: E402
from ling_kernels.generate.server.structured import call_grammar  # noqa: E402
from ling_kernels.tokenizer import byte_tokenizer_json  # noqa: E402
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
OF_SCHEMA = dict(response_format=dict(type="json_schema", json_schema=dict(name="x", schema=SCHEMA, strict=True)))
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
    for more in (OF_SCHEMA, dict(structured_outputs=dict(json=SCHEMA)),
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


def without_tags(shared) -> grammar.Grammars:
    """Grammars for a tokenizer that has no tokens for tool calls: it spells them."""
    tokenizer = byte_tokenizer_json()
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if "tool" not in t["content"]]
    backend = SimpleNamespace(to_str=lambda: json.dumps(tokenizer))
    vocab = {t["content"]: t["id"] for t in tokenizer["added_tokens"]}
    return grammar.Grammars(SimpleNamespace(backend=backend, vocab=vocab, eos_id=257), shared.vocabulary)


def parts(shared, body) -> tuple[str, list[tuple[str, str]], str]:
    """(content, calls, finish reason), which a stream has too."""
    body = body | dict(max_tokens=400)
    response = post(shared, body)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    content = choice["message"]["content"] or ""
    calls = [call["function"] for call in choice["message"].get("tool_calls", [])]
    pieces = [p["choices"][0] for p in events(post(shared, body | dict(stream=True)).text)]
    assert "".join(p["delta"].get("content", "") for p in pieces) == content
    streamed = [call for p in pieces for call in p["delta"].get("tool_calls", [])]
    assert [call["function"] for call in streamed] == calls and [c["index"] for c in streamed] == [*range(len(calls))]
    return content, [(c["name"], json.loads(c["arguments"])) for c in calls], choice["finish_reason"]


def strict(tool):
    return tool | dict(function=tool["function"] | dict(strict=True))


@pytest.mark.parametrize("form, letters", [(OF_SCHEMA, False), (dict(structured_outputs=dict(regex="[0-9]{3}")), True)])
def test_a_form_or_a_call(shared, monkeypatch, form, letters):
    """Whichever the model prefers; the call's arguments follow the schema where the function is strict."""
    if letters:
        monkeypatch.setattr(shared, "_grammars", without_tags(shared))
    begin = str(ord("<")) if letters else "265"
    body = CHAT | dict(tools=[strict(TOOLS[0])]) | form
    content, calls, reason = parts(shared, body | dict(logit_bias=SHORT | {begin: -100.0}))
    if letters:
        assert re.fullmatch("[0-9]{3}", content)
    else:
        jsonschema.validate(json.loads(content), SCHEMA)
    assert not calls and reason == "stop"
    content, calls, reason = parts(shared, body | dict(logit_bias=SHORT | {begin: 100.0}))
    assert not content and reason == "tool_calls"
    assert {name for name, _ in calls} == {"add"} and all(1 <= arguments["a"] <= 9 for _, arguments in calls)


@pytest.mark.parametrize("choice", ["none", "required", dict(type="function", function=dict(name="add"))])
def test_a_form_beside_a_choice(shared, choice):
    """A forced call leaves no text that could have the form; without calls the text has it."""
    body = CHAT | dict(tools=TOOLS, tool_choice=choice) | OF_SCHEMA
    content, calls, reason = parts(shared, body)
    assert bool(calls) == (choice != "none") == (not content) == (reason == "tool_calls")


def test_functions_that_are_not_strict(shared):
    """Where a call is the model's choice their arguments are any object: a schema that none can follow is no error."""
    tools = [dict(type="function", function=dict(name="f", parameters={"not": {}}))]
    body = CHAT | dict(tools=tools, response_format=dict(type="json_object"))
    _, calls, reason = parts(shared, body | dict(logit_bias=SHORT | {"265": 100.0}))
    assert reason == "tool_calls" and all(isinstance(arguments, dict) for _, arguments in calls)
    assert parts(shared, CHAT | dict(tools=tools, logit_bias={})) == ("XYZ", [], "stop")


def test_strict_calls_in_free_text(shared):
    body = CHAT | dict(tools=[strict(TOOLS[0]), TOOLS[1]], parallel_tool_calls=False)
    assert parts(shared, body | dict(logit_bias={})) == ("XYZ", [], "stop")
    content, ((name, arguments),), reason = parts(shared, body | dict(logit_bias=SHORT | {"265": 100.0, "97": 40.0}))
    assert content == "" and name == "add" and 1 <= arguments["a"] <= 9 and reason == "tool_calls"


def written(name, arguments) -> str:
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


ADD, OTHER = written("add", '{"a": 3}'), written("f", '{"b": [1]}')
FREE, FORM = {True}, {False}  # in a grammar of any text beside calls; of a form
TEXTS = {
    "hello": FREE, "": FREE, "< tool_call": FREE, f"text\n{ADD}": FREE, f'{{"name": "ab", "n": 3}}\n{ADD}': FREE,
    '{"name": "ab", "n": 3}': FREE | FORM, ADD: FREE | FORM, OTHER: FREE | FORM, f"{ADD}\n{OTHER}": FREE | FORM,
    f"{ADD}{OTHER}": {}, f"{ADD} more": {}, f"text\n{ADD}\nmore": {}, written("add", '{"a": 10}'): {},
    written("add", '{"b": 1}'): {}, written("f", "3"): {}, written("g", "{}"): {},
}  # fmt: skip


@pytest.mark.parametrize("letters", [False, True])
@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("several", [True, False])
def test_texts_of_the_grammars(shared, letters, free, several):
    grammars = without_tags(shared) if letters else shared.grammars()
    functions = [strict(TOOLS[0])["function"], dict(name="f", parameters={"not": {}})]
    found = call_grammar(grammars, functions, several, True if free else grammars.json(SCHEMA))
    for text, where in TEXTS.items():
        ids, matcher = shared.tokenizer.encode(text, special=not letters), found.matcher.deep_copy()
        fits = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
        assert fits == (free in where and (several or text.count(ADD) + text.count(OTHER) < 2)), text
    spelled = [*b"a <tool_call>{"]  # where the tag is a token, letters are no way round the schema
    assert free is False or found.matcher.deep_copy().try_consume_tokens(spelled) == len(spelled) - 2 + letters


def test_at_most_one_call(shared):
    """Also where no grammar is needed: then later ones are left out."""
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n' * 2
    request = SimpleNamespace(prompt=[97])
    choice = SimpleNamespace(service=shared, request=request, finish_reason="stop")
    for several, count in ((True, 2), (False, 1)):
        body = ChatCompletionRequest(model="m", messages=CHAT["messages"], tools=TOOLS, parallel_tool_calls=several)
        found, reason = ChatWriter(choice, body).whole([Piece(c, []) for c in text])
        assert len(found["message"]["tool_calls"]) == count and reason == "tool_calls"
        writer = ChatWriter(choice, body)
        deltas = [delta["delta"] for c in text if (delta := writer.piece(Piece(c, [])))]
        assert len([call for delta in deltas for call in delta.get("tool_calls", [])]) == count


@pytest.mark.parametrize("special", [True, False])
def test_a_thought_may_come_first(shared, monkeypatch, special):
    """Where the prompt has opened it; also where </think> is no token of its own."""
    for module in (answers, new_grammars):
        monkeypatch.setattr(module, "opens_thought", lambda tokenizer, prompt: True)
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
    (CHAT | dict(response_format=of({"not": {}}), tools=TOOLS), "response_format", "not"),
    (CHAT | dict(tools=[strict(TOOLS[0])], min_tokens=3), "tools", "min_tokens"),
    (CHAT | dict(tools=[strict(BAD_TOOL[0])]), "tools", "parameters of f"),
    (CHAT | dict(tools=[dict(type="function", function=dict(name="f", strict=1))]), "tools.0", "neither true nor"),
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
