import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from shared_memory_leaks import left_since, segments

from rlscale.config import LearnerConfig, RolloutConfig, WeightSyncConfig
from rlscale.errors import UserError
from rlscale.weights.buckets import pack
from rlscale.weights.digests import digest, digests
from rlscale.weights.disk import DiskPublisher
from rlscale.weights.stream import StreamPublisher
from rlscale.weights.transport import choose_transport, incoming

# Reads a manifest a line, and answers with the digests of what came; "refuse" stops after the first tensor.
READER = """
import pickle, sys
from rlscale.weights.digests import digests
from rlscale.weights.transport import incoming
while True:
    try:
        manifest, refuse = pickle.load(sys.stdin.buffer)
    except EOFError:
        break
    with incoming(manifest) as weights:
        kept = []
        for entry in weights:
            kept.append(entry)
            if refuse:
                break
    pickle.dump(digests(kept), sys.stdout.buffer)
    sys.stdout.buffer.flush()
"""


class ReaderProcess:
    """An engine's side of a transport, in a process of its own."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def tell(self, manifest, refuse: bool = False) -> None:
        pickle.dump((manifest, refuse), self._process.stdin)
        self._process.stdin.flush()

    def answer(self):
        return pickle.load(self._process.stdout)

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def readers() -> Iterator[list[ReaderProcess]]:
    processes = [ReaderProcess(), ReaderProcess()]
    yield processes
    for process in processes:
        process.close()


def random_weights() -> list[tuple[str, torch.Tensor]]:
    print("seed", torch.seed())
    return [
        ("embed", torch.randn(70, 13)),
        ("transposed", torch.randn(5, 3).T),
        ("half", torch.randn(11).to(torch.bfloat16)),
        ("scalar", torch.randn(())),
        ("empty", torch.empty(0, 4)),
        ("large", torch.randn(2000)),
        ("last", torch.randn(3, dtype=torch.float64)),
    ]


@pytest.mark.parametrize("carrier", ["broadcast", "staging"])
def test_two_readers_get_every_version_bit_for_bit_in_buckets(carrier, readers) -> None:
    publisher = StreamPublisher(carrier, readers=2, bucket_bytes=2000)
    for version in range(3):
        weights = random_weights()
        manifest = publisher.publish(weights, version)
        assert len(manifest.packing.sizes) > 3
        for reader in readers:
            # One of them stops early once: the other must not wait for it.
            reader.tell(manifest, refuse=version == 1 and reader is readers[0])
        answers = [reader.answer() for reader in readers]
        assert answers[1] == digests(weights)
        assert answers[0] == (digests(weights[:1]) if version == 1 else digests(weights))
        assert manifest.bytes == sum(tensor.nbytes for _, tensor in weights)
    publisher.close()
    publisher.close()


def test_a_reader_that_comes_late_is_told_so_and_gets_the_next_version(readers) -> None:
    publisher = StreamPublisher("broadcast", readers=1, bucket_bytes=1000)
    weights = random_weights()
    manifest = publisher.publish(weights, 0)
    readers[0].tell(manifest)
    assert readers[0].answer() == digests(weights)
    with pytest.raises(RuntimeError, match="version 0 is for the 1 engines before"), incoming(manifest):
        pass
    with incoming(publisher.publish(weights, 1)) as arrived:
        assert digests(arrived) == digests(weights)


@pytest.mark.parametrize(
    ("weights", "message"),
    [([("a", torch.zeros(1)), ("a", torch.zeros(1))], "given twice a"), ([], "no weights")],
)
def test_names_given_twice_and_empty_models_are_refused_before_anything_is_sent(weights, message) -> None:
    with pytest.raises(ValueError, match=message):
        StreamPublisher("broadcast", 1, 1000).publish(weights, 0)


def test_buckets_hold_no_more_than_asked_unless_one_tensor_does() -> None:
    weights = random_weights()
    packing = pack(weights, 1000)
    for index, size in enumerate(packing.sizes):
        inside = list(packing.bucket(index))
        assert size <= 1000 or len([parcel for parcel in inside if parcel.size]) == 1
    assert [parcel.name for parcel in packing.parcels] == [name for name, _ in weights]


def test_weights_on_disk_arrive_and_only_the_newest_stay(tmp_path: Path) -> None:
    publisher = DiskPublisher(tmp_path / "weights")
    stacked = torch.randn(4, 5)
    first = publisher.publish([("row", stacked[0]), ("same memory", stacked[0:2])], 0)
    second = publisher.publish(random_weights(), 1)
    assert [path.name for path in (tmp_path / "weights").iterdir()] == [second.path.name]
    with incoming(second) as weights:
        assert {name for name, _ in weights} == {name for name, _ in random_weights()}
    with pytest.raises(RuntimeError, match="version 0 is gone"), incoming(first):
        pass
    publisher.close()
    assert not list((tmp_path / "weights").iterdir())


def test_publishers_that_share_a_folder_keep_their_weights_apart(tmp_path: Path) -> None:
    publishers = [DiskPublisher(tmp_path), DiskPublisher(tmp_path)]
    manifests = [p.publish([("w", torch.full((3,), float(i)))], 0) for i, p in enumerate(publishers)]
    for i, manifest in enumerate(manifests):
        with incoming(manifest) as weights:
            assert dict(weights)["w"].tolist() == [i] * 3
    publishers[0].close()
    with incoming(manifests[1]) as weights:
        assert [name for name, _ in weights] == ["w"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"weight_sync\.folder=.*file/weights"):
        DiskPublisher(tmp_path / "file" / "weights").publish(random_weights(), 0)


def test_a_digest_knows_every_bit_and_its_place_and_no_layout() -> None:
    x = torch.randn(7, 11)
    assert digest(x) == digest(x.T.contiguous().T)
    swapped, flipped = x.clone().view(-1), x.clone().view(-1)
    swapped[[2, 5]] = swapped[[5, 2]]
    flipped.view(torch.int32)[int(torch.randint(0, 77, ()))] ^= 1 << int(torch.randint(0, 31, ()))
    assert len({digest(x), digest(swapped.view(7, 11)), digest(flipped.view(7, 11))}) == 3


@pytest.mark.parametrize(
    ("rollout_gpus", "learner_gpus", "ranks", "expected"),
    [
        (0, 0, 1, "shared_memory"),
        (0, 0, 2, "shared_memory"),
        (0.25, 0.25, 1, "cuda_ipc"),
        (0.5, 0.5, 1, "shared_memory"),  # three workers and a learner, on two GPUs
        (1, 1, 1, "nccl"),
        (2, 1, 2, "nccl"),
        (1, 0, 1, "shared_memory"),
    ],
)
def test_placement_chooses_the_transport_and_every_rank_of_an_engine_reads(
    rollout_gpus, learner_gpus, ranks, expected
) -> None:
    chosen = choose_transport(
        WeightSyncConfig(),
        RolloutConfig(num_gpus=rollout_gpus, workers=3, tensor_parallel_size=ranks),
        LearnerConfig(num_gpus=learner_gpus),
    )
    assert (chosen.name, chosen.readers, chosen.bucket_bytes) == (expected, 3 * ranks, 256 << 20)


@pytest.mark.parametrize(
    ("transport", "gpus", "message"),
    [
        ("cuda_ipc", 1, "needs learner and rollout on one GPU"),
        ("nccl", 0.5, "needs GPUs of their own"),
        ("nccl", 0, "needs GPUs of their own"),
        ("disk", 0, "needs weight_sync.folder"),
    ],
)
def test_a_transport_that_cannot_join_the_two_is_refused_by_key_and_remedy(transport, gpus, message) -> None:
    with pytest.raises(UserError, match=message):
        choose_transport(
            WeightSyncConfig(transport=transport), RolloutConfig(num_gpus=gpus), LearnerConfig(num_gpus=gpus)
        )


def test_nothing_is_left_in_shared_memory(readers) -> None:
    before = segments()
    publisher = StreamPublisher("staging", readers=1, bucket_bytes=1000)
    readers[0].tell(publisher.publish(random_weights(), 0))
    readers[0].answer()
    publisher.close()
    assert not left_since(before)
