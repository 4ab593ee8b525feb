"""The prefill pool: what differs from the decode pool, and nothing else."""
