"""Structured output: the texts of a model that knows no grammar fit the grammar, with drafts and in batches."""

import json
import random
import re
from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from ling_kernels.errors import InputError
from ling_kernels.generate import Engine, Grammars, Sampling
from ling_kernels.model import Ling, LingConfig
from ling_kernels.ops.accept_tokens import lookup_drafts
from ling_kernels.tokenizer import load_tokenizer
from tests import engines
from tests.engines import ReplayedGraphs, drain

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")
EOS = 257
# Random bytes would seldom end a string or a list.
SHORT = tuple((token, 5.0) for token in b'"]},')


@cache
def random_model(mtp: int) -> Ling:
    config = replace(LingConfig.tiny(), num_hidden_layers=2, num_nextn_predict_layers=mtp, initializer_range=0.1)
    model = Ling(config)
    model.init_weights(torch.Generator().manual_seed(1))
    return model


def make(draft=0, mtp=0, overlapped=False, **options) -> Engine:
    e = Engine(random_model(mtp), **dict(page_size=16, cache_tokens=40_000, max_running=40, draft=draft) | options)
    if overlapped:
        e.overlap, e.forward.buffers = True, [engines.Memory(e.forward) for _ in range(2)]
        e.forward.graphs = ReplayedGraphs(e.forward.compute, e.forward.padding_lane, len(e.scheduler.lanes), e.device)
    return e


@pytest.fixture(scope="module")
def grammars():
    return Grammars(load_tokenizer(), 320)


def text(request) -> str:
    return load_tokenizer().decode(request.new_tokens)


def look_up(forward, mtp, lanes, x, block_table) -> None:
    """Draft tokens by prompt lookup in the place of an MTP layer's."""
    lanes = lanes[forward.lengths[lanes] > 0]
    lengths, count = forward.lengths[lanes], forward.draft
    drafts = lookup_drafts(forward.token_ids[lanes], lengths, count)
    forward.token_ids[lanes[:, None], lengths[:, None] + torch.arange(count)] = drafts


def schema(draw: random.Random, depth: int = 3):
    """A random schema, which bounds the length of its values."""
    inner = ["object", "array", "anyOf"] if depth else []
    kind = draw.choice([*inner, *inner, "string", "pattern", "integer", "number", "boolean", "null", "enum", "const"])
    if kind == "object":
        names = draw.sample(["a", "b", "name", "été", 'q"uote', "x y"], draw.randint(0, 3))
        fields = {name: schema(draw, depth - 1) for name in names}
        needed = draw.sample(names, draw.randint(0, len(names)))
        return {"type": "object", "properties": fields, "required": needed, "additionalProperties": False}
    if kind == "array":
        least = draw.randint(0, 2)
        return {
            "type": "array",
            "items": schema(draw, depth - 1),
            "minItems": least,
            "maxItems": draw.randint(least, 3),
        }
    if kind == "anyOf":
        return {"anyOf": [schema(draw, depth - 1) for _ in range(draw.randint(1, 3))]}
    least, low = draw.randint(0, 3), draw.randint(-50, 50)
    return {
        "string": {"type": "string", "minLength": least, "maxLength": draw.randint(least, 9)},
        "pattern": {"type": "string", "pattern": draw.choice(["^[a-c]{2,4}$", "^(foo|bar)+x$", "^\\d{3}-\\d{2}$"])},
        "integer": {"type": "integer", "minimum": low, "maximum": low + draw.randint(0, 2000)},
        "number": {"type": "number", "minimum": low, "exclusiveMaximum": low + 3},
        "boolean": {"type": "boolean"},
        "null": {"type": "null"},
        "enum": {"enum": draw.sample([1, "two", None, True, {"k": [3]}, "ü"], draw.randint(1, 4))},
        "const": {"const": draw.choice([0, "c", [1, {"d": False}]])},
    }[kind]


