"""`make bench`: what pgkv costs, beside libpq itself, other drivers, Redis and
memcached.

It measures and asserts nothing: a suite with timings in it is broken by a noisy machine. A case is
one small function in `cases/`; `case.py` says how to write one.
"""
