"""report.html of a run: its structure, what it leaves out of reach, and that a browser draws it."""

# ruff: noqa: F811 (fixtures are imported)
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest

from ling_kernels.errors import InputError
from ling_kernels.train import cli
from ling_kernels.train.__main__ import main
from ling_kernels.train.report import plots, svg
from ling_kernels.train.report.__main__ import main as report_command
from ling_kernels.train.report.page import write_html
from tests.training import flags, one_line_error, small, text, uninterrupted  # noqa: F401

VOID = {"meta", "link", "br", "img", "path", "circle", "polyline", "rect"}


class Page(HTMLParser):
    """Checks that tags close in order; keeps attributes by tag and the texts."""

    def __init__(self, source: str):
        super().__init__()
        self.open, self.tags, self.texts, self.source = [], [], [], source
        self.feed(source)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, tag: str) -> list[str]:
        return [data for where, data in self.texts if where == tag]


def write(run, name, rows):
    (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path):
    """A run folder with everything: 500 steps, a spike, one skipped, 3 MoE layers, FP8 measurements, samples that look
    like HTML."""
    run = tmp_path / "a <run> & more"
    run.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for step in range(1, 501):
        loss = 2 + 4 / step + 0.01 * rng.standard_normal()
        row = dict(step=step, loss=loss, main_loss=loss, mtp_loss=loss + 1, grad_norm=90.0 if step == 250 else 1.0,
                   load_violation_max=1.0, load_violation_mean=0.5, lr=1e-3, tokens=1000 * step,
                   tokens_per_s=4000.0, mfu=0.25)  # fmt: skip
        validated = {"val_loss": loss, "val_bpb": loss / 3, "val_loss/web<": loss, "val_loss/code": loss + 1}
        rows.append(row | (validated if step % 100 == 0 else {}))
    rows[299] |= dict(main_loss=None, grad_norm=None, skipped=1)
    write(run, "metrics.jsonl", rows)
    counts = rng.integers(1, 9, (3, 8))
    counts[1, 5] = 0
    write(run, "expert_load.jsonl", [dict(first=401, step=500, counts=counts.tolist())])
    inside = {operand: [0.001, 0.001] for operand in ("x", "w", "dy")}
    measured = [dict(step=s, layers={"layers.0.mlp.down": inside, "layers.1.mlp.down": inside}) for s in (100, 200)]
    measured.append(dict(step=300, layers={"layers.1.mlp.down": inside | dict(dy=[0.5, None])}))
    write(run, "fp8.jsonl", measured)
    write(run, "samples.jsonl", [dict(step=s, prompt="<b>", text="</pre><script>stop()</script>") for s in (1, 2)])
    (run / "settings.json").write_text(json.dumps(dict(model="tiny", steps=1000, lr=1e-3)))
    return run


def test_everything_is_in_one_file(folder):
    page = Page(write_html(folder).read_text())
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 1 and "link" not in tags and "img" not in tags
    assert not any({"src", "href", "onclick", "onload"} & attrs.keys() for _, attrs in page.tags)
    assert "http" not in re.sub(r"http-equiv", "", page.source)
    assert page.text("h1") == ["a <run> & more"] and page.text("title") == ["a <run> & more"]
    assert page.text("h2") == ["Curves", "Load of the experts", "FP8", "Samples", "Settings"]
    tiles = dict(re.findall(r'class="tile"><span>(.*?)</span><b>(.*?)</b>', page.source))
    assert tiles["step, of 1,000"] == "500" and tiles["tokens"] == "500k" and tiles["tokens/s"] == "4,000"
    assert tiles["left at this speed"] == "00:02:05" and tiles["steps skipped"] == "1" and tiles["MFU"] == "25.0 %"
    assert page.text("i") == ["<b>", "<b>"] and "</pre><script>stop()</script>" in page.text("pre")
    assert "prefers-color-scheme: dark" in page.source and 'name="viewport"' in page.source
    rows = re.search(r"<th>layers.1.mlp.down</th>(.*?)</tr>", page.source)[1]
    assert re.findall(r'number bad">(.*?)<', rows) == ["50.000 %", "not finite"]
    assert "No longer measured, so in bf16: layers.0.mlp.down" in page.source and ", 1 unused" in page.source


