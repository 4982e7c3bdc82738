"""Bad input: each case is a ValueError or TypeError whose message names the value and the fix."""

import pytest
import torch
from torch import nn

import teint8
from teint8 import Policy, QTensor, Quant, Rule, ops, te_int8_autocast
from teint8.ops import registry
from teint8.transforms import files
from teint8.transforms.attention import multi_head_attention_forward

MODEL = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 10))
PARAMS = dict(MODEL.named_parameters())
QFN = teint8.quantize(MODEL)
PACKED = teint8.pack(QFN, PARAMS)
X = torch.randn(5, 24)
W = torch.randn(7, 24)
STATIC = Policy([Rule(activation=Quant(scale="static"))])
CODES = ops.quantize(X)[0]


def _strict(policy: Policy, model: nn.Module = MODEL, x: torch.Tensor = X) -> None:
    with te_int8_autocast(policy=policy, strict=True):
        model(x)


def _mm(
    x_codes: torch.Tensor = CODES,
    x_scale: torch.Tensor | None = None,
    w_codes: torch.Tensor = CODES,
    w_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """A matmul of codes, all else as fits."""
    scales = [torch.ones(q.shape[:-1]) if s is None else s for q, s in ((x_codes, x_scale), (w_codes, w_scale))]
    ops.int8_mm(x_codes, scales[0], w_codes, scales[1], bias, dtype)


def _meta() -> None:
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(24, 32), nn.BatchNorm1d(32)).eval()
    made = nn.Sequential(nn.Linear(24, 32), nn.BatchNorm1d(32)).eval()
    params, buffers = dict(made.named_parameters()), dict(made.named_buffers())
    qfn = teint8.quantize(skeleton)
    assert torch.equal(qfn((params, buffers), X), teint8.quantize(made)(params, X))
    qfn(params, X)


def _swapped() -> dict[str, object]:
    return {**PACKED, "0.weight": PACKED["2.weight"]}


