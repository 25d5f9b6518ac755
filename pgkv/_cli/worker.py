"""``pgkv worker``: a program's function as a worker of queues."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable
from typing import Any

import typer

from . import console
from .command import DONE, Invocation, argument, flag, load_object, option, span


def worker(
    call: Invocation,
    function: str = argument("MODULE:FUNCTION", "Called with each job. May be async."),
    queues: list[str] = option(
        "--queue -q NAME", "A queue. Later ones are used when earlier ones are empty.", ...
    ),
    concurrency: int = option("--concurrency N", "Jobs at a time.", 8, min=1, max=1000),
    lease: float = span("--lease", "When the job of a dead worker is given to another.", "60s"),
    grace: float = span("--grace", "How long running jobs may take to end after SIGTERM.", "30s"),
    notify: bool = flag("--notify", 'Wake up at puts with wakeup="notify".'),
    unlogged: bool = flag("--unlogged", "Queues with durable=False."),
) -> int:
    """Run the jobs of queues with a function of your program, until SIGTERM or SIGINT.

    The module is found from the working directory. The function gets the job: when it returns, the
    job is done. When it raises, the job waits for its next attempt.

    **Example:** `pgkv worker app.jobs:send --queue emails`
    """
    fn = load_object(function, "MODULE:FUNCTION, such as app.jobs:send")
    if not callable(fn):
        raise typer.BadParameter(f"{function} is not a function")
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    options = {
        "lease": lease,
        "wakeup": "notify" if notify else "poll",
        "durable": not unlogged,
    }
    if inspect.iscoroutinefunction(fn):
        asyncio.run(_run_async(call, fn, queues, options, concurrency=concurrency, grace=grace))
        return DONE
    from ..patterns.queue.api import Queue
    from ..patterns.queue.worker import Worker

    with call.store(create=True) as store:
        of = [Queue(store, name, **options) for name in queues]
        console.note(f"working on {', '.join(queues)}")
        Worker(of, fn, concurrency=concurrency, grace=grace).run()
    return DONE


async def _run_async(
    call: Invocation,
    fn: Callable[..., Any],
    queues: list[str],
    options: dict[str, Any],
    **more: Any,
) -> None:
    from ..aio import AsyncStore
    from ..patterns.queue.api import AsyncQueue
    from ..patterns.queue.worker import AsyncWorker

    async with AsyncStore(call.config()) as store:
        where = store if call.namespace is None else store.namespace(call.namespace)
        console.note(f"working on {', '.join(queues)}")
        await AsyncWorker([AsyncQueue(where, name, **options) for name in queues], fn, **more).run()
