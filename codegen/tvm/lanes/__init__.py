"""Contractions with activations in lanes: any pattern of 32-bit units, selected by plain addresses.

``choose`` → ``packing`` → ``emit``; ``template`` makes a kernel template of them. The patterns that gain: blocks of
four 8-bit weights along the reduction, floats with or without a structure, either of them shared by 2 or 4 outputs.
"""
