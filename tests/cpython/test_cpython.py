"""CPython's own tests of asyncio, with our functions in the place of the loop's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from differences import ASYNCIO, DIFFERENCES, UVLOOP, WITHOUT

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
UNPACKED = ROOT / ".lab/root/usr/lib/python{}.{}".format(*sys.version_info)
TIMEOUT = 240

CASES = [("asyncio", case) for case in ASYNCIO] + [("uvloop", case) for case in UVLOOP]


def start(loop: str, case: str, *options: str) -> subprocess.Popen[str]:
    """Start a run of one test case in a process of its own."""
    if loop == "uvloop":
        without = (f"--without={pattern}" for pattern in WITHOUT.get(case, ()))
        options += ("--uvloop", *without)
    return subprocess.Popen(
        [sys.executable, str(HERE / "run.py"), *options, case],
        env={"CPYTHON_TESTS": str(UNPACKED), **os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[dict[str, str], int]:
    """Return what became of each test, and how many calls went to our functions."""
    try:
        output, errors = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
    if "No module named 'test" in errors:
        pytest.fail(
            "CPython's tests are not here: put Debian's libpython3.11-testsuite under "
            f"{UNPACKED}, or name its directory in CPYTHON_TESTS"
        )
    assert output, errors[-4000:]
    told = json.loads(output)
    return told["outcomes"], told["delegated"]


@pytest.mark.parametrize(("loop", "case"), CASES, ids=["-".join(case) for case in CASES])
def test_cpythons_own_tests_pass_with_our_functions(loop: str, case: str) -> None:
    runs = start(loop, case), start(loop, case, "--patched")
    stock, none = finish(runs[0])
    ours, delegated = finish(runs[1])
    assert "ok" in stock.values()
    assert (none, delegated > 0) == (0, True), "our functions were not what was tested"
    assert ours.keys() == stock.keys()
    differs = {
        name
        for name, outcome in stock.items()
        if outcome != ours[name] and (loop == "asyncio" or outcome == "ok")
    }
    prefix = case.replace(":", ".") + "."
    expected = {name for name in DIFFERENCES[loop] if name.startswith(prefix)}
    assert differs == expected


def test_only_tests_that_are_run_are_listed_as_different() -> None:
    for loop, cases in (("asyncio", ASYNCIO), ("uvloop", UVLOOP)):
        prefixes = tuple(case.replace(":", ".") + "." for case in cases)
        assert all(name.startswith(prefixes) for name in DIFFERENCES[loop])
