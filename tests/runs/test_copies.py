"""Which row leads those that ask the same, when the journal comes to hold an answer meanwhile."""

from __future__ import annotations

from array import array
from pathlib import Path

from test_journal import hash_of, opened, outcome_of

from batchrun.config import RunConfig
from batchrun.journal import Held
from batchrun.runs.copies import Effort, efforts, find_copies
from batchrun.runs.plan import INVALID
from batchrun.types import Usage

CONFIG = RunConfig(inputs=(), output="out.parquet", dedupe=True)


def test_an_answer_that_came_after_planning_goes_to_the_first_row(tmp_path: Path) -> None:
    with opened(tmp_path / "state") as journal:
        waiting, failed = journal.claim(hash_of(1)), journal.claim(hash_of(1))
        journal.settled(failed, outcome_of(1, "transient", final=False))
        journal.flush()
        journal.begin_pass()
        slots = array("I", [journal.claim(hash_of(1)), INVALID, journal.claim(hash_of(1))])
        assert list(slots) == [failed, INVALID, waiting]
        journal.settled(waiting, outcome_of(1))
        journal.flush()
        copies = find_copies(slots, INVALID, journal, CONFIG)
        assert journal.held(slots[0]) is Held.OK
        assert list(slots) == [waiting, INVALID, waiting]
        assert copies.is_copy(2)
        # What was tried in vain is still to be told.
        assert copies.tried(0, 3) == {2: failed}
        assert copies.tried(0, 2) == {}


def test_what_was_done_for_a_row_without_an_outcome_is_told(tmp_path: Path) -> None:
    used = Usage(7, 5, 12)
    with opened(tmp_path / "state") as journal:
        slots = [journal.claim(hash_of(number)) for number in (1, 1, 2, 2, 3, 3)]
        journal.failed(hash_of(1), 1, slots[1], in_doubt=False, usage=used)
        journal.sending(hash_of(2), 1, slots[3])
        journal.flush()
    with opened(tmp_path / "state") as journal:  # the attempt that had begun is in doubt now
        slots = [journal.claim(hash_of(number)) for number in (1, 1, 2, 2, 3, 3)]
        copies = find_copies(array("I", slots), INVALID, journal, CONFIG)
        tried = copies.tried(0, len(slots))
        assert efforts(list(tried.values()), journal) == [Effort(1, 0, used), Effort(1, 1)]
