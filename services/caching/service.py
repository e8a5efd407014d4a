"""The servicer of `sluice.caching.v1.CachingService`."""

from __future__ import annotations

import functools
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, Final

from google.protobuf.message import DecodeError

from services.caching import keys
from services.caching.config import Mode, Namespace
from services.caching.eligibility import question_refusal
from services.caching.errors import NotStorable, TierUnavailable
from services.caching.exact import ExactTier
from services.caching.ports import SharedTier
from services.caching.proto import (
    has_remote_picture,
    payload_to_verdict,
    question_of,
    refusal_to_store,
    serves_other_words,
    without_question,
)
from services.caching.semantic import SemanticTier, Waiting
from services.caching.tickets import NO_SCOPE, Pending, Tickets
from services.runtime.call import Call
from services.runtime.errors import Failure, invalid, unavailable
from services.runtime.status import status_from_failure
from sluice.caching.v1 import caching_service_pb2 as pb2
from sluice.inference.v1 import conversation_pb2, inference_service_pb2, receipt_pb2

DEFAULT_NAMESPACE: Final = "default"
MAX_BATCH: Final = 100
_NAMESPACE: Final = re.compile(r"[a-z0-9_-]{1,64}")
_MAX_TENANT: Final = 256
_MAX_PURGES: Final = 10_000

# Looked up here once: a member of an enumeration is not found as fast as a constant.
_NO_CACHE: Final = Mode.OFF
_BY_MEANING: Final = Mode.SEMANTIC

_OFF: Final = inference_service_pb2.CACHE_MODE_OFF
_EXACT: Final = inference_service_pb2.CACHE_MODE_EXACT
_SEMANTIC: Final = inference_service_pb2.CACHE_MODE_SEMANTIC
_REFRESH: Final = inference_service_pb2.CACHE_MODE_REFRESH


