"""IKE SAs and their children: decoded from what real charons said, and kept true by events."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ipsec_aio.enums import Mode
from ipsec_aio.errors import BackendOverrun, CodecError
from ipsec_aio.flow import Mark, pack_address
from ipsec_aio.identity import AuthenticationMethod
from ipsec_aio.ike import (
    EVENTS,
    AuthenticationRound,
    ChildSA,
    Connection,
    IKEKey,
    IKETable,
    decode_connection,
    decode_ike_sa,
)
from ipsec_aio.sa import IPPROTO_AH, IPPROTO_ESP
from ipsec_aio.wire.vici import PacketType, decode_packet

RECORDED = Path(__file__).parent / "wire" / "recorded"
LOCAL, PEER, MOVED = (pack_address(f"192.0.2.{n}") for n in (2, 1, 3))


def exchanges(host):
    """Yield the step, ``events`` or the command that was run, and the events received."""
    for exchange in json.loads((RECORDED / f"{host}.json").read_text()):
        packets = [decode_packet(bytes.fromhex(data)[4:]) for data in exchange["received"]]
        events = [packet for packet in packets if packet.type is PacketType.EVENT]
        sent = [decode_packet(bytes.fromhex(data)[4:]) for data in exchange["sent"]]
        commands = [packet.name for packet in sent if packet.type is PacketType.CMD_REQUEST]
        yield exchange["step"], commands[0] if commands else "events", events


def listing(host, step):
    for step_, command, events in exchanges(host):
        if step_ == step and command.startswith("list-"):
            return [event.message for event in events]
    raise LookupError(step)


def events(host, step):
    for step_, command, packets in exchanges(host):
        if step_ == step and command == "events":
            return packets
    raise LookupError(step)


# -- messages made by hand, as short as charon's may be


def ike(unique_id=1, state="ESTABLISHED", *, spi=None, **more):
    section = {
        "uniqueid": b"%d" % unique_id,
        "version": b"2",
        "state": state.encode(),
        "local-host": b"192.0.2.2",
        "remote-host": b"192.0.2.1",
        "remote-id": b"peer%d" % unique_id,
        "initiator-spi": b"%016x" % (spi or unique_id),
        "responder-spi": b"%016x" % 0xFF,
    }
    return section | {key.replace("_", "-"): value for key, value in more.items()}


def child(unique_id=1, state="INSTALLED", *, reqid=1, spi=None):
    return {
        "name": b"net",
        "uniqueid": b"%d" % unique_id,
        "reqid": b"%d" % reqid,
        "state": state.encode(),
        "mode": b"TRANSPORT",
        "protocol": b"ESP",
        "spi-in": b"%08x" % (spi or 0x1000 + unique_id),
        "spi-out": b"%08x" % (0x2000 + (spi or unique_id)),
    }


def sa(section, *children):
    """A list-sa event; with ``up`` beside it, an updown."""
    return {"conn": section | {"child-sas": {f"net-{int(c['uniqueid'])}": c for c in children}}}


def up(section, *children):
    return {"up": b"yes", **sa(section, *children)}


def synced(*listed, **more):
    table = IKETable(**more)
    table.begin_resync()
    for message in listed:
        table.load(message)
    assert table.finish_resync(0.0) == frozenset()
    return table


def who(table, spi, **more):
    return [
        (found.ike.remote_id, found.alive) for found in table.find(LOCAL, IPPROTO_ESP, spi, **more)
    ]


class TestDecoding:
    def test_an_ike_sa(self):
        sa_, children = decode_ike_sa(listing("responder", "psk up")[0])
        assert sa_.name == "psk"
        assert sa_.unique_id == 1
        assert sa_.version == 2
        assert sa_.state == "ESTABLISHED"
        assert (sa_.local_host, sa_.local_port) == (LOCAL, 4500)
        assert (sa_.remote_host, sa_.remote_port) == (PEER, 4500)
        assert sa_.local_id == "b.psk.example.org"
        assert sa_.remote_id == sa_.peer_id == "a@example.org"
        assert not sa_.initiator
        assert sa_.initiator_spi.bit_length() > 32
        assert not sa_.nat_local
        assert sa_.key == IKEKey(1, sa_.initiator_spi, sa_.responder_spi)
        assert [c.unique_id for c in children] == [1]

    def test_a_child(self):
        _, (child_,) = decode_ike_sa(listing("responder", "psk up")[0])
        (other,) = decode_ike_sa(listing("initiator", "psk up")[0])[1]
        assert child_.name == "net"
        assert child_.state == "INSTALLED"
        assert child_.mode is Mode.TRANSPORT
        assert child_.proto == IPPROTO_ESP
        assert (child_.spi_in, child_.spi_out) == (other.spi_out, other.spi_in)
        assert child_.local_ts == ("192.0.2.2/32",)
        assert child_.remote_ts == ("192.0.2.1/32",)
        assert child_.mark_in == child_.mark_out == Mark()

    def test_marks_and_interfaces(self):
        _, (child_,) = decode_ike_sa(listing("responder", "x509 up")[0])
        assert child_.mark_in == Mark(5, 0xFF)
        assert child_.mark_out == Mark()
        assert (child_.if_id_in, child_.if_id_out) == (7, 8)

    def test_a_mark_without_a_mask_is_of_all_bits(self):
        one = child() | {"mark-in": b"0000002a", "mark-out": b"5", "mark-mask-out": b"00000000"}
        _, (child_,) = decode_ike_sa(sa(ike(), one))
        assert child_.mark_in == Mark(0x2A, 0xFFFFFFFF)
        assert child_.mark_out == Mark(5, 0)

    def test_eap_and_virtual_addresses(self):
        sa_, (child_,) = decode_ike_sa(listing("responder", "eap up")[0])
        assert sa_.remote_id == "road@example.org"
        assert sa_.peer_id == sa_.remote_eap_id == "carol@example.org"
        assert sa_.remote_vips == (pack_address("10.9.0.1"),)
        assert child_.mode is Mode.TUNNEL

    def test_xauth_and_nat(self):
        sa_, _ = decode_ike_sa(sa(ike(remote_xauth_id=b"carol", nat_remote=b"yes", nat_any=b"yes")))
        assert sa_.peer_id == "carol"
        assert sa_.nat_remote
        assert not sa_.nat_local

    def test_other_protocols_and_compression(self):
        one = child() | {"protocol": b"AH", "cpi-in": b"1a2b", "mode": b"BEET", "encap": b"yes"}
        _, (child_,) = decode_ike_sa(sa(ike(), one))
        assert (child_.proto, child_.cpi_in, child_.mode) == (IPPROTO_AH, 0x1A2B, Mode.BEET)
        assert child_.encapsulated

    def test_little_is_said_of_a_child_that_is_not_installed(self):
        one = {"uniqueid": b"1", "state": b"CREATED", "mode": b"PASS"}
        _, (child_,) = decode_ike_sa({"conn": ike() | {"child-sas": {"net-1": one}}})
        assert child_ == ChildSA(unique_id=1, name="net-1", state="CREATED")

    def test_no_address_yet(self):
        sa_, _ = decode_ike_sa(
            {"conn": ike(local_host=b"%any", remote_host=b"%any6", local_vips=[b"%any", b"::1"])}
        )
        assert sa_.local_host == sa_.remote_host == b""
        assert sa_.local_vips == (pack_address("::1"),)

    @pytest.mark.parametrize("host", ["initiator", "responder"])
    def test_everything_recorded(self, host):
        names = set()
        for _, _, packets in exchanges(host):
            for packet in packets:
                names.add(packet.name)
                if packet.name == "list-sa":
                    decode_ike_sa(packet.message)
                elif packet.name == "list-conn":
                    decode_connection(packet.message)
        assert names >= {"list-sa", "list-conn", *EVENTS}

    @pytest.mark.parametrize(
        "message",
        [
            {},
            {"conn": b"x"},
            {"a": ike(), "b": ike()},
            {"conn": {}},
            {"conn": ike(uniqueid=b"")},
            {"conn": ike(uniqueid=b"-1")},
            {"conn": ike(uniqueid=b" 1")},
            {"conn": ike(uniqueid=b"1x")},
            {"conn": ike(uniqueid=b"\xd9\xa1")},
            {"conn": ike(uniqueid=b"4294967296")},
            {"conn": ike(uniqueid=b"9" * 5000)},
            {"conn": ike(uniqueid=[b"1"])},
            {"conn": ike(uniqueid={})},
            {"conn": ike(version=b"")},
            {"conn": ike(state="")},
            {"conn": ike(local_host=b"moon")},
            {"conn": ike(remote_host=b"192.0.2")},
            {"conn": ike(remote_vips=b"10.9.0.1")},
            {"conn": ike(remote_vips=[b"moon"])},
            {"conn": ike(initiator_spi=b"0x10")},
            {"conn": ike(initiator_spi=b"1" * 17)},
            {"conn": ike(child_sas=b"")},
            {"conn": ike(child_sas={"net": b""})},
            {"conn": ike(child_sas={"net": {}})},
            sa(ike(), child() | {"spi-in": b"123456789"}),
            sa(ike(), child() | {"spi-in": b"g"}),
            sa(ike(), child() | {"cpi-in": b"12345"}),
            sa(ike(), child() | {"local-ts": b"x"}),
            sa(ike(), child() | {"mark-in": b"x"}),
        ],
    )
    def test_refused(self, message):
        with pytest.raises(CodecError):
            decode_ike_sa(message)


class TestConnections:
    def test_recorded(self):
        conns = {c.name: c for c in map(decode_connection, listing("responder", "conns"))}
        assert conns["psk"].version == "IKEv2"
        assert conns["psk"].local[0].id == "b.psk.example.org"
        assert conns["x509"].remote[0].authorities == ("C=CH, O=Lab, CN=Lab CA",)
        assert conns["x509"].local[0].certificates == ("C=CH, O=Lab, CN=server.example.org",)
        assert {
            name: conn.peer_method("a@example.org", bare_keys=False) for name, conn in conns.items()
        } == {
            "psk": AuthenticationMethod.PRESHAREDKEY,
            "x509": AuthenticationMethod.PKIX_INLINE,
            "eap": AuthenticationMethod.EAP,
        }

    @pytest.mark.parametrize(
        ("rounds", "method"),
        [
            ([], AuthenticationMethod.GROUPKEY),
            ([{"class": b"pre-shared key"}], AuthenticationMethod.GROUPKEY),
            ([{"class": b"pre-shared key", "id": b"%any"}], AuthenticationMethod.GROUPKEY),
            ([{"class": b"pre-shared key", "id": b"a"}], AuthenticationMethod.PRESHAREDKEY),
            ([{"class": b"public key"}], None),
            ([{"class": b"public key", "certs": [b"CN=a"]}], None),
            ([{"class": b"XAuth"}], AuthenticationMethod.XAUTH),
            ([{"class": b"any"}], AuthenticationMethod.GROUPKEY),
            ([{"class": b"any", "id": b"a"}], None),
            ([{}], AuthenticationMethod.GROUPKEY),
            ([{"class": b"public key", "cacerts": [b"CN=a"]}, {"class": b"EAP"}], None),
        ],
    )
    def test_the_method_is_not_guessed(self, rounds, method):
        section = {f"remote-{n}": auth for n, auth in enumerate(rounds, 1)}
        connection = decode_connection({"conn": {"remote_addrs": [], **section}})
        assert connection.peer_method("a", bare_keys=False) is method

    @pytest.mark.parametrize(
        ("admitted", "peer", "alone"),
        [
            ("a.example", "a.example", True),
            ("A.example", "a.Example", True),
            ("192.0.2.1", "192.0.2.1", True),
            ("2001:db8::1", "2001:db8::1", True),
            ("C=CH, CN=a/b-c", "C=CH, CN=a/b-c", True),
            ("a.example", "b.example", False),
            ("", "", False),
            ("", "a.example", False),
            ("%any", "%any", False),
            ("%any6", "a.example", False),
            ("*", "*", False),
            ("*.example", "a.example", False),
            ("*.example", "*.example", False),
            ("*@example", "*@example", False),
            ("C=CH, CN=*", "C=CH, CN=*", False),
            ("^a.*$", "^a.*$", False),
            ("192.0.2.0/24", "192.0.2.0/24", False),
            ("2001:db8::/32", "2001:db8::/32", False),
            ("192.0.2.1-192.0.2.9", "192.0.2.1-192.0.2.9", False),
        ],
    )
    def test_for_whom_a_round_is(self, admitted, peer, alone):
        assert AuthenticationRound("pre-shared key", admitted).is_for(peer) is alone

    @pytest.mark.parametrize(
        ("rounds", "weakness"),
        [
            ([], AuthenticationMethod.GROUPKEY),
            ([("", "")], AuthenticationMethod.GROUPKEY),
            ([("any", "")], AuthenticationMethod.GROUPKEY),
            ([("any", "a")], None),
            ([("pre-shared key", "")], AuthenticationMethod.GROUPKEY),
            ([("pre-shared key", "b")], AuthenticationMethod.GROUPKEY),
            ([("pre-shared key", "a")], None),
            ([("public key", "a")], None),
            ([("public key", "")], AuthenticationMethod.BTNS),
            ([("EAP", "")], None),
            ([("XAuth", "")], None),
            ([("pre-shared key", ""), ("XAuth", "")], AuthenticationMethod.GROUPKEY),
            ([("pre-shared key", "a"), ("XAuth", "")], None),
            ([("pre-shared key", ""), ("EAP", "")], None),
            ([("EAP", ""), ("pre-shared key", "")], AuthenticationMethod.GROUPKEY),
        ],
    )
    def test_how_a_peer_may_have_chosen_its_name(self, rounds, weakness):
        remote = tuple(AuthenticationRound(kind, name) for kind, name in rounds)
        connection = Connection("conn", "IKEv2", (), remote)
        assert connection.weakness("a", bare_keys=True) is weakness
        if weakness is AuthenticationMethod.BTNS:
            assert connection.weakness("a", bare_keys=False) is None

    def test_an_authority_vouches_for_no_bare_key(self):
        remote = (AuthenticationRound("public key", authorities=("CN=a",)),)
        assert Connection("conn", "IKEv2", (), remote).weakness("a", bare_keys=True) is None

    @pytest.mark.parametrize(
        "section", [{"remote-1": b""}, {"remote-1": {"certs": b""}}, {"version": []}]
    )
    def test_refused(self, section):
        with pytest.raises(CodecError):
            decode_connection({"conn": section})


class TestRecordedEvents:
    """A table that only hears events says what charon lists, step by step."""

    @pytest.mark.parametrize("host", ["initiator", "responder"])
    def test_it_follows(self, host):
        table, again, steps = synced(), frozenset(), 0
        for step, command, packets in exchanges(host):
            if command == "events":
                for packet in packets:
                    again |= table.apply(packet.name, packet.message, 0.0)
                continue
            if command != "list-sas":
                continue
            steps += 1
            listed = [decode_ike_sa(packet.message) for packet in packets]
            if again:
                assert step == "psk moved"
                for packet in packets:
                    table.refresh(packet.message, 0.0)
                again = frozenset()
            assert {s.key: s.peer_id for s in table.sas()} == {
                s.key: s.peer_id for s, _ in listed
            }, step
            for sa_, children in listed:
                living = {c.unique_id for c in children if c.state == "INSTALLED"}
                assert {c.unique_id for c in table.children(sa_)} == living, step
                for each in children:
                    # Also what is listed as DELETED is found, though it is not alive.
                    found = table.find(sa_.local_host, each.proto, each.spi_in)
                    assert [f.ike.key for f in found] == [sa_.key], step
                    assert found[0].alive == (each.state == "INSTALLED"), step
                    found = table.find(sa_.remote_host, each.proto, each.spi_out, inbound=False)
                    assert [f.ike.key for f in found] == [sa_.key], step
        assert steps == 12
        assert len(table) == 0

    def test_what_was_taken_down_lingers(self):
        table = synced(*listing("responder", "eap up"), linger=5.0)
        (sa_,) = table.sas()
        (child_,) = table.children(sa_)
        for packet in events("responder", "eap child down"):
            table.apply(packet.name, packet.message, 100.0)
        assert table.children(sa_) == ()
        (found,) = table.find(LOCAL, IPPROTO_ESP, child_.spi_in)
        assert found.ike.peer_id == "carol@example.org"
        assert not found.alive
        assert table.next_deadline() == 105.0
        table.advance(104.9)
        assert table.find(LOCAL, IPPROTO_ESP, child_.spi_in)
        table.advance(105.0)
        assert not table.find(LOCAL, IPPROTO_ESP, child_.spi_in)
        assert table.next_deadline() is None

    def test_a_reqid_of_four_peers(self):
        table = synced(*listing("responder", "x509 up"))
        assert len(table.peers_of_reqid(1)) == 4
        assert table.peers_of_reqid(99) == frozenset()

    def test_a_move_has_the_children_listed_again(self):
        table = synced(*listing("responder", "psk ike rekeyed"))
        (event,) = events("responder", "psk moved")
        assert table.apply(event.name, event.message, 0.0) == {2}
        assert table.sas()[0].remote_host == MOVED
        assert table.sas()[0].local_host == LOCAL
        assert table.peers_of_reqid(1)
        table.refresh(listing("responder", "psk moved")[0], 0.0)
        assert not table.peers_of_reqid(1)
        assert len(table.peers_of_reqid(2)) == 1

    def test_an_address_that_changes_before_anything_is_established(self):
        table = synced()
        event = events("responder", "psk up")[0]
        assert event.name == "ike-update"
        assert table.apply(event.name, event.message, 0.0) == frozenset()
        assert len(table) == 0


class TestTable:
    def test_find_goes_by_address_and_protocol(self):
        table = synced(sa(ike(), child()))
        assert who(table, 0x1001) == [("peer1", True)]
        assert table.find(PEER, IPPROTO_ESP, 0x1001) == ()
        assert table.find(LOCAL, IPPROTO_AH, 0x1001) == ()
        assert table.find(PEER, IPPROTO_ESP, 0x1001, inbound=False) == ()
        assert table.find(PEER, IPPROTO_ESP, 0x2001, inbound=False)
        assert table.find(LOCAL, IPPROTO_ESP, 0x2001) == ()

    def test_a_collision_is_told(self):
        table = synced(
            sa(ike(1), child(1, "DELETED", spi=0x1234)), sa(ike(2), child(2, spi=0x1234))
        )
        assert who(table, 0x1234) == [("peer2", True), ("peer1", False)]

    def test_no_spi_is_no_key(self):
        table = synced(sa(ike(), {"uniqueid": b"1", "state": b"CREATED"}))
        assert table.find(LOCAL, 0, 0) == ()

    def test_down_brings_nothing_to_life(self):
        table = synced()
        table.apply("ike-updown", sa(ike(state="DELETING")), 0.0)
        table.apply("child-updown", sa(ike(state="DELETING"), child()), 0.0)
        assert len(table) == 0
        assert who(table, 0x1001) == []

    def test_down_in_both_orders(self):
        for order in (("ike-updown", "child-updown"), ("child-updown", "ike-updown")):
            table = synced(sa(ike(), child()))
            for name in order:
                table.apply(name, sa(ike(state="DELETING"), child()), 0.0)
            assert len(table) == 0
            assert who(table, 0x1001) == [("peer1", False)]

    def test_a_rekeyed_child_lingers_and_its_successor_lives(self):
        table = synced(sa(ike(), child(1)), linger=5.0)
        message = {"conn": ike() | {"child-sas": {"net": {"old": child(1), "new": child(2)}}}}
        table.apply("child-rekey", message, 10.0)
        assert who(table, 0x1001) == [("peer1", False)]
        assert who(table, 0x1002) == [("peer1", True)]
        table.advance(15.0)
        assert who(table, 0x1001) == []

    def test_a_listed_end_is_not_put_off(self):
        table = synced(sa(ike(), child(1)), linger=5.0)
        message = {"conn": ike() | {"child-sas": {"net": {"old": child(1), "new": child(2)}}}}
        table.apply("child-rekey", message, 10.0)
        table.refresh(sa(ike(), child(1, "DELETED"), child(2)), 12.0)
        assert table.next_deadline() == 15.0

    def test_an_ike_rekey_hands_the_children_over(self):
        table = synced(sa(ike(1), child()))
        renewed = {"conn": {"old": ike(1, "REKEYING"), "new": ike(2)}}
        table.apply("ike-rekey", renewed, 0.0)
        assert [s.unique_id for s in table.sas()] == [2]
        assert [c.unique_id for c in table.children(table.sas()[0])] == [1]
        table.apply("ike-updown", sa(ike(1, "DELETING")), 0.0)
        assert who(table, 0x1001) == [("peer2", True)]

    def test_a_restarted_charon_counts_from_one_again(self):
        """Its first IKE SA must not inherit the children of the one that had the number before."""
        table = synced(sa(ike(1, spi=0xAAAA), child(1), child(2)))
        table.begin_resync()
        other = ike(1, spi=0xBBBB, remote_id=b"mallory")
        table.load(sa(other, child(1, spi=0x3333)))
        table.finish_resync(0.0)
        assert who(table, 0x1002) == [("peer1", False)]
        assert who(table, 0x3333) == [("mallory", True)]
        table.apply("child-updown", up(other, child(5)), 0.0)
        assert who(table, 0x1002) == [("peer1", False)]
        table.apply("ike-update", {"local-host": b"192.0.2.9", **sa(ike(1, spi=0xAAAA))}, 0.0)
        assert who(table, 0x3333) == [("mallory", True)]
        assert len(table.peers_of_reqid(1)) == 2

    def test_refresh_of_what_is_gone(self):
        table = synced()
        table.refresh(sa(ike(), child()), 0.0)
        assert len(table) == 0

    def test_other_events(self):
        table = synced()
        epoch = table.epoch
        assert table.apply("log", {}, 0.0) == frozenset()
        assert table.epoch == epoch

    def test_the_epoch_tells_of_changes(self):
        table = synced(sa(ike(), child()), linger=1.0)
        epochs = [table.epoch]
        table.apply("child-updown", sa(ike(), child()), 0.0)
        epochs.append(table.epoch)
        table.advance(1.0)
        epochs.append(table.epoch)
        table.begin_resync()
        epochs.append(table.epoch)
        table.finish_resync(2.0)
        epochs.append(table.epoch)
        assert epochs == sorted(set(epochs))

    def test_memory_is_bounded(self):
        table = synced(limit=10)
        for n in range(1, 100):
            table.apply("child-updown", up(ike(), child(n)), 0.0)
            table.apply("child-updown", sa(ike(), child(n)), 0.0)
        assert sum(len(who(table, 0x1000 + n)) for n in range(1, 100)) == 10
        assert who(table, 0x1000 + 99)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("ike-updown", {}),
            ("ike-rekey", {"conn": {}}),
            ("ike-rekey", {"conn": {"old": ike()}}),
            ("ike-update", {"conn": ike(), "local-host": b"x"}),
            ("child-updown", {"up": b"yes", "conn": {"child-sas": {}}}),
            ("child-updown", {"up": {}, "conn": ike()}),
            ("child-rekey", {"conn": ike()}),
            ("child-rekey", {"conn": ike() | {"child-sas": {"net": {"old": child()}}}}),
        ],
    )
    def test_events_that_are_not_understood(self, name, message):
        with pytest.raises(CodecError):
            synced(sa(ike(), child())).apply(name, message, 0.0)


class TestResync:
    def test_out_of_one(self):
        table = IKETable()
        assert not table.synced
        with pytest.raises(RuntimeError, match="begin_resync"):
            table.load(sa(ike()))
        with pytest.raises(RuntimeError, match="begin_resync"):
            table.finish_resync(0.0)

    def test_what_is_not_listed_lingers(self):
        table = synced(sa(ike(1), child(1)), sa(ike(2), child(2)))
        table.begin_resync()
        assert not table.synced
        assert who(table, 0x1001) == [("peer1", True)]
        table.load(sa(ike(2), child(2)))
        table.finish_resync(0.0)
        assert table.synced
        assert who(table, 0x1001) == [("peer1", False)]
        assert who(table, 0x1002) == [("peer2", True)]
        assert [s.unique_id for s in table.sas()] == [2]

    def test_events_meanwhile_come_after_the_listing(self):
        table = IKETable()
        table.begin_resync()
        table.apply("child-updown", sa(ike(), child(1)), 0.0)
        table.apply("child-updown", up(ike(), child(2)), 0.0)
        table.load(sa(ike(), child(1)))
        table.finish_resync(0.0)
        assert who(table, 0x1001) == [("peer1", False)]
        assert who(table, 0x1002) == [("peer1", True)]

    def test_a_move_meanwhile(self):
        table = IKETable()
        table.begin_resync()
        table.apply("ike-update", {"remote-host": b"192.0.2.3", **sa(ike())}, 0.0)
        table.load(sa(ike(), child()))
        assert table.finish_resync(0.0) == {1}

    def test_too_many_events_meanwhile(self):
        table = IKETable(limit=1)
        table.begin_resync()
        table.apply("ike-updown", up(ike()), 0.0)
        with pytest.raises(BackendOverrun):
            table.apply("ike-updown", up(ike()), 0.0)
        table.begin_resync()
        table.finish_resync(0.0)
        assert len(table) == 0

    def test_an_event_meanwhile_that_is_not_understood(self):
        table = IKETable()
        table.begin_resync()
        table.apply("ike-updown", {}, 0.0)
        with pytest.raises(CodecError):
            table.finish_resync(0.0)
        assert not table.synced


values = st.recursive(
    st.binary(max_size=8) | st.lists(st.binary(max_size=8), max_size=2),
    lambda inner: st.dictionaries(
        st.sampled_from([*ike(), *child(), "child-sas", "old", "new", "up", "net"]),
        inner,
        max_size=6,
    ),
    max_leaves=12,
)


@given(
    st.sampled_from([*EVENTS, "list-sa", "list-conn"]),
    st.dictionaries(st.sampled_from(["up", "conn", "local-host"]), values, max_size=3),
)
def test_any_message_is_taken_or_refused(name, message):
    table = synced(sa(ike(), child()))
    take = {"list-sa": decode_ike_sa, "list-conn": decode_connection}.get(
        name, lambda message: table.apply(name, message, 0.0)
    )
    try:
        take(message)
    except CodecError:
        return


class Daemon(RuleBasedStateMachine):
    """A charon and a table that hears of it; whose SPI an SPI is never comes out wrong."""

    @initialize()
    def start(self):
        self.table = synced(linger=3.0)
        self.now = 0.0
        self.ikes, self.children, self.owner = {}, {}, {}
        self.next_ike = self.next_child = self.next_spi = 1
        self.boot = 0

    def section(self, number, state="ESTABLISHED"):
        return ike(
            number, state, spi=0x10000 * (self.boot + 1) + number, remote_id=self.ikes[number]
        )

    def tell(self, name, message):
        self.table.apply(name, message, self.now)

    @rule()
    def ike_up(self):
        number, self.next_ike = self.next_ike, self.next_ike + 1
        self.ikes[number] = b"peer-%d-%d" % (self.boot, number)
        self.tell("ike-updown", up(self.section(number)))

    @precondition(lambda self: self.ikes)
    @rule(data=st.data())
    def child_up(self, data):
        number = data.draw(st.sampled_from(sorted(self.ikes)))
        self.tell("child-updown", up(self.section(number), self.new_child(number)))

    def new_child(self, number):
        unique_id, self.next_child = self.next_child, self.next_child + 1
        spi, self.next_spi = 0x1000 + self.next_spi, self.next_spi + 1
        self.children[unique_id] = number, spi
        self.owner[spi] = self.ikes[number].decode()
        return child(unique_id, spi=spi)

    @precondition(lambda self: self.children)
    @rule(data=st.data())
    def child_rekey(self, data):
        unique_id = data.draw(st.sampled_from(sorted(self.children)))
        number, spi = self.children.pop(unique_id)
        both = {"old": child(unique_id, "REKEYED", spi=spi), "new": self.new_child(number)}
        self.tell("child-rekey", {"conn": self.section(number) | {"child-sas": {"net": both}}})

    @precondition(lambda self: self.children)
    @rule(data=st.data())
    def child_down(self, data):
        unique_id = data.draw(st.sampled_from(sorted(self.children)))
        number, spi = self.children.pop(unique_id)
        self.tell("child-updown", sa(self.section(number), child(unique_id, "DELETED", spi=spi)))

    @precondition(lambda self: self.ikes)
    @rule(data=st.data())
    def ike_rekey(self, data):
        old = data.draw(st.sampled_from(sorted(self.ikes)))
        new, self.next_ike = self.next_ike, self.next_ike + 1
        self.ikes[new] = self.ikes[old]
        self.tell("ike-rekey", {"conn": {"old": self.section(old), "new": self.section(new)}})
        del self.ikes[old]
        for unique_id, (number, spi) in self.children.items():
            if number == old:
                self.children[unique_id] = new, spi

    @precondition(lambda self: self.ikes)
    @rule(data=st.data())
    def ike_down(self, data):
        number = data.draw(st.sampled_from(sorted(self.ikes)))
        section = self.section(number, "DELETING")
        self.tell("ike-updown", sa(section))
        for unique_id, (owner, spi) in list(self.children.items()):
            if owner == number:
                self.tell("child-updown", sa(section, child(unique_id, spi=spi)))
                del self.children[unique_id]
        del self.ikes[number]

    @rule(seconds=st.floats(0, 4))
    def time(self, seconds):
        self.now += seconds
        self.table.advance(self.now)

    @rule(crash=st.booleans())
    def resync(self, crash):
        self.table.begin_resync()
        if crash:
            self.boot += 1
            self.ikes.clear()
            self.children.clear()
            self.next_ike = self.next_child = 1
        for number in self.ikes:
            mine = [child(u, spi=s) for u, (owner, s) in self.children.items() if owner == number]
            self.table.load(sa(self.section(number), *mine))
        self.table.finish_resync(self.now)

    @invariant()
    def whose(self):
        living = {spi for _, spi in self.children.values()}
        for spi, owner in self.owner.items():
            found = who(self.table, spi)
            assert {name for name, _ in found} <= {owner}
            assert [alive for _, alive in found if alive] == ([True] if spi in living else [])
        assert {s.unique_id for s in self.table.sas()} == set(self.ikes)


TestDaemon = Daemon.TestCase


class TestOrigins:
    """When charon spoke of what, and where IKE SAs come from."""

    def test_charon_s_last_word_on_a_child(self):
        table = synced(sa(ike(1), child(1)))
        (known,) = table.children(table.sas()[0])
        assert table.told(known) == float("-inf"), "nobody said when that was"
        table.apply("child-updown", up(ike(1), child(1)), 5.0)
        assert table.told(known) == 5.0
        table.apply("child-updown", sa(ike(1), child(1)), 6.0)
        assert table.told(known) == 5.0, "the word that it ended is none on its SA"
        table.advance(1e9)
        assert table.told(known) == float("-inf")

    def test_a_listing_is_as_of_its_beginning(self):
        table = synced()
        table.begin_resync(3.0)
        table.load(sa(ike(1), child(1)))
        table.finish_resync(9.0)
        (known,) = table.children(table.sas()[0])
        assert table.told(known) == 3.0

    def test_an_ike_sa_came_up_and_was_rekeyed(self):
        table = synced(sa(ike(7)))
        table.apply("ike-updown", up(ike(1)), 5.0)
        table.apply("ike-updown", up(ike(1)), 6.0)
        first = table.sas()[-1].key
        assert (table.came(first), table.origin(first)) == (5.0, first)
        for number in (2, 3):
            table.apply("ike-rekey", {"conn": {"old": ike(number - 1), "new": ike(number)}}, 7.0)
        last = table.sas()[-1].key
        assert (table.came(last), table.origin(last)) == (5.0, first)
        assert table.came(table.sas()[0].key) is None, "it was there"

    def test_parents_of_what_is_not_forgotten(self):
        table = synced()
        table.apply("ike-updown", up(ike(1)), 5.0)
        table.apply("child-updown", up(ike(1), child(1)), 5.0)
        table.apply("ike-updown", sa(ike(1)), 6.0)
        assert table.sas() == ()
        assert [each.unique_id for each in table.parents()] == [1]
        table.advance(1e9)
        assert table.parents() == ()

    def test_beginnings_are_forgotten_with_the_rest(self):
        table = synced()
        for number in range(1, 500):
            table.apply("ike-updown", up(ike(number)), 5.0)
            table.apply("ike-updown", sa(ike(number)), 6.0)
        assert len(table._came) < 70
        assert not table._origins

    def test_arrivals_are_counted(self):
        table = synced(sa(ike(1), child(1)))
        count = table.arrivals
        table.apply("child-updown", up(ike(1), child(2)), 5.0)
        assert table.arrivals == count
        table.apply("ike-updown", up(ike(2)), 5.0)
        assert table.arrivals != count

    @pytest.mark.parametrize("state", ["CREATED", "CONNECTING", "DELETING", "DESTROYING", "NEW"])
    def test_who_has_proved_nothing_has_not_arrived(self, state):
        table = synced()
        count = table.arrivals
        table.begin_resync()
        table.load(sa(ike(1, state, remote_id=b"%any")))
        table.finish_resync(5.0)
        assert table.arrivals == count
        assert not table.sas()[0].established

    @pytest.mark.parametrize("state", ["ESTABLISHED", "REKEYING", "REKEYED", "PASSIVE"])
    def test_it_arrives_when_it_is_established(self, state):
        table = synced(sa(ike(1, "CONNECTING")))
        count = table.arrivals
        table.refresh(sa(ike(1, state)), 5.0)
        assert table.arrivals == count + 1
        table.refresh(sa(ike(1, state)), 6.0)
        assert table.arrivals == count + 1
        table.refresh(sa(ike(1, state, remote_eap_id=b"alice")), 7.0)
        assert table.arrivals == count + 2, "with another name it is told again"
