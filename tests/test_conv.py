"""Convolutions: every implementation by bits, values and derivatives against the STE in float64, packed weights, routing."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from contract import different
from grid import relative_error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import teint8
import teint8.compile
from teint8 import Policy, QTensor, Quant, Rule, numerics, ops, te_int8_autocast
from teint8.ops import registry
from teint8.ops.conv_layout import Shape, contracted, kernel_codes, packed_kernel
from teint8.ops.raw_conv import Window, int8_conv, problem_of, quantize_channels

CUDA = torch.cuda.is_available()
TORCH = {
    (1, False): F.conv1d, (2, False): F.conv2d, (3, False): F.conv3d,
    (1, True): F.conv_transpose1d, (2, True): F.conv_transpose2d, (3, True): F.conv_transpose3d,
}  # fmt: skip


FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}


@dataclasses.dataclass(frozen=True)
class Case:
    """One convolution, made from a seed."""

    dims: int
    transposed: bool
    batch: int
    groups: int
    channels: int
    outs: int
    sizes: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    bias: bool
    channels_last: bool
    seed: int

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor | None]:
        g = torch.Generator().manual_seed(self.seed)
        c, n = self.channels * self.groups, self.outs * self.groups
        x = torch.randn(self.batch, c, *self.sizes, generator=g, dtype=torch.float64).to(dtype)
        shape = (c, self.outs) if self.transposed else (n, self.channels)
        w = torch.randn(*shape, *self.kernel, generator=g, dtype=torch.float64).to(dtype)
        b = torch.randn(n, generator=g, dtype=torch.float64).to(dtype) if self.bias else None
        if self.channels_last and self.dims > 1:
            x = x.contiguous(memory_format=torch.channels_last if self.dims == 2 else torch.channels_last_3d)
        return x, w, b

    def how(self) -> dict:
        how = dict(stride=self.stride, padding=self.padding, dilation=self.dilation, groups=self.groups)
        return how | (dict(output_padding=self.output_padding) if self.transposed else {})

    def fits(self) -> bool:
        shape = Shape(self.stride, self.padding, self.dilation, self.groups, self.transposed, self.output_padding)
        if self.transposed and any(o >= max(s, d) for o, s, d in zip(self.output_padding, self.stride, self.dilation, strict=True)):
            return False
        return all(size > 0 for size in shape.out(self.sizes, self.kernel))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dims = draw(st.sampled_from((1, 2, 2, 2, 3)))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))
    transposed = draw(st.sampled_from((False, False, True)))
    groups = draw(st.sampled_from((1, 1, 1, 2, 3, 8)))
    depthwise = draw(st.booleans())
    return Case(
        dims, transposed, draw(st.integers(1, 3)), groups, 1 if depthwise and groups > 1 else draw(st.integers(1, 5)),
        draw(st.integers(1, 5)), each(1, 9), each(1, 3) if draw(st.booleans()) else (1,) * dims, each(1, 3), each(1, 3), each(0, 3),
        each(0, 2) if transposed else (0,) * dims, draw(st.booleans()), draw(st.booleans()), draw(st.integers(0, 2**31)),
    )  # fmt: skip


SETTINGS = settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
PARTS = 8  # of 500 cases, for as many processes: on a GPU a case compiles kernels
PART = settings(SETTINGS, max_examples=-(-500 // PARTS))


def fake(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The STE: values on the INT8 grid of groups that span these dimensions, derivatives of x."""
    plain = x.detach()
    a = plain.abs().amax(dims, keepdim=True).float()
    codes = (plain.float() * numerics.multiplier_of(a)).round().clamp(-127, 127)
    return x + ((codes * numerics.scale_of(a)).to(x.dtype) - plain)


