"""What happens at a step: functions of the step count alone, the same on every worker.

Only arithmetic and comparisons that Python numbers and traced tensors share, so that one definition serves an eager
and a traced adapter. There are no machine states but this clock.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from hvd_slowmo.config import SlowMoConfig


class Plan(NamedTuple):
    """What the step with a given number does. Each flag is a bool, or a traced scalar bool."""

    average_gradients: Any  # before the base step: the mean of gradients, of the node or of all workers
    all_gradients: Any  # it is the mean of all workers'
    outer: Any  # after the base step: a block of tau steps is full, take the outer step
    begin: Any  # after the base step: the warm-up is over, the first block (if there are any) begins
    mix: Any = False  # after the base step, over a gossip base: mix with others
    check: Any = False  # after that: the workers look after each other, where no outer step makes them meet


CHECK_STEPS = 64
"""Workers that gossip alone, without outer steps, look after each other (who is done, who is not finite) every so many
steps."""


def plan(config: SlowMoConfig, step: Any) -> Plan:
    """The plan of step number `step` (0-based: the number of steps completed before it)."""
    before = _plan(config, step)
    if config.base == "local":
        return before
    after = step + 1 - config.warmup_steps
    mixes: Any = after > 0 if config.warmup_steps else True
    if config.tau is not None and config.average:
        # The average ends the block: mixing first would not change it.
        return before._replace(mix=mixes & (after % config.tau != 0))
    if config.tau is not None:
        return before._replace(mix=mixes)
    return before._replace(mix=mixes, check=mixes & (after % CHECK_STEPS == 0))


def _plan(config: SlowMoConfig, step: Any) -> Plan:
    after = step + 1 - config.warmup_steps  # completed steps of the blocks, once this one is done
    everyone: Any = config.gradients == "all"
    if config.warmup_steps and not everyone:
        everyone = step < config.warmup_steps
    average = True if config.gradients == "node" else everyone
    if config.tau is None:
        return Plan(average, everyone, False, after == 0 if config.warmup_steps else False)
    outer = after % config.tau == 0
    if not config.warmup_steps:
        return Plan(average, everyone, outer, False)
    # At the end of the warm-up `after` is 0: the remainder is 0 there too, but no block is full yet.
    return Plan(average, everyone, outer & (after > 0), after == 0)


def steps_to_meeting(config: SlowMoConfig, step: Any) -> Any:
    """After `step` completed steps, the warm-up over: how many until the workers meet, >= 1; 0 where they never do."""
    after = step - config.warmup_steps
    if config.tau is None:
        return 0 if config.base == "local" else CHECK_STEPS - after % CHECK_STEPS
    return config.tau - after % config.tau


def workers_equal(config: SlowMoConfig, step: int, since: int) -> bool:
    """Whether all workers hold the same state after `step` completed steps, `since` of them after an average."""
    if step <= config.warmup_steps:
        return True
    # Without the average a join makes the parameters equal, while each worker keeps an anchor and v of its own.
    return config.average and (since == 0 or config.gradients == "all")
