"""Freestanding C99: a kernel-level graph as ``model.c``, ``model.h``, ``weights.c``, a self-test and a Makefile.

No TVM, no libc but the functions listed in the header, no dynamic memory: one static arena whose size is known.
"""
