"""Kernels from a folder that `python -m saml_kernels.aot` made, started by the CUDA driver itself.

The folder holds machine code: trust it as you would trust a program. Nothing of Triton is imported.
Source of the calls: CUDA driver API reference (cuModuleLoadData, cuLaunchKernel,
cuDevicePrimaryCtxRetain).
"""

from __future__ import annotations

import ctypes
import json
import math
import re
import struct
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from saml_kernels.backends.triton.signature import Launch, signature
from saml_kernels.errors import SAMLError

__all__ = ["MANIFEST", "Driver", "Prebuilt", "started"]

MANIFEST = "kernels.json"
MANIFEST_BYTES, CUBIN_BYTES = 16 << 20, 8 << 20  # more than any real one
MEMORY_BYTES = 1 << 20  # of a program, more than any kernel makes descriptors in
_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_NO_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT
_PLAIN_SHARED = 48 << 10  # what a kernel may use without asking
_LETTERS = {"pointer": "Q", "fp32": "f", "i32": "i", "i64": "q"}  # as `struct` spells them


class Driver:
    """The few calls of libcuda that load and start a kernel.

    They need a current context, which a fresh thread lacks, and autograd's may. Such a thread's
    first call fails, and is made again in the context that PyTorch works in: to ask before each
    launch would cost all of them something.
    """

    def __init__(self, library: Any = None, stream_of: Callable[[int], int] | None = None) -> None:
        """`library` stands in for libcuda.so.1, `stream_of` for PyTorch's current stream."""
        self.stream_of = stream_of or torch._C._cuda_getCurrentRawStream
        try:
            self.cuda = library or ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise SAMLError(f"CUDA driver: {error}; is an NVIDIA driver installed?") from error

    def function(self, image: bytes, entry: str, shared: int, device: int) -> ctypes.c_void_p:
        """The function `entry` of a cubin, on the current device, which is `device`."""
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        data = ctypes.c_char_p(image)
        self._check("cuModuleLoadData", ctypes.byref(module), data, device=device)
        name = ctypes.c_char_p(entry.encode())
        self._check("cuModuleGetFunction", ctypes.byref(function), module, name)
        if shared > _PLAIN_SHARED:
            size = ctypes.c_int(shared)
            self._check("cuFuncSetAttribute", function, ctypes.c_int(_MAX_DYNAMIC_SHARED), size)
        return function

    def starter(
        self,
        function: ctypes.c_void_p,
        grid: tuple[int, ...],
        threads: int,
        shared: int,
        kinds: list[str],
        device: int,
    ) -> Callable[..., None]:
        """Starts a function on `device`, the current one, with parameters of `kinds`, in its order.

        Kinds are "pointer", "fp32", "i32" and "i64". What is returned is called with a stream,
        then addresses and other values, each in the function's order; addresses that are missing
        at the end are zero.
        """
        # In memory pointers come first, so that everything is aligned.
        order = sorted(range(len(kinds)), key=lambda i: kinds[i] != "pointer")
        wide = [i for i in order if kinds[i] == "pointer"]
        layout, offsets = "=", {}
        for i in order:
            letter = _LETTERS[kinds[i]]
            layout += f"{-struct.calcsize(layout) % struct.calcsize(letter)}x"
            offsets[i] = struct.calcsize(layout)
            layout += letter
        packed = struct.Struct(layout)
        room = ctypes.create_string_buffer(max(1, packed.size))
        first = ctypes.addressof(room)
        places = (ctypes.c_void_p * len(kinds))(*(first + offsets[i] for i in range(len(kinds))))
        sizes = (*grid, 1, 1)[:3]
        fixed = (function, *map(ctypes.c_uint, (*sizes, threads, 1, 1, shared)))
        check, lock = self._check, Lock()  # the driver copies the parameters before it returns
        pack, count = packed.pack_into, len(wide)

        def start(stream: int, addresses: list[int], values: tuple[Any, ...]) -> None:
            nothing = (0,) * (count - len(addresses))
            with lock:
                pack(room, 0, *addresses, *nothing, *values)
                given = (*fixed, ctypes.c_void_p(stream), places, None)
                check("cuLaunchKernel", *given, device=device)

        return start

    def _check(self, call: str, *arguments: Any, device: int | None = None) -> None:
        """Make a call; if `device` is given, in that one's context where the thread has none."""
        status = getattr(self.cuda, call)(*arguments)
        if status == _NO_CONTEXT and device is not None:
            self._enter(device)
            self._check(call, *arguments)
        elif status:
            raise SAMLError(f"CUDA driver: {call} failed with error {status}")

    def _enter(self, device: int) -> None:
        """Make the primary context of `device` the thread's, until the process ends."""
        context, number = ctypes.c_void_p(), ctypes.c_int()
        self._check("cuDeviceGet", ctypes.byref(number), ctypes.c_int(device))
        self._check("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
        self._check("cuCtxSetCurrent", context)


def started(
    driver: Driver,
    function: ctypes.c_void_p,
    launch: Launch,
    device: int,
    threads: int,
    shared: int,
    parameters: list[int],
    memory: int = 0,
) -> Callable[..., None]:
    """A call of `function` with arguments of the kinds of `launch`.

    Args:
        driver, function, threads, shared: as for `Driver.starter`.
        launch: grid, and an example of the arguments.
        device: index, whose current stream is used.
        parameters: bytes of each of the function's own.
        memory: bytes that each program makes tensor descriptors in.

    Raises:
        ValueError: the function takes others.
    """
    types = signature(launch)[0]
    given = [(i, kind) for i, kind in enumerate(types) if kind != "constexpr"]
    kinds = ["pointer" if kind.startswith("*") else kind for _, kind in given]
    # What Triton adds: memory for descriptors, and for a profiler.
    added = len(parameters) - len(kinds)
    kinds += ["pointer"] * added
    if [struct.calcsize(_LETTERS[kind]) for kind in kinds] != parameters:
        raise ValueError("takes other arguments")
    start = driver.starter(function, launch.grid, threads, shared, kinds, device)
    tensors = [i for i, kind in given if kind.startswith("*")]
    others = itemgetter(*(i for i, kind in given if not kind.startswith("*")))
    stream_of = driver.stream_of
    memory *= math.prod(launch.grid)

    def call(*arguments: Any) -> None:
        addresses = [arguments[i].data_ptr() for i in tensors]
        if memory:
            # Later work of this stream may have it again, and comes after this kernel.
            room = arguments[tensors[0]].new_empty(memory, dtype=torch.int8)
            addresses.append(room.data_ptr())
        start(stream_of(device), addresses, others(arguments))

    return call


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

    def bind(
        self, key: str, launch: Launch, device: int, capability: tuple[int, int]
    ) -> Callable[..., None]:
        """How the kernel of that key is started with arguments of the kinds of `launch`.

        Args:
            key: see `signature.key_of`.
            launch: grid, and an example of the arguments.
            device: index; the current one.
            capability: of that device.

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
            function = self._driver.function(image, entry["entry"], entry["shared"], device)
            self._functions[key, device] = function
        try:
            return started(
                self._driver, function, launch, device, 32 * entry["warps"], entry["shared"],
                entry["parameters"], entry["memory"],
            )  # fmt: skip
        except ValueError as error:
            raise SAMLError(f"{self.folder}: {entry['file']} {error}; build it again") from error

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
    entry = {name: values[name] for name in ("file", "entry", "warps", "shared", "memory", "size")}
    entry["parameters"] = list(values["parameters"])
    if not re.fullmatch(r"[\w-]+\.cubin", entry["file"]) or not re.fullmatch(
        r"\w+", entry["entry"]
    ):
        raise ValueError(f"name {entry['file']!r} or {entry['entry']!r}")
    limits = {"warps": 32, "shared": 256 << 10, "memory": MEMORY_BYTES, "size": CUBIN_BYTES}
    for name, limit in limits.items():
        if not isinstance(entry[name], int) or not 0 <= entry[name] <= limit:
            raise ValueError(f"{name}: {entry[name]!r}")
    if any(size not in (4, 8) for size in entry["parameters"]):
        raise ValueError(f"parameters: {entry['parameters']}")
    return entry
