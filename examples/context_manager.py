"""The first way: a context around code that exists. Nothing is edited: python examples/context_manager.py."""

import torch
from torch import nn

from transformer_engine_int8 import te_int8_autocast

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, dropout=0.0)
model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
data, target = torch.randn(32, 16, 64), torch.randint(0, 10, (32, 16))

for step in range(5):
    optimizer.zero_grad()
    with te_int8_autocast(training=True):  # INT8 forward, straight-through gradients
        loss = nn.functional.cross_entropy(model(data).transpose(1, 2), target)
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")

model.eval()
with torch.no_grad(), te_int8_autocast(training=False) as ctx:  # each weight is packed once and reused
    logits = model(data)
print(ctx.receipt)
