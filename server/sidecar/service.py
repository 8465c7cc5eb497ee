"""What a sidecar does with a generation beyond relaying it, and everything that lasts longer than a request."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import aiohttp
from multidict import CIMultiDict

from specdec.errors import ConfigError
from specdec.server.sidecar.audit import Case, audit
from specdec.server.sidecar.corpora import CorpusFeeder
from specdec.server.sidecar.drafting import Drafting, Shop
from specdec.server.sidecar.events import Framing, with_fields
from specdec.server.sidecar.exact_cache import CachedAnswer, ExactCache
from specdec.server.sidecar.feed import Feeder, FeedKind
from specdec.server.sidecar.gates import Budget, BudgetOptions, LoadGate
from specdec.server.sidecar.learner import Learner, Passed
from specdec.server.sidecar.metrics import SidecarMetrics
from specdec.server.sidecar.pace import Pace, PaceOptions
from specdec.server.sidecar.plan import PlanOptions, Timing
from specdec.server.sidecar.probe import Capabilities, probe
from specdec.server.sidecar.requests import Asked, continuable, privacy_of, read_request, tenant_of
from specdec.server.sidecar.speed import HttpOpener, Run
from specdec.server.sidecar.tokens import Tokens, load_tokens
from specdec.server.sidecar.upstream import Question, Unreachable, Upstream
from specdec.server.sidecar.whole import WholeShape
from specdec.suffix_tree.cache import SuffixCache

logger = logging.getLogger(__name__)

__all__ = ["BudgetOptions", "Job", "Mode", "PaceOptions", "PlanOptions", "Speed", "SpeedOptions", "load_tokens"]

Mode = Literal["off", "observe", "feed", "race", "grid", "rounds"]
_FULL = ("race", "grid", "rounds")
_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class SpeedOptions:
    """What may be done beyond relaying.

    Args:
        mode: off, observe (learn and estimate), feed (send drafts along), race (one branch), grid (several) or rounds
            (greedy drafts verified by the upstream's scores).
        plan: of branches; a race has one, whatever it says.
        budget: of extra tokens.
        is_single_tenant: all clients share one store; else each key has its own, and requests without one have none.
        secret: keys the tenants' hashes; made anew at each start if empty.
        cache_ttl_s: of the exact-repeat cache; 0: off.
        max_bytes: of each tenant's store.
        ttl_s: seconds that learned text is kept.
        kind: of the upstream, if it is known.
        probe_key: bearer token of the probe's own requests; never written anywhere.
        feed: how the upstream takes drafts; None: as the probe finds.
        audit_share: of the accelerated greedy requests that are asked again, plainly and twice.
        has_cache_salt: the tenant's hash goes along as ``cache_salt``, so that no tenant meets another's KV upstream.
        pace: at which accelerated streams leave; None: as they come.
    """

    mode: Mode = "observe"
    plan: PlanOptions = field(default_factory=PlanOptions)
    budget: BudgetOptions = field(default_factory=BudgetOptions)
    is_single_tenant: bool = False
    secret: bytes = field(default=b"", repr=False)
    cache_ttl_s: float = 0.0
    max_bytes: int = 256 << 20
    ttl_s: float | None = 86400.0
    kind: str | None = None
    probe_key: str | None = field(default=None, repr=False)
    has_cache_salt: bool = False
    feed: FeedKind | None = None
    audit_share: float = 0.0
    pace: PaceOptions | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise ConfigError(f"mode must be one of {', '.join(get_args(Mode))}, got {self.mode!r}")
        if not 0 <= self.audit_share <= 1:
            raise ConfigError(f"audit_share must be in [0, 1], got {self.audit_share}")
        if self.feed == "sglang-corpus" and not self.is_single_tenant:
            raise ConfigError("feed sglang-corpus shows all clients' text in all clients' speed: it needs one tenant")
        if self.mode == "grid" and self.plan.max_branches < 2:
            raise ConfigError(f"a grid needs at least 2 branches, got {self.plan.max_branches}")
        if self.pace is not None and self.mode not in _FULL:
            raise ConfigError(f"shaping paces what {', '.join(_FULL)} accelerate; mode {self.mode} has no such streams")
        if self.pace is not None and self.cache_ttl_s > 0:
            raise ConfigError("shaping cannot hide the exact-repeat cache, which answers at once: give one of the two")


@dataclass(slots=True)
class Job:
    """What to do with one request.

    Args:
        question: as it goes upstream.
        run: accelerates it, if it may be.
        cached: the answer, if it is known.
        passed: takes a copy of the answer, if it is to be learned: everything but its body.
        cache_key: where the answer may be kept.
        case: to be audited afterwards, but for the output.
        fed: the tenant whose draft went along.
        shape: the client wants an answer that is not streamed, in this shape.
        plain: the question as the client wrote it, where ``shape`` is set.
    """

    question: Question
    run: Run | None = None
    cached: CachedAnswer | None = None
    passed: Passed | None = None
    cache_key: bytes | None = None
    case: Case | None = None
    fed: str | None = None
    shape: WholeShape | None = None
    plain: Question | None = None

    @property
    def wants_copy(self) -> bool:
        """Somebody reads the answer afterwards."""
        return any(part is not None for part in (self.passed, self.cache_key, self.fed))


class Speed:
    """Learns, estimates and accelerates.

    Args:
        options: see ``SpeedOptions``.
        upstream: the one.
        metrics: of the sidecar.
        tokens: the upstream's tokenizer, or none.
        is_busy: requests are under way.
    """

    def __init__(
        self,
        options: SpeedOptions,
        upstream: Upstream,
        metrics: SidecarMetrics,
        tokens: Tokens | None = None,
        *,
        is_busy: Callable[[], bool] = lambda: False,
    ) -> None:
        self.options, self.upstream, self.metrics = options, upstream, metrics
        self.tokens = tokens or Tokens()
        timing = Timing()
        plan = replace(options.plan, max_branches=1) if options.mode == "race" else options.plan
        cache = SuffixCache(max_bytes=options.max_bytes, ttl=options.ttl_s)
        self.shop = Shop(cache, plan, timing, LoadGate(timing), Budget(options.budget), metrics)
        self.learner = Learner(self.shop, self.tokens, is_busy)
        self.capabilities = Capabilities()
        self.exact = ExactCache(options.cache_ttl_s) if options.cache_ttl_s > 0 else None
        self.refused: dict[str, int] = {}  # why requests were not accelerated
        self.feeder: Feeder | None = None
        self.corpora: CorpusFeeder | None = None
        self.pace = Pace(options.pace, metrics.releases, metrics.starved) if options.pace is not None else None
        self.fault: str | None = None  # why acceleration is off for good
        self._audits: set[asyncio.Task[None]] = set()
        self._secret = options.secret or secrets.token_bytes(32)
        self._watch: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Compile what drafts, look at the upstream, and begin to learn."""
        await asyncio.to_thread(self.shop.cache.warmup)
        is_full = self.options.mode in _FULL
        key = self.options.probe_key
        self.capabilities = await probe(self.upstream, key=key, is_full=is_full, kind=self.options.kind)
        kind = self.options.feed or ("prediction" if self.capabilities.has_prediction else None)
        if self.options.mode == "feed" and kind == "sglang-corpus":
            self.corpora = CorpusFeeder(self.upstream, key)
            self.learner.on_text = self.corpora.take
            self.corpora.start()
        elif self.options.mode == "feed" and kind is not None:
            self.feeder = Feeder(kind, self.shop.cache, self.tokens)
        self.learner.start()
        if is_full and self.capabilities.waiting_metric is not None:
            self._watch = asyncio.ensure_future(self._follow_load(self.capabilities.waiting_metric))

    async def close(self) -> None:
        """Stop what runs in the background."""
        await self.learner.close()
        if self.corpora is not None:
            await self.corpora.close()
        for task in self._audits:
            task.cancel()
        await asyncio.gather(*self._audits, return_exceptions=True)
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)

    # --- one request --------------------------------------------------------------------------------------------------

    def consider(self, question: Question) -> Job:
        """What to do with a request. Whatever is not understood is relayed as it is."""
        asked = read_request(question.path, question.body) if question.method == "POST" else None
        if asked is None:
            return Job(question)
        tenant = tenant_of(question.headers, self._secret, is_single=self.options.is_single_tenant)
        privacy = privacy_of(question.headers, asked)
        if tenant is None or not privacy.may_speculate:
            return Job(question)
        if self.exact is not None:
            key = self.exact.key(tenant, question.path, question.body, asked)
            cached = self.exact.get(key) if key is not None else None
            if cached is not None:
                self.metrics.cache_hits.inc()
                return Job(question, cached=cached)
        else:
            key = None
        run, why = self._run(question, asked, tenant, may_learn=privacy.may_learn)
        if run is not None:
            case = self._case(question, asked)
            extra = {"return_token_ids": True, **run.opener.extra}
            if not asked.is_stream:
                own = {**asked.body, "stream": True, "stream_options": {"include_usage": True}, **extra}
                streamed = replace(question, body=json.dumps(own).encode())
                shape = self.capabilities.wholes[asked.kind]
                return Job(streamed, run=run, cache_key=key, case=case, shape=shape, plain=question)
            question = replace(question, body=with_fields(question.body, **extra))
            return Job(question, run=run, cache_key=key, case=case)
        if why is not None:
            self.refused[why] = self.refused.get(why, 0) + 1
        fields = self.feeder.fields(asked, tenant) if self.feeder is not None else {}
        if fields:
            question = replace(question, body=with_fields(question.body, **fields))
        passed = Passed(asked, tenant, b"", asked.is_stream) if privacy.may_learn else None
        return Job(question, passed=passed, cache_key=key, fed=tenant if fields else None)

    def _run(self, question: Question, asked: Asked, tenant: str, *, may_learn: bool) -> tuple[Run | None, str | None]:
        if self.options.mode not in _FULL:
            return None, None
        if self.fault is not None:
            return None, self.fault
        able = self.capabilities
        if not (able.has_ids and able.continues):
            return None, "the upstream was not shown to continue prompts of token ids"
        plan = continuable(asked, is_keyed=able.is_keyed, has_whole=asked.kind in able.wholes)
        if isinstance(plan, str):
            return None, plan
        if self.pace is not None and not asked.is_stream:
            return None, "an answer that is not streamed cannot be shaped"
        is_rounds = self.options.mode == "rounds"
        if is_rounds and (why := self._no_rounds(asked)) is not None:
            return None, why
        is_sampled = not asked.is_greedy and plan.seed is None
        if is_sampled and self.tokens.tokenizer is None:
            return None, "sampled requests need the tokenizer"
        extra = {"cache_salt": tenant[:64]} if self.options.has_cache_salt else {}
        opener = HttpOpener(self.upstream, question, plan, self.shop, extra)
        framing = Framing(asked.kind, able.shapes, is_single=self.pace is not None)
        drafting = Drafting(
            self.shop, secrets.token_hex(12), tenant, limit=plan.limit, may_learn=may_learn,
            may_write=lambda: framing.can_write, is_sampled=is_sampled, proto=self.options.mode,
        )  # fmt: skip
        watch = self._contradicted if is_rounds else None
        return Run(self.shop, opener, framing, drafting, self.tokens, able, contradicted=watch, pace=self.pace), None

    def _no_rounds(self, asked: Asked) -> str | None:
        """Why the request's drafts cannot be verified by the upstream's scores."""
        if not asked.is_greedy or asked.body.get("logit_bias"):
            return "scores verify greedy decoding without a bias only"
        if self.capabilities.verifies is None:
            return "the upstream was not shown to score drafts rightly"
        return None if self.tokens.tokenizer is not None else "verified tokens are shown by the tokenizer"

    def _contradicted(self) -> None:
        self.fault = "a stream said other than its server's scores"
        logger.error("acceleration is off: %s", self.fault)

    def finished(self, job: Job, headers: Mapping[str, str], body: bytes) -> None:
        """An answer with status 200 went to its client, whole."""
        if "Content-Encoding" in headers:
            return
        if job.cache_key is not None and self.exact is not None:
            kind = headers.get("Content-Type", "application/json")
            self.exact.put(job.cache_key, CachedAnswer(kind, body), is_stream="event-stream" in kind)
        if job.passed is not None:
            self.learner.take(replace(job.passed, body=body))
        if job.fed is not None and self.feeder is not None:
            self.feeder.answered(job.fed, body)

    def _case(self, question: Question, asked: Asked) -> Case | None:
        """What to audit of a request, if it is one of the sample."""
        share = self.options.audit_share
        if not (asked.is_greedy and asked.is_stream) or secrets.randbelow(1_000_000) >= share * 1_000_000:
            return None
        return Case(question, (), (), asked.body.get("model"))

    def accelerated(self, job: Job) -> None:
        """An accelerated answer went to its client, whole."""
        if job.case is None or job.run is None or not job.run.drafting.num_adopted:
            return
        case = replace(job.case, prompt_ids=job.run.opener.prompt_ids, output_ids=tuple(job.run.output_ids))
        task = asyncio.ensure_future(self._audit(case))
        self._audits.add(task)
        task.add_done_callback(self._audits.discard)

    async def _audit(self, case: Case) -> None:
        verdict = await audit(self.upstream, case)
        self.metrics.audits.labels(verdict).inc()
        if verdict == "fault":
            self.fault = "an audit found a text that plain decoding does not give"
            logger.error("acceleration is off: %s", self.fault)

    # --- background ---------------------------------------------------------------------------------------------------

    async def _follow_load(self, metric: str) -> None:
        """Read the length of the upstream's queue once a second."""
        line = re.compile(rf"^{re.escape(metric)}(?:{{[^}}]*}})? ([0-9.e+-]+)$", re.MULTILINE)
        headers: CIMultiDict[str] = CIMultiDict()
        if self.options.probe_key:
            headers["Authorization"] = f"Bearer {self.options.probe_key}"
        while True:
            try:
                async with self.upstream.ask(Question("GET", "/metrics", headers), is_extra=True) as answer:
                    text = (await answer.read()).decode(errors="replace")
                found = [float(value) for value in line.findall(text)]
                self.shop.gate.num_waiting = sum(found) if found else None
            except (Unreachable, aiohttp.ClientError, TimeoutError, ValueError):
                self.shop.gate.num_waiting = None
            await asyncio.sleep(_POLL_S)

    def table(self) -> dict[str, Any]:
        """For ``/health``."""
        timing = self.shop.timing
        return {
            "mode": self.options.mode,
            "capabilities": self.capabilities.table(),
            "step_ms": None if timing.step_s is None else round(timing.step_s * 1e3, 3),
            "open_ms": round(timing.open_s * 1e3, 3),
            "gate": self.shop.gate.why_closed or "open",
            "budget_left": round(self.shop.budget.left),
            "fault": self.fault,
            "not_accelerated": dict(self.refused),
            "shadow": self.learner.shadow(),
            "shape": self.pace.table() if self.pace is not None else "off",
        } | ({"corpus": self.corpora.table()} if self.corpora is not None else {})
