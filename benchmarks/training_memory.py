"""What training the released model fits into, and what processes send: tables as Markdown.

    python benchmarks/training_memory.py

Computed for its sizes by `krea2_training.forecast`, which tests/unit/test_train_memory.py holds
against counted steps; nothing is loaded, and nothing has run on these cards.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from krea2_model import TransformerConfig  # noqa: E402
from krea2_model.memory.machine import GB  # noqa: E402
from krea2_training.forecast import Forecast, training_memory  # noqa: E402
from krea2_training.settings.sections import FULL, Adapter, Memory, Ranks, Steps  # noqa: E402

CARDS = (12, 16, 24, 48, 80)
SIDES = (512, 768, 1024)
METHODS = ("lora", "dora")


@dataclass(frozen=True)
class Way:
    """Settings of memory; the fastest of those that fit is taken."""

    name: str
    memory: Memory


# Without activations computed again, a step takes about a quarter less time.
WAYS = (
    Way("bf16, all held", Memory(base="bf16", checkpointing=False)),
    Way("bf16", Memory(base="bf16")),
    Way("fp8", Memory(base="fp8")),
    Way("4bit", Memory(base="4bit")),
    Way("bf16, offload", Memory(base="bf16", offload=True)),
)


def tables() -> Iterator[str]:
    """The lines of the table of each adapter, and those of full fine-tuning."""
    for method in METHODS:
        yield f"| {method} | " + " | ".join(f"{side} px" for side in SIDES) + " |"
        yield "|---" * (1 + len(SIDES)) + "|"
        for card in CARDS:
            cells = (cell(method, side, card * GB) for side in SIDES)
            yield f"| {card} GB | " + " | ".join(cells) + " |"
        yield ""
    yield "| full | " + " | ".join(f"{side} px" for side in SIDES) + " |"
    yield "|---" * (1 + len(SIDES)) + "|"
    for optimiser in ("adamw", "adamw8bit"):
        needed = (needs(FULL, side, Memory(), optimiser=optimiser) for side in SIDES)
        yield f"| {optimiser} | " + " | ".join(f"{one.total / GB:.0f} GB" for one in needed) + " |"


# What several processes train, at 1024 px.
SHARED = {
    "LoRA, bf16": (Adapter(), Memory(base="bf16"), Ranks(), "adamw"),
    "LoRA, bf16, `shard = false`": (Adapter(), Memory(base="bf16"), Ranks(shard=False), "adamw"),
    "LoRA, 4bit": (Adapter(), Memory(base="4bit"), Ranks(), "adamw"),
    "full, AdamW": (Adapter(method=FULL), Memory(), Ranks(), "adamw"),
    "full, Muon": (Adapter(method=FULL), Memory(), Ranks(), "muon"),
    "full, AdamW, a copy on every 8": (Adapter(method=FULL), Memory(), None, "adamw"),
    "full, AdamW, `tensor = 4`": (Adapter(method=FULL), Memory(), Ranks(tensor=4), "adamw"),
}
COUNTS = (1, 8, 64)


def ranks_table() -> Iterator[str]:
    """The lines of the table of processes: what each needs, and sends for a batch of one."""
    yield "| | " + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in COUNTS) + " |"
    yield "|---" * (1 + len(COUNTS)) + "|"
    for name, (adapter, memory, ranks, optimiser) in SHARED.items():
        cells = []
        for processes in COUNTS:
            one = training_memory(
                TransformerConfig(),
                adapter=adapter,
                memory=memory,
                training=Steps(optimiser=optimiser),
                side=1024,
                ranks=ranks or Ranks(copies=max(1, processes // 8)),
                processes=processes,
            )
            sends = f", sends {one.traffic / GB:.1f} GB" if one.traffic else ""
            alone = processes == 1 and ranks != Ranks()
            cells.append("-" if alone else f"{one.total / GB:.1f} GB{sends}")
        yield f"| {name} | " + " | ".join(cells) + " |"


def cell(method: str, side: int, card: int) -> str:
    """The first of `WAYS` that fits a card in bytes, what it needs, and its largest batch."""
    for way in WAYS:
        one = needs(method, side, way.memory)
        if one.total <= card:
            sizes = (needs(method, side, way.memory, n).total for n in count(2))
            batch = next(n for n, size in enumerate(sizes, start=1) if size > card)
            most = f", batch up to {batch}" if batch > 1 else ""
            return f"{way.name}: {one.total / GB:.1f} GB{most}"
    return "-"


def needs(
    method: str, side: int, memory: Memory, batch: int = 1, optimiser: str = "adamw"
) -> Forecast:
    """The forecast at full width: rank 32 beside all blocks, captions of 512 tokens."""
    return training_memory(
        TransformerConfig(),
        adapter=Adapter(method=method),
        memory=memory,
        training=Steps(batch=batch, optimiser=optimiser),
        side=side,
    )


if __name__ == "__main__":
    print("\n".join([*tables(), "", *ranks_table()]))
