"""The check on a GPU: is the pack correct there, managed as it should be, and how fast.

    bash scripts/gpu_check.sh [--tiny] [--only SECTION ...] [--out DIR]

`sections.py` is the table of contents. `__main__.py` runs the sections in processes of their own
and keeps to the deadline; `worker.py` is such a process. Every row is written to results.json as
soon as it is measured, so that whatever ends a run early loses no number.
"""
