"""Offsets in Triton kernels have 64 bits: every product of a stride or a row's size with an index, by their source.

test_far_strides.py tries the kernels themselves, on large strides only; a large row number would need its memory.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import ling_kernels

FOLDER = Path(ling_kernels.__file__).parent
# How large an integer may be: a constant; a place in a tile, times constants; any other of 32 bits; 64 bits
SMALL, TILE, NARROW, WIDE = range(4)
BLOCKS = (
    "BLOCK",
    "PAD",
    "PARTS",
    "TILES",
    "SPLITS",
)  # constants that divide an index's range: a product with them stays inside it
CAST = ("to", "cast")

# Products that are below 2^31, and why.
BOUNDED = {
    "the size of a row, or a place in it": [
        "h * D", "h * G", "Hkv * G", "HKV * n", "n * G", "HKV * n * G", "H * D", "Hq * D", "Hkv * D", "g * (Hq // Hkv)",
        "index // BLOCK_P * PER_GROUP", "(t * H + FIRST + h) * D", "(t * NUM + h) * D",
    ],
    "a number of tiles, programs, tokens or rows": [
        "w * share", "tiles_n * tiles_k", "tl.cdiv(M, BLOCK_M) * tiles_n", "tl.cdiv(sizes, BLOCK_M) * tiles_n",
        "tl.cdiv(stops - starts, BLOCK_M) * tiles_n", "Hq // Hkv * tiles", "blocks_n * blocks_k", "seq * n",
        "max_blocks * PAGE", "columns * PAGE", "group * max_m", "tl.program_id(1) * share",
    ],
    "the number of a cell: of D >= 64, 2^31 of them have 512 GB of keys and values": [
        "tl.load(table + r // PAGE, mask=r < rows, other=0) * PAGE",
    ],
    "a tile's rows of a token's heads": [
        "(m - first) * (Hkv * G)", "((m - first) * (Hkv * G) + row % G)[:, None] * D",
    ],
    "at most 1056 programs": ["tl.program_id(0) * (Q_GROUPS + KV_GROUPS)",
                              "(tl.program_id(0) * (Q_GROUPS + KV_GROUPS) + group) * D"],
    "rows of a tile, which near_rows of rms_norm.py copies where they are 2^24 elements apart or more": [
        "m * N", "m * ldx", "m * ldr", "t * H", "t * ldx", "t * ldr", "t * E",
    ],
    "128 rows of at most 2^23 blocks of 256": ["(i + tl.arange(0, 8)) * ld"],
    "a row of the RoPE tables, which have 2^24 positions at most": ["position[:, None] * HALF"],
}  # fmt: skip


class Kernel:
    """A @triton.jit function, and the width of each of its expressions."""

    def __init__(self, tree: ast.FunctionDef):
        self.tree, self.name = tree, tree.name
        self.arguments = {a.arg: NARROW for a in tree.args.args}  # arguments and their widths
        self.arguments |= {a.arg: SMALL for a in tree.args.args if a.annotation}
        self.variables: dict[tuple[str, int], int] = {}  # widths of variables, from one of their values on
        self.offsets: set[str] = set()  # the arguments that are part of addresses
        self.called: dict[str, Kernel] = {}  # the kernels that its file defines or imports
        self.assigned: dict[str, list[ast.expr]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    self.assign(target, node.value)
            if isinstance(node, ast.For):
                self.assign(node.target, node.iter)

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple):
            values = value.elts if isinstance(value, ast.Tuple) else [value] * len(target.elts)
            for part, of in zip(target.elts, values, strict=True):
                self.assign(part, of)
        else:
            self.assigned.setdefault(target.id, []).append(value)

    def first_value(self, name: ast.Name) -> int:
        """The first of a name's values that it may hold here: x = x.to(tl.int64) replaces what x held before."""
        values = enumerate(self.assigned.get(name.id, []))
        return max((i for i, v in values if v.lineno < name.lineno and name.id in names_in(v)), default=0)

    def values(self, name: ast.Name) -> list[ast.expr]:
        return self.assigned.get(name.id, [])[self.first_value(name) :]

    def settle(self) -> None:
        """Compute the widths of variables, which depend on one another in loops."""
        before = None
        while before != self.variables:
            before = dict(self.variables)
            for name, values in self.assigned.items():
                widths = [self.width(value) for value in values]
                self.variables |= {(name, i): narrowest(widths[i:]) for i in range(len(values))}

    def width(self, node: ast.expr) -> int:
        if isinstance(node, ast.Name):
            if node.id in self.assigned:
                return self.variables.get((node.id, self.first_value(node)), SMALL)
            return self.arguments.get(node.id, SMALL)
        if isinstance(node, ast.Constant | ast.JoinedStr):
            return SMALL
        if isinstance(node, ast.BinOp):
            return max(self.width(node.left), self.width(node.right))
        if isinstance(node, ast.UnaryOp | ast.Subscript | ast.Attribute):
            return self.width(getattr(node, "operand", getattr(node, "value", None)))
        if isinstance(node, ast.IfExp):
            return narrowest(self.width(v) for v in (node.body, node.orelse))
        return self.width_of_call(node) if isinstance(node, ast.Call) else NARROW

    def width_of_call(self, node: ast.Call) -> int:
        function, widths = ast.unparse(node.func).split(".")[-1], [self.width(a) for a in node.args]
        if function in CAST:
            return WIDE if "tl.int64" in ast.unparse(node.args[-1]) else NARROW
        if function in ("minimum", "maximum", "range"):
            return max(widths)
        if function == "where":
            return narrowest(widths[1:])
        return {"arange": TILE, "zeros": SMALL}.get(function, NARROW)

    def addresses(self) -> list[ast.expr]:
        """Expressions of addresses: of loads and stores, what is passed on to other kernels' addresses, and from these
        back through variables."""
        todo, seen, found = [], set(), []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call):
                function = ast.unparse(node.func)
                if function in ("tl.load", "tl.store", "tl.make_tensor_descriptor"):
                    todo.append(node.args[0])
                for argument, value in self.passed(node):
                    todo += [value] if argument in self.called[function].offsets else []
        while todo:
            found.append(expression := todo.pop())
            names = [n for n in parts(expression) if isinstance(n, ast.Name) and n.id not in seen]
            todo += [value for name in names for value in self.values(name)]
            seen |= {name.id for name in names}
        return found

    def passed(self, call: ast.Call) -> list[tuple[str, ast.expr]]:
        """(argument, value) of a call of another kernel."""
        other = self.called.get(ast.unparse(call.func))
        return [*zip(other.arguments, call.args, strict=False)] if other else []

    def narrow_products(self) -> Iterator[str]:
        """Products in addresses of a stride with an index, neither of which has 64 bits."""
        for product in {node for expression in self.addresses() for node in parts(expression)}:
            if isinstance(product, ast.BinOp) and isinstance(product.op, ast.Mult):
                factors = {side: self.width(side) for side in (product.left, product.right)}
                blocks = [is_block(side) for side, width in factors.items() if width == SMALL]
                if max(factors.values()) == NARROW and not any(blocks):
                    yield ast.unparse(product)


