"""teint8: INT8 training and inference for PyTorch as a function transform."""

from teint8 import numerics, ops
from teint8._version import __version__
from teint8.autocast import te_int8_autocast
from teint8.policy import Policy, Quant, Rule
from teint8.qtensor import QTensor
from teint8.transforms import (
    Comparison,
    PackedFile,
    Receipt,
    Record,
    compare,
    correct_bias,
    explain,
    fold_batchnorm,
    load_packed,
    pack,
    quantize,
    save_packed,
    unpack,
)

__all__ = [
    "Comparison",
    "PackedFile",
    "Policy",
    "QTensor",
    "Quant",
    "Receipt",
    "Record",
    "Rule",
    "__version__",
    "compare",
    "correct_bias",
    "explain",
    "fold_batchnorm",
    "load_packed",
    "numerics",
    "ops",
    "pack",
    "quantize",
    "save_packed",
    "te_int8_autocast",
    "unpack",
]
