"""The report: what its data say, and the page clicked through in a browser."""

from __future__ import annotations

import http.client
import itertools
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from synthetic_runs import write_run, write_sweep

from rlscale.config import RunConfig, parse_config
from rlscale.errors import UserError
from rlscale.runs import RunFolder, find_runs
from rlscale.scaling import live
from rlscale.scaling.crossing import crossings
from rlscale.scaling.leads import leads
from rlscale.scaling.report import page, report_data, write_report
from rlscale.scaling.summary import hybrid_to_mla
from rlscale.scaling.verdict import judge, unrecorded

SLOW_MS = 60_000  # a browser on a busy machine
HOSTILE = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both architectures at three lengths with three seeds, one unfinished run, one that failed."""
    folder = write_sweep(tmp_path_factory.mktemp("report") / "sweep", seeds=(0, 1, 2), steps=60)
    write_run(folder / "going-on", "hybrid", 128, 3, steps=60, finish=False)
    config = parse_config(
        RunConfig, {"seed": 9, "task": {"required_length": 32}, "learner": {"warmup_steps": 7}}
    )
    with RunFolder.create(folder / "broken", config) as run:
        run.log_evaluation(0, {"pass_rate": 0.25, "generated_tokens": 0, "wall_s": 0.0})
        hostile = {"prompt": HOSTILE, "answer": HOSTILE, "completion": "x" * 5000, "reward": 0.0}
        run.log_samples(0, [{**hostile, "truncated": True}])
        run.fail("the worker died")
    return folder


@pytest.fixture(scope="module")
def data(sweep: Path) -> dict[str, Any]:
    return report_data([sweep])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = shutil.which("chromium")
    assert found, "these tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"], timeout=SLOW_MS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def url(data: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(data), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def opened(browser: Browser, url: str) -> Iterator[Page]:
    """The page on a desk's width, without a network; errors of its scripts fail the test."""
    with browser.new_context(viewport={"width": 1280, "height": 900}, offline=True) as context:
        context.set_default_timeout(SLOW_MS)
        errors: list[str] = []
        tab = context.new_page()
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        tab.goto(url)
        yield tab
        assert errors == []


def column(tab: Page, number: int) -> list[str]:
    return tab.locator(f"#table tbody td:nth-child({number})").all_inner_texts()


def test_one_file_holds_the_page_and_it_asks_the_network_for_nothing(
    browser: Browser, tmp_path: Path
) -> None:
    write_run(tmp_path / "run", "hybrid", 32, 0, steps=3)
    out = write_report([tmp_path], tmp_path / "report.html")
    with browser.new_context() as context:
        asked: list[str] = []
        context.on("request", lambda request: asked.append(request.url))
        tab = context.new_page()
        tab.goto(out.as_uri())
        tab.locator(".plot .main-svg").first.wait_for(timeout=SLOW_MS)
        assert asked == [out.as_uri()]


def test_figures_are_drawn_when_they_are_scrolled_to(opened: Page) -> None:
    opened.locator(".plot .main-svg").first.wait_for()
    plots = opened.locator(".plot")
    assert plots.count() == 9
    assert opened.locator(".plot:has(.main-svg)").count() < plots.count()
    for i in range(plots.count()):
        plots.nth(i).scroll_into_view_if_needed()
        plots.nth(i).locator(".main-svg").first.wait_for()
    titles = opened.locator(".card h3").all_inner_texts()
    assert "Held-out pass rate" in titles
    assert "From which output length on the hybrid is ahead" in titles


def test_printing_draws_the_figures_that_nobody_has_scrolled_to(opened: Page) -> None:
    opened.locator(".plot .main-svg").first.wait_for()
    plots = opened.locator(".plot")
    assert opened.locator(".plot:has(.main-svg)").count() < plots.count()
    opened.pdf()
    expect(opened.locator(".plot:has(.main-svg)")).to_have_count(plots.count())


def test_marks_of_the_architectures_do_not_lie_over_one_another(data: dict[str, Any]) -> None:
    (figure,) = [figure for figure in data["figures"] if figure["id"] == "parameters"]
    hybrid, mla = figure["plots"]["0"]["data"]
    assert not set(hybrid["x"]) & set(mla["x"])


def test_choices_change_what_a_figure_shows(opened: Page) -> None:
    card = opened.locator(".card[data-id=pass_rates]")
    axis = card.locator(".xtitle")
    expect(axis).to_have_text("generated tokens", timeout=SLOW_MS)
    expect(card.locator(".legendtext", has_text="A = ")).to_have_count(2)
    card.get_by_label("Against").select_option("RL steps")
    expect(axis).to_have_text("RL steps")
    card.get_by_label("Length").select_option("128 tokens")
    shown = card.locator(".plot").evaluate("plot => Math.max(...plot.data[0].x)")
    assert shown == 60


