"""An engine over two processes, on gloo: parts of weights, equal tokens, processes that end."""

import contextlib
import os
import signal
import subprocess
import time
from dataclasses import replace
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ling_kernels.errors import InputError, LostRank
from ling_kernels.generate import Engine, Sampling, divided, worker, workers
from ling_kernels.generate.cli import main
from ling_kernels.generate.grammar import Grammars
from ling_kernels.model import Ling, LingConfig, load_model, save_model
from ling_kernels.model.checkpoint import named_views
from ling_kernels.model.weight_files import WeightReader
from ling_kernels.nn.fp8_inference import SCALES
from ling_kernels.parallel import decode
from ling_kernels.parallel.decode import RankShare, part_config
from ling_kernels.tokenizer import load_tokenizer
from tests import ranks  # noqa: F401  (what the fork server imports once)
from tests.engines import Memory
from tests.speller import speller
from tests.test_model import DATA

LONG = 300.0  # seconds that no test waits for
FP32 = dict(device="cpu", dtype=torch.float32)
OPTIONS = dict(page_size=4, cache_tokens=400, max_rows=16, max_running=4)


def work(connection, rank):
    os._exit(worker.serve(connection, rank))


class Forked:
    """A worker from the fork server, as subprocess.Popen has it."""

    def __init__(self, connection, rank):
        # daemon: an engine that a failed test has left open does not keep pytest from ending
        self.process = get_context("forkserver").Process(target=work, args=(connection, rank), daemon=True)
        self.process.start()

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired("worker", timeout)
        return self.process.exitcode

    def kill(self):
        self.process.kill()


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    monkeypatch.setattr(workers, "start_process", Forked)


@contextlib.contextmanager
def divided_engine(folder, load=FP32, n=2, **options):
    engine = divided.DividedEngine(folder, n, load, **OPTIONS | options)
    try:
        yield engine
    finally:
        engine.end()


def sizes_of_128() -> LingConfig:
    return replace(
        LingConfig.tiny(), vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=128, num_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, moe_intermediate_size=256, max_position_embeddings=128,
    )  # fmt: skip


def saved(config, folder, size=1):
    model = Ling(config)
    model.init_weights(torch.Generator().manual_seed(1))
    for p in model.parameters():
        p.data *= size if p.ndim > 1 else 1
    for router in model.routers():
        router.expert_bias.uniform_(-0.1, 0.1)
    save_model(model, folder, torch.float32)
    return folder


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """A checkpoint whose parts are whole blocks of FP8."""
    return saved(sizes_of_128(), tmp_path_factory.mktemp("blocks"))


@pytest.fixture(scope="module")
def blocks_fp8(blocks, tmp_path_factory):
    folder = tmp_path_factory.mktemp("blocks-fp8")
    save_model(load_model(blocks, torch.float32, fp8=True), folder)
    return folder


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("stored", ["blocks", "blocks_fp8"])
def test_parts_of_weights(stored, fp8, request, monkeypatch):
    """Two parts hold every element of the whole model's weights and scales, and no other part of a file is read."""
    folder, options = request.getfixturevalue(stored), dict(dtype=torch.float32, fp8=fp8, fp8_head=fp8)
    whole, read = dict(named_views(load_model(folder, **options))), []
    part = WeightReader.part

    def counting(reader, key, slices):
        tensor = part(reader, key, slices)
        read.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(WeightReader, "part", counting)
    shares = [RankShare(2, rank) for rank in (0, 1)]
    parts = [dict(named_views(load_model(folder, **options, share=share))) for share in shares]
    divided_bytes = 0
    for key, tensor in whole.items():
        first, second = (p[key].view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else p[key] for p in parts)
        want = tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor
        if key.removesuffix(SCALES) not in shares[0].parts:
            assert torch.equal(first, want) and torch.equal(second, want)
            continue
        if "query_key_value" in key:
            number = len(want) // 8  # of 4 query, 2 key and 2 value heads
            q, k, v = want.split([4 * number, 2 * number, 2 * number])
            want = torch.cat([t.chunk(2)[rank] for rank in (0, 1) for t in (q, k, v)])
        dim = next(d for d in range(want.ndim) if first.shape[d] != want.shape[d])
        assert torch.equal(torch.cat([first, second], dim), want), key
        divided_bytes += 0 if key.endswith(SCALES) else stored_bytes(folder, key)
    divided_keys = {key.split(".")[-2] for key in shares[0].parts}
    assert divided_keys == {"query_key_value", "dense", "gate_proj", "up_proj", "down_proj", "lm_head",
                            "word_embeddings"}  # fmt: skip
    if (stored == "blocks_fp8") == fp8:
        assert sum(read) == divided_bytes


