"""Several machines that share a directory: one coordinates, the others run what they are told."""
