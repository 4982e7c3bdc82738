"""GroupNorm, InstanceNorm and BatchNorm in inference: kernels against the reference, values against float64, derivatives, the rule."""

import importlib
import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from contract import different
from grid import relative_error
from torch import Tensor, nn

import teint8
from teint8 import Policy, Rule, numerics, ops, te_int8_autocast

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
TRITON = "triton" if CUDA else "triton-interpreter"
POLICY = Policy([Rule(ops=("conv", "norm"))])


def _cases():
    of_groups = [
        ((2, 4, 3), 2),
        ((1, 6, 35), 3),
        ((3, 8, 1), 1),
        ((2, 5, 70), 5),
        ((2, 130, 9), 130),
        ((1, 8, 1500), 2),
        ((1, 20, 1100), 20),
    ]
    shapes = [*of_groups, ((1, 12, 17), None), ((2, 70, 20), None), ((1, 64, 700), None)]
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.float64)
    flavours = ("normal", "shifted", "zeros", "nan", "inf", "huge", "tiny", "constant")
    layouts = ("dense", "channels last", "strided")
    flags = itertools.product((False, True), repeat=3)
    return random.Random(3).sample(list(itertools.product(shapes, dtypes, layouts, flags, flavours)), 300 if CUDA else 90)


def _values(shape, dtype, layout, flavour):
    x = torch.randn(shape, dtype=torch.float64)
    x = {"shifted": x + 100, "zeros": x * 0, "huge": x * 1e30, "tiny": x * 1e-33, "constant": x * 0 + 0.3}.get(flavour, x)
    if flavour in ("nan", "inf"):
        x[0, -1, 0] = float(flavour)
    x = (x * (1e-27 if flavour == "huge" and dtype == torch.float16 else 1)).to(dtype)
    if layout == "channels last":
        return x.mT.contiguous().mT
    return x.repeat_interleave(2, 2)[:, :, ::2] if layout == "strided" else x


def _on(device, *tensors):
    return [None if t is None else t.to(device) for t in tensors]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("shape,dtype,layout,flags,flavour", _cases())
def test_kernel_has_the_bits_of_the_reference(shape, dtype, layout, flags, flavour) -> None:
    shape, groups = shape
    weighted, biased, codes = flags
    x = _values(shape, dtype, layout, flavour)
    w, b = (torch.randn(shape[1]).to(dtype) if there else None for there in (weighted, biased))
    mean, variance = (None, None) if groups else (torch.randn(shape[1]), torch.rand(shape[1]) + 0.1)
    run, reference = (next(i.run for i in ops.implementations("channel_norm") if i.name == name) for name in (TRITON, "reference"))
    moved = x.to(DEVICE) if layout != "strided" else x.to(DEVICE).repeat_interleave(2, 2)[:, :, ::2]
    for _ in range(2):  # through the JIT, then held
        got = run(moved, *_on(DEVICE, w, b, mean, variance), groups or 1, 1e-5, codes, True)
        want = reference(x, w, b, mean, variance, groups or 1, 1e-5, codes, True)
        assert len(got) == len(want) == 1 + 2 * codes
        assert [different(g.cpu(), t) for g, t in zip(got, want, strict=True)] == [0] * len(want)
    if codes:  # alone they are the same, and those of the values
        alone = run(moved, *_on(DEVICE, w, b, mean, variance), groups or 1, 1e-5, True, False)
        assert [different(a.cpu(), t) for a, t in zip(alone, want[1:], strict=True)] == [0, 0]
        q, s = numerics.quantize(want[0].mT.reshape(len(x), -1))
        assert different(want[1], q.view(want[1].shape)) == 0 and different(want[2], s) == 0


def test_groups_that_take_many_blocks(device) -> None:
    x = torch.randn(2, 96, 70, 33, device=device).to(memory_format=torch.channels_last)
    w, b = torch.randn(2, 96, device=device)
    for groups in (1, 4, 96):
        got = ops.group_norm(x, groups, w, b)
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert different(got, ops.group_norm(x, groups, w, b, impl="reference")) == 0
        assert (got - F.group_norm(x.double(), groups, w.double(), b.double())).abs().max() < 1e-5


