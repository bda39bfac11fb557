"""Validation: sets of rows that are always the same, their mean loss in nats per token, and bits per byte.

    bits per byte = nats per token * tokens / (ln 2 * bytes)

tokens are those that are predicted, and bytes are theirs as UTF-8; a special token has no bytes. It compares models
with different tokenizers. The definition is that of The Pile (arXiv 2101.00027, section 3.1).
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import InputError, warn
from ..parallel.pipeline import MicroBatch
from ..parallel.ranks import Ranks
from ..parallel.shares import Shares
from ..tokenizer import Tokenizer
from .data import Batch, Documents, Packed, PackedWhole, batch_of, packed_rows
from .settings import Settings

FEW = 1000  # tokens: a set with fewer is too small to compare runs
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class ValidationSet:
    name: str | None  # None: the documents held out of all the training data
    batches: list[Batch]
    share: float = 0.0  # of the set's loss in val_loss

    @property
    def targets(self) -> int:
        return sum(batch.targets() for batch in self.batches)


def validation_set(
    name: str | None, parts: Sequence[Documents], settings: Settings, share: float = 0.0, dp: int = 1
) -> ValidationSet:
    """At most eval_rows rows of the documents. Warns of a set that is very small."""
    found = ValidationSet(name, validation_batches(parts, settings, dp), share)
    if (targets := found.targets) < FEW:
        which = "what is held out" if name is None else name
        some = sum(len(batch.ids) for batch in found.batches) == settings.eval_rows
        rows = f" in --eval-rows {settings.eval_rows}" if some else ""
        few = f"the loss of fewer than {FEW:,} says little"
        warn(f"validation: {which} has only {targets} tokens to predict{rows}; {few}")
    return found


def validation_batches(parts: Sequence[Documents], settings: Settings, dp: int = 1) -> list[Batch]:
    """Batches of at most eval_rows rows of the documents, evenly spaced, always the same. No row comes twice: a set of
    fewer rows is taken whole, its last row padded."""
    length, most, size = settings.seq_len, settings.eval_rows, settings.micro_batch or settings.batch // dp
    rows: list[tuple[Packed | PackedWhole, int]] = []
    for docs in parts:
        packed = packed_rows(docs, length, None)
        rows += [(packed, i) for i in range(int(packed.rows_per_epoch))]
    if len(rows) >= most:
        chosen = [packed.row(i) for packed, i in (rows[i * len(rows) // most] for i in range(most))]
    else:
        chosen = [packed.row(i) for packed, i in rows]
        for docs in parts:
            rest = docs.tokens % length
            if not docs.masks and rest > 1:  # a single token has none to predict
                chosen.append(Packed(docs, length, None).pieces(docs.tokens - rest, docs.tokens))
    parted = [chosen[i : i + size] for i in range(0, len(chosen), size)]
    return [batch_of(part, len(part), length) for part in parted]


def split_name(source: str) -> tuple[str, str]:
    """Name and path of NAME=PATH. Raises InputError."""
    name, equals, path = source.partition("=")
    if not (equals and path and NAME.fullmatch(name)):
        raise InputError(
            f"--val-data {source}: give NAME=PATH, the name of letters, digits, dots, underscores and hyphens"
        )
    return name, path


def bytes_of_tokens(tokenizer: Tokenizer) -> torch.Tensor:
    """UTF-8 bytes of each token, [vocab_size] int64; special tokens have none."""
    sizes = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    if tokenizer.backend is None:
        sizes[:256] = 1
        return sizes
    decoder = json.dumps(json.loads(tokenizer.backend.to_str()).get("decoder"))
    added = tokenizer.backend.get_added_tokens_decoder()
    for token, i in tokenizer.vocab.items():
        if i in added:
            sizes[i] = 0 if added[i].special else len(token.encode())
        elif '"ByteLevel"' in decoder:
            sizes[i] = len(token)  # a visible character for each byte
        elif "ByteFallback" in decoder and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            sizes[i] = 1
        else:
            sizes[i] = len(token.replace("\u2581", " ").encode())  # Metaspace
    return sizes


def measure(
    model: nn.Module, sets: Sequence[ValidationSet], sizes: torch.Tensor, precision: torch.dtype,
    shares: Shares | None = None,
) -> dict:  # fmt: skip
    """Validate on each set -> val_loss in nats per token, val_bpb in bits per byte, and with /NAME those of the named
    sets. val_loss and val_bpb are means of the sets by their shares; a set without a token to predict is left out."""
    sets = [s for s in sets if s.targets]
    total = sum(s.share for s in sets)
    record: dict[str, float] = dict.fromkeys(("val_loss", "val_bpb"), 0.0 if total else math.nan)
    for s in sets:
        loss = evaluate(model, s.batches, precision, shares)
        targets = torch.cat([batch.target_ids() for batch in s.batches])
        size = int(sizes[targets[targets < len(sizes)]].sum())
        bpb = loss * len(targets) / (math.log(2) * size) if size else math.nan
        if s.name is not None:
            record |= {f"val_loss/{s.name}": loss, f"val_bpb/{s.name}": bpb}
        if s.share:
            record["val_loss"] += s.share / total * loss
            record["val_bpb"] += s.share / total * bpb
    return record


def validation_line(record: dict) -> str:
    """What a report says of a record with a validation."""
    line = f"validation loss {record['val_loss']:.4f} nats per token"
    if math.isfinite(record.get("val_bpb", math.nan)):
        line += f", {record['val_bpb']:.4f} bits per byte"
    named = ", ".join(f"{k.partition('/')[2]} {v:.4f}" for k, v in record.items() if k.startswith("val_loss/"))
    epochs = ", ".join(f"{k.partition('/')[2]} {v:.2f}" for k, v in record.items() if k.startswith("epoch/"))
    return line + (f"; {named}" if named else "") + (f"; epochs {epochs}" if epochs else "")


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch], precision: torch.dtype, shares: Shares | None = None) -> float:
    """Mean main loss over the batches' targets, in nats. Data-parallel ranks take the batches in turn."""
    device = next(model.parameters()).device
    ranks, pipeline = (shares.ranks, shares.pipeline) if shares else (Ranks(), None)
    model.eval()
    total = torch.zeros((), device=device, dtype=torch.float64)
    mine = range(ranks.sequences, len(batches) + ranks.sequences, ranks.dp)
    if pipeline is not None:
        micro = [MicroBatch.of(batches[min(i, len(batches) - 1)], device) for i in mine]
        for i, loss in zip(mine, pipeline.evaluate(micro), strict=True):
            total += loss * (i < len(batches))
    for i in mine if pipeline is None else ():
        batch = batches[min(i, len(batches) - 1)]  # where none is left a rank runs the last without counting it:
        ids, labels, cu_seqlens = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            out = model(ids, labels=labels, cu_seqlens=cu_seqlens, logits=False)  # others need the experts here
        if i < len(batches):
            total += out.main_loss.double() * batch.targets()
    model.train()
    return float(ranks.sum_(total, stages=True)) / max(sum(batch.targets() for batch in batches), 1)
