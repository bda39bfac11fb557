"""Tensor parallelism: n ranks share the rows of every batch, and of each layer the heads and the columns of the MLP.

A rank keeps T / n of the T packed rows; residuals, norms, router, experts, head and losses see those alone. Before
attention and before an MLP, which may be a shared expert, the rows of all ranks are gathered. Each rank computes its
heads, or its part of the intermediate columns, for all of them, and the partial results of a row are summed in fp32 on
the rank that keeps it. This is Megatron's tensor parallelism with sequence parallelism (arXiv 2205.05198). The other
form, equal rows on every rank and all-reduces, moves the same bytes, and has two kinds of whole parameters: a norm's
gradient is complete on each rank, a QK norm's or a router's is not, or is counted n times. Here ranks have different
tokens, as with data or context parallelism, so that one rule holds: gradients of whole parameters add up
(`Shares.sum_gradients_`); and experts and vocabulary can be divided over the same ranks as they are.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..errors import InputError
from ..model.packing import Batch
from ..nn import MLP, Attention, BatchLayout, RMSNorm, lora
from ..nn.fp8 import KINDS, Fp8MLP
from ..nn.lora import AdaptedFeedForward
from ..op import autocast
from ..ops.attention_decode import KVCache
from .boxes import Part
from .collectives import Gather, ScatterSum, gather
from .context import ContextAttention


def blocks_part(dim: int, blocks: tuple[int, ...], n: int, rank: int) -> Part:
    """Rank `rank`'s part of a dimension of blocks with these sizes, of which n ranks divide each equally."""
    ranges, begin = [], 0
    for size in blocks:
        ranges.append((begin + rank * size // n, begin + (rank + 1) * size // n))
        begin += size
    return Part(dim, tuple(ranges))


def tensor_parallel_(model: nn.Module, group: dist.ProcessGroup) -> dict[str, Part]:
    """Divide the rows of every batch of a Ling model, its attention heads and MLPs over the ranks of `group`, in place.

    All ranks pass the same batches to `model`, and have the same weights before. Losses are then a rank's share: the
    sum over the group is the loss of one process. Gradients of whole parameters add up to its gradients
    (`Shares.sum_gradients_`), and so do the routers' counts. Logits and hidden states are zeros in other ranks' rows.

    Returns by name this rank's part of each weight that is divided: query_key_value by heads, dense by its columns,
    gate_up by the rows of gate and of up, down by its columns. All others stay whole; routed experts and the vocabulary
    have functions of their own. Call it after `context_parallel_`, and before `to_fp8` and the optimizer. Raises
    InputError where n does not divide the heads, or a size of an MLP; the forward raises it for a number of rows that n
    does not divide, and for decoding with a cache.
    """
    share = ShareRows(group, model.choose_rows)
    modules = [(name, m, parts_of(name, m, share)) for name, m in model.named_modules() if type(m) in CLASSES]
    for _, module, parts in modules:
        for weight, part in parts.items():
            keep_part_(getattr(module, weight), part)
        if isinstance(module, Attention):
            module.num_kv_heads //= share.n
        module.__class__ = CLASSES[type(module)]  # of the same parameters, which keep their names
        module.share = share
    model.choose_rows = share  # type: ignore[assignment]
    return {f"{name}.{weight}.weight": part for name, _, parts in modules for weight, part in parts.items()}


def parts_of(name: str, module: nn.Module, share: "ShareRows") -> dict[str, Part]:
    """Of the linear layers of an attention or an MLP. Raises InputError where n does not divide it."""
    n, rank = share.n, share.rank
    if isinstance(module, Attention):
        columns, keys = module.dense.in_features, module.num_kv_heads * module.head_dim
        counts = {"query heads": columns // module.head_dim, "key heads": module.num_kv_heads}
        blocks, names = (columns, keys, keys), ("query_key_value", "dense")
    else:
        columns = module.down.in_features  # type: ignore[union-attr]
        counts = {"intermediate columns": columns}
        blocks, names = (columns, columns), ("gate_up", "down")
    for what, number in counts.items():
        if number % n:
            raise InputError(f"{name} has {number} {what}, which {n} ranks cannot share equally")
    return dict(zip(names, (blocks_part(0, blocks, n, rank), blocks_part(1, (columns,), n, rank)), strict=True))


def keep_part_(linear: nn.Linear, part: Part) -> None:
    if type(linear) is not nn.Linear or linear.bias is not None:
        raise InputError(f"tensor parallelism divides plain linear layers, before to_fp8; not {linear}")
    w = linear.weight
    linear.weight = nn.Parameter(part.take(w.detach()), requires_grad=w.requires_grad)
    linear.out_features, linear.in_features = linear.weight.shape


class ShareRows:
    """The rows of a batch that this rank keeps, and their way to the other ranks and back."""

    def __init__(self, group: dist.ProcessGroup, before):
        self.group, self.before = group, before  # before: chooses the rows that these ranks share, or None
        self.n, self.rank = dist.get_world_size(group), dist.get_rank(group)
        self.gathered = WeakIdKeyDictionary()

    def __call__(self, batch: Batch) -> Batch:
        batch = batch if self.before is None else self.before(batch)
        rows = batch.here(torch.arange(len(batch.ids), device=batch.ids.device))
        if len(rows) % self.n:
            raise InputError(f"{self.n} ranks cannot share {len(rows)} rows of a batch equally")
        return batch._replace(rows=rows.chunk(self.n)[self.rank])

    def gather(self, x: Tensor) -> Tensor:
        """x [T / n, H] -> all ranks' [T, H], in autocast's dtype, as the linear layer after it takes them."""
        return Gather.apply(*autocast(x), self.group)

    def sum(self, x: Tensor) -> Tensor:
        """Summands x [T, H] of every rank -> [T / n, H]."""
        return ScatterSum.apply(x, self.group)

    def layout(self, here: BatchLayout) -> BatchLayout:
        """With the positions of all ranks' rows, which are gathered once for all layers of a forward and backward."""
        if here.positions not in self.gathered:
            self.gathered[here.positions] = gather(here.positions, self.group)
        return here._replace(positions=self.gathered[here.positions])


class TensorAttention(Attention):
    """This rank's heads, of all ranks' rows."""

    share: ShareRows

    def forward(
        self, x: Tensor, layout: BatchLayout, cache: KVCache | None = None, norm: RMSNorm | None = None
    ) -> Tensor:
        if cache is not None:
            raise InputError("a model whose rows are divided over ranks (tensor parallelism) does not decode")
        rows = self.share.gather(x if norm is None else norm(x))
        return self.share.sum(super().forward(rows, self.share.layout(layout)))


class TensorContextAttention(TensorAttention, ContextAttention):
    """This rank's heads, of the rows that its tensor-parallel ranks share; keys are those of the whole context."""


class TensorMLP(MLP):
    """This rank's columns of the intermediate, of all ranks' rows."""

    share: ShareRows

    def forward(self, x: Tensor) -> Tensor:
        return self.share.sum(super().forward(self.share.gather(x)))


class TensorFp8MLP(TensorMLP, Fp8MLP):
    @classmethod
    def of(cls, mlp: MLP, **options) -> "TensorFp8MLP":
        new = super().of(mlp, **options)
        new.share = mlp.share
        return new

    def plain(self) -> MLP:
        new = super().plain()
        new.__class__, new.share = TensorMLP, self.share
        return new


class TensorLoraMLP(TensorMLP, AdaptedFeedForward, MLP):
    """With adapters of these columns."""


class TensorLoraFp8MLP(TensorFp8MLP, AdaptedFeedForward, Fp8MLP):
    pass


CLASSES = {Attention: TensorAttention, ContextAttention: TensorContextAttention, MLP: TensorMLP}
KINDS[TensorMLP] = TensorFp8MLP  # what to_fp8 makes of it
lora.KINDS |= {TensorMLP: TensorLoraMLP, TensorFp8MLP: TensorLoraFp8MLP}  # and what lora_ does
