"""Adapters of a run (--lora-rank): the settings, the model that they are for, their number."""

from pathlib import Path

from ...errors import InputError
from ...files import user_path
from ...model import LingConfig
from ...nn.lora import ON, lora_
from ...parallel.adapters import fingerprints
from ...parallel.official import whole_on_meta
from ..settings import FIELDS, Settings
from .models import weights_in


def layers_of(s) -> list[str]:
    """The layers of --lora-on. Raises InputError for others."""
    layers = [name.strip() for name in s.lora_on.split(",")]
    if wrong := [name for name in layers if name not in ON]:
        raise InputError(f"--lora-on {s.lora_on}: {wrong[0]!r} is not one of {', '.join(ON)}")
    return [name for name in ON if name in layers]


def alpha_of(s) -> float:
    return 2.0 * s.lora_rank if s.lora_alpha is None else s.lora_alpha


def check_adapters(s: Settings) -> None:
    """Raise InputError for settings that contradict --lora-rank, or that need it."""
    check_needs_rank(s)
    if s.fp8_weights == "only" and not (s.lora_rank and s.precision == "fp8" and s.fp8_scales == "fp32"):
        raise InputError("--fp8-weights only needs --lora-rank, --precision fp8 and --fp8-scales fp32")
    if not s.lora_rank:
        return
    with_rank = f"with --lora-rank {s.lora_rank}"
    if s.recompute in ("norm_act", "experts"):
        raise InputError(f"--recompute {s.recompute} {with_rank}: adapters read the activations; give none or full")
    if s.merge_last:
        raise InputError(f"--merge-last {with_rank}: the weights to merge do not change")
    if s.fp8_watch:
        raise InputError(f"--fp8-watch {with_rank}: it measures layers that are trained")


def check_needs_rank(s) -> None:
    """Raise InputError for settings of adapters without --lora-rank, and for layers that are none. s: any settings that
    have these."""
    layers_of(s)
    for name in ("lora_alpha", "lora_on"):
        if not s.lora_rank and getattr(s, name) != FIELDS[name].default:
            raise InputError(f"--{name.replace('_', '-')} {getattr(s, name)} needs --lora-rank")


def adapter_parameters(config: LingConfig, s: Settings) -> int:
    """Number of the adapters' parameters of the whole model."""
    whole = whole_on_meta(config)
    lora_(whole, s.lora_rank, on=layers_of(s))
    return sum(p.numel() for p in whole.parameters() if p.requires_grad)


def base_model(model: str, rank: int, state: dict | None = None) -> tuple[Path, dict[str, list[int]]]:
    """The folder of the weights that the adapters are for, and what tells them from others. state: of the checkpoint to
    resume from. Raises InputError where there are none, and where they have changed since."""
    folder = user_path(model, "--model")
    if not weights_in(folder):
        gone = "which a run with adapters reads when it is resumed" if state else "and adapters are for trained ones"
        raise InputError(f"--lora-rank {rank}: there are no weights in {model}, {gone}: give a model's folder")
    found = fingerprints(folder)
    if state and state.get("base") != found:
        raise InputError(f"the weights in {model} are not those that the run's adapters are for: they have changed")
    return folder, found
