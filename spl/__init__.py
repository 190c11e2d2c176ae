"""Soft Preference Learning: preference training that keeps a language model's diversity (arXiv 2511.08594).

The three names of a notebook live here and load on first use, so that `import spl` costs nothing::

    import lightning
    from spl import PreferenceDataModule, PreferenceModule

    lightning.Trainer(max_steps=20).fit(PreferenceModule("tiny", alpha=1.0), PreferenceDataModule("survey"))
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spl.data.base import PreferenceDataModule
    from spl.modules.preference import PreferenceModule
    from spl.objective.loss import SPLLoss, spl_loss

__version__ = "0.1.0"
__all__ = ["PreferenceDataModule", "PreferenceModule", "SPLLoss", "spl_loss"]

_HOMES = {
    "PreferenceDataModule": "spl.data.base",
    "PreferenceModule": "spl.modules.preference",
    "SPLLoss": "spl.objective.loss",
    "spl_loss": "spl.objective.loss",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'spl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
