"""quantize, pack, unpack, explain: the pure core."""

import grid
import optree
import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import nn

import teint8
from teint8 import Policy, QTensor, Quant, Rule

PRESETS = ["qat", "training", "switchback", "weight_only", "simulate"]
POLICIES = {
    **{name: Policy.preset(name) for name in PRESETS},
    "tensor": Policy([Rule(weight=Quant("tensor"), activation=Quant("tensor"))]),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("program", ["mlp", "encoder", "function"])
def test_packed_equals_float_bit_for_bit(program: str, policy: str, device: str) -> None:
    qfn, params, x = grid.programs(program, POLICIES[policy], device)
    packed = teint8.pack(qfn, params, x)
    assert torch.equal(qfn(packed, x), qfn(params, x))
    assert any(isinstance(q, QTensor) for q in pytree.tree_leaves(packed, is_leaf=lambda t: isinstance(t, QTensor)))
    assert pytree.tree_structure(teint8.unpack(packed)) == pytree.tree_structure(params)
    if program != "function":
        by_types = teint8.pack(qfn, params)
        assert [type(v) for v in by_types.values()] == [type(v) for v in packed.values()]
        assert torch.equal(qfn(by_types, x), qfn(params, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_simulation_has_the_bits_of_the_kernels(dtype: torch.dtype, device: str) -> None:
    _, params, x = grid.programs("mlp", device=device)
    model = grid.mlp().to(device, dtype)
    params, x = {k: v.to(dtype) for k, v in params.items()}, x.to(dtype)
    real, simulated = teint8.quantize(model), teint8.quantize(model, Policy.simulate())
    assert torch.equal(real(params, x), simulated(params, x))
    assert {r.implementation for r in teint8.explain(simulated, params, x)} == {"reference"}


@pytest.mark.parametrize("policy", ["training", "switchback", "weight_only"])
@pytest.mark.parametrize("program", ["mlp", "encoder", "function"])
def test_gradients_of_other_policies(program: str, policy: str, device: str) -> None:
    """INT8 and W8A16 gradients stay near the float program's; eager autograd and torch.func agree."""
    qfn, params, x = grid.programs(program, POLICIES[policy], device)
    plain = grid.programs(program, Policy(), device)[0]
    if program != "function":
        plain = teint8.quantize(qfn.__wrapped__, Policy())
    grads, exact = (torch.func.grad(grid.loss_of(f, x))(params) for f in (qfn, plain))
    whole = lambda tree: torch.cat([leaf.flatten() for leaf in pytree.tree_leaves(tree)])
    assert 0 < (whole(grads) - whole(exact)).norm() / whole(exact).norm() < 0.06
    leaves, spec = pytree.tree_flatten(params)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    autograd = torch.autograd.grad(grid.loss_of(qfn, x)(pytree.tree_unflatten(leaves, spec)), leaves)
    assert grid.relative_error(list(autograd), pytree.tree_leaves(grads)) < 1e-5


def test_saved_tensors_are_codes_and_scales() -> None:
    layer, x = nn.Linear(256, 128, bias=False), torch.randn(64, 256)
    for policy, wanted in (
        (Policy.qat(), 64 * 256 + 4 * 64 + 128 * 256 + 4 * 128),
        (Policy.training(), 64 * 256 + 4 * 256 + 128 * 256 + 4 * 256),
    ):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            teint8.quantize(layer, policy)(dict(layer.named_parameters()), x)
        held = sum(t.nbytes for t in saved if t.data_ptr() != layer.weight.data_ptr())
        assert held == wanted


def test_second_derivative_through_codes_raises_and_names_the_fix() -> None:
    qfn, params, x = grid.programs("mlp")
    x.requires_grad_()
    (g,) = torch.autograd.grad(qfn(params, x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        g.square().sum().backward()


def test_stochastic_gradients_replay_and_differ() -> None:
    policy = Policy([Rule(gradient=Quant(rounding="stochastic"))])
    qfn, params, x = grid.programs("mlp", policy)
    run = lambda: torch.func.grad(grid.loss_of(qfn, x))(params)["0.weight"]
    torch.manual_seed(1)
    first, second = run(), run()
    torch.manual_seed(1)
    assert torch.equal(run(), first) and not torch.equal(first, second)
    # unbiased: the mean of dX is G against the codes of W, as if G had not been rounded
    layer, g = nn.Linear(24, 33, bias=False), torch.randn(6, 33)
    one = lambda: torch.func.grad(lambda x: (teint8.quantize(layer, policy)({"weight": w}, x) * g).sum())(x)
    w = layer.weight.detach()
    exact = g @ teint8.QTensor.quantize(w, axis=-2).dequantize()
    mean = torch.stack([one() for _ in range(400)]).mean(0)
    assert (mean - exact).norm() < 0.15 * (one() - exact).norm()
    vmapped = torch.func.vmap(lambda v: torch.func.grad(grid.loss_of(qfn, v[None]))(params), randomness="different")
    assert all(float(g.norm()) > 0 for g in vmapped(x).values())


def test_static_activation_scales_clip_and_stop_the_gradient(device: str) -> None:
    layer = nn.Linear(16, 8).to(device)
    policy = Policy([Rule(activation=Quant(scale="static"))])
    qfn, params = teint8.quantize(layer, policy), {k: v.detach() for k, v in layer.named_parameters()}
    packed = {**params, "weight": QTensor.quantize(params["weight"]).with_activation_scale(1 / 127)}
    x = torch.linspace(-2, 2, 64, device=device).reshape(4, 16)
    gx = torch.func.grad(lambda x: qfn(packed, x).square().sum())(x)
    assert (gx[x.abs() > 1.01] == 0).all() and (gx[x.abs() < 0.99] != 0).all()
    assert torch.allclose(qfn(packed, x), F.linear(x.clamp(-1, 1), packed["weight"].dequantize(), params["bias"]), atol=0.02)
    leaf = x.clone().requires_grad_()
    qfn(packed, leaf).square().sum().backward()
    assert torch.allclose(leaf.grad, gx, rtol=1e-5)


class Odd(nn.Module):
    """Tied and twice-used weights, a module called several times, a buffer, kwargs, pytrees out, a weight in other ops."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.block = nn.Linear(16, 16)
        self.head = nn.Linear(16, 11, bias=False)
        self.head.weight = self.embed.weight
        self.free = nn.Parameter(torch.randn(16, 16))
        self.register_buffer("fixed", torch.randn(16, 16))

    def forward(self, ids: torch.Tensor, *, times: int = 2) -> dict[str, object]:
        h = self.embed(ids)
        for _ in range(times):
            h = torch.tanh(self.block(h))
        both = h @ self.free + h @ self.free.t()
        fixed = F.linear(h, self.fixed)
        return {"logits": self.head(both), "more": (fixed, self.free.sum(), self.free.shape, self.block.weight.dtype)}


def test_odd_modules() -> None:
    model, ids = Odd(), torch.randint(0, 11, (3, 5))
    qfn = teint8.quantize(model)
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    want = qfn((params, buffers), ids, times=3)
    receipt = teint8.explain(qfn, (params, buffers), ids, times=3)
    calls = {r.path: (r.calls, r.int8) for r in receipt}
    assert calls == {"block.weight": (3, True), "free": (2, True), "fixed": (1, True), "embed.weight": (1, True)}
    # the tied table is also read in float, and free is contracted along both of its dimensions: both must stay float
    packed = teint8.pack(qfn, (params, buffers), ids, times=3)
    kinds = {k: isinstance(v, QTensor) for group in packed for k, v in group.items()}
    assert kinds == {"embed.weight": False, "block.weight": True, "block.bias": False, "free": False, "fixed": True}
    for packing in (packed, teint8.pack(qfn, (params, buffers))):
        got = qfn(packing, ids, times=3)
        assert pytree.tree_structure(got) == pytree.tree_structure(want)
        assert torch.equal(got["logits"], want["logits"]) and torch.equal(got["more"][0], want["more"][0])


def test_packed_weights_elsewhere_are_dequantized() -> None:
    """Packed by hand where pack would not: every other op sees the floats, never the codes."""
    model, ids = Odd(), torch.randint(0, 11, (3, 5))
    qfn = teint8.quantize(model)
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    by_hand = {**params, "embed.weight": QTensor.quantize(params["embed.weight"]), "free": QTensor.quantize(params["free"])}
    on_grid = {**params, "embed.weight": by_hand["embed.weight"].dequantize(), "free": by_hand["free"].dequantize()}
    got, want = qfn((by_hand, buffers), ids), qfn((on_grid, buffers), ids)
    assert (got["logits"] - want["logits"]).norm() / want["logits"].norm() < 0.05
    assert torch.equal(got["more"][1], on_grid["free"].sum()) and got["more"][2:] == (torch.Size([16, 16]), torch.float32)


def test_every_matmul_with_a_weight_on_either_side() -> None:
    x, b3, w, w3 = torch.randn(5, 24), torch.randn(3, 5, 24), torch.randn(24, 7), torch.randn(3, 24, 7)
    bias = torch.randn(7)
    programs = {
        "matmul": lambda p: torch.matmul(x, p["w"]),
        "operator": lambda p: b3 @ p["w"],
        "method": lambda p: x.matmul(p["w"]),
        "mm": lambda p: torch.mm(x, p["w"]),
        "method mm": lambda p: x.mm(p["w"]),
        "vector": lambda p: x[0] @ p["w"],
        "left": lambda p: p["w"].t() @ x.t(),
        "left by vector": lambda p: p["w"].mT @ x[0],
        "left of a batch": lambda p: p["w"].transpose(0, 1) @ b3.mT,
        "linear of a transpose": lambda p: F.linear(x, p["w"].T),
        "bmm": lambda p: torch.bmm(b3, p["w3"]),
        "method bmm": lambda p: b3.bmm(p["w3"]),
        "broadcast": lambda p: x @ p["w3"],
        "left bmm": lambda p: torch.bmm(p["w3"].mT, b3.mT),
        "addmm": lambda p: torch.addmm(bias, x, p["w"]),
        "method addmm": lambda p: bias.addmm(x, p["w"]),
        "addmm scaled": lambda p: torch.addmm(bias, x, p["w"], beta=0.5, alpha=2),
        "addmm left": lambda p: torch.addmm(torch.ones(7, 5), p["w"].t(), x.t(), beta=0),
        "addmm by name": lambda p: torch.addmm(input=bias, mat1=x, mat2=p["w"]),
        "baddbmm": lambda p: torch.baddbmm(torch.ones(3, 5, 7), b3, p["w3"], alpha=0.5),
        "matmul by name": lambda p: torch.matmul(input=x, other=p["w"]),
    }
    for name, program in programs.items():
        params = {"w3": w3} if "w3" in program.__code__.co_consts else {"w": w}
        fn = lambda p, program=program: program(p)
        qfn = teint8.quantize(fn)
        want, got = program(params), qfn(params)
        assert got.shape == want.shape and 0 < (got - want).norm() / want.norm() < 0.03, name
        receipt = teint8.explain(qfn, params)
        assert (receipt.int8_calls, receipt.calls) == (1, 1), (name, receipt)
        packed = teint8.pack(teint8.quantize(lambda p, _: program(p)), params, x)
        assert torch.equal(qfn(packed), got), name
        gradient = torch.func.grad(lambda p: qfn(p).square().sum())(params)
        exact = torch.func.grad(lambda p: program(p).square().sum())(params)
        assert grid.relative_error(gradient, exact) < 0.05, name


def test_activations_are_multiplied_in_int8_only_on_request() -> None:
    a, b = torch.randn(3, 5, 8), torch.randn(3, 8, 6)
    fn = lambda p, a, b: a @ b + p["w"].sum()
    for policy, count in ((None, 0), (Policy([Rule(ops=("activation_matmul",))]), 1)):
        qfn = teint8.quantize(fn, policy)
        receipt = teint8.explain(qfn, {"w": torch.ones(2)}, a, b)
        assert receipt.int8_calls == count and receipt.calls == 1
    g = torch.func.grad(lambda b: qfn({"w": torch.ones(2)}, a, b).square().sum())(b)
    want = torch.func.grad(lambda b: (a @ b + 2).square().sum())(b)
    assert (g - want).norm() / want.norm() < 0.05


def test_out_and_unsupported_calls_stay_float() -> None:
    x, w, out = torch.randn(5, 24), torch.randn(24, 7), torch.empty(5, 7)
    teint8.quantize(lambda p: torch.mm(x, p["w"], out=out))({"w": w})
    assert torch.equal(out, x @ w)
    ints = teint8.quantize(lambda p: torch.ones(2, 24, dtype=torch.int64) @ p["w"].long())
    assert torch.equal(ints({"w": w}), torch.ones(2, 24, dtype=torch.int64) @ w.long())


def test_parameters_that_are_views() -> None:
    flat = torch.randn(24 * 33 + 33)
    params = {"weight": flat[: 24 * 33].view(33, 24), "bias": flat[24 * 33 :]}
    x = torch.randn(4, 24)
    qfn = teint8.quantize(nn.Linear(24, 33))
    assert torch.equal(qfn(params, x), qfn({k: v.clone() for k, v in params.items()}, x))


def test_qtensor_is_a_pytree_node_everywhere(tmp_path) -> None:
    q = QTensor.quantize(torch.randn(4, 6), axis=-2).with_activation_scale(0.1)
    for tree in (pytree, optree):
        leaves, spec = tree.tree_flatten({"w": q})
        back = tree.tree_unflatten(leaves, spec) if tree is pytree else tree.tree_unflatten(spec, leaves)
        assert torch.equal(back["w"].dequantize(), q.dequantize()) and back["w"].axis == -2
        assert len(leaves) == 3
    spec = pytree.tree_flatten(q)[1]
    assert pytree.treespec_loads(pytree.treespec_dumps(spec)) == spec
    torch.save({"w": q}, tmp_path / "q.pt")
    assert torch.equal(torch.load(tmp_path / "q.pt", weights_only=True)["w"].codes, q.codes)
    assert q.to("cpu").nbytes == q.nbytes == 4 * 6 + 4 * 6 + 4 and "static" in repr(q)


def test_packing_twice_and_unpacking() -> None:
    qfn, params, _ = grid.programs("mlp")
    packed = teint8.pack(qfn, params)
    again = teint8.pack(qfn, packed)
    assert again["0.weight"] is packed["0.weight"]
    floats = teint8.unpack(packed)
    assert (floats["0.weight"] - params["0.weight"]).abs().max() <= packed["0.weight"].scale.max() / 2 * 1.0001
    assert torch.equal(teint8.pack(qfn, floats)["0.weight"].codes, packed["0.weight"].codes)


def test_packed_params_under_transforms() -> None:
    qfn, params, x = grid.programs("mlp")
    packed = teint8.pack(qfn, params)
    two = pytree.tree_map(lambda *t: torch.stack(t), packed, teint8.pack(qfn, {k: v * 0.5 for k, v in params.items()}))
    both = torch.func.vmap(qfn, in_dims=(0, None))(two, x)
    assert torch.equal(both[0], qfn(packed, x))
    assert torch.equal(torch.func.vmap(lambda v: qfn(packed, v[None])[0])(x), qfn(packed, x))
    gx = torch.func.grad(lambda x: qfn(packed, x).square().sum())(x)
    assert grid.relative_error(gx, torch.func.grad(lambda x: qfn(params, x).square().sum())(x)) < 1e-6
    torch._dynamo.reset()
    # plain Inductor: the GELU between the linears is its own: close, not equal
    assert grid.relative_error(torch.compile(qfn, fullgraph=True)(packed, x), qfn(packed, x)) < 1e-6
    exported = torch.export.export(Served(qfn, packed), (x,)).module()
    assert torch.equal(exported(x), qfn(packed, x))


class Served(nn.Module):
    def __init__(self, qfn, packed) -> None:
        super().__init__()
        self.qfn, self.packed = qfn, packed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.qfn(self.packed, x)


def test_rules_by_path_and_the_receipt() -> None:
    qfn, params, x = grid.programs("encoder", Policy([Rule("*.self_attn.*", weight=None), Rule("0.layers.1.*"), Rule("nowhere")]))
    receipt = teint8.explain(qfn, params, x)
    float_ = {r.path: r.reason for r in receipt if not r.int8}
    assert set(float_) == {
        "0.layers.0.self_attn.in_proj_weight", "0.layers.0.self_attn.out_proj.weight", "0.layers.1.self_attn.in_proj_weight",
        "0.layers.1.self_attn.out_proj.weight", "0.layers.0.linear1.weight", "0.layers.0.linear2.weight", "1.weight",
    }  # fmt: skip
    assert float_["1.weight"] == "no rule matches"
    assert float_["0.layers.0.self_attn.in_proj_weight"] == "its rule leaves the weight in float"
    text = str(receipt)
    assert "2 of 9 calls ran in INT8" in text and len(text.splitlines()) == 12 and text.endswith("no call matched Rule('nowhere')")
    record = next(r for r in receipt if r.path == "0.layers.1.linear1.weight")
    assert (record.m, record.n, record.k, record.batch, record.op) == (18, 32, 16, 1, "linear")


def test_pack_takes_parts_of_the_params_and_extra_state() -> None:
    class Keeps(nn.Linear):
        def get_extra_state(self) -> dict:
            return {"steps": 3}

        def set_extra_state(self, state: dict) -> None:
            self.steps = state["steps"]

    model = nn.Sequential(Keeps(8, 4), nn.Linear(4, 2))
    qfn, params = teint8.quantize(model), dict(model.named_parameters())
    packed = teint8.pack(qfn, model.state_dict())
    assert isinstance(packed["0.weight"], QTensor) and packed["0._extra_state"] == {"steps": 3}
    part = teint8.pack(qfn, {"1.weight": params["1.weight"]})
    assert list(part) == ["1.weight"] and isinstance(part["1.weight"], QTensor)
    x = torch.randn(3, 8)
    assert torch.equal(qfn({**params, **part}, x), qfn(params, x))
    with pytest.raises(ValueError, match=r"no parameter or buffer '2\.weight'"):
        teint8.pack(qfn, {"2.weight": params["1.weight"]})
    lazy = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="weight has no shape yet; run the module once"):
        teint8.pack(teint8.quantize(lazy), dict(lazy.named_parameters()))
