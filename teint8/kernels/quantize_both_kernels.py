"""The kernels of ``quantize_both.py``: absmax of rows and columns in one read, then both codes in another.

Four rows at a time are packed into int32, so that the transpose moves words and stores 16 bytes.
"""

import triton
import triton.language as tl

from teint8.kernels.activation import pack4, rounded, value_and_slope
from teint8.kernels.quantize import code_bits, mixed_seed, noise_key, noise_of, scale_and_multiplier, shrunk


@triton.jit
def _load(ptr, at, mask, EVEN: tl.constexpr):
    x = tl.load(ptr + at) if EVEN else tl.load(ptr + at, mask=mask, other=0.0)
    return x.to(tl.float32)


@triton.jit
def _source(
    g_ptr, u_ptr, d_ptr, at, at_d, mask, KIND: tl.constexpr, GATED: tl.constexpr, BACKWARD: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """What is quantized, in float32 before it is rounded to its dtype: one tensor, or two for the gradients of a gate.

    Third comes the activation's value where its gradients are first and second; what is not used costs nothing.
    """
    g = _load(g_ptr, at, mask, EVEN)
    first = g
    second = g
    value = g
    if KIND != "":
        z, slope = value_and_slope(g, KIND)
        if GATED:
            u = _load(u_ptr, at, mask, EVEN)
        if BACKWARD:
            d = _load(d_ptr, at_d, mask, EVEN)
            first = (d * u) * slope if GATED else d * slope
            second = d * z
        else:
            first = z * u if GATED else z
        value = z * u if GATED else z
    return first, second, value


@triton.jit
def _larger(a, b):
    """The larger of two, NaN if one is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _top(x, AXIS: tl.constexpr):
    """Largest |x| along an axis, NaN where a value is."""
    return tl.reduce(tl.abs(x), AXIS, _larger)


@triton.jit
def _bits(absmax, DTYPE: tl.constexpr):
    """int32 that order as absmax does, NaN above infinity; rounding to the dtype of the values commutes with the maximum."""
    return rounded(absmax, DTYPE).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _finish(tops_ptr, scale_ptr, first, index, inside, seed, COUNT, STOCHASTIC: tl.constexpr):
    """Of groups whose absmax is known: scales, multipliers COUNT behind them, keys of noise behind these, and zeros for absmax."""
    at = first + index
    top = tl.load(tops_ptr + at, mask=inside, other=0, cache_modifier=".cg")
    tl.debug_barrier()  # several threads may hold an element: each has read it before one writes the zero
    scale, multiplier = scale_and_multiplier(top)
    tl.store(scale_ptr + at, scale, mask=inside)
    tl.store(scale_ptr + COUNT + at, shrunk(multiplier, STOCHASTIC), mask=inside)
    if STOCHASTIC:
        tl.store(scale_ptr + 2 * COUNT + at, noise_key(mixed_seed(seed), index).to(tl.float32, bitcast=True), mask=inside)
    tl.store(tops_ptr + at, tl.zeros_like(index), mask=inside)


@triton.jit
def _absmax_kernel(
    g_ptr, u_ptr, d_ptr, tops_ptr, scale_ptr, seed_ptr, M, N, COUNT, stride_gb, stride_gm, stride_db, stride_dm,
    KIND: tl.constexpr, GATED: tl.constexpr, BACKWARD: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, OUTPUTS: tl.constexpr,
    VALUE: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Absmax of rows (B, OUTPUTS, M), then of columns (B, OUTPUTS + VALUE, N), and of these the scales; COUNT groups in all.

    ``tops_ptr`` points at zeros, and at zeros again afterwards: absmax of the groups, then how many programs are done with each span
    of rows and with each block of columns. The last one makes their scales.
    """
    batch = tl.program_id(2).to(tl.int64)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = columns < N
    g_ptr += batch * stride_gb
    u_ptr += batch * stride_gb
    d_ptr += batch * stride_db
    first_row = batch * OUTPUTS * M
    first_column = tl.num_programs(2) * OUTPUTS * M + batch * (OUTPUTS + VALUE) * N
    rows_ptr = tops_ptr + first_row
    columns_ptr = tops_ptr + first_column
    top0 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    top1 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    top2 = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    dtype = g_ptr.dtype.element_ty
    for i in tl.range(0, SPAN, BLOCK_M, num_stages=STAGES):
        rows = tl.program_id(1) * SPAN + i + tl.arange(0, BLOCK_M)
        in_m = rows < M
        r = rows.to(tl.int64) if WIDE else rows
        mask = in_m[:, None] & in_n[None, :]
        at = r[:, None] * stride_gm + columns[None, :]
        at_d = r[:, None] * stride_dm + columns[None, :]
        first, second, value = _source(g_ptr, u_ptr, d_ptr, at, at_d, mask, KIND, GATED, BACKWARD, EVEN)
        top0 = _larger(top0, tl.abs(first))
        tl.atomic_max(rows_ptr + rows, _bits(_top(first, 1), dtype), mask=in_m, sem="relaxed")
        if OUTPUTS == 2:
            top1 = _larger(top1, tl.abs(second))
            tl.atomic_max(rows_ptr + M + rows, _bits(_top(second, 1), dtype), mask=in_m, sem="relaxed")
        if VALUE:  # by column alone
            top2 = _larger(top2, tl.abs(value))
    tl.atomic_max(columns_ptr + columns, _bits(_top(top0, 0), dtype), mask=in_n, sem="relaxed")
    if OUTPUTS == 2:
        tl.atomic_max(columns_ptr + N + columns, _bits(_top(top1, 0), dtype), mask=in_n, sem="relaxed")
    if VALUE:
        tl.atomic_max(columns_ptr + OUTPUTS * N + columns, _bits(_top(top2, 0), dtype), mask=in_n, sem="relaxed")
    tl.debug_barrier()  # what all threads wrote is released by the one that counts
    seed = tl.load(seed_ptr + batch) if STOCHASTIC else 0
    spans_ptr = tops_ptr + COUNT + batch * tl.num_programs(1) + tl.program_id(1)
    if tl.atomic_add(spans_ptr, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        rows = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
        for side in tl.static_range(OUTPUTS):
            _finish(tops_ptr, scale_ptr, first_row + side * M, rows, rows < M, seed + 2 * side, COUNT, STOCHASTIC)
        tl.store(spans_ptr, 0)
    blocks_ptr = tops_ptr + COUNT + tl.num_programs(2) * tl.num_programs(1) + batch * tl.num_programs(0) + tl.program_id(0)
    if tl.atomic_add(blocks_ptr, 1, sem="acq_rel") == tl.num_programs(1) - 1:
        for side in tl.static_range(OUTPUTS + VALUE):
            at = first_column + side * N
            _finish(tops_ptr, scale_ptr, at, columns, in_n, (seed + 2 * side) ^ 1, COUNT, STOCHASTIC and side < OUTPUTS)
        tl.store(blocks_ptr, 0)


@triton.jit
def _store_both(
    x0, x1, x2, x3, m4, n, in_n, M, codes_ptr, tcodes_ptr, rows_ptr, columns_ptr, COUNT, stride_cm, stride_tn,
    EVEN: tl.constexpr, WIDE: tl.constexpr, STOCHASTIC: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Row codes (with ROWS) of four interleaved sets of rows, and their transposed column codes packed into words.

    ``rows_ptr`` and ``columns_ptr`` are multipliers, and the keys of their noise lie COUNT behind them.
    """
    c = tl.load(columns_ptr + n, mask=in_n, other=0.0)[None, :]
    column_key = tl.load(columns_ptr + COUNT + n, mask=in_n, other=0.0).to(tl.uint32, bitcast=True)[None, :] if STOCHASTIC else c
    b0 = x0.to(tl.int32, bitcast=True)
    b1 = b0
    b2 = b0
    b3 = b0
    for j in tl.static_range(4):
        x = x0 if j == 0 else x1 if j == 1 else x2 if j == 2 else x3
        m = m4 * 4 + j
        in_m = m < M
        if STOCHASTIC:  # one noise for both orientations
            row_key = tl.load(rows_ptr + COUNT + m, mask=in_m, other=0.0).to(tl.uint32, bitcast=True)[:, None]
            noise = noise_of(row_key, column_key)
        else:
            noise = x
        b = code_bits(x, c, noise, STOCHASTIC)
        if ROWS:
            r = tl.load(rows_ptr + m, mask=in_m, other=0.0)[:, None]
            q = tl.where(r != 0, code_bits(x, r, noise, STOCHASTIC), 0).to(tl.int8)
            at = (m.to(tl.int64) if WIDE else m)[:, None] * stride_cm + n[None, :]
            if EVEN:
                tl.store(codes_ptr + at, q)
            else:
                tl.store(codes_ptr + at, q, mask=in_m[:, None] & in_n[None, :])
        if j == 0:
            b0 = b
        elif j == 1:
            b1 = b
        elif j == 2:
            b2 = b
        else:
            b3 = b
    words = tl.where(c != 0, pack4(b0, b1, b2, b3), 0)
    nn = n.to(tl.int64) if WIDE else n
    at = nn[:, None] * (stride_tn // 4) + m4[None, :]
    words_ptr = tcodes_ptr.to(tl.pointer_type(tl.int32))
    if EVEN:
        tl.store(words_ptr + at, tl.trans(words))
    else:  # the padding of a row is written too
        tl.store(words_ptr + at, tl.trans(words), mask=in_n[:, None] & (m4 * 4 < M)[None, :])


@triton.jit
def _both_kernel(
    g_ptr, u_ptr, d_ptr, scale_ptr, codes0_ptr, tcodes0_ptr, codes1_ptr, tcodes1_ptr, tcodes2_ptr, M, N, COUNT,
    stride_gb, stride_gm, stride_db, stride_dm, stride_cb, stride_cm, stride_tb, stride_tn,
    KIND: tl.constexpr, GATED: tl.constexpr, BACKWARD: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, OUTPUTS: tl.constexpr,
    VALUE: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(2).to(tl.int64)
    # begins with what the absmax pass read last: it is still in the L2 cache
    pn = tl.num_programs(0) - 1 - tl.program_id(0)
    pm = tl.num_programs(1) - 1 - tl.program_id(1)
    n = pn * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = n < N
    m4 = pm * (BLOCK_M // 4) + tl.arange(
        0, BLOCK_M // 4
    )  # whole words of four rows: the stores of the transpose are contiguous in them
    g_ptr += batch * stride_gb
    u_ptr += batch * stride_gb
    d_ptr += batch * stride_db
    rows_ptr = scale_ptr + COUNT + batch * OUTPUTS * M  # multipliers, as _finish left them
    columns_ptr = scale_ptr + COUNT + tl.num_programs(2) * OUTPUTS * M + batch * (OUTPUTS + VALUE) * N
    codes0_ptr += batch * stride_cb
    tcodes0_ptr += batch * stride_tb
    first0, second0, value0 = _rows_of(
        g_ptr, u_ptr, d_ptr, m4 * 4 + 0, n, M, in_n, stride_gm, stride_dm, KIND, GATED, BACKWARD, EVEN, WIDE
    )
    first1, second1, value1 = _rows_of(
        g_ptr, u_ptr, d_ptr, m4 * 4 + 1, n, M, in_n, stride_gm, stride_dm, KIND, GATED, BACKWARD, EVEN, WIDE
    )
    first2, second2, value2 = _rows_of(
        g_ptr, u_ptr, d_ptr, m4 * 4 + 2, n, M, in_n, stride_gm, stride_dm, KIND, GATED, BACKWARD, EVEN, WIDE
    )
    first3, second3, value3 = _rows_of(
        g_ptr, u_ptr, d_ptr, m4 * 4 + 3, n, M, in_n, stride_gm, stride_dm, KIND, GATED, BACKWARD, EVEN, WIDE
    )
    _store_both(
        first0, first1, first2, first3, m4, n, in_n, M, codes0_ptr, tcodes0_ptr, rows_ptr, columns_ptr, COUNT,
        stride_cm, stride_tn, EVEN, WIDE, STOCHASTIC, True,
    )  # fmt: skip
    if OUTPUTS == 2:
        _store_both(
            second0, second1, second2, second3, m4, n, in_n, M, codes1_ptr + batch * stride_cb, tcodes1_ptr + batch * stride_tb,
            rows_ptr + M, columns_ptr + N, COUNT, stride_cm, stride_tn, EVEN, WIDE, STOCHASTIC, True,
        )  # fmt: skip
    if VALUE:  # to nearest: it is an activation of the forward
        _store_both(
            value0, value1, value2, value3, m4, n, in_n, M, codes0_ptr, tcodes2_ptr + batch * stride_tb, rows_ptr,
            columns_ptr + OUTPUTS * N, COUNT, stride_cm, stride_tn, EVEN, WIDE, False, False,
        )  # fmt: skip


@triton.jit
def _rows_of(
    g_ptr, u_ptr, d_ptr, m, n, M, in_n, stride_gm, stride_dm,
    KIND: tl.constexpr, GATED: tl.constexpr, BACKWARD: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    r = m.to(tl.int64) if WIDE else m
    at = r[:, None] * stride_gm + n[None, :]
    at_d = r[:, None] * stride_dm + n[None, :]
    first, second, value = _source(g_ptr, u_ptr, d_ptr, at, at_d, (m < M)[:, None] & in_n[None, :], KIND, GATED, BACKWARD, EVEN)
    if KIND != "":
        first = rounded(first, g_ptr.dtype.element_ty)
        second = rounded(second, g_ptr.dtype.element_ty)
        value = rounded(value, g_ptr.dtype.element_ty)
    return first, second, value
