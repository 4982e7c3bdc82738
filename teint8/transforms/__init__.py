"""Transforms: functions to functions (``quantize``), params to params (``pack``), and what they say of themselves (``explain``)."""

from teint8.transforms.comparison import Comparison, compare
from teint8.transforms.correct import correct_bias
from teint8.transforms.explain import explain
from teint8.transforms.files import PackedFile, load_packed, save_packed
from teint8.transforms.fold import fold_batchnorm
from teint8.transforms.pack import pack, unpack
from teint8.transforms.quantize import quantize
from teint8.transforms.receipt import Receipt, Record

__all__ = [
    "Comparison",
    "PackedFile",
    "Receipt",
    "Record",
    "compare",
    "correct_bias",
    "explain",
    "fold_batchnorm",
    "load_packed",
    "pack",
    "quantize",
    "save_packed",
    "unpack",
]
