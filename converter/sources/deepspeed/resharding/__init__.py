"""A run's state for another number of ranks: read as whole parameters, cut anew, and laid out as DeepSpeed saves it."""
