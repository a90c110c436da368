"""SECURITY.md's table is that of this corpus."""

from __future__ import annotations

import re

from security_table import PAGE, counted
from test_fuzz import COUNTS


def test_the_table_counts_every_case_and_mutation() -> None:
    rows = re.findall(r"^\| (.+?) \| ([\d,]+) \| ([\d,]+) \|", PAGE.read_text("utf-8"), re.M)
    found = {what: (int(n.replace(",", "")), int(m.replace(",", ""))) for what, n, m in rows}
    wanted = counted() | {f"mutations of {target}": (n, n) for target, n in COUNTS.items()}
    assert found == wanted, "run make security-table"
