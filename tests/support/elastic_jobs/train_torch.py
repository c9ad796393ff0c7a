"""A worker of an elastic job: it trains, and one or another is killed. Each writes what it has seen to a file.

With HANGS in the environment that worker hangs instead.

usage: train_torch.py DIRECTORY STEPS VICTIM KILL_STEP [SETTING=VALUE ...]
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

import hvd_slowmo.torch as slowmo

directory, steps, victim, kill_step = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
settings = {name: json.loads(value) for name, value in (pair.split("=") for pair in sys.argv[5:])}
if "gossip" in settings:
    settings["gossip"] = {"SGP": slowmo.SGP(), "OSGP": slowmo.SGP(overlap=True)}[settings["gossip"]]
slowmo.init()
host = os.environ["HOROVOD_HOSTNAME"]
torch.manual_seed(slowmo.rank())
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 1))
inner = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
optimizer = slowmo.SlowMo(inner, model, slowmo.SlowMoConfig(**settings))
target = torch.sin(torch.arange(64.0))


@slowmo.elastic.run
def train(state):
    generator = torch.Generator().manual_seed(slowmo.rank())
    while state.batch < steps:
        if host == victim and state.batch == kill_step and not (directory / "killed").exists():
            (directory / "killed").touch()
            if "HANGS" in os.environ:
                time.sleep(600)
            os.kill(os.getpid(), signal.SIGKILL)
        if slowmo.rank() == 0 and state.batch >= kill_step and (directory / "hosts.next").exists():
            (directory / "hosts.next").rename(directory / "hosts")
        x = torch.randn(16, 64, generator=generator)
        state.optimizer.zero_grad()
        loss = (state.model(x).squeeze(1) - x @ target).square().mean()
        loss.backward()
        state.optimizer.step()
        state.batch += 1
        time.sleep(0.02)
        state.commit()
    state.optimizer.join()
    return loss.item()


state = slowmo.elastic.State(model, optimizer, batch=0)
loss = train(state)
seen = {
    "host": host,
    "rank": slowmo.rank(),
    "size": slowmo.size(),
    "steps": optimizer.steps,
    "loss": loss,
    "parameters": [p.detach().double().sum().item().hex() for p in model.parameters()],
    "changes": [change._asdict() for change in state.changes],
}
(directory / f"{host}.json").write_text(json.dumps(seen))
