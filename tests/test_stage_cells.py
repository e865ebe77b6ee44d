"""A `%%bash` cell that fails or is interrupted says so in one line, and still fails."""
import nbformat
from fake_run import make_run
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

BEGIN = """
from dschat_kit.notebook import stage
run = stage.begin_cell("sft", preset="tiny", run_root={root!r}, set_=None, launch="never", num_gpus=1,
                       resume="never", fresh=False)
"""
INTERRUPT = """
import os, signal, threading
threading.Timer(3, os.kill, (os.getpid(), signal.SIGINT)).start()
"""
STUBBORN = "%%bash\ntrap '' INT\nsleep 5"  # outlives IPython's patience, as ranks do


def errors(tmp_path, *cells: str) -> list:
    book = new_notebook(cells=[new_code_cell(cell) for cell in (BEGIN.format(root=str(make_run(tmp_path))), *cells)])
    NotebookClient(book, timeout=60, kernel_name="python3", allow_errors=True).execute()
    nbformat.validate(book)
    return [[output for output in cell.outputs if output.output_type == "error"] for cell in book.cells]


def test_an_exit_code_is_one_line(tmp_path):
    begun, failed, fine = errors(tmp_path, "%%bash\nexit 7", "print('other cells are as ever')")
    assert not begun and not fine and len(failed) == 1
    assert failed[0].ename == "CalledProcessError" and "status 7" in failed[0].evalue
    assert failed[0].traceback == ["error: the cell ended with exit code 7"]


def test_an_interrupt_is_one_line(tmp_path):
    *_, interrupted = errors(tmp_path, INTERRUPT, STUBBORN)
    assert len(interrupted) == 1 and interrupted[0].ename == "CalledProcessError"
    assert len(interrupted[0].traceback) == 1 and interrupted[0].traceback[0].startswith("interrupted")
