"""Replicas that are to end once their requests have: no new ones go there, those it has may finish, then it is started
afresh or stays down. What has not finished in time goes on at another replica, or at its next life.

Owns: which replicas are being drained. Thread: the supervisor's bus loop.
"""

from __future__ import annotations

from collections.abc import Callable

from ..bus import Call, Context
from ..errors import ChipbusError, ConfigError
from .boot import ROUTER
from .lifecycle import Child, Event, GroupDrained, Status, Tree
from .messages.routing import Withhold
from .messages.tree import Drain, Drained

__all__ = ["Draining"]


class Draining:
    """The supervisor's part in it: the router is asked to withhold the replica, then the tree ends its group."""

    def __init__(self, feed: Callable[[Event], None]) -> None:
        self.names: set[str] = set()
        self._feed = feed

    def begin(self, ctx: Context, tree: Tree, message: Drain, call: Call) -> None:
        """Answer ``call`` when the replica has nothing left to do, or its time is over, and it is being ended."""
        refusal = self._refusal(tree, message)
        if refusal:
            call.fail(ConfigError(refusal))
            return
        name, incarnation = message.replica, tree.children[message.replica].incarnation
        self.names.add(name)

        def end(*, is_empty: bool) -> None:
            self.names.discard(name)
            self._feed(GroupDrained(name, incarnation, message.stays_down))
            if call.is_open:
                call.reply(Drained(is_empty=is_empty))

        def failed(error: ChipbusError) -> None:
            ctx.log.warning("replica.not_empty", replica=name, reason=str(error))
            end(is_empty=False)

        ctx.log.info("replica.draining", replica=name, life=incarnation, timeout_s=message.timeout_s)
        ctx.ask(
            ROUTER,
            Withhold(replica=name, incarnation=incarnation),
            timeout_s=message.timeout_s,
            on_reply=lambda _: end(is_empty=True),
            on_error=failed,
        )

    def _refusal(self, tree: Tree, message: Drain) -> str:
        replicas = {name: child for name, child in tree.children.items() if child.spec.kind == "replica"}
        child = replicas.get(message.replica)
        if child is None:
            return f"{message.replica!r} is no replica of this engine; its replicas are {', '.join(replicas)}"
        if message.replica in self.names:
            return f"{message.replica} is being drained already"
        if child.status is not Status.READY:
            return f"{message.replica} is {child.status.name.lower()}; only a replica that is ready can be drained"
        others = [other for name, other in replicas.items() if name != message.replica and _has_future(other)]
        if message.stays_down and not others:
            return f"{message.replica} is the last replica that serves, so it cannot stay down; drain it without that"
        return ""


def _has_future(child: Child) -> bool:
    """It serves, or will again."""
    return child.status is not Status.GONE and (child.status is not Status.STOPPING or child.is_to_restart)
