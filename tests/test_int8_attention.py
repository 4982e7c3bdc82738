"""INT8 attention: every implementation by bits, its error, derivatives against the STE written in float64, routing."""

import math

import pytest
import torch
import torch.nn.functional as F
from contract import different
from grid import relative_error
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap

import teint8
from teint8 import Policy, Quant, Rule, numerics, ops, te_int8_autocast
from teint8.ops import registry
from teint8.ops.raw_attention import int8_attention, problem_of

CUDA = torch.cuda.is_available()
POLICY = Policy([Rule(ops=("linear", "attention"))])

# batch, heads, heads of keys, rows, keys, width of keys, width of values, causal, mask, dtype
SHAPES = [
    (1, 2, 1, 40, 50, 32, 32, False, "", torch.float32),
    (2, 2, 2, 64, 64, 64, 64, True, "", torch.bfloat16),
    (1, 4, 2, 33, 70, 40, 24, True, "float", torch.float32),
    (1, 1, 1, 70, 33, 40, 24, True, "", torch.float16),
    (1, 2, 1, 3, 1100, 16, 16, False, "bool", torch.float32),
    (1, 1, 1, 1, 1, 1, 1, False, "", torch.float32),
    (3, 1, 1, 1, 300, 128, 128, False, "keys", torch.float64),
    (1, 2, 2, 66, 129, 64, 72, False, "rows", torch.bfloat16),
    (1, 2, 2, 129, 128, 128, 128, True, "", torch.float32),
]  # fmt: skip


def operands(b, h, g, m, s, d, e, causal, mask, dtype, flavour="normal") -> tuple[list[Tensor], Tensor | None]:
    generator = torch.Generator().manual_seed(m + s)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((b, h, m, d), (b, g, s, d), (b, g, s, e)))
    if flavour == "huge":
        q, k, v = q * 1e3, k * 1e3, v * 1e3
    if flavour == "nan":
        q[0, 0, m // 2], k[-1, -1, s // 3, 0], v[0, 0, 0, -1] = math.nan, math.nan, math.nan
    if flavour == "zeros":
        q, k = q * 0, k * 0
    q, k, v = (t.to(dtype) for t in (q, k, v))
    if not mask:
        return [q, k, v], None
    if mask == "bool":
        return [q, k, v], torch.rand(b, 1, m, s, generator=generator) > 0.4
    if mask == "keys":
        return [q, k, v], (torch.rand(b, 1, 1, s, generator=generator) > 0.4)
    if mask == "rows":  # whole rows are masked, and one is not finite
        seen = torch.zeros(m, s).masked_fill(torch.rand(m, 1, generator=generator) > 0.7, -math.inf)
        seen[m // 2, 0] = math.inf
        return [q, k, v], seen
    seen = torch.randn(b, h, m, s, generator=generator).to(dtype)
    return [q, k, v], seen.masked_fill(torch.rand(b, 1, m, s, generator=generator) > 0.8, -math.inf)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("flavour", ["normal", "nan"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s[:8])))
def test_every_implementation_has_the_bits_of_the_reference(shape, flavour, device: str) -> None:
    _compare(shape, flavour, device)


@pytest.mark.parametrize("flavour", ["huge", "zeros"])
def test_other_values(flavour: str, device: str) -> None:
    _compare(SHAPES[2], flavour, device)


def _compare(shape, flavour: str, device: str) -> None:
    (q, k, v), mask = operands(*shape, flavour)
    causal, dtype = shape[7], shape[9]
    (qc, qs), (kc, ks), (vc, vs) = (ops.quantize(t, impl="reference") for t in (q, k, v.mT))
    floats = None if mask is None else mask if mask.is_floating_point() else torch.zeros(mask.shape).masked_fill(~mask, -math.inf)
    given = (qc, qs, kc, ks, vc, vs, floats)
    want = int8_attention(*given, causal, q.shape[-1] ** -0.5, dtype, "reference")
    moved = [None if t is None else t.to(device) for t in given]
    problem = problem_of(qc.shape, vc.shape, device, dtype)
    names = [i.name for i in registry.implementations("attention") if registry.why_not(i, problem) is None and i.name != "reference"]
    assert CUDA or "triton-interpreter" in names
    assert device == "cpu" or "triton" in names
    for name in names:
        assert different(int8_attention(*moved, causal, q.shape[-1] ** -0.5, dtype, name), want) == 0, name


@pytest.mark.skipif(not CUDA, reason="no GPU")
@pytest.mark.parametrize("causal", [False, True])
def test_every_tile_on_the_gpu(causal: bool) -> None:
    from teint8.kernels import attention

    for d, s in ((64, 1024), (128, 777), (96, 640)):
        q, k, v = (torch.randn(2, 3, s, d, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        codes = (*ops.quantize(q), *ops.quantize(k), *ops.quantize(v.mT))
        want = int8_attention(*codes, None, causal, d**-0.5, q.dtype, "reference")
        for tile in {attention.config_of(w, masked, major) for w in (64, 128, 256) for masked in (False, True) for major in (8, 9)}:
            for _ in range(2):  # through the JIT, then held
                assert different(attention.attention(*codes, None, causal, d**-0.5, q.dtype, tile), want) == 0, tile


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [64, 128])
@pytest.mark.parametrize("s", [256, 1024])
def test_error_to_float64_on_normal_values(s: int, d: int, causal: bool, device: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, s, d, device=device) for _ in range(3))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=causal)
    error = float((ops.attention(q, k, v, is_causal=causal) - exact).norm() / exact.norm())
    assert error < 0.02, error


