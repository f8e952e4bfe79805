"""Counters for Prometheus: requests, and what the engine has done."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from saml_models.server.engine import Engine

__all__ = ["Metrics"]

BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """What `/metrics` shows; of one application."""

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_OfEngine(engine))
        self._seconds = Histogram(
            "saml_request_seconds",
            "Seconds from a request to the end of its answer.",
            ["route", "status"],
            registry=self._registry,
            buckets=BUCKETS,
        )

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def middleware(self, app: Any) -> Callable[..., Awaitable[None]]:
        """ASGI middleware that times requests, by route: paths would be without number."""

        async def timed(scope: dict[str, Any], receive: Any, send: Any) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            began, status = time.monotonic(), 500

            async def noted(message: dict[str, Any]) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, noted)
            finally:
                route = getattr(scope.get("route"), "path", "none")
                self._seconds.labels(route, str(status)).observe(time.monotonic() - began)

        return timed


class _OfEngine(Collector):
    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def collect(self) -> Iterator[Any]:
        """The engine's counts now."""
        counts = self.engine.counts
        yield GaugeMetricFamily(
            "saml_waiting", "Recordings taken and not done.", value=self.engine.waiting
        )
        for name, about, value in (
            ("saml_recordings", "Recordings transcribed.", counts.recordings),
            ("saml_failed", "Recordings that could not be transcribed.", counts.failed),
            ("saml_cancelled", "Recordings whose client left.", counts.cancelled),
            ("saml_batches", "Batches decoded.", counts.batches),
            ("saml_pieces", "Clips and windows decoded.", counts.pieces),
            ("saml_audio_seconds", "Seconds of speech transcribed.", counts.audio),
            ("saml_busy_seconds", "Seconds in which the model was at work.", counts.busy),
        ):
            yield CounterMetricFamily(name, about, value=value)
