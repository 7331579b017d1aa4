"""Benchmarks of this machine: time and memory."""
