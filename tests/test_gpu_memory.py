"""Memory of the virtual GPU: loads and stores of every type, vector and space; atomics; matrices; cp.async."""
# ruff: noqa: E501 - PTX has long lines

import itertools
import shutil

import numpy as np
import pytest
import torch

if shutil.which("g++") is None:
    pytest.skip("the virtual GPU needs g++", allow_module_level=True)

from tests.test_gpu_machine import SHARED, Kernel, words

TYPES = dict(b8=np.uint8, u8=np.uint8, s8=np.int8, b16=np.uint16, u16=np.uint16, s16=np.int16, b32=np.uint32,
             u32=np.uint32, s32=np.int32, f32=np.uint32, b64=np.uint64, u64=np.uint64, s64=np.int64)  # fmt: skip
SIZE = {kind: np.dtype(t).itemsize for kind, t in TYPES.items()}
ROWS = [(kind, n) for kind in TYPES for n in (1, 2, 4) if n * SIZE[kind] <= 16]
ADDRESSES = {  # name: (space in the opcode, address of the lane's 16 bytes, its setup)
    "global": ("global.", "%d11", "cvta.to.global.u64 %d11, %d11;"),
    "constant": ("global.nc.", "%d11", ""),
    "generic": ("", "%d11", "cvta.global.u64 %d11, %d11;"),
    "shared": ("shared.", "%r12", ""),
    "of the block": ("shared::cta.", "%r12", ""),
    "generic shared": ("", "%d12", "cvt.u64.u32 %d13, %r12; cvta.shared.u64 %d12, %d13;"),
    "local": ("local.", "own", ""),
    "generic local": ("", "%d12", "mov.u64 %d13, own; cvta.local.u64 %d12, %d13;"),
    "param": ("param.", "p0", ""),
    "generic param": ("", "%d12", "mov.b64 %d13, p0; cvta.param.u64 %d12, %d13;"),
}
LOCAL = SHARED + ".local .align 16 .b8 own[16]; "
# %d11: the lane's 16 bytes of the first tensor, %r12: of shared memory
HEAD = """shl.b32 %r11, %r0, 4; cvt.u64.u32 %d11, %r11; add.s64 %d11, %d0, %d11; mov.u32 %r12, tile; add.s32 %r12, %r12, %r11;
ld.global.u32 %r13, [%d11]; ld.global.u32 %r14, [%d11+4]; ld.global.u32 %r15, [%d11+8]; ld.global.u32 %r16, [%d11+12];
"""
FILL = "".join(f"st.shared.u32 [%r12+{4 * i}], %r{13 + i}; st.local.u32 [own+{4 * i}], %r{13 + i}; " for i in range(4))


def registers(kind: str, n: int) -> tuple[list[str], str]:
    letter = "%f" if kind == "f32" else {1: "%h", 2: "%h", 4: "%r", 8: "%d"}[SIZE[kind]]
    names = [f"{letter}{20 + e}" for e in range(n)]
    return names, names[0] if n == 1 else f"{{{', '.join(names)}}}"


def load_kernel(number: int, space: str, address: str, setup: str) -> Kernel:
    body = [f"{HEAD}{FILL}{setup} shl.b32 %r11, %r0, 5; cvt.u64.u32 %d10, %r11; add.s64 %d10, %d1, %d10;"]
    for row, (kind, n) in enumerate(ROWS):
        names, operand = registers(kind, n)
        body.append(f"ld.{space}{f'v{n}.' if n > 1 else ''}{kind} {operand}, [{address}];")
        for e, name in enumerate(names):
            if kind == "f32":
                body.append(f"mov.b32 %r30, {name};")
            source = "%r30" if kind == "f32" else name
            kept = source if SIZE[kind] == 8 else "%d30"
            body.append("" if SIZE[kind] == 8 else f"cvt.u64.u{max(16, 8 * SIZE[kind])} %d30, {source};")
            body.append(f"st.global.u64 [%d10+{1024 * row + 8 * e}], {kept};")
    return Kernel(f"loads{number}", "\n".join(body), 2, "", LOCAL)


