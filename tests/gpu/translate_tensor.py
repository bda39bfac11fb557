"""Asynchronous units as calls of machine/operations.h: copies, mbarriers, tensor maps, matrix products."""

import re

from .ptx import Instruction, split

ELEMENTS = dict(e4m3="kE4m3", e5m2="kE5m2", bf16="kBf16", f16="kF16")
FIELDS = (
    "global_address", "rank", "box_dim", "global_dim", "global_stride", "element_stride", "elemtype",
    "interleave_layout", "swizzle_mode", "fill_mode",
)  # fmt: skip
CALLS = {  # as in translate_memory
    "cp.async.commit_group": "copy_commit(w, {s}, {m});",
    "cp.async.wait_group": "copy_wait(w, {s}, {0}, {m});",
    "cp.async.wait_all": "copy_commit(w, {s}, {m}); copy_wait(w, {s}, 0, {m});",
    "cp.async.mbarrier.arrive.noinc": "copy_arrive(w, {s}, {0@}, {m});",
    "cp.async.bulk.commit_group": "bulk_commit(w, {m});",
    "cp.async.bulk.wait_group": "bulk_wait(w, {0}, {m});",
    "cp.async.bulk.wait_group.read": "bulk_wait(w, {0}, {m});",
    "mbarrier.init": "mbarrier_init(w, {s}, {0@}, {1.32}, {m});",
    "mbarrier.inval": "mbarrier_inval(w, {s}, {0@}, {m});",
    "mbarrier.expect_tx": "mbarrier_expect(w, {s}, {space}, {0@}, {1.32}, {m});",
    # a state is the phase of its arrival
    "mbarrier.try_wait": "0=pred mbarrier_try(w, {s}, {space}, {order}, {1@}, {2.32}, {m})",
    "mbarrier.test_wait": "0=pred mbarrier_try(w, {s}, {space}, {order}, {1@}, {2.32}, {m})",
    "tensormap.cp_fenceproxy": "map_copy(w, {s}, {0@}, {1@}, {m});",
    "wgmma.fence": "wgmma_fence(w, {s}, {m});",
    "wgmma.commit_group": "wgmma_commit(w, {s}, {m});",
    "wgmma.wait_group": "wgmma_wait(w, {s}, {0}, {m});",
}


class Tensor:
    def do_mbarrier(self, c: Instruction) -> str:
        if c.op[1] not in ("arrive", "arrive_drop"):
            return self.fill(c, self.call_of(c))
        to, at, *rest = c.args if not c.args[0].startswith("[") else ["_", *c.args]
        arrived = self.raw(rest.pop(0), 32) if "expect_tx" in c.op else "k32(0)"
        count = self.raw(rest[0], 32) if rest else "k32(1)"
        drop = int(c.op[1] == "arrive_drop")
        call = self.fill(
            c, f"mbarrier_arrive(w, {{s}}, {{space}}, {{order}}, {self.address(at)}, {count}, {arrived}, {drop}, {{m}})"
        )
        return f"{call};" if to == "_" else self.set(to, "b64", call)

    def do_cp(self, c: Instruction) -> str:
        if c.op[1:4] == ["async", "bulk", "tensor"]:
            return self.tile(c)
        if c.op[2] not in ("ca", "cg"):
            return self.fill(c, self.call_of(c))
        real = 3 if len(c.args) > 3 and "L2::cache_hint" not in c.op else 2
        return self.fill(c, f"copy_async(w, {{s}}, {{0@}}, {{1@}}, {{2}}, {{{real}.32}}, {{m}});")

    def tile(self, c: Instruction) -> str:
        """A tile by TMA: [shared], [map, {coordinates}], [mbarrier] in, and [map, {coordinates}], [shared] out."""
        loads = c.op[5].startswith("shared")
        pointer, coordinates = split(c.args[1 if loads else 0].strip()[1:-1])
        names = self.vector(coordinates)
        at = f"const U32 at[] = {{{', '.join(self.raw(n, 32) for n in names)}}}; "
        tensor_map = f"{self.address(f'[{pointer}]')}, {len(names)}, at"
        if not loads:
            return at + self.fill(c, f"tma_store(w, {{s}}, {tensor_map}, {{1@}}, {{m}});")
        cluster = "multicast::cluster" in c.op
        ranks = f"const U32 ranks = TO(U32, {self.raw(c.args[3], 16)}); " if cluster else ""
        return (
            ranks
            + at
            + self.fill(
                c, f"tma_load(w, {{s}}, {{0@}}, {tensor_map}, {{2@}}, {'&ranks' if cluster else 'nullptr'}, {{m}});"
            )
        )

    def do_tensormap(self, c: Instruction) -> str:
        if c.op[1] != "replace":
            return self.fill(c, self.call_of(c))
        dimension = c.args[1] if len(c.args) > 2 else 0
        value = self.raw(c.args[-1], 64)
        return self.fill(
            c, f"map_replace(w, {{s}}, {{space}}, {{0@}}, {FIELDS.index(c.op[3])}, {dimension}, {value}, {{m}});"
        )

    # -- matrix products
    def do_mma(self, c: Instruction) -> str:
        k = re.fullmatch(r"m16n8k(\d+)", c.op[3]).group(1)
        a, b = c.op[-3:-1]
        d, ra, rb, e = (self.vector(x) for x in c.args[:4])
        operands = f"U32 *d[] = {self.pointers(d)}, *a[] = {self.pointers(ra)}, *b[] = {self.pointers(rb)}; "
        call = f"mma(w, {{s}}, {k}, {ELEMENTS[a]}, {ELEMENTS[b]}, d, a, b, start, {{m}});"
        return self.values(e, 32, True, "start") + operands + self.fill(c, call)

    def do_wgmma(self, c: Instruction) -> str:
        if c.op[1] != "mma_async":
            return self.fill(c, self.call_of(c))
        n, k = re.fullmatch(r"m64n(\d+)k(\d+)", c.op[4]).groups()
        d, registers = self.vector(c.args[0]), c.args[1].startswith("{")
        if len(d) != int(n) // 2:
            raise ValueError(f"{len(d)} accumulators")
        a = self.vector(c.args[1]) if registers else []
        accumulate, *flags = c.args[3:]
        sign = int(flags[0]) * int(flags[1]) if flags else 1
        ta = int(flags[2]) if len(flags) == 4 else 0
        tb = int(flags[-1]) if len(flags) > 2 else 0
        marks = ", ".join(f"&R(uint32_t, {self.operand(self.marks[x])})" for x in d + a)
        pointers = f"U32* d[] = {self.pointers(d)}; uint32_t* marks[] = {{{marks}}}; "
        ra = f"const U32* a[] = {self.pointers(a)}; " if registers else "const U32** a = nullptr; "
        form = f"{{{n}, {k}, {ELEMENTS[c.op[6]]}, {ELEMENTS[c.op[7]]}, {ta}, {tb}, {sign}}}"
        da = "k64(0)" if registers else "{1.64}"
        return (
            pointers
            + ra
            + self.fill(c, f"wgmma(w, {{s}}, {form}, d, a, {da}, {{2.64}}, {self.raw(accumulate, 1)}, marks, {{m}});")
        )
