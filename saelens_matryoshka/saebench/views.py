"""A transcoder shown to SAEBench, which knows only SAEs: one hook, read and reconstructed.

A transcoder reads a source x and predicts a target y. Two views make an SAE of it, each for the evals
whose code it fits:

- `PairView` is an SAE of a virtual hook that carries `[x | y]`. It encodes x and decodes to y (zeros on
  x), so whatever is ablated, projected or probed is so in the target's space. For activations that are
  collected first and encoded later: probing, absorption, SCR and TPP.
- `OutputView` is an SAE of the target's hook. It encodes the x that was seen in the same forward pass as
  the y it is given. For `core`, which replaces and ablates the hook: CE, KL and explained variance are
  then those of y itself.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sae_lens import SAE
from torch import nn
from transformer_lens import HookedTransformer
from transformer_lens.hook_points import HookPoint

from saelens_matryoshka.sites import block_hook


def is_transcoder(sae: SAE[Any]) -> bool:
    """Whether the model predicts another hook than the one it reads."""
    metadata = sae.cfg.metadata
    return metadata.hook_name_out not in (None, metadata.hook_name)


def layer_of(hook_name: str) -> int:
    """Index of the block that a hook is in.

    Raises:
        ValueError: The hook is not in a block. SAEBench stops the forward pass after the hook's block.
    """
    block = block_hook(hook_name)
    if block is None:
        raise ValueError(f"hook_name={hook_name!r} is not in a block: SAEBench needs a hook 'blocks.L....'.")
    return block[0]


class _View(nn.Module):
    """What SAEBench asks of an SAE, answered for a transcoder."""

    def __init__(self, transcoder: SAE[Any], hook_name: str, d_in: int) -> None:
        super().__init__()
        self.transcoder = transcoder
        self.cfg = copy.deepcopy(transcoder.cfg)
        self.cfg.d_in = d_in
        self.cfg.metadata.hook_name = hook_name
        self.cfg.metadata.hook_layer = layer_of(hook_name)

    @property
    def device(self) -> torch.device:
        return self.transcoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transcoder.dtype

    @property
    def b_enc(self) -> torch.Tensor:
        return self.transcoder.get_parameter("b_enc")

    def to(self, *args: Any, **kwargs: Any) -> _View:
        self.transcoder.to(*args, **kwargs)
        return self


class PairView(_View):
    """An SAE of a hook that carries `[x | y]`, `[..., d_in + d_out]`.

    `acts - decode(encode(acts))` and a change of a latent's activation act on the y part only. A skip
    transcoder's `W_skip x` is left out of `decode`: it does not depend on the latents, so it cancels in
    every difference that SCR and TPP take, and the other evals do not decode.
    """

    def __init__(self, transcoder: SAE[Any], hook_name: str) -> None:
        self.d_source = transcoder.cfg.d_in
        d_target = transcoder.W_dec.shape[-1]
        super().__init__(transcoder, hook_name, self.d_source + d_target)

    @property
    def W_enc(self) -> torch.Tensor:
        """`[d_in + d_out, d_sae]`, zero on y."""
        W_enc = self.transcoder.W_enc
        d_target = self.transcoder.W_dec.shape[-1]
        return torch.cat([W_enc, W_enc.new_zeros(d_target, W_enc.shape[-1])]).detach()

    @property
    def W_dec(self) -> torch.Tensor:
        """`[d_sae, d_in + d_out]`, zero on x."""
        return self._on_target(self.transcoder.W_dec).detach()

    def encode(self, pair: torch.Tensor) -> torch.Tensor:
        return self.transcoder.encode(pair[..., : self.d_source])

    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        return self._on_target(self.transcoder.decode(feature_acts))

    def forward(self, pair: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(pair))

    def _on_target(self, target: torch.Tensor) -> torch.Tensor:
        return torch.cat([target.new_zeros(*target.shape[:-1], self.d_source), target], dim=-1)


class _LastForward:
    """Source and target of the model's last forward pass."""

    def __init__(self) -> None:
        self.source: torch.Tensor | None = None
        self.target: torch.Tensor | None = None

    def read_source(self, x: torch.Tensor, hook: Any) -> None:  # noqa: ARG002
        self.source = x

    def read_target(self, y: torch.Tensor, hook: Any) -> None:  # noqa: ARG002
        self.target = y


