"""RMSNorm and LayerNorm: kernels against the reference bit for bit, values against float64, the linears that follow one."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from contract import different

from teint8 import QTensor, norms, ops

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TRITON = "triton" if CUDA else "triton-interpreter"


def _cases():
    shapes = [(1, 1), (5, 7), (3, 300), (17, 64), (2, 129)]
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    flavours = ("normal", "shifted", "zeros", "nan", "huge", "tiny")
    flags = itertools.product((False, True), repeat=4)
    return random.Random(2).sample(list(itertools.product(shapes, dtypes, norms.KINDS, flags, flavours)), 250 if CUDA else 80)


def _values(shape, dtype, flavour):
    x = torch.randn(shape, dtype=torch.float64)
    x = {"shifted": x + 100, "zeros": x * 0, "huge": x * 1e30, "tiny": x * 1e-33}.get(flavour, x)
    if flavour == "nan":
        x[0, -1] = float("inf")
    return (x * (1e-27 if flavour == "huge" and dtype == torch.float16 else 1)).to(dtype)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape,dtype,kind,flags,flavour", _cases())
def test_kernel_has_the_bits_of_the_reference(shape, dtype, kind, flags, flavour) -> None:
    residual, affine, codes, values = flags
    x = _values(shape, dtype, flavour)
    r = torch.randn(shape).to(dtype) if residual else None
    w, b = (torch.randn(shape[1]).to(dtype) if affine else None for _ in range(2))
    run, reference = (next(i.run for i in ops.implementations("norm") if i.name == name) for name in (TRITON, "reference"))
    got = run(*(None if t is None else t.to(DEVICE) for t in (x, r, w, b)), kind, 1e-5, codes, values)
    want = reference(x, r, w, b, kind, 1e-5, codes, values)
    assert len(got) == len(want) == residual + values + 2 * codes
    assert [different(g.cpu(), t) for g, t in zip(got, want, strict=True)] == [0] * len(want)


@pytest.mark.parametrize("kind", norms.KINDS)
def test_a_program_of_several_rows_in_the_interpreter(kind) -> None:
    if CUDA:
        pytest.skip("on a GPU the kernel itself is tested")
    from teint8.kernels import norm

    x, w, b = torch.randn(10, 13), torch.randn(13), torch.randn(13)
    x[4, 2], x[7] = float("nan"), 0
    y, q, s = torch.empty(10, 13), torch.empty(10, 13, dtype=torch.int8), torch.empty(10)
    flags = (kind == "layer", False, True, True, True, True, norm._DTYPES[torch.float32], 16, False, 3)
    norm._norm_kernel[(3, 1, 1)](x, x, w, b, x, y, q, s, 10, 13, 1e-5, 13, 13, *flags)
    want = next(i.run for i in ops.implementations("norm") if i.name == "reference")(x, None, w, b, kind, 1e-5, True, True)
    assert [different(g, t) for g, t in zip((y, q, s), want, strict=True)] == [0, 0, 0]


@pytest.mark.parametrize("kind", norms.KINDS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("shape,dtype", [((2500, 4096), torch.bfloat16), ((1100, 5000), torch.float16), ((1100, 4096), torch.float32)])
def test_several_rows_a_program(shape, dtype, residual, kind) -> None:
    if not CUDA:
        pytest.skip("of a GPU alone")
    x, r = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype) if residual else None
    x[1::7, 3], x[2::5] = float("nan"), 0
    w, b = (torch.randn(shape[1]).to(dtype) for _ in range(2))
    run, reference = (next(i.run for i in ops.implementations("norm") if i.name == name) for name in (TRITON, "reference"))
    got = run(*(None if t is None else t.to(DEVICE) for t in (x, r, w, b)), kind, 1e-5, True, True)
    want = reference(x, r, w, b, kind, 1e-5, True, True)
    assert [different(g.cpu(), t) for g, t in zip(got, want, strict=True)] == [0] * len(want)


@pytest.mark.parametrize("kind", norms.KINDS)
@pytest.mark.parametrize("scale,shift", [(1.0, 0.0), (1e-3, 1.0), (1e15, 0.0), (1e-12, 0.0)])
def test_values_are_those_of_float64(kind, scale, shift, device) -> None:
    x = (torch.randn(50, 777, device=device, dtype=torch.float64) * scale + shift).float()
    w, b = torch.randn(777, device=device), torch.randn(777, device=device)
    form = F.layer_norm if kind == "layer" else F.rms_norm
    want = form(x.double(), (777,), w.double(), eps=1e-6) + b.double()
    bound = 1e-3 if kind == "layer" and shift else 5e-6  # x - mean cancels: float32's own error, as torch has it
    assert (ops.norm(x, w, b, kind=kind, eps=1e-6) - want).abs().max() < bound


def test_the_sum_has_no_order() -> None:
    x = torch.randn(4, 999)
    order = torch.randperm(999)
    for kind in norms.KINDS:
        assert torch.equal(norms.value(kind, x, None, None, 1e-6)[:, order], norms.value(kind, x[:, order], None, None, 1e-6))


@pytest.mark.parametrize("kind", norms.KINDS)
def test_gradients_of_a_half_by_a_weight_in_float32(kind, device) -> None:
    torch.manual_seed(0)
    x, w, dy = (
        torch.randn(60, 40, device=device).bfloat16(),
        torch.randn(40, device=device),
        torch.randn(60, 40, device=device).bfloat16(),
    )
    form = F.layer_norm if kind == "layer" else F.rms_norm
    leaves, wide = [t.clone().requires_grad_() for t in (x, w)], [t.double().requires_grad_() for t in (x, w)]
    got = torch.autograd.grad(ops.norm(*leaves, kind=kind, eps=1e-5), leaves, dy)
    want = torch.autograd.grad(form(wide[0], (40,), wide[1], eps=1e-5), wide, dy.double())
    for g, t, bound in zip(got, want, (5e-3, 1e-5), strict=True):
        assert float((g - t).norm() / t.norm()) < bound
    assert got[1].dtype == torch.float32


@pytest.mark.parametrize("kind", norms.KINDS)
@pytest.mark.parametrize("functional", [False, True])
def test_gradients(kind, functional, device) -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(6, 40, device=device), torch.randn(40, device=device), torch.randn(40, device=device)
    form = F.layer_norm if kind == "layer" else F.rms_norm

    def loss(run, *args):
        return (run(*args) * torch.arange(40, device=device)).square().mean()

    ours = lambda x, w, b: ops.norm(x, w, b, kind=kind, eps=1e-5)
    exact = lambda x, w, b: form(x, (40,), w, eps=1e-5) + b
    if functional:
        got = torch.func.grad(lambda t: loss(ours, *t))((x, w, b))
        _, tangent = torch.func.jvp(lambda t: loss(ours, *t), ((x, w, b),), ((x, w, b),))
        assert torch.allclose(tangent, sum((g * t).sum() for g, t in zip(got, (x, w, b), strict=True)), rtol=1e-3)
        each = torch.func.vmap(lambda t: ours(t[None], w, b)[0])(x)
        assert torch.equal(each, ours(x, w, b))
        stacked = torch.func.vmap(lambda v: ours(x, v, b))(torch.stack([w, 2 * w]))
        assert torch.equal(stacked[0], ours(x, w, b)) and torch.equal(stacked[1], ours(x, 2 * w, b))
        hvp = torch.func.jvp(torch.func.grad(lambda t: loss(ours, t, w, b)), (x,), (x,))[1]
        want = torch.func.jvp(torch.func.grad(lambda t: loss(exact, t, w, b)), (x,), (x,))[1]
        torch.testing.assert_close(hvp, want, rtol=1e-3, atol=1e-2)
    else:
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        got = torch.autograd.grad(loss(ours, *leaves), leaves)
        compiled = torch.compile(ours, fullgraph=True)
        for a, g in zip(torch.autograd.grad(loss(compiled, *leaves), leaves), got, strict=True):
            torch.testing.assert_close(a, g, rtol=1e-4, atol=1e-3)
            assert a.abs().sum() > 0
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    for g, e in zip(got, torch.autograd.grad(loss(exact, *leaves), leaves), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", norms.KINDS)
@pytest.mark.parametrize("m", [1, 5, 130])
def test_norm_linear_has_the_bits_of_its_parts(m, kind, dtype, device) -> None:
    x, r = (torch.randn(m, 64, device=device, dtype=dtype) for _ in range(2))
    nw, nb = (torch.randn(64, device=device, dtype=dtype) for _ in range(2))
    ws = [torch.randn(n, 64, device=device, dtype=dtype) for n in (96, 32)]
    bias = torch.randn(32, device=device, dtype=dtype)
    h = ops.norm(x + r, nw, nb, kind=kind)
    want = (ops.linear(h, ws[0]), ops.linear(h, ws[1], bias), x + r)
    with torch.no_grad():
        got = ops.norm_linear(x, nw, ws, [None, bias], norm_bias=nb, kind=kind, residual=r)
        packed = ops.norm_linear(x, nw, [QTensor.quantize(w) for w in ws], [None, bias], norm_bias=nb, kind=kind, residual=r)
    leaves = [w.clone().requires_grad_() for w in ws]
    trained = ops.norm_linear(x, nw, leaves, [None, bias], norm_bias=nb, kind=kind, residual=r, gradient="nearest")
    for made in (got, packed, trained):
        assert [different(a, b) for a, b in zip(made, want, strict=True)] == [0, 0, 0]
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(trained[0].sum() + trained[1].sum(), leaves))


def test_errors_name_what_is_wrong() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(ValueError, match="kind is 'batch'"):
        ops.norm(x, kind="batch")
    with pytest.raises(ValueError, match=r"weight is .* \(7,\)"):
        ops.norm(x, torch.ones(7))
    with pytest.raises(TypeError, match="int64"):
        ops.norm(x.long())
    with pytest.raises(ValueError, match="residual is"):
        ops.norm_linear(x, None, [torch.ones(3, 8)], residual=x[:1])
    with pytest.raises(ValueError, match="1 weights but 2 biases"):
        ops.norm_linear(x, None, [torch.ones(3, 8)], [None, None])
