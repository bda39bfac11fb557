"""The trainer and the engine on the virtual GPU, beside their references on the CPU. Returns 1 where they differ.

    python -m tests.gpu train [--steps 3] [--precision fp8] [--backend triton]
    python -m tests.gpu generate [--tokens 6] [--precision fp8] [--backend triton]

Backend cuda takes a model whose sizes csrc/ supports, and any op that falls back is an error, but for one that Triton
has to run in FP8; triton takes tiny.
"""

import re
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from tests import conftest  # noqa: F401  puts the virtual GPU under ling_kernels, before that is imported
from tests.gpu import build, triton_driver

from ling_kernels.backend import force  # isort: skip
from ling_kernels.commands import Parser, command  # isort: skip
from ling_kernels.errors import InputError  # isort: skip
from ling_kernels.generate import Engine  # isort: skip
from ling_kernels.model import Ling, LingConfig, save_model  # isort: skip
from ling_kernels.nn.fp8 import to_fp8  # isort: skip
from ling_kernels.nn.fp8_inference import quantize_for_inference_  # isort: skip
from ling_kernels.train import Settings, Trainer  # isort: skip
from tests.engines import NO_STOP, ReplayedGraphs  # isort: skip

FALLBACK = "swiglu_bwd: csrc/ does not support a column-wise copy of dx; Triton runs"  # in FP8, as on a GPU
TOLERANCE = 0.02  # of a loss: bf16 and FP8 products, summed in another order


def config_of(backend: str) -> LingConfig:
    sizes = dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
                 num_key_value_heads=1, head_dim=128, num_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2,
                 moe_intermediate_size=128, max_position_embeddings=256, initializer_range=0.1)  # fmt: skip
    tiny = replace(LingConfig.tiny(), num_nextn_predict_layers=1)
    return replace(tiny, **sizes) if backend == "cuda" else tiny


def compare(backend: str, run, same) -> int:
    """Print run()'s rows on the virtual GPU and by the references side by side; 1 if any two differ."""
    results = []
    for name in (backend, "torch"):
        begin = time.monotonic()
        with force(name), warnings.catch_warnings():
            if name == "cuda":
                warnings.filterwarnings("error", message=".*(Triton runs|other ops compose it|reference runs)")
                warnings.filterwarnings("ignore", message=re.escape(FALLBACK))
            results.append(run())
        print(f"{name}: {time.monotonic() - begin:.1f} s", flush=True)
    failed = 0
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        failed |= not same(got, want)
        print(f"{i + 1}: {got} on the virtual GPU, {want} by the references{'' if same(got, want) else '   DIFFERENT'}")
    return failed


def train(options) -> int:
    with tempfile.TemporaryDirectory() as tmp:
        folder, model = Path(tmp), Ling(config_of(options.backend))
        model.init_weights(torch.Generator().manual_seed(0))
        save_model(model, folder / "model", dtype=torch.float32)
        texts = folder / "texts"
        texts.mkdir()
        for page in ("kernels", "ops"):
            (texts / f"{page}.txt").write_text((build.ROOT / f"docs/{page}.md").read_text())
        settings = Settings(
            model=str(folder / "model"), data=(str(texts),), holdout=2, steps=options.count, seq_len=48, batch=2,
            warmup=1, precision=options.precision, threads=1,
            fp8_wgrad="fp8",
        )  # fmt: skip
        runs = iter("12")

        def run():
            trainer = Trainer(settings, folder / f"run{next(runs)}")
            return [round(trainer.step()["loss"], 5) for _ in range(options.count)]

        return compare(options.backend, run, lambda a, b: abs(a - b) <= TOLERANCE * b)


def generate(options) -> int:
    """Greedy tokens of three requests, decoded together through the engine's graphs."""
    model = Ling(config_of(options.backend))
    model.init_weights(torch.Generator().manual_seed(0))
    model.to(torch.bfloat16).eval()
    if options.precision == "fp8":
        to_fp8(model)
        quantize_for_inference_(model)
    prompts = [[5, 6, 7, 8, 9], [1] * 20, [3, 1, 4, 1, 5, 9, 2, 6]]

    def run():
        engine = Engine(model, cache_tokens=400, page_size=16, max_running=len(prompts))
        engine.overlap = True
        forward = engine.forward
        forward.graphs = ReplayedGraphs(forward.compute, forward.padding_lane, len(prompts), engine.device)
        return engine.generate(prompts, max_new_tokens=options.count, **NO_STOP)

    with torch.inference_mode():
        return compare(options.backend, run, lambda a, b: a == b)


@command
def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m tests.gpu", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, dest="command", parser_class=Parser)
    for f, flag, default in ((train, "--steps", 3), (generate, "--tokens", 6)):
        flags = commands.add_parser(f.__name__)
        flags.set_defaults(run=f)
        flags.add_argument(flag, type=int, default=default, dest="count")
        flags.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
        flags.add_argument("--precision", choices=("bf16", "fp8"), default="bf16")
    options = parser.parse_args(argv)
    if options.count < 1:
        raise InputError(f"{options.count} {'steps' if options.run is train else 'tokens'}: at least 1")
    if torch.cuda.is_available():
        raise InputError("there is a GPU, and tests use it")
    if missing := build.missing() if options.backend == "cuda" else triton_driver.missing():
        raise InputError(f"the virtual GPU needs {missing}")
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
