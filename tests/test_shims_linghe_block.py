"""linghe's FP8 facade over our ops, with a stand-in for Transformer Engine's FP8 tensor.

What a tensor stands for is compared: its rows and its columns, dequantised as Transformer Engine lays them out, against
the values in fp64.
"""

from types import SimpleNamespace

import pytest
import torch

from ling_kernels.integrations import linghe_block as block
from tests.cases import BF16, FP32, Rand

F8 = 0.07  # e4m3 has 3 bits: half a step is 1/16 of a value; the smallest codes are as far apart as 2^-9 of a scale


class Blockwise(torch.Tensor):
    """Holds what Float8BlockwiseQTensor gets. Autograd sees a tensor of the wide dtype without data."""

    @staticmethod
    def __new__(cls, *, shape, dtype, requires_grad, **parts):
        self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, requires_grad=requires_grad)
        self.parts = SimpleNamespace(**parts)
        return self

    @classmethod
    def __torch_dispatch__(cls, function, types, args, kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return args[0]
        raise NotImplementedError(str(function))


class Probe(torch.autograd.Function):
    """Takes a gradient as it comes: leaves would add it up."""

    @staticmethod
    def forward(ctx, x, seen):
        ctx.seen = seen
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.seen.append(grad)
        return None, None


def quantizer(pow2=False):
    return SimpleNamespace(dtype="e4m3", force_pow_2_scales=pow2)


def wide(q, scale):
    """q [M, K] by scale [K/128, M], as for one matrix."""
    return q.double() * scale.T.double().repeat_interleave(128, 1)


def check_matrix(got: Blockwise, want: torch.Tensor, pow2: bool, columns=True) -> None:
    """One matrix [.., K]: rows and columns, and their layouts."""
    K, M, parts = want.shape[-1], want.shape[:-1].numel(), got.parts
    assert got.shape == want.shape and parts.rowwise_data.shape == want.shape and not parts.is_2D_scaled
    assert parts.rowwise_scale_inv.shape == (K // 128, M) and parts.fp8_dtype == "e4m3"
    close(wide(parts.rowwise_data.flatten(0, -2), parts.rowwise_scale_inv), want.flatten(0, -2))
    if not columns:
        assert parts.columnwise_data is None and parts.columnwise_scale_inv is None
        return
    data, scale = parts.columnwise_data.reshape(K, M), parts.columnwise_scale_inv
    assert parts.columnwise_data.shape == (K, *want.shape[:-1]) and scale.shape == (-(-M // 128), K)
    close(data.double() * scale.T.double().repeat_interleave(128, 1)[:, :M], want.flatten(0, -2).T)
    if pow2:
        assert all(torch.frexp(s)[0].eq(0.5).all() for s in (parts.rowwise_scale_inv, scale))


def check_experts(got: Blockwise, want: torch.Tensor, counts: list[int], columns=True) -> None:
    """Rows of experts: each expert's matrix of scales, and of columns, one after another."""
    K, parts, at, block_at = want.shape[1], got.parts, 0, 0
    assert got.shape == want.shape == parts.rowwise_data.shape
    scales = parts.rowwise_scale_inv.reshape(-1)
    for n in counts:
        rows = slice(at, at + n)
        close(wide(parts.rowwise_data[rows], scales[at * K // 128 :][: n * K // 128].view(K // 128, n)), want[rows])
        if columns:
            data = parts.columnwise_data.reshape(-1)[at * K :][: n * K].view(K, n).double()
            scale = parts.columnwise_scale_inv[block_at : block_at + -(-n // 128)].T.double()
            close(data * scale.repeat_interleave(128, 1)[:, :n], want[rows].T)
        at, block_at = at + n, block_at + -(-n // 128)
    if not columns:
        assert parts.columnwise_data is None


def close(got, want) -> None:
    assert got.shape == want.shape and torch.isfinite(got).all()
    if want.numel():
        assert ((got - want).abs() <= F8 * want.abs() + 2**-9 * want.abs().max()).all()


def wide_silu(x, weights=None):
    gate, up = x.chunk(2, -1)
    y = gate * gate.sigmoid() * up
    return y if weights is None else y * weights.view(-1, 1)


@pytest.mark.parametrize("pow2", [False, True])
def test_silu(pow2):
    rand, seen = Rand(BF16), []
    x, dy = rand(65, 2, 512), rand.data(65, 2, 256)
    y = block.block_silu_impl(Probe.apply(x, seen), quantizer(pow2), quantizer(pow2), Blockwise)
    y.backward(dy)
    x64 = x.detach().double().requires_grad_()
    want = wide_silu(x64)
    want.backward(dy.double())
    assert y.requires_grad
    check_matrix(y, want.detach(), pow2)
    check_matrix(seen[0], x64.grad, pow2)


@pytest.mark.parametrize("recomputing", [None, False, True])
@pytest.mark.parametrize("pow2", [False, True])
def test_rms_norm(recomputing, pow2):
    rand = Rand(BF16)
    x, w, dy = rand(33, 4, 256), rand(256), rand.data(33, 4, 256)
    y, rms = block.block_rms_norm(x, w, None, quantizer(pow2), Blockwise, 0.1, recomputing)
    y.backward(dy)
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, w))
    want = x64 / (x64.square().mean(-1, keepdim=True) + 0.1).sqrt() * w64
    want.backward(dy.double())
    check_matrix(y, want.detach(), pow2, recomputing is not False)
    assert not rms.requires_grad
    for t, wide_t in ((x, x64), (w, w64)):
        torch.testing.assert_close(t.grad.double(), wide_t.grad, rtol=0.02, atol=0.02 * float(wide_t.grad.abs().max()))


@pytest.mark.parametrize("recomputing", [None, False])
def test_weighted_silu_of_experts(recomputing):
    rand, seen, counts = Rand(BF16), [], [16, 0, 144, 32]
    M = sum(counts)
    x, weights, dy = rand(M, 512), rand.fp32(M, 1), rand.data(M, 256)
    device_counts, scales = torch.tensor(counts), [quantizer()]
    y = block.block_batch_weighted_silu_impl(
        Probe.apply(x, seen), weights, device_counts, counts, scales, scales, Blockwise, recomputing
    )
    y.backward(dy)
    x64, w64 = (t.detach().double().requires_grad_() for t in (x, weights))
    want = wide_silu(x64, w64)
    want.backward(dy.double())
    check_experts(y, want.detach(), counts, recomputing is not False)
    check_experts(seen[0], x64.grad, counts)
    torch.testing.assert_close(weights.grad.double(), w64.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fp8", [False, True])
def test_padded_permute_and_back(fp8):
    rand, seen, (T, E, H) = Rand(FP32), [], (150, 3, 128)
    chosen = rand.bools(T, E)
    chosen[:, 1], chosen[:, 2] = False, True
    counts = chosen.sum(0).tolist()
    padded = [-(-n // 16) * 16 for n in counts]
    x, probs, device_counts = rand(T, H), rand.fp32(T, E), chosen.sum(0)
    pairs = [(t, e, sum(padded[:e]) + i) for e in range(E) for i, t in enumerate(chosen[:, e].nonzero()[:, 0].tolist())]
    token, expert, row = (torch.tensor(of) for of in zip(*pairs, strict=True))
    want = torch.zeros(sum(padded), H, dtype=torch.float64).index_copy(0, row, x.detach().double()[token])
    if fp8:
        rows, of_rows, row_id_map, index = block.block_padded_permute(
            x, chosen, device_counts, counts, [quantizer()], Blockwise, probs
        )
        check_experts(rows, want, padded)
    else:
        rows, of_rows, row_id_map = block.padded_permute(x, chosen, device_counts, counts, probs)
        assert torch.equal(rows.double(), want)
    assert torch.equal(of_rows, torch.zeros(sum(padded)).index_copy(0, row, probs[token, expert]))
    drows, dprobs = rand.data(*rows.shape), rand.data(len(of_rows))
    torch.autograd.backward([rows, of_rows], [drows, dprobs])
    summed = torch.zeros(T, H, dtype=torch.float64).index_add(0, token, drows.double()[row])
    torch.testing.assert_close(x.grad.double(), summed, rtol=1e-5, atol=1e-5)
    assert torch.equal(probs.grad[token, expert], dprobs[row]) and not probs.grad[~chosen].any()

    y, dout = rand(sum(padded), H), rand.data(T, H)
    if fp8:
        back = block.block_padded_unpermute(
            Probe.apply(y, seen), row_id_map, index, device_counts, counts, (T, H), [quantizer()], Blockwise
        )
    else:
        back = block.padded_unpermute(y, row_id_map, device_counts, torch.Size((T, H)))
    back.backward(dout)
    summed = torch.zeros(T, H, dtype=torch.float64).index_add(0, token, y.detach().double()[row])
    torch.testing.assert_close(back.double(), summed, rtol=1e-5, atol=1e-5)
    dy = torch.zeros(sum(padded), H, dtype=torch.float64).index_copy(0, row, dout.double()[token])
    check_experts(seen[0], dy, padded) if fp8 else torch.testing.assert_close(y.grad.double(), dy)


def test_refused():
    x = torch.randn(16, 256)
    with pytest.raises(ValueError, match=r"input \[S, B, 2F\]"):
        block.block_silu_impl(x, quantizer(), quantizer(), Blockwise)
    with pytest.raises(ValueError, match=r"input \[S, B, N\]"):
        block.block_rms_norm(x, x[0], None, quantizer(), Blockwise)
    with pytest.raises(ValueError, match="of sum"):
        counts = torch.tensor([8, 16])
        block.block_batch_weighted_silu_impl(x, x[:, 0], counts, [8, 16], [quantizer()], [quantizer()], Blockwise)
    with pytest.raises(ValueError, match="tokens_per_expert"):
        block.padded_permute(x, torch.ones(16, 2), torch.tensor([16, 16]), [16, 16, 0])
    with pytest.raises(ValueError, match="restore_shape"):
        block.padded_unpermute(x, torch.zeros(4, 2, dtype=torch.int32), torch.tensor([2, 2]), torch.Size((4, 128)))
