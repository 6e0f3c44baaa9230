"""A row of many cases, each an error and its limit: written again after each group, with the worst so far."""

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.speed.gpu.place import Place

EXACT = 1e-12  # the limit of what is to be equal bit for bit: any difference is far beyond it


class Checks:
    """Cases of one row. total: how many groups there will be."""

    def __init__(self, where: Place, name: str, total: int) -> None:
        self.where, self.name, self.total = where, name, total
        self.groups, self.cases, self.worst = 0, 0, 0.0
        self.beyond, self.refused = dict[str, Mapping[str, Any]](), 0

    def add(self, group: str, cases: Mapping[str, Mapping[str, Any]]) -> None:
        """Write a group of cases and the row; a case has an error and its limit `allowed`, or is refused."""
        self.where.write_case(self.name, {"group": group, "cases": cases})
        self.groups += 1
        for name, case in cases.items():
            if "error" not in case:
                self.refused += 1
                continue
            self.cases += 1
            share = case["error"] / case["allowed"]
            if not share <= 1:  # written so that a NaN is beyond
                self.beyond[f"{group}: {name}"] = case
            self.worst = max(self.worst, math.inf if math.isnan(share) else share)
        note = f"{self.groups} of {self.total} groups, {self.cases} cases, {len(self.beyond)} beyond"
        note += f", {self.refused} refused" if self.refused else ""
        self.where.write(self.name, self.worst, note, {"beyond": self.beyond})
