"""The report: one self-contained HTML page about the runs of an output folder.

The page contains all its images, has no script, and loads nothing from the network. It shows what a run has so far and
states what is missing. Equal files give equal bytes. All figures come from existing files: the report trains and
evaluates nothing.
"""
