"""LayerNorm and RMSNorm under a rule: the values of ``ops.norm`` in every case, codes that wait for the linear, what stays float."""

import pytest
import torch
import torch.nn.functional as F
from contract import different
from grid import relative_error
from torch import Tensor, nn

import teint8
from teint8 import Policy, Rule, ops, te_int8_autocast

POLICY = Policy([Rule(ops=("linear", "norm"))])


class Block(nn.Module):
    def __init__(self, kind: str = "layer") -> None:
        super().__init__()
        self.norm = nn.LayerNorm(24) if kind == "layer" else nn.RMSNorm(24, eps=1e-6)
        self.q, self.k = nn.Linear(24, 16), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return torch.cat([self.q(h), self.k(h), h], -1)


def _setup(kind: str, device: str):
    torch.manual_seed(0)
    model = Block(kind).to(device)
    with torch.no_grad():
        model.norm.weight.normal_()
    return model, torch.randn(3, 5, 24, device=device), dict(model.named_parameters())


def _expected(model: Block, x: Tensor, kind: str) -> Tensor:
    bias = model.norm.bias if kind == "layer" else None
    h = ops.norm(x, model.norm.weight, bias, kind=kind, eps=1e-5 if kind == "layer" else 1e-6)
    return torch.cat([ops.linear(h, model.q.weight, model.q.bias), ops.linear(h, model.k.weight, model.k.bias), h], -1)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_values_are_the_same_in_every_mode(kind: str, device: str) -> None:
    model, x, params = _setup(kind, device)
    want = _expected(model, x, kind)
    qfn = teint8.quantize(model, POLICY)
    assert different(qfn(params, x), want) == 0
    assert different(qfn(teint8.pack(qfn, params), x), want) == 0
    with te_int8_autocast(policy=POLICY):
        assert different(model(x), want) == 0
    for _ in range(2):
        with torch.no_grad(), te_int8_autocast(training=False, policy=POLICY):
            assert different(model(x), want) == 0
    simulated = teint8.quantize(model, Policy([Rule(ops=("linear", "norm"), compute="simulate")]))
    assert different(simulated(params, x), want) == 0
    exact = model(x)
    assert relative_error(want, exact) < 0.02


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_compiled_has_the_bits_of_eager(kind: str, device: str) -> None:
    torch._dynamo.reset()
    model, x, params = _setup(kind, device)
    params = {k: v.detach() for k, v in params.items()}
    qfn = teint8.quantize(model, POLICY)
    want = qfn(params, x)
    assert different(torch.compile(lambda p, x: qfn(p, x), fullgraph=True)(params, x), want) == 0


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_gradients(kind: str, device: str) -> None:
    model, x, params = _setup(kind, device)
    params = {k: v.detach() for k, v in params.items()}
    plain = teint8.quantize(model)
    loss = lambda qfn: lambda p, x: qfn(p, x).square().sum()
    got = torch.func.grad(loss(teint8.quantize(model, POLICY)), (0, 1))(params, x)
    want = torch.func.grad(loss(plain), (0, 1))(params, x)  # torch's norm, whose values differ in the last bits
    assert relative_error(got, want) < 2e-3
    with te_int8_autocast(policy=POLICY):
        model(x).square().sum().backward()
    for name, p in model.named_parameters():
        assert float((p.grad - got[0][name]).norm()) < 1e-5 * float(got[0][name].norm())
    each = torch.func.vmap(lambda x: torch.func.grad(loss(teint8.quantize(model, POLICY)), 1)(params, x[None]))(x)
    assert relative_error(each.squeeze(1), got[1]) < 1e-5


def test_codes_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from teint8.ops import registry

    model, x, params = _setup("layer", "cpu")
    packed = teint8.pack(teint8.quantize(model, POLICY), params)
    made: list[str] = []
    select = registry.select
    monkeypatch.setattr(registry, "select", lambda op, *rest: (made.append(op), select(op, *rest))[1])
    with torch.no_grad():
        teint8.quantize(model, POLICY)(packed, x)
        # the norm's own codes, which on a CPU are made by the kernel of another op
        assert made.count("norm") == 1 and made.count("quantize") <= 1 and "linear" not in made and made.count("int8_mm") == 2
        made.clear()
        teint8.quantize(model)(packed, x)
        assert "norm" not in made


