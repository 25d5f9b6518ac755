"""What Flask applications import: the session interface."""

from ._flask_session import PgkvSessionInterface

__all__ = ["PgkvSessionInterface"]
