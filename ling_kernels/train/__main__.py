"""`python -m ling_kernels.train`: check what was asked, train, and show what came of it."""

import argparse
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode

from ..errors import InputError, Parser, command
from ..model import Ling, LingConfig, load_model, save_model
from ..nn.fp8 import to_fp8
from ..tokenizer import Tokenizer
from . import checkpoint as ckpt
from .data import Documents, Packed, gather_tokens, hold_out
from .layout import ALONE, Layout, Rank
from .loop import Diverged, Progress, train
from .optimizer import make_optimizer, to_masters
from .pictures import draw
from .plan import Plan, plan, size
from .prepare import Job, deterministic, discard, prepare, settings_model
from .report import Report
from .safeguards import to_bf16
from .settings import PRESETS, Settings, add_flags, check, settings_of, to_json
from .speed import peak_flops

PROMPT = 24  # tokens of a held-out document that the sample at the end goes on from
TEMPERATURE = 0.8


@command
def main(argv: Sequence[str] | None = None) -> int:
    try:
        with deterministic():
            given = vars(parser().parse_args(argv))
            layout = given.pop("layout")
            if given.pop("plan"):
                return show_plan(given, Layout() if layout is None else Layout.parse(layout))
            if layout is not None:
                raise InputError(f"--layout {layout} is for --plan: training is on one GPU")
            return run(given)
    except KeyboardInterrupt:
        print("stopped before the first step; nothing was trained", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError as error:
        why = str(error).split(". ")[0]
        print(f"error: the GPU's memory is full, a smaller --micro-batch needs less: {why}", file=sys.stderr)
        return 1


def parser() -> Parser:
    flags = Parser("python -m ling_kernels.train", description="Train a Ling-2.0 model on one device.")
    flags.add_argument("--out", type=Path, help="folder of a new run (default: runs/MODEL-DATE-TIME)")
    flags.add_argument(
        "--resume",
        metavar="RUN",
        help="a run, to go on from its latest checkpoint; or one of its checkpoints; or auto: the run in --out, or else"
        " the latest of the model, or a new one where there is none (default: a new run)",
    )
    flags.add_argument(
        "--preset", choices=PRESETS, help="what other flags are, unless given themselves: "
        + "; ".join(f"{name}: {as_flags(values)}" for name, values in PRESETS.items()), default=argparse.SUPPRESS,
    )  # fmt: skip
    flags.add_argument("--plan", action="store_true", help="print what the run takes of a GPU's memory, and stop")
    flags.add_argument(
        "--layout",
        metavar="dp=N,ep=N,pp=N,zero=N",
        help="with --plan, what it would take of each GPU, were there dp times pp: dp data parallel, among them ep that"
        " share the experts, pp pipeline stages, zero 0 to 3 for what is sharded (default: one GPU)",
    )
    add_flags(flags)
    return flags


def as_flags(values: dict) -> str:
    return " ".join(f"--{k.replace('_', '-')} {v}" for k, v in values.items())


def run(given: dict) -> int:
    job = prepare(given)
    folder, settings = job.folder, job.settings
    try:
        docs = gather_tokens(settings.data, job.tokenizer, job.config.vocab_size, job.tokens, settings.text_field)
        training, held_out = hold_out(docs, settings.holdout)
        if job.state and job.state["data"] != describe(docs):
            raise InputError(f"data: {describe(docs)} is not what the run began with, {job.state['data']}")
        model = make_model(job)
        lightened = lighten(model, settings)
    except BaseException:  # Ctrl-C included
        discard(job)
        raise
    optimizer = make_optimizer(model, settings.optimizer, settings.lr, settings.weight_decay, settings.seed)
    progress = Progress()
    if job.checkpoint:
        ckpt.restore(job.checkpoint, model, optimizer)
        progress = Progress(**{name: job.state[name] for name in asdict(progress) if name in job.state})
        for name in progress.in_bf16:
            to_bf16(model, name)
        for path in ckpt.set_aside_later(folder, job.checkpoint):
            print(f"a later checkpoint is kept as {path.name}")

    peak, source = peak_flops(job.device, job.precision)
    introduce(job, model, training, held_out, progress, f"{peak / 1e12:.4g} TFLOP/s ({source})")
    print(*lightened, sep="\n", end="\n" if lightened else "", flush=True)
    report = Report(folder, progress.step, settings.steps, settings.log_every)

    def save(progress: Progress) -> None:
        state = asdict(progress) | dict(settings=to_json(settings), data=describe(docs), torch=torch.__version__)
        ckpt.save_checkpoint(folder, model, optimizer, job.tokenizer, state, settings.keep)

    packed = Packed(training, settings.seq_len, settings.seed)
    validation = validation_batches(held_out, settings)
    try:
        stopped = train(model, optimizer, packed, validation, settings, progress, report, save, job.precision, peak)
    except Diverged as error:
        last = ckpt.list_checkpoints(folder)
        back = f"the last checkpoint is {last[-1]}" if last else "there is no checkpoint yet"
        print(f"error: {error}; a lower --lr may help; {back}", file=sys.stderr)
        return 1
    finally:
        report.close()
    if stopped:
        print(f"stopped by {stopped} after step {progress.step}; go on with")
        print(f"    {python('train')} --resume {shlex.quote(shown(folder))}")
        return 0
    conclude(job, model, held_out)
    return 0


def describe(docs: Documents) -> dict:
    """What a resumed run compares its data with."""
    return dict(tokens=docs.tokens, documents=len(docs), checksum=docs.checksum)


def make_model(job: Job) -> Ling:
    """The model with its masters, in training mode: from the checkpoint, the model's directory, or random."""
    if job.checkpoint or job.source:
        model = load_model(job.checkpoint or job.source, dtype=torch.float32, device=job.device)
    else:
        model = Ling(job.config)
        model.init_weights(torch.Generator().manual_seed(job.settings.seed))  # on the CPU: the same on every device
        to_masters(model, job.settings.master)  # before it takes the GPU's memory
        model.to(job.device)
    to_masters(model, job.settings.master)
    torch.manual_seed(job.settings.seed)
    return model.train()


def lighten(model: Ling, s: Settings) -> list[str]:
    """FP8 layers and recomputation as asked; lines that say what became of them."""
    said = []
    if s.precision == "fp8":
        made, left = to_fp8(
            model, s.recompute, wgrad=s.fp8_wgrad, transposed=s.fp8_transposed, weights=s.fp8_weights,
            pow2=s.fp8_scales == "pow2",
        )  # fmt: skip
        kinds = dict.fromkeys(re.sub(r"\b\d+\.", "*.", name) for name in left)
        rest = f"; in bf16, their sizes being no multiples of 128: {'; '.join(kinds)}" if left else ""
        said.append(f"fp8        {len(made)} of {len(made) + len(left)} layers{rest}")
    elif s.fp8_watch:
        said.append("fp8        none of the layers: --fp8-watch has nothing to measure")
    if s.recompute == "full":
        model.recompute_()
    return said


def show_plan(given: dict, layout: Layout) -> int:
    """Of a new run on a GPU, whatever this machine has; of the GPU that has most to hold, where there are several."""
    if given.pop("resume", None):
        raise InputError("--plan is of a new run: it needs no --resume")
    given.pop("out", None)
    settings = settings_of(given)
    config, _ = settings_model(settings, None)
    check(settings, config)
    settings, one = layout.of_rank(settings, config), layout == Layout()
    where = "on one GPU" if one else f"on the fullest of {layout.dp * layout.pp} GPUs: {layout}"
    print(f"Memory of a step: {settings.model}, {config.num_parameters(mtp=True):,} parameters, {where}")
    plans = {stage: make_plan(config, settings, Rank(layout, stage)) for stage in layout.stages(config)}
    stage = max(plans, key=lambda stage: plans[stage].peak)
    print(*plans[stage].lines(settings, layout.part(config, stage), Rank(layout, stage)), sep="\n")
    if not one:
        print(*layout_lines(config, settings, layout, stage, plans), sep="\n")
    return 0


def layout_lines(config: LingConfig, settings: Settings, layout: Layout, stage: int, plans: dict[int, Plan]) -> list:
    """The stages, what an uneven load of experts would add, and that nobody can train so yet."""
    said, number = [], settings.batch // (settings.micro_batch or settings.batch)
    if layout.pp > 1:
        stages = ", ".join(
            f"{i + 1} {size(plan.peak)} ({Rank(layout, i).in_flight(number)} in flight)" for i, plan in plans.items()
        )
        said.append(f"{'stages':<12}  {stages}; this is stage {stage + 1}; equal ones have fewer in flight")
    if layout.ep > 1:
        worst = make_plan(config, settings, Rank(layout, stage, worst=True)).peak
        said.append(f"{'experts':<12}  with an even load; {size(worst)} if every token takes all it can from this GPU")
    return [*said, f"{'planned':<12}  this package trains on one GPU"]


def make_plan(config: LingConfig, settings: Settings, rank: Rank = ALONE) -> Plan:
    with FakeTensorMode():
        model = rank.model(config)
        to_masters(model, settings.master)
        lighten(model, settings)
        return plan(model.train(), settings, rank)


def validation_batches(held_out: Documents, settings: Settings) -> list:
    """At most eval_rows rows of the held-out documents, evenly spaced, always the same."""
    there = max(held_out.tokens // settings.seq_len, 1)
    number = min(settings.eval_rows, there)
    rows = [i * there // number for i in range(number)]
    size = settings.micro_batch or settings.batch
    packed = Packed(held_out, settings.seq_len, None)
    return [packed.batch(rows[i : i + size]) for i in range(0, number, size)]


def introduce(job: Job, model: Ling, training: Documents, held_out: Documents, progress: Progress, peak: str) -> None:
    s, total = job.settings, sum(p.numel() for p in model.parameters())
    active = job.config.num_active_parameters()
    print(f"model      {s.model}: {total:,} parameters, {active:,} active in a token")
    print(
        f"data       {training.tokens:,} tokens of {len(training):,} documents,"
        f" {held_out.tokens:,} of {len(held_out):,} held out"
    )
    print(f"device     {job.device_name}, {str(job.precision)[6:]}, {peak}")
    print(f"run        {shown(job.folder)}, steps {progress.step + 1} to {s.steps}", flush=True)


def conclude(job: Job, model: Ling, held_out: Documents) -> None:
    """Export, draw, generate, and say where everything lies."""
    folder = job.folder
    if job.device.type == "cuda":
        peak, planned = torch.cuda.max_memory_allocated(job.device), make_plan(job.config, job.settings).peak
        print(f"memory     {peak / 1e9:.2f} GB at the peak, {planned / 1e9:.2f} planned")
    save_model(model, folder / "model")
    job.tokenizer.save(folder / "model")
    layers = [str(i) for i in range(job.config.first_k_dense_replace, job.config.num_hidden_layers)]
    layers += [f"MTP {k}" for k in range(1, job.config.num_nextn_predict_layers + 1)]
    pictures = draw(folder, [f"layer {name}" if name.isdecimal() else name for name in layers])
    if job.settings.sample_tokens:
        prompt, text = sample(model, job.tokenizer, held_out, job.settings)
        print(f"\nA sample that goes on from {prompt!r}:\n{text}\n")
    print(f"checkpoint {shown(ckpt.list_checkpoints(folder)[-1])}")
    print(f"model      {shown(folder / 'model')}")
    for path in pictures:
        print(f"picture    {shown(path)}")
    if not pictures:
        print("picture    none: matplotlib is missing (pip install ling_kernels[train])")
    print(f"\n{python('generate')} --model {shlex.quote(shown(folder / 'model'))} --prompt 'The '")


def sample(model: Ling, tokenizer: Tokenizer, held_out: Documents, settings: Settings) -> tuple[str, str]:
    """The beginning of a held-out document, and what the model makes of it."""
    generator = torch.Generator().manual_seed(settings.seed)

    def choose(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        chances = (logits.float().cpu() / TEMPERATURE).softmax(-1)
        return torch.multinomial(chances, 1, generator=generator)[:, 0].to(logits.device)

    prompt = [int(i) for i in held_out[0][:PROMPT] if i != tokenizer.eos_id]
    ids = torch.tensor([prompt], device=next(model.parameters()).device)
    new = min(settings.sample_tokens, model.config.max_positions - len(prompt))
    model.eval()
    tokens = [int(t) for t in model.stream(ids, new, choose=choose, eos_token_id=tokenizer.eos_id)]
    return tokenizer.decode(prompt), tokenizer.decode([t for t in tokens if t != tokenizer.eos_id])


def python(module: str) -> str:
    return f"{shown(Path(sys.executable))} -m ling_kernels.{module}"


def shown(path: Path) -> str:
    """Relative to where the user stands, when it lies below."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


if __name__ == "__main__":
    sys.exit(main())
