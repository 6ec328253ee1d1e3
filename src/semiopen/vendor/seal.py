"""Sealing: one pass over a checkpoint that writes a bundle, shard by shard."""

import json
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig

from semiopen.bundle.keys import load_sealing_key, load_signing_key
from semiopen.bundle.manifest import Manifest
from semiopen.bundle.primitives import KEY_BYTES
from semiopen.bundle.writer import BundleWriter
from semiopen.errors import SemiopenError, UnsupportedModelError
from semiopen.model.checkpoint import weight_files
from semiopen.model.kv_symmetries import KvFold
from semiopen.model.plan import PRESETS, Plan, plan_for
from semiopen.model.plan import Fold as FoldKind
from semiopen.model.plan import Head as HeadKind
from semiopen.model.plan import Kv as KvKind
from semiopen.model.sealed_tensors import SHUFFLE_NAME, UNMIX_NAME
from semiopen.model.split import Part, Split, check_supported, split_config
from semiopen.model.symmetries import TIED_HEAD_NAME, Fold
from semiopen.vendor.fold import check_customer, fold_checkpoint, fold_secret
from semiopen.vendor.shuffle import draw_order
from semiopen.vendor.sketch import REGISTRY_NAME, BundleRecord, Sketch, make_registry, register
from semiopen.version import VERSION

# Beside weights and config: what a hub folder holds that its users need. Everything else stays at the vendor.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
    "chat_template*",
    "README.md",
    "LICENSE*",
)

Progress = Callable[[str, int, int], None]  # what is done, bytes done, bytes in all


def seal(
    model: str | Path,
    out: str | Path,
    keys: str | Path,
    prefix: int | None = None,
    preset: str | None = None,
    progress: Progress | None = None,
    plan: str | Path | None = None,
    texts: str | Path | None = None,
    head: HeadKind | None = None,
    fold: FoldKind | None = None,
    customer: str | None = None,
    require_lease: bool = False,
    kv: KvKind | None = None,
) -> Manifest:
    """Seal a decoder model into a bundle.

    Peak memory is about one shard of the checkpoint plus the sealed part. Tensors keep their dtype, and, but for a
    keyed fold and a KV fold, every bit.

    A keyed bundle is recorded in the key folder under its customer, for `semiopen trace`. Neither the name nor the
    secret is in the bundle.

    Args:
        model: a folder with config.json and safetensors, or a hub id.
        out: folder of the bundle; must not exist.
        keys: key folder of the vendor, made by `semiopen keygen`.
        prefix: decoder blocks to seal, from the bottom; the token embedding is always sealed.
        preset: name of a plan instead of `prefix`; "bottom" when neither is given. "solid" measures the model first.
        progress: called as work goes on.
        plan: plan.json that `semiopen plan` wrote for a model of this shape, instead of `prefix` and `preset`.
        texts: file of texts that "solid" measures on; without, the model samples its own.
        head: "open", "shuffled" or "sealed", instead of the plan's.
        fold: "none" or "keyed", instead of the plan's.
        customer: for whom a keyed bundle is; their basis is drawn from this name and the sealing key.
        require_lease: no enclave shall open the bundle without a lease. Always so where the head is not open.
        kv: "plain", "folded" or "enclave", instead of the plan's. Its key is fresh for each bundle and kept nowhere.

    Returns:
        The manifest that was written.

    Raises:
        UnsupportedModelError: the model cannot be split exactly.
        SemiopenError: the model folder or the keys are not usable.
        ValueError: prefix or preset out of range, or more than one of prefix, preset and plan; a customer's name that
            cannot be used, or one without a keyed fold, or the other way round.
    """
    if fold is not None or preset in PRESETS:  # before anything is measured
        _check_customer(fold or PRESETS[preset or "bottom"].fold, customer)
    folder = find_model(model)
    config = read_config(folder)
    chosen = _choose_plan(folder, config, prefix, preset, plan, texts, head, fold, kv, progress)
    _check_customer(chosen.fold, customer)
    split = split_config(config, chosen.prefix, chosen.head, chosen.kv)
    shards = weight_files(folder)
    report = progress or (lambda what, done, total: None)
    total = sum(shard.stat().st_size for shard in shards)
    secret = fold_secret(Path(keys), customer) if customer is not None else None
    folded = fold_checkpoint(config, shards, secret) if secret is not None else None
    # Fresh, and not the customer's: nobody has to draw it again, and two bundles do not give each other away.
    unmixed_from = chosen.prefix if chosen.kv == "enclave" else None
    kv_fold = None if chosen.kv == "plain" else KvFold(config, secrets.token_bytes(KEY_BYTES), unmixed_from)
    sketch = Sketch(config, secret) if secret is not None else None
    if sketch is not None:
        make_registry(Path(keys) / REGISTRY_NAME)  # before the work, in case it cannot be
    writer = BundleWriter(Path(out), sealing_key=load_sealing_key(Path(keys)), signing_key=load_signing_key(Path(keys)))
    with writer:
        writer.add_file("config.json", bundle_config(split))
        for path in _companions(folder):
            writer.add_file(path.name, path.read_bytes())
        sealed: dict[str, torch.Tensor] = {}
        order = draw_order(config.vocab_size) if chosen.head == "shuffled" else None
        if order is not None:
            sealed[SHUFFLE_NAME] = order.to(torch.int32)
        if kv_fold is not None and unmixed_from is not None:
            unmix = [torch.from_numpy(kv_fold.unmix(block)) for block in range(unmixed_from, split.num_layers)]
            sealed[UNMIX_NAME] = torch.stack(unmix).to(torch.int32)
        done = 0
        for shard in shards:
            opened = {}
            for name, open_name, tensor in _stored(split, folded, kv_fold, shard):
                if sketch is not None:
                    sketch.add(name, tensor)
                if open_name is None:
                    sealed[name] = tensor
                else:
                    opened[open_name] = tensor if order is None else _shuffled(split, open_name, tensor, order)
            if opened:
                writer.add_open_shard(opened)
            done += shard.stat().st_size
            report("sealing", done, total)
        _check_complete(split, sealed)
        writer.add_sealed(sealed)
        manifest = writer.finish(
            plan=chosen,
            architecture=split.architecture,
            num_layers=split.num_layers,
            open_embedding=split.tied and chosen.head != "sealed",
            created_by=f"semiopen {VERSION}",
            lease_required=chosen.head != "open" or require_lease,
            progress=lambda done, total: report("signing", done, total),
        )
    if sketch is not None and customer is not None:
        record = BundleRecord(
            bundle_id=manifest.bundle_id,
            architecture=split.architecture,
            layers=split.family.layers,
            num_layers=split.num_layers,
            hidden_size=config.hidden_size,
            prefix=split.prefix,
        )
        register(Path(keys) / REGISTRY_NAME, customer, record, sketch)
    return manifest


