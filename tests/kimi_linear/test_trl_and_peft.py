"""TRL's trainers and PEFT take the model as they take any transformers model."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from reference_models import random_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from kimi_linear.config import preset
from kimi_linear.model import KimiLinearForCausalLM

LORA = LoraConfig(r=4, target_modules=["q_proj", "kv_b_proj", "o_proj", "gate_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, 128)}}
    raw = Tokenizer(WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )


def counting_dataset() -> Dataset:
    """Sequences that count upwards, of several lengths so that batches are padded."""
    rows = [[3 + (start + i) % 100 for i in range(6 + start % 5)] for start in range(16)]
    return Dataset.from_dict({"input_ids": rows})


def test_supervised_training_with_trl_lowers_the_loss_and_saves(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = KimiLinearForCausalLM(preset("tiny"))
    ids = torch.tensor([counting_dataset()[0]["input_ids"]])
    before = model(ids, labels=ids).loss.item()
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=counting_dataset(),
        args=SFTConfig(
            output_dir=str(tmp_path),
            max_steps=8,
            per_device_train_batch_size=8,
            learning_rate=3e-3,
            lr_scheduler_type="constant",
            gradient_checkpointing=True,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    assert model(ids, labels=ids).loss.item() < before - 0.5
    trainer.save_model(str(tmp_path / "saved"))
    again = KimiLinearForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)


def test_grpo_with_trl_generates_and_takes_a_step(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = KimiLinearForCausalLM(preset("tiny"))
    before = model.lm_head.weight.detach().clone()

    def count_even_words(completions: list[str], **unused: object) -> list[float]:  # noqa: ARG001 (TRL's call)
        return [
            float(sum(int(word[1:]) % 2 for word in c.split() if word[1:].isdigit())) for c in completions
        ]

    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=count_even_words,
        train_dataset=Dataset.from_dict({"prompt": ["w5 w6", "w7 w8 w9"]}),
        args=GRPOConfig(
            output_dir=str(tmp_path),
            max_steps=1,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=5,
            learning_rate=1e-3,
            report_to="none",
            use_cpu=True,
            bf16=False,
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    assert not torch.equal(before, model.lm_head.weight)


def test_lora_trains_its_adapters_alone_and_merges_to_the_same_logits(tmp_path: Path) -> None:
    base = random_model(preset("tiny"))
    frozen = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    model = get_peft_model(base, LORA)
    ids = torch.randint(3, 128, (2, 30))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    adapted = model(input_ids=ids).logits
    # The cached step reads the latent projection's weight, so it must see the adapter too.
    _, cache = base.prefill(ids[:, :29].flatten(), torch.tensor([0, 29, 58]))
    torch.testing.assert_close(base.decode(ids[:, 29], cache), adapted[:, -1], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    changed = {n for n, t in merged.state_dict().items() if not torch.equal(t, frozen[n])}
    assert {name.split(".")[-2] for name in changed} == set(LORA.target_modules)

    fresh = KimiLinearForCausalLM(preset("tiny"))
    fresh.load_state_dict(frozen)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(loaded(input_ids=ids).logits, adapted, rtol=1e-4, atol=1e-4)
