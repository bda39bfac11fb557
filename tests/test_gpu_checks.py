"""What the virtual GPU must refuse: each wrong kernel with the words of its message, and beside it the right one."""
# ruff: noqa: E501 - PTX has long lines

import re
import struct

import pytest
import torch

from tests.gpu import build, ptx, syntax
from tests.gpu.program import INIT_FENCES, RACES, UNINITIALISED, Emulated, set_ranges
from tests.test_gpu_machine import (
    BARRIER,
    CLUSTER,
    FP8,
    GENERIC,
    MEET,
    SHARED,
    WAIT,
    Kernel,
    cluster_kernel,
    maps,
    tensor_map,
    tma_kernel,
    wgmma_kernel,
    words,
)  # fmt: skip

OUT = 512  # words


def simple(name: str, body: str, **kwargs) -> Kernel:
    """%r3: the thread's word of a tile in shared memory; %r4: that of the warp's neighbour; %p1: thread 0."""
    head = """mov.u32 %r2, tile; shl.b32 %r5, %r0, 2; add.s32 %r3, %r2, %r5; xor.b32 %r5, %r5, 128; add.s32 %r4, %r2, %r5;
setp.eq.u32 %p1, %r0, 0; setp.lt.u32 %p5, %r0, 32; """
    return Kernel(name, head + body, shared=SHARED, **kwargs)


