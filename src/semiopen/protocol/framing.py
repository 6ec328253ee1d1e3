"""Frames: how one control message is delimited on a byte stream (Unix socket, pipe; later vsock).

    frame   = magic "SOPN" | version u16 | length u32 | payload      (big-endian, payload = length bytes)
    payload = one JSON message, see `messages`

Nothing here interprets the payload. Lengths are bounded before anything is allocated.
"""

import struct

from semiopen.errors import ProtocolError

PROTOCOL_VERSION = 2
MAX_PAYLOAD = 64 * 1024  # bytes; control messages are small, tensors travel in shared memory

_HEADER = struct.Struct(">4sHI")
_MAGIC = b"SOPN"


def encode_frame(payload: bytes) -> bytes:
    """Return `payload` with its header.

    Raises:
        ValueError: the payload is larger than `MAX_PAYLOAD`.
    """
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a control message of {len(payload)} bytes exceeds the limit of {MAX_PAYLOAD}")
    return _HEADER.pack(_MAGIC, PROTOCOL_VERSION, len(payload)) + payload


class FrameDecoder:
    """Collects bytes as they arrive and yields whole payloads. Keeps at most one partial frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Add received bytes; return the payloads that are now complete, in order.

        Raises:
            ProtocolError: the stream is not in this protocol or version, or a frame is too large. The stream
                cannot be read further, so its connection must be closed.
        """
        self._buffer += data
        payloads = []
        while len(self._buffer) >= _HEADER.size:
            magic, version, length = _HEADER.unpack_from(self._buffer)
            if magic != _MAGIC:
                raise ProtocolError("The peer does not speak the semiopen protocol; check the socket path.")
            if version != PROTOCOL_VERSION:
                raise ProtocolError(
                    f"The peer speaks protocol version {version}, this side {PROTOCOL_VERSION}; "
                    "use the same semiopen release on both sides."
                )
            if length > MAX_PAYLOAD:
                raise ProtocolError(f"A frame of {length} bytes exceeds the limit of {MAX_PAYLOAD}.")
            if len(self._buffer) < _HEADER.size + length:
                break
            payloads.append(bytes(self._buffer[_HEADER.size : _HEADER.size + length]))
            del self._buffer[: _HEADER.size + length]
        return payloads
