"""Host side of the Hopper matmul: which tile, TMA descriptors, launches."""

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from teint8.kernels.finish import finish
from teint8.kernels.launch import Launch, on
from teint8.kernels.quantize_both import padded
from teint8.numerics import MAX_INT32_K


class Tile(NamedTuple):
    """A configuration of the kernel.

    Attributes:
        consumers: warpgroups that multiply, 64 rows each.
        block_n: columns of a tile.
        stages: slots of the ring.
        buffers: shared buffers for the result, for each consumer; not more than a tile has parts, for each part has its own.
        scales_first: load the scales before the loop; never with a bias or a residual that is loaded, for want of registers.
        group: rows of tiles that go together.
        limit: registers a thread at the start.
        registers: of a consumer's thread.

    """

    consumers: int
    block_n: int
    stages: int
    buffers: int = 2
    scales_first: bool = True
    group: int = 8
    limit: int = 168
    registers: int = 240


WIDE = Tile(2, 256, 4, group=16)
SQUARE = Tile(2, 128, 6)
LOW = Tile(1, 128, 8)
SMALL = Tile(1, 64, 10, buffers=1)
TINY = Tile(1, 32, 16)
HUGE = Tile(3, 256, 3, scales_first=False, group=12, limit=128, registers=160)
TILES = {"wide": WIDE, "square": SQUARE, "low": LOW, "small": SMALL, "tiny": TINY, "huge": HUGE}

# how fast a tile is where it fills the card, to the second: benchmarks/gemm.py --sweep, and a training step, on an H100 (Triton 3.6).
# The first reads the least, which counts when power is short
RATES = ((HUGE, 1.04), (WIDE, 1.0), (SQUARE, 0.9), (LOW, 0.8), (SMALL, 0.62))
FEW = ((SMALL, 1.0), (TINY, 0.85), (LOW, 0.8))
"""Up to 64 rows: bound by reading the weight, at 4 to 64 rows of it by 4096 and by 14336 channels on an H100."""


