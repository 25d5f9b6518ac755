"""The engine for threads: what blocks."""
