"""Figures: what they draw is what the run folder says; nothing yet is no error; text of models is never HTML."""
import subprocess
import sys

import pytest
from fake_run import make_run
from matplotlib.figure import Figure

from dschat_kit.metrics import read_metrics
from dschat_kit.notebook import plots
from dschat_kit.notebook.tables import bundle, samples_table
from dschat_kit.runs import StageRun

FIGURES = {"sft_loss": "sft", "reward_training": "reward", "reward_histogram": "reward", "ppo_curves": "ppo",
           "ppo_time_split": "ppo", "gold_parts": "ppo", "blend_picture": "data", "token_lengths": "data",
           "chain_overview": ""}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("name, stage", FIGURES.items())
def test_every_figure_is_a_labelled_picture(root, name, stage):
    figure = getattr(plots, name)(root / stage)
    picture = bundle(figure)[0]["image/png"]
    assert isinstance(figure, Figure) and picture.startswith(b"\x89PNG") and len(picture) < 150_000
    assert figure.get_label() and tuple(figure.get_facecolor()) == (1, 1, 1, 1)
    assert all(axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes)


@pytest.mark.parametrize("name, stage", FIGURES.items())
def test_a_stage_that_has_written_nothing_is_no_error(tmp_path, name, stage):
    figure = getattr(plots, name)(tmp_path / stage)
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert "nothing yet" in words and bundle(figure)


def test_a_reward_that_nobody_knows_is_not_waited_for(tmp_path):
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo" / "result.json").write_text('{"score_after": 1.0}')
    axes, = plots.gold_parts(tmp_path / "ppo").axes
    assert [text.get_text() for text in axes.texts] == ["the true reward of this data is not known"]


def test_curves_are_the_metrics(root):
    rows = read_metrics(root / "ppo/metrics.jsonl")
    axes = plots.ppo_curves(root / "ppo").axes
    for place, key in enumerate(["score_mean", "kl", "response_length", "clip_fraction"]):
        assert list(axes[place].lines[0].get_ydata()) == [row[key] for row in rows]
    styles = [line.get_linestyle() for line in plots.sft_loss(root / "sft").axes[0].lines]
    assert len(set(styles)) == len(styles)  # not told apart by colour alone


def test_many_noisy_steps_are_dots_and_a_running_mean(root):
    rows = read_metrics(root / "reward/metrics.jsonl")
    loss, *_ = plots.reward_training(root / "reward").axes
    dots, mean = loss.collections[0].get_offsets()[:, 1], loss.lines[0].get_ydata()
    assert list(dots) == pytest.approx([row["loss"] for row in rows]) and len(mean) == len(rows) > 100
    assert mean[50] == pytest.approx(sum(dots[49:52]) / 3)
    assert loss.get_legend().get_texts()[0].get_text() == "batch (mean of 3)"


def test_time_split_adds_up(root):
    label = plots.ppo_time_split(root / "ppo").get_label()
    shares = [int(word.rstrip("%,")) for word in label.split() if word.rstrip(",").endswith("%")]
    assert len(shares) == 4 and abs(sum(shares) - 100) <= 2


def test_engines_are_compared_by_phase():
    phases = {"generation": 2.0, "scoring": 1.0, "training": 3.0}
    slow = {"generation": 5.0, "scoring": 1.0, "training": 3.0}
    figure = plots.engine_time_split({"engines": {"kit": {"phases": phases}, "hf": {"phases": slow}, "deepspeed": None},
                                      "ratio_to_hf": 1.5})
    assert [text.get_text() for text in figure.axes[0].texts] == ["6.00 s", "9.00 s"] and "1.50" in figure.get_label()


def test_null_values_are_left_out(tmp_path):
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft/metrics.jsonl").write_text('{"step": 1, "loss": null}\n{"step": 2, "loss": 3.0}\n{"step": 3, "lo')
    assert list(plots.sft_loss(tmp_path / "sft").axes[0].lines[0].get_xdata()) == [2]


def test_samples_stand_side_by_side_and_are_escaped(root):
    table = samples_table(StageRun(root / "ppo"), 3)
    assert "<script>" not in table.html and "&lt;script&gt;" in table.html and "<b>" not in table.html
    assert table.html.count("<tr>") == 3 + 1
    assert "Because before" in table._repr_html_() and "Because after" in repr(table) and "rollout" not in repr(table)


def test_the_room_never_imports_torch():
    modules = "execute, launch, monitor, plots, processes, progress, report, tables"
    script = (f"import sys\nfrom dschat_kit.notebook import {modules}\n"
              "print([name for name in ('torch', 'deepspeed', 'transformers') if name in sys.modules])")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr
