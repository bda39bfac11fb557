"""Fuzzer of config.json: the right configuration, or one line that refuses the file."""

import dataclasses
import json
from pathlib import Path

import torch

from ling_kernels.errors import InputError
from ling_kernels.model import Ling, LingConfig
from ling_kernels.model.config import INTEGER_FIELDS, NUMBER_FIELDS
from ling_kernels.model.config_json import ABSENT, ASSUMED
from tests.fuzz import changed, damaged, fuzz, hypothesis, result_or_error, st, values

given, example = hypothesis.given, hypothesis.example
FILE = Path(__file__).parent / "data/base/config.json"
BASE = json.loads(FILE.read_text())
DEFAULTS = {f.name: f.default for f in dataclasses.fields(LingConfig) if f.name != "other"} | ABSENT
NAMES = sorted({*BASE, *DEFAULTS, *ASSUMED, "rope_parameters", "rotary_dim", "sliding_window", "layer_types",
                "quantization_config", "original_max_position_embeddings"})  # fmt: skip


def read(folder: Path, content) -> LingConfig | None:
    file = folder / "config.json"
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return result_or_error(LingConfig.from_json, file, kinds=(InputError,))


@fuzz(400)
@given(changed(BASE), st.dictionaries(st.sampled_from(NAMES), values, max_size=2))
def test_fields(tmp_path_factory, content, more):
    """What is accepted has the values of the file, is written and read again, and makes a model."""
    folder = tmp_path_factory.getbasetemp()
    content = content | more if isinstance(content, dict) else content
    if (config := read(folder, content)) is None:
        return
    for name in [*INTEGER_FIELDS, *NUMBER_FIELDS, "use_qk_norm", "pad_token_id", "eos_token_id"]:
        if name not in ("rope_theta", "partial_rotary_factor"):
            assert getattr(config, name) == content.get(name, DEFAULTS[name]), name
    assert 0 < config.rotary_dim <= config.head_dim and config.rotary_dim % 2 == 0
    assert config.num_parameters() >= config.num_active_parameters() > 0 and config.flops_per_token(1) > 0
    config.to_json(folder / "written.json")
    assert LingConfig.from_json(folder / "written.json") == config
    if config.num_hidden_layers + config.num_nextn_predict_layers < 8:
        with torch.device("meta"):
            result_or_error(Ling, config, kinds=(InputError,))


@fuzz(150)
@given(damaged(FILE.read_bytes()))
def test_bytes(tmp_path_factory, data):
    if read(tmp_path_factory.getbasetemp(), data) is not None:
        assert isinstance(json.loads(data), dict)


OBJECTS = "rope_scaling", "rope_parameters"
some_objects = st.lists(st.sampled_from(OBJECTS), max_size=2, unique=True)


@st.composite
def rope(draw):
    """(fields of a config.json, what they mean for RoPE, where theta stands)."""
    head, theta = draw(st.sampled_from([16, 32, 98, 128])), draw(st.sampled_from([1.5, 10000, 6e5]) | st.floats(2, 1e9))
    size, length = 2 * draw(st.integers(1, head // 2)), draw(st.integers(1, 4096))
    content = BASE | dict(head_dim=head, max_position_embeddings=draw(st.sampled_from([64, length])))
    objects: dict[str, dict] = {name: {} for name in OBJECTS}
    for name in ("rope_theta", "partial_rotary_factor", "rope_scaling"):
        del content[name]
    if draw(st.booleans()):
        content["rotary_dim"] = size
    for name, value in (("rope_theta", theta), ("partial_rotary_factor", size / head)):
        least = 0 if name == "partial_rotary_factor" and "rotary_dim" in content else 1
        places = [content, *objects.values()]
        for place in draw(st.lists(st.integers(0, 2), min_size=least, max_size=3, unique=True)):
            places[place][name] = value
    meaning = None
    if draw(st.booleans()):
        meaning = dict(type="yarn", factor=draw(st.sampled_from([1, 2.0, 40])), original_max_position_embeddings=length)
        if draw(st.booleans()):
            meaning["beta_fast"] = draw(st.sampled_from([16, 32.0]))
        for name in draw(st.lists(st.sampled_from(OBJECTS), min_size=1, max_size=2, unique=True)):
            objects[name] |= draw(yarn(meaning, content))
    else:
        for name in draw(some_objects):
            objects[name] |= draw(st.sampled_from([{"type": "default"}, {"rope_type": "default", "type": None}]))
    content |= {name: fields for name, fields in objects.items() if fields or draw(st.booleans())}
    return content, (theta, size, meaning)


@st.composite
def yarn(draw, meaning, content):
    """A spelling of the scaling `meaning`; its length may stand in `content`."""
    fields, length = dict(meaning), meaning["original_max_position_embeddings"]
    kind = fields.pop("type")
    fields |= draw(st.sampled_from([{"type": kind}, {"rope_type": kind}, {"type": kind, "rope_type": kind},
                                    {"rope_type": kind, "type": None, "truncate": True}]))  # fmt: skip
    where = draw(st.sampled_from(["inside", "outside", "default"]))
    if where == "outside":
        content["original_max_position_embeddings"] = length
    if where == "outside" or (where == "default" and content["max_position_embeddings"] == length):
        del fields["original_max_position_embeddings"]
    return fields


@fuzz(300)
@given(rope())
def test_spellings_of_rope(tmp_path_factory, drawn):
    """Every spelling gives the same configuration."""
    content, meaning = drawn
    config = read(tmp_path_factory.getbasetemp(), content)
    assert config is not None and (config.rope_theta, config.rotary_dim, config.rope_scaling) == meaning


@fuzz(100)
@given(rope(), st.sampled_from(["rope_theta", "partial_rotary_factor", "factor"]))
def test_contradictions_are_refused(tmp_path_factory, drawn, name):
    content, (theta, size, meaning) = drawn
    places = [fields for fields in (content, *(content.get(o) or {} for o in OBJECTS)) if name in fields]
    if len(places) > 1:
        places[-1][name] = 1.25 if places[-1][name] != 1.25 else 0.75
        assert read(tmp_path_factory.getbasetemp(), content) is None
