"""One block of a checkpoint at a time, as a module that runs: a model larger than memory can be measured so.

Every piece is the family's own transformers class with fewer blocks (0 or 1) and without what does not belong to it,
so there is no code per family. Tensors are read when a piece is built and go with it. All pieces compute in fp32, on
the CPU, in evaluation mode.
"""

import contextlib
import copy
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from semiopen.errors import SemiopenError
from semiopen.model.checkpoint import weight_files
from semiopen.model.families import FAMILIES
from semiopen.model.parts import NoPositions
from semiopen.model.split import Part, causal_lm_class, cut_layers, split_config

_SMALL_VOCABULARY = 1  # of pieces whose embedding is never asked


class Checkpoint:
    """The tensors of a whole model in a folder, found by their headers and read when asked for.

    Attributes:
        config: the whole model's config.
        shapes: shape of each tensor, by its name without the base model's prefix.
        dtypes: dtype of each, as safetensors names it ("F16").
    """

    def __init__(self, folder: Path, config: PreTrainedConfig) -> None:
        """Read the headers of a checkpoint.

        Raises:
            UnsupportedModelError: a tensor belongs to no known part, or the model cannot be split.
            SemiopenError: weights are missing or damaged.
        """
        self.folder, self.config = folder, config
        self.family = FAMILIES[config.model_type]
        split = split_config(config, config.num_hidden_layers)
        self.architecture, self.tied, self._base = split.architecture, split.tied, split.base
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._places: dict[str, tuple[Path, str]] = {}
        for shard in weight_files(folder):
            with _opened(shard) as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    if split.place(name).part is Part.DROPPED:
                        continue
                    local = name.removeprefix(f"{self._base}.")
                    header = file.get_slice(name)
                    self.shapes[local] = tuple(header.get_shape())
                    self.dtypes[local] = str(header.get_dtype())
                    self._places[local] = (shard, name)
        self._check_complete()

    @property
    def num_layers(self) -> int:
        """Blocks of the model."""
        return self.config.num_hidden_layers

    @property
    def size(self) -> int:
        """Bytes of the checkpoint's files."""
        return sum(shard.stat().st_size for shard in {shard for shard, _ in self._places.values()})

    @property
    def shape_digest(self) -> str:
        """SHA-256, hex, of the model type and of every tensor's name and shape: equal for models of one shape."""
        lines = [self.config.model_type, *(f"{name} {list(self.shapes[name])}" for name in sorted(self.shapes))]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def block_of(self, name: str) -> int | None:
        """Number of the block that the tensor `name` is part of; None outside the blocks."""
        match = re.match(rf"{self.family.layers}\.(\d+)\.", name)
        return int(match[1]) if match else None

    def embedding(self, checkpoint: "Checkpoint | None" = None) -> PreTrainedModel:
        """What stands below the blocks: ids [B, T] -> states [B, T, H], positions and scaling included.

        Args:
            checkpoint: take the tensors from another model of the same shape; but the token embedding always is this
                model's own where it is tied to the open head, as anyone has it.
        """
        source = checkpoint or self
        tensors = source._read(self._below())
        if self.tied:
            tensors |= self._read([self._embedding_name])
        return self._build(0, 0, tensors)

    def fresh_embedding(self, seed: int) -> PreTrainedModel:
        """As `embedding`, freshly initialised; with this model's own token embedding where it is open."""
        model = self._fresh(0, 0, seed, self.config.vocab_size)
        if self.tied:
            tensor = self._read([self._embedding_name])[self._embedding_name]
            cast(nn.Embedding, model.get_input_embeddings()).weight.data = tensor.float()
        return model

    def block(self, index: int, checkpoint: "Checkpoint | None" = None) -> PreTrainedModel:
        """Block `index`, or another checkpoint's in its place: states [B, T, H] -> states [B, T, H]."""
        lead = f"{self.family.layers}.{index}."
        source = checkpoint or self
        read = source._read([name for name in source.shapes if name.startswith(lead)])
        tensors = {f"{self.family.layers}.0.{name.removeprefix(lead)}": tensor for name, tensor in read.items()}
        return self._build(index, index + 1, tensors)

    def fresh_block(self, index: int, seed: int) -> PreTrainedModel:
        """Block `index` as transformers initialises it in a new model of this config."""
        return self._fresh(index, index + 1, seed, _SMALL_VOCABULARY)

    def head(self) -> PreTrainedModel:
        """What stands above the blocks: states [B, T, H] -> logits [B, T, V]."""
        total = self.num_layers
        matrices = [self._embedding_name] if self.tied else self._head_names()
        norm = self._read([name for name in self.shapes if name.startswith(f"{self.family.norm}.")])
        config = self._piece_config(total, total, _SMALL_VOCABULARY)
        model = _load(causal_lm_class(self.config), config, {f"{self._base}.{name}": t for name, t in norm.items()})
        tensors = {name.rsplit(".", 1)[1]: tensor.float() for name, tensor in self._read(matrices).items()}
        projection = nn.Linear(1, 1, bias="bias" in tensors, device="meta")
        for name, tensor in tensors.items():
            setattr(projection, name, nn.Parameter(tensor, requires_grad=False))
        model.set_output_embeddings(projection)
        self._take_states(cast(PreTrainedModel, model.base_model))
        return model.eval()

    @property
    def _embedding_name(self) -> str:
        return f"{self.family.embedding}.weight"

    def _below(self) -> list[str]:
        return [f"{name}.weight" for name in (self.family.embedding, self.family.positions) if name]

    def _head_names(self) -> list[str]:
        return [name for name in self.shapes if name.split(".")[0] in self.family.heads]

    def _check_complete(self) -> None:
        blocks = [f"{self.family.layers}.{index}." for index in range(self.num_layers)]
        wanted = [*self._below(), f"{self.family.norm}.", *blocks]
        for part in wanted:
            if not any(name.startswith(part) for name in self.shapes):
                raise SemiopenError(f"{self.folder} has no tensor {part}*; fetch the model again.")
        if not self.tied and not self._head_names():
            raise SemiopenError(f"{self.folder} has no output projection; fetch the model again.")

    def _read(self, names: list[str]) -> dict[str, torch.Tensor]:
        """Tensors by name, read from as few files as hold them."""
        tensors = {}
        for shard in sorted({self._places[name][0] for name in names}):
            with _opened(shard) as file:
                for name in names:
                    if self._places[name][0] == shard:
                        tensors[name] = file.get_tensor(self._places[name][1])
        return tensors

    def _piece_config(self, start: int, stop: int, vocabulary: int) -> PreTrainedConfig:
        part = cut_layers(self.config, start, stop)
        part.tie_word_embeddings = False
        if vocabulary != part.vocab_size:
            part.vocab_size, part.pad_token_id = vocabulary, None
        return part

    def _build(self, start: int, stop: int, tensors: dict[str, torch.Tensor]) -> PreTrainedModel:
        vocabulary = self.config.vocab_size if start == stop else _SMALL_VOCABULARY
        model = _load(_decoder_class(self.config), self._piece_config(start, stop, vocabulary), tensors)
        return self._trim(model, start == stop)

    def _fresh(self, start: int, stop: int, seed: int, vocabulary: int) -> PreTrainedModel:
        with torch.random.fork_rng(devices=[]), _quiet():
            torch.manual_seed(seed)
            model = _decoder_class(self.config)._from_config(
                self._piece_config(start, stop, vocabulary), dtype=torch.float32
            )
            # Once more with the whole model's config: GPT-2's scale of initialisation depends on its depth.
            own = model.config
            model.config = copy.copy(self.config)
            model.apply(model._init_weights)
            model.config = own
        return self._trim(model, start == stop)

    def _trim(self, model: PreTrainedModel, embeds: bool) -> PreTrainedModel:
        """Leave out what is another piece's: the final norm, and below a block what the states have had already."""
        setattr(model, self.family.norm, nn.Identity())
        if not embeds:
            self._take_states(model)
        return model.eval().requires_grad_(False)

    def _take_states(self, decoder: PreTrainedModel) -> None:
        setattr(decoder, self.family.embedding, nn.Identity())
        if self.family.positions:
            setattr(decoder, self.family.positions, NoPositions())


