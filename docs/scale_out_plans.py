"""Writes docs/scale-out-plans.md and .png, plans of pipelines and clusters. `python docs/scale_out_plans.py`: minutes.

The figures are in benchmarks/results/scale_out_plans.json. tests/test_scale_out_plans.py compares the page with them,
and some of them with a fresh simulation.
"""

import json
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from ling_kernels.gpu import HOPPER  # noqa: E402
from ling_kernels.model import LingConfig  # noqa: E402
from ling_kernels.parallel.pipeline_layout import PipelineLayout  # noqa: E402
from ling_kernels.plan.cluster import ASSUMPTIONS, CLUSTERS, Software, cluster_units, plan_step, recipe  # noqa: E402
from ling_kernels.plan.search import Problem, candidates, search  # noqa: E402
from ling_kernels.plan.simulate import Times  # noqa: E402
from ling_kernels.plan.timeline import draw  # noqa: E402
from ling_kernels.plan.units import Gpus, Unit, predicted_units, transfer_seconds  # noqa: E402
from ling_kernels.train.settings import Settings  # noqa: E402

RESULTS = ROOT / "benchmarks/results/scale_out_plans.json"
PAGE = Path(__file__).with_name("scale-out-plans.md")
PICTURE = PAGE.with_suffix(".png")
ONE_T = replace(LingConfig.one_t(), num_nextn_predict_layers=1)
USUAL = "Interleaved1F1B"
STEPS = {  # how layouts get freer: (units that stay together at the end)
    "layers evenly, MTP and losses in the last stage": None,
    "uneven stages": 3,
    "and the MTP layer apart from the losses": 2,
    "and each loss apart": 1,
}
BEST = "and the best schedule"
TRIES = 80  # moves of each search, which begins with even loads
LADDER = (  # the report's order: figure 14, with its MFU
    ("FP8 and MTP, even stages", 16.9, 0, Software(exchange=0.4, passes=2.0, fast=False)),
    ("heterogeneous pipeline", 23.8, 2, Software(exchange=0.4, passes=2.0, fast=False)),
    ("DeepEP within the node", 27.1, 2, Software(passes=2.0, fast=False)),
    ("fused kernels", 29.4, 2, Software(fast=False)),
    ("fast recomputation of experts", 31.4, 2, Software()),
)


@dataclass(frozen=True)
class Case:
    title: str
    about: str
    config: LingConfig
    settings: Settings
    gpus: Gpus
    micro_batches: int
    even: str  # the layout to begin with
    ratios: bool = False  # whether the report's ratios of times are tried, too

    def problem(self, units: dict[str, Unit]) -> Problem:
        seconds = transfer_seconds(self.config, self.settings, near=self.gpus.dp * self.gpus.pp <= 8)
        return Problem(self.config, self.settings, units, self.gpus, self.micro_batches, seconds)

    def units(self) -> dict[str, Unit]:
        return predicted_units(self.config, self.settings, HOPPER["H100"], self.gpus.ep)


def settings(name: str, precision: str, recompute: str) -> Settings:
    return Settings(model=name, mtp=1, seq_len=4096, batch=1, micro_batch=1, precision=precision, recompute=recompute)


CASES = {
    "mini": Case(
        "Ling-mini on 4 ranks",
        "20 layers, the first dense, and an MTP layer; bf16, nothing recomputed; 2 stages a rank; 32 micro batches.",
        replace(LingConfig.mini(), num_nextn_predict_layers=1), settings("mini", "bf16", "none"), Gpus(pp=4), 32,
        "Ettt|ttt|ttt|ttt|tt|tt|tt|ttmL",
    ),
    "figure 18": Case(
        "The report's figure 18",
        "3 dense layers, 15 MoE layers and an MTP layer on 5 ranks with 4 stages each; layers as Ling-1T's, FP8, whole"
        " layers recomputed, ep 8; 40 micro batches, which the report does not give.",
        replace(ONE_T, num_hidden_layers=18, first_k_dense_replace=3), settings("1t", "fp8", "full"),
        Gpus(dp=8, ep=8, pp=5), 40, "Et|(t|)*17|mL", ratios=True,
    ),
    "1t": Case(
        "Ling-1T on 21 ranks",
        "80 layers, 4 of them dense, and an MTP layer; 2 stages a rank; 2016 GPUs, ep 8 and dp 96; FP8, whole layers"
        " recomputed; a batch of 18144 rows, so 189 micro batches.",
        ONE_T, settings("1t", "fp8", "full"), Gpus(dp=96, ep=8, pp=21), 189, "Et|t|(tt|)*39mL", ratios=True,
    ),
}  # fmt: skip


