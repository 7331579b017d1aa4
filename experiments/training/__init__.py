"""Training: the stages of a cell on transformers' Trainer, and their optimizers."""
