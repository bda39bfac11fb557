"""A plugin of vLLM, found by its entry point: `--quantization ling_kernels` serves a block-FP8 Ling by our ops.

Untested inside vLLM. docs/integrations/vllm.md.
"""

from ..serving import plug_in


def register() -> None:
    """Called by vLLM in every process, perhaps more than once. Changes nothing until our quantization is asked for."""

    def connect() -> None:
        from .layers import connect

        connect()

    plug_in("vllm", "0.33", connect)
