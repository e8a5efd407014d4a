"""The servicer of `sluice.routing.v1.RoutingService`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from google.protobuf.duration_pb2 import Duration

from services.routing.filters import is_permitted
from services.routing.planner import POLICY_PREFIX, Planner
from services.routing.proto import (
    ask_from_proto,
    finished_from_proto,
    model_to_proto,
    plan_to_proto,
    policy_to_proto,
    state_from_proto,
)
from services.runtime.call import Call
from services.runtime.errors import invalid
from sluice.inference.v1 import inference_service_pb2
from sluice.routing.v1 import routing_service_pb2 as pb2

MAX_PAGE: Final = 1000
DEFAULT_PAGE: Final = 100
MAX_REPORTED: Final = 20_000


class RoutingServicer:
    """Translates, plans, translates."""

    def __init__(self, planner: Planner, *, reuse_seconds: float, planned: Callable[[bool], None]) -> None:
        """`planned` is told of every plan whether it has a candidate."""
        self._planner = planner
        self._reuse = Duration(seconds=int(reuse_seconds), nanos=round(reuse_seconds % 1 * 1e9))
        self._planned = planned

    async def Plan(self, request: pb2.PlanRequest, call: Call) -> pb2.PlanResponse:
        """See the proto."""
        plan = self._planner.plan(ask_from_proto(request))
        self._planned(bool(plan.candidates))
        return plan_to_proto(plan, self._planner, self._reuse)

    async def ListModels(self, request: pb2.ListModelsRequest, call: Call) -> pb2.ListModelsResponse:
        """See the proto."""
        if not 0 <= request.page_size <= MAX_PAGE:
            raise invalid("page_size", f"must be 0 to {MAX_PAGE}, got {request.page_size}")
        size = request.page_size or DEFAULT_PAGE
        allowed = frozenset(request.allowed_models)
        names = sorted(name for name in self._names(allowed) if name > request.page_token)
        page = names[:size]
        return pb2.ListModelsResponse(
            models=[self._listed(name) for name in page],
            next_page_token=page[-1] if len(names) > size else "",
        )

    async def ReportExecution(self, request: pb2.ReportExecutionRequest, call: Call) -> pb2.ReportExecutionResponse:
        """See the proto."""
        if not request.replica_id:
            raise invalid("replica_id", "must be set")
        for field in ("attempts", "targets"):
            if len(getattr(request, field)) > MAX_REPORTED:
                raise invalid(field, f"must have at most {MAX_REPORTED} entries, got {len(getattr(request, field))}")
        finished = [one for one in map(finished_from_proto, request.attempts) if one is not None]
        self._planner.statistics.take(request.replica_id, finished, map(state_from_proto, request.targets))
        return pb2.ReportExecutionResponse()

    def _names(self, allowed: frozenset[str]) -> Iterator[str]:
        catalogue = self._planner.catalogue
        for model in catalogue.models.values():
            if is_permitted(allowed, (model.id, *model.aliases)):
                yield model.id
        for name in catalogue.policies:
            if is_permitted(allowed, (f"{POLICY_PREFIX}{name}", name)):
                yield f"{POLICY_PREFIX}{name}"

    def _listed(self, name: str) -> inference_service_pb2.Model:
        planner = self._planner
        catalogue = planner.catalogue
        model = catalogue.models.get(name)
        if model is not None:
            return model_to_proto(model, planner.prices.rates(name), healthy=not planner.health(name))
        policy = catalogue.policies[name.removeprefix(POLICY_PREFIX)]
        healthy = any(not planner.health(one) for chain in policy.chains.values() for one in chain)
        return policy_to_proto(policy, catalogue, healthy=healthy)
