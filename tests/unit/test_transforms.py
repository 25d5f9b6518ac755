"""Compression and encryption of values: frames, what is refused, and what no text shows."""

from __future__ import annotations

import sys
from typing import Any

import pytest

import pgkv
from pgkv import AesGcmSiv, Config, ConfigError, DecodingError, Lz4, Zstd
from pgkv import transforms as _transforms
from pgkv._sql.evict import KEPT
from pgkv.transforms import MAGIC, OWN, Transforms, applied

OLD, NEW = b"1" * 32, b"2" * 32
JSON = b'{"name": "Ada", "tags": ["a", "b"]}' * 100


def cipher(**options: Any) -> AesGcmSiv:
    return AesGcmSiv({2: NEW, 1: OLD}, **{"context": "app", **options})


def of(*steps: Any, table: str = "t", size_max: int = 1 << 20) -> Transforms:
    return Transforms(steps, table, size_max)


STEPS = {
    "zstd": (Zstd(min_size=20),),
    "lz4": (Lz4(min_size=20),),
    "aes": (cipher(),),
    "both": (Zstd(min_size=20), cipher()),
}
every_kind = pytest.mark.parametrize("steps", STEPS.values(), ids=STEPS)


@every_kind
def test_what_is_sealed_opens(steps: Any) -> None:
    """Values of every length around min_size, and such as begin like a frame, come back."""
    transforms = of(*steps)
    values = [JSON[:n] for n in range(40)] + [JSON, bytes(1000), MAGIC, MAGIC + bytes(30), b"17"]
    for value in values:
        assert transforms.open(b"k", transforms.seal(b"k", value)) == value


def test_names_of_what_was_done() -> None:
    """A stored value says what it was stored with."""
    assert applied(of(Zstd()).seal(b"k", JSON)) == ("zstd",)
    assert applied(of(Lz4(), cipher()).seal(b"k", JSON)) == ("lz4", "aes:2")
    assert applied(of(Zstd(), cipher()).seal(b"k", b"short")) == ("aes:2",)
    assert applied(of(Zstd()).seal(b"k", b"short")) == applied(b"") == applied(MAGIC) == ()


def test_frames_of_the_first_format() -> None:
    """What was written once is read for ever."""
    assert of(Zstd()).open(b"k", bytes.fromhex("00706b010000") + b"plain") == b"plain"
    for kind, text in FIXTURES.items():
        assert of(*STEPS[kind]).open(b"key", bytes.fromhex(text)) == JSON[:200]


@every_kind
def test_every_flipped_byte(steps: Any) -> None:
    """A changed byte is never a changed value: it is an error, or (compressed only) seen by its size."""
    transforms = of(*steps)
    stored = transforms.seal(b"k", JSON[:100])
    for place in range(len(stored)):
        changed = bytearray(stored)
        changed[place] ^= 0x41
        if transforms.cipher is not None:
            with pytest.raises(DecodingError, match="'k'") as caught:
                transforms.open(b"k", bytes(changed))
            assert "Ada" not in str(caught.value)
    for end in range(6, len(stored)):
        with pytest.raises(DecodingError):
            transforms.open(b"k", stored[:end])


def test_a_value_that_was_moved() -> None:
    """Bound to key, table and context: a copy elsewhere does not open, nor do parts of both that join alike."""
    stored = of(cipher()).seal(b"k", b"secret")
    for other, key in (
        (of(cipher()), b"k2"),
        (of(cipher(), table="u"), b"k"),
        (of(cipher(context="other")), b"k"),
        (of(cipher(context="appt"), table=""), b"k"),
    ):
        with pytest.raises(DecodingError, match="another key, place, context, or damage"):
            other.open(key, stored)


def test_two_frames_of_one_value_differ() -> None:
    """Each has a nonce of its own."""
    transforms = of(cipher())
    assert transforms.seal(b"k", b"v") != transforms.seal(b"k", b"v")


def test_plain_values_under_encryption() -> None:
    """Refused, for a writer of the table could have put them in; numbers and a migration are let in on request."""
    framed = bytes.fromhex("00706b010000") + b"v"
    for plain in (b"v", b"17", b"", framed):
        with pytest.raises(DecodingError, match="read_plain"):
            of(cipher()).open(b"k", plain)
    assert of(cipher(plain_integers=True)).open(b"k", b"-17") == b"-17"
    for plain in (b"v", b"1 7", framed):
        with pytest.raises(DecodingError):
            of(cipher(plain_integers=True)).open(b"k", plain)
    assert of(cipher(read_plain=True)).open(b"k", b"v") == b"v"
    assert of(cipher(read_plain=True)).open(b"k", framed) == b"v"


def test_keys_that_are_missing() -> None:
    """The message and the error name the id."""
    stored = of(AesGcmSiv({9: OLD})).seal(b"k", b"v")
    for reader in (of(cipher()), of(Zstd())):
        with pytest.raises(DecodingError, match="with key 9, which is not given") as caught:
            reader.open(b"k", stored)
        assert (caught.value.key, caught.value.key_id) == ("k", 9)