def formula(case: Case, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """The QAT convolution in plain torch."""
    pointwise = math.prod(case.kernel) == 1 and case.groups == 1 and not case.transposed and not any(case.padding)
    spatial = tuple(range(2, x.ndim))
    xf = fake(x, (1,)) if pointwise else fake(x.unflatten(1, (case.groups, -1)), tuple(range(2, x.ndim + 1))).flatten(1, 2)
    if case.transposed:
        parts = w.unflatten(0, (case.groups, -1))
        wf = fake(parts, (1, *(d + 1 for d in spatial))).flatten(0, 1)
    else:
        wf = fake(w, (1, *spatial))
    return TORCH[case.dims, case.transposed](xf, wf, b, **case.how())


@pytest.mark.usefixtures("poisoned")
@SETTINGS
@given(case=cases())
def test_values_and_gradients_are_those_of_the_formula_in_float64(case: Case) -> None:
    if not case.fits():
        return
    x, w, b = case.tensors(torch.float64)
    leaves = [t.requires_grad_() for t in (x, w, b) if t is not None]
    y = ops.conv(x, w, b, transposed=case.transposed, **case.how())
    want = formula(case, x, w, b)
    assert y.shape == want.shape
    last = case.dims > 1 and not x.is_contiguous()
    assert y.is_contiguous(memory_format=FORMATS[case.dims] if last else torch.contiguous_format)
    torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)  # the product is float32 by the contract
    g = torch.randn_like(want)
    got, expected = torch.autograd.grad(y, leaves, g), torch.autograd.grad(want, leaves, g)
    for a, e in zip(got, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


NAMES = ("cpu-c", "cpu-c-grouped", "cpu-depthwise", "patches", "triton-interpreter", "triton")


def _operands(case: Case, device: str) -> tuple:
    g = torch.Generator().manual_seed(case.seed)
    c, n = case.channels * case.groups, case.outs * case.groups
    codes = lambda *shape: torch.randint(-127, 128, shape, generator=g, dtype=torch.int8).to(device)
    xq, wq = codes(case.batch, *case.sizes, c), codes(n, *case.kernel, case.channels)
    parts = [v for v in range(1, case.groups + 1) if case.groups % v == 0]
    xs = torch.rand(case.batch, parts[case.seed % len(parts)], generator=g).to(device)
    ws, b = torch.rand(n, generator=g).to(device), torch.randn(n, generator=g).to(device)
    if case.seed % 3 == 0:
        xs[0, 0] = float("nan")
    if case.channels_last:
        xq = xq.movedim(-1, 1).contiguous().movedim(1, -1)
    return xq, xs, wq, ws, b if case.bias else None


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("part", range(PARTS))
@PART
@given(case=cases())
def test_every_implementation_has_the_bits_of_the_reference(part: int, case: Case) -> None:
    device = "cuda" if CUDA else "cpu"
    padding = tuple(p if i % 2 else q for p, q in zip(case.padding, (2, -1, 0), strict=False) for i in range(2))
    window = Window(case.stride, padding, case.dilation, case.groups)
    if any(size < 1 for size in window.out(case.sizes, case.kernel)) or any(
        s + min(q, 0) < 1 for s, q in zip(case.sizes, padding[::2], strict=True)
    ):
        return
    xq, xs, wq, ws, b = _operands(case, device)
    dtype = (torch.float32, torch.bfloat16, torch.float16, torch.float64)[case.seed % 4]
    problem = problem_of(xq.shape, wq.shape, window, device, dtype)
    want = int8_conv(xq, xs, wq, ws, b, window, dtype, "reference")
    ran = []
    for implementation in registry.implementations("conv"):
        if implementation.name in NAMES and registry.why_not(implementation, problem) is None:
            assert different(int8_conv(xq, xs, wq, ws, b, window, dtype, implementation.name), want) == 0, (implementation.name, case)
            ran.append(implementation.name)
    assert "patches" in ran and len(ran) > 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 9, 70), (3, 5, 64), (1, 33, 3)])
def test_codes_by_channel(shape, dtype, device) -> None:
    x = torch.randn(shape, dtype=torch.float64).to(dtype).to(device)
    x[0, 0, 0], x[0, :, -1] = float("nan"), 0
    for layout in (x, x.mT.contiguous().mT, x.repeat(1, 1, 2)[..., : shape[2]]):
        want = quantize_channels(layout, "reference")
        for implementation in registry.implementations("quantize_channels"):
            problem = registry.Problem(device, dtype, 1, *shape)
            if registry.why_not(implementation, problem) is None:
                got = quantize_channels(layout, implementation.name)
                assert [different(a, b) for a, b in zip(got, want, strict=True)] == [0, 0], implementation.name


