"""The levels of the prefix cache below the device: host memory, and a folder.

    device --save--> host memory --a thread--> folder
    device <--load-- host memory <--threads--- folder

A page is saved when its place is needed, or with a folder as soon as no request uses it, so that a process that is
killed leaves its pages behind. A request whose prefix may be in the folder waits for it (`Fetch`) while others run; the
files are read to host memory, from which its admission copies them to the device. The engine calls everything here with
its lock, except for the threads' work. Whatever fails costs a page, which is then computed.
"""

import queue
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ...errors import InputError, integer, warn
from ...files import user_path
from .copies import Copies, Event
from .disk import HEADER, DiskPages
from .host import HostPage, HostPages
from .pool import PagePool

READERS = 4  # threads
FETCHES = 8  # requests whose files are read at a time
FETCH_SECONDS = 5.0  # after which a request goes on without what has not come, as from a server of files that hangs
PAUSE_SECONDS = 30.0  # after that, in which no file is read
WAIT_SECONDS = 0.05  # longest sleep of a pass that has nothing but copies and files to wait for
REFRESH_SECONDS = 60.0  # between two notes on disk that a page is still in use
WRITE_SECONDS = 30.0  # longest time that `close` waits for the files


class Spill(NamedTuple):
    """Where pages go that leave the device: bytes of host memory; a folder, with the bytes of its files in all."""

    host: int
    folder: Path | str | None = None
    disk: int = 0


class Fetch:
    """Files that are read for a request."""

    def __init__(self, unread: int):
        self.unread = unread  # files, and one for the search
        self.deadline = time.monotonic() + FETCH_SECONDS

    @property
    def done(self) -> bool:
        return not self.unread or time.monotonic() > self.deadline


