"""What every kind of channel must do."""

import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from channel_peer import (
    DEATH,
    DTYPES,
    LIMIT_S,
    OVER_NETWORKS,
    Mail,
    create,
    echo,
    ping,
    recv_all,
    running_peer,
    send_all,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamina_jax.transport import (
    ChannelAddress,
    ChannelError,
    MessageSpec,
    Tag,
    attach,
    channel_class,
    make_stamp,
    recv,
    send,
)

FAILS = jax.errors.JaxRuntimeError


def assert_same(received, mails):
    for tensors, mail in zip(received, mails, strict=True):
        for got, expected in zip(tensors, mail.contents(), strict=True):
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got, expected)


EVERY_DTYPE = Mail(shapes=((3, 5), (7,), (2, 2, 2), (1,)), dtypes=DTYPES, tag=Tag.KV, step=3, layer=2, seed=1)
ODD_SIZES = Mail(
    shapes=((), (0,), (33,), (3, 0, 2), (1, 1)), dtypes=("bfloat16", "int32", "float16", "float32", "int32")
)
NO_TENSORS = Mail(shapes=(), dtypes=(), step=7)


@pytest.mark.parametrize("mail", [EVERY_DTYPE, ODD_SIZES, NO_TENSORS], ids=["every-dtype", "odd-sizes", "no-tensors"])
def test_message_arrives_unchanged(connect, peer, mail):
    there, back = connect(peer, "writer"), connect(peer, "reader")
    peer.start("recv", there.theirs, [[mail]], [0])
    send_all([there.mine], [mail])
    assert_same(peer.result(), [mail])
    peer.start("send", back.theirs, [[mail]], [0])
    assert_same(recv_all([back.mine], [mail]), [mail])
    peer.result()


tensors = st.lists(st.tuples(st.lists(st.integers(0, 9), max_size=3).map(tuple), st.sampled_from(DTYPES)), max_size=3)


@st.composite
def traffic(draw):
    """Programs of messages for each side: the same messages, cut into programs differently, with pauses between."""
    mails = [
        Mail(
            shapes=tuple(shape for shape, _ in drawn),
            dtypes=tuple(dtype for _, dtype in drawn),
            tag=draw(st.sampled_from(Tag)),
            step=draw(st.integers(0, 2**31 - 1)),
            layer=draw(st.integers(0, 100)),
            seed=i,
        )
        for i, drawn in enumerate(draw(st.lists(tensors, min_size=1, max_size=12)))
    ]

    def programs():
        cuts = sorted(draw(st.sets(st.integers(1, len(mails)), max_size=3)) - {len(mails)})
        parts = [mails[a:b] for a, b in zip([0, *cuts], [*cuts, len(mails)], strict=True)]
        return parts, [draw(st.sampled_from([0, 0, 1, 5])) for _ in parts]

    return mails, programs(), programs(), draw(st.integers(1, 5))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(traffic(), st.booleans())
def test_any_traffic_arrives_in_order(kind, peer, traffic, we_send):
    mails, (sent, send_stalls), (received, recv_stalls), num_slots = traffic
    messages = [MessageSpec(mail.tag, tuple(mail.specs)) for mail in mails]
    options = {"peer": "the peer", "messages": messages, "num_slots": num_slots, "timeout_s": 30.0}
    with create(kind, role="writer" if we_send else "reader", **options) as mine:
        theirs = peer.join_to(mine)
        if we_send:
            peer.start("recv", theirs, received, recv_stalls)
            for program, stall_ms in zip(sent, send_stalls, strict=True):
                time.sleep(stall_ms / 1e3)
                send_all([mine], program)
            assert_same(peer.result(), mails)
        else:
            peer.start("send", theirs, sent, send_stalls)
            got = []
            for program, stall_ms in zip(received, recv_stalls, strict=True):
                time.sleep(stall_ms / 1e3)
                got.extend(recv_all([mine], program))
            peer.result()
            assert_same(got, mails)
        peer.do("close", theirs)


