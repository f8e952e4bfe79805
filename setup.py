"""Builds the optional native half of the CPU backend; everything else is in pyproject.toml.

Without a C compiler the installation goes on, and the backend runs on plain PyTorch
(`saml doctor` says which).
"""

from setuptools import Extension, setup

# No -fopenmp: threads are borrowed from torch at run time. No contraction: bit-equal to PyTorch.
native = Extension(
    "saml_kernels.backends.cpu._native",
    sources=["saml_kernels/backends/cpu/native.c"],
    depends=["saml_kernels/backends/cpu/native_x86.h", "saml_kernels/backends/cpu/native_neon.h"],
    libraries=["m"],
    extra_compile_args=["-O3", "-std=gnu11", "-ffp-contract=off"],
    optional=True,
)

setup(ext_modules=[native])
