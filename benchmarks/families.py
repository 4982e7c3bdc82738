"""Model families, run unmodified under te_int8_autocast: how many of their matmuls and convolutions run in INT8, and why others do not.

python benchmarks/families.py [--out FOLDER]      needs transformers; real models are left out where their packages are not installed
"""

import argparse
import pathlib
import sys
import warnings
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "tests"))

import families
import torch
from common import OUT, save

import teint8


def row(name: str, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """One family."""
    with torch.no_grad():
        exact = families.value(model.eval()(**inputs))
        with teint8.te_int8_autocast(training=False) as context:
            y = families.value(model(**inputs))
    records = list(context.receipt)
    wanted = [r for r in records if not r.reason.startswith(families.WANTED_NOT)]
    others = {r.reason.split(":")[0]: 0 for r in records if not r.int8}
    for r in records:
        if not r.int8:
            others[r.reason.split(":")[0]] += r.calls
    return {
        "model": name,
        "in INT8": sum(r.calls for r in records if r.int8),
        "wanted": sum(r.calls for r in wanted),
        "ops": ", ".join(sorted({r.op for r in wanted})),
        "not wanted": "; ".join(f"{count} {reason}" for reason, count in others.items()),
        "relative error": float((y - exact).norm() / exact.norm()),
    }


def main(folder: pathlib.Path) -> None:
    """Print and save the table."""
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    made = {name: make() for name, make in families.FAMILIES.items()}
    rows = [row(name, *family) for name, family in made.items() if family is not None]
    save("families", rows, folder)
    assert all(r["in INT8"] == r["wanted"] for r in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    main(parser.parse_args().out)