def test_order_without_data_dependence(connect, peer):
    """Nothing but the stamp connects these operations; a program may not reorder them all the same."""
    mails = [Mail(layer=layer, seed=layer, tag=Tag(1 + layer % 3)) for layer in range(40)]
    there = connect(peer, "writer", num_slots=3)
    peer.start("recv", there.theirs, [mails[:13], mails[13:]], [0, 0])
    send_all([there.mine], mails)
    assert_same(peer.result(), mails)


def test_round_trips_in_a_scan(connect, peer):
    mail = Mail(shapes=((64,),), dtypes=("bfloat16",))
    there, back = connect(peer, "writer", num_slots=1), connect(peer, "reader", num_slots=1)
    peer.start("echo", there.theirs, back.theirs, mail, 500)
    (got,) = ping(there.mine, back.mine, mail, 500)
    peer.result()
    layers = np.arange(500).astype(got.dtype)[:, None]
    np.testing.assert_array_equal(got, mail.contents()[0][None] + layers)


def test_stamp_orders_across_programs(connect, peer):
    there, back = connect(peer, "writer"), connect(peer, "reader")
    mail = Mail()
    peer.start("echo", there.theirs, back.theirs, mail, 2)
    (x,) = (jnp.asarray(x) for x in mail.contents())

    @jax.jit
    def ask(stamp):
        return send([there.mine], stamp, [x], tag=Tag.Q)

    @jax.jit
    def answer(stamp):
        return recv([back.mine], stamp, mail.specs, tag=Tag.Q)

    next_layer = jnp.asarray([0, 1, 0], jnp.int32)
    (first,), stamp = answer(ask(make_stamp(0)))
    (second,), stamp = answer(ask(stamp + next_layer))
    peer.result()
    np.testing.assert_array_equal(first, x)
    np.testing.assert_array_equal(second, x)
    assert stamp.tolist() == [0, 1, 0]


def test_four_processes_share_two_cores(kind, connect, peer):
    mail = Mail(shapes=((1000,),))
    with running_peer("channel-test-peer-2") as second, running_peer("channel-test-peer-3") as third:
        there, back = connect(peer, "writer"), connect(peer, "reader")
        options = {"slot_bytes": 4096, "num_slots": 4}
        addresses = [second.do("create", 100 + i, kind, role, options) for i, role in enumerate(("writer", "reader"))]
        theirs = [third.attach(address) for address in addresses]
        for i, number in enumerate(theirs):
            second.do("connect", 100 + i, third.do("answer", number))
        peer.start("echo", there.theirs, back.theirs, mail, 300)
        third.start("echo", *theirs, mail, 300)
        second.start("ping", 100, 101, mail, 300)
        (got,) = ping(there.mine, back.mine, mail, 300)
        (other,) = second.result()
        third.result()
        peer.result()
    np.testing.assert_array_equal(got, other)


def test_each_batch_takes_its_own_channel(connect, peer):
    """One program, run for each batch; the channels of the others hold what must not be taken."""
    there, back = ([connect(peer, role) for _ in range(3)] for role in ("writer", "reader"))
    mail = Mail(shapes=((5,),), dtypes=("int32",))

    @jax.jit
    def ask_and_take(stamp, x):
        stamp = send([ends.mine for ends in there], stamp, [x], tag=Tag.Q)
        return recv([ends.mine for ends in back], stamp, mail.specs, tag=Tag.Q)

    for batch in range(3):
        answer = Mail(shapes=mail.shapes, dtypes=mail.dtypes, batch=batch, seed=10 + batch)
        peer.do("send_batches", [ends.theirs for ends in back], [answer])
    for batch in (2, 0, 1):
        asked = Mail(shapes=mail.shapes, dtypes=mail.dtypes, batch=batch, seed=batch)
        (got,), stamp = ask_and_take(make_stamp(0, 0, batch), jnp.asarray(asked.contents()[0]))
        np.testing.assert_array_equal(got, np.random.default_rng(10 + batch).integers(-100, 100, 5))
        assert stamp.tolist() == [0, 0, batch]
        assert_same(peer.do("recv_batches", [ends.theirs for ends in there], [asked]), [asked])


