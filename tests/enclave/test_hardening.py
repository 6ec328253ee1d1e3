"""Each measure is tried as an attack in a child process: it works before (the control), and not after."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from semiopen.enclave import hardening
from semiopen.enclave.hardening import Measure, build_filter, report

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the measures are Linux's")

NOBODY = 65534

# Runs in the child. Results leave through a copy of standard output, which harden_running closes.
PRELUDE = """
import ctypes, errno, fcntl, json, mmap, os, resource, signal, socket, struct, sys, threading, time
from semiopen.enclave import hardening
libc = ctypes.CDLL(None, use_errno=True)
out = os.dup(1)

def tell(result):
    os.write(out, json.dumps(result).encode())

def attempt(action):
    try:
        value = action()
    except OSError as error:
        return errno.errorcode[error.errno]
    return value if isinstance(value, str) else "done"

def call(number, *arguments):
    ctypes.set_errno(0)
    words = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    result = libc.syscall(ctypes.c_long(number), *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")

def number(name):
    tables = [*hardening.START_DENIALS.values(), *hardening.RUNNING_DENIALS.values(), hardening._BY_ARGUMENT]
    return hardening._numbers(",".join(tables), hardening._MACHINES[os.uname().machine][0])[name]

def refused(measures):
    return [m.name for m in measures if not m.applied]
"""


def start_child(code: str, arguments: Sequence[str] = (), **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", "-W", "ignore", "-c", PRELUDE + code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


def in_child(code: str, **options: Any) -> Any:
    child = start_child(code, **options)
    output, errors = child.communicate(timeout=100)
    assert child.returncode == 0, errors.decode()
    return json.loads(output)


def needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to drop privileges or raise limits in a child")


# --- First stage: what the filter refuses -------------------------------------------------------------------

START_ATTACKS = """
listener = socket.create_server(("127.0.0.1", 0))
tcp, udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
unix, datagrams = socket.socket(socket.AF_UNIX), socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
receiver.bind("\\0semiopen-test-%d" % os.getpid())
piped, ready = os.pipe()
parent = os.getppid()

def run_true():
    try:
        child = os.fork()
    except PermissionError:
        child = 0
    if child == 0:
        os.execv("/bin/true", ["true"])
    assert os.waitpid(child, 0)[1] == 0

def fork():
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)

def spawn():
    os.waitpid(os.posix_spawn("/bin/true", ["true"], {}), 0)

def run_thread():
    threading.Thread(target=int).start()

def read_own_memory_like_another():
    source = ctypes.create_string_buffer(b"x")
    target = ctypes.create_string_buffer(1)
    vector = lambda buffer: struct.pack("QQ", ctypes.addressof(buffer), 1)
    call(number("process_vm_readv"), os.getpid(), vector(target), 1, vector(source), 1, 0)

def be_dumpable():
    call(number("prctl"), 4 | 1 << 32, 1, 0, 0, 0)

