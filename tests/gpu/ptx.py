"""PTX text: a module's variables and entries, and an entry's instructions in basic blocks with their source lines."""

import ctypes
import math
import re
from dataclasses import dataclass, field

WIDTHS = dict(pred=1, b8=8, u8=8, s8=8, b16=16, u16=16, s16=16, f16=16, bf16=16, b32=32, u32=32, s32=32, f32=32,
              b64=64, u64=64, s64=64, f64=64, f16x2=32, bf16x2=32)  # fmt: skip


@dataclass
class Variable:
    name: str
    size: int  # bytes; 0: as many as the launch gives
    align: int
    init: str = ""
    kind: str = "b8"


@dataclass
class Instruction:
    line: int
    source: str  # "file:line" of .loc, or ""
    text: str
    guard: str  # a predicate register, or ""
    negated: bool
    op: list[str]  # the parts between the dots
    args: list[str]

    @property
    def name(self) -> str:
        return self.op[0]


@dataclass
class Block:
    line: int
    code: list[Instruction] = field(default_factory=list)


@dataclass
class Entry:
    name: str
    params: list[tuple[Variable, int]]  # and their offsets
    params_size: int
    directives: dict[str, list[int]]  # maxntid, reqntid, minnctapersm, maxnreg, reqnctapercluster
    registers: dict[str, int] = field(default_factory=dict)  # name: bits; 1 for a predicate
    shared: list[Variable] = field(default_factory=list)
    local: list[Variable] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


VARIABLE = re.compile(
    r"(?:\.align\s+(\d+)\s+)?\.([bsuf]\d+)\s+([\w$.]+)\s*((?:\[\d*\])*)\s*(?:=\s*(.*))?$", re.DOTALL
)  # fmt: skip
# A basic block ends after these: a warp may have to wait there, or its lanes part
ENDS = {"bra", "ret", "exit", "trap", "nanosleep", "bar", "barrier"}
# and begins with these: lanes wait there for others
BEGINS = set("bar barrier shfl vote match redux elect ldmatrix stmatrix mma wgmma setmaxnreg tensormap cp".split())


def variable(text: str) -> Variable:
    text = re.sub(r"\.attribute\([^)]*\)|\.ptr(\s+\.(global|shared|const|local))?(\s+\.align\s+\d+)?", "", text).strip()
    align, kind, name, array, init = VARIABLE.search(text).groups()
    count = math.prod(int(n or 0) for n in re.findall(r"\[(\d*)\]", array))
    size = WIDTHS[kind] // 8
    return Variable(name, size * count, int(align or size), init or "", kind)


