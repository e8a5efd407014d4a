"""`sluice tenants`, `sluice keys`, `sluice usage`: who may spend, and what was spent."""

from __future__ import annotations

import datetime
import uuid
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

import typer
from google.protobuf.timestamp_pb2 import Timestamp

from services.cli.client import Client, failures, pages
from services.cli.rendering import NANO, money, print_json, print_table
from services.cli.session import JsonOption, Session, StateDirOption, TimeoutOption
from services.runtime.errors import invalid
from sluice.inference.v1 import receipt_pb2
from sluice.metering.v1 import tenancy_service_pb2 as tenancy_pb2
from sluice.metering.v1 import usage_service_pb2 as usage_pb2

tenants = typer.Typer(no_args_is_help=True, help="Tenants: who pays, with their limits and balances.")
keys = typer.Typer(no_args_is_help=True, help="Keys: made, listed, revoked. A secret is shown once.")

BudgetOption = Annotated[str | None, typer.Option("--budget", help="Most that may be spent, in dollars, say 25 or 0.10.")]
RequestsOption = Annotated[int | None, typer.Option("--requests-per-minute", help="Rate limit; -1: unlimited.")]
TokensOption = Annotated[int | None, typer.Option("--tokens-per-minute", help="Rate limit; -1: unlimited.")]
ConcurrencyOption = Annotated[int | None, typer.Option("--concurrency", help="Requests at once; -1: unlimited.")]
ModelLimitOption = Annotated[
    list[str] | None,
    typer.Option(
        "--model-limit",
        metavar="MODEL:LIMITS",
        help="Limits of one model besides, say openai/gpt-5:requests=60,tokens=100000,concurrency=5. May be given again for others.",
    ),
]
_MODEL_LIMITS = {"requests": "requests_per_minute", "tokens": "tokens_per_minute", "concurrency": "concurrency"}


def dollars(text: str) -> int:
    """Nano-dollars of an amount in dollars. Raises Failure (REQUEST_INVALID) when it isn't one, or is finer than a nano-dollar."""
    try:
        nano = Decimal(text) * NANO
        if nano == nano.to_integral_value() and 0 <= nano < 1 << 63:
            return int(nano)
    except InvalidOperation:
        pass
    raise invalid("--budget", f"{text!r} is not an amount of dollars with at most 9 decimals")


def _model_limits(text: str) -> tenancy_pb2.ModelLimits:
    """Raises Failure (REQUEST_INVALID)."""
    model, _, limits = text.rpartition(":")
    found = tenancy_pb2.ModelLimits(model=model)
    for part in limits.split(","):
        name, _, value = part.partition("=")
        field = _MODEL_LIMITS.get(name.strip())
        try:
            number = int(value)
        except ValueError:
            field = None
        if not model or field is None:
            raise invalid(
                "--model-limit", f"{text!r} is not MODEL:LIMITS with LIMITS of {', '.join(f'{one}=N' for one in _MODEL_LIMITS)}"
            )
        setattr(found, field, number)
    return found


def _limits(
    budget: str | None,
    requests_per_minute: int | None,
    tokens_per_minute: int | None,
    concurrency: int | None,
    models: list[str] | None,
) -> tenancy_pb2.Limits:
    return tenancy_pb2.Limits(
        budget_nano_usd=None if budget is None else dollars(budget),
        requests_per_minute=requests_per_minute,
        tokens_per_minute=tokens_per_minute,
        concurrency=concurrency,
        models=[_model_limits(text) for text in models or ()],
    )


def _rate_words(limits: tenancy_pb2.Limits | tenancy_pb2.ModelLimits) -> list[str]:
    words = []
    for field, unit in (("requests_per_minute", "req/min"), ("tokens_per_minute", "tokens/min"), ("concurrency", "at once")):
        if limits.HasField(field):  # type: ignore[arg-type]  # the stub lists names as literals; these are some of them
            value = getattr(limits, field)
            words.append(f"{'unlimited' if value < 0 else value} {unit}")
    return words


def _limit_words(limits: tenancy_pb2.Limits) -> str:
    words = [money(limits.budget_nano_usd)] if limits.HasField("budget_nano_usd") else []
    words += _rate_words(limits)
    words += [f"{one.model}: {' + '.join(_rate_words(one))}" for one in limits.models]
    return ", ".join(words) or "defaults"


