"""The private names of torch.distributed.pipelining, all of them here; tests/test_schedules.py pins their behaviour.

It is imported where it is used, as that takes a second, and most runs have no pipeline.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .turns import take_turns

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
    on_complete: Callable[[int], None],
) -> "schedules._PipelineScheduleRuntime":
    """A schedule that runs these actions of all ranks; sends and receives are added. on_complete is called with the
    number of a stage of this rank right after the action with its last weight gradients."""
    from torch.distributed.pipelining import schedules

    schedule = schedules._PipelineScheduleRuntime(stages, micro_batches, loss_fn=loss, scale_grads=False)
    parsed = {r: [schedules._Action.from_str(text) for text in row] for r, row in enumerate(actions)}
    schedule._prepare_schedule_with_comms(parsed)
    schedule.register_custom_function(schedules._ComputationType.OVERLAP_F_B, run_pair)
    # torch's runtime adds this action; by itself it does work for FSDP alone.
    reduce_grad = schedules._ComputationType.REDUCE_GRAD
    schedule.register_custom_function(reduce_grad, lambda action, context: on_complete(action.stage_index))
    return schedule


def run_pair(action: "schedules._Action", context: "schedules._PipelineContext") -> None:
    """A forward and a backward, which take turns. Each half is what torch's runtime does by itself, one after the
    other."""
    runtime: Any = context.schedule_ref
    stages = {stage.stage_index: stage for stage in runtime._stages}
    f, b = sorted(action.sub_actions or (), key=lambda half: str(half.computation_type) != "F")

    def received(ops: dict, s: int, m: int) -> None:
        for op in ops.pop((s, m), ()):
            op.wait()

    def forward() -> None:
        stage, m = stages[f.stage_index], f.microbatch_index
        received(runtime.fwd_recv_ops, f.stage_index, m)
        out = stage.forward_one_chunk(m, context.arg_mbs[m], context.kwarg_mbs[m], save_forward_output=False)
        runtime._maybe_compute_loss(stage, out, context.target_mbs, m)
        if f.stage_index + 1 in stages:
            stages[f.stage_index + 1].set_local_fwd_input(out, m)

    def backward() -> None:
        stage, m = stages[b.stage_index], b.microbatch_index
        received(runtime.bwd_recv_ops, b.stage_index, m)
        runtime.backward_counter[b.stage_index] += 1
        last = runtime.backward_counter[b.stage_index] == runtime._n_microbatches
        stage.backward_one_chunk(m, loss=runtime._maybe_get_loss(stage, m), full_backward=True, last_backward=last)
        if b.stage_index - 1 in stages:
            stages[b.stage_index - 1].set_local_bwd_input(stage.get_local_bwd_output(m), m)

    take_turns(forward, backward)
