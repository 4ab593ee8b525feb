"""Wire contracts that everyone shares: messages, identifiers, errors.

Nothing here imports vLLM, torch or ray, so that a router process stays small and starts at once.
"""
