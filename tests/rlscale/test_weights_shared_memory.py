import gc
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shared_memory_leaks import left_since, segments

from rlscale.errors import UserError
from rlscale.memory import available_memory
from rlscale.weights.shared_memory import (
    SharedMemoryPublisher,
    StaleWeightsError,
    WeightManifest,
    open_weights,
)


def random_weights(generator: torch.Generator) -> list[tuple[str, torch.Tensor]]:
    """Odd sizes, several dtypes, a transposed view, a scalar and an empty tensor."""
    return [
        ("embed", torch.randn(7, 13, generator=generator)),
        ("transposed", torch.randn(5, 3, generator=generator).T),
        ("half", torch.randn(11, generator=generator).to(torch.bfloat16)),
        ("mask", torch.randint(0, 2, (3,), generator=generator).bool()),
        ("scalar", torch.randn((), generator=generator)),
        ("empty", torch.empty(0, 4)),
        ("double", torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)),
    ]


@pytest.fixture
def generator() -> torch.Generator:
    generator = torch.Generator()
    print("seed", generator.seed())
    return generator


@pytest.fixture
def publisher():
    before = segments()
    publisher = SharedMemoryPublisher()
    yield publisher
    publisher.close()
    publisher.close()
    assert not left_since(before)


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )


READER = """
import pickle, sys
from rlscale.weights.shared_memory import open_weights
manifest = pickle.loads(bytes.fromhex(sys.argv[1]))
with open_weights(manifest) as weights:
    print(" ".join(f"{name}={tensor.double().sum().item():.6f}" for name, tensor in weights))
"""


def test_an_unrelated_process_reads_what_was_published_and_warns_of_nothing(publisher, generator):
    import pickle

    weights = random_weights(generator)
    manifest = publisher.publish(weights, version=3, checksum=True)
    for _ in range(2):  # a reader's exit must not take the segment away from the next one
        reader = run_python(READER, pickle.dumps(manifest).hex())
        expected = " ".join(f"{name}={tensor.double().sum().item():.6f}" for name, tensor in weights)
        assert (reader.returncode, reader.stdout.strip(), reader.stderr) == (0, expected, "")


def test_views_equal_the_tensors_in_order_shape_dtype_and_value(publisher, generator):
    weights = random_weights(generator)
    manifest = publisher.publish(weights, version=0)
    with open_weights(manifest) as views:
        assert [name for name, _ in views] == [name for name, _ in weights]
        for (_, view), (_, tensor) in zip(views, weights, strict=True):
            assert view.dtype == tensor.dtype
            assert torch.equal(view, tensor)
    assert manifest.bytes == sum(tensor.nbytes for _, tensor in weights)


def test_the_segment_is_reused_while_the_layout_stays_and_replaced_when_it_changes(publisher, generator):
    weights = random_weights(generator)
    first = publisher.publish(weights, version=0)
    inode = os.stat(first.segment).st_ino
    second = publisher.publish(random_weights(generator), version=1)
    assert os.stat(second.segment).st_ino == inode
    third = publisher.publish([("other", torch.ones(3))], version=2)
    assert os.stat(third.segment).st_ino != inode
    with open_weights(third) as views:
        assert torch.equal(views[0][1], torch.ones(3))


def test_readers_cannot_alter_the_weights_of_others(publisher):
    manifest = publisher.publish([("w", torch.zeros(4))], version=0)
    with open_weights(manifest) as views:
        views[0][1].fill_(1.0)
    with open_weights(manifest) as views:
        assert torch.equal(views[0][1], torch.zeros(4))


def test_views_stay_readable_after_their_block_and_after_the_publisher_is_gone(publisher):
    manifest = publisher.publish([("w", torch.arange(5000.0))], version=0)
    with open_weights(manifest) as views:
        kept = views[0][1]
    del views
    publisher.close()
    gc.collect()
    assert torch.equal(kept, torch.arange(5000.0))


def test_an_earlier_manifest_is_stale_after_the_next_publish(publisher):
    stale = publisher.publish([("w", torch.zeros(4))], version=0)
    publisher.publish([("w", torch.ones(4))], version=1)
    with (
        pytest.raises(StaleWeightsError, match="version 0 is stale: its segment holds 1"),
        open_weights(stale),
    ):
        pass


