"""Input files: opened safely, read exactly, parsed strictly."""
