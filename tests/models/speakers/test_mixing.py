"""Many speakers in one batch of real speech: each row has the words that it has alone."""

from dataclasses import replace

import pytest
import torch

from saml_kernels import SAMLConfig, SAMLError
from saml_kernels.backends.cpu import native
from saml_models.data.corpora import load_corpus
from saml_models.models.registry import bind
from saml_models.speakers import mixing as voices
from saml_models.speakers.mixing import mixed_batch
from saml_models.speakers.pretrained import load_adaptable
from saml_models.speakers.profile import SpeakerProfile
from saml_models.transcription.clips import decode_clips
from saml_models.transcription.recordings import transcribe


@pytest.fixture(scope="module")
def experts():
    return load_adaptable("tiny.en")


@pytest.fixture(scope="module")
def clips(speech_root):
    """Sixteen clips of 1 to 4 s of two readers."""
    found = load_corpus(speech_root / "LibriSpeech" / "test-other", ["1688", "1998"])
    found = [u.load()[: 16000 + 3000 * i] for i, u in enumerate(found[:16])]
    assert len(found) == 16
    return found


@torch.no_grad()
def voice(model, seed, short=True):
    """A profile that hears other words than the pretrained experts, but words."""
    torch.manual_seed(seed)
    with model.saml.snapshot():
        for parameter in model.saml.experts().values():
            parameter.mul_(1 + 2 * torch.randn_like(parameter))
        return SpeakerProfile.of(model, speaker=f"voice {seed}", short_windows=short)


@torch.no_grad()
def gates(model, seed):
    torch.manual_seed(seed)
    with model.saml.snapshot():
        for router in model.saml.routers.values():
            router.offset = 3 * torch.randn(len(router.weight))
        return SpeakerProfile.of_gates(model, speaker=f"gates {seed}")


def pruned(model, profile):
    """The profile with one expert less in every other layer, and two less in the first."""
    kept, tensors = {}, {}
    for i, name in enumerate(model.saml.layers):
        kept[name] = [1, 2] if i == 0 else [0, 2, 3] if i % 2 else [0, 1, 2, 3]
    values = profile.experts(model)
    from saml_models.compress.packing import pack_experts

    for name, value in values.items():
        layer = next(n for n in kept if name.startswith(n + "."))
        tensors[name] = value[kept[layer]]
    return replace(profile, tensors=pack_experts(tensors, "int8"), kept=kept)


@pytest.fixture(scope="module")
def profiles(experts):
    """Sixteen speakers of every kind; None hears with the pretrained experts."""
    model = experts[0]
    found = [voice(model, seed) for seed in range(10)]
    found += [gates(model, seed) for seed in range(3)]
    return [*found, pruned(model, found[0]), voice(model, 20, short=False), None]


def test_nobody_hears_the_offsets_that_are_in_the_model(experts, profiles):
    model = experts[0]
    with profiles[10].applied(model):
        expected = {f"{n}.offset": r.offset for n, r in model.saml.routers.items()}
        found = {n: v for n, v in voices._values(model, None).items() if n.endswith(".offset")}
    assert expected and found.keys() == expected.keys()
    assert all(torch.equal(found[n], expected[n]) for n in expected)


def alone(experts, clips, profiles, beam_size=1):
    return [
        decode_clips(bind(*experts), [c], speakers=[p], beam_size=beam_size)[0]
        for c, p in zip(clips, profiles, strict=True)
    ]


def test_sixteen_speakers_have_the_words_each_has_alone(experts, clips, profiles):
    before = experts[0].saml.weight_hash()
    expected = alone(experts, clips, profiles)
    plain = decode_clips(bind(*experts), clips)
    assert sum(a != b for a, b in zip(expected, plain, strict=True)) > 8  # the voices differ
    assert decode_clips(bind(*experts), clips, speakers=profiles) == expected
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = decode_clips(
        bind(*experts), [clips[i] for i in order], speakers=[profiles[i] for i in order]
    )
    assert shuffled == [expected[i] for i in order]
    assert experts[0].saml.weight_hash() == before
    assert decode_clips(bind(*experts), clips[:3]) == plain[:3]
    for parameter in experts[0].saml.experts().values():  # pruned ones were in their place
        parameter.requires_grad_(False).requires_grad_(True)


