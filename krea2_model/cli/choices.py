"""Words that options take. Their modules import torch, which help does without; a test compares."""

OFFLOADS = ("auto", "none", "parts", "blocks")
DTYPES = ("bf16", "fp16", "fp32")
LENGTHS = ("short", "medium", "long")
CAPTION_LENGTHS = ("long", "medium", "short", "style")
PARTS = ("transformer", "text_encoder", "vae")
QUANTISATIONS = ("fp8", "int8", "int8_convrot")
# Layers of a LoRA that is extracted, and the names of its tensors.
EXTRACTED = ("all", "blocks", "attention", "mlp", "blocks+text")
KEY_STYLES = ("ai-toolkit", "kohya", "diffusers")
FILLS = ("original", "grey", "surroundings")
EDIT_FAMILIES = ("identity", "ai-toolkit", "references-only")
EDIT_TASKS = ("edit", "removal", "outpainting", "person")
REFERENCE_METHODS = ("index_timestep_zero", "index")
# Names that --model takes instead of a path; a folder of that name is ./nano.
NANO = {"nano": "turbo", "nano-raw": "raw"}
# Who makes the pictures of a table, and the files that they are kept in.
ENGINES = ("plain", "ray", "comfyui")
LAYOUTS = ("folder", "webdataset", "parquet")
# How far a neighbour is from its picture.
VARY_STRENGTH = 0.3
