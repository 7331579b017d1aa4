"""Data sets: generated scenes and clips, photographs, and LLaVA-format conversation files."""
