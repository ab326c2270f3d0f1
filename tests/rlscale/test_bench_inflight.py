import pytest

from rlscale.bench.inflight import InflightStudy, main, measure_inflight_updates, summary
from rlscale.errors import UserError


def test_recomputing_leaves_rounding_and_keeping_an_error_of_the_updates_size():
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "full_attention_layers": [2]}
    study = InflightStudy(
        model={"overrides": shape}, learning_rates=[1e-3], seeds=[5], sequences=4, length=24, distances=[1, 5]
    )
    cases = list(measure_inflight_updates(study))
    assert len(cases) == 2 * 2 * 2  # architectures, ways to treat the cache, distances
    for case in cases:
        assert case["update"] > 1e-2
        if case["in_flight"] == "recompute":
            assert case["error"] < 1e-4
        else:
            assert 0.05 * case["update"] < case["error"] < 3 * case["update"]
    assert {tuple(case["distance"]) for case in cases} == {(1, 4), (5, 12)}
    table = summary(cases).splitlines()
    assert len(table) == 2 + 2
    assert all(row.count("|") == 6 for row in table)


def test_a_study_that_asks_for_what_there_is_not_is_refused_before_anything_is_measured(tmp_path):
    config, output = tmp_path / "config.yaml", tmp_path / "results.json"
    config.write_text("sequence: 3\n")
    with pytest.raises(
        UserError, match=r"^[^\n]*config.yaml is no study of in-flight updates: [^\n]*sequence"
    ):
        main(config, output)
    assert not output.exists()
