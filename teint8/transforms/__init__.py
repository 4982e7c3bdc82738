"""Transforms: functions to functions (``quantize``), params to params (``pack``), and what they say of themselves (``explain``)."""

from teint8.transforms.calibrate import Statistics, calibrate, merge
from teint8.transforms.comparison import Comparison, compare
from teint8.transforms.correct import correct_bias
from teint8.transforms.delayed import delayed
from teint8.transforms.explain import explain
from teint8.transforms.files import PackedFile, load_packed, save_packed
from teint8.transforms.fold import fold_batchnorm
from teint8.transforms.interchange import from_torchao, load_compressed_tensors, save_compressed_tensors
from teint8.transforms.learned import Learned, learned_scales, lsq, pack_learned
from teint8.transforms.pack import pack, unpack
from teint8.transforms.quantize import quantize
from teint8.transforms.receipt import Receipt, Record
from teint8.transforms.rounding import adaround, awq, gptq, second_moments
from teint8.transforms.sensitivity import search, sensitivity
from teint8.transforms.smooth import keep_outliers, rotate, smooth
from teint8.transforms.static import scales, with_scales

__all__ = [
    "Comparison",
    "Learned",
    "PackedFile",
    "Receipt",
    "Record",
    "Statistics",
    "adaround",
    "awq",
    "calibrate",
    "compare",
    "correct_bias",
    "delayed",
    "explain",
    "fold_batchnorm",
    "from_torchao",
    "gptq",
    "keep_outliers",
    "learned_scales",
    "load_compressed_tensors",
    "load_packed",
    "lsq",
    "merge",
    "pack",
    "pack_learned",
    "quantize",
    "rotate",
    "save_compressed_tensors",
    "save_packed",
    "scales",
    "search",
    "second_moments",
    "sensitivity",
    "smooth",
    "unpack",
    "with_scales",
]
