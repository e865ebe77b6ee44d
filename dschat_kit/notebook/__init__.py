"""What notebooks and the terminal use around a training: it reads run folders and starts programs.

Nothing here imports torch, deepspeed or transformers: a notebook kernel must never hold the memory of an accelerator.
  launch.py     the prefix command `dschat launch -- deepspeed ...`
  processes.py  find and end every process of a job (Linux, through /proc)
  lines.py      from raw output to whole lines, and which of them a reader is shown
  monitor.py    live view of a stage in JupyterLab and in a terminal
  plots.py      one matplotlib function a figure
  execute.py    papermill over the chain of notebooks
"""
