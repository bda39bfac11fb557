"""Asynchronous units as calls of machine/operations.h: cp.async, mbarriers, bulk copies, tensor maps, matrix products."""

import re

from .ptx import WIDTHS, Instruction, split
from .translate_memory import ORDERS, modifier

ELEMENTS = dict(e4m3="kE4m3", e5m2="kE5m2", bf16="kBf16", f16="kF16", tf32="kTf32")
FIELDS = ("global_address", "rank", "box_dim", "global_dim", "global_stride", "element_stride", "elemtype",
          "interleave_layout", "swizzle_mode", "fill_mode")  # fmt: skip


class Tensor:
    def do_mbarrier(self, c: Instruction) -> str:
        s, how, m = self.site(c), c.op[1], self.mask
        space = "kGeneric" if not any(o.startswith("shared") for o in c.op) else "kShared"
        order = modifier(c, ORDERS, "kBoth")
        if how == "init":
            return f"mbarrier_init(w, {s}, {self.address(c.args[0])}, {self.raw(c.args[1], 32)}, {m});"
        if how == "inval":
            return f"mbarrier_inval(w, {s}, {self.address(c.args[0])}, {m});"
        if how == "expect_tx":
            return f"mbarrier_expect(w, {s}, {space}, {self.address(c.args[0])}, {self.raw(c.args[1], 32)}, {m});"
        if how in ("arrive", "arrive_drop") and "noComplete" not in c.op:
            to, at, *rest = c.args if not c.args[0].startswith("[") else ["_", *c.args]
            bytes_ = self.raw(rest.pop(0), 32) if "expect_tx" in c.op else "k32(0)"
            count = self.raw(rest[0], 32) if rest else "k32(1)"
            call = f"mbarrier_arrive(w, {s}, {space}, {order}, {self.address(at)}, {count}, {bytes_}, {int(how == 'arrive_drop')}, {m})"
            return f"{call};" if to == "_" else self.set(to, "b64", call)
        if how in ("try_wait", "test_wait"):  # a state is the phase of its arrival
            parity = self.raw(c.args[2], 32)
            call = f"mbarrier_try(w, {s}, {space}, {order}, {self.address(c.args[1])}, {parity}, {m})"
            return self.set(c.args[0], "pred", call)
        raise ValueError(how)

    # -- copies
    def do_cp(self, c: Instruction) -> str:
        if c.op[1:3] == ["async", "bulk"]:
            return self.bulk(c)
        s, how = self.site(c), c.op[2]
        if how == "commit_group":
            return f"copy_commit(w, {s}, {self.mask});"
        if how in ("wait_group", "wait_all"):
            commit = f"copy_commit(w, {s}, {self.mask}); " if how == "wait_all" else ""
            return f"{commit}copy_wait(w, {s}, {c.args[0] if c.args else 0}, {self.mask});"
        if how == "mbarrier":
            return f"copy_arrive(w, {s}, {self.address(c.args[0])}, {self.mask});"
        real = self.raw(c.args[3] if len(c.args) > 3 and c.op[-1] != "L2::cache_hint" else c.args[2], 32)
        return f"copy_async(w, {s}, {self.address(c.args[0])}, {self.address(c.args[1])}, {c.args[2]}, {real}, {self.mask});"

    def bulk(self, c: Instruction) -> str:
        m = self.mask
        if "commit_group" in c.op:
            return f"bulk_commit(w, {m});"
        if "wait_group" in c.op:
            return f"bulk_wait(w, {c.args[0]}, {m});"
        if "prefetch" in c.op:
            return ""
        if "im2col" in c.op or "tile::gather4" in c.op or "reduce" in c.op:
            raise ValueError("a kind of copy")
        s, args = self.site(c), c.args[: -1 if "L2::cache_hint" in c.op else None]
        loads = c.op[5 if "tensor" in c.op else 3].startswith("shared")
        ranks = f"const U32 ranks = TO(U32, {self.raw(args.pop(), 16)}); " if "multicast::cluster" in c.op else ""
        ranks_ = "&ranks" if ranks else "nullptr"
        if "tensor" not in c.op:
            from_cluster = "shared::cta" in c.op and "shared::cluster" in c.op
            how = "kToCluster" if from_cluster else "kToShared" if loads else "kToGlobal"
            to, source, n = self.address(args[0]), self.address(args[1]), self.raw(args[2], 32)
            barrier = self.address(args[3]) if how != "kToGlobal" else "U64{}"
            return f"{ranks}bulk_copy(w, {s}, {how}, {to}, {source}, {n}, {barrier}, {ranks_}, {m});"
        pointer, coordinates = split(args[1 if loads else 0].strip()[1:-1])
        names = self.vector(coordinates)
        at = f"const U32 at[] = {{{', '.join(self.raw(n, 32) for n in names)}}}; "
        map_ = self.address(f"[{pointer}]")
        if not loads:
            return f"{at}tma_store(w, {s}, {map_}, {len(names)}, at, {self.address(args[1])}, {m});"
        to, barrier = self.address(args[0]), self.address(args[2])
        return f"{ranks}{at}tma_load(w, {s}, {to}, {map_}, {len(names)}, at, {barrier}, {ranks_}, {m});"

    def store_async(self, c: Instruction) -> str:
        names = self.vector(c.args[1])
        bits = WIDTHS[c.op[-1]]
        values = ", ".join(f"TO(U64, {self.raw(n, bits)})" for n in names)
        return (
            f"const U64 values[] = {{{values}}}; store_async(w, {self.site(c)}, {self.address(c.args[0])}, {len(names)}, {bits // 8}, "
            f"values, {self.address(c.args[2])}, {self.mask});"
        )

    def do_tensormap(self, c: Instruction) -> str:
        s = self.site(c)
        if c.op[1] == "cp_fenceproxy":
            return f"map_copy(w, {s}, {self.address(c.args[0])}, {self.address(c.args[1])}, {self.mask});"
        at, *which, value = c.args
        return (
            f"map_replace(w, {s}, {self.space(c)}, {self.address(at)}, {FIELDS.index(c.op[3])}, {which[0] if which else 0}, "
            f"{self.raw(value, 64)}, {self.mask});"
        )

    # -- matrix products
    def do_mma(self, c: Instruction) -> str:
        k = re.fullmatch(r"m16n8k(\d+)", c.op[3]).group(1)
        result, a, b, start = c.op[-4:]
        if result != "f32" or start != "f32" or c.op[4:6] != ["row", "col"]:
            raise ValueError("the types of a product")
        d, ra, rb, e = (self.vector(x) for x in c.args[:4])
        constants = self.values(e, 32, True, "start")
        return (
            f"{constants}U32 *d[] = {self.pointers(d)}, *a[] = {self.pointers(ra)}, *b[] = {self.pointers(rb)}; "
            f"mma(w, {self.site(c)}, {k}, {ELEMENTS[a]}, {ELEMENTS[b]}, d, a, b, start, {self.mask});"
        )

    def do_wgmma(self, c: Instruction) -> str:
        s, how, m = self.site(c), c.op[1], self.mask
        if how in ("fence", "commit_group"):
            return f"wgmma_{how.split('_')[0]}(w, {s}, {m});"
        if how == "wait_group":
            return f"wgmma_wait(w, {s}, {c.args[0]}, {m});"
        n, k = re.fullmatch(r"m64n(\d+)k(\d+)", c.op[4]).groups()
        if c.op[5] != "f32" or how != "mma_async" or "sp" in c.op:
            raise ValueError("the types of a product")
        d, registers = self.vector(c.args[0]), c.args[1].startswith("{")
        a = self.vector(c.args[1]) if registers else []
        if len(d) != int(n) // 2:
            raise ValueError(f"{len(d)} accumulators")
        accumulate, *flags = c.args[3:]
        sign = int(flags[0] if flags else 1) * int(flags[1] if flags else 1)
        ta = int(flags[2]) if len(flags) == 4 else 0
        tb = int(flags[-1]) if len(flags) > 2 else 0
        marks = ", ".join(f"&R(uint32_t, {self.operand(self.marks[x])})" for x in d + a)
        ra = f"const U32* a[] = {self.pointers(a)};" if registers else "const U32** a = nullptr;"
        da = "k64(0)" if registers else self.raw(c.args[1], 64)
        return (
            f"U32* d[] = {self.pointers(d)}; uint32_t* marks[] = {{{marks}}}; {ra} wgmma(w, {s}, {{{n}, {k}, {ELEMENTS[c.op[6]]}, "
            f"{ELEMENTS[c.op[7]]}, {ta}, {tb}, {sign}}}, d, a, {da}, {self.raw(c.args[2], 64)}, {self.raw(accumulate, 1)}, marks, {m});"
        )
