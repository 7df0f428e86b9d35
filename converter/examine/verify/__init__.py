"""`verify`: checks of a folder against a trainer's loader, a source, a receipt."""
