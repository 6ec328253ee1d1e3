"""Attacks on the byte stream and on the messages in it. After each, an honest host gets exact states."""

import os
import socket
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from semiopen.errors import ProtocolError
from semiopen.protocol.framing import MAX_PAYLOAD, PROTOCOL_VERSION, FrameDecoder, encode_frame
from semiopen.protocol.messages import (
    REQUEST,
    Failed,
    Hello,
    Open,
    Opened,
    Status,
    StatusIs,
    Step,
    Stepped,
    Welcome,
    dump,
    parse,
)
from tests.adversary.lying_host import (
    BAD_PAYLOADS,
    BAD_STREAMS,
    HISTORY,
    LyingHost,
    RawStep,
    code_of,
    honest_states,
    status,
)

HELLO, STATUS = encode_frame(dump(Hello())), encode_frame(dump(Status()))
quick = settings(max_examples=40, derandomize=True, deadline=None, database=None)


# --- Bytes that are no frames ---


@quick
@given(data=st.binary(max_size=300), in_frame=st.booleans(), rest=st.binary(max_size=50))
def test_random_bytes(enclave, unharmed, data, in_frame, rest):
    with LyingHost(enclave.path) as host:
        host.send(encode_frame(data) + rest if in_frame else data)
        host.socket.shutdown(socket.SHUT_WR)
        assert all(code_of(reply) in ("frame", "message") for reply in host.replies())
    unharmed(enclave.path)


@quick
@given(st.data())
def test_damaged_frames(enclave, unharmed, data):
    """Right frames with a few bytes changed: closer to the parser than random bytes come."""
    stream = bytearray(
        HELLO + STATUS + encode_frame(dump(Open(blocks=1, block_size=16, by_window=False, step_tokens=1, sequences=1)))
    )
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    with LyingHost(enclave.path) as host:
        host.send(bytes(stream))
        host.socket.shutdown(socket.SHUT_WR)
        for reply in host.replies():
            assert isinstance(reply, Welcome | StatusIs | Opened) or code_of(reply) in ("frame", "message", "limit")
    unharmed(enclave.path)


@pytest.mark.parametrize("name", BAD_STREAMS)
def test_unreadable_stream_is_answered_and_dropped(enclave, unharmed, name):
    with LyingHost(enclave.path) as host:
        host.send(BAD_STREAMS[name])
        replies = host.replies()  # ends only because the enclave hangs up
        assert code_of(replies[-1]) == "frame"
        assert all(isinstance(reply, Welcome) for reply in replies[:-1])
    unharmed(enclave.path)


def test_truncated_frames(enclave, unharmed):
    for length in range(len(HELLO)):
        with LyingHost(enclave.path) as host:
            host.send(HELLO[:length])
            host.socket.shutdown(socket.SHUT_WR)
            assert host.replies() == []
    unharmed(enclave.path)


def test_frames_split_at_every_byte(enclave, unharmed):
    with LyingHost(enclave.path) as host, LyingHost(enclave.path) as other:
        for split in range(len(HELLO + STATUS) + 1):
            host.send((HELLO + STATUS)[:split])
            assert isinstance(other.ask(Status()), StatusIs)  # meanwhile the enclave has read the first part
            host.send((HELLO + STATUS)[split:])
            assert isinstance(host.reply(), Welcome)
            assert isinstance(host.reply(), StatusIs)
        for byte in HELLO:
            host.send(bytes([byte]))
        assert isinstance(host.reply(), Welcome)
    unharmed(enclave.path)


def test_decoder_gives_the_same_frames_for_every_way_to_cut_a_stream():
    payloads = [b"", b"a", b"b" * 300]
    stream = b"".join(map(encode_frame, payloads))
    for step in (1, 2, 3, 7, 10, 11, 100):
        decoder = FrameDecoder()
        found = [p for i in range(0, len(stream), step) for p in decoder.feed(stream[i : i + step])]
        assert found == payloads


def test_decoder_refuses_a_length_before_it_holds_the_payload():
    for length in (MAX_PAYLOAD + 1, 2**32 - 1):
        with pytest.raises(ProtocolError, match="exceeds the limit"):
            FrameDecoder().feed(b"SOPN" + PROTOCOL_VERSION.to_bytes(2, "big") + length.to_bytes(4, "big"))


