"""What the enclave process gives up before it holds a secret, and again before it serves anyone.

Two stages, both one-way. `harden_start` runs first of all, before torch is imported: no core dumps, no
debugger of the same user, no network, no other programs, no child processes. `harden_running` runs once the
model is loaded and warmed up: no more opening of files, no console. What is left afterwards is what the
parent handed over (listening Unix socket, pipes), accepted connections, anonymous shared memory, threads and
arithmetic.

This narrows what a mistake or a dishonest line in the enclave can leak, and keeps other unprivileged
processes out. It does not make the process a TEE: root on the machine, the kernel and the hypervisor still
read all of it.

Every function reports what it reached as `Measure`s, and never raises because a kernel refuses. The caller
prints them, and decides whether it serves without a measure.

The order: descriptors, environment, `harden_start`, keys, model, `lock_memory`, warm-up, `harden_running`.
"""

import ctypes
import errno
import functools
import os
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

if sys.platform != "win32":
    import resource

_PR_GET_DUMPABLE, _PR_SET_DUMPABLE, _PR_SET_MM = 3, 4, 35
_PR_SET_NO_NEW_PRIVS, _PR_GET_NO_NEW_PRIVS = 38, 39
_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL = 47, 4
_PR_SET_PTRACER = 0x59616D61
_CLONE_THREAD, _CLONE_NEWNET = 0x00010000, 0x40000000
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_CAP_DAC_READ_SEARCH, _CAP_IPC_LOCK = 2, 14
_CAPABILITY_VERSION_3 = 0x20080522

# Machine name: column of its numbers in the tables below, its AUDIT_ARCH_ value.
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_X32_BIT = 0x40000000
# mseal, Linux 6.10. A newer call is answered "not implemented", so that a new kernel opens no new door.
_NEWEST_CALL = 462

# Names that let someone else's code or settings into the process before its first line runs.
_INJECTING = ("LD_", "GLIBC_TUNABLES", "PYTHON")


@dataclass(frozen=True)
class Measure:
    """One thing that was tried, and whether the process has it now."""

    name: str
    applied: bool
    detail: str


def report(measures: Iterable[Measure]) -> list[str]:
    """One sentence per measure, such as "no network (system-call filter)" or "NOT applied: ..."."""
    return [f"{'' if m.applied else 'NOT applied: '}{m.name} ({m.detail})" for m in measures]


# --- What the filters refuse --------------------------------------------------------------------------------

