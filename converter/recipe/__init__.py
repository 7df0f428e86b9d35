"""Recipes: inputs, steps, output; what every verb builds and runs."""
