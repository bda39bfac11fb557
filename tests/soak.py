"""make soak: clients of many kinds use a server for MINUTES=60; then nothing may have been lost, leaked or wrong.

    python -m tests.soak --minutes 60 --out build/soak

Whole texts, streams, clients that leave, bad bodies, samples, log-probabilities, structured output. The checkpoint of
tests/speller.py has one right text for each prompt. Writes soak.json, samples of memory and metrics, and soak.png. Exit
code 1 for a wrong answer, a page or request that is left, descriptors or memory that grow, a server that does not end.
"""

import argparse
import asyncio
import importlib.util
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

import httpx

from tests.speller import LETTERS, speller

CLIENTS = 24
MEMORY_GROWTH = 32 << 20  # bytes, between the second and the last quarter
GREEDY = dict(model="speller", temperature=0)


async def whole(http, draw) -> bool:
    first, count = draw.choice(LETTERS[:20]), draw.randint(1, 5)
    answer = (await http.post("/v1/completions", json=GREEDY | dict(prompt=first, max_tokens=count))).json()
    start = LETTERS.index(first) + 1
    return answer["choices"][0]["text"] == LETTERS[start : start + count]


async def streamed(http, draw, leave: bool = False) -> bool:
    first = draw.choice(LETTERS[:10])
    body, got, start = GREEDY | dict(prompt=first, max_tokens=60, stream=True), "", LETTERS.index(first) + 1
    async with http.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                got += json.loads(line[6:])["choices"][0]["text"]
            if leave and got:
                return LETTERS[start:].startswith(got)
    return got == LETTERS[start:]


async def left(http, draw) -> bool:
    return await streamed(http, draw, leave=True)


async def bad(http, draw) -> bool:
    more = draw.choice([dict(temperature="hot"), dict(max_tokens=10**9), dict(prompt=[-1]), dict(logit_bias={"a": 1}),
                        dict(nothing=1), dict(response_format=dict(type="json_schema")), dict(stop=[""])])  # fmt: skip
    response = await http.post("/v1/completions", json=GREEDY | dict(prompt="a") | more)
    return response.status_code == 400 and bool(response.json()["error"]["message"])


async def sampled(http, draw) -> bool:
    """A seed gives the same text twice, whatever else runs."""
    body = dict(model="speller", prompt=draw.choice(LETTERS), max_tokens=draw.randint(1, 60), seed=draw.randint(0, 99),
                temperature=1.5, top_p=0.9, presence_penalty=0.5, logit_bias={"97": 2.0}, logprobs=2)  # fmt: skip
    one, two = [(await http.post("/v1/completions", json=body)).json()["choices"][0] for _ in range(2)]
    return one["text"] == two["text"] and len(one["logprobs"]["tokens"]) == len(two["logprobs"]["tokens"])


async def structured(http, draw) -> bool:
    body = GREEDY | dict(prompt=draw.choice(LETTERS), max_tokens=60, structured_outputs=dict(regex="[a-f]{3,9}[.!]"))
    choice = (await http.post("/v1/completions", json=body)).json()["choices"][0]
    return choice["finish_reason"] == "stop" and re.fullmatch("[a-f]{3,9}[.!]", choice["text"]) is not None


KINDS = [whole, streamed, left, bad, sampled]
if importlib.util.find_spec("llguidance"):
    KINDS.append(structured)


async def client(http, number: int, end: float, done: Counter, faults: list[str]) -> None:
    draw = random.Random(number)
    while time.monotonic() < end:
        kind = draw.choice(KINDS)
        try:
            right = await kind(http, draw)
        except (httpx.HTTPError, KeyError, ValueError) as error:
            right = False
            faults.append(f"{kind.__name__}: {error!r:.200}")
        done[kind.__name__, bool(right)] += 1


def sample(process: int, metrics: str, start: float) -> dict[str, float]:
    """Memory and descriptors of the server's process, and its gauges and counters."""
    found = dict(re.findall(r"^ling_(\w+) (\S+)$", metrics, re.MULTILINE))
    names = ("running_requests", "waiting_requests", "cache_pages", "cache_pages_available", "generated_tokens_total")
    memory = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    descriptors = len(os.listdir(f"/proc/{process}/fd"))
    return dict(
        seconds=time.monotonic() - start, memory=int(memory[1]) << 10, descriptors=descriptors,
        **{name: float(found[name]) for name in names},
    )  # fmt: skip


