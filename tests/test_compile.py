"""The torch.compile backend "teint8": its values against ``quantize`` in eager mode, for modules and for functions under torch.func."""

import functools
import gc
import importlib.metadata
import pathlib
import re
import threading
import warnings
from types import SimpleNamespace

import grid
import pytest
import sympy
import torch
import torch.nn.functional as F
from contract import different
from torch import nn
from torch.utils.checkpoint import checkpoint

import teint8
from teint8 import Policy, Quant, Rule
from teint8.compile import backend
from teint8.ops import registry, traced
from teint8.transforms.graphs import path_of

TRANSFORMS = [name for name in grid.TRANSFORMS if name != "checkpoint"]


@pytest.fixture(autouse=True)
def _anew():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _installed() -> bool:
    return bool([e for e in importlib.metadata.entry_points(group="torch_dynamo_backends") if e.name == "teint8"])


BACKEND = "teint8" if _installed() else backend


def _compiled(f, **options):
    return torch.compile(f, backend=BACKEND, fullgraph=True, options=options)


def _exact(device: str) -> tuple[nn.Module, torch.Tensor]:
    """A model whose float ops are the same in Inductor and in eager mode, so that every bit can be compared."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 10)).to(device)
    return model, torch.randn(7, 24, device=device)


@pytest.mark.skipif(not _installed(), reason="teint8 runs from its folder, not installed")
def test_it_is_found_by_name() -> None:
    assert "teint8" in torch.compiler.list_backends()


@pytest.mark.parametrize("policy", ["qat", "training", "switchback", "weight_only", "simulate"])
def test_the_bits_are_those_of_eager_mode(policy: str, device: str) -> None:
    model, x = _exact(device)
    qfn = teint8.quantize(model, Policy.preset(policy))
    params = dict(model.named_parameters())
    compiled = _compiled(model, policy=Policy.preset(policy))
    y, want = compiled(x), qfn(params, x)
    exact = different if policy != "weight_only" else lambda a, b: 0 if torch.allclose(a, b, rtol=1e-5, atol=1e-6) else 1
    assert exact(y, want) == 0
    got = torch.autograd.grad(y.square().mean(), list(model.parameters()))
    want = torch.autograd.grad(want.square().mean(), list(params.values()))
    assert grid.relative_error(list(got), list(want)) < 1e-5
    with torch.no_grad():
        assert exact(compiled(x), qfn(params, x)) == 0


def test_packed_weights_follow_the_floats(device: str) -> None:
    model, x = _exact(device)
    qfn, compiled = teint8.quantize(model), _compiled(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    teint8.te_int8_autocast.cache_clear()
    with torch.no_grad():
        before = compiled(x)
    assert teint8.te_int8_autocast.cache_info().weights == 3  # what runs is packed once, as in a context
    compiled(x).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        after = compiled(x)
        assert different(after, qfn(dict(model.named_parameters()), x)) == 0 and different(before, after) > 0
        model[0].weight.mul_(2)
        assert different(compiled(x), qfn(dict(model.named_parameters()), x)) == 0


def test_training_may_be_asked_for(device: str) -> None:
    model, x = _exact(device)
    packed = lambda: teint8.te_int8_autocast.cache_info().weights
    teint8.te_int8_autocast.cache_clear()
    with torch.no_grad():
        y = _compiled(model, training=True)(x)
    assert packed() == 0
    torch._dynamo.reset()
    model[2].requires_grad_(False)
    x.requires_grad_()
    got = _compiled(model, training=False)(x)
    assert different(got, y) == 0 and packed() == 1  # that of which no gradient is wanted
    wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
    got = torch.autograd.grad(got.square().mean(), wanted)
    want = torch.autograd.grad(teint8.quantize(model)(dict(model.named_parameters()), x).square().mean(), wanted)
    assert grid.relative_error(list(got), list(want)) < 1e-5


def test_gradients_in_a_graph_that_is_compiled_without(device: str) -> None:
    model, x = _exact(device)
    params = dict(model.named_parameters())
    plain = lambda p: torch.func.functional_call(model, p, (x,)).square().mean()
    want = torch.func.grad(lambda p: teint8.quantize(model)(p, x).square().mean())(params)
    with torch.no_grad():
        assert grid.relative_error(_compiled(torch.func.grad(plain))(params), want) < 1e-5

    def enables(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return model(x)

    with torch.no_grad():
        y = torch.compile(enables, backend=BACKEND)(x)
    assert y.requires_grad
    got = torch.autograd.grad(y.square().mean(), list(model.parameters()))
    assert grid.relative_error(list(got), list(want.values())) < 1e-5


@pytest.mark.parametrize("how", ["weight", "alias", "data", "detached", "in a checkpoint"])
def test_weights_that_the_graph_edits(how: str, device: str) -> None:
    class Ema(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(24, 16)
            self.register_buffer("alias", self.fc.weight.data)

        def edit(self) -> None:
            w = self.fc.weight
            {"alias": self.alias, "data": w.data, "detached": w.detach()}.get(how, w).mul_(3.0)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if how == "in a checkpoint":
                checkpoint(self.edit, use_reentrant=False)
            else:
                self.edit()
            return self.fc(x)

    model, x = Ema().to(device), torch.randn(5, 24, device=device)
    model.alias = model.fc.weight.data
    compiled = _compiled(model)
    with torch.no_grad():
        for _ in range(3):
            y = compiled(x)
            assert different(y, teint8.ops.linear(x, model.fc.weight, model.fc.bias)) == 0


def test_weights_of_inference_mode_and_transposed_ones(device: str) -> None:
    x = torch.randn(5, 24, device=device)
    with torch.inference_mode():
        model = nn.Linear(24, 16).to(device)
        assert model.weight.is_inference()
        assert different(_compiled(model)(x), teint8.ops.linear(x, model.weight, model.bias)) == 0
    model = nn.Linear(24, 16, bias=False).to(device)

    def transposed(x: torch.Tensor) -> torch.Tensor:
        return x @ model.weight.t()

    teint8.te_int8_autocast.cache_clear()
    with torch.no_grad():
        assert different(_compiled(transposed)(x), teint8.ops.linear(x, model.weight)) == 0
    assert teint8.te_int8_autocast.cache_info().weights == 1


def test_sizes_that_depend_on_data(device: str) -> None:
    model, x = _exact(device)
    qfn = teint8.quantize(model)

    def positive(x: torch.Tensor) -> torch.Tensor:
        return model(x[x[:, 0] > 0])

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for enabled in (False, True):
            with torch.set_grad_enabled(enabled):
                y = _compiled(positive)(x)
            assert 0 < len(y) < len(x)
            assert different(y, qfn(dict(model.named_parameters()), x[x[:, 0] > 0])) == 0


def test_products_by_what_is_no_weight(device: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 8))

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            a = a + 0
            a @= self.w
            return a @ b

    model = Mixed().to(device)
    a, b = torch.randn(4, 8, device=device), torch.randn(8, 3, device=device, requires_grad=True)
    receipt = teint8.Receipt()
    y = _compiled(model, receipt=receipt)(a, b)
    assert different(y, teint8.ops.linear(a, model.w.t()) @ b) == 0
    assert [(r.path, r.op, r.int8) for r in receipt] == [("w", "matmul", True), ("?", "activation_matmul", False)]


def test_another_thread_is_not_compiling() -> None:
    """torch's flag is one for all threads."""
    from teint8 import _compilers, _torch

    model, x = _exact("cpu")
    teint8.te_int8_autocast.cache_clear()
    seen = []

    def elsewhere() -> None:
        context = teint8.te_int8_autocast(training=False)
        with torch.no_grad(), context:
            seen.append((_torch.is_compiling(), context._entered() != [0], different(model(x), want)))

    want = teint8.quantize(model)(dict(model.named_parameters()), x)
    with _compilers.compiling():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        context = teint8.te_int8_autocast()
        context.__enter__()
    context.__exit__(None, None, None)  # undoes what was done, whatever is compiled by now
    assert seen == [(False, True, 0)] and torch.backends.mha.get_fastpath_enabled()
    assert teint8.te_int8_autocast.cache_info().weights == 3


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("program", ["mlp", "encoder", "function"])
def test_transforms_of_plain_programs(program: str, transform: str, device: str) -> None:
    qfn, params, x = grid.programs(program, device=device)
    plain = qfn.__wrapped__
    if isinstance(plain, nn.Module):
        module = plain
        plain = lambda p, x: torch.func.functional_call(module, p, (x,))
    run = grid.TRANSFORMS[transform]
    if transform == "vmap_params":  # weights are inputs of the graph: what a graph computes is no weight
        params, run = grid.stacked(params), lambda q, p, x: torch.func.vmap(lambda p: q(p, x))(p)
    receipt = teint8.Receipt()
    if program == "encoder" and transform in ("jvp", "jvp_grad", "grad_grad"):  # Dynamo runs the float attention, which has none
        with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="attention"):
            _compiled(lambda p, x: run(plain, p, x), receipt=receipt)(params, x)
        return
    got = _compiled(lambda p, x: run(plain, p, x), receipt=receipt, params="p")(params, x)
    want = run(qfn, params, x)
    assert receipt.int8_calls == receipt.calls > 0
    assert grid.relative_error(got, want) < 1e-5
    assert all(float(t.norm()) > 0 for t in torch.utils._pytree.tree_leaves(got))


