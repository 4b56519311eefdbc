"""GPU tests need the built library and an sm_90 device; without them they are skipped with the reason."""

from __future__ import annotations

import pytest

from sa_export.errors import UserError


def _missing() -> str:
    from sa_export.kernels import find_library

    try:
        find_library()
    except UserError as error:
        return str(error)
    return ""


@pytest.fixture(scope="session")
def library() -> None:
    """Skips when the kernels are not built."""
    if reason := _missing():
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def _device(request: pytest.FixtureRequest) -> None:
    if request.node.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: the kernels were not run")
    any_device = getattr(request.module, "ANY_DEVICE", False) and torch.cuda.get_device_capability() >= (7, 5)
    if not any_device and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip(f"the kernels are built for compute capability 9.0, this device has {torch.cuda.get_device_capability()}")
    request.getfixturevalue("library")
