"""Kernels broken on purpose, in their PTX: each must be caught, in words that say what happened."""

import re

import pytest

from tests.gpu.build import broken, load, missing

if missing():
    pytest.skip(f"csrc/ needs {missing()} to run on the virtual GPU", allow_module_level=True)

from tests import test_csrc_attention as attention
from tests import test_csrc_attention_decode as decode
from tests import test_csrc_decode as around
from tests import test_csrc_gemm as gemm
from tests import test_csrc_moe as moe
from tests import test_csrc_moe_decode as moe_decode
from tests import test_csrc_norm as norm
from tests import test_csrc_quant as quant


def without(pattern: str):
    return instead(pattern, "")


def instead(pattern: str, new: str):
    return lambda text: re.sub(pattern, new, text, flags=re.S)


WAIT = r"mbarrier\.try_wait\.parity\S*\s+(\S+), [^;]*;"
GO_ON = instead(WAIT, r"setp.eq.u32 \1, 0, 0;")  # no mbarrier is waited for
FREE = r"mbarrier\.arrive\.shared::cta\.b64\s+_, [^;]*;"
EXPECT = r"(mbarrier\.arrive\.expect_tx\S+\s+_, [^;]*, )(\S+);"
MORE_BYTES = instead(EXPECT, r"{ .reg .b32 more; add.s32 more, \2, 16; \1more; }")
FEWER_BYTES = instead(EXPECT, r"{ .reg .b32 less; sub.s32 less, \2, 16; \1less; }")
ALONE = instead(r"shfl\.sync\.bfly\.b32\s+(%r\d+)\|%p\d+, (%r\d+),[^;]*;", r"mov.b32 \1, \2;")
HALF = instead(r"(redux\.sync\S+\s+\S+, \S+, )\S+;", r"{ .reg .b32 half; mov.b32 half, 65535; \1half; }")
NO_GRID = instead(r"ld\.acquire\.gpu\.global\.u32\s+(\S+), [^;]*;", r"mov.b32 \1, -2147483648;")
CLUSTER = r"barrier\.cluster\.\w+[^;]*;"
BLOCK, NAMED = r"(?:bar|barrier)\.sync\s+0;", r"(?:bar|barrier)\.sync\s+%r\d+, %r\d+;"
NO_WAIT = without(r"griddepcontrol\.wait;")
HALF_A_WARP = instead(
    r"bar\.warp\.sync\s+-1;",
    "{ .reg .pred half; .reg .b32 lane; mov.u32 lane, %laneid; setp.lt.u32 half, lane, 16; @half bar.warp.sync -1; }",
)
FUSED = instead(  # the product, what lies between, and the sum
    r"mul\.rn\.f32\s+(%f\d+), (%f\d+), (%f\d+);((?:(?!add\.rn).)*?)add\.rn\.f32\s+(%f\d+), (%f\d+), \1;",
    r"\4fma.rn.f32 \5, \2, \3, \6;",
)
EARLY, NEVER, PAST = "before griddepcontrol.wait", "never executes griddepcontrol.wait", "past the end of tensor"
UNORDERED = "no release and acquire"
RACE, STUCK, WRONG = "race|no barrier between", "deadlock", ""

