"""Whole models with random weights, at their real sizes and of their real types: no download."""

import dataclasses
from contextlib import contextmanager

import torch

from ling_kernels.model import Ling, LingConfig
from ling_kernels.nn.fp8 import Fp8Linear, fits, to_fp8
from ling_kernels.nn.frozen import SCALES, freeze_
from ling_kernels.op import E4M3

CODES = 64  # e4m3 codes hold normal numbers times this, of which 448 is beyond any


@contextmanager
def made_as(dtype: torch.dtype, device: str):
    """What is built inside is of this type and there."""
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def without_mtp(name: str) -> LingConfig:
    """A preset whose decoding guesses nothing ahead."""
    return dataclasses.replace(LingConfig.preset(name), num_nextn_predict_layers=0)


@torch.no_grad()
def random_model(config: LingConfig, precision: str, device: str, head: str = "bf16") -> Ling:
    """As load_model gives one of fp32, bf16, or fp8 weights (head: or of lm_head too), without its checkpoint.

    Weights are made where they stay, an expert at a time, so that Ling-flash in FP8 fits the GPU that it is for.
    """
    with made_as(torch.float32 if precision == "fp32" else torch.bfloat16, "meta"):
        model = Ling(config)
    if precision == "fp8":
        to_fp8(model)
        if head == "fp8" and fits(model.lm_head.weight):
            model.lm_head = Fp8Linear.of(model.lm_head)
        freeze_(model)
    model = model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    for w in model.parameters():
        if w.ndim < 2:
            w.fill_(1)
            continue
        for part in w if w.ndim == 3 else (w,):
            x = torch.randn(part.shape, generator=generator, device=device)
            part.copy_(CODES * x if w.dtype == E4M3 else config.initializer_range * x)
    for name, buffer in model.named_buffers():
        if name.endswith(SCALES):
            buffer.fill_(config.initializer_range / CODES)
    for router in model.routers():
        router.expert_bias.zero_()
    model.reset_buffers()
    return model.eval()
