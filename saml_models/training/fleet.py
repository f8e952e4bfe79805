"""Many speakers, each by itself: in turn on this machine, or in parallel with Ray.

A speaker whose profile is enrolled already, from the same clips and options, is left alone, and one
whose training was cut off goes on at its checkpoint: to resume, run the same command again. What
fails is written down and does not stop the others.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from saml_kernels.errors import SAMLError, needs, one_line
from saml_models.data.corpora import Utterance, by_speaker
from saml_models.speakers.pretrained import load_adaptable, pretrained_experts
from saml_models.speakers.store import ProfileStore, check_name
from saml_models.training.adapt import adapt, options_for
from saml_models.training.checkpoint import forget
from saml_models.training.options import TrainingOptions
from saml_models.training.pseudo_labels import adapt_unsupervised

__all__ = ["Job", "Outcome", "adapt_fleet", "make_jobs"]

ATTEMPTS = 2  # more, for a worker that dies


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know about one speaker."""

    speaker: str
    utterances: tuple[Utterance, ...]
    model: str
    experts: str | None
    device: str
    store: str
    kind: str
    options: TrainingOptions | None
    changes: dict[str, Any]
    unsupervised: bool
    guard: bool = True

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the clips, their texts and how they are learnt from."""
        clips = [
            (u.id, str(u.audio), _size(u.audio), u.start, u.end, u.text) for u in self.utterances
        ]
        start = self.experts and pretrained_experts(self.model, self.experts).hash
        options = self.options and asdict(self.options)
        how = [self.model, start, self.kind, options, self.changes, self.unsupervised, self.guard]
        return hashlib.sha256(json.dumps([clips, how]).encode()).hexdigest()


@dataclass(frozen=True)
class Outcome:
    """What became of a speaker: "adapted", "unadapted" (the guard's), "there already" or "failed".

    `reason` is one line where it failed; `seconds` of wall-clock time.
    """

    speaker: str
    status: str
    reason: str = ""
    seconds: float = 0.0


def make_jobs(
    utterances: Sequence[Utterance],
    model: str,
    store: ProfileStore,
    *,
    kind: str = "experts",
    options: TrainingOptions | None = None,
    changes: Mapping[str, Any] | None = None,
    experts: str | None = None,
    device: str = "cpu",
    unsupervised: bool = False,
    guard: bool = True,
) -> list[Job]:
    """One job for each speaker of a manifest, in order of appearance; paths become absolute.

    Args:
        utterances, model, store, experts, device, unsupervised, guard: see `Job`.
        kind: of the profiles.
        options: `adaptation.options_for` the model unless given.
        changes: to those, by field.

    Raises:
        SAMLError: an unknown kind.
    """
    options_for(kind)
    model, experts = _absolute(model), experts and _absolute(experts)
    return [
        Job(
            speaker, tuple(replace(u, audio=u.audio.absolute()) for u in found), model, experts,
            device, str(store.folder.resolve()), kind, options, dict(changes or {}), unsupervised,
            guard,
        )
        for speaker, found in by_speaker(utterances).items()
    ]  # fmt: skip


def _absolute(name: str) -> str:
    """Of a file or folder; what is none is a model's name."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def adapt_fleet(
    jobs: Sequence[Job],
    ray: bool = False,
    on_done: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Adapt to every speaker; profiles are enrolled in the jobs' store.

    Args:
        jobs: from `make_jobs`.
        ray: in parallel, one core for each worker; `ray.init` is called where it was not, and finds
            a cluster by $RAY_ADDRESS. All machines must see the audio and the store's folder.
        on_done: called with each outcome as it comes.

    Returns:
        Outcomes in the order of the jobs.

    Raises:
        SAMLError: Ray is not installed.
    """
    done = on_done or (lambda outcome: None)
    if ray:
        return _with_ray(jobs, done)
    outcomes = []
    for job in jobs:
        outcomes.append(run(job))
        done(outcomes[-1])
    return outcomes


def run(job: Job) -> Outcome:
    """One speaker, in this process; nothing but an interrupt gets out."""
    started = time.monotonic()
    try:
        status, reason = _run(job), ""
    except Exception as error:  # whatever it is, the next speaker's turn comes
        said = " ".join(str(error).split())
        status, reason = "failed", said if isinstance(error, SAMLError) else f"{error!r}"
    return Outcome(job.speaker, status, reason, round(time.monotonic() - started, 1))


def _run(job: Job) -> str:
    check_name(job.speaker)
    store = ProfileStore(job.store)
    model, processor = _loaded(job.model, job.experts, job.device)
    try:
        found = store.load(job.speaker)
        found.check(model)
        if found.about.get("job") == job.fingerprint:
            return "there already"
    except SAMLError:
        pass  # not there, damaged, or another model's: it is made
    options = replace(job.options or options_for(job.kind, model), **job.changes)
    checkpoint = Path(job.store) / ".progress" / f"{job.speaker}.safetensors"
    do = adapt_unsupervised if job.unsupervised else adapt
    profile = do(
        model, processor, job.utterances, options, speaker=job.speaker, kind=job.kind,
        guard=job.guard, checkpoint=checkpoint,
    )  # fmt: skip
    store.save(replace(profile, about=profile.about | {"job": job.fingerprint}), job.speaker)
    forget(checkpoint)
    return "adapted" if profile.about.get("adapted", True) else "unadapted"


@functools.lru_cache(maxsize=1)
def _loaded(model: str, experts: str | None, device: str) -> tuple[Any, Any]:
    """Once in a worker's life: adaptation leaves the model as it was."""
    return load_adaptable(model, experts=experts, device=device)


def _with_ray(jobs: Sequence[Job], done: Callable[[Outcome], None]) -> list[Outcome]:
    with needs("--ray", "ray"):
        import ray
    ours = not ray.is_initialized()
    if ours:
        ray.init(log_to_driver=False)
    try:
        graphics = 1 if any(job.device.startswith("cuda") for job in jobs) else 0
        # A worker that dies is replaced, and the checkpoint says where it was.
        remote = ray.remote(num_cpus=1, num_gpus=graphics, max_retries=ATTEMPTS)(run)
        waiting = {remote.remote(job): i for i, job in enumerate(jobs)}
        outcomes: dict[int, Outcome] = {}
        while waiting:
            (ready,), _ = ray.wait(list(waiting), num_returns=1)
            i = waiting.pop(ready)
            try:
                outcomes[i] = ray.get(ready)
            except Exception as error:  # the worker is gone for good
                reason = one_line(error)
                outcomes[i] = Outcome(jobs[i].speaker, "failed", reason)
            done(outcomes[i])
        return [outcomes[i] for i in range(len(jobs))]
    finally:
        if ours:
            ray.shutdown()
