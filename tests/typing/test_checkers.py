"""mypy and pyright, both strict, over users' code: what is right passes, what is wrong does not."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SAMPLES = sorted(HERE.glob("sample_*.py"))

# Programs that must be told off.
WRONG = {
    "token_left_out": (
        "class P(ipsec_aio.DatagramProtocol):\n"
        "    def datagram_received(self, data: bytes, addr: object) -> None: ...\n"
    ),
    "none_not_expected": (
        "class P(ipsec_aio.DatagramProtocol):\n"
        "    def connection_made(\n"
        "        self, transport: asyncio.DatagramTransport, ptoken: ipsec_aio.PToken\n"
        "    ) -> None: ...\n"
    ),
    "no_protocol": (
        "async def f() -> None:\n"
        "    await ipsec_aio.create_datagram_endpoint(lambda: 3, ('127.0.0.1', 0))\n"
    ),
    "wrong_requirement": (
        "async def f() -> None:\n"
        "    await ipsec_aio.create_datagram_endpoint(\n"
        "        asyncio.DatagramProtocol, ('127.0.0.1', 0), require=True\n"
        "    )\n"
    ),
    "a_property_that_does_not_exist": (
        "def f(ptoken: ipsec_aio.PToken) -> None:\n    print(ptoken.encrypted)\n"
    ),
}


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wrong")
    for name, text in WRONG.items():
        (folder / f"{name}.py").write_text(f"import asyncio\n\nimport ipsec_aio\n\n\n{text}")
    return folder


def test_mypy(wrong: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    config = tmp_path_factory.mktemp("mypy") / "mypy.ini"
    config.write_text("[mypy]\nstrict = True\n")
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file", str(config), "--no-error-summary"]
        + ["--cache-dir", str(config.parent / "cache")]
        + [str(path) for path in (*SAMPLES, *wrong.iterdir())],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "MYPYPATH": str(HERE)},
    )
    assert not done.stderr
    told = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert {Path(line.partition(":")[0]).stem for line in told} == set(WRONG), done.stdout


def test_pyright(wrong: Path, tmp_path: Path) -> None:
    for path in (*SAMPLES, *wrong.iterdir()):
        shutil.copy(path, tmp_path)
    settings = {"typeCheckingMode": "strict", "pythonVersion": "3.11", "extraPaths": [str(ROOT)]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    done = subprocess.run(
        [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    told = json.loads(done.stdout)["generalDiagnostics"]
    files = {Path(item["file"]).stem for item in told if item["severity"] == "error"}
    assert files == set(WRONG), told