def test_a_publish_during_reading_is_detected_when_the_block_ends(publisher):
    manifest = publisher.publish([("w", torch.zeros(4))], version=0)
    with pytest.raises(StaleWeightsError, match="stale"), open_weights(manifest):
        publisher.publish([("w", torch.ones(4))], version=1)


def test_a_publish_that_fails_half_way_leaves_nothing_to_read(publisher):
    manifest = publisher.publish([("a", torch.zeros(4)), ("b", torch.zeros(2))], version=0)
    with pytest.raises(NotImplementedError):  # meta tensors have no values to copy
        publisher.publish([("a", torch.ones(4)), ("b", torch.zeros(2, device="meta"))], version=1)
    for version in (0, 1):
        promised = replace(manifest, version=version)
        with pytest.raises(StaleWeightsError, match="is being written"), open_weights(promised):
            pass


def test_a_checksum_finds_a_flipped_bit(publisher, generator):
    manifest = publisher.publish([("w", torch.randn(1000, generator=generator))], version=0, checksum=True)
    with open_weights(manifest):
        pass
    place = manifest.tensors[0].offset + int(torch.randint(0, 4000, (), generator=generator))
    with open(manifest.segment, "r+b") as segment:
        segment.seek(place)
        byte = segment.read(1)[0]
        segment.seek(place)
        segment.write(bytes([byte ^ 1]))
    with pytest.raises(StaleWeightsError, match="damaged"), open_weights(manifest):
        pass


def test_a_descriptor_number_reused_by_another_publisher_is_not_mistaken_for_the_segment(publisher):
    manifest = publisher.publish([("w", torch.zeros(4))], version=0)
    publisher.close()
    other = SharedMemoryPublisher()
    other.publish([("w", torch.ones(4))], version=0)
    assert os.path.exists(manifest.segment), "the descriptor number was not reused: the test proves nothing"
    with pytest.raises(StaleWeightsError, match="gone"), open_weights(manifest):
        pass
    other.close()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([("a", torch.zeros(1)), ("b", torch.zeros(1)), ("a", torch.zeros(1))], "given twice a"),
        ([], "no weights"),
    ],
)
def test_names_given_twice_and_empty_models_are_refused(publisher, weights, message):
    with pytest.raises(ValueError, match=message):
        publisher.publish(weights, version=0)


def test_a_negative_version_is_refused(publisher):
    with pytest.raises(ValueError, match="not -1"):
        publisher.publish([("w", torch.zeros(1))], version=-1)


def test_a_model_larger_than_free_memory_is_a_user_error_before_anything_is_allocated(publisher):
    # expand() gives the size without the memory.
    huge = torch.zeros(1, dtype=torch.float64).expand(available_memory() // 8 + 10**8)
    with pytest.raises(UserError, match=r"needs \d+\.\d\d GiB of shared memory and \d+\.\d\d GiB are free"):
        publisher.publish([("w", huge)], version=0)


def test_a_system_that_refuses_the_pages_is_a_user_error_and_not_a_signal():
    limited = run_python(
        "import resource, torch\n"
        "from rlscale.errors import UserError\n"
        "from rlscale.weights.shared_memory import SharedMemoryPublisher\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "try:\n"
        "    SharedMemoryPublisher().publish([('w', torch.zeros(1 << 20))], version=0)\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    assert limited.returncode == 0, limited.stderr
    assert limited.stdout.startswith("weight sync needs 0.00 GiB of shared memory and file too large")


def test_a_killed_publisher_leaves_no_memory_behind():
    code = (
        "import sys, time, torch\n"
        "from rlscale.weights.shared_memory import SharedMemoryPublisher\n"
        "publisher = SharedMemoryPublisher()\n"
        "manifest = publisher.publish([('w', torch.zeros(16 << 20))], version=0)\n"
        "print(repr(manifest), flush=True)\n"
        "time.sleep(60)\n"
    )
    before = segments()
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    from rlscale.weights.shared_memory import TensorPlace

    manifest = eval(process.stdout.readline(), {"WeightManifest": WeightManifest, "TensorPlace": TensorPlace})
    with open_weights(manifest) as views:
        assert views[0][1].sum() == 0
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    process.stdout.close()
    time.sleep(0.1)
    assert not Path(manifest.segment).exists()
    assert not left_since(before)
    with pytest.raises(StaleWeightsError, match="gone"), open_weights(manifest):
        pass
