"""Convolutions in inference that a context met before: the bits, the receipt and the errors of those that it meets first."""

import pytest
import torch
from contract import different
from torch import Tensor, nn

import teint8
from teint8 import Policy, Quant, Rule, ops, te_int8_autocast
from teint8.ops import registry
from teint8.transforms.route import Route

LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
LAYERS = {
    "plain": (lambda: nn.Conv2d(6, 10, 3, 2, 1), (3, 6, 9, 8)),
    "no bias": (lambda: nn.Conv2d(6, 10, (1, 3), dilation=2, bias=False), (3, 6, 9, 8)),
    "a pixel": (lambda: nn.Conv2d(6, 10, 1), (3, 6, 9, 8)),
    "a pixel, strided": (lambda: nn.Conv2d(6, 10, 1, 2, bias=False), (3, 6, 9, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6), (3, 6, 9, 8)),
    "groups": (lambda: nn.Conv2d(6, 9, 3, padding=1, groups=3), (3, 6, 9, 8)),
    "same": (lambda: nn.Conv2d(6, 10, 3, padding="same", padding_mode="reflect"), (3, 6, 9, 8)),
    "odd same": (lambda: nn.Conv2d(6, 10, 2, padding="same"), (3, 6, 9, 8)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 10, 3, 2, 1, output_padding=1), (3, 6, 5, 4)),
    "transposed groups": (lambda: nn.ConvTranspose2d(6, 9, 3, 2, groups=3), (3, 6, 5, 4)),
    "line": (lambda: nn.Conv1d(6, 10, 5, dilation=2), (3, 6, 20)),
    "transposed line": (lambda: nn.ConvTranspose1d(6, 10, 5, 3), (3, 6, 7)),
    "space": (lambda: nn.Conv3d(6, 10, 3, padding=1), (3, 6, 5, 4, 6)),
    "one image": (lambda: nn.Conv2d(6, 10, 3), (6, 9, 8)),
}
LONG = {"odd same", "transposed groups", "one image"}
"""Those that are decided anew each time."""


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Of every convolution that is decided the long way its kind."""
    calls: list[str] = []
    convolve = Route.convolve

    def noted(self: Route, call, weight, float_call) -> Tensor:
        calls.append(type(self).__name__)
        return convolve(self, call, weight, float_call)

    monkeypatch.setattr(Route, "convolve", noted)
    return calls


def _made(name: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    return make().to(device, dtype), torch.randn(shape, dtype=torch.float64).to(device, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_bits_layout_and_receipt(name: str, dtype: torch.dtype, device: str, decided: list[str]) -> None:
    layer, x = _made(name, device, dtype)
    want = teint8.quantize(layer)(dict(layer.named_parameters()), x)
    last = x.contiguous(memory_format=LAST[x.ndim]) if x.ndim in LAST and name != "one image" else x
    lines = []
    for _ in range(2):
        decided.clear()
        with torch.no_grad(), te_int8_autocast(training=False) as context:
            for i in range(3):
                y, z = layer(x), layer(last)
                assert different(y, want) == different(z, want) == 0, i
                assert (y.shape, y.stride(), z.stride()) == (want.shape, layer(x).stride(), layer(last).stride())
                # what a GPU pads by reflection is contiguous
                assert y.is_contiguous() and (last is x or name == "same" or z.is_contiguous(memory_format=LAST[x.ndim]))
        lines.append([(r, r.calls) for r in context.receipt])
        # the first call in float32 is decided, and so is the first of another layout no more: it has the same plan
        long = name in LONG or (dtype == torch.float64 and "a pixel" in name and device == "cpu")  # no linear there is whole
        assert len(decided) == (12 if long else 1 if len(lines) == 1 else 0)
    assert lines[0] == lines[1] and lines[0][0][0].int8 and lines[0][0][1] == 12 and lines[0][0][0].nbytes > 0
    assert lines[0][0][0].kernel or device == "cpu"


def test_what_the_weight_becomes(device: str, decided: list[str]) -> None:
    layer, x = _made("plain", device)
    context = te_int8_autocast(training=False)

    def edited() -> None:
        with torch.no_grad(), context:
            served = [layer(x), layer(x)]
        want = teint8.quantize(layer)(dict(layer.named_parameters()), x)
        assert all(different(y, want) == 0 for y in served)

    edited()
    decided.clear()
    for edit in (
        lambda: layer.weight.detach().mul_(3),
        lambda: layer.load_state_dict({k: v + 1 for k, v in layer.state_dict().items()}),
        lambda: setattr(layer.weight, "data", torch.randn_like(layer.weight)),
        lambda: layer.bias.detach().neg_(),
        lambda: setattr(layer, "stride", (1, 1)),
        lambda: setattr(layer, "weight", nn.Parameter(torch.randn(4, 6, 1, 2, device=device))) or setattr(layer, "bias", None),
    ):
        with torch.no_grad():
            edit()
        edited()
    assert decided.count("te_int8_autocast") == 2  # the last two are other convolutions


def test_only_inference_goes_the_short_way(device: str, decided: list[str]) -> None:
    layer, x = _made("plain", device)
    want = teint8.quantize(layer)(dict(layer.named_parameters()), x)
    for how in ({}, {"policy": Policy.training()}):
        with te_int8_autocast(training=False, **how):
            with torch.no_grad():
                assert different(layer(x), want) == different(layer(x), want) == 0
            decided.clear()
            y = layer(x)
            y.sum().backward()
            assert y.requires_grad and layer.weight.grad is not None
            mapped = torch.func.vmap(layer)(torch.stack((x, x)))
            assert different(mapped[1], want) == 0
            with torch.no_grad():
                assert different(torch.func.jvp(layer, (x,), (x,))[0], want) == 0
                with torch.autograd.forward_ad.dual_level():
                    dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
                    assert torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent is not None
                with torch.autocast(device, dtype=torch.bfloat16):
                    assert layer(x).dtype == torch.bfloat16
            assert len(decided) == 5
        with torch.inference_mode(), te_int8_autocast(training=False, **how):
            assert different(layer(x), want) == different(layer(x), want) == 0


def test_policies_are_heard(device: str) -> None:
    layer, x = _made("plain", device)
    model = nn.Sequential(layer)
    with torch.no_grad():
        exact = model(x)
        with te_int8_autocast(training=False):
            int8 = [model(x) for _ in range(2)][1]
        for policy in (
            Policy([Rule(weight=None)]),
            Policy([Rule("0.*", weight=None), Rule()]),
            Policy([Rule(ops=("linear",))]),
            Policy(),
        ):
            with te_int8_autocast(training=False, policy=policy):
                assert torch.equal(model(x), exact) and torch.equal(model(x), exact)
        for policy in (Policy.weight_only(), Policy([Rule(activation=Quant("tensor"))]), Policy.simulate()):
            want = teint8.quantize(model, policy)(dict(model.named_parameters()), x)
            with te_int8_autocast(training=False, policy=policy):
                y = [model(x) for _ in range(2)][1]
            assert different(y, want) == 0 and (different(y, int8) == 0) == (policy == Policy.simulate())
        with te_int8_autocast(training=False), te_int8_autocast(training=False, enabled=False):
            assert torch.equal(model(x), exact) and torch.equal(model(x), exact)


def test_it_is_planned_once(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = _made("plain", device)
    planned: list[object] = []
    plan = te_int8_autocast._plan_convolution
    monkeypatch.setattr(te_int8_autocast, "_plan_convolution", lambda self, *args: planned.append(args) or plan(self, *args))
    for how in ({}, {"policy": Policy.weight_only()}, {"policy": Policy([Rule(ops=("linear",))])}, {"enabled": False}):
        planned.clear()
        with torch.no_grad(), te_int8_autocast(training=False, **how):
            for _ in range(5):
                layer(x)
        assert len(planned) == ("enabled" not in how)


def test_contexts_that_compiled_code_makes_have_policies_of_their_own() -> None:
    """A graph break leaves a context to eager mode that was made while Dynamo traced."""
    layer, x = _made("plain", "cpu")
    called = torch._dynamo.disable(layer)

    def int8(x: Tensor) -> Tensor:
        with te_int8_autocast(training=False):
            return called(x)

    def floats(x: Tensor) -> Tensor:
        with te_int8_autocast(training=False, policy=Policy([Rule(weight=None)])):
            return called(x)

    with torch.no_grad():
        want, exact = int8(x), layer(x)
        te_int8_autocast.cache_clear()
        torch._dynamo.reset()
        runs = [torch.compile(f, backend="eager") for f in (int8, floats)]
        for _ in range(3):
            assert torch.equal(runs[0](x), want) and torch.equal(runs[1](x), exact) and not torch.equal(want, exact)


def test_a_call_that_is_refused_is_refused_again() -> None:
    layer, x = _made("plain", "cpu")
    with torch.no_grad(), te_int8_autocast(training=False):
        layer(x), layer(x)
        for wrong in (x[:, :5], x.bfloat16(), x[..., :1, :1, :1, 0]):
            for _ in range(2):
                with pytest.raises((TypeError, ValueError, RuntimeError)):
                    layer(wrong)
        bias, layer.bias = layer.bias, nn.Parameter(layer.bias.to("meta"))
        for _ in range(2):
            with pytest.raises(ValueError, match="bias on meta"):
                layer(x)
        layer.bias = bias
        y = layer(x.expand(2, 3, 6, 9, 8)[1])
        assert torch.equal(y, layer(x))
        empty = layer(x[:0])
        assert empty.shape == (0, 10, 5, 4)
        bad = x.clone()
        bad[1, 2, 3, 4] = float("nan")
        for _ in range(2):
            spoilt = layer(bad)
            assert spoilt[1].isnan().all() and torch.equal(spoilt[::2], y[::2])


def test_what_is_registered_later_is_taken(decided: list[str]) -> None:
    layer, x = _made("plain", "cpu")
    seen = []

    def mine(*args) -> Tensor:
        seen.append(args[5])
        return registry.select("conv", registry.Problem("cpu", torch.float32, 1, 60, 10, 54, (2, 6)), "reference").run(*args)

    with torch.no_grad(), te_int8_autocast(training=False) as context:
        want = next(layer(x) for _ in range(2))
        ops.register("conv", "mine", mine, device="cpu", priority=99)
        try:
            for _ in range(3):
                assert torch.equal(layer(x), want)
            assert len(seen) == 3 and context.receipt.records[-1].implementation == "mine"
        finally:
            registry._implementations["conv"] = [i for i in registry._implementations["conv"] if i.name != "mine"]
            registry.choose_anew()
        assert torch.equal(layer(x), want) and len(seen) == 3


def test_compiled_inside_of_a_context(device: str) -> None:
    layer, x = _made("plain", device)
    with torch.no_grad(), te_int8_autocast(training=False):
        want = [layer(x) for _ in range(2)][1]
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), want) and torch.equal(layer(x), want)


def test_receipts_of_later_contexts_know_kernels_and_bytes(device: str) -> None:
    """Of linears and of convolutions, whose plans an earlier context made."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.Linear(36, 16)).to(device)
    x = torch.randn(4, 3, 8, 8, device=device)
    lines = []
    for _ in range(3):
        with torch.no_grad(), te_int8_autocast(training=False) as context:
            model(x), model(x)
        lines.append([(r.path, r.kernel, r.nbytes, r.calls) for r in context.receipt])
    assert lines[0] == lines[1] == lines[2] and all(nbytes > 0 and calls == 2 for _, _, nbytes, calls in lines[0])
