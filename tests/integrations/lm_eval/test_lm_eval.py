"""The engine in lm_eval, beside lm_eval's own hf model over transformers' classes with the same weights."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer, Glm4MoeConfig, Glm4MoeForCausalLM

from ling_kernels.errors import InputError
from ling_kernels.generate import Engine
from ling_kernels.integrations import lm_eval
from ling_kernels.integrations.lm_eval import LingLM
from ling_kernels.model import Ling, LingConfig, load_model, save_model
from ling_kernels.model.checkpoint import named_views
from ling_kernels.tokenizer import load_tokenizer
from tests.test_server import service
from tests.test_server_connections import port_of, running

POSITIONS = 96
WORDS = "the model answers a question with one word or with many and stops".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint with random weights, large enough that its answers vary, and the byte-level tokenizer."""
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    model = Ling(dataclasses.replace(LingConfig.tiny(), num_hidden_layers=2, max_position_embeddings=POSITIONS))
    generator = torch.Generator().manual_seed(3)
    model.init_weights(generator)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8) if p.ndim > 1 else p.uniform_(0.5, 1.5, generator=generator)
        for router in model.routers():
            router.expert_bias.uniform_(-0.1, 0.1, generator=generator)
    save_model(model, path)
    load_tokenizer().save(path)
    return path


@pytest.fixture(scope="module")
def ours(folder):
    return LingLM(pretrained=str(folder))


@pytest.fixture(scope="module")
def theirs(folder, ours):
    """lm_eval's hf model over Glm4Moe, whose layers compute what Ling-2.0's do."""
    model = glm(load_model(folder, torch.float32))
    model.generation_config.eos_token_id = sorted(ours.stop)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return HFLM(model, tokenizer=tokenizer, batch_size=4, max_length=ours.max_length)