def store_kernel(number: int, space: str, address: str, setup: str) -> Kernel:
    """Each row stores into 16 bytes of zeros; %d10: the lane's 32 bytes of values."""
    body = [f"{HEAD}{setup} shl.b32 %r11, %r0, 5; cvt.u64.u32 %d10, %r11; add.s64 %d10, %d1, %d10; mov.u32 %r17, 0;"]
    body.append("add.s64 %d14, %d9, 0; mad.lo.s32 %r18, %r0, 12, 0; cvt.u64.u32 %d15, %r18; add.s64 %d14, %d14, %d15;")
    where = "global" if "%d11" in address else "local" if "own" in address + setup else "shared"
    basis = {"global": "%d11", "local": "own", "shared": "%r12"}[where]
    for row, (kind, n) in enumerate(ROWS):
        names, operand = registers(kind, n)
        body += [f"st.{where}.u32 [{basis}+{4 * i}], %r17;" for i in range(4)]
        for e, name in enumerate(names):
            body.append(f"ld.global.u64 %d30, [%d10+{8 * e}];")
            if SIZE[kind] == 8:
                body.append(f"mov.b64 {name}, %d30;")
            elif kind == "f32":
                body.append(f"cvt.u32.u64 %r30, %d30; mov.b32 {name}, %r30;")
            else:
                body.append(f"cvt.u{max(16, 8 * SIZE[kind])}.u64 {name}, %d30;")
        body.append(f"st.{space}{f'v{n}.' if n > 1 else ''}{kind} [{address}], {operand};")
        body += [
            f"ld.{where}.u32 %r30, [{basis}+{4 * i}]; st.global.u32 [%d14+{512 * row + 4 * i}], %r30;" for i in range(4)
        ]
    return Kernel(f"stores{number}", "\n".join(body), 3, "", LOCAL)


LOADS = {name: load_kernel(i, *where) for i, (name, where) in enumerate(ADDRESSES.items())}
STORES = {
    name: store_kernel(i, *where)
    for i, (name, where) in enumerate(ADDRESSES.items())
    if "param" not in name and name != "constant"
}


@pytest.mark.parametrize("name", LOADS)
def test_loads(name):
    x, out = words(128), torch.zeros(len(ROWS), 32, 4, dtype=torch.int64)
    LOADS[name](x, out)
    data = x.numpy()
    if "param" in name:  # the addresses of the two tensors
        data = np.tile(np.array([x.data_ptr(), out.data_ptr()], dtype=np.int64), 32)
    for row, (kind, n) in enumerate(ROWS):
        want = data.view(TYPES[kind]).reshape(32, -1)[:, :n].astype(np.int64)
        want &= (1 << 8 * max(SIZE[kind], 2)) - 1 if SIZE[kind] < 8 else -1
        assert np.array_equal(out[row, :, :n].numpy(), want), (kind, n)


@pytest.mark.parametrize("name", STORES)
def test_stores(name):
    values, out = words(256).view(32, 8), torch.zeros(len(ROWS), 32, 4, dtype=torch.int32)
    STORES[name](words(128, 1), values, out)
    for row, (kind, n) in enumerate(ROWS):
        want = np.zeros((32, 16), dtype=np.uint8)
        whole = values.numpy().view(np.uint8).reshape(32, 4, 8)[:, :n, : SIZE[kind]]
        want[:, : n * SIZE[kind]] = whole.reshape(32, -1)
        assert np.array_equal(out[row].numpy().view(np.uint8), want), (kind, n)


