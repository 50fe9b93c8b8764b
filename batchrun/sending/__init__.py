"""N requests in flight: waits and retries decided, outcomes handed to whoever keeps them."""

from batchrun.sending.classify import classify
from batchrun.sending.deliver import (
    Delivered,
    admission_for,
    deliver,
    persistence_for,
    watch_limits,
)
from batchrun.sending.desk import outcome_of, refusal
from batchrun.sending.feed import Feed
from batchrun.sending.meter import Totals
from batchrun.sending.pool import Pool, Send
from batchrun.sending.tally import RunTally

__all__ = [
    "Delivered",
    "Feed",
    "Pool",
    "RunTally",
    "Send",
    "Totals",
    "admission_for",
    "classify",
    "deliver",
    "outcome_of",
    "persistence_for",
    "refusal",
    "watch_limits",
]
