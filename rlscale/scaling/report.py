"""`rlscale report`: one HTML page that holds all it shows, for people who decide from it.

The page is a shell (`page/`), Plotly's script and the data below; it asks no network for anything. Figures
are drawn when they are scrolled to, so that hundreds of runs open at once.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

from rlscale.errors import UserError
from rlscale.runs import RunRecord, find_runs
from rlscale.runs.reading import read_samples
from rlscale.scaling import report_figures as draw
from rlscale.scaling.crossing import crossings
from rlscale.scaling.curves import fit_axes
from rlscale.scaling.leads import leads
from rlscale.scaling.series import by_cell, over_steps, require_comparable
from rlscale.scaling.style import CACHE_CLAIMS, THROUGHPUT_CLAIMS
from rlscale.scaling.summary import hybrid_to_mla, summarise
from rlscale.scaling.verdict import judge

_LONGEST_TEXT = 4000  # characters of a sample's prompt, completion or answer that the page holds


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Writes the page about all runs at or below `folders` to the file `out`, and returns it.

    Raises:
        UserError: no runs there, runs of different tasks or model shapes, no Plotly, or `out` cannot be
            written.
    """
    plotly_script()  # before minutes of fits, not after them
    text = page(report_data(folders))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"the report cannot go to {out} ({error.strerror}): choose another file") from None
    return out


def report_data(folders: Sequence[Path]) -> dict[str, Any]:
    """What the page shows: verdict, figures, runs with settings and samples, as JSON can hold it.

    Raises:
        UserError: no runs there, or runs of different tasks or model shapes.
    """
    runs = find_runs(folders)
    require_comparable(runs)
    cells = by_cell(runs)
    rows = summarise(runs)
    ratios, crossed = hybrid_to_mla(rows), crossings(rows)
    curves, found = fit_axes(cells), leads(runs)
    figures = [
        draw.pass_rates(cells, curves),
        draw.crossing(crossed),
        draw.lead_figure(found),
        draw.ratio_figure(ratios),
        draw.against_length(
            *("throughput", "Rollout throughput", "rollout_tokens_per_s", "tokens per second"),
            *(1.0, THROUGHPUT_CLAIMS, cells),
        ),
        draw.against_length(
            *("cache", "Cache of the longest sequence", "cache_bytes_per_sequence", "KiB per sequence"),
            *(1 / 1024, CACHE_CLAIMS, cells),
        ),
        draw.fit_parameters(curves["generated_tokens"]),
        draw.step_times(cells),
        draw.diagnostics(cells),
    ]
    settings = [_flat(run.config.model_dump(mode="json")) for run in runs]
    common = {
        key: Counter(s.get(key, "–") for s in settings).most_common(1)[0][0]
        for key in sorted({key for s in settings for key in s})
    }
    shown = [
        _run(str(i), run, _name(run, folders)) | {"settings": _differing(s, common)}
        for i, (run, s) in enumerate(zip(runs, settings, strict=True))
    ]
    counts = Counter(run.state for run in runs)
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    states = ", ".join(
        f"{counts[state]} {state}" for state in ("finished", "running", "stopped", "failed") if counts[state]
    )
    return {
        "title": ", ".join(folder.resolve().name for folder in folders),
        "state": f"{runs[0].config.task.name}, {len(runs)} runs: {states}. Made {made}.",
        "verdict": asdict(judge(runs, ratios, crossed, curves["generated_tokens"], found)),
        "figures": [asdict(figure) for figure in figures if figure is not None],
        "runs": shown,
        "common": common,
        "pair": _pair(runs),
        "live_s": 0,
    }


def plotly_script() -> str:
    """Plotly's own JavaScript, as its package ships it.

    Raises:
        UserError: Plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise UserError("the report needs Plotly: pip install plotly") from None
    return str(get_plotlyjs())


def page(data: dict[str, Any]) -> str:
    """The page around its data; raises as `plotly_script`."""
    parts = resources.files("rlscale.scaling") / "page"
    text = (parts / "report.html").read_text(encoding="utf-8")
    # In a script element only "<" can end it; JSON writes it as an escape just as well.
    inlined = json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
    for mark, part in (
        ("__STYLE__", (parts / "report.css").read_text(encoding="utf-8")),
        ("__SCRIPT__", (parts / "report.js").read_text(encoding="utf-8")),
        ("__PLOTLY__", plotly_script()),
        ("__DATA__", inlined),
    ):
        before, after = text.split(mark)
        text = before + part + after
    return text


def _run(id: str, run: RunRecord, name: str) -> dict[str, Any]:
    """A row of the table, and the run's samples."""
    config, evaluations = run.config, run.evaluations
    start = evaluations[0]["pass_rate"] if evaluations else None
    end = evaluations[-1]["pass_rate"] if evaluations else None
    cache = over_steps(run, "cache_bytes_per_sequence")
    wall_s = run.metrics[-1].get("wall_s") if run.metrics else None
    row = {
        "id": id,
        "name": name,
        "architecture": config.architecture,
        "required_length": config.task.required_length,
        "budget": config.budget,
        "seed": config.seed,
        "state": run.state,
        "reason": run.status.get("reason", ""),
        "step": run.status.get("step", 0),
        "pass_rate_start": start,
        "pass_rate_end": end,
        "gain": end - start if start is not None and end is not None else None,
        "rollout_tokens_per_s": over_steps(run, "rollout_tokens_per_s"),
        "cache_kib": cache / 1024 if cache is not None else None,
        "minutes": wall_s / 60 if wall_s is not None else None,
    }
    words = (name, row["architecture"], f"{config.task.required_length} tokens", row["state"], row["reason"])
    row["text"] = " ".join(words).lower()  # what the page's filter looks into
    return row | {"samples": _samples(run.path)}


def _samples(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Of the first and of the last step that has any."""
    samples = read_samples(folder)
    steps = [sample["step"] for sample in samples]
    by_step = {step: [_short(s) for s in samples if s["step"] == step] for step in {*steps[:1], *steps[-1:]}}
    return {"first": by_step[steps[0]], "last": by_step[steps[-1]]} if steps else {"first": [], "last": []}


def _short(sample: dict[str, Any]) -> dict[str, Any]:
    def cut(text: str) -> str:
        rest = len(text) - _LONGEST_TEXT
        return text if rest <= 0 else f"{text[:_LONGEST_TEXT]} … ({rest:,} more characters in samples.jsonl)"

    return {key: cut(value) if isinstance(value, str) else value for key, value in sample.items()}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted keys and their values as text."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False)
    return flat


def _differing(settings: dict[str, str], common: dict[str, str]) -> dict[str, str]:
    return {key: settings.get(key, "–") for key, value in common.items() if settings.get(key, "–") != value}


def _name(run: RunRecord, folders: Sequence[Path]) -> str:
    """The run's path below the folder that was named."""
    for folder in folders:
        if run.path.is_relative_to(folder):
            below = run.path.relative_to(folder)
            return str(below) if below.parts else folder.resolve().name
    return run.path.name


def _pair(runs: Sequence[RunRecord]) -> list[str]:
    """The two runs shown side by side at first: a hybrid and full MLA of the longest cell, if there are."""
    order = sorted(
        range(len(runs)), key=lambda i: (-runs[i].config.task.required_length, runs[i].config.seed)
    )
    left = next((i for i in order if runs[i].config.architecture != "mla"), order[0])
    others = [i for i in order if runs[i].config.architecture != runs[left].config.architecture]
    right = next((i for i in others if runs[i].config.architecture == "mla"), next(iter(others), left))
    return [str(left), str(right)]
