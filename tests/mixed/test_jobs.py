"""One job of PyTorch and Keras workers: equal to one framework's, to the reference, and to each other."""

from dataclasses import replace

import numpy as np
import pytest

from hvd_slowmo.comm.threads import ThreadWorld
from support.problems import ADAM, ALONE, LOCAL_SGD, NESTEROV, Problem, distance

pytestmark = [pytest.mark.workers, pytest.mark.slow]

TOLERANCE = 1e-9
ULPS = 8 * np.finfo(np.float64).eps  # relative to the largest value

OSGP = {"gossip": "sgp", "overlap": True}
CORE = {
    "local": Problem({"tau": 3, **LOCAL_SGD}, options=NESTEROV, steps=60),
    "slowmo": Problem({"tau": 3, "alpha": 0.9}, options=NESTEROV, steps=60),
    "sgp": Problem({"gossip": "sgp", **ALONE}, schedule="decay", steps=60),
    "sgp, slowmo": Problem({"gossip": "sgp", "tau": 4}, schedule="decay", steps=60),
    "osgp": Problem({**OSGP, **ALONE}, steps=60),
    "osgp, slowmo": Problem({**OSGP, "tau": 4, "inner_state": "reset"}, options=NESTEROV, steps=60),
}
OTHERS = {
    "adam, reset": Problem({"tau": 3, "inner_state": "reset"}, base="adam", options=ADAM, steps=30),
    "dpsgd": Problem({"gossip": "dpsgd", **ALONE}, schedule="steps"),
    "dpsgd, slowmo": Problem({"gossip": "dpsgd", "tau": 3}),
    "sgp, slowmo, noaverage": Problem({"gossip": "sgp", "average": False, "tau": 4}, schedule="decay"),
    "osgp, slowmo, noaverage": Problem({**OSGP, "average": False, "tau": 4}),
    "warm-up": Problem({"tau": 3, "warmup_steps": 4, "inner_state": "reset"}, options=NESTEROV),
    "osgp, warm-up": Problem({**OSGP, "warmup_steps": 3, **ALONE}),
    "ar_sgd": Problem({"tau": None, **LOCAL_SGD, "gradients": "all"}, schedule="decay"),
    "gradients averaged, Lookahead": Problem({"tau": 3, "gradients": "all", "alpha": 0.5, "beta": 0.0}),
    "bmuf": Problem({"tau": 3, "alpha": 0.9, "beta": 0.6, "scale_by_lr": False}, schedule="steps"),
    "diloco": Problem({"tau": 5, "alpha": 0.7, "beta": 0.9, "nesterov": True, "scale_by_lr": False}),
}


STREAMED = {
    "fragments": Problem({"tau": 4, "fragments": 3}, options=NESTEROV),
    "streaming": Problem({"tau": 4, "fragments": 4, "delay": 1}, options=NESTEROV),
    "one step late": Problem({"tau": 3, "delay": 1, "warmup_steps": 2}),
}

FEW = ("slowmo", "osgp, slowmo")


def check(mixed_workers, kinds, problems):
    for name, problem in problems.items():
        histories = mixed_workers(kinds).run("support.trainings.mixed:run", problem=problem, chunk_bytes=40)
        assert distance(histories, problem) < TOLERANCE, name
        if "gossip" not in problem.config:
            for step in (s.step for s in problem.reference(len(kinds)) if s.outer):
                assert apart(histories, step) < ULPS, (name, step)


def apart(histories, step):
    """Return the largest distance between workers, relative to the largest value."""
    x = np.stack([history[step]["x"] for history in histories])
    return np.abs(x - x[0]).max() / np.abs(x).max()


@pytest.mark.parametrize(
    "kinds", ["tk", *(pytest.param(kinds, marks=pytest.mark.thorough) for kinds in ("ttkk", "ktk"))]
)
def test_equal_to_the_reference(mixed_workers, kinds):
    """And so to one framework's run, which is equal to the reference too (test_torch_reference, test_keras_...)."""
    check(mixed_workers, kinds, {name: CORE[name] for name in FEW})


@pytest.mark.thorough
def test_streamed_outer_steps_equal_the_reference(mixed_workers):
    for name, problem in STREAMED.items():
        histories = mixed_workers("tk").run("support.trainings.mixed:run", problem=problem, chunk_bytes=40)
        assert distance(histories, problem, 40) < TOLERANCE, name