ATTACKS = {
    "TCP socket": socket.socket,
    "UDP socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "IPv6 socket": lambda: socket.socket(socket.AF_INET6),
    "Unix socket": lambda: socket.socket(socket.AF_UNIX),
    "socket pair": socket.socketpair,
    "connect of an old socket": lambda: tcp.connect(listener.getsockname()),
    "bind of an old socket": lambda: unix.bind("\\0semiopen-test-2-%d" % os.getpid()),
    "listen on an old socket": lambda: socket.socket.listen(unix),
    "datagram to an address": lambda: udp.sendto(b"x", listener.getsockname()),
    "Unix datagram to an address": lambda: receiver.sendto(b"x", receiver.getsockname()),
    "run /bin/true": run_true,
    "fork": fork,
    "spawn /bin/true": spawn,
    "ptrace": lambda: call(number("ptrace"), 16, 2**30, 0, 0),
    "process_vm_readv": read_own_memory_like_another,
    "signal to another process": lambda: os.kill(parent, 0),
    "thread signal to another process": lambda: call(number("tgkill"), parent, parent, 0),
    "pidfd_open": lambda: os.pidfd_open(parent),
    "be dumpable again": be_dumpable,
    "type into a terminal": lambda: call(number("ioctl"), piped, 0x5412 | 1 << 32, b"x"),
    "System V shared memory": lambda: call(number("shmget"), 0, 4096, 0o600),
    "System V message queue": lambda: call(number("msgget"), 0, 0),
    "io_uring": lambda: call(number("io_uring_setup"), 0, 0),
    "bpf": lambda: call(number("bpf"), 1000, 0, 0),
    "perf_event_open": lambda: call(number("perf_event_open"), 0, 0, 0, 0, 0),
    "keyctl": lambda: call(number("keyctl"), 1000, 0, 0, 0, 0),
    "userfaultfd": lambda: call(number("userfaultfd"), 2**30),
    "pidfd_getfd": lambda: call(number("pidfd_getfd"), -1, 0, 0),
    "unshare": lambda: call(number("unshare"), 0),
    "kexec_load": lambda: call(number("kexec_load"), 0, 10**6, 0, 0),
    "newer system call": lambda: call(463 + 10**4),
    "x32 system call": lambda: call(0x40000000 | 39),
    # and what must still work
    "thread": run_thread,
    "signal to itself": lambda: os.kill(os.getpid(), 0),
    "answer on a connected socket": lambda: datagrams[0].send(b"x"),
    "anonymous shared memory": lambda: os.memfd_create("x"),
    "open a file": lambda: open("/proc/self/status").close(),
    "random numbers": lambda: str(len(os.urandom(8))),
}
# No thread before: the end of one is seen late in /proc.
before = {name: attempt(action) for name, action in ATTACKS.items() if name != "thread"}
measures = hardening.harden_start()
after = {name: attempt(action) for name, action in ATTACKS.items()}
tell({"before": before, "after": after, "report": hardening.report(measures), "refused": refused(measures)})
"""


@cache
def start_outcomes() -> dict[str, Any]:
    return in_child(START_ATTACKS)


WORKED_BEFORE = (
    "TCP socket",
    "UDP socket",
    "Unix socket",
    "socket pair",
    "connect of an old socket",
    "bind of an old socket",
    "listen on an old socket",
    "datagram to an address",
    "Unix datagram to an address",
    "run /bin/true",
    "fork",
    "spawn /bin/true",
    "process_vm_readv",
    "signal to another process",
    "thread signal to another process",
    "be dumpable again",
    "System V shared memory",
    "System V message queue",
)


@pytest.mark.parametrize("attack", WORKED_BEFORE)
def test_works_before_and_is_refused_after(attack: str) -> None:
    outcomes = start_outcomes()
    assert outcomes["before"][attack] == "done"
    assert outcomes["after"][attack] == "EPERM"


@pytest.mark.parametrize(
    "attack",
    [
        "ptrace",
        "type into a terminal",
        "bpf",
        "perf_event_open",
        "userfaultfd",
        "keyctl",
        "pidfd_getfd",
        "io_uring",
    ],
)
def test_is_refused_by_the_filter_and_not_for_its_arguments(attack: str) -> None:
    # Each is called with senseless arguments, so that the control fails for those and does no harm.
    outcomes = start_outcomes()
    if outcomes["before"][attack] in ("EPERM", "ENOSYS"):
        pytest.skip("refused on this machine without the filter as well")
    assert outcomes["after"][attack] == "EPERM"


def test_unknown_system_calls_and_other_numberings_are_refused() -> None:
    assert start_outcomes()["after"]["newer system call"] == "ENOSYS"
    expected = "EPERM" if os.uname().machine == "x86_64" else "ENOSYS"
    assert start_outcomes()["after"]["x32 system call"] == expected


def test_what_the_enclave_needs_still_works() -> None:
    for name in ("thread", "signal to itself", "answer on a connected socket", "anonymous shared memory"):
        assert start_outcomes()["after"][name] == "done", name
    assert start_outcomes()["after"]["open a file"] == "done"  # until the second stage
    assert start_outcomes()["after"]["random numbers"] == "8"


def test_report_of_the_first_stage() -> None:
    sentences = start_outcomes()["report"]
    assert "no network (system-call filter)" in sentences
    assert "no core files (core size limit 0, soft and hard)" in sentences
    may_lack = {"no debugger but an ancestor or root", "no network interfaces"}
    assert set(start_outcomes()["refused"]) <= may_lack
    if os.geteuid() == 0:
        assert "no network interfaces" not in start_outcomes()["refused"]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="the other entry is that of 32-bit x86")
def test_system_call_through_the_32_bit_entry_kills() -> None:
    # mov eax, 20 (getpid for i386); int 0x80; ret
    attack = """
