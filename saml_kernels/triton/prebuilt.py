"""Kernels from a folder that `python -m saml_kernels.aot` made, started by the CUDA driver itself.

The folder holds machine code: trust it as you would trust a program. Nothing of Triton is imported.
Source of the calls: CUDA driver API reference (cuModuleLoadData, cuLaunchKernel).
"""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from saml_kernels.errors import SAMLError
from saml_kernels.triton.signature import Launch, signature

__all__ = ["MANIFEST", "Driver", "Prebuilt"]

MANIFEST = "kernels.json"
MANIFEST_BYTES, CUBIN_BYTES = 16 << 20, 8 << 20  # more than any real one
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_PLAIN_SHARED = 48 << 10  # what a kernel may use without asking


class Driver:
    """The few calls of libcuda that load and start a kernel."""

    def __init__(self, library: Any = None) -> None:
        """`library` stands in for libcuda.so.1."""
        try:
            self.cuda = library or ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise SAMLError(f"CUDA driver: {error}; is an NVIDIA driver installed?") from error

    def function(self, image: bytes, entry: str, shared: int) -> ctypes.c_void_p:
        """The function `entry` of a cubin, in the current context."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check("cuModuleLoadData", ctypes.byref(module), ctypes.c_char_p(image))
        name = ctypes.c_char_p(entry.encode())
        self._check("cuModuleGetFunction", ctypes.byref(function), module, name)
        if shared > _PLAIN_SHARED:
            size = ctypes.c_int(shared)
            self._check("cuFuncSetAttribute", function, ctypes.c_int(_MAX_DYNAMIC_SHARED), size)
        return function

    def start(
        self,
        function: ctypes.c_void_p,
        grid: tuple[int, ...],
        threads: int,
        shared: int,
        stream: int,
        parameters: list[Any],
    ) -> None:
        """Start a function on a stream; `parameters` are ctypes values in its order."""
        places = (ctypes.c_void_p * len(parameters))(*(ctypes.addressof(p) for p in parameters))
        sizes = (*grid, 1, 1)[:3]
        self._check(
            "cuLaunchKernel", function, *map(ctypes.c_uint, (*sizes, threads, 1, 1, shared)),
            ctypes.c_void_p(stream), places, None,
        )  # fmt: skip

    def _check(self, call: str, *arguments: Any) -> None:
        status = getattr(self.cuda, call)(*arguments)
        if status:
            raise SAMLError(f"CUDA driver: {call} failed with error {status}")


class Prebuilt:
    """The kernels of one folder."""

    def __init__(self, folder: Path, driver: Driver | None = None) -> None:
        """Read the manifest; cubins are loaded at their first use.

        Raises:
            SAMLError: no such folder, or its manifest is not one.
        """
        self.folder, self._driver = folder, driver
        path = folder / MANIFEST
        try:
            if path.stat().st_size > MANIFEST_BYTES:
                raise SAMLError(f"{path}: larger than any manifest; build the folder again")
            values = json.loads(path.read_text())
            self.arch = str(values["arch"])
            self.kernels = {str(k["key"]): _entry(k) for k in values["kernels"]}
            self.capability = divmod(int(self.arch.removeprefix("sm_")), 10)
        except OSError as error:
            raise SAMLError(
                f"{path}: {error.strerror or error}; make it with python -m saml_kernels.aot"
            ) from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise SAMLError(f"{path}: not a manifest of kernels ({error!r})") from error
        self._functions: dict[tuple[str, int], ctypes.c_void_p] = {}

    def launch(
        self, key: str, launch: Launch, stream: int, device: int, capability: tuple[int, int]
    ) -> None:
        """Start the kernel of that key.

        Raises:
            SAMLError: the folder is for other devices, lacks the kernel, or holds a damaged one.
        """
        entry = self.kernels.get(key)
        if entry is None:
            raise SAMLError(
                f"{self.folder}: holds no {launch.name} kernel for this call; build the folder "
                "with this version, model, dtype and number of experts, or unset SAML_KERNELS "
                "(tensors must start at multiples of 16 bytes, as PyTorch's own do)"
            )
        # From 9.0 on Triton builds for one architecture alone (sm_90a); before, for later minors.
        later = capability[0] == self.capability[0] < 9 and capability >= self.capability
        if capability != self.capability and not later:
            have = f"sm_{capability[0]}{capability[1]}"
            raise SAMLError(f"{self.folder}: built for {self.arch}, this device is {have}")
        if self._driver is None:
            self._driver = Driver()
        function = self._functions.get((key, device))
        if function is None:
            image = self._image(entry)
            function = self._driver.function(image, entry["entry"], entry["shared"])
            self._functions[key, device] = function
        types = signature(launch)[0]
        given = zip(types, launch.arguments, strict=True)
        parameters = [_parameter(kind, a) for kind, a in given if kind != "constexpr"]
        # What Triton adds: scratch memory, which these kernels do not use.
        parameters += [ctypes.c_void_p(0)] * (len(entry["parameters"]) - len(parameters))
        if [ctypes.sizeof(p) for p in parameters] != entry["parameters"]:
            raise SAMLError(f"{self.folder}: {entry['file']} takes other arguments; build it again")
        self._driver.start(
            function, launch.grid, 32 * entry["warps"], entry["shared"], stream, parameters
        )

    def _image(self, entry: dict[str, Any]) -> bytes:
        path = self.folder / entry["file"]
        try:
            image = path.read_bytes()
        except OSError as error:
            raise SAMLError(f"{path}: {error.strerror or error}; build the folder again") from error
        if len(image) != entry["size"] or image[:4] != b"\x7fELF":
            raise SAMLError(f"{path}: damaged; build the folder again")
        return image


def _entry(values: dict[str, Any]) -> dict[str, Any]:
    """The fields that a launch needs, checked."""
    found = {name: values[name] for name in ("file", "entry", "warps", "shared", "size")}
    found["parameters"] = list(values["parameters"])
    if not re.fullmatch(r"[\w-]+\.cubin", found["file"]) or not re.fullmatch(
        r"\w+", found["entry"]
    ):
        raise ValueError(f"name {found['file']!r} or {found['entry']!r}")
    limits = {"warps": 32, "shared": 256 << 10, "size": CUBIN_BYTES}
    for name, limit in limits.items():
        if not isinstance(found[name], int) or not 0 <= found[name] <= limit:
            raise ValueError(f"{name}: {found[name]!r}")
    if any(size not in (4, 8) for size in found["parameters"]):
        raise ValueError(f"parameters: {found['parameters']}")
    return found


def _parameter(kind: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return {"fp32": ctypes.c_float, "i32": ctypes.c_int32, "i64": ctypes.c_int64}[kind](value)
