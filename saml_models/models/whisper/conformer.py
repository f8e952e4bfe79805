"""`ConformerWhisper`: Whisper whose encoder blocks are Conformer blocks (arXiv 2005.08100).

A half-step feed-forward comes before a block's attention and a convolution module after it;
Whisper's own feed-forward follows, its residual unscaled as it was trained. The last layer of each
new branch starts at zero, so that a model grown from a Whisper gives its logits bit for bit.
Decoder, tokeniser and features are Whisper's.

The norm after the depthwise convolution is over a frame's channels (LayerNorm), not the paper's
batch norm: a frame's value then depends on no other clip and on no padding, and there are no
statistics that a frozen or a low-bit encoder would have to keep.

Importing this module tells transformers' Auto classes of the model.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
    WhisperConfig,
    WhisperForConditionalGeneration,
    WhisperProcessor,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.models.whisper.modeling_whisper import (
    WhisperEncoder,
    WhisperEncoderLayer,
    sinusoids,
)

from saml_kernels.errors import SAMLError
from saml_models.data.audio import MAX_SECONDS

__all__ = [
    "ConformerWhisper",
    "ConformerWhisperConfig",
    "ConformerWhisperLayer",
    "new_branches",
    "scale_branches",
    "without_branches",
]

KERNEL = 31  # frames of 20 ms, as many as the paper's
LARGEST_KERNEL, LARGEST_WIDTH = 255, 65536
ZERO = "zero_at_first"  # marks layers
NEW = ("half_step", "conv_module")  # what a block has beside Whisper's


@strict
class ConformerWhisperConfig(WhisperConfig):
    """Whisper's configuration and the sizes of the new branches.

    Attributes:
        conv_kernel_size: frames that the depthwise convolution sees, an odd number.
        half_step_ffn_dim: width within the half-step feed-forward; None is `encoder_ffn_dim`.
        window_margin: seconds of silence after a clip in which the model has learnt to hear it;
            None is Whisper's whole window.
    """

    model_type = "conformer_whisper"

    conv_kernel_size: int = KERNEL
    half_step_ffn_dim: int | None = None
    window_margin: float | None = None

    def __post_init__(self, **kwargs: Any) -> None:  # noqa: D105
        super().__post_init__(**kwargs)
        kernel, width = self.conv_kernel_size, self.half_step_ffn_dim
        if kernel % 2 == 0 or not 1 <= kernel <= LARGEST_KERNEL:
            raise SAMLError(
                f"conv_kernel_size: {kernel}; expected an odd number up to {LARGEST_KERNEL}"
            )
        if width is not None and not 1 <= width <= LARGEST_WIDTH:
            raise SAMLError(f"half_step_ffn_dim: {width}; expected 1 to {LARGEST_WIDTH}, or None")
        margin = self.window_margin
        if margin is not None and not 0 <= margin <= MAX_SECONDS:
            raise SAMLError(f"window_margin: {margin} s; expected 0 to {MAX_SECONDS}, or None")


def _zero_at_first(layer: nn.Linear) -> nn.Linear:
    setattr(layer, ZERO, True)
    return layer


class HalfStep(nn.Module):
    """x + FFN(x) / 2: [B, T, d] -> [B, T, d]."""

    def __init__(self, config: ConformerWhisperConfig) -> None:
        super().__init__()
        width = config.half_step_ffn_dim or config.encoder_ffn_dim
        self.layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, width)
        self.fc2 = _zero_at_first(nn.Linear(width, config.d_model))
        self.activation_fn = ACT2FN[config.activation_function]
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout

    def forward(self, x: Tensor) -> Tensor:
        inner = self.activation_fn(self.fc1(self.layer_norm(x)))
        inner = F.dropout(inner, self.activation_dropout, self.training)
        return x + 0.5 * F.dropout(self.fc2(inner), self.dropout, self.training)


class ConvModule(nn.Module):
    """x + convolution module of x: [B, T, d] -> [B, T, d].

    The pointwise convolutions are linear layers of each frame.
    """

    def __init__(self, config: ConformerWhisperConfig) -> None:
        super().__init__()
        width, kernel = config.d_model, config.conv_kernel_size
        self.layer_norm = nn.LayerNorm(width)
        self.pointwise_in = nn.Linear(width, 2 * width)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.depthwise_norm = nn.LayerNorm(width)
        self.pointwise_out = _zero_at_first(nn.Linear(width, width))
        self.dropout = config.dropout

    def mixed(self, x: Tensor) -> Tensor:
        """What `pointwise_in` puts out, [B, T, 2 d] -> what `pointwise_out` is given, [B, T, d]."""
        frames = self.depthwise(F.glu(x, dim=-1).transpose(1, 2)).transpose(1, 2)
        return F.silu(self.depthwise_norm(frames))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.pointwise_out(self.mixed(self.pointwise_in(self.layer_norm(x))))
        return x + F.dropout(inner, self.dropout, self.training)


class ConformerWhisperLayer(WhisperEncoderLayer):
    """One block: half-step feed-forward, attention, convolution module, Whisper's feed-forward."""

    def __init__(self, config: ConformerWhisperConfig) -> None:
        super().__init__(config)
        self.half_step = HalfStep(config)
        self.conv_module = ConvModule(config)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor, **kwargs: Any) -> Tensor:
        """hidden_states [B, T, d] -> [B, T, d]; the mask as `WhisperAttention` takes it."""
        x = self.half_step(hidden_states)
        attended, _ = self.self_attn(
            hidden_states=self.self_attn_layer_norm(x), attention_mask=attention_mask, **kwargs
        )
        x = self.conv_module(x + F.dropout(attended, self.dropout, self.training))
        inner = self.activation_fn(self.fc1(self.final_layer_norm(x)))
        inner = F.dropout(inner, self.activation_dropout, self.training)
        x = x + F.dropout(self.fc2(inner), self.dropout, self.training)
        if x.dtype == torch.float16:  # as Whisper's: what overflows would be NaN from here on
            largest = torch.finfo(torch.float16).max - 1000
            x = x.clamp(-largest, largest)
        return x


