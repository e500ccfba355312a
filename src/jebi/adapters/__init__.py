"""Adapters on a model: which maps get one, how it starts, and its files in PEFT's format."""
