"""What is wrong with a file or with one of its rows: the one wording of every command, trainer and adapter."""

from __future__ import annotations

from inward_client.rows.terminal import printable


class DataError(ValueError):
    """A file or a row can't be used.

    Attributes:
        reason: what is wrong and what to do; the same for all rows with the same fault.
        where: the file and the line (or row, or element), such as ``pairs.jsonl, line 3``; empty where a row came from
            no file.
        column: the column to blame.
    """

    def __init__(self, reason: str, *, where: str = "", column: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.where, self.column = reason, where, column

    @property
    def message(self) -> str:
        """Where, and what; a terminal can show it whatever names are in it."""
        return printable(f"{self.where}: {self.reason}" if self.where else self.reason)

    def __str__(self) -> str:
        return self.message

    def at(self, where: str) -> DataError:
        """The same fault at a place."""
        return DataError(self.reason, where=where, column=self.column)
