"""The cases, in the order in which they are run and shown."""

from tests.benchmarks.cases import (  # noqa: F401, I001  # importing registers them; the order is the table's
    point,
    batch,
    pipeline,
    threads,
    tasks,
    cached,
    size,
    counter,
    limiter,
    session,
    memory,
    lock,
)