@pytest.fixture
def without_mkldnn():
    """oneDNN's float convolution of torch 2.13 crashes now and then where padding is wider than what it is put around."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield


@pytest.mark.usefixtures("without_mkldnn")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("wgrad", ["int8", "float"])
@SETTINGS
@given(case=cases())
def test_gradients_in_int8(wgrad: str, rounding: str, case: Case) -> None:
    if not case.fits() or case.seed % 5:
        return
    x, w, b = case.tensors(torch.float32)
    leaves = [t.requires_grad_() for t in (x, w, b) if t is not None]
    results = []
    for impl in ("", "reference"):
        torch.manual_seed(0)
        y = ops.conv(x, w, b, transposed=case.transposed, gradient=rounding, wgrad=wgrad, impl=impl, **case.how())
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
        results.append([y.detach(), *torch.autograd.grad(y, leaves, g)])
    exact = torch.autograd.grad(formula(case, x, w, b), leaves, g)
    for i, (a, e) in enumerate(zip(*results, strict=True)):
        if i < 2 or (i == 2 and wgrad == "int8"):
            assert different(a, e) == 0, i
        else:  # a float matmul, or a sum
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-3)
    assert [t.shape for t in results[0][1:]] == [t.shape for t in exact]
    if case.batch * math.prod(case.sizes) > 30 and case.channels * case.outs > 4:
        bound = 0.08 if rounding == "nearest" else 0.16
        for a, e in zip(results[0][1:], exact, strict=True):
            assert (a - e).norm() <= bound * e.norm() + 1e-6


class Net(nn.Module):
    """A bit of everything; its float ops have the same bits in Inductor and in eager mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.depthwise = nn.Conv2d(16, 16, 3, padding="same", groups=16, padding_mode="reflect")
        self.point = nn.Conv2d(16, 24, 1, 2, bias=False)
        self.grouped = nn.Conv2d(24, 24, (2, 3), padding="same", groups=4)
        self.up = nn.ConvTranspose2d(24, 8, 3, 2, output_padding=1)
        self.line, self.head = nn.Conv1d(8, 4, 5, dilation=2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.depthwise(F.relu(self.stem(x))))
        h = self.up(F.relu(self.grouped(self.point(h))))
        return self.head(self.line(h.flatten(2))[..., 0])


def _net(device: str) -> tuple:
    torch.manual_seed(0)
    model = Net().to(device)
    return model, teint8.quantize(model), dict(model.named_parameters()), torch.randn(2, 3, 16, 16, device=device)


def test_packed_weights_have_the_bits_of_float_ones(device) -> None:
    model, qfn, params, x = _net(device)
    want = qfn(params, x)
    for packed in (teint8.pack(qfn, params), teint8.pack(qfn, params, x)):
        kinds = {name: leaf.axis for name, leaf in packed.items() if isinstance(leaf, QTensor)}
        plain = (-3, -2, -1)
        assert kinds == {
            "stem.weight": plain, "depthwise.weight": plain, "point.weight": plain, "grouped.weight": plain, "up.weight": (-4, -2, -1),
            "line.weight": (-2, -1), "head.weight": -1,
        }  # fmt: skip
        assert different(qfn(packed, x), want) == 0
        again = torch.utils._pytree.tree_map(lambda t: t, packed)
        assert different(qfn(again, x), want) == 0
        back = teint8.unpack(packed)
        for name, leaf in back.items():
            step = params[name].abs().amax() / 127
            assert leaf.shape == params[name].shape and (leaf - params[name]).abs().max() <= step
    with torch.no_grad(), te_int8_autocast(training=False) as ctx:
        assert [different(model(x), want) for _ in range(2)] == [0, 0]
    assert ctx.receipt.int8_calls == ctx.receipt.calls == 14
    with te_int8_autocast():
        assert different(model(x), want) == 0


