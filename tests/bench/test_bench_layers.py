"""Layers beside their peers: what is timed, who takes part, and what is checked."""

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bench.layers import harness
from bench.layers.cases import WORKS, Case, cases_of
from bench.layers.contenders import Layer, own_contenders
from bench.layers.harness import Setting, run_case, run_cases
from bench.layers.registry import contenders
from bench.layers.roofline import Roofs
from bench.layers.stage import Stage
from bench.report.file import Results
from bench.report.timed import load, subjects
from saml_kernels import SAMLError
from saml_kernels.timing import sample

CPU = torch.device("cpu")
ROOFS = Roofs(20e9, 50e9)
QUICK = {c.name: c for c in own_contenders() if not c.slow_build}


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """Nothing here is timed in earnest."""
    monkeypatch.setattr("saml_kernels.timing.overwrite_caches", lambda device: None)


def setting(registry=None):
    return Setting(CPU, rounds=2, registry=registry or QUICK, roofs=ROOFS)


def by_name(rows):
    return {r["contender"]: r for r in rows}


def test_the_registry_names_every_peer_once():
    names = set(contenders())
    assert {
        "dense", "bitsandbytes", "bitsandbytes + gated PEFT", "PEFT X-LoRA", "GemLite INT4",
        "torchao INT4", "LoRAFusion", "axolotl ScatterMoE-LoRA", "torch.compile of the reference",
        "Unsloth's derivation", "saml base", "saml + experts",
    } <= names  # fmt: skip
    for work in WORKS.values():
        assert set(work.against or ()) <= names


def test_every_question_has_its_shapes():
    full = [c for work in WORKS for c in cases_of(work, "cuda", short=False)]
    decode = {c.m for c in full if c.work == "P2"}
    assert decode == {1, 2, 4, 5, 8, 16}
    assert {c.m for c in full if c.work == "P1"} == {1500, 12000}
    widths = {c.k for c in full if c.k == c.n}
    assert widths == {384, 512, 768, 1024, 1280}
    assert {(c.n, c.k) for c in full if 1280 in (c.n, c.k)} >= {(5120, 1280), (1280, 5120)}
    swept = {(c.experts, c.rank) for c in full if c.work == "P2"}
    assert swept == {(e, r) for e in (1, 4, 8) for r in (4, 8, 16)}
    assert {c.mode for c in full} == {"eager", "graph", "train"}
    # Kernels are timed where there is a graph; sweeps over experts too.
    assert {c.mode for c in full if c.work == "P1"} == {"eager", "graph"}
    assert {c.mode for c in full if (c.experts, c.rank) == (8, 4)} == {"graph"}
    assert contenders()["bitsandbytes + PEFT, mixed batch of 64"].modes == ("eager",)
    assert not cases_of("P6", "cuda", short=True) and cases_of("P6", "cpu", short=True)
    assert all(c.mode != "graph" for work in WORKS for c in cases_of(work, "cpu", short=False))
    own = cases_of("P1", "cpu", True, [64], [7], 2, 8)
    assert {(c.m, c.experts, c.rank) for c in own} == {(7, 2, 8)}
    assert [(c.n, c.k) for c in own] == [(64, 64), (256, 64), (64, 256)]


@pytest.mark.parametrize(
    "case",
    [Case("P2", "eager", 5, 96, 64), Case("P4", "train", 9, 64, 128, experts=2, rank=4)],
    ids=lambda c: c.mode,
)
def test_every_own_contender_is_right(case):
    rows, skipped = run_case(case, setting())
    assert not skipped
    found = by_name(rows)
    assert set(found) == {"dense", "saml base", "saml + experts"}
    for row in rows:
        assert row["error"] < 1e-5 and len(row["samples_us"]) == 2
        reached = row["floor_us"] / row["median_us"]
        assert row["of_roofline"] == pytest.approx(reached, rel=0.2, abs=1e-4)  # it is rounded
    ours = found["saml + experts"]
    assert set(ours["ratios"]) == set(found) - {"saml + experts"}
    assert ours["flop"] > found["saml base"]["flop"]
    assert (
        ours["bytes"]
        < found["dense"]["bytes"]
        + 4 * case.experts * case.rank * (case.n + case.k)
        + 4 * case.m * case.experts
    )
    assert ours["backend"] == "cpu"


DEFAULT = {"rank": 4, "router": "token"}
BFLOAT16 = {**DEFAULT, "dtype": "bfloat16", "autocast": True}


def test_what_users_have_is_timed():
    def shapes(cases):
        return {(c.n, c.k) for c in cases}

    def alike(cases):
        return {(c.experts, c.rank, c.router, c.dtype, c.autocast) for c in cases}

    default, trained, head = (cases_of(w, "cuda", short=True) for w in ("P9", "P10", "P11"))
    assert alike(default) == {(4, 4, "token", None, False)}
    assert alike(trained) == {(4, 4, "token", "bfloat16", True)}
    assert {c.mode for c in default} == {"graph", "eager"}
    assert {c.mode for c in trained} == {"train"}
    assert alike(cases_of("P10", "cpu", short=True)) == alike(default)
    assert shapes(head) == {(51864, 384)} and {c.experts for c in head} == {0}
    assert len(shapes(cases_of("P11", "cuda", short=False))) == 5
    assert {c.experts for c in cases_of("P11", "cpu", True, experts=2)} == {0}
    assert head[0].label == "P11 graph 1 x 384 -> 51864, no experts"


