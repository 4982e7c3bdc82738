"""Tables of embeddings in INT8: values of rows, gradients of the float table, bags of every mode, tied weights."""

import pytest
import torch
import torch.nn.functional as F
from contract import different
from grid import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import teint8
import teint8.compile
from teint8 import Policy, QTensor, Quant, Rule, numerics, ops

TABLES = Policy([Rule(ops=("linear", "embedding"))])


def _hat(w: Tensor) -> Tensor:
    plain = w.detach()
    return w + (numerics.dequantize(*numerics.quantize(plain), plain.dtype) - plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("how", [{}, {"padding_idx": 3}, {"sparse": True}, {"scale_grad_by_freq": True}])
def test_rows_and_gradients_are_those_of_the_formula(how: dict, dtype: torch.dtype, device: str) -> None:
    w = torch.randn(11, 16, dtype=torch.float64).to(dtype).to(device).requires_grad_()
    ids = torch.randint(0, 11, (3, 5), device=device)
    y, want = ops.embedding(ids, w, **how), F.embedding(ids, _hat(w))
    assert different(y, want) == 0
    assert different(ops.embedding(ids, QTensor.quantize(w.detach())), want) == 0
    g = torch.randn_like(want)
    (got,), (expected,) = torch.autograd.grad(y, w, g), torch.autograd.grad(F.embedding(ids, w, **how), w, g)
    assert torch.equal(got.to_dense(), expected.to_dense())


@settings(max_examples=150, deadline=None)
@given(
    mode=st.sampled_from(("sum", "mean", "max")),
    flat=st.booleans(),
    padding=st.sampled_from((None, 2, -1)),
    weighted=st.booleans(),
    last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_bags(mode: str, flat: bool, padding: int | None, weighted: bool, last: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(9, 12, generator=g, dtype=torch.float64).requires_grad_()
    ids = torch.randint(0, 9, (12,) if flat else (3, 4), generator=g)
    offsets = torch.tensor([0, 5, 5, 12] if last else [0, 5, 5]) if flat else None
    how = {"mode": mode, "padding_idx": padding, "include_last_offset": flat and last}
    if weighted and mode == "sum":
        how["per_sample_weights"] = torch.rand(ids.shape, generator=g, dtype=torch.float64)
    got, want = ops.embedding_bag(ids, w, offsets, **how), F.embedding_bag(ids, _hat(w), offsets, **how)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ops.embedding_bag(ids, QTensor.quantize(w.detach()), offsets, **how), want, rtol=1e-12, atol=1e-12)
    d = torch.randn(got.shape, generator=g, dtype=torch.float64)
    torch.testing.assert_close(torch.autograd.grad(got, w, d)[0], torch.autograd.grad(want, w, d)[0], rtol=1e-12, atol=1e-12)


class Tied(nn.Module):
    """A table that is looked up, and multiplied by."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.bag = nn.Embedding(50, 16, padding_idx=0), nn.EmbeddingBag(20, 16, mode="mean", padding_idx=3)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: Tensor, others: Tensor) -> Tensor:
        return self.head(torch.tanh(self.table(ids) + self.bag(others)[:, None]))


def _tied(device: str) -> tuple:
    torch.manual_seed(0)
    model = Tied().to(device)
    return (
        model,
        dict(model.named_parameters()),
        torch.randint(0, 50, (3, 7), device=device),
        torch.randint(0, 20, (3, 4), device=device),
    )


def test_tables_are_float_unless_a_rule_names_them(device: str) -> None:
    model, params, ids, others = _tied(device)
    receipt = teint8.explain(teint8.quantize(model), params, ids, others)
    assert [r.op for r in receipt] == ["linear"]
    with pytest.raises(ValueError, match="no weight of"):  # a table that is looked up in float stays float
        teint8.pack(teint8.quantize(model), params, ids, others)
    receipt = teint8.explain(teint8.quantize(model, TABLES), params, ids, others)
    assert [(r.path, r.op, r.implementation, r.mode) for r in receipt][:2] == [
        ("table.weight", "embedding", "dequantized", "W8A16"),
        ("bag.weight", "embedding", "dequantized", "W8A16"),
    ]


def test_packed_tables_have_the_bits_of_float_ones_and_a_quarter_of_the_bytes(device: str) -> None:
    model, params, ids, others = _tied(device)
    qfn = teint8.quantize(model, TABLES)
    want = qfn(params, ids, others)
    for arguments in ((), (ids, others)):
        packed = teint8.pack(qfn, params, *arguments)
        assert isinstance(packed["table.weight"], QTensor) and isinstance(packed["bag.weight"], QTensor)
        assert packed["table.weight"].nbytes == 50 * 16 + 50 * 4
        assert different(qfn(packed, ids, others), want) == 0
    only = teint8.quantize(model, Policy([Rule(ops=("embedding",), compute="simulate")]))
    assert different(only(teint8.pack(only, params), ids, others), only(params, ids, others)) == 0
    with torch.no_grad(), teint8.te_int8_autocast(training=False, policy=TABLES):
        assert [different(model(ids, others), want) for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("way", ["inductor", "backend"])
def test_compiled(way: str, device: str) -> None:
    model, params, ids, others = _tied(device)
    qfn = teint8.quantize(model, TABLES)
    want = qfn(params, ids, others)
    expected = torch.autograd.grad(want.square().mean(), list(params.values()))
    torch._dynamo.reset()
    if way == "inductor":
        y = torch.compile(qfn, fullgraph=True)(params, ids, others)
        packed = teint8.pack(qfn, params)
        assert relative_error(torch.compile(qfn, fullgraph=True)(packed, ids, others), want) < 1e-5
    else:
        y = torch.compile(model, backend=teint8.compile.backend, fullgraph=True, options={"policy": TABLES})(ids, others)
    assert relative_error(y, want) < 1e-5
    got = torch.autograd.grad(y.square().mean(), list(params.values()))
    assert relative_error(list(got), list(expected)) < 1e-5


def test_transforms(device: str) -> None:
    model, params, ids, others = _tied(device)
    qfn = teint8.quantize(model, TABLES)
    params = {k: v.detach() for k, v in params.items()}
    loss = lambda p, i, o: qfn(p, i[None], o[None]).square().mean()
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, ids, others)
    for n in range(3):
        alone = torch.func.grad(loss)(params, ids[n], others[n])
        assert relative_error({k: v[n] for k, v in each.items()}, alone) < 1e-5
    # torch has no forward derivative of a bag, in float either
    looked_up = teint8.quantize(lambda p, i: (F.embedding(i, p["table"]) @ p["w"].t()).square().mean(), TABLES)
    params = {"table": torch.randn(50, 16, device=device), "w": torch.randn(5, 16, device=device)}
    tangents = {k: v.cos() for k, v in params.items()}
    _, forward = torch.func.jvp(lambda p: looked_up(p, ids), (params,), (tangents,))
    backward = sum((g * tangents[k]).sum() for k, g in torch.func.grad(looked_up)(params, ids).items())
    torch.testing.assert_close(forward, backward, rtol=1e-4, atol=1e-5)


def test_reasons_strict_and_bad_input() -> None:
    ids = torch.tensor([1, 2])
    norm = nn.Embedding(5, 4, max_norm=1.0)
    qfn = lambda policy, strict=False: teint8.quantize(norm, policy, strict=strict)
    params = dict(norm.named_parameters())
    with torch.no_grad():
        (record,) = teint8.explain(qfn(TABLES), params, ids)
        assert "max_norm" in record.reason and record.implementation == "float"
        with pytest.raises(ValueError, match=r"strict: weight \(embedding\) cannot run in INT8: max_norm"):
            qfn(TABLES, True)(params, ids)
        whole = Policy([Rule(ops=("embedding",), weight=Quant(granularity="tensor"))])
        plain = nn.Embedding(5, 4)
        (record,) = teint8.explain(teint8.quantize(plain, whole), dict(plain.named_parameters()), ids)
        assert "a row of a table" in record.reason
    packed = QTensor.quantize(torch.randn(5, 4))
    for table in (torch.randn(5, 4), packed):
        for dtype in (torch.float32, torch.uint8, torch.bool):
            with pytest.raises(TypeError, match=f"ids are {dtype}"):
                ops.embedding(ids.to(dtype), table)
        with pytest.raises(IndexError):
            ops.embedding(ids - 2, table)
        with pytest.raises(ValueError, match="padding_idx is 99"):
            ops.embedding_bag(ids[None], table, padding_idx=99)
    with pytest.raises(ValueError, match="packed along -2"):
        ops.embedding(ids, QTensor.quantize(torch.randn(5, 4), axis=-2))
