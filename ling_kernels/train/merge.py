"""python -m ling_kernels.train.merge: one model from several checkpoints of a run, in place of a learning-rate decay.

Ling-2.0 trains at a constant rate and then merges its last checkpoints (WSM, warm-up, stable, merge; arXiv 2507.17634).
With t_0 .. t_k the checkpoints, oldest first, and g_i the change from t_{i-1} to t_i,

    c_0 t_0 + ... + c_k t_k = t_0 + w_1 g_1 + ... + w_k g_k,    w_i = c_i + ... + c_k:

the merge is the model of a run whose updates decayed from 1 to 0 as w_1 >= ... >= w_k does, if the updates themselves
had stayed the same. So a decay gives the weights: c_0 = 1 - w_1, c_j = w_j - w_{j+1}, c_k = w_k.
"""

import argparse
import itertools
import math
import shutil
import sys
from collections.abc import Callable, Sequence
from functools import lru_cache
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from ..commands import Parser, command
from ..errors import InputError
from ..files import atomic_write, user_path
from ..model import Ling, LingConfig, named_views
from ..model.weight_files import WeightReader, stored_dtype, write_weights
from ..nn.fp8 import to_fp8
from ..nn.fp8_inference import SCALES, quantize_for_inference_
from ..op import E4M3
from ..ops.quantize import quantize_weight
from ..parallel.official import Official, official_keys
from .checkpoint import list_checkpoints, new_folder, step_of
from .convert import DCP, config_of, sources_of
from .report import read_lines
from .schedule import DECAYS

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp8": torch.bfloat16}
SHARD_BYTES = 2 << 30  # of an output file, which is in memory as a whole
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def decay_weights(decay: Sequence[float]) -> list[float]:
    """Weights c_0 .. c_k of k + 1 checkpoints from the decay w_1 .. w_k of the updates between them (WSM, equation 3).

    Raises InputError unless 1 >= w_1 >= ... >= w_k >= 0.
    """
    w = [1.0, *decay, 0.0]
    if not all(isinstance(x, Real) and math.isfinite(x) for x in w) or any(a < b for a, b in itertools.pairwise(w)):
        raise InputError(f"a decay falls from at most 1 to at least 0: {list(decay)}")
    return [float(a - b) for a, b in itertools.pairwise(w)]


def named_weights(decay: str, number: int) -> list[float]:
    """Weights of `number` checkpoints for a decay, oldest first.

    decay: of DECAYS. The decay of the i-th update is its value after i of `number` equal parts, so that a linear decay
    gives the mean, as in the paper, and `mean` is its other name. 1-sqrt is w_i = 1 - sqrt(i / k) with k = number - 1,
    as published, which leaves the last checkpoint out; cosine is ours. `ema:X` is the moving average
    m = (1 - X) m + X t from m = t_0 on. Numbers with commas between them
    are the weights themselves. Raises InputError for anything else, and for numbers that do not add up to 1.
    """
    if number < 1:
        raise InputError(f"a merge is of at least 1 checkpoint; got {number}")
    name, colon, value = decay.partition(":")
    decay = "linear" if decay == "mean" else decay
    if decay in DECAYS:
        parts = number - 1 if decay == "1-sqrt" else number
        return decay_weights([DECAYS[decay](i / parts) for i in range(1, number)])
    try:
        if name == "ema" and colon and 0 < (x := float(value)) < 1:
            return [(1 - x) ** (number - 1), *(x * (1 - x) ** (number - 1 - j) for j in range(1, number))]
        weights = [] if name == "ema" else [float(text) for text in decay.split(",")]
    except ValueError:
        weights = []
    if not weights:
        raise InputError(f"decay {decay!r}: it must be mean, {', '.join(DECAYS)}, ema:X with X between 0 and 1, or"
                         " the weights with commas between them")  # fmt: skip
    check_weights(weights, number)
    return weights


def check_weights(weights: Sequence[float], number: int) -> None:
    if number != len(weights) or not number:
        raise InputError(f"{number} checkpoints and {len(weights)} weights")
    if not all(math.isfinite(c) for c in weights) or abs(sum(weights) - 1) > 1e-6:
        raise InputError(f"the weights add up to {sum(weights):g}, not to 1: {list(weights)}")


