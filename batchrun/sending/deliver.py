"""The door to sending: a job goes in, a journal fills, and what it amounted to comes out.

Another lane (a provider's batch API) or another place to run parts (processes, a cluster) stands
where ``deliver`` stands, and promises the same:

- A SENT record is in the journal before a request's first byte leaves.
- An outcome is in the journal before it counts; an answer that came is never dropped.
- Once ``end`` is told, nothing new leaves; what is on its way is waited for up to
  ``config.drain_s`` seconds (not at all when urgent), and the rest stays pending, in doubt.
- A row's failure is an outcome. What ends the run is returned as ``cause``; only bugs raise.
- When it returns, everything journaled is durable, unless the disk is the cause.

Here one write serves both records (the outcome of a worker's last row and the SENT of its next),
and fdatasync runs once a second in a thread of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

from batchrun.config import RunConfig
from batchrun.console import Progress, Snapshot
from batchrun.errors import EXIT_IO, BatchrunError
from batchrun.journal import Held, Journal
from batchrun.limits import Budget
from batchrun.sending.desk import JournalDesk, Told
from batchrun.sending.meter import Meter, Totals
from batchrun.sending.pool import Pool
from batchrun.sending.prefixes import Prefixes
from batchrun.sending.sender import TICK_S, EarlyEnd, OpenEndpoint, Sender, read_ahead
from batchrun.sending.tally import RunTally
from batchrun.sending.typed import asked
from batchrun.types import Bound, Request

SYNC_S = 1.0
# So many rows for each place: for fewer, waiting for one answer would be felt.
FEWEST_LED = 40


class Job(NamedTuple):
    """What is to be sent, whichever lane takes it."""

    config: RunConfig
    requests: Iterator[list[Request]]  # iterated in a thread of its own, ahead of the sending
    one_model: bool  # every request names the same
    before: Totals
    budget: Budget | None = None
    rows: int = 0  # to be sent


class Delivered(NamedTuple):
    """What sending amounted to; ``cause`` is what ended it early, None when nothing did."""

    cause: BatchrunError | None
    tally: RunTally
    bound_by: Bound
    reopened: int  # rows that failed alike and are pending again
    wrong_model: bool
    notes: Sequence[str] = ()  # what was found out on the way


class Watch(Protocol):
    """Asked about once a second, in a thread, with what a second process may want to know."""

    def __call__(self, snapshot: Snapshot, bound_by: Bound) -> None: ...


async def deliver(
    job: Job,
    endpoint: OpenEndpoint,
    journal: Journal,
    end: EarlyEnd,
    talk: Progress,
    watch: Watch,
    told: Told | None = None,
) -> Delivered:
    """Send the job's requests until they are settled or something ends the run.

    ``told`` hears of each settled row once it is in the journal.
    """
    how = asked(endpoint.send, job.config, end.requested.is_set)
    desk = JournalDesk(
        journal,
        endpoint.host,
        abort_after=job.config.abort_after,
        spent=how.spent,
        price=job.config.price,
        told=told,
    )
    sender = Sender(
        job.config,
        endpoint,
        desk,
        talk,
        how,
        one_model=job.one_model,
        answered=journal.count(Held.OK),
        budget=job.budget,
        prefixes=Prefixes() if job.rows >= FEWEST_LED * (job.config.concurrency or 1) else None,
    )
    meter = Meter(sender, desk.tally, job.before)
    with ThreadPoolExecutor(1, "batchrun-sync") as syncer:
        cause = await sender.run(
            read_ahead(job.requests),
            end,
            _show(meter, talk),
            _keep_durable(journal, sender.pool, syncer, meter, watch),
        )
    if cause is None or cause.exit_code != EXIT_IO:
        desk.idle()
        await asyncio.to_thread(journal.sync)
    talk.update(meter.snapshot())
    found_out = (*how.said(), *endpoint.notes)
    return Delivered(
        cause, desk.tally, meter.bound_by(), desk.reopened, desk.wrong_model, found_out
    )


async def _show(meter: Meter, talk: Progress) -> None:
    while True:
        await asyncio.sleep(TICK_S)
        talk.update(meter.sample())


async def _keep_durable(
    journal: Journal, pool: Pool, syncer: ThreadPoolExecutor, meter: Meter, watch: Watch
) -> None:
    """One fdatasync a second at most: the answers a power loss may cost."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(SYNC_S)
        try:
            if (sync := journal.begin_sync()) is not None:
                await loop.run_in_executor(syncer, sync)
                journal.end_sync()
        except BatchrunError as exc:
            pool.stop(exc, drain_s=0.0)
            return
        await loop.run_in_executor(syncer, watch, meter.snapshot(), meter.bound_by())
