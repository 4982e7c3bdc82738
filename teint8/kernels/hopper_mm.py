"""INT8 matmul for Hopper in Gluon: persistent and warp-specialized, exact int32 sums, the contract's epilogue.

One warp brings tiles of both operands by TMA into a ring of shared memory; one to three warpgroups of 64 rows each multiply them
(wgmma) and have an epilogue of their own, so that one stores while another multiplies. Both operands are K-major. Written
after the measurements in README.md (Speed); ``hopper.py`` beside this launches it.
"""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

# Triton 3.6 has only the second name of each, 3.9 only the first
_tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
_tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@builtin
def _tma_add_of_3_6(tensor_desc, coord, src, _semantic=None):
    """``tma.async_atomic_add``, for which Triton 3.6 has no name but the builder's."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


_tma_add = getattr(tma, "async_atomic_add", None) or _tma_add_of_3_6


@gluon.jit
def _tile(t, tiles_m, tiles_n, GROUP: gl.constexpr):
    """Batch, row and column of tile t: in groups of GROUP rows of tiles, so that what they read is still in the L2 cache."""
    batch = t // (tiles_m * tiles_n)
    t = t - batch * tiles_m * tiles_n
    group = t // (GROUP * tiles_n)
    first = group * GROUP
    height = min(tiles_m - first, GROUP)
    inner = t - group * GROUP * tiles_n
    return batch, first + inner % height, inner // height


@gluon.jit
def _steps(t, tiles, K, BLOCK_K: gl.constexpr, SPLIT: gl.constexpr):
    """The steps along K of unit t, where each of SPLIT parts of K has all tiles: the first, how many, and which part."""
    steps = gl.cdiv(K, BLOCK_K)
    if SPLIT == 1:
        return 0, steps, 0
    each = gl.cdiv(steps, SPLIT)
    part = t // tiles
    return part * each, min(each, steps - part * each), part


@gluon.jit
def _advance(index, phase, STAGES: gl.constexpr):
    """The next slot of the ring, and the phase of its barrier."""
    index += 1
    phase = gl.to_tensor(phase) ^ (index == STAGES).to(gl.int32)
    return gl.to_tensor(index) * (index != STAGES).to(gl.int32), phase


@gluon.jit
def _producer(
    x_desc, w_desc, u_desc, x_bufs, w_bufs, empty, ready, M, N, K, BATCH,
    PROGRAMS: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, GROUP: gl.constexpr,
    STAGES: gl.constexpr, SPLIT: gl.constexpr, TWO: gl.constexpr,
):  # fmt: skip
    tiles_m = gl.cdiv(M, CONSUMERS * 64)
    tiles_n = gl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n * BATCH
    ROWS: gl.constexpr = x_desc.block_type.shape[0]
    # a consumer whose rows nobody loads would wait for ever
    gl.static_assert(CONSUMERS == 1 or not TWO)
    index = gl.to_tensor(0)
    phase = gl.to_tensor(1)
    for t in range(gl.program_id(0), tiles * SPLIT, PROGRAMS):
        first, steps, part = _steps(t, tiles, K, BLOCK_K, SPLIT)
        batch, tile_m, tile_n = _tile(t - part * tiles, tiles_m, tiles_n, GROUP)
        for i in range(steps):
            k = first + i
            mbarrier.wait(empty.index(index), phase)
            bar = ready.index(index)
            BYTES: gl.constexpr = (CONSUMERS * ROWS + BLOCK_N) * BLOCK_K
            mbarrier.expect(bar, BYTES)
            if TWO:  # two weights by the same few rows, the rest of whose tile is never read back
                _tma_load(x_desc, [0, k * BLOCK_K], bar, x_bufs.index(index).slice(0, ROWS, 0))
                _tma_load(w_desc, [tile_n * BLOCK_N, k * BLOCK_K], bar, w_bufs.index(index), pred=batch == 0)
                _tma_load(u_desc, [tile_n * BLOCK_N, k * BLOCK_K], bar, w_bufs.index(index), pred=batch == 1)
            else:
                for w in gl.static_range(CONSUMERS):
                    row = batch * M + (tile_m * CONSUMERS + w) * 64
                    if ROWS == 64:
                        _tma_load(x_desc, [row, k * BLOCK_K], bar, x_bufs.index(index * CONSUMERS + w))
                    else:
                        _tma_load(x_desc, [row, k * BLOCK_K], bar, x_bufs.index(index * CONSUMERS + w).slice(0, ROWS, 0))
                _tma_load(w_desc, [batch * N + tile_n * BLOCK_N, k * BLOCK_K], bar, w_bufs.index(index))
            index, phase = _advance(index, phase, STAGES)


@gluon.jit
def _halves(x, HALF: gl.constexpr):
    return x.reshape((x.shape[0], 2, HALF)).permute((0, 2, 1)).split()


@gluon.jit
def _column_scales(ptr, first, N, stride, WIDTH: gl.constexpr, EVEN: gl.constexpr, LAYOUT: gl.constexpr):
    columns = first + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    if EVEN:
        return gl.load(ptr + columns)
    return gl.load(ptr + columns * stride, mask=columns < N, other=0.0)


@gluon.jit
def _prefetch(pointers):
    """Bring what lies there into the L1 cache; nothing waits for it, and no register holds it."""
    gl.inline_asm_elementwise("prefetch.global.L1 [$1]; mov.b32 $0, 0;", "=r,l", [pointers.to(gl.int64)], gl.int32, False, 1)


@gluon.jit
def _consumer(
    y_desc, x_bufs, w_bufs, y_bufs, empty, ready, xs_ptr, ws_ptr, us_ptr, bias_ptr, ub_ptr, residual_ptr, y_ptr, M, N, K, BATCH,
    stride_xsb, stride_xsm, stride_wsb, stride_wsn, stride_bb, stride_bn, stride_rb, stride_rm,
    WARPGROUP: gl.constexpr, PROGRAMS: gl.constexpr, CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr,
    GROUP: gl.constexpr, STAGES: gl.constexpr, PART: gl.constexpr, BUFFERS: gl.constexpr, SCALES_FIRST: gl.constexpr,
    BIAS: gl.constexpr, RESIDUAL: gl.constexpr, TMA_STORE: gl.constexpr, SPLIT: gl.constexpr, TWO: gl.constexpr,
    EVEN: gl.constexpr,
):  # fmt: skip
    ACC: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, min(BLOCK_N, 128), 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, PART, 32])
    PARTS: gl.constexpr = BLOCK_N // PART
    # a buffer is free once all stores but the BUFFERS - 1 last ones are done: those must be from other buffers
    gl.static_assert(PARTS % BUFFERS == 0 or not TMA_STORE)
    tiles_m = gl.cdiv(M, CONSUMERS * 64)
    tiles_n = gl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n * BATCH
    index = gl.to_tensor(0)
    phase = gl.to_tensor(0)
    for t in range(gl.program_id(0), tiles * SPLIT, PROGRAMS):
        first, steps, part = _steps(t, tiles, K, BLOCK_K, SPLIT)
        batch, tile_m, tile_n = _tile(t - part * tiles, tiles_m, tiles_n, GROUP)
        acc = gl.zeros((64, BLOCK_N), gl.int32, ACC)
        first_row = (tile_m * CONSUMERS + WARPGROUP) * 64
        first_column = tile_n * BLOCK_N
        rows = first_row + gl.arange(0, 64, gl.SliceLayout(1, OUT))
        ws = ws_ptr if EVEN else ws_ptr + batch.to(gl.int64) * stride_wsb
        bias_row = bias_ptr + batch.to(gl.int64) * stride_bb
        if TWO:
            if batch == 1:
                ws = us_ptr
                bias_row = ub_ptr
        if SCALES_FIRST:  # their latency is hidden behind the loop, at the price of registers
            xs = gl.load(xs_ptr + batch.to(gl.int64) * stride_xsb + rows * stride_xsm, mask=rows < M, other=0.0)
            ws0 = _column_scales(ws, first_column, N, stride_wsn, PART, EVEN, OUT)
            if PARTS > 1:
                ws1 = _column_scales(ws, first_column + PART, N, stride_wsn, PART, EVEN, OUT)
            if PARTS > 2:
                ws2 = _column_scales(ws, first_column + 2 * PART, N, stride_wsn, PART, EVEN, OUT)
                ws3 = _column_scales(ws, first_column + 3 * PART, N, stride_wsn, PART, EVEN, OUT)
        else:
            THREADS: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
            i = gl.arange(0, BLOCK_N, THREADS)
            _prefetch(ws + gl.minimum(first_column + i, N - 1) * stride_wsn)
            i = gl.arange(0, 64, THREADS)
            _prefetch(xs_ptr + batch.to(gl.int64) * stride_xsb + gl.minimum(first_row + i, M - 1) * stride_xsm)
        for k in range(steps):
            mbarrier.wait(ready.index(index), phase)
            x_tile = x_bufs.index(index * CONSUMERS + WARPGROUP)
            acc = warpgroup_mma(x_tile, w_bufs.index(index).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma_wait(1, (acc,))
            # the product before this one is done: its slot may be filled again
            previous = gl.to_tensor(index) + STAGES * (index == 0).to(gl.int32) - 1
            mbarrier.arrive(empty.index(previous), count=1, pred=k > 0)
            index, phase = _advance(index, phase, STAGES)
        acc = warpgroup_mma_wait(0, (acc,))
        last = gl.to_tensor(index) + STAGES * (index == 0).to(gl.int32) - 1
        mbarrier.arrive(empty.index(last), count=1)
        if not SCALES_FIRST:
            xs = gl.load(xs_ptr + batch.to(gl.int64) * stride_xsb + rows * stride_xsm, mask=rows < M, other=0.0)
        if PARTS == 1:
            parts = (acc,)
        elif PARTS == 2:
            p0, p1 = _halves(acc, BLOCK_N // 2)
            parts = (p0, p1)
        else:
            p0, p1 = _halves(acc, BLOCK_N // 2)
            p00, p01 = _halves(p0, BLOCK_N // 4)
            p10, p11 = _halves(p1, BLOCK_N // 4)
            parts = (p00, p01, p10, p11)
        for j in gl.static_range(PARTS):
            if SCALES_FIRST and j == 0:
                scale = ws0
            elif SCALES_FIRST and j == 1:
                scale = ws1
            elif SCALES_FIRST and j == 2:
                scale = ws2
            elif SCALES_FIRST and j == 3:
                scale = ws3
            else:
                scale = _column_scales(ws, first_column + j * PART, N, stride_wsn, PART, EVEN, OUT)
            sums = gl.convert_layout(parts[j], OUT)
            columns = first_column + j * PART + gl.arange(0, PART, gl.SliceLayout(0, OUT))
            inside = (rows < M)[:, None] & (columns < N)[None, :]
            y = (sums.to(gl.float32) * scale[None, :]) * xs[:, None]
            if BIAS:
                bias = gl.load(bias_row + columns * stride_bn, mask=columns < N, other=0.0)
                y += bias.to(gl.float32)[None, :]
            if SPLIT > 1:  # parts of sums: scales and the rest come when all are there
                y = sums
            y = y.to(y_ptr.dtype.element_ty)
            if RESIDUAL == "load":  # what an addition after the cast gives
                at = residual_ptr + batch.to(gl.int64) * stride_rb + rows.to(gl.int64)[:, None] * stride_rm + columns[None, :]
                residual = gl.load(at, mask=inside, other=0.0)
                y = (y.to(gl.float32) + residual.to(gl.float32)).to(y_ptr.dtype.element_ty)
            if TMA_STORE:
                tma.store_wait(BUFFERS - 1)
                buffer = y_bufs.index(WARPGROUP * BUFFERS + j % BUFFERS)
                buffer.store(y)
                fence_async_shared()
                # rows past the end of a batch go past the end of the tensor, where TMA drops them
                row = gl.to_tensor(batch * M + first_row) + (gl.to_tensor(first_row) >= M).to(gl.int32) * BATCH * M
                if RESIDUAL == "add":  # the same sums, in the memory that holds the residual: no element is added to twice
                    _tma_add(y_desc, [row, first_column + j * PART], buffer)
                else:
                    _tma_store(y_desc, [row, first_column + j * PART], buffer)
            else:
                matrix = batch.to(gl.int64) + gl.to_tensor(part).to(gl.int64) * BATCH
                at = (matrix * M + rows.to(gl.int64))[:, None] * N + columns[None, :]
                gl.store(y_ptr + at, y, mask=inside)
    if TMA_STORE:
        tma.store_wait(0)


# sizes are not specialized on: one compiled kernel serves every shape
@gluon.jit(do_not_specialize=["M", "N", "K", "BATCH", "stride_xsb", "stride_wsb", "stride_bb", "stride_rb"])
def _hopper_mm_kernel(
    x_desc, w_desc, u_desc, y_desc, y_ptr, xs_ptr, ws_ptr, us_ptr, bias_ptr, ub_ptr, residual_ptr, M, N, K, BATCH,
    stride_xsb, stride_xsm, stride_wsb, stride_wsn, stride_bb, stride_bn, stride_rb, stride_rm,
    PROGRAMS: gl.constexpr, CONSUMERS: gl.constexpr, GROUP: gl.constexpr, STAGES: gl.constexpr, PART: gl.constexpr,
    BUFFERS: gl.constexpr, REGISTERS: gl.constexpr, SCALES_FIRST: gl.constexpr, BIAS: gl.constexpr, RESIDUAL: gl.constexpr,
    TMA_STORE: gl.constexpr, SPLIT: gl.constexpr, TWO: gl.constexpr, EVEN: gl.constexpr,
):  # fmt: skip
    """``EVEN``: one matmul, scales of columns dense, and no tile past the last column. ``RESIDUAL``: "", "load" or "add"."""
    BLOCK_K: gl.constexpr = x_desc.block_type.shape[1]
    BLOCK_N: gl.constexpr = w_desc.block_type.shape[0]
    x_bufs = gl.allocate_shared_memory(gl.int8, [STAGES * CONSUMERS, 64, BLOCK_K], x_desc.layout)
    w_bufs = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_N, BLOCK_K], w_desc.layout)
    if TMA_STORE:
        y_bufs = gl.allocate_shared_memory(y_ptr.dtype.element_ty, [CONSUMERS * BUFFERS, 64, PART], y_desc.layout)
    else:
        y_bufs = x_bufs
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(empty.index(i), count=CONSUMERS)
        mbarrier.init(ready.index(i), count=1)
    fence_async_shared()
    # a tuple of arguments that is bound to a name turns its constants into tensors: each is written out
    if CONSUMERS == 1:
        gl.warp_specialize(
            [
                (_consumer, (y_desc, x_bufs, w_bufs, y_bufs, empty, ready, xs_ptr, ws_ptr, us_ptr, bias_ptr, ub_ptr, residual_ptr, y_ptr, M, N, K, BATCH, stride_xsb, stride_xsm, stride_wsb, stride_wsn, stride_bb, stride_bn, stride_rb, stride_rm, 0, PROGRAMS, CONSUMERS, BLOCK_N, BLOCK_K, GROUP, STAGES, PART, BUFFERS, SCALES_FIRST, BIAS, RESIDUAL, TMA_STORE, SPLIT, TWO, EVEN)),
                (_producer, (x_desc, w_desc, u_desc, x_bufs, w_bufs, empty, ready, M, N, K, BATCH, PROGRAMS, CONSUMERS, BLOCK_N, BLOCK_K, GROUP, STAGES, SPLIT, TWO)),
            ], [1], [24],
        )  # fmt: skip
    elif CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consumer, (y_desc, x_bufs, w_bufs, y_bufs, empty, ready, xs_ptr, ws_ptr, us_ptr, bias_ptr, ub_ptr, residual_ptr, y_ptr, M, N, K, BATCH, stride_xsb, stride_xsm, stride_wsb, stride_wsn, stride_bb, stride_bn, stride_rb, stride_rm, 0, PROGRAMS, CONSUMERS, BLOCK_N, BLOCK_K, GROUP, STAGES, PART, BUFFERS, SCALES_FIRST, BIAS, RESIDUAL, TMA_STORE, SPLIT, TWO, EVEN)),
                (_consumer, (y_desc, x_bufs, w_bufs, y_bufs, empty, ready, xs_ptr, ws_ptr, us_ptr, bias_ptr, ub_ptr, residual_ptr, y_ptr, M, N, K, BATCH, stride_xsb, stride_xsm, stride_wsb, stride_wsn, stride_bb, stride_bn, stride_rb, stride_rm, 1, PROGRAMS, CONSUMERS, BLOCK_N, BLOCK_K, GROUP, STAGES, PART, BUFFERS, SCALES_FIRST, BIAS, RESIDUAL, TMA_STORE, SPLIT, TWO, EVEN)),
                (_producer, (x_desc, w_desc, u_desc, x_bufs, w_bufs, empty, ready, M, N, K, BATCH, PROGRAMS, CONSUMERS, BLOCK_N, BLOCK_K, GROUP, STAGES, SPLIT, TWO)),
            ], [4, 1], [REGISTERS, 24],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_consumer, (y_desc, x_bufs, w_bufs, y_bufs, empty, ready, xs_ptr, ws_ptr, us_ptr, bias_ptr, ub_ptr, residual_ptr, y_ptr, M, N, K, BATCH, stride_xsb, stride_xsm, stride_wsb, stride_wsn, stride_bb, stride_bn, stride_rb, stride_rm, 0, PROGRAMS, CONSUMERS, BLOCK_N, BLOCK_K, GROUP, STAGES, PART, BUFFERS, SCALES_FIRST, BIAS, RESIDUAL, TMA_STORE, SPLIT, TWO, EVEN)),
                (_consumer, (y_desc, x_bufs, w_bufs, y_bufs, empty, ready, xs_ptr, ws_ptr, us_ptr, bias_ptr, ub_ptr, residual_ptr, y_ptr, M, N, K, BATCH, stride_xsb, stride_xsm, stride_wsb, stride_wsn, stride_bb, stride_bn, stride_rb, stride_rm, 1, PROGRAMS, CONSUMERS, BLOCK_N, BLOCK_K, GROUP, STAGES, PART, BUFFERS, SCALES_FIRST, BIAS, RESIDUAL, TMA_STORE, SPLIT, TWO, EVEN)),
                (_consumer, (y_desc, x_bufs, w_bufs, y_bufs, empty, ready, xs_ptr, ws_ptr, us_ptr, bias_ptr, ub_ptr, residual_ptr, y_ptr, M, N, K, BATCH, stride_xsb, stride_xsm, stride_wsb, stride_wsn, stride_bb, stride_bn, stride_rb, stride_rm, 2, PROGRAMS, CONSUMERS, BLOCK_N, BLOCK_K, GROUP, STAGES, PART, BUFFERS, SCALES_FIRST, BIAS, RESIDUAL, TMA_STORE, SPLIT, TWO, EVEN)),
                (_producer, (x_desc, w_desc, u_desc, x_bufs, w_bufs, empty, ready, M, N, K, BATCH, PROGRAMS, CONSUMERS, BLOCK_N, BLOCK_K, GROUP, STAGES, SPLIT, TWO)),
            ], [4, 4, 1], [REGISTERS, REGISTERS, 24],
        )  # fmt: skip
