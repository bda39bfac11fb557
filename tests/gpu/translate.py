"""An entry as a program for emu.cpp: per instruction a function over emu.h, in C++, and the operands that it is given.

The C++ names no register and no number, so that few hundred functions serve all kernels, and each is compiled once.
Registers that live in one block alone share their places, and their lanes outside the mask are garbage; all others have
their own and are written under the mask.
"""

import hashlib
import re
import struct

from .ptx import Entry, Instruction, split

VECTOR = dict(pred="Pred", b16="U16", b32="U32", b64="U64")
LANE = dict(pred="int32_t", b16="uint16_t", b32="uint32_t", b64="uint64_t")
WIDTH = dict(b8=16, u8=16, s8=16, b16=16, u16=16, s16=16, f16=16, bf16=16, b32=32, u32=32, s32=32, f32=32, f16x2=32,
             bf16x2=32, b64=64, u64=64, s64=64, f64=64, pred=1)  # fmt: skip
MEMORY = dict(b8="uint8_t", u8="uint8_t", s8="int8_t", b16="uint16_t", u16="uint16_t", s16="int16_t", f16="uint16_t",
              bf16="uint16_t", b32="uint32_t", u32="uint32_t", s32="int32_t", f32="uint32_t", b64="uint64_t",
              u64="uint64_t", s64="int64_t", f64="uint64_t")  # fmt: skip
SPACES = dict(shared="kShared", **{"shared::cta": "kShared", "shared::cluster": "kShared"}, param="kParam",
              local="kLocal", const="kGlobal", **{"global": "kGlobal"})  # fmt: skip
CLASSES = ("fp32", "int", "sfu", "lsu", "tensor", "branch", "move", "other")
SFU = {"ex2", "lg2", "rcp", "rsqrt", "sqrt", "sin", "cos", "tanh"}
LSU = {"ld", "st", "atom", "red", "ldmatrix", "stmatrix", "shfl", "cp", "prefetch"}


class Unknown(Exception):
    pass


def kind_of(op: list[str]) -> str:
    name = op[0]
    if name in SFU or name == "div" and op[-1] == "f32" or name == "cvt":
        return "sfu" if name != "cvt" else "int"
    if name in LSU:
        return "lsu"
    if name in ("mma", "wgmma"):
        return "tensor"
    if name in ("bra", "ret", "exit"):
        return "branch"
    if name in ("mov", "cvta"):
        return "move"
    if op[-1] in ("f32", "bf16x2", "f16x2", "f16", "bf16", "f64"):
        return "fp32"
    if name in ("bar", "barrier", "mbarrier", "fence", "membar", "vote", "redux", "match", "elect", "griddepcontrol",
                "setmaxnreg", "nanosleep", "pragma"):  # fmt: skip
        return "other"
    return "int"


