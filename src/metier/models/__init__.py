"""Weights, and what runs on them: loading, GGUF, adapters, generation, constrained answers."""
