"""The settings of a training run: flag, default, help text and bounds of each, and the recipes that set several.

A recipe is a file recipes/NAME.json: `about`, `settings`, and optionally `default_for`, the model whose runs begin with
these settings. A recipe without it is a choice of --preset.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from ..errors import InputError
from ..nn.fp8 import RECOMPUTE, TRANSPOSED, WEIGHTS, WGRAD
from ..parallel.exchange import EXCHANGES, OVER_BUFFERS
from ..parallel.schedules import SCHEDULES
from .data.sources.options import TextOptions
from .optimizer import MASTERS, OPTIMIZERS
from .schedule import DECAYS, decay_length, parse_ramp
from .values import plain

TEXT_SETTINGS = [f.name for f in fields(TextOptions)]
RECIPES = {
    path.stem: json.loads(path.read_text()) for path in sorted((Path(__file__).parents[1] / "recipes").glob("*.json"))
}
MODEL_DEFAULTS = {r["default_for"]: r["settings"] for r in RECIPES.values() if "default_for" in r}
PRESETS = {name: r["settings"] for name, r in RECIPES.items() if "default_for" not in r}
BY_SIZE = ("lr", "warmup", "batch")  # settings that follow the model's size where no recipe gives them
# The settings that change a size of a model with random weights, with the field of its config.json.
SIZES = dict(
    layers="num_hidden_layers", dense_layers="first_k_dense_replace", hidden="hidden_size", heads="num_attention_heads",
    kv_heads="num_key_value_heads", head_dim="head_dim", intermediate="intermediate_size", experts="num_experts",
    topk="num_experts_per_tok", groups="n_group", top_groups="topk_group", moe_intermediate="moe_intermediate_size",
    positions="max_position_embeddings",
)  # fmt: skip

SPIKE_LOSS, SPIKE_NORM = 10, 30  # in 3 runs of tiny the highest of a normal step are 1.4 and 4.4 times the median


def flag(default, help: str, **options):
    """A field with its flag's help. options: `least` or `above`, bounds of a number; `shown`, the default in words; any
    others go to argparse."""
    return field(default=default, metadata=dict(help=help, **options))


@dataclass(frozen=True)
class Settings:
    """Settings of a run, named as the flags of `python -m ling_kernels.train` (see --help) with _ for -.

    lr, warmup and batch come from the recipe of a preset (recipes/), and for other models from their size (scaling.py).
    Paths may be Path objects, and numbers numpy's. Raises InputError for a value of another type; `Trainer` checks
    bounds, and settings against one another.
    """

    model: str = flag(
        "tiny",
        "tiny, mini, flash or 1t, a config.json or a folder with one (random weights), or a model's folder (its"
        " weights)",
    )
    mtp: int | None = flag(None, "MTP layers of a model with random weights", least=0, shown="the model's")
    layers: int | None = flag(None, "layers; this and other sizes are for random weights", least=1, shown="the model's")
    dense_layers: int | None = flag(None, "layers without experts at the beginning", least=0, shown="follows --layers")
    hidden: int | None = flag(None, "hidden size", least=1, shown="the model's")
    heads: int | None = flag(None, "attention heads", least=1, shown="follows --hidden")
    kv_heads: int | None = flag(None, "heads of keys and values", least=1, shown="follows --heads")
    head_dim: int | None = flag(None, "size of a head", least=1, shown="follows --hidden and --heads")
    intermediate: int | None = flag(None, "size of the dense layers' MLP", least=1, shown="follows --hidden")
    experts: int | None = flag(None, "routed experts of a layer", least=1, shown="the model's")
    topk: int | None = flag(None, "experts that a token goes to", least=1, shown="the model's")
    groups: int | None = flag(
        None, "groups of experts, of which a token chooses some", least=1, shown="follows --experts"
    )
    top_groups: int | None = flag(None, "groups that a token chooses", least=1, shown="follows --groups")
    moe_intermediate: int | None = flag(None, "size of an expert's MLP", least=1, shown="follows --hidden")
    positions: int | None = flag(None, "tokens of the longest sequence", least=2, shown="the model's")
    rope_theta: float | None = flag(
        None, "base of the rotary positions, also of a trained model", above=1, shown="the model's"
    )
    yarn: float | None = flag(
        None, "factor by which YaRN extends the model's positions, also a trained model's", above=1,
        shown="the model's",
    )  # fmt: skip
    vocab: int | str | None = flag(
        None,
        "size of the vocabulary of a model with random weights; auto: the tokenizer's, rounded up to a multiple of 128",
        least=1,
        shown="the model's; auto for tiny, where the tokenizer has more, and with sizes of one's own", metavar="N|auto",
    )  # fmt: skip
    data: tuple[str, ...] | None = flag(
        None,
        "text files, .json, .jsonl, .parquet, .arrow, .bin, or folders of them; .gz and .zst too; or"
        " PATH=WEIGHT for each, its share of the rows",
        nargs="+",
        shown="the text that ships in CPython",
        metavar="PATH",
    )
    tokenizer: str | None = flag(
        None,
        "a Hugging Face tokenizer.json or its folder",
        metavar="PATH",
        shown="the one in the model's directory, else byte-level",
    )
    text_field: str = flag("text", "field of .json and .jsonl, column of .parquet and .arrow, that holds the text")
    encoding: str = flag("utf-8", "encoding of text files, .json and .jsonl, for example gb18030, latin-1 or utf-16")
    separator: str | None = flag(
        None, "text that ends a document inside text files; \\n and \\t in it are line end and tab",
        shown="a file is one document",
    )  # fmt: skip
    special_tokens: bool = flag(
        False, "names of the tokenizer's special tokens in the data's text become these tokens",
        action=argparse.BooleanOptionalAction, shown="off, they are plain text",
    )  # fmt: skip
    holdout: int = flag(
        20, "every N-th document is kept for validation and never trained on; 0: none, with --val-data", least=0
    )
    val_data: tuple[str, ...] | None = flag(
        None, "further data to validate on, as val_loss/NAME", nargs="+", shown="none", metavar="NAME=PATH"
    )
    train_on: str = flag(
        "assistant", "in chats: train on the answers of the role assistant, or on all", choices=("assistant", "all")
    )

    lora_rank: int = flag(0, "train adapters of this rank (LoRA) over --model's weights; 0: all weights", least=0)
    lora_alpha: float | None = flag(None, "their product counts this over the rank", above=0, shown="twice the rank")
    lora_on: str = flag("attention,mlp,experts", "layers that get adapters; mlp: dense and shared", metavar="LAYERS")

    steps: int = flag(600, "optimizer steps of the whole run", least=1, shown="the recipe's, or else 600")
    seq_len: int = flag(256, "tokens in a row", least=2, shown="the recipe's, or else 256")
    batch: int | None = flag(None, "rows in a step", least=1, shown="the recipe's, or by the model's size")
    micro_batch: int | None = flag(None, "rows in a forward pass; gradients add up", least=1, shown="the whole batch")
    batch_ramp: str | None = flag(
        None,
        "begin with START rows a step and reach --batch after STEPS steps of the run",
        shown="no ramp",
        metavar="START:STEPS",
    )
    step_in_backward: bool = flag(
        False,
        "update each weight as soon as its gradient is complete and free the gradient: needs one micro batch and"
        " --clip 0",
        action=argparse.BooleanOptionalAction, shown="off",
    )  # fmt: skip
    optimizer: str = flag(
        "adamw", "adamw8bit keeps the moments in 8 bits; muon uses AdamW for embedding, head, routers and vectors",
        choices=OPTIMIZERS,
    )  # fmt: skip
    master: str = flag(
        "fp32",
        "precision of the weights that the optimizer updates; bf16 (matrices; adamw8bit and muon) rounds"
        " stochastically",
        choices=MASTERS,
    )  # fmt: skip
    lr: float | None = flag(
        None, "learning rate after the warm-up", above=0, shown="the recipe's, or by the model's size"
    )
    warmup: int | None = flag(
        None, "steps over which the learning rate rises to --lr", least=0, shown="the recipe's, or by --steps"
    )
    decay: str = flag(
        "none", "how the learning rate falls at the end of the run; none: it stays at --lr", choices=("none", *DECAYS)
    )
    decay_steps: int | None = flag(
        None, "steps of the decay, the last of the run", least=1,
        shown="all after the warm-up; for 1-sqrt a fifth of --steps",
    )  # fmt: skip
    min_lr: float = flag(0.0, "learning rate at the end of the decay", least=0)
    merge_last: int = flag(
        0, "keep a running merge of the weights of N of the last steps, --merge-every apart, and write it at the end;"
        " 0: none", least=0,
    )  # fmt: skip
    merge_every: int = flag(10, "steps between the weights that are merged", least=1)
    merge_weights: str = flag(
        "mean", "how much each counts, by the decay that it stands for: mean, 1-sqrt, cosine, ema:X, or numbers with"
        " commas between them, oldest first", metavar="NAME",
    )  # fmt: skip
    weight_decay: float = flag(0.1, "on matrices and embeddings, not on norms", least=0)
    clip: float = flag(1.0, "gradient norm above which gradients are scaled down; 0: never", least=0)
    z_loss: float = flag(3.5e-6, "coefficient of the router's z-loss", least=0)
    balance_rate: float = flag(1e-3, "change of each expert's bias in a step, towards an even load", least=0)
    seed: int = flag(0, "seed of the weights, the order of documents and the sample", least=0)

    eval_every: int = flag(100, "steps between validations; 0: only at the end", least=0)
    eval_rows: int = flag(64, "rows of a validation, always the same, evenly spaced", least=1)
    save_every: int = flag(200, "steps between checkpoints; 0: only at the end", least=0)
    keep: int = flag(
        2, "latest checkpoints to keep, besides the last that is known to be good and the one after it; 0: all", least=0
    )
    keep_every: int = flag(0, "keep the checkpoints of every N-th step for ever; 0: none", least=0)
    log_every: int = flag(10, "steps between lines; on a terminal a progress bar takes their place", least=1)
    max_bad_steps: int = flag(5, "stop after this many skipped steps in a row", least=1)
    spike_loss: float | None = flag(
        None,
        "skip a step whose loss is more than X times the median of the last 32 that were not skipped; 0: never",
        least=0, shown=SPIKE_LOSS,
    )  # fmt: skip
    spike_norm: float | None = flag(
        None, "the same for the gradient norm", least=0, shown=f"{SPIKE_NORM}, or 0 with --step-in-backward"
    )
    sample_tokens: int = flag(200, "tokens of a sample; 0: none, not at the end either", least=0)
    sample_every: int = flag(0, "steps between samples during training, of the same prompt; 0: none", least=0)
    profile: int = flag(
        0, "steps to profile after 3 others: a trace, a table and on a GPU a memory snapshot in RUN/profile; 0: none",
        least=0,
    )  # fmt: skip
    wandb: str | None = flag(None, "log to this project of wandb, too; TensorBoard needs no flag", shown="no wandb",
                             metavar="PROJECT")  # fmt: skip
    dp: int | None = flag(
        None, "data-parallel processes, started by torchrun, which divide the rows of a step", least=1,
        shown="all processes over --pp, --cp and --tp",
    )  # fmt: skip
    dp_replicate: int = flag(
        1, "copies of the optimizer's state, each divided over --dp / N neighbours, such as those of a machine; only"
        " sums of gradients go from copy to copy", least=1,
    )  # fmt: skip
    ep: int = flag(1, "processes among those of --dp, --cp and --tp that divide the experts of each layer", least=1)
    exchange: str = flag(
        "bf16", "how rows travel to the experts of other processes: as they are; in FP8, which needs --precision fp8"
        " --fp8-scales pow2; in bf16 by the package deep_ep; over torch's symmetric memory, by NVSHMEM",
        choices=EXCHANGES + OVER_BUFFERS,
    )  # fmt: skip
    exchange_by_nodes: bool = flag(
        False, "send a token to a machine once, whatever the number of its experts there: for an --ep of all processes"
        " of several machines", action=argparse.BooleanOptionalAction, shown="off",
    )  # fmt: skip
    cp: int = flag(1, "processes that divide the tokens of each row, for long rows (context parallel)", least=1)
    vocab_parallel: int = flag(
        1, "processes among those of --dp, --cp and --tp that divide the rows of embedding and head", least=1
    )
    tp: int = flag(1, "processes that divide heads, MLPs and the tokens of each row (tensor parallel)", least=1)
    pp: int = flag(
        1, "processes that divide the layers, a pipeline; --dp x --cp x --tp x --pp is their number", least=1
    )
    pipeline: str | None = flag(
        None,
        "the pipeline's stages, as Megatron writes them: E embedding, t layer, m MTP layer, L head and losses, |"
        " between stages, x*n and (...)*n; each process takes every --pp-th stage",
        shown="equally many layers in each", metavar="LAYOUT",
    )  # fmt: skip
    schedule: str | None = flag(
        None, f"the order of the pipeline's work: {', '.join(SCHEDULES)}, or a .csv file of actions as torch and"
        " torchtitan read it", shown="1F1B, or Interleaved1F1B with several stages a process", metavar="NAME|FILE.csv",
    )  # fmt: skip
    dist_timeout: float | None = flag(
        None, "seconds that a process waits for another in a step", above=0, shown="torch's: 600 on GPUs, else 1800"
    )
    device: str = flag("auto", "auto uses a GPU where torch finds one", choices=("auto", "cpu", "cuda"))
    precision: str = flag(
        "auto",
        "bf16 is autocast over fp32 weights; auto is bf16 on a GPU; fp8 is bf16 with FP8 products in the layers",
        choices=("auto", "bf16", "fp32", "fp8"),
    )
    recompute: str = flag(
        "none",
        "what the backward recomputes: nothing; norms and activations; experts up to their down projection; whole"
        " layers. norm_act and experts need --precision fp8",
        choices=RECOMPUTE,
    )
    recompute_mtp: bool = flag(
        False, "recompute whole MTP layers too, whatever --recompute says of the others: a pipeline's last stage, with"
        " MTP and the head, keeps the most of a micro batch", action="store_true",
    )  # fmt: skip
    fp8_wgrad: str = flag(
        "auto", "precision of weight gradients' products; auto is bf16 for experts with few rows", choices=WGRAD
    )
    fp8_weights: str = flag("each_forward", "when weights are quantised to FP8; kept: once a step; only: while they are"
                            " read, for --lora-rank, in place of others", choices=(*WEIGHTS, "only"))  # fmt: skip
    fp8_transposed: str = flag(
        "direct", "how long transposed FP8 weights are kept; per_step is the old name of kept",
        choices=[*dict.fromkeys((*TRANSPOSED, "per_step"))],
    )  # fmt: skip
    fp8_scales: str = flag("fp32", "scales of any value, or powers of two", choices=("fp32", "pow2"))
    fp8_watch: int = flag(0, "steps between measurements of FP8's error in each layer's operands; 0: none", least=0)
    fp8_fallback: int = flag(
        0,
        "measurements in a row outside its band after which a layer switches to bf16; 0: it is only reported",
        least=0,
    )
    threads: int | None = flag(
        None, "CPU threads", least=1, shown="one per core that is idle at the start, or 1 if that is faster"
    )

    def __post_init__(self):
        for f in fields(self):
            object.__setattr__(self, f.name, plain(f, getattr(self, f.name)))
        for name in BY_SIZE:
            if getattr(self, name) is None and name in self.recipe():
                object.__setattr__(self, name, plain(FIELDS[name], self.recipe()[name]))
        if self.fp8_transposed == "per_step":  # the old name, for one version
            object.__setattr__(self, "fp8_transposed", "kept")

    def recipe(self) -> dict:
        """The settings that the preset as it is begins with; none for other sizes and other models."""
        own_sizes = any(getattr(self, name) is not None for name in SIZES)
        return {} if own_sizes else MODEL_DEFAULTS.get(self.model, {})

    @property
    def text_options(self) -> TextOptions:
        return TextOptions(**{name: getattr(self, name) for name in TEXT_SETTINGS})

    @property
    def ramp(self) -> tuple[int, int] | None:
        return parse_ramp(self.batch_ramp) if self.batch_ramp else None

    @property
    def spikes(self) -> tuple[float, float]:
        """The factors of loss and gradient norm above which a step is a spike; 0: never."""
        loss, norm = self.spike_loss, self.spike_norm
        norm = (0 if self.step_in_backward else SPIKE_NORM) if norm is None else norm
        return SPIKE_LOSS if loss is None else loss, norm

    @property
    def lr_schedule(self) -> dict:
        """The arguments of schedule.learning_rate."""
        decay_steps = decay_length(self.decay, self.decay_steps, self.warmup, self.steps)
        return dict(
            lr=self.lr, warmup=self.warmup, decay=self.decay, decay_steps=decay_steps, min_lr=self.min_lr,
            steps=self.steps,
        )  # fmt: skip


FIELDS = {f.name: f for f in fields(Settings)}

# Settings that a resumed run may change; changes.py keeps a record of them.
CHANGEABLE_ON_RESUME = {
    "data", "batch", "batch_ramp", "micro_batch", "lr", "warmup", "decay", "decay_steps", "min_lr", "merge_last",
    "merge_every", "merge_weights", "weight_decay", "clip", "z_loss", "balance_rate", "steps", "eval_every",
    "save_every", "keep", "keep_every", "log_every", "max_bad_steps", "sample_tokens", "sample_every", "profile",
    "wandb", "device", "threads", "val_data", "eval_rows", "dp", "dp_replicate", "ep", "exchange", "exchange_by_nodes",
    "cp", "tp", "vocab_parallel", "pp", "pipeline", "schedule", "dist_timeout", "precision", "master", "recompute",
    "recompute_mtp", "fp8_weights", "fp8_wgrad", "fp8_transposed", "fp8_scales", "fp8_watch", "fp8_fallback",
    "spike_loss", "spike_norm", "step_in_backward",
}  # fmt: skip

# Why a run keeps others. Those about the data change together with it: new data is read from its beginning.
WHY_WITH_DATA = dict(
    {name: "the run's texts are tokenised with it" for name in TEXT_SETTINGS},
    holdout="it decides which documents are trained on", train_on="the run's chats are tokenised with it",
)  # fmt: skip
WHY_KEPT = WHY_WITH_DATA | dict(
    seq_len="the run's position is a number of rows of that length", seed="the order of the data follows from it",
    optimizer="another one has other states",
)  # fmt: skip


def settings_of(options: dict, saved: dict | None = None) -> Settings:
    """Settings from options (`preset`, and settings by name) over the model's defaults, or over the saved
    settings of the run to resume. Raises InputError where a resumed run cannot change a setting."""
    options = plain_options(PRESETS.get(options.get("preset"), {}) | options)
    options.pop("preset", None)
    if options.get("fp8_transposed") == "per_step":
        print("warning: --fp8-transposed per_step is deprecated and means kept", file=sys.stderr)
    if saved is None:
        return Settings(**(Settings(**options).recipe() | options))
    before = from_json(saved)
    options = {name: value for name, value in options.items() if value is not None or name not in BY_SIZE}
    new_data = options.get("data", before.data) != before.data
    changeable = {*CHANGEABLE_ON_RESUME, *(WHY_WITH_DATA if new_data else ())}
    for name, value in options.items():
        if name not in changeable and value != getattr(before, name):
            flag, why = f"--{name.replace('_', '-')}", WHY_KEPT.get(name, "it belongs to the run's weights")
            remedy = "change it together with --data, or " if name in WHY_WITH_DATA else ""
            old = "not given" if getattr(before, name) is None else repr(getattr(before, name))
            raise InputError(f"{name} is {old} in the run to resume and {value!r} here, but {why}:"
                             f" {remedy}leave {flag} out")  # fmt: skip
    if options.get("pp", before.pp) != before.pp:  # the layout is of the old number of processes
        options.setdefault("pipeline", None)
        options.setdefault("schedule", None)
    after = replace(before, **options)
    if after.optimizer == "muon" and after.master != before.master:
        raise InputError(f"--master {after.master}: the run has {before.master}, with which muon keeps other states")
    return after


def plain_options(options: dict) -> dict:
    """The options in the types of the settings. Raises InputError for one that is no setting, or of another type."""
    known = {f.name: f for f in fields(Settings)}
    if unknown := options.keys() - known.keys() - {"preset"}:
        raise InputError(f"there is no setting {', '.join(sorted(unknown))}")
    return {name: plain(known[name], value) if name in known else value for name, value in options.items()}


def to_json(settings: Settings) -> dict:
    return json.loads(json.dumps(asdict(settings)))


def from_json(saved: dict) -> Settings:
    if unknown := saved.keys() - {f.name for f in fields(Settings)}:
        raise InputError(f"the run has settings that this version does not know: {', '.join(sorted(unknown))}")
    return Settings(**saved)