@tenants.command("list")
def list_tenants(state_dir: StateDirOption = None, timeout: TimeoutOption = 10.0, as_json: JsonOption = False) -> None:
    """Lists tenants with limits, spending and holds."""
    with Session(state_dir, timeout) as session:
        client = session.client
        request = tenancy_pb2.ListTenantsRequest()
        found = [t for page in pages(client.tenancy.ListTenants, request, client.as_admin, timeout) for t in page.tenants]
        if as_json:
            print_json(found)
            return
        print_table(
            session.console,
            ("tenant", "name", "limits", "spent", "held"),
            [
                (t.id, t.display_name, _limit_words(t.limits), money(t.balance.spent_nano_usd), money(t.balance.held_nano_usd))
                for t in found
            ],
        )


@tenants.command("create")
def create_tenant(
    tenant: Annotated[str, typer.Argument(help="Id of the new tenant: a-z, 0-9, - and _.")],
    name: Annotated[str, typer.Option(help="Name for people.")] = "",
    budget: BudgetOption = None,
    requests_per_minute: RequestsOption = None,
    tokens_per_minute: TokensOption = None,
    concurrency: ConcurrencyOption = None,
    model_limit: ModelLimitOption = None,
    state_dir: StateDirOption = None,
    timeout: TimeoutOption = 10.0,
) -> None:
    """Makes a tenant with a project `default`."""
    limits = _limits(budget, requests_per_minute, tokens_per_minute, concurrency, model_limit)
    with Session(state_dir, timeout) as session, failures():
        client = session.client
        made = client.tenancy.CreateTenant(
            tenancy_pb2.CreateTenantRequest(
                request_id=f"cli-{uuid.uuid4().hex}", tenant=tenancy_pb2.Tenant(id=tenant, display_name=name, limits=limits)
            ),
            timeout=timeout,
            metadata=client.as_admin,
        ).tenant
        _ensure_project(client, made.id, "default", timeout)
        session.console.print(
            f"Tenant {made.id} made: {_limit_words(made.limits)}. Next: sluice keys create --tenant {made.id}"
        )


def _ensure_project(client: Client, tenant: str, project: str, timeout: float) -> None:
    request = tenancy_pb2.ListProjectsRequest(tenant_id=tenant)
    for page in pages(client.tenancy.ListProjects, request, client.as_admin, timeout):
        if any(known.id == project for known in page.projects):
            return
    client.tenancy.CreateProject(
        tenancy_pb2.CreateProjectRequest(
            request_id=f"cli-{tenant}-{project}", project=tenancy_pb2.Project(id=project, tenant_id=tenant)
        ),
        timeout=timeout,
        metadata=client.as_admin,
    )


@tenants.command("update")
def update_tenant(
    tenant: Annotated[str, typer.Argument(help="Id of the tenant.")],
    budget: BudgetOption = None,
    requests_per_minute: RequestsOption = None,
    tokens_per_minute: TokensOption = None,
    concurrency: ConcurrencyOption = None,
    model_limit: ModelLimitOption = None,
    state_dir: StateDirOption = None,
    timeout: TimeoutOption = 10.0,
) -> None:
    """Changes a tenant's limits; those not named stay as they are."""
    limits = _limits(budget, requests_per_minute, tokens_per_minute, concurrency, model_limit)
    changed = [f"limits.{field.name}" for field, _ in limits.ListFields()]
    if not changed:
        raise invalid("limits", "name at least one limit to change; see --help")
    request = tenancy_pb2.UpdateTenantRequest(tenant=tenancy_pb2.Tenant(id=tenant, limits=limits))
    request.update_mask.paths.extend(changed)
    with Session(state_dir, timeout) as session, failures():
        client = session.client
        made = client.tenancy.UpdateTenant(request, timeout=timeout, metadata=client.as_admin).tenant
        session.console.print(f"Tenant {made.id}: {_limit_words(made.limits)}")


