"""An ordinary PyTorch training script. The lines that SlowMo adds end in `# SlowMo`.

Run it with: torchrun --nproc-per-node 2 examples/minimal_torch.py
Or over Horovod: hvd-slowmo run -np 2 python examples/minimal_torch.py
Or on a single worker: python examples/minimal_torch.py
"""

import torch
from torch import nn

import hvd_slowmo.torch as slowmo  # SlowMo

slowmo.init()  # SlowMo
torch.manual_seed(0)
points = torch.randn(5120, 2)
inside = (points.norm(dim=1, keepdim=True) < 1).float()  # to be learnt: does a point lie inside the circle?
train_points, train_inside = points[1024:], inside[1024:]
test_points, test_inside = points[:1024], inside[:1024]
train_points = train_points[slowmo.rank() :: slowmo.size()]  # SlowMo
train_inside = train_inside[slowmo.rank() :: slowmo.size()]  # SlowMo

model = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
optimizer = slowmo.SlowMo(optimizer, model, slowmo.SlowMoConfig(tau=12, beta=0.5))  # SlowMo

for _ in range(1200):
    batch = torch.randint(len(train_points), (32,))
    loss = nn.functional.binary_cross_entropy_with_logits(model(train_points[batch]), train_inside[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

optimizer.join()  # SlowMo
if slowmo.rank() == 0:  # SlowMo
    with torch.no_grad():
        accuracy = ((model(test_points) > 0) == (test_inside > 0)).float().mean().item()
    print(f"test accuracy {100 * accuracy:.1f} %")
