"""A training step never waits for its device, and what it does on one is captured as it is."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from synthetic import small_conformer, small_whisper
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from saml_kernels import SAMLConfig, SAMLError
from saml_models.compress.apply import apply_saml
from saml_models.models.registry import bind
from saml_models.training import graphs
from saml_models.training import loop as training
from saml_models.training.batches import BatchMaker, Sample, Shapes
from saml_models.training.loop import fit
from saml_models.training.options import TrainingOptions

aten = torch.ops.aten
READS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.item}
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal}
CONFIG = SAMLConfig(num_experts=2, rank=2, dropout=0.1, balance=0.01)
OPTIONS = TrainingOptions(
    learning_rate=3e-3, epochs=6, max_batch=1, speeds=(1.0,), margins=(0.5,), average=0.9
)
FIRST, LAST = 2, 9  # steps between two readings of the loss


class Reads(TorchFunctionMode):
    """Counts what asks for values without an operator that a dispatcher sees."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def of_layerdrop() -> bool:
    """Whether transformers compares a number drawn on the CPU; 5.17 draws one for each layer."""
    return any("< self.layerdrop" in (f.line or "") for f in traceback.extract_stack(limit=6)[:-1])


class Waits(TorchDispatchMode):
    """Counts what would wait on a GPU: a value that Python asks for, a size that data decides."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        indices = args[1] if func.overloadpacket in (aten.index, aten.index_put_) else ()
        mask = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in indices)
        if mask or (func.overloadpacket in WAITS and not of_layerdrop()):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


def samples() -> list[Sample]:
    rng = np.random.default_rng(0)
    clips = [rng.normal(0, 0.1, n).astype(np.float32) for n in (32000, 30000)]
    texts = ("The quick brown fox.", "She sells sea shells by the shore.")
    return [
        Sample(lambda clip=clip: clip, len(clip) / 16000, text)
        for clip, text in zip(clips, texts, strict=True)
    ]


def whisper(config: SAMLConfig = CONFIG) -> Any:
    model = small_whisper(vocabulary=51864)
    torch.manual_seed(1)
    apply_saml(model, config)
    return model


def watched(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> list[str]:
    """What waits in steps FIRST to LAST of `fit`, the losses being read every ten."""
    monkeypatch.setattr(training, "_read_every", lambda device: 10, raising=False)
    modes = Waits(), Reads()

    def watch(done: int, steps: int, loss: float) -> None:
        if done == FIRST:
            for mode in modes:
                mode.__enter__()
        if done == LAST:
            for mode in reversed(modes):
                mode.__exit__(None, None, None)

    model, processor, *rest = arguments
    fit(bind(model, processor), *rest, None, watch)
    return [found for mode in modes for found in mode.found]


@pytest.mark.parametrize(
    "config",
    [CONFIG, replace(CONFIG, router="utterance", top_k=1), replace(CONFIG, dropout=0.0)],
    ids=["dropout", "utterance router, top 1", "token router"],
)
def test_no_step_of_a_whisper_waits(
    config: SAMLConfig, tiny_en: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert watched(monkeypatch, whisper(config), tiny_en[1], samples(), OPTIONS) == []


def test_no_step_of_a_conformer_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor = small_conformer()
    assert watched(monkeypatch, model, processor, samples(), replace(OPTIONS, ctc=0.0)) == []


def test_the_mode_sees_what_waits() -> None:
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, False])
    for wait in (
        lambda: float(x[0]), lambda: bool(mask[0]), lambda: x[0].tolist(), lambda: x[mask],
        lambda: mask.nonzero(), lambda: x.masked_select(mask), lambda: x.__setitem__(mask, 1.0),
        lambda: x.index_put_((mask,), x[:2] + 1),
    ):  # fmt: skip
        with Waits() as waits, Reads() as reads:
            wait()
        assert waits.found + reads.found


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("captured", [False, True])
def test_no_step_waits_for_a_gpu(captured: bool, tiny_en: Any) -> None:
    def watch(done: int, steps: int, loss: float) -> None:
        # Both shapes have been captured by step 4; the losses are read at 1 and 11.
        if done in (5, 9):
            torch.cuda.set_sync_debug_mode("error" if done == 5 else "default")

    options = replace(OPTIONS, cuda_graphs=captured)
    try:
        fit(bind(whisper().to("cuda"), tiny_en[1]), samples(), options, None, watch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Fault(RuntimeError):
    """What a test's capture raises."""


class Recorded:
    """Captures as a GPU does, as far as a CPU can tell: nothing runs before the replay."""

    def __init__(self, faulty: bool = False) -> None:
        self.faulty, self.captures, self.replays = faulty, 0, 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Tensor, Callable[[], None]]:
        if self.faulty:
            raise Fault("operation not permitted when stream is capturing\nand more")
        self.captures += 1
        loss = torch.full((), math.nan)

        def replay() -> None:
            self.replays += 1
            loss.copy_(run())

        return loss, replay


def trained(
    monkeypatch: pytest.MonkeyPatch, processor: Any, capture: Recorded | None, **options: Any
) -> dict[str, Tensor]:
    """The experts that `fit` ends with, passes going through `capture`."""
    with monkeypatch.context() as patch:
        patch.setattr(training, "CudaCapture", lambda device: capture)
        patch.setattr(training, "why_not_graphed", lambda *_: None)
        model = whisper()
        fit(bind(model, processor), samples(), replace(OPTIONS, **options))
    return {n: p.detach().clone() for n, p in model.saml.experts().items()}


