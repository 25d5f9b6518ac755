"""The toolkit on top of the store: rate limiter, lock, sessions, cache decorator; imported as `pgkv.patterns`.

Each module here speaks to PostgreSQL only through operations of `pgkv._sql` run by a store. The names that users
need are re-exported by `pgkv`; this package re-exports none, so that importing one pattern never loads the others.
"""
