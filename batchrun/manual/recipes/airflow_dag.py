"""Answers every night (Airflow 3). The key is the Airflow variable ``mistral_api_key``."""

from datetime import datetime, timedelta

from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

with DAG(
    "answers",
    schedule="0 2 * * *",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
):
    BashOperator(
        task_id="batchrun",
        cwd="/srv/prompts",
        bash_command="/opt/batchrun/bin/batchrun submit prompts.jsonl"
        " --provider mistral --quiet --json",
        env={"MISTRAL_API_KEY": "{{ var.value.mistral_api_key }}"},
        append_env=True,
        retries=3,
        retry_delay=timedelta(minutes=10),
    )