def glm(ling: Ling) -> Glm4MoeForCausalLM:
    c = ling.config
    rope = dict(rope_type="default", rope_theta=c.rope_theta, partial_rotary_factor=c.partial_rotary_factor)
    config = Glm4MoeConfig(
        vocab_size=c.vocab_size, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, rms_norm_eps=c.rms_norm_eps,
        max_position_embeddings=c.max_position_embeddings, rope_parameters=rope,
        moe_intermediate_size=c.moe_intermediate_size, num_experts_per_tok=c.num_experts_per_tok,
        n_shared_experts=c.num_shared_experts, n_routed_experts=c.num_experts,
        routed_scaling_factor=c.routed_scaling_factor, n_group=c.n_group, topk_group=c.topk_group,
        first_k_dense_replace=c.first_k_dense_replace, use_qk_norm=True, attention_bias=False,
        num_nextn_predict_layers=0,
    )  # fmt: skip
    model = Glm4MoeForCausalLM(config).float().eval()
    names = {
        "model.word_embeddings": "model.embed_tokens", ".attention.": ".self_attn.", ".dense.": ".o_proj.",
        "query_layernorm": "q_norm", "key_layernorm": "k_norm", "gate.expert_bias": "gate.e_score_correction_bias",
    }  # fmt: skip
    state: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in named_views(ling):
        if key.startswith(f"model.layers.{c.num_hidden_layers}."):  # MTP's, of which lm_eval knows nothing
            continue
        for old, new in names.items():
            key = key.replace(old, new)
        value = value.detach().float()
        if ".mlp.experts." in key:
            layer, _, rest = key.partition("experts.")
            experts.setdefault(f"{layer}experts.", {})[rest] = value
        elif "query_key_value" in key:
            sizes = [n * c.head_dim for n in (c.num_attention_heads, *2 * [c.num_key_value_heads])]
            for name, part in zip("qkv", value.split(sizes), strict=True):
                state[key.replace("query_key_value", f"{name}_proj")] = part
        else:
            state[key] = value
    for prefix, of in experts.items():
        pairs = [(of[f"{e}.gate_proj.weight"], of[f"{e}.up_proj.weight"]) for e in range(c.num_experts)]
        state[f"{prefix}gate_up_proj"] = torch.stack([torch.cat(pair) for pair in pairs])
        state[f"{prefix}down_proj"] = torch.stack([of[f"{e}.down_proj.weight"] for e in range(c.num_experts)])
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Task files and data of a choice among words, of a perplexity, and of answers in text and in a chat."""
    path = tmp_path_factory.mktemp("tasks")
    rows = [dict(question=" ".join(WORDS[i : i + 3]), text=" ".join(WORDS[i:] * 3), label=i % 3) for i in range(8)]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shared = dict(
        dataset_path="json", dataset_kwargs=dict(data_files=dict(test=str(path / "rows.jsonl"))), test_split="test",
        num_fewshot=0,
    )  # fmt: skip
    # "u" is in no special token's name, at which the hf model would stop, as it looks for stop strings there too.
    generate = dict(
        output_type="generate_until", doc_to_text="{{question}}", doc_to_target="{{text}}",
        generation_kwargs=dict(until=["u", "\n\n"], max_gen_toks=12), metric_list=[dict(metric="exact_match")],
    )  # fmt: skip
    files = dict(
        ling_choice=dict(
            output_type="multiple_choice", doc_to_text="{{question}}", doc_to_target="{{label}}",
            doc_to_choice=["yes", "no, not at all", "many"], metric_list=[dict(metric="acc"), dict(metric="acc_norm")],
        ),
        ling_rolling=dict(
            output_type="loglikelihood_rolling", doc_to_text="", doc_to_target="{{text}}",
            metric_list=[dict(metric="bits_per_byte"), dict(metric="word_perplexity")],
        ),
        ling_answer=generate,
    )  # fmt: skip
    for name, content in files.items():
        (path / f"{name}.yaml").write_text(yaml.safe_dump(dict(task=name) | shared | content))
    return path


def evaluate(model, tasks, *names, **options):
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate(model, tasks=[*names], task_manager=manager, bootstrap_iters=0, **options)


def responses(results, name):
    return [sample["resps"] for sample in results["samples"][name]]


def same(a, b):
    """Nested lists and tuples that are equal, their floats to rounding."""
    if isinstance(a, float):
        return a == pytest.approx(b, rel=1e-4, abs=1e-4)
    return all(map(same, a, b)) and len(a) == len(b) if isinstance(a, list | tuple) else a == b


def same_results(got, want, *names):
    for name in names:
        assert same(responses(got, name), responses(want, name)), name
        for metric, value in want["results"][name].items():
            assert same(got["results"][name][metric], value), (name, metric)


def test_results_are_those_of_the_hf_model(ours, theirs, tasks):
    names = "ling_choice", "ling_rolling", "ling_answer"
    got, want = evaluate(ours, tasks, *names), evaluate(theirs, tasks, *names)
    same_results(got, want, *names)
    answers = [r[0] for r in responses(got, "ling_answer")]
    assert len({*map(str, answers)}) > 4  # the prompts matter


def test_results_through_the_server_are_those_of_the_hf_model(folder, theirs, tasks, monkeypatch):
    """By lm_eval's own client, with the tokenizer of the folder and with that of the server."""
    names = "ling_choice", "ling_rolling"
    monkeypatch.setattr(theirs, "_max_length", 64)  # the client takes off one token for an answer, and one of a window
    want = evaluate(theirs, tasks, *names)
    with running(service(folder)) as server:
        url = f"http://127.0.0.1:{port_of(server)}/v1/completions"
        for tokenizer in (dict(tokenizer=str(folder)), dict(tokenizer_backend="remote")):
            options = dict(base_url=url, model="speller", max_length=66, tokenized_requests=True, batch_size=3)
            same_results(evaluate(LocalCompletionsAPI(**options, **tokenizer), tasks, *names), want, *names)


def test_a_chat_is_the_hf_models(ours, theirs, tasks):
    options = dict(apply_chat_template=True, system_instruction="Be brief.")
    got, want = (evaluate(lm, tasks, "ling_answer", **options) for lm in (ours, theirs))
    assert same(responses(got, "ling_answer"), responses(want, "ling_answer"))
    assert ours.chat_template(True) == theirs.chat_template(True) == load_tokenizer().chat_template
    history = [dict(role="user", content="Hi"), dict(role="assistant", content="The answer is")]
    assert ours.apply_chat_template(history, False) == theirs.apply_chat_template(history, False)


def requests(kind, *arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def test_long_inputs_lose_tokens_on_the_left(ours, theirs):
    """Also texts without a context, an empty prompt, and special tokens by name."""
    text = " ".join(WORDS)
    pairs = [(text * 3, "many words"), ("", text), ("<role>HUMAN</role>Hi", "<|role_end|>"), ("a ", "b")]
    got, want = (lm.loglikelihood(requests("loglikelihood", *pairs)) for lm in (ours, theirs))
    assert same(got, want)
    texts = [(text * 5,), ("a",), ("",)]
    assert same(*(lm.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)) for lm in (ours, theirs)))
    prompts = [(text * 4, dict(until=["x"], max_gen_toks=8)), (text, dict(until=[], max_gen_toks=30))]
    got, want = (lm.generate_until(requests("generate_until", *prompts)) for lm in (ours, theirs))
    assert got == want and all(got)
    assert ours.generate_until(requests("generate_until", ("", dict(until=[], max_gen_toks=4))))


