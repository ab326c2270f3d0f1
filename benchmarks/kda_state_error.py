"""Measures what a bfloat16 recurrent state costs over a long output.

    python -m benchmarks.kda_state_error [--steps 8192] [--output benchmarks/results/kda_state_error.json]

Relative RMS errors of a decode step's outputs and states against the float64 recurrence, for a float32 and a
bfloat16 state, which the step rounds once a token. All other inputs are float32, so that the state's dtype is
all that differs. K = V = 128, 4 heads, normal inputs; two gates: as the released model starts them, and one
that remembers some 1,000 tokens. Runs on a GPU if there is one, else on the CPU, whose step rounds alike.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import timing
from kimi_linear.ops import convolution_step, kda_decode_step, kda_gate, l2_normalize
from kimi_linear.ops.reference import recurrent_step

HEADS, DIM, WIDTH = 4, 128, 4
CHANNELS = 3 * HEADS * DIM
EPS = 1e-5
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def state_errors(
    a_log: torch.Tensor, dt_bias: torch.Tensor, gate_size: float, steps: int
) -> list[dict[str, float | int]]:
    """Relative RMS errors of outputs and states after 1, 8, 64, ... steps."""
    device = a_log.device
    weight, ones = torch.randn(CHANNELS, WIDTH, device=device), torch.ones(DIM, device=device)
    slots = torch.zeros(1, device=device, dtype=torch.int32)
    states = {
        name: torch.zeros(1, HEADS, DIM, DIM, device=device, dtype=dtype) for name, dtype in DTYPES.items()
    }
    windows = {name: torch.zeros(1, WIDTH - 1, CHANNELS, device=device) for name in states}
    state, window = states["float32"].double(), windows["float32"].double()
    rows: list[dict[str, float | int]] = []
    sizes = (CHANNELS, HEADS * DIM, HEADS, HEADS * DIM)
    for step in range(1, steps + 1):
        qkv, g, beta, gate = torch.randn(1, sum(sizes), device=device).split(sizes, dim=1)
        g, gate = gate_size * g.view(-1, HEADS, DIM), gate.view(-1, HEADS, DIM)
        outputs = {
            name: kda_decode_step(
                qkv, weight, windows[name], g, beta, a_log, dt_bias, states[name], slots, gate, ones, EPS
            )
            for name in states
        }
        y, window = convolution_step(qkv.double(), weight.double(), window)
        q, k, v = y.unflatten(-1, (3, HEADS, DIM)).unbind(1)
        decay = kda_gate(g.double(), a_log, dt_bias)
        o, state = recurrent_step(
            l2_normalize(q), l2_normalize(k), v, decay, beta.double().sigmoid(), state, DIM**-0.5
        )
        o = F.rms_norm(o, (DIM,), eps=EPS) * gate.double().sigmoid()
        if step == steps or (step & (step - 1) == 0 and step.bit_length() % 3 == 1):
            row: dict[str, float | int] = {"step": step}
            for name, output in outputs.items():
                row[f"o_{name}"] = float((output - o).norm() / o.norm())
                row[f"state_{name}"] = float((states[name] - state).norm() / state.norm())
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=8192)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kda_state_error.json"))
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    timing.DEVICE = device
    a_log, dt_bias = timing.released_gate(HEADS, DIM)
    gates = {
        "as released": (a_log, dt_bias, 1.0),
        "about 1,000 tokens": (torch.zeros_like(a_log), torch.full_like(dt_bias, -7.0), 0.1),
    }
    measured = [
        {
            "memory": memory,
            "device": torch.cuda.get_device_name() if device == "cuda" else "CPU",
            "torch": torch.__version__,
            "errors": state_errors(*gate, arguments.steps),
        }
        for memory, gate in gates.items()
    ]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(measured, indent=1) + "\n")
    print(arguments.output.read_text())


if __name__ == "__main__":
    main()
