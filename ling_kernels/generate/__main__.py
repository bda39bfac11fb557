"""python -m ling_kernels.generate --model DIR --prompt "...": the text a checkpoint writes, as it comes."""

import argparse
import os
import re
import sys
import time
from pathlib import Path

import torch

from ..errors import InputError, Parser, command
from ..model import LingConfig, load_model, resolve_model
from ..tokenizer import Tokenizer, load_tokenizer, read_json
from .engine import Engine
from .sample import Sampling
from .scheduler import longest
from .text import stream_text


def arguments() -> Parser:
    parser = Parser("python -m ling_kernels.generate", description=__doc__, allow_abbrev=False)
    add_model(parser)
    add = parser.add_argument
    add("--prompt", required=True, metavar="TEXT", help="what to go on from; - reads it from standard input")
    add("--chat", action="store_true", help="the prompt is a user's message: apply the tokenizer's chat template")
    add("--system", metavar="TEXT", help="system message, with --chat")
    add("--max-new-tokens", type=int, metavar="N", help="default 256, or what the model's length leaves")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 (default) takes the likeliest token")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest that hold P of the probability")
    add("--top-k", type=int, default=0, metavar="K", help="draw among the K likeliest")
    add("--min-p", type=float, default=0.0, metavar="P", help="draw among those P times as likely as the likeliest")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1 makes what was said less likely")
    add("--seed", type=int, metavar="N", help="the same text again for the same seed")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be given several times")
    add("--ignore-eos", action="store_true", help="go on after an end token")
    add("--echo", action=argparse.BooleanOptionalAction, default=False, help="print the prompt first")
    add("--stats", action="store_true", help="tokens per second, on standard error")
    add("--draft", type=int, default=0, metavar="N", help="tokens to guess ahead in each step, by MTP if it is there")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    sys.stdout.reconfigure(errors="replace")  # for a terminal that cannot show every character
    try:
        run(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except torch.OutOfMemoryError:
        raise InputError("the GPU's memory is too small: fewer --max-new-tokens, or --device cpu") from None
    except BrokenPipeError:
        # Who read our output has left. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    return 0


def run(args: argparse.Namespace) -> None:
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.repetition_penalty, args.seed)
    config, folder = checkpoint(args.model)
    if "" in args.stop:
        raise InputError("--stop is empty")
    tokenizer = find_tokenizer(args.tokenizer, folder, config)
    prompt, ids = read_prompt(args, tokenizer)
    new = room(args.max_new_tokens, len(ids), longest(config.max_positions, args.draft))
    ends = () if args.ignore_eos else end_ids(config, tokenizer, folder)
    model = load_model(folder, **placement(args))
    engine = Engine(model, cache_tokens=len(ids) + new, max_running=1, draft=args.draft)
    tokens = engine.stream(ids, sampling=sampling, max_new_tokens=new, ends=ends)

    if args.echo:
        show(prompt)
    times, last = [time.perf_counter()], ""
    for piece in stream_text(tokens, tokenizer, args.stop):
        times.append(time.perf_counter())
        show(piece)
        last = piece or last
    if not last.endswith("\n"):
        show("\n")
    if args.stats:
        start, *after = times
        count = len(after) - 1  # of tokens: the last piece is only what had been held back
        first, rate = after[0] - start, (count - 1) / (after[-1] - after[0]) if count > 1 else 0.0
        said = f"{len(ids)} tokens read in {first:.2f} s, {count} written at {rate:.1f} tokens/s"
        drafts = f", {engine.right} of {engine.guessed} drafts were right" if args.draft else ""
        print(said + drafts, file=sys.stderr)


def checkpoint(model: str) -> tuple[LingConfig, Path]:
    config, folder = resolve_model(model)
    if folder is None:
        raise InputError(f"--model {model} is a preset, which has no weights: give a checkpoint folder")
    return config, folder


def find_tokenizer(given: str | None, folder: Path, config: LingConfig) -> Tokenizer:
    if given is None and not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder} has no tokenizer.json: give --tokenizer (a path, or `bytes` for the built-in one)")
    tokenizer = load_tokenizer(None if given == "bytes" else given or folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}")
    return tokenizer


def read_prompt(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """What the model reads, as text and as ids; an empty prompt is the token that a text begins with."""
    prompt = args.prompt
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode().removesuffix("\n")
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not UTF-8: {error}") from None
    if args.chat:
        system = [] if args.system is None else [{"role": "system", "content": args.system}]
        prompt = tokenizer.apply_chat_template([*system, {"role": "user", "content": prompt}])
    elif args.system is not None:
        raise InputError("--system is for --chat")
    ids = tokenizer.encode(prompt, special=args.chat)
    return prompt, ids or [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id]


def room(asked: int | None, prompt: int, positions: int) -> int:
    """How many tokens to write after `prompt` tokens."""
    if prompt >= positions:
        raise InputError(f"the prompt is {prompt} tokens, and the model takes {positions} with what it writes")
    if asked is None:
        return min(256, positions - prompt)
    if asked < 1:
        raise InputError(f"--max-new-tokens is {asked}; it must be at least 1")
    if prompt + asked > positions:
        raise InputError(
            f"--max-new-tokens {asked} after {prompt} of prompt is more than the model's {positions} positions"
        )
    return asked


def end_ids(config: LingConfig, tokenizer: Tokenizer, folder: Path) -> set[int]:
    """The tokens that end a text, by config.json, generation_config.json, the tokenizer, or Ling's chat format."""
    more = folder / "generation_config.json"
    more = read_json(more).get("eos_token_id", []) if more.is_file() else []
    turn = tokenizer.vocab.get("<|role_end|>", tokenizer.eos_id)
    return {config.eos_token_id, tokenizer.eos_id, turn, *(more if isinstance(more, list) else [more])}


def add_model(parser: Parser) -> None:
    """Flags of what is loaded, and where to."""
    add = parser.add_argument
    add("--model", required=True, metavar="DIR", help="checkpoint folder: config.json, safetensors, tokenizer.json")
    add("--tokenizer", metavar="PATH", help="not the checkpoint's but this tokenizer.json or folder; bytes: built in")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--precision", choices=("auto", "fp32", "bf16", "fp8"), default="auto",
        help="auto is bf16 on a GPU, fp32 on a CPU; fp8 is bf16 with FP8 weights in the layers")  # fmt: skip
    add("--fp8-head", action="store_true", help="with --precision fp8: lm_head too")


def placement(args: argparse.Namespace) -> dict:
    """load_model's options."""
    device, precision = args.device, args.precision
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no GPU")
    if precision == "auto":
        precision = "bf16" if device == "cuda" else "fp32"
    if args.fp8_head and precision != "fp8":
        raise InputError("--fp8-head needs --precision fp8")
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    return dict(device=device, dtype=dtype, fp8=precision == "fp8", fp8_head=args.fp8_head)


def show(text: str) -> None:
    if sys.stdout.isatty():  # a model must not steer the terminal
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", text)
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