code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
code.write(bytes.fromhex("b814000000cd80c3"))
getpid = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
tell(getpid() == os.getpid())
hardening.harden_start()
getpid()
"""
    child = start_child(attack)
    output, _ = child.communicate(timeout=100)
    if not output or not json.loads(output):
        pytest.skip("this kernel runs no 32-bit system calls")
    assert child.returncode == -signal.SIGSYS


# --- First stage: core dumps, debuggers, capabilities -------------------------------------------------------


def test_no_core_dump_where_there_was_one(tmp_path: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    if os.geteuid() != 0 and hard == 0:
        pytest.skip("core dumps are off for this user already")
    code = """
resource.setrlimit(resource.RLIMIT_CORE, (2**24, 2**24))
pid = os.fork()
if pid == 0:
    os.abort()
before = os.WCOREDUMP(os.waitpid(pid, 0)[1])
pid = os.fork()
if pid == 0:
    measures = hardening.harden_start()
    assert resource.getrlimit(resource.RLIMIT_CORE) == (0, 0)
    os.abort()
status = os.waitpid(pid, 0)[1]
pid = os.fork()
if pid == 0:
    hardening._not_dumpable()  # alone: what counts where dumps go into a pipe
    os.abort()
marked = os.waitpid(pid, 0)[1]
tell([before, os.WTERMSIG(status), os.WCOREDUMP(status), os.WCOREDUMP(marked)])
"""
    before, killed_by, after, marked = in_child(code, cwd=tmp_path)
    if not before:
        pytest.skip("this machine writes no core dumps here")
    assert (killed_by, after, marked) == (signal.SIGABRT, False, False)


def test_raising_the_core_limit_again_is_refused() -> None:
    code = """
hardening.harden_start()
def raise_limit():
    try:
        resource.setrlimit(resource.RLIMIT_CORE, (4096, 4096))
    except ValueError:
        return "refused"
tell(raise_limit())
"""
    assert in_child(code) == "refused"


DEBUGGER = """
command, answer = os.pipe(), os.pipe()
victim = os.fork()
if os.geteuid() == 0:
    os.setgroups([])
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)
# Capabilities that an ordinary user may have been given would pass for an attack that works.
hardening._call("capset", hardening._CapabilityHeader(0x20080522, 0), hardening._CapabilitySets())
if victim == 0:
    libc.prctl(4, 1, 0, 0, 0)  # dropping root made it undumpable already: undo that, for the control
    os.write(answer[1], b"r")
    os.read(command[0], 1)
    assert "no network" not in refused(hardening.harden_start())
    os.write(answer[1], b"h")
    os.read(command[0], 1)
    os._exit(0)

def attach():
    call(number("ptrace"), 16, victim, 0, 0)
    os.waitpid(victim, 0)
    call(number("ptrace"), 17, victim, 0, 0)

secret = ctypes.create_string_buffer(b"x")  # at the same address in the forked victim

def read_memory():
    target = ctypes.create_string_buffer(1)
    vector = lambda buffer: struct.pack("QQ", ctypes.addressof(buffer), 1)
    call(number("process_vm_readv"), victim, vector(target), 1, vector(secret), 1, 0)

def steal_descriptor():
    pidfd = os.pidfd_open(victim)
    call(number("pidfd_getfd"), pidfd, command[0], 0)

ATTACKS = {
    "ptrace attach": attach,
    "process_vm_readv": read_memory,
    "pidfd_getfd": steal_descriptor,
    "/proc/pid/mem": lambda: os.close(os.open(f"/proc/{victim}/mem", os.O_RDONLY)),
    "/proc/pid/maps": lambda: open(f"/proc/{victim}/maps").close(),
    "/proc/pid/environ": lambda: open(f"/proc/{victim}/environ").close(),
    "/proc/pid/fd": lambda: str(bool(os.listdir(f"/proc/{victim}/fd"))) and None,
}
os.read(answer[0], 1)
before = {name: attempt(action) for name, action in ATTACKS.items()}
os.write(command[1], b"h")
os.read(answer[0], 1)
after = {name: attempt(action) for name, action in ATTACKS.items()}
os.write(command[1], b"e")
os.waitpid(victim, 0)
tell([before, after])
"""


def test_another_process_of_the_same_user_cannot_look_inside() -> None:
    # As a user without privileges: root is not kept out, and the documentation says so.
    before, after = in_child(DEBUGGER)
    assert set(before.values()) == {"done"}
    assert set(after.values()) <= {"EPERM", "EACCES"}


def test_root_keeps_no_capability_but_reading_and_locking() -> None:
    needs_root()
    code = """
