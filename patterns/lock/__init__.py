"""Distributed locks on PostgreSQL: locks, semaphores, leader election and the `locked` decorator."""

from .api import AsyncLease, AsyncLock, AsyncSemaphore, Lease, Lock, LockInfo, Semaphore
from .leader import AsyncLeader, Leader
from .locked import fence_sql, locked
from .many import AsyncLeases, Leases

__all__ = [
    "AsyncLeader",
    "AsyncLease",
    "AsyncLeases",
    "AsyncLock",
    "AsyncSemaphore",
    "Leader",
    "Lease",
    "Leases",
    "Lock",
    "LockInfo",
    "Semaphore",
    "fence_sql",
    "locked",
]
