"""Benchmark of LLaVA and LLaVA-Mini: time, memory and cache of one answer, with random weights."""
