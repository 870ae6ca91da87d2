"""Which signals has this process received? Real signals, here and in processes that die of them."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

from ckptmgr.signals import SignalWatch

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2")


@pytest.fixture(autouse=True)
def _handlers_are_put_back() -> Iterator[None]:
    before = {name: signal.getsignal(signal.Signals[name]) for name in NAMES}
    for name in NAMES:  # tests before this one may have dropped managers unclosed
        if name != "SIGINT":
            signal.signal(signal.Signals[name], signal.SIG_DFL)
    yield
    for name, handler in before.items():
        signal.signal(signal.Signals[name], handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def run(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own, with a watch `w` on SIGTERM, SIGINT and SIGUSR1 installed."""
    start = """
        import os, signal, sys
        from ckptmgr.signals import SignalWatch
        def send(number): os.kill(os.getpid(), number)
        w = SignalWatch(["SIGTERM", "SIGINT", "SIGUSR1"])
        w.install()
    """
    return subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(start) + textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_signals_are_noted_by_name_once_each_in_order_until_taken() -> None:
    watch = SignalWatch(["SIGUSR1", "SIGUSR2"])
    watch.install()
    assert watch.pending == ()
    for number in (signal.SIGUSR2, signal.SIGUSR1, signal.SIGUSR2):
        send(number)
    assert watch.pending == ("SIGUSR2", "SIGUSR1")
    assert watch.take() == ("SIGUSR2", "SIGUSR1")
    assert (watch.pending, watch.take()) == ((), ())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_terminating_signal_asks_to_stop_and_lets_the_step_end(name: str) -> None:
    watch = SignalWatch([name])
    watch.install()
    send(signal.Signals[name])
    assert (watch.stop, watch.take()) == (True, (name,))
    assert watch.stop is True


def test_a_user_signal_does_not_ask_to_stop() -> None:
    watch = SignalWatch(["SIGUSR1", "SIGUSR2"])
    watch.install()
    send(signal.SIGUSR1)
    send(signal.SIGUSR2)
    assert watch.stop is False


def test_the_hook_is_called_at_each_signal_after_it_was_noted() -> None:
    seen: list[tuple[str, ...]] = []
    watch = SignalWatch(["SIGUSR1"], on_signal=lambda: seen.append(watch.pending))
    watch.install()
    send(signal.SIGUSR1)
    assert seen == [("SIGUSR1",)]


def test_a_handler_that_was_there_before_still_gets_its_signals() -> None:
    seen = []
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    watch = SignalWatch(["SIGUSR1"])
    watch.install()
    send(signal.SIGUSR1)
    assert (seen, watch.pending) == ([signal.SIGUSR1], ("SIGUSR1",))


@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN, lambda number, frame: None])
def test_uninstall_puts_back_exactly_what_was_there(before: Any) -> None:
    signal.signal(signal.SIGUSR1, before)
    watch = SignalWatch(["SIGUSR1"])
    watch.install()
    watch.install()
    watch.uninstall()
    assert signal.getsignal(signal.SIGUSR1) == before
    watch.uninstall()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_uninstall_leaves_a_later_handler_in_place_and_ours_passes_signals_on_unseen() -> None:
    seen: list[str] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append("first"))
    lower, upper = SignalWatch(["SIGUSR1"]), SignalWatch(["SIGUSR1"])
    lower.install()
    upper.install()
    lower.uninstall()
    send(signal.SIGUSR1)
    assert (seen, upper.take(), lower.take()) == (["first"], ("SIGUSR1",), ())
    lower.install()
    send(signal.SIGUSR1)
    assert (seen, upper.take(), lower.take()) == (["first", "first"], ("SIGUSR1",), ("SIGUSR1",))


def test_outside_the_main_thread_nothing_is_watched_and_a_warning_says_so(caplog: pytest.LogCaptureFixture) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    watch, installed = SignalWatch(["SIGUSR1"]), SignalWatch(["SIGUSR2"])
    installed.install()
    with caplog.at_level(logging.WARNING, "ckptmgr.signals"):
        for change in (watch.install, installed.uninstall):
            thread = threading.Thread(target=change)
            thread.start()
            thread.join()
    assert signal.getsignal(signal.SIGUSR1) == before
    reason = "skipped reason=only the main thread may change signal handlers"
    assert caplog.messages == [f"signals.install.{reason}", f"signals.uninstall.{reason}"]
    send(signal.SIGUSR2)
    assert installed.pending == ("SIGUSR2",)


def test_a_watch_on_nothing_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    watch = SignalWatch([])
    watch.install()
    watch.uninstall()
    assert (watch.pending, watch.stop, caplog.messages) == ((), False, [])


def test_a_second_terminating_signal_ends_the_process_at_once() -> None:
    done = run("send(signal.SIGTERM); print(w.take(), flush=True); send(signal.SIGTERM); print('alive')")
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "('SIGTERM',)\n")


def test_an_interrupt_after_another_terminating_signal_raises_keyboard_interrupt() -> None:
    done = run("""
        send(signal.SIGTERM)
        try:
            send(signal.SIGINT)
            signal.sigtimedwait([], 1)
        except KeyboardInterrupt:
            print("interrupted")
    """)
    assert (done.returncode, done.stdout) == (0, "interrupted\n")


def test_a_second_terminating_signal_goes_to_the_handler_that_was_there_before() -> None:
    done = run("""
        w.uninstall()
        signal.signal(signal.SIGTERM, lambda *_: print("theirs"))
        w.install()
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        print("alive", w.take(), signal.getsignal(signal.SIGTERM).__name__)
    """)
    assert (done.returncode, done.stdout) == (0, "theirs\ntheirs\nalive ('SIGTERM',) <lambda>\n")