def split(text: str) -> list[str]:
    """At commas outside brackets and braces."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{(") - (c in "]})")
        if c == "," and not depth:
            parts.append(text[start:i].strip())
            start = i + 1
    rest = text[start:].strip()
    return parts + [rest] if rest else parts


def layout(variables: list[Variable]) -> tuple[dict[str, int], int]:
    """Offsets in the order given, and the size of all."""
    at, offsets = 0, {}
    for v in variables:
        at = -(-at // v.align) * v.align
        offsets[v.name] = at
        at += v.size
    return offsets, at


class Module:
    def __init__(self, text: str):
        text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.DOTALL)
        self.text = re.sub(r"//[^\n]*", "", text)
        self.files = dict(re.findall(r'\.file\s+(\d+)\s+"([^"]*)"', self.text))
        self.heads = {m[1]: m.start() for m in re.finditer(r"\.entry\s+([\w$]+)\s*\(", self.text)}
        outside = self.text[: min(self.heads.values())] if self.heads else ""
        self.shared = [variable(m[1]) for m in re.finditer(r"\.shared\s+([^;]+);", outside)]
        found = re.finditer(r"(?:^|\n)[ \t]*(?:\.visible\s+)?\.(?:global|const)\s+([^;]+);", outside)
        self.globals = [variable(m[1]) for m in found]
        self.memory = {v.name: ctypes.create_string_buffer(v.size + 256) for v in self.globals}
        for v in self.globals:
            if v.init:
                if v.kind not in ("b8", "u8"):
                    raise NotImplementedError(f"values of the variable {v.name}")
                values = bytes(int(x, 0) & 255 for x in re.findall(r"-?\w+", v.init))
                ctypes.memmove(self.global_addresses()[v.name], values, len(values))

    def global_addresses(self) -> dict[str, int]:
        """Of global variables, which all entries share."""
        return {n: -(-ctypes.addressof(b) // 256) * 256 for n, b in self.memory.items()}

    def entry(self, name: str) -> Entry:
        text = self.text
        opens = text.index("(", self.heads[name])
        closes = text.index(")", opens)
        params = [variable(part.split(".param", 1)[1]) for part in split(text[opens + 1 : closes])]
        offsets, size = layout(params)
        begin = text.index("{", closes)
        found = re.findall(r"\.(\w+)\s+([\d, ]+)", text[closes:begin])
        directives = {k: [int(n) for n in re.findall(r"\d+", v)] for k, v in found}
        entry = Entry(name, [(v, offsets[v.name]) for v in params], size, directives, shared=[*self.shared])
        self.statements(entry, begin + 1)
        return entry

    def source(self, loc: str) -> str:
        """ "file:line" of a .loc, and where that was inlined."""

        def place(file, line):
            path = self.files.get(file, "?")
            return f"{path[path.find('csrc/') :] if 'csrc/' in path else path.rsplit('/', 1)[-1]}:{line}"

        file, line = loc.split()[1:3]
        inlined = re.search(r"inlined_at\s+(\d+)\s+(\d+)", loc)
        return place(file, line) + (f" (in {place(*inlined.groups())})" if inlined else "")

    def statements(self, entry: Entry, at: int):
        """Reads the body: registers and variables into `entry`, then labels and instructions into blocks."""
        text, scopes, number, source = self.text, [(0, {})], 0, ""  # a scope's number, and its registers' names
        line = text.count("\n", 0, at) + 1
        found = []  # (line, source, label or text, its scopes)
        label, space, loc = re.compile(r"([\w$]+)\s*:(?!:)"), re.compile(r"\s+"), re.compile(r"\.(loc|file)\b[^\n]*")
        while scopes:
            if m := space.match(text, at):
                line += m[0].count("\n")
                at = m.end()
            if text[at] in "{}":
                if text[at] == "{":
                    number += 1
                    scopes.append((number, {}))
                else:
                    scopes.pop()
                at += 1
            elif m := loc.match(text, at):
                source = self.source(m[0]) if m[1] == "loc" else source
                at = m.end()
            elif m := label.match(text, at):
                found.append((line, source, in_scope(m[1], scopes[-1][0]), None))
                at = m.end()
            else:
                end = text.index(";", at)
                statement = text[at:end]
                if statement.startswith(".reg"):
                    declare(entry, statement, *scopes[-1])
                elif statement.startswith((".shared", ".local")):
                    which = entry.shared if statement.startswith(".shared") else entry.local
                    which.append(variable(statement.split(None, 1)[1]))
                elif not statement.startswith("."):
                    found.append((line, source, statement, [*scopes]))
                line += statement.count("\n")
                at = end + 1
        blocks(entry, found)


def in_scope(name: str, number: int) -> str:
    return f"{name}.{number}" if number else name


def declare(entry: Entry, statement: str, number: int, scope: dict):
    kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.DOTALL).groups()
    bits = WIDTHS[kind] if kind == "pred" else max(WIDTHS[kind], 16)
    for name in split(names):
        if m := re.match(r"(%?[\w$]+)<(\d+)>", name):
            entry.registers |= {f"{m[1]}{i}": bits for i in range(int(m[2]))}
        else:
            scope[name] = in_scope(name, number)
            entry.registers[scope[name]] = bits


def blocks(entry: Entry, statements):
    entry.blocks = [Block(0)]

    def fresh(line):
        if entry.blocks[-1].code:
            entry.blocks.append(Block(line))
        entry.blocks[-1].line = line

    jumps = []  # and the scopes' numbers, innermost first
    word = re.compile(r"(?<![\w$%.])[%\w$]+")
    branches = {m[1] for _, _, s, _ in statements if (m := re.search(r"\bbra(?:\.uni)?\s+([\w$]+)", s))}
    for line, source, statement, scopes in statements:
        if scopes is None:
            if statement.rsplit(".", 1)[0] in branches:  # others are a debugger's
                fresh(line)
                entry.labels[statement] = len(entry.blocks) - 1
            continue
        names = {k: v for _, scope in scopes for k, v in scope.items() if k != v}
        text = " ".join(statement.split())
        negated, guard, rest = re.match(r"(?:@(!?)\s*([%\w$]+)\s+)?(.*)", text).groups()
        op, _, args = rest.partition(" ")
        if names:
            args = word.sub(lambda m, names=names: names.get(m[0], m[0]), args)
        guard = names.get(guard, guard) or ""
        code = Instruction(line, source, rest, guard, negated == "!", op.split("."), split(args))
        if code.name in BEGINS:
            fresh(line)
        entry.blocks[-1].code.append(code)
        if code.name == "bra":
            jumps.append((code, [n for n, _ in scopes[::-1]]))
        if code.name in ENDS or code.op[:2] in (["mbarrier", "try_wait"], ["mbarrier", "test_wait"]):
            fresh(line)
    if not entry.blocks[-1].code:  # a label at the end
        entry.blocks[-1].code.append(Instruction(entry.blocks[-1].line, "", "ret", "", False, ["ret"], []))
    for code, numbers in jumps:
        names = [in_scope(code.args[0], n) for n in numbers]
        code.args[0] = next(n for n in names if n in entry.labels)
