"""Embedding and head divided by vocabulary: each of n ranks holds V / n rows of both weights, and takes its own tokens.

A token's id travels to the rank that has its embedding, and the row comes back. For the loss, ranks show each other
their hidden states, a chunk at a time; each computes its columns of the chunk's logits, and with m_r the log-sum-exp of
rank r's columns and z_r its logit of the target, or 0 where that is another rank's,

    lse = log sum_r exp(m_r),    loss = lse - sum_r z_r,    dlogits_r = exp(logits_r - lse) - [target]

so that n floats times two a row are all that ranks exchange of the logits. Weight gradients have seen every rank's
tokens. Gradients of hidden states are summed over ranks in fp32 and rounded once.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..errors import InputError
from ..nn.linear import LossLinear
from ..op import autocast, expect, first_derivative_only, upcast, use_reference, values_on_host
from ..ops.cross_entropy import cross_entropy_bwd, cross_entropy_fwd, expect_targets
from ..ops.linear_cross_entropy import Products, chunks
from .collectives import Gather, Send, exchanged, gather, most_rows, scatter_sum


class VocabularyEmbedding(nn.Module):
    """This rank's rows of an embedding: weight [V / n, H], of ids from `first` on."""

    def __init__(self, weight: nn.Parameter, group: dist.ProcessGroup):
        super().__init__()
        self.weight, self.group = part(weight, group), group

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] of any tokens -> [..., H]. Sizes of what ranks send are read on the host, once a call."""
        n, V = dist.get_world_size(self.group), len(self.weight)
        if values_on_host(ids):
            wrong = ids[(ids < 0) | (ids >= n * V)]
            expect(len(wrong) == 0, f"ids in 0..{n * V - 1}", wrong[:4].tolist())
        owner = ids.flatten().long() // V
        order = owner.argsort(stable=True)
        counts = (owner[:, None] == torch.arange(n, device=ids.device)).sum(0)
        _, (to, from_) = exchanged(counts[:, None], ids.numel(), self.group)
        wanted = Send.apply(ids.flatten()[order], to, from_, self.group)
        rows = nn.functional.embedding(wanted - dist.get_rank(self.group) * V, self.weight)
        rows = Send.apply(rows, from_, to, self.group)
        return rows[order.argsort()].view(*ids.shape, -1)


class VocabularyHead(LossLinear):
    """This rank's rows of a head: weight [V / n, H]."""

    def __init__(self, weight: nn.Parameter, group: dist.ProcessGroup):
        with torch.device("meta"):
            super().__init__(weight.shape[1], len(weight) // dist.get_world_size(group), bias=False)
        self.weight, self.group = part(weight, group), group

    def forward(self, x: Tensor, norm: nn.Module | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """x [T, H] -> all logits [T, V] of this rank's rows. Ranks may have different T."""
        n, T = dist.get_world_size(self.group), len(x)
        x = filled(x if norm is None else norm(x), most_rows(T, x.device, self.group))
        parts = nn.functional.linear(Gather.apply(x, self.group), self.weight)
        sizes = [len(x)] * n
        columns = Send.apply(parts if dtype is None else parts.to(dtype), sizes, sizes, self.group)
        return columns.view(n, len(x), -1).transpose(0, 1).flatten(1)[:T]

    def takes_fp8_rows(self) -> bool:
        return False

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        return vocabulary_cross_entropy(x, self.weight, targets, self.group)


def vocabulary_cross_entropy(
    x: Tensor, w: Tensor, targets: Tensor, group: dist.ProcessGroup, ignore_index: int = -100, chunk: int = 1024
) -> Tensor:
    """x [T, H], w [V / n, H], targets [T] int64 in 0..V-1 -> the sum of this rank's losses, a scalar fp32.

    linear_cross_entropy(x, all of w, targets, ignore_index, "sum") of each rank, whose rows and their number may
    differ. At most chunk rows of V / n logits exist at a time. The forward computes the gradients, dx and dw, where dw
    is that of all ranks' losses. So what follows must multiply every rank's loss by the same number: divide by the
    number of targets in the global batch. Otherwise backward raises InputError on CPUs, and gives NaN on GPUs, where
    comparing would stop the host.
    """
    expect(x.ndim == w.ndim == 2 and x.shape[1] == w.shape[1] and x.is_floating_point(), "x [T, H] and w [V, H]", x, w)
    expect_targets(targets, len(x), len(w) * dist.get_world_size(group), ignore_index)
    x, w = autocast(x, w)
    rows = most_rows(len(x), x.device, group)
    x, targets = filled(x, rows), filled(targets, rows, ignore_index)
    kernels = not use_reference("linear_cross_entropy", x, w)
    # Ranks must agree: one that needs no gradient of its rows computes the others' all the same.
    wanted = torch.is_grad_enabled()
    return VocabularyCrossEntropy.apply(x, w, targets, group, ignore_index, chunk, kernels, wanted)


class VocabularyCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, targets, group, ignore_index, chunk, kernels, wanted):
        n, rank, V = dist.get_world_size(group), dist.get_rank(group), len(w)
        products = Products.of(x, w, kernels)
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide_dw = torch.zeros_like(w, dtype=dtype) if wanted else w.new_empty(0)
        dx = torch.empty_like(x) if wanted else x.new_empty(0)
        total = torch.zeros((), dtype=dtype, device=x.device)
        for rows in chunks(len(x), max(chunk // n, 1)):
            target = gather(targets[rows], group)
            ignored = target == ignore_index
            xs = products.rows(gather(x[rows], group), target, ignore_index)
            here = target - rank * V
            here = here.masked_fill((here < 0) | (here >= V), V).masked_fill(ignored, ignore_index)
            with torch.autocast(x.device.type, enabled=False):
                logits = products.mm(xs, products.w.T)
                losses, lse = row_losses(logits, here, ignored, group, ignore_index, kernels)
                total += losses.chunk(n)[rank].sum()
                if wanted:
                    dlogits = gradient(logits, here, ignored, lse, ignore_index, kernels, products.narrow and x.dtype)
                    dx[rows] = scatter_sum(products.mm(dlogits, products.w), group)
                    products.add_(wide_dw, dlogits.T, xs)
        ctx.save_for_backward(dx, wide_dw.to(w.dtype))
        ctx.group = group
        return total

    @staticmethod
    @first_derivative_only
    def backward(ctx, dloss):
        dx, dw = ctx.saved_tensors
        factors = gather(dloss[None], ctx.group)
        if values_on_host(factors) and len(unequal := factors.unique()) > 1:
            raise InputError(
                f"a divided vocabulary needs losses that every rank multiplies by the same number: {unequal.tolist()}"
            )
        factor = torch.where((factors == dloss).all(), dloss, torch.nan)
        dx, dw = ((upcast(g) * factor).to(g.dtype) for g in (dx, dw))
        return dx, dw, *[None] * 6


def row_losses(logits, targets, ignored, group, ignore_index, kernels) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp over all ranks' columns of each row, [T] fp32; both 0 where ignored."""
    V, lse = logits.shape[1], logits.new_empty(len(logits))
    if kernels:
        cross_entropy_fwd(logits, targets, None, torch.empty_like(lse), lse, None, ignore_index)
    else:
        lse = logits.logsumexp(1)
    is_here = (targets >= 0) & (targets < V)
    z = logits.gather(1, targets.where(is_here, 0)[:, None])[:, 0].where(is_here, 0)
    parts = gather(torch.stack([lse, z])[None], group)
    lse = parts[:, 0].logsumexp(0).masked_fill(ignored, 0)
    return (lse - parts[:, 1].sum(0)).masked_fill(ignored, 0), lse


def gradient(logits, targets, ignored, lse, ignore_index, kernels, narrow) -> Tensor:
    """Of the sum of losses to the logits, in their memory, or a tensor of type `narrow`."""
    if kernels:
        dlogits = torch.empty_like(logits, dtype=narrow) if narrow else logits
        cross_entropy_bwd(logits, targets, lse, lse.new_ones(1).expand(len(lse)), dlogits, ignore_index)
        return dlogits
    p = logits.sub_(lse[:, None]).exp_()
    is_here = ((targets >= 0) & (targets < p.shape[1]))[:, None]
    p.scatter_add_(1, targets[:, None].where(is_here, 0), -is_here.to(p.dtype))
    return p.masked_fill_(ignored[:, None], 0)


def filled(x: Tensor, rows: int, value: float = 0) -> Tensor:
    """x [T, ...] -> [rows, ...], T <= rows: ranks show each other equally many."""
    missing = rows - len(x)
    return nn.functional.pad(x, (0, 0) * (x.ndim - 1) + (0, missing), value=value) if missing else x


def part(weight: nn.Parameter, group: dist.ProcessGroup) -> nn.Parameter:
    """A copy of this rank's rows."""
    rows = weight.detach().chunk(dist.get_world_size(group))[dist.get_rank(group)]
    return nn.Parameter(rows.clone(), requires_grad=weight.requires_grad)


def shard_vocabulary_(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Keep this rank's rows of the embedding and the head of a Ling model, in place. Ranks take different tokens.

    Every rank must have the same weights before. Call it before an optimizer is made. Rank r of n keeps rows r V / n up
    to (r + 1) V / n under the names that they had. All ranks of the group must run the same forwards and backwards
    together, and divide losses by the global batch's number of targets (`target_counts`). Raises InputError where n
    does not divide the vocabulary.
    """
    n, V = dist.get_world_size(group), len(model.lm_head.weight)
    if V % n:
        raise InputError(f"a vocabulary of {V} is not a multiple of {n} ranks")
    model.word_embeddings = VocabularyEmbedding(model.word_embeddings.weight, group)
    model.lm_head = VocabularyHead(model.lm_head.weight, group)
