"""The adapters (LoRA) that an engine serves: read from peft's folders, which the trainer writes too, and put over the
engine's model, so that each request of a batch may name one of them or none."""

import hashlib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import InputError
from ..files import read_json, user_path
from ..model import Ling, LingConfig
from ..model.weight_files import WeightReader
from ..nn.adapter_bank import AdapterRows, with_banks
from ..nn.lora import adapted
from ..parallel.adapters import PREFIX, adapted_weights, check_base, key_of
from ..parallel.boxes import Part
from ..parallel.checkpoints import ADAPTER
from ..parallel.decode import RankShare
from ..parallel.official import Official, Parameter

CONFIG = "adapter_config.json"
ALIGNED = 8  # ranks are padded to a multiple of it: rows of 16 bytes, which grouped products need
# Fields of adapter_config.json that change what an adapter computes, with the values of those that are supported.
PLAIN = dict(
    peft_type="LORA", bias="none", fan_in_fan_out=False, lora_bias=False, modules_to_save=None, alpha_pattern=None,
    layer_replication=None, trainable_token_indices=None, use_dora=False, use_qalora=False, use_bdlora=None,
    alora_invocation_tokens=None, arrow_config=None, kasa_config=None, monteclora_config=None,
)  # fmt: skip


class Adapter(NamedTuple):
    """An adapter of an engine."""

    name: str
    number: int
    seed: bytes  # of the hashes of cached pages: by content, as a page on a disk may outlive a name's meaning


