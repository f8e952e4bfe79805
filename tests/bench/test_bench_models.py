"""Whole models in the benchmark: turns, what each peer trains, refusals, the report."""

import json
import subprocess

import pytest
import torch
from transformers import WhisperConfig, WhisperForConditionalGeneration

from bench.layers.peers import _int4
from bench.layers.registry import contenders
from bench.models import adapters
from bench.models.serving_process import added_bytes
from bench.models.turns import answer, in_turn, record, stopwatch
from bench.place import RESULTS, as_module, environment

CPU = torch.device("cpu")

SCRIPT = """
import sys
name = sys.argv[sys.argv.index("--worker") + 1]
path = sys.argv[-1]
with open(path, "a") as log:
    log.write(name)
turn = open(path).read().count(name)
if name == "c":
    sys.exit("c cannot run:\\nno such device")
print("noise of a library")
seconds = turn * (1 if name == "a" else 10)
print('{"seconds": %f, "peak_megabytes": %f, "wer": 7.5}' % (seconds, turn))
"""


def test_workers_run_in_turn(tmp_path, monkeypatch):
    log = tmp_path / "log"
    (tmp_path / "some_worker.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    rows, skipped = in_turn("some_worker", ["a", "b", "c"], ["--log", log], rounds=3)
    assert log.read_text() == "abcabab"  # what failed is not asked again
    assert skipped == {"c": "no such device"}
    a, b = rows
    assert (a["contender"], a["seconds"], a["quartiles"]) == ("a", 2.0, [1.5, 2.5])
    assert (b["seconds"], b["samples_seconds"]) == (20.0, [10.0, 20.0, 30.0])
    assert (a["peak_megabytes"], a["wer"]) == (3.0, 7.5)


def test_what_a_worker_answers(capsys):
    seconds, found = stopwatch(lambda: 5, CPU)
    answer(CPU, seconds, wer=1.5)
    said = json.loads(capsys.readouterr().out)
    assert found == 5 and said["seconds"] >= 0 and said["wer"] == 1.5
    assert 50 < said["peak_megabytes"] < 100_000


def test_rows_are_recorded_beside_the_layers(tmp_path, capsys):
    row = {"contender": "saml", "seconds": 2.0, "quartiles": [1.5, 2.5], "peak_megabytes": 3.0}
    threads = torch.get_num_threads()
    record("P7", "transcription", ([row], {"x": "not installed"}), tmp_path, CPU, threads)
    record("P8", "adapting", ([row], {}), tmp_path, CPU, threads)
    (path,) = tmp_path.glob("*.json")
    works = json.loads(path.read_text())["works"]
    assert list(works) == ["P7", "P8"] and works["P7"]["title"] == "transcription"
    out = capsys.readouterr().out
    assert "P7: transcription" in out and "x: not run: not installed" in out


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("saml", None), ("bitsandbytes + gated PEFT", "bitsandbytes + gated PEFT"),
        ("bitsandbytes + PEFT LoRA", "bitsandbytes + gated PEFT"), ("PEFT LoRA", "PEFT X-LoRA"),
        ("all parameters", None),
    ],
)  # fmt: skip
def test_every_way_to_train_learns(name, peer):
    reason = peer and contenders()[peer].why_not(CPU)
    if reason:
        pytest.skip(reason)
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=200, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, suppress_tokens=None,
        begin_suppress_tokens=None, max_source_positions=20,
    ))  # fmt: skip
    features, labels = torch.randn(1, 80, 40), torch.randint(4, 200, (1, 6))
    before = model(input_features=features, labels=labels).loss.item()
    total = sum(p.numel() for p in model.parameters())
    trained = adapters.ADAPTERS[name](model, torch.float32).train()
    trainer = adapters.Trainer(trained, CPU, learning_rate=1e-2)
    losses = [trainer.step(features, labels) for _ in range(6)]
    # Nothing but the rounding of the base stands between the model and its adapted start.
    assert losses[0] == pytest.approx(before, rel=0.05)
    assert losses[-1] < 0.9 * losses[0]
    count = sum(p.numel() for p in trainer.parameters)
    assert (count > 0.9 * total) if name == "all parameters" else (0 < count < 2 * total)


def door(*arguments, cwd):
    """`python -m bench ...` from another folder."""
    call = [*as_module("bench"), *map(str, arguments)]
    return subprocess.run(call, capture_output=True, text=True, env=environment(), cwd=cwd)


def test_the_gpu_check_says_that_there_is_none(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    pytest.importorskip("triton")
    done = door("gpu", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == "bench gpu: no CUDA device; run it on a machine that has one"


def test_report_writes_figures_and_pages(tmp_path):
    results, page = tmp_path / "results", tmp_path / "page.md"
    results.mkdir()
    page.write_text("<!-- results: benchmark -->\n<!-- results: end -->\n")
    row = {"contender": "saml", "seconds": 2.0, "quartiles": [1.5, 2.5], "peak_megabytes": 3.0}
    record("P8", "adapting", ([row], {}), results, CPU, torch.get_num_threads())
    for path in RESULTS.glob("wer-*.json"):
        (results / path.name).write_text(path.read_text())
    done = door("report", "--results", "results", page, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| saml | 2 | 1.5 to 2.5 | 3 |" in page.read_text()
    assert {p.suffix for p in results.iterdir()} == {".json", ".png"}
    assert (results / "wer-bytes.png").is_file()


def test_int4_peers_are_given_a_rounding_of_the_same_weight():
    weight = torch.randn(8, 128)
    codes, scales, zeros = _int4(weight)
    assert codes.dtype == torch.uint8 and int(codes.max()) == 15 and int(codes.min()) == 0
    rebuilt = (codes.unflatten(1, (-1, 64)) - zeros[..., None]) * scales[..., None]
    apart = (rebuilt - weight.unflatten(1, (-1, 64))).abs()
    assert (apart <= 0.5001 * scales[..., None]).all()


def test_what_the_extra_of_the_server_adds():
    found = added_bytes()
    assert {"av", "fastapi", "uvicorn", "python-multipart", "prometheus-client"} <= set(
        found["packages"]
    )
    assert not {"saml-kernels", "torch", "numpy", "transformers", "typer"} & set(found["packages"])
    assert 20 < found["MB of packages"] <= 130
