"""einsum, tensordot and inner by a weight are the matmul that they are, and torch's own where they are none."""

import pytest
import torch
from contract import different
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import teint8
from teint8 import Policy, QTensor, Rule, te_int8_autocast

SIZES = {"a": 2, "b": 3, "c": 4, "k": 8, "n": 5}


@settings(max_examples=150, deadline=None)
@given(
    letters=st.permutations("abck"),
    used=st.integers(0, 3),
    weight=st.permutations("kn"),
    order=st.randoms(use_true_random=False),
    first=st.booleans(),
    implicit=st.booleans(),
)
def test_einsum_in_every_order(letters: list[str], used: int, weight: list[str], order: object, first: bool, implicit: bool) -> None:
    batch = [c for c in letters if c != "k"][:used]
    terms = [c for c in letters if c == "k" or c in batch]
    out = [*batch, "n"]
    order.shuffle(out)  # type: ignore[attr-defined]
    if implicit:
        out = sorted(out)
    x, w = (torch.randn(*(SIZES[c] for c in t)) for t in (terms, weight))
    sides = [("".join(weight), w), ("".join(terms), x)] if first else [("".join(terms), x), ("".join(weight), w)]
    equation = f"{sides[0][0]},{sides[1][0]}" + ("" if implicit else f" -> {''.join(out)}")

    def run(p: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum(equation, *((p, x) if first else (x, p)))

    qfn = teint8.quantize(run)
    y = qfn(w, x)
    assert different(y, run_of_linear(equation, terms, weight, out, x, w)) == 0
    torch.testing.assert_close(y, run(w, x), rtol=0.1, atol=0.3)
    packed = teint8.pack(qfn, w, x)
    assert isinstance(packed, QTensor) and different(qfn(packed, x), y) == 0
    assert [(r.m * r.n * r.k, r.int8) for r in teint8.explain(qfn, w, x)] == [(x.numel() * 5, True)]


def run_of_linear(equation: str, terms: list[str], weight: list[str], out: list[str], x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    rows = [c for c in terms if c != "k"]
    y = teint8.ops.linear(x.permute([*(terms.index(c) for c in rows), terms.index("k")]), w if weight == ["n", "k"] else w.mT)
    return y.permute([[*rows, "n"].index(c) for c in out])


CALLS = {
    "einsum": lambda x, p: torch.einsum("bsd,de->bes", x, p),
    "einsum of a list": lambda x, p: torch.einsum("bsd,ed->bse", [x, p]),
    "tensordot": lambda x, p: torch.tensordot(x, p, dims=1),
    "tensordot over dims": lambda x, p: torch.tensordot(x, p, dims=([2], [-1])),
    "inner": lambda x, p: torch.inner(x, p),
}


@pytest.mark.parametrize("name", CALLS)
def test_gradients_and_compiled_code(name: str, device: str) -> None:
    call, x, w = CALLS[name], torch.randn(2, 3, 8, device=device), torch.randn(8, 8, device=device)
    qfn = teint8.quantize(lambda p, x: call(x, p))
    straight = teint8.quantize(lambda p, x: call(x, p), Policy.simulate())
    for transform in (
        lambda f: torch.func.grad(lambda p, x: f(p, x).square().sum(), (0, 1))(w, x),
        lambda f: torch.func.jvp(f, (w, x), (w + 1, x - 1)),
        lambda f: (torch.func.vmap(lambda x: f(w, x))(torch.stack((x, 2 * x))),),
    ):
        for a, b in zip(transform(qfn), transform(straight), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
            assert float(a.norm()) > 0
        torch._dynamo.reset()
        for a, b in zip(torch.compile(lambda t=transform: t(qfn), fullgraph=True)(), transform(qfn), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_where_a_rule_says_so_it_is_torchs_own() -> None:
    x, w = torch.randn(2, 3, 8), nn.Parameter(torch.randn(8, 8))
    for name, call in CALLS.items():
        want = call(x, w)
        with te_int8_autocast() as outer, te_int8_autocast(enabled=False):
            assert torch.equal(call(x, w), want), name
        with te_int8_autocast(policy=Policy([Rule(weight=None)])) as context:
            assert torch.equal(call(x, w), want), name
        assert outer.receipt.calls == context.receipt.int8_calls == 0 and context.receipt.calls == 1
        with te_int8_autocast() as context:  # between activations
            assert torch.equal(call(x, w.detach()), want), name
        assert context.receipt.int8_calls == 0


def test_what_is_broadcast_and_weights_that_come_first_stay_float_and_are_on_the_receipt() -> None:
    w, x, one = nn.Parameter(torch.randn(8, 5)), torch.randn(3, 8), torch.randn(3, 1)
    want = one * w.sum(0), w.t() @ x.t(), w.t() @ x.t()
    with te_int8_autocast() as ctx:
        got = torch.einsum("bk,kn->bn", one, w), torch.tensordot(w, x, ([0], [1])), torch.inner(w.t(), x)
    torch.testing.assert_close(got, want)
    assert [(r.int8, r.reason.split(":")[0]) for r in ctx.receipt] == [
        (False, "1 features by 8"),
        (False, "the weight comes first"),
        (False, "the weight comes first"),
    ]


def test_bilinear(device: str) -> None:
    layer = nn.Bilinear(6, 10, 4).to(device)
    a, b = torch.randn(3, 5, 6, device=device), torch.randn(3, 5, 10, device=device)
    qfn, params = teint8.quantize(layer), dict(layer.named_parameters())
    (record,) = teint8.explain(qfn, params, a, b)
    assert (record.path, record.op, record.m, record.n, record.k, record.int8) == ("weight", "matmul", 15, 24, 10, True)
    y, exact = qfn(params, a, b), layer(a, b)
    assert 0 < float((y - exact).norm() / exact.norm()) < 0.03
    for packed in (teint8.pack(qfn, params), teint8.pack(qfn, params, a, b)):
        assert isinstance(packed["weight"], QTensor) and different(qfn(packed, a, b), y) == 0
    for training in (True, False):
        with torch.no_grad(), te_int8_autocast(training=training):
            assert different(layer(a, b), y) == 0
    codes = teint8.numerics.quantize(params["weight"].detach().flatten(0, 1))
    w_hat = teint8.numerics.dequantize(*codes).view(4, 6, 10)
    x_hat = teint8.numerics.dequantize(*teint8.numerics.quantize(b.flatten(0, 1))).view_as(b)
    got = torch.autograd.grad(y.square().sum(), [layer.weight, layer.bias])
    g = 2 * y.detach()
    torch.testing.assert_close(got[0], torch.einsum("bso,bsi,bsj->oij", g, a, x_hat), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y, torch.einsum("bsi,oij,bsj->bso", a, w_hat, x_hat) + layer.bias, rtol=1e-4, atol=1e-4)
    whole = teint8.quantize(layer, Policy([Rule(weight=teint8.Quant(granularity="tensor"))]))
    assert torch.equal(whole(params, a, b), exact)
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(qfn, fullgraph=True)(params, a, b), y)
