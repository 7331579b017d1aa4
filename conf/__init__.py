"""The Hydra tree: groups are the paper's axes, experiment/ has one file a figure or table."""
