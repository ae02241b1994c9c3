"""The public names are exactly the declared ones, and each is documented."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types

import pytest

import ipsec_aio

NAMES = {
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
}


def test_the_names_are_the_declared_ones() -> None:
    assert set(ipsec_aio.__all__) == NAMES
    found = {
        name
        for name, value in vars(ipsec_aio).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType)
    }
    assert found - {"annotations"} == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_is_documented(name: str) -> None:
    assert inspect.getdoc(getattr(ipsec_aio, name))


def test_the_names_for_tests_are_the_declared_ones() -> None:
    from ipsec_aio import testing

    names = {"Arrivals", "BackendConformance", "Bench", "IdentityBench", "IdentityConformance"}
    assert set(testing.__all__) == names
    for name in names:
        assert inspect.getdoc(getattr(testing, name))


def test_importing_it_starts_nothing_heavy() -> None:
    code = (
        "import sys, ipsec_aio; heavy = {'cryptography', 'pytest', 'uvloop'}; "
        "print([m for m in sys.modules if m.partition('.')[0] in heavy])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