def test_products_of_inputs_stay_float_and_the_receipt_says_so(device: str) -> None:
    a, b = torch.randn(4, 8, device=device), torch.randn(8, 3, device=device)
    receipt = teint8.Receipt()
    y = _compiled(lambda a, b: a @ b, receipt=receipt)(a, b)
    torch.testing.assert_close(y, a @ b)
    assert [(r.int8, "activations" in r.reason) for r in receipt] == [(False, True)]


def test_checkpoints_run_in_int8_and_so_do_their_recomputations(device: str) -> None:
    for program in ("mlp", "encoder", "function"):
        qfn, params, x = grid.programs(program, device=device)
        plain = qfn.__wrapped__
        if isinstance(plain, nn.Module):
            module = plain
            plain = lambda p, x: torch.func.functional_call(module, p, (x,))
        leaves, spec = torch.utils._pytree.tree_flatten(params)
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        tree = torch.utils._pytree.tree_unflatten(leaves, spec)
        torch._dynamo.reset()
        inside = _compiled(lambda p, x: checkpoint(lambda x, p: plain(p, x), x, p, use_reentrant=False))
        got = torch.autograd.grad(inside(tree, x).square().mean(), leaves)
        want = torch.autograd.grad(qfn(tree, x).square().mean(), leaves)
        assert grid.relative_error(list(got), list(want)) < 1e-5
        # Dynamo enters no mode inside of a checkpoint: compiling the quantized function must say so, and not run in float
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.TorchDynamoException):
            torch.compile(lambda p, x: checkpoint(lambda x, p: qfn(p, x), x, p, use_reentrant=False), fullgraph=True)(tree, x)


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantization in aten ops on every device."""
    monkeypatch.setattr(traced, "FUSED_ON", ("cpu", "cuda"))


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("flavour", ["normal", "tiny", "zeros", "nan", "inf", "huge"])
def test_quantization_in_aten_ops_has_the_contracts_bits(flavour: str, dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    factor = {"tiny": 2.0**-95, "zeros": 0.0, "huge": 1e4}.get(flavour, 2.0)
    x = (torch.randn(65, 3, 130, dtype=torch.float64) * factor).to(dtype).to(device)
    if flavour in ("nan", "inf"):
        x[::7, 1, 5] = float(flavour)
    want = teint8.ops.quantize(x, impl="reference")
    got = torch.compile(lambda x: teint8.ops.quantize(x), fullgraph=True)(x)
    assert [different(a, b) for a, b in zip(got, want, strict=True)] == [0, 0]


@pytest.mark.usefixtures("fused")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("way", ["inductor", "teint8"])
def test_transforms_with_fused_quantization(way: str, transform: str, device: str) -> None:
    qfn, params, x = grid.programs("mlp", device=device)
    module, run = qfn.__wrapped__, grid.TRANSFORMS[transform]
    plain = lambda p, x: torch.func.functional_call(module, p, (x,))
    if way == "inductor":
        got = torch.compile(lambda p, x: run(qfn, p, x), fullgraph=True)(params, x)
    else:
        got = _compiled(lambda p, x: run(plain, p, x))(params, x)
    assert grid.relative_error(got, run(qfn, params, x)) < 1e-5
    assert all(float(t.norm()) > 0 for t in torch.utils._pytree.tree_leaves(got))


@pytest.mark.usefixtures("fused")
def test_fused_quantization_writes_codes_and_scales_only(device: str) -> None:
    """RMSNorm, linear and silu(g) * u, linear: what lies between the calls of ours has no float result."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.gate, self.up, self.down = nn.RMSNorm(64), nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(x)
            return self.down(F.silu(self.gate(h)) * self.up(h))

    model = Block().to(device)
    x = torch.randn(40, 64, device=device)
    with torch.no_grad():
        y, code = torch._inductor.utils.run_and_get_code(_compiled(model, force_disable_caches=True), x)
        torch.testing.assert_close(y, teint8.quantize(model)(dict(model.named_parameters()), x), rtol=1e-2, atol=1e-2)
    text = "\n".join(code)
    assert "torch.ops.teint8.quantize" not in text and text.count("torch.ops.teint8.int8_mm.default(") == 3
    made = re.findall(r"= empty_strided_\w+\(\((40, \d+)\), \(\d+, 1\), torch\.(\w+)\)", text)
    # of the size of h its codes, once, for both linears, and those of what goes down; scales have a column
    assert sorted((size, dtype) for size, dtype in made if not size.endswith(", 1")) == [("40, 64", "int8"), ("40, 96", "int8")]