def test_one_image_without_a_batch_and_half_precision(device) -> None:
    x, w = torch.randn(3, 9, 9, device=device), torch.randn(4, 3, 3, 3, device=device)
    qfn = teint8.quantize(lambda p, x: F.conv2d(x, p))
    assert different(qfn(w, x), qfn(w, x[None])[0]) == 0
    x, w = x.bfloat16(), w.bfloat16()
    assert different(qfn(w, x), ops.conv(x[None], w, impl="reference")[0]) == 0
    with torch.autocast(device, torch.bfloat16):
        y = qfn(w.float(), x.float())
    assert y.dtype == torch.bfloat16


def test_samples_do_not_depend_on_the_batch_and_a_bad_one_spoils_itself_alone(device) -> None:
    x, w = torch.randn(5, 6, 8, 8, device=device), torch.randn(6, 1, 3, 3, device=device)
    whole = ops.conv(x, w, padding=1, groups=6)
    alone = torch.cat([ops.conv(x[i : i + 1], w, padding=1, groups=6) for i in range(5)])
    assert different(whole, alone) == 0
    x[2, 3, 0, 0] = float("inf")
    y = ops.conv(x, w, padding=1, groups=6)
    assert y[2, 3].isnan().all() and different(y[2, :3], whole[2, :3]) == 0 and different(y[3:], whole[3:]) == 0
    assert ops.conv(x[:0], w, groups=6).shape == (0, 6, 6, 6)


@pytest.mark.parametrize("backend", ["inductor", "teint8"])
def test_compiled(backend, device) -> None:
    model, qfn, params, x = _net(device)
    want = qfn(params, x)
    wanted = torch.autograd.grad(want.square().mean(), list(params.values()))
    torch._dynamo.reset()
    if backend == "teint8":
        receipt = teint8.Receipt()
        compiled = torch.compile(model, backend=teint8.compile.backend, fullgraph=True, options={"receipt": receipt})
        y = compiled(x)
        assert receipt.int8_calls == receipt.calls == 7
        with torch.no_grad():
            assert relative_error(compiled(x), want) < 1e-6
    else:
        compiled = torch.compile(qfn, fullgraph=True)
        y = compiled(params, x)
        assert relative_error(torch.compile(qfn, fullgraph=True)(teint8.pack(qfn, params), x), want) < 1e-6
    assert relative_error(y, want) < 1e-6
    got = torch.autograd.grad(y.square().mean(), list(params.values()))
    assert relative_error(list(got), list(wanted)) < 1e-5


def _loss(qfn, x):
    return lambda p: qfn(p, x).square().mean()


