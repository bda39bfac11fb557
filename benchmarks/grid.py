"""Where ops are timed: the points of Ling's grid, which a Case's `ling` turns into shapes."""

from dataclasses import dataclass

from ling_kernels.model import LingConfig
from tests.cases import CASES

MODELS = ("mini", "flash", "1t")
TOKENS = (1, 8, 64, 1024, 8192, 32768, 131072)


@dataclass(frozen=True)
class Point:
    """One GPU's share of a layer: T tokens come in, T x topk rows reach its E experts, of 256 among `parallel` GPUs."""

    model: str
    T: int
    parallel: int = 1
    routing: str = "balanced"

    @property
    def config(self) -> LingConfig:
        return LingConfig.preset(self.model)

    @property
    def H(self) -> int:
        return self.config.hidden_size

    @property
    def F(self) -> int:
        return self.config.moe_intermediate_size

    @property
    def Hq(self) -> int:
        return self.config.num_attention_heads

    @property
    def Hkv(self) -> int:
        return self.config.num_key_value_heads

    @property
    def E(self) -> int:
        return self.config.num_experts // self.parallel

    @property
    def S(self) -> int:
        return self.T * self.config.num_experts_per_tok

    @property
    def lengths(self) -> tuple[int, ...]:
        """T tokens in sequences of at most 4096."""
        return (min(self.T, 4096),) * max(1, self.T // 4096)

    @property
    def whole(self) -> bool:
        """All experts are here, evenly used."""
        return self.parallel == 1 and self.routing == "balanced"


POINTS = [
    *(Point(m, T, parallel) for m in MODELS for T in TOKENS for parallel in (1, 8, 64)),
    *(Point(m, 8192, 1, routing) for m in MODELS for routing in ("zipf", "one")),
]


def shapes(case, full: bool) -> list[dict]:
    """The Case's own benchmark shape, then those of the grid."""
    found = [case.shapes[-1]]
    if full and case.ling:
        for point in POINTS:
            for shape in case.ling(point) or ():
                if shape not in found:
                    found.append(shape)
    return found


def title(case, shape: dict) -> str:
    """A name that tells Cases of one op apart, also those that differ in what they make of a shape."""
    alike = [c for c in CASES if c.name == case.name]
    number = f"#{alike.index(case) + 1}" if len(alike) > 1 else ""
    return "-".join([case.name + number, *(f"{k}{brief(v)}" for k, v in shape.items() if v != "")])


def brief(value) -> str:
    if isinstance(value, tuple) and len(value) > 1 and len({*value}) == 1:
        return f"{len(value)}x{value[0]}"
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)
