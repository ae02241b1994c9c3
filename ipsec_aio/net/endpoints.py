"""``create_datagram_endpoint``: asyncio's, with tokens.

Rules:

* Arguments, their checks and the errors' texts are those of the loop's method. What is refused for
  its arguments is refused before anything is opened.
* Where the local port is known, the backend covers it before bind; else right after. The same goes
  for the kernel's enforcement of the requirement, and nothing gets in between.
* A failure or cancellation at any step closes what this call opened, and nothing else: a socket
  that was passed in stays the caller's.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ipsec_aio.backends import resolve_backend
from ipsec_aio.errors import BackendError
from ipsec_aio.evidence import IPPROTO_TCP, IPPROTO_UDP, NEVER
from ipsec_aio.flow import pack_address
from ipsec_aio.log import net_logger

from .datagram import DatagramTransport
from .enforce import KERNEL, Where, check_options, enforcement_for
from .protocols import TokenProtocol, check_protocol
from .witness import Witness, runs_udp

if TYPE_CHECKING:
    from ipsec_aio.backends.contract import Backend, Registration
    from ipsec_aio.require import Require

    from .enforce import Enforcement

_P = TypeVar("_P", bound="asyncio.BaseProtocol | TokenProtocol")

__all__ = ["create_datagram_endpoint"]

_Info = tuple[int, int, int, str, Any]


async def create_datagram_endpoint(
    protocol_factory: Callable[[], _P],
    local_addr: tuple[str, int] | str | None = None,
    remote_addr: tuple[str, int] | str | None = None,
    *,
    family: int = 0,
    proto: int = 0,
    flags: int = 0,
    reuse_port: bool | None = None,
    allow_broadcast: bool | None = None,
    sock: socket.socket | None = None,
    backend: Backend | None = None,
    require: Require | None = None,
    enforce: str = "auto",
    deadline: float = 1.0,
) -> tuple[DatagramTransport, _P]:
    """Open a datagram endpoint on the running loop, as ``loop.create_datagram_endpoint`` does.

    Instances of :class:`DatagramProtocol` get each datagram with its token; other protocols get
    asyncio's plain calls. ``backend`` None takes the process default. Datagrams that do not meet
    ``require`` are dropped and counted in ``transport.ipsec_stats``; where only an identity or SA
    is still awaited, that is after ``deadline`` seconds.

    ``enforce="auto"`` has the kernel drop what it can before Python sees it, where that is
    possible and safe, ``"kernel"`` fails where it is not, ``"user"`` never asks for it;
    ``transport.get_extra_info("ipsec_enforced")`` says which it is (docs/enforcement.md).

    Raises what the loop's method raises, and BackendError where there is no backend, where it is
    closed, or where it cannot cover the port as it was asked to; TypeError for what is no Require
    or no open backend; ValueError for what ``enforce`` or ``deadline`` cannot be, and under
    ``enforce="kernel"``, with the reason, where the kernel cannot enforce the requirement,
    BackendDenied without CAP_NET_ADMIN.
    """
    check_options(require, enforce, deadline)
    loop = asyncio.get_running_loop()
    if sock is not None:
        _check_given(
            sock,
            local_addr=local_addr,
            remote_addr=remote_addr,
            family=family,
            proto=proto,
            flags=flags,
            reuse_port=reuse_port,
            allow_broadcast=allow_broadcast,
        )
        sock.setblocking(False)
        chosen = await resolve_backend(backend)
        opened = _Opened(sock, owned=False)
        with opened:
            opened.enforce(loop, chosen, require, enforce)
            await opened.cover(chosen)
            return await opened.start(loop, protocol_factory, chosen, require, deadline)
    _check_addresses(local_addr, remote_addr, family)
    chosen = await resolve_backend(backend)
    candidates = await _candidates(loop, local_addr, remote_addr, family, proto, flags)
    failures: list[OSError] = []
    for candidate_family, candidate_proto, local, remote in candidates:
        try:
            own = socket.socket(
                family=candidate_family, type=socket.SOCK_DGRAM, proto=candidate_proto
            )
        except OSError as error:
            failures.append(error)
            continue
        opened = _Opened(own, owned=True)
        with opened:
            opened.enforce(loop, chosen, require, enforce)
            try:
                opened.configure(reuse_port=reuse_port, allow_broadcast=allow_broadcast)
                await opened.bind(chosen, local, None if allow_broadcast else remote)
                await opened.connect(loop, remote, allow_broadcast=allow_broadcast)
                await opened.cover(chosen)
            except BackendError:
                raise
            except OSError as error:
                failures.append(error)
                continue
            return await opened.start(loop, protocol_factory, chosen, require, deadline)
    raise failures[0]


class _Opened:
    """A socket on its way to a transport. Leaving its ``with`` closes what was not handed over."""

    def __init__(self, sock: socket.socket, *, owned: bool) -> None:
        self._sock = sock
        self._owned = owned
        self._registration: Registration | None = None
        self._covered: int | None = None
        self._after = NEVER
        self._address: Any = None
        self._handed_over = False
        self._enforcement: Enforcement | None = None
        self._wish = ""

    def __enter__(self) -> None:
        pass

    def enforce(
        self,
        loop: asyncio.AbstractEventLoop,
        backend: Backend,
        require: Require | None,
        wish: str,
    ) -> None:
        """Have the kernel enforce the requirement, from :meth:`bind` or :meth:`cover` on."""
        self._wish = wish
        if runs_udp(self._sock):
            self._enforcement = enforcement_for(
                loop, backend, require, wish, stamped=self._is_stamped
            )
        elif wish == KERNEL:
            raise ValueError("the kernel enforces requirements on plain TCP and UDP sockets only")

    def _is_stamped(self) -> bool:
        return self._registration is not None and self._registration.generation > 0

    def _begin(self, name: Any, peer: Any, *, early: bool) -> None:
        if self._enforcement is not None:
            where = Where(pack_address(name[0]), name[1])
            if peer is not None:
                where = where._replace(peer=pack_address(peer[0]), peer_port=peer[1])
            self._enforcement.begin(
                self._sock, where, early=early, inbound_only=early and peer is not None
            )

    def __exit__(self, *_: object) -> None:
        if self._handed_over:
            return
        if self._registration is not None:
            self._registration.close()
        if self._enforcement is not None:
            self._enforcement.undo()
        if self._owned:
            self._sock.close()

    def configure(self, *, reuse_port: bool | None, allow_broadcast: bool | None) -> None:
        self._sock.setblocking(False)
        if reuse_port:
            if not hasattr(socket, "SO_REUSEPORT"):
                raise ValueError("reuse_port not supported by socket module")
            try:
                self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            except OSError as error:
                raise ValueError(
                    "reuse_port not supported by socket module, "
                    "SO_REUSEPORT defined but not implemented."
                ) from error
        if allow_broadcast:
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)

    async def bind(self, backend: Backend, address: Any, peer: Any) -> None:
        """Bind, where there is an address, to be connected to ``peer``."""
        self._after = backend.policies
        if address is not None and runs_udp(self._sock) and 0 < address[1] < 65536:
            self._registration = await backend.register(IPPROTO_UDP, address[1])
            self._covered = self._registration.generation
            self._begin(address, peer, early=True)
        elif self._enforcement is not None:
            self._enforcement.shut(self._sock)
        if address is not None:
            self._sock.bind(address)

    async def connect(
        self, loop: asyncio.AbstractEventLoop, address: Any, *, allow_broadcast: bool | None
    ) -> None:
        self._address = address
        if address is not None and not allow_broadcast:
            await loop.sock_connect(self._sock, address)
        if self._enforcement is not None:
            self._enforcement.connected()

    async def cover(self, backend: Backend) -> None:
        """Have the backend cover the local port, where that was not known before."""
        if self._registration is not None or not runs_udp(self._sock):
            return
        port = self._sock.getsockname()[1]
        if not port and self._owned:
            # The kernel would choose a port at the first send, too late to be covered.
            self._sock.bind(("", 0))
            port = self._sock.getsockname()[1]
        if port:
            self._registration = await backend.register(IPPROTO_UDP, port)
            self._begin(self._sock.getsockname(), _peer_of(self._sock), early=False)
        elif self._wish == KERNEL:
            raise ValueError("enforce='kernel' needs a socket that is bound")

    async def start(
        self,
        loop: asyncio.AbstractEventLoop,
        protocol_factory: Callable[[], _P],
        backend: Backend,
        require: Require | None,
        deadline: float,
    ) -> tuple[DatagramTransport, _P]:
        protocol = protocol_factory()
        check_protocol(protocol)
        if isinstance(protocol, TokenProtocol) and not hasattr(protocol, "datagram_received"):
            raise TypeError(f"{protocol!r} is a stream protocol: it has no datagram_received()")
        witness = Witness(
            self._sock,
            backend,
            self._registration,
            require,
            covered=self._covered,
            after=self._after,
            enforcement=self._enforcement,
        )
        waiter: asyncio.Future[None] = loop.create_future()
        transport = DatagramTransport(
            loop,
            self._sock,
            protocol,
            witness,
            address=self._address,
            deadline=deadline,
            waiter=waiter,
        )
        self._handed_over = True
        if loop.get_debug():
            net_logger.debug("created %r for %r", transport, protocol)
        try:
            await waiter
        except BaseException:
            transport.close()
            raise
        return transport, protocol


def _peer_of(sock: socket.socket) -> Any:
    try:
        return sock.getpeername()
    except OSError:
        return None


# asyncio's own words.
_EXPECTED = "A datagram socket" if sys.version_info >= (3, 11, 8) else "A UDP Socket"


def _check_given(sock: socket.socket, **options: Any) -> None:
    if sock.type == socket.SOCK_STREAM:
        raise ValueError(f"{_EXPECTED} was expected, got {sock!r}")
    problems = ", ".join(f"{name}={value}" for name, value in options.items() if value)
    if problems:
        raise ValueError(
            "socket modifier keyword arguments can not be used when sock is specified. "
            f"({problems})"
        )


def _check_addresses(local: Any, remote: Any, family: int) -> None:
    if not (local or remote):
        if not family:
            raise ValueError("unexpected address family")
        return
    for address in (local, remote):
        if address is None:
            continue
        if family == socket.AF_UNIX:
            if not isinstance(address, str):
                raise TypeError("string is expected")
        elif not isinstance(address, tuple) or len(address) != 2:  # pyright: ignore[reportUnknownArgumentType]
            raise TypeError("2-tuple is expected")


async def _candidates(
    loop: asyncio.AbstractEventLoop, local: Any, remote: Any, family: int, proto: int, flags: int
) -> list[tuple[int, int, Any, Any]]:
    """Family, protocol, local and remote address of each attempt, in the resolver's order."""
    if not (local or remote):
        return [(family, proto, None, None)]
    if family == socket.AF_UNIX:
        if local and not local.startswith("\0"):
            _remove_stale(local)
        return [(family, proto, local or None, remote or None)]
    found: dict[tuple[int, int], list[Any]] = {}
    for side, address in enumerate((local, remote)):
        if address is None:
            continue
        infos = await _resolve(loop, address, family, proto, flags)
        if not infos:
            raise OSError("getaddrinfo() returned empty list")
        for info_family, _, info_proto, _, resolved in infos:
            # Later addresses of a family replace earlier ones, as in asyncio.
            found.setdefault((info_family, info_proto), [None, None])[side] = resolved
    pairs = [
        (*key, *pair)
        for key, pair in found.items()
        if (not local or pair[0] is not None) and (not remote or pair[1] is not None)
    ]
    if not pairs:
        raise ValueError("can not get address information")
    return pairs


