"""Fixtures of the lab. These tests need a kernel with ESP and root: ``make lab`` provides both."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hosts import Host, Network


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
