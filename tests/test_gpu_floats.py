"""Floating-point instructions of the virtual GPU: each on random numbers and edges, against exact fractions that are
rounded once, and functions of Python and numpy."""

import functools
import math
import operator
import shutil
from fractions import Fraction

import numpy as np
import pytest

if shutil.which("g++") is None:
    pytest.skip("the virtual GPU needs g++", allow_module_level=True)

from tests.test_gpu_arithmetic import BYTES, COMPARED, LETTER, TYPES, check, run, signed

# digits, the exponent of the least number, the largest number
FORMATS = dict(f32=(24, -149, 2.0**128 - 2.0**104), f16=(11, -24, 65504.0), bf16=(8, -133, 255 * 2.0**120),
               e4m3=(4, -9, 448.0), e5m2=(3, -16, 57344.0))  # fmt: skip
HOW = dict(rn=round, rz=math.trunc, rm=math.floor, rp=math.ceil)


def rounded(x, kind: str, how=round, saturates=False) -> float:
    """The number of a format that is nearest to a number or fraction (of two the even one), or the next by `how`."""
    digits, lowest, largest = FORMATS[kind]
    if x != x or x == 0 or abs(x) == math.inf:
        return math.copysign(largest, x) if saturates and abs(x) == math.inf else x
    exponent = math.frexp(float(x))[1]
    exponent -= abs(Fraction(x)) < Fraction(2) ** (exponent - 1)  # float() rounds up to a power of 2
    unit = Fraction(2) ** max(exponent - digits, lowest)
    value = math.copysign(float(how(Fraction(x) / unit) * unit), x)
    if abs(value) <= largest:
        return value
    finite = saturates or how is math.trunc or how is math.floor and x > 0 or how is math.ceil and x < 0
    return math.copysign(largest if finite else math.inf, x)


def fma(a, b, c, kind="f32", how=round) -> float:
    value = a * b + c
    if not math.isfinite(value):
        return value
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    if not exact:
        return -(-a * b - c) if how is math.floor else value
    return rounded(exact, kind, how)


def zero_of(a, b) -> float:
    """A zero with the sign of the product."""
    return math.copysign(0.0, math.copysign(1, a) * math.copysign(1, b))


SUMS = {  # operands: those of a fma
    "add": (2, lambda a, b: (a, 1.0, b)), "sub": (2, lambda a, b: (b, -1.0, a)),
    "mul": (2, lambda a, b: (a, b, zero_of(a, b))), "fma": (3, lambda a, b, c: (a, b, c)),
}  # fmt: skip


def saturated(a):
    return min(max(0.0, a), 1.0) if a == a else 0.0


def flushed(a):
    return math.copysign(0.0, a) if abs(a) < 2**-126 else a


def sums() -> dict:
    rows = {}
    for name, (n, operands) in SUMS.items():
        for how, rounds in HOW.items():

            def f(*args, operands=operands, rounds=rounds):
                return fma(*operands(*args), how=rounds)

            rows[f"{name}.{how}.f32 {'f' * n} f"] = f
            rows[f"{name}.{how}.ftz.f32 {'f' * n} f"] = lambda *args, f=f: flushed(f(*map(flushed, args)))
            rows[f"{name}.{how}.sat.f32 {'f' * n} f"] = lambda *args, f=f: saturated(f(*args))
        if name != "fma":
            rows |= {f"{name}{m}.f32 ff f": rows[f"{name}.rn{m}.f32 ff f"] for m in ("", ".ftz", ".sat")}
    return rows


def quiet(function):
    def wrapped(*args):
        with np.errstate(all="ignore"):
            return float(function(*(np.float32(a) for a in args)))

    return wrapped


# ---- the lesser and the greater: numbers before NaN, -0 before +0
def lesser(a, b):
    return b if a != a else a if b != b else min((a, math.copysign(1, a)), (b, math.copysign(1, b)))[0]


def greater(a, b):
    return -lesser(-a, -b)


def or_nan(pick):
    return lambda a, b: math.nan if a != a or b != b else pick(a, b)


def of_magnitudes(pick):
    """With the sign of the product."""
    return lambda a, b: math.copysign(pick(abs(a), abs(b)), zero_of(a, b))


PICKS = {"min": lesser, "max": greater, "min.NaN": or_nan(lesser), "max.NaN": or_nan(greater)}
PICKS |= {f"{name}.xorsign.abs": of_magnitudes(pick) for name, pick in PICKS.items()}


# ---- comparisons and conversions
def unordered(compare):
    return lambda a, b: a != a or b != b or compare(a, b)


def comparisons(kind: str, x: str) -> dict:
    pair = f"{kind} {x}{x}"
    return {
        **{f"setp.{o}.{pair} p": COMPARED[o] for o in "eq lt le gt ge".split()},
        **{f"setp.{o}u.{pair} p": unordered(COMPARED[o]) for o in "eq ne lt le gt ge".split()},
        f"setp.ne.{pair} p": lambda a, b: a < b or a > b,
        f"setp.nan.{pair} p": lambda a, b: a != a or b != b,
        f"setp.num.{pair} p": lambda a, b: a == a and b == b,
        f"setp.lt.and.{pair}q p": lambda a, b, q: a < b and q,
        f"setp.gtu.or.{pair}q p": lambda a, b, q: not a <= b or q,
        f"setp.nan.xor.{pair}q p": lambda a, b, q: (a != a or b != b) != q,
    }


