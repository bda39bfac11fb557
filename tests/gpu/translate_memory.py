"""Memory, collectives of a warp and barriers of a block as calls of machine/operations.h."""

import re

from .ptx import WIDTHS, Instruction

SPACES = {"shared": "kShared", "shared::cta": "kShared", "shared::cluster": "kShared", "global": "kGlobal",
          "param": "kParam", "param::entry": "kParam", "local": "kLocal", "const": "kConstant"}  # fmt: skip
ORDERS = {"relaxed": "kRelaxed", "volatile": "kRelaxed", "acquire": "kAcquire", "release": "kRelease", "acq_rel": "kBoth",
          "nc": "kNonCoherent"}  # fmt: skip
ATOMS = {"add": "kAdd", "min": "kMin", "max": "kMax", "exch": "kExch", "cas": "kCas", "inc": "kInc", "dec": "kDec",
         "and": "kAnd", "or": "kOr", "xor": "kXor"}  # fmt: skip
VECTOR = {1: "Pred", 16: "U16", 32: "U32", 64: "U64"}


def modifier(c: Instruction, names: dict, default: str) -> str:
    return next((names[o] for o in c.op[1:] if o in names), default)


class Memory:
    def space(self, c: Instruction) -> str:
        return modifier(c, SPACES, "kGeneric")

    def find_merged(self):
        """ptxas makes one access of scalar ones to neighbouring words of shared memory: to be counted so. By line: bytes
        of the first, 0 for the others."""
        self.merged = {}

        def close(groups):
            for at in groups.values():
                for size in (16, 8):
                    for o in sorted(at):
                        words = [o + 4 * i for i in range(size // 4)]
                        if o % size == 0 and all(w in at and at[w] not in self.merged for w in words):
                            first, *rest = sorted(at[w] for w in words)
                            self.merged |= dict.fromkeys(rest, 0) | {first: size}
            groups.clear()

        groups = {}  # (ld or st, base): offset: line
        for block in self.entry.blocks:
            close(groups)
            for c in block.code:
                if c.name in ("fence", "membar", "mbarrier", "cp"):
                    close(groups)
                if c.name in ("ld", "st") and "shared" in c.op[1] and len(c.op) == 3 and WIDTHS[c.op[-1]] == 32:
                    base, offset = re.fullmatch(r"\[(.+?)\s*(?:\+\s*(-?\w+))?\]", c.args[c.name == "ld"]).groups()
                    if c.name == "st":  # a load does not pass it
                        close({k: groups.pop(k) for k in [*groups] if k[0] == "ld"})
                    groups.setdefault((c.name, base), {})[int(offset, 0) if offset else 0] = c.line
                for n in self.uses[id(c)][1]:
                    close({k: groups.pop(k) for k in [*groups] if k[1] == n})
        close(groups)

    # -- memory
    def do_ld(self, c: Instruction) -> str:
        kind, names = c.op[-1], self.vector(c.args[0])
        bits = self.entry.registers[next(n for n in names if n != "_")]
        spare = f"{VECTOR[bits]} spare; " * ("_" in names)
        to = ", ".join(f"&{self.register(n)}" if n != "_" else "&spare" for n in names)
        memory = ("" if kind[0] == "s" else "u") + f"int{WIDTHS[kind]}_t"
        order = "kPlain" if self.space(c) in ("kParam", "kConstant", "kLocal") else modifier(c, ORDERS, "kPlain")
        return (
            f"{spare}{VECTOR[bits]}* to[] = {{{to}}}; load<{memory}, uint{bits}_t>(w, {self.site(c)}, {self.space(c)}, {order}, "
            f"{self.address(c.args[1])}, {self.mask}, {len(names)}, (uint{bits}_t* const*)to);"
        )

    do_ldu = do_ld

    def values(self, names: list[str], bits: int, floating: bool = False, name: str = "values") -> str:
        """C++ that declares pointers to operands as vectors of `bits`."""
        texts = [self.raw(n, bits, floating) for n in names]
        vectors = "".join(f"const {VECTOR[bits]} {name}{i} = {t}; " for i, t in enumerate(texts))
        return f"{vectors}const {VECTOR[bits]}* {name}[] = {{{', '.join(f'&{name}{i}' for i in range(len(names)))}}}; "

    def do_st(self, c: Instruction) -> str:
        if "async" in c.op:
            return self.store_async(c)
        if c.op[1] == "param":  # the argument of a call
            return ""
        kind, names = c.op[-1], self.vector(c.args[1])
        own = [self.entry.registers[n] for n in names if n in self.entry.registers]
        bits = max([WIDTHS[kind], 16, *own])
        return (
            f"{self.values(names, bits, kind == 'f32')}store<uint{WIDTHS[kind]}_t, uint{bits}_t>(w, {self.site(c)}, {self.space(c)}, "
            f"{modifier(c, ORDERS, 'kPlain')}, {self.address(c.args[0])}, {self.mask}, {len(names)}, (const uint{bits}_t* const*)values);"
        )

    def do_atom(self, c: Instruction) -> str:
        kind = c.op[-1]
        bits = WIDTHS[kind]
        at, *operands = c.args if c.name == "red" else c.args[1:]
        lane = dict(f32="float", f64="double").get(kind, ("" if kind[0] == "s" else "u") + f"int{bits}_t")
        if bits < 32 or kind in ("f16x2", "bf16x2"):
            raise ValueError("an atomic of 16 bits")
        keep = self.set(c.args[0], f"b{bits}", "old") if c.name == "atom" else ""
        return (
            f"{self.values(operands, bits, kind == 'f32')}U{bits} old = {{}}; atomic<{lane}>(w, {self.site(c)}, {self.space(c)}, "
            f"{modifier(c, ORDERS, 'kRelaxed')}, {modifier(c, ATOMS, '')}, {self.address(at)}, {self.mask}, values[0], "
            f"{'values[1]' if len(operands) > 1 else 'nullptr'}, &old); {keep}"
        )

    do_red = do_atom

    def do_cvta(self, c: Instruction) -> str:
        text = self.raw(c.args[1], 64)
        if any(o.startswith("shared") for o in c.op):
            text = f"to_{'shared' if 'to' in c.op else 'generic'}(w, {text})"
        return (
            self.set(c.args[0], "b64", text)
            if self.entry.registers[c.args[0]] == 64
            else self.set(c.args[0], "b32", f"TO(U32, {text})")
        )

    def do_isspacep(self, c: Instruction) -> str:
        return self.set(c.args[0], "pred", f"in_space(w, {SPACES[c.op[1]]}, {self.raw(c.args[1], 64)})")

    def do_mapa(self, c: Instruction) -> str:
        generic = not any(o.startswith("shared") for o in c.op)
        kind = f"b{WIDTHS[c.op[-1]]}"
        text = f"map_shared(w, {self.raw(c.args[1], 64)}, {self.raw(c.args[2], 32)}, {int(generic)})"
        return self.set(c.args[0], kind, text if kind == "b64" else f"TO(U32, {text})")

    def do_ldmatrix(self, c: Instruction) -> str:
        return self.matrix(c, "load", self.vector(c.args[0]), c.args[1])

    def do_stmatrix(self, c: Instruction) -> str:
        return self.matrix(c, "store", self.vector(c.args[1]), c.args[0])

    def matrix(self, c: Instruction, what: str, names: list[str], at: str) -> str:
        if "m8n8" not in c.op:
            raise ValueError("the shape of a matrix")
        return (
            f"U32* r[] = {self.pointers(names)}; {what}_matrix(w, {self.site(c)}, {len(names)}, {int('trans' in c.op)}, "
            f"{self.address(at)}, {self.mask}, r);"
        )

    def nothing(self, c: Instruction) -> str:
        return ""

    do_prefetch = do_prefetchu = do_applypriority = do_discard = do_pragma = nothing

    def do_membar(self, c: Instruction) -> str:
        return f"fence(w, {self.site(c)}, {self.mask});" if "cta" not in c.op else ""

    def do_fence(self, c: Instruction) -> str:
        if "tensormap::generic" in c.op:
            return (
                f"map_acquire(w, {self.site(c)}, {self.address(c.args[0])}, {self.mask});" if "acquire" in c.op else ""
            )
        if "mbarrier_init" in c.op or "proxy" in c.op:
            return f"proxy_fence(w, {self.mask});"
        return self.do_membar(c)

    def do_griddepcontrol(self, c: Instruction) -> str:
        return "wait_for_previous(w);" if c.op[1] == "wait" else "launch_dependents(w);"

    # -- of a warp
    def do_shfl(self, c: Instruction) -> str:
        how = dict(up="kUp", down="kDown", bfly="kButterfly", idx="kIndex")[c.op[2]]
        to, *inside = c.args[0].split("|")
        a, b, k, members = (self.raw(x, 32) for x in c.args[1:])
        call = (
            f"Pred ok; const U32 got = shuffle(w, {self.site(c)}, {how}, {a}, {b}, {k}, {members}, {self.mask}, &ok); "
        )
        return call + " ".join([self.set(to, "b32", "got"), *(self.set(p, "pred", "ok") for p in inside)])

    def do_vote(self, c: Instruction) -> str:
        call = f"const uint32_t votes = ballot(w, {self.site(c)}, {self.raw(c.args[1], 1)}, {self.raw(c.args[2], 32)}, {self.mask}); "
        if c.op[2] == "ballot":
            return call + self.set(c.args[0], "b32", "k32(votes)")
        holds = dict(any="votes != 0", all=f"votes == {self.mask}", uni=f"votes == 0 || votes == {self.mask}")[c.op[2]]
        return call + self.set(c.args[0], "pred", f"k1({holds})")

    def do_activemask(self, c: Instruction) -> str:
        return self.set(c.args[0], "b32", f"k32({self.mask})")

    def do_match(self, c: Instruction) -> str:
        if c.op[1] != "any":
            raise ValueError("match.all")
        value, members = self.raw(c.args[1], WIDTHS[c.op[-1]]), self.raw(c.args[2], 32)
        return self.set(c.args[0], "b32", f"match_any(w, {self.site(c)}, {value}, {members}, {self.mask})")

    def do_redux(self, c: Instruction) -> str:
        lane = "int32_t" if c.op[-1] == "s32" else "uint32_t"
        value, members = self.raw(c.args[1], 32), self.raw(c.args[2], 32)
        return self.set(
            c.args[0],
            "b32",
            f"k32(reduce<{lane}>(w, {self.site(c)}, {ATOMS[c.op[2]]}, {value}, {members}, {self.mask}))",
        )

    def do_elect(self, c: Instruction) -> str:
        to, p = c.args[0].split("|")
        call = f"const uint32_t leader = elect(w, {self.site(c)}, {self.raw(c.args[1], 32)}, {self.mask}); "
        return call + self.set(to, "b32", "k32(leader)") + self.set(p, "pred", "pred((S32)(sr.lane == leader))")

    def do_setmaxnreg(self, c: Instruction) -> str:
        return f"set_registers(w, {self.site(c)}, {c.args[0]}, {int('inc' in c.op)}, {self.mask});"

    def do_nanosleep(self, c: Instruction) -> str:
        return f"nap(w, {self.site(c)});"

    def do_trap(self, c: Instruction) -> str:
        return f'trap(w, {self.site(c)}, "{c.name}");'

    do_brkpt = do_trap

    def do_call(self, c: Instruction) -> str:  # the functions that PTX may call without a body
        return "" if "vprintf" in c.text else self.do_trap(c)

    # -- barriers of a block, or of a cluster
    def do_bar(self, c: Instruction) -> str:
        op = [o for o in c.op if o not in ("cta", "aligned")]
        if op[1] == "warp":
            return f"warp_sync(w, {self.site(c)}, {self.raw(c.args[0], 32)}, {self.mask});"
        if op[1] == "cluster":
            call = f"cluster_{op[2]}(w, {self.site(c)}, {int('relaxed' not in op)}, {self.mask});"
            return call
        args = c.args[1:] if op[1] == "red" else c.args
        vote = args.pop() if op[1] == "red" else ""
        threads = self.raw(args[1], 32) if len(args) > 1 else "k32(0)"
        before = f"const Pred vote = {self.raw(vote, 1)}; " if vote else ""
        return (
            f"{before}barrier(w, {self.site(c)}, {self.raw(args[0], 32)}, {threads}, {int(op[1] != 'arrive')}, {self.mask}, "
            f"{'&vote' if vote else 'nullptr'});"
        )

    do_barrier = do_bar

    def after_barrier(self, c: Instruction) -> str:
        """What the next block begins with: the result of bar.red."""
        if "red" not in c.op:
            return ""
        self.mask, self.wide = "m", "M"
        yes, everyone = "(base(w).barrier_result & 0xffff)", "base(w).barrier_result >> 16"
        if "popc" in c.op:
            return self.set(c.args[0], "b32", f"k32({yes})")
        return self.set(c.args[0], "pred", f"k1({yes}{'' if 'or' in c.op else f' == {everyone}'})")