@dataclass(slots=True)
class Tally:
    """Counts of one tenant and namespace since the start."""

    exact: int = 0
    semantic: int = 0
    misses: int = 0
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of the servicer."""

    entry_bytes: int
    semantic_entry_bytes: int
    question_bytes: int
    tallies: int


class CachingServicer:
    """Translates, asks the tiers in turn, translates. A tier that is None doesn't exist."""

    def __init__(
        self,
        exact: ExactTier[bytes],
        shared: SharedTier | None,
        semantic: SemanticTier | None,
        tickets: Tickets,
        pending: Pending,
        namespaces: Mapping[str, Namespace],
        default: Namespace,
        limits: Limits,
        *,
        now: Callable[[], float],
        counted: Callable[[str], None] = lambda status: None,
        semantic_absence: str = "the semantic tier is off",
    ) -> None:
        """`now` is Unix time in seconds. `counted` is told the outcome of every lookup: exact, semantic, miss, bypass, refresh."""
        self._exact = exact
        self._shared = shared
        self._semantic = semantic
        self._tickets = tickets
        self._pending = pending
        self._namespaces = namespaces
        self._default = default
        self._limits = limits
        self._now = now
        self._counted = counted
        self._semantic_absence = semantic_absence
        self._tallies: dict[tuple[str, str], Tally] = {}
        self._other = Tally()
        self._purges: OrderedDict[tuple[str, str], float] = OrderedDict()
        self._prefix: Callable[[str, str, str, str, int, str], bytes] = functools.lru_cache(1024)(keys.prefix)
        self._partition: Callable[[str], str] = functools.lru_cache(4096)(keys.partition)
        self._partition_bytes: Callable[[str], bytes] = functools.lru_cache(4096)(_partition_bytes)

    async def Lookup(self, request: pb2.LookupRequest, call: Call) -> pb2.LookupResponse:
        """See the proto."""
        began = perf_counter_ns()
        tenant = request.tenant_id
        if not tenant or len(tenant) > _MAX_TENANT:
            raise _bad_tenant(tenant)
        conversation = request.conversation
        if not conversation.messages:
            raise invalid("conversation", "must have at least one message")
        namespace = DEFAULT_NAMESPACE
        wish = 0
        wishes = None
        if request.HasField("wishes"):
            wishes = request.wishes
            wish = wishes.mode
            namespace = _namespace(wishes.cache_namespace) or DEFAULT_NAMESPACE
        settings = self._namespaces.get(namespace, self._default)
        response = pb2.LookupResponse()
        verdict = response.verdict
        verdict.cache_namespace = namespace
        if settings.mode is _NO_CACHE or wish == _OFF:
            verdict.reason = "the caller doesn't want the cache" if wish == _OFF else "the namespace has no cache"
            return self._end(response, receipt_pb2.CACHE_STATUS_BYPASS, "bypass", began)
        ttl, threshold = settings.ttl, settings.threshold
        if wishes is not None:
            ttl, threshold = _tightened(wishes, ttl, threshold)

        content = conversation.SerializeToString(deterministic=True)
        if b"http" in content and has_remote_picture(conversation):
            verdict.reason = "a picture is given by its address, and what is there may change"
            return self._end(response, receipt_pb2.CACHE_STATUS_BYPASS, "bypass", began)
        prefix = self._prefix(
            tenant, namespace, request.model, request.policy_version, request.task_type, request.routing_scope
        )
        key = keys.exact_key(prefix, content)
        now = self._now()
        tally = self._tally(tenant, namespace)

        if wish != _REFRESH:
            payload = self._exact.get(key, now)
            if payload is None and self._shared is not None and self._shared.knows(key):
                payload = await self._fetch(tenant, namespace, key, now)
            if payload is not None:
                tally.exact += 1
                payload_to_verdict(payload, response)
                verdict.reason = "the same request was answered"
                return self._end(response, receipt_pb2.CACHE_STATUS_HIT_EXACT, "exact", began)
            verdict.reason = "the same request has not been answered"

        scope = NO_SCOPE
        question = None
        if wish == _SEMANTIC or (settings.mode is _BY_MEANING and wish != _EXACT):
            question, scope, why_not = self._scope(conversation, prefix)
            if why_not is not None:
                verdict.reason = f"{verdict.reason}; semantic tier not asked: {why_not}" if verdict.reason else why_not
            elif wish != _REFRESH and question is not None:
                verdict.threshold = threshold
                if await self._find(response, tenant, namespace, scope, question, threshold):
                    tally.semantic += 1
                    return self._end(response, receipt_pb2.CACHE_STATUS_HIT_SEMANTIC, "semantic", began)

        if ttl > 0:
            response.ticket = self._tickets.issue(self._partition_bytes(tenant), namespace, key, scope, now, ttl)
            if question is not None:
                self._pending.put(response.ticket, question)
        if wish == _REFRESH:
            verdict.reason = "the caller wants a fresh answer"
            return self._end(response, receipt_pb2.CACHE_STATUS_REFRESH, "refresh", began)
        tally.misses += 1
        return self._end(response, receipt_pb2.CACHE_STATUS_MISS, "miss", began)

    async def Store(self, request: pb2.StoreRequest, call: Call) -> pb2.StoreResponse:
        """See the proto."""
        response = pb2.StoreResponse()
        self._store(request, response)
        return response

    async def BatchStore(self, request: pb2.BatchStoreRequest, call: Call) -> pb2.BatchStoreResponse:
        """See the proto."""
        count = len(request.requests)
        if not 1 <= count <= MAX_BATCH:
            raise invalid("requests", f"must have 1 to {MAX_BATCH} entries, got {count}")
        response = pb2.BatchStoreResponse()
        add = response.results.add
        store = self._store
        for one in request.requests:
            result = add()
            try:
                store(one, result)
            except Failure as failure:
                result.status.CopyFrom(status_from_failure(failure))
        return response

    def _store(self, request: pb2.StoreRequest, response: pb2.StoreResponse | pb2.StoreResult) -> None:
        """Stores an answer, says in `response` where. Raises Failure."""
        tenant = request.tenant_id
        if not tenant or len(tenant) > _MAX_TENANT:
            raise _bad_tenant(tenant)
        ticket = self._tickets.read(request.ticket, self._partition_bytes(tenant))
        question = self._pending.take(request.ticket) if ticket.scope != NO_SCOPE else None
        entry = request.answer
        refusal = refusal_to_store(entry.answer)
        if refusal is not None:
            raise NotStorable(refusal)
        ttl = ticket.ttl
        if request.HasField("ttl"):
            ttl = min(ttl, request.ttl.seconds + request.ttl.nanos / 1e9)
        namespace = ticket.namespace
        now = self._now()
        if ttl <= 0 or self._purged_since(tenant, namespace, ticket.create_time):
            return
        # As bytes: a message keeps the memory of the whole request that it came in, and of all that was parsed for it.
        payload = entry.SerializeToString()
        size = len(payload)
        expire = now + ttl
        tally = self._tally(tenant, namespace)
        if size <= self._limits.entry_bytes:
            response.stored_exact = self._exact.put(ticket.key, payload, size, expire, (tenant, namespace))
            shared = self._shared
            if shared is not None and not shared.put(self._partition(tenant), namespace, ticket.key, payload, expire):
                tally.dropped += 1
        if question is not None and self._semantic is not None and serves_other_words(entry.answer):
            if size <= self._limits.semantic_entry_bytes:
                response.stored_semantic = self._semantic.add(
                    Waiting(
                        partition=self._partition(tenant),
                        scope=ticket.scope,
                        key=ticket.key,
                        namespace=namespace,
                        text=question,
                        payload=payload,
                        create_time=now,
                        expire_time=expire,
                    )
                )
            if not response.stored_semantic:
                tally.dropped += 1

    async def Purge(self, request: pb2.PurgeRequest, call: Call) -> pb2.PurgeResponse:
        """See the proto. Raises DEPENDENCY_UNAVAILABLE when the semantic tier can't be purged: try again."""
        tenant, namespace = _owner(request.tenant_id, request.cache_namespace)
        partition = self._partition(tenant)
        if request.dry_run:
            semantic = 0 if self._semantic is None else await _there(self._semantic.count(partition, namespace))
            return pb2.PurgeResponse(entry_count=self._exact.count(tenant, namespace)[0] + semantic)
        removed = self.forget(tenant, namespace)
        if self._shared is not None:
            await self._shared.purge(tenant, partition, namespace)
        if self._semantic is not None:
            removed += await _there(self._semantic.purge(partition, namespace))
        return pb2.PurgeResponse(entry_count=removed)

    async def GetStats(self, request: pb2.GetStatsRequest, call: Call) -> pb2.GetStatsResponse:
        """See the proto."""
        tenant, namespace = _owner(request.tenant_id, request.cache_namespace)
        entries, weight = self._exact.count(tenant, namespace)
        semantic = 0 if self._semantic is None else await _there(self._semantic.count(self._partition(tenant), namespace))
        tallies = [tally for (whose, name), tally in self._tallies.items() if whose == tenant and namespace in ("", name)]
        return pb2.GetStatsResponse(
            exact_entry_count=entries,
            semantic_entry_count=semantic,
            exact_byte_count=weight,
            exact_hit_count=sum(tally.exact for tally in tallies),
            semantic_hit_count=sum(tally.semantic for tally in tallies),
            miss_count=sum(tally.misses for tally in tallies),
            dropped_write_count=sum(tally.dropped for tally in tallies),
        )

    def forget(self, tenant: str, namespace: str) -> int:
        """Removes a tenant's entries of this process's exact tier; answers asked for before are not stored any more."""
        purges = self._purges
        purges[tenant, namespace] = self._now()
        purges.move_to_end((tenant, namespace))
        if len(purges) > _MAX_PURGES:
            purges.popitem(last=False)
        return self._exact.purge(tenant, namespace)

    def _purged_since(self, tenant: str, namespace: str, time: float) -> bool:
        purges = self._purges
        if not purges:
            return False
        return time <= max(purges.get((tenant, ""), 0.0), purges.get((tenant, namespace), 0.0))

    async def _fetch(self, tenant: str, namespace: str, key: bytes, now: float) -> bytes | None:
        assert self._shared is not None
        found = await self._shared.get(self._partition(tenant), namespace, key)
        if found is None or found[1] <= now:
            return None
        payload, expire = found
        try:
            pb2.CachedAnswer.FromString(payload)
        except DecodeError:
            return None
        if not self._purged_since(tenant, namespace, now):
            self._exact.put(key, payload, len(payload), expire, (tenant, namespace))
        return payload

    def _scope(self, conversation: conversation_pb2.Conversation, prefix: bytes) -> tuple[str | None, bytes, str | None]:
        """The question, its scope and None; or None, NO_SCOPE and why the semantic tier can't be asked."""
        if self._semantic is None:
            return None, NO_SCOPE, self._semantic_absence
        question = question_of(conversation)
        if question is None:
            return None, NO_SCOPE, "the last turn is not a user's text"
        refusal = question_refusal(question, self._limits.question_bytes)
        if refusal is not None:
            return None, NO_SCOPE, refusal
        return question, keys.scope_fingerprint(prefix, without_question(conversation)), None

    async def _find(
        self, response: pb2.LookupResponse, tenant: str, namespace: str, scope: bytes, question: str, threshold: float
    ) -> bool:
        assert self._semantic is not None
        verdict = response.verdict
        try:
            finding = await self._semantic.find(self._partition(tenant), scope, question, threshold)
        except TierUnavailable as error:
            verdict.reason = f"the same request has not been answered; the semantic tier was skipped: {error}"
            return False
        if finding.score is not None:
            verdict.score = finding.score
        verdict.reason = finding.reason
        if finding.match is None:
            return False
        try:
            payload_to_verdict(finding.match.payload, response)
        except DecodeError:
            response.ClearField("answer")
            verdict.reason = "the stored answer can't be read"
            return False
        return True

    def _tally(self, tenant: str, namespace: str) -> Tally:
        tally = self._tallies.get((tenant, namespace))
        if tally is None:
            if len(self._tallies) >= self._limits.tallies:
                # Namespaces are the callers' words; they must not fill the memory.
                return self._other
            tally = self._tallies[tenant, namespace] = Tally()
        return tally

    def _end(
        self, response: pb2.LookupResponse, status: receipt_pb2.CacheStatus.ValueType, word: str, began: int
    ) -> pb2.LookupResponse:
        verdict = response.verdict
        verdict.status = status
        duration = perf_counter_ns() - began
        if duration < 1_000_000_000:
            verdict.duration.nanos = duration
        else:
            span = verdict.duration
            span.seconds, span.nanos = divmod(duration, 1_000_000_000)
        self._counted(word)
        return response


