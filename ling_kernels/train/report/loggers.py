"""Places besides the run's folder that get its figures: TensorBoard where it is installed, wandb where it is asked for.

Both have three methods: scalars(step, values), text(step, name, text) and close(). `Loggers` calls them, and goes on
without one that fails: a full disk or a lost network is no reason to stop a run.
"""

import importlib.util
import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from ...errors import InputError, one_line
from ...files import atomic_write

WANDB_ID = "wandb_id"  # a file in the run's folder, so that a resumed run adds to the same curves


class Logger(Protocol):
    def scalars(self, step: int, values: dict[str, float]) -> None: ...

    def text(self, step: int, name: str, text: str) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    def __init__(self, run: Path, since: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(run / "tensorboard", purge_step=since + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self.writer.add_text(name, text, step)

    def close(self) -> None:
        self.writer.close()


class Wandb:
    """wandb's own environment variables hold, such as WANDB_MODE=offline, which needs no account."""

    def __init__(self, run: Path, project: str, settings: dict):
        import wandb

        file = run / WANDB_ID
        try:
            if not file.is_file():
                with atomic_write(file) as partial:
                    partial.write_text(uuid.uuid4().hex[:12])
            self.run = wandb.init(
                project=project, name=run.name, id=file.read_text(), resume="allow", dir=run, config=settings
            )
        except Exception as error:  # of many classes: no account, no network, a full disk
            raise InputError(
                f"--wandb {project}: {error}; WANDB_MODE=offline needs no account and no network"
            ) from None
        self.run.define_metric("*", step_metric="step")  # wandb's own steps cannot go back, a resumed run does
        self.html = wandb.Html

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.run.log({"step": step, **values})

    def text(self, step: int, name: str, text: str) -> None:
        from html import escape

        self.run.log({"step": step, name: self.html(f"<pre>{escape(text)}</pre>", inject=False)})

    def close(self) -> None:
        self.run.finish()


class Loggers:
    """The loggers of a run. One that fails is dropped, with a line for the user."""

    def __init__(self, loggers: list[Logger], say: Callable[[str], None]):
        self.loggers, self.say = loggers, say

    def step(self, record: dict) -> None:
        """Log the numbers of a step's record."""
        numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and math.isfinite(v) and k != "step"}
        self.each("scalars", record["step"], numbers)

    def text(self, step: int, name: str, text: str) -> None:
        self.each("text", step, name, text)

    def close(self) -> None:
        self.each("close")

    def each(self, method: str, *args: Any) -> None:
        for logger in [*self.loggers]:
            try:
                getattr(logger, method)(*args)
            except Exception as error:  # also those of their writer threads, which the next call raises
                self.loggers.remove(logger)
                self.say(f"warning: no more {type(logger).__name__}: {one_line(str(error))}")


def open_loggers(run: Path, since: int, wandb: str | None, settings: dict, say: Callable[[str], None]) -> Loggers:
    """The loggers of a run whose first `since` steps are done. Raises InputError where wandb cannot begin."""
    loggers: list[Logger] = []
    if installed("tensorboard"):
        try:
            loggers.append(TensorBoard(run, since))
        except (OSError, ImportError) as error:  # ImportError: of a version that torch does not take
            say(f"warning: no TensorBoard: {one_line(str(error))}")
    if wandb:
        loggers.append(Wandb(run, wandb, settings))
    return Loggers(loggers, say)


def installed(package: str) -> bool:
    """Whether a package can be imported; a mere folder of its name in the working directory, as wandb leaves them,
    does not count."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
