"""The instructions that the virtual GPU implements: names, and the modifiers that each must or may (?) have.

A modifier is used by one part of a line, in any order; what no line uses up is refused. Hints of performance are among
the parts: they are implemented by doing nothing.
"""

import functools
import re

CLASSES = dict(
    INT="u16|s16|u32|s32|u64|s64", ANY="u8|s8|u16|s16|u32|s32|u64|s64", BITS="b16|b32|b64",
    HALVES="f16|bf16|f16x2|bf16x2", TYPE="b8|u8|s8|b16|u16|s16|b32|u32|s32|f32|b64|u64|s64",
    VALUE="b16|u16|s16|b32|u32|s32|f32|b64|u64|s64", FP8="e4m3|e5m2", FP8X2="e4m3x2|e5m2x2", HALF="f16|bf16",
    ROUND="rn|rz|rm|rp", WHOLE="rni|rzi|rmi|rpi", BITWISE="and|or|xor",
    ORDER="relaxed|acquire|release|acq_rel", SCOPE="cluster|gpu|sys",
    SHARED="shared|shared::cta", SPACE="global|shared|shared::cta|shared::cluster|local",
    DIM="1d|2d|3d|4d|5d", HINT="L2::cache_hint",
    FIELD="global_address|rank|box_dim|global_dim|global_stride|element_stride|elemtype|interleave_layout|"
          "swizzle_mode|fill_mode",
)  # fmt: skip
SYNTAX = """
add sub: INT
add: u16x2|s16x2
add sub mul: ROUND? ftz? sat? f32
add sub mul: rn? HALVES
mul mad: lo|hi INT
mul mad: wide u16|s16|u32|s32
fma: ROUND ftz? sat? f32
fma: rn HALVES
div: rn|approx|full ftz? f32
div rem: INT
abs neg: s16|s32|s64
abs neg: ftz? f32
abs neg: HALVES
min max: INT
min max: NaN? f32
min max: NaN? xorsign abs f32
min max: NaN? HALVES
min max: NaN? xorsign abs HALVES
and or xor not: BITS|pred
shl: BITS
shr: BITS|INT
shf: l|r wrap|clamp b32
prmt lop3: b32
brev popc clz bfi: b32|b64
bfe: u32|s32|u64|s64
bfind: shiftamt? u32|s32
rcp sqrt: rn f32
rcp sqrt rsqrt ex2 lg2 sin cos: approx ftz? f32
tanh: approx f32
mov: VALUE|pred
selp: VALUE
setp: eq|ne|lt|le|gt|ge|lo|ls|hi|hs BITWISE? INT|BITS
setp: eq|ne|lt|le|gt|ge|equ|neu|ltu|leu|gtu|geu|num|nan BITWISE? f32|HALF
cvt: sat? ANY ANY
cvt: rn f32 ANY
cvt: WHOLE ANY f32|HALF
cvt: WHOLE? ftz? sat? f32 f32
cvt: f32 HALF
cvt: rn? HALF f32|HALF
cvt: rn f16x2|bf16x2 f32
cvt: rn f16x2 FP8X2
cvt: rn satfinite FP8X2 f32|f16x2
cvta: to? global|shared|local|param u64

ld: volatile|relaxed|acquire? SCOPE? SPACE|param? nc? v2|v4? TYPE
st: volatile|relaxed|release? SCOPE? SPACE|param? v2|v4? TYPE
st: async shared::cluster mbarrier::complete_tx::bytes v2|v4? b32|u32|s32|f32|b64|u64|s64
atom: ORDER? SCOPE? SPACE? add|min|max|exch|cas|inc|dec|BITWISE b32|u32|s32|b64|u64|s64
red: relaxed|release? SCOPE? SPACE? add|min|max|inc|dec|BITWISE b32|u32|s32|b64|u64|s64
ldmatrix stmatrix: sync aligned m8n8 x1|x2|x4 trans? SHARED b16
mapa: shared::cluster? u32|u64
prefetch: global L1|L2
prefetch: tensormap
membar: cta|gl|sys
fence: acq_rel cta
fence: acq_rel|sc SCOPE
fence: mbarrier_init release cluster
fence: proxy async shared::cta|shared::cluster?
fence: proxy tensormap::generic acquire|release gpu

bra ret: uni?
exit trap brkpt:
call: uni?
activemask: b32
bar: warp sync
bar: sync|arrive
bar: red popc u32
bar: red and|or pred
barrier: sync|arrive aligned?
barrier: red popc aligned? u32
barrier: red and|or aligned? pred
barrier: cluster arrive release|relaxed? aligned?
barrier: cluster wait acquire? aligned?
elect: sync
griddepcontrol: launch_dependents|wait
match: any sync b32|b64
nanosleep: u32
redux: sync add|min|max u32|s32
redux: sync BITWISE b32
setmaxnreg: inc|dec sync aligned u32
shfl: sync up|down|bfly|idx b32
vote: sync all|any pred
vote: sync ballot b32

cp: async ca|cg SHARED global HINT? L2::128B?
cp: async commit_group|wait_group|wait_all
cp: async mbarrier arrive noinc SHARED? b64
cp: async bulk commit_group
cp: async bulk wait_group read?
cp: async bulk tensor DIM shared::cta|shared::cluster global mbarrier::complete_tx::bytes multicast::cluster? HINT?
cp: async bulk tensor DIM global shared::cta bulk_group HINT?
mbarrier: init|inval SHARED? b64
mbarrier: expect_tx relaxed? cta|cluster? SHARED? b64
mbarrier: arrive|arrive_drop release|relaxed? cta|cluster? SHARED|shared::cluster? b64
mbarrier: arrive|arrive_drop expect_tx release|relaxed? cta|cluster? SHARED|shared::cluster? b64
mbarrier: try_wait|test_wait parity? acquire|relaxed? cta|cluster? SHARED? b64
tensormap: cp_fenceproxy global shared::cta tensormap::generic release gpu sync aligned
tensormap: replace tile FIELD shared::cta|global b1024 b32|b64
mma: sync aligned m16n8k16 row col f32 HALF HALF f32
wgmma: fence|commit_group|wait_group sync aligned
wgmma: mma_async sync aligned m64n\\d+k16 f32 HALF HALF
wgmma: mma_async sync aligned m64n\\d+k32 f32 FP8 FP8
"""


