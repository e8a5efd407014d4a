"""Method tables: what a process serves, independent of how calls arrive.

A servicer is any object that has a coroutine method `async def Name(self, request, call)` for each unary method of its service
and an async generator method `async def Name(self, request, call)` for each server-streaming one. The three transports look a
method up by its full name and call the same wrapped handler.
"""

from __future__ import annotations

import enum
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from services.runtime.call import Call

# Requests and responses differ per method; the generated stubs on the calling side carry the types.
UnaryHandler = Callable[[Any, Call], Awaitable[Any]]
StreamHandler = Callable[[Any, Call], AsyncIterator[Any]]


class Kind(enum.Enum):
    """Shape of a method."""

    UNARY = "unary"
    STREAM = "stream"


@dataclass(frozen=True, slots=True)
class Method:
    """One method and what runs it. Exactly one of `unary` and `stream` is set, as `kind` says."""

    path: str
    """`/sluice.routing.v1.RoutingService/Plan`."""
    service: str
    """`sluice.routing.v1.RoutingService`."""
    name: str
    """`Plan`."""
    kind: Kind
    request_class: type[Message]
    response_class: type[Message]
    unary: UnaryHandler | None = None
    stream: StreamHandler | None = None


@dataclass(frozen=True, slots=True)
class Binding:
    """A servicer and the descriptor of the service it implements, `x_pb2.DESCRIPTOR.services_by_name["XService"]`."""

    servicer: object
    descriptor: ServiceDescriptor


class Interceptor(Protocol):
    """Something done around every call. Wraps a handler once, when the table is built; keep what runs per call small."""

    @property
    def name(self) -> str:
        """Its name in the chain."""

    def unary(self, method: Method, handler: UnaryHandler) -> UnaryHandler:
        """`handler`, wrapped; may return it unchanged."""

    def stream(self, method: Method, handler: StreamHandler) -> StreamHandler:
        """`handler`, wrapped; may return it unchanged."""


class Table(Mapping[str, Method]):
    """Methods by full name."""

    def __init__(self, methods: Iterable[Method]) -> None:
        self._methods = {method.path: method for method in methods}

    def __getitem__(self, path: str) -> Method:
        return self._methods[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)


def methods_of(binding: Binding) -> list[Method]:
    """The methods of a binding, unwrapped.

    Raises TypeError when the servicer lacks a method of the service, has one of the wrong shape, or the service has a
    client-streaming method (only the link itself has one, and it isn't dispatched here).
    """
    service = binding.descriptor
    methods = []
    for descriptor in service.methods:
        if descriptor.client_streaming:
            raise TypeError(
                f"{service.full_name}.{descriptor.name} is client-streaming; tables carry unary and server-streaming"
            )
        handler = getattr(binding.servicer, descriptor.name, None)
        servicer = type(binding.servicer).__name__
        if handler is None:
            raise TypeError(f"{servicer} lacks {descriptor.name} of {service.full_name}")
        streaming = descriptor.server_streaming
        if streaming != inspect.isasyncgenfunction(handler):
            raise TypeError(f"{servicer}.{descriptor.name} must be {'an async generator' if streaming else 'a coroutine'}")
        methods.append(
            Method(
                path=f"/{service.full_name}/{descriptor.name}",
                service=service.full_name,
                name=descriptor.name,
                kind=Kind.STREAM if streaming else Kind.UNARY,
                request_class=GetMessageClass(descriptor.input_type),
                response_class=GetMessageClass(descriptor.output_type),
                unary=None if streaming else handler,
                stream=handler if streaming else None,
            )
        )
    return methods


def build_table(bindings: Iterable[Binding], interceptors: Sequence[Interceptor]) -> Table:
    """The table of a process: every method wrapped by the chain, whose first element is outermost."""
    wrapped = []
    for binding in bindings:
        for method in methods_of(binding):
            unary, stream = method.unary, method.stream
            for interceptor in reversed(interceptors):
                if unary is not None:
                    unary = interceptor.unary(method, unary)
                if stream is not None:
                    stream = interceptor.stream(method, stream)
            wrapped.append(replace(method, unary=unary, stream=stream))
    return Table(wrapped)
