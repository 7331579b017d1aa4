"""Cost of LLaVA and LLaVA-Mini, estimated from a configuration: FLOPs, parameters, cache and pixel memory."""
