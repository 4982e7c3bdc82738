"""Kernels that the contract suite does not reach through ops alone: both orientations, activations, few rows, each tile of a table."""

import concurrent.futures
import itertools
import random

import pytest
import torch
from contract import different

import teint8
from teint8 import activations, numerics, ops
from teint8.ops import raw_both

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TRITON = "triton" if CUDA else "triton-interpreter"
gpu = pytest.mark.skipif(not CUDA, reason="no GPU")
DTYPES = (torch.bfloat16, torch.float32, torch.float16, torch.float64)


def _values(shape, dtype, flavour="normal", device=DEVICE):
    x = torch.randn(shape, dtype=torch.float64) * {"huge": 1e30, "tiny": 2.0**-95, "zeros": 0.0}.get(flavour, 2.0)
    if dtype == torch.float16 and flavour == "huge":
        x = x * 1e-26
    if flavour == "nan" and x.numel():
        x.view(-1)[:: max(x.numel() // 3, 1)] = float("nan")
    return x.to(dtype).to(device)


def _both_cases():
    shapes = [(1, 1), (5, 7), (1, 300), (2, 6, 65), (3, 64, 16), (33, 1), (0, 5), (70, 129)]
    cases = list(itertools.product(shapes, DTYPES, ("normal", "huge", "tiny", "zeros", "nan"), (False, True)))
    return random.Random(0).sample(cases, 300 if CUDA else 60)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape,dtype,flavour,stochastic", _both_cases())
def test_quantize_both(shape, dtype, flavour, stochastic) -> None:
    x = _values(shape, dtype, flavour)
    seed = torch.tensor(1234567890123) if stochastic else None
    got = ops.quantize_both(x, seed=None if seed is None else seed.to(DEVICE), impl=TRITON)
    want = ops.quantize_both(x.cpu(), seed=seed, impl="reference")
    assert [different(a, b) for a, b in zip(got, want, strict=True)] == [0] * 4
    rows = ops.quantize(x.cpu(), seed=seed, impl="reference")
    assert different(want[0], rows[0]) == 0 and different(want[1], rows[1]) == 0


def _activation_cases():
    shapes = [(1, 1), (5, 7), (2, 6, 65), (3, 17, 16), (0, 5), (9, 129)]
    wanted = [w for w in itertools.product((False, True), repeat=3) if any(w)]
    cases = itertools.product(
        shapes, DTYPES, activations.KINDS, (False, True), (False, True), (False, True), wanted, ("normal", "nan", "huge")
    )
    return random.Random(1).sample(list(cases), 400 if CUDA else 60)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape,dtype,kind,gated,backward,stochastic,wanted,flavour", _activation_cases())
def test_activation(shape, dtype, kind, gated, backward, stochastic, wanted, flavour) -> None:
    g = _values(shape, dtype, flavour)
    u = _values(shape, dtype) if gated else None
    d = _values(shape, dtype) if backward else None
    seed = torch.tensor(987654321) if stochastic and len(shape) == 2 else None
    rows, columns, values = wanted
    how = dict(kind=kind, rows=rows, columns=columns, values=values, value_columns=backward and rows)
    cpu = [None if t is None else t.cpu() for t in (g, u, d)]
    scale = ops.quantize(activations.value(kind, *cpu[:2]), impl="reference")[1] if backward else None
    moved = None if scale is None else scale.to(DEVICE)
    got = raw_both.activation(g, u, d, seed=None if seed is None else seed.to(DEVICE), scale=moved, impl=TRITON, **how)
    want = raw_both.activation(*cpu, seed=seed, scale=scale, impl="reference", **how)
    results = 2 if gated and backward else 1
    assert len(got) == len(want) == (values + 2 * rows + 2 * columns) * results + 2 * (backward and rows) + backward
    assert [different(a, b) for a, b in zip(got, want, strict=True)] == [0] * len(got)
    if backward:  # what several results share memory with is not dense, but for the dispatcher, which is told that it is
        got = torch.ops.teint8.activation(g, u, d, None, moved, kind, rows, columns, values, backward and rows, TRITON)
    assert [a.stride() for a in got if a.numel() > 1] == [b.stride() for b in want if b.numel() > 1]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape,layout",
    [((5, 7), "dense"), ((33, 48), "dense"), ((20, 70), "transposed"), ((16, 64), "mixed"), ((1, 1), "dense"), ((6, 32), "expanded")],
)
def test_quantize_pair(shape, layout, dtype, columns) -> None:
    a, b = (_values(shape if layout == "dense" else shape[::-1], dtype, f) for f in ("normal", "nan"))
    if layout == "expanded":
        a, b = a.mT[:1].expand(shape), b.mT.contiguous()
    elif layout != "dense":
        a, b = a.mT, b.mT.contiguous() if layout == "mixed" else b.mT
    got = raw_both.quantize_pair(a, b, columns=columns, impl=TRITON)
    want = raw_both.quantize_pair(a.cpu(), b.cpu(), columns=columns, impl="reference")
    assert [different(x, y) for x, y in zip(got, want, strict=True)] == [0] * (4 if columns else 2)
    each = [ops.quantize_both(w.cpu(), impl="reference") for w in (a, b)]
    assert different(want[0], torch.cat([e[0] for e in each])) == 0 and different(want[1], torch.cat([e[1] for e in each])) == 0


@gpu
def test_batch_strides_of_every_kind_after_one_that_the_compiler_knows() -> None:
    # a stride of 1 becomes a constant of the compiled kernel: another stride must not run that one
    for step in (1, 5, 16):
        x = torch.randn(64, step, 1, device="cuda")[:, :1]
        assert x.stride(0) == step
        for _ in range(2):
            want = ops.quantize_both(x.cpu(), impl="reference")
            assert [different(a, b) for a, b in zip(ops.quantize_both(x), want, strict=True)] == [0] * 4


def test_side_by_side() -> None:
    whole = torch.arange(24.0, device=DEVICE).view(4, 6)
    for a, b, dim, view in (
        (whole[:2], whole[2:], 0, True), (whole[:, :3], whole[:, 3:], 1, True), (whole[2:], whole[:2], 0, False),
        (whole[:, :3], whole[:, 3:].clone(), 1, False), (whole[:2, :2], whole[:2, 2:4], 1, True),
        (whole[:2, :2], whole[2:, :2], 0, True),
    ):  # fmt: skip
        got = raw_both.side_by_side(a, b, dim)
        assert torch.equal(got, torch.cat((a, b), dim))
        assert (got.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()) is view
    row = whole.view(-1)[:6].view(1, 6)  # the row of another tensor is no neighbour
    assert torch.equal(raw_both.side_by_side(row[:, :4], row[:, 2:], 1), torch.cat((row[:, :4], row[:, 2:]), 1))


def test_results_of_an_op_have_memory_of_their_own() -> None:
    """Torch's rule for ops that say nothing of aliases; without the dispatcher they may lie side by side."""
    g, u, d = (torch.randn(5, 24, device=DEVICE) for _ in range(3))
    seed = torch.tensor(3, device=DEVICE)
    op = torch.ops.teint8.activation
    results = [torch.ops.teint8.quantize_both(x, s, TRITON) for x, s in ((g, None), (g, seed), (g.expand(3, 5, 24), None))]
    for s, up, grad in ((None, None, None), (None, u, d), (seed, u, d)):
        for wanted in ((True, True, True), (True, False, True), (False, True, False)):  # rows, columns, values
            made, want = (op(g, up, grad, s, None, "silu", *wanted, grad is not None, impl) for impl in (TRITON, "reference"))
            assert [different(a, b) for a, b in zip(made, want, strict=True)] == [0] * len(want)
            results.append(made)
    for result in results:
        assert len({t.untyped_storage().data_ptr() for t in result}) == len(result)
        assert all(t.data_ptr() % 16 == 0 for t in result)


@pytest.mark.parametrize("backward", [False, True])
def test_activation_of_rows_longer_than_a_block(backward) -> None:
    g, u, d = (_values((2, 17000), torch.bfloat16) for _ in range(3))
    seed = torch.tensor(3, device=DEVICE)
    sources = (g, u, d if backward else None)
    how = dict(kind="silu", rows=True, values=True)
    scale = ops.quantize(activations.value("silu", g.cpu(), u.cpu()), impl="reference")[1].to(DEVICE) if backward else None
    got = raw_both.activation(*sources, seed=seed, scale=scale, impl=TRITON, **how)
    cpu = [None if t is None else t.cpu() for t in (*sources, seed, scale)]
    want = raw_both.activation(*cpu[:3], seed=cpu[3], scale=cpu[4], impl="reference", **how)
    assert [different(a, b) for a, b in zip(got, want, strict=True)] == [0] * len(want)


@gpu
@pytest.mark.parametrize("n", [1000, 5000, 9000, 13000, 16384, 20000])
def test_activation_rows_of_any_number_of_blocks(n) -> None:
    g, u, d = (_values((3, n), torch.bfloat16) for _ in range(3))
    scale = ops.quantize(activations.value("silu", g.cpu(), u.cpu()), impl="reference")[1]
    for rows in (False, True):
        got = raw_both.activation(g, u, d, kind="silu", rows=rows, values=True, scale=scale.to(DEVICE))
        want = raw_both.activation(g.cpu(), u.cpu(), d.cpu(), kind="silu", rows=rows, values=True, scale=scale, impl="reference")
        assert [different(a, b) for a, b in zip(got, want, strict=True)] == [0] * len(want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_absmax_of_a_half_is_known_from_its_scale(dtype) -> None:
    top = torch.arange(2**15, dtype=torch.int16).view(dtype).float()  # every number of the dtype that is not negative
    known = (numerics.scale_of(top) * 127).to(dtype).float()
    assert different(known, torch.where(top.isinf(), torch.nan, torch.where(top < numerics.TINY, 0.0, top))) == 0


@pytest.mark.parametrize("gradient", [None, "nearest", "stochastic"])
@pytest.mark.parametrize("gated", [False, True])
def test_what_an_mlp_keeps_of_its_activation(gated, gradient) -> None:
    """Under a float backward its scales alone, where its dtype is a half and the kernel makes the rest again; else codes."""
    grads = []
    for dtype, impl in ((torch.bfloat16, TRITON), (torch.bfloat16, "reference"), (torch.float32, TRITON)):
        torch.manual_seed(0)
        x, gate, up, down = (_values(s, dtype).requires_grad_() for s in ((9, 32), (48, 32), (48, 32), (32, 48)))
        with torch.no_grad():
            x[3] = 0
        kept = []
        how = dict(gradient=gradient, wgrad="float", impl=impl)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = ops.gated_mlp(x, gate, up, down, **how) if gated else ops.mlp(x, gate, down, **how)
        codes = [t for t in kept if t.dtype == torch.int8 and t.shape == (9, 48)]
        assert len(codes) == (0 if dtype == torch.bfloat16 and impl == TRITON and not gradient else 1)
        if dtype == torch.bfloat16 and gradient != "stochastic":
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
            leaves = [t for t in (x, gate, up, down) if gated or t is not up]
            grads.append([g.float().cpu() for g in torch.autograd.grad(y, leaves, dy)])
    for a, b in zip(*grads, strict=True) if grads else ():  # matmuls of other strides may add in another order on a GPU
        assert (a - b).norm() <= 1e-3 * b.norm() if CUDA else different(a, b) == 0


@gpu
@pytest.mark.parametrize("gradient,wgrad", [(None, "int8"), ("nearest", "int8"), ("nearest", "float")])
def test_mlp_at_real_sizes(gradient, wgrad) -> None:
    x = _values((1024, 2048), torch.bfloat16).requires_grad_()
    weights = [(_values(s, torch.bfloat16) * 0.02).requires_grad_() for s in ((5632, 2048), (5632, 2048), (2048, 5632))]
    dy = _values((1024, 2048), torch.bfloat16)
    results = []
    for impl in ("", "reference"):
        y = ops.gated_mlp(x, *weights, gradient=gradient, wgrad=wgrad, impl=impl)
        results.append([y, *torch.autograd.grad(y, [x, *weights], dy)])
    for i, (a, b) in enumerate(zip(*results, strict=True)):
        if i == 0 or (gradient, wgrad) == ("nearest", "int8"):
            assert different(a, b) == 0, i
        assert (a - b).float().norm() <= 2e-3 * b.float().norm(), i


@pytest.mark.parametrize("kind", activations.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_of_torch(kind, dtype, device) -> None:
    x = torch.linspace(-30, 30, 4001).to(device, dtype)
    exact = x.double().requires_grad_()
    functions = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}
    y = functions.get(kind, lambda t: torch.nn.functional.gelu(t, approximate="tanh"))(exact)
    (slope,) = torch.autograd.grad(y.sum(), exact)
    bound = 2e-5 if dtype == torch.float32 else 0.07
    assert (ops.activate(kind, x).double() - y).abs().max() < bound
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(ops.activate(kind, leaf).sum(), leaf)
    assert (got.double() - slope).abs().max() < (2e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("kind", activations.KINDS)
def test_activations_of_huge_values(kind, device) -> None:
    x = torch.tensor([[1e30, -1e30, 1e19, -1e19, 200.0, -200.0]], device=device)
    slope = activations.gradient(kind, x, None, torch.ones_like(x))[0]
    assert (ops.activate(kind, x) - x.relu()).abs().max() < 1e-6
    assert (slope - (x > 0).float()).abs().max() < 1e-4
    assert torch.equal(activations.fma(x, x, x).isinf(), x.abs() > 1.9e19)


def test_fma_rounds_once() -> None:
    a, b, c = (torch.randn(20000) for _ in range(3))
    exact = [x.double() for x in (a, b, c)]
    want = (exact[0] * exact[1] + exact[2]).float()  # float64 rounds twice, which differs from once in very few cases
    got = activations.fma(a, b, c)
    assert (got != want).sum() <= 2 and (a * b + c != want).sum() > 1000
    # 1 + 2^-24 + 2^-60: float64 drops the last term, and the tie then goes to even
    tie = activations.fma(torch.tensor(1 + 2.0**-12), torch.tensor(2.0**-12 - 2.0**-24), torch.tensor(1 - 2.0**-12 + 2.0**-24))
    assert tie.item() == float(torch.tensor(1 + 2.0**-24 - 2.0**-36, dtype=torch.float64).float())


@gpu
def test_every_reciprocal_is_rounded_correctly() -> None:
    import triton
    import triton.language as tl

    from teint8.kernels import activation

    @triton.jit
    def kernel(out, first, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        d = (first + i).to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(out + i, activation.reciprocal(d))

    out = torch.empty(2**23, device="cuda")
    for exponent in (0, 1, 7, 30, 64, 100, 124):
        first = (127 + exponent) << 23
        kernel[(2**13,)](out, first, 1024)
        d = torch.arange(first, first + 2**23, dtype=torch.int32, device="cuda").view(torch.float32)
        assert torch.equal(out, torch.ones_like(d) / d), exponent


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m,n,k", [(1, 33, 72), (2, 17, 300), (3, 40, 64), (4, 9, 4), (4, 34, 1024)])
def test_gemv(m, n, k, dtype) -> None:
    from teint8.kernels.gemv import gemv
    from teint8.kernels.quantize_long import quantize_known

    x, w, u = _values((m, k), dtype), _values((n, k), dtype), _values((n, k), dtype)
    if m > 2:
        x[1], x[2, 3] = 0, float("nan")
    bias = _values((n,), dtype)
    cpu = [t.cpu() for t in (x, w, u)]
    xc, wc, uc = (numerics.quantize(t) for t in cpu)
    on = [tuple(t.to(DEVICE) for t in pair) for pair in (xc, wc, uc)]

    def linear(weight, b):
        return ops.int8_mm(*xc, *weight, None if b is None else b.cpu(), dtype, "reference")

    for b in (None, bias):
        assert different(gemv(*on[0], *on[1], b, dtype), linear(wc, b)) == 0
        if dtype != torch.float64:
            assert different(gemv(x, None, *on[1], b, dtype), linear(wc, b)) == 0
    for kind, up in itertools.product(activations.KINDS, (True, False)):
        tops = torch.zeros(m, dtype=torch.int32, device=DEVICE)
        h = gemv(*on[0], *on[1], bias, dtype, up=(*on[2], None) if up else None, kind=kind, tops=tops)
        want = activations.value(kind, linear(wc, bias), linear(uc, None) if up else None)
        if dtype == torch.float64:
            continue  # between two matmuls float32 is what the kernel holds
        assert different(h, want) == 0, (kind, up)
        assert [different(a, b) for a, b in zip(quantize_known(h, tops), numerics.quantize(want), strict=True)] == [0, 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_dequantize(transposed, dtype) -> None:
    from teint8.kernels.dequantize import dequantize

    x = _values((70, 600), dtype, "nan")
    codes, scale = numerics.quantize(x.cpu())
    want = numerics.dequantize(codes, scale, dtype)
    inner = torch.float32 if dtype == torch.float64 else dtype
    for s in (scale, scale.repeat_interleave(2)[::2], scale[5:6].expand(70)):
        on = codes.to(DEVICE).t().contiguous().t() if transposed else codes.to(DEVICE)
        expected = want if s.numel() == 70 and s.stride(0) else numerics.dequantize(codes, s, dtype)
        got = dequantize(on, s.to(DEVICE), inner).to(dtype)
        assert different(got, expected) == 0


@pytest.mark.parametrize("axis", [-1, -2])
@pytest.mark.parametrize("activation", ["row", None])
def test_gradients_by_a_packed_weight_of_either_layout(axis, activation, device) -> None:
    w, x, g = _values((96, 64), torch.float32, device=device), _values((200, 64), torch.float32, device=device), None
    packed = teint8.QTensor.quantize(w if axis == -1 else w.t().contiguous(), axis=axis)
    leaf = x.requires_grad_()
    y = ops.linear(leaf, packed, activation=activation)
    g = torch.randn_like(y)
    (got,) = torch.autograd.grad(y, leaf, g)
    w_hat = numerics.dequantize(*numerics.quantize(w), torch.float32)
    torch.testing.assert_close(got, g @ w_hat, rtol=1e-3, atol=1e-2)
    exact = x.detach() @ w_hat.t()
    assert ((y - exact).norm() / exact.norm()) < 0.02


@pytest.mark.usefixtures("poisoned")
def test_launches_of_aligned_then_of_offset_tensors() -> None:
    """A kernel that was compiled for multiples of 16 bytes must not run what lies elsewhere."""

    def off(t: torch.Tensor) -> torch.Tensor:
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)

    x, given = _values((33, 64), torch.bfloat16), torch.rand(33, device=DEVICE) * 0.02
    seeds = torch.arange(33, device=DEVICE)
    for move in (lambda t: t, off):
        for how in ({"scale": given}, {"seed": seeds[:1]}, {}):
            moved = {name: move(t) for name, t in how.items()}
            got = ops.quantize(move(x), impl=TRITON, **moved)
            want = ops.quantize(x.cpu(), impl="reference", **{name: t.cpu() for name, t in how.items()})
            assert [different(a, b) for a, b in zip(got, want, strict=True)] == [0, 0], how
        seed = move(seeds)[5]
        got = ops.quantize_both(move(x), seed=seed, impl=TRITON)
        want = ops.quantize_both(x.cpu(), seed=seeds[5].cpu(), impl="reference")
        assert [different(a, b) for a, b in zip(got, want, strict=True)] == [0] * 4
        got = raw_both.activation(move(x), kind="silu", rows=True, values=True, seed=seed, impl=TRITON)
        want = raw_both.activation(x.cpu(), kind="silu", rows=True, values=True, seed=seeds[5].cpu(), impl="reference")
        assert [different(a, b) for a, b in zip(got, want, strict=True)] == [0] * 3
    from teint8.kernels.finish import finish

    sums = torch.randint(-999, 999, (2, 5, 64), device=DEVICE, dtype=torch.int32)
    xs, ws, bias = (torch.rand(n, device=DEVICE) for n in (5, 64, 64))
    want = (sums.sum(0).float() * ws) * xs[:, None] + bias
    for xs_, ws_, bias_ in ((xs, ws, bias), (off(xs), ws, bias), (xs, off(ws), bias), (xs, ws, off(bias))):
        assert different(finish(sums, xs_, ws_, bias_, torch.empty(5, 64, device=DEVICE)), want) == 0


@pytest.mark.parametrize("m", [1, 3, 16, 40, 64, 65, 200])
@pytest.mark.parametrize("gated", [True, False])
def test_mlp_of_any_number_of_rows(m, gated, device) -> None:
    gate, up, down = (_values(s, torch.bfloat16, device=device) for s in ((96, 64), (96, 64), (64, 96)))
    x = _values((m, 64), torch.bfloat16, device=device)
    with torch.no_grad():
        got = ops.gated_mlp(x, gate, up, down) if gated else ops.mlp(x, gate, down)
        want = ops.gated_mlp(x, gate, up, down, impl="reference") if gated else ops.mlp(x, gate, down, impl="reference")
    assert different(got, want) == 0


HOPPER_SHAPES = [
    (1, 1000, 1072, 336), (1, 77, 133, 100), (2, 128, 96, 64), (3, 70, 40, 48), (1, 1, 1, 1), (1, 300, 513, 1024),
    (1, 16, 128, 4096), (2, 5, 64, 260), (1, 200, 512, 256), (1, 70000, 64, 64), (1, 40000, 200, 48),
]  # fmt: skip


def _hopper():
    from teint8.kernels import hopper

    reason = hopper.why_not("cuda", 16) if CUDA else "no GPU"
    if reason:
        pytest.skip(reason)
    return hopper


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("name", ["wide", "square", "low", "small", "tiny", "huge"])
def test_every_hopper_tile(name) -> None:
    hopper = _hopper()
    for (b, m, n, k), (dtype, bias, residual) in itertools.product(
        HOPPER_SHAPES, [(torch.bfloat16, False, False), (torch.float32, True, False), (torch.bfloat16, True, True)]
    ):
        xq, wq = (torch.randint(-127, 128, (b, r, k), device="cuda", dtype=torch.int8) for r in (m, n))
        xs, ws = torch.rand(b, m, device="cuda"), torch.rand(b, n, device="cuda")
        ws = ws if k % 3 else ws.repeat_interleave(2, 1)[:, ::2]
        bs = torch.randn(b, n, device="cuda", dtype=dtype) if bias else None
        rs = torch.randn(b, m, n, device="cuda", dtype=dtype) if residual else None
        want = numerics.int8_mm(xq, xs, wq, ws, bs, dtype)
        want = want if rs is None else (want.float() + rs.float()).to(dtype)
        for _ in range(2):  # through the JIT, then held
            got = hopper.int8_mm(xq, xs, wq, ws, bs, dtype, residual=rs, tile=hopper.TILES[name], split=1)
            assert different(got, want) == 0, (b, m, n, k, dtype, bias, residual)
        for bias_, into in ((bs, rs), (None, rs)) if rs is not None else ():  # in the residual's memory, by TMA where it can
            exact = (numerics.int8_mm(xq, xs, wq, ws, bias_, dtype).float() + rs.float()).to(dtype)
            for _ in range(2):
                held = into.clone()
                got = hopper.int8_mm(xq, xs, wq, ws, bias_, dtype, residual=held, into=True, tile=hopper.TILES[name], split=1)
                assert got.data_ptr() == held.data_ptr() and different(got, exact) == 0, (b, m, n, k, bias_ is None)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("m,n,k", [(1, 100, 1024), (16, 4096, 14336), (64, 72, 2000), (64, 14336, 4096), (100, 520, 4096)])
def test_hopper_splits_of_k_and_two_weights(m, n, k) -> None:
    hopper = _hopper()
    xq, wq, uq = (torch.randint(-127, 128, (r, k), device="cuda", dtype=torch.int8) for r in (m, n, n))
    xs, ws, us = torch.rand(m, device="cuda"), torch.rand(n, device="cuda"), torch.rand(n, device="cuda")
    bias, ub = torch.randn(n, device="cuda").bfloat16(), torch.randn(n, device="cuda").bfloat16()
    want = ops.int8_mm(xq, xs, wq, ws, bias, torch.bfloat16, "reference")
    for split, tile in itertools.product((2, 3, 4), (hopper.SMALL, hopper.LOW, hopper.TINY)):
        got = hopper.int8_mm(xq, xs, wq, ws, bias, torch.bfloat16, tile=tile, split=split)
        assert different(got, want) == 0, (split, tile)
    if m <= 64:
        other = ops.int8_mm(xq, xs, uq, us, ub, torch.bfloat16, "reference")
        for tile in (hopper.SMALL, hopper.LOW, hopper.TINY, None):
            g, u = hopper.int8_mm(xq, xs, wq, ws, bias, torch.bfloat16, tile=tile, up=(uq, us, ub))
            assert different(g, want) == 0 and different(u, other) == 0, tile


@gpu
def test_mlps_of_two_weights_that_are_not_alike() -> None:
    x = _values((16, 64), torch.bfloat16)
    gate, up, down = (ops.quantize(_values(s, torch.bfloat16)) for s in ((128, 64), (128, 64), (64, 128)))
    strided = (up[0], up[1].repeat_interleave(2)[::2])
    bias = _values((128,), torch.bfloat16)
    from teint8.ops.mlp_function import How, infer

    other_biases = (None, bias, bias.float(), bias[:1].expand(128))
    for other, b in itertools.product((up, strided), other_biases):
        args = (x, gate, other, down, (bias, b, None))
        assert different(infer(*args, How("silu", "", "int8", "")), infer(*args, How("silu", "", "int8", "reference"))) == 0


def test_tiles_of_few_rows_have_one_consumer() -> None:
    if not CUDA:
        pytest.importorskip("triton")
    from teint8.kernels.hopper import RATES, tile_of

    for m, n, batch in itertools.product((1, 5, 16, 64), (64, 4096, 14336, 100000), (1, 2, 8)):
        assert tile_of(m, n, batch, 132).consumers == 1
    assert tile_of(16384, 14336, 1, 132) is RATES[0][0] and tile_of(16384, 14336, 1, 132, plain=False) is not RATES[0][0]
    # no tile whose rows or columns past the edges cost more than a smaller tile's
    for m, n in itertools.product((65, 128, 192, 200, 256, 384, 512, 1000), (4096, 14336, 28672)):
        tile = tile_of(m, n, 1, 132)
        assert -(-m // (64 * tile.consumers)) * 64 * tile.consumers <= 1.34 * m or m < 128, (m, n, tile)


@gpu
def test_rows_do_not_depend_on_the_batch_for_any_kernel() -> None:
    x, w = _values((300, 1024), torch.bfloat16), _values((512, 1024), torch.bfloat16)
    whole = ops.linear(x, w)
    for m in (1, 2, 4, 5, 16, 17, 33, 64, 65, 128, 200):
        assert different(ops.linear(x[:m], w), whole[:m]) == 0, m
        with torch.no_grad():
            assert different(ops.linear(x[:m], w), whole[:m]) == 0, m


def _captured(run):
    """A CUDA graph of ``run``, and the results that its replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@gpu
@pytest.mark.parametrize("m", [1, 16, 128])
def test_under_cuda_graphs(m) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 256)).cuda().bfloat16()
    x = _values((m, 256), torch.bfloat16)
    weights = [_values(s, torch.bfloat16) for s in ((512, 256), (512, 256), (256, 512))]
    with torch.no_grad(), teint8.te_int8_autocast(training=False):
        run = lambda: model(x) + ops.gated_mlp(x, *weights)
        for _ in range(2):
            run()
        graph, y = _captured(run)
        x.copy_(_values((m, 256), torch.bfloat16))
        graph.replay()
        torch.cuda.synchronize()
        assert different(y, run()) == 0


def _held_scratch() -> list:
    from teint8.kernels import scratch

    torch.cuda.synchronize()
    return list(scratch._held.values())


@gpu
def test_scratch_memory_is_left_zeroed() -> None:
    from teint8.kernels import scratch

    for m, n, stochastic in itertools.product((1, 52, 700), (1, 40, 130, 1000), (False, True)):
        x = _values((m, n), torch.bfloat16)
        for _ in range(3):
            raw_both.quantize_both(x, seed=torch.tensor(5, device="cuda") if stochastic else None)
        raw_both.activation(x, x, x, kind="silu", rows=True, columns=True, value_columns=True)
        assert _held_scratch() and not any(zeros.any() for zeros in _held_scratch())
    device = torch.device("cuda", torch.cuda.current_device())
    scratch._held.clear()
    with pytest.raises(KeyboardInterrupt), scratch.Zeros(100, device) as zeros:
        zeros.fill_(1)
        raise KeyboardInterrupt
    assert not _held_scratch()  # what an error left behind is not used again
    with scratch.Zeros(100, device) as first, scratch.Zeros(100, device) as second:
        assert first.data_ptr() != second.data_ptr()  # as two threads at once


@gpu
def test_threads_and_streams_do_not_share_scratch_memory() -> None:
    inputs = [_values((400 + 50 * i, 300), torch.bfloat16) for i in range(6)]
    want = [raw_both.quantize_both(x, impl="reference") for x in inputs]
    torch.cuda.synchronize()

    def work(i: int) -> int:
        wrong = 0
        with torch.cuda.stream(torch.cuda.Stream() if i % 2 else torch.cuda.default_stream()):
            for _ in range(30):
                got = raw_both.quantize_both(inputs[i])
                wrong += sum(different(a, b) for a, b in zip(got, want[i], strict=True))
        return wrong

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6))) == [0] * 6


@gpu
def test_a_training_step_under_cuda_graphs() -> None:
    x, weights = _values((192, 256), torch.bfloat16), [_values(s, torch.bfloat16) for s in ((512, 256), (512, 256), (256, 512))]
    leaves = [t.requires_grad_() for t in (x, *weights)]
    run = lambda: torch.autograd.grad(ops.gated_mlp(x, *weights, gradient="nearest"), leaves, torch.ones_like(x))
    graph, grads = _captured(run)
    for _ in range(3):
        with torch.no_grad():
            x.copy_(_values((192, 256), torch.bfloat16))
        graph.replay()
        assert [different(a, b) for a, b in zip(grads, run(), strict=True)] == [0] * 4


@gpu
def test_cublas_has_the_same_bits() -> None:
    xq, wq = (torch.randint(-127, 128, (r, 256), device="cuda", dtype=torch.int8) for r in (100, 64))
    xs, ws, bias = torch.rand(100, device="cuda"), torch.rand(64, device="cuda"), torch.randn(64, device="cuda")
    got = ops.int8_mm(xq, xs, wq, ws, bias, torch.bfloat16, "cublas")
    assert different(got, ops.int8_mm(xq, xs, wq, ws, bias, torch.bfloat16, "reference")) == 0


@gpu
@pytest.mark.parametrize("m", [1, 8, 64])
def test_weight_only_of_few_rows(m) -> None:
    x, w, bias = _values((m, 520), torch.bfloat16), _values((130, 520), torch.bfloat16), _values((130,), torch.bfloat16)
    y = ops.linear(x, w, bias, activation=None)
    exact = x.double() @ numerics.dequantize(*ops.quantize(w), torch.float64).t() + bias.double()
    assert ((y.double() - exact).norm() / exact.norm()) < 0.003
    packed = teint8.QTensor.quantize(w)
    assert different(ops.linear(x, packed, bias, activation=None), y) == 0


@pytest.mark.skipif(CUDA, reason="Triton's interpreter")
@pytest.mark.parametrize(("m", "n", "k"), [(1, 5, 7), (3, 34, 130), (16, 40, 256)])
def test_weight_only_in_the_interpreter(m, n, k) -> None:
    pytest.importorskip("triton")
    from teint8.kernels.weight_only import weight_only

    x, w, bias = (torch.randn(*shape).half() for shape in ((m, k), (n, k), (n,)))
    wq, ws = ops.quantize(w)
    y = weight_only(x, wq, ws, bias, x.dtype)
    exact = x.double() @ numerics.dequantize(wq, ws, torch.float64).t() + bias.double()
    assert ((y.double() - exact).norm() / exact.norm()) < 0.001


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_few_long_rows(dtype) -> None:
    x = torch.randn(5, 70001, dtype=torch.float64).to(dtype)
    x[1, 69999], x[2], x[3, 17] = float("nan"), 0.0, -float("inf")
    for given in (x, x[:, 1:], x.t().contiguous().t()):
        want = numerics.quantize(given)
        assert [different(a, b) for a, b in zip(ops.quantize(given.to(DEVICE), impl=TRITON), want, strict=True)] == [0, 0]
