"""Inner optimizers in the shapes of public ones that are more than their state."""

import threading

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


class ScheduleFree(Optimizer):
    """As schedulefree.SGDScheduleFree: counters and sums in the defaults; refuses a step before train()."""

    def __init__(self, params, lr=0.1, beta=0.9):
        defaults = {"lr": lr, "beta": beta, "k": 0, "weight_sum": 0.0, "lr_max": -1.0, "train_mode": False}
        super().__init__(params, defaults)

    def train(self):
        self._switch(True)

    def eval(self):
        self._switch(False)

    @torch.no_grad()
    def _switch(self, train):
        for group in self.param_groups:
            for p in group["params"] if group["train_mode"] != train else ():
                if "z" in self.state[p]:
                    p.lerp_(self.state[p]["z"], 1 - group["beta"] if train else 1 - 1 / group["beta"])
            group["train_mode"] = train

    @torch.no_grad()
    def step(self, closure=None):
        if not self.param_groups[0]["train_mode"]:
            raise RuntimeError("not in train mode")
        for group in self.param_groups:
            group["lr_max"] = max(group["lr"], group["lr_max"])
            weight = (group["k"] + 1) * group["lr_max"]
            group["weight_sum"] += weight
            for p in group["params"]:
                z = self.state[p].setdefault("z", p.clone())
                p.lerp_(z, weight / group["weight_sum"]).sub_(p.grad, alpha=group["lr"] * group["beta"])
                z.sub_(p.grad, alpha=group["lr"])
            group["k"] += 1


class DAdapt(Optimizer):
    """As the D-adaptation methods: an estimate that depends on the gradients, as a number and as a tensor."""

    def __init__(self, params, lr=1.0):
        super().__init__(params, {"lr": lr, "d": 1e-2})
        for group in self.param_groups:
            group["numerator"] = torch.zeros(1, dtype=torch.float64)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["numerator"] += sum(float(p.grad.square().sum()) for p in group["params"])
            group["d"] *= 1 + 0.1 * float(group["numerator"]) ** 0.5
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] * group["d"])


class Counting(Optimizer):
    """Counts its steps in an attribute, beside one that can't be copied."""

    def __init__(self, params, lr=0.1):
        self.count, self.lock = 0, threading.Lock()
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"] / self.count)


class History(Optimizer):
    """Keeps a list of tensors in the groups, which no checkpoint can hold."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "history": []})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["history"] = [*group["history"], [p.grad.clone() for p in group["params"]]]
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])


class NeverLoaded(torch.optim.SGD):
    """Can't load a state_dict."""

    def load_state_dict(self, state_dict):
        raise NotImplementedError("not here")
