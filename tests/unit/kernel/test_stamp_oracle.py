"""pyroute2 by itself: its socket and decoder read the stamp; why they do not carry it."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pyroute2.nftables.main import NFTables

from ipsec_aio.kernel import stamp_table
from ipsec_aio.kernel.nfnetlink import NftSocket

INET = 1


def test_another_reader_finds_the_table_that_was_meant(netns):
    ours = NftSocket()
    stamp_table.install(ours, [stamp_table.Port.parse("udp/5000")], owned=False)
    with NFTables(nfgen_family=INET) as theirs:
        tables = [table.get_attr("NFTA_TABLE_NAME") for table in theirs.get_tables()]
        hooks = {
            chain.get_attr("NFTA_CHAIN_NAME"): (
                chain.get_attr("NFTA_CHAIN_HOOK").get_attr("NFTA_HOOK_HOOKNUM"),
                chain.get_attr("NFTA_CHAIN_HOOK").get_attr("NFTA_HOOK_PRIORITY"),
            )
            for chain in theirs.get_chains()
        }
        rules = [
            [part.get_attr("NFTA_EXPR_NAME") for part in rule.get_attr("NFTA_RULE_EXPRESSIONS")]
            for rule in theirs.get_rules()
            if rule.get_attr("NFTA_RULE_CHAIN") == "input"
        ]
        sets = [found.get_attr("NFTA_SET_NAME") for found in theirs.get_sets()]
    ours.close()
    assert tables == ["ipsec_aio"]
    assert hooks["fragments"] == (0, -450)
    hook, priority = hooks["input"]
    assert hook == 1
    assert priority > 300
    assert rules[-2:] == [["immediate", "meta"], ["meta", "cmp", "xfrm", "meta"]]
    assert sets == ["ports"]


PROGRAM = """
import asyncio, uvloop
from pyroute2.netlink.nfnetlink.nftsocket import AsyncNFTSocket, NFTSocket
async def main(): {use}
with asyncio.Runner(loop_factory={loop}.new_event_loop) as runner: runner.run(main())
"""


@pytest.mark.parametrize(
    ("use", "loop", "error"),
    [
        ("NFTSocket()", "asyncio", "event loop is already running"),
        ("NFTSocket()", "uvloop", "event loop is already running"),
        ("await AsyncNFTSocket().setup_endpoint()", "uvloop", "invalid family 16"),
    ],
)
def test_its_sockets_still_do_not_run_in_every_loop(use: str, loop: str, error: str):
    """Where this fails, docs/architecture.md is out of date."""
    program = PROGRAM.format(use=use, loop=loop)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert error in done.stderr