def test_long_rows_are_held_at_once_where_codes_are_written() -> None:
    """Inductor alone reads rows of more than 1024 elements twice; everything but what writes codes is left to it."""
    from torch._inductor.runtime.hints import ReductionHint
    from torch._inductor.sizevars import SizeVarAllocator
    from torch._inductor.virtualized import V

    from teint8 import _compilers

    def held(columns: int, dtype: torch.dtype, hint: ReductionHint = ReductionHint.INNER, cooperative: bool = False) -> bool:
        node = SimpleNamespace(node=SimpleNamespace(get_dtype=lambda: dtype))
        size = sympy.Integer(columns)
        features = SimpleNamespace(
            scheduler_nodes=lambda: (node,), get_reduction_hint=lambda: hint, reduction_numel=size, numel=sympy.Integer(64)
        )
        with V.set_graph_handler(SimpleNamespace(sizevars=SizeVarAllocator())):
            return _compilers.rows_at_once(V.choices).should_use_persistent_reduction(features, cooperative)

    assert held(14336, torch.int8) and held(64, torch.int8) and held(64, torch.bfloat16)
    assert not held(14336, torch.bfloat16) and not held(2**15, torch.int8) and not held(14336, torch.int8, cooperative=True)
    assert not held(14336, torch.int8, ReductionHint.OUTER)