@pytest.mark.parametrize("batch", [-1, 1])
def test_batch_without_a_channel_is_an_error(connect, peer, batch):
    there, back = connect(peer, "writer"), connect(peer, "reader")
    words = rf"of 'q' \(step 0, layer 0, batch {batch}\) failed: the program has 1 channel\(s\), one per batch from 0"
    with pytest.raises(FAILS, match=f"OUT_OF_RANGE: send {words}"):
        send_all([there.mine], [Mail(batch=batch)])
    with pytest.raises(FAILS, match=f"OUT_OF_RANGE: recv {words}"):
        recv_all([back.mine], [Mail(batch=batch)])
    assert back.mine.failure is None


def test_message_of_another_batch_is_an_error(connect, peer):
    first, second = connect(peer, "reader"), connect(peer, "reader")
    peer.do("send", second.theirs, [[Mail()]], [0])
    with pytest.raises(FAILS, match="expected batch 1, got 0"):
        recv_all([first.mine, second.mine], [Mail(batch=1)])


def test_channels_of_the_batches_go_together(connect, peer, kind):
    there, back = connect(peer, "writer"), connect(peer, "reader")
    stamp = make_stamp(0)
    with pytest.raises(ValueError, match="expected a channel for every batch, got none"):
        send([], stamp, [], tag=Tag.Q)
    with pytest.raises(ValueError, match="expected the writer's end of the channel, got the reader's"):
        send([there.mine, back.mine], stamp, [], tag=Tag.Q)
    stray = create(kind, role="writer", peer="a stranger", messages=[])
    with stray, attach(stray.address, role="reader", peer="the test") as other:
        stray.connect(other.answer)
        with pytest.raises(ValueError, match=r"to have one peer, got a stranger \(.*\), the peer \("):
            send([there.mine, stray], stamp, [], tag=Tag.Q)


@pytest.fixture
def background():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def send_then_recv(there, back):
    """Blocks in the recv of layer 3, step 12, after the peer has got one message."""

    def program(stamp):
        stamp = send([there.mine], stamp, [jnp.zeros(4)], tag=Tag.Q)
        return recv([back.mine], stamp, Mail().specs, tag=Tag.ATTENDED)

    jax.block_until_ready(jax.jit(program)(make_stamp(12, 3)))


ASKED = Mail(step=12, layer=3)


def death_as_told_by(kind):
    return DEATH.get(kind, "the peer process has died")


def test_peer_killed_while_we_recv(kind, connect, mortal_peer, background):
    there, back = connect(mortal_peer, "writer"), connect(mortal_peer, "reader")
    mortal_peer.start("recv_and_die", there.theirs, ASKED)
    waiting = background.submit(send_then_recv, there, back)
    mortal_peer.join()
    died = time.monotonic()
    error = waiting.exception(LIMIT_S)
    assert time.monotonic() - died < 2
    expected = (
        "recv of 'attended' (step 12, layer 3, batch 0) "
        f"from the peer (pid {mortal_peer.pid}) failed: {death_as_told_by(kind)}"
    )
    assert isinstance(error, FAILS)
    assert str(error).startswith(f"UNAVAILABLE: {expected}")
    assert back.mine.failure in str(error)
    failure = back.mine.error()
    assert isinstance(failure, ChannelError)
    assert (str(failure), failure.peer) == (back.mine.failure, "the peer")


def test_peer_killed_while_we_send_into_a_full_ring(kind, connect, mortal_peer, background):
    there = connect(mortal_peer, "writer", num_slots=2)
    mails = [Mail(layer=layer) for layer in range(4)]
    mortal_peer.start("recv_and_die", there.theirs, mails[0])
    waiting = background.submit(send_all, [there.mine], mails)
    mortal_peer.join()
    died = time.monotonic()
    error = waiting.exception(LIMIT_S)
    assert time.monotonic() - died < 2
    assert (
        f"send of 'q' (step 0, layer 3, batch 0) to the peer (pid {mortal_peer.pid}) failed: {death_as_told_by(kind)}"
        in str(error)
    )