def _shuffled(split: Split, name: str, tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """A tensor of the open side; the weight [V, H] or bias [V] of the head with its words in that order."""
    return tensor[order] if name.split(".")[0] in split.family.heads else tensor


def _check_customer(fold: FoldKind, customer: str | None) -> None:
    if fold == "keyed" and customer is None:
        raise ValueError("A keyed fold is one customer's own; give --customer NAME.")
    if fold != "keyed" and customer is not None:
        raise ValueError("A customer is named for a keyed fold alone; add --fold keyed, or leave --customer out.")
    if customer is not None:
        check_customer(customer)


def _choose_plan(
    folder: Path,
    config: PreTrainedConfig,
    prefix: int | None,
    preset: str | None,
    plan: str | Path | None,
    texts: str | Path | None,
    head: HeadKind | None,
    fold: FoldKind | None,
    kv: KvKind | None,
    progress: Progress | None,
) -> Plan:
    # Imported on use: the planner reads models with what is in this file, and needs the attacks.
    if texts is not None and (preset is None or PRESETS[preset].prefix is not None):
        raise ValueError("Texts are for presets that measure; leave --texts out, or give --preset solid.")
    if plan is not None:
        if prefix is not None or preset is not None:
            raise ValueError("Give --plan, --prefix or --preset, only one of them.")
        from semiopen.vendor.plan_file import check_plan_fits, read_plan

        document = read_plan(Path(plan))
        check_plan_fits(document, folder, config)
        given = {name: value for name, value in (("head", head), ("fold", fold), ("kv", kv)) if value is not None}
        return Plan(**{**document.plan.model_dump(), **given})

    def measure() -> int:
        from semiopen.vendor.planner import make_plan

        return make_plan(folder, texts=texts, progress=progress).plan.prefix

    return plan_for(config.num_hidden_layers, prefix, preset, measure, head, fold, kv)


def find_model(model: str | Path) -> Path:
    """Return the local folder of a model: `model` itself, or the snapshot of a hub id.

    Raises:
        SemiopenError: neither a folder nor a model that the hub gives.
    """
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(str(model), allow_patterns=["*.safetensors", "*.json", *_COMPANIONS]))
    except Exception as error:
        raise SemiopenError(
            f"{str(model)!r} is neither a folder here nor a model that the hub gives ({type(error).__name__}); "
            "give the path of a model folder."
        ) from error


