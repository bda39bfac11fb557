"""Checkpoints of which every process writes its part: they load at other numbers of processes to the same bits; a
failed or killed writer costs that checkpoint alone; training waits for the copy to the host alone."""

import errno
import json
import os
import signal
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.multiprocessing import ProcessExitedException

from ling_kernels.errors import InputError, OtherRank
from ling_kernels.model import Ling, load_model
from ling_kernels.parallel import checkpoints
from ling_kernels.parallel.boxes import Part, equal_part
from ling_kernels.parallel.official import whole_on_meta
from ling_kernels.parallel.parts import give_memory_, read_weights_
from ling_kernels.parallel.pipeline import Pipeline
from ling_kernels.parallel.pipeline_layout import PipelineLayout
from ling_kernels.parallel.ranks import Division, Ranks
from ling_kernels.parallel.shares import Shares
from ling_kernels.tokenizer import load_tokenizer
from ling_kernels.train import checkpoint as ckpt
from ling_kernels.train import saving
from ling_kernels.train.optimizer import OF_WHOLE, make_optimizer, to_masters
from ling_kernels.train.prepare import room
from ling_kernels.train.settings import Settings
from tests.ranks import run
from tests.training import tiniest

CONFIG = replace(tiniest(), num_nextn_predict_layers=1, vocab_size=64, num_attention_heads=4, num_key_value_heads=2)
FULL = OSError(errno.ENOSPC, "No space left on device")


class Run:
    """A model with an optimizer that has taken a step with random gradients, equal for any number of processes."""

    def __init__(self, ranks: Ranks, kind: str = "adamw", layout: str = "", folder=None, cuts=None):
        model, masters = whole_on_meta(CONFIG), "bf16" if kind == "muon" else "fp32"
        to_masters(model, masters)
        pipeline = partial(pipeline_of, model, layout, ranks) if layout else None
        self.shares = shares = Shares(model, ranks, pipeline, whole=kind in OF_WHOLE)
        if cuts:
            cut_(shares, cuts)
        give_memory_(model, torch.device("cpu"))
        if folder:
            read_weights_(shares, folder)
        else:
            fill_(shares)
        self.optimizer = make_optimizer(shares.stepped, kind, 1e-2, 0.1)
        if folder:
            torch.manual_seed(1)
            ckpt.restore(folder, shares, self.optimizer)
        else:
            self.step(0)

    def step(self, seed: int) -> None:
        for name, p in self.shares.stepped.named_parameters():
            if self.shares.steps(name):
                g = torch.Generator().manual_seed(seed + sum(name.encode()))
                whole = torch.randn(self.shares.official[name].shape, generator=g).to(p.dtype)
                p.grad = self.shares.state_part_of(name).take(whole).clone()
        self.optimizer.step()
        self.shares.spread_weights_()

    def job(self, folder, step: int, wait: bool = True):
        moments = ckpt.optimizer_tensors(self.shares.stepped, self.optimizer)
        tensors, _ = saving.snapshot(self.shares, moments, wait)
        return partial(
            saving.write, folder, tensors, load_tokenizer(None), dict(step=step), set, self.shares.ranks.in_thread()
        )

    def save(self, folder, step: int = 1):
        self.job(folder, step)()
        return ckpt.checkpoint_folder(folder, step)


def pipeline_of(model, layout, ranks):
    return Pipeline(model, PipelineLayout.parse(layout), "1F1B", 2, (1, 8), ranks.stages)


def fill_(shares: Shares) -> None:
    """Random weights and biases, equal parts of the whole's."""
    whole = Ling(CONFIG)
    whole.init_weights(torch.Generator().manual_seed(0))
    named = dict(whole.named_parameters()) | dict(whole.named_buffers())
    with torch.no_grad():
        for name, t in [*shares.model.named_parameters(), *shares.model.named_buffers()]:
            if name.endswith("expert_bias"):
                named[name].normal_(generator=torch.Generator().manual_seed(sum(name.encode())))
            if name in shares.official:
                t.copy_(shares.part_of(name).take(named[name]))


