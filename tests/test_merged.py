"""What the backend merges on a CPU: quantization and matmuls in one call, torch's own GELU between two of them; the same bits."""

import contextlib
import re
from typing import Any

import pytest
import torch
from contract import different
from torch import Tensor, nn
from torch._inductor import custom_graph_pass
from torch._inductor.utils import run_and_get_code

from teint8 import Policy, _compilers, te_int8_autocast
from teint8.compile import backend
from teint8.ops.raw import int8_mm, quantize
from teint8.ops.raw_linears import linears


class Layer(nn.Module):
    """Three linears of one input, one without a bias, and two with a GELU between them."""

    def __init__(self, width: int = 40, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, width, bias=False), nn.Linear(width, 24)
        self.up, self.down = nn.Linear(width, 72), nn.Linear(72, width)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        # rounded once: what Inductor for CPUs does not round before torch 2.13 is not seen
        h: Tensor = torch.maximum(self.q(x), self.k(x)) * self.v(x).amax(-1, keepdim=True)
        return self.down(nn.functional.gelu(self.up(h)))  # type: ignore[no-any-return]


def compiled_and_eager(model: nn.Module, x: Tensor, **options: Any) -> tuple[Tensor, Tensor, str]:
    """Both results, and the code that Inductor wrote."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, options={"fx_graph_cache": False, **options})
    with torch.no_grad():
        y, code = run_and_get_code(compiled, x)
        with te_int8_autocast(training=False, policy=options.get("policy")):
            return y, model(x), "\n".join(code)


def calls(code: str, op: str) -> int:
    return len(re.findall(rf"torch\.ops\.teint8\.{op}\.default\(", code))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("rows", [3, 33])
def test_one_call_for_what_shares_an_input(rows: int, dtype: torch.dtype) -> None:
    x = torch.randn(2, rows, 40, dtype=dtype)
    x[0, 1], x[1, 2, 3] = 0, float("nan")
    y, want, code = compiled_and_eager(Layer(dtype=dtype), x)
    assert different(y, want) == 0 and want.isfinite().any()
    assert (calls(code, "linears"), calls(code, "quantize"), calls(code, "int8_mm")) == (3, 0, 0)
    assert code.count("'gelu')") == 1 and ".erf(" not in code


@pytest.mark.parametrize("many", [True, False])
def test_the_op_has_the_bits_of_its_parts(many: bool) -> None:
    for m, n, k in ((1, 5, 7), (9, 33, 64), (70, 40, 1), (300, 96, 130), (0, 4, 8), (5, 0, 8), (3, 4, 0)):
        x = torch.randn(m, k)
        x[:1] = 0
        weights = [quantize(torch.randn(n + i, k)) for i in range(3 if many else 1)]
        biases = [None if i == 1 else torch.randn(n + i) for i in range(len(weights))]
        for activation in ("", "gelu", "gelu_tanh"):
            ys = linears(x, [w for w, _ in weights], [s for _, s in weights], biases, activation)
            form = "tanh" if activation == "gelu_tanh" else "none"
            codes, scale = quantize(nn.functional.gelu(x, approximate=form) if activation else x)
            for y, (wq, ws), bias in zip(ys, weights, biases, strict=True):
                assert different(y, int8_mm(codes, scale, wq, ws, bias, torch.float32)) == 0, (m, n, k, activation)


def test_large_weights_over_many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    from teint8.ops import cpu

    monkeypatch.setattr(cpu, "_CODES", 1 << 14)
    x = torch.randn(700, 130)
    weights = [quantize(torch.randn(n, 130)) for n in (70, 300)]
    ys = linears(x, [w for w, _ in weights], [s for _, s in weights], [None, torch.ones(300)])
    codes, scale = quantize(x, impl="reference")
    for y, (wq, ws), bias in zip(ys, weights, (None, torch.ones(300)), strict=True):
        assert different(y, int8_mm(codes, scale, wq, ws, bias, torch.float32, "reference")) == 0


ACTIVATIONS: dict[str, Any] = {
    **{name: getattr(nn.functional, name) for name in ("gelu", "silu", "relu", "mish", "elu", "hardswish", "softplus", "logsigmoid")},
    **{name: getattr(torch, name) for name in ("sigmoid", "tanh")},
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "softmax": lambda x: x.softmax(-1),
}


class Between(nn.Module):
    """Two linears with an activation between them."""

    def __init__(self, activation: str, dtype: torch.dtype) -> None:
        super().__init__()
        self.up, self.down, self.activation = nn.Linear(40, 72), nn.Linear(72, 24), ACTIVATIONS[activation]
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_compiled_training_has_the_bits_of_compiled_serving(activation: str, dtype: torch.dtype) -> None:
    """And both those of eager mode; gradients are eager mode's but for the last bits of an activation's derivative."""
    model, x = Between(activation, dtype), torch.randn(37, 40, dtype=dtype, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    trained = compiled(x)
    seed = torch.randn_like(trained)
    got = torch.autograd.grad(trained, [x, *model.parameters()], seed)
    with torch.no_grad():
        served = compiled(x)
    with te_int8_autocast():
        want = model(x)
        gradients = torch.autograd.grad(want, [x, *model.parameters()], seed)
    assert served.isfinite().all() and different(trained, served) == 0 and different(served, want) == 0
    for g, w in zip(got, gradients, strict=True):
        assert w.abs().sum() > 0 and float((g - w).norm() / w.norm()) < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("random", [False, True])
def test_plain_inductor_keeps_its_own_gelu(random: bool) -> None:
    """Inductor has its table back, whichever it is; what was compiled is found in its cache, not that of the other backend."""
    function, x = nn.functional.gelu, torch.randn(37, 40)
    counters = torch._dynamo.utils.counters["inductor"]
    found = []
    for name in ("inductor", backend, "inductor", backend):
        torch._dynamo.reset()
        counters.clear()
        compiled = torch.compile(function, backend=name, options={"fallback_random": random})
        y, code = run_and_get_code(compiled, x) if len(found) < 2 else (compiled(x), [])
        assert torch.allclose(y, function(x), atol=1e-6) and (name == "inductor" or different(y, function(x)) == 0)
        found.append((y, "".join(code), counters["fxgraph_cache_hit"]))
    (plain, theirs, _), (ours, code, _), *again = found
    assert ".erf(" in theirs and "aten.gelu.default(" in code and ".erf(" not in code
    assert [different(y, want) for (y, _, _), want in zip(again, (plain, ours), strict=True)] == [0, 0]
    assert [hits for _, _, hits in again] == [1, 1]


def test_what_is_whole_on_a_cpu_is_inductors_elsewhere() -> None:
    from torch._inductor.decomposition import select_decomp_table

    ops = torch.ops.aten.gelu.default, torch.ops.aten.native_layer_norm.default
    before = [select_decomp_table()[op] for op in ops]
    for casts in (False, True):
        with torch._inductor.config.patch(emulate_precision_casts=casts), _compilers._whole():
            gelu, norm = (select_decomp_table()[op] for op in ops)
            assert gelu(torch.ones(3)) is NotImplemented and norm(torch.ones(2, 3), [3], None, None, 1e-5) is NotImplemented
            assert gelu(torch.tensor(1.0)).shape == ()
            for form in ("none", "tanh"):
                assert gelu(torch.ones(3, device="meta"), approximate=form).device.type == "meta"
            assert norm(torch.ones(2, 3, device="meta"), [3], None, None, 1e-5)[0].shape == (2, 3)
    with pytest.raises(RuntimeError, match="within"), _compilers._whole():
        raise RuntimeError("within")
    first, second = _compilers._whole(), _compilers._whole()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert select_decomp_table()[ops[0]](torch.ones(3)) is NotImplemented
    second.__exit__(None, None, None)
    assert [select_decomp_table()[op] for op in ops] == before


class Residual(nn.Module):
    """A convolution with a GELU, and layers with norms, residuals and GELUs of many layouts."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.conv, self.up, self.down = nn.Conv1d(9, 9, 3, padding=1), nn.Linear(40, 71), nn.Linear(71, 24)
        self.norm, self.square, self.what = nn.LayerNorm(40), nn.Linear(40, 40), what

    def forward(self, x: Tensor) -> Tensor:
        gelu = nn.functional.gelu
        if self.what == "conv":
            return gelu(self.conv(gelu(self.conv(x)))).transpose(1, 2).contiguous()
        if self.what == "transposed":
            x = x.transpose(0, 1)
            return self.down(gelu(self.up(self.norm(x + gelu(x + self.square(x))))))  # type: ignore[no-any-return]
        if self.what == "expanded":
            return self.down(gelu(self.up(x[:1]).expand(4, -1, -1)))  # type: ignore[no-any-return]
        h = self.up(self.norm(x + self.square(self.norm(x))))
        return self.down(gelu({"plain": h, "sliced": h[:, 1:], "stepped": h[:, ::2], "flat": h.flatten(0, 1)}[self.what]))  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("what", ["conv", "transposed", "expanded", "plain", "sliced", "stepped", "flat"])
