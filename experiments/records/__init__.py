"""Records: one JSON file a finished or failed cell."""
