"""An entry as a program of the machine: for each instruction a function in C++ and the operands that it is given.

The C++ names no register and no number, so that a few hundred functions serve all kernels, and each is compiled once.
Registers that live across basic blocks have their places for good and are written under the mask of active lanes; all
others share places, and their lanes outside the mask are garbage.
"""

import functools
import operator
import re
import struct

from . import translate_memory, translate_tensor
from .flow import live_at_begin, running_order
from .ptx import WIDTHS, Entry, Instruction, Module, layout, split
from .syntax import unknown
from .translate_arithmetic import Arithmetic
from .translate_memory import ATOMICS, ORDERS, Memory, modifier
from .translate_tensor import Tensor

EXIT = 1 << 30
CALLS = translate_memory.CALLS | translate_tensor.CALLS
SHUFFLES = dict(up="kUp", down="kDown", bfly="kButterfly", idx="kIndex")
VECTOR = {1: "Pred", 16: "U16", 32: "U32", 64: "U64"}
NO_RESULT = set(
    "st red bra ret exit cp fence membar prefetch stmatrix nanosleep setmaxnreg griddepcontrol trap brkpt "
    "call tensormap".split()
)
WORD = re.compile(r"[%\w$.]+")
SPECIAL = {
    **{f"%{s}.{a}": f"k32(sr.{s}[{i}])" for s in ("ctaid", "ntid", "nctaid") for i, a in enumerate("xyz")},
    **{f"%cluster_{s}.{a}": f"k32(sr.cluster_{s}[{i}])" for s in ("ctaid", "nctaid") for i, a in enumerate("xyz")},
    **{f"%tid.{a}": f"sr.tid[{i}]" for i, a in enumerate("xyz")},
    **{f"%clusterid.{a}": f"k32(sr.ctaid[{i}] / sr.cluster_nctaid[{i}])" for i, a in enumerate("xyz")},
    **{f"%nclusterid.{a}": f"k32(sr.nctaid[{i}] / sr.cluster_nctaid[{i}])" for i, a in enumerate("xyz")},
    "%cluster_nctarank": "k32(sr.cluster_nctaid[0] * sr.cluster_nctaid[1] * sr.cluster_nctaid[2])",
    "%cluster_ctarank": "k32(sr.rank)", "%laneid": "sr.lane", "%warpid": "k32(sr.warp)",
    "%lanemask_lt": "((k32(1) << sr.lane) - 1u)", "%lanemask_le": "((k32(2) << sr.lane) - 1u)",
    "%lanemask_gt": "~((k32(2) << sr.lane) - 1u)", "%lanemask_ge": "~((k32(1) << sr.lane) - 1u)",
    "%lanemask_eq": "(k32(1) << sr.lane)", "%smid": "k32(0)", "%nsmid": "k32(1)",
    **dict.fromkeys(("%clock", "%globaltimer_lo"), "k32(0)"),
    **dict.fromkeys(("%clock64", "%globaltimer", "%gridid"), "k64(0)"),
}  # fmt: skip


class Unknown(NotImplementedError):
    pass


