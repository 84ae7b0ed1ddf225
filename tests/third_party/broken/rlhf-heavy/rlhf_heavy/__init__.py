import torch  # noqa: F401 - the fault this package is for

from rlhf.api import TrackerEntry, hookimpl


@hookimpl
def rlhf_trackers():
    yield TrackerEntry(name="fake-heavy", summary="imports torch in its entry module", impl="rlhf_heavy:Heavy")