def cut_(shares: Shares, cuts: dict[str, Part]) -> None:
    """Divide further parameters of a model on the meta device, each part with one owner."""
    before = shares.part_of
    shares.part_of = lambda name: cuts[name] if name in cuts else before(name)
    for name, p in [*shares.model.named_parameters()]:
        if name in cuts:
            module, _, weight = name.rpartition(".")
            part = nn.Parameter(cuts[name].take(p.detach()).clone())
            setattr(shares.model.get_submodule(module), weight, part)
            shares.group[name], shares.owner[name] = None, 0
            shares.divided[name] = Division(shares.ranks.size, shares.ranks.rank)


def ranks_of(rank: int, world: int, **sizes: int) -> Ranks:
    return Ranks(rank, world, dp=world, world=dist.group.WORLD).arranged(**sizes)


def contents(checkpoint) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, as one process has it."""
    one = Run(Ranks(), kind_of(checkpoint), folder=checkpoint)
    named = dict(one.shares.model.named_parameters()) | dict(one.shares.model.named_buffers())
    return {n: t for n, t in named.items() if n in one.shares.official} | ckpt.optimizer_tensors(
        one.shares.model, one.optimizer
    )


def kind_of(checkpoint) -> str:
    return json.loads((checkpoint.parent.parent / "kind.json").read_text())


def equal(a, b) -> None:
    x, y = contents(a), contents(b)
    assert x.keys() == y.keys()
    for name in x:
        assert x[name].dtype == y[name].dtype and torch.equal(x[name], y[name]), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """For each optimizer, the checkpoint of one process."""
    folders = {}
    for kind in ("adamw", "adamw8bit", "muon"):
        folder = tmp_path_factory.mktemp(kind)
        (folder / "kind.json").write_text(json.dumps(kind))
        folders[kind] = Run(Ranks(), kind).save(folder)
    return folders


WAYS = [  # optimizer, how four processes share the model
    ("adamw", dict(dp=2, cp=2, ep=2, vocab=4)),
    ("adamw8bit", dict(dp=4, ep=4)),
    ("muon", dict(dp=4)),
    ("adamw8bit", dict(dp=4, ep=2, copies=2)),
    ("muon", dict(dp=4, copies=4)),
    ("muon", dict(dp=2, tp=2)),
    ("adamw8bit", dict(dp=2, tp=2, copies=2)),
    ("adamw8bit", dict(tp=2, pp=2, ep=2, vocab=2, layout="Ett|mLL")),
    ("adamw", dict(dp=2, ep=2, pp=2, vocab=2, layout="Ett|mLL")),
]


def by_four(alone, folder, rank, group):
    """Four processes make the checkpoint of one; others load it, divided otherwise, and save it again."""
    for number, (kind, way) in enumerate(WAYS):
        layout = way.get("layout", "")
        sizes = {k: v for k, v in way.items() if k != "layout"}
        run = folder / str(number)
        if rank == 0:
            (run / "again").mkdir(parents=True)
            for path in (run, run / "again"):
                (path / "kind.json").write_text(json.dumps(kind))
        made = Run(ranks_of(rank, 4, **sizes), kind, layout)
        saved = made.save(run)
        before = {n: t.clone() for n, t in ckpt.optimizer_tensors(made.shares.stepped, made.optimizer).items()}
        loaded = Run(made.shares.ranks, kind, layout, folder=alone[kind])
        for n, t in ckpt.optimizer_tensors(loaded.shares.stepped, loaded.optimizer).items():
            assert torch.equal(before.pop(n), t), n
        assert not before
        Run(ranks_of(rank, 4), kind, folder=saved).save(run / "again")


def test_four_processes_write_and_read_the_checkpoint_of_one(alone, tmp_path):
    run(tmp_path, [partial(by_four, alone, tmp_path)], 4)
    for number, (kind, _) in enumerate(WAYS):
        for folder in (tmp_path / str(number), tmp_path / str(number) / "again"):
            checkpoint = ckpt.list_checkpoints(folder)[-1]
            assert ckpt.damage_of(checkpoint) is None
            equal(checkpoint, alone[kind])
    check_official(ckpt.list_checkpoints(tmp_path / "0")[-1], alone["adamw"])


def check_official(checkpoint, alone):
    """It is a published model's folder: whole tensors under official keys in the files that the index names."""
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    assert {*index.values()} == {f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)}
    assert len([*checkpoint.glob("optimizer-*-of-00004.safetensors")]) == 4
    of_one = json.loads((alone / "model.safetensors.index.json").read_text())["weight_map"]
    assert {*of_one.values()} == {"model.safetensors"}  # and not the optimizer's file, which is in the folder too
    with safe_open(alone / "model.safetensors", "pt") as one:
        assert index.keys() == {*one.keys()}
        for key, name in index.items():
            with safe_open(checkpoint / name, "pt") as file:
                assert torch.equal(file.get_tensor(key), one.get_tensor(key)), key
    for a, b in zip(load_model(checkpoint).parameters(), load_model(alone).parameters(), strict=True):
        assert torch.equal(a, b)


