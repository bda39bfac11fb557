"""Experiments on small models on a CPU, with their results beside them. Each says how to repeat it."""
