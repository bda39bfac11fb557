"""What clients of the server ask for beside text: log-probabilities, tools, thoughts, counts, token ids."""

# ruff: noqa: F811 (fixtures are imported)
import asyncio
import json
import random
import threading

import pytest
import torch

pytest.importorskip("fastapi")

from ling_kernels.generate.server import answers  # noqa: E402
from ling_kernels.generate.server.answers import ChatWriter, Piece  # noqa: E402
from ling_kernels.generate.server.app import make_app  # noqa: E402
from ling_kernels.generate.server.command import sampling_defaults  # noqa: E402
from ling_kernels.generate.server.logprobs import FIELDS  # noqa: E402
from ling_kernels.generate.server.protocol import ChatCompletionRequest  # noqa: E402
from ling_kernels.generate.server.text_parts import TextParts  # noqa: E402
from ling_kernels.model.sample import Sampling  # noqa: E402
from tests.speller import EOS, speller  # noqa: E402
from tests.test_server import BODY, call, checkpoint, events, httpx, service, shared  # noqa: E402, F401

CHAT = dict(model="speller", messages=[dict(role="user", content="Hi")], temperature=0)
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": [2]}}\n</tool_call>'
TOOLS = [dict(type="function", function=dict(name="add", parameters={}))]


@pytest.fixture(scope="module")
def roomy(tmp_path_factory):
    """A server whose model has positions for a prompt with tools."""
    return service(speller(tmp_path_factory.mktemp("roomy") / "speller", positions=1000))


def test_logprobs_of_a_completion(shared):
    """They are the engine's, for the new tokens and for an echoed prompt, whose first token has none."""
    prompt = [ord(c) for c in "abx"]
    scores = shared.engine.score([prompt])[0]
    body = BODY | dict(prompt=prompt, echo=True, logprobs=2)
    answer = call(shared, "/v1/completions", body).json()["choices"][0]
    found = answer["logprobs"]
    assert answer["text"] == "abxyz" and found["tokens"] == [*"abxyz", "<|endoftext|>"]
    assert found["text_offset"] == [*range(6)]
    assert found["token_logprobs"][0] is found["top_logprobs"][0] is None
    assert found["token_logprobs"][1:3] == pytest.approx(scores)
    assert max(found["top_logprobs"][3], key=found["top_logprobs"][3].get) == "y"
    assert found["top_logprobs"][1]["b"] == found["token_logprobs"][1]
    assert all(2 <= len(top) <= 3 for top in found["top_logprobs"][1:])
    streamed = [e["choices"][0] for e in events(call(shared, "/v1/completions", body | dict(stream=True)).text)]
    parts = [e["logprobs"] for e in streamed if e["logprobs"]]
    assert {name: sum((part[name] for part in parts), []) for name in found} == found
    assert "".join(e["text"] for e in streamed) == "abxyz"


@pytest.mark.parametrize("draft", [0, 2])
def test_the_end_token_has_a_log_probability(checkpoint, draft):
    """lm-eval echoes a prompt with one new token, whose log-probability it leaves out: also where that is the end."""
    drafting = service(checkpoint, dict(draft=draft))
    for text, new, count in (("wxyz", 1, 0), ("wxy", 9, 1), ("wxy", 1, 1)):
        body = BODY | dict(prompt=text, max_tokens=new, echo=True, logprobs=1)
        answer = call(drafting, "/v1/completions", body).json()
        (choice,) = answer["choices"]
        found, end = choice["logprobs"], new > count
        assert choice["text"] == text + "z" * count and answer["usage"]["completion_tokens"] == count
        assert found["tokens"] == [*choice["text"], *["<|endoftext|>"] * end]
        assert choice["finish_reason"] == ("stop" if end else "length")
        scores = drafting.engine.score([[*text.encode()]])[0]
        assert found["token_logprobs"][1 : len(text)] == pytest.approx(scores)
    streamed = events(call(drafting, "/v1/completions", BODY | dict(prompt="y", logprobs=1, stream=True)).text)
    assert "".join(e["choices"][0]["text"] for e in streamed) == "z"


