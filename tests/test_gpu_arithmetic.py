"""Arithmetic of the virtual GPU: each instruction on random numbers and edges, against Python's and numpy's numbers."""

import functools
import math
import os
import random
import shutil
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

if shutil.which("g++") is None:
    pytest.skip("the virtual GPU needs g++", allow_module_level=True)

from tests.gpu import ptx
from tests.gpu.program import Emulated, processor, set_ranges

N = 64  # lanes of the table's kernel
HEAD = ".version 9.0\n.target sm_90a\n.address_size 64\n"
REGISTERS = """.reg .pred %p<16>; .reg .b16 %h<32>; .reg .b32 %r<160>; .reg .b64 %d<32>; .reg .f32 %f<160>;
mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; """


def entry(name: str, body: str, params: int = 4, directives: str = "") -> str:
    """An entry with `params` pointers: %d0, %d1, ...; %r0 is the thread, %r1 the block."""
    names = ", ".join(f".param .u64 p{i}" for i in range(params))
    loads = " ".join(f"ld.param.u64 %d{i}, [p{i}];" for i in range(params))
    return f".visible .entry {name}({names}) {directives}\n{{\n{REGISTERS}{loads}\n{body}\nret;\n}}\n"


# ---- one instruction of numbers by lane: "instruction types of its operands -> result": a function of Python's numbers
def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


def f32(x: float) -> float:
    try:
        return struct.unpack("f", struct.pack("f", x))[0]
    except OverflowError:
        return math.copysign(math.inf, x)


def single(x: int) -> float:
    return struct.unpack("f", struct.pack("I", x & 0xFFFFFFFF))[0]


def clz(x: int, bits: int) -> int:
    return bits - x.bit_length()


def prmt(a, b, s):
    source = [(b << 32 | a) >> 8 * i & 255 for i in range(8)]
    picked = [(s >> 4 * i & 7, s >> 4 * i & 8) for i in range(4)]
    return sum((255 * (source[i] >> 7) if sign else source[i]) << 8 * k for k, (i, sign) in enumerate(picked))


def bfe(a, at, n, bits, sign):
    at, n = at & 255, n & 255
    if n == 0:
        return 0
    wide = signed(a, bits) if sign else a
    value = wide >> min(at, 200) & (1 << n) - 1
    return signed(value, n) if sign and n < 64 else value


def bfi(a, b, at, n, bits):
    at, n = at & 255, n & 255
    if at >= bits or not n:
        return b
    mask = ((1 << n) - 1 << at) & (1 << bits) - 1
    return b & ~mask | a << at & mask


def truncated(a, b):
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def lop3(table):
    return lambda a, b, c: sum(
        (table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1) << i for i in range(32)
    )


def shift(a, n, bits, left=False, sign=False):
    n = min(n, 200)
    return a << n if left else (signed(a, bits) if sign else a) >> n


