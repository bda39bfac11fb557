"""The clock of machine code (tests/sass) on code whose answers are counted by hand."""

import json
import re

import pytest

from tests.sass import predict
from tests.sass.__main__ import main
from tests.sass.clocks import differences, rows_of, within
from tests.sass.decode import global_bytes, parse, registers, tensor_clocks, width
from tests.sass.flow import Flow
from tests.sass.hazards import highest_registers, touched_in_flight
from tests.sass.page import page
from tests.sass.regions import between, loops, segments
from tests.sass.walk import LATENCY, clocks, early, walk
from tests.tables import CLOCKS, CUDA_CLOCKS, PREDICTED, TRITON_CLOCKS

# As nvdisasm prints it, made by nvcc 13.0. By hand: LDC's high word >> 41 is 0x7f1: stall 1, no scoreboards. S2R's is
# 0x717: stall 7, sets 0. The second LDC's is 0x731: stall 1, sets 1. ISETP's is 0xfe2: stall 2, waits for 0.
PRINTED = """
	.section	.text.kernel,"ax",@progbits
.text.kernel:
	//## File "/ling/csrc/gemm/gemm_fp8.cuh", line 108
        /*0000*/                   LDC R1, c[0x0][0x28] ;                         /* 0x00000a00ff017b82 */
                                                                                  /* 0x000fe20000000800 */
        /*0010*/                   S2R R0, SR_TID.X ;                             /* 0x0000000000007919 */
                                                                                  /* 0x000e2e0000002100 */
	//## File "/ling/csrc/ragged.cuh", line 10
        /*0020*/                   LDC R2, c[0x0][RZ] ;                           /* 0x00000000ff027b82 */
                                                                                  /* 0x000e620000000800 */
.L_x_0:
        /*0030*/                   ISETP.NE.AND P1, PT, R0, RZ, PT ;              /* 0x000000ff0000720c */
                                                                                  /* 0x001fc40003f25270 */
        /*0040*/              @!P1 BRA `(.L_x_0) ;                                /* 0x0000000000541947 */
                                                                                  /* 0x000fea0003800000 */
"""


def code(listing: str):
    """Instructions of a listing: `label:`, or `opcode operands ; stall=1, sets=, frees=, waits=`."""
    text, address = ['\t.section\t.text.kernel,"ax"'], 0
    for line in filter(None, map(str.strip, listing.splitlines())):
        if line.endswith(":"):
            text.append(line)
            continue
        written, _, given = line.partition(";")
        f = dict(stall=1, sets=7, frees=7, waits=-1) | {k: int(v) for k, v in re.findall(r"(\w+)=(\d+)", given)}
        high = f["stall"] | f["sets"] << 5 | f["frees"] << 8 | (1 << f["waits"] if f["waits"] >= 0 else 0) << 11
        text.append(f"/*{address:04x}*/ {written.strip()} ; /* 0x{0:016x} */\n /* 0x{high << 41:016x} */")
        address += 16
    (found,) = parse("\n".join(text)).values()
    return found


def test_an_instruction_is_decoded():
    ldc, s2r, second, isetp, bra = parse(PRINTED)["kernel"]
    assert (ldc.stall, ldc.sets, ldc.frees, ldc.waits) == (1, None, None, ())
    assert (s2r.stall, s2r.sets, s2r.opcode, s2r.operands) == (7, 0, "S2R", "R0, SR_TID.X")
    assert (second.stall, second.sets, second.line, ldc.line) == (1, 1, "ragged.cuh:10", "gemm_fp8.cuh:108")
    assert (isetp.stall, isetp.waits, isetp.base, isetp.modifiers) == (2, (0,), "ISETP", ["NE", "AND"])
    assert (bra.guard, bra.targets, bra.address) == ("!P1", (0x30,), 0x40)


def test_an_indirect_branch_has_all_its_targets():
    jump = code('.L_0:\nMOV R0, R1\n.L_1:\nBRX R2 -0x20 (*"BRANCH_TARGETS .L_0,.L_1"*)')[-1]
    assert jump.targets == (0, 16) and jump.operands == "R2 -0x20"


