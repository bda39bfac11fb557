"""Arithmetic, comparisons and conversions as C++ over machine/lanes.h."""

from .ptx import WIDTHS, Instruction

# name: (C++ over operands, their types, the result's): t the instruction's type, b its bits, u u32
FORMS = {
    "add": ("{0} + {1}", "tt", "t"), "sub": ("{0} - {1}", "tt", "t"), "mul": ("{0} * {1}", "tt", "t"),
    "fma": ("fma_rn({0}, {1}, {2})", "ttt", "t"), "mad": ("{0} * {1} + {2}", "ttt", "t"),
    "div": ("divide({0}, {1})", "tt", "t"), "rem": ("remainder_of({0}, {1})", "tt", "t"),
    "abs": ("magnitude({0})", "t", "t"), "neg": ("negative({0})", "t", "t"),
    "min": ("lower({0}, {1})", "tt", "t"), "max": ("higher({0}, {1})", "tt", "t"),
    "and": ("{0} & {1}", "tt", "t"), "or": ("{0} | {1}", "tt", "t"), "xor": ("{0} ^ {1}", "tt", "t"),
    "not": ("~{0}", "t", "t"),
    "shl": ("shift_left({0}, {1})", "tu", "t"), "shr": ("shift_right({0}, {1})", "tu", "t"),
    "prmt": ("byte_permute({0}, {1}, {2})", "uuu", "b"), "brev": ("reverse({0})", "t", "t"),
    "popc": ("popcount({0})", "t", "u"), "clz": ("leading_zeros({0})", "t", "u"),
    "bfi": ("insert_bits({0}, {1}, {2}, {3})", "ttuu", "t"), "bfe": ("extract_bits({0}, {1}, {2})", "tuu", "t"),
    "rcp": ("1.f / {0}", "t", "t"), "sqrt": ("square_root({0})", "t", "t"),
    "rsqrt": ("1.f / square_root({0})", "t", "t"),
    "ex2": ("exp2_of({0})", "t", "t"), "lg2": ("log2_of({0})", "t", "t"), "sin": ("sine({0})", "t", "t"),
    "cos": ("cosine({0})", "t", "t"), "tanh": ("tanh_of({0})", "t", "t"),
}  # fmt: skip
ROUNDED = {
    "add": "{0}, F32{{}} + 1.f, {1}",
    "sub": "{1}, F32{{}} - 1.f, {0}",
    "mul": "{0}, {1}, xor_sign(F32{{}}, {0}, {1})",
    "fma": "{0}, {1}, {2}",
}
ROUNDS = dict(rz="kTowardZero", rm="kFloor", rp="kCeiling")
INTEGRAL = dict(rzi="kTowardZero", rni="kNearest", rmi="kFloor", rpi="kCeiling")
HALVES = dict(f16="f16", bf16="bf16", f16x2="f16", bf16x2="bf16")
SIGNS = dict(eq="==", ne="!=", lt="<", le="<=", gt=">", ge=">=", lo="<", ls="<=", hi=">", hs=">=")


def limits(kind: str) -> tuple[int, int]:
    """The least and the greatest number of an integer type."""
    bits = WIDTHS[kind]
    return (0, 2**bits - 1) if kind[0] == "u" else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


