"""``make demo``, beside the tests' own hosts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

DEMO = Path(__file__).with_name("demo.py")
PATIENCE = 300.0
ALONE = (
    *("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
    *("--propagation", "private", "sh", "-c"),
    # The names of network namespaces are files there.
    'mount -t tmpfs tmpfs /run && ip link set lo up && exec "$@"',
    "sh",
)


def test_it_shows_protected_and_clear_and_says_that_all_is_well() -> None:
    # The tests around it began long ago.
    environment = {name: value for name, value in os.environ.items() if name != "LAB_BEGAN"}
    environment["NO_COLOR"] = "1"
    done = subprocess.run(
        [*ALONE, sys.executable, str(DEMO)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    shown = done.stdout
    assert done.returncode == 0, shown
    assert "NOT SO" not in shown
    assert shown.endswith("All of this is as it should be.\n")
    assert re.search(r"under two minutes: \d+ s", shown)
    said = [line.partition("|")[2].strip() for line in shown.splitlines() if "server |" in line]
    judged = [line for line in said if line.startswith(("udp", "tcp"))]
    # Alice's datagram and connection; mallory's; alice's datagram by another SA.
    kinds = [re.sub(r"from (\S+) port \d+: (\w+).*", r"\1 \2", line) for line in judged]
    assert kinds == [
        "udp 10.9.0.2 PROTECTED",
        "tcp 10.9.0.2 PROTECTED",
        "udp 10.9.0.4 CLEAR",
        "tcp 10.9.0.4 CLEAR",
        "udp 10.9.0.2 PROTECTED",
    ]
    spis = [re.findall(r"EXACT, by esp/transport spi (0x[0-9a-f]{8})", line) for line in judged]
    assert all(spis[n] for n in (0, 1, 4))
    assert spis[0] != spis[4]
