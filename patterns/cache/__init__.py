"""`cached`: keep what a function returns in PostgreSQL, for all processes."""
