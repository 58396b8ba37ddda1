# SPDX-License-Identifier: Apache-2.0
"""How a script runs: errors as one paragraph, exit codes, and a train.log that gets everything the terminal shows."""

from __future__ import annotations

import contextlib
import errno
import io
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from distributed.communicator import PeerError
from launch.shortage import GENERAL_WAYS, is_out_of_memory, shortage_text
from scene.errors import InputError

EXIT_INPUT_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_PIPE_CLOSED = 141
EXIT_TERMINATED = 143
PEER_SECONDS = 1.0
"""The rank that failed prints its paragraph; a launcher stops all ranks as soon as the first one ends."""
USER_ERRNOS = frozenset({errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EPERM, errno.EDQUOT, errno.ENAMETOOLONG})


def run_main(main: Callable[[Sequence[str]], int | None], arguments: Sequence[str] | None = None) -> NoReturn:
    """Calls `main` with the command line and exits with its status (None means 0).

    InputError, and errors that the user can mend (full disk, no permission, too little memory), become one paragraph on
    stderr and status 2; a rank whose peer failed ends with that status without a word. Ctrl-C becomes status 130. Any
    other exception is a defect and keeps its traceback.
    """
    try:
        status = main(sys.argv[1:] if arguments is None else arguments)
    except InputError as error:
        exit_with_paragraph(str(error))
    except PeerError:
        time.sleep(PEER_SECONDS)
        sys.exit(EXIT_INPUT_ERROR)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output (`... | head`) has gone; closing stderr keeps the interpreter from complaining.
        sys.stderr.close()
        sys.exit(EXIT_PIPE_CLOSED)
    except OSError as error:
        if error.errno not in USER_ERRNOS:
            raise
        exit_with_paragraph(f"{error.filename or 'a file'} cannot be used: {error.strerror}. Free space or change it.")
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        exit_with_paragraph(f"{shortage_text(error)}. Ways out: {GENERAL_WAYS}.")
    sys.exit(status or 0)


def exit_with_paragraph(message: str) -> NoReturn:
    """Prints "error: MESSAGE", folded at 100 columns, on stderr and exits with status 2."""
    text = " ".join(message.split())
    print(textwrap.fill(f"error: {text}", 100, break_long_words=False, break_on_hyphens=False), file=sys.stderr)
    sys.exit(EXIT_INPUT_ERROR)


@contextlib.contextmanager
def tee_output(
    log_path: Path, *, append: bool = False, quiet: bool = False, has_terminal: bool = True
) -> Iterator[None]:
    """Copies stdout and stderr, line by line with the seconds since the start, into a log file.

    Args:
        log_path: file to write; its folder must exist.
        append: continue an existing log instead of starting a new one.
        quiet: keep stdout off the terminal; stderr still shows, so that errors are seen.
        has_terminal: False keeps both off it (ranks other than 0, which would repeat what rank 0 shows).

    The log ends with how the run ended: after how many seconds, or by which error.
    """
    with log_path.open("a" if append else "w", encoding="utf-8") as file:
        log = _TimedLog(file)
        streams = (
            _Tee(None if quiet or not has_terminal else sys.stdout, log),
            _Tee(sys.stderr if has_terminal else None, log),
        )
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            try:
                yield
            except BaseException as error:
                _end(streams, log, f"ended by {type(error).__name__}: {error}")
                raise
            _end(streams, log, "ended")


def _end(streams: Sequence[_Tee], log: _TimedLog, how: str) -> None:
    for stream in streams:
        stream.finish()
    log.write_line(f"{how} after {log.seconds():.1f} s, {time.strftime('%Y-%m-%d %H:%M:%S')}")


class _TimedLog:
    """Whole lines, each behind the seconds since the log was opened."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._start = file, time.monotonic()
        self.write_line(f"started {time.strftime('%Y-%m-%d %H:%M:%S')}")

    def seconds(self) -> float:
        """Seconds since the log was opened."""
        return time.monotonic() - self._start

    def write_line(self, line: str) -> None:
        """Writes one line and hands it to the operating system at once, so that a crash loses nothing."""
        self._file.write(f"[{self.seconds():9.1f} s] {line}\n")
        self._file.flush()


class _Tee(io.TextIOBase):
    """A text stream that passes everything to a terminal stream and whole lines to the log.

    A carriage return starts the current line anew, so that of a progress bar only its last state reaches the log.
    """

    def __init__(self, terminal: TextIO | None, log: _TimedLog) -> None:
        self._terminal, self._log, self._line = terminal, log, ""

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the terminal; tqdm asks for it to choose its characters."""
        return getattr(self._terminal, "encoding", None) or "utf-8"

    def writable(self) -> bool:
        """Always true."""
        return True

    def isatty(self) -> bool:
        """Whether there is a terminal behind the stream."""
        return self._terminal is not None and self._terminal.isatty()

    def fileno(self) -> int:
        """File descriptor of the terminal; tqdm asks it for the width.

        Raises:
            OSError: the stream is quiet.
        """
        if self._terminal is None:
            raise OSError("a quiet stream has no file descriptor")
        return self._terminal.fileno()

    def write(self, text: str) -> int:
        """Passes the text on; returns its length."""
        if self._terminal is not None:
            self._terminal.write(text)
        *whole, self._line = (self._line + text).split("\n")
        for line in whole:
            self._log.write_line(_last_state(line))
        self._line = _last_state(self._line)
        return len(text)

    def flush(self) -> None:
        """Flushes the terminal."""
        if self._terminal is not None:
            self._terminal.flush()

    def finish(self) -> None:
        """Writes a last line that has no end yet into the log."""
        if self._line.strip():
            self._log.write_line(_last_state(self._line))
        self._line = ""


def _last_state(line: str) -> str:
    """What a terminal shows of a line with carriage returns: the part after the last one that is followed by text."""
    parts = [part for part in line.split("\r") if part.strip()]
    return parts[-1].rstrip() if parts and "\r" in line else line