# Group: its calls as "name, number on x86_64, number on aarch64", "-" where the machine lacks the call. No
# call appears in two groups. The name of the group is what the process reports.
START_DENIALS = {
    # Sockets of every family: the enclave is handed one listening Unix socket and only accepts on it.
    # socketpair too, as one end of a datagram pair can send to any Unix address, named or abstract, without
    # connect.
    "no network": "socket 41 198, socketpair 53 199, connect 42 203, bind 49 200, listen 50 201",
    "no other programs": "execve 59 221, execveat 322 281",
    # clone is here too unless it makes a thread; clone3 hides its flags in memory, so it "does not exist" and
    # libc falls back to clone.
    "no child processes": "fork 57 -, vfork 58 -",
    "no access or signals to other processes": """ptrace 101 117, process_vm_readv 310 270,
        process_vm_writev 311 271, process_madvise 440 440, process_mrelease 448 448, pidfd_open 434 434,
        pidfd_getfd 438 438, pidfd_send_signal 424 424, kcmp 312 272, migrate_pages 256 238,
        move_pages 279 239, tkill 200 130""",
    # Channels to other processes that need no descriptor and no file: System V and POSIX message queues.
    "no System V or message-queue channel": """shmget 29 194, shmat 30 196, shmctl 31 195, msgget 68 186,
        msgsnd 69 189, msgrcv 70 188, msgctl 71 187, semget 64 190, semop 65 193, semtimedop 220 192,
        semctl 66 191, mq_open 240 180, mq_unlink 241 181""",
    # io_uring would carry out opens and sends that this filter never sees; the others are the usual ways into
    # a kernel, or change the machine.
    "no privileged or exotic kernel interfaces": """io_uring_setup 425 425, io_uring_enter 426 426,
        io_uring_register 427 427, userfaultfd 323 282, bpf 321 280, perf_event_open 298 241,
        keyctl 250 219, add_key 248 217, request_key 249 218, kexec_load 246 104,
        kexec_file_load 320 294, init_module 175 105, finit_module 313 273, delete_module 176 106,
        mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, move_mount 429 429,
        open_tree 428 428, fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433,
        mount_setattr 442 442, unshare 272 97, setns 308 268, swapon 167 224, swapoff 168 225,
        reboot 169 142, syslog 103 116, acct 163 89, quotactl 179 60, quotactl_fd 443 443, iopl 172 -,
        ioperm 173 -, modify_ldt 154 -, personality 135 92, settimeofday 164 170, clock_settime 227 112,
        clock_adjtime 305 266, adjtimex 159 171, sethostname 170 161, setdomainname 171 162,
        vhangup 153 58, fanotify_init 300 262, fanotify_mark 301 263, open_by_handle_at 304 265,
        lookup_dcookie 212 18""",
}
RUNNING_DENIALS = {
    "no opening of files": """open 2 -, openat 257 56, openat2 437 437, creat 85 -,
        name_to_handle_at 303 264, inotify_init 253 -, inotify_init1 294 26, inotify_add_watch 254 27,
        chdir 80 49, fchdir 81 50""",
    "no changes to the file system": """unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38,
        renameat2 316 276, mkdir 83 -, mkdirat 258 34, rmdir 84 -, symlink 88 -, symlinkat 266 36,
        link 86 -, linkat 265 37, truncate 76 45, chmod 90 -, fchmod 91 52, fchmodat 268 53,
        fchmodat2 452 452, chown 92 -, lchown 94 -, fchown 93 55, fchownat 260 54, mknod 133 -,
        mknodat 259 33, utime 132 -, utimes 235 -, futimesat 261 -, utimensat 280 88, setxattr 188 5,
        lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16""",
    "no raising of its own limits": "setrlimit 160 164",
}
# Refused for some arguments only: see `_argument_rules`.
_BY_ARGUMENT = """clone 56 220, clone3 435 435, sendto 44 206, kill 62 129, tgkill 234 131,
    rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, prctl 157 167, ioctl 16 29, prlimit64 302 261"""

# One classic BPF instruction: code, jump if true, jump if false, operand.
Instruction = tuple[int, int, int, int]
_LOAD, _IF_EQUAL, _IF_GREATER, _IF_AT_LEAST, _IF_SET, _RETURN = 0x20, 0x15, 0x25, 0x35, 0x45, 0x06
_ALLOW: Instruction = (_RETURN, 0, 0, 0x7FFF0000)
_KILL: Instruction = (_RETURN, 0, 0, 0x80000000)
_REFUSE: Instruction = (_RETURN, 0, 0, 0x00050000 | errno.EPERM)
_NOT_IMPLEMENTED: Instruction = (_RETURN, 0, 0, 0x00050000 | errno.ENOSYS)


def build_filter(running: bool, machine: str, pid: int) -> list[Instruction]:
    """The seccomp program of one stage: a pure function, so that both machines can be checked on any.

    Args:
        running: False for the filter of `harden_start`, True for the one that `harden_running` adds.
        machine: "x86_64" or "aarch64".
        pid: The only process that may be sent signals.
    """
    column, architecture = _MACHINES[machine]
    # A system call made through another architecture's entry (32-bit x86) has other numbers: nothing below
    # would mean what it says. No code of ours does that, so it is an attack.
    program = [(_LOAD, 0, 0, 4), (_IF_EQUAL, 1, 0, architecture), _KILL, (_LOAD, 0, 0, 0)]
    if machine == "x86_64":  # x32: same architecture value, other numbers
        program += [(_IF_AT_LEAST, 0, 1, _X32_BIT), _REFUSE]
    program += [(_IF_GREATER, 0, 1, _NEWEST_CALL), _NOT_IMPLEMENTED]
    for group in (RUNNING_DENIALS if running else START_DENIALS).values():
        for number in _numbers(group, column).values():
            program += _when(number, [_REFUSE])
    numbers = _numbers(_BY_ARGUMENT, column)
    for name, block in _argument_rules(running, pid).items():
        program += _when(numbers[name], block)
    return [*program, _ALLOW]


def _numbers(table: str, column: int) -> dict[str, int]:
    rows = [row.split() for row in table.split(",")]
    return {row[0]: int(row[1 + column]) for row in rows if row[1 + column] != "-"}


