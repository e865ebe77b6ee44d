"""The console command: what it refuses, with which words and which exit code, and what it starts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dschat_kit import cli
from dschat_kit.machine import resolve
from dschat_kit.notebook import execute, launch
from dschat_kit.presets import get_preset
from dschat_kit.runs import open_run, prepare_stage, stage_hash, write_json

HEAVY = ("torch", "deepspeed", "transformers", "datasets", "matplotlib", "IPython")


def dschat(*argv: str, capsys) -> tuple[int, str]:
    """Exit code and standard error of a command that must not reach a launch."""
    code = cli.main(list(argv))
    return code, capsys.readouterr().err


def finished(root: Path, *stages: str, preset: str = "tiny") -> None:
    pipeline = resolve(get_preset(preset))
    for stage in stages:
        run = open_run(root, stage)
        run.path.mkdir(parents=True)
        write_json(run.path / "config.json", {"stage": stage, "preset": preset, "seed": 0,
                                              "config_hash": stage_hash(pipeline, stage),
                                              "pipeline": pipeline.to_dict()})
        run.update_status(state="finished")


@pytest.fixture
def launched(monkeypatch):
    """The commands that would have been launched."""
    commands = []
    monkeypatch.setattr(launch, "launch", lambda argv: commands.append(argv) or 0)
    return commands


@pytest.mark.parametrize("argv, said", [
    (["sft", "--preset", "tyni"], "one of tiny, smollm2-hh"),
    (["sft", "--set", "ppo.klcoef=1"], "did you mean ppo.kl_coef?"),
    (["run", "--set", "sft.max_steps=many"], "sft.max_steps: got 'many'\n  expected: int"),
    (["run", "--set", "ppo.mini_batch_size=48"], "a divisor of ppo.rollout_batch_size"),
    (["run", "--num-gpus", "2", "--set", "sft.batch_size=30"], "whole micro batches on 2 ranks"),
    (["ppo", "--num-gpus", "-1"], "--num-gpus: got -1\n  expected: 1 to"),
    (["run", "--num-gpus", "999"], "the cores of this machine"),
    (["run", "--set", "data.sources=missing.jsonl"], "missing.jsonl does not exist"),
    (["data", "--set", "data.sources=/proc/self/mem"], "/proc/self/mem cannot be read"),
    (["data", "--set", "data.module=none.py", "data.sources=x"], "data.module: "),
    (["reward"], "reward needs a finished sft stage"),
    (["ppo"], "ppo needs a finished sft stage"),
])
def test_what_cannot_work_ends_at_once(tmp_path, capsys, monkeypatch, launched, argv, said):
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setattr(execute, "run_chain", lambda **_: pytest.fail("the chain was started"))
    code, shown = dschat(*argv, "--run-root", str(tmp_path / "run"), capsys=capsys)
    assert code == 2 and shown.startswith("error: ") and said in shown and "change:" in shown
    assert not launched and not (tmp_path / "run").exists()


def test_a_study_has_a_seed(tmp_path, capsys):
    code, shown = dschat("study", "--seeds", "0", "--out", str(tmp_path), capsys=capsys)
    assert code == 2 and "--seeds: got 0\n  expected: at least 1" in shown


def test_nothing_heavy_is_imported_on_the_way():
    """A start, help, and every refusal above in one new interpreter."""
    script = f"""
import sys
from dschat_kit.cli import main
for argv in (["--help"], ["run", "--help"], ["launch", "--help"], ["nonsense"]):
    try:
        main(argv)
    except SystemExit as end:
        assert end.code == (2 if argv == ["nonsense"] else 0), (argv, end.code)
for argv in (["sft", "--preset", "tyni"], ["sft", "--set", "ppo.klcoef=1"], ["ppo", "--num-gpus", "-1"],
             ["data", "--set", "data.sources=missing.jsonl"], ["reward", "--run-root", "/nowhere/run"]):
    assert main(argv) == 2, argv
heavy = [name for name in {HEAVY} if name in sys.modules]
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr and "fetch-model" in done.stdout


def test_a_read_only_run_root_is_an_error_in_words(capsys, launched):
    code, shown = dschat("data", "--run-root", "/proc/run", capsys=capsys)
    assert code == 2 and shown.startswith("error: cannot write in /proc/run/data") and "--run-root" in shown


def test_a_stage_starts_the_command_that_its_notebook_shows(tmp_path, capsys, launched):
    assert cli.main(["sft", "--run-root", str(tmp_path), "--set", "sft.max_steps=3", "--num-gpus", "1"]) == 0
    path = str(tmp_path / "sft")
    command = ["deepspeed", "--num_gpus", "1", "--module", "dschat_kit.train.sft", "--run", path]
    assert launched == [command] and "$ " + " ".join(command) in capsys.readouterr().out
    assert open_run(tmp_path, "sft").pipeline.sft.max_steps == 3


