"""A server as NDIF is one: it has nnsight and the weights, and of a trace nothing but its bytes.

nnsight's own simulation runs the block in the caller's frame. This one runs what was unpacked, and sends back what was
saved there as bytes, of which only tensors and plain values are read.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.schema.request import RequestModel
from nnsight.tracing.backend import Backend
from nnsight.tracing.tracer import _saves


class Server:
    """Runs packed traces on its model; `sent` and `returned` are the sizes of what travelled, `said` the bytes."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self.sent: list[int] = []
        self.returned: list[int] = []
        self.said: list[bytes] = []

    def run(self, blob: bytes) -> bytes:
        hiding = LocalSimulationBackend(self.root)
        hidden = hiding._hide_local_modules()
        try:
            tracer = RequestModel.deserialize(blob, self.root._remoteable_persistent_objects())
        finally:
            hiding._restore(hidden)
        tracer.backend = Backend()
        tracer.execute(tracer.info.code)
        saved = {name: value for name, value in tracer.info.frame.f_locals.items() if id(value) in _saves()}
        answer = io.BytesIO()
        torch.save(saved, answer)
        self.sent.append(len(blob))
        self.returned.append(len(answer.getvalue()))
        self.said.append(blob)
        return answer.getvalue()


def connect(monkeypatch: Any, server: Server) -> None:
    """Everything between kt and NDIF's network happens; the network is this process."""
    from nnsight import CONFIG
    from nnsight.intervention.backends.remote import RemoteBackend

    def request(self: Any, _: Any, tracer: Any) -> Any:
        return self.finalize(server.run(self._serialize(tracer)))

    monkeypatch.setattr(CONFIG.API, "COMPRESS", False)
    monkeypatch.setattr(RemoteBackend, "request", request)
