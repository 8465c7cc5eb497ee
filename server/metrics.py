"""Prometheus metrics of a server, under the names that vLLM uses, so that its tools read them unchanged.

Counters of the engine are sums that its thread keeps anyway; they are read when somebody scrapes.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from specdec.errors import ConfigError
from specdec.server.online import Online
from specdec.server.worker import EngineWorker

__all__ = ["ServerMetrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_LABELS = ("model_name", "engine")


class _EngineCollector(Collector):
    """Turns the worker's sums into metric families at scrape time."""

    def __init__(self, prefix: str, model: str, worker: EngineWorker, drafter: str, online: Online) -> None:
        self._prefix, self._worker, self._online = prefix, worker, online
        self._values = (model, "0")
        self._drafter = drafter

    def collect(self) -> Iterator[Metric]:
        totals = self._worker.totals
        yield self._counter("spec_decode_num_drafts", "Steps that drafted.", totals.num_drafts)
        yield self._counter("spec_decode_num_draft_tokens", "Draft tokens.", totals.num_draft_tokens)
        yield self._counter("spec_decode_num_accepted_tokens", "Accepted draft tokens.", totals.num_accepted_tokens)
        at = CounterMetricFamily(
            f"{self._prefix}spec_decode_num_accepted_tokens_per_pos",
            "Accepted draft tokens by their place in the draft.",
            labels=(*_LABELS, "position"),
        )
        for position, count in sorted(totals.accepted_at.copy().items()):
            at.add_metric((*self._values, str(position)), count)
        yield at
        prefixes = self._worker.prefix_totals
        yield self._counter("prefix_cache_queries", "Prompt tokens looked up.", prefixes.num_queried)
        yield self._counter("prefix_cache_hits", "Prompt tokens that were cached.", prefixes.num_recalled)
        yield self._counter("generation_tokens", "Tokens emitted.", totals.num_emitted_tokens)
        yield self._counter("engine_steps", "Steps of the engine.", totals.num_steps)
        parts = CounterMetricFamily(
            f"{self._prefix}engine_step_seconds", "Time of steps by part.", labels=(*_LABELS, "part")
        )
        for name, seconds in totals.seconds.items():
            parts.add_metric((*self._values, name), seconds)
        yield parts
        running, waiting = self._worker.load
        yield self._gauge("num_requests_running", "Requests in the batch.", running)
        yield self._gauge("num_requests_waiting", "Requests that wait for room.", waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV pool in use, 0 to 1.", self._worker.kv_usage)
        labels = (*_LABELS, "drafter", "drafter_version")
        drafter = GaugeMetricFamily(f"{self._prefix}drafter_info", "The default drafter.", labels=labels)
        versioned = self._online.versioned
        drafter.add_metric((*self._values, self._drafter, str(versioned.version_in("current") if versioned else 0)), 1)
        yield drafter
        yield from self._learning()

    def _learning(self) -> Iterator[Metric]:
        """What drafters that learn did, by version, and what became of captured requests."""
        online = self._online
        if online.versioned is not None:
            counts = dict(online.versioned.counts)
            texts = {
                "num_rounds": "Steps that drafted",
                "num_drafted": "Draft tokens",
                "num_accepted": "Accepted tokens",
            }
            for name, text in texts.items():
                family = CounterMetricFamily(
                    f"{self._prefix}drafter_version_{name.removeprefix('num_')}", f"{text}, by version of the drafter.",
                    labels=(*_LABELS, "drafter_version"),
                )  # fmt: skip
                for version, done in counts.items():
                    family.add_metric((*self._values, str(version)), getattr(done, name))
                yield family
            yield self._counter("drafter_swaps", "Times that weights were swapped.", online.versioned.num_swaps)
        if online.capture is not None:
            family = CounterMetricFamily(
                f"{self._prefix}captured_requests", "Requests by what the capture did.", labels=(*_LABELS, "outcome")
            )
            for outcome, count in dict(online.capture.counts).items():
                family.add_metric((*self._values, outcome.replace(" ", "_")), count)
            yield family

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(self._prefix + name, text, labels=_LABELS)
        family.add_metric(self._values, value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(self._prefix + name, text, labels=_LABELS)
        family.add_metric(self._values, value)
        return family


class ServerMetrics:
    """All metrics of one server, in a registry of their own.

    Args:
        worker: whose engine is counted.
        model: value of the label ``model_name``.
        drafter: the default drafter.
        prefix: of all names, ``vllm:`` for tools that expect vLLM.
        online: its versions and captures are counted too.

    Raises:
        ConfigError: the prefix is no beginning of a metric's name.
    """

    def __init__(
        self,
        worker: EngineWorker,
        *,
        model: str,
        drafter: str,
        prefix: str = "specdec:",
        online: Online | None = None,
    ) -> None:
        if not prefix.replace(":", "").replace("_", "").isalnum():
            raise ConfigError(f"metrics_prefix must be letters, digits, _ and :, got {prefix!r}")
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(prefix, model, worker, drafter, online or Online()))
        self._values = (model, "0")
        self._ttft = self._histogram(f"{prefix}time_to_first_token_seconds", "Until the first token.")
        self._tpot = self._histogram(f"{prefix}time_per_output_token_seconds", "Per token after the first.")
        self._e2e = self._histogram(f"{prefix}e2e_request_latency_seconds", "Whole requests.")
        self._done = Counter(
            f"{prefix}request_success", "Finished choices.", (*_LABELS, "finished_reason"), registry=self._registry
        )
        self._refused = Counter(
            f"{prefix}request_refused", "Requests not served, by HTTP status.", (*_LABELS, "status"),
            registry=self._registry,
        )  # fmt: skip
        self._prompt = Counter(f"{prefix}prompt_tokens", "Prompt tokens.", _LABELS, registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, _LABELS, buckets=_SECONDS, registry=self._registry)

    def finished(
        self, *, reason: str, num_prompt_tokens: int, num_new_tokens: int, first_s: float | None, total_s: float
    ) -> None:
        """Count one finished choice; times in seconds from the arrival of its request."""
        self._done.labels(*self._values, reason).inc()
        self._prompt.labels(*self._values).inc(num_prompt_tokens)
        self._e2e.labels(*self._values).observe(total_s)
        if first_s is not None:
            self._ttft.labels(*self._values).observe(first_s)
            if num_new_tokens > 1:
                self._tpot.labels(*self._values).observe((total_s - first_s) / (num_new_tokens - 1))

    def refused(self, status: int) -> None:
        """Count a request that was answered with an error."""
        self._refused.labels(*self._values, str(status)).inc()

    def render(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)
