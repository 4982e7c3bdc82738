"""The receipt: for each call of a quantizable op, which implementation ran it, or why it stayed float."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from teint8.policy import Rule


@dataclasses.dataclass(frozen=True)
class Record:
    """One kind of call.

    Attributes:
        path: the weight's path in the params, or the call site ("file.py:12") where it has none.
        op: "linear", "matmul", "activation_matmul", or "recurrent".
        m: rows of the activation, over all leading dimensions. n: output channels. k: length of the contraction.
        batch: how many such matmuls in one call (a batched weight).
        implementation: what ran the forward: "cpu-amx", "triton", ...; "reference" (simulated in plain torch), "dequantized" (W8A16: a
            float matmul by an INT8 weight) or "float".
        mode: what the rule asks for: "W8A8", "W8A16", with "dX" and "dW" where the backward runs in INT8 too; "" in float.
        reason: why it stayed float, or "".
        calls: how often it was called so.

    """

    path: str
    op: str
    m: int
    n: int
    k: int
    batch: int
    implementation: str
    mode: str = ""
    reason: str = ""
    calls: int = 1

    @property
    def int8(self) -> bool:
        """Whether its matmul ran in INT8."""
        return self.implementation not in ("float", "dequantized", "reference")


class Receipt:
    """Records, in the order of their first call; printed as a table.

    Attributes:
        unmatched: rules that decided no call.

    Example:
        >>> receipt = Receipt()
        >>> receipt.add(("fc.weight", "linear", 32, 10, 64, 1, "cpu-amx", "W8A8", ""))
        >>> print(receipt)
        path       op      M   N   K   batch  ran as   mode  calls  reason
        fc.weight  linear  32  10  64  1      cpu-amx  W8A8  1
        1 of 1 calls ran in INT8

    """

    def __init__(self) -> None:
        self._calls: dict[Any, int] = {}
        self.unmatched: list[Rule] = []

    def add(self, fields: tuple[Any, ...]) -> None:
        """Count one call, given as the fields of a Record in order, without ``calls``."""
        self._calls[fields] = self._calls.get(fields, 0) + 1

    @property
    def records(self) -> list[Record]:
        """The records, each with its number of calls."""
        return [Record(*(*fields, n)) for fields, n in list(self._calls.items())]

    @property
    def int8_calls(self) -> int:
        """Number of calls that ran in INT8."""
        return sum(record.calls for record in self.records if record.int8)

    @property
    def calls(self) -> int:
        """Number of calls of quantizable ops."""
        return sum(record.calls for record in self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records)

    def __len__(self) -> int:
        return len(self._calls)

    def __str__(self) -> str:
        rows: list[tuple[str, ...]] = [("path", "op", "M", "N", "K", "batch", "ran as", "mode", "calls", "reason")]
        for r in self:
            sizes = map(str, (r.m, r.n, r.k, r.batch))
            rows.append((r.path, r.op, *sizes, r.implementation, r.mode, str(r.calls), r.reason))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if not self:
            lines = ["no matmul was recorded: other layers are not, nor is compiled code but by the backend, where it compiled a graph"]
        lines.append(f"{self.int8_calls} of {self.calls} calls ran in INT8")
        return "\n".join([*lines, *(f"no call matched {rule!r}" for rule in self.unmatched)])

    __repr__ = __str__
