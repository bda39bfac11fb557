"""PTX text: a module's variables and entries, and an entry's instructions in basic blocks."""

import ctypes
import re
from dataclasses import dataclass, field

SIZES = dict(
    b8=1, u8=1, s8=1, b16=2, u16=2, s16=2, f16=2, bf16=2, b32=4, u32=4, s32=4, f32=4, b64=8, u64=8, s64=8, f64=8
)


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
    text: str
    guard: str  # a predicate register, or ""
    negated: bool
    op: list[str]  # the parts between the dots
    args: list[str]


@dataclass
class Block:
    line: int
    code: list[Instruction] = field(default_factory=list)


@dataclass
class Entry:
    name: str
    params: list[tuple[Variable, int]]  # and their offsets
    params_size: int
    registers: dict[str, str]  # name: pred, b16, b32 or b64
    shared: list[Variable]
    local: list[Variable]
    blocks: list[Block]
    labels: dict[str, int]
    max_threads: int = 0


VARIABLE = re.compile(
    r"(?:\.align\s+(\d+)\s+)?\.(b8|b16|b32|b64|u8|u16|u32|u64|s8|s16|s32|s64|f32|f64)\s+([\w$.]+)\s*(\[(\d*)\])?\s*(?:=\s*(.*))?$",
    re.S,
)
# A block ends after these: a warp may have to wait there, or its lanes part
ENDS = {"bra", "ret", "exit", "trap", "nanosleep", "brx"}


def variable(text: str) -> Variable:
    text = re.sub(r"\.attribute\([^)]*\)|\.ptr(\s+\.(global|shared|const|local))?(\s+\.align\s+\d+)?", "", text).strip()
    found = VARIABLE.search(text)
    align, kind, name, array, count, init = found.groups()
    size = SIZES[kind] * (int(count) if count else 0 if array else 1)
    return Variable(name, size, int(align or SIZES[kind]), init or "", kind)


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