class Translator:
    def __init__(self, entry: Entry, module):
        self.entry, self.module = entry, module
        self.sites, self.c = [], {}
        at = 0
        self.shared = {}
        for v in sorted(entry.shared, key=lambda v: v.size == 0):  # what the launch sizes comes last
            at = -(-at // v.align) * v.align
            self.shared[v.name] = at
            at += v.size
        self.static_shared = at
        self.dynamic_at = at
        at, self.local = 0, {}
        for v in entry.local:
            at = -(-at // v.align) * v.align
            self.local[v.name] = at
            at += v.size
        self.local_size = -(-at // 16) * 16
        self.params = {v.name: offset for v, offset in entry.params}
        self.globals = module.global_addresses()
        self.find_locals()
        self.find_merged()

    # -- which registers stay in a block
    def find_locals(self):
        homes, reads_first, inside = {}, set(), set()
        word = re.compile(r"[%\w$.]+")
        for i, block in enumerate(self.entry.blocks):
            written = set()
            for code in block.code:
                names = [[n for n in word.findall(a) if n in self.entry.registers] for a in code.args]
                writes = self.destinations(code)
                reads = {n for group in names for n in group} - set(writes)
                reads |= {n for n in writes if sum(g.count(n) for g in names) > 1} | (
                    {code.guard} if code.guard else set()
                )
                if code.op[0] == "wgmma":
                    inside |= {n for group in names for n in group}
                if code.guard:
                    reads |= set(writes)
                for n in reads | set(writes):
                    homes.setdefault(n, i)
                    if homes[n] != i:
                        inside.add(n)
                reads_first |= {n for n in reads if n not in written}
                written |= set(writes)
        self.kept = {n for n in homes if n in inside or n in reads_first}
        if any(c.op[0] == "bar" and c.op[1] == "red" for b in self.entry.blocks for c in b.code):
            for b in self.entry.blocks:
                for c in b.code:
                    if c.op[0] in ("bar", "barrier") and "red" in c.op:
                        self.kept |= set(self.destinations(c))

    def destinations(self, code: Instruction) -> list[str]:
        name = code.op[0]
        if name in ("st", "red", "bra", "ret", "bar", "barrier", "cp", "fence", "membar", "prefetch", "stmatrix",
                    "nanosleep", "setmaxnreg", "griddepcontrol", "exit", "trap", "tensormap") and "red" not in code.op[1:2]:  # fmt: skip
            return []
        if name == "mbarrier" and code.op[1] in ("init", "inval", "expect_tx"):
            return []
        if not code.args:
            return []
        return [n for n in re.findall(r"[%\w$.]+", code.args[0]) if n in self.entry.registers]

    # -- operands
    def operand(self, value: int) -> str:
        self.operands.append(value)
        return f"s[{len(self.operands) - 1}]"

    def name(self, register: str) -> str:
        return f"R({VECTOR[self.entry.registers[register]]}, {self.operand(self.places[register])})"

    def immediate(self, text: str, width: int, floating: bool) -> str | None:
        text = text.strip()
        if m := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            value = int(m[1], 16)
        elif m := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
            value = int(m[1], 16)
        elif re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
            value = int(text.rstrip("U"), 0) if not re.fullmatch(r"-?0\d+", text) else int(text, 8)
            if floating:
                value = struct.unpack("I", struct.pack("f", value))[0]
        elif re.fullmatch(r"-?\d*\.\d+(e[-+]?\d+)?", text):
            value = struct.unpack("I", struct.pack("f", float(text)))[0]
        elif text == "WARP_SZ":
            value = 32
        else:
            return None
        if width == 1:
            return f"kpred({int(bool(value))})"
        value &= (1 << width) - 1
        return f"k{width}({self.operand(value if value < 2**63 else value - 2**64)})"

    SPECIAL = {
        **{f"%{s}.{a}": f"k32(sr.{s}_{a})" for s in ("ctaid", "ntid", "nctaid") for a in "xyz"},
        **{f"%tid.{a}": f"sr.tid_{a}" for a in "xyz"},
        "%laneid": "sr.lane", "%warpid": "k32(sr.warp)", "%clock": "k32(0)", "%clock64": "k64(0)",
        "%globaltimer": "k64(0)", "%globaltimer_lo": "k32(0)", "%smid": "k32(0)", "%nsmid": "k32(1)", "%gridid": "k64(0)",
        "%lanemask_lt": "((k32(1) << sr.lane) - 1u)", "%lanemask_le": "((k32(2) << sr.lane) - 1u)",
        "%lanemask_eq": "(k32(1) << sr.lane)",
        **{f"%cluster_ctaid.{a}": "k32(0)" for a in "xyz"}, **{f"%cluster_nctaid.{a}": "k32(1)" for a in "xyz"},
        "%cluster_ctarank": "k32(0)", "%cluster_nctarank": "k32(1)",
        **{f"%clusterid.{a}": f"k32(sr.ctaid_{a})" for a in "xyz"},
    }  # fmt: skip

    def raw(self, text: str, width: int, floating=False) -> str:
        """An operand as an unsigned vector of that width, or a predicate."""
        text = text.strip()
        negate = text.startswith("!")
        if negate:
            return f"(~{self.raw(text[1:], width)})"
        if text in self.SPECIAL:
            got = 64 if "k64" in self.SPECIAL[text] else 32
            return self.resize(self.SPECIAL[text], got, width)
        if text in self.entry.registers:
            got = dict(pred=1, b16=16, b32=32, b64=64)[self.entry.registers[text]]
            return self.resize(self.name(text), got, width)
        value = self.immediate(text, width, floating)
        if value is not None:
            return value
        return self.symbol(text, width)

    def symbol(self, text, width):
        name, _, offset = text.partition("+")
        offset = int(offset, 0) if offset else 0
        if name in self.shared:
            return f"k{width}({self.operand(self.shared[name] + offset)})"
        if name in self.params:
            return f"k64(uint64_t(base(w).params) + {self.operand(self.params[name] + offset)})"
        if name in self.local:
            return f"(k64(uint64_t(base(w).local) + {self.operand(self.local[name] + offset)}) + TO(U64, sr.lane) * base(w).local_size)"
        if name in self.globals:
            return f"k64({self.operand(self.globals[name] + offset)})"
        raise Unknown(f"operand {text}")

    def resize(self, expr, got, width):
        if got == width:
            return expr
        if got == 1 or width == 1:
            raise Unknown(f"predicate as {width} bits: {expr}")
        if got > width and width == 16 and got == 64:
            return f"TO(U16, {expr})"
        return f"TO(U{width}, {expr})"

    def val(self, text: str, type_: str) -> str:
        width = WIDTH[type_]
        expr = self.raw(text, width, type_ == "f32")
        if type_ == "f32":
            return f"((F32){expr})"
        if type_ == "f64":
            return f"((F64){expr})"
        if type_ in ("s16", "s32", "s64"):
            return f"((S{width}){expr})"
        return expr

    def set(self, text: str, type_: str, expr: str, mask: str) -> str:
        """Assign to a register what has `type_`."""
        text = text.strip()
        if text == "_":
            return ""
        kind = self.entry.registers[text]
        width = WIDTH[type_]
        own = dict(pred=1, b16=16, b32=32, b64=64)[kind]
        if width != own and own > 1:  # a wider register: by the type's sign
            signed = type_ in ("s8", "s16", "s32")
            expr = f"(U{own})TO(S{own}, (S{width})({expr}))" if signed else f"TO(U{own}, (U{width})({expr}))"
        elif own > 1:
            expr = f"(U{own})({expr})"
        target = self.name(text)
        if text in self.kept or mask != "M":
            return f"put({target}, {expr}, {mask});"
        return f"{target} = {expr};"

    def address(self, text: str) -> str:
        inner = text.strip()[1:-1].strip()
        m = re.fullmatch(r"(.+?)\s*(?:\+\s*(-?\w+))?", inner)
        base_, offset = m[1], int(m[2], 0) if m[2] else 0
        if base_ in self.entry.registers:
            expr = self.raw(base_, 64)
        elif (value := self.immediate(base_, 64, False)) is not None:
            expr = value
        else:
            expr = self.symbol(base_, 64)
        return f"({expr} + uint64_t({self.operand(offset)}))" if offset else expr

    def vector(self, text: str) -> list[str]:
        text = text.strip()
        return split(text[1:-1]) if text.startswith("{") else [text]

    def find_merged(self):
        """ptxas makes one access of scalar ones to neighbouring words of shared memory: to be counted so. By line: bytes
        of the first, 0 for the others."""
        self.merged = {}
        for block in self.entry.blocks:
            open_ = {}  # (ld or st, base): offset: line

            def close(groups):
                for at in groups.values():
                    for size in (16, 8):
                        for o in sorted(at):
                            words = [o + 4 * i for i in range(size // 4)]
                            if o % size == 0 and all(w in at and at[w] not in self.merged for w in words):
                                lines = sorted(at[w] for w in words)
                                self.merged.update({line: 0 for line in lines[1:]} | {lines[0]: size})
                groups.clear()

            for c in block.code:
                if c.op[0] in ("bar", "barrier", "fence", "membar", "mbarrier", "wgmma", "cp"):
                    close(open_)
                    continue
                if c.op[0] in ("ld", "st") and "shared" in c.op[1] and len(c.op) == 3 and WIDTH[c.op[-1]] == 32:
                    m = re.fullmatch(r"\[(.+?)\s*(?:\+\s*(-?\w+))?\]", c.args[c.op[0] == "ld"].strip())
                    if c.op[0] == "st":  # a load does not pass it
                        close({k: open_.pop(k) for k in [k for k in open_ if k[0] == "ld"]})
                    open_.setdefault((c.op[0], m[1]), {})[int(m[2], 0) if m[2] else 0] = c.line
                for n in self.destinations(c):
                    close({k: open_.pop(k) for k in [k for k in open_ if k[1] == n]})
            close(open_)

    def site(self, code) -> str:
        self.sites.append((code.line, code.text, self.merged.get(code.line, -1)))
        return f"int({self.operand(len(self.sites) - 1)})"

    # -- instructions
    def one(self, code: Instruction) -> str:
        m, mask = "m", "M"
        before = ""
        if code.guard and code.op[0] not in ("bra",):
            g = self.raw(code.guard, 1)
            before = f"const Pred G = M & {'~' if code.negated else ''}{g}; const uint32_t gm = bits(G); (void)gm;"
            m, mask = "gm", "G"
        handler = getattr(self, "do_" + code.op[0], None)
        if handler is None:
            raise Unknown(code.op[0])
        text = handler(code, m, mask)
        return f"{{ {before} if (gm) {{ {text} }} }}" if before and text else text

    def pointers(self, names: list[str], lane="U32") -> str:
        return "{" + ", ".join(f"&{self.name(n)}" for n in names) + "}"

    def do_mov(self, c, m, M):
        type_ = c.op[-1]
        to, from_ = c.args
        if to.startswith("{"):
            parts = self.vector(to)
            width = WIDTH[type_] // len(parts)
            whole = self.raw(from_, WIDTH[type_])
            temp = f"const U{WIDTH[type_]} whole = {whole};"
            return (
                "{"
                + temp
                + " ".join(
                    self.set(p, f"b{width}", f"TO(U{width}, whole >> {width * i})", M)
                    for i, p in enumerate(parts)
                    if p != "_"
                )
                + "}"
            )
        if from_.startswith("{"):
            parts = self.vector(from_)
            total = WIDTH[type_]
            width = total // len(parts)
            expr = " | ".join(f"TO(U{total}, {self.raw(p, width)}) << {width * i}" for i, p in enumerate(parts))
            return self.set(to, type_, expr, M)
        return self.set(to, type_, self.raw(from_, WIDTH[type_], type_ == "f32"), M)

    def do_cvta(self, c, m, M):
        space = c.op[2] if c.op[1] == "to" else c.op[1]
        x = self.raw(c.args[1], 64)
        if space.startswith("shared"):
            sign = "-" if c.op[1] == "to" else "+"
            return self.set(c.args[0], c.op[-1], f"{x} {sign} uint64_t(base(w).shared)", M)
        return self.set(c.args[0], c.op[-1], x, M)

    def binary(self, c, M, type_, form):
        a, b = (self.val(x, type_) for x in c.args[1:3])
        return self.set(c.args[0], type_, form.format(a=a, b=b), M)

    def half2(self, c, M, form):
        """f16x2, bf16x2, f16 and bf16 in float, rounded: exact for +, * and fma's single rounding nearly so."""
        type_ = c.op[-1]
        width = WIDTH[type_]
        to, of = ("bf16_of", "of_bf16") if type_.startswith("bf16") else ("f16_of", "of_f16")
        raw = [self.raw(x, width) for x in c.args[1:]]
        if width == 16:
            return self.set(c.args[0], type_, f"{to}({form.format(*(f'{of}({x})' for x in raw))})", M)
        lows, highs = ([f"{of}({part}({x}))" for x in raw] for part in ("low", "top"))
        return self.set(c.args[0], type_, f"pair({to}({form.format(*lows)}), {to}({form.format(*highs)}))", M)

    def arith(self, c, m, M, sign):
        type_ = c.op[-1]
        if type_ in ("f16x2", "bf16x2", "f16", "bf16"):
            return self.half2(c, M, f"({{}} {sign} {{}})")
        if type_ == "pred":
            raise Unknown("arithmetic of predicates")
        form = f"{{a}} {sign} {{b}}"
        if "cc" in c.op:
            raise Unknown("carry")
        if "sat" in c.op:
            form = f"saturate({form})"
        if "ftz" in c.op:
            form = f"flush({form})"
        return self.binary(c, M, type_.replace("s", "u") if type_[0] == "s" else type_, form)

    def do_add(self, c, m, M):
        return self.arith(c, m, M, "+")

    def do_sub(self, c, m, M):
        return self.arith(c, m, M, "-")

    def do_mul(self, c, m, M):
        type_ = c.op[-1]
        if "wide" in c.op:
            wide = type_[0] + str(2 * WIDTH[type_])
            big = f"{'S' if type_[0] == 's' else 'U'}{2 * WIDTH[type_]}"
            a, b = (f"TO({big}, {self.val(x, type_)})" for x in c.args[1:])
            return self.set(c.args[0], wide, f"{a} * {b}", M)
        if "hi" in c.op:
            return self.binary(c, M, type_, "high({a}, {b})")
        return self.arith(c, m, M, "*")

    def do_mad(self, c, m, M):
        type_ = c.op[-1]
        if "wide" in c.op:
            wide = type_[0] + str(2 * WIDTH[type_])
            big = f"{'S' if type_[0] == 's' else 'U'}{2 * WIDTH[type_]}"
            a, b = (f"TO({big}, {self.val(x, type_)})" for x in c.args[1:3])
            return self.set(c.args[0], wide, f"{a} * {b} + {self.val(c.args[3], wide)}", M)
        a, b, d = (self.val(x, type_) for x in c.args[1:])
        return self.set(c.args[0], type_, f"high({a}, {b}) + {d}" if "hi" in c.op else f"{a} * {b} + {d}", M)

    def do_fma(self, c, m, M):
        type_ = c.op[-1]
        if type_ != "f32":
            return self.half2(c, M, "fma_rn({}, {}, {})")
        f = f"fma_{'rm' if 'rm' in c.op else 'rn'}({', '.join(self.val(x, type_) for x in c.args[1:])})"
        if "rz" in c.op or "rp" in c.op:
            raise Unknown("rounding of fma")
        if "sat" in c.op:
            f = f"saturate({f})"
        return self.set(c.args[0], type_, f"flush({f})" if "ftz" in c.op else f, M)

    def do_div(self, c, m, M):
        type_ = c.op[-1]
        if type_ in ("f32", "f64"):
            return self.binary(c, M, type_, "{a} / {b}")
        return self.binary(c, M, type_, f"divide({{a}}, {{b}}, {m})")

    def do_rem(self, c, m, M):
        return self.binary(c, M, c.op[-1], f"modulo({{a}}, {{b}}, {m})")

    def minmax(self, c, M, f):
        type_ = c.op[-1]
        if type_ == "f32":
            name = dict(lower="fmin_", higher="fmax_")[f]
            if "NaN" in c.op:
                name += "nan"
            if len(c.args) == 4:
                a, b, d = (self.val(x, type_) for x in c.args[1:])
                return self.set(c.args[0], type_, f"{name}({name}({a}, {b}), {d})", M)
            return self.binary(c, M, type_, name + "({a}, {b})")
        if type_ in ("f16x2", "bf16x2", "f16", "bf16"):
            return self.half2(c, M, dict(lower="fmin_", higher="fmax_")[f] + "({}, {})")
        return self.binary(c, M, type_, f + "({a}, {b})")

    def do_min(self, c, m, M):
        return self.minmax(c, M, "lower")

    def do_max(self, c, m, M):
        return self.minmax(c, M, "higher")

    def unary(self, c, M, type_, form):
        return self.set(c.args[0], type_, form.format(a=self.val(c.args[1], type_)), M)

    def do_abs(self, c, m, M):
        if c.op[-1] == "f32":
            return self.unary(c, M, "f32", "magnitude({a})")
        if c.op[-1][0] == "s":
            return self.unary(c, M, c.op[-1], "higher({a}, -{a})")
        return self.half2(c, M, "magnitude({})")

    def do_neg(self, c, m, M):
        if c.op[-1] == "f32":
            return self.unary(c, M, "f32", "negative({a})")
        if c.op[-1][0] == "s":
            return self.unary(c, M, c.op[-1], "-{a}")
        return self.half2(c, M, "negative({})")

    def bitwise(self, c, M, sign):
        return self.binary(c, M, c.op[-1], f"{{a}} {sign} {{b}}")

    def do_and(self, c, m, M):
        return self.bitwise(c, M, "&")

    def do_or(self, c, m, M):
        return self.bitwise(c, M, "|")

    def do_xor(self, c, m, M):
        return self.bitwise(c, M, "^")

    def do_not(self, c, m, M):
        return self.unary(c, M, c.op[-1], "~{a}")

    def do_lop3(self, c, m, M):
        a, b, d = (self.val(x, "b32") for x in c.args[1:4])
        return self.set(c.args[0], "b32", f"lop3<{c.args[4]}>({a}, {b}, {d})", M)

    def do_shl(self, c, m, M):
        return self.set(
            c.args[0], c.op[-1], f"shift_left({self.val(c.args[1], c.op[-1])}, {self.raw(c.args[2], 32)})", M
        )

    def do_shr(self, c, m, M):
        type_ = c.op[-1]
        return self.set(
            c.args[0],
            type_.replace("s", "u"),
            f"shift_right({self.val(c.args[1], type_)}, {self.raw(c.args[2], 32)})",
            M,
        )

    def do_shf(self, c, m, M):
        a, b, d = (self.raw(x, 32) for x in c.args[1:])
        return self.set(c.args[0], "b32", f"funnel_{'left' if c.op[1] == 'l' else 'right'}({a}, {b}, {d})", M)

    def do_prmt(self, c, m, M):
        a, b, d = (self.raw(x, 32) for x in c.args[1:])
        return self.set(c.args[0], "b32", f"byte_permute({a}, {b}, {d})", M)

    def do_bfi(self, c, m, M):
        a, b = (self.raw(x, WIDTH[c.op[-1]]) for x in c.args[1:3])
        at, length = (self.raw(x, 32) for x in c.args[3:])
        return self.set(c.args[0], c.op[-1], f"insert_bits({a}, {b}, {at}, {length})", M)

    def do_bfe(self, c, m, M):
        a, at, length = (self.raw(x, 32) for x in c.args[1:])
        return self.set(c.args[0], "b32", f"extract_bits({a}, {at}, {length}, {int(c.op[-1] == 's32')})", M)

    def do_brev(self, c, m, M):
        return self.set(c.args[0], "b32", f"reverse({self.raw(c.args[1], 32)})", M)

    def do_popc(self, c, m, M):
        return self.set(c.args[0], "b32", f"popcount({self.raw(c.args[1], WIDTH[c.op[-1]])})", M)

    def do_clz(self, c, m, M):
        return self.set(c.args[0], "b32", f"leading_zeros({self.raw(c.args[1], 32)})", M)

    def do_bfind(self, c, m, M):
        return self.set(
            c.args[0],
            "b32",
            f"find_highest({self.raw(c.args[1], 32)}, {int(c.op[-1][0] == 's')}, {int('shiftamt' in c.op)})",
            M,
        )

    def do_setp(self, c, m, M):
        type_ = c.op[-1]
        how = c.op[1]
        combine = next((o for o in c.op[2:-1] if o in ("and", "or", "xor")), None)
        if type_ in ("bf16", "f16"):
            of = "of_bf16" if type_ == "bf16" else "of_f16"
            a, b = (f"{of}({self.raw(x, 16)})" for x in c.args[1:3])
            floating = True
        else:
            a, b = (self.val(x, type_) for x in c.args[1:3])
            floating = type_ in ("f32", "f64")
        signs = dict(eq="==", ne="!=", lt="<", le="<=", gt=">", ge=">=", lo="<", ls="<=", hi=">", hs=">=")
        if how in signs:
            expr = f"({a} {signs[how]} {b})"
            if floating and how == "ne":
                expr = f"(({a} != {b}) & ({a} == {a}) & ({b} == {b}))"
        elif how == "num":
            expr = f"(({a} == {a}) & ({b} == {b}))"
        elif how == "nan":
            expr = f"(({a} != {a}) | ({b} != {b}))"
        else:  # equ, neu, ltu, leu, gtu, geu: true where one is NaN
            expr = f"(({a} {signs[how[:2]]} {b}) | ({a} != {a}) | ({b} != {b}))"
        expr = f"pred({expr})"
        targets = c.args[0].split("|")
        sign = dict([("and", "&"), ("or", "|"), ("xor", "^")]).get(combine)
        out = []
        for i, target in enumerate(targets):
            e = f"(~{expr})" if i else expr
            out.append(self.set(target, "pred", f"{e} {sign} {self.raw(c.args[3], 1)}" if sign else e, M))
        return " ".join(out)

    def do_selp(self, c, m, M):
        type_ = c.op[-1]
        type_ = f"b{WIDTH[type_]}" if type_ != "f32" else type_
        raw = [self.raw(x, WIDTH[type_], type_ == "f32") for x in c.args[1:3]]
        return self.set(c.args[0], f"b{WIDTH[type_]}", f"pick({self.raw(c.args[3], 1)}, {raw[0]}, {raw[1]})", M)

    def do_ex2(self, c, m, M):
        if c.op[-1] != "f32":
            return self.half2(c, M, "exp2_({})")
        f = "flush(exp2_(flush({a})))" if "ftz" in c.op else "exp2_({a})"
        return self.unary(c, M, "f32", f)

    def do_lg2(self, c, m, M):
        return self.unary(c, M, "f32", "log2_({a})")

    def do_sin(self, c, m, M):
        return self.unary(c, M, "f32", "sin_({a})")

    def do_cos(self, c, m, M):
        return self.unary(c, M, "f32", "cos_({a})")

    def do_tanh(self, c, m, M):
        return self.unary(c, M, "f32", "tanh_({a})")

    def do_rcp(self, c, m, M):
        return self.unary(c, M, "f32", "flush(1.f / flush({a}))" if "ftz" in c.op else "(1.f / {a})")

    def do_rsqrt(self, c, m, M):
        return self.unary(c, M, "f32", "(1.f / square_root({a}))")

    def do_sqrt(self, c, m, M):
        return self.unary(c, M, "f32", "square_root({a})")

    ROUND = dict(rzi=0, rni=1, rmi=2, rpi=3)

    def do_cvt(self, c, m, M):
        to, from_ = c.op[-2:]
        x = c.args[1]
        d = c.args[0]
        floats = dict(f32="((F32){})", f16="of_f16({})", bf16="of_bf16({})")
        if to in ("bf16x2", "f16x2") and from_ == "f32":  # d, a, b: a is the upper half
            f = dict(bf16x2="bf16_of", f16x2="f16_of")[to]
            relu = "higher({}, F32{{}})" if "relu" in c.op else "{}"
            a, b = (f"{f}({relu.format(self.val(v, 'f32'))})" for v in c.args[1:3])
            return self.set(d, to, f"pair({b}, {a})", M)
        if to in ("e4m3x2", "e5m2x2") and from_ == "f32":
            a, b = (self.val(v, "f32") for v in c.args[1:3])
            return self.set(d, "b16", f"{to}_of({a}, {b})", M)
        if to in ("e4m3x2", "e5m2x2") and from_ in ("f16x2", "bf16x2"):
            of = "of_f16" if from_ == "f16x2" else "of_bf16"
            v = self.raw(x, 32)
            return self.set(d, "b16", f"{to}_of({of}(top({v})), {of}(low({v})))", M)
        if from_ in ("e4m3x2", "e5m2x2"):
            return self.set(d, "f16x2", f"f16x2_of_{from_}({self.raw(x, 16)})", M)
        round_ = next((self.ROUND[o] for o in c.op if o in self.ROUND), None)
        if from_ in floats:
            v = floats[from_].format(self.raw(x, WIDTH[from_]))
            if "ftz" in c.op:
                v = f"flush({v})"
            if to == "f32":
                if round_ is not None:
                    v = f"to_integer({v}, {round_})"
                return self.set(d, "f32", f"saturate({v})" if "sat" in c.op else v, M)
            if to in ("bf16", "f16"):
                return self.set(d, to, f"{to}_of({v})", M)
            wide = to if to in ("s64", "u64") else to[0] + "32"
            if wide == "u64":
                wide = "s64"
            got = f"to_{wide}({v}, {round_})"
            return self.set(d, wide, got, M) if WIDTH[to] >= 32 else self.set(d, to, f"TO(U16, {got})", M)
        if to in floats:
            v = self.val(x, from_)
            if WIDTH[from_] == 16 and from_[0] == "s":
                v = f"TO(S32, {v})"
            return self.set(d, to, f"TO(F32, {v})" if to == "f32" else f"{to}_of(TO(F32, {v}))", M)
        if to == "f32" or from_ == "f64" or to == "f64":
            raise Unknown(".".join(c.op))
        # integers: narrow or widen by the source's sign
        v = self.val(x, from_)
        if from_ in ("u8", "b8"):
            v = f"({v} & (uint16_t)255)"
        elif from_ == "s8":
            v = f"((S16)({v} << 8) >> 8)"
        big = f"{'S' if from_[0] == 's' else 'U'}{WIDTH[to]}"
        expr = f"TO({big}, {v})"
        if to in ("u8", "b8"):
            expr = f"({expr} & (uint16_t)255)"
        elif to == "s8":
            expr = f"((S16)({expr} << 8) >> 8)"
        if "sat" in c.op:
            raise Unknown("saturating conversion of integers")
        return (
            self.set(d, f"b{WIDTH[to]}" if WIDTH[to] > 8 else "b16", f"(U{WIDTH[to]})({expr})", M)
            if self.own(d) == WIDTH[to]
            else self.set(d, to, expr, M)
        )

    def own(self, register):
        return dict(pred=1, b16=16, b32=32, b64=64)[self.entry.registers[register.strip()]]

    # memory
    def space(self, c):
        return next((SPACES[o] for o in c.op if o in SPACES), "kGeneric")

    def do_ld(self, c, m, M):
        type_ = c.op[-1]
        names = self.vector(c.args[0])
        kind = self.entry.registers[next(n for n in names if n != "_")]
        spare = "".join(f"{VECTOR[kind]} spare{i}; " for i, n in enumerate(names) if n == "_")
        to = ", ".join(f"&{self.name(n)[0:]}" if n != "_" else f"&spare{i}" for i, n in enumerate(names))
        lane = LANE[kind]
        return (
            f"{{ {spare}{VECTOR[kind]}* to[] = {{{to}}}; load<{MEMORY[type_]}, {lane}>(w, {self.site(c)}, {self.space(c)}, "
            f"{self.address(c.args[1])}, {m}, {len(names)}, ({lane}* const*)to); }}"
        )

    def do_st(self, c, m, M):
        type_ = c.op[-1]
        names = self.vector(c.args[1])
        first = next((n for n in names if n in self.entry.registers), None)
        kind = self.entry.registers[first] if first else f"b{max(WIDTH[type_], 16)}"
        vector, lane = VECTOR[kind], LANE[kind]
        temps, refs = "", []
        width = dict(b16=16, b32=32, b64=64)[kind]
        for i, n in enumerate(names):
            if n in self.entry.registers and self.entry.registers[n] == kind:
                refs.append(f"&{self.name(n)}")
            else:
                temps += f"const {vector} t{i} = {self.raw(n, width, type_ == 'f32')}; "
                refs.append(f"&t{i}")
        memory = MEMORY[type_].replace("int", "uint").replace("uuint", "uint")
        return (
            f"{{ {temps}const {vector}* from[] = {{{', '.join(refs)}}}; store<{memory}, {lane}>(w, {self.site(c)}, {self.space(c)}, "
            f"{self.address(c.args[0])}, {m}, {len(names)}, (const {lane}* const*)from); }}"
        )

    ATOMS = dict(
        add="kAdd",
        min="kMin",
        max="kMax",
        exch="kExch",
        cas="kCas",
        inc="kInc",
        **{"and": "kAnd", "or": "kOr", "xor": "kXor"},
    )

    def do_atom(self, c, m, M, result=True):
        type_ = c.op[-1]
        how = next(self.ATOMS[o] for o in c.op if o in self.ATOMS)
        at, *values = c.args[1:] if result else c.args
        lane = dict(f32="float", s32="int32_t", s64="int64_t", u64="uint64_t", b64="uint64_t").get(type_, "uint32_t")
        width = WIDTH[type_]
        temps = "".join(f"const U{width} t{i} = {self.raw(v, width, type_ == 'f32')}; " for i, v in enumerate(values))
        second = f"(const {lane}*)&t1" if len(values) > 1 else "nullptr"
        keep = self.set(c.args[0], type_, "old", M) if result and c.args[0] != "_" else ""
        return (
            f"{{ {temps}U{width} old = {{}}; atomic<{lane}>(w, {self.site(c)}, {self.space(c)}, {how}, {self.address(at)}, {m}, "
            f"(const {lane}*)&t0, {second}, ({lane}*)&old); {keep} }}"
        )

    def do_red(self, c, m, M):
        return self.do_atom(c, m, M, False)

    def do_cp(self, c, m, M):
        s, op = self.site(c), c.op
        if op[1:3] == ["async", "commit_group"]:
            return f"copy_commit(w, {s}, {m});"
        if op[1:3] == ["async", "wait_group"]:
            return f"copy_wait(w, {s}, {c.args[0]}, {m});"
        if op[1:3] == ["async", "wait_all"]:
            return f"copy_commit(w, {s}, {m}); copy_wait(w, {s}, 0, {m});"
        if op[1:4] == ["async", "bulk", "commit_group"]:
            return f"tma_commit(w, {s}, {m});"
        if op[1:4] == ["async", "bulk", "wait_group"]:
            return f"tma_wait(w, {s}, {c.args[0]}, {m});"
        if op[1:4] == ["async", "bulk", "tensor"]:
            loads = op[5].startswith("shared")
            map_ = c.args[1] if loads else c.args[0]
            pointer, coordinates = split(map_.strip()[1:-1])
            names = self.vector(coordinates)
            temps = "".join(f"const U32 c{i} = {self.raw(n, 32)}; " for i, n in enumerate(names))
            refs = ", ".join(f"&c{i}" for i in range(len(names)))
            at = self.address(f"[{pointer}]")
            call = (
                f"tma_load(w, {s}, {self.address(c.args[0])}, {at}, {len(names)}, cs, {self.address(c.args[2])}, {m})"
                if loads
                else f"tma_store(w, {s}, {at}, {len(names)}, cs, {self.address(c.args[1])}, {m})"
            )
            return f"{{ {temps}const U32* cs[] = {{{refs}}}; {call}; }}"
        if op[1] == "async" and op[2] in ("ca", "cg"):
            real = self.raw(c.args[3], 32) if len(c.args) > 3 else self.raw(c.args[2], 32)
            return (
                f"copy_async(w, {s}, {self.address(c.args[0])}, {self.address(c.args[1])}, {c.args[2]}, {real}, {m});"
            )
        raise Unknown(".".join(op))

    def matrix(self, c, names, at, what, m):
        count = int(next(o for o in c.op if o in ("x1", "x2", "x4"))[1:])
        const = "const " if what == "store" else ""
        return (
            f"{{ {const}U32* rs[] = {self.pointers(names)}; {what}_matrix(w, {self.site(c)}, {count}, {int('trans' in c.op)}, "
            f"{self.address(at)}, {m}, rs); }}"
        )

    def do_ldmatrix(self, c, m, M):
        return self.matrix(c, self.vector(c.args[0]), c.args[1], "load", m)

    def do_stmatrix(self, c, m, M):
        return self.matrix(c, self.vector(c.args[1]), c.args[0], "store", m)

    def nothing(self, c, m, M):
        return ""

    do_prefetch = do_membar = do_griddepcontrol = do_applypriority = do_discard = do_prefetchu = nothing

    def do_fence(self, c, m, M):
        return f"proxy_fence(w, {m});" if "async" in c.op or "mbarrier_init" in c.op else ""

    def do_setmaxnreg(self, c, m, M):
        return f"whole(w, {self.site(c)}, {m});"

    # of a warp
    def do_shfl(self, c, m, M):
        how = dict(up="kUp", down="kDown", bfly="kButterfly", idx="kIndex")[c.op[2]]
        targets = c.args[0].split("|")
        a, b, k, members = (self.raw(x, 32) for x in c.args[1:])
        keep = self.set(targets[1], "pred", "ok", M) if len(targets) > 1 else ""
        return f"{{ Pred ok; const U32 got = shuffle(w, {self.site(c)}, {how}, {a}, {b}, {k}, {members}, {m}, &ok); {self.set(targets[0], 'b32', 'got', M)} {keep} }}"

    def do_vote(self, c, m, M):
        negate = c.args[1].startswith("!")
        p = self.raw(c.args[1], 1)
        call = f"ballot(w, {self.site(c)}, {p}, {self.raw(c.args[2], 32)}, {m})"
        how = c.op[2]
        if how == "ballot":
            return self.set(c.args[0], "b32", f"k32({call})", M)
        if how == "any":
            return self.set(c.args[0], "pred", f"kpred({call} != 0)", M)
        if how == "all":
            return self.set(c.args[0], "pred", f"kpred({call} == {m})", M)
        raise Unknown(".".join(c.op))

    def do_activemask(self, c, m, M):
        return self.set(c.args[0], "b32", f"k32({m})", M)

    def do_match(self, c, m, M):
        return self.set(
            c.args[0],
            "b32",
            f"match_any(w, {self.site(c)}, {self.raw(c.args[1], WIDTH[c.op[-1]])}, {self.raw(c.args[2], 32)}, {m})",
            M,
        )

    def do_redux(self, c, m, M):
        how = self.ATOMS[c.op[2]]
        return self.set(
            c.args[0],
            "b32",
            f"k32(reduce(w, {self.site(c)}, {how}, {int(c.op[-1] == 's32')}, {self.raw(c.args[1], 32)}, {self.raw(c.args[2], 32)}, {m}))",
            M,
        )

    def do_elect(self, c, m, M):
        to, p = c.args[0].split("|")
        out = f"const uint32_t leader = elect(w, {self.site(c)}, {self.raw(c.args[1], 32)}, {m}); "
        return (
            "{ "
            + out
            + self.set(to, "b32", "k32(leader)", M)
            + self.set(p, "pred", "pred((S32)(base(w).sr.lane == leader))", M)
            + " }"
        )

    # barriers
    def do_bar(self, c, m, M):
        if c.op[1] == "warp":
            return f"warp_sync(w, {self.site(c)}, {self.raw(c.args[0], 32)}, {m});"
        op = [o for o in c.op if o not in ("cta", "aligned")]
        if op[1] == "red":
            args = c.args[1:]
            count = f"({self.raw(args[1], 32)})[0]" if len(args) > 2 else "0"
            return f"{{ const Pred vote = {self.raw(args[-1], 1)}; barrier(w, {self.site(c)}, ({self.raw(args[0], 32)})[0], {count}, true, {m}, &vote); }}"
        count = f"one({self.raw(c.args[1], 32)}, m)" if len(c.args) > 1 else "0"
        return f"barrier(w, {self.site(c)}, one({self.raw(c.args[0], 32)}, m), {count}, {int(op[1] == 'sync')}, {m});"

    do_barrier = do_bar

    def after_bar(self, c):
        """What the next block begins with."""
        op = c.op
        if "red" not in op:
            return ""
        got = "base(w).barrier_result"
        if "popc" in op:
            return self.set(c.args[0], "b32", f"k32({got} & 0xffff)", "M")
        how = f"{got} & 0xffff" if "or" in op else f"(({got} & 0xffff) == {got} >> 16)"
        return self.set(c.args[0], "pred", f"kpred({how})", "M")

    def do_mbarrier(self, c, m, M):
        s, how = self.site(c), c.op[1]
        if how == "init":
            return f"mbarrier_init(w, {s}, {self.address(c.args[0])}, {self.raw(c.args[1], 32)}, {m});"
        if how == "inval":
            return f"mbarrier_inval(w, {s}, {self.address(c.args[0])}, {m});"
        if how == "arrive":
            if c.args[0] != "_":
                raise Unknown("state of an arrival")
            tx = "expect_tx" in c.op
            count = "k32(1)" if tx or len(c.args) < 3 else self.raw(c.args[2], 32)
            return f"mbarrier_arrive(w, {s}, {self.address(c.args[1])}, {count}, {self.raw(c.args[2], 32) if tx else 'k32(0)'}, {m});"
        if how == "expect_tx":
            return f"mbarrier_expect(w, {s}, {self.address(c.args[0])}, {self.raw(c.args[1], 32)}, {m});"
        if how in ("try_wait", "test_wait") and "parity" in c.op:
            return self.set(
                c.args[0], "pred", f"mbarrier_try(w, {s}, {self.address(c.args[1])}, {self.raw(c.args[2], 32)}, {m})", M
            )
        raise Unknown(".".join(c.op))

    FIELDS = ("global_address", "rank", "box_dim", "global_dim", "global_stride", "element_stride", "elemtype", "interleave_layout",
              "swizzle_mode", "fill_mode")  # fmt: skip

    def do_tensormap(self, c, m, M):
        s = self.site(c)
        if c.op[1] == "replace":
            at, *which, v = c.args
            field = self.FIELDS.index(c.op[3])
            return (
                f"map_replace(w, {s}, {self.address(at)}, {field}, {which[0] if which else 0}, {self.raw(v, 64)}, {m});"
            )
        if c.op[1] == "cp_fenceproxy":
            return f"map_copy(w, {s}, {self.address(c.args[0])}, {self.address(c.args[1])}, {m});"
        raise Unknown(".".join(c.op))

    def do_nanosleep(self, c, m, M):
        return f"nap(w, {self.site(c)});"

    # tensor cores
    ELEMENTS = dict(e4m3="kE4m3", e5m2="kE5m2", bf16="kBf16", f16="kF16", tf32="kTf32")

    def do_mma(self, c, m, M):
        shape = next(o for o in c.op if re.fullmatch(r"m16n8k\d+", o))
        d, a, b, e = (self.vector(x) for x in c.args[:4])
        types = c.op[-4:]
        if types[0] != "f32" or types[3] != "f32":
            raise Unknown(".".join(c.op))
        ea, eb = (self.ELEMENTS[t] for t in types[1:3])
        zeros = "const U32 z = {}; " if any(n not in self.entry.registers for n in e) else ""
        ref = ", ".join(f"&{self.name(n)}" if n in self.entry.registers else "&z" for n in e)
        return (
            f"{{ {zeros}U32* d[] = {self.pointers(d)}; const U32 *a[] = {self.pointers(a)}, *b[] = {self.pointers(b)}, "
            f"*e[] = {{{ref}}}; mma(w, {self.site(c)}, {shape.split('k')[1]}, {ea}, {eb}, d, a, b, e, {m}); }}"
        )

    def do_wgmma(self, c, m, M):
        s, how = self.site(c), c.op[1]
        if how in ("fence", "commit_group"):
            return f"wgmma_{how.split('_')[0]}(w, {s}, {m});"
        if how == "wait_group":
            return f"wgmma_wait(w, {s}, {c.args[0]}, {m});"
        n, k = re.fullmatch(r"m64n(\d+)k(\d+)", next(o for o in c.op if o.startswith("m64"))).groups()
        if c.op[-3] != "f32":
            raise Unknown(".".join(c.op))
        ea, eb = self.ELEMENTS[c.op[-2]], self.ELEMENTS[c.op[-1]]
        d = self.vector(c.args[0])
        assert len(d) == int(n) // 2, c.text
        registers = c.args[1].startswith("{")
        a = self.vector(c.args[1]) if registers else []
        rest = c.args[3:]
        p, flags = rest[0], [*rest[1:]]
        sign_a, sign_b = (int(flags[i]) if i < len(flags) else 1 for i in (0, 1))
        ta = int(flags[2]) if len(flags) > 2 and not registers else 0
        tb = int(flags[-1]) if len(flags) > 2 else 0
        da = "k64(0)" if registers else self.raw(c.args[1], 64)
        acc = self.raw(p, 1)
        ra = f"const U32* a[] = {self.pointers(a)};" if registers else "const U32** a = nullptr;"
        return (
            f"{{ U32* d[] = {self.pointers(d)}; {ra} wgmma(w, {s}, {n}, {k}, {ea}, {eb}, d, a, {da}, "
            f"{self.raw(c.args[2], 64)}, {acc}, {ta}, {tb}, {sign_a}, {sign_b}, {m}); }}"
        )

    def do_trap(self, c, m, M):
        return f'if ({m}) trap(w, {self.site(c)}, "trap");'

    # -- the program
    def place_registers(self):
        """Offsets: of kept registers for good, of others from their first to their last instruction in their block."""
        self.places, self.size = {}, 0
        bytes_of = dict(pred=128, b16=64, b32=128, b64=256)

        def fresh(kind):
            self.size += bytes_of[kind]
            return self.size - bytes_of[kind]

        for n in sorted(self.kept, key=lambda n: (self.entry.registers[n] != "b64", self.entry.registers[n], n)):
            self.places[n] = fresh(self.entry.registers[n])
        free = {k: [] for k in bytes_of}
        word = re.compile(r"[%\w$.]+")
        for block in self.entry.blocks:
            last = {}
            for i, c in enumerate(block.code):
                for n in [c.guard, *word.findall(" ".join(c.args))]:
                    if n in self.entry.registers and n not in self.kept:
                        last[n] = i
            ends = {}
            for n, i in last.items():
                ends.setdefault(i, []).append(n)
            seen = set()
            for i, c in enumerate(block.code):
                for n in [c.guard, *word.findall(" ".join(c.args))]:
                    if n in last and n not in seen:
                        seen.add(n)
                        kind = self.entry.registers[n]
                        self.places[n] = free[kind].pop() if free[kind] else fresh(kind)
                for n in ends.get(i, ()):
                    free[self.entry.registers[n]].append(self.places[n])

    def program(self):
        """Blocks (line, code of (function's text, operands), next, target, predicate, negated, classes)."""
        self.place_registers()
        out = []
        for i, block in enumerate(self.entry.blocks):
            code, following, target, predicate, negated = [], i + 1, EXIT, -1, 0
            counts = [0] * len(CLASSES)

            def emit(text, code=code):
                if text:
                    code.append((text, self.operands))

            self.operands = []
            if i and (last := self.entry.blocks[i - 1].code[-1:]) and last[0].op[0] in ("bar", "barrier"):
                emit(self.after_bar(last[0]))
            for c in block.code:
                counts[CLASSES.index(kind_of(c.op))] += 1
                if c.op[0] in ("bra", "ret", "exit"):
                    to = self.entry.labels[c.args[0]] if c.op[0] == "bra" else EXIT
                    if c.guard:
                        target, predicate, negated = to, self.places[c.guard], int(c.negated)
                    else:
                        following = to
                    continue
                self.operands = []
                try:
                    emit(self.one(c))
                except (Unknown, KeyError, StopIteration, ValueError) as e:
                    raise Unknown(f"line {c.line}: {c.text}: {e!r}") from e
            out.append((block.line, code, following, target, predicate, negated, counts))
        return reordered(out)


EXIT = 1 << 30


def reordered(program):
    """Blocks in the order in which lanes that parted meet again when the first block runs first: every loop lies together
    and before what follows it (Bourdoncle's weak topological order)."""
    edges = [[t for t in (row[2], row[3]) if t != EXIT] for row in program]
    order = []

    def components(nodes, starts):  # strongly connected, in topological order (Tarjan)
        index, low, stack, on, out = {}, {}, [], set(), []
        for start in starts:
            if start in index:
                continue
            work = [(start, iter(edges[start]))]
            index[start] = low[start] = len(index)
            stack.append(start), on.add(start)
            while work:
                v, rest = work[-1]
                for u in rest:
                    if u not in nodes or (v, u) in cut:
                        continue
                    if u not in index:
                        index[u] = low[u] = len(index)
                        stack.append(u), on.add(u)
                        work.append((u, iter(edges[u])))
                        break
                    if u in on:
                        low[v] = min(low[v], index[u])
                else:
                    work.pop()
                    if work:
                        low[work[-1][0]] = min(low[work[-1][0]], low[v])
                    if low[v] == index[v]:
                        part = []
                        while True:
                            part.append(stack.pop())
                            on.discard(part[-1])
                            if part[-1] == v:
                                break
                        out.append((v, part))  # v was met first: the loop's head
        return out[::-1]

    cut = set()

    def visit(nodes, starts):
        for head, part in components(nodes, starts):
            if len(part) == 1:
                order.append(head)
                continue
            cut.update((v, head) for v in part)
            visit(set(part), [head])

    visit(set(range(len(program))), [0])
    place = {b: i for i, b in enumerate(order)}
    at = lambda b: b if b == EXIT else place[b]  # noqa: E731
    return [(row[0], row[1], at(row[2]), at(row[3]), *row[4:]) for row in (program[b] for b in order)]


PRELUDE = """#include "emu.h"
#define R(T, i) (*(T*)(regs + (i)))
#define OP extern "C" __attribute__((visibility("default"))) void
#define BEGIN const Special& sr = base(w).sr; const Pred& M = *(const Pred*)wide; (void)sr, (void)M;
IN uint32_t one(U32 x, uint32_t m) { return x[__builtin_ctz(m | 1u << 31)]; }
"""


def symbol(text: str) -> str:
    return "op_" + hashlib.sha256(text.encode()).hexdigest()[:16]


def function(text: str) -> str:
    return f"OP {symbol(text)}(Warp& w, char* regs, const int64_t* s, uint32_t m, const int32_t* wide) {{ BEGIN\n  {text}\n}}\n"
