"""The scan for Hopper, compiled for one: no GPU is needed for that."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from kimi_linear.ops.triton.prepare_hopper import WARPS
from kimi_linear.ops.triton.scan_hopper import STAGES, scan_hopper_kernel

HOPPER = GPUTarget("cuda", 90, 32)
PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
TYPES = {
    **dict.fromkeys(("read_keys", "queries", "write_keys", "attention", "v", "o"), "*bf16"),
    **dict.fromkeys(("decay", "scales", "initial_state", "final_state"), "*fp32"),
    **dict.fromkeys(("chunk_starts", "cu_seqlens"), "*i32"),
    "T": "i32",
    "scale": "fp32",
}
SIZES = {"HV": 32, "K": 128, "V": 128, "VARLEN": True, "DEPTH": STAGES, "THROUGH": False}


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"initial_state": None},
        {"final_state": None},
        {"VARLEN": False, "chunk_starts": None, "cu_seqlens": None},
        {"o": None},
        {"o": None, "initial_state": None, "THROUGH": True},
    ],
    ids=["all given", "from zero", "no final state", "equal lengths", "no output", "of any state"],
)
def test_the_scan_keeps_its_state_in_registers(form: dict[str, Any], tmp_path: Path) -> None:
    constants = {**SIZES, **form}
    names = [parameter.name for parameter in scan_hopper_kernel.params]
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in names}
    source = GluonASTSource(
        scan_hopper_kernel,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")},
    )
    compiled = triton.compile(source, target=HOPPER, options={"num_warps": WARPS})
    (tmp_path / "scan.ptx").write_text(compiled.asm["ptx"])
    said = subprocess.run(
        [PTXAS, "-v", "-arch=sm_90a", tmp_path / "scan.ptx", "-o", tmp_path / "scan.cubin"],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    assert re.findall(r"(\d+) bytes spill", said) == ["0", "0"], said