INTEGERS = {
    "add.u32 rr r": lambda a, b: a + b,
    "sub.s64 dd d": lambda a, b: a - b,
    "mul.lo.s32 rr r": lambda a, b: a * b,
    "mul.hi.u32 rr r": lambda a, b: a * b >> 32,
    "mul.hi.s32 rr r": lambda a, b: signed(a, 32) * signed(b, 32) >> 32,
    "mul.hi.u64 dd d": lambda a, b: a * b >> 64,
    "mul.hi.u16 hh h": lambda a, b: a * b >> 16,
    "mul.wide.u32 rr d": lambda a, b: a * b,
    "mul.wide.s32 rr d": lambda a, b: signed(a, 32) * signed(b, 32),
    "mul.wide.u16 hh r": lambda a, b: a * b,
    "mad.lo.s32 rrr r": lambda a, b, c: a * b + c,
    "mad.wide.s32 rrd d": lambda a, b, c: signed(a, 32) * signed(b, 32) + c,
    "mad.lo.s64 ddd d": lambda a, b, c: a * b + c,
    "div.u32 rr r": lambda a, b: a // b if b else 2**32 - 1,
    "div.s32 rr r": lambda a, b: truncated(signed(a, 32), signed(b, 32)) if b else -1,
    "rem.s32 rr r": lambda a, b: signed(a, 32) - truncated(signed(a, 32), signed(b, 32)) * signed(b, 32) if b else a,
    "rem.u64 dd d": lambda a, b: a % b if b else a,
    "abs.s32 r r": lambda a: abs(signed(a, 32)),
    "neg.s64 d d": lambda a: -a,
    "min.s32 rr r": lambda a, b: min(signed(a, 32), signed(b, 32)),
    "max.u64 dd d": lambda a, b: max(a, b),
    "max.s16 hh h": lambda a, b: max(signed(a, 16), signed(b, 16)),
    "and.b32 rr r": lambda a, b: a & b,
    "or.b64 dd d": lambda a, b: a | b,
    "xor.b16 hh h": lambda a, b: a ^ b,
    "not.b32 r r": lambda a: ~a,
    "shl.b32 rs r": lambda a, n: shift(a, n, 32, left=True),
    "shl.b64 ds d": lambda a, n: shift(a, n, 64, left=True),
    "shl.b16 hs h": lambda a, n: shift(a, n, 16, left=True),
    "shr.u32 rs r": lambda a, n: shift(a, n, 32),
    "shr.s32 rs r": lambda a, n: shift(a, n, 32, sign=True),
    "shr.s64 ds d": lambda a, n: shift(a, n, 64, sign=True),
    "shr.u16 hs h": lambda a, n: shift(a, n, 16),
    "shf.l.wrap.b32 rrs r": lambda a, b, n: (b << 32 | a) << (n & 31) >> 32,
    "shf.r.wrap.b32 rrs r": lambda a, b, n: (b << 32 | a) >> (n & 31),
    "shf.r.clamp.b32 rrs r": lambda a, b, n: (b << 32 | a) >> min(n, 32),
    "prmt.b32 rrr r": prmt,
    "brev.b32 r r": lambda a: int(f"{a:032b}"[::-1], 2),
    "popc.b32 r r": lambda a: a.bit_count(),
    "popc.b64 d r": lambda a: a.bit_count(),
    "clz.b32 r r": lambda a: clz(a, 32),
    "clz.b64 d r": lambda a: clz(a, 64),
    "bfind.u32 r r": lambda a: a.bit_length() - 1,
    "bfind.s32 r r": lambda a: (a if a < 2**31 else ~a & 2**32 - 1).bit_length() - 1,
    "bfind.shiftamt.u32 r r": lambda a: clz(a, 32) if a else -1,
    "bfe.u32 rss r": lambda a, at, n: bfe(a, at, n, 32, False),
    "bfe.s32 rss r": lambda a, at, n: bfe(a, at, n, 32, True),
    "bfe.u64 dss d": lambda a, at, n: bfe(a, at, n, 64, False),
    "bfi.b32 rrss r": lambda a, b, at, n: bfi(a, b, at, n, 32),
    "bfi.b64 ddss d": lambda a, b, at, n: bfi(a, b, at, n, 64),
    "lop3.b32,0x96 rrr r": lop3(0x96),
    "lop3.b32,0xd8 rrr r": lop3(0xD8),
    "cvt.s64.s32 r d": lambda a: signed(a, 32),
    "cvt.u64.u32 r d": lambda a: a,
    "cvt.u16.u32 r h": lambda a: a,
    "cvt.s32.s16 h r": lambda a: signed(a, 16),
    "cvt.s32.s8 h r": lambda a: signed(a, 8),
    "cvt.u32.u8 h r": lambda a: a & 255,
    "cvt.sat.u8.s32 r h": lambda a: min(max(signed(a, 32), 0), 255),
    "cvt.sat.s16.s32 r h": lambda a: min(max(signed(a, 32), -(2**15)), 2**15 - 1),
    "cvt.rn.f32.s32 r f": lambda a: float(np.float32(signed(a, 32))),
    "cvt.rn.f32.u64 d f": lambda a: float(np.uint64(a).astype(np.float32)),
    "cvt.rzi.s32.f32 f r": lambda a: 0 if a != a else math.trunc(min(max(a, -(2.0**31)), 2.0**31 - 1)),
    "cvt.rni.u32.f32 f r": lambda a: 0 if a != a else round(min(max(a, 0.0), 2.0**32 - 1)),
    "cvt.rmi.f32.f32 f f": lambda a: a if not math.isfinite(a) else math.copysign(math.floor(a), a),
}  # fmt: skip