@pytest.mark.parametrize("text, bytes_of_a_lane, bytes_of_a_warp, tensor, touched", [
    ("LDG.E.128 R4, desc[UR6][R2.64]", 16, 512, 0, {2, 3, 4, 5, 6, 7}),
    ("LDG.E.LTC128B.U16 R4, desc[UR6][R2.64]", 2, 64, 0, {2, 3, 4}),
    ("STG.E desc[UR6][R2.64+0x128], R9", 4, 128, 0, {2, 3, 9}),
    ("LDS.64 R4, [R8]", 8, 0, 0, {4, 5, 8}),
    ("LDSM.16.MT88.4 R4, [R8]", 16, 0, 0, {4, 5, 6, 7, 8}),
    ("STSM.16.M88 [R8], R4", 4, 0, 0, {4, 8}),
    ("IMAD.WIDE.U32 R4, R8, 0x10, R6", 4, 0, 0, {4, 5, 6, 7, 8}),
    ("QGMMA.64x16x32.F32.E4M3.E4M3 R24, gdesc[UR12], R24, gsb0", 4, 0, 8, {*range(24, 32)}),
    ("HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR4].tnspB, R88", 4, 0, 64, {*range(88, 152), *range(152, 156)}),
    ("HMMA.16816.F32.BF16 R4, R8, R12, RZ", 4, 0, 4, {*range(4, 14)}),
    ("FFMA R0, R1, R2, R3", 4, 0, 0, {0, 1, 2, 3}),
])  # fmt: skip
def test_what_an_instruction_moves_computes_and_touches(text, bytes_of_a_lane, bytes_of_a_warp, tensor, touched):
    (i,) = code(text)
    assert (width(i), global_bytes(i), tensor_clocks(i)) == (bytes_of_a_lane, bytes_of_a_warp, tensor)
    assert registers(i) == touched


LOOPS = """
    MOV R0, RZ
    @P6 BRA `(.end)
    .outer:
    LDG.E.128 R4, desc[UR4][R2.64]
    .inner:
    @P1 BRA `(.left)
    FFMA R1, R1, R1, R1
    LDG.E R8, desc[UR4][R2.64]
    BRA `(.inner)
    .left:
    BRA.DIV UR4, `(.diverged)
    @!P2 BRA `(.outer)
    .end:
    EXIT
    .diverged:
    CALL.REL.NOINC `(.end)
    BRA `(.left)
"""


def test_loops_are_found_and_run_once():
    flow = Flow(code(LOOPS))
    names = [(name, [i.base for i in path]) for name, path in loops(flow)]
    assert names == [
        ("around loads", ["LDG", "BRA", "FFMA", "LDG", "BRA", "BRA", "BRA"]),
        ("loads", ["BRA", "FFMA", "LDG", "BRA"]),
    ]
    assert [i.base for i in flow.whole()] == ["MOV", "BRA", *names[0][1], "EXIT"]  # not past the loops, and no CALL


def test_slow_paths_and_optional_instructions_are_not_the_usual_path():
    flow = Flow(code("""
        FCHK P0, R0, R1
        @P0 BRA `(.slow)
        FMUL R0, R0, R1
        FMUL R0, R0, R1
        FMUL R0, R0, R1
        .divided:
        @P1 BRA `(.stored)
        STG.E desc[UR4][R2.64], R0
        .stored:
        @P3 BRA `(.loaded)
        LDG.E R1, desc[UR4][R2.64]
        .loaded:
        @P2 BRA `(.end)
        FADD R1, R1, R1
        .end:
        EXIT
        .slow:
        CALL.REL.NOINC `(.slow)
        BRA `(.divided)
    """))  # fmt: skip
    fast = ["BRA", "FMUL", "FMUL", "FMUL", "BRA"]
    assert [i.base for i in flow.whole()] == ["FCHK", *fast, "STG", "BRA", "LDG", "BRA", "EXIT"]
    assert [i.base for i in between(flow, "FCHK", "EXIT", least=True)] == [*fast, "STG", "BRA", "BRA", "EXIT"]


