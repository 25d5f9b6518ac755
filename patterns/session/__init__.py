"""Sessions kept in PostgreSQL: the browser holds a random token, the database its hash."""

from .api import AsyncSessionStore, Session, SessionInfo, SessionStore

__all__ = ["AsyncSessionStore", "Session", "SessionInfo", "SessionStore"]
