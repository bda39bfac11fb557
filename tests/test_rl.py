"""The loop of reinforcement learning: weights handed over, log-probabilities, learning, resuming, misuse."""

import copy
import json
import shutil
from random import Random

import numpy as np
import pytest
import torch

from ling_kernels.errors import Diverged, InputError
from ling_kernels.generate import Engine
from ling_kernels.model import load_model
from ling_kernels.model.sample import Sampling
from ling_kernels.posttrain import TASKS, Loop, LoopSettings, Problem, exact
from ling_kernels.posttrain.rl import main
from ling_kernels.posttrain.rollout import Answer, answer_logp, rollout
from ling_kernels.posttrain.start import make_start
from ling_kernels.tokenizer import Tokenizer
from tests.engines import drain, make_engine, model, references
from tests.reward_functions import count_spread, hang_at_hang
from tests.training import small  # noqa: F401 (a fixture)

BRIEF = dict(prompts=2, samples=2, updates=2, new_tokens=6, lr=1e-3, reward_timeout=60.0, device="cpu")


@pytest.fixture(scope="module")
def random_model(small):  # noqa: F811
    """The folder of a model with random weights and a tokenizer."""
    Tokenizer().save(small)
    return small


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def letters(random: Random) -> Problem:
    return Problem(random.choice("abc"), "x", "x")


# --- the engine's part


def test_new_weights_forget_cached_prefixes_and_count_versions():
    other = copy.deepcopy(model())
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    prompt = [*references()[0][0], *range(5, 25)]
    want = Engine(other, page_size=4, cache_tokens=400).generate([prompt], max_new_tokens=8, stop_token_ids=())
    e = Engine(copy.deepcopy(model()), page_size=4, cache_tokens=400)
    before = e.submit(prompt, max_new_tokens=8, stop_token_ids=())
    with pytest.raises(InputError, match="1 request unfinished"):
        e.new_weights(other)
    drain(e)
    assert before.policy_version == 0 and before.new_tokens != want[0]
    addresses = [p.data_ptr() for p in e.model.parameters()]
    assert e.new_weights(other) == 1 and [p.data_ptr() for p in e.model.parameters()] == addresses
    after = e.submit(prompt, max_new_tokens=8, stop_token_ids=())
    drain(e)
    assert (after.new_tokens, after.policy_version, after.cached_tokens) == (want[0], 1, 0)
    again = e.submit(prompt, max_new_tokens=8, stop_token_ids=())
    drain(e)
    assert again.cached_tokens > 0, "prefixes of the new weights are cached"
    with pytest.raises(InputError, match="of another model: bias"):
        e.new_weights(torch.nn.Linear(2, 2))


def test_keep_stop_keeps_the_token_that_ends_an_answer():
    prompt, want = references()[0]
    e, stop = make_engine(), want[3]
    plain, kept = (e.submit(prompt, max_new_tokens=9, stop_token_ids=[stop], keep_stop=k, logprobs=0) for k in (0, 1))
    drain(e)
    first = want.index(stop)
    assert plain.new_tokens == want[:first] and kept.new_tokens == want[: first + 1]
    assert kept.finished == "stop" and [t.token for t in kept.logprobs] == kept.new_tokens


def test_the_trainer_gives_the_engines_log_probabilities_their_gradient():
    e, m = make_engine(max_running=5), copy.deepcopy(model()).requires_grad_()
    answers = rollout(e, [p for p, _ in references()[:2]], 3, 7, seed=5, ends=[references()[0][1][2]])
    assert [a.prompt for a in answers[:4]] == [references()[0][0]] * 3 + [references()[1][0]]
    assert len({tuple(a.ids) for a in answers}) > 3 and all(len(a.ids) == len(a.logprobs) for a in answers)
    again = rollout(e, [references()[1][0]], 1, 7, seed=8, ends=[references()[0][1][2]])
    assert again[0].ids == answers[3].ids, "an answer depends on its own seed"
    logp = answer_logp(m, answers)
    engine_logp = torch.tensor([x for a in answers for x in a.logprobs])
    torch.testing.assert_close(logp.detach(), engine_logp, rtol=1e-4, atol=1e-4)
    logp.sum().backward()
    got = m.lm_head.weight.grad.clone(), m.layers[0].attention.query_key_value.weight.grad.clone()
    m.zero_grad()
    for a in answers:
        ids = torch.tensor([a.prompt + a.ids])
        full = m(ids).logits[0].log_softmax(-1)[len(a.prompt) - 1 : -1]
        full.gather(1, ids[0, len(a.prompt) :, None]).sum().backward()
    torch.testing.assert_close(got[0], m.lm_head.weight.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got[1], m.layers[0].attention.query_key_value.weight.grad, rtol=1e-3, atol=1e-4)


