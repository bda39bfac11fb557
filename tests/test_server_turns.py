"""Work for clients is done in turns of them: it is tokenised, and new grammars are read, one client after the other."""

# ruff: noqa: F811 (a fixture is imported)
import asyncio
import threading

import pytest

pytest.importorskip("fastapi")

from ling_kernels.errors import Busy, InputError  # noqa: E402
from ling_kernels.generate.server.app import make_app  # noqa: E402
from ling_kernels.generate.server.turns import Turns  # noqa: E402
from tests.test_server import BODY, checkpoint, httpx, service  # noqa: E402, F401
from tests.test_server_connections import LONG  # noqa: E402


async def until(condition) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def called(turns: Turns, client: str, function, *args, key=None) -> asyncio.Task:
    return asyncio.create_task(turns.call(client, function, *args, key=key))


def test_turns():
    """A client that comes later is next; what a client wants twice is done once; an error goes to those who wait."""
    order = []

    def upper(source: str) -> str:
        order.append(source)
        if source == "bad":
            raise InputError("it is bad")
        return source.upper()

    async def check() -> None:
        turns = Turns(1, "texts")
        wants = [("a", "x"), ("a", "y"), ("a", "bad"), ("a", "y"), ("b", "z"), ("b", "y"), ("a", "bad"), ("c", "w")]
        found = await asyncio.gather(
            *(called(turns, client, upper, text, key=text) for client, text in wants), return_exceptions=True
        )
        assert [f if isinstance(f, str) else type(f) for f in found] == [
            "X", "Y", InputError, "Y", "Z", "Y", InputError, "W",
        ]  # fmt: skip
        assert not turns.waiting
        assert await turns.call("a", upper, "later") == "LATER"
        assert await asyncio.gather(*(turns.call("a", upper, "again") for _ in range(2))) == ["AGAIN"] * 2

    asyncio.run(check())
    assert order == ["x", "z", "w", "y", "y", "bad", "later", "again", "again"], "without a key each is called"


def test_a_client_that_comes_during_the_work_of_another_is_next():
    order, go = [], threading.Event()

    def work(name: str) -> None:
        order.append(name)
        assert go.wait(LONG)

    async def check() -> None:
        turns = Turns(2, "texts")
        tasks = [called(turns, "a", work, f"a{i}") for i in range(6)]
        await until(lambda: len(order) == 2)
        tasks += [called(turns, "b", work, f"b{i}") for i in range(2)]
        await asyncio.sleep(0.01)
        assert len(order) == 2, "there are two threads"
        go.set()
        await asyncio.gather(*tasks)

    asyncio.run(check())
    assert sorted(order[:2]) == ["a0", "a1"] and "b0" in order[2:4] and "b1" in order[2:6]


def test_clients_that_have_gone_and_one_that_wants_too_much():
    order, go = [], threading.Event()

    def work(name: str) -> str:
        order.append(name)
        assert go.wait(LONG)
        return name

    async def check() -> None:
        turns = Turns(1, "texts", 4)
        first = called(turns, "a", work, "first")
        await until(lambda: order)
        tasks = [called(turns, "a", work, str(i), key=i) for i in range(4)]
        same = called(turns, "a", work, "3", key=3)
        await asyncio.sleep(0)
        with pytest.raises(Busy, match="4 texts of this client are waiting"):
            await turns.call("a", work, "more")
        gone = called(turns, "b", work, "b")
        await asyncio.sleep(0)
        for task in (*tasks, gone):
            task.cancel()
        await asyncio.gather(*tasks, gone, return_exceptions=True)
        later = called(turns, "a", work, "later")
        await asyncio.sleep(0)
        first.cancel()  # while it runs
        go.set()
        assert await asyncio.gather(same, later) == ["3", "later"]
        assert not turns.waiting

    asyncio.run(check())
    assert order == ["first", "3", "later"], "the others were dropped; one call still waited for 3"


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_a_client_does_not_wait_for_the_texts_of_another(checkpoint, path):
    served = service(checkpoint, keys=frozenset("ab"), texts=Turns(2, "texts", 40))
    tokenizer, go, answered = served.tokenizer, threading.Event(), threading.Event()
    begun, answers = [], []

    def slow(real):
        def function(value, *args, **options):
            text = value if isinstance(value, str) else "".join(map(chr, value))
            if "slow" in text:
                begun.append(text)
                assert (go if len(begun) <= 2 else answered).wait(10)
            return real(value, *args, **options)

        return function

    tokenizer.encode = slow(tokenizer.encode)
    if path == "/detokenize":
        tokenizer.decode = slow(tokenizer.decode)
    message = lambda text: [dict(role="user", content=text)]  # noqa: E731
    bodies = {
        "/v1/completions": lambda text: BODY | dict(prompt=text),
        "/v1/chat/completions": lambda text: dict(model="speller", messages=message(text), max_tokens=1),
        "/tokenize": lambda text: dict(messages=message(text)),
        "/detokenize": lambda text: dict(tokens=[*text.encode()]),
    }

    async def check() -> None:
        transport = httpx.ASGITransport(make_app(served))
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=LONG) as client:

            async def ask(key: str, text: str) -> int:
                headers = {"Authorization": f"Bearer {key}"}
                answer = await client.post(path, json=bodies[path](text), headers=headers)
                answers.append(key)
                return answer.status_code

            slow = [asyncio.create_task(ask("a", f"slow {i}")) for i in range(2)]
            await until(lambda: len(begun) == 2)
            slow += [asyncio.create_task(ask("a", f"slow {i}")) for i in range(2, 42)]
            await until(lambda: [*map(len, served.texts.waiting.values())] == [40])
            assert await ask("a", "more") == 429
            other = asyncio.create_task(ask("b", "quick"))
            await until(lambda: len(served.texts.waiting) == 2)
            go.set()
            assert await other == 200 and answers.count("a") <= 3, "one was refused, and two were begun before"
            answered.set()
            assert await asyncio.gather(*slow) == [200] * 42

    asyncio.run(check())
    assert len(begun) == 42