def merge(
    checkpoints: Sequence[str | Path], weights: Sequence[float], out: str | Path, dtype: str = "bf16",
    model: str | None = None,
) -> None:  # fmt: skip
    """Write the weighted sum of checkpoint folders of one model to the new folder `out`.

    checkpoints: in the order of `weights`, whose sum is 1; model folders, or all of torch.distributed.checkpoint (DCP).
    model: of DCP folders, which hold no configuration: a preset, a config.json or a folder with one. Block-FP8 weights
    are dequantised. Sums are taken in fp64. Memory holds one output file (2 GiB) and one tensor, of DCP folders up to
    four parameters, however many checkpoints there are. dtype: bf16, fp32, or fp8, which quantises linear layers, MLPs
    and experts to block-FP8. config.json and the tokenizer are those of the last checkpoint, or of `model`. The folder
    appears whole or not at all. Raises InputError for checkpoints of different models.
    """
    folders = [user_path(c) for c in checkpoints]
    check_weights(weights, len(folders))
    with new_folder(out) as partial:
        if all_of_dcp(folders):
            if model is None:
                raise InputError(f"{folders[0]} is of torch.distributed.checkpoint, which holds no config.json: --model"
                                 " names its configuration")  # fmt: skip
            config, described = config_of(model), user_path(model)
            write_sum(partial, config, dtype, dcp_sums(folders, weights, config))
        else:
            if model is not None:
                raise InputError("--model is for folders of torch.distributed.checkpoint: these have a config.json")
            config, described = same_config(folders), folders[-1]
            readers = [WeightReader(folder) for folder in folders]
            for reader in readers:
                reader.refuse_two_checkpoints()
            write_sum(partial, config, dtype, lambda key, shape: weighted_sum(readers, weights, key, shape))
        for name in TOKENIZER_FILES:
            if (described / name).is_file():
                shutil.copyfile(described / name, partial / name)


def all_of_dcp(folders: Sequence[Path]) -> bool:
    """Whether the folders are of DCP. Raises InputError where some are and some are not."""
    of_dcp = [(folder / ".metadata").is_file() for folder in folders]
    if any(of_dcp) and not all(of_dcp):
        raise InputError(f"{folders[of_dcp.index(True)]} is of torch.distributed.checkpoint and"
                         f" {folders[of_dcp.index(False)]} is not: python -m ling_kernels.train.convert from-dcp makes"
                         " a model's folder of it")  # fmt: skip
    return all(of_dcp)


def same_config(folders: Sequence[Path]) -> LingConfig:
    """The last folder's configuration. Raises InputError where another folder is of another model."""
    configs = []
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise InputError(f"{folder} is not a checkpoint: it has no config.json")
        configs.append(LingConfig.from_json(folder / "config.json"))
    for folder, config in zip(folders, configs, strict=True):
        if config != configs[-1]:
            raise InputError(f"{folder} and {folders[-1]} are not of one model: their config.json differ")
    return configs[-1]


def write_sum(out: Path, config: LingConfig, dtype: str, total_of: Callable[[str, list[int]], Tensor]) -> None:
    """Write config.json and weights. total_of: the merged fp64 tensor of an official key and its shape."""
    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r}: it must be one of {', '.join(DTYPES)}")
    fp8 = dtype == "fp8"
    with torch.device("meta"):
        model = Ling(config)
    if fp8:
        to_fp8(model)
        quantize_for_inference_(model)
    views = dict(named_views(model))
    types = {key: stored_dtype(key, view.dtype, DTYPES[dtype]) for key, view in views.items()}

    def merged(keys: list[str]) -> dict[str, Tensor]:
        tensors = {}
        for key in keys:
            total = total_of(key, list(views[key].shape))
            if types[key] == E4M3:
                tensors[key], tensors[key + SCALES] = quantize_weight(total.float())
            else:
                tensors[key] = total.to(types[key])
        return tensors

    sizes = {}
    for key, view in views.items():  # a weight and its scales must come into one file
        if not key.endswith(SCALES):
            scales = views.get(key + SCALES)
            sizes[key] = view.numel() * types[key].itemsize + (0 if scales is None else 4 * scales.numel())
    write_weights(out, sizes, merged, SHARD_BYTES)
    with atomic_write(out / "config.json", durable=True) as path:
        config.to_json(path, fp8=any(kind == E4M3 for kind in types.values()), dtype=DTYPES[dtype])


def weighted_sum(readers: Sequence[WeightReader], weights: Sequence[float], key: str, shape: list[int]) -> Tensor:
    total = torch.zeros(shape, dtype=torch.float64)
    for reader, c in zip(readers, weights, strict=True):
        if key not in reader.files:
            raise InputError(f"{reader.folder}: the checkpoint has no {key}")
        if (found := reader.shape(key)) != shape:
            raise InputError(f"{reader.files[key]}: {key} is {found}, by config.json it should be {shape}")
        total += c * reader.wide(key).double()
    return finite(total, key)


