"""The gRPC server of a service: its methods, the link, health and reflection, on one port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any, Final

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.runtime.admission import Admission
from services.runtime.authentication import Authenticator
from services.runtime.call import DEFAULT_TIMEOUT_SECONDS, Call, CallerKind
from services.runtime.dispatch import Method, Table
from services.runtime.errors import Failure, Reason
from services.runtime.frames import LINK_SERVICE, link_options
from services.runtime.inproc import BoundedStream
from services.runtime.interceptors import Log
from services.runtime.linkserver import LinkServer
from services.runtime.settings import MeshSettings, Profile, Reflection
from services.runtime.status import DETAILS_KEY, grpc_code, status_from_failure
from sluice.link.v1 import link_service_pb2

_HEALTH_SERVICE: Final = "grpc.health.v1.Health"
_REFLECTION_PREFIX: Final = "/grpc.reflection."
_MAX_CONCURRENT_STREAMS: Final = 1000
_MAX_HEADER_BYTES: Final = 16 * 1024

# The library's context and handler types say nothing about messages that are plain bytes.
Context = Any


class GrpcServer:
    """One listening server.

    `table` has handlers that take serialised requests (built with the stage `Messages` innermost). `health_names` are the names
    that `grpc.health.v1` knows beside the empty one: the service's short name and the full names of what it serves.
    """

    def __init__(
        self,
        settings: MeshSettings,
        table: Table,
        health_names: Sequence[str],
        *,
        authenticator: Authenticator,
        admission: Admission,
        replica_id: str,
        barrier: Callable[[], None],
        log: Log,
    ) -> None:
        """`replica_id` is what links are told to be talking to; `barrier` is called before anything is sent."""
        self._settings = settings
        self._health_names = ("", *health_names)
        self._admission = admission
        self._log = log
        self._health = health.aio.HealthServicer()
        self._barrier = barrier
        self._links = LinkServer(table, authenticator, admission, replica_id=replica_id, barrier=barrier, log=log)
        self._server = grpc.aio.server(
            options=_options(settings),
            interceptors=(_ReflectionGate(authenticator),) if _reflection(settings) is Reflection.AUTHENTICATED else (),
            # Ours answers first and with a reason; this one stands behind it.
            maximum_concurrent_rpcs=2 * settings.max_concurrent_calls + _MAX_CONCURRENT_STREAMS,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if _reflection(settings) is not Reflection.OFF:
            served = sorted({method.service for method in table.values()})
            reflection.enable_server_reflection((*served, LINK_SERVICE, _HEALTH_SERVICE, reflection.SERVICE_NAME), self._server)
        handlers = {path: self._handler(method) for path, method in table.items()}
        handlers[f"/{LINK_SERVICE}/Exchange"] = grpc.stream_stream_rpc_method_handler(
            self._exchange,
            request_deserializer=link_service_pb2.ExchangeRequest.FromString,
            response_serializer=link_service_pb2.ExchangeResponse.SerializeToString,
        )
        self._server.add_generic_rpc_handlers((_Handlers(handlers),))

    async def start(self, port: int) -> str:
        """Listens on `port` (0: a free one), NOT_SERVING. Returns host:port. Raises OSError when the port is taken."""
        host = self._settings.listen_host
        shown = f"[{host}]" if ":" in host else host
        await self.set_serving(False)
        try:
            bound = self._server.add_insecure_port(f"{shown}:{port}")
        except RuntimeError:
            bound = 0
        if not bound:
            raise OSError(f"gRPC can't listen on {shown}:{port}; is the port taken?")
        await self._server.start()
        return f"{shown}:{bound}"

    async def set_serving(self, serving: bool) -> None:
        """Tells health clients whether to call."""
        answer = health_pb2.HealthCheckResponse
        for name in self._health_names:
            await self._health.set(name, answer.SERVING if serving else answer.NOT_SERVING)

    async def announce_stop(self) -> None:
        """NOT_SERVING for good: the first step of a drain. Calls are still taken."""
        await self._health.enter_graceful_shutdown()

    async def stop(self, grace: float) -> None:
        """Takes no more calls, lets open ones run for `grace` seconds, then ends them."""
        loop = asyncio.get_running_loop()
        end = loop.time() + grace
        await self._links.drain(grace)
        await self._server.stop(max(0.0, end - loop.time()))

    def _handler(self, method: Method) -> grpc.RpcMethodHandler[Any, Any]:
        if method.unary is not None:
            return grpc.unary_unary_rpc_method_handler(self._unary(method))
        return grpc.unary_stream_rpc_method_handler(self._stream(method))

    def _unary(self, method: Method) -> Callable[[bytes, Context], Any]:
        handler = method.unary
        assert handler is not None
        admission = self._admission
        barrier = self._barrier
        path = method.path

        async def run(data: bytes, context: Context) -> bytes:
            try:
                admission.enter()
                try:
                    call = _call(path, context)
                    reply = await handler(data, call)
                    return bytes(reply.SerializeToString())
                finally:
                    admission.leave()
                    barrier()
            except Failure as failure:
                _fail(context, failure)
            except Exception as error:  # noqa: BLE001  # a message boundary; it is logged and mapped
                _fail(context, self._unsendable(path, error))
            return b""

        return run

    def _stream(self, method: Method) -> Callable[[bytes, Context], AsyncIterator[bytes]]:
        handler = method.stream
        assert handler is not None
        admission = self._admission
        barrier = self._barrier
        path = method.path

        async def run(data: bytes, context: Context) -> AsyncIterator[bytes]:
            try:
                admission.enter()
                try:
                    call = _call(path, context)
                    replies = BoundedStream(handler(data, call), call.deadline, path)
                    try:
                        async for reply in replies:
                            barrier()
                            yield reply.SerializeToString()
                    finally:
                        await replies.aclose()
                finally:
                    admission.leave()
                    barrier()
            except Failure as failure:
                _fail(context, failure)
            except Exception as error:  # noqa: BLE001  # a message boundary; it is logged and mapped
                _fail(context, self._unsendable(path, error))

        return run

    def _unsendable(self, path: str, error: Exception) -> Failure:
        # The chain lets out nothing but Failure, so what comes here is an answer that can't be serialised.
        self._log.error("unsendable answer", method=path, exc_info=error)
        return Failure(Reason.INTERNAL, f"{path} gave an answer that can't be sent")

    async def _exchange(self, requests: object, context: Context) -> None:
        try:
            await self._links.exchange(requests, context)
        except Failure as failure:
            _fail(context, failure)


class _Handlers(grpc.GenericRpcHandler):
    """Handlers by full name; what nobody serves is refused with a reason."""

    def __init__(self, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]) -> None:
        self._handlers = handlers
        self._unknown: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(_refuse_unknown)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        found: grpc.RpcMethodHandler[Any, Any] = self._handlers.get(handler_call_details.method, self._unknown)
        return found


async def _refuse_unknown(requests: object, context: Context) -> None:
    _fail(context, Failure(Reason.ROUTE_NOT_FOUND, "this server has no such method; reflection lists what it has"))


class _ReflectionGate(grpc.aio.ServerInterceptor):
    """Hides reflection from everybody but the administrator."""

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator
        self._hidden: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(_refuse_unknown)

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        if handler_call_details.method.startswith(_REFLECTION_PREFIX):
            metadata = _texts(handler_call_details.invocation_metadata)
            if self._authenticator.caller(metadata).kind is not CallerKind.ADMIN:
                return self._hidden
        return await continuation(handler_call_details)


def _call(path: str, context: Context) -> Call:
    left = context.time_remaining()
    seconds = DEFAULT_TIMEOUT_SECONDS if left is None else left
    deadline = asyncio.get_running_loop().time() + seconds
    return Call(path, deadline, _texts(context.invocation_metadata()))


def _texts(metadata: Any) -> dict[str, str]:
    return {key: value for key, value in metadata or () if isinstance(value, str)}


def _fail(context: Context, failure: Failure) -> None:
    """How the call ends when its handler returns.

    The context's own `abort` raises an error that it keeps: with the frames of its traceback, which have the context, that makes a cycle, and
    until it is found the stream counts as one of its connection's.
    """
    status = status_from_failure(failure)
    context.set_code(grpc_code(failure))
    context.set_details(status.message)
    context.set_trailing_metadata(((DETAILS_KEY, status.SerializeToString()),))


def _reflection(settings: MeshSettings) -> Reflection:
    if settings.reflection is Reflection.AUTO:
        return Reflection.ON if settings.profile is Profile.DEV else Reflection.OFF
    return settings.reflection


def _options(settings: MeshSettings) -> list[tuple[str, int]]:
    sizes = [option for option in link_options(settings.max_message_bytes) if "message_length" in option[0]]
    return [
        *sizes,
        ("grpc.max_concurrent_streams", _MAX_CONCURRENT_STREAMS),
        ("grpc.max_metadata_size", _MAX_HEADER_BYTES),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 20_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        # A second process on the same port must fail to start instead of taking half of the calls.
        ("grpc.so_reuseport", 0),
    ]
