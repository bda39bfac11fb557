"""A layout of GPUs and the part of a model that each of them holds. A description only: no process group, no tensors.

    dp    data-parallel GPUs: each takes other rows of a batch ep    expert-parallel GPUs, a group among the dp: each
    holds num_experts / ep experts of every layer pp    pipeline stages: each holds num_hidden_layers / pp layers; the
    embedding is in the first stage, the head and the
          MTP layers are in the last
    zero  what is sharded over the dp GPUs (experts: over dp / ep) along dimension 0, as FSDP2 does: 1 the optimizer's
          state, 2 the gradients too, 3 the weights too (arXiv 1910.02054)

A layout has dp x pp GPUs.
"""

from dataclasses import dataclass, fields, replace

from ..errors import InputError
from ..model import LingConfig


@dataclass(frozen=True)
class Layout:
    """dp, ep and pp are at least 1, zero is 0 to 3. The defaults are one GPU."""

    dp: int = 1
    ep: int = 1
    pp: int = 1
    zero: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Read "dp=8,ep=8,pp=4,zero=1": any order, each name at most once, missing names get their default.

        Raises InputError for an unknown or repeated name and for a number out of range.
        """
        names, values = {f.name for f in fields(cls)}, {}
        for part in text.split(","):
            name, _, value = part.strip().partition("=")
            if name not in names or name in values or not (value.isascii() and value.isdecimal()):
                raise InputError(
                    f"--layout {text}: {part.strip()!r} is none of dp=N, ep=N, pp=N, zero=0|1|2|3, each once"
                )
            values[name] = int(value)
            if (name == "zero" and values[name] > 3) or (name != "zero" and values[name] < 1):
                raise InputError(f"--layout {text}: {name} is {'0 to 3' if name == 'zero' else 'at least 1'}")
        return cls(**values)

    def check(self, config: LingConfig, model: str = "the model") -> None:
        """Raise InputError where experts or layers cannot be divided evenly. `model` names the model in the message."""
        if self.dp % self.ep:
            raise InputError(f"--layout {self}: dp {self.dp} is not a multiple of ep {self.ep}; GPUs that share experts"
                             " take different rows")  # fmt: skip
        for number, things, name in ((config.num_experts, "experts", "ep"), (config.num_hidden_layers, "layers", "pp")):
            if number % getattr(self, name):
                raise InputError(
                    f"--layout {self}: the {number} {things} of {model} are not a multiple of {name}"
                    f" {getattr(self, name)}"
                )

    def part(self, config: LingConfig, stage: int) -> LingConfig:
        """The configuration of one stage's layers. Stages count from 0; only the last one has MTP layers."""
        layers = config.num_hidden_layers // self.pp
        dense = min(max(config.first_k_dense_replace - stage * layers, 0), layers)
        mtp = config.num_nextn_predict_layers if stage == self.pp - 1 else 0
        return replace(config, num_hidden_layers=layers, first_k_dense_replace=dense, num_nextn_predict_layers=mtp)

    def distinct_stages(self, config: LingConfig) -> list[int]:
        """One stage of each kind. Of equal stages the first, which has the most micro batches in flight."""
        first = {}
        for stage in range(self.pp):
            kind = stage == 0, stage == self.pp - 1, self.part(config, stage).first_k_dense_replace
            first.setdefault(kind, stage)
        return list(first.values())

    def in_flight(self, stage: int, micro_batches: int) -> int:
        """Most micro batches of a stage whose forward has run and whose backward has not, in the 1F1B schedule."""
        return min(self.pp - stage, micro_batches)
