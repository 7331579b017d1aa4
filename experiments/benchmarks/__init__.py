"""Benchmarks that measure time and memory on the machine they run on."""
