"""The only place where values are computed: lazy tensors to torch tensors, and the kernels."""