async def _resolve(
    loop: asyncio.AbstractEventLoop, address: tuple[Any, Any], family: int, proto: int, flags: int
) -> Sequence[_Info]:
    host, port = address
    if isinstance(host, str) and proto in (0, IPPROTO_TCP, IPPROTO_UDP):
        number = _port_number(port)
        for kind, rest in ((socket.AF_INET, ()), (socket.AF_INET6, (0, 0))):
            if number is not None and family in (0, kind) and _is_numeric(kind, host):
                return [(kind, socket.SOCK_DGRAM, IPPROTO_UDP, "", (host, number, *rest))]
    return await loop.getaddrinfo(
        host, port, family=family, type=socket.SOCK_DGRAM, proto=proto, flags=flags
    )


def _port_number(port: Any) -> int | None:
    """The port as a number; None for the name of a service."""
    if port in (None, "", b""):
        return 0
    try:
        return int(port)
    except (TypeError, ValueError):
        return None


def _is_numeric(family: int, host: str) -> bool:
    try:
        socket.inet_pton(family, host)
    except OSError:
        return False
    return True


def _remove_stale(path: str) -> None:
    """Remove the socket file that an earlier process left at a path."""
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode):
            os.remove(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        net_logger.error("Unable to check or remove stale UNIX socket %r: %r", path, error)