def test_largest_frame_is_read(enclave, unharmed):
    with LyingHost(enclave.path) as host:
        padding = b" " * (MAX_PAYLOAD - len(dump(Hello())))
        assert isinstance(host.ask(dump(Hello()) + padding), Welcome)
    unharmed(enclave.path)


def test_many_frames_in_one_write(enclave, unharmed):
    with LyingHost(enclave.path) as host:
        host.send((HELLO + STATUS) * 50)
        for _ in range(50):
            assert isinstance(host.reply(), Welcome)
            assert isinstance(host.reply(), StatusIs)
    unharmed(enclave.path)


def test_half_a_frame_and_a_stall_hold_nobody_up(enclave, unharmed):
    for cut in (1, 9, 10, len(HELLO) - 1):
        with LyingHost(enclave.path) as host:
            host.send(HELLO[:cut])
            unharmed(enclave.path)
            host.send(HELLO[cut:])
            assert isinstance(host.reply(), Welcome)


# --- Hosts that do not behave as a connection should ---


@pytest.mark.parametrize("frame", [HELLO, STATUS, encode_frame(b"{")], ids=["hello", "status", "bad"])
def test_flood_without_reading_is_dropped(enclave, unharmed, frame):
    with LyingHost(enclave.path) as host:
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            for _ in range(100):
                host.socket.sendall(frame * (50_000 // len(frame)))
        unharmed(enclave.path)


def test_flood_beside_an_honest_host(enclave, exact, unharmed):
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            with LyingHost(enclave.path) as host:
                host.send(STATUS * 2000)

    threads = [threading.Thread(target=flood) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(5):
            assert honest_states(enclave.path).equal(exact)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    unharmed(enclave.path)


def test_burst_of_steps_is_not_served_before_others(enclave, unharmed):
    """The frames of one write take turns with other hosts' frames."""
    step = encode_frame(dump(Step(tokens=25, sequences=2, width=2, copies=0, score_cap=True)))
    with LyingHost(enclave.path) as busy, LyingHost(enclave.path) as flood, LyingHost(enclave.path) as honest:
        busy.open(blocks=512, step_tokens=8192, sequences=512)
        busy.lay_out(RawStep([5] * 8192, list(range(0, 8193, 16)), [16] * 512, [[i] for i in range(512)]))
        flood.open().lay_out(HISTORY)
        before = status(enclave.path).steps
        busy.send_payload(dump(Step(tokens=8192, sequences=512, width=1, copies=0, score_cap=True)))
        time.sleep(0.01)  # the enclave is busy with this long step while the others knock
        flood.send(step * 150)
        found = honest.ask(Status())
        assert isinstance(found, StatusIs)
        assert found.steps - before <= 3
        assert all(isinstance(flood.reply(), Stepped) for _ in range(150))
    unharmed(enclave.path)


def test_storm_of_connections(enclave, unharmed):
    for i in range(300):
        with LyingHost(enclave.path) as host:
            host.send(HELLO[: i % 12])
    unharmed(enclave.path)


def test_storm_of_sessions(enclave, unharmed):
    for i in range(100):
        with LyingHost(enclave.path) as host:
            request = encode_frame(
                dump(Open(blocks=4096, block_size=16, by_window=False, step_tokens=8192, sequences=512))
            )
            host.send(request if i % 2 else request * 2)
            if i % 3:
                host.reply()
    unharmed(enclave.path)


def test_more_connections_than_the_enclave_takes(enclave, unharmed):
    hosts = [LyingHost(enclave.path) for _ in range(80)]
    answered = [isinstance(host.ask(Hello()), Welcome) for host in hosts]
    assert answered == [True] * 64 + [False] * 16
    for host in hosts:
        host.close()
    unharmed(enclave.path)


def test_half_closed_connection(enclave, unharmed):
    with LyingHost(enclave.path) as host:
        host.open()
        host.socket.shutdown(socket.SHUT_WR)
        assert host.replies() == []
        unharmed(enclave.path)
    with LyingHost(enclave.path) as host:
        host.open()
        host.socket.shutdown(socket.SHUT_RD)
        host.send(STATUS)
        unharmed(enclave.path)


def test_descriptors_pressed_on_the_enclave_are_not_taken(enclave, unharmed):
    """An enclave that kept what it is sent could be handed files, or run out of descriptors."""
    read_end, write_end = os.pipe()
    with LyingHost(enclave.path) as host:
        for _ in range(20):
            socket.send_fds(host.socket, [HELLO], [write_end] * 50)
            assert isinstance(host.reply(), Welcome)
        os.close(write_end)
        os.set_blocking(read_end, False)
        assert os.read(read_end, 1) == b""  # the end of the pipe: nobody else holds its other end
    os.close(read_end)
    unharmed(enclave.path)


def test_out_of_band_bytes(enclave, unharmed):
    with LyingHost(enclave.path) as host:
        try:
            host.socket.send(b"!", socket.MSG_OOB)
        except OSError:
            pytest.skip("this kernel has no out-of-band data on Unix sockets")
        unharmed(enclave.path)
        host.send(HELLO)
        unharmed(enclave.path)


# --- Messages ---


@pytest.mark.parametrize("name", BAD_PAYLOADS)
def test_bad_message_is_refused_and_the_connection_goes_on(enclave, unharmed, name):
    with LyingHost(enclave.path) as host:
        assert code_of(host.ask(BAD_PAYLOADS[name])) == "message"
        assert isinstance(host.ask(Hello()), Welcome)
    unharmed(enclave.path)


def test_bad_messages_leave_a_session_alone(enclave, unharmed):
    with LyingHost(enclave.path) as host:
        host.open(blocks=3)
        for payload in BAD_PAYLOADS.values():
            assert code_of(host.ask(payload)) == "message"
        found = host.ask(Status())
        assert isinstance(found, StatusIs)
        assert (found.sessions, found.kv_tokens) == (1, 48)
    unharmed(enclave.path)


_scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
_values = st.recursive(
    _scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
_fields = st.sampled_from(["kind", "blocks", "step_tokens", "sequences", "tokens", "width", "copies", "score_cap", "x"])
_kinds = st.sampled_from(["hello", "open", "step", "status", "welcome", "ready", ""])


@settings(quick, max_examples=100)
@given(st.dictionaries(_fields, _values, max_size=8), _kinds)
def test_random_messages(enclave, fields, kind):
    with LyingHost(enclave.path) as host:
        reply = host.ask({**fields, "kind": kind})
        exactly = {"hello": Welcome, "status": StatusIs}
        if kind in exactly and set(fields) <= {"kind"}:
            assert isinstance(reply, exactly[kind])
        elif not isinstance(reply, Opened):
            assert code_of(reply) in ("message", "order", "limit")


def test_random_messages_left_it_unharmed(enclave, unharmed):
    unharmed(enclave.path)


def test_duplicate_keys_mean_one_thing():
    """The kind that selects a message's type and the kind in it come from the same place."""
    for payload, kind in ((b'{"kind":"hello","kind":"status"}', Status), (b'{"kind":"status","kind":"hello"}', Hello)):
        assert isinstance(parse(REQUEST, payload), kind)


def test_refused_messages_are_counted(enclave):
    before = status(enclave.path).refused
    with LyingHost(enclave.path) as host:
        host.ask(b"{")
    assert status(enclave.path).refused == before + 1


@pytest.mark.parametrize("name", ["long", "long when escaped"])
def test_field_name_as_long_as_a_frame(enclave_threads, sealed, unharmed, name):
    enclave = enclave_threads.start(sealed.bundle, sealed.keys)
    character, count = {"long": (b"x", 65_000), "long when escaped": (b"\x7f", 20_000)}[name]
    with LyingHost(enclave.path) as host:
        reply = host.ask(b'{"kind":"hello","' + character * count + b'":1}')
        assert code_of(reply) == "message"
        assert isinstance(reply, Failed)
        assert len(reply.message) < 500
    unharmed(enclave.path)


@pytest.mark.parametrize("counter", ["steps", "tokens", "refused"])
def test_counters_beyond_31_bits(enclave_threads, sealed, unharmed, counter):
    """A host can send refused messages for a few hours; a busy enclave reaches as many tokens in days."""
    enclave = enclave_threads.start(sealed.bundle, sealed.keys)
    setattr(enclave.server._counters, counter, 2**31)
    unharmed(enclave.path)
