"""The names of fp8_inference.py up to version 0.1."""

from .fp8_inference import SCALES, quantize_for_inference_

__all__ = ["SCALES", "freeze_"]
freeze_ = quantize_for_inference_
