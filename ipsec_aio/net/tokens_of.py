"""``get_ptoken``: from a socket, descriptor or transport to the token of its connection."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import TYPE_CHECKING, Any, Protocol, cast

from ipsec_aio.backends import current_backend
from ipsec_aio.evidence import IPPROTO_TCP, IPPROTO_UDP, Evidence
from ipsec_aio.flow import pack_address
from ipsec_aio.kernel.sockopts import netns_cookie, protocol_of

from .registry import recall

if TYPE_CHECKING:
    from ipsec_aio.backends.contract import Backend
    from ipsec_aio.tokens import PToken

__all__ = ["get_ptoken"]


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


def get_ptoken(
    source: socket.socket | int | asyncio.BaseTransport | _HasFileno,
    *,
    backend: Backend | None = None,
) -> PToken:
    """Return the token of a connected socket, given as such, by descriptor or by transport.

    Connections that this package made or accepted have theirs, stamp included. Any other socket
    has no evidence but its addresses: ``backend``, or the process default, says what the policies
    do for what its peer sends at this moment, POLICY at most. What came before may be waiting in
    the socket, and was judged by the policies of its time.

    Synchronous, a few system calls. Raises OSError (ENOTCONN, EBADF, ENOTSOCK) for what is no
    connected socket, BackendUnavailable where there is no backend, where it is closed, or where
    the one that the environment names is not open on this loop; TypeError for what is no socket,
    or no open backend.
    """
    fd: Any = source
    if isinstance(source, asyncio.BaseTransport) or hasattr(source, "get_extra_info"):
        transport = cast("asyncio.BaseTransport", source)
        token: PToken | None = transport.get_extra_info("ptoken")
        if token is not None:
            return token
        fd = transport.get_extra_info("socket")
        if fd is None:
            raise OSError("the transport has no socket")
    if not isinstance(fd, int):
        if not hasattr(fd, "fileno"):
            raise TypeError(f"no socket, descriptor or transport: {fd!r}")
        fd = fd.fileno()
    # A duplicate is the same socket to the kernel, and closing it closes nothing.
    with socket.socket(fileno=os.dup(fd)) as sock:
        connection = recall(sock)
        if connection is not None and connection.ptoken is not None:
            return connection.ptoken
        peer = sock.getpeername()
        chosen = current_backend(backend)
        chosen.drain()
        evidence = _evidence(sock, peer, chosen)
    return chosen.resolve(evidence)


def _evidence(sock: socket.socket, peer: Any, backend: Backend) -> Evidence:
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return Evidence(IPPROTO_TCP, b"", 0, b"", 0, doubt="not an IP socket")
    protocol = protocol_of(sock)
    cookie = backend.netns_cookie
    doubt = ""
    if protocol not in (IPPROTO_TCP, IPPROTO_UDP):
        doubt = "neither a TCP nor a UDP socket"
    elif cookie is not None and cookie != netns_cookie(sock):
        doubt = "the socket is in another network namespace"
    host, port = sock.getsockname()[:2]
    return Evidence(
        protocol,
        pack_address(host),
        port,
        pack_address(peer[0]),
        peer[1],
        doubt=doubt,
        after=backend.policies,
    )
