"""report.html of a run, one file that needs nothing else: python -m ling_kernels.train.report RUN writes it again.

Curves, load of the experts, health of FP8, samples, settings, starts of the process. All of it comes from the files in
the run's folder, so that runs of any age, also those of a loop of one's own with a `Report`, have one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import InputError
from ...files import atomic_write, read_json
from ..changes import in_words
from ..monitor import METRICS, OPERANDS, FP8Monitor
from ..prepare.threads import STARTS
from ..settings import Settings
from .lines import read_lines
from .plots import recent_load, smooth
from .report import FP8_FILE, SAMPLES, duration
from .svg import LEVELS, Series, heatmap, line_chart, short

FILE = "report.html"
VAL_NAMED = "val_loss/"  # before the name of a validation set, in metrics.jsonl
SPEED_STEPS = 50  # the last steps, over which the tiles average
SAMPLES_SHOWN, LAYERS_SHOWN = 20, 12  # the others are folded, or left out
HERE = Path(__file__).parent
# Nothing may be loaded, from anywhere: what the page shows is in it.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def write_html(run: Path) -> Path:
    """Write RUN/report.html, whole or not at all. Raises InputError where the run has no steps yet or the folder cannot
    be written."""
    metrics = rows_of(run / "metrics.jsonl", "tokens")
    if not metrics:
        raise InputError(f"{run} has no steps in metrics.jsonl, so there is nothing to report")
    settings = read_json(run / "settings.json") if (run / "settings.json").is_file() else {}
    starts = read_lines(run / STARTS)
    try:
        sections = [
            heading(run, metrics, settings, starts),
            section("Curves", f'<div class="charts">{"".join(curves(metrics))}</div>'),
            section("Load of the experts", load(rows_of(run / "expert_load.jsonl", "first", "counts"), starts)),
            section("FP8", fp8(rows_of(run / FP8_FILE, "layers"))),
            section("Samples", samples(read_lines(run / SAMPLES))),
            section("Settings", settings_table(settings, starts)),
            section("Starts", starts_table(starts)),
        ]
    except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as error:
        raise InputError(f"cannot report {run}: a value in its files is of another type, or is missing: {error!r}"
                         ) from None  # fmt: skip
    text = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(run.name)}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<style>{(HERE / 'page.css').read_text()}</style></head>\n<body><main>{''.join(sections)}</main>"
        f"<script>{(HERE / 'page.js').read_text()}</script></body></html>\n"
    )
    try:
        with atomic_write(run / FILE) as partial:
            partial.write_bytes(text.encode(errors="backslashreplace"))  # a sample of another loop may be no Unicode
    except OSError as error:
        raise InputError(f"cannot write {run / FILE}: {error.strerror or error}") from None
    return run / FILE


def rows_of(path: Path, *needed: str) -> list[dict]:
    """The lines of a file that have these fields: another loop may have written others."""
    return [row for row in read_lines(path) if all(name in row for name in needed)]


def section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>\n" if content else ""


def heading(run: Path, metrics: list[dict], settings: dict, starts: list[dict]) -> str:
    last, steps = metrics[-1], settings.get("steps")
    lines = []
    if starts:
        s = starts[-1]
        lines = [
            f"{Path(str(settings.get('model', ''))).name}: {s['parameters']:,} parameters, {s['active']:,} active in a"
            f" token; {s['training_tokens']:,} tokens of text, {s['held_out']:,} held out",
            f"{s['device']}, {s['precision']}; begun {starts[0]['date']}",
        ]
    recent = metrics[-SPEED_STEPS:]
    losses = [m["main_loss"] for m in recent if m.get("main_loss") is not None and "skipped" not in m]
    validations = [m for m in metrics if m.get("val_loss") is not None]
    speeds = [m["tokens_per_s"] for m in recent if m.get("tokens_per_s")]
    speed = len(speeds) / sum(1 / v for v in speeds) if speeds else None  # over the time, for steps of equal size
    mfu = [m["mfu"] for m in recent if m.get("mfu") is not None]
    tiles = [(f"step, of {steps:,}" if steps else "step", f"{last['step']:,}"), ("tokens", short(last["tokens"]))]
    if losses:
        tiles.append((f"loss, mean of {len(losses)} steps", f"{sum(losses) / len(losses):.4f}"))
    if validations:
        best = min(validations, key=lambda m: m["val_loss"])
        tiles.append((f"validation, step {validations[-1]['step']:,}", f"{validations[-1]['val_loss']:.4f}"))
        if validations[-1].get("val_bpb") is not None:
            tiles.append(("validation, bits per byte", f"{validations[-1]['val_bpb']:.4f}"))
        if best is not validations[-1]:
            tiles.append((f"best validation, step {best['step']:,}", f"{best['val_loss']:.4f}"))
    if speed:
        tiles.append(("tokens/s", short(speed)))
        if steps and (left := steps - last["step"]) > 0:
            per_step = (last["tokens"] - metrics[0]["tokens"]) / max(last["step"] - metrics[0]["step"], 1)
            tiles.append(("left at this speed", duration(left * per_step / speed)))
    if mfu:
        tiles.append(("MFU", f"{100 * sum(mfu) / len(mfu):.1f} %"))
    if skipped := max((m.get("skipped", 0) for m in metrics), default=0):
        tiles.append(("steps skipped", f"{skipped:,}"))
    shown = "".join(f'<div class="tile"><span>{escape(n)}</span><b>{escape(v)}</b></div>' for n, v in tiles)
    about = "".join(f"<p>{escape(line)}</p>" for line in lines)
    return f'<h1>{escape(run.name)}</h1>{about}<div class="tiles">{shown}</div>\n'


def curves(metrics: list[dict]) -> Iterable[str]:
    steps = [m["step"] for m in metrics]

    def column(name: str) -> list[float | None]:
        return [m.get(name) for m in metrics]

    def smoothed(label: str, name: str, style: str) -> list[Series]:
        rows = [(m["step"], m[name]) for m in metrics if m.get(name) is not None and "skipped" not in m]
        if not rows:
            return []
        at, values = zip(*rows, strict=True)
        return [Series(label, f"{style} faint", at, values), Series(label, style, at, smooth([*values]))]

    validation = Series("validation", "s2 dots", steps, column("val_loss"))
    yield line_chart("Reward", "mean of a step", smoothed("reward", "reward", "s1"))  # of reinforcement learning
    yield line_chart(
        "Loss of the next token", "nats", [*smoothed("training", "main_loss", "s1"), validation], settled=True
    )
    yield line_chart("Gradient norm", "before clipping", smoothed("gradient norm", "grad_norm", "s1"), from_zero=True)
    yield line_chart("Learning rate", "", [Series("lr", "s1", steps, column("lr"))], from_zero=True)
    yield line_chart("Speed", "tokens/s", smoothed("tokens/s", "tokens_per_s", "s1"), from_zero=True)
    imbalance = [
        *smoothed("worst layer", "load_violation_max", "s2"),
        *smoothed("mean of layers", "load_violation_mean", "s1"),
    ]
    yield line_chart("Imbalance of experts", "busiest / mean - 1", imbalance, from_zero=True)
    names = dict.fromkeys(name for m in metrics for name in m if name.startswith(VAL_NAMED))
    if names:
        sets = [
            Series(name.removeprefix(VAL_NAMED), f"s{i % 5 + 1} dots", steps, column(name))
            for i, name in enumerate(names)
        ]
        yield line_chart("Validation of each set", "nats", sets, settled=True)
    others = smoothed("MTP", "mtp_loss", "s1")
    yield line_chart("Loss of MTP", "nats", others, settled=True) if any(m.get("mtp_loss") for m in metrics) else ""


def load(rows: list[dict], starts: list[dict]) -> str:
    if not rows or not rows[-1]["counts"]:
        return ""
    counts, first, last = recent_load(rows)
    share = counts / np.maximum(counts.mean(1, keepdims=True), 1)
    names = starts[-1]["layers"] if starts else []
    if len(names) != len(share):
        names = [f"MoE layer {i + 1}" for i in range(len(share))]
    notes = [f"{row.min():.2f} to {row.max():.2f}" + f", {(row == 0).sum()} unused" * bool((row == 0).any())
             for row in share]  # fmt: skip
    colours = "".join(f'<svg viewBox="0 0 18 12"><rect class="h{i}" width="18" height="12"/></svg>'
                      for i in range(LEVELS))  # fmt: skip
    return (
        f'<div class="card"><p>Tokens of each expert over the mean of its layer, steps {first:,} to {last:,}; behind'
        f' each layer the least and the most.</p><div class="scroll">{heatmap(names, share.tolist(), notes)}</div>'
        f'<div class="scale">0 {colours} 2 or more</div></div>'
    )


def fp8(rows: list[dict]) -> str:
    """Curves of the worst layer for each operand, and the last measurement of each layer, worst layers first."""
    if not rows:
        return ""
    steps, charts = [row["step"] for row in rows], []
    for i, metric in enumerate(METRICS):
        series = []
        for style, operand in zip(("s1", "s2", "s3", "s4", "s5"), OPERANDS, strict=True):
            found = [[v[operand][i] for v in row["layers"].values() if operand in v] for row in rows]
            worst = [max((x for x in values if x is not None), default=None) for values in found]
            series.append(Series(operand, style, steps, worst))
        charts.append(line_chart(f"{metric.capitalize()} of FP8", "worst layer", series, from_zero=True))
    monitor = FP8Monitor(None, 0, earlier=rows)
    last, bf16 = rows[-1]["layers"], []
    bf16 = [layer for layer in dict.fromkeys(n for row in rows for n in row["layers"]) if layer not in last]
    outside = {key for key, times in monitor.outside.items() if times and key[0] in last}
    bad = {layer: sum(key[0] == layer for key in outside) for layer in last}
    lines = []
    for layer in sorted(last, key=lambda n: -bad[n]):
        cells = "".join(
            f'<td class="number{" bad" if (layer, operand, metric) in outside else ""}">'
            f"{percent(last[layer][operand][i]) if operand in last[layer] else ''}</td>"
            for i, metric in enumerate(METRICS) for operand in OPERANDS
        )  # fmt: skip
        lines.append(f"<tr><th>{escape(layer)}</th>{cells}</tr>")
    names = "".join(f"<th>{metric} {operand}</th>" for metric in METRICS for operand in OPERANDS)
    head = f"<tr><th>layer</th>{names}</tr>"
    says = f"{sum(map(bool, bad.values()))} of {len(last)} layers are outside their band (in red), step {steps[-1]:,}."
    if bf16:
        says += f" No longer measured, so in bf16: {', '.join(bf16)}."
    table = f'<div class="scroll"><table>{head}{"".join(lines[:LAYERS_SHOWN])}</table></div>'
    if rest := lines[LAYERS_SHOWN:]:
        table += f'<details><summary>{len(rest)} more layers</summary><div class="scroll"><table>{head}{"".join(rest)}'
        table += "</table></div></details>"
    return f'<div class="charts">{"".join(charts)}</div><div class="card"><p>{escape(says)}</p>{table}</div>'


def percent(value: float | None) -> str:
    return "not finite" if value is None else f"{100 * value:.3f} %"


def samples(rows: list[dict]) -> str:
    cards = [
        f'<div class="card"><span class="note">step {row["step"]:,}</span>'
        f"<pre><i>{escape(str(row.get('prompt', '')))}</i>{escape(str(row.get('text', '')))}</pre></div>"
        for row in reversed(rows[-SAMPLES_SHOWN:])
    ]
    older = f"<details><summary>{len(cards) - 1} earlier</summary>{''.join(cards[1:])}</details>" if cards[1:] else ""
    return "".join(cards[:1]) + older


def settings_table(settings: dict, starts: list[dict]) -> str:
    """The settings that are not the defaults, the others folded, and what resumed runs have changed."""
    defaults = {f.name: f.default for f in fields(Settings)}
    given = {k: v for k, v in settings.items() if v != defaults.get(k)}
    rest = {k: v for k, v in settings.items() if k not in given}
    out = f'<div class="card">{table(("setting", "value"), given.items())}' if settings else ""
    if rest:
        out += f"<details><summary>{len(rest)} at their default</summary>{table(('setting', 'value'), rest.items())}"
        out += "</details>"
    if settings:
        out += "</div>"
    record = starts[-1].get("changes", []) if starts else []
    changes = [
        (f"{c['step']:,}", c["setting"], *(in_words(c["setting"], c[w]) for w in ("old", "new"))) for c in record
    ]
    if changes:
        out += f'<div class="card">{table(("changed after step", "setting", "before", "since"), changes)}</div>'
    return out


def starts_table(starts: list[dict]) -> str:
    rows = [
        (f"{s['step']:,}", s["date"], f"{s['device']}, {s['precision']}",
         f"{s['peak_flops'] / 1e12:.4g} TFLOP/s ({s['peak_source']})",
         ", ".join(f"{k} {v}" for k, v in s["versions"].items()), f"{s['system']}, {s['cores']} cores")
        for s in starts
    ]  # fmt: skip
    head = "after step", "date", "device", "peak", "versions", "system"
    return f'<div class="card scroll">{table(head, rows)}</div>' if rows else ""


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    body = "".join(f"<tr>{''.join(f'<td>{escape(as_text(v))}</td>' for v in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(h)}</th>' for h in head)}</tr>{body}</table>"


def as_text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
