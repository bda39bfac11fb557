"""A rank of an engine over several processes, which rank 0 starts (workers.py): follows its messages until they end."""

import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

from ..errors import InputError, one_line
from ..model.decode import empty_caches
from .adapters import Adapters
from .divided import FollowForward, load_part
from .divided_pages import FollowCopies


def receive(connection: Connection, messages: queue.SimpleQueue) -> None:
    """Receive rank 0's messages. Its end is that of this process, which may wait for it in a pass."""
    try:
        while (message := connection.recv())[0] != "end":
            messages.put(message)
    except (EOFError, OSError):
        pass
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def follow(connection: Connection, messages: queue.SimpleQueue, rank: int) -> None:
    """Load a part, then run what rank 0 runs."""
    _, (n, file, threads, folder, load, pin) = messages.get()
    load["device"] = torch.device("cuda", rank) if torch.device(load["device"]).type == "cuda" else torch.device("cpu")
    torch.set_num_threads(threads)
    torch.zeros(1, device=load["device"])  # a GPU that does not work fails here
    connection.send(("started", None))
    model, share = load_part(n, rank, file, folder, load, pin)
    connection.send(("loaded", None))
    _, (folders, layers, pages, page_size, dtype, options) = messages.get()
    adapters = None if folders is None else Adapters(model, folders, share)
    caches = empty_caches(model.config, layers, pages, page_size, dtype, load["device"])
    forward = FollowForward(model, caches, page_size, *options, adapters)
    connection.send(("serving", None))
    copies = FollowCopies(connection, n, rank, model, caches, page_size)
    calls: dict[str, Callable[[Any], None]] = {
        "fill": forward.fill, "pass": forward.run, "memory": copies.memory, "identity": copies.identity,
        "save": copies.save, "load": copies.load,
    }  # fmt: skip
    while True:
        name, content = messages.get()
        calls[name](content)


def serve(connection: Connection, rank: int) -> int:
    """Be rank `rank` until rank 0 ends; the exit code after an error, which rank 0 is told."""
    messages = queue.SimpleQueue[Any]()
    threading.Thread(target=receive, args=[connection, messages], daemon=True).start()
    try:
        follow(connection, messages, rank)
    except InputError as error:
        connection.send(("refused", str(error)))
    except BaseException as error:
        traceback.print_exc()
        connection.send(("failed", one_line(f"{type(error).__name__}: {error}")))
    return 1


if __name__ == "__main__":
    sys.exit(serve(Connection(int(sys.argv[1])), int(sys.argv[2])))
