"""Rate limits: a token bucket or calendar window per key, shared by all processes."""