def test_a_column_sorts_both_ways_and_filters_narrow_the_table(opened: Page) -> None:
    expect(opened.locator("#count")).to_have_text("20 of 20 runs")
    opened.get_by_role("button", name="length").click()
    lengths = [int(text) for text in column(opened, 3)]
    assert lengths == sorted(lengths)
    header = opened.locator("th", has_text="length")
    expect(header).to_have_attribute("aria-sort", "ascending")
    opened.get_by_role("button", name="length").click()
    assert [int(text) for text in column(opened, 3)] == lengths[::-1]
    # A run without a value stays last either way.
    opened.get_by_role("button", name="tokens/s").click()
    assert column(opened, 11)[-1] == "–"
    opened.get_by_role("button", name="tokens/s").click()
    assert column(opened, 11)[-1] == "–"

    opened.get_by_label("Architecture").select_option("mla")
    opened.get_by_label("Filter").fill("finished 64")
    expect(opened.locator("#count")).to_have_text("3 of 20 runs")
    assert set(column(opened, 1)) == {"mla-64-0", "mla-64-1", "mla-64-2"}
    opened.get_by_label("Architecture").select_option("")
    opened.get_by_label("Filter").fill("")
    opened.get_by_label("State").select_option("failed")
    assert column(opened, 1) == ["broken"]


def test_two_runs_are_read_side_by_side_with_the_settings_that_differ(opened: Page) -> None:
    opened.get_by_role("button", name="hybrid-64-1", exact=True).click()
    opened.get_by_role("button", name="mla-32-2", exact=True).click()
    rows = opened.locator("#settings tbody tr").all_inner_texts()
    assert 'architecture\t"hybrid"\t"mla"\t"hybrid"' in rows
    assert "task.required_length\t64\t32\t32" in rows or "task.required_length\t64\t32\t128" in rows
    samples = opened.locator("#samples .sample")
    assert samples.count() == 2
    expect(samples.nth(0)).to_contain_text("hybrid asks at step 60")
    expect(samples.nth(1)).to_contain_text("mla asks at step 60")
    opened.get_by_label("Samples of").select_option("first")
    expect(samples.nth(1)).to_contain_text("mla asks at step 0")
    assert opened.locator("#table tr.left").inner_text().startswith("hybrid-64-1")


def test_what_a_run_wrote_is_shown_as_text_and_never_run(opened: Page) -> None:
    opened.get_by_label("Left").select_option("broken")
    sample = opened.locator("#samples .sample").first
    expect(sample).to_contain_text(HOSTILE)
    expect(sample).to_contain_text("(1,000 more characters in samples.jsonl)")
    assert opened.evaluate("window.hacked") is None
    expect(opened.locator("#settings tbody")).to_contain_text("learner.warmup_steps")


def test_a_phone_shows_all_of_it_without_scrolling_sideways(browser: Browser, url: str) -> None:
    with browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True) as context:
        tab = context.new_page()
        tab.goto(url)
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        for control in tab.locator("select, input").all():
            box = control.bounding_box()
            assert box is not None
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= 390
        plot = tab.locator(".plot").first
        plot.scroll_into_view_if_needed()
        plot.locator(".main-svg").first.wait_for(timeout=SLOW_MS)
        assert tab.locator("#table tbody td").first.evaluate("cell => cell.offsetWidth") > 100


def test_five_hundred_runs_open_in_three_seconds_of_one_core(
    browser: Browser, data: dict[str, Any], tmp_path: Path
) -> None:
    many = deepcopy(data)
    copies = [deepcopy(data["runs"][i % len(data["runs"])]) | {"id": str(i)} for i in range(500)]
    many["runs"] = copies
    (tmp_path / "many.html").write_text(page(many), encoding="utf-8")

    def seconds() -> float:
        with browser.new_context(viewport={"width": 1280, "height": 900}) as context:
            tab = context.new_page()
            session = context.new_cdp_session(tab)
            # Time that the page's thread computes, so that a busy machine does not decide the test.
            session.send("Performance.enable", {"timeDomain": "threadTicks"})
            tab.goto((tmp_path / "many.html").as_uri(), timeout=SLOW_MS)
            tab.locator(".plot .main-svg").first.wait_for(timeout=SLOW_MS)
            expect(tab.locator("#count")).to_have_text("500 of 500 runs")
            metrics = session.send("Performance.getMetrics")["metrics"]
            rows = tab.locator("#table tbody tr")
            assert rows.count() < 500
            while rows.count() < 500:
                before = rows.count()
                tab.locator("#runs .scroll").evaluate("box => box.scrollTo(0, box.scrollHeight)")
                expect(rows.nth(before)).to_be_attached(timeout=SLOW_MS)
            return next(float(m["value"]) for m in metrics if m["name"] == "TaskDuration")

    assert min(seconds() for _ in range(2)) < 3


