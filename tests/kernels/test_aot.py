"""Ahead-of-time builds for GPUs that are not here, and the loader that starts them."""

import ctypes
import json
import os
import subprocess
import sys
from functools import cache
from threading import Thread, local

import pytest
import torch

pytest.importorskip("triton")

from saml_kernels import SAMLError, aot, quantize
from saml_kernels.backends.triton import backend as backend
from saml_kernels.backends.triton import configs
from saml_kernels.backends.triton.facts import weight_parts
from saml_kernels.backends.triton.launcher import kernel, recording
from saml_kernels.backends.triton.plan import backward_plan, forward_plan
from saml_kernels.backends.triton.prebuilt import Driver, Prebuilt
from saml_kernels.backends.triton.signature import Varying, key_of, signature
from saml_kernels.quantization.tensor import QuantizedTensor

FORWARD = {"single", "project", "dequantize", "product"}  # of the routes that the model chooses
TRAINED = FORWARD | {"backward", "gradients"}
ALONE = {"finish"}  # of one speaker; and backward
ALONE_TRAINED = ALONE | {"finish_backward"}
LIMIT = {"sm_90": 227 << 10}  # shared memory where tensor descriptors fill it; else 99 KB


def run_aot(*arguments: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "saml_kernels.aot", *arguments],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip


def check_build(folder, *arguments):
    done = run_aot("--model", "base", *arguments, str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = json.loads((folder / "kernels.json").read_text())
    for entry in manifest["kernels"]:
        assert entry["spilled"] == 0
        assert entry["shared"] <= LIMIT.get(manifest["arch"], 99 << 10)
        assert (folder / entry["file"]).stat().st_size == entry["size"]
    return {k["name"] for k in manifest["kernels"]}


@pytest.mark.parametrize(
    "options",
    ["sm_80 --speakers --train", "sm_90 --dtype bfloat16 --top-k 2", "sm_100 --train",
     "sm_87 --train --expert-format float32",
     "sm_80 --dtype float32 --experts 1 --rank 1"],
)  # fmt: skip
def test_builds_without_spills(options, tmp_path):
    names = check_build(tmp_path, "--arch", *options.split())
    expected = set(TRAINED if "--train" in options else FORWARD)
    if "--speakers" not in options:
        expected |= ALONE_TRAINED if "--train" in options else ALONE
    if "sm_90" in options:  # elsewhere the rule finds others faster
        expected.add("persistent")
    assert names == expected


def test_experts_in_8_bits_with_given_gates(tmp_path):
    options = ("--expert-format", "int8", "--speakers", "--router", "given")
    assert check_build(tmp_path, "--arch", "sm_87", *options) == FORWARD


@pytest.mark.parametrize("flag", ["--arch", "--model", "--dtype", "--router", "--expert-format"])
def test_unknown_name(flag, tmp_path):
    done = run_aot(flag, "nothing", str(tmp_path))
    assert done.returncode == 2
    assert "nothing" in done.stderr and "expected one of" in done.stderr


# The loader, with a library that notes its calls in place of libcuda.


class Library:
    """cuModuleLoadData and the rest as Python functions."""

    def __init__(self) -> None:
        self.loaded, self.launched, self.shared = [], [], []

    def cuModuleLoadData(self, module, image):
        self.loaded.append(image.value[:4])
        module._obj.value = 100 + len(self.loaded)
        return 0

    def cuModuleGetFunction(self, function, module, name):
        self.entry = name.value.decode()
        function._obj.value = module.value + 1000
        return 0

    def cuFuncSetAttribute(self, function, attribute, value):
        assert attribute.value == 8
        self.shared.append(value.value)
        return 0

    def cuLaunchKernel(self, function, *rest):
        grid, (threads, _, _, shared) = rest[:3], rest[3:7]
        stream, places, extra = rest[7:]
        assert function.value > 1000 and extra is None
        self.launched.append(
            ([g.value for g in grid], threads.value, shared.value, stream.value, list(places))
        )
        self.check(list(places))
        return 0


def stream_of(device):
    return 7


def start(ready, launch):
    """Bind the launch's kernel and start it with the launch's own arguments."""
    ready.bind(key_of(launch), launch, 0, (8, 7))(*launch.arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("sm_87")
    assert check_build(made, "--arch", "sm_87", "--train") == TRAINED | ALONE_TRAINED
    return made


def calls(width: int, tokens: int):
    """Every launch of one layer, forward and backward, as an sm_87 device would make it."""
    weight = quantize(torch.randn(width, width))
    half = {"dtype": torch.float16}
    a, b = torch.zeros(4, 4, width, **half), torch.zeros(4, width, 4, **half)
    x, router = torch.zeros(tokens, width, **half), torch.zeros(4, width, **half)
    bias = torch.zeros(width, **half)
    how = {"routing": (None, 1.0)}
    with configs.pretending("sm_87", 16), recording() as found:
        backend.forward(x, weight, a, b, router, bias, 1.0, **how)
        backend.backward(x, x, weight, a, b, router, 1.0, (True,) * 4, **how)
    return found


@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 40, 100, 300, 1024, 1500])
def test_a_folder_holds_what_any_number_of_tokens_needs(folder, tokens):
    library = Library()
    ready = Prebuilt(folder, Driver(library, stream_of))
    found = calls(512, tokens)
    assert len(found) >= 4
    for launch in found:
        sent = []

        def check(places, launch=launch, sent=sent):
            kinds = zip(signature(launch)[0], launch.arguments, strict=True)
            given = [value for kind, value in kinds if kind != "constexpr"]
            for place, value in zip(places, given, strict=False):
                if isinstance(value, torch.Tensor):
                    assert (ctypes.c_void_p.from_address(place).value or 0) == value.data_ptr()
                elif isinstance(value, float):
                    assert ctypes.c_float.from_address(place).value == value
                else:
                    assert ctypes.c_int32.from_address(place).value == value
            sent.append(len(places) - len(given))

        library.check = check
        start(ready, launch)
        assert sent == [2]  # Triton's two scratch pointers
        grid, threads, _, stream, _ = library.launched[-1]
        assert grid == [*launch.grid, 1, 1][:3] and threads == 32 * launch.warps and stream == 7
    assert set(library.loaded) == {b"\x7fELF"}
    before = len(library.loaded)
    start(ready, found[-1])
    assert len(library.loaded) == before  # a module is loaded once


