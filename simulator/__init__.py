"""Composition root of the simulated system: so far its workloads and what a cache can save."""
