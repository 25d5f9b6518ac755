"""Who performs operations: connections, pools, retries and transactions.

What never waits stands here, once. What waits is written twice, in `_sync` and `_async`, under equal file names: a diff
of two files shows where they differ.
"""
