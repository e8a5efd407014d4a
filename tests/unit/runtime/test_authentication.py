from __future__ import annotations

import pytest

from services.runtime.authentication import ACCESS, Access, Authenticator, check
from services.runtime.call import ADMIN, ANONYMOUS, Caller, CallerKind
from services.runtime.errors import Code, Failure, Reason
from tests.unit.runtime.fakes import ADMIN_KEY, SERVICE_TOKEN, SETTINGS

AUTHENTICATOR = Authenticator(SERVICE_TOKEN, SETTINGS.admin_key_sha256)
SERVICE = Caller(CallerKind.SERVICE, "routing")


@pytest.mark.parametrize(
    ("metadata", "caller"),
    [
        ({}, ANONYMOUS),
        ({"authorization": SERVICE_TOKEN}, ANONYMOUS),
        ({"authorization": f"Basic {SERVICE_TOKEN}"}, ANONYMOUS),
        ({"authorization": "Bearer "}, ANONYMOUS),
        ({"authorization": "Bearer sk-sluice-x"}, ANONYMOUS),
        ({"authorization": f"Bearer {SERVICE_TOKEN}x"}, ANONYMOUS),
        ({"x-sluice-service": "routing"}, ANONYMOUS),
        ({"authorization": f"Bearer {SETTINGS.admin_key_sha256}"}, ANONYMOUS),
        ({"authorization": f"Bearer {SERVICE_TOKEN}", "x-sluice-service": "routing"}, SERVICE),
        ({"authorization": f"Bearer {ADMIN_KEY}"}, ADMIN),
    ],
)
def test_who_calls(metadata: dict[str, str], caller: Caller) -> None:
    assert AUTHENTICATOR.caller(metadata) == caller


def test_empty_secrets_prove_nothing() -> None:
    assert Authenticator("", "").caller({"authorization": "Bearer "}) is ANONYMOUS


@pytest.mark.parametrize("service", sorted(ACCESS))
@pytest.mark.parametrize("caller", [ANONYMOUS, SERVICE, ADMIN])
def test_who_may(service: str, caller: Caller) -> None:
    if ACCESS[service] is Access.ANYONE or caller is not ANONYMOUS:
        check(service, caller)
        return
    with pytest.raises(Failure) as raised:
        check(service, caller)
    assert (raised.value.reason, raised.value.code) == (Reason.SERVICE_IDENTITY, Code.UNAUTHENTICATED)


@pytest.mark.parametrize("caller", [ANONYMOUS, SERVICE, ADMIN])
def test_a_service_that_is_not_listed_lets_nobody_in(caller: Caller) -> None:
    with pytest.raises(Failure):
        check("sluice.new.v1.NewService", caller)