@pytest.mark.thorough
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"fragments": 4, "delay": 2, "bits": 4},
        {"bits": 32, "shard": True, "delay": 1},
        {"shard": True, "fragments": 4, "delay": 1},
    ],
    ids=str,
)
def test_outer_steps_in_slices_equal_one_frameworks(mixed_workers, horovod_workers, settings):
    """The workers decode the same bytes; each framework rounds its own outer update."""
    mixed = mixed_workers("tk").run("support.jobs.mixed:few_bits", settings=settings)
    alone = horovod_workers(2).run("support.jobs.mixed:few_bits", settings=settings)
    for mine, other in zip(mixed, alone, strict=True):
        assert np.array_equal(mine, mixed[0])
        np.testing.assert_allclose(mine, other, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(("kinds", "problems"), [("tk", CORE | OTHERS), ("ttkk", CORE), ("ktk", CORE)])
def test_more_settings_equal_the_reference(mixed_workers, kinds, problems):
    check(mixed_workers, kinds, problems)


def test_equal_to_one_frameworks_run(mixed_workers):
    from support.trainings.pytorch import run

    problem = CORE["slowmo"]
    alone = ThreadWorld(2).run(lambda comm: run(problem, comm))
    mixed = mixed_workers("tk").run("support.trainings.mixed:run", problem=problem)
    for mine, other in zip(mixed, alone, strict=True):
        assert max(np.abs(a["x"] - b["x"]).max() for a, b in zip(mine, other, strict=True)) < TOLERANCE


@pytest.mark.thorough
def test_no_further_apart_after_a_thousand_blocks(mixed_workers):
    problem = Problem({"tau": 2, "alpha": 0.9}, options={"momentum": 0.5}, steps=2000)
    histories = mixed_workers("tk").run("support.trainings.mixed:run", problem=problem, limit=300)
    found = [apart(histories, step) for step in range(2, problem.steps + 1, 2)]
    assert max(found) < ULPS
    assert np.median(found[-100:]) <= 2 * np.median(found[:100])
    assert distance(histories, problem) < TOLERANCE


@pytest.mark.parametrize("kinds", ["tk", pytest.param("ktk", marks=pytest.mark.thorough)])
def test_frozen_layers_are_handed_out_bitwise(mixed_workers, kinds):
    first, *others = mixed_workers(kinds).run("support.jobs.mixed:handed_out")
    assert "0.conv.weight" in first
    for other in others:
        assert {key: x.tobytes() for key, x in other.items()} == {key: x.tobytes() for key, x in first.items()}


@pytest.mark.thorough  # in one process: test_membership.py
@pytest.mark.parametrize("name", ["warm-up", "ar_sgd"])
def test_gradients_averaged(mixed_workers, name):
    check(mixed_workers, "tk", {name: OTHERS[name]})


@pytest.mark.thorough
def test_parameter_groups_of_pytorch_alone(mixed_workers):
    """Two groups in another order than the wire's; Keras has one."""
    problem = Problem({"tau": 3, "warmup_steps": 2}, options=NESTEROV, steps=20)
    histories = mixed_workers("tk").run("support.trainings.mixed:run", problem=problem, split=True)
    assert distance(histories, problem) < TOLERANCE


@pytest.mark.parametrize(
    "config",
    [
        {"tau": 3},
        {"tau": 3, "warmup_steps": 4},
        {"tau": None, **LOCAL_SGD, "gradients": "all"},
        {"tau": 4, **OSGP},
        {"tau": 3, "gossip": "sgp", "average": False},
    ],
)
@pytest.mark.sample("config2")
def test_join_with_uneven_data(mixed_workers, config):
    """Equal to threads of PyTorch alone, which are equal to the reference (test_torch_join)."""
    from support.trainings.pytorch import epochs

    problem, plan = Problem(config), [(5, 2), (1, 7), (0, 3), (6, 6)]
    mixed = mixed_workers("tk").run("support.trainings.mixed:epochs", problem=problem, plan=plan)
    alone = ThreadWorld(2).run(lambda comm: epochs(problem, plan, comm))
    for mine, other in zip(mixed, alone, strict=True):
        for a, b in zip(mine, other, strict=True):
            assert (a["step"], a["behind"]) == (b["step"], b["behind"])
            assert np.abs(a["x"] - b["x"]).max() < TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        "slowmo",
        *(pytest.param(name, marks=pytest.mark.thorough) for name in ("osgp, slowmo", "streaming", "warm-up")),
    ],
)
def test_resume_from_a_checkpoint(mixed_workers, name, tmp_path):
    """In the middle of a block, or of a flight: to the bit, on the workers that it comes from."""
    problem = replace({**CORE, **OTHERS, **STREAMED}[name], steps=12)
    asked = {"problem": problem, "path": tmp_path / "x", "stop": 5, "split": name == "slowmo"}
    for whole, again in mixed_workers("tk").run("support.trainings.mixed:resumed", **asked):
        for a, b in zip(whole, again, strict=True):
            assert np.array_equal(a["x"], b["x"])


