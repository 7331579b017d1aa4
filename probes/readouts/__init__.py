"""Readouts of the hidden states: recorded states, linear probe and logit lens."""
