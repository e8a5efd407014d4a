from __future__ import annotations

import pytest

from services.runtime.admission import Admission
from services.runtime.errors import Failure, Reason


def test_places_are_bounded_and_come_back() -> None:
    admission = Admission(2)
    admission.enter()
    admission.enter()
    with pytest.raises(Failure) as raised:
        admission.enter()
    assert raised.value.reason is Reason.OVERLOADED
    assert raised.value.retry_delay is not None
    admission.leave()
    admission.enter()
    assert admission.open_count == 2
