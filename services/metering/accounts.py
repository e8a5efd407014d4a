"""Tenants, projects, keys: who pays, with limits and balances. Money is integer nano-dollars, times are Unix seconds."""

from __future__ import annotations

import enum
import json
import re
from dataclasses import dataclass
from typing import Final

SCOPES: Final = ("inference", "jobs", "usage")
_ID: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class Level(enum.Enum):
    """Where a limit stands, narrowest first."""

    MODEL = "model"
    """Of one model, at one of the others. Only rates and concurrency stand there."""
    KEY = "key"
    PROJECT = "project"
    TENANT = "tenant"


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What of one model may be used. None and -1: unlimited."""

    model: str
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be spent and used. None: no limit of its own, or the tenant's default; -1: unlimited."""

    budget_nano_usd: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    models: tuple[ModelLimits, ...] = ()
    """Besides, of single models; by model, each once."""

    def of_model(self, model: str) -> ModelLimits | None:
        """The limits of one model; None: it has none of its own."""
        return next((limits for limits in self.models if limits.model == model), None)


@dataclass(frozen=True, slots=True)
class Balance:
    """What was spent and is held."""

    spent_nano_usd: int = 0
    held_nano_usd: int = 0


@dataclass(frozen=True, slots=True)
class Tenant:
    """A customer."""

    id: str
    display_name: str
    limits: Limits
    create_time: float
    balance: Balance = Balance()


@dataclass(frozen=True, slots=True)
class Project:
    """A part of a tenant."""

    id: str
    tenant_id: str
    display_name: str
    limits: Limits
    create_time: float
    balance: Balance = Balance()


@dataclass(frozen=True, slots=True)
class Key:
    """A credential of a project. Its secret is known by its digest alone."""

    id: str
    sha256: bytes
    tenant_id: str
    project_id: str
    display_name: str
    secret_hint: str
    scopes: tuple[str, ...]
    allowed_models: tuple[str, ...]
    limits: Limits
    create_time: float
    expire_time: float | None = None
    revoke_time: float | None = None
    cache_namespace: str = ""
    balance: Balance = Balance()

    def is_active(self, now: float) -> bool:
        """Whether it may be used at `now`."""
        return self.revoke_time is None and (self.expire_time is None or now < self.expire_time)


@dataclass(frozen=True, slots=True)
class Payer:
    """The three accounts that an operation draws on."""

    tenant_id: str
    project_id: str
    key_id: str

    @property
    def accounts(self) -> tuple[str, str, str]:
        """Account names, key first."""
        return (key_account(self.key_id), project_account(self.tenant_id, self.project_id), tenant_account(self.tenant_id))


def models_to_json(models: tuple[ModelLimits, ...]) -> str:
    """Limits of models as a store keeps them."""
    return json.dumps([[one.model, one.requests_per_minute, one.tokens_per_minute, one.concurrency] for one in models])


def models_from_json(text: str) -> tuple[ModelLimits, ...]:
    """Limits of models as they were given to `models_to_json`."""
    # Nearly always.
    return () if text == "[]" else tuple(ModelLimits(*one) for one in json.loads(text))


def key_account(key_id: str) -> str:
    """Name of a key's account."""
    return f"key/{key_id}"


def project_account(tenant_id: str, project_id: str) -> str:
    """Name of a project's account."""
    return f"project/{tenant_id}/{project_id}"


def tenant_account(tenant_id: str) -> str:
    """Name of a tenant's account."""
    return f"tenant/{tenant_id}"


def is_id(text: str) -> bool:
    """Whether `text` can be the id of a tenant or project."""
    return _ID.fullmatch(text) is not None
