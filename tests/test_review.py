"""Programs that once gave wrong results, or none."""

import contextlib
import gc
import weakref

import grid
import pytest
import torch
import torch.nn.functional as F
from contract import different
from torch import nn
from torch.utils.checkpoint import checkpoint

import teint8
from teint8 import Policy, QTensor, Rule, ops, te_int8_autocast


def layers() -> nn.Module:
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 24))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad])
@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {}])
def test_every_optimizer_step_is_seen_by_the_cache(optimizer, options: dict[str, bool], device: str) -> None:
    model, x = layers().to(device), torch.randn(16, 24, device=device)
    if device == "cuda" and optimizer is torch.optim.Adagrad and "fused" in options:
        pytest.skip("torch has no fused Adagrad on CUDA")
    steps = optimizer(model.parameters(), lr=0.1, **options)
    for _ in range(2):
        with torch.no_grad(), te_int8_autocast(training=False):
            model(x)
        model(x).square().sum().backward()
        steps.step()
        with torch.no_grad(), te_int8_autocast(training=False):
            assert torch.equal(model(x), teint8.quantize(model)(dict(model.named_parameters()), x))


def test_results_may_be_written_in_place(device: str) -> None:
    w, x = torch.randn(8, 24, device=device, requires_grad=True), torch.randn(3, 5, 24, device=device)
    for program in (lambda x: F.linear(x, w), lambda x: F.linear(x[0], w), lambda x: F.linear(x[0, 0], w), lambda x: x @ w.t()):
        with te_int8_autocast():
            (want,) = torch.autograd.grad(F.relu(program(x)).square().sum(), w)
            y = program(x)
            y += 0
            (got,) = torch.autograd.grad(F.relu_(y).square().sum(), w)
        assert torch.equal(got, want)


