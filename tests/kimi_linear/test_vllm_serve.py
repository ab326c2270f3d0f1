"""`vllm serve` finds the plugin by itself and serves a checkpoint through the OpenAI API."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import openai
import pytest
import torch
from reference_models import random_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from kimi_linear.config import preset
from kimi_linear.model import KimiLinearForCausalLM

pytestmark = pytest.mark.vllm

START_S = 400  # on a machine that does other work too


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def model() -> KimiLinearForCausalLM:
    torch.manual_seed(5)
    return random_model(preset("tiny"))


@pytest.fixture(scope="module")
def client(model: KimiLinearForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[openai.OpenAI]:
    folder = tmp_path_factory.mktemp("served")
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<bos>": 1, "<eos>": 2, **{f"w{i}": i for i in range(3, 128)}}
    raw = Tokenizer(WordLevel(words, unk_token="<pad>"))
    raw.pre_tokenizer = Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)
    port = free_port()
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", "kimi"),
        *("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "4", "--enforce-eager"),
        *("--no-enable-prefix-caching", "--kv-cache-memory-bytes", str(64 << 20)),
    ]
    log = (folder / "log").open("w")
    server = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "VLLM_NO_USAGE_STATS": "1"}
    )
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    end = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < end:
        try:
            client.models.list()
            break
        except openai.APIConnectionError:
            time.sleep(1)
    else:
        server.kill()
        pytest.fail((folder / "log").read_text()[-4000:])
    yield client
    server.terminate()
    server.wait(60)
    log.close()


def greedy(model: KimiLinearForCausalLM, prompt: list[int], length: int) -> list[int]:
    ids = list(prompt)
    for _ in range(length):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_completions_over_http_are_the_models_own(
    client: openai.OpenAI, model: KimiLinearForCausalLM
) -> None:
    prompts = [[5, 6, 7], list(range(3, 60))]
    answer = client.completions.create(
        model="kimi", prompt=prompts, max_tokens=12, temperature=0, extra_body={"ignore_eos": True}
    )
    for prompt, choice in zip(prompts, answer.choices, strict=True):
        expected = " ".join(f"w{i}" for i in greedy(model, prompt, 12) if i > 2)
        assert choice.text.split() == expected.split()


def test_text_prompts_stream_token_by_token(client: openai.OpenAI, model: KimiLinearForCausalLM) -> None:
    pieces = client.completions.create(
        model="kimi",
        prompt="w9 w8",
        max_tokens=6,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    texts = [piece.choices[0].text for piece in pieces]
    expected = [f"w{i}" for i in greedy(model, [9, 8], 6) if i > 2]
    assert "".join(texts).split() == expected
    assert len(texts) > 1
