"""Gates alone, no transcripts, many speakers, fewer experts: on real speech and a real model."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from saml_kernels import SAMLError
from saml_models.cli.main import app
from saml_models.data.corpora import load_corpus
from saml_models.evaluation.protocol import with_word_errors
from saml_models.models.registry import bind
from saml_models.models.whisper.speech_model import WhisperSpeechModel
from saml_models.speakers.identify import distance, embed, identify
from saml_models.speakers.pretrained import load_adaptable
from saml_models.speakers.profile import SpeakerProfile
from saml_models.speakers.store import ProfileStore
from saml_models.training import pseudo_labels as unsupervised
from saml_models.training.adapt import GATE_ADAPTATION, adapt
from saml_models.training.options import TrainingOptions
from saml_models.training.pruning import SHARES, measure_usage, prune, prune_curve
from saml_models.training.pseudo_labels import (
    Filter,
    Label,
    adapt_unsupervised,
    believed,
    pseudo_labels,
)
from saml_models.transcription.clips import decode_clips
from saml_models.transcription.confidence import confidence

QUICK = TrainingOptions(epochs=1, max_batch=2, batch_seconds=20.0)


@pytest.fixture(scope="module")
def experts():
    return load_adaptable("tiny.en")


@pytest.fixture(scope="module")
def utterances(speech_root):
    """The six shortest of each of two readers, by reader."""
    found = load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688", "1998"])
    by = {s: [u for u in found if u.speaker == s] for s in ("1688", "1998")}
    return {s: sorted(us, key=lambda u: len(u.load()))[:6] for s, us in by.items()}


@pytest.fixture(scope="module")
def whole(experts, utterances):
    """A profile of experts."""
    return adapt(*experts, utterances["1688"][:2], QUICK)


def test_gates_learn_and_leave_the_experts_alone(experts, utterances, tmp_path):
    model = experts[0]
    before = {n: p.detach().clone() for n, p in model.saml.experts().items()}
    losses = []
    profile = adapt(
        *experts, utterances["1688"][:2], replace(GATE_ADAPTATION, epochs=2), kind="gates",
        on_step=lambda done, steps, loss: losses.append(loss),
    )  # fmt: skip
    after = model.saml.experts()
    assert all(torch.equal(before[n], after[n]) and after[n].requires_grad for n in before)
    assert profile.kind == "gates" and profile.tensors["gates"].abs().max() > 0.01
    path = tmp_path / "g.safetensors"
    profile.save(path)
    assert path.stat().st_size < 5000  # half of it is the embedding and the header
    with SpeakerProfile.load(path).applied(model):
        offsets = [layer.router.offset for layer in model.saml.layers.values()]
        assert all(offset is not None for offset in offsets)
    with pytest.raises(SAMLError, match="expected experts or gates"):
        adapt(*experts, utterances["1688"][:1], kind="doors")


def test_a_true_text_is_surer_than_a_false_one(experts, utterances):
    clip = utterances["1688"][0].load()
    (heard,) = decode_clips(bind(*experts), [clip])
    model = experts[0]
    right, wrong = (confidence(bind(*experts), clip, t) for t in (heard, "Colourless green ideas."))
    assert wrong.log_prob < right.log_prob - 1 < 0
    assert 0 <= right.entropy < wrong.entropy
    assert model.saml.context.mask is None


def test_which_labels_are_believed():
    sure, unsure = Label("a b", -0.1, 0.2, 1.0), Label("a b", -0.9, 0.2, 1.0)
    torn, vague, silent = (
        replace(sure, agreement=0.5), replace(sure, entropy=2.0), replace(sure, text=" "),
    )  # fmt: skip
    labels = [sure, unsure, torn, vague, silent, sure, sure]
    second = [1.0] * len(labels)
    assert believed(labels, second, Filter(share=0.2)) == [0, 5, 6]
    assert believed([unsure, replace(unsure, log_prob=-2.0)], second, Filter()) == [0]
    assert believed([silent], second, Filter()) == []


def test_the_most_probable_labels_where_there_is_too_much_speech():
    labels = [Label("a b", -0.1 * i, 0.2, 1.0) for i in (3, 1, 2)]
    for seconds, chosen in ((15.0, [0, 1, 2]), (14.0, [1, 2]), (9.0, [1]), (1.0, [1])):
        assert believed(labels, [5.0] * 3, Filter(seconds=seconds)) == chosen


def test_without_transcripts(experts, utterances, monkeypatch):
    chosen = [replace(u, text="") for u in utterances["1688"][:5]]
    answers = iter([(10.0, 20), (8.0, 20), (10.0, 20), (10.0, 20), (10.0, 20), (1.0, 3)])
    monkeypatch.setattr(unsupervised, "disagreement", lambda *_: next(answers))
    learnt = adapt_unsupervised(*experts, chosen, QUICK, rounds=1)
    assert learnt.about["adapted"] and learnt.about["clips_believed"][0] >= 2
    start = SpeakerProfile.of(experts[0]).hash
    assert learnt.hash != start
    # No better than before, or better by saying less: what there was is kept.
    for _ in range(2):
        kept = adapt_unsupervised(*experts, chosen, QUICK, rounds=1)
        assert not kept.about["adapted"] and kept.hash == start
    with pytest.raises(SAMLError, match="at least 5 clips"):
        adapt_unsupervised(*experts, chosen[:4], QUICK)


def test_recordings_beside_clips_with_text(experts, utterances, monkeypatch):
    known = utterances["1688"][:6]
    long = np.resize(known[0].load(), 31 * 16000)
    heard, asked = [], []

    def learn(*given, **how):
        asked.append((given[2], how))
        return adapt(*given, **how)

    def labels(speech, clips, profile, language):
        heard.append((len(clips), profile))
        return [Label("Some words.", -0.1, 0.2, 1.0)] * len(clips)

    monkeypatch.setattr(unsupervised, "adapt", learn)
    monkeypatch.setattr(unsupervised, "pseudo_labels", labels)
    recording = replace(known[0], speaker="folder", samples=long, text="")
    profile = adapt_unsupervised(*experts, [recording], QUICK, known=known)
    ((pieces, first),) = heard
    assert pieces >= 2 and first.about["utterances"] == 6 and "guard" not in first.about
    assert profile.about["clips_believed"] == [pieces]
    assert profile.about["guard"]["clips"] == 3  # every second of those with text
    (_, alone), (sure, both) = asked
    assert not alone["guard"] and both["guard"] and sure == known
    assert [u.text for u in both["unsure"]] == ["Some words."] * pieces
    assert profile.about["utterances"] == 6 + pieces or not profile.about["adapted"]
    assert profile.about["method"].startswith("semi")


def test_recordings_are_all_in_one_language(experts, utterances, monkeypatch):
    """What is heard in another one would be learnt as this one."""
    asked = []
    monkeypatch.setattr(WhisperSpeechModel, "prompt_language", lambda speech, clips: "de")
    profile = SpeakerProfile.of(experts[0])

    def learn(*given, language, **how):
        asked.append(language)
        return profile

    def labels(speech, clips, profile, language):
        asked.append(language)
        return [Label("Einige Worte.", -0.1, 0.2, 1.0)] * len(clips)

    def change(speech, clips, profile, language):
        asked.append(language)
        return 1.0, 2

    for name, fake in {"adapt": learn, "pseudo_labels": labels, "disagreement": change}.items():
        monkeypatch.setattr(unsupervised, name, fake)
    adapt_unsupervised(*experts, utterances["1688"][:5], QUICK, rounds=1)
    assert asked == ["de"] * 4


def test_a_run_goes_on_beside_its_own_experts_alone(experts, utterances, tmp_path):
    model, path = experts[0], tmp_path / "run"

    def stop(*_):
        raise KeyboardInterrupt

    given = (*experts, utterances["1688"][:2], replace(QUICK, checkpoint_every=1))
    with pytest.raises(KeyboardInterrupt):
        adapt(*given, guard=False, checkpoint=path, on_step=stop)
    with model.saml.snapshot():
        with torch.no_grad():
            for parameter in model.saml.experts().values():
                parameter.add_(0.5)
        with pytest.raises(SAMLError, match="other data, options or experts"):
            adapt(*given, guard=False, checkpoint=path)
    adapt(*given, guard=False, checkpoint=path)


def test_what_is_measured_fits_one_window(experts, utterances):
    profile = SpeakerProfile.of(experts[0])
    long = replace(utterances["1688"][0], samples=np.zeros(31 * 16000, np.float32))
    for measure in (
        lambda: prune_curve(*experts, [long], profile, 1.0),
        lambda: with_word_errors(profile, *experts, [long]),
    ):
        with pytest.raises(SAMLError, match=r"31\.0 s long; cut it to 30 s"):
            measure()


def test_the_guard_counts_words_that_change_with_the_speed(experts, utterances):
    clips = [u.load() for u in utterances["1688"][:2]]
    changed, words = unsupervised.disagreement(bind(*experts), clips, None)
    assert 0 <= changed < 100
    assert words == sum(len(t.split()) for t in decode_clips(bind(*experts), clips))
    labels = pseudo_labels(bind(*experts), clips, beam_size=2)
    assert all(label.text and 0 <= label.agreement <= 1 for label in labels)


def test_the_nearest_of_the_enrolled(experts, utterances):
    clips = {s: [u.load() for u in us] for s, us in utterances.items()}
    found = {s: embed(bind(*experts), c[:4]) for s, c in clips.items()}
    profiles = [
        replace(SpeakerProfile.of(experts[0], speaker=s), embedding=e) for s, e in found.items()
    ]
    for speaker, own in clips.items():
        match = identify(bind(*experts), own[5], profiles)
        assert match.nearest == speaker and match.margin > 0 and speaker in str(match)
    assert distance(found["1688"], found["1688"]) == 0
    silence = torch.randn(32000, generator=torch.Generator().manual_seed(0)).numpy() * 0.3
    nobody = identify(bind(*experts), silence, profiles)
    assert nobody.profile is None and str(nobody).startswith("none of them")
    with pytest.raises(SAMLError, match="no embedding"):
        identify(bind(*experts), own[5], [replace(profiles[0], embedding=None)])


def test_pruned_profiles_shrink_and_speak(experts, utterances, whole, tmp_path):
    model = experts[0]
    clips = [u.load() for u in utterances["1688"][:2]]
    usage = measure_usage(bind(*experts), clips, whole)
    layers = len(usage.layers)
    torch.testing.assert_close(usage.gates.sum(1), torch.ones(layers), rtol=1e-3, atol=1e-3)
    assert (usage.shares > 0).all()
    half = prune(whole, model, usage, 2 * layers)
    assert half.nbytes < 0.55 * whole.nbytes
    least = prune(whole, model, usage, layers)
    assert all(len(left) == 1 for left in least.kept.values()) and len(least.kept) == layers
    path = tmp_path / "half.safetensors"
    half.save(path)
    again = SpeakerProfile.load(path)
    assert again.kept == half.kept and again.hash == half.hash
    before = {n: p.detach().clone() for n, p in model.saml.experts().items()}
    with again.applied(model):
        left = sum(len(layer.lora_a) for layer in model.saml.layers.values())
        assert left == 2 * layers
        alone = decode_clips(bind(*experts), clips)
        with pytest.raises(SAMLError, match="pruned profile"):
            SpeakerProfile.of(model)
    after = model.saml.experts()
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert decode_clips(bind(*experts), clips, speakers=[again, again]) == alone
    for wrong, message in ((layers - 1, "expected"), (4 * layers + 1, "expected")):
        with pytest.raises(SAMLError, match=message):
            prune(whole, model, usage, wrong)
    for act in (
        lambda: prune(half, model, usage, layers),
        lambda: measure_usage(bind(*experts), clips, half),
    ):
        with pytest.raises(SAMLError, match="whole profile"):
            act()
    with half.applied(model), pytest.raises(SAMLError, match="pruned profile"):
        adapt(*experts, utterances["1688"][:1], kind="gates")
    with pytest.raises(SAMLError, match="start from whole experts"):
        load_adaptable("tiny.en", experts=path)


def test_the_commands_prune_export_and_import(whole, utterances, tmp_path):
    def saml(*arguments):
        done = CliRunner().invoke(app, ["speakers", *map(str, arguments)])
        assert done.exit_code == 0, (done.output, done.exception)
        return done.stdout

    profile, curve, small = (tmp_path / n for n in ("ann.safetensors", "curve.json", "small"))
    whole.save(profile)
    clips = tmp_path / "clips.jsonl"
    rows = [
        {"audio": str(u.audio), "text": u.text, "speaker": "ann"} for u in utterances["1688"][:2]
    ]
    clips.write_text("".join(json.dumps(row) + "\n" for row in rows))
    saml("prune", profile, "--data", clips, "--out", small, "--json", curve, "--max-loss", "1000")
    found = json.loads(curve.read_text())
    points, layers = found["curve"], len(found["layers"])
    assert [p["experts"] for p in points] == [round(s * 4 * layers) for s in SHARES]
    assert all(a["bytes"] > b["bytes"] for a, b in itertools.pairwise(points))
    assert all(len(row) == 4 and abs(sum(row) - 1) < 1e-2 for row in found["gates"])
    assert (tmp_path / "curve.png").read_bytes()[:4] == b"\x89PNG"
    assert SpeakerProfile.load(small).about["experts"] == points[-1]["experts"]
    assert f"{layers} in {layers} layers" in saml("show", small)

    store, folder = ("--store", tmp_path / "store"), tmp_path / "peft"
    saml("export", profile, folder, "--peft")
    adapters = sorted(folder.iterdir())
    assert [a.name for a in adapters] == [f"expert-{e}" for e in range(4)]
    saml("import", *adapters, "--name", "ann", *store)
    saml("import", profile, "--name", "bob", *store)
    listed = saml("list", *store)
    assert "ann" in listed and "bob" in listed
    model = load_adaptable("tiny.en")[0]
    before, after = whole.experts(model), ProfileStore(store[1]).load("ann").experts(model)
    for name in (n for n in before if n.endswith("lora_b")):
        a = name.replace("lora_b", "lora_a")
        expected = model.saml.config.scaling * before[name] @ before[a]
        torch.testing.assert_close(after[name] @ after[a], expected, rtol=2e-2, atol=1e-3)


@pytest.fixture(scope="module")
def manifest(utterances, tmp_path_factory):
    """Two good speakers, and one whose audio is none."""
    path = tmp_path_factory.mktemp("fleet") / "people.jsonl"
    rows = [
        {"audio": str(u.audio), "text": u.text, "speaker": s}
        for s, us in utterances.items()
        for u in us[:2]
    ]
    (path.parent / "eve.wav").write_text("this is no audio\n" * 100)
    rows.insert(2, {"audio": "eve.wav", "text": "x", "speaker": "eve"})
    rows += [{"audio": "none.wav", "text": "x", "speaker": "none"}]
    rows += [{"audio": "eve.wav", "id": "o", "text": "x", "speaker": "O'Neil"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_fleet_in_turn_resumes_and_reports(manifest, tmp_path):
    arguments = ["adapt", "--manifest", manifest, "--store", tmp_path, "--epochs", "1"]
    first = CliRunner().invoke(app, [str(a) for a in arguments])
    assert first.exit_code == 1, (first.output, first.exception)
    report = json.loads((tmp_path / "fleet.json").read_text())
    assert [(o["speaker"], o["status"]) for o in report] == [
        ("1688", "adapted"), ("eve", "failed"), ("1998", "adapted"), ("none", "failed"),
        ("O'Neil", "failed"),
    ]  # fmt: skip
    assert "eve.wav" in report[1]["reason"]
    assert ProfileStore(tmp_path).names() == ["1688", "1998"]
    again = CliRunner().invoke(app, [str(a) for a in arguments])
    assert "1688: there already" in again.stdout and "eve: failed" in again.stdout
    # The same clips and options, but beside weights that are gone.
    store = ProfileStore(tmp_path)
    store.save(replace(store.load("1688"), weight_hash="0" * 64), "1688")
    anew = CliRunner().invoke(app, [str(a) for a in arguments])
    assert "1688: adapted" in anew.stdout and "1998: there already" in anew.stdout
    both = CliRunner().invoke(app, ["adapt", "--manifest", str(manifest), "--data", "x"])
    assert both.exit_code == 2


KILL_A_WORKER = """
import json, os, signal, sys, threading, time
from dataclasses import replace
from pathlib import Path
import ray
from saml_models.corpora import load_corpus
from saml_models.fleet import adapt_fleet, make_jobs
from saml_models.store import ProfileStore
from saml_models.training import TrainingOptions

