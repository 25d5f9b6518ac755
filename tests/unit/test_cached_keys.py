"""The keys of cached calls: no two different argument lists share one, equal ones always do, in every
process."""

from __future__ import annotations

import enum
import functools
import gc
import importlib
import ipaddress
import math
import os
import struct
import subprocess
import sys
import weakref
from collections import Counter, OrderedDict, defaultdict, namedtuple
from dataclasses import dataclass, make_dataclass
from datetime import UTC, date, datetime, time, timedelta, timezone, tzinfo
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from uuid import UUID
from zoneinfo import ZoneInfo

import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import pgkv
from pgkv.patterns.cache.key import Binder, Unencodable, encode
from tests import FULL


class Variant(enum.Enum):
    RED = 1
    BLUE = 2


class Number(enum.IntEnum):
    ONE = 1


@dataclass
class Point:
    x: Any
    y: Any = 0


@dataclass
class Other:
    x: Any
    y: Any = 0


class Struct(msgspec.Struct):
    x: Any
    y: Any = 0


class Model(pydantic.BaseModel):
    x: Any
    y: Any = 0


class Pair(NamedTuple):
    x: Any
    y: Any


class Permission(enum.Flag):
    READ = 1
    WRITE = 2


class Loud(str):
    """A str whose methods do not tell its value."""

    __slots__ = ("volume",)

    def __str__(self) -> str:
        return "LOUD"


class Tagged(str):  # noqa: SLOT000  # its attributes are what the test is about
    tag: object


class LyingInt(int):
    def __int__(self) -> int:
        return 7


class Evening(datetime):
    def isoformat(self, sep: str = "T", timespec: str = "auto") -> str:
        return "evening"


class FakeDate(date):
    """As a library that freezes clocks has it."""


class Id(UUID):
    pass


class Money(Decimal):
    def __str__(self) -> str:
        return "much"


class Delay(timedelta):
    pass


class Silent(tuple[Any, ...]):
    __slots__ = ()

    def __iter__(self) -> Any:
        return iter(())


class Tenant:
    def __init__(self, name: str, cache: object = None) -> None:
        self.name, self.cache = name, cache

    def __cache_key__(self) -> str:
        return self.name


