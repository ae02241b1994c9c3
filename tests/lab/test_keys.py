"""No key byte stays anywhere: SAs are keyed with a known pattern, and everything is searched."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import traceback
from contextlib import suppress

import pytest
from hosts import Host, run

from ipsec_aio.backends.xfrm import XfrmBackend
from ipsec_aio.evidence import IPPROTO_UDP, Evidence
from ipsec_aio.flow import pack_address
from ipsec_aio.sa import SAKey


def holders(patterns: list[bytes], besides: set[int]) -> list[str]:
    """Name every reachable text or buffer that one of the patterns is in."""
    gc.collect()
    found: list[str] = []
    seen = set(besides)
    todo: list[object] = list(gc.get_objects())
    seen.add(id(todo))
    while todo:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, bytes | bytearray | memoryview):
            with suppress(ValueError):  # a view that was released
                content = bytes(thing)
                if any(pattern in content for pattern in patterns):
                    found.append(type(thing).__name__)
        elif isinstance(thing, str):
            if any(p.decode() in thing or p.hex() in thing for p in patterns):
                found.append("str")
        else:
            todo.extend(gc.get_referents(thing))
    return found


def read_into(path: str, buffer: bytearray) -> bytearray:
    with open(path, "rb", buffering=0) as file:
        file.readinto(buffer)
    return buffer


async def test_no_key_byte_stays(
    bob: Host,
    alice: Host,
    tmp_path_factory: pytest.TempPathFactory,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level(logging.DEBUG)
    # The program writes the pattern to a file, so that no argument of a command stays behind.
    script = tmp_path_factory.mktemp("keys") / "batch"
    write = (
        "import os, sys\n"
        "a, b = os.urandom(4).hex().encode(), os.urandom(4).hex().encode()\n"
        "k, l = (b'K' + a) * 8, (b'L' + b) * 8\n"
        "source, destination, path = sys.argv[1:]\n"
        "h = lambda key, size: '0x' + key[:size].hex()\n"
        "sa = f'xfrm state add src {source} dst {destination} proto'\n"
        "open(path, 'w').write(f'''"
        "{sa} esp spi 0x5001 mode transport aead rfc4106(gcm(aes)) {h(k, 20)} 128\n"
        "{sa} esp spi 0x5002 mode tunnel auth-trunc hmac(sha256) {h(k, 32)} 128"
        " enc cbc(aes) {h(l, 32)}\n"
        "{sa} ah spi 0x5003 mode transport auth-trunc hmac(sha1) {h(l, 20)} 96\n"
        "''')\n"
        "open(path + '.patterns', 'wb').write(k[:9] + l[:9])\n"
    )
    run("python", "-c", write, alice.v4, bob.v4, str(script))
    backend = XfrmBackend(stamp="off")
    await backend.start()
    run("ip", "-batch", str(script))
    backend.drain()
    key = SAKey(pack_address(bob.v4), 50, 0x5001)
    assert len(list(backend.mirror.sas())) == 3
    assert backend.lookup_missing(key)
    # Everything once more, by a dump.
    assert backend._sockets is not None
    backend._lose(backend._sockets, OSError("said to be lost"))
    changed = asyncio.Event()
    unsubscribe = backend.subscribe(changed.set)
    while not backend.mirror.synced:
        changed.clear()
        await changed.wait()
    unsubscribe()
    sas = list(backend.mirror.sas())
    assert {sa.spi for sa in sas} == {0x5001, 0x5002, 0x5003}
    assert sum(algorithm.key_bits for sa in sas for algorithm in sa.algorithms if algorithm) == (
        160 + 256 + 256 + 160
    )
    token = backend.resolve(
        Evidence(IPPROTO_UDP, pack_address(bob.v4), 9, pack_address(alice.v4), 9)
    )
    try:
        raise RuntimeError(token, sas)
    except RuntimeError as error:
        traceback.print_exception(error)
    print(sas, token, backend.mirror.__dict__)

    both = read_into(f"{script}.patterns", bytearray(18))
    patterns = [bytes(both[:9]), bytes(both[9:])]
    # All that was written, by whatever way, while SAs were read.
    text = "".join((*capfd.readouterr(), caplog.text))
    assert f"spi {0x5001:#010x}" in text or "20481" in text
    assert "RuntimeError" in text
    assert not [p for p in patterns if p.decode() in text or p.hex() in text]
    mine = {id(both), *map(id, patterns)}
    assert holders(patterns, mine) == []
    kept = patterns[0] + b"!"
    assert holders(patterns, mine) == ["bytes"], "the search finds what is there"
    del kept
    os.unlink(script)
    await backend.aclose()
