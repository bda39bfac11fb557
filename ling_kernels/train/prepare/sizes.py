"""Bytes of a run's checkpoints, which the check before a run and the plan count alike."""

from ...model import LingConfig
from ..optimizer import bytes_per_weight
from ..settings import Settings


def layers_and_embeddings(config: LingConfig) -> tuple[int, int]:
    """Parameters of all that is not embedding or head; of embedding and head."""
    embeddings = 2 * config.vocab_size * config.hidden_size
    return config.num_parameters(mtp=True) - embeddings, embeddings


def checkpoint_bytes(config: LingConfig, s: Settings) -> int:
    """Bytes of one checkpoint: weights in the masters' precision and the optimizer's state; the rest is small."""
    in_layers, in_embeddings = layers_and_embeddings(config)
    options = s.optimizer, s.master, False
    return in_layers * bytes_per_weight(*options) + in_embeddings * bytes_per_weight(*options, True)


def disk_bytes(config: LingConfig, s: Settings, step: int = 0) -> tuple[int, int]:
    """The most checkpoints that a run has at once after `step`: those that it keeps and the one that is being written;
    bytes of these and of the model that is exported in bf16 at the end."""
    every = s.save_every or s.steps
    saves = max(-(-s.steps // every) - step // every, 1)
    number = min(saves, s.keep + 1 if s.keep else saves)
    return number, number * checkpoint_bytes(config, s) + 2 * config.num_parameters(mtp=True)
