"""The model that a run trains: a preset or a config.json with sizes of its own and random weights, or a folder with
weights; the vocabulary, which may follow the tokenizer; the end token, on which both must agree."""

import os
import re
from dataclasses import fields, replace
from math import ceil
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...files import user_path
from ...model import LingConfig, resolve_model
from ...model.config import PRESETS
from ...tokenizer import Tokenizer, load_tokenizer
from ..settings import SIZES, Settings

WEIGHT_FILES = ("*.safetensors*", "*.bin", "*.pt", "*.pth", "*.gguf")
VOCABULARY = 128  # --vocab auto gives a multiple: FP8 blocks and tiles of lm_head and cross entropy have 128 columns
HEAD_DIM = 128  # of all published models, and what the attention kernels are built for


def model_config(settings: Settings, checkpoint: Path | None = None) -> tuple[LingConfig, Path | None]:
    """The model's configuration, and the folder with the weights to start from if there is one.

    For a checkpoint, its own configuration. Raises InputError where the run's preset or config.json has changed since.
    """
    if checkpoint is None:
        return initial_config(settings)
    config = LingConfig.from_json(checkpoint / "config.json")
    if settings.model not in PRESETS and (not os.path.exists(settings.model) or weights_in(Path(settings.model))):
        return config, None  # the run has the weights already, and the folder may be gone
    initial, _ = initial_config(settings, vocabulary=config.vocab_size)
    for f in fields(config):
        saved, now = getattr(config, f.name), getattr(initial, f.name)
        if f.compare and not f.name.endswith("token_id") and saved != now:
            raise InputError(f"{f.name} is {saved} in {checkpoint} and {now} in {settings.model}: not the same model")
    return config, None


def initial_config(s: Settings, vocabulary: int | None = None) -> tuple[LingConfig, Path | None]:
    """Configuration and folder of the weights, None for random ones. vocabulary: instead of one that follows the
    tokenizer."""
    config, weights = find_model(s.model)
    sizes = {name: value for name in SIZES if (value := getattr(s, name)) is not None}
    given = sizes | {name: value for name in ("mtp", "vocab") if (value := getattr(s, name)) is not None}
    if weights:
        for name, value in given.items():
            raise InputError(f"{flag_of(name)} {value}: {weights} has weights, which fix the model's sizes")
        return with_positions(config, s), weights
    if s.mtp is not None:
        config = replace(config, num_nextn_predict_layers=s.mtp)
    if sizes:
        config = with_sizes(config, sizes, s.model)
    if s.vocab == "auto" or (s.vocab is None and (sizes or s.model == "tiny")):
        size = vocabulary or load_tokenizer(s.tokenizer or own_tokenizer(s.model)).vocab_size
        # The preset as it is keeps its vocabulary where the tokenizer fits.
        if s.vocab == "auto" or sizes or size > config.vocab_size:
            config = replace(config, vocab_size=vocabulary or VOCABULARY * ceil(size / VOCABULARY))
    elif isinstance(s.vocab, int):
        config = replace(config, vocab_size=s.vocab)
    return with_positions(config, s), None


def with_positions(config: LingConfig, s: Settings) -> LingConfig:
    """The configuration with the rotary base and the YaRN scaling of the settings, which change no weight."""
    if s.rope_theta is not None:
        config = replace(config, rope_theta=s.rope_theta)
    if s.yarn is not None:
        if config.rope_scaling:
            raise InputError(f"--yarn {s.yarn:g}: {s.model} has YaRN already, {config.rope_scaling['factor']:g}")
        scaling = dict(type="yarn", factor=s.yarn, original_max_position_embeddings=config.max_position_embeddings)
        config = replace(config, rope_scaling=scaling)
    return config


def find_model(model: str) -> tuple[LingConfig, Path | None]:
    """Configuration and folder of the weights, None where there are none: of a preset, of a config.json, or of a folder
    with one."""
    if model in PRESETS:
        return LingConfig.preset(model), None
    path = user_path(model)
    if path.is_file():
        if path.suffix != ".json":
            raise InputError(f"--model {model} is a file: give a config.json, or the folder of a model")
        return LingConfig.from_json(path), None
    config, _ = resolve_model(model)
    return config, path if weights_in(path) else None


def weights_in(path: Path) -> bool:
    """Whether a folder holds weights of any kind; incomplete ones count, lest random ones take their place."""
    return path.is_dir() and any(True for pattern in WEIGHT_FILES for _ in path.glob(pattern))


def own_tokenizer(model: str) -> Path | None:
    """The folder of the model, or of its config.json, if it has a tokenizer."""
    if model in PRESETS:
        return None
    folder = Path(model) if os.path.isdir(model) else Path(model).parent
    return folder if (folder / "tokenizer.json").is_file() else None


