"""python -m ling_kernels.train.convert: checkpoints to and from torch.distributed.checkpoint (DCP), the format of
torchtitan and of torch's FSDP2 examples; from Megatron-core's DCP too.

    to-dcp CHECKPOINT OUT                 weights as `Ling.state_dict()` names them, moments as optimizer.state.NAME.KEY
    from-dcp FOLDER OUT --model CONFIG    a model's folder, with the optimizer's files where FOLDER has moments

A tensor has the bits that it had. Memory holds one output file (10 GB) and one parameter.
"""

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..commands import Parser, command
from ..errors import InputError
from ..files import user_path
from ..model import LingConfig, resolve_model
from ..model.checkpoint import check_shapes
from ..model.weight_files import SHARD_BYTES, WeightReader, write_weights
from ..parallel.boxes import shape_of
from ..parallel.checkpoints import OPTIMIZER, moment, saved_moments
from ..parallel.official import Parameter, official_keys, whole_on_meta
from ..parallel.ranks import Ranks
from ..parallel.shares import Shares
from ..tokenizer import load_tokenizer
from .checkpoint import new_folder
from .dcp_names import Source, moment_of, source_of

STATE = "optimizer.state."


def to_dcp(checkpoint: str | Path, out: str | Path) -> tuple[int, int]:
    """Write a checkpoint or a model's folder as a DCP folder, which must not exist. Returns the numbers of parameters
    and of the optimizer's tensors. Raises InputError for what cannot be read or written."""
    from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, save

    folder = user_path(checkpoint)
    shares = Shares(whole_on_meta(LingConfig.from_json(folder / "config.json")), Ranks())
    official = shares.official
    with ExitStack() as stack:
        weights = stack.enter_context(WeightReader(folder))
        check_shapes(((key.key, key.shape) for parameter in official.values() for key in parameter.keys), weights)
        tensors = {name: like(weights.wide(p.keys[0].key), p.shape) for name, p in official.items()}
        read = {name: partial(whole_weight, weights, parameter) for name, parameter in official.items()}
        if any(folder.glob(f"{OPTIMIZER}.safetensors*")):
            reader = stack.enter_context(WeightReader(folder, OPTIMIZER))
            for key, saved in saved_moments(reader, official.keys()).items():
                tensors[STATE + key] = like(reader.part(saved[0].name, ()), shape_of(s.box for s in saved))
                read[STATE + key] = partial(moment, reader, key, saved, shares)

        class Planner(DefaultSavePlanner):
            """Reads a tensor when it is written."""

            def lookup_object(self, index):
                return read[index.fqn]()

        with new_folder(out) as path, quiet():
            save(tensors, storage_writer=FileSystemWriter(path), planner=Planner(), no_dist=True)
    return len(official), len(tensors) - len(official)


def from_dcp(folder: str | Path, out: str | Path, model: str, tokenizer: str | Path | None = None) -> tuple[int, int]:
    """Write a DCP folder as a model's folder, which must not exist.

    model: a preset, a config.json or a folder with one. Weights keep their precision. Returns the numbers of parameters
    and of the optimizer's tensors. Raises InputError where the folder lacks a parameter, or has another shape of it.
    """
    config = config_of(model)
    dcp, official = DCP(user_path(folder)), official_keys(config)
    sources = sources_of(dcp, official, config)
    owner = {key.key: name for name, parameter in official.items() for key in parameter.keys}
    types = {name: dcp.types[source.names[0]].properties.dtype for name, source in sources.items()}

    def tensors(keys: list[str]) -> dict[str, Tensor]:
        names = dict.fromkeys(owner[key] for key in keys)
        loaded, found = dcp.read([n for name in names for n in sources[name].names]), {}
        for name in names:
            whole = dcp.parameter(sources[name], official[name], loaded)
            found |= {key.key: key.of(whole) for key in official[name].keys}
        return {key: found[key].contiguous() for key in keys}

    moments = {key: name for name in dcp.types if (key := moment_of(name, official.keys()))}
    sizes = {
        key.key: torch.Size(key.shape).numel() * types[name].itemsize
        for name, parameter in official.items()
        for key in parameter.keys
    }
    with new_folder(out) as path:
        write_weights(path, sizes, tensors, SHARD_BYTES)
        config.to_json(path / "config.json", fp8=False, dtype=types["lm_head.weight"])
        if tokenizer is not None:
            load_tokenizer(tokenizer).save(path)
        if moments:
            sizes = {key: dcp.bytes(name) for key, name in moments.items()}
            read = lambda keys: dict(zip(keys, dcp.read([moments[key] for key in keys]).values(), strict=True))  # noqa: E731
            write_weights(path, sizes, read, SHARD_BYTES, OPTIMIZER)
    return len(official), len(moments)


