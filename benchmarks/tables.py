"""Write the tables of docs/performance.md from the JSON in benchmarks/results: python benchmarks/tables.py.

Between the two markers of that page everything comes from here; tests/test_readme.py holds it to the JSON.
"""

import json
import math
import pathlib
from typing import Any

from common import RESULTS

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "performance.md"
BEGIN, END = "<!-- tables: written by benchmarks/tables.py -->", "<!-- end of the tables -->"
# pages in this order; a file that another version of its script wrote shows the columns it has
NAMES = ("gemm", "quantize", "linear", "mlp", "decode", "train_step", "block", "memory", "overhead", "gpt", "cpu_minilm")


def cell(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float):
        return f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def table(name: str) -> str:
    """One benchmark: what it measures, where and when, and all of its rows. Lists (curves) are left to the plots."""
    found = json.loads((RESULTS / f"{name}.json").read_text())
    rows = [{k: v for k, v in row.items() if not isinstance(v, (list, dict))} for row in found["rows"]]
    columns = list(rows[0])
    versions = [f"{package} {found[package.lower()]}" for package in ("torch", "Triton") if found.get(package.lower())]
    place = ", ".join([found["device"], *versions, found["date"]])
    clocks = f"; clock, its limit, power, its limit right after: {found['clocks']}" if found.get("clocks") else ""
    lines = [f"### {name}", "", f"`benchmarks/{name}.py`; {place}{clocks}.", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cell(row.get(c)) for c in columns) + " |" for row in rows]
    return "\n".join(lines)


def render() -> str:
    """All tables that have results."""
    return "\n\n".join(table(name) for name in NAMES if (RESULTS / f"{name}.json").exists())


def main() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{render()}\n\n{END}{after}")


if __name__ == "__main__":
    main()
