"""Checks of a run's settings: bounds of each, contradictions between them, what the model cannot do."""

from collections.abc import Collection

from ...errors import InputError
from ...model import LingConfig
from ..report.loggers import installed
from ..running_merge import planned
from ..settings import FIELDS, Settings
from ..values import check_bounds
from .adapters import check_adapters

MAX_THREADS = 4096  # OpenMP ends the process where it cannot start them


def check(s: Settings, config: LingConfig, given: Collection[str] | None = None) -> None:
    """Raise InputError for a number out of range and for settings that contradict one another or the model. given: the
    settings that are not those of a run to resume; None: all."""
    check_bounds(s)
    _ = s.text_options  # checks them
    if s.seq_len > config.max_positions:
        raise InputError(f"--seq-len {s.seq_len} is longer than the {config.max_positions} positions of {s.model}")
    if s.holdout == 1 or (s.holdout == 0 and not s.val_data):
        raise InputError(f"--holdout {s.holdout}: it must be at least 2, or 0 with --val-data")
    micro = s.micro_batch or 1
    if s.batch % micro:
        raise InputError(f"--batch {s.batch} is not a multiple of --micro-batch {micro}")
    if s.recompute in ("norm_act", "experts") and s.precision != "fp8":
        raise InputError(f"--recompute {s.recompute} needs --precision fp8; none and full work with any")
    if s.recompute_mtp and not config.num_nextn_predict_layers:
        raise InputError(f"--recompute-mtp: {s.model} has no MTP layers; --mtp adds some to a new model")
    if s.master == "bf16" and s.optimizer == "adamw" and not s.lora_rank:  # adapters are fp32
        raise InputError("--master bf16 needs --optimizer adamw8bit or muon: adamw rounds to nearest and stalls")
    if s.master == "bf16" and s.precision not in ("bf16", "fp8"):
        raise InputError("--master bf16 needs --precision bf16 or fp8")
    for option, factor in (("--spike-loss", s.spike_loss), ("--spike-norm", s.spike_norm)):
        if factor and factor <= 1:
            raise InputError(f"{option} {factor}: it must be more than 1, or 0 for never")
    check_decay(s)
    check_adapters(s)
    planned(s)  # checks the running merge
    for name in ("merge_every", "merge_weights"):
        value = getattr(s, name)
        if value != FIELDS[name].default and not s.merge_last and (given is None or name in given):
            raise InputError(f"--{name.replace('_', '-')} {value} needs --merge-last, the number of steps to merge")
    if s.step_in_backward:
        check_step_in_backward(s)
    if s.fp8_fallback and not s.fp8_watch:
        raise InputError(f"--fp8-fallback {s.fp8_fallback} needs measurements: give --fp8-watch")
    if s.sample_every and not s.sample_tokens:
        raise InputError(f"--sample-every {s.sample_every} needs samples: --sample-tokens is 0")
    if s.wandb and not installed("wandb"):
        raise InputError(f"--wandb {s.wandb}: the package wandb is not installed (pip install wandb)")
    if s.threads and s.threads > MAX_THREADS:
        raise InputError(f"--threads {s.threads} is more than {MAX_THREADS}")
    if s.seed >= 1 << 63:
        raise InputError(f"--seed {s.seed} is not below 2^63")
    if s.ramp and not (0 < s.ramp[0] <= s.batch and s.ramp[0] % micro == 0):
        raise InputError(f"--batch-ramp {s.batch_ramp}: START must lie between 1 and --batch {s.batch}"
                         f" and be a multiple of --micro-batch {micro}")  # fmt: skip


def check_decay(s: Settings) -> None:
    if s.decay == "none" and (s.decay_steps or s.min_lr):
        option = f"--decay-steps {s.decay_steps}" if s.decay_steps else f"--min-lr {s.min_lr}"
        raise InputError(f"{option} needs a decay: give --decay linear, 1-sqrt or cosine")
    if s.decay_steps and s.warmup + s.decay_steps > s.steps:
        raise InputError(
            f"--decay-steps {s.decay_steps} and --warmup {s.warmup} are more than --steps {s.steps}:"
            " give fewer steps of decay or warm-up"
        )
    if s.decay != "none" and s.warmup >= s.steps:
        raise InputError(f"--decay {s.decay} has no step after --warmup {s.warmup} of --steps {s.steps}: give a shorter"
                         " --warmup")  # fmt: skip
    if s.min_lr > s.lr:
        raise InputError(f"--min-lr {s.min_lr} is more than --lr {s.lr}")


def check_step_in_backward(s: Settings) -> None:
    if s.micro_batch not in (None, s.batch):
        raise InputError(f"--step-in-backward frees a gradient before a second micro batch can add to it:"
                         f" --batch {s.batch} is more than --micro-batch {s.micro_batch}")  # fmt: skip
    if s.clip or s.spike_norm:
        option, remedy = ("--clip", "give --clip 0") if s.clip else ("--spike-norm", "leave it out")
        raise InputError(f"{option} {s.clip or s.spike_norm} needs the norm of all gradients, but --step-in-backward"
                         f" updates weights before it is known: {remedy}")  # fmt: skip