def _partition_bytes(tenant: str) -> bytes:
    return bytes.fromhex(keys.partition(tenant))


def _namespace(given: str) -> str:
    """A namespace that keeps to the contract; empty stays empty."""
    if given and _NAMESPACE.fullmatch(given) is None:
        raise invalid("cache_namespace", f"must be 1 to 64 of a-z, 0-9, '_' and '-', got {given[:80]!r}")
    return given


def _bad_tenant(tenant: str) -> Failure:
    return invalid("tenant_id", f"must have 1 to {_MAX_TENANT} characters, got {len(tenant)}")


def _owner(tenant: str, namespace: str) -> tuple[str, str]:
    if not tenant or len(tenant) > _MAX_TENANT:
        raise _bad_tenant(tenant)
    return tenant, _namespace(namespace)


def _tightened(wishes: inference_service_pb2.CacheWishes, ttl: float, threshold: float) -> tuple[float, float]:
    """Time to live and threshold, no looser than given."""
    if wishes.HasField("min_similarity"):
        least = wishes.min_similarity
        if not 0.5 <= least <= 1:
            raise invalid("wishes.min_similarity", f"must be from 0.5 to 1, got {least!r}")
        threshold = max(threshold, least)
    if wishes.HasField("ttl"):
        ttl = min(ttl, wishes.ttl.seconds + wishes.ttl.nanos / 1e9)
    return ttl, threshold


async def _there(call: Any) -> int:
    try:
        count: int = await call
    except TierUnavailable as error:
        raise unavailable("semantic tier", f"the semantic tier can't be asked now: {error}; try again") from None
    return count
