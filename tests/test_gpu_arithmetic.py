"""Integer instructions of the virtual GPU: each on random numbers and edges, against Python's numbers, and what
test_gpu_floats.py shares: a table's kernel, its operands and its check."""

import functools
import math
import operator
import os
import random
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if shutil.which("g++") is None:
    pytest.skip("the virtual GPU needs g++", allow_module_level=True)

from tests.gpu import ptx
from tests.gpu.program import Emulated, processor, set_ranges

N = 64  # lanes of a table's kernel
HEAD = ".version 9.0\n.target sm_90a\n.address_size 64\n"
REGISTERS = """.reg .pred %p<16>; .reg .b16 %h<32>; .reg .b32 %r<160>; .reg .b64 %d<32>; .reg .f32 %f<160>;
mov.u32 %r0, %tid.x; """


# ---- a table: "instruction types of its operands -> result": a function of Python's numbers
# h, r, d: integers of 16, 32, 64 bits; s: amounts of shifts and lengths; q, p: a predicate as operand, as result;
# f: fp32, a: positive, g: near 0; x, y: f16, bf16, and X, Y: pairs of them; 4, 5: pairs of e4m3, e5m2
KIND = dict.fromkeys("rsqpXY", "u32") | dict.fromkeys("hxy45", "u16") | dict.fromkeys("fag", "f32") | dict(d="u64")
SIZE = dict(u32=4, u64=8, u16=2, f32=4)
PARTS = dict(x="f16", y="bf16", X="f16", Y="bf16") | {"4": "e4m3", "5": "e5m2"}


