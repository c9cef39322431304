"""
Fetching files: whatever happens to the network, a file under its final name is complete.
"""

import errno
import os
import re
import shutil
import socket
import sys
import time
from email.utils import parsedate_to_datetime
from pathlib import Path

import requests

from dev.data.command_line import Progress, say, show
from dev.run.console import shown
from dev.run.files import NewFile, destination, file_sha256

HF = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
LARGEST = 1 << 40  # bytes of a file
UNKNOWN = 1 << 32  # bytes of a file whose length the server does not say
BACKOFF = 1.0  # seconds before the first retry, doubled for each one after it
LONGEST_WAIT = 120  # a server that asks for more patience than this (Retry-After) is given up
BROKEN = requests.packages.urllib3.exceptions.HTTPError  # what requests lets through where a redirect's text is cut


class Retry(Exception):
    """A download failed in a way that may pass. wait: seconds the server asked us to wait."""

    def __init__(self, message, wait=0.0):
        super().__init__(message)
        self.wait = wait


def download(url, path, size=None, sha256=None, timeout=30.0, retries=5, anew=False, most=LARGEST):
    """
    Fetch url into path; nothing happens when it is already there, unless `anew`. Returns path.

    size and sha256, where known, are checked; the size is also checked against what the server says, and against the
    room on the disk. A file whose length nobody knows may have UNKNOWN bytes, and no file more than `most`. They go to
    path.part, which an interrupted download leaves behind and the next one goes on from. Stalls (timeout, in seconds),
    lost connections and busy servers are retried with growing pauses, `retries` times in a row without any progress;
    a host that cannot be reached to begin with is an error at once. Proxies are taken from the environment, as ever
    with requests, and HF_TOKEN is sent to Hugging Face.

    Raises OSError (network, disk) or ValueError (not the file that was expected).
    """
    path = Path(path)
    if path.exists() and not anew:
        if size is not None and path.stat().st_size != size:
            say(f"{show(path)} has {path.stat().st_size:,} bytes instead of {size:,}; fetching it anew")
        elif sha256 is not None and file_sha256(path) != sha256:
            say(f"{show(path)} is not the file it should be; fetching it anew")
        else:
            return path
    path.parent.mkdir(parents=True, exist_ok=True)
    path = Path(destination(path))  # the part lies beside it, and becomes it
    part = path.with_name(path.name + ".part")
    say(f"downloading {url} to {show(path)}")
    progress = Progress(path.name)
    failures, reached = 0, False
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _fetch(url, part, size, timeout, progress, most)
            break
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError, BROKEN) as e:
            # no answer to the first call: no network, no such host, a firewall; waiting will not help
            if not reached and not part.exists() and _unreachable(e):
                hint = "is there a network, or a proxy to set?"
                raise OSError(f"cannot reach {url}: {_reason(e)}\n---> HINT: {hint}") from e
            problem, wait = _reason(e), 0.0
        except Retry as e:
            problem, wait, reached = str(e), e.wait, True
        except requests.RequestException as e:
            raise OSError(f"cannot download {url}: {_reason(e)}\n---> HINT: is this the right address?") from e
        except OSError as e:
            if e.errno is None:
                raise
            raise OSError(f"cannot write {show(part)}: {e.strerror}\n---> HINT: free some space, then run again: what "
                          "is there will be kept") from e
        finally:
            progress.clear()
        failures = 1 if part.exists() and part.stat().st_size > before else failures + 1
        if failures > retries or wait > LONGEST_WAIT:
            raise OSError(f"cannot download {url}: {problem}\n---> HINT: run again later; what is there will be kept")
        wait = max(wait, BACKOFF * 2 ** (failures - 1))
        print(f"{path.name}: {problem}; trying again in {wait:.0f} s", file=sys.stderr)
        time.sleep(wait)
    if sha256 is not None and (found := file_sha256(part)) != sha256:
        part.unlink(missing_ok=True)
        raise ValueError(f"{url} has sha256 {found}, expected {sha256}\n---> HINT: run again to fetch it anew")
    os.replace(part, path)
    _identity_file(part).unlink(missing_ok=True)
    return path


def open_no_link(path, flags):
    """An opener for open(): a name that others can foresee must not be a link to somewhere else."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)


def require_room(folder, needed):
    """OSError where the disk of a folder has not so many bytes left"""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(f"{show(folder)} has {free:,} bytes left on its disk, {needed:,} are needed\n"
                      "---> HINT: free some space, or name another folder")


def _number(text):
    """A header's number of bytes, None where it is none"""
    return int(text) if text and re.fullmatch("[0-9]{1,18}", text) else None