async def load(url: str, process: int, seconds: float) -> tuple[list[dict], Counter, list[str]]:
    """Let the clients work; returns samples, the last of them without any client, counts by kind, and errors."""
    start, samples, done, faults = time.monotonic(), [], Counter(), []
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as http:
        clients = [asyncio.create_task(client(http, i, start + seconds, done, faults)) for i in range(CLIENTS)]
        while not all(task.done() for task in clients):
            samples.append(sample(process, (await http.get("/metrics")).text, start))
            await asyncio.wait(clients, timeout=max(0.5, seconds / 400))
        for _ in range(100):  # those that left are cancelled soon
            samples.append(sample(process, (await http.get("/metrics")).text, start))
            if not samples[-1]["running_requests"] + samples[-1]["waiting_requests"]:
                break
            await asyncio.sleep(0.1)
    return samples, done, faults


def check(samples: list[dict], done: Counter, faults: list[str]) -> list[str]:
    """What went wrong, in lines."""
    wrong, last, quarter = [*faults[:5]], samples[-1], len(samples) // 4
    wrong += [f"{count} wrong answers of kind {kind}" for (kind, right), count in done.items() if not right]
    if last["running_requests"] or last["waiting_requests"]:
        wrong.append("requests are left")
    if last["cache_pages_available"] != last["cache_pages"]:
        wrong.append(f"{last['cache_pages'] - last['cache_pages_available']:.0f} pages are left")
    if quarter:
        second, final = samples[quarter : 2 * quarter], samples[-quarter:]
        memory, descriptors = ([median(s[name] for s in part) for part in (second, final)]
                               for name in ("memory", "descriptors"))  # fmt: skip
        if memory[1] - memory[0] > MEMORY_GROWTH:
            wrong.append(f"memory grew from {memory[0] / 1e6:.0f} to {memory[1] / 1e6:.0f} MB")
        if descriptors[1] > descriptors[0] + CLIENTS:
            wrong.append(f"descriptors grew from {descriptors[0]} to {descriptors[1]}")
    return wrong


def draw_plot(samples: list[dict], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8), layout="constrained")
    minutes = [s["seconds"] / 60 for s in samples]
    curves = {
        "memory of the server, MB": [s["memory"] / 1e6 for s in samples],
        "running requests": [s["running_requests"] for s in samples],
        "cache pages in use": [s["cache_pages"] - s["cache_pages_available"] for s in samples],
        "tokens generated": [s["generated_tokens_total"] for s in samples],
    }
    for axes, (name, values) in zip(figure.subplots(len(curves), 1, sharex=True), curves.items(), strict=True):
        axes.plot(minutes, values, linewidth=1)
        axes.set(title=name, ylim=(0, 1.1 * max(values) or 1))
    axes.set_xlabel("minutes")
    figure.savefig(file, dpi=100)


def soak(seconds: float, out: Path, *flags: str) -> list[str]:
    """Run a server and its clients; returns what went wrong."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        options = ["--port", "0", "--name", "speller", "--draft", "2", "--max-running", "16", "--cache-tokens", "3000"]
        command = [sys.executable, "-m", "ling_kernels.generate.server", "--model", speller(folder), *options, *flags]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                url = process.stdout.readline().split()[2].removesuffix("/v1,")
                samples, done, faults = asyncio.run(load(url, process.pid, seconds))
                wrong = check(samples, done, faults)
                process.send_signal(signal.SIGTERM)
                if process.wait(120) != -signal.SIGTERM:
                    wrong.append(f"the server ended with code {process.returncode}")
            finally:
                process.kill()
    answers = {kind: done[kind, True] for kind in sorted(kind.__name__ for kind in KINDS)}
    (out / "soak.json").write_text(json.dumps(dict(answers=answers, faults=wrong, samples=samples)) + "\n")
    draw_plot(samples, out / "soak.png")
    print(f"{sum(answers.values())} right answers in {seconds / 60:.1f} minutes: {answers}; {out / 'soak.png'}")
    return wrong


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--out", type=Path, default=Path("build/soak"))
    args = parser.parse_args(argv)
    wrong = soak(60 * args.minutes, args.out)
    print("\n".join(f"FAULT: {line}" for line in wrong) or "nothing was lost, leaked or wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
