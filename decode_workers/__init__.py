"""The decode pool: what differs from the prefill pool, and nothing else."""
