"""Weights that travel bucket by bucket while both sides stand in the same call: over NCCL or gloo between
devices, or through a buffer that learner and engines share (CUDA IPC) on one device.

The learner's side sends from a thread of its own as soon as it has told the engines, by a manifest, what will
come; engines meet it in a process group that the first sync forms and later ones use again. An engine that
takes another's place can read no version that was sent before: it gets the next one, or, where no engine is
left that has weights, the same once more (`RolloutPool.resend_weights`).
"""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from rlscale.weights.base import account_for
from rlscale.weights.buckets import Packing, Parcel, pack
from rlscale.weights.staging import Staging, StagingHandle

TIMEOUT = timedelta(minutes=5)
"""How long one side waits for the other: a reader that is generating must come to a pause first."""

Carrier = Literal["broadcast", "staging"]


@dataclass(frozen=True, slots=True)
class StreamManifest:
    """What a sync will bring, and where its readers meet the publisher.

    `session` names the group of publisher and readers; `staging` is the shared buffer, if there is one;
    `device` is where buckets arrive; `bytes` is the payload without padding.
    """

    session: str
    host: str
    port: int
    readers: int
    device: str
    staging: StagingHandle | None
    version: int
    bytes: int
    packing: Packing


class StreamPublisher:
    """The learner's side.

    Args:
        carrier: "broadcast" sends buckets over the network or NVLink; "staging" shares one buffer with
            readers on the same device.
        readers: engines that will read every version; a sync ends when all have.
        bucket_bytes: memory that either side needs for weights on their way: one buffer that is shared, or
            two of half that size, of which one is filled or read while the other travels.
        host: address at which engines reach this process.
    """

    def __init__(self, carrier: Carrier, readers: int, bucket_bytes: int, host: str = "127.0.0.1") -> None:
        self._carrier = carrier
        self._readers = readers
        self._bucket_bytes = bucket_bytes
        self._host = host
        self._store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
        self._session = secrets.token_hex(8)
        self._group: Group | None = None
        self._staging: Staging | None = None
        self._sender: threading.Thread | None = None
        self._error: BaseException | None = None

    def publish(
        self,
        named_tensors: Iterable[tuple[str, torch.Tensor]],
        version: int,
        layout: Sequence[tuple[str, torch.Tensor]] | None = None,  # noqa: ARG002 (all are held anyway)
    ) -> StreamManifest:
        """Begins to send every tensor, all on one device; returns what readers must know to receive them.

        The tensors must stay as they are until every reader has loaded them.

        Raises:
            ValueError: a name twice, no tensor at all, or a negative version.
            RuntimeError: readers did not take the last version; says why.
        """
        if version < 0:
            raise ValueError(f"weight versions count up from 0, not {version}")
        self._join()
        if self._store.check([f"{self._session}/late"]):
            self._new_session()
        tensors = [(name, tensor.detach()) for name, tensor in named_tensors]
        account_for(tensors, {name: tensor.shape for name, tensor in tensors})
        packing = pack(tensors, self._bucket_bytes if self._carrier == "staging" else self._bucket_bytes // 2)
        device = tensors[0][1].device
        if self._carrier == "staging" and (
            self._staging is None or self._staging.handle.size < max(packing.sizes)
        ):
            self._staging = Staging(max(packing.sizes), device)
            self._new_session()
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # the sender has a stream of its own
        self._sender = threading.Thread(
            target=self._send, args=(dict(tensors), packing, device), name="weights", daemon=True
        )
        self._sender.start()
        return StreamManifest(
            session=self._session,
            host=self._host,
            port=self._store.port,
            readers=self._readers,
            device=device.type,
            staging=None if self._staging is None else self._staging.handle,
            version=version,
            bytes=sum(tensor.nbytes for _, tensor in tensors),
            packing=packing,
        )

    def close(self) -> None:
        """Lets go of buffers and group; calling it twice is harmless."""
        if self._staging is not None:
            self._staging.close()
        self._staging, self._group = None, None

    def _new_session(self) -> None:
        self._session, self._group = secrets.token_hex(8), None

    def _join(self) -> None:
        """Waits for the last version to be sent."""
        if self._sender is None:
            return
        self._sender.join()
        self._sender = None
        error, self._error = self._error, None
        if error is not None:
            self._new_session()
            raise RuntimeError(f"the last weights did not reach every engine: {error}") from error

    def _send(self, tensors: dict[str, torch.Tensor], packing: Packing, device: torch.device) -> None:
        try:
            if self._group is None:
                self._group = Group(self._store, self._session, 0, self._readers, self._host, device)
            with torch.no_grad():
                if self._staging is None:
                    self._broadcast(self._group, tensors, packing, device)
                else:
                    for index in range(len(packing.sizes)):
                        fill(self._staging.tensor, packing, index, tensors)
                        synchronize(device)
                        self._group.meet()  # the bucket is full
                        self._group.meet()  # and taken
        except BaseException as error:  # told by the next call of this object
            self._error = error

    def _broadcast(
        self, group: Group, tensors: dict[str, torch.Tensor], packing: Packing, device: torch.device
    ) -> None:
        """Fills one buffer while the other is on its way."""
        free = [torch.empty(max(packing.sizes), dtype=torch.uint8, device=device) for _ in range(2)]
        under_way: deque[tuple[torch.Tensor, dist.Work]] = deque()
        for index, size in enumerate(packing.sizes):
            if not free:
                buffer, sent = under_way.popleft()
                sent.wait()
                free.append(buffer)
            buffer = free.pop()
            fill(buffer, packing, index, tensors)
            under_way.append((buffer, group.broadcast(buffer[:size])))
        for _, sent in under_way:
            sent.wait()
        synchronize(device)


class IncomingWeights:
    """Weights on their way, for one pass: tensors that belong to whoever takes them.

    `parcels` says beforehand what will come.
    """

    def __init__(self, manifest: StreamManifest, reader: Reader) -> None:
        self.parcels: tuple[Parcel, ...] = manifest.packing.parcels
        self._buckets = reader.buckets(manifest.packing)

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for parcels, buffer in self._buckets:
            for parcel in parcels:
                yield parcel.name, parcel.view(buffer)

    def drain(self) -> None:
        """Takes what the consumer left, because the others wait for it."""
        for _ in self._buckets:
            pass


class Reader:
    """The engine's side of one session."""

    def __init__(self, manifest: StreamManifest) -> None:
        self.session = manifest.session
        self._device = torch.device(manifest.device)
        store = dist.TCPStore(manifest.host, manifest.port, is_master=False, timeout=TIMEOUT)
        rank = store.add(f"{manifest.session}/readers", 1)
        if rank > manifest.readers:
            store.set(f"{manifest.session}/late", "")  # the next version will be for this reader too
            raise RuntimeError(
                f"weight version {manifest.version} is for the {manifest.readers} engines before"
            )
        self._staged = None if manifest.staging is None else manifest.staging.attach()
        self._group = Group(store, manifest.session, rank, manifest.readers, manifest.host, self._device)

    def buckets(self, packing: Packing) -> Iterator[tuple[list[Parcel], torch.Tensor]]:
        """Parcels of each bucket, in order, and the buffer that they lie in."""
        if self._staged is None:
            yield from self._broadcast(packing)
            return
        for index, size in enumerate(packing.sizes):
            buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
            self._group.meet()
            buffer.copy_(self._staged[:size])
            synchronize(self._device)
            self._group.meet()
            yield list(packing.bucket(index)), buffer

    def _broadcast(self, packing: Packing) -> Iterator[tuple[list[Parcel], torch.Tensor]]:
        """Asks for the next bucket before it hands one on."""
        under_way: deque[tuple[int, torch.Tensor, dist.Work]] = deque()

        def arrived() -> tuple[list[Parcel], torch.Tensor]:
            index, buffer, received = under_way.popleft()
            received.wait()
            return list(packing.bucket(index)), buffer

        for index, size in enumerate(packing.sizes):
            buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
            under_way.append((index, buffer, self._group.broadcast(buffer)))
            if index:
                yield arrived()
        yield arrived()


def fill(buffer: torch.Tensor, packing: Packing, index: int, tensors: dict[str, torch.Tensor]) -> None:
    """Copies what belongs into bucket `index` there."""
    for parcel in packing.bucket(index):
        parcel.view(buffer).copy_(tensors[parcel.name])


class Group:
    """Publisher (rank 0) and readers. Apart from torch's default group, which vLLM has taken in an engine."""

    def __init__(
        self, store: dist.Store, session: str, rank: int, readers: int, host: str, device: torch.device
    ) -> None:
        # Kept: the group holds what it needs of the store by reference.
        self._store = dist.PrefixStore(session, store)
        gloo: Any = dist.ProcessGroupGloo  # its options have no public name
        options = gloo._Options()
        options._timeout = TIMEOUT
        options._devices = [gloo.create_device(hostname=host)]
        self._gloo = gloo(dist.PrefixStore("gloo", self._store), rank, readers + 1, options)
        self._nccl: Any = None
        self._where = (rank, readers + 1, device)

    def meet(self) -> None:
        """Waits until all have come this far."""
        self._gloo.barrier().wait()

    def broadcast(self, buffer: torch.Tensor) -> dist.Work:
        """Begins to send `buffer` from the publisher to all.

        After `wait` of what it returns, what is asked of the device sees the contents and may overwrite them.
        """
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        if not buffer.is_cuda:
            return self._gloo.broadcast([buffer], options)
        if self._nccl is None:
            rank, size, _ = self._where
            self._nccl = dist.ProcessGroupNCCL(
                dist.PrefixStore("nccl", self._store), rank, size, dist.ProcessGroupNCCL.Options()
            )
        return self._nccl.broadcast([buffer], options)


_reader: Reader | None = None


@contextmanager
def receive(manifest: StreamManifest) -> Iterator[IncomingWeights]:
    """The published weights, for one pass inside the `with` block; all readers must read.

    Raises:
        RuntimeError: the publisher counts on other readers than this one, or is gone.
    """
    global _reader
    if _reader is None or _reader.session != manifest.session:
        _reader = None  # lets go of the last session's buffer first
        _reader = Reader(manifest)
    incoming = IncomingWeights(manifest, _reader)
    try:
        yield incoming
    finally:
        incoming.drain()


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