def test_where_a_later_handler_is_over_ours_a_second_signal_is_its_business() -> None:
    done = run("""
        ours = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, lambda *arguments: (print("theirs"), ours(*arguments)))
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        print("alive", w.take())
    """)
    assert (done.returncode, done.stdout) == (0, "theirs\ntheirs\nalive ('SIGTERM',)\n")


def test_two_user_signals_after_a_terminating_one_do_not_end_the_process() -> None:
    done = run("send(signal.SIGTERM); send(signal.SIGUSR1); send(signal.SIGUSR1); print(w.take())")
    assert (done.returncode, done.stdout) == (0, "('SIGTERM', 'SIGUSR1')\n")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_forked_child_dies_of_its_signals_as_without_us(name: str) -> None:
    done = run(f"""
        child = os.fork()
        if child == 0:
            send(signal.{name})
            os._exit(3)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), w.pending, w.stop)
    """)
    assert (done.returncode, done.stdout) == (0, f"{-signal.Signals[name]} () False\n")


def test_a_handler_that_python_cannot_put_back_becomes_the_default() -> None:
    code = """
        theirs = signal.getsignal(signal.SIGABRT)
        w = SignalWatch(["SIGABRT"])
        w.install()
        w.uninstall()
        print(theirs, signal.getsignal(signal.SIGABRT) is signal.SIG_DFL)
    """
    assert run(code, "-X", "faulthandler").stdout == "None True\n"


ORDERS = [("a", "b", "c"), ("c", "b", "a"), ("b", "a", "c"), ("b", "c", "a"), ("a", "c", "b"), ("c", "a", "b")]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("before", [signal.SIG_DFL, signal.SIG_IGN, lambda number, frame: None])
def test_watches_uninstalled_in_any_order_leave_what_was_there(before: Any, order: tuple[str, ...]) -> None:
    signal.signal(signal.SIGUSR1, before)
    watches = {name: SignalWatch(["SIGUSR1"]) for name in "abc"}
    for watch in watches.values():
        watch.install()
    for name in order:
        watches[name].uninstall()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_process_dies_of_sigterm_when_its_watches_were_uninstalled_in_the_order_of_their_installation() -> None:
    done = run("""
        upper = SignalWatch(["SIGTERM"])
        upper.install()
        w.uninstall()
        upper.uninstall()
        send(signal.SIGTERM)
        print("alive")
    """)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")


def test_a_handler_put_back_after_its_watch_ended_lets_signals_have_their_effect() -> None:
    """As another library does that saves the handler it finds, and puts it back when it ends."""
    code = """
        ours = signal.getsignal(signal.{0})
        w.uninstall()
        signal.signal(signal.{0}, ours)
        try:
            send(signal.{0})
        except KeyboardInterrupt:
            print("interrupted", signal.getsignal(signal.SIGINT) is signal.default_int_handler)
    """
    assert run(code.format("SIGTERM")).returncode == -signal.SIGTERM
    done = run(code.format("SIGINT"))
    assert (done.returncode, done.stdout) == (0, "interrupted True\n")


def test_a_later_handler_that_passes_an_interrupt_on_to_an_ended_watch_gets_keyboard_interrupt() -> None:
    done = run("""
        ours = signal.getsignal(signal.SIGINT)
        signal.signal(signal.SIGINT, lambda *arguments: ours(*arguments))
        send(signal.SIGINT)
        print(w.pending)
        w.uninstall()
        try:
            send(signal.SIGINT)
        except KeyboardInterrupt:
            print("interrupted")
    """)
    assert (done.returncode, done.stdout) == (0, "('SIGINT',)\ninterrupted\n")


def test_a_watch_that_is_installed_again_below_another_notes_each_signal_once() -> None:
    lower, upper = SignalWatch(["SIGTERM"]), SignalWatch(["SIGTERM"])
    before = signal.getsignal(signal.SIGTERM)
    for watch in (lower, upper):
        watch.install()
    lower.uninstall()
    lower.install()
    send(signal.SIGTERM)
    assert (lower.take(), upper.take()) == (("SIGTERM",), ("SIGTERM",))
    upper.uninstall()
    lower.uninstall()
    assert signal.getsignal(signal.SIGTERM) == before


class Owner:
    """Refers to its watch and is called by it, as a schedule."""

    def __init__(self, *names: str) -> None:
        self.watch = SignalWatch(names, self.alert)
        self.watch.install()
        self.alerts = 0

    def alert(self) -> None:
        self.alerts += 1


def test_a_watch_that_was_dropped_is_collected_with_its_owner_and_signals_go_where_they_went_before() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    before = signal.getsignal(signal.SIGUSR1)
    dropped = weakref.ref(Owner("SIGUSR1"))
    kept = Owner("SIGUSR1")
    gc.collect()
    assert dropped() is None
    send(signal.SIGUSR1)
    assert (seen, kept.alerts, kept.watch.take()) == ([signal.SIGUSR1], 1, ("SIGUSR1",))
    kept.watch.uninstall()
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_process_dies_of_sigterm_after_its_watch_was_dropped() -> None:
    done = run("""
        del w
        send(signal.SIGTERM)
        print("alive")
    """)
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, "")


def test_a_dropped_watch_s_signal_goes_to_the_python_handler_below_it_which_is_then_in_place() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(number))
    before = signal.getsignal(signal.SIGUSR1)
    SignalWatch(["SIGUSR1"]).install()
    send(signal.SIGUSR1)
    assert (seen, signal.getsignal(signal.SIGUSR1)) == ([signal.SIGUSR1], before)
