"""Keys and settlements for tests."""

from __future__ import annotations

import hashlib

from services.metering.accounts import Key, Limits, Payer, key_account
from services.metering.ledger import Entry, Replica, Settlement

NOW = 1_700_000_000.0
"""A Tuesday in November 2023, Unix seconds."""
HOUR = 3600.0
ACME = "acme"
PAYER = Payer(ACME, "default", "key-1")
HOLDER = Replica("gateway", "first")


def key(
    key_id: str = "key-1",
    *,
    tenant_id: str = ACME,
    project_id: str = "default",
    limits: Limits | None = None,
    sha256: bytes | None = None,
    expire_time: float | None = NOW + HOUR,
    scopes: tuple[str, ...] = ("inference", "usage"),
) -> Key:
    """A key whose secret is its id."""
    return Key(
        id=key_id,
        sha256=hashlib.sha256(key_id.encode()).digest() if sha256 is None else sha256,
        tenant_id=tenant_id,
        project_id=project_id,
        display_name=f"Key {key_id}",
        secret_hint=key_id[-4:],
        scopes=scopes,
        allowed_models=("a/x", "policy/cheap"),
        limits=limits or Limits(),
        create_time=NOW,
        expire_time=expire_time,
        cache_namespace="shop",
    )


def settlement(
    attempt_id: str,
    *,
    amount: int,
    payer: Payer = PAYER,
    debit: str = "",
    model: str = "a/x",
    tokens: int = 100,
    lease_id: str = "",
    hold_id: str = "",
    final: bool = True,
    saved: int = 0,
    cache_status: int = 0,
    attempt_number: int = 1,
    usage_source: int = 1,
    start_micros: int = int(NOW * 1e6),
    request_key: bytes = b"",
    outcome: int = 1,
    observed: tuple[int | None, int | None] = (90, 8),
    provider: str = "a",
    task_type: int = 2,
) -> Settlement:
    """A settlement of `attempt_id`, which is `<operation>/<n>`."""
    entry = Entry(
        attempt_id=attempt_id,
        operation_id=attempt_id.partition("/")[0],
        debit=debit or key_account(payer.key_id),
        credit="provider/a",
        amount=amount,
        tenant_id=payer.tenant_id,
        project_id=payer.project_id,
        key_id=payer.key_id,
        model=model,
        provider=provider,
        input_tokens=tokens,
        cached_tokens=1,
        cache_write_tokens=2,
        output_tokens=3,
        reasoning_tokens=4,
        images=5,
        usage_source=usage_source,
        price_version="v1",
        start_micros=start_micros,
        duration_micros=1500,
        outcome=outcome,
        error_reason=0,
        task_type=task_type,
        saved=saved,
        cache_status=cache_status,
        attempt_number=attempt_number,
        flags="",
        post_micros=start_micros + 2000,
        observed_input=observed[0],
        observed_output=observed[1],
    )
    return Settlement(entry, lease_id, hold_id, final, request_key)