def test_what_a_stage_reached_is_said_at_its_end(tmp_path, capsys, monkeypatch):
    result = {"score_before": 0, "score_after": 1, "kl": 2, "gold_before": 0.5, "gold_after": 0.75}
    monkeypatch.setattr(launch, "launch", lambda argv: write_json(tmp_path / "dpo" / "result.json", result) or 0)
    finished(tmp_path, "data", "sft", "reward")
    assert cli.main(["dpo", "--run-root", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith("dpo: score 0.00 -> 1.00, KL 2.000, gold 0.50 -> 0.75\n")


def test_a_chain_that_has_ended_says_what_the_doctor_would(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(execute, "run_chain", lambda **how: finished(tmp_path, "data", "sft") or 0)
    assert cli.main(["run", "--run-root", str(tmp_path)]) == 0
    assert f"doctor: look at data, sft, reward, ppo, chat with `dschat doctor '{tmp_path}'`" in capsys.readouterr().out


def test_a_finished_stage_is_shown_and_a_changed_one_refused(tmp_path, capsys, launched):
    finished(tmp_path, "data", "sft")
    command = ["sft", "--run-root", str(tmp_path)]
    assert cli.main(command) == 0 and "finished before" in capsys.readouterr().out
    code, shown = dschat(*command, "--set", "sft.lr=0.5", capsys=capsys)
    assert code == 2 and "sft.lr: " in shown and "-> 0.5" in shown and "--fresh" in shown and not launched
    assert cli.main([*command, "--set", "sft.lr=0.5", "--fresh"]) == 0 and len(launched) == 1
    assert len(list(tmp_path.glob("sft.old-*"))) == 1


def test_an_interrupted_stage_needs_resume(tmp_path, capsys, launched):
    finished(tmp_path, "data")
    run, _ = prepare_stage(tmp_path, "sft", open_run(tmp_path, "data").pipeline, preset="tiny")
    run.update_status(state="interrupted", step=7)
    code, shown = dschat("sft", "--run-root", str(tmp_path), capsys=capsys)
    assert code == 2 and "interrupted at step 7" in shown and "--resume auto" in shown and not launched
    assert cli.main(["sft", "--run-root", str(tmp_path), "--resume", "auto"]) == 0
    assert launched[0][-1] == "--resume"


def test_the_chain_gets_everything_that_differs_from_the_preset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my rows.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    given = {}
    monkeypatch.setattr(execute, "run_chain", lambda **arguments: given.update(arguments) or 0)
    overrides = ["data.sources=my rows.jsonl:2", "ppo.missing_eos_score=-7"]
    assert cli.main(["run", "--run-root", "r", "--set", *overrides]) == 0
    assert f"data.sources={tmp_path}/my rows.jsonl:2" in given["overrides"] and given["run_root"] == tmp_path / "r"
    assert "ppo.missing_eos_score=-7.0" in given["overrides"]
    again = get_preset("tiny").with_overrides(given["overrides"])
    assert again.data.weighted_sources() == [(f"{tmp_path}/my rows.jsonl", 2.0)] and again.ppo.missing_eos_score == -7


def test_an_existing_run_keeps_its_configuration(tmp_path, launched):
    finished(tmp_path, "data", preset="tiny")
    pipeline = get_preset("tiny").with_overrides(["data.rows=77", "model.dtype=fp32"])
    write_json(tmp_path / "data" / "config.json", {"stage": "data", "preset": "tiny", "seed": 0,
                                                   "config_hash": stage_hash(pipeline, "data"),
                                                   "pipeline": pipeline.to_dict()})
    assert cli.main(["sft", "--run-root", str(tmp_path)]) == 0
    assert open_run(tmp_path, "sft").pipeline == pipeline


def test_a_bad_row_comes_all_the_way_up(tmp_path):
    """The real thing: dschat -> launch -> the data program."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": \n')
    done = subprocess.run([sys.executable, "-m", "dschat_kit.cli", "data", "--run-root", str(tmp_path / "run"), "--set",
                           f"data.sources={file}"], capture_output=True, text=True,
                          env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert done.returncode == 2 and "error: rows.jsonl, line 2: is no JSON" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert open_run(tmp_path / "run", "data").state == "failed"
    assert (tmp_path / "run" / "data" / "logs" / "launch.log").exists()


def test_json_output_is_one_object(capsys, monkeypatch):
    from dschat_kit.notebook import doctor
    from dschat_kit.notebook.diagnosis import Check
    full = Check(name="disk", state="fail", found="full", cure="free some")
    monkeypatch.setattr(doctor, "machine_checks", lambda: [full])
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is False and found["checks"][0]["name"] == "disk"