def test_sizes_that_vary_are_those_that_kernels_are_not_specialised_on():
    for launch in calls(512, 20) + calls(512, 2000):
        function = kernel(launch.name)
        named = zip(function.arg_names, launch.arguments, strict=False)
        varying = {n for n, v in named if isinstance(v, Varying)}
        assert varying == set(function.do_not_specialize), launch.name


@cache
def kept(arch: str, width: int, router: str, many: bool, train: bool) -> frozenset[str]:
    """Keys of what a folder would hold."""
    gating = (None, 1.0) if router == "token" else None
    layers = aot._Layers(width, torch.float16, "nf4", 4, 4, "float", gating, many, train)
    return frozenset(key_of(launch) for launch in layers.launches(arch))


def wanted(arch, processors, m, shape, *, router="token", many=False, spans=(1, 1), needs=()):
    """Launches of one layer as a device asks for them; backward for each of `needs`."""

    def tensor(*shape, dtype=torch.float16):
        return torch.empty(*shape, dtype=dtype, device="meta")

    lead, gating = (2,) if many else (), (None, 1.0) if router == "token" else None
    weight, (n, k) = QuantizedTensor.empty(shape, "nf4", device="meta"), shape
    a, b = tensor(*lead, 4, 4, k), tensor(*lead, 4, n, 4)
    gates = tensor(*lead, 4, k) if gating else tensor(m // spans[0], 4)
    speakers = tensor(m // spans[1], dtype=torch.int32) if many else None
    x, dy, bias = tensor(m, k), tensor(m, n), tensor(n)
    with configs.pretending(arch, processors), recording() as found:
        given = (x, weight, a, b, gates)
        facts = backend.facts_of(*given, bias, speakers, gating, spans=spans)
        parts, plain, made = weight_parts(weight), None, None
        for keep in (False, True) if needs else (False,):
            _, plain, made = forward_plan(facts, keep)(
                x, parts, a, None, b, None, gates, bias, speakers, 1.0
            )
        facts = backend.facts_of(*given, None, speakers, gating, spans=spans, dy=dy)
        for each in needs:
            plan = backward_plan(facts, each, True)
            plan(dy, x, parts, a, b, gates, speakers, 1.0, plain, made)
    return found


def missing(found, held):
    return {launch.name for launch in found if key_of(launch) not in held}


EVERY = (True,) * 4
# Of gates of a clip; of one alone, whose speaker is one of many; of both.
SPANS = [
    ("given", False, True, (1, 0)),
    ("token", True, False, (0, 1)),
    ("given", True, False, (1, 1)),
]


@pytest.mark.parametrize(("router", "many", "train", "shares"), SPANS)
def test_one_kernel_serves_clips_of_every_length(router, many, train, shares):
    held = kept("sm_87", 384, router, many, train)
    names = set()
    for m in (1, 4, 5, 20, 300, 448, 1500):
        spans = tuple(m if shared else 1 for shared in shares)
        how = {"router": router, "many": many, "spans": spans}
        found = wanted("sm_87", 16, m, (384, 384), needs=(EVERY,) if train else (), **how)
        assert not missing(found, held), (m, spans)
        names |= {launch.name for launch in found}
        for launch in found if m > 1 else ():
            function = kernel(launch.name)
            named = zip(function.arg_names, launch.arguments, strict=False)
            varying = {n for n, v in named if isinstance(v, Varying)}
            free = set(function.do_not_specialize)
            assert free <= varying <= free | set(function.do_not_specialize_on_alignment)
    assert names >= {"single", "project", "product"}


def test_a_span_of_one_is_compiled_in_and_another_is_not_divided_by_16():
    """By Triton at a first call, as in a folder: else an aligned clip would serve all others."""
    for launch in wanted(
        "sm_87", 16, 448, (384, 384), router="given", spans=(448, 1), needs=(EVERY,)
    ):
        function = kernel(launch.name)
        if "gates_span" not in function.arg_names:
            continue
        place = function.arg_names.index("gates_span")
        types, aligned = signature(launch)
        assert types[place] == "i32" and place not in aligned
        assert "gates_span" in function.do_not_specialize_on_alignment
        assert "gates_span" not in function.do_not_specialize
        if "speakers_span" in function.arg_names:
            assert types[function.arg_names.index("speakers_span")] == "constexpr"


@pytest.mark.parametrize("router", ["token", "given"])
def test_a_folder_to_train_with_knows_frozen_parts(router):
    held = kept("sm_87", 384, router, False, True)
    needs = [
        EVERY,
        (False, True, True, True),  # a first layer
        (True, False, False, True), (False, False, False, True),  # the gates alone learn
        (True, True, True, False), (False, True, True, False),  # the experts alone
        (True, False, False, False),  # nothing here, but what comes before
    ]  # fmt: skip
    for m in (16, 100, 300, 1500):
        for spans in ((1, 1), (m, 1)) if router == "given" else ((1, 1),):
            found = wanted("sm_87", 16, m, (384, 384), router=router, spans=spans, needs=needs)
            assert not missing(found, held), (m, spans)


@pytest.mark.parametrize(
    ("arch", "width", "devices"),
    [
        ("sm_80", 512, (14, 28, 42, 56, 98, 108)),  # A30, A100 and their parts
        ("sm_86", 768, (10, 28, 46, 68, 80, 84)),
        ("sm_87", 1024, (4, 8, 14, 16)),
        ("sm_89", 768, (20, 34, 58, 76, 128, 142)),
        ("sm_90", 512, (16, 18, 26, 32, 46, 60, 64, 114, 132)),
        ("sm_120", 1280, (36, 48, 70, 84, 170, 188)),
    ],
)
def test_a_folder_is_for_devices_of_every_size(arch, width, devices):
    held = kept(arch, width, "token", False, False)
    for processors in devices:
        for m in (60, 100, 200, 257, 400, 512, 700, 1100, 1500, 3000, 5000):
            for shape in ((width, width), (4 * width, width), (width, 4 * width)):
                found = wanted(arch, processors, m, shape)
                assert not missing(found, held), (processors, m, shape)


@pytest.mark.parametrize("processors", [8, 16])
def test_a_folder_holds_what_every_layer_of_a_whisper_needs(folder, processors, monkeypatch):
    """Surgery on a model of base's shapes; one clip's encoder, and the decoder's steps by beams."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    from saml_kernels import SAMLConfig, SAMLLinear
    from saml_kernels.backends import registry
    from saml_models.compress.apply import apply_saml

    monkeypatch.setattr(backend, "unsupported", lambda x, weight: None)
    monkeypatch.setattr(backend, "why_unavailable", lambda: None)
    monkeypatch.setattr(registry, "PREFERRED", {"meta": "triton"})
    heads = {"encoder_attention_heads": 8, "decoder_attention_heads": 8}
    wide = {"encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048, "d_model": 512}
    shape = WhisperConfig(encoder_layers=1, decoder_layers=1, vocab_size=51865, **heads, **wide)
    with torch.device("meta"), torch.no_grad():
        model = WhisperForConditionalGeneration(shape)
        apply_saml(model, SAMLConfig(num_experts=4, rank=4))
        model.eval().half()
        layers = [m for m in model.modules() if isinstance(m, SAMLLinear)]
        with configs.pretending("sm_87", processors), recording() as found:
            for rows in (1, 5, 20, 50, 300, 1500, 3000):
                for layer in (*layers, model.proj_out):
                    width = getattr(layer, "in_features", 512)
                    layer(torch.empty(1, rows, width, dtype=torch.float16))
    assert {launch.name for launch in found} >= FORWARD
    ready = Prebuilt(folder)
    missing = [launch for launch in found if key_of(launch) not in ready.kernels]
    assert not missing, {(m.name, *(a for a in m.arguments if isinstance(a, int))) for m in missing}


def test_a_folder_for_another_device(folder):
    ready = Prebuilt(folder, Driver(Library(), stream_of))
    launch = calls(512, 1)[0]
    for capability in ((8, 6), (9, 0)):
        with pytest.raises(SAMLError, match=r"built for sm_87, this device is sm_"):
            ready.bind(key_of(launch), launch, 0, capability)


def test_a_kernel_that_is_not_in_the_folder(folder):
    ready = Prebuilt(folder, Driver(Library(), stream_of))
    launch = next(c for c in calls(352, 1) if c.name == "single")  # not a multiple of 64
    with pytest.raises(SAMLError, match="holds no single kernel for this call"):
        ready.bind(key_of(launch), launch, 0, (8, 7))


def test_from_9_0_on_a_folder_is_for_one_architecture(folder, tmp_path):
    manifest = json.loads((folder / "kernels.json").read_text()) | {"arch": "sm_90"}
    (tmp_path / "kernels.json").write_text(json.dumps(manifest))
    ready, launch = Prebuilt(tmp_path, Driver(Library(), stream_of)), calls(512, 1)[0]
    with pytest.raises(SAMLError, match="built for sm_90, this device is sm_91"):
        ready.bind(key_of(launch), launch, 0, (9, 1))


@pytest.mark.parametrize(
    "options", [("--top-k", "5"), ("--rank", "0"), ("--train", "--expert-format", "int8")]
)
def test_numbers_that_cannot_be(options, tmp_path):
    done = run_aot(*options, str(tmp_path))
    assert done.returncode == 2 and options[0] in done.stderr


def test_a_damaged_cubin(folder, tmp_path):
    manifest = json.loads((folder / "kernels.json").read_text())
    (tmp_path / "kernels.json").write_text(json.dumps(manifest))
    for entry in manifest["kernels"]:
        (tmp_path / entry["file"]).write_bytes(b"\x7fELF")
    ready = Prebuilt(tmp_path, Driver(Library(), stream_of))
    launch = calls(512, 1)[0]
    with pytest.raises(SAMLError, match="damaged"):
        ready.bind(key_of(launch), launch, 0, (8, 7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../evil.cubin"}, "not a manifest"), ({"shared": 1 << 30}, "not a manifest"),
        ({"warps": "4"}, "not a manifest"), ({"parameters": [16]}, "not a manifest"),
        ({"memory": 1 << 40}, "not a manifest"),
    ],
)  # fmt: skip
def test_a_hostile_manifest(folder, tmp_path, change, message):
    manifest = json.loads((folder / "kernels.json").read_text())
    manifest["kernels"][0] |= change
    (tmp_path / "kernels.json").write_text(json.dumps(manifest))
    with pytest.raises(SAMLError, match=message):
        Prebuilt(tmp_path)


def test_no_manifest(tmp_path):
    with pytest.raises(SAMLError, match=r"make it with python -m saml_kernels\.aot"):
        Prebuilt(tmp_path)
    (tmp_path / "kernels.json").write_text("[]")
    with pytest.raises(SAMLError, match="not a manifest"):
        Prebuilt(tmp_path)


def test_the_driver_says_no(folder):
    library = Library()
    library.cuModuleLoadData = lambda *_: 209
    launch = calls(512, 1)[0]
    with pytest.raises(SAMLError, match="cuModuleLoadData failed with error 209"):
        Prebuilt(folder, Driver(library, stream_of)).bind(key_of(launch), launch, 0, (8, 7))


def test_a_thread_without_a_context_gets_the_devices():
    """As autograd's may be, or one that a server hands a model to."""
    here, retained, launched = local(), [], []

    class Contexts(Library):
        def cuLaunchKernel(self, *arguments):
            if not hasattr(here, "context"):
                return 201
            launched.append(here.context)
            return 0

        def cuDeviceGet(self, device, number):
            device._obj.value = 10 + number.value
            return 0

        def cuDevicePrimaryCtxRetain(self, context, device):
            retained.append(device.value)
            context._obj.value = 100 + device.value
            return 0

        def cuCtxSetCurrent(self, context):
            here.context = context.value
            return 0

    driver = Driver(Contexts(), stream_of)
    start = driver.starter(ctypes.c_void_p(1), (1,), 32, 0, ["pointer", "i32"], 3)
    here.context = 7  # someone's, which stays
    for _ in range(2):
        start(0, [64], (5,))
    threads = [Thread(target=lambda: [start(0, [64], (5,)) for _ in range(3)]) for _ in range(2)]
    for thread in threads:
        thread.start()
        thread.join()
    assert launched == [7] * 2 + [113] * 6 and retained == [13, 13]


def test_a_thread_that_gets_no_context():
    library = Library()
    library.cuLaunchKernel = lambda *_: 201
    library.cuDeviceGet = lambda *_: 101
    start = Driver(library, stream_of).starter(ctypes.c_void_p(1), (1,), 32, 0, ["i32"], 3)
    with pytest.raises(SAMLError, match="cuDeviceGet failed with error 101"):
        start(0, [], (5,))