def read_config(folder: Path) -> PreTrainedConfig:
    """The config of a model that can be sealed.

    Raises:
        UnsupportedModelError: it cannot be split exactly, or is a bundle.
        SemiopenError: there is no config.json.
    """
    if not (folder / "config.json").is_file():
        raise SemiopenError(f"{folder} has no config.json; give the folder of a transformers model.")
    data = json.loads((folder / "config.json").read_bytes())
    if "sealed" in data or data.get("model_type") == "semiopen":
        raise UnsupportedModelError(f"{folder} is a bundle already; seal the original model.")
    try:
        config = AutoConfig.from_pretrained(folder)
    except (ValueError, OSError):
        raise UnsupportedModelError(
            f"Model type {data.get('model_type')!r} of {folder} is not known to transformers; it cannot be sealed."
        ) from None
    check_supported(config)
    return config


def _stored(
    split: Split, fold: Fold | None, kv: KvFold | None, shard: Path
) -> Iterator[tuple[str, str | None, torch.Tensor]]:
    """What a shard's tensors become.

    Yields:
        Name in the whole model, name in the open checkpoint or None where it is sealed, and the tensor to store.
    """
    for name, tensor in _tensors(shard):
        placement = split.place(name)
        if placement.part is Part.DROPPED:
            continue
        whole, own = name, tensor
        if kv and kv.touches(name):
            own = tensor.double()  # rounded once, after both folds
        if fold:
            whole, own = fold.rename(name), fold.apply(name, own)
        if kv:
            own = kv.apply(name, own).to(tensor.dtype)
        if placement.part is Part.OPEN:
            yield whole, split.place(whole).open_name, own
            continue
        yield whole, None, own
        if fold and split.tied and name.removeprefix(f"{split.base}.") == f"{split.family.embedding}.weight":
            # Folded, a tied head is another matrix than the embedding, so it is stored wherever the head goes.
            yield TIED_HEAD_NAME, placement.open_name, fold.apply(TIED_HEAD_NAME, tensor)
        elif placement.open_name is not None:
            yield TIED_HEAD_NAME, placement.open_name, own


def _tensors(shard: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dict
                yield name, file.get_tensor(name)
    except SafetensorError as error:
        raise SemiopenError(f"{shard} is damaged ({error}); fetch the model again.") from None


def _companions(folder: Path) -> list[Path]:
    found = {path for pattern in _COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    return sorted(path for path in found if path.suffix != ".safetensors")


def bundle_config(split: Split) -> bytes:
    """config.json of a bundle: both halves' configs under a model type that only semiopen opens.

    A plain family config would let transformers load the open blocks with a random embedding, without a word.
    """
    config = {
        "model_type": "semiopen",
        "architectures": [f"Semiopen{split.architecture}"],  # by which vLLM finds its class
        "dtype": split.host_config.to_dict().get("dtype"),
        "text_config": split.host_config.to_dict(),
        "prefix_config": split.prefix_config.to_dict(),
    }
    return json.dumps(config, indent=1).encode() + b"\n"


def _check_complete(split: Split, sealed: dict[str, torch.Tensor]) -> None:
    wanted = [f"{split.family.layers}.{block}." for block in range(split.prefix)]
    wanted += [f"{name}.weight" for name in (split.family.embedding, split.family.positions) if name]
    for part in wanted:
        if not any(name.removeprefix(f"{split.base}.").startswith(part) for name in sealed):
            raise SemiopenError(f"The checkpoint has no tensor {part}*; fetch the model again.")