def test_curves_are_the_files_numbers(folder):
    page = Page(write_html(folder).read_text())
    charts = [json.loads(attrs["data-chart"]) for tag, attrs in page.tags if "data-chart" in attrs]
    assert len(charts) == 9
    training, validation = charts[0]["series"]
    assert validation["x"] == [100, 200, 300, 400, 500] and training["x"][-1] == 500
    assert len(training["x"]) == svg.POINTS
    assert validation["y"][-1] == pytest.approx(2 + 4 / 500, abs=0.05)
    for tag, attrs in page.tags:
        if tag == "polyline":
            assert re.fullmatch(r"(-?[\d.]+,-?[\d.]+ ?)+", attrs["points"]), attrs["points"][:80]


def test_every_validation_set_has_a_line(folder):
    text = [data for _, data in Page(write_html(folder).read_text()).texts]
    assert "Validation of each set" in text and "web<" in text and "code" in text
    assert text.count("validation, bits per byte") == 1


def test_a_spike_does_not_flatten_the_curve(folder):
    """The axis of the gradient norm ends near the smoothed curve's highest value, not at the spike of 90."""
    labels = re.search(r"<b>Gradient norm</b>.*?</figure>", write_html(folder).read_text(), re.S)[0]
    assert max(float(v) for v in re.findall(r'text-anchor="end">([\d.]+)</text>', labels)) <= 20


@pytest.mark.parametrize("steps", [1, 12, 400])
def test_the_first_points_of_a_short_run_are_shown(steps):
    """Of a longer one the first SETTLING of the steps are cut off above."""
    at, loss = range(1, steps + 1), [10 / n for n in range(1, steps + 1)]
    faint, line = svg.Series("t", "s1 faint", at, loss), svg.Series("t", "s1", at, [min(y, 4) for y in loss])
    chart = svg.line_chart("loss", "", [faint, line, svg.Series("v", "s2 dots", [1], [3.0])], settled=True)
    left, top, width, height = (float(re.search(rf'class="inside" .*?{n}="([\d.]+)"', chart)[1])
                                for n in ("x", "y", "width", "height"))  # fmt: skip
    for points in re.findall(r'points="(.*?)"', chart):
        x, y = map(float, points.split()[0].split(","))
        assert left <= x <= left + width and (top <= y <= top + height) == (steps < 200)
    for x in re.findall(r'cx="([\d.]+)"', chart):
        assert float(x) - 3 >= left and float(x) + 3 <= left + width  # the whole dot


