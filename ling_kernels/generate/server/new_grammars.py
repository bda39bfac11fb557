"""New grammars of bodies, which may take seconds: they are read one at a time, for the clients in turn."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ...errors import Busy, InputError
from ..grammar import Grammar, Grammars

MOST_WAITING = 32  # new grammars of a client


class BodyGrammars(Grammars):
    """The server's grammars as one body sees them: it lists new ones, of which it has the text alone."""

    def __init__(self, grammars: Grammars):
        vars(self).update(vars(grammars))  # with the same cache
        self.new: dict[str, None] = {}  # their sources, in order
        self.found: dict[str, Grammar | InputError] = {}  # stays here when the cache forgets it

    def compiled(self, source: str) -> Grammar:
        found = self.found.get(source) or self.known(source)
        if isinstance(found, InputError):
            raise found
        if found is None:
            self.new[source] = None
            return Grammar(source, None, self.end, self.tokens.vocab_size)
        self.found[source] = found
        return found


class NewGrammars:
    """Reads new grammars in a thread. The next one is of the client that has waited the longest since its last one."""

    def __init__(self):
        self.waiting: dict[str, dict[str, list[asyncio.Future]]] = {}  # by client, in turn, and by source
        self.thread = ThreadPoolExecutor(1, "grammars")
        self.task: asyncio.Task | None = None

    async def read(self, compiled: Callable[[str], Grammar], client: str, source: str) -> Grammar:
        """What `compiled` makes of a source. Raises its InputError, and Busy where too many of the client's wait."""
        mine = self.waiting.setdefault(client, {})
        if source not in mine and len(mine) >= MOST_WAITING:
            raise Busy(f"{MOST_WAITING} new grammars of this client are waiting to be read")
        future = asyncio.get_running_loop().create_future()
        mine.setdefault(source, []).append(future)
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self.run(compiled))
        try:
            return await future
        finally:  # also where the client has gone
            self.forget(client, source, future)

    def forget(self, client: str, source: str, future: asyncio.Future) -> None:
        sources = self.waiting.get(client, {})
        futures = sources.get(source, [])
        if future in futures:
            futures.remove(future)
        if not futures:
            sources.pop(source, None)
        if not sources:
            self.waiting.pop(client, None)

    async def run(self, compiled: Callable[[str], Grammar]) -> None:
        while self.waiting:
            client, sources = next(iter(self.waiting.items()))
            source = next(iter(sources))
            try:
                grammar, error = await asyncio.get_running_loop().run_in_executor(self.thread, compiled, source), None
            except Exception as caught:
                grammar, error = None, caught
            if client in self.waiting:  # also behind those that came meanwhile
                self.waiting[client] = self.waiting.pop(client)
            for sources in self.waiting.values():  # others may wait for the same
                for future in sources.pop(source, []):
                    if future.done():  # its client has gone
                        continue
                    future.set_result(grammar) if error is None else future.set_exception(error)
            self.waiting = {name: sources for name, sources in self.waiting.items() if sources}
