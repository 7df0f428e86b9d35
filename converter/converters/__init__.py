"""Converters: pure functions from checkpoint to checkpoint. They move no tensor bytes."""