def config_of(model: str) -> LingConfig:
    """Of a preset, a config.json or a folder with one."""
    return LingConfig.from_json(Path(model)) if model.endswith(".json") else resolve_model(model)[0]


def sources_of(dcp: "DCP", official: dict[str, Parameter], config: LingConfig) -> dict[str, Source]:
    """Where every parameter is in a DCP folder. Raises InputError where one is not there."""
    found = {}
    for name, parameter in official.items():
        source = source_of(name, parameter, config, dcp.types)
        if source is None:
            raise InputError(f"{dcp.folder} has no {name}, nor its official keys, nor Megatron's name of it")
        found[name] = source
    return found


class DCP:
    """The tensors of a DCP folder. types: sizes and dtypes by name."""

    def __init__(self, folder: Path):
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self.folder = folder
        try:
            found = FileSystemReader(folder).read_metadata().state_dict_metadata
        except Exception as error:  # also pickle's
            raise InputError(f"{folder} is no folder of torch.distributed.checkpoint: {error}") from None
        self.types = {name: value for name, value in found.items() if isinstance(value, TensorStorageMetadata)}

    def bytes(self, name: str) -> int:
        return self.types[name].size.numel() * self.types[name].properties.dtype.itemsize

    def read(self, names: Sequence[str]) -> dict[str, Tensor]:
        from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, load
        from torch.distributed.checkpoint.api import CheckpointException

        tensors = {n: torch.empty(self.types[n].size, dtype=self.types[n].properties.dtype) for n in names}
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        try:
            with quiet():
                load(tensors, storage_reader=FileSystemReader(self.folder), planner=planner, no_dist=True)
        except (OSError, CheckpointException) as error:
            raise InputError(f"cannot read {self.folder}: {error}") from None
        return tensors

    def parameter(self, source: Source, parameter: Parameter, loaded: dict[str, Tensor]) -> Tensor:
        """A whole parameter from the tensors of its source. Raises InputError where it has another shape."""
        whole = source.make([loaded[name] for name in source.names])
        if whole.shape != parameter.shape:
            there, wanted = list(whole.shape), list(parameter.shape)
            raise InputError(f"{self.folder}: {source.names[0]} is {there}, by the model it should be {wanted}")
        return whole


def whole_weight(reader: WeightReader, parameter: Parameter) -> Tensor:
    whole = like(reader.wide(parameter.keys[0].key), parameter.shape, "cpu")
    for official in parameter.keys:
        official.of(whole).copy_(reader.wide(official.key))
    return whole


def like(t: Tensor, shape: torch.Size, device: str = "meta") -> Tensor:
    return torch.empty(shape, dtype=t.dtype, device=device)


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warning that there is one process."""
    with warnings.catch_warnings(action="ignore"):
        yield


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser("python -m ling_kernels.train.convert", description="Convert checkpoints to and from torch's DCP.")
    ways = parser.add_subparsers(dest="way", required=True)
    to = ways.add_parser("to-dcp", help="a run's checkpoint, or a model's folder, as a DCP folder")
    from_ = ways.add_parser("from-dcp", help="a DCP folder as a model's folder")
    for flags in (to, from_):
        flags.add_argument("folder")
        flags.add_argument("out", help="which must not exist")
    from_.add_argument("--model", required=True, help="a preset, a config.json, or a folder with one")
    from_.add_argument("--tokenizer", help="a tokenizer.json, or a folder with one, for OUT")
    args = parser.parse_args(argv)
    if args.way == "to-dcp":
        parameters, moments = to_dcp(args.folder, args.out)
    else:
        parameters, moments = from_dcp(args.folder, args.out, args.model, args.tokenizer)
    print(f"{args.out}: {parameters} parameters, {moments} tensors of an optimizer")


if __name__ == "__main__":
    sys.exit(main())
