"""Forward passes that stop at chosen tensors and go on later, for models of any code."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ccp_ext.activations import read_at
from ccp_ext.graph import Tap

Receive = Callable[[Any, Tensor], None]
Keep = Callable[[Any, Tensor], Any]
Context = Callable[[], contextlib.AbstractContextManager[Any]]


class Halting:
    """A function that stops where it calls :meth:`halt`, until it is resumed.

    It has a thread of its own, which never runs at the same time as the one that resumes it. It
    computes without gradients, and outside of an autocast of the caller's thread.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self._function = function
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._closing = self._done = False
        self._error: BaseException | None = None
        # A daemon, so that a pass that nobody resumes does not keep the interpreter alive.
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def resume(self) -> bool:
        """Let it run up to the next halt; False if it has returned. Raises what it raises."""
        if not self._done:
            self._go.release()
            self._stopped.acquire()
        if self._error is not None:
            raise self._error
        return not self._done

    def halt(self) -> None:
        """Called by the function: hand over to whoever resumed it."""
        self._stopped.release()
        self._wait()

    def close(self) -> None:
        """End the function where it stands."""
        self._closing = True
        self._go.release()
        self._thread.join()

    def _wait(self) -> None:
        self._go.acquire()
        if self._closing:
            raise _Closed

    def _work(self) -> None:
        try:
            self._wait()
            with torch.no_grad():
                self._function()
        except _Closed:
            pass
        except BaseException as error:  # for resume to raise
            self._error = error
        self._done = True
        self._stopped.release()


class _Closed(BaseException):
    """Ends the function of a closed pass; no model's code catches it by mistake."""


class Tapped:
    """A model that hands the tensors at its taps, with their keys, to ``receive``."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.receive: Receive | None = None

    def _read(self, key: Any, tensor: Tensor) -> None:
        if self.receive is not None:
            self.receive(key, tensor)


@contextlib.contextmanager
def tapped(model: nn.Module, taps: Mapping[Any, Tap]) -> Iterator[Tapped]:
    """Hooks at the taps, by key, while the block runs.

    Raises:
        InputError: the model lacks a module.
    """
    reader = Tapped(model)
    with contextlib.ExitStack() as stack:
        for key, tap in taps.items():
            stack.callback(read_at(model, tap, partial(reader._read, key)).remove)
        yield reader


class Walk:
    """One forward pass, which halts where what is asked for was seen.

    Several walks may go through one model in turns, so its modules must not keep values of a
    forward pass in attributes.

    Args:
        model: with its taps.
        x: the input.
        keep: of a key and the tensor there, what to keep; None to go on.
        module: the part of the model to run on x; all of it by default.
        within: context of the pass, in its own thread.

    Attributes:
        seen: what was kept, by key, in order. The owner may remove entries.
    """

    def __init__(
        self,
        model: Tapped,
        x: Tensor,
        keep: Keep,
        module: nn.Module | None = None,
        within: Context = contextlib.nullcontext,
    ) -> None:
        self.seen: dict[Any, list[Any]] = {}
        self._model, self._keep = model, keep
        self._awaited: tuple[Any, int] | None = None
        run = model.model if module is None else module

        def work() -> None:
            with within():
                run(x)

        self._pass = Halting(work)

    def until(self, key: Any, count: int = 1) -> None:
        """Go on until so many tensors of the key were seen.

        Raises:
            RuntimeError: the pass ends before.
        """
        if len(self.seen.get(key, ())) >= count:
            return
        self._awaited = key, count
        self._model.receive = self._receive
        running = self._pass.resume()
        self._model.receive = None
        if not running:
            raise RuntimeError(f"a forward pass ended without reaching {key} {count} times")

    def close(self) -> None:
        """End the pass where it stands."""
        self._pass.close()

    def _receive(self, key: Any, tensor: Tensor) -> None:
        kept = self._keep(key, tensor)
        if kept is not None:
            self.seen.setdefault(key, []).append(kept)
            if (key, len(self.seen[key])) == self._awaited:
                self._pass.halt()