def check_schemas(grammars, e: Engine, schemas: list, seed: int) -> None:
    requests = []
    for i, s in enumerate(schemas):
        sampling = Sampling(1.0, seed=seed + i, logit_bias=SHORT)
        while e.scheduler.full:
            e.step()
        requests.append(e.submit([97, i % 256], sampling, 400, [EOS], grammar=grammars.json(s)))
    drain(e)
    ended = [(s, text(r)) for s, r in zip(schemas, requests, strict=True) if r.finished == "stop"]
    assert all(r.finished in ("stop", "length") for r in requests), [r.error for r in requests if r.error]
    for s, got in ended:
        jsonschema.validate(json.loads(got), s)
    assert len(ended) > 0.9 * len(schemas), "few are longer than their limit"


@pytest.mark.parametrize("draft, overlapped", [(0, False), (2, True)])
def test_random_schemas(grammars, draft, overlapped):
    draw = random.Random(7 + draft)
    check_schemas(grammars, make(draft, overlapped=overlapped), [schema(draw) for _ in range(40)], 0)


def test_500_random_schemas(grammars):
    draw = random.Random(1)
    check_schemas(grammars, make(1), [schema(draw) for _ in range(500)], 1000)


@pytest.mark.parametrize("mtp", [0, 1])
def test_drafts_and_neighbours_change_nothing(grammars, mtp):
    """Also while requests without a grammar run, and come into a lane that had one."""
    many = [grammars.json(), grammars.regex("(ab|cd){4,9}[.]"), None, grammars.choice(["yes", "yes!", "no"]), None]
    options = dict(max_new_tokens=25, stop_token_ids=[EOS])
    samplings = [Sampling(0.8, seed=i, logit_bias=SHORT) for i in range(len(many))]
    alone = [make(mtp=mtp).finish([[98]], sampling=s, grammar=g, **options)[0]
             for s, g in zip(samplings, many, strict=True)]  # fmt: skip
    wants = [(r.new_tokens, r.finished) for r in alone]
    for draft, overlapped in ((0, True), (3, False), (3, True)):
        e = make(draft, mtp, overlapped, max_running=3)
        if mtp:  # a random MTP layer proposes nothing that a grammar allows
            e.forward.mtp_drafts = partial(look_up, e.forward)
        requests = [e.submit([98], s, grammar=g, **options) for s, g in zip(samplings, many, strict=True)]
        drain(e)
        assert [(r.new_tokens, r.finished) for r in requests] == wants
        assert not draft or e.accepted, "the regular expression repeats itself"
    assert re.fullmatch("(ab|cd){4,9}[.]", text(alone[1])) and text(alone[3]) in ("yes", "yes!", "no")
    assert alone[3].finished == "stop"


@pytest.mark.parametrize("lark", [
    'start: (a ",")+ "!"\na[stop="."]: /[a-c.]+/',
    'start: (a ",")+ "!"\na[max_tokens=3]: /[a-c]+/',
    'start: (a ",")+ b "!"\na[stop=/[.]c/, max_tokens=6]: /[a-c.]*/\nb[suffix="-"]: /[a-c]*/',
    'start: (a ",")+ "!"\na[lazy]: /[a-c]+[.]/',
    'start: (a ",")+ "!"\na[capture="x", temperature=0.5]: /[a-c]+/',
    'start: ((A | n) ",")+ "!"\nA: /[a-c]+/ & ~/(.|\\n)*abc/\nn: %json {"enum": [1, 12]}',
])  # fmt: skip
def test_every_attribute_of_a_rule_with_drafts(grammars, lark):
    """llguidance cannot roll back in a grammar with `stop=` or `max_tokens=`."""
    grammar = grammars.lark(lark)
    bias = tuple((token, 4.0) for token in b"abc")  # texts that repeat themselves, so that drafts are accepted
    wants = None
    for draft, overlapped in ((0, False), (1, False), (3, False), (3, True)):
        e = make(draft, overlapped=overlapped)
        requests = [
            e.submit([97, 98, 99, i], Sampling(0.8, seed=i, logit_bias=bias), 40, [EOS], grammar=grammar)
            for i in range(12)
        ]
        drain(e)
        got = [(r.new_tokens, r.finished) for r in requests]
        assert all(r.finished in ("stop", "length") for r in requests), [r.error for r in requests]
        assert not draft or e.accepted
        wants = wants or got
        assert got == wants