STORE, READ, OWN = (
    "st.shared.u32 [%r3], %r0;",
    "ld.shared.u32 %r6, [%r4]; st.global.u32 [%d9], %r6;",
    "ld.shared.u32 %r6, [%r3];",
)
LANE = "xor.b32 %r7, %r3, 4;"  # the word of the lane beside
MAXNREG = ".maxntid 256"
CASES = {  # name: (kernel's body, threads, words of the message; "": it must run)
    "barrier": (f"{STORE} bar.sync 0; {READ}", 64, ""),
    "no barrier": (f"@%p5 {STORE} @!%p5 ld.shared.u32 %r6, [%r4];", 64, "wrote, and no barrier|has read, and no barrier"),
    "barrier of one warp": (f"{STORE} @%p5 bar.sync 1, 32; {READ}", 64, "race"),
    "written after it is read": (f"{STORE} bar.sync 0; {READ} {STORE}", 64, ""),  # the same value
    "overwritten while it is read": (
        f"{STORE} bar.sync 0; @%p5 ld.shared.u32 %r6, [%r4]; @!%p5 st.shared.u32 [%r3], 7;", 64, "has read, and no barrier|wrote, and no barrier"),
    "overwritten after a barrier": (f"{STORE} bar.sync 0; {READ} bar.sync 0; st.shared.u32 [%r3], 7;", 64, ""),
    "two warps write": ("shl.b32 %r5, %r0, 2; and.b32 %r5, %r5, 127; add.s32 %r5, %r2, %r5; st.shared.u32 [%r5], %r0;", 64, "race: .* writes"),
    "two warps write the same": ("st.shared.u32 [%r2], 5; ld.shared.u32 %r6, [%r2];", 64, ""),
    "atomics": ("atom.shared.add.u32 %r6, [%r2], 1; bar.sync 0; ld.shared.u32 %r6, [%r2];", 64, ""),
    "lanes without bar.warp.sync": (f"{LANE} {STORE} ld.shared.u32 %r6, [%r7];", 32, "no bar.warp.sync"),
    "lanes with bar.warp.sync": (f"{LANE} {STORE} bar.warp.sync -1; ld.shared.u32 %r6, [%r7];", 32, ""),
    "a lane overwrites": (f"{LANE} {STORE} bar.warp.sync -1; ld.shared.u32 %r6, [%r7]; st.shared.u32 [%r3], 7;", 32, "has read, and no bar.warp.sync"),
    "a lane overwrites after a shuffle": (
        f"{LANE} {STORE} bar.warp.sync -1; ld.shared.u32 %r6, [%r7]; shfl.sync.idx.b32 %r6, %r6, 0, 31, -1; st.shared.u32 [%r3], 7;", 32, ""),
    "shared memory that nothing has written": (f"{OWN} st.global.u32 [%d9], %r6;", 32, "nothing has written"),
    "a register that nothing has written": ("@%p1 add.s32 %r8, %r0, 1; add.s32 %r8, %r8, 1; st.global.u32 [%d9], %r8;", 32, "lane 1 reads a register"),
    "a register written on both ways": ("@%p1 mov.u32 %r8, 1; @!%p1 mov.u32 %r8, 2; add.s32 %r8, %r8, 1; st.global.u32 [%d9], %r8;", 32, ""),
    "past the end of a tensor": ("st.global.u32 [%d9+2048], %r0;", 32, "4 bytes past the end of tensor 0"),
    "before a tensor": ("sub.s64 %d9, %d9, 64; st.global.u32 [%d9], %r0;", 32, "bytes before tensor 0"),
    "a misaligned address": ("ld.shared.v2.u32 {%r6, %r8}, [%r3];", 32, "misaligned"),
    "past the shared memory": ("ld.shared.u32 %r6, [%r3+16384];", 32, "past the end"),
    "half a warp at a barrier": ("setp.lt.u32 %p2, %r0, 16; @%p2 bra A_{n}; bra B_{n}; A_{n}: bar.sync 0; B_{n}: bar.sync 0;", 64, "lanes 0x"),
    "lanes missing in a shuffle": ("setp.lt.u32 %p2, %r0, 16; @!%p2 bra B_{n}; shfl.sync.bfly.b32 %r6, %r0, 1, 31, -1; B_{n}: bar.warp.sync -1;", 32, "mask names"),
    "a lane outside its mask": ("shfl.sync.bfly.b32 %r6, %r0, 1, 31, 0xffff;", 32, "not in its own mask"),
    "a barrier that never opens": ("@%p5 bra B_{n}; bar.sync 1, 64; B_{n}: mov.u32 %r6, 0;", 64, "deadlock.*barrier 1 .32 of 64 threads"),
    "a barrier of 48 threads": ("bar.sync 1, 48;", 64, "multiple of 32"),
    "no mbarrier": ("mov.u32 %r20, barrier; mbarrier.arrive.shared::cta.b64 _, [%r20];", 32, "no mbarrier"),
    "more arrivals than counted": (f"{BARRIER} bar.sync 0; mbarrier.arrive.shared::cta.b64 _, [%r20], 2;", 32, "more arrivals"),
    "an mbarrier that is never met": (f"{BARRIER} bar.sync 0; " + WAIT, 32, "deadlock.*mbarrier.try_wait"),
    "cp.async": ("cp.async.ca.shared.global [%r3], [%d9], 4; cp.async.commit_group; cp.async.wait_group 0; ld.shared.u32 %r6, [%r3];", 32, ""),
    "cp.async is not awaited": ("cp.async.ca.shared.global [%r3], [%d9], 4; cp.async.commit_group; ld.shared.u32 %r6, [%r3];", 32, "asynchronous copy still writes"),
    "registers that the block lacks": ("setmaxnreg.inc.sync.aligned.u32 256;", 64, "deadlock.*setmaxnreg"),
    "registers that others gave": ("@%p5 bra A_{n}; setmaxnreg.dec.sync.aligned.u32 240; bra B_{n}; A_{n}: setmaxnreg.inc.sync.aligned.u32 256; B_{n}: mov.u32 %r6, 0;", 64, ""),
    "more registers after more": ("setmaxnreg.inc.sync.aligned.u32 64;", 32, "asks for more"),
    "a trap": ("@%p1 trap;", 32, "trap at PTX line"),
    "a stale load": ("st.global.u32 [%d9], %r0; ld.global.nc.u32 %r6, [%d9];", 32, "non-coherent"),
    "another load": ("st.global.u32 [%d9], %r0; ld.global.nc.u32 %r6, [%d9+128];", 32, ""),
}  # fmt: skip
KERNELS = {
    name: simple(f"check{i}", body.replace("{n}", f"check{i}").replace("{0}", f"check{i}"), directives=MAXNREG)
    for i, (name, (body, _, _)) in enumerate(CASES.items())
}


def refused(words_: str, launch):
    if not words_:
        return launch()
    with pytest.raises(RuntimeError, match="(?s)" + words_):
        launch()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_check(name, seed):
    body, threads, message = CASES[name]
    out = torch.zeros(OUT, dtype=torch.int32)
    refused(
        message,
        lambda: KERNELS[name](out, block=threads, seed=seed, checks=RACES | UNINITIALISED * ("nothing" in name)),
    )


