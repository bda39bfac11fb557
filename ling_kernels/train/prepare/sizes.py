"""Bytes of a run's checkpoints, which the check before a run and the plan count alike."""

import math
from collections.abc import Sequence

from ...model import LingConfig
from ..optimizer import bytes_per_weight
from ..saving import GOOD_AFTER
from ..settings import Settings
from .adapters import adapter_parameters


def layers_and_embeddings(config: LingConfig) -> tuple[int, int]:
    """Parameters of all that is not embedding or head; of embedding and head."""
    embeddings = 2 * config.vocab_size * config.hidden_size
    return config.num_parameters(mtp=True) - embeddings, embeddings


def checkpoint_bytes(config: LingConfig, s: Settings) -> int:
    """Bytes of one checkpoint: weights in the masters' precision, the optimizer's state, the running merge in fp64; the
    rest is small. Of adapters: theirs and their optimizer's state."""
    if s.lora_rank:
        return round(adapter_parameters(config, s) * bytes_per_weight(s.optimizer, "fp32", False))
    in_layers, in_embeddings = layers_and_embeddings(config)
    options = s.optimizer, s.master, False
    moe_layers = config.num_hidden_layers - config.first_k_dense_replace + config.num_nextn_predict_layers
    routers = moe_layers * config.num_experts * config.hidden_size * (0 if s.master == "fp32" else 2)  # fp32 always
    matrices = in_layers * bytes_per_weight(*options) + in_embeddings * bytes_per_weight(*options, True)
    return round(matrices) + routers + (8 * (in_layers + in_embeddings) if s.merge_last else 0)


def checkpoints_at_once(s: Settings, step: int = 0, there: Sequence[int] = ()) -> tuple[int, int]:
    """How many checkpoints a run has at once after `step`, one of them being written: a run of sound steps that is
    never stopped; any run. there: the steps of those that it has already.

    saving.kept says which stay: --keep's last, those for ever, the last good one and the first after it. The last good
    one is GOOD_AFTER steps back in a run of sound steps, further where steps were unsound; a run that was stopped has a
    checkpoint out of turn.
    """
    every = s.save_every or s.steps
    later = max(-(-s.steps // every) - step // every, 0 if there else 1)
    total, next_one = len(there) + later, len(there) + min(later, 1)  # others are removed after the next one is written
    if not s.keep:
        return total, total
    forever = 0
    if s.keep_every:
        both = math.lcm(every, s.keep_every)
        last = s.steps % every > 0 and s.steps % s.keep_every == 0
        forever = s.steps // both - step // both + last + sum(n % s.keep_every == 0 for n in there)
    back = -(-GOOD_AFTER // every) + 1  # checkpoints up to the last good one
    stay = s.keep if s.keep >= back else min(back, s.keep + 2)
    usual, most = min(total, forever + stay + 1), min(total, forever + s.keep + 3)
    return max(usual, next_one), max(most, next_one)


def disk_bytes(config: LingConfig, s: Settings, number: int) -> int:
    """Bytes of so many checkpoints, and of the model that is exported in bf16 at the end."""
    return number * checkpoint_bytes(config, s) + 2 * config.num_parameters(mtp=True)
