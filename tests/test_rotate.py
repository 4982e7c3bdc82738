"""Rotation, smoothing and codes in one kernel: every implementation by bits, and what a packed linear makes of it."""

import math

import pytest
import torch
from contract import different
from torch import nn

import teint8
from teint8 import Conditioned, Policy, Quant, Rule, ops
from teint8.ops import registry
from teint8.ops.registry import Problem
from teint8.ops.rotation import conditioned_codes, divided, hadamard

CUDA = torch.cuda.is_available()
# rows, channels, block, smoothed, dtype
SHAPES = [
    (5, 96, 32, True, torch.float32),
    (33, 384, 128, False, torch.bfloat16),
    (70, 96, 32, True, torch.bfloat16),
    (40, 200, 0, True, torch.float16),
    (1, 1024, 1024, True, torch.bfloat16),
    (3, 43 * 16, 16, True, torch.float16),
    (4, 2048, 2, False, torch.float32),
    (2, 7, 1, True, torch.bfloat16),
    (2, 96, 0, True, torch.float32),
    (3, 64, 64, True, torch.float64),
    (2, 20480, 1024, True, torch.bfloat16),
]


def operands(m: int, k: int, block: int, smoothed: bool, dtype: torch.dtype, flavour: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    x = torch.randn(m, k)
    if flavour == "nan":
        x[m // 2, k // 3], x[-1, 0] = math.nan, math.inf
    if flavour == "small":
        x *= 1e-31
    if flavour == "zeros":
        x[0] = 0
    x[:, k // 2] *= 300
    smoothing = torch.exp2(torch.randint(-6, 7, (k,)).float()) if smoothed else None
    return x.to(dtype), smoothing


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("flavour", ["normal", "nan", "small", "zeros"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "-".join(map(str, s[:4])))
@pytest.mark.parametrize("codes", [True, False, "static"])
def test_every_implementation_has_the_bits_of_the_reference(shape, flavour: str, codes: bool | str, device: str) -> None:
    x, smoothing = operands(*shape, flavour)
    block = shape[2]
    problem = Problem(device, x.dtype, 1, shape[0], 0, shape[1], (block,))
    reference = next(i for i in registry.implementations("rotate") if i.name == "reference")
    scale = torch.full((shape[0],), 0.05) if codes == "static" else None
    want = reference.run(x, smoothing, block, bool(codes), scale)
    runs = [i for i in registry.implementations("rotate") if registry.why_not(i, problem) is None and i is not reference]
    names = {i.name for i in runs}
    fits = x.dtype != torch.float64 and shape[1] <= 16384 and (device == "cuda" or not CUDA)
    assert "composed" in names and (("triton" if device == "cuda" else "triton-interpreter") in names) is fits
    x, smoothing, scale = (None if t is None else t.to(device) for t in (x, smoothing, scale))
    for run in runs:
        for given in (x, torch.cat([x, x], 1)[:, : shape[1]], x.t().contiguous().t()):  # rows apart, and columns
            got = run.run(given, smoothing, block, bool(codes), scale)
            assert len(got) == len(want)
            for a, b in zip(got, want, strict=True):
                # without a rotation values are those of the division, in its dtype
                assert different(a.to(b.dtype) if not codes else a, b) == 0, run.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_are_those_of_one_step_after_the_other(dtype: torch.dtype, device: str) -> None:
    x = torch.randn(3, 5, 96, device=device).to(dtype)
    smoothing = torch.exp2(torch.arange(96.0, device=device) % 5 - 2)
    for block, given in ((32, None), (32, smoothing), (0, smoothing)):
        y = x if given is None else divided(x, given)
        want = ops.quantize(hadamard(y.float(), block) if block else y)
        got = conditioned_codes(x, given, block)
        assert got[0].shape == x.shape and got[1].shape == x.shape[:-1]
        for a, b in zip(got, want, strict=True):
            assert different(a, b) == 0


class Counting:
    """An implementation of ``rotate`` that counts its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
        self.calls = 0
        inner = next(i for i in registry.implementations("rotate") if i.name == "composed")

        def run(*args):
            self.calls += 1
            return inner.run(*args)

        monkeypatch.setitem(registry._implementations, "rotate", list(registry._implementations["rotate"]))
        monkeypatch.setattr(registry, "_selected", {})
        ops.register("rotate", "counting", run, device=device, priority=99)


class Projections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.out = nn.Linear(32, 32), nn.Linear(32, 32, bias=False), nn.Linear(32, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.q(x) * self.k(x))


@pytest.mark.parametrize("way", ["rotation", "smoothing", "both", "outliers"])
def test_packed_linears_take_codes_alone_and_share_them(way: str, device: str, monkeypatch) -> None:
    model, x = Projections().to(device), torch.randn(2, 7, 32, device=device)
    smoothing = torch.exp2(torch.arange(32.0, device=device) % 3)
    how = {
        "rotation": {"rotation": 16},
        "smoothing": {"smoothing": smoothing},
        "both": {"smoothing": smoothing, "rotation": 32},
        "outliers": {"rotation": 16, "outliers": (3,)},
    }[way]
    params = {n: Conditioned(p.detach(), **how) if n.endswith("weight") else p.detach() for n, p in model.named_parameters()}
    qfn = teint8.quantize(model)
    packed = teint8.pack(qfn, params)
    want = qfn(params, x)  # float weights go one step after the other
    counting = Counting(monkeypatch, device)
    with torch.no_grad():
        y = qfn(packed, x)
    assert different(y, want) == 0
    assert counting.calls == (3 if way == "outliers" else 2)  # q and k share theirs
    with torch.inference_mode():
        assert different(qfn(packed, x), want) == 0
    receipt = teint8.explain(qfn, packed, x)
    assert all(r.int8 for r in receipt) and min(r.sqnr for r in receipt) > 20
    # a derivative by x needs the values
    x.requires_grad_()
    grad = torch.autograd.grad(qfn(packed, x).square().sum(), x)[0]
    want_grad = torch.autograd.grad(qfn({n: teint8.unpack({n: p})[n] for n, p in packed.items()}, x).square().sum(), x)[0]
    assert float(grad.norm()) > 0 and float((grad - want_grad).norm() / want_grad.norm()) < 0.05


def test_static_scales_too(device: str, monkeypatch) -> None:
    model, x = Projections().to(device), torch.randn(2, 7, 32, device=device)
    params = {n: Conditioned(p.detach(), rotation=16) if n.endswith("weight") else p.detach() for n, p in model.named_parameters()}
    qfn = teint8.quantize(model, Policy([Rule(activation=Quant(scale="static"))]))
    ready = teint8.with_scales(params, teint8.scales(teint8.calibrate(qfn, params, [x], progress=False)))
    packed = teint8.pack(qfn, ready)
    want = [qfn(ready, x), qfn(ready, 3 * x)]
    counting = Counting(monkeypatch, device)
    with torch.no_grad():
        assert different(qfn(packed, x), want[0]) == 0 and different(qfn(packed, 3 * x), want[1]) == 0  # clipped
    assert counting.calls == 6


def test_codes_are_kept_for_one_basis(device: str) -> None:
    """Another one makes its own: other powers of the same memory, or edited ones."""
    linear = nn.Linear(32, 8).to(device)
    x = torch.randn(4, 32, device=device)
    powers = torch.exp2(torch.arange(64.0, device=device) % 5)
    first = Conditioned(linear.weight.detach(), smoothing=powers[:32])
    second = Conditioned(linear.weight.detach().clone(), smoothing=powers[::2])
    qfn = teint8.quantize(lambda p, x: (nn.functional.linear(x, p["a"]), nn.functional.linear(x, p["b"])))
    packed = teint8.pack(qfn, {"a": first, "b": second}, x)
    with torch.no_grad():
        a, b = qfn(packed, x)
        for name, y in (("a", a), ("b", b)):
            alone = teint8.quantize(lambda p, x: nn.functional.linear(x, p["a"]))({"a": packed[name]}, x)
            assert different(y, alone) == 0


def test_codes_of_an_edited_basis_are_made_anew(device: str) -> None:
    linear, x = nn.Linear(32, 8).to(device), torch.randn(4, 32, device=device)
    smoothing = torch.exp2(torch.arange(32.0, device=device) % 5)

    def twice(p, x):
        first = nn.functional.linear(x, p["weight"])
        smoothing.mul_(torch.exp2(torch.arange(32.0, device=device) % 3))
        return first, nn.functional.linear(x, p["weight"])

    packed = teint8.pack(
        teint8.quantize(linear), {"weight": Conditioned(linear.weight.detach(), smoothing=smoothing), "bias": linear.bias}
    )
    with torch.no_grad():
        first, second = teint8.quantize(twice)(packed, x)
        want = teint8.quantize(lambda p, x: nn.functional.linear(x, p["weight"]))(packed, x)
    assert different(second, want) == 0 and different(first, second) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wider_weight_is_met_with_or_without_a_gradient(dtype: torch.dtype, device: str) -> None:
    linear, x = nn.Linear(32, 8).to(device), torch.randn(4, 32, device=device).to(dtype)
    qfn = teint8.quantize(lambda p, x: nn.functional.linear(x, p["weight"]))
    params = {"weight": Conditioned(linear.weight.detach(), rotation=16)}
    packed = teint8.pack(qfn, params, x)
    want = qfn(params, x)
    with torch.no_grad():
        assert different(qfn(packed, x), want) == 0
    assert different(qfn(packed, x.clone().requires_grad_()), want) == 0


def test_blocks_of_a_weight_stay_with_its_rule(device: str) -> None:
    linear, x = nn.Linear(64, 8).to(device), torch.randn(4, 64, device=device)
    qfn = teint8.quantize(linear, Policy([Rule(weight=Quant("block", block=128), activation=Quant("row"))]))
    params = {"weight": Conditioned(linear.weight.detach(), rotation=16), "bias": linear.bias.detach()}
    with torch.no_grad():
        assert different(qfn(teint8.pack(qfn, params), x), qfn(params, x)) == 0


@pytest.mark.parametrize(
    "error,arguments",
    [
        ("by row, but activation is 'tensor'", {"activation": "tensor"}),
        (r"x has shape \(2, 4\) but x_codes", {"codes": (3, 4)}),
        ("a derivative was asked for", {"grad": True}),
    ],
)
def test_codes_that_cannot_be_used(error: str, arguments: dict) -> None:
    x, w = torch.ones(2, 4), torch.ones(3, 4, requires_grad=arguments.pop("grad", False))
    codes = ops.quantize(torch.ones(arguments.pop("codes", (2, 4))))
    with pytest.raises(ValueError, match=error):
        ops.linear(x, w, x_codes=codes, **arguments)
    with torch.no_grad():
        assert torch.equal(ops.linear(x, w, x_codes=ops.quantize(x)), ops.linear(x, w))
