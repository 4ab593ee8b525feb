"""vLLM as an engine: its EngineCore in a process of its own, reached by its own protocol.

`engine.py` runs in the worker's process and imports no vLLM; `process.py` is the engine process,
into which vLLM loads `scheduler.py` and `model_worker.py` by their names.
"""