@pytest.mark.skipif(CUDA, reason="the interpreter's tensors are on the CPU")
def test_a_tile_is_a_block_wide() -> None:
    from teint8.kernels import attention
    from teint8.kernels.tiles import Tile

    q, v = ops.quantize(torch.ones(1, 1, 2, 32)), ops.quantize(torch.ones(1, 1, 32, 2))
    with pytest.raises(ValueError, match="the tile is 64 keys wide; 128 share a level"):
        attention.attention(*q, *q, *v, None, False, 1.0, torch.float32, Tile(16, 64, 4, 2))


@pytest.mark.parametrize("d", [64, 128])
def test_error_does_not_grow_with_the_keys(d: int, device: str) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, s, d, device=device) for s in (32, 32768, 32768))
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert relative_error(ops.attention(q, k, v), exact) < 0.02


@pytest.mark.parametrize("impl", ["reference", ""])
def test_the_weights_of_blocks_far_apart(impl: str, device: str) -> None:
    """A block whose scores are far below or above those of the others keeps its place: the sum follows the larger level."""
    q = torch.ones(1, 1, 1, 4, device=device)
    k = torch.cat([torch.full((128, 4), level, device=device) for level in (1.0, -200.0, 3.0, 2.9)])[None, None]
    v = torch.randn(1, 1, 512, 3, device=device)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=1.0)
    assert relative_error(ops.attention(q, k, v, scale=1.0, impl=impl), exact) < 0.02


@pytest.mark.parametrize("shape", [(0, 2, 3, 4, 8), (1, 0, 3, 4, 8), (1, 2, 0, 4, 8), (1, 2, 3, 0, 8), (1, 2, 3, 4, 0)])
def test_empty(shape, device: str) -> None:
    b, h, m, s, d = shape
    q, k, v = torch.randn(b, h, m, d, device=device), *(torch.randn(b, h, s, d, device=device) for _ in range(2))
    y = ops.attention(q, k, v, scale=1.0)
    assert y.shape == (b, h, m, d) and int(y.count_nonzero()) == 0


def test_a_result_does_not_depend_on_the_rest_of_the_batch(device: str) -> None:
    q, k, v = (torch.randn(3, 2, 40, 32, device=device) for _ in range(3))
    whole = ops.attention(q, k, v)
    for i in range(3):
        assert different(ops.attention(*(t[i : i + 1] for t in (q, k, v))), whole[i : i + 1]) == 0
    assert different(ops.attention(q[:, :, 7:9], k, v), whole[:, :, 7:9]) == 0  # nor on other rows
    # and keys that are masked behind the others change nothing but what V's channels are scaled by
    mask = torch.ones(40, dtype=torch.bool, device=device)
    mask[30:] = False
    assert different(ops.attention(q, k, v, mask), ops.attention(q, k, v, mask.expand(3, 1, 40, 40))) == 0


