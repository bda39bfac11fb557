"""Every setting of a training run: its flag, default, help, and what it may be."""

import argparse
import json
import math
from dataclasses import asdict, dataclass, field, fields, replace

from ..errors import InputError
from ..model import LingConfig
from ..nn.fp8 import RECOMPUTE, TRANSPOSED, WEIGHTS, WGRAD
from .optimizer import MASTERS, OPTIMIZERS
from .schedule import parse_ramp


def flag(default, help: str, **options):
    """options: `least` or `above`, bounds of a number; `shown`, the default in words; others go to argparse."""
    return field(default=default, metadata=dict(help=help, **options))


@dataclass(frozen=True)
class Settings:
    """The defaults are those of tiny; PRESET_DEFAULTS has what other presets change."""

    model: str = flag("tiny", "tiny, mini, flash or 1t (random weights), or a checkpoint directory (goes on from it)")
    mtp: int | None = flag(None, "MTP layers of a model with random weights", least=0, shown="the preset's")
    data: tuple[str, ...] | None = flag(
        None, ".txt, .jsonl, .parquet, .bin files or folders of them", nargs="+", shown="the text that ships in CPython"
    )
    tokenizer: str | None = flag(
        None, "a Hugging Face tokenizer.json or its folder", shown="the one in the model's directory, else byte-level"
    )
    text_field: str = flag("text", "field of .jsonl and column of .parquet that holds the text")
    holdout: int = flag(20, "every N-th document is kept for validation and never trained on", least=2)

    steps: int = flag(600, "optimizer steps of the whole run", least=1)
    seq_len: int = flag(256, "tokens in a row", least=2)
    batch: int = flag(4, "rows in a step", least=1)
    micro_batch: int | None = flag(None, "rows in a forward pass; gradients add up", least=1, shown="the whole batch")
    batch_ramp: str | None = flag(
        None, "START:STEPS, begin with START rows a step and reach --batch after STEPS steps", shown="no ramp"
    )
    step_in_backward: bool = flag(
        False, "change each weight as soon as its gradient is there, and free that: needs one micro batch and --clip 0",
        action=argparse.BooleanOptionalAction, shown="off",
    )  # fmt: skip
    optimizer: str = flag(
        "adamw", "adamw8bit keeps the moments in 8 bits; muon takes AdamW for what is no layer's matrix",
        choices=OPTIMIZERS,
    )  # fmt: skip
    master: str = flag(
        "fp32", "what the optimizer changes; bf16, for matrices, is rounded stochastically, by adamw8bit and muon",
        choices=MASTERS,
    )  # fmt: skip
    lr: float = flag(2e-3, "learning rate after the warm-up; it stays constant", above=0)
    warmup: int = flag(40, "steps over which the learning rate rises to --lr", least=0)
    weight_decay: float = flag(0.1, "on matrices and embeddings, not on norms", least=0)
    clip: float = flag(1.0, "gradient norm above which gradients are scaled down; 0: never", least=0)
    z_loss: float = flag(3.5e-6, "coefficient of the router's z-loss", least=0)
    balance_rate: float = flag(1e-3, "how far a step moves each expert's bias towards an even load", least=0)
    seed: int = flag(0, "of the weights, the order of documents and the sample", least=0)

    eval_every: int = flag(100, "steps between validations; 0: only at the end", least=0)
    eval_rows: int = flag(64, "rows that a validation takes, always the same, evenly spaced", least=1)
    save_every: int = flag(200, "steps between checkpoints; 0: only at the end", least=0)
    keep: int = flag(2, "how many of the latest checkpoints stay; 0: all", least=0)
    log_every: int = flag(10, "steps between lines where stderr is no terminal", least=1)
    max_bad_steps: int = flag(5, "stop after this many skipped steps in a row", least=1)
    spike_loss: float | None = flag(
        None, "skip a step whose loss is more than X times the median of the last 32 taken", above=1, shown="never"
    )
    spike_norm: float | None = flag(None, "the same of its gradient norm", above=1, shown="never")
    sample_tokens: int = flag(200, "length of the sample at the end; 0: none", least=0)
    device: str = flag("auto", "auto takes a GPU where there is one", choices=("auto", "cpu", "cuda"))
    precision: str = flag(
        "auto",
        "bf16 is autocast over fp32 weights; auto takes it on a GPU; fp8 is bf16 with FP8 products in the layers",
        choices=("auto", "bf16", "fp32", "fp8"),
    )
    recompute: str = flag(
        "none",
        "what the backward makes again: nothing; activations; experts up to their down projection; whole layers."
        " norm_act and experts are of fp8",
        choices=RECOMPUTE,
    )
    fp8_wgrad: str = flag(
        "auto", "products for the weights' gradients; auto takes bf16 for experts of few rows", choices=WGRAD
    )
    fp8_weights: str = flag("each_forward", "when weights are made FP8; kept: once a step", choices=WEIGHTS)
    fp8_transposed: str = flag("direct", "how long transposed FP8 weights are kept", choices=TRANSPOSED)
    fp8_scales: str = flag("fp32", "scales of any value, or powers of two", choices=("fp32", "pow2"))
    fp8_watch: int = flag(0, "steps between measurements of what FP8 makes of each layer's operands; 0: none", least=0)
    fp8_fallback: int = flag(
        0, "measurements in a row outside its band after which a layer goes on in bf16; 0: it is only named", least=0
    )
    threads: int | None = flag(None, "CPU threads", least=1, shown="one per core")

    @property
    def ramp(self) -> tuple[int, int] | None:
        return parse_ramp(self.batch_ramp) if self.batch_ramp else None


