"""Supervised data, and fine-tuning as a job: what it trains on, what it leaves, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from kimi_linear.checkpoint import save_checkpoint
from kimi_linear.config import preset
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.algorithms import GRPOConfig
from rlscale.config import FineTuneConfig, LearnerConfig, ModelConfig, parse_config
from rlscale.errors import UserError
from rlscale.fine_tuning import fine_tune
from rlscale.learner.examples import ExampleFile, Solutions, supervised_data
from rlscale.learner.learner import LearnerSpec
from rlscale.models import model_config, tokenizer_for
from rlscale.tasks import build_tokenizer, decode_completion, make_task

TOKENIZER = build_tokenizer()
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "full_attention_layers": [2],
    "first_k_dense_replace": 2,
}


def write_lines(path: Path, *examples: tuple[str, str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in examples))
    return path


def settings(**changes: Any) -> FineTuneConfig:
    tree = {"steps": 30, "batch_size": 4, "learning_rate": 1e-2, "model": {"overrides": SHAPE}}
    return parse_config(FineTuneConfig, tree | changes)


def test_a_file_gives_every_example_once_in_each_pass_in_an_order_of_its_own(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", *((f"{i}=", str(i)) for i in range(20)))
    data = ExampleFile(path, TOKENIZER, seed=3)
    texts = [decode_completion(TOKENIZER, data.at(i).completion_ids) for i in range(40)]
    passes = texts[:20], texts[20:]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(map(str, range(20)))
    assert passes[0] != passes[1]
    again = ExampleFile(path, TOKENIZER, seed=3)
    assert [again.at(i) for i in (33, 2, 19)] == [data.at(i) for i in (33, 2, 19)]
    other = ExampleFile(path, TOKENIZER, seed=4)
    assert [other.at(i) for i in range(20)] != [data.at(i) for i in range(20)]


def test_a_text_may_hold_separators_of_lines_and_windows_may_have_written_the_file(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a=", "completion": "x\\ny"}\r\n{"prompt": "b=", "completion": "z"}\r\n')
    data = ExampleFile(path, TOKENIZER, seed=0)
    assert {decode_completion(TOKENIZER, data.at(i).completion_ids) for i in range(2)} == {"x\ny", "z"}
    path.write_text('{"prompt": "a\u2028=", "completion": "b"}', "utf-8")
    with pytest.raises(UserError, match="line 1: the tokenizer has no token for '\\\\u2028'"):
        ExampleFile(path, TOKENIZER, 0)


def test_an_example_is_a_prompt_as_rl_puts_it_and_a_completion_that_ends(tmp_path: Path) -> None:
    data = supervised_data(
        write_lines(tmp_path / "data.jsonl", ("ab=", "ba")), make_task("reversal", 2, {}), TOKENIZER, 0
    )
    example = data.at(0)
    assert example.prompt_ids[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.decode(example.prompt_ids[1:]) == "ab="
    assert TOKENIZER.decode(example.completion_ids[:-1]) == "ba"
    assert example.completion_ids[-1] == TOKENIZER.eos_token_id


def test_solutions_are_none_of_the_problems_that_rl_draws() -> None:
    task = make_task("reversal", 12, {})
    solutions = Solutions(task, TOKENIZER, seed=1)
    rl = {task.problem("train", (1 << 32) + place).prompt for place in range(50)}
    assert rl.isdisjoint({TOKENIZER.decode(solutions.at(i).prompt_ids[1:]) for i in range(50)})
    with pytest.raises(UserError, match="seed 1 has no solution"):
        solutions.at(1 << 31)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no examples"),
        ("\n\n", "has no examples"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"', "line 2 must be an object"),
        ('{"prompt": "a"}', "line 1 must be an object with texts `prompt` and `completion`"),
        ('{"prompt": "a", "completion": ""}', "line 1 must be an object"),
        ('{"prompt": "a", "completion": 3}', "line 1 must be an object"),
        ('["a", "b"]', "line 1 must be an object"),
        ('{"prompt": "é", "completion": "b"}', "line 1: the tokenizer has no token for 'é'"),
    ],
)
def test_a_broken_file_is_one_line_that_names_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        ExampleFile(path, TOKENIZER, 0)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"no examples can be read from .*absent"):
        ExampleFile(tmp_path / "absent.jsonl", TOKENIZER, 0)


def test_fine_tuning_learns_a_file_and_leaves_a_checkpoint_that_rl_starts_from(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", ("ab=", "x"), ("cd=", "y"), ("ef=", "z"))
    seen: list[tuple[int, float]] = []
    config = settings(steps=60, data=str(path), model={"overrides": SHAPE, "dtype": "bfloat16"})
    report = fine_tune(config, tmp_path / "out", on_progress=lambda *news: seen.append(news))
    assert [step for step, _ in seen] == list(range(3, 61, 3))
    assert report.loss == seen[-1][1] < 0.2 < seen[0][1]
    assert report.tokens == 60 * 4 * (1 + 3 + 2)

    start = ModelConfig(checkpoint=tmp_path / "out")
    shape, tokenizer = model_config(start, "hybrid"), tokenizer_for(start)
    learner = LearnerSpec(shape, torch.float32, start.checkpoint).build(LearnerConfig(), GRPOConfig(), seed=9)
    for prompt, answer in (("ab=", "x"), ("cd=", "y")):
        ids = tokenizer.encode(prompt, add_special_tokens=False)
        with torch.no_grad():
            logits = learner.model(torch.tensor([[tokenizer.bos_token_id, *ids]])).logits
        assert tokenizer.decode(logits[0, -1].argmax()) == answer
    assert {p.suffix for p in (tmp_path / "out").iterdir()} <= {".json", ".safetensors", ".yaml", ".jinja"}

    # And fine-tuning goes on from there: from what was learned, not from the start.
    more = settings(steps=3, data=str(path), model={"checkpoint": str(tmp_path / "out")})
    assert fine_tune(more, tmp_path / "more").loss < 0.3


def test_fine_tuning_on_solutions_is_the_same_each_time(tmp_path: Path) -> None:
    config = settings(steps=4, task={"name": "sorting", "required_length": 4})
    losses = [fine_tune(config, tmp_path / name).loss for name in ("one", "two")]
    assert losses[0] == losses[1]


def test_fine_tuning_refuses_what_it_cannot_do_and_leaves_nothing(tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", ("ab=" * 300, "x"))
    short = {"overrides": SHAPE | {"model_max_length": 64}}
    out = tmp_path / "out"
    for config, message in (
        (settings(data=str(data), model=short), "903 tokens exceeds the model's context of 64"),
        (settings(data=str(tmp_path / "absent")), "no examples can be read"),
        (settings(model={"checkpoint": str(tmp_path)}), "model.checkpoint"),
        (settings(learning_rate=1e30), r"the loss of step \d+ is (nan|inf): lower learning_rate"),
    ):
        with pytest.raises(UserError, match=message):
            fine_tune(config, out)
        assert not out.exists()


def test_a_taken_folder_is_left_alone_unless_it_is_a_fine_tunings_own(tmp_path: Path) -> None:
    config, out = settings(steps=1), tmp_path / "out"
    fine_tune(config, out)
    with pytest.raises(UserError, match="--overwrite replaces it"):
        fine_tune(config, out)
    fine_tune(config, out, overwrite=True)
    foreign = tmp_path / "foreign"
    save_checkpoint(KimiLinearForCausalLM(preset("tiny", SHAPE)), foreign)
    before = sorted(foreign.iterdir())
    for overwrite in (False, True):
        with pytest.raises(UserError, match="choose a new or an empty folder"):
            fine_tune(config, foreign, overwrite=overwrite)
        with pytest.raises(UserError, match=r"sft\.json is a file: choose a folder for the checkpoint"):
            fine_tune(config, out / "sft.json" / "below", overwrite=overwrite)
    assert sorted(foreign.iterdir()) == before
