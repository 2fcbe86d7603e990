"""Real clusters on this machine: a Slurm of two nodes and a Ray (``make test-cluster``)."""