def test_few_rows_are_reduced_in_one_kernel() -> None:
    from teint8 import _compilers

    class Inductors:
        @staticmethod
        def reduction_split_factor(device: torch.device, reduction_numel_hint: int, numel_hint: int, inner_reduction: bool) -> int:
            return 7

    split = _compilers.rows_at_once(Inductors()).reduction_split_factor
    device = torch.device("cpu")
    assert split(device, 14336, 1, True) == split(device, 14336, 1, inner_reduction=True) == 1
    assert split(device, 2**15, 1, True) == split(device, 14336, 1, False) == 7


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_long_rows_are_read_once_on_a_gpu() -> None:
    model = nn.Sequential(nn.RMSNorm(4096), nn.Linear(4096, 16, bias=False)).cuda()
    x = torch.randn(8, 4096, device="cuda")
    with torch.no_grad():
        y, code = torch._inductor.utils.run_and_get_code(_compiled(model, force_disable_caches=True), x)
        torch.testing.assert_close(y, teint8.quantize(model)(dict(model.named_parameters()), x), rtol=1e-2, atol=1e-2)
    text = "\n".join(code)
    assert "triton_per_" in text and "triton_red_" not in text


MASKS = {
    "none": {},
    "keys": {"src_key_padding_mask": torch.arange(5).expand(3, 5) > torch.tensor([[4], [3], [2]])},
    "causal": {"src_mask": torch.triu(torch.full((5, 5), float("-inf")), 1)},
    "boolean": {"src_mask": torch.triu(torch.ones(5, 5), 1) > 0},
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("norm_first,activation", [(False, "relu"), (True, "gelu")])
def test_encoder_layers_in_inference(masks: str, norm_first: bool, activation: str) -> None:
    """Torch has one fused call for them, which would run in float."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True, norm_first=norm_first, activation=activation).eval()
    params, x = {k: v.detach() for k, v in model.named_parameters()}, torch.randn(3, 5, 16)
    qfn, kwargs = teint8.quantize(model), MASKS[masks]
    seen = ~kwargs.get("src_key_padding_mask", torch.zeros(3, 5, dtype=torch.bool))
    receipt = teint8.Receipt()
    with torch.no_grad():
        want = qfn(params, x, **kwargs)[seen]
        compiled = torch.compile(model, fullgraph=True)
        with teint8.te_int8_autocast():
            around = compiled(x, **kwargs)
        for y in (around, torch.compile(qfn, fullgraph=True)(params, x, **kwargs), _compiled(model, receipt=receipt)(x, **kwargs)):
            assert grid.relative_error(y[seen], want) < 1e-5
        assert receipt.int8_calls == receipt.calls == 4
        gc.collect()  # a trace that another test gave up may be alive
        assert torch.backends.mha.get_fastpath_enabled()
        assert grid.relative_error(model(x, **kwargs)[seen], want) > 1e-4  # in float, by the fused call


def test_attention_in_inference() -> None:
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(16, 4, batch_first=True).eval(), torch.randn(3, 5, 16)
    for need_weights in (True, False):
        receipt = teint8.Receipt()
        torch._dynamo.reset()
        with torch.no_grad():
            with teint8.te_int8_autocast(training=False):
                want = model(x, x, x, need_weights=need_weights)
            got = _compiled(model, receipt=receipt)(x, x, x, need_weights=need_weights)
        assert receipt.int8_calls == receipt.calls == 2
        for a, b in zip(got, want, strict=True):
            assert (a is None and b is None) or grid.relative_error(a, b) < 1e-5


def test_the_switch_of_the_fused_layers_comes_back() -> None:
    enabled = torch.backends.mha.get_fastpath_enabled
    first, second = teint8.te_int8_autocast(), teint8.te_int8_autocast()
    first.__enter__()
    second.__enter__()
    assert not enabled()
    second.__exit__(None, None, None)
    assert not enabled()
    first.__exit__(None, None, None)
    assert enabled()

    def stops(p, x):
        y = F.linear(x, p)
        raise KeyError(f"{y.shape}")

    with pytest.raises(Exception, match="KeyError"):
        torch.compile(teint8.quantize(stops), fullgraph=True)(torch.randn(4, 4), torch.randn(2, 4))
    torch._dynamo.reset()
    gc.collect()
    assert enabled()


def test_bodies_that_dynamo_hides_never_run_in_float_unseen(device: str) -> None:
    w, x = torch.randn(8, 8, device=device), torch.randn(5, 8, device=device)

    def checkpointed(p, x):
        return checkpoint(lambda x: F.linear(x, p), x, use_reentrant=False)

    def branching(p, x):
        inner = lambda x: torch.cond(x.sum() > 1e9, lambda x: x @ p.t(), lambda x: F.linear(x, p), (x,))
        return torch.cond(x.sum() > -1e9, inner, lambda x: (x * 2).matmul(p.t()), (x,))

    for function in (checkpointed, branching):
        torch._dynamo.reset()
        # of what cond raises, Dynamo of torch 2.11 shows the line and not the message
        with pytest.raises(Exception, match=r"would stay float|raise RuntimeError"):
            torch.compile(teint8.quantize(function), fullgraph=True)(w, x)
    torch._dynamo.reset()
    y = torch.compile(teint8.quantize(checkpointed))(w, x)  # breaks the graph: eager mode runs it
    assert different(y, teint8.ops.linear(x, w)) == 0
    receipt = teint8.Receipt()
    torch._dynamo.reset()
    torch.testing.assert_close(_compiled(branching, receipt=receipt)(w, x), F.linear(x, w))
    assert receipt.int8_calls == 0 and receipt.calls == 3 and all("cond" in r.reason for r in receipt)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="strict: 3 calls cannot run"):
        _compiled(branching, strict=True)(w, x)


def test_paths_rules_and_receipt_are_those_of_quantize() -> None:
    model = grid.encoder().eval()
    x = torch.randn(6, 3, 16)
    policy = Policy([Rule("*.linear1.*", weight=None), Rule("1.*", gradient=Quant()), Rule()])
    receipt = teint8.Receipt()
    torch.compile(model, backend=BACKEND, options={"policy": policy, "receipt": receipt})(x)
    want = teint8.explain(teint8.quantize(model, policy), dict(model.named_parameters()), x)
    assert [(r.path, r.op, r.m, r.n, r.k, r.mode, r.reason) for r in receipt] == [
        (r.path, r.op, r.m, r.n, r.k, r.mode, r.reason) for r in want
    ]
    assert receipt.int8_calls == want.int8_calls == 7


def test_a_shared_input_is_quantized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

        def forward(self, x: torch.Tensor, edit: bool) -> torch.Tensor:
            x = x * 2
            q, k = self.q(x), self.k(x)
            if edit:
                x.mul_(3)
            return q + k + self.v(x)

    made: list[int] = []
    original = registry.best("quantize", registry.Problem("cpu", torch.float32, 1, 5, 0, 16))

    def counting(x, seed, scale):
        made.append(x.shape[0])
        return original.run(x, seed, scale)

    model, x = Three(), torch.randn(5, 16)
    monkeypatch.setattr(registry, "_implementations", {k: list(v) for k, v in registry._implementations.items()})
    registry.register("quantize", "counting", counting, device="cpu", priority=1000)
    try:
        for edit, times in ((False, 1), (True, 2)):
            torch._dynamo.reset()
            compiled = _compiled(model)
            with torch.no_grad():
                compiled(x, edit)
                made.clear()
                y = compiled(x, edit)
            assert made == [5] * times
            want = teint8.quantize(model)(dict(model.named_parameters()), x, edit)
            assert different(y, want) == 0
    finally:
        monkeypatch.undo()
        registry.choose_anew()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_and_products_in_compiled_code_are_the_contracts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder's float ops differ in the last bit between Inductor and eager mode: each of our ops is held to its own inputs."""
    seen: dict[str, int] = {"quantize": 0, "int8_mm": 0}

    def checked(op: str):
        reference = next(i for i in registry.implementations(op) if i.name == "reference")

        def run(*args):
            problem_args = args[0]
            best = next(i for i in registry.implementations(op) if i.name.startswith("cpu") and i.why_not(_problem(op, args)) is None)
            got, want = best.run(*args), reference.run(*args)
            pairs = [(got, want)] if op == "int8_mm" else zip(got, want, strict=True)
            assert [different(a, b) for a, b in pairs] == [0] * (1 if op == "int8_mm" else 2), problem_args.shape
            seen[op] += 1
            return got

        return run

    def _problem(op, args):
        x = args[0]
        if op == "quantize":
            return registry.Problem("cpu", x.dtype, 1, x.shape[0], 0, x.shape[1])
        if op == "linear":
            return registry.Problem("cpu", x.dtype, 1, x.shape[0], args[1][0][0].shape[0], x.shape[1])
        return registry.Problem("cpu", args[5], x.shape[0], x.shape[1], args[2].shape[1], x.shape[2])

    def many(x, weights, dtype):
        """What the backend merges on a CPU, by the two ops that it stands for."""
        quantize, multiply = checked("quantize"), checked("int8_mm")
        codes, scale = quantize(x, None, None)
        parts = [tuple(t if t is None else t[None] for t in weight) for weight in weights]
        want = [multiply(codes[None], scale[None], *part, dtype)[0] for part in parts]
        best = next((i for i in registry.implementations("linear") if i.many is not None and i.name.startswith("cpu")), None)
        got = want if best is None or best.why_not(_problem("linear", (x, weights))) else best.many(x, weights, dtype)
        assert [different(a, b) for a, b in zip(got, want, strict=True)] == [0] * len(weights)
        return got

    model = grid.encoder().eval().to(dtype)
    x = torch.randn(6, 3, 16, dtype=dtype)
    monkeypatch.setattr(registry, "_implementations", {k: list(v) for k, v in registry._implementations.items()})
    for op in seen:
        registry.register(op, "checked", checked(op), device="cpu", priority=1000)
    registry.register("linear", "checked", many, device="cpu", priority=1000, many=many)
    try:
        with torch.no_grad():
            y = _compiled(model)(x)
            assert seen["int8_mm"] == 9 and seen["quantize"] >= 9
            torch.testing.assert_close(y, model(x), rtol=0.1, atol=0.1)
    finally:
        monkeypatch.undo()
        registry.choose_anew()


def test_a_bfloat16_model_has_the_bits_of_eager_mode(device: str) -> None:
    if device == "cpu" and torch.__version__ < "2.13":
        pytest.skip("Inductor for CPUs rounds to bfloat16 where eager mode does since torch 2.13")

    class SwiGLU(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(64)
            self.gate, self.up, self.down = nn.Linear(64, 96), nn.Linear(64, 96), nn.Linear(96, 64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.norm(x)
            return x + self.down(F.silu(self.gate(h)) * self.up(h))

    torch.manual_seed(0)
    model = SwiGLU().to(device, torch.bfloat16)
    x = torch.randn(33, 64, device=device, dtype=torch.bfloat16)
    want = teint8.quantize(model)(dict(model.named_parameters()), x)
    assert different(_compiled(model)(x), want) == 0
    torch._dynamo.reset()
    # without the casts of eager mode, which a user may leave out, values are quantized that were never rounded to bfloat16
    assert different(_compiled(model, emulate_precision_casts=False)(x), want) > 0


def test_dynamic_shapes_and_optimizer_steps_compile_nothing_anew(device: str) -> None:
    model, _ = _exact(device)
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True, dynamic=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    torch._dynamo.utils.counters.clear()
    for step in range(50):
        x = torch.randn(2 + step % 9, 24, device=device)
        y = compiled(x)
        assert different(y, teint8.quantize(model)(dict(model.named_parameters()), x)) == 0
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with torch.no_grad():
        for rows in (3, 4, 5, 11):
            x = torch.randn(rows, 24, device=device)
            assert different(compiled(x), teint8.quantize(model)(dict(model.named_parameters()), x)) == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_entering_and_leaving_a_context_compiles_twice_in_all() -> None:
    model, x = _exact("cpu")
    compiled = torch.compile(model, fullgraph=True)
    want = teint8.quantize(model)(dict(model.named_parameters()), x)
    torch._dynamo.utils.counters.clear()
    for _ in range(3):
        torch.testing.assert_close(compiled(x), model(x))
        with teint8.te_int8_autocast():
            assert different(compiled(x), want) == 0
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_graph_breaks_in_user_code() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x)
            torch._dynamo.graph_break()
            return self.second(F.relu(h))

    model, x = Broken(), torch.randn(3, 8)
    receipt = teint8.Receipt()
    y = torch.compile(model, backend=BACKEND, options={"receipt": receipt})(x)
    assert different(y, teint8.quantize(model)(dict(model.named_parameters()), x)) == 0
    assert [r.path for r in receipt] == ["first.weight", "second.weight"]


def test_paths_after_graph_breaks_in_submodules_and_of_tied_weights() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            h = self.first(x)
            torch._dynamo.graph_break()
            return self.second(F.relu(h))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block() for _ in range(3)])
            self.last, self.tied = nn.Linear(8, 8), nn.Linear(8, 8)
            self.tied.weight = self.last.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.head(x)
            for block in self.blocks:
                x = block(x)
            return x

        def head(self, x: torch.Tensor) -> torch.Tensor:
            return self.tied(self.last(x))

    model, x = Model(), torch.randn(3, 8)
    # one compiled function runs all blocks, of which the second has another rule
    policy = Policy([Rule("blocks.1.*", weight=None), Rule()])
    receipt = teint8.Receipt()
    with pytest.warns(UserWarning, match=r"code again for blocks\.1"):
        y = torch.compile(model, backend=BACKEND, options={"receipt": receipt, "policy": policy})(x)
    want = teint8.explain(teint8.quantize(model, policy), dict(model.named_parameters()), x)
    assert {(r.path, r.int8) for r in receipt} == {(r.path, r.int8) for r in want} and len(receipt) == 7
    assert different(y, teint8.quantize(model, policy)(dict(model.named_parameters()), x)) == 0
    got = torch.autograd.grad(y.square().mean(), list(model.parameters()), allow_unused=True)
    y = teint8.quantize(model, policy)(dict(model.named_parameters()), x)
    want = torch.autograd.grad(y.square().mean(), list(model.parameters()), allow_unused=True)
    assert [g is None for g in got] == [g is None for g in want]
    assert grid.relative_error([g for g in got if g is not None], [g for g in want if g is not None]) < 1e-5


