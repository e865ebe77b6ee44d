"""The study over seeds: what it plans and links, what it counts as failed, and what it writes. Nothing is trained."""

import json
import math

import pytest
from fake_run import make_run, write_lines

from dschat_kit import study
from dschat_kit.runs import link_stages, open_run
from dschat_kit.train.judge import best_answers


@pytest.mark.parametrize("n, quantile", [(2, 12.706), (3, 4.303), (4, 3.182), (5, 2.776), (10, 2.262),
                                         (20, 2.093), (200, 1.972)])
def test_the_interval_is_students(n, quantile):
    values = [float(i % 7) for i in range(n)]
    mean, half = study.interval(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    assert half == pytest.approx(quantile * spread / math.sqrt(n), rel=0.01)
    assert math.isnan(study.interval([1.0])[1])


def test_a_run_fails_by_not_ending_by_being_sick_and_by_losing_gold(tmp_path):
    root = make_run(tmp_path / "gae-0")
    row = study.read_row(root, "ppo")
    assert row["state"] == "finished" and row["gold_after"] == 1.9 and not row["sick"] and not study.failed(row)
    assert study.failed({**row, "gold_after": 0.6}) and study.failed({**row, "state": "failed"})
    rows = [json.loads(line) for line in (root / "ppo" / "metrics.jsonl").read_text().splitlines()]
    (root / "ppo" / "config.json").write_text(json.dumps({"pipeline": {"model": {"dtype": "fp32"}, "ppo": {}}}))
    write_lines(root / "ppo" / "metrics.jsonl", [{**row, "score_std": 0.0} for row in rows])
    sick = study.read_row(root, "ppo")
    assert "ppo scores" in sick["sick"] and study.failed(sick)
    assert study.read_row(root, "dpo") == {"state": "missing", "sick": []}


def test_runs_stand_on_links_to_one_base(tmp_path):
    make_run(tmp_path / "base")
    for _ in range(2):  # a resumed study finds them there
        place = link_stages(tmp_path / "gae-3", tmp_path / "base", *study.SHARED)
    assert open_run(place, "reward").state == "finished" and not (place / "ppo").exists()


def rows_of_all_arms() -> list[dict]:
    common = {"state": "finished", "sick": [], "response_length_after": 15.0, "eos_rate_after": 1.0,
              "lm_loss_after": 0.5}
    rows = [{**common, "arm": arm, "seed": seed, "gold_before": 0.5, "gold_after": 0.8 + 0.01 * seed, "kl": 1.5,
             "lm_loss_before": 0.4} for arm in study.ARMS for seed in range(3)]
    rows[1] |= {"gold_after": 0.4}
    rows.append({"arm": "gae", "seed": 3, "state": "failed", "sick": []})
    rows += [{**common, "arm": arm, "seed": seed, "gold_after": 0.7, "kl": 0.6} for arm in ("ema", "best of 4")
             for seed in range(2)]
    return rows


def test_the_report_has_every_arm_its_failures_and_the_differences_seed_by_seed():
    text = study.report(rows_of_all_arms())
    table = {cells[1].strip(): cells for cells in (line.split("|") for line in text.splitlines() if line[:2] == "| ")}
    plain = table[study.ARMS["gae"][2]]
    assert plain[2].strip() == "4" and plain[8].strip() == "2" and plain[7].strip().startswith("0.100")
    assert {words for _, _, words in study.ARMS.values()} <= set(table) and "best of 4" in table
    assert "- ptx less gae, same 3 seeds: gold 0.137 +-" in text and "- ema less gae, same 2 seeds" in text
    assert "- ptx 2x less rloo, same 3 seeds" in text and "- ptx 2x less ema, same 2 seeds" in text
    axes = study.figure(rows_of_all_arms()).axes
    assert [label.get_text() for label in axes[0].get_xticklabels()] == [*study.ARMS, "ema"]


def test_a_study_in_which_no_run_ended_has_its_files():
    rows = [{"arm": arm, "seed": 0, "state": "failed", "sick": []} for arm in study.ARMS]
    assert "| 1 |" in study.report(rows) and not study.figure(rows).axes[0].lines


def test_the_best_answer_is_that_of_its_own_prompt():
    lines = [{"prompt": prompt, "score": score} for score in (0.1, 0.9, 0.5, 0.7, 0.3) for prompt in "ab"]
    assert [line["score"] for line in best_answers(lines, 2)] == [0.9, 0.7, 0.9, 0.7]
    assert best_answers(lines, 1) != lines and len(best_answers(lines, 1)) == len(lines)
    assert [line["score"] for line in best_answers(lines, 5)] == [0.9, 0.9] and best_answers(lines, 6) == []
