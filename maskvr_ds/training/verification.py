"""`data.verify: background`: shards compared with their SHA-256 while training runs.

Every rank has a thread that reads its share of the shards, as `full` divides them at startup. How many ranks are still
comparing, and how many have found damage, is part of the all-reduce of every step (training/step.py) and read one step
later, so that nothing waits for the device and all ranks decide the same: damage ends the run at the second step
boundary after it was found, at the latest. No checkpoint is written before all ranks have compared all shards: one that
is due earlier waits for the rest of them, which takes no longer than the check at startup would have taken.

Collectives: `distributed.run_collectively` and `gather_objects`, only while a checkpoint waits and if damage is found.
"""

import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress

import torch

from data_pipeline.shards import Corpus, CorpusError
from maskvr_ds.runtime import distributed
from maskvr_ds.runtime.deferred import DeferredTensor

logger = logging.getLogger(__name__)

# Seconds between the agreements of ranks that wait for the rest of a comparison.
_POLL = 2.0
# Of the thread: the interpreter, the loader and the kernels of a CPU come first.
_NICENESS = 10


class _Cancelled(Exception):  # noqa: N818
    pass


class BackgroundVerification:
    """This rank's share of the comparison, started at once. Every rank has one; all ranks make the same calls.

    corpora: opened; None: absent. Without any, nothing is to be compared and all methods do nothing.
    """

    def __init__(self, corpora: Sequence[Corpus | None]) -> None:
        rank, ranks = distributed.rank(), distributed.world_size()
        present = [corpus for corpus in corpora if corpus is not None]
        # Whether all ranks have compared all shards and agree on it: identical on all ranks.
        self._finished = not present
        self._work = [(c, shard) for c in present for shard in range(rank, len(c.manifest.shards), ranks)]
        self._shards = [shard for corpus in present for shard in corpus.manifest.shards]
        self._fault: CorpusError | None = None
        self._flags: DeferredTensor | None = None
        self._cancelled = threading.Event()
        self._started = time.monotonic()
        # A daemon: a process that ends with an error must not wait for it.
        self._thread = threading.Thread(target=self._compare, name="verification", daemon=True)
        if self._finished:
            return
        logger.info(
            "comparing %s shards (%.2f GB) with their SHA-256 in the background (data.verify: background); the first "
            "checkpoint waits until that is done",
            f"{len(self._shards):,}",
            self._bytes / 1e9,
        )
        self._thread.start()

    @property
    def flags(self) -> tuple[bool, bool] | None:
        """Whether this rank is still comparing, and whether it has found damage: for the step's all-reduce. None, on
        all ranks, once all shards are compared."""
        if self._finished:
            return None
        comparing = self._thread.is_alive()  # read first: once it is not, the fault is there
        return comparing, self._fault is not None

    def after_step(self, step: int, flags: torch.Tensor | None) -> None:
        """Call once per step. Collective: call on all ranks. Raises CorpusError if a rank has found damage as of the
        previous step, RemoteError on the others.

        flags: int64 [2], all-reduced in this step: the numbers of ranks whose `flags` are set; None if they are None.
        """
        before, self._flags = self._flags, None if flags is None else DeferredTensor(flags)
        if before is None:
            return
        comparing, damaged = before.values()
        if damaged:
            distributed.run_collectively(lambda: self._check(step))
        elif not comparing:
            self._finish(step)

    def wait(self, step: int) -> None:
        """Wait until all ranks have compared all shards. Collective: call on all ranks. Raises as `after_step`."""
        reported = False
        while not self._finished:
            comparing = self._thread.is_alive()
            distributed.run_collectively(lambda: self._check(step))
            if not any(distributed.gather_objects(comparing)):
                self._finish(step)
                return
            if not reported:
                logger.info("step %d: the checkpoint waits until all shards are compared with their SHA-256", step)
                reported = True
            self._thread.join(_POLL)

    def cancel(self) -> None:
        """End this rank's comparison if it is not done. No collective."""
        self._cancelled.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def _bytes(self) -> int:
        return sum(shard.bytes for shard in self._shards)

    def _compare(self) -> None:
        with suppress(OSError):  # Linux has priorities per thread
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        try:
            for corpus, shard in self._work:
                corpus.verify([shard], self._check_cancelled)
        except _Cancelled:
            pass
        except CorpusError as error:
            self._fault = error
        except Exception as error:  # a thread that fails in another way must not count as one that found no damage
            self._fault = CorpusError(f"{type(error).__name__}: {error}")

    def _check_cancelled(self, _: int) -> None:
        if self._cancelled.is_set():
            raise _Cancelled

    def _check(self, step: int) -> None:
        if self._fault is not None:
            raise CorpusError(
                f"{self._fault}. Found at step {step}, in the background (data.verify: background): no checkpoint was "
                "saved since this job started. `python -m data_pipeline verify` names all damaged shards; once they "
                "are restored, --resume auto continues"
            )

    def _finish(self, step: int) -> None:
        self._finished, self._flags = True, None
        logger.info(
            "step %d: all %s shards (%.2f GB) match their SHA-256, compared in %.0f s in the background",
            step,
            f"{len(self._shards):,}",
            self._bytes / 1e9,
            time.monotonic() - self._started,
        )