@pytest.mark.parametrize("stream", [False, True])
def test_scores_of_prompts_alone(shared, stream):
    """max_tokens 0 with echo gives the prompt's log-probabilities, and no new token."""
    prompts = [[ord(c) for c in text] for text in ("abc", "kx")]
    body = BODY | dict(prompt=prompts, echo=True, logprobs=1, max_tokens=0, stream=stream)
    response = call(shared, "/v1/completions", body)
    if stream:
        choices = {e["choices"][0]["index"]: e["choices"][0] for e in events(response.text) if e["choices"][0]["text"]}
    else:
        choices = {c["index"]: c for c in response.json()["choices"]}
        assert response.json()["usage"]["completion_tokens"] == 0
    for i, scores in enumerate(shared.engine.score(prompts)):
        assert choices[i]["text"] == ("abc", "kx")[i]
        assert choices[i]["logprobs"]["token_logprobs"][1:] == pytest.approx(scores)


@pytest.mark.parametrize("more", [dict(echo=True), dict(echo=True, logprobs=9), dict(logprobs=9), {}])
@pytest.mark.parametrize("stream", [False, True])
def test_large_answers_do_not_hold_up_the_event_loop(checkpoint, monkeypatch, more, stream):
    """They are built and written in a thread; small ones, and the pieces of streams, are not."""
    threads, built_in, dumps, first = [], [], json.dumps, answers.CompletionWriter.first

    def recorded_dumps(value, **options):
        if isinstance(value, dict) and "choices" in value:
            threads.append(threading.current_thread())
        return dumps(value, **options)

    def recorded_first(writer):
        built_in.append(threading.current_thread())
        return first(writer)

    def answer_of(prompt, tokens):
        threads.clear()
        body = BODY | dict(prompt=prompt, stream=stream, max_tokens=tokens, ignore_eos=True) | more
        response = call(served, "/v1/completions", body)
        assert response.status_code == 200, response.text
        if not stream:
            return response.json()["choices"][0]
        parts = [e["choices"][0] for e in events(response.text)]
        found = {name: sum((p["logprobs"][name] for p in parts if p["logprobs"]), []) for name in FIELDS}
        return dict(text="".join(p["text"] for p in parts), logprobs=found if "logprobs" in more else None)

    served = service(checkpoint)
    small = answer_of("a", 3)
    monkeypatch.setattr(json, "dumps", recorded_dumps)
    monkeypatch.setattr(answers.CompletionWriter, "first", recorded_first)
    assert answer_of("a", 3) == small
    assert threads and {*threads} == {threading.main_thread()}
    monkeypatch.setattr(answers, "SMALL", 20)
    many = answer_of("abcdefghij" * 3, 20)
    apart = [thread for thread in threads if thread is not threading.main_thread()]
    assert len(apart) == (not stream or "echo" in more) and all("answers" in t.name for t in apart)
    assert built_in[-1] in (apart or [threading.main_thread()])
    assert len(threads) == 1 if not stream else threads[1:] == [threading.main_thread()] * (len(threads) - 1)
    monkeypatch.setattr(answers, "SMALL", 10**6)
    assert answer_of("abcdefghij" * 3, 20) == many and len(many["text"]) >= 20
    assert {*threads} == {threading.main_thread()}


