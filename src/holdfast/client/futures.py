"""What every operation returns: a future for threads and for asyncio alike."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from typing import Any, Generic, TypeVar

from holdfast.client.runtime import Runtime
from holdfast.protocol.errors import AwaitTimeoutError, ClosedError, OperationCancelledError

T = TypeVar("T")


class Future(Generic[T]):
    """The result of an operation that is under way.

    `result()` waits in a thread, `await` in any asyncio task; both may be done several times and
    by several waiters. Ending a wait, by a time-out or by cancelling the waiting task, leaves the
    operation alone: a later wait gives its result.

    >>> future = training_client.optim_step(AdamParams(learning_rate=1e-4))  # doctest: +SKIP
    >>> future.result(timeout=60).metrics  # doctest: +SKIP
    """

    def __init__(self, work: Coroutine[Any, Any, T], runtime: Runtime) -> None:
        self._work = runtime.start(work)
        self._outcome = self._work.future
        self._runtime = runtime

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result and return it.

        Raises the operation's error, AwaitTimeoutError when `timeout` seconds have passed (the
        operation goes on), OperationCancelledError after `cancel`, and ClosedError when the
        interpreter ends and the operation has been given up.
        """
        self._check_may_wait()
        try:
            return self._outcome.result(timeout)
        except TimeoutError:
            if self._outcome.done():
                # The operation's own error, also if it came in this very moment.
                return self._outcome.result()
            raise _still_going(timeout) from None

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait, and return the operation's error, or None when it succeeded."""
        self._check_may_wait()
        try:
            return self._outcome.exception(timeout)
        except TimeoutError:
            raise _still_going(timeout) from None

    def done(self) -> bool:
        """Whether there is a result or an error."""
        return self._outcome.done()

    def cancel(self) -> bool:
        """Give up waiting. What was submitted stays in its place and may still finish.

        Returns False when it was done already. A client that is being made is cleaned up first.
        """
        if self._outcome.done():
            return False
        self._work.cancel()
        return True

    def cancelled(self) -> bool:
        """Whether it ended by `cancel`."""
        return self.done() and isinstance(self._outcome.exception(), OperationCancelledError)

    def add_done_callback(self, call: Callable[[Future[T]], object]) -> None:
        """Call with this future when it is done, on the client's own thread: do not wait there."""
        self._outcome.add_done_callback(lambda _: call(self))

    def __await__(self) -> Generator[Any, None, T]:
        return self._wait().__await__()

    async def result_async(self, timeout: float | None = None) -> T:
        """As `result`, for asyncio."""
        waiter = asyncio.ensure_future(self._wait())
        done, _ = await asyncio.wait({waiter}, timeout=timeout)
        if not done:
            waiter.cancel()
            raise _still_going(timeout)
        return waiter.result()

    async def _wait(self) -> T:
        self._check_not_dropped()
        if not self._outcome.done():
            loop = asyncio.get_running_loop()
            done = asyncio.Event()

            def wake(_: object) -> None:
                # Whoever waited may be gone, and their loop with them.
                with suppress(RuntimeError):
                    loop.call_soon_threadsafe(done.set)

            self._outcome.add_done_callback(wake)
            await done.wait()
        return self._outcome.result()

    def _check_may_wait(self) -> None:
        self._check_not_dropped()
        if self._runtime.here and not self._outcome.done():
            raise RuntimeError(
                "waiting for a result on the client's own thread would wait for ever: do it in"
                " another thread, not in a done callback"
            )

    def _check_not_dropped(self) -> None:
        if self._runtime.dropping and not self._outcome.done():
            raise ClosedError("the interpreter ends, and what was under way has been given up")


class ClientFuture(Future[T]):
    """A client that is being made.

    Call `result()` or await it; or use it as if it were the client: the first use then waits.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.result(), name)

    def __enter__(self) -> T:
        client: Any = self.result()
        entered: T = client.__enter__()
        return entered

    def __exit__(self, *args: object) -> None:
        client: Any = self.result()
        client.__exit__(*args)


def _still_going(timeout: float | None) -> AwaitTimeoutError:
    return AwaitTimeoutError(
        f"no result after {timeout} s: the operation goes on and may still finish; wait again for"
        " its result"
    )
