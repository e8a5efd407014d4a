"""The command line as a client of a running mesh: blocking gRPC, one channel per service, failures as `Failure`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import grpc
from google.rpc import code_pb2, error_details_pb2, status_pb2

from services.cli.state import Ready
from services.runtime.errors import Failure, Reason
from sluice.execution.v1.execution_service_pb2_grpc import ExecutionServiceStub
from sluice.inference.v1.inference_service_pb2_grpc import InferenceServiceStub
from sluice.jobs.v1.job_service_pb2_grpc import JobServiceStub
from sluice.metering.v1.tenancy_service_pb2_grpc import TenancyServiceStub
from sluice.metering.v1.usage_service_pb2_grpc import UsageServiceStub

_STATUS_KEY: Final = "grpc-status-details-bin"
_MAX_MESSAGE_BYTES: Final = 64 * 1024 * 1024
_PAGE_SIZE: Final = 200

Metadata = tuple[tuple[str, str], ...]


def failure_of(error: grpc.RpcError) -> Failure:
    """The `Failure` behind a gRPC error; one without ErrorInfo becomes DEPENDENCY_UNAVAILABLE or INTERNAL by its code."""
    call: Any = error
    for key, value in call.trailing_metadata() or ():
        if key != _STATUS_KEY:
            continue
        status = status_pb2.Status.FromString(value)
        for detail in status.details:
            info = error_details_pb2.ErrorInfo()
            if detail.Unpack(info):
                reason = info.reason.removeprefix("ERROR_REASON_")
                known = Reason(reason) if reason in Reason.__members__ else Reason.INTERNAL
                return Failure(known, status.message, metadata=dict(info.metadata))
    code = call.code()
    unavailable = code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    name = code_pb2.Code.Name(code.value[0])
    return Failure(
        Reason.DEPENDENCY_UNAVAILABLE if unavailable else Reason.INTERNAL,
        f"{name}: {call.details()}",
        metadata={"dependency": "mesh"} if unavailable else {},
    )


@contextlib.contextmanager
def failures() -> Iterator[None]:
    """Turns gRPC errors of the block into `Failure`."""
    try:
        yield
    except grpc.RpcError as error:
        raise failure_of(error) from None


class _Page(Protocol):
    page_token: str
    page_size: int


_Request = TypeVar("_Request", bound=_Page)


def pages(call: Callable[..., Any], request: _Request, metadata: Metadata, timeout: float) -> Iterator[Any]:
    """Every page of a list call."""
    request.page_size = _PAGE_SIZE
    while True:
        with failures():
            response = call(request, timeout=timeout, metadata=metadata)
        yield response
        if not response.next_page_token:
            return
        request.page_token = response.next_page_token


@dataclass(frozen=True, slots=True)
class Client:
    """Stubs of a running mesh. `as_tenant` and `as_admin` are the metadata of calls on behalf of each."""

    inference: InferenceServiceStub
    jobs: JobServiceStub
    tenancy: TenancyServiceStub
    usage: UsageServiceStub
    execution: ExecutionServiceStub
    as_tenant: Metadata
    as_admin: Metadata


@contextlib.contextmanager
def connect(ready: Ready, *, key: str | None = None) -> Iterator[Client]:
    """A client of the mesh at `ready`; `key` replaces the key that `up` made."""
    options = [("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES), ("grpc.enable_retries", 0)]
    with contextlib.ExitStack() as stack:

        def channel(service: str) -> grpc.Channel:
            address = ready.grpc.get(service)
            if address is None:
                raise Failure(Reason.DEPENDENCY_UNAVAILABLE, f"{service!r} has no address", metadata={"dependency": service})
            return stack.enter_context(grpc.insecure_channel(address, options=options))

        metering = channel("metering")
        yield Client(
            inference=InferenceServiceStub(channel("gateway")),
            jobs=JobServiceStub(channel("batching")),
            tenancy=TenancyServiceStub(metering),
            usage=UsageServiceStub(metering),
            execution=ExecutionServiceStub(channel("execution")),
            as_tenant=(("authorization", f"Bearer {key or ready.key}"),),
            as_admin=(("authorization", f"Bearer {ready.admin_key}"),),
        )
