"""Models of transformers with random weights, compiled by the backend: one graph, in INT8, the values of eager mode."""

import warnings
from typing import Any

import pytest
import torch
from test_compile import BACKEND

import teint8

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
WORDS = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def _ids(batch: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 100, (batch, length))


def _llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, **WORDS, num_key_value_heads=2))


def _whisper() -> Any:
    config = transformers.WhisperConfig(d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, num_mel_bins=8,
                                        max_source_positions=20, **WORDS, decoder_start_token_id=1)  # fmt: skip
    return transformers.models.whisper.modeling_whisper.WhisperEncoder(config)


def _mixtral() -> Any:
    config = transformers.MixtralConfig(**SIZES, **WORDS, num_key_value_heads=2, num_local_experts=4)
    return transformers.MixtralForCausalLM(config)


def _t5() -> Any:
    config = transformers.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return transformers.T5ForConditionalGeneration(config)


def _vit() -> Any:
    return transformers.ViTModel(transformers.ViTConfig(**SIZES, image_size=32, patch_size=8))


def _gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=32, n_layer=2, n_head=4, **WORDS))


# a model, its inputs, and how many projections and convolutions it has (of Mixtral the experts of a layer are two grouped matmuls)
MODELS = {
    "llama": (_llama, lambda: {"input_ids": _ids(), "use_cache": False}, 15),
    "bert": (lambda: transformers.BertModel(transformers.BertConfig(**SIZES, **WORDS)), lambda: {"input_ids": _ids()}, 13),
    "gpt2": (_gpt2, lambda: {"input_ids": _ids(), "use_cache": False}, 9),
    "vit": (_vit, lambda: {"pixel_values": torch.randn(2, 3, 32, 32)}, 14),
    "t5": (_t5, lambda: {"input_ids": _ids(), "decoder_input_ids": _ids(), "use_cache": False}, 33),
    "mixtral": (_mixtral, lambda: {"input_ids": _ids(), "use_cache": False}, 15),
    "whisper": (_whisper, lambda: {"input_features": torch.randn(2, 8, 40)}, 14),
}


@pytest.fixture(autouse=True)
def _anew():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _value(output: Any) -> torch.Tensor:
    value: torch.Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return value


@pytest.mark.parametrize("name", MODELS)
def test_one_graph_in_int8_with_the_values_of_eager_mode(name: str, device: str) -> None:
    make, inputs_of, projections = MODELS[name]
    model = make().eval().to(device)
    inputs = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs_of().items()}
    receipt = teint8.Receipt()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend=BACKEND, fullgraph=True, options={"receipt": receipt})
    with torch.no_grad():
        got = _value(compiled(**inputs))
        with teint8.te_int8_autocast(training=False) as context:
            want = _value(model(**inputs))
        exact = _value(model(**inputs))
    assert receipt.int8_calls == context.receipt.int8_calls == projections
    # some versions write rotary positions as a matmul, which has no weight
    assert {r.op for r in receipt if not r.int8} <= {"activation_matmul"}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    # float ops between the matmuls may differ in the last bit, which moves a code now and then
    assert (got - want).norm() < 3e-3 * want.norm()
    assert 0 < (want - exact).norm() < 0.1 * exact.norm()


def test_generation_with_a_static_cache(device: str) -> None:
    model, ids = _llama().eval().to(device), _ids().to(device)
    how = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    with torch.no_grad(), teint8.te_int8_autocast(training=False):
        want = model.generate(ids, **how)
    receipt = teint8.Receipt()
    # on a GPU torch 2.11 crashes in its CUDA graphs here, with the floats of torch.compile(mode="reduce-overhead") too
    graphs = device == "cpu" or not torch.__version__.startswith("2.11.")
    options = {"receipt": receipt, "mode": "reduce-overhead" if graphs else "default"}
    model.forward = torch.compile(model.forward, backend=BACKEND, fullgraph=True, options=options)
    with torch.no_grad():
        got = model.generate(ids, **how)
    assert torch.equal(got, want)
    assert receipt.int8_calls == 30  # 15 projections in each of two graphs: the prompt's and the next tokens'
    assert "model.layers.1.self_attn.v_proj.weight" in {r.path for r in receipt}
