"""Kimi Linear's synthetic tests (arXiv:2510.26692, section 5.1) for KDA, Gated DeltaNet and full MLA.

    python experiments/synthetic/study.py experiments/synthetic/cpu.yaml --workers 2
    python experiments/synthetic/study.py experiments/synthetic/gpu.yaml --minutes 6

Every cell of the grid adds a line to results/NAME.jsonl when it is done. The same command goes on where an
earlier one was stopped: what is in the file is not run again, and a cell cut short by --minutes continues
from its state in results/NAME_unfinished/. See README.md beside it for what was found.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import queue
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from pydantic import Field
from torch import nn
from transformers import KimiLinearConfig

from kimi_linear.config import gated_deltanet_twin, mla_twin, parameter_count, preset
from kimi_linear.layers import KimiDeltaAttention
from kimi_linear.model import KimiLinearForCausalLM
from rlscale.config import load_config
from rlscale.errors import UserError
from rlscale.learner.graphed import GraphedStep
from rlscale.sections import Section
from rlscale.tasks.streams import IGNORED, STREAMS, Stream

RESULTS = Path(__file__).parent / "results"
HELD_OUT_SEED = 2**40
Architecture = Literal["kda", "kda_even", "gated_deltanet", "mla"]


class StudyConfig(Section):
    """A grid of models that learn a task each; cells run in the order of the lists, seeds outermost."""

    architectures: list[Architecture] = Field(["kda", "gated_deltanet", "mla"], min_length=1)
    """What mixes tokens, in both layers. All have KDA's number of parameters within 1%, by the width of the
    MLPs. `kda_even` is KDA whose channels begin with one decay a head, as Gated DeltaNet's heads have."""
    tasks: dict[str, dict[str, int]] = Field({"palindrome": {}, "recall": {}, "stack": {}}, min_length=1)
    """Names of `rlscale.tasks.streams` with their options."""
    lengths: list[Annotated[int, Field(ge=6)]] = Field([256, 512, 1024, 2048], min_length=1)
    """Tokens of a sequence."""
    learning_rates: list[Annotated[float, Field(gt=0)]] = Field([1e-3, 5e-4, 1e-4, 5e-5], min_length=1)
    """The paper's grid, in the order in which they are likely to be best."""
    seeds: list[Annotated[int, Field(ge=0)]] = Field([0], min_length=1)
    """Of initial weights and data."""
    heads: int = Field(2, ge=1)
    """Of each layer."""
    head_dim: int = Field(128, ge=2)
    """Keys and values of a head; the width of the model is heads x head_dim."""
    intermediate_size: int = Field(512, ge=1)
    """Width of KDA's MLPs."""
    steps: int = Field(20_000, ge=1)
    """At most."""
    tokens_per_step: int = Field(16_384, ge=1)
    """Tokens of a batch, of any length."""
    warmup_steps: int = Field(100, ge=1)
    """Of linear warm-up; the learning rate is constant afterwards."""
    evaluate_every: int = Field(100, ge=1)
    """Steps between two looks at the held-out sequences."""
    held_out: int = Field(128, ge=1)
    """Held-out sequences, the same for all cells of a task and length."""
    solved: float = Field(0.999, gt=0, le=1)
    """Held-out accuracy that ends a cell after three looks in a row."""
    lanes: int = Field(1, ge=1)
    """Cells that a process trains at the same time, on GPU streams of their own."""
    graphs: bool = True
    """Take a GPU's steps as CUDA graphs; false launches each kernel by itself, which is slow and plain."""


@dataclass(frozen=True)
class Cell:
    task: str
    length: int
    architecture: Architecture
    learning_rate: float
    seed: int

    @property
    def file(self) -> str:
        return f"{self.task}_{self.length}_{self.architecture}_{self.learning_rate:g}_{self.seed}.pt"


def cells(config: StudyConfig) -> list[Cell]:
    axes = (config.seeds, config.learning_rates, config.lengths, config.tasks, config.architectures)
    return [Cell(t, n, a, lr, seed) for seed, lr, n, t, a in itertools.product(*axes)]


def stream_of(config: StudyConfig, task: str) -> Stream:
    if task not in STREAMS:
        raise UserError(f"no task {task!r}: there are {', '.join(STREAMS)}")
    try:
        return STREAMS[task](**config.tasks[task])
    except TypeError as error:
        raise UserError(f"tasks.{task}: {error}") from None