def run_embedding(piece: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """States [B, T, H] fp32 of ids [B, T] int64."""
    return piece(input_ids=ids, use_cache=False).last_hidden_state


def run_block(piece: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """States [B, T, H] fp32 above the block, of those below it; every row starts at position 0, without padding."""
    return piece(inputs_embeds=states, use_cache=False).last_hidden_state


def run_head(piece: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """Logits [B, T, V] fp32 of the states above the last block."""
    return piece(inputs_embeds=states, use_cache=False).logits


def _decoder_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    return cast(type[PreTrainedModel], AutoModel._model_mapping[type(config)])


def _load(
    model_class: type[PreTrainedModel], config: PreTrainedConfig, tensors: dict[str, torch.Tensor]
) -> PreTrainedModel:
    """Build a piece around checkpoint tensors; transformers converts names and layouts (experts, above all)."""
    with torch.random.fork_rng(devices=[]), _quiet():
        model, info = model_class.from_pretrained(  # type: ignore[misc]
            None, config=config, state_dict=tensors, dtype=torch.float32, output_loading_info=True
        )
    layers = FAMILIES[config.model_type].layers
    lacking = sorted(name for name in info["missing_keys"] if f"{layers}." in name)
    if lacking or info["mismatched_keys"]:
        fault = lacking[0] if lacking else sorted(str(key) for key in info["mismatched_keys"])[0]
        raise SemiopenError(f"The checkpoint's tensors do not fit its config.json ({fault}); fetch the model again.")
    return cast(PreTrainedModel, model)


@contextlib.contextmanager
def _opened(shard: Path) -> Iterator[Any]:
    try:
        with safe_open(shard, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise SemiopenError(f"{shard} is damaged ({error}); fetch the model again.") from None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No reports from transformers, which would call another piece's tensors missing."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
