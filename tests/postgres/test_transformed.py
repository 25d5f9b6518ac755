"""The store's behaviour tests once more over values that are compressed and encrypted; `make test` takes one in twelve."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

import pgkv
from tests.again import adopt
from tests.faults.support import newest
from tests.postgres import (
    test_atomic,
    test_basic,
    test_batch,
    test_cached,
    test_cached_invalidation,
    test_coalesce,
    test_expiry,
    test_pipeline,
    test_races,
    test_rate_limit,
    test_scan,
    test_session,
    test_session_lifetimes,
    test_session_races,
    test_session_rotation,
    test_session_time,
    test_storms,
    test_transaction,
    test_typed,
    test_using,
    test_views,
)
from tests.variants import Variant, closing_all

MODULES = (
    *(test_basic, test_batch, test_atomic, test_scan, test_expiry, test_races, test_storms),
    *(test_transaction, test_using, test_views, test_typed, test_pipeline, test_coalesce),
    *(test_cached, test_cached_invalidation, test_rate_limit, test_session),
    *(test_session_lifetimes, test_session_races, test_session_rotation, test_session_time),
)
# Sums over values that were set: compressed only, so that numbers are plain.
NUMBERS = {
    *(
        "test_atomic__a_sum_that_returns_within_bounds",
        "test_atomic__bounds_hold_against_many",
        "test_atomic__bounds_of_what_is_no_integer",
        "test_atomic__every_write_raises_the_version",
        "test_atomic__increment_if_it_exists",
        "test_atomic__overflow_changes_nothing",
        "test_atomic__what_is_an_integer",
        "test_batch__a_batch_is_all_or_nothing",
        "test_batch__batches_of_a_namespace",
        "test_batch__increment_many",
        "test_batch__increment_many_refuses_an_overflow",
        "test_coalesce__random_tasks",
        "test_coalesce__random_turns",
        "test_expiry__increment_keeps_a_live_key_without_expiry",
        "test_expiry__increment_that_waited_past_the_expiry",
        "test_pipeline__a_lost_answer",
        "test_pipeline__inside_a_transaction",
        "test_pipeline__merged_as_one_by_one",
        "test_pipeline__pipelines_that_lock_each_other",
        "test_rate_limit__against_an_exact_bucket",
        "test_storms__batches_in_opposite_order_never_deadlock",
        "test_transaction__every_operation_works_inside",
        "test_using__autocommit",
        "test_views__namespace",
    ),
}
LEFT_OUT = {
    "test_atomic__bounds_in_a_pipeline": "uses append, which is refused",
    **dict.fromkeys(
        (
            "test_pipeline__in_order",
            "test_pipeline__nobody_sees_half",
            "test_pipeline__using",
        ),
        "queues a comparison, which is refused",
    ),
    **dict.fromkeys(
        (
            "test_coalesce__everything_else_of_a_turn",
            "test_coalesce__gets_of_a_turn",
            "test_coalesce__writes_of_one_kind",
            "test_pipeline__merged_into_few_statements",
        ),
        "counts statements, of which only those that write values are merged",
    ),
    **dict.fromkeys(
        (
            "test_session__somebody_elses_data",
            "test_session_races__a_save_that_waited_for_a_rotation",
            "test_session_rotation__without_grace",
        ),
        "looks at the text in the table",
    ),
    "test_races__a_conflict_that_never_ends": "is about the statement that compares, which is not used here",
    "test_coalesce__order_of_one_key": "get_and_delete takes two statements here, so it goes by itself",
}

pytestmark = newest


def transforms() -> list[Any]:
    """Both, each of which changes every value."""
    keys = {2: b"2" * 32, 1: b"1" * 32}
    cipher = pgkv.AesGcmSiv(keys, context="tests", read_plain=True, plain_integers=True)
    return [pgkv.Zstd(min_size=0), cipher]


@pytest.fixture
def make_store(
    request: Any, dsn: str, variant: Variant, event_loop_runner: asyncio.Runner
) -> Iterator[Callable[..., Coroutine[Any, Any, Any]]]:
    """As everywhere, but with transforms."""
    with closing_all(event_loop_runner) as made:

        async def make(**config: Any) -> Any:
            if "append" in request.node.name:
                pytest.skip("append is refused")
            which = transforms()[: 1 if request.node.originalname in NUMBERS else 2]
            config = {"dsn": dsn, "transforms": which, **config}
            made.append(await variant.connect(config.pop("dsn"), **config))
            return made[-1]

        yield make


adopt(
    globals(),
    MODULES,
    own={"make_store", "variant"},
    left_out=LEFT_OUT,
    marks={test_coalesce: pytest.mark.parametrize("variant", ["async"], indirect=True)},
    one_in=12,
)