TRANSFORMS = {
    "grad": lambda q, p, x: torch.func.grad(_loss(q, x))(p),
    "jvp": lambda q, p, x: torch.func.jvp(lambda p: q(p, x), (p,), ({k: v.cos() for k, v in p.items()},)),
    "vmap_x": lambda q, p, x: torch.func.vmap(lambda v: q(p, v[None])[0])(x),
    "vmap_params": lambda q, p, x: torch.func.vmap(lambda p: q(p, x))({k: torch.stack([v, v * 0.5, -v]) for k, v in p.items()}),
    "vmap_grad": lambda q, p, x: torch.func.vmap(lambda v: torch.func.grad(_loss(q, v[None]))(p))(x),
    "hvp": lambda q, p, x: torch.func.jvp(torch.func.grad(_loss(q, x)), (p,), ({k: v.cos() for k, v in p.items()},)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("policy", ["qat", "training"])
def test_transforms(policy, transform, device) -> None:
    model, qfn, params, x = _net(device)
    qfn = teint8.quantize(model, Policy.preset(policy))
    params = {k: v.detach() for k, v in params.items()}
    run = TRANSFORMS[transform]
    got = run(qfn, params, x)
    from teint8.transforms import route

    def plain(x, w, bias=None, stride=1, padding=0, dilation=1, groups=1, *, transposed=False, output_padding=0, **_):
        return _ste(x, w, bias, stride, padding, dilation, groups, transposed, output_padding)

    class Plain:
        select, Problem, conv_problem = ops.select, ops.Problem, ops.conv_problem
        linear = staticmethod(lambda x, w, bias=None, **_: F.linear(fake(x, (-1,)), fake(w, (-1,)), bias))
        conv = staticmethod(plain)

    original, route.ops = route.ops, Plain
    try:
        want = run(teint8.quantize(model), params, x)
    finally:
        route.ops = original
    bound = 1e-4 if policy == "qat" or transform in ("jvp", "vmap_x", "vmap_params") else 0.1
    assert relative_error(got, want) < bound
    assert all(float(t.norm()) > 0 for t in torch.utils._pytree.tree_leaves(got))


def _ste(x, w, bias, stride, padding, dilation, groups, transposed, output_padding):
    if transposed:
        wf = fake(w.unflatten(0, (groups, -1)), (1, *range(3, w.ndim + 1))).flatten(0, 1)
        xf = fake(x.unflatten(1, (groups, -1)), tuple(range(2, x.ndim + 1))).flatten(1, 2)
        return TORCH[x.ndim - 2, True](xf, wf, bias, stride, padding, output_padding, groups, dilation)
    pointwise = math.prod(w.shape[2:]) == 1 and groups == 1
    xf = fake(x, (1,)) if pointwise else fake(x.unflatten(1, (groups, -1)), tuple(range(2, x.ndim + 1))).flatten(1, 2)
    return TORCH[x.ndim - 2, False](xf, fake(w, tuple(range(1, w.ndim))), bias, stride, padding, dilation, groups)


def test_policies_and_the_receipt(device) -> None:
    x, w, b = torch.randn(2, 4, 8, 8, device=device), torch.randn(6, 4, 3, 3, device=device), torch.randn(6, device=device)
    qfn = lambda rule: teint8.quantize(lambda p, x: F.conv2d(x, p["w"], p["b"], padding=1), Policy([rule]))
    params, exact = {"w": w, "b": b}, F.conv2d(x, w, b, padding=1)
    for rule, ran_as, mode in (
        (Rule(), None, "W8A8"),
        (Rule(activation=None), "dequantized", "W8A16"),
        (Rule(compute="simulate"), "reference", "W8A8"),
        (Rule(gradient=Quant(), wgrad="float"), None, "W8A8 dX"),
        (Rule(weight=Quant(granularity="tensor"), activation=Quant(granularity="tensor")), None, "W8A8"),
        (Rule(ops=("linear",)), "float", ""),
    ):
        y = qfn(rule)(params, x)
        assert 0 <= float((y - exact).norm() / exact.norm()) < 0.03
        (record,) = teint8.explain(qfn(rule), params, x)
        assert record.mode == mode and (ran_as is None) == record.int8 and ran_as in (None, record.implementation)
        assert (record.op, record.m, record.n, record.k, record.batch) == ("conv", 128, 6, 36, 1)
    rule = Rule(activation=Quant(scale="static"))
    packed = {"w": packed_kernel(w, "row", False).with_activation_scale(float(x.abs().max()) / 127), "b": b}
    y = qfn(rule)(packed, x)
    assert 0 < float((y - exact).norm() / exact.norm()) < 0.03
    with pytest.raises(ValueError, match=r"scale is static.*with_scales"):
        qfn(rule)(params, x)


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(6, 4, 3), (6, 4, 3, 2), (6, 4, 1, 2, 3)])
def test_qtensors_of_kernels(shape, transposed, granularity, device) -> None:
    w = torch.randn(shape, device=device)
    packed, plain = (
        packed_kernel(w, granularity, transposed),
        QTensor.quantize(w, axis=contracted(w.ndim, transposed), granularity=granularity),
    )
    assert different(packed.codes, plain.codes) == 0 and different(packed.scale, plain.scale) == 0 and packed.axis == plain.axis
    assert (plain.dequantize() - w).abs().max() <= w.abs().max() / 127
    assert plain.to(device).shape == w.shape and "axis=(" in repr(plain)


def test_tied_codes_that_were_made_before(device) -> None:
    x, w = torch.randn(2, 4, 8, 8, device=device), torch.randn(6, 4, 3, 3, device=device)
    codes = kernel_codes(w, "row", False, 1)
    assert different(ops.conv(x, w, weight_codes=codes), ops.conv(x, w)) == 0
    assert contracted(3, True) == (-3, -1)