def test_replayed_passes_learn_what_eager_ones_do(
    tiny_en: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = Recorded()
    found = trained(monkeypatch, tiny_en[1], capture)
    eager = trained(monkeypatch, tiny_en[1], None)
    assert all(torch.equal(found[n], eager[n]) for n in eager)
    # Both clips fill the same bucket: once as it is, then captured once and replayed.
    assert (capture.captures, capture.replays) == (1, 11)


def test_a_pass_that_cannot_be_captured_runs_as_it_is(
    tiny_en: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.warns(UserWarning, match="without CUDA graphs: operation not permitted"):
        found = trained(monkeypatch, tiny_en[1], Recorded(faulty=True))
    eager = trained(monkeypatch, tiny_en[1], None)
    assert all(torch.equal(found[n], eager[n]) for n in eager)
    with pytest.raises(SAMLError, match="pass cannot be captured"):
        trained(monkeypatch, tiny_en[1], Recorded(faulty=True), cuda_graphs=True)


def test_captured_passes_read_the_batch_from_where_it_was() -> None:
    seen: list[Any] = []

    def run(batch: Any) -> Tensor:
        seen.append(batch)
        return batch.features.sum() + batch.kept.sum()

    passes = graphs.GraphedPass(run, torch.device("cpu"), Recorded())
    make = BatchMaker(bind(*small_conformer()), samples(), OPTIONS, Shapes(100, 16, dense=True))
    given = [make(i, index) for i, index in enumerate([[0], [1], [0], [0, 1], [1]])]
    for batch in given:
        loss = passes(batch)
        torch.testing.assert_close(loss, batch.features.sum() + batch.kept.sum())
    one, two, three, pair, four = seen
    assert one is not two and two is three is four
    assert len(pair.features) == 2
    assert two.features.data_ptr() == given[1].features.data_ptr()


def test_rounded_sizes_change_no_loss(tiny_en: Any) -> None:
    model, processor = whisper(replace(CONFIG, dropout=0.0)), tiny_en[1]
    options = replace(OPTIONS, freq_masks=0, time_masks=0, margins=(1.0,))
    objective = training.Objective(bind(model, processor), options)
    plain, rounded = (
        objective(BatchMaker(bind(model, processor), samples(), options, s)(0, [0, 1]))
        for s in (None, Shapes(tokens=16, dense=True))
    )
    torch.testing.assert_close(plain, rounded)
    batch = BatchMaker(bind(model, processor), samples(), options, training.FEW_SHAPES)(0, [0])
    assert batch.features.shape[-1] % 100 == 0 and batch.inputs.shape[1] % 16 == 0
    assert len(batch.kept) == batch.inputs.numel()


def test_why_a_pass_is_not_captured() -> None:
    model, gpu = whisper(), torch.device("cuda")
    assert graphs.why_not_graphed(model, gpu, False, "bf16", 1) is None
    for reason, arguments in {
        "on cpu": (torch.device("cpu"), False, "bf16", 1),
        "CTC": (gpu, True, "bf16", 1),
        "float16": (gpu, False, "fp16", 1),
        "several processes": (gpu, False, "bf16", 2),
    }.items():
        assert reason in str(graphs.why_not_graphed(model, *arguments))
    model.model.encoder.layerdrop = 0.1
    assert "at random" in str(graphs.why_not_graphed(model, gpu, False, "bf16", 1))
    with pytest.raises(SAMLError, match="cuda_graphs: not possible here, the model is on cpu"):
        fit(bind(whisper(), None), samples(), replace(OPTIONS, cuda_graphs=True))


@pytest.mark.parametrize("read_every", [1, 10])
def test_nothing_of_a_loss_that_is_not_finite_is_kept(
    read_every: int, tiny_en: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(training, "_read_every", lambda device: read_every)
    model, path, before = whisper(), tmp_path / "run.safetensors", {}
    true = training.Objective.forward
    steps: list[int] = []

    def forward(self: Any, batch: Any) -> Tensor:
        if len(steps) == 4:
            before.update({n: p.detach().clone() for n, p in model.saml.experts().items()})
        steps.append(len(steps))
        return true(self, batch) * (math.nan if len(steps) == 5 else 1.0)

    monkeypatch.setattr(training.Objective, "forward", forward)
    with pytest.raises(SAMLError, match="the loss is nan at step 4"):
        fit(bind(model, tiny_en[1]), samples(), replace(OPTIONS, checkpoint_every=6), path)
    assert not path.exists() and len(steps) == (5 if read_every == 1 else 6)
    assert all(torch.equal(before[n], p) for n, p in model.saml.experts().items())


def test_a_gradient_that_is_not_finite_is_an_error(
    tiny_en: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    true = training.Objective.forward

    def forward(self: Any, batch: Any) -> Tensor:
        parameter = next(iter(self.parameters_trained.values()))
        return true(self, batch) + (parameter * 0).sum().sqrt()  # 0, of slope inf * 0

    monkeypatch.setattr(training.Objective, "forward", forward)
    model = whisper()
    with pytest.raises(SAMLError, match="the loss is nan at step 0"):
        fit(bind(model, tiny_en[1]), samples(), OPTIONS)
    assert all(p.isfinite().all() for p in model.saml.experts().values())
