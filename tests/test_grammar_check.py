"""Grammars of strangers: a process tries them first, so that none ends the server or keeps it busy."""

import pytest

pytest.importorskip("llguidance")

from ling_kernels.errors import InputError
from ling_kernels.generate import Grammars, grammar, grammar_check
from ling_kernels.tokenizer import load_tokenizer
from tests.test_server import checkpoint, service  # noqa: F401 (a fixture)
from tests.test_server_structured import TEXT, post

NESTED = "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(4000)) + 'r4000: "a"'


@pytest.fixture(scope="module")
def guarded():
    return Grammars(load_tokenizer(), 320, guarded=True)


def test_a_grammar_that_ends_its_reader(guarded):
    """Of the stack, or of the time; the next grammar gets a new process."""
    first = guarded.json({"type": "integer"})
    process = guarded.trial.process
    with pytest.raises(InputError, match="too much time, memory or nesting"):
        guarded.lark(NESTED)
    assert process.returncode < 0 and guarded.trial.process is None
    assert guarded.json({"type": "integer"}) is first and guarded.regex("a").source
    assert guarded.trial.process.poll() is None


def test_a_grammar_that_takes_too_long(guarded, monkeypatch, tmp_path):
    script = tmp_path / "grammar_check.py"
    with open(grammar_check.__file__) as file:
        script.write_text(file.read().replace(f"CPU_SECONDS = {grammar_check.CPU_SECONDS}", "CPU_SECONDS = 0.2"))
    monkeypatch.setattr(grammar, "__file__", str(tmp_path / "grammar.py"))
    guarded.trial.process = None
    with pytest.raises(InputError, match="too much time"):
        guarded.json({"type": "integer", "multipleOf": 999_983})


@pytest.mark.parametrize("form, param", [
    (dict(regex="[^\\s\\S]"), "structured_outputs"), (dict(json={"$ref": "#"}), "structured_outputs"),
    (dict(grammar="start: start"), "structured_outputs"), (dict(grammar=NESTED), "structured_outputs"),
    (dict(grammar='start: "ab" x\nx: x'), None),
])  # fmt: skip
def test_a_grammar_without_texts_is_the_clients_error(checkpoint, form, param):  # noqa: F811
    server = service(checkpoint)
    answer = post(server, TEXT | dict(structured_outputs=form))
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param and "<" not in error["message"]
    assert "no text fits it" in error["message"] or form["grammar"] == NESTED
    streamed = post(server, TEXT | dict(structured_outputs=form, stream=True))
    assert error["message"] in streamed.text and "invalid_request_error" in streamed.text


def test_many_choices(guarded):
    chosen = guarded.choice([f"w{i}" for i in range(5000)])
    matcher = chosen.matcher.deep_copy()
    assert matcher.try_consume_tokens(list(b"w4999")) == 5 and matcher.is_accepting()


def test_json_object_false(checkpoint):  # noqa: F811
    server = service(checkpoint)
    error = post(server, TEXT | dict(structured_outputs=dict(json_object=False))).json()["error"]
    assert error["param"] == "structured_outputs" and "has one of" in error["message"]
    form = dict(json_object=False, json=None, regex="[0-9]{3}")
    assert len(post(server, TEXT | dict(structured_outputs=form)).json()["choices"][0]["text"]) == 3
