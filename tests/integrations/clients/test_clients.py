"""The server with the clients that people use."""

# ruff: noqa: F811 (fixtures are imported)
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import langchain_openai
import openai
import pydantic
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from ling_kernels.model import load_model
from tests.speller import BOS, EOS, ROLE, speller
from tests.test_engine_adapters import write
from tests.test_server import service
from tests.test_server_connections import port_of, running

CHAT = dict(model="speller", messages=[dict(role="user", content="Hi")], temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return speller(tmp_path_factory.mktemp("packages") / "speller", positions=2000)


@pytest.fixture(scope="module")
def locked(folder):
    """A server with a key, and its URL."""
    served = service(folder, keys=frozenset({"k"}))
    with running(served) as server:
        yield served, f"http://127.0.0.1:{port_of(server)}/v1"


def test_openai(locked):
    client = openai.OpenAI(base_url=locked[1], api_key="k", max_retries=0)
    assert [model.id for model in client.models.list()] == ["speller"]
    choice = client.chat.completions.create(**CHAT, logprobs=True, top_logprobs=2).choices[0]
    assert choice.message.content == "XYZ" and [c.token for c in choice.logprobs.content] == [*"XYZ"]
    tools = [dict(type="function", function=dict(name="f", parameters={}))]
    with client.chat.completions.stream(**CHAT, tools=tools) as stream:
        assert [*stream] and stream.get_final_completion().choices[0].message.content == "XYZ"
    completion = client.completions.create(model="speller", prompt="ab", max_tokens=1, temperature=0, logprobs=1)
    assert completion.choices[0].text == "c" and completion.choices[0].logprobs.tokens == ["c"]
    with pytest.raises(openai.BadRequestError, match="maximum context length") as caught:
        client.chat.completions.create(**CHAT, max_tokens=3000)
    assert caught.value.code == "context_length_exceeded" and caught.value.param == "max_tokens"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(**CHAT | dict(model="x"))
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").models.list()


def test_adapters_by_openai(folder, tmp_path):
    """Each is a model, with the model that it changes as its parent."""
    write(tmp_path / "pirate", load_model(folder, torch.float32), "dense|down_proj", 4, size=1.0)
    with running(service(folder, dict(adapters=dict(pirate=tmp_path / "pirate")), adapters=("pirate",))) as server:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port_of(server)}/v1", api_key="none", max_retries=0)
        assert {m.id: m.parent for m in client.models.list()} == {"speller": None, "pirate": "speller"}
        texts = [client.chat.completions.create(**CHAT | dict(model=m), max_tokens=3) for m in ("speller", "pirate")]
        assert texts[0].choices[0].message.content == "XYZ" != texts[1].choices[0].message.content
        assert texts[1].model == "pirate"
        with pytest.raises(openai.NotFoundError, match="this server has 'speller', 'pirate'"):
            client.chat.completions.create(**CHAT | dict(model="x"))


TOOL_CALL = "265"  # <tool_call>
DENSE = {str(ord(blank)): -100 for blank in " \n"}  # no blanks: the model has no notion of an end


class Answer(pydantic.BaseModel, extra="forbid"):
    """An answer of two fields."""  # LangChain wants a description

    letter: Literal["a", "b"]
    count: Literal[1, 2]


