"""Enrolled speakers: safe names, and profiles in and out."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_voices import CONFIG, make
from synthetic import small_whisper
from typer.testing import CliRunner

from saml_kernels import SAMLError
from saml_models.cli.main import app
from saml_models.compress.apply import apply_saml
from saml_models.runtime import folders
from saml_models.speakers.choice import choose_speakers, read_map
from saml_models.speakers.peft import export_experts, import_adapters
from saml_models.speakers.pretrained import profile_config
from saml_models.speakers.profile import SpeakerProfile
from saml_models.speakers.store import ProfileStore


def saml(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def refused(result, *parts):
    assert result.exit_code == 2 and result.stdout == "", (result.output, result.exception)
    (line,) = result.stderr.splitlines()
    assert all(str(part) in line for part in parts), line


@pytest.fixture
def store(tmp_path):
    """Ann and Bob are enrolled."""
    found = ProfileStore(tmp_path / "store")
    for voice, name in enumerate(("ann", "Bob B.ö-2")):
        model = make(voice=voice)
        found.save(SpeakerProfile.of(model, speaker=name, model="tiny.en", wer_after=7.5))
    return found


@pytest.mark.parametrize(
    "name",
    ["../ann", "/ann", "a/b", "a\\b", "", ".", "..", ".ann", "-x", "a\nb", "a" * 49, "Auto", "a."],
)
def test_a_name_that_is_a_path_is_refused(store, name):
    profile = SpeakerProfile.of(make(voice=1), speaker=name)
    before = sorted(store.folder.parent.rglob("*"))
    for act in (lambda: store.save(profile), lambda: store.load(name), lambda: store.remove(name)):
        with pytest.raises(SAMLError, match="not a name to store under"):
            act()
    assert sorted(store.folder.parent.rglob("*")) == before


def test_the_commands(store, tmp_path):
    at = ("--store", store.folder)
    listed = saml("speakers", "list", *at)
    assert listed.exit_code == 0, listed.output
    assert [line.split("  ")[0] for line in listed.stdout.splitlines()[1:]] == ["Bob B.ö-2", "ann"]
    assert "7.5" in listed.stdout
    shown = saml("speakers", "show", "ann", *at)
    assert shown.exit_code == 0 and store.load("ann").hash in shown.stdout
    refused(saml("speakers", "show", "eve", *at), "eve", "ann")
    refused(saml("speakers", "show", tmp_path / "no.safetensors", *at), "no such file")
    refused(saml("speakers", "remove", "../ann", *at), "../ann")
    out = tmp_path / "out.safetensors"
    assert saml("speakers", "export", "ann", out, *at).exit_code == 0
    assert SpeakerProfile.load(out).hash == store.load("ann").hash
    assert saml("speakers", "remove", "ann", *at).exit_code == 0
    assert store.names() == ["Bob B.ö-2"]
    assert saml("speakers", "import", out, "--name", "cid", *at).exit_code == 0
    assert store.load("cid").hash == SpeakerProfile.load(out).hash
    assert store.load("cid").name == "cid"
    refused(saml("speakers", "import", out, "--name", "a/b", *at), "a/b")
    # A damaged file is said to be, and the others are still listed.
    store.path("cid").write_bytes(b"x")
    again = saml("speakers", "list", *at).stdout
    assert "damaged" in again and "Bob" in again
    assert saml("speakers", "list", "--store", tmp_path / "none").exit_code == 0


def test_an_adapter_for_each_expert_there_and_back(tmp_path):
    model = make(voice=1, config=replace(CONFIG, expert_format="float16"))
    profile = SpeakerProfile.of(model, speaker="ann", model="tiny.en")
    written = export_experts(profile, model, tmp_path)
    assert [p.name for p in written] == ["expert-0", "expert-1"]
    settings = json.loads((written[1] / "adapter_config.json").read_text())
    assert settings["r"] == 2 and settings["lora_alpha"] == CONFIG.alpha
    name, layer = next(iter(model.saml.layers.items()))
    tensors = load_file(written[1] / "adapter_model.safetensors")
    torch.testing.assert_close(
        tensors[f"base_model.model.{name}.lora_A.weight"],
        profile.experts(model)[f"{name}.lora_a"][1],
    )
    back = import_adapters(written, model, "ann")
    other = small_whisper(0)
    apply_saml(other, profile_config(back))
    back.apply(other)
    # The same experts, with equal shares instead of a learnt router.
    for ours in model.saml.layers.values():
        torch.nn.init.zeros_(ours.router.weight)
    theirs = other.saml.layers[name]
    x = torch.randn(3, layer.in_features)
    torch.testing.assert_close(theirs(x), layer(x), rtol=2e-3, atol=2e-3)


def test_auto_leaves_out_who_cannot_be_chosen(store):
    """A damaged file, no embedding, another model: said, and no hindrance for the others."""
    model, heard = make(voice=0), torch.rand(2, 8).half()
    ann = replace(store.load("ann"), embedding=heard)
    store.save(ann)
    store.save(replace(ann, weight_hash="0" * 64, about={"speaker": "eve"}))
    store.path("damaged").write_bytes(b"x")
    (store.folder / "cid.safetensors.checkpoint").write_bytes(b"x")  # an adaptation under way
    notes = []
    choice = choose_speakers(["a.wav"], "auto", None, store.folder, notes.append)
    assert [p.name for p in choice.enrolled] == ["Bob B.ö-2", "ann", "eve"]
    choice.wanted = []  # no recording: nothing is heard
    assert choice.for_files(model, None, []) == []
    assert [p.name for p in choice.enrolled] == ["ann"]
    assert [note.split(":")[0] for note in notes] == ["damaged", "Bob B.ö-2", "eve"]
    choice.enrolled = [replace(ann, embedding=None)]
    with pytest.raises(SAMLError, match="nobody is enrolled for this model"):
        choice.for_files(model, None, [])


def test_an_embedding_that_is_none_is_refused(tmp_path):
    path = tmp_path / "p.safetensors"
    for embedding in (torch.full((2, 8), torch.nan), torch.rand(8), torch.ones(2, 8).int()):
        replace(SpeakerProfile.of(make(voice=1)), embedding=embedding).save(path)
        with pytest.raises(SAMLError, match="embedding"):
            SpeakerProfile.load(path)


def test_a_profile_that_asks_for_more_than_it_holds_is_refused(tmp_path):
    profile = SpeakerProfile.of(make(voice=1))
    greedy = replace(profile, kind="gates", config=profile.config | {"num_experts": 10_000_000})
    with pytest.raises(SAMLError, match="at most 8192"):
        profile_config(greedy)


def test_adapters_that_mean_something_else_are_refused(tmp_path):
    model = make(voice=1)
    (folder, _) = export_experts(SpeakerProfile.of(model, speaker="ann"), model, tmp_path)
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    settings, tensors = json.loads(config.read_text()), load_file(weights)
    for change, message in (
        ({"use_dora": True}, "use_dora"), ({"bias": "all"}, "plain LoRA"),
        ({"peft_type": "IA3"}, "IA3"), ({"r": "x"}, "configuration"),
        ({"r": 0, "use_rslora": True}, "configuration"),
        ({"lora_alpha": float("nan")}, "configuration"), ({"lora_alpha": 1e9}, "float16"),
    ):  # fmt: skip
        config.write_text(json.dumps(settings | change))
        with pytest.raises(SAMLError, match=message):
            import_adapters([folder], model, "ann")
    config.write_text(json.dumps(settings))
    key = next(k for k in tensors if "lora_A" in k)
    for name, value, message in (
        (key, tensors[key][:, :-1].contiguous(), "another model"),
        (key, tensors[key][:1].contiguous(), "do not fit"),
        (key, tensors[key] * float("nan"), "finite"),
        ("base_model.model.x.lora_magnitude", tensors[key], "lora_magnitude"),
    ):  # fmt: skip
        save_file({**{k: v for k, v in tensors.items() if k != key}, name: value}, weights)
        with pytest.raises(SAMLError, match=message):
            import_adapters([folder], model, "ann")


def test_an_adapter_of_layers_that_the_model_has_not_is_refused(tmp_path):
    model = make(voice=1)
    (folder, _) = export_experts(SpeakerProfile.of(model, speaker="ann"), model, tmp_path)
    weights = folder / "adapter_model.safetensors"
    moved = {k.replace("layers.0", "layers.9"): v for k, v in load_file(weights).items()}
    save_file(moved, weights)
    with pytest.raises(SAMLError, match=r"layers\.9.*no experts for"):
        import_adapters([folder], model, "ann")


def test_peft_hears_an_exported_expert(tmp_path):
    """The adapter in PEFT's own hands: what it adds to a dense copy of the base."""
    peft = pytest.importorskip("peft")
    model = make(voice=1, config=replace(CONFIG, expert_format="float16", num_experts=1))
    profile = SpeakerProfile.of(model, speaker="ann")
    profile.apply(model)
    (folder,) = export_experts(profile, model, tmp_path)
    dense = small_whisper(0)
    with torch.no_grad():
        for name, module in list(model.saml.layers.items()):
            dense.get_submodule(name).weight.copy_(module.weight.dequantize())
    theirs = peft.PeftModel.from_pretrained(dense, folder).eval()
    for name, layer in model.saml.layers.items():
        x = torch.randn(2, layer.in_features)
        found = theirs.base_model.model.get_submodule(name)(x)
        torch.testing.assert_close(found, layer(x), rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("kind", "variable", "earlier"),
    [
        ("cache", "XDG_CACHE_HOME", ".cache/saml-kernels"),
        ("data", "XDG_DATA_HOME", ".local/share/saml-kernels"),
    ],
)
def test_what_lies_in_earlier_folders_is_found(kind, variable, earlier, tmp_path, monkeypatch):
    find = getattr(folders, f"{kind}_folder")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(variable, raising=False)
    assert find() == tmp_path / earlier  # Linux's own
    system = tmp_path / "Library"  # of a system with other habits
    monkeypatch.setattr(folders, "PlatformDirs", lambda *given, **how: Elsewhere(system))
    assert find() == system
    (tmp_path / earlier).mkdir(parents=True)
    assert find() == tmp_path / earlier