@keys.command("list")
def list_keys(
    tenant: Annotated[str, typer.Option(help="Whose keys.")] = "default",
    state_dir: StateDirOption = None,
    timeout: TimeoutOption = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Lists keys of a tenant, never their secrets."""
    with Session(state_dir, timeout) as session:
        client = session.client
        request = tenancy_pb2.ListKeysRequest(tenant_id=tenant)
        found = [k for page in pages(client.tenancy.ListKeys, request, client.as_admin, timeout) for k in page.keys]
        if as_json:
            print_json(found)
            return
        print_table(
            session.console,
            ("key", "hint", "project", "scopes", "models", "limits", "spent", "state"),
            [
                (
                    k.id,
                    k.secret_hint,
                    k.project_id,
                    " ".join(k.scopes),
                    " ".join(k.allowed_models) or "all",
                    _limit_words(k.limits),
                    money(k.balance.spent_nano_usd),
                    "revoked" if k.HasField("revoke_time") else "active",
                )
                for k in found
            ],
        )


@keys.command("create")
def create_key(
    tenant: Annotated[str, typer.Option(help="Tenant that pays.")] = "default",
    project: Annotated[str, typer.Option(help="Its project.")] = "default",
    name: Annotated[str, typer.Option(help="Name for people.")] = "",
    scope: Annotated[
        list[str] | None, typer.Option(help="inference, jobs or usage; repeat for more. All when none is named.")
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="Model or policy/NAME that it may use; repeat for more. All when none.")
    ] = None,
    expires_in_days: Annotated[int | None, typer.Option(help="Days until it ends; never when absent.")] = None,
    budget: BudgetOption = None,
    requests_per_minute: RequestsOption = None,
    tokens_per_minute: TokensOption = None,
    concurrency: ConcurrencyOption = None,
    model_limit: ModelLimitOption = None,
    state_dir: StateDirOption = None,
    timeout: TimeoutOption = 10.0,
) -> None:
    """Makes a key and prints its secret, this once."""
    key = tenancy_pb2.Key(
        tenant_id=tenant,
        project_id=project,
        display_name=name,
        scopes=scope or ["inference", "jobs", "usage"],
        allowed_models=model or [],
        limits=_limits(budget, requests_per_minute, tokens_per_minute, concurrency, model_limit),
    )
    if expires_in_days is not None:
        key.expire_time.FromDatetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=expires_in_days))
    with Session(state_dir, timeout) as session, failures():
        client = session.client
        made = client.tenancy.CreateKey(tenancy_pb2.CreateKeyRequest(key=key), timeout=timeout, metadata=client.as_admin)
        session.errors.print(f"Key {made.key.id} of {tenant}/{project}. Its secret is shown only now:")
        print(made.secret)


@keys.command("revoke")
def revoke_key(
    key: Annotated[str, typer.Argument(help="Id of the key.")],
    state_dir: StateDirOption = None,
    timeout: TimeoutOption = 10.0,
) -> None:
    """Ends a key: within 1 s while NATS is up, else within 30 s."""
    with Session(state_dir, timeout) as session, failures():
        client = session.client
        made = client.tenancy.RevokeKey(tenancy_pb2.RevokeKeyRequest(key_id=key), timeout=timeout, metadata=client.as_admin)
        session.console.print(f"Key {made.key.id} is revoked.")


_DIMENSIONS = {
    "tenant": usage_pb2.USAGE_DIMENSION_TENANT,
    "project": usage_pb2.USAGE_DIMENSION_PROJECT,
    "key": usage_pb2.USAGE_DIMENSION_KEY,
    "model": usage_pb2.USAGE_DIMENSION_MODEL,
    "task-type": usage_pb2.USAGE_DIMENSION_TASK_TYPE,
    "hour": usage_pb2.USAGE_DIMENSION_HOUR,
    "day": usage_pb2.USAGE_DIMENSION_DAY,
    "provider": usage_pb2.USAGE_DIMENSION_PROVIDER,
}
_TASK_TYPES = {name.removeprefix("TASK_TYPE_").lower(): number for name, number in receipt_pb2.TaskType.items()}


_ANY_TASK = "unspecified"
_TASK_NAMES = ", ".join(name for name in _TASK_TYPES if name != _ANY_TASK)


def moment(text: str, option: str) -> Timestamp:
    """A moment in ISO 8601, say `2026-11-23` or `2026-11-23T17:00:00Z`; UTC unless it says otherwise. Raises Failure (REQUEST_INVALID)."""
    found = Timestamp()
    try:
        parsed = datetime.datetime.fromisoformat(text)
        found.FromDatetime(parsed if parsed.tzinfo else parsed.replace(tzinfo=datetime.UTC))
    except (ValueError, OverflowError):
        raise invalid(option, f"{text!r} is no moment; give one as 2026-11-23 or 2026-11-23T17:00:00Z") from None
    return found


usage = typer.Typer(help="What was used and what it cost, out of the ledger.")


@usage.callback(invoke_without_command=True)
def summed(
    context: typer.Context,
    by: Annotated[list[str] | None, typer.Option(help=f"Group by: {', '.join(_DIMENSIONS)}; repeat for more.")] = None,
    tenant: Annotated[str, typer.Option(help="Only this tenant; all when empty.")] = "",
    project: Annotated[str, typer.Option(help="Only this project; all when empty.")] = "",
    key: Annotated[str, typer.Option(help="Only the key with this id; all when empty.")] = "",
    model: Annotated[str, typer.Option(help="Only this model; all when empty.")] = "",
    provider: Annotated[str, typer.Option(help="Only this provider; all when empty.")] = "",
    task_type: Annotated[str, typer.Option(help=f"Only this task type: {_TASK_NAMES}; all when empty.")] = "",
    days: Annotated[float, typer.Option(help="How far back, unless --start is given.", min=0)] = 30.0,
    start: Annotated[str, typer.Option(help="First moment, UTC, say 2026-11-23 or 2026-11-23T17:00:00Z.")] = "",
    end: Annotated[str, typer.Option(help="First moment no longer counted; now when empty.")] = "",
    state_dir: StateDirOption = None,
    timeout: TimeoutOption = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Requests, tokens, cost and savings out of the ledger.

    Cost per task is the cost by the requests that succeeded; fallbacks are the share of attempts that were a fallback or a retry.

    Examples: `sluice usage --by tenant --by task-type`, `sluice usage --by day --provider openai --start 2026-11-01 --end 2026-12-01`.
    """
    if context.invoked_subcommand is not None:
        return
    grouped = by or ["model"]
    for name in grouped:
        if name not in _DIMENSIONS:
            raise invalid("--by", f"{name!r} is not one of {', '.join(_DIMENSIONS)}")
    if task_type == _ANY_TASK or (task_type and task_type not in _TASK_TYPES):
        raise invalid("--task-type", f"{task_type!r} is not one of {_TASK_NAMES}")
    since = Timestamp()
    if start:
        since = moment(start, "--start")
    else:
        since.FromDatetime(datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days))
    until = moment(end, "--end") if end else None
    with Session(state_dir, timeout) as session:
        client = session.client
        request = usage_pb2.QueryUsageRequest(
            tenant_id=tenant,
            project_id=project,
            key_id=key,
            model=model,
            provider=provider,
            task_type=_TASK_TYPES[task_type or _ANY_TASK],
            start_time=since,
            end_time=until,
            group_by=[_DIMENSIONS[name] for name in grouped],
        )
        rows: list[Any] = [
            row for page in pages(client.usage.QueryUsage, request, client.as_admin, timeout) for row in page.rows
        ]
        if as_json:
            print_json(rows)
            return
        print_table(
            session.console,
            (
                *grouped,
                "requests",
                "cache hits",
                "attempts",
                "fallbacks",
                "tokens in",
                "cached",
                "tokens out",
                "cost",
                "per task",
                "saved",
            ),
            [
                (
                    *row.group_values,
                    row.request_count,
                    row.cache_hit_count,
                    row.attempt_count,
                    f"{row.fallback_count} ({row.fallback_share:.0%})",
                    row.usage.input_token_count,
                    row.usage.cached_input_token_count,
                    row.usage.output_token_count,
                    money(row.cost_nano_usd),
                    money(row.cost_per_task_nano_usd) if row.HasField("cost_per_task_nano_usd") else "-",
                    money(row.saved_nano_usd),
                )
                for row in rows
            ],
        )
