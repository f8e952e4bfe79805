"""Builds the optional native half of the CPU backend; everything else is in pyproject.toml.

It is a plain shared library without Python in it, which ctypes loads, so one wheel serves every
Python of a platform. Without a C compiler the installation goes on, and the backend runs on plain
PyTorch (`saml doctor` says which).
"""

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext


class SharedLibrary(build_ext):
    """Builds `_native.so`, without an interpreter's name in its own or its libraries in it."""

    def build_extensions(self):
        """Compile, with a link line that does not name the folders of this machine's Python."""
        if linker := getattr(self.compiler, "linker_so", None):
            self.compiler.linker_so = [a for a in linker if not a.startswith(("-L", "-Wl,-rpath"))]
        super().build_extensions()

    def get_ext_filename(self, fullname):
        """Where ctypes looks for it, whatever the Python."""
        return fullname.replace(".", "/") + ".so"

    def get_libraries(self, ext):
        """No libpython."""
        return ext.libraries

    def get_export_symbols(self, ext):
        """No PyInit function, which Windows would ask for."""
        return []


class PlatformWheel(bdist_wheel):
    """A wheel for every Python 3 of a platform."""

    def get_tag(self):
        """Python, ABI, platform."""
        return "py3", "none", super().get_tag()[2]


PARTS = ("x86", "neon", "experts", "speakers")

# No -fopenmp: threads are borrowed from torch at run time. No contraction: bit-equal to PyTorch.
native = Extension(
    "saml_kernels.backends.cpu._native",
    sources=["saml_kernels/backends/cpu/native.c"],
    depends=[f"saml_kernels/backends/cpu/native_{part}.h" for part in PARTS],
    libraries=["m"],
    extra_compile_args=["-O3", "-g0", "-std=gnu11", "-ffp-contract=off"],
    optional=True,
)

setup(
    ext_modules=[native],
    cmdclass={"build_ext": SharedLibrary, "bdist_wheel": PlatformWheel},
)
