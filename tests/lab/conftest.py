"""Fixtures of the lab. These tests need a kernel with ESP and root: ``make lab`` provides both."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hosts import Host, Network


def pytest_collection_modifyitems(config, items):
    """Leave to the other machines what is theirs: one test in turn for each."""
    part, machines = map(int, os.environ.get("LAB_PART", "1/1").split("/"))
    ours = items[part - 1 :: machines]
    if len(ours) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in ours])
        items[:] = ours


@pytest.fixture(scope="session")
def network() -> Iterator[Network]:
    """All hosts."""
    network = Network()
    yield network
    network.close()


@pytest.fixture(autouse=True)
def bob(network: Network) -> Iterator[Host]:
    """The server. Every test runs inside."""
    with network.hosts["bob"] as host:
        yield host
        network.reset()


@pytest.fixture
def alice(network: Network) -> Host:
    """A protected peer."""
    return network.hosts["alice"]


@pytest.fixture
def carol(network: Network) -> Host:
    """A protected peer with SAs of her own."""
    return network.hosts["carol"]


@pytest.fixture
def mallory(network: Network) -> Host:
    """A peer in clear."""
    return network.hosts["mallory"]
