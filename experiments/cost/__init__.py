"""What a vision-language model costs: estimated from its configuration, counted by torch, measured on a machine."""
