"""The doctor: every finding has a cure, sound machines and runs get none, and each planted fault is found by name."""

import dataclasses
import json
import os
import subprocess
import sys
import time

import pytest
from fake_run import write_lines

from dschat_kit.machine import Machine
from dschat_kit.notebook import diagnosis, doctor
from dschat_kit.notebook.diagnosis import Check, render
from dschat_kit.presets import get_preset
from dschat_kit.runs import write_json


def worst(checks):
    return max((check.state for check in checks), key=("ok", "warn", "fail").index)


CPU = Machine(accelerator="cpu", devices=2, cores=2, bf16=False, torch_build="2.13.0+cpu")


def test_this_machine_passes_and_torch_stays_out_of_the_process(tmp_path):
    code = ("import json, sys\nfrom dschat_kit.notebook import doctor\n"
            f"checks = doctor.machine_checks({str(tmp_path / 'runs')!r})\n"
            "print(json.dumps({'loaded': [m for m in ('torch', 'deepspeed', 'transformers') if m in sys.modules],\n"
            "                  'checks': [vars(check) for check in checks]}))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200)
    said = json.loads(done.stdout)
    found = {check["name"]: check for check in said["checks"]}
    assert said["loaded"] == []
    assert {"system", "python", "packages", "torch", "deepspeed", "accelerator", "memory", "/dev/shm", "run folder",
            "loopback", "compiler"} <= set(found)
    assert not [check for check in said["checks"] if check["state"] == "fail"], done.stdout
    assert found["torch"]["found"].startswith("2.13.0")
    assert not (tmp_path / "runs").exists()


def test_a_finding_without_a_cure_is_not_possible():
    with pytest.raises(AssertionError):
        Check(name="x", state="fail", found="bad")


def test_render_shows_state_finding_cure_and_counts():
    checks = [Check(name="a", state="ok", found="fine"), Check(name="bcd", state="warn", found="odd", cure="mend it")]
    text = render(checks)
    assert "warn  bcd  odd" in text and "-> mend it" in text and text.endswith("doctor: 1 ok, 1 warn")


@pytest.mark.parametrize("program, torch_found, says", [
    ("raise SystemExit(3)", False, "exit code 3"),
    ("import no_such_module_at_all", False, "no_such_module_at_all"),
    ("import os; os.kill(os.getpid(), 11)", False, "exit code -11"),
    ("print('{\"torch\": \"2.13.0\", \"cuda\": null, \"gpus\": 0}', flush=True); import time; time.sleep(60)", True,
     "did not end within 2 s"),
])
def test_an_import_that_fails_crashes_or_hangs_is_a_finding(monkeypatch, program, torch_found, says):
    monkeypatch.setattr(doctor, "PROBE", program)
    found = {check.name: check for check in doctor._training(CPU, timeout=2)}
    assert found["torch"].state == ("ok" if torch_found else "fail")
    bad = found["deepspeed" if torch_found else "torch"]
    assert bad.state == "fail" and says in bad.found and "env/setup.sh" in bad.cure


@pytest.mark.parametrize("cuda, seen, state, says", [
    (None, 0, "warn", "CPU build"), ("13.0", 0, "fail", "torch sees none"), ("13.0", 2, "ok", "2 x H")])
def test_gpus_that_torch_cannot_use_are_told(monkeypatch, cuda, seen, state, says):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine = dataclasses.replace(CPU, accelerator="cuda" if seen else "cpu", torch_build="2.13.0")
    check = doctor._accelerator(machine, {"torch": "2.13.0", "cuda": cuda, "gpus": seen}, ["H", "H"])
    assert check.state == state and says in check.found


def test_other_versions_are_named_and_builds_are_not(tmp_path):
    pins = tmp_path / "constraints.txt"
    pins.write_text("# a comment == here\ntorch==2.13.0\nnumpy==1.0\nno-such-package==1.0\n")
    check = doctor._packages(pins)
    assert check.state == "warn" and "numpy" in check.found and "torch" not in check.found


def test_a_run_root_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert doctor._disk(tmp_path / "not" / "yet").state == "ok"
    if os.geteuid() == 0:
        check = doctor._disk(doctor.Path("/proc/none/runs"))
    else:
        tmp_path.chmod(0o500)
        check = doctor._disk(tmp_path / "runs")
    assert check.state == "fail" and "--run-root" in check.cure


PPO_ROW = {"score_mean": 0.1, "score_std": 1.0, "kl": 0.0, "eos_rate": 0.99, "clip_fraction": 0.05,
           "first_ratio_max": 1.0, "first_approx_kl": 0.0, "ratio_max": 1.3, "approx_kl": 0.01, "sampler_gap": 1e-6,
           "response_length": 20.0, "entropy": 1.5, "surprisal": 1.45, "reference_gap": 1e-6,
           "explained_variance": 0.4, "advantage_std": 1.0, "grad_norm_actor": 0.6}
RESULTS = {"data": {"rows": {}}, "sft": {"eval_loss_before": 6.0, "eval_loss_after": 2.0},
           "reward": {"accuracy": 0.71, "accuracy_interval": [0.67, 0.75], "length_baseline_accuracy": 0.55},
           "ppo": {"score_before": 0.0, "score_after": 1.0}, "chat": {}}


@pytest.fixture
def sound(tmp_path):
    """A finished run with believable numbers, as files alone."""
    pipeline = get_preset("tiny").with_overrides(["model.dtype=fp32"]).to_dict()
    for stage, result in RESULTS.items():
        folder = tmp_path / stage
        folder.mkdir()
        write_json(folder / "config.json", {"stage": stage, "preset": "tiny", "config_hash": "x", "seed": 0,
                                            "pipeline": pipeline})
        write_json(folder / "status.json", {"state": "finished", "step": 3, "total": 3, "updated": time.time(),
                                            "started": time.time(), "error": None, "pid": 1, "host": "h"})
        write_json(folder / "result.json", result)
        row = PPO_ROW if stage == "ppo" else {"loss": 1.0}
        if stage in ("sft", "reward", "ppo"):
            lines = [json.dumps({"step": step, **row}) for step in (1, 2, 3)]
            (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def edit(root, stage, name, change):
    """Rewrite a JSON file of a stage, or the rows of its metrics."""
    path = root / stage / name
    if name == "metrics.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(row | change) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_a_sound_run_gets_no_warning(sound):
    checks = diagnosis.run_checks(sound)
    assert [check.name for check in checks] == ["data", "sft", "sft checks", "reward", "reward checks", "ppo",
                                                "ppo checks", "chat"]
    assert worst(checks) == "ok", render(checks)
    for stage in ("sft", "reward", "ppo"):
        found, = (check.found for check in checks if check.name == f"{stage} checks")
        assert found == "{0} of {0} checks of its numbers hold".format(len(diagnosis.RULES[stage]))


@pytest.mark.parametrize("stage, file, change, name, state", [
    ("sft", "result.json", {"eval_loss_after": 6.5}, "sft loss", "warn"),
    ("sft", "metrics.jsonl", {"loss": None}, "sft numbers", "fail"),
    ("sft", "metrics.jsonl", {"step": -1, "loss": 2.0}, "sft stale metrics", "fail"),
    ("ppo", "status.json", {"step": 9, "total": 9}, "ppo stale metrics", "fail"),
    ("reward", "result.json", {"accuracy": 0.52, "accuracy_interval": [0.48, 0.56]}, "reward accuracy", "warn"),
    ("reward", "result.json", {"length_baseline_accuracy": 0.8}, "reward against length", "warn"),
    ("ppo", "result.json", {"score_after": -1.0}, "ppo score", "warn"),
    ("ppo", "metrics.jsonl", {"first_ratio_max": 1.02}, "ppo first ratio", "fail"),
    ("ppo", "metrics.jsonl", {"kl": 3.0}, "ppo first KL", "fail"),
    ("ppo", "metrics.jsonl", {"kl": -2.0}, "ppo KL", "fail"),
    ("ppo", "metrics.jsonl", {"sampler_gap": 0.4}, "ppo sampler", "fail"),
    ("ppo", "metrics.jsonl", {"score_mean": -4.0}, "ppo first scores", "warn"),
    ("ppo", "metrics.jsonl", {"reference_gap": 0.1}, "ppo reference scores", "fail"),
    ("ppo", "metrics.jsonl", {"surprisal": 0.8}, "ppo sampled tokens", "fail"),
    ("ppo", "metrics.jsonl", {"eos_rate": 0.1}, "ppo ends", "warn"),
    ("ppo", "metrics.jsonl", {"score_std": 0.0}, "ppo scores", "fail"),
    ("ppo", "metrics.jsonl", {"clip_fraction": 0.7}, "ppo clipping", "warn"),
])
def test_each_planted_fault_is_found(sound, stage, file, change, name, state):
    edit(sound, stage, file, change)
    found = {check.name: check for check in diagnosis.run_checks(sound) if check.state != "ok"}
    if name is None:
        assert not found
    else:
        assert found[name].state == state and found[name].cure


@pytest.mark.parametrize("name, late, state", [
    ("EOS rate", {"eos_rate": 0.6}, "warn"), ("length", {"response_length": 40.0}, "warn"),
    ("length", {"response_length": 5.0}, "warn"), ("entropy", {"entropy": 0.1, "surprisal": 0.1}, "warn"),
    ("values", {"explained_variance": -0.5}, "warn"), ("advantages", {"advantage_std": 0.0}, "fail"),
    ("gradients", {"grad_norm_actor": 7.0}, "warn"), ("first ratio", {"first_ratio_max": 1.2}, "fail"),
    ("first approx_kl", {"first_approx_kl": 0.01}, "fail"), ("score scale", {"score_std": 9.0}, "warn"),
    ("distance", {"kl": 30.0}, "warn"),
])
def test_what_goes_wrong_on_the_way_is_found(sound, name, late, state):
    rows = [json.dumps({"step": step, **PPO_ROW, **(late if step > 6 else {})}) for step in range(1, 9)]
    (sound / "ppo" / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    edit(sound, "ppo", "status.json", {"step": 8, "total": 8})
    found = {check.name: check for check in diagnosis.run_checks(sound) if check.state != "ok"}
    assert list(found) == [f"ppo {name}"] and found[f"ppo {name}"].state == state and found[f"ppo {name}"].cure


def test_rounding_of_bf16_is_no_fault(sound):
    edit(sound, "ppo", "metrics.jsonl", {"first_ratio_max": 1.02})
    config = json.loads((sound / "ppo" / "config.json").read_text())
    config["pipeline"]["model"]["dtype"] = "bf16"
    (sound / "ppo" / "config.json").write_text(json.dumps(config))
    assert worst(diagnosis.run_checks(sound)) == "ok"


@pytest.mark.parametrize("status, state, says, cure", [
    ({"state": "failed", "error": "rank 1 died\nmore"}, "fail", "rank 1 died", "dschat sft --resume auto"),
    ({"state": "running"}, "warn", "interrupted at step 3 of 3", "dschat sft --resume auto"),
])
def test_stages_that_did_not_end_name_their_command(sound, status, state, says, cure):
    edit(sound, "sft", "status.json", status)
    check = {check.name: check for check in diagnosis.run_checks(sound)}["sft"]
    assert check.state == state and says in check.found and cure in check.cure and str(sound) in check.cure


def test_a_running_stage_is_fine_until_it_is_silent(sound):
    from dschat_kit.runs import open_run
    edit(sound, "ppo", "status.json", {"state": "running", "step": 1})
    with open_run(sound, "ppo").lock():
        check = {check.name: check for check in diagnosis.run_checks(sound)}["ppo"]
        assert (check.state, check.found) == ("ok", "running, step 1 of 3")
        edit(sound, "ppo", "status.json", {"updated": time.time() - 3600})
        check = {check.name: check for check in diagnosis.run_checks(sound)}["ppo"]
        assert check.state == "warn" and "silent for 60 minutes" in check.found


def test_damaged_files_are_findings_and_the_rest_is_still_checked(sound):
    (sound / "sft" / "status.json").write_text("{ half")
    (sound / "reward" / "metrics.jsonl").write_text("not json\n")
    (sound / "ppo" / "result.json").unlink()
    found = {check.name: check for check in diagnosis.run_checks(sound) if check.state == "fail"}
    assert set(found) == {"sft", "reward", "ppo"}
    assert "--fresh" in found["sft"].cure


def test_missing_stages_and_an_empty_folder(sound, tmp_path):
    for name in ("config.json", "status.json", "result.json"):
        (sound / "chat" / name).unlink()
    check = diagnosis.run_checks(sound)[-1]
    assert check.state == "warn" and "not run yet" in check.found and "dschat chat" in check.cure
    only, = diagnosis.run_checks(tmp_path / "nowhere")
    assert only.state == "fail" and "holds no stage" in only.found


def test_dpo_that_does_not_begin_at_its_reference_is_told(tmp_path):
    path = tmp_path / "dpo"
    for first, states in ((0.6931, []), (0.75, ["dpo first loss"])):
        write_lines(path / "metrics.jsonl", [{"step": 1, "loss": first, "accuracy": 0.5},
                                             {"step": 2, "loss": 0.6, "accuracy": 0.7}])
        (path / "config.json").write_text(json.dumps({"pipeline": {"model": {"dtype": "fp32"}}}))
        found = diagnosis.run_checks(tmp_path)
        assert [check.name for check in found if check.state == "fail"] == states, found
