"""One operation a file: the plain-torch reference and the forward and backward that the layers call.

Kernels know tensors and numbers, nothing of modules, models or configs.
"""