def test_blocks_of_an_option_can_be_closed():
    listing = "@P0 BRA `(.b)\nSTG.E.64 [R2.64], R0\n.b:\nSTG.E [R2.64], R0\nEXIT"
    assert "STG.E.64" in [i.opcode for i in Flow(code(listing)).whole()]
    assert "STG.E.64" not in [i.opcode for i in Flow(code(listing), without=r"STG\.E\.64").whole()]


def test_blocks_of_a_source_line_can_be_closed():
    listing = code("@P0 BRA `(.b)\nLDG.E R1, [R2.64]\n.b:\nLDG.E R0, [R2.64]\nEXIT")
    listing = [i._replace(line=f"a.cu:{n}") for n, i in enumerate(listing, 1)]
    assert len(Flow(listing, without=r"LDG\S* (?:b.cu:2|a.cu:1)$").whole()) == 4
    assert [i.line for i in Flow(listing, without=r"LDG\S* (?:b.cu:4|a.cu:2)$").whole()] == [
        f"a.cu:{n}" for n in (1, 3, 4)
    ]
    assert re.fullmatch(r"LDG\\S\* \(\?:attention_decode\\\.cuh:\d+\)\$", within("LDG", "int further(int b)"))
    with pytest.raises(ValueError, match="no line of csrc/"):
        within("LDG", "no such text")


def test_a_region_is_from_the_last_start_to_the_last_end():
    flow = Flow(code("""
        .k:
        QGMMA.64x16x32.F32.E4M3.E4M3 R24, gdesc[UR12], RZ, !UPT
        QGMMA.64x16x32.F32.E4M3.E4M3 R24, gdesc[UR12], R24, gsb0
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        FFMA R0, R24, R1, R0
        @P0 BRA `(.k)
        STS [R4], R0
        @P1 BRA `(.last)
        FMUL R0, R0, R0
        .last:
        STS [R4], R0
        LDS R0, [R4]
        EXIT
    """))  # fmt: skip
    assert [i.base for i in between(flow, "QGMMA", "STS")] == ["WARPGROUP", "FFMA", "BRA", "STS", "BRA", "STS"]
    assert between(flow, "STS", "QGMMA") == between(flow, "STS", "STG") == []
    (name, path), = loops(flow)  # fmt: skip
    assert name == "products" and [i.base for i in segments(path)[1][1]] == ["FFMA", "BRA"]


def test_clocks_of_a_warp_alone():
    assert clocks(code("MOV R0, R1 ; stall=4\nMOV R2, R3 ; stall=2")) == 6
    load = "LDG.E R0, [R2.64] ; sets=0, stall=2"
    assert clocks(code(f"{load}\nMOV R4, R5\nMOV R6, R0 ; waits=0")) == LATENCY["LDG"] + 1
    assert clocks(code("STG.E [R2.64], R0 ; frees=3\nMOV R0, R5 ; waits=3")) == 12 + 1
    # Special functions take a warp 8 clocks, so the second waits for the first; the result is there 19 clocks later.
    assert clocks(code("MUFU.EX2 R0, R0 ; sets=0\nMUFU.EX2 R1, R1 ; sets=1\nMOV R2, R1 ; waits=1")) == 8 + 19 + 1
    jump = code("BRA `(.b) ; stall=5\nMOV R0, R0\n.b:\nEXIT")
    assert clocks(Flow(jump).whole()) == 5 + 10 + 1


def test_what_a_path_asks_of_its_scheduler():
    w = walk(code("""
        LDG.E.128 R0, [R8.64] ; sets=0
        BSSY B0, 0x10
        MUFU.EX2 R0, R0 ; waits=0
        PLOP3.LUT P0, PT, PT, PT, PT, 0x8, 0x0
        P2R R1, PR, RZ, 0x7f
        LDL R2, [R1]
        IMAD R3, R3, R3, R3
        LDS.128 R4, [R1]
    """))  # fmt: skip
    assert w.units == dict(fma=2, integer=4, special=8, shared=16) and w.busiest == ("shared", 16)
    assert (w.instructions, w.branches, w.early, w.predicates, w.spills) == (8, 1, 1, 2, 1)
    assert w.share == pytest.approx(16 / (512 / (4.8e12 / 132 / 4 / 1.98e9)))


