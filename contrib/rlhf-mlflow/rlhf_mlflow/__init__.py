"""The manifest of `mlflow`; neither MLflow nor torch here."""

from __future__ import annotations

from collections.abc import Iterable

import attrs

from rlhf.api import TrackerEntry, hookimpl, option

_HINT = "pip install mlflow-skinny sqlalchemy alembic"


@attrs.frozen(kw_only=True)
class MLflowConfig:
    """Options of `mlflow`."""

    uri: str | None = option(
        None, help="where to: sqlite:///FILE.db or the http address of a server; left out, MLFLOW_TRACKING_URI where "
        "that is set, else mlflow.db beside the run's directory, which needs no network",
    )  # fmt: skip
    experiment: str = option("rlhf", help="name of the experiment that the run is put in; made where there is none")
    retries: int = option(
        2, help="how often a request to a server is made again before the run goes on without it, after waits that "
        "double; MLFLOW_HTTP_REQUEST_MAX_RETRIES goes before", ge=0,
    )  # fmt: skip


@hookimpl
def rlhf_trackers() -> Iterable[TrackerEntry]:
    yield TrackerEntry(
        name="mlflow",
        summary="metrics, options and status of the run in MLflow: a local SQLite file, or a server",
        config=MLflowConfig,
        impl="rlhf_mlflow.tracker:MLflow",
        modules={"mlflow": _HINT, "sqlalchemy": _HINT, "alembic": _HINT},
        api_version=1,
    )
