"""Data sets: generated scenes, photographs, and LLaVA-format conversation files."""
