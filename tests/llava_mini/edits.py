"""Changes to the weights of an official checkpoint before it is written."""


def half(weights):
    return {name: weight.half() for name, weight in weights.items()}


def without(*names):
    return lambda weights: {name: weight for name, weight in weights.items() if name not in names}
