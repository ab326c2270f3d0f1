from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rlscale.staleness import READY_BATCHES, StalenessManager, staleness_metrics
from rlscale.types import Completion, Rollout


class Accounting(RuleBasedStateMachine):
    """Any order of verbs that sources may call keeps the books balanced and the bound in reach."""

    @initialize(groups=st.integers(1, 5), bound=st.integers(0, 4))
    def start(self, groups: int, bound: int) -> None:
        self.manager = StalenessManager(groups, bound)

    @rule(data=st.data(), engines_take=st.integers(0, 30))
    def submit(self, data: st.DataObject, engines_take: int) -> None:
        m = self.manager
        capacity = m.capacity(engines_take)
        # The last one admitted is trained on in time, if none overtakes it.
        if capacity:
            batches_before_its_own = (m.waiting + m.running + capacity - 1) // m.groups_per_step
            assert batches_before_its_own + m.updates_pending <= m.max_staleness
        # Engines rest while enough is ready, and else have what they can take.
        if m.waiting >= READY_BATCHES * m.groups_per_step:
            assert capacity == 0
        elif m.waiting < m.groups_per_step and not m.updates_pending:
            in_time = (m.max_staleness + 1) * m.groups_per_step - m.waiting - m.running
            assert capacity >= min(in_time, engines_take)
            assert m.waiting + m.running + capacity >= m.groups_per_step  # so that a batch comes about
        m.submit(data.draw(st.integers(0, capacity)))

    @precondition(lambda self: self.manager.running > 0)
    @rule()
    def accept(self) -> None:
        self.manager.accept()

    @precondition(lambda self: self.manager.running > 0)
    @rule(data=st.data())
    def give_up_running(self, data: st.DataObject) -> None:
        self.manager.filter_running(data.draw(st.integers(1, self.manager.running)))

    @precondition(lambda self: self.manager.waiting > 0)
    @rule(data=st.data())
    def give_up_waiting(self, data: st.DataObject) -> None:
        self.manager.filter_waiting(data.draw(st.integers(1, self.manager.waiting)))

    @precondition(
        lambda self: self.manager.waiting >= self.manager.groups_per_step and not self.manager.updates_pending
    )
    @rule()
    def train(self) -> None:
        self.manager.train()

    @rule()
    def update(self) -> None:
        self.manager.update()

    @rule()
    def save_and_resume(self) -> None:
        resumed = StalenessManager(self.manager.groups_per_step, self.manager.max_staleness)
        resumed.load_state_dict(self.manager.state_dict())
        assert resumed == self.manager

    @invariant()
    def nothing_is_lost_or_counted_twice(self) -> None:
        if hasattr(self, "manager"):
            m = self.manager
            assert m.submitted == m.accepted + m.filtered + m.running


TestAccounting = Accounting.TestCase


def test_staleness_is_counted_token_by_token():
    drawn_by = [[3, 3, 5], [5, 5, 5, 6, 6], [6]]
    rollouts = [
        Rollout([1], Completion([0] * len(versions), [0.0] * len(versions), versions, "stop"), 0.0, 0)
        for versions in drawn_by
    ]
    assert staleness_metrics(rollouts, version=6) == {
        "staleness_mean": (3 + 3 + 1 + 1 + 1 + 1) / 9,
        "staleness_max": 3,
        "staleness_histogram": [3, 4, 0, 2],
    }
