#!/usr/bin/env python3
"""kubensage-agent: one snapshot of a Kubernetes node every few seconds, delivered to a relay.

    sudo python3 agent.py                             show this node, live
    python3 agent.py --once --output json             one snapshot, for a script
    python3 agent.py --relay-address relay:50051      deliver snapshots until stopped
    python3 agent.py --listen 127.0.0.1:9551          serve them to Prometheus

Each cycle reads the node from procfs and sysfs, asks the container runtime for its pods and
containers (CRI over a unix socket), reads what these use from their cgroups, and puts all of it
into one Metrics message (proto/kubensage.proto). A pod's message lives as long as the pod, and each
cycle writes into it what has changed. A second thread delivers; a snapshot is forgotten only once
the relay has acknowledged it.

    what we read                      what we take                          documented in
    /proc/stat, schedstat             CPU time, boot time, activity         proc_stat(5), scheduler/sched-stats.rst
    /proc/cpuinfo, sysfs cpu/         models, topology, frequency           admin-guide/cputopology.rst
    /proc/loadavg                     load, threads                         proc_loadavg(5)
    /proc/meminfo, vmstat             memory, paging, OOM kills             filesystems/proc.rst, 1.2
    /proc/pressure/*                  stall time                            accounting/psi.rst
    /proc/PID/statm, comm, cmdline    the largest processes                 proc_pid_statm(5)
    /proc/PID/mountinfo, statvfs(3)   file systems and their use            proc_pid_mountinfo(5)
    /proc/diskstats, /sys/block       disk I/O, what is stacked             block/stat.rst, admin-guide/iostats.rst
    /proc/net/dev, /sys/class/net     interfaces and their counters         proc_net(5), sysfs-class-net
    /proc/net/route, ipv6_route       the interface of the default route    networking/proc_net
    /proc/net/snmp, snmp6, netstat,   protocols, sockets, softirq backlog   networking/snmp_counter.rst
      sockstat*, softnet_stat
    /proc/net/tcp*, udp*, arp,        sockets by state, queues, neighbours  networking/proc_net_tcp.rst, proc_net(5)
      rpc/nfs                         calls of the NFS client               nfsstat(8)
    /sys/class, block, devices/system sensors, thermal, power, RAID, bonds  hwmon/sysfs-interface.rst, ABI/
    rtnetlink RTM_GETADDR             addresses                             rtnetlink(7)
    /proc/uptime, /proc/sys           uptime, host name, kernel, limits     admin-guide/sysctl/
    adjtimex(2)                       the clock and its errors              adjtimex(2)
    /etc/os-release, *-release, ...   distribution                          os-release(5)
    DMI product_uuid, machine-id      identity of the host                  machine-id(5)
    /sys/fs/cgroup                    containers, pods, services            admin-guide/cgroup-v2.rst, cgroup-v1/
    /proc/PID/net/dev                 the pods' interfaces                  proc_net(5)
    CRI: Version, Status, the lists,  pods, containers, the runtime         kubernetes/cri-api
      ContainerStatus, ImageFsInfo

A value goes from the kernel's file through a parser that keeps the kernel's name into the field of
that name. A second process makes the calls that may never return. The sections follow the data: the
archive's bundle, files, subjects of the node, cgroups, runtime and pods, backlog, relay, snapshot,
output, command line. `grep '^# ---' agent.py` lists them.
"""
from __future__ import annotations

if __name__ == '__main__':
    # Ctrl-C during the imports ends it at once, without a traceback.
    import signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import atexit
import collections
import contextlib
import ctypes
import errno
import faulthandler
import fcntl
import functools
import gc
import glob
import heapq
import importlib.machinery
import importlib.util
import io
import itertools
import json
import logging
import logging.handlers
import math
import operator
import os
import queue
import random
import re
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
import traceback
import types
import zipimport
import zlib
from typing import (TYPE_CHECKING, Any, Callable, Deque, Dict, Generator, Iterable, Iterator, List, Mapping, NamedTuple,
                    Optional, Sequence, Set, Tuple, TypeVar)

# hashlib, ssl, gzip, difflib and json_format, 6 MB together, are imported where they are needed.
if TYPE_CHECKING:
    import ssl
    import tarfile

__version__ = '1.0.0'

log = logging.getLogger('kubensage-agent')

Row = TypeVar('Row')
# By the kernel's name a number of its; by subject what has failed.
Counts = Dict[str, int]
Failures = Dict[str, str]
Options = argparse.Namespace


# --- private paths

NEW_FILE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
# linux/socket.h: process, user, group
UCRED = struct.Struct('=III')


class UnsafePath(Exception):
    """Which path another user could exchange, and why."""


def check_user(what: str, user: int, believed: Sequence[int] = ()) -> None:
    """UnsafePath unless the user is root, the agent's own, or one that is believed."""
    if user not in (0, os.geteuid(), *believed):
        raise UnsafePath(f'{what} belongs to user {user}')


def check_component(path: str, believed: Sequence[int] = ()) -> None:
    """Raise UnsafePath where another user could exchange what is at or below the path.

    In a sticky directory, as /tmp is, users cannot rename what belongs to others; what is in it is checked itself.
    """
    status = os.lstat(path)
    if stat.S_ISLNK(status.st_mode):
        raise UnsafePath(f'{path} is a symbolic link')
    check_user(path, status.st_uid, believed)
    if status.st_mode & 0o022 and not (stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX):
        raise UnsafePath(f'{path} is writable by others (`chmod go-w {path}` fixes it)')
    if not stat.S_ISDIR(status.st_mode):
        raise UnsafePath(f'{path} is not a directory')


def check_path(path: str, believed: Sequence[int] = ()) -> None:
    """check_component of every directory from / to path."""
    while True:
        check_component(path, believed)
        if path == os.path.dirname(path):   # '/', or the '//' that POSIX tells from it
            return
        path = os.path.dirname(path)


def check_file(path: str, believed: Sequence[int] = ()) -> None:
    """check_path of the directories above, and check_user of what is there."""
    path = os.path.realpath(path)
    check_path(os.path.dirname(path), believed)
    check_user(path, os.lstat(path).st_uid, believed)


def check_socket(path: str, believed: Sequence[int] = ()) -> None:
    """check_file, and check_user of who listens there (SO_PEERCRED of unix(7)). OSError where nobody does.

    In a sticky directory any user could take the name once the server has stopped.
    """
    check_file(path, believed)
    if os.stat(os.path.dirname(path)).st_mode & 0o022:
        raise UnsafePath(f'{os.path.dirname(path)} is writable by others')
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC) as probe:
        probe.connect(path)
        _, user, _ = UCRED.unpack(probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
    check_user(f'the server at {path}', user, believed)


def lock_directory(path: str, mode: int) -> Optional[int]:
    """flock(2) a directory; None if it is taken (LOCK_NB). The lock ends when the descriptor is closed."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, mode)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


# --- the bundle

# kubensage-agent.pyz carries grpcio and protobuf for every supported Python: bundle.txt names the member that has the
# compiled module for a suffix, and that member, NAME.tar.xz, has all of one architecture. Compiled modules do not
# import from a zip, so what this interpreter needs is unpacked once, into CACHE/NAME-SUFFIX.
ARCHIVE_NAME = 'kubensage-agent.pyz'
ROOT_CACHE = '/var/cache/kubensage-agent'
UNPACKING = '.unpacking-'
# After these errors another directory is tried.
UNUSABLE = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT)
ANOTHER_CACHE = '(KUBENSAGE_CACHE=DIR names another directory)'


class BundleError(Exception):
    """Why grpc cannot be taken from the archive: one line for the person who started the agent."""


def find_archive() -> Optional[str]:
    """The archive that this module was loaded from; in a checkout without grpcio, the one that was built in it."""
    archive = getattr(globals().get('__loader__'), 'archive', None)
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), ARCHIVE_NAME)
    if archive is None and os.path.exists(beside) and importlib.util.find_spec('grpc') is None:
        return beside
    return archive


def read_member(archive: str, name: str) -> bytes:
    """BundleError where the archive lacks it or is damaged."""
    try:
        return zipimport.zipimporter(archive).get_data(os.path.join(archive, name))
    except (OSError, ImportError):
        raise BundleError(f'{archive} is damaged: its {name} cannot be read') from None


def member_path(member: tarfile.TarInfo, suffix: str) -> Optional[str]:
    """Where a member of the tar belongs in the tree; None for one that this interpreter has no use for."""
    name = member.name
    if name.startswith('/') or '..' in name.split('/') or not (member.isreg() or member.isdir()):
        raise BundleError(f'the archive is not to be trusted: it has a member {name!r} (type {member.type!r})')
    wanted = name.endswith(('.py', '.pem', '.abi3.so', suffix)) or '.dist-info/' in name
    return os.path.normpath(name) if wanted and member.isreg() else None


def unpack(packed: bytes, suffix: str, tree: str) -> None:
    """Write this interpreter's members into an empty directory. The tar has the modules that are compiled for one
    Python last: nothing after this interpreter's own is decompressed."""
    import lzma
    import tarfile
    with tarfile.open(fileobj=lzma.open(io.BytesIO(packed)), mode='r|') as tar:
        for member in tar:
            path = member_path(member, suffix)
            if path is None:
                continue
            os.makedirs(os.path.dirname(os.path.join(tree, path)), mode=0o700, exist_ok=True)
            with open(os.open(os.path.join(tree, path), NEW_FILE_FLAGS, 0o600), 'wb') as file:
                shutil.copyfileobj(tar.extractfile(member), file)
            if path.endswith(suffix):
                return
    raise BundleError(f'the archive is damaged: it has no module *{suffix}, which its bundle.txt promises')


def clean_leftovers(cache: str) -> None:
    """Remove what killed runs were unpacking. The caller has the lock."""
    for name in os.listdir(cache):
        if name.startswith(UNPACKING):
            shutil.rmtree(os.path.join(cache, name), ignore_errors=True)


def install_tree(archive: str, member: str, suffix: str, tree: str) -> None:
    """Unpack beside the tree, compile, and rename: a tree is there whole or not at all. The caller has the lock."""
    import compileall
    import hashlib
    import lzma
    import py_compile
    import tarfile
    import tempfile
    cache = os.path.dirname(tree)
    clean_leftovers(cache)
    packed = read_member(archive, member)
    # The name is made of the content's hash: xz's own check comes only after what is decompressed.
    if hashlib.sha256(packed).hexdigest()[:16] != member.partition('.')[0].rpartition('-')[2]:
        raise BundleError(f'{archive} is damaged: its {member} has another content than was packed')
    fresh = tempfile.mkdtemp(prefix=UNPACKING, dir=cache)
    try:
        unpack(packed, suffix, fresh)
        # Nobody else can write here, so no run compares the byte code with its source, or writes it.
        compileall.compile_dir(fresh, quiet=2, stripdir=fresh, prependdir=tree, optimize=0,
                               invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
        if os.path.lexists(tree):
            os.rename(tree, os.path.join(tempfile.mkdtemp(prefix=UNPACKING, dir=cache), 'replaced'))
        os.rename(fresh, tree)
    except (lzma.LZMAError, tarfile.TarError, EOFError) as error:
        raise BundleError(f'the archive is damaged: {error}') from None
    finally:
        clean_leftovers(cache)


def clean_cache(cache: str, archive_name: str) -> None:
    """Remove the trees of other archives that no running agent has locked. The caller has the lock."""
    for entry in os.scandir(cache):
        outdated = '.cpython-' in entry.name and not entry.name.startswith(f'{archive_name}.')
        descriptor = None
        if outdated and entry.is_dir(follow_symlinks=False):
            descriptor = lock_directory(entry.path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if descriptor is not None:
            shutil.rmtree(entry.path, ignore_errors=True)
            os.close(descriptor)


def hold_tree(tree: str) -> bool:
    """Whether a tree of ours is there. Its lock keeps it from being cleaned away as long as this process lives."""
    try:
        check_component(tree)
        lock_directory(tree, fcntl.LOCK_SH)
        return True
    except (OSError, UnsafePath):
        return False


def ready_tree(archive: str, member: str, suffix: str, cache: str) -> str:
    """The tree for this interpreter, unpacked now unless it is there. OSError where that is impossible."""
    tree = os.path.join(cache, member.partition('.')[0] + suffix[:-len('.so')])
    os.makedirs(cache, mode=0o700, exist_ok=True)
    check_path(cache)
    if os.statvfs(cache).f_flag & os.ST_NOEXEC:
        raise OSError(errno.EACCES, 'it is mounted noexec')
    if hold_tree(tree):
        return tree
    lock = lock_directory(cache, fcntl.LOCK_EX)
    try:
        if not hold_tree(tree):
            install_tree(archive, member, suffix, tree)
            clean_cache(cache, member.partition('.')[0])
            if not hold_tree(tree):
                raise BundleError(f'{tree} is not what was just unpacked there {ANOTHER_CACHE}')
    finally:
        os.close(lock)
    return tree


def cache_directory(environment: Mapping[str, str]) -> Optional[str]:
    """Where trees are unpacked; None where this user has no place of its own."""
    if environment.get('KUBENSAGE_CACHE'):
        return os.path.abspath(environment['KUBENSAGE_CACHE'])
    if os.geteuid() == 0:
        return ROOT_CACHE
    home = environment.get('XDG_CACHE_HOME')
    if not home and environment.get('HOME'):
        home = os.path.join(environment['HOME'], '.cache')
    return os.path.join(os.path.abspath(home), 'kubensage-agent') if home else None


def find_tree(archive: str, member: str, suffix: str, environment: Mapping[str, str]) -> str:
    """A tree in the cache, or in a temporary directory where the cache cannot be used. BundleError."""
    import tempfile
    cache, reason = cache_directory(environment), 'no HOME'
    for place in (cache, tempfile.gettempdir(), '/run', '/dev/shm'):
        try:
            if place and place != cache:
                place = tempfile.mkdtemp(prefix='kubensage-agent-', dir=place)
                atexit.register(shutil.rmtree, place, ignore_errors=True)
                sys.stderr.write(f'kubensage-agent: {reason}: unpacking into {place} for this run alone '
                                 '(KUBENSAGE_CACHE=DIR names a directory that stays)\n')
            if place:
                return ready_tree(archive, member, suffix, place)
        except OSError as error:
            reason = f'{place}: {error.strerror}'
            if error.errno not in UNUSABLE:
                break
        except UnsafePath as error:
            raise BundleError(f'not unpacking into {place}: {error} {ANOTHER_CACHE}') from None
    raise BundleError(f'cannot unpack into {reason} {ANOTHER_CACHE}')


def bundle_member(archive: str, suffix: str) -> Optional[str]:
    """The member for this interpreter; None where grpcio is installed instead. BundleError where there is neither.

    bundle.txt: `.cpython-311-x86_64-linux-gnu.so x86_64-9f86d081884c7d65.tar.xz`
    """
    try:
        targets = dict(line.split() for line in read_member(archive, 'bundle.txt').decode().splitlines())
    except ValueError:
        raise BundleError(f'{archive} is damaged: its bundle.txt is malformed') from None
    if suffix in targets or importlib.util.find_spec('grpc'):
        return targets.get(suffix)
    raise BundleError(f'no grpcio for {suffix[1:-3]}: {os.path.basename(archive)} has it for '
                      f'{", ".join(name[1:-3] for name in targets)}; install grpcio and protobuf, or build an '
                      'archive for this machine with `./build_zipapp.sh --native`')


def use_bundle(environment: Mapping[str, str]) -> None:
    """Make `import grpc` find the archive's grpcio before any other. Ends the run where that is impossible."""
    archive, suffix = find_archive(), importlib.machinery.EXTENSION_SUFFIXES[0]
    if archive is None:
        return
    # PYTHONPYCACHEPREFIX: byte code from elsewhere than the tree is not ours.
    sys.pycache_prefix = None
    mask = os.umask(0o077)
    try:
        member = bundle_member(archive, suffix)
        tree = find_tree(archive, member, suffix, environment) if member else None
    except BundleError as error:
        sys.exit(f'kubensage-agent: {error}')
    finally:
        os.umask(mask)
    if tree:
        sys.path.insert(0, tree)
        sys.dont_write_bytecode = True
        # A .pth file of a site directory may have made a namespace package of another `google` already.
        for name in [name for name in sys.modules if name.partition('.')[0] in ('google', 'grpc', 'typing_extensions')]:
            del sys.modules[name]


@contextlib.contextmanager
def import_spared(stand_ins: Mapping[str, Any]) -> Iterator[None]:
    """Keep modules from being imported meanwhile, each replaced by its stand-in; None makes the import fail."""
    spared = {name: stand_in for name, stand_in in stand_ins.items() if name not in sys.modules}
    sys.modules.update(spared)
    try:
        yield
    finally:
        for name in spared:
            del sys.modules[name]


use_bundle(os.environ)
# Settings meant for other programs must not reach the compiled modules.
for variable in [name for name in os.environ if name.startswith(('GRPC_', 'PROTOCOL_BUFFERS_'))]:
    del os.environ[variable]
os.environ.update({
    # What the C core reports comes back as the status of a call.
    'GRPC_VERBOSITY': 'NONE',
    # A name that getaddrinfo(3) knows is known, and at once: the C core's own resolver waits for the DNS.
    'GRPC_DNS_RESOLVER': 'native',
    # Its handlers of fork(2) are for programs that go on in the child; ours only exec there.
    'GRPC_ENABLE_FORK_SUPPORT': '0'})
try:
    # grpc imports its asyncio half, and asyncio imports ssl: 5 MB and 13 ms of the start that the agent has no use for.
    with import_spared({'grpc.aio': types.ModuleType('grpc.aio'), 'ssl': None}):
        import grpc
    from google.protobuf.message import DecodeError

    import cri_pb2 as cri
    import kubensage_pb2 as wire
except ModuleNotFoundError as missing:
    sys.exit(f'kubensage-agent: {missing}: `pip install grpcio==1.80.1 protobuf==6.33.6`, or build the archive with '
             './build_zipapp.sh')
except ImportError as broken:
    # Most likely the system lacks a library that the compiled modules need.
    sys.exit(f'kubensage-agent: grpcio does not load: {broken}')


# --- files

# What these mean for a file of procfs or sysfs: this node, or this user, does not have it.
ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ESRCH, errno.EACCES, errno.EPERM, errno.ENODEV,
                    errno.EOPNOTSUPP})
# What a parser's arithmetic and indexing raise on text that the kernel does not write.
MALFORMED = (ValueError, IndexError, KeyError, TypeError, OverflowError)
BOOT_ID = '/proc/sys/kernel/random/boot_id'
# No file of one short line is longer.
SMALL_BYTES = 4096
# No real size or counter is this large: it has gone below 0.
BEYOND = 2**63


class Malformed(ValueError):
    """What of a file is malformed; `rest` is what the other lines say."""

    def __init__(self, text: str, rest: Any):
        super().__init__(f'malformed line: {text[:200]!r}')
        self.rest = rest


class Roots(NamedTuple):
    """Where the node's trees are mounted: /proc, /sys and /, or another machine's."""
    procfs: str
    sysfs: str
    rootfs: str


def read_small(path: str) -> bytes:
    """A file of one short line, which one read(2) gives whole: half of what read_bytes takes for it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, SMALL_BYTES)
    finally:
        os.close(descriptor)


def read_bytes(path: str, limit: float = math.inf) -> bytes:
    """The whole file; beyond the limit, only its whole lines up to there."""
    descriptor, chunks = os.open(path, os.O_RDONLY | os.O_CLOEXEC), []
    try:
        while limit > 0:
            chunks.append(os.read(descriptor, 1 << 16))
            if not chunks[-1]:
                return b''.join(chunks)
            limit -= len(chunks[-1])
        return b''.join(chunks).rpartition(b'\n')[0]
    finally:
        os.close(descriptor)


def read_text(path: str) -> str:
    """The whole file as text; bytes that are not UTF-8 become U+FFFD."""
    return read_bytes(path).decode(errors='replace')


def read_line(path: str) -> Optional[str]:
    """A file of one line, without surrounding white space; None where it is empty."""
    return read_small(path).decode(errors='replace').strip() or None


def read_int(path: str) -> Optional[int]:
    """A file of one decimal or 0x number; None where it is empty. EINVAL is how sysfs says "not now" (speed of a link
    that is down)."""
    try:
        text = read_line(path)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return None
    return text and parse_number(text, lambda digits: int(digits, 0))


def said_or_errno(read: Callable[..., bytes], *arguments: Any) -> Any:
    """What a file says: None where it is absent, the errno where it fails."""
    try:
        return read(*arguments)
    except OSError as error:
        return None if error.errno in ABSENT else error.errno


def parse_number(text: str, convert: Callable[[str], Any] = int) -> Any:
    """Python takes 1_000 and the digits of all scripts, which no kernel writes."""
    if '_' in text or not text.isascii():
        raise ValueError(f'not a number: {text[:80]!r}')
    return convert(text)


def parse_numbers(text: str) -> List[int]:
    """Whole numbers between blanks."""
    if '_' in text or not text.isascii():
        raise ValueError
    return list(map(int, text.split()))


def parse_lines(text: str, parse_line: Callable[[str], Any], make: Callable[[List[Any]], Row] = list) -> Row:
    """What `make` makes of the lines that have content, each parsed. A malformed line costs itself: Malformed.

    Not splitlines(): a form feed or a U+2028 in a name ends no line.
    """
    rows, malformed = [], []
    for line in filter(str.strip, text.split('\n')):
        try:
            rows.append(parse_line(line))
        except MALFORMED:
            malformed.append(line)
    if malformed:
        raise Malformed(malformed[0], make(rows))
    return make(rows)


def parse_flat_keyed(text: str) -> Counts:
    """Lines of `KEY NUMBER`, "flat keyed" in cgroup-v2.rst: vmstat, snmp6, cpu.stat, memory.events."""
    def parse_line(line: str) -> Tuple[str, int]:
        key, value = line.split()
        return key, parse_number(value)

    words = text.split()
    numbers = words[1::2]
    try:
        # A quarter of the time that line by line takes, which names the malformed line.
        if len(words) == 2 * text.count('\n') and text.isascii() and '_' not in ''.join(numbers):
            return dict(zip(words[::2], map(int, numbers)))
    except ValueError:
        pass
    return parse_lines(text, parse_line, dict)


# --- files that stay open

# io.stat has some 100 bytes a device: where there are many, it is read otherwise.
OPEN_FILE_BYTES = 1 << 16
# The files of 1,900 cgroups, which cost the kernel 147 MB.
MAX_OPEN_FILES = 1 << 15
# What the rest of the agent may need: connections, the spool, files that are read once.
SPARE_DESCRIPTORS = 256


class OpenFiles:
    """Files that are read in every cycle, None for one that is not open; closed when nothing refers to them any more.

    A file of a cgroup that stays open is read in 1 µs (memory.stat in 6), one that is opened for it in 7 (12). In
    exchange the kernel keeps a buffer of a page for each: 4.5 kB a file.
    """

    def __init__(self, count: int):
        self.descriptors: List[Optional[int]] = [None] * count

    def __del__(self) -> None:
        for descriptor in self.descriptors:
            if descriptor is not None:
                os.close(descriptor)


def read_open_files(descriptors: Sequence[Optional[int]]) -> List[Any]:
    """What each file says now, from its beginning: said_or_errno, which takes longer and is called only after an error.
    A file that has gone is absent (ENODEV). The agent spends most of its time here."""
    try:
        return [None if number is None else os.pread(number, OPEN_FILE_BYTES, 0) for number in descriptors]
    except OSError:
        return [None if number is None else said_or_errno(os.pread, number, OPEN_FILE_BYTES, 0)
                for number in descriptors]


def open_files_limit(hard: bool = False) -> int:
    """The soft limit, or the hard one, as far as the agent makes use of it."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[hard]
    return MAX_OPEN_FILES if limit == resource.RLIM_INFINITY else min(limit, MAX_OPEN_FILES)


def raise_open_files_limit() -> None:
    """As far as the hard limit allows. Files beyond the limit are opened in each cycle."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = open_files_limit(hard=True)
    if open_files_limit() < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# --- threads

def start_thread(target: Callable[..., None], *arguments: Any) -> threading.Thread:
    """A thread that the agent's end does not wait for. RuntimeError where none is to be had (pids.max, TasksMax)."""
    thread = threading.Thread(target=target, args=arguments, name=target.__name__, daemon=True)
    thread.start()
    return thread


def require_threads(count: int) -> None:
    """RuntimeError unless so many can be had at once."""
    checked, threads = threading.Event(), []
    try:
        threads.extend(start_thread(checked.wait) for _ in range(count))
    finally:
        checked.set()
    for thread in threads:
        thread.join()


# --- messages

@functools.lru_cache(None)
def field_names(kind: Any) -> Tuple[str, ...]:
    """The names of a message's fields, in the order of the proto."""
    return tuple(field.name for field in kind.DESCRIPTOR.fields)


def put(message: Any, name: str, number: float) -> None:
    """A number into the field of this name. One that is out of range, or is none (NaN), makes it absent."""
    try:
        if 0 <= number < BEYOND:
            return setattr(message, name, number)
    except ValueError:
        # Beyond the field's own type.
        pass
    return message.ClearField(name)


def fill_known(message: Any, **values: Any) -> None:
    """Put each text and each number that is known into the field of its name."""
    for name, value in values.items():
        if isinstance(value, str):
            setattr(message, name, value)
        elif value is not None:
            put(message, name, value)


def fill_map(message_map: Any, numbers: Counts) -> None:
    """Put the numbers that are in range into a map."""
    message_map.update({key: number for key, number in numbers.items() if 0 <= number < BEYOND})


def fill(message: Any, numbers: Mapping[str, Any]) -> None:
    """Put each number that is in range into the field of its name. A field without one becomes absent, and one without
    a field is dropped.

    For messages of scalars alone: protobuf frees the memory of a message as a whole, never in part, so that a living
    message from which submessages, lists or strings are cleared grows without end.
    """
    message.Clear()
    for name in field_names(type(message)):
        number = numbers.get(name)
        if number is not None and 0 <= number < BEYOND:
            setattr(message, name, number)


def fill_wrapped(message: Any, values: Mapping[str, Optional[float]]) -> None:
    """The same for fields that are wrappers (UInt64Value, DoubleValue): these are written in place."""
    for name, value in values.items():
        if value is not None and 0 <= value < BEYOND:
            getattr(message, name).value = value
        elif message.HasField(name):
            message.ClearField(name)


def fill_text(message: Any, name: str, text: str) -> None:
    """Of a living message a text is written only where it differs: protobuf keeps the memory of the previous one."""
    if getattr(message, name) != text:
        setattr(message, name, text)


def fill_list(messages: Any, rows: Sequence[Any], fill_row: Callable[[Any, Any], None]) -> None:
    """Make a repeated field as long as rows, and fill each of its messages in place."""
    del messages[len(rows):]
    for index, row in enumerate(rows):
        fill_row(messages[index] if index < len(messages) else messages.add(), row)


def known(message: Any, name: str) -> Any:
    """The value of a field, None where it is absent."""
    return getattr(message, name) if message.HasField(name) else None


# --- what a tenant may have

# Names, labels, groups, interfaces and exits are the tenants' choice, and the node's pods share one snapshot. What is
# cut is counted in PodMetrics.left_out. A text: a path may have 4,096 bytes, names of Kubernetes have at most 253.
MAX_TEXT = 1024
# Of a pod, its containers included; the kubelet's own take 300 and 200 for each container.
LABEL_BYTES = 8192
# Interfaces of a pod, I/O devices of a group; and what is read of net/dev, a thousand interfaces.
MAX_ROWS, NET_DEV_BYTES = 32, 1 << 17
# The others, summed as one. No interface and no device can have this name.
OTHERS = 'all others'
# Containers of a pod that have exited; the kubelet keeps one for each name.
MAX_EXITED = 16


def first_rows(rows: Mapping[str, Counts]) -> Mapping[str, Counts]:
    """As many as one may have, and the others as one."""
    if len(rows) <= MAX_ROWS:
        return rows
    kept, others = dict(itertools.islice(rows.items(), MAX_ROWS)), collections.Counter()
    for counts in itertools.islice(rows.values(), MAX_ROWS, None):
        others.update(counts)
    return {**kept, OTHERS: others}


def fitting_labels(labels: Mapping[str, str], budget_bytes: int) -> Dict[str, str]:
    """As many as fit, the kubelet's own first."""
    fitting = {}
    for key, value in sorted(labels.items(), key=lambda item: (not item[0].startswith('io.kubernetes.'), item)):
        budget_bytes -= len(key) + len(value)
        if budget_bytes < 0:
            break
        fitting[key] = value
    return fitting


def label_bytes(pod: wire.PodMetrics) -> int:
    return sum(len(key) + len(value) for message in (pod, *pod.container_metrics)
               for key, value in message.labels.items())


def count_left_out(pod: wire.PodMetrics, what: str, count: int) -> None:
    if count > 0:
        pod.left_out[what] = count
    elif what in pod.left_out:
        del pod.left_out[what]


# --- cycle

# How often what rarely changes is read again.
SELDOM_SECONDS = 60
# The share of a cycle that the runtime may take, at most so long; no call is given less than the shortest time-out.
CRI_SHARE_OF_CYCLE, CRI_LONGEST_SECONDS, CRI_SHORTEST_SECONDS = 0.8, 4, 0.1
# How long one group of questions may wait for the helper: a quarter of a cycle, so that no tick is lost.
LONGEST_PATIENCE_SECONDS, SHORTEST_PATIENCE_SECONDS = 1, 0.2


class Cycle:
    """One cycle: when it began and until when the runtime may answer (monotonic clock), how long to wait for what may
    never answer, what has failed, by subject, what the runtime's methods have cost since the agent's start, and what
    the mounts tell of the pods: their volumes, all that is mounted in an emptyDir, and how many volumes each place has
    that may be the kubelet's root."""

    failed_reads = 0

    def __init__(self, roots: Roots, interval: float, calls: Dict[str, wire.CriMethodMetrics],
                 now: Optional[float] = None):
        self.roots = roots
        self.now = time.monotonic() if now is None else now
        self.deadline = time.monotonic() + min(CRI_LONGEST_SECONDS, interval * CRI_SHARE_OF_CYCLE)
        self.patience = max(SHORTEST_PATIENCE_SECONDS, min(LONGEST_PATIENCE_SECONDS, interval / 4))
        self.calls = calls
        self.failures: Failures = {}
        self.current = ''
        self.subject_seconds: Dict[str, float] = {}
        self.volumes: List[Volume] = []
        self.mountpoints: Set[str] = set()
        self.kubelet_roots: Counts = collections.Counter()

    def path(self, path: str) -> str:
        """Where a file of the node is for the agent."""
        _, tree, below = path.split('/', 2)
        mounted = self.roots.procfs if tree == 'proc' else self.roots.sysfs if tree == 'sys' else ''
        return f'{mounted}/{below}' if mounted else self.roots.rootfs.rstrip('/') + path

    def read(self, path: str, parse: Optional[Callable[[Any], Any]] = None,
             reader: Callable[[str], Any] = read_text) -> Any:
        """What a reader, and a parser, make of a file of the node; None where it is absent. One that fails or is
        malformed is a failure of its own, and costs what comes from it; a line that is malformed costs itself."""
        try:
            data = reader(self.path(path))
        except (OSError, ValueError) as error:
            return None if getattr(error, 'errno', None) in ABSENT else self.failed_file(path, error)
        return data if parse is None or data is None else self.parsed(path, data, parse)

    def parsed(self, path: str, data: Any, parse: Callable[[Any], Any]) -> Any:
        """What a parser makes of it, as far as it can."""
        try:
            return parse(data)
        except Malformed as error:
            self.failed_file(path, error)
            return error.rest
        except MALFORMED:
            return self.failed_file(path, f'malformed: {data[:200]!r}')

    def read_line(self, path: str, parse: Optional[Callable[[str], Any]] = None) -> Any:
        return self.read(path, parse, read_line)

    def read_int(self, path: str) -> Optional[int]:
        return self.read(path, None, read_int)

    def names(self, path: str) -> List[str]:
        """The names in a directory."""
        return self.read(path, None, os.listdir) or []

    def reads_this_machine(self) -> bool:
        """Whether system calls tell of the machine whose trees are read."""
        return self.roots.procfs == '/proc' or self.read_line(BOOT_ID) == read_line(BOOT_ID)

    def failed_file(self, path: str, error: Any) -> None:
        """By the file's name: there may be one in each of a thousand directories."""
        self.failed(f'{self.current}: {os.path.basename(path)}', f'{path}: {getattr(error, "strerror", None) or error}')

    def failed(self, subject: str, error: Any) -> None:
        """A text, or an error: one that no input can cause is a bug, whose place is told."""
        if isinstance(error, Exception) and not isinstance(error, (ValueError, OSError, ArithmeticError, CriError)):
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.failures['bug'] = error = f'{error!r} in {place.name}, line {place.lineno}'
        self.failures[subject] = str(error)[:MAX_TEXT]
        self.failed_reads += 1

    def seconds_left(self) -> float:
        return max(CRI_SHORTEST_SECONDS, self.deadline - time.monotonic())


# --- CPU

# USER_HZ, the unit of times in procfs: 100 on every architecture in use, whatever the kernel's own HZ.
TICKS_PER_SECOND = os.sysconf('SC_CLK_TCK')
# idle and iowait may go backwards by a little; by more, the CPU was taken offline and counts anew.
BACKWARDS_TICKS = 3 * TICKS_PER_SECOND
# A day. Under Xen steal may jump by more than the machine has lived.
JUMP_TICKS = 86400 * TICKS_PER_SECOND
# MIDR_EL1 implementer and part numbers; Linux on ARM prints these and no names.
ARM_IMPLEMENTERS = {0x41: 'ARM', 0x48: 'HiSilicon', 0x4e: 'NVIDIA', 0x51: 'Qualcomm', 0x61: 'Apple', 0xc0: 'Ampere'}
ARM_PARTS = {
    (0x41, 0xd03): 'Cortex-A53', (0x41, 0xd05): 'Cortex-A55', (0x41, 0xd07): 'Cortex-A57', (0x41, 0xd08): 'Cortex-A72',
    (0x41, 0xd0b): 'Cortex-A76', (0x41, 0xd0c): 'Neoverse-N1', (0x41, 0xd40): 'Neoverse-V1',
    (0x41, 0xd49): 'Neoverse-N2', (0x41, 0xd4f): 'Neoverse-V2', (0x41, 0xd83): 'Neoverse-V3',
    (0x41, 0xd8e): 'Neoverse-N3', (0x48, 0xd01): 'Kunpeng-920', (0xc0, 0xac3): 'Ampere-1', (0xc0, 0xac4): 'Ampere-1a',
}


class CpuTimes(NamedTuple):
    """The columns of a cpu line of /proc/stat, in ticks; guest time is part of user and nice.

    steal came with Linux 2.6.11, guest with 2.6.24, guest_nice with 2.6.33.
    """
    user: int
    nice: int
    system: int
    idle: int
    iowait: int = 0
    irq: int = 0
    softirq: int = 0
    steal: int = 0
    guest: int = 0
    guest_nice: int = 0


def parse_stat(text: str) -> Tuple[Dict[str, CpuTimes], Counts]:
    """/proc/stat: the times of `cpu` (all) and `cpuN` (online ones), and the first number of each other line.

    cpu0 21 0 35 9800 12 0 4 0 0 0
    btime 1795425000
    """
    times: Dict[str, CpuTimes] = {}
    numbers: Counts = {}

    def parse_line(line: str) -> None:
        name, rest = line.split(None, 1)
        if re.fullmatch(r'cpu(0|[1-9]\d*)?', name, re.ASCII):
            ticks = parse_numbers(rest)[:10]
            if min(ticks) < 0 or max(ticks) >= BEYOND:
                raise ValueError
            times[name] = CpuTimes(*ticks)
        else:
            numbers[name] = parse_number(rest.split(None, 1)[0])

    return parse_lines(text, parse_line, lambda rows: (times, numbers))


def parse_cpuinfo(text: str) -> Dict[int, Dict[str, str]]:
    """/proc/cpuinfo: by the number of the logical CPU, the `key : value` lines of its block."""
    infos: Dict[int, Dict[str, str]] = {}
    blocks: Dict[str, str] = {}

    def parse_line(line: str) -> None:
        nonlocal blocks
        key, value = (word.strip() for word in line.split(':', 1))
        if key == 'processor':
            blocks = infos.setdefault(parse_number(value), {})
        blocks[key] = value

    return parse_lines(text, parse_line, lambda rows: infos)


def parse_schedstat(text: str) -> Dict[int, Counts]:
    """/proc/schedstat: of the lines `cpuN ...` the last three of nine numbers, in ns and slices."""
    lines = re.findall(r'^cpu(\d+)(?: \d+){6} (\d+) (\d+) (\d+)$', text, re.MULTILINE)
    return {int(cpu): dict(zip(('run_ns', 'wait_ns', 'timeslices'), map(int, numbers))) for cpu, *numbers in lines}


def cpu_percent(previous: CpuTimes, times: CpuTimes, cpus: int = 1) -> Optional[float]:
    """Percent of the time between two samples of so many CPUs that was neither idle nor iowait; None if no time has
    passed, or a counter has begun anew or jumped.

    idle and iowait may go backwards by a little (proc_stat(5)): such a step counts as 0.
    """
    steps = [b - a for a, b in zip(previous, times)]
    elapsed = CpuTimes(*(max(0, step) for step in steps))
    total = sum(elapsed[:8])
    if not total or min(steps) <= -BACKWARDS_TICKS or max(steps) > JUMP_TICKS * cpus:
        return None
    return 100 * (total - elapsed.idle - elapsed.iowait) / total


def without_steps_back(previous: CpuTimes, times: CpuTimes) -> CpuTimes:
    """The counters for consumers that compute rates: idle and iowait stay where they are instead of going back."""
    idle, iowait = (max(a, b) if a - b < BACKWARDS_TICKS else b for a, b in
                    ((previous.idle, times.idle), (previous.iowait, times.iowait)))
    return times._replace(idle=idle, iowait=iowait)


def fill_cpu_seconds(message: wire.CpuSeconds, times: CpuTimes) -> None:
    for mode, ticks in zip(CpuTimes._fields, times):
        setattr(message, mode, ticks / TICKS_PER_SECOND)


def collect_cpu_info(number: int, info: Mapping[str, str], cycle: Cycle) -> Tuple[wire.CpuInfo, str]:
    """One CPU, from its block of /proc/cpuinfo and from sysfs, which has the topology on every architecture; and what
    the CPUs of its core have in common, empty where that is not known. core_id is unique only within a die or
    a cluster."""
    directory, message = f'/sys/devices/system/cpu/cpu{number}', wire.CpuInfo(cpu=number)
    ids = {}
    for field, file, key in (('physical_id', 'physical_package_id', 'physical id'), ('core_id', 'core_id', 'core id')):
        value = cycle.read_int(f'{directory}/topology/{file}')
        # -1 is how sysfs says that it does not know.
        ids[field] = info.get(key) if value is None else str(value) if 0 <= value < BEYOND else None
    siblings = (cycle.read_line(f'{directory}/topology/{file}')
                for file in ('core_cpus_list', 'thread_siblings_list'))
    max_khz = cycle.read_int(f'{directory}/cpufreq/cpuinfo_max_freq')
    vendor, model = info.get('vendor_id'), info.get('model name')
    with contextlib.suppress(ValueError, OverflowError):
        put(message, 'mhz', round(float(info.get('cpu MHz', '')) if max_khz is None else max_khz // 1000))
    with contextlib.suppress(KeyError, ValueError):
        names = info['CPU implementer'], info['CPU part']
        numbers = tuple(int(name, 16) for name in names)
        vendor, model = ARM_IMPLEMENTERS.get(numbers[0], names[0]), ARM_PARTS.get(numbers, '/'.join(names))
    fill_known(message, model=model, vendor_id=vendor, **ids)
    return message, next(filter(None, siblings), None) or message.core_id


def collect_cpu_infos(online: Iterable[int], cycle: Cycle) -> Dict[int, wire.CpuInfo]:
    """The online CPUs; `cores` counts the distinct cores of a CPU's package."""
    blocks = cycle.read('/proc/cpuinfo', parse_cpuinfo) or {}
    infos = [collect_cpu_info(number, blocks.get(number, {}), cycle) for number in online]
    cores = {(info.physical_id, core) for info, core in infos if core}
    count = collections.Counter(package for package, _ in cores)
    for info, _ in infos:
        if info.physical_id in count:
            info.cores = count[info.physical_id]
    return {info.cpu: info for info, _ in infos}


def collect_cpu(node: wire.NodeMetrics, state: NodeState, cycle: Cycle) -> None:
    """Everything of /proc/stat: CPU time, its use since the previous cycle, boot time, the kernel's activity."""
    times, numbers = cycle.read('/proc/stat', parse_stat) or ({}, {})
    before, infos = state.cpu_times, state.cpu_infos
    fill_known(node.stat, **{name: numbers.get(name) for name in field_names(wire.Stat)})
    fill_known(node, boot_time=numbers.get('btime'))
    if not times:
        return
    times = {name: without_steps_back(before.get(name, after), after) for name, after in times.items()}
    percent = {name: cpu_percent(before[name], after, len(times) if name == 'cpu' else 1)
               for name, after in times.items() if name in before}
    state.cpu_times = times
    if 'cpu' in times:
        fill_cpu_seconds(node.cpu_seconds, times['cpu'])
    fill_known(node, total_cpu_percentage=percent.get('cpu'))
    online = [int(name[3:]) for name in times if name != 'cpu']
    if list(infos) != online:
        # Not in each cycle: to print /proc/cpuinfo the kernel asks every CPU for its frequency.
        failed_before = cycle.failed_reads
        infos = collect_cpu_infos(online, cycle)
        state.cpu_infos = infos if cycle.failed_reads == failed_before else {}
    schedstat = cycle.read('/proc/schedstat', parse_schedstat) or {}
    for number, info in infos.items():
        message = node.cpu_infos.add()
        message.CopyFrom(info)
        fill_known(message, **schedstat.get(number, {}))
        fill_cpu_seconds(message.seconds, times[f'cpu{number}'])
        fill_known(message, usage=percent.get(f'cpu{number}'))


# --- load and limits

# Below /proc/sys, by the field of KernelLimits.
SYSCTLS = {'threads_max': 'kernel/threads-max', 'pid_max': 'kernel/pid_max',
           'entropy_avail': 'kernel/random/entropy_avail', 'poolsize': 'kernel/random/poolsize',
           'hung_task_detect_count': 'kernel/hung_task_detect_count',
           'nf_conntrack_count': 'net/netfilter/nf_conntrack_count',
           'nf_conntrack_max': 'net/netfilter/nf_conntrack_max'}


def parse_loadavg(text: str) -> Dict[str, float]:
    """/proc/loadavg: averages of runnable and uninterruptible threads, runnable/all threads, the last pid.

    1.38 1.73 0.83 2/229 2859
    """
    load1, load5, load15, threads = text.split()[:4]
    runnable, total = threads.split('/')
    averages = {'load1': load1, 'load5': load5, 'load15': load15}
    return {'runnable_threads': parse_number(runnable), 'threads': parse_number(total),
            **{name: parse_number(average, float) for name, average in averages.items()}}


def parse_file_nr(text: str) -> Counts:
    """/proc/sys/fs/file-nr: allocated descriptors, a 0 left from old times, the maximum: `832 0
    9223372036854775807`."""
    allocated, _, maximum = text.split()
    return {'file_nr_allocated': parse_number(allocated), 'file_nr_max': parse_number(maximum)}


def collect_load(node: wire.NodeMetrics, state: NodeState, cycle: Cycle) -> None:
    fill_known(node.load_average, **cycle.read('/proc/loadavg', parse_loadavg) or {})


def collect_limits(node: wire.NodeMetrics, state: NodeState, cycle: Cycle) -> None:
    limits = {field: cycle.read_int(f'/proc/sys/{path}') for field, path in SYSCTLS.items()}
    limits.update(cycle.read('/proc/sys/fs/file-nr', parse_file_nr) or {})
    fill_known(node.kernel_limits, **limits)


# --- memory

# Of vmstat's 180 lines: paging, faults and swapping, and OOM kills (since Linux 4.13).
VMSTAT = re.compile(r'oom_kill|pgpgin|pgpgout|pswpin|pswpout|pgfault|pgmajfault')


def parse_meminfo(text: str) -> Counts:
    """/proc/meminfo in bytes (the file says kB and means 1,024); HugePages_* are counts.

    MemTotal:       24683080 kB
    """
    def parse_line(line: str) -> Tuple[str, int]:
        name, value = line.split(':')
        number, *unit = value.split()
        return name, parse_number(number) * (1024 if unit == ['kB'] else 1)

    return parse_lines(text, parse_line, dict)


def collect_memory(node: wire.NodeMetrics, state: NodeState, cycle: Cycle) -> None:
    """MemAvailable is the kernel's own estimate, since Linux 3.14; used is what is not available. lxcfs may make more
    available than there is: that is not believed."""
    fill_map(node.meminfo, cycle.read('/proc/meminfo', parse_meminfo) or {})
    memory = dict(node.meminfo)
    total, available = memory.get('MemTotal'), memory.get('MemAvailable')
    if total is not None and available is not None and available > total:
        del node.meminfo['MemAvailable']
        available = min(total, memory['MemFree'] + memory['Cached']) if {'MemFree', 'Cached'} <= memory.keys() else None
    used = None if total is None or available is None else total - available
    fill_known(node, total_memory=total, available_memory=available, used_memory=used,
               memory_used_perc=100 * used / total if used is not None and total else None)
    vmstat = cycle.read('/proc/vmstat', parse_flat_keyed) or {}
    fill_map(node.vmstat, {name: value for name, value in vmstat.items() if VMSTAT.fullmatch(name)})


# --- pressure

# More than 100 % is not believed.
PERCENT = r'(\d\d?(?:\.\d+)?|100(?:\.0+)?)'
PRESSURE_LINE = re.compile(
    fr'^(some|full) avg10={PERCENT} avg60={PERCENT} avg300={PERCENT} total=(\d+)$', re.ASCII | re.MULTILINE)


def parse_pressure(text: str) -> Dict[str, Dict[str, float]]:
    """/proc/pressure/* and *.pressure of a cgroup, nested keyed: percent averages over 10, 60 and 300 s, and a total in
    µs (accounting/psi.rst).

    some avg10=0.36 avg60=0.06 avg300=0.14 total=3037169
    """
    stalls, rows = {}, PRESSURE_LINE.findall(text)
    for kind, avg10, avg60, avg300, total in rows:
        stalls[kind] = {'avg10': float(avg10), 'avg60': float(avg60), 'avg300': float(avg300), 'total': int(total)}
    if len(rows) != len(list(filter(str.strip, text.split('\n')))):
        raise Malformed(text, stalls)
    return stalls


def fill_pressure(message: Any, pressure: Mapping[str, Mapping[str, float]], fill_stall: Callable[..., None]) -> None:
    for kind in ('some', 'full'):
        if kind in pressure:
            fill_stall(getattr(message, kind), pressure[kind])
        elif message.HasField(kind):
            message.ClearField(kind)


def collect_pressure(node: wire.NodeMetrics, state: NodeState, cycle: Cycle) -> None:
    """Absent before Linux 4.20; EOPNOTSUPP, which is absent too, where PSI is built in but off."""
    for name in ('cpu', 'memory', 'io', 'irq'):
        pressure = cycle.read(f'/proc/pressure/{name}', parse_pressure)
        if pressure:
            fill_pressure(getattr(node, f'psi_{name}_metrics'), pressure, fill_wrapped)


# --- what may never answer

# statvfs(2) of a dead file server waits in the kernel, where no signal reaches it. What takes the lock of the network
# (RTNL) waits while a pod with thousands of interfaces ends. A second process makes such calls: the agent can leave it
# behind. What it is asked is a letter and a path, several paths in as many lines, or a request of rtnetlink in
# hexadecimal; it answers with the question, a NUL, and what it has found after a `=`, or the errno after a `!`. It has
# a thread for each question that waits. It ends when the agent has.
STATVFS, READ, READ_ALL, NETLINK = b's', b'r', b'a', b'n'
HELPER = '''
import os, _socket, _thread, zlib
idle = []

def dump(request):
    netlink, data = _socket.socket(_socket.AF_NETLINK, _socket.SOCK_RAW, 0), b''
    netlink.send(request)
    # An NLMSG_ERROR, or the NLMSG_DONE of 20 bytes at the end.
    while data[4:6] != b'\\2\\0' and data[-20:-14] != b'\\x14\\0\\0\\0\\3\\0':
        data += netlink.recv(65536)
    return data

def answer(question):
    path = question[1:]
    if question[:1] == b'a':
        return b'\\0'.join(answer(b'r' + line).replace(b'\\0', b'') for line in path.split(b'\\n'))
    try:
        if question[:1] == b'n':
            return b'=' + zlib.compress(dump(bytes.fromhex(path.decode())), 1)
        if question[:1] == b'r':
            with open(path, 'rb', 0) as file:
                return b'=' + file.read(4096)
        space = os.statvfs(path)
        return b'=' + ' '.join(map(str, (os.stat(path).st_dev, *space))).encode()
    except OSError as error:
        return b'!%d' % error.errno

def serve():
    while True:
        idle.append(None)
        question = os.read(0, 65536)
        idle.pop()
        if not question:
            os._exit(0)
        try:
            if not idle:
                _thread.start_new_thread(serve, ())
        except RuntimeError:
            pass
        os.write(0, question + b'\\0' + answer(question))

serve()
'''
HELPER_END_SECONDS = 0.2
# A question that waits costs a thread. Beyond so many only what has been answered before is asked, of which so much is
# remembered.
MAX_WAITING, MAX_ANSWERED = 64, 4096
HELPER_ANSWER_BYTES = 1 << 17
# A question has 64 KiB, a path in sysfs at most 100 bytes.
READ_AT_ONCE = 500


class Helper:
    """The process, while it is there, the questions that it has not answered, and those that it has."""

    channel: Optional[socket.socket] = None

    def __init__(self) -> None:
        self.waiting: Set[bytes] = set()
        self.answered: Set[bytes] = set()

    def __del__(self) -> None:
        stop_helper(self)


def start_helper(helper: Helper) -> None:
    """In a session of its own, so that the terminal's Ctrl-C does not reach it. A fresh interpreter: a fork of the
    agent would come to hold a second copy of its memory. OSError."""
    channel, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with end:
        helper.process = subprocess.Popen(
            [sys.executable, '-I', '-S', '-c', HELPER], stdin=end, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True)
    helper.channel = channel


def stop_helper(helper: Helper) -> None:
    """It ends itself, and is left behind where it cannot."""
    if helper.channel:
        helper.channel.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            helper.process.wait(HELPER_END_SECONDS)
    helper.channel = None
    helper.waiting.clear()


def exchange(helper: Helper, questions: Set[bytes], patience: float) -> Dict[bytes, bytes]:
    """Ask what is not asked already; the answers that come in time, late ones of earlier questions among them.
    OSError where the helper is gone."""
    answers, deadline, new = {}, time.monotonic() + patience, questions - helper.waiting
    unasked = sorted(new, key=lambda question: (question in helper.answered, question))
    try:
        while True:
            helper.channel.settimeout(LONGEST_PATIENCE_SECONDS)
            while unasked and (unasked[-1] in helper.answered or len(helper.waiting) < MAX_WAITING):
                helper.channel.send(unasked[-1])
                helper.waiting.add(unasked.pop())
            helper.channel.settimeout(max(0.0, deadline - time.monotonic()) if new & helper.waiting else 0)
            question, _, said = helper.channel.recv(HELPER_ANSWER_BYTES).partition(b'\0')
            if not question:
                raise ConnectionResetError(errno.ECONNRESET, 'the helper has ended')
            helper.waiting.discard(question)
            if len(helper.answered) >= MAX_ANSWERED:
                helper.answered.clear()
            helper.answered.add(question)
            answers[question] = said
    except (BlockingIOError, socket.timeout):
        return answers


def ask_helper(helper: Helper, what: bytes, paths: Iterable[str], cycle: Cycle) -> Dict[str, bytes]:
    """By path what the helper says of it. What is missing waits: it is left alone until it has answered. A helper that
    was killed is started again at once."""
    questions = {what + os.fsencode(path): path for path in paths}
    for _ in range(2 if questions else 0):
        try:
            if helper.channel is None:
                start_helper(helper)
            answers = exchange(helper, set(questions), cycle.patience)
            if questions.keys() - helper.waiting - answers.keys():
                cycle.failed(f'{cycle.current}: helper', f'{MAX_WAITING} questions wait: others are not asked')
            return {path: answers[question] for question, path in questions.items() if question in answers}
        except OSError as error:
            stop_helper(helper)
            cycle.failed(f'{cycle.current}: helper', error.strerror or error)
    return {}


def answered(path: str, said: bytes, cycle: Cycle) -> Optional[bytes]:
    """What the helper has found; None where that is absent or, as EINVAL says of a link that is down, not now."""
    if said[:1] != b'!':
        return said[1:]
    error = int(said[1:])
    return None if error in ABSENT or error == errno.EINVAL else cycle.failed_file(path, os.strerror(error))


def ask_kernel(state: NodeState, what: bytes, questions: List[str], cycle: Cycle) -> Dict[str, bytes]:
    """What the helper says; the last answer stands until there is a new one. Empty where there is none yet."""
    answers, last = ask_helper(state.helper, what, questions, cycle), state.answers.get(cycle.current, {})
    if len(answers) < len(questions):
        cycle.failed(f'{cycle.current}: kernel', 'does not answer in time: it is as it was last')
    said = {question: answers.get(question) or last.get(question, b'') for question in questions}
    state.answers[cycle.current] = said
    return said


def read_locked(state: NodeState, paths: Sequence[str], cycle: Cycle) -> Dict[str, bytes]:
    """By path what the helper says of many files, READ_AT_ONCE a question."""
    questions = ['\n'.join(paths[start:start + READ_AT_ONCE]) for start in range(0, len(paths), READ_AT_ONCE)]
    return {path: said for question, answer in ask_kernel(state, READ_ALL, questions, cycle).items()
            if answer for path, said in zip(question.split('\n'), answer.split(b'\0'))}


# --- processes

# TASK_COMM_LEN of linux/sched.h, less the NUL.
COMM_BYTES = 15
PAGE_SIZE_BYTES = os.sysconf('SC_PAGE_SIZE')


def parse_statm(data: bytes) -> int:
    """/proc/PID/statm: the resident set, in pages. One short line: `size resident shared text lib data dt`."""
    return int(data.split(None, 2)[1])


def largest_processes(resident_bytes: Mapping[int, int], n: int) -> List[Tuple[int, int]]:
    """The n largest (pid, bytes), largest first; kernel threads and zombies, which have no memory, never."""
    rows = ((pid, size) for pid, size in resident_bytes.items() if 0 < size < BEYOND)
    return heapq.nsmallest(n, rows, key=lambda row: (-row[1], row[0]))


def collect_processes(node: wire.NodeMetrics, state: NodeState, cycle: Cycle) -> None:
    """All processes are counted, the largest named. statm is the cheapest file that has the resident set. comm is cut
    at 15 bytes; the arguments, which have the whole name, may never be read, as where they are in a mapped file of a
    server that is gone."""
    pids = [int(name) for name in cycle.names('/proc/') if name.isdecimal()]
    if pids:
        node.procs = len(pids)
    resident_bytes = {}
    for pid in pids:
        try:
            # A sixth less than by cycle.read, which says what is wrong.
            pages = parse_statm(read_small(f'{cycle.roots.procfs}/{pid}/statm'))
        except (OSError, *MALFORMED):
            pages = cycle.read(f'/proc/{pid}/statm', parse_statm, read_small) or 0
        resident_bytes[pid] = pages * PAGE_SIZE_BYTES
    rows = largest_processes(resident_bytes, state.top_n)
    comms = {pid: cycle.read(f'/proc/{pid}/comm', None, read_bytes) for pid, _ in rows}
    cut = {pid: cycle.path(f'/proc/{pid}/cmdline') for pid, comm in comms.items() if comm and len(comm) > COMM_BYTES}
    arguments = ask_helper(state.helper, READ, cut.values(), cycle)
    for pid, size in rows:
        if comms[pid] is not None:
            # comm may hold any byte but NUL: only its last line feed is the file's.
            name = comms[pid][:-1] if comms[pid].endswith(b'\n') else comms[pid]
            whole = os.path.basename(arguments.get(cut.get(pid), b'')[1:].partition(b'\0')[0])
            name = whole if whole.startswith(name) else name
            node.processes_mem_info.add(pid=pid, name=name.decode(errors='replace'), memory=size)


# --- file systems

# File systems without storage of their own, and images that are always full.
PSEUDO_FILESYSTEMS = frozenset((
    'autofs bdev binfmt_misc bpf cgroup cgroup2 configfs cpuset debugfs devpts devtmpfs ecryptfs efivarfs erofs '
    'fusectl hugetlbfs iso9660 mqueue nfsd none nsfs overlay pipefs proc pstore ramfs rootfs rpc_pipefs securityfs '
    'selinuxfs smackfs sockfs squashfs sysfs tmpfs tracefs fuse.lxcfs fuse.gvfsd-fuse fuse.portal '
    'fuse.snapfuse').split())
# Sources that have another name for the kernel. With FUSE a user chooses the source.
KERNEL_NAMED = re.compile('/dev/root|/dev/mapper/[^/]+')
READ_ONLY_OPTIONS = {'ro', 'emergency_ro', 'shutdown'}
# Where the kubelet mounts a pod's volumes: ROOT/pods/UID/volumes/PLUGIN/NAME, of CSI NAME/mount.
KUBELET_VOLUME = re.compile(r'(/.*?)/pods/([^/]+)/volumes/([^/]+)/([^/]+)(?:/mount)?')
EMPTY_DIR = 'kubernetes.io~empty-dir'
# Plugins whose volumes have only files that the kubelet writes, on a tmpfs.
SETTINGS_PLUGINS = [f'kubernetes.io~{kind}' for kind in ('secret', 'configmap', 'projected', 'downward-api')]


class Mount(NamedTuple):
    """A line of mountinfo; `root` is the directory of the file system that is seen at the mount point."""
    device_number: str
    root: str
    mountpoint: str
    read_only: bool
    fstype: str
    source: str


class Volume(NamedTuple):
    """A volume that is mounted for a pod; `root` is where the kubelet's root would be."""
    root: str
    uid: str
    plugin: str
    name: str
    usage: wire.DiskUsage


def shown_name(name: str) -> str:
    """A name in a file system need not be UTF-8."""
    return os.fsencode(name).decode(errors='backslashreplace')


def unescape(field: str) -> str:
    r"""Undo the kernel's octal escapes (\040 for a space)."""
    return re.sub(r'\\([0-3][0-7]{2})', lambda match: chr(int(match.group(1), 8)), field)


def parse_mountinfo(data: bytes) -> List[Mount]:
    """/proc/PID/mountinfo; between the options and the lone `-` is any number of optional fields. An ext4 that has met
    an error says so among the options of the file system, the last field (emergency_ro, since Linux 6.15; shutdown).

    27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
    """
    def parse_line(line: str) -> Mount:
        fields = line.split(' ')
        dash = fields.index('-', 6)
        options = {*fields[5].split(','), *fields[dash + 3].split(',')}
        return Mount(fields[2], unescape(fields[3]), unescape(fields[4]), bool(options & READ_ONLY_OPTIONS),
                     fields[dash + 1], unescape(fields[dash + 2]))

    # A mount point need not be UTF-8, and is a path.
    return parse_lines(data.decode(errors='surrogateescape'), parse_line)


def real_mounts(mounts: Iterable[Mount]) -> List[Mount]:
    """One mount for each real file system: the one that shows its own root, else the shortest mount point. On one mount
    point the last mount hides the others."""
    last = {mount.mountpoint: mount for mount in mounts}.values()
    visible = [mount for mount in last if mount.fstype not in PSEUDO_FILESYSTEMS]
    by_rank = sorted(visible, key=lambda mount: (mount.root == '/', -len(mount.mountpoint)))
    best = {file_system_key(mount): mount for mount in by_rank}
    return [mount for mount in visible if mount in best.values()]


def device_name(mount: Mount, cycle: Cycle) -> str:
    """The source of the mount, /dev/root and what is in /dev/mapper as the kernel names it."""
    if not KERNEL_NAMED.fullmatch(mount.source):
        return mount.source
    for link in (f'/sys/dev/block/{mount.device_number}', mount.source):
        with contextlib.suppress(OSError):
            return f'/dev/{os.path.basename(os.readlink(cycle.path(link)))}'
    return mount.source


def file_system_key(mount: Mount) -> str:
    """btrfs gives each subvolume a device number of its own: it is known by its block device."""
    return mount.source if mount.fstype == 'btrfs' else mount.device_number


def fill_disk_usage(message: wire.DiskUsage, space: os.statvfs_result) -> None:
    """f_bavail is what unprivileged users may still use, so that used / (used + free) is the Use% of df(1)."""
    used, free = max(0, space.f_blocks - space.f_bfree) * space.f_frsize, space.f_bavail * space.f_frsize
    fill_known(message, total=space.f_blocks * space.f_frsize, used=used, free=free,
               bytes_free=space.f_bfree * space.f_frsize,
               used_percent=100 * used / (used + free) if used + free > 0 else None,
               inodes=space.f_files or None, inodes_free=space.f_favail if space.f_files else None)


def collect_volumes(mounts: Iterable[Mount], usages: Mapping[str, wire.DiskUsage], cycle: Cycle) -> None:
    """The volumes that are mounted for pods, each with the use of its file system, and the kubelet's root. A FUSE mount
    does not show the root: any user can make one in a directory of their own."""
    for mount in {mount.mountpoint: mount for mount in mounts if '/volumes/' in mount.mountpoint}.values():
        if EMPTY_DIR in mount.mountpoint:
            cycle.mountpoints.add(cycle.path(mount.mountpoint))
        match = KUBELET_VOLUME.fullmatch(mount.mountpoint)
        if match:
            root, uid, plugin, name = map(shown_name, match.groups())
            if not mount.fstype.startswith('fuse'):
                cycle.kubelet_roots[root] += 1
            usage = usages.get(file_system_key(mount))
            if usage and plugin not in SETTINGS_PLUGINS:
                cycle.volumes.append(Volume(root, uid, plugin, name, usage))


def collect_disk_usages(node: wire.NodeMetrics, state: NodeState, cycle: Cycle) -> None:
    """The mounts of process 1 are the node's; those of the agent may be a container's or a unit's own. A path leads
    to the last mount on it: a mount that a later one hides is left out."""
    everything = (cycle.read('/proc/1/mountinfo', parse_mountinfo, read_bytes)
                  or cycle.read('/proc/self/mountinfo', parse_mountinfo, read_bytes) or [])
    devices, ours = {mount.device_number for mount in everything}, cycle.roots == Roots('/proc', '/sys', '/')
    real = real_mounts(everything)
    memory = {mount for mount in everything if mount.fstype == 'tmpfs' and EMPTY_DIR in mount.mountpoint}
    paths = {cycle.roots.rootfs.rstrip('/') + mount.mountpoint: mount for mount in (*real, *memory)}
    answers, usages = ask_helper(state.helper, STATVFS, paths, cycle), {}
    for path, mount in paths.items():
        said, stuck = answers.get(path, b''), STATVFS + os.fsencode(path) in state.helper.waiting
        # The device number and statvfs(2), or the errno alone.
        number, *numbers = map(int, said[1:].split() or [0])
        space, error = (os.statvfs_result(numbers), None) if numbers else (None, number)
        device = f'{os.major(number)}:{os.minor(number)}'
        hidden = ours and space and mount.fstype != 'btrfs' and device != mount.device_number and device in devices
        if hidden or error in ABSENT or not (said or stuck) or space and not space.f_blocks:
            continue
        device, mountpoint = shown_name(device_name(mount, cycle)), shown_name(mount.mountpoint)
        usage = wire.DiskUsage() if mount in memory else node.disk_usages.add()
        usage.device, usage.mountpoint, usage.fstype = device, mountpoint, mount.fstype
        usages[file_system_key(mount)] = usage
        if space:
            usage.read_only = mount.read_only
            fill_disk_usage(usage, space)
            continue
        reason = f'does not answer within {cycle.patience:g} s: the mount is left alone until it does'
        fill_known(usage, stuck=stuck or None, error=None if stuck else errno.errorcode.get(error, str(error)))
        cycle.failed(f'mount {mountpoint}', f'statvfs {reason if stuck else os.strerror(error)}')
    collect_volumes(everything, usages, cycle)


# --- disk I/O

# admin-guide/iostats.rst: "sectors" are always 512 bytes.
SECTOR_BYTES = 512
# Block devices whose I/O reaches another block device, though they have no slaves in sysfs: in the sum it would count
# twice.
VIRTUAL_DISK = re.compile(r'(dm-|md|drbd|bcache|zd)[\d_]')
# A path of an NVMe namespace with native multipath, nvme0c1n2 of nvme0n2.
NVME_PATH = re.compile(r'(nvme\d+)c\d+(n\d+)')
MEMORY_DISK = re.compile(r'(loop|ram|zram|sr|fd)\d')
# The fields of the proto are the columns of the file. Linux before 4.18 has the first 11 after the name.
DISK_COLUMNS = field_names(wire.DiskStats)[1:-1]
OLDEST_DISK_COLUMNS = 11
# The fields of DiskIOSummary: the column that is summed, and the size of its unit.
DISK_SUMS = (('total_read_bytes', 'read_sectors', SECTOR_BYTES), ('total_write_bytes', 'write_sectors', SECTOR_BYTES),
             ('total_read_ops', 'read_ios', 1), ('total_write_ops', 'write_ios', 1))


def parse_diskstats(text: str) -> Dict[str, Counts]:
    """/proc/diskstats by device: 14 columns, 18 since Linux 4.18, 20 since 5.5.

    254       0 vda 30704 9268 1839362 7362 6409 11563 789624 3402 0 4712 11026 3512 47 76304 219 961 41
    """
    def parse_line(line: str) -> Tuple[str, Counts]:
        major, minor, name, rest = line.split(None, 3)
        columns = parse_numbers(rest)
        if len(columns) < OLDEST_DISK_COLUMNS:
            raise ValueError
        return name, {**dict(zip(DISK_COLUMNS, columns)), 'device_number': f'{major}:{minor}'}

    return parse_lines(text, parse_line, dict)


def counted_twice(disks: Mapping[str, Counts], cycle: Cycle) -> Set[str]:
    """The disks that have others below them. Of an NVMe namespace with several paths the paths, which are hidden,
    count, and since Linux 6.4 the namespace as well."""
    stacked = {name for name in disks if VIRTUAL_DISK.match(name)
               or cycle.names(f'/sys/block/{name.replace("/", "!")}/slaves')}
    for name in disks:
        head = NVME_PATH.sub(r'\1\2', name)
        if head != name and cycle.read_int(f'/sys/block/{name}/hidden'):
            stacked.add(name if any(disks.get(head, {}).get(column) for column in DISK_COLUMNS) else head)
    return stacked


def collect_disk_io(node: wire.NodeMetrics, state: NodeState, cycle: Cycle) -> None:
    """Whole disks are those that /sys/block lists: partitions are below them there. Memory and loops are no disks."""
    disks = cycle.read('/proc/diskstats', parse_diskstats) or {}
    whole = {name.replace('!', '/') for name in cycle.names('/sys/block') if not MEMORY_DISK.match(name)}
    disks = {name: columns for name, columns in disks.items() if name in whole}
    for name, columns in disks.items():
        message = node.diskstats.add()
        fill(message, {column: columns.get(column) for column in DISK_COLUMNS})
        message.device, message.device_number = name, columns['device_number']
    stacked = counted_twice(disks, cycle)
    physical = [columns for name, columns in disks.items() if name not in stacked]
    for field, column, factor in DISK_SUMS if physical else ():
        put(node.disk_io_summary, field, factor * sum(columns[column] for columns in physical))


# --- network

# uapi/linux/if.h, in the order in which Go's net.Flags prints them.
INTERFACE_FLAGS = (('up', 0x1), ('broadcast', 0x2), ('loopback', 0x8), ('pointtopoint', 0x10), ('multicast', 0x1000))
# The node's end of a pod's interface, as the common CNI plugins name them.
POD_SIDE_INTERFACE = re.compile(r'(veth|cali|lxc|gke|eni[0-9a-f]{11}$|azv|tap|vnet)')
# The fields of the proto are the columns of the file.
NET_DEV_COLUMNS = field_names(wire.InterfaceCounters)
# By the field of NetUsage, without its total_, the column of /proc/net/dev.
NET_USAGE = {'bytes_sent': 'tx_bytes', 'bytes_received': 'rx_bytes', 'packets_sent': 'tx_packets',
             'packets_received': 'rx_packets', 'err_in': 'rx_errs', 'err_out': 'tx_errs', 'drop_in': 'rx_drop',
             'drop_out': 'tx_drop', 'fifo_err_in': 'rx_fifo', 'fifo_err_out': 'tx_fifo'}
# Of a link that is not a pod's.
LOCKED_FILES = ('carrier', 'speed')
# ethtool.h: speeds that mean "not known"; virtual links may say -1.
UNKNOWN_SPEEDS = (0, 2**16 - 1, 2**32 - 1)


class Link:
    """What seldom changes of the node's end of a pod's interface, the packets counted by then, and when to read it
    again."""

    message: Optional[wire.InterfaceStat] = None
    packets = 0
    due = 0.0


def same_network(process: str, other: str) -> Optional[bool]:
    """Whether two processes are in one network namespace; None where that cannot be told. Reading ns/net takes the
    right to trace them, which AppArmor denies to a container; without it the inode of net/dev tells, which each
    namespace has for itself, whichever procfs it is seen through."""
    try:
        return os.readlink(f'{process}/ns/net') == os.readlink(f'{other}/ns/net')
    except OSError:
        pass
    try:
        return os.stat(f'{process}/net/dev').st_ino == os.stat(f'{other}/net/dev').st_ino
    except OSError:
        return None


def net_path(file: str, cycle: Cycle) -> str:
    """/proc/net is the reader's network namespace; in another procfs, the node's is that of process 1."""
    path = f'/proc/1/net/{file}'
    return path if cycle.roots.procfs != '/proc' and os.path.lexists(cycle.path(path)) else f'/proc/net/{file}'


def parse_net_dev(text: str) -> Dict[str, Counts]:
    """/proc/net/dev by interface, below two lines of headings; old kernels have no space after the colon.

    eth0: 1111 12 0 0 0 0 0 0 2222 22 0 0 0 0 0 0
    """
    def parse_line(line: str) -> Tuple[str, Counts]:
        name, columns = line.split(':', 1)
        numbers = parse_numbers(columns)
        if len(numbers) < len(NET_DEV_COLUMNS):
            raise ValueError
        # A name may have what Python calls white space and the kernel does not.
        return name.strip(' '), dict(zip(NET_DEV_COLUMNS, numbers))

    return parse_lines(text.split('\n', 2)[-1] if text.startswith('Inter-|') else text, parse_line, dict)


def collect_link(interface: wire.InterfaceStat, cycle: Cycle) -> None:
    """What seldom changes. lo and tunnels have a hardware address of zeros, which is none."""
    directory = f'/sys/class/net/{interface.name}'
    address = cycle.read_line(f'{directory}/address')
    index, mtu, flags = (cycle.read_int(f'{directory}/{file}') for file in ('ifindex', 'mtu', 'flags'))
    fill_known(interface, index=index, mtu=mtu, hardwareAddr=address if address and address.strip('0:') else None)
    interface.flags.extend(name for name, bit in INTERFACE_FLAGS if (flags or 0) & bit)


def collect_pod_side(name: str, packets: int, link: Link, cycle: Cycle) -> wire.InterfaceStat:
    """The node's end of a pod's interface, of which there may be hundreds: read once a minute, and when it counts anew,
    because then it is another pod's."""
    if cycle.now >= link.due or packets < link.packets:
        link.message, failed_before = wire.InterfaceStat(name=name), cycle.failed_reads
        collect_link(link.message, cycle)
        # At first after a random share of that time, so that not everything falls due in one cycle.
        seconds = SELDOM_SECONDS * (1 if link.due else random.random())
        link.due = cycle.now + seconds if cycle.failed_reads == failed_before else 0.0
    link.packets = packets
    return link.message


def answered_int(path: str, said: bytes, cycle: Cycle) -> Optional[int]:
    text = (answered(path, said, cycle) or b'').decode(errors='replace').strip()
    return cycle.parsed(path, text, parse_number) if text else None


def collect_network(node: wire.NodeMetrics, state: NodeState, cycle: Cycle) -> None:
    """Carrier and speed take the lock of the network."""
    counters = cycle.read(net_path('dev', cycle), parse_net_dev) or {}
    locked = [cycle.path(f'/sys/class/net/{name}/{file}') for name in counters if not POD_SIDE_INTERFACE.match(name)
              for file in LOCKED_FILES]
    said = read_locked(state, locked, cycle)
    for name in state.links.keys() - counters.keys():
        del state.links[name]
    for name, columns in counters.items():
        interface = node.network_interfaces.add()
        if POD_SIDE_INTERFACE.match(name):
            link, packets = state.links.setdefault(name, Link()), columns['rx_packets'] + columns['tx_packets']
            interface.CopyFrom(collect_pod_side(name, packets, link, cycle))
            continue
        interface.name = name
        collect_link(interface, cycle)
        carrier, speed = (answered_int(path, said.get(path, b''), cycle) for path in (
            cycle.path(f'/sys/class/net/{name}/{file}') for file in LOCKED_FILES))
        fill_known(interface, rx_nohandler=cycle.read_int(f'/sys/class/net/{name}/statistics/rx_nohandler'),
                   operstate=cycle.read_line(f'/sys/class/net/{name}/operstate'),
                   carrier=None if carrier is None else bool(carrier),
                   speed_mbits=None if speed in UNKNOWN_SPEEDS else speed)
        fill(interface.counters, columns)
    if counters:
        fill(node.net_usage, {f'total_{field}': sum(columns[column] for columns in counters.values())
                              for field, column in NET_USAGE.items()})


# --- addresses

# uapi/linux/netlink.h, rtnetlink.h, if_addr.h
NLM_F_REQUEST, NLM_F_DUMP = 0x1, 0x300
RTM_NEWADDR, RTM_GETADDR = 20, 22
IFA_ADDRESS, IFA_LOCAL = 1, 2
RT_SCOPE_UNIVERSE = 0
NLMSGHDR = struct.Struct('=IHHII')    # length, type, flags, sequence, port
IFADDRMSG = struct.Struct('=BBBBI')   # family, prefix length, flags, scope, interface index
RTATTR = struct.Struct('=HH')         # length, type
# uapi/linux/route.h
RTF_UP, RTF_REJECT = 0x1, 0x200
ADDRESSES_SECONDS = 15
# RFC 5737, for documentation: what is sent there takes the default route. RFC 863.
FAR_AWAY, DISCARD_PORT = '192.0.2.1', 9


class Address(NamedTuple):
    """One address of the interface with this index: family AF_INET or AF_INET6, scope as RT_SCOPE_*."""
    index: int
    family: int
    address: str
    prefix_length: int
    scope: int


class Route(NamedTuple):
    """An entry of a routing table: the interface, and whether it is a usable default route."""
    interface: str
    metric: int
    is_default: bool


def netlink_parts(data: bytes, header: struct.Struct) -> Iterable[Tuple[int, bytes]]:
    """(type, payload) of each message, or attribute: both begin with their length and are padded to 4 bytes."""
    offset = 0
    while offset + header.size <= len(data):
        length, kind = header.unpack_from(data, offset)[:2]
        if length < header.size or offset + length > len(data):
            raise ValueError(f'rtnetlink: malformed length {length} at byte {offset} of {len(data)}')
        yield kind, data[offset + header.size:offset + length]
        offset += (length + 3) // 4 * 4


def ask_addresses(state: NodeState, cycle: Cycle) -> bytes:
    """The kernel's dump of all interface addresses: they are in no file. Empty for the tree of another machine, whose
    network the agent's own sockets do not see."""
    procfs = cycle.roots.procfs
    if procfs != '/proc' and not same_network(f'{procfs}/1', '/proc/self'):
        return b''
    header = NLMSGHDR.pack(NLMSGHDR.size + IFADDRMSG.size, RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP, 1, 0)
    request = (header + IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0)).hex()
    packed = answered('rtnetlink', ask_kernel(state, NETLINK, [request], cycle)[request], cycle)
    return zlib.decompress(packed) if packed else b''


def parse_addresses(data: bytes) -> List[Address]:
    """A dump of RTM_NEWADDR messages. IFA_LOCAL is the interface's own address; IFA_ADDRESS may be the peer's."""
    found = []
    for kind, message in netlink_parts(data, NLMSGHDR):
        if kind != RTM_NEWADDR:
            continue
        if len(message) < IFADDRMSG.size:
            raise ValueError(f'rtnetlink: malformed address message: {message.hex()}')
        family, prefix_length, _, scope, index = IFADDRMSG.unpack_from(message)
        attributes = dict(netlink_parts(message[IFADDRMSG.size:], RTATTR))
        packed = attributes.get(IFA_LOCAL) or attributes.get(IFA_ADDRESS)
        if packed and len(packed) == {socket.AF_INET: 4, socket.AF_INET6: 16}.get(family):
            found.append(Address(index, family, socket.inet_ntop(family, packed), prefix_length, scope))
    return found


def is_default(destination: str, mask: str, flags: str) -> bool:
    """Whether an entry, in hexadecimal, is a usable default route."""
    return int(destination, 16) == int(mask, 16) == 0 and int(flags, 16) & (RTF_UP | RTF_REJECT) == RTF_UP


def parse_route(text: str) -> List[Route]:
    """/proc/net/route, IPv4, below a heading: `Iface Destination Gateway Flags RefCnt Use Metric Mask ...`, hex but for
    the metric."""
    def parse_line(line: str) -> Route:
        interface, destination, _, flags, _, _, metric, mask = line.split('\t')[:8]
        return Route(interface, parse_number(metric), is_default(destination, mask, flags))

    return parse_lines(text.partition('\n')[2], parse_line)


def parse_ipv6_route(text: str) -> List[Route]:
    """/proc/net/ipv6_route: `destination/prefix source/prefix next-hop metric refcount use flags interface`, hex."""
    def parse_line(line: str) -> Route:
        destination, prefix, _, _, _, metric, _, _, flags, interface = filter(None, line.split(' '))
        return Route(interface, int(metric, 16), is_default(destination, prefix, flags))

    return parse_lines(text, parse_line)


def preferred_source(address: str) -> str:
    """The address from which the kernel would send there, IPv4: a route may name one (src). Nothing is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as probe:
        probe.connect((address, DISCARD_PORT))
        return probe.getsockname()[0]
    return ''


def primary_address(addresses: Iterable[Address], routes: Iterable[Route], indexes: Counts,
                    family: int, preferred: str = '') -> Optional[str]:
    """The preferred address, else the first one, of global scope on the interface of the default route with the lowest
    metric."""
    default = min((route for route in routes if route.is_default), key=lambda route: route.metric, default=None)
    wanted = (indexes.get(default.interface) if default else None, family, RT_SCOPE_UNIVERSE)
    found = [address.address for address in addresses if (address.index, address.family, address.scope) == wanted]
    return preferred if preferred in found else found[0] if found else None


def collect_addresses(node: wire.NodeMetrics, state: NodeState, cycle: Cycle) -> None:
    """The addresses of the interfaces that the message has already. Asked again when an interface has come or gone,
    and now and then."""
    names, addresses = [interface.name for interface in node.network_interfaces], state.addresses
    if names != state.addressed or cycle.now >= state.addresses_due:
        addresses = state.addresses = parse_addresses(ask_addresses(state, cycle))
        state.addressed, state.addresses_due = names, cycle.now + ADDRESSES_SECONDS if addresses else 0.0
    interfaces = {interface.index: interface for interface in node.network_interfaces if interface.HasField('index')}
    for address in addresses:
        if address.index in interfaces:
            interfaces[address.index].addrs.append(f'{address.address}/{address.prefix_length}')
    indexes = {interface.name: index for index, interface in interfaces.items()}
    for family, field, file, parse in ((socket.AF_INET, node.primary_ipv4, 'route', parse_route),
                                       (socket.AF_INET6, node.primary_ipv6, 'ipv6_route', parse_ipv6_route)):
        routes = cycle.read(net_path(file, cycle), parse) or []
        preferred = preferred_source(FAR_AWAY) if addresses and family == socket.AF_INET else ''
        address = primary_address(addresses, routes, indexes, family, preferred)
        if address:
            field.value = address


# --- hardware

# Below /sys, by the documents of sysfs: hwmon/sysfs-interface.rst, ABI/*/sysfs-class-thermal, sysfs-class-power,
# sysfs-devices-edac, sysfs-devices-system-cpu, admin-guide/md.rst, networking/bonding.rst. Each directory is a device.
DEVICE_FILES = (
    'class/hwmon/hwmon*/name', *(f'class/hwmon/hwmon*/{kind}[0-9]*_{what}' for kind in (
        'temp', 'fan', 'in', 'curr', 'power', 'energy', 'humidity') for what in (
        'input', 'average', 'label', 'min', 'max', 'crit', 'crit_hyst', 'alarm', 'crit_alarm')),
    'class/thermal/thermal_zone*/type', 'class/thermal/thermal_zone*/temp', 'class/thermal/cooling_device*/type',
    'class/thermal/cooling_device*/*_state', 'class/power_supply/*/type', 'class/power_supply/*/online',
    'class/power_supply/*/capacity', 'class/power_supply/*/*_now',
    'devices/system/edac/mc/mc*/[cu]e_*count', 'devices/system/edac/mc/mc*/csrow*/[cu]e_count',
    'block/md*/md/raid_disks', 'block/md*/md/array_state', 'block/md*/md/dev-*/state',
    'class/net/*/bonding/slaves', 'class/net/*/lower_*/bonding_slave/mii_status',
    'class/dmi/id/*_date', 'class/dmi/id/*_name', 'class/dmi/id/*_vendor', 'class/dmi/id/*_version',
    'class/dmi/id/*_family', 'devices/system/cpu/cpu*/thermal_throttle/*_throttle_count',
    'devices/system/cpu/cpu*/cpufreq/scaling_*_freq', 'devices/system/cpu/cpu*/cpufreq/cpuinfo_m??_freq')
# What is read in each cycle; the rest, once a minute.
VARYING_FILE = re.compile(r'.*(_input|_average|_alarm|/temp|/cur_state|/online|/capacity|_now|_count|_cur_freq|/state'
                          r'|array_state|mii_status)')
# What is a text also where it has digits alone: a label, and what a manufacturer writes.
TEXT_FILE = re.compile(r'.*(_label|/dmi/id/\w+)')
# Those of 250 CPUs, and some.
MAX_DEVICE_FILES = 2000


def collect_hardware(node: wire.NodeMetrics, state: NodeState, cycle: Cycle) -> None:
    """Some sensors take long to answer, and some fail for ever: a file that does is absent."""
    everything = cycle.now >= state.hardware_due
    if everything:
        state.hardware_due = cycle.now + SELDOM_SECONDS
        paths = itertools.chain(*(sorted(glob.glob(cycle.path(f'/sys/{pattern}'))) for pattern in DEVICE_FILES))
        state.hardware = {path: state.hardware.get(path, b'') for path in itertools.islice(paths, MAX_DEVICE_FILES)}
    asked = [path for path in state.hardware if everything or VARYING_FILE.fullmatch(path)]
    state.hardware.update(read_locked(state, asked, cycle))
    if everything:
        links = [f'{os.path.dirname(path)}/device' for path in asked if path.endswith('/name') and '/hwmon/' in path]
        state.hardware.update((link, b'=' + os.fsencode('/'.join(os.path.realpath(link).split('/')[-2:])))
                              for link in links if os.path.lexists(link))
    devices: Dict[str, wire.SysfsDevice] = {}
    for path, said in state.hardware.items():
        directory, file = os.path.split(path[len(cycle.roots.sysfs) + 1:])
        text = said[1:].decode(errors='replace').strip()[:MAX_TEXT]
        if said[:1] == b'=' and text:
            device = devices.get(directory) or devices.setdefault(directory, node.devices.add(path=directory))
            if re.fullmatch(r'-?[0-9]{1,18}', text) and not TEXT_FILE.fullmatch(path):
                device.numbers[file] = int(text)
            else:
                device.texts[file] = text


# --- network protocols

# Of netstat's 150 names, those of TcpExt and IpExt that tell of trouble or of load.
NETSTAT = re.compile(r'TcpExt_(Listen\w+|Syncookies\w+|TCPSynRetrans|TCPTimeouts|TCPOFOQueue|TCPRcvQDrop|TCPAbort\w+)'
                     r'|IpExt_(In|Out)Octets')


def parse_snmp(text: str) -> Counts:
    """/proc/net/snmp and netstat: for each protocol a line of names and one of numbers; `Tcp: RetransSegs` as
    Tcp_RetransSegs. -1 means that there is no limit (Tcp_MaxConn), and is left out.

    Udp: InDatagrams NoPorts InErrors
    Udp: 12 3 0
    """
    headings: Dict[str, List[str]] = {}
    values: Counts = {}

    def parse_line(line: str) -> None:
        protocol, *words = line.split()
        names = headings.pop(protocol, None)
        if names is None:
            headings[protocol] = words
        elif len(names) != len(words):
            raise ValueError
        else:
            values.update({f'{protocol[:-1]}_{name}': parse_number(number)
                           for name, number in zip(names, words) if number != '-1'})

    return parse_lines(text, parse_line, lambda rows: values)


def parse_sockstat(text: str) -> Counts:
    """/proc/net/sockstat and sockstat6, `TCP: inuse 3 mem 4` as TCP_inuse and TCP_mem, and TCP_mem_bytes: mem is in
    pages."""
    values: Counts = {}

    def parse_line(line: str) -> None:
        protocol, *pairs = line.split()
        numbers = {f'{protocol[:-1]}_{name}': parse_number(number) for name, number in zip(pairs[::2], pairs[1::2])}
        pages = numbers.get(f'{protocol[:-1]}_mem')
        values.update(numbers if pages is None else {**numbers, f'{protocol[:-1]}_mem_bytes': pages * PAGE_SIZE_BYTES})

    return parse_lines(text, parse_line, lambda rows: values)


# The columns of softnet_stat; - for those that are always 0 or that nobody asks for. Old kernels have the first ones.
SOFTNET_COLUMNS = ('processed dropped time_squeeze - - - - - - received_rps flow_limit_count backlog_len cpu').split()


def parse_softnet_stat(text: str) -> List[Counts]:
    """/proc/net/softnet_stat: a line per CPU, hexadecimal."""
    def parse_line(line: str) -> Counts:
        numbers = [int(word, 16) for word in line.split()]
        if len(numbers) < 3:
            raise ValueError
        return dict(zip(SOFTNET_COLUMNS, numbers))

    # Before Linux 5.10 the lines are those of the online CPUs, in order.
    return parse_lines(text, parse_line, lambda rows: [{'cpu': cpu, **row} for cpu, row in enumerate(rows)])


def parse_arp(text: str) -> Counts:
    """/proc/net/arp, below a heading: entries by interface, which is the last word."""
    return parse_lines(text.partition('\n')[2], lambda line: line.split()[5], collections.Counter)


# include/net/tcp_states.h, from 1 on, as node_exporter calls them.
TCP_STATES = ('established syn_sent syn_recv fin_wait1 fin_wait2 time_wait close close_wait last_ack listen closing '
              'new_syn_recv').split()


def parse_tcp(text: str) -> Counts:
    """/proc/net/tcp and tcp6, below a heading: sockets by state, the fourth word, in hexadecimal."""
    return parse_lines(text.partition('\n')[2], lambda line: TCP_STATES[int(line.split(None, 4)[3], 16) - 1],
                       collections.Counter)


def parse_udp(text: str) -> Counts:
    """/proc/net/udp and udp6, below a heading: the sums of `tx_queue:rx_queue`, the fifth word, in hexadecimal."""
    def parse_line(line: str) -> List[int]:
        sent, received = line.split(None, 5)[4].split(':')
        return [int(sent, 16), int(received, 16)]

    return parse_lines(text.partition('\n')[2], parse_line,
                       lambda rows: dict(zip(('tx', 'rx'), map(sum, zip([0, 0], *rows)))))


def parse_nfs(text: str) -> Counts:
    """/proc/net/rpc/nfs: the lines `net` and `rpc`."""
    names = {'net': ('net_packets', 'net_udp', 'net_tcp', 'net_connections'),
             'rpc': ('rpc_calls', 'rpc_retrans', 'rpc_authrefrsh')}
    values: Counts = {}

    def parse_line(line: str) -> None:
        kind, *numbers = line.split()
        values.update(dict(zip(names.get(kind, ()), map(parse_number, numbers))))

    return parse_lines(text, parse_line, lambda rows: values)


SOCKETS_BYTES = 1 << 20
# By the map of NodeMetrics that has the name of the file, what parses it.
PROTOCOL_FILES = {'snmp': parse_snmp, 'snmp6': parse_flat_keyed, 'netstat': parse_snmp, 'sockstat': parse_sockstat,
                  'sockstat6': parse_sockstat}


def collect_sockets(node: wire.NodeMetrics, cycle: Cycle) -> None:
    """The kernel goes through a table of all sockets for it: seldom."""
    read = functools.partial(read_bytes, limit=SOCKETS_BYTES)
    states: Counts = collections.Counter()
    for suffix, version in (('', 'v4'), ('6', 'v6')):
        tcp, udp = (cycle.read(net_path(file + suffix, cycle), lambda data, parse=parse: parse(data.decode()), read)
                    for file, parse in (('tcp', parse_tcp), ('udp', parse_udp)))
        states.update(tcp or {})
        fill_map(node.udp_queues, {f'{queue}_{version}': size for queue, size in (udp or {}).items()})
    fill_map(node.tcp_states, states)


def collect_protocols(node: wire.NodeMetrics, state: NodeState, cycle: Cycle) -> None:
    for file, parse in PROTOCOL_FILES.items():
        values = cycle.read(net_path(file, cycle), parse) or {}
        if file == 'snmp6':
            # Udp6InDatagrams as Udp6_InDatagrams.
            values = {name.replace('6', '6_', 1): value for name, value in values.items()}
        fill_map(getattr(node, file), {name: value for name, value in values.items()
                                       if file != 'netstat' or NETSTAT.fullmatch(name)})
    fill_list(node.softnet_stat, cycle.read(net_path('softnet_stat', cycle), parse_softnet_stat) or (), fill)
    fill_map(node.arp_entries, cycle.read(net_path('arp', cycle), parse_arp) or {})
    fill_map(node.nfs, cycle.read(net_path('rpc/nfs', cycle), parse_nfs) or {})
    if cycle.now >= state.sockets_due:
        state.sockets_due, state.sockets = cycle.now + LIMITS_SECONDS, wire.NodeMetrics()
        collect_sockets(state.sockets, cycle)
    node.MergeFrom(state.sockets)


# --- clock

# uapi/linux/timex.h: struct timex on the 64-bit architectures; the whole of it has 208 bytes.
TIMEX = struct.Struct('@Iqqqqiqqqqqqqqiqqqqqi')
TIMEX_NAMES = ('modes offset freq maxerror esterror status constant precision tolerance seconds useconds tick ppsfreq '
               'jitter shift stabil jitcnt calcnt errcnt stbcnt tai').split()
TIMEX_BYTES = 208
STA_UNSYNC, STA_NANO = 0x0040, 0x2000


@functools.lru_cache(maxsize=None)
def libc() -> ctypes.CDLL:
    """For the few functions of the C library that the standard library lacks; AttributeError where it lacks one too."""
    return ctypes.CDLL(None)


def read_timex() -> Optional[bytes]:
    """adjtimex(2) with nothing to adjust."""
    timex = ctypes.create_string_buffer(TIMEX_BYTES)
    try:
        return timex.raw if libc().adjtimex(timex) >= 0 else None
    except AttributeError:
        return None


def parse_timex(timex: bytes) -> Dict[str, float]:
    """The offset is in ns where the status says so, else in µs; the error in µs."""
    said = dict(zip(TIMEX_NAMES, TIMEX.unpack_from(timex)))
    return {**said, 'synchronized': not said['status'] & STA_UNSYNC, 'max_error_seconds': said['maxerror'] / 1e6,
            'offset_seconds': said['offset'] / (1e9 if said['status'] & STA_NANO else 1e6)}


def collect_clock(node: wire.NodeMetrics, state: NodeState, cycle: Cycle) -> None:
    """All containers of a machine have its clock; another machine's tree has none."""
    timex = read_timex() if cycle.reads_this_machine() else None
    if timex:
        for name, value in parse_timex(timex).items():
            # Some of them may be below 0.
            if name in field_names(wire.ClockMetrics):
                setattr(node.clock, name, value)


# --- operating system

# The names of platforms and families are those of gopsutil, which the Go agent uses. A family, and its platforms; one
# not listed has none.
PLATFORM_FAMILIES = {
    'debian': 'debian ubuntu raspbian linuxmint',
    'rhel': 'redhat oracle centos amazon rocky almalinux scientific cloudlinux',
    'suse': 'suse opensuse opensuse-leap opensuse-tumbleweed sles sled',
    'fedora': 'fedora', 'arch': 'arch', 'alpine': 'alpine', 'gentoo': 'gentoo', 'coreos': 'coreos',
}
# By file below /etc the platform, the first word of the file where there is none here: the first that has content tells
# it, before os-release does.
RELEASE_FILES = {'oracle-release': 'oracle', 'debian_version': 'debian', 'redhat-release': None, 'system-release': None,
                 'gentoo-release': 'gentoo', 'alpine-release': 'alpine'}
# Distributions that have Debian's debian_version: DISTRIB_ID of lsb-release.
DEBIAN_DERIVED = {'Ubuntu': 'ubuntu', 'LinuxMint': 'linuxmint'}
# `Amazon Linux release 2023.6.20241031 (Amazon Linux)`
RELEASE_VERSION = re.compile(r'release (\w[\d.]*)', re.ASCII)
HOST_IDS = ('/sys/class/dmi/id/product_uuid', '/etc/machine-id', BOOT_ID)
UUID = re.compile(r'([0-9a-f]{8})-?([0-9a-f]{4})-?([0-9a-f]{4})-?([0-9a-f]{4})-?([0-9a-f]{12})')
# So many of the 31 steps from digit to digit of a placeholder are 0 or 1; of a random UUID four are.
PLACEHOLDER_STEPS = 24


def parse_os_release(text: str) -> Dict[str, str]:
    """os-release(5): shell assignments, at most quoted.

    PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"
    """
    values = {}
    for line in map(str.strip, text.split('\n')):
        key, equals, value = line.partition('=')
        if equals and not line.startswith('#'):
            quoted = value[:1] in ('"', "'") and value[-1:] == value[:1]
            values[key] = re.sub(r'\\(.)', r'\1', value[1:-1] if quoted else value)
    return values


def parse_uptime(text: str) -> int:
    """/proc/uptime: seconds since boot, and the idle seconds of all CPUs: `350735.47 234388.90`."""
    return int(parse_number(text.split()[0], float))


def parse_uuid(text: str) -> Optional[str]:
    """A UUID as 8-4-4-4-12, from product_uuid, machine-id (which has no dashes) or boot_id; None for a word (`Not
    Settable`, `uninitialized`), and for what a board's maker left in its place: one digit, a sequence, or bytes that
    count (03000200-0400-0500-0006-000700080009)."""
    match = UUID.fullmatch(text.lower())
    if match is None:
        return None
    digits = [int(digit, 16) for digit in ''.join(match.groups())]
    steps = sum((after - before) % 16 in (0, 1) for before, after in zip(digits, digits[1:]))
    return '-'.join(match.groups()) if steps < PLACEHOLDER_STEPS and any(digits[::2]) else None


def platform(files: Mapping[str, str], release: Mapping[str, str], lsb: Mapping[str, str]) -> Tuple[str, str]:
    """Platform and version, from the contents of RELEASE_FILES, from os-release and lsb-release."""
    name = next(filter(files.get, RELEASE_FILES), None)
    if name == 'debian_version' and lsb.get('DISTRIB_ID') in DEBIAN_DERIVED:
        return DEBIAN_DERIVED[lsb['DISTRIB_ID']], lsb.get('DISTRIB_RELEASE', '')
    if name is None:
        return release.get('ID', '').replace('amzn', 'amazon'), release.get('VERSION_ID', '')
    words = files[name].lower()
    version = RELEASE_VERSION.search(words)
    first = 'redhat' if 'red hat' in words else words.split(' ')[0]
    return RELEASE_FILES[name] or first, version.group(1) if version else files[name]


def collect_system(node: wire.NodeMetrics, state: NodeState, cycle: Cycle) -> None:
    """What does not change while the agent lives is read until it is known. The host id stays when the host is renamed:
    the machine's, else the installation's, else at least this boot's. /proc/sys/kernel/arch came with Linux 6.1;
    before, uname(2) tells, unless the tree is another machine's."""
    identity = state.identity
    if not identity.platform:
        files = {name: cycle.read_line(f'/etc/{name}') for name in RELEASE_FILES}
        release, lsb = (cycle.read(path, parse_os_release) or {} for path in ('/etc/os-release', '/etc/lsb-release'))
        release = release or cycle.read('/usr/lib/os-release', parse_os_release) or {}
        name, version = platform(files, release, lsb)
        if name == 'debian' and os.path.exists(cycle.path('/usr/bin/raspi-config')):
            name = 'raspbian'
        family = next((family for family, names in PLATFORM_FAMILIES.items() if name in names.split()), None)
        identity.os_release.update({key: value[:MAX_TEXT] for key, value in release.items()})
        fill_known(identity, platform=name or None, platform_family=family, platform_version=version or None)
    if not identity.host_id:
        ids = (cycle.read_line(path, parse_uuid) for path in HOST_IDS)
        fill_known(identity, host_id=next(filter(None, ids), None))
    if not identity.kernel_version:
        fill_known(identity, kernel_version=cycle.read_line('/proc/sys/kernel/osrelease'),
                   kernel_build=cycle.read_line('/proc/sys/kernel/version'),
                   domainname=cycle.read_line('/proc/sys/kernel/domainname'))
    if not identity.kernel_arch:
        fill_known(identity, kernel_arch=cycle.read_line('/proc/sys/kernel/arch')
                   or (os.uname().machine if cycle.reads_this_machine() else None))
    fill_known(identity, os='linux', hostname=cycle.read_line('/proc/sys/kernel/hostname'))
    node.MergeFrom(identity)
    fill_known(node, uptime=cycle.read_line('/proc/uptime', parse_uptime))


# --- cgroup files

# cgroup v1 says "no limit" with the largest multiple of a page below 2**63.
V1_NO_LIMIT_BYTES = 2**63 - 65536
# When a file is read. MARKER: in each cycle. While no marker changes, no process of the group has run, waited or done
# I/O, and nobody has taken memory from it. USUAL: when a marker has changed. LIMIT: once in LIMITS_SECONDS, with all
# others.
MARKER, USUAL, LIMIT = range(3)
LIMITS_SECONDS = 15


class CgroupTree(NamedTuple):
    """Where the node's cgroups are: by controller the directory; on v2 one for all of them, under ''."""
    version: int
    directories: Dict[str, str]

    @property
    def top(self) -> str:
        """The hierarchy in which groups are looked for."""
        return self.directories['' if self.version == 2 else 'memory']

    def file_path(self, group: str, name: str) -> str:
        """A file of a group; a controller that this node lacks has no files."""
        controller, _, name = name.rpartition('/')
        return f'{self.directories.get(controller, "no such controller")}/{group}/{name}'


class GroupFile(NamedTuple):
    """A file of a group: its name, on v1 with its controller before it; what parses its text; when it is read."""
    name: str
    parse: Callable[[str], Any]
    when: int


class Group:
    """A cgroup that is read in each cycle: its open files, when all of them are due and when it was read (monotonic
    clock), whether it had changed then, also in what counts OOM kills, and on v1 what was in its files. Of what each
    file said it keeps a hash: the texts of 440 groups take 1.2 MB."""

    due = 0.0
    clock_ns = 0
    changed = killed = False
    # How many devices there are.
    devices = 0

    def __init__(self, path: str):
        self.path = path
        self.files = OpenFiles(0)
        # None of a file that was not understood.
        self.hashes: List[Optional[int]] = []
        self.v1_files: Dict[str, Any] = {}


def read_cgroup_tree(sysfs: str) -> Optional[CgroupTree]:
    """v2 has cgroup.controllers at its root. A hybrid system has it elsewhere, and the controllers are those of v1."""
    root = f'{sysfs}/fs/cgroup'
    if os.path.lexists(f'{root}/cgroup.controllers'):
        return CgroupTree(2, {'': root})
    names = sorted(os.listdir(root) if os.path.isdir(root) else (), key=len, reverse=True)
    directories = {controller: f'{root}/{name}' for name in names for controller in name.split(',')}
    return CgroupTree(1, directories) if 'memory' in directories else None


def parse_single(text: str) -> Optional[int]:
    """A file of one number; `max`, v2's word for no limit, is None."""
    return None if text == 'max\n' else parse_number(text)


def parse_procs(text: str) -> int:
    """cgroup.procs: how many process IDs, one a line."""
    return len(list(map(parse_number, text.split())))


def parse_cpu_max(text: str) -> Optional[Counts]:
    """cpu.max: quota and period in µs: `10000 100000`; None for `max 100000`, which is no limit."""
    quota, period = text.split()
    return None if quota == 'max' else {'quota_usec': parse_number(quota), 'period_usec': parse_number(period)}


def parse_memory_stat(text: str, names: Sequence[str]) -> Counts:
    """memory.stat, flat keyed: of its 60 lines only those of these names, in half the time that all of them take."""
    values, lines, end, malformed = {}, f'\n{text}\n', 0, None
    for name in names:
        # In the order in which the kernel writes them each search begins where the last one ended.
        start = lines.find(f'\n{name} ', end)
        start = lines.find(f'\n{name} ') if start < 0 else start
        if start >= 0:
            end = lines.find('\n', start + 1)
            number = lines[start + len(name) + 2:end]
            if number.isdigit():
                values[name] = int(number)
            else:
                malformed = lines[start + 1:end]
    if malformed or text and not values:
        raise Malformed(malformed or text, values)
    return values


def parse_io_stat(text: str) -> Dict[str, Counts]:
    """io.stat: lines of `DEVICE NAME=VALUE NAME=VALUE`. io.cost and io.latency add values of their own, of which some
    are no whole numbers. Before Linux 5.16 devices without statistics are before the next device in its line. Some
    have no name, as QEMU's floppy disk.

    254:0 rbytes=629145600 wbytes=629145600 rios=688 wios=903 dbytes=0 dios=0
    """
    def parse_line(line: str) -> Tuple[str, Counts]:
        head, _, rest = line.partition('=')
        *devices, first = head.split(' ')
        pairs = [pair.split('=') for pair in f'{first}={rest}'.split()] if rest else []
        device = (devices or [first])[-1]
        if device == '(unknown)':
            return device, {}
        if ':' not in device:
            raise ValueError
        return device, {name: int(number) for name, number in pairs if name in IO_NAMES}

    return parse_lines(text, parse_line, lambda rows: {device: counts for device, counts in rows if counts})


# Under CRI-O crun has a container's processes one level below, in `container`. Its throttling and its limit of swap are
# right there alone; all else is what the outer group says, for a container can make such a group itself.
CRIO_CGROUP = re.compile(r'/crio-[0-9a-f]{64}\.scope$')
THROTTLING = ('nr_periods', 'nr_throttled', 'throttled_usec')
IO_NAMES = frozenset(('rbytes', 'wbytes', 'rios', 'wios'))


def parse_blkio(text: str) -> Dict[str, Counts]:
    """v1's blkio.throttle.io_service_bytes and io_serviced: `254:0 Read 1048576` and so on, and a `Total 1056768`."""
    devices: Dict[str, Counts] = collections.defaultdict(dict)

    def parse_line(line: str) -> None:
        *device, operation, number = line.split()
        if device:
            devices[device[0]][operation] = parse_number(number)

    return parse_lines(text, parse_line, lambda rows: dict(devices))


# v1's names for the fields of memory.stat; those with total_ include the groups below. swap is memory.swap.current.
MEMORY_STAT_V1 = {'total_swap': 'swap', 'total_cache': 'file', 'total_rss': 'anon', 'total_shmem': 'shmem',
                  'total_mapped_file': 'file_mapped', 'total_pgfault': 'pgfault', 'total_pgmajfault': 'pgmajfault',
                  'total_inactive_file': 'inactive_file', 'total_active_file': 'active_file'}
# By version, sorted by when they are read.
GROUP_FILES = {version: [GroupFile(*file) for file in files] for version, files in {2: (
    ('cpu.stat', parse_flat_keyed, MARKER),
    ('cpu.pressure', parse_pressure, MARKER),
    ('memory.current', parse_single, MARKER),
    ('memory.pressure', parse_pressure, MARKER),
    ('io.stat', parse_io_stat, MARKER),
    ('io.pressure', parse_pressure, MARKER),
    ('memory.peak', parse_single, USUAL),
    ('memory.swap.current', parse_single, USUAL),
    ('memory.stat', functools.partial(parse_memory_stat, names=field_names(wire.CgroupMemoryStat)), USUAL),
    ('memory.events', parse_flat_keyed, USUAL),
    ('pids.current', parse_single, USUAL),
    ('cpu.max', parse_cpu_max, LIMIT),
    ('cpu.weight', parse_single, LIMIT),
    ('memory.max', parse_single, LIMIT),
    ('memory.high', parse_single, LIMIT),
    ('memory.swap.max', parse_single, LIMIT),
    ('pids.max', parse_single, LIMIT),
    ('cgroup.procs', parse_procs, LIMIT),
), 1: (
    ('cpuacct/cpuacct.usage', parse_single, MARKER),
    ('memory/memory.usage_in_bytes', parse_single, MARKER),
    # blkio counts what passes the throttling layer, in files _recursive of the groups below as well; without a limit
    # some kernels count nothing.
    ('blkio/blkio.throttle.io_service_bytes_recursive', parse_blkio, MARKER),
    ('blkio/blkio.throttle.io_serviced_recursive', parse_blkio, MARKER),
    ('blkio/blkio.throttle.io_service_bytes', parse_blkio, MARKER),
    ('blkio/blkio.throttle.io_serviced', parse_blkio, MARKER),
    ('cpuacct/cpuacct.stat', parse_flat_keyed, USUAL),
    ('cpu/cpu.stat', parse_flat_keyed, USUAL),
    ('memory/memory.max_usage_in_bytes', parse_single, USUAL),
    ('memory/memory.kmem.usage_in_bytes', parse_single, USUAL),
    ('memory/memory.kmem.tcp.usage_in_bytes', parse_single, USUAL),
    ('memory/memory.stat', functools.partial(parse_memory_stat, names=tuple(MEMORY_STAT_V1)), USUAL),
    ('memory/memory.oom_control', parse_flat_keyed, USUAL),
    ('pids/pids.current', parse_single, USUAL),
    ('cpu/cpu.cfs_quota_us', parse_single, LIMIT),
    ('cpu/cpu.cfs_period_us', parse_single, LIMIT),
    ('cpu/cpu.shares', parse_single, LIMIT),
    ('memory/memory.limit_in_bytes', parse_single, LIMIT),
    ('memory/memory.memsw.limit_in_bytes', parse_single, LIMIT),
    ('pids/pids.max', parse_single, LIMIT),
    ('memory/cgroup.procs', parse_procs, LIMIT),
)}.items()}


def scaled(values: Optional[Counts], names: Mapping[str, str], multiply: int = 1,
           divide: int = 1) -> Counts:
    """Values under other names and in another unit."""
    return {other: values[name] * multiply // divide for name, other in names.items() if values and name in values}


def from_v1(files: Mapping[str, Any]) -> Dict[str, Any]:
    """What is in the files of cgroup v1, under the names and in the units of v2's files. memsw is memory and swap
    together: their difference is no swap, because the two files are read at two instants."""
    def number(name: str, limit: int = BEYOND) -> Optional[int]:
        value = files[name]
        return value if value is not None and 0 <= value < limit else None

    usage, quota = number('cpuacct/cpuacct.usage'), number('cpu/cpu.cfs_quota_us')
    memory_stat = scaled(files['memory/memory.stat'], MEMORY_STAT_V1)
    limit, memsw_limit = (number(f'memory/memory.{name}limit_in_bytes', V1_NO_LIMIT_BYTES) for name in ('', 'memsw.'))
    sizes, counts = (files[f'blkio/blkio.throttle.{name}_recursive'] or files[f'blkio/blkio.throttle.{name}'] or {}
                     for name in ('io_service_bytes', 'io_serviced'))
    return {
        'cpu.stat': {
            'usage_usec': None if usage is None else usage // 1000,
            **scaled(files['cpu/cpu.stat'], {'nr_periods': 'nr_periods', 'nr_throttled': 'nr_throttled'}),
            **scaled(files['cpu/cpu.stat'], {'throttled_time': 'throttled_usec'}, 1, 1000),
            **scaled(files['cpuacct/cpuacct.stat'], {'user': 'user_usec', 'system': 'system_usec'},
                     10**6, TICKS_PER_SECOND)},
        'cpu.max': {'quota_usec': quota, 'period_usec': number('cpu/cpu.cfs_period_us')} if quota else None,
        'cpu.shares': number('cpu/cpu.shares'),
        'memory.current': number('memory/memory.usage_in_bytes'),
        'memory.peak': number('memory/memory.max_usage_in_bytes'),
        'memory.max': limit,
        'memory.swap.current': memory_stat.pop('swap', None),
        'memory.swap.max': None if memsw_limit is None or limit is None else max(0, memsw_limit - limit),
        'memory.stat': {
            **memory_stat,
            'kernel': number('memory/memory.kmem.usage_in_bytes'),
            'sock': number('memory/memory.kmem.tcp.usage_in_bytes')},
        'memory.events': scaled(files['memory/memory.oom_control'], {'oom_kill': 'oom_kill'}),
        'io.stat': {device: {**scaled(size, {'Read': 'rbytes', 'Write': 'wbytes'}),
                             **scaled(counts.get(device), {'Read': 'rios', 'Write': 'wios'})}
                    for device, size in sizes.items()},
        'pids.current': number('pids/pids.current'),
        'pids.max': number('pids/pids.max'),
        'cgroup.procs': number('memory/cgroup.procs'),
    }


def fill_io_stat(message: wire.CgroupIoStat, device: Tuple[str, Counts]) -> None:
    name, counts = device
    fill_text(message, 'device', name)
    for field in IO_NAMES:
        put(message, field, counts.get(field, math.nan))


def fill_group_file(message: wire.CgroupMetrics, name: str, value: Any) -> None:
    """What is in a file of v2, into the field that the file's name is the path of; None where it is absent, or says
    that there is no limit."""
    *parents, field = GROUP_PLACES[name]
    for parent in parents:
        message = getattr(message, parent)
    if name == 'io.stat':
        devices = first_rows(dict(sorted((value or {}).items())))
        return fill_list(message.stat, list(devices.items()), fill_io_stat)
    if value is None or value == {}:
        return message.ClearField(field) if message.HasField(field) else None
    if field == 'pressure':
        return fill_pressure(message.pressure, value, fill)
    if isinstance(value, dict):
        return fill(getattr(message, field), value)
    return put(message, field, value)


# By name the path of the field. v1 has cpu.shares, which v2 lacks.
GROUP_PLACES = {name: name.split('.') for name in ('cpu.shares', *(file.name for file in GROUP_FILES[2]))}
# Those that count OOM kills.
KILL_FILES = {'memory.events', 'memory/memory.oom_control'}
# How many of the files are markers, and how many are read when one of these has changed.
MARKERS, OFTEN = ({version: sum(file.when <= when for file in files) for version, files in GROUP_FILES.items()}
                  for when in (MARKER, USUAL))


def open_group(tree: CgroupTree, group: Group) -> OpenFiles:
    """Open what is not open yet: all of the group's files, or those that were absent or failed. Where half of the
    descriptors are in use, which are given out from the lowest number on, limits are opened each time."""
    files = group.files if group.files.descriptors else OpenFiles(len(GROUP_FILES[tree.version]))
    half = open_files_limit() // 2
    for number, file in enumerate(GROUP_FILES[tree.version]):
        if files.descriptors[number] is None and (file.when < LIMIT or (files.descriptors[0] or 0) < half):
            with contextlib.suppress(OSError):
                path = tree.file_path(group.path, file.name)
                files.descriptors[number] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    return files


def read_group(tree: CgroupTree, group: Group, cycle: Cycle) -> Optional[List[Any]]:
    """What the group's files say, without those that are not due; nothing where no marker has changed. None where the
    group is gone."""
    due, count = cycle.now >= group.due or not group.hashes, MARKERS[tree.version]
    files = open_group(tree, group) if due or not group.files.descriptors else group.files
    markers = read_open_files(files.descriptors[:count])
    if not due and list(map(hash, markers)) == group.hashes[:count]:
        return []
    if not any(markers):
        return None
    texts = markers + read_open_files(files.descriptors[count:None if due else OFTEN[tree.version]])
    for number, (text, descriptor) in enumerate(zip(texts, files.descriptors)):
        if text is None and descriptor is not None:
            # It has gone: it is opened again like others that were absent.
            os.close(descriptor)
            files.descriptors[number] = None
        elif isinstance(text, bytes) and len(text) == OPEN_FILE_BYTES:
            path = tree.file_path(group.path, GROUP_FILES[tree.version][number].name)
            texts[number] = said_or_errno(read_bytes, path)
    # Descriptors are given out from the lowest number on: one near the limit means that few are left.
    if files is not group.files and max(filter(None, files.descriptors)) < open_files_limit() - SPARE_DESCRIPTORS:
        group.files = files
    if due:
        group.due = cycle.now + LIMITS_SECONDS * (1 if group.hashes else random.random())
        # Of those that are not open it is told whether they are absent, or fail.
        texts = [said_or_errno(read_small, tree.file_path(group.path, file.name)) if text is None else text
                 for text, file in zip(texts, GROUP_FILES[tree.version])]
    return texts


def group_file_value(path: str, file: GroupFile, text: Any, cycle: Cycle) -> Any:
    """What is in a file that may have failed or be malformed."""
    if isinstance(text, int):
        return cycle.failed_file(path, os.strerror(text))
    return None if text is None else cycle.parsed(path, text.decode('ascii', 'replace'), file.parse)


def add_inner(files: Dict[str, Any], inner: str, cycle: Cycle) -> None:
    """What the files of the container's own group lack, as far as they are among those."""
    if files.get('cpu.stat'):
        stat = cycle.read(f'{inner}/cpu.stat', parse_flat_keyed) or {}
        files['cpu.stat'].update((name, stat[name]) for name in THROTTLING if name in stat)
    if 'memory.swap.max' in files and files['memory.swap.max'] is None:
        files['memory.swap.max'] = cycle.read(f'{inner}/memory.swap.max', parse_single)


def collect_cgroup(message: wire.CgroupMetrics, tree: CgroupTree, group: Group, cycle: Cycle) -> bool:
    """Write into the message what the group's files say anew. False where the group is gone."""
    texts = read_group(tree, group, cycle)
    if texts is None and group.hashes:
        # A unit that was started again has another group under the same path.
        group.files, group.hashes = OpenFiles(0), []
        texts = read_group(tree, group, cycle)
    if texts is None:
        return False
    message.timestamp_ns, group.clock_ns, group.changed = time.time_ns(), time.monotonic_ns(), bool(texts)
    group.killed = False
    if not group.changed:
        return True
    hashes = list(map(hash, texts))
    said = zip(GROUP_FILES[tree.version], texts, hashes, group.hashes or itertools.repeat(None))
    changed = [(file, text) for file, text, new, previous in said if new != previous]
    try:
        files = {file.name: None if text is None else file.parse(text.decode('ascii')) for file, text in changed}
    except (AttributeError, *MALFORMED):
        # The group is read again in the next cycle, whatever happens in it.
        hashes, group.due = [None] * len(hashes), 0.0
        files = {file.name: group_file_value(f'{group.path}/{file.name}', file, text, cycle) for file, text in changed}
    group.killed = not KILL_FILES.isdisjoint(files)
    if tree.version == 1:
        # One value of v2 may be made of several files.
        group.v1_files.update(files)
        files = from_v1(group.v1_files)
    elif CRIO_CGROUP.search(group.path):
        add_inner(files, f'/sys/fs/cgroup/{group.path}/container', cycle)
    for name, value in files.items():
        fill_group_file(message, name, value)
    if 'io.stat' in files:
        group.devices = len(files['io.stat'] or ())
    if not group.hashes:
        message.path = group.path
    group.hashes[:len(hashes)] = hashes
    return True


# --- which cgroups there are

# A walk ends after so many; a node of 250 pods has 1,500. Whoever is given a group of its own can make any number.
MAX_GROUPS = 1 << 15
# A container's group has its id in its name: <id>, cri-containerd-<id>.scope, crio-<id>.scope, docker-<id>.scope.
CONTAINER_CGROUP = re.compile(r'(?!crio-conmon-)(?:.*[^0-9a-f])?([0-9a-f]{64})(?:\.scope)?')


def groups_in(directory: str) -> Iterator[os.DirEntry]:
    with contextlib.suppress(OSError), os.scandir(directory) as entries:
        yield from (entry for entry in entries if entry.is_dir(follow_symlinks=False))


def walk_groups(root: str, enter: Callable[[os.DirEntry], bool]) -> Iterator[os.DirEntry]:
    """The groups below, nearest first, as far as `enter` goes: not by recursion, for they may be nested deeply."""
    waiting = collections.deque((root,))
    while waiting:
        for entry in groups_in(waiting.popleft()):
            yield entry
            if enter(entry):
                waiting.append(entry.path)


def node_groups(tree: CgroupTree, cycle: Cycle) -> Iterator[os.DirEntry]:
    """The groups that nobody but root can have made: none in a group that is another user's, a session's or a
    container's. One that process 1 is in is the node itself, as in kind."""
    node = cycle.read('/proc/1/cgroup') or ''

    def enter(entry: os.DirEntry) -> bool:
        status = entry.stat()
        return (status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022 and entry.name != 'user.slice'
                and (not CONTAINER_CGROUP.fullmatch(entry.name) or entry.name in node))

    for number, entry in enumerate(walk_groups(tree.top, enter)):
        if number == MAX_GROUPS:
            return cycle.failed(f'{cycle.current}: groups', f'more than {MAX_GROUPS}: the others are left out')
        yield entry


# --- services

# The daemons that a node cannot do without, and those that run its containers; a snap's are snap.NAME.daemon-DAEMON.
SERVICE = re.compile(r'(kubelet|containerd|crio|docker|cri-dockerd?|k3s|k3s-agent|rke2-server|rke2-agent|k0scontroller|'
                     r'k0sworker|snap\.(microk8s|k8s|kubelet)[\w-]*\.[\w-]+)\.service')
# What has no daemon of the node below it: machines, pods, and units.
NO_SERVICES = re.compile(r'machine\.slice|.*kubepods.*|.*\.(scope|service|mount|socket)')


def collect_services(node: wire.NodeMetrics, state: NodeState, cycle: Cycle) -> None:
    """The root of all groups, and those of the daemons, which are looked for once a minute, and when one is gone."""
    tree = read_cgroup_tree(cycle.roots.sysfs)
    if not tree:
        return
    if cycle.now >= state.services_due:
        state.services_due = cycle.now + SELDOM_SECONDS
        # /system.slice/kubelet.service, or /docker/ID/kubelet.slice/kubelet.service of a node in a container.
        for path in (entry.path[len(tree.top) + 1:] for entry in node_groups(tree, cycle)
                     if SERVICE.fullmatch(entry.name)):
            if any(map(NO_SERVICES.fullmatch, path.split('/')[:-1])):
                continue
            state.services.setdefault(path, (Group(path), wire.ServiceMetrics(name=os.path.basename(path))))
    if collect_cgroup(state.root[1], tree, state.root[0], cycle):
        node.cgroup.CopyFrom(state.root[1])
    for path, (group, message) in sorted(state.services.items()):
        if os.path.isdir(f'{tree.top}/{path}') and collect_cgroup(message.cgroup, tree, group, cycle):
            node.services.append(message)
        else:
            del state.services[path]
            state.services_due = 0.0


# --- node

class NodeState:
    """What the node's subjects keep from cycle to cycle, how many processes are named, and when to look for services,
    addresses, sockets and hardware again (monotonic clock)."""

    services_due = addresses_due = sockets_due = hardware_due = 0.0
    # Of which interfaces the addresses were asked for.
    addressed: Sequence[str] = ()
    addresses: List[Address] = []

    def __init__(self, top_n: int):
        self.top_n = top_n
        self.helper = Helper()
        self.identity = wire.NodeMetrics()
        # What was read of the sockets last.
        self.sockets = wire.NodeMetrics()
        # By name the times at the previous cycle, by number what does not change while a CPU is online.
        self.cpu_times: Dict[str, CpuTimes] = {}
        self.cpu_infos: Dict[int, wire.CpuInfo] = {}
        self.links: Dict[str, Link] = {}
        # By subject what the helper has answered last.
        self.answers: Dict[str, Dict[str, bytes]] = {}
        self.services: Dict[str, Tuple[Group, wire.ServiceMetrics]] = {}
        # Files of sysfs devices, and what they said last.
        self.hardware: Dict[str, bytes] = {}
        self.root = Group(''), wire.CgroupMetrics()


NODE_SUBJECTS: Dict[str, Callable[[wire.NodeMetrics, NodeState, Cycle], None]] = {
    'system': collect_system, 'cpu': collect_cpu, 'load': collect_load, 'memory': collect_memory,
    'pressure': collect_pressure, 'processes': collect_processes, 'file systems': collect_disk_usages,
    'disk I/O': collect_disk_io, 'network': collect_network, 'addresses': collect_addresses,
    'network protocols': collect_protocols, 'kernel limits': collect_limits, 'clock': collect_clock,
    'hardware': collect_hardware, 'services': collect_services}


def collect_node(node: wire.NodeMetrics, state: NodeState, cycle: Cycle) -> None:
    """What fails beyond a file costs its subject, and the rest goes on."""
    for subject, collect in NODE_SUBJECTS.items():
        cycle.current, began = subject, time.monotonic()
        try:
            collect(node, state, cycle)
        except Exception as error:
            cycle.failed(subject, error)
        cycle.subject_seconds[subject] = time.monotonic() - began


# --- container runtime

# cri-api: the same messages under two names; v1alpha2 is all that containerd before 1.6 and old cri-dockerd have.
CRI_SERVICES = ('runtime.v1.RuntimeService', 'runtime.v1alpha2.RuntimeService')
CRI_SOCKETS = [
    '/run/containerd/containerd.sock',
    '/run/k3s/containerd/containerd.sock',
    '/run/k0s/containerd.sock',
    '/var/snap/microk8s/common/run/containerd.sock',
    '/run/crio/crio.sock',
    '/run/cri-dockerd.sock',
    '/run/k3s/cri-dockerd/cri-dockerd.sock',
    '/run/dockershim.sock',
]
CRI_CHANNEL_OPTIONS = (
    # Twice what the kubelet takes. Three copies of it in memory are less than the DaemonSet's limit.
    ('grpc.max_receive_message_length', 32 << 20),
    # The default authority is the percent-encoded socket path, which strict servers reject.
    ('grpc.default_authority', 'localhost'),
    ('grpc.enable_http_proxy', 0),
    # Channels to one socket would otherwise share its back-off, which grows to two minutes.
    ('grpc.use_local_subchannel_pool', 1),
    ('grpc.max_reconnect_backoff_ms', 10_000),
    # Also how long an attempt to connect to a stopped runtime outlives its channel.
    ('grpc.min_reconnect_backoff_ms', 2_000),
)
# In the kubelet's command line (NUL-separated) and in kubeadm-flags.env; in its config.yaml and in crictl.yaml.
ENDPOINT_FLAG = re.compile(r'--container-runtime-endpoint[=\s\0]+"?([^\s"\0]+)')
# Block or flow style, which is JSON's as well; the value may be in the next line. A comment is none.
ENDPOINT_SETTING = re.compile(
    r'''^(?:[^#\n]*[{,])?[ \t]*["']?(?:containerRuntimeEndpoint|runtime-endpoint)["']?[ \t]*:'''
    r'''[ \t]*(?:[|>]-?[ \t]*)?(?:\n[ \t]+)?["']?([^\s"'},]*)''', re.MULTILINE)
# In /proc/PID/status; a program that is set-user-ID has root's as the second alone.
NOT_ROOT = re.compile(r'^Uid:(?!\t0\t0\t0\t0$)', re.MULTILINE)
ENDPOINT = re.compile(r'(?:unix:(?://)?)?(/[^\0]+)')


class CriError(Exception):
    """Why a call of the runtime failed, and gRPC's status code, None where there was nothing to call."""

    def __init__(self, text: str, code: Optional[grpc.StatusCode] = None):
        super().__init__(text)
        self.code = code


class Runtime(NamedTuple):
    """A runtime: how it is reached, and, once it has answered, what it calls itself."""
    channel: grpc.Channel
    socket: str
    # Tells this socket from its successor under the same path.
    inode: Tuple[int, int]
    service: str = CRI_SERVICES[0]
    name: str = ''
    version: str = ''


class StatsCall:
    """A call of ListContainerStats under way, when it began (monotonic clock), and what has become of it."""

    answer: Any = None
    error: Optional[Exception] = None

    def __init__(self, runtime: Runtime):
        self.runtime = runtime
        self.started = time.monotonic()
        self.finished = threading.Event()

    def result(self) -> Any:
        if self.error:
            raise self.error
        return self.answer


def is_kubelet(pid: str, cycle: Cycle) -> bool:
    """Any process can call itself kubelet: the node's runs as root, in the namespaces of process 1, in no pod."""
    directory = f'/proc/{pid}'
    if cycle.read_line(f'{directory}/comm') != 'kubelet':
        return False
    own, first = ([cycle.read(f'/proc/{process}/ns/{kind}', None, os.readlink) for kind in ('pid', 'mnt')]
                  for process in (pid, 1))
    return (own == first and 'kubepods' not in (cycle.read(f'{directory}/cgroup') or '')
            and not NOT_ROOT.search(cycle.read(f'{directory}/status') or ''))


def kubelet_pid(cycle: Cycle) -> str:
    return next((name for name in cycle.names('/proc/') if name.isdecimal() and is_kubelet(name, cycle)), '0')


def collect_endpoints(explicit: Optional[str], cycle: Cycle) -> Tuple[List[str], List[str]]:
    """Paths where the runtime's socket may be, likeliest first: the one that was named, or else every known place; and
    what settings say that is none."""
    if explicit:
        match = ENDPOINT.fullmatch(explicit)
        return [os.path.realpath(match.group(1) if match else explicit)], []
    paths, unclear = [], []
    for pattern, path in ((ENDPOINT_FLAG, f'/proc/{kubelet_pid(cycle)}/cmdline'),
                          (ENDPOINT_SETTING, '/var/lib/kubelet/config.yaml'),
                          (ENDPOINT_FLAG, '/var/lib/kubelet/kubeadm-flags.env'),
                          (ENDPOINT_SETTING, '/etc/crictl.yaml')):
        setting = pattern.search(cycle.read(path) or '')
        match = ENDPOINT.fullmatch(setting.group(1)) if setting else None
        if match:
            paths.append(match.group(1))
        elif setting and setting.group(1):
            unclear.append(f'{path} names {setting.group(1)[:80]!r}, which is no socket (unix:///PATH)')
    # /var/run is a link to /run, absolute on some systems: below a mounted root it would lead out of it.
    below_root = (cycle.roots.rootfs.rstrip('/') + re.sub('^/var/run/', '/run/', path) for path in paths + CRI_SOCKETS)
    return list(dict.fromkeys(map(os.path.realpath, below_root))), unclear


def read_socket_inode(path: str) -> Optional[Tuple[int, int]]:
    """Device and inode of a socket; None where there is no socket."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None


def utf8(said: Any) -> str:
    """A text of the runtime's: one that is not UTF-8 comes as bytes, because cri.proto asks for no validation."""
    return (said if isinstance(said, str) else said.decode(errors='replace'))[:MAX_TEXT]


def cri_method(runtime: Runtime, method: str) -> grpc.UnaryUnaryMultiCallable:
    """The agent calls only methods that read: Version, Status, ListPodSandbox, ListContainers, ListContainerStats,
    ContainerStatus and ImageFsInfo."""
    answer = getattr(cri, f'{method}Response')
    return runtime.channel.unary_unary(f'/{runtime.service}/{method}', response_deserializer=answer.FromString)


def fetch_result(method: str, started: float, wait: Callable[[], Any], cycle: Cycle) -> Any:
    """The answer that `wait` gives, or CriError; either way the call is counted."""
    failed = True
    try:
        answer = wait()
        failed = False
        return answer
    except grpc.RpcError as error:
        # The error of a future is the future, which would hold all frames up to the main loop's, and their files.
        error.__traceback__ = None
        raise CriError(f'{method}: {error.code().name}: {error.details()}', error.code()) from None
    finally:
        stats = cycle.calls.setdefault(method, wire.CriMethodMetrics(method=method))
        stats.calls_total += 1
        stats.failures_total += failed
        stats.last_seconds = time.monotonic() - started
        stats.seconds_total += stats.last_seconds


def fetch(runtime: Runtime, method: str, cycle: Cycle, request: bytes = b'', share: float = 1) -> Any:
    """Ask and wait, for a share of the time that is left; an empty request asks for everything. Without a future, for
    which grpc starts a thread: where there is none to be had, a future never ends. CriError."""
    timeout = max(CRI_SHORTEST_SECONDS, cycle.seconds_left() * share)
    ask = functools.partial(cri_method(runtime, method), request, timeout=timeout)
    return fetch_result(method, time.monotonic(), ask, cycle)


def fetch_version(candidate: Runtime, share: float, cycle: Cycle) -> Runtime:
    """The candidate under the name of its service, with what it calls itself. CriError."""
    for service in CRI_SERVICES:
        try:
            runtime = candidate._replace(service=service)
            answer = fetch(runtime, 'Version', cycle, share=share)
            break
        except CriError as error:
            if error.code is not grpc.StatusCode.UNIMPLEMENTED or service == CRI_SERVICES[-1]:
                raise
    return runtime._replace(name=utf8(answer.runtime_name), version=utf8(answer.runtime_version))


def is_inhabited(runtime: Runtime, cycle: Cycle) -> bool:
    """Whether it has a READY sandbox: one that is no longer used may keep old ones."""
    try:
        return any(sandbox.state == cri.SANDBOX_READY for sandbox in fetch(runtime, 'ListPodSandbox', cycle).items)
    except CriError:
        return False


def find_runtime(paths: Sequence[str], unclear: Sequence[str], believed: Sequence[int], cycle: Cycle) -> Runtime:
    """The first runtime that answers; of several, the first that is inhabited. CriError says what was tried. Whoever
    serves the socket says what pods there are: it is root, or a user that is believed."""
    candidates, runtimes, reasons = [], [], []
    for path in paths:
        try:
            if stat.S_ISSOCK(os.stat(path).st_mode):
                check_socket(path, believed)
                channel = grpc.insecure_channel(f'unix:{path}', CRI_CHANNEL_OPTIONS)
                candidates.append(Runtime(channel, path, read_socket_inode(path)))
        except (FileNotFoundError, NotADirectoryError):
            continue
        except UnsafePath as error:
            reasons.append(f'{path} is not believed: {error} (--cri-socket-uid names a user to believe)')
        except OSError as error:
            reasons.append(f'{path}: {error.strerror}')
    if not candidates and not reasons:
        where = paths[0] if len(paths) == 1 else 'any of the usual paths (--cri-socket names another)'
        raise CriError('; '.join((f'none found: no socket at {where}', *unclear)))
    for number, candidate in enumerate(candidates):
        try:
            runtimes.append(fetch_version(candidate, 1 / (len(candidates) - number + 1), cycle))
        except CriError as error:
            reasons.append(f'{candidate.socket}: {error}')
    if len(runtimes) > 1:
        runtimes.sort(key=lambda runtime: not is_inhabited(runtime, cycle))
    for candidate in candidates:
        if not runtimes or candidate.socket != runtimes[0].socket:
            candidate.channel.close()
    if not runtimes:
        raise CriError(f'none answers: {"; ".join(reasons)}')
    return runtimes[0]


# --- cgroups of containers

def read_container_cgroups(tree: CgroupTree, cycle: Cycle) -> Dict[str, List[str]]:
    """All groups of containers and sandboxes: by id the paths below the root of the hierarchy. One walk of the
    tree."""
    paths: Dict[str, List[str]] = collections.defaultdict(list)
    for entry in node_groups(tree, cycle):
        match = CONTAINER_CGROUP.fullmatch(entry.name)
        if match:
            paths[match.group(1)].append(entry.path[len(tree.top) + 1:])
    return paths


def pod_cgroup_path(path: str, uid: str) -> Optional[str]:
    """The pod's group above a container's, where the kubelet has made one: pod<uid>, with systemd's driver - as _."""
    parts = path.split('/')
    for depth, name in enumerate(parts[:-1], 1):
        if uid and name.partition('.')[0].endswith((f'pod{uid}', f'pod{uid.replace("-", "_")}')):
            return '/'.join(parts[:depth])
    return None


def group_of_process(state: RuntimeState, id: str, paths: Sequence[str], cycle: Cycle) -> str:
    """Of several groups with a container's id the one that its process is in, by the runtime's word; else the first."""
    request = cri.ContainerStatusRequest(container_id=id, verbose=True).SerializeToString()
    try:
        said = fetch(state.runtime, 'ContainerStatus', cycle, request).info
        groups = cycle.read(f'/proc/{int(json.loads(said["info"])["pid"])}/cgroup') or ''
    except (CriError, AttributeError, *MALFORMED):
        groups = ''
    return next((path for path in paths if f'/{path}\n' in groups or f'/{path}/' in groups), paths[0])


def find_cgroups(state: RuntimeState, missing: Mapping[str, str], cycle: Cycle) -> Dict[str, str]:
    """The paths of the groups with these ids, which belong to pods with these uids. The tree is walked when there is a
    new id; ids without a group, as those of VMs, are searched for again after SELDOM_SECONDS."""
    state.tree, wanted = state.tree or read_cgroup_tree(cycle.roots.sysfs), missing.keys()
    if not state.tree or not (wanted - state.unfound or wanted and cycle.now >= state.search_due):
        return {}
    by_id, found = read_container_cgroups(state.tree, cycle), {}
    state.unfound, state.search_due = wanted - by_id.keys(), cycle.now + SELDOM_SECONDS
    for id in wanted & by_id.keys():
        paths = [path for path in by_id[id] if pod_cgroup_path(path, missing[id])] or by_id[id]
        found[id] = paths[0] if len(paths) == 1 else group_of_process(state, id, paths, cycle)
    return found


def qos_class(path: str) -> Optional[str]:
    """The kubelet keeps the pods of a class together; Guaranteed ones are directly below kubepods."""
    if 'kubepods' not in path:
        return None
    return 'BestEffort' if 'besteffort' in path else 'Burstable' if 'burstable' in path else 'Guaranteed'


# --- pods and containers

# More than any machine has; containerd 1.6 says 2**63 while it tears a container down.
SANE_NANO_CORES = 10_000 * 10**9
# Runtimes say "no limit" with a number near 2**63, less what is in use. In protobuf's encoding a number from 2**62 on
# has nine bytes, of seven bits each, the last of which is 64 or more.
BEYOND_SENSE = 2**62
BEYOND_SENSE_VARINT = re.compile(rb'[\x80-\xff]{8}[\x40-\xff]')
# An entry of a map of texts as protobuf encodes it: 1, length, key, 2, length, value.
RESTART_COUNT = re.compile(rb'\n.io\.kubernetes\.container\.restartCount\x12.([0-9]{1,9})', re.DOTALL)
# Of a container's groups so many are searched for a process: a systemd in a container has some.
GROUPS_BELOW = 32


class UsageSample(NamedTuple):
    """CPU time of a container since its start, where it comes from, and when it was taken: by the runtime's own clock,
    or by the monotonic one where the agent has read it itself."""
    source: str
    clock_ns: int
    usage_ns: int


class Container:
    """A container that the runtime lists: its message, where its group is, the group while it is there, its previous
    CPU sample, and the state in which the runtime was asked for its status."""

    state: Optional[int] = None
    path: Optional[str] = None
    group: Optional[Group] = None
    had_group = False
    cpu: Optional[UsageSample] = None
    asked_state: Optional[int] = None

    def __init__(self, message: wire.ContainerMetrics):
        self.message = message


class Pod:
    """A sandbox: its message, its containers by id, where the sandbox's group is, the pod's own group, the process
    through which its network was seen, with what that has said, when a status of its containers was asked for
    (monotonic clock), and whether its containers, their groups, kills or ends are others than when its history was
    filled."""

    state: Optional[int] = None
    path: Optional[str] = None
    group: Optional[Group] = None
    had_group = False
    pid: Optional[str] = None
    net_dev: Optional[bytes] = None
    asked = 0.0
    restless = True

    def __init__(self, message: wire.PodMetrics, labels_left_out: int = 0):
        self.message = message
        self.labels_left_out = labels_left_out
        self.containers: Dict[str, Container] = {}

    def running(self) -> List[Container]:
        return [container for container in self.containers.values() if container.state == cri.CONTAINER_RUNNING]


def enum_name(enum: Any, number: int) -> str:
    return enum.Name(number) if number in enum.values() else str(number)


def texts(labels: Mapping[Any, Any]) -> Dict[str, str]:
    return {utf8(key): utf8(value) for key, value in labels.items()}


def new_pod(sandbox: cri.PodSandbox) -> Pod:
    metadata, labels = sandbox.metadata, fitting_labels(texts(sandbox.labels), LABEL_BYTES)
    return Pod(wire.PodMetrics(
        id=utf8(sandbox.id), uid=utf8(metadata.uid), name=utf8(metadata.name), namespace=utf8(metadata.namespace),
        created_at=max(0, sandbox.created_at), attempt=metadata.attempt, labels=labels,
        runtime_handler=utf8(sandbox.runtime_handler) or None), len(sandbox.labels) - len(labels))


def restart_count(container: cri.Container) -> Optional[int]:
    """Of the annotations, which may be as large as their author likes, the kubelet's one alone is parsed."""
    said = (RESTART_COUNT.fullmatch(annotation) for annotation in container.annotations)
    return next((int(match.group(1)) for match in said if match), None)


def fill_listed_container(message: wire.ContainerMetrics, container: cri.Container, labels: Mapping[str, str]) -> None:
    """What does not change while a container is there (cri-api: labels and annotations are those that it was made
    with)."""
    specified = utf8(container.image.user_specified_image)
    message.MergeFrom(wire.ContainerMetrics(
        id=utf8(container.id), name=utf8(container.metadata.name), image=utf8(container.image.image),
        user_specified_image=None if specified in ('', container.image.image) else specified,
        created_at=max(0, container.created_at), attempt=container.metadata.attempt,
        restart_count=restart_count(container), labels=labels, image_ref=utf8(container.image_ref) or None))


def renew_pod(pod: Pod) -> None:
    """Copy the pod's message, and bind the containers to the copy. protobuf frees a message as a whole: what was
    cleared in the old one goes with it."""
    message = wire.PodMetrics()
    message.CopyFrom(pod.message)
    pod.message = message
    for container in message.container_metrics:
        if container.id in pod.containers:
            pod.containers[container.id].message = container
        else:
            pod.containers[container.id] = Container(container)


def remove_containers(pod: Pod, ids: Iterable[str]) -> None:
    messages = pod.message.container_metrics
    for index in reversed(range(len(messages))):
        if messages[index].id in ids:
            del pod.containers[messages[index].id], messages[index]


def recent_containers(pod: Pod, listed: Dict[str, cri.Container]) -> Dict[str, cri.Container]:
    """Without those that have exited before others did, where there are many: a crash loop makes new ones."""
    exited = sorted((id for id, container in listed.items() if container.state == cri.CONTAINER_EXITED),
                    key=lambda id: listed[id].created_at, reverse=True)
    count_left_out(pod.message, 'exited containers', len(exited) - MAX_EXITED)
    return {id: container for id, container in listed.items() if id not in exited[MAX_EXITED:]}


def update_containers(pod: Pod, listed: Dict[str, cri.Container]) -> None:
    """Bring the pod's containers up to the runtime's list. Their order is our own: the runtime's changes from call to
    call."""
    messages = pod.message.container_metrics
    if len(listed) > MAX_EXITED or 'exited containers' in pod.message.left_out:
        listed = recent_containers(pod, listed)
    if pod.containers.keys() != listed.keys():
        pod.restless = True
        remove_containers(pod, pod.containers.keys() - listed.keys())
        for id in sorted(listed.keys() - pod.containers.keys()):
            labels = fitting_labels(texts(listed[id].labels), LABEL_BYTES - label_bytes(pod.message))
            fill_listed_container(messages.add(), listed[id], labels)
        messages.sort(key=lambda message: (message.created_at, message.id))
        renew_pod(pod)
        count_left_out(pod.message, 'labels', pod.labels_left_out + sum(
            len(listed[message.id].labels) - len(message.labels) for message in pod.message.container_metrics))
    for id, container in pod.containers.items():
        state = listed[id].state
        if state != container.state:
            pod.restless = True
            container.state, container.message.state = state, enum_name(cri.ContainerState, state)
            container.message.ClearField('status')
            if container.group and state != cri.CONTAINER_RUNNING:
                container.path = None
                forget_group(pod, container)


def sandbox_of(container: cri.Container) -> cri.PodSandbox:
    """In the place of a sandbox that the runtime does not list: what the kubelet's labels of a container say."""
    id, labels = utf8(container.pod_sandbox_id or container.id), texts(container.labels)
    return cri.PodSandbox(id=id, state=cri.SANDBOX_NOTREADY, metadata={
        part: labels.get(f'io.kubernetes.pod.{part}') for part in ('uid', 'name', 'namespace')})


def each_pod(pods: Dict[str, Pod], do: Callable[[Pod], None], cycle: Cycle) -> None:
    """What fails beyond a file costs its pod: it begins anew with the next cycle."""
    for id, pod in list(pods.items()):
        try:
            do(pod)
        except Exception as error:
            cycle.failed('pods', error)
            del pods[id]


def update_pods(pods: Dict[str, Pod], sandboxes: Iterable[cri.PodSandbox], containers: Iterable[cri.Container],
                cycle: Cycle) -> None:
    """The runtime's lists decide which pods and containers there are: sandboxes that are READY, or have a container
    that runs, as where the pause process was killed, with all their containers."""
    by_id = {utf8(sandbox.id): sandbox for sandbox in sandboxes}
    shown = {id for id, sandbox in by_id.items() if sandbox.state == cri.SANDBOX_READY}
    below: Dict[str, Dict[str, cri.Container]] = collections.defaultdict(dict)
    for container in containers:
        id = utf8(container.pod_sandbox_id or container.id)
        below[id][utf8(container.id)] = container
        if container.state == cri.CONTAINER_RUNNING:
            shown.add(id)
    for id in pods.keys() - shown:
        del pods[id]
    for id in shown:
        pods[id] = pods.get(id) or new_pod(by_id.get(id) or sandbox_of(next(iter(below[id].values()))))

    def update_pod(pod: Pod) -> None:
        state = by_id[pod.message.id].state if pod.message.id in by_id else cri.SANDBOX_NOTREADY
        if pod.state != state:
            pod.state, pod.message.state = state, enum_name(cri.PodSandboxState, state)
        update_containers(pod, below[pod.message.id])

    each_pod(pods, update_pod, cycle)
    if pods:
        # A pod a cycle, in turn: what was cleared in its message in the meantime is freed.
        first = next(iter(pods))
        pods[first] = pods.pop(first)
        renew_pod(pods[first])


def forget_group(pod: Pod, owner: Any) -> None:
    """The group of the pod, or of one of its containers, is gone or is not to be read."""
    owner.group, owner.had_group, pod.restless = None, True, True
    owner.message.ClearField('cgroup')
    renew_pod(pod)


def fill_pod_interface(message: wire.PodInterface, interface: Tuple[str, Counts]) -> None:
    name, columns = interface
    fill_text(message, 'name', name)
    fill(message.counters, columns)


def collect_process_network(pod: Pod, pid: str, cycle: Cycle) -> bool:
    """The interfaces that a process of the pod sees, without lo; those of a pod in the node's network are not its own.
    False where the process has no network, as a zombie."""
    message, same, failed_before = pod.message, pid == pod.pid, cycle.failed_reads
    if same and message.host_network:
        return True
    net_dev = cycle.read(f'/proc/{pid}/net/dev', None, functools.partial(read_bytes, limit=NET_DEV_BYTES))
    if not net_dev:
        return False
    if not same:
        shared = same_network(cycle.path(f'/proc/{pid}'), cycle.path('/proc/1'))
        if shared is None:
            return False
        message.host_network = shared
    if not same or net_dev != pod.net_dev:
        path, said = f'/proc/{pid}/net/dev', b'' if message.host_network else net_dev
        counters = cycle.parsed(path, said.decode(errors='replace'), parse_net_dev) or {}
        counters.pop('lo', None)
        fill_list(message.network_interfaces, list(first_rows(counters).items()), fill_pod_interface)
        count_left_out(message, 'interfaces', len(counters) - MAX_ROWS)
    pod.pid, pod.net_dev = pid, net_dev if cycle.failed_reads == failed_before else None
    return True


def pids_below(group: str, cycle: Cycle) -> Iterator[str]:
    """A process of the group; then, until the caller has seen enough, one of each group below it, where for example
    systemd in a container has all of them."""
    below = itertools.islice(walk_groups(group, os.DirEntry.is_dir), GROUPS_BELOW)
    for directory in itertools.chain((group,), (entry.path for entry in below)):
        try:
            yield from read_small(f'{directory}/cgroup.procs').decode(errors='replace').split(None, 1)[:1]
        except OSError as error:
            if error.errno not in ABSENT:
                cycle.failed_file(f'{directory}/cgroup.procs', error)


def collect_pod_network(pod: Pod, top: str, paths: Iterable[str], cycle: Cycle) -> None:
    """The pod's network through any process of its groups. The pid is taken from the group: one that is remembered may
    be another process by now."""
    pids = (pid for path in paths for pid in pids_below(f'{top}/{path}', cycle))
    if any(collect_process_network(pod, pid, cycle) for pid in pids):
        return
    pod.pid = None
    pod.message.ClearField('host_network')
    del pod.message.network_interfaces[:]


def collect_group(pod: Pod, owner: Any, tree: CgroupTree, subject: str, cycle: Cycle) -> None:
    """The group of the pod or of one of its containers. One that is gone is searched for again in the next cycle."""
    cycle.current = subject
    there = collect_cgroup(owner.message.cgroup, tree, owner.group, cycle)
    pod.restless = pod.restless or owner.group.killed
    if not there:
        owner.path = None
        forget_group(pod, owner)


def collect_pod_groups(pod: Pod, tree: CgroupTree, cycle: Cycle) -> None:
    """A pod's own group is above those of its sandbox and its containers."""
    paths = [owner.path for owner in (pod, *pod.containers.values()) if owner.path]
    if pod.group is None:
        above = next(filter(None, (pod_cgroup_path(path, pod.message.uid) for path in paths)), None)
        pod.group = Group(above) if above else None
        fill_known(pod.message, qos_class=qos_class(above or ''))
    if pod.group:
        collect_group(pod, pod, tree, 'pod cgroups', cycle)
    cycle.current = 'pod networks'
    collect_pod_network(pod, tree.top, paths, cycle)
    for container in pod.running():
        if container.path:
            container.group = container.group or Group(container.path)
            collect_group(pod, container, tree, 'cgroups', cycle)
    devices = [owner.group.devices for owner in (pod, *pod.containers.values()) if owner.group]
    count_left_out(pod.message, 'devices', max(devices, default=0) - MAX_ROWS)


def collect_groups(state: RuntimeState, cycle: Cycle) -> None:
    """What the cgroups and network namespaces tell of the pods and the running containers."""
    missing = {owner.message.id: (owner, pod.message.uid) for pod in state.pods.values()
               for owner in (pod, *pod.running()) if owner.path is None}
    for id, path in find_cgroups(state, {id: uid for id, (_, uid) in missing.items()}, cycle).items():
        missing[id][0].path = path
    if state.tree:
        each_pod(state.pods, lambda pod: collect_pod_groups(pod, state.tree, cycle), cycle)


def nano_cores(previous: UsageSample, sample: UsageSample) -> Optional[int]:
    """CPU time per wall time between two samples, in 1e-9 cores; None without a step forward in time, or beyond
    sense."""
    elapsed_ns = sample.clock_ns - previous.clock_ns if sample.source == previous.source else 0
    rate = (sample.usage_ns - previous.usage_ns) * 10**9 // elapsed_ns if elapsed_ns > 0 else None
    return rate if rate is not None and 0 <= rate < SANE_NANO_CORES else None


def fill_cpu_metrics(container: Container, sample: Optional[UsageSample], timestamp_ns: int,
                     runtime_rate: int = 0) -> None:
    """The runtime's own rate counts for the first sample alone: another poller may have spoiled it, and its 0 may
    mean that it has none yet. A counter that goes backwards, as in a container that is torn down, is not sent, but
    the next one is compared with it."""
    previous, container.cpu = container.cpu, sample or container.cpu
    backwards = sample and previous and sample.source == previous.source and sample.usage_ns < previous.usage_ns
    if not sample or backwards:
        if container.message.HasField('cpu_metrics'):
            container.message.ClearField('cpu_metrics')
        return
    rate = nano_cores(previous, sample) if previous else runtime_rate if 0 < runtime_rate < SANE_NANO_CORES else None
    cpu = container.message.cpu_metrics
    cpu.timestamp, cpu.usage_core_nano_seconds.value = timestamp_ns, sample.usage_ns
    if rate is None:
        cpu.ClearField('usage_nano_cores')
    else:
        cpu.usage_nano_cores.value = rate


def working_set(cgroup: wire.CgroupMetrics) -> Optional[int]:
    """All but the file pages that nobody has used lately."""
    current, inactive = known(cgroup.memory, 'current'), known(cgroup.memory.stat, 'inactive_file')
    return None if current is None or inactive is None else max(0, current - inactive)


def fill_memory_metrics(message: wire.ContainerMetrics) -> None:
    """What the runtimes make of the same files."""
    memory, stat = message.cgroup.memory, message.cgroup.memory.stat
    current, limit, working = known(memory, 'current'), known(memory, 'max'), working_set(message.cgroup)
    if current is None:
        message.ClearField('memory_metrics')
    else:
        fill_wrapped(message.memory_metrics, {
            'usage_bytes': current, 'working_set_bytes': working, 'rss_bytes': known(stat, 'anon'),
            'available_bytes': None if working is None or limit is None else max(0, limit - working),
            'page_faults': known(stat, 'pgfault'), 'major_page_faults': known(stat, 'pgmajfault')})
    swap, limit = known(memory.swap, 'current'), known(memory.swap, 'max')
    if swap is None:
        message.ClearField('swap_metrics')
    else:
        available = None if limit is None else max(0, limit - swap)
        fill_wrapped(message.swap_metrics, {'usage_bytes': swap, 'available_bytes': available})


def fill_usage_from_cgroup(container: Container) -> None:
    message = container.message
    cgroup, cpu = message.cgroup, message.cgroup.cpu.stat
    if container.group.changed:
        fill_text(message, 'stats_source', 'cgroup')
        fill_memory_metrics(message)
    for field in ('memory_metrics', 'swap_metrics'):
        if message.HasField(field):
            getattr(message, field).timestamp = cgroup.timestamp_ns
    # cgroup v1 counts ns, v2 µs.
    usage_ns = container.group.v1_files.get('cpuacct/cpuacct.usage', known(cpu, 'usage_usec') and cpu.usage_usec * 1000)
    usable = usage_ns is not None and 0 <= usage_ns < BEYOND
    sample = UsageSample('cgroup', container.group.clock_ns, usage_ns) if usable else None
    fill_cpu_metrics(container, sample, cgroup.timestamp_ns)


def fill_file_system(message: wire.FileSystemMetrics, said: cri.FilesystemUsage) -> None:
    """A writable layer, or the file system of the images. With the same time everything is the same."""
    if said.timestamp and message.timestamp == said.timestamp:
        return
    message.timestamp = said.timestamp
    fill_text(message, 'mountpoint', utf8(said.fs_id.mountpoint))
    fill_wrapped(message, {name: getattr(said, name).value if said.HasField(name) else None
                           for name in ('used_bytes', 'inodes_used')})


def fill_from_cri(message: Any, said: Any) -> None:
    """Memory and swap, whose messages have the same numbers and types in CRI. Merging writes in place, in a third of
    the time of field by field. What it leaves of the previous cycle shows by the size."""
    said.DiscardUnknownFields()
    data = said.SerializeToString()
    message.MergeFromString(data)
    if message.ByteSize() != len(data):
        message.Clear()
        message.MergeFromString(data)
    if BEYOND_SENSE_VARINT.search(data):
        for field, wrapper in message.ListFields():
            if field.type == field.TYPE_MESSAGE and wrapper.value >= BEYOND_SENSE:
                message.ClearField(field.name)


def fill_usage_from_cri(container: Container, stats: Optional[cri.ContainerStats]) -> None:
    """Of a container that has no group, or whose group is not read."""
    message, stats, sample = container.message, stats or cri.ContainerStats(), None
    for part, field in (('memory', 'memory_metrics'), ('swap', 'swap_metrics')):
        if stats.HasField(part):
            fill_from_cri(getattr(message, field), getattr(stats, part))
        elif message.HasField(field):
            message.ClearField(field)
    cpu = stats.cpu
    if cpu.HasField('usage_core_nano_seconds'):
        sample = UsageSample('cri', cpu.timestamp, cpu.usage_core_nano_seconds.value)
    fill_cpu_metrics(container, sample, cpu.timestamp, cpu.usage_nano_cores.value)
    if any(map(message.HasField, ('cpu_metrics', 'memory_metrics', 'swap_metrics'))):
        fill_text(message, 'stats_source', 'cri')
    elif message.HasField('stats_source'):
        message.ClearField('stats_source')


# --- OOM kills and exits

# How long after a SIGKILL the runtime may still change the reason to OOMKilled.
LATE_REASON_SECONDS = 60
OOM_KILLED = 'OOMKilled'


class History:
    """What is known of a pod, by its uid, beyond the lives of its containers: by name the kills and the last exit, as
    in a container's message; the kills by container; the kills that the pod's group has counted, how many of these
    no container has explained; whose reason was taken into account; and by id the names of the containers that had a
    group, and of those that lost it in the cycle before."""

    in_pod = unexplained = 0
    begun = False

    def __init__(self) -> None:
        self.names: Dict[str, wire.ContainerMetrics] = collections.defaultdict(
            lambda: wire.ContainerMetrics(oom_kills=0))
        self.kills: Counts = {}
        self.told: Set[str] = set()
        self.grouped: Dict[str, str] = {}
        self.lost: Dict[str, str] = {}


def history_key(pod: Pod) -> str:
    """The uid, which a pod's sandboxes share; of a pod that crictl has made without one, the sandbox's id."""
    return pod.message.uid or pod.message.id


def oom_kills_of(cgroup: wire.CgroupMetrics) -> Optional[int]:
    """How often the OOM killer came. With memory.oom.group, which the kubelet sets, oom_kill counts each process that
    dies with the first, and the first one twice."""
    events = cgroup.memory.events
    return known(events, 'oom_group_kill') or known(events, 'oom_kill')


def forget_histories(histories: Dict[str, History], uids: Set[str], ids: Set[str]) -> None:
    """Of the pods and containers that the runtime does not list any more."""
    for uid in histories.keys() - uids:
        del histories[uid]
    for history in histories.values():
        history.told &= ids
        for id in history.kills.keys() - ids:
            del history.kills[id]


def is_undecided(container: Container) -> bool:
    """Whether the runtime may still say why an exited container ended: it was not asked yet, or the SIGKILL may turn
    out to be an OOM kill."""
    status = container.message.status
    killed = status.exit_code == 128 + signal.SIGKILL and status.reason != OOM_KILLED
    late = killed and abs(time.time_ns() - status.finished_at_ns) < LATE_REASON_SECONDS * 10**9
    return container.state == cri.CONTAINER_EXITED and (late or container.asked_state != container.state)


def count_kills(history: History, id: str, name: str, count: int, at_ns: int) -> None:
    """Add kills of a container. `at_ns` is when the last one happened, 0 if that is not known."""
    if count <= 0:
        return
    history.kills[id] = history.kills.get(id, 0) + count
    history.unexplained -= count
    past = history.names[name]
    past.oom_kills += count
    # A time in the future is from before the clock was set back.
    if at_ns and not at_ns <= past.last_oom_kill_ns <= time.time_ns():
        past.last_oom_kill_ns = at_ns


def count_told_kills(history: History, messages: Iterable[wire.ContainerMetrics]) -> None:
    """The runtime says OOMKilled of containers whose groups are gone. Where the pod's group counts what happens below
    it, as on v2, their kills are those that are unexplained; else each has one, unless its group has told of one."""
    killed = [message for message in messages if message.status.reason == OOM_KILLED and message.id not in history.told]
    history.told.update(message.id for message in killed)
    killed.sort(key=lambda message: (message.id in history.kills, -message.status.finished_at_ns))
    unknown = sum(message.id not in history.kills for message in killed)
    for message in killed:
        first = message.id not in history.kills
        unknown -= first
        count = history.unexplained - unknown if history.in_pod else int(first)
        count_kills(history, message.id, message.name, count, message.status.finished_at_ns)


def count_lost_kills(history: History, containers: Iterable[Container], at_ns: int) -> None:
    """Kills that only the pod's group has counted are those of containers that lost their group in this cycle or the
    one before: one each, the rest to the first. The pod's group is read before theirs, and may tell of it late."""
    grouped = {container.message.id: container.message.name for container in containers if container.group}
    lost = {id: name for id, name in history.grouped.items() if id not in grouped}
    codes = {container.message.id: known(container.message.status, 'exit_code') for container in containers}
    suspects = {id: name for id, name in {**history.lost, **lost}.items()
                if codes.get(id) in (None, 128 + signal.SIGKILL)}
    for left, (id, name) in zip(reversed(range(len(suspects))), suspects.items()):
        count = max(history.unexplained - left, min(history.unexplained, 1)) if history.in_pod else 0
        count_kills(history, id, name, count, at_ns)
    history.grouped, history.lost = grouped, lost


def count_pod_kills(history: History, pods: Sequence[Pod], timestamp_ns: int) -> None:
    """A kill counts once, whoever tells of it first: the container's group while it lives, the pod's group, the
    runtime."""
    at_ns = timestamp_ns if history.begun else 0
    containers = [container for pod in pods for container in pod.containers.values()]
    messages = [container.message for container in containers]
    for message in messages:
        counted = oom_kills_of(message.cgroup) or 0
        count_kills(history, message.id, message.name, counted - history.kills.get(message.id, 0), at_ns)
    counts = [oom_kills_of(pod.message.cgroup) for pod in pods if pod.group]
    if not counts:
        # A group that was made anew begins with 0.
        history.in_pod = history.unexplained = 0
    in_pod = max((count for count in counts if count is not None), default=history.in_pod)
    history.unexplained += in_pod - history.in_pod if in_pod >= history.in_pod else in_pod
    history.in_pod = in_pod
    count_told_kills(history, messages)
    count_lost_kills(history, containers, at_ns)
    if history.in_pod and history.unexplained > 0 and messages and not any(map(is_undecided, containers)):
        gone = max(messages, key=lambda message: (
            history.names[message.name].last_exit.reason == OOM_KILLED, message.restart_count))
        count_kills(history, gone.id, gone.name, history.unexplained, at_ns)
    history.begun = True


def fill_history(history: History, pods: Sequence[Pod], timestamp_ns: int) -> None:
    """Of each container of a pod, which may have several sandboxes, what is known of its name."""
    messages = [container.message for pod in pods for container in pod.containers.values()]
    for message in messages:
        past, status = history.names[message.name], message.status
        older = 0 < status.finished_at_ns < past.last_exit.finished_at_ns <= timestamp_ns
        if status.HasField('exit_code') and not older:
            past.last_exit.CopyFrom(status)
    count_pod_kills(history, pods, timestamp_ns)
    for message in messages:
        past = history.names[message.name]
        if known(message, 'oom_kills') != past.oom_kills or message.last_exit != past.last_exit:
            message.ClearField('last_exit')
            message.MergeFrom(past)


def fill_histories(state: RuntimeState, cycle: Cycle) -> None:
    """Of the pods of which anything is to be told. A pod whose sandbox is replaced has two for a while."""
    timestamp_ns, by_uid = time.time_ns(), collections.defaultdict(list)
    restless = {history_key(pod) for pod in state.pods.values() if pod.restless}
    for pod in state.pods.values() if restless else ():
        by_uid[history_key(pod)].append(pod)

    def fill_first(pod: Pod) -> None:
        uid = history_key(pod)
        if uid not in restless or by_uid[uid][0] is not pod:
            return
        history = state.histories.setdefault(uid, History())
        fill_history(history, by_uid[uid], timestamp_ns)
        for each in by_uid[uid]:
            each.restless = bool(history.lost) or history.unexplained > 0 or any(
                map(is_undecided, each.containers.values()))

    if restless:
        each_pod(state.pods, fill_first, cycle)


# --- ephemeral storage

# The walker's share of one CPU: 5 ms a second measure 700 files.
WALK_SHARE = 0.005
ENTRIES_A_TURN = 256
# Each level keeps two files open.
MAX_DEPTH = 64
# Inodes with several names that are remembered in a walk; of the others each name counts its share.
MAX_LINKS = 1000
# How often the walker looks for pods, and how often what it has measured is put into the pods' messages.
NEW_PODS_SECONDS, STORAGE_SECONDS = 1, 4
POD_LOGS = '/var/log/pods'
DEFAULT_KUBELET_ROOT = '/var/lib/kubelet'
KUBELET_ROOT_FLAG = re.compile(r'--root-dir[=\0](/[^\0]+)')
DIRECTORY_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
STAT_BLOCK_BYTES = 512


class Measured(NamedTuple):
    """What is below a directory, itself included."""
    bytes: int
    inodes: int
    timestamp_ns: int
    incomplete: bool = False


class Walker:
    """Shared by the loop and the thread that measures: the parent directories of each pod by kind, the mount points to
    leave out, whose servers may never answer, and the results by kind and name. The thread alone has the walks under
    way, and when the next ones begin (monotonic clock)."""

    def __init__(self) -> None:
        self.pods: Mapping[str, Mapping[str, str]] = {}
        self.mountpoints: Set[str] = set()
        self.measured: Dict[str, Usages] = {}
        self.walks: Dict[str, Iterator[None]] = {}
        self.due: Dict[str, float] = {}


class Level(NamedTuple):
    """A directory that is being walked."""
    path: str
    descriptor: int
    entries: Any


def enter_directory(levels: List[Level], path: str, above: int) -> None:
    """From the one above, so that whoever writes there cannot lead it elsewhere. OSError, EMFILE where it is nested too
    deeply."""
    descriptor = os.open(os.path.basename(path), DIRECTORY_FLAGS, dir_fd=above)
    try:
        if len(levels) == MAX_DEPTH or descriptor > open_files_limit() - SPARE_DESCRIPTORS // 4:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        levels.append(Level(path, descriptor, os.scandir(descriptor)))
    except OSError:
        os.close(descriptor)
        raise


# By kind and name.
Usages = Dict[Tuple[str, str], Measured]


class Tally:
    """What a walk has counted, and which inodes with several names are among it."""

    blocks = inodes = 0
    incomplete = False

    def __init__(self) -> None:
        self.links: Set[int] = set()


def count_inode(tally: Tally, status: os.stat_result) -> None:
    """Under the first of its names; where too many are remembered, each name counts its share."""
    names = 1 if stat.S_ISDIR(status.st_mode) else status.st_nlink
    if status.st_ino in tally.links:
        return
    if names > 1 and len(tally.links) < MAX_LINKS:
        tally.links.add(status.st_ino)
        names = 1
    tally.blocks += status.st_blocks / names
    tally.inodes += 1 / names


def count_entry(tally: Tally, levels: List[Level], entry: os.DirEntry, device: int, mountpoints: Set[str]) -> None:
    """An entry of the innermost directory, which is entered if it is one. What is removed meanwhile does not count."""
    try:
        if mountpoints and f'{levels[-1].path}/{entry.name}' in mountpoints:
            return
        status = entry.stat(follow_symlinks=False)
        if status.st_dev == device:
            count_inode(tally, status)
            if stat.S_ISDIR(status.st_mode):
                enter_directory(levels, f'{levels[-1].path}/{entry.name}', levels[-1].descriptor)
    except OSError as error:
        tally.incomplete = tally.incomplete or error.errno != errno.ENOENT


def points_below(path: str, mountpoints: Set[str]) -> Set[str]:
    """Of a copy: the loop changes them."""
    return {point for point in list(mountpoints) if point.startswith(f'{path}/')}


def measure_directory(path: str, above: int, mountpoints: Set[str]) -> Generator[None, None, Measured]:
    """As du(1) does, without other file systems, some entries a turn. OSError."""
    levels, tally, inner = [], Tally(), points_below(path, mountpoints)
    enter_directory(levels, path, above)
    try:
        status = os.fstat(levels[0].descriptor)
        if status.st_dev != os.fstat(above).st_dev:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        count_inode(tally, status)
        for number in itertools.count(1):
            entry = next(levels[-1].entries, None)
            if entry:
                count_entry(tally, levels, entry, status.st_dev, inner)
            else:
                os.close(levels.pop().descriptor)
            if not levels:
                break
            if number % ENTRIES_A_TURN == 0:
                yield
                inner = points_below(path, mountpoints)
    finally:
        for level in levels:
            level.entries.close()
            os.close(level.descriptor)
    return Measured(round(tally.blocks * STAT_BLOCK_BYTES), round(tally.inodes), time.time_ns(), tally.incomplete)


def measure_children(kind: str, parent: str, measured: Usages,
                     mountpoints: Set[str]) -> Generator[None, None, Set[Tuple[str, str]]]:
    """Measure each directory in the parent, at least a turn each; which ones there are. OSError."""
    found, above = set(), os.open(parent, DIRECTORY_FLAGS)
    try:
        for path in {f'{parent}/{name}' for name in os.listdir(above)} - mountpoints:
            with contextlib.suppress(OSError):
                measured[kind, os.path.basename(path)] = yield from measure_directory(path, above, mountpoints)
                found.add((kind, os.path.basename(path)))
            yield
    finally:
        os.close(above)
    return found


def measure_pod(directories: Mapping[str, str], measured: Usages, mountpoints: Set[str]) -> Iterator[None]:
    found = set()
    for kind, parent in directories.items():
        # A ValueError where a name has a NUL.
        with contextlib.suppress(OSError, ValueError):
            found |= yield from measure_children(kind, parent, measured, mountpoints)
    for gone in measured.keys() - found:
        del measured[gone]


def begin_walks(walker: Walker, interval: float, now: float) -> None:
    """Start a walk for each pod that is due: one a pod, so that all get equal turns."""
    pods = walker.pods
    for uid in walker.due.keys() - pods.keys():
        del walker.due[uid], walker.measured[uid]
        walker.walks.pop(uid, None)
    for uid in pods.keys() - walker.walks.keys():
        if now >= walker.due.get(uid, 0):
            walker.due[uid] = now + interval
            walker.walks[uid] = measure_pod(pods[uid], walker.measured.setdefault(uid, {}), walker.mountpoints)


def take_turn(walker: Walker) -> None:
    uid = next(iter(walker.walks))
    walk = walker.walks.pop(uid)
    try:
        next(walk)
        walker.walks[uid] = walk
    except StopIteration:
        pass
    except Exception:
        log.exception('a bug in the walk of a directory')


def walk_directories(walker: Walker, interval: float, stopped: threading.Event) -> None:
    """The thread. After each turn it sleeps so long that it takes no more than its share of a CPU, and half of a slow
    disk's time."""
    pause, looked, used = 0.0, -math.inf, time.thread_time()
    while not stopped.wait(pause):
        began, now = used, time.monotonic()
        if now >= looked + NEW_PODS_SECONDS:
            looked = now
            begin_walks(walker, interval, now)
        if walker.walks:
            take_turn(walker)
        used = time.thread_time()
        pause = max((used - began) * (1 / WALK_SHARE - 1), time.monotonic() - now)
        pause = pause if walker.walks else max(pause, NEW_PODS_SECONDS)


def find_kubelet_root(state: RuntimeState, cycle: Cycle) -> str:
    """Where most volumes are mounted, else by its command line."""
    if not (state.kubelet_root or cycle.kubelet_roots):
        flag = KUBELET_ROOT_FLAG.search(cycle.read(f'/proc/{kubelet_pid(cycle)}/cmdline') or '')
        state.kubelet_root = flag.group(1) if flag else DEFAULT_KUBELET_ROOT
    return max(cycle.kubelet_roots, key=cycle.kubelet_roots.get, default=state.kubelet_root)


def pod_directories(pods: Iterable[wire.PodMetrics], root: str, cycle: Cycle) -> Dict[str, Dict[str, str]]:
    """By uid the directories that have a pod's logs, and its volumes on disk, by kind."""
    return {pod.uid: {'logs': cycle.path(f'{POD_LOGS}/{pod.namespace}_{pod.name}_{pod.uid}'),
                      'emptyDir': cycle.path(f'{root}/pods/{pod.uid}/volumes/{EMPTY_DIR}')}
            for pod in pods if pod.uid and '/' not in pod.namespace + pod.name + pod.uid}


def pod_usages(pod: wire.PodMetrics, measured: Usages, volumes: Iterable[Volume]) -> Usages:
    """By kind and name. A container and its exited predecessor have one name: their layers are summed."""
    usages = {}
    for container in pod.container_metrics:
        layer = container.file_system_metrics
        if layer.timestamp:
            size, inodes, *_ = usages.get(('layer', container.name), (0, 0))
            usages['layer', container.name] = Measured(
                size + layer.used_bytes.value, inodes + layer.inodes_used.value, layer.timestamp)
    usages.update(sorted(measured.items()))
    for volume in volumes:
        if volume.plugin == EMPTY_DIR and volume.usage.HasField('used'):
            inodes = volume.usage.inodes - volume.usage.inodes_free if volume.usage.HasField('inodes') else math.nan
            usages['memory', volume.name] = Measured(volume.usage.used, inodes, time.time_ns())
    return usages


def fill_storage_usage(message: wire.StorageUsage, usage: Tuple[Tuple[str, str], Measured]) -> None:
    (kind, name), measured = usage
    fill_text(message, 'kind', kind)
    fill_text(message, 'name', shown_name(name))
    put(message, 'bytes', measured.bytes)
    put(message, 'inodes', measured.inodes)
    put(message, 'timestamp_ns', measured.timestamp_ns)
    put(message, 'incomplete', measured.incomplete or math.nan)


def fill_volume(message: wire.PodVolume, volume: Volume) -> None:
    message.CopyFrom(wire.PodVolume(name=volume.name, plugin=volume.plugin, usage=volume.usage))


def fill_storage(message: wire.PodMetrics, measured: Usages, volumes: Sequence[Volume]) -> None:
    usages = pod_usages(message, measured, volumes)
    mounted = [volume for volume in volumes if volume.plugin != EMPTY_DIR]
    fill_list(message.ephemeral_storage.usages, list(usages.items())[:MAX_ROWS], fill_storage_usage)
    fill_list(message.volumes, mounted[:MAX_ROWS], fill_volume)
    count_left_out(message, 'storage', max(0, len(usages) - MAX_ROWS) + max(0, len(mounted) - MAX_ROWS))


def collect_storage(state: RuntimeState, options: Options, cycle: Cycle) -> None:
    """What the walker has measured, and what the mounts tell."""
    if cycle.now < state.storage_due:
        return
    state.storage_due, cycle.current = cycle.now + STORAGE_SECONDS, 'container runtime'
    root, walker = (options.kubelet_root or find_kubelet_root(state, cycle)).rstrip('/'), state.walker
    # In place: walks that take minutes see what is mounted meanwhile.
    walker.mountpoints |= cycle.mountpoints
    walker.mountpoints &= cycle.mountpoints
    walker.pods = pod_directories((pod.message for pod in state.pods.values()), root, cycle)
    # One mount for each name: CSI may have its own and the volume's.
    volumes = {(volume.uid, volume.plugin, volume.name): volume for volume in cycle.volumes if volume.root == root}
    by_uid = collections.defaultdict(list)
    for volume in volumes.values():
        by_uid[volume.uid].append(volume)
    each_pod(state.pods, lambda pod: fill_storage(
        pod.message, dict(walker.measured.get(pod.message.uid, {})), by_uid[pod.message.uid]), cycle)


# --- what the runtime is asked

# A statistics call may take longer than a cycle: a later cycle takes its answer, and none is started beside it.
STATS_TIMEOUT_SECONDS, STATS_LONGEST_PAUSE_SECONDS = 10, 300
# How long a cycle waits for an answer that only has the sizes of writable layers: the next one takes it as well.
SIZES_PATIENCE_SECONDS = 0.25
# How long pods stay in the snapshot as they were listed last.
LIST_VALID_SECONDS = 600
# How often the runtime is asked whether it is ready, and how many containers' exit codes it is asked for in a cycle.
CONDITIONS_SECONDS, STATUSES_PER_CYCLE = 15, 32
# What may fail on this side.
RUNTIME_SUBJECTS = ('container runtime', 'container statistics', 'container status', 'runtime health', 'cgroups',
                    'pod cgroups', 'pod networks', 'pods')


class RuntimeState:
    """The runtime, what it has listed and said, and what to ask it next and when (monotonic clock)."""

    runtime: Optional[Runtime] = None
    listed: Optional[wire.RuntimeMetrics] = None
    listed_at = 0.0
    conditions: Dict[str, bool] = {}
    image_file_systems: Sequence[cri.FilesystemUsage] = ()
    conditions_due = sizes_due = 0.0
    # The statistics call under way, time-outs in a row, and when the next call may begin.
    stats_call: Optional[StatsCall] = None
    stats_thread: Optional[threading.Thread] = None
    stats_timeouts = 0
    stats_due = 0.0
    # The tree of groups, the ids that have none in it, and when to search for these again.
    tree: Optional[CgroupTree] = None
    unfound: Set[str] = frozenset()
    search_due = 0.0
    # By its command line; and when the pods' messages are to have their storage anew.
    kubelet_root = ''
    storage_due = 0.0

    def __init__(self, description: str = '', walker: Optional[Walker] = None):
        self.walker = walker or Walker()
        # Of the runtime that was found last, for the log.
        self.description = description
        self.stats_calls: queue.SimpleQueue = queue.SimpleQueue()
        # What has failed of what is not asked in each cycle: it has not recovered before it is asked again.
        self.troubles: Failures = {}
        self.pods: Dict[str, Pod] = {}
        # By the pods' uids.
        self.histories: Dict[str, History] = {}

    def __del__(self) -> None:
        self.stats_calls.put(None)


def forget_runtime(state: RuntimeState) -> None:
    """Close the connection, so that the next cycle looks for a runtime again, and forget what this one has said; what
    was listed stays."""
    if state.runtime:
        state.runtime.channel.close()
    state.runtime = state.stats_call = None
    state.conditions, state.image_file_systems, state.troubles = {}, (), {}
    state.conditions_due = state.sizes_due = state.stats_due = 0.0
    state.stats_timeouts = 0


def count_states(enum: Any, listed: Iterable[Any]) -> Counts:
    return collections.Counter(enum_name(enum, item.state) for item in listed)


def run_stats_calls(calls: queue.SimpleQueue) -> None:
    """The thread for the calls that may take longer than a cycle."""
    for call in iter(calls.get, None):
        try:
            call.answer = cri_method(call.runtime, 'ListContainerStats')(b'', timeout=STATS_TIMEOUT_SECONDS)
        except (grpc.RpcError, ValueError) as error:
            # A ValueError where the channel was closed meanwhile.
            call.error = error
        call.finished.set()


def start_stats(state: RuntimeState, cycle: Cycle) -> None:
    """Begin the statistics call, unless it is under way or the runtime is left alone."""
    if state.stats_call is None and cycle.now < state.stats_due:
        cycle.failed('container statistics', f'ListContainerStats: paused after {state.stats_timeouts} time-outs')
    elif state.stats_call is None:
        try:
            state.stats_thread = state.stats_thread or start_thread(run_stats_calls, state.stats_calls)
            state.stats_call = StatsCall(state.runtime)
            state.stats_calls.put(state.stats_call)
        except RuntimeError as error:
            cycle.failed('container statistics', error)


def fetch_stats(state: RuntimeState, needed: bool, cycle: Cycle) -> Dict[str, cri.ContainerStats]:
    """The statistics by container id, or none; hardly waited for where nothing but sizes is needed. The first time-out
    may be chance; from the second on the runtime is left alone for longer and longer. containerd before 2.1 fails the
    whole call when one container vanishes during it: it is tried once more, at once."""
    subject = 'container statistics'
    for _ in range(2):
        start_stats(state, cycle)
        call = state.stats_call
        if call is None:
            break
        patience = cycle.seconds_left() if needed else SIZES_PATIENCE_SECONDS if call.started >= cycle.now else 0
        if not call.finished.wait(patience):
            if needed or time.monotonic() > call.started + CRI_LONGEST_SECONDS:
                cycle.failed(subject, 'ListContainerStats: no answer in time')
            break
        state.stats_call = None
        try:
            stats = fetch_result('ListContainerStats', call.started, call.result, cycle).stats
            cycle.failures.pop(subject, None)
            state.troubles.pop(subject, None)
            state.stats_timeouts = 0
            return {utf8(entry.attributes.id): entry for entry in stats}
        except CriError as error:
            state.troubles[subject] = str(error)
            if error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
                state.stats_timeouts += 1
                pause = STATS_TIMEOUT_SECONDS * 2 ** (state.stats_timeouts - 2) if state.stats_timeouts > 1 else 0
                state.stats_due = cycle.now + min(STATS_LONGEST_PAUSE_SECONDS, pause)
                break
            state.stats_timeouts = 0
    return {}


def is_stale(container: Container, again: bool) -> bool:
    """Whether to ask for a container's status: not asked in this state; or, `again`, now and then, where there was no
    answer or the runtime may yet learn more."""
    return container.asked_state != container.state or again and (
        is_undecided(container) or not container.message.HasField('status'))


def stale_containers(pods: Iterable[Pod], again: bool) -> List[Tuple[Pod, Container]]:
    """Whose status to ask for, one of each pod and then another one, beginning with the pod that has waited longest: a
    crash loop must not keep the others waiting. Of a pod those first that have exited: people look for the reason."""
    ranked = []
    for pod in pods:
        stale = [container for container in pod.containers.values() if is_stale(container, again)]
        stale.sort(key=lambda container: container.state != cri.CONTAINER_EXITED)
        ranked += [(rank, pod, container) for rank, container in enumerate(stale)]
    ranked.sort(key=lambda item: (item[0], item[1].asked, item[2].state != cri.CONTAINER_EXITED))
    return [(pod, container) for _, pod, container in ranked]


def fetch_statuses(state: RuntimeState, again: bool, cycle: Cycle) -> None:
    """The status of each container in its present state, for some containers a cycle."""
    stale = stale_containers(state.pods.values(), again)
    if stale:
        state.troubles.pop('container status', None)
    for pod, container in stale[:STATUSES_PER_CYCLE]:
        container.asked_state, pod.asked = container.state, cycle.now
        try:
            request = cri.ContainerStatusRequest(container_id=container.message.id).SerializeToString()
            answer = fetch(state.runtime, 'ContainerStatus', cycle, request)
        except CriError as error:
            # A container that is gone by now is no trouble.
            if error.code not in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNKNOWN):
                state.troubles['container status'] = str(error)
            if error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
                container.asked_state = None
                break
            continue
        status, pod.restless = answer.status, True
        if answer.HasField('status') and status.state != container.state:
            # It has changed since the list.
            container.asked_state = None
            continue
        # Go's zero time is below 0.
        fill(container.message.status, {
            'started_at_ns': status.started_at or None, 'finished_at_ns': status.finished_at or None})
        if status.state == cri.CONTAINER_EXITED:
            container.message.status.exit_code = status.exit_code
        fill_known(container.message.status, reason=utf8(status.reason) or None)


def fetch_health(state: RuntimeState, conditions_due: bool, sizes_due: bool, cycle: Cycle) -> None:
    """Whether the runtime calls itself ready, and what its images take. An old answer stays until there is a new
    one."""
    images = state.runtime._replace(service=state.runtime.service.replace('RuntimeService', 'ImageService'))
    for runtime, method, due in ((state.runtime, 'Status', conditions_due), (images, 'ImageFsInfo', sizes_due)):
        subject = f'runtime health: {method}'
        try:
            answer = fetch(runtime, method, cycle) if due else None
        except CriError as error:
            state.troubles[subject] = str(error)
            continue
        if answer is not None:
            state.troubles.pop(subject, None)
        if answer is not None and method == 'Status':
            state.conditions = {utf8(condition.type): condition.status for condition in answer.status.conditions}
        elif answer is not None:
            state.image_file_systems = answer.image_filesystems


def update_from_runtime(state: RuntimeState, options: Options, cycle: Cycle) -> bool:
    """Bring the pods up to the runtime's lists; False where it does not answer. A runtime that is only late keeps its
    connection: each new one would wait in the socket of a stopped runtime."""
    if state.runtime and read_socket_inode(state.runtime.socket) != state.runtime.inode:
        forget_runtime(state)
    cycle.current = 'container runtime'
    try:
        runtime = state.runtime or find_runtime(*collect_endpoints(options.cri_socket, cycle),
                                                [options.cri_socket_uid], cycle)
        state.runtime = runtime
        description = f'{runtime.name} {runtime.version} at {runtime.socket} ({runtime.service})'
        if description != state.description:
            log.info('container runtime: %s', description)
        state.description = description
        sandboxes = fetch(runtime, 'ListPodSandbox', cycle).items
        containers = fetch(runtime, 'ListContainers', cycle).containers
    except CriError as error:
        cycle.failed('container runtime', error)
        if error.code is not grpc.StatusCode.DEADLINE_EXCEEDED:
            forget_runtime(state)
        return False
    update_pods(state.pods, sandboxes, containers, cycle)
    forget_histories(state.histories, {utf8(sandbox.metadata.uid) for sandbox in sandboxes}
                     | {*map(history_key, state.pods.values())},
                     {utf8(container.id) for container in containers})
    state.listed_at, state.listed = cycle.now, wire.RuntimeMetrics(
        name=runtime.name, version=runtime.version, socket=runtime.socket, service=runtime.service,
        listed_at_ns=time.time_ns(), sandboxes=count_states(cri.PodSandboxState, sandboxes),
        containers=count_states(cri.ContainerState, containers))
    return True


def forget_gone(pods: Dict[str, Pod]) -> None:
    """While the runtime does not answer, pods and running containers that had a group and have none are left out."""
    for id in [id for id, pod in pods.items() if pod.had_group and pod.group is None]:
        del pods[id]
    for pod in pods.values():
        remove_containers(pod, [container.message.id for container in pod.running()
                                if container.had_group and container.group is None])


def fetch_details(state: RuntimeState, options: Options, message: wire.RuntimeMetrics,
                  cycle: Cycle) -> Dict[str, cri.ContainerStats]:
    """What else the runtime is asked: the statistics by container id, where no cgroup has them, and now and then for
    the sizes of the writable layers, which nobody else knows; exit codes; whether it is ready."""
    conditions_due, sizes_due = cycle.now >= state.conditions_due, cycle.now >= state.sizes_due
    containers = [container for pod in state.pods.values() for container in pod.containers.values()]
    needed = any(container.group is None and container.state == cri.CONTAINER_RUNNING for container in containers)
    if needed or sizes_due:
        start_stats(state, cycle)
    fetch_statuses(state, conditions_due, cycle)
    state.conditions_due = cycle.now + CONDITIONS_SECONDS if conditions_due else state.conditions_due
    state.sizes_due = cycle.now + options.fs_stats_interval if sizes_due else state.sizes_due
    fetch_health(state, conditions_due, sizes_due, cycle)
    message.conditions.update(state.conditions)
    fill_list(message.image_file_systems, state.image_file_systems, fill_file_system)
    return fetch_stats(state, needed, cycle) if state.stats_call else {}


def fill_usage(pod: Pod, stats: Mapping[str, cri.ContainerStats]) -> None:
    for container in pod.containers.values():
        said = stats.get(container.message.id)
        # A layer with timestamp 0 is not measured yet (containerd's first 10 s).
        if said and said.writable_layer.timestamp:
            fill_file_system(container.message.file_system_metrics, said.writable_layer)
        if container.group:
            fill_usage_from_cgroup(container)
        else:
            # CRI-O has numbers of one that was never started, too.
            fill_usage_from_cri(container, said if container.state == cri.CONTAINER_RUNNING else None)


def collect_pods(metrics: wire.Metrics, options: Options, state: RuntimeState, cycle: Cycle) -> None:
    """The pods and the runtime's state. While the runtime does not answer, they are those that it listed last, with
    what the kernel says of them now."""
    answers = update_from_runtime(state, options, cycle)
    if not answers and cycle.now >= state.listed_at + LIST_VALID_SECONDS:
        state.listed, state.pods, state.walker.pods = None, {}, {}
    if state.listed is None:
        return
    message = metrics.node_metrics.container_runtime
    message.CopyFrom(state.listed)
    if options.container_stats == 'cgroup':
        collect_groups(state, cycle)
    if not answers:
        forget_gone(state.pods)
    stats = fetch_details(state, options, message, cycle) if answers else {}
    for subject, error in state.troubles.items():
        cycle.failures.setdefault(subject, error)
    each_pod(state.pods, lambda pod: fill_usage(pod, stats), cycle)
    fill_histories(state, cycle)
    collect_storage(state, options, cycle)
    messages = [pod.message for pod in state.pods.values()]
    messages.sort(key=lambda pod: (pod.namespace, pod.name, pod.created_at))
    for pod in messages:
        # extend() serialises and parses, in twice the time.
        metrics.pod_metrics.add().CopyFrom(pod)
    paths = collect_endpoints(options.cri_socket, cycle)[0] if answers and not state.pods else ()
    if any(path != state.runtime.socket and read_socket_inode(path) for path in paths):
        # A second runtime may have come up that has the sandboxes (k3s's after Docker's).
        forget_runtime(state)


# --- a snapshot that is too large

# The relay's contract has the fields below; the others are this agent's own.
FIRST_OWN_FIELD = 100
# What is left out of a snapshot that is too large, one step after the other: what it is called, and the own fields that
# containers and pods keep. At the first step containers that run keep all; after the last there are no pods.
POD_FIELDS = tuple(name for name in field_names(wire.PodMetrics) if name != 'labels')
LEFT_OUT = (('fields from 100 up of containers that do not run', (), (*POD_FIELDS, 'labels')),
            ('fields from 100 up of containers, but for three', ('restart_count', 'status', 'image_ref', 'labels'),
             (*POD_FIELDS, 'labels')),
            ('labels', ('restart_count', 'status', 'image_ref'), POD_FIELDS),
            ('fields from 100 up of pods and containers', (), ()),
            ('pods', (), ()))


def keep_own(message: Any, kept: Sequence[str]) -> None:
    """Of the own fields these alone."""
    for field in message.DESCRIPTOR.fields:
        if field.number >= FIRST_OWN_FIELD and field.name not in kept:
            message.ClearField(field.name)


def leave_out(metrics: wire.Metrics, step: int) -> None:
    metrics.agent_metrics.left_out, of_containers, of_pods = LEFT_OUT[step]
    if step == len(LEFT_OUT) - 1:
        del metrics.pod_metrics[:]
    for pod in metrics.pod_metrics:
        keep_own(pod, of_pods)
        for container in (item for item in pod.container_metrics if step or item.state != 'CONTAINER_RUNNING'):
            keep_own(container, of_containers)


def serialize(metrics: wire.Metrics, max_bytes: int) -> Tuple[bytes, Failures]:
    """A snapshot as the relay accepts it. On a node that is too large, in which case a failure says so, it has less and
    less, down to the node alone, which has the counts."""
    data, step = metrics.SerializeToString(), 0
    while len(data) > max_bytes and step < len(LEFT_OUT):
        if step == 0:
            # Others show it whole.
            whole, metrics = metrics, wire.Metrics()
            metrics.CopyFrom(whole)
        leave_out(metrics, step)
        data, step = metrics.SerializeToString(), step + 1
    left_out = ', '.join(what for what, *_ in LEFT_OUT[:step])
    return data, {'snapshot': f'above {max_bytes} bytes: without {left_out}'} if step else {}


def shrunk(data: bytes, max_bytes: int) -> bytes:
    """A snapshot that was taken before it was known what the relay accepts."""
    try:
        return data if len(data) <= max_bytes else serialize(wire.Metrics.FromString(data), max_bytes)[0]
    except DecodeError:
        return data


# --- spool

# One file for each record: a header, the snapshot, which is zlib's where it is shorter than the header says, and a
# CRC-32 of both. The length or the CRC tells a record that was torn by a crash, or has rotted. Nothing is synced: a
# record outlives the agent, not a power cut.
RECORD = struct.Struct('<4sIIdd36s')
RECORD_MAGIC = b'KSR1'
RECORD_CRC = struct.Struct('<I')
RECORD_SUFFIX = '.snapshot'
RECORD_NAME = re.compile(r'(\d{16})' + re.escape(RECORD_SUFFIX), re.ASCII)
BLOCK_BYTES = 4096
# How long to wait for an agent that is just being replaced to release the spool.
SPOOL_PATIENCE_SECONDS = 10


class Record(NamedTuple):
    """The header of a record: when it was taken by both clocks, since the monotonic one starts anew with each boot."""
    magic: bytes
    stored_bytes: int
    plain_bytes: int
    monotonic: float
    wall: float
    boot_id: bytes


def record_path(directory: str, number: int) -> str:
    return os.path.join(directory, f'{number:016d}{RECORD_SUFFIX}')


def parse_record(data: bytes) -> Tuple[Record, bytes]:
    """The header and the snapshot of a record. ValueError where it is not what was written."""
    if len(data) < RECORD.size + RECORD_CRC.size:
        raise ValueError(f'record: {len(data)} bytes are not even a header')
    header, stored = Record(*RECORD.unpack_from(data)), data[RECORD.size:-RECORD_CRC.size]
    if header.magic != RECORD_MAGIC or header.stored_bytes != len(stored):
        raise ValueError(f'record: torn: {len(stored)} bytes of {header.stored_bytes}')
    if RECORD_CRC.unpack(data[-RECORD_CRC.size:])[0] != zlib.crc32(data[:-RECORD_CRC.size]):
        raise ValueError('record: its CRC differs')
    return header, stored


def read_record(directory: str, number: int) -> Tuple[Record, bytes]:
    """ValueError or OSError where it is gone or damaged."""
    with open(record_path(directory, number), 'rb') as file:
        return parse_record(file.read())


def write_record(directory: str, number: int, header: Record, stored: bytes) -> None:
    """OSError where the disk is full or broken; nothing of the record stays then."""
    data = RECORD.pack(*header) + stored
    data += RECORD_CRC.pack(zlib.crc32(data))
    try:
        with open(os.open(record_path(directory, number), NEW_FILE_FLAGS, 0o600), 'wb', buffering=0) as file:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        remove_record(directory, number)
        raise


def remove_record(directory: str, number: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(record_path(directory, number))


def open_spool(directory: str, patience_seconds: float = 0) -> int:
    """Make the directory this agent's own, 0700, until the returned lock is closed, or the process ends. A directory
    that others write to or share is left as it is. UnsafePath or OSError."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    check_path(directory)
    mode = os.stat(directory).st_mode
    foreign = next((name for name in os.listdir(directory) if not RECORD_NAME.fullmatch(name)), None)
    if mode & 0o022 or mode & 0o055 and foreign:
        raise UnsafePath(f'{directory} is shared with others (mode {mode & 0o7777:o}): name a directory of its own')
    os.chmod(directory, 0o700)
    give_up = time.monotonic() + patience_seconds
    while True:
        lock = lock_directory(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is not None:
            return lock
        if time.monotonic() >= give_up:
            raise UnsafePath(f'{directory} is in use by another agent')
        time.sleep(0.1)


def record_age(header: Record, boot_id: bytes, monotonic: float, wall: float) -> float:
    """Seconds since a record was taken; by the wall clock only if the machine was booted since."""
    return max(0.0, monotonic - header.monotonic if header.boot_id == boot_id else wall - header.wall)


# --- backlog

# The relay refuses a larger message (grpc-go's default) and ends the stream: those behind it would never arrive.
MAX_SNAPSHOT_BYTES = 4 << 20
MAX_STREAM_SNAPSHOTS = 50
# What a stream may have in memory, beyond its first snapshot.
MAX_STREAM_BYTES = 8 << 20
# zlib's level 6 leaves 11 to 29 % of a snapshot, for 1 to 2 ms per 100 kB.
COMPRESSION_LEVEL = 6
DROP_CAUSES = ('retention', 'size', 'too large', 'damaged', 'refused')


class Snapshot(NamedTuple):
    """A serialised Metrics message that waits: its bytes, compressed where they are fewer than it has; None where
    they are in the spool, under its number."""
    number: int
    taken: float
    plain_bytes: int
    stored_bytes: int
    stored: Optional[bytes]

    @property
    def memory_bytes(self) -> int:
        return 0 if self.stored is None else self.stored_bytes

    @property
    def spool_bytes(self) -> int:
        """File systems allocate whole blocks."""
        return 0 if self.stored is not None else -(-self.stored_bytes // BLOCK_BYTES) * BLOCK_BYTES


class Backlog:
    """The snapshots that the relay has not acknowledged, oldest first, between the collecting thread and the sending
    one."""

    memory_bytes = spool_bytes = 0
    next_number = 1
    max_snapshot_bytes = MAX_SNAPSHOT_BYTES
    # Seconds for each snapshot of a catch-up.
    pace_seconds = 0.0
    # Closed when time is up, which cancels the stream under way.
    channel: Optional[grpc.Channel] = None
    sent = acknowledged = acknowledged_number = connections = 0
    last_acknowledged: Optional[float] = None

    def __init__(self, retention_seconds: float, max_bytes: float = math.inf, spool: Optional[str] = None,
                 spool_max_bytes: float = math.inf):
        self.retention_seconds, self.max_bytes = retention_seconds, max_bytes
        self.spool, self.spool_max_bytes = spool, spool_max_bytes
        self.snapshots: Deque[Snapshot] = collections.deque()
        self.boot_id = (read_line(BOOT_ID) or '').encode()[:36].ljust(36)
        self.changed = threading.Condition()
        self.closing, self.given_up = threading.Event(), threading.Event()
        self.dropped: Counts = dict.fromkeys(DROP_CAUSES, 0)
        # What was dropped since the last snapshot was added.
        self.failures: Failures = {}


def append_snapshot(backlog: Backlog, snapshot: Snapshot) -> None:
    """The caller has the lock."""
    backlog.snapshots.append(snapshot)
    backlog.memory_bytes += snapshot.memory_bytes
    backlog.spool_bytes += snapshot.spool_bytes


def remove_snapshot(backlog: Backlog, snapshot: Snapshot, cause: Optional[str] = None) -> None:
    """Forget a snapshot, and count it where it was not delivered. The caller has the lock."""
    backlog.snapshots.remove(snapshot)
    backlog.memory_bytes -= snapshot.memory_bytes
    backlog.spool_bytes -= snapshot.spool_bytes
    if snapshot.stored is None:
        remove_record(backlog.spool, snapshot.number)
    if cause:
        backlog.dropped[cause] += 1


def load_spool(backlog: Backlog) -> None:
    """Take over what earlier runs have left, oldest first. A record that is not whole is dropped. Foreign files
    stay."""
    monotonic, wall, reasons = time.monotonic(), time.time(), []
    matches = map(RECORD_NAME.fullmatch, os.listdir(backlog.spool))
    numbers = sorted(int(match.group(1)) for match in matches if match)
    for number in numbers:
        try:
            header = read_record(backlog.spool, number)[0]
        except (OSError, ValueError) as error:
            reasons.append(f'{os.path.basename(record_path(backlog.spool, number))}: {error}')
            remove_record(backlog.spool, number)
            continue
        taken = monotonic - record_age(header, backlog.boot_id, monotonic, wall)
        append_snapshot(backlog, Snapshot(number, taken, header.plain_bytes, header.stored_bytes, None))
    backlog.next_number = max(numbers, default=0) + 1
    if reasons:
        backlog.dropped['damaged'] += len(reasons)
        log.warning('spool: %s: damaged records, dropped: %d, the first %s', backlog.spool, len(reasons), reasons[0])


def drop_excess(backlog: Backlog, now: float) -> None:
    """Drop the oldest beyond the retention and the sizes. The caller has the lock."""
    while backlog.snapshots and now - backlog.snapshots[0].taken > backlog.retention_seconds:
        remove_snapshot(backlog, backlog.snapshots[0], 'retention')
        backlog.failures['backlog'] = f'dropping snapshots older than {backlog.retention_seconds / 60:g} min'
    for size, limit, reached in (('memory_bytes', backlog.max_bytes, 'those in memory have reached --buffer-max-size'),
                                 ('spool_bytes', backlog.spool_max_bytes, 'the spool has reached --spool-max-size')):
        while getattr(backlog, size) > limit:
            remove_snapshot(backlog, next(item for item in backlog.snapshots if getattr(item, size)), 'size')
            backlog.failures['backlog size'] = f'dropping the oldest snapshots: {reached}'


def add_snapshot(backlog: Backlog, data: bytes) -> Failures:
    """Put a snapshot at the end; what went wrong, by subject. One that waits behind others is compressed; one that the
    disk does not take stays in memory."""
    now, failures, stored = time.monotonic(), {}, data
    if len(data) > backlog.max_snapshot_bytes:
        with backlog.changed:
            backlog.dropped['too large'] += 1
        return {'snapshot': f'dropped: {len(data)} bytes are more than the {backlog.max_snapshot_bytes} that the relay '
                            'accepts'}
    if backlog.snapshots:
        stored = min(data, zlib.compress(data, COMPRESSION_LEVEL), key=len)
    with backlog.changed:
        snapshot = Snapshot(backlog.next_number, now, len(data), len(stored), stored)
        backlog.next_number += 1
        if backlog.spool is not None:
            header = Record(RECORD_MAGIC, len(stored), len(data), now, time.time(), backlog.boot_id)
            try:
                write_record(backlog.spool, snapshot.number, header, stored)
                snapshot = snapshot._replace(stored=None)
            except OSError as error:
                failures['spool'] = f'{backlog.spool} cannot be written ({error.strerror}): keeping snapshots in memory'
        append_snapshot(backlog, snapshot)
        drop_excess(backlog, now)
        failures.update(backlog.failures)
        backlog.failures = {}
        backlog.changed.notify()
    return failures


def load_snapshot(backlog: Backlog, snapshot: Snapshot) -> Optional[bytes]:
    """The bytes to send; None where the spool has lost or damaged them, or they have been dropped meanwhile."""
    try:
        stored = read_record(backlog.spool, snapshot.number)[1] if snapshot.stored is None else snapshot.stored
        return stored if snapshot.stored_bytes == snapshot.plain_bytes else zlib.decompress(stored)
    except (OSError, ValueError, zlib.error) as error:
        with backlog.changed, contextlib.suppress(ValueError):
            remove_snapshot(backlog, snapshot, 'damaged')
            log.warning('spool: %s: %s: dropped', record_path(backlog.spool, snapshot.number), error)
        return None


def next_batch(backlog: Backlog, limit: int, aside: Set[int], verify: bool = False) -> List[Snapshot]:
    """Wait for snapshots, and give the oldest of them, of those that are set aside or of the others; none when the
    backlog is closing and empty."""
    with backlog.changed:
        while not backlog.snapshots and not backlog.closing.is_set():
            backlog.changed.wait()
        drop_excess(backlog, time.monotonic())
        waiting: Iterable[Snapshot] = [item for item in backlog.snapshots if (item.number in aside) == verify]
        if not waiting:
            # They are gone; or all are set aside: then it is not about one message.
            aside.clear()
            waiting = backlog.snapshots
        batch, size = [], 0
        for snapshot in itertools.islice(waiting, limit):
            size += snapshot.plain_bytes
            if batch and size > MAX_STREAM_BYTES:
                break
            batch.append(snapshot)
        return batch


def forget_snapshots(backlog: Backlog, batch: Sequence[Snapshot], cause: Optional[str] = None) -> None:
    """Remove what has been delivered, or cannot be; some of it may have been dropped meanwhile."""
    with backlog.changed:
        for snapshot in batch:
            with contextlib.suppress(ValueError):
                remove_snapshot(backlog, snapshot, cause)


# --- TLS

TLS_PROBE_SECONDS = 3
# Debian, RHEL, SUSE, Alpine; SSL_CERT_FILE names another. grpc's default is a list of its own.
SYSTEM_ROOTS = ('/etc/ssl/certs/ca-certificates.crt', '/etc/pki/tls/certs/ca-bundle.crt', '/etc/ssl/ca-bundle.pem',
                '/etc/ssl/cert.pem')
# How OpenSSL reports an answer in plain text, or a server that hangs up during the handshake.
NO_TLS = frozenset(('WRONG_VERSION_NUMBER', 'RECORD_LAYER_FAILURE', 'PACKET_LENGTH_TOO_LONG', 'HTTP_REQUEST',
                    'UNEXPECTED_EOF_WHILE_READING'))


class Relay(NamedTuple):
    """How the relay is reached; the files are read again for each connection."""
    address: str
    tls: bool = False
    ca: Optional[str] = None
    cert: Optional[str] = None
    key: Optional[str] = None
    server_name: Optional[str] = None
    token_file: Optional[str] = None


class RelayError(Exception):
    """Why the files given do not make a connection to the relay: one line that names the file."""


def read_relay_file(flag: str, path: Optional[str]) -> Optional[bytes]:
    """None without a path. RelayError. Whoever opens a pipe may wait for ever."""
    try:
        if path and not stat.S_ISREG(os.stat(path).st_mode):
            raise RelayError(f'{flag} {path}: is not a file')
        with open(path, 'rb') if path else contextlib.nullcontext() as file:
            return file and file.read()
    except OSError as error:
        raise RelayError(f'{flag} {path}: {error.strerror}') from None


def ca_file(relay: Relay) -> Tuple[str, str]:
    """The flag to blame and the file of the certificates to trust. RelayError where the system has none."""
    if relay.ca:
        return '--relay-ca', relay.ca
    named = os.environ.get('SSL_CERT_FILE')
    roots = named or next(filter(os.path.exists, SYSTEM_ROOTS), None)
    try:
        if named:
            check_file(named)
    except (OSError, UnsafePath) as error:
        raise RelayError(f'--relay-tls: SSL_CERT_FILE: {error}') from None
    if not roots:
        raise RelayError(f'--relay-tls: no system roots at {", ".join(SYSTEM_ROOTS)} (--relay-ca FILE names some)')
    return '--relay-tls', roots


def relay_files_signature(relay: Relay) -> Tuple[Any, ...]:
    """Differs when one of the files has changed, or a symbolic link points elsewhere."""
    signature = []
    for path in filter(None, (relay.ca, relay.cert, relay.key, relay.token_file)):
        try:
            status = os.stat(path)
            signature.append((status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size))
        except OSError as error:
            signature.append(error.errno)
    return tuple(signature)


def split_address(address: str) -> Tuple[str, str]:
    """Host, without brackets and the dot of the root, and port."""
    host, _, port = address.lower().rpartition(':')
    return host.strip('[]').rstrip('.'), port


def ip_of(host: str) -> Any:
    """The IP address, in any spelling that connect(2) would take (127.1); None for a name."""
    import ipaddress
    with contextlib.suppress(OSError):
        return ipaddress.IPv4Address(socket.inet_aton(host))
    try:
        ip = ipaddress.IPv6Address(host)
        return ip.ipv4_mapped or ip
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    ip = ip_of(host)
    return host == 'localhost' or ip is not None and ip.is_loopback


def log_exposure(relay: Relay, level: int = logging.WARNING) -> None:
    """What is unsafe about the way to the relay: secret files that other users can read, and plain text."""
    for path in filter(None, (relay.key, relay.token_file)):
        with contextlib.suppress(OSError):
            if os.stat(path).st_mode & 0o044:
                log.log(level, '%s can be read by other users: `chmod go-r %s` fixes it', path, path)
    if not relay.tls and not is_loopback(split_address(relay.address)[0]):
        log.log(level, 'relay %s: snapshots go there in plain text (--relay-tls)', relay.address)


def tls_context(relay: Relay) -> ssl.SSLContext:
    """The same files loaded by Python's ssl, which unlike grpc says what is wrong with them. RelayError does so."""
    import ssl
    context, (flag, roots) = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ca_file(relay)
    context.set_alpn_protocols(['h2'])
    try:
        context.load_verify_locations(roots)
    except (OSError, ValueError):
        raise RelayError(f'{flag} {roots}: has no certificate in PEM format') from None
    try:
        if relay.cert:
            context.load_cert_chain(relay.cert, relay.key, password=lambda: b'')
    except (OSError, ValueError) as error:
        mismatch = getattr(error, 'reason', None) == 'KEY_VALUES_MISMATCH'
        why = ('the key is not that of the certificate' if mismatch else
               'not a certificate and its key, unencrypted, in PEM format')
        raise RelayError(f'--relay-cert {relay.cert}, --relay-key {relay.key}: {why}') from None
    return context


def explain_tls(relay: Relay) -> Optional[str]:
    """Why the handshake fails, in the words of Python's ssl; None where it succeeds."""
    import ssl
    host, _, port = relay.address.rpartition(':')
    name = relay.server_name or host.strip('[]')
    about = f' (--relay-cert {relay.cert})' if relay.cert else ' (no --relay-cert was given)'
    try:
        with socket.create_connection((host.strip('[]'), int(port)), TLS_PROBE_SECONDS) as plain:
            with tls_context(relay).wrap_socket(plain, server_hostname=name) as tls:
                # In TLS 1.3 the verdict on our certificate comes after the handshake; grpc's C core does not pass it
                # on.
                return None if tls.recv(1) else f'the relay hangs up after the TLS handshake{about}'
    except ssl.SSLCertVerificationError as error:
        return f"the relay's certificate, checked against {' '.join(ca_file(relay))}: {error.verify_message}"
    except ssl.SSLError as error:
        if error.reason in NO_TLS or isinstance(error, ssl.SSLEOFError):
            return 'it does not seem to speak TLS'
        alert = (error.reason or str(error)).replace('_', ' ').lower()
        return f'TLS: {alert}' + (about if 'certificate' in alert or 'unknown ca' in alert else '')
    except (OSError, RelayError):
        return None


# --- relay

SEND_METRICS = '/metrics.MetricsService/SendMetrics'
SEND_TIMEOUT_SECONDS = 20
BACKOFF_FIRST_SECONDS, BACKOFF_LONGEST_SECONDS = 0.5, 30
# For the last attempt when the agent stops, and for all attempts of --once.
LAST_ATTEMPT_SECONDS, ONCE_DELIVERY_SECONDS = 5, 10
# In place of a status code, where the files do not even allow an attempt, or no thread can be started.
NOT_CONNECTED, NO_THREAD = 'not connected', 'no thread'
NO_CONNECTION = re.compile('failed to connect|resolution failed', re.IGNORECASE)
# What may be about a message that was sent. The other codes are about the way.
ABOUT_THE_MESSAGE = frozenset(('ABORTED', 'DATA_LOSS', 'FAILED_PRECONDITION', 'INTERNAL', 'INVALID_ARGUMENT',
                               'OUT_OF_RANGE', 'RESOURCE_EXHAUSTED', 'UNKNOWN'))
# How often a snapshot is refused alone before the others are tried.
REFUSALS = 3
# How often it is refused right after another one was taken before it is dropped: once for a reason that is surely its
# own, more often for one that may be the relay's.
TOO_LARGE_FOR_HTTP, SMALLEST_LIMIT_BYTES = 'status: 413', 1 << 18
SURE_REASON = re.compile(f'INVALID_ARGUMENT|OUT_OF_RANGE|FAILED_PRECONDITION|DATA_LOSS|.*{TOO_LARGE_FOR_HTTP}')
PROOFS = 3
# After so many batches a size that was once refused is tried again.
LARGER_AFTER_BATCHES = 10


class Connection(NamedTuple):
    """A channel to the relay, what goes with each stream, and the state of the files that both were made from."""
    channel: grpc.Channel
    metadata: Sequence[Tuple[str, str]]
    signature: Tuple[Any, ...]


class SendError(NamedTuple):
    """Why the relay has not acknowledged a batch: gRPC's status code, or the step before there was one; and how many
    snapshots were sent by then."""
    code: str
    details: str
    sent: int = 0

    def is_too_large(self) -> bool:
        """grpc-go says `received message larger than max`, the C core `Received message larger than max`."""
        return self.code == 'RESOURCE_EXHAUSTED' and 'message larger than max' in self.details


def backoff_seconds(failures: int) -> float:
    """Exponential back-off with full jitter after so many failures in a row."""
    return random.uniform(0, min(BACKOFF_LONGEST_SECONDS, BACKOFF_FIRST_SECONDS * 2 ** min(failures - 1, 16)))


def is_direct(address: str, no_proxy: str) -> bool:
    """Whether no proxy is asked, as curl(1) decides it: on loopback in any spelling, and where no_proxy names the host,
    a domain of it, its network, or all (*), each with its port or without."""
    import ipaddress
    host, port = split_address(address)
    ip = ip_of(host)
    if is_loopback(host):
        return True
    for entry in filter(None, re.split(r'[,\s]+', no_proxy.lower())):
        # An IPv6 address without brackets has no port.
        match = re.fullmatch(r'(\[.*\]|[^:]*)(?::(\d+))?', entry)
        name, entry_port = match.groups() if match else (entry, None)
        name = name.strip('[].')
        with contextlib.suppress(ValueError):
            if ip and ip in ipaddress.ip_network(name, strict=False):
                name = host
        if entry_port in (None, port) and (name in ('*', host) or host.endswith(f'.{name}')):
            return True
    return False


def connect_relay(relay: Relay) -> Connection:
    """No keepalive: the relay ends connections that ping it; the deadline of each stream finds a dead one.
    RelayError."""
    options: List[Tuple[str, Any]] = [('grpc.use_local_subchannel_pool', 1)]
    if is_direct(relay.address, os.environ.get('no_proxy') or os.environ.get('NO_PROXY') or ''):
        options.append(('grpc.enable_http_proxy', 0))
    if relay.server_name:
        options.append(('grpc.ssl_target_name_override', relay.server_name))
    signature = relay_files_signature(relay)
    token = (read_relay_file('--relay-token-file', relay.token_file) or b'').decode(errors='replace').strip()
    if relay.token_file and not re.fullmatch(r'[\x21-\x7e]+', token):
        raise RelayError(f'--relay-token-file {relay.token_file}: has no token of printable ASCII in one line')
    if relay.tls:
        ca, cert, key = (read_relay_file(flag, path) for flag, path in
                         (ca_file(relay), ('--relay-cert', relay.cert), ('--relay-key', relay.key)))
        tls_context(relay)
        channel = grpc.secure_channel(relay.address, grpc.ssl_channel_credentials(ca, key, cert), options)
    else:
        channel = grpc.insecure_channel(relay.address, options)
    return Connection(channel, (('authorization', f'Bearer {token}'),) if token else (), signature)


def load_batch(backlog: Backlog, batch: Sequence[Snapshot], sent: List[int]) -> Generator[bytes, None, None]:
    """One by one, as the stream takes them: a relay that is away takes none. `sent` gets the numbers of those taken."""
    for snapshot in batch:
        message = load_snapshot(backlog, snapshot)
        if message is not None:
            sent.append(snapshot.number)
            backlog.sent += 1
            yield shrunk(message, backlog.max_snapshot_bytes)


def send_batch(connection: Connection, backlog: Backlog, batch: Sequence[Snapshot]) -> Optional[SendError]:
    """One SendMetrics stream. None: the relay has acknowledged the whole batch. A blocking call: a future needs a
    thread, and without it never ends."""
    sent: List[int] = []
    messages, backlog.channel = load_batch(backlog, batch, sent), connection.channel
    try:
        answer = connection.channel.stream_unary(SEND_METRICS)(messages, timeout=SEND_TIMEOUT_SECONDS,
                                                               metadata=connection.metadata)
        if answer is None:
            return SendError('UNKNOWN', 'the stream ended without an answer', len(sent))
        if messages.gi_frame is not None:
            return SendError('UNKNOWN', 'the relay answered before it had read everything', len(sent))
        backlog.acknowledged += len(sent)
        backlog.acknowledged_number = max([backlog.acknowledged_number, *sent])
        backlog.last_acknowledged = time.monotonic()
        return None
    except grpc.RpcError as error:
        if error.code() is grpc.StatusCode.CANCELLED:
            return SendError('CANCELLED', 'stopped before the relay had answered', len(sent))
        details = error.details() or ''
        # grpc takes the first message before it is connected.
        return SendError(error.code().name, details, 0 if NO_CONNECTION.search(details) else len(sent))
    except RuntimeError as error:
        return SendError(NO_THREAD, str(error))
    except ValueError:
        return SendError('CANCELLED', 'stopped before the relay had answered')


def attempt(relay: Relay, backlog: Backlog, batch: Sequence[Snapshot], connection: Optional[Connection],
            ) -> Tuple[Optional[Connection], Optional[SendError]]:
    """Send a batch, over a new connection where there is none or its files have changed; the connection to go on
    with, and why the batch was not acknowledged."""
    if connection and connection.signature != relay_files_signature(relay):
        connection.channel.close()
        connection = None
    try:
        if connection is None:
            connection = connect_relay(relay)
            backlog.connections += 1
    except RelayError as error:
        return None, SendError(NOT_CONNECTED, str(error))
    error = send_batch(connection, backlog, batch)
    if error is None:
        return connection, None
    # A connection that looks alive may be dead: the next attempt makes its own.
    connection.channel.close()
    return None, error


class Way:
    """What is known of the way to the relay: how many snapshots at once go through, from how many on they do not, and
    how many batches went through since; how often a snapshot was refused alone, and those that are set aside while
    others are tried."""

    limit, refused, successes = MAX_STREAM_SNAPSHOTS, MAX_STREAM_SNAPSHOTS + 1, 0
    # Whether the last batch went through.
    taking = False

    def __init__(self) -> None:
        self.refusals: Counts = collections.Counter()
        self.proofs: Counts = collections.Counter()
        self.aside: Set[int] = set()


def learn_size(way: Way, size: int, error: Optional[SendError]) -> bool:
    """From what has become of a batch of this size; whether fewer are to be sent at once. Whoever stands on the way may
    take only so many bytes, messages or seconds; what was not even sent tells nothing."""
    if error is None:
        way.successes += 1
        if way.successes % LARGER_AFTER_BATCHES == 0:
            way.refused = MAX_STREAM_SNAPSHOTS + 1
        way.limit = min(MAX_STREAM_SNAPSHOTS, 2 * way.limit, way.refused - 1)
    elif error.sent and size > 1:
        way.refused, way.successes, way.limit = size, 0, 1 if error.is_too_large() else size // 2
        return True
    return False


def refusal(backlog: Backlog, way: Way, batch: Sequence[Snapshot], error: SendError) -> Optional[str]:
    """Why a snapshot is to be dropped: it is too large, and cannot go with less; or it was refused alone, again and
    again, and then right after others were taken. Until then it is set aside."""
    if len(batch) > 1 or not error.sent or error.code not in ABOUT_THE_MESSAGE:
        return None
    number, known_limit = batch[0].number, backlog.max_snapshot_bytes
    if error.is_too_large():
        # `received message larger than max (5242880 vs. 4194304)`
        limit = re.search(r'\(\d+ vs\. (\d+)\)', error.details)
        backlog.max_snapshot_bytes = min(known_limit, int(limit.group(1)) if limit else known_limit)
        return None if backlog.max_snapshot_bytes < known_limit else 'too large'
    smaller = min(known_limit, batch[0].plain_bytes) * 3 // 4
    if smaller >= SMALLEST_LIMIT_BYTES and TOO_LARGE_FOR_HTTP in error.details:
        # A proxy does not say what it takes.
        backlog.max_snapshot_bytes = smaller
        return None
    if number in way.aside and way.taking:
        way.proofs[number] += PROOFS if SURE_REASON.match(f'{error.code}: {error.details}') else 1
        return 'refused' if way.proofs[number] >= PROOFS else None
    way.refusals[number] += 1
    if way.refusals[number] >= REFUSALS or way.aside:
        way.aside.add(number)
    return None


def log_send_error(relay: Relay, error: SendError, logged: Set[str]) -> None:
    """Each kind of reason once an outage: a relay that is back with a certificate that has expired is another
    trouble."""
    reason = explain_tls(relay) if relay.tls and error.code == 'UNAVAILABLE' else None
    kind = reason or (error.details if error.code == NOT_CONNECTED else error.code)
    if kind not in logged:
        sent = f'does not take {plural(error.sent, "snapshot")}: ' if error.sent else ''
        log.warning('relay %s: %s', relay.address, reason or f'{sent}{error.code}: {error.details}')
    logged.add(kind)


def deliver(backlog: Backlog, relay: Relay) -> None:
    """The sending thread: send the backlog until it closes, with a pause after each failure and one last attempt, which
    goes on where it was refused. A catch-up goes at the backlog's pace."""
    connection, failures, way, logged, reached = None, 0, Way(), set(), False
    paced = max(1, int(1 / backlog.pace_seconds)) if backlog.pace_seconds else MAX_STREAM_SNAPSHOTS
    while not backlog.given_up.is_set():
        last_attempt, verify, began = backlog.closing.is_set(), bool(way.aside) and way.taking, time.monotonic()
        limit = way.limit if last_attempt else min(way.limit, paced)
        batch = next_batch(backlog, 1 if verify else limit, way.aside, verify)
        if not batch and backlog.closing.is_set():
            break
        if not batch:
            continue
        connection, error = attempt(relay, backlog, batch, connection)
        fewer, limit_before = learn_size(way, len(batch), error), backlog.max_snapshot_bytes
        cause = refusal(backlog, way, batch, error) if error else None
        fewer = fewer or backlog.max_snapshot_bytes < limit_before
        if cause:
            log.error('relay: a snapshot of %d bytes is dropped: %s: %s', batch[0].plain_bytes, *error[:2])
        if error is None or cause:
            forget_snapshots(backlog, batch, cause)
            way.aside.discard(batch[0].number)
            if not way.aside:
                way.refusals.clear()
                way.proofs.clear()
            way.taking = error is None
            if error is None and (failures or not reached):
                how = f'recovered; dropped so far: {sum(backlog.dropped.values())}' if reached else 'reached'
                log.info('relay %s: %s', relay.address, how)
            reached = reached or error is None
            failures, logged = 0, set()
            backlog.closing.wait(max(0.0, began + len(batch) * backlog.pace_seconds - time.monotonic()))
            continue
        way.taking, failures = False, 1 if fewer else failures + 1
        log_send_error(relay, error, logged)
        if last_attempt and not (fewer or 0 < way.refusals[batch[0].number] <= REFUSALS):
            break
        (backlog.given_up if last_attempt else backlog.closing).wait(
            backoff_seconds(1 if error.code == NO_THREAD else failures))
    if connection:
        connection.channel.close()


def keep_delivering(backlog: Backlog, relay: Relay) -> None:
    """A bug must not end the delivery: it is logged, and the delivery starts again."""
    while True:
        try:
            return deliver(backlog, relay)
        except Exception:
            log.exception('a bug in the delivery')
        if backlog.closing.wait(BACKOFF_FIRST_SECONDS):
            return None


def start_delivery(backlog: Backlog, relay: Relay) -> threading.Thread:
    return start_thread(keep_delivering, backlog, relay)


def close_backlog(backlog: Backlog, sender: threading.Thread, patience_seconds: float) -> int:
    """Give the sender one last attempt; how many snapshots it could not deliver."""
    with backlog.changed:
        backlog.closing.set()
        backlog.changed.notify()
    sender.join(patience_seconds)
    backlog.given_up.set()
    if sender.is_alive() and backlog.channel:
        backlog.channel.close()
        sender.join(1)
    return len(backlog.snapshots)


# --- the agent itself

# By so much resident memory may grow before what is free in it is returned.
TRIM_BYTES = 8 << 20


class AgentStats:
    """What the agent counts from its start on, and how much memory was left when pages were returned last."""

    trimmed_bytes = 0
    sequence = cycles = skipped_ticks = 0
    in_cycle = False
    collection_seconds: Optional[float] = None
    open_files: Optional[int] = None
    open_files_due = 0.0

    def __init__(self) -> None:
        self.run_id = os.urandom(8).hex()
        self.started, self.start_time = time.monotonic(), time.time()
        self.failures: Counts = collections.Counter(bug=0)
        self.calls: Dict[str, wire.CriMethodMetrics] = {}


def read_memory(stats: AgentStats) -> Sequence[int]:
    """Virtual and resident bytes. Where a large answer, as of pods with megabytes of annotations, was freed, glibc
    returns its pages now."""
    def read() -> Sequence[int]:
        return [int(pages) * PAGE_SIZE_BYTES for pages in read_bytes('/proc/self/statm').split()[:2]]

    memory = read()
    if memory[1] > stats.trimmed_bytes + TRIM_BYTES:
        with contextlib.suppress(AttributeError):
            libc().malloc_trim(0)
        memory = read()
        stats.trimmed_bytes = memory[1]
    return memory


def collect_agent(message: wire.AgentMetrics, stats: AgentStats, backlog: Optional[Backlog], timestamp_ns: int,
                  cycle: Cycle) -> None:
    """The agent's own processes and counters; always from its own /proc."""
    now, (virtual_bytes, resident_bytes) = time.monotonic(), read_memory(stats)
    if now >= stats.open_files_due:
        # Listing them takes 1 µs each. At random times: not in one cycle with what else is done once a minute.
        stats.open_files = len(os.listdir('/proc/self/fd')) or None
        stats.open_files_due = now + random.uniform(0.5, 1) * SELDOM_SECONDS
    message.MergeFrom(wire.AgentMetrics(
        run_id=stats.run_id, sequence=stats.sequence, timestamp_ns=timestamp_ns, version=__version__,
        uptime_seconds=now - stats.started, cpu_seconds_total=time.process_time(),
        resident_bytes=resident_bytes, virtual_bytes=virtual_bytes,
        max_virtual_bytes=resource.getrlimit(resource.RLIMIT_AS)[0] % 2**64,
        max_open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0], start_time_seconds=stats.start_time,
        subject_seconds=cycle.subject_seconds,
        failing_subjects=sorted({subject.partition(' /')[0] for subject in cycle.failures}),
        threads=len(os.listdir('/proc/self/task')) or None, open_files=stats.open_files,
        log_lines_left_out_total=log_budget.left_out, cycles_total=stats.cycles,
        skipped_ticks_total=stats.skipped_ticks, collection_seconds=stats.collection_seconds,
        failures_total=dict(stats.failures), cri_methods=[stats.calls[method] for method in sorted(stats.calls)]))
    if backlog:
        acknowledged = backlog.last_acknowledged
        message.backlog.MergeFrom(wire.BacklogMetrics(
            snapshots=len(backlog.snapshots), memory_bytes=backlog.memory_bytes, spool_bytes=backlog.spool_bytes,
            sent_total=backlog.sent, acknowledged_total=backlog.acknowledged, dropped_total=backlog.dropped,
            reconnects_total=max(0, backlog.connections - 1),
            seconds_since_acknowledgement=None if acknowledged is None else now - acknowledged))


# --- snapshot

class State:
    """What lives from cycle to cycle, by side."""

    def __init__(self, top_n: int, walker: Optional[Walker] = None):
        self.node = NodeState(top_n)
        self.runtime = RuntimeState(walker=walker)


def collect_snapshot(roots: Roots, options: Options, state: State, stats: AgentStats,
                     backlog: Optional[Backlog] = None) -> Tuple[wire.Metrics, Failures]:
    """One Metrics message, and by subject what failed."""
    timestamp_ns, cycle = time.time_ns(), Cycle(roots, options.main_loop_duration, stats.calls)
    metrics = wire.Metrics(timestamp=timestamp_ns // 10**9)
    collect_node(metrics.node_metrics, state.node, cycle)
    try:
        collect_pods(metrics, options, state.runtime, cycle)
    except Exception as error:
        cycle.failed('container runtime', error)
        metrics.node_metrics.ClearField('container_runtime')
        forget_runtime(state.runtime)
        state.runtime = RuntimeState(state.runtime.description, state.runtime.walker)
    stats.sequence += 1
    # Each count is there with 0 before it rises: a counter that begins with 1 has no rate.
    # `mount /any/path` is counted as a mount: there is no end of paths.
    subjects = {subject.partition(' /')[0] for subject in cycle.failures}
    stats.failures.update(dict.fromkeys((*NODE_SUBJECTS, *RUNTIME_SUBJECTS, *subjects), 0))
    collect_agent(metrics.agent_metrics, stats, backlog, timestamp_ns, cycle)
    stats.failures.update(subjects)
    stats.cycles, stats.collection_seconds = stats.cycles + 1, time.monotonic() - cycle.now
    return metrics, cycle.failures


def log_changes(previous: Failures, failures: Failures) -> None:
    """A trouble is logged when it begins and when it ends."""
    for subject in sorted(failures.keys() - previous.keys()):
        log.warning('%s: %s', subject, failures[subject])
    for subject in sorted(previous.keys() - failures.keys()):
        log.info('%s: recovered', subject)


# --- output

def render_json(metrics: wire.Metrics) -> str:
    """One line: the proto3 mapping with the proto's field names. What is absent on the wire is absent here."""
    from google.protobuf import json_format
    return json.dumps(json_format.MessageToDict(
        metrics, preserving_proto_field_name=True, always_print_fields_with_no_presence=True))


def printable(text: str) -> str:
    """Processes and pods choose their names: no control code and no right-to-left mark in them may reach a terminal, a
    label or the log, but as Python writes it, \\x1b."""
    if text.isprintable():
        return text
    return ''.join(char if char.isprintable() else char.encode('unicode_escape').decode() for char in text)


def human_bytes(number: float) -> str:
    for unit in ('B', 'KiB', 'MiB', 'GiB'):
        if number < 1024:
            break
        number /= 1024
    else:
        unit = 'TiB'
    return f'{number:.{0 if unit == "B" else 1}f} {unit}'


def human_short(number: Optional[float]) -> str:
    """In five characters at most: 980, 1.2K, 34M, 1.1G; - for what is not known."""
    if number is None:
        return '-'
    for unit in ('', 'K', 'M', 'G', 'T'):
        if number < 999.5:
            return f'{number:.{1 if unit and number < 9.95 else 0}f}{unit}'
        number /= 1024
    return f'{number:.0f}P'


def human_seconds(seconds: int) -> str:
    minutes = seconds // 60
    if minutes < 60:
        return f'{minutes} min'
    if minutes < 48 * 60:
        return f'{minutes // 60} h {minutes % 60} min'
    return f'{minutes // 1440} d {minutes // 60 % 24} h'


def plural(number: int, noun: str) -> str:
    ending = '' if number == 1 else 'es' if noun.endswith('s') else 's'
    return f'{number} {noun}{ending}'


@functools.lru_cache(None)
def getter(kind: Any, path: str) -> Callable[[Any], Optional[float]]:
    """What gives the field at a dotted path; None where a part of it is absent: of the parts that may be, the last one
    tells, because what is below an absent message is absent."""
    names, descriptor, last = path.split('.'), kind.DESCRIPTOR, None
    for index, name in enumerate(names):
        last = index if descriptor.fields_by_name[name].has_presence else last
        descriptor = descriptor.fields_by_name[name].message_type
    value = operator.attrgetter(path)
    if last is None:
        return value
    name, holder = names[last], operator.attrgetter('.'.join(names[:last])) if last else lambda message: message
    return lambda message: value(message) if holder(message).HasField(name) else None


def value_at(message: Any, path: str) -> Optional[float]:
    return getter(type(message), path)(message)


def present_containers(pod: wire.PodMetrics) -> List[wire.ContainerMetrics]:
    """By name the running container, else the last: one that was restarted is there twice."""
    ordered = sorted(pod.container_metrics, key=lambda item: (item.state == 'CONTAINER_RUNNING', item.created_at))
    return list({container.name: container for container in ordered}.values())


# --- live view

# Written by hand and without curses: the same lines go to a pipe, and one select waits for keys, signals and the next
# tick. The sequences are ECMA-48's; on xterm's alternate screen there is no cursor, and long lines do not wrap.
ENTER_SCREEN, LEAVE_SCREEN = '\x1b[?1049h\x1b[?25l\x1b[?7l', '\x1b[?7h\x1b[?25h\x1b[?1049l'
HOME, CLEAR_LINE = '\x1b[H', '\x1b[K'
RED, YELLOW, GREEN, BOLD, REVERSE, PLAIN = '\x1b[31m', '\x1b[33m', '\x1b[32m', '\x1b[1m', '\x1b[7m', '\x1b[m'
COLOR = re.compile(r'(\x1b\[\d*m)')
# A key is a character or a sequence. What has begun one, and does not go on in time, is the key Esc.
KEY, BEGUN_KEY = re.compile(r'\x1b[\[O][\d;]*[A-Za-z~]|.', re.DOTALL), re.compile(rb'\x1b([\[O][\d;]*)?$')
ESCAPE_SECONDS = 0.05
KEY_NAMES = {'\x1b[A': 'Up', '\x1b[B': 'Down', '\x1b[5~': 'PgUp', '\x1b[6~': 'PgDn', '\x1b[H': 'Home', '\x1b[F': 'End',
             '\x1b[1~': 'Home', '\x1b[4~': 'End', '\x1b': 'Esc', '\r': 'Enter', '\n': 'Enter',
             '\x7f': 'Backspace', '\b': 'Backspace', ' ': 'Space'}
BAR_WIDTH = 14
# By whether the locale has UTF-8, from the smallest to the largest.
SPARKS = {True: '▁▂▃▄▅▆▇█', False: '_.-=+*%#'}
HISTORY_SAMPLES = 60
# From these percentages on a figure is yellow, or red. From these on a container counts as throttled (of its
# periods), or stalled (of the last 10 s).
WARM, HOT, THROTTLED_PERCENT, STALLED_PERCENT = 70, 90, 25, 20
# A kill or a restart counts as trouble for so long; a created container does if it has not started after so long.
RECENT_SECONDS, SLOW_START_SECONDS = 600, 60
# From these widths on, the table has more figures, and images.
WIDE, WIDEST = 110, 160
NARROWEST_NAME = 5
LIVE_INTERVAL_SECONDS = 2
NO_RUNTIME = 'no container runtime found'
# The modes of CPU time without those of guests, and top(1)'s names for those that the view shows.
CPU_MODES = CpuTimes._fields[:8]
TOP_MODES = (('us', 'user'), ('sy', 'system'), ('ni', 'nice'), ('io', 'iowait'), ('si', 'softirq'), ('st', 'steal'))

# Of a figure that is not known it is None.
Number = Optional[float]
Lines = List[str]


class View:
    """Two snapshots and how they are shown. Without a height all rows are, and no cursor."""

    order, namespace, search, page = 'trouble', '', '', ''
    typing = paused = False
    # The container that the cursor follows; at the top of the list it follows none.
    chosen = ''
    # The lines that there is room for, and the last place of the cursor.
    room = last = 0

    def __init__(self, width: int, height: Any = None, color: bool = False) -> None:
        self.width, self.height, self.color = width, height, color
        self.rows: List[TableRow] = []
        # By page, where the cursor is, or the first line that is shown. '' is the list.
        self.at: Dict[str, Any] = collections.Counter()

    def compare(self, previous: Optional[wire.Metrics], metrics: wire.Metrics) -> None:
        self.metrics, self.previous = metrics, previous or wire.Metrics()
        self.node, self.old_node = metrics.node_metrics, self.previous.node_metrics
        # By the monotonic clock.
        self.seconds = metrics.agent_metrics.uptime_seconds - self.previous.agent_metrics.uptime_seconds
        self.old = {item.id: item for pod in self.previous.pod_metrics for item in (pod, *pod.container_metrics)}

    def rate(self, old: Any, new: Any, path: str) -> Number:
        return per_second(old and value_at(old, path), value_at(new, path), self.seconds)

    def age(self, timestamp_ns: int) -> float:
        """Seconds since then; endless where it is not known, or the clock was set back."""
        seconds = self.metrics.timestamp - timestamp_ns / 1e9
        return seconds if timestamp_ns and seconds > -SLOW_START_SECONDS else math.inf


def human_age(seconds: float) -> str:
    return '-' if seconds == math.inf else f'{max(0, seconds):.0f}s' if seconds < 60 else human_seconds(int(seconds))


def human_percent(percent: Number) -> str:
    return '' if percent is None else f'{min(percent, 999):.0f}%'


def human_cores(nano_cores: Number) -> str:
    return '-' if nano_cores is None else f'{nano_cores / 1e9:.{2 if nano_cores < 99e9 else 0}f}'


def heat(percent: Number) -> str:
    return '' if percent is None or percent < WARM else YELLOW if percent < HOT else RED


def paint(text: str, color: str, view: View) -> str:
    return f'{color}{text}{PLAIN}' if view.color and color else text


def bar(percent: float, view: View) -> str:
    """With the figure before it: a narrow terminal has no room for more."""
    width = BAR_WIDTH if view.width < WIDE else 3 * BAR_WIDTH
    filled = min(width, max(0, round(percent / 100 * width)))
    return f'{percent:5.1f}% [' + paint('|' * filled, heat(percent) or GREEN, view) + ' ' * (width - filled) + ']'


def cells(text: str) -> int:
    """How many cells of a terminal it takes: two for an East Asian character, none for an accent."""
    if text.isascii():
        return len(text)
    import unicodedata
    return sum(0 if unicodedata.category(char) in ('Mn', 'Me') else 1 + (unicodedata.east_asian_width(char) in 'WF')
               for char in text)


def head_of(text: str, width: int) -> str:
    """As much as there is room for."""
    if text.isascii():
        return text[:width]
    return text[:sum(end <= width for end in itertools.accumulate(map(cells, text)))]


def fit(text: str, width: int) -> str:
    """Exactly so wide, flush left where the width is negative; 0 is as wide as the text. What is too long is cut in the
    middle: the names of pods differ at their ends."""
    room = abs(width)
    if room and cells(text) > room:
        text = head_of(text, (room - 1) // 2) + '~' + head_of(text[::-1], room // 2)[::-1]
    padding = ' ' * (room - cells(text))
    return padding + text if width > 0 else text + padding


def clip(line: str, width: int) -> str:
    """At most so wide; colours take no room, and each is ended."""
    pieces = COLOR.split(line)
    for index in range(0, len(pieces), 2):
        pieces[index] = head_of(pieces[index], width)
        width -= cells(pieces[index])
    return ''.join(pieces).rstrip()


def percent_of(part: Number, whole: Number) -> Number:
    return None if part is None or not whole else 100 * part / whole


def per_second(previous: Number, value: Number, seconds: float) -> Number:
    """The rate of a counter; None without two samples, or where it began anew."""
    if previous is None or value is None or seconds <= 0 or value < previous:
        return None
    return (value - previous) / seconds


def total(messages: Iterable[Any], path: str) -> Number:
    """The sum of a field, None where no message has it."""
    values = [value for value in (value_at(message, path) for message in messages) if value is not None]
    return sum(values) if values else None


def shown_state(container: wire.ContainerMetrics) -> str:
    state, status = container.state.replace('CONTAINER_', '').lower(), container.status
    if state != 'exited' or not status.HasField('exit_code'):
        return state
    if status.reason == OOM_KILLED:
        return 'OOM killed'
    return f'exit {status.exit_code}' if status.exit_code else 'completed'


class TableRow:
    """A container in the table. What neither tells its trouble nor orders the table by default is computed when it is
    asked for: a frame is due in 10 ms, and there may be 330 of them. Rates are in bytes per second."""

    def __init__(self, view: View, pod: wire.PodMetrics, container: wire.ContainerMetrics) -> None:
        self.view, self.pod, self.container, self.id = view, pod, container, container.id
        self.old_pod = view.old.get(pod.id) or wire.PodMetrics()
        self.old = view.old.get(container.id) or wire.ContainerMetrics()
        self.names = printable(pod.namespace), printable(pod.name), printable(container.name)
        self.state, cpu = printable(shown_state(container)), container.cgroup.cpu
        self.nano_cores = value_at(container, 'cpu_metrics.usage_nano_cores.value')
        self.quota = 1e9 * cpu.max.quota_usec / (cpu.max.period_usec or 1)
        self.cpu_percent = percent_of(self.nano_cores, self.quota)
        self.memory = value_at(container, 'memory_metrics.working_set_bytes.value')
        self.memory_percent = percent_of(self.memory, container.cgroup.memory.max)
        earlier = self.old.cgroup.cpu.stat
        # Of the periods between the snapshots.
        self.throttled = percent_of(cpu.stat.nr_throttled - earlier.nr_throttled, earlier.nr_periods and max(
            0, cpu.stat.nr_periods - earlier.nr_periods))
        self.score, self.why = worst_trouble(self)

    def network(self, field: str) -> Number:
        """The pod's, all interfaces together."""
        old, new = (total(pod.network_interfaces, field) for pod in (self.old_pod, self.pod))
        return per_second(old, new, self.view.seconds)

    def io(self, field: str) -> Number:
        old, new = (total(container.cgroup.io.stat, field) for container in (self.old, self.container))
        return per_second(old, new, self.view.seconds)

    restarts = property(lambda self: value_at(self.container, 'restart_count'))
    image = property(lambda self: printable(self.container.user_specified_image or self.container.image))
    received = property(lambda self: self.network('counters.rx_bytes'))
    sent = property(lambda self: self.network('counters.tx_bytes'))
    read = property(lambda self: self.io('rbytes'))
    written = property(lambda self: self.io('wbytes'))
    # What the pod takes of the node's own disks.
    disk = property(lambda self: total(
        (usage for usage in self.pod.ephemeral_storage.usages if usage.kind != 'memory'), 'bytes'))


def worst_trouble(row: TableRow) -> Tuple[int, str]:
    """How bad the worst is that is wrong with a container, as a percentage is hot, and a word for it."""
    container, group, status, age = row.container, row.container.cgroup, row.container.status, row.view.age
    running, since_kill = row.state == 'running', age(container.last_oom_kill_ns)
    since_start = age(max(status.started_at_ns, container.last_exit.finished_at_ns))
    stalled = max(group.cpu.pressure.some.avg10, group.memory.pressure.some.avg10, group.io.pressure.some.avg10)
    score, word = max((score, word) for score, word, found in (
        (99, 'OOM {1}', since_kill < RECENT_SECONDS),
        (98, '{0.state}', not running and status.exit_code),
        (97, 'restarted', running and container.restart_count and since_start < RECENT_SECONDS),
        (96, '{0.state}', row.state in ('created', 'unknown') and age(container.created_at) > SLOW_START_SECONDS),
        (89, 'mem {0.memory_percent:.0f}%', (row.memory_percent or 0) >= HOT),
        (88, 'throttled', (row.throttled or 0) >= THROTTLED_PERCENT),
        (87, 'cpu {0.cpu_percent:.0f}%', (row.cpu_percent or 0) >= HOT),
        (86, 'pressure', stalled >= STALLED_PERCENT),
        (0, '' if running else '{0.state}', True)) if found)
    return score, word and word.format(row, human_age(since_kill))


class Column(NamedTuple):
    """A column of the table: its title, its width as in fit, the terminal width from which it is shown, the field of
    TableRow, its text, and the field that tells its colour."""
    title: str
    width: int
    shown_from: int
    field: str
    text: Callable[[Any], str] = human_short
    heat: str = ''


NAME_COLUMNS = ('NAMESPACE', 'POD', 'CONTAINER')
COLUMNS = (
    Column('CPU', 5, 0, 'nano_cores', human_cores),
    Column('%LIM', 4, 0, 'cpu_percent', human_percent, 'cpu_percent'),
    Column('THR', 4, WIDE, 'throttled', human_percent, 'throttled'),
    Column('MEM', 5, 0, 'memory'),
    Column('%LIM', 4, 0, 'memory_percent', human_percent, 'memory_percent'),
    Column('RX/s', 5, WIDE, 'received'),
    Column('TX/s', 5, WIDE, 'sent'),
    Column('READ/s', 6, WIDE, 'read'),
    Column('WRITE/s', 7, WIDE, 'written'),
    Column('DISK', 5, 0, 'disk'),
    Column('RST', 4, 0, 'restarts'),
    Column('STATE', -10, WIDE, 'state', str),
    Column('WHY', -10, 0, 'why', str, 'score'),
    Column('IMAGE', 0, WIDEST, 'image', str),
)
# By name the fields of TableRow of which the larger one counts, the largest first.
ORDERS = dict(order.split('=') for order in (
    'trouble=score cpu=nano_cores memory=memory %limit=cpu_percent,memory_percent throttling=throttled '
    'restarts=restarts network=received,sent I/O=read,written disk=disk').split())


def table_rows(view: View) -> List[TableRow]:
    """The containers of the chosen namespace that have the text sought, in the chosen order, then by CPU."""
    fields, sought = ORDERS[view.order].split(','), view.search.lower()
    rows = [TableRow(view, pod, container) for pod in view.metrics.pod_metrics if view.namespace in ('', pod.namespace)
            for container in present_containers(pod)]
    if sought:
        rows = [row for row in rows if sought in ' '.join((*row.names, row.image)).lower()]
    return sorted(rows, key=lambda row: (
        -max(getattr(row, field) or 0 for field in fields), -(row.nano_cores or 0), row.names))


def name_widths(rows: Sequence[TableRow], room: int) -> List[int]:
    """As wide as the widest name of each column; where there is no room, a pod's name keeps the most."""
    widths = [max(map(cells, names)) for names in zip(NAME_COLUMNS, *(row.names for row in rows))]
    shares = (1, 2, 1)
    while sum(widths) > room and max(widths) > NARROWEST_NAME:
        widest = max(range(3), key=lambda number: (widths[number] > NARROWEST_NAME, widths[number] / shares[number]))
        widths[widest] -= 1
    return widths


def table_lines(view: View, first: int) -> Lines:
    """The heading, and as many rows as there is room for: the wider the terminal, the more columns, and the longer the
    names. A column of which nothing is known is left out."""
    shown = [column for column in COLUMNS if view.width >= column.shown_from
             and any(getattr(row, column.field) is not None for row in view.rows)]
    widths = name_widths(view.rows, view.width - sum(abs(column.width) + 1 for column in shown) - len(NAME_COLUMNS))
    columns = [*(Column(title, -width, 0, 'names', operator.itemgetter(number))
                 for number, (title, width) in enumerate(zip(NAME_COLUMNS, widths))), *shown]
    lines = [paint(' ' + ' '.join(fit(column.title, column.width) for column in columns), BOLD, view)]
    for number, row in enumerate(view.rows[first:first + view.room], first):
        line = ' '.join(paint(fit(text(getattr(row, field)), width), hot and heat(getattr(row, hot)), view)
                        for _, width, _, field, text, hot in columns)
        chosen = view.height and number == view.at['']
        lines.append(paint(fit('>' + COLOR.sub('', line), -view.width), REVERSE, view) if chosen else ' ' + line)
    return lines


def title_line(view: View) -> str:
    node = view.node
    words = (
        'PAUSED' if view.paused else '', node.hostname or 'node', f'{node.platform} {node.platform_version}'.strip(),
        f'Linux {node.kernel_version}' if node.kernel_version else '', node.primary_ipv4.value,
        f'up {human_seconds(node.uptime)}' if node.HasField('uptime') else '')
    return paint(printable('  '.join(filter(None, words))), BOLD, view)


def cpu_line(view: View) -> str:
    node, cpus = view.node, len(view.node.cpu_infos)
    if not node.HasField('total_cpu_percentage'):
        return 'cpu  not known'
    spent = ((label, view.rate(view.old_node, node, f'cpu_seconds.{mode}')) for label, mode in TOP_MODES)
    modes = ' '.join(f'{label} {100 * cores / cpus:.0f}' for label, cores in spent if cores is not None and cpus)
    return f'cpu  {bar(node.total_cpu_percentage, view)} of {plural(cpus, "CPU")}  {modes}'


def memory_line(view: View) -> str:
    node, text, swap = view.node, 'mem  not known', view.node.meminfo.get('SwapTotal')
    if node.HasField('memory_used_perc'):
        text = f'mem  {bar(node.memory_used_perc, view)} of {human_bytes(node.total_memory)}'
    if not swap:
        return text + '  no swap' if swap == 0 else text
    percent = 100 * (swap - node.meminfo.get('SwapFree', 0)) / swap
    return f'{text}  swap {bar(percent, view)} of {human_bytes(swap)}'


def load_line(view: View) -> str:
    node, load = view.node, view.node.load_average
    averages = f'{load.load1:.2f} {load.load5:.2f} {load.load15:.2f}' if node.HasField('load_average') else 'not known'
    processes = f'  {plural(node.procs, "process")}' if node.HasField('procs') else ''
    pressure = {'cpu': node.psi_cpu_metrics, 'mem': node.psi_memory_metrics, 'io': node.psi_io_metrics}
    stalls = '  '.join(f'{name} {psi.some.avg10.value:.1f}%' for name, psi in pressure.items() if psi.HasField('some'))
    return f'load {averages}{processes}  pressure {stalls or "not known"}'


def rates_line(view: View) -> str:
    """What goes through the node's network and disks."""
    received, sent, read, written = (human_short(view.rate(view.old_node, view.node, path)) for path in (
        'net_usage.total_bytes_received', 'net_usage.total_bytes_sent', 'disk_io_summary.total_read_bytes',
        'disk_io_summary.total_write_bytes'))
    return f'i/o  network in {received}/s out {sent}/s   disks read {read}/s write {written}/s'


def disk_line(view: View) -> str:
    """A file system that does not answer or is nearly full stands out, and comes first."""
    disks = sorted(view.node.disk_usages, key=lambda disk: (not disk.stuck, -disk.used_percent))
    return 'disk ' + ('  '.join(
        paint(f'{printable(disk.mountpoint)} {"STUCK" if disk.stuck else human_percent(disk.used_percent)}',
              RED if disk.stuck else heat(disk.used_percent), view) for disk in disks) or 'not known')


def agent_line(view: View) -> str:
    """The runtime, what the agent itself costs, and what it could not read."""
    runtime, agent = view.node.container_runtime, view.metrics.agent_metrics
    unready = ', '.join(sorted(kind for kind, met in runtime.conditions.items() if not met))
    state = f'NOT READY ({unready})' if unready else 'ready' if runtime.conditions else ''
    name = printable(f'{runtime.name} {runtime.version} {state}') if runtime.name else NO_RUNTIME
    spent = view.rate(view.previous.agent_metrics, agent, 'cpu_seconds_total')
    cost = '' if spent is None else f' {100 * spent:.1f}% cpu'
    failing = printable(', '.join(agent.failing_subjects))
    trouble = paint(f'in trouble: {failing}   ', YELLOW, view) if failing else ''
    color = RED if unready else '' if runtime.name else YELLOW
    return f'cri  {paint(name, color, view)}   {trouble}agent{cost} {human_bytes(agent.resident_bytes)}'


def summary_line(view: View) -> str:
    """What the table shows, and on a terminal how that can be changed."""
    rows, namespace = view.rows, f' in {printable(view.namespace)}' if view.namespace else ''
    pods, running = plural(len({row.pod.id for row in rows}), 'pod'), sum(row.state == 'running' for row in rows)
    text = f'{pods}{namespace}, {running}/{plural(len(rows), "container")} running, by {view.order}'
    search = f'/{printable(view.search)}{"_" * view.typing}  ' if view.search or view.typing else ''
    return search + (text if rows or view.node.container_runtime.name else NO_RUNTIME) + (
        '   ? help, / filter, q quit' if view.height else '')


# The lines above the table, and the height of the terminal from which each is shown: at 24 lines, 8 with the heading.
HEADER = ((8, title_line), (0, cpu_line), (0, memory_line), (14, load_line), (30, rates_line), (18, disk_line),
          (10, agent_line), (30, lambda view: ''), (0, summary_line))


def list_lines(view: View) -> Lines:
    """The node, then its containers; the cursor is in the middle where there are more above and below."""
    rows = view.rows = table_rows(view)
    at = next((number for number, row in enumerate(rows) if row.id == view.chosen), min(view.at[''], len(rows) - 1))
    view.at[''] = max(0, at)
    lines = [line(view) for height, line in HEADER if not view.height or view.height >= height]
    view.last, view.room = len(rows) - 1, max(1, view.height - len(lines) - 1) if view.height else len(rows)
    first = max(0, min(view.at[''] - view.room // 2, len(rows) - view.room))
    return lines + table_lines(view, first) if rows else lines


def render_view(previous: Optional[wire.Metrics], metrics: wire.Metrics, view: View) -> str:
    """The node, then its containers; no wider than the view, no higher, and with no control codes but colours."""
    view.compare(previous, metrics)
    return '\n'.join(clip(line, view.width) for line in list_lines(view)[:view.height])


class Live(View):
    """A view on a terminal, and what was measured since it began."""

    ended = False
    settings: Any = None

    def __init__(self) -> None:
        super().__init__(80, 24, not os.environ.get('NO_COLOR'))
        self.compare(None, wire.Metrics())
        # Not by LC_CTYPE, which Python sets where the locale is C (PEP 538).
        self.utf8 = 'UTF' in (os.environ.get('LC_ALL') or os.environ.get('LANG', '')).upper()
        self.keyboard = [sys.stdin.fileno()] if sys.stdin and sys.stdin.isatty() else []
        self.failures: Failures = {}
        # By container its nanocores and bytes, in each of the last samples.
        self.history: Deque[Dict[str, Sequence[Number]]] = collections.deque(maxlen=HISTORY_SAMPLES)


def take_snapshot(live: Live, previous: Optional[wire.Metrics], metrics: wire.Metrics) -> None:
    """What is shown from now on, unless the view is paused."""
    if not live.paused:
        live.compare(previous, metrics)
    live.history.append({container.id: (value_at(container, 'cpu_metrics.usage_nano_cores.value'),
                                        value_at(container, 'memory_metrics.working_set_bytes.value'))
                         for pod in metrics.pod_metrics for container in pod.container_metrics})


def spark(values: Sequence[Number], utf8: bool) -> str:
    """A column for each value, a blank for one that is not known."""
    most = max(value or 0 for value in values) or 1
    return ''.join(' ' if value is None else SPARKS[utf8][int(7 * value / most)] for value in values)


# What a kernel's unit is multiplied by: bytes of a sector, percent of the time for milliseconds in a second.
FACTORS = {'read_sectors': 512, 'write_sectors': 512, 'io_ticks': 0.1}


def figure(view: View, old: Any, new: Any, field: str) -> str:
    """The text of a field: of a path, or with /s after it of the rate of a counter; with % after that of a percentage,
    or of one field in percent of another: used:total%."""
    path, _, whole = field.replace('/s', '').replace('%', '').partition(':')
    value = view.rate(old, new, path) if '/s' in field else value_at(new, path)
    if isinstance(value, (str, bool)):
        return printable(str(value))
    if whole:
        value = percent_of(value, value_at(new, whole))
    return (human_percent if '%' in field else human_short)(value and value * FACTORS.get(path, 1))


def grid(view: View, columns: str, items: Sequence[Any], old_items: Iterable[Any] = ()) -> Lines:
    """A table of messages, and an empty line; nothing where there are none. Of each column the title, = and the field
    as in figure; the first one names the message, and what begins with a letter is flush left."""
    titles, fields = zip(*(column.split('=') for column in columns.split()))
    old, rows = {getattr(item, fields[0]): item for item in old_items}, [titles]
    for item in items:
        name = getattr(item, fields[0])
        rows.append((printable(str(name)), *(figure(view, old.get(name), item, field) for field in fields[1:])))
    widths = [max(map(cells, texts)) * (-1 if texts[-1][:1].isalpha() else 1) for texts in zip(*rows)]
    return ['  '.join(map(fit, row, [-abs(widths[0]), *widths[1:]])) for row in rows] + [''] if items else []


def against(used: Number, most: Number, text: Callable[[Any], str] = human_short) -> str:
    """A figure and its limit."""
    limit = f' of {text(most)} {human_percent(percent_of(used, most))}' if most else ', no limit known'
    return text(used) + limit


def stalls(files: Any) -> str:
    """Of the last 10, 60 and 300 seconds."""
    return '  '.join(f'{kind} {stall.avg10:.1f}% {stall.avg60:.1f}% {stall.avg300:.1f}%' for kind, stall in (
        ('some', files.pressure.some), ('full', files.pressure.full))) if files.HasField('pressure') else '-'


def container_facts(live: Live, row: TableRow) -> str:
    pod, container, status, last = row.pod, row.container, row.container.status, row.container.last_exit
    group = container.cgroup
    cores, memory = zip(*(sample.get(row.id, (None, None)) for sample in live.history))

    def ago(timestamp_ns: int) -> str:
        text = human_age(live.age(timestamp_ns))
        return text if text == '-' else f'{text} ago'

    return f'''\
container  {container.name}
pod        {pod.namespace}/{pod.name}, {pod.qos_class or "-"}, runtime {pod.runtime_handler or "-"}
uid        {pod.uid}
network    {"of the node" if pod.host_network else "of its own" if pod.HasField("host_network") else "-"}
trouble    {row.why or "-"}
state      {row.state} {status.reason}, started {ago(status.started_at_ns)}
restarts   {human_short(row.restarts)}
last exit  {f"{last.exit_code} {last.reason}, " if container.HasField("last_exit") else ""}{ago(last.finished_at_ns)}
OOM kills  {human_short(value_at(container, "oom_kills"))}, last {ago(container.last_oom_kill_ns)}
cpu        {against(row.nano_cores, row.quota, human_cores)}, throttled {human_percent(row.throttled) or "-"}
           {spark(cores, live.utf8)}
memory     {against(row.memory, value_at(group, "memory.max"))}
           {spark(memory, live.utf8)}
swap       {against(value_at(group, "memory.swap.current"), value_at(group, "memory.swap.max"))}
pids       {against(value_at(group, "pids.current"), value_at(group, "pids.max"))}
stalled    cpu     {stalls(group.cpu)}
           memory  {stalls(group.memory)}
           io      {stalls(group.io)}
image      {row.image}
image_ref  {container.image_ref}
labels     {", ".join(f"{key}={value}" for key, value in sorted(container.labels.items()))}
'''


def container_lines(live: Live) -> Lines:
    """All about the container under the cursor and its pod."""
    chosen = live.rows[live.at['']].id if live.rows else None
    row = next((TableRow(live, pod, container) for pod in live.metrics.pod_metrics
                for container in pod.container_metrics if container.id == chosen), None)
    if not row:
        return ['No such container.']
    return [
        *map(printable, container_facts(live, row).splitlines()), '',
        *grid(live, 'INTERFACE=name RX/s=counters.rx_bytes/s TX/s=counters.tx_bytes/s', row.pod.network_interfaces,
              row.old_pod.network_interfaces),
        *grid(live, 'DEVICE=device READ/s=rbytes/s WRITE/s=wbytes/s READS/s=rios/s WRITES/s=wios/s',
              row.container.cgroup.io.stat, row.old.cgroup.io.stat),
        *grid(live, 'STORAGE=kind NAME=name BYTES=bytes INODES=inodes', row.pod.ephemeral_storage.usages),
        *grid(live, 'VOLUME=name USED=usage.used SIZE=usage.total USE=usage.used_percent% STUCK=usage.stuck '
              'ERROR=usage.error PLUGIN=plugin', row.pod.volumes)]


def process_lines(live: Live) -> Lines:
    return grid(live, 'PID=pid MEMORY=memory NAME=name', live.node.processes_mem_info)


def disk_lines(live: Live) -> Lines:
    node, old = live.node, live.old_node
    return [
        rates_line(live), '',
        *grid(live, 'DISK=device READS/s=read_ios/s WRITES/s=write_ios/s READ/s=read_sectors/s WRITE/s=write_sectors/s '
              'BUSY=io_ticks/s% IN-FLIGHT=in_flight NUMBER=device_number', node.diskstats, old.diskstats),
        *grid(live, 'FILE-SYSTEM=mountpoint SIZE=total USED=used USE=used_percent% '
              'INODES=inodes FREE=inodes_free:inodes% STUCK=stuck ERROR=error TYPE=fstype', node.disk_usages),
        *grid(live, 'INTERFACE=name RX/s=counters.rx_bytes/s TX/s=counters.tx_bytes/s STATE=operstate',
              node.network_interfaces, old.network_interfaces)]


def failure_lines(live: Live) -> Lines:
    return [printable(f'{subject}: {reason}') for subject, reason in sorted(live.failures.items())]


def help_lines(live: Live) -> Lines:
    return [text for text, *_ in KEYS]


# By the key that opens and closes it, a page's title and lines.
PAGES = {'Enter': ('container', container_lines), 'p': ('largest processes', process_lines),
         'd': ('disks, file systems, interfaces', disk_lines), 't': ('in trouble', failure_lines),
         '?': ('keys', help_lines)}


def page_lines(live: Live) -> Lines:
    """As much of the page as there is room for. What is too wide goes on in the next line."""
    title, lines_of = PAGES[live.page]
    lines = []
    for line in lines_of(live) or ['none']:
        step = live.width if line.isascii() else max(1, live.width // 2)
        lines += [line[at:at + step] for at in range(0, len(line), step)] or ['']
    live.room = max(1, live.height - 2)
    live.last = max(0, len(lines) - live.room)
    first = live.at[live.page] = min(live.at[live.page], live.last)
    shown = f'{title}, lines {first + 1} to {min(first + live.room, len(lines))} of {len(lines)}   Esc closes'
    return [title_line(live), paint(shown, BOLD, live), *lines[first:first + live.room]]


def draw(live: Live) -> None:
    """A screen full, each line over the one before it, so that nothing flickers."""
    live.width, live.height = shutil.get_terminal_size()
    lines = (page_lines(live) if live.page else list_lines(live))[:live.height]
    lines += [''] * (live.height - len(lines))
    text = '\r\n'.join(CLEAR_LINE + clip(line, live.width) for line in lines)
    write_screen(HOME + (text if live.utf8 else text.encode('ascii', 'replace').decode()))


def move(live: Live, step: float) -> None:
    """The cursor through the list, or a page."""
    at = live.at[live.page] = max(0, min(live.at[live.page] + step, live.last))
    if not live.page:
        live.chosen = live.rows[at].id if at else ''


def move_screens(live: Live, step: int) -> None:
    move(live, step * live.room)


def choose(live: Live, field: str, value: Any) -> None:
    """Another list, from its top."""
    setattr(live, field, value)
    live.at[''], live.chosen, live.page = 0, '', ''


def choose_next(live: Live, field: str, step: int) -> None:
    namespaces = {pod.namespace for pod in live.metrics.pod_metrics}
    choices, current = list(ORDERS) if field == 'order' else ['', *sorted(namespaces)], getattr(live, field)
    index = choices.index(current) if current in choices else -1
    choose(live, field, choices[(index + step) % len(choices)])


def open_page(live: Live, page: str) -> None:
    """Or close it, where it is open."""
    live.at[page], live.page = 0, '' if page == live.page else page


def close(live: Live) -> None:
    """The page; without one, the filter."""
    if live.page:
        live.page = ''
    else:
        choose(live, 'search', '')


def toggle(live: Live, field: str) -> None:
    setattr(live, field, not getattr(live, field))


# Names of keys, in ten columns; what they do; and the function that does it, with its arguments.
KEYS: Sequence[Tuple[Any, ...]] = (
    ('Up k       a row up', move, -1),
    ('Down j     a row down', move, 1),
    ('PgUp       a screen up', move_screens, -1),
    ('PgDn       a screen down', move_screens, 1),
    ('Home g     to the first row', move, -math.inf),
    ('End G      to the last row', move, math.inf),
    ('Enter      all about the container under the cursor, and back', open_page, 'Enter'),
    ('/          filter by namespace, pod, container and image: Enter keeps it, Esc clears it', choose, 'typing', True),
    ('n          next namespace', choose_next, 'namespace', 1),
    ('N          previous namespace', choose_next, 'namespace', -1),
    (f's >        next order: {", ".join(ORDERS)}', choose_next, 'order', 1),
    ('S <        previous order', choose_next, 'order', -1),
    ('c          by CPU', choose, 'order', 'cpu'),
    ('m          by memory', choose, 'order', 'memory'),
    ('r          by restarts', choose, 'order', 'restarts'),
    ('p          the largest processes', open_page, 'p'),
    ('d          disks, file systems and interfaces', open_page, 'd'),
    ('t          what the agent could not read, and why', open_page, 't'),
    ('?          this page', open_page, '?'),
    ('Esc        back to the list; in the list, without the filter', close),
    ('Space      pause: the screen stands, snapshots go on', toggle, 'paused'),
    ('q          quit, as Ctrl-C; Ctrl-Z suspends', toggle, 'ended'),
)


def press_key(live: Live, key: str) -> None:
    edits = {'Enter': live.search, 'Esc': '', 'Backspace': live.search[:-1], 'Space': live.search + ' '}
    if live.typing and (key in edits or len(key) == 1):
        live.typing = key not in ('Enter', 'Esc')
        choose(live, 'search', edits.get(key, live.search + key))
        return
    for text, press, *arguments in KEYS:
        if key in text[:10].split():
            press(live, *arguments)


def read_keys(live: Live) -> bool:
    """Do what was typed; whether that is the end, as it is where the terminal has gone."""
    keyboard, typed = live.keyboard[0], b''
    with contextlib.suppress(OSError):
        typed = os.read(keyboard, 1024)
        if BEGUN_KEY.search(typed) and select.select([keyboard], [], [], ESCAPE_SECONDS)[0]:
            typed += os.read(keyboard, 1024)
    for match in KEY.finditer(typed.decode(errors='ignore')):
        press_key(live, KEY_NAMES.get(match[0].replace('\x1bO', '\x1b['), match[0]))
    return live.ended or not typed


def write_screen(text: str) -> None:
    """A terminal that has gone (EIO) is a reader that has gone."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:
        raise BrokenPipeError from error


def enter_screen(live: Live) -> None:
    """Switch the terminal to unbuffered input without echo and to the alternate screen."""
    import termios
    import tty
    for keyboard in live.keyboard:
        live.settings = termios.tcgetattr(keyboard)
        tty.setcbreak(keyboard)
    write_screen(ENTER_SCREEN)


def leave_screen(live: Live) -> None:
    import termios
    for keyboard in live.keyboard:
        with contextlib.suppress(termios.error):
            termios.tcsetattr(keyboard, termios.TCSADRAIN, live.settings)
    write_screen(PLAIN + LEAVE_SCREEN)


def suspend(live: Live) -> None:
    """Ctrl-Z: the shell gets the terminal as it was, and `fg` brings the view back."""
    leave_screen(live)
    os.kill(os.getpid(), signal.SIGSTOP)
    enter_screen(live)


@contextlib.contextmanager
def live_screen(live: Live) -> Iterator[None]:
    """Whatever ends the view, the terminal is as it was, and what is in trouble is on stderr."""
    enter_screen(live)
    try:
        yield
    finally:
        leave_screen(live)
        with contextlib.suppress(OSError):
            for line in failure_lines(live):
                print(f'kubensage-agent: {line}', file=sys.stderr)


# --- Prometheus

# Names are those of node_exporter and cAdvisor where they have one for exactly this value, so that their dashboards
# and alerts work; else kubensage_. A row: name, help, the field that has the value, and the divisor, if any, that
# gives the base unit. Divided, not multiplied: 3815668 µs are 3.815668 s, times 1e-6 they would be
# 3.8156679999999996. A name in _total is a counter, another one a gauge, but for what node_exporter leaves untyped.
NODE, CADVISOR = '/metrics', '/metrics/cadvisor'
# The unit of the kernel's clock: parts in a million, with 16 bits behind the point.
PPM = 65536 * 1e6
UNTYPED = re.compile(r'node_(vmstat|netstat)_')
# By map of NodeMetrics, what comes before the key in a sample's name.
MAP_SAMPLES = {'meminfo': 'node_memory_', 'vmstat': 'node_vmstat_', 'netstat': 'node_netstat_', 'snmp': 'node_netstat_',
               'snmp6': 'node_netstat_', 'sockstat': 'node_sockstat_', 'sockstat6': 'node_sockstat_'}
# The line of a pressure file, and the words for it in a sample's name.
STALLS = (('some', 'waiting', 'some task waited'), ('full', 'stalled', 'all tasks waited'))
NODE_SAMPLES = (
    ('node_boot_time_seconds', 'When the node was booted, in Unix seconds.', 'boot_time'),
    ('node_load1', 'Load average over 1 minute.', 'load_average.load1'),
    ('node_load5', 'Load average over 5 minutes.', 'load_average.load5'),
    ('node_load15', 'Load average over 15 minutes.', 'load_average.load15'),
    ('node_procs_running', 'Processes that run or could run.', 'stat.procs_running'),
    ('node_procs_blocked', 'Processes that wait for I/O.', 'stat.procs_blocked'),
    ('node_forks_total', 'Forks.', 'stat.processes'),
    ('node_context_switches_total', 'Context switches.', 'stat.ctxt'),
    ('node_intr_total', 'Interrupts.', 'stat.intr'),
    *((f'node_pressure_{name}_{word}_seconds_total', f'Time in which {text} for {name}.',
       f'psi_{name}_metrics.{kind}.total.value', 1e6)
      for name in ('cpu', 'memory', 'io', 'irq') for kind, word, text in STALLS
      if (name, kind) != ('cpu', 'full')),
    ('node_filefd_allocated', 'File descriptors that are allocated.', 'kernel_limits.file_nr_allocated'),
    ('node_filefd_maximum', 'File descriptors that the kernel allows.', 'kernel_limits.file_nr_max'),
    ('node_nf_conntrack_entries', 'Connections that the kernel tracks.', 'kernel_limits.nf_conntrack_count'),
    ('node_nf_conntrack_entries_limit', 'Connections that the kernel can track.', 'kernel_limits.nf_conntrack_max'),
    ('node_processes_pids', 'Processes.', 'procs'),
    ('node_processes_threads', 'Threads.', 'load_average.threads'),
    ('node_processes_max_threads', 'Threads that the kernel allows.', 'kernel_limits.threads_max'),
    ('node_processes_max_processes', 'Process IDs that the kernel allows.', 'kernel_limits.pid_max'),
    ('node_kernel_hung_tasks_total', 'Tasks that hung.', 'kernel_limits.hung_task_detect_count'),
    ('node_entropy_available_bits', 'Entropy that is there.', 'kernel_limits.entropy_avail'),
    ('node_entropy_pool_size_bits', 'Entropy that can be kept.', 'kernel_limits.poolsize'),
    ('node_timex_sync_status', 'Whether the clock is synchronised.', 'clock.synchronized'),
    ('node_timex_offset_seconds', 'Offset of the clock from its reference.', 'clock.offset_seconds'),
    ('node_timex_maxerror_seconds', 'Largest error of the clock.', 'clock.max_error_seconds'),
    ('node_timex_estimated_error_seconds', 'Estimated error of the clock.', 'clock.esterror', 1e6),
    ('node_timex_status', 'Status bits of the clock.', 'clock.status'),
    ('node_timex_loop_time_constant', 'Time constant of the phase-locked loop.', 'clock.constant'),
    ('node_timex_tick_seconds', 'Time between two ticks of the clock.', 'clock.tick', 1e6),
    ('node_timex_pps_frequency_hertz', 'Frequency of the pulse per second.', 'clock.ppsfreq', PPM),
    ('node_timex_pps_shift_seconds', 'Interval of the pulse per second.', 'clock.shift'),
    ('node_timex_pps_stability_hertz', 'Stability of the pulse per second.', 'clock.stabil', PPM),
    ('node_timex_pps_jitter_total', 'Times that the jitter was too large.', 'clock.jitcnt'),
    ('node_timex_pps_calibration_total', 'Calibrations.', 'clock.calcnt'),
    ('node_timex_pps_error_total', 'Calibrations that failed.', 'clock.errcnt'),
    ('node_timex_pps_stability_exceeded_total', 'Times that the stability was exceeded.', 'clock.stbcnt'),
    ('node_timex_tai_offset_seconds', 'Offset of atomic time.', 'clock.tai'),
)
NFS_SAMPLES = (('net_connections', 'node_nfs_connections_total'), ('rpc_calls', 'node_nfs_rpcs_total'),
               ('rpc_retrans', 'node_nfs_rpc_retransmissions_total'),
               ('rpc_authrefrsh', 'node_nfs_rpc_authentication_refreshes_total'))
OS_KEYS = frozenset(('BUILD_ID', 'ID', 'ID_LIKE', 'IMAGE_ID', 'IMAGE_VERSION', 'NAME', 'PRETTY_NAME', 'VARIANT',
                     'VARIANT_ID', 'VERSION', 'VERSION_CODENAME', 'VERSION_ID'))
SOFTNET_SAMPLES = (
    ('node_softnet_processed_total', 'Packets processed.', 'processed'),
    ('node_softnet_dropped_total', 'Packets dropped because the backlog was full.', 'dropped'),
    ('node_softnet_times_squeezed_total', 'Times that the budget ran out with work left.', 'time_squeeze'),
    ('node_softnet_received_rps_total', 'Interrupts from other CPUs.', 'received_rps'),
    ('node_softnet_flow_limit_count_total', 'Times that the flow limit was reached.', 'flow_limit_count'),
    ('node_softnet_backlog_len', 'Packets in the backlog.', 'backlog_len'),
)
SCHEDSTAT_SAMPLES = (
    ('node_schedstat_running_seconds_total', 'Time in which tasks ran.', 'run_ns', 1e9),
    ('node_schedstat_waiting_seconds_total', 'Time in which tasks waited to run.', 'wait_ns', 1e9),
    ('node_schedstat_timeslices_total', 'Time slices.', 'timeslices'),
)
CPU_PATH = r'devices/system/cpu/cpu(?P<cpu>\d+)/cpufreq'
COOLER_PATH = r'class/thermal/cooling_device(?P<name>\d+)'
SUPPLY_PATH = r'class/power_supply/(?P<power_supply>[^/]+)'
EDAC_PATH = r'devices/system/edac/mc/mc(?P<controller>\d+)'
# Name, help, the path of the device, whose groups are labels, its file, the divisor; the text `type` is a label, too.
DEVICE_SAMPLES = (
    ('node_thermal_zone_temp', 'Temperature in °C.', r'class/thermal/thermal_zone(?P<zone>\d+)', 'temp', 1e3),
    ('node_cooling_device_cur_state', 'How much it cools.', COOLER_PATH, 'cur_state', 1),
    ('node_cooling_device_max_state', 'How much it can cool.', COOLER_PATH, 'max_state', 1),
    ('node_power_supply_online', 'Whether it supplies.', SUPPLY_PATH, 'online', 1),
    ('node_power_supply_capacity', 'Percent of its capacity.', SUPPLY_PATH, 'capacity', 1),
    ('node_power_supply_voltage_volt', 'Voltage.', SUPPLY_PATH, 'voltage_now', 1e6),
    ('node_power_supply_current_ampere', 'Current.', SUPPLY_PATH, 'current_now', 1e6),
    ('node_power_supply_power_watt', 'Power.', SUPPLY_PATH, 'power_now', 1e6),
    ('node_power_supply_energy_watthour', 'Energy.', SUPPLY_PATH, 'energy_now', 1e6),
    ('node_cpu_scaling_frequency_hertz', 'Frequency.', CPU_PATH, 'scaling_cur_freq', 1e-3),
    ('node_cpu_scaling_frequency_min_hertz', 'Least frequency that is allowed.', CPU_PATH, 'scaling_min_freq', 1e-3),
    ('node_cpu_scaling_frequency_max_hertz', 'Highest frequency that is allowed.', CPU_PATH, 'scaling_max_freq', 1e-3),
    ('node_cpu_frequency_min_hertz', 'Least frequency.', CPU_PATH, 'cpuinfo_min_freq', 1e-3),
    ('node_cpu_frequency_max_hertz', 'Highest frequency.', CPU_PATH, 'cpuinfo_max_freq', 1e-3),
    ('node_edac_correctable_errors_total', 'Errors of memory that were corrected.', EDAC_PATH, 'ce_count', 1),
    ('node_edac_uncorrectable_errors_total', 'Errors of memory that were not.', EDAC_PATH, 'ue_count', 1),
    ('node_edac_csrow_correctable_errors_total', 'Errors of a row that were corrected.',
     rf'{EDAC_PATH}/csrow(?P<csrow>\d+)', 'ce_count', 1),
    ('node_edac_csrow_uncorrectable_errors_total', 'Errors of a row that were not.',
     rf'{EDAC_PATH}/csrow(?P<csrow>\d+)', 'ue_count', 1),
    ('node_md_disks_required', 'Disks that the array needs.', r'block/(?P<device>md[^/]*)/md', 'raid_disks', 1),
)
# By kind of sensor the unit in a sample's name, and the divisor.
HWMON_UNITS = {'temp': ('celsius', 1e3), 'in': ('volts', 1e3), 'curr': ('amps', 1e3), 'power': ('watt', 1e6),
               'energy': ('joule_total', 1e6), 'humidity': ('', 1e6), 'fan': ('rpm', 1)}
# A disk of an array, by the first of these words in its state (admin-guide/md.rst): write_mostly,spare.
MD_STATES = {'in_sync': 'active', 'faulty': 'failed', 'spare': 'spare'}
HWMON_FILE = re.compile(r'(([a-z]+)\d+)_(\w+)')
# Sectors have 512 bytes, ticks are milliseconds.
DISK_SAMPLES = (
    ('node_disk_reads_completed_total', 'Reads completed.', 'read_ios'),
    ('node_disk_reads_merged_total', 'Reads merged.', 'read_merges'),
    ('node_disk_read_bytes_total', 'Bytes read.', 'read_sectors', 1 / SECTOR_BYTES),
    ('node_disk_read_time_seconds_total', 'Time that all reads took.', 'read_ticks', 1000),
    ('node_disk_writes_completed_total', 'Writes completed.', 'write_ios'),
    ('node_disk_writes_merged_total', 'Writes merged.', 'write_merges'),
    ('node_disk_written_bytes_total', 'Bytes written.', 'write_sectors', 1 / SECTOR_BYTES),
    ('node_disk_write_time_seconds_total', 'Time that all writes took.', 'write_ticks', 1000),
    ('node_disk_io_now', 'I/Os under way.', 'in_flight'),
    ('node_disk_io_time_seconds_total', 'Time in which I/O was under way.', 'io_ticks', 1000),
    ('node_disk_io_time_weighted_seconds_total', 'Time that all I/Os took.', 'time_in_queue', 1000),
    ('node_disk_discards_completed_total', 'Discards completed.', 'discard_ios'),
    ('node_disk_discards_merged_total', 'Discards merged.', 'discard_merges'),
    ('node_disk_discarded_sectors_total', 'Sectors discarded.', 'discard_sectors'),
    ('node_disk_discard_time_seconds_total', 'Time that all discards took.', 'discard_ticks', 1000),
    ('node_disk_flush_requests_total', 'Flushes completed.', 'flush_ios'),
    ('node_disk_flush_requests_time_seconds_total', 'Time that all flushes took.', 'flush_ticks', 1000),
)
FILE_SYSTEM_SAMPLES = (
    ('node_filesystem_size_bytes', 'Size of the file system.', 'total'),
    ('node_filesystem_free_bytes', 'Bytes that are free.', 'bytes_free'),
    ('node_filesystem_avail_bytes', 'Bytes that unprivileged users may still use.', 'free'),
    ('node_filesystem_files', 'Inodes.', 'inodes'),
    # glibc fills f_favail with f_ffree.
    ('node_filesystem_files_free', 'Free inodes.', 'inodes_free'),
    ('node_filesystem_readonly', 'Whether the file system is read-only.', 'read_only'),
)
INTERFACE_SAMPLES = (
    ('node_network_carrier', 'Whether the interface has a carrier.', 'carrier'),
    ('node_network_mtu_bytes', 'MTU of the interface.', 'mtu'),
    ('node_network_speed_bytes', 'Speed of the interface, in bytes per second.', 'speed_mbits', 8e-6),
    ('node_network_receive_nohandler_total', 'Packets that nobody took.', 'rx_nohandler'),
    *((f'node_network_{"receive" if way == "rx" else "transmit"}_{name}_total', f'{column} of /proc/net/dev.',
       f'counters.{column}') for column in NET_DEV_COLUMNS for way, _, name in [column.partition('_')]),
)
# cAdvisor's words for the interfaces of a pod.
POD_INTERFACE_SAMPLES = tuple(
    (f'container_network_{way}_{name}_total', f'{prefix}_{column} of a pod.', f'counters.{prefix}_{column}')
    for way, prefix in (('receive', 'rx'), ('transmit', 'tx'))
    for name, column in (('bytes', 'bytes'), ('packets', 'packets'), ('errors', 'errs'), ('packets_dropped', 'drop')))
CGROUP_SAMPLES = (
    ('container_cpu_user_seconds_total', 'CPU time in user mode.', 'cpu.stat.user_usec', 1e6),
    ('container_cpu_system_seconds_total', 'CPU time in the kernel.', 'cpu.stat.system_usec', 1e6),
    ('container_cpu_cfs_periods_total', 'Periods of the CPU quota.', 'cpu.stat.nr_periods'),
    ('container_cpu_cfs_throttled_periods_total', 'Periods in which the quota was used up.', 'cpu.stat.nr_throttled'),
    ('container_cpu_cfs_throttled_seconds_total', 'Time that tasks were throttled.', 'cpu.stat.throttled_usec', 1e6),
    ('container_spec_cpu_quota', 'CPU quota in a period, in µs.', 'cpu.max.quota_usec'),
    ('container_spec_cpu_period', 'Period of the CPU quota, in µs.', 'cpu.max.period_usec'),
    ('container_memory_usage_bytes', 'Memory in use, page cache included.', 'memory.current'),
    ('container_memory_max_usage_bytes', 'Most memory that was in use.', 'memory.peak'),
    ('container_memory_rss', 'Anonymous memory, in bytes.', 'memory.stat.anon'),
    ('container_memory_cache', 'Page cache, in bytes.', 'memory.stat.file'),
    ('container_memory_mapped_file', 'Mapped files, in bytes.', 'memory.stat.file_mapped'),
    ('container_memory_kernel_usage', 'Kernel memory, in bytes.', 'memory.stat.kernel'),
    ('container_memory_swap', 'Swap in use, in bytes.', 'memory.swap.current'),
    ('container_spec_memory_limit_bytes', 'Memory limit.', 'memory.max'),
    ('container_processes', 'Processes.', 'cgroup.procs'),
    ('container_threads', 'Processes and threads.', 'pids.current'),
    ('container_threads_max', 'Processes and threads that may be.', 'pids.max'),
    *((f'container_pressure_{name}_{word}_seconds_total', f'Time in which {text} for {name}.',
       f'{name}.pressure.{kind}.total', 1e6)
      for name in ('cpu', 'memory', 'io') for kind, word, text in STALLS),
)
# Also of a container whose numbers came from the runtime.
CONTAINER_SAMPLES = (
    ('container_start_time_seconds', 'When it was started, in Unix seconds.', 'status.started_at_ns', 1_000_000_000),
    ('kubensage_container_exit_code', 'Exit code of a container that has exited.', 'status.exit_code'),
)
# By container name, without the labels that a restart changes, so that the series continues.
NAME_SAMPLES = (
    ('kubensage_container_restarts', 'Restarts, as the kubelet counts them.', 'restart_count'),
    ('kubensage_container_last_oom_timestamp_seconds', 'When the last OOM kill was seen, in Unix seconds.',
     'last_oom_kill_ns', 1_000_000_000),
    ('kubensage_container_last_exit_code', 'Exit code of the last one that has exited.', 'last_exit.exit_code'),
    ('kubensage_container_last_exit_timestamp_seconds', 'When it exited, in Unix seconds.', 'last_exit.finished_at_ns',
     1_000_000_000),
)
STORAGE_SAMPLES = (
    ('kubensage_pod_ephemeral_storage_bytes', 'Ephemeral storage of the pod, by kind; memory takes no disk.', 'bytes'),
    ('kubensage_pod_ephemeral_storage_inodes', 'Inodes of the ephemeral storage of the pod, by kind.', 'inodes'),
)
VOLUME_SAMPLES = (
    ('kubensage_pod_volume_size_bytes', 'Size of the file system of a mounted volume.', 'usage.total'),
    ('kubensage_pod_volume_used_bytes', 'Bytes in use.', 'usage.used'),
    ('kubensage_pod_volume_available_bytes', 'Bytes that unprivileged users may still use.', 'usage.free'),
    ('kubensage_pod_volume_inodes', 'Inodes.', 'usage.inodes'),
    ('kubensage_pod_volume_inodes_free', 'Free inodes.', 'usage.inodes_free'),
)
# Of the writable layer, and of the file system that has it.
LAYER_SAMPLES = (('container_fs_usage_bytes', 'Bytes that the writable layer takes.', 'used_bytes.value'),)
LAYER_DISK_SAMPLES = (
    ('container_fs_limit_bytes', 'Size of the file system that has the writable layer.', 'total'),
    ('container_fs_inodes_total', 'Inodes of the file system that has the writable layer.', 'inodes'),
    ('container_fs_inodes_free', 'Free inodes of the file system that has the writable layer.', 'inodes_free'),
)
IO_SAMPLES = (
    ('container_fs_reads_bytes_total', 'Bytes read.', 'rbytes'),
    ('container_fs_writes_bytes_total', 'Bytes written.', 'wbytes'),
    ('container_fs_reads_total', 'Reads completed.', 'rios'),
    ('container_fs_writes_total', 'Writes completed.', 'wios'),
)
AGENT_SAMPLES = (
    ('process_cpu_seconds_total', 'CPU time of the agent.', 'cpu_seconds_total'),
    ('process_open_fds', 'Open file descriptors of the agent.', 'open_files'),
    ('process_max_fds', 'File descriptors that the agent may open.', 'max_open_files'),
    ('process_virtual_memory_bytes', 'Virtual memory of the agent.', 'virtual_bytes'),
    ('process_virtual_memory_max_bytes', 'Virtual memory that the agent may have.', 'max_virtual_bytes'),
    ('process_resident_memory_bytes', 'Resident memory of the agent.', 'resident_bytes'),
    ('process_start_time_seconds', 'When the agent was started, in Unix seconds.', 'start_time_seconds'),
    ('process_threads', 'Threads of the agent.', 'threads'),
    ('kubensage_agent_uptime_seconds', 'Time since the start of the agent.', 'uptime_seconds'),
    ('kubensage_agent_cycles_total', 'Snapshots collected.', 'cycles_total'),
    ('kubensage_agent_skipped_ticks_total', 'Cycles left out because one took too long.', 'skipped_ticks_total'),
    ('kubensage_agent_log_lines_left_out_total', 'Lines not logged: their subject had too many in a minute.',
     'log_lines_left_out_total'),
    ('kubensage_agent_collection_seconds', 'Duration of the previous collection.', 'collection_seconds'),
    ('kubensage_backlog_snapshots', 'Snapshots that wait for the relay.', 'backlog.snapshots'),
    ('kubensage_backlog_memory_bytes', 'Memory that they take.', 'backlog.memory_bytes'),
    ('kubensage_backlog_spool_bytes', 'Disk space that they take.', 'backlog.spool_bytes'),
    ('kubensage_backlog_sent_total', 'Snapshots sent to the relay, each attempt counted.', 'backlog.sent_total'),
    ('kubensage_backlog_acknowledged_total', 'Snapshots acknowledged by the relay.', 'backlog.acknowledged_total'),
    ('kubensage_backlog_reconnects_total', 'Connections to the relay after the first one.', 'backlog.reconnects_total'),
    ('kubensage_backlog_seconds_since_acknowledgement', 'Time since the relay has acknowledged a snapshot.',
     'backlog.seconds_since_acknowledgement'),
)
CRI_SAMPLES = (
    ('kubensage_cri_calls_total', 'Calls of the container runtime.', 'calls_total'),
    ('kubensage_cri_failures_total', 'Calls of the container runtime that failed.', 'failures_total'),
    ('kubensage_cri_seconds_total', 'Time that the calls took.', 'seconds_total'),
)

class Family(NamedTuple):
    """All samples of one name: labels as text, value."""
    name: str
    help: str
    samples: List[Tuple[str, float]]


def label_text(labels: Mapping[str, str], others: str = '') -> str:
    """As they are between the braces, behind others."""
    pairs = [others] if others else []
    for key, label in labels.items():
        escaped = printable(label).replace('\\', '\\\\').replace('"', '\\"')
        pairs.append(f'{key}="{escaped}"')
    return ','.join(pairs)


def families_of(rows: Sequence[Tuple[Any, ...]], items: Sequence[Tuple[str, Any]]) -> List[Family]:
    """For each row a family, with a sample for each item that has the row's field."""
    families = []
    for name, text, path, *divisor in rows if items else ():
        get = getter(type(items[0][1]), path)
        values = [(labels, get(message)) for labels, message in items]
        samples = [(labels, value / divisor[0] if divisor else value) for labels, value in values if value is not None]
        families.append(Family(name, text, samples))
    return families


def one(name: str, text: str, value: float, **labels: str) -> Family:
    return Family(name, text, [(label_text(labels), value)])


def by_key(name: str, text: str, label: str, values: Mapping[str, float]) -> Family:
    return Family(name, text, [(label_text({label: key}), value) for key, value in sorted(values.items())])


def map_families(node: wire.NodeMetrics) -> List[Family]:
    """The names are made of the kernel's: Active(anon) of meminfo is node_memory_Active_anon_bytes."""
    families = []
    for field, prefix in MAP_SAMPLES.items():
        for key, value in sorted(getattr(node, field).items()):
            name = prefix + re.sub(r'\W+', '_', key).strip('_')
            unit = '_bytes' if field == 'meminfo' and not key.startswith('HugePages_') else ''
            families.append(one(name + unit, f'{key} of {field}.', value))
    return families


def hwmon_families(devices: Iterable[wire.SysfsDevice]) -> List[Family]:
    """temp1_crit is node_hwmon_temp_crit_celsius{sensor="temp1"}; input is left out of the name."""
    families: Dict[str, Family] = {}
    for device in devices:
        # platform/coretemp.0, the same after each boot.
        parent = device.texts.get('device') or device.texts.get('name') or device.path.rpartition('/')[2]
        chip = {'chip': '_'.join(re.sub('[^a-z0-9:_]', '_', part.lower()).strip('_') for part in parent.split('/'))}
        names = [('node_hwmon_chip_names', {'chip_name': device.texts['name']})] if device.texts.get('name') else []
        names += [('node_hwmon_sensor_label', {'sensor': file[:-6], 'label': text})
                  for file, text in device.texts.items() if file.endswith('_label')]
        samples = [(name, labels, 1) for name, labels in names]
        for sensor, kind, what, number in ((*HWMON_FILE.fullmatch(file).groups(), number)
                                           for file, number in device.numbers.items() if HWMON_FILE.fullmatch(file)):
            unit, divisor = HWMON_UNITS[kind] if what != 'alarm' else ('', 1)
            parts = ('node_hwmon', kind, '' if what == 'input' else what, unit)
            samples.append(('_'.join(filter(None, parts)), {'sensor': sensor}, number / divisor))
        for name, labels, value in samples:
            family = families.setdefault(name, Family(name, 'A sensor, by hwmon/sysfs-interface.rst.', []))
            family.samples.append((label_text({**chip, **labels}), value))
    return [families[name] for name in sorted(families)]


def throttles(node: wire.NodeMetrics, part: str) -> List[Tuple[Dict[str, str], int]]:
    """By core, or by package: the CPUs of one say the same."""
    infos, counts = {cpu.cpu: cpu for cpu in node.cpu_infos}, {}
    for device in node.devices:
        match = re.fullmatch(r'devices/system/cpu/cpu(\d+)/thermal_throttle', device.path)
        info = infos.get(int(match.group(1))) if match else None
        if info and f'{part}_throttle_count' in device.numbers:
            core = info.core_id if part == 'core' else None
            counts[info.physical_id, core] = device.numbers[f'{part}_throttle_count']
    return [({**({'core': core} if core is not None else {}), 'package': package}, count)
            for (package, core), count in sorted(counts.items())]


def device_families(node: wire.NodeMetrics) -> List[Family]:
    families = hwmon_families(device for device in node.devices if device.path.startswith('class/hwmon/'))
    by_path = {device.path: device for device in node.devices}
    for name, text, path, file, divisor in DEVICE_SAMPLES:
        matches = ((re.fullmatch(path, device.path), device) for device in node.devices if file in device.numbers)
        families.append(Family(name, text, [
            (label_text({**match.groupdict(), **({'type': device.texts.get('type', '')} if 'thermal' in path else {})}),
             device.numbers[file] / divisor) for match, device in matches if match]))
    bonds = {path.split('/')[2]: device.texts['slaves'].split() for path, device in by_path.items()
             if path.endswith('/bonding') and 'slaves' in device.texts}
    arrays = collections.Counter(
        (path.split('/')[1], next(filter(None, map(MD_STATES.get, device.texts.get('state', '').split(','))), None))
        for path, device in by_path.items() if '/md/dev-' in path)
    return families + [
        Family('node_bonding_slaves', 'Interfaces of the bond.', [
            (label_text({'master': bond}), len(slaves)) for bond, slaves in bonds.items()]),
        Family('node_bonding_active', 'Interfaces of the bond that are up.', [
            (label_text({'master': bond}), sum(
                by_path[path].texts.get('mii_status') == 'up' for path in by_path
                if path.startswith(f'class/net/{bond}/lower_'))) for bond in bonds]),
        Family('node_md_disks', 'Disks of the array by state.', [
            (label_text({'device': array, 'state': state}), arrays[array, state])
            for array in sorted({array for array, _ in arrays}) for state in sorted(MD_STATES.values())]),
        *(Family(f'node_cpu_{part}_throttles_total', f'Times that it was throttled, by {part}.', [
            (label_text(labels), count) for labels, count in throttles(node, part)]) for part in ('core', 'package')),
        Family('node_dmi_info', 'The machine, by its firmware.', [
            (label_text({key.replace('sys_', 'system_'): text for key, text in sorted(device.texts.items())}), 1)
            for path, device in by_path.items() if path == 'class/dmi/id'])]


def node_families(node: wire.NodeMetrics) -> List[Family]:
    file_systems = [(label_text({'device': disk.device, 'fstype': disk.fstype, 'mountpoint': disk.mountpoint}), disk)
                    for disk in node.disk_usages]
    interfaces = [(label_text({'device': interface.name}), interface) for interface in node.network_interfaces
                  if interface.HasField('counters')]
    return [
        one('node_uname_info', 'The kernel.', 1, sysname='Linux', release=node.kernel_version, machine=node.kernel_arch,
            nodename=node.hostname, version=node.kernel_build, domainname=node.domainname),
        Family('node_cpu_seconds_total', 'CPU time by mode.', [
            (f'cpu="{cpu.cpu}",mode="{mode}"', getattr(cpu.seconds, mode))
            for cpu in node.cpu_infos for mode in CPU_MODES]),
        Family('node_cpu_guest_seconds_total', 'CPU time of guests by mode.', [
            (f'cpu="{cpu.cpu}",mode="{mode}"', value) for cpu in node.cpu_infos
            for mode, value in (('user', cpu.seconds.guest), ('nice', cpu.seconds.guest_nice))]),
        Family('node_network_up', "Whether the interface's operstate is up.", [
            (labels, interface.operstate == 'up') for labels, interface in interfaces
            if interface.HasField('operstate')]),
        *families_of(NODE_SAMPLES, [('', node)]),
        Family('node_timex_frequency_adjustment_ratio', 'How much faster the clock is made.', [
            ('', 1 + node.clock.freq / PPM)] if node.clock.HasField('freq') else []),
        Family('node_timex_pps_jitter_seconds', 'Jitter of the pulse per second.', [
            ('', node.clock.jitter / (1e9 if node.clock.status & STA_NANO else 1e6))
        ] if node.clock.HasField('jitter') else []),
        *map_families(node),
        # The kernel says -1, which is no limit, and knows nothing else.
        *([one('node_netstat_Tcp_MaxConn', 'Connections that TCP may have.', -1)] if node.snmp else []),
        *families_of(DISK_SAMPLES, [(label_text({'device': disk.device}), disk) for disk in node.diskstats]),
        *families_of(FILE_SYSTEM_SAMPLES, file_systems),
        Family('node_filesystem_device_error', 'Whether statvfs fails or does not return.', [
            (labels, disk.stuck or disk.HasField('error')) for labels, disk in file_systems]),
        *families_of(INTERFACE_SAMPLES, interfaces),
        *families_of(SOFTNET_SAMPLES, [(f'cpu="{line.cpu}"', line) for line in node.softnet_stat]),
        *families_of(SCHEDSTAT_SAMPLES, [(f'cpu="{cpu.cpu}"', cpu) for cpu in node.cpu_infos]),
        by_key('node_arp_entries', 'Entries of the ARP table.', 'device', node.arp_entries),
        by_key('node_tcp_connection_states', 'TCP sockets by state.', 'state', node.tcp_states),
        Family('node_udp_queues', 'Bytes in the queues of UDP sockets.', [
            (label_text({'queue': queue, 'ip': version}), size) for key, size in sorted(node.udp_queues.items())
            for queue, _, version in [key.partition('_')]]),
        *(one(name, f'{key} of the NFS client.', node.nfs[key]) for key, name in NFS_SAMPLES if key in node.nfs),
        Family('node_os_info', 'The distribution, by os-release.', [
            (label_text({key.lower(): text for key, text in sorted(node.os_release.items()) if key in OS_KEYS}), 1)
        ] if node.os_release else []),
        *device_families(node)]


def usage_of(container: wire.ContainerMetrics) -> wire.CgroupMetrics:
    """Its cgroup. Where the numbers came from the runtime, these are put into the same fields."""
    if container.HasField('cgroup'):
        return container.cgroup
    cgroup = wire.CgroupMetrics()
    cpu_ns, usage, working, resident = (value_at(container, path) for path in (
        'cpu_metrics.usage_core_nano_seconds.value', 'memory_metrics.usage_bytes.value',
        'memory_metrics.working_set_bytes.value', 'memory_metrics.rss_bytes.value'))
    cgroup.timestamp_ns = max(container.cpu_metrics.timestamp, container.memory_metrics.timestamp)
    current = working if usage is None else usage
    fill_known(cgroup.cpu.stat, usage_usec=None if cpu_ns is None else cpu_ns // 1000)
    fill_known(cgroup.memory, current=current)
    fill_known(cgroup.memory.stat, anon=resident,
               inactive_file=None if working is None else max(0, current - working))
    return cgroup


def shares_of(weight: int) -> int:
    """The shares of cgroup v1 for a weight of v2, as the kubelet converts them."""
    return (weight - 1) * 262142 // 9999 + 2


def holder(node: wire.NodeMetrics, mountpoint: str) -> Optional[wire.DiskUsage]:
    """The file system that has a path."""
    above = [disk for disk in node.disk_usages if f'{mountpoint}/'.startswith(f'{disk.mountpoint.rstrip("/")}/')]
    return max(above, key=lambda disk: len(disk.mountpoint), default=None)


def present_pods(pods: Sequence[wire.PodMetrics]) -> List[wire.PodMetrics]:
    """Of the sandboxes of one name, of which there are two while one is replaced, the last in which something runs."""
    ordered = sorted(pods, key=lambda pod: (
        any(container.state == 'CONTAINER_RUNNING' for container in pod.container_metrics), pod.created_at))
    return list({(pod.namespace, pod.name): pod for pod in ordered}.values())


class Labelled(NamedTuple):
    """What /metrics/cadvisor shows, each with cAdvisor's labels: a container has all of them, or those alone that
    outlive it, a pod no name and no image, a service an id alone, as the node. A layer comes with the file system that
    has it."""
    pods: List[Tuple[str, wire.PodMetrics]]
    containers: List[Tuple[str, wire.ContainerMetrics]]
    names: List[Tuple[str, wire.ContainerMetrics]]
    services: List[Tuple[str, wire.CgroupMetrics]]
    cgroups: List[Tuple[str, wire.CgroupMetrics]]
    layers: List[Tuple[str, wire.DiskUsage, wire.FileSystemMetrics]]


def labelled(metrics: wire.Metrics) -> Labelled:
    node, (pods, containers, names, cgroups, layers) = metrics.node_metrics, ([], [], [], [], [])
    services = [(label_text({'id': f'/{service.cgroup.path}'}), service.cgroup) for service in node.services]
    if node.HasField('cgroup'):
        services.append(('id="/"', node.cgroup))
    for pod in present_pods(metrics.pod_metrics):
        of_pod = {'namespace': pod.namespace, 'pod': pod.name}
        pods.append((label_text(of_pod), pod))
        if pod.HasField('cgroup'):
            cgroups.append((label_text({'id': f'/{pod.cgroup.path}', **of_pod}), pod.cgroup))
        for container in present_containers(pod):
            cgroup, image = usage_of(container), container.user_specified_image or container.image
            labels = label_text({'container': container.name, 'id': cgroup.path and f'/{cgroup.path}', 'image': image,
                                 'name': container.id, **of_pod})
            containers.append((labels, container))
            names.append((label_text({'container': container.name, **of_pod}), container))
            cgroups.append((labels, cgroup))
            layer = container.file_system_metrics
            disk = holder(node, layer.mountpoint) if layer.mountpoint else None
            if disk:
                layers.append((label_text({'device': disk.device}, labels), disk, layer))
    return Labelled(pods, containers, names, services, cgroups + services, layers)


def container_families(metrics: wire.Metrics) -> List[Family]:
    """Of the containers, the pods, the other groups, and the machine."""
    node, (pods, containers, names, services, cgroups, layers) = metrics.node_metrics, labelled(metrics)
    disks = {disk.device_number: f'/dev/{disk.device}' for disk in node.diskstats if disk.device_number}
    volumes = [(label_text({'name': volume.name, 'plugin': volume.plugin}, labels), volume)
               for labels, pod in pods for volume in pod.volumes]
    return [
        one('machine_cpu_cores', 'Logical CPUs.', len(node.cpu_infos)),
        *families_of((('machine_memory_bytes', 'Memory of the node.', 'total_memory'),), [('', node)]),
        one('machine_scrape_error', 'Whether the machine could not be read.', 0),
        Family('kubensage_pod_info', 'What the pod is.', [
            (label_text({'qos_class': pod.qos_class, 'host_network': str(pod.host_network).lower()}, labels), 1)
            for labels, pod in pods]),
        Family('kubensage_pod_left_out', 'What one pod has more of than it may have, and how much of it is missing.', [
            (label_text({'what': what}, labels), count)
            for labels, pod in pods for what, count in sorted(pod.left_out.items())]),
        Family('kubensage_container_info', 'What the container is.', [
            (label_text({'state': container.state, 'reason': container.status.reason}, labels), 1)
            for labels, container in containers]),
        Family('container_cpu_usage_seconds_total', 'CPU time.', [
            (f'{labels},cpu="total"', cgroup.cpu.stat.usage_usec / 1e6)
            for labels, cgroup in cgroups if cgroup.cpu.stat.HasField('usage_usec')]),
        Family('container_memory_working_set_bytes', 'Working set.', [
            (labels, size) for labels, cgroup in cgroups for size in [working_set(cgroup)] if size is not None]),
        Family('container_memory_failures_total', 'Page faults by type.', [
            (label_text({'failure_type': kind, 'scope': 'hierarchy'}, labels), getattr(cgroup.memory.stat, kind))
            for labels, cgroup in cgroups for kind in ('pgfault', 'pgmajfault') if cgroup.memory.stat.HasField(kind)]),
        Family('container_spec_cpu_shares', 'CPU shares, those of v1.', [
            (labels, cgroup.cpu.shares if cgroup.cpu.HasField('shares') else shares_of(cgroup.cpu.weight))
            for labels, cgroup in cgroups if cgroup.cpu.HasField('shares') or cgroup.cpu.HasField('weight')]),
        *families_of(CGROUP_SAMPLES, cgroups),
        Family('container_oom_events_total', 'OOM kills.', [
            (labels, container.oom_kills) for labels, container in names if container.HasField('oom_kills')] + [
            (labels, count) for labels, cgroup in services for count in [oom_kills_of(cgroup)] if count is not None]),
        *families_of(NAME_SAMPLES, names),
        Family('kubensage_container_last_exit_info', 'Why the last one exited.', [
            (label_text({'reason': container.last_exit.reason}, labels), 1)
            for labels, container in names if container.HasField('last_exit')]),
        *families_of(STORAGE_SAMPLES, [
            (label_text({'kind': usage.kind, 'name': usage.name}, labels), usage)
            for labels, pod in pods for usage in pod.ephemeral_storage.usages]),
        *families_of(VOLUME_SAMPLES, volumes),
        Family('kubensage_pod_volume_inodes_used', 'Inodes in use.', [
            (labels, volume.usage.inodes - volume.usage.inodes_free) for labels, volume in volumes
            if volume.usage.HasField('inodes') and volume.usage.HasField('inodes_free')]),
        Family('container_last_seen', 'When it was read, in Unix seconds.', [
            (labels, cgroup.timestamp_ns / 1e9) for labels, cgroup in cgroups if cgroup.timestamp_ns]),
        *families_of(CONTAINER_SAMPLES, containers),
        *families_of(LAYER_SAMPLES, [(labels, layer) for labels, _, layer in layers]),
        *families_of(LAYER_DISK_SAMPLES, [(labels, disk) for labels, disk, _ in layers]),
        *families_of(IO_SAMPLES, [(label_text({'device': disks.get(device.device, device.device)}, labels), device)
                                  for labels, cgroup in cgroups for device in cgroup.io.stat]),
        *families_of(POD_INTERFACE_SAMPLES, [
            (label_text({'interface': interface.name}, labels), interface)
            for labels, pod in pods for interface in pod.network_interfaces])]


def own_families(metrics: wire.Metrics) -> List[Family]:
    """The agent, the runtime."""
    agent, runtime = metrics.agent_metrics, metrics.node_metrics.container_runtime
    failing = {subject.partition(': ')[0] for subject in agent.failing_subjects}
    return [
        Family('kubensage_agent_failures_total', 'Cycles in which a file, or all, of a subject failed.', [
            (label_text({'subject': subject, 'file': file}), count)
            for key, count in sorted(agent.failures_total.items()) for subject, _, file in [key.partition(': ')]]),
        one('kubensage_agent_info', 'The agent.', 1, version=agent.version),
        one('node_exporter_build_info', 'This agent, in the place of node_exporter.', 1, version=agent.version),
        one('node_textfile_scrape_error', 'There are no text files to read.', 0),
        by_key('node_scrape_collector_duration_seconds', 'Time that a subject took.', 'collector',
               agent.subject_seconds),
        by_key('node_scrape_collector_success', 'Whether a subject could be read.', 'collector',
               {subject: subject not in failing for subject in agent.subject_seconds}),
        one('kubensage_snapshot_timestamp_seconds', 'When the snapshot was taken.', metrics.timestamp),
        one('node_time_seconds', 'The time of the node.', agent.timestamp_ns / 1e9),
        Family('kubensage_runtime_info', 'The container runtime.', [
            (label_text({'name': runtime.name, 'version': runtime.version}), 1)] if runtime.name else []),
        by_key('kubensage_backlog_dropped_total', 'Snapshots that were not delivered.', 'cause',
               agent.backlog.dropped_total),
        by_key('kubensage_runtime_condition', 'Whether the runtime reports this condition.', 'condition',
               runtime.conditions),
        by_key('kubensage_runtime_sandboxes', 'Pod sandboxes by state.', 'state', runtime.sandboxes),
        by_key('kubensage_runtime_containers', 'Containers by state.', 'state', runtime.containers),
        *families_of(AGENT_SAMPLES, [('', agent)]),
        *families_of(CRI_SAMPLES, [(label_text({'method': call.method}), call) for call in agent.cri_methods])]


def render_number(value: float) -> str:
    if type(value) is int:
        return str(value)
    return repr(float(value)) if not math.isfinite(value) or value % 1 else str(int(value))


def render_family(family: Family, openmetrics: bool) -> str:
    """Prometheus names the counter with its _total in HELP and TYPE, OpenMetrics without it."""
    kind = 'counter' if family.name.endswith('_total') else 'gauge'
    if UNTYPED.match(family.name):
        kind = 'unknown' if openmetrics else 'untyped'
    name = family.name[:-len('_total')] if openmetrics and kind == 'counter' else family.name
    lines = [f'# HELP {name} {family.help}\n# TYPE {name} {kind}\n']
    lines += (f'{family.name}{{{labels}}} {render_number(value)}\n' if labels else
              f'{family.name} {render_number(value)}\n' for labels, value in family.samples)
    return ''.join(lines)


def render_families(metrics: wire.Metrics, part: str, openmetrics: bool) -> Iterator[str]:
    """`/metrics` has the node and the agent, `/metrics/cadvisor` the containers. Families without a sample are left
    out."""
    families = container_families(metrics) if part == CADVISOR else (
        node_families(metrics.node_metrics) + own_families(metrics))
    return (render_family(family, openmetrics) for family in families if family.samples)


def render_part(metrics: wire.Metrics, part: str, openmetrics: bool) -> str:
    return ''.join(render_families(metrics, part, openmetrics))


def render_prometheus(metrics: wire.Metrics, openmetrics: bool = False) -> str:
    """A snapshot in Prometheus' text format, or OpenMetrics without its end."""
    return render_part(metrics, NODE, openmetrics) + render_part(metrics, CADVISOR, openmetrics)


# --- HTTP

# How long a request may take to arrive, and an answer to be taken; beyond so many connections the oldest is dropped.
HTTP_TIMEOUT_SECONDS, MAX_CONNECTIONS = 5, 32
# The first line and the headers.
MAX_REQUEST_BYTES = 8192
END_OF_HEADERS = re.compile(rb'\r?\n\r?\n')
# How long to wait for a port that is taken.
LISTEN_AGAIN_SECONDS = 1
# How long the end of the agent may wait for the server.
HTTP_POLL_SECONDS = 0.1
# How old the last snapshot may be before the agent calls itself unhealthy: so many intervals, and at least so long.
HEALTHY_INTERVALS, HEALTHY_SECONDS = 3, 15
TEXT_TYPE = 'text/plain; version=0.0.4; charset=utf-8'
# The next one takes twice the time for 5 % less.
GZIP_LEVEL = 1
# Of an Accept-Encoding: gzip, unless its weight is 0.
TAKES_GZIP = re.compile(r'\bgzip\b(?!\s*;\s*q=0(\.0*)?\s*(,|$))')
OPENMETRICS = 'application/openmetrics-text'
OPENMETRICS_TYPE = f'{OPENMETRICS}; version=1.0.0; charset=utf-8'


class ListenError(Exception):
    """Why the agent cannot listen at the address of --listen."""


class Published:
    """The last snapshot, between the collecting thread and those that answer requests; rendered once, at the first
    request."""

    metrics: Optional[wire.Metrics] = None
    # The server of --listen, or why there is none.
    server: Any = None
    trouble: Optional[str] = None

    def __init__(self, address: str, interval: float):
        self.address = address
        self.closed = threading.Event()
        self.interval = interval
        self.taken = time.monotonic()
        self.rendering = threading.Lock()
        # By part, format and compression, the sequence number of the snapshot that was rendered last, and its text,
        # family by family.
        self.rendered: Dict[Tuple[str, bool, bool], Tuple[int, List[bytes]]] = {}


def gzip_member(texts: Iterable[bytes]) -> List[bytes]:
    """Several of them are one gzip (RFC 1952)."""
    packer = zlib.compressobj(GZIP_LEVEL, wbits=31)
    return [*map(packer.compress, texts), packer.flush()]


def rendered(published: Published, metrics: wire.Metrics, part: str, openmetrics: bool, packed: bool) -> List[bytes]:
    """The text of the snapshot, made once."""
    number, texts = published.rendered.get((part, openmetrics, packed), (None, []))
    if number != metrics.agent_metrics.sequence:
        made = map(str.encode, render_families(metrics, part, openmetrics))
        number, texts = metrics.agent_metrics.sequence, gzip_member(made) if packed else list(made)
        published.rendered[part, openmetrics, packed] = number, texts
    return texts


def exposition(published: Published, part: str, openmetrics: bool, packed: bool) -> Optional[List[bytes]]:
    """The text of the last snapshot, which those who ask share, and its age now; None before there is one."""
    with published.rendering:
        metrics, age_seconds = published.metrics, time.monotonic() - published.taken
        if metrics is None:
            return None
        texts = rendered(published, metrics, part, openmetrics, packed)
    age = one('kubensage_snapshot_age_seconds', 'Time since the snapshot was taken.', age_seconds)
    end = ('' if part == CADVISOR else render_family(age, openmetrics)) + ('# EOF\n' if openmetrics else '')
    return texts + (gzip_member([end.encode()]) if packed else [end.encode()])


def prefers_openmetrics(accept: str) -> bool:
    """By the weights of an Accept header (RFC 9110)."""
    weights = {OPENMETRICS: 0.0, 'text/plain': 0.0}
    for part in accept.lower().replace(' ', '').split(','):
        kind, *parameters = part.split(';')
        weight = next((text[2:] for text in parameters if re.fullmatch(r'q=[01](\.\d*)?', text)), 1)
        if kind in weights:
            weights[kind] = max(weights[kind], float(weight))
    return 0 < weights[OPENMETRICS] >= weights['text/plain']


def http_answer(published: Published, path: str, accept: str, packed: bool) -> Tuple[int, str, Sequence[bytes]]:
    """Status, content type and the parts of the body for a GET."""
    path = path.partition('?')[0]
    if path in (NODE, CADVISOR):
        openmetrics = prefers_openmetrics(accept)
        body = exposition(published, path, openmetrics, packed)
        if body is None:
            return 503, 'text/plain', [b'no snapshot yet\n']
        return 200, OPENMETRICS_TYPE if openmetrics else TEXT_TYPE, body
    if path == '/healthz':
        age, trouble = time.monotonic() - published.taken, '' if published.metrics else 'no snapshot yet'
        if age > max(HEALTHY_SECONDS, HEALTHY_INTERVALS * published.interval):
            trouble = f'no snapshot for {age:.0f} s'
        return 503 if trouble else 200, 'text/plain', [f'{trouble or "ok"}\n'.encode()]
    return 404, 'text/plain', [b'404: only /metrics, /metrics/cadvisor and /healthz are served\n']


def read_request(connection: socket.socket) -> bytes:
    """The head of a request, or as much of it as shows that it is too long. OSError where it does not come in time."""
    head, deadline = b'', time.monotonic() + HTTP_TIMEOUT_SECONDS
    while not END_OF_HEADERS.search(head) and len(head) <= MAX_REQUEST_BYTES:
        connection.settimeout(max(0.001, deadline - time.monotonic()))
        chunk = connection.recv(MAX_REQUEST_BYTES + 1 - len(head))
        if not chunk:
            break
        head += chunk
    connection.settimeout(HTTP_TIMEOUT_SECONDS)
    return head


def http_server(published: Published) -> Any:
    """A server of the standard library with a thread for each connection, and a bound on them. OSError: the address is
    not available."""
    # http.client, which http.server imports, imports ssl where there is one.
    with import_spared({'ssl': None}):
        import http.server
    import socketserver
    connections: Dict[Any, None] = {}
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        server_version, sys_version = 'kubensage-agent', ''

        def handle(self) -> None:
            head = read_request(self.connection)
            self.rfile = io.BytesIO(head)
            if len(head) <= MAX_REQUEST_BYTES:
                return super().handle()
            self.command, self.request_version, self.requestline = 'GET', self.protocol_version, ''
            return self.send_error(431)

        def do_GET(self) -> None:
            accept, packings = (','.join(self.headers.get_all(name, ())) for name in ('Accept', 'Accept-Encoding'))
            packed = bool(TAKES_GZIP.search(packings))
            status, content_type, body = http_answer(published, self.path, accept, packed)
            self.send_response(status)
            if packed and content_type in (TEXT_TYPE, OPENMETRICS_TYPE):
                self.send_header('Content-Encoding', 'gzip')
            self.send_header('Content-Type', content_type)
            self.send_header('Content-Length', str(sum(map(len, body))))
            self.end_headers()
            for part in body if self.command == 'GET' else ():
                self.wfile.write(part)

        do_HEAD = do_GET

        def log_message(self, *arguments: Any) -> None:
            log.debug('http: %s', arguments[0] % arguments[1:])

    # Not http.server.HTTPServer: it asks the DNS for the name of the address, and waits for the answer.
    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True
        block_on_close = False
        request_queue_size = 128
        address_family = socket.AF_INET6 if published.address.startswith('[') else socket.AF_INET

        def process_request(self, request: Any, client_address: Any) -> None:
            with lock:
                connections[request] = None
                oldest = next(iter(connections)) if len(connections) > MAX_CONNECTIONS else None
                connections.pop(oldest, None)
            if oldest:
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
            super().process_request(request, client_address)

        def shutdown_request(self, request: Any) -> None:
            with lock:
                connections.pop(request, None)
            super().shutdown_request(request)

        def handle_error(self, request: Any, client_address: Any) -> None:
            log.debug('http: %s', sys.exc_info()[1])

    host, _, port = published.address.rpartition(':')
    return Server((host.strip('[]'), int(port)), Handler)


def listen(published: Published) -> None:
    """One attempt."""
    try:
        published.server, published.trouble = http_server(published), None
    except OSError as error:
        published.trouble = f'--listen {published.address}: {error.strerror or error}'


def serve(published: Published) -> None:
    """The thread that serves, as soon as the port is free."""
    while published.server is None and not published.closed.wait(LISTEN_AGAIN_SECONDS):
        listen(published)
    if published.server:
        published.server.serve_forever(HTTP_POLL_SECONDS)


def stop_serving(published: Published) -> None:
    published.closed.set()
    if published.server:
        published.server.shutdown()
        published.server.server_close()


# --- log

DEFAULT_LOG_FILE = '/var/log/kubensage/kubensage-agent.log'
# What a subject may say in a minute.
LOG_LINES_A_MINUTE = 20
# --log-max-backups 0 keeps all; for logging.handlers 0 means no rotation.
ALL_BACKUPS = 1000


def rotate_log(source: str, destination: str, compress: bool, max_age_seconds: float) -> None:
    """Move the full log file aside, compressed if so wished, and remove what is too old."""
    if compress:
        import gzip
        with open(source, 'rb') as full, open(destination, 'xb', opener=open_log_file) as file:
            with gzip.open(file, 'wb') as packed:
                shutil.copyfileobj(full, packed)
        os.remove(source)
    else:
        os.rename(source, destination)
    directory, name = os.path.split(re.sub(r'\.1(\.gz)?$', '', destination))
    for backup in os.listdir(directory):
        path, ours = os.path.join(directory, backup), re.fullmatch(re.escape(name) + r'\.\d+(\.gz)?', backup)
        if ours and time.time() - os.stat(path).st_mtime > max_age_seconds:
            os.remove(path)


def check_owner(path: str, status: os.stat_result) -> None:
    """PermissionError where it belongs to another user, who would choose where we write."""
    if status.st_uid not in (0, os.geteuid()):
        raise PermissionError(errno.EPERM, f'{path} belongs to user {status.st_uid}')


def open_log_file(path: str, flags: int) -> int:
    """OSError where it is a link, another user's, or a pipe that nobody reads."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o640)
    try:
        status = os.fstat(descriptor)
        check_owner(path, status)
        if status.st_nlink > 1:
            raise PermissionError(errno.EPERM, f'{path} has another name, somewhere else')
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class LogFile(logging.handlers.RotatingFileHandler):
    """A log file that follows no links."""

    def _open(self) -> Any:
        return open(self.baseFilename, self.mode, encoding=self.encoding, errors='backslashreplace',
                    opener=open_log_file)


def log_file_handler(options: Options, path: str) -> logging.Handler:
    """Appends to the file; at --log-max-size it becomes PATH.1.gz, and so on. OSError where it cannot be written, or
    where another user owns a symbolic link on the way to it."""
    directory = os.path.dirname(os.path.abspath(path))
    os.makedirs(directory, mode=0o750, exist_ok=True)
    above = directory
    while above != '/':
        status = os.lstat(above)
        if stat.S_ISLNK(status.st_mode):
            check_owner(above, status)
        above = os.path.dirname(above)
    handler = LogFile(
        path, maxBytes=int(options.log_max_size * 1_000_000), backupCount=options.log_max_backups or ALL_BACKUPS,
        encoding='utf-8')
    if options.log_compress:
        handler.namer = '{}.gz'.format
    max_age_seconds = options.log_max_age * 86400 or math.inf
    handler.rotator = functools.partial(rotate_log, compress=options.log_compress, max_age_seconds=max_age_seconds)
    return handler


class LogBudget(logging.Filter):
    """Text from elsewhere may have line feeds, and none may forge a line of the log; what comes and goes in each cycle
    must not fill it."""

    minute = left_out = 0

    def __init__(self) -> None:
        super().__init__()
        self.lines: Counts = collections.Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        if self.minute != int(time.monotonic() / 60):
            self.minute, self.lines = int(time.monotonic() / 60), collections.Counter()
        # `mount /any/path: ...` is about mounts.
        subject = str(record.args[0]).partition(' /')[0] if record.msg.startswith('%s: ') else record.msg
        self.lines[subject] += 1
        last = ' (more such lines are left out for a minute)' if self.lines[subject] == LOG_LINES_A_MINUTE else ''
        record.msg, record.args = printable(record.getMessage())[:2 * MAX_TEXT] + last, ()
        self.left_out += self.lines[subject] > LOG_LINES_A_MINUTE
        return self.lines[subject] <= LOG_LINES_A_MINUTE


log_budget = LogBudget()


def set_up_log(options: Options) -> None:
    """To stderr; with a relay, where nobody may be watching, to a file as well. stdout belongs to the snapshots."""
    logging.Formatter.converter = time.gmtime
    os.umask(0o027)
    # The live view has the terminal for itself, and shows what is wrong.
    hidden = options.live and sys.stderr and sys.stderr.isatty()
    handlers: List[logging.Handler] = [logging.NullHandler() if hidden else logging.StreamHandler()]
    path = options.log_file or (DEFAULT_LOG_FILE if options.relay_address else None)
    failure = None
    if path:
        try:
            handlers.append(log_file_handler(options, path))
        except OSError as error:
            failure = error
    # A run from cron is silent unless something is wrong.
    handlers[0].setLevel(logging.WARNING if options.once else logging.NOTSET)
    logging.basicConfig(level=options.log_level.upper(), handlers=handlers, datefmt='%Y-%m-%dT%H:%M:%SZ',
                        format='%(asctime)s %(levelname)s %(message)s')
    # What grpc reports comes back as the status of a call.
    logging.getLogger('grpc').setLevel(logging.CRITICAL)
    log.addFilter(log_budget)
    # A log file that cannot be written any more must not fill stderr with tracebacks.
    logging.raiseExceptions = False
    if failure:
        log.warning('log file %s cannot be written (%s): logging to stderr alone', path, failure.strerror)


# --- command line

def number_from(lowest: float, what: str, convert: Callable[[str], float] = int) -> Callable[[str], float]:
    """A type of argument."""
    def argument_number(text: str) -> float:
        try:
            number = convert(text)
        except ValueError:
            number = math.nan
        if not lowest <= number < 2**32:
            raise argparse.ArgumentTypeError(f'{text!r} is not {what}')
        return number

    return argument_number


def argument_boolean(text: str) -> bool:
    """As Go's flag package reads it."""
    if text.lower() in ('1', 't', 'true'):
        return True
    if text.lower() in ('0', 'f', 'false'):
        return False
    raise argparse.ArgumentTypeError(f'{text!r} is neither true nor false')


def argument_address(text: str) -> str:
    match = re.fullmatch(r'(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+):(\d{1,5})', text)
    if not match or not 0 < int(match.group(2)) < 65536:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not HOST:PORT (relay.example:50051, 192.0.2.1:50051, [2001:db8::1]:50051)')
    return text


def argument_socket(text: str) -> str:
    """A path, or a URL of the scheme unix."""
    path = re.sub('^unix:(//)?', '', text)
    if re.match(r'\w+:', path):
        raise argparse.ArgumentTypeError(f'{text!r} is not PATH or unix:///PATH')
    return path


def argument_listen(text: str) -> str:
    """An address to listen at: of the whole machine, where there is none before the port."""
    try:
        return argument_address(re.sub(r'^:?(?=\d+$)', '0.0.0.0:', text))
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f'{text!r} is not [ADDRESS:]PORT (9551, 127.0.0.1:9551, [::1]:9551)') from None


BOOLEAN: Dict[str, Any] = {'type': argument_boolean, 'nargs': '?', 'const': True, 'metavar': 'true|false'}
MEGABYTES: Dict[str, Any] = {'type': number_from(0.001, 'a number of megabytes, above 0', float), 'metavar': 'MB'}

# Each flag may also come from the environment: --relay-address as KUBENSAGE_RELAY_ADDRESS.
PREFIX = 'KUBENSAGE_'
FLAG_GROUPS: Dict[str, Dict[str, Dict[str, Any]]] = {
    'what it does': {
        '--once': dict(BOOLEAN, default=False, help='take one snapshot, deliver or show it, and exit'),
        '--output': dict(
            choices=('table', 'json', 'prometheus'),
            help='how to write snapshots to stdout; by default, without a relay and --listen, the live view on a '
                 'terminal, otherwise a line of JSON for each'),
        '--listen': dict(type=argument_listen, metavar='[ADDRESS:]PORT',
                         help='serve /metrics and /metrics/cadvisor for Prometheus, and /healthz, there'),
        '--receive': dict(type=argument_listen, metavar='[ADDRESS:]PORT',
                          help='be a relay to try: acknowledge what agents send there, show it, count what is missing '
                               'or came twice, and store nothing'),
        '--print-unit': dict(BOOLEAN, default=False, help='print a systemd unit for this command line, and exit'),
        '--print-daemonset': dict(BOOLEAN, default=False,
                                  help='print a Kubernetes manifest for this command line, and exit'),
    },
    'the relay': {
        '--relay-address': dict(type=argument_address, metavar='HOST:PORT', help='deliver the snapshots to this relay'),
        '--relay-tls': dict(BOOLEAN, default=False, help="speak TLS to the relay, trusting the system's roots"),
        '--relay-ca': dict(metavar='FILE', help='speak TLS to the relay, trusting these certificates alone (PEM)'),
        '--relay-cert': dict(metavar='FILE', help="the agent's own certificate, with --relay-key (PEM)"),
        '--relay-key': dict(metavar='FILE', help='the key of --relay-cert (PEM)'),
        '--relay-server-name': dict(metavar='NAME', help="the name in the relay's certificate, where it is not HOST"),
        '--relay-token-file': dict(metavar='FILE',
                                   help='send the token in this file as `authorization: Bearer`; requires TLS'),
    },
    'snapshots that wait for the relay': {
        '--buffer-retention': dict(
            type=number_from(0.01, 'a number of minutes, above 0', float), default=10, metavar='MINUTES',
            help='how long to keep a snapshot while the relay is unreachable'),
        '--buffer-max-size': dict(MEGABYTES, default=64, help='memory that waiting snapshots may take, compressed'),
        '--spool-dir': dict(metavar='DIR', help='keep waiting snapshots there, so that they survive the agent'),
        '--spool-max-size': dict(MEGABYTES, default=512, help='disk space that waiting snapshots may take'),
    },
    'what it reads, and when': {
        '--main-loop-duration': dict(
            type=number_from(0.1, 'a number of seconds, 0.1 or more', float), default=5, metavar='SECONDS',
            help='time from one snapshot to the next; 2 by default in the live view'),
        '--top-n': dict(type=number_from(0, 'a whole number, 0 or more'), default=10, metavar='N',
                        help='how many of the largest processes to list'),
        '--container-stats': dict(choices=('cgroup', 'cri'), default='cgroup',
                                  help="where the containers' CPU, memory and swap come from; with cri no cgroup and "
                                       'no network of a pod is read'),
        '--fs-stats-interval': dict(
            type=number_from(1, 'a number of seconds, 1 or more', float), default=60, metavar='SECONDS',
            help='how often to ask the runtime for the sizes of images and writable layers'),
        '--volume-stats-interval': dict(
            type=number_from(0, 'a number of seconds, 0 or more', float), default=60, metavar='SECONDS',
            help="how often to measure the pods' logs and emptyDir volumes; 0 never does"),
    },
    'where the node is': {
        '--cri-socket': dict(type=argument_socket, metavar='PATH',
                             help="the container runtime's socket; auto-detected by default"),
        '--cri-socket-uid': dict(type=number_from(0, 'the number of a user'), default=0, metavar='UID',
                                 help="trust also a runtime that runs as this user; root's and one's own always are"),
        '--kubelet-root': dict(metavar='DIR', help="the kubelet's --root-dir; auto-detected by default"),
        '--procfs': dict(default='/proc', metavar='DIR', help="where the node's /proc is mounted"),
        '--sysfs': dict(default='/sys', metavar='DIR', help="where the node's /sys is mounted"),
        '--rootfs': dict(default='/', metavar='DIR', help="where the node's / is mounted"),
    },
    'its log': {
        '--log-level': dict(choices=('debug', 'info', 'warning', 'error'), default='info',
                            help='the least severe level to log'),
        '--log-file': dict(metavar='PATH',
                           help=f'log there as well as to stderr; with a relay {DEFAULT_LOG_FILE} by default'),
        '--log-max-size': dict(MEGABYTES, default=10, help='size at which the log file is rotated'),
        '--log-max-backups': dict(type=number_from(0, 'a whole number, 0 or more'), default=5, metavar='N',
                                  help='rotated log files to keep; 0 keeps all'),
        '--log-max-age': dict(type=number_from(0, 'a number of days, 0 or more', float), default=30, metavar='DAYS',
                              help='age at which rotated log files are removed; 0 keeps them'),
        '--log-compress': dict(BOOLEAN, default=True, help='compress rotated log files'),
    },
}
FLAGS = {flag: settings for group in FLAG_GROUPS.values() for flag, settings in group.items()}
# A flag of the first group has an effect only with one of the second.
NEEDS = (
    (('--buffer-retention', '--buffer-max-size', '--spool-dir', '--spool-max-size', '--relay-tls', '--relay-ca',
      '--relay-cert', '--relay-key', '--relay-server-name', '--relay-token-file'), ('--relay-address',)),
    # What is printed has a spool of its own.
    (('--spool-max-size',), ('--spool-dir', '--print-unit', '--print-daemonset')),
    (('--log-max-size', '--log-max-backups', '--log-max-age', '--log-compress'), ('--log-file', '--relay-address')),
    (('--print-unit',), ('--relay-address', '--listen')),
)
# What has no effect beside a flag. A manifest has paths of its own.
EXCLUDES = {
    '--once': ('--listen', '--volume-stats-interval', '--print-unit', '--print-daemonset'),
    '--print-unit': ('--output', '--print-daemonset'),
    '--print-daemonset': ('--output', '--spool-dir', '--log-file', '--procfs', '--sysfs', '--rootfs'),
    '--receive': tuple(FLAGS.keys() - {'--receive', '--output'} - FLAG_GROUPS['its log'].keys()),
}
EXAMPLES = '''\
examples:
  kubensage-agent                                    look at this node, live
  kubensage-agent --once --output json               one snapshot, for a script
  kubensage-agent --listen 9551                      serve it to Prometheus
  kubensage-agent --receive 50051                    see what agents send
  kubensage-agent --relay-address relay:50051        deliver, until it is stopped

exit codes:
  0    done, or stopped by SIGTERM
  1    not done: the last line says why
  2    the command line is wrong
  70   a cycle did not end
  130  Ctrl-C
  141  the reader of its output has gone

Every flag can also come from the environment: KUBENSAGE_RELAY_ADDRESS for --relay-address.
The command line wins.
'''


# https://kubernetes.io/docs/concepts/services-networking/service/#environment-variables
SERVICE_VARIABLE = re.compile(r'_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_\w+)?)?)$')
# How alike a misspelt name and the one that was meant are at least, for difflib.
NEAR = 0.85


def fail_usage(source: str, message: str) -> None:
    """One line to stderr, exit code 2; instead of argparse's usage text."""
    unknown = re.match(r'unrecognized arguments: (\S+)', message)
    if unknown:
        import difflib
        near = difflib.get_close_matches(unknown.group(1).partition('=')[0], [*FLAGS, '--version'], 1, NEAR)
        hint = f'did you mean {near[0]}?' if near else '--help lists them all'
        message = f'unknown argument {unknown.group(1)}; {hint}'
    message = re.sub(r'^argument (--\S+): ', source or r'\1: ', message)
    if sys.stderr:
        sys.stderr.write(f'kubensage-agent: {message}\n')
    raise SystemExit(2)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='kubensage-agent', allow_abbrev=False, usage='%(prog)s [FLAG ...]', epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description='Reads this Kubernetes node, its pods and containers every few seconds, and shows what it has\n'
                    'read, serves it to Prometheus, or delivers it to a relay.')
    parser.add_argument('-V', '--version', action='version', version=f'kubensage-agent {__version__}')
    for title, flags in FLAG_GROUPS.items():
        group = parser.add_argument_group(title)
        for flag, settings in flags.items():
            default = settings.get('default')
            shown = '' if default in (None, False) else f' (default: {str(default).lower()})'
            group.add_argument(flag, **{**settings, 'help': settings['help'] + shown})
    return parser


def variable_of(flag: str) -> str:
    return PREFIX + flag[2:].upper().replace('-', '_')


def value_of(options: Options, flag: str) -> Any:
    return getattr(options, flag[2:].replace('-', '_'))


def trouble_with(options: Options, given: Iterable[str]) -> Optional[str]:
    """What is wrong with the flags that were given, each by itself right."""
    used = [flag for flag in given if value_of(options, flag) is not False]
    for flags, needs in NEEDS:
        idle = next((flag for flag in used if flag in flags), None)
        if idle and not any(value_of(options, other) for other in needs):
            return f'{idle} has no effect without {" or ".join(needs)}'
    for flag, flags in EXCLUDES.items():
        idle = next((other for other in used if other in flags), None)
        if idle and flag in used:
            return f'{idle} has no effect with {flag}'
    for flag in ('--procfs', '--sysfs', '--rootfs', '--kubelet-root'):
        path, above = value_of(options, flag), options.rootfs.rstrip('/') if flag == '--kubelet-root' else ''
        # What is printed may be for another machine.
        printed = options.print_unit or options.print_daemonset
        if flag in given and not printed and not os.path.isdir(above + path):
            return f'{flag} {path}: there is no such directory'
    # Files to trust or to show mean TLS.
    options.relay_tls = bool(options.relay_tls or options.relay_ca or options.relay_cert)
    if bool(options.relay_cert) != bool(options.relay_key):
        return '--relay-cert and --relay-key go together'
    for flag in ('--relay-token-file', '--relay-server-name'):
        if value_of(options, flag) and not options.relay_tls:
            return f'{flag} needs TLS: --relay-tls, or --relay-ca FILE'
    return None


def choose_output(options: Options, given: Iterable[str], terminal: bool) -> None:
    """Where snapshots go without --output: to the relay or to Prometheus if there are any, otherwise to the live view
    on a terminal, otherwise to programs."""
    if options.receive:
        options.output = options.output or 'json'
    served = bool(options.relay_address or options.listen)
    options.live = terminal and not (served or options.once or options.output)
    if options.live and '--main-loop-duration' not in given:
        options.main_loop_duration = LIVE_INTERVAL_SECONDS
    if not options.output and not options.live and (options.once and not options.relay_address or not served):
        options.output = 'table' if terminal else 'json'


def parse_options(arguments: Sequence[str], environment: Mapping[str, str],
                  terminal: bool = False) -> Options:
    """Flags from the environment first, so that those of the command line win. An empty variable is none."""
    parser, options = argument_parser(), Options()
    present = [flag for flag in FLAGS if environment.get(variable_of(flag))]
    for flag in present:
        variable = variable_of(flag)
        parser.error = functools.partial(fail_usage, f'{variable}: ')
        parser.parse_args([f'{flag}={environment[variable]}'], options)
    parser.error = functools.partial(fail_usage, '')
    options = parser.parse_args(arguments, options)
    named = {argument.partition('=')[0] for argument in arguments}
    # The command line wins, as with --once in the pod of a DaemonSet, whose environment has --listen.
    idle = {other for flag in named & EXCLUDES.keys() if value_of(options, flag) for other in EXCLUDES[flag]} - named
    for flag in idle.intersection(present):
        setattr(options, flag[2:].replace('-', '_'), FLAGS[flag].get('default'))
    options.given = [flag for flag in FLAGS if flag in named or flag in present and flag not in idle]
    trouble = trouble_with(options, options.given)
    if trouble:
        parser.error(trouble)
    choose_output(options, options.given, terminal)
    return options


def unknown_variables(environment: Mapping[str, str]) -> List[str]:
    """What is said of variables that look like the agent's, and are none. Kubernetes makes some for a Service called
    kubensage-relay."""
    import difflib
    known_names = [variable_of(flag)[len(PREFIX):] for flag in FLAGS] + ['CACHE']
    names = [name[len(PREFIX):] for name in sorted(environment) if name.startswith(PREFIX)]
    warnings = []
    for name in names:
        if name not in known_names and not SERVICE_VARIABLE.search(name):
            near = difflib.get_close_matches(name, known_names, 1, NEAR)
            hint = f'; did you mean {PREFIX}{near[0]}?' if near else ''
            warnings.append(f'{PREFIX}{name} is no variable of the agent{hint}')
    return warnings


# --- service

# systemd.exec(5). Left out is what would hide the node from the agent: ProcSubset=pid and ProtectProc= hide /proc,
# PrivateNetwork= the interfaces, PrivateUsers= the runtime's socket; ProtectClock= denies adjtimex(2) even for reading.
UNIT = '''\
[Unit]
Description=kubensage-agent, the telemetry agent of this node
Wants=network-online.target
After=network-online.target

[Service]
Type=notify
ExecStart={command}
Restart=always
RestartSec=5
WatchdogSec={watchdog_seconds}
TimeoutStopSec=20
StateDirectory=kubensage-agent
StateDirectoryMode=0700
CacheDirectory=kubensage-agent
CacheDirectoryMode=0700
LogsDirectory=kubensage
LogsDirectoryMode=0750
UMask=0077
OOMScoreAdjust=-500
LimitNOFILE={open_files}

NoNewPrivileges=yes
CapabilityBoundingSet=CAP_DAC_READ_SEARCH CAP_SYS_PTRACE
ProtectSystem=strict
ProtectHome=read-only
PrivateTmp=yes
PrivateMounts=yes
PrivateDevices=yes
DevicePolicy=closed
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectKernelLogs=yes
ProtectControlGroups=yes
ProtectHostname=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
MemoryDenyWriteExecute=yes
KeyringMode=private
SystemCallArchitectures=native
SystemCallFilter=@system-service adjtimex clock_adjtime
SystemCallFilter=~@resources
SystemCallErrorNumber=EPERM
{extra}
[Install]
WantedBy=multi-user.target
'''
STATE_DIRECTORY = '/var/lib/kubensage-agent'
WATCHDOG_INTERVALS, WATCHDOG_SECONDS = 10, 60
DAEMONSET_LISTEN = '0.0.0.0:9551'
DAEMONSET_DIRECTORY = '/opt/kubensage-agent'
DAEMONSET = '''\
apiVersion: v1
kind: Namespace
metadata:
  name: kubensage
  labels:
    pod-security.kubernetes.io/enforce: privileged
---
apiVersion: v1
kind: ServiceAccount
metadata:
  name: kubensage-agent
  namespace: kubensage
automountServiceAccountToken: false
---
apiVersion: apps/v1
kind: DaemonSet
metadata:
  name: kubensage-agent
  namespace: kubensage
  labels:
    app.kubernetes.io/name: kubensage-agent
    app.kubernetes.io/version: "{version}"
spec:
  selector:
    matchLabels:
      app.kubernetes.io/name: kubensage-agent
  updateStrategy:
    type: RollingUpdate
    rollingUpdate:
      maxUnavailable: 10%
  template:
    metadata:
      labels:
        app.kubernetes.io/name: kubensage-agent
      annotations:
        prometheus.io/scrape: "true"
        prometheus.io/port: "{port}"
    spec:
      serviceAccountName: kubensage-agent
      automountServiceAccountToken: false
      enableServiceLinks: false
      hostNetwork: true
      hostPID: true
      dnsPolicy: ClusterFirstWithHostNet
      terminationGracePeriodSeconds: 20
      tolerations:
        - operator: Exists
      containers:
        - name: agent
          image: python:3.14-slim
          # {archive} must be on each node.
          command: ["python3", "-I", "{archive}"]
          env:
{environment}
          ports:
            - name: metrics
              containerPort: {port}
              hostPort: {port}
          readinessProbe:
            httpGet:
              path: /healthz
              port: metrics
            periodSeconds: 10
          livenessProbe:
            httpGet:
              path: /healthz
              port: metrics
            initialDelaySeconds: 30
            periodSeconds: 30
            failureThreshold: 4
          resources:
            requests:
              cpu: 20m
              memory: 64Mi
            limits:
              memory: 256Mi
          securityContext:
            runAsUser: 0
            readOnlyRootFilesystem: true
            allowPrivilegeEscalation: false
            capabilities:
              drop: ["ALL"]
              add: ["DAC_READ_SEARCH", "SYS_PTRACE"]
          volumeMounts:
            - name: archive
              mountPath: {directory}
              readOnly: true
            - name: proc
              mountPath: /host/proc
              readOnly: true
            - name: sys
              mountPath: /host/sys
              readOnly: true
            - name: root
              mountPath: /host/root
              readOnly: true
              mountPropagation: HostToContainer
            - name: cache
              mountPath: {cache}
            - name: state
              mountPath: /var/lib/kubensage-agent
      volumes:
        - name: archive
          hostPath:
            path: {directory}
            type: Directory
        - name: proc
          hostPath:
            path: /proc
        - name: sys
          hostPath:
            path: /sys
        - name: root
          hostPath:
            path: /
        # Not an emptyDir: that is writable by all, and nothing is imported from such a place.
        - name: cache
          hostPath:
            path: {cache}
            type: DirectoryOrCreate
        - name: state
          hostPath:
            path: /var/lib/kubensage-agent
            type: DirectoryOrCreate
'''
# Flags that say what to do now, not how the service runs.
ONE_SHOT_FLAGS = ('--print-unit', '--print-daemonset', '--output')
# Where the unit has a directory of its own.
PRIVATE_DIRECTORIES = ('/tmp/', '/var/tmp/')


def given_flags(options: Options) -> Dict[str, str]:
    """The flags that were given, without those that say what to do now; files by their absolute paths."""
    given = {}
    for flag in sorted({*options.given} - {*ONE_SHOT_FLAGS}):
        value = value_of(options, flag)
        if FLAGS[flag].get('metavar') in ('DIR', 'FILE', 'PATH'):
            value = os.path.abspath(value)
        given[flag] = str(value).lower() if isinstance(value, bool) else re.sub(r'\.0$', '', str(value))
    return given


def systemd_quote(argument: str) -> str:
    """systemd.service(5), "Command lines": specifiers and variables are expanded even within quotes."""
    text = argument.replace('\\', '\\\\').replace('%', '%%').replace('$', '$$').replace('"', '\\"').replace('\n', '\\n')
    return text if re.fullmatch(r'[^\s"\';]+', text) else f'"{text}"'


def render_unit(options: Options, interpreter: str, program: str) -> str:
    """A unit that runs this program with these flags; the spool, which survives a restart, is on."""
    flags = given_flags(options)
    if options.relay_address:
        flags.setdefault('--spool-dir', STATE_DIRECTORY)
    writable = {flags.get('--spool-dir'), os.path.dirname(flags.get('--log-file', ''))} - {None, '', STATE_DIRECTORY}
    extra = ''.join(f'ReadWritePaths={systemd_quote("-" + path)}\n' for path in sorted(writable))
    command = [interpreter, '-I', program, *(f'{flag}={value}' for flag, value in flags.items())]
    watchdog_seconds = math.ceil(max(WATCHDOG_SECONDS, WATCHDOG_INTERVALS * options.main_loop_duration))
    return UNIT.format(open_files=MAX_OPEN_FILES, command=' '.join(map(systemd_quote, command)), extra=extra,
                       watchdog_seconds=watchdog_seconds)


def render_daemonset(options: Options) -> str:
    """A manifest that runs the archive on every node, the flags given as environment variables. The runtime's socket is
    found below the node's root."""
    listen = options.listen or DAEMONSET_LISTEN
    flags = {**given_flags(options), '--listen': listen, '--procfs': '/host/proc', '--sysfs': '/host/sys',
             '--rootfs': '/host/root'}
    if '--cri-socket' in flags:
        flags['--cri-socket'] = '/host/root' + flags['--cri-socket']
    if options.relay_address:
        flags.update({'--spool-dir': STATE_DIRECTORY, '--log-file': f'{STATE_DIRECTORY}/kubensage-agent.log'})
    environment = '\n'.join(f'            - name: {variable_of(flag)}\n              value: {json.dumps(value)}'
                            for flag, value in sorted(flags.items()))
    return DAEMONSET.format(
        version=__version__, port=listen.rpartition(':')[2], directory=DAEMONSET_DIRECTORY, cache=ROOT_CACHE,
        archive=f'{DAEMONSET_DIRECTORY}/{ARCHIVE_NAME}', environment=environment)


def print_service(options: Options) -> int:
    program = os.path.abspath(getattr(globals().get('__loader__'), 'archive', None) or __file__)
    if options.print_daemonset:
        text = render_daemonset(options)
    elif program.startswith(PRIVATE_DIRECTORIES):
        fail_usage('', f'--print-unit: the unit does not see {program}: copy it to /usr/local/lib')
    else:
        text = render_unit(options, sys.executable, program)
    write_output(text)
    return 0


def notify_systemd(message: str) -> None:
    """sd_notify(3): a datagram to the socket that systemd names; nothing without it."""
    address, kind = os.environ.get('NOTIFY_SOCKET', ''), socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as notify:
            notify.sendto(message.encode(), '\0' + address[1:] if address[0] == '@' else address)


def status_line(metrics: wire.Metrics, backlog: Optional[Backlog], failures: Iterable[str]) -> str:
    """One line for `systemctl status`."""
    containers = sum(len(pod.container_metrics) for pod in metrics.pod_metrics)
    waiting = f', {plural(len(backlog.snapshots), "snapshot")} waiting for the relay' if backlog else ''
    trouble = f'; in trouble: {", ".join(sorted(failures))}' if failures else ''
    return printable(f'{plural(len(metrics.pod_metrics), "pod")}, {plural(containers, "container")}{waiting}{trouble}')


# --- main loop

# --once takes two samples to compute rates: the second begins at least so long after the first began, and so long
# after it ended.
ONCE_INTERVAL_SECONDS, ONCE_PAUSE_SECONDS = 0.5, 0.3
# Of a table that goes into a file.
TABLE_WIDTH = 160
# A cycle that takes so many intervals, and at least so long, ends the agent: better dead and started again than silent.
STUCK_INTERVALS, STUCK_SECONDS, STUCK_CHECKS, STUCK_STATUS = 10, 60, 10, 70
# How many times faster than snapshots are taken the backlog is sent: a relay's queues keep up, and a fleet that comes
# back at once asks for ten times its usual load.
CATCH_UP_PACE = 10


class Sinks(NamedTuple):
    """Where snapshots go."""
    output: Optional[str] = None
    backlog: Optional[Backlog] = None
    published: Optional[Published] = None
    live: Optional[Live] = None


def install_signals(live: bool) -> int:
    """SIGTERM and SIGINT make the returned descriptor readable; the second of them ends the process at once, a live
    view by way of its screen, as does SIGHUP: its terminal has gone. SIGWINCH and SIGTSTP make it readable as well: the
    terminal has another size, or is wanted by its shell."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable)

    def on_signal(number: int, frame: Any) -> None:
        for again in (signal.SIGTERM, signal.SIGINT):
            signal.signal(again, signal.default_int_handler if live else signal.SIG_DFL)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGWINCH, lambda number, frame: None)
    if live:
        signal.signal(signal.SIGHUP, on_signal)
        signal.signal(signal.SIGTSTP, lambda number, frame: None)
    return readable


def stopped_within(descriptor: int, until: float, live: Optional[Live] = None) -> bool:
    """Sleep until an instant of the monotonic clock, unless a signal to stop comes first or has come. The live view
    meanwhile is drawn, and answers keys."""
    keyboard = live.keyboard if live else []
    while True:
        if live:
            draw(live)
        ready = select.select([descriptor, *keyboard], [], [], max(0, until - time.monotonic()))[0]
        if not ready:
            return False
        numbers = os.read(descriptor, 64) if descriptor in ready else b''
        stopping = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP} & {*numbers}
        if stopping:
            log.info('stopping: %s', signal.Signals(max(stopping)).name)
            return True
        if live and signal.SIGTSTP in numbers:
            suspend(live)
        if live and ready[-1] in keyboard and read_keys(live):
            return True


def next_tick(start: float, interval: float, now: float) -> float:
    """The first instant after now on the grid that begins at start: a late cycle skips ticks instead of hurrying."""
    return start + interval * (math.floor((now - start) / interval) + 1)


def open_backlog(options: Options) -> Backlog:
    """The backlog, with what earlier runs have left in the spool. Without a usable spool, it is in memory."""
    retention_seconds, max_bytes = options.buffer_retention * 60, options.buffer_max_size * 1e6
    if options.spool_dir:
        spool = os.path.abspath(options.spool_dir)
        try:
            open_spool(spool, SPOOL_PATIENCE_SECONDS)
            backlog = Backlog(retention_seconds, max_bytes, spool, options.spool_max_size * 1e6)
            load_spool(backlog)
            return backlog
        except (OSError, UnsafePath) as error:
            log.warning('spool: %s: keeping snapshots in memory', error)
    return Backlog(retention_seconds, max_bytes)


def relay_from(options: Options) -> Relay:
    return Relay(*(getattr(options, f'relay_{field}') for field in Relay._fields))


def open_sinks(options: Options, closing: contextlib.ExitStack) -> Sinks:
    """As the options say; what has to be closed is closed with `closing`, in the opposite order."""
    backlog = published = live = None
    if options.listen:
        published = Published(options.listen, options.main_loop_duration)
        listen(published)
        if published.trouble and not (options.relay_address or options.output):
            raise ListenError(published.trouble)
        closing.callback(stop_serving, published)
        start_thread(serve, published)
    if options.relay_address:
        backlog, relay = open_backlog(options), relay_from(options)
        backlog.pace_seconds = min(1, options.main_loop_duration / CATCH_UP_PACE)
        log_exposure(relay)
        closing.callback(end_delivery, backlog, start_delivery(backlog, relay))
    if options.live:
        live = Live()
        closing.enter_context(live_screen(live))
    return Sinks(options.output, backlog, published, live)


def end_delivery(backlog: Backlog, sender: threading.Thread) -> None:
    left = close_backlog(backlog, sender, LAST_ATTEMPT_SECONDS)
    if left:
        kept = '; the spool keeps them' if backlog.spool else ''
        log.warning('stopped: snapshots not acknowledged: %d%s', left, kept)


class OutputError(Exception):
    """Why stdout takes nothing."""


def write_output(text: str) -> None:
    """To stdout, which may be closed (>&-). OutputError; BrokenPipeError where its reader has gone."""
    if not sys.stdout:
        raise OutputError('stdout is closed')
    try:
        sys.stdout.write(text.rstrip('\n') + '\n')
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputError(f'stdout: {error.strerror}') from None


def drop_output() -> None:
    """What stdout has not taken: Python would complain of it once more, at exit."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def show(previous: Optional[wire.Metrics], metrics: wire.Metrics, output: str) -> None:
    if output == 'table':
        text = render_view(previous, metrics, View(shutil.get_terminal_size((TABLE_WIDTH, 0)).columns))
    else:
        text = render_json(metrics) if output == 'json' else render_prometheus(metrics)
    write_output(text)


def hand_over(previous: Optional[wire.Metrics], metrics: wire.Metrics, sinks: Sinks) -> Failures:
    """A snapshot to each sink; what went wrong, by subject."""
    if sinks.published:
        sinks.published.metrics, sinks.published.taken = metrics, time.monotonic()
    failures: Failures = {}
    if sinks.backlog:
        data, failures = serialize(metrics, sinks.backlog.max_snapshot_bytes)
        failures.update(add_snapshot(sinks.backlog, data))
    if sinks.published and sinks.published.trouble:
        failures['listen'] = sinks.published.trouble
    try:
        if sinks.live:
            take_snapshot(sinks.live, previous, metrics)
        if sinks.output:
            show(previous, metrics, sinks.output)
    except OutputError as error:
        failures['output'] = str(error)
    return failures


def run_once(roots: Roots, options: Options) -> int:
    """Two samples, the second of which counts. 1 when a relay was named and has not acknowledged it."""
    stats, state, began = AgentStats(), State(options.top_n), time.monotonic()
    first, _ = collect_snapshot(roots, options, state, stats)
    time.sleep(max(ONCE_PAUSE_SECONDS, began + ONCE_INTERVAL_SECONDS - time.monotonic()))
    # The first one may have come before the sizes of layers were there.
    stats.sequence, state.runtime.storage_due = 0, 0.0
    metrics, failures = collect_snapshot(roots, options, state, stats)
    log_changes({}, failures)
    if options.output:
        show(first, metrics, options.output)
    if not options.relay_address:
        return 0
    backlog, relay = open_backlog(options), relay_from(options)
    # Only for the log file: cron would send a mail with it each time.
    log_exposure(relay, logging.INFO)
    number = backlog.next_number
    data, failures = serialize(metrics, backlog.max_snapshot_bytes)
    log_changes({}, {**failures, **add_snapshot(backlog, data)})
    close_backlog(backlog, start_delivery(backlog, relay), ONCE_DELIVERY_SECONDS)
    log_changes({}, backlog.failures)
    return 0 if backlog.acknowledged_number == number else 1


def run_cycle(roots: Roots, options: Options, state: State, stats: AgentStats, sinks: Sinks,
              previous: Optional[wire.Metrics]) -> Tuple[Optional[wire.Metrics], Failures]:
    """One snapshot, taken and handed over; the snapshot where the next one is compared with it, and what went wrong."""
    metrics, failures = collect_snapshot(roots, options, state, stats, sinks.backlog)
    failures.update(hand_over(previous, metrics, sinks))
    notify_systemd(f'READY=1\nWATCHDOG=1\nSTATUS={status_line(metrics, sinks.backlog, failures)}')
    return metrics if sinks.live or sinks.output == 'table' else None, failures


def end_stuck() -> None:
    """Say where each thread stands, without any lock that one of them may hold, and end."""
    for handler in logging.getLogger().handlers:
        stream = getattr(handler, 'stream', None)
        with contextlib.suppress(OSError, ValueError, AttributeError):
            os.write(stream.fileno(), b'kubensage-agent: a cycle does not end. Where each thread stands:\n')
            faulthandler.dump_traceback(stream)
    os._exit(STUCK_STATUS)


def watch_cycles(stats: AgentStats, seconds: float, stopped: threading.Event) -> None:
    """The thread that ends an agent whose cycle does not end. It counts its own checks: time in which the whole process
    was stopped is none."""
    number, checks = None, 0
    while not stopped.wait(seconds / STUCK_CHECKS):
        checks = checks + 1 if stats.in_cycle and stats.sequence == number else 0
        number = stats.sequence
        if checks > STUCK_CHECKS:
            end_stuck()


def describe(options: Options) -> str:
    """What it is, for the log."""
    parts = [f'kubensage-agent {__version__}', f'reads {options.procfs}, {options.sysfs} and {options.rootfs}']
    if options.relay_address:
        parts.append(f'delivers to {options.relay_address}')
    if options.listen:
        parts.append(f'serves http://{options.listen}{NODE} and {CADVISOR}')
    return ', '.join(parts)


def run_loop(roots: Roots, options: Options) -> int:
    """A snapshot each interval, until a signal; then one last attempt to deliver what is left."""
    log.info('%s', describe(options))
    descriptor, stats, interval = install_signals(options.live), AgentStats(), options.main_loop_duration
    state, previous, troubles, late, tick, stopped = State(options.top_n), None, {}, {}, time.monotonic(), False
    with contextlib.ExitStack() as closing:
        sinks, stopping = open_sinks(options, closing), threading.Event()
        closing.callback(stopping.set)
        start_thread(watch_cycles, stats, max(STUCK_SECONDS, STUCK_INTERVALS * interval), stopping)
        if options.volume_stats_interval:
            start_thread(walk_directories, state.runtime.walker, options.volume_stats_interval, stopping)
        while not stopped:
            stats.in_cycle = True
            try:
                previous, failures = run_cycle(roots, options, state, stats, sinks, previous)
                failures.update(late)
                log_changes(troubles, failures)
                troubles = failures
            except BrokenPipeError:
                raise
            except Exception:
                log.exception('a bug: this snapshot is lost')
                stats.failures['bug'] += 1
                # What was half written goes.
                forget_runtime(state.runtime)
                state = State(options.top_n, state.runtime.walker)
            stats.in_cycle = False
            if sinks.live:
                sinks.live.failures = troubles
            if stats.sequence == 1 and sinks.backlog:
                # A fleet that was switched on at once does not tick at once.
                tick = time.monotonic() - random.uniform(0, interval)
            last, tick = tick, next_tick(tick, interval, time.monotonic())
            skipped = round((tick - last) / interval) - 1
            stats.skipped_ticks += skipped
            late = {'pace': f'a cycle takes longer than {interval:g} s: ticks are skipped'} if skipped else {}
            stopped = stopped_within(descriptor, tick, sinks.live)
        notify_systemd('STOPPING=1')
    return 0


# --- receiver

# --receive: a relay to try, which stores nothing.
RECEIVE_THREADS, RECEIVER_POLL_SECONDS = 32, 0.2
# Two servers at one port would share the snapshots.
RECEIVER_OPTIONS = (('grpc.so_reuseport', 0),)
# At most so many missing numbers are remembered of one gap.
MAX_GAP = 100_000


class Received:
    """What has come of one run of an agent: the lowest and the highest sequence number, which between them are missing,
    how many came, and how many of these came again."""

    def __init__(self, host: str, lowest: int):
        self.host = host
        self.lowest, self.highest = lowest, lowest - 1
        self.missing: Set[int] = set()
        self.count = self.twice = 0


class Receiver:
    """The runs that were seen, the last snapshot of each host, and why the receiver cannot go on."""

    error: Optional[Exception] = None

    def __init__(self, output: str):
        self.output = output
        self.started = time.time()
        self.lock = threading.Lock()
        self.runs: Dict[str, Received] = {}
        self.last: Dict[str, wire.Metrics] = {}

    def show(self, host: str, metrics: wire.Metrics) -> None:
        """OutputError, BrokenPipeError, now and from then on: nothing that was not shown is acknowledged."""
        last = self.last.get(host)
        same_run = last and last.agent_metrics.run_id == metrics.agent_metrics.run_id
        try:
            show(last if same_run else None, metrics, self.output)
        except (OutputError, BrokenPipeError) as error:
            self.error = error
            raise
        self.last[host] = metrics


def count_received(received: Received, sequence: int) -> bool:
    """Whether it is the first time that this number came."""
    received.count += 1
    if received.lowest <= sequence <= received.highest and sequence not in received.missing:
        received.twice += 1
        return False
    received.missing.update(range(max(received.highest + 1, sequence - MAX_GAP), sequence),
                            range(sequence + 1, min(received.lowest, sequence + MAX_GAP)))
    received.missing.discard(sequence)
    received.lowest, received.highest = min(received.lowest, sequence), max(received.highest, sequence)
    return True


def describe_received(received: Received) -> str:
    return (f'{received.host}: {plural(received.count, "snapshot")} received, {len(received.missing)} missing, '
            f'{received.twice} twice')


def receive(receiver: Receiver, metrics: wire.Metrics) -> None:
    """A snapshot is counted and shown. A run that began before the receiver may have been received by another one: it
    is counted from its first snapshot on."""
    agent, host = metrics.agent_metrics, metrics.node_metrics.hostname
    # The Go agent numbers neither its runs nor its snapshots.
    run_id = agent.run_id or host
    with receiver.lock:
        if receiver.error:
            raise receiver.error
        received = receiver.runs.get(run_id)
        if received is None:
            first = 1 if agent.start_time_seconds >= receiver.started else agent.sequence
            received = receiver.runs[run_id] = Received(host, first)
            log.info('%s: agent %s, run %s', host, agent.version, run_id)
        missing = len(received.missing)
        if count_received(received, agent.sequence or received.highest + 1):
            receiver.show(host, metrics)
        if len(received.missing) != missing:
            log.warning('%s', describe_received(received))


def run_receiver(options: Options) -> int:
    """Until a signal: acknowledge what comes, as a relay does, and show it."""
    from concurrent import futures
    descriptor, receiver = install_signals(False), Receiver(options.output)

    def send_metrics(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        try:
            for message in messages:
                receive(receiver, wire.Metrics.FromString(message))
        except DecodeError:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, 'not a metrics.Metrics')
        except (OutputError, BrokenPipeError):
            context.abort(grpc.StatusCode.UNAVAILABLE, 'the receiver cannot write')
        return b''

    server = grpc.server(futures.ThreadPoolExecutor(RECEIVE_THREADS), options=RECEIVER_OPTIONS)
    service, _, method = SEND_METRICS[1:].partition('/')
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {
        method: grpc.stream_unary_rpc_method_handler(send_metrics)}),))
    try:
        server.add_insecure_port(options.receive)
    except RuntimeError:
        raise ListenError(f'--receive {options.receive}: the address is not available') from None
    server.start()
    log.info('receives snapshots at %s and stores nothing: --relay-address=%s sends them here', options.receive,
             options.receive.replace('0.0.0.0', '127.0.0.1'))
    while not receiver.error and not stopped_within(descriptor, time.monotonic() + RECEIVER_POLL_SECONDS):
        pass
    server.stop(RECEIVER_POLL_SECONDS).wait(2 * RECEIVER_POLL_SECONDS)
    for received in receiver.runs.values():
        log.info('%s', describe_received(received))
    if receiver.error:
        raise receiver.error
    return 0


# --- main

# malloc.h, glibc's.
M_ARENA_MAX = -8
# What the agent has beside grpc's: the sender, its stream, the watchdog, the walker, the server of --listen, two
# connections, the statistics; and the helper with a question that waits.
OWN_THREADS = 11


def spare_memory() -> None:
    """The garbage collector need not look at what is there by now. glibc returns the 11 MB that the compiler has used
    and freed (malloc_trim(3)), and all threads allocate from one arena (mallopt(3))."""
    gc.collect()
    gc.freeze()
    with contextlib.suppress(AttributeError):
        libc().mallopt(M_ARENA_MAX, 1)
        libc().malloc_trim(0)


def start_grpc() -> grpc.Channel:
    """A channel that leads nowhere, and keeps grpc's threads as long as it lives: one a CPU, 4 to 16 (Clamp in
    posix_engine.cc), and one each for timers and for the others. grpc does without those that it cannot start, then
    and later on: a call then never ends, not even at its deadline. So they are started when they are to be had, and
    not again after each connection. RuntimeError where there are too few."""
    require_threads(min(max(os.sysconf('SC_NPROCESSORS_CONF'), 4), 16) + 2 + OWN_THREADS)
    return grpc.insecure_channel('unix:/')


def run(options: Options, roots: Roots) -> int:
    """What the options ask for; the exit code."""
    if options.print_unit or options.print_daemonset:
        return print_service(options)
    set_up_log(options)
    for warning in unknown_variables(os.environ):
        log.warning('%s', warning)
    if os.geteuid() != 0 and not options.receive:
        log.warning('not root: pods, containers, the host id, and file systems in private directories may be missing')
    if options.cri_socket_uid:
        log.warning('--cri-socket-uid: user %d may say what pods this node has', options.cri_socket_uid)
    raise_open_files_limit()
    spare_memory()
    with start_grpc():
        if options.receive:
            return run_receiver(options)
        return run_once(roots, options) if options.once else run_loop(roots, options)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_options(arguments, os.environ, bool(sys.stdout and sys.stdout.isatty()))
    if options.live and (os.environ.get('TERM') or 'dumb') == 'dumb':
        options.live, options.output = False, 'table'
    options.cri_socket = options.cri_socket or os.environ.get('CONTAINER_RUNTIME_ENDPOINT')
    if sys.stdout:
        # A terminal of another encoding gets a ? and not a traceback.
        sys.stdout.reconfigure(errors='replace')
    try:
        return run(options, Roots(options.procfs, options.sysfs, options.rootfs))
    except (ListenError, OutputError) as error:
        log.error('%s', error)
        return 1
    except RuntimeError as error:
        if 'thread' not in str(error):
            raise
        log.error('%s: the agent needs a few (pids.max of its cgroup, TasksMax of its unit, ulimit -u)', error)
        return 1
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    finally:
        drop_output()


if __name__ == '__main__':
    sys.exit(main())