def stored_bytes(folder, key):
    with WeightReader(folder) as reader:
        return reader.read(key)[0].nbytes


def test_parts_that_are_refused(tmp_path, blocks):
    by_3 = replace(sizes_of_128(), num_attention_heads=12, num_key_value_heads=6, hidden_size=384,
                   intermediate_size=384, moe_intermediate_size=384, vocab_size=513)  # fmt: skip
    for field, value in (("num_key_value_heads", 4), ("intermediate_size", 256), ("vocab_size", 512)):
        with pytest.raises(InputError, match=f"3 ranks cannot share the model equally: its {field} is {value}"):
            part_config(replace(by_3, **{field: value}), 3)
    assert part_config(by_3, 3).num_key_value_heads == 2
    folder = saved(replace(sizes_of_128(), moe_intermediate_size=128), tmp_path / "narrow")
    load_model(folder, share=RankShare(2, 0))
    with pytest.raises(InputError, match=r"2 ranks cannot share .*experts.*128 x 128, in FP8: its parts must be whole"):
        load_model(folder, fp8=True, share=RankShare(2, 0))
    with pytest.raises(InputError, match="2 ranks cannot share model.layers.0.attention.query_key_value"):
        load_model(saved(LingConfig.tiny(), tmp_path / "tiny"), fp8=True, share=RankShare(2, 0))
    with pytest.raises(InputError, match="ranks is 1"):
        divided.DividedEngine(blocks, 1, FP32)


LONG_PROMPT = torch.randint(100, (41,), generator=torch.Generator().manual_seed(2)).tolist()


def served(engine, new=14):
    """Requests of all kinds: longer than a pass, with a prefix that is cached, random, edited, scored."""
    common = dict(max_new_tokens=new, stop_token_ids=(), logprobs=3)
    random = Sampling(0.8, top_k=20, seed=5, repetition_penalty=1.2)
    edited = Sampling(logit_bias={7: 3.0}, frequency_penalty=0.5)
    requests = engine.finish([LONG_PROMPT, [1, 2, 3], [9], [4] * 9], [None, None, random, edited], **common)
    requests += engine.finish([LONG_PROMPT, LONG_PROMPT[:33] + [5]], prompt_logprobs=1, **common)
    return [*requests, *engine.finish([[*LONG_PROMPT[:37], 8]], **common)]


def compare(got, want, bound=2e-5):
    assert [r.new_tokens for r in got] == [r.new_tokens for r in want]
    for mine, other in zip(got, want, strict=True):
        for name in ("logprobs", "prompt_logprobs"):
            pairs = [*zip(getattr(mine, name), getattr(other, name), strict=True)]
            assert all(a.logprob == pytest.approx(b.logprob, abs=bound) for a, b in pairs)
    assert any(r.cached_tokens for r in got)


