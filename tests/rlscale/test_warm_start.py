"""The warm start: what it trains on, when it stops, and what it leaves behind."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from kimi_linear.config import mla_twin, preset
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.config import WarmStartConfig
from rlscale.errors import UserError
from rlscale.learner.pass_rate import pass_rate
from rlscale.learner.warm_start import warm_start
from rlscale.tasks import Task, build_tokenizer, encode_prompt, encode_text, make_task

TOKENIZER = build_tokenizer()
EASY = {"alphabet": 3}


def llama(hidden_size: int = 48) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def kimi(architecture: str) -> KimiLinearForCausalLM:
    hybrid = preset("tiny")
    return KimiLinearForCausalLM(hybrid if architecture == "hybrid" else mla_twin(hybrid))


def batches_seen(
    model: PreTrainedModel, task: Task, seed: int, steps: int = 3
) -> list[dict[str, torch.Tensor]]:
    """The batches that a warm start trains on."""
    seen: list[dict[str, torch.Tensor]] = []

    def record(_: torch.nn.Module, __: tuple, inputs: dict) -> None:
        if inputs.get("labels") is not None:
            seen.append({key: value.clone() for key, value in inputs.items() if torch.is_tensor(value)})

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    config = WarmStartConfig(target_pass_rate=0.99, max_steps=steps, batch_size=5, evaluate_every=steps)
    with pytest.raises(UserError, match=r"short of 0\.99"):
        warm_start(model, TOKENIZER, task, config, seed)
    handle.remove()
    return seen


def test_training_stops_at_the_first_evaluation_that_reaches_the_target():
    torch.manual_seed(torch.seed())
    task = make_task("sorting", 6, EASY)
    model = llama()
    looks: list[tuple[int, float]] = []
    config = WarmStartConfig(
        target_pass_rate=0.3, max_steps=3000, batch_size=32, evaluate_every=25, learning_rate=3e-3
    )
    started = time.perf_counter()
    report = warm_start(model, TOKENIZER, task, config, 0, lambda *look: looks.append(look))
    assert looks[0][0] == 0
    assert [step for step, _ in looks] == list(range(0, report.steps + 1, 25))
    assert all(rate < 0.3 for _, rate in looks[:-1])
    assert looks[-1] == (report.steps, report.pass_rate)
    assert report.pass_rate >= 0.3
    assert report.tokens == report.steps * 32 * (1 + 6 + 1 + 6 + 1)
    assert 0 < report.wall_s < time.perf_counter() - started
    # The policy really is that good, on prompts that neither the training nor the stopping rule has seen.
    held_out = [task.problem("held_out", key) for key in range(64)]
    assert pass_rate(model, TOKENIZER, held_out) > 0.1
    correct = 0
    for problem in held_out:
        prompt = torch.tensor([encode_prompt(TOKENIZER, problem.prompt)])
        output = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=7
        )
        correct += output[0, prompt.shape[1] :].tolist() == [*encode_text(TOKENIZER, problem.answer), 2]
    assert correct > 64 * 0.15


class Bigrams(torch.nn.Module):
    """A policy whose next token depends on the last alone."""

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("cpu")
        self.embedding = torch.nn.Embedding(128, 32)
        self.head = torch.nn.Linear(32, 128, bias=False)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(input_ids))


def test_the_pass_rate_of_a_bfloat16_model_has_a_head_in_float32():
    torch.manual_seed(torch.seed())
    model: Any = Bigrams().bfloat16()
    task = make_task("reasoning_gym/chain_sum", 12, {})  # answers and prompts of mixed length
    problems = [task.problem("validation", key) for key in range(9)]
    logprobs = (model.embedding.weight.double() @ model.head.weight.double().T).log_softmax(-1)
    expected = []
    for problem in problems:
        prompt = encode_prompt(TOKENIZER, problem.prompt)
        ids = [*prompt, *encode_text(TOKENIZER, problem.answer), TOKENIZER.eos_token_id]
        pairs = zip(ids[len(prompt) - 1 : -1], ids[len(prompt) :], strict=True)
        expected.append(math.exp(sum(logprobs[last, token].item() for last, token in pairs)))
    found = pass_rate(model, TOKENIZER, problems)
    assert found == pytest.approx(sum(expected) / len(expected), rel=1e-4)


def test_a_pass_rate_is_the_same_however_few_problems_are_looked_at_at_a_time(monkeypatch):
    model, task = llama().double(), make_task("sorting", 6, EASY)
    problems = [task.problem("validation", key) for key in range(7)]
    whole = pass_rate(model, TOKENIZER, problems)
    monkeypatch.setattr("rlscale.learner.pass_rate._TOKENS_AT_A_TIME", 40)
    assert pass_rate(model, TOKENIZER, problems) == pytest.approx(whole, rel=1e-9)


@pytest.mark.parametrize("architecture", ["hybrid", "mla"])
def test_both_architectures_learn_and_keep_their_interface(architecture):
    model = kimi(architecture).eval()
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    task = make_task("sorting", 6, {"alphabet": 2})
    config = WarmStartConfig(target_pass_rate=0.05, max_steps=400, batch_size=8, evaluate_every=10)
    report = warm_start(model, TOKENIZER, task, config, seed=1)
    assert report.pass_rate >= 0.05
    assert not model.training
    assert "forward" not in vars(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(not torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_all_architectures_see_the_same_solutions_and_seeds_see_others():
    task = make_task("recall", 7, {})
    seen = [
        batches_seen(model, task, seed)
        for model, seed in ((kimi("hybrid"), 3), (kimi("mla"), 3), (llama(), 4))
    ]
    assert len(seen[0]) == len(seen[1]) == 3
    for hybrid, twin, other_seed in zip(*seen, strict=True):
        assert torch.equal(hybrid["input_ids"], twin["input_ids"])
        assert torch.equal(hybrid["labels"], twin["labels"])
        assert not torch.equal(hybrid["input_ids"], other_seed["input_ids"])
    assert len({tuple(row) for batch in seen[0] for row in batch["input_ids"].tolist()}) == 15


def test_the_loss_counts_the_answer_and_the_end_of_sequence_and_nothing_else():
    task = make_task("reasoning_gym/chain_sum", 12, {})  # answers and prompts of mixed length
    model = llama()
    seen = batches_seen(model, task, seed=0)
    for batch in seen:
        for ids, labels, mask in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True
        ):
            trained = labels[labels != -100].tolist()
            prompt = ids[mask.bool() & (labels == -100)].tolist()
            assert ids[mask.bool()].tolist() == [*prompt, *trained]
            assert prompt[0] == TOKENIZER.bos_token_id
            assert TOKENIZER.decode(prompt[1:]).endswith("\n")
            assert trained[-1] == TOKENIZER.eos_token_id
            assert 0 < len(trained) <= 13


@pytest.mark.parametrize("name", ["reversal", "reasoning_gym/chain_sum"])
@pytest.mark.parametrize("make", [lambda: llama(16), lambda: kimi("hybrid"), lambda: kimi("mla")])
def test_the_pass_rate_is_the_probability_of_sampling_the_answer(make, name):
    task = make_task(name, 3, {})
    model = make()
    # Sharper than a fresh model's, so that the probabilities differ between problems.
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    problems = [task.problem("validation", key) for key in range(9)]
    expected = 0.0
    for problem in problems:
        ids = encode_prompt(TOKENIZER, problem.prompt)
        probability = 1.0
        for token in [*encode_text(TOKENIZER, problem.answer), TOKENIZER.eos_token_id]:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids])).logits[0, -1]
            probability *= logits.double().softmax(-1)[token].item()
            ids.append(token)
        expected += probability / len(problems)
    assert pass_rate(model, TOKENIZER, problems) == pytest.approx(expected, rel=1e-3)


def test_a_target_of_zero_trains_nothing():
    model = llama(16)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    report = warm_start(model, TOKENIZER, make_task("stack", 5, {}), WarmStartConfig(target_pass_rate=0), 0)
    assert (report.steps, report.tokens) == (0, 0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_a_target_out_of_reach_is_an_error_that_says_what_was_reached():
    config = WarmStartConfig(target_pass_rate=0.9, max_steps=7, batch_size=2, evaluate_every=5)
    looks: list[int] = []
    with pytest.raises(UserError, match=r"0\.000, short of 0\.9, in 7 steps: raise warm_start\.max_steps"):
        warm_start(
            llama(16), TOKENIZER, make_task("reversal", 9, {}), config, 0, lambda step, _: looks.append(step)
        )
    assert looks == [0, 5, 7]


def test_nothing_is_left_on_disk_or_printed(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    before = sorted(cache.rglob("*")) if cache.exists() else []
    batches_seen(llama(16), make_task("reversal", 4, {}), seed=0)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "scratch"]
    assert (sorted(cache.rglob("*")) if cache.exists() else []) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("architecture", ["hybrid", "mla"])
def test_weights_in_bfloat16_take_steps_that_bfloat16_would_round_away(architecture: str) -> None:
    torch.manual_seed(torch.seed())
    model = kimi(architecture).to(torch.bfloat16)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    # A step moves the norms' ones by 3e-4 at most; their neighbours are 0.004 and 0.008 away.
    config = WarmStartConfig(
        target_pass_rate=0.99, max_steps=40, batch_size=4, learning_rate=3e-4, evaluate_every=40
    )
    with pytest.raises(UserError, match=r"short of 0\.99"):
        warm_start(model, TOKENIZER, make_task("sorting", 6, EASY), config, 0)
    moved = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    assert "model.norm.weight" in moved
    assert all(parameter.dtype == before[name].dtype for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