CASES = {
    "x of the wrong width": (lambda: ops.linear(torch.randn(5, 23), W), ValueError, r"\(5, 23\).*\(7, 24\)"),
    "x of integers": (lambda: ops.linear(torch.ones(5, 24, dtype=torch.int64), W), TypeError, r"int64.*x\.float\(\)"),
    "two float dtypes": (lambda: ops.linear(X.bfloat16(), W), TypeError, r"bfloat16.*float32.*torch\.autocast"),
    "a buffer without values": (_meta, ValueError, r"buffers '1.running_mean'.*meta.*\(params, buffers\)"),
    "a block that is not used": (lambda: Quant(block=64), ValueError, r"block=64.*Quant\('block', block=64\)"),
    "a policy that is no JSON": (lambda: Policy.from_json("nonsense"), ValueError, "'nonsense' is no JSON.*to_json"),
    "a field that there is not": (lambda: Policy.from_json('[{"gradeint": 1}]'), ValueError, "no field 'gradeint'.*gradient"),
    "a package that is missing": (lambda: files.need("safetensors", "no_such"), ImportError, "need no_such.*pip install no_such"),
    "statistics where moments are needed": (
        lambda: teint8.awq(QFN, PARAMS, teint8.calibrate(QFN, PARAMS, [X], progress=False)),
        TypeError,
        "holds a Statistics; awq takes what second_moments",
    ),
    "codes of integers": (lambda: ops.quantize(X.int()), TypeError, r"int32.*x\.float\(\)"),
    "both codes of integers": (lambda: ops.quantize_both(X.int()), TypeError, r"int32.*x\.float\(\)"),
    "a scale for other rows": (lambda: ops.quantize(X, scale=torch.ones(4)), ValueError, r"\(4,\).*\(5, 24\).*\(5,\)"),
    "more dimensions than there are": (lambda: ops.quantize(X, group_dims=3), ValueError, r"3.*\(5, 24\).*1 to 2"),
    "an op that there is not": (lambda: ops.implementations("int4_mm"), ValueError, "'int4_mm'.*'int8_mm'"),
    "codes of another K": (lambda: _mm(w_codes=CODES[:, :8]), ValueError, r"\(5, 24\), and w_codes \(5, 8\); .* are needed"),
    "a batch of codes for another": (lambda: _mm(CODES.expand(2, 5, 24), w_codes=CODES.expand(3, 5, 24)), ValueError, r"\(B, N, K\)"),
    "scales of too few rows": (lambda: _mm(x_scale=torch.ones(4)), ValueError, r"x_scale has shape \(4,\); \(5,\) is needed"),
    "scales of too few channels": (lambda: _mm(w_scale=torch.ones(1)), ValueError, r"w_scale has shape \(1,\); \(5,\) is needed"),
    "a bias of too few channels": (lambda: _mm(bias=torch.ones(3)), ValueError, r"bias has shape \(3,\); \(5,\) is needed"),
    "floats for codes": (lambda: _mm(X), TypeError, "float32 and torch.int8; torch.int8 is needed"),
    "integers as a result": (lambda: _mm(dtype=torch.int32), TypeError, "dtype is torch.int32; one of torch.float16"),
    "weight of integers": (lambda: ops.linear(X, W.int()), TypeError, "weight has dtype torch.int32.*QTensor"),
    "weight of one dimension": (lambda: ops.linear(X, W[0]), ValueError, r"weight has \(24,\).*\(N, K\)"),
    "bias of the wrong length": (lambda: ops.linear(X, W, torch.zeros(8)), ValueError, r"\(8,\).*\(7,\) is needed"),
    "batches that differ": (lambda: ops.linear(torch.randn(2, 5, 24), W.expand(3, 7, 24)), ValueError, r"\(B, N, K\) needs x"),
    "two devices": (lambda: ops.linear(X.to("meta"), W), ValueError, r"x is on meta.*\.to\('cpu'\)"),
    "static without a scale": (lambda: ops.linear(X, W, static=True), ValueError, "with_activation_scale"),
    "static policy, float weight": (lambda: teint8.quantize(MODEL, STATIC)(PARAMS, X), ValueError, "scale='dynamic'"),
    "unknown granularity": (lambda: Quant("blok"), ValueError, "'blok'.*'row', 'tensor'"),
    "unknown scale": (lambda: Quant(scale="delayed"), ValueError, "'delayed'.*'dynamic', 'static'"),
    "unknown rounding": (lambda: Quant(rounding="up"), ValueError, "'up'.*'nearest', 'stochastic'"),
    "static weight": (lambda: Rule(weight=Quant(scale="static")), ValueError, "only activations"),
    "stochastic activation": (lambda: Rule(activation=Quant(rounding="stochastic")), ValueError, "only gradients"),
    "no backward in INT8, but a float part of it": (lambda: Rule(wgrad="float"), ValueError, r"add gradient=Quant\(\)"),
    "gradient by tensor": (lambda: Rule(gradient=Quant("tensor")), ValueError, r"Quant\(granularity='row'\)"),
    "gradient without activation": (lambda: Rule(activation=None, gradient=Quant()), ValueError, "needs INT8 activations"),
    "unknown compute": (lambda: Rule(compute="fp8"), ValueError, "'fp8'.*'int8', 'simulate'"),
    "unknown wgrad": (lambda: Rule(wgrad="none"), ValueError, "'none'.*'int8', 'float'"),
    "unknown op": (lambda: Rule(ops=("pool",)), ValueError, "'pool'.*'linear', 'matmul'"),
    "ops as a string": (lambda: Rule(ops="linear"), TypeError, r"'linear'.*\('linear',\)"),
    "path that is no string": (lambda: Rule(3), TypeError, "path is 3.*glob"),
    "weight that is no Quant": (lambda: Rule(weight="int8"), TypeError, r"'int8'.*Quant\(\.\.\.\) or None"),
    "unknown preset": (lambda: Policy.preset("fast"), ValueError, "'fast'.*'qat'.*'weight_only'"),
    "one rule": (lambda: Policy(Rule()), TypeError, r"Policy\(\[Rule"),
    "rules that are none": (lambda: Policy(["*"]), TypeError, r"'\*' is not a Rule"),
    "rules that are no list": (lambda: Policy(3), TypeError, "a list of Rule"),
    "policy by name": (lambda: teint8.quantize(MODEL, "qat"), TypeError, r"'qat'.*Policy\.qat\(\)"),
    "nothing to quantize": (lambda: teint8.quantize(3), TypeError, "neither an nn.Module nor a function"),
    "params for a module": (lambda: teint8.quantize(PARAMS), TypeError, "^quantize: what was given, of type dict, is neither"),
    "params for a policy": (lambda: teint8.quantize(MODEL, PARAMS), TypeError, "^quantize: policy is of type dict; a Policy"),
    "params for a context": (lambda: te_int8_autocast(PARAMS), TypeError, "training is of type dict; True or False is needed$"),
    "training that is no bool": (lambda: te_int8_autocast("yes"), TypeError, "'yes'; True or False"),
    "decorator without parentheses": (lambda: te_int8_autocast(_strict), TypeError, r"@te_int8_autocast\(\)"),
    "decorating a value": (lambda: te_int8_autocast()(3), TypeError, "3 cannot be decorated"),
    "autocast policy by name": (lambda: te_int8_autocast(policy="qat"), TypeError, "'qat'; a Policy"),
    "params that are no dict": (lambda: QFN(list(PARAMS.values()), X), TypeError, "named_parameters"),
    "params of another model": (lambda: QFN({"fc.weight": W}, X), ValueError, "'fc.weight'.*another model"),
    "QTensor of another layer": (lambda: QFN(_swapped(), X), ValueError, r"0\.weight has shape \(32, 24\).*another layer"),
    "packing a plain function": (lambda: teint8.pack(MODEL, PARAMS), TypeError, r"teint8\.quantize\(model\)"),
    "packing without inputs": (lambda: teint8.pack(teint8.quantize(lambda p, x: x @ p), W.t()), TypeError, r"pack\(qfn, params"),
    "nothing to pack": (lambda: teint8.pack(teint8.quantize(MODEL, Policy()), PARAMS), ValueError, "no weight of .* would be in INT8"),
    "packing params of another model": (lambda: teint8.pack(teint8.quantize(MODEL), {"a": W}), ValueError, "another model"),
    "packing a part by an abstract run": (
        lambda: teint8.pack(teint8.quantize(MODEL), dict(list(PARAMS.items())[:1]), X),
        ValueError,
        "params lacks",
    ),
    "packing other shapes": (
        lambda: teint8.pack(teint8.quantize(MODEL), {name: p[..., :-1] for name, p in PARAMS.items()}),
        ValueError,
        "has shape",
    ),
    "explaining a module": (lambda: teint8.explain(MODEL, PARAMS, X), TypeError, r"teint8\.quantize\(model\)"),
    "QTensor of one dimension": (lambda: QTensor(torch.zeros(3, dtype=torch.int8), torch.ones(1)), ValueError, "at least 2"),
    "QTensor of another scale": (lambda: QTensor(W.char(), torch.ones(24, 1)), ValueError, r"\(24, 1\).*\(7, 1\) is needed"),
    "QTensor axis": (lambda: QTensor(W.char(), torch.ones(7, 1), axis=0), ValueError, "axis is 0.*-1.*-2"),
    "QTensor of float codes": (lambda: QTensor(W, torch.ones(7, 1)), TypeError, "float32.*int8"),
    "QTensor of integers": (lambda: QTensor.quantize(W.int()), TypeError, "int32; a float weight"),
    "QTensor to a dtype": (lambda: PACKED["0.weight"].to(torch.bfloat16), TypeError, r"bfloat16.*dequantize\(\)"),
    "static scale below 0": (lambda: PACKED["0.weight"].with_activation_scale(-1.0), ValueError, "-1.0.*positive"),
    "packed params in grad": (
        lambda: torch.func.grad(lambda p: QFN(p, X).sum())(PACKED), TypeError, r"packed.*unpack|float parameters"),
    "rule that matches nothing": (lambda: _strict(Policy([Rule(), Rule("encoder.*")])), ValueError, r"'encoder\.\*'.*mend"),
    "misspelt rule": (
        lambda: teint8.quantize(MODEL, Policy([Rule("2.wieght", weight=None), Rule()]), strict=True)(PARAMS, X), ValueError,
        r"Rule\('2.wieght', weight=None\) \('2.wieght' is much like '2.weight'\); mend"),
    "misspelt rule alone": (
        lambda: teint8.quantize(MODEL, Policy([Rule("0.weigth")]), strict=True)(PARAMS, X), ValueError, "is much like '0.weight'"),
    "misspelt rule, alone and unlike any path": (
        lambda: teint8.quantize(MODEL, Policy([Rule("encoder.*")]), strict=True)(PARAMS, X), ValueError,
        r"matched Rule\('encoder.\*'\); mend the path"),
    "rule whose path is there but not for that op": (
        lambda: _strict(Policy([Rule("0.*", ops=("conv",)), Rule()])), ValueError,
        r"matched Rule\('0.\*', ops=\('conv',\)\); mend the path, the ops"),
    "rule that another one takes": (
        lambda: teint8.quantize(MODEL, Policy([Rule(), Rule("2.weight")]), strict=True)(PARAMS, X), ValueError,
        r"matched Rule\('2.weight'\); mend"),
    "rule that cannot be met": (
        lambda: _strict(Policy.qat(), nn.Linear(24, 3, dtype=torch.complex64), X.to(torch.complex64)), ValueError, "weight=None"),
    "unknown implementation": (lambda: ops.linear(X, W, impl="cutlass"), ValueError, "'cutlass'.*'reference'"),
    "implementation of another device": (lambda: ops.linear(X, W, impl="triton"), ValueError, "runs on cuda, not on cpu"),
    "registering for an unknown op": (lambda: registry.register("pool", "mine", print), ValueError, "'pool'.*'int8_mm'"),
    "registering no function": (lambda: registry.register("int8_mm", "mine", 3), TypeError, "run is 3"),
    "attention of another width": (
        lambda: multi_head_attention_forward(None, *[torch.randn(3, 2, 8)] * 3, 16, 4, *[None] * 4, False, 0.0, W, None),
        ValueError, r"\(3, 2, 8\).*must be 16"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_message_names_the_fix(name: str) -> None:
    run, kind, message = CASES[name]
    with pytest.raises(kind, match=f"(?s){message}"):
        run()


def test_there_are_enough() -> None:
    assert len(CASES) >= 25


def test_nothing_is_changed_by_a_bad_call() -> None:
    before = {k: v.clone() for k, v in MODEL.state_dict().items()}
    with pytest.raises(ValueError), te_int8_autocast():
        MODEL(torch.randn(5, 23))
    assert all(torch.equal(v, MODEL.state_dict()[k]) for k, v in before.items())
    assert torch.overrides._get_current_function_mode() is None
