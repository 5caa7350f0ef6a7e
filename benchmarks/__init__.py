"""Benchmarks: every figure of the documentation about quality, speed and memory, one module and one command each.

    python -m benchmarks.linear_kernels --formats int4

Started in the repository's root; not installed with the package.
"""
