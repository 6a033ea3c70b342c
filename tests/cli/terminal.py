"""A program on a terminal: what is typed reaches it as keys, what it shows is a screen."""

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time

import pyte


class Terminal:
    """``lines``: all that stands on the screen now, and above it what has left it."""

    def __init__(self, command, columns=100, rows=30, **variables):
        self._screen = pyte.HistoryScreen(columns, rows, history=1000)
        self._stream = pyte.ByteStream(self._screen)
        self._master, slave = pty.openpty()
        self._screen.write_process_input = lambda text: os.write(self._master, text.encode())
        self.raw = b""
        self._size(columns, rows)
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=_take_terminal,
            env={**os.environ, "TERM": "xterm-256color", **variables},
        )
        os.close(slave)

    @property
    def text(self):
        past = ["".join(line[x].data for x in range(self._screen.columns)) for line in self._screen.history.top]
        return "\n".join(line.rstrip() for line in [*past, *self._screen.display])

    def type(self, keys):
        os.write(self._master, keys.encode())

    def wait(self, words, seconds=40):
        """Until these words, or something that a function of the screen's text says, stand there."""
        found = words if callable(words) else lambda text: words in text
        end = time.monotonic() + seconds
        while not found(self.text):
            assert time.monotonic() < end, f"{words!r} did not come:\n{self.text}"
            self._read(0.2)
        return self.text

    def resize(self, columns, rows):
        self._screen.resize(rows, columns)
        self._size(columns, rows)
        os.killpg(self.process.pid, signal.SIGWINCH)

    def close(self, seconds=30):
        """Wait for its end; returns the exit code."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            self._read(0.1)
        self.process.kill()
        code = self.process.wait()
        self._read(0.1)
        os.close(self._master)
        return code

    def _read(self, seconds):
        if select.select([self._master], [], [], seconds)[0]:
            try:
                data = os.read(self._master, 65536)
            except OSError:  # nobody is there any more
                time.sleep(seconds)
                return
            self.raw += data
            self._stream.feed(data)

    def _size(self, columns, rows):
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _take_terminal():
    """Ctrl-C comes from the terminal itself, and is heard also where the tests run in the background."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