plain_values = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text()
    | st.binary()
    | st.sampled_from(Variant)
    | st.datetimes(timezones=st.none() | st.just(UTC))
    | st.dates()
    | st.timedeltas()
    | st.decimals(allow_nan=False)
    | st.uuids()
    | st.text(alphabet="ab/.").map(PurePosixPath)
    | st.times(
        timezones=st.sampled_from([None, UTC, ZoneInfo("Europe/Berlin"), ZoneInfo("Asia/Tokyo")])
    )
    | st.fractions()
    | st.ip_addresses()
    | st.builds(range, st.integers(-3, 3), st.integers(-3, 3), st.sampled_from([1, 2, -1]))
    | st.sampled_from(
        [UTC, timezone(timedelta(hours=1)), timezone(timedelta(hours=1), "X"), ZoneInfo("UTC")]
    )
    | st.sampled_from([Permission.READ, Permission.WRITE, Permission.READ | Permission.WRITE])
    | st.text(max_size=3).map(Loud)
    | st.integers().map(LyingInt)
    | st.dates().map(lambda day: FakeDate(day.year, day.month, day.day))
    | st.uuids().map(lambda value: Id(value.hex))
    | st.decimals(allow_nan=False).map(Money)
    | st.timedeltas().map(lambda value: Delay(value.days, value.seconds, value.microseconds))
    | st.sampled_from([struct.unpack("!d", b"nan.....")[0], math.nan, ...])
)
# Deferred: a failure then shows a name instead of the whole of it.
scalars: st.SearchStrategy[Any] = st.deferred(lambda: plain_values)
# No NaN inside sets: two of them are two members, which makes `same` below ambiguous.
hashables = st.recursive(
    scalars.filter(
        lambda value: value is not None and not (isinstance(value, float) and math.isnan(value))
    ),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner),
    max_leaves=5,
)
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(hashables, inner, max_size=3)
        | st.sets(hashables, max_size=3)
        | st.frozensets(hashables, max_size=3)
        | st.builds(Point, inner, inner)
        | st.builds(Struct, inner, inner)
        | st.builds(Pair, inner, inner)
        | st.lists(inner, max_size=3).map(Silent)
        | st.dictionaries(hashables, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(hashables, inner, max_size=3).map(lambda items: defaultdict(list, items))
        | st.lists(hashables, max_size=3).map(Counter)
        | st.builds(functools.partial, st.sampled_from([max, math.sqrt, Point]), inner)
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    """Whether two values are the same argument: equal, of one type, down to every part. Written
    without a look at the encoding."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (
            a == b and math.copysign(1, a) == math.copysign(1, b)
        )
    if isinstance(a, Decimal):
        return bool(a.as_tuple() == b.as_tuple())
    if isinstance(a, datetime | time):
        return a == b and a.fold == b.fold and same(a.tzinfo, b.tzinfo)
    if isinstance(a, tzinfo):
        return str(a) == str(b) and a.utcoffset(None) == b.utcoffset(None)
    if isinstance(a, range):
        return (a.start, a.stop, a.step) == (b.start, b.stop, b.step)
    if isinstance(a, Loud):
        return bool(str.__eq__(a, b))
    if isinstance(a, functools.partial):
        return a.func is b.func and same(a.args, b.args)
    if isinstance(a, OrderedDict):
        return same(list(a.items()), list(b.items()))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, list_of(a), list_of(b)))
    if isinstance(a, set | frozenset | dict):
        pairs_a, pairs_b = [
            list(each.items()) if isinstance(each, dict) else list(each) for each in (a, b)
        ]
        return len(pairs_a) == len(pairs_b) and all(
            any(same(x, y) for y in pairs_b) for x in pairs_a
        )
    if isinstance(a, Point | Struct):
        return same(a.x, b.x) and same(a.y, b.y)
    return bool(a == b)


def list_of(value: Any) -> list[Any]:
    return [value[n] for n in range(len(value))]


@settings(max_examples=1500 if FULL else 75, deadline=None)
@given(values, values)
def test_two_values_share_an_encoding_only_if_they_are_the_same(a: Any, b: Any) -> None:
    """The encoding is injective, and a function of the value."""
    assert (encode(a) == encode(b)) == same(a, b)


@settings(max_examples=500 if FULL else 150, deadline=None)
@given(st.lists(values, max_size=3), st.lists(values, max_size=3))
def test_argument_lists(a: list[Any], b: list[Any]) -> None:
    """The same for whole argument lists: where one argument ends and the next begins matters."""
    binder = make(lambda *args: None)
    assert (key(binder, *a) == key(binder, *b)) == same(a, b)


# What the encoding itself is made of: tags, digits, colons.
tricky = st.text(alphabet="sbti12:;", max_size=5)


@settings(max_examples=3000 if FULL else 300, deadline=None)
@given(st.lists(tricky | tricky.map(str.encode), max_size=3), st.lists(tricky, max_size=3))
def test_texts_that_look_like_the_encoding(a: list[Any], b: list[Any]) -> None:
    """Arguments made of the encoding's own letters do not run into each other."""
    binder = make(lambda *args: None)
    assert (key(binder, *a) == key(binder, *b)) == same(a, b)
    for cut in range(len(text := "".join(b)) + 1):
        moved = [text[:cut], text[cut:]]
        assert (encode(moved) == encode(b)) == same(moved, b)


@given(
    st.lists(
        st.sampled_from([True, 1, 1.0, "1", b"1", 0, 0.0, -0.0, False, None, "", ()]),
        min_size=2,
        max_size=2,
    )
)
def test_near_misses(pair: list[Any]) -> None:
    """What == calls equal (1, True, 1.0) is apart; 0.0 and -0.0 too."""
    a, b = pair
    assert (encode(a) == encode(b)) == same(a, b)


def make(
    fn: Any, ignore: tuple[str, ...] = (), key: Any = None, tags: tuple[str, ...] = ()
) -> Binder:
    return Binder(fn, "name", ignore, key, tags)


def key(binder: Binder, *args: Any, **kwargs: Any) -> str:
    return binder.digest(binder.bind(args, kwargs))


def test_order_does_not_count_where_the_type_has_none() -> None:
    """Dicts, sets and keyword arguments count by their content."""
    assert encode({"a": 1, "b": 2}) == encode({"b": 2, "a": 1})
    assert encode({"x", "y", "z"}) == encode({"z", "y", "x"})
    binder = make(lambda **kw: None)
    assert key(binder, a=1, b=2) == key(binder, b=2, a=1)
    assert key(binder, a=1, b=2) != key(binder, a=2, b=1)
    assert encode([1, 2]) != encode([2, 1])


def test_classes_count() -> None:
    """Equal members of different classes are different; a member of an enum is not its value."""
    seen = [encode(each) for each in (
        Point(1), Other(1), Struct(1), Model(x=1), Pair(1, 0), (1, 0), Variant.RED, Number.ONE, 1,
        Tenant("a"), "a", UUID(int=1), Point, Other, PurePosixPath("a"), date(2020, 1, 1), "2020-01-01",
    )]  # fmt: skip
    assert len(set(seen)) == len(seen)
    assert encode(Tenant("a", object())) == encode(Tenant("a"))
    assert encode(timedelta(seconds=60)) == encode(timedelta(minutes=1))
    zone = timezone(timedelta(hours=1))
    assert encode(datetime(2020, 1, 1, tzinfo=UTC)) != encode(datetime(2020, 1, 1, 1, tzinfo=zone))


def test_positional_and_keyword_calls_are_the_same() -> None:
    """f(1), f(a=1) and f() with that default have one key; *args and **kwargs have theirs."""
    binder = make(lambda a=1, *rest, b=2, **more: None)
    base = key(binder)
    assert base == key(binder, 1) == key(binder, a=1) == key(binder, 1, b=2)
    others = {
        key(binder, 2),
        key(binder, 1, 2),
        key(binder, b=1),
        key(binder, c=2),
        key(binder, 1, (2,)),
    }
    assert len(others | {base}) == 6


class Nowhere(tzinfo):
    """A zone that does not say which it is."""

    def utcoffset(self, _moment: datetime | None) -> timedelta:
        return timedelta(0)

    dst = utcoffset

    def tzname(self, _moment: datetime | None) -> None:
        return None


def deceiving_values() -> list[Any]:
    """Values that subclasses with methods of their own must not make alike."""
    a, b = Tagged("x"), Tagged("x")
    a.tag, b.tag = 1, 2
    loud = Loud("x")
    loud.volume = 11  # type: ignore[attr-defined]  # its slot
    return [
        a, b, Loud("x"), loud, Loud("y"), LyingInt(1), LyingInt(2), Money("1.0"), Money("1.00"),
        Evening(2020, 1, 1), Evening(2020, 1, 2), Silent([1]), Silent([2]),
        time(1), time(1, tzinfo=UTC), time(1, tzinfo=ZoneInfo("Europe/Berlin")),
        time(1, tzinfo=ZoneInfo("Asia/Tokyo")),
        datetime(2020, 1, 1, tzinfo=UTC), datetime(2020, 1, 1, tzinfo=ZoneInfo("UTC")),
        math.nan, struct.unpack("!d", b"nan.....")[0],
        OrderedDict(a=1, b=2), OrderedDict(b=2, a=1), {"a": 1, "b": 2},
        defaultdict(int), defaultdict(list), defaultdict(None), {},
        range(3), range(0, 4, 2), range(0, 3, 2),
        ipaddress.ip_address("10.0.0.1"), "10.0.0.1", ipaddress.ip_address("::a00:1"),
        ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_interface("10.0.0.0/8"),
        functools.partial(max, 1), functools.partial(max, key=1), functools.partial(min, 1), max, min,
        Permission.READ, Permission.READ | Permission.WRITE, Permission(0),
        Tenant.__cache_key__, Fraction(1, 2), Decimal("0.5"), FakeDate(2020, 1, 1), date(2020, 1, 1),
    ]  # fmt: skip


def test_what_methods_say_does_not_count() -> None:
    """A subclass counts by its class, the plain value and its own attributes, whatever its methods say."""
    made = deceiving_values()
    seen = {encode(each) for each in made}
    assert len(seen) == len(made)
    assert seen == {encode(each) for each in deceiving_values()}
    moved = OrderedDict(a=1, b=2)
    moved.move_to_end("a")
    assert encode(moved) == encode(OrderedDict(b=2, a=1))


def test_numpy_scalars() -> None:
    """They count by type, width and value, and not as Python's numbers; arrays are refused."""
    numpy = pytest.importorskip("numpy")
    made = [
        numpy.int64(1), numpy.int32(1), numpy.float64(1), numpy.float32(1), numpy.bool_(1), numpy.str_("1"),
        numpy.bytes_(b"1"), numpy.datetime64("2020-01-01"), numpy.datetime64("2020-01-01T00:00"),
        numpy.float64(-0.0), numpy.float64(0.0), 1, 1.0, True, "1", b"1", 0.0,
    ]  # fmt: skip
    assert len({encode(each) for each in made}) == len(made)
    assert encode(numpy.dtype(">i8").type(5)) == encode(numpy.int64(5))
    for refused in (numpy.array([1]), numpy.longdouble(1)):
        with pytest.raises(Unencodable):
            encode(refused)


def test_two_classes_of_one_name_are_not_mixed_up() -> None:
    """The second is refused while the first lives, as an argument and as the class of one; classes
    that are gone, and a module that was loaded again, are in nobody's way."""

    def row(fields_: str) -> Any:
        return namedtuple("Row", fields_)  # noqa: PYI024  # made twice

    one, two = row("x y"), row("y x")
    binder = make(lambda a: None)
    assert key(binder, one(1, 2)) == key(binder, one(1, 2))
    for value in (two(1, 2), two, [two(1, 2)]):
        with pytest.raises(TypeError, match=r"another class is called.*Row"):
            key(binder, value)
    gone = weakref.ref(one)
    del one
    gc.collect()
    assert gone() is None
    assert key(binder, two(1, 2))
    first, second = (make_dataclass("Made", ["x"]) for _ in range(2))
    assert encode(first(1))
    with pytest.raises(Unencodable):
        encode(second(1))


def test_a_class_that_was_defined_again_takes_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after importlib.reload(): the class that the module has now is the one."""
    before = encode(Other(1))
    again: Any = dataclass(
        type("Other", (), {"__annotations__": {"x": Any}, "__module__": __name__})
    )
    monkeypatch.setattr(sys.modules[__name__], "Other", again)
    assert encode(again(1))
    assert before


MISSING = object()


def test_a_sentinel_that_was_not_passed() -> None:
    """A default without an encoding stands for "not passed"; another such object is refused."""
    binder = make(lambda n, x=MISSING: None)
    assert key(binder, 1) == key(binder, 1, MISSING) != key(binder, 1, None)
    with pytest.raises(TypeError, match="'x'"):
        key(binder, 1, object())


@pytest.mark.parametrize(
    "value",
    [
        object(), lambda: 1, iter([]), [object()], {"a": {1: object()}}, functools.partial(lambda: 1),
        time(1, tzinfo=Nowhere()), defaultdict(lambda: 1), "a".upper,
    ],
)  # fmt: skip
def test_what_has_no_stable_encoding_is_refused_by_name(value: Any) -> None:
    """A TypeError names the parameter and the ways out, whatever depth it lies at."""
    with pytest.raises(TypeError, match=r"'db' cannot be .*ignore=\('db',\).*__cache_key__"):
        key(make(lambda n, db: None), 1, value)


def test_a_value_that_contains_itself_is_refused() -> None:
    """No endless recursion."""
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(Unencodable, match="contains itself"):
        encode(loop)


def test_ignored_parameters() -> None:
    """They do not count, may be anything, and helpers may leave them out wherever they stand."""
    for fn in (lambda db, n, x=3: None, lambda n, db, x=3: None, lambda n, x=3, *, db: None):
        binder = make(fn, ignore=("db",))
        base = binder.digest(binder.bind((), {"n": 1, "db": object()}))

        def helper(*args: Any, binder: Binder = binder, **kwargs: Any) -> str:
            return binder.digest(binder.bind(args, kwargs, lenient=True))

        assert base == helper(1) == helper(n=1) == helper(1, 3) == helper(n=1, db=object())
        assert helper(2) != base != helper(1, 4)
    with pytest.raises(TypeError, match="'nope'"):
        make(lambda n: None, ignore=("nope",))


def test_key_function() -> None:
    """key= gets what `ignore` leaves, bound, and what it returns stands for all of it."""
    binder = make(
        lambda db, user, verbose=False: None, ignore=("db",), key=lambda user, verbose: user["id"]
    )
    assert key(binder, object(), {"id": 1}) == key(
        binder, None, {"id": 1, "x": object()}, verbose=True
    )
    assert key(binder, None, {"id": 1}) != key(binder, None, {"id": 2})
    with pytest.raises(TypeError, match="key= returned"):
        key(make(lambda n: None, key=lambda n: object()), 1)


def test_tag_templates() -> None:
    """Templates are filled in with bound arguments; a name that is none is refused when decorating."""
    binder = make(lambda user, n=2, *, db: None, ("db",), None, ("u:{user.name}:{n}", "all"))
    assert binder.tags(binder.bind((Tenant("x"),), {"db": 1})) == ("u:x:2", "all")
    for template in ("{nope}", "{db}", "{}"):
        with pytest.raises(TypeError, match="names"):
            make(lambda user, db: None, ("db",), None, (template,))


PROGRAM = """
import sys; sys.path.insert(0, {root!r})
from tests.unit.test_cached_keys import *
print(encode([{{'b': 1, 'a': {{Variant.RED, 'x', 2.5, None}}}}, frozenset('hello world'), Point(1, Struct(2)),
  Model(x={{'q', 'r', 's'}}), Decimal('1.50'), UUID(int=7), Path('/a'), Tenant('t'), b'x', timedelta(1), date(2020, 1, 1)]).hex())
"""


def test_keys_are_the_same_in_every_process() -> None:
    """Whatever PYTHONHASHSEED says."""
    root = str(Path(__file__).parents[2])
    answers = set()
    for seed in ("0", "1", "random"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM.format(root=root)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root},
            capture_output=True, text=True, check=True, timeout=60,
        )  # fmt: skip
        answers.add(done.stdout)
    assert len(answers) == 1


SPAWNED = """
import multiprocessing
import pgkv

@pgkv.cached(60)
def f(n: int) -> int:
    return n

def show() -> None:
    print(f.cache_key(1), flush=True)

if __name__ == "__main__":
    show()
    child = multiprocessing.get_context("spawn").Process(target=show)
    child.start()
    child.join()
"""


def test_a_script_and_its_children_share_entries(tmp_path: Path) -> None:
    """In a child of multiprocessing's spawn the script's own module has another name."""
    script = tmp_path / "script.py"
    script.write_text(SPAWNED)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    keys = done.stdout.split()
    assert len(keys) == 2
    assert keys[0] == keys[1]


# -- decorating ------------------------------------------------------------------------------


def test_generators_are_refused() -> None:
    """When decorating, by name."""

    def generator() -> Any:
        yield 1

    async def agenerator() -> Any:
        yield 1

    for fn in (generator, agenerator):
        with pytest.raises(TypeError, match="generator"):
            pgkv.cached(60)(fn)


def test_a_method_has_to_say_what_of_self_counts() -> None:
    """Otherwise decorating it raises, with the advice; each piece of the advice works."""
    with pytest.raises(TypeError, match=r"__cache_key__.*key=.*ignore"):

        class Wrong:
            @pgkv.cached(60)
            def load(self, n: int) -> int:
                return n

    class ByKey:
        @pgkv.cached(60, key=lambda self, n: n)
        def load(self, n: int) -> int:
            return n

    class ByIgnore:
        @pgkv.cached(60, ignore=("self",))
        def load(self, n: int) -> int:
            return n

    class ByMethod:
        @pgkv.cached(60)
        def load(self, n: int) -> int:
            return n

        def __cache_key__(self) -> int:
            return 1

    class Heir(ByMethod):
        __cache_key__ = ByMethod.__cache_key__

        @pgkv.cached(60)
        def more(self, n: int) -> int:
            return n

    assert ByKey().load.cache_key(1) == ByKey().load.cache_key(1)
    assert ByIgnore().load.cache_key(1) == ByIgnore().load.cache_key(n=1)
    assert ByMethod().load.cache_key(1) != Heir().more.cache_key(1)


def test_the_parentheses_are_missed_by_name() -> None:
    """@pgkv.cached alone says what to write."""

    @pgkv.cached
    def f(n: int) -> int:
        return n

    with pytest.raises(TypeError, match="parentheses"):
        f(1)  # type: ignore[call-overload]  # on purpose


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"ttl": 0}, pgkv.InvalidValueError),
        ({"ttl": float("nan")}, pgkv.InvalidValueError),
        ({"stale": -1}, pgkv.InvalidValueError),
        ({"compute_timeout": 0}, pgkv.InvalidValueError),
        ({"jitter": 1}, pgkv.ConfigError),
        ({"beta": float("inf")}, pgkv.ConfigError),
        ({"codec": "pickle"}, pgkv.ConfigError),
        ({"on_error": "ignore"}, pgkv.ConfigError),
        ({"tags": "user"}, pgkv.ConfigError),
        ({"l1": True}, pgkv.ConfigError),
    ],
)
def test_wrong_settings_are_refused_when_decorating(
    options: dict[str, Any], error: type[Exception]
) -> None:
    """Each by its own words."""
    with pytest.raises(error, match=next(iter(options))):
        pgkv.cached(**{"ttl": 60, **options})


def test_l1_and_signed_pickle_are_validated() -> None:
    """An empty first level and a short secret are refused."""
    with pytest.raises(pgkv.ConfigError):
        pgkv.L1(max_entries=0)
    with pytest.raises(pgkv.InvalidValueError):
        pgkv.L1(ttl=0)
    with pytest.raises(pgkv.ConfigError, match="16 bytes"):
        pgkv.SignedPickle(b"short")
    assert "secret" not in repr(pgkv.SignedPickle(b"secret" * 4))


def test_cached_functions_look_like_the_functions() -> None:
    """Name, docstring, signature and the function itself are there; all are listed; they pickle by
    name."""

    @pgkv.cached(60)
    def f(n: int) -> int:
        """Say n."""
        return n

    assert f.__name__ == "f"
    assert f.__doc__ == "Say n."
    assert f.__wrapped__(3) == 3
    assert f in pgkv.cached_functions()
    assert f.cache_info() == pgkv.CacheInfo(0, 0, 0, 0, 0, 0, 0)
    assert "f" in repr(f)


# -- which function a name stands for --------------------------------------------------------

TAKEN = r"another function is cached as .* with name='...'"


def closing_over(value: Any, **options: Any) -> Any:
    @pgkv.cached(60, **options)
    def load(n: int) -> Any:
        return value

    return load


@pytest.mark.parametrize("values", [(1, 2), ("acme", "umbrella"), (max, min)])
def test_closures_made_in_a_loop_need_names(values: Any) -> None:
    """Two functions that one piece of code defines and that close over different things are two
    functions: the second is refused, and works under a name of its own."""
    first = closing_over(values[0])
    with pytest.raises(TypeError, match=TAKEN):
        closing_over(values[1])
    second = closing_over(values[1], name=f"load of {values[1]}")
    assert second.cache_key(1) != first.cache_key(1)
    with pytest.raises(TypeError, match=TAKEN):
        closing_over(values[0], name=f"load of {values[1]}")
    assert closing_over(values[0]).cache_key(1) == first.cache_key(1)


def test_closures_made_one_after_the_other_share_nothing() -> None:
    """A handler that defines its cached function for every request: the earlier ones are gone, and
    their entries are not those of the next one."""
    keys = []
    for tenant in ("acme", "umbrella", "acme"):
        keys.append(closing_over(tenant).cache_key(1))
        gc.collect()
    assert keys[0] == keys[2] != keys[1]


def by_helper(value: Any, **options: Any) -> Any:
    def helper() -> Any:
        return value

    @pgkv.cached(60, **options)
    def load(n: int) -> Any:
        return helper()

    return load


def by_default_of_helper(value: Any, **options: Any) -> Any:
    def helper(kept: Any = value) -> Any:
        return kept

    @pgkv.cached(60, **options)
    def load(n: int) -> Any:
        return helper()

    return load


def by_default(value: Any, **options: Any) -> Any:
    @pgkv.cached(60, **options)
    def load(n: int, kept: Any = value) -> Any:
        return kept

    return load


def by_partial(value: Any, **options: Any) -> Any:
    prepared = functools.partial(list_of, value)

    @pgkv.cached(60, **options)
    def load(n: int) -> Any:
        return prepared()

    return load


def by_cached(value: Any, **options: Any) -> Any:
    @pgkv.cached(60, name="inner")
    def inner(n: int) -> Any:
        return value

    @pgkv.cached(60, **options)
    def load(n: int) -> Any:
        return inner(n)

    return load


def by_wrapper(value: Any, **options: Any) -> Any:
    return pgkv.cached(60, **options)(helpful(lambda n: value))


def by_key(value: Any, **options: Any) -> Any:
    return pgkv.cached(60, **options, key=lambda n: n if value else 0)(of_a_module)


def by_method(value: Any, **options: Any) -> Any:
    return pgkv.cached(60, **options)(Holder(value).load)


def by_variable_assigned_later(value: Any, **options: Any) -> Any:
    @pgkv.cached(60, **options)
    def load(n: int) -> Any:
        return later

    later = value
    return load


def of_a_module(n: int) -> int:
    return n


class Holder:
    def __init__(self, value: Any) -> None:
        self.value = value

    def load(self, n: int) -> Any:
        return self.value


class Opaque:
    """Nothing that a key could hold."""


WAYS = [
    closing_over,
    by_helper,
    by_default_of_helper,
    by_default,
    by_partial,
    by_cached,
    by_wrapper,
    by_key,
]
INDISTINCT = r"their keys cannot tell the two apart: .* with name='...'"


@pytest.mark.parametrize("make", [*WAYS, by_method, by_variable_assigned_later])
@pytest.mark.parametrize("kind", [Opaque, dict])
def test_functions_whose_keys_cannot_tell_them_apart_need_names(make: Any, kind: Any) -> None:
    """Made again when the earlier one is gone: what no key can hold would be shared silently."""
    if make is by_default and kind is dict:
        return  # an argument, whose value is part of the key
    make(kind(), version=kind.__name__)
    gc.collect()
    with pytest.raises(TypeError, match=INDISTINCT):
        make(kind(), version=kind.__name__)
    for name in ("one", "two", "one"):
        make(kind(), version=kind.__name__, name=f"{make.__name__} {name}")
        gc.collect()


@pytest.mark.parametrize("make", WAYS)
def test_functions_made_again_with_constants_or_with_the_same_object(make: Any) -> None:
    """Their keys tell the former apart, and the latter are the same function."""
    keys = []
    for tenant in (("acme", 1, max), ("acme", 2, max), ("acme", 1, max)):
        keys.append(make(tenant, version="constants").cache_key(1))
        gc.collect()
    assert keys[0] == keys[2] != keys[1]
    kept = Opaque()
    for _ in range(3):
        make(kept, version="object")
        gc.collect()


def test_ignored_defaults_tell_no_functions_apart() -> None:
    """A connection, say, of which the program says that it does not count."""
    for _ in range(3):
        by_default(Opaque(), ignore=("kept",), version="ignored")
        gc.collect()


def test_a_nested_function_that_calls_itself_may_be_made_again() -> None:
    """Its own name is not assigned yet when it is decorated, and a sentinel says nothing."""

    def make(base: int) -> Any:
        @pgkv.cached(60)
        def power(n: int, given: object = object()) -> int:
            return base * power(n - 1) if n else 1

        return power

    keys = []
    for base in (2, 3, 2):
        keys.append(make(base).cache_key(5))
        gc.collect()
    assert keys[0] == keys[2] != keys[1]


def unhelpful(fn: Any) -> Any:
    def wrapper(n: int) -> Any:
        return fn(n)

    return wrapper


def helpful(fn: Any) -> Any:
    return functools.wraps(fn)(unhelpful(fn))


def test_lambdas_wrappers_and_functions_of_one_name() -> None:
    """Each second one is refused."""
    kept = [pgkv.cached(60)(lambda n: n)]
    with pytest.raises(TypeError, match=TAKEN):
        pgkv.cached(60)(lambda n: -n)

    def one(n: int) -> int:
        return n

    def two(n: int) -> int:
        return -n

    kept.append(pgkv.cached(60)(unhelpful(one)))
    with pytest.raises(TypeError, match=TAKEN):
        pgkv.cached(60)(unhelpful(two))
    kept += [pgkv.cached(60)(helpful(one)), pgkv.cached(60)(helpful(two))]

    def view(n: int) -> int:
        return n

    kept.append(pgkv.cached(60)(view))

    def view(n: int) -> int:  # type: ignore[no-redef]  # as under two routes of a framework
        return -n

    with pytest.raises(TypeError, match=TAKEN):
        pgkv.cached(60)(view)
    with pytest.raises(TypeError, match=TAKEN):
        pgkv.cached(60)(one)  # its wrapper has the name
    with pytest.raises(TypeError, match=TAKEN):
        pgkv.cached(60, key=lambda n: 0)(view)  # another meaning of the same keys


def test_one_function_may_be_decorated_twice() -> None:
    """With other settings too: it is the same function."""

    def load(n: int) -> int:
        return n

    one, two = pgkv.cached(60)(load), pgkv.cached(5, stale=60, version="1")(load)
    assert one.cache_key(1) == two.cache_key(1)
    assert pgkv.cached(60, version=2)(load).cache_key(1) != one.cache_key(1)


MODULE = """
import pgkv

def factory(x):
    @pgkv.cached(60)
    def inner(n):
        return x
    return inner

@pgkv.cached(60)
def load(n):
    return {result}

class Repo:
    @pgkv.cached(60, ignore=("self",))
    def load(self, n):
        return {result}

inner = factory("{result}")
"""


def test_code_that_runs_again_may_define_its_functions_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module that is reloaded, edited or not, and a notebook's cell that is run again."""
    monkeypatch.syspath_prepend(tmp_path)
    module = tmp_path / "reloaded_by_a_test.py"
    module.write_text(MODULE.format(result=1))
    loaded = importlib.import_module(module.stem)
    old = [loaded.load, loaded.Repo().load, loaded.inner]
    importlib.reload(loaded)
    module.write_text("# moved\n\n" + MODULE.format(result="n + 20"))
    os.utime(module, (1, 1))  # another time than that of the compiled file
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, module.stem)
    edited = importlib.import_module(module.stem)
    assert edited.load.__wrapped__(1) == 21
    assert edited.load.cache_key(1) == old[0].cache_key(1)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    cell = ""
    for n, text in enumerate(["n", "n", "n + 1"]):
        cell = f"import pgkv\n@pgkv.cached(60)\ndef of_a_cell(n): return {text}"
        exec(compile(cell, f"<cell {n}>", "exec"), namespace)
    assert namespace["of_a_cell"].__wrapped__(1) == 2
    twice = cell + "\nfirst = of_a_cell\n@pgkv.cached(60)\ndef of_a_cell(n): return 7"
    with pytest.raises(TypeError, match=TAKEN):
        exec(compile(twice, "<cell>", "exec"), namespace)