# ---- atomics of 32 lanes on one word: (its value before, the lane's operand, after all)
ATOMICS = {
    "atom.add.release.gpu.global.u32": (5, lambda lane: 3 * lane, 5 + 3 * 31 * 16),
    "atom.global.gpu.acq_rel.add.u32": (5, lambda lane: lane, 5 + 31 * 16),
    "atom.global.gpu.relaxed.add.u32": (5, lambda lane: lane, 5 + 31 * 16),
    "atom.relaxed.sys.shared.add.u32": (5, lambda lane: lane, 5 + 31 * 16),
    "atom.inc.acq_rel.gpu.global.u32": (5, lambda lane: 20, 16),  # 15 steps to 20, one to 0
    "atom.shared.max.u32": (5, lambda lane: lane ^ 9, 31),
    "atom.shared.max.s32": (-7, lambda lane: -lane - 3, -3),
    "atom.shared.min.s32": (5, lambda lane: 9 - lane, -22),
    "atom.global.min.u32": (7, lambda lane: lane + 3, 3),
    "atom.shared.or.b32": (64, lambda lane: 1 << lane % 5, 95),
    "atom.shared.and.b32": (255, lambda lane: ~(1 << lane % 5), 224),
    "atom.global.xor.b32": (1, lambda lane: 1 << lane % 16, 1),
    "atom.global.exch.b32": (5, lambda lane: 77, 77),
    "atom.global.inc.u32": (5, lambda lane: 20, (5 + 32) % 21),
    "atom.global.dec.u32": (40, lambda lane: 50, 8),
    "red.global.add.u32": (5, lambda lane: lane, 5 + 31 * 16),
}


def atomic_kernel(number: int, form: str) -> Kernel:
    shared = "shared" in form
    at = "%r12" if shared else "%d10"
    result = "" if form.startswith("red") else "%r14, "
    begin = "mov.u32 %r12, tile; ld.global.u32 %r13, [%d1]; st.shared.u32 [%r12], %r13; bar.warp.sync -1;" * shared
    end = "bar.warp.sync -1; ld.shared.u32 %r13, [%r12]; st.global.u32 [%d1], %r13;" * shared
    return Kernel(f"atomic{number}", f"""mul.wide.u32 %d11, %r0, 4; add.s64 %d11, %d0, %d11; ld.global.u32 %r11, [%d11];
mov.u64 %d10, %d1; {begin} {form} {result}[{at}], %r11; {end}""", 2, "", SHARED)  # fmt: skip


ATOMIC_KERNELS = {form: atomic_kernel(i, form) for i, form in enumerate(ATOMICS)}


@pytest.mark.parametrize("form", ATOMICS)
def test_atomics(form):
    before, operand, after = ATOMICS[form]
    word = torch.tensor([before], dtype=torch.int32)
    ATOMIC_KERNELS[form](torch.tensor([operand(lane) for lane in range(32)], dtype=torch.int32), word)
    assert word.item() == after


swap = Kernel("swap", "atom.global.cas.b32 %r11, [%d0], 7, %r0; st.global.u32 [%d9+4], %r11;")


def test_compare_and_swap():
    out = torch.zeros(200, dtype=torch.int32)
    out[0] = 7
    swap(out)  # one lane finds the 7 and leaves its number, which the others find
    assert sorted(out[1:33].tolist()) == sorted([7] + 31 * [out[0].item()]) and out[out[0] + 1] == 7


# ---- matrices of 8 rows of 16 bytes: n of them, in one of two spaces, transposed or not
def matrix_kernel(what: str, n: int, transposed: str, space: str) -> Kernel:
    each, four = range(n), range(4)
    held, rows = f"{{{', '.join(f'%r{20 + j}' for j in each)}}}", "[%r4]"
    fill = "".join(f"st.shared.u32 [%r3+{128 * j}], %r{20 + j}; " for j in four)
    back = "".join(f"ld.shared.u32 %r{20 + j}, [%r3+{128 * j}]; " for j in each)
    operands = f"{held}, {rows}" if what == "ld" else f"{rows}, {held}"
    return Kernel(f"{what}matrix{n}{transposed[1:]}{len(space)}", f"""mov.u32 %r2, tile; shl.b32 %r3, %r0, 2; add.s32 %r3, %r3, %r2;
shl.b32 %r4, %r0, 4; add.s32 %r4, %r4, %r2; {"".join(f"ld.global.u32 %r{20 + j}, [%d9+{128 * j}]; " for j in four)}
{fill if what == "ld" else ""} bar.warp.sync -1; {what}matrix.sync.aligned.m8n8.x{n}{transposed}.{space}.b16 {operands};
bar.warp.sync -1; {back if what == "st" else ""} {"".join(f"st.global.u32 [%d9+{128 * j}], %r{20 + j}; " for j in each)}
""", 1, "", SHARED)  # fmt: skip


