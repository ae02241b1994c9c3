"""Hold a coverage report against what is asked: ``coverage_gate.py REPORT.json``.

Branch coverage of the whole package is at least 98 %, and of no module under 95 %.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

WHOLE, MODULE = 98.0, 95.0


def main(report: str) -> int:
    measured = json.loads(Path(report).read_text())
    whole = measured["totals"]["percent_covered"]
    modules = {name: file["summary"]["percent_covered"] for name, file in measured["files"].items()}
    low = {name: percent for name, percent in sorted(modules.items()) if percent < MODULE}
    for name, percent in low.items():
        print(f"{name}: {percent:.1f} % is covered; {MODULE:.0f} % is asked of each module")
    print(f"coverage with branches: {whole:.2f} % ({WHOLE:.0f} % is asked)")
    return 1 if low or whole < WHOLE else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
