"""The real SGLang on a CPU: server, scheduler and prefix cache (``make test-sglang``)."""
