"""Training of Krea 2: LoRA and full fine-tuning, and the stages of Krea's report after them.

`loop` runs the steps, `flow` has the loss, `data` reads pictures and captions, `cache` encodes them
once, `adapters` are what is trained beside a frozen model, `base` holds that model in little
memory. Each command (`train`) puts them together. The requirements are in
requirements-training.txt; ComfyUI's nodes import nothing of this at start.
"""
