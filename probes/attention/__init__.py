"""Recording attention between token groups."""
