"""Checkpoints as the frameworks' own code writes them, on which doctor must have nothing to say."""
