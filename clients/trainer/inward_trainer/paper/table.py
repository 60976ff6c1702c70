"""A table of the report: rows of figures, or the reason why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from inward_trainer.paper.cells import Json
from inward_trainer.paper.estimates import Figure


@dataclass(slots=True)
class Row:
    """One line: a name, a figure (or a text) for each column, and why some are empty."""

    name: str
    cells: Mapping[str, Figure | str | float]
    reason: str = ""


@dataclass(slots=True)
class Chart:
    """A simple figure: lines or points, each with its interval where there is one."""

    title: str
    x: str
    y: str
    series: dict[str, list[tuple[float, float]]]
    kind: str = "line"
    """``line`` or ``scatter``."""


@dataclass(slots=True)
class Table:
    """One part of the report."""

    name: str
    title: str
    columns: list[str]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    published: list[list[str]] = field(default_factory=list)
    """What, the seed's figure, its source, and why ours may differ."""
    seeds: list[int] = field(default_factory=list)
    """That its rows are of."""

    @property
    def complete(self) -> bool:
        """Whether every row has its figures."""
        return not any(row.reason for row in self.rows)

    def to_json(self) -> Json:
        return asdict(self) | {"complete": self.complete}

    @classmethod
    def from_json(cls, values: Json) -> Table:
        """What ``to_json`` gave."""
        values = {name: value for name, value in values.items() if name in cls.__dataclass_fields__}
        values["rows"] = [Row(**row) for row in values["rows"]]
        values["charts"] = [Chart(**chart) for chart in values["charts"]]
        return cls(**values)