@pytest.mark.parametrize("options", [dict(), dict(draft=2), dict(cache_dtype=torch.float8_e4m3fn, record_routing=True)])
def test_two_processes_give_the_tokens_of_one(options):
    folder = DATA / "base"
    alone = Engine(load_model(folder, torch.float32), **OPTIONS | options)
    want = served(alone)
    with divided_engine(folder, **options) as engine:
        got = served(engine)
        assert engine.forward.caches[0].k.shape[2] == 1 == alone.forward.caches[0].k.shape[2] // 2
        assert (engine.drafted, engine.accepted) == (alone.drafted, alone.accepted)
        assert engine.accepted > 0 or not engine.draft
        engine.overlap = True  # as on a GPU: a pass begins before the last one's tokens are read
        engine.forward.buffers = [Memory(engine.forward) for _ in range(2)]
        again = served(engine)
        with pytest.raises(InputError, match="cannot take new weights"):
            engine.new_weights()
        with pytest.raises(InputError, match="has a group"):
            divided.DividedEngine(folder, 2, FP32)
    if "cache_dtype" in options:  # a code of the cache may differ by rounding, and with it later logits
        same = [a.new_tokens == b.new_tokens for a, b in zip(got, want, strict=True)]
        assert sum(same) >= len(same) - 2
        assert torch.equal(got[1].routing[:3], want[1].routing[:3])
    else:
        compare(got, want)
        compare(again, served(alone))


def test_preempted_and_guided_requests(tmp_path):
    """A request that gives up its lane and pages is filled in anew on every rank; masks reach every rank."""
    folder = speller(tmp_path)
    model, tokenizer = load_model(folder, torch.float32), load_tokenizer(folder)
    options = dict(page_size=4, max_rows=16, max_running=3, cache_tokens=44, draft=1)
    prompts = [[*b"abcdefgh"], [*b"mnopqrst"], [*b"stuvwxyz"]]
    want = Engine(model, **options).generate(prompts, max_new_tokens=20, stop_token_ids=())
    with divided_engine(folder, **options) as engine:
        waiting = engine.scheduler.waiting
        requests = [engine.submit(prompt, max_new_tokens=20, stop_token_ids=()) for prompt in prompts]
        preempted = False
        while engine.step():
            preempted |= any(r.admitted for r in waiting)
        assert preempted and [r.new_tokens for r in requests] == want
        pytest.importorskip("llguidance")
        grammar = Grammars(tokenizer, engine.config.vocab_size).regex("bm[a-z]{4}")
        guided = dict(stop_token_ids=[tokenizer.eos_id], max_new_tokens=9, grammar=grammar)
        assert engine.generate([[*b"a"]], **guided) == [[*b"bmnopq"]]


def test_fp8_weights(blocks):
    load = FP32 | dict(fp8=True, fp8_head=True)
    want = served(Engine(load_model(blocks, **load), **OPTIONS, draft=1), new=3)
    with divided_engine(blocks, load, draft=1) as engine:
        # A sum over two ranks differs in its last bit, which may move an activation to the next code, up to 1/8 away.
        compare(served(engine, new=3), want, bound=2e-3)


def test_a_killed_process(tmp_path):
    """All requests get the error, those that wait too, and the engine stays dead."""
    with divided_engine(DATA / "base", max_running=1, max_rows=4) as engine:
        requests = [engine.submit([1, 2, 3], max_new_tokens=50, stop_token_ids=()) for _ in "123"]
        while requests[0].num_new_tokens < 3:
            engine.step()
        os.kill(engine.workers.workers[0].process.process.pid, signal.SIGKILL)
        while not all(r.finished for r in requests):
            engine.step()
        for r in requests:
            assert r.finished == "error" and isinstance(r.error, LostRank)
            assert str(r.error) == "rank 1 of 2 has ended with exit code -9; the engine's 2 processes cannot go on"
        assert engine.record.dead
        with pytest.raises(LostRank):
            engine.generate([[1, 2]])
        engine.close()


def test_an_idle_engine_sees_a_process_end():
    with divided_engine(DATA / "base") as engine:
        assert len(engine.generate([[1, 2]], max_new_tokens=2, stop_token_ids=())[0]) == 2 and not engine.record.dead
        os.kill(engine.workers.workers[0].process.process.pid, signal.SIGKILL)
        end = time.monotonic() + LONG
        while not engine.record.dead:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert "rank 1 of 2 has ended" in engine.record.fault
        with pytest.raises(LostRank):  # tokens of a pass that was broken off
            engine.accept(engine.submit([1]), [2], [])


