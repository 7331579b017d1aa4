"""The configuration of one experiment: its schema, what Hydra is told of it, and its identity."""