def test_static_methods_and_annotations_for_type_checkers() -> None:
    """@cached works over @staticmethod and over @classmethod; of the annotations only the return
    type has to exist at run time."""

    class Repo:
        @pgkv.cached(60)
        @staticmethod
        def alone(n: int) -> int:
            return n

        @pgkv.cached(60)
        @classmethod
        def made(cls, n: int) -> int:
            return n

    repo: Any = Repo()
    assert repo.alone.cache_key(1) == Repo.alone.cache_key(1) == Repo.alone.cache_key(n=1)
    assert Repo.alone.__wrapped__(3) == 3
    assert repo.made.cache_key(1) == Repo.made.cache_key(1) != Repo.alone.cache_key(1)

    @pgkv.cached(60)
    def load(n: int, session: "Nowhere.Session" = None) -> "dict[str, int]":  # type: ignore[name-defined]  # noqa: UP037  # as under TYPE_CHECKING
        return {"n": n}

    assert load._core.codec.decode("k", b'{"n": 1}') == {"n": 1}

    @pgkv.cached(60)
    def wrong() -> Missing:  # type: ignore[name-defined]  # noqa: F821  # on purpose
        return None

    with pytest.raises(pgkv.ConfigError, match="return annotation cannot be resolved"):
        _ = wrong._core.codec


def test_cached_functions_are_collected() -> None:
    """Like any object: no list of the process keeps them, nor what they close over."""

    class Heavy:
        pass

    before = len(pgkv.cached_functions())
    heavy = Heavy()

    @pgkv.cached(60, l1=pgkv.L1())
    def load(n: int) -> Any:
        return heavy  # noqa: F821  # deleted below

    assert load in pgkv.cached_functions()
    seen = [weakref.ref(load), weakref.ref(load.__wrapped__), weakref.ref(heavy)]
    del load, heavy
    gc.collect()
    assert [each() for each in seen] == [None] * 3
    assert len(pgkv.cached_functions()) <= before
