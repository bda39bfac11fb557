"""A picture of a pipeline's step: what each rank does when. Needs matplotlib."""

from collections import defaultdict
from pathlib import Path

from ..errors import InputError
from .simulate import Timeline

COLOURS = dict(F="#8ecae6", B="#a3d9a5", I="#ffd166", W="#f4a6a6")
NAMES = dict(F="forward", B="backward", I="gradient of the input", W="gradients of weights")


def find_matplotlib() -> type:
    """matplotlib's Figure. Raises InputError where it is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("--png needs matplotlib: pip install matplotlib") from None
    return Figure


def draw(timelines: dict[str, Timeline], path: str | Path) -> None:
    """Write a PNG with one picture above the other, on one scale of time; the keys are their titles.

    Raises InputError where matplotlib is missing or the file cannot be written.
    """
    Figure = find_matplotlib()
    heights = [len(t.events) for t in timelines.values()]
    figure = Figure(figsize=(14, 0.28 * sum(heights) + 0.9 * len(heights) + 0.6), layout="constrained")
    axes: list = [*figure.subplots(len(heights), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]]
    for ax, (title, timeline) in zip(axes, timelines.items(), strict=True):
        bars = defaultdict(list)  # by rank, kind, its number in an overlap, and the number of actions there
        for rank, events in enumerate(timeline.events):
            for begin, end, step in events:
                for i, action in enumerate(step):
                    bars[rank, action.kind, i, len(step)].append((begin, end - begin))
        for (rank, kind, i, number), spans in bars.items():
            height = 0.9 / number  # an overlap: one above the other
            ax.broken_barh(
                spans, (rank - 0.45 + i * height, height), facecolors=COLOURS[kind], edgecolor="white", linewidth=0.2
            )
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_ylim(len(timeline.events) - 0.5, -0.5)
        ax.set_yticks(range(len(timeline.events)))
        ax.set_ylabel("rank")
        ax.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("seconds")
    axes[-1].set_xlim(0, max(t.seconds for t in timelines.values()))
    seen = {a.kind for t in timelines.values() for row in t.events for e in row for a in e.step}
    handles = [axes[0].barh(0, 0, color=COLOURS[k], label=NAMES[k]) for k in COLOURS if k in seen]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), frameon=False, fontsize=9)
    try:
        figure.savefig(path, format="png", dpi=110, metadata={"Software": None})
    except (OSError, ValueError) as error:
        raise InputError(f"--png {path}: {error}") from None
