"""python -m ling_kernels.generate --model DIR --prompt "...": stream text from a checkpoint."""

import argparse
import errno
import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ..backend import why_not_forced
from ..commands import Parser, command
from ..errors import InputError
from ..files import read_json, user_path
from ..model import LingConfig, load_model, resolve_model
from ..model.config_json import is_integer
from ..model.sample import Sampling
from ..tokenizer import Tokenizer, load_tokenizer
from .adapters import read_flags
from .engine import Engine
from .request import max_sequence_tokens
from .text import keep, repeats, stream_text


def arguments() -> Parser:
    parser = Parser("python -m ling_kernels.generate", description=__doc__)
    add_model_flags(parser)
    add_adapter_flag(parser)
    add = parser.add_argument
    add("--prompt", required=True, metavar="TEXT", help="text to continue; - reads it from standard input")
    add("--chat", action="store_true", help="apply the tokenizer's chat template: the prompt is a user message")
    add("--system", metavar="TEXT", help="system message, with --chat")
    add("--tools", metavar="FILE", help="JSON list of the tools that an answer may call, with --chat")
    add("--max-new-tokens", type=int, metavar="N", help="default 256, or the rest of the model's positions")
    add_sampling_flags(parser)
    add("--stop", action="append", default=[], metavar="TEXT", help="stop string; the text ends before it; repeatable")
    add("--ignore-eos", action="store_true", help="continue after an end token")
    add("--echo", action=argparse.BooleanOptionalAction, default=False, help="print the prompt first")
    add("--stats", action="store_true", help="print tokens per second to standard error")
    add("--draft", type=int, default=0, metavar="N", help="draft tokens per step, from the MTP layer if there is one")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    return to_terminal(lambda: run(args))


def to_terminal(run: Callable[[], None]) -> int:
    """Run what writes text to standard output; returns the exit code of how it ended."""
    if sys.stdout is None:
        raise InputError("standard output is closed")
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # the terminal may lack some characters
    try:
        run()
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except torch.OutOfMemoryError:
        raise InputError("out of GPU memory: try fewer --max-new-tokens, or --device cpu") from None
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # Without this, Python reports the error again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno == errno.ENOSPC:
            raise InputError("no space left for standard output") from None
        return 141  # the reader closed the pipe
    return 0


def run(args: argparse.Namespace) -> None:
    sampling = sampling_of(args)
    config, folder = resolve_checkpoint(args.model)
    if "" in args.stop:
        raise InputError("--stop is empty")
    tokenizer = find_tokenizer(args.tokenizer, folder, config)
    prompt, ids = read_prompt(args, tokenizer)
    positions = max_sequence_tokens(config.max_positions, args.draft)
    new = max_new_tokens(args.max_new_tokens, len(ids), positions)
    stop = () if args.ignore_eos else stop_token_ids(config, tokenizer, folder)
    adapters = adapter_of(args, config, folder)
    options = dict(sampling=sampling, max_new_tokens=new, stop_token_ids=stop, adapter=next(iter(adapters), None))
    size = len(ids) + new
    with make_engine(folder, args, cache_tokens=size, max_running=1, draft=args.draft, adapters=adapters) as engine:
        if args.echo:
            write(prompt)
        write_text(args, engine, tokenizer, ids, options)


def write_text(args: argparse.Namespace, engine: Engine, tokenizer: Tokenizer, ids: list[int], options: dict) -> None:
    """Write the text after a prompt as it comes, then what the flags ask for; options: of `Engine.stream`."""
    times, last, new_ids = [time.perf_counter()], "", []
    for piece in stream_text(keep(engine.stream(ids, **options), new_ids), tokenizer, args.stop, ids):
        times.append(time.perf_counter())
        write(piece)
        last = piece or last
    if not last.endswith("\n"):
        write("\n")
    if args.temperature == 0 and repeats(new_ids):
        print("the text repeats itself: try --temperature 0.7, or --repetition-penalty 1.1", file=sys.stderr)
    if args.stats:
        start, *after = times
        count = len(after) - 1  # tokens; the last piece is text that was held back
        first, rate = after[0] - start, (count - 1) / (after[-1] - after[0]) if count > 1 else 0.0
        drafts = f", {engine.accepted} of {engine.drafted} draft tokens accepted" if args.draft else ""
        print(
            f"{len(ids)} prompt tokens in {first:.2f} s, {count} new tokens at {rate:.1f} tokens/s{drafts}",
            file=sys.stderr,
        )


def resolve_checkpoint(model: str) -> tuple[LingConfig, Path]:
    """(configuration, folder) of --model. Raises InputError for a preset, which has no weights."""
    config, folder = resolve_model(model)
    if folder is None:
        raise InputError(f"--model {model} is a preset, which has no weights: give a checkpoint folder")
    return config, folder


def find_tokenizer(path: str | None, folder: Path, config: LingConfig) -> Tokenizer:
    """The tokenizer of --tokenizer, else the checkpoint's. Raises InputError if it does not fit the model."""
    if path is None and not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder} has no tokenizer.json: give --tokenizer (a path, or `bytes` for the built-in one)")
    tokenizer = load_tokenizer(None if path == "bytes" else path or folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}")
    return tokenizer


