"""Models on the Hub: names, files at a commit, bytes by range."""