def shape(config: StudyConfig, architecture: Architecture, vocabulary: int, length: int) -> KimiLinearConfig:
    """Two layers of KDA, or a twin. MLA's queries are half of them rotated; its latents lose nothing."""
    dim = config.head_dim
    kda = preset(
        "tiny",
        {
            "vocab_size": -(-vocabulary // 16) * 16,
            "hidden_size": config.heads * dim,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": 2,
            "full_attention_layers": [],
            "linear_num_heads": config.heads,
            "linear_head_dim": dim,
            "num_attention_heads": config.heads,
            "qk_nope_head_dim": dim // 2,
            "qk_rope_head_dim": dim // 2,
            "v_head_dim": dim,
            "kv_lora_rank": config.heads * dim,
            "first_k_dense_replace": 2,
            "model_max_length": length,
        },
    )
    twins = {"gated_deltanet": gated_deltanet_twin(kda), "mla": mla_twin(kda)}
    return twins.get(architecture, kda)


@torch.no_grad()
def even_decays(model: KimiLinearForCausalLM) -> None:
    """Gives all channels of a KDA head the time step that its first one began with."""
    for layer in model.modules():
        if isinstance(layer, KimiDeltaAttention):
            heads = layer.dt_bias.view(layer.A_log.numel(), -1)
            heads.copy_(heads[:, :1].clone().expand_as(heads))


class Lane:
    """One cell in training: float32 weights take the steps, a copy of them in `dtype` computes."""

    def __init__(
        self, config: StudyConfig, cell: Cell, device: torch.device, dtype: torch.dtype, unfinished: Path
    ) -> None:
        self.config, self.cell, self.device = config, cell, device
        self.state_file = unfinished / cell.file
        self.stream = stream_of(config, cell.task)
        self.rows = max(1, config.tokens_per_step // cell.length)
        self.generator = torch.Generator(device).manual_seed(cell.seed)
        torch.manual_seed(cell.seed)
        architecture = shape(config, cell.architecture, self.stream.vocabulary, cell.length)
        self.parameters = parameter_count(architecture).total
        self.model = KimiLinearForCausalLM(architecture).to(device)
        if cell.architecture == "kda_even":
            even_decays(self.model)
        self.masters = list(self.model.parameters())
        if dtype != torch.float32:
            self.masters = [nn.Parameter(p.detach().clone()) for p in self.masters]
            self.model.to(dtype)
        self.learning_rate = torch.zeros((), device=device)
        self.taken = torch.zeros((), dtype=torch.int64, device=device)
        self.adamw = torch.optim.AdamW(
            self.masters, self.learning_rate, weight_decay=0.0, fused=True, capturable=device.type == "cuda"
        )
        held_out = torch.Generator(device).manual_seed(HELD_OUT_SEED)
        self.held_out = self.stream.draw(config.held_out, cell.length, held_out)
        if not bool((self.held_out[1] != IGNORED).any()):
            raise UserError(f"{cell.task} asks nothing in {cell.length} tokens: raise lengths")
        block = (config.evaluate_every, self.rows, cell.length)
        self.ids, self.targets = (torch.zeros(block, dtype=torch.int64, device=device) for _ in range(2))
        side = torch.cuda.Stream() if device.type == "cuda" and config.graphs else None
        self.step = GraphedStep(self._train, side)
        self.steps, self.seconds = 0, 0.0
        self.curve: list[list[float]] = []
        if self.state_file.exists():
            self._load()

    def draw(self) -> None:
        """Fresh data for the steps until the next look."""
        block = (self.config.evaluate_every * self.rows, self.cell.length)
        for place, drawn in zip(
            (self.ids, self.targets), self.stream.draw(*block, self.generator), strict=True
        ):
            place.copy_(drawn.view_as(place))

    def look(self) -> None:
        """Held-out accuracy, by tokens asked for and by whole sequences, and loss."""
        self.steps += self.config.evaluate_every
        right, whole, asked, loss = 0.0, 0.0, 0.0, 0.0
        with torch.no_grad():
            for ids, targets in zip(*(x.split(self.rows) for x in self.held_out), strict=True):
                logits = self.model(input_ids=ids).logits.float()
                where = targets != IGNORED
                hits = (logits.argmax(-1) == targets) & where
                right += hits.sum().item()
                whole += (hits == where).all(1).sum().item()
                asked += where.sum().item()
                loss += F.cross_entropy(
                    logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum"
                ).item()
        self.curve.append([self.steps, right / asked, whole / self.config.held_out, loss / asked])

    @property
    def done(self) -> bool:
        last = [look[1] for look in self.curve[-3:]]
        solved = len(last) == 3 and min(last) >= self.config.solved
        return solved or self.steps >= self.config.steps

    def record(self) -> dict[str, Any]:
        device = torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu"
        return asdict(self.cell) | {
            "parameters": self.parameters,
            "steps": self.steps,
            "rows": self.rows,
            "seconds": round(self.seconds, 2),
            "device": device,
            "torch": torch.__version__,
            "curve": [[int(step), *(round(x, 5) for x in rest)] for step, *rest in self.curve],
        }

    def save(self) -> None:
        state = {
            "masters": [p.detach() for p in self.masters],
            "adamw": self.adamw.state_dict()["state"],
            "taken": self.taken,
            "generator": self.generator.get_state(),
            "progress": (self.steps, self.seconds, self.curve),
        }
        self.state_file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, self.state_file)

    def _load(self) -> None:
        state = torch.load(self.state_file, map_location=self.device)
        with torch.no_grad():
            for ours, theirs in zip(self.masters, state["masters"], strict=True):
                ours.copy_(theirs)
        settings = self.adamw.state_dict()
        self.adamw.load_state_dict(settings | {"state": state["adamw"]})
        # Loading replaces the learning rate by a copy; the step writes into ours.
        self.adamw.param_groups[0]["lr"] = self.learning_rate
        self.taken.copy_(state["taken"])
        self.generator.set_state(state["generator"].cpu())
        self.steps, self.seconds, self.curve = state["progress"]
        self._round()

    def _train(self) -> torch.Tensor:
        """A step on the block's next batch; all it depends on stands in tensors that keep their place."""
        place = (self.taken % self.config.evaluate_every).view(1)
        self.taken += 1
        warmth = (self.taken / self.config.warmup_steps).clamp(max=1)
        self.learning_rate.copy_(self.cell.learning_rate * warmth)
        ids, targets = (x.index_select(0, place).squeeze(0) for x in (self.ids, self.targets))
        logits = self.model(input_ids=ids).logits
        loss = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        loss = loss / (targets != IGNORED).sum().clamp(min=1)  # a small batch of stacks may ask nothing
        loss.backward()
        gradients = [p.grad for p in self.model.parameters()]
        for master, gradient in zip(self.masters, gradients, strict=True):
            assert gradient is not None
            master.grad = gradient.float()
        nn.utils.clip_grad_norm_(self.masters, 1.0, foreach=True)
        self.adamw.step()
        self._round()
        for parameter in (*self.model.parameters(), *self.masters):
            parameter.grad = None
        return loss.detach()

    @torch.no_grad()
    def _round(self) -> None:
        if self.masters[0] is not next(self.model.parameters()):
            torch._foreach_copy_(list(self.model.parameters()), self.masters)


def work(config: StudyConfig, waiting: Any, out: Path, deadline: float, device_name: str) -> None:
    """Trains cells from the queue until it is empty or the time is over; one process of several."""
    torch.set_num_threads(1)
    device = torch.device(device_name)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    unfinished = out.with_name(f"{out.stem}_unfinished")
    lanes: list[Lane] = []
    while True:
        while len(lanes) < config.lanes and time.time() < deadline:
            try:
                lanes.append(Lane(config, waiting.get(timeout=0.2), device, dtype, unfinished))
            except queue.Empty:
                break
        if not lanes:
            return
        started = time.perf_counter()
        for lane in lanes:
            lane.draw()
        if device.type == "cuda":
            torch.cuda.synchronize()
        for _ in range(config.evaluate_every):
            for lane in lanes:
                lane.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / len(lanes)
        for lane in list(lanes):
            lane.seconds += seconds
            lane.look()
            if lane.done:
                with out.open("a") as file:
                    file.write(json.dumps(lane.record()) + "\n")
                lane.state_file.unlink(missing_ok=True)
                lanes.remove(lane)
                step, accuracy, whole, _ = lane.curve[-1]
                print(
                    f"{lane.cell} {step:,.0f} steps {lane.seconds:.0f} s: {accuracy:.3f} {whole:.3f}",
                    flush=True,
                )
            elif time.time() >= deadline:
                lane.save()
                lanes.remove(lane)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def unfinished_first(config: StudyConfig, out: Path) -> list[Cell]:
    """The cells that `out` lacks, those begun before all others."""
    done = {tuple(record[key] for key in Cell.__dataclass_fields__) for record in read(out)}
    left = [cell for cell in cells(config) if tuple(asdict(cell).values()) not in done]
    begun = out.with_name(f"{out.stem}_unfinished")
    return sorted(left, key=lambda cell: not (begun / cell.file).exists())


def main(
    config_file: Annotated[Path, typer.Argument(metavar="CONFIG", help="cpu.yaml or gpu.yaml, or your own.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...")] = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes of one thread.")] = 1,
    minutes: Annotated[float, typer.Option(min=0, help="Stop then; 0 never.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the results.")] = RESULTS,
) -> None:
    """Train what the results lack."""
    deadline = time.time() + 60 * minutes if minutes else float("inf")
    try:
        config = load_config(StudyConfig, config_file, overrides or ())
        for task, length in itertools.product(config.tasks, config.lengths):
            stream_of(config, task).check(length)
    except (UserError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    out = output / f"{config_file.stem}.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    left = unfinished_first(config, out)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{len(left)} of {len(cells(config))} cells to do on {device}", flush=True)
    context = multiprocessing.get_context("spawn")
    waiting = context.Queue()
    for cell in left:
        waiting.put(cell)
    arguments = (config, waiting, out, deadline, device)
    if workers == 1:
        work(*arguments)
    else:
        processes = [context.Process(target=work, args=arguments) for _ in range(workers)]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
    waiting.cancel_join_thread()
    still = len(unfinished_first(config, out))
    print(f"{still} cells left; the same command goes on" if still else "all cells done", flush=True)


if __name__ == "__main__":
    typer.run(main)
