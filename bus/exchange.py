"""One actor's end of the bus, independent of transport: asks, calls, streams, mailbox, deadlines, counters.

Owns all state of conversations, for ``Node`` (sockets) and ``LocalSystem`` (one process, virtual time) alike.
Thread: the loop of its node. A transport hands it frames (``receive``) and turns (``serve``), runs its timers, and
sends what it puts into a link's ``Port``.
"""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Callable
from typing import Any

from ..errors import AnswerLost, BadFrame, BusError, ChipbusError, DeadlineExceeded, MailboxFull, Overloaded, PeerGone
from .actor import Actor
from .checks import Checks
from .clock import NS_PER_S, Clock
from .conversation import BROKEN, CANCEL_REASONS, CANCELLED, EXPIRED, STREAM_WINDOW, Ask, Call
from .credits import CREDIT_WAIT_S, WORK_CREDIT, WORK_CREDIT_BYTES, cost_of
from .deadlines import Deadlines
from .envelope import (
    ASK,
    CANCEL,
    CHECK,
    CHECKED,
    CREDIT,
    ERROR,
    HEADER_BYTES,
    NO_TRACE,
    PLAIN_HEADER,
    REPLY,
    STREAM,
    WORK,
    Envelope,
    Kind,
    Lane,
    envelope_of,
    name_id,
    record_at,
    seal,
)
from .histogram import Series
from .ledger import LedgerWriter
from .lifecycle import error_of, failure_of
from .lifespan import Lifespan
from .link import ANSWER_BOUND, OUT_BOUND, Link
from .logs import get_logger
from .mailbox import Letter, Mailbox, letter_of
from .peers import Peers
from .ports import Codec, Driver, WireCodec
from .recording import envelope_fields
from .registry import PLAIN, encode, lookup, type_of
from .timers import TimerQueue

__all__ = ["Exchange"]

LONGEST_TIMEOUT_S = 1e9  # 31 years, so that a deadline fits into its field
HALF_CREDIT = WORK_CREDIT_BYTES // 2
SMALL = 1024  # bytes of a body that are copied faster than viewed
EXIT_SOFTWARE = 70  # sysexits.h: internal software error
CAUGHT = (Exception, SystemExit)
"""Whatever a handler raises belongs to its call, not to the loop."""

pack, unpack_from = PLAIN_HEADER.pack, PLAIN_HEADER.unpack_from


