"""What a sidecar tells Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

__all__ = ["SidecarMetrics"]

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_OWN_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1)
_JUMPS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class SidecarMetrics:
    """All metrics of one sidecar, in a registry of their own. Tenants are no label: they must not see each other."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests by what became of them.", ("route", "outcome"))
        self.in_flight = self._gauge("inflight", "Requests under way.")
        self.ttft = self._histogram("ttft_seconds", "From arrival to the first byte of the answer.", _SECONDS)
        self.e2e = self._histogram("e2e_seconds", "From arrival to the last byte of the answer.", _SECONDS)
        self.overhead = self._histogram("overhead_seconds", "Before a request is passed on.", _OWN_SECONDS)
        self.errors = self._counter("upstream_errors", "Answers of the upstream with status 400 and above.", ("code",))
        self.retries = self._counter("upstream_retries", "Requests that were sent again.")
        self.circuit = self._gauge("circuit_state", "0 closed, 1 half-open, 2 open.")
        self.learned = self._counter("learned_tokens", "Tokens taken into the store.")
        self.learn_dropped = self._counter("learn_dropped", "Answers that were not learned: the queue was full.")
        self.shadow = self._counter("shadow_saved_seconds", "What a protocol would have saved.", ("proto",))
        self.drafts = self._counter("draft_tokens", "Draft tokens tried.")
        self.accepted = self._counter("accepted_tokens", "Draft tokens that the upstream produced itself.")
        self.attempts = self._counter("attempts", "Branches and verifications.", ("proto", "result"))
        self.jumps = self._histogram("jump_tokens", "Tokens that were ready when a branch was adopted.", _JUMPS)
        self.saved = self._counter("saved_seconds", "Estimated time saved.")
        self.wasted = self._counter("wasted_upstream_tokens", "Upstream work that no client saw.", ("kind",))
        self.exhausted = self._counter("budget_exhausted", "Drafts that the budget forbade.")
        self.cache_hits = self._counter("cache_hits", "Answers from the exact-repeat cache.")
        self.releases = self._counter("shape_releases", "Releases of streams at a steady pace.")
        self.starved = self._counter("shape_starved_ticks", "Ticks for which too few tokens were there: visible.")
        self.audits = self._counter("audit", "Accelerated requests compared with plain ones.", ("result",))

    def _counter(self, name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
        return Counter(f"sidecar_{name}", text, labels, registry=self._registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"sidecar_{name}", text, registry=self._registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"sidecar_{name}", text, buckets=buckets, registry=self._registry)

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
