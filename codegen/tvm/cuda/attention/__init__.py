"""Attention on a GPU: scores never leave the block, whatever the number of keys."""
