"""A charon that answers what a real one answered: its answers are taken from a recording."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path

from ipsec_aio.wire.vici import Message, Packet, PacketReader, PacketType, encode_packet

RECORDED = Path(__file__).parent.parent / "wire" / "recorded"


def recording(host: str) -> Iterator[tuple[str, str, list[Packet], list[Packet]]]:
    """Yield the exchanges of a recording: step, connection, packets sent, packets received."""

    def packets(column: list[str]) -> list[Packet]:
        return PacketReader().feed(b"".join(map(bytes.fromhex, column)))

    for each in json.loads((RECORDED / f"{host}.json").read_text()):
        yield each["step"], each["connection"], packets(each["sent"]), packets(each["received"])


class FakeCharon:
    """Serves VICI on a Unix socket.

    ``answers`` maps a command to its answer and to what it streams before; a command that maps to
    None is never answered, one that maps to bytes is answered with those.
    """

    def __init__(self, path: Path, host: str = "responder") -> None:
        self.path = path
        self.known = {"ike-updown", "child-updown", "child-rekey", "control-log"}
        self.answers: dict[str, tuple[Packet, list[Packet]] | bytes | None] = {}
        self.asked: list[Packet] = []
        self.changed = asyncio.Event()
        self.clients: dict[asyncio.StreamWriter, set[str]] = {}
        self.serving: set[asyncio.Task[None]] = set()
        self.server: asyncio.Server | None = None
        best: dict[str, list[Packet]] = {}
        for _, connection, sent, received in recording(host):
            if connection == "commands":
                for request in sent:
                    if request.type is PacketType.CMD_REQUEST:
                        streamed = [p for p in received if p.type is PacketType.EVENT]
                        answer = next(
                            p for p in received if p.type.name in ("CMD_RESPONSE", "CMD_UNKNOWN")
                        )
                        if answer.type is PacketType.CMD_RESPONSE:
                            # list-sas is recorded often: keep what lists most.
                            best[request.name] = max(best.get(request.name, []), streamed, key=len)
                            self.answers[request.name] = answer, best[request.name]
                            self.known.update(p.name for p in streamed)
            elif sent:
                self.known.update(p.name for p in sent)
        self.known |= {"list-authority", "list-sa", "list-cert", "list-conn"}

    async def start(self) -> None:
        self.server = await asyncio.start_unix_server(self._serve, self.path)

    async def stop(self) -> None:
        """End as a killed daemon does: connections end, the socket's file stays."""
        assert self.server is not None
        self.server.close()
        for writer in list(self.clients):
            writer.transport.abort()
        while self.serving:
            await asyncio.wait(self.serving)
        await self.server.wait_closed()

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until something holds that changes with requests and connections."""
        while not condition():
            self.changed.clear()
            await self.changed.wait()

    def raise_event(self, name: str, message: Message) -> None:
        data = encode_packet(PacketType.EVENT, name, message)
        for writer, names in self.clients.items():
            if name in names:
                writer.write(data)

    def say(self, data: bytes) -> None:
        """Send bytes to everyone who is registered for anything."""
        for writer, names in self.clients.items():
            if names:
                writer.write(data)

    def hang_up(self) -> None:
        """End the connections of everyone who is registered for anything."""
        for writer, names in self.clients.items():
            if names:
                writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        names = self.clients[writer] = set()
        task = asyncio.current_task()
        assert task is not None
        self.serving.add(task)
        cutter = PacketReader()
        try:
            while data := await reader.read(65536):
                for packet in cutter.feed(data):
                    self._answer(packet, names, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()
            await asyncio.gather(writer.wait_closed(), return_exceptions=True)
            del self.clients[writer]
            self.changed.set()
            self.serving.discard(task)

    def _answer(self, packet: Packet, names: set[str], writer: asyncio.StreamWriter) -> None:
        self.asked.append(packet)
        self.changed.set()
        if packet.type in (PacketType.EVENT_REGISTER, PacketType.EVENT_UNREGISTER):
            register = packet.type is PacketType.EVENT_REGISTER
            known = packet.name in (self.known if register else names)
            if known:
                (names.add if register else names.discard)(packet.name)
            writer.write(
                encode_packet(PacketType.EVENT_CONFIRM if known else PacketType.EVENT_UNKNOWN)
            )
            return
        answer = self.answers.get(packet.name, (Packet(PacketType.CMD_UNKNOWN), []))
        if isinstance(answer, bytes):
            writer.write(answer)
        elif answer is not None:
            for each in answer[1]:
                if each.name in names:
                    writer.write(encode_packet(each.type, each.name, each.message))
            last = answer[0]
            writer.write(encode_packet(last.type, last.name, last.message))
