"""Calls of the kernels of `llama2rt._cpu`.

Arguments have passed the checks of `contract`. What is left to do here is to copy where a kernel
needs the last dimension contiguous and to allocate results; the module reads shapes, strides and
addresses itself. Each call names its thread count: torch's own.
"""
