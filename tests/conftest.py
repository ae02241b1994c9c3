"""Every async test runs on asyncio's loop and on uvloop; examples take what time they take."""

from __future__ import annotations

import asyncio

import uvloop
from hypothesis import settings

# A busy machine is no finding.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def pytest_asyncio_loop_factories(config, item):
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
