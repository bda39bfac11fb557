"""Fuzzer of HTTP requests: the right text, or OpenAI's error object with a status below 500."""

# ruff: noqa: F811 (fixtures are imported)
import json

from ling_kernels.generate.server.protocol import IGNORED, UNSUPPORTED
from tests.fuzz import changed, damaged, fuzz, hypothesis, is_clear, st, values
from tests.speller import EOS, NEXT, ROLE_END
from tests.test_server import call, checkpoint, events, shared  # noqa: F401

given, example = hypothesis.given, hypothesis.example
FULL = dict(
    model="speller", prompt=[[97], [98, 99]], max_tokens=3, temperature=0, top_p=0.9, top_k=3, min_p=0.1,
    repetition_penalty=1.0, seed=1, n=1, stop=["zz"], stream=False, stream_options={"include_usage": True},
    ignore_eos=False, echo=False, logprobs=2, stop_token_ids=[3], priority=1,
    presence_penalty=0.5, frequency_penalty=0.5, logit_bias={"98": 1.0}, min_tokens=1, skip_special_tokens=True,
)  # fmt: skip
CHAT = {k: v for k, v in FULL.items() if k not in ("prompt", "echo", "logprobs")} | dict(
    messages=[dict(role="system", content="S"), dict(role="user", content=[dict(type="text", text="Hi")], name="bob"),
              dict(role="assistant", content="XYZ", refusal=None, tool_calls=[]), dict(role="user", content="?")],
    max_completion_tokens=2, logprobs=True, top_logprobs=1, tools=[dict(type="function", function=dict(name="f"))],
    tool_choice="auto", continue_final_message=False, add_generation_prompt=True,
)  # fmt: skip
PATHS = {"/v1/completions": FULL, "/v1/chat/completions": CHAT}
JSON = {"content-type": "application/json"}
FIELDS = sorted({*FULL, *CHAT, *UNSUPPORTED, *IGNORED, "response_format", "structured_outputs", "x"})


def check_error(response) -> None:
    assert 400 <= response.status_code < 500, response.text
    error = response.json()["error"]
    assert is_clear(error["message"]), error
    assert error["type"] == "invalid_request_error" and (error["code"] is None or isinstance(error["code"], str))
    assert error["param"] is None or isinstance(error["param"], str)


def check_answer(shared, path, response) -> None:
    """Choices with text and reason, and counts that fit; or an error. No request is left."""
    if response.status_code != 200:
        check_error(response)
    elif response.headers["content-type"].startswith("text/event-stream"):
        pieces = events(response.text)
        assert pieces and all(p["choices"] or p["usage"] for p in pieces)
    else:
        answer = response.json()
        usage = answer["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert [c["index"] for c in answer["choices"]] == [*range(len(answer["choices"]))]
        assert all(c["finish_reason"] in ("stop", "length") for c in answer["choices"])
    engine = shared.engine
    assert engine.scheduler.queued == 0 and engine.pages.available == engine.pages.count, "a request is left"


def send(shared, path: str, body) -> object:
    """The response to a body: bytes, or a value that JSON can write, also with NaN and lone surrogates."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return call(shared, path, content=content or b" ", headers=JSON)


@fuzz(250)
@given(st.data(), st.sampled_from([*PATHS]))
def test_changed_bodies(shared, data, path):
    body = data.draw(changed(PATHS[path] | dict(stream=data.draw(st.booleans()))))
    more = data.draw(st.dictionaries(st.sampled_from(FIELDS), values, max_size=1))
    check_answer(shared, path, send(shared, path, body | more if isinstance(body, dict) else body))


@fuzz(100)
@given(st.data(), st.sampled_from([*PATHS]))
def test_damaged_bodies(shared, data, path):
    check_answer(shared, path, send(shared, path, data.draw(damaged(json.dumps(PATHS[path]).encode()))))


def spelled(prompt: bytes, n: int, stops: list[str], ignore_eos: bool) -> tuple[str, str]:
    """The text after a prompt, and why it ends."""
    text, token, reason = b"", prompt[-1], "length"
    for _ in range(n):
        token = NEXT[token]
        if token in (EOS, ROLE_END) and not ignore_eos:
            reason = "stop"
            break
        text += bytes([token]) if token < 256 else b"<|endoftext|>" if token == EOS else b"<|role_end|>"
    text = text.decode("utf-8", "replace")
    found = [text.index(stop) for stop in stops if stop in text]
    return (text[: min(found)], "stop") if found else (text, reason)


prompts = st.lists(st.text("abwxyz?", min_size=1, max_size=4), min_size=1, max_size=3)
stop_strings = st.lists(st.sampled_from(["b", "bc", "cd", "bcd", "z", "yz", "cb", "é", "é!", "<|end"]), max_size=2)


@fuzz(100)
@given(prompts, st.integers(1, 9), st.integers(1, 3), stop_strings, st.booleans(), st.booleans(), st.booleans())
def test_texts(shared, prompts, length, n, stops, ignore_eos, echo, stream):
    """What the model spells, cut at the first stop string, for every prompt and choice."""
    body = dict(model="speller", prompt=prompts, max_tokens=length, n=n, stop=stops, ignore_eos=ignore_eos, echo=echo,
                stream=stream, temperature=0)  # fmt: skip
    response = send(shared, "/v1/completions", body)
    check_answer(shared, "/v1/completions", response)
    got = {}
    for piece in events(response.text) if stream else [response.json()]:
        for choice in piece["choices"]:
            text, _ = got.get(choice["index"], ("", None))
            got[choice["index"]] = text + choice["text"], choice["finish_reason"]
    repeated = [p for p in prompts for _ in range(n)]
    expected = [spelled(p.encode(), length, stops, ignore_eos) for p in repeated]
    expected = [(p * echo + text, why) for (text, why), p in zip(expected, repeated, strict=True)]
    assert [got[i] for i in range(len(got))] == expected


@fuzz(60)
@given(st.lists(st.lists(st.sampled_from([97, 98, 319, 320, -1, 2**40]) | st.integers(0, 256), max_size=3), max_size=3),
       st.integers(1, 3), st.booleans())  # fmt: skip
def test_ids(shared, prompts, n, stream):
    """Prompts of ids: one that is empty or outside the vocabulary refuses all of them."""
    valid = bool(prompts) and all(p and 0 <= min(p) and max(p) < 320 for p in prompts)
    body = dict(model="speller", prompt=prompts, max_tokens=2, n=n, stream=stream, temperature=0)
    response = send(shared, "/v1/completions", body)
    check_answer(shared, "/v1/completions", response)
    assert response.status_code == (200 if valid else 400)


names = st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=12)
headers = st.dictionaries(
    st.sampled_from(["content-type", "content-length", "authorization", "accept", "expect"]), names, max_size=3
)


@fuzz(100)
@given(names, headers, st.binary(max_size=20), st.sampled_from(["/v1/models/", "/v1/", "/", *PATHS]))
def test_paths_and_headers(shared, name, headers, content, path):
    options = dict(headers=headers) | (dict(content=content) if content else {})
    response = call(shared, path + name.replace("?", "").replace("#", ""), **options)
    if response.status_code != 200:
        check_error(response)
