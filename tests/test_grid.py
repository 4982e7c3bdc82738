"""The transform grid: every transform of every program, eager and compiled, values against independent ones."""

import warnings

import grid
import pytest
import torch
import torch.nn.functional as F

import teint8
import teint8.compile

COMPILED = [name for name in grid.TRANSFORMS if name != "checkpoint"]  # tests/test_compile.py has checkpoints
PROGRAMS = ["mlp", "encoder", "function"]


def _reference(name: str):
    """The same program with the STE of plain torch in place of each linear."""
    if name == "function":

        def plain(p, x):
            (l0, l1), head = p["layers"], p["head"]
            h = torch.tanh(grid.ste_linear(x, l0["w"].t(), l0["b"]))
            return grid.ste_linear(torch.tanh(grid.ste_linear(h, l1["w"], l1["b"])), head)

        return plain

    def mlp(p, x):
        return grid.ste_linear(F.gelu(grid.ste_linear(x, p["0.weight"], p["0.bias"])), p["2.weight"], p["2.bias"])

    return mlp


@pytest.mark.parametrize("transform", grid.TRANSFORMS)
@pytest.mark.parametrize("program", ["mlp", "function"])
def test_eager_equals_detach_ste_in_float64(program: str, transform: str, device: str) -> None:
    qfn, params, x = grid.programs(program, device=device)
    double = lambda tree: torch.utils._pytree.tree_map(lambda t: t.double(), tree)
    params, x = double(params), x.double()
    run = grid.TRANSFORMS[transform]
    if program == "mlp":
        qfn.__wrapped__.double()
    got, want = run(qfn, params, x), run(_reference(program), params, x)
    # forward is float32 by the contract, derivatives are float64
    assert grid.relative_error(got, want) < 2e-6
    assert all(float(t.norm()) > 0 for t in torch.utils._pytree.tree_leaves(got))


@pytest.mark.parametrize("transform", grid.TRANSFORMS)
def test_encoder_eager_equals_unfused_ste(transform: str, device: str) -> None:
    """The encoder against the same encoder whose INT8 linears are replaced, inside the same routing, by the plain STE."""
    from teint8 import ops
    from teint8.transforms import route

    qfn, params, x = grid.programs("encoder", device=device)
    run = grid.TRANSFORMS[transform]
    got = run(qfn, params, x)

    class Plain:
        select = staticmethod(ops.select)

        @staticmethod
        def linear(x, w, bias=None, **_):
            return grid.ste_linear(x, w, bias)

    original, route.ops = route.ops, Plain
    try:
        want = run(qfn, params, x)
    finally:
        route.ops = original
    assert grid.relative_error(got, want) < 1e-5
    assert all(float(t.norm()) > 0 for t in torch.utils._pytree.tree_leaves(got))


@pytest.mark.parametrize("transform", COMPILED)
@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("backend", ["inductor", "aot_eager"])
def test_compiled_equals_eager(backend: str, program: str, transform: str, device: str) -> None:
    qfn, params, x = grid.programs(program, device=device)
    run = grid.TRANSFORMS[transform]
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = torch.compile(lambda p, x: run(qfn, p, x), fullgraph=True, backend=backend)(params, x)
    want = run(qfn, params, x)
    assert grid.relative_error(got, want) < 1e-5
    assert all(float(t.norm()) > 0 for t in torch.utils._pytree.tree_leaves(got))


@pytest.mark.parametrize("policy", ["training", "switchback", "weight_only", "simulate", "stochastic"])
def test_other_policies_compiled_equal_eager(policy: str, device: str) -> None:
    rounded = teint8.Policy([teint8.Rule(gradient=teint8.Quant(rounding="stochastic"))])
    chosen = rounded if policy == "stochastic" else teint8.Policy.preset(policy)
    qfn, params, x = grid.programs("mlp", chosen, device)
    run = lambda p, x: torch.func.grad_and_value(grid.loss_of(qfn, x))(p)
    torch._dynamo.reset()
    got, want = torch.compile(run, fullgraph=True)(params, x), run(params, x)
    # stochastic rounding draws other numbers in compiled code
    assert grid.relative_error(got, want) < (0.1 if policy == "stochastic" else 1e-5)
    assert all(float(t.norm()) > 0 for t in torch.utils._pytree.tree_leaves(got))


@pytest.mark.parametrize("backend", ["inductor", "aot_eager", "teint8"])
@pytest.mark.parametrize("program", PROGRAMS)
def test_packed_weights_compiled(program: str, backend: str, device: str) -> None:
    if program == "encoder" and backend == "teint8":
        pytest.skip("a quantized function is compiled by either the same way; the table has it: tests/grid_table.py")
    qfn, params, x = grid.programs(program, device=device)
    packed = teint8.pack(qfn, params, x)
    for name, run in grid.OF_INPUTS.items():
        if program == "encoder" and name not in ("forward", "grad", "vmap_grad"):
            continue  # the table has all: tests/grid_table.py
        torch._dynamo.reset()
        compiled = torch.compile(
            lambda p, x, run=run: run(qfn, p, x),
            fullgraph=name != "backward",  # torch.autograd.grad in a graph wants its inputs made there
            backend=teint8.compile.backend if backend == "teint8" else backend,
        )
        got = compiled(packed, x)
        assert grid.relative_error(got, run(qfn, packed, x)) < 1e-5, name
        assert all(float(t.norm()) > 0 for t in torch.utils._pytree.tree_leaves(got)), name


def test_compiled_backward_outside_and_packed_weights(device: str) -> None:
    qfn, params, x = grid.programs("mlp", device=device)
    leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
    torch._dynamo.reset()
    compiled = torch.compile(qfn, fullgraph=True)
    got = torch.autograd.grad(compiled(leaves, x).square().mean(), leaves.values())
    want = torch.func.grad(grid.loss_of(qfn, x))(params)
    assert grid.relative_error(list(got), list(want.values())) < 1e-5
    packed = teint8.pack(qfn, params)
    xs = x.clone().requires_grad_()
    (gx,) = torch.autograd.grad(compiled(packed, xs).square().mean(), xs)
    assert grid.relative_error(gx, torch.func.grad(lambda x: qfn(packed, x).square().mean())(x)) < 1e-5