class Arithmetic:
    def arithmetic(self, c: Instruction) -> str:
        kind = c.op[-1]
        form, kinds, result = FORMS[c.name]
        if kind in ("u16x2", "s16x2"):
            a, b = (self.raw(x, 32) for x in c.args[1:])
            return self.set(c.args[0], "b32", f"pair(low({a}) + low({b}), top({a}) + top({b}))")
        if "NaN" in c.op:
            form = form.replace("(", "_nan(", 1)
        if "xorsign" in c.op:
            form = f"xor_sign({form.format('magnitude({0})', 'magnitude({1})')}, {{0}}, {{1}})"
        if kind in HALVES:
            return self.halves(c, kind, form.replace("fma_rn", "fma_odd"))
        types = dict(t=kind, b=f"b{WIDTHS[kind]}", u="u32")
        values = [self.value(a, types[k]) for a, k in zip(c.args[1:], kinds, strict=True)]
        if "wide" in c.op:
            kind = types["t"] = f"{kind[0]}{2 * WIDTHS[kind]}"
            big = kind.upper()
            values[:2] = [f"TO({big}, {v})" for v in values[:2]]
            if c.name == "mad":
                values[2] = self.value(c.args[3], kind)
        elif "hi" in c.op:
            form = form.replace("{0} * {1}", "high({0}, {1})")
        direction = next((ROUNDS[r] for r in c.op if r in ROUNDS), None)
        if direction:
            form = f"fma_rounded({ROUNDED[c.name]}, {direction})"
        if "ftz" in c.op:
            values = [f"flush({v})" for v in values]
        text = form.format(*values)
        for modifier, function in (("sat", "saturate"), ("ftz", "flush")):
            text = f"{function}({text})" if modifier in c.op else text
        return self.set(c.args[0], types[result], text)

    def halves(self, c: Instruction, kind: str, form: str) -> str:
        """f16, bf16 and pairs of them, in fp32 and rounded."""
        of, to = f"of_{HALVES[kind]}", f"{HALVES[kind]}_of"
        raw = [self.raw(a, WIDTHS[kind]) for a in c.args[1:]]
        if kind == HALVES[kind]:
            return self.set(c.args[0], kind, f"{to}({form.format(*(f'{of}({x})' for x in raw))})")
        low, high = (f"{to}({form.format(*(f'{of}({part}({x}))' for x in raw))})" for part in ("low", "top"))
        return self.set(c.args[0], kind, f"pair({low}, {high})")

    def do_mov(self, c: Instruction) -> str:
        kind, (to, source) = c.op[-1], c.args
        bits = WIDTHS[kind]
        if to.startswith("{"):
            parts = self.vector(to)
            each = bits // len(parts)
            sets = [self.set(p, f"b{each}", f"TO(U{each}, whole >> {each * i})") for i, p in enumerate(parts)]
            return f"const U{bits} whole = {self.raw(source, bits)}; {' '.join(sets)}"
        if source.startswith("{"):
            parts = self.vector(source)
            each = bits // len(parts)
            return self.set(
                to, kind, " | ".join(f"TO(U{bits}, {self.raw(p, each)}) << {each * i}" for i, p in enumerate(parts))
            )
        return self.set(to, kind, self.raw(source, bits, kind == "f32"))

    def do_lop3(self, c: Instruction) -> str:
        a, b, d = (self.raw(x, 32) for x in c.args[1:4])
        return self.set(c.args[0], "b32", f"lop3<{int(c.args[4], 0)}>({a}, {b}, {d})")

    def do_shf(self, c: Instruction) -> str:
        a, b, n = (self.raw(x, 32) for x in c.args[1:])
        n = f"({n} & 31u)" if c.op[2] == "wrap" else f"lower({n}, k32(32))"
        return self.set(c.args[0], "b32", f"funnel_{'left' if c.op[1] == 'l' else 'right'}({a}, {b}, {n})")

    def do_bfind(self, c: Instruction) -> str:
        return self.set(c.args[0], "b32", f"find_highest<{int('shiftamt' in c.op)}>({self.value(c.args[1], c.op[-1])})")

    def compared(self, c: Instruction) -> str:
        kind, how = c.op[-1], c.op[1]
        of = f"of_{kind}" if kind in HALVES else ""
        a, b = (f"{of}({self.raw(x, 16)})" if of else self.value(x, kind) for x in c.args[1:3])
        floating = of or kind == "f32"
        if how in ("num", "nan"):
            text = f"({a} == {a}) & ({b} == {b})" if how == "num" else f"({a} != {a}) | ({b} != {b})"
        elif how in SIGNS:
            text = f"{a} {SIGNS[how]} {b}"
            if floating and how == "ne":
                text = f"({text}) & ({a} == {a}) & ({b} == {b})"
        else:  # equ, neu, ltu, leu, gtu, geu: true where one is NaN
            text = f"({a} {SIGNS[how[:2]]} {b}) | ({a} != {a}) | ({b} != {b})"
        return f"pred({text})"

    def do_setp(self, c: Instruction) -> str:
        sign = next((s for o, s in (("and", "&"), ("or", "|"), ("xor", "^")) if o in c.op), "")
        text = f"const Pred holds = {self.compared(c)}; "
        rest = f" {sign} {self.raw(c.args[3], 1)}" if sign else ""
        return text + " ".join(
            self.set(t, "pred", f"({'~' * i}holds){rest}") for i, t in enumerate(c.args[0].split("|"))
        )

    def do_selp(self, c: Instruction) -> str:
        bits = WIDTHS[c.op[-1]]
        a, b = (self.raw(x, bits, c.op[-1] == "f32") for x in c.args[1:3])
        return self.set(c.args[0], f"b{bits}", f"pick({self.raw(c.args[3], 1)}, {a}, {b})")

    # -- conversions
    def do_cvt(self, c: Instruction) -> str:
        to, source = c.op[-2:]
        if source in ("e4m3x2", "e5m2x2"):
            return self.set(c.args[0], "f16x2", f"f16x2_of_{source}({self.raw(c.args[1], 16)})")
        if to in ("f16x2", "bf16x2", "e4m3x2", "e5m2x2"):
            return self.packed(c, to, source)
        how = next((INTEGRAL[o] for o in c.op if o in INTEGRAL), None)
        floating = source in HALVES or source == "f32"
        x = f"of_{source}({self.raw(c.args[1], 16)})" if source in HALVES else self.value(c.args[1], source)
        if source == "u8":
            x = f"({x} & uint16_t(255))"
        elif source == "s8":
            x = f"(S16({x} << 8) >> 8)"
        if "ftz" in c.op:
            x = f"flush({x})"
        if to in HALVES or to == "f32":
            x = f"integral({x}, {how})" if how else x if floating else f"TO(F32, {x})"
            x = f"saturate({x})" if "sat" in c.op else x
            return self.set(c.args[0], to, f"{to}_of({x})" if to in HALVES else x)
        bits = max(WIDTHS[to], 16)
        if floating:
            big = f"{to[0].upper()}{max(bits, 32)}"
            x = f"to_int<{big}>({x}, {how})"
            source = big.lower()
        if WIDTHS[to] < 32 and floating or "sat" in c.op:
            (least, most), (lowest, highest) = limits(to), limits(source)
            type_ = f"{source[0].upper()}{max(WIDTHS[source], 16)}"
            if lowest < least:
                x = f"higher({x}, {type_}{{}} + ({least}))"
            if highest > most:
                x = f"lower({x}, {type_}{{}} + {most})"
        x = f"TO({source[0].upper()}{bits}, {x})"
        if to == "u8":
            x = f"({x} & 255)"
        elif to == "s8":
            x = f"(S16({x} << 8) >> 8)"
        return self.set(c.args[0], to, x)

    def packed(self, c: Instruction, to: str, source: str) -> str:
        """Two numbers into one register; the first operand is the upper half."""
        if source == "f32":
            high, low = (self.value(v, "f32") for v in c.args[1:3])
        else:
            x, of = self.raw(c.args[1], 32), f"of_{HALVES[source]}"
            high, low = f"{of}(top({x}))", f"{of}(low({x}))"
        if to in HALVES:
            return self.set(c.args[0], to, f"pair({HALVES[to]}_of({low}), {HALVES[to]}_of({high}))")
        return self.set(c.args[0], "b16", f"{to}_of({high}, {low})")


for name in FORMS:
    if not hasattr(Arithmetic, f"do_{name}"):
        setattr(Arithmetic, f"do_{name}", Arithmetic.arithmetic)