class Elsewhere:
    def __init__(self, folder):
        self.user_cache_path = self.user_data_path = folder


def test_the_store_is_where_the_user_says(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.delenv("SAML_SPEAKERS", raising=False)
    assert ProfileStore().folder == tmp_path / "saml-kernels" / "speakers"
    monkeypatch.setenv("SAML_SPEAKERS", str(tmp_path / "mine"))
    assert ProfileStore().folder == tmp_path / "mine"


def test_a_list_of_who_is_heard_where(store, tmp_path):
    path = tmp_path / "map.csv"
    path.write_text("\ufeffaudio,speaker\na.wav,ann\nsub/b.wav,-\nc.wav,\nd.wav, auto\n")
    found = read_map(path)
    assert {p.relative_to(tmp_path).as_posix(): s for p, s in found.items()} == {
        "a.wav": "ann", "sub/b.wav": "-", "c.wav": "", "d.wav": "auto",
    }  # fmt: skip
    choice = choose_speakers(list(found), None, found, store.folder)
    assert [getattr(w, "name", w) for w in choice.wanted] == ["ann", None, None, "auto"]
    assert list(choice.profiles) == ["ann"]
    assert [p.name for p in choice.enrolled] == ["Bob B.ö-2", "ann"]
    with pytest.raises(SAMLError, match=r"e\.wav: is not in the list"):
        choose_speakers([tmp_path / "e.wav"], None, found, store.folder)
    with pytest.raises(SAMLError, match="nobody is enrolled"):
        choose_speakers([tmp_path / "e.wav"], "auto", None, tmp_path / "none")
    for text, message in (
        ("", "lists no recordings"), ("a.wav\n", "row 1"), ("a.wav,x\na.wav,y\n", "twice"),
    ):  # fmt: skip
        path.write_text(text)
        with pytest.raises(SAMLError, match=message):
            read_map(path)
    with pytest.raises(SAMLError, match="No such file"):
        read_map(tmp_path / "no.csv")
