"""An engine without a model: real scheduling, caching and hand-off; computed time and tokens."""
