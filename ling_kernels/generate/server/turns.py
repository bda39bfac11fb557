"""Work for clients that takes time: it is done in threads, a piece of each client in turn."""

import asyncio
import functools
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from ...errors import Busy

Result = TypeVar("Result")


@dataclass(eq=False)
class Work:
    function: Callable[[], Any]
    done: asyncio.Future
    waiters: int = 0


class Turns:
    """Calls functions in threads. The next call is of the client that has waited the longest since its last one.

    what: the calls' name in messages. most: calls of a client that may wait; None: any number.
    """

    def __init__(self, threads: int, what: str, most: int | None = None):
        self.threads, self.what, self.most = ThreadPoolExecutor(threads, what), what, most
        self.waiting: dict[str, dict[Hashable, Work]] = {}  # by client, in turn, and by key, in order
        self.tasks: list[asyncio.Task] = []  # one for each thread that is at work
        self.most_tasks = threads

    async def call(self, client: str, function: Callable[..., Result], *args, key: Hashable = None) -> Result:
        """function(*args). It isn't called once its client has gone, and called once for those of a client that wait
        with the same key. Raises its errors, and Busy where too many of the client's calls wait."""
        mine = self.waiting.get(client, {})
        work = mine.get(key)
        if work is None:
            if self.most is not None and len(mine) >= self.most:
                raise Busy(f"{self.most} {self.what} of this client are waiting")
            work = Work(functools.partial(function, *args), asyncio.get_running_loop().create_future())
            key = work if key is None else key
            self.waiting.setdefault(client, {})[key] = work
            self.tasks = [task for task in self.tasks if not task.done()]
            if len(self.tasks) < self.most_tasks:
                self.tasks.append(asyncio.create_task(self.run()))
        work.waiters += 1
        try:
            return await asyncio.shield(work.done)
        finally:
            work.waiters -= 1
            mine = self.waiting.get(client, {})
            if not work.waiters and mine.get(key) is work:  # it has not begun, and all who waited have gone
                del mine[key]
                if not mine:
                    del self.waiting[client]

    async def run(self) -> None:
        while self.waiting:
            client, mine = next(iter(self.waiting.items()))
            work = mine.pop(next(iter(mine)))
            self.put_last(client)
            try:
                result = await asyncio.get_running_loop().run_in_executor(self.threads, work.function)
            except Exception as error:
                work.done.set_exception(error)
            else:
                work.done.set_result(result)
            self.put_last(client)  # also behind those that came meanwhile

    def put_last(self, client: str) -> None:
        mine = self.waiting.pop(client, None)
        if mine:
            self.waiting[client] = mine