BROKEN = {  # name: (check that must fail, kernel, change, words of the error; "": a wrong result will do)
    "wgmma is not awaited": (gemm.check_dense, "gemm_fp8_kernel", without(r"wgmma\.wait_group[^;]*;"), "wgmma"),
    "wgmma is not committed": (gemm.check_dense, "gemm_fp8_kernel", without(r"wgmma\.commit_group[^;]*;"), "wgmma"),
    "one group of wgmma is not awaited": (
        gemm.check_dense, "gemm_fp8_kernel", instead(r"(wgmma\.wait_group\.sync\.aligned) 0", r"\1 1"), "wgmma"),
    "sums do not begin at zero": (
        gemm.check_dense, "gemm_fp8_kernel", instead(r"setp\.ne\.b32 p, %r\d+, 0;", "setp.eq.b32 p, 0, 0;"), WRONG),
    "no stage is awaited": (gemm.check_dense, "gemm_fp8_kernel", GO_ON, RACE),
    "no stage is freed": (gemm.check_rows, "gemm_fp8_kernel", without(FREE), STUCK),
    "more bytes than arrive": (gemm.check_dense, "gemm_fp8_kernel", MORE_BYTES, STUCK),
    "fewer bytes than arrive": (gemm.check_dense, "gemm_fp8_kernel", FEWER_BYTES, "bytes|" + STUCK),
    "the other block of a pair does not hear of a free stage": (
        gemm.check_rows, "gemm_fp8_kernel", instead(r"mapa\S+ there, (%r\d+), [^;]*;", r"mov.b32 there, \1;"), RACE),
    "weights of a pair reach one block": (
        gemm.check_rows, "gemm_fp8_kernel", instead(r"(cp\S+multicast::cluster [^;]*, )\S+;", r"\g<1>1;"), STUCK),
    "a block ends before the other block of its pair": (
        gemm.check_rows, "gemm_fp8_kernel", without(r"barrier\.cluster\.(?:arrive|wait);"), ""),
    "results are stored before all have written them": (gemm.check_dense, "gemm_fp8_kernel", without(NAMED), RACE),
    "a named barrier of too few threads": (
        gemm.check_dense, "gemm_fp8_kernel", instead(r"(bar\.sync\s+%r\d+, )%r\d+;", r"\g<1>96;"), ""),
    "gathered rows reach wgmma without a fence": (
        gemm.check_gather, "gemm_fp8_kernel", without(r"fence\.proxy\.async[^;]*;"), "fence.proxy.async"),
    "transposed weights in registers reach wgmma without a fence": (
        gemm.check_transposed, "gemm_fp8_kernel", without(r"wgmma\.fence[^;]*;"), "wgmma.fence"),
    "copies are not awaited": (gemm.check_gather, "gemm_fp8_kernel", without(r"cp\.async\.wait_group[^;]*;"), ""),
    "rows and columns of a tensor map swapped": (
        gemm.check_dense, "gemm_fp8_kernel", instead(r"(\[%rd\d+, \{)(%r\d+), (%r\d+)(\}\])", r"\1\3, \2\4"), ""),
    "cleared tokens are not awaited": (gemm.check_wgrad, "grouped_wgrad", without(NAMED), RACE),
    "the second 64 columns of the tokens lie elsewhere": (
        gemm.check_wgrad, "grouped_wgrad", instead("4611686293338849280", "4611686293305360384"), WRONG),
    "partial sums are not awaited": (gemm.check_few_rows, "few_rows", without(BLOCK), RACE),
    "no turns": (attention.check_packed, "attention_fwd", without(r"bar\.arrive[^;]*;"), STUCK),
    "keys are not awaited": (attention.check_packed, "attention_fwd", GO_ON, RACE),
    "keys are never freed": (attention.check_packed, "attention_fwd", without(FREE), STUCK),
    "scores are not awaited": (attention.check_packed, "attention_fwd", without(r"wgmma\.wait_group[^;]*;"), "wgmma"),
    "the second 64 columns of the values lie elsewhere": (
        attention.check_packed, "attention_fwd", instead("4611686293372403712", "4611686293305360384"), WRONG),
    "gradients: tiles are not awaited": (attention.check_bwd, "attention_bwd", GO_ON, RACE),
    "a row's sum is not awaited": (norm.check_rms_forward, "rms_norm_fwd", without(BLOCK), RACE),
    "a row's sum of one lane": (
        norm.check_rms_forward, "rms_norm_fwd", ALONE, WRONG),
    "dw is summed too early": (norm.check_rms_backward, "rms_norm_bwd", without(BLOCK), RACE),
    "normed rows are not awaited": (norm.check_linear, "rms_norm_linear", without(BLOCK), RACE),
    "squares are not awaited": (norm.check_router, "rms_norm_router", without(BLOCK), RACE),
    "a head's neighbour": (
        norm.check_qk_forward, "qk_norm_rope_fwd", ALONE, WRONG),
    "scales are not awaited": (quant.check_columns, "quantize_tiles", without(BLOCK), RACE),
    "a weight's maximum is not awaited": (quant.check_weight, "quantize_weight", without(BLOCK), RACE),
    "a tile is not awaited": (quant.check_transpose, "transpose_fp8", without(BLOCK), RACE),
    "histograms are not awaited": (moe.check_dispatch, "dispatch", without(BLOCK), RACE),
    "sums of counts are not awaited": (moe.check_balance, "balance", without(BLOCK), RACE),
    "half the lanes vote": (
        moe.check_route, "route_fwd", HALF, "mask|lanes"),
    "no wait for other blocks": (
        moe_decode.check_sizes, "moe_decode_kernel", NO_GRID, ""),
    "warps' sums of units are not awaited": (moe_decode.check_sizes, "moe_decode_kernel", without(BLOCK), RACE),
    "runs are counted without a release": (
        decode.check_decode, "attention_decode_kernel", instead(r"atom\.inc\.acq_rel\.gpu", "atom.inc.relaxed.gpu"),
        RACE),
    "runs are not counted": (
        decode.check_decode, "attention_decode_kernel",
        instead(r"atom\.inc\.acq_rel\.gpu\.global\.u32\s+(\S+), \[\S+\], (\S+);", r"mov.b32 \1, \2;"), ""),
    "a counter is not left at zero": (
        decode.check_again, "attention_decode_kernel",
        instead(r"atom\.inc(\.acq_rel\.gpu\.global\.u32\s+\S+, \[\S+\], )\S+;", r"atom.add\g<1>1;"), ""),
    "no wait for the cluster": (around.check_greedy, "sample_kernel", without(CLUSTER), RACE),
    "blocks end before others have read their maxima": (
        around.check_greedy, "sample_kernel",
        without(r"barrier\.cluster\.arrive;(?:\s*\.loc[^\n]*)*\s*barrier\.cluster\.wait;(?=(?:\s*\.loc[^\n]*)*\s*ret;)"),
        "has ended"),
    "histograms of a row are not awaited": (around.check_random, "sample_kernel", without(BLOCK), RACE),
    "drafts are looked up too early": (around.check_accept_tokens, "accept_tokens", without(BLOCK), WRONG),
    # ---- arithmetic
    "bytes of a pair swapped": (
        gemm.check_transposed, "gemm_fp8_kernel", instead(r"(prmt\.b32\s+\S+,) (\S+), (\S+),", r"\1 \3, \2,"), WRONG),
    "the next 32 of K begin elsewhere": (
        gemm.check_dense, "gemm_fp8_kernel", instead("4611686293305360386", "4611686293305360388"), WRONG),
    "products are not scaled": (
        gemm.check_dense, "gemm_fp8_kernel", instead(r"mul\.f32\s+(\S+), (\S+), (%f\d+);", r"mov.f32 \1, \2;"), WRONG),
    "all keys have weight 1": (
        attention.check_packed, "attention_fwd",
        instead(r"ex2\.approx\.ftz\.f32\s+(\S+), (\S+);", r"mov.f32 \1, 0f3F800000;"), WRONG),
    "the maximum of half the keys": (decode.check_rising_scores, "attention_decode_kernel", ALONE, WRONG),
    "rotated the other way": (
        norm.check_qk_forward, "qk_norm_rope_fwd", instead(r"neg\.f32\s+(\S+), (\S+);", r"mov.f32 \1, \2;"), WRONG),
    "one row's part of a sum": (
        norm.check_rms_backward, "rms_norm_bwd",
        instead(r"add\.f32\s+(\S+), (\S+), (\S+);", r"mov.f32 \1, \2;"), WRONG),
    "NaN lost in a maximum": (quant.check_rows, "quantize", instead(r"max\.NaN\.", "max."), WRONG),
    "the first expert for all": (
        quant.check_transpose, "transpose_fp8", instead(r"mov\.u32\s+(%r\d+), %ctaid\.z;", r"mov.u32 \1, 0;"), WRONG),
    "five groups": (moe.check_route, "route_fwd", instead(r"setp\.lt\.u32", "setp.le.u32"), WRONG),
    "nothing to choose": (
        moe.check_route, "route_fwd", instead(r"redux\.sync\.max\.u32\s+(\S+), [^;]*;", r"mov.u32 \1, 0;"), WRONG),
    "counts are not zeroed": (
        moe.check_route, "route", without(r"st\.global\.u32\s+\[[^;]*\], %r\d+;"), WRONG),
    "another order of equals": (
        moe.check_dispatch, "dispatch", instead(r"popc\.b32\s+(\S+), (\S+);", r"clz.b32 \1, \2;"), WRONG),
    "a product fused with its sum": (moe.check_unpermute, "unpermute", FUSED, WRONG),
    # ---- addresses
    "a row past the end": (
        norm.check_rms_forward, "rms_norm_fwd", instead(r"setp\.ge\.s32", "setp.gt.s32"), PAST),
    "a scale past the end": (
        quant.check_rows, "quantize", instead(r"setp\.ge\.s32", "setp.gt.s32"), PAST),
    "one key more": (
        decode.check_decode, "attention_decode_kernel", instead(r"setp\.lt\.s32", "setp.le.s32"), PAST),
    "a misaligned load": (
        quant.check_transpose, "transpose_fp8",
        instead(r"(ld\.global\S*v4\S+\s+\{[^}]*\}, \[%rd\d+)\]", r"\1+4]"), "misaligned"),
    "one of two swizzles missing": (
        quant.check_transpose, "transpose_fp8",
        lambda text: re.sub(r"xor\.b32\s+(%r\d+), (%r\d+), (\S+);", r"mov.b32 \1, \2;", text, count=1), WRONG),
    # ---- order
    "routing does not wait for the kernel ahead": (moe.check_route, "route", NO_WAIT, EARLY),
    "dispatch does not wait for the kernel ahead": (moe.check_dispatch, "dispatch", NO_WAIT, EARLY),
    "the router never waits": (norm.check_router, "rms_norm_router", NO_WAIT, NEVER),
    "few rows never wait": (gemm.check_few_rows, "few_rows", NO_WAIT, NEVER),
    "other blocks' h by a relaxed load": (
        moe_decode.check_sizes, "moe_decode_kernel", instead(r"ld\.acquire\.gpu\.", "ld.relaxed.gpu."), UNORDERED),
    "h is not released": (
        moe_decode.check_sizes, "moe_decode_kernel", instead(r"atom\.add\.release\.", "atom.add.relaxed."), UNORDERED),
    "results are stored before lanes have met": (
        attention.check_packed, "attention_fwd", without(r"bar\.warp\.sync\s+-1;"), "no bar.warp.sync"),
    "half a warp at its barrier": (attention.check_packed, "attention_fwd", HALF_A_WARP, "mask names lanes"),
    "rotated keys reach wgmma without a fence": (
        attention.check_packed, "attention_fwd", without(r"fence\.proxy\.async[^;]*;"), "fence.proxy.async"),
    "no wgmma.fence": (attention.check_packed, "attention_fwd", without(r"wgmma\.fence[^;]*;"), "no wgmma.fence"),
    "registers are not given back": (gemm.check_dense, "gemm_fp8_kernel", without(r"setmaxnreg\.dec[^;]*;"), STUCK),
    "an mbarrier counts one more": (
        gemm.check_dense, "gemm_fp8_kernel",
        instead(r"(mbarrier\.init\S+\s+\[[^\]]*\], )(\S+);", r"{ .reg .b32 more; add.s32 more, \2, 1; \1more; }"),
        STUCK),
    "warps' parts are not awaited": (decode.check_decode, "attention_decode_kernel", without(BLOCK), RACE),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken(name, monkeypatch):
    monkeypatch.setenv("LING_GPU_SEED", "1")
    check, kernel, change, words = BROKEN[name]
    with (
        broken(kernel, change) as changed,
        pytest.raises((AssertionError, RuntimeError), match="(?s)" + words) as error,
    ):
        check(load())
    assert changed, "no kernel was changed"
    assert not words or error.type is RuntimeError