def _when(number: int, block: list[Instruction]) -> list[Instruction]:
    # Each block ends in a return, so the call number is still loaded when the next comparison runs.
    return [(_IF_EQUAL, 0, len(block), number), *block]


def _argument_rules(running: bool, pid: int) -> dict[str, list[Instruction]]:
    if running:
        return {"prlimit64": _only_null(2)}
    own_process = _only_equal(0, pid)
    return {
        "clone": [_load_argument(0), (_IF_SET, 1, 0, _CLONE_THREAD), _REFUSE, _ALLOW],
        "clone3": [_NOT_IMPLEMENTED],
        "sendto": _only_null(4),  # no destination address: only what is connected already
        "kill": own_process,
        "tgkill": own_process,  # abort() and the interpreter signal themselves with this
        "rt_sigqueueinfo": own_process,
        "rt_tgsigqueueinfo": own_process,
        # What was given up is not taken back.
        "prctl": _never_equal(0, _PR_SET_DUMPABLE, _PR_SET_PTRACER, _PR_SET_MM),
        # Typing into the terminal that started the enclave runs commands outside of it.
        "ioctl": _never_equal(1, _TIOCSTI, _TIOCLINUX),
    }


def _load_argument(index: int, high: bool = False) -> Instruction:
    return (_LOAD, 0, 0, 16 + 8 * index + 4 * high)  # both machines are little-endian


# The two below look at the low 32 bits only, as the kernel does for these arguments (flags, pid, option,
# request are ints there): a filter that compared 64 bits could be passed by setting a high one.
def _only_equal(index: int, value: int) -> list[Instruction]:
    return [_load_argument(index), (_IF_EQUAL, 1, 0, value), _REFUSE, _ALLOW]


def _never_equal(index: int, *values: int) -> list[Instruction]:
    checks = [step for value in values for step in ((_IF_EQUAL, 0, 1, value), _REFUSE)]
    return [_load_argument(index), *checks, _ALLOW]


def _only_null(index: int) -> list[Instruction]:
    low, high = _load_argument(index), _load_argument(index, high=True)
    return [low, (_IF_EQUAL, 0, 2, 0), high, (_IF_EQUAL, 1, 0, 0), _REFUSE, _ALLOW]


# --- First stage --------------------------------------------------------------------------------------------


def harden_start() -> list[Measure]:
    """Give up core dumps, debuggers, network, programs and children; call it first, with one thread.

    Afterwards the process may still read and write files, start threads, accept on sockets it was given, and
    make anonymous shared memory. asyncio, subprocess and multiprocessing do not work any more.

    Returns:
        One measure for each thing that was tried.
    """
    if refusal := _unsupported():
        return [Measure("hardening of the start", False, refusal)]
    return [
        _no_core_file(),
        _not_dumpable(),
        _no_new_privileges(),
        _no_debugger_exception(),
        _own_network_namespace(),  # needs a capability that the next one drops
        _few_capabilities(),
        *_install_filter(running=False),
    ]


def _unsupported() -> str:
    if sys.platform != "linux":
        return "this needs Linux"
    # A 32-bit interpreter on a 64-bit kernel would be killed by its own filter.
    if os.uname().machine not in _MACHINES or sys.maxsize < 2**32:
        return "this needs a 64-bit process on x86_64 or aarch64"
    return ""


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _call(function: str, *arguments: int | ctypes.Structure | None) -> tuple[int, str]:
    """Calls libc with long arguments, as variadic calls read whole registers: result, and why it failed."""
    words = [ctypes.c_long(a) if isinstance(a, int) else None if a is None else ctypes.byref(a) for a in arguments]
    ctypes.set_errno(0)
    result = getattr(_libc(), function)(*words)
    return result, os.strerror(ctypes.get_errno()) if result < 0 else ""


def _try(name: str, good: str, outcome: tuple[int, str], holds: Callable[[], bool] = lambda: True) -> Measure:
    result, refusal = outcome
    if result != 0:
        return Measure(name, False, f"the kernel says: {refusal}")
    return Measure(name, holds(), good if holds() else "the kernel accepted it without effect")


def _no_core_file() -> Measure:
    name = "no core files"
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (OSError, ValueError) as error:
        return Measure(name, False, str(error))
    return Measure(name, resource.getrlimit(resource.RLIMIT_CORE) == (0, 0), "core size limit 0, soft and hard")


