"""What MkDocs asks while it builds the site: a page for every public name, made of its docstring, and the nav that lists them."""

import inspect
import re
from typing import Any

from mkdocs.structure.files import File, Files

import teint8

GROUPS = {
    "Transforms": ("quantize", "pack", "unpack", "explain", "compare", "te_int8_autocast"),
    "Data": ("Policy", "Rule", "Quant", "QTensor", "Conditioned", "Receipt", "Record", "Comparison", "Statistics", "Learned",
             "PackedFile"),
    "Calibration": ("calibrate", "merge", "scales", "with_scales", "delayed", "learned_scales", "lsq", "pack_learned"),
    "Outliers and rounding": ("smooth", "rotate", "keep_outliers", "awq", "second_moments", "gptq", "adaround", "correct_bias",
                              "fold_batchnorm"),
    "Which layers": ("sensitivity", "search"),
    "Files": ("save_packed", "load_packed", "save_compressed_tensors", "load_compressed_tensors", "from_torchao"),
}  # fmt: skip
"""The names of ``teint8``; those of teint8.ops and teint8.numerics have groups of their own."""


MEMBERS = {
    "te_int8_autocast": "[__call__, cache_info, cache_clear]",
    "Conditioned": "[dequantize, unpacked, shape, dtype, device, nbytes]",
    "Receipt": "[records, calls, int8_calls, to_json, plot]",
}
"""What a class shows of itself, where not all of its methods are for users."""


def names() -> dict[str, list[tuple[str, Any]]]:
    """Group by group, (public name, object); every name of the package is in one of them.

    Raises:
        ValueError: a public name that no group has.

    """
    listed = {name for group in GROUPS.values() for name in group}
    missing = {n for n in teint8.__all__ if callable(getattr(teint8, n))} ^ listed
    if missing:
        raise ValueError(f"docs/site.py: {sorted(missing)} must be public and in one of GROUPS")
    groups = {title: [(f"teint8.{n}", getattr(teint8, n)) for n in group] for title, group in GROUPS.items()}
    for title, module in (("teint8.ops", teint8.ops), ("teint8.numerics", teint8.numerics)):
        groups[title] = [(f"{title}.{n}", getattr(module, n)) for n in module.__all__ if callable(getattr(module, n))]
    return groups


def page_of(name: str) -> str:
    """Where a name's page is, within docs."""
    return f"reference/{name}.md"


def _first_line(value: Any) -> str:
    return (inspect.getdoc(value) or "").partition("\n")[0].replace("|", "\\|")


def _index() -> str:
    lines = ["# Reference", "", "Every public name, from its docstring; the examples run in the tests.", ""]
    for title, members in names().items():
        lines += [f"## {title}", "", "| name | |", "|---|---|"]
        lines += [f"| [`{name}`]({name}.md) | {_first_line(value)} |" for name, value in members] + [""]
    return "\n".join(lines)


def _page(name: str, value: Any) -> str:
    page = f"::: {value.__module__}.{value.__qualname__}\n    options:\n      heading: {name}\n"
    members = MEMBERS.get(name.removeprefix("teint8."))
    return page if members is None else f"{page}      members: {members}\n"


def on_config(config: Any) -> Any:
    """List the pages of the reference."""
    groups = [{title: [{name: page_of(name)} for name, _ in members]} for title, members in names().items()]
    config.nav.append({"Reference": ["reference/index.md", *groups, {"The backend": "reference/backend.md"}]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Make the pages of the reference."""
    made = {"reference/index.md": _index()}
    made |= {page_of(name): _page(name, value) for members in names().values() for name, value in members}
    for path, text in made.items():
        files.append(File.generated(config, path, content=text))
    return files


_LINK = re.compile(r'href="([\w./-]+)\.(?:ipynb|md)"')


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Links of a notebook are written for the repository; on the site they lead to pages."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return _LINK.sub(lambda found: f'href="{found[1].replace("../docs/", "../").replace("README", "index")}.html"', html)
