"""docs/kernels-predicted.md: what clocks, bytes and data sheets allow at most, beside published numbers."""

from typing import NamedTuple

from ling_kernels.gpu import HOPPER

H200 = HOPPER["H200"]
MACS = 4096  # FP8 multiply-adds of an SM and clock; half as many in bf16
CLOCK = H200.fp8 / (2 * MACS * H200.sms)  # Hz, at which the data sheet's rate is reached
ROWS, LENGTH = 1024, 4096  # of an expert; of a sequence
SHARED, L2 = 128, 32  # bytes an SM and clock, of shared memory and (assumed) from L2 when all SMs load
HEAD = "| operation, H200 | bound | of the peak | bound by | published for others |\n|---|---|---|---|---|\n"
PAGE = """\
# What the kernels can reach at most

Made by `make tables` from [the clocks](kernels-clocks.md), sizes and data sheets. **Predictions: nothing here is
measured, and a bound is not a promise.** The published numbers are measured, on other GPUs (H100, H800), other shapes,
and at the clock that the power limit left; these bounds take the data sheet's clock ({clock:.2f} GHz). They leave out
waits for memory that is busy, the first tiles of a launch, and power.

A tile of 128 x 256 of the FP8 products: two warpgroups share the tensor cores, and shared memory if that is slower.
Blocks that are pairs load half of the weights each; L2 is assumed to give an SM {l2} bytes a clock.
While one is in its epilogue (e clocks, from its last wait to its next issue) the other multiplies alone, at its pace of
c clocks for 128 of K. With s clocks for 128 of K when both multiply, c or more, a tile takes 2 e + s (K / 128 - e / c).
Weights, rows and results pass memory once.

{gemm}
Rows: {rows} for each of 256 experts of Ling-mini (H 2048, F 512), if not said otherwise.

Attention, causal, 16 heads of 128 and 4 KV heads: both warpgroups' products, or one warpgroup's own instructions, and
the start and end of each tile; masked halves of diagonal blocks count as waste, and so do 2 of the backward's 7
products.

{attention}
Sources: DeepGEMM's README and its issues 74, 95, 107, 116, 168; FlashAttention-3's assets/flash3_fp16_fwd.png and arXiv
2407.08608; TLX's kernels (facebookexperimental/triton); flash-attention's issue 1572 for FlashInfer.

## Bound by memory

The share of memory's time that the busiest unit of an SM needs, from the same walk: above 100% it, not memory, is the
bound. The loop that reads the weight or the cache counts, for every warp of a block that multiplies.

{memory}
"""


class Clocks:
    """The rows of a table of clocks, by kernel and part."""

    def __init__(self, rows: list[dict]):
        self.rows = {(r["kernel"], r["part"]): r for r in rows}

    def __call__(self, kernel: str, part: str = "whole") -> dict:
        return self.rows[kernel, part]


