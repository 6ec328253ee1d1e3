"""Start of the dev enclave: `python -I -m semiopen.enclave LISTENER`.

    LISTENER         number of an inherited, listening Unix socket
    standard input   32 bytes of sealing key, then a Provision frame; its end ends the enclave
    standard output  one Ready or Failed frame

Order is the point: give up privileges, take the key, verify the bundle, unseal, wipe the key, give up files, serve.
"""

import gc
import os
import sys
from typing import TYPE_CHECKING, cast

from semiopen.enclave import hardening
from semiopen.enclave.secret_memory import SecretBytes, read_secret

if TYPE_CHECKING:
    from semiopen.enclave.meter_file import MeterFile
    from semiopen.enclave.server import Server
    from semiopen.protocol.messages import Failed, Provision, Ready

KIND = "dev enclave: not a TEE"
SEALING_KEY_BYTES = 32
ENVIRONMENT = ("PATH", "LANG", "OMP_NUM_THREADS", "GOMP_SPINCOUNT", "HF_HUB_OFFLINE", "TZ")


def main() -> int:
    """Run one enclave from start to the end of its lifeline; returns the exit status."""
    listener_fd, lifeline, start_reply = int(sys.argv[1]), 0, os.dup(1)
    measures = [
        hardening.close_inherited_descriptors({lifeline, listener_fd, start_reply}),
        hardening.clean_environment(ENVIRONMENT),
        *hardening.harden_start(),
    ]
    with read_secret(lifeline, SEALING_KEY_BYTES, close=False) as sealing_key:
        # Only now: what these import is large, and had better run with fewer privileges.
        import socket

        from semiopen.enclave.server import place_of
        from semiopen.errors import SemiopenError
        from semiopen.protocol.messages import Failed, Ready

        try:
            server, meter_file = _build(_read_provision(lifeline), sealing_key)
            server.rehearse()
        except SemiopenError as error:
            _answer_start(start_reply, Failed(code="start", message=str(error)))
            return 1
        except Exception as error:
            _answer_start(start_reply, Failed(code="start", message=place_of(error)))
            return 1
    gc.freeze()  # what is loaded stays; a collection in the middle of a step need not visit it
    measures.append(hardening.lock_memory())
    measures += hardening.harden_running()  # from here on no file opens, so no import may follow
    server.welcome = server.welcome.model_copy(update={"measures": hardening.report(measures)})
    _answer_start(start_reply, Ready())
    with socket.socket(fileno=listener_fd) as listener:
        server.serve(listener, lifeline)
    if meter_file is not None:
        meter_file.close(*server.used)
    return 0


def _read_provision(descriptor: int) -> "Provision":
    from semiopen.errors import ProtocolError
    from semiopen.protocol.framing import FrameDecoder
    from semiopen.protocol.messages import PROVISION, parse

    decoder = FrameDecoder()
    while data := os.read(descriptor, 65536):
        for payload in decoder.feed(data):
            return parse(PROVISION, payload)
    raise ProtocolError("The enclave was not told what to load; start it with 'semiopen enclave'.")


def _build(provision: "Provision", sealing_key: SecretBytes) -> "tuple[Server, MeterFile | None]":
    """Verify, unseal and build; the sealing key is wiped."""
    import json
    import time
    from pathlib import Path

    import torch
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    from semiopen.bundle.lease import verify_lease
    from semiopen.bundle.primitives import derive_use_key
    from semiopen.bundle.reader import bundle_key_of, load_sealed, read_files
    from semiopen.enclave.attention_order import AttentionOrder
    from semiopen.enclave.head import SealedHead, read_shuffle
    from semiopen.enclave.meter_file import MeterFile
    from semiopen.enclave.prefix import Prefix
    from semiopen.enclave.server import Server, limits_for, welcome_for
    from semiopen.enclave.trusted_state import Meter
    from semiopen.errors import LeaseError
    from semiopen.model.families import attention_size
    from semiopen.model.sealed_tensors import split_sealed
    from semiopen.model.split import check_supported, config_from_dict

    if provision.threads:
        torch.set_num_threads(provision.threads)
    vendor_key = load_pem_public_key(provision.vendor_key.encode())
    bundle = read_files(Path(provision.bundle), vendor_key, only=())  # type: ignore[arg-type] - checked there
    manifest = bundle.manifest
    config = config_from_dict(json.loads(bundle.read("config.json"))["prefix_config"])
    check_supported(config)
    lease = None
    if provision.lease is not None:
        lease = verify_lease(provision.lease, vendor_key, manifest.bundle_id, time.time())  # type: ignore[arg-type]
    elif manifest.lease_required:
        raise LeaseError("This bundle needs a lease of the vendor's; give it with --lease FILE.")
    bundle_key = bundle_key_of(bundle, sealing_key.view(), vendor_key)  # type: ignore[arg-type]
    sealing_key.wipe()
    meter_file = None
    if lease is not None and provision.meter is not None:
        meter_file = MeterFile(Path(provision.meter), lease, derive_use_key(bundle_key, "meter"))
    meter = Meter(lease, meter_file.used, meter_file.save) if meter_file else Meter(lease)
    tensors = split_sealed(config, load_sealed(bundle, bundle_key))
    dtype = getattr(torch, provision.dtype) if provision.dtype else cast(torch.dtype, config.dtype)
    head = words = None
    if manifest.plan.head == "sealed":
        secret = derive_use_key(bundle_key, "sampling")
        head = SealedHead(config, tensors.head, dtype, secret, gradients=meter.rights.tune)
    elif manifest.plan.head == "shuffled":
        words = read_shuffle(tensors.shuffle, config.vocab_size)
    del bundle_key
    prefix = Prefix(config, tensors.prefix, dtype)
    order = None
    if manifest.plan.kv == "enclave":
        open_blocks = manifest.num_layers - manifest.plan.prefix
        order = AttentionOrder(tensors.unmix, open_blocks, attention_size(config))
    limits = limits_for(prefix, provision.max_kv_tokens, manifest.plan.head, order)
    welcome = welcome_for(prefix, limits, KIND, bundle.digest, manifest.plan.prefix, meter)
    return Server(prefix, limits, welcome, meter, head, words, order), meter_file


def _answer_start(descriptor: int, answer: "Ready | Failed") -> None:
    from semiopen.protocol.framing import encode_frame
    from semiopen.protocol.messages import dump

    os.write(descriptor, encode_frame(dump(answer)))
    os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
