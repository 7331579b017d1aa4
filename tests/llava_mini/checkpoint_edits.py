"""Edits of the weights of an official checkpoint before it is written to a folder."""


def to_half(weights):
    """Convert all weights to float16, to make the files smaller."""
    return {name: weight.half() for name, weight in weights.items()}


def without(*names):
    """Return an edit that removes these weights."""
    return lambda weights: {name: weight for name, weight in weights.items() if name not in names}
