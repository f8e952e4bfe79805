"""The reader of CTranslate2's model.bin: right values from whole files, refusal of all others."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import WhisperConfig, WhisperForConditionalGeneration

from saml_kernels.errors import SAMLError
from saml_models.models.whisper.ctranslate2 import CTranslate2Whisper, Dimensions

TYPES = ["float32", "int8", "int16", "int32", "float16", "bfloat16"]
D, FFN, MELS, VOCAB, SOURCE, TARGET = 64, 128, 4, 24, 6, 8


@dataclass
class Stored:
    """One variable to write: the shape and byte count may be made to lie."""

    type_id: int
    shape: tuple[int, ...]
    data: bytes
    nbytes: int | None = None


def store(array: np.ndarray | np.generic, dtype: str) -> Stored:
    """`array` in one of CTranslate2's types."""
    if dtype == "bfloat16":
        data = (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    else:
        data = array.astype(np.dtype(dtype).newbyteorder("<")).tobytes()
    return Stored(TYPES.index(dtype), array.shape, data)


@dataclass
class ModelFile:
    """A small Whisper as CTranslate2 lays it out, and a writer for it."""

    variables: list[tuple[str, Stored]] = field(default_factory=list)
    aliases: list[tuple[str, str]] = field(
        default_factory=lambda: [("decoder/projection/weight", "decoder/embeddings/weight")]
    )
    values: dict[str, np.ndarray] = field(default_factory=dict)
    version: int = 6
    spec: bytes = b"WhisperSpec"
    revision: int = 3
    count: int | None = None

    def get(self, name: str) -> Stored:
        return dict(self.variables)[name]

    def remove(self, name: str) -> None:
        self.variables = [item for item in self.variables if item[0] != name]

    def write(self) -> tuple[bytes, list[int]]:
        """The file, and the positions of all bytes that are no weights."""
        out = bytearray()
        header: list[int] = []

        def put(data: bytes, is_header: bool = True) -> None:
            if is_header:
                header.extend(range(len(out), len(out) + len(data)))
            out.extend(data)

        def string(text: bytes) -> None:
            put(struct.pack("<H", len(text) + 1) + text + b"\0")

        put(struct.pack("<I", self.version))
        string(self.spec)
        count = len(self.variables) if self.count is None else self.count
        put(struct.pack("<II", self.revision, count))
        for name, stored in self.variables:
            string(name.encode())
            put(struct.pack("<B", len(stored.shape)))
            put(struct.pack(f"<{len(stored.shape)}I", *stored.shape))
            nbytes = len(stored.data) if stored.nbytes is None else stored.nbytes
            put(struct.pack("<BI", stored.type_id, nbytes))
            put(stored.data, is_header=False)
        put(struct.pack("<I", len(self.aliases)))
        for alias, target in self.aliases:
            string(alias.encode())
            string(target.encode())
        return bytes(out), header


def small_whisper(dtype: str = "float16") -> ModelFile:
    """One layer on each side. Values are multiples of 1/8 below 2: exact in every float type."""
    random = np.random.default_rng(0)
    file = ModelFile()

    def weight(name: str, *shape: int) -> None:
        quantised = dtype.startswith("int")
        whole = random.integers(-15, 16, shape)
        if quantised and len(shape) > 1 and not name.endswith("encodings"):
            scale = np.full(shape[:1] if dtype == "int8" else (), 8.0, np.float32)
            file.variables.append((name, store(whole, dtype)))
            file.variables.append((f"{name}_scale", store(scale, "float32")))
        else:
            file.variables.append((name, store(whole / 8, "float32" if quantised else dtype)))
        file.values[name] = (whole / 8).astype(np.float32)

    def linear(name: str, rows: int, columns: int) -> None:
        weight(f"{name}/weight", rows, columns)
        weight(f"{name}/bias", rows)

    def norm(name: str) -> None:
        weight(f"{name}/gamma", D)
        weight(f"{name}/beta", D)

    weight("encoder/conv1/weight", D, MELS, 3)
    weight("encoder/conv1/bias", D)
    weight("encoder/conv2/weight", D, D, 3)
    weight("encoder/conv2/bias", D)
    weight("decoder/embeddings/weight", VOCAB, D)
    for side, positions in (("encoder", SOURCE), ("decoder", TARGET)):
        weight(f"{side}/position_encodings/encodings", positions, D)
        norm(f"{side}/layer_norm")
        layer = f"{side}/layer_0"
        linear(f"{layer}/self_attention/linear_0", 3 * D, D)
        linear(f"{layer}/self_attention/linear_1", D, D)
        norm(f"{layer}/self_attention/layer_norm")
        linear(f"{layer}/ffn/linear_0", FFN, D)
        linear(f"{layer}/ffn/linear_1", D, FFN)
        norm(f"{layer}/ffn/layer_norm")
        file.variables.append((f"{side}/num_heads", store(np.int16(D // 64), "int16")))
    linear("decoder/layer_0/attention/linear_0", D, D)
    linear("decoder/layer_0/attention/linear_1", 2 * D, D)
    linear("decoder/layer_0/attention/linear_2", D, D)
    norm("decoder/layer_0/attention/layer_norm")
    for switch, value in (("activation", 3), ("pre_norm", 1), ("scale_embeddings", 0)):
        file.variables.append((f"decoder/{switch}", store(np.int8(value), "int8")))
    return file


def read(folder: Path, *contents: bytes) -> tuple[Dimensions, dict[str, np.ndarray]]:
    """Write the parts of a model.bin and read them."""
    paths = [folder / f"model.bin.part{i}" for i in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    reader = CTranslate2Whisper(paths)
    return reader.dimensions, dict(reader.tensors())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "int16"])
def test_every_parameter_has_the_stored_value(tmp_path: Path, dtype: str) -> None:
    file = small_whisper(dtype)
    sizes, tensors = read(tmp_path, file.write()[0])
    assert sizes == Dimensions(D, 1, 1, 1, FFN, FFN, MELS, VOCAB, SOURCE, TARGET)
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=VOCAB, num_mel_bins=MELS, d_model=D, encoder_layers=1, decoder_layers=1,
            encoder_ffn_dim=FFN, decoder_ffn_dim=FFN, encoder_attention_heads=1,
            decoder_attention_heads=1, max_source_positions=SOURCE, max_target_positions=TARGET,
            pad_token_id=0, bos_token_id=0, eos_token_id=0, decoder_start_token_id=0,
        )
    )  # fmt: skip
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    del wanted["proj_out.weight"]  # tied: stored once
    assert {name: array.shape for name, array in tensors.items()} == wanted

    values, layer = file.values, "model.decoder.layers.0"
    qkv = values["decoder/layer_0/self_attention/linear_0/weight"]
    kv = values["decoder/layer_0/attention/linear_1/weight"]
    biases = values["decoder/layer_0/attention/linear_1/bias"]
    pairs = {
        f"{layer}.self_attn.q_proj.weight": qkv[:D],
        f"{layer}.self_attn.k_proj.weight": qkv[D : 2 * D],
        f"{layer}.self_attn.v_proj.weight": qkv[2 * D :],
        f"{layer}.encoder_attn.k_proj.weight": kv[:D],
        f"{layer}.encoder_attn.v_proj.weight": kv[D:],
        f"{layer}.encoder_attn.v_proj.bias": biases[D:],
        f"{layer}.fc2.weight": values["decoder/layer_0/ffn/linear_1/weight"],
        "model.encoder.conv1.weight": values["encoder/conv1/weight"],
        "model.decoder.embed_tokens.weight": values["decoder/embeddings/weight"],
        "model.encoder.layer_norm.bias": values["encoder/layer_norm/beta"],
    }
    for name, value in pairs.items():
        assert tensors[name].dtype == np.float32
        np.testing.assert_array_equal(tensors[name], value, err_msg=name)


@pytest.mark.parametrize("share", [0.001, 0.3, 0.7, 0.9999])
def test_parts_are_read_as_one_file(tmp_path: Path, share: float) -> None:
    content = small_whisper().write()[0]
    cut = int(share * len(content))
    _, whole = read(tmp_path, content)
    _, joined = read(tmp_path, content[:cut], content[cut:])
    assert whole.keys() == joined.keys()
    assert all(np.array_equal(whole[name], joined[name]) for name in whole)
    with pytest.raises(SAMLError, match=r"part0: not a whole"):
        read(tmp_path, content[cut:], content[:cut])


def test_a_shared_vector_is_an_alias(tmp_path: Path) -> None:
    file = small_whisper()
    file.remove("encoder/layer_norm/beta")
    file.aliases.append(("encoder/layer_norm/beta", "decoder/layer_norm/beta"))
    _, tensors = read(tmp_path, file.write()[0])
    np.testing.assert_array_equal(
        tensors["model.encoder.layer_norm.bias"], file.values["decoder/layer_norm/beta"]
    )


def change(name: str, stored: Stored) -> Callable[[ModelFile], None]:
    """Replace a variable, or add it."""

    def edit(file: ModelFile) -> None:
        file.remove(name)
        file.variables.append((name, stored))

    return edit


def append(name: str, stored: Stored) -> Callable[[ModelFile], None]:
    return lambda file: file.variables.append((name, stored))


def alias(name: str, target: str) -> Callable[[ModelFile], None]:
    return lambda file: file.aliases.append((name, target))


def assign(**values: object) -> Callable[[ModelFile], None]:
    def edit(file: ModelFile) -> None:
        for name, value in values.items():
            setattr(file, name, value)

    return edit


BETA, EMBEDDING = "encoder/layer_norm/beta", "decoder/embeddings/weight"
HUGE = 2**32 - 1


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (assign(version=5), "binary version is 5"),
        (assign(revision=2), "revision 2"),
        (assign(spec=b"TransformerSpec"), "TransformerSpec"),
        (assign(spec=b"\n\x1b[31m"), r"'\\n\\x1b\[31m'"),
        (assign(spec=b"W" * 60_000), "no proper string"),
        (assign(count=HUGE), "4294967295 variables"),
        (assign(count=3), "an alias|no variable's name|variables, more|end after"),
        (change(BETA, Stored(0, (HUGE,) * 3, b"", HUGE)), "bytes, its shape"),
        (change(BETA, Stored(0, (2**30 - 1,), b"", HUGE - 3)), "end after the file"),
        (change(BETA, Stored(0, (2**16, 2**16), b"", 0)), "has 0 bytes"),
        (change(BETA, Stored(0, (0,), b"")), "has 0 bytes"),
        (change(BETA, Stored(1, (1,) * 200, b"a")), "rank 200"),
        (change(BETA, Stored(6, (64,), bytes(256))), "unknown type 6"),
        (change(BETA, store(np.zeros(63), "float32")), r"shape \(63,\), expected \(64,\)"),
        (change(BETA, store(np.zeros(64), "int32")), "type int32"),
        (change(BETA, store(np.zeros(64), "int8")), "without a right scale"),
        (change(BETA, store(np.full(64, np.nan), "float32")), "infinities or NaNs"),
        (change(EMBEDDING, store(np.zeros((24, 96)), "float16")), "no multiple of 64"),
        (change(EMBEDDING, store(np.zeros(64), "float16")), "expected rank 2"),
        (change("decoder/activation", store(np.int8(0), "int8")), "activation is 0"),
        (change("decoder/pre_norm", store(np.int8(0), "int8")), "pre_norm is 0"),
        (change("decoder/num_heads", store(np.int16(2), "int16")), "num_heads is 2"),
        (change("decoder/pre_norm", store(np.ones(2), "int8")), "no scalar"),
        (append(BETA, store(np.zeros(64), "float16")), "occurs twice"),
        (append("encoder/new/weight", store(np.zeros(64), "float16")), "unknown variable"),
        (append("encoder/layer_90/x", store(np.zeros(64), "float16")), "layer_1/.* is missing"),
        (append("../../etc", store(np.zeros(64), "float16")), "no variable's name"),
        (append(BETA + "_scale", store(np.ones(64), "float32")), "but has a scale"),
        (lambda file: file.remove(BETA), f"{BETA} is missing"),
        (lambda file: file.aliases.clear(), "decoder/projection/weight is missing"),
        (alias("encoder/layer_norm/delta", BETA), "unknown variable encoder/layer_norm/delta"),
        (alias(BETA, "decoder/layer_norm/beta"), "occurs twice"),
        (alias("decoder/projection/weight", EMBEDDING), "occurs twice"),
        (alias("encoder/layer_1/ffn/x", "decoder/nothing"), "the unknown variable"),
    ],
)
def test_a_wrong_file_is_refused(
    tmp_path: Path, edit: Callable[[ModelFile], None], message: str
) -> None:
    file = small_whisper()
    edit(file)
    with pytest.raises(SAMLError, match=message) as caught:
        read(tmp_path, file.write()[0])
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_layers_cannot_share_matrices(tmp_path: Path) -> None:
    """A small file whose 100 layers are aliases of one would ask for 100 times its size."""
    file = small_whisper()
    for name in list(file.values):
        if name.startswith("encoder/layer_0/"):
            file.aliases += [(name.replace("_0/", f"_{i}/", 1), name) for i in range(1, 100)]
    with pytest.raises(SAMLError, match="alias of the matrix"):
        read(tmp_path, file.write()[0])


