"""The engine for threads: the code that blocks."""