def with_ratios(units: dict[str, Unit]) -> dict[str, Unit]:
    """The report's ratios: a dense layer half a MoE layer, an MTP layer and its loss 1.7 of them; a head's backward
    takes twice its forward."""
    moe, third = units["t"].times, 0.7 * units["t"].times.total / 3
    half = Times(*(x / 2 for x in moe))
    changed = dict(d=half, t=moe, m=moe, L=Times(third, third, third))
    return {kind: unit._replace(times=changed.get(kind, unit.times)) for kind, unit in units.items()}


def plans(case: Case, units: dict[str, Unit], tries: int = TRIES) -> list[dict]:
    """Search the layouts of one case: a row for each of STEPS, and the best schedule."""
    problem, rows = case.problem(units), []
    stages = len(PipelineLayout.parse(case.even).stages)
    for label, tail in STEPS.items():
        layout = PipelineLayout.parse(case.even)
        if tail is not None:
            layout = problem.search_layout(USUAL, stages, tail, tries)
        rows.append(row(label, problem, layout, USUAL))
        if len(rows) > 1 and rows[-1]["seconds"] > rows[-2]["seconds"]:  # what was possible before still is
            rows[-1] = rows[-2] | dict(label=label)
    best = search(problem, candidates(case.gpus.pp, [stages // case.gpus.pp]), tries=tries)[0]
    return [*rows, row(BEST, problem, best.layout, best.schedule)]


def row(label: str, problem: Problem, layout: PipelineLayout, schedule: str) -> dict:
    result = problem.evaluate(layout, schedule)
    return dict(
        label=label, schedule=schedule, layout=str(layout), seconds=result.timeline.seconds,
        idle=result.timeline.bubble(), bytes=result.peak,
    )  # fmt: skip


def ladder(layouts: list[str], units: dict[str, Unit]) -> list[dict]:
    gpus, s = CASES["1t"].gpus, recipe(ONE_T, 18144)
    steps = [
        plan_step(ONE_T, s, CLUSTERS[0], gpus, PipelineLayout.parse(layouts[i]), USUAL, software, units)
        for _, _, i, software in LADDER
    ]
    return [step._asdict() for step in steps]


def clusters(schedule: str, units: dict[str, Unit]) -> list[dict]:
    """A step on each cluster, with a layout searched for its own times and memory."""
    case, s, found = CASES["1t"], recipe(ONE_T, 18144), []
    for cluster in CLUSTERS:
        own = cluster_units(ONE_T, s, cluster, case.gpus.ep, Software(), units)
        problem = replace(case.problem(own), memory=cluster.gpu.memory)
        layout = problem.search_layout(schedule, 2 * case.gpus.pp, tries=TRIES)
        step = plan_step(ONE_T, s, cluster, case.gpus, layout, schedule, units=units)
        found.append(step._asdict() | dict(layout=str(layout), schedule=schedule))
    return found


def results() -> dict:
    found: dict = dict(cases={}, ratios={})
    for name, case in CASES.items():
        units = case.units()
        found["cases"][name] = plans(case, units)
        if case.ratios:
            found["ratios"][name] = plans(case, with_ratios(units))
    one = found["cases"]["1t"]
    return found | dict(ladder=ladder([r["layout"] for r in one], units), clusters=clusters(one[-1]["schedule"], units))


def short(layout: str) -> str:
    """A layout with repeated stages as Megatron writes them: (tt|)*3."""
    out, stages = [], layout.split("|")
    while stages:
        n = next((i for i, s in enumerate(stages) if s != stages[0]), len(stages))
        last = n == len(stages)
        n = n - last  # the last stage has no | after it
        out.append(f"({stages[0]}|)*{n}" if n > 2 else f"{stages[0]}|" * n)
        stages = stages[n:]
        if last:
            out.append(stages.pop())
    return "".join(out)


def code(layout: str) -> str:
    """A layout in a cell of a table."""
    return "`" + short(layout).replace("|", "\\|") + "`"


def table(rows: list[dict]) -> list[str]:
    lines = ["| layout | step | faster | idle | fullest GPU |", "|---|---|---|---|---|"]
    for r in rows:
        schedule = f", {r['schedule']}" if r["label"] == BEST else ""
        lines.append(
            f"| {r['label']}{schedule}<br>{code(r['layout'])} | {r['seconds']:.2f} s |"
            f" {rows[0]['seconds'] / r['seconds']:.2f} x | {100 * r['idle']:.1f} % | {r['bytes'] / 1e9:.0f} GB |"
        )
    return lines


def paragraph(text: str) -> list[str]:
    return [*textwrap.wrap(" ".join(text.split()), 118, break_long_words=False, break_on_hyphens=False), ""]


def page(found: dict) -> str:
    lines = ["# Plans for scaling out", ""]
    lines += paragraph("""Predictions of `ling_kernels.plan`; nothing on this page is measured. `python
        docs/scale_out_plans.py` writes it, the picture and `benchmarks/results/scale_out_plans.json`. `python -m
        ling_kernels.plan pipeline --help` says how to plan a run of your own.""")
    lines += paragraph(f"""A step is simulated: an action begins when its rank is free and what it needs has arrived.
        Times of a layer are those of `plan train`, a roofline for an H100; they leave out the host, uneven experts and
        slow GPUs. The head computes its gradients in the forward, as `linear_cross_entropy` does. Steps leave out the
        optimizer and the sums over data-parallel ranks, except for clusters. Layouts are Megatron's; beyond its
        grammar several L put each loss into its own stage. The schedule is {USUAL} but in the last row of a
        table. Memory is not limited here.""")
    for name, case in CASES.items():
        lines += [f"## {case.title}", "", *paragraph(case.about), *table(found["cases"][name]), ""]
        if name in found["ratios"]:
            lines += paragraph("""The same with the report's ratios: a dense layer takes half of a MoE layer's time, an
                MTP layer and its loss 1.7 times of it.""")
            lines += [*table(found["ratios"][name]), ""]
        if name == "figure 18":
            lines += [f"![The step of figure 18: even stages, the MTP layer apart, the best]({PICTURE.name})", ""]
    return "\n".join([*lines, *explained(found), *cluster_lines(found)]) + "\n"


def explained(found: dict) -> list[str]:
    def gain(rows: list[dict], i: int) -> str:
        return f"{rows[0]['seconds'] / rows[i]['seconds']:.2f}"

    one, ratio, figure = found["cases"]["1t"], found["ratios"]["1t"], found["cases"]["figure 18"]
    mini = found["cases"]["mini"]
    return [
        "## What of the published 40 % this explains",
        "",
        *paragraph(f"""The report (arXiv 2510.22115, 5.2) gives 16.9 % MFU before its heterogeneous pipeline and 23.8 %
            after, 1.41 times as much. It publishes neither layout. From an even layout with MTP and losses in the last
            stage, uneven stages with the MTP layer apart make Ling-1T {gain(one, 2)} times faster with roofline times,
            {gain(ratio, 2)} times with the report's ratios, and figure 18's model {gain(figure, 2)} times. So the size
            of the gain follows from the layout before, which is not known. What this model leaves out may explain the
            rest: the host's time, experts' uneven loads, memory that a better balance frees for less recomputation, and
            MTP's logits, which the report no longer recomputes."""),
        *paragraph(f"""The losses unbalance a pipeline most in a small model with a large vocabulary: for Ling-mini a
            stage of its own for each loss turns {gain(mini, 2)} times into {gain(mini, 3)} times."""),
    ]


def ladder_gains(found: dict) -> list[tuple[float, float]]:
    """(published, predicted) of each rung over the one before."""
    mfu = [(published, step["mfu"]) for (_, published, *_), step in zip(LADDER, found["ladder"], strict=True)]
    return [(a[0] / b[0], a[1] / b[1]) for a, b in zip(mfu[1:], mfu[:-1], strict=True)]


def cluster_lines(found: dict) -> list[str]:
    rungs = ["| | published MFU | predicted MFU | step | published gain | predicted gain |", "|---" * 6 + "|"]
    pipeline, deep_ep, *_ = ladder_gains(found)
    gains = [("", ""), *((f"{a:.2f} x", f"{b:.2f} x") for a, b in ladder_gains(found))]
    for (label, published, *_), step, gain in zip(LADDER, found["ladder"], gains, strict=True):
        cells = label, f"{published} %", f"{100 * step['mfu']:.1f} %", f"{step['seconds']:.1f} s", *gain
        rungs.append(f"| {' | '.join(cells)} |")
    rows = ["| 2016 GPUs | layout | step | tokens/s | MFU | idle | NVLink | network | fullest GPU |", "|---" * 9 + "|"]
    for cluster, step in zip(CLUSTERS, found["clusters"], strict=True):
        over = ", too much" * (step["memory"] > cluster.gpu.memory)
        tokens, gpu = 18144 * 4096 / step["seconds"], f"{cluster.name}, {cluster.gpu.memory / 1e9:.0f} GB"
        rows.append(
            f"| {gpu} | {code(step['layout'])} | {step['seconds']:.1f} s | {tokens / 1e6:.2f} M |"
            f" {100 * step['mfu']:.1f} % | {100 * step['idle']:.1f} % | {step['nvlink'] / 1e9:.0f} GB |"
            f" {step['network'] / 1e9:.0f} GB | {step['memory'] / 1e9:.0f} GB{over} |"
        )
    return [
        "## Ling-1T on 2016 H800: the report's ladder",
        "",
        *paragraph("""The order of the report's figure 14, each rung with the ones before. MFU is of the bf16 peak. A
            real step is slower: compare the gains, not the levels."""),
        *paragraph(f"""The order of the gains is not reproduced. The largest published one is the pipeline's,
            {pipeline[0]:.2f} times, predicted as {pipeline[1]:.2f}; the largest predicted one is DeepEP's,
            {deep_ep[1]:.2f} times, published as {deep_ep[0]:.2f}. So an assumption below, or the unpublished layout
            before, is not theirs, and this model does not say which of these rungs gains most."""),
        *rungs,
        "",
        "## Ling-1T on 2016 GPUs of three kinds",
        "",
        *paragraph(f"""All rungs, {found["clusters"][0]["schedule"]}, dp 96, ep 8, pp 21, a layout for each GPU's own
            times and memory. Bytes are what the busiest GPU sends in a step: over NVLink rows to experts and back, over
            the network hidden states, gradients and weights. Memory includes 6 GB for CUDA."""),
        *rows,
        "",
        "Assumptions:",
        "",
        *(f"- {text}" for text in ASSUMPTIONS),
    ]


def picture(found: dict) -> None:
    case = CASES["figure 18"]
    problem, rows = case.problem(case.units()), found["cases"]["figure 18"]
    chosen = [rows[0], rows[2], min(rows, key=lambda r: r["seconds"])]
    draw(
        {
            f"{r['label'].removeprefix('and ')}: {r['schedule']}, {short(r['layout'])}, {r['seconds']:.2f} s":
            problem.evaluate(PipelineLayout.parse(r["layout"]), r["schedule"]).timeline
            for r in chosen
        },
        PICTURE,
    )  # fmt: skip


if __name__ == "__main__":
    found = results()
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    PAGE.write_text(page(found))
    picture(found)
