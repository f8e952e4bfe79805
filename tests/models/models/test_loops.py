"""Texts that run into a loop are stopped and said again, whatever decodes them."""

import json
import random

import pytest
import torch
from synthetic import small_conformer, small_whisper

from saml_kernels import SAMLConfig
from saml_models.compress.apply import apply_saml
from saml_models.compress.loading import load_model
from saml_models.data.corpora import load_corpus
from saml_models.models.interface import QUANTISED_MARGIN
from saml_models.models.loops import Tried, best_of, draws, is_loop, once, repeated
from saml_models.models.registry import bind
from saml_models.models.token_limits import OwnLimits, token_limit
from saml_models.models.whisper import speech_model as whisper_speech
from saml_models.models.whisper.greedy import Step, _listen, _say, greedy
from saml_models.models.whisper.windows import audio_window
from saml_models.transcription.clips import decode_clips
from saml_models.transcription.recordings import transcribe

PLAIN = [5, 9, 2, 7, 7, 1, 30, 4, 11, 8, 15, 3, 16, 23, 42]


@pytest.mark.parametrize(
    ("tail", "unit"),
    [
        ([6] * 12, 1),
        ([6] * 11, 0),  # "no, no, no": people do say that
        ([6, 5] * 6, 2),
        ([6, 5] * 5, 0),
        ([1, 2, 3, 4, 5, 6, 7] * 4, 7),
        ([1, 2, 3, 4, 5, 6, 7] * 3, 0),  # a refrain
        ([1, 2, 3, 4, 5, 6, 7] * 4 + [1, 2], 7),
        (list(range(100, 132)) * 4, 32),
        ([], 0),
    ],
)
def test_what_repeats(tail, unit):
    assert repeated(tail) == unit
    whole = [*PLAIN, *tail]
    assert repeated(whole) == unit
    assert once(whole) == (PLAIN + tail[:unit] if unit else whole)


def test_a_loop_is_seen_as_by_its_definition():
    rng = random.Random(0)
    seen = 0
    for _ in range(3000):
        ids = [rng.randrange(2) for _ in range(rng.randrange(40))]
        if rng.random() < 0.5:
            ids += ids[-rng.randrange(1, 6) :] * rng.randrange(2, 8)
        units = [
            p for p in range(1, 33)
            for span in [max(12, 4 * p)]
            if len(ids) >= span and all(ids[-i] == ids[-i - p] for i in range(1, span - p + 1))
        ]  # fmt: skip
        assert repeated(ids) == (units[0] if units else 0)
        seen += bool(units)
    assert 200 < seen < 2800


def test_whole_texts():
    assert not is_loop(PLAIN, 100)
    assert is_loop(PLAIN, len(PLAIN))  # longer than its clip allows
    verse = random.Random(1).sample(range(1000), 40)
    assert not is_loop(verse * 2, 999)
    assert is_loop([*verse * 3, 1], 999)  # ends otherwise, and compresses as no speech does
    assert not is_loop([], 10)


def test_the_most_likely_that_is_no_loop():
    loop, likely, other = Tried([6] * 20, -0.1), Tried(PLAIN, -0.5), Tried(PLAIN[:3], -0.9)
    assert best_of([other, loop, likely], 99) == PLAIN
    assert best_of([Tried([6] * 14, -3.0), loop], 99) == [6] * 14


def test_the_same_loop_draws_the_same():
    assert torch.equal(draws(PLAIN, 5, 7), draws(PLAIN, 5, 7))
    assert draws(PLAIN, 5, 7).unique().numel() == 35
    assert not torch.equal(draws(PLAIN, 5, 7), draws(PLAIN[:-1], 5, 7))


def test_transcripts_of_all_kinds_are_no_loops(speech_root, tiny_en):
    tokenizer, count = tiny_en[1].tokenizer, 0
    for manifest in sorted(speech_root.glob("*/*.jsonl")):
        rows = [json.loads(line) for line in manifest.read_text().splitlines() if line.strip()]
        texts = [" " + row["text"].capitalize() for row in rows[::3]]
        for row, ids in zip(
            rows[::3], tokenizer(texts, add_special_tokens=False).input_ids, strict=True
        ):
            limit = token_limit(int(row.get("duration", 30) * 16000))
            assert not is_loop(ids, limit) and not any(map(repeated, (ids[:8], ids[:16], ids[:32])))
            count += 1
    assert count > 500


