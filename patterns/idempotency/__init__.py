"""Idempotency keys: work runs once for a key, and retries get the first outcome."""
