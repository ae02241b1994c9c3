"""Outgoing connections that must be protected: which of them are begun, and with what policies.

Rules:

* Where the requirement demands protection, an address counts only if the backend knows policies
  that protect what goes there. Without one, the error comes at once, and nothing is sent.
* A socket of ours gets its own policies, both ways, before it is connected. Where it depends on its
  port which policy governs what it sends, it gets a port first. It is made and connected here,
  address by address as ``loop.create_connection`` does, then handed to that.
* A socket's own policy that finds no SA fails connect(2) at once, while the kernel asks for one. So
  it is tried again for ``NEGOTIATION`` seconds, unless nobody is there who would hear that.
* What makes several sockets race (``happy_eyeballs_delay``, ``interleave``), or brings a socket,
  is left to the loop: user space enforces then.
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ipsec_aio.enforcement import derive
from ipsec_aio.enums import Direction
from ipsec_aio.errors import BackendError, ProtectionError
from ipsec_aio.evidence import IPPROTO_TCP
from ipsec_aio.flow import pack_address
from ipsec_aio.kernel.sockopts import has_key_manager

from .enforce import KERNEL, UNSPECIFIED, USER, Enforcement, Where, enforcement_for

if TYPE_CHECKING:
    from ipsec_aio.backends.contract import Backend
    from ipsec_aio.require import Require

    Info = tuple[int, int, int, str, Any]

__all__ = ["NEGOTIATION", "connect_protected"]

NEGOTIATION = 30.0
"""Seconds that an SA may take, as long as the kernel waits itself (net.core.xfrm_acq_expires)."""
_FIRST_DELAY = 0.01
_LONGEST_DELAY = 0.25

_IP_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_LEFT_TO_THE_LOOP = ("sock", "happy_eyeballs_delay", "interleave")
_RESOLVING = ("family", "proto", "flags", "local_addr", "all_errors")


async def connect_protected(
    loop: asyncio.AbstractEventLoop,
    backend: Backend,
    require: Require,
    enforce: str,
    host: str | None,
    port: int | str | None,
    options: dict[str, Any],
) -> tuple[socket.socket | None, Enforcement | None]:
    """Return a connected socket with policies of its own, and what keeps them, or neither.

    ``options`` are those of ``loop.create_connection``; they are changed to go with the socket.
    Raises what that raises, and ProtectionError, BackendError or ValueError as
    :func:`~.streams.create_connection` says.
    """
    demands = require.demands
    if not (demands.encrypted or demands.integrity):
        if enforce == KERNEL:
            raise ValueError(f"the kernel cannot enforce {require!r}: it demands no protection")
        return None, None
    left = [name for name in _LEFT_TO_THE_LOOP if options.get(name) is not None]
    if left and enforce == KERNEL:
        raise ValueError(f"enforce='kernel' does not go together with {', '.join(left)}=")
    if options.get("sock") is not None or (host is None and port is None):
        return None, None
    infos = await _resolve(loop, host, port, options)
    locals_ = await _resolve_local(loop, options)
    known = [(info, _protecting(backend, require, info, locals_)) for info in infos]
    if not any(where is not None for _, (where, _) in known):
        raise ProtectionError(
            "encrypted" if demands.encrypted else "integrity",
            f"no policy protects connections to {host} port {port}, so none is begun",
        )
    if left or enforce == USER:
        return None, None
    failures: list[Exception] = []
    for info, (where, several) in known:
        if where is None:
            failures.append(_unprotected(info))
            continue
        enforcement = enforcement_for(loop, backend, require, enforce)
        assert enforcement is not None  # noqa: S101
        try:
            sock = await _connect(loop, enforcement, info, where, several, locals_)
        except BackendError:
            raise
        except (OSError, RuntimeError) as error:
            failures.append(error)
            continue
        _hand_over(options, host)
        options["sock"] = sock
        return sock, enforcement
    raise _together(failures, all_errors=bool(options.get("all_errors")))


async def _resolve(
    loop: asyncio.AbstractEventLoop, host: str | None, port: int | str | None, options: Any
) -> Sequence[Info]:
    found = await loop.getaddrinfo(
        host,
        port,
        family=options.get("family", 0),
        type=socket.SOCK_STREAM,
        proto=options.get("proto", 0),
        flags=options.get("flags", 0),
    )
    if not found:
        raise OSError("getaddrinfo() returned empty list")
    return found


async def _resolve_local(
    loop: asyncio.AbstractEventLoop, options: dict[str, Any]
) -> Sequence[Info] | None:
    local = options.get("local_addr")
    if local is None:
        return None
    return await _resolve(loop, local[0], local[1], options)


def _protecting(
    backend: Backend, require: Require, info: Info, locals_: Sequence[Info] | None
) -> tuple[Where | None, bool]:
    """Return the traffic of a connection to an address, None where no policy protects it, and
    whether several may.
    """
    family, _, _, _, address = info
    if family not in _IP_FAMILIES:
        return None, False
    local = _local_address(info, locals_)
    where = Where(local, 0, pack_address(address[0]), address[1])
    outbound = backend.templates(
        IPPROTO_TCP, 0, Direction.OUT, local=local, peer=where.peer, peer_port=where.peer_port
    )
    fitting = [b for b in outbound if not isinstance(derive(require.demands, [b]), str)]
    return (where if fitting else None), len(fitting) > 1


def _local_address(info: Info, locals_: Sequence[Info] | None) -> bytes:
    """Return the address that a connection will have here, as routing has it; any, without one."""
    family, _, _, _, address = info
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            if locals_ is not None:
                own = next(i[4] for i in locals_ if i[0] == family)
                probe.bind((own[0], 0, *own[2:]))
            probe.connect(address)
        except (OSError, StopIteration):
            return UNSPECIFIED[socket.AddressFamily(family)]
        return pack_address(probe.getsockname()[0])


async def _connect(
    loop: asyncio.AbstractEventLoop,
    enforcement: Enforcement,
    info: Info,
    where: Where,
    several: bool,
    locals_: Sequence[Info] | None,
) -> socket.socket:
    family, kind, proto, _, address = info
    sock = socket.socket(family, kind, proto)
    try:
        sock.setblocking(False)
        _bind(sock, locals_)
        where = where._replace(port=sock.getsockname()[1])
        if several and not where.port:
            sock.bind(("", 0))
            where = where._replace(port=sock.getsockname()[1])
        enforcement.begin(sock, where, early=True, both=True)
        found = await _begin(loop, sock, address)
        if found == errno.EINPROGRESS:
            found = await _result(loop, sock, address)
        if found:
            raise OSError(found, f"Connect call failed {address}")
        return sock
    except BaseException:
        enforcement.close()
        sock.close()
        raise


async def _begin(loop: asyncio.AbstractEventLoop, sock: socket.socket, address: Any) -> int:
    """Begin to connect as soon as there is an SA; return the error's number."""
    end = loop.time() + NEGOTIATION
    delay = _FIRST_DELAY
    while (found := sock.connect_ex(address)) == errno.EAGAIN:
        if not has_key_manager():
            raise ProtectionError(
                "encrypted", f"there is no SA to {address[0]}, and nobody to negotiate one"
            )
        if loop.time() >= end:
            raise ProtectionError(
                "encrypted", f"no SA to {address[0]} came of {NEGOTIATION:g} s of negotiating"
            )
        await asyncio.sleep(delay)
        delay = min(2 * delay, _LONGEST_DELAY)
    return found