def quiet(function):
    def wrapped(*args):
        with np.errstate(all="ignore"):
            return float(function(*(np.float32(a) for a in args)))

    return wrapped


def fused(a, b, c, towards=None):
    """a b + c, rounded once: to nearest, or towards -inf or 0."""
    with np.errstate(all="ignore"):
        r = float(np.float32(np.longdouble(a) * np.longdouble(b) + np.longdouble(c)))
    if towards is None or not all(map(math.isfinite, (a, b, c))):
        return r
    if math.isinf(r):
        return math.copysign(3.4028234663852886e38, r) if towards == 0 or r > 0 else r
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if r > exact and (towards < 0 or exact > 0) or r < exact and towards == 0 and exact < 0:
        r = float(np.nextafter(np.float32(r), np.float32(-np.inf if r > exact else np.inf)))
    return r


def number_of(a, b, pick):
    return b if a != a else a if b != b else pick(a, b)


FLOATS = {
    "add.f32 ff f": quiet(lambda a, b: a + b),
    "sub.rn.f32 ff f": quiet(lambda a, b: a - b),
    "mul.f32 ff f": quiet(lambda a, b: a * b),
    "div.rn.f32 ff f": quiet(lambda a, b: a / b),
    "sqrt.rn.f32 f f": quiet(np.sqrt),
    "rcp.rn.f32 f f": quiet(lambda a: np.float32(1) / a),
    "fma.rn.f32 fff f": fused,
    "fma.rm.f32 fff f": functools.partial(fused, towards=-1),
    "fma.rz.f32 fff f": functools.partial(fused, towards=0),
    "add.rz.f32 ff f": lambda a, b: fused(a, 1.0, b, 0),
    "min.f32 ff f": lambda a, b: number_of(a, b, min),
    "max.f32 ff f": lambda a, b: number_of(a, b, max),
    "max.NaN.f32 ff f": lambda a, b: math.nan if a != a or b != b else max(a, b),
    "abs.f32 f f": abs,
    "neg.f32 f f": lambda a: -a,
    "cvt.sat.f32.f32 f f": lambda a: min(max(0.0, a), 1.0) if a == a else 0.0,
    "mul.ftz.f32 ff f": quiet(lambda a, b: (lambda x: x * 0 if abs(x) < 2**-126 else x)(
        (a * 0 if abs(a) < 2**-126 else a) * (b * 0 if abs(b) < 2**-126 else b))),
    "setp.lt.f32 ff p": lambda a, b: a < b,
    "setp.ne.f32 ff p": lambda a, b: a < b or a > b,
    "setp.neu.f32 ff p": lambda a, b: a != b,
    "setp.geu.f32 ff p": lambda a, b: not a < b,
    "setp.nan.f32 ff p": lambda a, b: a != a or b != b,
    "setp.num.f32 ff p": lambda a, b: a == a and b == b,
    "setp.lt.s32 rr p": lambda a, b: signed(a, 32) < signed(b, 32),
    "setp.lo.u32 rr p": lambda a, b: a < b,
    "setp.ge.s64 dd p": lambda a, b: signed(a, 64) >= signed(b, 64),
    "setp.eq.s16 hh p": lambda a, b: a == b,
}  # fmt: skip
ABOUT = {  # approximations: relative error 1e-6, or 2e-6 absolute
    "ex2.approx.f32 f f": lambda a: 2.0**a if a < 128 else a if a != a else math.inf,
    "lg2.approx.f32 a f": math.log2,
    "rsqrt.approx.f32 a f": lambda a: a**-0.5,
    "rcp.approx.ftz.f32 a f": lambda a: 1 / a,
    "sin.approx.f32 g f": math.sin,
    "cos.approx.f32 g f": math.cos,
    "tanh.approx.f32 g f": math.tanh,
    "div.approx.f32 ga f": lambda a, b: a / b,
}
KIND = dict(r="u32", d="u64", h="u16", f="f32", s="u32", a="f32", g="f32", p="u32")
SIZE = dict(u32=4, u64=8, u16=2, f32=4)


