"""Parts of an evaluation in a file: a killed run goes on with those that it has not done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saml_kernels.errors import SAMLError
from saml_kernels.files import read_json, write_json
from saml_models.compress.layers import compression_of
from saml_models.training.options import TrainingOptions

__all__ = ["Parts", "run_of"]


class Parts:
    """What is found of each part, by its name, as JSON.

    Args:
        file: where it is kept; None keeps nothing.
        run: says what the parts follow from; called where there is a file.

    Raises:
        SAMLError: the file is of another run, or damaged.
    """

    def __init__(self, file: Path | None, run: Callable[[], str]) -> None:
        self.file = file
        self.about: dict[str, Any] = {} if file is None else {"run": run()}
        self.known: dict[str, Any] = {}
        if file is None or not file.exists():
            return
        found = read_json(file)
        if found.get("run") != self.about["run"]:
            raise SAMLError(
                f"{file}: belongs to an evaluation with other data, options or experts; repeat "
                "those, or remove the file to start anew"
            )
        if not isinstance(found.get("parts"), dict):
            raise SAMLError(f"{file}: a damaged checkpoint; remove it to start anew")
        self.known = found["parts"]

    def part(
        self, name: str, make: Callable[[], Any], known: Callable[[Any], None] | None = None
    ) -> Any:
        """What was found of a part, or what `make` finds now, which is written at once.

        `known` is called with what an earlier run found.
        """
        if name not in self.known:
            self.known[name] = make()
            if self.file is not None:
                write_json(self.file, self.about | {"parts": self.known})
        elif known is not None:
            known(self.known[name])
        return self.known[name]


def run_of(
    models: Sequence[Any], folds: Sequence[Any], options: TrainingOptions | None, **settings: Any
) -> str:
    """SHA-256 (hex) of all that an evaluation follows from.

    Args:
        models: those with SAML layers.
        folds: of the protocol, in order.
        options: of the adaptation.
        settings: others.
    """
    made_for = [(compression_of(m).weight_hash(), compression_of(m).experts_hash()) for m in models]
    speech = [
        [
            fold.speaker,
            *([(u.id, u.text) for u in own] for own in (fold.train, fold.test, fold.choose)),
        ]
        for fold in folds
    ]
    own = None if options is None else asdict(options)
    run = json.dumps([made_for, speech, own, settings], sort_keys=True, default=str)
    return hashlib.sha256(run.encode()).hexdigest()
