"""The gRPC server of a service: its method table, health, reflection and the link, on one port."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf.message import EncodeError
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection, reflection_pb2
from grpc_reflection.v1alpha._async import ReflectionServicer

from services.runtime.authentication import Authenticator
from services.runtime.call import DEFAULT_TIMEOUT_SECONDS, Call, CallerKind
from services.runtime.dispatch import Kind, Method, Table
from services.runtime.errors import Failure, Reason
from services.runtime.inproc import bounded, bounded_stream
from services.runtime.interceptors import Log
from services.runtime.link import LinkServer
from services.runtime.settings import MeshSettings, Profile, Reflection
from services.runtime.status import DETAILS_KEY, grpc_code, status_from_failure

_LINK_SLACK: Final = 64 * 1024
"""A link message is a call's message and its frame."""
_REFLECTION_PREFIX: Final = "/grpc.reflection."
_SERVING: Final = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING: Final = health_pb2.HealthCheckResponse.NOT_SERVING
