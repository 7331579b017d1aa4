"""Settings: their schema, their registration with Hydra, and the identity of a cell."""
