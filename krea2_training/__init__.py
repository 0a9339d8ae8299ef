"""Training of Krea 2: LoRA and full fine-tuning, and the stages of Krea's report after them.

Each command (`train`, `pretrain`, `distil`, `prefer`, `reward`, `slider`) is a module that gives a
`session` its loss. `data` reads pictures and captions and encodes them once, `weights` has what is
trained beside a frozen model, `engine` the loop, `settings` what a TOML file may say. The
requirements are in requirements-training.txt; ComfyUI's nodes import nothing of this at start.
"""