def test_structured_output_of_openai(locked):
    client = openai.OpenAI(base_url=locked[1], api_key="k", max_retries=0)
    parsed = client.chat.completions.parse(**CHAT, response_format=Answer, logit_bias=DENSE).choices[0].message.parsed
    assert isinstance(parsed, Answer)
    tool = openai.pydantic_function_tool(Answer)
    for choice in ("required", dict(type="function", function=dict(name="Answer"))):
        message = (
            client.chat.completions.parse(**CHAT, tools=[tool], tool_choice=choice, logit_bias=DENSE).choices[0].message
        )
        assert all(isinstance(made.function.parsed_arguments, Answer) for made in message.tool_calls)
    both = dict(tools=[tool], response_format=Answer)  # the model's choice; the tool is strict
    for bias, called in ((DENSE | {265: -100}, False), (DENSE | {265: 100}, True)):
        message = client.chat.completions.parse(**CHAT, **both, logit_bias=bias).choices[0].message
        found = [made.function.parsed_arguments for made in message.tool_calls or []] or [message.parsed]
        assert bool(message.tool_calls) == called and all(isinstance(answer, Answer) for answer in found)
    with pytest.raises(openai.BadRequestError) as caught:
        wrong = dict(type="json_schema", json_schema=dict(name="x", schema={"not": {}}))
        client.chat.completions.create(**CHAT, response_format=wrong)
    assert caught.value.param == "response_format"
    biased = client.chat.completions.create(
        **CHAT, logit_bias={ord("X"): -100, ord("q"): 50}, presence_penalty=0.5, max_tokens=1
    )
    assert biased.choices[0].message.content == "q"


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output_of_langchain(locked, method):
    chat = langchain_openai.ChatOpenAI(
        model="speller", base_url=locked[1], api_key="k", temperature=0, max_retries=0, max_tokens=300,
        logit_bias=DENSE | ({str(ord("}")): 100} if method == "json_mode" else {}),
    )  # fmt: skip
    schema = None if method == "json_mode" else Answer
    found = chat.with_structured_output(schema, method=method).invoke("Hi, answer in JSON")
    assert isinstance(found, dict if method == "json_mode" else Answer)


