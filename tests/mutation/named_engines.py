"""Named errors in engines that are elsewhere: weights on their way, and who may send them. A row: name, what it is, the
text, what replaces it, tests."""

from __future__ import annotations

V = "plugins/rlhf_plugins/engines/vllm"
T = "tests/plugins/engines"
GROUP = f"{T}/test_engines_vllm_group.py"

PACKING = (
    ("packing: a tensor lies in the one before", "weights are overwritten on their way",
     "start = -(-end // _ALIGN) * _ALIGN", "start = end // _ALIGN * _ALIGN"),
    ("packing: a bucket is never full", "a buffer grows to a whole model",
     "if places and start + tensor.nbytes > self._size:", "if places and start + tensor.nbytes > 1 << 60:"),
    ("packing: a place beyond the end is there", "a number is read out of another's memory",
     "if end > len(buffer):", "if end > len(buffer) + 4096:"),
)  # fmt: skip

GROUPS = (
    ("group: a worker sends", "everybody gets the weights that nobody trained", "options.rootRank = 0",
     "options.rootRank = 1"),
    ("group: a store listens everywhere", "a stranger finds it", "socket.create_server((host, 0))",
     'socket.create_server(("", 0))'),
    ("group: versions may differ", "NCCL hangs at its first broadcast", 'len(set(libraries)) > 1 or "no NCCL" in',
     '"no NCCL" in'),
    ("group: two may share a GPU", "NCCL hangs at its start", "len(set(devices)) < len(devices)",
     "len(set(devices)) < 1"),
    ("group: a meeting that is over goes on", "workers wait for one who is gone", 'if self._store.check(["over"]):',
     "if not self._store:"),
    ("group: nobody looks", "an engine that is gone is waited for to the deadline", "if now - looked > _LOOK:",
     "if looked - now > _LOOK:"),
)  # fmt: skip

SERVICE = (
    ("service: whoever met the workers last is anybody", "a run loads its weights over another's",
     "if self._meeting is None or self._meeting.name != name:", "if self._meeting is None:"),
    ("service: a meeting leaves a load as it is", "who comes after one that was killed waits for it",
     "        load.broken = why\n", "        pass\n"),
    ("service: loads of both sorts are alike", "a bucket is taken for where it is",
     "if fetched not in (None, load.fetched):", "if fetched is load:"),
    ("service: tensors aren't counted", "weights that were lost are missed by nobody",
     "load.tensors += len(asked.places)", "load.tensors += 1"),
    ("service: one text of many is enough", "a worker that heard nothing is taken to have heard",
     "return wire.Seen(all(hmac", "return wire.Seen(not all(hmac"),
)  # fmt: skip

TABLES = (
    (f"{V}/packing.py", (GROUP, f"{T}/test_engines_vllm_ipc.py"), PACKING),
    (f"{V}/group.py", (GROUP,), GROUPS),
    (f"{V}/service.py", (GROUP,), SERVICE),
)
