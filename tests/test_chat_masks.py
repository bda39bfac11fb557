"""Chats: which tokens of a conversation are trained on, for every form of its messages and mode of thinking."""

import json

import numpy as np
import pytest

from ling_kernels.errors import InputError
from ling_kernels.tokenizer import Tokenizer, byte_settings, load_tokenizer
from ling_kernels.train.data.chats import encode_conversation, write_chats

# A template of the kind of ChatML, in the byte-level tokenizer's control tokens.
CHATML = """\
{%- if tools %}{{ '<role>tools\\n' + tools | tojson + '<|role_end|>\\n' }}{% endif %}
{%- for m in messages %}
{{- '<role>' + m.role + '\\n' + m.content }}
{%- for call in m.tool_calls or [] %}{{ '\\n<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}
{{- '<|role_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<role>assistant\\n' }}{% endif %}"""
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "now", "arguments": {"at": "x"}}}],
}
MESSAGES = [
    {"role": "system", "content": "Be brief.", "name": None},
    {"role": "user", "content": "What is <|role_end|><role>assistant\nx?"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nA token <|role_end|>."},
    {"role": "user", "content": "And now?"},
    CALL,
    {"role": "tool", "content": "noon"},
    {"role": "assistant", "content": "  It is noon.\n"},
]
END = "<|role_end|>"


def tokenizer_with(template=None) -> Tokenizer:
    settings = byte_settings()
    return Tokenizer(None, settings if template is None else settings | {"chat_template": template})


def trained(row, tokenizer, train_on="assistant") -> list[str]:
    """The runs of tokens that are trained on, as text. The ids must be those of the rendered chat."""
    ids, mask = encode_conversation(row, "x, line 1", tokenizer, train_on)
    assert mask[-1] & 2 and not (mask[:-1] & 2).any()
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask & 1, [0]])))
    return [tokenizer.decode(ids[i:j]) for i, j in edges.reshape(-1, 2)]


def test_the_mask_covers_the_answers_and_their_end_tokens():
    chatml, ours = tokenizer_with(CHATML), tokenizer_with()
    assert trained({"messages": MESSAGES}, chatml) == [
        f"<think>\nhm\n</think>\n\nA token {END}.{END}",
        '\n<tool_call>{"name": "now", "arguments": {"at": "x"}}</tool_call>' + END,
        f"  It is noon.\n{END}",
    ]
    plain = [m for m in MESSAGES if m is not CALL and m["role"] != "tool"]
    assert trained({"messages": plain}, ours) == [f"A token {END}.{END}", f"  It is noon.\n{END}"]
    thought = [plain[1], {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyes"}]
    assert trained({"messages": thought}, ours) == [f"\n<think>\nhm\n</think>\n\nyes{END}"]
    again = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}] * 3
    assert trained({"messages": again}, ours) == [f"a{END}"] * 3
    for tokenizer, messages in ((ours, plain), (ours, again), (chatml, again)):
        ids, mask = encode_conversation({"messages": messages}, "x", tokenizer, "assistant")
        assert ids == tokenizer.encode(tokenizer.apply_chat_template(messages, False), special=True)
        # the prompt of the server before the last answer is what stands before its trained tokens
        prompt = tokenizer.encode(tokenizer.apply_chat_template(messages[:-1]), special=True)
        last = int(np.flatnonzero(np.diff(mask & 1) == 1)[-1]) + 1 if len(mask) else 0
        assert messages is plain or ids[:last] == prompt


def test_weights_tools_and_sharegpt():
    ours = tokenizer_with()
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},
                {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "train": True},
                {"role": "user", "content": "e"}, {"role": "assistant", "content": "f", "train": False}]  # fmt: skip
    assert trained({"messages": messages}, ours) == [f"d{END}"]
    (first, last) = trained({"messages": messages}, ours, "all")
    assert first.endswith("</role>") and last.startswith(f"<role>HUMAN</role>c{END}<role>ASSISTANT</role>d{END}")
    share = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    assert trained(share, ours) == [f"b{END}"]
    ids, _ = encode_conversation(
        {"messages": again_with("x"), "tools": [{"name": "f"}]}, "x", tokenizer_with(CHATML), "all"
    )
    assert tokenizer_with().decode(ids).startswith('<role>tools\n[{"name": "f"}]')