def read_prompt(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """The prompt as text and as ids, after the chat template; an empty prompt becomes BOS, or EOS without one."""
    prompt = args.prompt
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not UTF-8: {error}") from None
    if args.chat:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        tools = None if args.tools is None else read_tools(user_path(args.tools, "--tools"))
        prompt = tokenizer.apply_chat_template([*system, {"role": "user", "content": prompt}], tools=tools)
    elif args.system is not None or args.tools is not None:
        raise InputError(f"--{'tools' if args.system is None else 'system'} needs --chat")
    ids = tokenizer.encode(prompt, special=args.chat)
    return prompt, ids or [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]


def read_tools(file: Path) -> list[dict]:
    """The descriptions of tools in a JSON file. Raises InputError."""
    try:
        tools = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--tools {file}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"--tools {file}: it is not readable JSON: {error}") from None
    if not (isinstance(tools, list) and tools and all(isinstance(tool, dict) and tool for tool in tools)):
        raise InputError(f"--tools {file}: it is not a list of objects, each the description of a tool")
    return tools


def max_new_tokens(requested: int | None, prompt: int, positions: int) -> int:
    """New tokens after `prompt` prompt tokens: --max-new-tokens, or by default up to 256."""
    if prompt >= positions:
        raise InputError(f"the prompt is {prompt} tokens; prompt and new tokens have {positions} positions")
    if requested is None:
        return min(256, positions - prompt)
    if requested < 1:
        raise InputError(f"--max-new-tokens is {requested}; it must be at least 1")
    if prompt + requested > positions:
        raise InputError(
            f"--max-new-tokens {requested} after {prompt} prompt tokens exceeds the model's {positions} positions"
        )
    return requested


def stop_token_ids(config: LingConfig, tokenizer: Tokenizer, folder: Path) -> set[int]:
    """The end tokens of config.json, generation_config.json, the tokenizer and its template, and Ling's chat format."""
    file = folder / "generation_config.json"
    more = read_json(file).get("eos_token_id") if file.is_file() else None
    more = more if isinstance(more, list) else [] if more is None else [more]
    if not all(is_integer(token) for token in more):
        raise InputError(f"{file}: eos_token_id is {more}, neither an integer nor a list of them")
    turn = tokenizer.vocab.get("<|role_end|>", tokenizer.eos_id)
    return {*config.eos_token_ids, *tokenizer.ends(), turn, *more}


def add_sampling_flags(parser: Parser) -> None:
    """Add the flags that `sampling_of` reads."""
    add = parser.add_argument
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample from the likeliest tokens up to probability P")
    add("--top-k", type=int, default=0, metavar="K", help="sample from the K likeliest tokens")
    add("--min-p", type=float, default=0.0, metavar="P", help="sample from tokens P times as likely as the likeliest")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 makes earlier tokens less likely")
    add("--seed", type=int, metavar="N", help="seed of the sampling, for reproducible text")


def sampling_of(args: argparse.Namespace) -> Sampling:
    return Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed)


def add_model_flags(parser: Parser) -> None:
    """Add the flags for checkpoint, tokenizer, device and precision."""
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="checkpoint folder: config.json, safetensors, tokenizer.json")
    add("--tokenizer", metavar="PATH", help="another tokenizer.json or folder; bytes: the built-in tokenizer")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--precision", choices=("auto", "fp32", "bf16", "fp8"), default="auto",
        help="auto: bf16 on a GPU, fp32 on a CPU; fp8: bf16 with FP8 weights in the layers")  # fmt: skip
    add("--fp8-head", action="store_true", help="with --precision fp8: FP8 weights in lm_head too")
    add("--tp", type=int, default=1, metavar="N", help="divide the model over N GPUs of this machine (default: 1)")


def add_adapter_flag(parser: Parser) -> None:
    """Add the flag that `adapter_of` reads."""
    parser.add_argument("--adapter", metavar="DIR", help="folder of a LoRA adapter over the model")


def adapter_of(args: argparse.Namespace, config: LingConfig, folder: Path) -> dict[str, Path]:
    """The folder of --adapter by the name that requests give it; {} without one. Raises InputError for an adapter that
    is not for the model."""
    if args.adapter == "":
        raise InputError("--adapter is empty")
    return {} if args.adapter is None else read_flags([f"adapter={args.adapter}"], "", config, folder)


def make_engine(
    folder: Path, args: argparse.Namespace, progress: Callable[[int, int], None] | None = None, **options
) -> Engine:
    """An engine over the model that the flags describe; progress: of `load_model`; options: Engine's."""
    if args.tp < 1:
        raise InputError(f"--tp is {args.tp}; it must be at least 1")
    if args.tp == 1:
        return Engine(load_model(folder, **load_options(args), progress=progress), **options)
    from .divided import DividedEngine  # it takes torch.distributed

    return DividedEngine(folder, args.tp, load_options(args), progress, **options)


def load_options(args: argparse.Namespace) -> dict:
    """Keyword arguments of load_model from the flags."""
    device, precision = args.device, args.precision
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU")
    if reason := why_not_forced(torch.device(device)):
        raise InputError(reason)
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    if args.fp8_head and precision != "fp8":
        raise InputError("--fp8-head needs --precision fp8")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return dict(device=device, dtype=dtype, fp8=precision == "fp8", fp8_head=args.fp8_head)


def write(text: str) -> None:
    """Write to standard output at once, to a terminal without control characters."""
    if sys.stdout.isatty():  # generated text must not control the terminal
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
    sys.stdout.write(text)
    sys.stdout.flush()
