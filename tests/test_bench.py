"""The benchmark: what it times, who takes part, what it checks, and what is written from it."""

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from saml_kernels import SAMLError
from saml_kernels.roofline import Roofs
from saml_kernels.timing import sample
from saml_models.bench import harness
from saml_models.bench.cases import WORKS, Case, cases_of
from saml_models.bench.contenders import Layer, contenders, own_contenders
from saml_models.bench.figures import _bars, plot_layers, plot_wer
from saml_models.bench.harness import Results, Setting, run_case, run_cases
from saml_models.bench.report import (
    TABLES,
    _cells,
    geometric,
    has_tables,
    load,
    markdown,
    subjects,
    tables,
    write_tables,
)
from saml_models.bench.stage import Stage

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
    monkeypatch.setattr("saml_models.bench.stage.WEIGHTS", 2 * 4 * 64 * 64)
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
    first = Results(CPU, ROOFS, path)
    assert run_cases(cases, setting(), first)
    again = Results(CPU, ROOFS, path)
    assert not run_cases([cases[1]], setting(), again, minutes=-1.0)
    assert again.data["unfinished"] == "stopped after -1 minutes"
    run_cases([cases[1]], setting(), again)
    data = json.loads(path.read_text())
    assert {k: len(v["rows"]) for k, v in data["works"].items()} == {"P2": 3, "P6": 3}
    p6 = data["works"]["P6"]
    assert (p6["bandwidth_gb_s"], p6["rate_gflop_s"]) == (20.0, 50.0)
    assert data["about"]["versions"]["torch"] == torch.__version__
    assert len(load([path])) == 1


def fixture():
    """Two layers of one work, a whole model, and what was left out: figures made up."""

    def row(k, contender, median, **ratios):
        return {
            "work": "P2", "mode": "graph", "m": 1, "n": 512, "k": k, "experts": 4, "rank": 16,
            "contender": contender, "median_us": median, "low_us": median, "high_us": median,
            "floor_us": 1.0, "of_roofline": 1 / median, "peak_bytes": 1e6, "ratios": ratios,
        }  # fmt: skip

    layers = [
        row(512, "dense", 4.0), row(512, "saml + experts", 2.0, dense=0.5, bitsandbytes=0.8),
        row(512, "bitsandbytes + gated PEFT", 9.0) | {"peak_bytes": 4e6},
        row(2048, "dense", 4.0), row(2048, "saml + experts", 8.0, dense=2.0, bitsandbytes=0.2),
    ]  # fmt: skip
    model = {"contender": "saml", "seconds": 12.5, "quartiles": [12.0, 13.0], "wer": 7.1}
    return {
        "about": {
            "device": "Some GPU", "type": "cuda", "date": "2026-01-02",
            "versions": {"torch": "2.13.0"},
        },
        "works": {
            "P2": {"title": "decoding", "rows": layers, "skipped": {"GemLite INT4": "absent"}},
            "P7": {"title": "transcription", "rows": [model], "skipped": {}},
        },
    }  # fmt: skip


def test_markdown_by_hand():
    text = markdown([fixture()])
    assert text == (
        "**Some GPU**, 2026-01-02, torch 2.13.0:\n\n"
        "| layers with experts | of the roofline | / dense | / bitsandbytes | / + gated PEFT "
        "| / 1 speaker | memory / + gated PEFT |\n|---|---|---|---|---|---|---|\n"
        "| decoding, graph, 1 token, 4 experts of rank 16 | 0.25 (0.12 to 0.50) "
        "| 1.00 (0.50 to 2.00) | 0.40 (0.20 to 0.80) | - | - | 0.25 |\n\n"
        "| P7: transcription | seconds | quartiles | WER % |\n|---|---|---|---|\n"
        "| saml | 12.5 | 12 to 13 | 7.1 |\n\n"
        "Not run: GemLite INT4 (absent).\n"
    )
    assert geometric([0.5, 2.0]) == pytest.approx(1.0)


def test_only_the_newest_of_a_device_and_no_gpu_is_said():
    old, new = fixture(), fixture()
    old["about"]["date"] = "2025-12-31"
    for data in (old, new):
        data["about"]["type"] = "cpu"
    text = markdown([new, old])
    assert "2026-01-02" in text and "2025-12-31" not in text
    assert "GPU rows: not run" in text and "python -m bench gpu" in text


