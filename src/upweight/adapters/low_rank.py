"""Low-rank adapters of peft (LoRA): W + s BA with W frozen, A (r, in) and B (out, r) trained.

The model depends on BA alone. Whatever invertible M, A → MA and B → BM⁻¹ leave it as it is, so R is flat along r²
directions a layer: C has as many eigenvalues 0 there, and no gradient leans on them, so that what damping adds to them
changes no value.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from upweight.errors import TheoryWarning, UnsupportedModel
from upweight.model.modules import chosen_parameters

_OURS = ("lora_", ".modules_to_save.")
_TABLES = (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B"))


def trained(model: torch.nn.Module, parameters: Any) -> Any:
    """What is explained where nothing is named: as it is, or the adapters of a model that was loaded frozen."""
    if parameters is not None or any(parameter.requires_grad for parameter in model.parameters()):
        return parameters
    found = [name for name, _ in model.named_parameters() if any(mark in name for mark in _OURS)]
    return found if any("lora_" in name for name in found) else None


def in_words(model: torch.nn.Module, parameters: Iterable[str] | Callable[[str], bool] | None) -> str:
    """How many directions are flat because of adapters, or nothing where there are none.

    Raises:
        UnsupportedModel: if adapters are merged or switched off, or trained by something that is no gradient.
    """
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A") and hasattr(layer, "active_adapters")
    ]
    if not layers:
        return ""
    for name, layer in layers:
        _refuse_out_of_graph(name, layer)
    chosen = {id(parameter) for parameter in chosen_parameters(model, parameters).values()}
    for name, layer in layers:
        if any(id(A) in chosen or id(B) in chosen for A, B in _pairs(layer)):
            _refuse_held_norms(name, layer)
    pairs = [(A, B) for _, layer in layers for A, B in _pairs(layer) if id(A) in chosen and id(B) in chosen]
    if not pairs:
        return ""
    if all(not bool(B.any()) for _, B in pairs):
        message = (
            f"The adapters of {type(model).__name__} are not trained yet: B is 0 in all {len(pairs)} of them, so the "
            "model is its base, and the gradient of every A is 0. Train them first, or load those that were: "
            "peft.PeftModel.from_pretrained(base, folder)."
        )
        warnings.warn(message, TheoryWarning, stacklevel=4)
    flat = sum(A.shape[0] ** 2 for A, _ in pairs)
    return f", LoRA: {flat} flat direction{'s' if flat > 1 else ''} (A → MA, B → BM⁻¹)"


def _refuse_out_of_graph(name: str, layer: Any) -> None:
    off = bool(getattr(layer, "disable_adapters", False))
    if off or getattr(layer, "merged", False) is True:
        state, call = ("switched off", "enable_adapter_layers") if off else ("merged into its base", "unmerge_adapter")
        message = (
            f"The adapter of '{name}' is {state}, so nothing that the model computes depends on it. "
            f"Call model.{call}() first."
        )
        raise UnsupportedModel(message)


def _refuse_held_norms(name: str, layer: Any) -> None:
    if any(getattr(layer, "use_dora", {}).get(adapter, False) for adapter in layer.active_adapters):
        message = (
            f"The adapter of '{name}' is a DoRA, whose norm of W + BA is detached: A and B were trained along what is "
            "the gradient of no loss. Explain the magnitudes alone, whose gradient is whole: parameters=lambda name: "
            "'lora_magnitude' in name; or train with LoraConfig(use_dora=False)."
        )
        raise UnsupportedModel(message)


def _pairs(layer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """A and B of every active adapter of a layer."""
    for first, second in _TABLES:
        As, Bs = getattr(layer, first, {}), getattr(layer, second, {})
        for adapter in layer.active_adapters:
            if adapter in As and adapter in Bs:
                A, B = As[adapter], Bs[adapter]
                yield getattr(A, "weight", A), getattr(B, "weight", B)