def test_logprobs_of_a_chat(shared):
    body = CHAT | dict(logprobs=True, top_logprobs=3)
    content = call(shared, "/v1/chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    assert [c["token"] for c in content] == [*"XYZ"] and [c["bytes"] for c in content] == [[88], [89], [90]]
    for entry in content:
        top = [t["logprob"] for t in entry["top_logprobs"]]
        assert len(top) == 3 and top == sorted(top, reverse=True) and entry["logprob"] == top[0] < 0
    streamed = events(call(shared, "/v1/chat/completions", body | dict(stream=True)).text)
    parts = [e["choices"][0]["logprobs"] for e in streamed if e["choices"][0]["logprobs"]]
    assert [c for part in parts for c in part["content"]] == content
    plain = call(shared, "/v1/chat/completions", CHAT | dict(logprobs=True)).json()["choices"][0]["logprobs"]
    assert [c["top_logprobs"] for c in plain["content"]] == [[], [], []]
    refused = call(shared, "/v1/chat/completions", CHAT | dict(top_logprobs=1))
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "top_logprobs"


def test_logprobs_of_a_chats_prompt(shared):
    """In vLLM's form: those of the engine, by token id, the first token without."""
    prompt = call(shared, "/tokenize", dict(messages=CHAT["messages"])).json()["tokens"]
    scores = shared.engine.score([prompt])[0]
    (request,) = shared.engine.finish([prompt], max_new_tokens=1, prompt_logprobs=2)
    likeliest = [[*dict(entry.top)] for entry in request.prompt_logprobs]
    for most, n in ((0, 1), (2, 2)):
        answer = call(shared, "/v1/chat/completions", CHAT | dict(prompt_logprobs=most, n=n)).json()
        assert answer["choices"][0]["message"]["content"] == "XYZ" and answer["choices"][0]["logprobs"] is None
        first, *found = answer["prompt_logprobs"]
        assert first is None and [next(iter(each)) for each in found] == [str(token) for token in prompt[1:]]
        own = [each[str(token)] for each, token in zip(found, prompt[1:], strict=True)]
        assert [entry["logprob"] for entry in own] == pytest.approx(scores, rel=1e-5)
        assert [entry["decoded_token"] for entry in own] == [shared.tokenizer.decode([token]) for token in prompt[1:]]
        ranked = [sorted((e["rank"], int(token)) for token, e in each.items() if e["rank"]) for each in found]
        assert ranked == [[*enumerate(ids[:most], 1)] for ids in likeliest]
    assert "prompt_logprobs" not in call(shared, "/v1/chat/completions", CHAT).json()
    for wrong in (dict(prompt_logprobs=2, stream=True), dict(prompt_logprobs=21), dict(prompt_logprobs=-1)):
        refused = call(shared, "/v1/chat/completions", CHAT | wrong)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt_logprobs"


def test_counts_in_every_event(shared):
    options = dict(include_usage=True, continuous_usage_stats=True)
    found = events(call(shared, "/v1/completions", BODY | dict(stream=True, stream_options=options)).text)
    counts = [e["usage"]["completion_tokens"] for e in found]
    assert counts == sorted(counts) and counts[-1] == 3 and all(e["usage"]["prompt_tokens"] == 1 for e in found)


def test_stop_token_ids(shared):
    answer = call(shared, "/v1/completions", BODY | dict(max_tokens=9, stop_token_ids=[ord("e"), ord("q")])).json()
    assert answer["choices"][0]["text"] == "bcd" and answer["choices"][0]["finish_reason"] == "stop"


def test_a_call_of_many_prompts(shared):
    answer = call(shared, "/v1/completions", BODY | dict(prompt=["a"] * 100)).json()
    assert [c["text"] for c in answer["choices"]] == ["bcd"] * 100
    assert call(shared, "/v1/completions", BODY | dict(prompt=["a"] * 129)).status_code == 400


def test_token_ids(shared):
    tokens = call(shared, "/tokenize", dict(prompt="ab")).json()
    assert tokens == dict(count=2, max_model_len=200, tokens=[97, 98])
    assert call(shared, "/detokenize", dict(tokens=[97, 98])).json() == dict(prompt="ab")
    for unknown in (-1, 320, 1 << 70):
        error = call(shared, "/detokenize", dict(tokens=[97, unknown]))
        assert error.status_code == 400 and error.json()["error"]["param"] == "tokens"
    chat = call(shared, "/tokenize", dict(messages=CHAT["messages"])).json()["tokens"]
    text = shared.tokenizer.apply_chat_template(CHAT["messages"])
    assert chat == shared.tokenizer.encode(text, special=True)
    refused = (dict(prompt="a", model="gpt"), dict(prompt=3), dict(prompt="a", tools=TOOLS))
    for body in ({}, dict(prompt="a", messages=CHAT["messages"]), *refused):
        assert call(shared, "/tokenize", body).status_code in (400, 404)


def test_a_chat_is_counted_as_it_is_answered(roomy):
    """With its tools, modes of its template, and a message that is continued."""
    started = [*CHAT["messages"], dict(role="assistant", content="X")]
    counts = []
    for more in (
        {}, dict(tools=TOOLS), dict(tools=TOOLS, tool_choice="none"), dict(messages=started, tools=TOOLS),
        dict(chat_template_kwargs=dict(enable_thinking=True)), dict(chat_template_kwargs=dict(enable_thinking=False)),
        dict(messages=started, continue_final_message=True), dict(add_generation_prompt=False),
    ):  # fmt: skip
        prompt = dict(messages=CHAT["messages"]) | more
        counted = call(roomy, "/tokenize", prompt).json()
        answered = call(roomy, "/v1/chat/completions", CHAT | more | dict(max_tokens=1)).json()
        assert counted["count"] == len(counted["tokens"]) == answered["usage"]["prompt_tokens"], more
        counts.append(counted["count"])
    assert counts[0] == counts[2] and len({*counts}) > 5


def test_tokens_by_name(shared):
    """Clients ask for the ids of tokens, and encode chats that they have rendered, without special tokens added."""
    info = call(shared, "/tokenizer_info").json()
    assert info["eos_token"] == "<|endoftext|>" and info["chat_template"] == shared.tokenizer.chat_template
    text = f"a{info['eos_token']}"
    assert call(shared, "/tokenize", dict(prompt=text, add_special_tokens=False)).json()["tokens"] == [ord("a"), EOS]
    assert call(shared, "/tokenize", dict(prompt=text)).json()["tokens"] == [*text.encode()], "as in a completion"


def test_errors_in_words_that_clients_know(shared):
    for body, param, code in (
        (dict(max_tokens=200), "max_tokens", "context_length_exceeded"),
        (dict(prompt="a" * 300), "max_tokens", "context_length_exceeded"),
        (dict(model="gpt"), "model", "model_not_found"), (dict(temperature=-1.0), "temperature", None),
        (dict(top_p=0.0, temperature=1.0), "top_p", None), (dict(logit_bias={"3": 101}), "logit_bias", None),
        (dict(min_tokens=9), "min_tokens", None),
        (dict(stop=["a"] * 17), "stop", None), (dict(stop="a" * 1001), "stop", None),
        (dict(priority="high"), "priority", None),
    ):  # fmt: skip
        error = call(shared, "/v1/completions", BODY | body).json()["error"]
        assert (error["param"], error["code"]) == (param, code), error
    too_long = call(shared, "/v1/completions", BODY | dict(suffix="x" * 5000)).json()["error"]["message"]
    assert len(too_long) < 200, "a value is not quoted whole"


def test_the_prompt_of_tools_and_calls(roomy, monkeypatch):
    """Tools, calls and thoughts reach the template; arguments as an object, although clients send JSON."""
    prompts = []
    monkeypatch.setattr(roomy.engine, "submit", lambda prompt, *_, **__: prompts.append(prompt) or 1 / 0)
    call_sent = dict(id="c1", type="function", function=dict(name="add", arguments='{"a": 1}'))
    messages = [dict(role="user", content="x"), dict(role="assistant", content=None, tool_calls=[call_sent]),
                dict(role="tool", content="7", tool_call_id="c1")]  # fmt: skip
    call(roomy, "/v1/chat/completions", dict(model="speller", messages=messages, tools=TOOLS))
    shown = [messages[0], dict(role="assistant", content="",
                               tool_calls=[dict(type="function", function=dict(name="add", arguments={"a": 1}))]),
             dict(role="tool", content="7")]  # fmt: skip
    text = roomy.tokenizer.apply_chat_template(shown, tools=TOOLS)
    assert '{"name": "add", "arguments": {"a": 1}}' in text and prompts[0] == roomy.tokenizer.encode(text, True)
    call(roomy, "/v1/chat/completions", dict(model="speller", messages=messages, tools=TOOLS, tool_choice="none"))
    text = roomy.tokenizer.apply_chat_template(shown)
    assert "<tools>" not in text and prompts[1] == roomy.tokenizer.encode(text, True)
    for thinking in (True, False):
        options = dict(chat_template_kwargs=dict(enable_thinking=thinking))
        call(roomy, "/v1/chat/completions", dict(model="speller", messages=messages[:1], **options))
        text = roomy.tokenizer.apply_chat_template(messages[:1], thinking=thinking)
        assert prompts.pop() == roomy.tokenizer.encode(text, True) and f"thinking {'on' if thinking else 'off'}" in text
    wrong = dict(chat_template_kwargs=dict(thoughts=True))
    error = call(roomy, "/v1/chat/completions", dict(model="speller", messages=messages[:1], **wrong))
    assert error.status_code == 400 and error.json()["error"]["param"] == "chat_template_kwargs.thoughts"
    goes_on = [messages[0], dict(role="assistant", content="so")]
    call(roomy, "/v1/chat/completions", dict(model="speller", messages=goes_on, continue_final_message=True))
    begun = roomy.tokenizer.encode(roomy.tokenizer.apply_chat_template(messages[:1]), True)
    assert prompts[2] == [*begun, ord("s"), ord("o")]
    thought = dict(role="assistant", content="a", reasoning_content="b")
    for wrong in (messages[:1], goes_on[1:], [messages[0], messages[1]], [messages[0], thought]):
        body = dict(model="speller", messages=wrong, continue_final_message=True)
        assert call(roomy, "/v1/chat/completions", body).status_code == 400


TEXTS = [
    ("plain < text", "plain < text", "", []),
    (CALL, "", "", [("add", {"a": 1, "b": [2]})]),
    (f"Wait.\n{CALL}\n{CALL}", "Wait.", "", [("add", {"a": 1, "b": [2]})] * 2),
    (f"\n<think>\nhm <tool\n</think>\n\nSo:\n{CALL}", "So:", "hm <tool", [("add", {"a": 1, "b": [2]})]),
    ("<think>\nno end", "", "no end", []),
    ("<tool_call>\nnot JSON\n</tool_call> b", "<tool_call>\nnot JSON\n</tool_call> b", "", []),
    ("<tool_call>\n{", "<tool_call>\n{", "", []),
    ('<tool_call>{"name": 3}</tool_call>', '<tool_call>{"name": 3}</tool_call>', "", []),
    ("a <think> b", "a <think> b", "", []),
    ("a</think>b<tool_cal", "a</think>b<tool_cal", "", []),
]


@pytest.mark.parametrize("text, content, thought, calls", TEXTS)
def test_parts_of_an_answer(text, content, thought, calls):
    """However the text is cut into pieces."""
    cuts = random.Random(0)
    for pieces in ([text], [*text], *([text[:n], text[n:]] for n in cuts.sample(range(len(text)), min(9, len(text))))):
        split, parts = TextParts(calls=True), []
        for piece in pieces:
            parts += split.add(piece)
        parts += split.end()
        assert "".join(p.text for p in parts if p.kind == "content") == content, pieces
        assert "".join(p.text for p in parts if p.kind == "reasoning") == thought
        assert [(p.call["name"], json.loads(p.call["arguments"])) for p in parts if p.call] == calls


def test_without_tools_a_call_is_text_and_a_thought_may_have_begun_in_the_prompt():
    split = TextParts(thinking=True)
    parts = split.add(f"hm\n</think>\n\n{CALL}") + split.end()
    assert [p for p in parts if p.text] == [("reasoning", "hm", None), ("content", CALL, None)]


def test_calls_in_answers(roomy, monkeypatch):
    """A whole answer and the sum of a stream's deltas hold the same calls; the reason is tool_calls."""
    text = f"<think>\nadd\n</think>\n\nSo\n{CALL}"

    async def pieces(choices):
        for letter in text:
            yield 0, Piece(letter, [])
        choices[0].finish_reason = "stop"
        yield 0, None

    monkeypatch.setattr(answers, "merge_streams", pieces)
    body = CHAT | dict(tools=TOOLS)
    (choice,) = call(roomy, "/v1/chat/completions", body).json()["choices"]
    (made,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "So"
    assert choice["message"]["reasoning_content"] == "add" and made["id"].startswith("call_")
    assert made["function"]["name"] == "add" and json.loads(made["function"]["arguments"]) == {"a": 1, "b": [2]}
    streamed = [e["choices"][0] for e in events(call(roomy, "/v1/chat/completions", body | dict(stream=True)).text)]
    deltas = [c["delta"] for c in streamed]
    assert "".join(d.get("content", "") for d in deltas) == "So"
    assert "".join(d.get("reasoning_content", "") for d in deltas) == "add"
    (found,) = [d["tool_calls"][0] for d in deltas if "tool_calls" in d]
    assert found["function"] == made["function"] and found["index"] == 0
    assert streamed[-1]["finish_reason"] == "tool_calls"


def test_a_writer_looks_for_an_open_thought_in_the_prompt(shared):
    request = shared.engine.submit(shared.tokenizer.encode("<think>", special=True), max_new_tokens=1)
    shared.engine.cancel(request)
    body = ChatCompletionRequest(**CHAT)
    writer = ChatWriter(answers.Choice(shared, request, [], True), body)
    assert writer.piece(Piece("a</think>b", []))["delta"] == {"reasoning_content": "a", "content": "b"}


def test_defaults_of_generation_config(checkpoint, tmp_path):
    file = tmp_path / "generation_config.json"
    file.write_text(json.dumps(dict(temperature=0.7, top_p=0.9, eos_token_id=3, do_sample=True)))
    defaults = sampling_defaults(tmp_path)
    assert defaults == dict(temperature=0.7, top_p=0.9) and sampling_defaults(tmp_path / "none") == {}
    with_defaults = service(checkpoint, sampling_defaults=defaults)
    taken = []
    with_defaults.engine.submit = lambda prompt, sampling, *_, **__: taken.append(sampling) or 1 / 0
    for more in ({}, dict(top_p=0.5), dict(temperature=0)):
        call(with_defaults, "/v1/completions", dict(model="speller", prompt="a", seed=1) | more)
    assert taken == [Sampling(0.7, top_p=0.9, seed=1), Sampling(0.7, top_p=0.5, seed=1), Sampling(seed=1)]
    for greedy in (dict(temperature=0.0, top_p=0.9), dict(temperature=0, top_k=-1)):
        file.write_text(json.dumps(greedy))
        with_defaults.sampling_defaults = sampling_defaults(tmp_path)
        call(with_defaults, "/v1/completions", dict(model="speller", prompt="a", seed=1))
        assert taken.pop() == Sampling(seed=1)
    file.write_text('{"temperature": -1}')
    with pytest.raises(ValueError, match="generation_config.json: temperature"):
        sampling_defaults(tmp_path)


def test_web_pages_may_call_where_they_are_allowed(checkpoint):
    head = {"origin": "http://page", "access-control-request-method": "POST"}
    open_to = service(checkpoint, origins=("http://page",), keys=frozenset({"k"}))
    plain = service(checkpoint)
    assert call(plain, "/v1/models", headers=head).headers.get("access-control-allow-origin") is None
    answer = call(open_to, "/v1/models", headers=head | {"authorization": "Bearer k"})
    assert answer.headers["access-control-allow-origin"] == "http://page" and answer.status_code == 200
    refused = call(open_to, "/v1/completions", BODY, headers=head)
    assert refused.headers["access-control-allow-origin"] == "http://page" and refused.status_code == 401
    assert "Retry-After" in refused.headers["access-control-expose-headers"]


def test_a_web_page_asks_before_it_sends_a_key(checkpoint):
    """The browser's preflight has no key; of another page it is refused."""
    guarded = make_app(service(checkpoint, origins=("http://page",), keys=frozenset({"k"})))

    async def ask(origin: str):
        head = {"origin": origin, "access-control-request-method": "POST",
                "access-control-request-headers": "authorization,content-type"}  # fmt: skip
        async with httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://test") as client:
            return await client.options("/v1/completions", headers=head)

    allowed, other = asyncio.run(ask("http://page")), asyncio.run(ask("http://other"))
    assert allowed.status_code == 200 and "authorization" in allowed.headers["access-control-allow-headers"]
    assert other.status_code == 400 and "access-control-allow-origin" not in other.headers


def test_a_thought_that_the_prompt_has_opened(shared):
    """Of a tokenizer to which <think> is seven tokens."""
    messages = [*CHAT["messages"], dict(role="assistant", content="<think>")]
    body = CHAT | dict(messages=messages, continue_final_message=True, max_tokens=8, ignore_eos=True)
    message = call(shared, "/v1/chat/completions", body).json()["choices"][0]["message"]
    assert message["reasoning_content"] and message["content"] == ""


def test_a_long_prompt_does_not_hold_up_others(checkpoint, monkeypatch):
    """It becomes tokens in a thread, while the event loop goes on."""
    fresh = service(checkpoint)
    begun, goes_on, encode = threading.Event(), threading.Event(), fresh.tokenizer.encode

    def slow(*args, **options):
        begun.set()
        assert goes_on.wait(30)
        return encode(*args, **options)

    monkeypatch.setattr(type(fresh.tokenizer), "encode", lambda _, *args, **options: slow(*args, **options))

    async def run():
        transport = httpx.ASGITransport(make_app(fresh))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = asyncio.create_task(client.post("/v1/completions", json=BODY))
            await asyncio.to_thread(begun.wait, 30)
            health = await client.head("/health")
            assert not answer.done() and health.status_code == 200
            goes_on.set()
            return (await answer).json()

    assert asyncio.run(run())["id"].startswith("cmpl-")


def test_other_endpoints_are_refused_by_name(shared):
    for path in ("/v1/responses", "/v1/messages", "/v1/embeddings", "/rerank", "/version", "/v1/x%0Ay"):
        response = call(shared, path, dict(model="speller", input="x"))
        message = response.json()["error"]["message"]
        assert response.status_code == 404 and message.startswith("there is no /") and "/v1/chat/completions" in message
        assert len(message.splitlines()) == 1
    assert call(shared, "/v1/chat/completions", CHAT).json()["id"].startswith("chatcmpl-")


def test_request_ids(shared):
    given = call(shared, "/v1/models", headers={"x-request-id": "my-id.7"})
    assert given.headers["x-request-id"] == "my-id.7"
    for odd in ("a b", "x" * 200, ""):
        assert call(shared, "/v1/models", headers={"x-request-id": odd}).headers["x-request-id"] not in (odd, "")


def test_the_log_has_a_line_for_each_response(checkpoint, capsys):
    logged = service(checkpoint, access_log=True, keys=frozenset({"secret"}))
    call(logged, "/v1/models", headers={"authorization": "Bearer secret", "x-request-id": "id-1"})
    call(logged, "/v1/models")
    first, second = capsys.readouterr().err.splitlines()
    assert " key-" in first and "GET /v1/models 200" in first and first.endswith("id-1") and "secret" not in first
    assert "GET /v1/models 401" in second


def test_counters_move_while_a_request_runs(checkpoint):
    fresh = service(checkpoint)

    async def run():
        request = fresh.engine.submit([97], max_new_tokens=20, stop_token_ids=())
        stream = answers.Choice(fresh, request, [], True).stream()
        for _ in range(5):
            await anext(stream)
        assert fresh.metrics.generated_tokens == 5
        await stream.aclose()

    asyncio.run(run())
    assert torch.is_tensor(fresh.engine.model.lm_head.weight)
