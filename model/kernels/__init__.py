"""Fused kernels for CPUs, in C++ and called from Python: BatchNorm with ReLU, alone or after a cheap convolution.

conditions.py decides whether they compute exactly what PyTorch's operators do, compute.py calls them, and library.py
compiles and loads them. model/fused.py is the interface for networks.
"""
