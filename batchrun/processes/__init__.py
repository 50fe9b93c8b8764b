"""Several processes send for one run: one endpoint to whoever sends, many cores behind it.

One process plans, admits, journals and publishes; the others do HTTP, TLS and the parsing of
streams, which is where the CPU time goes. So there is one clock for quota and budget, one breaker,
one journal, one bar and one exit code, whatever the number of processes, and no part of the input
belongs to anybody. ``Here`` starts them on this machine, ``OnNodes`` on a Ray cluster.
"""

from batchrun.processes.cluster import OnNodes, check_ray, cluster
from batchrun.processes.crew import Crew
from batchrun.processes.here import Here
from batchrun.processes.wire import Terms

__all__ = [
    "Crew",
    "Here",
    "OnNodes",
    "Terms",
    "check_ray",
    "cluster",
]