def test_receipt_and_what_stays_float() -> None:
    model, x, params = _setup("layer", "cpu")
    receipt = teint8.explain(teint8.quantize(model, POLICY), params, x)
    assert next((r.path, r.op, r.m, r.n, r.implementation, r.mode) for r in receipt) == (
        "norm.weight", "norm", 15, 24, ops.select("norm", ops.Problem("cpu", x.dtype, 1, 15, 0, 24)).name, "codes",
    )  # fmt: skip
    only = Policy([Rule("norm.*", ops=("norm",), weight=None), Rule(ops=("linear", "norm"))])
    reasons = [r.reason for r in teint8.explain(teint8.quantize(model, only), params, x) if r.op == "norm"]
    assert reasons == ["its rule leaves it in float"]
    two = lambda p, x: F.layer_norm(x, (5, 24), p["w"])
    qfn = teint8.quantize(two, POLICY)
    w = {"w": torch.randn(5, 24)}
    assert torch.equal(qfn(w, x), two(w, x))
    assert teint8.explain(qfn, w, x).records[0].reason == "it is over [5, 24] of (3, 5, 24), not over the last dimension alone"
    with pytest.raises(ValueError, match=r"strict: w \(norm\) cannot run in INT8: it is over \[5, 24\]"):
        teint8.quantize(two, POLICY, strict=True)(w, x)


def test_a_rule_that_leaves_norms_in_float_is_no_refusal() -> None:
    model, x = Block(), torch.randn(3, 24)
    policy = Policy([Rule(ops=("linear", "norm"), activation=None)])
    params = dict(model.named_parameters())
    assert different(teint8.quantize(model, policy, strict=True)(params, x), teint8.quantize(model, policy)(params, x)) == 0


def test_transformer_encoder_in_inference() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2).eval(), torch.randn(2, 7, 16)
    qfn, params = teint8.quantize(model, POLICY), dict(model.named_parameters())
    with torch.no_grad(), te_int8_autocast(training=False, policy=POLICY) as ctx:
        assert different(model(x), qfn(params, x)) == 0
    assert sum(r.calls for r in ctx.receipt if r.op == "norm") == 4


@pytest.mark.parametrize("shape", [(0, 24), (3, 0)])
def test_empty(shape) -> None:
    qfn = teint8.quantize(lambda p, x: F.layer_norm(x, x.shape[-1:], p["w"]), POLICY)
    assert qfn({"w": torch.ones(shape[-1])}, torch.ones(shape)).shape == shape


def test_what_torch_refuses_or_takes_in_its_own_way() -> None:
    wrong = teint8.quantize(lambda p, x: F.layer_norm(x, (4,)), POLICY)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        wrong({}, torch.randn(2, 8))
    direct = teint8.quantize(lambda p, x: torch.layer_norm(x, (24,), p["w"], None, 1e-5), POLICY)
    x, w = torch.randn(3, 24), torch.randn(24)
    assert different(direct({"w": w}, x), ops.norm(x, w, None, kind="layer", eps=1e-5)) == 0
    meta = teint8.quantize(lambda p, x: F.rms_norm(x, (24,), p["w"]), POLICY)
    assert meta({"w": w.to("meta")}, x.to("meta")).is_meta
    nested = torch.nested.nested_tensor([torch.randn(2, 24), torch.randn(3, 24)])
    y = teint8.quantize(lambda p, x: F.layer_norm(x, (24,), p["w"], p["w"]), POLICY)({"w": w}, nested)
    assert y.is_nested


def test_under_inference_mode_and_autocast() -> None:
    model, x, _ = _setup("layer", "cpu")
    want = _expected(model, x, "layer")
    with torch.inference_mode(), te_int8_autocast(training=False, policy=POLICY) as ctx:
        assert different(model(x), want) == 0
    assert [r.mode for r in ctx.receipt if r.op == "norm"] == ["values"]  # nothing is kept of what has no version
    with torch.autocast("cpu", torch.bfloat16), te_int8_autocast(policy=POLICY) as ctx:
        model(x)
    assert next(r.reason for r in ctx.receipt if r.op == "norm") == "torch.autocast decides on its dtype"