def dcp_sums(
    folders: Sequence[Path], weights: Sequence[float], config: LingConfig
) -> Callable[[str, list[int]], Tensor]:
    """The merged fp64 tensor of an official key, from DCP folders. Raises InputError where one lacks a parameter."""
    official = official_keys(config)
    owner: dict[str, tuple[str, Official]] = {key.key: (name, key) for name, p in official.items() for key in p.keys}
    stores = [(dcp, sources_of(dcp, official, config)) for dcp in map(DCP, folders)]

    @lru_cache(maxsize=2)  # the keys of experts alternate between two parameters
    def parameter(name: str) -> Tensor:
        total = torch.zeros(official[name].shape, dtype=torch.float64)
        for (dcp, sources), c in zip(stores, weights, strict=True):
            whole = dcp.parameter(sources[name], official[name], dcp.read(sources[name].names))
            total += whole.double().mul_(c)
        return finite(total, name)

    def total_of(key: str, shape: list[int]) -> Tensor:
        name, part = owner[key]
        return part.of(parameter(name)).contiguous()

    return total_of


def finite(total: Tensor, name: str) -> Tensor:
    if not total.isfinite().all():
        raise InputError(f"{name} of the merged model has values that are not finite: a checkpoint has diverged")
    return total


def validations(run: Path) -> dict[int, float]:
    """The validation losses of a run by step, those that are finite."""
    rows = ((row["step"], row.get("val_loss")) for row in read_lines(run / "metrics.jsonl"))
    return {step: loss for step, loss in rows if loss is not None and math.isfinite(loss)}


def chosen(run: Path, last: int | None, best: int | None) -> list[Path]:
    """The last N checkpoints of a run, or the N with the lowest validation loss, oldest first; all by default."""
    found = list_checkpoints(run)
    if not found:
        raise InputError(f"{run} holds no checkpoints")
    losses = validations(run)
    if best:
        found = [c for c in found if step_of(c) in losses]
    number = last or best or len(found)
    if number > len(found):
        validated = " with a validation loss: --eval-every says at which steps there is one" if best else ""
        raise InputError(f"{run} holds {len(found)} checkpoints{validated}; {number} are asked for")
    if not best:
        return found[-number:]
    return sorted(sorted(found, key=lambda c: losses[step_of(c)])[:number], key=step_of)


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("python -m ling_kernels.train.merge", description="Merge checkpoints of one model into another.")
    parser.add_argument(
        "checkpoints", nargs="+", help="a run, for its checkpoints; or checkpoint folders, oldest first"
    )
    parser.add_argument("--out", required=True, help="the model's folder, which must not exist")
    parser.add_argument("--last", type=count, metavar="N", help="of a run, the last N (default: all)")
    parser.add_argument("--best", type=count, metavar="N", help="of a run, the N with the lowest validation loss")
    parser.add_argument(
        "--decay",
        metavar="NAME",
        help=f"the decay that the merge stands for: {', '.join(DECAYS)}, or ema:X, a moving average with the share X"
        " of the newest (default: linear, the mean)",
    )
    parser.add_argument("--weights", type=float, nargs="+", metavar="X", help="one for each checkpoint, in their order")
    parser.add_argument(
        "--model", metavar="CONFIG", help="of folders of torch.distributed.checkpoint: a preset, a config.json, or a"
        " folder with it and the tokenizer",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="of the weights (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.decay and args.weights:
        raise InputError("--decay and --weights both say how much each checkpoint counts: give one")
    if args.last and args.best:
        raise InputError("--last and --best both choose checkpoints: give one")
    folders = [user_path(c) for c in args.checkpoints]
    if len(folders) == 1 and (folders[0] / "checkpoints").is_dir():
        folders = chosen(folders[0], args.last, args.best)
    elif args.last or args.best:
        raise InputError("--last and --best choose from a run: name its folder alone")
    weights = args.weights or named_weights(args.decay or "linear", len(folders))
    merge(folders, weights, user_path(args.out, "--out"), args.dtype, args.model)
    print(f"{args.out}: {len(folders)} checkpoints")
    for folder, c in zip(folders, weights, strict=True):
        print(f"  {c:.4f}  {folder}")


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of checkpoints")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
