"""The embedded server as a process of its own: llama.cpp's HTTP server, fed one JSON argument.

Run as a file, it needs nothing but ``xllamacpp``; it serves until it is killed.
"""

import json
import sys
import threading

import xllamacpp


def main() -> None:
    """Serve until the starter ends this process; the address is printed."""
    options = json.loads(sys.argv[1])
    parameters = xllamacpp.CommonParams()
    parameters.model.path = options["weights"]
    parameters.model_alias = {options["model"]}
    parameters.port = options["port"]
    parameters.n_parallel = options["slots"]
    parameters.n_ctx = options["context_length"] * options["slots"]
    parameters.cache_prompt = True
    parameters.endpoint_metrics = True
    parameters.cpuparams.n_threads = options["threads"]
    parameters.cpuparams_batch.n_threads = options["threads"]
    server = xllamacpp.Server(parameters)
    print("listening at", server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