def test_gradients_of_depthwise_kernels_by_one_image(device) -> None:
    """The gradient's kernel is the whole image: of its sums int32 holds 131072, and the stack few taps."""
    for n in (20, 512):
        x, w = torch.ones(1, 4, n, n, device=device), torch.full((4, 1, 3, 3), 0.1, device=device, requires_grad=True)
        ops.conv(x, w, padding=1, groups=4, gradient="nearest").sum().backward()
        assert torch.allclose(w.grad[0, 0, 1, 1], torch.tensor(float(n * n), device=device), rtol=1e-4)
    codes = torch.full((1, 400, 400, 3), 127, dtype=torch.int8, device=device)
    scale, window = torch.ones(1, 1, device=device), Window((1, 1), (0,) * 4, (1, 1), 3)
    got = int8_conv(codes, scale, codes[0].movedim(-1, 0)[..., None], torch.ones(3, device=device), None, window, torch.float32)
    assert got.flatten().tolist() == [float(400 * 400 * 127 * 127)] * 3


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("gradient", [None, "nearest"])
def test_checkpoints_and_hooks_on_saved_tensors(gradient, reentrant, device) -> None:
    conv, x = nn.Conv2d(4, 8, 3).to(device), torch.randn(2, 4, 8, 8, device=device, requires_grad=True)
    policy = Policy([Rule(gradient=None if gradient is None else Quant())])
    leaves = [x, *conv.parameters()]
    with te_int8_autocast(policy=policy):
        want = torch.autograd.grad(conv(x).square().sum(), leaves)
        got = checkpoint(conv, x, use_reentrant=reentrant)
    got.square().sum().backward()
    assert [different(leaf.grad, w) for leaf, w in zip(leaves, want, strict=True)] == [0, 0, 0]
    counts = {"packed": 0, "unpacked": 0}

    def count(name):
        def run(t):
            counts[name] += 1
            return t

        return run

    with torch.autograd.graph.saved_tensors_hooks(count("packed"), count("unpacked")):
        ops.conv(x, conv.weight, gradient=gradient).sum().backward()
    assert counts["unpacked"] == counts["packed"] > 0


@pytest.mark.parametrize("shape,weight", [((2, 4, 8, 8), (8, 4, 3, 3)), ((2, 4, 3, 3), (1, 4, 3, 3)), ((2, 4, 9), (1, 4, 3))])
@pytest.mark.parametrize("last", [False, True])
def test_results_may_be_written_to_in_place(shape, weight, last, device) -> None:
    x, w = torch.randn(shape, device=device), torch.randn(weight, device=device, requires_grad=True)
    x = x.contiguous(memory_format=torch.channels_last) if last and x.ndim == 4 else x
    y = F.relu(ops.conv(x, w), inplace=True)
    assert different(y, F.relu(ops.conv(x, w))) == 0
    assert torch.equal(torch.autograd.grad(y.sum(), w)[0], torch.autograd.grad(F.relu(ops.conv(x, w)).sum(), w)[0])


def test_convolutions_in_a_row_under_autocast(device) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)).to(device)
    x = torch.randn(2, 3, 8, 8, device=device)
    with torch.autocast(device, torch.bfloat16), te_int8_autocast(strict=True) as context:
        y = model(x)
    assert context.receipt.int8_calls == context.receipt.calls == 3 and y.dtype == torch.bfloat16
    assert float((y - model(x)).norm() / model(x).norm()) < 0.05
    y.float().square().sum().backward()
    assert all(float(p.grad.norm()) > 0 for p in model.parameters())