def test_wgmma_reads_its_operands_from_shared_memory():
    """64 x 128 x 32 bytes: 6 KB or, with A in registers, 4 KB, at 128 bytes a clock; 64 clocks of the tensor core."""
    both, one = code("""
        QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR12], R24, gsb0
        HGMMA.64x128x16.F32.BF16 R88, R152, gdesc[UR4].tnspB, R88
    """)
    assert walk([both]).units["shared"] == 48 and walk([one]).units["shared"] == 32
    assert walk([both]).tensor == walk([one]).tensor == 64


def test_rows_of_a_kernel():
    flops = "FADD R0, R0, R0\n" * 40  # loops of fewer instructions have no row
    rows = rows_of("a_kernel", code(f"""
        MOV R2, R3
        .tile:
        LDS R0, [R4]
        .k:
        WARPGROUP.ARRIVE
        QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR12], R24, gsb0
        WARPGROUP.DEPBAR.LE gsb0, 0x1
        FADD R1, R1, R1
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        {flops}
        @P0 BRA `(.k)
        STG.E.128 [R2.64], R88
        @P1 BRA `(.tile)
        .less:
        LDG.E R0, [R2.64]
        @P2 BRA `(.less)
        EXIT
    """))  # fmt: skip
    assert [(r["part"], r["instructions"], r["share"] is None) for r in rows] == [
        ("whole", 1 + 1 + 46 + 2 + 2 + 1, False),
        ("around products", 1 + 46 + 2, False),
        ("around products: before the first issue", 1, True),
        ("around products: after the last wait", 41 + 2, True),
        ("products", 46, False),
        ("products: after a wait", 41, True),
    ]
    assert rows[0]["call_sites"] == rows[0]["hazards"] == 0


@pytest.mark.parametrize("between_them, stands_alone", [(4, 1), (5, 0)])
def test_a_load_that_is_waited_for_at_once(between_them, stands_alone):
    path = "LDG.E R0, [R2.64] ; sets=2\n" + "MOV R9, R9\n" * between_them + "MOV R1, R0 ; waits=2"
    assert early(code(path)) == stands_alone


WGMMA = """
    QGMMA.64x16x32.F32.E4M3.E4M3 R24, gdesc[UR12], RZ, !UPT
    QGMMA.64x16x32.F32.E4M3.E4M3 R24, gdesc[UR12], R24, gsb0
    {first}
    HGMMA.64x8x16.F32.BF16 R40, R48, gdesc[UR4], R40, gsb0
    WARPGROUP.DEPBAR.LE gsb0, 0x1
    {second}
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    {third}
    EXIT
"""


@pytest.mark.parametrize("first, second, third, wrong", [
    ("MOV R23, R32", "FADD R0, R24, R31", "FADD R40, R43, R51", []),
    ("MOV R0, R31", "NOP", "NOP", ["MOV R0, R31"]),  # reads an accumulator in flight
    ("NOP", "MOV R43, R0", "NOP", ["MOV R43, R0"]),  # the second group still is
    ("NOP", "FADD R0, R48, R51", "STS [R2], R48", []),  # operand A may be read
    ("NOP", "LDS.128 R48, [R2]", "NOP", ["LDS.128 R48, [R2]"]),  # but not written
    ("NOP", "SHFL.DOWN PT, R51, R0, 0x10, 0x1f", "NOP", ["SHFL.DOWN PT, R51, R0, 0x10, 0x1f"]),
    ("NOP", "ISETP.NE.AND P0, PT, R48, RZ, PT", "NOP", []),
])  # fmt: skip
def test_nothing_touches_the_registers_of_a_wgmma_in_flight(first, second, third, wrong):
    found = touched_in_flight(Flow(code(WGMMA.format(first=first, second=second, third=third))))
    assert [f"{i.opcode} {i.operands}" for i in found] == wrong