def test_messages_of_a_dead_peer_are_delivered(kind, connect, mortal_peer):
    back = connect(mortal_peer, "reader")
    mails = [Mail(layer=layer, seed=layer) for layer in range(3)]
    mortal_peer.start("send_and_die", back.theirs, mails)
    mortal_peer.join()
    assert_same(recv_all([back.mine], mails), mails)
    with pytest.raises(FAILS, match=rf"layer 3, batch 0\).*{death_as_told_by(kind)}"):
        recv_all([back.mine], [Mail(layer=3)])


def test_messages_of_a_closed_peer_are_delivered(connect, peer):
    back = connect(peer, "reader")
    mails = [Mail(layer=layer, seed=layer) for layer in range(3)]
    peer.do("send", back.theirs, [mails], [0])
    peer.do("close", back.theirs)
    assert_same(recv_all([back.mine], mails), mails)
    with pytest.raises(FAILS, match=r"UNAVAILABLE.*the peer has closed the channel"):
        recv_all([back.mine], [Mail(layer=3)])


def test_stopped_peer_is_a_deadline_error(connect, mortal_peer):
    back = connect(mortal_peer, "reader", timeout_s=0.25)
    mortal_peer.signal(signal.SIGSTOP)
    with pytest.raises(FAILS, match=r"DEADLINE_EXCEEDED: recv of 'q'.*no message came in 0\.25 s, though the peer"):
        recv_all([back.mine], [Mail()])


def test_full_ring_is_a_deadline_error(connect, peer):
    there = connect(peer, "writer", num_slots=2, timeout_s=0.25)
    with pytest.raises(
        FAILS, match=r"send of 'q' \(step 0, layer 2, batch 0\).*no slot of the ring came free in 0\.25 s"
    ):
        send_all([there.mine], [Mail(layer=layer) for layer in range(3)])


def test_peer_that_never_attaches_is_a_deadline_error(kind):
    with create(kind, role="reader", peer="nobody", messages=[], timeout_s=0.1) as channel:
        assert channel.peer_pid is None
        if channel.needs_answer:
            with pytest.raises(ValueError, match=r"the channel to nobody is not connected: pass .* to connect"):
                recv([channel], make_stamp(0), [], tag=Tag.Q)
            return
        with pytest.raises(FAILS, match=r"from nobody \(not attached yet\) failed: no message came"):
            recv_all([channel], [Mail()])


def test_first_failure_is_final(connect, peer):
    back = connect(peer, "reader", timeout_s=1.0)
    with pytest.raises(FAILS, match="layer 5") as first:
        recv_all([back.mine], [Mail(layer=5)])
    start = time.monotonic()
    for layer in range(20):
        with pytest.raises(FAILS, match=re.escape(str(first.value))):
            recv_all([back.mine], [Mail(layer=layer)])
    assert back.mine.failure in str(first.value)
    assert time.monotonic() - start < 20 * 1.0
    with pytest.raises(AssertionError, match=r"ABORTED: send of 'q'.*the peer has aborted the channel"):
        peer.do("send", back.theirs, [[Mail()]], [0])


@pytest.mark.parametrize(("end", "words"), [("abort", "aborted"), ("close", "closed")])
def test_we_end_our_own_wait(connect, peer, background, end, words):
    there, back = connect(peer, "writer"), connect(peer, "reader")
    peer.start("recv", there.theirs, [[ASKED]], [0])
    waiting = background.submit(send_then_recv, there, back)
    peer.result()
    getattr(back.mine, end)()
    error = waiting.exception(LIMIT_S)
    assert "ABORTED: recv of 'attended' (step 12, layer 3, batch 0)" in str(error)
    assert f"this side has {words} the channel" in str(error)


