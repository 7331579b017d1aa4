"""Types of questions: how many questions of a type a result about it needs."""

FEWEST_QUESTIONS = 6
"""With fewer, no exact paired test rejects at the one-sided level 0.025: 0.5 ** 5 is above it."""
