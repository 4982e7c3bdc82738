"""Scales by block along K: every implementation by bits, derivatives against the STE in float64, packed weights, routing."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from contract import different
from grid import relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap

import teint8
from teint8 import Policy, QTensor, Quant, Rule, numerics, ops, te_int8_autocast
from teint8.ops import registry
from teint8.ops.raw_blocks import dequantize_blocks, int8_block_mm, quantize_blocks

CUDA = torch.cuda.is_available()


def _policy(block: int = 32, **more) -> Policy:
    by_block = Quant(granularity="block", block=block)
    return Policy([Rule(weight=by_block, activation=by_block, **more)])


def _names(device: str, m: int, n: int, k: int, block: int) -> list[str]:
    problem = registry.Problem(device, torch.float32, 1, m, n, k, (block,))
    return [i.name for i in registry.implementations("block_mm") if registry.why_not(i, problem) is None and i.name != "reference"]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if CUDA else [])])
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    m=st.integers(1, 150), n=st.integers(1, 90), k=st.integers(1, 300), block=st.sampled_from(numerics.BLOCKS),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    flavour=st.sampled_from(("normal", "nan", "huge", "zeros")), bias=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_every_implementation_has_the_bits_of_the_reference(device, m, n, k, block, dtype, flavour, bias, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(rows, k, generator=generator, dtype=torch.float64) for rows in (m, n))
    if flavour == "nan":
        x[seed % m, seed % k], w[0, -1] = float("nan"), float("inf")
    x = x * {"huge": 1e4, "zeros": 0.0}.get(flavour, 1.0)
    x, w = x.to(dtype), w.to(dtype)
    b = torch.randn(n, generator=generator).to(dtype) if bias else None
    codes = (*quantize_blocks(x, block, "reference"), *quantize_blocks(w, block, "reference"))
    want = int8_block_mm(*codes, b, block, dtype, "reference")
    moved = [t.to(device) for t in codes]
    for a, c in zip(quantize_blocks(x.to(device), block), codes[:2], strict=True):
        assert different(a, c) == 0
    for name in _names(device, m, n, k, block):
        assert different(int8_block_mm(*moved, None if b is None else b.to(device), block, dtype, name), want) == 0, name


def test_the_definition() -> None:
    """Against the formula written out, and against one scale a row where there is one block."""
    torch.manual_seed(0)
    x, w = torch.randn(5, 70), torch.randn(4, 70)
    (xq, xs), (wq, ws) = quantize_blocks(x, 32), quantize_blocks(w, 32)
    assert xs.shape == (5, 3) and torch.equal(xs[:, 2], numerics.quantize(x[:, 64:])[1])
    y = torch.zeros(5, 4)
    for b, (p, q) in enumerate(zip(xq.split(32, 1), wq.split(32, 1), strict=True)):
        y = y + ((p.double() @ q.double().mT).float() * ws[:, b]) * xs[:, b, None]
    assert torch.equal(int8_block_mm(xq, xs, wq, ws, None, 32, torch.float32), y)
    exact = dequantize_blocks(xq, xs, 32, torch.float64) @ dequantize_blocks(wq, ws, 32, torch.float64).mT
    assert relative_error(y, exact) < 1e-6
    one = ops.linear(x[:, :32], w[:, :32], weight_granularity="block32", activation="block32")
    assert different(one, ops.linear(x[:, :32], w[:, :32])) == 0


def test_blocks_tame_outliers() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(64, 512), torch.randn(32, 512)
    x[:, 7] *= 200
    exact = x @ w.mT
    errors = [
        relative_error(
            ops.linear(x, w, weight_granularity=g, activation=g) - x[:, 7:8] @ w[:, 7:8].mT, exact - x[:, 7:8] @ w[:, 7:8].mT
        )
        for g in ("row", "block128", "block32")
    ]
    assert errors[0] > 1.9 * errors[1] and errors[1] > 1.5 * errors[2], errors


def ste(x: Tensor, w: Tensor, bias: Tensor | None, weight: str, activation: str, block: int) -> Tensor:
    """The linear in float64 of values on their grid, which move with the floats."""

    def hat(t: Tensor, how: str) -> Tensor:
        with torch.no_grad():
            flat = t.reshape(-1, t.shape[-1])
            if how == "row":
                codes, scale = numerics.quantize(flat)
                value = codes.double() * scale.double()[:, None]
            else:
                value = dequantize_blocks(*quantize_blocks(flat, block, "reference"), block, torch.float64)
        return t + (value.view(t.shape) - t).detach()

    y = hat(x, activation) @ hat(w, weight).mT
    return y if bias is None else y + bias


HOWS = [("block32", "block32"), ("block32", "row"), ("row", "block32")]
TRANSFORMS = {
    "grad": lambda f, x, w, b: grad(f, (0, 1, 2))(x, w, b),
    "vmap(grad)": lambda f, x, w, b: vmap(grad(f, (0, 1)), (0, None, None))(x, w, b),
    "vmap over weights": lambda f, x, w, b: vmap(grad(f, (0, 1)), (None, 0, None))(x, torch.stack([w, 2 * w]), b),
    "jvp": lambda f, x, w, b: jvp(f, (x, w, b), (x.cos(), w.sin(), b.cos()))[1],
    "hvp": lambda f, x, w, b: jvp(grad(f, 1), (x, w, b), (x.cos(), w.sin(), b.cos()))[1],
    "hessian": lambda f, x, w, b: hessian(lambda t: f(x[:2], w, t))(b),
}


@pytest.mark.parametrize("how", HOWS, ids="-".join)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_against_the_ste(transform: str, how, device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(s, generator=generator, dtype=torch.float64).to(device) for s in ((6, 70), (5, 70), (5,)))
    weight, activation = how
    mine = lambda x, w, b: ops.linear(x, w, b, weight_granularity=weight, activation=activation).tanh().square().sum()
    want = lambda x, w, b: ste(x, w, b, weight, activation, 32).tanh().square().sum()
    run = TRANSFORMS[transform]
    assert relative_error(run(mine, x, w, b), run(want, x, w, b)) < 2e-6


@pytest.mark.parametrize("transform", ["grad", "vmap(grad)", "jvp", "hvp"])
def test_compiled_equals_eager(transform: str) -> None:
    torch._dynamo.reset()
    x, w, b = torch.randn(6, 70), torch.randn(5, 70), torch.randn(5)
    f = lambda x, w, b: ops.linear(x, w, b, weight_granularity="block32", activation="block32").tanh().square().sum()
    run = lambda x, w, b: TRANSFORMS[transform](f, x, w, b)
    assert relative_error(torch.compile(run, fullgraph=True)(x, w, b), run(x, w, b)) < 1e-5


@pytest.mark.parametrize("granularity", ["row", "block"])
def test_int8_backward(granularity: str, device: str) -> None:
    x, w = torch.randn(40, 70, device=device), torch.randn(50, 70, device=device)
    d = torch.randn(40, 50, device=device)
    how = dict(weight_granularity="block32", activation="block32", gradient="nearest")
    how |= dict(gradient_granularity="block32") if granularity == "block" else {}
    leaves = [t.clone().requires_grad_() for t in (x, w)]
    dx, dw = torch.autograd.grad((ops.linear(*leaves, **how) * d).sum(), leaves)
    by = (lambda t: quantize_blocks(t, 32)) if granularity == "block" else None
    w_hat = dequantize_blocks(*quantize_blocks(w, 32), 32, w.dtype)
    if by is not None:
        assert different(dx, int8_block_mm(*by(d), *by(w_hat.mT.contiguous()), None, 32, d.dtype)) == 0
    assert relative_error(dx, d @ w) < 0.02 and relative_error(dw, d.mT @ x) < 0.02
    float_dw = torch.autograd.grad((ops.linear(*leaves, **how, wgrad="float") * d).sum(), leaves[1])[0]
    assert relative_error(float_dw, d.mT @ dequantize_blocks(*quantize_blocks(x, 32), 32, x.dtype)) < 1e-5
    with pytest.raises(RuntimeError, match="second derivative"):
        moving = d.clone().requires_grad_()
        first = torch.autograd.grad((ops.linear(*leaves, **how) * moving).sum(), leaves, create_graph=True)
        first[0].square().sum().backward()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.attention, self.w = (
            nn.Linear(70, 64),
            nn.MultiheadAttention(64, 4, batch_first=True),
            nn.Parameter(torch.randn(64, 48)),
        )

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.a(x))
        y: Tensor = self.attention(h, x[..., :64], h, need_weights=False)[0] @ self.w
        return y


@pytest.mark.parametrize("block", numerics.BLOCKS)
def test_train_equals_serve(block: int, device: str) -> None:
    torch.manual_seed(0)
    net, x = Net().to(device), torch.randn(2, 9, 70, device=device)
    qfn, params = teint8.quantize(net, _policy(block)), dict(net.named_parameters())
    want = qfn(params, x)
    for packed in (teint8.pack(qfn, params), teint8.pack(qfn, params, x)):
        assert {k for k, v in packed.items() if isinstance(v, QTensor)} >= {"a.weight", "attention.in_proj_weight"}
        assert packed["a.weight"].block == (block if block < 128 else 0) and packed["a.weight"].scale.shape == (64, -(-70 // block))
        assert different(qfn(packed, x), want) == 0
    assert different(qfn(teint8.pack(qfn, params, x), x), want) == 0
    with torch.no_grad():
        for _ in range(2):
            with te_int8_autocast(training=False, policy=_policy(block)):
                assert different(net(x), want) == 0
    with te_int8_autocast(policy=_policy(block)):
        assert different(net(x), want) == 0
    receipt = teint8.explain(qfn, params, x)
    assert receipt.int8_calls == receipt.calls == 6 and all(r.sqnr > 30 for r in receipt)  # type: ignore[operator]
    unpacked = teint8.unpack(teint8.pack(qfn, params, x))
    assert relative_error(functional_call(net, unpacked, (x,)), net(x)) < 0.02
    float_w = Policy([Rule(weight=Quant(granularity="block", block=block), activation=None)])
    only = teint8.quantize(net, float_w)
    assert relative_error(only(teint8.pack(only, params, x), x), only(params, x)) < 1e-6


@pytest.mark.parametrize("backend", ["inductor", "teint8"])
def test_compiled_has_the_bits_of_eager(backend: str, device: str) -> None:
    torch._dynamo.reset()
    net, x = nn.Linear(70, 64).to(device), torch.randn(9, 70, device=device)
    qfn, params = teint8.quantize(net, _policy()), {k: v.detach() for k, v in net.named_parameters()}
    if backend == "inductor":
        got = torch.compile(lambda p, x: qfn(p, x), fullgraph=True)(params, x)
    else:
        with torch.no_grad():
            got = torch.compile(net, backend="teint8", options={"policy": _policy()}, fullgraph=True)(x)
    assert different(got, qfn(params, x)) == 0


def test_what_has_no_blocks_says_so() -> None:
    conv, x = nn.Conv1d(3, 4, 3), torch.randn(2, 3, 9)
    receipt = teint8.explain(teint8.quantize(conv, _policy()), dict(conv.named_parameters()), x)
    assert receipt.records[0].reason.startswith("convolutions have no blocks")
    batched = teint8.quantize(lambda p, x: x @ p["w"], _policy())
    receipt = teint8.explain(batched, {"w": torch.randn(2, 8, 4)}, torch.randn(2, 3, 8))
    assert receipt.records[0].reason == "blocks are for weights of two dimensions, not 3"


def test_packed_weights_by_block(tmp_path) -> None:
    for axis, k in itertools.product((-1, -2), (70, 64, 300)):
        w = torch.randn(6, k) if axis == -1 else torch.randn(k, 6)
        q = QTensor.quantize(w, axis=axis, granularity="block64")
        assert q.block == (64 if k > 64 else 0) and q.scale.shape[axis] == -(-k // 64)
        rows = w if axis == -1 else w.mT
        want = dequantize_blocks(*quantize_blocks(rows, 64), 64, w.dtype)
        assert torch.equal(q.dequantize(), want if axis == -1 else want.mT)
        torch.save(q, tmp_path / "q.pt")
        again = torch.load(tmp_path / "q.pt")
        assert again.block == q.block and torch.equal(again.dequantize(), q.dequantize())
    with pytest.raises(ValueError, match="has a scale for each 64 values of a row"):
        QTensor.quantize(torch.randn(6, 300), granularity="block64").rows()
    with pytest.raises(ValueError, match="scale has shape"):
        QTensor(torch.ones(6, 300, dtype=torch.int8), torch.ones(6, 7))


@pytest.mark.parametrize(
    "make,match",
    [
        (lambda: Quant(granularity="block", block=48), "block is 48"),
        (lambda: Rule(weight=Quant("block", block=32), activation=Quant("block", block=64)), "blocks of 32 and 64 values"),
        (lambda: Rule(gradient=Quant("block")), "neither weight nor activation"),
        (lambda: Rule(weight=Quant("block"), gradient=Quant(rounding="stochastic")), "stochastic rounding has no blocks"),
        (lambda: Rule(activation=Quant("block", "static")), "a static scale is one for all"),
        (lambda: ops.linear(torch.ones(2, 64), torch.ones(2, 3, 64), weight_granularity="block32"), "a batched weight"),
        (lambda: ops.linear(torch.ones(2, 64), torch.ones(3, 64), weight_granularity="block32", activation="block64"), "of 32 and 64"),
    ],
)
def test_bad_input(make, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


def test_a_policy_that_did_not_pack_the_weights_is_refused() -> None:
    """Bits of neither policy would come out: train = serve is a promise of one."""
    layer, x = nn.Linear(70, 8), torch.randn(2, 70)
    params = dict(layer.named_parameters())
    by_row, by_block = teint8.quantize(layer), teint8.quantize(layer, _policy(32))
    with pytest.raises(ValueError, match=r"weight was packed with a scale for each row, and its rule wants Quant\('block', block=32\)"):
        by_block(teint8.pack(by_row, params), x)
    with pytest.raises(ValueError, match=r"weight was packed with a scale for each 32 values, and its rule wants Quant\('row'\)"):
        by_row(teint8.pack(by_block, params), x)
    assert [r.mode for r in teint8.explain(by_block, params, x)] == ["W8A8 by 32"]
