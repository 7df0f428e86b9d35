"""Sources: what a trainer left on disk, as a checkpoint, by reading headers only."""
