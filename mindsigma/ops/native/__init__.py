"""Kernels for the CPU in C++, compiled on the user's machine, and the MindSpore operations that call them."""
