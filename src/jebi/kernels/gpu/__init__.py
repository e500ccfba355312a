"""Triton kernels and their launchers, one operation a file, named as the file beside this folder that chooses them.

Each computes what the plain-torch function of that file computes, which is its reference. Imported only where tensors
lie on a card, so that jebi runs without Triton elsewhere. `launch` starts them all. Every kernel compiles for compute
capability 7.5 and newer.
"""