def test_tables_are_written_between_markers(tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    monkeypatch.setitem(TABLES, "one", lambda results: f"| {results.name} |\n")
    page.write_text("before\n<!-- results: one -->\nold\n<!-- results: end -->\nafter\n")
    assert write_tables(page, tmp_path / "r") and not write_tables(page, tmp_path / "r")
    assert page.read_text() == (
        "before\n<!-- results: one -->\n| r |\n<!-- results: end -->\nafter\n"
    )
    assert has_tables(page)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no markers", "needs pairs of lines"),
        ("<!-- results: wer -->\n", "needs pairs of lines"),
        ("<!-- results: end -->\n", "needs pairs of lines"),
        ("<!-- results: other -->\n<!-- results: end -->\n", "asks for a table other"),
        ("<!-- results: wer -->\n<!-- results: end -->\n", "cannot be read as results"),
        (
            "<!-- results: wer -->\n<!-- results: wer -->\n<!-- results: end -->\n",
            "needs pairs of lines|cannot be read",
        ),
    ],
)
def test_a_page_whose_tables_cannot_be_written_stays(tmp_path, text, message):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(SAMLError, match=message):
        write_tables(page, tmp_path)
    assert page.read_text() == text


def test_tables_of_results_by_hand(tmp_path):
    wer = {"full_precision": 8.0, "quantised": 9.0, "experts": 7.0, "adapted": 6.0,
           "other_speaker": 7.5}  # fmt: skip
    data = {
        "model": "tiny.en", "device": "a machine", "date": "2026-01-02", "wer": wer,
        "versions": {"torch": "2.13.0"}, "speakers": {"1": {}, "2": {}},
        "relative": {"adapted_to_full_precision": 0.75, "interval_95": [0.5, 1.0]},
        "size": {"full_bytes": 10e6, "quantised_bytes": 2e6, "saml_bytes": 2.5e6, "ratio": 4.0},
    }  # fmt: skip
    for name in ("train-clean-5", "test-other", "speechocean762"):
        (tmp_path / f"wer-{name}.json").write_text(json.dumps(data))
    lines = TABLES["wer"](tmp_path).splitlines()
    assert lines[2] == (
        "| train-clean-5, 2 readers, 20 utterances to adapt | 8.00 | 9.00 | 7.00 | 6.00 | 7.50 "
        "| 0.75 (0.50 to 1.00) |"
    )
    assert lines[-1] == (
        "Whisper tiny.en: 10.0 MB in float32, 2.0 MB quantised, 2.5 MB with experts (4.00x "
        "smaller). Measured on: a machine; torch 2.13.0; 2026-01-02."
    )
    row = {"in": 64, "out": 32, "rows": 1, "experts": 0.5, "experts_over_bitsandbytes": 0.25}
    rows = [row | {"warm": True}, row | {"warm": False, "experts": 0.75}]
    (tmp_path / "cpu-operator.json").write_text(json.dumps({"about": "a CPU", "rows": rows}))
    assert TABLES["cpu-operator"](tmp_path).splitlines()[2:] == [
        "| 1 | warm | 0.50 | 0.25 to 0.25 |", "| 1 | cold | 0.75 | 0.25 to 0.25 |", "", "a CPU."
    ]  # fmt: skip


def test_graphs_and_eager_calls_are_told_apart():
    data = fixture()
    rows = data["works"]["P2"]["rows"]
    rows += [r | {"mode": "eager", "ratios": {"dense": 3.0}} for r in rows]
    told = {what.partition(",")[0]: _cells(own, rows)[1] for _, what, own in subjects(data)}
    assert told == {"graph": "1.00 (0.50 to 2.00)", "eager": "3.00 (3.00 to 3.00)"}
    axes = Figure().subplots()
    _bars(axes, data, {})
    assert [t.get_text() for t in axes.get_xticklabels()] == ["P2\ngraph", "P2\neager"]
    heights = {c.get_label(): [bar.get_height() for bar in c] for c in axes.containers}
    assert heights["dense"] == pytest.approx([1.0, 3.0])


def test_tables_and_figures(tmp_path):
    data = fixture()
    titles = [t.title for t in tables(data) if t.title]
    assert titles == ["P2: decoding; Some GPU", "P7: transcription"]
    assert plot_layers(data, tmp_path / "layers.png")
    models = {**data, "works": {"P7": data["works"]["P7"]}}
    assert not plot_layers(models, tmp_path / "models.png")
    assert not (tmp_path / "models.png").exists()
    wer = {"full_precision": 7.0, "quantised": 8.0, "experts": 7.5, "adapted": 6.0}
    size = {"full_bytes": 150e6, "quantised_bytes": 19e6, "saml_bytes": 20e6}
    plot_wer([("train-clean-5", {"wer": wer, "size": size})], tmp_path / "wer.png")
    for name in ("layers.png", "wer.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["{", "[]", '{"about": {}}', '{"about": {"device": "x"}}'])
def test_what_is_no_file_of_results_is_refused(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(SAMLError, match="not a file of benchmark results"):
        load([path])


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