def test_kernels_that_are_seen_turned_around(device) -> None:
    conv, x = nn.Conv2d(3, 5, (3, 2), bias=False).to(device), torch.randn(2, 3, 8, 8, device=device)
    want = F.conv2d(x, conv.weight.mT)
    qfn = teint8.quantize(lambda p, x: F.conv2d(x, p["w"].mT))
    with torch.no_grad():
        for training in (True, False):
            with te_int8_autocast(training=training):
                assert (F.conv2d(x, conv.weight.mT) - want).norm() < 0.03 * want.norm()
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: F.conv2d(x, conv.weight.mT), backend=teint8.compile.backend)
        assert (compiled(x) - want).norm() < 0.03 * want.norm()
    params = {"w": conv.weight.detach()}
    assert (qfn(params, x) - want).norm() < 0.03 * want.norm()
    with pytest.raises(ValueError, match="no weight of"):
        teint8.pack(qfn, params, x)
    packed = {"w": packed_kernel(conv.weight, "row", False)}
    assert (qfn(packed, x) - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize(
    "make", [lambda: nn.Conv2d(4, 6, 3, groups=2), lambda: nn.ConvTranspose2d(4, 6, 3), lambda: nn.Conv1d(4, 6, 2)]
)
def test_packed_stacks_of_models(make, device) -> None:
    conv = make().to(device)
    x = torch.randn(2, 4, *[8] * (conv.weight.ndim - 2), device=device)
    qfn = teint8.quantize(conv)
    stack = {k: torch.stack([v, v * 3, -v]).detach() for k, v in conv.named_parameters()}
    want = torch.func.vmap(lambda p: qfn(p, x))(stack)
    for packed in (teint8.pack(qfn, stack), torch.func.vmap(lambda p: teint8.pack(qfn, p))(stack)):
        assert isinstance(packed["weight"], QTensor)
        assert different(torch.func.vmap(lambda p: qfn(p, x))(packed), want) == 0


@pytest.mark.parametrize("activation", [Quant(), Quant(granularity="tensor")])
def test_vmap_over_the_weights_of_a_depthwise_kernel(activation, device) -> None:
    x, weights = torch.randn(2, 4, 8, 8, device=device), torch.randn(3, 4, 1, 3, 3, device=device)
    qfn = teint8.quantize(lambda w, x: F.conv2d(x, w, groups=4), Policy([Rule(activation=activation)]))
    got = torch.func.vmap(lambda w: qfn(w, x))(weights)
    assert different(got, torch.stack([qfn(w, x) for w in weights])) == 0
    none = torch.func.vmap(lambda x: qfn(weights[0], x))(torch.empty(3, 0, 4, 8, 8, device=device))
    assert none.shape == (3, 0, 4, 6, 6)


@pytest.mark.parametrize("groups", [1, 2])
def test_vmap_over_kernels_that_see_one_input(groups, device) -> None:
    x, w, b = (
        torch.randn(2, 4, 8, 8, device=device),
        torch.randn(3, 6, 4 // groups, 3, 3, device=device),
        torch.randn(3, 6, device=device),
    )
    qfn = teint8.quantize(lambda p, x: F.conv2d(x, p[0], p[1], groups=groups))
    got = torch.func.vmap(lambda w, b: qfn((w, b), x))(w, b)
    assert different(got, torch.stack([qfn((w[i], b[i]), x) for i in range(3)])) == 0


def test_layers_that_change_their_weight_are_not_packed_by_their_type(device) -> None:
    class Standardized(nn.Conv2d):
        def _conv_forward(self, x, w, b):
            return super()._conv_forward(x, w - w.mean((1, 2, 3), keepdim=True), b)

    model = nn.Sequential(Standardized(3, 8, 3), nn.Conv2d(8, 4, 3)).to(device)
    packed = teint8.pack(teint8.quantize(model), dict(model.named_parameters()))
    assert [name for name, leaf in packed.items() if isinstance(leaf, QTensor)] == ["1.weight"]


def test_sizes_that_change_compile_nothing_anew(device) -> None:
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3, 2, 1) for _ in range(3))).to(device)
    qfn, params = teint8.quantize(model, Policy.training()), dict(model.named_parameters())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(qfn, dynamic=True, fullgraph=True)
    for h, w in ((32, 41), (33, 40), (47, 51), (64, 38), (35, 37)):
        x = torch.randn(2, 4, h, w, device=device)
        got = torch.autograd.grad(compiled(params, x).square().sum(), list(params.values()))
        want = torch.autograd.grad(qfn(params, x).square().sum(), list(params.values()))
        assert relative_error(list(got), list(want)) < 1e-3
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_weights_are_quantized_once_for_all_microbatches(device, monkeypatch) -> None:
    from teint8.transforms import weight_codes

    made = []
    original = weight_codes.kernel_codes
    monkeypatch.setattr(weight_codes, "kernel_codes", lambda *args: made.append(1) or original(*args))
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 4, 3, groups=2)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with te_int8_autocast():
        for step in range(2):
            for _ in range(3):
                model(torch.randn(2, 3, 8, 8, device=device)).sum().backward()
            assert len(made) == 2 * (step + 1)
            optimizer.step()
    x = torch.randn(2, 3, 8, 8, device=device)
    assert different(teint8.quantize(model)(dict(model.named_parameters()), x), _in_context(model, x)) == 0