# --- the loop


def test_tasks_are_what_they_say():
    for seed in range(50):
        problem = TASKS["arithmetic"](Random(seed))
        assert (
            int(problem.answer) == sum(map(int, problem.prompt.split("+")))
            and exact(problem.demonstration, problem.answer) == 1
        )
        thought = problem.demonstration.rpartition(". ")[0]
        for sum_ in thought.split("; "):
            left, right = sum_.split("=")
            assert sum(map(int, left.split("+"))) == int(right)
        problem = TASKS["sorting"](Random(seed))
        assert sorted(problem.prompt.split()[1:]) == problem.answer.split()
    assert exact("7. 85 ", "85") == 1 and exact("85. 7", "85") == 0 and exact("", "") == 1


def three_digits(random: Random) -> Problem:
    digits = [random.randrange(5) for _ in range(3)]
    answer = " ".join(map(str, sorted(digits)))
    return Problem(f"sort {' '.join(map(str, digits))}", answer, answer)


def test_it_learns(tmp_path):
    """One seed of the study, short: the last quarter's mean reward exceeds the first's by more than its spread."""
    start = make_start(tmp_path / "start", three_digits, steps=75)
    settings = LoopSettings(steps=16, prompts=8, lr=4e-4, device="cpu")
    loop = Loop(settings, start, tmp_path / "run", three_digits)
    rewards = torch.tensor([loop.step()["reward"] for _ in range(16)])
    loop.close()
    first, last = rewards[:4], rewards[-4:]
    assert last.mean() - first.mean() > max(first.std(), last.std()), rewards.tolist()


@pytest.mark.parametrize("options", [
    dict(method="grpo"), dict(method="dapo", icepop="ring"), dict(method="gspo", optimizer="muon", replay_routing=True),
    dict(method="lpo", evo_cot=0.2, kl=0.1, optimizer="adamw8bit", batch_invariant=True),
], ids=lambda o: o["method"])  # fmt: skip
def test_a_resumed_loop_has_the_bits_of_one_without_a_stop(tmp_path, random_model, options):
    settings = LoopSettings(steps=3, **BRIEF | options)
    run = [settings, random_model, tmp_path / "whole", letters, count_spread]
    whole = Loop(*run)
    records = [whole.step() for _ in range(3)]
    whole.close()
    stopped = Loop(*run[:2], tmp_path / "stopped", *run[3:])
    stopped.step()
    stopped.save()
    stopped.close()
    resumed = Loop.resume(tmp_path / "stopped", problems=letters, reward=count_spread)
    rest = [resumed.step() for _ in range(2)]
    resumed.close()
    timed = ("seconds", "tokens_per_s")
    for a, b in zip(records[1:], rest, strict=True):
        assert {k: v for k, v in a.items() if k not in timed} == {k: v for k, v in b.items() if k not in timed}
    for (name, p), q in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(p, q), name
    start = load_model(random_model, dtype=torch.float32)
    assert not torch.equal(start.lm_head.weight, whole.model.lm_head.weight), "the weights have moved"
    assert [r["policy_version"] for r in records] == [1, 2, 3]
    assert ([r["mismatch_max"] for r in records] == [0, 0, 0]) == ("batch_invariant" in options)
    assert ("left_out" in records[0]) == ("icepop" in options) and (records[2]["kl"] > 0) == ("kl" in options)


