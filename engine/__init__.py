"""The engine host that both pools run: vLLM and a simulated engine behind one interface."""
