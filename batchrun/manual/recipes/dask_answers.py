"""Dask: a DataFrame with the columns of answers. python dask_answers.py IN.parquet OUT

Every partition asks for itself: give each its share of a rate limit (rpm=).
"""

import os
import sys

import dask.dataframe as dd
import pandas as pd
import pyarrow as pa

import batchrun

OPTIONS = {"base_url": os.environ["BASE_URL"], "model": os.environ["MODEL"]}


def to_pandas(table):
    return table.to_pandas(types_mapper=pd.ArrowDtype)


def answered(frame):
    answers = batchrun.answers(pa.Table.from_pandas(frame, preserve_index=False), **OPTIONS)
    return to_pandas(pa.Table.from_batches(answers, answers.schema))


prompts = dd.read_parquet(sys.argv[1], dtype_backend="pyarrow")
# meta= says what comes: Dask need not call the function with rows that it makes up.
columns = pa.Table.from_pandas(prompts._meta, preserve_index=False).schema
meta = to_pandas(batchrun.answers_schema(columns, **OPTIONS).empty_table())
prompts.map_partitions(answered, meta=meta).to_parquet(sys.argv[2], write_index=False)