def effective():
    return open("/proc/self/status").read().split("CapEff:")[1].split()[0]
before = int(effective(), 16)
measures = hardening.harden_start()
tell([before, int(effective(), 16)])
"""
    before, after = in_child(code)
    kept = 1 << hardening._CAP_DAC_READ_SEARCH | 1 << hardening._CAP_IPC_LOCK
    assert before & ~kept
    assert not after & ~kept


# --- Second stage -------------------------------------------------------------------------------------------

RUNNING_ATTACKS = """
hardening.harden_start()
os.chdir(sys.argv[1])
open("old", "w").close()
old = os.open("old", os.O_RDWR)

def in_a_thread():
    results = []
    thread = threading.Thread(target=lambda: results.append(attempt(lambda: open("old").close())))
    thread.start()
    thread.join()
    return results[0]

go, results = threading.Event(), []
def wait_and_open():
    go.wait()
    results.append(attempt(lambda: open("old").close()))
early = threading.Thread(target=wait_and_open)
early.start()

def limit():
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    except (PermissionError, ValueError) as error:
        raise PermissionError(errno.EPERM, "refused") from error

def fresh(name):
    if os.path.exists(name):
        os.unlink(name)

ATTACKS = {
    "read a file": lambda: open("old").close(),
    "write a file": lambda: open("new", "w").close(),
    "read /proc/self/mem": lambda: open("/proc/self/mem", "rb").close(),
    "open a directory": lambda: os.listdir("."),
    "make a directory": lambda: os.mkdir("folder"),
    "remove a directory": lambda: os.rmdir("folder"),
    "rename": lambda: os.rename("old", "older") or os.rename("older", "old"),
    "symbolic link": lambda: os.symlink("old", "symbolic"),
    "hard link": lambda: os.link("old", "hard"),
    "remove": lambda: os.unlink("hard"),
    "truncate by name": lambda: os.truncate("old", 1),
    "change the mode": lambda: os.chmod("old", 0o600),
    "change the mode by descriptor": lambda: os.fchmod(old, 0o600),
    "set times": lambda: os.utime("old"),
    "make a FIFO": lambda: os.mkfifo("fifo"),
    "change the folder": lambda: os.chdir("."),
    "extended attribute": lambda: os.setxattr("old", "user.x", b"x"),
    "watch a folder": lambda: call(number("inotify_init1"), 0),
    "file in a new thread": in_a_thread,
    "own limits": limit,
    "import": lambda: __import__("wave") and None,
}
before = {name: attempt(action) for name, action in ATTACKS.items()}
print("seen", flush=True)
measures = hardening.harden_running()
print("not seen", flush=True)
os.write(2, b"not seen either")
after = {name: attempt(action) for name, action in ATTACKS.items() if name != "import"}
go.set()
early.join()
try:
    import sndhdr
    after["import"] = "done"
except ImportError:
    after["import"] = "EPERM"
except OSError as error:
    after["import"] = errno.errorcode[error.errno]
