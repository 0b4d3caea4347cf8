"""Remote models: NDIF holds the weights and runs the traces that nnsight sends (https://ndif.us).

The local model is a structure without weights, built from its config. A trace is sent as the source of its block with
the objects it names: envoys by path, tensors, functions. Tensors come back. Weights at NDIF are shared: they cannot be
written, and kt neither trains on them nor generates with them.

`remote="local"` is nnsight's simulation: traces are packed and unpacked as for a server, then run in a local model.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import KtError, UnknownModel, WorkFailed, said_by
from .explained import settle
from .finding import find_layout
from .model import TracedModel
from .tokens import Batch
from .validation import understood, validate
from .weights import Address

REASON = "weights on NDIF are shared: they can be read by a trace and not written, trained on or generated with"


class RemoteModel(TracedModel):
    """The traced model of a structure without weights. Made by `kt.load(..., remote=True)`."""

    remote = True

    def __init__(
        self,
        root: Any,
        module: nn.Module,
        tokenizer: Any,
        name: str,
        revision: str | None,
        model_key: str | None,
        layout: Mapping[str, str] | None = None,
    ) -> None:
        """`model_key` is NDIF's name of the model; None is the local simulation."""
        self.root, self.module, self.tokenizer = root, module, tokenizer
        self.name, self.revision, self.model_key = name, revision, model_key
        self.layout = find_layout(module, layout)
        with understood(module):
            self.layout = validate(self)
            self.layout = settle(self)

    @property
    def nnsight(self) -> Any:
        self.require_weights("this")

    def require_weights(self, what: str) -> None:
        """Raises:
        KtError: always.
        """
        raise KtError(f"{self.name} is remote, and {what} needs its weights here: {REASON}; load it without remote")

    def backend(self) -> Any:
        """The backend that sends a trace; kt's functions in its block are sent as source."""
        from nnsight import ndif

        ndif.register("kt")
        if self.model_key is None:
            from nnsight.intervention.backends.local import LocalSimulationBackend

            return LocalSimulationBackend(self.root)
        return _sending(self.model_key, self.root._remoteable_get_env())

    @property
    def device(self) -> torch.device:
        """The device of inputs and results."""
        return torch.device("cpu")

    @cached_property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        """The dtype of the remote embeddings, which may differ from the config's."""
        return self.embedded(torch.zeros((1, 1), dtype=torch.long)).dtype

    @torch.no_grad()
    def embedded(self, ids: Int[Tensor, "row pos"]) -> Float[Tensor, "row pos d_embed"]:
        return self.gather(Batch(ids, torch.ones_like(ids)), [(self.embed, "output")])[0].cpu()

    def generate(self, *args: Any, **options: Any) -> list[str]:
        """Not available for a remote model: raises KtError."""
        return self.nnsight

    def _parameter(self, name: str) -> nn.Parameter:
        super()._parameter(name)
        return self.nnsight

    def fingerprint(self, addresses: Iterable[Address] | None = None) -> str:
        """`remote:` and a hash of id, revision and config, since the weights themselves cannot be hashed."""
        if addresses is not None:
            return self.nnsight
        config = self.module.config
        identity = [self.name, self.revision, getattr(config, "_commit_hash", None), config.to_dict()]
        return "remote:" + hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def load_remote(
    model: str | Path | nn.Module,
    where: bool | str,
    revision: str | None,
    trust_remote_code: bool,
    tokenizer: Any,
    layout: Mapping[str, str] | None = None,
) -> RemoteModel:
    """`kt.load` of a model at NDIF (`where` is True); see `simulated` for nnsight's local simulation.

    Raises:
        KtError: no key for NDIF, or another `where`.
        UnknownModel: the Hub has no config of that name.
        WorkFailed: NDIF cannot be reached, or does not serve the model.
    """
    if where is not True:
        raise KtError(f"remote is {where!r}; give True for NDIF, or 'local' for nnsight's simulation of it")
    from .hub import load_tokenizer, one_line, split_revision

    if isinstance(model, nn.Module) or model == "demo" or Path(model).exists():
        raise UnknownModel("a remote model is named by its Hub id: NDIF has no file of this machine; leave remote out")
    name, revision = split_revision(model, revision)
    _require_key()
    with one_line(name):
        from nnsight import TransformersModel

        tokenizer = tokenizer or load_tokenizer(name, name, revision, trust_remote_code)
        options = {"trust_remote_code": True} if trust_remote_code else {}
        root = TransformersModel(name, revision=revision, tokenizer=tokenizer, task="text-generation", **options)
        key = root.to_model_key()
    return RemoteModel(root, root._module, tokenizer, name, revision, key, layout)


def simulated(
    real: TracedModel, trust_remote_code: bool = False, layout: Mapping[str, str] | None = None
) -> RemoteModel:
    """A loaded model behind nnsight's local simulation of NDIF."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        structure = AutoModelForCausalLM.from_config(real.module.config, trust_remote_code=trust_remote_code)
    return RemoteModel(real.root, structure.eval(), real.tokenizer, real.name, real.revision, None, layout)


def _require_key() -> None:
    from nnsight import CONFIG

    if not CONFIG.API.APIKEY:
        raise KtError("NDIF needs a key: set NDIF_API_KEY, or run `nnsight login` once (keys: https://login.ndif.us)")


def _sending(key: str, env: dict[str, Any]) -> Any:
    """The backend of NDIF. Its class is defined here because its base class is imported late."""
    from nnsight.intervention.backends.remote import RemoteBackend

    class Sending(RemoteBackend):
        """Prints nothing, and raises every failure as one line."""

        def __call__(self, tracer: Any = None) -> Any:
            self.display.enabled = False
            with _one_line(self.host), _tensors_only():
                return super().__call__(tracer)

    try:
        return Sending(key, env=env)
    except ValueError as error:
        raise KtError(f"{error}; correct NDIF_HOST") from None


@contextmanager
def _one_line(host: str) -> Iterator[None]:
    """Turn failures of the connection or the server into a one-line WorkFailed."""
    import httpx
    import websocket
    from nnsight.intervention.backends.remote import RemoteError

    try:
        yield
    except Exception as error:
        message = said_by(error)
        if type(error).__name__ == "UnpicklingError":  # compared by name, since kt never imports pickle
            raise WorkFailed(
                f"NDIF ({host}) answered with more than tensors, which was not opened; ask its "
                "operators, or load the model here (without --remote)"
            ) from error
        if isinstance(error, RemoteError | httpx.HTTPError | websocket.WebSocketException | OSError):
            raise WorkFailed(
                f"NDIF ({host}) did not run the trace: {message}; see that the key is valid and that "
                "the model is served there (nnsight.status())"
            ) from error
        raise


FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


@contextmanager
def _tensors_only() -> Iterator[None]:
    """Let torch load only tensors and plain values from the server's answer."""
    before = os.environ.get(FORCED)
    os.environ[FORCED] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FORCED]
        else:
            os.environ[FORCED] = before
