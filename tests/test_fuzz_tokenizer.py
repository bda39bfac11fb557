"""Fuzzer of tokenizer.json, tokenizer_config.json and chat templates: text and ids that agree, or one clear line."""

import json

import pytest

from ling_kernels.errors import InputError
from ling_kernels.tokenizer import (
    SPECIAL_TOKENS,
    TextStream,
    Tokenizer,
    byte_settings,
    byte_tokenizer_json,
    load_tokenizer,
)
from tests.fuzz import changed, damaged, fuzz, hypothesis, result_or_error, st, values
from tests.test_chat import TEMPLATES
from tests.test_tokenizer import sentencepiece, train_bpe

tokenizers = pytest.importorskip("tokenizers")
given, example = hypothesis.given, hypothesis.example
PIECES = [*SPECIAL_TOKENS, "<", "|", "think>", "<ro", "le>", "</s>", "<s>", " ", "▁the", "é", "\U000f0000"]
pieces = st.sampled_from(PIECES) | st.text(max_size=5)
texts = st.lists(pieces, max_size=8).map("".join)
KINDS = ["bytes", "bpe", "sentencepiece", "wordpiece", "unigram"]


def wordpiece():
    words = ["[UNK]", "</s>", "the", "cat", "##s", "##at", "c", "a", "##a", "##t"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.BertNormalizer()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.add_special_tokens(["</s>"])
    return backend


def unigram():
    backend = tokenizers.Tokenizer(
        tokenizers.models.Unigram([("<unk>", 0.0), ("</s>", -1.0), ("▁", -2.0), ("the", -3.0)], 0)
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Metaspace()
    backend.add_tokens(["<think>"])
    return backend


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """base(kind) -> the content of a tokenizer.json of that kind."""
    bpe = train_bpe(tmp_path_factory.mktemp("bpe")) / "tokenizer.json"
    backends = dict(
        sentencepiece=sentencepiece("▁the", "▁cat", "s", "▁").backend, wordpiece=wordpiece(), unigram=unigram()
    )
    contents = {kind: json.loads(backend.to_str()) for kind, backend in backends.items()}
    contents |= dict(bytes=byte_tokenizer_json(), bpe=json.loads(bpe.read_text()))
    return lambda kind: contents[kind]


def load(folder, content: bytes, settings) -> Tokenizer | None:
    (folder / "tokenizer.json").write_bytes(content)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return result_or_error(load_tokenizer, folder, kinds=(InputError,))


def check(tokenizer: Tokenizer, text: str, folder) -> None:
    """Encoding, decoding, saving and chats of a tokenizer work, or are refused in one line."""
    encoded = {special: result_or_error(tokenizer.encode, text, special) for special in (False, True)}
    for ids in encoded.values():
        if ids is not None:
            assert all(type(i) is int and 0 <= i < tokenizer.vocab_size for i in ids)
            stream = TextStream(tokenizer)
            assert isinstance("".join(map(stream.add, ids)) + stream.end(), str)
    if encoded[False] is not None:
        assert [ids.tolist() for ids in tokenizer.encode_batch([text, "", text])] == [
            encoded[False],
            [],
            encoded[False],
        ]
        tokenizer.save(folder / "saved")
        saved = load_tokenizer(folder / "saved")
        assert saved.encode(text) == encoded[False] and saved.settings == tokenizer.settings
    chat = result_or_error(tokenizer.apply_chat_template, [{"role": "user", "content": text}])
    if chat is not None and (ids := result_or_error(tokenizer.encode, chat, True)) is not None:
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


@fuzz(300)
@given(st.data(), st.sampled_from(KINDS), texts)
def test_changed_files(base, tmp_path_factory, data, kind, text):
    folder, content = tmp_path_factory.getbasetemp(), data.draw(changed(base(kind)))
    settings = byte_settings() if kind == "bytes" else {"eos_token": "</s>", "chat_template": TEMPLATES["joins"]}
    tokenizer = load(folder, json.dumps(content).encode(), data.draw(st.just(settings) | changed(settings)))
    if tokenizer is not None:
        check(tokenizer, text, folder)


@fuzz(100)
@given(st.data(), st.sampled_from(KINDS), texts)
def test_damaged_files(base, tmp_path_factory, data, kind, text):
    folder = tmp_path_factory.getbasetemp()
    content = data.draw(damaged(json.dumps(base(kind)).encode()))
    tokenizer = load(folder, content, {"eos_token": "<|endoftext|>" if kind == "bytes" else "</s>"})
    if tokenizer is not None:
        check(tokenizer, text, folder)


@fuzz(200)
@given(st.data(), st.sampled_from(["bytes", "bpe"]), texts)
def test_texts(base, tmp_path_factory, data, kind, text):
    """Ids spell their text, also piece by piece after a prompt, and plain text holds no special token."""
    folder = tmp_path_factory.getbasetemp()
    eos = "<|endoftext|>" if kind == "bytes" else "</s>"
    tokenizer = load(folder, json.dumps(base(kind)).encode(), {"eos_token": eos})
    if any(0xD800 <= ord(letter) < 0xE000 for letter in text):
        assert result_or_error(tokenizer.encode, text) is None
        return
    for special in (False, True):
        ids = tokenizer.encode(text, special)
        assert tokenizer.decode(ids) == text
        assert special or not {*ids} & {*tokenizer.control_tokens.values()}
        cut = data.draw(st.integers(0, len(ids)))
        prompt = tokenizer.decode(ids[:cut]).rstrip("\ufffd")  # without the start of a character
        stream = TextStream(tokenizer, ids[:cut])
        got = "".join(map(stream.add, ids[cut:])) + stream.end()
        assert got == text[len(prompt) :] or "\ufffd" in text or (cut and not prompt)
    broken = data.draw(st.binary(max_size=40))
    stream = TextStream(tokenizer)
    if kind == "bytes":
        assert "".join(map(stream.add, broken)) + stream.end() == broken.decode("utf-8", "replace")


roles = st.sampled_from(["user", "system", "tool"])
conversations = st.lists(st.tuples(roles, texts), min_size=1, max_size=4)


def control_tokens(tokenizer: Tokenizer, messages: list[dict]) -> list[int]:
    """Those of a rendered chat, whose ids spell it."""
    chat = tokenizer.apply_chat_template(messages)
    ids = tokenizer.encode(chat, special=True)
    assert tokenizer.decode(ids) == chat
    return [i for i in ids if i in tokenizer.control_tokens.values()]


@fuzz(200)
@given(conversations, st.sampled_from(sorted({*TEMPLATES} - {"looks", "says the time", "formats"})))
def test_messages(messages, template):
    """A chat is what Jinja renders, and its control tokens do not depend on what the messages say."""
    jinja2 = pytest.importorskip("jinja2")
    tokenizer = Tokenizer(None, byte_settings() | {"chat_template": TEMPLATES[template]})
    said, plain = (
        [{"role": r, "content": c} for r, c in turns] for turns in (messages, [(r, "hi") for r, _ in messages])
    )
    if any(0xD800 <= ord(letter) < 0xE000 for _, content in messages for letter in content):
        assert result_or_error(lambda: tokenizer.encode(tokenizer.apply_chat_template(said), True)) is None
        return
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value, ensure_ascii=False: json.dumps(value, ensure_ascii=ensure_ascii)
    expected = environment.from_string(TEMPLATES[template]).render(messages=said, add_generation_prompt=True)
    assert tokenizer.apply_chat_template(said) == expected
    assert control_tokens(tokenizer, said) == control_tokens(tokenizer, plain)


CODE = [
    "{{ ", " }}", "{% ", " %}", "{# ", " #}", "for m in messages", "endfor", "if m.role == 'user'", "else", "endif",
    "set x = ", "m.content", "messages", "m['role']", " | tojson", " | trim", " | length", " + ", " ~ ", "'a'", "[0]",
    "(1)", "loop.index0", ".split('</think>')", "raise_exception('no\nmore')", "none.x", "range(3)", "eos_token",
    "macro f(c)", "endmacro", "f(x)", "generation", "endgeneration", "break", "strftime_now('%Y')", "<role>", "\n", "-",
]  # fmt: skip


@fuzz(300)
@given(st.lists(st.sampled_from(CODE), max_size=12).map("".join), values)
def test_templates_and_odd_messages(code, anything):
    """Any template with ordinary messages, and an ordinary template with any messages."""
    ordinary = [{"role": "user", "content": "a<role>b"}]
    chats = (code, ordinary), (TEMPLATES["Ling's"], anything), (TEMPLATES["writes JSON"], [anything])
    for template, messages in chats:
        tokenizer = Tokenizer(None, byte_settings() | {"chat_template": template})
        chat = result_or_error(tokenizer.apply_chat_template, messages)
        if chat is not None and (ids := result_or_error(tokenizer.encode, chat, True)) is not None:
            assert tokenizer.decode(ids) == chat
