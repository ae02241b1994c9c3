"""Who may import whom: the layers of the package, checked on its source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import ipsec_aio

ROOT = Path(ipsec_aio.__file__).parent
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
ENTRIES = {"__init__.py", "__main__.py"}
IO = {"asyncio", "socket", "pyroute2", "selectors", "ssl", "select", "uvloop"}
OURS = {"net", "backends", "kernel", "cli", "contrib", "testing"}


def imported(path: Path) -> Iterator[str]:
    """Absolute names of all that a module imports, wherever in it."""
    package = ("ipsec_aio", *path.parts[:-1])
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def part(name: str) -> str:
    """``"net"`` of ``"ipsec_aio.net.context"``; ``""`` of what is not ours."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "ipsec_aio" else ""


def inner(names: set[str], package: str) -> set[str]:
    """What is imported from a package of ours."""
    split = (name.split(".") for name in names if part(name) == package)
    return {parts[2] for parts in split if len(parts) > 2}


def pure(path: Path) -> bool:
    return path.parts[0] == "wire" or (len(path.parts) == 1 and path.name not in ENTRIES)


@pytest.mark.parametrize("path", [p for p in MODULES if pure(p)], ids=str)
def test_facts_engine_and_wire_do_no_io(path: Path) -> None:
    names = set(imported(path))
    assert not {name.partition(".")[0] for name in names} & IO
    assert not {part(name) for name in names} & OURS


@pytest.mark.parametrize("path", [p for p in MODULES if p.parts[0] != "kernel"], ids=str)
def test_only_kernel_imports_pyroute2(path: Path) -> None:
    assert not {name for name in imported(path) if name.partition(".")[0] == "pyroute2"}


@pytest.mark.parametrize(
    ("modules", "loaded"),
    [
        ("ipsec_aio, ipsec_aio.__main__, ipsec_aio.cli.demo, ipsec_aio.testing.conformance", False),
        ("ipsec_aio.backends.xfrm", True),
    ],
)
def test_pyroute2_is_loaded_with_the_kernels_backend_only(modules: str, loaded: bool) -> None:
    program = f"import sys, {modules}; print('pyroute2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.split() == [str(loaded).encode()]


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.parts[0] in ("backends", "kernel")], ids=str
)
def test_what_is_below_does_not_know_the_surface(path: Path) -> None:
    assert not {part(name) for name in imported(path)} & {"net", "cli", "contrib", "testing"}


@pytest.mark.parametrize("path", [p for p in MODULES if p.parts[0] == "net"], ids=str)
def test_net_knows_only_the_contract(path: Path) -> None:
    ours = {name for name in imported(path) if part(name)}
    assert not {part(name) for name in ours} & {"mirror", "cli", "contrib", "testing"}
    assert inner(ours, "backends") <= {"contract", "current_backend", "resolve_backend", "Backend"}
    assert inner(ours, "kernel") <= {"sockopts"}


def test_nothing_imports_contrib() -> None:
    for path in MODULES:
        if path.parts[0] != "contrib":
            assert "contrib" not in {part(name) for name in imported(path)}


def test_the_check_sees_what_it_looks_for() -> None:
    assert "asyncio" in set(imported(Path("net/datagram.py")))
    assert "ipsec_aio.net.context" in set(imported(Path("net/datagram.py")))
    assert part("ipsec_aio.net.context") == "net"
