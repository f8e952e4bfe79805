"""What must hold on a real device beside single products: each a check of seconds.

Each is a function of the device that raises where it does not hold. property_runs.py asks them. On
a CPU, under Triton's interpreter, a graph is its calls made again.
"""

from __future__ import annotations

import copy
import gc
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.instruments import (
    features_of,
    gates_profiles,
    graph_of,
    layer_of,
    near,
    off,
    overwrite_free_memory,
    small_model,
    unwritten_is_nan,
)
from bench.gpu.results import one_line
from saml_kernels import SAMLConfig, quantize
from saml_kernels.backends.reference import gates_from_logits, saml_linear_reference
from saml_kernels.backends.triton import counters as counters_module
from saml_kernels.backends.triton.backend import forward
from saml_kernels.backends.triton.configs import Config, table_changed
from saml_kernels.cuda import capture, current
from saml_kernels.timing import timed

__all__ = ["PROPERTIES", "NotRun"]

LOST_BYTES = 8 << 20  # that may be missing when all graphs are gone

Property = Callable[[torch.device], str]


class NotRun(Exception):
    """A property that cannot be asked here."""


def counters(device: torch.device) -> str:
    """Graphs keep their counters over many captures, and give all memory back."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    route = Config("single", 16, 32, 64, 4)  # whose shares are counted
    width, graphs = (512, 30) if device.type == "cuda" else (128, 2)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, device=device) / shape[-1] ** 0.5).to(dtype)

    weight = quantize(torch.randn(width, width, device=device) / width**0.5)
    a, b, router = random(4, 4, width), random(4, width, 4), random(4, width)

    def call(x: Tensor) -> Tensor:
        how: dict[str, Any] = {"routing": (None, 1.0), "route": route}
        return forward(x, weight, a, b, router, None, 1.0, **how)

    def make() -> tuple[list[Tensor], list[Tensor], Callable[[], None]]:
        inputs = [random(4, width) for _ in range(3)]
        found, replay = graph_of(lambda: [call(x) for x in inputs], device)
        return inputs, found, replay

    def check(several: Sequence[tuple[list[Tensor], list[Tensor], Callable[[], None]]]) -> None:
        overwrite_free_memory(device)
        for inputs, found, _ in several:
            for x, y in zip(inputs, found, strict=True):
                x.normal_()
                y.fill_(float("nan"))
        for _, _, replay in several:
            replay()
        for inputs, found, _ in several:
            for x, y in zip(inputs, found, strict=True):
                if not torch.equal(y, call(x)):
                    raise AssertionError("a replay gives other bits than the same call")

    with patch.object(counters_module, "BLOCK", 1024):  # used up again and again
        counters_module.counters(device).low = True
        make()  # what is made once
        before = _allocated(device)
        made = [make() for _ in range(graphs)]
        check(made)
        check(made[::-1])
        del made[::2]
        gc.collect()
        check(made)
        count = len(made)
        del made
        lost = _allocated(device) - before
    if lost > LOST_BYTES:
        raise AssertionError(f"{lost} bytes are still held when all graphs are gone")
    return f"{graphs} graphs, {count} of them when others were gone; {lost} bytes held after all"


def _allocated(device: torch.device) -> int:
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated(device)


def autocast(device: torch.device) -> str:
    """A layer that reads float32 and one that reads bfloat16, in both orders: the gradients."""
    width, tokens = (512, (20, 1500)) if device.type == "cuda" else (64, (20,))
    worst = 0.0
    both = (torch.float32, torch.bfloat16)
    for m in tokens:
        for order in (both, both[::-1]):
            table_changed()  # plans anew: who comes first decides what is compiled
            for dtype in order:
                worst = max(worst, _autocast_layer(m, width, dtype, device))
    return f"off by {worst:.1e} at most"


def _autocast_layer(m: int, width: int, dtype: torch.dtype, device: torch.device) -> float:
    layer = layer_of(width, device)
    x = torch.randn(m, width, device=device).to(dtype).requires_grad_()
    dy = torch.randn(m, width, device=device)
    learnt = [layer.lora_a, layer.lora_b, layer.router.weight]  # type: ignore[union-attr]
    worst = 0.0
    for _ in range(3):  # the later calls are prepared ones
        with torch.no_grad():
            x.normal_()
            dy.normal_()
        with unwritten_is_nan(), torch.autocast(device.type, torch.bfloat16):
            y = layer(x)
            found = torch.autograd.grad(y, [x, *learnt], dy.to(y.dtype))
        if found[0].dtype != dtype or y.dtype != torch.bfloat16:
            raise AssertionError(f"y is {y.dtype} and dX {found[0].dtype}, where x is {dtype}")
        # As autocast has it, x is rounded first, and so is dY.
        leaves = [x.detach().bfloat16().double(), *(t.detach().double() for t in learnt)]
        x64, a, b, router = (t.requires_grad_() for t in leaves)
        gates = gates_from_logits(x64 @ router.T)
        bias = None if layer.bias is None else layer.bias.double()
        scale = layer.config.scaling
        expected = saml_linear_reference(
            x64, layer.weight.dequantize(torch.float64), a, scale * b, gates, bias
        )
        wanted = torch.autograd.grad(expected, [x64, a, b, router], dy.bfloat16().double())
        names = ("y", "dx", "da", "db", "drouter")
        for name, one, other in zip(names, (y, *found), (expected, *wanted), strict=True):
            told = f"{name} of {m} rows in {str(dtype).removeprefix('torch.')}"
            worst = max(worst, near(told, one.detach(), other.detach(), 3e-2))
    return worst


def network(device: torch.device) -> str:
    """A whole Whisper: logits in half precision, and experts' gradients under autocast."""
    from saml_models.compress.layers import cast

    model = small_model(device)
    truth = copy.deepcopy(model).double()  # which no kernel computes in
    tokens = torch.randint(3, 512, (2, 12), device=device)
    features = features_of(model, 2)

    def gradients(network: Any, given: Tensor) -> dict[str, Tensor]:
        network.zero_grad(set_to_none=True)
        network(input_features=given, labels=tokens).loss.backward()
        found = network.saml.experts().items()
        return {n: p.grad.detach().clone() for n, p in found if p.grad is not None}

    expected = gradients(truth, features.double())
    with unwritten_is_nan(), torch.autocast(device.type, torch.bfloat16):
        for _ in range(2):
            found = gradients(model, features)
    if found.keys() != expected.keys():
        raise AssertionError(f"no gradient of {sorted(expected.keys() - found.keys())[:3]}")
    whole = near(
        "the gradient", torch.cat([t.flatten() for t in found.values()]),
        torch.cat([expected[name].flatten() for name in found]), 0.04,
    )  # fmt: skip
    # Rounding weighs more in small ones; half of a tensor missing is 0.7.
    worst = max(found, key=lambda name: off(found[name], expected[name]))
    if not off(found[worst], expected[worst]) < 0.2:
        raise AssertionError(f"{worst}: off by {off(found[worst], expected[worst]):.1e}")
    if device.type != "cuda":
        return f"gradients off by {whole:.1e}"
    model.zero_grad(set_to_none=True)
    with torch.inference_mode():
        given = {"decoder_input_ids": tokens}
        right = truth(input_features=features.double(), **given).logits
        cast(model, torch.float16)
        half = model(input_features=features.half(), **given).logits
    logits = near("logits", half, right, 2e-2)
    return f"gradients off by {whole:.1e}, logits in float16 by {logits:.1e}"


