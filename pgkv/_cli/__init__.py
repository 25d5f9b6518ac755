"""The commands of `pgkv`, one module per group."""
