"""Cases of an exam: half of them, so that all tests run in minutes; whole where asked for."""

import os
from collections.abc import Sequence
from typing import TypeVar

Case = TypeVar("Case")

WHOLE = "KREA2_WHOLE_EXAMS"


def some(cases: Sequence[Case]) -> Sequence[Case]:
    """Every second case; all of them where the environment has KREA2_WHOLE_EXAMS."""
    return cases if os.environ.get(WHOLE) else cases[::2]