def tile_of(m: int, n: int, batch: int, programs: int, plain: bool = True) -> Tile:
    """The tile for a problem: the least time for its waves of tiles, whole ones at the edges too. No result depends on it.

    Args:
        plain: there is no bias and no residual, and TMA stores the result: for more the largest tile has no registers.

    """

    def time(choice: tuple[Tile, float]) -> float:
        tile, rate = choice
        tiles = batch * -(-m // (64 * tile.consumers)) * -(-n // tile.block_n)
        return -(-tiles // programs) * tile.consumers * tile.block_n / rate

    return min((choice for choice in (RATES if m > 64 else FEW) if plain or choice[0] is not HUGE), key=time)[0]


def split_of(tiles: int, k: int, programs: int) -> int:
    """Into how many parts K goes, so that tiles that are far too few fill the card; each part has a step at least.

    Half of the card reads the weight nearly as fast as all of it, and the parts cost a launch.
    """
    steps = -(-k // 128)
    most = min(8, steps // 4)

    def fill(split: int) -> float:
        units = tiles * split
        return units / (-(-units // programs) * programs) - 0.02 * split  # each part is written and read again

    best = max((s for s in range(1, max(most, 1) + 1) if (s - 1) * -(-steps // s) < steps), key=fill)
    return best if fill(1) < 0.4 and fill(best) > fill(1) + 0.1 else 1


def why_not(device: str, k: int) -> str | None:
    """The reason why this kernel cannot run, or None."""
    if device != "cuda":
        return f"it runs on cuda, not on {device}"
    if k > MAX_INT32_K:
        return f"K is {k}; its int32 sums hold K up to {MAX_INT32_K}"
    return _unusable()


@functools.cache
def _unusable() -> str | None:
    if torch.version.cuda is None or torch.cuda.get_device_capability()[0] != 9:
        return "it needs a Hopper GPU (compute capability 9.0)"
    try:
        import teint8.kernels.hopper_mm  # noqa: F401
    except ImportError as error:
        return f"Triton {triton.__version__} has no Gluon that it knows: {error}"
    return None


def kernel() -> Any:
    """The Gluon kernel; imported late, since Gluon is experimental and not in every Triton."""
    from teint8.kernels import hopper_mm

    return hopper_mm._hopper_mm_kernel


@functools.cache
def _launch() -> Launch:
    return Launch(kernel())


@functools.cache
def programs(device: int) -> int:
    """How many programs fill the card: one a multiprocessor."""
    return torch.cuda.get_device_properties(device).multi_processor_count


def _aligned(codes: Tensor) -> Tensor:
    """Codes (B, M, K) or (M, K) as TMA reads them: dense batches, 16-byte aligned rows; a padded copy where they are not."""
    k, stride = codes.shape[-1], codes.stride(-2)
    dense = codes.stride(-1) == 1 and stride >= k and stride % 16 == 0 and codes.data_ptr() % 16 == 0
    if dense and (codes.ndim == 2 or codes.shape[0] == 1 or codes.stride(0) == codes.shape[1] * stride):
        return codes
    return padded(tuple(codes.shape), codes.device).copy_(codes)


def _is_dense(t: Tensor) -> bool:
    """Whether TMA can write it."""
    return t.is_contiguous() and t.data_ptr() % 16 == 0


class _Plan(NamedTuple):
    """What a launch for operands of known shapes and strides comes to."""

    tile: Tile
    grid: tuple[int, int, int]
    tma_store: bool
    strides: tuple[int, ...]
    split: int


_plans: dict[Any, _Plan] = {}


def forget_plans() -> None:
    """Choose tiles anew."""
    _plans.clear()
    _launch.cache_clear()


def int8_mm(
    xq: Tensor,
    xs: Tensor,
    wq: Tensor,
    ws: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    residual: Tensor | None = None,
    into: bool = False,
    tile: Tile | None = None,
    split: int | None = None,
    up: tuple[Tensor, Tensor, Tensor | None] | None = None,
) -> Tensor:
    """(B, M, N) from codes (B, M, K) and (B, N, K), scales (B, M) and (B, N), bias (B, N), residual (B, M, N); one launch.

    All of them may come without their batch dimension. The residual is added after the cast, as an addition afterwards would be;
    ``into``: in its own memory, which is the result where it is dense and of its dtype.
    """
    xq, wq = _aligned(xq), _aligned(wq)
    shape, device = xq.shape, xq.device
    inner = torch.float32 if dtype == torch.float64 else dtype
    two = () if up is None else (2,)
    sizes = (*two, *shape[:-1], wq.shape[-2])
    if into and residual is not None and (residual.shape, residual.dtype) == (sizes, inner) and _is_dense(residual):
        y = residual
    else:
        y, into = torch.empty(sizes, dtype=inner, device=device), False
    uq, us, ub = (wq, ws, bias) if up is None else (_aligned(up[0]), *up[1:])
    b = y if bias is None else bias
    if up is not None and not fit_for_one(ws, us, bias, ub):
        raise ValueError("hopper: two weights in one launch need scales of the same strides, and biases of the same strides and dtype")
    r = y if residual is None else residual if residual.stride(-1) == 1 else residual.contiguous()
    others = (xs, ws, b, r) if up is None else (xs, ws, b, r, us, b if ub is None else ub)
    alignment = 0
    for t in others:
        alignment |= t.data_ptr()
    alignment %= 16
    key = (device.index, shape, y.shape, inner, tile, split, xs.stride(), ws.stride(), None if bias is None else (b.dtype, b.stride()),
           None if residual is None else (r.dtype, r.stride(), into),
           alignment and tuple(t.data_ptr() % 16 == 0 for t in others))  # fmt: skip
    plan = _plans.get(key)
    if plan is None:
        if len(_plans) >= 4096:
            _plans.clear()
        plan = _plans[key] = _planned(xq, xs, y, ws, bias, None if residual is None else r, into, tile, split)
    batch, m, k = shape if len(shape) == 3 else (1 if up is None else 2, *shape)
    n = y.shape[-1]
    x2, w2 = (xq, wq) if len(shape) == 2 else (_rows(xq), _rows(wq))
    y2 = y if y.ndim == 2 else y.view(-1, n)
    out = y if plan.split == 1 else torch.empty((plan.split, m, n), dtype=torch.int32, device=device)
    rest = (out, xs, ws, us, b, b if ub is None else ub, r, m, n, k, batch, *plan.strides)
    launch = _launch()
    with on(device):
        if launch.known(key):
            launch.again(key, plan.grid, rest, (x2, w2, uq if two else w2, y2 if plan.tma_store else x2))
        else:
            t = plan.tile
            descriptors = _descriptors(x2, w2, uq if two else w2, y2 if plan.tma_store else None, t)
            added = "" if residual is None else "add" if into and plan.tma_store else "load"
            constants = (programs(device.index), t.consumers, t.group, t.stages, min(64, t.block_n), t.buffers, t.registers,
                         t.scales_first and bias is None and added != "load", bias is not None and plan.split == 1,
                         added, plan.tma_store, plan.split, up is not None,
                         batch == 1 and ws.stride(-1) == 1 and n % t.block_n == 0)  # fmt: skip
            launch.first(key, plan.grid, (*descriptors, *rest), constants, num_warps=4, maxnreg=t.limit, enable_fp_fusion=False)
    if plan.split > 1:
        finish(out, xs.view(-1), ws.view(-1), None if bias is None else bias.view(-1), y.view(m, n))
    return y if inner == dtype else y.to(dtype)


def fit_for_one(ws: Tensor, us: Tensor, bias: Tensor | None, up_bias: Tensor | None) -> bool:
    """Whether the scales and biases of two weights are alike, as one launch takes them."""
    if bias is None or up_bias is None:
        return bias is up_bias and ws.stride() == us.stride()
    return ws.stride() == us.stride() and bias.stride() == up_bias.stride() and bias.dtype == up_bias.dtype


def _planned(
    xq: Tensor,
    xs: Tensor,
    y: Tensor,
    ws: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    into: bool,
    tile: Tile | None,
    split: int | None,
) -> _Plan:
    batch, (m, n) = y.shape[:-2].numel(), y.shape[-2:]
    if y.ndim > xq.ndim and (m > 64 or (tile is not None and tile.consumers > 1)):
        raise ValueError(f"hopper: two weights by {m} rows with {tile}; up to 64 rows and one consumer are needed")
    count = programs(xq.device.index)
    # TMA writes rows of 16 bytes; in a batch it drops what is past the end of the last matrix alone
    tma = y.dtype != torch.float32 and n % 8 == 0 and (batch == 1 or m % 64 == 0)
    if tile is None:
        plain = tma and bias is None and (residual is None or into)
        from teint8.kernels import tuned  # imports this file

        known = tuned.found("hopper", xq.device.index, m, n, xq.shape[-1], plain) if batch == 1 else None
        tile = Tile(*known) if known else tile_of(m, n, batch, count, plain)
    tiles = batch * -(-m // (64 * tile.consumers)) * -(-n // tile.block_n)
    if split is None:
        # parts of sums are written for few rows only: they cost 4 bytes each
        split = split_of(tiles, xq.shape[-1], count) if batch == 1 and m <= 128 and residual is None else 1
    b, r = xs if bias is None else bias, y if residual is None else residual
    of_batch = [0 if t.ndim == 1 else t.stride(0) for t in (xs, ws, b)]
    strides = (
        of_batch[0],
        xs.stride(-1),
        of_batch[1],
        ws.stride(-1),
        of_batch[2],
        b.stride(-1),
        r.stride(0),
        r.stride(-2),
    )
    return _Plan(tile, (min(count, tiles * split), 1, 1), tma and tile.block_n >= 64 and split == 1, strides, split)


def _rows_of_tile(rows: int) -> int:
    """How many rows of a tile of 64 are read: of few rows no more than needed, whatever the rest of the tile holds."""
    return 16 if rows <= 16 else 32 if rows <= 32 else 64


def _rows(codes: Tensor) -> Tensor:
    """(B, M, K) as (B * M, K), without a copy."""
    batch, rows, k = codes.shape
    return codes.as_strided((batch * rows, k), (codes.stride(1), 1))


def _descriptors(x: Tensor, w: Tensor, u: Tensor, y: Tensor | None, tile: Tile) -> tuple[Any, ...]:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    codes = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    x_desc = TensorDescriptor.from_tensor(x, [_rows_of_tile(x.shape[0]), 128], codes)
    w_desc = TensorDescriptor.from_tensor(w, [tile.block_n, 128], codes)
    u_desc = TensorDescriptor.from_tensor(u, [tile.block_n, 128], codes)
    if y is None:
        return x_desc, w_desc, u_desc, x_desc
    halves = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    return x_desc, w_desc, u_desc, TensorDescriptor.from_tensor(y, [64, min(64, tile.block_n)], halves)
