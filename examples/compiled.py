"""The third way: torch.compile with the backend "teint8": python examples/compiled.py."""

import torch
from torch import nn

import teint8

torch.manual_seed(0)
model, x = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10)), torch.randn(128, 64)
receipt = teint8.Receipt()
compiled = torch.compile(model, backend="teint8", fullgraph=True, options={"receipt": receipt})

compiled(x).square().mean().backward()  # training: gradients flow to the float weights
with torch.no_grad():
    y = compiled(x)  # inference: weights are packed once, until they change
    eager = teint8.quantize(model)(dict(model.named_parameters()), x)
print(receipt)
print(f"largest difference to eager mode: {(y - eager).abs().max():.1e}")