class Translator(Arithmetic, Memory, Tensor):
    def __init__(self, entry: Entry, module: Module):
        self.entry, self.module = entry, module
        self.sites: list[tuple] = []  # (line, text, source, bytes)
        self.site_of: dict[int, int] = {}
        self.has_addresses = False  # of this process, among the operands
        # What the launch sizes comes last
        self.shared, self.shared_size = layout(sorted(entry.shared, key=lambda v: v.size == 0))
        self.local, size = layout(entry.local)
        self.local_size = -(-size // 16) * 16
        self.params = {v.name: offset for v, offset in entry.params}
        self.globals = module.global_addresses()
        self.code = [c for b in entry.blocks for c in b.code]
        self.uses = {id(c): self.used(c) for c in self.code}
        self.find_kept()
        self.find_merged()
        products = [c for c in self.code if c.op[:2] == ["wgmma", "mma_async"]]
        self.accumulators = {n for c in products for n in self.vector(c.args[0])}
        self.fragments = {n for c in products if c.args[1].startswith("{") for n in self.vector(c.args[1])}

    # -- registers
    def registers_in(self, text: str) -> list[str]:
        return [n for n in WORD.findall(text) if n in self.entry.registers]

    def used(self, c: Instruction) -> tuple[list[str], list[str]]:
        """The registers that an instruction reads, and those that it writes."""
        result = c.name not in NO_RESULT and bool(c.args)
        if c.name in ("bar", "barrier"):
            result = "red" in c.op
        elif c.name in ("mbarrier", "wgmma"):
            result = c.op[1] in ("arrive", "arrive_drop", "try_wait", "test_wait", "mma_async")
        writes = self.registers_in(c.args[0]) if result and not c.args[0].startswith("[") else []
        reads = self.registers_in(" ".join(c.args[1:] if writes else c.args))
        return reads + [c.guard] * bool(c.guard), writes

    def find_kept(self):
        """Registers that live across blocks, and those that a path reads before it has written them."""
        bit = {n: 1 << i for i, n in enumerate(self.entry.registers)}
        reads, writes = [], []
        for block in self.entry.blocks:
            first = written = 0
            for c in block.code:
                read, wrote = self.uses[id(c)]
                for n in read + wrote if c.guard else read:  # a guarded write keeps other lanes' values
                    first |= bit[n] & ~written
                for n in [] if c.guard else wrote:
                    written |= bit[n]
            reads.append(first), writes.append(written)
        live = live_at_begin(reads, writes, self.following())
        across = functools.reduce(operator.or_, live)
        self.kept = {n for n in self.entry.registers if across & bit[n]}
        written = {n for _, writes in self.uses.values() for n in writes}  # others are the compiler's undefined values
        self.doubtful = {n for n in self.entry.registers if live[0] & bit[n] and n in written}
        for c in self.code:  # a barrier's result comes in the next block; a wgmma works later
            if c.name in ("bar", "barrier", "wgmma"):
                self.kept.update(*self.uses[id(c)])

    def following(self) -> list[list[int]]:
        """The blocks that may follow each block."""
        out = []
        for i, block in enumerate(self.entry.blocks):
            c = block.code[-1]
            targets = [self.entry.labels[c.args[0]]] if c.name == "bra" else []
            if c.name not in ("bra", "ret", "exit") or c.guard:
                targets.append(i + 1)
            out.append([t for t in targets if t < len(self.entry.blocks)])
        return out

    def place_registers(self):
        """Offsets: of kept registers for good, of others from their first to their last instruction in their block."""
        self.places, self.size = {}, 0
        space = {1: 128, 16: 64, 32: 128, 64: 256}

        def fresh(size):
            self.size += size
            return self.size - size

        for n in sorted(self.kept, key=lambda n: (-self.entry.registers[n], n)):
            self.places[n] = fresh(space[self.entry.registers[n]])
        free = {size: [] for size in set(space.values())}
        self.block_places = []
        for block in self.entry.blocks:
            used = [list(dict.fromkeys(n for n in sum(self.uses[id(c)], []) if n not in self.kept)) for c in block.code]
            last = {n: i for i, names in enumerate(used) for n in names}
            places: dict[str, int] = {}
            for i, names in enumerate(used):
                for n in names:
                    if n not in places:
                        size = space[self.entry.registers[n]]
                        places[n] = free[size].pop() if free[size] else fresh(size)
                for n in names:
                    if last[n] == i:
                        free[space[self.entry.registers[n]]].append(places[n])
            self.block_places.append(places)
        self.marks = {n: fresh(4) for n in sorted(self.accumulators | self.fragments)}
        self.unwritten = {n: fresh(4) for n in sorted(self.doubtful)}
        self.size = -(-self.size // 256) * 256

    # -- operands
    def operand(self, value: int) -> str:
        self.operands.append(value)
        return f"s[{len(self.operands) - 1}]"

    def register(self, name: str) -> str:
        return f"R({VECTOR[self.entry.registers[name]]}, {self.operand(self.places[name])})"

    def immediate(self, text: str, bits: int, floating: bool) -> str | None:
        if m := re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", text):
            value = int(m[1], 16)
        elif re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            value = int(text.rstrip("U"), 8 if re.fullmatch(r"-?0\d+U?", text) else 0)
            if floating:
                value = struct.unpack("I", struct.pack("f", value))[0]
        elif re.fullmatch(r"-?\d*\.\d+(e[-+]?\d+)?", text):
            value = struct.unpack("I", struct.pack("f", float(text)))[0]
        elif text == "WARP_SZ":
            value = 32
        else:
            return None
        if bits == 1:
            return f"k1({int(bool(value))})"
        value &= (1 << bits) - 1
        return f"k{bits}({self.operand(value if value < 2**63 else value - 2**64)})"

    def raw(self, text: str, bits: int, floating: bool = False) -> str:
        """An operand as an unsigned vector of that width, or as a predicate."""
        if text.startswith("!"):
            return f"(~{self.raw(text[1:], bits)})"
        if text in SPECIAL:
            return self.resized(SPECIAL[text], 64 if "k64" in SPECIAL[text] else 32, bits)
        if text in self.entry.registers:
            return self.resized(self.register(text), self.entry.registers[text], bits)
        return self.immediate(text, bits, floating) or self.symbol(text, bits)

    def symbol(self, text: str, bits: int) -> str:
        name, _, offset = text.partition("+")
        offset = int(offset, 0) if offset else 0
        if name in self.shared:
            return f"k{bits}({self.operand(self.shared[name] + offset)})"
        if name in self.params:
            return f"k64(uint64_t(base(w).params) + {self.operand(self.params[name] + offset)})"
        if name in self.local:
            at = self.operand(self.local[name] + offset)
            return f"(k64(uint64_t(base(w).local) + {at}) + TO(U64, sr.lane) * base(w).local_size)"
        if name in self.globals:
            self.has_addresses = True
            return f"k64({self.operand(self.globals[name] + offset)})"
        raise Unknown(f"operand {text}")

    def resized(self, expression: str, bits: int, wanted: int) -> str:
        if bits == wanted:
            return expression
        if 1 in (bits, wanted):
            raise Unknown(f"a predicate as {wanted} bits")
        return f"TO(U{wanted}, {expression})"

    def value(self, text: str, kind: str) -> str:
        """An operand as a vector of its type: F32, S16, ...; U32 for untyped bits."""
        bits = max(WIDTHS[kind], 16) if kind != "pred" else 1
        expression = self.raw(text, bits, kind == "f32")
        typed = kind in ("s8", "s16", "s32", "s64", "f32")
        return f"(({kind[0].upper()}{bits}){expression})" if typed else expression

    def set(self, target: str, kind: str, expression: str) -> str:
        """Assigns to a register what has type `kind`; a wider register takes it by the type's sign."""
        if target == "_":
            return ""
        bits, own = WIDTHS[kind], self.entry.registers[target]
        if bits not in (own, 1):
            if kind in ("s8", "s16", "s32"):
                expression = f"(U{own})TO(S{own}, (S{max(bits, 16)})({expression}))"
            else:
                expression = f"TO(U{own}, (U{max(bits, 16)})({expression}))"
        elif own > 1:
            expression = f"(U{own})({expression})"
        place = self.register(target)
        masked = target in self.kept or self.wide != "M"
        return f"put({place}, {expression}, {self.wide});" if masked else f"{place} = {expression};"

    def address(self, text: str) -> str:
        base, offset = re.fullmatch(r"\[\s*(.+?)\s*(?:\+\s*(-?\w+))?\s*\]", text).groups()
        expression = self.raw(base, 64)
        return f"({expression} + uint64_t({self.operand(int(offset, 0))}))" if offset else expression

    def vector(self, text: str) -> list[str]:
        return split(text.strip()[1:-1]) if text.strip().startswith("{") else [text.strip()]

    def pointers(self, names: list[str]) -> str:
        return "{" + ", ".join(f"&{self.register(n)}" for n in names) + "}"

    def site(self, c: Instruction) -> str:
        index = self.site_of.setdefault(id(c), len(self.sites))
        if index == len(self.sites):
            self.sites.append((c.line, c.text, c.source, self.merged.get(c.line, -1)))
        return f"int({self.operand(index)})"

    # -- instructions
    def call_of(self, c: Instruction) -> str:
        """The entry of CALLS for the longest beginning of the opcode."""
        for n in range(len(c.op), 0, -1):
            if (name := ".".join(c.op[:n])) in CALLS:
                return CALLS[name]
        raise Unknown("no such opcode")

    def fill(self, c: Instruction, call: str) -> str:
        """C++ of a template of CALLS.

        {s}: the site; {m}: the mask; {2}, {2.32}, {2@}: operand 2 as it is written, as a vector of 32 bits, as an
        address; {2.t}: as a vector of the instruction's type. "0=b32 x" assigns x, of that type, to operand 0; where
        this is a pair d|p, "1=" means its second part. " | " separates statements.
        """
        names = dict(
            m=self.mask, space=self.space(c), order=modifier(c, ORDERS, "kBoth"), atomic=modifier(c, ATOMICS),
            lane="int32_t" if c.op[-1] == "s32" else "uint32_t", how=modifier(c, SHUFFLES),
        )  # fmt: skip

        def part(m):
            key, how = m.groups()
            if key == "s":
                return self.site(c)
            if not key.isdigit():
                return names[key]
            text = c.args[int(key)]
            if how == "@":
                return self.address(text)
            return self.raw(text, WIDTHS[c.op[-1]] if how == ".t" else int(how[1:])) if how else text

        out = []
        for piece in call.split(" | "):
            result = re.fullmatch(r"(\d)=(\w+) (.*)", piece)
            text = re.sub(r"\{(\w+)(@|\.\w+)?\}", part, result[3] if result else piece)
            if result:
                targets = c.args[0].split("|")
                kind = f"b{WIDTHS[c.op[-1]]}" if result[2] == "t" else result[2]
                if kind == "b64" or result[2] == "t":  # addresses: into 32 bits, too
                    bits = self.entry.registers[targets[0]]
                    kind, text = f"b{bits}", text if bits == 64 else f"TO(U32, {text})"
                text = self.set(targets[int(result[1])], kind, text) if int(result[1]) < len(targets) else ""
            out.append(text)
        return " ".join(out)

    def one(self, c: Instruction) -> str:
        self.mask, self.wide, before = "m", "M", ""
        if c.guard:
            guard = f"{'~' if c.negated else ''}{self.raw(c.guard, 1)}"
            before = f"const Pred G = M & {guard}; const uint32_t gm = bits(G); if (!gm) return; "
            self.mask, self.wide = "gm", "G"
        handler = getattr(self, f"do_{c.name}", None)
        text = handler(c) if handler else self.fill(c, self.call_of(c))
        return before + text if text else ""

    def care(self, c: Instruction, emit):
        """Emits checks of registers that a wgmma uses, or that may not be written yet; returns what comes after `c`."""
        reads, writes = (list(dict.fromkeys(names)) for names in self.uses[id(c)])
        guard = [self.places[c.guard] if c.guard else -1, int(c.negated)]

        def note(function, rows):
            if rows:
                self.operands = []
                self.site(c)
                emit(function, [*self.operands, *guard, len(rows), *sum(rows, [])])

        marked = [n for n in dict.fromkeys(reads + writes) if n in self.marks and c.name != "wgmma"]
        # 1: a wgmma may still read it. 2: moved, as Triton moves zeros to accumulators after the fence
        idle = [int(n not in self.accumulators and n not in writes) + 2 * (c.name == "mov") for n in marked]
        note("touch(w, regs, s, m);", [[self.marks[n], ok] for n, ok in zip(marked, idle, strict=True)])
        if c.name not in ("mov", "selp"):  # these may move what nobody looks at
            note("need_written(w, regs, s, m);", [[self.unwritten[n]] for n in reads if n in self.unwritten])
        written = [[self.unwritten[n]] for n in writes if n in self.unwritten]
        return lambda: note("note_written(regs, s, m);", written)

    def program(self) -> list[tuple]:
        """Blocks in running order: (line, code, next, target, predicate, negated), as machine/operations.h has
        them; an instruction is the text of a function and its operands."""
        self.place_registers()
        out = []
        for i, block in enumerate(self.entry.blocks):
            code, following, target, predicate, negated = [], i + 1, EXIT, -1, 0
            self.operands = []
            self.places |= self.block_places[i]
            before = self.entry.blocks[i - 1].code[-1] if i else None
            if before and before.name in ("bar", "barrier") and (text := self.after_barrier(before)):
                code.append((text, self.operands))
            for c in block.code:
                if problem := unknown(*c.op):
                    raise Unknown(f"PTX line {c.line}: {c.text}: the virtual GPU does not know {problem}")
                if c.name in ("bra", "ret", "exit"):
                    to = self.entry.labels[c.args[0]] if c.name == "bra" else EXIT
                    if c.guard:
                        target, predicate, negated = to, self.places[c.guard], int(c.negated)
                    else:
                        following = to
                    continue
                try:
                    after = self.care(c, lambda text, operands, code=code: code.append((text, operands)))
                    self.operands = []
                    if text := self.one(c):
                        code.append((text, self.operands))
                    after()
                except (Unknown, KeyError, StopIteration, ValueError, AttributeError, IndexError) as e:
                    raise Unknown(f"PTX line {c.line}: {c.text}: not understood ({e})") from e
            out.append((block.line, code, following, target, predicate, negated))
        order = running_order(self.following())
        place = {b: i for i, b in enumerate(order)}
        return [
            (line, code, place.get(n, EXIT), place.get(t, EXIT), *rest)
            for line, code, n, t, *rest in (out[b] for b in order)
        ]
