"""Plans, and the writer that turns a plan into a folder: whole and proved, or absent."""