def test_an_output_head_of_its_own_is_refused(tmp_path: Path) -> None:
    file = small_whisper()
    file.aliases.clear()
    same = file.get(EMBEDDING)
    append("decoder/projection/weight", same)(file)
    assert "proj_out.weight" not in read(tmp_path, file.write()[0])[1]
    same.data, other = bytes(len(same.data)), same.data
    change("decoder/projection/weight", Stored(same.type_id, same.shape, other))(file)
    with pytest.raises(SAMLError, match="output head differs"):
        read(tmp_path, file.write()[0])


@pytest.mark.parametrize("scale", [0.0, -1.0, np.nan])
def test_a_scale_is_positive(tmp_path: Path, scale: float) -> None:
    file = small_whisper("int8")
    change(EMBEDDING + "_scale", store(np.full(VOCAB, scale), "float32"))(file)
    with pytest.raises(SAMLError, match="scale is not positive"):
        read(tmp_path, file.write()[0])


def test_missing_empty_truncated_and_longer_files(tmp_path: Path) -> None:
    with pytest.raises(SAMLError, match="no such file"):
        CTranslate2Whisper([tmp_path / "model.bin"])
    content, header = small_whisper().write()
    with pytest.raises(SAMLError, match="cannot read"):
        read(tmp_path, b"")
    with pytest.raises(SAMLError, match="1 bytes follow"):
        read(tmp_path, content + b"\0")
    for cut in [*header[::7], len(content) - 1]:
        if cut:
            with pytest.raises(SAMLError):
                read(tmp_path, content[:cut])