MATRICES = {
    form: matrix_kernel(*form)
    for form in itertools.product(("ld", "st"), (1, 2, 4), ("", ".trans"), ("shared", "shared::cta"))
}


@pytest.mark.parametrize("what, n, transposed, space", MATRICES)
def test_matrices(what, n, transposed, space):
    """Lane l holds row l / 4, columns 2 (l % 4) and one further: the order of a matrix in memory."""
    x = words(128)
    want = x.clone().view(torch.int16).view(4, 8, 8)[:n]
    want = want.mT if transposed else want
    got = MATRICES[what, n, transposed, space](x).view(torch.int16).view(4, 8, 8)[:n]
    assert torch.equal(got, want)


# ---- cp.async
copies = Kernel("copies", """shl.b32 %r2, %r0, 4; cvt.u64.u32 %d3, %r2; add.s64 %d4, %d0, %d3; add.s64 %d5, %d1, %d3; mov.u32 %r3, tile;
add.s32 %r3, %r3, %r2; mov.u32 %r4, 4; cp.async.cg.shared.global [%r3], [%d4], 16; cp.async.ca.shared.global.L2::128B [%r3+512], [%d4], 8, %r4;
cp.async.wait_all; bar.warp.sync -1; ld.shared.v4.u32 {%r5, %r6, %r7, %r8}, [%r3]; st.global.v4.u32 [%d5], {%r5, %r6, %r7, %r8};
ld.shared.v2.u32 {%r5, %r6}, [%r3+512]; st.global.v2.u32 [%d5+512], {%r5, %r6};""", 2, shared=".shared .align 16 .b8 tile[1024]; ")  # fmt: skip


def test_asynchronous_copies():
    x, out = words(128), torch.full((256,), 7, dtype=torch.int32)
    copies(x, out)
    assert torch.equal(out[:128], x)
    half = out[128:].view(32, 4)  # 8 bytes, of which 4 come from memory and the rest are zeros
    assert torch.equal(half[:, 0], x.view(32, 4)[:, 0]) and not half[:, 1].any() and (half[:, 2:] == 7).all()


counted_copies = Kernel("counted_copies", """mov.u32 %r2, tile; mov.u32 %r20, barrier; setp.eq.u32 %p1, %r0, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r20], 32; shl.b32 %r3, %r0, 2; cvt.u64.u32 %d3, %r3; add.s64 %d4, %d0, %d3; add.s32 %r3, %r3, %r2;
bar.sync 0; setp.lt.u32 %p3, %r0, 32; @!%p3 bra WAIT_counted; cp.async.ca.shared.global [%r3], [%d4], 4;
cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%r20]; bra END_counted;
WAIT_counted: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r20], 0; @!%p2 bra WAIT_counted; ld.shared.u32 %r4, [%r3+-128];
st.global.u32 [%d9+-128], %r4; END_counted: mov.u32 %r4, 0;
""", 2, shared=".shared .align 16 .b8 tile[256]; .shared .align 8 .b64 barrier; ")  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
def test_copies_that_an_mbarrier_counts(seed):
    x = words(32)
    assert torch.equal(counted_copies(x, torch.zeros(128, dtype=torch.int32), block=64, seed=seed)[:32], x)
