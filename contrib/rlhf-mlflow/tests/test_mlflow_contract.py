"""MLflow keeps the contract that anybody's must."""

from __future__ import annotations

import pytest

from rlhf.testing import TrackerContract

pytest.importorskip("mlflow", reason="MLflow isn't installed; `nox -s contrib` installs it")
pytestmark = pytest.mark.matrix_full  # it starts runs


class TestMLflow(TrackerContract):
    name = "mlflow"