@pytest.mark.parametrize("settings", [{"tau": None, **OSGP}, {"tau": 3, "fragments": 3, "delay": 1}], ids=str)
@pytest.mark.thorough
def test_a_load_while_messages_are_on_their_way_is_refused_on_all(mixed_workers, settings, tmp_path):
    problem = Problem(settings)
    for said, back in mixed_workers("tk").run(
        "support.trainings.mixed:rolled_back", problem=problem, path=tmp_path / "x"
    ):
        assert "call join() on every worker before load()" in said
        assert back


@pytest.mark.thorough
def test_a_restart_while_a_fragment_is_in_flight(mixed_workers):
    """PyTorch has sent it already, and Keras has not."""
    problem = Problem({"tau": 3, "fragments": 3, "delay": 1})
    (first, end), (other, other_end) = mixed_workers("tk").run("support.trainings.mixed:restarted", problem=problem)
    assert np.array_equal(first, other)
    assert np.abs(end - other_end).max() < TOLERANCE


def test_averaged_parameters(mixed_workers):
    results = mixed_workers("tk").run("support.trainings.mixed:averaged", problem=Problem({"tau": 9}))
    mean = np.mean([own for own, _, _ in results], axis=0)
    for own, inside, after in results:
        assert np.array_equal(own, after)
        np.testing.assert_allclose(inside, mean, rtol=0, atol=1e-15)


@pytest.mark.thorough
@pytest.mark.parametrize(
    "config",
    [
        {"tau": 3, "warmup_steps": 2},
        {"tau": None, "alpha": 1.0, "beta": 0.0, "gradients": "all"},
    ],
)
def test_batch_norm_and_a_flattened_feature_map(mixed_workers, config):
    """Real layers, real gradients: all that is on the wire is alike on both sides after each join."""
    first, second = mixed_workers("tk").run("support.jobs.mixed:trained", config=config, lengths=[5, 3])
    assert "1.batch_norm.variance" in first[0]
    for mine, other in zip(first, second, strict=True):
        assert mine.keys() == other.keys()
        for name in mine:
            np.testing.assert_allclose(mine[name], other[name], rtol=1e-12, atol=1e-14, err_msg=name)
    assert any(np.abs(first[0][name] - first[1][name]).max() > 1e-3 for name in first[0])


def test_fit_beside_a_loop_of_pytorchs(mixed_workers):
    (mine, behind), (other, losses) = mixed_workers("tk").run("support.jobs.mixed:with_fit", epochs=3)
    for name in mine:
        np.testing.assert_allclose(mine[name], other[name], rtol=1e-12, atol=1e-14, err_msg=name)
    assert behind == [2, 2, 2]
    assert losses[-1] < losses[0]


EXPECTED = {
    "config": "rank 1 differs from rank 0: config: tau: it has 4 where 3 is expected",
    "layers": "rank 1 differs from rank 0: parameters, entry 2: it has 1.linear.weight parameter [4, 12] float64  "
    "where 1.batch_norm.weight parameter [3] float64 eps 1e-05 is expected",
    "units": "parameters, entry 6: it has 2.linear.weight parameter [5, 12] float64  where "
    "2.linear.weight parameter [4, 12]",
    "precision": "it has 0.conv.weight parameter [3, 1, 3, 3] float32  where "
    "0.conv.weight parameter [3, 1, 3, 3] float64  is",
    "eps": "it has 1.batch_norm.weight parameter [3] float64 eps 0.001 where "
    "1.batch_norm.weight parameter [3] float64 eps 1e-05",
    "no maps": "framework, of workers without a parameter_map: it has 'Keras' where 'PyTorch' is expected",
    "unknown": "torch.nn.modules.activation.PReLU is not a layer whose Keras form is known",
    "no map": "rank 1 differs from rank 0: parameter_map: it has None where",
    "another map": "rank 1 differs from rank 0: parameter_map: orient: it has",
    "average": "inner_state='average' needs to be one, since it averages the inner optimizers' state: it has 'Keras'",
    "argument": "`parameter_map` must be a ParameterMap. Received: str",
    "not finite": "parameters, BatchNorm statistics or averaged inner state are not finite (NaN or infinity) on rank 1 "
    "after step 3",
}


@pytest.mark.thorough  # of each framework alone: tests/pytorch and tests/keras, test_workers.py
def test_misuse_raises_on_every_rank(mixed_workers):
    for kind, words in EXPECTED.items():
        if kind == "argument":  # Keras' constructor communicates with nobody: see the documentation
            continue
        for said in mixed_workers("tk").run("support.jobs.mixed:misuse", kind=kind, odd=1):
            assert words in said, kind


@pytest.mark.thorough
def test_misuse_in_pytorch_raises_on_every_rank(mixed_workers):
    for kind in ("argument", "no map", "layers"):
        results = mixed_workers("kt").run("support.jobs.mixed:misuse", kind=kind, odd=1)
        assert all(said.startswith(("TypeError", "ValueError")) for said in results), results
