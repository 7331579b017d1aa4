"""Recording of the attention between token groups."""
