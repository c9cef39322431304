"""Engines other than the one in train_gpt2.py: dev/run/engine.py says what an engine is."""
