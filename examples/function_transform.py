"""The second way: a quantized function of the parameters: python examples/function_transform.py."""

import torch
from torch import nn
from torch.func import grad_and_value

import teint8

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 10))
x, target = torch.randn(128, 64), torch.randint(0, 10, (128,))

qfn = teint8.quantize(model)
params = {name: p.detach() for name, p in model.named_parameters()}
step = grad_and_value(lambda p: nn.functional.cross_entropy(qfn(p, x), target))
for i in range(5):
    grads, loss = step(params)
    params = {name: p - 0.5 * grads[name] for name, p in params.items()}
    print(f"step {i}: loss {loss.item():.3f}")

packed = teint8.pack(qfn, params)  # INT8 codes and scales, a quarter of the bytes
assert torch.equal(qfn(packed, x), qfn(params, x))  # train = serve
print(teint8.explain(qfn, packed, x))
