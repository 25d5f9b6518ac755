"""Distributed locks on PostgreSQL: locks, semaphores, leader election and the `locked` decorator."""

from .api import AsyncLease, AsyncLock, Lease, Lock, LockInfo
from .leader import AsyncLeader, Leader
from .locked import fence_sql, locked
from .semaphore import AsyncSemaphore, Semaphore

__all__ = [
    "AsyncLeader",
    "AsyncLease",
    "AsyncLock",
    "AsyncSemaphore",
    "Leader",
    "Lease",
    "Lock",
    "LockInfo",
    "Semaphore",
    "fence_sql",
    "locked",
]
