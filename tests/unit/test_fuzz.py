"""A short run of scripts/reliability/fuzz.py; docs/reliability.md has the counts of a long one."""

import pytest

from measure_reliability import updated
from reliability import fuzz
from reliability.fuzz_cases import CASES


@pytest.mark.parametrize("kind", CASES)
def test_files_of_any_content_load_or_are_refused(tmp_path, kind):
    found = fuzz.run(tmp_path, [kind], 30, seed=0)[kind]
    assert found.total() == 30 and found["refused"] > 5, found
    # What is harmless passes, so the cases are not all broken in the same way. Of a header nearly
    # every place counts.
    assert found["accepted"] > 0 or kind == "safetensors headers", found


def test_what_the_fuzzer_would_call_a_fault(tmp_path):
    """Another error, too much time and too much memory, each by a case made for it."""

    def failing(sources, dice):
        return 10, lambda: {}["missing"]

    def slow(sources, dice):
        def read():
            started = fuzz.time.process_time()
            while fuzz.time.process_time() - started < 0.2:
                pass

        return 10, read

    def large(sources, dice):
        def read():
            held = bytearray(b"x") * 80_000_000
            fuzz.time.sleep(0.1)
            del held

        return 10, read

    for case, message, most in (
        (failing, "KeyError", 2.0), (slow, "takes 0.* s", 0.1), (large, "takes .* MB", 2.0),
    ):  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fuzz, "MOST_SECONDS", most)
            patch.setitem(CASES, "made for it", case)
            with pytest.raises(fuzz.Fault, match=message):
                fuzz.run(tmp_path / case.__name__, ["made for it"], 1)


@pytest.mark.parametrize("may_reset", [True, False])
def test_memory_is_seen_below_an_earlier_peak(monkeypatch, may_reset):
    if not may_reset:
        monkeypatch.setattr(fuzz, "_reset_mark", lambda: False)
    earlier = bytearray(b"x") * 200_000_000
    del earlier
    with fuzz._PeakMemory() as memory:
        held = bytearray(b"x") * 80_000_000
        fuzz.time.sleep(0.1)
        del held
    assert 60e6 < memory.grown < 120e6


def test_a_section_of_the_page_is_made_anew():
    page = "# Head\n\nWords.\n\n## One\n\nold\n\n## Two\n\nstays\n\nfoot\n"
    new = updated(page, {"One": "## One\n\nnew\n", "Three": "## Three\n\nlast\n"})
    assert new == (
        "# Head\n\nWords.\n\n## One\n\nnew\n\n## Two\n\nstays\n\n## Three\n\nlast\n\nfoot\n"
    )
    assert updated(new, {"Three": "## Three\n\nlast\n"}) == new
