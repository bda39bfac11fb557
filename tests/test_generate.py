"""How tokens are chosen, and the command line, on a checkpoint that spells what it is told to."""

import dataclasses
import io
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.generate import Engine, plan, sampler, stream_text
from ling_kernels.generate import __main__ as cli
from ling_kernels.generate.plan import step_bytes, tokens_per_second
from ling_kernels.generate.text import StopStrings
from ling_kernels.model import Ling, LingConfig, load_model, save_model
from ling_kernels.tokenizer import load_tokenizer

BOS, EOS, ROLE_END, ROLE, END_OF_ROLE = 256, 257, 260, 261, 262
LETTERS = "abcdefghijklmnopqrstuvwxyz"

# What the checkpoint writes after each token: the alphabet, then the end; "?é!"; and XYZ as an answer in a chat.
AFTER = dict(zip(LETTERS.encode(), [*LETTERS[1:].encode(), EOS], strict=True))
AFTER |= dict(zip(b"?\xc3\xa9!", [*b"\xc3\xa9!", EOS], strict=True))
AFTER |= {END_OF_ROLE: ord("X"), ord("X"): ord("Y"), ord("Y"): ord("Z"), ord("Z"): ROLE_END, ROLE_END: ord("u")}
AFTER |= {BOS: ord("p"), EOS: ord("a")}


def speller(folder, positions: int = 200):
    """A checkpoint whose blocks add next to nothing to the embedding E[t], and whose head has E[t] as row AFTER[t]."""
    torch.manual_seed(0)
    model = Ling(dataclasses.replace(LingConfig.tiny(), num_hidden_layers=2, max_position_embeddings=positions))
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        embedding = model.word_embeddings.weight.normal_()
        now, then = torch.tensor([*AFTER.items()]).T
        model.lm_head.weight.zero_().index_add_(0, then, embedding[now] / 10)
    save_model(model, folder)
    load_tokenizer().save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return speller(tmp_path_factory.mktemp("speller"))


@pytest.fixture
def generate(checkpoint, capsys):
    """generate(*arguments) -> (exit code, standard output, standard error)"""

    def run(*args: str, model: str = checkpoint):
        code = cli.main(["--model", model, *args])
        return code, *capsys.readouterr()

    return run


def draws(logits: list[float], n: int = 20_000, seed: int = 0, **options) -> torch.Tensor:
    """How often each token is drawn, as a share of n."""
    rows = torch.tensor(logits).expand(n, -1)
    tokens = sampler(seed=seed, **options)(rows, torch.zeros(n, 1, dtype=torch.long))
    return torch.bincount(tokens, minlength=len(logits)) / n


