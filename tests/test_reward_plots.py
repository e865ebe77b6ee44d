"""Figures of reward models and of the study, drawn from numbers whose shape is known."""

import json

import numpy as np
import pytest
from fake_run import make_run

from dschat_kit import overopt, overopt_report
from dschat_kit.notebook import reward_plots
from dschat_kit.notebook.tables import bundle
from dschat_kit.runs import RunError, open_run, write_json


def sampled(method: str, turns: float, points: int = 40, units: int = 60) -> overopt_report.Sampled:
    """A curve that turns at the distance `turns`, with noise."""
    rng, d = np.random.default_rng(0), np.linspace(0, 2, points)
    gold = d * (2 * 0.2 * turns - 0.2 * d) if method == "best-of-n" else d * (
        0.2 * (1 + np.log(turns)) - 0.2 * np.log(np.maximum(d, 1e-9)))
    kl = d ** 2 + rng.normal(0, 0.02, (units, points))
    return overopt_report.Sampled(kl, 3 * d + rng.normal(0, 0.1, (units, points)),
                                  0.5 + gold + rng.normal(0, 0.05, (units, points)), 0.25)


@pytest.fixture(scope="module")
def found():
    rows = [{"method": method, "width": width, "pairs": pairs, "accuracy": [0.7, 0.72],
             **overopt_report.summarise(method, [sampled(method, turns)] * 2)}
            for width in (128, 32) for pairs, turns in ((512, 0.8), (2048, 4.0))
            for method in ("best-of-n", "ppo")]
    return {"prompts": 4, "answers": 64, "ns": [1, 16], "bound": [0, 1.8], "ppo": ["ppo.max_steps=1", "b"],
            "curves": rows}


def test_the_turning_point_is_found_with_an_interval_around_it(found):
    for row in found["curves"]:
        if row["pairs"] == 512:
            low, high = row["turn_interval"]
            assert row["turn"] == pytest.approx(0.8, rel=0.1) and low <= row["turn"] <= high
            assert row["share_turned"] == 1
            assert row["gain_at_end"] < row["gain_at_stop"]
        else:
            assert row["share_turned"] < 0.2
        assert row["misfit"] < 0.03
        assert row["points"][0]["promise"][-1] == pytest.approx(3 * 2 * 0.25, abs=0.05)  # in units of the true reward
        assert np.all(np.array(row["band"][0]) <= np.array(row["band"][1]))


@pytest.mark.parametrize("name", reward_plots.FIGURES)
def test_figures_of_the_study(found, name):
    figure = reward_plots.FIGURES[name](json.loads(json.dumps(found)))
    assert figure.get_label() and bundle(figure)[0]["image/png"].startswith(b"\x89PNG")
    assert all(axes.get_xlabel() or axes.get_title() for axes in figure.axes)


def test_the_table_says_where_to_stop(found):
    text = overopt_report.in_words(found)
    stops = [row for row in text.splitlines() if row.startswith("| best-of-n | 128 wide")]
    assert "| 0.6" in stops[0] and "not up to 4.0" in stops[1] and len(stops) == 2


def test_reward_quality_shows_calibration(tmp_path):
    root = make_run(tmp_path)
    figure = reward_plots.reward_quality(open_run(root, "reward"))
    assert "calibration error 0.021" in figure.get_label() and len(figure.axes) == 2
    empty = reward_plots.reward_quality(open_run(tmp_path / "other", "reward"))
    assert "nothing yet" in [text.get_text() for axes in empty.axes for text in axes.texts]


def test_scores_are_those_that_ppo_trains_on(tmp_path):
    (tmp_path / "ppo").mkdir()
    run = open_run(tmp_path, "ppo")
    for penalty, last in ((-1.0, -1.0), (None, 2.0)):
        write_json(run.path / "config.json", {"pipeline": {"ppo": {"score_clip": 5.0, "missing_eos_score": penalty}}})
        found = overopt_report.penalised(np.array([7.0, 0.5, 2.0]), np.array([True, True, False]), run)
        assert found.tolist() == [5.0, 0.5, last]


def test_other_answers_are_not_overwritten(tmp_path):
    for stage in ("data", "sft", "reward"):
        (tmp_path / "base" / stage).mkdir(parents=True)
        write_json(tmp_path / "base" / stage / "config.json", {"stage": stage, "config_hash": "x", "pipeline": {}})
    base = tmp_path / "base"
    run = overopt.plan_best_of_n(tmp_path / "n", base, 4, 16, {"m": base})
    assert run.state == "missing" and run.config["stage"] == "ppo" and (run.root / "sft").resolve() == base / "sft"
    run.update_status(state="finished")
    assert overopt.plan_best_of_n(tmp_path / "n", base, 4, 16, {"m": base}).state == "finished"
    with pytest.raises(RunError, match="other answers"):
        overopt.plan_best_of_n(tmp_path / "n", base, 8, 16, {"m": base})
