"""Distributed locks on PostgreSQL: locks, semaphores, leader election and the `locked` decorator."""