class Exchange:
    """The bus around one actor. Every message it sends or takes goes through here exactly once."""

    def __init__(
        self,
        actor: Actor,
        driver: Driver,
        *,
        name: str,
        incarnation: int,
        clock: Clock,
        seed: int,
        ledger: LedgerWriter | None = None,
        codec: Codec | None = None,
    ) -> None:
        self.actor = actor
        self.name = name
        self.incarnation = incarnation
        self.clock = clock
        self.ledger = ledger
        self.random = random.Random(f"{seed}/{name}/{incarnation}")  # noqa: S311 (repeatable on purpose)
        self.log = get_logger().bind(actor=name, incarnation=incarnation)
        self.timers = TimerQueue()
        self.mailbox = Mailbox()
        self.peers = Peers(self, driver)
        self.checks = Checks(self)
        self.deadlines = Deadlines(self)
        self.counters: Counter[str] = Counter()
        self.credit_waits = Series(CREDIT_WAIT_S)  # seconds, of asks that found no credit
        self.sender = ""
        self.sender_incarnation = 0
        self.is_finished = False
        self.id = name_id(name)
        codec = codec or WireCodec()
        self._encode, self._decode = codec.encode, codec.decode
        self._trace_begin = self.random.randbytes(8)
        self._asked = 0
        self._links = self.peers.links
        self.lifespan = Lifespan(self, driver)
        self._handlers = self.lifespan.handlers()
        for kind, method in actor.handler_names().items():
            self._handlers.setdefault(kind, getattr(actor, method))

    # What the actor says.

    def tell(self, to: str, message: Any) -> None:
        """See ``Context.tell``."""
        link = self._links.get(to)
        if link is None or self.is_finished:
            raise self._gone(to)
        row = type_of(message)
        body = self._encode(message)
        if not row.is_work:
            link.sequence += 1
            self._send_plain(link, row.tell_head, True, link.sequence, 0, NO_TRACE, 0, body, OUT_BOUND)
        elif link.work_sent < link.work_limit:
            link.sequence += 1
            total = link.work_sent + cost_of(len(body))
            self._send_plain(link, row.tell_head, False, link.sequence, 0, NO_TRACE, total, body, OUT_BOUND)
            link.work_sent = total
            if self.checks.timer is None:
                self.checks.begin()
        else:
            bounds = f"{WORK_CREDIT} messages or {WORK_CREDIT_BYTES} bytes"
            raise MailboxFull(f"{to} has not taken the work that it was sent; at most {bounds} of it may wait")

    def ask(
        self,
        to: str,
        message: Any,
        *,
        timeout_s: float,
        on_reply: Callable[[Any], None],
        on_error: Callable[[ChipbusError], None],
        on_item: Callable[[Any], None] | None = None,
        trace_id: bytes | None = None,
        wait_for_link: bool = False,
    ) -> Ask:
        """See ``Context.ask``."""
        row = type_of(message)
        timeout_ns = int((LONGEST_TIMEOUT_S if timeout_s > LONGEST_TIMEOUT_S else timeout_s) * NS_PER_S)
        now_ns = self.clock.now_ns()
        deadline_ns = now_ns + (timeout_ns if timeout_ns > 0 else 1)
        if not trace_id:
            self._asked += 1
            trace_id = self._trace_begin + self._asked.to_bytes(8, "little")
        ask = Ask(self, row, now_ns, deadline_ns, trace_id, on_reply, on_error, on_item)
        if deadline_ns < self.deadlines.next_ns:
            self.deadlines.look_at(deadline_ns)
        if wait_for_link and to not in self._links and not self.is_finished and self.peers.park(to, ask, message):
            return ask
        self.start(ask, to, message)
        return ask

    def start(self, ask: Ask, to: str, message: Any) -> None:
        """Send an ask that is open; what prevents it is delivered soon, never raised."""
        try:
            link = self._links.get(to)
            if link is None or self.is_finished:
                raise self._gone(to)
            body = self._encode(message)
            link.sequence += 1
            ask.link, ask.correlation = link, link.sequence
            if ask.row.is_work and link.work_sent >= link.work_limit:
                link.wait(ask, body, OUT_BOUND)
            else:
                self._send_ask(link, ask, body)
        except BusError as error:
            ask.link = None
            self._fail_soon(ask, error)
        else:
            link.asks[ask.correlation] = ask
            if self.checks.timer is None:
                self.checks.begin()

    def _send_ask(self, link: Link, ask: Ask, body: bytes) -> None:
        row, correlation = ask.row, ask.correlation
        total = link.work_sent + cost_of(len(body)) if row.is_work else 0
        self._send_plain(
            link, row.ask_head, not row.is_work, correlation, ask.deadline_ns, ask.trace_id, total, body, OUT_BOUND
        )  # fmt: skip
        ask.is_sent = True
        if total:
            link.work_sent = total

    def soon(self, callback: Callable[[], None]) -> None:
        """Run a callback in the next turn."""
        self.timers.at(self.clock.now_ns(), callback)

    def answer(self, call: Call, kind: int, message: Any) -> bool:
        """Send an answer of an open call; False (and counted) if nobody waits for it any more."""
        link = call.link
        if link is None:
            self.count("late_answers")
            return False
        row, body = type_of(message), self._encode(message)
        correlation, trace_id, position = call.correlation, call.trace_id, call.next_item
        try:
            if call.lane == WORK and kind in row.answer_heads:
                head = row.answer_heads[kind]
                self._send_plain(link, head, False, correlation, 0, trace_id, position, body, ANSWER_BOUND)
            else:
                self.send(
                    link, kind, row.type_id, call.lane, correlation, 0, trace_id, position, body, ANSWER_BOUND
                )  # fmt: skip
        except MailboxFull as error:  # the asker finds out when it checks
            self.count("streams_overrun", peer=link.peer)
            call.cancelled(str(error))
            return False
        return True

    def overrun(self, call: Call, reason: str) -> None:
        """End a call whose asker reads too slowly."""
        self.count("streams_overrun", peer=call.sender)
        self.answer(call, ERROR, failure_of(Overloaded(reason)))
        call.cancelled(reason)

    def give_up(self, ask: Ask, reason: int) -> None:
        """End an ask without calling anybody, and tell the callee why (index into ``CANCEL_REASONS``)."""
        link = ask.link
        ask.end()
        if link is not None and not ask.is_sent:
            self.waited(ask)
        if link is None or not ask.is_sent or link is not self._links.get(link.peer):
            return
        link.given_up.add(ask.correlation)
        try:
            self.send(
                link, CANCEL, 0, ask.lane, ask.correlation, 0, ask.trace_id, reason, b"", ANSWER_BOUND,
                control=True,
            )  # fmt: skip
        except MailboxFull:
            self.count("dead_letters", peer=link.peer, message="cancel")

    def expire(self, ask: Ask) -> None:
        """The deadline of an open ask passed."""
        if ask.link is None:
            why = "and never sent: no link came up"
        elif ask.is_sent:
            why = f"by {ask.link.peer}"
        else:
            why = f"and never sent: {ask.link.peer} did not take what it was sent before"
        self.give_up(ask, EXPIRED)
        error = DeadlineExceeded(f"{ask.what} was not answered in time {why}")
        self.guard("on_error", None, ask.on_error, error)

    def _fail_soon(self, ask: Ask, error: ChipbusError) -> None:
        """Deliver an error that was known before ``ask`` returned, unless it is cancelled first."""

        def deliver() -> None:
            if ask.is_open:
                ask.end()
                ask.on_error(Overloaded(str(error)) if isinstance(error, MailboxFull) else error)

        self.soon(deliver)

    def _gone(self, name: str) -> PeerGone:
        return PeerGone(f"{self.name} has {'stopped' if self.is_finished else f'no link to {name}'}")

    def _send_plain(
        self,
        link: Link,
        head: int,
        control: bool,
        correlation: int,
        deadline_ns: int,
        trace_id: bytes,
        position: int,
        body: bytes,
        bound: int,
    ) -> None:
        """``send`` for most messages: what they have in common was put together before, see ``envelope.head_of``."""
        record = pack(head, correlation, deadline_ns, link.ends_out, trace_id, position, len(body)) + body
        (link.port or link).put(control, record, bound)
        if self.ledger is not None:
            self.record("out", link.peer, link.incarnation, envelope_of(record))

    def send(
        self,
        link: Link,
        kind: int,
        type_id: int,
        lane: int,
        correlation: int,
        deadline_ns: int,
        trace_id: bytes,
        position: int,
        body: bytes,
        bound: int,
        *,
        control: bool = False,
    ) -> None:
        """One record of a link; the fields are those of ``Envelope``. Raises ``MailboxFull`` and ``BadFrame``."""
        record = seal(
            kind, type_id, lane, correlation, deadline_ns, self.id, link.peer_id, self.incarnation, trace_id, position,
            body,
        )  # fmt: skip
        (link.port or link).put(control or lane < WORK, record, bound)
        if self.ledger is not None:
            self.record("out", link.peer, link.incarnation, envelope_of(record))

    def handshake(self, kind: Kind, message: Any, peer: str, peer_incarnation: int) -> bytes:
        """A HELLO, WELCOME or REFUSE as a record; it goes out before there is a link."""
        record = seal(
            kind, type_of(message).type_id, Lane.CHILD, 0, 0, self.id, name_id(peer), self.incarnation, NO_TRACE, 0,
            encode(message),
        )  # fmt: skip
        self.record("out", peer, peer_incarnation, envelope_of(record))
        return record

    # What arrives.

    def receive(self, peer: str, frame: bytes, *, control: bool) -> None:
        """A frame from a linked peer. Bytes that are no record of it are counted and dropped, never raised."""
        offset, end = 0, len(frame)
        view: memoryview | None = None
        try:
            while True:
                link = self._links.get(peer)
                if link is not None and not control:
                    offset = self._receive_plain(link, frame, offset)
                    if offset == end and offset:
                        return
                view = view or memoryview(frame)
                envelope, body, offset = record_at(view, offset)
                if link is None or envelope.incarnation != link.incarnation or envelope.source != link.peer_id:
                    self.count("late_frames", peer=peer, from_incarnation=envelope.incarnation)
                else:
                    self._accept(link, envelope, body, control)
                if offset == end:
                    return
        except BadFrame as error:
            self.count("bad_frames", peer=peer, error=str(error))

    def _receive_plain(self, link: Link, frame: bytes, offset: int) -> int:
        """Put the records of a frame into the mailbox as long as they are plain; the offset of the first that is not.

        Plain is a tell, an ask or an answer in the WORK lane, of a message we know, whole, from this life of this peer
        to us, and, unless it is an answer, new: all that the long way, which the others take, would find nothing to say
        about. A head that is in the table has the right version, kind, lane and flags, and nothing that is done here
        runs code of an actor, so what is looked up before the first record holds until the last.
        """
        work, end = self.mailbox.work, len(frame)
        if (
            link.cancelled
            or self.is_finished
            or self.ledger is not None
            or not self.mailbox.has_room_for(end // HEADER_BYTES)
        ):
            return offset
        ends_in, seen = link.ends_in, link.seen[False]
        while offset + HEADER_BYTES <= end:
            head, correlation, deadline_ns, ends, trace_id, position, body_bytes = unpack_from(frame, offset)
            begin = offset + HEADER_BYTES
            after = begin + body_bytes
            plain = PLAIN.get(head)
            if plain is None or ends != ends_in or after > end:
                break
            kind, type_id = plain
            call = None
            if kind <= ASK:
                if correlation <= seen:
                    break
                if kind == ASK:
                    if not deadline_ns:
                        break
                    call = link.calls[correlation] = Call(self, link, correlation, WORK, deadline_ns, trace_id)
                seen = correlation
            body = frame[begin:after] if body_bytes <= SMALL else memoryview(frame)[begin:after]
            work.append((link, kind, type_id, WORK, correlation, position, body, call))
            offset = after
        link.seen[False] = seen
        return offset

    def _accept(self, link: Link, envelope: Envelope, body: memoryview, control: bool) -> None:
        if self.ledger is not None:
            self.record("in", link.peer, link.incarnation, envelope)
        kind = envelope.kind
        if envelope.destination != self.id:
            raise BadFrame(f"a record from {link.peer} is for another node")
        if kind <= ASK:
            self._accept_request(link, envelope, body, control)
        elif kind <= ERROR or kind == CHECKED:
            self.mailbox.push(letter_of(link, envelope, body, None))
        elif kind == CANCEL:
            self._accept_cancel(link, envelope)
        elif kind == CREDIT:
            self._accept_credit(link, envelope)
        elif kind == CHECK:
            self.checks.accept(link, envelope)
        else:
            raise BadFrame(f"a {Kind(kind).name} from {link.peer} on a link that is up")

    def _accept_request(self, link: Link, envelope: Envelope, body: memoryview, control: bool) -> None:
        correlation, lane = envelope.correlation, envelope.flags
        if correlation <= link.seen[control]:
            self.count("duplicates", peer=link.peer, kind=Kind(envelope.kind).name)
            return
        link.seen[control] = correlation
        call = None
        if envelope.kind == ASK:
            call = Call(self, link, correlation, lane, envelope.deadline_ns, envelope.trace_id)
            link.calls[correlation] = call
            if correlation in link.cancelled:
                call.cancelled(CANCEL_REASONS[CANCELLED])
        if link.cancelled and not control:  # asks before this one were lost
            link.cancelled = {number for number in link.cancelled if number > correlation}
        try:
            row = lookup(envelope.type_id)
            if row.lane != lane or (lane < WORK) != control:
                raise BadFrame(f"{row.cls.__name__} from {link.peer} in lane {lane}, not {row.lane}")
            if call is not None and not envelope.deadline_ns:
                raise BadFrame(f"{row.cls.__name__} from {link.peer} asks without a deadline")
        except BadFrame as error:
            self._reject(call, "bad_frames", error, link)
        else:
            if self.is_finished:
                self._reject(call, "dead_letters", PeerGone(f"{self.name} has stopped"), link)
            elif self.mailbox.offer(letter_of(link, envelope, body, call)):
                return
            else:
                counter = "dead_letters" if call is None else "overloaded_asks"
                self._reject(call, counter, Overloaded(f"the {Lane(lane).name} mailbox of {self.name} is full"), link)
        if lane == WORK and envelope.position - link.work_told >= HALF_CREDIT:
            self.checks.return_work(link, envelope.position)

    def _reject(self, call: Call | None, counter: str, error: ChipbusError, link: Link) -> None:
        self.count(counter, peer=link.peer, error=str(error))
        if call is not None and call.is_open:
            call.fail(error)

    def _accept_cancel(self, link: Link, envelope: Envelope) -> None:
        correlation = envelope.correlation
        if correlation in link.cancels:
            self.count("duplicates", peer=link.peer, kind="CANCEL")
            return
        link.cancels.add(correlation)
        call = link.calls.get(correlation)
        if call is not None:
            call.cancelled(CANCEL_REASONS[envelope.position % len(CANCEL_REASONS)])
        elif envelope.lane == WORK and correlation > link.seen[False]:
            if len(link.cancelled) >= ANSWER_BOUND:
                raise BadFrame(f"{link.peer} has cancelled {len(link.cancelled)} asks that have not arrived")
            link.cancelled.add(correlation)  # the ask itself is still on its way

    def _accept_credit(self, link: Link, envelope: Envelope) -> None:
        """A peer has taken items of a stream, or work: what waits for that is sent."""
        if envelope.correlation:
            call = link.calls.get(envelope.correlation)
            if call is not None:
                call.credit(envelope.position)
        elif link.credit(envelope.position):
            link.quiet.heard()
            while link.waiting and link.work_sent < link.work_limit:
                ask, body = link.waiting.popleft()
                if ask.is_open:
                    try:
                        self._send_ask(link, ask, body)
                    except BusError as error:
                        self._fail_soon(ask, error)
                    self.waited(ask)

    def waited(self, ask: Ask) -> None:
        """Count an ask that found no credit: it has now been sent, or has ended before."""
        self.credit_waits.observe((self.clock.now_ns() - ask.began_ns) / NS_PER_S)

    def wants_more(self, control: bool) -> bool:
        """Whether a transport should read on at once, or let the actor work and poll again.

        A lone message is mostly alone, and asking the socket for more costs a twentieth of a round trip. Work is read
        only while the mailbox has room.
        """
        return len(self.mailbox) > 1 and (control or self.mailbox.has_room)

    # What is done with it.

    def serve(self, *, control_only: bool = False) -> bool:
        """Handle the most urgent letter; False if there is none."""
        letter = self.mailbox.pop(control_only)
        if letter is None or self.is_finished:
            return False
        link, kind, type_id, lane, _, position, body, call = letter
        if kind > ASK:
            self._serve_answer(letter)
            return True
        if position - link.work_told >= HALF_CREDIT and lane == WORK:
            self.checks.tell_taken(link, position)
        if call is not None and not self._may_start(link, call):
            return True
        try:
            message = self._decode(type_id, body)
        except BadFrame as error:
            self._reject(call, "bad_frames", error, link)
            return True
        handler = self._handlers.get(type(message))
        if handler is None:
            name = type(message).__name__
            self._reject(call, "dead_letters", BusError(f"{self.name} does not handle {name}"), link)
            return True
        self.sender, self.sender_incarnation = link.peer, link.incarnation
        try:  # as ``guard`` does
            handler(message, call)
        except CAUGHT as error:
            self._failed(type(message).__name__, call, error)
        self.sender = ""
        return True

    def serve_answers(self, link: Link) -> None:
        """Handle the answers of one peer that have been received, ahead of all else."""
        for letter in self.mailbox.take_answers(link):
            self._serve_answer(letter)

    def _may_start(self, link: Link, call: Call) -> bool:
        """Somebody still waits for the answer of a call that was taken out of the mailbox."""
        if call.link is None:
            self.count("cancelled_before_start")
            return False
        if call.deadline_ns <= self.clock.now_ns():
            late = DeadlineExceeded(f"the deadline passed before {self.name} could start")
            self._reject(call, "expired_before_start", late, link)
            return False
        return True

    def _serve_answer(self, letter: Letter) -> None:
        link, kind, type_id, _, correlation, position, body, _ = letter
        if kind == CHECKED:
            self.checks.conclude(link, correlation, position)
            return
        ask = link.asks.get(correlation)
        if ask is None or (kind == STREAM and position < ask.next_item):
            self._drop_answer(link, correlation, kind)
            return
        try:
            if kind != ERROR and position != ask.next_item:
                raise AnswerLost(f"item {ask.next_item} of the answer to {ask.what} by {link.peer} is missing")
            message = self._decode(type_id, body)
            if kind == ERROR:
                message = error_of(message)
        except (AnswerLost, BadFrame) as error:
            counter = "lost_answers" if isinstance(error, AnswerLost) else "bad_frames"
            self.count(counter, peer=link.peer, error=str(error))
            self.give_up(ask, BROKEN)
            self.guard("on_error", None, ask.on_error, error)
            return
        if kind == STREAM:
            ask.next_item += 1
            if ask.on_item is not None:
                self.guard("on_item", None, ask.on_item, message)
            if ask.next_item - ask.credited >= STREAM_WINDOW // 2:
                self.checks.credit_items(link, ask)
            return
        ask.end()
        if kind == REPLY:
            self.guard("on_reply", None, ask.on_reply, message)
        else:
            self.guard("on_error", None, ask.on_error, message)

    def _drop_answer(self, link: Link, correlation: int, kind: int) -> None:
        """Of an ask that was given up, or was answered already."""
        is_late = correlation > link.sequence or correlation in link.given_up
        self.count("late_frames" if is_late else "duplicates", peer=link.peer, kind=Kind(kind).name)

    def guard(self, what: str, call: Call | None, callback: Callable[..., None], *arguments: Any) -> None:
        """Run code of the actor; what it raises fails ``call`` and is logged, and the actor goes on living."""
        try:
            callback(*arguments)
        except CAUGHT as error:
            self._failed(what, call, error)

    def _failed(self, what: str, call: Call | None, error: BaseException) -> None:
        if isinstance(error, (SystemExit, MemoryError)):
            self.log.critical("actor.fatal", handler=what, error=repr(error), exit_code=EXIT_SOFTWARE)
            os._exit(EXIT_SOFTWARE)
        self.counters["handler_failures"] += 1
        self.log.error("actor.handler_failed", handler=what, error=repr(error), exc_info=True)
        if call is not None and call.is_open:
            call.fail(error if isinstance(error, ChipbusError) else ChipbusError(repr(error)))

    # What is written down.

    def count(self, counter: str, amount: int = 1, **facts: object) -> None:
        """Count an event; the first is logged, and each that gives the total another digit."""
        if not amount:
            return
        before = self.counters[counter]
        self.counters[counter] = total = before + amount
        if not before or len(str(total)) > len(str(before)):
            self.log.warning("bus.counted", counter=counter, total=total, **facts)

    def record(self, direction: str, peer: str, peer_incarnation: int, envelope: Envelope) -> None:
        """Write one envelope into the ledger."""
        if self.ledger is not None:
            about = {"direction": direction, "peer": peer, "peer_incarnation": peer_incarnation}
            self.ledger.append("message", {**about, "incarnation": self.incarnation, **envelope_fields(envelope)})
