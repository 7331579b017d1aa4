"""Ratios of CPU time that must not grow, measured and compared with the committed ones: `make bench`."""
