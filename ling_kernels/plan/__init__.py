"""Predictions from a model's sizes alone: `python -m ling_kernels.plan train|decode`."""