def training(device: torch.device) -> str:
    """A training pass under autocast, captured for two shapes in one pool, gives its gradients."""
    model = small_model(device).train()
    parameters = list(model.saml.experts().values())

    def learn(features: Tensor, labels: Tensor) -> list[Tensor]:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(input_features=features, labels=labels).loss
        loss.backward()
        return [loss.detach()]

    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    made, worst = [], 0.0
    for batch in (2, 3):
        given = (features_of(model, batch), torch.randint(3, 512, (batch, 8), device=device))
        made.append((given, *graph_of(partial(learn, *given), device, pool)))
    for turn in range(2):
        for (features, labels), loss, replay in made:
            features.normal_()
            labels.copy_(torch.randint_like(labels, 3, 512))
            replay()
            found = torch.cat([loss[0].view(1), *(p.grad.flatten() for p in parameters)])
            eager = learn(features, labels)[0].view(1)
            expected = torch.cat([eager, *(p.grad.flatten() for p in parameters)])
            worst = max(worst, near(f"replay {turn + 1}", found, expected, 1e-2))
    return f"off by {worst:.1e} from the same pass without a graph"


def profiles(device: torch.device) -> str:
    """Gates profiles beside a model in half precision: refused by none, mixed under capture."""
    from saml_models.compress.layers import cast
    from saml_models.speakers.mixing import mixed_batch

    model = small_model(device)
    hashed = model.saml.experts_hash()
    made = gates_profiles(model)
    if device.type == "cuda":
        cast(model, torch.float16)
    if model.saml.experts_hash() != hashed:
        raise AssertionError("in half precision the experts have another hash")
    speakers = [made[0], made[1], None, made[0]]
    features = features_of(model, len(speakers))

    def heard(given: Tensor) -> Tensor:
        return model.model.encoder(given).last_hidden_state

    with torch.inference_mode():
        with mixed_batch(model, speakers):
            (found,), replay = graph_of(lambda: [heard(features)], device)
            features.copy_(torch.randn_like(features))
            replay()
        worst, between = 0.0, []
        for row, speaker in enumerate(speakers):
            one = features[row : row + 1]
            plain = heard(one)
            if speaker is None:
                alone = plain
            else:
                with speaker.applied(model):
                    alone = heard(one)
                between.append(off(alone, plain))
            tolerance = 2e-2 if device.type == "cuda" else 1e-4
            worst = max(worst, near(f"clip {row}", found[row], alone[0], tolerance))
    if not min(between) > 1.5 * worst:
        raise AssertionError(f"gates change {min(between):.1e}, too little to be told apart")
    return f"off by {worst:.1e}, where gates change {min(between):.1e}"