def _fetch(url, part, size, timeout, progress, most):
    """One attempt: ask for what `part` lacks and append it. Returns when `part` is complete."""
    known = _identity_file(part)  # which file `part` is the beginning of: "ETag length"; without it, start over
    have = part.stat().st_size if part.exists() and known.exists() else 0
    identity = known.read_text(errors="replace")[:1000] if have else ""
    if have and identity.endswith(f" {have}"):
        return  # stopped just before it was renamed
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    if url.startswith(HF + "/") and os.environ.get("HF_TOKEN"):
        headers["Authorization"] = f"Bearer {os.environ['HF_TOKEN']}"  # requests drops it where a redirect leads away
    with requests.get(url, headers=headers, stream=True, timeout=(min(timeout, 10), timeout)) as response:
        status = response.status_code
        if status == 416:  # `part` is longer than the file
            part.unlink(missing_ok=True)
            raise Retry("the partial file does not fit; starting over")
        if status in (408, 425, 429, 500, 502, 503, 504):
            raise Retry(f"HTTP status {status} ({shown(response.reason)})", _retry_after(response))
        if status not in (200, 206):
            hint = "set HF_TOKEN, if this needs a login" if status in (401, 403) else "has it moved? Try a browser"
            raise ValueError(f"{url} answers with HTTP status {status} ({shown(response.reason)})\n---> HINT: {hint}")

        if response.headers.get("Content-Type", "").startswith("text/html"):
            raise ValueError(f"{url} answers with a web page\n---> HINT: does this network want you to log in first?")

        # how long is the whole file, and is it still the one that the part was taken from?
        encoded = response.headers.get("Content-Encoding", "identity") != "identity"
        length = response.headers.get("Content-Length")
        if status == 206:
            unit, _, total = response.headers.get("Content-Range", "").partition("/")
            total = _number(total)
            if not unit.startswith(f"bytes {have}-"):
                part.unlink(missing_ok=True)
                raise Retry("the server sent another range than it was asked for; starting over")
        else:
            total = None if encoded else _number(length)
        if size is not None and total is not None and total != size:
            raise ValueError(f"{url} has {total:,} bytes, expected {size:,}\n---> HINT: is this the right address?")
        total = size if total is None else total
        chunked = response.headers.get("Transfer-Encoding") == "chunked"
        if total is None and not chunked and not encoded:
            raise ValueError(f"{url}: the server does not say how long the file is, so it cannot be checked")
        bound = min(most, UNKNOWN if total is None else total)
        if total is not None and total > most:
            raise ValueError(f"{url} has {total:,} bytes, expected at most {most:,}")
        require_room(part.parent, 0 if total is None else total - (have if status == 206 else 0))
        before, identity = identity, f"{response.headers.get('ETag') or response.headers.get('Last-Modified')} {total}"
        if status == 206 and before != identity:
            part.unlink(missing_ok=True)
            raise Retry("the file has changed since the download began; starting over")
        known.unlink(missing_ok=True)
        if not encoded:  # a position in an unpacked stream is none in the file
            with NewFile(known) as f:
                f.write(identity.encode(errors="replace"))

        with open(part, "ab" if status == 206 else "wb", opener=open_no_link) as f:
            for block in response.iter_content(1 << 14):  # a lost connection loses no more than this
                f.write(block)
                if f.tell() > bound and total is None:
                    raise ValueError(f"{url}: the server does not say how long the file is, and sends more than "
                                     f"{bound:,} bytes\n---> HINT: fetch it by other means into {show(part.parent)}")
                if f.tell() > bound:
                    break  # which is too many: see below
                progress.update(f.tell() / 1e6, "MB", f.tell() / total if total else None)
            f.flush()
            os.fsync(f.fileno())
    if total is not None and part.stat().st_size < total:
        raise Retry(f"the connection ended after {part.stat().st_size:,} of {total:,} bytes")
    if total is not None and part.stat().st_size > total:
        part.unlink(missing_ok=True)
        raise Retry("more bytes than the file has; starting over")


def remote_identity(url):
    """What changes when the file at an address does ("ETag length"); "" where there is none, None without an answer."""
    headers = {"Accept-Encoding": "identity"}
    if url.startswith(HF + "/") and os.environ.get("HF_TOKEN"):
        headers["Authorization"] = f"Bearer {os.environ['HF_TOKEN']}"
    try:
        response = requests.head(url, headers=headers, allow_redirects=True, timeout=10)
    except requests.RequestException:
        return None
    if response.status_code == 404:
        return ""
    version = response.headers.get("ETag") or response.headers.get("Last-Modified")
    return f"{version} {response.headers.get('Content-Length')}" if response.ok and version else None


def remote_size(url):
    """How many bytes the server says a file has, or None."""
    try:
        response = requests.head(url, headers={"Accept-Encoding": "identity"}, allow_redirects=True, timeout=10)
        return _number(response.headers.get("Content-Length")) if response.ok else None
    except (requests.RequestException, ValueError):
        return None


def _identity_file(part):
    return part.with_name(part.name + ".id")


def _retry_after(response):
    """Seconds that a Retry-After header asks for, given as a number or as a date; 0 without one."""
    value = response.headers.get("Retry-After", "0")
    try:
        if value.isdecimal():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return 0.0


def _causes(error):
    while isinstance(error, BaseException):
        yield error
        error = getattr(error, "reason", None) or error.__cause__ or error.__context__


def _unreachable(error):
    """Whether no connection could be made at all."""
    kinds = (socket.gaierror, requests.ConnectTimeout, requests.exceptions.SSLError, requests.exceptions.ProxyError)
    numbers = (errno.ECONNREFUSED, errno.ENETUNREACH, errno.EHOSTUNREACH)
    return any(isinstance(e, kinds) or getattr(e, "errno", None) in numbers for e in _causes(error))


def _reason(error):
    """A short reason out of the long chains of requests and urllib3."""
    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return "no answer in time"
    last = list(_causes(error))[-1]
    return shown(getattr(last, "strerror", None) or str(last) or type(error).__name__)
