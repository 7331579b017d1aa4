"""Records: one JSON file for each finished or failed cell."""
