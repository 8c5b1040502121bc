"""Linear layers with low-bit weights on a GPU: weights are read once, packed, and unpacked in registers."""