def _not_dumpable() -> Measure:
    # Also what stops a core dump into a pipe (systemd-coredump, apport): the size limit above does not apply
    # to those.
    return _try(
        "no core dumps, no debugger or /proc access by the same user",
        "process marked not dumpable",
        _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0),
        lambda: _call("prctl", _PR_GET_DUMPABLE, 0, 0, 0, 0)[0] == 0,
    )


def _no_new_privileges() -> Measure:
    return _try(
        "no gain of privileges",
        "no_new_privs",
        _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0),
        lambda: _call("prctl", _PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0)[0] == 1,
    )


def _no_debugger_exception() -> Measure:
    # Yama: withdraws any exception made earlier. Without Yama the dumpable mark alone keeps debuggers out.
    name = "no debugger but an ancestor or root"
    result, refusal = _call("prctl", _PR_SET_PTRACER, 0, 0, 0, 0)
    try:
        scope = int(Path("/proc/sys/kernel/yama/ptrace_scope").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return Measure(name, False, "this kernel runs without Yama; the dumpable mark stands alone")
    if result != 0:
        return Measure(name, False, f"the kernel says: {refusal}")
    return Measure(name, scope > 0, f"Yama, kernel.yama.ptrace_scope={scope}")


def _own_network_namespace() -> Measure:
    # A second wall behind the filter, and the one that also hides abstract Unix sockets. Unprivileged it
    # would need a user namespace of its own: that makes all of the kernel's namespace code reachable, lets
    # the owner of that namespace past Yama, and adds nothing to a filter that refuses every socket. So it is
    # not tried.
    name = "no network interfaces"
    if threads := _other_threads():
        return Measure(name, False, threads)
    result, refusal = _call("unshare", _CLONE_NEWNET)
    if result != 0:
        return Measure(name, False, f"the kernel says: {refusal}; what counts is the filter against sockets")
    return Measure(name, True, "network namespace of its own")


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapabilitySets(ctypes.Structure):  # effective, permitted, inheritable: low words, then high words
    _fields_ = (("words", ctypes.c_uint32 * 6),)


def _few_capabilities() -> Measure:
    """For an enclave started as root: reading the bundle and locking memory stay, the rest goes."""
    name = "no capabilities of root"
    if threads := _other_threads():
        return Measure(name, False, threads)
    header, sets = _CapabilityHeader(_CAPABILITY_VERSION_3, 0), _CapabilitySets()
    if _call("capget", header, sets)[0] != 0:
        return Measure(name, False, "the kernel does not tell the capabilities")
    _call("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
    keep = 1 << _CAP_DAC_READ_SEARCH | 1 << _CAP_IPC_LOCK
    effective, permitted = sets.words[0] & keep, sets.words[1] & keep
    kept = _CapabilitySets((ctypes.c_uint32 * 6)(effective, permitted, 0, 0, 0, 0))
    detail = "but reading files and locking memory" if permitted else "none left"
    return _try(name, detail, _call("capset", header, kept))


def _other_threads() -> str:
    count = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    return "" if count == 1 else f"{count} threads run already, and it would hold for one of them only"


# --- Descriptors and environment ----------------------------------------------------------------------------


def close_inherited_descriptors(keep: Collection[int]) -> Measure:
    """Close every descriptor but `keep` and 0 to 2; standard input becomes /dev/null unless kept.

    A descriptor that the parent left open by mistake, or on purpose, is a file or a socket past every filter.
    The numbers 0 to 2 stay taken: a socket that got number 1 would receive whatever some library prints. Call
    it before anything of value is open.
    """
    name = "no inherited descriptors"
    try:
        # The listing holds its own descriptor too, closed by now: hence the checks below.
        numbers = [int(entry) for entry in os.listdir("/proc/self/fd")]  # noqa: PTH208
    except OSError as error:
        return Measure(name, False, f"cannot list them: {error.strerror}")
    others = [number for number in numbers if number > 2 and number not in keep and _close(number)]
    for number in (0, 1, 2):
        if not _is_open(number) or (number == 0 and 0 not in keep):
            _open_null_as(number)
    return Measure(name, True, f"{len(others)} closed, kept {sorted(keep)} and the standard ones")


def _close(descriptor: int) -> bool:
    try:
        os.close(descriptor)
    except OSError:
        return False
    return True


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _open_null_as(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


def clean_environment(allow: Collection[str]) -> Measure:
    """Remove every environment variable but `allow`.

    What the loader and the interpreter read before the first line ran cannot be undone: where such a variable
    is set (LD_PRELOAD and its like), the measure counts as not applied. The initial strings stay on the
    process's stack. Values are never reported.
    """
    name = "clean environment"
    removed = [variable for variable in os.environ if variable not in allow]
    # With -I or -E the interpreter has ignored its own variables.
    injecting = _INJECTING[:2] if sys.flags.ignore_environment else _INJECTING
    too_late = sorted(variable for variable in os.environ if variable.startswith(injecting))
    for variable in removed:
        del os.environ[variable]
    if too_late:
        return Measure(name, False, f"set before the start, and in effect already: {', '.join(too_late)}")
    return Measure(name, True, f"{len(removed)} variables removed")


# --- Memory -------------------------------------------------------------------------------------------------


def lock_memory() -> Measure:
    """Keep weights, keys and KV cache out of swap: lock what is there and what comes, as pages are touched.

    With a limit on locked memory each later allocation past it would fail, perhaps in the middle of a
    request. So it is done only where the limit is unlimited or does not bind. Call it before
    `harden_running`.
    """
    name = "memory is never swapped out"
    if refusal := _unsupported():
        return Measure(name, False, refusal)
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if limit != resource.RLIM_INFINITY and not _locks_past_limit():
        return Measure(name, False, f"RLIMIT_MEMLOCK is {limit} bytes: raise it to unlimited{_swap_note()}")
    return _try(name, "mlockall", _call("mlockall", _MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT))


def _locks_past_limit() -> bool:
    # Tried, not read from the capabilities: inside a user namespace the capability is listed and has no
    # effect. Locking nothing is refused under a limit of 0 without it.
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, hard))
    except (OSError, ValueError):
        return False
    try:
        return _call("mlock", 0, 0)[0] == 0
    finally:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (soft, hard))