@pytest.mark.skipif(not native.available(), reason=native.native_status())
def test_experts_stay_in_int8_where_all_profiles_have_them_so(experts, profiles):
    model = experts[0]
    with mixed_batch(model, [profiles[0], profiles[1]]):
        for name, layer in model.saml.layers.items():
            for part in ("lora_a", "lora_b"):
                kept = getattr(layer.speaker_experts, part)
                own = profiles[1].experts(model)[f"{name}.{part}"]
                assert kept.codes.dtype == torch.int8 and kept.shape == (2, *own.shape)
                assert torch.equal(kept.dequantize()[1], own)
    with mixed_batch(model, [profiles[0], None]):
        assert all(torch.is_tensor(x.speaker_experts.lora_a) for x in model.saml.layers.values())


def test_two_speakers_and_beams(experts, clips, profiles):
    chosen = [profiles[0], profiles[1], profiles[0], profiles[11]]
    expected = alone(experts, clips[:4], chosen, beam_size=3)
    found = decode_clips(bind(*experts), clips[:4], speakers=chosen, beam_size=3, batch_size=12)
    assert found == expected
    assert len(set(expected)) == 4


def test_transcribe_takes_lists(experts, clips, profiles, tmp_path):
    file = tmp_path / "a.safetensors"
    profiles[0].save(file)
    mixed = [clips[0], clips[1], clips[2]]
    seen = []
    found = transcribe(
        *experts, mixed, [file, profiles[1], None], on_progress=lambda *done: seen.append(done)
    )
    assert [f.text for f in found] == alone(experts, mixed, [profiles[0], profiles[1], None])
    assert [f.speaker_hash for f in found] == [profiles[0].hash, profiles[1].hash, None]
    assert seen[-1] == (3.0, 3)
    one = transcribe(*experts, clips[1], profiles[1], timestamps=False)
    assert one == found[1]
    with pytest.raises(SAMLError, match="2 for 3 recordings"):
        transcribe(*experts, mixed, [None, None])
    with pytest.raises(SAMLError, match="another model"):
        transcribe(*experts, mixed[:2], [profiles[0], replace(profiles[1], weight_hash="0")])
    assert all(layer.speaker_experts is None for layer in experts[0].saml.layers.values())


@pytest.mark.slow
def test_a_long_recording_among_short_ones(experts, clips, profiles):
    import numpy as np

    long = np.concatenate([*clips, *clips[:8]])
    assert len(long) > 31 * 16000
    speakers = [profiles[0], profiles[1], profiles[2]]
    found = transcribe(*experts, [clips[3], long, clips[5]], speakers)
    assert found[1].text == transcribe(*experts, long, profiles[1]).text
    assert [found[0].text, found[2].text] == alone(
        experts, [clips[3], clips[5]], [profiles[0], profiles[2]]
    )


def test_a_model_whose_layers_share_routers_hears_speaker_by_speaker(tiny_en, clips):
    from copy import deepcopy

    from saml_models.compress.apply import apply_saml

    model = deepcopy(tiny_en[0])
    apply_saml(model, SAMLConfig.paper())
    speakers = [voice(model, 0), voice(model, 1), None]
    expected = alone((model, tiny_en[1]), clips[:3], speakers)
    assert decode_clips(bind(model, tiny_en[1]), clips[:3], speakers=speakers) == expected


def test_an_error_in_the_block_gives_the_layers_back(experts, profiles):
    model = experts[0]
    with pytest.raises(KeyError), mixed_batch(model, profiles[:2]):
        assert model.saml.context.speakers is not None
        raise KeyError
    assert model.saml.context.speakers is None
    assert all(layer.speaker_experts is None for layer in model.saml.layers.values())
    assert model.saml.short_windows