def test_formats_of_the_future() -> None:
    """Another format or method is an error, not a value."""
    for head in ("00706b020000", "00706b010300", "00706b01"):
        with pytest.raises(DecodingError, match="format is unknown"):
            of(Zstd()).open(b"k", bytes.fromhex(head) + b"v"[: len(head) // 12])


@pytest.mark.parametrize("kind", [Zstd, Lz4])
def test_bombs(kind: Any) -> None:
    """A size above max_value_size, or none, is refused before anything is inflated."""
    stored = of(kind()).seal(b"k", bytes(1 << 20))
    assert len(stored) < 10_000
    with pytest.raises(DecodingError, match="1,048,576 bytes, above max_value_size"):
        of(kind(), size_max=1 << 19).open(b"k", stored)
    if kind is Zstd and sys.version_info < (3, 14):
        import zstandard

        writer = zstandard.ZstdCompressor(write_content_size=False)
        unsized = bytes.fromhex("00706b010100") + writer.compress(bytes(1 << 20))
        with pytest.raises(DecodingError, match="damaged"):
            of(Zstd()).open(b"k", unsized)


def test_what_another_compression_wrote_is_read() -> None:
    """A change of the method leaves what is there readable; without any it is not asked for."""
    assert of(Lz4()).open(b"k", of(Zstd()).seal(b"k", JSON)) == JSON
    assert of(cipher()).open(b"k", of(Lz4(), cipher()).seal(b"k", JSON)) == JSON


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AesGcmSiv({}), "at least one"),
        (lambda: AesGcmSiv([OLD]), "must map"),  # type: ignore[arg-type]  # that is the test
        (lambda: AesGcmSiv({0: OLD}), "from 1 to 255"),
        (lambda: AesGcmSiv({256: OLD}), "from 1 to 255"),
        (lambda: AesGcmSiv({True: OLD}), "from 1 to 255"),
        (lambda: AesGcmSiv({1: OLD[:31]}), "key 1 must be 32 bytes"),
        (lambda: AesGcmSiv({1: "x" * 32}), "key 1 must be 32 bytes"),  # type: ignore[dict-item]  # likewise
        (lambda: AesGcmSiv({1: OLD}, context=b"app"), "context"),  # type: ignore[arg-type]  # likewise
        (lambda: AesGcmSiv({1: OLD}, read_plain=1), "read_plain"),  # type: ignore[arg-type]  # likewise
        (lambda: Zstd(level=20), "level"),
        (lambda: Zstd(min_size=-1), "min_size"),
        (lambda: Lz4(min_size=None), "min_size"),  # type: ignore[arg-type]  # likewise
        (lambda: Config("postgresql://", transforms=[cipher(), Zstd()]), "at most one"),
        (lambda: Config("postgresql://", transforms=[Zstd(), Lz4()]), "at most one"),
        (
            lambda: pgkv.Store.sharded(["postgresql://h/a"], transforms=[Zstd()]),
            "has no transforms",
        ),
        (lambda: Config("postgresql://", transforms=[Zstd]), "at most one"),  # type: ignore[list-item]  # likewise
        (lambda: Config("postgresql://", transforms=Zstd()), "must be a list"),  # type: ignore[arg-type]  # likewise
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    """Refused when they are made, by a message that names the setting and no key."""
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "1111" not in str(caught.value)
    assert "xxxx" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("zstandard" if sys.version_info < (3, 14) else "compression.zstd", Zstd),
        ("lz4.block", Lz4),
        ("cryptography.hazmat.primitives.ciphers.aead", lambda: AesGcmSiv({1: OLD})),
    ],
)
def test_a_missing_library(monkeypatch: pytest.MonkeyPatch, name: str, make: Any) -> None:
    """The error names the extra; pgkv itself needs none of them."""
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(
        ConfigError, match=r"pip install 'pgkv-toolkit\[(compression|encryption)\]'"
    ):
        make()


def test_an_old_openssl(monkeypatch: pytest.MonkeyPatch) -> None:
    """AES-GCM-SIV came with OpenSSL 3.2."""
    from cryptography.hazmat.primitives.ciphers import aead

    def refuse(_: bytes) -> None:
        raise ValueError("not supported by this version of OpenSSL")

    monkeypatch.setattr(aead, "AESGCMSIV", refuse)
    with pytest.raises(ConfigError, match=r"OpenSSL 3\.2"):
        cipher()


def test_no_key_in_any_text() -> None:
    """Not of a transform, nor of a Config."""
    config = Config("postgresql://", transforms=[Zstd(), cipher()])
    for text in (repr(config), str(config.transforms), repr(cipher())):
        assert "1111" not in text
        assert "2222" not in text
    assert "<AesGcmSiv ids=(2, 1) context='app'>" in repr(config)


def test_a_table_without_transforms_loads_nothing() -> None:
    """Neither the module nor a library."""
    import subprocess

    code = (
        "import sys, pgkv; pgkv.Store(pgkv.Config('postgresql://'))\n"
        "assert not {'pgkv.transforms', 'pgkv._sql.transformed', 'zstandard'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert _transforms.METHODS[1] == "zstd"
    assert pgkv.Zstd is Zstd


FIXTURES = {  # of JSON[:200] under "key"
    "both": (
        "00706b010102a1605933225034940c5ebee9af5a5edc6fec6e76db109207127d0a826f9b0decc8b0"
        "25d75e046b024a40147c54ccdca2a4c16fa3f0a51993eb8c473fa7392e98b950b5a760c310f382c4"
        "6f9a17"
    ),
    "lz4": (
        "00706b010200c8000000f10b7b226e616d65223a2022416461222c202274616773223a205b220e00"
        "4f62225d7d23008d5073223a205b"
    ),
    "zstd": (
        "00706b01010028b52ffd20c8450100f07b226e616d65223a2022416461222c202274616773223a20"
        "5b2262225d7d020022a38818ed1c03"
    ),
}


def test_the_rows_of_patterns_are_those_that_are_never_evicted() -> None:
    """Both lists name the prefixes under which patterns keep rows in the store's table."""
    assert {mark.encode() for mark in KEPT} == set(OWN)
