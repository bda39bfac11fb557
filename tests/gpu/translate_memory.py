"""Memory, collectives of a warp and barriers of a block as calls of machine/operations.h."""

import re

from .ptx import WIDTHS, Instruction

SPACES = {
    **dict.fromkeys(("shared", "shared::cta", "shared::cluster"), "kShared"), "global": "kGlobal", "param": "kParam",
    "local": "kLocal", "const": "kConstant",
}  # fmt: skip
ORDERS = dict(
    relaxed="kRelaxed", volatile="kRelaxed", acquire="kAcquire", release="kRelease", acq_rel="kBoth", nc="kNonCoherent"
)
ATOMICS = {
    name: f"k{name.capitalize()}" for name in ("add", "min", "max", "exch", "cas", "inc", "dec", "and", "or", "xor")
}
VECTOR = {1: "Pred", 16: "U16", 32: "U32", 64: "U64"}
# The longest beginning of an opcode that is here: C++ as Translator.fill reads it
CALLS = {
    "activemask": "0=b32 k32({m})",
    **dict.fromkeys(("prefetch", "membar.cta", "fence.acq_rel.cta"), ""),
    "bar.warp": "warp_sync(w, {s}, {0.32}, {m});",
    "barrier.cluster.arrive": "cluster_arrive(w, {s}, 1, {m});",
    "barrier.cluster.arrive.relaxed": "cluster_arrive(w, {s}, 0, {m});",
    "barrier.cluster.wait": "cluster_wait(w, {s}, 1, {m});",
    "brkpt": 'trap(w, {s}, "brkpt");', "trap": 'trap(w, {s}, "trap");', "call": 'trap(w, {s}, "an assertion");',
    "cvta": "0=b64 {1.64}", "cvta.shared": "0=b64 to_generic(w, {1.64})",
    "cvta.to.shared": "0=b64 to_shared(w, {1.64})",
    "elect.sync":
        "const uint32_t first = elect(w, {s}, {1.32}, {m}); | 0=b32 k32(first) | 1=pred pred((S32)(sr.lane == first))",
    "fence": "fence(w, {s}, {m});", "membar": "fence(w, {s}, {m});",
    "fence.mbarrier_init": "proxy_fence(w, {m}); fence(w, {s}, {m});", "fence.proxy": "proxy_fence(w, {m});",
    "fence.proxy.tensormap::generic.release": "",
    "fence.proxy.tensormap::generic.acquire": "map_acquire(w, {s}, {0@}, {m});",
    "griddepcontrol.launch_dependents": "launch_dependents(w);", "griddepcontrol.wait": "wait_for_previous(w);",
    "mapa": "0=t map_shared(w, {1.64}, {2.32}, 1)", "mapa.shared::cluster": "0=t map_shared(w, {1.64}, {2.32}, 0)",
    "match.any": "0=b32 match_any(w, {s}, {1.t}, {2.32}, {m})",
    "nanosleep": "nap(w, {s});",
    "redux.sync": "0=b32 k32(reduce<{lane}>(w, {s}, {atomic}, {1.32}, {2.32}, {m}))",
    "setmaxnreg.inc": "set_registers(w, {s}, {0}, 1, {m});", "setmaxnreg.dec": "set_registers(w, {s}, {0}, 0, {m});",
    "shfl.sync": "Pred ok; const U32 got = shuffle(w, {s}, {how}, {1.32}, {2.32}, {3.32}, {4.32}, {m}, &ok); "
                 "| 0=b32 got | 1=pred ok",
    "vote.sync.all": "0=pred k1(ballot(w, {s}, {1.1}, {2.32}, {m}) == {m})",
    "vote.sync.any": "0=pred k1(ballot(w, {s}, {1.1}, {2.32}, {m}) != 0)",
    "vote.sync.ballot": "0=b32 k32(ballot(w, {s}, {1.1}, {2.32}, {m}))",
}  # fmt: skip


def modifier(c: Instruction, names: dict[str, str], default: str = "") -> str:
    return next((names[o] for o in c.op[1:] if o in names), default)


