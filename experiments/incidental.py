"""Settings that say where a cell ran, where it wrote and for which table: they do not change what it finds."""

INCIDENTAL = ("name", "device", "threads", "results", "save", "batch_size")