def test_peer_ends_our_wait(connect, peer, background):
    there, back = connect(peer, "writer"), connect(peer, "reader")
    waiting = background.submit(send_then_recv, there, back)
    peer.do("recv_and_abort", there.theirs, ASKED, back.theirs)
    assert "the peer has aborted the channel" in str(waiting.exception(LIMIT_S))


def test_we_end_the_wait_of_the_peer(connect, peer):
    there = connect(peer, "writer")
    peer.start("recv", there.theirs, [[Mail()], [Mail(layer=1)]], [0, 0])
    send_all([there.mine], [Mail()])
    there.mine.abort()
    with pytest.raises(AssertionError, match=r"ABORTED: recv of 'q' .*from the test \(pid \d+\) failed: the peer has"):
        peer.result()


SENT = Mail(shapes=((4,), (8,)), dtypes=("float32", "float16"), step=5, layer=6, tag=Tag.KV)


@pytest.mark.parametrize(
    ("awaited", "words"),
    [
        ({"tag": Tag.Q}, r"expected 'q', got 'kv' \(step 5, layer 6, batch 0\)"),
        ({"step": 4}, "expected step 4, got 5"),
        ({"layer": 7}, "expected layer 7, got 6"),
        ({"shapes": ((4,),), "dtypes": ("float32",)}, "expected tensor count 1, got 2"),
        ({"shapes": ((40,), (8,))}, "expected payload bytes 256, got 128"),
        ({"dtypes": ("float16", "float32")}, "its tensors differ in dtype"),
        ({"dtypes": ("int32", "float16")}, "its tensors differ in dtype"),
    ],
)
def test_unexpected_message_is_an_error(connect, peer, awaited, words):
    back = connect(peer, "reader")
    peer.do("send", back.theirs, [[SENT]], [0])
    wrong = Mail(**({name: getattr(SENT, name) for name in SENT.__dataclass_fields__} | awaited))
    with pytest.raises(FAILS, match=f"FAILED_PRECONDITION.*it is not the message|{words}") as error:
        recv_all([back.mine], [wrong])
    assert re.search(words, str(error.value))


def test_message_larger_than_a_slot_is_refused(kind, connect, peer):
    large = MessageSpec(Tag.KV, (jax.ShapeDtypeStruct((1024,), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.int32)))
    words = r"message 'kv' \(float32\[1024\], int32\[1\]\) takes 4160 bytes and a slot of the channel has 4096"
    with pytest.raises(ValueError, match=words):
        create(kind, role="writer", peer="the peer", messages=[large], slot_bytes=4096)
    there, back = connect(peer, "writer"), connect(peer, "reader")
    with pytest.raises(ValueError, match=words):
        send([there.mine], make_stamp(0), [jnp.zeros(1024), jnp.zeros(1, jnp.int32)], tag=Tag.KV)
    with pytest.raises(ValueError, match=words):
        recv([back.mine], make_stamp(0), large.tensors, tag=Tag.KV)


def test_slot_takes_the_largest_message(kind):
    messages = [MessageSpec(Tag.Q, (jax.ShapeDtypeStruct((n,), jnp.bfloat16),)) for n in (3, 100)]
    with create(kind, role="writer", peer="the peer", messages=messages) as channel:
        assert channel.slot_bytes == messages[1].nbytes == 256


def test_wrong_use_is_refused_when_traced(connect, peer):
    there, back = connect(peer, "writer"), connect(peer, "reader")
    stamp = make_stamp(0)
    with pytest.raises(ValueError, match="expected the writer's end of the channel, got the reader's"):
        send([back.mine], stamp, [], tag=Tag.Q)
    with pytest.raises(ValueError, match="expected the reader's end of the channel, got the writer's"):
        recv([there.mine], stamp, [], tag=Tag.Q)
    with pytest.raises(ValueError, match="tensor 1 of 'q' has dtype int8; a message carries bfloat16, float16"):
        send([there.mine], stamp, [jnp.zeros(1), jnp.zeros(1, jnp.int8)], tag=Tag.Q)


