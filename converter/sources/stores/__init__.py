"""Models in object stores: names, listings, bytes by range."""
