"""Composition root of the live system: configuration, supervisor, operator API and the `baton` command."""