class AdapterFolder:
    """An adapter's folder, adapter_config.json and adapter_model.safetensors.

    weights: of the whole model, from `adapted_weights`. parts: by official key, which part of a weight this process
    has; of others it has all. Raises InputError for an adapter that is not readable, or not of these weights.
    """

    def __init__(self, folder: str | Path, weights: Mapping[str, Parameter], parts: Mapping[str, Part] | None = None):
        self.folder = user_path(folder, "an adapter's folder")
        if not self.folder.is_dir():
            raise InputError(f"the adapter {folder} is no folder")
        self.parts = parts or {}
        self.scale = scale_of(self.folder / CONFIG)
        self.reader = WeightReader(self.folder, ADAPTER)
        shapes = {k.key.removesuffix(".weight"): k.shape for w in weights.values() for k in w.keys}
        self.modules = self._modules(shapes)
        for module in self.modules:
            self._check(module, *shapes[module])

    def _modules(self, known: Iterable[str]) -> set[str]:
        """The published modules that have an A and a B."""
        found: dict[str, set[str]] = {"A": set(), "B": set()}
        expected = {key_of(module, which): (module, which) for module in known for which in found}
        for key in self.reader.files:
            if key not in expected:
                raise InputError(f"the adapter {self.folder}: this model has no weight for {key}; adapters are of"
                                 " query_key_value, dense, gate_proj, up_proj and down_proj in its layers")  # fmt: skip
            module, which = expected[key]
            found[which].add(module)
        if lonely := sorted(found["A"] ^ found["B"]):
            raise InputError(f"the adapter {self.folder} has only one of lora_A and lora_B of {lonely[0]}")
        if not found["A"]:
            raise InputError(f"the adapter {self.folder} is empty")
        return found["A"]

    def _check(self, module: str, N: int, K: int) -> None:
        a, b = (self.reader.shape(key_of(module, which)) for which in "AB")
        rank = a[0] if a else 0
        if rank < 1 or a != [rank, K] or b != [N, rank]:
            raise InputError(f"the adapter {self.folder} is for another model: lora_A {a} and lora_B {b} of {module},"
                             f" which is [{N}, {K}]")  # fmt: skip

    def factors(self, weight: Parameter, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """a [(E,) r, K] and b [(E,) N, r] with alpha / r in it, on the CPU, for a weight [(E,) N, K] of this process's
        model; None where it leaves the weight as it is.

        A weight of two published ones, gate and up, has the ranks of both, unless they share their A.
        """
        *E, N, K = weight.shape
        of_expert: dict[tuple, list[Tensor]] = {}  # the different A of each expert
        parts = []
        for official in weight.keys:
            if official.key.removesuffix(".weight") in self.modules:
                a, b = self._read(official, dtype)
                expert, (rows, _) = official.box[:-2], official.box[-2:]
                before = of_expert.setdefault(expert, [])
                same = next((i for i, other in enumerate(before) if torch.equal(other, a)), len(before))
                before += [a] if same == len(before) else []
                start = sum(map(len, before[:same]))
                parts.append((expert, slice(*rows), slice(start, start + len(a)), b))
        if not parts:
            return None
        rank = max(sum(map(len, of_one)) for of_one in of_expert.values())
        A, B = torch.zeros(*E, rank, K, dtype=dtype), torch.zeros(*E, N, rank, dtype=dtype)
        for expert, of_one in of_expert.items():
            together = torch.cat(of_one)
            A[tuple(start for start, _ in expert)][: len(together)] = together
        for expert, rows, ranks, b in parts:
            B[tuple(start for start, _ in expert)][rows, ranks] = b
        return A, B

    def _read(self, official: Official, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """A and B of this process's part of the weight: of its rows the rows of B, of its columns the columns of A."""
        module = official.key.removesuffix(".weight")
        a, b = (self.reader.wide(key_of(module, which)).to(dtype) for which in "AB")
        if not (a.isfinite().all() and b.isfinite().all()):
            raise InputError(f"the adapter {self.folder}: {PREFIX}{module} has values that are not finite")
        b = b * self.scale(len(a))
        part = self.parts.get(official.key)
        if part is None:
            return a, b
        return (a, part.take(b)) if part.dim == 0 else (part.take(a), b)

    def digest(self) -> bytes:
        """16 bytes that tell its content from others'."""
        digest = hashlib.blake2b(digest_size=16)
        for path in (self.folder / CONFIG, *sorted({*self.reader.files.values()})):
            with open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
        return digest.digest()


def scale_of(file: Path):
    """A function of the rank that gives the factor of B A. Raises InputError for another kind of adapter."""
    about = read_json(file)
    for field, plain in PLAIN.items():
        if (value := about.get(field)) and value != plain:
            raise InputError(f"{file}: {field} {value!r} is not supported")
    alpha = about.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise InputError(f"{file}: lora_alpha is {alpha!r}, not a number")
    return lambda rank: alpha / (math.sqrt(rank) if about.get("use_rslora") else rank)


class Adapters:
    """Adapters by name over a model, which stays as it is.

    model: has its parameters, and adds to each row the adapter that `rows` names. share: by which the given model was
    loaded, where it is a part of one. Raises InputError for adapters that cannot be read or are of another model, and
    for layers that can have none.
    """

    def __init__(self, model: Ling, folders: Mapping[str, str | Path], share: RankShare | None = None):
        if not isinstance(folders, Mapping):
            raise InputError(f"adapters are {folders!r:.80}; they must be folders by name")
        for name in folders:
            if not (isinstance(name, str) and name.isprintable() and name.strip()):
                raise InputError(f"{name!r} cannot be the name of an adapter")
        weights = adapted_weights(model.config)
        whole, parts = (weights, {}) if share is None else (adapted_weights(share.config), share.parts)
        found = [AdapterFolder(folder, whole, parts) for folder in folders.values()]
        self.folders = dict(folders)
        self.named = {n: Adapter(n, i, f.digest()) for i, (n, f) in enumerate(zip(folders, found, strict=True))}
        self.rows = AdapterRows(len(found))
        embeddings = model.word_embeddings.weight  # of the type of the layers' rows
        self.model = with_banks(model, stacked(model, weights, found, embeddings), self.rows)

    def of(self, name: str | None) -> Adapter | None:
        """The adapter of this name, None of None. Raises InputError for an unknown one."""
        if name is None:
            return None
        if not isinstance(name, str) or name not in self.named:
            raise InputError(f"there is no adapter {name!r}; there are {', '.join(map(repr, self.named))}")
        return self.named[name]


def read_flags(flags: Iterable[str], model: str, config: LingConfig, folder: Path) -> dict[str, Path]:
    """The folders of flags NAME=FOLDER by name, beside the model of this name and folder. Raises InputError for those
    that do not fit it, before it is loaded."""
    folders: dict[str, Path] = {}
    for flag in flags:
        name, _, path = flag.partition("=")
        if not (name and path):
            raise InputError(f"--adapter {flag} is not NAME=FOLDER")
        if name in (model, *folders):
            raise InputError(f"--adapter {flag}: there is another model {name!r}")
        folders[name] = user_path(path, "--adapter")
    weights = adapted_weights(config) if folders else {}
    for path in folders.values():
        AdapterFolder(path, weights)
        check_base(path, folder)
    return folders


def stacked(
    model: Ling, weights: dict[str, Parameter], found: list[AdapterFolder], like: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """a and b of `with_banks` for all weights of the layers of which an adapter has one, of the type and on the device
    of `like`. Ranks and weights that an adapter has not are zeros."""
    layers: dict[int, list[str]] = {}  # the weights of each layer
    for name, (layer, _) in adapted(model).items():
        layers.setdefault(id(layer), []).append(name)
    wide = torch.promote_types(like.dtype, torch.float32)
    factors = {}
    for names in layers.values():
        of_layer = {name: [folder.factors(weights[name], wide) for folder in found] for name in names}
        if not any(any(of_weight) for of_weight in of_layer.values()):
            continue
        for name, of_weight in of_layer.items():
            *E, N, K = weights[name].shape
            rank = max((pair[0].shape[-2] for pair in of_weight if pair), default=1)
            rank = -(-rank // ALIGNED) * ALIGNED
            a, b = like.new_zeros(len(found), *E, rank, K), like.new_zeros(len(found), *E, N, rank)
            for i, pair in enumerate(of_weight):
                if pair:
                    r = pair[0].shape[-2]
                    a[i][..., :r, :], b[i][..., :r] = pair
            factors[name] = a, b
    return factors