@pytest.mark.parametrize("outer", [False, True])
@pytest.mark.parametrize("inner", [False, True])
def test_nested_checkpoints(outer: bool, inner: bool) -> None:
    a, b, x = layers(), layers(), torch.randn(5, 24, requires_grad=True)
    parameters = [x, *a.parameters(), *b.parameters()]

    def run(replayed: bool) -> list[torch.Tensor]:
        keep = (lambda f, x, reentrant: checkpoint(f, x, use_reentrant=reentrant)) if replayed else (lambda f, x, _: f(x))
        for p in parameters:
            p.grad = None
        with te_int8_autocast():
            y = keep(lambda x: torch.tanh(keep(b, a(x), inner)), x, outer)
        y.square().sum().backward()
        return [p.grad for p in parameters]

    assert all(torch.equal(g, w) for g, w in zip(run(True), run(False), strict=True))


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_context_of_the_checkpointed_function_itself(reentrant: bool) -> None:
    """What the function does in float outside of its own context stays float when it is replayed."""
    a, b, x = layers(), layers(), torch.randn(5, 24, requires_grad=True)
    qfn, params = teint8.quantize(b), dict(b.named_parameters())

    def with_context(x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(a(x))
        with te_int8_autocast():
            return b(h)

    def with_function(x: torch.Tensor) -> torch.Tensor:
        return a(torch.tanh(qfn(params, x)))

    for f in (with_context, with_function):
        grads = []
        for run in (f, lambda x, f=f: checkpoint(f, x, use_reentrant=reentrant)):
            for p in (x, *a.parameters(), *b.parameters()):
                p.grad = None
            run(x).square().sum().backward()
            grads.append([p.grad for p in (x, *a.parameters(), *b.parameters())])
        assert all(torch.equal(g, w) for g, w in zip(*grads, strict=True))


def test_forward_over_reverse_outside_of_torch_func() -> None:
    w, x = torch.randn(8, 24, requires_grad=True), torch.randn(5, 24)
    loss = lambda w, x: ops.linear(x, w).square().sum()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        (g,) = torch.autograd.grad(loss(w, dual), w, create_graph=True)
        got = torch.autograd.forward_ad.unpack_dual(g).tangent
    want = torch.func.jvp(lambda x: torch.func.grad(loss)(w.detach(), x), (x,), (torch.ones_like(x),))[1]
    assert grid.relative_error(got, want) < 1e-6


def test_a_packed_weight_as_the_other_operand() -> None:
    x, params = torch.randn(5, 24), {"a": torch.randn(6, 24), "b": torch.randn(24, 6)}
    qfn = teint8.quantize(lambda p, x: x @ p["b"] @ p["a"] + x @ (p["b"] @ p["a"]))
    packed = teint8.pack(teint8.quantize(lambda p, x: x @ p["b"]), params, x)
    assert isinstance(packed["b"], QTensor)
    mixed = {"a": params["a"], "b": packed["b"].dequantize()}
    assert grid.relative_error(qfn(packed, x), qfn(mixed, x)) < 0.03
    assert different(qfn(teint8.pack(qfn, params, x), x), qfn(params, x)) == 0
    receipt = teint8.explain(teint8.quantize(lambda p, i: F.embedding(i, p["b"])), packed, torch.tensor([1, 2]))
    assert "dequantized" in receipt.records[0].reason


def test_packed_leaves_inside_attention() -> None:
    mha = nn.MultiheadAttention(16, 4, add_bias_kv=True, batch_first=True)
    params, x = {k: v.detach() for k, v in mha.named_parameters()}, torch.randn(2, 5, 16)
    by_hand = {**params, "bias_k": QTensor.quantize(params["bias_k"]), "bias_v": QTensor.quantize(params["bias_v"])}
    qfn = teint8.quantize(mha)
    assert torch.equal(qfn(by_hand, x, x, x)[0], qfn(teint8.unpack(by_hand), x, x, x)[0])
    sdpa = teint8.quantize(lambda p, q: F.scaled_dot_product_attention(q, p["k"], p["k"]))
    k = QTensor.quantize(torch.randn(2, 7, 16))
    assert torch.equal(sdpa({"k": k}, x), sdpa({"k": k.dequantize()}, x))


def test_fully_masked_rows_under_jvp() -> None:
    q, mask = torch.randn(1, 3, 8), torch.ones(3, 3, dtype=torch.bool)
    mask[1] = False
    qfn = teint8.quantize(lambda p, q: F.scaled_dot_product_attention(q, q, q, mask))
    y = torch.func.jvp(lambda q: qfn({}, q), (q,), (q,))[0]
    assert torch.allclose(y, F.scaled_dot_product_attention(q, q, q, mask), atol=1e-6)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("rules", [[Rule("2.*", weight=None), Rule()], [Rule("2.*")]])
def test_rules_with_paths_hold_around_a_compiled_model(training: bool, rules: list[Rule]) -> None:
    model, x, policy = layers(), torch.randn(5, 24), Policy(rules)
    want = teint8.quantize(model, policy)(dict(model.named_parameters()), x)
    plain = teint8.quantize(model)(dict(model.named_parameters()), x)
    torch._dynamo.reset()
    compiled = torch.compile(model)
    with contextlib.nullcontext() if training else torch.no_grad():
        for _ in range(2):
            with te_int8_autocast(training, policy=policy):
                got = compiled(x)
            assert grid.relative_error(got, want) < 1e-6 < grid.relative_error(got, plain)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"teint8\.quantize\(model, policy\)"), te_int8_autocast(policy=policy):
        torch.compile(model, fullgraph=True)(x)


def test_paths_follow_the_outermost_module() -> None:
    model, x = layers(), torch.randn(5, 24)
    with te_int8_autocast(policy=Policy([Rule("0.*")])) as ctx:
        model[0](x), model(x)
    assert [(r.path, r.int8) for r in ctx.receipt] == [("weight", False), ("0.weight", True), ("2.weight", False)]


def test_receipts_say_where_and_how_large() -> None:
    x4, y4 = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 8, 6)
    with te_int8_autocast() as ctx:
        x4 @ y4
        F.linear(torch.randn(3, 8), torch.randn(5, 8))
        torch.addmm(torch.randn(6), torch.randn(5, 8), torch.randn(8, 6))
    first, second, third = ctx.receipt
    assert (first.m, first.n, first.k, first.batch) == (5, 6, 8, 8) and first.path.startswith("test_review.py:")
    assert second.int8 and second.mode == "W8A8" and second.path != first.path and not third.int8
    for policy, mode, int8 in (("weight_only", "W8A16", 0), ("simulate", "W8A8", 0), ("training", "W8A8 dX dW", 1)):
        with te_int8_autocast(policy=Policy.preset(policy)) as ctx:
            F.linear(torch.randn(3, 8), torch.randn(5, 8))
        assert (ctx.receipt.records[0].mode, ctx.receipt.int8_calls) == (mode, int8)


