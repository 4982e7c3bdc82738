"""The contract suite: what every implementation of an op must do, bit for bit. Call ``check`` for one of your own."""

import dataclasses

import torch
from hypothesis import strategies as st
from torch import Tensor

from teint8 import ops
from teint8.ops import registry

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
FLAVOURS = ("normal", "huge", "tiny", "denormal", "zeros", "ties", "nan", "inf", "outliers", "flush")
STRIDES = ("contiguous", "transposed", "sliced", "expanded", "offset")


@dataclasses.dataclass(frozen=True)
class Case:
    """One matmul: x (B, M, K) by w (B, N, K), made from a seed."""

    batch: int
    m: int
    n: int
    k: int
    dtype: torch.dtype
    flavour: str
    strides: str
    bias: bool
    seed: int


cases = st.builds(
    Case,
    batch=st.sampled_from((1, 1, 1, 2, 3)),
    m=st.integers(0, 300) | st.integers(0, 3),
    n=st.integers(0, 300) | st.integers(0, 3),
    k=st.integers(0, 300) | st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    flavour=st.sampled_from(FLAVOURS),
    strides=st.sampled_from(STRIDES),
    bias=st.booleans(),
    seed=st.integers(0, 2**31),
)


def values(case: Case, rows: int, generator: torch.Generator) -> Tensor:
    """(B, rows, K) in the dtype, values and strides of the case."""
    shape = (case.batch, rows, case.k)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    scale = {"huge": 1e30, "tiny": 2.0**-95, "denormal": 2.0**-140, "flush": 2.0**-99.7, "zeros": 0.0}.get(case.flavour, 1.0)
    if case.dtype == torch.float16 and case.flavour == "huge":
        scale = 1e4
    x = x * scale
    if case.flavour == "ties":  # multiples of half a step of a row whose absmax is 127
        x = torch.randint(-254, 255, shape, generator=generator).double() / 2
    hit = torch.rand(shape, generator=generator) < 0.5 / max(case.k, 1)
    if case.flavour in ("nan", "inf"):
        x = torch.where(hit, float(case.flavour), x)
    if case.flavour == "outliers":
        x = torch.where(hit, x * 1000, x)
    x = x.to(case.dtype)
    if case.strides == "transposed":
        return x.mT.contiguous().mT
    if case.strides == "sliced":
        wide = torch.full((case.batch, rows, 2 * case.k + 3), float("nan"), dtype=x.dtype)
        wide[..., 3::2][..., : case.k] = x
        return wide[..., 3::2][..., : case.k]
    if case.strides == "expanded":
        return x[:, :1].expand(shape) if rows else x
    if case.strides == "offset":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(shape)
    return x


def different(a: Tensor, b: Tensor) -> int:
    """How many elements differ in their bits; every NaN is the same NaN, and the sign of zero counts."""
    assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
    a, b = a.cpu(), b.cpu()
    if not a.is_floating_point():
        return int((a != b).sum())
    same = (a == b) & (a.signbit() == b.signbit())
    return int((~same & ~(a.isnan() & b.isnan())).sum())


def check(case: Case, device: str, names: tuple[str, ...]) -> None:
    """Compare implementations on ``device`` (those that can run the case) with the reference on the CPU: quantize, then int8_mm."""
    generator = torch.Generator().manual_seed(case.seed)
    x, w = (values(case, rows, generator) for rows in (case.m, case.n))
    bias = torch.randn(case.batch, case.n, generator=generator).to(case.dtype) if case.bias else None
    seed = torch.randint(2**62, (), generator=generator)
    static = torch.rand((case.batch, case.m), generator=generator) * 0.02
    for arguments in ({}, {"seed": seed}, {"scale": static}, {"group_dims": 3}):
        want = ops.quantize(x, impl="reference", **arguments)
        moved = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in arguments.items()}
        for name in _usable("quantize", names, case, device):
            for got, expected in zip(ops.quantize(x.to(device), impl=name, **moved), want, strict=True):
                assert different(got, expected) == 0, (name, case, arguments)
    (xq, xs), (wq, ws) = ops.quantize(x, impl="reference"), ops.quantize(w, impl="reference")
    operands = (xq, xs, wq, ws, bias)
    if case.batch == 1 and case.seed % 2:  # without the batch dimension too
        operands = tuple(None if t is None else t[0] for t in operands)
    for given in (operands, _as_views(operands)):
        want = ops.int8_mm(*given, case.dtype, "reference")
        for name in _usable("int8_mm", names, case, device):
            got = ops.int8_mm(*_moved(given, device), case.dtype, name)
            assert different(got, want) == 0, (name, case, given is operands)
    if case.batch == 1 and "reference" not in names:
        got = ops.linear(*(None if t is None else t[0].to(device) for t in (x, w, bias)))
        assert different(got, ops.linear(*(None if t is None else t[0] for t in (x, w, bias)), impl="reference")) == 0, case


def _as_views(operands: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The operands with one scale for all rows of x, as a whole tensor's is; the weight's scales and the bias from among others."""
    xq, xs, wq, ws, bias = operands
    every_other = [None if t is None else t.repeat_interleave(2, -1)[..., ::2] for t in (ws, bias)]
    return xq, xs[..., :1].expand_as(xs), wq, *every_other


def _moved(operands: tuple[Tensor | None, ...], device: str) -> list[Tensor | None]:
    """The operands on a device, with the strides that they have."""
    return [None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) if 0 in t.shape
            else _with_strides(t, device) for t in operands]  # fmt: skip


def _with_strides(t: Tensor, device: str) -> Tensor:
    if 0 in t.stride():
        whole = t[tuple(slice(0, 1) if s == 0 else slice(None) for s in t.stride())].to(device)
        return whole.expand(t.shape)
    made = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    return made.copy_(t)


def _usable(op: str, names: tuple[str, ...], case: Case, device: str) -> list[str]:
    problem = registry.Problem(device, case.dtype, case.batch if op == "int8_mm" else 1, case.m, case.n, case.k)
    found = [i for i in registry.implementations(op) if i.name in names]
    return [i.name for i in found if registry.why_not(i, problem) is None]
