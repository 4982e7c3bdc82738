"""Every public name tells its arguments, result, errors and an example."""

import inspect
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import pytest

import teint8

PUBLIC = {"teint8": teint8, "teint8.ops": teint8.ops, "teint8.numerics": teint8.numerics}


def _public() -> Iterator[tuple[str, Any]]:
    for prefix, module in PUBLIC.items():
        for name in module.__all__:
            value = getattr(module, name)
            if callable(value):
                yield f"{prefix}.{name}", value


def lacks(value: Any) -> list[str]:
    """What the docstring of a function or class does not tell."""
    text = inspect.getdoc(value) or ""
    missing = [] if text else ["a docstring"]
    if inspect.isclass(value):
        parameters = [f for f in getattr(value, "__annotations__", {}) if not f.startswith("_")] or list(
            inspect.signature(value).parameters
        )
        makers = [vars(value).get("__init__"), vars(value).get("__post_init__")]
        # a dataclass has an __init__ without a source
        makers = [m for m in makers if inspect.isfunction(m) and m.__code__.co_filename == inspect.getsourcefile(value)]
        parameters = [p for p in parameters if p != "checked"]  # of pytrees, for torch alone
    else:
        parameters, makers = list(inspect.signature(value).parameters), [value]
        missing += [] if "Returns:" in text else ["Returns"]
    named = {name for line in re.findall(r"^ +((?:\w+, )*\w+): ", text, re.MULTILINE) for name in line.split(", ")}
    missing += [f"the argument {p}" for p in parameters if p not in named]
    raises = any("raise " in inspect.getsource(inspect.unwrap(maker)) for maker in makers)
    missing += ["Raises"] if raises and "Raises:" not in text else []
    return missing + ([] if re.search(r"Examples:\n +>>>", text) else ["Examples"])


def _methods() -> Iterator[tuple[str, Any]]:
    """What the pages of public classes show: all methods, or what docs/site.py lists for them."""
    listed = dict(re.findall(r'"(\w+)": "\[(.*)\]"', (pathlib.Path(__file__).parent.parent / "docs/site.py").read_text()))
    for prefix, value in _public():
        shown = listed.get(prefix.removeprefix("teint8."))
        for name, member in vars(value).items() if inspect.isclass(value) else ():
            function = getattr(member, "__func__", member)
            if inspect.isfunction(function) and (name in shown.split(", ") if shown else not name.startswith("_")):
                yield f"{prefix}.{name}", function


@pytest.mark.parametrize(("name", "value"), list(_methods()), ids=lambda item: item if isinstance(item, str) else "")
def test_a_method_tells_its_arguments(name: str, value: Any) -> None:
    text = inspect.getdoc(value) or ""
    named = {word for line in re.findall(r"^ +((?:\w+, )*\w+): ", text, re.MULTILINE) for word in line.split(", ")}
    assert text and [p for p in inspect.signature(value).parameters if p not in named | {"self", "cls"}] == []


@pytest.mark.parametrize(("name", "value"), list(_public()), ids=lambda item: item if isinstance(item, str) else "")
def test_a_public_name_is_documented(name: str, value: Any) -> None:
    assert not lacks(value), f"the docstring of {name} lacks {', '.join(lacks(value))}"


def test_the_check_sees_what_is_missing() -> None:
    def bare(x: int) -> int:
        """One line."""
        if x:
            raise ValueError
        return x

    assert lacks(bare) == ["Returns", "the argument x", "Raises", "Examples"]
