"""pyroute2, which shares no code with us, reads the stamp from the same kernel."""

from __future__ import annotations

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