class PageLevels:
    """The levels below `pages`, a pool whose caches `copies` moves. identity: computes what pages depend on besides
    their tokens, see copies.page_identity. Raises InputError for limits that hold no page, and for a folder that
    cannot be written."""

    def __init__(self, spill: Spill, pages: PagePool, copies: Copies, identity: Callable[[], bytes]):
        self.pages, self.copies, self.compute_identity = pages, copies, identity
        rows = integer("host", spill.host, 0) // copies.row_bytes
        if rows < 1:
            raise InputError(f"{spill.host} bytes of host memory hold no page of the cache, {copies.row_bytes} bytes")
        self.host = HostPages(copies.memory(rows))
        self.disk: DiskPages | None = None
        self.unsaved: dict[int, bytes] = {}  # pages without a user whose hash is not in host memory, oldest first
        self.loading: dict[int, tuple[Event, HostPage]] = {}  # pages to which a row is being copied
        self.hits: Counter[str] = Counter(device=0, host=0)  # tokens found, by level
        self.skipped = 0  # pages that were not saved or written, because the copies or files before them take longer
        self.changed = threading.Condition()  # of the fetches
        self.reading: dict[bytes, list[Fetch]] = {}  # by the hash of a page whose file is being read
        self.fetches: list[Fetch] = []
        self.paused_until = 0.0
        self.writing = 0  # pages in the writer's queue, and in its hands
        self.jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # of the readers
        self.written: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()  # of the writer
        if spill.folder is not None:
            limit = integer("disk", spill.disk, 0)
            if limit < copies.row_bytes + HEADER.size:
                raise InputError(f"{limit} bytes of files hold no page of the cache, {copies.row_bytes} bytes")
            self.disk, self.hits["disk"] = DiskPages(usable_folder(spill.folder), limit), 0
            self.identity = identity()
            for jobs in [*[self.jobs] * READERS, self.written]:
                threading.Thread(target=work, args=[jobs], daemon=True, name="pages").start()
            self.written.put(partial(self.disk.make_room, 0))
        self.stop = weakref.finalize(self, stop, self.jobs, self.written)

    # Pages that leave the device.

    def release(self, page: int, page_hash: bytes) -> None:
        """No request uses this page any more, whose content the device keeps until its place is needed."""
        held = self.host.use(page_hash)
        if held is None:
            self.unsaved[page] = page_hash
            return
        if self.disk is not None and time.monotonic() - held.written > REFRESH_SECONDS:
            self.write(page_hash, held)
        self.host.leave(held)

    def evict(self, page: int) -> None:
        """This page gets another content now."""
        if page in self.unsaved:
            self.save([page, *(p for p in self.unsaved if p != page)][: self.copies.most])
        if page in self.loading:  # its request was cancelled
            copied, held = self.loading.pop(page)
            copied.synchronize()
            self.host.leave(held)

    def save_released(self, all_of_them: bool) -> None:
        """After a pass: save the pages of finished requests, if they are to go to the folder."""
        while self.disk is not None and self.unsaved:
            self.save([*self.unsaved][: self.copies.most])
            if not all_of_them:
                return

    def save(self, pages: Sequence[int]) -> None:
        held = []
        for page in pages:
            page_hash, row = self.unsaved.pop(page), self.host.take()
            if row is None:
                self.skipped += 1
            else:
                held.append((page, page_hash, row))
        if not held:
            return
        copied = self.copies.save([page for page, _, _ in held], [row.row for _, _, row in held])
        for _, page_hash, row in held:
            row.copied = copied
            self.host.insert(page_hash, row)
            if self.disk is not None:
                self.write(page_hash, row)
            self.host.leave(row)

    def write(self, page_hash: bytes, held: HostPage) -> None:
        """Have a file written, unless half of the rows wait for that already."""
        if self.writing >= max(1, self.host.count // 2):
            self.skipped += 1
            return
        self.host.keep(held)
        held.written = time.monotonic()
        with self.changed:
            self.writing += 1
        path = self.disk.path(self.identity, page_hash)

        def job() -> None:
            try:
                if held.copied is not None:
                    held.copied.synchronize()
                self.disk.write(path, held.row.numpy().data)
            finally:
                self.host.leave(held)
                with self.changed:
                    self.writing -= 1
                    self.changed.notify_all()

        self.written.put(job)

    # Pages that come back.

    def load(self, pages: Sequence[tuple[int, HostPage]]) -> None:
        """Copy rows to allocated pages."""
        for first in range(0, len(pages), self.copies.most):
            part = pages[first : first + self.copies.most]
            copied = self.copies.load([page for page, _ in part], [held.row for _, held in part])
            for page, held in part:
                self.hits["disk" if held.from_disk else "host"] += self.pages.size
                held.from_disk = False
                if copied is None:
                    self.host.leave(held)
                else:
                    self.loading[page] = copied, held

    def loaded(self, pages: Iterable[int]) -> bool:
        """Whether a pass may use these pages."""
        for page in [p for p, (event, _) in self.loading.items() if event.query()]:
            self.host.leave(self.loading.pop(page)[1])
        return not self.loading or self.loading.keys().isdisjoint(pages)

    def fetch(self, hashes: Sequence[bytes]) -> Fetch | None:
        """Begin to read the files of a prefix's pages that are nowhere else; None: later, as too many are being
        read."""
        if self.disk is None:
            return Fetch(0)
        if any(fetch.unread and fetch.done for fetch in self.fetches):
            self.paused_until = time.monotonic() + PAUSE_SECONDS
            warn(f"{self.disk.folder} takes longer than {FETCH_SECONDS:g} s to read: the cache goes on without for now")
        self.fetches = [fetch for fetch in self.fetches if not fetch.done]
        if time.monotonic() < self.paused_until:
            return Fetch(0)
        if len(self.fetches) >= FETCHES:
            return None
        wanted = [h for h in hashes if h not in self.pages.page_of_hash and h not in self.host]
        if not wanted:
            return Fetch(0)
        fetch, identity = Fetch(1), self.identity
        self.fetches.append(fetch)
        self.jobs.put(lambda: self.search(fetch, wanted, identity))
        return fetch

    def search(self, fetch: Fetch, wanted: Sequence[bytes], identity: bytes) -> None:
        """In a thread: have files read up to the first that is missing, or as many as half of the rows."""
        now = time.time_ns()
        for i, page_hash in enumerate(wanted[: max(1, self.host.count // 2)]):
            path = self.disk.path(identity, page_hash)
            if not self.disk.touch(path, now - i):  # the end of a prefix is older than its beginning
                break
            with self.changed:
                first = page_hash not in self.reading
                self.reading.setdefault(page_hash, []).append(fetch)
                fetch.unread += 1
            if first:
                self.jobs.put(partial(self.read, page_hash, path, identity))
        self.finish([fetch])

    def read(self, page_hash: bytes, path: Path, identity: bytes) -> None:
        """In a thread: read a file to host memory."""
        held, complete = self.host.take(), False
        try:
            if held is not None:
                if held.copied is not None:
                    held.copied.synchronize()
                    held.copied = None
                complete = self.disk.read(path, held.row.numpy().data)
        finally:
            with self.changed:
                if complete and identity == self.identity:  # else the weights have changed
                    held.from_disk, held.written = True, time.monotonic()
                    self.host.insert(page_hash, held)
                    self.host.leave(held)
                elif held is not None:
                    self.host.drop(held)
                waiting = self.reading.pop(page_hash)
            self.finish(waiting)

    def finish(self, fetches: Sequence[Fetch]) -> None:
        with self.changed:
            for fetch in fetches:
                fetch.unread -= 1
            self.changed.notify_all()

    def wait(self) -> None:
        """Sleep until a copy or file may have come, as no request can go on without."""
        if self.loading:
            next(iter(self.loading.values()))[0].synchronize()
            return
        with self.changed:
            unread = [fetch for fetch in self.fetches if fetch.unread]
            if len(unread) == len(self.fetches):
                self.changed.wait(WAIT_SECONDS)
            self.fetches = unread

    # Changes of the whole.

    def forget(self) -> None:
        """The weights have changed: no page is of use any more."""
        for event, held in self.loading.values():
            event.synchronize()
            self.host.leave(held)
        self.loading.clear()
        self.unsaved.clear()
        identity = self.compute_identity() if self.disk is not None else b""
        with self.changed:
            self.identity = identity
            self.host.forget()

    def close(self, seconds: float = WRITE_SECONDS) -> None:
        """Wait until the files are written, for at most so many seconds, and end the threads."""
        deadline = time.monotonic() + seconds
        with self.changed:
            while self.writing and self.changed.wait(max(0.0, deadline - time.monotonic())):
                pass
        self.stop()


def usable_folder(folder: Path | str) -> Path:
    """Make the folder. Raises InputError where that fails, or nothing can be written to it."""
    folder = user_path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"the cache cannot be kept in {folder}: {error.strerror or error}") from None
    return folder


def stop(jobs: "queue.SimpleQueue", written: "queue.SimpleQueue") -> None:
    """End the threads once they have done what they have begun."""
    for ended in [*[jobs] * READERS, written]:
        ended.put(None)


def work(jobs: "queue.SimpleQueue[Callable[[], None] | None]") -> None:
    """Run jobs until None comes. A fault of one costs its page alone."""
    while (job := jobs.get()) is not None:
        try:
            job()
        except Exception as error:
            warn(f"the cache's files: {error!r}")
        del job  # else this thread keeps the levels, and with them the caches, until the next job