def test_temperature_zero_takes_the_likeliest():
    logits = torch.randn(50, 30, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(50, 1, dtype=torch.long)
    assert torch.equal(sampler()(logits, ids), logits.argmax(1))
    assert torch.equal(sampler(temperature=1e-30, seed=0)(1e10 * logits, ids), logits.argmax(1))
    assert torch.equal(sampler(temperature=5.0, top_k=1, seed=0)(logits.bfloat16(), ids), logits.bfloat16().argmax(1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_draws_follow_softmax(temperature):
    logits = [2.0, 1.0, 0.0, -1.0, 0.5]
    p = (torch.tensor(logits) / temperature).softmax(0)
    share = draws(logits, temperature=temperature)
    # Five standard deviations of a share of 20000 draws.
    assert ((share - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt()).all()


# Probabilities 0.5, 0.3, 0.1, 0.06, 0.04, not in order.
SHARES = [0.1, 0.5, 0.04, 0.3, 0.06]


@pytest.mark.parametrize("options, kept", [
    (dict(), {0, 1, 2, 3, 4}),
    (dict(top_k=2), {1, 3}),
    (dict(top_k=9), {0, 1, 2, 3, 4}),
    (dict(top_p=0.49), {1}),
    (dict(top_p=0.51), {1, 3}),
    (dict(top_p=0.85), {1, 3, 0}),
    (dict(top_p=1e-9), {1}),
    (dict(top_p=0.6), {1, 3}),
    (dict(top_p=0.6, top_k=2), {1}),  # of the two, the first has 0.625
    (dict(top_p=0.6, top_k=2, temperature=2.0), {1, 3}),  # now 0.564
    (dict(min_p=0.19), {1, 3, 0}),
    (dict(min_p=1.0), {1}),
    (dict(min_p=0.19, top_p=0.51), {1, 3}),
])  # fmt: skip
def test_top_k_and_top_p_keep(options, kept):
    logits = [math.log(p) for p in SHARES]
    share = draws(logits, **{"temperature": 1.0} | options)
    assert set(share.nonzero().flatten().tolist()) == kept
    p = (torch.tensor(logits) / options.get("temperature", 1.0)).softmax(0)
    p = torch.where(torch.tensor([i in kept for i in range(5)]), p, 0)
    assert torch.allclose(share, p / p.sum(), atol=0.02), "what is kept keeps its proportions"


def test_repetition_penalty():
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.5], [2.0, 1.5, -1.0, -1.5]])
    choose = sampler(repetition_penalty=1.5)
    assert choose(logits, torch.tensor([[0, 0, 0], [2, 3, 2]])).tolist() == [1, 0], "once, however often it was said"
    negative = torch.tensor([[-1.0, -1.2]])
    assert choose(negative, torch.tensor([[0]])).tolist() == [1], "below zero it multiplies"
    assert choose(negative, torch.tensor([[1]])).tolist() == [0]
    share = draws([1.5, 0.0], temperature=0.5, repetition_penalty=3.0)  # 1.5 / 3 / 0.5 = 1
    assert abs(share[0] - torch.tensor(1.0).sigmoid()) < 0.02


def test_seed():
    def tokens(seed):
        choose, ids = sampler(temperature=1.0, seed=seed), torch.zeros(1, 1, dtype=torch.long)
        return [int(choose(torch.zeros(1, 100), ids)) for _ in range(20)]

    state = torch.get_rng_state()
    assert tokens(1) == tokens(1) != tokens(2)
    assert tokens(None) != tokens(None)
    assert len(set(tokens(1))) > 10
    assert torch.equal(state, torch.get_rng_state()), "torch's own generator is left alone"


@pytest.mark.parametrize("options", [
    dict(temperature=-0.1), dict(temperature=math.nan), dict(temperature=math.inf), dict(temperature=1.0, top_k=-1),
    dict(temperature=1.0, top_p=0.0), dict(temperature=1.0, top_p=1.1), dict(temperature=1.0, top_p=math.nan),
    dict(repetition_penalty=0.0), dict(repetition_penalty=-1.0), dict(seed=-1), dict(seed=1 << 63),
    dict(temperature=1.0, min_p=-0.1), dict(temperature=1.0, min_p=1.1), dict(top_k=5), dict(top_p=0.5),
    dict(min_p=0.1),
])  # fmt: skip
def test_meaningless_sampling(options):
    with pytest.raises(InputError, match=list(options)[-1]):
        sampler(**options)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers(temperature):
    choose, ids = sampler(temperature=temperature), torch.zeros(1, 1, dtype=torch.long)
    for bad in ([0.0, math.nan], [math.inf, 0.0], [-math.inf, -math.inf]):
        with pytest.raises(InputError, match="no numbers"):
            choose(torch.tensor([bad]), ids)
    assert int(choose(torch.tensor([[-math.inf, 0.0]]), ids)) == 1, "a masked token is no fault"


@pytest.mark.parametrize("stop, pieces, shown", [
    ([], ["a", "bc"], ["a", "bc", ""]),
    (["bc"], ["abcd", "e"], ["a", "", ""]),
    (["bc"], ["ab", "xb", "cb"], ["a", "bx", "", ""]),
    (["aab"], ["a", "a", "a", "b", "c"], ["", "", "a", "", "", ""]),
    (["xyz", "yq"], ["x", "y", "z"], ["", "", "", ""]),
    (["xyz", "yq"], ["x", "y", "q"], ["", "", "x", ""]),
    (["end"], ["the e", "n"], ["the ", "", "en"]),
    (["b", "ab"], ["xab"], ["x", ""]),
])  # fmt: skip
def test_stop_strings(stop, pieces, shown):
    cut = StopStrings(stop)
    assert [*map(cut.add, pieces), cut.end()] == shown
    assert cut.found == any(s in "".join(pieces) for s in stop)


def test_stream_text(checkpoint):
    engine, tokenizer = Engine(load_model(checkpoint, torch.float32)), load_tokenizer(checkpoint)

    def pieces(prompt, n, ends=(), stop=()):
        tokens = engine.stream(tokenizer.encode(prompt), max_new_tokens=n, ends=ends)
        return list(stream_text(tokens, tokenizer, stop))

    assert pieces("a", 3) == ["b", "c", "d", ""]
    assert pieces("?", 2) == ["", "é", ""]
    assert pieces("?", 1) == ["", "\ufffd"], "half a character at the end"
    assert pieces("x", 9, ends={EOS}) == ["y", "z", ""]
    assert pieces("a", 9, stop=["def"]) == ["b", "c", "", "", "", ""]


@pytest.mark.parametrize("args, text", [
    (["--prompt", "a"], LETTERS[1:]),
    (["--prompt", "x"], "yz"),
    (["--prompt", "?"], "é!"),
    (["--prompt", ""], LETTERS[LETTERS.index("p"):]),
    (["--prompt", "a", "--max-new-tokens", "3"], "bcd"),
    (["--prompt", "x", "--max-new-tokens", "6", "--ignore-eos"], "yz<|endoftext|>abc"),
    (["--prompt", "a", "--stop", "fgh"], "bcde"),
    (["--prompt", "a", "--stop", "no", "--stop", "jk"], "bcdefghi"),
    (["--prompt", "v", "--stop", "xyw", "--stop", "z."], "wxyz"),
    (["--prompt", "x", "--ignore-eos", "--stop", "z<|end"], "y"),
    (["--prompt", "x", "--echo"], "xyz"),
    (["--prompt", "x", "--precision", "bf16", "--device", "cpu"], "yz"),
    (["--prompt", "x", "--precision", "fp8"], "yz"),
    (["--prompt", "x", "--tokenizer", "bytes"], "yz"),
    (["--prompt", "Hi", "--chat"], "XYZ"),
    (["--prompt", "Hi", "--chat", "--system", "S", "--echo"], "<role>SYSTEM</role>S\ndetailed thinking off<|role_end|>"
     "<role>HUMAN</role>Hi<|role_end|><role>ASSISTANT</role>XYZ"),
    (["--prompt", "</role>", "--max-new-tokens", "1", "--echo"], "</role>"),
])  # fmt: skip
def test_text(generate, args, text):
    code, out, err = generate(*args)
    assert (code, err) == (0, "")
    assert out.removesuffix("\n").startswith(text) if args[1] == "</role>" else out == text + "\n"


def test_prompt_is_plain_text_outside_a_chat(checkpoint, monkeypatch):
    given = []
    monkeypatch.setattr(Engine, "stream", lambda engine, ids, **_: given.append(ids) or iter(()))
    cli.main(["--model", checkpoint, "--prompt", "<role>"])
    cli.main(["--model", checkpoint, "--prompt", "<role>", "--chat"])
    assert given[0] == [*b"<role>"]
    turns = [ROLE_END, ROLE, *b"HUMAN", END_OF_ROLE, ROLE, ROLE_END, ROLE, *b"ASSISTANT", END_OF_ROLE]
    assert given[1][-len(turns) :] == turns, "a chat's text is control tokens wherever it reads like them"


def test_streams(checkpoint, monkeypatch):
    shown = []
    monkeypatch.setattr(cli, "show", shown.append)
    cli.main(["--model", checkpoint, "--prompt", "?", "--stop", "Q"])
    assert shown == ["", "é", "!", "", "\n"], "each character as soon as it is whole"


def test_seed_and_penalty(generate):
    def text(*args):
        return generate("--prompt", "a", "--max-new-tokens", "30", "--ignore-eos", "--temperature", "9", *args)[1]

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")
    assert text("--seed", "1", "--top-k", "1").startswith("bcdef")
    assert text("--seed", "1", "--top-p", "1e-6").startswith("bcdef")
    assert generate("--prompt", "bca", "--max-new-tokens", "1")[1] == "b\n"
    assert generate("--prompt", "bca", "--max-new-tokens", "1", "--repetition-penalty", "1000")[1] != "b\n"


def test_standard_input_and_stats(generate, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"wx\n")))
    code, out, err = generate("--prompt", "-", "--stats")
    assert (code, out) == (0, "yz\n")
    assert err.startswith("2 tokens read in ") and ", 2 written at " in err and "drafts" not in err
    code, out, err = generate("--prompt", "abcabcab", "--draft", "2", "--stats", "--max-new-tokens", "9")
    assert (code, out) == (0, "cdefghijk\n") and " drafts were right" in err


