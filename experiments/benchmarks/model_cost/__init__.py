"""Time, memory and cache of LLaVA and LLaVA-Mini, measured."""
