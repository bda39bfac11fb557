"""The tests of ../megatron on one rank with Megatron-core 0.16."""

from tests.integrations.megatron.conftest import megatron, one_rank  # noqa: F401
from tests.integrations.megatron.test_one_rank import *  # noqa: F403
