"""The configuration of a Ling-2.0 model, with the field names of the official config.json."""

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..errors import InputError
from ..files import read_json
from .config_json import BLOCK_FP8, canonical_scaling, check, config_fields, is_integer, is_number

OFFICIAL_FIELDS = dict(architectures=["BailingMoeV2ForCausalLM"], model_type="bailing_moe", hidden_act="silu",
                       norm_topk_prob=True, score_function="sigmoid", router_dtype="fp32", use_rmsnorm=True,
                       moe_router_enable_expert_bias=True, use_bias=False, use_qkv_bias=False,
                       tie_word_embeddings=False)  # fmt: skip
MAX_INTEGER = (1 << 31) - 1
MAX_LAYERS = 1 << 10  # each is a module in Python: millions would never be built
MAX_POSITIONS = 1 << 24  # up to here fp32 holds every position


@dataclass(frozen=True)
class LingConfig:
    """A frozen, checked configuration. Presets: arXiv 2510.22115, table 1, and the published config.json files."""

    vocab_size: int = 157184
    hidden_size: int = 2048
    intermediate_size: int = 5120  # of the dense layers
    num_hidden_layers: int = 20
    first_k_dense_replace: int = 1  # layers before the first MoE layer
    num_attention_heads: int = 16
    num_key_value_heads: int = 4
    head_dim: int = 128
    use_qk_norm: bool = True  # False has no kernel: plain torch applies RoPE
    num_experts: int = 256
    num_experts_per_tok: int = 8
    n_group: int = 8
    topk_group: int = 4
    num_shared_experts: int = 1
    moe_intermediate_size: int = 512
    routed_scaling_factor: float = 2.5
    num_nextn_predict_layers: int = 0  # MTP layers: 1 in base checkpoints, 0 in chat ones
    mtp_loss_scaling_factor: float = 0.1
    rms_norm_eps: float = 1e-6
    rope_theta: float = 600000.0
    partial_rotary_factor: float = 0.5
    # None, or {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}; other spellings become these.
    rope_scaling: dict | None = None
    max_position_embeddings: int = 32768
    initializer_range: float = 0.02
    pad_token_id: int | None = 156892
    eos_token_id: int | list[int] | None = 156892  # chat checkpoints list several
    other: dict = field(default_factory=dict, compare=False, repr=False)  # keys of config.json without a field here

    def __post_init__(self):
        for name in INTEGER_FIELDS:
            value = getattr(self, name)
            least = 0 if name in ("first_k_dense_replace", "num_shared_experts", "num_nextn_predict_layers") else 1
            check(is_integer(value) and least <= value <= MAX_INTEGER,
                  f"{name} is {value!r}, not an integer >= {least}")  # fmt: skip
        for name, least in NUMBER_FIELDS.items():
            value = getattr(self, name)
            allowed = is_number(value) and (value > least if name in POSITIVE_FIELDS else value >= least)
            check(allowed, f"{name} is {value!r}, not a number {'>' if name in POSITIVE_FIELDS else '>='} {least}")
        check(isinstance(self.use_qk_norm, bool), f"use_qk_norm is {self.use_qk_norm!r}, neither true nor false")
        _divides("num_attention_heads", self.num_attention_heads, "num_key_value_heads", self.num_key_value_heads)
        _divides("num_experts", self.num_experts, "n_group", self.n_group)
        check(self.topk_group <= self.n_group, f"topk_group {self.topk_group} is more than n_group {self.n_group}")
        eligible = self.topk_group * (self.num_experts // self.n_group)
        check(self.num_experts_per_tok <= eligible,
               f"num_experts_per_tok {self.num_experts_per_tok} is more than the {eligible} experts of topk_group "
               f"{self.topk_group} groups")  # fmt: skip
        check(self.first_k_dense_replace <= self.num_hidden_layers,
               f"first_k_dense_replace {self.first_k_dense_replace} is more than num_hidden_layers "
               f"{self.num_hidden_layers}")  # fmt: skip
        check(self.partial_rotary_factor <= 1, f"partial_rotary_factor is {self.partial_rotary_factor}, more than 1")
        check(self.rotary_dim % 2 == 0 and self.rotary_dim > 0,
               f"partial_rotary_factor {self.partial_rotary_factor} of head_dim {self.head_dim} is {self.rotary_dim}, "
               "not an even number of dimensions to rotate")  # fmt: skip
        scaling = canonical_scaling(self.rope_scaling, self.max_position_embeddings)
        object.__setattr__(self, "rope_scaling", scaling)
        check(self.max_positions <= MAX_POSITIONS,
              f"max_position_embeddings and rope_scaling give {self.max_positions} positions, at most"
              f" {MAX_POSITIONS} are supported")  # fmt: skip
        layers = self.num_hidden_layers + self.num_nextn_predict_layers
        check(layers <= MAX_LAYERS, f"num_hidden_layers and num_nextn_predict_layers give {layers} layers, at most"
              f" {MAX_LAYERS} are supported")  # fmt: skip
        pad, eos = self.pad_token_id, self.eos_token_id
        check(pad is None or is_integer(pad), f"pad_token_id is {pad!r}, neither an integer nor null")
        several = isinstance(eos, list) and len(eos) > 0
        check(eos is None or several or is_integer(eos), f"eos_token_id is {eos!r}, neither an integer nor a list")
        check(all(is_integer(i) and i >= 0 for i in self.eos_token_ids), f"eos_token_id is {eos!r}: an id is below 0")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens of eos_token_id, which end a text."""
        return token_ids(self.eos_token_id)

    @property
    def rotary_dim(self) -> int:
        return int(round(self.head_dim * self.partial_rotary_factor, 6))  # a factor may be rotary_dim / head_dim

    @property
    def max_positions(self) -> int:
        """The longest sequence: max_position_embeddings, or YaRN's extended length."""
        scaling = self.rope_scaling or {}
        original = scaling.get("original_max_position_embeddings", self.max_position_embeddings)
        return max(self.max_position_embeddings, int(original * scaling.get("factor", 1)))

    def num_parameters(self, mtp: bool = False) -> int:
        """All weights, with those of MTP layers if mtp."""
        return self._parameters(self.num_experts, mtp) + 2 * self.vocab_size * self.hidden_size

    def num_active_parameters(self, mtp: bool = False) -> int:
        """Weights used by one token, embedding and head included, with those of MTP layers if mtp."""
        return self._parameters(self.num_experts_per_tok, mtp) + 2 * self.vocab_size * self.hidden_size

    def flops_per_token(self, seq_len: int) -> float:
        """FLOPs of forward and backward: 6 per active weight (head once more per MTP layer), and causal attention."""
        heads = self.num_attention_heads * self.head_dim
        layers, mtp = self.num_hidden_layers, self.num_nextn_predict_layers
        weights = self._parameters(self.num_experts_per_tok, True) + (1 + mtp) * self.vocab_size * self.hidden_size
        return 6 * weights + 3 * (layers + mtp) * 2 * heads * seq_len  # 4 heads seq_len / 2: QK^T and PV, causal

    def _parameters(self, experts: int, mtp: bool) -> int:
        """Weights without embedding and head, counting `experts` routed experts per MoE layer."""
        H, F = self.hidden_size, self.moe_intermediate_size
        kv = 2 * self.num_key_value_heads
        norms = 2 * H + 2 * self.head_dim * self.use_qk_norm
        attention = H * (self.num_attention_heads * 2 + kv) * self.head_dim + norms
        moe = attention + 3 * H * F * (experts + self.num_shared_experts) + self.num_experts * H
        dense = attention + 3 * H * self.intermediate_size
        k = self.first_k_dense_replace
        extra = self.num_nextn_predict_layers * (moe + 2 * H * H + 3 * H) if mtp else 0
        return k * dense + (self.num_hidden_layers - k) * moe + H + extra

    @classmethod
    def tiny(cls) -> "LingConfig":
        """A model that trains on two CPU cores in minutes, with the byte-level tokenizer's vocabulary."""
        return cls(
            vocab_size=320, hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, num_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
            moe_intermediate_size=64, num_nextn_predict_layers=1, rope_theta=10000.0, max_position_embeddings=1024,
            pad_token_id=257, eos_token_id=257,
        )  # fmt: skip

    @classmethod
    def mini(cls) -> "LingConfig":
        """Ling-mini-2.0: 16 B parameters, 1.4 B active."""
        return cls()

    @classmethod
    def flash(cls) -> "LingConfig":
        """Ling-flash-2.0: 103 B parameters, 6.1 B active."""
        return cls(hidden_size=4096, intermediate_size=9216, num_hidden_layers=32, num_attention_heads=32,
                   moe_intermediate_size=1024)  # fmt: skip

    @classmethod
    def one_t(cls) -> "LingConfig":
        """Ling-1T: 1 T parameters, 51 B active."""
        return cls(hidden_size=8192, intermediate_size=18432, num_hidden_layers=80, first_k_dense_replace=4,
                   num_attention_heads=64, num_key_value_heads=8, moe_intermediate_size=2048)  # fmt: skip

    @classmethod
    def preset(cls, name: str) -> "LingConfig":
        """The preset of that name: tiny, mini, flash or 1t. Raises InputError for others."""
        if name not in PRESETS:
            raise InputError(f"unknown model {name!r}: the presets are {', '.join(PRESETS)}")
        return PRESETS[name]()

    @classmethod
    def from_json(cls, path: str | Path) -> "LingConfig":
        """Read an official config.json in any published spelling; missing fields take the defaults above, but
        routed_scaling_factor and partial_rotary_factor those of the published classes, which are 1.

        Raises InputError for bad values and for fields that ask for another formula than the code computes.
        """
        content = read_json(Path(path))
        try:
            return cls(
                **config_fields(content, {f.name: f.default for f in dataclasses.fields(cls) if f.name != "other"})
            )
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def to_json(self, path: str | Path, fp8: bool = False, dtype: torch.dtype = torch.bfloat16) -> None:
        """Write an official config.json. dtype: of the checkpoint's weights; fp8 marks them as block-FP8."""
        fields = dataclasses.asdict(self)
        other = fields.pop("other")
        types = {k: str(dtype).removeprefix("torch.") for k in ("torch_dtype", "dtype") if k in {"torch_dtype", *other}}
        # Types come last also where they were read from a file: a resumed run writes the same bytes.
        other = {k: v for k, v in other.items() if k not in {"quantization_config", *types}}
        quantized = {"quantization_config": BLOCK_FP8} if fp8 else {}
        content = OFFICIAL_FIELDS | other | fields | types | quantized
        Path(path).write_text(json.dumps(content, indent=2) + "\n")


def token_ids(tokens: int | Iterable[int] | None) -> tuple[int, ...]:
    """An eos_token_id, which is one token, several or None, as a tuple."""
    return () if tokens is None else (tokens,) if isinstance(tokens, int) else tuple(tokens)


POSITIVE_FIELDS = ("rope_theta", "partial_rotary_factor", "rms_norm_eps", "routed_scaling_factor")
NUMBER_FIELDS = {f.name: 1 if f.name == "rope_theta" else 0 for f in dataclasses.fields(LingConfig) if f.type is float}
INTEGER_FIELDS = [f.name for f in dataclasses.fields(LingConfig) if f.type is int and not f.name.endswith("_id")]
PRESETS = {"tiny": LingConfig.tiny, "mini": LingConfig.mini, "flash": LingConfig.flash, "1t": LingConfig.one_t}


def _divides(name: str, value: int, by_name: str, by: int) -> None:
    check(value % by == 0, f"{name} {value} is not a multiple of {by_name} {by}")