def test_a_loop_without_a_wait_is_seen_too():
    loop = ".k:\nQGMMA.64x8x32.F32.E4M3.E4M3 R24, gdesc[UR12], R24, gsb0\n@P0 BRA `(.k)\nMOV R24, R0\nEXIT"
    assert [i.base for i in touched_in_flight(Flow(code(loop)))] == ["MOV"]


@pytest.mark.parametrize("change, touched", [("MOV R0, R0", 0), ("ISETP.NE.AND P1, PT, R0, RZ, PT", 1)])
def test_branches_on_one_predicate_go_the_same_way(change, touched):
    """Issue and wait under the same condition; not if the predicate changes between them."""
    flow = Flow(code(f"""
        @!P1 BRA `(.none)
        HGMMA.64x8x16.F32.BF16 R40, gdesc[UR8], gdesc[UR4], R40, gsb0
        @!P1 BRA `(.none)
        {change}
        .none:
        @!P1 BRA `(.done)
        WARPGROUP.DEPBAR.LE gsb0, 0x0
        .done:
        MOV R40, R0
        EXIT
    """))  # fmt: skip
    assert len(touched_in_flight(flow)) == touched


def test_registers_stay_within_setmaxnreg():
    flow = Flow(code("""
        MOV R100, R0
        @P0 BRA `(.multiply)
        USETMAXREG.DEALLOC.CTAPOOL 0x28
        MOV R39, R1
        EXIT
        .multiply:
        USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8
        LDS.128 R228, [R2]
        EXIT
    """))  # fmt: skip
    assert highest_registers(flow, 168) == {168: 100, 40: 39, 232: 231}


def test_the_page_says_what_the_tables_say():
    cuda, triton = (json.loads(path.read_text()) for path in (CUDA_CLOCKS, TRITON_CLOCKS))
    assert CLOCKS.read_text() == page(cuda, triton), f"{CLOCKS.name} is out of date: make tables"
    assert PREDICTED.read_text() == predict.page(cuda["rows"]), f"{PREDICTED.name} is out of date: make tables"


def test_a_bound_follows_from_the_clocks():
    """A product by hand: 4 steps of 1152 clocks, one of which the other warpgroup makes during an epilogue of 1000."""
    name = "gemm_fp8_kernel<Variant<V>>"
    around = [dict(kernel=name, part=f"around products: {part}", clocks=500)
              for part in ("before the first issue", "after the last wait")]  # fmt: skip
    clocks = predict.Clocks([dict(kernel=name, part="products", clocks=488, tensor=512), *around])
    seconds = predict.Product("", "V", 1, 128 * 132, 256, 512, 2, "").seconds(clocks)
    assert seconds["SMs"] == pytest.approx((2 * 1000 + 1152 * (4 - 1)) / predict.CLOCK)
    assert seconds["memory"] == pytest.approx(((256 + 128 * 132) * 512 + 2 * 128 * 132 * 256) / 4.8e12)


def test_budgets_have_a_margin():
    def row(kernel="k", part="whole", clocks=1000, **counts):
        return dict(kernel=kernel, part=part, clocks=clocks, **counts)

    assert differences([row(clocks=1050)], [row()]) == []
    assert differences([row(clocks=1051)], [row()]) == ["k, whole: clocks 1000 -> 1051, worse"]
    assert differences([row(clocks=900)], [row()]) == ["k, whole: clocks 1000 -> 900, better"]
    assert differences([row(clocks=28)], [row(clocks=20)]) == []  # a few
    assert differences([row(hazards=1)], [row(hazards=0)]) == ["k, whole: hazards 0 -> 1, worse"]
    assert differences([row(), row()], [row()]) == ["k whole 1: new"]
    assert differences([row()], [row(), row(part="loads")]) == ["k loads 0: gone"]


@pytest.mark.parametrize("arguments, message", [
    (["nothing.cubin"], "there is no file nothing.cubin"),
    ([__file__], "holds no code of sm_90"),
    ([__file__, "--start", "QGMMA"], "--start and --end belong together"),
    ([], "the following arguments are required: file"),
])  # fmt: skip
def test_misuse_of_the_command_is_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and message in printed and printed.count("\n") == 1