def _in_context(model: nn.Module, x: Tensor) -> Tensor:
    with te_int8_autocast():
        model(x)
        return model(x)


def test_receipts_name_what_ran() -> None:
    w3, x3 = torch.randn(4, 4, 2, 2, 2), torch.randn(1, 4, 5, 5, 5)
    grouped, x2 = torch.randn(4, 4, 3, 3), torch.randn(1, 16, 6, 6)
    point = torch.randn(8, 16, 1, 1)
    for function, ran_as in (
        (lambda p, x: F.conv3d(x3, w3), "patches"),
        (lambda p, x: F.conv3d(x3, w3[:, :1], groups=4), "patches"),
        (lambda p, x: F.conv2d(x2, grouped, groups=4), "cpu-c-grouped"),
        (lambda p, x: F.conv2d(x2, point, padding="same"), None),
    ):
        (record,) = teint8.explain(teint8.quantize(function), (), x2)
        assert record.implementation == ran_as if ran_as else not record.implementation.startswith(("cpu-c", "patches"))


BAD = {
    "integers": (lambda x, w: ops.conv(x.long(), w), TypeError, "x is torch.int64"),
    "dtypes": (lambda x, w: ops.conv(x.double(), w), TypeError, "one dtype is needed"),
    "channels": (lambda x, w: ops.conv(x[:, :3], w), ValueError, r"x \(2, 3, 8, 8\) and weight \(6, 4, 3, 3\)"),
    "groups": (lambda x, w: ops.conv(x, w, groups=4), ValueError, "groups 4"),
    "dimensions": (lambda x, w: ops.conv(x[0], w), ValueError, "do not fit"),
    "bias": (lambda x, w: ops.conv(x, w, w[0, 0, 0]), ValueError, r"\(6,\) is needed"),
    "too small": (lambda x, w: ops.conv(x[..., :2], w), ValueError, "no window that fits"),
    "stride": (lambda x, w: ops.conv(x, w, stride=(1, 2, 3)), ValueError, "stride is"),
    "same": (lambda x, w: ops.conv(x, w, stride=2, padding="same"), ValueError, "'same' with stride 1"),
    "no groups": (lambda x, w: ops.conv(x, w, groups=0), ValueError, "groups 0"),
    "no stride": (lambda x, w: ops.conv(x, w, stride=0), ValueError, "no window that fits"),
    "integer bias": (lambda x, w: ops.conv(x, w, torch.ones(6, dtype=torch.long)), TypeError, "bias is torch.int64"),
    "output padding": (lambda x, w: ops.conv(x, w[:4], transposed=True, output_padding=-1), ValueError, "no window that fits"),
    "routed, too small": (lambda x, w: teint8.quantize(lambda p, x: F.conv2d(x, p))(w, x[..., :2]), ValueError, "no window that fits"),
    "routed, other dimensions": (lambda x, w: teint8.quantize(lambda p, x: F.conv2d(x, p))(w, x[None]), RuntimeError, "conv2d"),
    "another packing": (lambda x, w: ops.conv(x, QTensor.quantize(w)), ValueError, "was not packed for this convolution"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    run, kind, message = BAD[name]
    with pytest.raises(kind, match=message):
        run(torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3))
