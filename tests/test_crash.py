"""Killed at any time, nothing is lost and nothing is asked twice; the harness tells the story."""

from __future__ import annotations

import random
from pathlib import Path

from crash_harness import survive

KILLS = 50


def test_killed_at_any_time_no_answer_is_lost_and_none_asked_for_again(tmp_path: Path) -> None:
    # Another story every time: what fails names its seed.
    seed = random.SystemRandom().randrange(1_000_000)
    told = survive(KILLS, seed, tmp_path, say=print)
    assert told.kills == KILLS
    assert len(told.moments) == 4