class Memory:
    def space(self, c: Instruction) -> str:
        return modifier(c, SPACES, "kGeneric")

    def find_merged(self):
        """ptxas makes one access of scalar ones to neighbouring words of shared memory: to be counted so.

        By line: bytes of the first, 0 for the others.
        """
        self.merged: dict[int, int] = {}

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

    def values(self, names: list[str], bits: int, floating: bool = False, name: str = "values") -> str:
        """C++ that declares an array of pointers to operands as vectors of `bits`."""
        vectors = "".join(
            f"const {VECTOR[bits]} {name}{i} = {self.raw(n, bits, floating)}; " for i, n in enumerate(names)
        )
        return f"{vectors}const {VECTOR[bits]}* {name}[] = {{{', '.join(f'&{name}{i}' for i in range(len(names)))}}}; "

    def do_ld(self, c: Instruction) -> str:
        kind, names = c.op[-1], self.vector(c.args[0])
        bits = self.entry.registers[next(n for n in names if n != "_")]
        spare = f"{VECTOR[bits]} spare; " * ("_" in names)
        to = ", ".join(f"&{self.register(n)}" if n != "_" else "&spare" for n in names)
        lane, memory = f"uint{bits}_t", ("" if kind[0] == "s" else "u") + f"int{WIDTHS[kind]}_t"
        call = f"load<{memory}, {lane}>(w, {{s}}, {{space}}, {modifier(c, ORDERS, 'kPlain')}, {{1@}}, {{m}}"
        return f"{spare}{VECTOR[bits]}* to[] = {{{to}}}; " + self.fill(c, f"{call}, {len(names)}, ({lane}* const*)to);")

    def do_st(self, c: Instruction) -> str:
        kind, names = c.op[-1], self.vector(c.args[1])
        if "async" in c.op:
            each = ", ".join(f"TO(U64, {self.raw(n, WIDTHS[kind])})" for n in names)
            call = f"store_async(w, {{s}}, {{0@}}, {len(names)}, {WIDTHS[kind] // 8}, values, {{2@}}, {{m}});"
            return f"const U64 values[] = {{{each}}}; " + self.fill(c, call)
        if "param" in c.op:  # the argument of a call
            return ""
        bits = max([WIDTHS[kind], 16, *(self.entry.registers.get(n, 0) for n in names)])
        types, order = f"uint{WIDTHS[kind]}_t, uint{bits}_t", modifier(c, ORDERS, "kPlain")
        call = f"store<{types}>(w, {{s}}, {{space}}, {order}, {{0@}}, {{m}}"
        values = self.values(names, bits, kind == "f32")
        return values + self.fill(c, f"{call}, {len(names)}, (const uint{bits}_t* const*)values);")

    def do_atom(self, c: Instruction) -> str:
        kind, first = c.op[-1], int(c.name == "atom")
        bits, operands = WIDTHS[kind], c.args[first + 1 :]
        lane = ("" if kind[0] == "s" else "u") + f"int{bits}_t"
        call = (
            f"U{bits} old = {{}}; atomic<{lane}>(w, {{s}}, {{space}}, {modifier(c, ORDERS, 'kRelaxed')}, {{atomic}}, "
            f"{{{first}@}}, {{m}}, values[0], {'values[1]' if len(operands) > 1 else 'nullptr'}, &old);"
        )
        keep = self.set(c.args[0], f"b{bits}", "old") if first else ""
        return self.values(operands, bits) + self.fill(c, call) + keep

    do_red = do_atom

    def do_ldmatrix(self, c: Instruction) -> str:
        load = c.name == "ldmatrix"
        names = self.vector(c.args[0 if load else 1])
        call = "load_matrix" if load else "store_matrix"
        at = "{1@}" if load else "{0@}"
        registers = f"U32* r[] = {self.pointers(names)}; "
        return registers + self.fill(c, f"{call}(w, {{s}}, {len(names)}, {int('trans' in c.op)}, {at}, {{m}}, r);")

    do_stmatrix = do_ldmatrix

    def do_bar(self, c: Instruction) -> str:
        """A barrier of a block: sync, arrive or red, with its number and, where not all take part, their number."""
        if c.op[1] in ("warp", "cluster"):
            return self.fill(c, self.call_of(c))
        args = c.args[1:] if "red" in c.op else [*c.args]
        vote = f"const Pred vote = {self.raw(args.pop(), 1)}; " if "red" in c.op else ""
        threads = self.raw(args[1], 32) if len(args) > 1 else "k32(0)"
        waits, pointer = int("arrive" not in c.op), "&vote" if vote else "nullptr"
        return vote + self.fill(c, f"barrier(w, {{s}}, {self.raw(args[0], 32)}, {threads}, {waits}, {{m}}, {pointer});")

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