def test_a_failing_pass(monkeypatch):
    """On rank 0 or on another, it ends both; the message says where."""
    with divided_engine(DATA / "base") as engine:
        monkeypatch.setattr(engine.model, "logits", None)
        with pytest.raises(LostRank, match="rank 0 of 2 has failed: 'NoneType'"):
            engine.generate([[1, 2]])
    monkeypatch.undo()
    monkeypatch.setattr(workers, "start_process", Forked)
    with divided_engine(DATA / "base") as engine:
        engine.workers.send("pass", None)
        with pytest.raises(LostRank, match="rank 1 of 2 has failed: AttributeError"):
            while True:
                engine.generate([[1, 2]], max_new_tokens=1)


def test_ctrl_c_within_a_message(monkeypatch):
    """Some ranks may have the message and others not: the engine is dead."""

    def send(message):
        if message[0] == "pass":
            raise KeyboardInterrupt

    with divided_engine(DATA / "base") as engine:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(engine.workers.workers[0], "connection", SimpleNamespace(send=send))
            engine.generate([[1, 2]])
        assert engine.record.dead
        with pytest.raises(LostRank, match="rank 0 of 2 has failed: KeyboardInterrupt"):
            engine.generate([[1, 2]])


def test_a_process_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(decode, "PATIENCE", timedelta(seconds=1))
    monkeypatch.setattr(workers, "SEEN_WITHIN", 0.1)
    with divided_engine(DATA / "base") as engine:
        os.kill(engine.workers.workers[0].process.process.pid, signal.SIGSTOP)
        with pytest.raises(LostRank, match="a rank of 2 does not answer"):
            engine.generate([[1, 2]])
        monkeypatch.setattr(workers, "KILL_AFTER", 0.1)


def test_a_damaged_checkpoint_and_a_process_that_ends_at_once(tmp_path, monkeypatch, capfd):
    folder = saved(sizes_of_128(), tmp_path / "damaged")
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(InputError, match="cannot read"):
        divided.DividedEngine(folder, 2, FP32)
    monkeypatch.setattr(workers, "start_process", lambda connection, rank: subprocess.Popen(["false"]))
    with pytest.raises(LostRank, match="rank 1 of 2 has ended with exit code 1"):
        divided.DividedEngine(DATA / "base", 2, FP32)
    assert not torch.distributed.is_initialized()


def test_a_worker_ends_with_rank_0():
    here, there = get_context("forkserver").Pipe()
    process = Forked(there, 1)
    there.close()
    here.close()
    assert process.wait(LONG) == 0


def test_a_message_that_cannot_be_read():
    """The worker ends: a thread alone that ended would leave rank 0 waiting for ever."""
    here, there = get_context("forkserver").Pipe()
    process = Forked(there, 1)
    there.close()
    here.send_bytes(b"nonsense")
    assert process.wait(LONG) == 1


def lead(connection):
    with divided_engine(DATA / "base") as engine:
        connection.send(engine.workers.workers[0].process.pid)
        while True:
            engine.generate([[1, 2]] * 4, max_new_tokens=40, stop_token_ids=())


def test_a_killed_rank_0_takes_its_worker_along():
    """Within a pass, as a rule."""
    here, there = get_context("forkserver").Pipe()
    process = get_context("forkserver").Process(target=lead, args=(there,))
    process.start()
    worker_pid = here.recv()
    time.sleep(0.2)
    process.kill()
    process.join()
    end = time.monotonic() + LONG
    while Path(f"/proc/{worker_pid}").exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_flags(tmp_path, capsys, monkeypatch):
    """The command's text is that of one process; a number that does not fit is one line, and so is a lost rank."""
    flags = ["--model", speller(tmp_path), "--device", "cpu", "--prompt", "a", "--max-new-tokens", "3", "--tp"]
    assert main([*flags, "2"]) == 0 and capsys.readouterr().out == "bcd\n"
    for number, message in (("0", "--tp is 0; it must be at least 1"), ("3", "3 ranks cannot share the model equally")):
        assert main([*flags, number]) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    monkeypatch.setattr(workers, "start_process", lambda connection, rank: subprocess.Popen(["false"]))
    assert main([*flags, "2"]) == 1
    assert capsys.readouterr().err.startswith("error: rank 1 of 2 has ended with exit code 1; ")
