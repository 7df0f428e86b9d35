"""What each verb does, as a function from plain values to a recipe."""
