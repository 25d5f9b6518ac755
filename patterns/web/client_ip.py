"""`client_ip`: the address of a request's client, without trusting headers that clients can write.

A key function for ASGI and WSGI middleware and for framework adapters. It makes no DNS lookup.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, TypeAlias

from ...config import require_int
from ...errors import ConfigError
from .request import scope_of

HOPS_MAX = 50  # entries of X-Forwarded-For that are read, from the right
UNIX = "unix"

_Address: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"
_Network: TypeAlias = "ipaddress.IPv4Network | ipaddress.IPv6Network"


def client_ip(trusted_proxies: Iterable[str] = (), ipv6_prefix: int = 64) -> Callable[[Any], str]:
    """Return a function that returns the client's address of a request.

    Without `trusted_proxies` that is the peer of the connection, and headers are ignored: any client
    can send an X-Forwarded-For. From a trusted peer the header's addresses are read from the
    right, each appended by the hop after it; the first that is not a trusted proxy is the client.
    Empty entries are skipped. An entry that is not an address ends the search at the hop that sent
    it.

    An IPv6 client usually owns a whole /64, so that is the key; an IPv4-mapped address
    (``::ffff:192.0.2.1``) is the IPv4 address.

    **If you run behind a proxy, list it here**, or all its clients share one bucket. A server that
    replaces the peer's address by itself (uvicorn's ``proxy_headers``, on by default for peers on
    the same host; werkzeug's ``ProxyFix``) has already made that choice; then leave this empty.

    Args:
        trusted_proxies: addresses or networks, such as ``"10.0.0.0/8"``; ``"unix"`` for a proxy
            that connects through a Unix socket, where the peer has no address.
        ipv6_prefix: bits of an IPv6 address that make the key, 1 to 128.

    Returns:
        A function of an ASGI scope, a WSGI environ, or a request of Starlette, FastAPI or Flask.

    Raises:
        ConfigError: an entry is not a network; or (of the function) the peer has no address and
            ``"unix"`` is not trusted.
    """
    if isinstance(trusted_proxies, str):
        raise ConfigError(f"trusted_proxies is a list of networks: [{trusted_proxies!r}]")
    if not hasattr(trusted_proxies, "__iter__"):
        raise ConfigError(
            f"trusted_proxies must be a list of networks, not {type(trusted_proxies).__name__}"
        )
    names = list(trusted_proxies)
    networks = [_network(name) for name in names if name != UNIX]
    trusts_unix = UNIX in names
    require_int("ipv6_prefix", ipv6_prefix, 1, 128)

    def is_trusted(address: _Address) -> bool:
        return any(address.version == each.version and address in each for each in networks)

    @lru_cache(maxsize=4096)
    def shown(address: _Address) -> str:
        if address.version == 4 or ipv6_prefix == 128:
            return str(address)
        return str(ipaddress.ip_network((address, ipv6_prefix), strict=False))

    def key(request: Any) -> str:
        peer, forwarded = _peer_and_forwarded(request)
        address = _address(peer or "")
        if address is None and peer and not _is_unix(peer):
            return peer  # a name that the server gave, such as a test client's
        if address is None and not trusts_unix:
            raise ConfigError(
                "the peer of this request has no address, so that all clients would share one "
                "bucket; behind a proxy on a Unix socket set trusted_proxies=['unix']"
            )
        if address is None or is_trusted(address):
            entries = [entry for entry in forwarded.split(",") if entry.strip()]
            for entry in entries[: -HOPS_MAX - 1 : -1]:
                hop = _address(entry)
                if hop is None:
                    break
                address = hop
                if not is_trusted(hop):
                    break
        return UNIX if address is None else shown(address)

    return key


def _network(name: object) -> _Network:
    try:
        return ipaddress.ip_network(name, strict=False)  # type: ignore[arg-type]  # refuses what it cannot read
    except (TypeError, ValueError):
        raise ConfigError(
            f"trusted_proxies holds {name!r}, which is no address, network or 'unix'"
        ) from None


def _address(text: str) -> _Address | None:
    """Read an address as proxies write it: with a port, in brackets, with a zone."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(address, "ipv4_mapped", None) or address


def _is_unix(peer: str) -> bool:
    """Whether this is a server's name for the peer of a Unix socket: that of waitress, of werkzeug,
    or the path of the socket."""
    return peer in ("localhost", "<local>") or peer.startswith(("unix:", "/", "@"))


def _peer_and_forwarded(request: Any) -> tuple[str | None, str]:
    """The peer's address and what X-Forwarded-For says, of an ASGI scope or a WSGI environ."""
    where = scope_of(request)
    if "headers" not in where:
        return where.get("REMOTE_ADDR"), where.get("HTTP_X_FORWARDED_FOR", "")
    client = where.get("client")
    found = [value for name, value in where["headers"] if name.lower() == b"x-forwarded-for"]
    return (client[0] if client else None), b",".join(found).decode("latin-1")
