"""Finding the weights in a folder of an original, unsealed model."""

import json
from pathlib import Path

from semiopen.errors import SemiopenError


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in order.

    Raises:
        SemiopenError: there are none, or one that the index names is missing.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise SemiopenError(f"{folder} lacks {missing[0]}, which its index names; fetch the model again.")
        return [folder / name for name in names]
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    other = "; convert its .bin files to safetensors first" if list(folder.glob("*.bin")) else ""
    raise SemiopenError(f"{folder} has no weights in safetensors{other or '; give a complete model folder'}.")
