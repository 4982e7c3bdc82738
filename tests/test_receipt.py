"""What the receipt measures: against independent formulas; its forms; two receipts side by side."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import teint8
from teint8 import Policy, Quant, Rule, numerics, te_int8_autocast


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc, self.table = nn.Conv2d(3, 8, 3), nn.Linear(8, 5), nn.Parameter(torch.randn(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(F.relu(self.conv(x)).mean((2, 3))) @ self.table
        return y


def _receipt(policy: Policy | None = None, x: Tensor | None = None) -> teint8.Receipt:
    torch.manual_seed(0)
    net = Net()
    x = torch.randn(2, 3, 9, 9) if x is None else x
    return teint8.explain(teint8.quantize(net, policy), dict(net.named_parameters()), x)


def test_sqnr_and_saturation_are_those_of_the_formula() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32), torch.randn(16, 64)
    record = teint8.explain(teint8.quantize(layer), dict(layer.named_parameters()), x).records[0]
    (xq, xs), (wq, ws) = numerics.quantize(x), numerics.quantize(layer.weight.detach())
    y = (xq.double() * xs.double()[:, None]) @ (wq.double() * ws.double()[:, None]).mT + layer.bias.double()
    exact = x.double() @ layer.weight.double().mT + layer.bias.double()
    want = 10 * math.log10(float(exact.square().sum() / (exact - y).square().sum()))
    assert record.sqnr is not None and abs(record.sqnr - want) < 0.01 and 30 < want < 60
    assert record.saturated == int((xq.abs() == 127).sum()) / xq.numel()
    assert record.nbytes == 16 * 64 + 4 * 16 + 32 * 64 + 4 * 32 + 16 * 32 * 4


def test_a_static_scale_that_clips_shows() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32), torch.randn(16, 64)
    qfn = teint8.quantize(layer, Policy([Rule(activation=Quant(scale="static"))]))
    params = dict(layer.named_parameters())
    found = []
    for top in (5.0, 1.0):
        packed = teint8.pack(teint8.quantize(layer), params)
        packed["weight"] = packed["weight"].with_activation_scale(torch.tensor(top / 127))
        found.append(teint8.explain(qfn, packed, x).records[0])
    assert found[0].saturated == 0 and found[1].saturated > 0.2 and found[1].sqnr < found[0].sqnr - 10  # type: ignore[operator]


def test_each_kind_of_call_is_measured() -> None:
    receipt = _receipt()
    assert [r.op for r in receipt] == ["conv", "linear", "matmul"]
    for record in receipt:
        assert record.sqnr is not None and 25 < record.sqnr < 70 and 0 < record.saturated < 0.5 and record.nbytes > 0  # type: ignore[operator]
    only = _receipt(Policy([Rule("conv.*", activation=None), Rule("fc.*", weight=None), Rule()]))
    conv, fc, _ = only
    assert conv.implementation == "dequantized" and conv.sqnr is not None and conv.saturated is None
    assert fc.implementation == "float" and fc.sqnr is None
    assert only.records[0].sqnr > receipt.records[0].sqnr  # type: ignore[operator]  # a float activation loses less


def test_calls_of_one_kind_add_up() -> None:
    torch.manual_seed(0)
    w, xs = torch.randn(6, 8), torch.randn(3, 4, 8)
    qfn = teint8.quantize(lambda p, xs: [F.linear(x, p["w"]) for x in xs])
    (record,) = teint8.explain(qfn, {"w": w}, xs)
    (whole,) = teint8.explain(teint8.quantize(lambda p, x: F.linear(x, p["w"])), {"w": w}, xs.flatten(0, 1))
    assert record.calls == 3 and abs(record.sqnr - whole.sqnr) < 1e-3  # type: ignore[operator]


def test_zeros_have_no_error() -> None:
    layer = nn.Linear(8, 4, bias=False)
    receipt = teint8.explain(teint8.quantize(layer), dict(layer.named_parameters()), torch.zeros(2, 8))
    assert receipt.records[0].sqnr == math.inf
    assert json.loads(receipt.to_json())["records"][0]["sqnr"] == "inf"


def test_text_html_and_json() -> None:
    receipt = _receipt(Policy([Rule("fc.*", weight=None), Rule("nothing"), Rule()]))
    text, page, data = str(receipt), receipt._repr_html_(), json.loads(receipt.to_json())
    assert "SQNR dB" in text.splitlines()[0] and "2 of 3 calls ran in INT8" in text
    assert page.count("<tr") == 4 and page.count("background") == 1 and "Rule(&#x27;nothing&#x27;)" in page
    assert [r["path"] for r in data["records"]] == ["conv.weight", "fc.weight", "table"] and data["unmatched"] == ["Rule('nothing')"]
    assert data["records"][0]["sqnr"] == receipt.records[0].sqnr
    with te_int8_autocast() as context:  # a context measures nothing, and its table has no columns for it
        nn.Linear(4, 4)(torch.ones(1, 4))
    assert "SQNR" not in str(context.receipt)


def test_plot() -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    receipt = _receipt()
    axes = receipt.plot()
    heights = [bar.get_width() for bar in axes.patches]
    assert heights == [r.sqnr for r in reversed(receipt.records)]
    with pytest.raises(ValueError, match="no SQNR was measured"):
        teint8.Receipt().plot()


def test_a_receipt_of_no_call_says_nothing_of_rules() -> None:
    """What ran in compiled code is not recorded: its rules may well have matched."""
    with te_int8_autocast(policy=Policy([Rule("fc.*")])) as nothing:
        pass
    with te_int8_autocast(policy=Policy([Rule("fc.*")])) as other:
        F.linear(torch.ones(2, 3), torch.ones(4, 3))
    assert "no matmul was recorded" in str(nothing.receipt) and "no call matched" not in str(nothing.receipt)
    assert str(other.receipt).endswith("no call matched Rule('fc.*')")


def test_two_receipts_side_by_side() -> None:
    first = _receipt()
    second = _receipt(Policy([Rule("fc.*", weight=None), Rule("table", activation=None), Rule()]))
    comparison = teint8.compare(first, second)
    assert comparison.changed == ("fc.weight", "table")
    rows = {row[0]: row for row in comparison.rows}
    assert rows["fc.weight"][3] == "float" and rows["fc.weight"][5] is None and rows["fc.weight"][7] > rows["fc.weight"][6]
    assert rows["table"][3] == "dequantized W8A16" and rows["conv.weight"][2] == rows["conv.weight"][3]
    assert "2 of 3 changed" in str(comparison) and "<table>" in comparison._repr_html_()
    with pytest.raises(TypeError, match="after is dict; a Receipt is needed"):
        teint8.compare(first, {})  # type: ignore[arg-type]


def test_strict_names_the_rule_to_write() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.mv(self.w, x)

    net = Odd()
    qfn = teint8.quantize(net, strict=True)
    with pytest.raises(ValueError, match=r"strict: w \(matmul\) cannot run .* Leave it in float with Rule\('w', .*weight=None\)"):
        qfn(dict(net.named_parameters()), torch.randn(4))


@pytest.mark.parametrize("n", [6, 8])
def test_a_packed_weight_that_is_seen_turned_around(n: int) -> None:
    torch.manual_seed(0)
    w, x = torch.randn(n, 8), torch.randn(3, 8)
    for f in (lambda p, x: x @ p["w"].t(), lambda p, x: torch.addmm(torch.ones(n), x, p["w"].t())):
        qfn = teint8.quantize(f)
        packed = teint8.pack(qfn, {"w": w}, x)
        (record,) = teint8.explain(qfn, packed, x)
        assert record.sqnr is not None and record.sqnr > 30


def test_what_has_no_values_is_not_measured() -> None:
    w, x = torch.randn(4, 8), torch.randn(3, 5, 8)
    inside = teint8.quantize(lambda p, x: torch.func.vmap(lambda x: F.linear(x, p["w"]))(x))
    assert teint8.explain(inside, {"w": w}, x).records[0].sqnr is None
    gradient = teint8.quantize(lambda p, x: torch.func.grad(lambda x: F.linear(x, p["w"]).sum())(x))
    assert teint8.explain(gradient, {"w": w}, x).records[0].sqnr is None
    meta = teint8.quantize(nn.Linear(8, 4, device="meta"))
    params = {k: v.to("meta") for k, v in nn.Linear(8, 4).named_parameters()}
    assert teint8.explain(meta, params, x.to("meta")).records[0].sqnr is None


def test_results_that_overflow_can_be_printed() -> None:
    layer, x = nn.Linear(64, 16).half(), torch.full((2, 64), 6e4).half()
    receipt = teint8.explain(teint8.quantize(layer), dict(layer.named_parameters()), x)
    assert not math.isfinite(receipt.records[0].sqnr) and str(receipt) and json.loads(receipt.to_json())  # type: ignore[arg-type]


def test_a_comparison_makes_no_lines_of_its_own() -> None:
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 6, 6)
    qfn, params = teint8.quantize(conv), dict(conv.named_parameters())
    receipt = teint8.explain(qfn, teint8.pack(qfn, params), x)
    assert receipt.int8_calls == receipt.calls == 1 and receipt.records[0].sqnr > 30  # type: ignore[operator]


def test_calls_of_two_lines_of_one_file_are_alike() -> None:
    q = torch.randn(1, 2, 5, 8)
    policy = Policy([Rule(ops=("attention",))])
    first = teint8.explain(teint8.quantize(lambda p, q: F.scaled_dot_product_attention(q, q, q), policy), {}, q)
    second = teint8.explain(teint8.quantize(lambda p, q: F.scaled_dot_product_attention(q, q, q), policy), {}, q)
    assert first.records[0].path != second.records[0].path and teint8.compare(first, second).changed == ()


def test_it_is_measured_against_float_inside_of_a_context() -> None:
    """The context around must not take over the float product that INT8 is compared with."""
    model, x = nn.Sequential(nn.Linear(64, 32)), torch.randn(8, 64)
    qfn, params = teint8.quantize(model), dict(model.named_parameters())
    (want,) = teint8.explain(qfn, params, x)
    with teint8.te_int8_autocast() as ctx:
        (found,) = teint8.explain(qfn, params, x)
    assert found.sqnr == want.sqnr and 20 < found.sqnr < 60 and ctx.receipt.calls == 0


def test_it_tells_how_gradients_are_rounded() -> None:
    model, x = nn.Linear(64, 32), torch.randn(8, 64)
    for rounding, mode in (("nearest", "W8A8 dX dW"), ("stochastic", "W8A8 dX dW stochastic")):
        policy = Policy([Rule(gradient=Quant(rounding=rounding))])
        (record,) = teint8.explain(teint8.quantize(model, policy), dict(model.named_parameters()), x)
        assert record.mode == mode
