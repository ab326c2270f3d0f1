from collections.abc import Mapping

import pytest
import torch
from shared_memory_leaks import left_since, segments

from rlscale.weights.base import account_for
from rlscale.weights.digests import Digests, digests
from rlscale.weights.shared_memory import SharedMemoryPublisher, WeightManifest, open_weights
from rlscale.weights.synchronizer import Synchronizer


class FakeLearner:
    """Publishes one matrix, and what a test adds to it."""

    def __init__(self) -> None:
        self.weights = {"w": torch.randn(3, 5)}
        self._publisher = SharedMemoryPublisher()

    def publish_weights(self, version: int) -> WeightManifest:
        return self._publisher.publish(self.weights.items(), version)

    def weight_digests(self, dtypes: Mapping[str, str]) -> Digests:
        return digests(self.weights.items(), dtypes)


class FakeEngines:
    """Two engines that copy what they are given; the second can be made to lag."""

    def __init__(self) -> None:
        self.held: list[dict[str, torch.Tensor]] = [{}, {}]
        self.lagging = False
        self.dtype = torch.float32

    def load_weights(self, manifest: WeightManifest) -> list[int]:
        for held in self.held:
            with open_weights(manifest) as weights:
                held.update({n: t.clone() for n, t in account_for(weights, {"w": (3, 5)}).items()})
        return [manifest.version, manifest.version - self.lagging]

    def weight_digests(self) -> list[Digests]:
        return [digests((n, t.to(self.dtype)) for n, t in held.items()) for held in self.held]


def test_after_a_sync_all_engines_hold_the_learners_weights_at_the_next_version():
    learner, engines = FakeLearner(), FakeEngines()
    synchronizer = Synchronizer(learner, engines)
    for expected in range(3):
        learner.weights["w"] = torch.randn(3, 5)
        report = synchronizer.sync_weights()
        assert (report.version, report.bytes) == (expected, 60)
        assert report.wall_s > 0
        for held in engines.held:
            assert torch.equal(held["w"], learner.weights["w"])
    synchronizer.close()
    synchronizer.close()


def test_a_sync_that_failed_does_not_lend_its_version_to_the_next():
    learner, engines = FakeLearner(), FakeEngines()
    synchronizer = Synchronizer(learner, engines)
    learner.weights["extra"] = torch.ones(1)
    with pytest.raises(ValueError, match="unknown extra"):
        synchronizer.sync_weights()
    del learner.weights["extra"]
    assert synchronizer.sync_weights().version == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_verified_sync_compares_in_the_engines_dtype_and_names_what_differs(dtype):
    learner, engines = FakeLearner(), FakeEngines()
    engines.dtype = dtype
    synchronizer = Synchronizer(learner, engines, verify=True)
    synchronizer.sync_weights()
    load = engines.load_weights

    def load_and_damage(manifest: WeightManifest) -> list[int]:
        arrived = load(manifest)
        engines.held[1]["w"][2, 3] *= 1.01
        return arrived

    engines.load_weights = load_and_damage
    with pytest.raises(
        RuntimeError, match=r"version 1 engine 1 serves other weights .* 1 of 1 differ, first w"
    ):
        synchronizer.sync_weights()
    Synchronizer(learner, engines).sync_weights()


def test_an_engine_at_another_version_is_an_error():
    engines = FakeEngines()
    engines.lagging = True
    with pytest.raises(RuntimeError, match=r"to version 0 left the engines at \[0, -1\]"):
        Synchronizer(FakeLearner(), engines).sync_weights()


def test_every_tensor_is_accounted_for_in_one_message():
    expected = {"a": (2,), "b": (3, 1), "c": (), **{f"m{i}": (1,) for i in range(7)}}
    given = [
        ("a", torch.zeros(2)),
        ("a", torch.zeros(2)),
        ("b", torch.zeros(1, 3)),
        ("x", torch.zeros(1)),
    ]
    with pytest.raises(ValueError, match="weights do not fit") as failure:
        account_for(given, expected)
    assert str(failure.value) == (
        "weights do not fit the model: missing c, m0, m1, m2, m3 and 3 more; unknown x; given twice a; "
        "misshapen b (1, 3) instead of (3, 1)"
    )


def test_accounting_passes_tensors_on_unchanged_in_the_given_order():
    names = [str(i) for i in torch.randperm(20).tolist()]
    tensors = {name: torch.randn(int(name)) for name in names}
    checked = account_for(tensors.items(), {str(i): (i,) for i in range(20)})
    assert list(checked) == names
    assert all(checked[name] is tensors[name] for name in names)


def test_nothing_of_a_sync_is_left_in_shared_memory():
    before = segments()
    Synchronizer(FakeLearner(), FakeEngines()).sync_weights()
    assert not left_since(before)
