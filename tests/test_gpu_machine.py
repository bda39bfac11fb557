"""The virtual GPU's machine: memory, collectives, barriers and asynchronous units against independent definitions, and
each check against PTX that it must refuse. The kernels are small PTX texts of one module, compiled together."""
# ruff: noqa: E501 - PTX has long lines

import functools
import operator
import shutil
import struct

import pytest
import torch

if shutil.which("g++") is None:
    pytest.skip("the virtual GPU needs g++", allow_module_level=True)

from tests.gpu import ptx
from tests.gpu.counters import by_line, counting, of_lines
from tests.gpu.program import NARROW_SUMS, RACES, Emulated, Operations, set_ranges, translated

REGISTERS = """.reg .pred %p<16>; .reg .b16 %h<32>; .reg .b32 %r<160>; .reg .b64 %d<32>; .reg .f32 %f<160>;
mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; """
ELEMENTS = dict(f32="7", bf16="10", u8="0")


class Kernel:
    """A kernel with pointers %d0, %d1, ...; %r0 is the thread, %r1 the block, %d9 the thread's word of the last pointer."""

    all: dict[str, "Kernel"] = {}

    def __init__(self, name: str, body: str, params: int = 1, directives: str = "", shared: str = ""):
        self.name, self.params, self.ready = name, params, None
        names = ", ".join(f".param .u64 p{i}" for i in range(params))
        loads = " ".join(f"ld.param.u64 %d{i}, [p{i}];" for i in range(params))
        own = f"mad.lo.s32 %r9, %r1, 128, %r0; mul.wide.u32 %d9, %r9, 4; add.s64 %d9, %d9, %d{params - 1};"
        self.text = (
            f".visible .entry {name}({names}) {directives}\n{{\n{shared}{REGISTERS}{loads} {own}\n{body}\nret;\n}}\n"
        )
        Kernel.all[name] = self

    def __call__(self, *tensors, grid=1, block=32, shared=0, reached=(), **kwargs):
        """Launches with `tensors` as arguments, and returns the last; through maps the kernel may reach others."""
        if self.ready is None:
            text = ".version 9.0\n.target sm_90a\n.address_size 64\n" + "".join(k.text for k in Kernel.all.values())
            module = ptx.Module(text)
            Operations.addresses({text for name in Kernel.all for text in translated(module, name)[1]})
            for kernel in Kernel.all.values():
                kernel.ready = Emulated(module, kernel.name)
        set_ranges([*tensors, *reached])
        params = struct.pack(f"{len(tensors)}Q", *(t.data_ptr() for t in tensors))
        kwargs.setdefault("checks", RACES)
        self.ready.launch((grid, 1, 1), (block, 1, 1), shared, params, **kwargs)
        return tensors[-1]


def words(n: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(seed)).to(torch.int32)


# ---- names of inline assembly: each scope has its own labels and registers
scopes = Kernel("scopes", "mov.u32 %r2, 0; " + "".join(f"""{{
.reg .pred q; AGAIN: add.s32 %r2, %r2, {step}; setp.ge.s32 q, %r2, {end};
@q bra DONE; bra AGAIN; DONE:
}} """ for step, end in ((1, 3), (10, 30))) + "st.global.u32 [%d9], %r2;")  # fmt: skip


def test_labels():
    assert scopes(torch.zeros(128, dtype=torch.int32))[0] == 33


# ---- of a warp
shuffles = Kernel("shuffles", """
ld.global.u32 %r2, [%d9];
shfl.sync.up.b32 %r3|%p1, %r2, 3, 0, -1; st.global.u32 [%d9+512], %r3; selp.u32 %r4, 1, 0, %p1; st.global.u32 [%d9+1024], %r4;
shfl.sync.down.b32 %r3|%p1, %r2, 5, 31, -1; st.global.u32 [%d9+1536], %r3;
shfl.sync.bfly.b32 %r3, %r2, 12, 31, -1; st.global.u32 [%d9+2048], %r3;
shfl.sync.idx.b32 %r3, %r2, 2, 0x1807, -1; st.global.u32 [%d9+2560], %r3;
setp.lt.s32 %p2, %r2, 0; vote.sync.ballot.b32 %r3, %p2, -1; st.global.u32 [%d9+3072], %r3;
and.b32 %r4, %r2, 3; match.any.sync.b32 %r3, %r4, -1; st.global.u32 [%d9+3584], %r3;
redux.sync.max.s32 %r3, %r2, -1; st.global.u32 [%d9+4096], %r3;
redux.sync.add.s32 %r3, %r2, -1; st.global.u32 [%d9+4608], %r3;
""")  # fmt: skip


