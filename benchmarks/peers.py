"""torchao's modules, compiled, where it is installed: the peers of the benchmarks. Each is made of a copy of a float model."""

import copy
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _compiled(model: nn.Module, convert: Callable[[nn.Module], Any]) -> nn.Module:
    peer = copy.deepcopy(model)
    peer = convert(peer) or peer
    made: nn.Module = torch.compile(peer)
    return made


def inference(model: nn.Module, *, weights: bool = False) -> dict[str, nn.Module]:
    """W8A8 with dynamic scales by row, and FP8 the same; with ``weights`` INT8 weights alone, too."""
    if importlib.util.find_spec("torchao") is None:
        return {}
    warnings.filterwarnings("ignore")
    from torchao import quantization as q

    configs: dict[str, Any] = {
        "torchao w8a8": q.Int8DynamicActivationInt8WeightConfig(),
        "torchao fp8": q.Float8DynamicActivationFloat8WeightConfig(granularity=q.PerTensor()),
    }
    if weights:
        configs["torchao int8 weights"] = q.Int8WeightOnlyConfig()
    return {name: _compiled(model, lambda m, config=config: q.quantize_(m, config)) for name, config in configs.items()}


def training(model: nn.Module, *names: str) -> dict[str, nn.Module]:
    """All matmuls in INT8, in FP8 by tensor or by row, and fake-quantized QAT; of these the named ones, if any are named."""
    if importlib.util.find_spec("torchao") is None:
        return {}
    warnings.filterwarnings("ignore")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.prototype.quantized_training import Int8MixedPrecisionTrainingConfig
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    fake = QATConfig(
        activation_config=IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False),
        weight_config=IntxFakeQuantizeConfig(torch.int8, "per_channel"),
        step="prepare",
    )
    converts: dict[str, Callable[[nn.Module], Any]] = {
        # without module_swap 0.18 leaves every matmul in bf16
        "torchao int8": lambda m: quantize_(m, Int8MixedPrecisionTrainingConfig(module_swap=True)),
        "torchao qat": lambda m: quantize_(m, fake),
    }
    for recipe in ("tensorwise", "rowwise"):
        config = Float8LinearConfig.from_recipe_name(recipe)
        converts[f"torchao fp8 {recipe}"] = lambda m, config=config: convert_to_float8_training(m, config=config)
    return {name: _compiled(model, convert) for name, convert in converts.items() if not names or name in names}


def usable(runs: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    """Those of the runs that do not raise; why others do is printed."""
    kept = {}
    for name, run in runs.items():
        try:
            run()
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{name} cannot run this: {str(error).strip().splitlines()[0][:150]}", flush=True)
        else:
            kept[name] = run
    return kept


def pt2e(model: nn.Module, x: torch.Tensor, call: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> dict[str, Callable[[], Any]]:
    """W8A8 with dynamic scales by PT2E and Inductor's freezing on a CPU: ``call`` runs the model on x."""
    if importlib.util.find_spec("torchao") is None:
        return {}
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return call(self.model, x)

    quantizer = x86.X86InductorQuantizer()
    # torchao 0.18 stops at the GELU of transformers when it looks for what to fuse into a linear: nothing is fused
    quantizer._annotate_linear_unary = lambda *args, **kwargs: None
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=True))
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(Whole(), (x,)).module(), quantizer)
        prepared(x)
        compiled = torch.compile(convert_pt2e(prepared))
        with torch._inductor.config.patch(freezing=True):
            compiled(x)
    return {"torchao pt2e": lambda: compiled(x)}