def inputs(kind: str, place: int) -> list:
    """N values of an operand; s: amounts of shifts and lengths; a: positive numbers; g: numbers near 0."""
    rng = random.Random(f"{kind}{place}")
    if kind == "s":
        return [rng.choice((0, 1, 7, 8, 15, 16, 31, 32, 33, 63, 64, 200, 255, rng.randrange(64))) for _ in range(N)]
    if kind in "ag":
        return [f32(math.exp(rng.uniform(-8, 8)) if kind == "a" else rng.uniform(-4, 4)) for _ in range(N)]
    if kind == "f":
        special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -3e38, 0.5, 1.5, 2.5, -2.5, 1.0]
        return [
            f32(rng.choice(special) if rng.random() < 0.4 else rng.gauss(0, 10 ** rng.choice((-3, 0, 3, 9))))
            for _ in range(N)
        ]
    bits = 8 * SIZE[KIND[kind]]
    special = [0, 1, 2, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1]
    return [
        rng.choice(special) if rng.random() < 0.3 else rng.getrandbits(bits) >> rng.choice((0, bits // 2))
        for _ in range(N)
    ]


TABLE = {**INTEGERS, **FLOATS, **ABOUT}
OPERANDS = sorted({(k, i) for row in TABLE for i, k in enumerate(row.split()[1])})
FORMAT = dict(u32="I", u64="Q", u16="H", f32="f")


def table_kernel() -> str:
    letter = dict(u32="%r1", u64="%d1", u16="%h", f32="%f1")
    body = ["mul.wide.u32 %d9, %r0, 8; add.s64 %d8, %d0, %d9; add.s64 %d9, %d1, %d9;"]
    for n, row in enumerate(TABLE):
        text, kinds, result = row.split()
        text, _, table = text.partition(",")
        names = []
        for i, k in enumerate(kinds):
            kind = KIND[k]
            name = f"{letter[kind]}{i}"
            names.append(name)
            body.append(f"ld.global.{kind} {name}, [%d8+{8 * N * OPERANDS.index((k, i))}];")
        names += [table] if table else []
        to = "%p1" if result == "p" else f"{letter[KIND[result]]}9"
        body.append(f"{text} {to}, {', '.join(names)};")
        if result == "p":
            body.append("selp.u32 %r19, 1, 0, %p1;")
            to = "%r19"
        body.append(f"st.global.{KIND[result]} [%d9+{8 * N * n}], {to};")
    return entry("numbers", "\n".join(body), 2)


@pytest.fixture(scope="module")
def results():
    kernel = Emulated(ptx.Module(HEAD + table_kernel()), "numbers")
    given = b"".join(struct.pack(f"<{N}Q", *(pattern(v, KIND[k]) for v in inputs(k, i))) for k, i in OPERANDS)
    source, out = torch.frombuffer(bytearray(given), dtype=torch.uint8), torch.zeros(len(TABLE), N, dtype=torch.int64)
    set_ranges([source, out])
    kernel.launch((1, 1, 1), (N, 1, 1), 0, struct.pack("QQ", source.data_ptr(), out.data_ptr()))
    return dict(zip(TABLE, out.tolist(), strict=True))


def pattern(value, kind: str) -> int:
    return int.from_bytes(struct.pack(FORMAT[kind], value), "little")


@pytest.mark.parametrize("row", TABLE)
def test_instruction(row, results):
    _, kinds, result = row.split()
    bits = 8 * SIZE[KIND[result]]
    for lane, got in enumerate(results[row]):
        args = [inputs(k, i)[lane] for i, k in enumerate(kinds)]
        want = TABLE[row](*args)
        if result == "f":
            got = single(got)
            if row in ABOUT:
                assert got == pytest.approx(want, rel=1e-6, abs=2e-6, nan_ok=True), (args, got, want)
            else:
                same = got != got if want != want else got == want and math.copysign(1, got) == math.copysign(1, want)
                assert same, (args, got, want)
        else:
            mask = (1 << bits) - 1
            assert got & mask == int(want) & mask, (args, got & mask, int(want) & mask)


@pytest.mark.skipif("avx512f" not in processor(), reason="the other tests have run without AVX-512")
def test_avx2():
    environment = os.environ | dict(LING_GPU_MARCH="x86-64-v3", PYTHONPATH=str(Path(__file__).parents[1]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:xdist", "-k", "not avx2", __file__]
    machine = str(Path(__file__).with_name("test_gpu_machine.py"))
    ran = subprocess.run([*command, machine], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:]
