"""Quantised weights: which tensors of a checkpoint are one weight, by format, and what it is once it is whole."""
