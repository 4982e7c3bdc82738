"""INT8 ops on plain tensors, and the registry of their implementations."""

from teint8.ops import cpu, cpu_conv, cuda, plain
from teint8.ops.activate import activate
from teint8.ops.attention import attention
from teint8.ops.channel_norm import batch_norm, group_norm
from teint8.ops.conv import conv, conv_problem
from teint8.ops.embedding import embedding, embedding_bag
from teint8.ops.grouped import grouped_linear
from teint8.ops.linear import linear
from teint8.ops.mlp import gated_mlp, merged_linear, mlp
from teint8.ops.norm import norm, norm_linear
from teint8.ops.raw import checked_int8_mm as int8_mm
from teint8.ops.raw import quantize
from teint8.ops.raw_both import quantize_both
from teint8.ops.registry import Implementation, Problem, describe, implementations, register, select

plain.register_all()
cpu.register_all()
cpu_conv.register_all()
cuda.register_all()

__all__ = [
    "Implementation",
    "Problem",
    "activate",
    "attention",
    "batch_norm",
    "conv",
    "conv_problem",
    "describe",
    "embedding",
    "embedding_bag",
    "gated_mlp",
    "group_norm",
    "grouped_linear",
    "implementations",
    "int8_mm",
    "linear",
    "merged_linear",
    "mlp",
    "norm",
    "norm_linear",
    "quantize",
    "quantize_both",
    "register",
    "select",
]
