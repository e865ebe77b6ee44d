"""The reward model's report, against cases in closed form."""

import numpy as np
import pytest

from dschat_kit.train.reward_report import accuracy_of, bins, calibration, report, wilson


class Rows(list):
    """Token rows as `report` takes them."""
    def take(self, indices):
        return [self[i] for i in indices]


def pairs(longer) -> Rows:
    return Rows({"chosen_ids": [0] * (20 + n), "rejected_ids": [0] * 20, "source": "x"} for n in longer)


def test_a_model_that_says_log_odds_is_calibrated_and_half_of_them_are_underconfident():
    rng = np.random.default_rng(0)
    log_odds = rng.normal(0, 2, 40_000)
    chosen = np.where(rng.random(40_000) < 1 / (1 + np.exp(-log_odds)), log_odds, -log_odds)
    found = calibration(chosen)
    assert found["calibration_error"] < 0.01
    assert all(row["interval"][0] - 0.01 < row["predicted"] < row["interval"][1] + 0.01 for row in found["by_margin"])
    assert [row["pairs"] for row in found["by_margin"]] == [4000] * 10
    halved = calibration(chosen / 2)
    assert halved["calibration_error"] > 0.05
    assert all(row["observed"] > row["predicted"] for row in halved["by_margin"][1:])


def test_calibration_in_closed_form():
    """ln 3 says 3 : 1; right in two of four cases, the error is a quarter."""
    found = calibration(np.log(3) * np.array([1, 1, -1, -1]))
    row, = found["by_margin"]
    assert row["predicted"] == pytest.approx(0.75) and row["observed"] == 0.5 and row["pairs"] == 4
    assert found["calibration_error"] == pytest.approx(0.25)
    undecided, = calibration(np.zeros(3))["by_margin"]
    assert undecided["predicted"] == undecided["observed"] == 0.5


def test_accuracy_by_length_difference_shows_a_model_that_likes_long_answers():
    longer = np.repeat([-6, -2, 0, 3, 7], 50)
    scores = np.stack([longer, 0 * longer], axis=1).astype(float)
    found = report(scores, pairs(longer), scale=1.0)
    assert [(row["tokens"], row["accuracy"]) for row in found["by_length_difference"]] == [
        (-6, 0), (-2, 0), (0, 0.5), (3, 1), (7, 1)]
    assert sum(row["pairs"] for row in found["by_length_difference"]) == 250
    assert found["accuracy"] == found["length_baseline_accuracy"] == 0.5
    assert found["over_length_interval"] == [0, 0]  # the pairs it gets right are those that guessing gets right


def test_the_scale_of_the_scores_changes_no_calibration():
    margins = np.random.default_rng(1).normal(0.5, 1, 300)
    scores, rows = np.stack([margins, 0 * margins], axis=1), pairs(np.arange(300) % 9 - 4)
    plain, scaled = (report(scores * scale, rows, scale) for scale in (1.0, 0.2))
    assert scaled["calibration_error"] == pytest.approx(plain["calibration_error"])
    assert report(scores * 0.2, rows, 1.0)["calibration_error"] != pytest.approx(plain["calibration_error"])


def test_wilson_interval_in_numbers():
    assert wilson(0.5, 100) == pytest.approx([0.4038, 0.5962], abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx([0.7225, 1.0], abs=1e-4)


def test_bins_keep_equal_keys_together_and_lose_none():
    keys = np.array([3, 1, 1, 1, 2, 3, 1, 9])
    groups = bins(keys, 4)
    assert sorted(np.concatenate(groups)) == list(range(8))
    assert all(not set(keys[a]) & set(keys[b]) for i, a in enumerate(groups) for b in groups[i + 1:])
    assert accuracy_of(np.array([1.0, 0.0, -1.0])) == 0.5