def test_layouts_and_norms_have_the_bits_of_eager_mode(what: str, dtype: torch.dtype) -> None:
    """In training, in serving, and for a row alone; torch's GELU itself has other last bits for other layouts."""
    model, x = Residual(what).to(dtype), torch.randn(5, 9, 40, dtype=dtype)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    trained = compiled(x)
    with torch.no_grad():
        served, alone = compiled(x), compiled(x[:1])
        with te_int8_autocast(training=False):
            want, row = model(x), model(x[:1])
    assert want.isfinite().all() and [different(y, want) for y in (trained, served)] == [0, 0] and different(alone, row) == 0


@pytest.mark.parametrize("norm_first,activation", [(False, "relu"), (True, "gelu")])
def test_an_encoder_has_the_bits_of_eager_mode(norm_first: bool, activation: str) -> None:
    layer = nn.TransformerEncoderLayer(48, 4, 96, 0.0, activation, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 3, nn.LayerNorm(48), enable_nested_tensor=False)
    x = torch.randn(4, 19, 48)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=False)
    trained = compiled(x)
    with te_int8_autocast():
        want = model(x)
    with torch.no_grad():
        served, alone = compiled(x), compiled(x[2:3])
    assert want.isfinite().all() and [different(y, want) for y in (trained, served)] == [0, 0] and different(alone, want[2:3]) == 0


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_a_gelu_in_flex_attention_is_inductors() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, score_mod=lambda score, *_: nn.functional.gelu(score))  # type: ignore[return-value]

    q, k, v = torch.randn(3, 1, 2, 128, 16)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.allclose(torch.compile(attend, backend=backend, fullgraph=True)(q, k, v), attend(q, k, v), atol=1e-5)


