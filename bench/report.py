"""Results for people: a table on the terminal, a plot as SVG."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from xml.sax.saxutils import escape

STOCK = "uvloop, stock"
_COLORS = {
    "asyncio, stock": "#b0b0b0",
    "asyncio, stock, fresh heap": "#d8d8d8",
    STOCK: "#707070",
    "asyncio, ours": "#7fb2e5",
    "asyncio, ours, require=": "#4f94d4",
    "uvloop, ours": "#6cc08b",
    "uvloop, ours, require=": "#3a9d62",
    "C recvmmsg, discarding": "#e0a050",
}


def show(name: str, part: Any) -> None:
    """Print one part."""
    if isinstance(part, dict):
        print(f"\n{name}: " + ", ".join(f"{key} {value:.0f}" for key, value in part.items()))
        return
    if name == "tables":
        print(f"\n{name}:")
        for row in part:
            print(f"  {row['mode']:10}" + ", ".join(_of_tables(row)))
        return
    for cell in part:
        about = ", ".join(f"{k} {v}" for k, v in cell.items() if k not in ("rows", "extra"))
        print(f"\n{name}: {about}")
        print(f"  {'':28}{'µs':>8}  {'quartiles':>15}   × {'':6}{'quartiles':>13}")
        for row in cell["rows"]:
            cost, times = row["cost"], row["times"]
            print(
                f"  {row['variant']:28}{cost['median'] / 1000:8.2f}"
                f"  {cost['low'] / 1000:7.2f}–{cost['high'] / 1000:7.2f}"
                f"   {times['median']:8.2f}  {times['low']:5.2f}–{times['high']:5.2f}"
            )
        if "extra" in cell:
            extra = cell["extra"]
            print(
                f"  {'the token costs':28}{extra['median'] / 1000:8.2f}"
                f"  {extra['low'] / 1000:7.2f}–{extra['high'] / 1000:7.2f}"
            )


def described(machine: dict[str, Any]) -> str:
    """One line about the machine."""
    return (
        f"{machine['processor']} ({machine['processors']} processors), Linux {machine['kernel']}, "
        f"Python {machine['python']}, uvloop {machine['uvloop']}, senders in {machine['senders']}, "
        f"{'marked by the senders' if machine['marks'] else 'without marks'}, "
        f"{machine['rounds']} rounds, load {machine['load']:.1f}"
    )


def plot(found: dict[str, Any]) -> str:
    """Bars for each cell of the matrix: how many times cheaper than uvloop's own endpoint."""
    width, left, bar, top = 760, 210, 16, 58
    scale = (width - left - 80) / 3.0
    body: list[str] = []
    y = top
    for cell in found["saturated"]:
        y += 26
        title = f"{cell['size']} bytes, {cell['peers']} peer{'s' * (cell['peers'] > 1)}"
        body.append(f'<text x="8" y="{y - 6}" font-weight="bold">{title}</text>')
        for row in cell["rows"]:
            times, color = row["times"], _COLORS.get(row["variant"], "#888")
            length = times["median"] * scale
            low, high = left + times["low"] * scale, left + times["high"] * scale
            middle = y + bar / 2 - 1
            body.append(
                f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">'
                f"{escape(row['variant'])}</text>"
                f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{bar - 3}" fill="{color}"/>'
                f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{middle}" y2="{middle}" stroke="#222"/>'
                f'<text x="{max(high, left + length) + 6:.1f}" y="{y + 11}">'
                f"{times['median']:.2f}</text>"
            )
            y += bar
    lines = "".join(
        f'<line x1="{left + x * scale:.1f}" x2="{left + x * scale:.1f}" y1="{top}" y2="{y + 4}" '
        f'stroke="{"#888" if x == 1 else "#ddd"}"/>'
        f'<text x="{left + x * scale:.1f}" y="{y + 18}" text-anchor="middle">{x}</text>'
        for x in (0, 1, 2, 3)
    )
    head = (
        '<text x="8" y="20" font-size="15" font-weight="bold">'
        "UDP receive: how many times cheaper than uvloop's own endpoint</text>"
        '<text x="8" y="38" fill="#555">CPU time per datagram, saturated; medians of '
        f"{found['machine']['rounds']} paired rounds, lines between the quartiles</text>"
        f'<text x="8" y="52" fill="#555">{escape(_machine(found["machine"]))}</text>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y + 28}" '
        'font-family="sans-serif" font-size="11">'
        f'<rect width="100%" height="100%" fill="white"/>{head}{lines}{"".join(body)}</svg>\n'
    )