@pytest.fixture
def looping():
    """A random model that says the same over and over, as such models do."""
    model = small_whisper(layers=2)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = 299
    torch.manual_seed(1)
    return model, [(torch.randn(1, 80, f), torch.ones(1, f // 2) > 0) for f in (100, 200, 300)]


@pytest.mark.parametrize("router", [None, "token", "utterance", "speaker"])
def test_greedy(looping, router, monkeypatch):
    """What stands in for a loop does not depend on the company."""
    model, windows = looping
    if router is not None:
        apply_saml(model, SAMLConfig(router=router, rank=2, num_experts=2, expert_init="lora"))
        with torch.no_grad():
            for parameter in model.saml.experts().values():
                parameter.normal_(0, 0.1)
    limits = [90, 60, 75]
    with monkeypatch.context() as patch:  # as it was heard
        patch.setattr("saml_models.models.whisper.greedy.is_loop", lambda ids, limit: False)
        heard = greedy(model, windows, limits)
    loops = [is_loop(ids, limit) for ids, limit in zip(heard, limits, strict=True)]
    assert any(loops) and all(len(h) < n for h, n in zip(heard, limits, strict=True) if repeated(h))
    found = greedy(model, windows, limits)
    assert found == greedy(model, windows, limits)
    for i, loop in enumerate(loops):
        assert greedy(model, windows[i : i + 1], limits[i : i + 1]) == [found[i]]
        assert (found[i] != heard[i]) == loop
        assert not repeated(found[i])


@torch.inference_mode()
def test_the_log_probability_of_a_text(looping):
    """Of a given text and of drawn ones: as a pass over the whole text says."""
    model, windows = looping
    prompt, decoder = _listen(model, windows[:1], None, 20)
    step = Step(model.generation_config, decoder, prompt).alone(0, 6)
    sampling = step.sample(draws([1], 5, 20), PLAIN)
    texts = _say(step, [20] * 6)
    assert texts[0] == PLAIN and len({tuple(t) for t in texts}) > 3
    for row, text in enumerate(texts):
        whole = torch.tensor([[*prompt[0].tolist(), *text, 299]])
        with audio_window(model, 100):
            logits = model(windows[0][0], decoder_input_ids=whole[:, :-1]).logits
        own = logits.log_softmax(-1).gather(-1, whole[:, 1:, None])[0, prompt.shape[1] - 1 :, 0]
        length = len(text) + (row == 0)  # its end was not drawn by those that reached the limit
        assert sampling.mean(row, length - 1) == pytest.approx(float(own[:length].mean()), abs=1e-4)


@pytest.mark.parametrize("router", ["token", "shared"])
def test_generate(looping, tiny_en, router):
    """With beams, and by transformers alone where routers hook into its attention."""
    model, _ = looping
    mix = "merged" if router == "shared" else "sum"
    apply_saml(model, SAMLConfig(router=router, rank=2, num_experts=2, mix=mix, expert_init="lora"))
    clips = [torch.randn(n).numpy() for n in (16000, 40000)]
    limits = [token_limit(len(c)) for c in clips]
    with torch.inference_mode():
        for beams in (1, 2):
            one = (beams, model, tiny_en[1], clips, [200, 350], None, None)
            found = whisper_speech._beams(*one)
            assert found == whisper_speech._beams(*one)
            assert not any(map(repeated, found)) and len(found) == len(limits)


def test_a_stopping_rule_for_generate():
    rule = OwnLimits([40, 40, 40, 5])
    said = torch.zeros(4, 3, dtype=torch.int64)
    done = []
    for i in range(16):
        said = torch.cat((said, torch.tensor([[7], [i % 2], [PLAIN[i % 15]], [i]])), dim=1)
        done.append(rule(said, None).tolist())
    assert done[3] == [False] * 4 and done[5] == [False, False, False, True]
    assert done[11] == [True, True, False, True] and done[15] == done[11]
    timed = OwnLimits([40], prompt=2, text=100)
    row = [0, 0, *[t for i in range(12) for t in (100 + i, 7)]]
    assert timed(torch.tensor([row]), None).tolist() == [True]
    assert timed(torch.tensor([row[:-8]]), None).tolist() == [False]


@pytest.mark.parametrize("ctc", [True, False])
def test_a_conformer(ctc):
    model, processor = small_conformer(seed=1)
    if not ctc:
        del model.ctc_head
    apply_saml(model, SAMLConfig(rank=2, num_experts=2, router="utterance", expert_init="lora"))
    torch.manual_seed(0)
    clips = [(torch.randn(n) * torch.linspace(0.001, 1, n)).numpy() for n in (16000, 48000)]
    heard = []
    generate = model.generate

    def watched(**options):
        found = generate(**options)
        heard.append(options)
        return found

    model.generate = watched
    found = decode_clips(bind(model, processor), clips)
    asked = len(heard)
    assert found == decode_clips(bind(model, processor), clips)
    assert asked == 1 if ctc else asked > 1  # sampled where there is no other text
    ids = [processor.tokenizer(t, add_special_tokens=False).input_ids for t in found]
    assert not any(map(repeated, ids))


LOOPS = ["000540163", "000940049", "022820291"]  # of plainly rounded tiny.en without experts


@pytest.fixture(scope="module")
def real(speech_root):
    manifest = speech_root / "speechocean762-more" / "choosing.jsonl"
    if not manifest.is_file():
        pytest.skip(f"no {manifest}")
    own = {u.id: u for u in load_corpus(manifest) if u.id in LOOPS}
    model, processor = load_model("tiny.en")
    apply_saml(model, SAMLConfig(num_experts=0))
    model.saml.margin = QUANTISED_MARGIN
    return (model, processor), [own[i].load() for i in LOOPS]


def test_real_clips(real):
    """By the greedy loop they are said as often as they were said; with beams, with times too."""
    model, clips = real
    said = decode_clips(bind(*model), clips)
    assert said == ["I am in the grass.", "5, 8, 2, 9", "I read a lot of fiction."]
    assert all(len(t.split()) < 12 for t in bind(*model).decode(clips, 2, "en"))


def test_a_real_recording_with_times(real):
    model, clips = real
    for clip in clips:
        found = transcribe(*model, clip)
        assert 2 < len(found.text.split()) < 14
        assert found == transcribe(*model, clip)