def _swap_note() -> str:
    try:
        lines = Path("/proc/swaps").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return "; this machine has no swap now" if len(lines) < 2 else "; this machine has swap"


# --- Second stage -------------------------------------------------------------------------------------------


def harden_running() -> list[Measure]:
    """Give up files and console, for all threads; call it when the model is loaded and warmed up.

    Whatever opens a file at its first use must have run once: imports, libraries loaded on demand, the time
    zone. `docs/enclave-hardening.md` has the list. Standard output and error go to /dev/null first, so that
    nothing a library prints leaves the enclave: keep the result and send it through the channel.
    """
    if refusal := _unsupported():
        return [Measure("hardening of the running enclave", False, refusal)]
    return [_no_console(), *_install_filter(running=True)]


def _no_console() -> Measure:
    name = "no console"
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        for descriptor in (1, 2):
            _open_null_as(descriptor)
    except (OSError, ValueError) as error:
        return Measure(name, False, str(error))
    return Measure(name, True, "standard output and error are /dev/null")


# --- Installing a filter ------------------------------------------------------------------------------------


class _Step(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_ushort),
        ("jt", ctypes.c_ubyte),
        ("jf", ctypes.c_ubyte),
        ("k", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.POINTER(_Step)))


def _install_filter(running: bool) -> list[Measure]:
    machine = os.uname().machine
    refusal = _install(build_filter(running, machine, os.getpid()), machine)
    if not refusal and not (_file_is_refused() if running else _socket_is_refused()):
        refusal = "the filter has no effect"
    groups = RUNNING_DENIALS if running else START_DENIALS
    return [Measure(name, not refusal, refusal or "system-call filter") for name in groups]


def _install(program: list[Instruction], machine: str) -> str:
    """Puts the filter on all threads; returns why it could not."""
    seccomp, mode_filter, all_threads = {"x86_64": 317, "aarch64": 277}[machine], 1, 1
    steps = (_Step * len(program))(*(_Step(*instruction) for instruction in program))
    result, refusal = _call("syscall", seccomp, mode_filter, all_threads, _Program(len(steps), steps))
    # A positive result is the thread that could not take the filter; then no thread has it.
    return refusal if result < 0 else f"thread {result} has another filter" if result > 0 else ""


def _socket_is_refused() -> bool:
    descriptor, _ = _call("socket", 1, 1, 0)
    if descriptor >= 0:
        os.close(descriptor)
    return descriptor < 0 and ctypes.get_errno() == errno.EPERM


def _file_is_refused() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except PermissionError:
        return True
    return False