store = ProfileStore(sys.argv[2])
options = TrainingOptions(epochs=3, max_batch=1, checkpoint_every=1)
rows = load_corpus(sys.argv[1], need_audio=False)
jobs = make_jobs(rows, "tiny.en", store, options=options)
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)

killed = []
def kill():
    progress = Path(sys.argv[2]) / ".progress" / "1688.safetensors"
    while not progress.exists():
        time.sleep(0.01)
    for worker in ours():
        os.kill(worker, signal.SIGKILL)
        killed.append(worker)

def ours():
    # Workers that run a job, below the raylet that this process started.
    parents, running = {}, []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name = (entry / "cmdline").read_bytes()
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
            parents[int(entry.name)] = parent
            if name.startswith(b"ray::run"):
                running.append(int(entry.name))
    return [p for p in running if os.getpid() in (parents.get(parents[p]), parents[p])]

thread = threading.Thread(target=kill, daemon=True)
thread.start()
outcomes = adapt_fleet(jobs, ray=True)
print(json.dumps([killed, [[o.speaker, o.status] for o in outcomes]]))
"""


@pytest.mark.slow
def test_a_worker_killed_half_way_is_replaced(manifest, tmp_path):
    pytest.importorskip("ray", reason="Ray is an extra: pip install 'saml-kernels[ray]'")
    command = [sys.executable, "-c", KILL_A_WORKER, manifest, tmp_path]
    quick = {**os.environ, "RAY_worker_niceness": "0"}  # Ray's workers give way to all else
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=600, env=quick
    )
    assert done.returncode == 0, done.stderr
    killed, outcomes = json.loads(done.stdout.splitlines()[-1])
    assert killed
    assert outcomes[:3] == [["1688", "adapted"], ["eve", "failed"], ["1998", "adapted"]]


def test_an_embedding_asks_nothing_behind_the_first_layer(experts, utterances):
    model, processor = experts
    hook = model.model.encoder.layers[1].register_forward_hook(lambda *_: pytest.fail("asked"))
    try:
        found = embed(bind(model, processor), [utterances["1688"][0].load()])
    finally:
        hook.remove()
    assert found.shape == (2, model.config.d_model) and found.isfinite().all()
    assert model.config.max_source_positions == 1500
