"""Attention taken apart: equal to torch's own with an empty policy, for every option; its projections in INT8 with a policy."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import teint8
from teint8 import Policy, te_int8_autocast
from teint8.ops.attention import math_attention

OPTIONS = [
    {"bias": bias, "add_bias_kv": kv, "add_zero_attn": zero, "batch_first": first}
    for bias, kv, zero, first in itertools.product((True, False), repeat=4)
]
CALLS = ["self", "cross", "own widths", "unbatched"]
MASKS = ["none", "causal", "float", "per head", "padding", "both"]


def _inputs(kind: str, first: bool, device: str):
    q, k = torch.randn(3, 5, 16, device=device), torch.randn(3, 7, 16, device=device)
    if kind == "self":
        xs = (q, q, q)
    elif kind == "unbatched":
        one = q[0]
        return (one, one, one), 5
    elif kind == "own widths":
        xs = (q, k[..., :6].contiguous(), k[..., :10].contiguous())
    else:
        xs = (q, k, k)
    shared = {id(x): x if first else x.transpose(0, 1) for x in xs}
    return tuple(shared[id(x)] for x in xs), xs[1].shape[1]


def _masks(name: str, keys: int, batch: int | None, device: str):
    causal = torch.ones(5, keys, dtype=torch.bool, device=device).triu(1)
    padding = torch.zeros((keys,) if batch is None else (batch, keys), dtype=torch.bool, device=device)
    padding[..., -1] = True
    float_mask = torch.randn(5, keys, device=device)
    heads = torch.randn(4 if batch is None else batch * 4, 5, keys, device=device)
    return {
        "none": {},
        "causal": {"attn_mask": causal, "is_causal": True},
        "float": {"attn_mask": float_mask},
        "per head": {"attn_mask": heads},
        "padding": {"key_padding_mask": padding},
        "both": {"attn_mask": causal, "key_padding_mask": padding},
    }[name]


@pytest.mark.parametrize("kind", CALLS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("weights", ["averaged", "each head", "none"])
def test_equals_torch_with_an_empty_policy(kind: str, mask: str, weights: str, device: str) -> None:
    for options in OPTIONS:
        widths = {"kdim": 6, "vdim": 10} if kind == "own widths" else {}
        mha = nn.MultiheadAttention(16, 4, **options, **widths).to(device)
        with torch.no_grad():
            for p in mha.parameters():
                p.uniform_(-0.4, 0.4)
        xs, keys = _inputs(kind, options["batch_first"], device)
        kwargs = _masks(mask, keys, None if kind == "unbatched" else 3, device)
        kwargs |= {"need_weights": weights != "none", "average_attn_weights": weights == "averaged"}
        mha.train()
        if mask == "causal" and weights == "none" and (options["add_bias_kv"] or options["add_zero_attn"]):
            continue  # torch itself drops the mask here and then attends to keys that it has appended
        want = mha(*xs, **kwargs)
        got = teint8.quantize(mha, Policy())(dict(mha.named_parameters()), *xs, **kwargs)
        for a, b in zip(got, want, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                assert a.shape == b.shape
                # torch projects an unbatched input three times where one matmul does: other rounding
                assert torch.equal(a, b) if kind != "unbatched" else torch.allclose(a, b, atol=1e-6), options


@pytest.mark.parametrize("kind,calls", [("self", 2), ("cross", 3), ("own widths", 4), ("unbatched", 2)])
def test_projections_run_in_int8(kind: str, calls: int, device: str) -> None:
    mha = nn.MultiheadAttention(16, 4, batch_first=True, **({"kdim": 6, "vdim": 10} if kind == "own widths" else {})).to(device)
    xs, _ = _inputs(kind, True, device)
    qfn, params = teint8.quantize(mha), dict(mha.named_parameters())
    receipt = teint8.explain(qfn, params, *xs)
    assert (receipt.int8_calls, receipt.calls) == (calls, calls)
    got, float_ = qfn(params, *xs)[0], mha(*xs)[0]
    assert 0 < (got - float_).norm() / float_.norm() < 0.05
    packed = teint8.pack(qfn, params)
    assert sum(isinstance(v, teint8.QTensor) for v in packed.values()) == (4 if kind == "own widths" else 2)
    assert torch.equal(qfn(packed, *xs)[0], got)
    with torch.no_grad(), teint8.te_int8_autocast(training=False):
        assert torch.equal(mha(*xs)[0], got)
    tensor = Policy([teint8.Rule(weight=teint8.Quant("tensor"))])
    qfn = teint8.quantize(mha, tensor)
    assert torch.equal(qfn(params, *xs)[0], qfn(teint8.pack(qfn, params), *xs)[0])


@pytest.mark.parametrize("causal,mask", [(False, None), (True, None), (False, "bool"), (False, "float")])
def test_math_attention_equals_torch(causal: bool, mask: str | None) -> None:
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    m = None if mask is None else (torch.rand(6, 6) < 0.7) | torch.eye(6, dtype=torch.bool)
    m = torch.randn(6, 6) if mask == "float" else m
    want = F.scaled_dot_product_attention(q, k, v, m, is_causal=causal, scale=0.3, enable_gqa=True)
    assert torch.allclose(math_attention(q, k, v, m, 0.0, causal, 0.3, True), want, atol=1e-6)


def test_dropout_draws_as_torch_does() -> None:
    mha, x = nn.MultiheadAttention(16, 4, dropout=0.5, batch_first=True), torch.randn(2, 5, 16)
    torch.manual_seed(1)
    want = mha(x, x, x)[0]
    torch.manual_seed(1)
    assert torch.equal(teint8.quantize(mha, Policy())(dict(mha.named_parameters()), x, x, x)[0], want)


@pytest.mark.parametrize("policy", [Policy.qat(), Policy.training()], ids=["qat", "training"])
@pytest.mark.parametrize("shared", [False, True])
def test_attention_to_others_in_a_context_for_training(policy: Policy, shared: bool) -> None:
    """Of one weight that holds three projections q takes a part and k and v another: codes held of the whole are not theirs."""
    model, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 5, 16)
    key = torch.randn(2, 7, 16)
    args = (x, key, key if shared else torch.randn(2, 7, 16))
    qfn, params = teint8.quantize(model, policy), {k: v.detach() for k, v in model.named_parameters()}
    want = qfn(params, *args, need_weights=False)[0]
    with te_int8_autocast(policy=policy):
        for _ in range(2):
            y = model(*args, need_weights=False)[0]
            assert torch.equal(y, want)
    y.square().sum().backward()
    grads = torch.func.grad(lambda p: qfn(p, *args, need_weights=False)[0].square().sum())(params)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, grads[name], rtol=1e-4, atol=1e-4)