def test_ends_of_generation_config(tmp_path, generate):
    model = speller(tmp_path)
    for ends, text in (([257, ord("e")], "bcd\n"), (ord("d"), "bc\n")):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {ends}}}')
        assert generate("--prompt", "a", model=model)[1] == text


def test_default_length_is_what_the_model_has_left(generate):
    assert len(generate("--prompt", "a" * 190, "--ignore-eos")[1]) == 10 + 1


def test_terminal_is_not_steered(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    cli.show("a\x1b[2J\tb\n\x9b")
    assert sys.stdout.getvalue() == "a\ufffd[2J\tb\n\ufffd"


@pytest.mark.parametrize("args, said", [
    ([], "--prompt"),
    (["--prompt", "a", "--temprature", "1"], "--temprature"),
    (["--prompt", "a", "--temperature", "hot"], "--temperature"),
    (["--prompt", "a", "--temperature", "-1"], "temperature"),
    (["--prompt", "a", "--temperature", "1", "--top-p", "0"], "top_p"),
    (["--prompt", "a", "--top-k", "5"], "temperature above 0"),
    (["--prompt", "a", "--draft", "8"], "draft 8"),
    (["--prompt", "a", "--fp8-head"], "--precision fp8"),
    (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty"),
    (["--prompt", "a", "--max-new-tokens", "0"], "at least 1"),
    (["--prompt", "a", "--max-new-tokens", "200"], "200 positions"),
    (["--prompt", "a" * 200], "the prompt is 200 tokens"),
    (["--prompt", "a", "--stop", ""], "--stop is empty"),
    (["--prompt", "a", "--system", "S"], "--chat"),
    (["--prompt", "a\udcff"], "not valid Unicode"),
    (["--prompt", "a", "--tokenizer", "/nowhere"], "there is no tokenizer at /nowhere"),
    (["--prompt", "a", "--device", "tpu"], "tpu"),
    (["--prompt", "a", "--model", "tiny"], "give a checkpoint folder"),
    (["--prompt", "a", "--model", "/nowhere"], "/nowhere"),
])  # fmt: skip
def test_bad_arguments(generate, args, said):
    one_line(*generate(*args), said)


def one_line(code: int, out: str, err: str, said: str):
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and said in err


def test_no_gpu(generate, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one_line(*generate("--prompt", "a", "--device", "cuda"), "torch sees no GPU")


def test_too_little_memory(generate, monkeypatch):
    def load(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cli, "load_model", load)
    one_line(*generate("--prompt", "a"), "memory is too small")


def test_bad_standard_input(generate, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    one_line(*generate("--prompt", "-"), "not UTF-8")


def test_bad_checkpoints(tmp_path, generate):
    model = speller(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"

    def damaged(path, content, said, *args):
        before = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        one_line(*generate("--prompt", "a", *args, model=model), said)
        path.write_bytes(before)

    damaged(weights, None, "model.safetensors")
    damaged(weights, weights.read_bytes()[:-100], "model.safetensors")
    damaged(config, None, "config.json")
    damaged(config, b"{", "config.json")
    damaged(config, config.read_bytes().replace(b'"vocab_size": 320', b'"vocab_size": 264'), "the model only 264")
    damaged(config, config.read_bytes().replace(b'"hidden_size": 128', b'"hidden_size": 64'), "[320, 64]")
    damaged(tmp_path / "tokenizer.json", None, "give --tokenizer")
    damaged(tmp_path / "tokenizer_config.json", b'{"eos_token": "</s>"}', "</s>")
    damaged(tmp_path / "tokenizer_config.json", b"{}", "no chat template", "--chat")
    (tmp_path / "generation_config.json").write_text("[]")
    one_line(*generate("--prompt", "a", model=model), "generation_config.json")


def start(model: str) -> subprocess.Popen:
    """The command as a user starts it, writing for long, but less than a pipe's buffer of 8 KiB."""
    args = ["--model", model, "--prompt", "a", "--ignore-eos", "--max-new-tokens", "5000"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen([sys.executable, "-m", "ling_kernels.generate", *args], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=buffered, cwd=Path(__file__).parents[1])  # fmt: skip


def test_ctrl_c_and_a_reader_that_leaves(tmp_path):
    model = speller(tmp_path, 6000)
    with start(model) as interrupted:
        assert interrupted.stdout.read(3) == b"bcd"
        interrupted.send_signal(signal.SIGINT)
        assert interrupted.wait(60) == 130, "the text comes while more is being written"
        assert interrupted.stderr.read() == b"\n"
    with start(model) as left:
        assert left.stdout.read(3) == b"bcd"
        left.stdout.close()
        assert left.wait(60) == 141
        assert left.stderr.read() == b""


@pytest.mark.parametrize("weights, head, GB", [("bf16", "bf16", 2.242), ("fp8", "bf16", 1.463), ("fp8", "fp8", 1.141)])
def test_bytes_of_a_step(weights, head, GB):
    """Ling-mini's: sums made another way, with fp32 routers, without norms and scales."""
    parts = step_bytes(LingConfig.mini(), weights=weights, head=head)
    assert (sum(parts.values()) + parts["routers"]) / 1e9 == pytest.approx(GB, rel=1e-3)
    assert tokens_per_second(parts, 1, 4.8e12) == pytest.approx(4.8e12 / sum(parts.values()))


def test_bytes_of_larger_steps():
    c = LingConfig.mini()
    one, many = step_bytes(c), step_bytes(c, batch=10**6, context=10)
    assert one["experts"] == pytest.approx(19 * 8 * 3 * 2048 * 512 * 2)
    assert many["experts"] == pytest.approx(19 * 256 * 3 * 2048 * 512 * 2), "all of them"
    assert many["KV cache"] == 10**6 * 10 * 20 * 2 * 4 * 128 * 2
    weights = sum(v for k, v in many.items() if k not in ("KV cache", "embedding")) / 2
    assert weights == c.num_parameters() - c.vocab_size * c.hidden_size


def test_plan(capsys):
    assert plan.main(["--model", "mini", "--batch", "1", "64", "--weights", "fp8", "--context", "0"]) == 0
    lines = [re.split(r"  +", line.strip()) for line in capsys.readouterr().out.splitlines()]
    lines = {name: values for name, *values in lines}
    assert float(lines["H200, 4.8 TB/s"][0]) == pytest.approx(3281, rel=0.02)
    assert float(lines["all"][1]) == pytest.approx(14280, rel=0.01)
    assert lines["weights"] == ["16.9", "16.9"] and lines["KV cache"] == ["0.0", "0.0"]
    assert plan.main(["--model", "1t", "--batch", "1", "64", "--weights", "fp8", "--context", "131072"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"H200, 4.8 TB/s +needs 8 GPUs +needs 29 GPUs$", said, re.M), said
    assert plan.main(["--model", "flash", "--batch", "1", "--weights", "fp8", "--context", "4096"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"H100, 3.35 TB/s +needs 2 GPUs$", said, re.M) and re.search(r"H200, 4.8 TB/s +744$", said, re.M)
    for args, said in (
        (["--batch", "0"], "--batch"),
        (["--context", "-1"], "--context"),
        (["--cache", "int4"], "int4"),
    ):
        assert plan.main(["--model", "mini", *args]) == 2
        assert said in capsys.readouterr().err
