"""How well `--speaker auto` tells speakers apart.

    python -m bench identification --data DATA

Each of 26 speakers (six readers of train-clean-5, six of test-other, fourteen of speechocean762) is
enrolled with five clips and heard on five others. Prints how many clips find their own speaker as
the nearest, and, at `THRESHOLD`, how many are turned away and how often the nearest of the other
speakers, who stands for a stranger's choice, would be taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from bench.accuracy.speech import development_speech
from saml_models.data.corpora import by_speaker
from saml_models.models.registry import bind
from saml_models.runtime.quiet import quiet_libraries
from saml_models.speakers.identify import THRESHOLD, distance, embed
from saml_models.speakers.pretrained import load_adaptable

CLIPS = 5


def main(
    data: Annotated[Path, typer.Option(help="Holds LibriSpeech/ and speechocean762/.")],
    model: Annotated[str, typer.Option()] = "tiny.en",
) -> None:
    quiet_libraries()
    network, processor = load_adaptable(model)
    found = by_speaker([u for part in development_speech(data).values() for u in part])
    clips = {name: [u.load() for u in said[: 2 * CLIPS]] for name, said in found.items()}
    enrolled = {
        name: embed(bind(network, processor), heard[:CLIPS]) for name, heard in clips.items()
    }
    own, others, right = [], [], []
    for name, heard in clips.items():
        for clip in heard[CLIPS:]:
            sound = embed(bind(network, processor), [clip])
            distances = {who: distance(sound, known) for who, known in enrolled.items()}
            mine = distances.pop(name)
            own.append(mine)
            others.append(min(distances.values()))
            right.append(mine < others[-1])
    away = 100 * np.mean(np.array(own) > THRESHOLD)
    taken = 100 * np.mean(np.array(others) <= THRESHOLD)
    print(
        f"{len(enrolled)} speakers, {len(own)} clips: the nearest is the right one for "
        f"{100 * np.mean(right):.1f} %; at {THRESHOLD} {away:.1f} % are turned away, and "
        f"{taken:.1f} % of strangers taken for one of {len(enrolled) - 1} enrolled"
    )
