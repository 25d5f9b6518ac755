"""client_ip: who may say where a request comes from."""

from __future__ import annotations

from typing import Any

import pytest

import pgkv


def asgi(peer: str | None, *forwarded: str) -> dict[str, Any]:
    """An ASGI scope with that many X-Forwarded-For headers."""
    headers = [(b"host", b"x"), *((b"x-forwarded-for", each.encode()) for each in forwarded)]
    return {"type": "http", "client": (peer, 1) if peer else None, "headers": headers, "path": "/"}


def wsgi(peer: str | None, *forwarded: str) -> dict[str, Any]:
    """A WSGI environ: servers join repeated headers by commas."""
    environ = {"REMOTE_ADDR": peer or "", "wsgi.version": (1, 0)}
    return environ | ({"HTTP_X_FORWARDED_FOR": ",".join(forwarded)} if forwarded else {})


PROXIES = ("10.0.0.0/8", "2001:db8:ffff::/48", "unix")
# trusted proxies, peer, X-Forwarded-For, key
TABLE = [
    # no proxy is trusted: headers are ignored
    ((), "192.0.2.1", [], "192.0.2.1"),
    ((), "192.0.2.1", ["198.51.100.7"], "192.0.2.1"),
    ((), "10.0.0.1", ["198.51.100.7"], "10.0.0.1"),
    # the peer is no proxy: neither
    (PROXIES, "192.0.2.1", ["198.51.100.7"], "192.0.2.1"),
    # the proxy appended the client; what the client wrote stands left of it
    (PROXIES, "10.0.0.1", ["198.51.100.7"], "198.51.100.7"),
    (PROXIES, "10.0.0.1", ["1.1.1.1, 198.51.100.7"], "198.51.100.7"),
    (PROXIES, "10.0.0.1", ["1.1.1.1", "198.51.100.7"], "198.51.100.7"),
    (PROXIES, "10.0.0.1", ["10.9.9.9, 198.51.100.7"], "198.51.100.7"),
    # a chain of proxies
    (PROXIES, "10.0.0.1", ["1.1.1.1, 198.51.100.7, 10.0.0.2, 10.0.0.3"], "198.51.100.7"),
    (PROXIES, "10.0.0.1", ["10.0.0.3, 10.0.0.2"], "10.0.0.3"),
    # ports, brackets, spaces, zones, IPv4 in IPv6
    (PROXIES, "10.0.0.1", ["198.51.100.7:4711"], "198.51.100.7"),
    (PROXIES, "10.0.0.1", ["[2001:db8::7]:4711"], "2001:db8::/64"),
    (PROXIES, "10.0.0.1", [' "[2001:db8::7]" '], "2001:db8::/64"),
    (PROXIES, "::ffff:10.0.0.1", ["::ffff:198.51.100.7"], "198.51.100.7"),
    ((), "fe80::1%eth0", [], "fe80::/64"),
    # what is no address ends the walk at the hop that sent it: never a key of the client's choice
    (PROXIES, "10.0.0.1", ["unknown"], "10.0.0.1"),
    (PROXIES, "10.0.0.1", [""], "10.0.0.1"),
    (PROXIES, "10.0.0.1", ["1.1.1.1, evil, 10.0.0.2"], "10.0.0.2"),
    (PROXIES, "10.0.0.1", ["evil, "], "10.0.0.1"),
    (PROXIES, "10.0.0.1", ["1.1.1.1, unix:, 10.0.0.2"], "10.0.0.2"),
    # an empty element of a list is none (RFC 9110)
    (PROXIES, "10.0.0.1", ["198.51.100.7, "], "198.51.100.7"),
    (PROXIES, "10.0.0.1", ["198.51.100.7,", " ,10.0.0.2,,"], "198.51.100.7"),
    (PROXIES, "10.0.0.1", [" , ,"], "10.0.0.1"),
    (PROXIES, "10.0.0.1", [",".join(["10.0.0.2"] * 5000)], "10.0.0.2"),
    # IPv6 by /64
    ((), "2001:db8:1:2:3:4:5:6", [], "2001:db8:1:2::/64"),
    (PROXIES, "2001:db8:ffff::1", ["2001:db8:1:2:a::1"], "2001:db8:1:2::/64"),
    # a Unix socket
    (PROXIES, None, ["198.51.100.7"], "198.51.100.7"),
    (PROXIES, None, [], "unix"),
    # ... as servers name its peer: waitress, werkzeug, and the path of the socket
    (PROXIES, "localhost", ["198.51.100.7"], "198.51.100.7"),
    (PROXIES, "<local>", ["198.51.100.7"], "198.51.100.7"),
    (PROXIES, "unix:", ["198.51.100.7"], "198.51.100.7"),
    (PROXIES, "/run/site.sock", ["198.51.100.7"], "198.51.100.7"),
    (PROXIES, "localhost", [], "unix"),
    # a name that a test client gives
    (PROXIES, "testclient", ["198.51.100.7"], "testclient"),
]


@pytest.mark.parametrize("make", [asgi, wsgi])
@pytest.mark.parametrize(("trusted", "peer", "forwarded", "key"), TABLE)
def test_spoofing_table(
    make: Any, trusted: tuple[str, ...], peer: str | None, forwarded: list[str], key: str
) -> None:
    """Only a trusted proxy is believed, and of its header only what it appended."""
    assert pgkv.client_ip(trusted)(make(peer, *forwarded)) == key


def test_no_address_is_no_shared_bucket() -> None:
    """A peer without an address is an error that tells the way out, unless "unix" is trusted."""
    for peer in (None, "localhost", "unix:", "/run/site.sock"):
        with pytest.raises(pgkv.ConfigError, match="unix"):
            pgkv.client_ip(["10.0.0.0/8"])(asgi(peer, "198.51.100.7"))


def test_other_prefixes() -> None:
    """ipv6_prefix says how much of an IPv6 address is one client."""
    scope = asgi("2001:db8:1:2:3:4:5:6")
    assert pgkv.client_ip(ipv6_prefix=48)(scope) == "2001:db8:1::/48"
    assert pgkv.client_ip(ipv6_prefix=128)(scope) == "2001:db8:1:2:3:4:5:6"


@pytest.mark.parametrize(
    "options",
    [{"trusted_proxies": ["10.0.0.0/33"]}, {"trusted_proxies": "10.0.0.1"}, {"ipv6_prefix": 0}],
)
def test_wrong_settings(options: dict[str, Any]) -> None:
    """Refused when the function is made."""
    with pytest.raises(pgkv.ConfigError):
        pgkv.client_ip(**options)
