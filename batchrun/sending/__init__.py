"""N requests in flight: waits and retries decided, outcomes handed to whoever keeps them."""

from batchrun.limits import NO_BOUND, Budget, longest_answer, unbounded
from batchrun.sending.deliver import Delivered, Job, deliver
from batchrun.sending.desk import outcome_of, refusal
from batchrun.sending.feed import Feed
from batchrun.sending.meter import Totals
from batchrun.sending.sender import EarlyEnd, OpenEndpoint, Sender
from batchrun.sending.tally import RunTally
from batchrun.sending.typed import Spent, asked

__all__ = [
    "NO_BOUND",
    "Budget",
    "Delivered",
    "EarlyEnd",
    "Feed",
    "Job",
    "OpenEndpoint",
    "RunTally",
    "Sender",
    "Spent",
    "Totals",
    "asked",
    "deliver",
    "longest_answer",
    "outcome_of",
    "refusal",
    "unbounded",
]
