"""Every async test runs on asyncio's loop and on uvloop; examples take what time they take."""

from __future__ import annotations

import asyncio
import signal

import uvloop
from hypothesis import settings

# A busy machine is no finding.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
# A shell's background jobs ignore it, and so would the programs that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_asyncio_loop_factories(config, item):
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
