"""Megatron-core's own linear layers with products in block FP8; a weight is quantised when it is needed."""

from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

from ...nn.fp8 import Fp8Weights, fits
from ...nn.fp8_functions import Fp8LinearFunction, product_dtype

FP8 = Fp8Weights(1)  # holds options only


class Fp8Product:
    """In front of a linear layer of Megatron. Its product stays where 128 does not divide a size, or where tensor
    parallelism overlaps it with communication."""

    def _forward_impl(self, input: Tensor, weight: nn.Parameter, bias: Tensor | None = None, **options) -> Tensor:
        overlaps = options.get("sequence_parallel") or options.get("allreduce_dgrad")
        if bias is not None or overlaps or not fits(weight):
            return super()._forward_impl(input=input, weight=weight, bias=bias, **options)
        rows = input.reshape(-1, input.shape[-1])
        w = weight.view_as(weight)  # the gradient goes through autograd, whose hooks Megatron needs
        settings = None, FP8.pow2, FP8.wgrad_for(w), product_dtype(input)
        return Fp8LinearFunction.apply(rows, None, w, *FP8.fields(w), *settings).view(*input.shape[:-1], -1)


class Fp8Column(Fp8Product, ColumnParallelLinear):
    pass


class Fp8Row(Fp8Product, RowParallelLinear):
    pass


KINDS: dict[type, type] = {ColumnParallelLinear: Fp8Column, RowParallelLinear: Fp8Row}