after["file in an older thread"] = results[0]
before["file in an older thread"] = "done"
still = {
    "shared memory": attempt(lambda: os.ftruncate(os.memfd_create("x"), 4096)),
    "old descriptor": attempt(lambda: os.write(old, b"x") and None),
    "random numbers": attempt(lambda: os.urandom(8) and None),
}
tell({"before": before, "after": after, "still": still, "report": hardening.report(measures)})
"""


@cache
def running_outcomes() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        child = start_child(RUNNING_ATTACKS, arguments=[folder])
        output, errors = child.communicate(timeout=100)
    assert child.returncode == 0, errors.decode()
    seen, result = output.split(b"\n", 1)
    return {"seen": seen.decode(), "errors": errors.decode(), **json.loads(result)}


RUNNING_NAMES = re.findall(r'^    "([^"]+)": ', RUNNING_ATTACKS.split("before =")[0], re.M)


@pytest.mark.parametrize("attack", [*RUNNING_NAMES, "file in an older thread"])
def test_files_work_before_and_are_refused_once_running(attack: str) -> None:
    outcomes = running_outcomes()
    if attack == "extended attribute" and outcomes["before"][attack] == "ENOTSUP":
        pytest.skip("this file system has no extended attributes")
    assert outcomes["before"][attack] == "done"
    assert outcomes["after"][attack] == "EPERM"


def test_console_is_closed_once_running() -> None:
    # What the child tells afterwards goes through a copy of the descriptor, which an enclave would not make.
    assert running_outcomes()["seen"] == "seen"
    assert "not seen" not in running_outcomes()["errors"]


def test_what_a_session_needs_works_once_running() -> None:
    assert set(running_outcomes()["still"].values()) == {"done"}


def test_report_of_the_second_stage() -> None:
    assert running_outcomes()["report"] == [
        "no console (standard output and error are /dev/null)",
        "no opening of files (system-call filter)",
        "no changes to the file system (system-call filter)",
        "no raising of its own limits (system-call filter)",
    ]


# --- Both stages: the work goes on --------------------------------------------------------------------------

WORK = """
harden, number_of_listener = sys.argv[1] != "plain", int(sys.argv[2])
if harden:
    listener = socket.socket(fileno=number_of_listener)
    hardening.close_inherited_descriptors({out, listener.fileno()})
    hardening.clean_environment({"OMP_NUM_THREADS"})
    missing = refused(hardening.harden_start())
import torch
import torch.nn.functional as F
torch.set_num_threads(2)
if sys.argv[1] == "warmed up":
    torch.ones(3) + 1
if harden:
    hardening.lock_memory()
    missing += refused(hardening.harden_running())
    assert "no network" not in missing and "no opening of files" not in missing

def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)

def matmul_in_threads():
    results = []
    work = lambda: results.append(random(600, 600) @ random(600, 600))
    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    return torch.stack(results)

def attention(dtype):
    q, k, v = (random(1, 4, 65, 32, dtype=dtype) for _ in range(3))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)

# Each for the first time in this process, so that a library loaded on demand would fail here.
WORK = {
    "linear": lambda: F.linear(random(64, 256), random(128, 256)),
    "matmul in threads": matmul_in_threads,
    "bf16 matmul": lambda: random(64, 256, dtype=torch.bfloat16) @ random(256, 128, dtype=torch.bfloat16),
    "bf16 linear, one row": lambda: F.linear(random(1, 256).bfloat16(), random(128, 256).bfloat16()),
    "attention": lambda: attention(torch.float32),
    "bf16 attention": lambda: attention(torch.bfloat16),
    "embedding": lambda: F.embedding(torch.arange(9), random(10, 8)),
    "norm": lambda: F.rms_norm(random(4, 64), (64,)),
    "activation": lambda: F.silu(random(100, 100)),
    "rotary": lambda: torch.outer(torch.arange(9.0), random(8)).cos(),
    "gather": lambda: random(10, 8).index_select(0, torch.tensor([3, 1])),
    "sample": lambda: torch.topk(random(1000).softmax(-1), 5).values,
    "fp16 matmul": lambda: random(64, 256, dtype=torch.float16) @ random(256, 128, dtype=torch.float16),
}
if sys.argv[1] == "first use":
    del WORK["fp16 matmul"]  # its library asks /proc/cpuinfo at the first operation, and remembers a refusal
results = {name: work().double().sum().item() for name, work in WORK.items()}

if harden:
    connection, _ = listener.accept()
    descriptor = os.memfd_create("channel", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 4096)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    memory = mmap.mmap(descriptor, 4096)
    torch.frombuffer(memory, dtype=torch.float32)[:4] = torch.arange(4.0)
    socket.send_fds(connection, [connection.recv(16).upper()], [descriptor])
tell(results)
"""


def finish(child: subprocess.Popen[bytes]) -> dict[str, float]:
    output, errors = child.communicate(timeout=100)
    assert child.returncode == 0, errors.decode()
    return json.loads(output)


@pytest.mark.parametrize("mode", ["first use", "warmed up"])
def test_torch_threads_and_the_channel_work_after_both_stages(mode: str, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(tmp_path / "enclave.sock"))
        listener.listen()
        client.connect(str(tmp_path / "enclave.sock"))
        client.sendall(b"hello")
        number = listener.fileno()
        enclave = start_child(WORK, arguments=[mode, str(number)], pass_fds=[number])
        listener.close()  # now an enclave that dies ends the wait below
        message, descriptors, _, _ = socket.recv_fds(client, 16, 4)
        hardened = finish(enclave)
    assert message == b"HELLO"
    assert os.pread(descriptors[0], 16, 0) == bytes.fromhex("000000000000803f0000004000004040")
    os.close(descriptors[0])
    # Without the warm-up torch learns nothing about the processor, and takes other kernels for bfloat16.
    expected = {name: plain_outcomes()[name] for name in hardened}
    assert hardened == pytest.approx(expected, rel=1e-6 if mode == "warmed up" else 1e-2)
    assert ("fp16 matmul" in hardened) == (mode == "warmed up")


@cache
def plain_outcomes() -> dict[str, float]:
    return finish(start_child(WORK, arguments=["plain", "0"]))


# --- Descriptors, environment, memory -----------------------------------------------------------------------


def test_inherited_descriptors_are_closed_but_those_kept() -> None:
    reading, writing = os.pipe()
    code = """
