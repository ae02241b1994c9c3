"""Which of CPython's tests are run, and which of them come out differently, by name and why.

Chosen are the test cases that go through ``create_datagram_endpoint``, ``create_server``,
``create_connection``, ``start_tls``, ``asyncio.start_server`` or ``asyncio.open_connection``. The
others test the inside of asyncio's own transports. Of the cases that exist once per selector,
epoll's is run.
"""

from __future__ import annotations

ASYNCIO = (
    "test_base_events:BaseEventLoopWithSelectorTests",
    "test_buffered_proto:BufferedProtocolSelectorTests",
    "test_events:EPollEventLoopTests",
    "test_sendfile:EPollEventLoopTests",
    "test_server:SelectorStartServerTests",
    "test_ssl:TestSSL",
    "test_sslproto:SelectorStartTLSTests",
    "test_streams:StreamTests",
)

UVLOOP = (
    "test_buffered_proto:BufferedProtocolSelectorTests",
    "test_streams:StreamTests",
)
"""The others ask for asyncio's private attributes, which uvloop's loop and servers do not have."""

_PATCHED_MODULE = (
    "the test replaces the socket module inside asyncio.base_events; our datagram sockets are made "
    "in our own module, so the error that the test plants there is never met"
)

_DATAGRAM = "test_base_events.BaseEventLoopWithSelectorTests.test_create_datagram_endpoint_"

DIFFERENCES: dict[str, dict[str, str]] = {
    "asyncio": {
        _DATAGRAM + "cant_bind": _PATCHED_MODULE,
        _DATAGRAM + "ip_addr": _PATCHED_MODULE + " (here: a bind that succeeds on any address)",
        _DATAGRAM + "nosoreuseport": _PATCHED_MODULE + " (here: a socket without SO_REUSEPORT)",
        _DATAGRAM + "setblk_err": _PATCHED_MODULE,
        _DATAGRAM + "socket_err": _PATCHED_MODULE,
    },
    "uvloop": {},
}
"""Tests that pass on the loop's own methods and fail on ours. Strict: each has to fail."""
