"""Models and processors, built from a configuration."""