def test_litellm(locked, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else its import asks the network
    import litellm

    litellm.suppress_debug_info = True
    for provider in ("openai", "hosted_vllm"):
        options = CHAT | dict(model=f"{provider}/speller", api_base=locked[1], api_key="k", num_retries=0)
        assert litellm.completion(**options).choices[0].message.content == "XYZ"
        pieces = litellm.completion(**options, stream=True)
        assert "".join(e.choices[0].delta.content or "" for e in pieces) == "XYZ"
        parsed = litellm.completion(**options, response_format=Answer, logit_bias=DENSE).choices[0].message.content
        assert Answer.model_validate_json(parsed)
        with pytest.raises(litellm.ContextWindowExceededError):
            litellm.completion(**options, max_tokens=3000)


@pytest.mark.parametrize("ids", [False, True])
def test_lm_eval(locked, folder, monkeypatch, ids):
    """Log-likelihoods are the engine's, also where the model would end after the continuation."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    served, url = locked
    model = LocalCompletionsAPI(
        base_url=f"{url}/completions", model="speller", tokenizer=folder, max_length=999, batch_size=2,
        tokenized_requests=ids,
    )  # fmt: skip
    pairs = [("ab", "cd"), ("wx", "yz"), ("ab", "zz"), ("a", "q"), ("x", "yz")]
    found = model.loglikelihood([Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)])
    scores = served.engine.score([[*"".join(pair).encode()] for pair in pairs])
    expected = [sum(score[len(pair[0]) - 1 :]) for pair, score in zip(pairs, scores, strict=True)]
    assert [total for total, _ in found] == pytest.approx(expected, rel=1e-4)
    assert [greedy for _, greedy in found] == [True, True, False, False, True]


def test_lm_eval_with_the_servers_tokenizer(locked, folder, monkeypatch):
    """Nothing of the model is on the client: tokens by name, chats, and texts without context are as by its files."""
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    served, url = locked
    options = dict(base_url=f"{url}/completions", model="speller", max_length=200, batch_size=2)
    remote = LocalCompletionsAPI(**options, tokenizer_backend="remote", tokenized_requests=True, auth_token="k")
    local = LocalCompletionsAPI(**options, tokenizer=folder, tokenized_requests=True)
    assert (remote.prefix_token_id, remote.eot_token_id) == (local.prefix_token_id, local.eot_token_id) == (BOS, EOS)
    variables = dict(tools=None, enable_thinking=False)  # lm_eval renders with no undefined ones
    chat = remote.tokenizer.apply_chat_template([dict(role="user", content="Hi")], **variables)
    assert chat == local.apply_chat_template([dict(role="user", content="Hi")])
    assert remote.tok_encode(chat) == local.tok_encode(chat) and ROLE in remote.tok_encode(chat)
    texts = [Instance("loglikelihood_rolling", {}, (text,), i) for i, text in enumerate(("pabc", "wxq"))]
    scores = served.engine.score([[BOS, *text.args[0].encode()] for text in texts])
    assert remote.loglikelihood_rolling(texts) == pytest.approx([sum(score) for score in scores], rel=1e-4)
    pairs = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate((("ab", "cd"), ("", "pq"), (chat, "XY")))]
    found, want = remote.loglikelihood(pairs), local.loglikelihood(pairs)
    assert [total for total, _ in found] == pytest.approx([total for total, _ in want], rel=1e-4)
    assert [greedy for _, greedy in found] == [True] * 3


def test_langchain(locked):
    chat = langchain_openai.ChatOpenAI(model="speller", base_url=locked[1], api_key="k", temperature=0, max_retries=0)
    assert chat.invoke("Hi").content == "XYZ" and "".join(part.content for part in chat.stream("Hi")) == "XYZ"
    assert (
        chat.bind_tools([dict(type="function", function=dict(name="f", parameters={}))]).invoke("Hi").content == "XYZ"
    )
    assert [answer.content for answer in chat.batch(["Hi", "Ho"])] == ["XYZ", "XYZ"]


def llm(url, folder, supports, *flags):
    """A run of the command `llm` of the package of that name, with a model that supports schemas or tools."""
    name = folder / "extra-openai-models.yaml"
    name.write_text(
        f"- model_id: mine\n  model_name: speller\n  api_base: {url}\n"
        f"  api_key_name: mine\n  supports_{supports}: true\n"
    )
    command = [sys.executable, "-m", "llm", "-m", "mine", "--key", "k", "-o", "temperature", "0", *flags]
    env = {**os.environ, "LLM_USER_PATH": str(folder)}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=env)


def test_llm(locked, tmp_path):
    result = llm(locked[1], tmp_path, "schema", "Hi")
    assert result.stdout.strip() == "XYZ", result.stderr
    schema = ["--schema", json.dumps(Answer.model_json_schema()), "--no-stream"]
    result = llm(locked[1], tmp_path, "schema", "Hi", *schema)
    assert Answer.model_validate_json(result.stdout), result.stderr


def test_tools_of_llm(locked, tmp_path):
    """`llm -T` runs the function that the model calls, and sends its result back; here the model calls it again."""
    prefers_calls = DENSE | {TOOL_CALL: 100, str(ord("}")): 100}  # of the forms that json_object lets come
    options = dict(json_object=1, logit_bias=json.dumps(prefers_calls))
    flags = [*sum((["-o", key, str(value)] for key, value in options.items()), []), "--td", "--chain-limit", "2"]
    finished = locked[0].metrics.finished["stop"]
    result = llm(locked[1], tmp_path, "tools", "-T", "llm_version", *flags, "Hi, in JSON")
    assert "Tool call: llm_version({})" in result.stderr and "Chain limit of 2" in result.stderr, result
    assert locked[0].metrics.finished["stop"] == finished + 2


def test_guidellm(folder, tmp_path):
    """A load of eight requests, four at a time; it sends no key."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(dict(prompt=text)) + "\n" for text in ("ab", "wx", "a", "kl") * 2))
    report = tmp_path / "report.json"
    with running(service(folder)) as server:
        flags = {
            "--backend": f"kind=openai_http,target=http://127.0.0.1:{port_of(server)},model=speller",
            "--profile": "kind=concurrent,streams=4", "--constraint": "kind=max_requests,count=8",
            "--tokenizer": f"kind=hf_auto,model={folder}", "--data": f"kind=json_file,path={prompts}",
            "--output": f"kind=json,path={report}",
        }  # fmt: skip
        command = [Path(sys.executable).with_name("guidellm"), "run", *sum(flags.items(), ()), "--disable-console"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stderr[-3000:]
    requests = json.loads(report.read_text())["benchmarks"][0]["requests"]
    assert len(requests["successful"]) == 8 and not requests["errored"]
