"""Reads the machine code (SASS) that a kernel became for sm_90: what it does, and how long, without a GPU."""
