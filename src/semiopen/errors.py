"""Every error a user of semiopen can meet. Each message is one sentence that says what to do next.

Two trees by fault, as callers must tell them apart: `UntrustedInputError` is the other side's fault (a bundle
that was changed, a frame that is malformed); everything else is a refusal or a failure on this side. Misuse of
a function by its caller stays a `ValueError`.
"""


class SemiopenError(Exception):
    """Base of all errors that semiopen raises on purpose; the command line prints them without a traceback."""


class UntrustedInputError(SemiopenError):
    """Something that came from outside the trust boundary is not what it must be."""


class BundleError(UntrustedInputError):
    """The bundle is damaged, incomplete, from another vendor or from a newer format; the message names the file."""


class SealedDataError(BundleError):
    """Sealed data did not decrypt: wrong key or changed ciphertext. Deliberately says no more than that."""


class ProtocolError(UntrustedInputError):
    """A frame or message violates the protocol."""


class LeaseError(UntrustedInputError):
    """A lease is not the vendor's, not for this bundle, not valid now, or cannot be made."""


class UnsupportedModelError(SemiopenError):
    """The model cannot be sealed exactly, so it is refused."""


class KeyFolderError(SemiopenError):
    """A key folder is missing, incomplete, readable by others, or already there."""


class EnclaveError(SemiopenError):
    """The enclave refused a request, failed to start or went away."""

    def __init__(self, message: str, code: str = "enclave") -> None:
        super().__init__(message)
        self.code = code


class UnsupportedCallError(SemiopenError, NotImplementedError):
    """The host model refuses a call that it could not answer exactly."""
