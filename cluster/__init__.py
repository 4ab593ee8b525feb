"""Composition root: configuration, supervisor, operator API and the `baton` command."""
