"""Several adapters over one model, one or none for each row of a pass, as requests of one batch name them.

A bank has the A [n, r, K] and B [n, N, r] of n adapters of one weight, those of routed experts as [n, E, r, K] and
[n, E, N, r]. Rows are sorted by adapter, or by adapter and expert, with the ops that sort tokens by expert: the product
with the weight stays one for all rows, and two small grouped products are added to it, whatever n. A row without
adapter is in no group.
"""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import InputError
from ..op import few_calls_on_cpu
from ..ops.dispatch import Plan, counts_here, dispatch
from ..ops.grouped_gemm import grouped_gemm
from ..ops.permute import permute
from ..ops.unpermute import unpermute
from .lora import KINDS, adapted


class RowGroups(NamedTuple):
    """A plan of rows for a loop over groups, where the host has the numbers."""

    rows: Tensor  # [n] int64: those that are in a group, group by group
    runs: list[tuple[int, int]]  # each group with rows, and how many


class AdapterRows:
    """The adapters of the rows of a pass, which all banks of a model read."""

    def __init__(self, number: int):
        self.number = number

    def set(self, ids: Tensor) -> None:
        """ids [T] int32: the adapter of each row of the layers' inputs from now on; -1: none."""
        self.ids = ids
        self.of_rows: Plan | RowGroups | None = None
        self.of_choices: tuple[Tensor, Tensor] | None = None
        self.of_plan: tuple[Plan, Plan | RowGroups] | None = None

    def groups(self, plan: Plan | None, few_calls: bool) -> Plan | RowGroups:
        """The rows sorted by adapter; with a layer's plan, its rows, which are sorted by expert, sorted by adapter and
        expert: group adapter x E + expert. few_calls: for a loop over the groups."""
        if plan is None:
            if self.of_rows is None:
                self.of_rows = sort_rows(self.ids, self.number, few_calls)
            return self.of_rows
        if self.of_plan is None or self.of_plan[0] is not plan:  # gate_up and down have the same
            E = len(plan.offsets) - 1
            self.of_plan = plan, sort_rows(self.by_expert(plan, E), self.number * E, few_calls)
        return self.of_plan[1]

    def by_expert(self, plan: Plan, E: int) -> Tensor:
        """The group of each row of a plan; below 0: none. Undefined rows count as the last expert's."""
        if self.of_choices is None:  # the group of expert 0 for each choice, -E for none; the rows' numbers
            first = torch.where(self.ids < 0, -E, self.ids * E).repeat_interleave(plan.slot.shape[1])
            self.of_choices = first, torch.arange(len(first), dtype=torch.int32, device=first.device)
        first, row = self.of_choices
        expert = torch.searchsorted(plan.offsets[1:-1], row, right=True, out_int32=True)
        return first.index_select(0, plan.source) + expert


def sort_rows(group: Tensor, number: int, few_calls: bool) -> Plan | RowGroups:
    """group [S] int32, below `number`; below 0: none."""
    if not few_calls:
        return dispatch(group[:, None], counts_here(group, number))
    group, rows = group.sort(stable=True)
    without = int((group < 0).sum())
    used, counts = group[without:].unique_consecutive(return_counts=True)
    return RowGroups(rows[without:], [*zip(used.tolist(), counts.tolist(), strict=True)])


class AdapterBank:
    """a [n, (E,) r, K] and b [n, (E,) N, r] with the factors alpha / r in it, in the dtype of the layer's rows.

    A layer of nn/lora.py calls it as an Adapter.
    """

    enabled = True

    def __init__(self, a: Tensor, b: Tensor, rows: AdapterRows):
        self.a, self.b, self.rows = a.flatten(0, -3), b.flatten(0, -3), rows

    def __call__(self, x: Tensor, plan: Plan | None = None) -> Tensor:
        """x [T, K] -> [T, N], zeros in rows without adapter; with a plan, x [S, K] of its rows -> [S, N]."""
        groups = self.rows.groups(plan, few_calls_on_cpu(x, self.a))
        if isinstance(groups, RowGroups):
            return self.looped(x, *groups)
        h = grouped_gemm(permute(x, groups), self.a, groups.offsets)
        return unpermute(grouped_gemm(h, self.b, groups.offsets), groups)

    def looped(self, x: Tensor, rows: Tensor, runs: list[tuple[int, int]]) -> Tensor:
        """The same, group by group: of few rows most groups have none."""
        y = x.new_zeros(len(x), self.b.shape[1])
        if not runs:
            return y
        parts = zip(x.index_select(0, rows).split([n for _, n in runs]), runs, strict=True)
        return y.index_copy_(0, rows, torch.cat([linear(linear(part, self.a[g]), self.b[g]) for part, (g, _) in parts]))


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
