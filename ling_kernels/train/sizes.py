"""Bytes that a run needs besides the device's memory: on disk, and on the host while a checkpoint is written."""

from ..model import LingConfig
from .optimizer import bytes_per_weight
from .settings import Settings


def checkpoint_bytes(config: LingConfig, s: Settings) -> int:
    """Bytes of one checkpoint: the weights in fp32 and the optimizer's state; the rest is small."""
    in_embeddings = 2 * config.vocab_size * config.hidden_size
    in_layers = config.num_parameters(mtp=True) - in_embeddings
    weight = 2 * (4 if s.master == "fp32" else 2)  # of bytes_per_weight: master and gradient
    state = [bytes_per_weight(s.optimizer, s.master, embedding=e) - weight for e in (False, True)]
    return in_layers * (4 + state[0]) + in_embeddings * (4 + state[1])


def disk_bytes(config: LingConfig, s: Settings) -> int | None:
    """Most bytes that a run's checkpoints and its exported model (bf16) take: those that are kept and the one that is
    being written. None where all are kept (keep 0)."""
    if not s.keep:
        return None
    return (s.keep + 1) * checkpoint_bytes(config, s) + 2 * config.num_parameters(mtp=True)
