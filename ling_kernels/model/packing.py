"""Padded or packed batches as T rows with cu_seqlens; targets never cross the end of a document."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import pad

from ..op import expect
from ..ops.attention import expect_bounds

IGNORE = -100  # label of a position without loss


class Batch(NamedTuple):
    """A [B, L] batch as T rows without padding."""

    ids: Tensor  # [T]
    positions: Tensor  # [T] int64, from 0 in each document
    cu_seqlens: Tensor  # [documents + 1] int32
    indices: Tensor | None  # [T] index of each row in the flattened [B * L] batch; None: no padding, the same rows
    rows: Tensor | None = None  # [T'] the rows that this device computes, where several share a batch; None: all

    def here(self, x: Tensor) -> Tensor:
        """x [T] of all rows -> of those that this device computes."""
        return x if self.rows is None else x[self.rows]

    @property
    def share(self) -> float:
        """This device's share of the rows."""
        return 1.0 if self.rows is None else len(self.rows) / max(len(self.ids), 1)


def pack(input_ids: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None, max_positions: int) -> Batch:
    """input_ids [B, L] -> its rows without padding; arguments as in Ling.forward."""
    ids_fit = isinstance(input_ids, Tensor) and input_ids.ndim == 2 and input_ids.dtype in (torch.int64, torch.int32)
    expect(ids_fit, "input_ids [B, L] of integers, int64 or int32", input_ids)
    B, L = input_ids.shape
    device = input_ids.device
    expect(attention_mask is None or attention_mask.shape == (B, L), "attention_mask as input_ids", attention_mask)
    expect(attention_mask is None or is_padding_mask(attention_mask), "attention_mask of 1 at tokens, 0 at padding",
           attention_mask)  # fmt: skip
    expect(attention_mask is None or cu_seqlens is None, "attention_mask or cu_seqlens, not both")
    expect(isinstance(cu_seqlens, Tensor | None), "cu_seqlens [documents + 1] int32", cu_seqlens)
    if cu_seqlens is not None:
        expect_bounds(cu_seqlens, B * L, device)
    if attention_mask is None:
        expect(cu_seqlens is not None or L <= max_positions, f"at most {max_positions} positions", input_ids)
        if cu_seqlens is None:
            cu_seqlens = torch.arange(B + 1, device=device, dtype=torch.int32) * L
        ids, indices = input_ids.flatten(), None
    else:
        mask = attention_mask.bool()
        indices = mask.flatten().nonzero().flatten()
        ids = input_ids.flatten()[indices]
        cu_seqlens = pad(mask.sum(-1).cumsum(0), (1, 0)).int()
    rows = torch.arange(len(ids), device=device)
    document = torch.searchsorted(cu_seqlens[1:].long(), rows, right=True)
    return Batch(ids, rows - cu_seqlens.long()[document], cu_seqlens, indices)


def is_padding_mask(mask: Tensor) -> bool:
    """Whether a mask holds 0 and 1 alone. A mask of floats that is 0 everywhere is one to add to scores, which hides
    nothing; read as padding it would hide every token."""
    if mask.dtype == torch.bool or torch.compiler.is_compiling() or isinstance(mask, FakeTensor):
        return True
    zeros, ones = mask == 0, mask == 1
    return bool((zeros | ones).all()) and not (mask.is_floating_point() and len(mask) > 0 and bool(zeros.all()))


def unpack(x: Tensor, batch: Batch, shape: tuple[int, int]) -> Tensor:
    """x [T, N] -> [B, L, N], zeros at padding. x may be [T', N]: zeros where another device computes a row."""
    indices = batch.rows if batch.indices is None else batch.here(batch.indices)
    if indices is None:
        return x.view(*shape, x.shape[1])
    rows = x.new_zeros(shape[0] * shape[1], x.shape[1]).index_copy(0, indices, x)
    return rows.view(*shape, x.shape[1])


def shift(x: Tensor, batch: Batch, ahead: int, fill: int) -> Tensor:
    """x [T] -> [T]: the value `ahead` rows later in the same document, `fill` past the document's end."""
    later = pad(x, (0, ahead), value=fill)[ahead:]
    same = pad(batch.positions, (0, ahead), value=0)[ahead:] == batch.positions + ahead
    return torch.where(same, later, fill)