# ---- wgmma, and what it reads through the asynchronous proxy
WGMMA = {
    "right": (wgmma_kernel("w0", FP8, 64), ""),
    "no fence": (wgmma_kernel("w1", FP8, 64, before=""), "no wgmma.fence comes before"),
    "an accumulator changes after the fence": (
        wgmma_kernel("w2", FP8, 64, before="wgmma.fence.sync.aligned; add.f32 %f3, %f3, %f3;"), "an accumulator was used"),
    "no wait": (wgmma_kernel("w3", FP8, 64, after=""), "has not been waited for"),
    "one group too few": (wgmma_kernel("w4", FP8, 64, after="wgmma.wait_group.sync.aligned 1;"), "has not been waited for"),
    "no proxy fence": (wgmma_kernel("w5", FP8, 64, fence=""), "without fence.proxy.async since"),
    "no barrier": (wgmma_kernel("w6", FP8, 64, barrier=""), "race|without fence"),
}  # fmt: skip


@pytest.mark.parametrize("name", WGMMA)
def test_wgmma(name):
    kernel, message = WGMMA[name]
    x = torch.randn(128, 128, generator=torch.Generator().manual_seed(2)).to(torch.float8_e4m3fn)
    refused(message, lambda: kernel(x.view(torch.uint8), torch.zeros(128, 32), block=128, seed=1))


# ---- TMA
STORE_OUT = """@%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d1, {%r22, %r23}], [%r21];
@%p1 cp.async.bulk.commit_group; """
TMA = {
    "right": (tma_kernel("t0"), ""),
    "not awaited": (tma_kernel("t1", wait=""), "asynchronous copy still writes"),
    "more bytes are expected": (tma_kernel("t2", expect=4112), "deadlock.*try_wait"),
    "the mbarrier is not fenced": (
        tma_kernel("t3", before="@%p1 mbarrier.inval.shared::cta.b64 [%r20]; @%p1 mbarrier.init.shared::cta.b64 [%r20], 1;"),
        "without fence.proxy.async"),
    "over what a lane has read": (
        tma_kernel("t4", before="shl.b32 %r9, %r0, 2; add.s32 %r9, %r9, %r21; st.shared.u32 [%r9], 1; bar.warp.sync -1; ld.shared.u32 %r10, [%r9];", barrier=""), "asynchronous copy writes .* has read"),
    "a store without a proxy fence": (
        tma_kernel("t5", after="st.shared.u32 [%r21], 5; " + STORE_OUT + "@%p1 cp.async.bulk.wait_group 0;"), "without fence.proxy.async"),
    "a store that is not awaited": (tma_kernel("t6", after="fence.proxy.async.shared::cta; " + STORE_OUT), "ends before its bulk copy"),
    "the source changes under a store": (
        tma_kernel("t7", after="fence.proxy.async.shared::cta; " + STORE_OUT + "@%p1 st.shared.u32 [%r21], 5; @%p1 cp.async.bulk.wait_group 0;"),
        "without fence.proxy.async"),
    "a misplaced tile": (tma_kernel("t8", before="add.s32 %r21, %r21, 128;"), "not aligned to its swizzle"),
}  # fmt: skip


@pytest.mark.parametrize("name", TMA)
def test_tma(name):
    kernel, message = TMA[name]
    x, y, out = words(1024).view(32, 32), words(2048).view(64, 32), torch.zeros(1024, dtype=torch.int32)
    maps_ = [tensor_map(t, (32, 32), 3) for t in (x, y)]
    checks = RACES | (INIT_FENCES if "fenced" in name else 0)
    refused(message, lambda: kernel(*maps_, out, reached=(x, y), checks=checks))


def test_changed_tensor_map():
    """The kernel makes a map and uses it at once."""
    text = maps.text.replace("entry maps", "entry changed").replace("fence.proxy.tensormap::generic.acquire.gpu [%d1], 128;", BARRIER + """
mov.u32 %r21, tile; mov.u32 %r22, 0; @%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 512;
@%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r21], [%d1, {%r22, %r22}], [%r20];""")  # fmt: skip
    kernel = Emulated(ptx.Module(".version 9.0\n" + text), "changed")
    x, made = words(256), tensor_map(torch.zeros(1, 1), (1, 1))
    set_ranges([x, made])
    with pytest.raises(RuntimeError, match="no fence.proxy.tensormap acquires it"):
        kernel.launch((1, 1, 1), (32, 1, 1), 0, struct.pack("2Q", x.data_ptr(), made.data_ptr()))


