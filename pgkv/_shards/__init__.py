"""One store over many servers: keys are spread over slots, and each slot is a schema on one of them.

`slots` says to which slot a key belongs, `placement` which server has it, `sql` has the map's tables,
`channel` sends each operation to its slot, `store` has the stores, `moves` moves slots.
"""