class OutputView(_View):
    """An SAE of the target's hook, `[..., d_out]`, for targets of the model's last forward pass."""

    def __init__(self, transcoder: SAE[Any], seen: _LastForward) -> None:
        hook_name = transcoder.cfg.metadata.hook_name_out
        assert hook_name is not None
        super().__init__(transcoder, hook_name, transcoder.W_dec.shape[-1])
        self._seen = seen
        self._encoded: tuple[torch.Tensor, torch.Tensor] | None = None

    @property
    def W_enc(self) -> torch.Tensor:
        return self.transcoder.W_enc.detach()

    @property
    def W_dec(self) -> torch.Tensor:
        return self.transcoder.W_dec.detach()

    def encode(self, target: torch.Tensor) -> torch.Tensor:
        """Latents of the source that came with this target.

        Raises:
            RuntimeError: `target` is not the target of the model's last forward pass.
        """
        source, last = self._seen.source, self._seen.target
        if source is None or last is None or not _same(target, last):
            raise RuntimeError(
                "core: SAEBench encodes activations that are not those of the model's last forward pass, "
                "so their source is not known."
            )
        source = source.to(device=self.device)
        acts = self.transcoder.encode(source)
        self._encoded = (acts, source)
        return acts

    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """Prediction of the target, a skip transcoder's skip included."""
        prediction = self.transcoder.decode(feature_acts)
        W_skip = getattr(self.transcoder, "W_skip", None)
        if W_skip is None:
            return prediction
        if self._encoded is None or self._encoded[0] is not feature_acts:
            raise RuntimeError("core: SAEBench decodes other latents than it encoded last.")
        return prediction + self._encoded[1].to(prediction.dtype) @ W_skip.T

    def forward(self, target: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(target))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b.to(device=a.device, dtype=a.dtype))


@contextmanager
def output_view(model: HookedTransformer, transcoder: SAE[Any]) -> Iterator[OutputView]:
    """An `OutputView` of the transcoder; the model watches source and target meanwhile."""
    metadata, seen = transcoder.cfg.metadata, _LastForward()
    with (
        _watched(model, metadata.hook_name, seen.read_source),
        _watched(model, metadata.hook_name_out, seen.read_target),
    ):
        yield OutputView(transcoder, seen)


@contextmanager
def pair_view(model: HookedTransformer, transcoder: SAE[Any]) -> Iterator[PairView]:
    """A `PairView` of the transcoder; the model has the virtual hook `blocks.L.hook_pair` meanwhile.

    L is the target's block. What a hook function returns at the virtual hook replaces the target.
    """
    metadata = transcoder.cfg.metadata
    name = f"blocks.{layer_of(metadata.hook_name_out)}.hook_pair"
    point = HookPoint()
    point.name = name
    seen = _LastForward()

    def through_pair(y: torch.Tensor, hook: Any) -> torch.Tensor:  # noqa: ARG001
        x, seen.source = seen.source, None
        if x is None:
            raise RuntimeError(
                f"hook_name_out={metadata.hook_name_out!r} runs before hook_name={metadata.hook_name!r}."
            )
        return point(torch.cat([x, y], dim=-1))[..., x.shape[-1] :]

    model.mod_dict[name] = model.hook_dict[name] = point
    try:
        with (
            _watched(model, metadata.hook_name, seen.read_source),
            _watched(model, metadata.hook_name_out, through_pair),
        ):
            yield PairView(transcoder, name)
    finally:
        del model.mod_dict[name], model.hook_dict[name]


@contextmanager
def _watched(model: HookedTransformer, name: str, function: Any) -> Iterator[None]:
    """A permanent hook, in front of all others, for as long as the context lasts."""
    point = model.hook_dict[name]
    point.add_hook(function, is_permanent=True, prepend=True)
    handle = point.fwd_hooks[0]
    try:
        yield
    finally:
        handle.hook.remove()
        point.fwd_hooks = [other for other in point.fwd_hooks if other is not handle]


class HookAlias:
    """The model, except that what is asked of one hook is answered from another.

    SAEBench's absorption reads `blocks.L.hook_resid_post` whatever the SAE reads, and allocates
    `cfg.d_model` columns for it.
    """

    def __init__(self, model: HookedTransformer, alias: str, hook_name: str, width: int) -> None:
        self._model, self._alias, self._hook_name = model, alias, hook_name
        self.cfg = copy.copy(model.cfg)
        self.cfg.d_model = width

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def run_with_cache(
        self, *args: Any, names_filter: Any = None, **kwargs: Any
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """As HookedTransformer's, for a hook name or a list of them."""
        names = [names_filter] if isinstance(names_filter, str) else list(names_filter)
        real = {name: self._hook_name if name == self._alias else name for name in names}
        output, cache = self._model.run_with_cache(*args, names_filter=list(real.values()), **kwargs)
        return output, {name: cache[hook_name] for name, hook_name in real.items()}
