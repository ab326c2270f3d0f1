"""Devices by name, with the figures that their makers publish, and what share of these programs reach.

These are for what nobody has measured yet: see `rlscale.plan.costs`.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlscale.errors import UserError


@dataclass(frozen=True, slots=True)
class Device:
    """What a maker promises.

    Args:
        peak_flops: operations per second of dense products in bfloat16.
        memory_bytes: that it holds.
        bandwidth: bytes per second from its memory.
        link_bandwidth: bytes per second to devices of other machines, for each device.
        is_gpu: False for processors, whose memory is the machine's.
    """

    name: str
    peak_flops: float
    memory_bytes: float
    bandwidth: float
    link_bandwidth: float
    is_gpu: bool = True


DEVICES = {
    device.name.lower(): device
    for device in (
        # NVIDIA's data sheets for the SXM modules; links as in its DGX machines, a network card for each GPU.
        Device("A100", 312e12, 80e9, 2.039e12, 25e9),
        Device("H100", 989.4e12, 80e9, 3.35e12, 50e9),
        Device("H200", 989.4e12, 141e9, 4.8e12, 50e9),
        Device("B200", 2250e12, 180e9, 8e12, 50e9),
        # One core of a server: two AVX-512 multiply-adds at 2.5 GHz in float32, its share of eight memory
        # channels between 32 cores. Processors differ: measure.
        Device("cpu", 160e9, 8e9, 9.6e9, 1e9, is_gpu=False),
    )
}


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Which share of a device's figures programs reach; assumed where nothing is measured.

    Args:
        compute: of the peak, by prefill and training.
        bandwidth: of the memory's, by decoding. Filled caches reached 0.66 to 0.81 on an H100
            (benchmarks/ROLLOUTS.md).
        link: of the network's.
        memory: of the device's memory that a plan fills; the rest is the driver's and the allocator's.
        decode_step_s: seconds of a decoding step that no byte accounts for. A single sequence took 2.3 to
            2.8 ms on an H100, of which its weights explain 0.8.
        learner_step_s: seconds of a training step that no operation accounts for.
    """

    compute: float = 0.4
    bandwidth: float = 0.7
    link: float = 0.6
    memory: float = 0.9
    decode_step_s: float = 1.5e-3
    learner_step_s: float = 0.1


def find_device(name: str) -> Device:
    """The device of this name, in any case.

    Raises:
        UserError: there is none.
    """
    try:
        return DEVICES[name.lower()]
    except KeyError:
        known = ", ".join(device.name for device in DEVICES.values())
        raise UserError(f"unknown --gpu {name}: known are {known}") from None
