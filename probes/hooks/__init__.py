"""Forward hooks on the decoder layers of a language model."""