def test_a_gelu_in_a_checkpoint_is_computed_again() -> None:
    model, x = Between("gelu", torch.float32), torch.randn(37, 40, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)  # type: ignore[no-any-return]

    torch._dynamo.reset()
    results = []
    for function in (torch.compile(run, backend=backend, fullgraph=True), run):
        with te_int8_autocast() if function is run else contextlib.nullcontext():
            y = function(x)
            results.append((y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])))
    for i, (got, want) in enumerate(zip(*results, strict=True)):
        assert want.abs().sum() > 0
        assert different(got, want) == 0 if i == 0 else float((got - want).norm() / want.norm()) < 1e-5


class Late(nn.Module):
    """The second weight, or its bias, is made after the first matmul, and then of what that makes."""

    def __init__(self, depends: bool, what: str) -> None:
        super().__init__()
        self.first, self.second, self.depends, self.what = nn.Linear(32, 32), nn.Linear(32, 32), depends, what

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        factor, weight, bias = (y.amax() if self.depends else 2), self.second.weight, self.second.bias
        weight, bias = (weight * factor, bias) if self.what == "weight" else (weight, bias * factor)
        return y + nn.functional.linear(x, weight, bias)


@pytest.mark.parametrize("what", ["weight", "bias"])
@pytest.mark.parametrize("shape", [(20, 32), (2, 8, 32)])
@pytest.mark.parametrize("depends", [False, True])
def test_what_a_matmul_takes_is_there_before_it(depends: bool, shape: tuple[int, ...], what: str) -> None:
    y, want, code = compiled_and_eager(Late(depends, what), torch.randn(shape), policy=Policy.qat())
    assert different(y, want) == 0
    assert calls(code, "int8_mm") == (2 if depends else 0)


def test_codes_that_are_wanted_stay() -> None:
    """A gradient keeps the codes of the forward: nothing is merged, and the gradients are those of eager mode."""
    model, x = Layer(), torch.randn(20, 40)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, options={"policy": Policy.training()})
    compiled(x).square().sum().backward()
    got = [p.grad for p in model.parameters()]
    model.zero_grad()
    with te_int8_autocast(policy=Policy.training()):
        model(x).square().sum().backward()
    for g, p in zip(got, model.parameters(), strict=True):
        assert g is not None and p.grad is not None and g.abs().sum() > 0
        assert torch.allclose(g, p.grad, rtol=1e-4, atol=1e-4 * float(p.grad.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(20, 32), (2, 10, 32)])