def test_the_live_page_draws_itself_again_when_a_run_goes_on(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live, "_POLL_S", 0.2)
    write_sweep(tmp_path / "sweep", lengths=(32,), seeds=(0,), steps=20)
    with live.live_server([tmp_path / "sweep"], 0) as server, browser.new_context() as context:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            host, port = server.server_address[:2]
            assert host == "127.0.0.1"
            tab = context.new_page()
            tab.goto(f"http://127.0.0.1:{port}/", timeout=SLOW_MS)
            expect(tab.locator("#count")).to_have_text("2 of 2 runs", timeout=SLOW_MS)
            tab.get_by_label("Filter").fill("hybrid")
            write_run(tmp_path / "sweep" / "late", "hybrid", 64, 0, steps=20)
            expect(tab.locator("#count")).to_have_text("2 of 3 runs", timeout=SLOW_MS)

            def status(path: str, host: str) -> int:
                connection = http.client.HTTPConnection("127.0.0.1", int(port))
                connection.request("GET", path, headers={"Host": host})
                return connection.getresponse().status

            assert status("/data", "elsewhere.example") == 403
            assert status("/etc/passwd", "localhost") == 404
            with pytest.raises(UserError, match=rf"port {port} cannot be served .*: choose another --port"):
                live.live_server([tmp_path / "sweep"], int(port))
        finally:
            server.shutdown()
            thread.join()


def test_the_verdict_names_crossings_intervals_and_what_is_missing(data: dict[str, Any]) -> None:
    verdict = data["verdict"]
    assert verdict["headline"].startswith("The hybrid generates faster from about ")
    assert "needs less cache from about " in verdict["headline"]
    assert "; ends with the higher pass rate over 3 lengths of 32 to 128 tokens (+0.0" in verdict["headline"]
    findings = "\n".join(verdict["findings"])
    assert "(95% interval over 3 paired seeds)" in findings
    assert "Rollout throughput: hybrid / full MLA is 1." in findings
    assert "Final held-out pass rate" not in findings  # the last evaluation alone says less than these
    for label in ("at the end", "on the way"):
        assert f"Held-out pass rate {label}, hybrid less full MLA: +0.0" in findings
    assert findings.count("with each doubling of the length; less what runs began with, ") == 2
    assert "Seeds for each architecture and length: 3 to 4." in findings
    missing = "\n".join(verdict["missing"])
    assert "1 of 20 runs unfinished" in missing
    assert "1 of 20 runs failed" in missing


def test_one_pair_of_seeds_decides_no_pass_rate_and_one_architecture_has_no_verdict(tmp_path: Path) -> None:
    write_sweep(tmp_path / "one", lengths=(32, 64), seeds=(0,), steps=5)
    verdict = report_data([tmp_path / "one"])["verdict"]
    assert "cannot be told from full MLA in final held-out pass rate" in verdict["headline"]
    assert "from one pair of seeds; an interval takes three above 0" in "\n".join(verdict["findings"])
    assert any("no fit for hybrid at 32 tokens" in text for text in verdict["missing"])
    write_run(tmp_path / "alone", "mla", 32, 0, steps=5)
    alone = report_data([tmp_path / "alone"])
    assert alone["verdict"]["headline"].startswith("No verdict: ")
    assert alone["pair"] == ["0", "0"]


def test_the_verdict_says_who_is_behind_and_calls_nothing_ahead_that_seeds_leave_open(tmp_path: Path) -> None:
    few = find_runs([write_sweep(tmp_path, steps=5)])  # evaluations, too few for a lead
    rates = {"hybrid": (0.45, 0.6, 0.6), "mla": (0.5, 0.5, 0.5)}  # the mean is higher, one seed is not
    rows = [
        {
            "required_length": length,
            "budget": length + 1,
            "architecture": architecture,
            "seed": seed,
            "rollout_tokens_per_s": 700.0 + seed if architecture == "hybrid" else 1000.0,
            "cache_bytes_per_sequence": 500 if architecture == "hybrid" else 10 * length,
            "pass_rate_end": rate,
        }
        for length in (16, 32)
        for architecture in rates
        for seed, rate in enumerate(rates[architecture])
    ]
    verdict = judge(few, hybrid_to_mla(rows), crossings(rows), [], leads(few))
    assert verdict.headline == (
        "The hybrid generates more slowly at 32 tokens, the longest measured; needs more cache at 32 tokens, "
        "the longest measured; cannot be told from full MLA in final held-out pass rate."
    )
    for row in rows:
        row["cache_bytes_per_sequence"] = 500
    assert (
        "; equals full MLA in cache per sequence at 32 tokens; "
        in judge(few, hybrid_to_mla(rows), crossings(rows), [], leads(few)).headline
    )
    assert verdict.findings[0].endswith("the hybrid is not ahead at the longest of 16 to 32 tokens.")
    assert verdict.findings[2].endswith("; this leaves open who is ahead.")


