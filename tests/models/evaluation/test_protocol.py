"""The protocol: folds, the five systems end to end on real weights and speech, JSON and figure."""

from __future__ import annotations

import json

import numpy as np
import pytest
import soundfile

from saml_kernels import SAMLConfig, SAMLError
from saml_kernels.files import write_json
from saml_models.compress.apply import apply_saml
from saml_models.data.corpora import Utterance, by_speaker, load_corpus
from saml_models.evaluation import protocol
from saml_models.evaluation.figures import plot_speakers
from saml_models.evaluation.protocol import SYSTEMS, evaluate, make_folds, other_fold
from saml_models.models.registry import bind
from saml_models.models.whisper.loading import load_whisper
from saml_models.training.options import TrainingOptions
from saml_models.training.samples import training_samples
from saml_models.transcription.clips import decode_clips


def people(tmp_path, counts):
    return {
        name: [Utterance(f"{name}-{i}", name, "words", tmp_path / "x.wav") for i in range(n)]
        for name, n in counts.items()
    }


def test_first_k_adapt_and_the_rest_test(tmp_path):
    (fold,) = make_folds(people(tmp_path, {"a": 5}), 3, 2)
    assert [u.id for u in fold.train] == ["a-0", "a-1", "a-2"]
    assert [u.id for u in fold.test] == ["a-3", "a-4"]


def test_folds_test_everything_once_and_never_train_on_it(tmp_path):
    folds = make_folds(people(tmp_path, {"a": 5, "b": 4}), None, 2)
    for name, count in (("a", 5), ("b", 4)):
        tested = [u.id for f in folds if f.speaker == name for u in f.test]
        assert sorted(tested) == [f"{name}-{i}" for i in range(count)]
    for fold in folds:
        assert not {u.id for u in fold.train} & {u.id for u in fold.test}
        assert {u.speaker for u in fold.train + fold.test} == {fold.speaker}


@pytest.mark.parametrize(("k", "folds"), [(5, 2), (0, 2), (None, 1), (None, 6)])
def test_splits_that_cannot_be_are_refused(tmp_path, k, folds):
    with pytest.raises(SAMLError, match="expected at least"):
        make_folds(people(tmp_path, {"a": 5}), k, folds)


def test_the_other_speaker_is_another_speaker(tmp_path):
    folds = make_folds(people(tmp_path, {"a": 4, "b": 4}), None, 2)
    for i, fold in enumerate(folds):
        assert folds[other_fold(folds, i)].speaker != fold.speaker


def test_the_whole_protocol_on_real_speech(speech_root, tmp_path, monkeypatch):
    manifest = speech_root / "speechocean762" / "test.jsonl"
    if not manifest.exists():
        pytest.skip("no speechocean762")
    speakers = dict(list(by_speaker(load_corpus(manifest)).items())[:2])
    folds = make_folds({name: us[:4] for name, us in speakers.items()}, 3, 2)
    full, quantised, saml = (load_whisper("tiny.en") for _ in range(3))
    report = apply_saml(quantised[0], SAMLConfig(num_experts=0))
    apply_saml(saml[0], SAMLConfig(num_experts=2, rank=2, expert_init="lora"))
    before = {n: p.detach().clone() for n, p in saml[0].saml.experts().items()}
    parts: list[int] = []
    languages: list[str | None] = []

    def noting(*given, language, **options):
        languages.append(language)
        return decode_clips(*given, language=language, **options)

    monkeypatch.setattr(protocol, "decode_clips", noting)
    options = TrainingOptions(epochs=1, speeds=(1.0,))
    with pytest.raises(SAMLError, match="klingon"):
        evaluate(full, quantised, saml, folds, options, language="klingon")
    assert not languages
    result = evaluate(
        full, quantised, saml, folds, options, language="english", on_done=parts.append
    )
    assert set(languages) == {"en"}
    assert all((before[n] == p).all() for n, p in saml[0].saml.experts().items())
    # Three plain systems and two adapted ones decode every clip, two tell their distributions of
    # its text; every fold adapts once.
    assert sum(parts) == 6 * len(result.ids) + len(folds)
    # A run that is interrupted goes on with what it has not done, to the same texts.
    kept = tmp_path / "out.json.checkpoint"
    adapted: list[str] = []
    adapt = protocol.adapt

    def once(*given, **more):
        if adapted:
            raise KeyboardInterrupt
        adapted.append("one")
        return adapt(*given, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(protocol, "adapt", once)
        evaluate(full, quantised, saml, folds, options, language="english", checkpoint=kept)
    languages.clear()
    again: list[int] = []
    with monkeypatch.context() as patch:
        patch.delattr(protocol, "divergences")  # nor are distributions compared again
        resumed = evaluate(
            full, quantised, saml, folds, options,
            language="english", checkpoint=kept, on_done=again.append,
        )  # fmt: skip
    assert len(languages) == 2  # the second fold's own clips, and those it lends its profile to
    assert sum(again) == sum(parts)
    assert resumed.hypotheses == result.hypotheses and resumed.guard == result.guard
    assert resumed.divergence == result.divergence and resumed.diverging == result.diverging
    with pytest.raises(SAMLError, match="belongs to an evaluation with other data"):
        evaluate(full, quantised, saml, folds, options, checkpoint=kept)
    result.size = {"full_bytes": report.full_bytes, "saml_bytes": 1, "ratio": 1.0}
    path = tmp_path / "out.json"
    write_json(path, result.to_dict())
    read = json.loads(path.read_text())
    assert set(read["wer"]) == set(SYSTEMS) and set(read["speakers"]) == set(speakers)
    total = read["detail"]["full_precision"]
    errors = total["substitutions"] + total["deletions"] + total["insertions"]
    assert read["wer"]["full_precision"] == pytest.approx(100 * errors / total["words"], abs=1e-3)
    for row in read["utterances"]:
        assert row["reference"] and row["quantised"]
    assert read["wer_by_scoring"]["whisper"] == read["wer"]
    assert read["wer_by_scoring"]["paper"]["adapted"] > 0
    assert set(read["loops"]) == set(SYSTEMS)
    assert read["ratios"]["adapted_to_experts"]["interval_95"] is not None
    low, high = read["divergence"]["interval_95"]
    assert 0 < low <= read["divergence"]["kl"] <= high and read["divergence"]["kl"] < 2
    assert 0.5 < read["divergence"]["agreement"] < 1
    plot_speakers(read, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_the_last_third_of_what_is_adapted_on_chooses(tmp_path):
    """40, 20 and 40 % in file order, as the authors split a speaker."""
    (fold,) = make_folds(people(tmp_path, {"a": 10}), 6, 2, choosing=True)
    names = [[u.id for u in part] for part in (fold.train, fold.choose, fold.test)]
    everybody = [u.id for u in people(tmp_path, {"a": 10})["a"]]
    assert names == [everybody[:4], everybody[4:6], everybody[6:]]
    with pytest.raises(SAMLError, match="speaker a: 2 utterances to adapt on"):
        make_folds(people(tmp_path, {"a": 4}), 2, 2, choosing=True)


def test_what_is_too_long_to_be_learnt_from(tmp_path, tiny_en):
    soundfile.write(tmp_path / "x.wav", np.full(31 * 16000, 0.1, np.float32), 16000)
    long = people(tmp_path, {"a": 1})["a"]
    with pytest.raises(SAMLError, match=r"a-0: 31\.0 s long"):
        training_samples(bind(*tiny_en), long)
    with pytest.raises(SAMLError, match="a-0: over 30 s long, as all others"):
        training_samples(bind(*tiny_en), long, skip_long=True)