@functools.cache
def inputs(kind: str, place: int) -> list[int]:
    """N bit patterns of an operand."""
    rng = random.Random(f"{kind}{place}")
    if kind == "s":
        return [rng.choice((0, 1, 7, 8, 15, 16, 31, 32, 33, 63, 64, 200, 255, rng.randrange(64))) for _ in range(N)]
    if kind == "q":
        return [rng.randrange(2) for _ in range(N)]
    if kind in "afg":
        special = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -3e38, 0.5, 1.5, 2.5, -2.5, 1.0, 448.0, 1e-6]
        draw = dict(
            a=lambda: math.exp(rng.uniform(-8, 8)),
            g=lambda: rng.uniform(-4, 4),
            f=lambda: rng.choice(special) if rng.random() < 0.4 else rng.gauss(0, 10 ** rng.choice((-3, 0, 3, 9))),
        )[kind]
        return [struct.unpack("I", struct.pack("f", draw()))[0] for _ in range(N)]
    bits = 8 * SIZE[KIND[kind]]
    special = [0, 1, 2, (1 << bits) - 1, 1 << (bits - 1), (1 << (bits - 1)) - 1]
    shifts = (0, bits // 2 if kind in "hrd" else 0)
    numbers = [rng.getrandbits(bits) >> rng.choice(shifts) for _ in range(N)]
    numbers = [rng.choice(special) if rng.random() < 0.3 else x for x in numbers]
    if kind in "xX":  # 3 * (683 / 2048) + 2**-24 is above 1 + 2**-11, and its rounding to fp32 is not
        numbers[0] = (0x4200, 0x3556, 0x0001)[place]
    return numbers


def value_of(bits: int, kind: str):
    """What a pattern means: a number, or a pair of them, the low half first."""
    if kind in "fag":
        return struct.unpack("f", struct.pack("I", bits))[0]
    if kind not in PARTS:
        return bits
    if kind in "xy":
        return number(bits, PARTS[kind])
    half = 4 * SIZE[KIND[kind]]
    return number(bits & (1 << half) - 1, PARTS[kind]), number(bits >> half, PARTS[kind])


def number(bits: int, kind: str) -> float:
    dtype = dict(f16=torch.float16, bf16=torch.bfloat16, e4m3=torch.float8_e4m3fn, e5m2=torch.float8_e5m2)[kind]
    return torch.tensor([bits], dtype=torch.uint16 if dtype.itemsize == 2 else torch.uint8).view(dtype).item()


def table_kernel(table: dict) -> str:
    operands = operands_of(table)
    letter = dict(u32="%r1", u64="%d1", u16="%h", f32="%f1")
    body = ["mul.wide.u32 %d9, %r0, 8; add.s64 %d8, %d0, %d9; add.s64 %d9, %d1, %d9;"]
    for n, row in enumerate(table):
        text, kinds, result = row.split()
        text, _, constant = text.partition(",")
        names = []
        for i, k in enumerate(kinds):
            name = f"{letter[KIND[k]]}{i}"
            body.append(f"ld.global.{KIND[k]} {name}, [%d8+{8 * N * operands.index((k, i))}];")
            if k == "q":
                body.append(f"setp.ne.u32 %p{2 + i}, {name}, 0;")
            names.append(f"%p{2 + i}" if k == "q" else name)
        names += [constant] if constant else []
        to = "%p1" if result == "p" else f"{letter[KIND[result]]}9"
        body.append(f"{text} {to}, {', '.join(names)};")
        if result == "p":
            body.append("selp.u32 %r19, 1, 0, %p1;")
            to = "%r19"
        body.append(f"st.global.{KIND[result]} [%d9+{8 * N * n}], {to};")
    loads = "ld.param.u64 %d0, [p0]; ld.param.u64 %d1, [p1];"
    return (
        f".visible .entry numbers(.param .u64 p0, .param .u64 p1)\n{{\n{REGISTERS}{loads}\n"
        + "\n".join(body)
        + "\nret;\n}\n"
    )


def operands_of(table: dict) -> list[tuple[str, int]]:
    return sorted({(k, i) for row in table for i, k in enumerate(row.split()[1])})


def run(table: dict) -> dict[str, list[int]]:
    """Of each row, the patterns that N lanes computed."""
    kernel = Emulated(ptx.Module(HEAD + table_kernel(table)), "numbers")
    given = b"".join(struct.pack(f"<{N}Q", *inputs(k, i)) for k, i in operands_of(table))
    source, out = torch.frombuffer(bytearray(given), dtype=torch.uint8), torch.zeros(len(table), N, dtype=torch.int64)
    set_ranges([source, out])
    kernel.launch((1, 1, 1), (N, 1, 1), 0, struct.pack("QQ", source.data_ptr(), out.data_ptr()))
    return dict(zip(table, out.tolist(), strict=True))


def check(table: dict, row: str, patterns: list[int], same) -> None:
    """same(result, wanted)"""
    _, kinds, result = row.split()
    mask = (1 << 8 * SIZE[KIND[result]]) - 1
    for lane, got in enumerate(patterns):
        args = [value_of(inputs(k, i)[lane], k) for i, k in enumerate(kinds)]
        want = table[row](*args)
        want = int(want) & mask if result in "hrdp" else want
        got = value_of(got & mask, result)
        assert same(got, want), (args, got, want)


# ---- integers
def signed(x: int, bits: int) -> int:
    x &= (1 << bits) - 1
    return x - (1 << bits) if x >> (bits - 1) else x


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


LETTER = {"8": "h", "16": "h", "32": "r", "64": "d"}  # of registers, by bits


def integers(kind: str) -> dict:
    """The rows of an integer type that all types have."""
    x, bits = LETTER[kind[1:]], int(kind[1:])
    n = functools.partial(signed, bits=bits) if kind[0] == "s" else lambda x: x

    def of(function):
        return lambda *args: function(*map(n, args))

    order = "eq ne lt le gt ge" if kind[0] == "s" else "eq ne lt le gt ge lo ls hi hs"
    return {
        f"add.{kind} {x}{x} {x}": lambda a, b: a + b,
        f"sub.{kind} {x}{x} {x}": lambda a, b: a - b,
        f"mul.lo.{kind} {x}{x} {x}": lambda a, b: a * b,
        f"mul.hi.{kind} {x}{x} {x}": of(lambda a, b: a * b >> bits),
        f"mad.lo.{kind} {x}{x}{x} {x}": lambda a, b, c: a * b + c,
        f"mad.hi.{kind} {x}{x}{x} {x}": of(lambda a, b, c: (a * b >> bits) + c),
        f"div.{kind} {x}{x} {x}": of(lambda a, b: truncated(a, b) if b else -1),
        f"rem.{kind} {x}{x} {x}": of(lambda a, b: a - truncated(a, b) * b if b else a),
        f"min.{kind} {x}{x} {x}": of(min),
        f"max.{kind} {x}{x} {x}": of(max),
        f"shr.{kind} {x}s {x}": lambda a, k: n(a) >> min(k, 200),
        f"selp.{kind} {x}{x}q {x}": lambda a, b, q: a if q else b,
        f"mov.{kind} {x} {x}": lambda a: a,
        **{f"setp.{o}.{kind} {x}{x} p": of(COMPARED[o]) for o in order.split()},
    }


def wide(kind: str) -> dict:
    x, to, bits = LETTER[kind[1:]], LETTER[str(2 * int(kind[1:]))], int(kind[1:])
    see = (lambda a: signed(a, bits)) if kind[0] == "s" else lambda a: a
    return {
        f"mul.wide.{kind} {x}{x} {to}": lambda a, b: see(a) * see(b),
        f"mad.wide.{kind} {x}{x}{to} {to}": lambda a, b, c: see(a) * see(b) + c,
    }


def of_sign(kind: str) -> dict:
    x, bits = LETTER[kind[1:]], int(kind[1:])
    return {f"abs.{kind} {x} {x}": lambda a: abs(signed(a, bits)), f"neg.{kind} {x} {x}": lambda a: -a}


def untyped(kind: str) -> dict:
    """Of bits; q is a predicate as an operand."""
    x, to = ("q", "p") if kind == "pred" else 2 * (LETTER[kind[1:]],)
    rows = {
        f"and.{kind} {x}{x} {to}": operator.and_,
        f"or.{kind} {x}{x} {to}": operator.or_,
        f"xor.{kind} {x}{x} {to}": operator.xor,
        f"not.{kind} {x} {to}": (lambda a: not a) if kind == "pred" else lambda a: ~a,
        f"mov.{kind} {x} {to}": lambda a: a,
    }
    return rows if kind == "pred" else rows | {
        f"shl.{kind} {x}s {x}": lambda a, k: a << min(k, 200),
        f"shr.{kind} {x}s {x}": lambda a, k: a >> min(k, 200),
        f"selp.{kind} {x}{x}q {x}": lambda a, b, q: a if q else b,
        f"setp.eq.{kind} {x}{x} p": operator.eq,
        f"setp.ne.{kind} {x}{x} p": operator.ne,
    }  # fmt: skip


def resized(to: str, source: str) -> dict:
    """Integers to others: the low bits, or more by the source's sign; sat: the nearest that there is."""
    bits = int(source[1:]), int(to[1:])
    x, y = LETTER[source[1:]], LETTER[to[1:]]
    see = (lambda a: signed(a, bits[0])) if source[0] == "s" else lambda a: a & (1 << bits[0]) - 1
    back = (lambda a: signed(a, bits[1])) if to[0] == "s" else lambda a: a & (1 << bits[1]) - 1
    least, most = (-(2 ** (bits[1] - 1)), 2 ** (bits[1] - 1) - 1) if to[0] == "s" else (0, 2 ** bits[1] - 1)
    return {
        f"cvt.{to}.{source} {x} {y}": lambda a: back(see(a)),
        f"cvt.sat.{to}.{source} {x} {y}": lambda a: min(max(see(a), least), most),
    }


COMPARED = dict(eq=operator.eq, ne=operator.ne, lt=operator.lt, le=operator.le, gt=operator.gt, ge=operator.ge,
                lo=operator.lt, ls=operator.le, hi=operator.gt, hs=operator.ge)  # fmt: skip
TYPES = [f"{sign}{bits}" for bits in (16, 32, 64) for sign in "us"]
BYTES = ["u8", "s8"]
INTEGERS = {
    **{k: v for kind in TYPES for k, v in integers(kind).items()},
    **{k: v for kind in TYPES[:4] for k, v in wide(kind).items()},
    **{k: v for kind in TYPES[1::2] for k, v in of_sign(kind).items()},
    **{k: v for kind in ("b16", "b32", "b64", "pred") for k, v in untyped(kind).items()},
    **{k: v for to in BYTES + TYPES for kind in BYTES + TYPES for k, v in resized(to, kind).items()},
    **{f"add.{sign}16x2 rr r": lambda a, b: (a + b & 0xFFFF) | ((a >> 16) + (b >> 16) & 0xFFFF) << 16 for sign in "us"},
    "setp.lt.and.s32 rrq p": lambda a, b, q: signed(a, 32) < signed(b, 32) and q,
    "setp.eq.or.u16 hhq p": lambda a, b, q: a == b or q,
    "setp.ne.xor.b64 ddq p": lambda a, b, q: (a != b) != q,
    "shf.l.wrap.b32 rrs r": lambda a, b, n: (b << 32 | a) << (n & 31) >> 32,
    "shf.r.wrap.b32 rrs r": lambda a, b, n: (b << 32 | a) >> (n & 31),
    "shf.l.clamp.b32 rrs r": lambda a, b, n: (b << 32 | a) << min(n, 32) >> 32,
    "shf.r.clamp.b32 rrs r": lambda a, b, n: (b << 32 | a) >> min(n, 32),
    "prmt.b32 rrr r": prmt,
    "brev.b32 r r": lambda a: int(f"{a:032b}"[::-1], 2),
    "brev.b64 d d": lambda a: int(f"{a:064b}"[::-1], 2),
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
    "bfe.s64 dss d": lambda a, at, n: bfe(a, at, n, 64, True),
    "bfi.b32 rrss r": lambda a, b, at, n: bfi(a, b, at, n, 32),
    "bfi.b64 ddss d": lambda a, b, at, n: bfi(a, b, at, n, 64),
    "lop3.b32,0x96 rrr r": lop3(0x96),
    "lop3.b32,0xd8 rrr r": lop3(0xD8),
}  # fmt: skip


@pytest.fixture(scope="module")
def results():
    return run(INTEGERS)


@pytest.mark.parametrize("row", INTEGERS)
def test_instruction(row, results):
    check(INTEGERS, row, results[row], operator.eq)


@pytest.mark.skipif("avx512f" not in processor(), reason="the other tests have run without AVX-512")
def test_avx2():
    environment = os.environ | dict(LING_GPU_MARCH="x86-64-v3", PYTHONPATH=str(Path(__file__).parents[1]))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:xdist", "-k", "not avx2", __file__]
    others = [str(Path(__file__).with_name(f"test_gpu_{name}.py")) for name in ("floats", "machine")]
    ran = subprocess.run([*command, *others], env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-3000:]
