"""The real sources on simulated engines and a simulated clock."""

from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlscale.config import AsynchronousConfig, OneStepOffConfig, SynchronousConfig
from rlscale.plan.lengths import LogNormalLengths
from rlscale.simulated_engine import Draft, Engine, Group, SimulatedEngines
from rlscale.simulation import SimulatedClock, SimulatedLearner, SimulationReport, simulate
from rlscale.types import GroupRequest, Sampling

PROMPTS, SAMPLES = 16, 8
ENGINES = SimulatedEngines(workers=2, max_num_seqs=64, step_s=0.01, completion_s=2e-4, prefill_token_s=1e-5)
HEAVY_TAIL = LogNormalLengths(median=200, sigma=1.0, budget=4096, seed=1)


def learner(capacity: float, engines: SimulatedEngines = ENGINES) -> SimulatedLearner:
    """One that full engines would outpace by the factor `capacity`."""
    batch_tokens = PROMPTS * SAMPLES * HEAVY_TAIL.mean()
    step_s = capacity * batch_tokens / engines.tokens_per_s
    return SimulatedLearner(step_s=0.0, token_s=step_s / batch_tokens, sync_s=0.01 * step_s)


def run(mode, capacity: float = 1.3, steps: int = 60) -> SimulationReport:
    return simulate(
        mode,
        ENGINES,
        learner(capacity),
        HEAVY_TAIL,
        prompts_per_step=PROMPTS,
        samples_per_prompt=SAMPLES,
        steps=steps,
    )


def test_the_asynchronous_mode_keeps_the_learner_busy_where_the_synchronous_one_does_not():
    asynchronous, synchronous, ahead = (
        run(mode) for mode in (AsynchronousConfig(), SynchronousConfig(), OneStepOffConfig())
    )
    assert asynchronous.learner_idle_fraction < 0.05
    assert asynchronous.stale_fraction < 0.02
    assert asynchronous.staleness_max <= 8
    assert synchronous.learner_idle_fraction > 0.5
    assert synchronous.staleness_max == 0
    assert 0.5 < ahead.learner_idle_fraction < synchronous.learner_idle_fraction
    assert ahead.staleness_max == 1


def test_engines_that_are_too_slow_are_never_idle_and_the_learner_waits_for_them():
    report = run(AsynchronousConfig(), capacity=0.5)
    assert report.rollout_occupancy > 0.95
    assert report.learner_idle_fraction > 0.45


def test_a_simulation_is_the_same_every_time():
    assert run(AsynchronousConfig(), steps=12) == run(AsynchronousConfig(), steps=12)


def test_phases_and_shares_of_a_step_add_up():
    for mode in (AsynchronousConfig(), OneStepOffConfig(), SynchronousConfig()):
        for step in run(mode, steps=12).steps:
            phases = step["batch_wait_s"] + step["learner_s"] + step["sync_stall_s"]
            assert phases == pytest.approx(step["step_s"])
            assert step["learner_idle_fraction"] == pytest.approx(1 - step["learner_s"] / step["step_s"])
            assert -1e-9 <= step["rollout_idle_fraction"] <= 1
            assert 0 <= step["rollout_occupancy"] <= 1 + 1e-9


def test_drawing_a_batch_alone_takes_as_long_as_its_longest_completion():
    engines = SimulatedEngines(workers=1, max_num_seqs=4, step_s=0.5, completion_s=0.25, prefill_token_s=0.0)
    lengths = [[3, 10], [1, 1]]
    report = simulate(
        SynchronousConfig(),
        engines,
        SimulatedLearner(step_s=2.0, token_s=1.0, sync_s=3.0),
        lambda place, sample: lengths[place % 2][sample],
        prompts_per_step=2,
        samples_per_prompt=2,
        steps=3,
        skip=1,
    )
    # One token of four, two tokens of two, seven of one completion.
    drawing = (0.5 + 4 * 0.25) + 2 * (0.5 + 2 * 0.25) + 7 * (0.5 + 0.25)
    for step in report.steps:
        assert step["batch_wait_s"] == pytest.approx(drawing)
        assert step["learner_s"] == pytest.approx(2 + 15)
        assert step["sync_stall_s"] == pytest.approx(3)
        assert step["rollout_occupancy"] == pytest.approx(
            (4 * 1.5 + 2 * 2 * 1.0 + 7 * 0.75) / (4 * step["step_s"])
        )
    assert report.tokens == 2 * 15


def test_a_pass_apart_reads_each_prompt_once_and_draws_the_first_tokens():
    apart, together = (
        simulate(
            SynchronousConfig(),
            SimulatedEngines(
                1,
                8,
                step_s=0.5,
                completion_s=0.25,
                prefill_token_s=0.01,
                prompt_tokens=3,
                prefill_s=2.0,
                prefill_sequence_s=0.1,
                reads_apart=reads_apart,
            ),
            SimulatedLearner(1.0, 0.0, 0.0),
            lambda *_: 5,
            prompts_per_step=2,
            samples_per_prompt=2,
            steps=2,
            skip=1,
        ).steps[0]["batch_wait_s"]
        for reads_apart in (True, False)
    )
    assert apart == pytest.approx(2 + 2 * (0.1 + 0.03) + 4 * (0.5 + 4 * 0.25))
    assert together == pytest.approx(2 + 4 * (0.1 + 0.03) + 5 * (0.5 + 4 * 0.25))


