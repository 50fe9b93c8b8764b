"""Ray Data: a Dataset with the columns of answers. python ray_data_answers.py IN.parquet OUT

Each worker asks for itself: give each its share of a rate limit (rpm=). For one quota, one budget
and answers that are kept whatever dies, see batchrun submit --engine ray.
"""

import os
import sys

import pyarrow as pa
import ray

import batchrun

WORKERS = 2
OPTIONS = {"base_url": os.environ["BASE_URL"], "model": os.environ["MODEL"]}


class Answered:
    def __call__(self, table):
        for batch in batchrun.answers(table, **OPTIONS):
            yield pa.Table.from_batches([batch])


prompts = ray.data.read_parquet(sys.argv[1])
answers = prompts.map_batches(
    Answered,
    batch_format="pyarrow",
    batch_size=10_000,  # large: a batch waits for its slowest row
    concurrency=WORKERS,
    num_cpus=0,  # they wait for the endpoint, and must not starve who reads and writes
)
answers.write_parquet(sys.argv[2])