def test_a_groups_rewards_come_from_a_judge_of_pairs(tmp_path, random_model, capsys):
    """Group Arena Reward by the command: win rates, also in the resumed run."""
    judge = "tests.reward_functions:arena"
    options = BRIEF | dict(prompts=2, samples=4)
    loop = Loop(LoopSettings(steps=1, group_reward=judge, **options), random_model, tmp_path / "run", letters)
    problems = loop.draw()
    answers = loop.answer(problems)
    lengths = [len(loop.text(a)) for a in answers]
    got = loop.rewards_of(answers, loop.judge(problems, answers))
    loop.close()
    for row, group in zip(got.tolist(), (lengths[:4], lengths[4:]), strict=True):
        want = [sum((a > b) + 0.5 * (a == b) for j, b in enumerate(group) if j != i) / 3 for i, a in enumerate(group)]
        assert row == pytest.approx(want)
    assert len({*got.flatten().tolist()}) > 2
    flags = ["--prompts", "2", "--samples", "4", "--new-tokens", "4", "--device", "cpu", "--group-reward", judge]
    run = tmp_path / "command"
    assert (
        main(["--model", str(random_model), "--out", str(run), "--steps", "1", "--reward-timeout", "60", *flags]) == 0
    )
    assert main(["--resume", str(run), "--steps", "2"]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["reward"] for r in rows] == pytest.approx([0.5, 0.5]) and not any("failed" in k for r in rows for k in r)
    capsys.readouterr()
    for more, text in ((["--evo-cot", "0.1"], "give one"), (["--group-reward", "nowhere"], "can be imported")):
        assert main(["--model", str(random_model), "--out", str(tmp_path / "new"), *flags, *more]) == 2
        assert text in capsys.readouterr().err
    with pytest.raises(InputError, match="a reward of each answer: give one"):
        Loop(LoopSettings(group_reward=judge), random_model, tmp_path / "new", reward=count_spread)
    assert not (tmp_path / "new").exists()


def one_hangs(random: Random) -> Problem:
    return Problem("a", random.choice(["hang", "x"]), "x")


def test_a_hanging_reward_is_a_failed_one_and_named(tmp_path, random_model):
    options = BRIEF | dict(prompts=4, reward_timeout=1.5)
    loop = Loop(LoopSettings(steps=1, **options), random_model, tmp_path / "run", one_hangs, hang_at_hang)
    failed = 2 * sum(p.answer == "hang" for p in loop.draw())
    record = loop.step()
    loop.close()
    assert 0 < failed == record["failed/timeout"] < 8 and record["reward"] > 0


def test_a_loop_that_diverges_stops(tmp_path, random_model):
    loop = Loop(LoopSettings(steps=9, **BRIEF | dict(kl=1.0)), random_model, tmp_path / "run", letters, count_spread)
    loop.logp = lambda model, answers: answer_logp(model, answers) * torch.nan
    before = copy.deepcopy(loop.model.state_dict())
    with pytest.raises(Diverged, match="in 6 updates up to step 3"):
        for _ in range(9):
            assert loop.step()["skipped"] == 2
    loop.close()
    assert all(torch.equal(t, before[k]) for k, t in loop.model.state_dict().items())


def test_the_command(tmp_path, random_model, capsys):
    flags = ["--task", "sorting", "--prompts", "2", "--samples", "2", "--new-tokens", "4", "--device", "cpu"]
    run = tmp_path / "run"
    assert main(["--model", str(random_model), "--out", str(run), "--steps", "2", "--save-every", "1", *flags]) == 0
    assert main(["--resume", str(run), "--steps", "3"]) == 0
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3] and "Reward" in (run / "report.html").read_text()
    load_model(run / "model")
    capsys.readouterr()
    for wrong, text in [
        (["--method", "ppo"], "invalid choice"), (["--resume", str(run), "--lr", "1"], "goes with --steps alone"),
        (["--samples", "1"], "must be at least 2"), (["--prompts", "3"], "does not divide --prompts 3"),
        (["--temperature", "nan"], "must be more than 0"), (["--resume", str(tmp_path)], "no checkpoint"),
        (["--out", str(run)], "not an empty folder"), (["--out", str(run / "report.html")], "not an empty folder"),
        (["--out", "/proc/x"], "cannot write /proc/x-start.jsonl"), (["--out", ""], "--out is empty"),
        (["--model", str(random_model), "--new-tokens", "9999", "--out", str(tmp_path / "new")], "--new-tokens 9999"),
        (["--resume", str(run), "--steps", "1"], "has done 3 already"),
        (["--model", str(tmp_path / "none"), "--out", str(tmp_path / "new")], "none"),
    ]:  # fmt: skip
        assert main(wrong) == 2, wrong
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and text in error, error
    assert not (tmp_path / "new").exists()


