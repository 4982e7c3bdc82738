"""README and docs: every block of code runs, every figure is the one that a benchmark wrote."""

import importlib.util
import pathlib
import re
import shlex
import sys
import textwrap

import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted(p for p in (ROOT / "docs").rglob("*.md") if "notebooks" not in p.parts)]
_BLOCK = re.compile(r"(?:<!-- needs: (\w+) -->\n *)?^( *)```(\w*)\n(.*?)^\2```", re.DOTALL | re.MULTILINE)


def blocks(page: pathlib.Path) -> list[tuple[str, str, str]]:
    """(package that it needs or "", language, code) of each block."""
    return [(needs, language, textwrap.dedent(code)) for needs, _, language, code in _BLOCK.findall(page.read_text())]


def _name(page: pathlib.Path) -> str:
    return str(page.relative_to(ROOT))


WITH_PYTHON = [p for p in PAGES if any(language == "python" for _, language, _ in blocks(p))]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=_name)
def test_every_block_runs(page: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One page is one program. Blocks of other libraries run where those are installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__"}
    skipped = set()
    for i, (needs, language, code) in enumerate(blocks(page)):
        if language != "python":
            continue
        if needs and importlib.util.find_spec(needs) is None:
            skipped.add(needs)
            continue
        exec(compile(code, f"{_name(page)}, block {i}", "exec"), names)
    if skipped and not names.keys() - {"__name__"}:
        pytest.skip(f"not installed: {', '.join(skipped)}")


COMMANDS = {
    "make demo": "CI's README trial; tests/test_doctor.py runs the demo itself",
    "make test": "CI",
    "make docs": "CI",
    "make bench": "benchmarks are run by hand, for publication",
    "pip install -e .": "make test",
    "pip install -e '.[notebooks]'": "make test",
    ".venv/bin/python -m pip install -e '.[bench]'": "pyproject.toml has it, as the test below holds",
    "python -m teint8 doctor": "tests/test_doctor.py",
}
"""Commands of a shell, and where each is run."""


def test_every_command_is_run_somewhere() -> None:
    for page in PAGES:
        for _, language, code in blocks(page):
            assert language in ("python", "bash", "text"), f"{_name(page)}: a block of {language or 'no language'}"
            for line in code.splitlines() if language == "bash" else ():
                command = shlex.split(line, comments=True)
                if not command or line.partition("#")[0].strip() in COMMANDS:
                    continue
                script = next((part for part in command if part.endswith(".py")), None)
                if script is not None:
                    assert (ROOT / script).exists(), f"{_name(page)}: {line}"
                else:  # a command of teint8 with its arguments
                    assert command[1:3] == ["-m", "teint8"], f"{_name(page)}: who runs {line!r}?"
                    assert command[3] in (ROOT / "teint8/__main__.py").read_text()


def test_every_table_and_figure_is_the_one_that_a_benchmark_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from tables import PAGES as WRITTEN
    from tables import rendered

    assert set(WRITTEN) == set(PAGES)
    for page in PAGES:
        assert rendered(page.read_text()) == page.read_text(), f"{_name(page)}: python benchmarks/tables.py"


_FIGURE = re.compile(r"\b\d+\.\d+ ?(?:x\b|%|us\b|ms\b|times\b)|\b0\.\d{2,}\b|\b\d+%")
EXPLAINED = {
    "docs/concepts/design.md": "what was tried, and what it did",
    "docs/concepts/numerics.md": "bounds, each with the test that holds it",
    "docs/concepts/transforms.md": "written by tests/grid_table.py",
}
"""Pages with figures of their own, and where those come from."""
STATED = {"0.18.0", "0.50.2"}  # versions


def loose_figures(text: str) -> list[str]:
    """Figures in prose that no script puts there."""
    text = re.sub(r"<!-- (\w+) -->\n.*?<!-- end of \1 -->|```.*?```|<!-- f:\w+ -->.*?<!-- / -->|`[^`\n]*`", "", text, flags=re.DOTALL)
    return [found[0] for found in _FIGURE.finditer(text) if not any(v.startswith(found[0]) for v in STATED)]


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_no_figure_was_typed_in(page: pathlib.Path) -> None:
    if _name(page) not in EXPLAINED:
        assert loose_figures(page.read_text()) == []


def test_no_line_begins_with_a_figure() -> None:
    """Markdown would begin a block of HTML there."""
    assert [_name(page) for page in PAGES if re.search(r"^ *<!-- f:", page.read_text(), re.MULTILINE)] == []


def test_the_check_sees_a_figure_that_was_typed_in() -> None:
    assert loose_figures("takes 1.80x the speed, <!-- f:a -->2.00x<!-- / -->, 13% and 0.98") == ["1.80x", "13%", "0.98"]
