"""Middleware of the patterns, for ASGI and WSGI; what framework it stands in it does not know."""
