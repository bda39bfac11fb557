"""python -m benchmarks.studies.cache RUN: the effect of an FP8 KV cache on a trained model, on a CPU.

RUN is the folder of a finished `make train`. The model reads held-out text token by token through the cache, as in
decoding: in fp32 with a cache in fp32 (the truth), bf16 and e4m3, and in bf16 with a cache in bf16 and e4m3, which
separates the cache's error from the arithmetic's. Writes results/cache.json beside this file, and the table of
docs/serving.md.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.report import fill, table
from ling_kernels.commands import command
from ling_kernels.errors import InputError
from ling_kernels.files import atomic_write, origin
from ling_kernels.model import Ling, load_model
from ling_kernels.model.decode import PAGE, empty_caches
from ling_kernels.nn import BatchLayout
from ling_kernels.tokenizer import load_tokenizer
from ling_kernels.train.data import Packed, gather_tokens, hold_out

RESULTS = Path(__file__).parent / "results/cache.json"
PAGE_OF_RESULTS = Path(__file__).parents[2] / "docs/serving.md"
TYPES = dict(fp32=torch.float32, bf16=torch.bfloat16, e4m3=torch.float8_e4m3fn)
VARIANTS = [("fp32", "fp32"), ("fp32", "bf16"), ("fp32", "e4m3"), ("bf16", "bf16"), ("bf16", "e4m3")]  # model, cache


@torch.inference_mode()
def logits_through(model: Ling, ids: Tensor, cache: torch.dtype) -> Tensor:
    """ids [B, L] -> [B, L, V] fp32: of each token after those before it, which are read from the cache."""
    B, L = ids.shape
    pages = -(-L // PAGE)
    table = torch.arange(B * pages, dtype=torch.int32).view(B, pages)
    caches = empty_caches(model.config, len(model.layers), B * pages, PAGE, cache, ids.device)
    first, none, out = table[:, 0].long(), torch.zeros(B + 1, dtype=torch.int32), []
    for i in range(L):
        at = torch.full((B,), i)
        rows = BatchLayout(model.cos, model.sin, at, none, first * PAGE + at, B, table, (at + 1).int())
        h, _ = model.backbone(ids[:, i], rows, caches)
        out.append(model.logits(h))
    return torch.stack(out, 1)


def compare(logits: Tensor, truth: Tensor, ids: Tensor) -> dict[str, float]:
    """error: of the logits, each position's mean taken off, which changes no probability. kl: of the distributions."""
    p, q = truth.log_softmax(-1), logits.log_softmax(-1)
    centred = truth - truth.mean(-1, keepdim=True)
    off = logits - logits.mean(-1, keepdim=True) - centred
    nats = -q[:, :-1].gather(-1, ids[:, 1:, None]).mean().item()
    return dict(
        nats=nats, perplexity=math.exp(nats), error=(off.norm() / centred.norm()).item(),
        largest=off.abs().max().item(), kl=(p.exp() * (p - q)).sum(-1).mean().item(),
        same=(logits.argmax(-1) == truth.argmax(-1)).double().mean().item(),
    )  # fmt: skip


def measure(folder: Path, ids: Tensor) -> list[dict]:
    models = {name: load_model(folder, TYPES[name]) for name in ("fp32", "bf16")}
    rows, truth = [], None
    for model, cache in VARIANTS:
        logits = logits_through(models[model], ids, TYPES[cache])
        truth = logits if truth is None else truth
        rows.append(dict(model=model, cache=cache) | compare(logits, truth, ids))
    return rows


def held_out(run: Path, texts: int) -> tuple[Tensor, dict]:
    """[texts, L] tokens that the run did not train on, and its settings."""
    settings = json.loads((run / "settings.json").read_text())
    settings = settings.get("settings", settings)
    config = json.loads((run / "model/config.json").read_text())
    tokenizer, cache = load_tokenizer(run / "model"), run / "data/tokens.bin"
    docs = gather_tokens(settings.get("data"), tokenizer, config["vocab_size"], cache)
    _, docs = hold_out(docs, settings["holdout"])
    packed = Packed(docs, settings["seq_len"], None)
    there = docs.tokens // settings["seq_len"]
    ids = packed.batch([i * there // texts for i in range(texts)])[0]
    about = {k: settings[k] for k in ("model", "steps", "batch", "seq_len", "lr", "seed")}
    return torch.as_tensor(ids), about | dict(head_dim=config["head_dim"], texts=texts)


def block(result: dict) -> str:
    about, rows = result["about"], result["rows"]
    base = {r["model"]: r["perplexity"] for r in rows if r["cache"] == r["model"]}
    lines = [
        f"A `{about['model']}` model after {about['steps']} steps, heads of {about['head_dim']}, over {about['texts']}"
        f" held-out texts of {about['seq_len']} tokens",
        "read one by one through the cache, against fp32 with an fp32 cache; on a CPU,",
        "[cache.json](../benchmarks/studies/results/cache.json):", "",
    ]  # fmt: skip
    head = "model | cache | perplexity | against its own type | logits differ by | KL, nats | same likeliest token"
    lines += table(head, [
        (r["model"], r["cache"], f"{r['perplexity']:.4f}", f"{r['perplexity'] / base[r['model']] - 1:+.3%}",
         f"{r['error']:.2%}", f"{r['kl']:.1e}", f"{r['same']:.2%}") for r in rows
    ])  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="folder of a finished `make train`")
    parser.add_argument("--texts", type=int, default=64)
    args = parser.parse_args()
    if not (args.run / "model/config.json").is_file():
        raise InputError(f"{args.run} is no finished training run: it has no model/")
    ids, about = held_out(args.run, args.texts)
    result = origin() | dict(about=about, rows=measure(args.run / "model", ids))
    with atomic_write(RESULTS) as partial:
        partial.write_text(json.dumps(result, indent=1) + "\n")
    fill(PAGE_OF_RESULTS, dict(study_cache=block(result)))
    print(block(result))
    return 0


if __name__ == "__main__":
    sys.exit(command(main)())
