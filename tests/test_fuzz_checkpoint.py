"""Fuzzer of checkpoint folders: the weights that the files hold, or one line that names the fault."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from ling_kernels.errors import InputError
from ling_kernels.model import Ling, load_model, named_views, save_model
from tests.fuzz import changed, damaged, fuzz, hypothesis, result_or_error, st
from tests.training import tiniest

given, example = hypothesis.given, hypothesis.example
TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
         "F8_E4M3": torch.float8_e4m3fn}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of one layer: in bf16, in block-FP8, and in several files."""
    base = tmp_path_factory.mktemp("checkpoints")
    config = replace(tiniest(), vocab_size=24, num_hidden_layers=1, first_k_dense_replace=0, num_experts=2, n_group=1,
                     topk_group=1, num_nextn_predict_layers=0)  # fmt: skip
    model = Ling(config)
    model.init_weights(torch.Generator().manual_seed(0))
    save_model(model, base / "bf16")
    save_model(model, base / "shards", max_shard_bytes=4000)
    shutil.copytree(base / "bf16", base / "fp8")
    tensors = load_file(base / "bf16/model.safetensors")
    for key in [k for k, t in tensors.items() if t.ndim == 2 and "gate.weight" not in k]:
        tensors[key] = tensors[key].to(torch.float8_e4m3fn)
        tensors[key + "_scale_inv"] = torch.rand(1, 1) + 0.5
    save_file(tensors, base / "fp8/model.safetensors")
    return base


def split(data: bytes) -> tuple[dict, bytes]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def tensor(folder, key: str, index: dict | None) -> torch.Tensor:
    """A tensor as the files say, read without the safetensors package."""
    file = "model.safetensors" if index is None else index["weight_map"][key]
    header, data = split((folder / file).read_bytes())
    about = header[key]
    begin, end = about["data_offsets"]
    return torch.frombuffer(bytearray(data[begin:end]), dtype=TYPES[about["dtype"]]).view(about["shape"])


def check(folder) -> None:
    """load_model of a folder in fp32 against its files."""
    model = result_or_error(load_model, folder, torch.float32, kinds=(InputError,))
    if model is None:
        return
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text()) if file.is_file() else None
    for key, view in named_views(model):
        expected = tensor(folder, key, index).float()
        if tensor(folder, key, index).dtype == torch.float8_e4m3fn:
            expected = expected * tensor(folder, key + "_scale_inv", index).float()
        torch.testing.assert_close(view, expected, rtol=0, atol=0, equal_nan=True)


@pytest.fixture
def copy_of(folders, tmp_path_factory):
    """copy_of(kind) -> the folder of a new copy of that checkpoint, in place of the last one."""

    def copy(kind: str):
        folder = tmp_path_factory.getbasetemp() / "fuzzed"
        shutil.rmtree(folder, ignore_errors=True)
        return shutil.copytree(folders / kind, folder)

    return copy


@fuzz(300)
@given(st.data(), st.sampled_from(["bf16", "fp8"]))
def test_headers(copy_of, data, kind):
    file = copy_of(kind) / "model.safetensors"
    header, weights = split(file.read_bytes())
    text = json.dumps(data.draw(changed(header, 2, header_values))).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + weights)
    check(file.parent)


header_values = st.one_of(
    st.sampled_from(
        [*TYPES, "I8", "U8", "BOOL", "F8_E5M2", "I64", "F4", "x", None, True, -1, 2**40, 2**70, 1.5, [], {}]
    ),
    st.lists(st.integers(-1, 70) | st.sampled_from([2**32, 2**63]), max_size=3),
)


@fuzz(200)
@given(st.data(), st.sampled_from(["bf16", "fp8", "shards"]))
def test_damaged_files(copy_of, data, kind):
    folder = copy_of(kind)
    file = data.draw(st.sampled_from(sorted(folder.glob("*.safetensors*"))))
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    file.write_bytes(data.draw(damaged(file.read_bytes(), data.draw(st.sampled_from([8, header, None])))))
    check(folder)


@fuzz(200)
@given(st.data())
def test_indices(copy_of, data):
    folder = copy_of("shards")
    file = folder / "model.safetensors.index.json"
    file.write_text(json.dumps(data.draw(changed(json.loads(file.read_text())))))
    check(folder)


@fuzz(150)
@given(st.data(), st.sampled_from(["bf16", "fp8", "shards"]))
def test_configurations_of_other_weights(copy_of, data, kind):
    """A config.json that does not fit the files."""
    file = copy_of(kind) / "config.json"
    content = json.loads(file.read_text())
    name = data.draw(st.sampled_from([k for k, v in content.items() if type(v) is int]))
    content[name] = data.draw(st.integers(0, 80) | st.sampled_from([1 << 20, 1 << 24, (1 << 31) - 1]))
    file.write_text(json.dumps(content))
    check(file.parent)