def test_unusual_operands_stay_float() -> None:
    w, x = nn.Parameter(torch.randn(8, 6)), torch.randn(5, 8)
    sparse = torch.eye(8).to_sparse()
    nested = torch.nested.nested_tensor([torch.randn(2, 6), torch.randn(3, 6)])
    with te_int8_autocast() as ctx:
        assert torch.equal(sparse @ w, torch.sparse.mm(sparse, w))
        assert F.linear(x, torch.randn(8)).shape == (5,)
        assert F.linear(nested, w).size(2) == 8
        assert nn.Linear(8, 4, device="meta")(x.to("meta")).shape == (5, 4)
    assert [r.int8 for r in ctx.receipt][:3] == [False] * 3
    negated = torch._neg_view(x)
    assert different(ops.linear(negated, w.detach().t()), ops.linear(-x, w.detach().t())) == 0


def test_inference_weights_and_a_disabled_context() -> None:
    with torch.inference_mode():
        layer, x = nn.Linear(24, 8), torch.randn(16, 24)
        with te_int8_autocast(training=False):
            assert torch.equal(layer(x), layer(x))
    a, b = torch.randn(5, 8).bfloat16(), nn.Parameter(torch.randn(8, 6).bfloat16())
    bias = torch.randn(5, 6).bfloat16()
    with te_int8_autocast(enabled=False):
        assert torch.equal(torch.addmm(bias, a, b, beta=0.3, alpha=1.7), torch.addmm(bias, a, b.detach(), beta=0.3, alpha=1.7))


def test_strict_contexts_nest_and_locals_are_not_kept() -> None:
    layer, x = nn.Linear(24, 8), torch.randn(16, 24)
    with te_int8_autocast(strict=True) as ctx:
        with ctx:
            pass
        layer(x)
    ref = weakref.ref(layer.weight)
    del layer
    gc.collect()
    assert ref() is None


def test_a_pure_function_takes_all_of_its_parameters() -> None:
    qfn, params, x = grid.programs("mlp")
    with pytest.raises(ValueError, match=r"lacks '2\.bias'"):
        qfn({k: v for k, v in params.items() if k != "2.bias"}, x)
    assert teint8.explain(torch.compile(qfn), params, x).int8_calls == 2

    with pytest.raises(TypeError, match="generator"):

        @te_int8_autocast()
        def stream():
            yield 1

    with pytest.raises(ValueError, match=r"key_padding_mask has shape \(5, 3\)"), te_int8_autocast():
        mha = nn.MultiheadAttention(16, 4, batch_first=True)
        y = torch.randn(3, 5, 16)
        mha(y, y, y, key_padding_mask=torch.zeros(5, 3, dtype=torch.bool))


def test_products_that_are_not_taken_over_are_on_the_receipt() -> None:
    w, x = nn.Parameter(torch.randn(5, 5)), torch.randn(4, 5)
    lstm = nn.LSTM(5, 5)
    calls = {
        "einsum": lambda: torch.einsum("ab,bc->a", x, w),
        "tensordot": lambda: torch.tensordot(w, x[0], 1).sum() + torch.tensordot(x[:, None] * x[:, :, None], w, 2),
        "inner": lambda: torch.inner(x, nn.Parameter(x[0][None, None])),
        "mv": lambda: torch.mv(w, x[0]),
        "multi_dot": lambda: torch.linalg.multi_dot([x, w]),
        "out=": torch.no_grad()(lambda: torch.mm(x, w, out=torch.empty(4, 5))),
        "recurrent": lambda: lstm(x[None])[0],
    }
    for name, call in calls.items():
        want = call()
        with te_int8_autocast() as context:
            y = call()
        assert torch.equal(y, want) and len(context.receipt) >= 1, name
        assert all(not r.int8 and name in r.reason for r in context.receipt), (name, context.receipt)
    with te_int8_autocast() as context:
        y = torch.linalg.matmul(x, w)
    assert context.receipt.int8_calls == context.receipt.calls == 1 and torch.equal(y, teint8.ops.linear(x, w.mT))
    with pytest.raises(ValueError, match="einsum that contracts one dimension"), te_int8_autocast(strict=True):
        calls["einsum"]()
    with te_int8_autocast(strict=True):  # no rule asks for them
        calls["recurrent"]() @ w