def test_closed_channel(connect, peer):
    back = connect(peer, "reader")
    program = jax.jit(lambda stamp: recv([back.mine], stamp, Mail().specs, tag=Tag.Q)).lower(make_stamp(0)).compile()
    back.mine.close()
    back.mine.close()
    assert back.mine.closed
    with pytest.raises(ValueError, match="the channel to the peer is closed"):
        recv([back.mine], make_stamp(0), [], tag=Tag.Q)
    with pytest.raises(FAILS, match=r"ABORTED: recv of 'q' .*: this side has closed the channel"):
        jax.block_until_ready(program(make_stamp(0)))


def test_number_of_a_closed_channel_is_used_again(kind):
    """So that programs of the next session are those of this one, and JAX's cache has them compiled."""
    options = {"peer": "the peer", "messages": []}
    with create(kind, role="writer", **options) as first, create(kind, role="writer", **options) as second:
        assert first.id != second.id
        number = first.id
        first.close()
        with create(kind, role="reader", **options) as third:
            assert third.id == number


def test_connecting_without_need(kind):
    """Who handles channels of any kind connects all of them: without an answer if there is none."""
    mine = create(kind, role="writer", peer="the peer", messages=[])
    with mine, attach(mine.address, role="reader", peer="the creator") as other:
        assert (mine.answer, mine.connected, other.connected) == (None, not mine.needs_answer, True)
        assert (other.answer is not None) == mine.needs_answer
        mine.connect(other.answer)
        assert mine.connected
        with pytest.raises(ValueError, match=r"connected already|expected no answer of the peer"):
            mine.connect(mine.address)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"kind": "shm"}, "expected kind 'answering', got 'shm'"),
        ({"num_slots": 7}, "expected num_slots 8, got 7"),
        ({"slot_bytes": 128}, "expected slot_bytes 64, got 128"),
        ({"creator_role": "reader"}, "expected creator_role 'writer', got 'reader'"),
        ({"location": "what?"}, "the peer answered 'what\\?' to the challenge"),
    ],
)
def test_answer_of_another_channel(changed, message):
    mine = create("answering", role="writer", peer="the peer", messages=[])
    with mine, attach(mine.address, role="reader", peer="the creator") as other:
        right = other.answer
        assert right is not None
        with pytest.raises(ValueError, match=message):
            mine.connect(msgspec.structs.replace(right, **changed))
        assert not mine.connected
        mine.connect(right)


def test_both_ends_know_each_other(connect, mortal_peer):
    assert connect(mortal_peer, "reader").mine.peer_pid == mortal_peer.pid


def test_taken_end_is_refused(kind, connect, peer):
    there = connect(peer, "writer")
    # Without memory in common only whoever has taken the free end knows that it is taken.
    for role in ("writer",) if kind in OVER_NETWORKS else ("writer", "reader"):
        with pytest.raises(ValueError, match=f"the {role} of the ring at .* is already taken: expected no {role}, got"):
            attach(there.address, role=role, peer="the peer")


@pytest.mark.parametrize(("name", "value"), [("num_slots", 0), ("slot_bytes", 0), ("timeout_s", 0.0)])
def test_senseless_sizes_are_refused(kind, name, value):
    with pytest.raises(ValueError, match=name):
        create(kind, role="writer", peer="the peer", messages=[], **{name: value})


def test_unknown_kind_lists_the_known():
    with pytest.raises(ValueError, match="unknown kind of channel 'pigeon'; supported: shm"):
        channel_class("pigeon")
    nowhere = ChannelAddress(kind="pigeon", location="", num_slots=1, slot_bytes=64, creator_role="writer")
    with pytest.raises(ValueError, match="unknown kind of channel 'pigeon'"):
        attach(nowhere, role="reader", peer="the peer")


def test_echo_is_the_other_side_of_ping(connect, peer):
    """Both programs in the other order: we echo."""
    there, back = connect(peer, "writer"), connect(peer, "reader")
    peer.start("ping", back.theirs, there.theirs, Mail(), 5)
    echo(back.mine, there.mine, Mail(), 5)
    (got,) = peer.result()
    assert got.shape == (5, 4)