def test_a_gelu_that_others_want_is_not_merged(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            h = nn.functional.gelu(self.up(x))
            return h + self.down(h)  # type: ignore[no-any-return]

    y, want, code = compiled_and_eager(Two().to(dtype), torch.randn(shape).to(dtype))
    assert "'gelu')" not in code and code.count("aten.gelu.default(") == 1
    assert different(y, want) == 0


def test_a_pass_of_the_callers_runs_too() -> None:
    seen: list[int] = []

    def mine(graph: torch.fx.Graph) -> None:
        seen.append(len(graph.find_nodes(op="call_function", target=torch.ops.teint8.linears.default)))

    y, want, _ = compiled_and_eager(Layer(), torch.randn(20, 40), post_grad_custom_post_pass=mine)
    # a torch that takes one pass alone has theirs, and Inductor's own GELU
    several = hasattr(custom_graph_pass, "get_custom_graph_passes")
    assert seen == [3 if several else 0]
    assert different(y, want) == 0 or (not several and torch.allclose(y, want, atol=0.02))


def test_passes_of_every_kind_that_inductor_takes() -> None:
    if not hasattr(custom_graph_pass, "get_custom_graph_passes"):
        pytest.skip("this torch takes one pass alone")
    seen: list[object] = []

    class Aware(custom_graph_pass.CustomInferenceAwareGraphPass):
        def __call__(self, graph: torch.fx.Graph, is_inference: bool) -> None:
            seen.append(is_inference)

        def uuid(self) -> None:
            return None

    for passes in (Aware(), [Aware(), lambda graph: seen.append("plain")]):
        y, want, code = compiled_and_eager(Layer(), torch.randn(20, 40), post_grad_custom_post_pass=passes)
        assert different(y, want) == 0 and calls(code, "linears") == 3
    assert seen == [True, True, "plain"]


class Chain(nn.Module):
    """A GELU whose result is seen otherwise by the next matmul."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down, self.width = nn.Linear(32, 64), nn.Linear(width, 24), width

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)).reshape(-1, self.width))  # type: ignore[no-any-return]


@pytest.mark.parametrize("width", [32, 64, 128])
@pytest.mark.parametrize("shape", [(8, 32), (2, 4, 32)])
def test_a_view_between_gelu_and_matmul(shape: tuple[int, ...], width: int) -> None:
    y, want, code = compiled_and_eager(Chain(width), torch.randn(shape))
    assert different(y, want) == 0 and "'gelu')" in code


def test_what_two_matmuls_take_is_moved_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(32, 32) for _ in range(3))
            self.p = nn.Parameter(torch.randn(32))

        def forward(self, x: Tensor) -> Tensor:
            y, t = self.a(x), self.p.abs()
            linear = nn.functional.linear
            return y + linear(x, self.b.weight, self.b.bias * t) + linear(x, self.c.weight, self.c.bias + t)  # type: ignore[no-any-return]

    y, want, code = compiled_and_eager(Shared(), torch.randn(20, 32))
    assert different(y, want) == 0 and calls(code, "int8_mm") == 0


def test_codes_that_are_the_weight_too() -> None:
    def gram(x: Tensor) -> Tensor:
        codes, scale = quantize(x)
        return int8_mm(codes, scale, codes, scale, None, torch.float32) + nn.functional.linear(x, w)

    x, w = torch.randn(20, 32), torch.randn(20, 32)
    torch._dynamo.reset()
    with torch.no_grad(), te_int8_autocast(training=False):
        want = gram(x)
        assert different(torch.compile(gram, backend=backend)(x), want) == 0


def test_bad_operands_are_refused() -> None:
    w, s = quantize(torch.randn(4, 16))
    with pytest.raises(ValueError, match=r"\(3, 8\) but the weights \[\(4, 16\)\]"):
        linears(torch.randn(3, 8), [w], [s], [None])
    with pytest.raises(ValueError, match=r"scale or bias \(3,\); \(4,\)"):
        linears(torch.randn(3, 16), [w], [s], [torch.zeros(3)])
    with pytest.raises(ValueError, match="'relu'"):
        linears(torch.randn(3, 16), [w], [s], [None], "relu")