@pytest.mark.parametrize("op", ["conv", "embedding"])
def test_rules_of_other_ops_hold_where_code_is_used_again(op: str) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv1d(4, 4, 1) if op == "conv" else nn.Embedding(9, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            torch._dynamo.graph_break()
            return self.layer(x) if op == "conv" else x + self.layer(torch.arange(x.shape[0] * 0 + 4))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block() for _ in range(3)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model, x = Model(), torch.randn(2, 4, 4)
    policy = Policy([Rule("blocks.1.*", ops=(op,), weight=None), Rule(ops=(op,))])
    with torch.no_grad(), pytest.warns(UserWarning, match=r"code again for blocks\.1"):
        y = torch.compile(model, backend=BACKEND, options={"policy": policy})(x)
    assert different(y, teint8.quantize(model, policy)(dict(model.named_parameters()), x)) == 0


def test_a_compiled_module_inside_of_another_has_paths_of_its_own() -> None:
    inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    policy, receipt, x = Policy([Rule("0.*", weight=None), Rule()]), teint8.Receipt(), torch.randn(3, 8)

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.m = torch.compile(inner, backend=BACKEND, options={"policy": policy, "strict": True, "receipt": receipt})

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.m(x)

    with torch.no_grad():
        y = Outer()(x)
    assert [(r.path, r.int8) for r in receipt] == [("0.weight", False), ("2.weight", True)]
    assert different(y, teint8.quantize(inner, policy)(dict(inner.named_parameters()), x)) == 0


def test_a_whole_training_step_with_its_optimizer(device: str) -> None:
    losses = []
    for way in ("compiled", "eager"):
        torch._dynamo.reset()
        model, x = _exact(device)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        qfn, params = teint8.quantize(model), dict(model.named_parameters())
        run = torch.compile(model, backend=BACKEND) if way == "compiled" else lambda x: qfn(params, x)
        for _ in range(5):
            loss = run(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss))
    assert abs(losses[0] - losses[1]) < 1e-5 * losses[1]