@pytest.mark.parametrize("scale,shift", [(1.0, 0.0), (1e-3, 1.0), (1e15, 0.0), (1e-12, 0.0)])
def test_values_are_those_of_float64(scale, shift, device) -> None:
    x = (torch.randn(3, 6, 50, 7, device=device, dtype=torch.float64) * scale + shift).float()
    w, b = torch.randn(2, 6, device=device)
    want = F.group_norm(x.double(), 3, w.double(), b.double(), eps=1e-6)
    bound = 1e-3 if shift else 5e-6  # x - mean cancels: float32's own error, as torch has it
    assert (ops.group_norm(x, 3, w, b, eps=1e-6) - want).abs().max() < bound
    mean, variance = torch.randn(6, device=device) * scale + shift, torch.rand(6, device=device) * scale**2
    want = F.batch_norm(x.double(), mean.double(), variance.double(), w.double(), b.double(), eps=1e-6)
    got = ops.batch_norm(x, mean, variance, w, b, eps=1e-6)
    assert float((got - want).norm() / want.norm()) < 1e-5


KINDS = ("group", "instance", "batch")


def _forms(kind, c, device):
    """Ours and torch's, of (x, weight, bias)."""
    mean, variance = torch.randn(c, device=device), torch.rand(c, device=device) + 0.5
    groups = 2 if kind == "group" else c
    if kind == "batch":
        exact = lambda x, w, b: F.batch_norm(x, mean.to(x), variance.to(x), w, b)
        return lambda x, w, b: ops.batch_norm(x, mean, variance, w, b), exact
    return lambda x, w, b: ops.group_norm(x, groups, w, b), lambda x, w, b: F.group_norm(x, groups, w, b)


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives(kind, device) -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(3, 4, 5, 2, device=device), torch.randn(4, device=device), torch.randn(4, device=device)
    weigh = torch.arange(x.numel(), device=device).view(x.shape) / 50
    ours, torchs = _forms(kind, 4, device)
    loss = lambda form: lambda x, w, b: (form(x, w, b) * weigh.to(x)).tanh().square().sum()
    args, wide = (x, w, b), tuple(t.double() for t in (x, w, b))
    every = (0, 1, 2)
    assert relative_error(torch.func.grad(loss(ours), every)(*args), torch.func.grad(loss(torchs), every)(*wide)) < 1e-5
    leaves = [t.clone().requires_grad_() for t in args]
    loss(ours)(*leaves).backward()
    assert relative_error([t.grad for t in leaves], torch.func.grad(loss(torchs), every)(*wide)) < 1e-5
    jvps = [torch.func.jvp(loss(form), a, a)[1] for form, a in ((ours, args), (torchs, wide))]
    assert relative_error(jvps[0], jvps[1]) < 1e-5
    hvp = lambda form, a: torch.func.jvp(torch.func.grad(loss(form), every), a, a)[1]
    assert relative_error(hvp(ours, args), hvp(torchs, wide)) < 1e-4
    one = lambda x: ours(x[None], w, b)[0]
    assert different(torch.func.vmap(one)(x), ours(x, w, b)) == 0
    of_one = lambda form: torch.func.vmap(torch.func.grad(lambda x, w, b: form(x[None], w, b).tanh().square().sum()), (0, None, None))
    assert relative_error(of_one(ours)(*args), of_one(torchs)(*wide)) < 1e-5
    ws = torch.stack([w, 2 * w])
    each = torch.func.vmap(lambda w: ours(x, w, b))(ws)
    assert different(each, torch.stack([ours(x, w, b) for w in ws])) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_halves_by_statistics_and_weights_in_float32(dtype, device) -> None:
    """A variance that float16 does not hold, means that bfloat16 rounds: no gradient goes through either."""
    torch.manual_seed(0)
    x = (torch.randn(4, 6, 9, device=device) * 300 + 20).to(dtype)
    mean, variance = torch.randn(6, device=device) + 20.06, torch.rand(6, device=device) * 1e5 + 9e4
    w, b, dy = torch.randn(6, device=device), torch.randn(6, device=device), torch.randn(4, 6, 9, device=device)
    for ours, exact in (
        (
            lambda x, w, b: ops.batch_norm(x, mean, variance, w, b),
            lambda x, w, b: F.batch_norm(x, mean.double(), variance.double(), w, b),
        ),
        (lambda x, w, b: ops.group_norm(x, 2, w, b), lambda x, w, b: F.group_norm(x, 2, w, b)),
    ):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        wide = [t.double().requires_grad_() for t in (x, w, b)]
        got = torch.autograd.grad(ours(*leaves), leaves, dy.to(dtype))
        want = torch.autograd.grad(exact(*wide), wide, dy.to(dtype).double())
        assert relative_error(got[0], want[0]) < (1e-3 if dtype == torch.float16 else 5e-3) and got[0].dtype == dtype
        assert relative_error(got[1:], want[1:]) < 1e-4 and got[1].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_nested_and_empty_vmap(kind, device) -> None:
    ours, _ = _forms(kind, 4, device)
    x, ws, b = torch.randn(3, 2, 5, 4, 6, device=device), torch.randn(3, 4, device=device), torch.randn(4, device=device)
    nested = torch.func.vmap(torch.func.vmap(lambda x, w: ours(x, w, b), (0, None)), (0, 0))
    assert different(nested(x, ws), torch.stack([torch.stack([ours(y, w, b) for y in xs]) for xs, w in zip(x, ws, strict=True)])) == 0
    assert torch.func.vmap(lambda x, w: ours(x, w, b))(x[:0, 0], ws[:0]).shape == (0, 5, 4, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_has_the_bits_of_eager(kind, device) -> None:
    torch._dynamo.reset()
    ours, _ = _forms(kind, 4, device)
    x, w, b = torch.randn(3, 4, 5, 2, device=device), torch.randn(4, device=device), torch.randn(4, device=device)
    f = lambda x, w, b: ours(x * 0.5, w, b) * 2
    assert different(torch.compile(f, fullgraph=True)(x, w, b), f(x, w, b)) == 0
    weigh = torch.arange(x.numel(), device=device).view(x.shape) / 50
    loss = lambda x, w, b: (f(x, w, b) * weigh).tanh().square().sum()
    got = torch.compile(torch.func.grad(loss, (0, 1, 2)), fullgraph=True)(x, w, b)
    assert relative_error(got, torch.func.grad(loss, (0, 1, 2))(x, w, b)) < 1e-5
    leaves = [t.clone().requires_grad_() for t in (x, w, b)]
    torch.compile(loss)(*leaves).backward()
    assert relative_error([t.grad for t in leaves], got) < 1e-5


def _model(kind: str, device: str):
    torch.manual_seed(0)
    norm = {"group": nn.GroupNorm(4, 8), "instance": nn.InstanceNorm2d(8, affine=True), "batch": nn.BatchNorm2d(8)}[kind]
    model = nn.Sequential(norm, nn.Conv2d(8, 4, 3)).to(device).eval()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
        if kind == "batch":
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
    return model, torch.randn(2, 8, 6, 6, device=device)


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, nn.BatchNorm2d):
        return ops.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return ops.group_norm(x, 4 if isinstance(norm, nn.GroupNorm) else 8, norm.weight, norm.bias)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", KINDS)
