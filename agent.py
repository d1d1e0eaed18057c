#!/usr/bin/env python3
"""kubensage-agent: one snapshot of a Kubernetes node every few seconds, delivered to a relay.

    sudo python3 agent.py                             show this node, live
    python3 agent.py --once --output json             one snapshot, for a script
    python3 agent.py --relay-address relay:50051      deliver snapshots until told to stop
    python3 agent.py --listen 127.0.0.1:9551          serve them to Prometheus

Each cycle reads the node from procfs and sysfs, asks the container runtime for its pods and
containers (CRI over a unix socket), reads what these use from their cgroups, and puts all of it
into one Metrics message (proto/kubensage.proto), serialised part by part: a part that says what it
said is kept from the last cycle. A second thread delivers; a snapshot is forgotten only once the
relay has acknowledged it.

    what we read                      what we take                          documented in
    /proc/stat                        CPU time, boot time, activity         proc_stat(5)
    /proc/cpuinfo, sysfs cpu/         models, topology, frequency           admin-guide/cputopology.rst
    /proc/loadavg                     load, threads                         proc_loadavg(5)
    /proc/meminfo, vmstat             memory, paging, OOM kills             filesystems/proc.rst, 1.2
    /proc/pressure/*                  stall time                            accounting/psi.rst
    /proc/PID/statm, comm             the largest processes                 proc_pid_statm(5)
    /proc/PID/mountinfo, statvfs(3)   file systems and their use            proc_pid_mountinfo(5)
    /proc/diskstats, /sys/block       disk I/O                              admin-guide/iostats.rst
    /proc/net/dev, /sys/class/net     interfaces and their counters         proc_net(5), sysfs-class-net
    /proc/net/route, ipv6_route       the interface of the default route    networking/proc_net
    /proc/net/snmp, netstat,          TCP, UDP, sockets, softirq backlog    networking/snmp_counter.rst
      sockstat, softnet_stat
    rtnetlink RTM_GETADDR             addresses                             rtnetlink(7)
    /proc/uptime, /proc/sys           uptime, host name, kernel, limits     admin-guide/sysctl/
    adjtimex(2)                       whether the clock is synchronised     adjtimex(2)
    /etc/os-release, debian_version   distribution                          os-release(5)
    DMI product_uuid, machine-id      identity of the host                  machine-id(5)
    /sys/fs/cgroup                    containers, pods, services            admin-guide/cgroup-v2.rst, cgroup-v1/
    /proc/PID/net/dev                 the pods' interfaces                  proc_net(5)
    CRI: Version, Status, the lists,  pods, containers, the runtime         kubernetes/cri-api
      ContainerStatus, ImageFsInfo

The sections follow the data: the archive's bundle, files, subjects of the node, runtime and
cgroups, backlog, relay, snapshot, output, command line. `grep '^# ---' agent.py` lists them.
"""
from __future__ import annotations

import argparse
import atexit
import collections
import concurrent.futures
import contextlib
import ctypes
import errno
import fcntl
import functools
import gc
import heapq
import importlib.machinery
import importlib.util
import io
import itertools
import json
import logging
import logging.handlers
import math
import os
import random
import re
import resource
import select
import shutil
import signal
import socket
import stat
import struct
import sys
import threading
import time
import types
import zipimport
import zlib
from typing import (TYPE_CHECKING, Any, Callable, Deque, Dict, FrozenSet, Generator, Iterable, Iterator, List, Mapping,
                    NamedTuple, Optional, Sequence, Set, Tuple, TypeVar)

# hashlib, ssl, html, gzip, difflib and json_format, 6 MB together, are imported where they are needed, if ever.
if TYPE_CHECKING:
    import ssl
    import tarfile

__version__ = '1.0.0'

log = logging.getLogger('kubensage-agent')

# A subject of the node gives the NodeMetrics fields it knows, and what it wants back next cycle.
Fields = Dict[str, Any]
Row = TypeVar('Row')


# --- the bundle

# kubensage-agent.pyz carries grpcio and protobuf for every Python it may meet: bundle.txt says in which member the
# compiled module with which suffix is, and that member, NAME.tar.xz, holds all of one architecture. Compiled modules
# do not import from a zip, so what this interpreter needs is unpacked once, into CACHE/NAME-SUFFIX.
ARCHIVE_NAME = 'kubensage-agent.pyz'
ROOT_CACHE = '/var/cache/kubensage-agent'
# Of every file of an unpacked tree but this one.
MANIFEST = 'MANIFEST'
UNPACKING = '.unpacking-'


class BundleError(Exception):
    """Why grpc cannot be had from the archive: one line for the person who started the agent."""


class UnsafePath(Exception):
    """Which path another user could exchange, and why."""


def extension_suffix() -> str:
    """What this interpreter's compiled modules end in: `.cpython-311-x86_64-linux-gnu.so`."""
    return importlib.machinery.EXTENSION_SUFFIXES[0]


class ManifestEntry(NamedTuple):
    sha256: str
    size: int
    inode: int
    ctime_ns: int


def find_archive() -> Optional[str]:
    """The archive that this module was loaded from; in a checkout without grpcio, the one that was built in it."""
    archive = getattr(globals().get('__loader__'), 'archive', None)
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), ARCHIVE_NAME)
    if archive is None and os.path.exists(beside) and importlib.util.find_spec('grpc') is None:
        return beside
    return archive


def read_member(archive: str, name: str) -> bytes:
    try:
        return zipimport.zipimporter(archive).get_data(os.path.join(archive, name))
    except (OSError, ImportError):
        raise BundleError(f'{archive} is damaged: its {name} cannot be read') from None


def parse_targets(text: str) -> Dict[str, str]:
    """bundle.txt: suffix of compiled modules to member.

    .cpython-311-x86_64-linux-gnu.so x86_64-9f86d081884c7d65.tar.xz
    """
    return dict(line.split() for line in text.splitlines())


def parse_manifest(text: str) -> Dict[str, ManifestEntry]:
    """By path, relative to the tree, the file that was unpacked.

    e45f4f646209f0b4c775357f622a91009bcb8d578cf6b09dc131c2bc789d62b3 4123 1048602 1795450003000000000 grpc/__init__.py
    """
    entries = {}
    for line in text.splitlines():
        digest, size, inode, ctime_ns, path = line.split(' ', 4)
        entries[path] = ManifestEntry(digest, int(size), int(inode), int(ctime_ns))
    return entries


def cache_directory(environment: Mapping[str, str]) -> Optional[str]:
    """Where trees are unpacked; None where there is no place that is this user's own."""
    if environment.get('KUBENSAGE_CACHE'):
        return os.path.abspath(environment['KUBENSAGE_CACHE'])
    if os.geteuid() == 0:
        return ROOT_CACHE
    home = environment.get('XDG_CACHE_HOME') or (environment.get('HOME') and os.path.join(environment['HOME'], '.cache'))
    return os.path.join(os.path.abspath(home), 'kubensage-agent') if home else None


def check_component(path: str, status: os.stat_result) -> None:
    """Raise UnsafePath where somebody else could exchange what lies at or below the path.

    In a sticky directory, as /tmp is, others cannot rename what is not theirs; what is there is checked itself.
    """
    if stat.S_ISLNK(status.st_mode):
        raise UnsafePath(f'{path} is a symbolic link')
    if status.st_uid not in (0, os.geteuid()):
        raise UnsafePath(f'{path} belongs to user {status.st_uid}')
    if status.st_mode & 0o022 and not (stat.S_ISDIR(status.st_mode) and status.st_mode & stat.S_ISVTX):
        raise UnsafePath(f'{path} is writable by others (`chmod go-w {path}` mends it)')
    if not stat.S_ISDIR(status.st_mode) and not stat.S_ISREG(status.st_mode):
        raise UnsafePath(f'{path} is neither a directory nor a regular file')


def check_path(path: str) -> None:
    """check_component of every directory from / to path."""
    while True:
        check_component(path, os.lstat(path))
        if path == os.path.dirname(path):   # '/', or the '//' that POSIX tells from it
            return
        path = os.path.dirname(path)


def read_tree(tree: str) -> Dict[str, os.stat_result]:
    """Every file of a tree, by relative path. UnsafePath where one could be exchanged."""
    files = {}
    for directory, names, file_names in os.walk(tree):
        for name in names + file_names:
            path = os.path.join(directory, name)
            status = os.lstat(path)
            check_component(path, status)
            if stat.S_ISREG(status.st_mode):
                files[path[len(tree) + 1:]] = status
    return files


def file_digest(path: str) -> str:
    import hashlib
    with open(path, 'rb', buffering=0) as file:
        return hashlib.sha256(file.read()).hexdigest()


def is_unchanged(path: str, status: os.stat_result, entry: ManifestEntry) -> bool:
    """Whether a file is the one that was unpacked. Nobody can set its inode's time of change: while that is the same, the
    content is. Hashing all 21 MB at each start would take 20 ms, this takes 3."""
    if (status.st_size, status.st_ino, status.st_ctime_ns) == entry[1:]:
        return True
    return status.st_size == entry.size and file_digest(path) == entry.sha256


def is_intact(tree: str) -> bool:
    """Whether a tree holds the files that were unpacked into it, unchanged, and no others."""
    try:
        check_component(tree, os.lstat(tree))
        files = read_tree(tree)
        del files[MANIFEST]
        with open(os.path.join(tree, MANIFEST), encoding='utf-8') as file:
            manifest = parse_manifest(file.read())
        return files.keys() == manifest.keys() and all(
            is_unchanged(os.path.join(tree, path), status, manifest[path]) for path, status in files.items())
    except (OSError, ValueError, KeyError, UnsafePath):
        return False


def member_path(member: tarfile.TarInfo, suffix: str) -> Optional[str]:
    """Where a member of the tar belongs in the tree; None for one that this interpreter has no use for."""
    name = member.name
    if name.startswith('/') or '..' in name.split('/') or not (member.isreg() or member.isdir()):
        raise BundleError(f'the archive is not to be trusted: it has a member {name!r} (type {member.type!r})')
    wanted = name.endswith(('.py', '.pem', '.abi3.so', suffix)) or '.dist-info/' in name
    return os.path.normpath(name) if wanted and member.isreg() else None


def write_member(tar: tarfile.TarFile, member: tarfile.TarInfo, path: str) -> None:
    os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(descriptor, 'wb') as file:
        shutil.copyfileobj(tar.extractfile(member), file)


def unpack_members(tar: tarfile.TarFile, suffix: str, tree: str) -> bool:
    """Up to and with this interpreter's compiled module; whether there was one."""
    for member in tar:
        path = member_path(member, suffix)
        if path is not None:
            write_member(tar, member, os.path.join(tree, path))
        if path is not None and path.endswith(suffix):
            return True
    return False


def unpack(packed: bytes, suffix: str, tree: str) -> None:
    """Write this interpreter's members into an empty directory. Its compiled module comes after all that is not
    compiled for one Python alone: the rest of the tar is not even decompressed."""
    import lzma
    import tarfile
    try:
        with tarfile.open(fileobj=lzma.open(io.BytesIO(packed)), mode='r|') as tar:
            complete = unpack_members(tar, suffix, tree)
    except (lzma.LZMAError, tarfile.TarError, EOFError) as error:
        raise BundleError(f'the archive is damaged: {error}') from None
    if not complete:
        raise BundleError(f'the archive is damaged: it holds no module *{suffix}, which its bundle.txt promises')


def write_manifest(tree: str) -> None:
    lines = [f'{file_digest(os.path.join(tree, path))} {status.st_size} {status.st_ino} {status.st_ctime_ns} {path}\n'
             for path, status in sorted(read_tree(tree).items())]
    with open(os.path.join(tree, MANIFEST), 'x', encoding='utf-8') as file:
        file.writelines(lines)