kept, other = int(sys.argv[1]), int(sys.argv[2])
before = [attempt(lambda: os.fstat(n) and None) for n in (kept, other)]
measure = hardening.close_inherited_descriptors({kept, out})
after = [attempt(lambda: os.fstat(n) and None) for n in (0, 1, 2, kept, other)]
tell([before, after, os.readlink("/proc/self/fd/0"), hardening.report([measure])])
"""
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-c", PRELUDE + code, str(reading), str(writing)],
            pass_fds=(reading, writing),
            capture_output=True,
            check=True,
        )
    finally:
        os.close(reading)
        os.close(writing)
    before, after, standard_input, sentences = json.loads(child.stdout)
    assert before == ["done", "done"]
    assert after == ["done"] * 4 + ["EBADF"]
    assert standard_input == "/dev/null"
    assert sentences[0].startswith("no inherited descriptors (1 closed")


def test_missing_standard_descriptors_are_taken_by_dev_null() -> None:
    # Else the next socket would become standard error, and receive what a library prints.
    code = """
os.close(2)
hardening.close_inherited_descriptors({out})
tell([os.readlink(f"/proc/self/fd/{n}") for n in (0, 2)])
"""
    assert in_child(code) == ["/dev/null", "/dev/null"]


def test_environment_is_cleaned_and_no_value_is_reported() -> None:
    code = """
before = attempt(lambda: os.environ["TOKEN"])
measure = hardening.clean_environment({"KEPT"})
libc.getenv.restype = ctypes.c_char_p
tell([before, dict(os.environ), libc.getenv(b"TOKEN"), hardening.report([measure])])
"""
    before, left, in_libc, sentences = in_child(code, env={"TOKEN": "hunter2", "KEPT": "1"})
    assert before == "hunter2"
    assert (left.get("TOKEN"), left["KEPT"], in_libc) == (None, "1", None)
    assert sentences[0].startswith("clean environment (")
    assert "hunter2" not in sentences[0]


def test_loader_variables_count_as_too_late() -> None:
    code = "tell(hardening.report([hardening.clean_environment(())]))"
    sentences = in_child(code, env={"LD_LIBRARY_PATH": "/nonexistent"})
    assert sentences == [
        "NOT applied: clean environment (set before the start, and in effect already: LD_LIBRARY_PATH)"
    ]


@pytest.mark.parametrize(
    ("user", "limit", "applied"),
    [(0, 2**23, True), (NOBODY, 2**23, False), (NOBODY, 0, False), (NOBODY, -1, True)],
)
def test_memory_is_locked_only_where_later_allocations_succeed(user: int, limit: int, applied: bool) -> None:
    needs_root()
    code = f"""
try:
    resource.setrlimit(resource.RLIMIT_MEMLOCK, ({limit}, {limit}))
except ValueError:
    tell(None)  # root without CAP_SYS_RESOURCE
    sys.exit()
os.setresuid({user}, {user}, {user})
def locked():
    return int(open("/proc/self/status").read().split("VmLck:")[1].split()[0])
hardening.harden_start()
before = locked()
measure = hardening.lock_memory()
after = locked()
blocks = [mmap.mmap(-1, 2**24) for _ in range(4)]  # more than the limit: fails if locking was a mistake
for block in blocks:
    block[:5] = b"touch"