def test_values_are_the_same_in_every_mode(kind, layout, device) -> None:
    model, x = _model(kind, device)
    x = x.to(memory_format=layout)
    params = {k: v.detach() for k, v in model.named_parameters()}
    want = ops.conv(_normed(model[0], x), model[1].weight, model[1].bias)
    qfn = teint8.quantize(model, POLICY)
    assert different(qfn(params, x), want) == 0
    assert different(qfn(teint8.pack(qfn, params), x), want) == 0
    for _ in range(2):
        with torch.no_grad(), te_int8_autocast(training=False, policy=POLICY):
            assert different(model(x), want) == 0
    with te_int8_autocast(policy=POLICY):
        assert different(model(x), want) == 0
    simulated = teint8.quantize(model, Policy([Rule(ops=("conv", "norm"), compute="simulate")]))
    assert different(simulated(params, x), want) == 0
    torch._dynamo.reset()
    assert different(torch.compile(lambda p, x: qfn(p, x), fullgraph=True)(params, x), want) == 0
    assert relative_error(want, model(x)) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_torchs_norm(kind, device) -> None:
    model, x = _model(kind, device)
    params = {k: v.detach() for k, v in model.named_parameters()}
    loss = lambda policy: lambda p, x: teint8.quantize(model, policy)(p, x).square().sum()
    got = torch.func.grad(loss(POLICY), (0, 1))(params, x)
    want = torch.func.grad(loss(Policy([Rule(ops=("conv",))])), (0, 1))(params, x)  # torch's norm: the last bits differ
    assert relative_error(got, want) < 5e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_convolution_takes_the_norms_codes(kind, device, monkeypatch: pytest.MonkeyPatch) -> None:
    conv = importlib.import_module("teint8.ops.conv")  # the package has a function of that name
    model, x = _model(kind, device)
    params = {k: v.detach() for k, v in model.named_parameters()}
    made: list[Tensor] = []
    quantize = conv.activation_codes
    monkeypatch.setattr(conv, "activation_codes", lambda x, *rest: (made.append(x), quantize(x, *rest))[1])
    y = teint8.quantize(model, POLICY)(params, x)
    assert not made and different(y, ops.conv(_normed(model[0], x), model[1].weight, model[1].bias)) == 0
    for _ in range(3):
        with torch.no_grad(), te_int8_autocast(training=False, policy=POLICY):
            model(x.to(memory_format=torch.channels_last))
    assert not made
    record = next(r for r in teint8.explain(teint8.quantize(model, POLICY), params, x) if r.op == "norm")
    assert (record.path, record.m, record.n, record.mode) == ("0.weight", 72, 8, "codes")
    grouped = (
        nn.Sequential(model[0], nn.Conv2d(8, 4, 3, groups=2), nn.Conv2d(4, 4, 1)).to(device).eval()
    )  # other codes: these wait in vain
    held = {k: v.detach() for k, v in grouped.named_parameters()}
    y = teint8.quantize(grouped, POLICY)(held, x)
    first = ops.conv(_normed(model[0], x), grouped[1].weight, grouped[1].bias, groups=2)
    assert different(y, ops.conv(first, grouped[2].weight, grouped[2].bias)) == 0


