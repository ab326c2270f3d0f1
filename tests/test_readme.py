"""The README's examples run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import ray

README = Path(__file__).parents[1] / "README.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=[text.splitlines()[0] for text in EXAMPLES])
def test_example_runs(example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example, str(README), "exec"), {})
    ray.shutdown()


def test_the_map_names_only_what_exists() -> None:
    table = README.read_text().partition("## Map of the house")[2]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert rows
    for row in rows:
        folder = Path()
        for name in re.findall(r"`([^`]+)`", row):
            # A bare file name lives in the folder of the name before it.
            folder = Path(name).parent if "/" in name else folder
            path = README.parent / name if "/" in name else README.parent / folder / name
            if name.endswith("/") and "/" in name:
                folder = Path(name).parent
            assert path.exists(), f"{name} in the README's map"
