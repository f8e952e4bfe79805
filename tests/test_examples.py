"""The examples in public docstrings are run."""

from __future__ import annotations

import doctest
from importlib import import_module

import numpy as np
import pytest
import torch

import saml_kernels
import saml_models
from saml_models.data.corpora import utterances_of
from saml_models.speakers.pretrained import load_adaptable
from saml_models.training.options import TrainingOptions

# What examples use without importing it.
GIVEN = {"np": np, "torch": torch, "nn": torch.nn, "quantize": saml_kernels.quantize}
GIVEN |= {"SAMLConfig": saml_kernels.SAMLConfig}
PUBLIC = [
    ("saml_kernels.quantization.tensor", "quantize"),
    ("saml_kernels.ops.api", "saml_linear"),
    ("saml_kernels.ops.api", "saml_linear_routed"),
    ("saml_kernels.backends.registry", "available_backends"),
    ("saml_kernels.layers.linear", "SAMLLinear"),
    ("saml_kernels.layers.embedding", "SAMLEmbedding"),
    *((f"saml_models.{home}", name) for name, home in saml_models._MODULES.items()),
]


@pytest.mark.parametrize(("module", "name"), PUBLIC, ids=[name for _, name in PUBLIC])
def test_examples(module: str, name: str) -> None:
    """Each public function has one (a class: one of its methods), and gives what it says."""
    if name in ("load_conformer", "SpeakerProfile", "Recogniser"):
        pytest.skip("needs a checkpoint or somebody's speech; tested elsewhere")
    public = getattr(import_module(module), name)
    given = GIVEN | {"load_whisper": saml_models.load_whisper}
    if name == "adapt":
        given |= {"load_adaptable": load_adaptable, "utterances_of": utterances_of}
        given["TrainingOptions"] = TrainingOptions
    examples = [e for e in doctest.DocTestFinder().find(public, name, globs=given) if e.examples]
    assert examples, f"{name}: has no example"
    for example in examples:
        example.globs[name] = public
        assert doctest.DocTestRunner().run(example).failed == 0, example.name
