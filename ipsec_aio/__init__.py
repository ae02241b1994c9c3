"""asyncio that knows what IPsec did for each connection and each datagram.

A server that sees how each datagram was protected::

    class Echo(ipsec_aio.DatagramProtocol):
        def connection_made(self, transport, ptoken):
            self.transport = transport

        def datagram_received(self, data, addr, ptoken):
            if ptoken.protected:
                self.transport.sendto(data, addr)

    async with ipsec_aio.open_backend("xfrm", stamp="install") as backend:
        transport, protocol = await ipsec_aio.create_datagram_endpoint(
            Echo, local_addr=("0.0.0.0", 5000), backend=backend
        )

* :func:`open_backend` says where facts come from: the kernel's tables (``"xfrm"``), or tables
  declared by the program (``"memory"``, :class:`MemoryBackend`) for development and tests.
* :func:`create_datagram_endpoint`, :func:`create_server`, :func:`create_connection`,
  :func:`start_server`, :func:`open_connection` and :func:`start_tls` are asyncio's, with
  ``backend=`` and ``require=``.
* A :class:`PToken` says what was proved, and :class:`Assurance` how well; :class:`Require` refuses
  what is not protected enough.
* :func:`current_ptoken` and :func:`get_ptoken` find the token from anywhere.
"""

from __future__ import annotations

from .backends import open_backend, set_default_backend
from .backends.memory import MemoryBackend
from .enums import Assurance
from .errors import (
    BackendDenied,
    BackendError,
    BackendOverrun,
    BackendUnavailable,
    CodecError,
    IPsecError,
    ProtectionError,
    StaleTokenError,
    TokenError,
)
from .identity import AuthenticationMethod, IdentityKind, IToken
from .latch import Latch, LatchParameters, LatchReason, LatchState, LatchStatus
from .net.context import current_ptoken
from .net.datagram import DatagramTransport
from .net.endpoints import create_datagram_endpoint
from .net.protocols import BufferedProtocol, DatagramProtocol, Protocol
from .net.readers import open_connection, start_server
from .net.streams import create_connection, create_server, start_tls
from .net.tokens_of import get_ptoken
from .require import Require
from .tokens import PToken

__all__ = [
    "Assurance",
    "AuthenticationMethod",
    "BackendDenied",
    "BackendError",
    "BackendOverrun",
    "BackendUnavailable",
    "BufferedProtocol",
    "CodecError",
    "DatagramProtocol",
    "DatagramTransport",
    "IPsecError",
    "IToken",
    "IdentityKind",
    "Latch",
    "LatchParameters",
    "LatchReason",
    "LatchState",
    "LatchStatus",
    "MemoryBackend",
    "PToken",
    "ProtectionError",
    "Protocol",
    "Require",
    "StaleTokenError",
    "TokenError",
    "create_connection",
    "create_datagram_endpoint",
    "create_server",
    "current_ptoken",
    "get_ptoken",
    "open_backend",
    "open_connection",
    "set_default_backend",
    "start_server",
    "start_tls",
]
