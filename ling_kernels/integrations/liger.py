"""Liger's names over our ops: `from ling_kernels.integrations.liger import LigerRMSNorm`, for code that imports it from
liger_kernel.transformers 0.6 and later.

Sums are fp32, and results are rounded once. What only moves memory or rounding about (in_place, row_mode) is accepted;
an argument that would change the result and that we lack raises InputError.
"""

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..op import expect
from ..ops.linear_cross_entropy import linear_cross_entropy
from ..ops.rms_norm import rms_norm
from ..ops.swiglu import swiglu


def refuse(name: str, **given) -> None:
    """Raise InputError where an argument has a value that is neither None, False nor 0."""
    for argument, value in given.items():
        if value is not None and (isinstance(value, Tensor) or value):
            raise InputError(f"{name}: {argument} is not supported; got {type(value).__name__} {value!r}")


class LigerFusedLinearCrossEntropyLoss(nn.Module):
    """The loss of _input [T, H] times lin_weight [V, H]^T for target [T], without all logits in memory.

    reduction: mean over the targets that are not ignored (0 where all are), sum, or none, [T] fp32. accum_dtype may
    only be fp32, in which the weight's gradient is always summed.
    """

    def __init__(
        self,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ):
        super().__init__()
        refuse(
            "LigerFusedLinearCrossEntropyLoss",
            ce_weight=ce_weight,
            lse_square_scale=lse_square_scale,
            label_smoothing=label_smoothing,
            softcap=softcap,
            return_z_loss=return_z_loss,
            use_token_scaling=use_token_scaling,
            return_token_accuracy=return_token_accuracy,
            return_predicted_tokens=return_predicted_tokens,
            accum_dtype=None if accum_dtype == torch.float32 else accum_dtype,
        )
        if reduction not in ("mean", "sum", "none"):
            raise InputError(f"reduction is {reduction!r}; it is mean, sum or none")
        self.ignore_index, self.reduction = ignore_index, reduction

    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Tensor | None = None) -> Tensor:
        refuse("LigerFusedLinearCrossEntropyLoss", bias=bias)
        return linear_cross_entropy(_input, lin_weight, target, self.ignore_index, self.reduction)


class LigerRMSNorm(nn.Module):
    """RMS norm of the last dimension, weight [hidden_size].

    All of it is computed in fp32 and rounded once, which is casting mode gemma; in llama Liger rounds before it
    multiplies by the weight, so that bf16 results differ in the last bit. in_place and row_mode mean nothing here.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-6,
        offset: float = 0.0,
        casting_mode: str = "llama",
        init_fn: str = "ones",
        in_place: bool = True,
        row_mode: bool | None = None,
        elementwise_affine: bool = True,
    ):
        super().__init__()
        refuse("LigerRMSNorm", offset=offset)
        if casting_mode not in ("llama", "gemma") or init_fn not in ("ones", "zeros") or not elementwise_affine:
            raise InputError("LigerRMSNorm takes casting_mode llama or gemma, init_fn ones or zeros, and has a weight")
        self.weight = nn.Parameter(torch.ones(hidden_size) if init_fn == "ones" else torch.zeros(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        return rms_norm(hidden_states, self.weight, eps=self.variance_epsilon)

    def extra_repr(self) -> str:
        return f"weight_shape={tuple(self.weight.shape)}, eps={self.variance_epsilon}"


class LigerSiLUMulFunction:
    """`LigerSiLUMulFunction.apply(a, b)`: silu(a) * b for a and b [..., F].

    a and b are copied into one tensor. Where they are halves of one already, call `ling_kernels.swiglu` on it.
    """

    @staticmethod
    def apply(a: Tensor, b: Tensor, gate_multiplier: float = 1.0, down_multiplier: float = 1.0) -> Tensor:
        if gate_multiplier != 1 or down_multiplier != 1:
            raise InputError("LigerSiLUMulFunction: gate_multiplier and down_multiplier are not supported")
        expect(a.shape == b.shape and a.dtype == b.dtype, "a and b [..., F] of one dtype", a, b)
        return swiglu(torch.cat([a, b], -1))
