"""Two receipts side by side: what a change of the policy did."""

import dataclasses
import html

from teint8.transforms.receipt import Receipt, Record


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Calls by path and op, before and after; printed as a table, in Jupyter as HTML.

    Attributes:
        rows: for each path and op what ran as what before and after ("" where it was not called), both SQNR in dB, and both bytes.

    Examples:
        >>> import torch
        >>> from teint8 import Policy, Rule, explain, quantize
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Linear(32, 10))
        >>> params, x = dict(model.named_parameters()), torch.ones(8, 64)
        >>> head = Policy([Rule("1.*", weight=None), Rule()])
        >>> compare(explain(quantize(model), params, x), explain(quantize(model, head), params, x)).changed
        ('1.weight',)

    """

    rows: tuple[tuple[str, str, str, str, float | None, float | None, int, int], ...]

    @property
    def changed(self) -> tuple[str, ...]:
        """Paths whose calls run as something else, or in another mode."""
        return tuple(row[0] for row in self.rows if row[2] != row[3])

    def _table(self) -> list[tuple[str, ...]]:
        def decibels(value: float | None) -> str:
            return "" if value is None else f"{value:.1f}"

        made: list[tuple[str, ...]] = [("path", "op", "before", "after", "SQNR before", "after", "MB before", "after")]
        for path, op, before, after, first, second, bytes1, bytes2 in self.rows:
            sizes = (f"{bytes1 / 1e6:.2f}", f"{bytes2 / 1e6:.2f}")
            made.append((path, op, before, after, decibels(first), decibels(second), *sizes))
        return made

    def _closing(self) -> str:
        before, after = (sum(row[i] for row in self.rows) / 1e6 for i in (6, 7))  # type: ignore[misc]
        return f"{len(self.changed)} of {len(self.rows)} changed; {before:.2f} MB before, {after:.2f} MB after"

    def __str__(self) -> str:
        rows = self._table()
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([*lines, self._closing()])

    def _repr_html_(self) -> str:
        rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in self._table()]
        return f"<table>{''.join(f'<tr>{row}</tr>' for row in rows)}</table><p>{html.escape(self._closing())}</p>"

    __repr__ = __str__


def compare(before: Receipt, after: Receipt) -> Comparison:
    """What changed between two receipts of one program, as under two policies.

    Args:
        before, after: receipts of ``explain`` (which has SQNR and bytes), or of contexts.

    Returns:
        A Comparison: print it, or look at ``changed`` and ``rows``.

    Raises:
        TypeError: what is given is no Receipt.

    Examples:
        >>> from torch import nn, ones
        >>> from teint8 import Policy, explain, quantize
        >>> model = nn.Linear(64, 32)
        >>> params = dict(model.named_parameters())
        >>> first, second = (explain(quantize(model, p), params, ones(8, 64)) for p in (Policy(), Policy.qat()))
        >>> compare(first, second).changed
        ('weight',)

    """
    for name, receipt in (("before", before), ("after", after)):
        if not isinstance(receipt, Receipt):
            raise TypeError(f"compare: {name} is {type(receipt).__name__}; a Receipt is needed, such as teint8.explain returns")
    first, second = _by_call(before), _by_call(after)
    rows = []
    for key in dict.fromkeys((*first, *second)):
        old, new = first.get(key, []), second.get(key, [])
        rows.append((*key, _ran(old), _ran(new), _worst(old), _worst(new), _bytes(old), _bytes(new)))
    return Comparison(tuple(rows))


def _by_call(receipt: Receipt) -> dict[tuple[str, str], list[Record]]:
    found: dict[tuple[str, str], list[Record]] = {}
    for record in receipt:
        # a call without a weight is known by its line, which differs between two programs that are alike: its file does
        path = record.path.rpartition(":")[0] if record.op in ("attention", "activation_matmul") and ":" in record.path else record.path
        found.setdefault((path, record.op), []).append(record)
    return found


def _ran(records: list[Record]) -> str:
    return ", ".join(dict.fromkeys(" ".join(filter(None, (r.implementation, r.mode))) for r in records))


def _worst(records: list[Record]) -> float | None:
    return min((r.sqnr for r in records if r.sqnr is not None), default=None)


def _bytes(records: list[Record]) -> int:
    return sum(r.nbytes * r.calls for r in records)
