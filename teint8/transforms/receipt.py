"""The receipt: for each call of a quantizable op, which implementation ran it, or why it stayed float, and what that cost."""

import dataclasses
import html
import json
import math
from collections.abc import Iterator
from typing import Any

from teint8.policy import Rule


@dataclasses.dataclass(frozen=True)
class Record:
    """One kind of call.

    Attributes:
        path: the weight's path in the params, or the call site ("file.py:12") where it has none.
        op: "linear", "matmul", "activation_matmul", "conv", "embedding", "recurrent" or "attention".
        m: rows of the activation, over all leading dimensions.
        n: output channels.
        k: length of the contraction.
        batch: how many such matmuls in one call (a batched weight).
        implementation: what ran the forward: "cpu-amx", "triton", ...; "reference" (simulated in plain torch), "dequantized" (W8A16: a
            float matmul by an INT8 weight) or "float".
        mode: what the rule asks for: "W8A8", "W8A16", with "dX" and "dW" where the backward runs in INT8 too, and
            "stochastic" where gradients are rounded so; "" in float.
        reason: why it stayed float, or "".
        calls: how often it was called so.
        kernel: the configuration of the kernel ("huge 192x256, ring of 3"), where it has several, or "".
        nbytes: bytes that one call must read and write: both operands as they are multiplied, their scales, and the result.
        sqnr: of the results of all calls against those in float, ``10 log10(sum y^2 / sum (y - y_int8)^2)`` in dB, or None.
        saturated: the share of activation codes that are -127 or 127: with a dynamic scale the largest of each row, with a static one
            also what it clipped; None if not measured, or if the activation is float.

    Examples:
        >>> Record("fc.weight", "linear", 32, 10, 64, 1, "cpu-amx", "W8A8").int8
        True

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
    kernel: str = ""
    nbytes: int = 0
    sqnr: float | None = None
    saturated: float | None = None

    @property
    def int8(self) -> bool:
        """Whether its matmul ran in INT8."""
        return self.implementation not in ("float", "dequantized", "reference")


class Measured:
    """Sums over calls: of squares of exact results and of errors, of saturated codes and of all."""

    __slots__ = ("codes", "noise", "saturated", "signal")

    def __init__(self) -> None:
        self.signal = self.noise = 0.0
        self.saturated = self.codes = 0

    @property
    def sqnr(self) -> float:
        """In dB; infinite where nothing differs."""
        if self.noise == 0.0:
            return math.inf
        if math.isnan(self.noise) or math.isnan(self.signal):
            return math.nan
        return 10 * math.log10(self.signal / self.noise) if self.signal > 0 and self.noise < math.inf else -math.inf


class Receipt:
    """Records, in the order of their first call; printed as a table, in Jupyter as HTML.

    Attributes:
        unmatched: rules that decided no call.

    Examples:
        >>> receipt = Receipt()
        >>> receipt.add(("fc.weight", "linear", 32, 10, 64, 1, "cpu-amx", "W8A8", ""))
        >>> print(receipt)
        path       op      M   N   K   batch  ran as   mode  calls  reason
        fc.weight  linear  32  10  64  1      cpu-amx  W8A8  1
        1 of 1 calls ran in INT8

    """

    def __init__(self) -> None:
        self._calls: dict[Any, int] = {}
        self._costs: dict[Any, tuple[str, int]] = {}
        self._measured: dict[Any, Measured] = {}
        self.unmatched: list[Rule] = []

    def add(self, fields: tuple[Any, ...], kernel: str = "", nbytes: int = 0) -> None:
        """Count one call, given as the fields of a Record in order, without ``calls``; its kernel and bytes are kept once."""
        self._calls[fields] = self._calls.get(fields, 0) + 1
        if nbytes:
            self._costs[fields] = (kernel, nbytes)

    def measured(self, fields: tuple[Any, ...]) -> Measured:
        """Where measurements of a call are added up."""
        return self._measured.setdefault(fields, Measured())

    @property
    def records(self) -> list[Record]:
        """The records, each with its number of calls."""
        return [self._record(fields, n) for fields, n in list(self._calls.items())]

    def _record(self, fields: tuple[Any, ...], calls: int) -> Record:
        found = self._measured.get(fields)
        saturated = found.saturated / found.codes if found is not None and found.codes else None
        kernel, nbytes = self._costs.get(fields, ("", 0))
        return Record(*(*fields, calls, kernel, nbytes, None if found is None else found.sqnr, saturated))

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

    def to_json(self) -> str:
        """The records, and the rules that decided nothing, as JSON.

        Examples:
            >>> Receipt().to_json()
            '{"records": [], "unmatched": []}'

        """
        records = [dataclasses.asdict(r) for r in self]
        for record in records:  # JSON has no infinity
            record["sqnr"] = record["sqnr"] if record["sqnr"] is None or math.isfinite(record["sqnr"]) else str(record["sqnr"])
        return json.dumps({"records": records, "unmatched": [repr(rule) for rule in self.unmatched]})

    def plot(self, axes: Any = None) -> Any:
        """SQNR by layer, the worst calls in another colour (below 30 dB), as bars of matplotlib.

        Args:
            axes: matplotlib's, or None for new ones.

        Returns:
            The axes.

        Raises:
            ValueError: nothing was measured; ``teint8.explain`` measures.
            ImportError: matplotlib is not installed.

        """
        found = [(r.path, r.sqnr) for r in self if r.sqnr is not None and math.isfinite(r.sqnr)]
        if not found:
            raise ValueError("Receipt.plot: no SQNR was measured; teint8.explain(qfn, params, ...) measures, a context does not")
        if axes is None:
            try:
                from matplotlib import pyplot
            except ImportError as error:
                raise ImportError("Receipt.plot: matplotlib is not installed: pip install matplotlib") from error
            _, axes = pyplot.subplots(figsize=(6, 1 + 0.2 * len(found)))
        names, values = zip(*reversed(found), strict=True)
        axes.barh(range(len(found)), values, color=["tab:red" if v < 30 else "tab:blue" for v in values])
        axes.set_yticks(range(len(found)), names, fontsize=6)
        axes.set_xlabel("SQNR in dB")
        return axes

    def _rows(self) -> list[tuple[str, ...]]:
        """The head and the rows of the table; what was measured has columns of its own."""
        measured = bool(self._measured)
        more = ("kernel", "MB", "SQNR dB", "at 127") if measured else ()
        rows: list[tuple[str, ...]] = [("path", "op", "M", "N", "K", "batch", "ran as", *more, "mode", "calls", "reason")]
        for r in self:
            costs = (
                r.kernel, f"{r.nbytes / 1e6:.2f}", "" if r.sqnr is None else f"{r.sqnr:.1f}",
                "" if r.saturated is None else f"{100 * r.saturated:.2f}%",
            )  # fmt: skip
            sizes = map(str, (r.m, r.n, r.k, r.batch))
            rows.append((r.path, r.op, *sizes, r.implementation, *(costs if measured else ()), r.mode, str(r.calls), r.reason))
        return rows

    def _closing(self) -> list[str]:
        unmatched = self.unmatched if self.calls else ()  # what ran in compiled code may have matched
        floats = sum(record.calls for record in self.records if record.implementation == "dequantized")
        counted = f"{self.int8_calls} of {self.calls} calls ran in INT8{f', {floats} with INT8 weights and in float' if floats else ''}"
        return [counted, *(f"no call matched {rule!r}" for rule in unmatched)]

    def __str__(self) -> str:
        rows = self._rows()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        if not self:
            lines = ["no matmul was recorded: other layers are not, nor is compiled code but by the backend, where it compiled a graph"]
        return "\n".join([*lines, *self._closing()])

    def _repr_html_(self) -> str:
        """The table in Jupyter: calls that stayed float stand out."""
        head, *rows = self._rows()
        body = [f"<tr>{''.join(f'<th>{html.escape(c)}</th>' for c in head)}</tr>"]
        for record, row in zip(self, rows, strict=True):
            style = "" if record.int8 else ' style="background:#fff3cd"'
            body.append(f"<tr{style}>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>")
        closing = "".join(f"<p>{html.escape(line)}</p>" for line in self._closing())
        return f"<table>{''.join(body)}</table>{closing}"

    __repr__ = __str__