class Module:
    def __init__(self, text: str):
        self.text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
        self.text = re.sub(r"//[^\n]*", "", self.text)
        self.heads = {m[1]: m.start() for m in re.finditer(r"\.entry\s+([\w$]+)\s*\(", self.text)}
        outside = self.text[: min(self.heads.values())] if self.heads else ""
        self.shared = [variable(m[1]) for m in re.finditer(r"\.shared\s+([^;]+);", outside)]
        self.globals = [
            variable(m[1])
            for m in re.finditer(r"(?:^|\n)[ \t]*(?:\.visible\s+)?\.(?:global|const)\s+([^;]+);", outside)
        ]

    def global_addresses(self) -> dict[str, int]:
        """Of global variables, which all entries share."""
        if not hasattr(self, "memory"):
            self.memory = {v.name: ctypes.create_string_buffer(v.size + 256) for v in self.globals}
            for v in self.globals:
                if v.init:
                    values = [int(x, 0) & 255 for x in re.findall(r"-?\w+", v.init)]
                    if v.kind not in ("b8", "u8"):
                        raise NotImplementedError(f"values of {v.name}")
                    at = -(-ctypes.addressof(self.memory[v.name]) // 256) * 256
                    ctypes.memmove(at, bytes(values), len(values))
        return {n: -(-ctypes.addressof(b) // 256) * 256 for n, b in self.memory.items()}

    def entry(self, name: str) -> Entry:
        text = self.text
        at = text.index("(", self.heads[name])
        close = text.index(")", at)
        offset, params = 0, []
        for part in split(text[at + 1 : close]):
            v = variable(part.split(".param", 1)[1])
            offset = -(-offset // v.align) * v.align
            params.append((v, offset))
            offset += v.size
        begin = text.index("{", close)
        threads = re.search(r"\.(?:maxntid|reqntid)\s+([\d, ]+)", text[close:begin])
        entry = Entry(name, params, offset, {}, [*self.shared], [], [], {})
        if threads:
            entry.max_threads = eval(threads[1].strip().rstrip(",").replace(",", "*"))
        self.body(entry, begin + 1)
        return entry

    def body(self, entry: Entry, at: int):
        text, scopes, number = self.text, [{}], 0
        line = text.count("\n", 0, at) + 1
        statements = []  # (line, label or text, names of its scopes)
        label, space, loc = re.compile(r"([\w$]+)\s*:(?!:)"), re.compile(r"\s+"), re.compile(r"\.(loc|file)\b[^\n]*")
        while True:
            if m := space.match(text, at):
                line += m[0].count("\n")
                at = m.end()
            c = text[at]
            if c == "{":
                number += 1
                scopes.append({})
                at += 1
            elif c == "}":
                scopes.pop()
                at += 1
                if not scopes:
                    break
            elif m := loc.match(text, at):
                at = m.end()
            elif m := label.match(text, at):
                name = m[1] if len(scopes) == 1 else f"{m[1]}.{number}"
                scopes[-1][m[1]] = name
                statements.append((line, name, None))
                at = m.end()
            else:
                end = text.index(";", at)
                statement = text[at:end]
                if statement.startswith(".reg"):
                    self.declare(entry, statement, scopes[-1], number if len(scopes) > 1 else 0)
                elif statement.startswith((".shared", ".local")):
                    which = entry.shared if statement.startswith(".shared") else entry.local
                    which.append(variable(statement.split(None, 1)[1]))
                elif not statement.startswith("."):
                    statements.append((line, statement, [*scopes]))
                line += statement.count("\n")
                at = end + 1
        self.blocks(entry, statements)

    def declare(self, entry, statement, scope, number):
        kind, names = re.match(r"\.reg\s+\.(\w+)\s+(.*)", statement, re.S).groups()
        kind = dict(pred="pred", b8="b16", b16="b16", u16="b16", s16="b16", f16="b16", bf16="b16", b64="b64", u64="b64",
                    s64="b64", f64="b64").get(kind, "b32")  # fmt: skip
        for name in split(names):
            if m := re.match(r"(%?[\w$]+)<(\d+)>", name):
                for i in range(int(m[2])):
                    entry.registers[f"{m[1]}{i}"] = kind
            else:
                own = f"{name}.{number}" if number else name
                scope[name] = own
                entry.registers[own] = kind

    def blocks(self, entry, statements):
        entry.blocks = [Block(statements[0][0] if statements else 0)]

        def fresh(line):
            if entry.blocks[-1].code:
                entry.blocks.append(Block(line))
            else:
                entry.blocks[-1].line = line

        word = re.compile(r"(?<![\w$%.])[%\w$]+")
        branches = {m[1] for _, s, _ in statements if (m := re.search(r"\bbra(?:\.uni)?\s+([\w$]+)", s))}
        for line, statement, scopes in statements:
            if scopes is None:
                if statement.rsplit(".", 1)[0] not in branches:
                    continue  # a debugger's
                fresh(line)
                entry.labels[statement] = len(entry.blocks) - 1
                continue
            inner = [s for s in scopes[1:] if s]
            text = " ".join(statement.split())
            guard, negated = "", False
            if m := re.match(r"@(!?)\s*([%\w$]+)\s+(.*)", text):
                negated, guard, text = m[1] == "!", m[2], m[3]
            op, _, args = text.partition(" ")

            def rename(name):
                return next((s[name] for s in reversed(inner) if name in s), name)

            if inner:
                args, guard = word.sub(lambda m: rename(m[0]), args), rename(guard)
            code = Instruction(line, text, guard, negated, op.split("."), split(args))
            name = ".".join(code.op[:2])
            if name == "bar.warp":
                fresh(line)
            entry.blocks[-1].code.append(code)
            if (
                code.op[0] in ENDS
                or code.op[0] in ("bar", "barrier")
                and name != "bar.warp"
                or name in ("mbarrier.try_wait", "mbarrier.test_wait")
            ):
                fresh(line)
        # A label inside a scope may be named before it is met
        for block in entry.blocks:
            for code in block.code:
                if code.op[0] == "bra" and code.args[0] not in entry.labels:
                    near = [n for n in entry.labels if n.rsplit(".", 1)[0] == code.args[0]]
                    code.args[0] = min(near, key=lambda n: abs(entry.blocks[entry.labels[n]].line - code.line))
        if not entry.blocks[-1].code:  # a label at the end
            entry.blocks[-1].code.append(Instruction(entry.blocks[-1].line, "ret", "", False, ["ret"], []))
