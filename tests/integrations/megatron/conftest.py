import pytest
import torch
import torch.distributed as dist

from tests.integrations.megatron import cpu


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory):
    """Megatron's groups in this process alone."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{tmp_path_factory.mktemp('group') / 'store'}", rank=0, world_size=1)
    cpu.start(1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def megatron(one_rank):
    """The integration, which is undone at the end."""
    from ling_kernels.integrations import megatron

    yield megatron
    megatron.undo()
