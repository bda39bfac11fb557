"""The data of a run: the sources that it trains on, their mixture, and the sets that it validates on."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from ..errors import InputError, counted, warn
from ..tokenizer import Tokenizer
from .data import Documents, cut, describe, gather_tokens, hold_out, join, open_chats, packed_rows
from .data.chats import chats_and_texts, write_chats
from .data.mixture import Mixture, Rows, parse_sources, shares_of
from .data.sources import find_files
from .settings import Settings
from .validation import ValidationSet, split_name, validation_set


@dataclass(frozen=True)
class Source:
    """A part of the mixture, or all of the data. Its documents are a list of texts, of chats, or both."""

    name: str
    training: list[Documents]
    held_out: list[Documents]
    rows: Rows
    share: float  # of the rows


@dataclass(frozen=True)
class Corpus:
    sources: list[Source]
    rows: Rows  # of all sources
    validation: list[ValidationSet]
    training: Documents  # of all sources
    held_out: Documents  # that val_loss is about
    about: dict  # size and checksum, which a checkpoint keeps and a resumed run compares

    @property
    def mixed(self) -> bool:
        return len(self.sources) > 1

    def epochs(self, rows: int) -> dict[str, float]:
        """epoch/NAME, the passes through each source of a mixture that the first `rows` rows take."""
        if not isinstance(self.rows, Mixture) or not self.mixed:
            return {}
        return {f"epoch/{s.name}": n for s, n in zip(self.sources, self.rows.epochs(rows), strict=True)}

    def lines(self) -> list[str]:
        """What the start of a run says about a mixture, chats and the named validation sets."""
        lines = []
        if chats := [docs for s in self.sources for docs in s.training if docs.masks]:
            tokens, trained = (sum(getattr(docs, n) for docs in chats) for n in ("tokens", "trained_tokens"))
            lines.append(
                f"chats      {counted(sum(map(len, chats)), 'conversation')} to train on: {trained:,} of their"
                f" {tokens:,} tokens ({100 * trained / tokens:.3g} %) count in the loss"
            )
        for s in self.sources if self.mixed else ():
            tokens, number = sum(docs.tokens for docs in s.training), sum(map(len, s.training))
            lines.append(
                f"source     {s.name}: {100 * s.share:.4g} % of the rows, {s.rows.rows_per_epoch:,.0f} rows an epoch,"
                f" {tokens:,} tokens of {counted(number, 'document')}"
            )
        named = [v for v in self.validation if v.name is not None and v.name not in {s.name for s in self.sources}]
        return lines + [f"validation {v.name}: {v.targets:,} tokens to predict" for v in named]


def open_corpus(
    settings: Settings,
    tokenizer: Tokenizer,
    vocab_size: int,
    cache: Path,
    first_val_data: Sequence[str] | None = None,
    dp: int = 1,
) -> Corpus:
    """Open the run's data; text is tokenised into files beside `cache`. Raises InputError.

    first_val_data: the setting val_data with which the run began, where a resumed run has changed it. dp: processes
    that share a step's rows, of which none takes more at once in a validation than in a step.
    """

    def opened(data: Sequence[str] | None, stem: str) -> list[Documents]:
        return open_source(data, tokenizer, vocab_size, cache.with_stem(stem), settings)

    given = parse_sources(settings.data or ())
    weights = [weight for _, weight in given if weight is not None]
    if weights:
        names = distinct([Path(path).name for path, _ in given])
        parts = [opened([path], f"{cache.stem}-{i}") for i, (path, _) in enumerate(given, 1)]
    else:
        names, parts = ["data"], [opened(settings.data, cache.stem)]
    shares = shares_of(weights or [Fraction(1)])
    sources = [
        source_of(name, docs, share / sum(shares), settings)
        for name, docs, share in zip(names, parts, shares, strict=True)
    ]
    rows = Mixture([s.rows for s in sources], shares) if len(sources) > 1 else sources[0].rows
    first = (settings.val_data if first_val_data is None else first_val_data) or ()
    named = {
        name: opened([path], validation_stem(name, path, first))
        for name, path in named_sets(settings.val_data or (), names)
    }
    held_out = [docs for s in sources for docs in s.held_out] or next(iter(named.values()))
    about = describe(join([docs for part in parts for docs in part]))
    training = join([docs for s in sources for docs in s.training])
    return Corpus(sources, rows, validation_sets(sources, named, settings, dp), training, join(held_out), about)


def validation_stem(name: str, path: str, first: Sequence[str]) -> str:
    """The name of a set's token file. Sets of a resumed run have their path's checksum in it: the name may have stood
    for another path before, and the run may go back to that checkpoint."""
    stem = f"validation-{name}"
    return stem if f"{name}={path}" in first else f"{stem}-{zlib.crc32(path.encode(errors='surrogateescape')):08x}"


def open_source(
    data: Sequence[str] | None, tokenizer: Tokenizer, vocab_size: int, cache: Path, settings: Settings
) -> list[Documents]:
    """The texts and the chats of some data, those that it has; tokenised into `cache` and the file CACHE-chats. As in
    gather_tokens, an existing file is used as it is."""
    options, chat_cache = settings.text_options, cache.with_stem(f"{cache.stem}-chats")
    files = find_files(data, texts_may_be_gone=chat_cache.is_file() or cache.is_file()) if data is not None else []
    chats, texts = chats_and_texts(files, options)
    rows, mapped = ([p for p in chats if (p.suffix == ".bin") == binary] for binary in (False, True))
    if rows and not chat_cache.is_file():
        write_chats(rows, tokenizer, chat_cache, settings.train_on, options)
    if chat_cache.is_file():
        mapped.insert(0, chat_cache)
    if not mapped:
        return [gather_tokens(data, tokenizer, vocab_size, cache, options)]
    docs, longer, empty = cut(open_chats(mapped, vocab_size, tokenizer.eos_id), settings.seq_len)
    if longer:
        if not len(docs):
            raise InputError(f"no conversation has a token to train on within --seq-len {settings.seq_len}: its answers"
                             " begin later")  # fmt: skip
        left_out = f"; {empty:,} of them are left out, as their answers begin later" if empty else ""
        warn(f"{longer:,} of {len(docs) + empty:,} conversations are longer than --seq-len {settings.seq_len}: they"
             f" lose their ends{left_out}")  # fmt: skip
    if texts or cache.is_file():
        return [gather_tokens(texts, tokenizer, vocab_size, cache, options), docs]
    return [docs]


def source_of(name: str, parts: list[Documents], share: float, settings: Settings) -> Source:
    split = [hold_out(docs, settings.holdout) if settings.holdout else (docs, None) for docs in parts]
    training, held_out = [docs for docs, _ in split], [docs for _, docs in split if docs is not None]
    return Source(name, training, held_out, rows_of(training, settings), share)


def rows_of(parts: list[Documents], settings: Settings) -> Rows:
    """The rows of texts and chats, in the proportions of their epochs."""
    rows: list[Rows] = [packed_rows(docs, settings.seq_len, settings.seed) for docs in parts]
    return rows[0] if len(rows) == 1 else Mixture(rows, shares_of([Fraction(r.rows_per_epoch) for r in rows]))


def validation_sets(
    sources: list[Source], named: dict[str, list[Documents]], settings: Settings, dp: int
) -> list[ValidationSet]:
    """What each source has held out, and the named sets. val_loss is the mixture's, or without any held-out document
    the first named set's."""
    sets = [
        validation_set(s.name if len(sources) > 1 else None, s.held_out, settings, s.share, dp)
        for s in sources
        if s.held_out
    ]
    for name, docs in named.items():
        sets.append(validation_set(name, docs, settings, 0.0 if sets else 1.0, dp))
    return sets


def named_sets(val_data: Sequence[str], taken: Sequence[str]) -> list[tuple[str, str]]:
    """Name and path of each --val-data. Raises InputError for a name that another set or a source has."""
    found = [split_name(source) for source in val_data]
    names = [*taken, *(name for name, _ in found)]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"--val-data: two sets have the name {twice}")
    for name, _ in found:
        for file in (f"{name}-chats", f"{name}-chats.mask"):
            if file in names[len(taken) :]:
                raise InputError(f"--val-data: beside {name} no set can be {file}, as its file may be that of the chats"
                                 f" of {name}: choose another name")  # fmt: skip
    return found


def distinct(names: Sequence[str]) -> list[str]:
    """The names, each further one that comes again with a number."""
    found: list[str] = []
    for name in names:
        number, plain = 2, name
        while name in found:
            name, number = f"{plain}-{number}", number + 1
        found.append(name)
    return found
