"""What a teacher said of a clip, kept on disk, so that it is asked once per clip and not once per epoch.

A clip's key names its file, window and crop, so the same key is the same clip. Augmented clips rarely repeat: a cache
pays where windows and crops are fixed (``crop: {center: 1.0}``, ``clips_per_video``), and costs room elsewhere.
"""

import hashlib
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class TeacherCache:
    """One safetensors file per clip, float16, below ``limit_gib`` in all; what does not fit is not kept.

    Args:
        folder: made when first written to. Several processes may share it: files are put in place whole.
        about: what else decides the values (teacher, taps): another text is another cache.
    """

    def __init__(self, folder: str, about: str, limit_gib: float) -> None:
        self.folder, self.about = Path(folder).expanduser(), about
        self.limit = limit_gib * 2**30
        self._used = sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))

    def _path(self, key: str) -> Path:
        return self.folder / f"{hashlib.sha256(f'{self.about}|{key}'.encode()).hexdigest()[:32]}.safetensors"

    def get(self, keys: list[str], device: torch.device) -> dict[str, Tensor] | None:
        """Everything that was kept of these clips, as one batch in float32; None unless all of them are there."""
        paths = [self._path(key) for key in keys]
        if not all(path.is_file() for path in paths):
            return None
        clips = [load_file(path) for path in paths]
        return {name: torch.stack([clip[name] for clip in clips]).to(device).float() for name in clips[0]}

    def put(self, keys: list[str], said: dict[str, Tensor]) -> None:
        """Keep what was said of these clips, one file each.

        Raises:
            OSError: the disk is full; names the folder.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for index, key in enumerate(keys):
            path = self._path(key)
            tensors = {name: value[index].to(torch.float16).cpu().contiguous() for name, value in said.items()}
            size = sum(tensor.nbytes for tensor in tensors.values())
            if path.is_file() or self._used + size > self.limit:
                continue
            temporary = path.with_suffix(f".{torch.initial_seed() % 10**9}.tmp")
            try:
                save_file(tensors, temporary)
                temporary.replace(path)
            except OSError as error:
                temporary.unlink(missing_ok=True)
                raise OSError(
                    f"{self.folder} cannot be written to ({error}); free some room or lower objective.cache_gib"
                ) from None
            self._used += size
