"""The notebooks run from clean kernels, and give outputs of the kinds that are committed."""

import itertools
import pathlib

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def _code(notebook: nbformat.NotebookNode) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_and_gives_the_same_kinds(path: pathlib.Path) -> None:
    """Cells assert what they claim; here each must give outputs of the kinds that are committed. Numbers depend on the machine."""
    notebook = nbformat.read(path, as_version=4)
    committed = [kinds(cell) for cell in _code(notebook)]
    NotebookClient(notebook, timeout=180, resources={"metadata": {"path": str(FOLDER)}}).execute()
    assert [kinds(cell) for cell in _code(notebook)] == committed


def kinds(cell: nbformat.NotebookNode) -> list[str]:
    """Of one cell's outputs, once for each run of the same kind: a slow machine's kernel sends one print in several pieces."""
    return [name for name, _ in itertools.groupby(kind(output) for output in cell.outputs)]


def kind(output: nbformat.NotebookNode) -> str:
    """Of one output: a stream's name, or its richest form."""
    if output.output_type == "stream":
        return str(output.name)
    return next((mime for mime in ("image/png", "text/html") if mime in output.get("data", ())), output.output_type)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_is_whole(path: pathlib.Path) -> None:
    """Executed from top to bottom, without errors or warnings; figures are there; no path of a machine."""
    notebook = nbformat.read(path, as_version=4)
    cells = _code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [kind(output) for cell in cells for output in cell.outputs]
    assert kinds.count("image/png") >= 2 and "error" not in kinds and "stderr" not in kinds
    text = path.read_text()
    assert "/site-packages/" not in text and "/home/" not in text and "/root/" not in text


def test_all_of_them_are_listed() -> None:
    listed = (FOLDER / "README.md").read_text()
    assert NOTEBOOKS and all(f"]({path.name})" in listed for path in NOTEBOOKS)
