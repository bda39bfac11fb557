"""python -m ling_kernels.plan units: how long each unit of a pipeline takes on this machine, for `plan pipeline`.

Takes the flags of `python -m ling_kernels.train` that say what a unit computes. Weights and rows are random, so the
load of the experts is near to even. What travels between GPUs is not measured.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from ..commands import Parser, command
from ..errors import InputError
from ..files import atomic_write, check_output, read_json
from ..model import Ling, LingConfig
from ..nn import BatchLayout, Experts, MoE
from ..nn.linear import head_loss
from ..ops.deferred import deferring
from ..parallel.deferred import defer_linear_
from ..parallel.exchange import AllToAll, Sizes
from ..parallel.official import whole_on_meta
from ..train.building import apply_fp8_and_recompute
from ..train.flags import add_flags
from ..train.optimizer import to_masters
from ..train.prepare.checks import check
from ..train.prepare.device import choose_device
from ..train.prepare.models import model_config
from ..train.scaling import with_defaults
from ..train.settings import Settings, settings_of
from .simulate import Times

WARM_UP, REPEATS = 2, 5
PARTS = ("forward", "input_gradient", "weight_gradient")
NOT_UNITS = ("dp", "dp_replicate", "pp", "pipeline", "schedule", "cp", "tp", "vocab_parallel", "exchange",
             "exchange_by_nodes", "dist_timeout")  # fmt: skip
# What changes no unit's time: the number of layers, and fields without arithmetic.
ANY_VALUE = ("num_hidden_layers", "first_k_dense_replace", "num_nextn_predict_layers", "mtp_loss_scaling_factor",
             "rms_norm_eps", "rope_theta", "rope_scaling", "max_position_embeddings", "initializer_range",
             "pad_token_id", "eos_token_id", "routed_scaling_factor", "other")  # fmt: skip
SETTINGS = ("micro_batch", "seq_len", "precision", "master", "recompute", "recompute_mtp", "fp8_wgrad", "fp8_weights",
            "fp8_transposed", "fp8_scales")  # fmt: skip


@command
def main(argv: Sequence[str] | None = None) -> int:
    found = Parser("python -m ling_kernels.plan units", description=__doc__.partition(": ")[2])
    found.add_argument("--out", required=True, metavar="FILE", help="write the times as JSON")
    add_flags(found, without=NOT_UNITS)
    flags = vars(found.parse_args(argv))
    out, settings = check_output(flags.pop("out"), "--out"), settings_of(flags)
    config, weights = model_config(settings)
    settings, _ = with_defaults(settings, config, trained=weights is not None)
    ep, micro = settings.ep, settings.micro_batch or 1
    settings = replace(settings, micro_batch=micro, batch=micro)
    check(settings, config)
    if config.num_experts % ep:
        raise InputError(f"--ep {ep} does not divide the {config.num_experts} experts of {settings.model}")
    device, name, precision = choose_device(settings)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    units = {kind: t._asdict() for kind, t in measure(config, settings, ep, device, precision).items()}
    content = dict(device=name, computed_in=str(precision)[6:], of=described(config, settings, ep), units=units)
    print(f"{'unit, ms':<10}{'forward':>10}{'input':>10}{'weights':>10}   on {name}, {content['computed_in']}")
    for kind, times in units.items():
        print(f"{kind:<10}" + "".join(f"{1000 * times[part]:>10.3f}" for part in PARTS))
    try:
        with atomic_write(out) as file:
            file.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"--out {out}: {error.strerror}") from None
    return 0


def described(c: LingConfig, s: Settings, ep: int) -> dict:
    """What the units compute."""
    sizes = {name: value for name, value in asdict(c).items() if name not in ANY_VALUE}
    return sizes | {name: getattr(s, name) for name in SETTINGS} | dict(ep=ep)


class SameDevice(AllToAll):
    """The exchange of a MoE layer with 1 / ep of its experts, where each gets the rows of ep experts, as many rows as
    it would from ep GPUs with an even load. Nothing travels."""

    def __init__(self, moe: MoE, ep: int):
        self.moe, self.ep, self.fp8 = moe, ep, False

    def received(self, experts: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Sizes]:
        here, rows = len(counts) // self.ep, experts.numel()
        owners = torch.arange(here, dtype=torch.int32, device=counts.device).repeat(self.ep)
        owners = owners.repeat_interleave(counts, output_size=rows)
        return owners[:, None], counts.view(self.ep, here).sum(0).int(), ([rows], [rows])

    def send(self, rows: Tensor, sizes: Sizes) -> Tensor:
        return rows


def small_model(c: LingConfig, s: Settings, ep: int, device: torch.device) -> Ling:
    """A model with one layer of each kind, as a pipeline whose backward is in two parts has it."""
    dense, moe = min(c.first_k_dense_replace, 1), min(c.num_hidden_layers - c.first_k_dense_replace, 1)
    mtp = min(c.num_nextn_predict_layers, 1)
    model = whole_on_meta(replace(
        c, num_hidden_layers=dense + moe, first_k_dense_replace=dense, num_nextn_predict_layers=mtp
    ))  # fmt: skip
    for module in [m for m in model.modules() if isinstance(m, MoE)] if ep > 1 else []:
        with torch.device("meta"):
            module.experts = Experts(c.num_experts // ep, c.hidden_size, c.moe_intermediate_size)
        module.exchange = SameDevice(module, ep)  # type: ignore[assignment]
    to_masters(model, s.master)
    model.to_empty(device=device)
    model.init_weights()
    apply_fp8_and_recompute(model, s)
    for module in (*model.layers, *model.mtp):
        defer_linear_(module)
    return model.train()


def measure(
    c: LingConfig, s: Settings, ep: int, device: torch.device, precision: torch.dtype
) -> dict[str, Times]:  # fmt: skip
    """{letter: seconds} of the units that a model has, medians. s.micro_batch: rows of a micro batch."""
    model, micro = small_model(c, s, ep, device), s.micro_batch or 1
    ids = torch.randint(0, c.vocab_size, (micro, s.seq_len), device=device)
    batch = model.pack(ids, None, s.seq_len * torch.arange(micro + 1, dtype=torch.int32, device=device))
    rows = BatchLayout(model.cos, model.sin, batch.positions, batch.cu_seqlens)
    x = torch.randn(len(batch.ids), c.hidden_size, device=device, dtype=model.word_embeddings.weight.dtype)
    x.requires_grad_()
    dense = model.config.first_k_dense_replace
    calls: dict[str, Callable[[], Sequence[Tensor | None]]] = dict(E=lambda: [model.word_embeddings(batch.ids)])
    if dense:
        calls["d"] = lambda: model.layers[0](x, rows, None, s.z_loss)
    if len(model.layers) > dense:
        calls["t"] = lambda: model.layers[-1](x, rows, None, s.z_loss)
    if model.mtp:
        calls["m"] = lambda: model.mtp[0](model.next_embeddings(batch, 1), x, rows, s.z_loss)
    calls["L"] = lambda: [head_loss(model.lm_head, x, batch.ids)]
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16)

    def once(call: Callable[[], Sequence[Tensor | None]]) -> Iterator[float]:
        """Seconds of each of PARTS."""
        x.grad, later = None, []
        begin = now(device)
        with autocast:
            outputs = [t for t in call() if t is not None]
        yield now(device) - begin
        gradients = [torch.randn_like(t) if t.ndim else None for t in outputs]
        begin = now(device)
        with deferring(later):
            torch.autograd.backward(outputs, gradients)
        yield (backward := now(device)) - begin
        for gradient in later:
            gradient()
        yield now(device) - backward

    found = {}
    for kind, call in calls.items():
        samples = [[*once(call)] for _ in range(WARM_UP + REPEATS)][WARM_UP:]
        found[kind] = Times(*(median(column) for column in zip(*samples, strict=True)))
    return found


def now(device: torch.device) -> float:
    """Seconds, when the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def read_units(path: str, c: LingConfig, s: Settings, ep: int, kinds: set[str]) -> tuple[dict[str, Times], str]:
    """{letter: seconds} from a file of `plan units`, and where they were measured. Raises InputError for a file that is
    none, or not of these units."""
    name, content = f"--profile-units {path}", read_json(Path(path))
    of, units, where = (content.get(key) for key in ("of", "units", "device"))
    if not isinstance(of, dict) or not isinstance(units, dict) or not isinstance(where, str):
        raise InputError(f"{name}: it is no file of `plan units`")
    for key, value in described(c, s, ep).items():
        if of.get(key) != value:
            raise InputError(f"{name}: it is of {key} {of.get(key)}, and this plan of {value}")
    if missing := sorted(kinds - units.keys()):
        raise InputError(f"{name}: it has no times of {', '.join(missing)}; measure a model that has them")
    found = {}
    for kind in kinds:
        times = [units[kind].get(part) if isinstance(units[kind], dict) else None for part in PARTS]
        if not all(type(t) in (int, float) and 0 <= t < math.inf for t in times):
            raise InputError(f"{name}: the times of {kind} are no seconds")
        found[kind] = Times(*times)
    return found, f"{where}, {content.get('computed_in')}"
