"""Tensor parallelism for decoding: n ranks run the same passes, each with its part of every weight and of the cache.

All ranks have the same rows. A rank holds 1/n of the query and key heads, and their cache, and 1/n of the intermediate
columns of every MLP and expert. What it computes for a row is a summand: after attention and after the MLP or MoE an
all-reduce adds the ranks' summands. Norms, routers and MTP's projection are whole on every rank. The embedding is
divided by columns, so that no rank lacks a token, the head by vocabulary; rows and logits are gathered.

Experts are divided by columns, not as whole experts over ranks: a step then reads 1/n of each chosen expert on every
rank, whatever the router chooses. With whole experts it waits for the rank that has most of the chosen ones: of 8 ranks
that one has 3.0 times the average for one token, 1.6 times for 8 tokens, 1.09 times for 64 (random scores under Ling's
group limit). Rows need no exchange either way, since every rank has them all.

parallel/tensor.py is the form for training: there ranks share the rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InputError
from ..model import Ling, LingConfig
from ..model.transformer import Layer
from ..model.weight_files import WeightReader
from ..nn import MLP, MoE, RMSNorm
from ..nn.fp8_inference import SCALES
from ..nn.linear import FusedLinear, norm_linear
from ..op import E4M3
from ..ops.quantize import BLOCK
from .boxes import Part
from .collectives import gather
from .tensor import blocks_part

PATIENCE = timedelta(minutes=10)  # of a rank for another in a pass; the first of a shape may compile kernels


def part_config(config: LingConfig, n: int) -> LingConfig:
    """The sizes of a rank's part. Raises InputError where n does not divide one of them."""
    sizes: dict[str, Any] = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
        "moe_intermediate_size": config.moe_intermediate_size,
    }
    for name, size in (sizes | {"vocab_size": config.vocab_size, "hidden_size": config.hidden_size}).items():
        if size % n:
            raise InputError(f"{n} ranks cannot share the model equally: its {name} is {size}")
    return replace(config, **{name: size // n for name, size in sizes.items()})


class RankShare:
    """For `load_model`: the part of rank `rank` of n.

    config, afterwards: the whole model's. parts: by official key, which part of a weight this is; others are whole.
    """

    config: LingConfig

    def __init__(self, n: int, rank: int):
        self.n, self.rank = n, rank
        self.parts: dict[str, Part] = {}

    def model(self, config: LingConfig) -> Ling:
        self.config = config
        model = Ling(part_config(config, self.n))
        model.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size // self.n)
        model.lm_head = nn.Linear(config.hidden_size, config.vocab_size // self.n, bias=False)
        return model

    def divide(self, whole: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
        for key, of_rank in here.items():
            if key.endswith(SCALES):
                continue
            tensor = whole[key]
            for dim, size in enumerate(tensor.shape):
                if size != of_rank.shape[dim]:
                    blocks = self.head_blocks(size, here, key) if "query_key_value" in key else (size,)
                    self.parts[key] = blocks_part(dim, blocks, self.n, self.rank)
            bounds = [bound for r in self.parts[key].ranges for bound in r] if key in self.parts else []
            if tensor.dtype == E4M3 and (of_rank.dtype != E4M3 or any(bound % BLOCK for bound in bounds)):
                raise InputError(f"{self.n} ranks cannot share {key}, {' x '.join(map(str, tensor.shape))}, in FP8:"
                                 f" its parts must be whole blocks of {BLOCK}")  # fmt: skip

    def head_blocks(self, size: int, here: Mapping[str, Tensor], key: str) -> tuple[int, ...]:
        """Rows of query, key and value heads, of so many in all."""
        columns = here[key.replace("query_key_value", "dense")].shape[1] * self.n  # of all query heads
        return columns, (size - columns) // 2, (size - columns) // 2

    def read(self, reader: WeightReader, key: str) -> tuple[Tensor, Tensor | None]:
        return reader.read_ranges(key, *self.parts[key]) if key in self.parts else reader.read(key)


def join_(model: Ling, group: dist.ProcessGroup) -> None:
    """Add up the summands of a model that `load_model` has loaded with a RankShare, over the ranks, in place.

    Of a pinned model (nn/batch_invariant.py) in an order that does not depend on the number of rows.
    """
    add = partial(summed_in_order if model.layers[0].attention.pinned else summed, group=group)
    for module in [*model.modules()]:
        if isinstance(module, Layer):
            module.attention.register_forward_hook(lambda _, inputs, y: add(y))
            if isinstance(module.mlp, MLP):
                module.mlp.register_forward_hook(lambda _, inputs, y: add(y))
            else:
                module.mlp.__class__, module.mlp.add = SummedMoE, add
    model.word_embeddings.__class__, model.word_embeddings.group = GatheredEmbedding, group  # type: ignore[assignment]
    model.lm_head = GatheredHead(model.lm_head, group)


class SummedMoE(MoE):
    """This rank's columns of the experts and of the shared expert, summed over the ranks at once."""

    add: Callable[[Tensor], Tensor]

    def forward(
        self, x: Tensor, z_loss: float | None = None, experts: Tensor | None = None,
        record: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        y, z = super().forward(x, z_loss, experts, record)
        return self.add(y), z

    def decode(self, x: Tensor, residual: Tensor | None = None, norm: RMSNorm | None = None) -> Tensor | None:
        if residual is None or norm is None:
            return None
        h, s = norm(x, residual=residual)
        y = super().decode(h)  # s is no summand: every rank has it
        return s + (self(h)[0] if y is None else self.add(y))


class GatheredEmbedding(nn.Embedding):
    """This rank's columns of an embedding [V, H / n], and the rows of all."""

    group: dist.ProcessGroup

    def forward(self, ids: Tensor) -> Tensor:
        """ids [T] -> [T, H]."""
        return self.rows(super().forward(ids))

    def rows(self, columns: Tensor) -> Tensor:
        """This rank's columns of rows [T, H / n] -> [T, H]."""
        return gathered(columns, self.group)


class GatheredHead(FusedLinear):
    """This rank's rows of a head [V / n, H], which may be FP8, and the logits of all."""

    def __init__(self, head: nn.Linear, group: dist.ProcessGroup):
        super().__init__(head.in_features, head.out_features, bias=False, device="meta")
        self.part, self.weight, self.group = head, head.weight, group

    def forward(self, x: Tensor, norm: RMSNorm | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """x [T, H] -> [T, V], the same bits on every rank."""
        return gathered(norm_linear(self.part, x, norm, dtype), self.group)

    def takes_fp8_rows(self) -> bool:
        return False


def gathered(columns: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Every rank's columns [T, N / n] -> [T, N]."""
    return gather(columns, group).view(dist.get_world_size(group), *columns.shape).transpose(0, 1).flatten(1)


def summed(y: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all ranks' y [T, H], in its dtype: the same bits on every rank, so that routers choose alike."""
    y = y.contiguous()
    dist.all_reduce(y, group=group)
    return y


def summed_in_order(y: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The same, added in fp32 in the order of the ranks, and rounded once. All summands travel to every rank.

    An all-reduce over more than two may take another order for another number of rows, or for other elements.
    """
    first, *others = gather(y, group).view(dist.get_world_size(group), *y.shape)
    total = first.to(torch.promote_types(y.dtype, torch.float32))
    for other in others:
        total = total + other
    return total.to(y.dtype)


def refuse_group() -> None:
    """Raise InputError in a process that has a group, which `form_group` would need to be another."""
    if dist.is_initialized():
        raise InputError(
            "this process has a group of torch.distributed, and an engine over several processes forms its own"
        )


def form_group(n: int, rank: int, file: Path, device: torch.device) -> dist.ProcessGroup:
    """The group of n processes of this machine that meet in a file."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = dist.FileStore(str(file), n)
    dist.init_process_group(backend, store=store, rank=rank, world_size=n, timeout=PATIENCE)
    dist.all_reduce(torch.zeros(1, device=device))  # NCCL takes its memory now, before the cache takes the rest
    return dist.group.WORLD  # type: ignore[return-value]


def abort_group() -> None:
    """End what waits for a lost rank on a GPU, from any thread. On a CPU gloo sees the loss itself."""
    if dist.is_initialized():
        dist.group.WORLD.abort()  # type: ignore[union-attr]


def leave_group() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
