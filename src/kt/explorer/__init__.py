"""The fact explorer: what runs measured of each fact, on one page without a server (docs/explore.md).

rows.py joins the runs' facts to one table, maps.py and lens.py give the numbers behind the figures, verdict.py writes
the head, missing.py names what the runs do not hold with the command that makes it, page.py puts all into one file.
"""

from __future__ import annotations

from .page import Explorer, explore, write_report

__all__ = ["Explorer", "explore", "write_report"]