def install_tree(archive: str, member: str, suffix: str, tree: str) -> None:
    """Unpack beside the tree, compile, and rename: a tree is there whole or not at all. The caller holds the lock."""
    import compileall
    import hashlib
    import py_compile
    import tempfile
    cache = os.path.dirname(tree)
    packed = read_member(archive, member)
    # The name is that of the content: xz's own check stands after what is decompressed here.
    if hashlib.sha256(packed).hexdigest()[:16] != member.partition('.')[0].rpartition('-')[2]:
        raise BundleError(f'{archive} is damaged: its {member} has another content than was packed')
    fresh = tempfile.mkdtemp(prefix=UNPACKING, dir=cache)
    try:
        unpack(packed, suffix, fresh)
        # The manifest vouches for the byte code, so that no run compares it with its source, or writes it.
        compileall.compile_dir(fresh, quiet=2, stripdir=fresh, prependdir=tree, optimize=0,
                               invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
        write_manifest(fresh)
        if os.path.lexists(tree):
            os.rename(tree, os.path.join(tempfile.mkdtemp(prefix=UNPACKING, dir=cache), 'replaced'))
        os.rename(fresh, tree)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def lock_directory(path: str, mode: int) -> Optional[int]:
    """flock(2) a directory; None if it is taken (LOCK_NB). Closing the descriptor, or dying, gives it back."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, mode)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def outdated_trees(last_used: Mapping[str, float], present: str) -> List[str]:
    """Trees of other archives than the present one and the one used before it, for whichever Python they are.

    Takes when each tree was last used, by name: `x86_64-9f86d081884c7d65.cpython-311-x86_64-linux-gnu`.
    """
    archive_of = {name: name.partition('.')[0] for name in last_used}
    others = [name for name in sorted(last_used, key=last_used.get) if archive_of[name] != archive_of[present]]
    return [name for name in others if archive_of[name] != archive_of[others[-1]]]


def clean_cache(cache: str, present: str) -> None:
    """Remove outdated trees that no running agent holds. The caller has the lock."""
    trees = [entry for entry in os.scandir(cache) if '.cpython-' in entry.name and entry.is_dir(follow_symlinks=False)]
    last_used = {entry.name: entry.stat().st_mtime for entry in trees}
    for name in outdated_trees(last_used, present):
        descriptor = lock_directory(os.path.join(cache, name), fcntl.LOCK_EX | fcntl.LOCK_NB)
        if descriptor is not None:
            shutil.rmtree(os.path.join(cache, name), ignore_errors=True)
            os.close(descriptor)


def clean_leftovers(cache: str) -> None:
    """Remove what killed runs were unpacking, and trees that were replaced. The caller has the lock."""
    for name in os.listdir(cache):
        if name.startswith(UNPACKING):
            shutil.rmtree(os.path.join(cache, name), ignore_errors=True)


def hold_tree(tree: str) -> bool:
    """Check the tree and keep it from being cleaned away as long as this process lives."""
    try:
        lock_directory(tree, fcntl.LOCK_SH)
    except OSError:
        return False
    if not is_intact(tree):
        return False
    with contextlib.suppress(OSError):
        os.utime(tree)
    return True


def ready_tree(archive: str, member: str, suffix: str, cache: str) -> str:
    """The tree for this interpreter, unpacked now unless it is there and intact. OSError where that is impossible."""
    tree = os.path.join(cache, member.partition('.')[0] + suffix[:-len('.so')])
    os.makedirs(cache, mode=0o700, exist_ok=True)
    check_path(cache)
    if os.statvfs(cache).f_flag & os.ST_NOEXEC:
        raise BundleError(f'{cache} is mounted noexec: compiled modules do not load from it (KUBENSAGE_CACHE=DIR names another)')
    if hold_tree(tree):
        return tree
    lock = lock_directory(cache, fcntl.LOCK_EX)
    try:
        if not hold_tree(tree):
            # Before, for its room; after, for a tree that was replaced.
            clean_leftovers(cache)
            install_tree(archive, member, suffix, tree)
            clean_leftovers(cache)
            clean_cache(cache, os.path.basename(tree))
            if not hold_tree(tree):
                raise BundleError(f'{tree} is not what was just unpacked there (KUBENSAGE_CACHE=DIR names another directory)')
    finally:
        os.close(lock)
    return tree


def temporary_cache(reason: str) -> str:
    import tempfile
    cache = tempfile.mkdtemp(prefix='kubensage-agent-')
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    sys.stderr.write(f'kubensage-agent: {reason}: unpacking into {cache} for this run alone (KUBENSAGE_CACHE=DIR names a '
                     'directory that stays)\n')
    return cache


def find_tree(archive: str, member: str, suffix: str, environment: Mapping[str, str]) -> str:
    """A tree in the cache, or where that cannot be written in a temporary directory. BundleError says why in neither."""
    cache = cache_directory(environment)
    try:
        try:
            if cache:
                return ready_tree(archive, member, suffix, cache)
            reason = 'no HOME'
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR):
                raise
            reason = f'{cache} cannot be written ({error.strerror})'
        cache = temporary_cache(reason)
        return ready_tree(archive, member, suffix, cache)
    except OSError as error:
        raise BundleError(f'cannot unpack into {cache}: {error.strerror} (KUBENSAGE_CACHE=DIR names another directory)') from None
    except UnsafePath as error:
        raise BundleError(f'not unpacking into {cache}: {error} (KUBENSAGE_CACHE=DIR names another directory)') from None


def bundle_member(archive: str, suffix: str) -> Optional[str]:
    """The member for this interpreter; None where grpcio is installed instead. BundleError where there is neither."""
    try:
        targets = parse_targets(read_member(archive, 'bundle.txt').decode())
    except ValueError:
        raise BundleError(f'{archive} is damaged: its bundle.txt is malformed') from None
    if suffix in targets or importlib.util.find_spec('grpc'):
        return targets.get(suffix)
    raise BundleError(f'no grpcio for {suffix[1:-3]}: {os.path.basename(archive)} has it for '
                      f'{", ".join(name[1:-3] for name in targets)}; install grpcio and protobuf, or build an archive for '
                      'this machine with `./build_zipapp.sh --native`')


def use_bundle(environment: Mapping[str, str]) -> None:
    """Make `import grpc` find the archive's grpcio, whatever else is installed or lies around. Ends the run if it can't."""
    archive, suffix = find_archive(), extension_suffix()
    if archive is None:
        return
    # PYTHONPYCACHEPREFIX: byte code from elsewhere than the tree is not what the manifest vouches for.
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
    """Modules that are not to be imported meanwhile, and what takes their place: None is one that is not there."""
    spared = {name: stand_in for name, stand_in in stand_ins.items() if name not in sys.modules}
    sys.modules.update(spared)
    try:
        yield
    finally:
        for name in spared:
            del sys.modules[name]


use_bundle(os.environ)
# What the C core has to say comes back as the status of a call.
os.environ.setdefault('GRPC_VERBOSITY', 'NONE')
# Its handlers of fork(2) are for programs that go on in the child; they get in the way of tests, which only exec there.
os.environ.setdefault('GRPC_ENABLE_FORK_SUPPORT', '0')
try:
    # grpc brings its asyncio half along, and asyncio takes ssl where there is one: 5 MB and 13 ms of the start, for nothing.
    with import_spared({'grpc.aio': types.ModuleType('grpc.aio'), 'ssl': None}):
        import grpc
    from google.protobuf.message import DecodeError
    from google.protobuf.wrappers_pb2 import StringValue

    import cri_pb2 as cri
    import kubensage_pb2 as wire
except ModuleNotFoundError as missing:
    sys.exit(f'kubensage-agent: {missing}: `pip install grpcio==1.80.1 protobuf==6.33.6`, or build the archive with '
             './build_zipapp.sh')
except ImportError as broken:
    # Most likely a library of the system that the compiled modules need.
    sys.exit(f'kubensage-agent: grpcio does not load: {broken}')


# --- files

# What these mean for a file of procfs or sysfs: this node, or this user, does not have it.
ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ESRCH, errno.EACCES, errno.EPERM, errno.ENODEV,
                    errno.EOPNOTSUPP})

# What a parser's arithmetic and indexing raise on text that is not what the kernel writes.
MALFORMED = (ValueError, IndexError, KeyError, TypeError, OverflowError)

# A file of one short line fits in.
SMALL_BYTES = 4096


class Roots(NamedTuple):
    """Where the node's trees are mounted: /proc, /sys and /, or another machine's."""
    procfs: str
    sysfs: str
    rootfs: str


def none_if_absent(error: OSError) -> None:
    """Raise it again where it means something else."""
    if error.errno not in ABSENT:
        raise error


def open_file(root: str, path: str) -> Optional[int]:
    """For reading; None where it is absent. Other errors (EIO, EINVAL) are the caller's."""
    try:
        return os.open(f'{root}/{path}', os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return none_if_absent(error)


def read_bytes(root: str, path: str) -> Optional[bytes]:
    """The whole file, None where it is absent."""
    descriptor = open_file(root, path)
    if descriptor is None:
        return None
    try:
        return b''.join(iter(lambda: os.read(descriptor, 1 << 16), b''))
    except OSError as error:
        return none_if_absent(error)
    finally:
        os.close(descriptor)


def read_small(root: str, path: str) -> Optional[bytes]:
    """A file of one short line in procfs or sysfs, which one read(2) gives whole: half of what read_bytes takes for it."""
    try:
        descriptor = os.open(f'{root}/{path}', os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(descriptor, SMALL_BYTES)
        finally:
            os.close(descriptor)
    except OSError as error:
        return none_if_absent(error)


def read_text(root: str, path: str) -> Optional[str]:
    """The whole file as text; bytes that are not UTF-8 become U+FFFD."""
    data = read_bytes(root, path)
    return None if data is None else data.decode(errors='replace')


def read_line(root: str, path: str) -> Optional[str]:
    """A file of one line, without surrounding white space; None where it is absent or empty."""
    data = read_small(root, path)
    return data.decode(errors='replace').strip() or None if data is not None else None


def read_int(root: str, path: str) -> Optional[int]:
    """A file of one decimal or 0x number. EINVAL is how sysfs says "not now" (speed of a link that is down)."""
    try:
        text = read_line(root, path)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return None
        raise
    try:
        return None if text is None else int(text, 0)
    except ValueError:
        raise ValueError(f'{path}: not a number: {text[:80]!r}') from None


def read_names(root: str, path: str) -> List[str]:
    """The names in a directory; none where it is absent."""
    try:
        return os.listdir(f'{root}/{path}')
    except OSError as error:
        if error.errno in ABSENT:
            return []
        raise


def reads_this_machine(roots: Roots) -> bool:
    """Whether what system calls say is about the machine whose trees are read."""
    return roots.procfs == '/proc' or read_line(roots.procfs, 'sys/kernel/random/boot_id') == read_line(
        '/proc', 'sys/kernel/random/boot_id')


def parse_lines(file: str, lines: Iterable[str], parse_line: Callable[[str], Row]) -> List[Row]:
    """parse_line of each line; ValueError names the file and the line that is not as the kernel writes it."""
    rows = []
    for line in lines:
        try:
            rows.append(parse_line(line))
        except MALFORMED:
            raise ValueError(f'{file}: malformed line: {line[:200]!r}') from None
    return rows


def parse_key_values(file: str, text: str) -> Dict[str, int]:
    """Files of `name number` lines: vmstat, memory.stat, cpu.stat, memory.events, ... by the kernel's own names."""
    def parse_line(line: str) -> Tuple[str, int]:
        name, value = line.split()
        return name, int(value)

    words = text.split()
    try:
        # A quarter of the time that line by line takes, which tells the line that is malformed.
        if len(words) == 2 * text.count('\n'):
            return dict(zip(words[::2], map(int, words[1::2])))
    except ValueError:
        pass
    return dict(parse_lines(file, text.splitlines(), parse_line))


# --- files that stay open

# Longer than any file of a control group; io.stat has some 100 bytes a device.
OPEN_FILE_BYTES = 1 << 16
# Those of 1,400 control groups, which cost the kernel 74 MB.
MAX_OPEN_FILES = 1 << 14
# What the rest of the agent may need: connections, the spool, files that are read once.
SPARE_DESCRIPTORS = 256


class OpenFiles:
    """Files that are read in every cycle, None for one that is not open; closed when nothing holds them any more.

    A file of a control group that stays open is read in 1 µs (memory.stat in 6), one that is opened for it in 7 (12). In
    exchange the kernel keeps a buffer of a page for each: 4.5 kB a file.
    """

    def __init__(self, count: int):
        self.descriptors: List[Optional[int]] = [None] * count

    def __del__(self) -> None:
        for descriptor in self.descriptors:
            if descriptor is not None:
                os.close(descriptor)


def read_open_file(descriptor: Optional[int]) -> Optional[bytes]:
    """From its beginning; None where it is absent, or has gone (ENODEV)."""
    try:
        return None if descriptor is None else os.pread(descriptor, OPEN_FILE_BYTES, 0)
    except OSError as error:
        return none_if_absent(error)


def read_open_files(descriptors: Sequence[Optional[int]]) -> Tuple[Optional[bytes], ...]:
    """What each of them says now. The loop that the agent spends most time in: read_open_file is called only on errors."""
    try:
        return tuple([None if descriptor is None else os.pread(descriptor, OPEN_FILE_BYTES, 0) for descriptor in descriptors])
    except OSError:
        return tuple(map(read_open_file, descriptors))


def close_silent_files(files: OpenFiles, texts: Sequence[Optional[bytes]]) -> None:
    """Those that have gone, or say nothing to anybody, so that they are opened again like others that were absent."""
    for number, text in enumerate(texts):
        if text is None and files.descriptors[number] is not None:
            os.close(files.descriptors[number])
            files.descriptors[number] = None


def open_files_limit() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_OPEN_FILES if soft == resource.RLIM_INFINITY else min(soft, MAX_OPEN_FILES)


def may_stay_open(files: OpenFiles) -> bool:
    """Descriptors are given out from the lowest number on: one near the limit means that few are left."""
    highest = max((descriptor for descriptor in files.descriptors if descriptor is not None), default=0)
    return highest < open_files_limit() - SPARE_DESCRIPTORS


def raise_open_files_limit() -> None:
    """As far as the hard limit grants what is wanted. Where even that is denied, files that do not fit are opened each time."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if open_files_limit() < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


# --- CPU

# The columns of a cpu line of /proc/stat, in ticks; guest time is inside user and nice already.
# steal came with Linux 2.6.11, guest with 2.6.24, guest_nice with 2.6.33.
class CpuTimes(NamedTuple):
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


# USER_HZ, the unit of times in procfs: 100 on every architecture in use, whatever the kernel's own HZ.
TICKS_PER_SECOND = os.sysconf('SC_CLK_TCK')
# idle and iowait may go backwards by a little; by more, the CPU was taken offline meanwhile and counts anew.
BACKWARDS_TICKS = 3 * TICKS_PER_SECOND


class CpuIdentity(NamedTuple):
    """What does not change while a CPU is online."""
    model: Optional[str]
    vendor_id: Optional[str]
    physical_id: Optional[int]
    core_id: Optional[int]
    mhz: Optional[int]


class CpuSample(NamedTuple):
    times: Dict[str, CpuTimes]
    identities: Dict[int, CpuIdentity]


# MIDR_EL1 implementer and part numbers; Linux on ARM prints these and no names.
ARM_IMPLEMENTERS = {0x41: 'ARM', 0x48: 'HiSilicon', 0x4e: 'NVIDIA', 0x51: 'Qualcomm', 0x61: 'Apple', 0xc0: 'Ampere'}
ARM_PARTS = {
    (0x41, 0xd03): 'Cortex-A53', (0x41, 0xd05): 'Cortex-A55', (0x41, 0xd07): 'Cortex-A57', (0x41, 0xd08): 'Cortex-A72',
    (0x41, 0xd0b): 'Cortex-A76', (0x41, 0xd0c): 'Neoverse-N1', (0x41, 0xd40): 'Neoverse-V1', (0x41, 0xd49): 'Neoverse-N2',
    (0x41, 0xd4f): 'Neoverse-V2', (0x41, 0xd83): 'Neoverse-V3', (0x41, 0xd8e): 'Neoverse-N3',
    (0x48, 0xd01): 'Kunpeng-920', (0xc0, 0xac3): 'Ampere-1', (0xc0, 0xac4): 'Ampere-1a',
}


def parse_stat(text: str) -> Tuple[Dict[str, CpuTimes], Dict[str, int]]:
    """/proc/stat: the times of `cpu` (all) and `cpuN` (online ones), and the first number of each other line.

    cpu0 21 0 35 9800 12 0 4 0 0 0
    btime 1795425000
    """
    times: Dict[str, CpuTimes] = {}
    numbers: Dict[str, int] = {}

    def parse_line(line: str) -> None:
        name, rest = line.split(None, 1)
        if re.fullmatch(r'cpu\d*', name, re.ASCII):
            times[name] = CpuTimes(*map(int, rest.split()[:10]))
        else:
            numbers[name] = int(rest.split(None, 1)[0])

    parse_lines('stat', filter(str.strip, text.splitlines()), parse_line)
    return times, numbers


def parse_cpuinfo(text: str) -> Dict[int, Dict[str, str]]:
    """/proc/cpuinfo: by the number of the logical CPU, the `key : value` lines of its block."""
    blocks = [dict(parse_lines('cpuinfo', filter(str.strip, block.splitlines()), parse_cpuinfo_line))
              for block in text.split('\n\n')]
    try:
        return {int(block['processor']): block for block in blocks if 'processor' in block}
    except ValueError as error:
        raise ValueError(f'cpuinfo: processor: {error}') from None


def parse_cpuinfo_line(line: str) -> Tuple[str, str]:
    key, value = line.split(':', 1)
    return key.strip(), value.strip()


def cpu_percent(before: CpuTimes, after: CpuTimes) -> Optional[float]:
    """Percent of the time between two samples that was neither idle nor iowait; None if no time has passed.

    idle and iowait may go backwards (proc_stat(5)): such a step counts as 0.
    """
    elapsed = CpuTimes(*(max(0, b - a) for a, b in zip(before, after)))
    total = sum(elapsed[:8])
    return 100 * (total - elapsed.idle - elapsed.iowait) / total if total else None


def without_steps_back(before: CpuTimes, after: CpuTimes) -> CpuTimes:
    """The counters for those who take rates of them: idle and iowait stay where they are instead of going back."""
    idle, iowait = (max(a, b) if a - b < BACKWARDS_TICKS else b for a, b in
                    ((before.idle, after.idle), (before.iowait, after.iowait)))
    return after._replace(idle=idle, iowait=iowait)


def arm_names(implementer: str, part: str) -> Tuple[Optional[str], Optional[str]]:
    """Vendor and model behind `CPU implementer : 0x41` and `CPU part : 0xd0c`; the numbers where not listed."""
    key = int(implementer, 16), int(part, 16)
    return ARM_IMPLEMENTERS.get(key[0], implementer), ARM_PARTS.get(key, f'{implementer}/{part}')


def cores_by_package(identities: Iterable[CpuIdentity]) -> Dict[Optional[int], int]:
    """Physical cores of each package: distinct core ids."""
    cores = {(cpu.physical_id, cpu.core_id) for cpu in identities if cpu.core_id is not None}
    return collections.Counter(package for package, _ in cores)


def build_cpu_seconds(times: CpuTimes) -> wire.CpuSeconds:
    return wire.CpuSeconds(**{mode: ticks / TICKS_PER_SECOND for mode, ticks in zip(CpuTimes._fields, times)})


def build_kernel_activity(numbers: Dict[str, int]) -> wire.KernelActivity:
    return wire.KernelActivity(
        procs_running=numbers.get('procs_running'), procs_blocked=numbers.get('procs_blocked'),
        forks_total=numbers.get('processes'), context_switches_total=numbers.get('ctxt'),
        interrupts_total=numbers.get('intr'))


def build_cpu_info(number: int, cpu: CpuIdentity, cores: Optional[int], usage: Optional[float],
                   times: CpuTimes) -> wire.CpuInfo:
    return wire.CpuInfo(
        model=cpu.model, cores=cores, mhz=cpu.mhz, vendor_id=cpu.vendor_id,
        physical_id=None if cpu.physical_id is None else str(cpu.physical_id),
        core_id=None if cpu.core_id is None else str(cpu.core_id),
        cpu=number, usage=usage, seconds=build_cpu_seconds(times))


def collect_cpu_identity(roots: Roots, number: int, info: Dict[str, str]) -> CpuIdentity:
    """One CPU, from its block of /proc/cpuinfo and from sysfs, which has the topology on every architecture."""
    directory = f'devices/system/cpu/cpu{number}'
    package = read_int(roots.sysfs, f'{directory}/topology/physical_package_id')
    core = read_int(roots.sysfs, f'{directory}/topology/core_id')
    max_khz = read_int(roots.sysfs, f'{directory}/cpufreq/cpuinfo_max_freq')
    vendor, model = info.get('vendor_id'), info.get('model name')
    if 'CPU implementer' in info and 'CPU part' in info:
        vendor, model = arm_names(info['CPU implementer'], info['CPU part'])
    if package is None:
        package = int(info['physical id']) if 'physical id' in info else None
    if core is None:
        core = int(info['core id']) if 'core id' in info else None
    mhz = max_khz // 1000 if max_khz is not None else round(float(info['cpu MHz'])) if 'cpu MHz' in info else None
    return CpuIdentity(model, vendor, package if package != -1 else None, core if core != -1 else None, mhz)


def collect_cpu_identities(roots: Roots, before: Dict[int, CpuIdentity], online: List[int]) -> Dict[int, CpuIdentity]:
    """The identities of the online CPUs, read again only when another set is online: for each read of
    /proc/cpuinfo the kernel asks every CPU for its frequency."""
    if list(before) == online:
        return before
    infos = parse_cpuinfo(read_text(roots.procfs, 'cpuinfo') or '')
    return {number: collect_cpu_identity(roots, number, infos.get(number, {})) for number in online}


def collect_cpu(roots: Roots, before: Optional[CpuSample]) -> Tuple[Fields, Optional[CpuSample]]:
    """Everything of /proc/stat: CPU time, and use since the previous sample, boot time, what the kernel is busy with."""
    text = read_text(roots.procfs, 'stat')
    if text is None:
        return {}, None
    times, numbers = parse_stat(text)
    earlier = before.times if before else {}
    times = {name: without_steps_back(earlier.get(name, after), after) for name, after in times.items()}
    percent = {name: cpu_percent(earlier[name], after) for name, after in times.items() if name in earlier}
    online = [int(name[3:]) for name in times if name != 'cpu']
    identities = collect_cpu_identities(roots, before.identities if before else {}, online)
    cores = cores_by_package(identities.values())
    return {
        'boot_time': numbers.get('btime'),
        'total_cpu_percentage': percent.get('cpu'),
        'cpu_infos': [build_cpu_info(number, cpu, cores.get(cpu.physical_id), percent.get(f'cpu{number}'), times[f'cpu{number}'])
                      for number, cpu in identities.items()],
        'cpu_seconds': build_cpu_seconds(times['cpu']) if 'cpu' in times else None,
        'kernel_activity': build_kernel_activity(numbers),
    }, CpuSample(times, identities)


# --- load

class LoadAvg(NamedTuple):
    load1: float
    load5: float
    load15: float
    runnable_threads: int
    threads: int


def parse_loadavg(text: str) -> LoadAvg:
    """/proc/loadavg: averages of runnable and uninterruptible threads, runnable/all threads, the last pid.

    1.38 1.73 0.83 2/229 2859
    """
    def parse_line(line: str) -> LoadAvg:
        load1, load5, load15, threads = line.split()[:4]
        runnable, total = threads.split('/')
        return LoadAvg(float(load1), float(load5), float(load15), int(runnable), int(total))

    return parse_lines('loadavg', text.splitlines()[:1] or [''], parse_line)[0]


def build_load_average(load: LoadAvg) -> wire.LoadAverage:
    return wire.LoadAverage(**load._asdict())


def collect_load(roots: Roots, before: None) -> Tuple[Fields, None]:
    text = read_text(roots.procfs, 'loadavg')
    return {'load_average': build_load_average(parse_loadavg(text)) if text is not None else None}, None


# --- limits of the kernel

def parse_file_nr(text: str) -> Tuple[int, int]:
    """/proc/sys/fs/file-nr: allocated descriptors, a 0 left from old times, the maximum: `832 0 9223372036854775807`."""
    def parse_line(line: str) -> Tuple[int, int]:
        allocated, _, maximum = line.split()
        return int(allocated), int(maximum)

    return parse_lines('file-nr', text.splitlines()[:1] or [''], parse_line)[0]


def build_kernel_limits(files: Tuple[Optional[int], Optional[int]], threads: Optional[int], threads_max: Optional[int],
                        pid_max: Optional[int], conntrack: Tuple[Optional[int], Optional[int]]) -> wire.KernelLimits:
    return wire.KernelLimits(
        file_descriptors_allocated=files[0], file_descriptors_max=files[1], threads=threads, threads_max=threads_max,
        pid_max=pid_max, conntrack_entries=conntrack[0], conntrack_max=conntrack[1])


def collect_kernel_limits(roots: Roots, before: None) -> Tuple[Fields, None]:
    file_nr, loadavg = read_text(roots.procfs, 'sys/fs/file-nr'), read_text(roots.procfs, 'loadavg')
    conntrack = tuple(read_int(roots.procfs, f'sys/net/netfilter/nf_conntrack_{name}') for name in ('count', 'max'))
    limits = build_kernel_limits(
        parse_file_nr(file_nr) if file_nr is not None else (None, None),
        parse_loadavg(loadavg).threads if loadavg is not None else None,
        read_int(roots.procfs, 'sys/kernel/threads-max'), read_int(roots.procfs, 'sys/kernel/pid_max'), conntrack)
    return {'kernel_limits': limits if limits.ByteSize() else None}, None


# --- memory

def parse_meminfo(text: str) -> Dict[str, int]:
    """/proc/meminfo by the kernel's names, bytes (the file says kB and means 1,024); HugePages_* are counts.

    MemTotal:       24683080 kB
    """
    def parse_line(line: str) -> Tuple[str, int]:
        name, value = line.split(':')
        number, *unit = value.split()
        return name, int(number) * (1024 if unit == ['kB'] else 1)

    return dict(parse_lines('meminfo', text.splitlines(), parse_line))


def build_memory_detail(memory: Dict[str, int]) -> wire.MemoryDetail:
    return wire.MemoryDetail(
        free_bytes=memory.get('MemFree'), buffers_bytes=memory.get('Buffers'), cached_bytes=memory.get('Cached'),
        slab_reclaimable_bytes=memory.get('SReclaimable'), slab_unreclaimable_bytes=memory.get('SUnreclaim'),
        dirty_bytes=memory.get('Dirty'), writeback_bytes=memory.get('Writeback'), shmem_bytes=memory.get('Shmem'),
        anon_pages_bytes=memory.get('AnonPages'), mapped_bytes=memory.get('Mapped'),
        swap_total_bytes=memory.get('SwapTotal'), swap_free_bytes=memory.get('SwapFree'),
        huge_pages_total=memory.get('HugePages_Total'), huge_pages_free=memory.get('HugePages_Free'),
        huge_page_size_bytes=memory.get('Hugepagesize'))


def build_vmstat(vmstat: Dict[str, int]) -> wire.Vmstat:
    return wire.Vmstat(
        oom_kill=vmstat.get('oom_kill'), pgfault=vmstat.get('pgfault'), pgmajfault=vmstat.get('pgmajfault'),
        pswpin=vmstat.get('pswpin'), pswpout=vmstat.get('pswpout'))


def collect_memory(roots: Roots, before: None) -> Tuple[Fields, None]:
    """MemAvailable is the kernel's own estimate, since Linux 3.14; used is what is not available."""
    memory = parse_meminfo(read_text(roots.procfs, 'meminfo') or '')
    vmstat = read_text(roots.procfs, 'vmstat')
    total, available = memory.get('MemTotal'), memory.get('MemAvailable')
    used = None if total is None or available is None else max(0, total - available)
    return {
        'total_memory': total,
        'available_memory': available,
        'used_memory': used,
        'memory_used_perc': 100 * used / total if used is not None and total else None,
        'memory_detail': build_memory_detail(memory) if memory else None,
        # oom_kill is there since Linux 4.13.
        'vmstat': build_vmstat(parse_key_values('vmstat', vmstat)) if vmstat else None,
    }, None


# --- pressure

# accounting/psi.rst, "Pressure interface".
PRESSURE_LINE = re.compile(r'^(\w+) avg10=([\d.]+) avg60=([\d.]+) avg300=([\d.]+) total=(\d+)(?: .*)?$', re.ASCII | re.MULTILINE)
# Percent averages over 10, 60 and 300 s, and a total in µs.
Stall = Tuple[float, float, float, int]


def parse_pressure(text: str) -> Dict[str, Stall]:
    """/proc/pressure/* and *.pressure of a cgroup: by kind of line.

    some avg10=0.36 avg60=0.06 avg300=0.14 total=3037169
    """
    lines = PRESSURE_LINE.findall(text)
    if len(lines) != len(text.splitlines()):
        line = next((line for line in text.splitlines() if not PRESSURE_LINE.match(line)), text)
        raise ValueError(f'pressure: malformed line: {line[:200]!r}')
    return {kind: (float(avg10), float(avg60), float(avg300), int(total)) for kind, avg10, avg60, avg300, total in lines}


def fill_psi_metrics(psi: wire.PsiMetrics, pressure: Dict[str, Stall]) -> None:
    """In place: a group has three of these messages with 11 parts each, and building each part takes four times as long."""
    for kind, stall in pressure.items():
        if kind in ('some', 'full'):
            data = psi.some if kind == 'some' else psi.full
            data.avg10.value, data.avg60.value, data.avg300.value, data.total.value = stall


def build_psi_metrics(pressure: Dict[str, Stall]) -> wire.PsiMetrics:
    psi = wire.PsiMetrics()
    fill_psi_metrics(psi, pressure)
    return psi


def collect_psi_metrics(root: str, path: str) -> Optional[wire.PsiMetrics]:
    text = read_text(root, path)
    return build_psi_metrics(parse_pressure(text)) if text else None


def collect_pressure(roots: Roots, before: None) -> Tuple[Fields, None]:
    """Absent before Linux 4.20; EOPNOTSUPP, which is absent too, where PSI is built in but off."""
    return {f'psi_{resource}_metrics': collect_psi_metrics(roots.procfs, f'pressure/{resource}')
            for resource in ('cpu', 'memory', 'io', 'irq')}, None


# --- processes

PAGE_SIZE_BYTES = os.sysconf('SC_PAGE_SIZE')


def parse_statm(data: bytes) -> int:
    """/proc/PID/statm: the resident set, in pages. One short line: `size resident shared text lib data dt`."""
    try:
        return int(data.split(None, 2)[1])
    except (ValueError, IndexError):
        raise ValueError(f'statm: malformed line: {data[:200]!r}') from None


def largest_processes(resident_bytes: Dict[int, int], n: int) -> List[Tuple[int, int]]:
    """The n largest (pid, bytes), largest first; kernel threads and zombies, which have no memory, never."""
    rows = ((pid, size) for pid, size in resident_bytes.items() if size)
    return heapq.nsmallest(n, rows, key=lambda row: (-row[1], row[0]))


def build_process_mem_info(pid: int, name: str, memory: int) -> wire.ProcessMemInfo:
    return wire.ProcessMemInfo(pid=pid, name=name, memory=memory)


def collect_resident_bytes(roots: Roots, pids: Iterable[int]) -> Dict[int, int]:
    """The resident set of each process that still exists. statm is the cheapest file that has it."""
    resident = {}
    for pid in pids:
        data = read_small(roots.procfs, f'{pid}/statm')
        if data:
            resident[pid] = parse_statm(data) * PAGE_SIZE_BYTES
    return resident


def collect_processes(roots: Roots, before: None, top_n: int) -> Tuple[Fields, None]:
    """All processes are counted, the largest named (comm may hold anything but NUL; its last line feed is the file's)."""
    pids = [int(name) for name in read_names(roots.procfs, '') if name.isdecimal()]
    largest = largest_processes(collect_resident_bytes(roots, pids), top_n)
    named = [(pid, read_text(roots.procfs, f'{pid}/comm'), size) for pid, size in largest]
    return {
        'procs': len(pids) or None,
        'processes_mem_info': [build_process_mem_info(pid, name[:-1] if name.endswith('\n') else name, size)
                               for pid, name, size in named if name is not None],
    }, None


# --- file systems

# File systems without storage of their own, and images that are always full.
PSEUDO_FILESYSTEMS = frozenset((
    'autofs bdev binfmt_misc bpf cgroup cgroup2 configfs cpuset debugfs devpts devtmpfs ecryptfs efivarfs erofs fusectl '
    'hugetlbfs iso9660 mqueue nfsd none nsfs overlay pipefs proc pstore ramfs rootfs rpc_pipefs securityfs selinuxfs '
    'smackfs sockfs squashfs sysfs tmpfs tracefs fuse.lxcfs fuse.gvfsd-fuse fuse.portal fuse.snapfuse').split())


STATVFS_TIMEOUT_SECONDS = 1


class Mount(NamedTuple):
    device_number: str
    mountpoint: str
    fstype: str
    source: str


def parse_mountinfo(text: str) -> List[Mount]:
    """/proc/PID/mountinfo; between the options and the lone `-` stands any number of optional fields.

    27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
    """
    def parse_line(line: str) -> Mount:
        fields = line.split(' ')
        dash = fields.index('-', 6)
        return Mount(fields[2], unescape(fields[4]), fields[dash + 1], unescape(fields[dash + 2]))

    # Not splitlines(): a form feed or a U+2028 in a mount point is no end of a line, and the kernel does not escape them.
    return parse_lines('mountinfo', filter(None, text.split('\n')), parse_line)


def unescape(field: str) -> str:
    r"""Undo the kernel's octal escapes (\040 for a space)."""
    return re.sub(r'\\([0-3][0-7]{2})', lambda match: chr(int(match.group(1), 8)), field)


def real_mounts(mounts: Iterable[Mount]) -> List[Mount]:
    """One mount a real file system, by its shortest mount point. On one mount point the last mount hides the others.

    btrfs gives each subvolume a device number of its own: it is known by its block device.
    """
    visible = {mount.mountpoint: mount for mount in mounts}.values()
    shortest: Dict[str, Mount] = {}
    for mount in visible:
        key = mount.source if mount.fstype == 'btrfs' else mount.device_number
        known = shortest.get(key)
        if mount.fstype not in PSEUDO_FILESYSTEMS and (not known or len(mount.mountpoint) < len(known.mountpoint)):
            shortest[key] = mount
    return list(shortest.values())


def build_disk_usage(mount: Mount, space: os.statvfs_result) -> wire.DiskUsage:
    """f_bavail is what unprivileged users may still use, so that used / (used + free) is the Use% of df(1)."""
    used = max(0, space.f_blocks - space.f_bfree) * space.f_frsize
    free = space.f_bavail * space.f_frsize
    return wire.DiskUsage(
        device=mount.source, mountpoint=mount.mountpoint, fstype=mount.fstype, total=space.f_blocks * space.f_frsize,
        used=used, free=free, used_percent=100 * used / (used + free) if used + free else None,
        inodes=space.f_files or None, inodes_free=space.f_favail if space.f_files else None,
        read_only=bool(space.f_flag & os.ST_RDONLY))


def build_stuck_disk_usage(mount: Mount) -> wire.DiskUsage:
    return wire.DiskUsage(device=mount.source, mountpoint=mount.mountpoint, fstype=mount.fstype, stuck=True)


def read_space(root: str, mountpoint: str) -> Optional[os.statvfs_result]:
    try:
        return os.statvfs(root.rstrip('/') + mountpoint)
    except OSError as error:
        if error.errno in ABSENT or error.errno == errno.ESTALE:
            return None
        raise


def ask_space(root: str, mounts: Sequence[Mount], answers: Dict[str, Optional[os.statvfs_result]],
              given_up: threading.Event) -> None:
    """The asking thread: statvfs(2) of a file server that is gone does not return, and nothing can interrupt it."""
    for mount in mounts:
        if given_up.is_set():
            return
        try:
            answers[mount.mountpoint] = read_space(root, mount.mountpoint)
        except OSError:
            answers[mount.mountpoint] = None


def answering_mounts(root: str, mounts: Sequence[Mount], stuck: Dict[str, threading.Thread],
                     ) -> Tuple[Dict[str, Optional[os.statvfs_result]], Dict[str, threading.Thread]]:
    """Space by mount point, of those that answer within STATVFS_TIMEOUT_SECONDS; and the threads that still wait for
    one that does not, which is left alone until its thread has come back. Local devices are asked first."""
    stuck = {mountpoint: thread for mountpoint, thread in stuck.items() if thread.is_alive()}
    asked = sorted((mount for mount in mounts if mount.mountpoint not in stuck),
                   key=lambda mount: not mount.source.startswith('/dev/'))
    answers: Dict[str, Optional[os.statvfs_result]] = {}
    given_up = threading.Event()
    thread = threading.Thread(target=ask_space, args=(root, asked, answers, given_up), name='statvfs', daemon=True)
    thread.start()
    thread.join(STATVFS_TIMEOUT_SECONDS)
    if thread.is_alive():
        given_up.set()
        silent = next((mount.mountpoint for mount in asked if mount.mountpoint not in answers), None)
        stuck.update({silent: thread} if silent else {})
    return dict(answers), stuck


def collect_disk_usages(roots: Roots, before: Optional[Dict[str, threading.Thread]],
                        ) -> Tuple[Fields, Dict[str, threading.Thread]]:
    """The mounts of process 1 are the node's; those of the agent may be a container's or a unit's own."""
    text = read_text(roots.procfs, '1/mountinfo') or read_text(roots.procfs, 'self/mountinfo') or ''
    mounts = real_mounts(parse_mountinfo(text))
    spaces, stuck = answering_mounts(roots.rootfs, mounts, before or {})
    usages = [build_disk_usage(mount, spaces[mount.mountpoint]) for mount in mounts
              if spaces.get(mount.mountpoint) and spaces[mount.mountpoint].f_blocks]
    return {'disk_usages': usages + [build_stuck_disk_usage(mount) for mount in mounts if mount.mountpoint in stuck]}, stuck


# --- disk I/O

# admin-guide/iostats.rst: "sectors" are always 512 bytes.
SECTOR_BYTES = 512
# Block devices whose I/O reaches another block device: in the sum it would count twice.
VIRTUAL_DISK = re.compile(r'(dm-|md|drbd|bcache|zd)[\d_]')
MEMORY_DISK = re.compile(r'(loop|ram|zram|sr|fd)\d')


class DiskStats(NamedTuple):
    """The columns of a line of /proc/diskstats after the device's numbers; since boot."""
    name: str
    reads: int
    reads_merged: int
    read_sectors: int
    read_ms: int
    writes: int
    writes_merged: int
    written_sectors: int
    write_ms: int
    in_progress: int
    io_ms: int
    weighted_io_ms: int
    # Since Linux 4.18.
    discards: Optional[int] = None
    discards_merged: Optional[int] = None
    discarded_sectors: Optional[int] = None
    discard_ms: Optional[int] = None
    # Since Linux 5.5.
    flushes: Optional[int] = None
    flush_ms: Optional[int] = None


def parse_diskstats(text: str) -> List[DiskStats]:
    """/proc/diskstats: 14 columns, 18 since Linux 4.18, 20 since 5.5.

    254       0 vda 30704 9268 1839362 7362 6409 11563 789624 3402 0 4712 11026 3512 47 76304 219 961 41
    """
    def parse_line(line: str) -> DiskStats:
        fields = line.split()
        return DiskStats(fields[2], *map(int, fields[3:20]))

    return parse_lines('diskstats', text.splitlines(), parse_line)


def build_disk_io_summary(disks: List[DiskStats]) -> wire.DiskIOSummary:
    return wire.DiskIOSummary(
        total_read_bytes=SECTOR_BYTES * sum(disk.read_sectors for disk in disks),
        total_write_bytes=SECTOR_BYTES * sum(disk.written_sectors for disk in disks),
        total_read_ops=sum(disk.reads for disk in disks),
        total_write_ops=sum(disk.writes for disk in disks))


def build_disk_io(disk: DiskStats) -> wire.DiskIo:
    return wire.DiskIo(
        device=disk.name, reads_total=disk.reads, reads_merged_total=disk.reads_merged,
        read_bytes_total=disk.read_sectors * SECTOR_BYTES, read_seconds_total=disk.read_ms / 1000,
        writes_total=disk.writes, writes_merged_total=disk.writes_merged,
        written_bytes_total=disk.written_sectors * SECTOR_BYTES, write_seconds_total=disk.write_ms / 1000,
        in_progress=disk.in_progress, io_seconds_total=disk.io_ms / 1000, weighted_io_seconds_total=disk.weighted_io_ms / 1000,
        discards_total=disk.discards, discards_merged_total=disk.discards_merged,
        discarded_bytes_total=None if disk.discarded_sectors is None else disk.discarded_sectors * SECTOR_BYTES,
        discard_seconds_total=None if disk.discard_ms is None else disk.discard_ms / 1000,
        flushes_total=disk.flushes, flush_seconds_total=None if disk.flush_ms is None else disk.flush_ms / 1000)


def collect_disk_io(roots: Roots, before: None) -> Tuple[Fields, None]:
    """Whole disks are those that /sys/block lists: partitions are below them there. Memory and loops are no disks."""
    disks = parse_diskstats(read_text(roots.procfs, 'diskstats') or '')
    whole = {name.replace('!', '/') for name in read_names(roots.sysfs, 'block') if not MEMORY_DISK.match(name)}
    listed = [disk for disk in disks if disk.name in whole]
    physical = [disk for disk in listed if not VIRTUAL_DISK.match(disk.name)]
    return {
        'disk_io_summary': build_disk_io_summary(physical) if physical else None,
        'disks': [build_disk_io(disk) for disk in listed],
    }, None


# --- interface addresses

# uapi/linux/netlink.h, rtnetlink.h, if_addr.h
NETLINK_ROUTE = 0
NLMSG_ERROR, NLMSG_DONE = 2, 3
NLM_F_REQUEST, NLM_F_DUMP = 0x1, 0x300
RTM_NEWADDR, RTM_GETADDR = 20, 22
IFA_ADDRESS, IFA_LOCAL = 1, 2
RT_SCOPE_UNIVERSE = 0
NLMSGHDR = struct.Struct('=IHHII')    # length, type, flags, sequence, port
IFADDRMSG = struct.Struct('=BBBBI')   # family, prefix length, flags, scope, interface index
RTATTR = struct.Struct('=HH')         # length, type
NETLINK_TIMEOUT_SECONDS = 1


class Address(NamedTuple):
    """One address of the interface with this index: family AF_INET or AF_INET6, scope as RT_SCOPE_*."""
    index: int
    family: int
    address: str
    prefix_length: int
    scope: int


def same_network(procfs: str, pid: str, other_procfs: str, other_pid: str) -> bool:
    """Whether two processes are in one network namespace. Reading ns/net takes the right to trace them; without it the
    inode of net/dev tells, which each namespace has for itself."""
    try:
        return os.readlink(f'{procfs}/{pid}/ns/net') == os.readlink(f'{other_procfs}/{other_pid}/ns/net')
    except OSError:
        pass
    try:
        return os.path.samestat(os.stat(f'{procfs}/{pid}/net/dev'), os.stat(f'{other_procfs}/{other_pid}/net/dev'))
    except OSError:
        return False


def shares_network_namespace(roots: Roots) -> bool:
    """Whether the agent's own sockets see the network whose files `read_net` reads."""
    return roots.procfs == '/proc' or same_network(roots.procfs, '1', '/proc', 'self')


def read_addresses(roots: Roots) -> bytes:
    """The kernel's dump of all interface addresses: they are in no file. Empty for another machine's tree."""
    if not shares_network_namespace(roots):
        return b''
    header = NLMSGHDR.pack(NLMSGHDR.size + IFADDRMSG.size, RTM_GETADDR, NLM_F_REQUEST | NLM_F_DUMP, 1, 0)
    socket_type = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    with contextlib.suppress(PermissionError), socket.socket(socket.AF_NETLINK, socket_type, NETLINK_ROUTE) as netlink:
        netlink.settimeout(NETLINK_TIMEOUT_SECONDS)
        netlink.send(header + IFADDRMSG.pack(socket.AF_UNSPEC, 0, 0, 0, 0))
        chunks = [netlink.recv(1 << 16)]
        while not any(kind in (NLMSG_DONE, NLMSG_ERROR) for kind, _ in netlink_parts(chunks[-1], NLMSGHDR)):
            chunks.append(netlink.recv(1 << 16))
        return b''.join(chunks)
    return b''


def netlink_parts(data: bytes, header: struct.Struct) -> Iterable[Tuple[int, bytes]]:
    """(type, payload) of each message, or attribute: both begin with their length and are padded to 4 bytes."""
    offset = 0
    while offset + header.size <= len(data):
        length, kind = header.unpack_from(data, offset)[:2]
        if length < header.size or offset + length > len(data):
            raise ValueError(f'rtnetlink: malformed length {length} at byte {offset} of {len(data)}')
        yield kind, data[offset + header.size:offset + length]
        offset += (length + 3) // 4 * 4


def parse_addresses(data: bytes) -> List[Address]:
    """A dump of RTM_NEWADDR messages. IFA_LOCAL is the interface's own address; where IFA_ADDRESS differs, it is the peer's."""
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


def primary_address(addresses: Iterable[Address], index: Optional[int], family: int) -> Optional[str]:
    """The first address of global scope on that interface."""
    return next((address.address for address in addresses
                 if (address.index, address.family, address.scope) == (index, family, RT_SCOPE_UNIVERSE)), None)


# --- network

# uapi/linux/if.h, in the order in which Go's net.Flags prints them.
INTERFACE_FLAGS = (('up', 0x1), ('broadcast', 0x2), ('loopback', 0x8), ('pointtopoint', 0x10), ('multicast', 0x1000))
# uapi/linux/route.h
RTF_UP, RTF_REJECT = 0x1, 0x200


class NetDev(NamedTuple):
    """The columns of /proc/net/dev."""
    rx_bytes: int
    rx_packets: int
    rx_errs: int
    rx_drop: int
    rx_fifo: int
    rx_frame: int
    rx_compressed: int
    rx_multicast: int
    tx_bytes: int
    tx_packets: int
    tx_errs: int
    tx_drop: int
    tx_fifo: int
    tx_colls: int
    tx_carrier: int
    tx_compressed: int


# The node's end of a pod's interface, as the common CNI plugins name them.
POD_SIDE_INTERFACE = re.compile(r'(veth|cali|lxc|gke|eni[0-9a-f]{11}$|azv|tap|vnet)')


# How long what seldom changes of them is taken to stay as it is.
LINKS_SECONDS = 60


class Link(NamedTuple):
    """What seldom changes of an interface, the packets that it had counted then, and when to read it again (monotonic clock)."""
    index: Optional[int]
    mtu: Optional[int]
    hardware_address: Optional[str]
    flags: List[str]
    packets: int
    due: float


class Route(NamedTuple):
    """An entry of a routing table: the interface, and whether it is a usable default route."""
    interface: str
    metric: int
    is_default: bool


def read_net(roots: Roots, name: str) -> Optional[str]:
    """/proc/net is the reader's network namespace; in another procfs, the node's is that of process 1."""
    text = read_text(roots.procfs, f'1/net/{name}') if roots.procfs != '/proc' else None
    return text if text is not None else read_text(roots.procfs, f'net/{name}')


def parse_net_dev(text: str) -> Dict[str, NetDev]:
    """/proc/net/dev by interface; the two lines of headings have no colon, old kernels no space after it.

    eth0: 1111 12 0 0 0 0 0 0 2222 22 0 0 0 0 0 0
    """
    def parse_line(line: str) -> Tuple[str, NetDev]:
        name, columns = line.split(':', 1)
        return name.strip(), NetDev(*map(int, columns.split()[:16]))

    return dict(parse_lines('net/dev', (line for line in text.splitlines() if ':' in line), parse_line))


def parse_route(text: str) -> List[Route]:
    """/proc/net/route, IPv4: `Iface Destination Gateway Flags RefCnt Use Metric Mask ...`, hex but for the metric."""
    def parse_line(line: str) -> Route:
        interface, destination, _, flags, _, _, metric, mask = line.split()[:8]
        is_default = int(destination, 16) == int(mask, 16) == 0
        return Route(interface, int(metric), is_default and int(flags, 16) & (RTF_UP | RTF_REJECT) == RTF_UP)

    return parse_lines('net/route', text.splitlines()[1:], parse_line)


def parse_ipv6_route(text: str) -> List[Route]:
    """/proc/net/ipv6_route: `destination/prefix source/prefix next-hop metric refcount use flags interface`, hex."""
    def parse_line(line: str) -> Route:
        destination, prefix, _, _, _, metric, _, _, flags, interface = line.split()
        is_default = int(destination, 16) == int(prefix, 16) == 0
        return Route(interface, int(metric, 16), is_default and int(flags, 16) & (RTF_UP | RTF_REJECT) == RTF_UP)

    return parse_lines('net/ipv6_route', text.splitlines(), parse_line)


def default_interface(routes: Iterable[Route]) -> Optional[str]:
    """The interface of the default route with the lowest metric."""
    defaults = [route for route in routes if route.is_default]
    return min(defaults, key=lambda route: route.metric).interface if defaults else None


def interface_flags(bits: int) -> List[str]:
    return [name for name, bit in INTERFACE_FLAGS if bits & bit]


def build_net_usage(interfaces: Iterable[NetDev]) -> wire.NetUsage:
    total = NetDev(*map(sum, zip(*interfaces)))
    return wire.NetUsage(
        total_bytes_sent=total.tx_bytes, total_bytes_received=total.rx_bytes,
        total_packets_sent=total.tx_packets, total_packets_received=total.rx_packets,
        total_err_in=total.rx_errs, total_err_out=total.tx_errs, total_drop_in=total.rx_drop,
        total_drop_out=total.tx_drop, total_fifo_err_in=total.rx_fifo, total_fifo_err_out=total.tx_fifo)


def build_string_value(text: Optional[str]) -> Optional[StringValue]:
    return None if text is None else StringValue(value=text)


def build_interface_counters(counters: NetDev) -> wire.InterfaceCounters:
    return wire.InterfaceCounters(**counters._asdict())


def build_interface(name: str, link: Link, addresses: Iterable[Address]) -> wire.InterfaceStat:
    return wire.InterfaceStat(
        index=link.index, mtu=link.mtu, name=name, hardwareAddr=link.hardware_address, flags=link.flags,
        addrs=[f'{address.address}/{address.prefix_length}' for address in addresses])


def collect_link(roots: Roots, name: str, packets: int, known: Optional[Link]) -> Link:
    """What seldom changes of an interface; lo and tunnels have a hardware address of zeros, which is none. Of the pods' ends,
    of which there may be hundreds, it is read once a minute, and when they count anew: then it is another pod's."""
    if known and packets >= known.packets and time.monotonic() < known.due:
        return Link(known.index, known.mtu, known.hardware_address, known.flags, packets, known.due)
    directory = f'class/net/{name}'
    hardware_address = read_line(roots.sysfs, f'{directory}/address')
    return Link(
        read_int(roots.sysfs, f'{directory}/ifindex'), read_int(roots.sysfs, f'{directory}/mtu'),
        hardware_address if hardware_address and hardware_address.strip('0:') else None,
        interface_flags(read_int(roots.sysfs, f'{directory}/flags') or 0), packets,
        time.monotonic() + (LINKS_SECONDS if POD_SIDE_INTERFACE.match(name) else 0))


def collect_interface(roots: Roots, name: str, counters: NetDev, link: Link, addresses: Iterable[Address]) -> wire.InterfaceStat:
    """One interface; of the pods' ends only what the relay's contract asks for. Of a link that is down carrier and speed are
    EINVAL; virtual ones may say -1."""
    interface = build_interface(name, link, addresses)
    if POD_SIDE_INTERFACE.match(name):
        return interface
    directory = f'class/net/{name}'
    carrier, speed = read_int(roots.sysfs, f'{directory}/carrier'), read_int(roots.sysfs, f'{directory}/speed')
    interface.MergeFrom(wire.InterfaceStat(
        operstate=read_line(roots.sysfs, f'{directory}/operstate'), carrier=None if carrier is None else bool(carrier),
        speed_mbits=speed if speed and speed > 0 else None, counters=build_interface_counters(counters)))
    return interface


def collect_primary_address(roots: Roots, routes: Iterable[Route], addresses: Iterable[Address],
                            family: int) -> Optional[StringValue]:
    interface = default_interface(routes)
    index = read_int(roots.sysfs, f'class/net/{interface}/ifindex') if interface else None
    return build_string_value(primary_address(addresses, index, family))


def collect_network(roots: Roots, before: Optional[Dict[str, Link]]) -> Tuple[Fields, Dict[str, Link]]:
    counters = parse_net_dev(read_net(roots, 'dev') or '')
    addresses = parse_addresses(read_addresses(roots))
    by_index = collections.defaultdict(list)
    for address in addresses:
        by_index[address.index].append(address)
    ipv4_routes = parse_route(read_net(roots, 'route') or '')
    ipv6_routes = parse_ipv6_route(read_net(roots, 'ipv6_route') or '')
    links = {name: collect_link(roots, name, columns.rx_packets + columns.tx_packets, (before or {}).get(name))
             for name, columns in counters.items()}
    return {
        'primary_ipv4': collect_primary_address(roots, ipv4_routes, addresses, socket.AF_INET),
        'primary_ipv6': collect_primary_address(roots, ipv6_routes, addresses, socket.AF_INET6),
        'net_usage': build_net_usage(counters.values()) if counters else None,
        'network_interfaces': [collect_interface(roots, name, columns, links[name], by_index[links[name].index])
                               for name, columns in counters.items()],
    }, links


# --- network protocols

def parse_snmp(text: str) -> Dict[str, int]:
    """/proc/net/snmp and netstat: for each protocol a line of names and one of numbers; `Tcp: RetransSegs` as TcpRetransSegs.

    Udp: InDatagrams NoPorts InErrors
    Udp: 12 3 0
    """
    lines = text.splitlines()
    values: Dict[str, int] = {}

    def parse_pair(pair: Tuple[str, str]) -> None:
        (protocol, *names), (same, *numbers) = pair[0].split(), pair[1].split()
        if protocol != same or len(names) != len(numbers):
            raise ValueError
        values.update((protocol[:-1] + name, int(number)) for name, number in zip(names, numbers))

    parse_lines('snmp', zip(lines[::2], lines[1::2]), parse_pair)
    return values


def parse_sockstat(text: str) -> Dict[str, int]:
    """/proc/net/sockstat; `TCP: inuse 3` as TCPinuse. mem is in pages."""
    values: Dict[str, int] = {}

    def parse_line(line: str) -> None:
        protocol, *pairs = line.split()
        values.update((protocol[:-1] + name, int(number)) for name, number in zip(pairs[::2], pairs[1::2]))

    parse_lines('sockstat', text.splitlines(), parse_line)
    return values


def parse_softnet_stat(text: str) -> Tuple[int, int, int]:
    """/proc/net/softnet_stat: a line per CPU, hexadecimal. Gives packets processed, dropped (backlog full), and the times
    that the budget ran out before the work, all CPUs together."""
    rows = parse_lines('softnet_stat', text.splitlines(), lambda line: [int(word, 16) for word in line.split()[:3]])
    if any(len(row) < 3 for row in rows):
        raise ValueError('softnet_stat: malformed line of fewer than 3 columns')
    return tuple(sum(row[column] for row in rows) for column in range(3))


def build_network_protocols(netstat: Dict[str, int], snmp: Dict[str, int], sockstat: Dict[str, int],
                            softnet: Optional[Tuple[int, int, int]]) -> wire.NetworkProtocols:
    processed, dropped, squeezed = softnet or (None, None, None)
    tcp_mem_pages = sockstat.get('TCPmem')
    return wire.NetworkProtocols(
        tcp_listen_overflows_total=netstat.get('TcpExtListenOverflows'),
        tcp_listen_drops_total=netstat.get('TcpExtListenDrops'), tcp_syn_retrans_total=netstat.get('TcpExtTCPSynRetrans'),
        tcp_retrans_segs_total=snmp.get('TcpRetransSegs'), tcp_in_segs_total=snmp.get('TcpInSegs'),
        tcp_out_segs_total=snmp.get('TcpOutSegs'), tcp_in_errs_total=snmp.get('TcpInErrs'),
        udp_rcvbuf_errors_total=snmp.get('UdpRcvbufErrors'), udp_sndbuf_errors_total=snmp.get('UdpSndbufErrors'),
        udp_in_errors_total=snmp.get('UdpInErrors'), sockets_used=sockstat.get('socketsused'),
        tcp_inuse=sockstat.get('TCPinuse'), tcp_orphan=sockstat.get('TCPorphan'), tcp_tw=sockstat.get('TCPtw'),
        tcp_alloc=sockstat.get('TCPalloc'), tcp_mem_bytes=None if tcp_mem_pages is None else tcp_mem_pages * PAGE_SIZE_BYTES,
        udp_inuse=sockstat.get('UDPinuse'), softnet_processed_total=processed, softnet_dropped_total=dropped,
        softnet_squeezed_total=squeezed)


def collect_network_protocols(roots: Roots, before: None) -> Tuple[Fields, None]:
    netstat, snmp = read_net(roots, 'netstat'), read_net(roots, 'snmp')
    sockstat, softnet = read_net(roots, 'sockstat'), read_net(roots, 'softnet_stat')
    if netstat is None and snmp is None and sockstat is None and softnet is None:
        return {}, None
    return {'network_protocols': build_network_protocols(
        parse_snmp(netstat or ''), parse_snmp(snmp or ''), parse_sockstat(sockstat or ''),
        parse_softnet_stat(softnet) if softnet else None)}, None


# --- clock

# uapi/linux/timex.h: struct timex up to its status, on the 64-bit architectures; the whole of it has 208 bytes.
TIMEX = struct.Struct('@Ixxxxqqqqi')
TIMEX_BYTES = 208
STA_UNSYNC, STA_NANO = 0x0040, 0x2000


@functools.lru_cache(maxsize=None)
def libc() -> ctypes.CDLL:
    """For the few functions of the C library that the standard library has none for; AttributeError where it lacks one."""
    return ctypes.CDLL(None)


def read_timex() -> Optional[bytes]:
    """adjtimex(2) with nothing to adjust; the standard library has no function for it."""
    timex = ctypes.create_string_buffer(TIMEX_BYTES)
    try:
        return timex.raw if libc().adjtimex(timex) >= 0 else None
    except AttributeError:
        return None


def build_clock_metrics(timex: bytes) -> wire.ClockMetrics:
    _, offset, _, max_error_usec, _, status = TIMEX.unpack_from(timex)
    return wire.ClockMetrics(synchronized=not status & STA_UNSYNC, offset_seconds=offset / (1e9 if status & STA_NANO else 1e6),
                             max_error_seconds=max_error_usec / 1e6)


def collect_clock(roots: Roots, before: None) -> Tuple[Fields, None]:
    """All containers of a machine have its clock; another machine's tree has none."""
    timex = read_timex() if reads_this_machine(roots) else None
    return {'clock': build_clock_metrics(timex) if timex else None}, None


# --- operating system

# ID of os-release (or a word of ID_LIKE) to the family it belongs to; a distribution not listed is its own.
PLATFORM_FAMILIES = {
    'debian': 'debian', 'ubuntu': 'debian', 'raspbian': 'debian', 'linuxmint': 'debian',
    'rhel': 'rhel', 'centos': 'rhel', 'rocky': 'rhel', 'almalinux': 'rhel', 'ol': 'rhel', 'amzn': 'rhel',
    'fedora': 'fedora', 'suse': 'suse', 'opensuse': 'suse', 'opensuse-leap': 'suse', 'opensuse-tumbleweed': 'suse',
    'sles': 'suse', 'sle-micro': 'suse', 'arch': 'arch', 'alpine': 'alpine', 'gentoo': 'gentoo', 'flatcar': 'coreos',
}


def parse_os_release(text: str) -> Dict[str, str]:
    """os-release(5): shell assignments, at most quoted.

    PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"
    """
    pairs = (line.split('=', 1) for line in map(str.strip, text.splitlines()) if '=' in line and not line.startswith('#'))
    return {key: re.sub(r'\\(.)', r'\1', value[1:-1] if value[:1] in ('"', "'") and value[-1:] == value[:1] else value)
            for key, value in pairs}


def platform_family(release: Dict[str, str]) -> Optional[str]:
    names = [release.get('ID', '')] + release.get('ID_LIKE', '').split()
    return next((PLATFORM_FAMILIES[name] for name in names if name in PLATFORM_FAMILIES), names[0] or None)


def platform_version(release: Dict[str, str], debian_version: Optional[str]) -> Optional[str]:
    """VERSION_ID; Debian's has no point release, /etc/debian_version does ("12.11"; on testing "trixie/sid")."""
    if release.get('ID') == 'debian' and debian_version and debian_version[0].isdigit():
        return debian_version
    return release.get('VERSION_ID')


def collect_host_id(roots: Roots) -> Optional[str]:
    """What stays when the host is renamed: the machine's, else the installation's, else at least this boot's."""
    machine_id = read_line(roots.rootfs, 'etc/machine-id')
    host_id = (read_line(roots.sysfs, 'class/dmi/id/product_uuid') or (machine_id if machine_id != 'uninitialized' else None)
               or read_line(roots.procfs, 'sys/kernel/random/boot_id'))
    return host_id and host_id.lower()


def collect_kernel_arch(roots: Roots) -> Optional[str]:
    """The file came with Linux 6.1; before it, uname(2) tells, unless the tree is another machine's."""
    return read_line(roots.procfs, 'sys/kernel/arch') or (os.uname().machine if reads_this_machine(roots) else None)


def collect_system(roots: Roots, before: None) -> Tuple[Fields, None]:
    release = parse_os_release(read_text(roots.rootfs, 'etc/os-release')
                               or read_text(roots.rootfs, 'usr/lib/os-release') or '')
    uptime = read_line(roots.procfs, 'uptime')
    return {
        'hostname': read_line(roots.procfs, 'sys/kernel/hostname'),
        'uptime': parse_uptime(uptime) if uptime else None,
        'os': 'linux',
        'platform': release.get('ID'),
        'platform_family': platform_family(release),
        'platform_version': platform_version(release, read_line(roots.rootfs, 'etc/debian_version')),
        'kernel_version': read_line(roots.procfs, 'sys/kernel/osrelease'),
        'kernel_arch': collect_kernel_arch(roots),
        'host_id': collect_host_id(roots),
    }, None


def parse_uptime(text: str) -> int:
    """/proc/uptime: seconds since boot, and the idle seconds of all CPUs: `350735.47 234388.90`."""
    return parse_lines('uptime', text.splitlines()[:1] or [''], lambda line: int(float(line.split()[0])))[0]


# --- cgroup files

# How often all of a group is read, limits and weights included.
READ_AGAIN_SECONDS = 60
# cgroup v1 says "no limit" with the largest multiple of a page below 2**63.
V1_NO_LIMIT_BYTES = 2**63 - 65536


class CgroupTree(NamedTuple):
    """Where the node's groups are: by controller the directory below sysfs; on v2 one for all of them, under ''."""
    version: int
    directories: Dict[str, str]

    @property
    def top(self) -> str:
        """The hierarchy in which groups are looked for."""
        return self.directories['' if self.version == 2 else 'memory']


class Limits(NamedTuple):
    """What changes seldom, if ever; None without a limit."""
    quota_usec: Optional[int] = None
    period_usec: Optional[int] = None
    weight: Optional[int] = None
    shares: Optional[int] = None
    memory_max_bytes: Optional[int] = None
    memory_high_bytes: Optional[int] = None
    swap_max_bytes: Optional[int] = None
    pids_max: Optional[int] = None


class GroupFile(NamedTuple):
    """A file that is read of each group in each cycle: its controller (of v1), its name, or names of which the first that is
    there counts, and what parses it."""
    controller: str
    names: Tuple[str, ...]
    parse: Callable[[str], Any]


class Cgroup(NamedTuple):
    """A group as it was read last: its files, which stay open; what the first of them said; and what came of all of them, which
    holds as long as they say it. Nothing in it tells when it was read."""
    files: Optional[OpenFiles]
    telling: Tuple[Optional[bytes], ...]
    limits: Limits
    # When all of it is to be read again (monotonic clock).
    due: float
    usage_usec: Optional[int]
    # CgroupMetrics, and what a container takes from it in the runtime's terms (SerializedContainer), both without timestamps.
    serialized: bytes
    container: bytes


def read_cgroup_tree(roots: Roots) -> Optional[CgroupTree]:
    """v2 has cgroup.controllers at its root. A hybrid system has it elsewhere, and the controllers are those of v1."""
    if read_text(roots.sysfs, 'fs/cgroup/cgroup.controllers') is not None:
        return CgroupTree(2, {'': 'fs/cgroup'})
    directories = {controller: f'fs/cgroup/{name}' for name in sorted(read_names(roots.sysfs, 'fs/cgroup'), key=len, reverse=True)
                   for controller in name.split(',')}
    return CgroupTree(1, directories) if 'memory' in directories else None


def read_group_file(roots: Roots, tree: CgroupTree, controller: str, path: str) -> Optional[str]:
    """A file of one controller's hierarchy; path is below its root."""
    directory = tree.directories.get(controller)
    return read_text(roots.sysfs, f'{directory}/{path}') if directory else None


def open_group_file(roots: Roots, tree: CgroupTree, path: str, file: GroupFile) -> Optional[int]:
    directory = tree.directories.get(file.controller)
    descriptors = (open_file(roots.sysfs, f'{directory}/{path}/{name}') for name in file.names if directory)
    return next((descriptor for descriptor in descriptors if descriptor is not None), None)


def parse_number(file: str, text: str) -> Optional[int]:
    """A file of one number; `max`, v2's word for no limit, is None."""
    try:
        return None if text == 'max\n' else int(text)
    except ValueError:
        raise ValueError(f'{file}: malformed line: {text[:200]!r}') from None


def parse_cpu_max(text: str) -> Tuple[Optional[int], Optional[int]]:
    """cpu.max: quota and period in µs: `10000 100000`, or `max 100000` without a limit."""
    def parse_line(line: str) -> Tuple[Optional[int], Optional[int]]:
        quota, period = line.split()
        return (None, None) if quota == 'max' else (int(quota), int(period))

    return parse_lines('cpu.max', text.splitlines()[:1] or [''], parse_line)[0]


def parse_memory_stat(text: str, names: Sequence[str]) -> Dict[str, int]:
    """memory.stat, `name number` lines: of its 60 lines only those of these names, in half the time that all of them take."""
    values, lines, end = {}, f'\n{text}\n', 0
    for name in names:
        # In the order in which the kernel writes them each search begins where the last one ended.
        start = lines.find(f'\n{name} ', end)
        start = lines.find(f'\n{name} ') if start < 0 else start
        if start >= 0:
            number, end = start + len(name) + 2, lines.find('\n', start + 1)
            try:
                values[name] = int(lines[number:end])
            except ValueError:
                raise ValueError(f'memory.stat: malformed line: {lines[start + 1:end][:200]!r}') from None
    if text and not values:
        raise ValueError(f'memory.stat: malformed: {text[:200]!r}')
    return values


# What comes after these four differs from kernel to kernel.
IO_STAT = re.compile(r'(\S+) rbytes=(\d+) wbytes=(\d+) rios=(\d+) wios=(\d+)(?!\S)', re.ASCII)
# Bytes read, bytes written, reads, writes.
IoCounts = Tuple[Optional[int], Optional[int], Optional[int], Optional[int]]


def parse_io_stat(text: str) -> Dict[str, IoCounts]:
    """io.stat, by device; empty without I/O. Devices without statistics stand there alone, before Linux 5.16 even in the line of
    the next one.

    254:0 rbytes=1048576 wbytes=8192 rios=12 wios=2 dbytes=0 dios=0
    """
    devices = IO_STAT.findall(text)
    if len(devices) != text.count('rbytes='):
        line = next((line for line in text.splitlines() if 'rbytes=' in line and not IO_STAT.search(line)), text)
        raise ValueError(f'io.stat: malformed line: {line[:200]!r}')
    return {device: tuple(map(int, counts)) for device, *counts in devices}


def parse_blkio(text: str) -> Dict[str, Dict[str, int]]:
    """v1's blkio.throttle.io_service_bytes and io_serviced: `254:0 Read 1048576` and so on, and a `Total 1056768` of all."""
    devices: Dict[str, Dict[str, int]] = collections.defaultdict(dict)

    def parse_line(line: str) -> None:
        *device, operation, number = line.split()
        if device:
            devices[device[0]][operation] = int(number)

    parse_lines('blkio', filter(str.strip, text.splitlines()), parse_line)
    return dict(devices)


def number_file(name: str, controller: str = '') -> GroupFile:
    return GroupFile(controller, (name,), functools.partial(parse_number, name))


def key_value_file(name: str, controller: str = '') -> GroupFile:
    return GroupFile(controller, (name,), functools.partial(parse_key_values, name))


def memory_stat_file(names: Iterable[str], controller: str = '') -> GroupFile:
    return GroupFile(controller, ('memory.stat',), functools.partial(parse_memory_stat, names=tuple(names)))


MEMORY_STAT_V2 = ('anon', 'file', 'kernel', 'sock', 'shmem', 'file_mapped', 'inactive_file', 'active_file', 'slab', 'pgfault',
                  'pgmajfault')
# v1's names for them; those with total_ include the groups below.
MEMORY_STAT_V1 = {'total_cache': 'file', 'total_rss': 'anon', 'total_shmem': 'shmem', 'total_mapped_file': 'file_mapped',
                  'total_pgfault': 'pgfault', 'total_pgmajfault': 'pgmajfault', 'total_inactive_file': 'inactive_file',
                  'total_active_file': 'active_file'}
# Each in the order in which build_cgroup_v2 and build_cgroup_v1 take what is in them; see CgroupVersion.
GROUP_FILES_V2 = (
    key_value_file('cpu.stat'), number_file('memory.current'), GroupFile('', ('io.stat',), parse_io_stat),
    *(GroupFile('', (f'{name}.pressure',), parse_pressure) for name in ('cpu', 'memory', 'io')),
    number_file('memory.peak'), number_file('memory.swap.current'), memory_stat_file(MEMORY_STAT_V2),
    key_value_file('memory.events'), number_file('pids.current'))
# blkio counts reads and writes as the throttling layer sees them, of the groups below as well where the kernel tells;
# without a limit some kernels count nothing.
GROUP_FILES_V1 = (
    number_file('cpuacct.usage', 'cpuacct'), number_file('memory.usage_in_bytes', 'memory'),
    *(GroupFile('blkio', (f'blkio.throttle.{name}_recursive', f'blkio.throttle.{name}'), parse_blkio)
      for name in ('io_service_bytes', 'io_serviced')),
    key_value_file('cpuacct.stat', 'cpuacct'), key_value_file('cpu.stat', 'cpu'),
    number_file('memory.max_usage_in_bytes', 'memory'), number_file('memory.memsw.usage_in_bytes', 'memory'),
    number_file('memory.kmem.usage_in_bytes', 'memory'), number_file('memory.kmem.tcp.usage_in_bytes', 'memory'),
    memory_stat_file(MEMORY_STAT_V1, 'memory'), key_value_file('memory.oom_control', 'memory'),
    number_file('pids.current', 'pids'))


def parse_group(files: Sequence[GroupFile], texts: Sequence[Optional[bytes]]) -> List[Any]:
    """What is in the files; None for one that is absent."""
    return [None if text is None else file.parse(text.decode(errors='replace')) for file, text in zip(files, texts)]


def limited(number: Optional[int]) -> Optional[int]:
    """A limit of cgroup v1."""
    return number if number is not None and 0 <= number < V1_NO_LIMIT_BYTES else None


def cpu_stat_from_v1(usage_ns: Optional[int], cpuacct: Dict[str, int], cpu: Dict[str, int]) -> Dict[str, int]:
    """v1's cpuacct.usage, cpuacct.stat (ticks) and cpu.stat (ns) under v2's names, in µs."""
    tick_usec = 10**6 // TICKS_PER_SECOND
    stat_v2 = {name: cpu[name] for name in ('nr_periods', 'nr_throttled') if name in cpu}
    if usage_ns is not None:
        stat_v2['usage_usec'] = usage_ns // 1000
    if 'throttled_time' in cpu:
        stat_v2['throttled_usec'] = cpu['throttled_time'] // 1000
    return {**stat_v2, **{f'{name}_usec': ticks * tick_usec for name, ticks in cpuacct.items() if name in ('user', 'system')}}


def memory_stat_from_v1(stat_v1: Dict[str, int], kernel: Optional[int], sock: Optional[int]) -> Dict[str, Optional[int]]:
    """v1's memory.stat under v2's names. What the kernel itself and its sockets take has files of its own there."""
    return {**{MEMORY_STAT_V1[name]: number for name, number in stat_v1.items()}, 'kernel': kernel, 'sock': sock}


def io_stat_from_v1(sizes: Dict[str, Dict[str, int]], counts: Dict[str, Dict[str, int]]) -> Dict[str, IoCounts]:
    """v1's blkio files as io.stat has them."""
    return {device: (*(sizes[device].get(way) for way in ('Read', 'Write')),
                     *(counts.get(device, {}).get(way) for way in ('Read', 'Write'))) for device in sizes}


def build_cgroup_cpu(cpu: Dict[str, int], limits: Limits) -> wire.CgroupCpu:
    return wire.CgroupCpu(
        usage_usec=cpu.get('usage_usec'), user_usec=cpu.get('user_usec'), system_usec=cpu.get('system_usec'),
        nr_periods=cpu.get('nr_periods'), nr_throttled=cpu.get('nr_throttled'), throttled_usec=cpu.get('throttled_usec'),
        quota_usec=limits.quota_usec, period_usec=limits.period_usec, weight=limits.weight, shares=limits.shares)


def build_cgroup_memory(current: Optional[int], peak: Optional[int], swap: Optional[int], memory: Dict[str, Optional[int]],
                        events: Dict[str, int], limits: Limits) -> wire.CgroupMemory:
    return wire.CgroupMemory(
        current_bytes=current, peak_bytes=peak, max_bytes=limits.memory_max_bytes, high_bytes=limits.memory_high_bytes,
        swap_current_bytes=swap, swap_max_bytes=limits.swap_max_bytes, anon_bytes=memory.get('anon'),
        file_bytes=memory.get('file'), inactive_file_bytes=memory.get('inactive_file'),
        active_file_bytes=memory.get('active_file'), slab_bytes=memory.get('slab'), kernel_bytes=memory.get('kernel'),
        shmem_bytes=memory.get('shmem'), file_mapped_bytes=memory.get('file_mapped'), sock_bytes=memory.get('sock'),
        pgfault=memory.get('pgfault'), pgmajfault=memory.get('pgmajfault'), events_max=events.get('max'),
        events_oom=events.get('oom'), events_oom_kill=events.get('oom_kill'))


def build_cgroup_io(device: str, counts: IoCounts) -> wire.CgroupIo:
    rbytes, wbytes, rios, wios = counts
    return wire.CgroupIo(device=device, rbytes=rbytes, wbytes=wbytes, rios=rios, wios=wios)


def build_cgroup_pids(current: Optional[int], limits: Limits) -> Optional[wire.CgroupPids]:
    return None if current is None else wire.CgroupPids(current=current, max=limits.pids_max)


def build_cgroup_v2(path: str, limits: Limits, cpu: Any, current: Any, io: Any, cpu_pressure: Any, memory_pressure: Any,
                    io_pressure: Any, peak: Any, swap: Any, memory: Any, events: Any, pids: Any) -> wire.CgroupMetrics:
    """What is in GROUP_FILES_V2; None for a file that is absent."""
    metrics = wire.CgroupMetrics(
        path=path, cpu=build_cgroup_cpu(cpu, limits),
        memory=build_cgroup_memory(current, peak, swap, memory or {}, events or {}, limits),
        io=[build_cgroup_io(*item) for item in sorted((io or {}).items())], pids=build_cgroup_pids(pids, limits))
    fill_psi_metrics(metrics.cpu_pressure, cpu_pressure or {})
    fill_psi_metrics(metrics.memory_pressure, memory_pressure or {})
    fill_psi_metrics(metrics.io_pressure, io_pressure or {})
    return metrics


def build_cgroup_v1(path: str, limits: Limits, usage_ns: Any, current: Any, io_sizes: Any, io_counts: Any, cpuacct: Any,
                    cpu: Any, peak: Any, memsw: Any, kernel: Any, sock: Any, memory: Any, oom_control: Any,
                    pids: Any) -> wire.CgroupMetrics:
    """What is in GROUP_FILES_V1, as v2 has it. memory.memsw counts memory and swap together."""
    swap = None if memsw is None or current is None else max(0, memsw - current)
    events = {'oom_kill': (oom_control or {}).get('oom_kill')}
    return wire.CgroupMetrics(
        path=path, cpu=build_cgroup_cpu(cpu_stat_from_v1(usage_ns, cpuacct or {}, cpu or {}), limits),
        memory=build_cgroup_memory(current, peak, swap, memory_stat_from_v1(memory or {}, kernel, sock), events, limits),
        io=[build_cgroup_io(*item) for item in sorted(io_stat_from_v1(io_sizes or {}, io_counts or {}).items())],
        pids=build_cgroup_pids(pids, limits))


def build_container_use(memory: wire.CgroupMemory) -> wire.SerializedContainer:
    """What the runtimes make of the same files: the working set is all but the file pages that nobody has used lately."""
    container = wire.SerializedContainer(stats_source='cgroup')
    if memory.HasField('current_bytes'):
        used, current = container.memory_metrics, memory.current_bytes
        used.usage_bytes.value = current
        if memory.HasField('inactive_file_bytes'):
            working_set = max(0, current - memory.inactive_file_bytes)
            used.working_set_bytes.value = working_set
            if memory.HasField('max_bytes'):
                used.available_bytes.value = max(0, memory.max_bytes - working_set)
        for field, name in (('anon_bytes', 'rss_bytes'), ('pgfault', 'page_faults'), ('pgmajfault', 'major_page_faults')):
            if memory.HasField(field):
                getattr(used, name).value = getattr(memory, field)
    if memory.HasField('swap_current_bytes'):
        swap, current = container.swap_metrics, memory.swap_current_bytes
        swap.usage_bytes.value = current
        if memory.HasField('swap_max_bytes'):
            swap.available_bytes.value = max(0, memory.swap_max_bytes - current)
    return container


def collect_limits_v2(roots: Roots, tree: CgroupTree, path: str) -> Limits:
    def number(file: str) -> Optional[int]:
        text = read_group_file(roots, tree, '', f'{path}/{file}')
        return None if text is None else parse_number(file, text)

    cpu_max = read_group_file(roots, tree, '', f'{path}/cpu.max')
    quota_usec, period_usec = parse_cpu_max(cpu_max) if cpu_max else (None, None)
    return Limits(quota_usec, period_usec, number('cpu.weight'), None, number('memory.max'), number('memory.high'),
                  number('memory.swap.max'), number('pids.max'))


def collect_limits_v1(roots: Roots, tree: CgroupTree, path: str) -> Limits:
    """memory.memsw counts memory and swap together."""
    def number(controller: str, file: str) -> Optional[int]:
        text = read_group_file(roots, tree, controller, f'{path}/{file}')
        return None if text is None else limited(parse_number(file, text))

    quota_usec, period_usec = number('cpu', 'cpu.cfs_quota_us'), number('cpu', 'cpu.cfs_period_us')
    memory, memsw = number('memory', 'memory.limit_in_bytes'), number('memory', 'memory.memsw.limit_in_bytes')
    return Limits(quota_usec, period_usec if quota_usec is not None else None, None, number('cpu', 'cpu.shares'), memory, None,
                  None if memory is None or memsw is None else max(0, memsw - memory), number('pids', 'pids.max'))


class CgroupVersion(NamedTuple):
    """What differs between v1 and v2. Of the files, a group has one of the first `essential` as long as it is there; and when
    the first `telling` say what they said, no process of the group has run, waited or done I/O, and nobody has taken memory
    from it: the others are not read then. What the kernel does to a group at rest, as to move pages between memory.stat's
    lists, is seen when all of it is read again."""
    files: Tuple[GroupFile, ...]
    essential: int
    telling: int
    build: Callable[..., wire.CgroupMetrics]
    collect_limits: Callable[[Roots, CgroupTree, str], Limits]


CGROUP_VERSIONS = {
    1: CgroupVersion(GROUP_FILES_V1, 2, 4, build_cgroup_v1, collect_limits_v1),
    2: CgroupVersion(GROUP_FILES_V2, 1, 6, build_cgroup_v2, collect_limits_v2),
}


def open_group(roots: Roots, tree: CgroupTree, path: str, files: OpenFiles) -> None:
    """What is not open yet: all of them, or those that were absent."""
    for number, file in enumerate(CGROUP_VERSIONS[tree.version].files):
        if files.descriptors[number] is None:
            files.descriptors[number] = open_group_file(roots, tree, path, file)


def collect_cgroup(roots: Roots, tree: CgroupTree, path: str, known: Optional[Cgroup]) -> Optional[Cgroup]:
    """A group, by what is known of it from the last cycle; None where it is gone. Each minute all of it is read: limits may
    have changed, and files may be there that were absent."""
    version, now = CGROUP_VERSIONS[tree.version], time.monotonic()
    due = known is None or now >= known.due
    files = known and known.files or OpenFiles(len(version.files))
    if due or known.files is None:
        open_group(roots, tree, path, files)
    telling = read_open_files(files.descriptors[:version.telling])
    if not due and telling == known.telling:
        return known
    if not any(telling[:version.essential]):
        # A unit that was started again has another group under the same path.
        return collect_cgroup(roots, tree, path, None) if known else None
    texts = telling + read_open_files(files.descriptors[version.telling:])
    close_silent_files(files, texts)
    limits = version.collect_limits(roots, tree, path) if due else known.limits
    metrics = version.build(path, limits, *parse_group(version.files, texts))
    usage_usec = metrics.cpu.usage_usec if metrics.cpu.HasField('usage_usec') else None
    return Cgroup(files if known and known.files or may_stay_open(files) else None, telling, limits,
                  now + READ_AGAIN_SECONDS if due else known.due, usage_usec, metrics.SerializeToString(),
                  build_container_use(metrics.memory).SerializeToString())


# --- services

# What a node is no node without, and what runs its containers.
SERVICES = tuple(f'{name}.service' for name in (
    'kubelet', 'containerd', 'crio', 'docker', 'cri-docker', 'k3s', 'k3s-agent', 'rke2-server', 'rke2-agent'))


def build_service_metrics(name: str, cgroup: Cgroup, timestamp_ns: int) -> wire.ServiceMetrics:
    service = wire.ServiceMetrics(name=name, cgroup=wire.CgroupMetrics.FromString(cgroup.serialized))
    service.cgroup.timestamp_ns = timestamp_ns
    return service


def collect_services(roots: Roots, before: Optional[Dict[str, Cgroup]]) -> Tuple[Fields, Dict[str, Cgroup]]:
    """The units below system.slice that there are."""
    tree, services, after = read_cgroup_tree(roots), [], {}
    present = set(read_names(roots.sysfs, f'{tree.top}/system.slice')) if tree else set()
    for name in (name for name in SERVICES if name in present):
        cgroup = collect_cgroup(roots, tree, f'system.slice/{name}', (before or {}).get(name))
        if cgroup:
            services.append(build_service_metrics(name, cgroup, time.time_ns()))
            after[name] = cgroup
    return {'services': services}, after


# --- node

class Part(NamedTuple):
    """What a cycle gets from one side: a message, what to hand back next cycle, and by subject what failed."""
    message: Any
    after: Any
    failures: Dict[str, str]


def node_subjects(top_n: int) -> Dict[str, Callable[[Roots, Any], Tuple[Fields, Any]]]:
    """The subjects of NodeMetrics. Each takes what it gave the last time, or None, and gives its fields and that."""
    return {
        'system': collect_system,
        'cpu': collect_cpu,
        'load': collect_load,
        'memory': collect_memory,
        'pressure': collect_pressure,
        'processes': functools.partial(collect_processes, top_n=top_n),
        'file systems': collect_disk_usages,
        'disk I/O': collect_disk_io,
        'network': collect_network,
        'network protocols': collect_network_protocols,
        'kernel limits': collect_kernel_limits,
        'clock': collect_clock,
        'services': collect_services,
    }


def collect_node(roots: Roots, before: Dict[str, Any], top_n: int) -> Part:
    """All subjects. One that is malformed or unreadable is left out, and the rest goes out without it."""
    node, after, failures = wire.NodeMetrics(), {}, {}
    for subject, collect in node_subjects(top_n).items():
        try:
            fields, after[subject] = collect(roots, before.get(subject))
            node.MergeFrom(wire.NodeMetrics(**fields))
        except (ValueError, OSError, ArithmeticError) as error:
            # A thread that waits for a mount must not be forgotten, and a rate may span a cycle that failed.
            after[subject] = before.get(subject)
            failures[subject] = str(error)
    for mountpoint in after.get('file systems') or ():
        failures[f'mount {mountpoint}'] = f'statvfs has not answered within {STATVFS_TIMEOUT_SECONDS} s: left alone until it does'
    return Part(node, after, failures)


# --- container runtime

# cri-api: the same messages under two names; v1alpha2 is all that containerd before 1.6 and old cri-dockerd have.
CRI_SERVICES = ('runtime.v1.RuntimeService', 'runtime.v1alpha2.RuntimeService')
# The methods the agent calls. They only read.
CRI_ANSWERS = {
    'Version': cri.VersionResponse,
    'ListPodSandbox': cri.ListPodSandboxResponse,
    'ListContainers': cri.ListContainersResponse,
    'ListContainerStats': cri.SerializedStatsList,
    'ContainerStatus': cri.ContainerStatusResponse,
    'Status': cri.StatusResponse,
    'ImageFsInfo': cri.ImageFsInfoResponse,
}
CRI_SOCKETS = (
    '/run/containerd/containerd.sock',
    '/run/k3s/containerd/containerd.sock',
    '/run/k0s/containerd.sock',
    '/var/snap/microk8s/common/run/containerd.sock',
    '/run/crio/crio.sock',
    '/run/cri-dockerd.sock',
    '/run/k3s/cri-dockerd/cri-dockerd.sock',
    '/run/dockershim.sock',
)
CRI_CHANNEL_OPTIONS = (
    ('grpc.max_receive_message_length', 64 << 20),
    # The default authority is the percent-encoded socket path, which strict servers reject.
    ('grpc.default_authority', 'localhost'),
    ('grpc.enable_http_proxy', 0),
    # Channels to one socket would otherwise share its back-off, which grows to two minutes.
    ('grpc.use_local_subchannel_pool', 1),
    ('grpc.max_reconnect_backoff_ms', 10_000),
    # Also how long an attempt to connect to a stopped runtime outlives its channel.
    ('grpc.min_reconnect_backoff_ms', 2_000),
)
# No call is given less than this, however little of the cycle is left.
CRI_SHORTEST_TIMEOUT_SECONDS = 0.1


class CriError(Exception):
    """A call of the runtime that failed: why, and gRPC's status code, None where there was nothing to call."""

    def __init__(self, text: str, code: Optional[grpc.StatusCode] = None):
        super().__init__(text)
        self.code = code


class Call(NamedTuple):
    """A call under way, and when it began (monotonic clock)."""
    method: str
    future: grpc.Future
    started: float


class CallTally(NamedTuple):
    """What the calls of one method have cost so far."""
    calls: int = 0
    failures: int = 0
    seconds: float = 0
    last_seconds: float = 0


class Runtime(NamedTuple):
    """A runtime that has answered: how it is reached, and what it calls itself."""
    channel: grpc.Channel
    socket: str
    # Tells this socket from its successor under the same path.
    inode: Tuple[int, int]
    service: str
    name: str
    version: str


def parse_endpoint_flag(text: str) -> Optional[str]:
    """--container-runtime-endpoint in the kubelet's command line (NUL-separated) or in kubeadm-flags.env."""
    match = re.search(r'--container-runtime-endpoint[=\s\0]+"?([^\s"\0]+)', text)
    return match and match.group(1)


def parse_endpoint_setting(text: str) -> Optional[str]:
    """`containerRuntimeEndpoint: unix:///run/x.sock` (kubelet's config.yaml), `runtime-endpoint: ...` (crictl.yaml)."""
    match = re.search(r'^(?:containerRuntimeEndpoint|runtime-endpoint):[ \t]*["\']?([^\s"\']+)', text, re.MULTILINE)
    return match and match.group(1)


def read_kubelet_command_line(roots: Roots) -> Optional[str]:
    for name in read_names(roots.procfs, ''):
        if name.isdecimal() and read_line(roots.procfs, f'{name}/comm') == 'kubelet':
            return read_text(roots.procfs, f'{name}/cmdline')
    return None


def collect_endpoints(roots: Roots, explicit: Optional[str]) -> List[str]:
    """Paths where the runtime's socket may be, likeliest first: the one that was named, or else every known place."""
    if explicit:
        return [explicit.replace('unix://', '', 1)]
    configured = (
        parse_endpoint_flag(read_kubelet_command_line(roots) or ''),
        parse_endpoint_setting(read_text(roots.rootfs, 'var/lib/kubelet/config.yaml') or ''),
        parse_endpoint_flag(read_text(roots.rootfs, 'var/lib/kubelet/kubeadm-flags.env') or ''),
        parse_endpoint_setting(read_text(roots.rootfs, 'etc/crictl.yaml') or ''),
    )
    paths = [endpoint.replace('unix://', '', 1) for endpoint in configured if endpoint] + list(CRI_SOCKETS)
    # /var/run is a link to /run, absolute on some systems: below a mounted root it would lead out of it.
    return list(dict.fromkeys(os.path.realpath(roots.rootfs.rstrip('/') + re.sub('^/var/run/', '/run/', path)) for path in paths))


def read_socket_inode(path: str) -> Optional[Tuple[int, int]]:
    """Device and inode of a socket; None where there is no socket."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISSOCK(status.st_mode) else None


def cri_method(channel: grpc.Channel, service: str, method: str) -> grpc.UnaryUnaryMultiCallable:
    return channel.unary_unary(f'/{service}/{method}', response_deserializer=CRI_ANSWERS[method].FromString)


def start_call(channel: grpc.Channel, service: str, method: str, timeout: float, request: bytes = b'') -> Call:
    """Begin a call; an empty request asks for everything. `fetch` waits for the answer."""
    return Call(method, cri_method(channel, service, method).future(request, timeout=timeout), time.monotonic())


def add_call(tallies: Dict[str, CallTally], method: str, seconds: float, failed: bool) -> None:
    tally = tallies.get(method, CallTally())
    tallies[method] = CallTally(tally.calls + 1, tally.failures + failed, tally.seconds + seconds, seconds)


def fetch_answer(method: str, started: float, ask: Callable[[], Any], tallies: Dict[str, CallTally]) -> Any:
    """What `ask` gives, or CriError; either way the call is counted."""
    failed = True
    try:
        answer = ask()
        failed = False
        return answer
    except grpc.RpcError as error:
        raise CriError(f'{method}: {error.code().name}: {error.details()}', error.code()) from None
    finally:
        add_call(tallies, method, time.monotonic() - started, failed)


def fetch(call: Call, tallies: Dict[str, CallTally]) -> Any:
    """The answer to a call that has begun. CriError."""
    return fetch_answer(call.method, call.started, call.future.result, tallies)


def seconds_until(deadline: float) -> float:
    """What is left until an instant of the monotonic clock, and never so little that a call cannot succeed."""
    return max(CRI_SHORTEST_TIMEOUT_SECONDS, deadline - time.monotonic())


def fetch_now(runtime: Runtime, method: str, deadline: float, tallies: Dict[str, CallTally]) -> Any:
    """Ask and wait; without a future, for which grpc starts a thread. CriError."""
    ask = functools.partial(cri_method(runtime.channel, runtime.service, method), b'', timeout=seconds_until(deadline))
    return fetch_answer(method, time.monotonic(), ask, tallies)


def probe_version(channel: grpc.Channel, path: str, service: str, call: Call, tallies: Dict[str, CallTally]) -> Runtime:
    version = fetch(call, tallies)
    return Runtime(channel, path, read_socket_inode(path), service, version.runtime_name, version.runtime_version)


def probe_versions(channels: Dict[str, grpc.Channel], deadline: float, tallies: Dict[str, CallTally],
                   ) -> Tuple[List[Runtime], Dict[str, str]]:
    """The runtimes that answer Version, all asked at once, and by socket why the others do not."""
    runtimes, reasons, waiting = [], {}, list(channels)
    for service in CRI_SERVICES:
        timeout = seconds_until(deadline) / 2
        calls = {path: start_call(channels[path], service, 'Version', timeout) for path in waiting}
        waiting = []
        for path, call in calls.items():
            try:
                runtimes.append(probe_version(channels[path], path, service, call, tallies))
            except CriError as error:
                reasons[path] = str(error)
                waiting += [path] * (error.code is grpc.StatusCode.UNIMPLEMENTED)
    return runtimes, reasons


def has_sandboxes(runtime: Runtime, deadline: float, tallies: Dict[str, CallTally]) -> bool:
    try:
        return bool(fetch_now(runtime, 'ListPodSandbox', deadline, tallies).items)
    except CriError:
        return False


def find_runtime(paths: Sequence[str], deadline: float, tallies: Dict[str, CallTally]) -> Runtime:
    """The first runtime that answers; of several, the first that has sandboxes. CriError says what was tried."""
    channels = {path: grpc.insecure_channel(f'unix:{path}', CRI_CHANNEL_OPTIONS)
                for path in paths if read_socket_inode(path)}
    if not channels:
        raise CriError(f'none found: no socket at {paths[0]}' if len(paths) == 1 else
                       'none found: no socket at any of the usual paths (--cri-socket names another)')
    runtimes, reasons = probe_versions(channels, deadline, tallies)
    runtimes.sort(key=lambda runtime: list(channels).index(runtime.socket))
    inhabited = [runtime for runtime in runtimes if len(runtimes) == 1 or has_sandboxes(runtime, deadline, tallies)]
    chosen = (inhabited or runtimes or [None])[0]
    for path, channel in channels.items():
        if chosen is None or path != chosen.socket:
            channel.close()
    if chosen is None:
        raise CriError('none answers: ' + '; '.join(f'{path}: {reason}' for path, reason in reasons.items()))
    return chosen


# --- cgroups of containers

# A container's group has its id in its name: <id>, cri-containerd-<id>.scope, crio-<id>.scope, docker-<id>.scope.
CONTAINER_CGROUP = re.compile(r'(?!crio-conmon-)(?:.*[^0-9a-f])?([0-9a-f]{64})(?:\.scope)?')
# crun puts the processes of CRI-O's containers one level below.
INNER_CGROUP = 'container'
# How often to look again for groups that were not found.
SEARCH_AGAIN_SECONDS = 60


class CgroupReading(NamedTuple):
    """A group, and when it was read: by the wall clock, and by the one that rates are taken by (monotonic)."""
    cgroup: Cgroup
    timestamp_ns: int
    clock_ns: int


class PodNetwork(NamedTuple):
    """A pod's network as one of its processes sees it, the text of its net/dev, and the fields of PodMetrics that this makes."""
    pid: str
    host: bool
    text: Optional[bytes]
    serialized: bytes


class PodView(NamedTuple):
    """What the kernel knows of a pod: where its own group is and, as a field of PodMetrics, the class that this means; the
    group; the network."""
    path: Optional[str] = None
    quality: bytes = b''
    reading: Optional[CgroupReading] = None
    network: Optional[PodNetwork] = None


class CgroupsMemory(NamedTuple):
    """Where the groups are, by container (and sandbox) id, and what the last cycle has seen, by container and by sandbox id;
    what was looked for in vain, and until when to bear it."""
    tree: Optional[CgroupTree] = None
    paths: Dict[str, str] = {}
    readings: Dict[str, CgroupReading] = {}
    views: Dict[str, PodView] = {}
    unfound: FrozenSet[str] = frozenset()
    search_due: float = 0


def read_container_cgroups(roots: Roots, tree: CgroupTree) -> Dict[str, str]:
    """All groups of containers and sandboxes: path, below the root of the hierarchy, by id. One walk of the tree."""
    root = f'{roots.sysfs}/{tree.top}'
    paths = {}
    for directory, names, _ in os.walk(root):
        for name in names[:]:
            match = CONTAINER_CGROUP.fullmatch(name)
            if match:
                names.remove(name)
                path = os.path.join(directory, name)
                inner = os.path.join(path, INNER_CGROUP)
                paths[match.group(1)] = (inner if os.path.isdir(inner) else path)[len(root) + 1:]
    return paths


def read_first_pid(roots: Roots, tree: CgroupTree, path: str) -> Optional[str]:
    """Some process of the group."""
    pids = (read_small(roots.sysfs, f'{tree.top}/{path}/cgroup.procs') or b'').split(None, 1)
    return pids[0].decode(errors='replace') if pids else None


def pod_cgroup_path(path: str, uid: str) -> Optional[str]:
    """The pod's group above a container's, where the kubelet has made one: pod<uid>, with systemd's driver - as _."""
    parts = path.split('/')
    for depth, name in enumerate(parts[:-1], 1):
        if uid and (f'pod{uid}' in name or f'pod{uid.replace("-", "_")}' in name):
            return '/'.join(parts[:depth])
    return None


def qos_class(path: Optional[str]) -> Optional[str]:
    """The kubelet keeps pods of the classes apart; Guaranteed ones stand directly below kubepods."""
    if path is None or 'kubepods' not in path:
        return None
    return 'BestEffort' if 'besteffort' in path else 'Burstable' if 'burstable' in path else 'Guaranteed'


def find_cgroups(roots: Roots, memory: CgroupsMemory, ids: Set[str]) -> CgroupsMemory:
    """The tree is walked only when an id has no group yet; ids without any, as those of VMs, are borne for a while."""
    tree = memory.tree or read_cgroup_tree(roots)
    missing = ids - memory.paths.keys()
    again = missing and (missing - memory.unfound or time.monotonic() >= memory.search_due)
    paths = read_container_cgroups(roots, tree) if tree and again else memory.paths
    return memory._replace(
        tree=tree, paths={id: path for id, path in paths.items() if id in ids}, unfound=frozenset(missing - paths.keys()),
        search_due=time.monotonic() + SEARCH_AGAIN_SECONDS if again else memory.search_due)


def build_pod_interface(name: str, counters: NetDev) -> wire.PodInterface:
    return wire.PodInterface(name=name, counters=build_interface_counters(counters))


def build_pod_network(host: bool, counters: Dict[str, NetDev]) -> wire.PodMetrics:
    """The interfaces but lo; those of a pod in the node's network are not its own."""
    interfaces = [build_pod_interface(*item) for item in counters.items() if item[0] != 'lo']
    return wire.PodMetrics(host_network=host, network_interfaces=[] if host else interfaces)


def collect_process_network(roots: Roots, pid: str, known: Optional[PodNetwork]) -> Optional[PodNetwork]:
    """The network that a process is in; None where it has none, as a zombie."""
    same = known is not None and known.pid == pid
    if same and known.host:
        return known
    text = read_bytes(roots.procfs, f'{pid}/net/dev')
    if same and text == known.text:
        return known
    if not text:
        return None
    host = not same and same_network(roots.procfs, pid, roots.procfs, '1')
    metrics = build_pod_network(host, parse_net_dev(text.decode(errors='replace')))
    return PodNetwork(pid, host, text, metrics.SerializeToString())


def collect_pod_network(roots: Roots, tree: CgroupTree, paths: Iterable[str],
                        known: Optional[PodNetwork]) -> Optional[PodNetwork]:
    """By any process of these groups that has one. Its pid is taken from its group: one that is remembered may be another
    process by now."""
    pids = filter(None, (read_first_pid(roots, tree, path) for path in paths))
    return next(filter(None, (collect_process_network(roots, pid, known) for pid in pids)), None)


def collect_reading(roots: Roots, tree: CgroupTree, path: str, last: Optional[CgroupReading]) -> Optional[CgroupReading]:
    """A group, by its reading of the last cycle; None where it is gone."""
    cgroup = collect_cgroup(roots, tree, path, last.cgroup if last else None)
    return CgroupReading(cgroup, time.time_ns(), time.monotonic_ns()) if cgroup else None


def pod_place(paths: Iterable[str], uid: str) -> PodView:
    """Where a pod's group is, and the class that this means; nothing of it is read."""
    path = next(filter(None, (pod_cgroup_path(path, uid) for path in paths)), None)
    return PodView(path, wire.PodMetrics(qos_class=qos_class(path)).SerializeToString())


def is_at_rest(view: PodView, last: PodView) -> bool:
    """Whether a pod's group says what it said. It counts what its containers' groups count: then so do they."""
    return bool(view.reading and last.reading) and view.reading.cgroup is last.reading.cgroup


def collect_pod_view(roots: Roots, memory: CgroupsMemory, uid: str, ids: Sequence[str], last: PodView) -> PodView:
    """A pod, by the ids of its sandbox and its containers, and what was known of it in the last cycle."""
    paths = [memory.paths[id] for id in ids if id in memory.paths]
    if memory.tree is None or not paths:
        return PodView()
    view = last if last.path else pod_place(paths, uid)
    view = view._replace(reading=collect_reading(roots, memory.tree, view.path, last.reading) if view.path else None)
    network = None
    if last.network and is_at_rest(view, last):
        # Nothing has run, so that no process has become another one.
        network = collect_process_network(roots, last.network.pid, last.network)
    return view._replace(network=network or collect_pod_network(roots, memory.tree, paths, last.network))


def collect_container_groups(roots: Roots, memory: CgroupsMemory, ids: Iterable[str], view: PodView, last: PodView,
                             ) -> Tuple[Dict[str, Optional[CgroupReading]], Optional[str]]:
    """The groups of these containers of one pod, None for one that is gone; and what went wrong."""
    readings, failure = {}, None
    for id in (id for id in ids if id in memory.paths):
        known = memory.readings.get(id)
        below = view.path is not None and memory.paths[id].startswith(f'{view.path}/')
        if known and below and is_at_rest(view, last) and time.monotonic() < known.cgroup.due:
            readings[id] = CgroupReading(known.cgroup, view.reading.timestamp_ns, view.reading.clock_ns)
            continue
        try:
            readings[id] = collect_reading(roots, memory.tree, memory.paths[id], known)
        except (ValueError, OSError) as error:
            failure = f'{memory.paths[id]}: {error}'
    return readings, failure


# --- pods and containers

# A statistics call may take longer than a cycle: a later cycle picks its answer up, and none is started beside it.
STATS_TIMEOUT_SECONDS = 10
STATS_LONGEST_PAUSE_SECONDS = 300
# How often the runtime is asked whether it is ready, and how many containers' exit codes it is asked for in a cycle.
CONDITIONS_SECONDS = 15
STATUSES_PER_CYCLE = 32
LATE_REASON_SECONDS = 60
# More than any machine has; containerd 1.6 says 2**63 while it tears a container down.
SANE_NANO_CORES = 10_000 * 10**9
# What is more cannot be said in ns.
MAX_USEC = 2**64 // 1000
NO_STATS = cri.SerializedStats()


class CpuUsage(NamedTuple):
    """CPU time of a container since its start, where it comes from, and when it was taken: by the runtime's own clock,
    or where we have read it ourselves by the monotonic one."""
    source: str
    clock_ns: int
    usage_ns: int


class StatsMemory(NamedTuple):
    """The statistics call: the one under way, time-outs in a row, and when the next may begin (monotonic clock)."""
    call: Optional[Call] = None
    timeouts: int = 0
    not_before: float = 0


class KnownStatus(NamedTuple):
    """The state of a container in which the runtime was asked for its status, what it said, if it did, and the field of
    ContainerMetrics that this makes."""
    state: int
    status: Optional[wire.ContainerStatus]
    serialized: bytes


class ListedPod(NamedTuple):
    """A sandbox as the runtime lists it, and the fields of PodMetrics that this makes."""
    id: str
    uid: str
    namespace: str
    name: str
    created_at: int
    state: int
    serialized: bytes


class ListedContainer(NamedTuple):
    """A container as the runtime lists it, and the fields of ContainerMetrics that this makes."""
    id: str
    pod_sandbox_id: str
    created_at: int
    state: int
    serialized: bytes


class KnownLayer(NamedTuple):
    """A container's writable layer as the runtime said it, and the field of ContainerMetrics that this makes."""
    said: bytes
    serialized: bytes


class Health(NamedTuple):
    """What is asked for seldom, and when to ask again (monotonic clock)."""
    conditions: Dict[str, bool] = {}
    conditions_due: float = 0
    image_file_systems: Sequence[cri.FilesystemUsage] = ()
    # The writable layers, by container id.
    layers: Dict[str, KnownLayer] = {}
    sizes_due: float = 0


class PodsMemory(NamedTuple):
    """What the pods' side keeps from cycle to cycle."""
    runtime: Optional[Runtime] = None
    # Of the runtime found last, for the log.
    description: str = ''
    stats: StatsMemory = StatsMemory()
    health: Health = Health()
    cpu_usage: Dict[str, CpuUsage] = {}
    cgroups: CgroupsMemory = CgroupsMemory()
    statuses: Dict[str, KnownStatus] = {}
    # By id.
    pods: Dict[str, ListedPod] = {}
    containers: Dict[str, ListedContainer] = {}


class Inventory(NamedTuple):
    """What a cycle has found out: from the runtime, and by container and sandbox id from the cgroups."""
    pods: Sequence[ListedPod]
    containers: Sequence[ListedContainer]
    stats: Dict[str, cri.SerializedStats]
    readings: Dict[str, CgroupReading]
    views: Dict[str, PodView]
    layers: Dict[str, KnownLayer]
    statuses: Dict[str, KnownStatus]


def cpu_usage(reading: Optional[CgroupReading], stats: cri.SerializedStats) -> Optional[CpuUsage]:
    """The container's CPU time, from its group or else from the runtime."""
    usage_usec = reading.cgroup.usage_usec if reading else None
    if usage_usec is not None and usage_usec < MAX_USEC:
        return CpuUsage('cgroup', reading.clock_ns, usage_usec * 1000)
    if stats.cpu.HasField('usage_core_nano_seconds'):
        return CpuUsage('cri', stats.cpu.timestamp, stats.cpu.usage_core_nano_seconds.value)
    return None


def nano_cores(before: CpuUsage, after: CpuUsage) -> Optional[int]:
    """CPU time per wall time between two samples, in 1e-9 cores; None without a step forward in time, or beyond sense."""
    elapsed_ns = after.clock_ns - before.clock_ns if after.source == before.source else 0
    rate = (after.usage_ns - before.usage_ns) * 10**9 // elapsed_ns if elapsed_ns > 0 else None
    return rate if rate is not None and 0 <= rate < SANE_NANO_CORES else None


def runtime_nano_cores(stats: cri.SerializedStats) -> Optional[int]:
    """The runtime's own rate, which another poller may have spoiled; its 0 may mean that it has none yet."""
    value = stats.cpu.usage_nano_cores.value
    return value if 0 < value < SANE_NANO_CORES else None


def enum_name(enum: Any, number: int) -> str:
    return enum.Name(number) if number in enum.values() else str(number)


def rewrapped(message: Any, field: str) -> Optional[Dict[str, int]]:
    """CRI's own wrapper as the well-known one, in the form that the constructors of messages take in half the time."""
    return {'value': getattr(message, field).value} if message.HasField(field) else None


def fill_cpu_metrics(cpu: wire.CpuMetrics, timestamp_ns: int, usage: CpuUsage, rate: Optional[int]) -> None:
    cpu.timestamp, cpu.usage_core_nano_seconds.value = timestamp_ns, usage.usage_ns
    if rate is not None:
        cpu.usage_nano_cores.value = rate


def reparse(message: Any, data: bytes) -> Any:
    """A part of an answer as our own message, which has the numbers and types of CRI's, and nothing that ours lacks; None where
    it is malformed. Field by field it takes ten times as long."""
    with contextlib.suppress(DecodeError):
        parsed = message.FromString(data)
        parsed.DiscardUnknownFields()
        return parsed
    return None


def build_file_system_metrics(layer: cri.FilesystemUsage) -> wire.FileSystemMetrics:
    return wire.FileSystemMetrics(
        timestamp=layer.timestamp, mountpoint=layer.fs_id.mountpoint,
        used_bytes=rewrapped(layer, 'used_bytes'), inodes_used=rewrapped(layer, 'inodes_used'))


def build_status(status: cri.ContainerStatus) -> wire.ContainerStatus:
    exited = status.state == cri.CONTAINER_EXITED
    return wire.ContainerStatus(
        started_at_ns=status.started_at or None, finished_at_ns=status.finished_at or None,
        exit_code=status.exit_code if exited else None, reason=status.reason or None)


def restart_count(annotations: Mapping[str, str]) -> Optional[int]:
    text = annotations.get('io.kubernetes.container.restartCount', '')
    return int(text) if re.fullmatch('[0-9]{1,9}', text) else None


def build_listed_pod(sandbox: cri.PodSandbox) -> ListedPod:
    metadata = sandbox.metadata
    message = wire.PodMetrics(
        id=sandbox.id, uid=metadata.uid, name=metadata.name, namespace=metadata.namespace, created_at=sandbox.created_at,
        state=enum_name(cri.PodSandboxState, sandbox.state), attempt=metadata.attempt, labels=dict(sandbox.labels),
        runtime_handler=sandbox.runtime_handler or None)
    return ListedPod(sandbox.id, metadata.uid, metadata.namespace, metadata.name, sandbox.created_at, sandbox.state,
                     message.SerializeToString())


def build_listed_container(container: cri.Container) -> ListedContainer:
    message = wire.ContainerMetrics(
        id=container.id, name=container.metadata.name,
        image=container.image.user_specified_image or container.image.image,
        created_at=container.created_at, state=enum_name(cri.ContainerState, container.state),
        attempt=container.metadata.attempt, restart_count=restart_count(container.annotations),
        labels=dict(container.labels), image_ref=container.image_ref or None)
    return ListedContainer(container.id, container.pod_sandbox_id, container.created_at, container.state,
                           message.SerializeToString())


def serialize_cgroup(reading: CgroupReading) -> bytes:
    return reading.cgroup.serialized + wire.CgroupMetrics(timestamp_ns=reading.timestamp_ns).SerializeToString()


def build_use_from_cgroup(reading: CgroupReading, usage: Optional[CpuUsage], rate: Optional[int]) -> wire.SerializedContainer:
    """What is known of the group, and the moment: parsing it takes a fifth of the time that building it would."""
    use = wire.SerializedContainer.FromString(reading.cgroup.container)
    if use.HasField('memory_metrics'):
        use.memory_metrics.timestamp = reading.timestamp_ns
    if use.HasField('swap_metrics'):
        use.swap_metrics.timestamp = reading.timestamp_ns
    if usage:
        fill_cpu_metrics(use.cpu_metrics, reading.timestamp_ns, usage, rate)
    use.cgroup = serialize_cgroup(reading)
    return use


def build_use_from_cri(stats: cri.SerializedStats, usage: Optional[CpuUsage], rate: Optional[int]) -> wire.SerializedContainer:
    known = usage or stats.HasField('memory') or stats.HasField('swap')
    use = wire.SerializedContainer(
        memory_metrics=reparse(wire.MemoryMetrics, stats.memory) if stats.HasField('memory') else None,
        swap_metrics=reparse(wire.SwapMetrics, stats.swap) if stats.HasField('swap') else None,
        stats_source='cri' if known else None)
    if usage:
        fill_cpu_metrics(use.cpu_metrics, stats.cpu.timestamp, usage, rate)
    return use


def serialize_container(container: ListedContainer, inventory: Inventory, earlier: Optional[CpuUsage],
                        ) -> Tuple[bytes, Optional[CpuUsage]]:
    """One container, and its CPU time for the next cycle. A counter that goes backwards, as in a container being torn
    down, is not sent, but is what the next is held against."""
    reading, stats = inventory.readings.get(container.id), inventory.stats.get(container.id, NO_STATS)
    sample = usage = cpu_usage(reading, stats)
    if usage and earlier and usage.usage_ns < earlier.usage_ns:
        usage = None
    rate = (nano_cores(earlier, usage) if earlier else runtime_nano_cores(stats)) if usage else None
    use = build_use_from_cgroup(reading, usage, rate) if reading else build_use_from_cri(stats, usage, rate)
    layer, status = inventory.layers.get(container.id), inventory.statuses.get(container.id)
    return b''.join((container.serialized, use.SerializeToString(), layer.serialized if layer else b'',
                     status.serialized if status else b'')), sample or earlier


def serialize_pod(pod: ListedPod, containers: List[bytes], view: PodView) -> bytes:
    parts = wire.SerializedPod(container_metrics=containers, cgroup=serialize_cgroup(view.reading) if view.reading else None)
    return b''.join((pod.serialized, parts.SerializeToString(), view.quality, view.network.serialized if view.network else b''))


def serialize_pods(inventory: Inventory, before: Dict[str, CpuUsage]) -> Tuple[List[bytes], Dict[str, CpuUsage]]:
    """Every READY sandbox with all its containers, in an order of our own (the runtime's changes from call to call);
    and the CPU samples for the next cycle, those of containers without statistics in this one included."""
    after, by_sandbox = {}, collections.defaultdict(list)
    for container in sorted(inventory.containers, key=lambda container: (container.created_at, container.id)):
        message, sample = serialize_container(container, inventory, before.get(container.id))
        by_sandbox[container.pod_sandbox_id].append(message)
        if sample:
            after[container.id] = sample
    ready = sorted((pod for pod in inventory.pods if pod.state == cri.SANDBOX_READY),
                   key=lambda pod: (pod.namespace, pod.name, pod.created_at))
    return [serialize_pod(pod, by_sandbox[pod.id], inventory.views.get(pod.id, PodView())) for pod in ready], after


def count_states(enum: Any, listed: Iterable[Any]) -> Dict[str, int]:
    return {enum_name(enum, state): count for state, count in collections.Counter(item.state for item in listed).items()}


def build_runtime_metrics(runtime: Runtime, health: Health, inventory: Inventory) -> wire.RuntimeMetrics:
    return wire.RuntimeMetrics(
        name=runtime.name, version=runtime.version, socket=runtime.socket, service=runtime.service,
        conditions=health.conditions,
        sandboxes=count_states(cri.PodSandboxState, inventory.pods),
        containers=count_states(cri.ContainerState, inventory.containers),
        image_file_systems=[build_file_system_metrics(usage) for usage in health.image_file_systems])


# --- inventory

def call_finished(call: Call, deadline: float) -> bool:
    """Wait for the call until then. grpc's own waiting goes by the wall clock, which may be set meanwhile."""
    finished = threading.Event()
    call.future.add_done_callback(lambda future: finished.set())
    return finished.wait(seconds_until(deadline))


def after_timeout(timeouts: int) -> StatsMemory:
    """The first time-out may be chance; from the second on the runtime is left alone for longer and longer."""
    pause = min(STATS_LONGEST_PAUSE_SECONDS, STATS_TIMEOUT_SECONDS * 2 ** (timeouts - 2)) if timeouts > 1 else 0
    return StatsMemory(None, timeouts, time.monotonic() + pause)


def fetch_stats(runtime: Runtime, memory: StatsMemory, deadline: float, tallies: Dict[str, CallTally],
                ) -> Tuple[Sequence[cri.SerializedStats], StatsMemory, Optional[str]]:
    """The statistics; or none, what to go on with in the next cycle, and why there are none.

    containerd before 2.1 fails the whole call when one container vanishes during it: it is tried once more, at once.
    """
    call, failure = memory.call, None
    if call is None and time.monotonic() < memory.not_before:
        return (), memory, f'ListContainerStats: paused after {memory.timeouts} time-outs'
    for _ in range(2):
        call = call or start_call(runtime.channel, runtime.service, 'ListContainerStats', STATS_TIMEOUT_SECONDS)
        if not call_finished(call, deadline):
            return (), memory._replace(call=call), 'ListContainerStats: no answer in time'
        try:
            return fetch(call, tallies).stats, StatsMemory(), None
        except CriError as error:
            call, failure = None, str(error)
            if error.code is grpc.StatusCode.DEADLINE_EXCEEDED:
                return (), after_timeout(memory.timeouts + 1), failure
    return (), StatsMemory(), failure


def forget_runtime(memory: PodsMemory) -> PodsMemory:
    """Close the connection, so that the next cycle looks for a runtime again; the CPU samples stay good."""
    if memory.runtime:
        memory.runtime.channel.close()
    return memory._replace(runtime=None, stats=memory.stats._replace(call=None))


def fetch_conditions(runtime: Runtime, health: Health, deadline: float, tallies: Dict[str, CallTally]) -> Health:
    """Whether the runtime calls itself ready. An old answer stays until there is a new one. CriError."""
    conditions = fetch_now(runtime, 'Status', deadline, tallies).status.conditions
    return health._replace(conditions={condition.type: condition.status for condition in conditions})


def fetch_image_sizes(runtime: Runtime, health: Health, deadline: float, tallies: Dict[str, CallTally]) -> Health:
    """What the images take. CriError."""
    images = runtime._replace(service=runtime.service.replace('RuntimeService', 'ImageService'))
    return health._replace(image_file_systems=fetch_now(images, 'ImageFsInfo', deadline, tallies).image_filesystems)


def fetch_health(runtime: Runtime, health: Health, deadline: float, tallies: Dict[str, CallTally],
                 sizes_interval: float) -> Tuple[Health, Optional[str]]:
    """What is asked for seldom, where it is due; and why there is no answer."""
    now, due, failure = time.monotonic(), [], None
    if now >= health.conditions_due:
        due.append(fetch_conditions)
        health = health._replace(conditions_due=now + CONDITIONS_SECONDS)
    if now >= health.sizes_due:
        due.append(fetch_image_sizes)
        health = health._replace(sizes_due=now + sizes_interval)
    for fetch_part in due:
        try:
            health = fetch_part(runtime, health, deadline, tallies)
        except CriError as error:
            failure = str(error)
    return health, failure


def may_change(status: Optional[wire.ContainerStatus]) -> bool:
    """Whether to ask again: there was no answer, or the runtime may yet learn that a kill was one for want of memory."""
    if status is None:
        return True
    killed = status.exit_code == 128 + signal.SIGKILL and status.reason != 'OOMKilled'
    return killed and time.time_ns() - status.finished_at_ns < LATE_REASON_SECONDS * 10**9


def fetch_statuses(runtime: Runtime, containers: Sequence[ListedContainer], known: Dict[str, KnownStatus], again: bool,
                   deadline: float, tallies: Dict[str, CallTally]) -> Tuple[Dict[str, KnownStatus], Optional[str]]:
    """The status of each container in its present state, asked once, for some containers a cycle, all at once; `again`,
    now and then, where it may change. And why there is no answer; without one, what was known of this state stays."""
    statuses = {container.id: known[container.id] for container in containers if container.id in known}
    failure, unasked = None, KnownStatus(-1, None, b'')
    stale = [container for container in containers if statuses.get(container.id, unasked).state != container.state
             or again and may_change(statuses[container.id].status)]
    # Those that have ended first: why they have is what people look for.
    stale.sort(key=lambda container: container.state != cri.CONTAINER_EXITED)
    calls = [(container, start_call(runtime.channel, runtime.service, 'ContainerStatus', seconds_until(deadline),
                                    cri.ContainerStatusRequest(container_id=container.id).SerializeToString()))
             for container in stale[:STATUSES_PER_CYCLE]]
    for container, call in calls:
        last = statuses.get(container.id, unasked)
        statuses[container.id] = last if last.state == container.state else unasked._replace(state=container.state)
        try:
            status = build_status(fetch(call, tallies).status)
            serialized = wire.ContainerMetrics(status=status).SerializeToString()
            statuses[container.id] = KnownStatus(container.state, status, serialized)
        except CriError as error:
            # A container that is gone by now is no trouble.
            failure = failure if error.code in (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNKNOWN) else str(error)
    return statuses, failure


def running_ids(containers: Iterable[ListedContainer]) -> List[str]:
    return [container.id for container in containers if container.state == cri.CONTAINER_RUNNING]


def collect_kernel_side(roots: Roots, memory: CgroupsMemory, pods: Sequence[ListedPod], containers: Sequence[ListedContainer],
                        ) -> Tuple[CgroupsMemory, Dict[str, Optional[str]]]:
    """What the cgroups and network namespaces tell of the READY pods and the running containers; and what went wrong. A group
    that is gone is looked for again next cycle."""
    by_pod, views, readings, failures = collections.defaultdict(list), {}, {}, {}
    for container in containers:
        by_pod[container.pod_sandbox_id].append(container)
    ready = {pod.id: pod for pod in pods if pod.state == cri.SANDBOX_READY}
    memory = find_cgroups(roots, memory, {*ready, *running_ids(containers)})
    for pod_id in {**ready, **by_pod}:
        view, last = PodView(), memory.views.get(pod_id, PodView())
        if pod_id in ready:
            pod = ready[pod_id]
            try:
                ids = [pod_id, *(container.id for container in by_pod[pod_id])]
                view = views[pod_id] = collect_pod_view(roots, memory, pod.uid, ids, last)
            except (ValueError, OSError) as error:
                failures['pod cgroups'] = f'{pod.namespace}/{pod.name}: {error}'
        of_pod, failure = collect_container_groups(roots, memory, running_ids(by_pod[pod_id]), view, last)
        readings.update(of_pod)
        if failure:
            failures['cgroups'] = failure
    gone = {id for id, reading in readings.items() if reading is None}
    return memory._replace(
        paths={id: path for id, path in memory.paths.items() if id not in gone}, views=views,
        readings={id: reading for id, reading in readings.items() if reading}), failures


def build_layer(said: bytes) -> Optional[KnownLayer]:
    """None with timestamp 0: not measured yet (containerd's first 10 s)."""
    layer = reparse(cri.FilesystemUsage, said)
    if layer is None or not layer.timestamp:
        return None
    return KnownLayer(said, wire.ContainerMetrics(file_system_metrics=build_file_system_metrics(layer)).SerializeToString())


def keep_layers(known: Dict[str, KnownLayer], containers: Iterable[ListedContainer],
                stats: Mapping[str, cri.SerializedStats]) -> Dict[str, KnownLayer]:
    """The writable layers as they were measured last."""
    layers = {}
    for container in containers:
        layer, said = known.get(container.id), stats.get(container.id, NO_STATS).writable_layer
        if said and not (layer and layer.said == said):
            layer = build_layer(said) or layer
        if layer:
            layers[container.id] = layer
    return layers


def collect_inventory(roots: Roots, options: argparse.Namespace, memory: PodsMemory, deadline: float,
                      tallies: Dict[str, CallTally]) -> Tuple[Inventory, PodsMemory, Dict[str, str]]:
    """What the cgroups and the runtime tell of what it lists. The runtime is asked for statistics only where no cgroup has
    them, and now and then for the sizes of writable layers, which nobody else knows."""
    runtime, health, failures = memory.runtime, memory.health, {}
    pods, containers, cgroups = [*memory.pods.values()], [*memory.containers.values()], memory.cgroups
    if options.container_stats == 'cgroup':
        cgroups, failures = collect_kernel_side(roots, cgroups, pods, containers)
    stats, stats_memory = (), memory.stats
    if stats_memory.call or time.monotonic() >= health.sizes_due or cgroups.readings.keys() != set(running_ids(containers)):
        stats, stats_memory, failures['container statistics'] = fetch_stats(runtime, stats_memory, deadline, tallies)
    again = time.monotonic() >= health.conditions_due
    statuses, failures['container status'] = fetch_statuses(runtime, containers, memory.statuses, again, deadline, tallies)
    by_id = {entry.attributes.id: entry for entry in stats}
    health = health._replace(layers=keep_layers(health.layers, containers, by_id))
    health, failures['runtime health'] = fetch_health(runtime, health, deadline, tallies, options.fs_stats_interval)
    inventory = Inventory(pods, containers, by_id, cgroups.readings, cgroups.views, health.layers, statuses)
    memory = memory._replace(stats=stats_memory, health=health, cgroups=cgroups, statuses=statuses)
    return inventory, memory, {subject: text for subject, text in failures.items() if text}


def keep_runtime(roots: Roots, socket_path: Optional[str], memory: PodsMemory, deadline: float,
                 tallies: Dict[str, CallTally]) -> PodsMemory:
    """The connection of the last cycle, unless the socket is another one by now; or a new one. CriError: there is none."""
    if memory.runtime and read_socket_inode(memory.runtime.socket) != memory.runtime.inode:
        memory = forget_runtime(memory)
    if memory.runtime:
        return memory
    runtime = find_runtime(collect_endpoints(roots, socket_path), deadline, tallies)
    description = f'{runtime.name} {runtime.version} at {runtime.socket} ({runtime.service})'
    if description != memory.description:
        log.info('container runtime: %s', description)
    return memory._replace(runtime=runtime, description=description)


def another_socket(roots: Roots, socket_path: Optional[str], runtime: Runtime) -> bool:
    """Whether a second runtime may have come up that has the sandboxes (k3s's after Docker's)."""
    return any(path != runtime.socket and read_socket_inode(path) for path in collect_endpoints(roots, socket_path))


def keep_listed(known: Mapping[str, Row], items: Iterable[Any], build: Callable[[Any], Row]) -> Dict[str, Row]:
    """By id what `build` makes of pods or containers. Of one that is known only the state may be another by now (cri-api: labels
    and annotations are those that it was made with)."""
    listed = {}
    for item in items:
        last = known.get(item.id)
        listed[item.id] = last if last and last.state == item.state else build(item)
    return listed


def fetch_lists(roots: Roots, options: argparse.Namespace, memory: PodsMemory, deadline: float,
                tallies: Dict[str, CallTally]) -> Tuple[PodsMemory, Optional[CriError]]:
    """The runtime's pods and containers; or why there are none before the deadline (an instant of the monotonic clock)."""
    try:
        memory = keep_runtime(roots, options.cri_socket, memory, deadline, tallies)
        sandboxes = fetch_now(memory.runtime, 'ListPodSandbox', deadline, tallies).items
        containers = fetch_now(memory.runtime, 'ListContainers', deadline, tallies).containers
        return memory._replace(pods=keep_listed(memory.pods, sandboxes, build_listed_pod),
                               containers=keep_listed(memory.containers, containers, build_listed_container)), None
    except CriError as error:
        # Another one, whose traceback does not keep the memory, and so the open files, of this cycle.
        return memory, CriError(str(error), error.code)
    except (ValueError, OSError) as error:
        return memory, CriError(f'unintelligible: {error}')


def collect_pods(roots: Roots, options: argparse.Namespace, memory: PodsMemory, error: Optional[CriError], deadline: float,
                 tallies: Dict[str, CallTally]) -> Part:
    """The pods and the runtime's state, from what `fetch_lists` gives.

    A runtime that is only late keeps its connection: each new one would wait in the socket of a stopped runtime.
    """
    if error:
        late = error.code is grpc.StatusCode.DEADLINE_EXCEEDED
        return Part(([], None), memory if late else forget_runtime(memory), {'container runtime': str(error)})
    try:
        inventory, memory, failures = collect_inventory(roots, options, memory, deadline, tallies)
        pods, usage = serialize_pods(inventory, memory.cpu_usage)
    except (ValueError, OSError) as trouble:
        return Part(([], None), forget_runtime(memory), {'container runtime': f'unintelligible: {trouble}'})
    runtime_metrics = build_runtime_metrics(memory.runtime, memory.health, inventory)
    memory = memory._replace(cpu_usage=usage)
    if not inventory.pods and another_socket(roots, options.cri_socket, memory.runtime):
        memory = forget_runtime(memory)
    return Part((pods, runtime_metrics), memory, failures)


# --- spool

# One file a record: a header, the snapshot (zlib where the header says so), and a CRC-32 of both. A record that was torn
# by a crash, or has rotted, is known by its length or its CRC. Nothing is synced: a record outlives the agent, not a
# power cut.
RECORD = struct.Struct('<4sIIdd36s')
RECORD_MAGIC = b'KSR1'
RECORD_CRC = struct.Struct('<I')
RECORD_SUFFIX = '.snapshot'
BLOCK_BYTES = 4096


class Record(NamedTuple):
    """The header of a record: when it was taken by both clocks, since the monotonic one starts anew with each boot."""
    magic: bytes
    stored_bytes: int
    plain_bytes: int
    monotonic: float
    wall: float
    boot_id: bytes


def record_name(number: int) -> str:
    return f'{number:016d}{RECORD_SUFFIX}'


def record_path(directory: str, number: int) -> str:
    return os.path.join(directory, record_name(number))


def record_numbers(names: Iterable[str]) -> List[int]:
    """Of the records among these files, oldest first. Whatever else lies there is not ours to touch."""
    return sorted(int(name[:-len(RECORD_SUFFIX)]) for name in names
                  if re.fullmatch(r'\d{16}' + re.escape(RECORD_SUFFIX), name, re.ASCII))


def read_boot_id() -> bytes:
    return (read_line('/proc', 'sys/kernel/random/boot_id') or '').encode()[:36].ljust(36)


def parse_record(data: bytes) -> Tuple[Record, bytes]:
    """The header and the snapshot of a record. ValueError where it is not what was written."""
    if len(data) < RECORD.size + RECORD_CRC.size:
        raise ValueError(f'record: {len(data)} bytes are not even a header')
    header, stored = Record(*RECORD.unpack_from(data)), data[RECORD.size:-RECORD_CRC.size]
    if header.magic != RECORD_MAGIC or header.stored_bytes != len(stored):
        raise ValueError(f'record: torn: {len(stored)} bytes of {header.stored_bytes}')
    if RECORD_CRC.unpack_from(data, len(data) - RECORD_CRC.size)[0] != zlib.crc32(data[:-RECORD_CRC.size]):
        raise ValueError('record: its CRC differs')
    return header, stored


def read_record(directory: str, number: int) -> Tuple[Record, bytes]:
    """ValueError or OSError where it cannot be had any more."""
    return parse_record(read_bytes(directory, record_name(number)) or b'')


def write_record(directory: str, number: int, header: Record, stored: bytes) -> None:
    """OSError where the disk is full or broken; nothing of the record stays then."""
    path = record_path(directory, number)
    data = RECORD.pack(*header) + stored
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(descriptor, 'wb', buffering=0) as file:
            if file.write(data + RECORD_CRC.pack(zlib.crc32(data))) != len(data) + RECORD_CRC.size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def remove_record(directory: str, number: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(record_path(directory, number))


def open_spool(directory: str, patience_seconds: float = 0) -> int:
    """Make the directory this agent's own, 0700, until the returned lock is closed, or the process ends. UnsafePath or
    OSError where it cannot be."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    check_path(directory)
    os.chmod(directory, 0o700)
    give_up = time.monotonic() + patience_seconds
    lock = lock_directory(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    while lock is None:
        if time.monotonic() >= give_up:
            raise UnsafePath(f'{directory} is in use by another agent')
        time.sleep(0.1)
        lock = lock_directory(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock


def record_age(header: Record, boot_id: bytes, monotonic: float, wall: float) -> float:
    """Seconds since a record was taken; by the wall clock only if the machine was started anew since."""
    return max(0.0, monotonic - header.monotonic if header.boot_id == boot_id else wall - header.wall)


# --- backlog

# The relay refuses a larger message (grpc-go's default) and ends the stream: those behind it would never arrive.
MAX_SNAPSHOT_BYTES = 4 << 20
MAX_STREAM_SNAPSHOTS = 50
# What a stream may hold in memory, beyond its first snapshot.
MAX_STREAM_BYTES = 8 << 20
# Two hours of a node of 1,000 containers, a third of them busy, are 1,440 snapshots of 366 kB. Compressed one by one they
# take 222 MB (lzma: 179), most of it for ids that are the same in each. Compressed against an earlier one, which is
# stored whole, they take 60 MB, at 7 ms of CPU each; level 1 would take 8 MB more for 3 ms less.
COMPRESSION_LEVEL = 6
REFERENCE_EVERY_SNAPSHOTS = 128
# zlib looks back 32 KiB, so that each piece is given its own surroundings in the reference.
PIECE_BYTES = 1 << 14
ZLIB_WINDOW_BYTES = (1 << 15) - 262


class Snapshot(NamedTuple):
    """A serialised Metrics message that waits: as many bytes as are stored of it, compressed if they are fewer than it
    has; or None where they are in the spool, under its number. A reference is stored whole."""
    number: int
    taken: float
    plain_bytes: int
    stored_bytes: int
    stored: Optional[bytes]
    reference: Optional[Snapshot] = None


def surroundings(reference: bytes, at: int, size: int) -> bytes:
    """What in the reference lies around the same place as `at` in a snapshot of that size."""
    middle = at * len(reference) // size + PIECE_BYTES // 2
    start = max(0, min(middle - ZLIB_WINDOW_BYTES // 2, len(reference) - ZLIB_WINDOW_BYTES))
    return reference[start:start + ZLIB_WINDOW_BYTES]


def compress_against(reference: bytes, data: bytes) -> bytes:
    pieces = []
    for at in range(0, len(data), PIECE_BYTES):
        packer = zlib.compressobj(COMPRESSION_LEVEL, zdict=surroundings(reference, at, len(data)))
        pieces += packer.compress(data[at:at + PIECE_BYTES]), packer.flush()
    return b''.join(pieces)


def decompress_against(reference: bytes, packed: bytes, size: int) -> bytes:
    pieces, at = [], 0
    while at < size:
        unpacker = zlib.decompressobj(zdict=surroundings(reference, at, size))
        pieces.append(unpacker.decompress(packed))
        packed, at = unpacker.unused_data, at + PIECE_BYTES
    return b''.join(pieces)


def plain(stored: bytes, snapshot: Snapshot) -> bytes:
    """The message. ValueError where it is not what was stored."""
    if snapshot.stored_bytes == snapshot.plain_bytes:
        return stored
    try:
        if snapshot.reference:
            return decompress_against(plain(snapshot.reference.stored, snapshot.reference), stored, snapshot.plain_bytes)
        return zlib.decompress(stored)
    except zlib.error as error:
        raise ValueError(f'snapshot: {error}') from None


class Backlog:
    """The snapshots that the relay has not acknowledged, oldest first, between the collecting thread and the sending one."""

    def __init__(self, retention_seconds: float, max_bytes: float = math.inf, spool: Optional[str] = None,
                 spool_max_bytes: float = math.inf):
        self.retention_seconds, self.max_bytes = retention_seconds, max_bytes
        self.spool, self.spool_max_bytes = spool, spool_max_bytes
        self.snapshots: Deque[Snapshot] = collections.deque()
        self.memory_bytes = self.spool_bytes = 0
        self.next_number = 1
        self.reference: Optional[Snapshot] = None
        self.boot_id = read_boot_id()
        self.changed = threading.Condition()
        self.closing = threading.Event()
        self.given_up = False
        # The stream under way, to be cancelled when time is up.
        self.call: Optional[grpc.Future] = None
        self.dropped: Dict[str, int] = collections.Counter()
        self.sent = self.acknowledged = self.connections = 0
        self.last_acknowledged: Optional[float] = None


def load_spool(backlog: Backlog) -> None:
    """Take over what earlier runs have left, oldest first. A record that is not whole is dropped."""
    monotonic, wall, reasons = time.monotonic(), time.time(), []
    numbers = record_numbers(os.listdir(backlog.spool))
    for number in numbers:
        try:
            header = read_record(backlog.spool, number)[0]
        except (OSError, ValueError) as error:
            reasons.append(f'{record_name(number)}: {error}')
            remove_record(backlog.spool, number)
            continue
        taken = monotonic - record_age(header, backlog.boot_id, monotonic, wall)
        append_snapshot(backlog, Snapshot(number, taken, header.plain_bytes, header.stored_bytes, None))
    backlog.next_number = numbers[-1] + 1 if numbers else 1
    if reasons:
        backlog.dropped['damaged'] += len(reasons)
        log.warning('spool: %s: damaged records, dropped: %d, the first %s', backlog.spool, len(reasons), reasons[0])


def memory_bytes(snapshot: Snapshot) -> int:
    return 0 if snapshot.stored is None else snapshot.stored_bytes


def spool_bytes(snapshot: Snapshot) -> int:
    """File systems give out whole blocks."""
    return 0 if snapshot.stored is not None else -(-snapshot.stored_bytes // BLOCK_BYTES) * BLOCK_BYTES


def append_snapshot(backlog: Backlog, snapshot: Snapshot) -> None:
    backlog.snapshots.append(snapshot)
    backlog.memory_bytes += memory_bytes(snapshot)
    backlog.spool_bytes += spool_bytes(snapshot)


def remove_snapshot(backlog: Backlog, snapshot: Snapshot, cause: Optional[str] = None) -> None:
    """Forget a snapshot, and count it where it was not delivered. The caller holds the lock."""
    backlog.snapshots.remove(snapshot)
    backlog.memory_bytes -= memory_bytes(snapshot)
    backlog.spool_bytes -= spool_bytes(snapshot)
    if snapshot.stored is None:
        remove_record(backlog.spool, snapshot.number)
    if cause:
        backlog.dropped[cause] += 1


def drop_excess(backlog: Backlog, now: float) -> Dict[str, str]:
    """Drop the oldest beyond the retention and the sizes; what that was, by trouble. The caller holds the lock."""
    failures = {}
    while backlog.snapshots and now - backlog.snapshots[0].taken > backlog.retention_seconds:
        remove_snapshot(backlog, backlog.snapshots[0], 'retention')
        failures['backlog'] = f'dropping snapshots older than {backlog.retention_seconds / 60:g} min'
    while backlog.memory_bytes > backlog.max_bytes:
        remove_snapshot(backlog, next(filter(memory_bytes, backlog.snapshots)), 'size')
        failures['backlog size'] = 'dropping the oldest snapshots: those in memory have reached --buffer-max-size'
    while backlog.spool_bytes > backlog.spool_max_bytes:
        remove_snapshot(backlog, next(filter(spool_bytes, backlog.snapshots)), 'size')
        failures['backlog size'] = 'dropping the oldest snapshots: those in the spool have reached --spool-max-size'
    return failures


def make_snapshot(backlog: Backlog, data: bytes, now: float) -> Snapshot:
    """What waits behind others is compressed; in memory against the reference, which is each time a recent one."""
    reference, number = backlog.reference, backlog.next_number
    backlog.next_number += 1
    if not backlog.snapshots:
        backlog.reference = None
        return Snapshot(number, now, len(data), len(data), data)
    if reference and number - reference.number < REFERENCE_EVERY_SNAPSHOTS:
        packed = compress_against(plain(reference.stored, reference), data)
    else:
        reference, packed = None, zlib.compress(data, COMPRESSION_LEVEL)
    if len(packed) >= len(data):
        reference, packed = None, data
    snapshot = Snapshot(number, now, len(data), len(packed), packed, reference)
    backlog.reference = reference or (snapshot if backlog.spool is None else None)
    return snapshot


def spooled(backlog: Backlog, snapshot: Snapshot) -> Tuple[Snapshot, Dict[str, str]]:
    """The snapshot put into the spool; or as it was, and why, where the disk does not take it."""
    header = Record(RECORD_MAGIC, snapshot.stored_bytes, snapshot.plain_bytes, snapshot.taken, time.time(), backlog.boot_id)
    try:
        write_record(backlog.spool, snapshot.number, header, snapshot.stored)
    except OSError as error:
        return snapshot, {'spool': f'{backlog.spool} cannot be written ({error.strerror}): keeping snapshots in memory'}
    return snapshot._replace(stored=None), {}


def add_snapshot(backlog: Backlog, data: bytes) -> Dict[str, str]:
    """Put a snapshot at the end; gives what went wrong, by trouble."""
    now = time.monotonic()
    if len(data) > MAX_SNAPSHOT_BYTES:
        backlog.dropped['too large'] += 1
        return {'snapshot': f'dropped: its {len(data)} bytes exceed the {MAX_SNAPSHOT_BYTES} that the relay accepts'}
    with backlog.changed:
        snapshot, failures = make_snapshot(backlog, data, now), {}
        if backlog.spool is not None:
            snapshot, failures = spooled(backlog, snapshot)
        append_snapshot(backlog, snapshot)
        failures.update(drop_excess(backlog, now))
        backlog.changed.notify()
    return failures


def load_snapshot(backlog: Backlog, snapshot: Snapshot) -> Optional[bytes]:
    """The bytes to send; None where the spool has lost or spoiled them, or they have been dropped meanwhile."""
    try:
        stored = read_record(backlog.spool, snapshot.number)[1] if snapshot.stored is None else snapshot.stored
        return plain(stored, snapshot)
    except (OSError, ValueError) as error:
        with backlog.changed, contextlib.suppress(ValueError):
            remove_snapshot(backlog, snapshot, 'damaged')
            log.warning('spool: %s: %s: dropped', record_path(backlog.spool, snapshot.number), error)
        return None


def next_batch(backlog: Backlog, limit: int) -> List[Snapshot]:
    """Wait for snapshots, and give the oldest of them; none when the backlog is closing and empty."""
    with backlog.changed:
        while not backlog.snapshots and not backlog.closing.is_set():
            backlog.changed.wait()
        drop_excess(backlog, time.monotonic())
        batch, size = [], 0
        for snapshot in itertools.islice(backlog.snapshots, limit):
            size += snapshot.plain_bytes
            if batch and size > MAX_STREAM_BYTES:
                break
            batch.append(snapshot)
        return batch


def forget_snapshots(backlog: Backlog, batch: Sequence[Snapshot]) -> None:
    """Remove what has been delivered, or cannot be; some of it may have been dropped meanwhile."""
    with backlog.changed:
        while backlog.snapshots and backlog.snapshots[0].number <= batch[-1].number:
            remove_snapshot(backlog, backlog.snapshots[0])


# --- TLS

TLS_PROBE_SECONDS = 3
# Debian, RHEL, SUSE, Alpine; SSL_CERT_FILE names another. What grpc would take otherwise is a list of its own.
SYSTEM_ROOTS = ('/etc/ssl/certs/ca-certificates.crt', '/etc/pki/tls/certs/ca-bundle.crt', '/etc/ssl/ca-bundle.pem',
                '/etc/ssl/cert.pem')
# What OpenSSL makes of an answer in plain text, or of a server that hangs up on a handshake.
NO_TLS = frozenset(('WRONG_VERSION_NUMBER', 'RECORD_LAYER_FAILURE', 'PACKET_LENGTH_TOO_LONG', 'HTTP_REQUEST',
                    'UNEXPECTED_EOF_WHILE_READING'))


class Relay(NamedTuple):
    """How the relay is reached; the files are read anew for each connection."""
    address: str
    tls: bool = False
    ca: Optional[str] = None
    cert: Optional[str] = None
    key: Optional[str] = None
    server_name: Optional[str] = None
    token_file: Optional[str] = None


class RelayError(Exception):
    """Why no connection to the relay can be made from the files given: one line that names the file."""


def read_relay_file(flag: str, path: Optional[str]) -> Optional[bytes]:
    try:
        with open(path, 'rb') if path else contextlib.nullcontext() as file:
            return file and file.read()
    except OSError as error:
        raise RelayError(f'{flag} {path}: {error.strerror}') from None


def ca_file(relay: Relay) -> Tuple[str, str]:
    """The flag to blame and the file of the certificates to trust. RelayError where the system has none."""
    if relay.ca:
        return '--relay-ca', relay.ca
    roots = os.environ.get('SSL_CERT_FILE') or next(filter(os.path.exists, SYSTEM_ROOTS), None)
    if not roots:
        raise RelayError(f'--relay-tls: no roots of the system at {", ".join(SYSTEM_ROOTS)} (--relay-ca FILE names some)')
    return '--relay-tls', roots


def relay_files(relay: Relay) -> Dict[str, str]:
    named = {'--relay-ca': relay.ca, '--relay-cert': relay.cert, '--relay-key': relay.key,
             '--relay-token-file': relay.token_file}
    return {flag: path for flag, path in named.items() if path}


def relay_files_signature(relay: Relay) -> Tuple[Any, ...]:
    """Differs when one of the files has changed, or a symbolic link leads elsewhere."""
    signature = []
    for path in relay_files(relay).values():
        try:
            status = os.stat(path)
            signature.append((status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size))
        except OSError as error:
            signature.append(error.errno)
    return tuple(signature)


def exposed_files(relay: Relay) -> Iterable[str]:
    """The secret files that users other than their owner can read."""
    for path in filter(None, (relay.key, relay.token_file)):
        with contextlib.suppress(OSError):
            if os.stat(path).st_mode & 0o044:
                yield path


def tls_context(relay: Relay) -> ssl.SSLContext:
    """What Python's ssl makes of the same files: unlike grpc, it says what is wrong with them. RelayError does so."""
    import ssl
    context, (flag, roots) = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), ca_file(relay)
    context.set_alpn_protocols(['h2'])
    try:
        context.load_verify_locations(roots)
    except (OSError, ValueError):
        raise RelayError(f'{flag} {roots}: holds no certificate in PEM format') from None
    try:
        if relay.cert:
            context.load_cert_chain(relay.cert, relay.key, password=lambda: b'')
    except (OSError, ValueError) as error:
        mismatch = getattr(error, 'reason', None) == 'KEY_VALUES_MISMATCH'
        why = ('the key is not that of the certificate' if mismatch else
               'not a certificate and its key, unencrypted, in PEM format')
        raise RelayError(f'--relay-cert {relay.cert}, --relay-key {relay.key}: {why}') from None
    return context


def relay_credentials(relay: Relay) -> grpc.ChannelCredentials:
    ca, cert, key = (read_relay_file(flag, path) for flag, path in
                     (ca_file(relay), ('--relay-cert', relay.cert), ('--relay-key', relay.key)))
    tls_context(relay)
    return grpc.ssl_channel_credentials(ca, key, cert)


def relay_metadata(relay: Relay) -> Sequence[Tuple[str, str]]:
    token = (read_relay_file('--relay-token-file', relay.token_file) or b'').decode(errors='replace').strip()
    if relay.token_file and not re.fullmatch(r'[\x21-\x7e]+', token):
        raise RelayError(f'--relay-token-file {relay.token_file}: holds no token of printable ASCII in one line')
    return (('authorization', f'Bearer {token}'),) if token else ()


def explain_tls(relay: Relay) -> Optional[str]:
    """Why the handshake fails, in the words of Python's ssl; None where it does not."""
    import ssl
    host, _, port = relay.address.rpartition(':')
    name = relay.server_name or host.strip('[]')
    about = f' (--relay-cert {relay.cert})' if relay.cert else ' (no --relay-cert was given)'
    try:
        with socket.create_connection((host.strip('[]'), int(port)), TLS_PROBE_SECONDS) as plain:
            with tls_context(relay).wrap_socket(plain, server_hostname=name) as tls:
                # In TLS 1.3 the verdict on our certificate comes after the handshake; from grpc's C core, without a word.
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
LAST_ATTEMPT_SECONDS = 5
# In place of a status code, where the files do not even allow an attempt.
NOT_CONNECTED = 'not connected'
LOOPBACK = re.compile(r'(localhost|127\.[\d.]+|\[::1\]):')


class Connection(NamedTuple):
    """A channel to the relay, what goes with each stream, and the state of the files that both were made from."""
    channel: grpc.Channel
    metadata: Sequence[Tuple[str, str]]
    signature: Tuple[Any, ...]


class Refusal(NamedTuple):
    """Why the relay has not acknowledged a batch: gRPC's status code, or the step before there was one."""
    code: str
    details: str


def backoff_seconds(failures: int) -> float:
    """Exponential back-off with full jitter after so many failures in a row."""
    return random.uniform(0, min(BACKOFF_LONGEST_SECONDS, BACKOFF_FIRST_SECONDS * 2 ** min(failures - 1, 16)))


def is_too_large(refusal: Refusal) -> bool:
    """grpc-go says `received message larger than max`, the C core `Received message larger than max`."""
    return refusal.code == 'RESOURCE_EXHAUSTED' and 'message larger than max' in refusal.details


def connect_relay(relay: Relay) -> Connection:
    """No keepalive: the relay ends connections that ping it; the deadline of each stream finds a dead one. RelayError."""
    options: List[Tuple[str, Any]] = [('grpc.use_local_subchannel_pool', 1)]
    if LOOPBACK.match(relay.address):
        options.append(('grpc.enable_http_proxy', 0))
    if relay.server_name:
        options.append(('grpc.ssl_target_name_override', relay.server_name))
    signature, metadata = relay_files_signature(relay), relay_metadata(relay)
    if relay.tls:
        channel = grpc.secure_channel(relay.address, relay_credentials(relay), options)
    else:
        channel = grpc.insecure_channel(relay.address, options)
    return Connection(channel, metadata, signature)


def keep_connection(backlog: Backlog, relay: Relay, connection: Optional[Connection]) -> Connection:
    """The connection, or a new one where there is none or its files have changed. RelayError."""
    if connection and connection.signature == relay_files_signature(relay):
        return connection
    if connection:
        connection.channel.close()
    connection = connect_relay(relay)
    backlog.connections += 1
    return connection


def load_batch(backlog: Backlog, batch: Sequence[Snapshot], sent: List[int]) -> Generator[bytes, None, None]:
    """One by one, as the stream takes them: a relay that is away takes none. The numbers of those taken go to `sent`."""
    for snapshot in batch:
        message = load_snapshot(backlog, snapshot)
        if message is not None:
            sent.append(snapshot.number)
            backlog.sent += 1
            yield message


def send_batch(connection: Connection, backlog: Backlog, batch: Sequence[Snapshot]) -> Optional[Refusal]:
    """One SendMetrics stream. None: the relay has acknowledged the batch, all of it."""
    sent: List[int] = []
    messages = load_batch(backlog, batch, sent)
    call = connection.channel.stream_unary(SEND_METRICS).future(messages, timeout=SEND_TIMEOUT_SECONDS,
                                                                metadata=connection.metadata)
    backlog.call = call
    try:
        if call.result() is None:
            return Refusal('UNKNOWN', 'the stream ended without an answer')
        if messages.gi_frame is not None:
            return Refusal('UNKNOWN', 'the relay has answered before it had read everything')
        backlog.acknowledged += len(sent)
        backlog.last_acknowledged = time.monotonic()
        return None
    except grpc.FutureCancelledError:
        return Refusal('CANCELLED', 'stopped before the relay had answered')
    except grpc.RpcError as error:
        return Refusal(error.code().name, error.details() or '')


def attempt(relay: Relay, backlog: Backlog, batch: Sequence[Snapshot], connection: Optional[Connection],
            ) -> Tuple[Optional[Connection], Optional[Refusal]]:
    """Deliver a batch; the connection to go on with, and why it was not acknowledged."""
    try:
        connection = keep_connection(backlog, relay, connection)
    except RelayError as error:
        return None, Refusal(NOT_CONNECTED, str(error))
    refusal = send_batch(connection, backlog, batch)
    if refusal is None:
        return connection, None
    # A connection that looks alive may be dead: the next attempt makes its own.
    connection.channel.close()
    return None, refusal


def next_batch_limit(limit: int, refusal: Optional[Refusal]) -> int:
    """How many snapshots to send at once: fewer when they were too many for the link or one was too large."""
    if refusal is None:
        return min(MAX_STREAM_SNAPSHOTS, limit * 2)
    if is_too_large(refusal):
        return 1
    return max(1, limit // 2) if refusal.code == 'DEADLINE_EXCEEDED' else limit


def settle(backlog: Backlog, batch: Sequence[Snapshot], refusal: Optional[Refusal]) -> bool:
    """Forget a batch that was acknowledged, or is a single snapshot that this relay will never accept."""
    if refusal is not None:
        if not is_too_large(refusal) or len(batch) > 1:
            return False
        backlog.dropped['too large'] += 1
        log.error('relay: a snapshot of %d bytes is dropped: %s', batch[0].plain_bytes, refusal.details)
    forget_snapshots(backlog, batch)
    return True


def log_refusal(relay: Relay, refusal: Refusal, told: Set[str]) -> None:
    """Each kind of reason once an outage: a relay that is back with a certificate that has expired is another trouble."""
    reason = explain_tls(relay) if relay.tls and refusal.code == 'UNAVAILABLE' else None
    kind = reason or (refusal.details if refusal.code == NOT_CONNECTED else refusal.code)
    if kind not in told:
        log.warning('relay %s: %s', relay.address, reason or f'{refusal.code}: {refusal.details}')
    told.add(kind)


def deliver(backlog: Backlog, relay: Relay) -> None:
    """The sending thread: send the backlog until it closes, with a pause after each failure and one last attempt."""
    connection, failures, limit, told = None, 0, MAX_STREAM_SNAPSHOTS, set()
    while True:
        batch = next_batch(backlog, limit)
        last_attempt = backlog.closing.is_set()
        if not batch and last_attempt:
            break
        if not batch:
            continue
        connection, refusal = attempt(relay, backlog, batch, connection)
        limit = next_batch_limit(limit, refusal)
        if settle(backlog, batch, refusal):
            if failures:
                log.info('relay %s: acknowledges again; dropped so far: %d', relay.address, sum(backlog.dropped.values()))
            failures, told = 0, set()
            continue
        failures += 1
        log_refusal(relay, refusal, told)
        if last_attempt or backlog.given_up:
            break
        backlog.closing.wait(backoff_seconds(failures))
    if connection:
        connection.channel.close()


def keep_delivering(backlog: Backlog, relay: Relay) -> None:
    """A bug must not end the delivery: it is logged, and the delivery starts afresh."""
    while True:
        try:
            return deliver(backlog, relay)
        except Exception:
            log.exception('a bug in the delivery')
        if backlog.closing.wait(BACKOFF_FIRST_SECONDS):
            return None


def start_delivery(backlog: Backlog, relay: Relay) -> threading.Thread:
    sender = threading.Thread(target=keep_delivering, args=(backlog, relay), name='deliver', daemon=True)
    sender.start()
    return sender


def close_backlog(backlog: Backlog, sender: threading.Thread, patience_seconds: float) -> int:
    """Give the sender one last attempt; how many snapshots it could not deliver."""
    with backlog.changed:
        backlog.closing.set()
        backlog.changed.notify()
    sender.join(patience_seconds)
    backlog.given_up = True
    if sender.is_alive() and backlog.call:
        backlog.call.cancel()
        sender.join(1)
    return len(backlog.snapshots)


# --- the agent itself

class Run:
    """What the agent counts from its start on."""

    def __init__(self) -> None:
        self.run_id = os.urandom(8).hex()
        self.started = time.monotonic()
        self.sequence = self.cycles = self.skipped_ticks = 0
        self.failures: Dict[str, int] = collections.Counter()
        self.collection_seconds: Optional[float] = None
        self.open_files: Optional[int] = None
        self.open_files_due = 0.0
        self.call_tallies: Dict[str, CallTally] = {}


def build_cri_method_metrics(method: str, tally: CallTally) -> wire.CriMethodMetrics:
    return wire.CriMethodMetrics(method=method, calls_total=tally.calls, failures_total=tally.failures,
                                 seconds_total=tally.seconds, last_seconds=tally.last_seconds)


def build_backlog_metrics(backlog: Backlog, now: float) -> wire.BacklogMetrics:
    return wire.BacklogMetrics(
        snapshots=len(backlog.snapshots), memory_bytes=backlog.memory_bytes, spool_bytes=backlog.spool_bytes,
        sent_total=backlog.sent, acknowledged_total=backlog.acknowledged, dropped_total=dict(backlog.dropped),
        reconnects_total=max(0, backlog.connections - 1),
        seconds_since_acknowledgement=None if backlog.last_acknowledged is None else now - backlog.last_acknowledged)


def count_open_files(run: Run, now: float) -> Optional[int]:
    """The size of /proc/self/fd, since Linux 6.2. Before, they have to be listed, which takes 1 µs each: once a minute."""
    with contextlib.suppress(OSError):
        size = os.stat('/proc/self/fd').st_size
        if size:
            return size
    if now >= run.open_files_due:
        run.open_files, run.open_files_due = len(read_names('/proc', 'self/fd')) or None, now + READ_AGAIN_SECONDS
    return run.open_files


def collect_agent(run: Run, backlog: Optional[Backlog], timestamp_ns: int) -> wire.AgentMetrics:
    """The agent's own processes and counters; always from its own /proc."""
    now, statm = time.monotonic(), read_bytes('/proc', 'self/statm')
    return wire.AgentMetrics(
        run_id=run.run_id, sequence=run.sequence, timestamp_ns=timestamp_ns, version=__version__,
        uptime_seconds=now - run.started, cpu_seconds_total=time.process_time(),
        resident_bytes=parse_statm(statm) * PAGE_SIZE_BYTES if statm else None,
        threads=len(read_names('/proc', 'self/task')) or None, open_files=count_open_files(run, now),
        cycles_total=run.cycles, skipped_ticks_total=run.skipped_ticks, collection_seconds=run.collection_seconds,
        failures_total=dict(run.failures),
        cri_methods=[build_cri_method_metrics(*item) for item in sorted(run.call_tallies.items())],
        backlog=build_backlog_metrics(backlog, now) if backlog else None)


# --- snapshot

# How much of a cycle the runtime may take, and never more than so long.
CRI_SHARE_OF_CYCLE = 0.8
CRI_LONGEST_SECONDS = 4


class Memory(NamedTuple):
    """What the next cycle needs from this one."""
    node: Dict[str, Any] = {}
    pods: PodsMemory = PodsMemory()
    # Of the last cycle, for those who show rates.
    metrics: Optional[wire.Metrics] = None


def serialize_metrics(timestamp: int, node: wire.NodeMetrics, runtime: Optional[wire.RuntimeMetrics], pods: List[bytes],
                      agent: wire.AgentMetrics) -> bytes:
    """The runtime's state is a part of the node's."""
    if runtime:
        node.container_runtime.CopyFrom(runtime)
    return wire.SerializedMetrics(
        timestamp=timestamp, node_metrics=node.SerializeToString(), pod_metrics=pods,
        agent_metrics=agent.SerializeToString()).SerializeToString()


def collect_snapshot(roots: Roots, options: argparse.Namespace, before: Memory, runtime_thread: concurrent.futures.Executor,
                     run: Run, backlog: Optional[Backlog] = None) -> Part:
    """One Metrics message, serialised: the runtime answers while the node is read."""
    timestamp_ns, began = time.time_ns(), time.monotonic()
    patience = min(CRI_LONGEST_SECONDS, options.main_loop_duration * CRI_SHARE_OF_CYCLE)
    deadline = began + patience
    lists = runtime_thread.submit(fetch_lists, roots, options, before.pods, deadline, run.call_tallies)
    node = collect_node(roots, before.node, options.top_n)
    pods = collect_pods(roots, options, *lists.result(), deadline, run.call_tallies)
    run.sequence += 1
    agent = collect_agent(run, backlog, timestamp_ns)
    failures = {**node.failures, **pods.failures}
    run.failures.update(failures.keys())
    run.cycles, run.collection_seconds = run.cycles + 1, time.monotonic() - began
    pod_metrics, runtime_metrics = pods.message
    data = serialize_metrics(timestamp_ns // 10**9, node.message, runtime_metrics, pod_metrics, agent)
    return Part(data, Memory(node.after, pods.after), failures)


def log_changes(before: Dict[str, str], now: Dict[str, str]) -> None:
    """A trouble is logged when it begins and when it ends."""
    for subject in sorted(now.keys() - before.keys()):
        log.warning('%s: %s', subject, now[subject])
    for subject in sorted(before.keys() - now.keys()):
        log.info('%s: well again', subject)


# --- output

def render_json(metrics: wire.Metrics) -> str:
    """One line: the proto3 mapping with the proto's field names. What is absent on the wire is absent here."""
    from google.protobuf import json_format
    document = json_format.MessageToDict(metrics, preserving_proto_field_name=True,
                                         always_print_fields_with_no_presence=True)
    return json.dumps(document)


def printable(text: str) -> str:
    """Names are the processes' and the pods' own choice: nothing in them may reach the terminal as a control code."""
    return ''.join(char if char.isprintable() else '?' for char in text)


def human_bytes(number: float) -> str:
    for unit in ('B', 'KiB', 'MiB', 'GiB'):
        if number < 1024:
            return f'{number:.0f} {unit}' if unit == 'B' else f'{number:.1f} {unit}'
        number /= 1024
    return f'{number:.1f} TiB'


def human_seconds(seconds: int) -> str:
    minutes = seconds // 60
    if minutes < 60:
        return f'{minutes} min'
    return f'{minutes // 60} h {minutes % 60} min' if minutes < 48 * 60 else f'{minutes // 1440} d {minutes // 60 % 24} h'


def plural(number: int, noun: str) -> str:
    ending = '' if number == 1 else 'es' if noun.endswith('s') else 's'
    return f'{number} {noun}{ending}'


# --- live view

# ANSI control sequences (ECMA-48), and the alternate screen of xterm.
# On it no cursor, and no line that goes on below when it is too long.
ENTER_SCREEN, LEAVE_SCREEN = '\x1b[?1049h\x1b[?25l\x1b[?7l', '\x1b[?7h\x1b[?25h\x1b[?1049l'
COLOR = re.compile(r'(\x1b\[\d*m)')
HOME, CLEAR_LINE, CLEAR_BELOW = '\x1b[H', '\x1b[K', '\x1b[J'
RED, YELLOW, GREEN, BOLD, DIM, PLAIN = '\x1b[31m', '\x1b[33m', '\x1b[32m', '\x1b[1m', '\x1b[2m', '\x1b[m'
BAR_WIDTH = 14
# A share of a limit from which it is yellow, and red.
WARM, HOT = 70, 90
NEAR_FULL_PERCENT = 80
# From these widths on, the table has rates, and images.
WIDE, WIDEST = 110, 160
STATE_WIDTH = 9
NARROWEST = 5
NAME_COLUMNS = ('NAMESPACE', 'POD', 'CONTAINER')
SORTED_BY = {'c': 'cpu', 'm': 'memory', 'r': 'restarts'}
LIVE_INTERVAL_SECONDS = 2


class View(NamedTuple):
    """How the live view is to look."""
    width: int
    height: Optional[int] = None
    sort: str = 'c'
    namespace: str = ''
    color: bool = False


class TableRow(NamedTuple):
    """A container in the table: what is shown of it, None where it is not known."""
    namespace: str
    pod: str
    container: str
    state: str
    cores: Optional[float]
    cpu_percent: Optional[float]
    throttled_percent: Optional[float]
    memory: Optional[float]
    memory_percent: Optional[float]
    restarts: int
    received: Optional[float]
    sent: Optional[float]
    read: Optional[float]
    written: Optional[float]
    image: str


def paint(text: str, color: str, view: View) -> str:
    return f'{color}{text}{PLAIN}' if view.color and color else text


def heat(percent: Optional[float]) -> str:
    if percent is None:
        return ''
    return RED if percent >= HOT else YELLOW if percent >= WARM else ''


def bar(percent: float, view: View) -> str:
    width = BAR_WIDTH if view.width < WIDE else 3 * BAR_WIDTH
    filled = min(width, max(0, round(percent / 100 * width)))
    return '[' + paint('|' * filled, heat(percent) or GREEN, view) + ' ' * (width - filled) + ']'


def per_second(before: Optional[float], after: Optional[float], seconds: float) -> Optional[float]:
    """The rate of a counter; None without two samples, or where it began anew."""
    if before is None or after is None or seconds <= 0 or after < before:
        return None
    return (after - before) / seconds


def human_rate(rate: Optional[float]) -> str:
    return '-' if rate is None else human_short(rate)


def human_short(number: float) -> str:
    """In five characters at most: 980, 1.2K, 34M, 1.1G."""
    for unit in ('', 'K', 'M', 'G', 'T'):
        if number < 999.5:
            return f'{number:.1f}{unit}' if unit and number < 9.95 else f'{number:.0f}{unit}'
        number /= 1024
    return f'{number:.0f}P'


def human_cores(cores: Optional[float]) -> str:
    return '-' if cores is None else f'{cores:.2f}' if cores < 99 else f'{cores:.0f}'


def human_percent(percent: Optional[float]) -> str:
    return '' if percent is None else f'{min(percent, 999):.0f}%'


def elapsed_seconds(before: Optional[wire.Metrics], after: wire.Metrics) -> float:
    """Between two snapshots of one run, by the monotonic clock."""
    return after.agent_metrics.uptime_seconds - before.agent_metrics.uptime_seconds if before else 0


def cpu_modes(before: Optional[wire.Metrics], after: wire.Metrics) -> str:
    """Percent of the time between two snapshots by mode, as top(1) calls them."""
    if before is None or not before.node_metrics.HasField('cpu_seconds'):
        return ''
    old, new = before.node_metrics.cpu_seconds, after.node_metrics.cpu_seconds
    spent = {mode: max(0.0, getattr(new, mode) - getattr(old, mode)) for mode in CPU_MODES}
    total = sum(spent.values()) or 1
    return ' '.join(f'{label} {100 * spent[mode] / total:.0f}' for label, mode in (
        ('us', 'user'), ('sy', 'system'), ('ni', 'nice'), ('io', 'iowait'), ('si', 'softirq'), ('st', 'steal')))


def io_bytes(container: wire.ContainerMetrics, field: str) -> Optional[int]:
    return sum(getattr(io, field) for io in container.cgroup.io) if container.HasField('cgroup') else None


def network_bytes(pod: Optional[wire.PodMetrics], field: str) -> Optional[int]:
    if not pod or not pod.network_interfaces:
        return None
    return sum(getattr(interface.counters, field) for interface in pod.network_interfaces)


def throttled_percent(before: Optional[wire.ContainerMetrics], after: wire.ContainerMetrics) -> Optional[float]:
    """Percent of the periods between two snapshots in which the container used up its quota."""
    if before is None or not after.cgroup.cpu.HasField('quota_usec'):
        return None
    periods = after.cgroup.cpu.nr_periods - before.cgroup.cpu.nr_periods
    return 100 * (after.cgroup.cpu.nr_throttled - before.cgroup.cpu.nr_throttled) / periods if periods > 0 else None


def table_row(pod: wire.PodMetrics, container: wire.ContainerMetrics, old_pod: Optional[wire.PodMetrics],
              old: Optional[wire.ContainerMetrics], seconds: float) -> TableRow:
    cpu, memory = container.cgroup.cpu, container.memory_metrics
    cores = container.cpu_metrics.usage_nano_cores.value / 1e9 if container.cpu_metrics.HasField('usage_nano_cores') else None
    limit = cpu.quota_usec / cpu.period_usec if cpu.quota_usec and cpu.period_usec else None
    used = memory.working_set_bytes.value if memory.HasField('working_set_bytes') else None
    most = container.cgroup.memory.max_bytes
    return TableRow(
        pod.namespace, pod.name, container.name, shown_state(container), cores,
        100 * cores / limit if cores is not None and limit else None, throttled_percent(old, container),
        used, 100 * used / most if used is not None and most else None, container.restart_count,
        *(per_second(network_bytes(old_pod, field), network_bytes(pod, field), seconds) for field in ('rx_bytes', 'tx_bytes')),
        *(per_second(old and io_bytes(old, field), io_bytes(container, field), seconds) for field in ('rbytes', 'wbytes')),
        container.image)


def shown_state(container: wire.ContainerMetrics) -> str:
    state = container.state.replace('CONTAINER_', '').lower()
    if state == 'exited' and container.HasField('status'):
        return container.status.reason if container.status.reason == 'OOMKilled' else f'exit {container.status.exit_code}'
    return state


def table_rows(before: Optional[wire.Metrics], after: wire.Metrics, view: View) -> List[TableRow]:
    """The containers of the chosen namespaces, sorted as the view says."""
    old_pods = {pod.id: pod for pod in before.pod_metrics} if before else {}
    old = {container.id: container for pod in old_pods.values() for container in pod.container_metrics}
    seconds = elapsed_seconds(before, after)
    rows = [table_row(pod, container, old_pods.get(pod.id), old.get(container.id), seconds)
            for pod in after.pod_metrics if view.namespace in ('', pod.namespace)
            for container in present_containers(pod)]
    keys = {'c': lambda row: row.cores or 0, 'm': lambda row: row.memory or 0, 'r': lambda row: row.restarts}
    return sorted(rows, key=lambda row: (-keys[view.sort](row), row.namespace, row.pod, row.container))


def fit(text: str, width: int) -> str:
    """Exactly so wide; what is cut off is marked."""
    text = printable(text)
    return text.ljust(width) if len(text) <= width else text[:width - 1] + '~'


def clip(line: str, width: int) -> str:
    """At most so wide; colours take no room, and what begins is ended."""
    pieces, left = [], width
    for piece in COLOR.split(line):
        visible = piece if COLOR.match(piece) else piece[:left]
        left -= 0 if COLOR.match(piece) else len(visible)
        pieces.append(visible)
    return ''.join(pieces).rstrip()


def column_widths(rows: Sequence[TableRow], view: View, fixed: int) -> List[int]:
    """Of namespace, pod and container: as wide as their widest name; where there is no room, a pod's name keeps the most."""
    widths = [max(len(head), *(len(row[number]) for row in rows)) for number, head in enumerate(NAME_COLUMNS)]
    shares, excess = (1, 2, 1), sum(widths) + len(widths) + fixed - view.width
    for _ in range(excess):
        widest = max(range(len(widths)), key=lambda number: widths[number] / shares[number])
        widths[widest] = max(NARROWEST, widths[widest] - 1)
    return widths


def images_of(images: List[str], view: View) -> List[str]:
    """The last column, where there is room for it."""
    return list(map(printable, images)) if view.width >= WIDEST else []


def pod_lines(rows: Sequence[TableRow], view: View) -> List[str]:
    """The table: the wider the terminal, the more columns, and the longer the names."""
    wide = view.width >= WIDE
    numbers = f'{"CPU":>5} {"%LIM":>4} {"THR":>4} {"MEM":>5} {"%LIM":>4}' + (
        f' {"RX/s":>6}{"TX/s":>6}{"READ/s":>7}{"WRITE/s":>8}' if wide else '') + f' {"RST":>3} {"STATE":<{STATE_WIDTH}}'
    widths = column_widths(rows, view, len(numbers))
    head = ' '.join((*(fit(*cell) for cell in zip(NAME_COLUMNS, widths)), numbers, *images_of(['IMAGE'], view)))
    lines = [paint(head, BOLD, view)]
    for row in rows:
        received, sent, read, written = map(human_rate, (row.received, row.sent, row.read, row.written))
        lines.append(' '.join((
            *(fit(*cell) for cell in zip(row, widths)), f'{human_cores(row.cores):>5}',
            paint(f'{human_percent(row.cpu_percent):>4}', heat(row.cpu_percent), view),
            paint(f'{human_percent(row.throttled_percent):>4}', heat(row.throttled_percent), view),
            f'{human_rate(row.memory):>5}', paint(f'{human_percent(row.memory_percent):>4}', heat(row.memory_percent), view),
            *((f'{received:>6}{sent:>6}{read:>7}{written:>8}',) if wide else ()), f'{row.restarts:>3}',
            paint(fit(row.state, STATE_WIDTH), '' if row.state == 'running' else YELLOW, view),
            *images_of([row.image], view))))
    return lines


def title_line(node: wire.NodeMetrics, view: View) -> str:
    uptime = f'up {human_seconds(node.uptime)}' if node.HasField('uptime') else ''
    kernel = f'Linux {node.kernel_version}' if node.kernel_version else ''
    words = (node.hostname or 'node', f'{node.platform} {node.platform_version}'.strip(), kernel, node.primary_ipv4.value, uptime)
    return paint(printable('  '.join(filter(None, words))), BOLD, view)


def cpu_line(before: Optional[wire.Metrics], after: wire.Metrics, view: View) -> str:
    node = after.node_metrics
    if not node.HasField('total_cpu_percentage'):
        return 'cpu  not known'
    percent = node.total_cpu_percentage
    return f'cpu  {bar(percent, view)} {percent:5.1f}% of {plural(len(node.cpu_infos), "CPU")}  {cpu_modes(before, after)}'


def memory_line(node: wire.NodeMetrics, view: View) -> str:
    detail, text = node.memory_detail, 'mem  not known'
    if node.HasField('memory_used_perc'):
        text = f'mem  {bar(node.memory_used_perc, view)} {node.memory_used_perc:5.1f}% of {human_bytes(node.total_memory)}'
    if not detail.swap_total_bytes:
        return text + '  no swap' if detail.HasField('swap_total_bytes') else text
    percent = 100 * (detail.swap_total_bytes - detail.swap_free_bytes) / detail.swap_total_bytes
    return f'{text}  swap {bar(percent, view)} {percent:.0f}% of {human_bytes(detail.swap_total_bytes)}'


def load_line(node: wire.NodeMetrics) -> str:
    load = node.load_average
    averages = f'{load.load1:.2f} {load.load5:.2f} {load.load15:.2f}' if node.HasField('load_average') else 'not known'
    processes = f'  {plural(node.procs, "process")}' if node.HasField('procs') else ''
    stalls = '  '.join(f'{name} {psi.some.avg10.value:.1f}%' for name, psi in (
        ('cpu', node.psi_cpu_metrics), ('mem', node.psi_memory_metrics), ('io', node.psi_io_metrics)) if psi.HasField('some'))
    return f'load {averages}{processes}  pressure {stalls or "not known"}'


def rates_line(before: Optional[wire.Metrics], after: wire.Metrics) -> str:
    """What goes through the node's network and disks."""
    seconds, old = elapsed_seconds(before, after), before.node_metrics if before else None
    received, sent, read, written = (
        human_rate(per_second(value_at(old, path) if old else None, value_at(after.node_metrics, path), seconds))
        for path in ('net_usage.total_bytes_received', 'net_usage.total_bytes_sent', 'disk_io_summary.total_read_bytes',
                     'disk_io_summary.total_write_bytes'))
    return f'i/o  network in {received}/s out {sent}/s   disks read {read}/s write {written}/s'


def disk_line(node: wire.NodeMetrics, view: View) -> str:
    """What does not answer or is nearly full stands out, and comes first."""
    disks = sorted(node.disk_usages, key=lambda disk: (not disk.stuck, -disk.used_percent))
    shown = [paint(f'{printable(disk.mountpoint)} STUCK', RED, view) if disk.stuck else paint(
        f'{printable(disk.mountpoint)} {disk.used_percent:.0f}%',
        '' if disk.used_percent < NEAR_FULL_PERCENT else RED if disk.used_percent >= HOT else YELLOW, view) for disk in disks]
    return 'disk ' + ('  '.join(shown) or 'not known')


def agent_line(before: Optional[wire.Metrics], after: wire.Metrics, view: View) -> str:
    """The runtime, what the agent itself costs, and what it could not read a cycle ago."""
    runtime, agent = after.node_metrics.container_runtime, after.agent_metrics
    unready = sorted(kind for kind, met in runtime.conditions.items() if not met)
    state = ' ready' if runtime.conditions else ''
    if unready:
        state = paint(f' NOT READY ({printable(", ".join(unready))})', RED, view)
    name = printable(f'{runtime.name} {runtime.version}') if runtime.name else paint('no container runtime found', YELLOW, view)
    seconds = elapsed_seconds(before, after)
    spent = per_second(before.agent_metrics.cpu_seconds_total, agent.cpu_seconds_total, seconds) if before else None
    cost = '' if spent is None else f' {100 * spent:.1f}% cpu'
    counted = before.agent_metrics.failures_total if before else {}
    failed = sorted(subject for subject, count in agent.failures_total.items() if count > counted.get(subject, 0))
    trouble = paint(f'  in trouble: {printable(", ".join(failed))}', YELLOW, view) if failed else ''
    return f'cri  {name}{state}   agent{cost} {human_bytes(agent.resident_bytes)}{trouble}'


def status_text(rows: Sequence[TableRow], view: View) -> str:
    """What the table shows, and on a terminal how to change that."""
    running = sum(row.state == 'running' for row in rows)
    pods = plural(len({(row.namespace, row.pod) for row in rows}), 'pod')
    namespace = f' in {printable(view.namespace)}' if view.namespace else ''
    text = f'{pods}{namespace}, {running}/{plural(len(rows), "container")} running, by {SORTED_BY[view.sort]}'
    return text + ('   c m r sort, n namespace, q quit' if view.height else '')


def render_view(before: Optional[wire.Metrics], after: wire.Metrics, view: View) -> str:
    """Node, then containers; no wider than the view, no higher, and no control codes in it but colours."""
    rows, node = table_rows(before, after, view), after.node_metrics
    lines = [title_line(node, view), cpu_line(before, after, view), memory_line(node, view), load_line(node),
             rates_line(before, after), disk_line(node, view), agent_line(before, after, view), '', status_text(rows, view)]
    lines += pod_lines(rows, view) if rows else []
    if view.height and len(lines) > view.height:
        hidden = len(lines) - view.height + 1
        lines[view.height - 1:] = [paint(f'... {hidden} more', DIM, view)]
    return '\n'.join(clip(line, view.width) for line in lines)


def render_frame(text: str) -> str:
    """A screen full: each line clears what was behind it, so that nothing flickers."""
    return HOME + text.replace('\n', CLEAR_LINE + '\r\n') + CLEAR_LINE + CLEAR_BELOW


def next_namespace(present: Iterable[str], current: str) -> str:
    """Key n: all, then one after the other."""
    choices = ['', *sorted(set(present))]
    return choices[(choices.index(current) + 1) % len(choices)] if current in choices else ''


def press_key(view: View, key: str, metrics: Optional[wire.Metrics]) -> View:
    if key in ('c', 'm', 'r'):
        return view._replace(sort=key)
    if key == 'n' and metrics:
        return view._replace(namespace=next_namespace((pod.namespace for pod in metrics.pod_metrics), view.namespace))
    return view


@contextlib.contextmanager
def live_screen() -> Iterator[None]:
    """The terminal without echo and line by line, on its alternate screen; afterwards as it was, come what may."""
    import termios
    import tty
    keyboard = sys.stdin.fileno() if sys.stdin and sys.stdin.isatty() else None
    before = termios.tcgetattr(keyboard) if keyboard is not None else None
    # A stopped agent would leave its screen behind.
    suspend = signal.signal(signal.SIGTSTP, signal.SIG_IGN)
    try:
        if keyboard is not None:
            tty.setcbreak(keyboard)
        sys.stdout.write(ENTER_SCREEN)
        yield
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.write(PLAIN + LEAVE_SCREEN)
            sys.stdout.flush()
        if keyboard is not None:
            termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
        signal.signal(signal.SIGTSTP, suspend)


# --- Prometheus

# Names are those of node_exporter and cAdvisor where they have one for exactly this value, so that their dashboards and
# alerts work; else kubensage_. A row: name, help, the field that has the value, and what to multiply it with to get the
# base unit. A name in _total is a counter, another one a gauge, but for what node_exporter leaves untyped.
UNTYPED = re.compile(r'node_(vmstat|netstat)_')

NODE_SAMPLES = (
    ('node_boot_time_seconds', 'Node boot time, in unixtime.', 'boot_time', 1),
    ('node_load1', '1m load average.', 'load_average.load1', 1),
    ('node_load5', '5m load average.', 'load_average.load5', 1),
    ('node_load15', '15m load average.', 'load_average.load15', 1),
    ('node_procs_running', 'Number of processes in runnable state.', 'kernel_activity.procs_running', 1),
    ('node_procs_blocked', 'Number of processes blocked waiting for I/O to complete.', 'kernel_activity.procs_blocked', 1),
    ('node_forks_total', 'Total number of forks.', 'kernel_activity.forks_total', 1),
    ('node_context_switches_total', 'Total number of context switches.', 'kernel_activity.context_switches_total', 1),
    ('node_intr_total', 'Total number of interrupts serviced.', 'kernel_activity.interrupts_total', 1),
    ('node_memory_MemTotal_bytes', 'Memory information field MemTotal.', 'total_memory', 1),
    ('node_memory_MemAvailable_bytes', 'Memory information field MemAvailable.', 'available_memory', 1),
    ('node_memory_MemFree_bytes', 'Memory information field MemFree.', 'memory_detail.free_bytes', 1),
    ('node_memory_Buffers_bytes', 'Memory information field Buffers.', 'memory_detail.buffers_bytes', 1),
    ('node_memory_Cached_bytes', 'Memory information field Cached.', 'memory_detail.cached_bytes', 1),
    ('node_memory_SReclaimable_bytes', 'Memory information field SReclaimable.', 'memory_detail.slab_reclaimable_bytes', 1),
    ('node_memory_SUnreclaim_bytes', 'Memory information field SUnreclaim.', 'memory_detail.slab_unreclaimable_bytes', 1),
    ('node_memory_Dirty_bytes', 'Memory information field Dirty.', 'memory_detail.dirty_bytes', 1),
    ('node_memory_Writeback_bytes', 'Memory information field Writeback.', 'memory_detail.writeback_bytes', 1),
    ('node_memory_Shmem_bytes', 'Memory information field Shmem.', 'memory_detail.shmem_bytes', 1),
    ('node_memory_AnonPages_bytes', 'Memory information field AnonPages.', 'memory_detail.anon_pages_bytes', 1),
    ('node_memory_Mapped_bytes', 'Memory information field Mapped.', 'memory_detail.mapped_bytes', 1),
    ('node_memory_SwapTotal_bytes', 'Memory information field SwapTotal.', 'memory_detail.swap_total_bytes', 1),
    ('node_memory_SwapFree_bytes', 'Memory information field SwapFree.', 'memory_detail.swap_free_bytes', 1),
    ('node_memory_HugePages_Total', 'Memory information field HugePages_Total.', 'memory_detail.huge_pages_total', 1),
    ('node_memory_HugePages_Free', 'Memory information field HugePages_Free.', 'memory_detail.huge_pages_free', 1),
    ('node_memory_Hugepagesize_bytes', 'Memory information field Hugepagesize.', 'memory_detail.huge_page_size_bytes', 1),
    ('node_vmstat_oom_kill', '/proc/vmstat information field oom_kill.', 'vmstat.oom_kill', 1),
    ('node_vmstat_pgfault', '/proc/vmstat information field pgfault.', 'vmstat.pgfault', 1),
    ('node_vmstat_pgmajfault', '/proc/vmstat information field pgmajfault.', 'vmstat.pgmajfault', 1),
    ('node_vmstat_pswpin', '/proc/vmstat information field pswpin.', 'vmstat.pswpin', 1),
    ('node_vmstat_pswpout', '/proc/vmstat information field pswpout.', 'vmstat.pswpout', 1),
    ('node_pressure_cpu_waiting_seconds_total', 'Time that processes have waited for CPU time.',
     'psi_cpu_metrics.some.total.value', 1e-6),
    ('node_pressure_memory_waiting_seconds_total', 'Time that processes have waited for memory.',
     'psi_memory_metrics.some.total.value', 1e-6),
    ('node_pressure_memory_stalled_seconds_total', 'Time that no process could make progress for want of memory.',
     'psi_memory_metrics.full.total.value', 1e-6),
    ('node_pressure_io_waiting_seconds_total', 'Time that processes have waited for I/O.',
     'psi_io_metrics.some.total.value', 1e-6),
    ('node_pressure_io_stalled_seconds_total', 'Time that no process could make progress for I/O.',
     'psi_io_metrics.full.total.value', 1e-6),
    ('node_pressure_irq_stalled_seconds_total', 'Time that no process could make progress for interrupts.',
     'psi_irq_metrics.full.total.value', 1e-6),
    ('node_filefd_allocated', 'File descriptor statistics: allocated.', 'kernel_limits.file_descriptors_allocated', 1),
    ('node_filefd_maximum', 'File descriptor statistics: maximum.', 'kernel_limits.file_descriptors_max', 1),
    ('node_nf_conntrack_entries', 'Number of currently allocated flow entries for connection tracking.',
     'kernel_limits.conntrack_entries', 1),
    ('node_nf_conntrack_entries_limit', 'Maximum size of connection tracking table.', 'kernel_limits.conntrack_max', 1),
    ('node_processes_pids', 'Number of processes.', 'procs', 1),
    ('node_processes_threads', 'Allocated threads in system.', 'kernel_limits.threads', 1),
    ('node_processes_max_threads', 'Limit of threads in the system.', 'kernel_limits.threads_max', 1),
    ('node_processes_max_processes', 'Number of max PIDs limit.', 'kernel_limits.pid_max', 1),
    ('node_netstat_TcpExt_ListenOverflows', 'Statistic TcpExtListenOverflows.',
     'network_protocols.tcp_listen_overflows_total', 1),
    ('node_netstat_TcpExt_ListenDrops', 'Statistic TcpExtListenDrops.', 'network_protocols.tcp_listen_drops_total', 1),
    ('node_netstat_TcpExt_TCPSynRetrans', 'Statistic TcpExtTCPSynRetrans.', 'network_protocols.tcp_syn_retrans_total', 1),
    ('node_netstat_Tcp_RetransSegs', 'Statistic TcpRetransSegs.', 'network_protocols.tcp_retrans_segs_total', 1),
    ('node_netstat_Tcp_InSegs', 'Statistic TcpInSegs.', 'network_protocols.tcp_in_segs_total', 1),
    ('node_netstat_Tcp_OutSegs', 'Statistic TcpOutSegs.', 'network_protocols.tcp_out_segs_total', 1),
    ('node_netstat_Tcp_InErrs', 'Statistic TcpInErrs.', 'network_protocols.tcp_in_errs_total', 1),
    ('node_netstat_Udp_RcvbufErrors', 'Statistic UdpRcvbufErrors.', 'network_protocols.udp_rcvbuf_errors_total', 1),
    ('node_netstat_Udp_SndbufErrors', 'Statistic UdpSndbufErrors.', 'network_protocols.udp_sndbuf_errors_total', 1),
    ('node_netstat_Udp_InErrors', 'Statistic UdpInErrors.', 'network_protocols.udp_in_errors_total', 1),
    ('node_sockstat_sockets_used', 'Number of IPv4 sockets in use.', 'network_protocols.sockets_used', 1),
    ('node_sockstat_TCP_inuse', 'Number of TCP sockets in state inuse.', 'network_protocols.tcp_inuse', 1),
    ('node_sockstat_TCP_orphan', 'Number of TCP sockets in state orphan.', 'network_protocols.tcp_orphan', 1),
    ('node_sockstat_TCP_tw', 'Number of TCP sockets in state tw.', 'network_protocols.tcp_tw', 1),
    ('node_sockstat_TCP_alloc', 'Number of TCP sockets in state alloc.', 'network_protocols.tcp_alloc', 1),
    ('node_sockstat_TCP_mem_bytes', 'Number of TCP sockets in state mem_bytes.', 'network_protocols.tcp_mem_bytes', 1),
    ('node_sockstat_UDP_inuse', 'Number of UDP sockets in state inuse.', 'network_protocols.udp_inuse', 1),
    ('kubensage_node_softnet_processed_total', 'Packets processed by all CPUs.', 'network_protocols.softnet_processed_total', 1),
    ('kubensage_node_softnet_dropped_total', 'Packets dropped because the backlog of a CPU was full.',
     'network_protocols.softnet_dropped_total', 1),
    ('kubensage_node_softnet_squeezed_total', 'Times that the budget of a softirq ran out with work left.',
     'network_protocols.softnet_squeezed_total', 1),
    ('node_timex_sync_status', 'Is clock synchronized to a reliable server (1 = yes, 0 = no).', 'clock.synchronized', 1),
    ('node_timex_offset_seconds', 'Time offset in between local system and reference clock.', 'clock.offset_seconds', 1),
    ('node_timex_maxerror_seconds', 'Maximum error in seconds.', 'clock.max_error_seconds', 1),
)
CPU_MODES = ('user', 'nice', 'system', 'idle', 'iowait', 'irq', 'softirq', 'steal')
DISK_SAMPLES = (
    ('node_disk_reads_completed_total', 'The total number of reads completed successfully.', 'reads_total', 1),
    ('node_disk_reads_merged_total', 'The total number of reads merged.', 'reads_merged_total', 1),
    ('node_disk_read_bytes_total', 'The total number of bytes read successfully.', 'read_bytes_total', 1),
    ('node_disk_read_time_seconds_total', 'The total number of seconds spent by all reads.', 'read_seconds_total', 1),
    ('node_disk_writes_completed_total', 'The total number of writes completed successfully.', 'writes_total', 1),
    ('node_disk_writes_merged_total', 'The number of writes merged.', 'writes_merged_total', 1),
    ('node_disk_written_bytes_total', 'The total number of bytes written successfully.', 'written_bytes_total', 1),
    ('node_disk_write_time_seconds_total', 'The total number of seconds spent by all writes.', 'write_seconds_total', 1),
    ('node_disk_io_now', 'The number of I/Os currently in progress.', 'in_progress', 1),
    ('node_disk_io_time_seconds_total', 'Total seconds spent doing I/Os.', 'io_seconds_total', 1),
    ('node_disk_io_time_weighted_seconds_total', 'The weighted # of seconds spent doing I/Os.', 'weighted_io_seconds_total', 1),
    ('node_disk_discards_completed_total', 'The total number of discards completed successfully.', 'discards_total', 1),
    ('node_disk_discards_merged_total', 'The total number of discards merged.', 'discards_merged_total', 1),
    ('node_disk_discarded_sectors_total', 'The total number of sectors discarded successfully.', 'discarded_bytes_total',
     1 / SECTOR_BYTES),
    ('node_disk_discard_time_seconds_total', 'The total number of seconds spent by all discards.', 'discard_seconds_total', 1),
    ('node_disk_flush_requests_total', 'The total number of flush requests completed successfully.', 'flushes_total', 1),
    ('node_disk_flush_requests_time_seconds_total', 'The total number of seconds spent by all flush requests.',
     'flush_seconds_total', 1),
)
FILE_SYSTEM_SAMPLES = (
    ('node_filesystem_size_bytes', 'Filesystem size in bytes.', 'total', 1),
    ('node_filesystem_avail_bytes', 'Filesystem space available to non-root users in bytes.', 'free', 1),
    ('node_filesystem_files', 'Filesystem total file nodes.', 'inodes', 1),
    # glibc fills f_favail with f_ffree.
    ('node_filesystem_files_free', 'Filesystem total free file nodes.', 'inodes_free', 1),
    ('node_filesystem_readonly', 'Filesystem read-only status.', 'read_only', 1),
    ('node_filesystem_device_error', 'Whether statvfs(2) has not come back for the given device.', 'stuck', 1),
)
INTERFACE_SAMPLES = (
    ('node_network_carrier', 'Whether the interface has a carrier.', 'carrier', 1),
    ('node_network_mtu_bytes', 'The MTU of the interface.', 'mtu', 1),
    ('node_network_speed_bytes', 'The speed of the interface.', 'speed_mbits', 125_000),
) + tuple((f'node_network_{way}_{column}_total', f'Network device statistic {way}_{column}.', f'counters.{prefix}_{column}', 1)
          for way, prefix, columns in (
              ('receive', 'rx', 'bytes packets errs drop fifo frame compressed multicast'),
              ('transmit', 'tx', 'bytes packets errs drop fifo colls carrier compressed'))
          for column in columns.split())
# cAdvisor's words for the interfaces of a pod.
POD_INTERFACE_SAMPLES = tuple(
    (f'container_network_{way}_{name}_total', f'Network device statistic {way}_{name} of a pod.',
     f'counters.{prefix}_{column}', 1)
    for way, prefix in (('receive', 'rx'), ('transmit', 'tx'))
    for name, column in (('bytes', 'bytes'), ('packets', 'packets'), ('errors', 'errs'), ('packets_dropped', 'drop')))
CGROUP_CPU_SAMPLES = (
    ('cpu_usage_seconds_total', 'Cumulative cpu time consumed.', 'cpu.usage_usec', 1e-6),
    ('cpu_user_seconds_total', 'Cumulative user cpu time consumed.', 'cpu.user_usec', 1e-6),
    ('cpu_system_seconds_total', 'Cumulative system cpu time consumed.', 'cpu.system_usec', 1e-6),
    ('cpu_cfs_periods_total', 'Number of elapsed enforcement period intervals.', 'cpu.nr_periods', 1),
    ('cpu_cfs_throttled_periods_total', 'Number of throttled period intervals.', 'cpu.nr_throttled', 1),
    ('cpu_cfs_throttled_seconds_total', 'Total time duration it has been throttled.', 'cpu.throttled_usec', 1e-6),
    ('spec_cpu_quota', 'CPU quota.', 'cpu.quota_usec', 1),
    ('spec_cpu_period', 'CPU period.', 'cpu.period_usec', 1),
    ('spec_cpu_shares', 'CPU share.', 'cpu.shares', 1),
    ('memory_usage_bytes', 'Current memory usage in bytes, including all memory regardless of when it was accessed.',
     'memory.current_bytes', 1),
    ('memory_max_usage_bytes', 'Maximum memory usage recorded in bytes.', 'memory.peak_bytes', 1),
    ('memory_rss', 'Size of RSS in bytes.', 'memory.anon_bytes', 1),
    ('memory_cache', 'Number of bytes of page cache memory.', 'memory.file_bytes', 1),
    ('memory_mapped_file', 'Size of memory mapped files in bytes.', 'memory.file_mapped_bytes', 1),
    ('memory_kernel_usage', 'Size of kernel memory allocated in bytes.', 'memory.kernel_bytes', 1),
    ('memory_swap', 'Swap usage in bytes.', 'memory.swap_current_bytes', 1),
    ('spec_memory_limit_bytes', 'Memory limit.', 'memory.max_bytes', 1),
    ('oom_events_total', 'Count of out of memory events observed.', 'memory.events_oom_kill', 1),
    ('processes', 'Number of processes and threads (pids.current).', 'pids.current', 1),
    ('pressure_cpu_waiting_seconds_total', 'Time that tasks have waited for CPU.', 'cpu_pressure.some.total.value', 1e-6),
    ('pressure_cpu_stalled_seconds_total', 'Time that all tasks have waited for CPU.', 'cpu_pressure.full.total.value', 1e-6),
    ('pressure_memory_waiting_seconds_total', 'Time that tasks have waited for memory.',
     'memory_pressure.some.total.value', 1e-6),
    ('pressure_memory_stalled_seconds_total', 'Time that all tasks have waited for memory.',
     'memory_pressure.full.total.value', 1e-6),
    ('pressure_io_waiting_seconds_total', 'Time that tasks have waited for I/O.', 'io_pressure.some.total.value', 1e-6),
    ('pressure_io_stalled_seconds_total', 'Time that all tasks have waited for I/O.', 'io_pressure.full.total.value', 1e-6),
)
# Of a container whose numbers came from the runtime, which has no cgroup of its own.
CONTAINER_SAMPLES = (
    ('container_memory_working_set_bytes', 'Current working set in bytes.', 'memory_metrics.working_set_bytes.value', 1),
    ('container_fs_usage_bytes', 'Number of bytes that the writable layer consumes.', 'file_system_metrics.used_bytes.value', 1),
    ('container_start_time_seconds', 'Start time of the container since unix epoch in seconds.', 'status.started_at_ns', 1e-9),
    ('kubensage_container_restarts', "The kubelet's count of restarts.", 'restart_count', 1),
    ('kubensage_container_exit_code', 'Exit code of the container that has ended.', 'status.exit_code', 1),
)
CGROUP_IO_SAMPLES = (
    ('container_fs_reads_bytes_total', 'Cumulative count of bytes read.', 'rbytes', 1),
    ('container_fs_writes_bytes_total', 'Cumulative count of bytes written.', 'wbytes', 1),
    ('container_fs_reads_total', 'Cumulative count of reads completed.', 'rios', 1),
    ('container_fs_writes_total', 'Cumulative count of writes completed.', 'wios', 1),
)
AGENT_SAMPLES = (
    ('kubensage_agent_uptime_seconds', 'Time since the agent was started.', 'uptime_seconds', 1),
    ('kubensage_agent_cpu_seconds_total', 'CPU time that the agent has used.', 'cpu_seconds_total', 1),
    ('kubensage_agent_resident_bytes', 'Resident memory of the agent.', 'resident_bytes', 1),
    ('kubensage_agent_threads', 'Threads of the agent.', 'threads', 1),
    ('kubensage_agent_open_files', 'Open file descriptors of the agent.', 'open_files', 1),
    ('kubensage_agent_cycles_total', 'Snapshots collected.', 'cycles_total', 1),
    ('kubensage_agent_skipped_ticks_total', 'Cycles left out because the one before took too long.', 'skipped_ticks_total', 1),
    ('kubensage_agent_collection_seconds', 'Duration of the last but one collection.', 'collection_seconds', 1),
    ('kubensage_backlog_snapshots', 'Snapshots that wait for the relay.', 'backlog.snapshots', 1),
    ('kubensage_backlog_memory_bytes', 'Memory that they take.', 'backlog.memory_bytes', 1),
    ('kubensage_backlog_spool_bytes', 'Disk that they take.', 'backlog.spool_bytes', 1),
    ('kubensage_backlog_sent_total', 'Snapshots sent to the relay, each time anew.', 'backlog.sent_total', 1),
    ('kubensage_backlog_acknowledged_total', 'Snapshots that the relay has acknowledged.', 'backlog.acknowledged_total', 1),
    ('kubensage_backlog_reconnects_total', 'Connections to the relay made after the first.', 'backlog.reconnects_total', 1),
    ('kubensage_backlog_seconds_since_acknowledgement', 'Time since the relay has acknowledged something.',
     'backlog.seconds_since_acknowledgement', 1),
)
CRI_SAMPLES = (
    ('kubensage_cri_calls_total', 'Calls of the container runtime.', 'calls_total', 1),
    ('kubensage_cri_failures_total', 'Calls of the container runtime that failed.', 'failures_total', 1),
    ('kubensage_cri_seconds_total', 'Time that the calls took.', 'seconds_total', 1),
)

Labels = Tuple[Tuple[str, str], ...]


class Family(NamedTuple):
    """All samples of one name."""
    name: str
    help: str
    samples: List[Tuple[Labels, float]]


def value_at(message: Any, path: str) -> Optional[float]:
    """The field at a dotted path; None where a part of it is absent."""
    for name in path.split('.'):
        if message.DESCRIPTOR.fields_by_name[name].has_presence and not message.HasField(name):
            return None
        message = getattr(message, name)
    return message


def families_of(rows: Sequence[Tuple[str, str, str, float]], items: Sequence[Tuple[Labels, Any]],
                prefix: str = '') -> List[Family]:
    """A family a row, a sample for each item that has the row's field."""
    families = []
    for name, text, path, factor in rows:
        values = ((labels, value_at(message, path)) for labels, message in items)
        # Divided where the base unit is larger: 3815668 µs are 3.815668 s, times 1e-6 they would be 3.8156679999999996.
        samples = [(labels, value * factor if factor >= 1 else value / round(1 / factor)) for labels, value in values
                   if value is not None]
        families.append(Family(prefix + name, text, samples))
    return families


def node_families(node: wire.NodeMetrics) -> List[Family]:
    file_systems = [((('device', disk.device), ('fstype', disk.fstype), ('mountpoint', disk.mountpoint)), disk)
                    for disk in node.disk_usages]
    interfaces = [((('device', interface.name),), interface) for interface in node.network_interfaces
                  if interface.HasField('counters')]
    return [
        Family('node_uname_info', 'Labeled system information as provided by the uname system call.', [
            ((('sysname', 'Linux'), ('release', node.kernel_version), ('machine', node.kernel_arch),
              ('nodename', node.hostname)), 1)]),
        Family('node_cpu_seconds_total', 'Seconds the CPUs spent in each mode.', [
            ((('cpu', str(cpu.cpu)), ('mode', mode)), getattr(cpu.seconds, mode))
            for cpu in node.cpu_infos for mode in CPU_MODES]),
        Family('node_cpu_guest_seconds_total', 'Seconds the CPUs spent in guests (VMs) for each mode.', [
            ((('cpu', str(cpu.cpu)), ('mode', mode)), value) for cpu in node.cpu_infos
            for mode, value in (('user', cpu.seconds.guest), ('nice', cpu.seconds.guest_nice))]),
        Family('node_network_up', "Value is 1 if operstate is 'up', 0 otherwise.", [
            (labels, interface.operstate == 'up') for labels, interface in interfaces if interface.HasField('operstate')]),
        *families_of(NODE_SAMPLES, [((), node)]),
        *families_of(DISK_SAMPLES, [((('device', disk.device),), disk) for disk in node.disks]),
        *families_of(FILE_SYSTEM_SAMPLES, file_systems),
        *families_of(INTERFACE_SAMPLES, interfaces)]


def present_containers(pod: wire.PodMetrics) -> List[wire.ContainerMetrics]:
    """The one of each name that runs, else the last: a container that was restarted is there twice."""
    ordered = sorted(pod.container_metrics, key=lambda container: (container.state == 'CONTAINER_RUNNING', container.created_at))
    return list({container.name: container for container in ordered}.values())


def present_pods(pods: Sequence[wire.PodMetrics]) -> List[wire.PodMetrics]:
    """The last of each name: while a static pod is replaced, its sandbox may be there twice."""
    return list({(pod.namespace, pod.name): pod for pod in sorted(pods, key=lambda pod: pod.created_at)}.values())


def pod_families(pods: Sequence[wire.PodMetrics]) -> List[Family]:
    by_pod = [((('namespace', pod.namespace), ('pod', pod.name)), pod) for pod in present_pods(pods)]
    containers = [((*labels, ('container', container.name)), container) for labels, pod in by_pod
                  for container in present_containers(pod)]
    cgroups = [(labels, container.cgroup) for labels, container in containers if container.HasField('cgroup')]
    return [
        Family('kubensage_pod_info', 'What the pod is.', [
            ((*labels, ('qos_class', pod.qos_class), ('host_network', str(pod.host_network).lower())), 1)
            for labels, pod in by_pod]),
        Family('kubensage_container_info', 'What the container is.', [
            ((*labels, ('image', container.image), ('state', container.state), ('reason', container.status.reason)), 1)
            for labels, container in containers]),
        Family('container_memory_failures_total', 'Cumulative count of memory allocation failures.', [
            ((*labels, ('failure_type', kind), ('scope', 'container')), getattr(cgroup.memory, kind))
            for labels, cgroup in cgroups for kind in ('pgfault', 'pgmajfault') if cgroup.memory.HasField(kind)]),
        *families_of(CGROUP_CPU_SAMPLES, cgroups, 'container_'),
        *families_of(CONTAINER_SAMPLES, containers),
        *families_of(CGROUP_IO_SAMPLES, [((*labels, ('device', io.device)), io)
                                         for labels, cgroup in cgroups for io in cgroup.io]),
        *families_of(POD_INTERFACE_SAMPLES, [((*labels, ('interface', interface.name)), interface)
                                             for labels, pod in by_pod for interface in pod.network_interfaces]),
        *families_of(CGROUP_CPU_SAMPLES, [(labels, pod.cgroup) for labels, pod in by_pod if pod.HasField('cgroup')],
                     'kubensage_pod_')]


def counts_family(name: str, text: str, label: str, counts: Mapping[str, float]) -> Family:
    return Family(name, text, [(((label, key),), value) for key, value in sorted(counts.items())])


def own_families(metrics: wire.Metrics) -> List[Family]:
    """The agent, the runtime, the services."""
    agent, runtime = metrics.agent_metrics, metrics.node_metrics.container_runtime
    services = [((('service', service.name),), service.cgroup) for service in metrics.node_metrics.services]
    return [
        Family('kubensage_agent_info', 'The agent.', [((('version', agent.version),), 1)]),
        Family('kubensage_snapshot_timestamp_seconds', 'When the snapshot was taken.', [((), metrics.timestamp)]),
        counts_family('kubensage_agent_failures_total', 'Cycles in which a subject could not be read.',
                      'subject', agent.failures_total),
        counts_family('kubensage_backlog_dropped_total', 'Snapshots that were not delivered.',
                      'cause', agent.backlog.dropped_total),
        Family('kubensage_runtime_info', 'The container runtime.', [
            ((('name', runtime.name), ('version', runtime.version)), 1)] if runtime.name else []),
        counts_family('kubensage_runtime_condition', 'Whether the runtime reports this condition.',
                      'condition', runtime.conditions),
        counts_family('kubensage_runtime_sandboxes', 'Pod sandboxes by state.', 'state', runtime.sandboxes),
        counts_family('kubensage_runtime_containers', 'Containers by state.', 'state', runtime.containers),
        *families_of(AGENT_SAMPLES, [((), agent)]),
        *families_of(CRI_SAMPLES, [((('method', call.method),), call) for call in agent.cri_methods]),
        *families_of(CGROUP_CPU_SAMPLES, services, 'kubensage_service_')]


def escape_label(value: str) -> str:
    return value.replace('\\', '\\\\').replace('"', '\\"').replace('\n', '\\n')


def render_sample(name: str, labels: Labels, value: float) -> str:
    text = ','.join(f'{key}="{escape_label(label)}"' for key, label in labels)
    number = str(int(value)) if math.isfinite(value) and value == int(value) else repr(float(value))
    return f'{name}{{{text}}} {number}\n' if text else f'{name} {number}\n'


def render_family(family: Family, openmetrics: bool) -> str:
    """Prometheus names the counter with its _total in HELP and TYPE, OpenMetrics without it."""
    kind = 'counter' if family.name.endswith('_total') else 'gauge'
    if UNTYPED.match(family.name):
        kind = 'unknown' if openmetrics else 'untyped'
    name = family.name[:-len('_total')] if openmetrics and kind == 'counter' else family.name
    head = f'# HELP {name} {family.help}\n# TYPE {name} {kind}\n'
    return head + ''.join(render_sample(family.name, labels, value) for labels, value in family.samples)


def render_exposition(metrics: wire.Metrics, openmetrics: bool) -> str:
    """A snapshot in Prometheus' text format, or OpenMetrics without its end. Families without a sample are left out."""
    families = node_families(metrics.node_metrics) + pod_families(metrics.pod_metrics) + own_families(metrics)
    return ''.join(render_family(family, openmetrics) for family in families if family.samples)


def render_prometheus(metrics: wire.Metrics) -> str:
    return render_exposition(metrics, False)


# --- HTTP

# A connection that says nothing is dropped after so long; there are never more than so many: the oldest makes room.
HTTP_TIMEOUT_SECONDS = 5
MAX_CONNECTIONS = 32
# How long the end of the agent may wait for the server.
HTTP_POLL_SECONDS = 0.1
# How old the last snapshot may be before the agent calls itself ill: so many intervals, and at least so long.
HEALTHY_INTERVALS, HEALTHY_SECONDS = 3, 15
TEXT_TYPE = 'text/plain; version=0.0.4; charset=utf-8'
OPENMETRICS_TYPE = 'application/openmetrics-text; version=1.0.0; charset=utf-8'
INDEX = '''<!DOCTYPE html>
<title>kubensage-agent</title>
<h1>kubensage-agent {version}</h1>
<p>The telemetry agent of {node}. <a href="/metrics">/metrics</a> is for Prometheus, <a href="/healthz">/healthz</a> for probes.
'''


class ListenError(Exception):
    """The address of --listen cannot be had."""


class Published:
    """The last snapshot, serialised, between the collecting thread and those that answer requests; rendered once, when asked
    for."""

    def __init__(self, interval: float):
        self.interval = interval
        self.lock = threading.Lock()
        self.data: Optional[bytes] = None
        self.taken = time.monotonic()
        self.rendered: Dict[bool, bytes] = {}


def publish(published: Published, data: bytes) -> None:
    with published.lock:
        published.data, published.taken, published.rendered = data, time.monotonic(), {}


def exposition(published: Published, openmetrics: bool) -> Optional[bytes]:
    """The text of the last snapshot, and its age now; None before there is one."""
    with published.lock:
        if published.data is None:
            return None
        if openmetrics not in published.rendered:
            metrics = wire.Metrics.FromString(published.data)
            published.rendered[openmetrics] = render_exposition(metrics, openmetrics).encode()
        age = Family('kubensage_snapshot_age_seconds', 'Time since the snapshot was taken.',
                     [((), time.monotonic() - published.taken)])
        end = '# EOF\n' if openmetrics else ''
        return published.rendered[openmetrics] + (render_family(age, openmetrics) + end).encode()


def ill_health(published: Published) -> Optional[str]:
    """Why the agent is not well; None when cycles complete."""
    age = time.monotonic() - published.taken
    if age > max(HEALTHY_SECONDS, HEALTHY_INTERVALS * published.interval):
        return f'no snapshot for {age:.0f} s'
    return None if published.data else 'no snapshot yet'


def wants_openmetrics(accept: str) -> bool:
    return 'application/openmetrics-text' in accept


def http_answer(published: Published, path: str, accept: str) -> Tuple[int, str, bytes]:
    """Status, content type and body for a GET."""
    path = path.partition('?')[0]
    if path == '/metrics':
        openmetrics = wants_openmetrics(accept)
        body = exposition(published, openmetrics)
        if body is None:
            return 503, 'text/plain', b'no snapshot yet\n'
        return 200, OPENMETRICS_TYPE if openmetrics else TEXT_TYPE, body
    if path == '/healthz':
        trouble = ill_health(published)
        return (503, 'text/plain', f'{trouble}\n'.encode()) if trouble else (200, 'text/plain', b'ok\n')
    if path == '/':
        import html
        node = html.escape(wire.Metrics.FromString(published.data or b'').node_metrics.hostname or 'this node')
        return 200, 'text/html; charset=utf-8', INDEX.format(version=__version__, node=node).encode()
    return 404, 'text/plain', b'not here: /metrics, /healthz\n'


def http_handler(published: Published) -> Any:
    """The class that answers one request."""
    # http.client, which comes along, takes ssl where there is one.
    with import_spared({'ssl': None}):
        import http.server

    class Handler(http.server.BaseHTTPRequestHandler):
        timeout = HTTP_TIMEOUT_SECONDS
        server_version, sys_version = 'kubensage-agent', ''

        def do_GET(self) -> None:
            status, content_type, body = http_answer(published, self.path, self.headers.get('Accept', ''))
            self.send_response(status)
            self.send_header('Content-Type', content_type)
            self.send_header('Content-Length', str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            log.debug('http: %s', arguments[0] % arguments[1:])

    return Handler


def http_server(address: str, published: Published) -> Any:
    """A server of the standard library with a thread a connection, and a bound on them. OSError: the address cannot be had."""
    import socketserver
    connections: Dict[Any, None] = {}
    lock = threading.Lock()

    # Not http.server.HTTPServer: it asks the DNS for the name of the address, and waits for the answer.
    class Server(socketserver.ThreadingTCPServer):
        allow_reuse_address = daemon_threads = True
        block_on_close = False
        request_queue_size = 128
        address_family = socket.AF_INET6 if address.startswith('[') else socket.AF_INET

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

    host, _, port = address.rpartition(':')
    return Server((host.strip('[]'), int(port)), http_handler(published))


def start_listening(address: str, published: Published) -> Any:
    try:
        server = http_server(address, published)
    except OSError as error:
        raise ListenError(f'--listen {address}: {error.strerror or error}') from None
    threading.Thread(target=server.serve_forever, args=(HTTP_POLL_SECONDS,), name='http', daemon=True).start()
    return server


def stop_listening(server: Any) -> None:
    server.shutdown()
    server.server_close()


# --- log

DEFAULT_LOG_FILE = '/var/log/kubensage/kubensage-agent.log'
# --log-max-backups 0 keeps all; logging.handlers takes 0 for no rotation.
ALL_BACKUPS = 1000


def rotate_log(source: str, destination: str, compress: bool, max_age_seconds: float) -> None:
    """Move the full log file aside, compressed if so wished, and remove what has become too old."""
    if compress:
        import gzip
        with open(source, 'rb') as full, open(destination, 'xb', opener=open_log_file) as file, gzip.open(file, 'wb') as packed:
            shutil.copyfileobj(full, packed)
        os.remove(source)
    else:
        os.rename(source, destination)
    directory, name = os.path.split(re.sub(r'\.1(\.gz)?$', '', destination))
    for backup in os.listdir(directory):
        path = os.path.join(directory, backup)
        if re.fullmatch(re.escape(name) + r'\.\d+(\.gz)?', backup) and time.time() - os.stat(path).st_mtime > max_age_seconds:
            os.remove(path)


def check_owner(path: str, status: os.stat_result) -> None:
    if status.st_uid not in (0, os.geteuid()):
        raise PermissionError(errno.EPERM, f'{path} belongs to user {status.st_uid}')


def check_links(directory: str) -> None:
    """PermissionError where a symbolic link on the way to it is another user's, who would choose where we write."""
    while directory != '/':
        status = os.lstat(directory)
        if stat.S_ISLNK(status.st_mode):
            check_owner(directory, status)
        directory = os.path.dirname(directory)


def open_log_file(path: str, flags: int) -> int:
    """OSError where it is a link or another user's."""
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o640)
    try:
        check_owner(path, os.fstat(descriptor))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


class LogFile(logging.handlers.RotatingFileHandler):
    """One that follows no links."""

    def _open(self) -> Any:
        return open(self.baseFilename, self.mode, encoding=self.encoding, errors='backslashreplace',
                    opener=open_log_file)


def log_file_handler(options: argparse.Namespace, path: str) -> logging.Handler:
    """Appends to the file; at --log-max-size it becomes PATH.1.gz, and so on. OSError where that cannot be written."""
    directory = os.path.dirname(os.path.abspath(path))
    os.makedirs(directory, mode=0o750, exist_ok=True)
    check_links(directory)
    handler = LogFile(
        path, maxBytes=int(options.log_max_size * 1_000_000), backupCount=options.log_max_backups or ALL_BACKUPS,
        encoding='utf-8')
    if options.log_compress:
        handler.namer = '{}.gz'.format
    max_age_seconds = options.log_max_age * 86400 or math.inf
    handler.rotator = functools.partial(rotate_log, compress=options.log_compress, max_age_seconds=max_age_seconds)
    return handler


def one_line(record: logging.LogRecord) -> bool:
    """A filter that lets no name and no answer forge a line: what comes from elsewhere may hold line feeds."""
    record.msg, record.args = printable(record.getMessage()), ()
    return True


def set_up_log(options: argparse.Namespace) -> None:
    """To stderr; with a relay, where nobody may be watching, to a file as well. stdout is the snapshots' own."""
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
    logging.basicConfig(level=options.log_level.upper(), handlers=handlers, format='%(asctime)s %(levelname)s %(message)s',
                        datefmt='%Y-%m-%dT%H:%M:%SZ')
    # What grpc has to say comes back as a status of the call.
    logging.getLogger('grpc').setLevel(logging.CRITICAL)
    log.addFilter(one_line)
    # A log file that cannot be written any more must not fill stderr with tracebacks.
    logging.raiseExceptions = False
    if failure:
        log.warning('log file %s cannot be written (%s): logging to stderr alone', path, failure.strerror)


# --- command line

def argument_number(text: str, lowest: float, what: str, convert: Callable[[str], float] = int) -> float:
    try:
        number = convert(text)
    except ValueError:
        number = math.nan
    if not lowest <= number < 1e9:
        raise argparse.ArgumentTypeError(f'{text!r} is not {what}')
    return number


def argument_boolean(text: str) -> bool:
    """As Go's flag package reads it."""
    known = {'1': True, 't': True, 'true': True, '0': False, 'f': False, 'false': False}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(f'{text!r} is neither true nor false')
    return known[text.lower()]


def argument_address(text: str) -> str:
    match = re.fullmatch(r'(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+):(\d{1,5})', text)
    if not match or not 0 < int(match.group(2)) < 65536:
        raise argparse.ArgumentTypeError(f'{text!r} is not HOST:PORT (relay.example:50051, 192.0.2.1:50051, [2001:db8::1]:50051)')
    return text


def argument_choice(text: str, choices: Sequence[str]) -> str:
    if text not in choices:
        raise argparse.ArgumentTypeError(f'{text!r} is none of {", ".join(choices)}')
    return text


def number_from(lowest: float, what: str, convert: Callable[[str], float] = int) -> Callable[[str], float]:
    return functools.partial(argument_number, lowest=lowest, what=what, convert=convert)


def one_of(*choices: str) -> Callable[[str], str]:
    return functools.partial(argument_choice, choices=choices)


BOOLEAN: Dict[str, Any] = {'type': argument_boolean, 'nargs': '?', 'const': True, 'metavar': 'true|false'}

# Each flag may also come from the environment: --relay-address as KUBENSAGE_RELAY_ADDRESS.
FLAGS: Dict[str, Dict[str, Any]] = {
    '--relay-address': dict(type=argument_address, metavar='HOST:PORT', help='deliver the snapshots to this relay'),
    '--main-loop-duration': dict(type=number_from(0.1, 'a number of seconds, 0.1 or more', float), default=5,
                                 metavar='SECONDS', help='time from one snapshot to the next; in the live view 2 unless given'),
    '--buffer-retention': dict(type=number_from(0.01, 'a number of minutes, above 0', float), default=10,
                               metavar='MINUTES', help='how long a snapshot waits for a relay that is away'),
    '--buffer-max-size': dict(type=number_from(0.01, 'a number of megabytes, above 0', float), default=64, metavar='MB',
                              help='memory that waiting snapshots may take, compressed'),
    '--spool-dir': dict(metavar='DIR', help='keep waiting snapshots there, so that they survive the agent'),
    '--spool-max-size': dict(type=number_from(0.01, 'a number of megabytes, above 0', float), default=512, metavar='MB',
                             help='disk that waiting snapshots may take'),
    '--relay-tls': dict(BOOLEAN, default=False, help="speak TLS to the relay, trusting the system's roots"),
    '--relay-ca': dict(metavar='FILE', help='speak TLS to the relay, trusting these certificates alone (PEM)'),
    '--relay-cert': dict(metavar='FILE', help="the agent's own certificate, with --relay-key (PEM)"),
    '--relay-key': dict(metavar='FILE', help='the key of --relay-cert (PEM)'),
    '--relay-server-name': dict(metavar='NAME', help="the name in the relay's certificate, where it is not HOST"),
    '--relay-token-file': dict(metavar='FILE', help='send `authorization: Bearer` with what the file holds; with TLS only'),
    '--top-n': dict(type=number_from(0, 'a whole number, 0 or more'), default=10, metavar='N',
                    help='how many of the largest processes to list'),
    '--once': dict(BOOLEAN, default=False, help='take one snapshot, deliver or show it, and exit'),
    '--output': dict(type=one_of('table', 'json', 'prometheus'), metavar='table|json|prometheus',
                     help='how to write snapshots to stdout; without it and without a relay the live view on a terminal, else '
                          'a JSON line each'),
    '--listen': dict(type=argument_address, metavar='ADDRESS:PORT', help='serve /metrics for Prometheus, and /healthz, there'),
    '--print-unit': dict(BOOLEAN, default=False, help='print a systemd unit for this command line, and exit'),
    '--print-daemonset': dict(BOOLEAN, default=False, help='print a Kubernetes manifest for this command line, and exit'),
    '--container-stats': dict(type=one_of('cgroup', 'cri'), default='cgroup', metavar='cgroup|cri',
                              help="where containers' CPU, memory and swap come from"),
    '--fs-stats-interval': dict(type=number_from(1, 'a number of seconds, 1 or more', float), default=60, metavar='SECONDS',
                                help="how often to ask the runtime for the sizes of images and writable layers"),
    '--cri-socket': dict(metavar='PATH', help="the container runtime's socket; by default it is looked for"),
    '--procfs': dict(default='/proc', metavar='DIR', help="where the node's /proc is mounted"),
    '--sysfs': dict(default='/sys', metavar='DIR', help="where the node's /sys is mounted"),
    '--rootfs': dict(default='/', metavar='DIR', help="where the node's / is mounted"),
    '--log-level': dict(type=one_of('debug', 'info', 'warning', 'error'), default='info',
                        metavar='debug|info|warning|error', help='the least severe level to log'),
    '--log-file': dict(metavar='PATH', help=f'log there as well as to stderr; with a relay {DEFAULT_LOG_FILE} by default'),
    '--log-max-size': dict(type=number_from(0.001, 'a number of megabytes, above 0', float), default=10, metavar='MB',
                           help='size at which the log file is rotated'),
    '--log-max-backups': dict(type=number_from(0, 'a whole number, 0 or more'), default=5, metavar='N',
                              help='rotated log files to keep; 0 keeps all'),
    '--log-max-age': dict(type=number_from(0, 'a number of days, 0 or more', float), default=30, metavar='DAYS',
                          help='age at which rotated log files are removed; 0 keeps them'),
    '--log-compress': dict(BOOLEAN, default=True, help='compress rotated log files'),
}


def fail_usage(source: str, message: str) -> None:
    """One line to stderr, exit code 2; instead of argparse's usage text."""
    unknown = re.match(r'unrecognized arguments: (\S+)', message)
    if unknown:
        import difflib
        near = difflib.get_close_matches(unknown.group(1).partition('=')[0], [*FLAGS, '--version', '--help'], 1)
        message = f'unknown argument {unknown.group(1)}; ' + (f'did you mean {near[0]}?' if near else '--help lists them all')
    message = re.sub(r'^argument (--\S+): ', source or r'\1: ', message)
    sys.stderr.write(f'kubensage-agent: {message}\n')
    raise SystemExit(2)


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog='kubensage-agent', allow_abbrev=False,
        description='Reads this Kubernetes node, its pods and containers, and delivers a snapshot every few seconds to a '
                    'relay; or, without a relay, shows it.',
        epilog='Every flag can also come from the environment: KUBENSAGE_RELAY_ADDRESS for --relay-address. The command '
               'line wins.')
    for flag, settings in FLAGS.items():
        default = settings.get('default')
        shown = '' if default in (None, False) else f' (default: {str(default).lower()})'
        parser.add_argument(flag, **{**settings, 'help': settings['help'] + shown})
    parser.add_argument('--version', action='version', version=f'kubensage-agent {__version__}')
    return parser


def variable_of(flag: str) -> str:
    return 'KUBENSAGE_' + flag[2:].upper().replace('-', '_')


def check_relay_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """What a flag alone cannot tell. Files to trust or to show mean that TLS is meant."""
    options.relay_tls = bool(options.relay_tls or options.relay_ca or options.relay_cert)
    if bool(options.relay_cert) != bool(options.relay_key):
        parser.error('--relay-cert and --relay-key go together')
    for flag, value in (('--relay-token-file', options.relay_token_file), ('--relay-server-name', options.relay_server_name)):
        if value and not options.relay_tls:
            parser.error(f'{flag} needs TLS: --relay-tls, or --relay-ca FILE')


def settle_output(options: argparse.Namespace, given: Iterable[str], terminal: bool) -> None:
    """Where snapshots go when nothing was said: to the relay or to Prometheus if there are any, else to people on a
    terminal, else to programs."""
    served = bool(options.relay_address or options.listen)
    options.live = terminal and not (served or options.once or options.output)
    if options.live and '--main-loop-duration' not in given:
        options.main_loop_duration = LIVE_INTERVAL_SECONDS
    if not options.output and not options.live and (options.once and not options.relay_address or not served):
        options.output = 'table' if terminal else 'json'


def parse_options(arguments: Optional[Sequence[str]], environment: Mapping[str, str],
                  terminal: bool = False) -> argparse.Namespace:
    """Flags from the environment first, so that those of the command line win. An empty variable is none."""
    parser, options = argument_parser(), argparse.Namespace()
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    present = [flag for flag in FLAGS if environment.get(variable_of(flag))]
    for flag in present:
        variable = variable_of(flag)
        parser.error = functools.partial(fail_usage, f'{variable}: ')
        parser.parse_args([f'{flag}={environment[variable]}'], options)
    parser.error = functools.partial(fail_usage, '')
    options = parser.parse_args(arguments, options)
    check_relay_options(parser, options)
    settle_output(options, [*present, *(argument.partition('=')[0] for argument in arguments)], terminal)
    return options


# --- service

# systemd.exec(5). What would blind the agent is left out: ProcSubset=pid and ProtectProc= hide /proc, PrivateNetwork= the
# node's interfaces, ProtectClock= denies adjtimex(2) even for reading, PrivateUsers= the runtime's socket.
UNIT = '''\
[Unit]
Description=kubensage-agent, the telemetry of this node
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
      hostNetwork: true
      hostPID: true
      dnsPolicy: ClusterFirstWithHostNet
      terminationGracePeriodSeconds: 20
      tolerations:
        - operator: Exists
      containers:
        - name: agent
          image: python:3-slim
          # {archive} is to lie on each node.
          command: ["python3", "-I", "{archive}"]
          env:
            - name: NODE_NAME
              valueFrom:
                fieldRef:
                  fieldPath: spec.nodeName
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
            - name: runtime
              mountPath: {socket_directory}
              readOnly: true
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
        - name: runtime
          hostPath:
            path: {socket_directory}
            type: Directory
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
# Flags that say what to do now, not how the service is to run.
ONE_SHOT_FLAGS = ('--print-unit', '--print-daemonset', '--once', '--output')


def given_flags(options: argparse.Namespace, arguments: Sequence[str]) -> Dict[str, str]:
    """The flags on the command line, without those that say what to do now; files by their absolute paths."""
    named = {argument.partition('=')[0] for argument in arguments} - set(ONE_SHOT_FLAGS)
    given = {}
    for flag in sorted(named & FLAGS.keys()):
        value = getattr(options, flag[2:].replace('-', '_'))
        if FLAGS[flag].get('metavar') in ('DIR', 'FILE', 'PATH'):
            value = os.path.abspath(value)
        given[flag] = str(value).lower() if isinstance(value, bool) else re.sub(r'\.0$', '', str(value))
    return given


def systemd_quote(argument: str) -> str:
    """systemd.service(5), "Command lines": specifiers and variables are expanded even within quotes."""
    text = argument.replace('\\', '\\\\').replace('%', '%%').replace('$', '$$').replace('"', '\\"').replace('\n', '\\n')
    return text if re.fullmatch(r'[^\s"\';]+', text) else f'"{text}"'


def render_unit(options: argparse.Namespace, interpreter: str, program: str, arguments: Sequence[str]) -> str:
    """A unit that runs this program with these flags; the spool, which survives a restart, is on."""
    flags = given_flags(options, arguments)
    if options.relay_address:
        flags.setdefault('--spool-dir', STATE_DIRECTORY)
    writable = [flags.get('--spool-dir'), os.path.dirname(flags.get('--log-file', ''))]
    extra = ''.join(f'ReadWritePaths={systemd_quote("-" + path)}\n' for path in writable if path and path != STATE_DIRECTORY)
    command = [interpreter, '-I', program, *(f'{flag}={value}' for flag, value in flags.items())]
    return UNIT.format(open_files=MAX_OPEN_FILES, command=' '.join(map(systemd_quote, command)), extra=extra,
                       watchdog_seconds=math.ceil(max(WATCHDOG_SECONDS, WATCHDOG_INTERVALS * options.main_loop_duration)))


def render_daemonset(options: argparse.Namespace, arguments: Sequence[str], socket_path: str) -> str:
    """A manifest that runs the archive on every node, the flags given as environment variables."""
    listen = options.listen or DAEMONSET_LISTEN
    flags = {**given_flags(options, arguments), '--listen': listen, '--procfs': '/host/proc', '--sysfs': '/host/sys',
             '--rootfs': '/host/root', '--cri-socket': socket_path}
    if options.relay_address:
        flags['--spool-dir'] = STATE_DIRECTORY
    environment = '\n'.join(f'            - name: {variable_of(flag)}\n              value: {json.dumps(value)}'
                            for flag, value in sorted(flags.items()))
    return DAEMONSET.format(
        version=__version__, port=listen.rpartition(':')[2], directory=DAEMONSET_DIRECTORY, cache=ROOT_CACHE,
        archive=f'{DAEMONSET_DIRECTORY}/{ARCHIVE_NAME}', environment=environment, socket_directory=os.path.dirname(socket_path))


# --- main loop

# Of the two samples of --once, from which rates are computed, the second begins so long after the first, and not sooner
# than so long after its end.
ONCE_INTERVAL_SECONDS, ONCE_PAUSE_SECONDS = 0.5, 0.3
ONCE_DELIVERY_SECONDS = 10
# Of a table that goes into a file.
TABLE_WIDTH = 160
# malloc.h, glibc's.
M_ARENA_MAX = -8
# How long to wait for an agent that is just being replaced to let go of the spool.
SPOOL_PATIENCE_SECONDS = 10


def install_signals(live: bool) -> int:
    """SIGTERM and SIGINT make the returned descriptor readable; the second of them ends the process at once, a live view
    by way of its screen. SIGWINCH makes it readable as well: the terminal has another size."""
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable)

    def on_signal(number: int, frame: Any) -> None:
        for again in (signal.SIGTERM, signal.SIGINT):
            signal.signal(again, signal.default_int_handler if live else signal.SIG_DFL)

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGWINCH, lambda number, frame: None)
    return readable


class Live:
    """The live view: how it looks, and the two snapshots that it shows."""

    def __init__(self) -> None:
        self.view = View(80, color=not os.environ.get('NO_COLOR'))
        self.before: Optional[wire.Metrics] = None
        self.metrics: Optional[wire.Metrics] = None
        self.keyboard = [sys.stdin.fileno()] if sys.stdin and sys.stdin.isatty() else []


def draw(live: Live) -> None:
    if live.metrics:
        width, height = shutil.get_terminal_size()
        live.view = live.view._replace(width=max(40, width), height=max(8, height))
        sys.stdout.write(render_frame(render_view(live.before, live.metrics, live.view)))
        sys.stdout.flush()


def stopped_within(descriptor: int, until: float, live: Optional[Live] = None) -> bool:
    """Sleep until an instant of the monotonic clock, unless a signal to stop comes first or has come. The live view
    meanwhile answers keys, and a new size of the terminal."""
    keyboard = live.keyboard if live else []
    while True:
        ready = select.select([descriptor, *keyboard], [], [], max(0, until - time.monotonic()))[0]
        if not ready:
            return False
        if descriptor in ready and set(os.read(descriptor, 64)) & {signal.SIGTERM, signal.SIGINT}:
            return True
        if live is None:
            continue
        if ready[-1] in keyboard and read_keys(live):
            return True
        draw(live)


def read_keys(live: Live) -> bool:
    """Do what was typed; whether it was q. A terminal that has gone types no more."""
    try:
        keys = os.read(live.keyboard[0], 64).decode(errors='replace')
    except OSError:
        keys = ''
    if not keys:
        live.keyboard.clear()
    for key in keys:
        live.view = press_key(live.view, key, live.metrics)
    return 'q' in keys


def next_tick(start: float, interval: float, now: float) -> float:
    """The first instant after now on the grid that begins at start: a late cycle skips ticks instead of hurrying."""
    return start + interval * (math.floor((now - start) / interval) + 1)


def notify_systemd(message: str) -> None:
    """sd_notify(3): a datagram to the socket that systemd names; nothing without it."""
    address = os.environ.get('NOTIFY_SOCKET', '')
    if address:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as notify:
            notify.sendto(message.encode(), '\0' + address[1:] if address[0] == '@' else address)


def status_line(data: bytes, backlog: Optional[Backlog], failures: Dict[str, str]) -> str:
    """One line for `systemctl status`, about a serialised snapshot."""
    pods = wire.SerializedMetrics.FromString(data).pod_metrics
    containers = sum(len(wire.SerializedPod.FromString(pod).container_metrics) for pod in pods)
    waiting = f', {len(backlog.snapshots)} snapshots wait for the relay' if backlog else ''
    trouble = f'; in trouble: {", ".join(sorted(failures))}' if failures else ''
    return printable(f'{len(pods)} pods, {containers} containers{waiting}{trouble}')


def log_blind_spots() -> None:
    if os.geteuid() != 0:
        log.warning('not root: pods and containers, the host id, and file systems below private directories may be missing')


def log_exposure(relay: Relay, level: int = logging.WARNING) -> None:
    """What is unwise about the way to the relay, once."""
    for path in exposed_files(relay):
        log.log(level, '%s can be read by other users: `chmod go-r %s` mends it', path, path)
    if not relay.tls and not LOOPBACK.match(relay.address):
        log.log(level, 'relay %s: snapshots go there in plain text (--relay-tls)', relay.address)


def relay_from(options: argparse.Namespace) -> Relay:
    return Relay(options.relay_address, options.relay_tls, options.relay_ca, options.relay_cert, options.relay_key,
                 options.relay_server_name, options.relay_token_file)


def backlog_from(options: argparse.Namespace) -> Backlog:
    """The backlog, with what earlier runs have left in the spool. One that cannot be used is done without."""
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


class Outlets(NamedTuple):
    """Where snapshots go."""
    output: Optional[str] = None
    backlog: Optional[Backlog] = None
    published: Optional[Published] = None
    live: Optional[Live] = None


def open_outlets(options: argparse.Namespace, closing: contextlib.ExitStack) -> Outlets:
    """As the options say; what has to be closed is closed with `closing`, in the opposite order."""
    backlog = published = live = None
    if options.listen:
        published = Published(options.main_loop_duration)
        closing.callback(stop_listening, start_listening(options.listen, published))
    if options.relay_address:
        backlog, relay = backlog_from(options), relay_from(options)
        log_exposure(relay)
        closing.callback(end_delivery, backlog, start_delivery(backlog, relay))
    if options.live:
        live = Live()
        closing.enter_context(live_screen())
    return Outlets(options.output, backlog, published, live)


def end_delivery(backlog: Backlog, sender: threading.Thread) -> None:
    left = close_backlog(backlog, sender, LAST_ATTEMPT_SECONDS)
    if left:
        log.warning('stopped: %d snapshots were not acknowledged%s', left, '; the spool keeps them' if backlog.spool else '')


def show(before: Optional[wire.Metrics], metrics: wire.Metrics, output: str) -> None:
    """To stdout, which may be closed (>&-)."""
    if not sys.stdout:
        return
    if output == 'table':
        text = render_view(before, metrics, View(shutil.get_terminal_size((TABLE_WIDTH, 0)).columns))
    else:
        text = render_json(metrics) if output == 'json' else render_prometheus(metrics)
    sys.stdout.write(text.rstrip('\n') + '\n')
    sys.stdout.flush()


def hand_over(before: Optional[wire.Metrics], data: bytes, outlets: Outlets) -> Tuple[Optional[wire.Metrics], Dict[str, str]]:
    """A serialised snapshot to each outlet; gives the one to compare the next with, where rates are shown, and what went wrong."""
    failures: Dict[str, str] = {}
    if outlets.published:
        publish(outlets.published, data)
    if outlets.backlog:
        failures.update(add_snapshot(outlets.backlog, data))
    if not outlets.live and not outlets.output:
        return None, failures
    metrics = wire.Metrics.FromString(data)
    try:
        if outlets.live:
            outlets.live.before, outlets.live.metrics = before, metrics
            draw(outlets.live)
        if outlets.output:
            show(before, metrics, outlets.output)
    except BrokenPipeError:
        raise
    except OSError as error:
        failures['output'] = error.strerror
    return metrics if outlets.live or outlets.output == 'table' else None, failures


def run_once(roots: Roots, options: argparse.Namespace) -> int:
    """Two samples, the second of which counts. 1 when a relay was named and has not acknowledged it."""
    run = Run()
    with concurrent.futures.ThreadPoolExecutor(1) as runtime_thread:
        began = time.monotonic()
        first = collect_snapshot(roots, options, Memory(), runtime_thread, run)
        time.sleep(max(ONCE_PAUSE_SECONDS, began + ONCE_INTERVAL_SECONDS - time.monotonic()))
        run.sequence = 0
        part = collect_snapshot(roots, options, first.after, runtime_thread, run)
    log_changes({}, part.failures)
    if options.output:
        show(wire.Metrics.FromString(first.message), wire.Metrics.FromString(part.message), options.output)
    if not options.relay_address:
        return 0
    backlog, relay = backlog_from(options), relay_from(options)
    # For the log file: cron would send a mail with it each time.
    log_exposure(relay, logging.INFO)
    log_changes({}, add_snapshot(backlog, part.message))
    left = close_backlog(backlog, start_delivery(backlog, relay), ONCE_DELIVERY_SECONDS)
    return 1 if left or backlog.dropped else 0


def run_cycle(roots: Roots, options: argparse.Namespace, memory: Memory, runtime_thread: concurrent.futures.Executor,
              run: Run, outlets: Outlets) -> Tuple[Memory, Dict[str, str]]:
    """One snapshot, taken and handed over; what the next cycle needs, and what went wrong."""
    part = collect_snapshot(roots, options, memory, runtime_thread, run, outlets.backlog)
    metrics, output_failures = hand_over(memory.metrics, part.message, outlets)
    failures = {**part.failures, **output_failures}
    if os.environ.get('NOTIFY_SOCKET'):
        status = status_line(part.message, outlets.backlog, failures)
        notify_systemd(('READY=1\n' if run.cycles == 1 else '') + f'WATCHDOG=1\nSTATUS={status}')
    return part.after._replace(metrics=metrics), failures


def run_loop(roots: Roots, options: argparse.Namespace) -> int:
    """A snapshot each interval, until a signal; then one last attempt to deliver what is left."""
    descriptor, run, interval = install_signals(options.live), Run(), options.main_loop_duration
    memory, troubles, late, tick, stopped = Memory(), {}, {}, time.monotonic(), False
    with contextlib.ExitStack() as closing:
        outlets = open_outlets(options, closing)
        runtime_thread = closing.enter_context(concurrent.futures.ThreadPoolExecutor(1, 'runtime'))
        while not stopped:
            try:
                memory, failures = run_cycle(roots, options, memory, runtime_thread, run, outlets)
                log_changes(troubles, {**failures, **late})
                troubles = {**failures, **late}
            except BrokenPipeError:
                raise
            except Exception:
                log.exception('a bug: this snapshot is lost')
                run.failures['bug'] += 1
            previous, tick = tick, next_tick(tick, interval, time.monotonic())
            skipped = round((tick - previous) / interval) - 1
            run.skipped_ticks += skipped
            late = {'pace': f'a cycle takes longer than {interval:g} s: ticks are skipped'} if skipped else {}
            stopped = stopped_within(descriptor, tick, outlets.live)
        notify_systemd('STOPPING=1')
    return 0


def print_service(options: argparse.Namespace, arguments: Sequence[str], roots: Roots) -> int:
    if options.print_unit:
        program = getattr(globals().get('__loader__'), 'archive', None) or __file__
        text = render_unit(options, sys.executable, os.path.abspath(program), arguments)
    else:
        endpoints = collect_endpoints(roots, options.cri_socket)
        present = [path for path in endpoints if read_socket_inode(path)]
        text = render_daemonset(options, arguments, (present or (endpoints if options.cri_socket else CRI_SOCKETS))[0])
    sys.stdout.write(text)
    return 0


def settle_memory() -> None:
    """What is there by now stays: the garbage collector need not look at it. glibc gives back the 11 MB that the compiler has
    used and freed (malloc_trim(3)), and all threads take memory from one place, not each from its own (mallopt(3))."""
    gc.collect()
    gc.freeze()
    with contextlib.suppress(AttributeError):
        libc().mallopt(M_ARENA_MAX, 1)
        libc().malloc_trim(0)


def main(arguments: Optional[Sequence[str]] = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_options(arguments, os.environ, bool(sys.stdout and sys.stdout.isatty()))
    options.cri_socket = options.cri_socket or os.environ.get('CONTAINER_RUNTIME_ENDPOINT')
    if sys.stdout:
        # A terminal of another encoding gets a ? and not a traceback.
        sys.stdout.reconfigure(errors='replace')
    roots = Roots(options.procfs, options.sysfs, options.rootfs)
    if options.print_unit or options.print_daemonset:
        return print_service(options, arguments, roots)
    set_up_log(options)
    log_blind_spots()
    raise_open_files_limit()
    settle_memory()
    try:
        return run_once(roots, options) if options.once else run_loop(roots, options)
    except ListenError as error:
        log.error('%s', error)
        return 1
    except BrokenPipeError:
        # The reader of stdout has gone. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def run_archive() -> None:
    """The entry point of the archive."""
    sys.exit(main())


if __name__ == '__main__':
    run_archive()
