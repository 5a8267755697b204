"""The op table: for each dialect op, whether a backend takes it, lowers it or refuses it, in one row.

Five readers share a table: `check`, `compile`, `edgeexport ops`, the support matrix in the docs, and the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from edgeexport import errors
from edgeexport.core import Finding

if TYPE_CHECKING:
    import onnx_ir as ir

Limit = Callable[[Any], str | None]
"""Given a node, the reason why this backend cannot take it, or None."""

Lower = Callable[[Any, Any], None]
"""Given (node, context), emits what stands for the node."""


@dataclass(frozen=True)
class Row:
    """One op. `why` and `fix` belong to a refusal; `note` says in a few words what a lowered op becomes."""

    op: str
    kind: Literal["native", "lower", "reject"]
    limit: Limit | None = None
    lower: Lower | None = None
    note: str = ""
    why: str = ""
    fix: str = ""


class OpTable:
    """Rows by op name. A second row for an op is a mistake in this table, found at import."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._rows: dict[str, Row] = {}

    def native(self, *ops: str, limit: Limit | None = None) -> None:
        """Ops taken as they are, perhaps within limits."""
        for op in ops:
            self._add(Row(op, "native", limit=limit))

    def lower(self, *ops: str, note: str, limit: Limit | None = None) -> Callable[[Lower], Lower]:
        """Decorate the function that emits what stands for these ops."""

        def register(function: Lower) -> Lower:
            for op in ops:
                self._add(Row(op, "lower", limit=limit, lower=function, note=note))
            return function

        return register

    def reject(self, *ops: str, why: str, fix: str) -> None:
        """Ops this backend cannot do."""
        for op in ops:
            self._add(Row(op, "reject", why=why, fix=fix))

    def include(self, rows: Iterable[Row]) -> None:
        """Rows of another backend's table, taken over."""
        for row in rows:
            self._add(row)

    def get(self, op: str) -> Row | None:
        """The row of an op, or None."""
        return self._rows.get(op)

    def refusal(self, op: str) -> tuple[str, str] | None:
        """(why, what to do) of an op that the table refuses or does not know, else None."""
        row = self._rows.get(op)
        if row is None:
            return "its op table has no row for it", f"add a row for {op} to the op table of {self.backend}"
        return (row.why, row.fix) if row.kind == "reject" else None

    def check(self, nodes: Iterable[ir.Node]) -> list[Finding]:
        """One finding for each node that the table refuses, does not know, or takes only within other limits."""
        findings = []
        for node in nodes:
            row, refused = self._rows.get(node.op_type), self.refusal(node.op_type)
            if refused is None and row is not None and row.limit is not None and (reason := row.limit(node)):
                refused = reason, "see `edgeexport ops`"
            if refused is not None:
                findings.append(errors.op_not_lowered(self.backend, node.op_type, node.name or "", *refused))
        return findings

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows.values())

    def __len__(self) -> int:
        return len(self._rows)

    def _add(self, row: Row) -> None:
        if row.op in self._rows:
            raise AssertionError(f"{self.backend}: {row.op} has two rows")
        self._rows[row.op] = row
