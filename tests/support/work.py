"""Work by counting, since seconds depend on the machine and on what else it does."""

import sys
import time
from collections.abc import Callable


def count_events(call: Callable[[], object]) -> int:
    """Number of lines, calls and returns that Python executes in a call."""
    count = 0

    def trace(frame, event, argument):
        nonlocal count
        count += 1
        return trace

    earlier = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(earlier)
    return count


def assert_linear(call: Callable[[int], object], size: int) -> None:
    """Assert that eight times the size is no more than some 16 times the work.

    Lines are counted, which are the same at each run. What C does inside of one, such as a search
    that goes back, only the processor's time shows: quadratic, it is 64 times as much.
    """
    small, large = (count_events(lambda n=n: call(n)) for n in (size, 8 * size))
    assert large < 16 * small + 1000, (small, large)
    ratios = []
    for _ in range(5):
        seconds = []
        for n in (size, 8 * size):
            start = time.process_time()
            call(n)
            seconds.append(time.process_time() - start)
        ratios.append((seconds[1] - 0.005) / max(seconds[0], 1e-4))
        if ratios[-1] < 30:
            return
    raise AssertionError(f"Times at eight times the size: {ratios}")
