"""Lazy tensors: dtypes, the closed set of nodes, and what can be asked of them without reading a byte."""