def test_a_context_of_spaces_alone(ours):
    """They are the continuation's first tokens; lm_eval's hf model has no answer then."""
    got, want = ours.loglikelihood(requests("loglikelihood", (" ", "many words"), ("", " many words")))
    assert same(got, want)


def test_choices_of_a_question_cost_its_tokens_once(folder, tasks):
    """The engine prefills a context once, but for the page in which its last token is."""
    rows = []
    lm = LingLM(pretrained=str(folder))
    lm.engine = Engine(lm.engine.model, page_size=4, max_running=8)
    compute = lm.engine.forward.compute

    def count(lanes, mode, width=None, chunks=(), *rest):
        rows.append(sum(chunk.rows for chunk in chunks))
        return compute(lanes, mode, width, chunks, *rest)

    lm.engine.forward.compute = count
    got = evaluate(lm, tasks, "ling_choice")
    contexts, ends = [], []
    for sample in got["samples"]["ling_choice"]:
        arguments = [request[:2] for request in sample["arguments"]]
        contexts.append(len(lm.tok_encode(arguments[0][0])))
        ends += [len(lm.tok_encode(end)) for _, end in arguments]
    computed = sum(contexts) + sum(ends)
    assert sum(rows) < computed + 2 * 4 * len(contexts) < 0.8 * (3 * sum(contexts) + sum(ends))


def test_more_requests_than_run_at_once(folder, ours):
    """Results are in the order of the requests, whatever the order in which they finish."""
    narrow = LingLM(pretrained=str(folder), batch_size=2)
    prompts = [(word, dict(until=["e"], max_gen_toks=4 + i)) for i, word in enumerate(WORDS)]
    got, want = (lm.generate_until(requests("generate_until", *prompts)) for lm in (narrow, ours))
    assert got == want and len({*got}) > 4
    sampled = [(word, dict(do_sample=True, temperature=0.8, top_p=0.9, max_gen_toks=6)) for word in WORDS]
    got, again = (lm.generate_until(requests("generate_until", *sampled)) for lm in (narrow, narrow))
    assert got == again != ours.generate_until(requests("generate_until", *((w, dict(max_gen_toks=6)) for w in WORDS)))


def test_greedy_continuations_are_recognised(ours):
    pairs = []
    for prompt in map(ours.tok_encode, WORDS):
        answer = ours.engine.generate([prompt], max_new_tokens=3, stop_token_ids=())[0]
        pairs += [(None, prompt, answer), (None, prompt, [*answer[:2], (answer[2] + 1) % 256])]
    assert [greedy for _, greedy in ours._loglikelihood_tokens(pairs)] == [True, False] * len(WORDS)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(), "needs pretrained"),
        (dict(pretrained="/nowhere"), "nowhere"),
        (dict(pretrained="x", dtype=1), "no dtype"),
        (dict(pretrained="x", precision="fp4"), "precision is 'fp4'"),
        (dict(batch_size="many"), "batch_size is 'many'"),
        (dict(max_length=4096), "max_length is 4096"),
    ],
)
def test_bad_arguments_are_named(folder, options, message):
    if "pretrained" not in options and options:
        options = dict(pretrained=str(folder)) | options
    with pytest.raises(InputError, match=message):
        LingLM(**options)


def test_unknown_generation_arguments_are_named(ours):
    for wrong, message in ((dict(num_beams=3), "num_beams"), (dict(max_gen_toks=500), "max_gen_toks is 500")):
        with pytest.raises(InputError, match=message):
            ours.generate_until(requests("generate_until", ("a", wrong)))


def test_the_command(folder, tasks, tmp_path, monkeypatch, capsys):
    flags = ["--tasks", "ling_choice", "--include_path", str(tasks), "--limit", "3"]
    command = [sys.executable, "-m", lm_eval.__name__, "--model_args", f"pretrained={folder}", *flags]
    done = subprocess.run([*command, "--output_path", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "|ling_choice|" in done.stdout.replace(" ", "") and list(tmp_path.rglob("results_*.json"))
    monkeypatch.setattr(sys, "argv", ["lm_eval", "--model_args", "pretrained=/nowhere", *flags])
    assert lm_eval.main() == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
