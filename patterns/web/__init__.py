"""Middleware of the patterns for ASGI and WSGI, independent of any framework."""
