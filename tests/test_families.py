"""Model families run unmodified, in a context and as quantized functions: whatever a rule wants in INT8 is in INT8."""

import warnings

import families
import pytest
import torch
from contract import different

import teint8


@pytest.mark.parametrize("name", families.FAMILIES)
def test_what_a_rule_wants_runs_in_int8(name: str) -> None:
    if name in families.FROM_CONFIGS:
        pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = families.FAMILIES[name]()
    if made is None:
        pytest.skip("its package is not installed")
    model, inputs = made
    model.eval()
    qfn, params = teint8.quantize(model), dict(model.named_parameters())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with teint8.te_int8_autocast(training=False) as context:
            y = families.value(model(**inputs))
        exact = families.value(model(**inputs))
        receipt = teint8.explain(qfn, params, **inputs)
        assert different(families.value(qfn(params, **inputs)), y) == 0
    for r in (context.receipt, receipt):
        wanted = [record for record in r if not record.reason.startswith(families.WANTED_NOT)]
        assert wanted and all(record.int8 for record in wanted), [record for record in wanted if not record.int8]
        assert all(record.op == "activation_matmul" for record in r if not record.int8)
    assert 0 < float((y - exact).norm()) < 0.25 * float(exact.norm())