class Product(NamedTuple):
    """A product with tiles of 128 x 256: E groups of `rows` rows, [rows, K] x [N, K]^T."""

    name: str
    kernel: str  # Variant<..> of gemm_fp8_kernel
    E: int
    rows: int
    N: int
    K: int
    out: float  # bytes of a result
    published: str
    shared: int = 144 << 10  # bytes that 128 of K take through shared memory: docs/kernels.md

    def seconds(self, clocks: Clocks) -> dict[str, float]:
        """{bound: seconds}: by the SMs, and by memory."""
        name = f"gemm_fp8_kernel<Variant<{self.kernel}>>"
        alone = clocks(name, "products")["clocks"] + clocks(name, "products")["tensor"]
        epilogue = sum(clocks(name, f"around products: {part}")["clocks"]
                       for part in ("before the first issue", "after the last wait"))  # fmt: skip
        l2 = 32 << 10  # bytes for 128 of K: pairs share weights
        step = max(128 * 256 * 128 / MACS, self.shared / SHARED, l2 / L2, alone)
        tile = 2 * epilogue + step * max(self.K / 128 - epilogue / alone, 0)
        tiles = self.E * -(-self.rows // 128) * self.N / 256
        read = self.E * (self.N + self.rows) * self.K
        return {
            "SMs": -(-tiles // H200.sms) * tile / CLOCK,
            "memory": (read + self.out * self.E * self.rows * self.N) / H200.bandwidth,
        }


def products() -> list[Product]:
    plain, fused = "0, 2, (Scales)0, (Output)0, (Tokens)0", "0, 2, (Scales)0, (Output)1, (Tokens)0"
    ends = ", (Contraction)0, (Weights)0"
    transposed = "128, 2, (Scales)0, (Output)0, (Tokens)0, (Contraction)0, (Weights)1"
    tokens = 128 << 10  # tokens in registers
    wgrad = "0, 2, (Scales)1, (Output)0, (Tokens)0, (Contraction)1, (Weights)0"
    return [
        Product("gate and up with SwiGLU", fused + ends, 256, ROWS, 1024, 2048, 0.5,
                "DeepGEMM, K 2048, no SwiGLU: 61 to 64%", tokens),
        Product("down", plain + ends, 256, ROWS, 2048, 512, 2, "DeepGEMM, one matrix, K 512: 47%", tokens),
        Product("dgrad of gate and up, weights as stored", transposed, 256, ROWS, 2048, 1024, 2, "nothing"),
        Product("wgrad of gate and up, fp32", wgrad, 256, 1024, 2048, ROWS, 4, "DeepGEMM, k 4096 to 8192: 41 to 53%"),
        Product("one matrix, 4096 x 7168 x 16384", plain + ends, 1, 4096, 7168, 16384, 2, "DeepGEMM: 75 to 78%",
                tokens),
    ]  # fmt: skip


def gemm_table(clocks: Clocks) -> str:
    lines = HEAD
    for p in products():
        seconds = p.seconds(clocks)
        bound = max(seconds, key=seconds.__getitem__)
        flops = 2 * p.E * p.rows * p.N * p.K / seconds[bound]
        lines += f"| {p.name} | {flops / 1e12:.0f} TFLOPS | {flops / H200.fp8:.0%} | {bound} | {p.published} |\n"
    return lines


def attention_table(clocks: Clocks) -> str:
    """The share of SMs that work comes from docs/attention.md, which tests/test_csrc_attention_tiles.py computes."""
    blocks = LENGTH / 128
    wasted = (blocks + 1) / blocks  # of the diagonal blocks half is masked
    mean = (blocks + 1) / 2  # blocks of keys that a tile sees
    results = []
    for name, kernel, loops, useful, sms, published in (
        ("forward", "attention_fwd_kernel<false>", ["products"], 1, 0.98, "FlashAttention-3: 59%; head size 128, 4096"),
        ("backward", "attention_bwd_kernel", ["products", "products 2"], 5 / 7, 0.89,
         "FlashAttention-3: 57%, not causal; TLX: 48%"),
    ):  # fmt: skip
        ideal = real = 0.0
        for loop in loops:
            row = clocks(kernel, loop)
            turns = 1 if name == "forward" else 2  # of the loop, for 128 x 128
            ideal += 2 * row["tensor"] * turns
            real += max(2 * row["tensor"], row["clocks"] + row["tensor"] / 2, 2 * row["instructions"]) * turns
        ends = sum(clocks(kernel, f"around products: {p}")["clocks"]
                   for p in ("before the first issue", "after the last wait")) * len(loops)  # fmt: skip
        share = ideal / (real + ends / mean) / wasted * sms * useful
        rate = f"{share * H200.bf16 / 1e12:.0f} TFLOPS"
        results.append(f"| {name}, 1 x {LENGTH} | {rate} | {share:.0%} | SMs | {published} |\n")
    return HEAD + "".join(results)


def memory_table(clocks: Clocks) -> str:
    lines = "| kernel | warps | H200 | H20 | published for others |\n|---|---|---|---|---|\n"
    deepgemm, flashinfer = "DeepGEMM, 2 to 4 experts, H20: 42 to 65%", "FlashInfer, 128 x 16K, H20: "
    decode = "attention_decode_kernel<bfloat16, {}, true>"
    few = "gemm_fp8_kernel<Variant<16, {}, (Scales)0, (Output){}, (Tokens)0, (Contraction)0, (Weights)0>>"
    for name, kernel, part, warps, size, published in (
        ("experts with up to 16 rows, down", few.format(1, 0), "products", 8, 128 * 128, deepgemm),
        ("experts with up to 16 rows, gate and up", few.format(2, 1), "products", 8, 256 * 128, "the same"),
        ("attention_decode, bf16", decode.format("bfloat16"), "mma", 4, None, flashinfer + "84%"),
        ("attention_decode, FP8 cache", decode.format("unsigned char"), "mma", 4, None, flashinfer + "48%"),
    ):  # fmt: skip
        row = clocks(kernel, part)
        size = size or row["bytes"] * warps  # else TMA loads them, which the walk does not count
        cells = []
        for gpu in (H200, HOPPER["H20"]):
            needed = size / (gpu.bandwidth / gpu.sms / gpu.clock)  # clocks for memory to deliver an SM's share
            cells.append(f"{row['busy'] * warps / 4 / needed:.0%}")
        lines += f"| {name} | {warps} | {' | '.join(cells)} | {published} |\n"
    return lines


def page(rows: list[dict]) -> str:
    clocks = Clocks(rows)
    return PAGE.format(
        clock=CLOCK / 1e9, l2=L2, rows=ROWS, gemm=gemm_table(clocks), attention=attention_table(clocks),
        memory=memory_table(clocks),
    )  # fmt: skip