def ste(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    """Softmax attention of dequantized q, k and v whose derivatives are those of the floats."""

    def hat(x: Tensor) -> Tensor:
        with torch.no_grad():
            codes, scale = numerics.quantize(x.reshape(-1, x.shape[-1]))
        return x + ((codes.double() * scale.double().unsqueeze(-1)).view(x.shape) - x).detach()

    q, k, v = hat(q), hat(k), hat(v.mT).mT
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    scores = scores if mask is None else scores + mask
    if causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(), -math.inf)
    return scores.softmax(-1) @ v


def _triple(device: str, b: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(b, 2, 9, 8, generator=generator, dtype=torch.float64).to(device) for _ in range(3)]


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_the_ste(causal: bool, device: str) -> None:
    q, k, v = _triple(device)
    mask = torch.randn(9, 9, dtype=torch.float64, device=device)
    d = torch.randn(2, 2, 9, 8, dtype=torch.float64, device=device)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    y = ops.attention(*leaves, mask, causal)
    assert different(y, ops.attention(q, k, v, mask, causal)) == 0  # derivatives change no value
    got = torch.autograd.grad((y * d).sum(), leaves)
    again = [t.clone().requires_grad_() for t in (q, k, v)]
    # the factors of a sum of products: the gradient does not see the value of y
    want = torch.autograd.grad((ste(*again, mask, causal) * d).sum(), again)
    for a, b in zip(got, want, strict=True):
        assert relative_error(a, b) < 1e-6


def _sum(q: Tensor, k: Tensor, v: Tensor, attend) -> Tensor:
    return (attend(q, k, v) * torch.linspace(-1, 1, 8, dtype=q.dtype, device=q.device)).sum()