def limits(kind: str) -> tuple[int, int]:
    bits = int(kind[1:])
    return (0, 2**bits - 1) if kind[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def to_integer(a, kind: str, how) -> int:
    low, high = limits(kind)
    if a != a:
        return 2**63 if kind.endswith("64") else 0
    return low if a == -math.inf else high if a == math.inf else min(max(how(a), low), high)


def from_integer(a: int, kind: str) -> float:
    bits = int(kind[1:])
    return rounded(signed(a, bits) if kind[0] == "s" else a & (1 << bits) - 1, "f32")


def integral(a, how):
    return math.copysign(how(a), a) if math.isfinite(a) else a


WHOLE = {f"{how}i": rounds for how, rounds in HOW.items()}
FLOATS = {
    **sums(),
    "div.rn.f32 ff f": quiet(lambda a, b: a / b),
    "div.rn.ftz.f32 ff f": lambda a, b: flushed(quiet(lambda a, b: a / b)(flushed(a), flushed(b))),
    "sqrt.rn.f32 f f": quiet(np.sqrt),
    "rcp.rn.f32 f f": quiet(lambda a: np.float32(1) / a),
    **{f"{name}.f32 ff f": pick for name, pick in PICKS.items()},
    "abs.f32 f f": abs,
    "neg.f32 f f": operator.neg,
    "abs.ftz.f32 f f": lambda a: abs(flushed(a)),
    "neg.ftz.f32 f f": lambda a: -flushed(a),
    "mov.f32 f f": lambda a: a,
    "selp.f32 ffq f": lambda a, b, q: a if q else b,
    **comparisons("f32", "f"),
    "cvt.f32.f32 f f": lambda a: a,
    "cvt.ftz.f32.f32 f f": flushed,
    "cvt.sat.f32.f32 f f": saturated,
    **{f"cvt.{r}.f32.f32 f f": functools.partial(integral, how=how) for r, how in WHOLE.items()},
    **{f"cvt.rn.f32.{k} {LETTER[k[1:]]} f": functools.partial(from_integer, kind=k) for k in BYTES + TYPES},
    **{f"cvt.{r}.{k}.f32 f {LETTER[k[1:]]}": functools.partial(to_integer, kind=k, how=how)
       for r, how in WHOLE.items() for k in BYTES + TYPES},
}  # fmt: skip


# ---- half precision, alone and in pairs, and FP8
def in_pairs(formula, *args):
    return tuple(map(formula, *args))


def halves(kind: str, x: str, pair: str) -> dict:
    one = {  # operands: a formula
        **{f"{name}.rn": (n, lambda *args, f=f: fma(*f(*args), kind)) for name, (n, f) in SUMS.items()},
        "abs": (1, abs), "neg": (1, operator.neg), **{name: (2, pick) for name, pick in PICKS.items()},
    }  # fmt: skip
    one |= {name: one[f"{name}.rn"] for name in ("add", "sub", "mul")}
    return {
        **{f"{name}.{kind} {x * n} {x}": f for name, (n, f) in one.items()},
        **{f"{name}.{kind}x2 {pair * n} {pair}": functools.partial(in_pairs, f) for name, (n, f) in one.items()},
        **comparisons(kind, x),
        f"cvt.f32.{kind} {x} f": lambda a: a,
        f"cvt.rn.{kind}.f32 f {x}": lambda a: rounded(a, kind),
        f"cvt.rn.{kind}x2.f32 ff {pair}": lambda high, low: (rounded(low, kind), rounded(high, kind)),
        f"cvt.rzi.s32.{kind} {x} r": lambda a: to_integer(a, "s32", math.trunc),
    }  # fmt: skip


def eighths(kind: str, x: str) -> dict:
    def codes(high, low):
        return rounded(low, kind, saturates=True), rounded(high, kind, saturates=True)

    return {
        f"cvt.rn.satfinite.{kind}x2.f32 ff {x}": codes,
        f"cvt.rn.satfinite.{kind}x2.f16x2 X {x}": lambda a: codes(a[1], a[0]),
        f"cvt.rn.f16x2.{kind}x2 {x} X": lambda a: a,
    }


HALVES = {
    **halves("f16", "x", "X"), **halves("bf16", "y", "Y"), **eighths("e4m3", "4"), **eighths("e5m2", "5"),
    "cvt.bf16.f16 x y": lambda a: rounded(a, "bf16"), "cvt.rn.f16.bf16 y x": lambda a: rounded(a, "f16"),
}  # fmt: skip

# ---- approximations: relative error 1e-6, or 2e-6 absolute
NEAR = {
    "ex2 f": lambda a: 2.0**a if a < 128 else a if a != a else math.inf, "lg2 a": math.log2,
    "rsqrt a": lambda a: a**-0.5, "rcp a": lambda a: 1 / a, "sqrt a": math.sqrt,
    "sin g": math.sin, "cos g": math.cos, "div ga": operator.truediv,
}  # fmt: skip
ABOUT = {
    **{f"{k.replace(' ', f'.approx{m}.f32 ')} f": f for k, f in NEAR.items() for m in ("", ".ftz")},
    "div.full.f32 ga f": operator.truediv, "tanh.approx.f32 g f": math.tanh,
}  # fmt: skip
TABLE = FLOATS | HALVES | ABOUT


def same(got, want) -> bool:
    if isinstance(want, tuple):
        return all(map(same, got, want))
    return got != got if want != want else got == want and math.copysign(1, got) == math.copysign(1, want)


@pytest.fixture(scope="module")
def results():
    return run(TABLE)


@pytest.mark.parametrize("row", TABLE)
def test_instruction(row, results):
    near = functools.partial(pytest.approx, rel=1e-6, abs=2e-6, nan_ok=True)
    check(TABLE, row, results[row], (lambda got, want: got == near(want)) if row in ABOUT else same)