# ---- more than one block, or launch
CLUSTERS = {
    "the peer has not written": (cluster_kernel("c1", meet=""), "race|no mbarrier"),
    "a relaxed arrival": (cluster_kernel("c2", meet=MEET.replace("arrive", "arrive.relaxed")), "race"),
    "the peer has ended": (Kernel("c3", f"{CLUSTER} {MEET} setp.eq.u32 %p2, %r1, 1; @%p2 ret; nanosleep.u32 9; nanosleep.u32 9; " +
                                  "mapa.shared::cluster.u32 %r8, %r6, %r4; st.shared::cluster.u32 [%r8], %r0;", 1,
                                  ".reqnctapercluster 2, 1, 1", SHARED), "has ended"),
    "the peer has ended, by a generic address": (
        Kernel("c4", f"{CLUSTER} {MEET} setp.eq.u32 %p2, %r1, 1; @%p2 ret; nanosleep.u32 9; nanosleep.u32 9; " +
               f"{GENERIC} st.u32 [%d3], %r0;", 1, ".reqnctapercluster 2, 1, 1", SHARED), "has ended"),
}  # fmt: skip
PUBLISH = """setp.eq.u32 %p1, %r1, 0; add.s64 %d3, %d0, 2044; @!%p1 bra OTHER_{n};
st.global.u32 [%d0], 5; {fence} st.{release}.gpu.global.u32 [%d3], 1; ret;
OTHER_{n}: ld.{acquire}.gpu.global.u32 %r6, [%d3]; setp.eq.u32 %p2, %r6, 0; @%p2 bra OTHER_{n}; {fence} ld.global.u32 %r7, [%d0]; st.global.u32 [%d0+4], %r7;"""
BLOCKS = {
    ("release", "acquire", ""): "",
    ("relaxed", "acquire", ""): "no release and acquire",
    ("release", "relaxed", ""): "no release and acquire",
    ("relaxed", "relaxed", "membar.gl;"): "",
    ("relaxed", "relaxed", "fence.acq_rel.gpu;"): "",
    ("relaxed", "relaxed", "membar.cta;"): "no release and acquire",
}  # fmt: skip
PUBLISHED = {
    k: Kernel(f"publish{i}", PUBLISH.format(n=i, release=k[0], acquire=k[1], fence=k[2])) for i, k in enumerate(BLOCKS)
}
WRITER = Kernel("writer", "st.global.u32 [%d9], %r0; griddepcontrol.launch_dependents;")
READERS = {
    "waits": (Kernel("reader0", "griddepcontrol.wait; ld.global.u32 %r2, [%d9];"), ""),
    "reads before": (Kernel("reader1", "ld.global.u32 %r2, [%d9]; griddepcontrol.wait;"), "reads .* before griddepcontrol.wait"),
    "writes before": (Kernel("reader2", "st.global.u32 [%d9], %r0; griddepcontrol.wait;"), "writes .* before griddepcontrol.wait"),
    "never waits": (Kernel("reader4", "st.global.u32 [%d9+512], %r0;"), "never executes griddepcontrol.wait"),
    "reads others before": (Kernel("reader3", "ld.global.u32 %r2, [%d9+512]; griddepcontrol.wait;"), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", CLUSTERS)
def test_cluster(name):
    kernel, message = CLUSTERS[name]
    refused(message, lambda: kernel(torch.zeros(OUT, dtype=torch.int32), grid=2))


@pytest.mark.parametrize("order", BLOCKS, ids="-".join)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_release_and_acquire(order, seed):
    out = torch.zeros(OUT, dtype=torch.int32)
    refused(BLOCKS[order], lambda: PUBLISHED[order](out, grid=2, cooperative=True, seed=seed))


@pytest.mark.parametrize("name", READERS)
def test_overlapping_launches(name):
    kernel, message = READERS[name]
    out = torch.zeros(OUT, dtype=torch.int32)
    WRITER(out)
    refused(message, lambda: kernel(out, overlaps=True))
    WRITER(out)
    kernel(out)  # in stream order


def test_launches_that_a_gpu_refuses():
    out = torch.zeros(OUT, dtype=torch.int32)
    right = KERNELS["barrier"]
    for kwargs, message in (
        (dict(block=288), "288 threads"),
        (dict(shared=230000), "shared memory"),
        (dict(grid=3, cluster=(2, 1, 1)), "clusters"),
    ):
        with pytest.raises(RuntimeError, match=message):
            right(out, **kwargs)


UNKNOWN = """addc.u32 %r2, %r0, %r0 | add.cc.u32 %r2, %r0, %r0 | add.sat.s32 %r2, %r0, %r0 | multimem.red.f32 [%d0], %f1
fma.rp.f64 %d1, %d2, %d3, %d4 | fma.rn.relu.f16 %h1, %h2, %h3, %h4 | mad.rn.f32 %f1, %f2, %f3, %f4 | add.ftz.f16 %h1, %h2, %h3
max.ftz.f32 %f1, %f2, %f3 | div.rz.f32 %f1, %f2, %f3 | prmt.b32.f4e %r2, %r0, %r1, 0 | cvt.rz.f32.s32 %f1, %r0
cvt.rna.tf32.f32 %r2, %f1 | setp.lt.ftz.f32 %p1, %f1, %f2 | ld.acquire.cta.global.u32 %r2, [%d0] | st.async.u32 [%d0], %r0, [%d1]
cvta.shared::cta.u64 %d1, %d2 | fence.proxy.async.global | fence.sc.cta | match.all.sync.b32 %r2, %r0, -1 | vote.sync.uni.pred %p1, %p2, -1
mbarrier.arrive.noComplete.shared.b64 %d1, [%r0], 1 | cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.tile.bulk_group [%d0, {%r0, %r1}], [%r2]
wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.bf16.bf16 {%f0}, %d0, %d1, %r0, 0, 1, 1, 1 | atom.global.add.noftz.f16 %h1, [%d0], %h2"""


@pytest.mark.parametrize("text", re.split(r" \| |\n", UNKNOWN))
def test_unknown_instructions_are_refused_by_name(text):
    kernel = ".version 9.0\n.target sm_90a\n" + Kernel("unknown", text + ";").text
    del Kernel.all["unknown"]
    with pytest.raises(NotImplementedError, match=re.escape(text)):
        Emulated(ptx.Module(kernel), "unknown")


def test_modifiers_that_are_not_implemented_are_refused():
    """Each form of csrc/'s kernels with one modifier more."""
    if build.missing():
        pytest.skip(f"csrc/ needs {build.missing()}")
    texts = [f.read_text() for f in build.compile_module("_C", "")[1]]
    entries = [m.entry(name) for m in map(ptx.Module, texts) for name in m.heads]
    forms = {tuple(c.op) for e in entries for b in e.blocks for c in b.code}
    assert len(forms) > 100 and not any(syntax.unknown(*op) for op in forms)
    for op in forms:
        for i in range(1, len(op) + 1):
            for alien in ("xorsign", "abs", "relu", "noftz", "sp", "cc", "nonsense"):
                more = (*op[:i], alien, *op[i:])
                assert f".{alien}" in syntax.unknown(*more), more


def test_messages_name_the_source_line():
    text = KERNELS["a misaligned address"].text.replace(
        "ld.shared.v2", ".loc 1 17 5, function_name $L1, inlined_at 2 30 1\nld.shared.v2"
    )
    files = '.file 1 "/home/x/csrc/a.cuh"\n.file 2 "/home/x/csrc/gemm/b.cu"\n'
    kernel = Emulated(ptx.Module(".version 9.0\n" + files + text), KERNELS["a misaligned address"].name)
    out = torch.zeros(OUT, dtype=torch.int32)
    set_ranges([out])
    with pytest.raises(RuntimeError, match=r"csrc/a.cuh:17 \(in csrc/gemm/b.cu:30\), PTX line \d+: ld.shared.v2"):
        kernel.launch((1, 1, 1), (64, 1, 1), 0, struct.pack("Q", out.data_ptr()))
