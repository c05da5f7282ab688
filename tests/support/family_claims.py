"""What a family's cost report must say."""

from __future__ import annotations

import tnmoe
from support.families import check_family
from support.straight_line import straight_line


def macs(report: tnmoe.CostReport, *parts: str) -> int:
    """MACs of some parts of a layer."""
    found = {str(row[0]): int(row[2]) for row in report.parts().rows}
    return sum(found[part] for part in parts)


def held(spec: tnmoe.Spec, apart: tuple[str, ...] = ()) -> tnmoe.CostReport:
    """A family against its straight line, with 12 tokens."""
    return check_family(spec, straight_line(spec), apart=apart)
