"""Composition root of the simulated system. Empty until the simulator is built."""
