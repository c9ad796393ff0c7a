"""Inner optimizers in the shapes of public ones that are more than their state."""

import torch
from torch.optim import Optimizer


class Adaptive(Optimizer):
    """Counts its steps and adapts a factor in param_groups, and adds an entry there, as D-Adaptation does."""

    def __init__(self, params, lr=0.1, d=0.5):
        super().__init__(params, {"lr": lr, "d": d, "k": 0, "weight_sum": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            group["d"] = group["d"] * 1.25
            group["weight_sum"] += group["d"] ** 2
            group.setdefault("largest", 0.0)
            for p in group["params"]:
                if p.grad is not None:
                    group["largest"] = max(group["largest"], float(p.grad.abs().max()))
                    p.sub_(p.grad, alpha=group["lr"] * group["d"] / group["k"] * (1 + group["largest"]))


class Lion(Optimizer):
    """Keeps a function and a flag as attributes of its own."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "beta": 0.5})
        self.update, self.quick = torch.sign, True

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    average = self.state[p].setdefault("average", torch.zeros_like(p))
                    average.lerp_(p.grad, group["beta"])
                    p.sub_(self.update(average) if self.quick else average, alpha=group["lr"])


class OwnForm(torch.optim.SGD):
    """Has a state_dict of another form."""

    def state_dict(self):
        return {"inner": super().state_dict()}
