"""The schedule: functions of the step count alone, the same on every worker.

Only arithmetic and comparisons that Python numbers and traced tensors share, so one definition serves an eager and a
traced adapter. There is no other clock.
"""

from __future__ import annotations

from typing import NamedTuple

from hvd_slowmo.config import SlowMoConfig
from hvd_slowmo.core.parts.progress import Progress, Scalar


class StepPlan(NamedTuple):
    """The events of one step. Each flag is a bool, or a traced scalar bool.

    A step without any is only counted: an adapter may ask `any(plan)` and leave out all else.
    """

    average_gradients: Scalar  # before the inner step: average gradients, of the node or of all workers
    all_gradients: Scalar  # the average is over all workers
    outer: Scalar  # after the inner step: a block of tau steps is full, take the outer step
    begin: Scalar  # after the inner step: the warm-up is over, the first block (if there are any) begins
    mix: Scalar = False  # after the inner step, with gossip: mix with others
    check: Scalar = False  # after that: exchange the ledger, where no outer step makes the workers meet
    lands: Scalar = False  # after the inner step: the exchange of `delay` steps ago is applied, before `outer`
    fragment: Scalar = 0  # the fragment of the parameters that `outer` is about
    landing: Scalar = 0  # the fragment that lands

    @property
    def eventful(self) -> bool:
        """True if the step is more than counted; not in a trace."""
        return any(self[:-2])


CHECK_STEPS = 64
"""Period, in steps, at which workers that gossip without outer steps exchange the ledger."""


def step_plan(config: SlowMoConfig, step: Scalar) -> StepPlan:
    """Return the plan of step number `step` (0-based: the number of steps completed before it).

    Example:
        >>> [step_plan(SlowMoConfig(tau=2), step).outer for step in range(4)]
        [False, True, False, True]
    """
    plan = _without_gossip(config, step)
    if config.gossip is None:
        return plan
    after = step + 1 - config.warmup_steps
    mixes: Scalar = after > 0 if config.warmup_steps else True
    if config.tau is not None and config.average:
        # The average ends the block: mixing first would not change it.
        return plan._replace(mix=mixes & (after % config.tau != 0))
    if config.tau is not None:
        return plan._replace(mix=mixes)
    return plan._replace(mix=mixes, check=mixes & (after % CHECK_STEPS == 0))


def _without_gossip(config: SlowMoConfig, step: Scalar) -> StepPlan:
    after = step + 1 - config.warmup_steps  # completed steps of the blocks, once this one is done
    everyone: Scalar = config.gradients == "all"
    if config.warmup_steps and not everyone:
        everyone = step < config.warmup_steps
    average = True if config.gradients == "node" else everyone
    if config.tau is None:
        return StepPlan(average, everyone, False, after == 0 if config.warmup_steps else False)
    outer, fragment = _due(config, after)
    plan = StepPlan(average, everyone, outer, False, fragment=fragment)
    if config.warmup_steps:
        # At the end of the warm-up `after` is 0: the remainder is 0 there too, but no block is full yet.
        plan = plan._replace(outer=outer & (after > 0), begin=after == 0)
    if config.delay:
        started = after - config.delay
        lands, landing = _due(config, started)
        plan = plan._replace(lands=lands & (started > 0), landing=landing)
    return plan


def _due(config: SlowMoConfig, after: Scalar) -> tuple[Scalar, Scalar]:
    """Return whether a fragment meets after so many steps of the blocks, and its number where one does.

    Fragment f of F meets after steps ceil((f + 1) tau / F), modulo tau.
    """
    tau, fragments = config.tau, config.fragments
    assert tau is not None, "without blocks nothing meets"
    if fragments == 1:
        return after % tau == 0, 0
    place = (after - 1) % tau + 1  # 1 .. tau
    number = place * fragments // tau
    return number * tau > (place - 1) * fragments, number - 1


def next_fragment(config: SlowMoConfig, step: Scalar) -> Scalar:
    """Return the fragment that meets in `steps_to_meeting` steps."""
    if config.tau is None or config.fragments == 1:
        return 0
    return (step - config.warmup_steps) % config.tau * config.fragments // config.tau


def steps_to_meeting(config: SlowMoConfig, step: Scalar) -> Scalar:
    """Return the number of steps, >= 1, until the workers meet; 0 where they never do.

    Example:
        >>> [steps_to_meeting(SlowMoConfig(tau=4, fragments=2), step) for step in range(4)]
        [2, 1, 2, 1]

    Args:
        step: completed steps; the warm-up is over.
    """
    after = step - config.warmup_steps
    if config.tau is None:
        return 0 if config.gossip is None else CHECK_STEPS - after % CHECK_STEPS
    if config.fragments == 1:
        return config.tau - after % config.tau
    number = next_fragment(config, step) + 1
    return (number * config.tau + config.fragments - 1) // config.fragments - after % config.tau


def meetings_so_far(config: SlowMoConfig, step: int) -> tuple[int, ...]:
    """Return how often each fragment has begun to meet, and how often it has been applied; not in a trace.

    Args:
        step: completed steps.

    Example:
        >>> meetings_so_far(SlowMoConfig(tau=4, fragments=2, delay=1), 6)
        (2, 1, 1, 1)
    """
    if config.tau is None:
        return ()
    after, fragments = step - config.warmup_steps, config.fragments
    first = [-(-(fragment + 1) * config.tau // fragments) for fragment in range(fragments)]
    begun, applied = (
        [max(0, (now - start) // config.tau + 1) for start in first] for now in (after, after - config.delay)
    )
    return (*begun, *applied)


def workers_equal(config: SlowMoConfig, progress: Progress) -> bool:
    """Return whether all workers hold the same state; not in a trace."""
    if progress.step <= config.warmup_steps or config.gradients == "all":
        # Without the average a join makes the parameters equal, while each worker keeps an anchor and v of its own.
        return config.average or progress.step <= config.warmup_steps
    if config.bits < 32:  # each worker owes something else
        return False
    return config.average and not any(progress.since) and not any(progress.flight.launched)
