"""The command line as a user meets it: what bad input says, and what it leaves behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import KimiLinearConfig

from kimi_linear.checkpoint import save_checkpoint
from kimi_linear.config import mla_twin, preset
from kimi_linear.model import KimiLinearForCausalLM
from rlscale import cli
from rlscale.config import RunConfig, SweepConfig
from rlscale.sections import describe_settings, sections, tags

RUN = "task: {name: reversal, required_length: 4}\n"


def rlscale(
    *arguments: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str]:
    """Exit code and stderr of a command."""
    monkeypatch.setattr(sys, "argv", ["rlscale", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    code = stopped.value.code
    return (code if isinstance(code, int) else int(bool(code))), capsys.readouterr().err


@pytest.fixture
def mla_checkpoint(tmp_path: Path) -> Path:
    config: KimiLinearConfig = mla_twin(preset("tiny"))
    with torch.random.fork_rng():
        save_checkpoint(KimiLinearForCausalLM(config), tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("learner.lr=1", "learner.lr"),
        ("steps=0", "steps"),
        ("steps", "key=value"),
        ("task.name=reverse", "Did you mean 'reversal'"),
        ("task.options.letters=3", "letters"),
        ("task.required_length=5000", "context"),
        ("rollout.max_tokens=9000", "context"),
        ("learner.tokens_per_micro_batch=8", "tokens_per_micro_batch"),
        ("rollout.context=6", "rollout.context=6 does not hold a prompt of"),
        ("model.overrides.hiden_size=4", "hiden_size"),
        ("model.checkpoint=nowhere", "nowhere"),
        ("algorithm.kind=ppo", "grpo"),
        ("learner.updates_per_step=99", "updates_per_step"),
    ],
)
def test_a_bad_config_is_one_line_exit_code_2_and_no_folder(
    override: str,
    says: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    folder = tmp_path / "out"
    code, said = rlscale(
        "run", str(tmp_path / "run.yaml"), override, "-o", str(folder), capsys=capsys, monkeypatch=monkeypatch
    )
    assert code == 2
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert says in said
    assert not folder.exists()


def test_a_checkpoint_of_the_other_architecture_is_refused(
    mla_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    code, said = rlscale(
        "run",
        str(tmp_path / "run.yaml"),
        f"model.checkpoint={mla_checkpoint}",
        "-o",
        str(tmp_path / "out"),
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    assert code == 2
    assert "full-MLA" in said
    assert "architecture" in said
    assert not (tmp_path / "out").exists()


def test_foreign_files_are_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text(RUN)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("precious")
    for flags in ((), ("--overwrite",), ("--resume",)):
        code, said = rlscale(
            "run",
            str(tmp_path / "run.yaml"),
            "-o",
            str(tmp_path / "out"),
            *flags,
            capsys=capsys,
            monkeypatch=monkeypatch,
        )
        assert code == 2
        assert said.count("\n") == 1
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("run", "nowhere.yaml"), "nowhere.yaml"),
        (("sweep", "nowhere.yaml"), "nowhere.yaml"),
        (("plot", "nowhere"), "nowhere"),
        (("model", "13b"), "tiny, small, 48b-a3b"),
        (("tasks", "chess"), "unknown task 'chess'"),
        (("tasks", "reversal", "--required-length", "0"), "required-length"),
        (("run",), "CONFIG"),
        (("sft", "nowhere.yaml"), "nowhere.yaml"),
        (("algorithms", "ppo"), "unknown algorithm 'ppo': known are grpo, dr_grpo"),
        (("train",), "train"),
    ],
)
def test_what_does_not_exist_is_named(
    arguments: tuple[str, ...], says: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, said = rlscale(*arguments, capsys=capsys, monkeypatch=monkeypatch)
    assert code == 2
    assert says in said


def test_model_prints_the_released_models_size_and_break_even(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["rlscale", "model", "48b-a3b"])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().out
    for figure in ("20 KDA + 7 MLA", "8,064", "31,104", "43,417,600", "1,884"):
        assert figure in said


def test_settings_names_and_explains_every_setting(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*describe_settings(RunConfig), *describe_settings(SweepConfig)]
    assert {"learner.learning_rate", "rollout.max_tokens", "algorithm.clip_high", "run.steps"} <= {
        r[0] for r in rows
    }
    unexplained = {key for key, _, explanation in rows if not explanation and not key.startswith("run.")}
    assert unexplained == set()
    monkeypatch.setattr(sys, "argv", ["rlscale", "settings"])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().out
    assert all(key in said for key, _, _ in describe_settings(RunConfig))


def test_algorithms_lists_all_and_the_settings_of_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["rlscale", "algorithms", *arguments])
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr().out

    everything = said()
    members = sections(RunConfig.model_fields["algorithm"].annotation)
    assert all(tags(member)[0] in everything for member in members)
    one = said("mirror_descent")
    assert all(key in one for key in ("algorithm.tau", "algorithm.ptx.data", "algorithm.selection.max_draws"))
    assert "clip_low" not in one


def test_sft_leaves_a_checkpoint_and_says_how_to_use_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = tmp_path / "sft.yaml", tmp_path / "out"
    config.write_text("{steps: 2, batch_size: 2, task: {name: reversal, required_length: 4}}")
    monkeypatch.setattr(sys, "argv", ["rlscale", "sft", str(config), "-o", str(out), "model.dtype=bfloat16"])
    with pytest.raises(SystemExit):
        cli.main()
    said = capsys.readouterr().out
    assert "step 2/2, loss" in said
    assert f"model.checkpoint={out}" in said.replace("\n", "")
    assert (out / "model.safetensors").exists()


def test_help_answers_without_importing_torch() -> None:
    code = "import sys; from rlscale import cli; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