def parts(line: str) -> list[tuple[str, bool]]:
    """Of a line's modifiers: an expression for each, and whether it may be missing."""
    named = re.sub(r"\b[A-Z][A-Z0-9]*\b", lambda m: CLASSES.get(m[0], m[0]), line)
    return [(p.rstrip("?"), p.endswith("?")) for p in named.split()]


LINES = [line.split(":", 1) for line in SYNTAX.strip().splitlines() if line]
NAMES = sorted({name for names, _ in LINES for name in names.split()})
FORMS = {name: [parts(rest) for names, rest in LINES if name in names.split()] for name in NAMES}


@functools.cache
def unknown(*op: str) -> str:
    """Of an opcode, by its parts between the dots: what is not implemented, or ""."""
    problems = [mismatch(form, op[1:]) for form in FORMS.get(op[0], ())]
    return " ".join([op[0], *min(problems, key=len, default=[])]) if all(problems) else ""


def mismatch(form: list[tuple[str, bool]], modifiers: tuple[str, ...]) -> list[str]:
    """The modifiers that the form lacks, and the parts of it that the modifiers lack."""
    rest, alien = [*form], []
    for modifier in modifiers:
        part = next((p for p in rest if re.fullmatch(p[0], modifier)), None)
        rest.remove(part) if part else alien.append(f".{modifier}")
    return alien or [f"without .{p}" for p, optional in rest if not optional]
