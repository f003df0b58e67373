"""Sites of a Ray cluster: an actor on each node, or for each GPU of a node, carries out the orders of a block.

What an actor reserves is the site: all CPUs of a node, or a GPU and its part of the CPUs, so that Ray starts nothing
beside a measurement. It is bound to its node and never restarted elsewhere: another node would be another site. An
actor ends with whoever started it, and what it measures with it.

Messages are fetched, and not returned by a generator, which a client behind ray:// could not iterate over.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lorameter.errors import InvalidRunError, UsageError, said_by
from lorameter.run.sites.messages import read_message
from lorameter.run.sites.remote import RemoteNode
from lorameter.run.sites.remote_worker import ReplicateWorker
from lorameter.studies.placement import say_on, say_sites

CLIENT = "ray://"
START_TIMEOUT_S = 120.0
"""An actor that has its resources starts in seconds; one that waits for them longer than this waits for another job."""
CONNECT_TIMEOUT_S = 30.0
"""A cluster that is there answers in a second or two."""
CLIENT_TIMEOUT_S = 180.0
"""Behind a client port a process is started first for whoever comes, which imports Ray: seconds, and on a node that is
busy a minute. Ray itself gives up after half of one (ConnectionAbortedError), so it is asked again."""
CLOSE_TIMEOUT_S = 20.0
"""A post that is told to end kills its processes and removes its folder."""


class Desk:
    """What an actor is: a post, whose orders are carried out by one thread, and the messages that wait to be fetched.

    The kernel ends a measuring process with the thread that started it, so that thread lives as long as the actor.
    """

    def __init__(self) -> None:
        self._post = ReplicateWorker()
        self._orders: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._messages: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            self._post.carry_out(self._orders.get(), self._messages.put)

    def order(self, text: str) -> None:
        """Take an order; its messages are fetched."""
        self._orders.put(text)

    def fetch(self) -> list[str]:
        """The messages since the last time; waits for the first."""
        found = [self._messages.get()]
        with contextlib.suppress(queue.Empty):
            while True:
                found.append(self._messages.get_nowait())
        return found

    def end(self) -> None:
        """Kill what is under way."""
        self._post.end()

    def close(self) -> None:
        """End everything."""
        self._post.close()


class RayLink:
    """Implements `Link` by an actor."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self._started = False

    def ask(self, order: str) -> Iterator[str]:
        """Raises `InvalidRunError` where the actor does not start, and whatever Ray raises where it is gone."""
        taken = self._actor.order.remote(order)
        if not self._started:
            done, _ = self._ray.wait([taken], timeout=START_TIMEOUT_S)
            if not done:
                raise InvalidRunError(
                    f"its node has not started it within {START_TIMEOUT_S:g} s: something else has its CPUs or its "
                    "GPU. See `ray status`; --sites names the nodes to measure on."
                )
            self._started = True
        self._ray.get(taken)
        while True:
            for line in self._ray.get(self._actor.fetch.remote()):
                yield line
                if read_message(line).is_last:
                    return

    def end(self) -> None:
        """It goes on answering."""
        with contextlib.suppress(Exception):  # it may be gone
            self._actor.end.remote()

    def close(self) -> None:
        """It is asked first, and then killed: a process that is killed leaves its folder."""
        with contextlib.suppress(Exception):
            if self._started:
                self._ray.wait([self._actor.close.remote()], timeout=CLOSE_TIMEOUT_S)
        with contextlib.suppress(Exception):
            self._ray.kill(self._actor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Berth:
    """Where an actor is to be: a node, and what it reserves of it."""

    site: str
    node: str
    """Ray's id of it."""
    cpus: float
    cards: int = 0
    share: int = 0
    shares: int = 1


def berths_of(nodes: Sequence[dict[str, Any]], wanted: Sequence[str] = (), *, ranks: int = 1) -> tuple[Berth, ...]:
    """The sites of a cluster: its GPUs if it has any, else its nodes with CPUs.

    Args:
        nodes: as `ray.nodes()` tells of them.
        wanted: names of nodes; empty for all.
        ranks: of a trial, each of which has a GPU of its own where the cluster has any.

    Raises:
        UsageError: no node of such a name, or none that could measure.
    """
    alive = [node for node in nodes if node.get("Alive")]
    names = _names(alive)
    for name in wanted:
        if name not in names.values():
            known = ", ".join(sorted(names.values()))
            raise UsageError(f"{say_sites(wanted)}: the cluster has no node {name!r}. It has {known}.")
    alive = [node for node in alive if not wanted or names[node["NodeID"]] in wanted]
    resources = {node["NodeID"]: node.get("Resources", {}) for node in alive}
    with_cards = any(one.get("GPU", 0) >= 1 for one in resources.values())
    found: list[Berth] = []
    for node in sorted(alive, key=lambda one: names[one["NodeID"]]):
        key, has = node["NodeID"], resources[node["NodeID"]]
        cpus, cards = float(has.get("CPU", 0)), int(has.get("GPU", 0))
        if with_cards:
            shares = cards // ranks
            for share in range(shares):
                numbers = "-".join(str(card) for card in range(share * ranks, (share + 1) * ranks))
                site, part = f"{names[key]}-card-{numbers}", cpus // shares
                found.append(Berth(site=site, node=key, cpus=part, cards=ranks, share=share, shares=shares))
        elif cpus >= 1:
            found.append(Berth(site=names[key], node=key, cpus=cpus))
    if not found and with_cards and ranks > 1:
        raise UsageError(f"ranks = {ranks}: no node of the Ray cluster has so many GPUs. Use fewer ranks.")
    if not found:
        raise UsageError("the Ray cluster has no node with a CPU or a GPU to measure on. See `ray status`.")
    return tuple(found)


def _names(nodes: Sequence[dict[str, Any]]) -> dict[str, str]:
    """A name for each node, by its id: that which it was started with, else its host's; told apart where they agree."""
    own = {
        node["NodeID"]: name if (name := node.get("NodeName")) and name != node.get("NodeManagerAddress") else host
        for node in nodes
        for host in [node.get("NodeManagerHostname") or node["NodeID"][:8]]
    }
    often = Counter(own.values())
    return {key: name if often[name] == 1 else f"{name}-{key[:6]}" for key, name in own.items()}


@contextlib.contextmanager
def open_stations(address: str, wanted: Sequence[str] = (), *, ranks: int = 1) -> Iterator[tuple[RemoteNode, ...]]:
    """A station for each site of a cluster, started meanwhile; nothing is asked of them yet.

    Args:
        address: "ray" for the cluster that this machine is part of, "ray://HOST:PORT" for the one behind a client port.
        wanted: names of nodes; empty for all.
        ranks: of a trial.

    Raises:
        UsageError: Ray is not installed, the cluster does not answer or has no such nodes.
    """
    try:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    except ImportError as error:
        raise UsageError(
            f"{say_on(address)}: Ray cannot be imported: {error}. Install lorameter[ray], in the cluster's version."
        ) from None
    _connect(ray, address)
    with contextlib.ExitStack() as stack:
        stack.callback(ray.shutdown)
        stations = []
        for berth in berths_of(ray.nodes(), wanted, ranks=ranks):
            there = NodeAffinitySchedulingStrategy(berth.node, soft=False)
            options = {"num_cpus": berth.cpus, "num_gpus": berth.cards, "scheduling_strategy": there}
            actor = ray.remote(Desk).options(max_concurrency=4, max_restarts=0, **options).remote()
            link = RayLink(ray, actor)
            stack.callback(link.close)
            stations.append(RemoteNode(berth.site, link, share=berth.share, shares=berth.shares))
        yield tuple(stations)


def _connect(ray: Any, address: str) -> None:
    """Connect to the cluster. Raises `UsageError` where it does not answer.

    Ray goes on trying to reach a cluster that is gone for many minutes, so a thread of its own does it.
    """
    told: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
    named, timeout_s = (address, CLIENT_TIMEOUT_S) if address.startswith(CLIENT) else ("auto", CONNECT_TIMEOUT_S)

    deadline = time.monotonic() + timeout_s

    def connect() -> None:
        while True:
            try:
                ray.init(address=named, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:  # of a version, a port, a library that is missing: Ray has a class for each
                if isinstance(error, ConnectionAbortedError) and time.monotonic() < deadline:
                    time.sleep(1)
                    continue
                told.put(error)
            else:
                told.put(None)
            return

    threading.Thread(target=connect, daemon=True).start()
    error: Exception | None
    try:
        error = told.get(timeout=timeout_s)
    except queue.Empty:
        error = TimeoutError(f"nothing was heard within {timeout_s:g} s")
    if error is not None:
        raise UsageError(
            f"{say_on(address)}: no Ray cluster answers: {said_by(error).rstrip('.')}. Start it, name it as "
            "ray://HOST:PORT, or set RAY_ADDRESS to the HOST:PORT of its head."
        )
