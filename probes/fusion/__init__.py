"""Fusion depth: the number of first layers in which text takes in the image."""
