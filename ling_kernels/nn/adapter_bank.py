"""Several adapters over one model, one or none for each row of a pass, as requests of one batch name them.

A bank has the A [n, r, K] and B [n, N, r] of n adapters of one weight, those of routed experts as [n, E, r, K] and
[n, E, N, r]. Rows are sorted by adapter, or by adapter and expert, with the ops that sort tokens by expert: the product
with the weight stays one for all rows, and two small grouped products are added to it, whatever n. A row without
adapter is in no group.
"""

import copy

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops.dispatch import Plan, counts_here, dispatch, dispatch_here
from ..ops.grouped_gemm import grouped_gemm
from ..ops.permute import permute
from ..ops.unpermute import unpermute
from .lora import KINDS, adapted


class AdapterRows:
    """The adapters of the rows of a pass, which all banks of a model read."""

    sorted: Plan  # of the rows of experts_plan, by `by_expert`

    def __init__(self, number: int):
        self.number = number

    def set(self, ids: Tensor) -> None:
        """ids [T] int32: the adapter of each row of the layers' inputs from now on; -1: none."""
        self.ids, self.plan = ids, dispatch_here(ids[:, None], self.number)
        self.of_choices: tuple[Tensor, Tensor] | None = None
        self.experts_plan: Plan | None = None

    def by_expert(self, plan: Plan) -> Plan:
        """The plan that sorts the rows of a layer's plan, which are sorted by expert, by adapter and expert: group
        adapter x E + expert."""
        if self.experts_plan is plan:  # gate_up and down have the same
            return self.sorted
        E, topk = len(plan.offsets) - 1, plan.slot.shape[1]
        if self.of_choices is None:  # the group of expert 0 for each choice, below -E + 1 for none; the rows' numbers
            first = torch.where(self.ids < 0, -E, self.ids * E).repeat_interleave(topk)
            self.of_choices = first, torch.arange(len(first), dtype=torch.int32, device=first.device)
        first, row = self.of_choices
        # Undefined rows count as the last expert's.
        expert = torch.searchsorted(plan.offsets[1:-1], row, right=True, out_int32=True)
        group = (first.index_select(0, plan.source) + expert)[:, None]
        self.experts_plan, self.sorted = plan, dispatch(group, counts_here(group, self.number * E))
        return self.sorted


class AdapterBank:
    """a [n, (E,) r, K] and b [n, (E,) N, r] with the factors alpha / r in it, in the dtype of the layer's rows.

    A layer of nn/lora.py calls it as an Adapter.
    """

    enabled = True

    def __init__(self, a: Tensor, b: Tensor, rows: AdapterRows):
        self.a, self.b, self.rows = a.flatten(0, -3), b.flatten(0, -3), rows

    def __call__(self, x: Tensor, plan: Plan | None = None) -> Tensor:
        """x [T, K] -> [T, N], zeros in rows without adapter; with a plan, x [S, K] of its rows -> [S, N]."""
        groups = self.rows.plan if plan is None else self.rows.by_expert(plan)
        h = grouped_gemm(permute(x, groups), self.a, groups.offsets)
        return unpermute(grouped_gemm(h, self.b, groups.offsets), groups)


def with_banks(model: nn.Module, factors: dict[str, tuple[Tensor, Tensor]], rows: AdapterRows) -> nn.Module:
    """A model that has all of `model`'s parameters and buffers and also banks; `model` itself stays as it is.

    factors: a and b by the names of `adapted`, those of all weights of a layer or none; other layers stay plain. Raises
    InputError for layers that can have no adapter.
    """
    for name, (layer, _) in adapted(model).items():
        if name in factors and type(layer) not in KINDS:
            has = "has adapters: merge them first" if isinstance(layer, (*KINDS.values(),)) else "can have no adapter"
            raise InputError(f"{name.rpartition('.')[0]}, a {type(layer).__name__}, {has}")
    both = same_parameters(model)
    for name, (layer, _) in adapted(both).items():
        if name in factors:
            layer.__class__ = KINDS.get(type(layer), type(layer))
            setattr(layer, name.rpartition(".")[2], AdapterBank(*factors[name], rows))
    return both


def same_parameters(module: nn.Module) -> nn.Module:
    """A copy of the module and of those in it, whose parameters and buffers are the module's, also when it gets others:
    the dictionaries of them are shared."""
    new = copy.copy(module)
    new._modules = {name: child and same_parameters(child) for name, child in module._modules.items()}
    return new