def rows_and_columns(n: int, rank: int) -> dict[str, Part]:
    """Parts as of a divided vocabulary, and of tensor parallelism: rows, columns, rows of query, key and value."""
    heads, keys = CONFIG.num_attention_heads * CONFIG.head_dim, CONFIG.num_key_value_heads * CONFIG.head_dim
    cuts = {f"{name}.weight": equal_part(rank, n, CONFIG.vocab_size) for name in ("word_embeddings", "lm_head")}
    ranges, start = [], 0
    for length in (heads, keys, keys):
        ranges.append((start + rank * length // n, start + (rank + 1) * length // n))
        start += length
    cuts["layers.0.attention.query_key_value.weight"] = Part(0, tuple(ranges))
    cuts["layers.0.attention.dense.weight"] = equal_part(rank, n, heads, dim=1)
    inner = CONFIG.intermediate_size
    halves = [(half * inner + rank * inner // n, half * inner + (rank + 1) * inner // n) for half in (0, 1)]
    cuts["layers.0.mlp.gate_up.weight"] = Part(0, tuple(halves))
    return cuts


def by_two(alone, folder, rank, group):
    ranks = ranks_of(rank, 2, ep=2)
    cut = Run(ranks, folder=alone["adamw"], cuts=rows_and_columns(2, rank))
    assert (
        cut.shares.model.layers[0].attention.dense.weight.shape[1] * 2 == CONFIG.num_attention_heads * CONFIG.head_dim
    )
    saved = cut.save(folder)
    again = Run(ranks_of(rank, 2), folder=saved, cuts=rows_and_columns(2, 1 - rank))
    again.save(folder, 2)
    in_a_thread(ranks, alone, folder, rank)
    a_full_disk(ranks, folder, rank)


def test_parts_of_rows_and_columns_and_failing_writers(alone, tmp_path):
    (tmp_path / "kind.json").write_text('"adamw"')
    run(tmp_path, [partial(by_two, alone, tmp_path)], 2)
    found = ckpt.list_checkpoints(tmp_path)
    assert [c.name for c in found] == ["step-000001", "step-000002", "step-000003", "step-000006"]
    for checkpoint in found[:3]:
        equal(checkpoint, alone["adamw"])
    with safe_open(found[0] / "optimizer-00002-of-00002.safetensors", "pt") as file:
        assert "layers.0.attention.dense.weight.exp_avg[:,32:64]" in file.keys()  # noqa: SIM118


def in_a_thread(ranks, alone, folder, rank):
    """Training goes on while rank 1 has not begun to write, and what it changes is not written. Where one process has
    no memory for a copy, all wait."""
    run, writer, go_on = Run(ranks, folder=alone["adamw"]), saving.Writer(), threading.Event()
    genuine = checkpoints.save_tensors
    if rank == 1:
        checkpoints.save_tensors = lambda *args: (go_on.wait(60), genuine(*args))
    writer.start(run.job(folder, 3, wait=False))
    for seed in range(3):
        run.step(seed)
    assert not (folder / "checkpoints" / "step-000003").exists() and writer.thread.is_alive()
    genuine_room, saving.room_for_copy = saving.room_for_copy, lambda needed: rank == 0
    assert saving.snapshot(run.shares, {}, wait=False)[1]
    saving.room_for_copy = genuine_room
    go_on.set()
    writer.wait()
    checkpoints.save_tensors = genuine


def a_full_disk(ranks, folder, rank):
    """One process cannot write, in a thread and not: all hear of it, nothing of it stays, and they go on."""
    run, genuine = Run(ranks), checkpoints.save_tensors

    def full(tensors, path):
        path.write_bytes(b"x" * 100)
        raise FULL

    for failing, step in ((1, 4), (0, 5)):
        checkpoints.save_tensors = full if rank == failing else genuine
        writer = saving.Writer()
        writer.start(run.job(folder, step, wait=False))
        with pytest.raises(saving.NotSaved, match="No space left on device") as error:
            writer.wait()
        assert isinstance(error.value, OtherRank) == (rank > 0)
        assert ("rank 1: No space" in str(error.value)) == (failing == 1)
        dist.barrier()
        assert not [*(folder / "checkpoints").glob(".*")]
    checkpoints.save_tensors = genuine
    run.step(1)
    run.save(folder, 6)


def killed_while_writing(folder, rank, group):
    run, genuine = Run(ranks_of(rank, 2, ep=2)), checkpoints.save_tensors
    run.save(folder)

    def killed(tensors, path):
        genuine(tensors, path)
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == 1:
        checkpoints.save_tensors = killed
    run.save(folder, 2)


def test_kill_9_while_writing_costs_that_checkpoint_alone(alone, tmp_path):
    (tmp_path / "kind.json").write_text('"adamw"')
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run(tmp_path, [partial(killed_while_writing, tmp_path)], 2)
    assert [p.name for p in (tmp_path / "checkpoints").glob(".*")] == [".step-000002.partial"]
    assert ckpt.locate(str(tmp_path))[1].name == "step-000001"
    equal(ckpt.last_sound(ckpt.list_checkpoints(tmp_path)[-1]), alone["adamw"])
    Run(Ranks()).save(tmp_path, 2)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000002"]


def test_what_cannot_be_written_or_read(alone, tmp_path):
    one = Run(Ranks())
    one.shares.owned = lambda: {n for n in Shares.owned(one.shares) if n != "norm.weight"}
    with pytest.raises(saving.NotSaved, match=r"0 processes write model\.norm\.weight"):
        one.save(tmp_path)
    with pytest.raises(InputError, match="a scale is of several processes' weights"):
        checkpoints.flattened("w.m_scale", equal_part(0, 2, 3), torch.Size((3, 256)), 384, 2)
    assert checkpoints.parsed("a.b.m") == ("a.b.m", None, (0, 0))
    assert checkpoints.parsed("a.b.m[:,3:5]") == ("a.b.m", 1, (3, 5))


def test_memory_of_a_process_without_the_state_that_others_keep():
    """AdamW in fp32: 8 bytes of weight and gradient, 8 of state that four processes share."""
    n, ranks = CONFIG.num_parameters(mtp=True), Ranks(size=4, dp=4)
    assert room.least_bytes(CONFIG, Settings(), Ranks()) == 16 * n
    assert room.least_bytes(CONFIG, Settings(), ranks) == 10 * n
    assert room.least_bytes(CONFIG, Settings(), replace(ranks, copies=2)) == 12 * n
    assert room.least_bytes(CONFIG, Settings(), replace(ranks, experts=Division(2))) == 6 * n
