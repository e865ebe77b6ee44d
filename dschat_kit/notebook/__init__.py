"""What notebooks and the terminal use around a training: it reads run folders and starts programs.

Nothing here imports torch, deepspeed or transformers: a notebook kernel must never hold the memory of an accelerator.
  launch.py     the prefix command `dschat launch -- deepspeed ...`
  processes.py  find and end every process of a job
  report.py     what a job leaves: launch.log, the readable part of its output, an honest status.json
  stage.py      the beginning of a stage: configuration, folder, what has to happen
  monitor.py    live view of a stage beside its cell
  progress.py   how far a stage or a chain is, as data and as a line of text
  plots.py      one matplotlib function a figure; reward_plots.py: those of reward models
  tables.py     figures, facts, answers and records as a notebook displays them
  execute.py    papermill over the chain of notebooks
  doctor.py     checks of the machine; diagnosis.py: checks of a run
"""
