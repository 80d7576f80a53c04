"""Claim: bad input gets the right status, a message that names field and way out, and leaves nothing half-made.

    python -m benchmarks.bad_input

The cases are those of the tests. Residue is what the store's tables and the home folder hold more or less afterwards;
growth is how far the server's memory rose meanwhile.
"""

from __future__ import annotations

import sys

from benchmarks.common import conclude, parser, serving, table
from tests.e2e.bad_input import CASES, MIB, MountRefused, World


def main() -> int:
    """Exit code 0 if the claim holds."""
    args = parser(__doc__).parse_args()
    lines: list[tuple[object, ...]] = []
    faults: list[str] = []
    skipped: list[str] = []
    with serving(args) as server, World(server) as world:
        for case in CASES:
            try:
                finding = world.find(case)
            except MountRefused:
                skipped.append(case.name)
                continue
            faults += [f"{case.name}: {fault}" for fault in finding.faults()]
            lines.append(
                (
                    case.name,
                    finding.response.status_code,
                    finding.error.get("param"),
                    f"{finding.took_s:.2f}",
                    f"{finding.growth_bytes / MIB:.0f}",
                    ", ".join(finding.residue) or "none",
                    finding.error.get("message"),
                )
            )

    print(table(("case", "status", "param", "s", "growth MiB", "residue", "message"), lines))
    for name in skipped:
        print(f"not tried, since nothing may be mounted here: {name}")
    for fault in faults:
        print(f"FAULT {fault}")
    return conclude("bad_input", not faults, {"cases": len(lines), "skipped": len(skipped), "faults": len(faults)})


if __name__ == "__main__":
    sys.exit(main())
