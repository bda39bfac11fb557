"""Checkpoints in the official format: config.json, *.safetensors with official keys, bf16 or block-FP8 weights.

An official tensor is a view of one of our parameters (gate and up projections are halves of gate_up, an expert is a
slice of [E, N, K]), so one table of views loads, saves and compares. Loading streams: never more than the model and
one tensor are in memory, on top of what the system maps of a shard.
"""

import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..files import whole
from ..nn.fp8 import Fp8Linear, fits, to_fp8
from ..nn.frozen import SCALES, freeze_
from ..op import E4M3
from ..ops.quantize import dequantize, quantize_weight
from .config import PRESETS, LingConfig
from .transformer import Ling

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def named_views(model: Ling, of: Callable[[Tensor], Tensor | None] = lambda p: p) -> Iterator[tuple[str, Tensor]]:
    """(official key, view) of every weight, its FP8 scales, and the expert biases.

    of=lambda p: p.grad gives the gradients' views. Parameters for which `of` returns None are left out.
    """
    layers = [(f"model.layers.{i}", layer) for i, layer in enumerate(model.layers)]
    layers += [(f"model.layers.{len(model.layers) + k}", mtp) for k, mtp in enumerate(model.mtp)]
    yield from _given(of, {"model.word_embeddings.weight": model.word_embeddings.weight})
    for prefix, module in layers:
        for name, p in [*module.named_parameters(), *module.named_buffers()]:
            if not name.endswith("counts") and (p := of(p)) is not None:
                yield from _official(f"{prefix}.{name.removeprefix('layer.')}", p)
    head = {f"lm_head.{name}": p for name, p in [*model.lm_head.named_parameters(), *model.lm_head.named_buffers()]}
    yield from _given(of, {"model.norm.weight": model.norm.weight} | head)