@pytest.mark.parametrize("steps", [1, 12, 30])
def test_plots_of_a_short_run(tmp_path, monkeypatch, steps):
    """A line of one point needs a dot; ticks are whole steps, and every point is within the axes."""
    pytest.importorskip("matplotlib")
    drawn, genuine = [], plots.finish
    monkeypatch.setattr(plots, "finish", lambda *args: (drawn.append(args[1][0]), genuine(*args))[1])
    rows = [dict(step=n, main_loss=9 / n, tokens=n, load_violation_max=1.0, load_violation_mean=0.5)
            for n in range(1, steps + 1)]  # fmt: skip
    write(tmp_path, "metrics.jsonl", rows)
    write(tmp_path, "expert_load.jsonl", [dict(first=1, step=steps, counts=[[1, 2]])])
    assert len(plots.draw(tmp_path, ["layer 1"])) == 2
    for axes in drawn:
        (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
        assert all(tick == int(tick) for tick in axes.get_xticks())
        for line in axes.get_lines():
            assert (line.get_marker() == ".") == (steps <= plots.FEW)
            assert all(left < x < right and low < y < high for x, y in zip(*line.get_data(), strict=True))


def test_thinning_keeps_ends_and_extremes():
    values = [0.0] * 5000
    values[1234], values[4321] = 7.0, -3.0
    steps, kept = svg.thin(range(5000), values, extremes=True)
    assert len(steps) <= svg.POINTS and max(kept) == 7 and min(kept) == -3 and steps == sorted(steps)
    assert steps[kept.index(7.0)] == 1234
    steps, _ = svg.thin(range(5000), values, extremes=False)
    assert (steps[0], steps[-1], len(steps)) == (0, 4999, svg.POINTS)
    assert svg.thin([1, 2], [3, 4], extremes=True) == ([1, 2], [3, 4])


@pytest.mark.parametrize(
    "low, high, ticks",
    [(0, 1, [0, 0.5, 1]), (0, 10, [0, 5, 10]), (1.9, 3.1, [1.5, 2, 2.5, 3, 3.5]), (0, 3e-4, [0, 1e-4, 2e-4, 3e-4]),
     (2, 2, [1, 1.5, 2, 2.5, 3]), (0, 0, [0, 0.5, 1])],
)  # fmt: skip
def test_ticks(low, high, ticks):
    assert svg.nice_ticks(low, high) == pytest.approx(ticks)


def test_short_numbers():
    wanted = {3e-4: "3e-4", 0.25: "0.25", 1250: "1,250", 41000: "41k", 3_146_000_000: "3.146G", 0: "0", -2: "-2"}
    assert {v: svg.short(v) for v in wanted} == wanted


def test_a_run_writes_its_page(tmp_path, flags, capsys):
    """At validations, at the end, and again from the files; a resumed run shows what it changed."""
    run = tmp_path / "run"
    assert main([*flags, "--out", str(run), "--steps", "2"]) == 0
    assert "report.html" in capsys.readouterr().out
    assert main(["--resume", str(run), "--steps", "3", "--log-every", "7"]) == 0
    page = Page((run / "report.html").read_text())
    cells = re.findall(r"<tr><td>2</td><td>(\w+)</td><td>(.*?)</td><td>(.*?)</td></tr>", page.source)
    assert ("steps", "2", "3") in cells and ("log_every", "1", "7") in cells
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert [s["step"] for s in starts] == [0, 2] and starts[0]["versions"].keys() >= {"python", "torch"}
    assert starts[0]["layers"] == ["layer 1", "MTP 1"] and "MTP 1" in page.text("text")
    (run / "report.html").unlink()
    capsys.readouterr()
    assert report_command([str(run)]) == 0 and (run / "report.html").is_file()


def test_a_page_that_cannot_be_written_does_not_stop_training(tmp_path, flags, monkeypatch, capsys):
    def full(run):
        raise InputError(f"cannot write {run / 'report.html'}: No space left on device")

    monkeypatch.setattr(cli, "write_html", full)
    assert main([*flags, "--out", str(tmp_path / "run"), "--steps", "2", "--eval-every", "1"]) == 0
    assert "warning: cannot write" in capsys.readouterr().out


def test_errors(tmp_path, capsys):
    for argv, says in (([str(tmp_path)], "no steps"), ([str(tmp_path / "none")], "no folder")):
        assert report_command(argv) == 2
        assert says in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 1, "tokens": 4}\n{"step": 2, "tok')
    for name in ("expert_load.jsonl", "fp8.jsonl"):
        (tmp_path / name).write_text('{"step": 1}\n')
    assert Page(write_html(tmp_path).read_text()).text("h2") == ["Curves"]  # a file of another loop, cut short


def test_a_browser_opens_it(folder):
    """Chromium draws the page, and its script adds a pointer's line and values to every chart."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no Chromium here: the page's structure is checked, but not in a browser")
    path, picture = write_html(folder), folder / "picture.png"
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,900"]
    profile = f"--user-data-dir={folder / 'profile'}"
    dom = subprocess.run(
        [browser, *flags, profile, f"--screenshot={picture}", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert dom.returncode == 0 and picture.read_bytes()[:4] == b"\x89PNG", dom.stderr[-500:]
    assert dom.stdout.count('class="tip"') == dom.stdout.count("data-chart=") == 9
    assert "stop()" not in "".join(re.findall(r"<script>(.*?)</script>", dom.stdout, re.S))


@pytest.mark.parametrize(
    "name, line",
    [
        ("starts.jsonl", '{"step": 0}'), ("metrics.jsonl", '{"step": 99, "tokens": "x"}'),
        ("expert_load.jsonl", '{"step": 99, "first": 1, "counts": [[1], [1, 2]]}'),
        ("fp8.jsonl", '{"step": 99, "layers": [1]}'),
    ],
)  # fmt: skip
def test_a_line_of_another_form_is_one_line(tmp_path, uninterrupted, capsys, name, line):
    shutil.copytree(uninterrupted, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    with open(tmp_path / "run" / name, "a") as file:
        file.write(line + "\n")
    assert report_command([str(tmp_path / "run")]) == 2
    assert "cannot report" in capsys.readouterr().err


def test_a_sample_that_is_no_unicode(tmp_path, uninterrupted):
    shutil.copytree(uninterrupted, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "run/samples.jsonl").write_text('{"step": 1, "text": "\\ud800"}\n')
    assert "\\ud800" in write_html(tmp_path / "run").read_text()
