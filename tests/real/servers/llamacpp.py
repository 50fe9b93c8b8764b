"""llama.cpp's own HTTP server, as the wheel ``xllamacpp`` ships it: argv PORT GGUF KEY."""

from __future__ import annotations

import signal
import sys

import xllamacpp

PLACES, CONTEXT = 4, 1_024

port, model, key = sys.argv[1:]
params = xllamacpp.CommonParams()
params.model.path = model
params.model_alias = {"tiny"}
params.hostnames = ["127.0.0.1"]
params.port = int(port)
params.n_parallel = PLACES
params.n_ctx = PLACES * CONTEXT
params.n_gpu_layers = 0
params.offline = True
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.n_threads_http = 64
params.endpoint_metrics = True
params.api_keys = [key]
ends = {signal.SIGTERM, signal.SIGINT}
signal.pthread_sigmask(signal.SIG_BLOCK, ends)  # its threads inherit it: one waits, below
server = xllamacpp.Server(params)
signal.sigwait(ends)
