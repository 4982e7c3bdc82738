"""An activation function, or the gradients of one, in one read: its values, its row codes, or both; and its value as codes hold it."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from teint8._torch import dispatched
from teint8.kernels.activation import INTERPRETING, rounded
from teint8.kernels.launch import Launch, alignment, on
from teint8.kernels.quantize import code_bits, mixed_seed, noise_key, noise_of, scale_and_multiplier, shrunk
from teint8.kernels.quantize_both import alike, dense
from teint8.kernels.quantize_both_kernels import _bits, _larger, _source, _top
from teint8.kernels.tiles import power_of_two

# elements of a block and warps of a program. Values alone go by blocks that leave few lanes idle; codes want the whole row in
# registers, those of two gradients in twice as many threads (of 14336 features: 0.95 ms of an H100, with 16 warps 1.04 ms, in four
# blocks that are held 1.18 ms, in blocks of 4096 that are read twice 1.26 ms); a longer row is read twice
FOR_VALUES, FOR_CODES, FOR_TWO = (4096, 4), (16384, 16), (16384, 32)


@triton.jit
def _write_values(x, n, inside, value_ptr, DTYPE: tl.constexpr, VALUES: tl.constexpr):
    """Rounded to DTYPE; written, if they are wanted."""
    x = rounded(x, DTYPE)
    if VALUES:
        tl.store(value_ptr + n, x.to(value_ptr.dtype.element_ty), mask=inside)
    return x


@triton.jit
def _write_codes(x, top, n, inside, codes_ptr, row, seed, DTYPE: tl.constexpr, STOCHASTIC: tl.constexpr):
    multiplier = shrunk(scale_and_multiplier(_bits(top, DTYPE))[1], STOCHASTIC)
    noise = noise_of(noise_key(mixed_seed(seed), row), noise_key(mixed_seed(seed ^ 1), n)) if STOCHASTIC else x
    q = code_bits(x, multiplier, noise, STOCHASTIC)
    tl.store(codes_ptr + n, tl.where(multiplier != 0, q, 0).to(tl.int8), mask=inside)


@triton.jit
def _write_hat(value, given, n, inside, hat_ptr, DTYPE: tl.constexpr):
    """The value of the codes that a row of this scale has. Rounded to DTYPE, which is a half, scale * 127 is absmax again."""
    top = rounded(given * 127.0, DTYPE)
    multiplier = scale_and_multiplier(_bits(top, DTYPE))[1]
    value = rounded(value, DTYPE)
    q = tl.where(multiplier != 0, code_bits(value, multiplier, value, False), 0).to(tl.int8)
    tl.store(hat_ptr + n, rounded(q.to(tl.float32) * given, DTYPE).to(hat_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _block(
    g_ptr, u_ptr, d_ptr, value0_ptr, value1_ptr, hat_ptr, given, n, N,
    KIND: tl.constexpr, GATED: tl.constexpr, BACKWARD: tl.constexpr, OUTPUTS: tl.constexpr, VALUES: tl.constexpr, HAT: tl.constexpr,
):  # fmt: skip
    """What is made of one block, rounded, values written; the second is of use for OUTPUTS of 2."""
    dtype = g_ptr.dtype.element_ty
    first, second, value = _source(g_ptr, u_ptr, d_ptr, n, n, n < N, KIND, GATED, BACKWARD, False)
    if HAT:
        _write_hat(value, given, n, n < N, hat_ptr, dtype)
    first = _write_values(first, n, n < N, value0_ptr, dtype, VALUES)
    if OUTPUTS == 2:
        second = _write_values(second, n, n < N, value1_ptr, dtype, VALUES)
    return first, second


@triton.jit
def _activation_rows_kernel(
    g_ptr, u_ptr, d_ptr, codes0_ptr, scale0_ptr, value0_ptr, codes1_ptr, scale1_ptr, value1_ptr, seed_ptr, given_ptr, hat_ptr, M, N,
    stride_gb, stride_gm, stride_db, stride_dm, stride_vm,
    KIND: tl.constexpr, GATED: tl.constexpr, BACKWARD: tl.constexpr, OUTPUTS: tl.constexpr, CODES: tl.constexpr, VALUES: tl.constexpr,
    STOCHASTIC: tl.constexpr, HAT: tl.constexpr, BLOCK: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    batch = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BLOCK)
    g_ptr += batch * stride_gb + row.to(tl.int64) * stride_gm
    u_ptr += batch * stride_gb + row.to(tl.int64) * stride_gm
    d_ptr += batch * stride_db + row.to(tl.int64) * stride_dm
    out = (batch * M + row) * N
    hat_ptr += out
    codes0_ptr += out
    codes1_ptr += out
    value0_ptr += (batch * M + row) * stride_vm
    value1_ptr += (batch * M + row) * stride_vm
    top0 = tl.zeros((1,), tl.float32)
    top1 = tl.zeros((1,), tl.float32)
    dtype = g_ptr.dtype.element_ty
    seed = tl.load(seed_ptr + batch) if STOCHASTIC else 0
    given = tl.load(given_ptr + batch * M + row + tl.arange(0, 1)) if HAT else top0
    if ONE_BLOCK:
        first, second = _block(
            g_ptr, u_ptr, d_ptr, value0_ptr, value1_ptr, hat_ptr, given, n, N, KIND, GATED, BACKWARD, OUTPUTS, VALUES, HAT
        )
        if CODES:
            top0 = _larger(top0, _top(first, 0))
            top1 = _larger(top1, _top(second, 0))
            _write_codes(first, top0, n, n < N, codes0_ptr, row, seed, dtype, STOCHASTIC)
            if OUTPUTS == 2:
                _write_codes(second, top1, n, n < N, codes1_ptr, row, seed + 2, dtype, STOCHASTIC)
    else:
        if CODES:
            for k in range(0, N, BLOCK):
                first, second, _ = _source(g_ptr, u_ptr, d_ptr, k + n, k + n, k + n < N, KIND, GATED, BACKWARD, False)
                top0 = _larger(top0, _top(first, 0))
                top1 = _larger(top1, _top(second, 0))
        for k in range(0, N, BLOCK):
            at = (tl.cdiv(N, BLOCK) - 1) * BLOCK - k + n  # backwards: what was read last is still in the cache
            first, second = _block(
                g_ptr, u_ptr, d_ptr, value0_ptr, value1_ptr, hat_ptr, given, at, N, KIND, GATED, BACKWARD, OUTPUTS, VALUES, HAT
            )
            if CODES:
                _write_codes(first, top0, at, at < N, codes0_ptr, row, seed, dtype, STOCHASTIC)
                if OUTPUTS == 2:
                    _write_codes(second, top1, at, at < N, codes1_ptr, row, seed + 2, dtype, STOCHASTIC)
    if CODES:
        one = tl.arange(0, 1)
        tl.store(scale0_ptr + batch * M + row + one, scale_and_multiplier(_bits(top0, dtype))[0])
        if OUTPUTS == 2:
            tl.store(scale1_ptr + batch * M + row + one, scale_and_multiplier(_bits(top1, dtype))[0])


class Rows(NamedTuple):
    """What is made of one tensor: int8 codes (B, M, N) and scales (B, M), and its values (B, M, N); None where not asked for."""

    codes: Tensor | None
    scale: Tensor | None
    value: Tensor | None


_launch = Launch(_activation_rows_kernel)


def activation_rows(
    g: Tensor,
    u: Tensor | None,
    d: Tensor | None,
    *,
    kind: str,
    codes: bool,
    values: bool,
    seed: Tensor | None = None,
    scale: Tensor | None = None,
) -> tuple[Rows, ...]:
    """Rows of the value of an activation, or of its gradients; arguments as for ``quantize_both``.

    ``scale``, with d and without codes: that of the rows of the value (B, M), whose dtype ``tells_absmax``; last comes ``Rows`` of the
    value of its codes. (Beside the codes of two gradients there are no registers for it: that took longer than to read kept ones.)
    """
    shape, device, dtype = g.shape, g.device, g.dtype
    m, n = shape[-2:]
    batch = shape[:-2].numel()
    g = dense(g)
    gated, backward = u is not None, d is not None
    u, d = alike(u, g), g if d is None else dense(d)
    outputs = 2 if gated and backward else 1
    # the interpreter's cast to bfloat16 does not round: it stores float32, whose values are rounded already
    inner = torch.float32 if INTERPRETING else g.dtype
    # the values of two results lie side by side in a row: a matmul may take them as one; results of an op must not share memory
    apart = outputs == 1 or dispatched.active
    both = torch.empty((*shape[:-1], n if apart else 2 * n), dtype=inner, device=device) if values else g
    made = [
        (
            torch.empty(shape, dtype=torch.int8, device=device) if codes else g,
            torch.empty(shape[:-1], dtype=torch.float32, device=device) if codes else g,
            both[..., i * n : (i + 1) * n] if values and not apart else torch.empty_like(both) if values and i else both,
        )
        for i in range(outputs)
    ]
    strides = (g.stride(0), g.stride(-2), d.stride(0), d.stride(-2), both.stride(-2))
    seeds, given = (g if t is None else t.contiguous() for t in (seed, scale))
    hat = g if scale is None else torch.empty(shape, dtype=inner, device=device)
    key = (device.index, g.dtype, shape, strides, kind, gated, backward, codes, values, seed is None, scale is None,
           alignment(g, u, d, made[-1][2], seeds, given))  # fmt: skip
    args = (g, u, d, *made[0], *made[-1], seeds, given, hat, m, n, *strides)
    with on(device):
        if _launch.known(key):
            _launch.again(key, (m, batch, 1), args)
        else:
            block, warps = FOR_VALUES if not codes else FOR_TWO if outputs == 2 else FOR_CODES
            block = min(power_of_two(n), block)
            constants = (kind, gated, backward, outputs, codes, values, seed is not None, scale is not None, block, n <= block)
            warps = min(max(block // 512, 1), warps)
            _launch.first(key, (m, batch, 1), args, constants, num_warps=warps, enable_fp_fusion=False)
    rows = [Rows(q if codes else None, s if codes else None, v.to(dtype) if values else None) for q, s, v in made]
    return (*rows, *(() if scale is None else (Rows(None, None, hat.to(dtype)),)))