def test_the_mask_covers_thoughts_and_calls_of_the_built_in_template():
    ours = tokenizer_with()
    call = '<tool_call>\n{"name": "now", "arguments": {"at": "x"}}\n</tool_call>'
    said = [dict(role="user", content="When?"), CALL | {"content": None, "reasoning_content": "<role>"},
            dict(role="tool", content="noon"), dict(role="assistant", content="Noon.")]  # fmt: skip
    parts = [f"\n<think>\n<role>\n</think>\n\n{call}{END}", f"Noon.{END}"]
    assert trained({"messages": said, "tools": [{"name": "now"}]}, ours) == parts
    assert trained({"messages": [*said, MESSAGES[1]]}, ours) == [f"{call}{END}", f"Noon.{END}"]  # an earlier turn
    ids, _ = encode_conversation({"messages": said, "tools": '[{"name": "now"}]'}, "x", ours, "assistant")
    assert ids == ours.encode(ours.apply_chat_template(said, False, [{"name": "now"}]), special=True)
    plain = tokenizer_with("{% for m in messages %}{{ m.role + m.content }}<|role_end|>{% endfor %}")
    with pytest.raises(InputError, match="x, line 1: the chat template leaves out tool_calls of message 2"):
        trained({"messages": said}, plain)


def test_calls_of_sharegpt_and_of_openais_older_form():
    call = {"name": "now", "arguments": {"at": "x"}}
    turns = [("system", "S"), ("human", "When?"), ("function_call", json.dumps(call)), ("observation", "noon"),
             ("gpt", "Noon.")]  # fmt: skip
    share = {"conversations": [{"from": role, "value": value} for role, value in turns], "tools": "[]"}
    beside = {"conversations": share["conversations"][1:], "system": "S"}
    older = {"messages": [dict(role="system", content="S"), dict(role="user", content="When?"),
                          dict(role="assistant", content=None, function_call=call),
                          dict(role="function", content="noon"), dict(role="assistant", content="Noon.")]}  # fmt: skip
    ours = tokenizer_with()
    ids = [encode_conversation(row, "x", ours, "assistant")[0] for row in (share, beside, older)]
    assert ids[0] == ids[1] == ids[2] and ours.decode(ids[0]).startswith("<role>SYSTEM</role>S\ndetailed")
    assert trained(share, ours) == [
        '<tool_call>\n{"name": "now", "arguments": {"at": "x"}}\n</tool_call>' + END, f"Noon.{END}",
    ]  # fmt: skip
    two = {"conversations": [*share["conversations"][:2], {"from": "function_call", "value": json.dumps([call, call])}]}
    (calls,) = trained(two, ours)
    assert calls.count("<tool_call>") == 2


