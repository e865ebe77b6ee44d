"""JupyterLab in a real browser: a notebook on a finished run, and the box to talk to a model.

Needs Debian's `chromium` (or another Chromium on PATH) and the Python package `playwright`; skipped without.
"""
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

playwright = pytest.importorskip("playwright.sync_api", reason="needs the Python package playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.browser, pytest.mark.slow,
              pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH")]
CHECKOUT = Path(__file__).parents[2]
ARGUMENTS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
             "--disable-component-update --disable-sync").split()
DONE = """() => {
    const prompts = [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")].map(one => one.textContent.trim());
    return prompts.length > 0 && prompts.every(text => /^\\[\\d+\\]:$/.test(text));
}"""
BOX = """
from dschat_kit import chat
from dschat_kit.runs import RunError

class Parrot:
    def stream(self, text, remember):
        if "long" in text:
            raise RunError("got a long question")
        yield from (text[:3], text[3:])

chat.box(Parrot(), "what does a cow say?")
"""


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """A running JupyterLab with folders of its own: (folder that it shows, address with {} for the notebook)."""
    home = tmp_path_factory.mktemp("lab")
    (home / "notebooks").mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {name: str(home / name.lower()) for name in
               ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR",
                "JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    environment = {**os.environ, **folders, "PATH": path, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    environment.pop("DSCHAT_HEADLESS", None)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--ip", "127.0.0.1", f"--port={port}",
               "--ServerApp.port_retries=0", "--allow-root", "--IdentityProvider.token=lab", "--LabApp.news_url=None",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
               f"--ServerApp.root_dir={home / 'notebooks'}"]
    with open(home / "server.log", "w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for_server(f"http://127.0.0.1:{port}/api/status?token=lab", server, home / "server.log")
        yield home / "notebooks", f"http://127.0.0.1:{port}/doc/tree/{{}}?token=lab&reset"
    finally:
        server.terminate()  # ends its kernels as well
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def wait_for_server(address: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(240):
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
    raise AssertionError(log.read_text())


@pytest.fixture(scope="module")
def page(lab, tmp_path_factory):
    """An empty browser window of 1280 x 1000."""
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch_persistent_context(
            str(tmp_path_factory.mktemp("browser")), executable_path=CHROMIUM, args=ARGUMENTS,
            viewport={"width": 1280, "height": 1000})
        yield browser.new_page()
        browser.close()


def run_all(page, address: str) -> None:
    """Open a notebook, wait for its kernel, run every cell and wait for the last."""
    page.goto(address, wait_until="domcontentloaded")
    page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for(timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    page.wait_for_function(DONE, timeout=60_000)


def saved(page, path: Path) -> list:
    """Outputs of the notebook as it stands on the disk after Ctrl+S."""
    before = path.stat().st_mtime_ns
    page.keyboard.press("Control+s")
    for _ in range(100):
        if path.stat().st_mtime_ns != before:
            break
        time.sleep(0.1)
    return [output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])]


def finished_run(root: Path, monkeypatch) -> Path:
    """The hand-made run, with the further numbers that notebook 04 quotes."""
    monkeypatch.syspath_prepend(str(CHECKOUT / "tests"))
    from fake_run import make_run, write_lines
    ppo = make_run(root) / "ppo"
    more = {"eval_prompts": 8, "response_length_before": 12.0, "response_length_after": 14.0, "eos_rate_after": 1.0,
            "tokens_per_second": 700.0, "gold_gain_in_std": 2.0}
    result = json.loads((ppo / "result.json").read_text()) | more
    (ppo / "result.json").write_text(json.dumps(result))
    rows = [json.loads(line) for line in (ppo / "metrics.jsonl").read_text().splitlines()]
    write_lines(ppo / "metrics.jsonl", [row | {"first_ratio_max": 1.0, "first_approx_kl": 0.0} for row in rows])
    return root


def test_a_notebook_on_a_finished_run_shows_its_figures(lab, page, tmp_path, monkeypatch):
    folder, address = lab
    root, name = finished_run(tmp_path / "run", monkeypatch), "04_ppo_hybrid_engine.ipynb"
    notebook = nbformat.read(CHECKOUT / "notebooks" / name, 4)
    parameters = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    parameters.source += f"\nrun_root, launch = {str(root)!r}, 'never'"
    nbformat.write(notebook, folder / name)
    run_all(page, address.format(name))

    outputs = saved(page, folder / name)
    wrong = [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert not wrong, wrong
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) >= 4 and all(len(output.metadata["image/png"]["alt"]) > 20 for output in pictures)
    assert page.locator(".jp-OutputArea-output:has(progress)", has_text="step 24/24").count() == 1  # the live view

    seen = page.locator(".jp-OutputArea-output img")
    sizes = seen.evaluate_all("all => all.map(one => [one.naturalWidth, one.getBoundingClientRect().width])")
    assert len(sizes) == len(pictures)
    assert all(width > 500 and shown == width for width, shown in sizes)  # whole, not squeezed
    assert page.get_by_text("<script>alert(1)</script>").count() >= 1  # an answer stays text


def test_the_box_answers_and_says_what_is_wrong(lab, page):
    folder, address = lab
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}  # else Lab asks for one
    nbformat.write(new_notebook(cells=[new_code_cell(BOX)], metadata=kernel), folder / "box.ipynb")
    run_all(page, address.format("box.ipynb"))
    entry = page.locator(".jp-OutputArea-output input[type=text]")
    assert "Enter" in entry.get_attribute("placeholder")
    said = page.locator(".jp-OutputArea-output .widget-html-content")
    for question in ("<b>moo</b> & more", "a long one", "again"):
        entry.fill(question)
        entry.press("Enter")
        playwright.expect(said.locator("b", has_text=question)).to_have_count(1, timeout=10_000)
    playwright.expect(said.locator("span")).to_have_text(["<b>moo</b> & more", "error: got a long question", "again"])
    assert entry.input_value() == ""