def _machine(machine: dict[str, Any]) -> str:
    return (
        f"{machine['processor']}, Linux {machine['kernel']}, Python {machine['python']}, "
        f"uvloop {machine['uvloop']}"
    )


def filled(page: str, found: dict[str, Any]) -> str:
    """The page with these results in the place of those that it had."""
    head, _, rest = page.partition(_BEGIN)
    _, _, tail = rest.partition(_END)
    text = "\n".join(_markdown(found))
    return f"{head}{_BEGIN}\n\n{text}\n{_END}{tail}"


_BEGIN, _END = "<!-- results -->", "<!-- end of results -->"


def _markdown(found: dict[str, Any]) -> Iterator[str]:
    yield f"Measured on {described(found['machine'])}."
    for name, title in (
        ("saturated", "UDP receive, saturated: CPU per datagram"),
        ("paced", "UDP receive, 20 000 a second: CPU per datagram"),
        ("echo", "Echo of 64 bytes, one at a time: round trip"),
        ("sending", "Sending: CPU per datagram"),
        ("accepting", "TCP: CPU per accepted connection"),
    ):
        cells = found.get(name, [])
        if not cells:
            continue
        yield f"\n### {title}\n"
        if name == "accepting":
            yield "| | µs | quartiles | × stock |\n|---|---|---|---|"
            for cell in cells:
                for row in cell["rows"]:
                    yield f"| {row['variant']} | {_cost(row)} | {row['times']['median']:.2f} |"
                extra = cell["extra"]
                yield (
                    f"| **{cell['loop']}: the token** | {extra['median'] / 1000:.1f} "
                    f"| {extra['low'] / 1000:.1f}–{extra['high'] / 1000:.1f} | |"
                )
            continue
        yield "| µs (× uvloop stock) | " + " | ".join(map(_label, cells)) + " |"
        yield "|---" * (len(cells) + 1) + "|"
        for index, row in enumerate(cells[0]["rows"]):
            shown = [_cell(cell["rows"][index]) for cell in cells]
            yield f"| {row['variant']} | " + " | ".join(shown) + " |"
    memory = found.get("memory")
    if memory:
        yield (
            f"\n### Memory\n\n{memory['bytes_per_peer']:.0f} bytes per peer of one endpoint, "
            f"with {memory['peers']} protected peers, each with a token of its own."
        )
    if found.get("tables"):
        yield from _tables(found["tables"])


_TABLES = (
    ("load_seconds", "read", "s"),
    ("resync_seconds", "read again after a loss", "s"),
    ("rekey_microseconds", "a rekey followed", "µs"),
    ("stranger_microseconds", "a peer without SA or policy judged", "µs"),
    ("megabytes", "memory", "MB"),
)


def _of_tables(row: dict[str, Any]) -> list[str]:
    return [
        f"{row[key]:.2f} {unit}" if unit == "s" else f"{row[key]:.0f} {unit}"
        for key, _, unit in _TABLES
    ]


def _tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        "\n### Tables of a gateway\n\nCPU time of the xfrm backend, on sockets that give what a "
        "kernel's would, and what Python has allocated for the tables; in a process of their own. "
        "Of each time the best of several rounds. The SAs have carried nothing yet; counters of "
        "their own take about 200 bytes more for each SA and its policy.\n"
    )
    yield "| SAs and policies, each | " + " | ".join(what for _, what, _ in _TABLES) + " |"
    yield "|---" * (len(_TABLES) + 1) + "|"
    for row in rows:
        yield f"| {row['sas']}, {row['mode']} mode | " + " | ".join(_of_tables(row)) + " |"


def _label(cell: dict[str, Any]) -> str:
    if "percentile" in cell:
        return f"p{cell['percentile']}"
    peers = f", {cell['peers']} peer{'s' * (cell['peers'] > 1)}" if "peers" in cell else ""
    return f"{cell['size']} bytes{peers}"


def _cost(row: dict[str, Any]) -> str:
    cost = row["cost"]
    return f"{cost['median'] / 1000:.1f} | {cost['low'] / 1000:.1f}–{cost['high'] / 1000:.1f}"


def _cell(row: dict[str, Any]) -> str:
    cost, times = row["cost"], row["times"]
    return (
        f"{cost['median'] / 1000:.2f} (**{times['median']:.2f}**, "
        f"{times['low']:.2f}–{times['high']:.2f})"
    )
