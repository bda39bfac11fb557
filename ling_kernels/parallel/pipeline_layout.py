"""Which units of a model each pipeline stage holds, written as Megatron's --pipeline-model-parallel-layout.

    E   the embedding                 m   an MTP layer: its norms, projection and transformer layer
    t   a transformer layer           L   final norm, head and losses

`|` ends a stage, `x*n` and `(...)*n` repeat, commas are for the eye. "Et*3|(tt|)*8,m|L" has eleven stages, and a stage
may be empty. Beyond Megatron's grammar, as many L as losses, the next token's and one for each MTP layer, put each loss
into a stage of its own choice: the head is large beside a layer of a small model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import InputError
from ..model import LingConfig

UNITS = "EtmL"
MOST_UNITS = 100_000


@dataclass(frozen=True)
class PipelineLayout:
    """stages: the units of each stage in order, each a letter of UNITS, such as ("Et", "tt", "", "mL")."""

    stages: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "PipelineLayout":
        """Read a layout. Raises InputError for anything that is no layout."""
        plain = expand(text.replace(",", "").replace(" ", ""))
        if wrong := next((c for c in plain if c not in UNITS + "|"), None):
            raise InputError(f"--pipeline {text}: {wrong!r} is none of E, t, m, L, |, ( ) and *n")
        return cls(tuple(plain.split("|")))

    @classmethod
    def even(cls, config: LingConfig, stages: int) -> "PipelineLayout":
        """Layers in equal numbers, as far as they go; the first stages have the fewer ones, as embedding and head are
        not counted. Raises InputError for fewer layers than stages."""
        layers = config.num_hidden_layers
        if layers < stages:
            raise InputError(f"--pp {stages}: the model has only {layers} layers; give --pipeline")
        parts = ["t" * ((s + 1) * layers // stages - s * layers // stages) for s in range(stages)]
        parts[0], parts[-1] = "E" + parts[0], parts[-1] + "m" * config.num_nextn_predict_layers + "L"
        return cls(tuple(parts))

    def __str__(self) -> str:
        return "|".join(self.stages)

    def check(self, config: LingConfig, model: str = "the model") -> None:
        """Raise InputError unless the stages hold every unit of the model once, in order."""
        layers, mtp, found = config.num_hidden_layers, config.num_nextn_predict_layers, "".join(self.stages)
        for unit, number, name in (("E", 1, "embedding"), ("t", layers, "layers"), ("m", mtp, "MTP layers")):
            if found.count(unit) != number:
                raise InputError(f"--pipeline {self}: {found.count(unit)} {unit}, but {model} has {number} {name}")
        losses = sorted({1, 1 + mtp})
        if found.count("L") not in losses:
            raise InputError(f"--pipeline {self}: {found.count('L')} L; there is {' or '.join(map(str, losses))}, for"
                             " all losses or for each one")  # fmt: skip
        if found != "E" + "t" * layers + "m" * mtp + "L" * found.count("L"):
            raise InputError(f"--pipeline {self}: the order is E, the layers t, MTP layers m, then L")
        if "L" not in self.stages[-1] or "E" not in self.stages[0]:
            raise InputError(f"--pipeline {self}: the first stage holds E and the last one L")

    def units(self, stage: int) -> list[tuple[str, int]]:
        """The units of a stage as (letter, index among those of its letter)."""
        before = "".join(self.stages[:stage])
        numbers = {c: before.count(c) for c in UNITS}
        found = []
        for c in self.stages[stage]:
            found.append((c, numbers[c]))
            numbers[c] += 1
        return found

    def hidden_states(self, stage: int) -> int:
        """Number of hidden states that a stage sends to the next one: the main one, one for each MTP layer so far,
        less those whose loss is done."""
        before = "".join(self.stages[: stage + 1])
        return 1 + before.count("m") - before.count("L")

    def ranks(self, ranks: int) -> list[int]:
        """The rank of each stage, in turn. Raises InputError where the ranks would have different numbers of stages."""
        number = len(self.stages)
        if number % ranks:
            raise InputError(f"--pipeline {self}: {number} stages on {ranks} ranks; each rank takes equally many")
        return [s % ranks for s in range(number)]

    def holders(self, units: str, ranks: Sequence[int]) -> list[int]:
        """The ranks that hold any unit of these letters, ascending. ranks: the rank of each stage."""
        return sorted({r for stage, r in zip(self.stages, ranks, strict=True) if set(stage) & set(units)})

    def modules(self) -> list[list[str]]:
        """The modules of each stage under torchtitan's names, for its pipeline_parallel_module_fqns_per_model_part.

        Raises InputError for MTP layers or losses before the last stage, where torchtitan wants them.
        """
        if any(set(stage) & {"m", "L"} for stage in self.stages[:-1]):
            raise InputError(f"--modules: torchtitan has all of m and L in the last stage, unlike {self}")
        names = dict(
            E=["tok_embeddings"], t=["layers.{}"], m=["mtp_layers.{}", "tok_embeddings"], L=["norm", "lm_head"]
        )
        found = []
        for stage in range(len(self.stages)):
            listed = [name.format(i) for unit, i in self.units(stage) for name in names[unit]]
            found.append([*dict.fromkeys(listed)])
        return found


def expand(text: str) -> str:
    """Replace x*n and (...)*n by n copies."""
    pattern = re.compile(r"\(([^()]*)\)\*(\d{1,5})|([^()*\d])\*(\d{1,5})")
    plain = text
    while match := pattern.search(plain):
        copies = int(match[2] or match[4])
        plain = plain[: match.start()] + (match[1] or match[3] or "") * copies + plain[match.end() :]
        if len(plain) > MOST_UNITS:
            raise InputError(f"--pipeline {text}: more than {MOST_UNITS} units")
    return plain
