"""One file a table: each gives a ``Table``."""
