"""What clients are told of the runtime's errors."""

from __future__ import annotations

import pytest

from medusa_runtime import BackendError, ClosedError, DeviceLostError, MedusaError
from medusa_serve.errors import ApiError


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (DeviceLostError("the GPU was lost"), 503, "device_lost"),  # another server may have one
        (BackendError("a step failed"), 500, None),
        (ClosedError("the model is closed"), 503, "not_running"),
    ],
)
def test_errors_have_their_status(error: MedusaError, status: int, code: str | None) -> None:
    told = ApiError.of(error, while_decoding=True)
    assert (told.status, told.code, told.message) == (status, code, str(error))
    assert ("Retry-After" in told.headers) == (status == 503)