def rounding(device: torch.device) -> str:
    """Rounding from a file, as it ships, for a model on the device: the very codes, run there."""
    from saml_models.compress.apply import apply_saml
    from saml_models.compress.calibration import Calibration
    from saml_models.compress.layers import compression_of
    from saml_models.compress.rounding_file import read_rounding, write_rounding

    config = SAMLConfig(expert_init="lora")
    plain, there = (small_model(torch.device("cpu"), compress=False) for _ in range(2))
    there.to(device)
    compressed = copy.deepcopy(plain)
    apply_saml(compressed, config)
    weights = {}
    for name, weight in compression_of(compressed).weights.items():
        moved = copy.deepcopy(weight)
        moved.codes[::7] = moved.codes[::7] ^ 16  # one of two codes, to another value
        weights[name.removesuffix(".weight")] = moved
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rounding.safetensors"
        write_rounding(path, Calibration(weights), plain)
        found = read_rounding(path, there, config)
    if found is None:
        raise AssertionError("the file is taken for another model's")
    apply_saml(there, config, calibration=found)
    for name, weight in compression_of(there).weights.items():
        wanted = weights[name.removesuffix(".weight")]
        if weight.codes.device != device or not torch.equal(weight.codes.cpu(), wanted.codes):
            raise AssertionError(f"{name}: other codes than the file's, or elsewhere")
    here = copy.deepcopy(there).cpu()
    features = features_of(plain, 1)
    with torch.inference_mode():
        expected = here.model.encoder(features).last_hidden_state
        there.model.encoder(features.to(device))
        heard = there.model.encoder(features.to(device)).last_hidden_state
    error = near("the encoder", heard.cpu(), expected, 1e-3)
    return f"{len(weights)} weights; the encoder is off by {error:.1e} from the CPU's"


