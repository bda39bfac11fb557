"""Models with use_qk_norm=False: attention, cache, checkpoint, config."""

import json
from dataclasses import replace

import pytest
import torch

from ling_kernels.model import Ling, LingConfig, load_model, save_model
from ling_kernels.nn import Attention, BatchLayout
from ling_kernels.ops.attention import attention
from ling_kernels.ops.rope_tables import rope_tables
from tests.training import tiniest


def test_attention_without_norm():
    torch.manual_seed(0)
    layer = Attention(64, 4, 2, 16, qk_norm=False)
    assert [n for n, _ in layer.named_parameters()] == ["query_key_value.weight", "dense.weight"]
    x, cu = torch.randn(9, 64), torch.tensor([0, 4, 9], dtype=torch.int32)
    cos, sin = rope_tables(9, 8, 1e4)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4])
    got = layer(x, BatchLayout(cos, sin, positions, cu))
    q, k, v = layer.query_key_value(x).unflatten(1, (-1, 16)).split([4, 2, 2], 1)
    turn = torch.complex(cos, sin)[positions][:, None]
    rotated = [torch.complex(t[..., :4], t[..., 4:8]) * turn for t in (q, k)]
    q, k = (torch.cat([r.real, r.imag, t[..., 8:]], -1) for r, t in zip(rotated, (q, k), strict=True))
    torch.testing.assert_close(got, layer.dense(attention(q, k, v.contiguous(), cu)[0].flatten(1)))


def test_a_model_without_norm(tmp_path):
    config = replace(tiniest(), use_qk_norm=False)
    model = Ling(config)
    model.init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5)  # so that attention matters
    save_model(model, tmp_path, dtype=torch.float32)
    assert json.loads((tmp_path / "config.json").read_text())["use_qk_norm"] is False
    again = load_model(tmp_path, dtype=torch.float32)
    assert again.config == config and config.num_parameters(mtp=True) == sum(p.numel() for p in model.parameters())
    ids = torch.randint(0, 300, (2, 12))
    want = again(ids).logits
    assert not torch.allclose(want, with_norm(again)(ids).logits, atol=1e-2)
    tokens = torch.stack([*again.stream(ids, 6)], 1)
    longer = again(torch.cat([ids, tokens[:, :-1]], 1)).logits
    torch.testing.assert_close(longer[:, 11:].argmax(-1), tokens)  # a cache holds the same keys


def with_norm(model: Ling) -> Ling:
    new = Ling(replace(model.config, use_qk_norm=True)).eval()
    new.load_state_dict(model.state_dict() | {k: v for k, v in new.state_dict().items() if "query_layernorm" in k
                                              or "key_layernorm" in k})  # fmt: skip
    return new


def test_config_says_whether_there_is_a_norm(tmp_path):
    LingConfig.tiny().to_json(tmp_path / "config.json")
    assert json.loads((tmp_path / "config.json").read_text())["use_qk_norm"] is True
    assert LingConfig.from_json(tmp_path / "config.json").use_qk_norm
    (tmp_path / "config.json").write_text('{"use_qk_norm": "no"}')
    with pytest.raises(Exception, match="use_qk_norm"):
        LingConfig.from_json(tmp_path / "config.json")