@pytest.mark.parametrize(
    ("end", "way", "headline"),
    [
        (0.1, 0.1, "The hybrid ends with the higher pass rate at 32 tokens (+0.10 ± 0."),
        (-0.1, 0.1, "The hybrid ends with the lower pass rate at 32 tokens (-0.10 ± 0."),
        (0.0, 0.1, "The hybrid has the higher pass rate on the way at 32 tokens (+0.07 ± 0."),
        (0.0, 0.0, "The hybrid cannot be told from full MLA in held-out pass rate at 32 tokens."),
    ],
)
def test_the_headline_says_whether_a_lead_lasts(
    tmp_path: Path, end: float, way: float, headline: str
) -> None:
    for architecture, seed in itertools.product(("hybrid", "mla"), range(3)):
        ahead = architecture == "hybrid"
        config = parse_config(
            RunConfig, {"architecture": architecture, "seed": seed, "task": {"required_length": 32}}
        )
        with RunFolder.create(tmp_path / f"{architecture}-{seed}", config) as run:
            for step in range(10):
                lead = ahead * (way if step < 7 else end)
                run.log_evaluation(
                    step, {"pass_rate": 0.5 + 0.01 * seed + lead, "generated_tokens": step, "wall_s": step}
                )
    runs = find_runs([tmp_path])
    assert judge(runs, [], [], [], leads(runs)).headline.startswith(headline)


def test_asymptotes_are_compared_at_every_length_that_both_architectures_are_fitted_at(
    data: dict[str, Any],
) -> None:
    (finding,) = [text for text in data["verdict"]["findings"] if text.startswith("Fitted asymptotes")]
    assert [f"at {length} tokens 0." in finding for length in (32, 64, 128)] == [True] * 3
    assert finding.count("(difference ") == 3


def test_metrics_that_a_run_did_not_record_are_named(tmp_path: Path) -> None:
    write_run(tmp_path / "all", "hybrid", 32, 0, steps=1)
    with RunFolder.create(tmp_path / "some", RunConfig()) as run:
        run.log_metrics(1, {"entropy": 0.5, "mismatch_mean": None})
    RunFolder.create(tmp_path / "begun", RunConfig()).close()
    assert unrecorded(find_runs([tmp_path])) == [
        f"{name}: not recorded by 1 of 2 runs"
        for name in ("rollout/learner mismatch", "staleness", "FLOPs", "truncation")
    ]


def test_a_run_that_has_only_begun_is_in_the_table_and_in_no_figure(tmp_path: Path) -> None:
    RunFolder.create(tmp_path / "run", RunConfig()).close()
    data = report_data([tmp_path / "run"])
    assert data["figures"] == []
    (run,) = data["runs"]
    assert (run["name"], run["state"], run["pass_rate_end"]) == ("run", "running", None)
    assert run["samples"] == {"first": [], "last": []}
    assert "NaN" not in json.dumps(data, allow_nan=False)


def test_without_plotly_a_report_is_refused_before_runs_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    for start in (lambda: write_report([tmp_path], tmp_path / "page.html"), lambda: live.live_server([], 0)):
        with pytest.raises(UserError, match="the report needs Plotly: pip install plotly"):
            start()


def test_a_report_that_cannot_be_written_says_where_and_why(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    write_run(tmp_path / "run", "hybrid", 32, 0, steps=1)
    with pytest.raises(UserError, match=r"the report cannot go to .* choose another file"):
        write_report([tmp_path / "run"], tmp_path / "file" / "report.html")
    write_run(tmp_path / "a", "hybrid", 32, 0, steps=1, task={"name": "reversal"})
    write_run(tmp_path / "b", "hybrid", 32, 1, steps=1, task={"name": "sorting"})
    with pytest.raises(UserError, match=r"task\.name is"):
        write_report([tmp_path], tmp_path / "report.html")
