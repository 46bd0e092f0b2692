"""What holds while PyTorch traces."""

from __future__ import annotations

import gc

import pytest

from medusa_export.trace.quiet import without_garbage_collection


@pytest.mark.parametrize("was_enabled", [True, False])
def test_garbage_is_looked_for_again_afterwards_unless_it_was_not_before(was_enabled: bool) -> None:
    (gc.enable if was_enabled else gc.disable)()
    try:
        with pytest.raises(KeyboardInterrupt), without_garbage_collection():
            assert not gc.isenabled()
            raise KeyboardInterrupt
        assert gc.isenabled() == was_enabled
    finally:
        gc.enable()