def test_a_step_compiled_as_a_whole() -> None:
    losses = []
    for compiled in (True, False):
        torch._dynamo.reset()
        model, x = _exact("cpu")
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        qfn, params = teint8.quantize(model), dict(model.named_parameters())
        forward = model if compiled else lambda x: qfn(params, x)

        def step(x: torch.Tensor) -> torch.Tensor:
            loss = forward(x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        run = torch.compile(step, backend=BACKEND) if compiled else step
        losses.append([float(run(x)) for _ in range(4)])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_modes(mode: str, device: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cuda":
        from teint8.kernels import tuned

        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(tuned, "_table", functools.cache(tuned._table.__wrapped__))
    model, x = _exact(device)
    want = teint8.quantize(model)(dict(model.named_parameters()), x)
    with torch.no_grad():
        for compiled in (torch.compile(model, backend=BACKEND, mode=mode), _compiled(model, mode=mode)):
            torch._dynamo.reset()
            assert [different(compiled(x), want) for _ in range(3)] == [0] * 3
    assert device != "cuda" or (tuned.path(0).exists() == (mode == "max-autotune"))


def test_max_autotune_measures_the_matmuls_of_the_graph(device: str) -> None:
    from teint8.compile import _How, _Program

    seen = []

    def look(gm, inputs):
        for policy in (Policy.qat(), Policy.training()):
            seen.append(_Program(gm, _How(policy, None, False, None, None), list(inputs)).problems(inputs))
        return gm

    model, x = _exact(device)
    torch.compile(model, backend=look, fullgraph=True)(x)
    forward = [(7, 48, 24), (7, 40, 48), (7, 10, 40)]
    assert seen[0] == forward
    assert set(seen[1]) == {size for m, n, k in forward for size in ((m, n, k), (m, k, n), (n, k, m))}


def test_weights_keep_their_address_for_cuda_graphs(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Else a CUDA graph would copy them at every replay."""
    from torch._functorch._aot_autograd import frontend_utils

    class Log:
        def debug(self, text: str, *args: object) -> None:
            said.append(text % args)

    said: list[str] = []
    monkeypatch.setattr(frontend_utils, "static_inputs_log", Log())
    model, x = _exact(device)
    with torch.no_grad():
        _compiled(model)(x)
    assert sum(line.startswith("Adding static") for line in said) == 6 + 2 * 3  # parameters, and codes and scales of three
    assert [line for line in said if line.startswith("Non-static")] == ["Non-static input pos 2 for source L['args'][0]"]


class _Served(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.qfn = teint8.quantize(model)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.qfn(dict(self.model.named_parameters()), x)


def test_export_and_packages_that_run_from_a_file(tmp_path: pathlib.Path) -> None:
    model, x = _exact("cpu")
    want = teint8.quantize(model)(dict(model.named_parameters()), x)
    rows = {"x": {0: torch.export.Dim("rows", min=2, max=100)}}
    with torch.no_grad():
        exported = torch.export.export(_Served(model), (x,), dynamic_shapes=rows)
        torch.export.save(exported, tmp_path / "exported.pt2")
        loaded = torch.export.load(tmp_path / "exported.pt2").module()
        package = torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "package.pt2"))
        packaged = torch._inductor.aoti_load_package(package)
        for run in (exported.module(), loaded, packaged):
            assert different(run(x), want) == 0 and different(run(x[:3]), want[:3]) == 0


def test_bad_options_and_strict() -> None:
    model, x = _exact("cpu")
    for name, value in (("policy", "qat"), ("training", 1), ("strict", "yes"), ("receipt", [])):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=f"option {name} is {value!r}".replace("[]", r"\[\]")):
            _compiled(model, **{name: value})(x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"strict: 0\.weight"):
        _compiled(model.double(), strict=True, policy=Policy([Rule(weight=Quant(), activation=Quant())]))(x.long())
    model, x = _exact("cpu")
    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"strict: no parameter has the path of Rule\('4.wieght', weight=None\); those are '0.weight'"):
        _compiled(model, strict=True, policy=Policy([Rule("4.wieght", weight=None), Rule()]))(x)


def test_options_of_inductor_are_handed_on() -> None:
    model, x = _exact("cpu")
    with pytest.raises(Exception, match="there is no option 'polcy'; did you mean 'policy'"):
        _compiled(model, polcy=Policy.qat())(x)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="no_such_option"):
        _compiled(model, no_such_option=1)(x)
    torch._dynamo.reset()
    assert different(_compiled(model, **{"cpp.threads": 1})(x), _compiled(model)(x)) == 0


@pytest.mark.parametrize(
    "source,path",
    [
        ("L['self']._modules['0']._parameters['weight']", "0.weight"),
        ("L['fn']._orig_mod._modules['a']._modules['b']._parameters['w']", "a.b.w"),
        ("L['p']['layers'][0]['w']", "layers.0.w"),
        ("L['w']", "w"),
        ("G['model'].head.weight", "head.weight"),
    ],
)
def test_paths_from_sources(source: str, path: str) -> None:
    assert path_of(source) == path


def test_the_backend_is_a_function_too() -> None:
    model, x = _exact("cpu")
    y = torch.compile(model, backend=backend)(x)
    assert different(y, teint8.quantize(model)(dict(model.named_parameters()), x)) == 0
