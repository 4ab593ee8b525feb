"""The HTTP fronts: vllm-rs, the fast one, and vLLM's Python server, the full one."""
