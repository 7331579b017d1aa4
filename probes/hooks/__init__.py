"""Hooks on a language model's decoder layers."""
