"""The private names of torch.distributed.pipelining, all of them here; tests/test_schedules.py pins their behaviour.

It is imported where it is used, as that takes a second, and most runs have no pipeline.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.pipelining import PipelineStage, schedules


def schedule_actions(name: str, ranks: int, stages: int, micro_batches: int) -> list[list[str]]:
    """The actions of each rank in torch's schedule of that name, as text, without its idle slots.

    Raises ValueError where the schedule refuses the numbers. The schedule's constructor computes the order of all
    ranks from a few attributes of the stages, so that no process group is needed.
    """
    from torch.distributed.pipelining import schedules

    stage = SimpleNamespace(num_stages=stages, group_size=ranks, group_rank=0, submod=None)
    schedule = schedules.get_schedule_class(name)([stage] * (stages // ranks), micro_batches)
    return [[str(action) for action in schedule.pipeline_order[r] if action is not None] for r in range(ranks)]


def make_schedule(
    stages: list["PipelineStage"],
    actions: list[list[str]],
    micro_batches: int,
    loss: Callable[[Tensor, Tensor], Tensor],
) -> "schedules._PipelineScheduleRuntime":
    """A schedule that runs these actions of all ranks; sends and receives are added."""
    from torch.distributed.pipelining import schedules

    schedule = schedules._PipelineScheduleRuntime(stages, micro_batches, loss_fn=loss, scale_grads=False)
    parsed = {r: [schedules._Action.from_str(text) for text in row] for r, row in enumerate(actions)}
    schedule._prepare_schedule_with_comms(parsed)
    return schedule
