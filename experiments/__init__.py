"""A config in, a record out; records in, tables and figures out."""