@pytest.mark.parametrize(
    "case",
    [
        Case("P9", "eager", 5, 96, 64, **DEFAULT), Case("P10", "train", 9, 64, 96, **DEFAULT),
        Case("P10", "train", 9, 64, 64, **BFLOAT16),
    ],
    ids=lambda c: f"{c.mode} {c.dtype}",
)  # fmt: skip
def test_layers_make_their_own_gates(case):
    rows, skipped = run_case(case, setting())
    assert not skipped and set(by_name(rows)) == set(QUICK) - {n for n in QUICK if "speaker" in n}
    assert all(r["error"] < (2e-2 if case.autocast else 1e-5) for r in rows)

    def even(operands):
        layer = QUICK["saml + experts"].build(operands)
        with torch.no_grad():
            layer.router.zero_()
        return layer

    registry = {"even": replace(QUICK["saml + experts"], name="even", build=even)}
    assert run_case(case, setting(registry))[1]["even"].startswith("wrong result")


def test_what_fit_trains_is_held_in_float32():
    case = Case("P10", "train", 5, 64, 64, **BFLOAT16)
    stage = Stage(case, CPU, torch.float32)
    layer = QUICK["saml + experts"].build(stage.operands[0])
    y, dx, router = stage.step(0, layer, True)
    assert (y.dtype, dx.dtype) == (torch.bfloat16, torch.bfloat16)
    assert [t.grad.dtype for t in layer.trainable] == [torch.float32] * 3
    assert router is layer.router.grad and router.abs().max() > 0


def test_the_head_has_no_experts_and_is_told_of():
    case = Case("P11", "eager", 3, 130, 64, experts=0)
    rows, skipped = run_case(case, setting())
    assert not skipped and set(by_name(rows)) == {"dense", "saml base"}
    data = {"works": {"P11": {"title": "the tied output head", "rows": rows}}}
    assert [what for _, what, _ in subjects(data)] == ["eager, 3 tokens, no experts"]


def test_large_weights_make_short_trains(monkeypatch):
    monkeypatch.setattr("bench.layers.stage.WEIGHTS", 2 * 4 * 64 * 64)
    found = [len(Stage(Case("P2", "eager", 1, n, 64), CPU, torch.float32).x) for n in (32, 64, 640)]
    assert found == [4, 2, 1]


def test_many_speakers_are_told_apart():
    case = Case("P5", "eager", 70, 64, 64, experts=2, rank=4, speakers=64)
    found = by_name(run_case(case, setting())[0])
    assert {"saml, 1 speaker", "saml, 8 speakers", "saml, 64 speakers"} < set(found)
    assert found["saml, 64 speakers"]["bytes"] > found["saml, 8 speakers"]["bytes"]
    assert "saml, 1 speaker" in found["saml, 64 speakers"]["ratios"]


def wrong(contender, **changes):
    """A contender whose layer is off by one in a thousand."""

    def build(operands):
        layer = contender.build(operands)
        return Layer(lambda x, gates: layer.call(x, gates) * 1.001, layer.trainable)

    return replace(contender, build=build, **changes)


def test_a_wrong_peer_has_no_time():
    dense = QUICK["dense"]
    registry = {"dense": dense, "liar": wrong(dense, name="liar")}
    rows, skipped = run_case(Case("P2", "eager", 5, 64, 64), setting(registry))
    assert set(by_name(rows)) == {"dense"}
    assert skipped["liar"].startswith("wrong result: off by 1.0e-03")


def test_our_own_wrong_result_is_an_error():
    registry = {"saml + experts": wrong(QUICK["saml + experts"])}
    with pytest.raises(SAMLError, match=r"P2 eager 5 x 64 -> 64: saml \+ experts is wrong result"):
        run_case(Case("P2", "eager", 5, 64, 64), setting(registry))


def test_a_training_step_without_its_gradients_is_wrong():
    saml = QUICK["saml + experts"]

    def build(operands):
        layer = saml.build(operands)
        idle = torch.zeros(1, requires_grad=True)
        return Layer(layer.call, [*layer.trainable, idle])

    registry = {"idle": replace(saml, name="idle", build=build)}
    _, skipped = run_case(Case("P4", "train", 5, 64, 64), setting(registry))
    assert skipped["idle"] == "wrong result: off by inf"


def test_a_peer_that_fails_or_cannot_run_says_why():
    def build(operands):
        raise RuntimeError("no kernel image\nfor this device")

    dense = QUICK["dense"]
    registry = {
        "broken": replace(dense, name="broken", build=build),
        "elsewhere": replace(dense, name="elsewhere", why_not=lambda device: "needs a GPU"),
    }
    rows, skipped = run_case(Case("P2", "eager", 5, 64, 64), setting(registry))
    assert rows == []
    assert skipped == {"broken": "failed: no kernel image", "elsewhere": "needs a GPU"}


