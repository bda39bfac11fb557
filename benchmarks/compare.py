"""What became worse between two results files: times on a GPU, ratios of the host, resources of compiled kernels."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

SLOWER = 1.10  # of a median on the same GPU
HOST = 2.00  # of a ratio of CPU time to torch's own op in the same run, which another CPU or Python changes
REGISTERS = 1.10  # and at least 8 more, which is how they are given out
SHARED = 1.10


def worse(old: dict, new: dict) -> list[str]:
    """One line each; empty where nothing is."""
    if "kernels" in old and "kernels" in new:
        return worse_resources(old, new)
    before, found = {r["name"]: r for r in old.get("benchmarks", [])}, []
    gpu = old.get("gpu") if old.get("gpu") == new.get("gpu") else None
    for r in new.get("benchmarks", []):
        was = before.get(r["name"])
        if not was:
            continue
        if gpu and not r.get("rate") and r["median_us"] > SLOWER * was["median_us"]:
            found.append(f"{r['name']}: {was['median_us']:.1f} -> {r['median_us']:.1f} us")
        if r.get("ratio") and was.get("ratio") and r["ratio"] > HOST * was["ratio"]:
            found.append(f"{r['name']}: {was['ratio']:.1f} -> {r['ratio']:.1f} times torch's own op")
    return found


def worse_resources(old: dict, new: dict) -> list[str]:
    before, after, found = most(old["kernels"]), most(new["kernels"]), []
    for name in before.keys() & after.keys():
        was, r = before[name], after[name]
        if r["registers"] > max(REGISTERS * was["registers"], was["registers"] + 7):
            found.append(f"{name}: {was['registers']} -> {r['registers']} registers")
        if r["shared"] > max(SHARED * was["shared"], was["shared"] + 1024):
            found.append(f"{name}: {was['shared']} -> {r['shared']} bytes of shared memory")
        if r["spilled"] > was["spilled"]:
            found.append(f"{name}: {was['spilled']} -> {r['spilled']} bytes spilled")
        for what in ("wgmma", "qgmma", "hgmma", "tma", "tma_loads", "wide_loads", "wide_stores"):
            if was.get(what) and not r.get(what):
                found.append(f"{name}: has lost its {what}")
    return sorted(found)


def most(kernels: list[dict]) -> dict[str, dict]:
    """The largest numbers by kernel; the table does not tell apart what differs in argument types only."""
    found = {}
    for r in kernels:
        if "error" not in r:
            was = found.setdefault(build(r), {})
            was.update({k: max(v, was.get(k, 0)) for k, v in r.items() if isinstance(v, int)})
    return found


def build(r: dict) -> str:
    """One compilation of one kernel."""
    which = (r.get("dtype"), r.get("ops"), r.get("shape"), r.get("constants"), r.get("gpus"))
    return r.get("kernel", "?") + "".join(f" {json.dumps(w, sort_keys=True)}" for w in which if w)


def committed(root: Path, path: Path) -> dict | None:
    """A file as the last commit has it."""
    command = ["git", "show", f"HEAD:{path.resolve().relative_to(root.resolve())}"]
    said = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return None if said.returncode else json.loads(said.stdout)


def against_commit(root: Path, results: Path) -> list[str]:
    """The tables in the working tree, which the tests write anew, against those of the commit."""
    found = []
    for name in ("resources.json", "resources_cuda.json"):
        old = committed(root, results / name)
        if old is None or not (results / name).exists():
            print(f"{name}: nothing to compare")
            continue
        new = json.loads((results / name).read_text())
        found += worse(old, new)
        print(f"{name}: {len(new['kernels'])} kernels compared with the commit's")
    return found


def host_against_commit(root: Path, results: Path, attempts: int = 3) -> list[str]:
    """Calls whose ratio to torch's own op is worse than the committed one each time that it is tried."""
    names = [p.name for p in sorted(results.glob("bench-cpu-*.json"))]
    old = next((r for r in (committed(root, results / n) for n in names) if r and any_host(r)), None)
    if old is None:
        print("host: nothing to compare")
        return []
    found, which = [], "bench_call"
    for _ in range(attempts):
        new = time_host(root, which)
        found = worse(old, new)
        print(f"host: {len(new['benchmarks'])} calls compared with the commit's, {len(found)} slower")
        if not found:
            break
        which = " or ".join(f"bench_call[{r['host']}]" for r in new["benchmarks"] if any(r["name"] in f for f in found))
    return found


def any_host(run: dict) -> bool:
    return any(r.get("host") for r in run.get("benchmarks", []))


def time_host(root: Path, which: str) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "host.json"
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--benchmark-json={out}",
                   "benchmarks/bench_host.py", "-k", which]  # fmt: skip
        subprocess.run(command, cwd=root, check=True, stdout=subprocess.DEVNULL)
        rows = json.loads(out.read_text())["benchmarks"]
    return dict(benchmarks=[dict(name=b["name"]) | b["extra_info"] for b in rows])


def tell(found: list[str]) -> int:
    print("\n".join(f"worse: {line}" for line in found) or "nothing is worse")
    return 1 if found else 0
