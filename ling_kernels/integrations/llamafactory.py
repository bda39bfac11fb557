"""`patch` of ling_kernels.integrations.transformers as a kernel of LlamaFactory's version 1, named ling_kernels.

    torchrun --nproc-per-node 8 -m ling_kernels.integrations.llamafactory sft config.yaml

with `kernel_config: {name: auto, include_kernels: ling_kernels}` in config.yaml. LlamaFactory has no entry points for
kernels of other packages, so this module starts its launcher.
"""

from typing import Any

from ..errors import InputError
from .versions import require

_registry = require("llamafactory.v1.plugins.model_plugins.kernels.registry", "llamafactory", ">=0.9.5,<0.10")
BaseKernel: Any = _registry.BaseKernel

from .transformers import patch  # noqa: E402


@_registry.register_kernel
class LingKernels(BaseKernel):
    """Runs where LlamaFactory runs."""

    _kernel_id = "ling_kernels"
    _device = [_registry.get_current_accelerator().type]

    @classmethod
    def apply(cls, **kwargs: Any) -> Any:
        """Patch the model that LlamaFactory has loaded. Raises InputError as `patch` does."""
        if kwargs.get("model") is None:
            raise InputError("the kernel ling_kernels of LlamaFactory needs a model")
        return patch(kwargs["model"])


if __name__ == "__main__":
    require("llamafactory.v1.launcher", "llamafactory").main()
