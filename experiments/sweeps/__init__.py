"""Sweeps: which cells a command line asks for, which are missing, and running them."""
