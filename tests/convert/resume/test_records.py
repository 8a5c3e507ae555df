"""Lines of a record vouch for themselves: whatever happens to some, the others say what they said."""

from __future__ import annotations

from random import Random

import pytest
from moecast.convert.resume.records import Key, Spent, entry, read_record, sealed
from mutations import damaged_bytes

HEADER = {"fingerprint": {"source": "this"}, "version": "1"}
KEYS: list[Key] = [("out", f"weight {number}", 0, 4, 77) for number in range(12)]


def _lines(header: object = HEADER) -> list[bytes]:
    """A header, twice, and a line for each key."""
    first = sealed(header)
    seed = int(first[:8], 16)
    return [first, first, *(sealed(entry([key], Spent(float(at), at)), seed) for at, key in enumerate(KEYS))]


def test_a_whole_record() -> None:
    content = b"".join(_lines())
    record = read_record(content + b"0123")  # a line was being written
    assert record.header == HEADER and record.done == set(KEYS) and record.spent == Spent(11.0, 11)
    assert record.damaged == 0 and record.length == len(content)


@pytest.mark.parametrize("seed", range(200))
def test_damage_costs_the_lines_that_it_meets(seed: int) -> None:
    """Flips, cuts, insertions: every line that is still there counts, and none that never was."""
    random, lines = Random(seed), _lines()
    damaged = damaged_bytes(b"".join(lines), random)
    record = read_record(damaged)
    left = damaged.split(b"\n")[:-1]
    expected = {key for key, line in zip(KEYS, lines[2:], strict=True) if line[:-1] in left}
    if lines[0][:-1] not in left:
        assert record.header is None and not record.done
    else:
        assert record.header == HEADER and record.done == expected


def test_order_and_repetition_cost_nothing() -> None:
    for seed in range(20):
        random, lines = Random(seed), _lines()
        lines += random.sample(lines, 5)
        random.shuffle(lines)
        record = read_record(b"".join(lines))
        assert (record.header, record.done, record.damaged) == (HEADER, set(KEYS), 0)


def test_lines_of_other_records_do_not_count() -> None:
    own, foreign = _lines(), _lines({"fingerprint": {"source": "that"}, "version": "1"})
    record = read_record(b"".join((*own[:5], *foreign[5:])))
    assert record.header == HEADER and record.done == set(KEYS[:3]) and record.damaged == len(foreign) - 5