def test_a_lie_about_size_costs_no_memory(tmp_path: Path) -> None:
    file = small_whisper()
    change(BETA, Stored(0, (2**30 - 1,), b"", 2**32 - 4))(file)
    content = file.write()[0]
    (tmp_path / "model.bin").write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(SAMLError, match="after the file"):
            CTranslate2Whisper([tmp_path / "model.bin"])
        assert tracemalloc.get_traced_memory()[1] < 200_000 < len(content)
    finally:
        tracemalloc.stop()


WHOLE = {dtype: small_whisper(dtype).write() for dtype in ("float16", "int8")}


@given(
    dtype=st.sampled_from(sorted(WHOLE)),
    edits=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.none() | st.integers(0, 10**6),
)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_damaged_headers_only_ever_raise_saml_error(
    tmp_path: Path, dtype: str, edits: list[tuple[int, int]], cut: int | None
) -> None:
    """Whatever is overwritten: a clear error or a model, and memory bounded by the file's size."""
    whole, header = WHOLE[dtype]
    content = bytearray(whole)
    for place, value in edits:
        content[header[place % len(header)]] = value
    if cut is not None:
        del content[cut % len(content) :]
    path = tmp_path / "model.bin"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        for _name, _array in CTranslate2Whisper([path]).tensors():
            pass
    except SAMLError as error:
        assert "\n" not in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4 * len(whole) + 2**20
