"""The commands of ``pgkv``, their frame, and how they read and write."""