async def _result(loop: asyncio.AbstractEventLoop, sock: socket.socket, address: Any) -> int:
    """Wait for a connection that is under way; return its error's number."""
    try:
        await loop.sock_connect(sock, address)
    except OSError as error:
        return error.errno or errno.EIO
    return 0


def _bind(sock: socket.socket, locals_: Sequence[Info] | None) -> None:
    if locals_ is None:
        return
    failures: list[Exception] = []
    for family, _, _, _, address in locals_:
        if family != sock.family:
            continue
        try:
            sock.bind(address)
        except OSError as error:
            failures.append(
                OSError(
                    error.errno,
                    f"error while attempting to bind on address {address!r}: "
                    f"{(error.strerror or '').lower()}",
                )
            )
        else:
            return
    raise (
        failures[-1]
        if failures
        else OSError(f"no matching local address with family {sock.family}")
    )


def _hand_over(options: dict[str, Any], host: str | None) -> None:
    """Leave of the options what goes together with a socket."""
    for name in _RESOLVING:
        options.pop(name, None)
    if options.get("ssl") and options.get("server_hostname") is None:
        options["server_hostname"] = host


def _unprotected(info: Info) -> ProtectionError:
    return ProtectionError("encrypted", f"no policy protects connections to {info[4]}")


def _together(failures: list[Exception], *, all_errors: bool) -> Exception:
    """Return several failures as one, the way that asyncio does."""
    if all_errors:
        return ExceptionGroup("create_connection failed", failures)
    if all(str(f) == str(failures[0]) for f in failures):
        return failures[0]
    refused = next((f for f in failures if isinstance(f, ProtectionError)), None)
    if refused is not None:
        return refused
    return OSError(f"Multiple exceptions: {', '.join(str(f) for f in failures)}")