def narrowest(widths) -> int:
    """That of an integer with one of several widths: the widest of those with 32 bits."""
    widths = [*widths]
    return max([w for w in widths if w != WIDE], default=WIDE if widths else SMALL)


def names_in(expression: ast.expr) -> set[str]:
    return {n.id for n in ast.walk(expression) if isinstance(n, ast.Name)}


def parts(expression: ast.expr) -> Iterator[ast.expr]:
    """The parts of an address: not those of a mask, or of another address inside it."""
    yield expression
    is_load = isinstance(expression, ast.Call) and ast.unparse(expression.func) == "tl.load"
    if not is_load and not isinstance(expression, ast.Compare):
        for child in ast.iter_child_nodes(expression):
            yield from parts(child)


def is_block(factor: ast.expr) -> bool:
    return all(name.startswith(BLOCKS) for name in names_in(factor))


def kernels() -> list[Kernel]:
    """Every @triton.jit function of the package, with what is known of its arguments."""
    trees = {file.stem: ast.parse(file.read_text()) for file in sorted(FOLDER.rglob("*.py"))}
    defined = {
        stem: {n.name: Kernel(n) for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and is_jit(n)}
        for stem, tree in trees.items()
    }
    for stem, tree in trees.items():
        imports = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module in defined]
        imported = {a.name: defined[n.module][a.name] for n in imports for a in n.names if a.name in defined[n.module]}
        for kernel in defined[stem].values():
            kernel.called = imported | defined[stem]
    found = [kernel for names in defined.values() for kernel in names.values()]
    while True:
        before = [(set(k.offsets), dict(k.arguments)) for k in found]
        for kernel in found:
            kernel.settle()
            kernel.offsets = {n.id for e in kernel.addresses() for n in parts(e) if isinstance(n, ast.Name)}
        widths: dict[tuple, list[int]] = {}
        for kernel in found:
            for call in (n for n in ast.walk(kernel.tree) if isinstance(n, ast.Call)):
                for argument, value in kernel.passed(call):
                    widths.setdefault((kernel.called[ast.unparse(call.func)], argument), []).append(kernel.width(value))
        for (kernel, argument), given in widths.items():
            kernel.arguments[argument] = narrowest(given)
        if before == [(k.offsets, k.arguments) for k in found]:
            return found


def is_jit(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(d) == "triton.jit" for d in function.decorator_list)


def test_products_of_strides_are_64_bit():
    bounded = {product for products in BOUNDED.values() for product in products}
    found = {(kernel.name, product) for kernel in kernels() for product in kernel.narrow_products()}
    assert {f for f in found if f[1] not in bounded} == set()
    assert bounded <= {product for _, product in found}, "a product that no kernel has"


NARROW_OFFSETS = """
def kernel(x, y, offsets, ld, ld_y, M, BLOCK: tl.constexpr, D: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.load(offsets + tl.program_id(1)).to(tl.int64)
    at = rows * ld
    x += first * ld
    rows = rows.to(tl.int64)
    for row in range(first, M):
        tl.store(y + row * ld_y + rows * D, tl.load(x + at, mask=rows < M * ld, other=0.0) * ld)
    tl.store(y + tl.arange(0, BLOCK) * ld_y + BLOCK * D, tl.program_id(0) * D * 1.0)
"""


def test_narrow_products_are_found():
    kernel = Kernel(ast.parse(NARROW_OFFSETS).body[0])
    kernel.settle()
    assert sorted(kernel.narrow_products()) == ["rows * ld", "tl.arange(0, BLOCK) * ld_y"]
