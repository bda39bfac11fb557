"""Streamed text, stop strings, and the command line."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.generate import Engine, Sampling, cli, generate_texts, stream_text
from ling_kernels.generate.text import StopStrings
from ling_kernels.model import load_model
from ling_kernels.tokenizer import load_tokenizer
from tests.speller import END_OF_ROLE, EOS, LETTERS, ROLE, ROLE_END, speller


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


def test_texts_with_reasons(checkpoint):
    engine, tokenizer = Engine(load_model(checkpoint, torch.float32), max_waiting=2), load_tokenizer()
    options = dict(max_new_tokens=4, stop_token_ids=[EOS], logprobs=0)
    texts = generate_texts(engine, tokenizer, ["a", [ord("x")], "h"], stop=["kl", "zz"], **options)
    assert [(t.text, t.finish_reason) for t in texts] == [("bcde", "length"), ("yz", "stop"), ("ij", "stop")]
    assert [[p.token for p in t.logprobs] for t in texts] == [t.tokens for t in texts]
    assert texts[2].tokens == [*b"ijkl"] and not engine.step()
    two = generate_texts(
        engine, tokenizer, ["a", "m"], sampling=[Sampling(logit_bias={98: -100}), None], n=2, **options
    )
    assert [t.text for t in two[2:]] == ["nopq"] * 2 and two[0] == two[1] != texts[0]
    one = generate_texts(engine, tokenizer, ["a"], stop="cd", **options)
    assert [(t.text, t.finish_reason) for t in one] == [("b", "stop")], "a string is one, as OpenAI has it"
    assert "".join(stream_text(iter(b"bcde"), tokenizer, "de")) == "bc"
    for texts, wrong, name in (
        ("a", {}, "prompts"), (5, {}, "prompts"), (["a"], dict(stop=5), "stop"), (["a"], dict(stop=["b", 5]), "stop"),
        ([], dict(stop=""), "stop"), (["a"], dict(max_new_tokens=True), "max_new_tokens"), (["a"], dict(n=True), "n"),
        (["a"], dict(logprobs=True), "logprobs"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=name):
            generate_texts(engine, tokenizer, texts, **options | wrong)
    with pytest.raises(InputError, match="stop"):
        [*stream_text(iter(b"bc"), tokenizer, 5)]


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
    text = StopStrings(stop)
    assert [*map(text.add, pieces), text.end()] == shown
    assert text.found == any(s in "".join(pieces) for s in stop)


def naive_stop(stop, pieces):
    """By definition: what each piece lets be shown, and what is left at the end."""
    shown, held_back = [], ""
    for piece in pieces:
        text = held_back + piece
        if starts := [text.index(s) for s in stop if s in text]:
            return shown + [text[: min(starts)]] + [""] * (len(pieces) - len(shown))
        safe = min(i for i in range(len(text) + 1) if i == len(text) or any(s.startswith(text[i:]) for s in stop))
        shown.append(text[:safe])
        held_back = text[safe:]
    return [*shown, held_back]


def test_stop_strings_by_definition():
    """Random texts of two letters, whose parts match in many ways."""
    random = Random(0)
    letters = lambda least, most: "".join(random.choices("ab", k=random.randint(least, most)))  # noqa: E731
    found = 0
    for _ in range(3000):
        stop = [letters(1, random.choice([3, 9])) for _ in range(random.randint(0, 4))]
        pieces = [letters(0, 5) for _ in range(random.randint(1, 12))]
        if stop and random.random() < 0.3:  # long ones are met seldom
            stop = [s * 3 for s in stop]
            pieces.insert(random.randint(0, len(pieces)), stop[0][: random.randint(1, len(stop[0]))])
        text = StopStrings(stop)
        assert [*map(text.add, pieces), text.end()] == naive_stop(stop, pieces), (stop, pieces)
        found += text.found
    assert 1000 < found < 2900
    with pytest.raises(InputError, match="empty string"):
        StopStrings(["b", ""])


@pytest.mark.parametrize("string, text", [
    ("ab" * 500_000, "xyzabaax"),  # no more is done than the text asks for
    ("a" * 999 + "b", "a" * 5000),
    ("ab" * 499 + "aa", "ab" * 3000),
    ("ab" * 20 + "c", ("ab" * 20 + "d") * 100),
])  # fmt: skip
def test_stop_strings_cost_as_much_as_the_text(string, text):
    """At most three looks at the string for a character of the text, and three to learn a character of the string."""

    class Counted(str):
        looks = 0

        def __getitem__(self, index):
            Counted.looks += 1
            return str.__getitem__(self, index)

        def startswith(self, *_):
            raise AssertionError("it looks at more than a character")

    stop = StopStrings([Counted(string)])
    assert "".join(map(stop.add, text)) + stop.end() == text and not stop.found
    assert 0 < Counted.looks <= 6 * len(text)


def test_stream_text(checkpoint):
    engine, tokenizer = Engine(load_model(checkpoint, torch.float32)), load_tokenizer(checkpoint)

    def pieces(prompt, n, stop_token_ids=(), stop=()):
        tokens = engine.stream(tokenizer.encode(prompt), max_new_tokens=n, stop_token_ids=stop_token_ids)
        return list(stream_text(tokens, tokenizer, stop))

    assert pieces("a", 3) == ["b", "c", "d", ""]
    assert pieces("?", 2) == ["", "é", ""]
    assert pieces("?", 1) == ["", "\ufffd"], "an incomplete character at the end"
    assert pieces("x", 9, stop_token_ids={EOS}) == ["y", "z", ""]
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
def test_output(generate, args, text):
    code, out, err = generate(*args)
    assert (code, err) == (0, "")
    assert out.removesuffix("\n").startswith(text) if args[1] == "</role>" else out == text + "\n"


def test_special_tokens_are_those_of_the_chat_template(checkpoint, monkeypatch):
    prompts = []
    monkeypatch.setattr(Engine, "stream", lambda engine, ids, **_: prompts.append(ids) or iter(()))
    cli.main(["--model", checkpoint, "--prompt", "<role>"])
    cli.main(["--model", checkpoint, "--prompt", "<role>", "--chat"])
    assert prompts[0] == [*b"<role>"]
    turns = [ROLE_END, ROLE, *b"HUMAN", END_OF_ROLE, *b"<role>", ROLE_END, ROLE, *b"ASSISTANT", END_OF_ROLE]
    assert prompts[1][-len(turns) :] == turns, "a user's text is not parsed in a chat either"


def test_tools(checkpoint, monkeypatch, tmp_path, generate):
    prompts, file = [], tmp_path / "tools.json"
    tools = [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}]
    file.write_text(json.dumps(tools))
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "stream", lambda engine, ids, **_: prompts.append(ids) or iter(()))
        patch.setattr(cli, "max_sequence_tokens", lambda *_: 10_000)
        assert generate("--prompt", "Hi", "--chat", "--tools", str(file))[0] == 0
    tokenizer = load_tokenizer(checkpoint)
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tools=tools)
    assert prompts[0] == tokenizer.encode(text, special=True) and '"name": "now"' in text
    one_line(*generate("--prompt", "a", "--tools", str(file)), "--tools needs --chat")
    one_line(*generate("--prompt", "a", "--chat", "--tools", ""), "--tools is empty")
    one_line(*generate("--prompt", "a", "--chat", "--tools", str(tmp_path / "no")), "/no: No such file or directory")
    for wrong in ("{", "{}", "[]", "[1]", "[{}]"):
        file.write_text(wrong)
        one_line(*generate("--prompt", "a", "--chat", "--tools", str(file)), f"--tools {file}: it is not")


def test_output_is_streamed(checkpoint, monkeypatch):
    shown = []
    monkeypatch.setattr(cli, "write", shown.append)
    cli.main(["--model", checkpoint, "--prompt", "?", "--stop", "Q"])
    assert shown == ["", "é", "!", "", "\n"], "each character as soon as it is complete"


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
    assert err.startswith("2 prompt tokens in ") and ", 2 new tokens at " in err and "draft" not in err
    code, out, err = generate("--prompt", "abcabcab", "--draft", "2", "--stats", "--max-new-tokens", "9")
    assert (code, out) == (0, "cdefghijk\n") and " draft tokens accepted" in err


def test_stop_tokens_of_generation_config(tmp_path, generate):
    model = speller(tmp_path)
    for eos, text in (([257, ord("e")], "bcd\n"), (ord("d"), "bc\n")):
        (tmp_path / "generation_config.json").write_text(f'{{"eos_token_id": {eos}}}')
        assert generate("--prompt", "a", model=model)[1] == text


def test_default_length_is_the_rest_of_the_positions(generate):
    assert len(generate("--prompt", "a" * 190, "--ignore-eos")[1]) == 10 + 1


def test_control_characters_do_not_reach_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stdout", Terminal())
    cli.write("a\x1b[2J\tb\n\x9b")
    assert sys.stdout.getvalue() == "a\ufffd[2J\tb\n\ufffd"


@pytest.mark.parametrize("args, message", [
    ([], "--prompt"),
    (["--prompt", "a", "--temprature", "1"], "--temprature"),
    (["--prompt", "a", "--temperature", "hot"], "--temperature"),
    (["--prompt", "a", "--temperature", "-1"], "temperature"),
    (["--prompt", "a", "--temperature", "1", "--top-p", "0"], "top_p"),
    (["--prompt", "a", "--top-k", "5"], "temperature above 0"),
    (["--prompt", "a", "--draft", "8"], "draft is 8"),
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
def test_invalid_arguments(generate, args, message):
    one_line(*generate(*args), message)


def one_line(code: int, out: str, err: str, message: str):
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("error: ") and message in err


def test_no_gpu(generate, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    one_line(*generate("--prompt", "a", "--device", "cuda"), "torch sees no GPU")


def test_out_of_memory(generate, monkeypatch):
    def load(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cli, "load_model", load)
    one_line(*generate("--prompt", "a"), "out of GPU memory")


def test_invalid_standard_input(generate, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    one_line(*generate("--prompt", "-"), "not UTF-8")


def test_damaged_checkpoints(tmp_path, generate):
    model = speller(tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / "model.safetensors"

    def damaged(path, content, message, *args):
        before = path.read_bytes()
        path.unlink() if content is None else path.write_bytes(content)
        one_line(*generate("--prompt", "a", *args, model=model), message)
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
    """Start the command; its output is long, but below a pipe's buffer of 8 KiB."""
    args = ["--model", model, "--prompt", "a", "--ignore-eos", "--max-new-tokens", "5000"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen([sys.executable, "-m", "ling_kernels.generate", *args], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=buffered, cwd=Path(__file__).parents[1])  # fmt: skip


def test_ctrl_c_and_a_closed_pipe(tmp_path):
    model = speller(tmp_path, 6000)
    with start(model) as interrupted:
        assert interrupted.stdout.read(3) == b"bcd"
        interrupted.send_signal(signal.SIGINT)
        assert interrupted.wait(60) == 130, "text is streamed while more is generated"
        assert interrupted.stderr.read() == b"\n"
    with start(model) as closed:
        assert closed.stdout.read(3) == b"bcd"
        closed.stdout.close()
        assert closed.wait(60) == 141
        assert closed.stderr.read() == b""
