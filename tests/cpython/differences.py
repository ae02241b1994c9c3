"""Which of CPython's tests are run, and which of them come out differently, by name and why.

Chosen are the test cases that go through ``create_datagram_endpoint``, ``create_server``,
``create_connection``, ``start_tls``, ``asyncio.start_server`` or ``asyncio.open_connection``. The
others test the inside of asyncio's own transports. Of the cases that exist once per selector,
epoll's is run.
"""

from __future__ import annotations

ASYNCIO = (
    "test_base_events:BaseEventLoopWithSelectorTests",
    "test_base_events:BaseLoopSockSendfileTests",
    "test_buffered_proto:BufferedProtocolSelectorTests",
    "test_events:EPollEventLoopTests",
    "test_events:TestServer",
    "test_sendfile:EPollEventLoopTests",
    "test_server:SelectorStartServerTests",
    "test_sock_lowlevel:EPollEventLoopTests",
    "test_ssl:TestSSL",
    "test_sslproto:SelectorStartTLSTests",
    "test_streams:StreamTests",
    "test_unix_events:SelectorEventLoopUnixSockSendfileTests",
    "test_unix_events:TestFunctional",
)

UVLOOP = (
    "test_base_events:BaseEventLoopWithSelectorTests",
    "test_buffered_proto:BufferedProtocolSelectorTests",
    "test_events:EPollEventLoopTests",
    "test_events:TestServer",
    "test_ssl:TestSSL",
    "test_streams:StreamTests",
    "test_unix_events:TestFunctional",
)
"""Those of which tests pass on uvloop by itself, and which end there. Many of the others' tests
reach into asyncio's own loop, or wait for what uvloop never does.
"""

WITHOUT = {
    "test_base_events:BaseEventLoopWithSelectorTests": ("test_create_connection_ipv6_scope",),
    "test_events:EPollEventLoopTests": (
        "test_add_signal_handler",
        "test_bidirectional_pty",
        "test_subprocess_*",
    ),
    "test_ssl:TestSSL": ("test_flush_before_shutdown",),
}
"""Tests that are not run on uvloop: by itself they fail there after half a minute or more, or now
and then (those of subprocesses).
"""

DIFFERENCES: dict[str, dict[str, str]] = {"asyncio": {}, "uvloop": {}}
"""Tests that come out differently on our functions, with why. Strict: each has to. On uvloop only
those count that pass by themselves: others fail for what its loop does not have.
"""