def compiled(device: torch.device) -> str:
    """torch.compile(mode="reduce-overhead"), forward and backward, on new input each time."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    layer = layer_of(512 if device.type == "cuda" else 64, device, dtype=dtype)
    how: dict[str, Any] = {"mode": "reduce-overhead"}
    if device.type != "cuda":
        how = {"backend": "aot_eager"}

    def run(x: Tensor) -> Tensor:
        return F.gelu(layer(F.layer_norm(x, x.shape[-1:]))) * 2

    fast = torch.compile(run, **how)
    worst = 0.0
    for m in (4, 300):
        for learns in (False, True):
            for _ in range(4):
                torch.compiler.cudagraph_mark_step_begin()
                x = torch.randn(m, layer.in_features, device=device, dtype=dtype)
                x.requires_grad_(learns)
                with torch.set_grad_enabled(learns):
                    pairs = [fast(x).clone(), run(x)]
                worst = max(worst, near("y", pairs[0].detach(), pairs[1].detach(), 5e-3))
                if learns:
                    dy = torch.randn_like(x)
                    wanted = [x, layer.lora_a, layer.lora_b]
                    found, expected = (torch.autograd.grad(y, wanted, dy) for y in pairs)
                    for name, *two in zip(("dx", "da", "db"), found, expected, strict=True):
                        worst = max(worst, near(name, two[0], two[1], 5e-3))
    # A graph of our own after PyTorch's.
    x = torch.randn(4, layer.in_features, device=device, dtype=dtype)
    with torch.no_grad():
        (y,), replay = graph_of(lambda: [layer(x)], device)
        x.normal_()
        replay()
        near("a graph after it", y, layer(x), 1e-3)
    return f"off by {worst:.1e} at most"


def failed_capture(device: torch.device) -> str:
    """After a capture that fails: stream, allocator and random numbers are as before."""
    if device.type != "cuda":
        raise NotRun("needs a CUDA device")
    layer = layer_of(512, device, dtype=torch.float16)
    x = torch.randn(4, 512, device=device, dtype=torch.float16)
    with torch.no_grad():
        layer(x)

    def waits() -> float:
        return float(layer(x).sum())

    faults = []
    try:
        capture(waits, device)
        faults.append("a capture that waits for the device is none that fails")
    except RuntimeError:
        pass
    if torch.cuda.current_stream(device) != torch.cuda.default_stream(device):
        faults.append("its stream is still the current one")

    def graph_again() -> None:
        with torch.no_grad():
            (y,), replay = graph_of(lambda: [layer(x)], device)
            x.mul_(0.5)
            replay()
            near("a graph after it", y, layer(x), 1e-3)

    def dropout() -> None:
        F.dropout(torch.ones(1 << 10, device=device), 0.5)
        torch.randn(8, device=device)

    for what, call in {
        "random numbers": dropout, "emptying the cache": torch.cuda.empty_cache,
        "another graph": graph_again, "random numbers after another graph": dropout,
    }.items():  # fmt: skip
        try:
            call()
            torch.cuda.synchronize(device)
        except Exception as error:
            faults.append(f"{what}: {one_line(error)}")
    if faults:
        raise AssertionError("; ".join(faults))
    return "nothing is left behind"


def devices(device: torch.device) -> str:
    """The last device while the first is current: calls, graphs and times there."""
    if device.type != "cuda":
        raise NotRun("needs a CUDA device")
    count = torch.cuda.device_count()
    there = torch.device("cuda", count - 1)
    with current(torch.device("cuda", 0)), torch.no_grad():
        layer = layer_of(512, there, dtype=torch.float16)
        x = torch.randn(4, 512, device=there, dtype=torch.float16)
        (y,), replay = graph_of(lambda: [layer(x)], there)
        x.normal_()
        replay()
        torch.cuda.synchronize(there)
        near("a graph there", y, layer(x), 1e-3)
        found = timed(lambda: layer(x), 5, there)["median_us"]
        other = timed(lambda: layer(x), 5, "cuda") if count == 1 else {}  # without its number
        if torch.cuda.current_device() != 0:
            raise AssertionError("the current device is another one afterwards")
    if not 0.5 < found < 1e4 or not all(0.5 < t < 1e4 for t in other.values()):
        raise AssertionError(f"a layer of 4 tokens takes {found} us")
    return f"{count} device{'s' * (count > 1)}; {found:.1f} us"


def decoding(device: torch.device) -> str:
    """Mixed batches decoded token by token: the same text with a graph and without."""
    from saml_models.models.whisper import greedy as module
    from saml_models.speakers.mixing import mixed_batch

    model = small_model(device)  # in float32, so that no choice hangs on rounding
    profiles = gates_profiles(model)
    features = features_of(model, 4)
    mask = torch.ones(4, 100, dtype=torch.bool, device=device)
    speakers = [profiles[0], None, profiles[1], None]
    found = []
    for graphs in (True, False):
        with warnings.catch_warnings(record=True) as said, mixed_batch(model, speakers):
            warnings.simplefilter("always")
            allowed = partial(_allowed, graphs)
            with patch.object(module, "_replays", allowed):
                found.append(module.greedy(model, [(features, mask)], [24] * 4))
        told = [str(one.message) for one in said if "CUDA graph" in str(one.message)]
        if told:
            raise AssertionError(told[0])
    if found[0] != found[1]:
        raise AssertionError(f"with a graph {found[0]}, without {found[1]}")
    return f"{sum(map(len, found[0]))} tokens"


def _allowed(graphs: bool, where: torch.device) -> bool:
    return graphs and where.type == "cuda"


PROPERTIES: dict[str, Property] = {
    "counters": counters, "autocast": autocast, "network": network, "training": training,
    "profiles": profiles, "decoding": decoding, "compiled": compiled, "rounding": rounding,
    "failed-capture": failed_capture, "devices": devices,
}  # fmt: skip