def _given(of, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    yield from ((k, t) for k, p in tensors.items() if (t := of(p)) is not None)


def _official(name: str, p: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Our name and parameter -> official keys and views of it."""
    name = re.sub(r"attention\.(query|key)_layernorm$", r"attention.\1_layernorm.weight", name)
    name = name.replace("mlp.router.", "mlp.gate.")
    if match := re.fullmatch(rf"(.*\.experts)\.(gate_up|down)({SCALES})?", name):
        for e in range(len(p)):
            yield from _official(f"{match[1]}.{e}.{match[2]}.weight{match[3] or ''}", p[e])
    elif ".gate_up.weight" in name:
        for half, view in zip(("gate_proj", "up_proj"), p.chunk(2), strict=True):
            yield name.replace("gate_up", half), view
    else:
        yield name.replace(".down.weight", ".down_proj.weight"), p


def resolve_model(name: str) -> tuple[LingConfig, Path | None]:
    """The name of a preset, or a checkpoint directory -> its configuration, and the directory or None."""
    if name in PRESETS:
        return LingConfig.preset(name), None
    folder = Path(name)
    if not folder.is_dir():
        raise InputError(f"unknown model {name!r}: neither a preset ({', '.join(PRESETS)}) nor a directory")
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no config.json, so it is no checkpoint")
    return LingConfig.from_json(folder / "config.json"), folder


def load_model(
    folder: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    fp8: bool = False,
    fp8_head: bool = False,
) -> Ling:
    """The model in a checkpoint directory, in eval mode, its expert biases in fp32.

    Block-FP8 weights are dequantised, but with fp8: then linear layers, MLPs and experts whose sizes are multiples of
    128 have FP8 weights alone, for inference; a checkpoint in dtype is quantised as it is read. fp8_head: the head too.
    Raises InputError that names the file and the key where one is missing, damaged or of another shape.
    """
    folder = Path(folder)
    config, found = resolve_model(str(folder))
    if found is None:
        raise InputError(f"{folder} is the name of a preset, which has no weights; give a checkpoint directory")
    with torch.device("meta"):
        model = Ling(config)
    model = model.to(dtype)
    if fp8:
        to_fp8(model)
        if fp8_head and fits(model.lm_head.weight):
            model.lm_head = Fp8Linear.of(model.lm_head)
        freeze_(model)
    model = model.to_empty(device=device)
    model.reset_buffers()
    where, views = _files(folder), dict(named_views(model))
    known = [key for key in views if not key.endswith(SCALES)]
    with torch.no_grad(), _Shards(folder) as shards:
        for key in sorted(known, key=lambda k: str(where.get(k))):  # shard by shard
            view = views[key]
            if key not in where:
                raise InputError(f"{folder}: the checkpoint has no {key}")
            tensor = shards.read(where[key], key)
            scale = _scale(shards, where, key, tensor) if tensor.dtype == E4M3 else None
            if tensor.shape != view.shape:
                raise InputError(
                    f"{where[key]}: {key} is {list(tensor.shape)}, config.json makes it {list(view.shape)}"
                )
            if view.dtype == E4M3:
                q, scale = (tensor, scale) if scale is not None else quantize_weight(tensor.to(view.device, dtype))
                view.view(torch.uint8).copy_(q.view(torch.uint8))
                views[key + SCALES].copy_(scale)
            else:
                view.copy_(tensor if scale is None else _dequantized(tensor, scale))
    known = {*known}
    unread = [k for k in where if k not in known and k.removesuffix(SCALES) not in known]
    if unread:
        warnings.warn(f"{folder}: {len(unread)} tensors were not read, the first is {unread[0]}", stacklevel=2)
    return model.eval()


def _scale(shards: "_Shards", where: dict[str, Path], key: str, q: Tensor) -> Tensor:
    """Of the block-FP8 weight `key`: [ceil(N/128), ceil(K/128)]."""
    scale_key = key + SCALES
    if scale_key not in where:
        raise InputError(f"{where[key]}: {key} is FP8 and the checkpoint has no {scale_key}")
    scale = shards.read(where[scale_key], scale_key).float()
    N, K = q.shape
    if scale.shape != (-(-N // 128), -(-K // 128)):
        raise InputError(f"{where[scale_key]}: {scale_key} is {list(scale.shape)} for {key} {list(q.shape)}")
    return scale


def _dequantized(q: Tensor, scale: Tensor) -> Tensor:
    N, K = q.shape
    padded = torch.zeros(scale.shape[0] * 128, scale.shape[1] * 128)
    padded[:N, :K] = q.float()
    return dequantize(padded, scale)[:N, :K]


def _files(folder: Path) -> dict[str, Path]:
    """Every key of a checkpoint -> the file that holds it."""
    index = folder / INDEX
    if index.is_file():
        try:
            return {k: folder / v for k, v in json.loads(index.read_text())["weight_map"].items()}
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index} is damaged: {error!r}") from None
    if (folder / SINGLE).is_file():
        with _Shards(folder) as shards:
            return dict.fromkeys(shards.keys(folder / SINGLE), folder / SINGLE)
    raise InputError(f"{folder} holds neither {SINGLE} nor {INDEX}")


class _Shards:
    """Reads tensors; keeps one file open at a time, and says which file is at fault."""

    def __init__(self, folder: Path):
        self.folder, self.path, self.file = folder, None, None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.path = self.file = None

    def open(self, path: Path):
        from safetensors import SafetensorError, safe_open

        if path != self.path:
            self.path = self.file = None
            try:
                self.file = safe_open(path, "pt")
            except (OSError, RuntimeError, SafetensorError) as error:  # torch's where there is too little to map it
                raise InputError(f"cannot read {path}: {error}") from None
            self.path = path
        return self.file

    def keys(self, path: Path) -> list[str]:
        return list(self.open(path).keys())

    def read(self, path: Path, key: str) -> Tensor:
        from safetensors import SafetensorError

        try:
            return self.open(path).get_tensor(key)
        except SafetensorError as error:
            raise InputError(f"{path}: {key} cannot be read: {error}") from None


def save_model(
    model: Ling, folder: str | Path, dtype: torch.dtype = torch.bfloat16, max_shard_bytes: int = 10 << 30
) -> None:
    """Write config.json and the weights in `dtype` under official keys; expert biases in fp32, FP8 weights as they are.

    Files get their names only when they are whole, the index after the shards and config.json last. Raises InputError
    where the folder cannot be written.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    shards, size = [{}], 0
    for key, view in named_views(model):
        bytes_ = view.numel() * kept(key, view, dtype).itemsize
        if shards[-1] and size + bytes_ > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = view
        size += bytes_
    names = [SINGLE] if len(shards) == 1 else [f"model-{i:05d}-of-{len(shards):05d}.safetensors"
                                               for i in range(1, len(shards) + 1)]  # fmt: skip
    weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
    index = json.dumps({"metadata": {"format": "pt"}, "weight_map": weight_map}, indent=2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, shard in zip(names, shards, strict=True):
            tensors = {k: v.detach().to("cpu", kept(k, v, dtype)).contiguous() for k, v in shard.items()}
            with whole(folder / name, durable=True) as path:
                save_file(tensors, path, metadata={"format": "pt"})
                path.chmod(0o644)  # safetensors makes files that only their owner may read
        if len(shards) > 1:
            with whole(folder / INDEX, durable=True) as path:
                path.write_text(index)
        stale = {*folder.glob("model*.safetensors"), folder / INDEX} - {folder / n for n in names}
        for path in stale - ({folder / INDEX} if len(shards) > 1 else set()):
            path.unlink(missing_ok=True)
        with whole(folder / "config.json", durable=True) as path:
            model.config.to_json(path, fp8=any(key.endswith(SCALES) for key in weight_map))
    except OSError as error:
        raise InputError(f"cannot write the checkpoint to {folder}: {error}") from None


def kept(key: str, view: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a tensor is in a checkpoint whose weights are dtype."""
    if key.endswith(("expert_bias", SCALES)):
        return torch.float32
    return E4M3 if view.dtype == E4M3 else dtype