def test_what_stays_float_and_says_so() -> None:
    x = torch.randn(2, 8, 6, 6)
    batch = nn.BatchNorm2d(8)
    qfn, params = teint8.quantize(batch, POLICY), dict(batch.named_parameters())
    held = {**params, **dict(batch.named_buffers())}
    reasons = [r.reason for r in teint8.explain(qfn, held, x) if r.op == "norm"]
    assert len(reasons) == 1 and reasons[0].startswith("in train mode its statistics are those of the batch")
    with pytest.raises(
        ValueError, match=r"strict: weight \(norm\) cannot run in INT8: in train mode its statistics are those of the batch"
    ):
        teint8.quantize(batch, POLICY, strict=True)(held, x)
    kept = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)
    with te_int8_autocast(policy=POLICY) as ctx:
        torch.testing.assert_close(kept(x), F.instance_norm(x, weight=kept.weight, bias=kept.bias), rtol=1e-5, atol=1e-5)
    assert next(r.reason for r in ctx.receipt).startswith("it keeps running statistics") and float(kept.running_mean.abs().sum()) > 0
    with te_int8_autocast(policy=POLICY) as ctx:
        assert different(kept.eval()(x), ops.batch_norm(x, kept.running_mean, kept.running_var, kept.weight, kept.bias)) == 0
    with torch.autocast("cpu", torch.bfloat16), te_int8_autocast(policy=POLICY) as ctx:
        nn.GroupNorm(2, 8)(x)
    assert next(r.reason for r in ctx.receipt) == "torch.autocast decides on its dtype"
    assert not [r for r in teint8.explain(teint8.quantize(batch), held, x) if r.op == "norm"]


def test_how_their_arguments_are_read() -> None:
    x = torch.randn(2, 4, 3)
    w = {"g": torch.rand(4), "b": torch.rand(4), "mean": torch.rand(4), "var": torch.rand(4) + 0.5}
    calls = {
        "torch.batch_norm": lambda p, x: torch.batch_norm(x, p["g"], p["b"], p["mean"], p["var"], False, 0.1, 1e-3, False),
        "torch.instance_norm": lambda p, x: torch.instance_norm(x, p["g"], p["b"], None, None, True, 0.1, 1e-3, False),
        "torch.group_norm": lambda p, x: torch.group_norm(x, 2, p["g"], p["b"], 1e-3),
        "F.batch_norm": lambda p, x: F.batch_norm(x, p["mean"], p["var"], p["g"], p["b"], eps=1e-3),
        "F.instance_norm": lambda p, x: F.instance_norm(x, weight=p["g"], bias=p["b"], eps=1e-3),
        "F.instance_norm, given": lambda p, x: F.instance_norm(x, p["mean"], p["var"], p["g"], use_input_stats=False),
        "F.group_norm": lambda p, x: F.group_norm(x, 2, p["g"]),
        "by name": lambda p, x: F.group_norm(x, num_groups=2, weight=p["g"], eps=0.1),
        "all by name": lambda p, x: F.batch_norm(input=x, running_mean=p["mean"], running_var=p["var"], weight=p["g"]),
        "without a weight": lambda p, x: F.group_norm(x, 4) * p["g"][0],
    }
    for name, call in calls.items():
        qfn = teint8.quantize(call, POLICY)
        records = [r for r in teint8.explain(qfn, w, x) if r.op == "norm"]
        assert len(records) == 1 and (name == "without a weight" or records[0].path == "g"), (name, records)
        assert records[0].mode == "codes" and not records[0].reason, name
        torch.testing.assert_close(qfn(w, x), call(w, x), rtol=1e-5, atol=1e-5)
        left = Policy([Rule("g", ops=("norm",), weight=None), *POLICY.rules])
        if name != "without a weight":
            assert [r.reason for r in teint8.explain(teint8.quantize(call, left), w, x)] == ["its rule leaves it in float"]


