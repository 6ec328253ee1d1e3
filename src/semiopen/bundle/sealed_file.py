"""The layout of a sealed file: a safetensors container whose head follows from the manifest alone.

Writer and reader compute the same head. The reader compares instead of parsing, so no length or offset from
an untrusted disk is ever used inside the enclave.
"""

import json
import struct
from collections.abc import Sequence

from semiopen.bundle.manifest import SealedTensor
from semiopen.bundle.primitives import sealed_size


def sealed_layout(tensors: Sequence[SealedTensor]) -> tuple[bytes, list[int]]:
    """The head of a sealed file and where each tensor's ciphertext starts.

    Args:
        tensors: the tensors of one sealed file, in the manifest's order.

    Returns:
        The file's first bytes, and one offset more than there are tensors, in bytes from the start of the
        file; the last is the file's size.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "semiopen-sealed"}}
    start = 0
    ends = [start]
    for tensor in tensors:
        size = sealed_size(tensor.plain_bytes)
        entries[tensor.name] = {"dtype": "U8", "shape": [size], "data_offsets": [start, start + size]}
        start += size
        ends.append(start)
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)  # safetensors aligns its data to 8 bytes
    head = struct.pack("<Q", len(text)) + text
    return head, [len(head) + end for end in ends]
