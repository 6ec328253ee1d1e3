"""Element types by their safetensors names, and tensors as plain bytes. Nothing here converts a value."""

import torch

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype.

    Raises:
        ValueError: the bundle format has no such dtype.
    """
    if dtype not in _NAMES:
        raise ValueError(f"Tensors of {dtype} cannot be stored in a bundle; convert them first.")
    return _NAMES[dtype]


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor as a view of its own memory: writable, format "B", no copy."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu"
    array = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)  # pyright: ignore[reportArgumentType] - numpy's buffer is untyped before Python 3.12