def test_bad_input() -> None:
    x, w = torch.randn(2, 6, 4), torch.randn(6)
    with pytest.raises(ValueError, match=r"group_norm: num_groups is 4 and x has shape \(2, 6, 4\); a divisor of its 6 channels"):
        ops.group_norm(x, 4)
    with pytest.raises(ValueError, match=r"group_norm: weight is torch.float32 \(5,\)"):
        ops.group_norm(x, 2, w[:5])
    with pytest.raises(ValueError, match=r"batch_norm: variance is torch.int64"):
        ops.batch_norm(x, w, torch.ones(6, dtype=torch.int64))
    for call in (lambda: ops.group_norm(x, 2, eps=-1.0), lambda: ops.batch_norm(x, w, w, eps=-1.0)):
        with pytest.raises(ValueError, match=r"_norm: eps is -1.0"):
            call()
    # under a rule, whose kernels read as many weights as there are channels
    for p in ({"w": w[:5]}, {"w": w[None]}):
        with pytest.raises(ValueError, match=r"group_norm: weight is torch.float32 \("):
            teint8.quantize(lambda p, x: F.group_norm(x, 2, p["w"]), POLICY)(p, x)
        with pytest.raises(ValueError, match=r"batch_norm: mean is torch.float32 \("):
            teint8.quantize(lambda p, x: F.batch_norm(x, p["w"], p["w"]), POLICY)(p, x)
    with pytest.raises((RuntimeError, ZeroDivisionError, ValueError), match=r"num_groups|modulo|division|zero"):
        teint8.quantize(lambda p, x: F.group_norm(x, 0), POLICY)({}, x)
    by_mean = torch.func.grad(lambda m: teint8.quantize(lambda p, x: F.batch_norm(x, p["m"], w.abs()), POLICY)({"m": m}, x).sum())
    with pytest.raises(RuntimeError, match="running_mean"):
        by_mean(w)
    for form in (lambda x: F.instance_norm(x, w), lambda x: F.instance_norm(x, None, w), lambda x: F.batch_norm(x[0, :, 0], w, w)):
        with pytest.raises((ValueError, RuntimeError), match="running_mean"):
            teint8.quantize(lambda p, x, form=form: form(x), POLICY)({}, x)
    with pytest.raises(TypeError, match=r"group_norm: x is torch.int64 \(3,\)"):
        ops.group_norm(torch.ones(3, dtype=torch.int64), 1)
    wrong = teint8.quantize(lambda p, x: F.group_norm(x, 4, p["w"]), POLICY)
    with pytest.raises(RuntimeError, match="divisible"):
        wrong({"w": w}, x)
    for form in (F.batch_norm, lambda x, *rest: F.instance_norm(x, *rest, use_input_stats=False)):
        for given in ((None, None), (w, None)):
            none = teint8.quantize(lambda p, x, form=form, given=given: form(x, *given), POLICY)
            with pytest.raises(RuntimeError, match=r"running_mean|running_var|mean and var"):
                none({}, x)
    one = teint8.quantize(lambda p, x: F.group_norm(x, 6, p["w"]), POLICY)
    with pytest.raises(ValueError, match="more than 1 value"):
        one({"w": w}, x[:1, :, :1])


def test_no_channels() -> None:
    none = torch.ones(0)
    qfn = teint8.quantize(lambda p, x: F.instance_norm(F.batch_norm(x, none, none)), POLICY)
    assert qfn({}, torch.ones(2, 0, 3)).shape == (2, 0, 3)


@pytest.mark.parametrize("shape", [(0, 4, 3), (2, 4, 0)])
def test_empty(shape) -> None:
    x, w = torch.ones(shape), torch.ones(4)
    assert ops.group_norm(x, 2, w).shape == shape and ops.batch_norm(x, w, w).shape == shape
    for form in (lambda p, x: F.batch_norm(x, p["w"], p["w"]), lambda p, x: F.instance_norm(x, weight=p["w"])):
        assert teint8.quantize(form, POLICY)({"w": w}, x).shape == shape  # torch's own instance_norm refuses no samples