TRANSFORMS = {
    "grad": lambda f, q, k, v: grad(f, (0, 1, 2))(q, k, v),
    "vmap(grad)": lambda f, q, k, v: vmap(grad(f, (0, 1, 2)))(q, k, v),
    "vmap over q": lambda f, q, k, v: vmap(grad(f), (0, None, None))(q, k[0], v[0]),
    "jvp": lambda f, q, k, v: jvp(f, (q, k, v), (v, q, k))[1],
    "hvp": lambda f, q, k, v: jvp(lambda q: grad(f)(q, k, v), (q,), (k,))[1],
    "hessian": lambda f, q, k, v: hessian(lambda t: f(t, k[:1], v[:1]))(q[:1]),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_against_the_ste(transform: str, device: str) -> None:
    q, k, v = _triple(device)
    run = TRANSFORMS[transform]
    got = run(lambda *t: _sum(*t, ops.attention), q, k, v)
    want = run(lambda *t: _sum(*t, ste), q, k, v)
    assert relative_error(got, want) < 1e-6
    assert all(float(t.norm()) > 0 for t in torch.utils._pytree.tree_leaves(got))


@pytest.mark.parametrize("transform", ["grad", "vmap(grad)", "jvp", "hvp"])
def test_compiled_equals_eager(transform: str) -> None:
    torch._dynamo.reset()
    q, k, v = _triple("cpu")
    run = TRANSFORMS[transform]
    f = lambda q, k, v: run(lambda *t: _sum(*t, ops.attention), q, k, v)
    assert relative_error(torch.compile(f, fullgraph=True)(q, k, v), f(q, k, v)) < 1e-9


def test_compiled_forward_has_the_bits_of_eager(device: str) -> None:
    torch._dynamo.reset()
    q, k, v = (torch.randn(2, 4, 33, 16, device=device) for _ in range(3))
    f = lambda q, k, v: ops.attention(q, k, v, is_causal=True)
    assert different(torch.compile(f, fullgraph=True)(q, k, v), f(q, k, v)) == 0


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out, self.dropout = nn.Linear(16, 48), nn.Linear(16, 16), dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.view(*t.shape[:2], 2, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def test_a_rule_routes_attention_and_packed_has_the_bits_of_float() -> None:
    model, x = Attention(), torch.randn(2, 7, 16)
    qfn, params = teint8.quantize(model, POLICY), dict(model.named_parameters())
    receipt = teint8.explain(qfn, params, x)
    attention = next(r for r in receipt if r.op == "attention")
    assert attention.int8 and (attention.m, attention.n, attention.k, attention.batch) == (7, 7, 8, 4)
    assert attention.path.startswith("test_int8_attention.py:")
    assert attention.nbytes == 4 * (7 * 8 + 7 * 8 + 7 * 8 + 7 * 8 * 4)  # q, k and v once, the result in float
    assert different(qfn(teint8.pack(qfn, params), x), qfn(params, x)) == 0
    with torch.no_grad(), te_int8_autocast(training=False, policy=POLICY):
        assert different(model(x), qfn(params, x)) == 0
    plain = teint8.quantize(model)(params, x)
    assert 0 < relative_error(qfn(params, x), plain) < 0.05  # without the rule attention is float
    assert not [r for r in teint8.explain(teint8.quantize(model), params, x) if r.op == "attention"]


@pytest.mark.parametrize("backend", ["inductor", "teint8"])
def test_routed_and_compiled(backend: str) -> None:
    torch._dynamo.reset()
    model, x = Attention(), torch.randn(2, 7, 16)
    qfn, params = teint8.quantize(model, POLICY), {k: v.detach() for k, v in model.named_parameters()}
    if backend == "inductor":
        compiled = torch.compile(lambda p, x: qfn(p, x), fullgraph=True)(params, x)
    else:
        with torch.no_grad():
            compiled = torch.compile(model, backend="teint8", options={"policy": POLICY}, fullgraph=True)(x)
    assert different(compiled, qfn(params, x)) == 0


def test_gradients_through_a_routed_model() -> None:
    model, x = Attention(), torch.randn(2, 7, 16)
    qfn, params = teint8.quantize(model, POLICY), {k: v.detach() for k, v in model.named_parameters()}
    got = grad(lambda p: qfn(p, x).square().sum())(params)
    with te_int8_autocast(training=True, policy=POLICY):
        model(x).square().sum().backward()
    for name, p in model.named_parameters():
        assert float((p.grad - got[name]).norm() / got[name].norm()) < 1e-6
    exact = grad(lambda p: functional_call(model, p, (x,)).square().sum())(params)
    assert relative_error(got, exact) < 0.1


@pytest.mark.parametrize("need_weights", [False, True])
def test_multi_head_attention(need_weights: bool) -> None:
    model, x = nn.MultiheadAttention(16, 2, batch_first=True), torch.randn(2, 7, 16)
    exact, _ = model(x, x, x, need_weights=need_weights)
    with te_int8_autocast(policy=POLICY) as ctx:
        y, _ = model(x, x, x, need_weights=need_weights)
    record = next(r for r in ctx.receipt if r.op == "attention")
    assert record.int8 is not need_weights and ("need_weights" in record.reason) is need_weights
    assert relative_error(y, exact) < 0.05


def test_what_stays_float_says_why() -> None:
    model, x = Attention(dropout=0.5), torch.randn(2, 7, 16)
    with te_int8_autocast(policy=POLICY) as ctx:
        model(x)
    assert [r.reason for r in ctx.receipt if r.op == "attention"] == ["it has dropout (0.5)"]
    with (
        pytest.raises(ValueError, match=r"attention\) cannot run in INT8: it has dropout"),
        te_int8_autocast(policy=POLICY, strict=True),
    ):
        model(x)
    coarse = Policy([Rule(ops=("attention",), activation=Quant(granularity="tensor"))])
    with te_int8_autocast(policy=coarse) as ctx:
        Attention()(x)
    assert "by row" in next(r.reason for r in ctx.receipt if r.op == "attention")


@pytest.mark.parametrize(
    "error,match,arguments",
    [
        (TypeError, "query is torch.float32 and key torch.float64", lambda q: (q, q.double(), q)),
        (TypeError, "query is torch.int64", lambda q: (q.long(), q, q)),
        (ValueError, r"do not fit; \(..., heads", lambda q: (q, q[0], q)),
        (ValueError, "the same heads and tokens", lambda q: (q, q, q[:, :, :2])),
        (ValueError, "2 heads share 1 heads of keys; the same number is needed, or enable_gqa=True", lambda q: (q, q[:, :1], q[:, :1])),
        (ValueError, r"attn_mask has shape \(3, 3\)", lambda q: (q, q, q, torch.zeros(3, 3))),
        (TypeError, "attn_mask is torch.int64", lambda q: (q, q, q, torch.zeros(5, 5).long())),
        (ValueError, "attn_mask is on meta and query on cpu", lambda q: (q, q, q, torch.zeros(5, 5, device="meta"))),
    ],
)
def test_bad_input(error, match, arguments) -> None:
    with pytest.raises(error, match=match):
        ops.attention(*arguments(torch.randn(1, 2, 5, 4)))


def test_more_keys_than_an_int32_sum_would_hold() -> None:
    keys = 70000  # 254 * 127 of each
    q, k, v = torch.ones(1, 1, 1, 4), torch.ones(1, 1, keys, 4), torch.ones(1, 1, keys, 2)
    y = ops.attention(q, k, v)
    assert different(y, ops.attention(q, k, v, impl="reference")) == 0 and torch.allclose(y, torch.ones_like(y))


def test_the_least_finite_mask_and_rows_that_see_nothing() -> None:
    q, k, v = (torch.randn(1, 1, 5, 8, requires_grad=True) for _ in range(3))
    mask = torch.zeros(5, 5)
    mask[0] = torch.finfo(torch.float32).min  # all alike: the mean, as torch has it
    y = ops.attention(q, k, v, mask)
    assert relative_error(y[0, 0, 0].detach(), v[0, 0].mean(0).detach()) < 0.02
    seen = torch.ones(5, 5, dtype=torch.bool)
    seen[2] = False
    for attend in (lambda: ops.attention(q, k, v, seen, True), lambda: ops.attention(q, k, v, seen)):
        y = attend()
        grads = torch.autograd.grad(y.square().sum(), (q, k, v))
        assert int(y[0, 0, 2].count_nonzero()) == 0 and all(bool(g.isfinite().all()) for g in grads)
    each = vmap(grad(lambda q: ops.attention(q, k[0].detach(), v[0].detach(), seen).square().sum()))(q.detach())
    assert bool(each.isfinite().all())


def test_dynamic_sizes_compile_once() -> None:
    torch._dynamo.reset()
    f = torch.compile(teint8.quantize(lambda p, q: F.scaled_dot_product_attention(q, q, q), POLICY), fullgraph=True)
    for s in (5, 7, 9):
        q = torch.randn(1, 2, s, 8)
        assert different(f({}, q), ops.attention(q, q, q)) == 0


@pytest.mark.parametrize(
    "shapes,reason",
    [
        (((2, 4, 3, 8), (2, 1, 3, 8), (2, 1, 3, 8)), "its heads are broadcast"),
        (((1, 2, 3, 4, 8), (2, 2, 3, 4, 8), (2, 2, 3, 4, 8)), "its batches are broadcast"),
    ],
)
def test_calls_that_only_torch_takes(shapes, reason: str) -> None:
    q, k, v = (torch.randn(s) for s in shapes)
    f = lambda p, q, k, v: F.scaled_dot_product_attention(q, k, v)
    receipt = teint8.explain(teint8.quantize(f, POLICY), {}, q, k, v)
    assert receipt.records[0].reason.startswith(reason)
    assert torch.equal(teint8.quantize(f, POLICY)({}, q, k, v), f({}, q, k, v))


def test_a_rule_for_a_line_is_refused_in_compiled_code() -> None:
    torch._dynamo.reset()
    policy = Policy([Rule("test_int8_attention.py:*", ops=("attention",))])
    f = teint8.quantize(lambda p, q: F.scaled_dot_product_attention(q, q, q), policy)
    q = torch.randn(1, 2, 5, 8)
    assert different(f({}, q), ops.attention(q, q, q)) == 0
    with pytest.raises(Exception, match="names a line of code, and compiled code has none"):
        torch.compile(f, fullgraph=True)({}, q)
