"""What is written from files of results: tables, the README's lines, figures."""

import json

import pytest
from matplotlib.figure import Figure

from bench.report.accuracy import SPEECH
from bench.report.figures import _bars, plot_layers, plot_wer
from bench.report.markdown import geometric
from bench.report.tables import TABLES, has_tables, write_tables
from bench.report.timed import _cells, load, markdown, subjects, tables
from bench.report.write import add
from bench.report.write import main as report
from saml_kernels import SAMLError


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
    over = {"ratio": 0.75, "interval_95": [0.6, 0.9]}
    data = {
        "model": "tiny.en", "device": "a machine", "date": "2026-01-02", "wer": wer,
        "versions": {"torch": "2.13.0"}, "speakers": {"1": {}, "2": {}},
        "ratios": {"adapted_to_full_precision": over, "adapted_to_experts": over},
        "wer_by_scoring": {"paper": wer},
        "size": {"full_bytes": 10e6, "quantised_bytes": 2e6, "saml_bytes": 2.5e6, "ratio": 4.0},
    }  # fmt: skip
    for name in SPEECH:
        (tmp_path / f"wer-{name}.json").write_text(json.dumps(data))
    alone = data | {"speakers": {"1": {}}, "wer": wer | {"other_speaker": None}}
    (tmp_path / "wer-noisy.json").write_text(json.dumps(alone))
    lines = TABLES["wer"](tmp_path).splitlines()
    assert lines[2] == (
        "| train-clean-5, 2 readers, 20 utterances to adapt | 8.00 | 9.00 | 7.00 | 6.00 | 7.50 "
        "| 0.75 (0.60 to 0.90) | 0.75 (0.60 to 0.90) | 8.00, 6.00 |"
    )
    assert lines[7] == (
        "| noisy, 1 voice in noise, 60 utterances to adapt | 8.00 | 9.00 | 7.00 | 6.00 |  "
        "| 0.75 (0.60 to 0.90, clips) | 0.75 (0.60 to 0.90, clips) | 8.00, 6.00 |"
    )
    assert lines[-1] == (
        "Whisper tiny.en: 10.0 MB in float32, 2.0 MB quantised, 2.5 MB with experts (4.00x "
        "smaller). Measured on: a machine; torch 2.13.0; 2026-01-02."
    )
    heard = {"experts": [{"errors": [2], "loops": 0}], "adapted 0": [{"errors": [1], "loops": 0}]}
    data = {
        "about": {
            "model": "conformer-tiny.en",
            "device": "a machine",
            "date": "now",
            "versions": {"torch": "2"},
        },
        "speech": {"readers": {"speakers": ["a"], "words": [4]}},
        "variants": {"one LoRA": {"heard": {"readers": heard}}},
    }
    (tmp_path / "defaults-conformer-tiny.en.json").write_text(json.dumps(data))
    assert TABLES["defaults-conformer"](tmp_path).splitlines()[2:] == [
        "| one LoRA | readers | 50.00 | 25.00 | 0.500 |  |  | 0 of 1 | 0 |", "",
        "conformer-tiny.en, greedy. Measured on: a machine; torch 2; now.",
    ]  # fmt: skip
    row = {"in": 64, "out": 32, "rows": 1, "experts": 0.5, "experts_over_bitsandbytes": 0.25}
    rows = [row | {"warm": True}, row | {"warm": False, "experts": 0.75}]
    (tmp_path / "cpu-operator.json").write_text(json.dumps({"about": "a CPU", "rows": rows}))
    assert TABLES["cpu-operator"](tmp_path).splitlines()[2:] == [
        "| 1 | warm | 0.50 | 0.25 to 0.25 |", "| 1 | cold | 0.75 | 0.25 to 0.25 |", "", "a CPU."
    ]  # fmt: skip
    row = {"speakers": 16, "warm": True, "int8": 1.0, "float32": 1.5, "int8_over_one": 1.25}
    data = {"about": "a CPU", "rows": [row, row | {"int8": 4.0}]}
    (tmp_path / "cpu-speakers.json").write_text(json.dumps(data))
    assert TABLES["cpu-speakers"](tmp_path).splitlines()[2:] == [
        "| 16 | warm | 2.00 (1.00 to 4.00) | 1.50 (1.50 to 1.50) | 1.25 (1.25 to 1.25) |", "",
        "a CPU.",
    ]  # fmt: skip


def test_an_evaluation_joins_the_results_without_what_was_said(tmp_path):
    results = tmp_path / "results"
    results.mkdir()
    data = {"model": "tiny.en", "wer": {}, "detail": {}, "utterances": [{"reference": "said"}]}
    (tmp_path / "wer-mine.json").write_text(json.dumps(data))
    add(tmp_path / "wer-mine.json", results)
    found = json.loads((results / "wer-mine.json").read_text())
    assert found["model"] == "tiny.en" and found["versions"]["torch"] and found["device"]
    assert "utterances" not in found
    (tmp_path / "other.json").write_text(json.dumps(data))
    (tmp_path / "wer-half.json").write_text("{}")
    (tmp_path / "curve-half.json").write_text(json.dumps({"curve": []}))
    for name in ("other.json", "wer-half.json", "curve-half.json"):
        with pytest.raises(SAMLError, match=f"{name}: expected wer-NAME.json"):
            add(tmp_path / name, results)


def test_curves_of_several_voices(tmp_path):
    def point(count, wer, speakers, unused=0):
        ends = [0.5, 0.75] if speakers > 1 else None
        return {"utterances": count, "speakers": speakers, "unused": unused, "wer": wer,
                "unadapted": 8.0, "interval_95": ends, "ratio_interval_95": ends}  # fmt: skip

    results = tmp_path / "results"
    results.mkdir()
    few = {"model": "tiny.en", "curve": [point(0, 8.0, 1), point(5, 6.0, 1), point(80, 4.0, 1)]}
    many = {"model": "tiny.en", "curve": [point(0, 8.0, 3), point(10, 4.0, 3, 2)]}
    for name, data, speakers in (("a", few, "x"), ("b", many, "xyz")):
        (tmp_path / f"curve-{name}.json").write_text(
            json.dumps(data | {"speakers": dict.fromkeys(speakers)})
        )
        add(tmp_path / f"curve-{name}.json", results)
    lines = TABLES["curves"](results).splitlines()
    assert lines[0] == "| voices | unadapted | 5 | 10 | 80 |"
    assert lines[2:4] == [
        "| b, 3 speakers | 8.00 |  | 4.00 (0.50, 0.50 to 0.75; 2 unused) |  |",
        "| a, 1 speaker | 8.00 | 6.00 (0.75) |  | 4.00 (0.50) |",
    ]
    assert lines[-1].startswith("Whisper tiny.en, greedy, with the guard. Measured on: ")
    page = tmp_path / "page.md"
    page.write_text("<!-- results: curves -->\n<!-- results: end -->\n")
    report([page], results, None, tmp_path)
    assert lines[2] in page.read_text()
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


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
