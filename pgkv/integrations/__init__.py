"""Adapters for other frameworks, one module or folder each. They translate and decide nothing."""
