"""In which precision a model learns, by its device."""

from __future__ import annotations

import pytest
import torch

from saml_models.runtime.devices import mixed_precision


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp16"), ((8, 0), "bf16")])
def test_cards_that_emulate_bfloat16_learn_in_float16(
    capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Properties:
        major, minor = capability

    for name, fake in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_properties": lambda device=None: Properties,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert mixed_precision(torch.device("cuda")) == expected
