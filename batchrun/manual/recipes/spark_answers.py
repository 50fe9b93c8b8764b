"""Spark: a DataFrame with the columns of answers. spark-submit spark_answers.py IN.parquet OUT

Every task asks for itself: give each its share of a rate limit (rpm=). A task that Spark tries
again, or runs twice (spark.speculation), pays again: write the answers before going on with them.
"""

import os
import sys

from pyspark.sql import SparkSession
from pyspark.sql.pandas.types import from_arrow_schema, to_arrow_schema

import batchrun

OPTIONS = {"base_url": os.environ["BASE_URL"], "model": os.environ["MODEL"], "response_body": False}

spark = SparkSession.builder.getOrCreate()
ZONE = spark.conf.get("spark.sql.session.timeZone")
prompts = spark.read.parquet(sys.argv[1])
# The types are known from the columns: no row is sent to learn them.
told = batchrun.answers_schema(to_arrow_schema(prompts.schema, timezone=ZONE), **OPTIONS)
schema = from_arrow_schema(told)
arrow_schema = to_arrow_schema(schema, timezone=ZONE)


def answered(batches):
    for batch in batchrun.answers(batches, **OPTIONS):
        yield batch.cast(arrow_schema)  # Spark has instants in microseconds


prompts.mapInArrow(answered, schema).write.parquet(sys.argv[2])