tell([before, measure.applied, after > 2**10, hardening.report([measure])])
"""
    outcome = in_child(code)
    if outcome is None:
        pytest.skip("limits cannot be raised here")
    before, was_applied, is_locked, sentences = outcome
    assert before == 0
    assert was_applied == is_locked == applied
    assert sentences[0].startswith("memory is never" if applied else "NOT applied: memory is never swapped out (RLIMIT")


# --- Where a measure is not to be had -----------------------------------------------------------------------


def test_refusals_are_reported_and_do_not_raise() -> None:
    code = """
hardening._call = lambda *_: (-1, "Function not implemented")
measures = hardening.harden_start() + hardening.harden_running() + [hardening.lock_memory()]
tell([hardening.report(measures), refused(measures), attempt(lambda: open("/dev/null").close())])
"""
    sentences, names, still_open = in_child(code)
    assert "NOT applied: no network (Function not implemented)" in sentences
    assert {"no opening of files", "no gain of privileges", "no network interfaces"} <= set(names)
    assert still_open == "done"


@pytest.mark.parametrize("line", ["sys.platform = 'darwin'", "os.uname = lambda: struct_(machine='riscv64')"])
def test_other_platforms_are_reported(line: str) -> None:
    code = f"""
import types
struct_ = types.SimpleNamespace
{line}
measures = hardening.harden_start() + hardening.harden_running() + [hardening.lock_memory()]
tell([m.applied for m in measures])
"""
    assert in_child(code) == [False, False, False]


def test_second_thread_at_the_start_is_reported() -> None:
    code = """