# What may be given anew to a resumed run, which stays the same run all the same.
FREE = {"steps", "eval_every", "save_every", "keep", "log_every", "max_bad_steps", "sample_tokens", "device", "threads",
        "precision", "master", "recompute", "fp8_weights", "fp8_wgrad", "fp8_transposed", "fp8_scales", "fp8_watch",
        "fp8_fallback", "spike_loss", "spike_norm", "step_in_backward"}  # fmt: skip

# Peak learning rates and batches of arXiv 2510.22115, table 1; one device needs micro batches.
PRESET_DEFAULTS = {
    "mini": dict(seq_len=4096, batch=4400, micro_batch=1, lr=3.36e-4, warmup=2000, steps=100000),
    "flash": dict(seq_len=4096, batch=8352, micro_batch=1, lr=2.61e-4, warmup=2000, steps=100000),
    "1t": dict(seq_len=4096, batch=18144, micro_batch=1, lr=1.86e-4, warmup=2000, steps=100000),
}

# What --preset stands for. ling-mini-1gpu: all of Ling-mini on a GPU of 141 GB, docs/fp8.md has its plan.
PRESETS = {
    "ling-mini-1gpu": dict(
        model="mini", mtp=1, seq_len=4096, micro_batch=1, batch=16, precision="fp8", fp8_weights="kept", master="bf16",
        optimizer="adamw8bit",
    ),
}  # fmt: skip


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per setting. Those not given are absent from the result: a resumed run must know what was asked."""
    for f in fields(Settings):
        options = {k: v for k, v in f.metadata.items() if k not in ("least", "above", "shown")}
        default = f.metadata.get("shown", f.default)
        options["help"] = f"{options['help']} (default: {default})"
        if "choices" not in options and "action" not in options:
            options["type"] = next((kind for kind in (int, float) if f.type in (kind, kind | None)), str)
            options["metavar"] = {int: "N", float: "X"}.get(options["type"], f.name.upper())
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, **options)


def settings_of(given: dict, saved: dict | None = None) -> Settings:
    """Defaults of the model's preset, then what the resumed run had, then what --preset and other flags say."""
    given = PRESETS.get(given.get("preset"), {}) | given
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k != "preset"}
    if saved is None:
        return Settings(**(PRESET_DEFAULTS.get(given.get("model"), {}) | given))
    had = from_json(saved)
    for name, value in given.items():
        before = getattr(had, name)
        if name not in FREE and value != before:
            raise InputError(f"{name} is {before!r} in the run to resume and {value!r} here: leave --{name} out"
                             .replace(f"--{name}", f"--{name.replace('_', '-')}"))  # fmt: skip
    new = replace(had, **given)
    if new.optimizer == "muon" and new.master != had.master:
        raise InputError(f"--master {new.master}: the run's is {had.master}, with which muon keeps other states")
    return new


def to_json(settings: Settings) -> dict:
    return json.loads(json.dumps(asdict(settings)))


def from_json(saved: dict) -> Settings:
    return Settings(**{k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()})


def check(s: Settings, config: LingConfig) -> None:
    """Raise InputError for a number out of range, or numbers that do not fit one another or the model."""
    for f in fields(s):
        value, name = getattr(s, f.name), f.name.replace("_", "-")
        if not isinstance(value, int | float):
            continue
        least, above = f.metadata.get("least", -math.inf), f.metadata.get("above", -math.inf)
        if not (math.isfinite(value) and value >= least and value > above):
            bound = f"at least {least}" if "least" in f.metadata else f"more than {above}"
            raise InputError(f"--{name} {value}: it must be {bound}")
    if s.seq_len > config.max_positions:
        raise InputError(f"--seq-len {s.seq_len} is longer than the {config.max_positions} positions of {s.model}")
    micro = s.micro_batch or 1
    if s.batch % micro:
        raise InputError(f"--batch {s.batch} is not a multiple of --micro-batch {micro}")
    if s.recompute in ("norm_act", "experts") and s.precision != "fp8":
        raise InputError(f"--recompute {s.recompute} needs --precision fp8; none and full work with any")
    if s.master == "bf16" and s.optimizer == "adamw":
        raise InputError("--master bf16 needs --optimizer adamw8bit or muon: adamw rounds to the nearest, and stalls")
    if s.master == "bf16" and s.precision not in ("bf16", "fp8"):
        raise InputError("--master bf16 needs --precision bf16 or fp8")
    if s.step_in_backward:
        check_step_in_backward(s)
    if s.fp8_fallback and not s.fp8_watch:
        raise InputError(f"--fp8-fallback {s.fp8_fallback} needs measurements: give --fp8-watch")
    if s.seed >= 1 << 63:
        raise InputError(f"--seed {s.seed} is not below 2^63")
    if s.ramp and not (0 < s.ramp[0] <= s.batch and s.ramp[0] % micro == 0):
        raise InputError(f"--batch-ramp {s.batch_ramp}: START must lie between 1 and --batch {s.batch}"
                         f" and be a multiple of --micro-batch {micro}")  # fmt: skip


def check_step_in_backward(s: Settings) -> None:
    if s.micro_batch not in (None, s.batch):
        raise InputError(f"--step-in-backward uses up a gradient before a second micro batch can add to it:"
                         f" --batch {s.batch} is more than --micro-batch {s.micro_batch}")  # fmt: skip
    if s.clip or s.spike_norm:
        given = f"--clip {s.clip}" if s.clip else f"--spike-norm {s.spike_norm}"
        raise InputError(f"{given} needs the norm of all gradients, which --step-in-backward changes weights without:"
                         f" {'give --clip 0' if s.clip else 'leave it out'}")  # fmt: skip