def test_a_grammar_ends_only_where_it_may(grammars):
    """An end token that the model wants is held off, and comes where it may; a complete text has none."""
    sampling = Sampling(logit_bias={EOS: 100})
    for draft in (0, 2):
        e = make(draft)
        e.submit([98], sampling, 20, [EOS], grammar=grammars.regex("[ab]{2,7}"))
        e.submit([98], sampling, 20, [EOS], grammar=grammars.regex("abc"))
        optional, complete = e.scheduler.submitted
        drain(e)
        assert len(text(optional)) == 2 and text(complete) == "abc" and complete.finished == "stop"


def test_lark_and_a_grammar_inside_another(grammars):
    lark = grammars.lark('start: "<" NAME ">"\nNAME: /[a-c]{1,4}/')
    outer = grammars.around('start: "[" @inner "]"', {"inner": grammars.regex("x{3}")})
    first, second = make().finish([[5]], sampling=Sampling(), max_new_tokens=20, stop_token_ids=[EOS], grammar=lark) + (
        make().finish([[5]], sampling=Sampling(), max_new_tokens=20, stop_token_ids=[EOS], grammar=outer)
    )
    assert re.fullmatch("<[a-c]{1,4}>", text(first)) and text(second) == "[xxx]"


def test_a_preempted_request_goes_on(grammars):
    e = make(2, cache_tokens=40, page_size=4, max_running=3)
    admitted, lanes = [], e.forward.fill_lane
    e.forward.fill_lane = lambda r: (admitted.append(r), lanes(r))
    g = grammars.regex("(abc){9}")
    requests = e.finish([[1, 2, 3], [4, 5, 6], [7, 8, 9]], max_new_tokens=29, stop_token_ids=[EOS], grammar=g)
    assert len(admitted) > 3 and [text(r) for r in requests] == ["abc" * 9] * 3


def test_a_grammar_that_cannot_go_on_fails_alone(grammars):
    e = make()
    bad = e.submit([98], max_new_tokens=9, stop_token_ids=[EOS], grammar=grammars.regex("abc"))
    good = e.submit([98], max_new_tokens=9, stop_token_ids=[EOS], grammar=grammars.regex("abc"))
    bad.guide.ready.result()
    bad.guide.fault = "too complex"
    drain(e)
    assert bad.finished == "error" and "too complex" in str(bad.error) and text(good) == "abc"
    assert e.record.fault is None


@pytest.mark.parametrize("make_grammar, message", [
    (lambda g: g.json({"type": "objec"}), "objec"), (lambda g: g.json({"not": {}}), "not"),
    (lambda g: g.json([1]), "must be a JSON object"), (lambda g: g.json({"a": float("nan")}), "JSON"),
    (lambda g: g.json({"type": "string", "minLength": 3, "maxLength": 1}), "minLength"),
    (lambda g: g.json(False), "must be a JSON object"), (lambda g: g.regex("[ab"), "unclosed"),
    (lambda g: g.regex(5), "readable"),
    (lambda g: g.lark("start: x"), "unknown name"), (lambda g: g.lark("start: \"a"), "readable"),
    (lambda g: g.choice([]), "must be texts"), (lambda g: g.choice([1]), "must be texts"),
])  # fmt: skip
def test_grammars_that_cannot_be_read(grammars, make_grammar, message):
    with pytest.raises(InputError, match=message) as error:
        make_grammar(grammars)
    assert len(str(error.value).splitlines()) == 1


def test_requests_that_do_not_fit(grammars):
    e, g = make(), grammars.json()
    for options, message in (
        (dict(grammar="{}"), "which Grammars makes"), (dict(grammar=g, stop_token_ids=()), "needs a stop token"),
        (dict(grammar=g, min_new_tokens=3), "min_new_tokens"),
        (dict(grammar=Grammars(load_tokenizer(), 330).json()), "330 tokens"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            e.submit([1], **options)
    assert e.forward.masks is None, "nothing is kept until a request needs it"