def test_a_batch_is_handed_over_before_it_is_trained_on_unless_groups_come_back_singly():
    waits = {}
    for mode in (SynchronousConfig(), OneStepOffConfig(), AsynchronousConfig()):
        engines = SimulatedEngines(1, 64, 0.01, 0.0, 0.0, batch_s=3.0, batch_completion_s=0.5)
        report = simulate(
            mode,
            engines,
            SimulatedLearner(20.0, 0.0, 0.0),
            lambda *_: 10,
            prompts_per_step=2,
            samples_per_prompt=2,
            steps=8,
        )
        waits[mode.kind] = fmean(step["step_s"] for step in report.steps) - 20
    assert waits["synchronous"] == pytest.approx(0.1 + 3 + 4 * 0.5)
    assert waits["one_step_off"] == pytest.approx(3 + 4 * 0.5)
    assert waits["asynchronous"] == pytest.approx(0, abs=0.02)


class OneEngine:
    """A pool of one, with groups of one completion each; `handed_on` has their keys and when."""

    def __init__(self, engines: SimulatedEngines) -> None:
        self.engines, self.version = engines, 0
        self.time = SimulatedClock()
        self.handed_on: list[tuple[int, float]] = []

    def at(self, time, event):
        self.time.at(time, event)

    def clock(self):
        return self.time.now

    def worked(self, seconds, completions): ...

    def ended(self, drafts):
        self.handed_on += [(draft.group.request.key, self.time.now) for draft in drafts]

    def group(self, key: int, length: int) -> Group:
        group = Group(GroupRequest(key, [], Sampling(max_tokens=length)), lambda _: None)
        group.drafts.append(Draft(group, length))
        return group


def test_an_engine_looks_up_at_the_first_step_that_ends_after_its_slice():
    pool = OneEngine(SimulatedEngines(1, 8, step_s=1.0, completion_s=0.0, prefill_token_s=0.0, slice_s=2.5))
    engine = Engine(pool)
    short, long, late = pool.group(0, 2), pool.group(1, 10), pool.group(2, 1)
    engine.take(short)
    engine.take(long)
    engine.look_up()
    pool.time.run_until(3.2)
    assert pool.handed_on == [(0, 3.0)]  # drawn at 2, in a slice that ends with the step that passes 2.5
    engine.take(late)
    engine.look_up()
    pool.time.run_until(6.5)
    assert pool.handed_on == [(0, 3.0)]  # began at 6, drawn at 7, handed on at 9
    pool.time.run_until(9.5)
    assert pool.handed_on[1:] == [(2, 9.0)]
    engine.pause()
    pool.time.run_until(11.0)
    assert pool.handed_on[2:] == [(1, 10.0)]  # an empty engine waits for no slice to end
    assert not engine.steps


def test_weights_arrive_between_slices_and_are_read_into_what_is_in_the_making():
    pool = OneEngine(
        SimulatedEngines(1, 8, 1.0, 0.0, 0.5, prompt_tokens=4, prefill_s=0.25, slice_s=2.5, reads_apart=False)
    )
    engine = Engine(pool)
    group = pool.group(0, 10)
    engine.take(group)
    engine.look_up()
    first_s = 1.0 + 0.25 + 4 * 0.5
    pool.time.run_until(first_s + 0.5)
    engine.pause()
    pool.time.run_until(100.0)
    assert not engine.steps
    pool.version = 1
    engine.update(1, recompute=True)
    engine.resume()
    pool.time.run_until(200.0)
    assert group.drafts[0].spans == [
        (0, 0),
        (1, 4),
    ]  # the next slice began at 3.25 and ended with three steps
    again_s = 1.0 + 0.25 + (4 + 4) * 0.5
    assert pool.handed_on == [(0, pytest.approx(100 + again_s + 5 * 1.0))]


@settings(max_examples=40)
@given(
    bound=st.integers(1, 4),
    prompts=st.integers(1, 4),
    samples=st.integers(1, 3),
    workers=st.integers(1, 3),
    places=st.integers(1, 6),
    capacity=st.floats(0.3, 3),
    in_flight=st.sampled_from(["recompute", "keep"]),
    seed=st.integers(0, 1000),
)
def test_no_token_is_older_than_the_bound_and_no_group_is_lost_or_trained_on_twice(
    bound, prompts, samples, workers, places, capacity, in_flight, seed
):
    engines = SimulatedEngines(workers, places, step_s=0.02, completion_s=0.001, prefill_token_s=1e-4)
    lengths = LogNormalLengths(median=30, sigma=1.2, budget=400, seed=seed)
    batch_tokens = prompts * samples * fmean(lengths(i, 0) for i in range(100))
    report = simulate(
        AsynchronousConfig(max_staleness=bound, in_flight=in_flight),
        engines,
        SimulatedLearner(capacity * batch_tokens / engines.tokens_per_s, 0.0, 0.05),
        lengths,
        prompts_per_step=prompts,
        samples_per_prompt=samples,
        steps=12,
        skip=0,
    )
    assert report.staleness_max <= bound
    for number, step in enumerate(report.steps, 1):
        assert sum(step["staleness_histogram"]) > 0
        assert (
            step["groups_submitted"]
            == step["groups_accepted"] + step["groups_filtered"] + step["groups_running"]
        )
        # Nothing but staleness filters here, and what is trained on has left the waiting line for good.
        assert step["groups_filtered"] == step["groups_stale"]
        assert step["groups_accepted"] == number * prompts + step["groups_waiting"]
