"""What can be read off the hidden states: logit lens and linear probe."""