def model_name(model: str) -> str:
    """The model's name in the names of runs."""
    path = Path(model)
    return path.parent.name if path.name == "config.json" else path.stem if path.suffix == ".json" else path.name


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def with_sizes(config: LingConfig, sizes: dict[str, int], model: str) -> LingConfig:
    """The configuration with the given sizes, by setting, and others that follow them in the configuration's ratios.

    Raises InputError, with flags for names, for sizes that do not go together.
    """
    new: dict[str, Any] = {SIZES[name]: value for name, value in sizes.items()}
    shown = " ".join(f"{flag_of(name)} {value}" for name, value in sizes.items())
    for name, value in sizes.items():
        if value < (name == "dense_layers"):
            raise InputError(f"{flag_of(name)} {value}: it must be at least 1")
    try:
        follow_hidden(config, new)
        follow_heads(config, new)
        follow_layers(config, new)
        follow_experts(config, new)
        return replace(config, **new)
    except InputError as error:
        names = {field: flag_of(name) for name, field in SIZES.items()}
        text = re.sub(rf"\b({'|'.join(names)})\b", lambda match: names[match[1]], str(error))
        raise InputError(f"{shown} over {model}: {text}") from None


def follow_hidden(config: LingConfig, new: dict) -> None:
    """Sizes of MLPs and experts, as multiples of 8: 16 bytes in bf16, to which rows are aligned."""
    hidden = new.get("hidden_size", config.hidden_size)
    for name in ("intermediate_size", "moe_intermediate_size"):
        if hidden != config.hidden_size:
            new.setdefault(name, 8 * ceil(getattr(config, name) * hidden / config.hidden_size / 8))


def follow_heads(config: LingConfig, new: dict) -> None:
    """Heads and their size: together they have the width that the configuration's have, relative to hidden_size."""
    hidden, before = new.get("hidden_size", config.hidden_size), config.num_attention_heads
    groups = before // config.num_key_value_heads  # query heads of a key and value head
    width, rest = divmod(before * config.head_dim * hidden, config.hidden_size)
    heads, head_dim = new.get("num_attention_heads"), new.get("head_dim")
    if heads is None and head_dim is None and hidden == config.hidden_size:
        heads, head_dim = before, config.head_dim
    elif heads is None and head_dim is None:
        many = width // HEAD_DIM >= 4 and width % (groups * HEAD_DIM) == 0
        heads = width // HEAD_DIM if many else before
    if head_dim is None:
        head_dim, rest = divmod(width, heads)
        if rest or not head_dim:
            raise InputError(f"{heads} heads do not divide {width}: give num_attention_heads or head_dim")
    elif heads is None:
        heads, rest = divmod(width, head_dim)
        if rest or not heads:
            raise InputError(f"head_dim {head_dim} does not divide {width}: give num_attention_heads")
    if "num_key_value_heads" not in new and heads % groups:
        raise InputError(f"{heads} heads are not a multiple of the {groups} of a key and value head: give"
                         " num_key_value_heads")  # fmt: skip
    new.update(num_attention_heads=heads, head_dim=head_dim)
    new.setdefault("num_key_value_heads", heads // groups)


def follow_layers(config: LingConfig, new: dict) -> None:
    """The share of dense layers, but at most one in 20 as in Ling-2.0, rounded up: tiny's share is for 4 layers."""
    layers = new.get("num_hidden_layers", config.num_hidden_layers)
    dense = config.first_k_dense_replace
    if dense and layers != config.num_hidden_layers:
        share = round(dense * layers / config.num_hidden_layers)
        new.setdefault("first_k_dense_replace", min(max(1, share), ceil(layers / 20), layers - 1))


def follow_experts(config: LingConfig, new: dict) -> None:
    """As many groups as before where each gets two experts or more, and the same share of them open to a token, or more
    where the experts in these are fewer than a token takes."""
    experts, topk = (new.get(n, getattr(config, n)) for n in ("num_experts", "num_experts_per_tok"))
    if topk > experts:
        raise InputError(f"a token takes {topk} of {experts} experts: give num_experts_per_tok or num_experts")
    if "n_group" not in new:
        possible = [n for n in range(1, config.n_group + 1) if experts % n == 0 and (n == 1 or experts // n >= 2)]
        new["n_group"] = possible[-1] if experts != config.num_experts else config.n_group
    groups = new["n_group"]
    if "topk_group" not in new and groups <= experts:
        share = max(1, round(groups * config.topk_group / config.n_group))
        new["topk_group"] = max(share, min(groups, ceil(topk / (experts // groups))))


def fits_vocabulary(tokenizer: Tokenizer, config: LingConfig, s: Settings, weights: Path | None = None) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        source = s.model if s.vocab is None else f"--vocab {s.vocab}"
        remedy = "" if weights else "; --vocab auto gives the model as many as the tokenizer has"
        raise InputError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, more than the {config.vocab_size} of {source}{remedy}"
        )


def with_end_token(config: LingConfig, tokenizer: Tokenizer, weights: Path | None) -> tuple[LingConfig, list[str]]:
    """The configuration with the tokenizer's end token, which ends the documents of the data, and a line that says so
    where the model's folder had another."""
    if not weights:
        return replace(config, eos_token_id=tokenizer.eos_id, pad_token_id=tokenizer.eos_id), []
    if tokenizer.eos_id in config.eos_token_ids:
        return config, []
    return replace(config, eos_token_id=tokenizer.eos_id), [
        f"warning    the end token is {config.eos_token_id} in {weights} and {tokenizer.eos_id} in the tokenizer"
        f" ({tokenizer.decode([tokenizer.eos_id])}), which ends the data's documents: the trained model has the latter"
    ]