threading.Thread(target=time.sleep, args=(1,), daemon=True).start()
measures = hardening.harden_start()
tell([refused(measures), attempt(socket.socket)])
"""
    names, network = in_child(code)
    assert {"no network interfaces", "no capabilities of root"} <= set(names)
    assert network == "EPERM"  # the filter holds for all threads


def test_report_says_what_was_not_applied() -> None:
    measures = [Measure("no network", True, "system-call filter"), Measure("no swap", False, "limit")]
    assert report(measures) == ["no network (system-call filter)", "NOT applied: no swap (limit)"]


def test_hardening_can_run_before_anything_large_is_imported() -> None:
    assert in_child("tell([name for name in ('torch', 'numpy', 'transformers') if name in sys.modules])") == []


# --- The filters themselves, for both machines --------------------------------------------------------------

ALLOW, KILL, EPERM, ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
PID = 4242


def decide(program: list[hardening.Instruction], architecture: int, number: int, *arguments: int) -> int:
    """Runs a filter as the kernel would."""
    words = {0: number, 4: architecture}
    for index, argument in enumerate(arguments):
        words[16 + 8 * index], words[20 + 8 * index] = argument & 0xFFFFFFFF, argument >> 32 & 0xFFFFFFFF
    tests: dict[int, Callable[[int, int], Any]] = {
        0x15: lambda a, k: a == k,
        0x25: lambda a, k: a > k,
        0x35: lambda a, k: a >= k,
        0x45: lambda a, k: a & k,
    }
    position, loaded = 0, 0
    while True:
        code, if_true, if_false, operand = program[position]
        position += 1
        if code == 0x06:
            return operand
        if code == 0x20:
            loaded = words.get(operand, 0)
        else:
            position += if_true if tests[code](loaded, operand) else if_false


MACHINES = sorted(hardening._MACHINES)


@pytest.fixture(params=MACHINES)
def machine(request: pytest.FixtureRequest) -> str:
    return request.param


def numbers(machine: str, tables: dict[str, str]) -> dict[str, int]:
    column = hardening._MACHINES[machine][0]
    return {name: n for table in tables.values() for name, n in hardening._numbers(table, column).items()}


def decision(machine: str, running: bool, number: int, *arguments: int) -> int:
    return decide(build_filter(running, machine, PID), hardening._MACHINES[machine][1], number, *arguments)


def test_every_listed_call_is_refused_on_both_machines(machine: str) -> None:
    for running, tables in ((False, hardening.START_DENIALS), (True, hardening.RUNNING_DENIALS)):
        for name, number in numbers(machine, tables).items():
            assert decision(machine, running, number) == EPERM, name


def test_other_architectures_are_killed_on_both_machines(machine: str) -> None:
    for running in (False, True):
        for architecture in (0x40000003, 0x40000028, 0xC00000F3):
            assert decide(build_filter(running, machine, PID), architecture, 0) == KILL


def test_unknown_and_x32_numbers_are_refused_on_both_machines(machine: str) -> None:
    for running in (False, True):
        assert decision(machine, running, 463) == ENOSYS
        assert decision(machine, running, 0xFFFFFFFF) in (EPERM, ENOSYS)
        assert decision(machine, running, 0x40000000 | 41) in (EPERM, ENOSYS)


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("clone", (0x3D0F00,), ALLOW),  # what pthread_create asks for
        ("clone", (0x01200011,), EPERM),  # fork
        ("clone", (0x4111,), EPERM),  # vfork
        ("clone3", (0,), ENOSYS),
        ("sendto", (3, 4, 5, 0, 0), ALLOW),
        ("sendto", (3, 4, 5, 0, 0x1000), EPERM),
        ("sendto", (3, 4, 5, 0, 0x7F00 << 32), EPERM),
        ("kill", (PID, 9), ALLOW),
        ("kill", (1, 9), EPERM),
        ("kill", (0, 9), EPERM),
        ("kill", (2**64 - 1, 9), EPERM),
        ("tgkill", (PID, PID, 6), ALLOW),
        ("tgkill", (1, 1, 6), EPERM),
        ("prctl", (15,), ALLOW),  # name a thread
        ("prctl", (4, 1), EPERM),
        ("prctl", (4 | 1 << 32, 1), EPERM),  # the kernel reads 32 bits
        ("ioctl", (0, 0x5401), ALLOW),
        ("ioctl", (0, 0x5412), EPERM),
        ("ioctl", (0, 0x5412 | 1 << 32), EPERM),
    ],
)
def test_refusals_that_depend_on_arguments(machine: str, name: str, arguments: tuple[int, ...], expected: int) -> None:
    number = numbers(machine, {"": hardening._BY_ARGUMENT})[name]
    assert decision(machine, False, number, *arguments) == expected


def test_limits_may_be_read_but_not_set_once_running(machine: str) -> None:
    number = numbers(machine, {"": hardening._BY_ARGUMENT})["prlimit64"]
    assert decision(machine, True, number, 0, 7, 0, 0x1000) == ALLOW
    assert decision(machine, True, number, 0, 7, 0x1000, 0) == EPERM
    assert decision(machine, True, number, 0, 7, 1 << 32, 0) == EPERM


NEEDED = {
    "x86_64": {"read": 0, "write": 1, "close": 3, "mmap": 9, "mprotect": 10, "munmap": 11, "accept": 43}
    | {"sendmsg": 46, "recvmsg": 47, "futex": 202, "accept4": 288, "getrandom": 318, "memfd_create": 319}
    | {"ftruncate": 77, "fcntl": 72, "memfd_secret": 447, "rseq": 334, "exit_group": 231},
    "aarch64": {
        "read": 63,
        "write": 64,
        "close": 57,
        "mmap": 222,
        "mprotect": 226,
        "munmap": 215,
        "accept": 202,
    }
    | {"sendmsg": 211, "recvmsg": 212, "futex": 98, "accept4": 242, "getrandom": 278, "memfd_create": 279}
    | {"ftruncate": 46, "fcntl": 25, "memfd_secret": 447, "rseq": 293, "exit_group": 94},
}


def test_what_the_enclave_needs_is_allowed_on_both_machines(machine: str) -> None:
    for running in (False, True):
        for name, number in NEEDED[machine].items():
            assert decision(machine, running, number) == ALLOW, name


HEADERS = {
    "x86_64": (Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"), r"#define __NR_(\w+)\s+(\d+)"),
    "aarch64": (Path("/usr/include/asm-generic/unistd.h"), r"#define __NR(?:3264)?_(\w+)\s+(\d+)"),
}


def test_numbers_are_those_of_the_kernel_headers(machine: str) -> None:
    path, pattern = HEADERS[machine]
    if not path.exists():
        pytest.skip("the kernel's headers are not installed")
    official = {name: int(number) for name, number in re.findall(pattern, path.read_text(encoding="utf-8"))}
    tables = {**hardening.START_DENIALS, **hardening.RUNNING_DENIALS, "": hardening._BY_ARGUMENT}
    ours = numbers(machine, tables)
    newer = {"fchmodat2"}  # Linux 6.6
    assert set(ours) - set(official) <= newer
    assert {name: official[name] for name in ours if name in official} == {
        name: number for name, number in ours.items() if name in official
    }
    # "-" only where the machine really lacks the call
    other = {name for m in MACHINES for name in numbers(m, tables)}
    assert not (other - set(ours)) & set(official)
