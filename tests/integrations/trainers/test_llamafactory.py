"""The kernel ling_kernels in LlamaFactory's registry, applied as its model engine applies kernels."""

import subprocess
import sys

import pytest
import torch
from llamafactory.v1.plugins.model_plugins.kernels.interface import KernelPlugin, get_default_kernels
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from ling_kernels.errors import InputError
from ling_kernels.integrations import llamafactory as ours


def model():
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, moe_intermediate_size=16, num_experts_per_tok=2, num_experts=8,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def test_the_kernel_patches_the_model():
    ids = torch.randint(0, 64, (2, 11))
    before = model()
    kernel = KernelPlugin("auto")(model=model(), include_kernels="ling_kernels")
    assert "ling_kernels" in get_default_kernels()
    assert kernel.config._experts_implementation == "ling_kernels" != before.config._experts_implementation
    torch.testing.assert_close(kernel(ids).logits, before(ids).logits, rtol=1e-4, atol=1e-5)


def test_without_its_name_nothing_changes():
    untouched = KernelPlugin("auto")(model=model(), include_kernels=None)
    assert untouched.config._experts_implementation != "ling_kernels"


def test_a_missing_model_is_named():
    with pytest.raises(InputError, match="needs a model"):
        ours.LingKernels.apply()


def test_the_module_starts_the_launcher():
    """It registers the kernel first. The launcher's own error shows that it was reached."""
    code = (
        "import runpy, sys, llamafactory.v1.launcher as launcher\n"
        "from llamafactory.v1.plugins.model_plugins.kernels.registry import Registry\n"
        "launcher.main = lambda: print(sys.argv[1:], *Registry.get_registered_kernels())\n"
        f"runpy.run_module({ours.__name__!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code, "sft", "x.yaml"], capture_output=True, text=True)
    assert done.stdout.strip() == "['sft', 'x.yaml'] ling_kernels", done.stderr
