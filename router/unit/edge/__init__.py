"""The edge: HAProxy's configuration, and the scripts that run in it."""