def test_shuffles():
    x = torch.cat([words(32), torch.zeros(9 * 128 + 96, dtype=torch.int32)])
    out = shuffles(x).view(10, 128)[1:, :32]
    v, lane = x[:32], torch.arange(32)
    bits = 1 << torch.arange(32)
    wanted = [
        v[torch.where(lane >= 3, lane - 3, lane)], lane >= 3, v[torch.where(lane + 5 < 32, lane + 5, lane)], v[lane ^ 12],
        v[lane // 8 * 8 + 2], ((v < 0) * bits).sum(), (((v & 3)[None] == (v & 3)[:, None]) * bits).sum(1), v.max(), v.sum(),
    ]  # fmt: skip
    for got, want in zip(out, wanted, strict=True):
        assert torch.equal(got, want.to(torch.int32).expand(32))


joined = Kernel("joined", f"""ld.global.u32 %r2, [%d9];
setp.eq.u32 %p2, %r2, 3; vote.sync.any.pred %p3, %p2, -1; selp.u32 %r3, 1, 0, %p3; st.global.u32 [%d9+512], %r3;
vote.sync.all.pred %p3, %p2, -1; selp.u32 %r3, 1, 0, %p3; st.global.u32 [%d9+1024], %r3;
elect.sync %r3|%p4, -1; selp.u32 %r4, 100, 0, %p4; add.s32 %r4, %r4, %r3; st.global.u32 [%d9+1536], %r4;
{"".join(f"redux.sync.{how} %r3, %r2, -1; st.global.u32 [%d9+{2048 + 512 * i}], %r3; " for i, how in enumerate(
    ("min.s32", "min.u32", "max.u32", "add.u32", "and.b32", "or.b32", "xor.b32")))}
""")  # fmt: skip


def test_votes_and_reductions():
    v = words(32) & 0x7FFFFFFF | -(2**31) * (torch.arange(32) % 2).to(torch.int32)
    for has_three in (False, True):
        v[5] = 3 if has_three else 4
        got = joined(torch.cat([v, torch.zeros(10 * 128 + 96, dtype=torch.int32)])).view(11, 128)[1:, :32]
        unsigned = v.long() & 2**32 - 1
        bits = [functools.reduce(f, v.tolist()) for f in (operator.and_, operator.or_, operator.xor)]
        leader = got[2].tolist()  # one lane, whose number all know
        assert sum(x >= 100 for x in leader) == 1 and {x % 100 for x in leader} == {
            [x >= 100 for x in leader].index(True)
        }
        want = [has_three, False, v.min(), unsigned.min(), unsigned.max(), unsigned.sum(), *bits]
        for row, x in zip(got[[0, 1, *range(3, 10)]], want, strict=True):
            assert ((row.long() - int(x)) % 2**32 == 0).all()


votes = Kernel("votes", """setp.lt.u32 %p1, %r0, 70; setp.lt.u32 %p2, %r0, 64;
bar.red.popc.u32 %r2, 0, %p1; st.global.u32 [%d9], %r2;
bar.red.and.pred %p3, 0, %p1; selp.u32 %r2, 1, 0, %p3; st.global.u32 [%d9+512], %r2;
bar.red.or.pred %p3, 0, %p1; selp.u32 %r2, 1, 0, %p3; st.global.u32 [%d9+1024], %r2;
mov.u32 %r3, tile; shl.b32 %r4, %r0, 2; add.s32 %r3, %r3, %r4; @!%p2 bra WAIT_votes;
st.shared.u32 [%r3], %r0; bar.arrive 1, 128; bra END_votes;
WAIT_votes: bar.sync 1, 128; ld.shared.u32 %r2, [%r3+-256]; st.global.u32 [%d9+1536], %r2;
END_votes: mov.u32 %r2, 0;""", shared=".shared .align 16 .b8 tile[512]; ")  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_barriers(seed):
    """Votes of a block; two warps go on, and the two that wait for them see what they wrote."""
    count, every, some, seen = votes(torch.zeros(4 * 128, dtype=torch.int32), block=128, seed=seed).view(4, 128)
    assert (count == 70).all() and not every.any() and some.all()
    assert torch.equal(seen[64:], torch.arange(64, dtype=torch.int32))


# ---- matrix products
MMA = {
    kind: Kernel(f"mma_{kind}", f"""
mul.wide.u32 %d3, %r0, 16; add.s64 %d4, %d0, %d3; ld.global.v4.u32 {{%r2, %r3, %r4, %r5}}, [%d4];
mul.wide.u32 %d5, %r0, 8; add.s64 %d4, %d1, %d5; ld.global.v2.u32 {{%r6, %r7}}, [%d4];
mov.f32 %f1, 0f3F800000; add.s64 %d4, %d2, %d3;
mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {{%f2, %f3, %f4, %f5}}, {{%r2, %r3, %r4, %r5}}, {{%r6, %r7}}, {{%f1, %f1, %f1, %f1}};
st.global.v4.f32 [%d4], {{%f2, %f3, %f4, %f5}};
""", 3) for kind in ("bf16", "f16")
}  # fmt: skip


def fragments(x: torch.Tensor, rows: int) -> torch.Tensor:
    """[rows, 16] of two bytes -> a lane's registers: row l / 4 (and 8 below), two columns at 2 (l % 4) (and 8 further)."""
    x = x.view(rows // 8, 8, 2, 4, 2)  # row half, row, column half, column pair, element
    return x.permute(1, 3, 2, 0, 4).reshape(32, -1).contiguous()


@pytest.mark.parametrize("kind", MMA)
def test_mma(kind):
    generator = torch.Generator().manual_seed(1)
    dtype = dict(bf16=torch.bfloat16, f16=torch.float16)[kind]
    a, b = (torch.randn(n, 16, generator=generator).to(dtype) for n in (16, 8))
    got = MMA[kind](fragments(a, 16), fragments(b, 8), torch.zeros(32, 4))
    got = got.view(8, 4, 2, 2).permute(2, 0, 1, 3).reshape(16, 8)
    torch.testing.assert_close(got, a.float() @ b.float().T + 1, rtol=1e-6, atol=1e-5)


LINES = 1, 1, 64, 2


# A tile of K-major rows of 128 bytes with 128-byte swizzle for each operand; D [64, n]
def wgmma_kernel(name: str, shape: str, n: int, before="wgmma.fence.sync.aligned;", after="wgmma.wait_group.sync.aligned 0;",
                 fence="fence.proxy.async.shared::cta;", barrier="bar.sync 0;", flags="", a=LINES, b=LINES):  # fmt: skip
    """a, b: of a descriptor, in units of 16 bytes: swizzle, leading and stride offset; the way to the second step of K."""
    d = ", ".join(f"%f{i}" for i in range(n // 2))
    stores = " ".join(f"st.global.f32 [%d10+{4 * i}], %f{i};" for i in range(n // 2))
    copy = (
        """mov.u32 %r2, tile; mov.u32 %r3, %r0;
LOOP_NAME: shl.b32 %r4, %r3, 4; cvt.u64.u32 %d3, %r4; add.s64 %d3, %d0, %d3; ld.global.v4.u32 {%r5, %r6, %r7, %r8}, [%d3];
shr.u32 %r10, %r4, 3; and.b32 %r10, %r10, MASK; xor.b32 %r10, %r10, %r4; add.s32 %r10, %r2, %r10;
st.shared.v4.u32 [%r10], {%r5, %r6, %r7, %r8}; add.s32 %r3, %r3, 128; setp.lt.u32 %p1, %r3, CHUNKS; @%p1 bra LOOP_NAME;
""".replace("LOOP_NAME", f"LOOP_{name}")
        .replace("CHUNKS", str(8 * (64 + n)))
        .replace("MASK", ("0", "0x70", "0x30", "0x10")[a[0]])
    )
    da, db = (hex(swizzle << 62 | stride << 32 | leading << 16) for swizzle, leading, stride, _ in (a, b))
    return Kernel(name, f"""{copy} {fence} {barrier}
shr.u32 %r11, %r2, 4; cvt.u64.u32 %d5, %r11; or.b64 %d4, %d5, {da}; add.s64 %d5, %d5, 512; or.b64 %d5, %d5, {db};
setp.eq.u32 %p2, 0, 0; setp.ne.u32 %p3, 0, 0; mul.wide.u32 %d6, %r0, {2 * n}; add.s64 %d10, %d1, %d6; {before}
wgmma.mma_async.sync.aligned.{shape} {{{d}}}, %d4, %d5, %p3, 1, 1{flags};
add.s64 %d4, %d4, {a[3]}; add.s64 %d5, %d5, {b[3]};
wgmma.mma_async.sync.aligned.{shape} {{{d}}}, %d4, %d5, %p2, 1, 1{flags};
wgmma.commit_group.sync.aligned; {after} {stores}""", 2, shared=f".shared .align 1024 .b8 tile[{128 * (64 + n)}]; ")  # fmt: skip


FP8, BF16 = "m64n64k32.f32.e4m3.e4m3", "m64n64k16.f32.bf16.bf16"
PRODUCTS = {
    (kind, n): wgmma_kernel(f"wgmma_{kind}_{n}", f"m64n{n}k{k}.f32.{kind}.{kind}", n, flags=flags)
    for kind, k, flags, widths in (
        ("e4m3", 32, "", (16, 32, 64, 128)), ("e5m2", 32, "", (24,)),
        ("bf16", 16, ", 0, 0", (16, 32, 64, 128, 256)), ("f16", 16, ", 0, 0", (16, 32, 64, 128)),
    )
    for n in widths
}  # fmt: skip
wgmma_fp8 = PRODUCTS["e4m3", 64]


def result(out: torch.Tensor, n: int) -> torch.Tensor:
    """A lane's accumulators -> [64, n]: ISA 9.7.15.5.1, row 16 warp + lane / 4 (+ 8), columns 8 j + 2 (lane % 4) (+ 1)."""
    return out.view(4, 8, 4, n // 8, 2, 2).permute(0, 4, 1, 3, 2, 5).reshape(64, n)


@pytest.mark.parametrize("kind, n", PRODUCTS)
def test_wgmma(kind, n):
    dtype = dict(e4m3=torch.float8_e4m3fn, e5m2=torch.float8_e5m2, bf16=torch.bfloat16, f16=torch.float16)[kind]
    x = torch.randn(64 + n, 128 // dtype.itemsize, generator=torch.Generator().manual_seed(2)).to(dtype)
    k = 64 // dtype.itemsize
    for seed in (0, 1):
        got = result(PRODUCTS[kind, n](x.view(torch.uint8), torch.zeros(128, n // 2), block=128, seed=seed), n)
        torch.testing.assert_close(got, x[:64, :k].float() @ x[64:, :k].float().T, rtol=1e-5, atol=1e-5)


def test_narrow_sums():
    """14 bits after alignment to the largest term: one large product makes small ones vanish."""
    x = torch.zeros(128, 128).to(torch.float8_e4m3fn)
    x[:64, :32], x[64:, :32] = 0.25, 0.25
    x[:64, 0], x[64:, 0] = 448, 448
    for checks, want in ((0, 448**2 + 31 / 16), (NARROW_SUMS, 448**2)):
        got = wgmma_fp8(x.view(torch.uint8), torch.zeros(128, 32), block=128, checks=checks)
        assert (result(got, 64) == want).all()


# ---- bulk copies
def tensor_map(t: torch.Tensor, box: tuple[int, ...], swizzle: int = 0) -> torch.Tensor:
    """As machine/tensor_map.h; sizes and box innermost first."""
    sizes, strides = t.shape[::-1], [s * t.element_size() for s in t.stride()[::-1]][1:]
    pad = lambda values, n: [*values, *[0] * (n - len(values))]  # noqa: E731
    data = struct.pack("2Q4I10I4Q", 0x7031746D61707478, t.data_ptr(), t.dim(), t.element_size(), swizzle, 0,
                       *pad(sizes, 5), *pad(box, 5), *pad(strides, 4))  # fmt: skip
    storage = torch.zeros(256, dtype=torch.uint8)
    aligned = storage[-storage.data_ptr() % 128 :][:128]
    aligned[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    return aligned


BARRIER = """mov.u32 %r20, barrier; setp.eq.u32 %p1, %r0, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r20], 1; @%p1 fence.mbarrier_init.release.cluster; """
WAIT = """WAIT_{0}: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r20], 0; @!%p2 bra WAIT_{0};"""
LOAD = (
    "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r21], [%d0, {%r22, %r23}], [%r20];"
)
SHARED = ".shared .align 1024 .b8 tile[8192]; .shared .align 8 .b64 barrier; "
COPY_OUT = """mov.u32 %r30, 0; shl.b32 %r31, %r0, 2; add.s32 %r31, %r31, %r21; mul.wide.u32 %d3, %r0, 4; add.s64 %d3, %d2, %d3;
OUT_{0}: ld.shared.u32 %r32, [%r31]; st.global.u32 [%d3], %r32; add.s32 %r31, %r31, 128; add.s64 %d3, %d3, 128;
add.s32 %r30, %r30, 1; setp.lt.u32 %p3, %r30, 32; @%p3 bra OUT_{0};"""


def tma_kernel(
    name, before="", wait=WAIT, load=LOAD, expect=4096, barrier="bar.sync 0;", after="", params=3, last=COPY_OUT
):
    return Kernel(name, f"""{BARRIER} mov.u32 %r21, tile; mov.u32 %r22, 8; mov.u32 %r23, 20; {before} {barrier}
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], {expect}; @%p1 {load} {wait.format(name)}
{after} {last.format(name)}""", params, shared=SHARED)  # fmt: skip


def there_and_back(name: str, load: str) -> Kernel:
    return tma_kernel(name, load=load, after="""xor.b32 %r24, %r23, 20; fence.proxy.async.shared::cta; bar.sync 0;
@%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%d1, {%r24, %r24}], [%r21];
@%p1 cp.async.bulk.commit_group; @%p1 cp.async.bulk.wait_group.read 0; @%p1 cp.async.bulk.wait_group 0;""")  # fmt: skip


HINT = LOAD.replace("bytes", "bytes.L2::cache_hint").replace(";", ", %d3;")
LOADS = {"block": LOAD.replace("shared::cluster", "shared::cta"), "cluster": LOAD, "hint": HINT}
TMA = {name: there_and_back(f"tma_{name}", load) for name, load in LOADS.items()}
tma_3d = tma_kernel(
    "tma_3d",
    before="mov.u32 %r24, 1;",
    load=LOAD.replace("2d.shared::cluster", "3d.shared::cta").replace("%r23}", "%r23, %r24}"),
)


def test_tma_of_three_dimensions():
    x, out = words(4 * 30 * 40).view(4, 30, 40), torch.zeros(1024, dtype=torch.int32)
    got = tma_3d(tensor_map(x, (32, 16, 2)), tensor_map(x, (32, 16, 2)), out, reached=(x,)).view(2, 16, 32)
    want = torch.zeros_like(got)
    want[:, :10] = x[1:3, 20:, 8:]
    assert torch.equal(got, want)


@pytest.mark.parametrize("load", TMA)
@pytest.mark.parametrize("swizzle", [0, 1, 2, 3])
def test_tma(swizzle, load):
    """A box that reaches past the last row and column; it is stored again to another tensor."""
    width = (32, 8, 16, 32)[swizzle]  # words: a line of the swizzle
    box = (width, 1024 // width)
    x, y = words(30 * 32).view(30, 32), torch.full((box[1] + 3, width - 4), 7, dtype=torch.int32)
    maps = [tensor_map(t, box, swizzle) for t in (x, y)]
    out = torch.zeros(1024, dtype=torch.int32)
    got = TMA[load](*maps, out, reached=(x, y))
    want = torch.zeros(box[1], width, dtype=torch.int32)
    part = x[20:, 8 : 8 + width]
    want[: len(part), : part.shape[1]] = part
    address = torch.arange(256) * 16
    place = address ^ (address // 128 % 8 & (0, 1, 3, 7)[swizzle]) * 16
    assert torch.equal(got.view(256, 4)[place // 16], want.view(256, 4))
    assert torch.equal(y[: box[1]], want[:, : width - 4]) and (y[box[1] :] == 7).all()


maps = Kernel("maps", """mov.u32 %r20, tile; shl.b32 %r2, %r0, 2; add.s32 %r3, %r20, %r2; mov.u32 %r4, 0; st.shared.u32 [%r3], %r4;
bar.warp.sync -1; setp.eq.u32 %p1, %r0, 0;
@%p1 tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%r20], %d0; @%p1 tensormap.replace.tile.rank.shared::cta.b1024.b32 [%r20], 0x1;
@%p1 tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [%r20], 0x0, 32; @%p1 tensormap.replace.tile.box_dim.shared::cta.b1024.b32 [%r20], 0x1, 4;
@%p1 tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%r20], 0x0, 32; @%p1 tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%r20], 0x1, 8;
@%p1 tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%r20], 0x0, 128; @%p1 tensormap.replace.tile.elemtype.shared::cta.b1024.b32 [%r20], 0x2;
@%p1 tensormap.replace.tile.swizzle_mode.shared::cta.b1024.b32 [%r20], 0x0; @%p1 tensormap.replace.tile.fill_mode.shared::cta.b1024.b32 [%r20], 0x0;
@%p1 tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [%r20], 0x0, 1; @%p1 tensormap.replace.tile.element_stride.shared::cta.b1024.b32 [%r20], 0x1, 1;
@%p1 tensormap.replace.tile.interleave_layout.shared::cta.b1024.b32 [%r20], 0x0; bar.warp.sync -1;
tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%d1], [%r20], 128;
fence.proxy.tensormap::generic.acquire.gpu [%d1], 128;
""", 2, shared=SHARED)  # fmt: skip


def test_tensor_map_of_a_kernel():
    x, made = words(256).view(8, 32), tensor_map(torch.zeros(1, 1), (1, 1))
    maps(x, made)
    assert torch.equal(made, tensor_map(x, (32, 4)))


# ---- clusters
CLUSTER = """mov.u32 %r2, tile; mov.u32 %r20, barrier; setp.eq.u32 %p1, %r0, 0; mov.u32 %r3, %cluster_ctarank; xor.b32 %r4, %r3, 1;
@%p1 mbarrier.init.shared::cta.b64 [%r20], 33; fence.mbarrier_init.release.cluster; shl.b32 %r5, %r0, 2; add.s32 %r6, %r2, %r5;
"""
MEET = "barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;"
GENERIC = "cvt.u64.u32 %d2, %r6; cvta.shared.u64 %d2, %d2; mapa.u64 %d3, %d2, %r4;"  # the word of the other block


def cluster_kernel(name, meet=MEET, last="barrier.cluster.arrive; barrier.cluster.wait;"):
    return Kernel(name, f"""{CLUSTER} mul.lo.s32 %r7, %r3, 100; add.s32 %r7, %r7, %r0; st.shared.u32 [%r6], %r7; {meet}
mapa.shared::cluster.u32 %r8, %r6, %r4; ld.shared::cluster.u32 %r10, [%r8]; st.global.u32 [%d9], %r10;
{GENERIC} ld.u32 %r14, [%d3]; setp.ne.u32 %p7, %r14, %r10; @%p7 trap;
mapa.shared::cluster.u32 %r11, %r20, %r4; add.s32 %r12, %r8, 128; add.s32 %r13, %r7, 1000;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 128; setp.lt.u32 %p6, %r0, 16; @%p6 mbarrier.arrive.shared::cluster.b64 _, [%r11];
@!%p6 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r11];
st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%r12], %r13, [%r11]; {WAIT.format(name)}
ld.shared.u32 %r10, [%r6+128]; st.global.u32 [%d9+128], %r10; {last}""", 1, ".reqnctapercluster 2, 1, 1", SHARED)  # fmt: skip


clusters = cluster_kernel("clusters")


def multicast_kernel(name: str, hint: str, operand: str) -> Kernel:
    return Kernel(name, f"""{CLUSTER} @%p1 mbarrier.inval.shared::cta.b64 [%r20]; @%p1 mbarrier.init.shared::cta.b64 [%r20], 1;
{MEET} mov.u32 %r21, tile; mov.u32 %r22, 0; mov.u16 %h1, 3; setp.eq.u32 %p4, %r1, 0; and.pred %p4, %p4, %p1;
@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r20], 4096;
@%p4 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster{hint} [%r21], [%d0, {{%r22, %r22}}], [%r20], %h1{operand};
{WAIT.format(name)} ld.shared.u32 %r10, [%r6+1024]; st.global.u32 [%d9], %r10; {MEET}""", 2, ".reqnctapercluster 2, 1, 1", SHARED)  # fmt: skip


MULTICASTS = multicast_kernel("multicast", "", ""), multicast_kernel("multicast_hint", ".L2::cache_hint", ", %d3")


@pytest.mark.parametrize("seed", range(4))
def test_cluster(seed):
    out = clusters(torch.zeros(4 * 128, dtype=torch.int32), grid=4, seed=seed).view(4, 4, 32)[:, :2]
    lane = torch.arange(32, dtype=torch.int32)
    for block in range(4):
        peer = 100 * (1 - block % 2) + lane
        assert torch.equal(out[block], torch.stack([peer, peer + 1000]))


@pytest.mark.parametrize("multicast", MULTICASTS, ids=("plain", "hint"))
def test_multicast(multicast):
    x, out = words(1024).view(32, 32), torch.zeros(256, dtype=torch.int32)
    multicast(tensor_map(x, (32, 32)), out, grid=2, reached=(x,))  # both blocks get what block 0 loads
    assert torch.equal(out.view(2, 128)[:, :32], x[8].expand(2, 32))


# ---- counters, and blocks on several threads of the host
counted = Kernel("counted", """
mul.wide.u32 %d3, %r0, 32; add.s64 %d3, %d0, %d3; ld.global.u32 %r2, [%d3]; ld.global.u32 %r3, [%d0];
mov.u32 %r4, tile; shl.b32 %r5, %r0, 3; add.s32 %r5, %r4, %r5; st.shared.u32 [%r5], %r2; shl.b32 %r6, %r0, 2; add.s32 %r6, %r4, %r6;
st.shared.u32 [%r6], %r3; atom.global.add.u32 %r7, [%d1], 1;
""", 2, shared=SHARED)  # fmt: skip


@pytest.mark.parametrize("threads", [1, 2])
def test_counters(threads, monkeypatch):
    """Sums are the same however many threads run the blocks."""
    monkeypatch.setenv("LING_GPU_THREADS", str(threads))
    x, sum_ = words(256), torch.zeros(1, dtype=torch.int32)
    with counting() as kernels:
        counted(x, sum_, grid=40, checks=0, seed=threads - 1)
    assert sum_.item() == 40 * 32 and kernels == [counted.ready]
    total = of_lines(by_line(counted.ready))
    assert (total["sectors"], total["least_sectors"]) == (40 * (32 + 1 + 1), 40 * (4 + 1 + 1))
    assert (total["wavefronts"], total["least_wavefronts"]) == (40 * (2 + 1), 40 * (1 + 1))
    assert total["lsu"] == 40 * 7  # and two loads of parameters