def test_a_run_without_a_checkpoint_begins_again(tmp_path, random_model, capsys):
    options = dict(BRIEF, steps=2)
    run = LoopSettings(**options), random_model, tmp_path / "run", letters, count_spread
    stopped = Loop(*run)
    first = stopped.step()
    stopped.close()
    stopped.lock.remove()
    with pytest.raises(InputError, match=r"--resume \S*run begins its run again"):
        Loop(*run)
    again = Loop.resume(tmp_path / "run", problems=letters, reward=count_spread)
    timed, record = ("seconds", "tokens_per_s"), again.step()
    again.close()
    assert {k: v for k, v in first.items() if k not in timed} == {k: v for k, v in record.items() if k not in timed}
    assert again.settings == run[0] and again.folder == (tmp_path / "run").resolve()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/settings.json").write_text('{"model": "tiny", "data": ["x"]}')
    assert main(["--resume", str(tmp_path / "other")]) == 2
    assert "settings that this version does not know" in capsys.readouterr().err


def test_the_start_of_the_command_begins_again_unless_it_is_complete(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("ling_kernels.posttrain.start.EXAMPLES", 60)

    def stop(line):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_start(tmp_path / "run-start", TASKS["sorting"], 2, say=stop)
    flags = ["--out", str(tmp_path / "run"), "--start-steps", "2", "--steps", "1", "--prompts", "2", "--samples", "2"]
    assert main(flags) == 0
    shutil.rmtree(tmp_path / "run")
    capsys.readouterr()
    assert main(flags) == 2
    assert "run-start is complete: --model" in capsys.readouterr().err


@pytest.mark.parametrize("problem", ["sort 1", None, ("a", "b", "c"), Problem(None, "x", "x"), Problem("a", {1}, "x")])
def test_problems_that_are_none(tmp_path, random_model, problem):
    loop = Loop(LoopSettings(steps=1, **BRIEF), random_model, tmp_path / "run", lambda _: problem, count_spread)
    with pytest.raises(InputError, match="not a Problem with a text|what JSON holds"):
        loop.step()
    loop.close()


def test_a_prompt_beyond_the_positions_leaves_the_engine_free(tmp_path, random_model):
    lengths = iter([1, 5000, 1, 1])
    loop = Loop(LoopSettings(steps=1, **BRIEF), random_model, tmp_path / "run",
                lambda _: Problem("a" * next(lengths), "x", "x"), count_spread)  # fmt: skip
    with pytest.raises(InputError, match="exceed the model's"):
        loop.step()
    assert loop.step()["step"] == 1
    loop.close()


def test_settings_of_other_types_are_one_line():
    assert LoopSettings(samples=np.int64(3)).samples == 3
    for name, value in (("prompts", "4"), ("samples", 2.0), ("task", 3), ("lr", "x"), ("replay_routing", 1)):
        with pytest.raises(InputError, match=f"{name} .*: it must be"):
            LoopSettings(**{name: value})


def test_a_trainers_run_is_no_loop(tmp_path, random_model):
    (tmp_path / "checkpoints/step-000001").mkdir(parents=True)
    (tmp_path / "checkpoints/step-000001/state.json").write_text('{"files": {}, "settings": {}, "step": 1}')
    with pytest.raises(InputError, match="no checkpoint of a loop"):
        Loop.resume(tmp_path)


def test_answers_without_a_prompt_or_tokens():
    answers = [Answer([5], [6, 7], [], "stop", 0), Answer([], [6, 7], [], "stop", 0)]
    for wrong, text in ((answers, "no prompt"), ([Answer([5], [], [], "stop", 0)], "no tokens"), ([], "no answers")):
        with pytest.raises(InputError, match=text):  # the first token would get the row of the answer before it
            answer_logp(model(), wrong)
    with pytest.raises(InputError, match="samples is 0"):
        rollout(make_engine(), [[5]], 0, 4)


def test_sampling_is_at_the_loops_temperature(random_model):
    e = Engine(load_model(random_model, dtype=torch.float32), cache_tokens=2000)
    cold = rollout(e, [[5, 6, 7]], 4, 5, temperature=1e-3, seed=1, ends=[])
    greedy = e.generate([[5, 6, 7]], sampling=Sampling(), max_new_tokens=5, stop_token_ids=())
    assert {tuple(a.ids) for a in cold} == {tuple(greedy[0])}
