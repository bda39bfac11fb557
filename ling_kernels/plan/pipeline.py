"""python -m ling_kernels.plan pipeline: where a pipeline's bubbles and bytes are, and the layout and schedule for it.

Takes the flags of `python -m ling_kernels.train` besides those of the pipeline. Times are those of `plan train`, a
roofline; the step is simulated. --pipeline and --schedule say what to simulate; what is not given is searched for. With
--gpus instead of --pp the numbers of ranks, of data parallel processes and of those that share experts are, too.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

from ..commands import Parser, command
from ..errors import InputError, counted
from ..files import check_output, format_bytes
from ..gpu import HOPPER, VARIANTS, find_gpu
from ..model import LingConfig
from ..parallel.pipeline_layout import PipelineLayout
from ..parallel.schedules import SCHEDULES, read_csv, write_csv
from ..train.flags import add_flags
from ..train.prepare.models import model_config
from ..train.scaling import with_defaults
from ..train.settings import Settings, settings_of
from .measured import read_units
from .meshes import MeshPlan, best_meshes, mesh_lines, meshes_of
from .search import CHOICES, TRIES, Problem, Result, candidates, ranked, search
from .timeline import draw, find_matplotlib
from .train import span
from .train_time import NODE
from .units import Gpus, Unit, letters, predicted_units, transfer_seconds, with_measured

GPUS = {gpu.name: gpu for gpu in (*HOPPER.values(), *VARIANTS)}
MOST_ACTIONS = 1_000_000  # of a simulated step: some 10 s


@command
def main(argv: Sequence[str] | None = None) -> int:
    args = vars(parser().parse_args(argv))
    own = {name: args.pop(name) for name in OWN}
    options = argparse.Namespace(**own)
    for name in ("csv", "modules", "png"):
        if getattr(options, name) is not None:
            check_output(getattr(options, name), f"--{name}")
    if options.png is not None:
        find_matplotlib()
    if options.gpus is not None:
        plans = plan_meshes(args, options)
        problem, results = plans[0].problem, [plans[0].result]
        print(*mesh_lines(plans, options.gpus), "", sep="\n")
    else:
        problem = make_problem(args, options)
        results = solve(problem, options, options.tries)
    best = results[0]
    print(*report(problem, options, best), sep="\n")
    if len(results) > 1:
        print(*others(problem, results), sep="\n")
    if options.csv:
        try:
            write_csv(best.order, options.csv)
        except OSError as error:
            raise InputError(f"--csv {options.csv}: {error}") from None
    if options.modules:
        write(options.modules, json.dumps(best.layout.modules(), indent=1) + "\n")
    if options.png:
        draw({f"{best.schedule}, {best.layout}: {span(best.timeline.seconds)}": best.timeline}, options.png)
    return 0


def write(path: str, text: str) -> None:
    try:
        Path(path).write_text(text)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def parser() -> argparse.ArgumentParser:
    found = Parser("python -m ling_kernels.plan pipeline", description=__doc__.partition(": ")[2].split("\n\n")[0])
    found.add_argument(
        "--gpus", type=int, metavar="N",
        help="search --pp, --dp and --ep, too, for so many GPUs, for the shortest whole step that fits the memory",
    )  # fmt: skip
    found.add_argument("--pp", type=int, metavar="N", help="ranks of the pipeline")
    found.add_argument("--vpp", type=int, metavar="N", help="stages of each rank (default: 1 and 2 are tried)")
    found.add_argument("--dp", type=int, metavar="N", help="data-parallel GPUs, which share --batch (default: --ep)")
    found.add_argument("--ep", type=int, metavar="N", help="of them, GPUs that share experts (default: 1)")
    found.add_argument("--pipeline", metavar="LAYOUT", help="a layout such as Et|tt|tmL (default: a search)")
    found.add_argument("--schedule", metavar="NAME|FILE", help=f"{', '.join(CHOICES)}, or a CSV (default: the best)")
    found.add_argument("--gpu", default="H200", choices=GPUS, help="(default: H200)")
    found.add_argument("--memory", type=float, metavar="GB", help="of a GPU (default: the GPU's)")
    found.add_argument(
        "--profile-units", metavar="FILE",
        help="measured times of the units, by `plan units` with the same flags (default: predicted)",
    )  # fmt: skip
    found.add_argument(
        "--losses-together", action="store_true", help="all losses in the last stage, as Megatron's layouts have them"
    )
    found.add_argument("--tries", type=int, default=TRIES, metavar="N", help=f"moves of a search (default: {TRIES})")
    found.add_argument("--csv", metavar="FILE", help="write the order of actions for torch and torchtitan")
    found.add_argument(
        "--modules", metavar="FILE",
        help="write the modules of each stage, JSON for torchtitan, which has MTP layers and losses in the last stage,"
        " as the layout has then",
    )  # fmt: skip
    found.add_argument("--png", metavar="FILE", help="write a picture of the step")
    add_flags(found, without=(*OWN, *NOT_PLANNED))
    return found


OWN = ("gpus", "pp", "vpp", "dp", "ep", "pipeline", "schedule", "gpu", "memory", "profile_units", "losses_together",
       "tries", "csv", "modules", "png")  # fmt: skip
NOT_PLANNED = ("dp_replicate", "cp", "tp", "vocab_parallel", "exchange", "exchange_by_nodes", "dist_timeout")


def make_problem(flags: dict, options: argparse.Namespace) -> Problem:
    """The model, its units and the micro batches. Raises InputError for numbers that do not fit."""
    if options.pp is None:
        raise InputError("give --pp, the ranks of the pipeline, or --gpus, to search for it")
    config, settings = given(flags, options)
    ep = options.ep or 1
    return problem_of(config, settings, Gpus(options.dp or ep, ep, options.pp), options)


def given(flags: dict, options: argparse.Namespace) -> tuple[LingConfig, Settings]:
    """The model and the settings, with a micro batch. Raises InputError for numbers that are none."""
    for name in ("gpus", "pp", "vpp", "dp", "ep", "tries"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise InputError(f"--{name} {value}: it must be at least 1")
    if options.memory is not None and not 0 < options.memory < math.inf:
        raise InputError(f"--memory {options.memory}: GB of a GPU, more than 0")
    settings = settings_of(flags)
    config, weights = model_config(settings)
    settings, _ = with_defaults(settings, config, trained=weights is not None)
    return config, replace(settings, micro_batch=settings.micro_batch or 1)


def problem_of(
    config: LingConfig, settings: Settings, gpus: Gpus, options: argparse.Namespace,
    units: dict[str, Unit] | None = None,
) -> Problem:  # fmt: skip
    """units: of this model and ep, where they are there already. Raises InputError for numbers that do not fit."""
    micro = settings.micro_batch or 1
    if settings.batch % (gpus.dp * micro):
        raise InputError(f"--batch {settings.batch} is not a multiple of --dp {gpus.dp} x --micro-batch {micro}")
    if gpus.dp % gpus.ep:
        raise InputError(f"--ep {gpus.ep} does not divide --dp {gpus.dp}: GPUs that share experts take different rows")
    if config.num_experts % gpus.ep:
        raise InputError(f"--ep {gpus.ep} does not divide the {config.num_experts} experts of {settings.model}")
    gpu, number = GPUS[options.gpu], settings.batch // (gpus.dp * micro)
    if 6 * gpus.pp * (options.vpp or 2) * number > MOST_ACTIONS:
        raise InputError(f"--batch {settings.batch} on --dp {gpus.dp} is {number} micro batches, too many to simulate")
    units = units or predicted_units(config, settings, gpu, gpus.ep)
    measured_on = ""
    if options.profile_units is not None:
        measured, measured_on = read_units(options.profile_units, config, settings, gpus.ep, letters_of(config))
        units = with_measured(units, measured)
    seconds = transfer_seconds(config, settings, near=gpus.pp * gpus.dp <= NODE)
    memory = options.memory * 1e9 if options.memory else gpu.memory
    return Problem(config, settings, units, gpus, number, seconds, memory, measured_on)


def plan_meshes(flags: dict, options: argparse.Namespace) -> list[MeshPlan]:
    """The best plans of --gpus, each for its own --pp, --dp and --ep. Raises InputError where nothing fits."""
    names = [name for name in CHOICES if name in SCHEDULES]
    if options.schedule not in (None, *names):
        raise InputError(f"--schedule {options.schedule} with --gpus: it must be one of {', '.join(names)}")
    config, settings = given(flags, options)
    units = lru_cache(partial(predicted_units, config, settings, GPUS[options.gpu]))
    meshes = meshes_of(options.gpus, config, settings, pp=options.pp, dp=options.dp, ep=options.ep)
    problems = [problem_of(config, settings, mesh, options, units(mesh.ep)) for mesh in meshes]
    return best_meshes(problems, partial(solve, options=options), options.tries, GPUS[options.gpu])


def solve(problem: Problem, options: argparse.Namespace, tries: int) -> list[Result]:
    """The plans asked for, the best first. tries: moves of a search."""
    pp, name = problem.gpus.pp, options.schedule
    if name is not None and name not in CHOICES and not Path(name).exists():
        raise InputError(f"--schedule {name}: it must be one of {', '.join(CHOICES)}, or a file")
    order = read_csv(name) if name is not None and name not in CHOICES else None
    if options.pipeline is not None:
        layout = PipelineLayout.parse(options.pipeline)
        layout.check(problem.config, problem.settings.model)
        stages = len(layout.stages)
        if options.modules:
            layout.modules()  # raises InputError where there are none
        if options.vpp and stages != pp * options.vpp:
            raise InputError(f"--pipeline {layout}: {stages} stages are not --pp {pp} x --vpp {options.vpp}")
        if name is not None:
            return [problem.evaluate(layout, name, order)]
        layout.ranks(pp)
        wanted = schedules_for(pp, [stages // pp], options)
        return ranked(problem, [partial(problem.evaluate, layout, name) for name, _ in wanted])
    if order is not None:
        raise InputError(f"--schedule {name}: an order from a file needs its --pipeline")
    wanted = schedules_for(pp, [options.vpp] if options.vpp else [1, 2], options)
    if not wanted:
        raise InputError(f"--schedule {name} has another number of stages a rank than --vpp {options.vpp}")
    losses, mtp = problem.atoms.count("L"), problem.atoms.count("m")
    tail = losses + mtp if options.modules else losses if options.losses_together else 1
    return search(problem, wanted, tail, tries)


def schedules_for(pp: int, per_rank: Sequence[int], options: argparse.Namespace) -> list[tuple[str, int]]:
    """(schedule, stages) to try. With --gpus those that the trainer has by name, and on one rank no pipeline."""
    wanted = [pair for pair in candidates(pp, per_rank) if options.schedule in (None, pair[0])]
    if options.gpus is None:
        return wanted
    wanted = [pair for pair in wanted if pair[0] in SCHEDULES]
    return wanted if pp > 1 else [pair for pair in wanted if pair == ("1F1B", 1)]


def mfu(problem: Problem, seconds: float, gpu: str) -> float:
    s = problem.settings
    tokens = problem.micro_batches * s.micro_batch * s.seq_len
    return problem.config.flops_per_token(s.seq_len) * tokens / seconds / problem.gpus.pp / GPUS[gpu].bf16


def report(problem: Problem, options: argparse.Namespace, best: Result) -> list[str]:
    s, gpus, timeline = problem.settings, problem.gpus, best.timeline
    share = f"; MFU {100 * mfu(problem, timeline.seconds, options.gpu):.1f} %"
    if problem.measured_on and find_gpu(problem.measured_on.partition(",")[0]) != GPUS[options.gpu]:
        share = ""  # times of another device
    fits = "fits" if best.peak <= problem.memory else "does not fit"
    source = "Predicted, nothing measured."
    if problem.measured_on:
        source = f"Units measured on {problem.measured_on}; the rest predicted."
    size, idle = (
        f"{problem.config.num_parameters(mtp=True):,} parameters",
        f"{100 * timeline.bubble():.1f} % of it idle",
    )
    ranks = f"{counted(gpus.pp, 'rank')} x {counted(gpus.dp, 'GPU')}"
    micro_batches = counted(problem.micro_batches, "micro batch")
    lines = [
        f"Pipeline of {s.model}, {size}: {ranks} ({options.gpu}), ep {gpus.ep};",
        f"{micro_batches} of {s.micro_batch} x {s.seq_len} tokens. {source}",
        "",
        f"layout    {best.layout}",
        f"schedule  {best.schedule}",
        f"step      {span(timeline.seconds)}, {idle}{share}; without optimizer and sums over dp",
        f"memory    {format_bytes(best.peak)} on the fullest rank, with 6 GB for CUDA: {fits}"
        f" {format_bytes(problem.memory)}",
        "",
        f"{'rank':<6}{'parameters':>16}{'state':>12}{'activations':>13}{'idle':>8}  stages",
    ]  # fmt: skip
    for rank, usage in enumerate(best.usage):
        stages = ", ".join(
            f"{s} {best.layout.stages[s] or 'empty'}" for s, r in enumerate(best.ranks) if r == rank
        )  # fmt: skip
        number = usage.plain + usage.experts
        lines.append(
            f"{rank:<6}{number:>16,}{format_bytes(usage.state):>12}{format_bytes(usage.activations):>13}"
            f"{100 * timeline.bubble(rank):>6.1f} %  {stages}"
        )
    return lines + unit_lines(problem)


def unit_lines(problem: Problem) -> list[str]:
    """What the simulation takes each unit for."""
    lines = ["", f"{'unit, ms':<14}{'forward':>9}{'input':>9}{'weights':>9}{'exchange':>9}{'kept':>11}"]
    names = dict(E="E embedding", d="t, dense", t="t, MoE", m="m MTP", L="L, each loss")
    for kind, unit in problem.units.items():
        if kind in letters_of(problem.config):
            t = unit.times
            cells = (t.forward, t.input_gradient, t.weight_gradient, t.exchange + t.exchange_back)
            row = "".join(f"{1000 * x:>9.2f}" for x in cells)
            lines.append(f"{names[kind]:<14}{row}{format_bytes(unit.kept):>11}")
    return lines


def letters_of(config: LingConfig) -> set[str]:
    mtp = config.num_nextn_predict_layers
    whole = PipelineLayout(("E" + "t" * config.num_hidden_layers + "m" * mtp + "L",))
    return set(letters(whole, config)[0])


def others(problem: Problem, results: list[Result]) -> list[str]:
    lines = ["", f"{'tried':<24}{'step':>10}{'idle':>8}{'memory':>11}  layout"]
    for r in results:
        lines.append(
            f"{r.schedule:<24}{span(r.timeline.seconds):>10}{100 * r.timeline.bubble():>6.1f} %"
            f"{format_bytes(r.peak):>11}{' ' if r.peak <= problem.memory else '*'} {r.layout}"
        )  # fmt: skip
    return lines + ["* more than there is"] * any(r.peak > problem.memory for r in results)