def again_with(answer):
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("row, message", [
    ({"messages": [{"role": "user", "content": "a"}]}, "no message has the role assistant"),
    ({"messages": [{"role": "assistant", "content": "a", "weight": 0}]}, "every message has weight 0"),
    ({"messages": [*again_with("a"), {"role": "narrator", "content": "b"}]}, "not narrator"),
    ({"messages": []}, "no conversation"),
    ({"messages": "hello"}, "no conversation"),
    ({"messages": [{"content": "a"}]}, "message 1 has no role"),
    ({"messages": [{"role": "assistant"}]}, "message 1, of assistant, has no content"),
    ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "weight of a message is 0 or 1"),
    ({"messages": again_with("a"), "tools": "{"}, "tools is text that is not JSON"),
    (["a"], "it is not an object"),
    ({"messages": [MESSAGES[1], *again_with("a")]}, "messages 1 and 2 are both of role user: the roles must alternate"),
    ({"messages": [*again_with("a"), CALL]}, "messages 2 and 3 are both of role assistant"),
    ({"messages": [{"role": "tool", "content": "1"}, *again_with("a")]}, "message 1 is a tool's result after none"),
    ({"conversations": [{"from": "function_call", "value": "now()"}]}, "of function_call, is text that is not"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}]}, "1: a tool call has a"),
    ({"messages": [{"role": "assistant", "content": "a", "reasoning_content": 1}]}, "reasoning_content is not text"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "x"}]}]}, "arguments of f is text"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "[1]"}]}]}, "of another kind than"),
    ({"messages": [MESSAGES[1] | {"tool_calls": CALL["tool_calls"]}, *again_with("a")[1:]]}, "of user, has tool calls"),
    ({"messages": again_with("a"), "tools": [1, 2]}, "tools are not a list of objects"),
    ({"messages": again_with("a"), "tools": '{"name": "f"}'}, "tools are not a list of objects"),
    ({"messages": again_with("a"), "tools": 7}, "tools are not a list of objects"),
    ({"conversations": [{"from": "gpt", "value": "a"}], "system": 3}, "system is int, not text"),
])  # fmt: skip
def test_errors_name_file_and_line(row, message, tmp_path):
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps({"messages": again_with("ok")}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(InputError, match=rf"c.jsonl, line 2: .*{message}"):
        write_chats([file], load_tokenizer(None), tmp_path / "x.bin", "assistant")
    assert [p.name for p in tmp_path.iterdir()] == ["c.jsonl"]


def test_a_template_without_end_token_is_refused():
    bare = tokenizer_with("{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}")
    with pytest.raises(InputError, match="x: the chat template writes no control token after an answer"):
        encode_conversation({"messages": again_with("a")}, "x", bare, "assistant")


PAIR = [dict(role="user", content="2+2?"), dict(role="assistant", content="4", reasoning_content="two twos")]


@pytest.mark.parametrize("template", [
    None,
    byte_settings()["chat_template"].replace("' + ('on' if enable_thinking else 'off') + '", "off"),
    "{% set thinking_option = 'off' %}"
    + byte_settings()["chat_template"].replace("('on' if enable_thinking else 'off')", "thinking_option"),
], ids=["variable", "words", "option"])  # fmt: skip
def test_rows_have_the_system_prompt_of_their_mode_of_thinking(template):
    tokenizer = tokenizer_with(template)
    assert template is None or "enable_thinking" not in template
    asked = f"<|role_end|><role>HUMAN</role>2+2?{END}<role>ASSISTANT</role>"
    short, long = f"4{END}", f"\n<think>\ntwo twos\n</think>\n\n4{END}"
    for mode, words, answer in (
        ("on", "on", long), (True, "on", long), ("off", "off", short), (False, "off", short), (None, "off", long),
    ):  # fmt: skip
        row = dict(messages=PAIR, thinking=mode)
        ids, _ = encode_conversation(row, "x", tokenizer, "assistant")
        assert tokenizer.decode(ids) == f"<role>SYSTEM</role>detailed thinking {words}{asked}{answer}"
        assert trained(row, tokenizer) == [answer]
    text = tokenizer.apply_chat_template(PAIR[:1], thinking=True)
    assert text == f"<role>SYSTEM</role>detailed thinking on{asked}"
    assert tokenizer.apply_chat_template(PAIR[:1]) == text.replace("thinking on", "thinking off")


@pytest.mark.parametrize("thinking, template, message", [
    ("maybe", None, 'x: thinking is "maybe", and not on, off, true or false'),
    (1, None, "x: thinking is 1, and"), ([], None, r"x: thinking is \[\], and"),
    ("on", CHATML, "x: the chat template has no mode of thinking"),
])  # fmt: skip
def test_modes_of_thinking_that_there_are_not(thinking, template, message):
    plain = [dict(role=m["role"], content=m["content"]) for m in PAIR]
    with pytest.raises(InputError, match=message):
        encode_conversation(dict(messages=plain, thinking=thinking), "x", tokenizer_with(template), "assistant")