class ConformerWhisperEncoder(WhisperEncoder):
    """Whisper's encoder with Conformer blocks: features [B, mel bins, 2 T] -> [B, T, d]."""

    config: ConformerWhisperConfig
    _no_split_modules: list[str] = ["ConformerWhisperLayer"]  # noqa: RUF012 (as its base has it)

    def __init__(self, config: ConformerWhisperConfig) -> None:
        super().__init__(config)
        layers = (ConformerWhisperLayer(config) for _ in range(config.encoder_layers))
        self.layers = nn.ModuleList(layers)
        self.post_init()

    def _init_weights(self, module: Any) -> None:
        # transformers asks for layers with parameters alone where a class is not its own.
        super()._init_weights(module)
        if getattr(module, ZERO, False):
            init.zeros_(module.weight)
        elif module is self.embed_positions:
            init.copy_(module.weight, sinusoids(*module.weight.shape))


class ConformerWhisper(WhisperForConditionalGeneration):
    """Whisper with Conformer blocks in its encoder; `generate` and all else as Whisper's."""

    config_class = ConformerWhisperConfig
    config: ConformerWhisperConfig

    def __init__(self, config: ConformerWhisperConfig) -> None:
        super().__init__(config)
        self.model.encoder = ConformerWhisperEncoder(config)
        self.post_init()

    @classmethod
    def grown_from(
        cls, whisper: WhisperForConditionalGeneration, **own: float | None
    ) -> ConformerWhisper:
        """A copy of a Whisper with new branches, whose logits are the Whisper's bit for bit.

        Args:
            whisper: at full precision; left as it is.
            own: values of `ConformerWhisperConfig` that Whisper's has not.

        Raises:
            SAMLError: the Whisper has low-bit weights, or Conformer blocks already.
        """
        kind = type(whisper).__name__
        if isinstance(whisper, cls) or hasattr(whisper, "saml"):
            raise SAMLError(f"{kind}: a Conformer grows from a Whisper at full precision")
        values: dict[str, Any] = whisper.config.to_dict() | own
        for key in ("model_type", "architectures", "transformers_version"):
            values.pop(key, None)
        model: Any = cls(ConformerWhisperConfig(**values))
        missing, unexpected = model.load_state_dict(whisper.state_dict(), strict=False)
        if unexpected or set(missing) - set(new_branches(model)):
            raise SAMLError(f"{kind}: its weights are not those of its configuration")
        model.generation_config = copy.deepcopy(whisper.generation_config)
        parameter = next(whisper.parameters())
        return model.to(parameter.device, parameter.dtype).train(whisper.training)

    def _prepare_decoder_input_ids_for_generation(
        self, batch_size: int, model_input_name: str, model_kwargs: Any, *rest: Any, **more: Any
    ) -> Any:
        # transformers asks the model's type before it lets a prompt begin with <|startofprev|>.
        given = model_kwargs.pop("decoder_input_ids", None)
        if given is not None:
            return given, model_kwargs
        prepare = cast(Any, super())._prepare_decoder_input_ids_for_generation
        return prepare(batch_size, model_input_name, model_kwargs, *rest, **more)


@torch.no_grad()
def scale_branches(model: nn.Module, share: float) -> None:
    """Have the new branches add only this share of what they do; a Whisper has none."""
    for module in model.modules():
        if getattr(module, ZERO, False):
            own: Any = module
            own.weight.mul_(share)
            own.bias.mul_(share)


def without_branches(model: ConformerWhisper) -> ConformerWhisper:
    """A copy at full precision whose new branches add nothing, as at the start."""
    bare = copy.deepcopy(model)
    scale_branches(bare, 0.0)
    return bare


def new_branches(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that Whisper's encoder has not, by name; none of a Whisper."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(part in NEW for part in name.split("."))
    }


AutoConfig.register(ConformerWhisperConfig.model_type, ConformerWhisperConfig, exist_ok=True)
AutoModelForSpeechSeq2Seq.register(ConformerWhisperConfig, ConformerWhisper, exist_ok=True)
AutoProcessor.register(ConformerWhisperConfig, WhisperProcessor, exist_ok=True)