def test_what_builds_slowly_runs_once_for_each_work_in_a_short_run():
    registry = {"slow": replace(QUICK["dense"], name="slow", slow_build=True)}
    cases = [Case("P2", "eager", 2, 64, 64), Case("P2", "eager", 3, 64, 64)]
    cases.append(Case("P1", "eager", 3, 64, 64))
    run = setting(registry)
    assert [len(run_case(c, run)[0]) for c in cases] == [1, 0, 1]


@pytest.mark.parametrize(
    "name",
    ["bitsandbytes", "Unsloth's derivation", "bitsandbytes + gated PEFT", "PEFT X-LoRA"],
)
@pytest.mark.parametrize(
    "case",
    [
        Case("P1", "eager", 6, 64, 128, experts=3, rank=4),
        Case("P1", "train", 6, 64, 128, experts=3, rank=4),
        Case("P9", "eager", 6, 64, 128, **DEFAULT), Case("P10", "train", 6, 64, 64, **BFLOAT16),
    ],
    ids=lambda c: f"{c.work} {c.mode}",
)  # fmt: skip
def test_peers_compute_what_we_compute(name, case):
    contender = contenders()[name]
    reason = contender.why_not(CPU)
    if reason:
        pytest.skip(reason)
    rows, skipped = run_case(case, setting({name: contender}))
    assert not skipped and rows[0]["error"] < (2e-2 if case.autocast else 1e-4)


def test_peft_mixed_batch_computes_its_own_speaker():
    contender = contenders()["bitsandbytes + PEFT, mixed batch of 64"]
    reason = contender.why_not(CPU)
    if reason:
        pytest.skip(reason)
    case = Case("P5", "eager", 128, 64, 64, experts=2, rank=2, speakers=64, clip=2)
    rows, skipped = run_case(case, setting({contender.name: contender}))
    assert not skipped and rows[0]["error"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [Case("P4", "train", 6, 64, 64), Case("P9", "eager", 6, 64, 64, **DEFAULT)],
    ids=lambda c: c.work,
)
def test_compiled_reference(case):
    contender = contenders()["torch.compile of the reference"]
    rows, skipped = run_case(case, setting({contender.name: contender}))
    assert not skipped and rows[0]["error"] < 1e-4


def test_results_are_written_as_they_come_and_kept(tmp_path):
    path = tmp_path / "results.json"
    cases = [Case("P2", "eager", 2, 64, 64), Case("P6", "eager", 3, 64, 64)]
    first = Results(CPU, ROOFS.to_dict(), path)
    assert run_cases(cases, setting(), first)
    again = Results(CPU, ROOFS.to_dict(), path)
    assert not run_cases([cases[1]], setting(), again, minutes=-1.0)
    assert again.data["unfinished"] == "stopped after -1 minutes"
    run_cases([cases[1]], setting(), again)
    data = json.loads(path.read_text())
    assert {k: len(v["rows"]) for k, v in data["works"].items()} == {"P2": 3, "P6": 3}
    p6 = data["works"]["P6"]
    assert (p6["bandwidth_gb_s"], p6["rate_gflop_s"]) == (20.0, 50.0)
    # The package's version may lack what the build added: 2.11.0 of 2.11.0+cu130.
    assert torch.__version__.startswith(data["about"]["versions"]["torch"])
    assert len(load([path])) == 1


def test_graphs_share_the_train(monkeypatch):
    """Without a GPU: a captured train is timed as so many calls, and checked by its replay."""
    monkeypatch.setattr(harness, "captured", lambda steps: lambda: [s() for s in steps][-1])
    waited = []
    monkeypatch.setattr(
        harness, "sample",
        lambda train, device, launches: waited.append(launches) or sample(train, device),
    )  # fmt: skip
    for mode in ("graph", "eager"):
        case = Case("P2", mode, 5, 64, 64)
        rows, skipped = run_case(case, setting({"dense": QUICK["dense"]}))
        assert not skipped and rows[0]["error"] < 1e-5
        assert set(waited) == {mode != "graph"}  # what it takes to launch counts for eager calls
        waited.clear()


def test_layers_live_as_long_as_the_graph_that_reads_them(fake_graphs):
    """A graph holds addresses: a layer that went would leave the next one's numbers there."""
    weights, live = [], []

    def build(operands):
        (weight,) = operands.cast(operands.weight)
        weights.append(weakref.ref(weight))
        return Layer(lambda x, gates: F.linear(x, weight))

    fake_graphs.replayed = lambda: live.append(sum(ref() is not None for ref in weights))
    registry = {name: replace(QUICK["dense"], name=name, build=build) for name in ("one", "two")}
    run_case(Case("P2", "graph", 5, 64, 64), setting(registry))
    assert len(weights) >= 4 and set(live) == {len(weights)}
    gc.collect()
    assert all(ref() is None for ref in weights)
