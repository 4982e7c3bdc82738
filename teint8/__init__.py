"""teint8: INT8 training and inference for PyTorch as a function transform."""

from teint8 import numerics, ops
from teint8._version import __version__
from teint8.autocast import te_int8_autocast
from teint8.policy import Policy, Quant, Rule
from teint8.qtensor import QTensor
from teint8.transforms import Comparison, Receipt, Record, compare, correct_bias, explain, fold_batchnorm, pack, quantize, unpack

__all__ = [
    "Comparison",
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
    "numerics",
    "ops",
    "pack",
    "quantize",
    "te_int8_autocast",
    "unpack",
]
