"""Tests of kubensage-agent, in the order of its sections. Standard library only: `python3 -m unittest`.

Texts of real systems are constants below, each with its kernel and machine. Where a number could be swapped with its
neighbour, the text counts 1, 2, 3, ... instead: zeros hide swaps. The runtime and the relay are played by real gRPC
servers on real sockets; and where containerd is installed and the user is root, the agent meets a real one.
"""
from __future__ import annotations

import argparse
import collections
import compileall  # noqa: F401  (an import as another user may not find it any more)
import concurrent.futures
import contextlib
import errno
import fcntl
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import logging
import lzma
import math
import os
import pty
import py_compile
import queue
import random
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import tarfile
import tempfile
import termios
import textwrap
import threading
import time
import types
import unittest
import uuid
import zipfile
import zlib
from typing import Any, Callable, Deque, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple
from unittest import mock

# First: it brings grpc along from the archive where none is installed.
import agent
import cri_pb2 as cri
import grpc
import kubensage_pb2 as wire
from google.protobuf import json_format
from google.protobuf.wrappers_pb2 import UInt64Value

# --- texts

# kernel 6.12, Debian 13, x86_64; intr and softirq shortened
STAT = '''\
cpu  11325 0 15923 20895 113 0 487 0 0 0
cpu0 5728 0 8092 10188 73 0 241 0 0 0
cpu1 5597 0 7830 10707 40 0 245 0 0 0
intr 223011 118 9 0 0 34
ctxt 297051
btime 1795425261
processes 2860
procs_running 2
procs_blocked 0
softirq 123636 0 22132 8 7522
'''
# kernel 6.12, Debian 13, x86_64; flags shortened, lines after them left out
CPUINFO_X86 = '''\
processor\t: 0
vendor_id\t: AuthenticAMD
model\t\t: 107
model name\t: QEMU TCG CPU version 2.5+
cpu MHz\t\t: 2596.131
physical id\t: 0
core id\t\t: 0
flags\t\t: fpu de pse
power management:

processor\t: 1
vendor_id\t: AuthenticAMD
model\t\t: 107
model name\t: QEMU TCG CPU version 2.5+
cpu MHz\t\t: 2596.131
physical id\t: 0
core id\t\t: 1
flags\t\t: fpu de pse
power management:

'''
# kernel 6.1, ARM, emulated; the first of four
CPUINFO_ARM = '''\
processor\t: 0
BogoMIPS\t: 125.00
Features\t: fp asimd evtstrm aes
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0c
CPU revision\t: 1

'''
# kernel 6.12, Debian 13, x86_64
LOADAVG = '1.38 1.73 0.83 2/229 2859\n'
FILE_NR = '832\t0\t9223372036854775807\n'
# kernel 6.12, Debian 13, x86_64; some lines
VMSTAT = '''\
nr_free_pages 882382
pgpgin 816650
pswpin 0
pgfault 362743
pgmajfault 1683
oom_kill 4
'''
# kernel 6.12, Debian 13, x86_64; the first lines and some of the last
MEMINFO = '''\
MemTotal:        4015532 kB
MemFree:         3529532 kB
MemAvailable:    3551804 kB
Buffers:            7832 kB
Active(anon):     155800 kB
HugePages_Total:       0
Hugepagesize:       2048 kB
'''
# kernel 6.12, Debian 13, x86_64
PRESSURE_CPU = '''\
some avg10=70.95 avg60=69.15 avg300=38.90 total=169091998
full avg10=0.00 avg60=0.00 avg300=0.00 total=0
'''
# kernel 6.12, Debian 13, x86_64: containerd
STATM = b'523825 15654 9596 5024 0 38050 0\n'
# kernel 6.12, Debian 13, x86_64; some lines
MOUNTINFO = '''\
24 29 0:22 / /sys rw,nosuid,nodev,noexec,relatime shared:6 - sysfs sysfs rw
29 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw,errors=remount-ro
40 29 0:33 / /tmp rw,nosuid,nodev shared:17 - tmpfs tmpfs rw,size=2007768k,nr_inodes=1048576,inode64
49 29 254:16 / /data rw,noatime shared:89 - ext4 /dev/vdb rw
467 28 0:4 net:[4026532469] /run/netns/cni-d4ba223f rw shared:226 - nsfs nsfs rw
'''
# kernel 6.1, ARM, emulated; no optional fields
MOUNTINFO_ARM = '''\
1 1 0:2 / / rw - rootfs rootfs rw,size=466448k,nr_inodes=116612,inode64
28 1 254:16 / /data rw,relatime - ext4 /dev/vdb rw
'''
# kernel 6.12, Debian 13, x86_64
DISKSTATS = '''\
 254       0 vda 3739 488 1629322 4249 3588 3074 1308976 14908 0 6104 19638 0 0 0 0 801 479
 254       1 vda1 3653 488 1626698 4160 3587 3074 1308976 14906 0 7052 19066 0 0 0 0 0 0
 254      16 vdb 135 0 3978 108 1 0 8 3 0 108 112 0 0 0 0 1 0
'''
# kernel 6.18, x86_64: the answer to RTM_GETADDR of a network namespace with lo alone, 127.0.0.1/8 and ::1/128
ADDRESSES = bytes.fromhex(
    '4c00000014000200010000008f2f0000020880fe01000000080001007f000001080002007f000001070003006c6f0000'
    '080008008000000014000600ffffffffffffffffaada0200aada0200'
    '5000000014000200010000008f2f00000a8080fe010000001400010000000000000000000000000000000001'
    '14000600ffffffffffffffffaada0200aada0200080008008000000005000b0001000000'
    '1400000003000200010000008f2f000000000000')
# kernel 6.12, Debian 13, x86_64; some interfaces
NET_DEV = '''\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:       0       0    0    0    0     0          0         0        0       0    0    0    0     0       0          0
enp0s3:   50152     196    0    0    0     0          0         0    29478     145    0    0    0     0       0          0
  cni0:  324400    5942    0    0    0     0          0        54 169286850    6438    0    2    0     0       0          0
'''
# kernel 6.12, Debian 13, x86_64; padding shortened
ROUTE = '''\
Iface\tDestination\tGateway \tFlags\tRefCnt\tUse\tMetric\tMask\t\tMTU\tWindow\tIRTT
enp0s3\t00000000\t0202000A\t0003\t0\t0\t1024\t00000000\t0\t0\t0
enp0s3\t0002000A\t00000000\t0001\t0\t0\t1024\t00FFFFFF\t0\t0\t0
cni0\t0000580A\t00000000\t0001\t0\t0\t0\t0000FFFF\t0\t0\t0
'''
# kernel 6.1, ARM, emulated: a link, the default route, and the entry that rejects what has no route
ZEROS = '0' * 32
IPV6_ROUTE = f'''\
fe800000000000000000000000000000 40 {ZEROS} 00 {ZEROS} 00000100 00000002 00000000 00000001     eth0
{ZEROS} 00 {ZEROS} 00 fe800000000000000000000000000002 00000400 00000001 00000000 00450003     eth0
{ZEROS} 00 {ZEROS} 00 {ZEROS} ffffffff 00000001 00000000 00200200       lo
'''
# kernel 6.12, Debian 13, x86_64; two of the protocols
SNMP = '''\
Tcp: RtoAlgorithm RtoMin RtoMax MaxConn ActiveOpens PassiveOpens AttemptFails EstabResets CurrEstab InSegs OutSegs RetransSegs InErrs
Tcp: 1 200 120000 -1 0 171 0 7 1 6042 118723 9 0
Udp: InDatagrams NoPorts InErrors OutDatagrams RcvbufErrors SndbufErrors InCsumErrors IgnoredMulti MemErrors
Udp: 0 0 0 0 0 0 0 2 0
'''
# kernel 6.12, Debian 13, x86_64; some columns
NETSTAT = '''\
TcpExt: SyncookiesSent TW DelayedACKs ListenOverflows ListenDrops TCPHPHits TCPAutoCorking TCPSynRetrans TCPOrigDataSent
TcpExt: 0 99 14 0 0 13 27 0 118239
IpExt: InNoRoutes InTruncatedPkts InOctets OutOctets
IpExt: 0 0 366352 169221348
'''
# kernel 6.12, Debian 13, x86_64
SOCKSTAT = '''\
sockets: used 134
TCP: inuse 3 orphan 0 tw 50 alloc 5 mem 0
UDP: inuse 1 mem 0
UDPLITE: inuse 0
RAW: inuse 0
FRAG: inuse 0 memory 0
'''
# kernel 6.12, Debian 13, x86_64: two CPUs; the last columns left out
SOFTNET_STAT = '''\
000021d7 00000000 0000001c 00000000 00000000 00000000 00000000 00000000 00000000 00000000
00002760 00000000 0000001c 00000000 00000000 00000000 00000000 00000000 00000000 00000000
'''
# Debian 13; without the addresses
OS_RELEASE = '''\
PRETTY_NAME="Debian GNU/Linux 13 (trixie)"
NAME="Debian GNU/Linux"
VERSION_ID="13"
VERSION="13 (trixie)"
VERSION_CODENAME=trixie
DEBIAN_VERSION_FULL=13.7
ID=debian
'''
# kernel 6.12, Debian 13, x86_64
UPTIME = '261.95 208.96\n'

# kernel 6.12, Debian 13, x86_64, cgroup v2: a container limited to 10 % of a CPU, a pod whose container was killed
CPU_STAT = '''\
usage_usec 18820166
user_usec 16435552
system_usec 2384613
nice_usec 0
nr_periods 1764
nr_throttled 1762
throttled_usec 155951645
nr_bursts 0
burst_usec 0
'''
CPU_MAX = '10000 100000\n'
MEMORY_EVENTS = 'low 0\nhigh 0\nmax 48\noom 1\noom_kill 2\noom_group_kill 1\n'
IO_STAT = '254:0 rbytes=629145600 wbytes=629145600 rios=688 wios=903 dbytes=0 dios=0\n'
# kernel 6.18, x86_64, cgroup v1
BLKIO = '''\
254:0 Read 4194304
254:0 Write 2097152
254:0 Sync 6291456
254:0 Async 0
254:0 Discard 0
254:0 Total 6291456
Total 6291456
'''

# A node of one CPU, with texts from above: the kernel's file by its path under the root.
NODE = {
    'proc/stat': STAT.replace('cpu1 5597 0 7830 10707 40 0 245 0 0 0\n', ''),
    'proc/cpuinfo': CPUINFO_X86.partition('\n\n')[0],
    'proc/meminfo': MEMINFO,
    'proc/pressure/cpu': PRESSURE_CPU,
    'proc/pressure/memory': 'some avg10=1.50 avg60=2.50 avg300=3.50 total=4\nfull avg10=5.50 avg60=6.50 avg300=7.50 total=8\n',
    'proc/pressure/io': 'some avg10=0.01 avg60=0.02 avg300=0.03 total=9\n',
    'proc/pressure/irq': 'full avg10=0.04 avg60=0.05 avg300=0.06 total=10\n',
    'proc/loadavg': LOADAVG,
    'proc/vmstat': VMSTAT,
    'proc/sys/fs/file-nr': FILE_NR,
    'proc/sys/kernel/threads-max': '31175\n',
    'proc/sys/kernel/pid_max': '4194304\n',
    'proc/sys/net/netfilter/nf_conntrack_count': '129\n',
    'proc/sys/net/netfilter/nf_conntrack_max': '65536\n',
    'proc/1/net/snmp': SNMP, 'proc/1/net/netstat': NETSTAT, 'proc/1/net/sockstat': SOCKSTAT, 'proc/1/net/softnet_stat': SOFTNET_STAT,
    'proc/1/statm': f'9 {2 ** 20 // agent.PAGE_SIZE_BYTES} 3 4 5 6 7\n',
    'proc/1/comm': 'systemd\n',
    'proc/1/mountinfo': MOUNTINFO,
    'proc/1/net/dev': NET_DEV,
    'proc/1/net/route': ROUTE,
    'proc/1/net/ipv6_route': IPV6_ROUTE,
    'proc/2/statm': '0 0 0 0 0 0 0\n',
    'proc/2/comm': 'kthreadd\n',
    'proc/2592/statm': f'9 {2 ** 21 // agent.PAGE_SIZE_BYTES} 3 4 5 6 7\n',
    'proc/2592/comm': 'new\nline) R 1\n',
    'proc/diskstats': DISKSTATS,
    'proc/uptime': UPTIME,
    'proc/sys/kernel/hostname': 'node-d13\n',
    'proc/sys/kernel/osrelease': '6.12.107+deb13-cloud-amd64\n',
    'proc/sys/kernel/arch': 'x86_64\n',
    'proc/sys/kernel/random/boot_id': '06f83538-a376-46cd-8a8f-81923a2e4bbd\n',
    'sys/block/vda/vda1/partition': '1\n',
    'sys/block/vdb/size': '4194304\n',
    'sys/devices/system/cpu/cpu0/topology/physical_package_id': '0\n',
    'sys/devices/system/cpu/cpu0/topology/core_id': '0\n',
    'sys/class/net/lo/ifindex': '1\n', 'sys/class/net/lo/mtu': '65536\n', 'sys/class/net/lo/flags': '0x9\n',
    'sys/class/net/lo/address': '00:00:00:00:00:00\n',
    'sys/class/net/enp0s3/ifindex': '2\n', 'sys/class/net/enp0s3/mtu': '1500\n', 'sys/class/net/enp0s3/flags': '0x1003\n',
    'sys/class/net/enp0s3/address': '52:54:00:d1:3d:13\n',
    'sys/class/net/enp0s3/operstate': 'up\n', 'sys/class/net/enp0s3/carrier': '1\n', 'sys/class/net/enp0s3/speed': '-1\n',
    'sys/fs/cgroup/cgroup.controllers': 'cpu io memory pids\n',
    'sys/fs/cgroup/system.slice/kubelet.service/cpu.stat': CPU_STAT,
    'sys/fs/cgroup/system.slice/kubelet.service/memory.current': '7258112\n',
    'sys/fs/cgroup/system.slice/ssh.service/cpu.stat': CPU_STAT,
    'etc/os-release': OS_RELEASE,
    'etc/debian_version': '13.7\n',
    'etc/machine-id': 'D249C0486159F80557CE12D99828162B\n',
    'data/empty': '',
}


def write_tree(root, files):
    for path, content in files.items():
        os.makedirs(os.path.dirname(os.path.join(root, path)), exist_ok=True)
        with open(os.path.join(root, path), 'wb') as file:
            file.write(content if isinstance(content, bytes) else content.encode())


def roots_below(root):
    return agent.Roots(f'{root}/proc', f'{root}/sys', root)


def run_agent(*arguments, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith('KUBENSAGE_')}
    return subprocess.run([sys.executable, agent.__file__, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          encoding='utf-8', timeout=60, env={**clean, **environment})


def run_on_tree(root, *arguments, **environment):
    """One snapshot of a tree, without a container runtime."""
    return run_agent('--once', '--procfs', f'{root}/proc', '--sysfs', f'{root}/sys', '--rootfs', root,
                     '--cri-socket', f'{root}/no.sock', *arguments, **environment)


class AgentTest(unittest.TestCase):
    maxDiff = None

    def directory(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        return directory.name

    def tree(self, files):
        """A root in a temporary directory, with these files."""
        root = self.directory()
        write_tree(root, files)
        return root

    def tool(self, *command):
        """What a program of this machine prints; skips where it is absent or refuses."""
        try:
            return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, encoding='utf-8',
                                  env={**os.environ, 'LC_ALL': 'C'}).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            self.skipTest(f'{command[0]}: {error}')

    def check_parse(self, parse, accepted, malformed):
        """accepted: what it is → (text, value); malformed: what it is → (text, the part of it that the error names)."""
        for what, (text, value) in accepted.items():
            with self.subTest(what):
                self.assertEqual(value, parse(text))
        for what, (text, named) in malformed.items():
            with self.subTest(what), self.assertRaisesRegex(ValueError, re.escape(named)):
                parse(text)

    def check_table(self, function, table):
        """(arguments, result) of a function without side effects."""
        for arguments, result in table:
            with self.subTest(arguments=arguments):
                self.assertEqual(result, function(*arguments))


    def settled(self, oracle, ours):
        """What both say while nothing moves: read again until the oracle says the same before and after."""
        for _ in range(20):
            before, value = oracle(), ours()
            if before == oracle():
                break
        return before, value


LIVE = agent.Roots('/proc', '/sys', '/')


# --- the bundle

HERE = os.path.dirname(os.path.abspath(agent.__file__))
REAL_ARCHIVE = os.path.join(HERE, agent.ARCHIVE_NAME)
SUFFIX = agent.extension_suffix()
OTHER_SUFFIX = '.cpython-300-pdp11-linux-gnu.so'
NOBODY = 65534
# Ends the run as soon as it is imported, and tells what was found.
FAKE_GRPC = 'import google\nprint(__file__, google.__file__, sep="\\n")\nraise SystemExit\n'
# A tree is to hold these, and nothing else of the tar.
WANTED = {
    'google/__init__.py': '', 'google/_upb/_message.abi3.so': 'abi3',
    'grpc/__init__.py': FAKE_GRPC, 'grpc/_cython/_credentials/roots.pem': 'roots', 'protobuf-6.dist-info/METADATA': '6',
    'grpc/_cython/cygrpc' + SUFFIX: 'compiled',
}
BYTE_CODE = {f'{os.path.dirname(path)}/__pycache__/__init__.{sys.implementation.cache_tag}.pyc'
             for path in WANTED if path.endswith('.py')}
UNWANTED = {'grpc/_cython/cygrpc.pyx': 'source', 'grpc/_cython/cygrpc' + OTHER_SUFFIX: 'foreign'}
# Imports first, so that runs that wait for the end of stdin go on as one.
MAIN = ('import sys, argparse, concurrent.futures, logging.handlers, lzma, tarfile, tempfile, compileall\n'
        'sys.stdin.read()\nimport agent\nagent.run()\n')


def pack_tar(members):
    """tar.xz of names and texts; a name may be a whole TarInfo."""
    packed = io.BytesIO()
    with lzma.open(packed, 'wb') as file, tarfile.open(fileobj=file, mode='w', format=tarfile.USTAR_FORMAT) as tar:
        for member, text in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode('latin-1')))
    return packed.getvalue()


def tar_member(name, **fields):
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


PACKED = pack_tar([*UNWANTED.items(), *WANTED.items(), ('too/late.py', 'after the module of this interpreter')])


def read_binary(path):
    with open(path, 'rb') as file:
        return file.read()


def write_file(path, text):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, 'w') as file:
        file.write(text)


def files_of(directory):
    """Every file below, by relative path, with what would tell that it was written again."""
    found = {}
    for parent, _, names in os.walk(directory):
        for path in (os.path.join(parent, name) for name in names):
            status = os.lstat(path)
            found[os.path.relpath(path, directory)] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


@contextlib.contextmanager
def as_nobody():
    """As somebody who is not root: where we are root, as user 65534."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


needs_root = unittest.skipIf(os.geteuid(), 'needs root')


class BundleCase(unittest.TestCase):
    """An archive of the real agent.py with a bundle that a few bytes make up, and an empty cache."""

    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.directory = os.path.realpath(temporary.name)
        self.cache = os.path.join(self.directory, 'cache')
        self.archive, self.member = self.build_archive(PACKED)
        self.tree = self.tree_of(self.member)

    @classmethod
    def setUpClass(cls):
        with tempfile.TemporaryDirectory() as directory:
            compiled = py_compile.compile(os.path.join(HERE, 'agent.py'), os.path.join(directory, 'agent.pyc'), doraise=True,
                                          invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
            cls.compiled_agent = read_binary(compiled)

    def build_archive(self, packed, bundle=None, name=None):
        digest = hashlib.sha256(packed).hexdigest()[:16]
        member, path = f'x86_64-{digest}.tar.xz', os.path.join(self.directory, name or f'{digest}.pyz')
        with zipfile.ZipFile(path, 'w') as archive:
            for entry, data in {'__main__.py': MAIN, 'agent.pyc': self.compiled_agent, 'cri_pb2.py': '', 'kubensage_pb2.py': '',
                                'bundle.txt': f'{SUFFIX} {member}\n' if bundle is None else bundle, member: packed}.items():
                if data != 'absent':
                    archive.writestr(entry, data)
        return path, member

    def tree_of(self, member):
        return os.path.join(self.cache, member.partition('.')[0] + SUFFIX[:-len('.so')])

    def environment(self, **more):
        return {'PATH': os.environ['PATH'], 'KUBENSAGE_CACHE': self.cache, **more}

    def start(self, *options, archive=None, cwd=None, umask=-1, **environment):
        return subprocess.run([sys.executable, *options, archive or self.archive], env=self.environment(**environment), umask=umask,
                              cwd=cwd or self.directory, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=15)

    def ready(self):
        return agent.ready_tree(self.archive, self.member, SUFFIX, self.cache)

    def assert_runs(self, result, tree=None):
        tree = tree or self.tree
        self.assertEqual((result.stdout.split(), result.stderr, result.returncode),
                         ([f'{tree}/grpc/__init__.py', f'{tree}/google/__init__.py'], '', 0))

    def assert_one_line(self, result, pattern):
        self.assertRegex(result.stderr, rf'\Akubensage-agent: .*(?:{pattern}).*\n\Z')
        self.assertEqual((result.stdout, result.returncode), ('', 1))

    def assert_refused(self, pattern, archive=None, member=None):
        with self.assertRaisesRegex(agent.BundleError, pattern):
            agent.find_tree(archive or self.archive, member or self.member, SUFFIX, {'KUBENSAGE_CACHE': self.cache})

    def mount(self, options):
        """A tmpfs as the cache."""
        os.mkdir(self.cache)
        command = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', self.cache]
        if os.geteuid() or not shutil.which('mount') or subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
            self.skipTest('needs a mount(2) that is permitted')
        self.addCleanup(subprocess.run, ['umount', '-l', self.cache], check=True)


class CachePlace(BundleCase):
    def test_cache_is_where_the_environment_says(self):
        for expected, environment in [
                ('/c', {'KUBENSAGE_CACHE': '/c', 'XDG_CACHE_HOME': '/x', 'HOME': '/h'}),
                (os.path.abspath('c'), {'KUBENSAGE_CACHE': 'c'}),
                ('/c', {'KUBENSAGE_CACHE': '/b/../c/'}),
                ('/x/kubensage-agent', {'XDG_CACHE_HOME': '/x', 'HOME': '/h'}),
                ('/h/.cache/kubensage-agent', {'KUBENSAGE_CACHE': '', 'XDG_CACHE_HOME': '', 'HOME': '/h/'}),
                (None, {'HOME': ''}),
                (None, {})]:
            with self.subTest(environment), as_nobody():
                self.assertEqual(agent.cache_directory(environment), expected)

    @needs_root
    def test_cache_of_root_is_not_below_a_home(self):
        self.assertEqual(agent.cache_directory({'XDG_CACHE_HOME': '/x', 'HOME': '/h'}), '/var/cache/kubensage-agent')
        self.assertEqual(agent.cache_directory({'KUBENSAGE_CACHE': '/c', 'HOME': '/h'}), '/c')

    def test_unwritable_cache_gives_way_to_a_temporary_one_with_one_warning(self):
        temporary = os.path.join(self.directory, 'tmp')
        os.mkdir(temporary)
        result = self.start(KUBENSAGE_CACHE='/sys/kubensage-agent', TMPDIR=temporary)
        self.assertRegex(result.stdout, rf'\A{temporary}/kubensage-agent-\w+/x86_64-')
        self.assertRegex(result.stderr, rf'\Akubensage-agent: /sys/kubensage-agent .*{temporary}/kubensage-agent-.*KUBENSAGE_CACHE.*\n\Z')
        self.assertEqual((result.returncode, os.listdir(temporary)), (0, []))

    def test_user_without_home_gets_a_temporary_cache(self):
        os.chmod(self.directory, 0o755)
        self.addCleanup(setattr, tempfile, 'tempdir', tempfile.tempdir)
        tempfile.tempdir = os.path.join(self.directory, 'tmp')
        os.mkdir(tempfile.tempdir, 0o755)
        if not os.geteuid():
            os.chown(tempfile.tempdir, NOBODY, NOBODY)
        for environment in {}, {'HOME': '/dev/null'}, {'HOME': '/sys'}, {'HOME': '', 'XDG_CACHE_HOME': '/sys/x'}:
            with self.subTest(environment), as_nobody(), contextlib.redirect_stderr(io.StringIO()) as stderr:
                tree = agent.find_tree(self.archive, self.member, SUFFIX, environment)
                self.assertEqual(os.path.dirname(os.path.dirname(tree)), tempfile.tempdir)
                self.assertEqual(stat.S_IMODE(os.stat(os.path.dirname(tree)).st_mode), 0o700)
                self.assertRegex(stderr.getvalue(), r'\Akubensage-agent: .*for this run alone.*\n\Z')

    def test_path_may_be_written_in_odd_ways(self):
        for written, cwd in (f'/{self.cache}', '/'), (f'{self.cache}//', '/'), ('cache', self.directory), ('./x/../cache', self.directory):
            with self.subTest(written):
                result = self.start(KUBENSAGE_CACHE=written, cwd=cwd)
                result.stdout = result.stdout.replace('//', '/')
                self.assert_runs(result)

    def test_archive_may_lie_anywhere(self):
        odd = os.path.join(self.directory, "a %20%s 'b\u00e9")
        os.mkdir(odd)
        shutil.copy(self.archive, f'{odd}/agent.pyz')
        os.symlink(odd, f'{self.directory}/link')
        for archive, cwd in ('agent.pyz', odd), (f'{odd}/agent.pyz', '/'), ('link/agent.pyz', self.directory), ('../link/agent.pyz', odd):
            with self.subTest(archive):
                self.assert_runs(self.start(archive=archive, cwd=cwd))

    def test_only_what_this_interpreter_needs_is_unpacked(self):
        self.assertEqual(self.ready(), self.tree)
        self.assertEqual(set(files_of(self.tree)), {*WANTED, *BYTE_CODE, agent.MANIFEST})
        for path, text in WANTED.items():
            self.assertEqual(read_binary(f'{self.tree}/{path}').decode(), text)

    def test_nobody_else_may_enter_whatever_the_umask(self):
        for umask in 0, 0o022, 0o777:
            with self.subTest(oct(umask)):
                self.cache = os.path.join(self.directory, oct(umask), 'new', 'cache')
                self.assert_runs(self.start(umask=umask), self.tree_of(self.member))
                for parent, names, files in os.walk(os.path.join(self.directory, oct(umask))):
                    self.assertEqual(stat.S_IMODE(os.stat(parent).st_mode), 0o700, parent)
                    for name in files:
                        self.assertEqual(stat.S_IMODE(os.stat(os.path.join(parent, name)).st_mode), 0o600, name)


class CacheRaces(BundleCase):
    def slow_archive(self, lines):
        """One that takes a while to unpack, and its tree: a module of many lines is compiled."""
        slow = '\n'.join(f'x{number} = [{number}, "a"]' for number in range(lines))
        archive, member = self.build_archive(pack_tar([('grpc/slow.py', slow), *WANTED.items()]))
        return archive, self.tree_of(member)

    def test_ten_starts_at_once_all_succeed(self):
        self.archive, self.tree = self.slow_archive(4000)
        for before in 'absent', 'changed':
            with self.subTest(tree=before):
                if before == 'changed':
                    write_file(f'{self.tree}/grpc/__init__.py', 'raise RuntimeError')
                runs = [subprocess.Popen([sys.executable, self.archive], env=self.environment(), text=True, stdin=subprocess.PIPE,
                                         stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(10)]
                for run in runs:
                    run.stdin.close()
                expected = (f'{self.tree}/grpc/__init__.py\n{self.tree}/google/__init__.py\n', '', 0)
                seen = []
                for run in runs:
                    with run:
                        seen.append((run.stdout.read(), run.stderr.read(), run.wait()))
                self.assertEqual(seen, [expected] * 10)
                self.assertEqual(os.listdir(self.cache), [os.path.basename(self.tree)])
                self.assertTrue(agent.is_intact(self.tree))

    def test_start_killed_while_unpacking_is_made_good_by_the_next(self):
        self.archive, self.tree = self.slow_archive(20000)
        run = subprocess.Popen([sys.executable, self.archive], env=self.environment(), stdin=subprocess.DEVNULL)
        while run.poll() is None and not glob.glob(f'{self.cache}/{agent.UNPACKING}*/grpc'):
            pass
        run.send_signal(signal.SIGKILL)
        self.assertEqual(run.wait(), -signal.SIGKILL)
        self.assertRegex(' '.join(os.listdir(self.cache)), rf'\A{agent.UNPACKING}\S+\Z')
        self.assert_runs(self.start())
        self.assertEqual(os.listdir(self.cache), [os.path.basename(self.tree)])

    def test_leftovers_do_not_keep_the_next_start_from_its_room(self):
        self.mount('size=1m,mode=0700')
        write_file(f'{self.cache}/{agent.UNPACKING}killed/half', 'x' * 900_000)
        self.archive, self.member = self.build_archive(pack_tar([('grpc/big.pem', 'x' * 500_000), *WANTED.items()]))
        self.assert_runs(self.start(), self.tree_of(self.member))

    def test_later_runs_write_nothing(self):
        self.assert_runs(self.start())
        before = files_of(self.cache)
        for options, environment in [((), {}), (('-I',), {}), (('-B',), {}), (('-O',), {}), (('-S', '-E'), {}), (('-s', '-OO'), {}),
                                     ((), {'PYTHONPYCACHEPREFIX': f'{self.directory}/prefix'}), ((), {'PYTHONSAFEPATH': '1'})]:
            with self.subTest(options=options, environment=environment):
                self.assert_runs(self.start(*options, **environment))
                self.assertEqual(files_of(self.cache), before)
                self.assertFalse(os.path.exists(f'{self.directory}/prefix{self.cache}'))

    def test_byte_code_is_in_the_tree_whatever_the_options_of_the_first_run(self):
        for options, environment in [(('-B',), {}), (('-O',), {}), ((), {'PYTHONDONTWRITEBYTECODE': '1'}),
                                     ((), {'PYTHONPYCACHEPREFIX': f'{self.directory}/prefix'})]:
            with self.subTest(options=options, environment=environment):
                shutil.rmtree(self.cache, ignore_errors=True)
                self.assert_runs(self.start(*options, **environment))
                self.assertLessEqual(BYTE_CODE, set(files_of(self.tree)))
                self.assertFalse(os.path.exists(f'{self.directory}/prefix{self.directory}'))

    def test_the_present_version_and_the_one_before_stay(self):
        trees = {}
        for version in '1213':
            archive, member = self.build_archive(pack_tar([('version-1.dist-info/RECORD', version), *WANTED.items()]))
            trees[version] = self.tree_of(member)
            self.assert_runs(self.start(archive=archive), trees[version])
        self.assertEqual(sorted(os.listdir(self.cache)), sorted(os.path.basename(trees[version]) for version in '13'))

    def test_outdated_are_all_but_two_versions_by_last_use(self):
        used = {'a-1.cpython-39-x': 1, 'a-1.cpython-311-x': 6, 'a-2.cpython-39-x': 2, 'a-3.cpython-39-x': 3, 'a-4.cpython-39-x': 4}
        for present, expected in [('a-4.cpython-39-x', ['a-2.cpython-39-x', 'a-3.cpython-39-x']),
                                  ('a-1.cpython-39-x', ['a-2.cpython-39-x', 'a-3.cpython-39-x'])]:
            self.assertEqual(agent.outdated_trees(used, present), expected)
        self.assertEqual(agent.outdated_trees({'a-4.cpython-39-x': 1}, 'a-4.cpython-39-x'), [])

    def test_outdated_tree_goes_once_no_process_holds_it(self):
        for number, name in enumerate(('a-1.cpython-39-x', 'a-2.cpython-39-x', 'a-3.cpython-39-x', 'a-4.cpython-39-x', 'foreign')):
            write_file(f'{self.cache}/{name}/file', '')
            os.utime(f'{self.cache}/{name}', (number, number))
        holder = agent.lock_directory(f'{self.cache}/a-1.cpython-39-x', fcntl.LOCK_SH)
        agent.clean_cache(self.cache, 'a-4.cpython-39-x')
        self.assertEqual(sorted(os.listdir(self.cache)), ['a-1.cpython-39-x', 'a-3.cpython-39-x', 'a-4.cpython-39-x', 'foreign'])
        os.close(holder)
        agent.clean_cache(self.cache, 'a-4.cpython-39-x')
        self.assertEqual(sorted(os.listdir(self.cache)), ['a-3.cpython-39-x', 'a-4.cpython-39-x', 'foreign'])

    def test_running_process_holds_its_tree(self):
        self.assertTrue(agent.hold_tree(self.ready()))
        self.assertIsNone(agent.lock_directory(self.tree, fcntl.LOCK_EX | fcntl.LOCK_NB))

    def test_stray_files_in_the_cache_are_no_trouble(self):
        write_file(f'{self.cache}/a-1.cpython-39-x', 'a file')
        os.symlink('/', f'{self.cache}/a-2.cpython-39-x')
        write_file(f'{self.cache}/{agent.UNPACKING}file', 'a file')
        self.assert_runs(self.start())


class CacheAttacks(BundleCase):
    def setUp(self):
        super().setUp()
        self.marker = os.path.join(self.directory, 'marker')
        self.evil = f'open({self.marker!r}, "w")\n{FAKE_GRPC}'

    def assert_not_imported(self):
        self.assertFalse(os.path.exists(self.marker), 'code that is not from the archive was run')

    def test_path_that_others_could_exchange_ends_the_run(self):
        parent, real = os.path.join(self.directory, 'parent'), os.path.join(self.directory, 'real')
        cache = self.cache = os.path.join(parent, 'cache')
        attacks = {
            'is writable by others': [lambda: os.chmod(parent, 0o777), lambda: os.chmod(parent, 0o775), lambda: os.chmod(cache, 0o707)],
            'is a symbolic link': [lambda: (os.rename(parent, real), os.symlink(real, parent)),
                                   lambda: (os.rename(cache, real), os.symlink(real, cache))],
            'belongs to user 65534': [lambda: os.chown(cache, NOBODY, NOBODY), lambda: os.chown(parent, NOBODY, 0)],
        }
        for pattern, deeds in attacks.items():
            for number, attack in enumerate(deeds):
                with self.subTest(pattern, number=number):
                    shutil.rmtree(real, ignore_errors=True)
                    if os.path.islink(parent):
                        os.remove(parent)
                    shutil.rmtree(parent, ignore_errors=True)
                    os.makedirs(cache)
                    if os.geteuid() and pattern.startswith('belongs'):
                        self.skipTest('needs root')
                    # Even an intact tree in such a place is not used.
                    self.assert_runs(self.start(), self.tree_of(self.member))
                    attack()
                    self.assert_one_line(self.start(), pattern)

    def test_cache_below_a_sticky_directory_is_fine(self):
        os.mkdir(f'{self.directory}/sticky')
        os.chmod(f'{self.directory}/sticky', 0o1777)
        self.cache = f'{self.directory}/sticky/cache'
        self.assertTrue(agent.is_intact(self.ready()))

    def test_cache_that_is_no_directory_ends_the_run(self):
        write_file(self.cache, '')
        self.assert_one_line(self.start(), 'cannot unpack into .*cache')

    def test_tree_that_was_touched_is_replaced_and_never_imported(self):
        compiled, pyc = 'grpc/_cython/cygrpc' + SUFFIX, next(path for path in BYTE_CODE if path.startswith('grpc'))

        def compile_evil():
            write_file(f'{self.directory}/evil.py', self.evil)
            py_compile.compile(f'{self.directory}/evil.py', f'{self.tree}/{pyc}',
                               invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)

        def as_symlink():
            os.rename(self.tree, f'{self.directory}/elsewhere')
            os.symlink(f'{self.directory}/elsewhere', self.tree)

        def as_file():
            shutil.rmtree(self.tree)
            write_file(self.tree, '')

        def exchange(name, make, *arguments):
            os.remove(f'{self.tree}/{name}')
            make(*arguments, f'{self.tree}/{name}')

        write_file(f'{self.directory}/evil/__init__.py', self.evil)
        attacks = {
            'byte of the compiled module': lambda: write_file(f'{self.tree}/{compiled}', 'Compiled'),
            'byte code': compile_evil,
            'source': lambda: write_file(f'{self.tree}/grpc/__init__.py', self.evil),
            'extra .pth': lambda: write_file(f'{self.tree}/evil.pth', f'import sys; {self.evil}'),
            'extra .py': lambda: write_file(f'{self.tree}/grpc.py', self.evil),
            'extra module of the standard library': lambda: write_file(f'{self.tree}/typing_extensions.py', self.evil),
            'missing file': lambda: os.remove(f'{self.tree}/{compiled}'),
            'missing manifest': lambda: os.remove(f'{self.tree}/{agent.MANIFEST}'),
            'empty manifest': lambda: write_file(f'{self.tree}/{agent.MANIFEST}', ''),
            'garbage manifest': lambda: write_file(f'{self.tree}/{agent.MANIFEST}', 'garbage\n'),
            'FIFO': lambda: os.mkfifo(f'{self.tree}/fifo'),
            'FIFO for a file': lambda: exchange('grpc/__init__.py', os.mkfifo),
            'FIFO for the manifest': lambda: exchange(agent.MANIFEST, os.mkfifo),
            'socket': lambda: self.addCleanup(listen(f'{self.tree}/socket').close),
            'symbolic link for a file': lambda: exchange('google/__init__.py', os.symlink, f'{self.directory}/evil/__init__.py'),
            'symbolic link to a directory': lambda: os.symlink(f'{self.directory}/evil', f'{self.tree}/evil'),
            'file others may write': lambda: os.chmod(f'{self.tree}/{compiled}', 0o666),
            'directory others may write': lambda: os.chmod(f'{self.tree}/grpc', 0o777),
            'tree others may write': lambda: os.chmod(self.tree, 0o777),
            'tree is a symbolic link': as_symlink,
            'tree is a file': as_file,
            'file of another user': lambda: os.chown(f'{self.tree}/{compiled}', NOBODY, 0),
            'tree of another user': lambda: os.chown(self.tree, NOBODY, 0),
        }
        for name, attack in attacks.items():
            with self.subTest(name):
                if os.geteuid() and name.endswith('another user'):
                    self.skipTest('needs root')
                shutil.rmtree(f'{self.directory}/elsewhere', ignore_errors=True)
                self.assertTrue(agent.is_intact(self.ready()))
                attack()
                self.assertFalse(agent.is_intact(self.tree))
                self.assert_runs(self.start())
                self.assert_not_imported()
                self.assertEqual(os.listdir(self.cache), [os.path.basename(self.tree)])
                self.assertTrue(agent.is_intact(self.tree))

    def test_directory_left_over_from_an_unpacking_is_not_used(self):
        for name in f'{agent.UNPACKING}x', os.path.basename(self.tree):
            write_file(f'{self.cache}/{name}/grpc/__init__.py', self.evil)
        self.assert_runs(self.start())
        self.assert_not_imported()

    def test_byte_code_of_another_cache_prefix_is_not_imported(self):
        prefix = f'{self.directory}/prefix'
        self.assert_runs(self.start(PYTHONPYCACHEPREFIX=prefix))
        write_file(f'{self.directory}/evil.py', self.evil)
        for name in 'grpc', 'google':
            py_compile.compile(f'{self.directory}/evil.py', f'{prefix}{self.tree}/{name}/__init__.{sys.implementation.cache_tag}.pyc',
                               invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
        self.assert_runs(self.start(PYTHONPYCACHEPREFIX=prefix))
        self.assert_not_imported()

    def test_hostile_member_names_end_the_run(self):
        for number, member in enumerate([
                f'{self.directory}/outside.py', '../outside.py', '../../outside.py', 'grpc/../../../outside.py', '..',
                tar_member('link.py', type=tarfile.SYMTYPE, linkname=self.directory),
                tar_member('link.py', type=tarfile.LNKTYPE, linkname='grpc/__init__.py'),
                tar_member('null.py', type=tarfile.CHRTYPE, devmajor=1, devminor=3), tar_member('disk.py', type=tarfile.BLKTYPE),
                tar_member('fifo.py', type=tarfile.FIFOTYPE), tar_member('odd.py', type=b'\xfe')]):
            with self.subTest(str(member), number=number):
                archive, member = self.build_archive(pack_tar([(member, ''), *WANTED.items()]))
                self.assert_refused('not to be trusted', archive, member)
                self.assertEqual((os.listdir(self.cache), glob.glob(f'{self.directory}/out*')), ([], []))
        self.assert_one_line(self.start(archive=archive), 'not to be trusted')

    def test_member_named_twice_ends_the_run(self):
        archive, _ = self.build_archive(pack_tar([('grpc/__init__.py', self.evil), *WANTED.items()]))
        self.assert_one_line(self.start(archive=archive), '')
        self.assertEqual(os.listdir(self.cache), [])

    def test_grpc_that_lies_around_is_not_imported(self):
        around, site = os.path.join(self.directory, 'around'), os.path.join(self.directory, 'site')
        for place in around, site:
            for name in 'grpc', 'google', 'google/protobuf', 'typing_extensions':
                write_file(f'{place}/{name}/__init__.py', self.evil)
        write_file(f'{site}/grpcio-9.9.9.dist-info/METADATA', 'Name: grpcio\nVersion: 9.9.9\n')
        # What the .pth file of a namespace package does, before the agent starts.
        write_file(f'{site}/google-nspkg.pth', 'import sys, types; sys.modules.update(google=types.ModuleType("google"), '
                                               'grpc=types.ModuleType("grpc"), **{"google.protobuf": types.ModuleType("x")})\n')
        write_file(f'{self.directory}/custom/sitecustomize.py', f'import site\nsite.addsitedir({site!r})\n')
        for options, environment in [((), {}), ((), {'PYTHONPATH': around}), ((), {'PYTHONPATH': f':{around}:{self.directory}/custom'}),
                                     (('-I',), {'PYTHONPATH': around})]:
            with self.subTest(options=options, environment=environment):
                self.assert_runs(self.start(*options, cwd=around, **environment))
                self.assert_not_imported()


class BundleTroubles(BundleCase):
    def test_no_target_and_no_grpcio_is_one_line(self):
        archive, _ = self.build_archive(PACKED, f'{OTHER_SUFFIX} a.tar.xz\n.cpython-301-vax-linux-gnu.so a.tar.xz\n', 'other.pyz')
        self.assert_one_line(self.start('-I', '-S', archive=archive), f'{SUFFIX[1:-3]}: other.pyz has it for '
                             'cpython-300-pdp11-linux-gnu, cpython-301-vax-linux-gnu; .*build_zipapp.sh --native')

    def test_no_target_leaves_it_to_an_installed_grpcio(self):
        archive, _ = self.build_archive(PACKED, f'{OTHER_SUFFIX} a.tar.xz\n')
        for name in 'grpc', 'google':
            write_file(f'{self.directory}/installed/{name}/__init__.py', WANTED[f'{name}/__init__.py'])
        self.assert_runs(self.start(archive=archive, PYTHONPATH=f'{self.directory}/installed'), f'{self.directory}/installed')
        self.assertFalse(os.path.exists(self.cache))

    def test_damaged_archive_is_one_line_and_leaves_no_tree(self):
        # xz stores what it cannot compress, and its check comes last: a flipped bit of the first noise is not noticed by it.
        noise = b''.join(hashlib.sha256(bytes([number >> 8, number & 255])).digest() for number in range(6000)).decode('latin-1')
        large = pack_tar([*list(WANTED.items())[:-1], ('grpc/_cython/cygrpc' + SUFFIX, noise), ('after' + OTHER_SUFFIX, noise)])
        middle, member = len(large) // 3, f'x86_64-{hashlib.sha256(large).hexdigest()[:16]}.tar.xz'
        self.ready()
        for name, packed, bundle in [
                ('flipped bit', large[:middle] + bytes([large[middle] ^ 1]) + large[middle + 1:], None),
                ('truncated', large[:middle], None), ('empty', b'', None), ('no xz', b'not xz at all', None),
                ('no tar', lzma.compress(b'not a tar at all' * 100), None), ('no module for it', pack_tar(UNWANTED.items()), None),
                ('no such member', large, f'{SUFFIX} absent.tar.xz'), ('no bundle.txt', large, 'absent'),
                ('bundle.txt is garbage', large, 'a b c\n'), ('bundle.txt is binary', large, b'\xff\xfe')]:
            with self.subTest(name):
                archive, _ = self.build_archive(packed, bundle or (f'{SUFFIX} {member}' if name == 'flipped bit' else None))
                if name == 'flipped bit':
                    with zipfile.ZipFile(archive, 'a') as file:
                        file.writestr(member, packed)
                self.assert_one_line(self.start('-I', '-S', archive=archive), 'damaged|not to be trusted|no bundle')
                self.assertEqual(os.listdir(self.cache), [os.path.basename(self.tree)])

    def test_full_disk_is_one_line(self):
        self.mount('size=200k,mode=0700')
        self.archive, _ = self.build_archive(pack_tar([('grpc/big.pem', 'x' * 1_000_000), *WANTED.items()]))
        self.assert_one_line(self.start(), f'cannot unpack into {self.cache}: No space left on device')
        self.assertEqual(os.listdir(self.cache), [])

    def test_mount_without_exec_is_one_line(self):
        self.mount('noexec,mode=0700')
        self.assert_one_line(self.start(), f'{self.cache} is mounted noexec')

    def test_cache_that_is_read_only_serves_if_it_is_intact(self):
        self.mount('mode=0700')
        self.assert_runs(self.start())
        subprocess.run(['mount', '-o', 'remount,ro', self.cache], check=True)
        self.assert_runs(self.start())
        other, _ = self.build_archive(pack_tar([('other.pem', ''), *WANTED.items()]))
        result = self.start(archive=other)
        self.assertRegex(result.stderr, r'\Akubensage-agent: .*Read-only file system.*for this run alone.*\n\Z')

    def test_parsers_take_what_the_writers_write(self):
        self.assertEqual(agent.parse_targets('.cpython-39-x.so a-1.tar.xz\n.cpython-310-x.so a-1.tar.xz\n'),
                         {'.cpython-39-x.so': 'a-1.tar.xz', '.cpython-310-x.so': 'a-1.tar.xz'})
        self.assertEqual(agent.parse_manifest('12ab 1 2 3 grpc/a b.py\n34cd 4 5 6 x\n'), {'grpc/a b.py': ('12ab', 1, 2, 3), 'x': ('34cd', 4, 5, 6)})
        self.ready()
        with open(f'{self.tree}/{agent.MANIFEST}') as file:
            manifest = agent.parse_manifest(file.read())
        self.assertEqual({path: entry.sha256 for path, entry in manifest.items()}, {path: hashlib.sha256(read_binary(f'{self.tree}/{path}')).hexdigest()
                                    for path in {*WANTED, *BYTE_CODE}})

    def test_module_outside_an_archive_unpacks_nothing_if_grpcio_is_there(self):
        with_grpcio = agent.importlib.util.find_spec('grpc') is not None
        self.assertEqual(agent.find_archive(), None if with_grpcio else REAL_ARCHIVE)


def listen(path):
    server = socket.socket(socket.AF_UNIX)
    server.bind(path)
    return server


@unittest.skipUnless(os.path.exists(REAL_ARCHIVE), 'kubensage-agent.pyz has not been built: ./build_zipapp.sh')
class RealArchive(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.cache, cls.home = os.path.join(directory.name, 'cache'), os.path.join(directory.name, 'home')
        os.mkdir(cls.home)
        with zipfile.ZipFile(REAL_ARCHIVE) as archive:
            cls.targets = agent.parse_targets(archive.read('bundle.txt').decode())

    def start(self, *arguments):
        result = subprocess.run([sys.executable, *arguments], env={'PATH': os.environ['PATH'], 'KUBENSAGE_CACHE': self.cache,
                                                                   'HOME': self.home}, capture_output=True, text=True, timeout=60)
        self.assertEqual(result.returncode, 0, result.stderr)
        return result.stdout

    def test_archive_runs_with_this_interpreter(self):
        for options in (), ('-I',):
            with self.subTest(options):
                self.assertEqual(self.start(*options, REAL_ARCHIVE, '--version'), f'kubensage-agent {agent.__version__}\n')
                node = json.loads(self.start(*options, REAL_ARCHIVE, '--once', '--output', 'json'))
                self.assertIn('nodeMetrics', {re.sub(r'_(.)', lambda match: match.group(1).upper(), key) for key in node})
        self.assertEqual(os.listdir(self.home), [])

    def test_archive_wins_over_what_is_installed(self):
        code = f'import sys; sys.path.insert(0, {REAL_ARCHIVE!r}); import agent, google.protobuf; print(agent.grpc, google.protobuf)'
        self.assertEqual(self.start('-c', code).count(self.cache), 2)

    def test_archive_has_every_python_on_both_processors_within_its_size(self):
        if len(self.targets) == 1:
            self.skipTest('built with --native')
        self.assertEqual(set(self.targets), {f'.cpython-3{minor}-{processor}-linux-gnu.so' for minor in range(9, 15)
                                             for processor in ('x86_64', 'aarch64')})
        self.assertLessEqual(os.path.getsize(REAL_ARCHIVE), 24_000_000)


class Build(unittest.TestCase):
    """build_zipapp.sh in a copy, among the commands that we let it see."""
    COMMANDS = 'bash cat chmod cp cut dirname find grep head mkdir mv rm sed sha256sum sort tail tar touch uname wc xz'.split()

    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.directory, self.commands = f'{temporary.name}/copy', f'{temporary.name}/bin'
        for name in 'agent.py', 'cri_pb2.py', 'kubensage_pb2.py', 'build_zipapp.sh':
            os.makedirs(self.directory, exist_ok=True)
            shutil.copy(os.path.join(HERE, name), self.directory)
        os.mkdir(self.commands)
        for name in self.COMMANDS:
            os.symlink(shutil.which(name) or self.skipTest(f'needs {name}'), f'{self.commands}/{name}')
        self.stub('python3', f'exec {sys.executable} "$@"')

    def stub(self, name, script):
        write_file(f'{self.commands}/{name}', f'#!{shutil.which("bash")}\n{script}\n')
        os.chmod(f'{self.commands}/{name}', 0o755)

    def build(self, *arguments, script='./build_zipapp.sh', cwd=None):
        return subprocess.run(['bash', script, *arguments], cwd=cwd or self.directory, env={'PATH': self.commands},
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)

    def pins(self):
        with open(os.path.join(HERE, 'build_zipapp.sh')) as file:
            return re.search(r"^WHEELS='\n(.*?)^'", file.read(), re.S | re.M).group(1)

    def test_pins_are_fifteen_wheels_with_their_hashes(self):
        rows = [line.split('  ') for line in self.pins().splitlines()]
        self.assertTrue(all(re.fullmatch('[0-9a-f]{64}', digest) for digest, _ in rows))
        names = [name for _, name in rows]
        self.assertEqual((len(set(names)), len({digest for digest, _ in rows})), (15, 15))
        for processor in 'x86_64', 'aarch64':
            self.assertEqual([sum(processor in name and name.startswith(project) for name in names) for project in ('grpcio-', 'protobuf-')],
                             [6, 1])

    def test_what_is_missing_is_said_in_one_line(self):
        no_pip = f'case "$*" in *pip*) exit 1; esac; exec {sys.executable} "$@"'
        offline = ('case "$*" in *pip\\ --version*) exit; esac; '
                   'case "$*" in *pip\\ download*) echo "WARNING: Retrying" >&2; echo "ERROR: no route to host" >&2; exit 1; esac; '
                   f'exec {sys.executable} "$@"')
        for pattern, arguments, command, script in [
                ('unknown argument --nativ; --native', ['--nativ'], None, ''), ('xz is missing .*xz-utils', [], 'xz', ''),
                ('python3 is missing', [], 'python3', ''), ('has no pip .*python3-pip', [], 'python3', no_pip),
                ('cannot download grpcio-.*ERROR: no route to host', [], 'python3', offline),
                ('no grpcio wheel for cp\\d+ on pdp11', ['--native'], 'uname', 'echo pdp11')]:
            with self.subTest(pattern):
                kept = os.path.join(self.commands, f'{command}.kept')
                if command:
                    os.rename(f'{self.commands}/{command}', kept)
                if script:
                    self.stub(command, script)
                result = self.build(*arguments)
                self.assertRegex(result.stderr, rf'\Abuild_zipapp.sh: .*{pattern}.*\n\Z')
                self.assertEqual((result.returncode, result.stdout, glob.glob(f'{self.directory}/*.pyz')), (1, '', []))
                if command:
                    os.replace(kept, f'{self.commands}/{command}')

    def test_wheel_with_another_hash_is_refused(self):
        write_file(f'{self.directory}/.build/{self.pins().split()[3]}', 'other')
        write_file(f'{self.directory}/build_zipapp.sh', re.sub(r"(?s)^WHEELS='.*?^'", "WHEELS='\n" + '  '.join(self.pins().split()[2:4]) + "\n'",
                                                               self.script(), flags=re.M))
        self.assertRegex(self.build().stderr, r'\Abuild_zipapp.sh: \S+whl has another hash than the pinned one.*\n\Z')

    def script(self):
        with open(os.path.join(HERE, 'build_zipapp.sh')) as file:
            return file.read()

    def test_archive_of_small_wheels_is_the_same_from_anywhere_and_runs(self):
        """The pins of the copy are those of wheels of a few bytes, for this interpreter."""
        python, processor = f'cp3{sys.version_info.minor}', os.uname().machine
        wheels = {f'grpcio-1-{python}-{python}-manylinux_{processor}.whl': ['grpc/__init__.py', 'grpc/_cython/cygrpc' + SUFFIX],
                  f'protobuf-6-cp39-abi3-manylinux_{processor}.whl': ['google/_upb/_message.abi3.so', 'protobuf-6.dist-info/METADATA']}
        pins = ''
        for name, members in wheels.items():
            os.makedirs(f'{self.directory}/.build', exist_ok=True)
            with zipfile.ZipFile(f'{self.directory}/.build/{name}', 'w') as wheel:
                for member in members:
                    wheel.writestr(member, WANTED[member])
            pins += f'{hashlib.sha256(read_binary(wheel.filename)).hexdigest()}  {name}\n'
        write_file(f'{self.directory}/build_zipapp.sh', self.script().replace(self.pins(), pins))
        archive, seen = f'{self.directory}/kubensage-agent.pyz', []
        for script, cwd in ('./build_zipapp.sh', self.directory), ('copy/build_zipapp.sh', os.path.dirname(self.directory)):
            result = self.build('--native', script=script, cwd=cwd)
            self.assertEqual((result.stderr, result.returncode), ('', 0))
            seen.append(read_binary(archive))
        self.assertEqual(seen[0], seen[1])
        with zipfile.ZipFile(archive) as file:
            self.assertEqual({info.date_time for info in file.infolist()}, {(1980, 1, 1, 0, 0, 0)})
            self.assertEqual(file.namelist(), sorted(file.namelist()))
            [(suffix, member)] = agent.parse_targets(file.read('bundle.txt').decode()).items()
            self.assertEqual((suffix, member), (SUFFIX, f'{processor}-{hashlib.sha256(file.read(member)).hexdigest()[:16]}.tar.xz'))
        cache = f'{self.directory}/cache'
        result = subprocess.run([archive], env={'PATH': f'{self.commands}:{os.environ["PATH"]}', 'KUBENSAGE_CACHE': cache}, text=True,
                                capture_output=True, timeout=15)
        self.assertRegex(result.stdout, f'{cache}/.*/grpc/__init__.py\n{cache}/.*/google/__init__.py\n')
        self.assertEqual((result.stderr, result.returncode), ('', 0))


# --- files

class FilesTest(AgentTest):
    def test_what_is_absent_is_none(self):
        root = self.tree({'file': 'x'})
        for path in ('none', 'no/directory', 'file/below'):
            for read in (agent.read_bytes, agent.read_small, agent.read_text, agent.read_line, agent.read_int, agent.open_file):
                with self.subTest(read=read.__name__, path=path):
                    self.assertIsNone(read(root, path))
        self.assertEqual([], agent.read_names(root, 'none'))
        self.assertEqual([], agent.read_names(root, 'file'))

    def test_what_this_user_may_not_read_is_none(self):
        root = self.tree({'file': 'x', 'directory/x': ''})
        for name in ('file', 'directory'):
            os.chmod(f'{root}/{name}', 0)
            self.addCleanup(os.chmod, f'{root}/{name}', 0o700)
        if os.geteuid() == 0:    # who may read everything
            os.chmod(root, 0o755)
            self.addCleanup(os.seteuid, 0)
            os.seteuid(65534)
        self.assertIsNone(agent.read_text(root, 'file'))
        self.assertEqual([], agent.read_names(root, 'directory'))

    def test_other_errors_are_the_callers(self):
        """/proc/PID/mem opens, and has nothing at address 0: EIO."""
        with self.assertRaises(OSError):
            agent.read_small('/proc/self', 'mem')
        with self.assertRaises(OSError) as raised:
            agent.read_bytes('/proc/self', 'mem')
        self.assertEqual(errno.EIO, raised.exception.errno)

    def test_speed_of_loopback_is_none(self):
        try:
            with open('/sys/class/net/lo/speed') as file:
                file.read()
        except OSError as error:
            if isinstance(error, (FileNotFoundError, PermissionError)):
                self.skipTest(f'/sys/class/net/lo/speed: {error}')
        else:
            self.skipTest('this kernel knows a speed of lo')
        self.assertIsNone(agent.read_int('/sys', 'class/net/lo/speed'))
        with self.assertRaises(OSError):
            agent.read_text('/sys', 'class/net/lo/speed')

    def test_file_longer_than_one_read(self):
        data = bytes(range(256)) * 1024
        self.assertEqual(data, agent.read_bytes(self.tree({'long': data}), 'long'))

    def test_text_that_is_not_utf8(self):
        self.assertEqual('a\ufffd\ufffd\n', agent.read_text(self.tree({'comm': b'a\xff\xfe\n'}), 'comm'))

    def test_line_is_without_white_space_and_empty_is_none(self):
        root = self.tree({'a': ' one two \n', 'empty': '', 'blank': ' \n'})
        self.assertEqual(['one two', None, None], [agent.read_line(root, name) for name in ('a', 'empty', 'blank')])

    def test_numbers(self):
        root = self.tree({'decimal': '12\n', 'hex': '0x1003\n', 'negative': '-1\n', 'empty': '\n', 'word': 'up\n'})
        values = [agent.read_int(root, name) for name in ('decimal', 'hex', 'negative', 'empty')]
        self.assertEqual([12, 0x1003, -1, None], values)
        with self.assertRaisesRegex(ValueError, "word.*'up'"):
            agent.read_int(root, 'word')

    def test_malformed_line_is_named_with_its_file_and_shortened(self):
        for error in agent.MALFORMED:
            def fail(line):
                raise error(line)
            with self.subTest(error=error.__name__), self.assertRaisesRegex(ValueError, r"^f: malformed line: 'x{200}'$"):
                agent.parse_lines('f', ['x' * 999], fail)


# --- files that stay open

class OpenFilesTest(AgentTest):
    def open(self, *paths):
        files = agent.OpenFiles(len(paths))
        files.descriptors[:] = [agent.open_file(*path) for path in paths]
        return files

    def test_what_they_say_is_read_from_their_beginning_each_time(self):
        root = self.tree({'a': '1\n', 'b': ''})
        files = self.open((root, 'a'), (root, 'none'), (root, 'b'))
        self.assertEqual((b'1\n', None, b''), agent.read_open_files(files.descriptors))
        write_tree(root, {'a': '22\n'})
        self.assertEqual((b'22\n', None, b''), agent.read_open_files(files.descriptors))

    def test_one_that_has_gone_is_none_and_the_others_are_read(self):
        """As a control group's, whose files answer ENODEV then; a process's answer ESRCH."""
        with subprocess.Popen(['sleep', '60']) as process:
            files = self.open(('/proc', f'{process.pid}/statm'), ('/proc', 'self/statm'))
            self.assertTrue(all(agent.read_open_files(files.descriptors)))
            process.kill()
        gone, present = agent.read_open_files(files.descriptors)
        self.assertEqual((None, True), (gone, bool(present)))

    def test_other_errors_are_the_callers(self):
        files = self.open(('/proc', 'self/statm'), ('/proc/self', 'mem'))
        with self.assertRaises(OSError):
            agent.read_open_files(files.descriptors)

    def test_the_limit_is_raised_as_far_as_that_is_granted(self):
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, limits[1]))
        agent.raise_open_files_limit()
        expected = min(limits[1], agent.MAX_OPEN_FILES) if limits[1] > 0 else agent.MAX_OPEN_FILES
        self.assertEqual((expected, limits[1]), resource.getrlimit(resource.RLIMIT_NOFILE))
        agent.raise_open_files_limit()
        self.assertEqual(expected, agent.open_files_limit())
        with mock.patch.object(resource, 'setrlimit', side_effect=PermissionError):
            resource.prlimit(0, resource.RLIMIT_NOFILE, (300, limits[1]))
            agent.raise_open_files_limit()
        self.assertEqual(300, agent.open_files_limit())


# --- CPU

# `cpu 1 2 3 4`
FOUR = wire.CpuSeconds(user=0.01, nice=0.02, system=0.03, idle=0.04)


class CpuTest(AgentTest):
    def test_stat(self):
        ten = ' '.join(map(str, range(1, 11)))
        self.check_parse(agent.parse_stat, {
            'real': (STAT, (
                {'cpu': agent.CpuTimes(11325, 0, 15923, 20895, 113, 0, 487),
                 'cpu0': agent.CpuTimes(5728, 0, 8092, 10188, 73, 0, 241),
                 'cpu1': agent.CpuTimes(5597, 0, 7830, 10707, 40, 0, 245)},
                {'intr': 223011, 'ctxt': 297051, 'btime': 1795425261, 'processes': 2860, 'procs_running': 2,
                 'procs_blocked': 0, 'softirq': 123636})),
            'columns in order': (f'cpu {ten}', ({'cpu': agent.CpuTimes(
                user=1, nice=2, system=3, idle=4, iowait=5, irq=6, softirq=7, steal=8, guest=9, guest_nice=10)}, {})),
            'oldest': ('cpu0 1 2 3 4', ({'cpu0': agent.CpuTimes(1, 2, 3, 4, 0, 0, 0, 0, 0, 0)}, {})),
            'extra column': (f'cpu {ten} 11', ({'cpu': agent.CpuTimes(*range(1, 11))}, {})),
            'empty': ('', ({}, {})),
        }, {
            'too few columns': ('cpu 1 2 3\n', "stat: malformed line: 'cpu 1 2 3'"),
            'not a number': ('btime 1\ncpu 1 2 x 4\n', "'cpu 1 2 x 4'"),
            'no number': ('ctxt\n', "'ctxt'"),
        })

    def test_cpuinfo(self):
        self.check_parse(agent.parse_cpuinfo, {
            'x86': (CPUINFO_X86, {number: {
                'processor': str(number), 'vendor_id': 'AuthenticAMD', 'model': '107', 'model name': 'QEMU TCG CPU version 2.5+',
                'cpu MHz': '2596.131', 'physical id': '0', 'core id': str(number), 'flags': 'fpu de pse',
                'power management': ''} for number in (0, 1)}),
            'ARM': (CPUINFO_ARM, {0: {
                'processor': '0', 'BogoMIPS': '125.00', 'Features': 'fp asimd evtstrm aes', 'CPU implementer': '0x41',
                'CPU architecture': '8', 'CPU variant': '0x4', 'CPU part': '0xd0c', 'CPU revision': '1'}}),
            'a last block that is no CPU': ('processor: 3\n\nHardware: BCM2835\n', {3: {'processor': '3'}}),
            'value with a colon': ('processor: 0\nisa: a:b\n', {0: {'processor': '0', 'isa': 'a:b'}}),
            'empty': ('', {}),
        }, {
            'no colon': ('processor: 0\nmodel\n', "cpuinfo: malformed line: 'model'"),
            'processor is no number': ('processor: first\n', "'first'"),
        })

    def test_percent_is_busy_of_elapsed_time(self):
        zero = agent.CpuTimes(0, 0, 0, 0)
        self.check_table(agent.cpu_percent, [
            ((zero, agent.CpuTimes(*range(1, 11))), 75.0),    # of 1 + ... + 8, without idle 4 and iowait 5; guest is in user
            ((zero, agent.CpuTimes(1, 2, 3, 4)), 60.0),
            ((zero, agent.CpuTimes(0, 0, 0, 7, 3)), 0.0),
            ((agent.CpuTimes(100, 0, 0, 100), agent.CpuTimes(130, 0, 0, 170)), 30.0),
            ((agent.CpuTimes(1, 0, 0, 50), agent.CpuTimes(6, 0, 0, 40)), 100.0),              # idle went backwards
            ((agent.CpuTimes(1, 0, 0, 1, 50), agent.CpuTimes(2, 0, 0, 2, 40)), 50.0),         # iowait went backwards
            ((agent.CpuTimes(*range(1, 11)), agent.CpuTimes(*range(1, 11))), None),
        ])

    def test_arm_names_are_those_of_lscpu_and_else_the_numbers(self):
        self.check_table(agent.arm_names, [
            (('0x41', '0xd0c'), ('ARM', 'Neoverse-N1')),
            (('0xc0', '0xac4'), ('Ampere', 'Ampere-1a')),
            (('0x41', '0xfff'), ('ARM', '0x41/0xfff')),
            (('0x7f', '0xd0c'), ('0x7f', '0x7f/0xd0c')),
        ])

    def test_cores_are_distinct_core_ids_of_a_package(self):
        cpus = [agent.CpuIdentity(None, None, package, core, None)
                for package, core in ((0, 0), (0, 0), (0, 1), (1, 0), (1, None))]
        self.assertEqual({0: 2, 1: 1}, agent.cores_by_package(cpus))

    def collect(self, files, before=None):
        return agent.collect_cpu(roots_below(self.tree(files)), before)

    def test_cpu_of_sysfs_and_cpuinfo(self):
        fields, _ = self.collect({
            'proc/stat': 'cpu 1 2 3 4\ncpu0 1 2 3 4\ncpu3 1 2 3 4\nbtime 5\n', 'proc/cpuinfo': CPUINFO_X86,
            'sys/devices/system/cpu/cpu0/topology/physical_package_id': '7\n',
            'sys/devices/system/cpu/cpu0/topology/core_id': '8\n',
            'sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq': '3500999\n',
        })
        self.assertEqual([
            wire.CpuInfo(cpu=0, cores=1, model='QEMU TCG CPU version 2.5+', vendor_id='AuthenticAMD', mhz=3500,
                         physical_id='7', core_id='8', seconds=FOUR), wire.CpuInfo(cpu=3, seconds=FOUR)], fields['cpu_infos'])
        self.assertEqual((5, None), (fields['boot_time'], fields['total_cpu_percentage']))

    def test_seconds_are_hundredths_in_the_order_of_the_columns(self):
        times, _ = agent.parse_stat('cpu 100 200 300 400 500 600 700 800 900 1000\n')
        self.assertEqual(wire.CpuSeconds(user=1, nice=2, system=3, idle=4, iowait=5, irq=6, softirq=7, steal=8, guest=9,
                                         guest_nice=10), agent.build_cpu_seconds(times['cpu']))

    def test_idle_and_iowait_never_go_back_by_a_little(self):
        """By more than three seconds, the CPU was offline meanwhile."""
        before = agent.CpuTimes(1, 1, 1, 1000, 1000)
        self.check_table(lambda idle, iowait: agent.without_steps_back(before, agent.CpuTimes(2, 2, 2, idle, iowait))[:5], [
            ((1001, 1002), (2, 2, 2, 1001, 1002)), ((701, 1002), (2, 2, 2, 1000, 1002)), ((700, 999), (2, 2, 2, 700, 1000)),
            ((0, 0), (2, 2, 2, 0, 0))])
        _, first = self.collect({'proc/stat': 'cpu 1 1 1 50 60\n'})
        fields, second = self.collect({'proc/stat': 'cpu 2 1 1 40 50\n'}, first)
        self.assertEqual((0.5, 0.6), (fields['cpu_seconds'].idle, fields['cpu_seconds'].iowait))
        self.assertEqual((50, 60), second.times['cpu'][3:5])

    def test_kernel_activity(self):
        fields, _ = self.collect({'proc/stat': STAT})
        self.assertEqual(wire.KernelActivity(procs_running=2, procs_blocked=0, forks_total=2860, context_switches_total=297051,
                                             interrupts_total=223011), fields['kernel_activity'])

    def test_counters_are_those_of_vmstat(self):
        def oracle():
            words = (line.split(None, 1) for line in self.tool('vmstat', '-s').splitlines())
            names = {'interrupts': 'interrupts_total', 'CPU context switches': 'context_switches_total', 'forks': 'forks_total'}
            return {names[name]: int(number) for number, name in words if name in names}
        before, fields, after = oracle(), agent.collect_cpu(LIVE, None)[0], oracle()
        for name in before:
            self.assertTrue(before[name] <= getattr(fields['kernel_activity'], name) <= after[name], name)

    def test_cpu_without_sysfs_has_the_topology_of_cpuinfo(self):
        fields, _ = self.collect({'proc/stat': 'cpu1 1 2 3 4\n', 'proc/cpuinfo': CPUINFO_X86})
        self.assertEqual([wire.CpuInfo(cpu=1, cores=1, model='QEMU TCG CPU version 2.5+', vendor_id='AuthenticAMD',
                                       mhz=2596, physical_id='0', core_id='1', seconds=FOUR)], fields['cpu_infos'])

    def test_arm_cpu_has_names_and_package_minus_one_is_none(self):
        topology = {f'sys/devices/system/cpu/cpu0/topology/{name}': '-1\n' for name in ('physical_package_id', 'core_id')}
        fields, _ = self.collect({'proc/stat': 'cpu0 1 2 3 4\n', 'proc/cpuinfo': CPUINFO_ARM, **topology})
        self.assertEqual([wire.CpuInfo(cpu=0, model='Neoverse-N1', vendor_id='ARM', seconds=FOUR)], fields['cpu_infos'])

    def test_usage_is_since_the_previous_sample(self):
        _, before = self.collect({'proc/stat': 'cpu 10 0 0 10\ncpu0 5 0 0 5\ncpu1 5 0 0 5\n'})
        fields, _ = self.collect({'proc/stat': 'cpu 19 0 0 11\ncpu0 8 0 0 6\ncpu1 5 0 0 5\ncpu2 1 0 0 1\n'}, before)
        self.assertEqual(90.0, fields['total_cpu_percentage'])
        self.assertEqual([(0, 75.0), (1, None), (2, None)],
                         [(cpu.cpu, cpu.usage if cpu.HasField('usage') else None) for cpu in fields['cpu_infos']])

    def test_identities_are_read_again_when_other_cpus_are_online(self):
        _, before = self.collect({'proc/stat': 'cpu0 1 2 3 4\n', 'proc/cpuinfo': CPUINFO_X86})
        _, same = self.collect({'proc/stat': 'cpu0 1 2 3 4\n', 'proc/cpuinfo': CPUINFO_ARM}, before)
        _, other = self.collect({'proc/stat': 'cpu0 1 2 3 4\ncpu1 1 2 3 4\n', 'proc/cpuinfo': CPUINFO_ARM}, before)
        self.assertIs(before.identities, same.identities)
        self.assertEqual(['Neoverse-N1', None], [cpu.model for cpu in other.identities.values()])

    def test_cpus_are_those_that_getconf_counts(self):
        fields, _ = agent.collect_cpu(LIVE, None)
        self.assertEqual(int(self.tool('getconf', '_NPROCESSORS_ONLN')), len(fields['cpu_infos']))

    def test_cpus_of_this_process_are_those_that_nproc_counts(self):
        fields, _ = agent.collect_cpu(LIVE, None)
        numbers = {cpu.cpu for cpu in fields['cpu_infos']} & os.sched_getaffinity(0)
        self.assertEqual(int(self.tool('env', '-u', 'OMP_NUM_THREADS', '-u', 'OMP_THREAD_LIMIT', 'nproc')), len(numbers))


# --- load

class LoadTest(AgentTest):
    def test_loadavg(self):
        self.check_parse(agent.parse_loadavg, {
            'real': (LOADAVG, agent.LoadAvg(1.38, 1.73, 0.83, 2, 229)),
            'counting': ('1.5 2.5 3.5 4/5 6\n', agent.LoadAvg(load1=1.5, load5=2.5, load15=3.5, runnable_threads=4, threads=5)),
            'extra column and line': ('1 2 3 4/5 6 7\nx\n', agent.LoadAvg(1, 2, 3, 4, 5)),
        }, {
            'cut': ('1 2 3\n', "loadavg: malformed line: '1 2 3'"), 'no slash': ('1 2 3 4 5\n', "'1 2 3 4 5'"),
            'not a number': ('1 x 3 4/5 6\n', "'1 x 3 4/5 6'"), 'empty': ('', 'loadavg'),
        })

    def test_load_is_a_message_of_the_same_names(self):
        fields, _ = agent.collect_load(roots_below(self.tree({'proc/loadavg': '1 2 3 4/5 6\n'})), None)
        self.assertEqual(wire.LoadAverage(load1=1, load5=2, load15=3, runnable_threads=4, threads=5), fields['load_average'])

    def test_load_is_that_of_uptime(self):
        listed, fields = self.settled(lambda: re.findall(r'[\d.]+', self.tool('uptime').partition('load average:')[2]),
                                      lambda: agent.collect_load(LIVE, None)[0])
        load = fields['load_average']
        for text, value in zip(listed, (load.load1, load.load5, load.load15)):
            self.assertAlmostEqual(float(text), value, delta=0.5)


# --- limits of the kernel

class KernelLimitsTest(AgentTest):
    def test_file_nr(self):
        self.check_parse(agent.parse_file_nr, {
            'real': (FILE_NR, (832, 2 ** 63 - 1)), 'counting': ('1 2 3\n', (1, 3)),
        }, {
            'cut': ('1 2\n', "file-nr: malformed line: '1 2'"), 'not a number': ('x 0 3\n', "'x 0 3'"), 'empty': ('', 'file-nr'),
        })

    def collect(self, files):
        return agent.collect_kernel_limits(roots_below(self.tree(files)), None)[0]['kernel_limits']

    def test_limits_of_their_files(self):
        self.assertEqual(wire.KernelLimits(
            file_descriptors_allocated=832, file_descriptors_max=2 ** 63 - 1, threads=229, threads_max=31175, pid_max=4194304,
            conntrack_entries=129, conntrack_max=65536), self.collect(NODE))

    def test_conntrack_is_absent_until_its_module_is_loaded(self):
        limits = self.collect({path: text for path, text in NODE.items() if 'conntrack' not in path})
        self.assertFalse(limits.HasField('conntrack_entries') or limits.HasField('conntrack_max'))
        self.assertTrue(limits.HasField('pid_max'))

    def test_limits_are_those_of_sysctl(self):
        names = ('fs.file-nr', 'kernel.threads-max', 'kernel.pid_max')
        listed, fields = self.settled(lambda: self.tool('sysctl', '-n', *names).split(),
                                      lambda: agent.collect_kernel_limits(LIVE, None)[0])
        limits = fields['kernel_limits']
        self.assertAlmostEqual(int(listed[0]), limits.file_descriptors_allocated, delta=500)
        self.assertEqual([int(number) for number in listed[2:]],
                         [limits.file_descriptors_max, limits.threads_max, limits.pid_max])


# --- memory

class MemoryTest(AgentTest):
    def test_vmstat(self):
        self.check_parse(lambda text: agent.parse_key_values('vmstat', text), {
            'real': (VMSTAT, {'nr_free_pages': 882382, 'pgpgin': 816650, 'pswpin': 0, 'pgfault': 362743, 'pgmajfault': 1683,
                              'oom_kill': 4}),
            'no line feed at the end': ('a 1\nb -2', {'a': 1, 'b': -2}), 'empty': ('', {}),
        }, {
            'no number': ('a 1\noom_kill\n', "vmstat: malformed line: 'oom_kill'"), 'not a number': ('a x\n', "'a x'"),
            'three words': ('a 1 2\n', "'a 1 2'"),
        })

    def test_detail_and_vmstat_are_by_the_kernels_names(self):
        names = ('MemFree Buffers Cached SReclaimable SUnreclaim Dirty Writeback Shmem AnonPages Mapped SwapTotal SwapFree '
                 'HugePages_Total HugePages_Free Hugepagesize').split()
        self.assertEqual(wire.MemoryDetail(
            free_bytes=1, buffers_bytes=2, cached_bytes=3, slab_reclaimable_bytes=4, slab_unreclaimable_bytes=5, dirty_bytes=6,
            writeback_bytes=7, shmem_bytes=8, anon_pages_bytes=9, mapped_bytes=10, swap_total_bytes=11, swap_free_bytes=12,
            huge_pages_total=13, huge_pages_free=14, huge_page_size_bytes=15),
            agent.build_memory_detail({name: number for number, name in enumerate(names, 1)}))
        names = 'oom_kill pgfault pgmajfault pswpin pswpout'.split()
        self.assertEqual(wire.Vmstat(oom_kill=1, pgfault=2, pgmajfault=3, pswpin=4, pswpout=5),
                         agent.build_vmstat({name: number for number, name in enumerate(names, 1)}))
        fields, _ = agent.collect_memory(roots_below(self.tree({'proc/vmstat': 'pgfault 7\n'})), None)
        self.assertEqual((None, wire.Vmstat(pgfault=7)), (fields['memory_detail'], fields['vmstat']))

    def test_detail_is_that_of_vmstat(self):
        listed = {name: int(number) * 1024 for number, name in re.findall(r'(\d+) K (.*)', self.tool('vmstat', '-s'))}
        detail = agent.collect_memory(LIVE, None)[0]['memory_detail']
        self.assertEqual(listed['total swap'], detail.swap_total_bytes)
        for name, value in {'free memory': detail.free_bytes, 'buffer memory': detail.buffers_bytes,
                            'swap cache': detail.cached_bytes + detail.slab_reclaimable_bytes,
                            'free swap': detail.swap_free_bytes}.items():
            self.assertAlmostEqual(listed[name], value, delta=1 << 28, msg=name)

    def test_meminfo(self):
        self.check_parse(agent.parse_meminfo, {
            'real': (MEMINFO, {
                'MemTotal': 4015532 * 1024, 'MemFree': 3529532 * 1024, 'MemAvailable': 3551804 * 1024, 'Buffers': 7832 * 1024,
                'Active(anon)': 155800 * 1024, 'HugePages_Total': 0, 'Hugepagesize': 2048 * 1024}),
            'without a unit': ('HugePages_Total:       3\n', {'HugePages_Total': 3}),
            'empty': ('', {}),
        }, {
            'no colon': ('MemTotal 1 kB\n', "meminfo: malformed line: 'MemTotal 1 kB'"),
            'no number': ('MemTotal: 1 kB\nMemFree:\n', "'MemFree:'"),
            'not a number': ('MemTotal: many kB\n', "'MemTotal: many kB'"),
        })

    def collect(self, text):
        fields, _ = agent.collect_memory(roots_below(self.tree({'proc/meminfo': text})), None)
        return {name: value for name, value in fields.items() if name not in ('memory_detail', 'vmstat')}

    def test_used_is_what_is_not_available(self):
        unset = dict.fromkeys(('total_memory', 'available_memory', 'used_memory', 'memory_used_perc'))
        self.check_table(self.collect, [
            (('MemTotal: 400 kB\nMemFree: 1 kB\nMemAvailable: 300 kB\n',),
             {'total_memory': 409600, 'available_memory': 307200, 'used_memory': 102400, 'memory_used_perc': 25.0}),
            (('MemTotal: 400 kB\nMemFree: 1 kB\n',), {**unset, 'total_memory': 409600}),      # before Linux 3.14
            (('MemTotal: 1 kB\nMemAvailable: 2 kB\n',),
             {'total_memory': 1024, 'available_memory': 2048, 'used_memory': 0, 'memory_used_perc': 0.0}),
            (('MemTotal: 0 kB\nMemAvailable: 0 kB\n',),
             {**unset, 'total_memory': 0, 'available_memory': 0, 'used_memory': 0}),
            (('',), unset),
        ])

    def test_memory_is_that_of_free(self):
        line = self.tool('free', '-b').splitlines()[1].split()
        fields, _ = agent.collect_memory(LIVE, None)
        self.assertEqual(int(line[1]), fields['total_memory'])
        self.assertAlmostEqual(int(line[6]), fields['available_memory'], delta=fields['total_memory'] / 10)


# --- pressure

class PressureTest(AgentTest):
    def test_pressure(self):
        counting = (1.0, 2.0, 3.0, 4)
        self.check_parse(agent.parse_pressure, {
            'real': (PRESSURE_CPU, {'some': (70.95, 69.15, 38.90, 169091998), 'full': (0.0, 0.0, 0.0, 0)}),
            'oldest: cpu without full': ('some avg10=1 avg60=2 avg300=3 total=4\n', {'some': counting}),
            'irq has full alone': ('full avg10=1 avg60=2 avg300=3 total=4\n', {'full': counting}),
            'one more average, one more kind': ('some avg10=1 avg60=2 avg300=3 total=4 avg900=5\nall avg10=1 avg60=2 avg300=3 total=4\n',
                                                {'some': counting, 'all': counting}),
            'empty': ('', {}),
        }, {
            'no equals sign': ('some avg10\n', "pressure: malformed line: 'some avg10'"),
            'not a number': ('some avg10=x avg60=2 avg300=3 total=4\n', "'some avg10=x avg60=2"),
            'total is a fraction': ('some avg10=1 avg60=2 avg300=3 total=4.5\n', 'total=4.5'),
            'total is missing': ('some avg10=1 avg60=2 avg300=3\n', "'some avg10=1 avg60=2 avg300=3'"),
            'another order': ('some avg60=1 avg10=2 avg300=3 total=4\n', "'some avg60=1"),
            'the second line': ('some avg10=1 avg60=2 avg300=3 total=4\nfull\n', "malformed line: 'full'"),
        })
        self.assertIsInstance(agent.parse_pressure(PRESSURE_CPU)['some'][3], int)

    def test_averages_and_total_are_in_their_fields(self):
        psi = agent.build_psi_metrics(agent.parse_pressure('some avg10=1 avg60=2 avg300=3 total=4\n'))
        self.assertEqual([1.0, 2.0, 3.0, 4], [getattr(psi.some, name).value for name in ('avg10', 'avg60', 'avg300', 'total')])

    def test_absent_line_is_unset_and_zero_is_a_value(self):
        root = self.tree({'proc/pressure/cpu': 'full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n', 'proc/pressure/io': ''})
        fields, _ = agent.collect_pressure(roots_below(root), None)
        self.assertEqual({f'psi_{name}_metrics' for name in ('cpu', 'memory', 'io', 'irq')}, fields.keys())
        self.assertTrue(fields['psi_cpu_metrics'].full.HasField('total'))
        self.assertFalse(fields['psi_cpu_metrics'].HasField('some'))
        self.assertIsNone(fields['psi_memory_metrics'])
        self.assertIsNone(fields['psi_io_metrics'])


# --- processes

class ProcessesTest(AgentTest):
    def test_statm(self):
        self.check_parse(agent.parse_statm, {
            'real': (STATM, 15654), 'counting': (b'1 2 3 4 5 6 7\n', 2), 'extra': (b'1 2 3 4 5 6 7 8\n', 2),
            'zombie': (b'0 0 0 0 0 0 0\n', 0),
        }, {
            'empty': (b'', 'statm'), 'one column': (b'11\n', "statm: malformed line: b'11"), 'no number': (b'1 x 3\n', "b'1 x 3"),
        })

    def test_largest_come_first_and_without_memory_never(self):
        sizes = {4: 10, 2: 30, 3: 0, 9: 20, 7: 20}
        self.check_table(agent.largest_processes, [
            ((sizes, 3), [(2, 30), (7, 20), (9, 20)]), ((sizes, 99), [(2, 30), (7, 20), (9, 20), (4, 10)]), ((sizes, 0), []),
        ])

    def collect(self, files, top_n=10):
        return agent.collect_processes(roots_below(self.tree(files)), None, top_n)[0]

    def test_name_may_hold_anything(self):
        for comm, name in {
                b'a) b (c\n': 'a) b (c', b'new\nline) R 1\n': 'new\nline) R 1', b'\n': '', b'two\n\n': 'two\n', b' x \n': ' x ',
                b'\xff\xfe\\x\n': '\ufffd\ufffd\\x', b'kworker/u9:0-writeback\n': 'kworker/u9:0-writeback', b'': ''}.items():
            with self.subTest(comm=comm):
                fields = self.collect({'proc/7/statm': '1 2 3\n', 'proc/7/comm': comm})
                self.assertEqual([wire.ProcessMemInfo(pid=7, name=name, memory=2 * agent.PAGE_SIZE_BYTES)],
                                 fields['processes_mem_info'])

    def test_process_that_has_gone_is_absent(self):
        fields = self.collect({'proc/7/statm': '1 3 3\n', 'proc/8/comm': 'no statm\n', 'proc/9/statm': '',
                               'proc/10/statm': '1 2 3\n', 'proc/10/comm': 'whole\n', 'proc/1x/statm': 'no process'})
        self.assertEqual((4, ['whole']), (fields['procs'], [process.name for process in fields['processes_mem_info']]))

    def test_only_the_top_n_are_named_and_all_are_counted(self):
        files = {f'proc/{pid}/{name}': text for pid in range(1, 6)
                 for name, text in (('statm', f'1 {pid} 3\n'), ('comm', f'p{pid}\n'))}
        fields = self.collect(files, 2)
        self.assertEqual((5, ['p5', 'p4']), (fields['procs'], [process.name for process in fields['processes_mem_info']]))

    def test_resident_set_is_that_of_ps(self):
        with subprocess.Popen(['cat'], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as cat:
            cat.stdin.write(b'x')
            cat.stdin.flush()
            cat.stdout.read(1)
            try:
                listed = int(self.tool('ps', '-o', 'rss=', '-p', str(cat.pid))) * 1024
                self.assertAlmostEqual(listed, agent.collect_resident_bytes(LIVE, [cat.pid])[cat.pid], delta=1 << 20)
            finally:
                cat.stdin.close()


# --- file systems

def mount(device_number, mountpoint, fstype='ext4', source='/dev/vda'):
    return agent.Mount(device_number, mountpoint, fstype, source)


# f_bsize, f_frsize, f_blocks, f_bfree, f_bavail, f_files, f_ffree, f_favail, f_flag, f_namemax
def space(blocks, free, available, files=6, flag=0):
    return os.statvfs_result((4096, 512, blocks, free, available, files, 7, 8, flag, 255))


class FileSystemsTest(AgentTest):
    def test_mountinfo(self):
        self.check_parse(agent.parse_mountinfo, {
            'real': (MOUNTINFO, [
                mount('0:22', '/sys', 'sysfs', 'sysfs'), mount('254:1', '/', source='/dev/vda1'),
                mount('0:33', '/tmp', 'tmpfs', 'tmpfs'), mount('254:16', '/data', source='/dev/vdb'),
                mount('0:4', '/run/netns/cni-d4ba223f', 'nsfs', 'nsfs')]),
            'no optional field': (MOUNTINFO_ARM, [
                mount('0:2', '/', 'rootfs', 'rootfs'), mount('254:16', '/data', source='/dev/vdb')]),
            'two optional fields': (
                '1 2 8:1 / /a rw shared:1 master:2 - xfs /dev/sda1 rw\n', [mount('8:1', '/a', 'xfs', '/dev/sda1')]),
            'escapes': (
                r'1 2 8:1 / /a\040b\011c\134d\012e rw - ext4 /dev/\043x rw', [mount('8:1', '/a b\tc\\d\ne', source='/dev/#x')]),
            'empty source': ('1 2 0:9 / /a rw - fuse.x  rw\n', [mount('0:9', '/a', 'fuse.x', '')]),
            'dash as a mount point': ('1 2 8:1 / - rw - ext4 /dev/vda rw\n', [mount('8:1', '-')]),
            'form feed and line separator are not escaped': (
                '1 2 8:1 / /a\fb\u2028c rw - ext4 /dev/vda rw\n', [mount('8:1', '/a\fb\u2028c')]),
            'empty': ('', []),
        }, {
            'no dash': ('1 2 8:1 / /a rw shared:1 ext4 /dev/sda1 rw\n', "mountinfo: malformed line: '1 2 8:1 / /a rw shared:1"),
            'cut after the dash': ('1 2 8:1 / /a rw - ext4\n', "'1 2 8:1 / /a rw - ext4'"),
        })

    def test_real_file_systems_once_each(self):
        root, data = mount('8:1', '/'), mount('8:2', '/data', source='/dev/vdb')
        for what, mounts, real in (
                ('bind mounts', [mount('8:1', '/var/lib/kubelet/x'), root, mount('8:1', '/a'), data], [root, data]),
                ('without storage', [mount('0:5', '/run', 'tmpfs', 'tmpfs'), mount('0:6', '/o', 'overlay', 'overlay'), data],
                 [data]),
                ('hidden by a later mount', [root, mount('8:3', '/data', source='/dev/vdc'), data], [root, data]),
                ('hidden by one without storage', [root, data, mount('0:9', '/data', 'tmpfs', 'tmpfs')], [root]),
                ('rootfs below the real root', [mount('0:2', '/', 'rootfs', 'rootfs'), root], [root]),
                ('two network file systems', [mount('0:50', '/n', 'nfs4', 's:/n'), mount('0:51', '/m', 'nfs4', 's:/m')],
                 [mount('0:50', '/n', 'nfs4', 's:/n'), mount('0:51', '/m', 'nfs4', 's:/m')]),
                ('subvolumes of btrfs', [mount('0:31', '/home', 'btrfs'), mount('0:30', '/', 'btrfs')],
                 [mount('0:30', '/', 'btrfs')]),
                ('two names of one device',
                 [mount('253:0', '/', source='/dev/dm-0'), mount('253:0', '/b', source='/dev/mapper/x')],
                 [mount('253:0', '/', source='/dev/dm-0')]),
                ('two of one name', [mount('0:60', '/f', 'fuse.a', '/dev/fuse'), mount('0:61', '/g', 'fuse.b', '/dev/fuse')],
                 [mount('0:60', '/f', 'fuse.a', '/dev/fuse'), mount('0:61', '/g', 'fuse.b', '/dev/fuse')]),
                ('none', [], [])):
            with self.subTest(what):
                self.assertEqual(real, agent.real_mounts(mounts))

    def test_usage_is_in_fragments_and_free_is_for_unprivileged_users(self):
        self.check_table(agent.build_disk_usage, [
            ((mount('8:1', '/a', 'xfs', '/dev/x'), space(100, 70, 30, flag=os.ST_NOSUID)), wire.DiskUsage(
                device='/dev/x', mountpoint='/a', fstype='xfs', total=51200, used=15360, free=15360, used_percent=50.0,
                inodes=6, inodes_free=8, read_only=False)),
            ((mount('8:1', '/a'), space(100, 0, 0)), wire.DiskUsage(
                device='/dev/vda', mountpoint='/a', fstype='ext4', total=51200, used=51200, free=0, used_percent=100.0,
                inodes=6, inodes_free=8, read_only=False)),
            ((mount('8:1', '/a'), space(100, 100, 0, 0, os.ST_RDONLY)), wire.DiskUsage(
                device='/dev/vda', mountpoint='/a', fstype='ext4', total=51200, used=0, free=0, read_only=True)),
        ])

    def hold(self, hanging, failing=()):
        """statvfs of these mount points does not return before the end of the test, or fails with EIO; its mounts, in the
        order in which they are asked, are those of the dictionary that is returned, which has the free blocks."""
        released, asked = threading.Event(), []
        self.addCleanup(lambda: [thread.join(10) for thread in threading.enumerate() if thread.name == 'statvfs'])
        self.addCleanup(released.set)

        def read_space(root, mountpoint):
            asked.append(mountpoint)
            if mountpoint in hanging:
                released.wait(20)
            if mountpoint in failing:
                raise OSError(errno.EIO, 'dead')
            return space(100, 70, 30)
        for name, value in (('read_space', read_space), ('STATVFS_TIMEOUT_SECONDS', 0.1)):
            patch = mock.patch.object(agent, name, value)
            patch.start()
            self.addCleanup(patch.stop)
        return asked, released

    def test_mount_that_hangs_is_stuck_alone_and_left_alone_until_it_returns(self):
        mounts = (('0:7', 'dead', 'nfs4', 's:/x'), ('8:1', 'broken', 'ext4', '/dev/sda1'), ('8:2', 'well', 'ext4', '/dev/sda2'))
        root = self.tree({'proc/1/mountinfo': ''.join(
            f'1 2 {device} / /{name} rw - {kind} {source} rw\n' for device, name, kind, source in mounts)})
        asked, released = self.hold({'/dead'}, {'/broken'})
        before, seen = {}, []
        for _ in range(3):
            part = agent.collect_node(roots_below(root), before, 0)
            before = part.after
            seen.append({disk.mountpoint: (disk.stuck, disk.HasField('total')) for disk in part.message.disk_usages})
            self.assertIn('mount /dead', part.failures)
        self.assertEqual([{'/well': (False, True), '/dead': (True, False)}] * 3, seen)
        self.assertEqual(1, asked.count('/dead'))
        self.assertEqual(1, sum(thread.name == 'statvfs' for thread in threading.enumerate()))
        released.set()
        before['file systems']['/dead'].join(10)
        part = agent.collect_node(roots_below(root), before, 0)
        self.assertEqual({'/well', '/dead'}, {disk.mountpoint for disk in part.message.disk_usages if disk.HasField('total')})
        self.assertEqual({}, {name: why for name, why in part.failures.items() if 'mount' in name})

    def test_inodes_are_those_of_df(self):
        fields, _ = agent.collect_disk_usages(LIVE, None)
        for disk in fields['disk_usages']:
            total, free = self.tool('df', '--output=itotal,iavail', disk.mountpoint).split()[2:]
            with self.subTest(disk.mountpoint):
                self.assertEqual(int(total) if total != '-' else 0, disk.inodes)
                self.assertAlmostEqual(int(free) if free != '-' else 0, disk.inodes_free, delta=5000)
        if not fields['disk_usages']:
            self.skipTest('no file system of its own here')

    def collect(self, files):
        return [(disk.mountpoint, disk.HasField('total'))
                for disk in agent.collect_disk_usages(roots_below(self.tree(files)), None)[0]['disk_usages']]

    def test_mounts_are_those_of_process_1_or_else_the_agents_own(self):
        line = '1 2 8:{0} / /{0} rw - ext4 /dev/{0} rw\n'
        one, own = {'proc/1/mountinfo': line.format(1), '1/x': ''}, {'proc/self/mountinfo': line.format(2), '2/x': ''}
        self.check_table(self.collect, [(({**one, **own},), [('/1', True)]), ((own,), [('/2', True)]), (({},), [])])

    def test_mount_that_is_not_there_is_left_out(self):
        self.assertEqual([('/', True)], self.collect({'proc/1/mountinfo': MOUNTINFO}))

    def test_usage_is_that_of_df(self):
        fields, _ = agent.collect_disk_usages(LIVE, None)
        for disk in fields['disk_usages']:
            line = self.tool('df', '-B1', '--output=size,used,avail,pcent', disk.mountpoint).splitlines()[1].split()
            with self.subTest(disk.mountpoint):
                self.assertEqual(int(line[0]), disk.total)
                self.assertAlmostEqual(int(line[1]), disk.used, delta=1 << 28)
                self.assertAlmostEqual(int(line[2]), disk.free, delta=1 << 28)
                self.assertAlmostEqual(int(line[3].rstrip('%')), math.ceil(disk.used_percent), delta=1)
        if not fields['disk_usages']:
            self.skipTest('no file system of its own here')


# --- file systems that do not answer

class StuckMountTest(AgentTest):
    """A file server that is gone: statvfs(2) of its mounts does not return before `back` is set."""

    def setUp(self):
        self.stuck, self.asked, self.back = {'/nfs'}, [], threading.Event()
        self.addCleanup(self.release)
        for name, value in (('read_space', self.read_space), ('STATVFS_TIMEOUT_SECONDS', 0.1)):
            patch = mock.patch.object(agent, name, value)
            patch.start()
            self.addCleanup(patch.stop)

    def release(self):
        self.back.set()
        for thread in self.askers():
            thread.join(10)

    def askers(self):
        return [thread for thread in threading.enumerate() if thread.name == 'statvfs']

    def read_space(self, root, mountpoint):
        self.asked.append(mountpoint)
        if mountpoint == '/bad':
            raise OSError(errno.EIO, 'bad')
        if mountpoint in self.stuck:
            self.back.wait(10)
        return space(100, 50, 40)

    def cycle(self, before=None, *mounts):
        """What answered, and what to hand on."""
        self.asked.clear()
        answers, stuck = agent.answering_mounts('/', mounts or self.mounts(), before or {})
        return {mountpoint for mountpoint, answer in answers.items() if answer}, stuck

    def mounts(self):
        return [mount('0:50', '/nfs', 'nfs4', 'server:/x'), mount('0:51', '/smb', 'cifs', '//server/x'), mount('8:1', '/')]

    def test_local_devices_are_asked_first_and_answer(self):
        answers, stuck = self.cycle()
        self.assertEqual((['/', '/nfs'], {'/'}, ['/nfs']), (self.asked, answers, list(stuck)))

    def test_it_is_not_asked_again_until_the_old_call_has_come_back(self):
        _, stuck = self.cycle()
        for _ in range(5):
            answers, stuck = self.cycle(stuck)
            self.assertEqual((['/', '/smb'], {'/', '/smb'}, ['/nfs']), (self.asked, answers, list(stuck)))
        self.assertEqual(1, len(self.askers()))
        self.stuck.clear()
        self.release()
        self.assertEqual(({'/', '/nfs', '/smb'}, {}), self.cycle(stuck))

    def test_threads_do_not_pile_up_however_many_mounts_hang(self):
        self.stuck |= {'/smb'}
        stuck = {}
        for _ in range(6):
            _, stuck = self.cycle(stuck)
        self.assertEqual((['/nfs', '/smb'], 2), (sorted(stuck), len(self.askers())))

    def test_a_mount_that_fails_is_not_taken_for_the_one_that_hangs(self):
        stuck = {}
        for _ in range(3):
            answers, stuck = self.cycle(stuck, mount('0:1', '/bad', 'nfs4', 'x:/bad'), *self.mounts())
        self.assertEqual(({'/', '/smb'}, ['/nfs'], 1), (answers, list(stuck), len(self.askers())))

    def test_it_is_reported_once_and_left_alone_also_across_a_cycle_without_mountinfo(self):
        usual = '1 0 8:1 / / rw - ext4 /dev/sda1 rw\n2 1 0:50 / /nfs rw - nfs4 server:/x rw\n'
        root = self.tree({'proc/1/mountinfo': usual})
        part, troubles = agent.collect_node(roots_below(root), {}, 10), []
        for text in (None, 'malformed\n', None):
            troubles.append({subject for subject in part.failures if subject != 'cpu'})
            if text:
                write_tree(root, {'proc/1/mountinfo': text})
            part = agent.collect_node(roots_below(root), part.after, 10)
            write_tree(root, {'proc/1/mountinfo': usual})
        self.assertEqual([{'mount /nfs'}, {'mount /nfs'}, {'file systems', 'mount /nfs'}], troubles)
        self.assertEqual([('/', False), ('/nfs', True)], [(disk.mountpoint, disk.stuck) for disk in part.message.disk_usages])
        self.assertEqual(1, len(self.askers()))


# --- disk I/O

class DiskIoTest(AgentTest):
    def test_diskstats(self):
        columns = '   1       2 sda ' + ' '.join(map(str, range(3, 20)))
        counting = [agent.DiskStats('sda', reads=3, reads_merged=4, read_sectors=5, read_ms=6, writes=7, writes_merged=8,
                                    written_sectors=9, write_ms=10, in_progress=11, io_ms=12, weighted_io_ms=13, discards=14,
                                    discards_merged=15, discarded_sectors=16, discard_ms=17, flushes=18, flush_ms=19)]
        old = counting[0]._replace(flushes=None, flush_ms=None)
        oldest = old._replace(discards=None, discards_merged=None, discarded_sectors=None, discard_ms=None)
        self.check_parse(agent.parse_diskstats, {
            'real': (DISKSTATS, [
                agent.DiskStats('vda', 3739, 488, 1629322, 4249, 3588, 3074, 1308976, 14908, 0, 6104, 19638, 0, 0, 0, 0, 801, 479),
                agent.DiskStats('vda1', 3653, 488, 1626698, 4160, 3587, 3074, 1308976, 14906, 0, 7052, 19066, 0, 0, 0, 0, 0, 0),
                agent.DiskStats('vdb', 135, 0, 3978, 108, 1, 0, 8, 3, 0, 108, 112, 0, 0, 0, 0, 1, 0)]),
            'since 5.5': (columns, counting),
            'since 4.18': (columns.rsplit(' ', 2)[0], [old]),
            'oldest': (columns.rsplit(' ', 6)[0], [oldest]),
            'extra column': (columns + ' 20', counting),
            'empty': ('', []),
        }, {
            'cut': ('8 0 sda 1 2 3\n', "diskstats: malformed line: '8 0 sda 1 2 3'"),
            'not a number': ('8 0 sda 1 2 x 4 5 6 7 8\n', "'8 0 sda 1 2 x 4 5 6 7 8'"),
        })

    def test_sectors_are_512_bytes_and_disks_are_summed(self):
        first, second = agent.DiskStats('a', *range(1, 12)), agent.DiskStats('b', *range(101, 112))
        self.assertEqual(wire.DiskIOSummary(total_read_bytes=512 * (3 + 103), total_write_bytes=512 * (7 + 107),
                                            total_read_ops=1 + 101, total_write_ops=5 + 105),
                         agent.build_disk_io_summary([first, second]))

    def test_a_disk_has_bytes_and_seconds(self):
        self.assertEqual(wire.DiskIo(
            device='sda', reads_total=1, reads_merged_total=2, read_bytes_total=3 * 512, read_seconds_total=0.004, writes_total=5,
            writes_merged_total=6, written_bytes_total=7 * 512, write_seconds_total=0.008, in_progress=9, io_seconds_total=0.01,
            weighted_io_seconds_total=0.011, discards_total=12, discards_merged_total=13, discarded_bytes_total=14 * 512,
            discard_seconds_total=0.015, flushes_total=16, flush_seconds_total=0.017),
            agent.build_disk_io(agent.DiskStats('sda', *range(1, 18))))
        oldest = agent.build_disk_io(agent.DiskStats('sda', *range(1, 12)))
        self.assertEqual([], [field.name for field, _ in oldest.ListFields() if 'discard' in field.name or 'flush' in field.name])

    def test_only_whole_disks_count(self):
        whole = ('vda', 'nvme0n1', 'cciss!c0d0', 'mmcblk0', 'nbd0', 'rbd0')
        others = ('loop0', 'ram0', 'zram0', 'dm-0', 'md127', 'md_d0', 'md_home', 'drbd1', 'bcache0', 'zd16', 'sr0', 'fd0')
        partitions = ('vda1', 'nvme0n1p1', 'cciss/c0d0p1', 'mmcblk0p1')
        names = [name.replace('!', '/') for name in whole + others] + list(partitions)
        root = self.tree({
            'proc/diskstats': ''.join(f'8 0 {name} 1 2 3 4 5 6 7 8 9 10 11\n' for name in names),
            **{f'sys/block/{name}/size': '1\n' for name in whole + others}})
        fields, _ = agent.collect_disk_io(roots_below(root), None)
        self.assertEqual(len(whole), fields['disk_io_summary'].total_read_ops)
        made_of_disks = [name for name in others if not name.startswith(('loop', 'ram', 'zram', 'sr', 'fd'))]
        self.assertEqual([*(name.replace('!', '/') for name in whole), *made_of_disks], [disk.device for disk in fields['disks']])

    def test_without_disks_the_summary_is_unset(self):
        for files in ({}, {'proc/diskstats': DISKSTATS}, {'sys/block/vda/size': '1\n'}):
            with self.subTest(files.keys()):
                fields, _ = agent.collect_disk_io(roots_below(self.tree(files)), None)
                self.assertEqual({'disk_io_summary': None, 'disks': []}, fields)


# --- interface addresses

def netlink_address(family, prefix_length, scope, index, *attributes):
    """An RTM_NEWADDR message."""
    payload = agent.IFADDRMSG.pack(family, prefix_length, 0x80, scope, index)
    for kind, data in attributes:
        payload += agent.RTATTR.pack(4 + len(data), kind) + data + bytes(-len(data) % 4)
    return agent.NLMSGHDR.pack(agent.NLMSGHDR.size + len(payload), agent.RTM_NEWADDR, 2, 1, 0) + payload


class InterfaceAddressesTest(AgentTest):
    def test_addresses(self):
        own, peer = socket.inet_aton('192.0.2.1'), socket.inet_aton('192.0.2.2')
        six = socket.inet_pton(socket.AF_INET6, '2001:db8::1')
        inet, inet6 = socket.AF_INET, socket.AF_INET6
        self.check_parse(agent.parse_addresses, {
            'real': (ADDRESSES, [agent.Address(1, inet, '127.0.0.1', 8, 254), agent.Address(1, inet6, '::1', 128, 254)]),
            'peer': (netlink_address(inet, 32, 0, 3, (agent.IFA_ADDRESS, peer), (agent.IFA_LOCAL, own)),
                     [agent.Address(index=3, family=inet, address='192.0.2.1', prefix_length=32, scope=0)]),
            'label of odd length': (netlink_address(inet6, 64, 253, 4, (3, b'eth\0x'), (agent.IFA_ADDRESS, six)),
                                    [agent.Address(4, inet6, '2001:db8::1', 64, 253)]),
            'another family': (netlink_address(7, 32, 0, 3, (agent.IFA_ADDRESS, own)), []),
            'no address': (netlink_address(inet, 32, 0, 3), []),
            'wrong size': (netlink_address(inet, 32, 0, 3, (agent.IFA_ADDRESS, six)), []),
            'refused': (agent.NLMSGHDR.pack(20, agent.NLMSG_ERROR, 0, 1, 0) + b'\xff\xff\xff\xff', []),
            'empty': (b'', []),
        }, {
            'cut': (ADDRESSES[:100], 'malformed length 80 at byte 76 of 100'),
            'length 0': (bytes(16), 'malformed length 0 at byte 0 of 16'),
            'short message': (agent.NLMSGHDR.pack(18, agent.RTM_NEWADDR, 0, 1, 0) + b'\x02\x08', 'address message: 0208'),
        })

    def test_primary_address_is_the_first_global_one_of_the_interface(self):
        four, six = socket.AF_INET, socket.AF_INET6
        addresses = [agent.Address(*row) for row in (
            (1, four, '127.0.0.1', 8, 254), (2, six, 'fe80::1', 64, 253), (2, four, '192.0.2.1', 24, 0),
            (2, four, '192.0.2.9', 24, 0), (3, four, '198.51.100.1', 24, 0), (2, six, '2001:db8::1', 64, 0))]
        self.check_table(agent.primary_address, [
            ((addresses, 2, four), '192.0.2.1'), ((addresses, 2, six), '2001:db8::1'), ((addresses, 3, four), '198.51.100.1'),
            ((addresses, 3, six), None), ((addresses, 1, four), None), ((addresses, None, four), None), (([], 2, four), None)])

    def test_another_machines_tree_has_no_addresses(self):
        self.assertEqual(b'', agent.read_addresses(roots_below(self.tree(NODE))))

    def test_addresses_are_those_of_ip(self):
        listed = json.loads(self.tool('ip', '-j', 'addr'))
        found = agent.parse_addresses(agent.read_addresses(LIVE))
        scopes = {'host': 254, 'link': 253, 'site': 200, 'global': 0}
        self.assertEqual(
            sorted((link['ifindex'], address['local'], address['prefixlen'], scopes[address['scope']])
                   for link in listed for address in link['addr_info']),
            sorted((address.index, address.address, address.prefix_length, address.scope) for address in found))


# --- network

class NetworkTest(AgentTest):
    def test_net_dev(self):
        sixteen = ' '.join(map(str, range(1, 17)))
        counting = {'eth0': agent.NetDev(
            rx_bytes=1, rx_packets=2, rx_errs=3, rx_drop=4, rx_fifo=5, rx_frame=6, rx_compressed=7, rx_multicast=8, tx_bytes=9,
            tx_packets=10, tx_errs=11, tx_drop=12, tx_fifo=13, tx_colls=14, tx_carrier=15, tx_compressed=16)}
        self.check_parse(agent.parse_net_dev, {
            'real': (NET_DEV, {
                'lo': agent.NetDev(*[0] * 16),
                'enp0s3': agent.NetDev(50152, 196, 0, 0, 0, 0, 0, 0, 29478, 145, 0, 0, 0, 0, 0, 0),
                'cni0': agent.NetDev(324400, 5942, 0, 0, 0, 0, 0, 54, 169286850, 6438, 0, 2, 0, 0, 0, 0)}),
            'oldest: no space after the colon': (f'  eth0:{sixteen}\n', counting),
            'extra column': (f'eth0: {sixteen} 17\n', counting),
            'headings alone': (''.join(NET_DEV.splitlines(True)[:2]), {}),
            'empty': ('', {}),
        }, {
            'cut': ('eth0: 1 2 3\n', "net/dev: malformed line: 'eth0: 1 2 3'"),
            'not a number': (f'eth0: {sixteen}\neth1: x {sixteen}\n', "'eth1: x 1 2"),
        })

    def test_ipv4_routes(self):
        def line(*columns):
            return 'Iface ...\n' + '\t'.join(columns) + '\t0\t0\t0\n'
        self.check_parse(agent.parse_route, {
            'real': (ROUTE, [agent.Route('enp0s3', 1024, True), agent.Route('enp0s3', 1024, False),
                             agent.Route('cni0', 0, False)]),
            'half of everything': (line('tun0', '00000000', '0', '0003', '0', '0', '5', '00000080'),
                                   [agent.Route('tun0', 5, False)]),
            'down': (line('eth0', '00000000', '0', '0002', '0', '0', '5', '00000000'), [agent.Route('eth0', 5, False)]),
            'reject': (line('*', '00000000', '0', '0201', '0', '0', '5', '00000000'), [agent.Route('*', 5, False)]),
            'heading alone': ('Iface ...\n', []),
            'empty': ('', []),
        }, {
            'cut': ('Iface ...\neth0\t00000000\n', r"net/route: malformed line: 'eth0\t00000000'"),
            'not hex': (line('eth0', 'default', '0', '0003', '0', '0', '5', '00000000'), 'default'),
        })

    def test_ipv6_routes(self):
        def line(destination, prefix, metric, flags):
            return f'{destination} {prefix} {ZEROS} 00 {ZEROS} {metric} 00000001 00000000 {flags} eth1\n'
        self.check_parse(agent.parse_ipv6_route, {
            'real': (IPV6_ROUTE, [agent.Route('eth0', 0x100, False), agent.Route('eth0', 0x400, True),
                                  agent.Route('lo', 0xffffffff, False)]),
            'half of everything': (line(ZEROS, '01', '00000010', '00000003'), [agent.Route('eth1', 16, False)]),
            'down': (line(ZEROS, '00', '00000010', '00000002'), [agent.Route('eth1', 16, False)]),
            'reject': (line(ZEROS, '00', '00000010', '00000201'), [agent.Route('eth1', 16, False)]),
            'empty': ('', []),
        }, {
            'cut': (f'{ZEROS} 00\n', f"net/ipv6_route: malformed line: '{ZEROS} 00'"),
            'not hex': (line(ZEROS, 'xy', '00000010', '00000003'), ' xy '),
        })

    def test_default_interface_has_the_lowest_metric(self):
        routes = [agent.Route(*row) for row in (('a', 1, False), ('b', 200, True), ('c', 100, True), ('d', 100, True))]
        self.check_table(agent.default_interface, [((routes,), 'c'), ((routes[:1],), None), (([],), None)])

    def test_flags_are_those_of_the_contract(self):
        self.check_table(agent.interface_flags, [
            ((0x9,), ['up', 'loopback']), ((0x1003,), ['up', 'broadcast', 'multicast']),
            ((0x10d1,), ['up', 'pointtopoint', 'multicast']),
            ((0xffff,), ['up', 'broadcast', 'loopback', 'pointtopoint', 'multicast']), ((0,), [])])

    def test_usage_sums_all_interfaces(self):
        self.assertEqual(wire.NetUsage(
            total_bytes_sent=9 + 109, total_bytes_received=1 + 101, total_packets_sent=10 + 110, total_packets_received=2 + 102,
            total_err_in=3 + 103, total_err_out=11 + 111, total_drop_in=4 + 104, total_drop_out=12 + 112,
            total_fifo_err_in=5 + 105, total_fifo_err_out=13 + 113),
            agent.build_net_usage([agent.NetDev(*range(1, 17)), agent.NetDev(*range(101, 117))]))

    def test_interface_of_sysfs(self):
        root, address = self.tree(NODE), agent.Address
        addresses = {2: [address(2, socket.AF_INET, '192.0.2.1', 24, 0), address(2, socket.AF_INET6, '2001:db8::1', 64, 0)],
                     1: [address(1, socket.AF_INET, '127.0.0.1', 8, 254)]}
        columns = agent.NetDev(*range(1, 17))
        counters = wire.InterfaceCounters(
            rx_bytes=1, rx_packets=2, rx_errs=3, rx_drop=4, rx_fifo=5, rx_frame=6, rx_compressed=7, rx_multicast=8, tx_bytes=9,
            tx_packets=10, tx_errs=11, tx_drop=12, tx_fifo=13, tx_colls=14, tx_carrier=15, tx_compressed=16)

        def collect(name):
            link = agent.collect_link(roots_below(root), name, 0, None)
            return agent.collect_interface(roots_below(root), name, columns, link, addresses.get(link.index, ()))

        self.check_table(collect, [
            (('enp0s3',), wire.InterfaceStat(
                index=2, mtu=1500, name='enp0s3', hardwareAddr='52:54:00:d1:3d:13', flags=['up', 'broadcast', 'multicast'],
                addrs=['192.0.2.1/24', '2001:db8::1/64'], operstate='up', carrier=True, counters=counters)),
            (('lo',), wire.InterfaceStat(index=1, mtu=65536, name='lo', flags=['up', 'loopback'], addrs=['127.0.0.1/8'],
                                         counters=counters)),
            (('gone',), wire.InterfaceStat(name='gone', counters=counters)),
        ])

    def test_link_that_is_down_has_no_speed(self):
        def link(**files):
            root = self.tree({f'sys/class/net/eth0/{name}': f'{text}\n' for name, text in files.items()})
            link = agent.collect_link(roots_below(root), 'eth0', 0, None)
            found = agent.collect_interface(roots_below(root), 'eth0', agent.NetDev(*[0] * 16), link, ())
            return [getattr(found, name) if found.HasField(name) else None for name in ('operstate', 'carrier', 'speed_mbits')]
        self.assertEqual(['up', True, 10000], link(operstate='up', carrier='1', speed='10000'))
        self.assertEqual(['down', False, None], link(operstate='down', carrier='0', speed='-1'))
        self.assertEqual([None, None, None], link(mtu='1'))

    def test_pods_ends_have_no_counters(self):
        pods_ends = ('veth9e351196', 'cali1a2b3c', 'lxc12ab', 'eni0123456789a', 'gke12', 'azv1', 'tap0')
        nodes_own = ('eth0', 'ens5', 'eni0', 'cni0', 'lo', 'bond0.5', 'wlan0', 'docker0', 'cilium_host')
        root = self.tree({'proc/net/dev': ''.join(f'{name}: {"1 " * 16}\n' for name in pods_ends + nodes_own)})
        fields, _ = agent.collect_network(roots_below(root), None)
        counted = [link.name for link in fields['network_interfaces'] if link.HasField('counters')]
        self.assertEqual((list(nodes_own), len(pods_ends + nodes_own)), (counted, len(fields['network_interfaces'])))
        self.assertEqual(len(pods_ends + nodes_own), fields['net_usage'].total_packets_sent)

    def test_pods_ends_are_read_again_when_they_count_anew_or_after_a_minute(self):
        def collect(packets, mtu, before):
            write_tree(root, {'proc/net/dev': ''.join(f'{name}: {f"{packets} " * 16}\n' for name in ('veth1', 'eth0')),
                              'sys/class/net/veth1/mtu': mtu, 'sys/class/net/eth0/mtu': mtu})
            fields, links = agent.collect_network(roots_below(root), before)
            self.assertEqual(['veth1', 'eth0'], list(links))
            return [link.mtu for link in fields['network_interfaces']], links

        root = self.directory()
        mtus, links = collect(7, '1500\n', None)
        self.assertEqual([1500, 1500], mtus)
        self.assertAlmostEqual(time.monotonic() + 60, links['veth1'].due, delta=5)
        mtus, links = collect(8, '9000\n', links)
        self.assertEqual([1500, 9000], mtus)
        self.assertEqual([9000, 9000], collect(7, '9000\n', links)[0])
        self.assertEqual([9000, 9000], collect(8, '9000\n', {'veth1': links['veth1']._replace(due=0)})[0])

    def test_counters_are_those_of_ip(self):
        def oracle():
            return {link['ifname']: link for link in json.loads(self.tool('ip', '-s', '-j', 'link'))}
        before, fields, after = oracle(), agent.collect_network(LIVE, None)[0], oracle()
        names = {'bytes': 'bytes', 'packets': 'packets', 'errors': 'errs', 'dropped': 'drop'}
        for link in fields['network_interfaces']:
            with self.subTest(link.name):
                self.assertEqual(after[link.name]['operstate'].lower(), link.operstate or after[link.name]['operstate'].lower())
                for way, ip, ours in ((way, ip, ours) for way in ('rx', 'tx') for ip, ours in names.items()):
                    number = getattr(link.counters, f'{way}_{ours}')
                    if link.HasField('counters'):
                        self.assertTrue(before[link.name]['stats64'][way][ip] <= number <= after[link.name]['stats64'][way][ip], ip)

    def test_network_of_another_procfs_is_that_of_process_1(self):
        root = self.tree({'proc/1/net/dev': NET_DEV, 'proc/net/dev': 'other0: ' + '1 ' * 16})
        fields, _ = agent.collect_network(roots_below(root), None)
        self.assertEqual(['lo', 'enp0s3', 'cni0'], [interface.name for interface in fields['network_interfaces']])

    def test_interfaces_are_those_of_ip(self):
        listed = json.loads(self.tool('ip', '-j', 'addr'))
        fields, _ = agent.collect_network(LIVE, None)
        names = ('up', 'broadcast', 'loopback', 'pointtopoint', 'multicast')
        self.assertEqual(
            {link['ifname']: (link['ifindex'], link['mtu'], [name for name in names if name.upper() in link['flags']],
                              sorted(f'{address["local"]}/{address["prefixlen"]}' for address in link['addr_info']))
             for link in listed},
            {link.name: (link.index, link.mtu, list(link.flags), sorted(link.addrs)) for link in fields['network_interfaces']})
        for link in listed:
            if link['link_type'] == 'ether':
                self.assertIn(link['address'], [interface.hardwareAddr for interface in fields['network_interfaces']])

    def test_primary_address_is_on_the_default_route_of_ip(self):
        routes = json.loads(self.tool('ip', '-j', '-4', 'route', 'show', 'default'))
        fields, _ = agent.collect_network(LIVE, None)
        address = fields['primary_ipv4'] and fields['primary_ipv4'].value
        first = min(routes, key=lambda route: route.get('metric', 0), default={})
        links = json.loads(self.tool('ip', '-j', '-4', 'addr'))
        usable = [entry['local'] for link in links if link['ifname'] == first.get('dev')
                  for entry in link['addr_info'] if entry['scope'] == 'global']
        self.assertIn(address, usable or [None])


# --- network protocols

class NetworkProtocolsTest(AgentTest):
    def test_snmp(self):
        self.check_parse(agent.parse_snmp, {
            'real': (SNMP.splitlines(True)[2] + SNMP.splitlines(True)[3], {
                'UdpInDatagrams': 0, 'UdpNoPorts': 0, 'UdpInErrors': 0, 'UdpOutDatagrams': 0, 'UdpRcvbufErrors': 0,
                'UdpSndbufErrors': 0, 'UdpInCsumErrors': 0, 'UdpIgnoredMulti': 2, 'UdpMemErrors': 0}),
            'two protocols': ('Tcp: A B\nTcp: 1 -2\nUdp: A\nUdp: 3\n', {'TcpA': 1, 'TcpB': -2, 'UdpA': 3}),
            'another order of columns': ('Tcp: B A\nTcp: 1 2\n', {'TcpB': 1, 'TcpA': 2}),
            'empty': ('', {}),
        }, {
            'fewer numbers than names': ('Tcp: A B\nTcp: 1\n', "snmp: malformed line: ('Tcp: A B', 'Tcp: 1')"),
            'another protocol': ('Tcp: A\nUdp: 1\n', "'Udp: 1'"), 'not a number': ('Tcp: A\nTcp: x\n', "'Tcp: x'"),
            'blank line': ('Tcp: A\n\n', "'Tcp: A'"),
        })
        self.assertEqual(118239, agent.parse_snmp(NETSTAT)['TcpExtTCPOrigDataSent'])

    def test_sockstat(self):
        self.check_parse(agent.parse_sockstat, {
            'real': (SOCKSTAT, {'socketsused': 134, 'TCPinuse': 3, 'TCPorphan': 0, 'TCPtw': 50, 'TCPalloc': 5, 'TCPmem': 0,
                                'UDPinuse': 1, 'UDPmem': 0, 'UDPLITEinuse': 0, 'RAWinuse': 0, 'FRAGinuse': 0, 'FRAGmemory': 0}),
            'empty': ('', {}),
        }, {'not a number': ('TCP: inuse x\n', "sockstat: malformed line: 'TCP: inuse x'"), 'blank line': ('\n', "''")})

    def test_softnet_stat(self):
        self.check_parse(agent.parse_softnet_stat, {
            'real': (SOFTNET_STAT, (0x21d7 + 0x2760, 0, 0x1c * 2)),
            'columns in order, summed': ('1 2 3 4\na b c d\n', (11, 13, 15)), 'oldest': ('1 2 3\n', (1, 2, 3)), 'empty': ('', (0, 0, 0)),
        }, {'cut': ('1 2 3\n1 2\n', 'softnet_stat: malformed line'), 'not hexadecimal': ('1 x 3\n', "'1 x 3'")})

    def test_every_number_has_its_field(self):
        counting = iter(range(1, 99))
        netstat = {f'TcpExt{name}': next(counting) for name in ('ListenOverflows', 'ListenDrops', 'TCPSynRetrans')}
        snmp = {name: next(counting) for name in ('TcpRetransSegs', 'TcpInSegs', 'TcpOutSegs', 'TcpInErrs', 'UdpRcvbufErrors',
                                                  'UdpSndbufErrors', 'UdpInErrors')}
        sockstat = {name: next(counting) for name in ('socketsused', 'TCPinuse', 'TCPorphan', 'TCPtw', 'TCPalloc', 'TCPmem',
                                                      'UDPinuse')}
        self.assertEqual(wire.NetworkProtocols(
            tcp_listen_overflows_total=1, tcp_listen_drops_total=2, tcp_syn_retrans_total=3, tcp_retrans_segs_total=4,
            tcp_in_segs_total=5, tcp_out_segs_total=6, tcp_in_errs_total=7, udp_rcvbuf_errors_total=8, udp_sndbuf_errors_total=9,
            udp_in_errors_total=10, sockets_used=11, tcp_inuse=12, tcp_orphan=13, tcp_tw=14, tcp_alloc=15,
            tcp_mem_bytes=16 * agent.PAGE_SIZE_BYTES, udp_inuse=17, softnet_processed_total=18, softnet_dropped_total=19,
            softnet_squeezed_total=20), agent.build_network_protocols(netstat, snmp, sockstat, (18, 19, 20)))
        self.assertEqual(wire.NetworkProtocols(), agent.build_network_protocols({}, {}, {}, None))

    def test_one_file_alone_gives_its_fields(self):
        for name, text in (('snmp', SNMP), ('netstat', NETSTAT), ('sockstat', SOCKSTAT), ('softnet_stat', SOFTNET_STAT)):
            with self.subTest(name):
                fields, _ = agent.collect_network_protocols(roots_below(self.tree({f'proc/net/{name}': text})), None)
                self.assertIn(len(fields['network_protocols'].ListFields()), (3, 7))
        self.assertEqual({}, agent.collect_network_protocols(roots_below(self.directory()), None)[0])

    def test_sockets_are_those_of_ss(self):
        def oracle():
            return [int(number) for number in re.findall(r'Total: (\d+)|orphaned (\d+)|timewait (\d+)', self.tool('ss', '-s'))
                    for number in number if number]
        listed, fields = self.settled(oracle, lambda: agent.collect_network_protocols(LIVE, None)[0])
        ours = fields['network_protocols']
        self.assertAlmostEqual(listed[0], ours.sockets_used, delta=20)
        self.assertAlmostEqual(listed[1], ours.tcp_orphan, delta=5)


# --- clock

class ClockTest(AgentTest):
    def clock(self, status, offset):
        timex = agent.TIMEX.pack(1, offset, 3, 4_000_000, 5, status)
        return agent.build_clock_metrics(timex.ljust(agent.TIMEX_BYTES, b'\xff'))

    def test_status_tells_synchronised_and_the_unit_of_the_offset(self):
        unsynchronised, nanoseconds = 0x0040, 0x2000    # uapi/linux/timex.h: STA_UNSYNC, STA_NANO
        self.check_table(self.clock, [
            ((1, 2_000_000), wire.ClockMetrics(synchronized=True, offset_seconds=2.0, max_error_seconds=4.0)),
            ((unsynchronised, -500_000), wire.ClockMetrics(synchronized=False, offset_seconds=-0.5, max_error_seconds=4.0)),
            ((nanoseconds, 2_000_000), wire.ClockMetrics(synchronized=True, offset_seconds=0.002, max_error_seconds=4.0))])

    def test_clock_is_this_machines_alone(self):
        self.assertEqual({'clock': None}, agent.collect_clock(roots_below(self.tree(NODE)), None)[0])
        clock = agent.collect_clock(LIVE, None)[0]['clock']
        self.assertTrue(-0.6 < clock.offset_seconds < 0.6 and 0 <= clock.max_error_seconds <= 1e5, clock)


# --- operating system

class OperatingSystemTest(AgentTest):
    def test_os_release(self):
        self.check_parse(agent.parse_os_release, {
            'Debian 13': (OS_RELEASE, {
                'PRETTY_NAME': 'Debian GNU/Linux 13 (trixie)', 'NAME': 'Debian GNU/Linux', 'VERSION_ID': '13',
                'VERSION': '13 (trixie)', 'VERSION_CODENAME': 'trixie', 'DEBIAN_VERSION_FULL': '13.7', 'ID': 'debian'}),
            'quotes': ('''A='single'\nB="dou\\"ble \\$x"\nC=plain\nD=""\nE=\n''',
                       {'A': 'single', 'B': 'dou"ble $x', 'C': 'plain', 'D': '', 'E': ''}),
            'comments, blanks, an equals sign': ('# A=1\n\n  B=2  \nC=x=y\nno assignment\n', {'B': '2', 'C': 'x=y'}),
            'empty': ('', {}),
        }, {})

    def test_family_is_of_the_id_or_of_what_it_is_like(self):
        self.check_table(agent.platform_family, [
            (({'ID': 'debian'},), 'debian'), (({'ID': 'ubuntu', 'ID_LIKE': 'debian'},), 'debian'),
            (({'ID': 'rocky', 'ID_LIKE': 'rhel centos fedora'},), 'rhel'), (({'ID': 'amzn', 'ID_LIKE': 'fedora'},), 'rhel'),
            (({'ID': 'pop', 'ID_LIKE': 'ubuntu debian'},), 'debian'), (({'ID': 'sles', 'ID_LIKE': 'suse'},), 'suse'),
            (({'ID': 'alpine'},), 'alpine'), (({'ID': 'nixos'},), 'nixos'), (({'ID_LIKE': 'arch'},), 'arch'), (({},), None)])

    def test_version_of_debian_is_its_point_release(self):
        self.check_table(agent.platform_version, [
            (({'ID': 'debian', 'VERSION_ID': '12'}, '12.11'), '12.11'),
            (({'ID': 'debian', 'VERSION_ID': '12'}, None), '12'),
            (({'ID': 'debian'}, 'trixie/sid'), None), (({'ID': 'ubuntu', 'VERSION_ID': '22.04'}, 'bookworm/sid'), '22.04'),
            (({'ID': 'ubuntu', 'VERSION_ID': '22.04'}, '12.11'), '22.04'), (({}, None), None)])

    def test_uptime(self):
        self.check_parse(agent.parse_uptime, {
            'real': (UPTIME, 261), 'one column': ('7.99\n', 7), 'extra column': ('1.5 2.5 3.5\n', 1),
        }, {
            'not a number': ('long 2.0\n', "uptime: malformed line: 'long 2.0'"), 'infinite': ('inf 1\n', "'inf 1'"),
            'empty': ('', 'uptime'),
        })

    def test_host_id_is_of_the_machine_or_the_installation_or_the_boot(self):
        machine, boot = 'etc/machine-id', 'proc/sys/kernel/random/boot_id'
        files = {'sys/class/dmi/id/product_uuid': '5F0C1B1E-3F5A\n', machine: 'd249c048\n', boot: '06f83538\n'}
        self.check_table(lambda *names: agent.collect_host_id(roots_below(self.tree({name: files[name] for name in names}))), [
            (tuple(files), '5f0c1b1e-3f5a'), ((machine, boot), 'd249c048'), ((boot,), '06f83538'), ((), None)])

    def test_machine_id_of_the_first_boot_is_none(self):
        root = self.tree({'etc/machine-id': 'uninitialized\n', 'proc/sys/kernel/random/boot_id': '06f83538\n'})
        self.assertEqual('06f83538', agent.collect_host_id(roots_below(root)))

    def test_os_release_below_usr_counts_where_etc_has_none(self):
        fields, _ = agent.collect_system(roots_below(self.tree({'usr/lib/os-release': 'ID=arch\n'})), None)
        self.assertEqual(('arch', 'arch', None), tuple(fields[f'platform{name}'] for name in ('', '_family', '_version')))

    def test_system_is_that_of_uname_and_hostname(self):
        fields, _ = agent.collect_system(LIVE, None)
        self.assertEqual([self.tool('uname', flag).strip() for flag in ('-n', '-r', '-m')],
                         [fields[name] for name in ('hostname', 'kernel_version', 'kernel_arch')])
        self.assertEqual(self.tool('hostname').strip(), fields['hostname'])

    def test_boot_was_uptime_ago(self):
        node = agent.collect_node(LIVE, {}, 0).message
        self.assertAlmostEqual(time.time(), node.boot_time + node.uptime, delta=5)


# --- cgroup files

def below(directory, files):
    """The files of one directory, for a tree."""
    return {f'{directory}/{name}': text for name, text in files.items()}


def counting_lines(names, first=1):
    """`name number` lines that count on from first, and a line of a later kernel."""
    return ''.join(f'{name} {number}\n' for number, name in enumerate(names.split(), first)) + 'later 99\n'


V2 = {'sys/fs/cgroup/cgroup.controllers': 'cpuset cpu io memory hugetlb pids rdma misc\n'}
# A group, each number another; the pressure files come last.
GROUP_V2 = {
    'cpu.stat': counting_lines('usage_usec user_usec system_usec nr_periods nr_throttled throttled_usec'),
    'cpu.max': '7 8\n', 'cpu.weight': '9\n', 'memory.current': '11\n', 'memory.peak': '12\n', 'memory.max': '13\n',
    'memory.high': '14\n', 'memory.swap.current': '15\n', 'memory.swap.max': '16\n',
    'memory.stat': counting_lines('anon file inactive_file active_file slab kernel shmem file_mapped sock pgfault pgmajfault', 17),
    'memory.events': counting_lines('max oom oom_kill', 28), 'io.stat': '8:16 rbytes=1 wbytes=2 rios=3 wios=4\n' + IO_STAT,
    'pids.current': '31\n', 'pids.max': '32\n',
    **{f'{name}.pressure': f'some avg10=0 avg60=0 avg300=0 total={number}\n' for number, name in enumerate(('cpu', 'memory', 'io'), 33)}}
CPU_V2 = dict(usage_usec=1, user_usec=2, system_usec=3, nr_periods=4, nr_throttled=5, throttled_usec=6, quota_usec=7, period_usec=8)
MEMORY_V2 = dict(
    current_bytes=11, peak_bytes=12, max_bytes=13, swap_current_bytes=15, swap_max_bytes=16, anon_bytes=17, file_bytes=18,
    inactive_file_bytes=19, active_file_bytes=20, kernel_bytes=22, shmem_bytes=23, file_mapped_bytes=24, sock_bytes=25, pgfault=26,
    pgmajfault=27, events_oom_kill=30)
# The same numbers in the units and under the names of v1, by controller; without total_ the numbers are the group's alone.
GROUP_V1 = {
    'cpuacct': {'cpuacct.usage': '1999\n', 'cpuacct.stat': 'user 3\nsystem 5\n'},
    'cpu': {'cpu.stat': 'nr_periods 4\nnr_throttled 5\nthrottled_time 6999\n', 'cpu.cfs_quota_us': '7\n', 'cpu.cfs_period_us': '8\n',
            'cpu.shares': '10\n'},
    'memory': {
        'memory.usage_in_bytes': '11\n', 'memory.max_usage_in_bytes': '12\n', 'memory.limit_in_bytes': '13\n',
        'memory.memsw.usage_in_bytes': '26\n', 'memory.memsw.limit_in_bytes': '29\n',
        'memory.stat': 'rss 1\ncache 2\ninactive_file 3\npgfault 4\n' + counting_lines(
            'total_rss total_cache total_inactive_file total_active_file slab kernel total_shmem total_mapped_file sock total_pgfault '
            'total_pgmajfault', 17),
        'memory.kmem.usage_in_bytes': '22\n', 'memory.kmem.tcp.usage_in_bytes': '25\n',
        'memory.oom_control': 'oom_kill_disable 0\nunder_oom 0\noom_kill 30\n'},
    'blkio': {'blkio.throttle.io_service_bytes': BLKIO,
              'blkio.throttle.io_serviced': '254:0 Read 8\n254:0 Write 4\n254:0 Total 12\nTotal 12\n'},
    'pids': {'pids.current': '31\n', 'pids.max': '32\n'}}
LAYOUTS_V1 = {'separate': {name: name for name in GROUP_V1}, 'joined': {**{name: name for name in GROUP_V1}, 'cpu': 'cpu,cpuacct',
                                                                       'cpuacct': 'cpu,cpuacct'}}
LAYOUTS_V1['the other way'] = {**LAYOUTS_V1['separate'], 'cpu': 'cpuacct,cpu', 'cpuacct': 'cpuacct,cpu'}
NO_LIMIT_V1 = '9223372036854771712\n'


def group_v1(path, layout='joined', group=GROUP_V1):
    return {name: text for controller, files in group.items()
            for name, text in below(f'sys/fs/cgroup/{LAYOUTS_V1[layout][controller]}/{path}', files).items()}


class CgroupFilesTest(AgentTest):
    def test_cpu_max(self):
        self.check_parse(agent.parse_cpu_max, {
            'real': (CPU_MAX, (10000, 100000)), 'no limit': ('max 100000\n', (None, None)),
        }, {
            'cut': ('10000\n', "cpu.max: malformed line: '10000'"), 'not a number': ('x 100000\n', "'x 100000'"), 'empty': ('', 'cpu.max'),
        })

    def test_number(self):
        self.check_parse(lambda text: agent.parse_number('pids.max', text), {
            'real': ('4676\n', 4676), 'no limit': ('max\n', None), 'zero': ('0\n', 0),
        }, {'a word': ('none\n', r"pids.max: malformed line: 'none\n'"), 'empty': ('', "pids.max: malformed line: ''")})

    def test_io_stat(self):
        one = (1, 2, 3, 4)
        self.check_parse(agent.parse_io_stat, {
            'real': (IO_STAT, {'254:0': (629145600, 629145600, 688, 903)}),
            'oldest: no discards': ('8:0 rbytes=1 wbytes=2 rios=3 wios=4\n', {'8:0': one}),
            'two devices': ('8:0 rbytes=1 wbytes=2 rios=3 wios=4\n8:16 rbytes=5 wbytes=6 rios=7 wios=8\n',
                            {'8:0': one, '8:16': (5, 6, 7, 8)}),
            'a device without statistics': ('7:0\n8:0 rbytes=1 wbytes=2 rios=3 wios=4\n', {'8:0': one}),
            'in one line, as Linux 5.15 has it': ('7:1 7:0 8:0 rbytes=1 wbytes=2 rios=3 wios=4\n', {'8:0': one}),
            'of io.latency and io.cost': ('8:0 rbytes=1 wbytes=2 rios=3 wios=4 cost.vrate=100.00 depth=max\n', {'8:0': one}),
            'of io.cost alone': ('8:0 cost.vrate=100.00\n', {}),
            'empty': ('', {}),
        }, {
            'not a number': ('8:0 rbytes=x\n', "io.stat: malformed line: '8:0 rbytes=x'"), 'no device': ('rbytes=1\n', "'rbytes=1'"),
            'the second of two': ('8:0 rbytes=1 wbytes=2 rios=3 wios=4\n8:16 rbytes=5 wbytes=6 rios=7 wios=8x\n', "'8:16 rbytes=5"),
        })

    def test_blkio(self):
        self.check_parse(agent.parse_blkio, {
            'real': (BLKIO, {'254:0': {'Read': 4194304, 'Write': 2097152, 'Sync': 6291456, 'Async': 0, 'Discard': 0, 'Total': 6291456}}),
            'two devices': ('8:0 Read 1\n8:16 Read 2\nTotal 3\n', {'8:0': {'Read': 1}, '8:16': {'Read': 2}}),
            'nothing was counted': ('Total 0\n', {}), 'empty': ('', {}),
        }, {'cut': ('8:0\n', "blkio: malformed line: '8:0'"), 'not a number': ('8:0 Read x\n', "'8:0 Read x'")})

    def test_memory_stat(self):
        names = ('anon', 'file', 'pgfault')
        self.check_parse(lambda text: agent.parse_memory_stat(text, names), {
            'all': ('anon 1\nfile 2\npgfault 3\n', {'anon': 1, 'file': 2, 'pgfault': 3}),
            'another order': ('pgfault 3\nfile 2\nanon 1\n', {'anon': 1, 'file': 2, 'pgfault': 3}),
            'names within names': ('inactive_anon 7\nanon_thp 8\nanon 1\nfile_dirty 9\n', {'anon': 1}),
            'no line feed at the end': ('later 9\nfile 22', {'file': 22}), 'empty': ('', {}),
        }, {'not a number': ('anon x\n', "memory.stat: malformed line: 'anon x'"), 'two numbers': ('file 1 2\n', "'file 1 2'"),
            'something else': ('x\n', r"memory.stat: malformed: 'x\n'")})

    def collect(self, files, path='a/b'):
        """The group, and its limits."""
        roots = roots_below(self.tree(files))
        group = agent.collect_cgroup(roots, agent.read_cgroup_tree(roots), path, None)
        return (wire.CgroupMetrics.FromString(group.serialized), group.limits) if group else (None, None)

    def test_v2_has_every_number_in_its_field(self):
        group, _ = self.collect({**V2, **below('sys/fs/cgroup/a/b', GROUP_V2)})
        self.assertEqual(wire.CgroupMetrics(
            path='a/b', cpu=wire.CgroupCpu(weight=9, **CPU_V2),
            memory=wire.CgroupMemory(high_bytes=14, slab_bytes=21, events_max=28, events_oom=29, **MEMORY_V2),
            io=[wire.CgroupIo(device='254:0', rbytes=629145600, wbytes=629145600, rios=688, wios=903),
                wire.CgroupIo(device='8:16', rbytes=1, wbytes=2, rios=3, wios=4)],
            pids=wire.CgroupPids(current=31, max=32),
            **{f'{name}_pressure': agent.build_psi_metrics({'some': (0, 0, 0, number)})
               for number, name in enumerate(('cpu', 'memory', 'io'), 33)}), group)

    def test_v1_has_the_same_numbers_in_the_same_fields(self):
        expected = wire.CgroupMetrics(
            path='a/b', cpu=wire.CgroupCpu(shares=10, **{**CPU_V2, 'user_usec': 30_000, 'system_usec': 50_000}),
            memory=wire.CgroupMemory(**MEMORY_V2), io=[wire.CgroupIo(device='254:0', rbytes=4194304, wbytes=2097152, rios=8, wios=4)],
            pids=wire.CgroupPids(current=31, max=32))
        hybrid = {'sys/fs/cgroup/unified/cgroup.controllers': '\n', 'sys/fs/cgroup/unified/a/b/cpu.stat': 'usage_usec 77\n'}
        for layout in LAYOUTS_V1:
            for extra in ({}, hybrid):
                with self.subTest(layout, hybrid=bool(extra)):
                    self.assertEqual(expected, self.collect({**group_v1('a/b', layout), **extra})[0])

    def test_v1_with_links_to_the_joined_directory(self):
        """As systemd makes them: cpu -> cpu,cpuacct."""
        root = self.tree(group_v1('a/b'))
        for name in ('cpu', 'cpuacct'):
            os.symlink('cpu,cpuacct', f'{root}/sys/fs/cgroup/{name}')
        group = agent.collect_cgroup(roots_below(root), agent.read_cgroup_tree(roots_below(root)), 'a/b', None)
        cpu = wire.CgroupMetrics.FromString(group.serialized).cpu
        self.assertEqual((1, 5, 7), (cpu.usage_usec, cpu.nr_throttled, cpu.quota_usec))

    def test_no_limit_is_absent(self):
        unlimited = dict.fromkeys(('memory.max', 'memory.high', 'memory.swap.max', 'pids.max'), 'max\n')
        _, limits = self.collect({**V2, **below('sys/fs/cgroup/a/b', {**GROUP_V2, **unlimited, 'cpu.max': 'max 100000\n'})})
        self.assertEqual(agent.Limits(weight=9), limits)
        files = group_v1('a/b')
        for name, text in {'memory/a/b/memory.limit_in_bytes': NO_LIMIT_V1, 'memory/a/b/memory.memsw.limit_in_bytes': NO_LIMIT_V1,
                           'cpu,cpuacct/a/b/cpu.cfs_quota_us': '-1\n', 'pids/a/b/pids.max': 'max\n'}.items():
            files[f'sys/fs/cgroup/{name}'] = text
        self.assertEqual(agent.Limits(shares=10), self.collect(files)[1])
        self.check_table(agent.limited, [((2 ** 63 - 4096,), None), ((2 ** 63 - 65536,), None), ((-1,), None), ((None,), None),
                                         ((0,), 0), ((2 ** 40,), 2 ** 40)])

    def test_files_that_are_absent_are_fields_that_are_absent(self):
        """The root group of v2, and a kernel without swap, pressure, and pids."""
        group, limits = self.collect({**V2, 'sys/fs/cgroup/a/b/cpu.stat': 'usage_usec 0\n'})
        self.assertEqual(wire.CgroupMetrics(path='a/b', cpu=wire.CgroupCpu(usage_usec=0), memory=wire.CgroupMemory()), group)
        self.assertEqual(agent.Limits(), limits)
        group, _ = self.collect({'sys/fs/cgroup/memory/a/b/memory.usage_in_bytes': '5\n'})
        self.assertEqual(wire.CgroupMetrics(path='a/b', cpu=wire.CgroupCpu(), memory=wire.CgroupMemory(current_bytes=5)), group)

    def test_group_that_is_gone_is_none(self):
        for files in (V2, {'sys/fs/cgroup/memory/x': ''}):
            self.assertIsNone(self.collect(files)[0])
        self.assertIsNone(agent.read_cgroup_tree(roots_below(self.tree({'sys/fs/cgroup/unified/x': ''}))))
        self.assertIsNone(agent.read_cgroup_tree(roots_below(self.directory())))

    def known_group(self, files=GROUP_V2, version=2):
        """The root, the tree, and a group that was read once: `a`."""
        self.root = self.tree({**V2, **below('sys/fs/cgroup/a', files)} if version == 2 else group_v1('a'))
        roots = roots_below(self.root)
        self.cgroups = agent.read_cgroup_tree(roots)
        return roots, self.cgroups, agent.collect_cgroup(roots, self.cgroups, 'a', None)

    def test_limits_are_read_again_when_they_are_due(self):
        roots, tree, known = self.known_group()
        self.assertAlmostEqual(time.monotonic() + agent.READ_AGAIN_SECONDS, known.due, delta=5)
        write_tree(self.root, {'sys/fs/cgroup/a/memory.max': '99\n', 'sys/fs/cgroup/a/memory.current': '98\n'})
        for due, expected in ((known.due, (98, 13)), (0, (98, 99))):
            memory = wire.CgroupMetrics.FromString(agent.collect_cgroup(roots, tree, 'a', known._replace(due=due)).serialized).memory
            self.assertEqual(expected, (memory.current_bytes, memory.max_bytes))

    def test_file_that_was_absent_is_looked_for_when_the_limits_are(self):
        roots, tree, known = self.known_group({name: text for name, text in GROUP_V2.items() if name != 'pids.current'})
        write_tree(self.root, {'sys/fs/cgroup/a/pids.current': '31\n', 'sys/fs/cgroup/a/memory.current': '98\n'})
        for due, expected in ((known.due, 0), (0, 31)):
            group = agent.collect_cgroup(roots, tree, 'a', known._replace(due=due))
            self.assertEqual(expected, wire.CgroupMetrics.FromString(group.serialized).pids.current)

    def test_file_that_has_gone_and_is_there_again_is_opened_again(self):
        """As those of a controller that is taken from a group, and given back to it."""
        roots, tree, known = self.known_group()
        number = [file.names[0] for file in agent.GROUP_FILES_V2].index('io.stat')
        with subprocess.Popen(['sleep', '60']) as process:
            os.dup2(agent.open_file('/proc', f'{process.pid}/statm'), known.files.descriptors[number])
            process.kill()
        without = agent.collect_cgroup(roots, tree, 'a', known)
        self.assertFalse(wire.CgroupMetrics.FromString(without.serialized).io)
        again = agent.collect_cgroup(roots, tree, 'a', without._replace(due=0))
        self.assertEqual(2, len(wire.CgroupMetrics.FromString(again.serialized).io))

    def test_group_at_rest_is_the_same_and_not_read_to_its_end(self):
        for version, files in ((2, agent.GROUP_FILES_V2), (1, agent.GROUP_FILES_V1)):
            roots, tree, known = self.known_group(version=version)
            with mock.patch.object(agent.os, 'pread', wraps=os.pread) as read:
                self.assertIs(known, agent.collect_cgroup(roots, tree, 'a', known))
                self.assertEqual(agent.CGROUP_VERSIONS[version].telling, read.call_count)

    def test_each_telling_file_alone_tells_that_something_has_happened(self):
        for version, files in ((2, agent.GROUP_FILES_V2), (1, agent.GROUP_FILES_V1)):
            for file in files[:agent.CGROUP_VERSIONS[version].telling]:
                with self.subTest(file.names[-1]):
                    roots, tree, known = self.known_group(version=version)
                    directory = f'{self.root}/sys/{tree.directories[file.controller]}/a'
                    with open(f'{directory}/{file.names[-1]}', 'r+') as open_file:
                        text = open_file.read()
                        open_file.seek(0)
                        open_file.write(re.sub(r'\d(?=\d*\n)', '7', text))
                    after = agent.collect_cgroup(roots, tree, 'a', known)
                    self.assertIsNot(known, after)
                    self.assertNotEqual(known.serialized, after.serialized)

    def test_group_that_was_made_anew_under_the_same_path_is_read_anew(self):
        roots, tree, known = self.known_group()
        os.truncate(f'{self.root}/sys/fs/cgroup/a/cpu.stat', 0)    # as the kernel's ENODEV: nothing can be had of the old one
        shutil.rmtree(f'{self.root}/sys/fs/cgroup/a')
        self.assertIsNone(agent.collect_cgroup(roots, tree, 'a', known))
        write_tree(self.root, {'sys/fs/cgroup/a/cpu.stat': 'usage_usec 77\n'})
        self.assertEqual(77, agent.collect_cgroup(roots, tree, 'a', known).usage_usec)

    def test_files_of_a_group_are_closed_with_it(self):
        before = len(os.listdir('/proc/self/fd'))
        roots, tree, known = self.known_group()
        self.assertEqual(before + len(agent.GROUP_FILES_V2), len(os.listdir('/proc/self/fd')))
        again = agent.collect_cgroup(roots, tree, 'a', known._replace(due=0))
        self.assertIs(known.files, again.files)
        self.assertEqual(before + len(agent.GROUP_FILES_V2), len(os.listdir('/proc/self/fd')))
        del again
        del known
        self.assertEqual(before, len(os.listdir('/proc/self/fd')))

    def test_with_few_descriptors_left_files_are_opened_each_time(self):
        before = len(os.listdir('/proc/self/fd'))
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (agent.SPARE_DESCRIPTORS, limits[1]))
        roots, tree, known = self.known_group()
        write_tree(self.root, {'sys/fs/cgroup/a/memory.current': '98\n'})
        after = agent.collect_cgroup(roots, tree, 'a', known)
        self.assertIs(after, agent.collect_cgroup(roots, tree, 'a', after))
        self.assertEqual((None, None, 98), (known.files, after.files, wire.SerializedContainer.FromString(after.container).memory_metrics.usage_bytes.value))
        self.assertEqual(before, len(os.listdir('/proc/self/fd')))

    def test_malformed_files_are_named(self):
        for name in GROUP_V2:
            with self.subTest(name), self.assertRaisesRegex(ValueError, name if 'pressure' not in name else 'pressure'):
                self.collect({**V2, **below('sys/fs/cgroup/a/b', {**GROUP_V2, name: 'x y rbytes=w\n'})})
        for controller, files in GROUP_V1.items():
            for name in files:
                with self.subTest(name), self.assertRaises(ValueError):
                    self.collect(group_v1('a/b', group={**GROUP_V1, controller: {**files, name: 'x y z w\n'}}))


class RealGroupTest(AgentTest):
    """cgroup v2 of this machine's kernel, whatever controllers it has there: open files tell what happens, and when it is over."""

    def setUp(self):
        mounts = [mount for mount in agent.parse_mountinfo(agent.read_text('/proc', 'self/mountinfo')) if mount.fstype == 'cgroup2']
        if os.geteuid() or not mounts:
            self.skipTest('needs root and a mounted cgroup v2')
        self.name = f'kubensage-test-{uuid.uuid4()}'
        self.top = f'{mounts[0].mountpoint}/{self.name}'
        root = self.directory()
        os.makedirs(f'{root}/fs')
        os.symlink(mounts[0].mountpoint, f'{root}/fs/cgroup')
        self.roots, self.known = agent.Roots('/proc', root, '/'), {}
        for path in ('', '/rest', '/busy'):
            self.make(path)

    def make(self, path):
        os.mkdir(f'{self.top}{path}')
        self.addCleanup(self.remove, path)

    def remove(self, path):
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(f'{self.top}{path}')

    def start(self, path, *command):
        process = subprocess.Popen(['sh', '-c', f'echo $$ >{self.top}{path}/cgroup.procs && exec "$@"', 'sh', *command],
                                   stdout=subprocess.PIPE)
        self.addCleanup(self.end, process)
        return process

    def end(self, process):
        process.kill()
        with process:
            process.wait()

    def usage(self):
        """CPU time by group, None for one that is gone."""
        tree = agent.read_cgroup_tree(self.roots)
        self.known = {path: agent.collect_cgroup(self.roots, tree, self.name + path, self.known.get(path)) for path in ('/rest', '/busy')}
        return [group and group.usage_usec for group in self.known.values()]

    def test_what_has_run_has_used_time_and_what_is_gone_is_none(self):
        sleeper = self.start('/rest', 'sh', '-c', 'echo; exec sleep 60')
        spinner = self.start('/busy', 'sh', '-c', 'echo; while :; do :; done')
        sleeper.stdout.readline(), spinner.stdout.readline()
        after = self.usage()
        for _ in range(20):    # until the sleeper sleeps
            before, files = after, [group.files for group in self.known.values()]
            time.sleep(0.1)
            after = self.usage()
            if before[0] == after[0]:
                break
        self.assertEqual(before[0], after[0])
        self.assertTrue(0 < before[1] < after[1])
        self.assertEqual(files, [group.files for group in self.known.values()])
        self.end(spinner)
        self.assertGreaterEqual(self.usage()[1], after[1])
        self.remove('/busy')
        self.assertEqual([after[0], None], self.usage())
        self.make('/busy')
        self.assertEqual([after[0], 0], self.usage())
        self.remove('/busy')
        self.make('/busy')
        self.assertEqual([after[0], 0], self.usage())
        self.assertIsNotNone(self.known['/busy'].files)


# --- services

class ServicesTest(AgentTest):
    def test_daemons_of_the_node_by_their_units(self):
        usual = {'kubelet': GROUP_V2, 'containerd': GROUP_V2, 'ssh': GROUP_V2}
        v2 = {path: text for name, group in usual.items()
              for path, text in below(f'sys/fs/cgroup/system.slice/{name}.service', group).items()}
        v1 = {path: text for name in usual for path, text in group_v1(f'system.slice/{name}.service').items()}
        for what, files in {'v2': {**V2, **v2}, 'v1': v1}.items():
            with self.subTest(what):
                roots = roots_below(self.tree(files))
                fields, after = agent.collect_services(roots, None)
                self.assertEqual([('kubelet.service', 1, 11, 5), ('containerd.service', 1, 11, 5)], [
                    (service.name, service.cgroup.cpu.usage_usec, service.cgroup.memory.current_bytes, service.cgroup.cpu.nr_throttled)
                    for service in fields['services']])
                self.assertEqual(after, agent.collect_services(roots, after)[1])
        self.assertEqual({'services': []}, agent.collect_services(roots_below(self.directory()), None)[0])


# --- node

def renderings(metrics):
    """Every way to show a snapshot."""
    view = agent.View(80, 24)
    return agent.render_view(None, metrics, view), agent.render_json(metrics), agent.render_prometheus(metrics)


class NodeTest(AgentTest):
    def test_empty_root_gives_a_valid_snapshot_with_everything_unset(self):
        part = agent.collect_node(roots_below(self.directory()), {}, 10)
        self.assertEqual({}, part.failures)
        self.assertLessEqual({field.name for field, _ in part.message.ListFields()}, {'os', 'kernel_arch'})
        metrics = wire.Metrics.FromString(wire.Metrics(node_metrics=part.message).SerializeToString())
        self.assertEqual(part.message, metrics.node_metrics)
        for text in renderings(metrics):
            self.assertTrue(text)

    def test_malformed_subject_is_left_out_and_the_rest_goes_out(self):
        root = self.tree(NODE)
        whole = {field.name for field, _ in agent.collect_node(roots_below(root), {}, 10).message.ListFields()}
        cpu = {'boot_time', 'cpu_infos', 'cpu_seconds', 'kernel_activity'}
        memory = {'total_memory', 'available_memory', 'used_memory', 'memory_used_perc', 'memory_detail', 'vmstat'}
        for path, text, subjects, missing in (
                ('proc/stat', 'cpu x', 'cpu', cpu),
                ('proc/cpuinfo', 'processor', 'cpu', cpu),
                ('proc/meminfo', 'MemTotal', 'memory', memory),
                ('proc/meminfo', f'MemTotal: {2 ** 64}', 'memory', memory),
                ('proc/vmstat', 'oom_kill', 'memory', memory),
                ('proc/pressure/io', 'some', 'pressure', {f'psi_{name}_metrics' for name in ('cpu', 'memory', 'io', 'irq')}),
                ('proc/loadavg', '1', 'load, kernel limits', {'load_average', 'kernel_limits'}),
                ('proc/sys/fs/file-nr', '1', 'kernel limits', {'kernel_limits'}),
                ('proc/sys/kernel/pid_max', 'x', 'kernel limits', {'kernel_limits'}),
                ('proc/1/net/sockstat', 'TCP: x y', 'network protocols', {'network_protocols'}),
                ('proc/1/net/softnet_stat', 'x', 'network protocols', {'network_protocols'}),
                ('sys/fs/cgroup/system.slice/kubelet.service/cpu.stat', 'x', 'services', {'services'}),
                ('proc/1/statm', 'x y', 'processes', {'procs', 'processes_mem_info'}),
                ('proc/1/mountinfo', 'x', 'file systems', {'disk_usages'}),
                ('proc/diskstats', 'x', 'disk I/O', {'disk_io_summary', 'disks'}),
                ('proc/1/net/dev', 'lo: 1', 'network', {'net_usage', 'network_interfaces'}),
                ('sys/class/net/lo/mtu', 'wide', 'network', {'net_usage', 'network_interfaces'}),
                ('proc/uptime', 'x', 'system', {'hostname', 'uptime', 'os', 'platform', 'platform_family', 'platform_version',
                                                'kernel_version', 'kernel_arch', 'host_id'})):
            with self.subTest(path=path, text=text):
                write_tree(root, {path: text})
                part = agent.collect_node(roots_below(root), {}, 10)
                write_tree(root, {path: NODE[path]})
                self.assertEqual(subjects.split(', '), list(part.failures))
                self.assertEqual(missing, whole - {field.name for field, _ in part.message.ListFields()})

    def test_other_read_errors_are_a_failure_of_their_subject(self):
        root = self.tree(NODE)
        os.remove(f'{root}/proc/meminfo')
        os.symlink('/proc/self/mem', f'{root}/proc/meminfo')
        self.assertEqual(['memory'], list(agent.collect_node(roots_below(root), {}, 10).failures))

    def test_subjects_get_back_what_they_gave(self):
        root = self.tree({'proc/stat': 'cpu 0 0 0 0\ncpu0 0 0 0 0\n'})
        first = agent.collect_node(roots_below(root), {}, 10)
        write_tree(root, {'proc/stat': 'cpu 1 0 0 3\ncpu0 1 0 0 3\n'})
        second = agent.collect_node(roots_below(root), first.after, 10)
        self.assertFalse(first.message.HasField('total_cpu_percentage'))
        self.assertEqual(25.0, second.message.total_cpu_percentage)


# --- output

class OutputTest(AgentTest):
    def test_sizes_and_times_for_people(self):
        self.check_table(agent.human_bytes, [
            ((0,), '0 B'), ((1023,), '1023 B'), ((1024,), '1.0 KiB'), ((1536 * 1024,), '1.5 MiB'), ((2 ** 30,), '1.0 GiB'),
            ((2 ** 40,), '1.0 TiB'), ((5000 * 2 ** 40,), '5000.0 TiB')])
        self.check_table(agent.human_seconds, [
            ((59,), '0 min'), ((3599,), '59 min'), ((3600,), '1 h 0 min'), ((172799,), '47 h 59 min'), ((172800,), '2 d 0 h'),
            ((180000,), '2 d 2 h')])

    def test_json_is_one_line_of_ascii_and_leaves_out_what_is_absent(self):
        name = 'new\nline \x9b \u2028 \u20ac'
        metrics = wire.Metrics(timestamp=1, node_metrics=wire.NodeMetrics(hostname=name, uptime=0))
        line = agent.render_json(metrics)
        self.assertTrue(line.isascii() and line.isprintable(), line)
        node = json.loads(line)['node_metrics']
        self.assertEqual((name, '0'), (node['hostname'], node['uptime']))
        self.assertFalse({'boot_time', 'primary_ipv4', 'psi_io_metrics', 'net_usage'} & node.keys())

    def test_terminal_of_another_encoding_gets_question_marks(self):
        root = self.tree({'proc/7/statm': '1 2 3\n', 'proc/7/comm': 'na\u20acme\n'})
        for output in ('table', 'json', 'prometheus'):
            with self.subTest(output):
                run = run_on_tree(root, '--output', output, PYTHONIOENCODING='ascii')
                self.assertEqual((0, []), (run.returncode, run.stderr.splitlines()[2 - (os.geteuid() == 0):]))


# --- live view

def sample(seconds: float, **node: Any) -> wire.Metrics:
    """A node after so many seconds of the agent: every counter has gone on by 1000 a second."""
    count = round(1000 * seconds)
    defaults = dict(
        hostname='node-a', platform='debian', platform_version='13', kernel_version='6.12.1', uptime=7200,
        total_cpu_percentage=75.0, cpu_infos=[wire.CpuInfo(cpu=0), wire.CpuInfo(cpu=1)],
        cpu_seconds=wire.CpuSeconds(user=3 * seconds, system=2 * seconds, idle=5 * seconds), total_memory=2**30,
        memory_used_perc=50.0, memory_detail=wire.MemoryDetail(swap_total_bytes=2**30, swap_free_bytes=2**28),
        load_average=wire.LoadAverage(load1=1.5, load5=2.5, load15=3.5), procs=99,
        net_usage=wire.NetUsage(total_bytes_received=count, total_bytes_sent=2 * count),
        disk_io_summary=wire.DiskIOSummary(total_read_bytes=3 * count, total_write_bytes=4 * count),
        disk_usages=[wire.DiskUsage(mountpoint='/', used_percent=20), wire.DiskUsage(mountpoint='/data', used_percent=85),
                     wire.DiskUsage(mountpoint='/nfs', stuck=True)],
        container_runtime=wire.RuntimeMetrics(name='containerd', version='2.0', conditions={'RuntimeReady': True}))
    return wire.Metrics(node_metrics=wire.NodeMetrics(**{**defaults, **node}), agent_metrics=wire.AgentMetrics(
        uptime_seconds=seconds, cpu_seconds_total=seconds / 50, resident_bytes=2**25))


def shown_container(container_id: str, seconds: float, cores: float = 0, memory: int = 0, **others: Any) -> wire.ContainerMetrics:
    """Throttled in one period of four, where its limit is 2 cores."""
    periods = round(10 * seconds)
    cgroup = wire.CgroupMetrics(
        cpu=wire.CgroupCpu(quota_usec=200000, period_usec=100000, nr_periods=periods, nr_throttled=periods // 4),
        memory=wire.CgroupMemory(max_bytes=2**30),
        io=[wire.CgroupIo(device='8:0', rbytes=round(2048 * seconds)), wire.CgroupIo(device='8:1', wbytes=round(4096 * seconds))])
    return wire.ContainerMetrics(**{**dict(
        id=container_id, name=container_id, state='CONTAINER_RUNNING', image=f'registry/{container_id}:1', cgroup=cgroup,
        cpu_metrics=wire.CpuMetrics(usage_nano_cores=UInt64Value(value=round(cores * 1e9))),
        memory_metrics=wire.MemoryMetrics(working_set_bytes=UInt64Value(value=memory))), **others})


def shown_pods(seconds: float) -> List[wire.PodMetrics]:
    interfaces = [wire.PodInterface(name=f'eth{n}', counters=wire.InterfaceCounters(
        rx_bytes=round(512 * seconds), tx_bytes=round(256 * seconds))) for n in (0, 1)]
    return [
        wire.PodMetrics(id='1', namespace='shop', name='web', network_interfaces=interfaces, container_metrics=[
            shown_container('nginx', seconds, 1.9, 2**28, restart_count=3)]),
        wire.PodMetrics(id='2', namespace='kube-system', name='dns', container_metrics=[
            shown_container('coredns', seconds, 0.25, 2**29, restart_count=7)]),
        wire.PodMetrics(id='3', namespace='shop', name='job', container_metrics=[
            shown_container('old', 0, state='CONTAINER_EXITED', status=wire.ContainerStatus(reason='OOMKilled', exit_code=137))])]


def without_colors(text: str) -> str:
    return re.sub(r'\x1b\[\d*m', '', text)


class LiveViewTest(AgentTest):
    def view(self, width: int = 80, height: Optional[int] = 24, **others: Any) -> str:
        before, after = sample(10), sample(12)
        before.pod_metrics.extend(shown_pods(10))
        after.pod_metrics.extend(shown_pods(12))
        return agent.render_view(before, after, agent.View(width, height, **others))

    def test_eighty_columns(self) -> None:
        self.assertEqual(self.view().splitlines(), [
            'node-a  debian 13  Linux 6.12.1  up 2 h 0 min',
            'cpu  [||||||||||    ]  75.0% of 2 CPUs  us 30 sy 20 ni 0 io 0 si 0 st 0',
            'mem  [|||||||       ]  50.0% of 1.0 GiB  swap [||||||||||    ] 75% of 1.0 GiB',
            'load 1.50 2.50 3.50  99 processes  pressure not known',
            'i/o  network in 1.0K/s out 2.0K/s   disks read 2.9K/s write 3.9K/s',
            'disk /nfs STUCK  /data 85%  / 20%',
            'cri  containerd 2.0 ready   agent 2.0% cpu 32.0 MiB',
            '',
            '3 pods, 2/3 containers running, by cpu   c m r sort, n namespace, q quit',
            'NAMESPACE   POD CONTAINER   CPU %LIM  THR   MEM %LIM RST STATE',
            'shop        web nginx      1.90  95%  25%  256M  25%   3 running',
            'kube-system dns coredns    0.25  12%  25%  512M  50%   7 running',
            'shop        job old        0.00   0%          0   0%   0 OOMKilled'])

    def test_two_hundred_columns_have_rates_and_images(self) -> None:
        lines = self.view(200).splitlines()
        self.assertEqual(lines[9:12], [
            'NAMESPACE   POD CONTAINER   CPU %LIM  THR   MEM %LIM   RX/s  TX/s READ/s WRITE/s RST STATE     IMAGE',
            'shop        web nginx      1.90  95%  25%  256M  25%   1.0K   512   2.0K    4.0K   3 running   registry/nginx:1',
            'kube-system dns coredns    0.25  12%  25%  512M  50%      -     -   2.0K    4.0K   7 running   registry/coredns:1'])

    def test_keys_sort_and_go_through_the_namespaces(self) -> None:
        metrics = wire.Metrics(pod_metrics=shown_pods(1))
        first = {'c': 'nginx', 'm': 'coredns', 'r': 'coredns'}
        for key, name in first.items():
            view = agent.press_key(agent.View(80), key, metrics)
            self.assertIn(name, agent.render_view(None, metrics, view).splitlines()[10], key)
            self.assertIn(f'by {agent.SORTED_BY[key]}', agent.render_view(None, metrics, view))
        view, seen = agent.View(80), []
        for _ in range(4):
            view = agent.press_key(view, 'n', metrics)
            seen.append(view.namespace)
        self.assertEqual(seen, ['kube-system', 'shop', '', 'kube-system'])
        only = agent.render_view(None, metrics, view)
        self.assertTrue('coredns' in only and 'nginx' not in only and '1 pod in kube-system' in only, only)
        for key in ('x', 'q', '\x1b', '\n'):
            self.assertEqual(agent.press_key(view, key, metrics), view)
        self.assertEqual(agent.press_key(view._replace(namespace='gone'), 'n', metrics).namespace, '')
        self.assertEqual(agent.press_key(view, 'n', None), view)

    def test_never_wider_or_higher_than_the_view(self) -> None:
        after = sample(1)
        after.pod_metrics.extend(
            wire.PodMetrics(id=str(n), namespace=f'{"n" * 30}{n}', name='p' * 200, container_metrics=[
                shown_container('c' * 99, 1, 300, 2**55, id=str(n), restart_count=12345)]) for n in range(300))
        after.node_metrics.disk_usages.extend(wire.DiskUsage(mountpoint='/' + 'm' * 50, used_percent=99) for _ in range(20))
        for width, height in ((40, 8), (40, 9), (80, 24), (109, 11), (110, 50), (160, 12), (200, 50), (80, 1000)):
            for color in (False, True):
                with self.subTest(width=width, height=height, color=color):
                    lines = without_colors(agent.render_view(None, after, agent.View(width, height, color=color))).split('\n')
                    self.assertLessEqual(max(map(len, lines)), width)
                    self.assertLessEqual(len(lines), height)
                    if height < 300:
                        self.assertEqual(lines[-1], f'... {310 - height + 1} more')
        self.assertEqual(agent.render_view(None, after, agent.View(200)).count('\n'), 309)

    def test_colours_tell_what_is_wrong_and_nothing_else_is_a_control_code(self) -> None:
        self.assertNotIn('\x1b', self.view(200))
        text = self.view(200, color=True)
        for color, marked in ((agent.RED, '/nfs STUCK'), (agent.YELLOW, '/data 85%'), (agent.RED, ' 95%'),
                              (agent.YELLOW, 'OOMKilled'), (agent.BOLD, 'node-a'), (agent.YELLOW, '|||||||||||||||')):
            with self.subTest(marked):
                self.assertIn(color + marked, text)
        self.assertNotIn(agent.YELLOW + '/ 20%', text)
        self.assertEqual(without_colors(text), self.view(200))

    def test_a_runtime_in_trouble_is_named(self) -> None:
        for runtime, expected in (
                (wire.RuntimeMetrics(name='cri-o', version='1', conditions={'RuntimeReady': True, 'NetworkReady': False}),
                 'cri  cri-o 1 NOT READY (NetworkReady)'),
                (wire.RuntimeMetrics(name='cri-o', version='1'), 'cri  cri-o 1 '),
                (wire.RuntimeMetrics(), 'cri  no container runtime found')):
            with self.subTest(expected):
                self.assertIn(expected, agent.render_view(None, sample(1, container_runtime=runtime), agent.View(80)))
        before, after = sample(1), sample(2)
        before.agent_metrics.failures_total.update({'disks': 3})
        after.agent_metrics.failures_total.update({'disks': 3, 'memory': 1})
        self.assertIn('  in trouble: memory\n', agent.render_view(before, after, agent.View(80)))

    def test_names_are_not_control_codes(self) -> None:
        evil = 'a\x1b[31m\x9bm\x07\r\n\u202eb'
        metrics = sample(1, hostname=evil, platform=evil, disk_usages=[
            wire.DiskUsage(mountpoint=evil), wire.DiskUsage(mountpoint=evil, stuck=True)],
            container_runtime=wire.RuntimeMetrics(name=evil, version=evil, conditions={evil: False}))
        metrics.agent_metrics.failures_total[evil] = 1
        metrics.pod_metrics.add(name=evil, namespace=evil, container_metrics=[wire.ContainerMetrics(
            name=evil, state=evil, image=evil)])
        for view in (agent.View(400), agent.View(400, namespace=evil)):
            text = agent.render_view(None, metrics, view)
            self.assertEqual({char for char in text if not char.isprintable()}, {'\n'})
            self.assertGreaterEqual(text.count('a?[31m?m????b'), 11)

    def test_unknown_values_are_not_shown_as_zero(self) -> None:
        for metrics in (wire.Metrics(), wire.Metrics(pod_metrics=[wire.PodMetrics(container_metrics=[wire.ContainerMetrics()])])):
            text = agent.render_view(None, metrics, agent.View(200))
            self.assertNotIn('0', ''.join(text.splitlines()[:6]))

    def test_rates_need_two_samples_of_one_counter(self) -> None:
        self.check_table(agent.per_second, [
            ((None, 1, 1), None), ((1, None, 1), None), ((1, 2, 0), None), ((2, 1, 1), None), ((10, 30, 4), 5.0), ((0, 0, 2), 0.0)])

    def test_numbers_take_five_columns_at_most(self) -> None:
        self.check_table(agent.human_short, [
            ((0,), '0'), ((998,), '998'), ((1023,), '1.0K'), ((1536,), '1.5K'), ((34 * 2**20,), '34M'),
            ((1.1 * 2**30,), '1.1G'), ((5 * 2**50,), '5P')])
        self.assertLessEqual(max(len(agent.human_short(1.07 ** n)) for n in range(500)), 5)

    def test_a_frame_clears_what_was_there(self) -> None:
        self.assertEqual(agent.render_frame('a\nb'), '\x1b[Ha\x1b[K\r\nb\x1b[K\x1b[J')


class Terminal:
    """The agent on a terminal of its own."""

    def __init__(self, test: AgentTest, *arguments: str, size: Tuple[int, int] = (24, 80), **environment: str):
        self.master, self.slave = pty.openpty()
        self.text = ''
        self.resize(*size)
        self.before = termios.tcgetattr(self.slave)
        root = test.tree({'proc/sys/kernel/hostname': 'node-pty\n', 'proc/loadavg': '0.01 0.02 0.03 1/2 3\n'})
        clean = {name: value for name, value in os.environ.items()
                 if not name.startswith('KUBENSAGE_') and name not in ('NO_COLOR', 'COLUMNS', 'LINES')}
        self.process = subprocess.Popen(
            [sys.executable, *(arguments or (agent.__file__,)), '--procfs', f'{root}/proc', '--sysfs', f'{root}/sys',
             '--rootfs', root, '--cri-socket', f'{root}/no.sock', '--main-loop-duration', '60'],
            stdin=self.slave, stdout=self.slave, stderr=self.slave, env={**clean, **environment}, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        test.addCleanup(self.close)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack('HHHH', rows, columns, 0, 0))

    def wait_for(self, text: str) -> str:
        """What is written up to and with this text, from where the last wait ended."""
        until = time.monotonic() + PATIENCE_SECONDS
        while text not in self.text:
            if not select.select([self.master], [], [], max(0, until - time.monotonic()))[0]:
                raise AssertionError(f'{text!r} is not in {self.text!r}')
            self.text += os.read(self.master, 65536).decode()
        seen, _, self.text = self.text.partition(text)
        return seen + text

    def press(self, keys: str) -> None:
        os.write(self.master, keys.encode())


class TerminalTest(AgentTest):
    def check_left(self, terminal: Terminal, code: int) -> None:
        """The screen and the terminal's attributes are as they were."""
        terminal.wait_for(agent.PLAIN + agent.LEAVE_SCREEN)
        self.assertEqual(terminal.process.wait(PATIENCE_SECONDS), code)
        self.assertEqual(termios.tcgetattr(terminal.slave), terminal.before)

    def test_keys_and_a_new_size_redraw_at_once_and_q_ends_it(self) -> None:
        terminal = Terminal(self)
        self.assertIn('node-pty', terminal.wait_for('by cpu   c m r sort, n namespace, q quit'))
        self.assertFalse(termios.tcgetattr(terminal.slave)[3] & (termios.ECHO | termios.ICANON))
        terminal.press('m')
        terminal.wait_for('by memory')
        terminal.wait_for(agent.CLEAR_BELOW)
        terminal.resize(24, 60)
        line = without_colors(terminal.wait_for(agent.CLEAR_BELOW)).splitlines()[-1]
        self.assertEqual(line.split('\x1b')[0], '0 pods, 0/0 containers running, by memory   c m r sort, n na')
        terminal.press('rq')
        self.check_left(terminal, 0)

    def test_signals_leave_the_terminal_as_it_was(self) -> None:
        terminals = [Terminal(self), Terminal(self), Terminal(self, NO_COLOR='1')]
        for terminal in terminals:
            drawn = terminal.wait_for(agent.CLEAR_BELOW)
            self.assertEqual(agent.BOLD in drawn, terminal is not terminals[2])
        terminals[0].process.terminate()
        self.check_left(terminals[0], 0)
        with open(f'/proc/{terminals[1].process.pid}/status', encoding='utf-8') as status:
            ignored = int(re.search(r'SigIgn:\s+(\w+)', status.read()).group(1), 16)
        self.assertTrue(ignored >> signal.SIGTSTP - 1 & 1)
        terminals[1].press('\x03')
        self.check_left(terminals[1], 0)
        terminals[2].press('q')
        self.check_left(terminals[2], 0)

    def test_a_crash_and_a_second_interrupt_leave_the_terminal_as_it_was(self) -> None:
        """A crash that the loop does not survive, and a cycle that hangs while Ctrl-C is pressed twice."""
        crash = 'agent.stopped_within = lambda *arguments: 1 / 0'
        hang = 'agent.run_cycle = lambda *arguments: (print("hung", flush=True), time.sleep(60))'
        crashed, hung = (Terminal(self, '-c', f'import sys, time; sys.path.insert(0, {os.path.dirname(agent.__file__)!r}); '
                                  f'import agent; {fault}; sys.exit(agent.main())') for fault in (crash, hang))
        self.check_left(crashed, 1)
        crashed.wait_for('ZeroDivisionError')
        hung.wait_for('hung')
        hung.press('\x03')
        time.sleep(0.1)
        hung.press('\x03')
        self.check_left(hung, 130)


# --- Prometheus

def exposed_metrics() -> wire.Metrics:
    disks = [wire.DiskUsage(device='/dev/a', fstype='ext4', mountpoint='/', total=100, free=40, read_only=False),
             wire.DiskUsage(device='nas:/', fstype='nfs', mountpoint='/nfs', stuck=True)]
    interfaces = [wire.InterfaceStat(name=f'eth{n}', operstate='up', speed_mbits=1000,
                                     counters=wire.InterfaceCounters(rx_bytes=11 + n)) for n in (0, 1)]
    kubelet = wire.ServiceMetrics(name='kubelet.service', cgroup=wire.CgroupMetrics(cpu=wire.CgroupCpu(usage_usec=1500000)))
    metrics = sample(10, disk_usages=disks, network_interfaces=interfaces, services=[kubelet], boot_time=1700000000,
                     vmstat=wire.Vmstat(oom_kill=2),
                     psi_cpu_metrics=wire.PsiMetrics(some=wire.PsiData(total=UInt64Value(value=3815668))))
    metrics.timestamp = 1700000123
    metrics.pod_metrics.extend(shown_pods(10))
    # The same container before its restart, and the same pod with a sandbox before this one.
    metrics.pod_metrics[0].container_metrics.insert(0, shown_container(
        'before', 10, state='CONTAINER_EXITED', name='nginx', created_at=1, status=wire.ContainerStatus(exit_code=1)))
    metrics.pod_metrics[0].container_metrics[1].created_at = 2
    metrics.pod_metrics.add(id='0', namespace='shop', name='web', created_at=-1, container_metrics=[shown_container('nginx', 1)])
    metrics.agent_metrics.failures_total['memory'] = 3
    metrics.agent_metrics.cri_methods.add(method='Version', calls_total=4, seconds_total=0.25)
    return metrics


GOLDEN_EXPOSITION = '''\
node_network_up{device="eth1"} 1
# HELP node_boot_time_seconds Node boot time, in unixtime.
# TYPE node_boot_time_seconds gauge
node_boot_time_seconds 1700000000
# HELP node_load1 1m load average.
# TYPE node_load1 gauge
node_load1 1.5
node_memory_MemTotal_bytes 1073741824
# TYPE node_vmstat_oom_kill untyped
node_vmstat_oom_kill 2
node_pressure_cpu_waiting_seconds_total 3.815668
node_filesystem_size_bytes{device="/dev/a",fstype="ext4",mountpoint="/"} 100
node_filesystem_avail_bytes{device="/dev/a",fstype="ext4",mountpoint="/"} 40
node_filesystem_readonly{device="/dev/a",fstype="ext4",mountpoint="/"} 0
node_filesystem_device_error{device="nas:/",fstype="nfs",mountpoint="/nfs"} 1
node_network_speed_bytes{device="eth1"} 125000000
# TYPE node_network_receive_bytes_total counter
node_network_receive_bytes_total{device="eth0"} 11
node_network_receive_bytes_total{device="eth1"} 12
kubensage_container_info{namespace="shop",pod="web",container="nginx",image="registry/nginx:1",state="CONTAINER_RUNNING",reason=""} 1
container_cpu_cfs_throttled_periods_total{namespace="shop",pod="web",container="nginx"} 25
container_spec_memory_limit_bytes{namespace="shop",pod="web",container="nginx"} 1073741824
container_memory_working_set_bytes{namespace="shop",pod="web",container="nginx"} 268435456
kubensage_container_restarts{namespace="kube-system",pod="dns",container="coredns"} 7
kubensage_container_exit_code{namespace="shop",pod="job",container="old"} 137
container_fs_reads_bytes_total{namespace="shop",pod="web",container="nginx",device="8:0"} 20480
container_network_receive_bytes_total{namespace="shop",pod="web",interface="eth1"} 5120
kubensage_snapshot_timestamp_seconds 1700000123
kubensage_agent_failures_total{subject="memory"} 3
kubensage_runtime_condition{condition="RuntimeReady"} 1
kubensage_agent_resident_bytes 33554432
kubensage_cri_seconds_total{method="Version"} 0.25
kubensage_service_cpu_usage_seconds_total{service="kubelet.service"} 1.5
'''


def series_of(text: str) -> List[str]:
    return [line.rpartition(' ')[0] for line in text.splitlines() if not line.startswith('#')]


class PrometheusTest(AgentTest):
    def test_golden_lines_in_order(self) -> None:
        lines = iter(agent.render_prometheus(exposed_metrics()).splitlines())
        for line in GOLDEN_EXPOSITION.splitlines():
            self.assertIn(line, lines)

    def test_each_family_is_named_and_typed_once_and_no_series_is_there_twice(self) -> None:
        for openmetrics in (False, True):
            text = agent.render_exposition(exposed_metrics(), openmetrics)
            kinds = dict(re.findall('^# TYPE (\\S+) (\\S+)$', text, re.M))
            for word in ('HELP', 'TYPE'):
                names = re.findall(f'^# {word} (\\S+) .', text, re.M)
                self.assertEqual(len(names), len(set(names)))
                self.assertEqual(set(names), set(kinds))
            series = series_of(text)
            self.assertEqual([name for name, count in collections.Counter(series).items() if count > 1], [])
            for name in {line.partition('{')[0] for line in series}:
                family = name[:-6] if openmetrics and name.endswith('_total') else name
                self.assertEqual(kinds[family], 'counter' if name.endswith('_total') else kinds[family], name)
                self.assertNotEqual(kinds[family], 'counter' if not name.endswith('_total') else '', name)
            self.assertEqual(set(kinds.values()), {'counter', 'gauge', 'unknown' if openmetrics else 'untyped'})

    def test_every_sample_has_a_grammar_and_no_label_that_explodes(self) -> None:
        labels = set()
        for line in agent.render_prometheus(exposed_metrics()).splitlines():
            if not line.startswith('#'):
                self.assertRegex(line, r'\A[a-z_A-Z][a-zA-Z0-9_]*(\{([a-z_]+="([^"\\\n]|\\.)*",?)+\})? -?[0-9.e+-]+\Z')
                labels.update(re.findall(r'[{,]([a-z_]+)="', line))
        self.assertEqual(labels & {'pid', 'id', 'uid', 'container_id', 'pod_uid', 'path', 'run_id'}, set())

    def test_label_values_are_escaped(self) -> None:
        self.assertEqual(agent.render_sample('a', (('l', 'x"\\\n{},=€'),), 1), 'a{l="x\\"\\\\\\n{},=€"} 1\n')

    def test_numbers(self) -> None:
        for value, text in ((0, '0'), (True, '1'), (0.1, '0.1'), (2**53, str(2**53)), (2**64 - 1, str(2**64 - 1)), (1e-6, '1e-06'),
                            (math.nan, 'nan'), (math.inf, 'inf')):
            self.assertEqual(agent.render_sample('a', (), value), f'a {text}\n')

    def test_the_container_that_runs_and_the_last_sandbox_count(self) -> None:
        text = agent.render_prometheus(exposed_metrics())
        self.assertIn('container_cpu_cfs_periods_total{namespace="shop",pod="web",container="nginx"} 100\n', text)
        self.assertNotIn('kubensage_container_exit_code{namespace="shop",pod="web"', text)

    def test_every_row_names_a_field(self) -> None:
        """A path that no message has would be an error at the first scrape of a node that has the message."""
        for rows, message in (
                (agent.NODE_SAMPLES, wire.NodeMetrics), (agent.DISK_SAMPLES, wire.DiskIo), (agent.CGROUP_CPU_SAMPLES, wire.CgroupMetrics),
                (agent.FILE_SYSTEM_SAMPLES, wire.DiskUsage), (agent.INTERFACE_SAMPLES, wire.InterfaceStat),
                (agent.POD_INTERFACE_SAMPLES, wire.PodInterface), (agent.CONTAINER_SAMPLES, wire.ContainerMetrics),
                (agent.CGROUP_IO_SAMPLES, wire.CgroupIo), (agent.AGENT_SAMPLES, wire.AgentMetrics),
                (agent.CRI_SAMPLES, wire.CriMethodMetrics)):
            for name, text, path, _ in rows:
                with self.subTest(name):
                    self.assertRegex(text, r'\A[^\n\\]+\.\Z')
                    descriptor = message.DESCRIPTOR
                    for part in path.split('.'):
                        self.assertIn(part, descriptor.fields_by_name)
                        descriptor = descriptor.fields_by_name[part].message_type

    def test_an_empty_snapshot_has_no_node_metrics(self) -> None:
        names = {line.partition('{')[0].partition(' ')[0] for line in series_of(agent.render_prometheus(wire.Metrics()))}
        self.assertEqual({name for name in names if not name.startswith('kubensage_')} - {'node_uname_info'}, set())

    def test_once_writes_it_to_stdout(self) -> None:
        run = run_on_tree(self.tree(NODE), '--output', 'prometheus')
        self.assertEqual(run.returncode, 0, run.stderr)
        self.assertIn('\nnode_memory_MemTotal_bytes 4111904768\n', run.stdout)
        self.assertTrue(run.stdout.startswith('# HELP ') and run.stdout.endswith('\n') and '# EOF' not in run.stdout)


# --- HTTP

class HttpTest(AgentTest):
    def serve(self, host: str = '127.0.0.1') -> agent.Published:
        self.published = agent.Published(5)
        server = agent.http_server(f'{host}:0', self.published)
        self.address = server.server_address[:2]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        self.threads = threading.active_count()
        self.addCleanup(thread.join)
        self.addCleanup(agent.stop_listening, server)
        return self.published

    def connect(self) -> socket.socket:
        connection = socket.create_connection(self.address, PATIENCE_SECONDS)
        self.addCleanup(connection.close)
        return connection

    def ask(self, request: str) -> Tuple[int, Dict[str, str], str]:
        """Status, headers and body of the answer to these bytes."""
        connection = self.connect()
        connection.sendall(request.encode())
        with connection.makefile('rb') as file:
            head, _, body = file.read().decode().partition('\r\n\r\n')
        status, *headers = head.split('\r\n')
        return int(status.split()[1]), dict(header.split(': ', 1) for header in headers), body

    def get(self, path: str, accept: str = '*/*', method: str = 'GET') -> Tuple[int, Dict[str, str], str]:
        return self.ask(f'{method} {path} HTTP/1.1\r\nHost: node\r\nAccept: {accept}\r\n\r\n')

    def test_metrics_in_the_format_that_is_asked_for(self) -> None:
        agent.publish(self.serve(), exposed_metrics().SerializeToString())
        for accept, content_type, last in (
                ('*/*', agent.TEXT_TYPE, 'kubensage_snapshot_age_seconds '),
                ('text/plain;version=0.0.4', agent.TEXT_TYPE, 'kubensage_snapshot_age_seconds '),
                ('application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.3', agent.OPENMETRICS_TYPE, '# EOF')):
            status, headers, body = self.get('/metrics?collect[]=x', accept)
            self.assertEqual((status, headers['Content-Type']), (200, content_type))
            self.assertEqual(int(headers['Content-Length']), len(body.encode()))
            self.assertTrue(body.splitlines()[-1].startswith(last), body[-200:])
            self.assertEqual((body[-1], body.count('# EOF')), ('\n', last == '# EOF'))
            self.assertRegex(body, r'\nkubensage_snapshot_age_seconds \d')

    def test_a_scrape_renders_once_and_a_new_snapshot_replaces_the_last(self) -> None:
        published = self.serve()
        agent.publish(published, sample(1).SerializeToString())
        with mock.patch.object(agent, 'render_exposition', wraps=agent.render_exposition) as render:
            for _ in range(3):
                self.assertIn('kubensage_agent_uptime_seconds 1\n', self.get('/metrics')[2])
            self.assertEqual(render.call_count, 1)
            agent.publish(published, sample(2).SerializeToString())
            self.assertIn('kubensage_agent_uptime_seconds 2\n', self.get('/metrics')[2])

    def test_health(self) -> None:
        published = self.serve()
        self.assertEqual(self.get('/healthz')[::2], (503, 'no snapshot yet\n'))
        self.assertEqual(self.get('/metrics')[0], 503)
        agent.publish(published, sample(1).SerializeToString())
        self.assertEqual(self.get('/healthz')[::2], (200, 'ok\n'))
        published.taken -= 14
        self.assertEqual(self.get('/healthz')[0], 200)
        published.taken -= 2
        self.assertEqual(self.get('/healthz')[::2], (503, 'no snapshot for 16 s\n'))
        published.interval = 60
        self.assertEqual(self.get('/healthz')[0], 200)

    def test_the_page_says_what_it_is(self) -> None:
        published = self.serve()
        self.assertIn('this node', self.get('/')[2])
        agent.publish(published, sample(1, hostname='<b>&').SerializeToString())
        status, headers, body = self.get('/')
        self.assertEqual((status, headers['Content-Type']), (200, 'text/html; charset=utf-8'))
        self.assertIn('&lt;b&gt;&amp;', body)
        self.assertIn(agent.__version__, body)

    def test_no_path_leads_to_files_and_nothing_but_get_is_answered(self) -> None:
        agent.publish(self.serve(), sample(1).SerializeToString())
        for path in ('/../etc/passwd', '/%2e%2e/etc/passwd', '/metrics/', '/etc/passwd', '//etc/passwd', '/healthz/../metrics', '*',
                     'http://node/etc/passwd'):
            with self.subTest(path):
                self.assertEqual(self.get(path)[::2], (404, 'not here: /metrics, /healthz\n'))
        for method in ('HEAD', 'POST', 'PUT', 'DELETE', 'OPTIONS', 'TRACE', 'CONNECT'):
            with self.subTest(method):
                self.assertIn(self.get('/metrics', method=method)[0], (405, 501))

    def test_requests_that_are_too_long_or_nonsense_are_refused(self) -> None:
        agent.publish(self.serve(), sample(1).SerializeToString())
        self.assertEqual(self.get('/' + 'a' * 70000)[0], 414)
        self.assertEqual(self.ask('GET / HTTP/1.1\r\n' + 'A: b\r\n' * 200 + '\r\n')[0], 431)
        self.assertEqual(self.get('/healthz')[0], 200)

    def test_half_open_connections_keep_no_one_out_and_the_oldest_makes_room(self) -> None:
        agent.publish(self.serve(), sample(1).SerializeToString())
        half_open = [self.connect() for _ in range(50)]
        for connection in half_open:
            connection.sendall(b'GET /metrics HT')
        self.assertEqual(self.get('/metrics')[0], 200)
        # Closed, or reset where what it has sent was not read yet.
        with contextlib.suppress(ConnectionResetError):
            self.assertEqual(half_open[0].recv(1), b'')
        until = time.monotonic() + PATIENCE_SECONDS
        while threading.active_count() - self.threads > agent.MAX_CONNECTIONS:
            self.assertLess(time.monotonic(), until)
            time.sleep(0.01)
        half_open[-1].sendall(b'TP/1.0\r\n\r\n')
        self.assertEqual(half_open[-1].recv(12), b'HTTP/1.0 200')

    def test_a_connection_that_says_nothing_is_dropped(self) -> None:
        with mock.patch.object(agent, 'HTTP_TIMEOUT_SECONDS', 0.1):
            self.serve()
        self.assertEqual(self.connect().recv(1), b'')

    def test_a_client_that_reads_slowly_delays_no_other(self) -> None:
        published = self.serve()
        metrics = sample(1)
        metrics.pod_metrics.extend(wire.PodMetrics(namespace='n' * 200, name=f'{n}' * 50) for n in range(5000))
        agent.publish(published, metrics.SerializeToString())
        slow = socket.socket()
        self.addCleanup(slow.close)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.connect(self.address)
        slow.sendall(b'GET /metrics HTTP/1.0\r\n\r\n')
        self.assertEqual(slow.recv(12), b'HTTP/1.0 200')
        started = time.monotonic()
        agent.publish(published, sample(2).SerializeToString())
        self.assertIn('kubensage_agent_uptime_seconds 2\n', self.get('/metrics')[2])
        self.assertLess(time.monotonic() - started, 2)

    def test_many_at_once_get_the_same(self) -> None:
        agent.publish(self.serve(), exposed_metrics().SerializeToString())
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda _: self.get('/metrics'), range(100)))
        self.assertEqual({status for status, _, _ in answers}, {200})
        self.assertEqual(len({body.rpartition('kubensage_snapshot_age')[0] for _, _, body in answers}), 1)

    def test_ipv6(self) -> None:
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(('::1', 0))
        except OSError as error:
            self.skipTest(f'no IPv6 here: {error}')
        agent.publish(self.serve('[::1]'), sample(1).SerializeToString())
        self.assertEqual(self.get('/healthz')[0], 200)

    def test_an_address_that_cannot_be_had_is_one_line_and_1(self) -> None:
        with contextlib.closing(socket.socket()) as taken:
            taken.bind(('127.0.0.1', 0))
            taken.listen()
            port = taken.getsockname()[1]
            for address, reason in ((f'127.0.0.1:{port}', 'Address already in use'), ('203.0.113.1:1', 'Cannot assign')):
                run = run_agent('--listen', address, '--procfs', '/nowhere', '--sysfs', '/nowhere', '--rootfs', self.directory())
                last = run.stderr.splitlines()[-1]
                self.assertEqual((run.returncode, run.stdout, 'Traceback' in run.stderr), (1, '', False), run.stderr)
                self.assertRegex(last, f'ERROR --listen {re.escape(address)}: .*({reason})')

    def test_the_agent_serves_without_a_relay_and_ends_at_once(self) -> None:
        with contextlib.closing(socket.socket()) as free:
            free.bind(('127.0.0.1', 0))
            self.address = free.getsockname()
        root = self.tree(NODE)
        process = subprocess.Popen(
            [sys.executable, agent.__file__, '--procfs', f'{root}/proc', '--sysfs', f'{root}/sys', '--rootfs', root, '--cri-socket',
             f'{root}/no.sock', '--main-loop-duration', '0.1', '--listen', '{}:{}'.format(*self.address)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.addCleanup(process.stdout.close)
        self.addCleanup(process.kill)
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                if self.get('/healthz')[0] == 200 or time.monotonic() > until:
                    break
            except OSError:
                time.sleep(0.02)
        self.assertIn('\nnode_memory_MemTotal_bytes 4111904768\n', self.get('/metrics')[2])
        process.terminate()
        self.assertEqual((process.wait(PATIENCE_SECONDS), process.stdout.read()), (0, b''))


# --- log

class LogTest(AgentTest):
    def write_log(self, path, *arguments, lines=40):
        """That many lines of 100 bytes, to a log that is rotated at 1,000."""
        options = agent.parse_options(['--log-max-size', '0.001', *arguments], {})
        handler = agent.log_file_handler(options, path)
        logger = logging.Logger('rotation')
        logger.addHandler(handler)
        with contextlib.closing(handler):
            for number in range(lines):
                logger.info('%-99d', number)

    def numbers(self, path):
        with (gzip.open if path.endswith('.gz') else open)(path, 'rt') as file:
            return [int(line) for line in file]

    def test_rotated_files(self):
        for arguments, names in (
                (['--log-max-backups', '2'], ['a.log', 'a.log.1.gz', 'a.log.2.gz']),
                (['--log-max-backups', '2', '--log-compress=false'], ['a.log', 'a.log.1', 'a.log.2']),
                (['--log-max-backups', '1'], ['a.log', 'a.log.1.gz']),
                (['--log-max-backups', '0'], ['a.log'] + [f'a.log.{number}.gz' for number in range(1, 5)])):
            with self.subTest(arguments):
                root = self.directory()
                self.write_log(f'{root}/new/a.log', *arguments)
                self.assertEqual(names, sorted(os.listdir(f'{root}/new')))
                newest_first = [self.numbers(f'{root}/new/{name}') for name in names]
                self.assertEqual(list(range(40))[-sum(map(len, newest_first)):],
                                 [number for part in reversed(newest_first) for number in part])
                self.assertLessEqual(max(map(len, newest_first)), 10)

    def test_rotation_removes_what_is_too_old_and_nothing_else(self):
        for age, kept in (('30', {'a.log', 'a.log.1.gz', 'a.log.8', 'a.log.conf', 'b.log.9'}),
                          ('0', {'a.log', 'a.log.1.gz', 'a.log.8', 'a.log.7.gz', 'a.log.9', 'a.log.conf', 'b.log.9'})):
            with self.subTest(age=age):
                root = self.tree(dict.fromkeys(('a.log.7.gz', 'a.log.8', 'a.log.9', 'a.log.conf', 'b.log.9'), 'x'))
                for name, days in (('a.log.7.gz', 31), ('a.log.8', 29), ('a.log.9', 31), ('a.log.conf', 31), ('b.log.9', 31)):
                    os.utime(f'{root}/{name}', (time.time() - days * 86400,) * 2)
                self.write_log(f'{root}/a.log', '--log-max-age', age, lines=11)
                self.assertEqual(kept, set(os.listdir(root)))

    def test_log_is_appended_to(self):
        path = f'{self.directory()}/a.log'
        for _ in range(2):
            self.write_log(path, lines=3)
        self.assertEqual([0, 1, 2] * 2, self.numbers(path))

    def test_file_that_cannot_be_written_is_one_warning(self):
        root = self.tree(NODE)
        run = run_on_tree(root, '--log-file', f'{root}/etc', '--output', 'json')
        warnings = [line for line in run.stderr.splitlines() if 'log file' in line]
        self.assertEqual((0, 1), (run.returncode, len(warnings)), run.stderr)
        self.assertRegex(
            warnings[0],
            r'^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ WARNING log file .*/etc cannot be written \(Is a directory\)')

    def test_malformed_file_is_a_warning_in_the_log_and_the_snapshot_goes_out(self):
        root = self.tree({**NODE, 'proc/meminfo': 'MemTotal'})
        run = run_on_tree(root, '--log-file', f'{root}/a.log', '--output', 'json', '--cri-socket', f'{root}/no\nINFO such')
        self.assertIn('no?INFO such\n', run.stderr)
        with open(f'{root}/a.log') as file:
            self.assertEqual(run.stderr, file.read())
        self.assertIn("WARNING memory: meminfo: malformed line: 'MemTotal'\n", run.stderr)
        self.assertEqual('node-d13', json.loads(run.stdout)['node_metrics']['hostname'])
        self.assertEqual(0, stat.S_IMODE(os.stat(f'{root}/a.log').st_mode) & 0o027)

    def test_file_and_its_directory_are_not_for_others(self):
        root = self.directory()
        self.addCleanup(os.umask, os.umask(0))
        self.write_log(f'{root}/new/a.log', '--log-compress=false', lines=15)
        self.write_log(f'{root}/new/b.log', lines=15)
        modes = {name: stat.S_IMODE(os.stat(f'{root}/new/{name}').st_mode) for name in os.listdir(f'{root}/new')}
        self.assertEqual(dict.fromkeys(('a.log', 'a.log.1', 'b.log', 'b.log.1.gz'), 0o640), modes)
        self.assertEqual(0o750, stat.S_IMODE(os.stat(f'{root}/new').st_mode))

    def refusal(self, path):
        with self.assertRaises(OSError) as raised:
            agent.log_file_handler(agent.parse_options([], {}), path)
        return raised.exception.strerror

    def test_no_link_of_another_user_is_followed(self):
        root = self.tree({'victim': 'mine\n', 'real/x': ''})
        os.symlink(f'{root}/victim', f'{root}/a.log')
        os.symlink(f'{root}/nowhere', f'{root}/b.log')
        os.symlink(f'{root}/real', f'{root}/ours')
        self.assertEqual(['Too many levels of symbolic links'] * 2, [self.refusal(f'{root}/{name}.log') for name in 'ab'])
        self.write_log(f'{root}/ours/a.log', lines=1)
        if os.geteuid() == 0:
            os.symlink(f'{root}/real', f'{root}/theirs')
            os.lchown(f'{root}/theirs', 12345, 0)
            os.chown(f'{root}/real/x', 12345, 0)
            self.assertEqual(f'{root}/theirs belongs to user 12345', self.refusal(f'{root}/theirs/c.log'))
            self.assertEqual(f'{root}/real/x belongs to user 12345', self.refusal(f'{root}/real/x'))
        with open(f'{root}/victim') as file:
            self.assertEqual('mine\n', file.read())
        self.assertFalse(os.path.exists(f'{root}/nowhere') or os.path.exists(f'{root}/real/c.log'))

    def test_no_link_is_followed_when_the_log_is_rotated(self):
        root = self.directory()
        os.symlink(f'{root}/victim', f'{root}/a.log.1.gz')
        with mock.patch.object(logging, 'raiseExceptions', False):
            self.write_log(f'{root}/a.log', lines=25)
        self.assertFalse(os.path.exists(f'{root}/victim'))

    def test_no_name_forges_a_line(self):
        record = logging.LogRecord('x', logging.INFO, '', 1, 'mount %s: %s', ('/a\n2026 INFO all well', '\x1b[2J'), None)
        self.assertTrue(agent.one_line(record))
        self.assertEqual('mount /a?2026 INFO all well: ?[2J', record.getMessage())


# --- command line

class CommandLineTest(AgentTest):
    def failure(self, arguments, environment=None):
        """The one line that a wrong command line gives."""
        stderr = io.StringIO()
        with contextlib.redirect_stderr(stderr), self.assertRaises(SystemExit) as exit:
            agent.parse_options(arguments, environment or {})
        self.assertEqual(2, exit.exception.code)
        self.assertRegex(stderr.getvalue(), r'\Akubensage-agent: [^\n]+\n\Z')
        return stderr.getvalue()

    def test_defaults(self):
        self.assertEqual(
            {'relay_address': None, 'main_loop_duration': 5, 'buffer_retention': 10, 'buffer_max_size': 64, 'spool_dir': None,
             'spool_max_size': 512, 'relay_tls': False, 'relay_ca': None, 'relay_cert': None, 'relay_key': None,
             'relay_server_name': None, 'relay_token_file': None, 'top_n': 10, 'once': False, 'output': 'json', 'listen': None,
             'print_unit': False, 'print_daemonset': False, 'live': False, 'container_stats': 'cgroup', 'fs_stats_interval': 60,
             'cri_socket': None, 'procfs': '/proc', 'sysfs': '/sys', 'rootfs': '/', 'log_level': 'info', 'log_file': None,
             'log_max_size': 10, 'log_max_backups': 5, 'log_max_age': 30, 'log_compress': True},
            vars(agent.parse_options([], {})))

    def test_values(self):
        for argument, name, value in (
                ('--relay-address=relay.example:50051', 'relay_address', 'relay.example:50051'),
                ('--relay-address=[2001:db8::1]:1', 'relay_address', '[2001:db8::1]:1'),
                ('--relay-address=192.0.2.1:65535', 'relay_address', '192.0.2.1:65535'),
                ('--main-loop-duration=0.1', 'main_loop_duration', 0.1), ('--buffer-retention=0.5', 'buffer_retention', 0.5),
                ('--top-n=0', 'top_n', 0), ('--once', 'once', True), ('--once=false', 'once', False), ('--once=1', 'once', True),
                ('--output=table', 'output', 'table'), ('--output=json', 'output', 'json'),
                ('--output=prometheus', 'output', 'prometheus'), ('--listen=[::1]:9551', 'listen', '[::1]:9551'),
                ('--container-stats=cri', 'container_stats', 'cri'), ('--container-stats=cgroup', 'container_stats', 'cgroup'),
                ('--fs-stats-interval=1', 'fs_stats_interval', 1), ('--fs-stats-interval=0.5e2', 'fs_stats_interval', 50),
                ('--log-level=debug', 'log_level', 'debug'),
                ('--log-max-size=0.5', 'log_max_size', 0.5), ('--log-max-backups=0', 'log_max_backups', 0),
                ('--log-max-age=0', 'log_max_age', 0), ('--log-compress=false', 'log_compress', False),
                ('--log-compress=F', 'log_compress', False), ('--log-compress=0', 'log_compress', False),
                ('--log-compress=TRUE', 'log_compress', True), ('--log-compress', 'log_compress', True)):
            with self.subTest(argument):
                self.assertEqual(value, getattr(agent.parse_options([argument], {}), name))
                flag, equals, text = argument.partition('=')
                if equals:
                    self.assertEqual(value, getattr(agent.parse_options([flag, text], {}), name))
                    variable = 'KUBENSAGE_' + flag[2:].upper().replace('-', '_')
                    self.assertEqual(value, getattr(agent.parse_options([], {variable: text}), name))

    def test_wrong_value_is_one_line_that_names_flag_and_value(self):
        wrong = {
            '--relay-address': ('relay', 'relay:', ':50051', 'relay:0', 'relay:65536', 'http://relay:1', '2001:db8::1:1', 'a b:1',
                                ''),
            '--listen': ('9551', ':9551', '::1:9551', 'localhost:x'),
            '--main-loop-duration': ('0.09', '-1', 'nan', 'inf', '5s', '', '1e9'),
            '--buffer-retention': ('0', '-1', 'x'),
            '--top-n': ('-1', '1.5', 'x', 'NaN', ''),
            '--once': ('yes', '2', ''),
            '--output': ('xml', 'JSON', 'a\nb'),
            '--container-stats': ('none', 'CRI', ''),
            '--fs-stats-interval': ('0', '0.9', '-1', 'x', 'nan'),
            '--log-level': ('trace', 'INFO'),
            '--log-max-size': ('0', '-1', 'x'),
            '--log-max-backups': ('-1', '0.5'),
            '--log-max-age': ('-1', 'x'),
            '--log-compress': ('no', 'off'),
        }
        for flag, values in wrong.items():
            for value in values:
                with self.subTest(flag=flag, value=value):
                    self.assertIn(f'kubensage-agent: {flag}: {value!r} is n', self.failure([f'{flag}={value}']))
                    variable = 'KUBENSAGE_' + flag[2:].upper().replace('-', '_')
                    if value:
                        self.assertIn(f'kubensage-agent: {variable}: {value!r} is n', self.failure([], {variable: value}))

    def test_unknown_argument_gets_a_hint(self):
        self.check_table(self.failure, [
            ((['--top'],), 'kubensage-agent: unknown argument --top; did you mean --top-n?\n'),
            ((['--relay-adress=a:1'],), 'kubensage-agent: unknown argument --relay-adress=a:1; did you mean --relay-address?\n'),
            ((['--zzz', '--top-n', '1'],), 'kubensage-agent: unknown argument --zzz; --help lists them all\n'),
            ((['word'],), 'kubensage-agent: unknown argument word; --help lists them all\n'),
            ((['--top-n'],), 'kubensage-agent: --top-n: expected one argument\n')])

    def test_environment_counts_and_the_command_line_wins(self):
        environment = {'KUBENSAGE_TOP_N': '3', 'KUBENSAGE_ONCE': 'true', 'KUBENSAGE_LOG_LEVEL': '', 'TOP_N': '9'}
        options = agent.parse_options([], environment)
        self.assertEqual((3, True, 'info', 5), (options.top_n, options.once, options.log_level, options.main_loop_duration))
        options = agent.parse_options(['--top-n', '4', '--once=false'], environment)
        self.assertEqual((4, False), (options.top_n, options.once))

    def test_program_exits_2_with_one_line(self):
        for arguments, environment in ((['--top-n=x'], {}), ([], {'KUBENSAGE_TOP_N': 'x'})):
            run = run_agent(*arguments, **environment)
            self.assertEqual((2, '', 1), (run.returncode, run.stdout, run.stderr.count('\n')), run.stderr)

    def test_version_and_help(self):
        version = run_agent('--version')
        self.assertEqual((0, f'kubensage-agent {agent.__version__}\n', ''), (version.returncode, version.stdout, version.stderr))
        stdout = io.StringIO()
        with contextlib.redirect_stdout(stdout), self.assertRaises(SystemExit) as exit:
            agent.parse_options(['--help'], {})
        self.assertIn(exit.exception.code, (0, None))
        for flag in agent.FLAGS:
            self.assertIn(f'  {flag} ', stdout.getvalue())

    # Imports what agent.py imports, then agent.py under an audit hook that reports what it touches.
    IMPORT = '''if True:
        import ast, grpc, sys, threading
        from google.protobuf import empty_pb2, json_format, wrappers_pb2
        path, watched = sys.argv[1], ('open', 'socket', 'subprocess', 'signal', 'os.mkdir', 'os.remove', 'os.rename', 'os.system')
        with open(path) as file:
            imports = [node for node in ast.parse(file.read()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
        exec(compile(ast.Module(imports, []), path, 'exec'))
        threads, touched = threading.active_count(), []
        def on_event(event, arguments):
            if event.startswith(watched) and not str(arguments[0]).startswith(path.rpartition('/')[0]):
                touched.append((event, str(arguments[:1])))
        sys.addaudithook(on_event)
        import agent
        print(touched, threading.active_count() - threads)
    '''

    def test_import_touches_nothing(self):
        path = os.path.abspath(agent.__file__)
        run = subprocess.run([sys.executable, '-B', '-c', self.IMPORT, path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             encoding='utf-8',
                             env={**os.environ, 'PYTHONPATH': os.pathsep.join([os.path.dirname(path), *sys.path])})
        self.assertEqual('[] 0\n', run.stdout)


# --- where snapshots go

class SettleOutputTest(AgentTest):
    def test_table(self) -> None:
        relay, listen, once = '--relay-address=r:1', '--listen=127.0.0.1:1', '--once'
        for arguments, terminal, output, live, interval in (
                ((), True, None, True, 2), ((), False, 'json', False, 5), ((once,), True, 'table', False, 5),
                ((once,), False, 'json', False, 5), ((relay,), True, None, False, 5), ((relay,), False, None, False, 5),
                ((listen,), True, None, False, 5), ((listen,), False, None, False, 5), ((once, relay), True, None, False, 5),
                ((once, listen), False, 'json', False, 5), ((relay, '--output=json'), True, 'json', False, 5),
                (('--output=table',), True, 'table', False, 5), (('--main-loop-duration=7',), True, None, True, 7),
                (('--main-loop-duration', '7'), True, None, True, 7), (('--once=false',), True, None, True, 2)):
            with self.subTest(arguments=arguments, terminal=terminal):
                options = agent.parse_options(arguments, {}, terminal)
                self.assertEqual((options.output, options.live, options.main_loop_duration), (output, live, interval))
        self.assertEqual(agent.parse_options([], {'KUBENSAGE_MAIN_LOOP_DURATION': '9'}, True).main_loop_duration, 9)


# --- service

class ServiceTest(AgentTest):
    def unit(self, *arguments: str) -> Dict[str, List[str]]:
        """The settings of the unit, each with all its values."""
        self.text = agent.render_unit(agent.parse_options(arguments, {}), '/usr/bin/python3', '/opt/agent.pyz', arguments)
        settings: Dict[str, List[str]] = collections.defaultdict(list)
        for line in self.text.splitlines():
            name, equals, value = line.partition('=')
            if equals:
                settings[name].append(value)
        return settings

    def test_flags_are_kept_but_for_those_of_this_call(self) -> None:
        for arguments, expected in (
                (('--print-unit',), ''),
                (('--print-unit', '--once', '--output', 'json', '--top-n', '3'), ' --top-n=3'),
                (('--print-unit=true', '--output=table', '--listen', '[::]:1'), ' --listen=[::]:1'),
                (('--print-unit', 'true', '--log-compress', '--relay-tls=false'), ' --log-compress=true --relay-tls=false'),
                (('--main-loop-duration=10', '--buffer-retention', '0.5'), ' --buffer-retention=0.5 --main-loop-duration=10'),
                (('--relay-address=r:1',), ' --relay-address=r:1 --spool-dir=/var/lib/kubensage-agent'),
                (('--relay-address=r:1', '--spool-dir', '/s'), ' --relay-address=r:1 --spool-dir=/s'),
                (('--relay-ca', 'ca.pem'), f' --relay-ca={os.getcwd()}/ca.pem')):
            with self.subTest(arguments):
                self.assertEqual(self.unit(*arguments)['ExecStart'], ['/usr/bin/python3 -I /opt/agent.pyz' + expected])

    def test_quoting(self) -> None:
        self.check_table(agent.systemd_quote, [
            (('--a=b',), '--a=b'), (('a b',), '"a b"'), (('50%',), '50%%'), (('$HOME',), '$$HOME'), (('a"b',), '"a\\"b"'),
            (('a\\b',), 'a\\\\b'), (("it's",), '"it\'s"'), (('a;b',), '"a;b"'), (('',), '""'), (('a\nb',), 'a\\nb')])

    def test_it_is_watched_and_may_write_where_it_must(self) -> None:
        unit = self.unit('--main-loop-duration', '30', '--spool-dir', '/data/my spool', '--log-file', '/logs/a.log')
        self.assertEqual((unit['Type'], unit['Restart'], unit['WatchdogSec']), (['notify'], ['always'], ['300']))
        self.assertEqual(unit['ReadWritePaths'], ['"-/data/my spool"', '-/logs'])
        self.assertEqual(self.unit()['WatchdogSec'], ['60'])
        for directory in ('StateDirectory', 'CacheDirectory', 'LogsDirectory'):
            self.assertEqual(len(unit[directory]), 1)
        self.assertEqual(f'/var/lib/{unit["StateDirectory"][0]}', agent.STATE_DIRECTORY)
        self.assertEqual(f'/var/log/{unit["LogsDirectory"][0]}', os.path.dirname(agent.DEFAULT_LOG_FILE))

    def test_nothing_blinds_it(self) -> None:
        unit = self.unit()
        for setting in ('ProcSubset', 'ProtectProc', 'PrivateNetwork', 'PrivateUsers', 'ProtectClock', 'User', 'DynamicUser',
                        'RootDirectory', 'InaccessiblePaths', 'PrivatePIDs', 'IPAddressDeny'):
            self.assertNotIn(setting, unit)
        self.assertEqual(set(unit['CapabilityBoundingSet'][0].split()), {'CAP_DAC_READ_SEARCH', 'CAP_SYS_PTRACE'})
        self.assertLessEqual({'AF_UNIX', 'AF_INET', 'AF_INET6', 'AF_NETLINK'}, set(unit['RestrictAddressFamilies'][0].split()))
        self.assertIn('adjtimex', unit['SystemCallFilter'][0].split())

    def test_systemd_accepts_it_and_finds_it_hardened(self) -> None:
        options = ('--print-unit', '--relay-address=r:1', '--top-n=3', '--relay-token-file=/etc/a b%c"d')
        run = run_agent(*options, '--relay-tls')
        self.assertEqual((run.returncode, run.stderr), (0, ''))
        self.assertIn(f'{sys.executable} -I {os.path.abspath(agent.__file__)} --relay-address=r:1', run.stdout)
        path = os.path.join(self.tree({'kubensage-agent.service': run.stdout}), 'kubensage-agent.service')
        self.tool('systemd-analyze', '--version')
        checked = subprocess.run(['systemd-analyze', 'verify', '--man=no', path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                 encoding='utf-8')
        self.assertEqual([line for line in checked.stdout.splitlines() if 'kubensage' in line], [])
        rated = self.tool('systemd-analyze', 'security', '--offline=yes', '--no-pager', path)
        self.assertLessEqual(float(re.search(r'exposure level.*?: ([\d.]+)', rated).group(1)), 3.0)

    def test_daemonset(self) -> None:
        run = run_agent('--print-daemonset', '--relay-address', 'r:1', '--listen=0.0.0.0:9000', '--cri-socket', '/run/k3s/cri.sock',
                        '--top-n=3', '--once')
        self.assertEqual((run.returncode, run.stderr), (0, ''))
        documents = run.stdout.split('\n---\n')
        self.assertEqual([re.search('^kind: (.*)$', text, re.M).group(1) for text in documents],
                         ['Namespace', 'ServiceAccount', 'DaemonSet'])
        values = dict(re.findall(r'- name: KUBENSAGE_(\w+)\n +value: (".*")$', run.stdout, re.M))
        self.assertEqual(values, {
            'RELAY_ADDRESS': '"r:1"', 'LISTEN': '"0.0.0.0:9000"', 'CRI_SOCKET': '"/run/k3s/cri.sock"', 'TOP_N': '"3"',
            'PROCFS': '"/host/proc"', 'SYSFS': '"/host/sys"', 'ROOTFS': '"/host/root"', 'SPOOL_DIR': '"/var/lib/kubensage-agent"'})
        for text in ('hostNetwork: true', 'hostPID: true', 'automountServiceAccountToken: false', 'image: python:3-slim',
                     'path: /healthz', 'containerPort: 9000', 'mountPath: /run/k3s\n', '- operator: Exists', 'fieldPath: spec.nodeName'):
            self.assertIn(text, run.stdout)
        for name in ('proc', 'sys', 'root', 'runtime', 'archive'):
            self.assertRegex(run.stdout, rf'- name: {name}\n +mountPath: \S+\n +readOnly: true')
        volumes, mounts = (set(re.findall(pattern, documents[2])) for pattern in (
            r'- name: (\w+)\n +(?:hostPath|emptyDir):', r'- name: (\w+)\n +mountPath:'))
        self.assertEqual(volumes, mounts)

    def test_what_the_manifest_sets_is_a_command_line(self) -> None:
        options = agent.parse_options(['--relay-address', 'r:1', '--log-compress=false', '--spool-dir', 'x'], {})
        text = agent.render_daemonset(options, ['--relay-address', 'r:1', '--log-compress=false', '--spool-dir', 'x'], '/run/a.sock')
        environment = {name: json.loads(value) for name, value in re.findall(r'- name: (KUBENSAGE_\w+)\n +value: (".*")$', text, re.M)}
        again = agent.parse_options([], environment)
        self.assertEqual((again.log_compress, again.relay_address, again.spool_dir, again.listen),
                         (False, 'r:1', agent.STATE_DIRECTORY, agent.DAEMONSET_LISTEN))


# --- golden run

# The node above as --once --output json gives it, a field or an item a line, without the time and without the sizes of
# this machine's file system. Made anew by: python3 -c 'import test_agent; test_agent.print_golden()'
GOLDEN = r'''
available_memory: "3637047296"
boot_time: "1795425261"
cpu_infos: {"core_id": "0", "cores": 1, "cpu": 0, "mhz": 2596, "model": "QEMU TCG CPU version 2.5+", "physical_id": "0",
  "seconds": {"guest": 0.0, "guest_nice": 0.0, "idle": 101.88, "iowait": 0.73, "irq": 0.0, "nice": 0.0, "softirq": 2.41,
  "steal": 0.0, "system": 80.92, "user": 57.28}, "vendor_id": "AuthenticAMD"}
cpu_seconds: {"guest": 0.0, "guest_nice": 0.0, "idle": 208.95, "iowait": 1.13, "irq": 0.0, "nice": 0.0, "softirq": 4.87,
  "steal": 0.0, "system": 159.23, "user": 113.25}
disk_io_summary: {"total_read_bytes": "836249600", "total_read_ops": "3874", "total_write_bytes": "670199808",
  "total_write_ops": "3589"}
disk_usages: {"device": "/dev/vda1", "fstype": "ext4", "mountpoint": "/", "read_only": false}
disk_usages: {"device": "/dev/vdb", "fstype": "ext4", "mountpoint": "/data", "read_only": false}
disks: {"device": "vda", "discard_seconds_total": 0.0, "discarded_bytes_total": "0", "discards_merged_total": "0",
  "discards_total": "0", "flush_seconds_total": 0.479, "flushes_total": "801", "in_progress": "0", "io_seconds_total":
  6.104, "read_bytes_total": "834212864", "read_seconds_total": 4.249, "reads_merged_total": "488", "reads_total":
  "3739", "weighted_io_seconds_total": 19.638, "write_seconds_total": 14.908, "writes_merged_total": "3074",
  "writes_total": "3588", "written_bytes_total": "670195712"}
disks: {"device": "vdb", "discard_seconds_total": 0.0, "discarded_bytes_total": "0", "discards_merged_total": "0",
  "discards_total": "0", "flush_seconds_total": 0.0, "flushes_total": "1", "in_progress": "0", "io_seconds_total":
  0.108, "read_bytes_total": "2036736", "read_seconds_total": 0.108, "reads_merged_total": "0", "reads_total": "135",
  "weighted_io_seconds_total": 0.112, "write_seconds_total": 0.003, "writes_merged_total": "0", "writes_total": "1",
  "written_bytes_total": "4096"}
host_id: "d249c0486159f80557ce12d99828162b"
hostname: "node-d13"
kernel_activity: {"context_switches_total": "297051", "forks_total": "2860", "interrupts_total": "223011",
  "procs_blocked": "0", "procs_running": "2"}
kernel_arch: "x86_64"
kernel_limits: {"conntrack_entries": "129", "conntrack_max": "65536", "file_descriptors_allocated": "832",
  "file_descriptors_max": "9223372036854775807", "pid_max": "4194304", "threads": "229", "threads_max": "31175"}
kernel_version: "6.12.107+deb13-cloud-amd64"
load_average: {"load1": 1.38, "load15": 0.83, "load5": 1.73, "runnable_threads": "2", "threads": "229"}
memory_detail: {"buffers_bytes": "8019968", "free_bytes": "3614240768", "huge_page_size_bytes": "2097152",
  "huge_pages_total": "0"}
memory_used_perc: 11.548357726946268
net_usage: {"total_bytes_received": "374552", "total_bytes_sent": "169316328", "total_drop_in": "0", "total_drop_out":
  "2", "total_err_in": "0", "total_err_out": "0", "total_fifo_err_in": "0", "total_fifo_err_out": "0",
  "total_packets_received": "6138", "total_packets_sent": "6583"}
network_interfaces: {"addrs": [], "counters": {"rx_bytes": "0", "rx_compressed": "0", "rx_drop": "0", "rx_errs": "0",
  "rx_fifo": "0", "rx_frame": "0", "rx_multicast": "0", "rx_packets": "0", "tx_bytes": "0", "tx_carrier": "0",
  "tx_colls": "0", "tx_compressed": "0", "tx_drop": "0", "tx_errs": "0", "tx_fifo": "0", "tx_packets": "0"}, "flags":
  ["up", "loopback"], "index": 1, "mtu": 65536, "name": "lo"}
network_interfaces: {"addrs": [], "carrier": true, "counters": {"rx_bytes": "50152", "rx_compressed": "0", "rx_drop":
  "0", "rx_errs": "0", "rx_fifo": "0", "rx_frame": "0", "rx_multicast": "0", "rx_packets": "196", "tx_bytes": "29478",
  "tx_carrier": "0", "tx_colls": "0", "tx_compressed": "0", "tx_drop": "0", "tx_errs": "0", "tx_fifo": "0",
  "tx_packets": "145"}, "flags": ["up", "broadcast", "multicast"], "hardwareAddr": "52:54:00:d1:3d:13", "index": 2,
  "mtu": 1500, "name": "enp0s3", "operstate": "up"}
network_interfaces: {"addrs": [], "counters": {"rx_bytes": "324400", "rx_compressed": "0", "rx_drop": "0", "rx_errs":
  "0", "rx_fifo": "0", "rx_frame": "0", "rx_multicast": "54", "rx_packets": "5942", "tx_bytes": "169286850",
  "tx_carrier": "0", "tx_colls": "0", "tx_compressed": "0", "tx_drop": "2", "tx_errs": "0", "tx_fifo": "0",
  "tx_packets": "6438"}, "flags": [], "name": "cni0"}
network_protocols: {"sockets_used": "134", "softnet_dropped_total": "0", "softnet_processed_total": "18743",
  "softnet_squeezed_total": "56", "tcp_alloc": "5", "tcp_in_errs_total": "0", "tcp_in_segs_total": "6042", "tcp_inuse":
  "3", "tcp_listen_drops_total": "0", "tcp_listen_overflows_total": "0", "tcp_mem_bytes": "0", "tcp_orphan": "0",
  "tcp_out_segs_total": "118723", "tcp_retrans_segs_total": "9", "tcp_syn_retrans_total": "0", "tcp_tw": "50",
  "udp_in_errors_total": "0", "udp_inuse": "1", "udp_rcvbuf_errors_total": "0", "udp_sndbuf_errors_total": "0"}
os: "linux"
platform: "debian"
platform_family: "debian"
platform_version: "13.7"
pod_metrics: []
processes_mem_info: {"memory": "2097152", "name": "new\nline) R 1", "pid": 2592}
processes_mem_info: {"memory": "1048576", "name": "systemd", "pid": 1}
procs: "3"
psi_cpu_metrics: {"full": {"avg10": 0.0, "avg300": 0.0, "avg60": 0.0, "total": "0"}, "some": {"avg10": 70.95, "avg300":
  38.9, "avg60": 69.15, "total": "169091998"}}
psi_io_metrics: {"some": {"avg10": 0.01, "avg300": 0.03, "avg60": 0.02, "total": "9"}}
psi_irq_metrics: {"full": {"avg10": 0.04, "avg300": 0.06, "avg60": 0.05, "total": "10"}}
psi_memory_metrics: {"full": {"avg10": 5.5, "avg300": 7.5, "avg60": 6.5, "total": "8"}, "some": {"avg10": 1.5, "avg300":
  3.5, "avg60": 2.5, "total": "4"}}
services: {"cgroup": {"cpu": {"nr_periods": "1764", "nr_throttled": "1762", "system_usec": "2384613", "throttled_usec":
  "155951645", "usage_usec": "18820166", "user_usec": "16435552"}, "io": [], "memory": {"current_bytes": "7258112"},
  "path": "system.slice/kubelet.service"}, "name": "kubelet.service"}
total_memory: "4111904768"
uptime: "261"
used_memory: "474857472"
vmstat: {"oom_kill": "4", "pgfault": "362743", "pgmajfault": "1683", "pswpin": "0"}
'''


def golden_text(root):
    document = json.loads(run_on_tree(root, '--output', 'json').stdout)
    lines = [f'{name}: {json.dumps(item, sort_keys=True)}'
             for name, value in sorted({**document.pop('node_metrics'), **document}.items())
             if name not in ('timestamp', 'agent_metrics')
             for item in (value if value and isinstance(value, list) else [value])]
    sizes = r', "(total|used|free|used_percent|inodes|inodes_free)": [^,}]+'
    lines = [re.sub(sizes, '', line) if line.startswith('disk_usages') else line for line in lines]
    lines = [re.sub(r', "timestamp_ns": "\d+"', '', line) for line in lines]
    return '\n' + ''.join(textwrap.fill(line, 120, subsequent_indent='  ', break_long_words=False) + '\n' for line in lines)


def print_golden():
    with tempfile.TemporaryDirectory() as root:
        write_tree(root, NODE)
        print(golden_text(root), end='')


class GoldenTest(AgentTest):
    def test_node_gives_the_golden_text(self):
        self.assertEqual(GOLDEN, golden_text(self.tree(NODE)))


# --- malformed input

# kubelet 1.31, shortened, as in /proc/PID/cmdline
KUBELET_COMMAND_LINE = '/usr/bin/kubelet\0--config=/x.yaml\0--container-runtime-endpoint=unix:///run/x.sock\0'
CRICTL_YAML = 'runtime-endpoint: unix:///run/containerd/containerd.sock\nimage-endpoint: ""\ntimeout: 2\n'
BUNDLE_TARGETS = '''\
.cpython-311-x86_64-linux-gnu.so x86_64-9f86d081884c7d65.tar.xz
.cpython-39-aarch64-linux-gnu.so aarch64-60303ae22b998861.tar.xz
'''
MANIFEST = f'{"9f86d081" * 8} 1 2 3 grpc/__init__.py\n{"0a1b2c3d" * 8} 4 5 6 google/protobuf/a b.py\n'


def packed_record(stored):
    data = agent.RECORD.pack(b'KSR1', len(stored), len(stored), 1.5, 2.5, b'6' * 36) + stored
    return data + agent.RECORD_CRC.pack(zlib.crc32(data))


def parse_vmstat(text):
    return agent.parse_key_values('vmstat', text)


def parse_cpu_weight(text):
    return agent.parse_number('cpu.weight', text)


def parse_memory_stat(text):
    return agent.parse_memory_stat(text, agent.MEMORY_STAT_V2)


# parse_ function → texts of real systems.
FUZZED = {
    parse_memory_stat: GROUP_V2['memory.stat'],
    agent.parse_stat: STAT, agent.parse_cpuinfo: CPUINFO_X86.partition('\n\n')[0] + '\n\n' + CPUINFO_ARM,
    agent.parse_meminfo: MEMINFO, agent.parse_pressure: PRESSURE_CPU, agent.parse_statm: STATM,
    agent.parse_mountinfo: MOUNTINFO, agent.parse_diskstats: DISKSTATS, agent.parse_addresses: ADDRESSES,
    agent.parse_net_dev: NET_DEV, agent.parse_route: ROUTE, agent.parse_ipv6_route: IPV6_ROUTE,
    agent.parse_os_release: OS_RELEASE, agent.parse_uptime: UPTIME, agent.parse_loadavg: LOADAVG, agent.parse_file_nr: FILE_NR,
    agent.parse_snmp: SNMP + NETSTAT, agent.parse_sockstat: SOCKSTAT, agent.parse_softnet_stat: SOFTNET_STAT,
    agent.parse_cpu_max: CPU_MAX, agent.parse_io_stat: IO_STAT + IO_STAT, agent.parse_blkio: BLKIO, parse_vmstat: VMSTAT,
    parse_cpu_weight: '100\n',
    agent.parse_endpoint_flag: KUBELET_COMMAND_LINE, agent.parse_endpoint_setting: CRICTL_YAML,
    agent.parse_targets: BUNDLE_TARGETS, agent.parse_manifest: MANIFEST,
    agent.parse_record: packed_record(b'abc'),
}
# Of these any text is one that a person may have written.
LENIENT = {agent.parse_os_release, agent.parse_endpoint_flag, agent.parse_endpoint_setting}
ODD_NUMBERS = (b'', b'-1', b'-0', b'0x1f', b'1.5', b'1e999', b'NaN', b'inf', b'18446744073709551616', b'9' * 400, b'9' * 5000,
               '\u0663'.encode(), b'\0', b'\x85')
NUMBER = re.compile(rb'\d+')


def mutated(data, chance):
    """The data with one or a few accidents."""
    for _ in range(chance.choice((1, 1, 3))):
        at, accident = chance.randrange(len(data) + 1), chance.randrange(6)
        if accident == 0:
            data = data[:at] + bytes([chance.randrange(256)]) + data[at + 1:]
        elif accident == 1:
            data = data[:at]
        elif accident == 2:
            data = data[:at] + data[at + chance.randrange(20):]
        elif accident == 3:
            end = data.find(b'\n', at) + 1
            data = data[:end] + data[at:end] + data[end:]
        elif accident == 4:
            data = data[at:] + data[:at]
        else:
            number = NUMBER.search(data, at)
            if number:
                data = data[:number.start()] + chance.choice(ODD_NUMBERS) + data[number.end():]
    return data


class MalformedInputTest(AgentTest):
    SEED, ROUNDS = 1, 10_000

    def test_parsers_give_a_value_or_value_error(self):
        for parse, sample in FUZZED.items():
            chance, is_text = random.Random(self.SEED), isinstance(sample, str)
            original = sample.encode() if is_text else sample
            refused = 0
            with self.subTest(parse.__name__):
                parse(sample)
                for _ in range(self.ROUNDS):
                    data = mutated(original, chance)
                    data = data.decode(errors='replace') if is_text else data
                    try:
                        parse(data)
                    except ValueError:
                        refused += 1
                    except Exception as error:
                        self.fail(f'{error!r} for {data!r}')
                # None refused would mean that the accidents are too tame.
                self.assertEqual(parse in LENIENT, refused == 0)

    def test_every_parser_is_among_them(self):
        takes_text = {getattr(agent, name) for name in dir(agent) if name.startswith('parse_')}
        # parse_lines and parse_group take other parsers; parse_cpuinfo_line is a part of parse_cpuinfo; parse_options reads argv.
        takes_text -= {agent.parse_lines, agent.parse_group, agent.parse_cpuinfo_line, agent.parse_options}
        # These are told the name of the file as well, or the names in it.
        named = {agent.parse_key_values: parse_vmstat, agent.parse_number: parse_cpu_weight,
                 agent.parse_memory_stat: parse_memory_stat}
        self.assertEqual({named.get(parse, parse) for parse in takes_text}, set(FUZZED))

    def test_node_with_accidents_is_a_message_and_failures(self):
        root, chance = self.tree(NODE), random.Random(self.SEED)
        paths = [path for path in NODE if path.startswith(('proc/', 'sys/', 'etc/os'))]
        before = agent.collect_node(roots_below(root), {}, 10)
        for _ in range(150):
            path = chance.choice(paths)
            content = mutated(NODE[path].encode(), chance)
            write_tree(root, {path: content})
            with self.subTest(path=path, content=content):
                part = agent.collect_node(roots_below(root), before.after, 10)
                renderings(wire.Metrics.FromString(wire.Metrics(node_metrics=part.message).SerializeToString()))
            write_tree(root, {path: NODE[path]})

    def test_huge_files(self):
        """1,024 CPUs, 5,000 interfaces, 100,000 lines of mounts: as many as the largest machines have, and more."""
        cpus = ''.join(f'cpu{number} {number} 2 3 4 5 6 7 8 9 10\n' for number in range(1024))
        with self.subTest('CPUs'):
            self.assertEqual(1023, agent.parse_stat('cpu 1 2 3 4 5 6 7 8 9 10\n' + cpus)[0]['cpu1023'].user)
            self.assertEqual(1024, len(agent.parse_cpuinfo(''.join(
                CPUINFO_X86.partition('\n\n')[0].replace('processor\t: 0', f'processor\t: {number}') + '\n\n'
                for number in range(1024)))))
        with self.subTest('interfaces'):
            interfaces = ''.join(f'eth{number}: {number} 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n' for number in range(5000))
            usage = agent.build_net_usage(agent.parse_net_dev(interfaces).values())
            self.assertEqual((sum(range(5000)), 5000 * 9), (usage.total_bytes_received, usage.total_bytes_sent))
        with self.subTest('mounts'):
            mounts = ''.join(f'{number} 1 8:{number % 50} / /{number} rw - ext4 /dev/sda rw\n' for number in range(20_000))
            self.assertEqual(50, len(agent.real_mounts(agent.parse_mountinfo(mounts))))

    def test_a_hundred_thousand_processes(self):
        """The directory is listed once, and each process costs one small read; no tree of so many files is made here."""
        pids = [str(number) for number in range(1, 100_001)]
        with mock.patch.object(agent, 'read_names', lambda root, path: ['self', *pids]), \
                mock.patch.object(agent, 'read_small', lambda root, path: b'9 %s 3 4 5 6 7\n' % path.split('/')[0].encode()), \
                mock.patch.object(agent, 'read_text', lambda root, path: f'name of {path}\n'):
            fields, _ = agent.collect_processes(LIVE, None, 2)
        self.assertEqual((100_000, [100_000, 99_999]), (fields['procs'], [info.pid for info in fields['processes_mem_info']]))

    def test_files_that_are_missing_unreadable_empty_or_truncated_cost_only_their_subject(self):
        for path in ('proc/stat', 'proc/meminfo', 'proc/diskstats', 'proc/1/net/dev', 'proc/1/mountinfo', 'proc/uptime'):
            for what, content in (('empty', ''), ('truncated', NODE[path][:len(NODE[path]) * 2 // 3]), ('missing', None),
                                  ('not text', b'\xff\xfe\0' * 9)):
                with self.subTest(path=path, what=what):
                    root = self.tree({**NODE, **({path: content} if content is not None else {})})
                    if content is None:
                        os.unlink(f'{root}/{path}')
                    part = agent.collect_node(roots_below(root), {}, 10)
                    self.assertGreater(len(part.message.ListFields()), 10)
                    self.assertLessEqual(len(part.failures), 1)

    def test_negative_and_absurd_numbers_cost_only_their_subject(self):
        for number in ('-1', '-9223372036854775809', '18446744073709551616', '9' * 100):
            for path, old in (('proc/stat', '1795425261'), ('proc/meminfo', '4015532'), ('proc/diskstats', '1629322'),
                              ('proc/1/net/dev', '324400'), ('proc/pressure/cpu', '169091998'), ('proc/1/statm', '256'),
                              ('sys/class/net/lo/mtu', '65536')):
                with self.subTest(path=path, number=number):
                    self.assertIn(old, NODE[path])
                    part = agent.collect_node(roots_below(self.tree({**NODE, path: NODE[path].replace(old, number)})), {}, 10)
                    wire.NodeMetrics.FromString(part.message.SerializeToString())
                    self.assertLessEqual(len(part.failures), 1)
                    self.assertEqual('node-d13', part.message.hostname)


    def test_cgroups_with_accidents_cost_their_group_alone(self):
        root, chance, pod = self.tree(OOM_FILES), random.Random(self.SEED), sandbox('pod')
        pod.metadata.uid = UID
        pod, containers = agent.build_listed_pod(pod), [agent.build_listed_container(container(name, 'pod')) for name in OOM_STATS]
        paths = [path for path in OOM_FILES if 'kubepods' in path]
        for _ in range(600):
            path = chance.choice(paths)
            content = mutated(OOM_FILES[path].encode(), chance)
            write_tree(root, {path: content})
            with self.subTest(path=path, content=content):
                memory, _ = agent.collect_kernel_side(roots_below(root), agent.CgroupsMemory(), [pod], containers)
                inventory = agent.Inventory([pod], containers, {}, memory.readings, memory.views, {}, {})
                found = wire.PodMetrics.FromString(agent.serialize_pods(inventory, {})[0][0])
                self.assertTrue(found.container_metrics)
                self.assertEqual({name for name in OOM_STATS if name not in path} - {
                    container.id for container in found.container_metrics if container.stats_source == 'cgroup'}, set())
            write_tree(root, {path: OOM_FILES[path]})


# Longer than anything takes; nothing waits that long unless it fails.
PATIENCE_SECONDS = 10
V1, V1ALPHA2 = 'runtime.v1.RuntimeService', 'runtime.v1alpha2.RuntimeService'


def setUpModule() -> None:
    logging.getLogger('kubensage-agent').addHandler(logging.NullHandler())
    logging.getLogger('grpc').setLevel(logging.CRITICAL)


# --- the fakes

class FakeServer:
    """A gRPC server whose methods are looked up by `find`; it and its threads end with the test."""

    def __init__(self, test: unittest.TestCase, address: str, options: Iterable[Tuple[str, Any]] = (),
                 credentials: Optional[grpc.ServerCredentials] = None):
        self.pool = concurrent.futures.ThreadPoolExecutor(16)
        self.server = grpc.server(self.pool, options=[('grpc.max_send_message_length', -1), *options])
        self.server.add_generic_rpc_handlers((self,))
        self.changed, self.released = threading.Condition(), False
        self.port = (self.server.add_secure_port(address, credentials) if credentials else
                     self.server.add_insecure_port(address))
        self.server.start()
        test.addCleanup(self.close)

    def service(self, details: grpc.HandlerCallDetails) -> Optional[grpc.RpcMethodHandler]:
        service, method = details.method[1:].split('/')
        return self.find(service, method)

    def find(self, service: str, method: str) -> Optional[grpc.RpcMethodHandler]:
        raise NotImplementedError

    def wait(self, context: grpc.ServicerContext) -> None:
        """Until `release`, or until the caller has given up."""
        context.add_callback(self.wake)
        with self.changed:
            self.changed.wait_for(lambda: self.released or not context.is_active(), 3 * PATIENCE_SECONDS)

    def wake(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def release(self) -> None:
        self.released = True
        self.wake()

    def close(self) -> None:
        self.release()
        self.server.stop(0).wait()
        self.pool.shutdown()


class FakeRuntime(FakeServer):
    """A container runtime on a unix socket. For each method `answers` has a message, bytes to send as they are, or a
    status code to fail with, or a function that makes one of them from the request's bytes; of a list, one after the
    other, and the last for good. Methods in `hanging` give no answer before `release`."""

    def __init__(self, test: unittest.TestCase, path: str, services: Tuple[str, ...] = (V1,), **answers: Any):
        self.services = services
        self.answers = {
            'Version': cri.VersionResponse(runtime_name='fake', runtime_version='1.0'),
            'ListPodSandbox': cri.ListPodSandboxResponse(items=[sandbox('pod')]),
            'ListContainers': cri.ListContainersResponse(containers=[container('app', 'pod')]),
            'ListContainerStats': cri.ListContainerStatsResponse(stats=[stats('app', 10**9, 500)]),
            'ContainerStatus': cri.ContainerStatusResponse(), 'Status': cri.StatusResponse(),
            'ImageFsInfo': cri.ImageFsInfoResponse(),
            **answers}
        self.hanging: Set[str] = set()
        self.asked: List[str] = []
        self.asked_queue: queue.Queue[str] = queue.Queue()
        self.stats_under_way: Set[object] = set()
        self.most_stats_under_way = 0
        os.makedirs(os.path.dirname(path), exist_ok=True)
        super().__init__(test, f'unix:{path}')

    def find(self, service: str, method: str) -> Optional[grpc.RpcMethodHandler]:
        if service.replace('ImageService', 'RuntimeService') not in self.services:
            return None
        return grpc.unary_unary_rpc_method_handler(lambda request, context: self.answer(method, request, context))

    def answer(self, method: str, request: bytes, context: grpc.ServicerContext) -> bytes:
        token = object()
        if method == 'ListContainerStats':
            self.stats_under_way.add(token)
            self.most_stats_under_way = max(self.most_stats_under_way, len(self.stats_under_way))
            context.add_callback(lambda: self.stats_under_way.discard(token))
        self.asked.append(method)
        self.asked_queue.put(method)
        if method in self.hanging:
            self.wait(context)
        answer = self.answers[method]
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if callable(answer):
            answer = answer(request)
        self.stats_under_way.discard(token)
        if isinstance(answer, grpc.StatusCode):
            context.abort(answer, 'as the test wishes')
        return answer if isinstance(answer, bytes) else answer.SerializeToString()


# What a relay does with one stream: consume the messages, and give the serialised Empty, or not.
Behaviour = Callable[[Iterator[wire.Metrics], grpc.ServicerContext], Iterator[bytes]]


def acknowledge(messages: Iterator[wire.Metrics], context: grpc.ServicerContext) -> Iterator[bytes]:
    collections.deque(messages, 0)
    yield b''


def end_without_answer(messages: Iterator[wire.Metrics], context: grpc.ServicerContext) -> Iterator[bytes]:
    collections.deque(messages, 0)
    yield from ()


def cut_after_two(messages: Iterator[wire.Metrics], context: grpc.ServicerContext) -> Iterator[bytes]:
    next(messages), next(messages)
    context.abort(grpc.StatusCode.UNAVAILABLE, 'cut')
    yield b''


def answer_early(messages: Iterator[wire.Metrics], context: grpc.ServicerContext) -> Iterator[bytes]:
    next(messages)
    yield b''


def refuse(messages: Iterator[wire.Metrics], context: grpc.ServicerContext) -> Iterator[bytes]:
    context.abort(grpc.StatusCode.PERMISSION_DENIED, 'not you')
    yield b''


def fail_at_the_end(messages: Iterator[wire.Metrics], context: grpc.ServicerContext) -> Iterator[bytes]:
    collections.deque(messages, 0)
    context.abort(grpc.StatusCode.INTERNAL, 'too bad')
    yield b''


class FakeRelay(FakeServer):
    """A relay on TCP. Each stream is treated by the next behaviour of `script`, those after them by `usual`. Metrics
    arrive in `arrived`; when a stream has ended, the timestamps it brought are put into `streams`, and one by one into
    `acknowledged` if they were."""

    def __init__(self, test: unittest.TestCase, *script: Behaviour, usual: Behaviour = acknowledge, port: int = 0,
                 limit_bytes: int = 4 << 20, credentials: Optional[grpc.ServerCredentials] = None):
        self.script: Deque[Behaviour] = collections.deque(script)
        self.usual = usual
        self.arrived: queue.Queue[wire.Metrics] = queue.Queue()
        self.streams: queue.Queue[List[int]] = queue.Queue()
        self.acknowledged: queue.Queue[int] = queue.Queue()
        super().__init__(test, f'127.0.0.1:{port}', [('grpc.max_receive_message_length', limit_bytes)], credentials)
        self.address = f'127.0.0.1:{self.port}'

    def find(self, service: str, method: str) -> Optional[grpc.RpcMethodHandler]:
        if (service, method) != ('metrics.MetricsService', 'SendMetrics'):
            return None
        return grpc.stream_stream_rpc_method_handler(self.send_metrics)

    def send_metrics(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        behave, timestamps = self.script.popleft() if self.script else self.usual, []

        def messages() -> Iterator[wire.Metrics]:
            for data in requests:
                metrics = wire.Metrics.FromString(data)
                timestamps.append(metrics.timestamp)
                self.arrived.put(metrics)
                yield metrics

        try:
            yield from behave(messages(), context)
            for timestamp in timestamps:
                self.acknowledged.put(timestamp)
        finally:
            self.streams.put(timestamps)

    def hold(self, messages: Iterator[wire.Metrics], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Acknowledge late: when `release` says so."""
        collections.deque(messages, 0)
        self.wait(context)
        yield b''

    def next_streams(self, count: int) -> List[List[int]]:
        return [self.streams.get(timeout=PATIENCE_SECONDS) for _ in range(count)]

    def next_arrived(self, count: int) -> List[wire.Metrics]:
        return [self.arrived.get(timeout=PATIENCE_SECONDS) for _ in range(count)]


def accept_silently(listener: socket.socket) -> socket.socket:
    """A connection to a server that has begun to speak HTTP/2, with an empty SETTINGS frame, and says nothing more."""
    listener.settimeout(PATIENCE_SECONDS)
    connection = listener.accept()[0]
    connection.settimeout(PATIENCE_SECONDS)
    connection.sendall(b'\0\0\0\x04\0\0\0\0\0')
    return connection


def wait_for_end(connection: socket.socket) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    with contextlib.closing(connection):
        while connection.recv(4096):
            if time.monotonic() > deadline:
                raise TimeoutError('the connection is still in use')


# --- what a runtime says

def sandbox(name: str, state: int = cri.SANDBOX_READY, created_at: int = 1) -> cri.PodSandbox:
    return cri.PodSandbox(id=name, state=state, created_at=created_at, metadata=cri.PodSandboxMetadata(
        name=f'{name}-name', uid=f'{name}-uid', namespace='default', attempt=2))


def container(name: str, pod: str, state: int = cri.CONTAINER_RUNNING, created_at: int = 3, **image: str) -> cri.Container:
    return cri.Container(id=name, pod_sandbox_id=pod, state=state, created_at=created_at, image=cri.ImageSpec(**image),
                         metadata=cri.ContainerMetadata(name=f'{name}-name', attempt=4))


def stats(name: str, timestamp_ns: int, usage_ns: int, rate: Optional[int] = None, **others: Any) -> cri.ContainerStats:
    return cri.ContainerStats(attributes=cri.ContainerAttributes(id=name), cpu=cri.CpuUsage(
        timestamp=timestamp_ns, usage_core_nano_seconds=value(usage_ns), usage_nano_cores=value(rate)), **others)


def varint(number: int) -> bytes:
    return bytes([number & 0x7f | 0x80]) + varint(number >> 7) if number > 0x7f else bytes([number])


def value(number: Optional[int]) -> Optional[cri.UInt64Value]:
    return None if number is None else cri.UInt64Value(value=number)


def list_stats(*entries: cri.ContainerStats) -> cri.ListContainerStatsResponse:
    return cri.ListContainerStatsResponse(stats=entries)


# --- what every test has

class ServerTest(unittest.TestCase):
    def setUp(self) -> None:
        self.addCleanup(self.check_threads, set(threading.enumerate()))
        self.directory = tempfile.mkdtemp()
        self.addCleanup(shutil.rmtree, self.directory)
        self.socket = f'{self.directory}/run/cri.sock'
        self.tallies: Dict[str, agent.CallTally] = {}

    def check_threads(self, before: Set[threading.Thread]) -> None:
        for thread in set(threading.enumerate()) - before:
            thread.join(PATIENCE_SECONDS)
            self.assertFalse(thread.is_alive(), f'{thread} has stayed behind')

    def roots(self, files: Dict[str, str]) -> agent.Roots:
        """A node with these files: proc/..., sys/... and the rest."""
        for path, text in files.items():
            os.makedirs(os.path.dirname(f'{self.directory}/{path}'), exist_ok=True)
            with open(f'{self.directory}/{path}', 'w', encoding='utf-8') as file:
                file.write(text)
        return agent.Roots(f'{self.directory}/proc', f'{self.directory}/sys', self.directory)

    def cycle(self, memory: agent.PodsMemory, seconds: float = 3, socket_path: Optional[str] = '',
              container_stats: str = 'cri') -> agent.Part:
        """The pods' side of one cycle: its pods, the runtime's state being in `runtime_metrics`. Its connection is closed
        at the end of the test."""
        options = argparse.Namespace(cri_socket=self.socket if socket_path == '' else socket_path,
                                     container_stats=container_stats, fs_stats_interval=60)
        roots, deadline = self.roots({}), time.monotonic() + seconds
        lists = agent.fetch_lists(roots, options, memory, deadline, self.tallies)
        part = agent.collect_pods(roots, options, *lists, deadline, self.tallies)
        pods, self.runtime_metrics = part.message
        if part.after.runtime:
            self.addCleanup(part.after.runtime.channel.close)
        return part._replace(message=list(map(wire.PodMetrics.FromString, pods)))

    def first_cycle(self, **arguments: Any) -> agent.Part:
        return self.cycle(agent.PodsMemory(), **arguments)

    def start_agent(self, *arguments: str, **settings: Any) -> subprocess.Popen:
        """`python agent.py` on an empty node, with no settings but these; ended with the test at the latest."""
        inherited = {name: value for name, value in os.environ.items()
                     if name in ('PATH', 'PYTHONPATH', 'LD_LIBRARY_PATH')}
        roots = self.roots({'proc/sys/kernel/hostname': 'node\n'})
        program = [agent.__file__]
        if 'constants' in settings:
            directory = os.path.dirname(os.path.abspath(agent.__file__))
            program = ['-c', f'import sys; sys.path.insert(0, {directory!r}); import agent; '
                             f'vars(agent).update({settings["constants"]!r}); agent.run_archive()']
        process = subprocess.Popen(
            [*settings.get('prefix', ()), sys.executable, *program, '--procfs', roots.procfs, '--sysfs', roots.sysfs,
             '--rootfs', settings.get('rootfs', roots.rootfs), '--log-file', f'{self.directory}/log', *arguments],
            stdin=subprocess.DEVNULL, stdout=settings.get('stdout', subprocess.PIPE),
            stderr=settings.get('stderr', subprocess.PIPE), text=True,
            env={**inherited, **settings.get('environment', {})})
        self.addCleanup(self.end, process)
        return process

    def end(self, process: subprocess.Popen) -> None:
        process.kill()
        with process:
            process.wait()

    def troubles(self, process: subprocess.Popen) -> Tuple[str, List[str]]:
        """stdout and the lines of stderr of a process that is about to end; being no root is no trouble here."""
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
        return out, [line for line in err.splitlines() if 'not root:' not in line]


# --- container runtime

class RuntimeDiscoveryTest(ServerTest):
    KUBELET = {'proc/1/comm': 'systemd\n', 'proc/1/cmdline': 'init\0--container-runtime-endpoint=/not/this.sock\0',
               'proc/77/comm': 'kubelet\n'}
    COMMAND_LINE = {**KUBELET, 'proc/77/cmdline': 'kubelet\0--v=2\0--container-runtime-endpoint=unix:///run/cmd.sock\0--x\0'}
    CONFIG = {'var/lib/kubelet/config.yaml':
              'kind: KubeletConfiguration\ncontainerRuntimeEndpoint: "unix:///run/config.sock"\nclusterDNS: []\n'}
    KUBEADM = {'var/lib/kubelet/kubeadm-flags.env':
               'KUBELET_KUBEADM_ARGS="--pod-x=y --container-runtime-endpoint=unix:///run/kubeadm.sock"\n'}
    CRICTL = {'etc/crictl.yaml': 'runtime-endpoint: unix:///run/crictl.sock\nimage-endpoint: unix:///run/image.sock\n'}

    def endpoints(self, files: Dict[str, str], explicit: Optional[str] = None) -> List[str]:
        return [path.replace(os.path.realpath(self.directory), '', 1)
                for path in agent.collect_endpoints(self.roots(files), explicit)]

    def test_endpoints_are_ordered_from_the_most_deliberate_to_the_usual(self) -> None:
        usual = list(agent.CRI_SOCKETS)
        for files, configured in (
                ({}, []),
                (self.CRICTL, ['/run/crictl.sock']),
                (self.KUBEADM, ['/run/kubeadm.sock', '/run/crictl.sock']),
                (self.CONFIG, ['/run/config.sock', '/run/kubeadm.sock', '/run/crictl.sock']),
                (self.COMMAND_LINE, ['/run/cmd.sock', '/run/config.sock', '/run/kubeadm.sock', '/run/crictl.sock'])):
            with self.subTest(configured=configured):
                self.assertEqual(self.endpoints(files), configured + usual)

    def test_the_flag_excludes_every_other_endpoint(self) -> None:
        for explicit in ('/run/x.sock', 'unix:///run/x.sock'):
            self.assertEqual(self.endpoints({**self.COMMAND_LINE, **self.CRICTL}, explicit), ['/run/x.sock'])

    def test_forms_of_the_endpoint_that_are_read(self) -> None:
        for parse, text, expected in (
                (agent.parse_endpoint_flag, 'kubelet\0--container-runtime-endpoint\0/run/a.sock\0', '/run/a.sock'),
                (agent.parse_endpoint_flag, 'X="--container-runtime-endpoint=unix:///run/a.sock"', 'unix:///run/a.sock'),
                (agent.parse_endpoint_flag, 'kubelet\0--v=2\0', None),
                (agent.parse_endpoint_flag, '', None),
                (agent.parse_endpoint_setting, "runtime-endpoint: '/run/a.sock' # here", '/run/a.sock'),
                (agent.parse_endpoint_setting, 'runtime-endpoint: ""\ndebug: false\n', None),
                (agent.parse_endpoint_setting, '#runtime-endpoint: /run/a.sock\n', None),
                (agent.parse_endpoint_setting, 'image-endpoint: /run/a.sock\nother: 1\n', None)):
            with self.subTest(text=text):
                self.assertEqual(parse(text), expected)

    def test_one_socket_under_two_names_counts_once(self) -> None:
        os.makedirs(f'{self.directory}/run')
        os.makedirs(f'{self.directory}/var')
        os.symlink('../run', f'{self.directory}/var/run')
        files = {'etc/crictl.yaml': 'runtime-endpoint: unix:///var/run/crio/crio.sock\n'}
        self.assertEqual(collections.Counter(self.endpoints(files))['/run/crio/crio.sock'], 1)

    def test_an_endpoint_through_an_absolute_link_stays_in_the_mounted_root(self) -> None:
        """/var/run -> /run on Debian: in a container that sees the node's / elsewhere, /run is the container's own."""
        os.makedirs(f'{self.directory}/var')
        os.symlink('/run', f'{self.directory}/var/run')
        FakeRuntime(self, f'{self.directory}/run/own.sock')
        self.roots({'etc/crictl.yaml': 'runtime-endpoint: unix:///var/run/own.sock\n'})
        self.assertEqual(len(self.first_cycle(socket_path=None).message), 1)

    def test_environment_names_the_runtime_and_the_flag_wins(self) -> None:
        for name in ('by-flag', 'by-environment'):
            FakeRuntime(self, f'{self.directory}/{name}.sock',
                        ListPodSandbox=cri.ListPodSandboxResponse(items=[sandbox(name)]))
        settings = {'environment': {'CONTAINER_RUNTIME_ENDPOINT': f'unix://{self.directory}/by-environment.sock'}, 'rootfs': '/'}
        both = ('--once', '--output', 'json')
        processes = {'by-flag': self.start_agent(*both, '--cri-socket', f'{self.directory}/by-flag.sock', **settings),
                     'by-environment': self.start_agent(*both, **settings)}
        for name, process in processes.items():
            with self.subTest(name):
                pods = json.loads(self.troubles(process)[0])['pod_metrics']
                self.assertEqual([pod['id'] for pod in pods], [name])

    def test_the_configured_socket_is_found_below_the_root(self) -> None:
        runtime = FakeRuntime(self, f'{self.directory}/run/config.sock')
        self.roots(self.CONFIG)
        self.assertEqual(len(self.first_cycle(socket_path=None).message), 1)
        self.assertIn('Version', runtime.asked)

    def test_a_runtime_of_either_version_is_understood_v1_first(self) -> None:
        for services, expected in (((V1,), V1), ((V1ALPHA2,), V1ALPHA2), ((V1ALPHA2, V1), V1)):
            with self.subTest(services=services):
                path = f'{self.directory}/{len(services)}{services[0]}.sock'
                FakeRuntime(self, path, services)
                part = self.first_cycle(socket_path=path)
                self.assertEqual((part.after.runtime.service, len(part.message)), (expected, 1))

    def test_a_candidate_that_is_no_runtime_gives_way_to_the_next(self) -> None:
        """A containerd whose CRI plugin is disabled says UNIMPLEMENTED to both versions."""
        os.makedirs(f'{self.directory}/run/k3s/containerd')
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as deserted:
            deserted.bind(f'{self.directory}/run/k3s/containerd/containerd.sock')
        FakeRuntime(self, f'{self.directory}/run/containerd/containerd.sock', services=())
        FakeRuntime(self, f'{self.directory}/run/k0s/containerd.sock', Version=b'\xff\xff')
        FakeRuntime(self, f'{self.directory}/run/dockershim.sock')
        part = self.first_cycle(socket_path=None)
        self.assertEqual((os.path.basename(part.after.runtime.socket), len(part.message)), ('dockershim.sock', 1))

    def test_a_hung_candidate_gives_way_to_the_next(self) -> None:
        FakeRuntime(self, f'{self.directory}/run/containerd/containerd.sock').hanging.add('Version')
        FakeRuntime(self, f'{self.directory}/run/crio/crio.sock')
        part = self.first_cycle(socket_path=None, seconds=1)
        self.assertEqual((os.path.basename(part.after.runtime.socket), len(part.message)), ('crio.sock', 1))

    def test_of_several_runtimes_the_one_with_sandboxes_is_taken(self) -> None:
        FakeRuntime(self, f'{self.directory}/run/containerd/containerd.sock', ListPodSandbox=b'')
        FakeRuntime(self, f'{self.directory}/run/k3s/containerd/containerd.sock', (V1ALPHA2,))
        self.assertEqual(len(self.first_cycle(socket_path=None).message), 1)

    def test_of_several_runtimes_with_sandboxes_the_likeliest_is_taken(self) -> None:
        """Also where it speaks the older version."""
        FakeRuntime(self, f'{self.directory}/run/containerd/containerd.sock', (V1ALPHA2,))
        FakeRuntime(self, f'{self.directory}/run/crio/crio.sock')
        self.assertEqual(os.path.basename(self.first_cycle(socket_path=None).after.runtime.socket), 'containerd.sock')

    def test_a_runtime_without_sandboxes_gives_way_once_another_has_some(self) -> None:
        """Docker's containerd is up before that of k3s."""
        FakeRuntime(self, f'{self.directory}/run/containerd/containerd.sock', ListPodSandbox=b'')
        part = self.first_cycle(socket_path=None)
        FakeRuntime(self, f'{self.directory}/run/k3s/containerd/containerd.sock')
        for _ in range(3):
            part = self.cycle(part.after, socket_path=None)
        self.assertEqual(len(part.message), 1)

    def test_the_agent_only_reads(self) -> None:
        reading = {'Version', 'Status', 'ImageFsInfo', 'ListPodSandbox', 'ListContainers', 'ListContainerStats', 'ContainerStatus'}
        self.assertEqual(set(agent.CRI_ANSWERS), reading)
        runtime = FakeRuntime(self, self.socket, ListContainerStats=[grpc.StatusCode.UNKNOWN, b''])
        self.cycle(self.first_cycle().after)
        self.assertEqual(set(runtime.asked), reading)

    def test_no_runtime_is_a_failure_that_names_what_was_tried(self) -> None:
        os.makedirs(f'{self.directory}/run')
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as deserted:
            deserted.bind(f'{self.directory}/run/deserted.sock')
        FakeRuntime(self, f'{self.directory}/run/other.sock', services=())
        self.roots({'run/file.sock': ''})
        for name, expected in (('absent', 'no socket at'), ('file', 'no socket at'), ('deserted', 'UNAVAILABLE'),
                               ('other', 'UNIMPLEMENTED')):
            with self.subTest(name):
                path = f'{self.directory}/run/{name}.sock'
                part = self.first_cycle(socket_path=path)
                self.assertEqual((part.message, part.after.runtime), ([], None))
                self.assertIn(path, part.failures['container runtime'])
                self.assertIn(expected, part.failures['container runtime'])

    def test_a_connection_that_led_nowhere_is_closed(self) -> None:
        os.makedirs(f'{self.directory}/run')
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
            listener.bind(self.socket)
            listener.listen()
            for _ in range(3):
                with concurrent.futures.ThreadPoolExecutor(1) as thread:
                    thread.submit(self.first_cycle, seconds=0.3)
                    connection = accept_silently(listener)
                wait_for_end(connection)

    def test_settings_that_cannot_be_read_cost_nothing_else(self) -> None:
        """A hostPath mount of a file that is absent makes a directory of that name."""
        for path in ('etc/crictl.yaml', 'var/lib/kubelet/config.yaml'):
            os.makedirs(f'{self.directory}/{path}')
        FakeRuntime(self, f'{self.directory}/run/containerd/containerd.sock')
        self.assertEqual(len(self.first_cycle(socket_path=None).message), 1)

    def test_a_setting_that_no_path_can_be_is_a_failure_of_the_runtime_alone(self) -> None:
        """As a power cut may leave it."""
        self.roots({'var/lib/kubelet/config.yaml': 'containerRuntimeEndpoint: \0\0\0\n'})
        part = self.first_cycle(socket_path=None)
        self.assertEqual([], part.message)
        self.assertIn('unintelligible', part.failures['container runtime'])


# --- cgroups of containers

APP, SIDE, POD = 'a1' * 32, 'c3' * 32, 'b2' * 32
UID = '4d8d4687-e257-4652-97a9-ce84cd75ce32'
UID_ = UID.replace('-', '_')
STATIC_UID = '9f2da7f050544b2531a4f56805647174'
# By layout: the pod's group, the container's below it, the pod's uid, its class.
SYSTEMD = 'kubepods.slice/kubepods-{0}.slice/kubepods-{0}-pod%s.slice' % UID_
LAYOUTS = {
    'systemd, containerd': (SYSTEMD.format('burstable'), f'cri-containerd-{APP}.scope', UID, 'Burstable'),
    'systemd, Guaranteed': (f'kubepods.slice/kubepods-pod{UID_}.slice', f'cri-containerd-{APP}.scope', UID, 'Guaranteed'),
    'systemd, CRI-O with runc': (SYSTEMD.format('besteffort'), f'crio-{APP}.scope', UID, 'BestEffort'),
    'systemd, CRI-O with crun': (SYSTEMD.format('burstable'), f'crio-{APP}.scope/container', UID, 'Burstable'),
    'systemd, cri-dockerd': (SYSTEMD.format('burstable'), f'docker-{APP}.scope', UID, 'Burstable'),
    'systemd, static pod': (f'kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{STATIC_UID}.slice',
                            f'cri-containerd-{APP}.scope', STATIC_UID, 'BestEffort'),
    'cgroupfs': (f'kubepods/burstable/pod{UID}', APP, UID, 'Burstable'),
    'cgroupfs, Guaranteed': (f'kubepods/pod{UID}', APP, UID, 'Guaranteed'),
    'cgroupfs, CRI-O': (f'kubepods/besteffort/pod{UID}', f'crio-{APP}', UID, 'BestEffort'),
    'cgroupfs, static pod': (f'kubepods/burstable/pod{STATIC_UID}', APP, STATIC_UID, 'Burstable'),
    'kind': (f'kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-kubepods-burstable-pod{UID_}.slice',
             f'cri-containerd-{APP}.scope', UID, 'Burstable'),
    'kind, cgroupfs': (f'kubelet/kubepods/besteffort/pod{UID}', APP, UID, 'BestEffort'),
}


class CgroupsTest(AgentTest):
    def test_container_and_pod_are_found_in_every_layout(self):
        versions = {'v2': ('', V2), 'v1': ('memory/', {}), 'hybrid': ('memory/', {'sys/fs/cgroup/unified/cgroup.controllers': '\n'})}
        for what, (pod, container_below, uid, qos) in LAYOUTS.items():
            for version, (controller, extra) in versions.items():
                with self.subTest(what, version=version):
                    top = f'sys/fs/cgroup/{controller}'
                    files = {f'{top}{pod}/{container_below}/cgroup.procs': '7\n', f'{top}{pod}/cgroup.procs': '',
                             f'{top}{pod}/crio-conmon-{APP}.scope/cgroup.procs': '8\n', f'{top}{pod}/crio-{POD}/cgroup.procs': '',
                             f'{top}system.slice/containerd.service/cgroup.procs': '9\n',
                             f'{top}{"0" * 63}/x': '', f'{top}{"A1" * 32}/x': '', f'{top}a{APP}/x': '', f'{top}{APP}.mount/x': ''}
                    roots = roots_below(self.tree({**files, **extra}))
                    tree = agent.read_cgroup_tree(roots)
                    paths = agent.read_container_cgroups(roots, tree)
                    self.assertEqual({APP: f'{pod}/{container_below}', POD: f'{pod}/crio-{POD}'}, paths)
                    self.assertEqual((pod, qos), (agent.pod_cgroup_path(paths[APP], uid), agent.qos_class(pod)))
                    self.assertEqual('7', agent.read_first_pid(roots, tree, paths[APP]))

    def test_container_without_a_kubelet_has_no_pod_and_no_class(self):
        roots = roots_below(self.tree({**V2, f'sys/fs/cgroup/k8s.io/{APP}/cpu.stat': ''}))
        path = agent.read_container_cgroups(roots, agent.read_cgroup_tree(roots))[APP]
        self.assertEqual((f'k8s.io/{APP}', None, None),
                         (path, agent.pod_cgroup_path(path, UID), agent.qos_class(agent.pod_cgroup_path(path, UID))))

    def test_pod_of_another_uid_or_of_none_is_not_taken(self):
        path = f'kubepods/pod{UID}/{APP}'
        self.check_table(agent.pod_cgroup_path, [((path, UID), f'kubepods/pod{UID}'), ((path, STATIC_UID), None), ((path, ''), None)])

    def test_host_network_is_known_by_the_namespace_or_by_the_file(self):
        """Where ns/net may not be read, net/dev of one namespace is one file."""
        dev = 'lo: ' + '1 ' * 16 + '\neth0: ' + ' '.join(map(str, range(1, 17))) + '\n'
        for what, link, same in (('namespace', True, True), ('namespace', True, False), ('file', False, True), ('file', False, False)):
            with self.subTest(what, same=same):
                root = self.tree({**V2, f'sys/fs/cgroup/{APP}/cgroup.procs': '7\n8\n', 'proc/1/net/dev': dev})
                for pid, inode in (('1', 1), ('7', 1 if same else 2)):
                    os.makedirs(f'{root}/proc/{pid}/ns')
                    if link:
                        os.symlink(f'net:[{inode}]', f'{root}/proc/{pid}/ns/net')
                os.makedirs(f'{root}/proc/7/net')
                if same and not link:
                    os.link(f'{root}/proc/1/net/dev', f'{root}/proc/7/net/dev')
                else:
                    write_tree(root, {'proc/7/net/dev': dev})
                tree = agent.CgroupTree(2, {'': 'fs/cgroup'})
                network = agent.collect_pod_network(roots_below(root), tree, [APP], None)
                pod = wire.PodMetrics.FromString(network.serialized)
                self.assertEqual((same, same), (network.host, pod.host_network))
                self.assertEqual([] if same else [('eth0', 1, 8, 16)], [
                    (link.name, link.counters.rx_bytes, link.counters.rx_multicast, link.counters.tx_compressed)
                    for link in pod.network_interfaces])
                self.assertIs(network, agent.collect_pod_network(roots_below(root), tree, [APP], network))

    def test_counters_of_a_pod_are_those_of_now_and_of_the_process_of_now(self):
        tree, root = agent.CgroupTree(2, {'': 'fs/cgroup'}), self.tree({'proc/8/net/dev': 'eth0: ' + '9 ' * 16})
        known, seen = None, []
        for pid, number in ((7, 1), (7, 1), (7, 2), (8, 9)):
            write_tree(root, {'sys/fs/cgroup/a/cgroup.procs': f'{pid}\n', 'proc/7/net/dev': 'eth0: ' + f'{number} ' * 16})
            before, known = known, agent.collect_pod_network(roots_below(root), tree, ['a'], known)
            seen.append((wire.PodMetrics.FromString(known.serialized).network_interfaces[0].counters.rx_bytes, known is before))
        self.assertEqual([(1, False), (1, True), (2, False), (9, False)], seen)

    def test_network_is_that_of_the_first_process_that_has_one(self):
        """A zombie has no net/dev; another procfs may not have the process at all."""
        tree, dev = agent.CgroupTree(2, {'': 'fs/cgroup'}), 'eth0: ' + '1 ' * 16 + '\n'
        root = self.tree({'sys/fs/cgroup/empty/cgroup.procs': '', 'sys/fs/cgroup/zombie/cgroup.procs': '6\n', 'proc/6/net/x': '',
                          'sys/fs/cgroup/foreign/cgroup.procs': '0\n', 'sys/fs/cgroup/well/cgroup.procs': '7\n', 'proc/7/net/dev': dev})
        self.assertIsNone(agent.collect_pod_network(roots_below(root), tree, ('empty', 'zombie', 'foreign', 'gone'), None))
        network = agent.collect_pod_network(roots_below(root), tree, ('empty', 'zombie', 'well'), None)
        self.assertEqual(wire.PodMetrics(host_network=False, network_interfaces=[wire.PodInterface(
            name='eth0', counters=agent.build_interface_counters(agent.NetDev(*[1] * 16)))]), wire.PodMetrics.FromString(network.serialized))


# --- pods and containers

# kernel 6.12, Debian 13, x86_64, cgroup v2, systemd driver, containerd 1.7.24: a pod whose container with a limit of 32 MiB
# was killed and started again; and what the runtime said of the two containers 10 s later (only the first is not at rest).
HOG = '1000c6a8357e047d5b0156383d6c481b3d949312e704f801b4a23ea160f984cb'
REST = '36bd6846d1957724bc0c237fbf562bee42da4d3a6553a469e1ba04a2e79db55a'
OOM_POD = SYSTEMD.format('burstable')
OOM_FILES = {
    **V2,
    **below(f'sys/fs/cgroup/{OOM_POD}', {
        'cpu.stat': 'usage_usec 6858104\nuser_usec 1468689\nsystem_usec 5389415\n', 'memory.current': '21848064\n',
        'memory.events': MEMORY_EVENTS, 'pids.current': '3\n', 'pids.max': 'max\n',
        'cpu.pressure': 'some avg10=0.00 avg60=0.21 avg300=0.32 total=1971159\nfull avg10=0.00 avg60=0.18 avg300=0.27 total=1783012\n'}),
    **below(f'sys/fs/cgroup/{OOM_POD}/cri-containerd-{HOG}.scope', {
        'cpu.stat': 'usage_usec 1287923\nuser_usec 439064\nsystem_usec 848858\n', 'memory.current': '21278720\n',
        'memory.max': '33554432\n', 'memory.events': MEMORY_EVENTS.replace('48', '0').replace('1\n', '0\n').replace('2\n', '0\n'),
        'memory.stat': 'anon 21037056\nfile 24576\ninactive_file 24576\nactive_file 0\npgfault 1111\npgmajfault 0\n',
        'memory.swap.current': '0\n', 'memory.swap.max': '0\n', 'cgroup.procs': '1311\n'}),
    **below(f'sys/fs/cgroup/{OOM_POD}/cri-containerd-{REST}.scope', {
        'cpu.stat': 'usage_usec 683889\nuser_usec 225183\nsystem_usec 458706\n', 'memory.current': '258048\n', 'memory.max': 'max\n',
        'memory.stat': 'anon 57344\nfile 24576\ninactive_file 24576\nactive_file 0\npgfault 595\npgmajfault 0\n',
        'memory.swap.current': '0\n', 'memory.swap.max': 'max\n', 'cgroup.procs': '1100\n'}),
    'proc/1/net/dev': NET_DEV, 'proc/1311/net/dev': NET_DEV.replace('enp0s3:   50152', '  eth0:    4836').partition('  cni0')[0]}
# working set, available, usage, resident, faults, major faults
OOM_STATS = {HOG: (1297955000, (21254144, 12300288, 21278720, 21037056, 1111, 0)), REST: (683889000, (233472, 0, 258048, 57344, 595, 0))}
MEMORY_FIELDS = ('working_set_bytes', 'available_bytes', 'usage_bytes', 'rss_bytes', 'page_faults', 'major_page_faults')


def memory_stats(numbers: Sequence[int]) -> cri.MemoryUsage:
    return cri.MemoryUsage(timestamp=1, **{name: value(number) for name, number in zip(MEMORY_FIELDS, numbers)})


def group(cpu_usec: int, memory_bytes: int) -> Dict[str, str]:
    return {'cpu.stat': f'usage_usec {cpu_usec}\n', 'memory.current': f'{memory_bytes}\n', 'memory.stat': 'inactive_file 1\n'}


class KernelSideTest(ServerTest):
    """Pods whose containers are cgroups, by default one pod with APP and SIDE; `groups` has the files of each id's group."""

    def setUp(self) -> None:
        super().setUp()
        self.groups = {name: group(1000, 500) for name in (POD, APP, SIDE)}
        self.pod_usec = 2000

    def path(self, name: str) -> str:
        return f'{self.directory}/sys/fs/cgroup/kubepods/pod{UID}/{name}'

    def start(self, names: Sequence[str] = (APP, SIDE), **answers: Any) -> FakeRuntime:
        pod = sandbox(POD)
        pod.metadata.uid = UID
        self.roots(V2)
        self.write_groups()
        return FakeRuntime(self, self.socket, **{
            'ListPodSandbox': cri.ListPodSandboxResponse(items=[pod]),
            'ListContainers': cri.ListContainersResponse(containers=[container(name, POD) for name in names]),
            'ListContainerStats': list_stats(*(stats(name, 10**9, 5_000_000, memory=memory_stats(range(1, 7))) for name in names)),
            **answers})

    def write_groups(self) -> None:
        """As if something had run: then the pod's group has run as well."""
        self.pod_usec += 1
        self.roots(below(f'sys/fs/cgroup/kubepods/pod{UID}', group(self.pod_usec, 1000)))
        self.roots({path: text for name, files in self.groups.items()
                    for path, text in below(f'sys/fs/cgroup/kubepods/pod{UID}/{name}', files).items()})

    def remove_group(self, name: str) -> None:
        """The kernel answers ENODEV for an open file of a group that is gone; here it has nothing to say."""
        os.truncate(f'{self.path(name)}/cpu.stat', 0)
        shutil.rmtree(self.path(name))
        del self.groups[name]

    def kernel_cycle(self, memory: agent.PodsMemory = agent.PodsMemory()) -> agent.Part:
        return self.cycle(memory, container_stats='cgroup')

    def sources(self, part: agent.Part) -> Dict[str, Tuple[str, int]]:
        """By container, where its numbers come from, and its CPU time in µs."""
        return {found.id: (found.stats_source, found.cpu_metrics.usage_core_nano_seconds.value // 1000)
                for pod in part.message for found in pod.container_metrics}

    def test_capture_is_what_its_runtime_said(self) -> None:
        self.roots(OOM_FILES)
        pod = sandbox('oom-0')
        pod.metadata.uid = UID
        FakeRuntime(self, self.socket, ListPodSandbox=cri.ListPodSandboxResponse(items=[pod]), ListContainers=cri.ListContainersResponse(
            containers=[container(name, 'oom-0') for name in OOM_STATS]))
        part = self.kernel_cycle()
        self.assertEqual(({}, ['cgroup', 'cgroup']), (part.failures, [source for source, _ in self.sources(part).values()]))
        for found in part.message[0].container_metrics:
            usage_ns, numbers = OOM_STATS[found.id]
            self.assertTrue(usage_ns - 11_000_000 < found.cpu_metrics.usage_core_nano_seconds.value <= usage_ns)
            self.assertEqual(numbers, tuple(getattr(found.memory_metrics, name).value for name in MEMORY_FIELDS))
            # Without a limit the runtime says 0, and the agent nothing.
            self.assertEqual(found.id == HOG, found.memory_metrics.HasField('available_bytes'))
            self.assertEqual(found.id == HOG, found.swap_metrics.HasField('available_bytes'))
            self.assertTrue(found.swap_metrics.HasField('usage_bytes'))
        pod, = part.message
        self.assertEqual((2, 1, 48, 6858104, 3, 1971159, OOM_POD), (
            pod.cgroup.memory.events_oom_kill, pod.cgroup.memory.events_oom, pod.cgroup.memory.events_max, pod.cgroup.cpu.usage_usec,
            pod.cgroup.pids.current, pod.cgroup.cpu_pressure.some.total.value, pod.cgroup.path))
        self.assertEqual(('Burstable', False, [('eth0', 4836, 145)]), (pod.qos_class, pod.host_network, [
            (link.name, link.counters.rx_bytes, link.counters.tx_packets) for link in pod.network_interfaces]))
        self.assertEqual([0, 0], [found.cgroup.memory.events_oom_kill for found in pod.container_metrics])

    def test_v1_and_its_layouts_give_the_contracts_fields(self) -> None:
        for layout in LAYOUTS_V1:
            with self.subTest(layout):
                self.directory = tempfile.mkdtemp()
                self.addCleanup(shutil.rmtree, self.directory)
                self.socket = f'{self.directory}/run/cri.sock'
                pod = sandbox(POD)
                pod.metadata.uid = UID
                FakeRuntime(self, self.socket, ListPodSandbox=cri.ListPodSandboxResponse(items=[pod]),
                            ListContainers=cri.ListContainersResponse(containers=[container(APP, POD)]))
                self.roots({path: text for name in (f'pod{UID}', f'pod{UID}/{APP}')
                            for path, text in group_v1(f'kubepods/besteffort/{name}', layout).items()})
                pod, = self.kernel_cycle().message
                found, = pod.container_metrics
                self.assertEqual(('cgroup', 1000, 'BestEffort', 30), (
                    found.stats_source, found.cpu_metrics.usage_core_nano_seconds.value, pod.qos_class, pod.cgroup.memory.events_oom_kill))
                # 11 - 19 and 13 - 0: what is below zero is zero.
                self.assertEqual((0, 13, 11, 17, 26, 27), tuple(getattr(found.memory_metrics, name).value for name in MEMORY_FIELDS))
                self.assertEqual((15, 1), (found.swap_metrics.usage_bytes.value, found.swap_metrics.available_bytes.value))

    def test_pod_at_rest_is_told_by_its_group_alone(self) -> None:
        """What its containers' groups say is not even read; their rates are 0, their moment is that of the pod."""
        self.start()
        first = self.kernel_cycle()
        self.roots(below(f'sys/fs/cgroup/kubepods/pod{UID}/{APP}', {'cpu.stat': 'usage_usec 999999\n'}))
        second = self.kernel_cycle(first.after)
        pod, = second.message
        self.assertEqual([(1000, 0, pod.cgroup.timestamp_ns)] * 2, [
            (found.cgroup.cpu.usage_usec, found.cpu_metrics.usage_nano_cores.value, found.cgroup.timestamp_ns)
            for found in pod.container_metrics])
        self.assertGreater(pod.cgroup.timestamp_ns, first.message[0].cgroup.timestamp_ns)
        self.write_groups()
        self.roots(below(f'sys/fs/cgroup/kubepods/pod{UID}/{APP}', {'cpu.stat': 'usage_usec 999999\n'}))
        app, side = self.kernel_cycle(second.after).message[0].container_metrics
        self.assertEqual((999999, 1000), (app.cgroup.cpu.usage_usec, side.cgroup.cpu.usage_usec))
        self.assertGreater(app.cpu_metrics.usage_nano_cores.value, 0)

    def test_pod_at_rest_does_not_delay_what_is_due(self) -> None:
        self.groups[APP]['memory.max'] = '1000\n'
        self.start()
        part = self.kernel_cycle()
        self.roots(below(f'sys/fs/cgroup/kubepods/pod{UID}/{APP}', {'memory.max': '2000\n'}))
        reading = part.after.cgroups.readings[APP]
        readings = {**part.after.cgroups.readings, APP: reading._replace(cgroup=reading.cgroup._replace(due=0))}
        part = self.kernel_cycle(part.after._replace(cgroups=part.after.cgroups._replace(readings=readings)))
        self.assertEqual(2000, part.message[0].container_metrics[0].cgroup.memory.max_bytes)

    def test_pod_at_rest_tells_nothing_of_a_container_elsewhere(self) -> None:
        del self.groups[SIDE]
        self.start()
        elsewhere = f'sys/fs/cgroup/elsewhere/cri-containerd-{SIDE}.scope'
        self.roots(below(elsewhere, group(6000, 500)))
        part = self.kernel_cycle()
        self.roots(below(elsewhere, group(7000, 500)))
        self.assertEqual({APP: ('cgroup', 1000), SIDE: ('cgroup', 7000)}, self.sources(self.kernel_cycle(part.after)))

    def test_open_files_do_not_add_up(self) -> None:
        """Pods and containers come and go, one cannot be understood, and the runtime is away for a while."""
        runtime, memory, counts = self.start(), agent.PodsMemory(), []
        usual = runtime.answers['ListPodSandbox'], runtime.answers['ListContainers']
        for number in range(12):
            pod, app = sandbox(f'{number:064x}'), container(f'{1 << 200 | number:064x}', f'{number:064x}')
            pod.metadata.uid = UID
            self.groups = {pod.id: group(number, 500), app.id: group(number, 500), SIDE: {**group(number, 1), 'io.stat': '8:0 rbytes=x\n'}}
            self.write_groups()
            runtime.answers['ListPodSandbox'] = cri.ListPodSandboxResponse(items=[pod])
            runtime.answers['ListContainers'] = cri.ListContainersResponse(containers=[app, container(SIDE, pod.id)])
            memory = self.kernel_cycle(memory).after
            links = [os.path.realpath(f'/proc/self/fd/{name}') for name in os.listdir('/proc/self/fd')]
            counts.append(sum(link.startswith(f'{self.directory}/sys/fs/cgroup/') for link in links))
            self.remove_group(app.id)
            if number in (2, 4, 6):
                runtime.answers['ListPodSandbox'] = grpc.StatusCode.INTERNAL
                memory = self.kernel_cycle(memory).after
        # Of the pod's and of the container's group; those of the one that cannot be understood are let go.
        self.assertEqual([3 + 3] * len(counts), counts)

    def test_each_part_has_the_moment_at_which_the_group_was_read(self) -> None:
        self.groups[APP].update({'memory.swap.current': '5\n'})
        self.start()
        before = time.time_ns()
        part = self.kernel_cycle(self.kernel_cycle().after)
        app = part.message[0].container_metrics[0]
        self.assertEqual({app.cgroup.timestamp_ns}, {app.cpu_metrics.timestamp, app.memory_metrics.timestamp, app.swap_metrics.timestamp})
        self.assertTrue(before < app.cgroup.timestamp_ns <= time.time_ns())

    def test_container_that_appears_in_a_pod_at_rest_is_read(self) -> None:
        runtime = self.start([APP])
        part = self.kernel_cycle()
        runtime.answers['ListContainers'] = cri.ListContainersResponse(containers=[container(APP, POD), container(SIDE, POD)])
        self.assertEqual({APP: ('cgroup', 1000), SIDE: ('cgroup', 1000)}, self.sources(self.kernel_cycle(part.after)))

    def test_rate_is_of_two_reads_by_our_own_clock(self) -> None:
        runtime = self.start()
        instants = [time.monotonic_ns()]
        first = self.kernel_cycle()
        instants.append(time.monotonic_ns())
        self.groups[APP] = group(901_000, 500)
        self.write_groups()
        instants.append(time.monotonic_ns())
        second = self.kernel_cycle(first.after)
        instants.append(time.monotonic_ns())
        app, side = second.message[0].container_metrics
        rate, used_ns = app.cpu_metrics.usage_nano_cores.value, 900_000_000
        self.assertTrue(used_ns * 10**9 // (instants[3] - instants[0]) <= rate <= used_ns * 10**9 // (instants[2] - instants[1]), rate)
        self.assertEqual((True, 0), (side.cpu_metrics.HasField('usage_nano_cores'), side.cpu_metrics.usage_nano_cores.value))
        self.assertFalse(first.message[0].container_metrics[0].cpu_metrics.HasField('usage_nano_cores'))
        self.assertEqual(1, runtime.asked.count('ListContainerStats'))

    def test_container_without_a_group_gets_what_the_runtime_says(self) -> None:
        """A VM's: the statistics are asked for each cycle, and those of a group come from the group."""
        del self.groups[SIDE]
        runtime = self.start()
        memory = agent.PodsMemory()
        for _ in range(3):
            part = self.kernel_cycle(memory)
            memory = part.after
            self.assertEqual({APP: ('cgroup', 1000), SIDE: ('cri', 5000)}, self.sources(part))
        side = part.message[0].container_metrics[1]
        self.assertEqual((False, 3), (side.HasField('cgroup'), side.memory_metrics.usage_bytes.value))
        self.assertEqual(3, runtime.asked.count('ListContainerStats'))

    def test_flag_keeps_the_cgroups_unread(self) -> None:
        self.start()
        part = self.cycle(agent.PodsMemory())
        self.assertEqual({APP: ('cri', 5000), SIDE: ('cri', 5000)}, self.sources(part))
        self.assertFalse(part.message[0].HasField('cgroup') or part.message[0].container_metrics[0].HasField('cgroup'))

    def test_tree_is_walked_only_for_running_containers_without_a_group(self) -> None:
        runtime = self.start()
        with mock.patch.object(agent, 'read_container_cgroups', wraps=agent.read_container_cgroups) as walk:
            part = self.kernel_cycle()
            for _ in range(3):
                part = self.kernel_cycle(part.after)
            self.assertEqual(1, walk.call_count)
            new, vm = 'd4' * 32, 'e5' * 32
            self.groups[new] = group(3000, 500)
            self.write_groups()
            runtime.answers['ListContainers'] = cri.ListContainersResponse(containers=[
                container(APP, POD), container(new, POD), container('f6' * 32, POD, cri.CONTAINER_EXITED)])
            part = self.kernel_cycle(self.kernel_cycle(part.after).after)
            self.assertEqual((2, ('cgroup', 3000)), (walk.call_count, self.sources(part)[new]))
            runtime.answers['ListContainers'] = cri.ListContainersResponse(containers=[container(APP, POD), container(vm, POD)])
            for _ in range(3):
                part = self.kernel_cycle(part.after)
            self.assertEqual(3, walk.call_count)
            overdue = part.after.cgroups._replace(search_due=0)
            part = self.kernel_cycle(part.after._replace(cgroups=overdue))
            self.kernel_cycle(part.after)
            self.assertEqual(4, walk.call_count)

    def test_group_that_vanishes_is_looked_for_again(self) -> None:
        self.start()
        part = self.kernel_cycle()
        self.remove_group(SIDE)
        self.write_groups()
        part = self.kernel_cycle(part.after)
        self.assertEqual(({APP: ('cgroup', 1000), SIDE: ('cri', 5000)}, {}), (self.sources(part), part.failures))
        self.roots(below(f'sys/fs/cgroup/elsewhere/cri-containerd-{SIDE}.scope', group(6000, 500)))
        self.assertEqual(('cgroup', 6000), self.sources(self.kernel_cycle(part.after))[SIDE])

    def test_malformed_file_costs_its_groups_numbers_alone(self) -> None:
        most = 2**64
        for name, text in (('cpu.stat', 'usage_usec x\n'), ('cpu.stat', f'usage_usec {most}\n'), ('cpu.stat', f'usage_usec {most - 1}\n'),
                           ('cpu.stat', f'usage_usec {most // 1000 + 1}\n'),
                           ('cpu.stat', 'usage_usec -1\n'), ('memory.current', '\n'), ('memory.current', '1e9\n'),
                           ('memory.stat', 'anon\n'),
                           ('memory.stat', f'inactive_file {most - 1}\n'), ('memory.max', '-5\n'), ('cpu.pressure', 'some x\n'),
                           ('io.stat', '8:0 rbytes=-1\n'), ('memory.swap.current', f'{most - 1}\n')):
            with self.subTest(name, text=text):
                self.groups[SIDE] = {**group(1000, 500), name: text}
                runtime = self.start()
                part = self.kernel_cycle()
                self.assertEqual(('cgroup', 1000), self.sources(part)[APP])
                self.assertEqual([APP, SIDE], [found.id for found in part.message[0].container_metrics])
                self.assertLessEqual(part.failures.keys(), {'cgroups'})
                self.assertTrue(part.message[0].HasField('cgroup'))
                runtime.close()
                os.remove(f'{self.path(SIDE)}/{name}')

    def test_malformed_file_of_a_pod_costs_the_pods_group_alone(self) -> None:
        self.start()
        self.roots(below(f'sys/fs/cgroup/kubepods/pod{UID}', {'memory.current': 'x\n'}))
        part = self.kernel_cycle()
        self.assertEqual({APP: ('cgroup', 1000), SIDE: ('cgroup', 1000)}, self.sources(part))
        self.assertEqual(['pod cgroups'], list(part.failures))

    def test_limits_of_known_containers_are_read_seldom(self) -> None:
        self.groups[APP]['memory.max'] = '1000\n'
        self.start()
        part = self.kernel_cycle()
        self.groups[APP]['memory.max'] = '2000\n'
        self.write_groups()
        part = self.kernel_cycle(part.after)
        self.assertEqual(1000, part.message[0].container_metrics[0].cgroup.memory.max_bytes)
        readings = {id: reading._replace(cgroup=reading.cgroup._replace(due=time.monotonic() - 1))
                    for id, reading in part.after.cgroups.readings.items()}
        self.write_groups()
        part = self.kernel_cycle(part.after._replace(cgroups=part.after.cgroups._replace(readings=readings)))
        app = part.message[0].container_metrics[0]
        self.assertEqual((2000, 1501), (app.cgroup.memory.max_bytes, app.memory_metrics.available_bytes.value))

    def test_runtime_is_asked_for_statistics_only_for_the_writable_layers(self) -> None:
        layer = cri.FilesystemUsage(timestamp=31, fs_id=cri.FilesystemIdentifier(mountpoint='/x'), used_bytes=value(33))
        runtime = self.start(ListContainerStats=list_stats(stats(APP, 1, 2, writable_layer=layer), stats(SIDE, 1, 2)))
        part = self.kernel_cycle()
        for _ in range(5):
            part = self.kernel_cycle(part.after)
            self.assertEqual([33, 0], [found.file_system_metrics.used_bytes.value for found in part.message[0].container_metrics])
        self.assertEqual((1, 1, 1, 6), tuple(map(runtime.asked.count, ('ListContainerStats', 'ImageFsInfo', 'Status', 'ListContainers'))))
        self.assertAlmostEqual(time.monotonic() + 60, part.after.health.sizes_due, delta=10)
        layer.used_bytes.value = 44
        runtime.answers['ListContainerStats'] = list_stats(stats(APP, 1, 2, writable_layer=layer))
        part = self.kernel_cycle(part.after._replace(health=part.after.health._replace(sizes_due=0)))
        self.assertEqual((2, 44), (runtime.asked.count('ListContainerStats'),
                                   part.message[0].container_metrics[0].file_system_metrics.used_bytes.value))
        # What has gone is forgotten.
        runtime.answers['ListContainers'] = cri.ListContainersResponse(containers=[container(SIDE, POD)])
        self.assertEqual({}, self.kernel_cycle(part.after).after.health.layers)

    def test_hung_statistics_cost_nothing_but_the_layers(self) -> None:
        runtime = self.start()
        runtime.hanging.add('ListContainerStats')
        part = self.cycle(agent.PodsMemory(), seconds=0.2, container_stats='cgroup')
        self.assertEqual({APP: ('cgroup', 1000), SIDE: ('cgroup', 1000)}, self.sources(part))
        self.assertIn('container statistics', part.failures)
        runtime.release()
        self.assertEqual({}, self.kernel_cycle(part.after).failures)

    def test_status_is_asked_for_once_after_each_change_of_state(self) -> None:
        ids: List[str] = []

        def status(request: bytes) -> cri.ContainerStatusResponse:
            ids.append(cri.ContainerStatusRequest.FromString(request).container_id)
            told = cri.ContainerStatus(state=cri.CONTAINER_RUNNING, started_at=8)
            if len(ids) > 2:
                told = cri.ContainerStatus(state=cri.CONTAINER_EXITED, started_at=8, finished_at=9, exit_code=137, reason='OOMKilled')
            return cri.ContainerStatusResponse(status=told)

        def fields(part: agent.Part) -> Tuple[bool, int, int, str]:
            told = part.message[0].container_metrics[0].status
            return told.HasField('exit_code'), told.exit_code, told.finished_at_ns, told.reason

        runtime = self.start(ContainerStatus=status)
        part = self.kernel_cycle()
        for _ in range(3):
            part = self.kernel_cycle(part.after)
        self.assertEqual(([APP, SIDE], (False, 0, 0, '')), (sorted(ids), fields(part)))
        self.assertEqual(8, part.message[0].container_metrics[0].status.started_at_ns)
        runtime.answers['ListContainers'] = cri.ListContainersResponse(containers=[
            container(APP, POD, cri.CONTAINER_EXITED), container(SIDE, POD)])
        for _ in range(3):
            part = self.kernel_cycle(part.after)
            self.assertEqual((True, 137, 9, 'OOMKilled'), fields(part))
        self.assertEqual([APP], ids[2:])

    def test_a_kill_is_asked_about_again_and_what_is_known_of_it_stays(self) -> None:
        """containerd may learn only after the exit that it was for want of memory; and may not answer just then."""
        def told(reason: str) -> cri.ContainerStatusResponse:
            return cri.ContainerStatusResponse(status=cri.ContainerStatus(
                state=cri.CONTAINER_EXITED, finished_at=time.time_ns(), exit_code=137, reason=reason))

        runtime = self.start(ContainerStatus=[told('Error'), grpc.StatusCode.INTERNAL, told('OOMKilled'), told('too late')],
                             ListContainers=cri.ListContainersResponse(containers=[container(APP, POD, cri.CONTAINER_EXITED)]))
        part, reasons = self.kernel_cycle(), []
        for _ in range(4):
            status = part.message[0].container_metrics[0].status
            reasons.append((status.exit_code, status.reason))
            due = part.after.health._replace(conditions_due=0)
            part = self.kernel_cycle(part.after._replace(health=due))
        self.assertEqual([(137, 'Error'), (137, 'Error'), (137, 'OOMKilled'), (137, 'OOMKilled')], reasons)
        self.assertEqual(3, runtime.asked.count('ContainerStatus'))

    def test_statuses_are_asked_for_by_and_by(self) -> None:
        names = [f'{number:064x}' for number in range(agent.STATUSES_PER_CYCLE * 2 + 3)]
        runtime, counts, part = self.start(names), [], None
        for _ in range(4):
            part = self.kernel_cycle(part.after if part else agent.PodsMemory())
            counts.append(runtime.asked.count('ContainerStatus'))
        bound = agent.STATUSES_PER_CYCLE
        self.assertEqual([bound, 2 * bound, 2 * bound + 3, 2 * bound + 3], counts)
        self.assertTrue(all(found.HasField('status') for found in part.message[0].container_metrics))

    def test_those_that_have_ended_are_asked_for_first(self) -> None:
        names = [f'{number:064x}' for number in range(agent.STATUSES_PER_CYCLE * 2)]
        ended = names[agent.STATUSES_PER_CYCLE:]
        self.start(ListContainers=cri.ListContainersResponse(containers=[
            container(name, POD, cri.CONTAINER_EXITED if name in ended else cri.CONTAINER_RUNNING) for name in names]))
        told = [found.id for found in self.kernel_cycle().message[0].container_metrics if found.HasField('status')]
        self.assertEqual(ended, told)

    def test_status_that_fails_is_a_failure_and_not_asked_for_each_cycle(self) -> None:
        runtime = self.start(ContainerStatus=grpc.StatusCode.INTERNAL)
        part = self.kernel_cycle()
        self.assertIn('INTERNAL', part.failures['container status'])
        for _ in range(3):
            part = self.kernel_cycle(part.after)
        self.assertEqual(2, runtime.asked.count('ContainerStatus'))
        runtime.answers['ContainerStatus'] = grpc.StatusCode.NOT_FOUND
        self.assertNotIn('container status', self.first_cycle().failures)

    def test_states_are_counted_and_the_runtime_is_described(self) -> None:
        pods = [sandbox('a'), sandbox('b', cri.SANDBOX_NOTREADY), sandbox('c', cri.SANDBOX_NOTREADY)]
        containers = [container(str(number), 'b', state) for number, state in enumerate((0, 1, 1, 2, 2, 2, 3))]
        self.start(
            ListPodSandbox=cri.ListPodSandboxResponse(items=pods), ListContainers=cri.ListContainersResponse(containers=containers),
            Status=cri.StatusResponse(status=cri.RuntimeStatus(conditions=[
                cri.RuntimeCondition(type='RuntimeReady', status=True), cri.RuntimeCondition(type='NetworkReady', status=False)])),
            ImageFsInfo=cri.ImageFsInfoResponse(image_filesystems=[cri.FilesystemUsage(
                timestamp=1, fs_id=cri.FilesystemIdentifier(mountpoint='/images'), used_bytes=value(2), inodes_used=value(3))]))
        self.kernel_cycle()
        self.assertEqual(json_format.MessageToDict(self.runtime_metrics, preserving_proto_field_name=True), {
            'name': 'fake', 'version': '1.0', 'socket': self.socket, 'service': V1,
            'conditions': {'RuntimeReady': True, 'NetworkReady': False}, 'sandboxes': {'SANDBOX_READY': '1', 'SANDBOX_NOTREADY': '2'},
            'containers': {'CONTAINER_CREATED': '1', 'CONTAINER_RUNNING': '2', 'CONTAINER_EXITED': '3', 'CONTAINER_UNKNOWN': '1'},
            'image_file_systems': [{'timestamp': '1', 'mountpoint': '/images', 'used_bytes': '2', 'inodes_used': '3'}]})

    def test_restart_count_is_a_number_or_absent(self) -> None:
        for text, expected in (('0', 0), ('17', 17), ('', None), ('many', None), ('-1', None), ('9' * 30, None)):
            self.assertEqual(expected, agent.restart_count({'io.kubernetes.container.restartCount': text}))
        self.assertIsNone(agent.restart_count({}))

    def test_cost_grows_in_step_with_the_pods(self) -> None:
        """Opened files and directories of a cycle: as many more from 4 pods to 8 as from 8 to 12."""
        opened = []
        for count in (4, 8, 12):
            pods, containers, files = [], [], dict(V2)
            for number in range(count):
                pods.append(sandbox(f'{count + number:064x}'))
                pods[-1].metadata.uid = f'uid{number:09}'
                containers.append(container(f'{1 << 200 | number:064x}', pods[-1].id))
                for path, name in (('', ''), (f'/{pods[-1].id}', str(number)), (f'/{containers[-1].id}', str(number))):
                    files.update(below(f'sys/fs/cgroup/kubepods/pod{pods[-1].metadata.uid}{path}',
                                       {**group(1, 2), 'cgroup.procs': f'{name}\n' if name else ''}))
                files[f'proc/{number}/net/dev'] = NET_DEV
            self.directory = tempfile.mkdtemp()
            self.addCleanup(shutil.rmtree, self.directory)
            self.socket = f'{self.directory}/run/cri.sock'
            self.roots(files)
            FakeRuntime(self, self.socket, ListPodSandbox=cri.ListPodSandboxResponse(items=pods),
                        ListContainers=cri.ListContainersResponse(containers=containers))
            memory = self.kernel_cycle().after
            with mock.patch.object(agent.os, 'open', wraps=os.open) as read, \
                    mock.patch.object(agent, 'read_container_cgroups', wraps=agent.read_container_cgroups) as walk:
                part = self.kernel_cycle(memory)
            self.assertEqual(({'cgroup'}, False, 0), (
                {source for source, _ in self.sources(part).values()}, part.message[0].host_network, walk.call_count))
            opened.append(read.call_count)
        self.assertEqual(opened[1] - opened[0], opened[2] - opened[1])
        self.assertLess(opened[0], 4 * 4)


class PodsTest(ServerTest):
    def cycles(self, runtime: FakeRuntime, answers: Iterable[Any]) -> List[wire.ContainerMetrics]:
        """The one container of the one pod, in a cycle for each of these answers to ListContainerStats."""
        memory, metrics = agent.PodsMemory(), []
        for answer in answers:
            runtime.answers['ListContainerStats'] = answer
            part = self.cycle(memory)
            memory = part.after
            metrics.append(part.message[0].container_metrics[0])
        return metrics

    def test_every_field_has_its_place(self) -> None:
        pod, app = sandbox('pod'), container('app', 'pod', image='sha256:5', user_specified_image='registry/app:5')
        pod.labels['tier'], pod.runtime_handler, pod_labels = 'web', 'kata', {'tier': 'web'}
        app.labels['part'], app.annotations['io.kubernetes.container.restartCount'], app.image_ref = 'x', '6', 'sha256:7'
        FakeRuntime(
            self, self.socket, ListPodSandbox=cri.ListPodSandboxResponse(items=[pod]),
            ListContainers=cri.ListContainersResponse(containers=[app]),
            ContainerStatus=cri.ContainerStatusResponse(status=cri.ContainerStatus(
                state=cri.CONTAINER_EXITED, started_at=51, finished_at=52, exit_code=-53, reason='Error')),
            ListContainerStats=list_stats(stats(
                'app', 11, 12, 13,
                memory=cri.MemoryUsage(timestamp=21, working_set_bytes=value(22), available_bytes=value(0), usage_bytes=value(24),
                                       rss_bytes=value(25), page_faults=value(26), major_page_faults=value(27)),
                writable_layer=cri.FilesystemUsage(timestamp=31, fs_id=cri.FilesystemIdentifier(mountpoint='/32'),
                                                   used_bytes=value(33), inodes_used=value(34)),
                swap=cri.SwapUsage(timestamp=41, swap_available_bytes=value(42), swap_usage_bytes=value(43)))))
        part = self.first_cycle()
        self.assertEqual(part.failures, {})
        self.assertEqual(json_format.MessageToDict(part.message[0], preserving_proto_field_name=True), {
            'id': 'pod', 'uid': 'pod-uid', 'name': 'pod-name', 'namespace': 'default', 'created_at': '1',
            'state': 'SANDBOX_READY', 'attempt': 2, 'labels': pod_labels, 'runtime_handler': 'kata', 'container_metrics': [{
                'id': 'app', 'name': 'app-name', 'image': 'registry/app:5', 'created_at': '3', 'state': 'CONTAINER_RUNNING',
                'attempt': 4,
                'cpu_metrics': {'timestamp': '11', 'usage_nano_cores': '13', 'usage_core_nano_seconds': '12'},
                'memory_metrics': {'timestamp': '21', 'working_set_bytes': '22', 'available_bytes': '0', 'usage_bytes': '24',
                                   'rss_bytes': '25', 'page_faults': '26', 'major_page_faults': '27'},
                'file_system_metrics': {'timestamp': '31', 'mountpoint': '/32', 'used_bytes': '33', 'inodes_used': '34'},
                'swap_metrics': {'timestamp': '41', 'available_bytes': '42', 'usage_bytes': '43'},
                'stats_source': 'cri', 'restart_count': 6, 'labels': {'part': 'x'}, 'image_ref': 'sha256:7',
                'status': {'started_at_ns': '51', 'finished_at_ns': '52', 'exit_code': -53, 'reason': 'Error'}}]})

    def test_sandboxes_that_are_not_ready_are_not_listed(self) -> None:
        FakeRuntime(self, self.socket, ListPodSandbox=cri.ListPodSandboxResponse(items=[
            sandbox('b'), sandbox('gone', cri.SANDBOX_NOTREADY), sandbox('a'), sandbox('odd', 7)]))
        self.assertEqual([pod.id for pod in self.first_cycle().message], ['a', 'b'])

    def test_containers_are_listed_in_every_state_with_their_own_pod(self) -> None:
        FakeRuntime(
            self, self.socket, ListPodSandbox=cri.ListPodSandboxResponse(items=[sandbox('one'), sandbox('two'), sandbox('none')]),
            ListContainers=cri.ListContainersResponse(containers=[
                container('odd', 'one', 9, 5), container('created', 'one', cri.CONTAINER_CREATED, 4),
                container('exited', 'one', cri.CONTAINER_EXITED, 3), container('running', 'two', image='nginx'),
                container('orphan', 'gone')]),
            ListContainerStats=list_stats(
                cri.ContainerStats(attributes=cri.ContainerAttributes(id='exited'),
                                   writable_layer=cri.FilesystemUsage(timestamp=6, used_bytes=value(0))),
                stats('running', 1, 2), stats('unknown', 1, 2)))
        pods = {pod.id: pod.container_metrics for pod in self.first_cycle().message}
        self.assertEqual({name: [(c.id, c.state) for c in containers] for name, containers in pods.items()}, {
            'none': [], 'one': [('exited', 'CONTAINER_EXITED'), ('created', 'CONTAINER_CREATED'), ('odd', '9')],
            'two': [('running', 'CONTAINER_RUNNING')]})
        exited, created = pods['one'][:2]
        self.assertFalse(exited.HasField('cpu_metrics') or exited.HasField('memory_metrics'))
        self.assertTrue(exited.file_system_metrics.HasField('used_bytes'))
        self.assertFalse(any(created.HasField(part) for part in (
            'cpu_metrics', 'memory_metrics', 'file_system_metrics', 'swap_metrics')))
        self.assertEqual(pods['two'][0].image, 'nginx')

    def test_writable_layer_that_was_never_measured_is_absent(self) -> None:
        layer = cri.FilesystemUsage(timestamp=0, fs_id=cri.FilesystemIdentifier(mountpoint='/x'), used_bytes=value(0))
        FakeRuntime(self, self.socket, ListContainerStats=list_stats(stats('app', 1, 2, writable_layer=layer)))
        self.assertFalse(self.first_cycle().message[0].container_metrics[0].HasField('file_system_metrics'))

    def test_usage_nano_cores_is_of_our_own_two_samples(self) -> None:
        """Each case: samples (timestamp, usage, the runtime's rate), and the rate after the last of them."""
        second, absent, runtime = 10**9, None, FakeRuntime(self, self.socket)
        for what, samples, expected in (
                ('half a core', [(1 * second, 0, None), (3 * second, 1 * second, None)], 500_000_000),
                ('idle', [(1 * second, 7, None), (2 * second, 7, 99)], 0),
                ("not the runtime's", [(1 * second, 0, 77), (2 * second, 5, 77)], 5),
                ('from the last one', [(1 * second, 0, None), (2 * second, 100, None), (3 * second, 103, None)], 3),
                ('no time has passed', [(5, 0, 77), (5, 9, 77)], absent),
                ('time went back', [(5, 0, 77), (4, 9, 77)], absent),
                ('counter went back', [(5, 9, 77), (6, 8, 77)], absent),
                ('after a sample that went back', [(1 * second, 100, 77), (2 * second, 0, 77), (3 * second, 4, 77)], 4),
                ("first: the runtime's", [(1, 2, 77)], 77),
                ("first: the runtime's largest", [(1, 2, agent.SANE_NANO_CORES - 1)], agent.SANE_NANO_CORES - 1),
                ('first: 0 may mean none', [(1, 2, 0)], absent),
                ('first: containerd 1.6 tearing down', [(1, 2, 2**63)], absent),
                ('first: more than any machine', [(1, 2, agent.SANE_NANO_CORES)], absent),
                ('first: none', [(1, 2, None)], absent)):
            with self.subTest(what):
                cpu = self.cycles(runtime, [list_stats(stats('app', *sample)) for sample in samples])[-1].cpu_metrics
                self.assertEqual(cpu.usage_nano_cores.value if cpu.HasField('usage_nano_cores') else absent, expected)

    def test_a_counter_that_went_back_is_no_measurement(self) -> None:
        first, second = self.cycles(FakeRuntime(self, self.socket), [
            list_stats(stats('app', 5, 9)), list_stats(stats('app', 6, 0))])
        self.assertTrue(first.HasField('cpu_metrics'))
        self.assertFalse(second.HasField('cpu_metrics'))

    def test_samples_survive_a_cycle_without_statistics(self) -> None:
        third = self.cycles(FakeRuntime(self, self.socket), [
            list_stats(stats('app', 10**9, 0)), grpc.StatusCode.UNKNOWN, list_stats(stats('app', 3 * 10**9, 10))])[-1]
        self.assertEqual(third.cpu_metrics.usage_nano_cores.value, 5)

    def test_nonsense_numbers_cost_no_more_than_themselves(self) -> None:
        """Largest and smallest of every type; the rate between these two samples does not fit into 64 bits."""
        most, least = 2**63 - 1, -2**63
        self.assertEqual(len(self.cycles(FakeRuntime(
            self, self.socket,
            ListPodSandbox=cri.ListPodSandboxResponse(items=[cri.PodSandbox(id='pod', created_at=least)]),
            ListContainers=cri.ListContainersResponse(containers=[
                cri.Container(id='app', pod_sandbox_id='pod', created_at=most, state=2**31 - 1)])), [
            list_stats(stats('app', 1, 0)), list_stats(stats('app', 2, 2**64 - 1)), list_stats(stats('app', least, 0)),
            list_stats(stats('app', most, 2**64 - 1)), list_stats(stats('', 0, 0), stats('app', 0, 0))])), 5)

    def test_statistics_that_fail_once_are_asked_for_again_at_once(self) -> None:
        runtime = FakeRuntime(self, self.socket, ListContainerStats=[grpc.StatusCode.NOT_FOUND, list_stats(stats('app', 1, 2))])
        part = self.first_cycle()
        self.assertTrue(part.message[0].container_metrics[0].HasField('cpu_metrics'))
        self.assertEqual((part.failures, runtime.asked.count('ListContainerStats')), ({}, 2))

    def test_statistics_that_always_fail_leave_the_lists(self) -> None:
        for answer in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED, b'\xff\xff garbage'):
            with self.subTest(answer=answer):
                path = f'{self.directory}/run/{len(str(answer))}.sock'
                runtime = FakeRuntime(self, path, ListContainerStats=answer)
                part = self.first_cycle(socket_path=path)
                for _ in range(2):
                    part = self.cycle(part.after, socket_path=path)
                metrics = part.message[0].container_metrics[0]
                self.assertEqual((metrics.id, metrics.state), ('app', 'CONTAINER_RUNNING'))
                self.assertFalse(metrics.HasField('cpu_metrics'))
                self.assertIn('ListContainerStats', part.failures['container statistics'])
                self.assertEqual((runtime.asked.count('Version'), runtime.asked.count('ListContainerStats')), (1, 6))

    def test_statistics_that_hang_leave_the_lists_and_have_one_call_under_way(self) -> None:
        runtime = FakeRuntime(self, self.socket)
        runtime.hanging.add('ListContainerStats')
        part = self.first_cycle(seconds=0.3)
        for _ in range(4):
            self.assertEqual([pod.container_metrics[0].id for pod in part.message], ['app'])
            self.assertIn('container statistics', part.failures)
            part = self.cycle(part.after, seconds=0.1)
        self.assertEqual((runtime.asked.count('ListContainerStats'), runtime.asked.count('Version')), (1, 1))
        runtime.release()
        part = self.cycle(part.after)
        self.assertEqual(part.message[0].container_metrics[0].cpu_metrics.usage_core_nano_seconds.value, 500)
        self.assertEqual((part.failures, runtime.most_stats_under_way), ({}, 1))

    def test_statistics_that_hang_for_long_are_asked_for_anew_but_never_twice_at_a_time(self) -> None:
        runtime = FakeRuntime(self, self.socket)
        runtime.hanging.add('ListContainerStats')
        with mock.patch.object(agent, 'STATS_TIMEOUT_SECONDS', 0.15):
            part = self.first_cycle(seconds=0.3)
            for _ in range(5):
                part = self.cycle(part.after, seconds=0.1)
                self.assertEqual(len(part.message), 1)
        self.assertGreater(runtime.asked.count('ListContainerStats'), 1)
        self.assertEqual(runtime.most_stats_under_way, 1)

    def test_the_pause_after_repeated_timeouts_grows_and_the_lists_go_on(self) -> None:
        runtime = FakeRuntime(self, self.socket)
        runtime.hanging.add('ListContainerStats')
        pauses = [agent.after_timeout(timeouts).not_before - time.monotonic() for timeouts in (1, 2, 3, 4, 50)]
        for pause, expected in zip(pauses, (0, 10, 20, 40, 300)):
            self.assertAlmostEqual(pause, expected, delta=1)
        part = self.first_cycle(seconds=0.1)
        with mock.patch.object(agent, 'STATS_TIMEOUT_SECONDS', 0.15):
            part = self.cycle(agent.forget_runtime(part.after), seconds=1)
            self.assertEqual(part.after.stats.timeouts, 1)
            part = self.cycle(part.after, seconds=1)
        self.assertEqual(part.after.stats.timeouts, 2)
        part = self.cycle(part.after._replace(stats=part.after.stats._replace(not_before=time.monotonic() + 100)))
        asked = runtime.asked.count('ListContainerStats')
        for _ in range(3):
            part = self.cycle(part.after)
            self.assertEqual((len(part.message), part.failures), (
                1, {'container statistics': 'ListContainerStats: paused after 2 time-outs'}))
        self.assertEqual(runtime.asked.count('ListContainerStats'), asked)
        runtime.release()
        part = self.cycle(part.after._replace(stats=part.after.stats._replace(not_before=time.monotonic())))
        self.assertEqual((part.failures, part.after.stats), ({}, agent.StatsMemory()))

    def test_a_step_of_the_wall_clock_does_not_lengthen_the_wait_for_statistics(self) -> None:
        runtime, clock = FakeRuntime(self, self.socket), time.time
        runtime.hanging.add('ListContainerStats')
        start = time.monotonic()
        stepped = threading.Timer(0.1, lambda: setattr(time, 'time', lambda: clock() - 86400))
        with mock.patch.object(time, 'time', clock):
            stepped.start()
            part = self.first_cycle(seconds=0.3)
            took = time.monotonic() - start
            stepped.join()
        self.assertIn('container statistics', part.failures)
        self.assertLess(took, 1)

    def test_an_answer_of_64_mib_is_accepted_and_a_larger_one_is_a_failure(self) -> None:
        """The first 62 of them are an unknown field, which costs the parser nothing."""
        runtime = FakeRuntime(self, self.socket)
        usual = runtime.answers['ListContainers'].SerializeToString()
        for size, containers in ((62 << 20, 1), (64 << 20, 0)):
            with self.subTest(size=size):
                runtime.answers['ListContainers'] = usual + b'\xfa\x3f' + varint(size) + bytes(size)
                part = self.first_cycle(seconds=PATIENCE_SECONDS)
                self.assertEqual(sum(len(pod.container_metrics) for pod in part.message), containers)
        self.assertIn('ListContainers: RESOURCE_EXHAUSTED', part.failures['container runtime'])

    def test_answers_above_four_mebibytes_are_accepted(self) -> None:
        names = [f'{number:04}-{"x" * 60_000}' for number in range(100)]
        FakeRuntime(self, self.socket, ListContainers=cri.ListContainersResponse(
            containers=[container(name, 'pod') for name in names]),
            ListContainerStats=list_stats(*(stats(name, 1, 2) for name in names)))
        part = self.first_cycle()
        self.assertEqual([metrics.id for metrics in part.message[0].container_metrics], names)
        self.assertTrue(all(metrics.HasField('cpu_metrics') for metrics in part.message[0].container_metrics))

    def test_lists_are_parsed_only_where_they_have_changed(self) -> None:
        runtime, part = FakeRuntime(self, self.socket), self.first_cycle()
        for state, parsed in ((cri.CONTAINER_RUNNING, 0), (cri.CONTAINER_EXITED, 1)):
            runtime.answers['ListContainers'] = cri.ListContainersResponse(containers=[container('app', 'pod', state)])
            with mock.patch.object(agent, 'build_listed_container', wraps=agent.build_listed_container) as build:
                part = self.cycle(part.after)
            self.assertEqual(parsed, build.call_count)
        self.assertEqual('CONTAINER_EXITED', part.message[0].container_metrics[0].state)
        self.assertEqual(1, len(part.after.containers))

    def test_garbage_in_one_part_of_the_statistics_costs_that_part(self) -> None:
        whole = stats('app', 1, 2, memory=cri.MemoryUsage(usage_bytes=value(3)), swap=cri.SwapUsage(swap_usage_bytes=value(4)))
        odd = cri.SerializedStats.FromString(whole.SerializeToString())
        odd.memory, odd.writable_layer = b'\x12\x7f', b'\xff'
        runtime = FakeRuntime(self, self.socket, ListContainerStats=cri.SerializedStatsList(stats=[odd]))
        found = self.first_cycle().message[0].container_metrics[0]
        self.assertEqual((2, False, 4, False), (
            found.cpu_metrics.usage_core_nano_seconds.value, found.HasField('memory_metrics'), found.swap_metrics.usage_bytes.value,
            found.HasField('file_system_metrics')))
        self.assertEqual(1, runtime.asked.count('ListContainerStats'))

    def test_what_a_later_runtime_says_of_memory_does_not_get_into_the_relays_contract(self) -> None:
        """containerd 2.3 has the pressure there, as field 8."""
        entry = cri.SerializedStats.FromString(stats('app', 1, 2).SerializeToString())
        entry.memory = wire.MemoryMetrics(usage_bytes={'value': 3}).SerializeToString() + b'\x42\x02\x0a\x00'
        FakeRuntime(self, self.socket, ListContainerStats=cri.SerializedStatsList(stats=[entry]))
        memory = self.first_cycle().message[0].container_metrics[0].memory_metrics
        self.assertEqual(wire.MemoryMetrics(usage_bytes={'value': 3}).SerializeToString(), memory.SerializeToString())

    def test_garbage_and_errors_in_the_lists_are_failures_that_pass(self) -> None:
        for number, (method, answer) in enumerate((method, answer) for method in ('ListPodSandbox', 'ListContainers')
                                                  for answer in (b'\xff\xff', b'\x0a\x7f', b'\x0a\x01\xff', grpc.StatusCode.INTERNAL)):
            with self.subTest(method=method, answer=answer):
                path = f'{self.directory}/run/{number}.sock'
                runtime = FakeRuntime(self, path)
                usual, runtime.answers[method] = runtime.answers[method], answer
                part = self.first_cycle(socket_path=path)
                self.assertEqual(part.message, [])
                self.assertIn(method, part.failures['container runtime'])
                runtime.answers[method] = usual
                part = self.cycle(part.after, socket_path=path)
                self.assertEqual((len(part.message), part.failures), (1, {}))

    def test_a_runtime_restarted_under_the_same_path_is_found_again(self) -> None:
        before = FakeRuntime(self, self.socket)
        part = self.first_cycle()
        before.close()
        gone = self.cycle(part.after)
        self.assertEqual((gone.message, list(gone.failures)), ([], ['container runtime']))
        FakeRuntime(self, self.socket, (V1ALPHA2,), ListContainerStats=list_stats(stats('app', 2 * 10**9, 507)))
        back = self.cycle(gone.after)
        self.assertEqual((back.failures, back.message[0].container_metrics[0].cpu_metrics.usage_nano_cores.value), ({}, 7))

    def test_a_runtime_replaced_between_two_cycles_is_not_missed_for_one(self) -> None:
        before = FakeRuntime(self, self.socket)
        part = self.first_cycle()
        os.rename(self.socket, f'{self.socket}.old')
        after = FakeRuntime(self, self.socket)
        self.assertEqual(len(self.cycle(part.after).message), 1)
        self.assertEqual((before.asked.count('ListPodSandbox'), after.asked.count('ListPodSandbox')), (1, 1))


# --- snapshot

class SnapshotTest(ServerTest):
    def setUp(self) -> None:
        super().setUp()
        self.thread = concurrent.futures.ThreadPoolExecutor(1)
        self.addCleanup(self.thread.shutdown)
        self.tree = self.roots({'proc/sys/kernel/hostname': 'node\n'})
        self.run_state = agent.Run()

    def snapshot(self, memory: agent.Memory, seconds: float = 0.5, backlog: Optional[agent.Backlog] = None) -> agent.Part:
        options = argparse.Namespace(main_loop_duration=seconds, top_n=1, cri_socket=self.socket, container_stats='cri',
                                     fs_stats_interval=60)
        part = agent.collect_snapshot(self.tree, options, memory, self.thread, self.run_state, backlog)
        if part.after.pods.runtime:
            self.addCleanup(part.after.pods.runtime.channel.close)
        return part._replace(message=wire.Metrics.FromString(part.message))

    def test_a_snapshot_has_the_node_the_pods_and_the_start_of_its_collection(self) -> None:
        FakeRuntime(self, self.socket)
        before = int(time.time())
        metrics = self.snapshot(agent.Memory(), 10).message
        self.assertTrue(before <= metrics.timestamp <= time.time())
        self.assertEqual((metrics.node_metrics.hostname, [pod.id for pod in metrics.pod_metrics]), ('node', ['pod']))

    def test_a_hung_runtime_delays_the_node_no_longer_than_its_share_and_comes_back(self) -> None:
        for method in agent.CRI_ANSWERS:
            with self.subTest(method):
                self.socket = f'{self.directory}/run/{method}.sock'
                runtime = FakeRuntime(self, self.socket)
                runtime.hanging.add(method)
                start = time.monotonic()
                part = self.snapshot(agent.Memory())
                # Up to three calls may get the shortest time-out each, after the 0.4 s.
                self.assertLess(time.monotonic() - start, 0.5 + 0.3)
                self.assertEqual(part.message.node_metrics.hostname, 'node')
                self.assertTrue(part.failures)
                runtime.release()
                part = self.snapshot(part.after, 5)
                self.assertTrue(part.message.pod_metrics[0].container_metrics[0].HasField('cpu_metrics'))
                self.assertEqual({subject for subject in part.failures if 'container' in subject}, set())

    def test_a_runtime_that_does_not_even_accept_delays_the_node_no_longer_than_its_share(self) -> None:
        os.makedirs(f'{self.directory}/run')
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
            listener.bind(self.socket)
            listener.listen()
            start = time.monotonic()
            part = self.snapshot(agent.Memory())
            self.assertLess(time.monotonic() - start, 0.5 + 0.3)
        self.assertEqual((part.message.node_metrics.hostname, len(part.message.pod_metrics)), ('node', 0))
        os.unlink(self.socket)
        FakeRuntime(self, self.socket)
        self.assertEqual(len(self.snapshot(part.after, 5).message.pod_metrics), 1)

    def test_a_hung_runtime_is_asked_on_one_connection(self) -> None:
        runtime = FakeRuntime(self, self.socket)
        part = self.snapshot(agent.Memory(), 5)
        runtime.hanging.add('ListPodSandbox')
        for _ in range(3):
            part = self.snapshot(part.after, 0.2)
        runtime.release()
        self.assertEqual(len(self.snapshot(part.after, 5).message.pod_metrics), 1)
        self.assertEqual(runtime.asked.count('Version'), 1)

    def test_the_agent_tells_of_itself(self) -> None:
        FakeRuntime(self, self.socket)
        self.roots({'proc/meminfo': 'MemTotal'})
        first = self.snapshot(agent.Memory(), 5)
        backlog = agent.Backlog(600)
        agent.add_snapshot(backlog, b'12345')
        backlog.dropped['size'], backlog.connections, backlog.sent, backlog.acknowledged = 3, 5, 6, 7
        backlog.last_acknowledged = time.monotonic() - 60
        before = time.time_ns()
        second = self.snapshot(first.after, 5, backlog).message.agent_metrics
        self.assertTrue(before <= second.timestamp_ns <= time.time_ns())
        one = first.message.agent_metrics
        self.assertRegex(one.run_id, '^[0-9a-f]{16}$')
        self.assertEqual(((one.sequence, second.sequence), one.run_id), ((1, 2), second.run_id))
        self.assertNotEqual(agent.Run().run_id, one.run_id)
        self.assertEqual((one.cycles_total, one.HasField('collection_seconds'), one.HasField('backlog')), (0, False, False))
        self.assertEqual((second.version, second.cycles_total, second.skipped_ticks_total, dict(second.failures_total)), (
            agent.__version__, 1, 0, {'memory': 1}))
        self.assertTrue(0 < second.collection_seconds < 5 and 0 < second.uptime_seconds < 60)
        self.assertAlmostEqual(second.cpu_seconds_total, time.process_time(), delta=5)
        self.assertAlmostEqual(second.threads, len(os.listdir('/proc/self/task')), delta=3)
        self.assertAlmostEqual(second.open_files, len(os.listdir('/proc/self/fd')), delta=3)
        self.assertTrue(1 << 20 < second.resident_bytes < 1 << 30)
        calls = {call.method: call for call in second.cri_methods}
        self.assertEqual({method: (call.calls_total, call.failures_total) for method, call in calls.items()}, {
            'Version': (1, 0), 'ListPodSandbox': (2, 0), 'ListContainers': (2, 0), 'ListContainerStats': (2, 0),
            'ContainerStatus': (1, 0), 'Status': (1, 0), 'ImageFsInfo': (1, 0)})
        self.assertTrue(all(0 < call.last_seconds <= call.seconds_total for call in calls.values()))
        queue = second.backlog
        self.assertEqual((queue.snapshots, queue.memory_bytes, queue.spool_bytes, queue.sent_total, queue.acknowledged_total,
                          dict(queue.dropped_total), queue.reconnects_total), (1, 5, 0, 6, 7, {'size': 3}, 4))
        self.assertAlmostEqual(queue.seconds_since_acknowledgement, 60, delta=5)

    def test_open_files_are_listed_once_a_minute_where_the_kernel_does_not_count_them(self) -> None:
        """/proc/self/fd has a size since Linux 6.2."""
        run, listing = agent.Run(), mock.Mock(return_value=['0', '1', '2'])
        with mock.patch.object(agent.os, 'stat', return_value=types.SimpleNamespace(st_size=0)), \
                mock.patch.object(agent, 'read_names', listing):
            self.assertEqual([3, 3, 3], [agent.count_open_files(run, now) for now in (100, 159, 160)])
        self.assertEqual(2, listing.call_count)
        with mock.patch.object(agent.os, 'stat', return_value=types.SimpleNamespace(st_size=7)):
            self.assertEqual(7, agent.count_open_files(run, 161))

    def test_no_field_is_on_the_wire_twice(self) -> None:
        """Whoever parses it would not notice; parts that are put together might."""
        self.roots({path: text for path, text in OOM_FILES.items()})
        pod, names = sandbox('oom-0'), list(OOM_STATS)
        pod.metadata.uid = UID
        layer = cri.FilesystemUsage(timestamp=31, fs_id=cri.FilesystemIdentifier(mountpoint='/x'), used_bytes=value(33))
        FakeRuntime(self, self.socket, ListPodSandbox=cri.ListPodSandboxResponse(items=[pod]), ListContainers=cri.ListContainersResponse(
            containers=[container(name, 'oom-0') for name in names]), ListContainerStats=list_stats(*(
                stats(name, 1, 2, memory=memory_stats(range(1, 7)), writable_layer=layer) for name in names)))
        for source in ('cgroup', 'cri'):
            options = argparse.Namespace(main_loop_duration=5, top_n=1, cri_socket=self.socket, container_stats=source, fs_stats_interval=1)
            part = agent.collect_snapshot(self.tree, options, agent.Memory(), self.thread, agent.Run())
            self.addCleanup(part.after.pods.runtime.channel.close)
            metrics = wire.Metrics.FromString(part.message)
            self.assertEqual(2, len(metrics.pod_metrics[0].container_metrics))
            self.assertTrue(metrics.pod_metrics[0].container_metrics[0].HasField('file_system_metrics'))
            self.assertEqual(len(metrics.SerializeToString()), len(part.message))

    def test_a_node_of_which_nothing_is_known_is_still_there(self) -> None:
        data = agent.serialize_metrics(1, wire.NodeMetrics(), None, [], wire.AgentMetrics())
        self.assertEqual(wire.Metrics(timestamp=1, node_metrics={}, agent_metrics={}), wire.Metrics.FromString(data))

    def test_calls_that_fail_are_counted(self) -> None:
        FakeRuntime(self, self.socket, ListContainerStats=grpc.StatusCode.UNKNOWN)
        part = self.snapshot(self.snapshot(agent.Memory(), 5).after, 5)
        call = next(call for call in part.message.agent_metrics.cri_methods if call.method == 'ListContainerStats')
        self.assertEqual((call.calls_total, call.failures_total), (4, 4))
        self.assertEqual(self.run_state.failures['container statistics'], 2)

    def test_clock_steps_change_nothing_but_the_timestamp(self) -> None:
        """A year back, then 30 years on: the snapshots come, the backlog keeps them, and their durations are real."""
        FakeRuntime(self, self.socket)
        part, backlog, clock = self.snapshot(agent.Memory(), 5), agent.Backlog(600), time.time
        for years in (-1, 30):
            shift = years * 365 * 86400
            # The agent's clock alone: grpc's would not agree with the one of its core.
            stepped = types.SimpleNamespace(**{**vars(time), 'time': lambda: clock() + shift,
                                               'time_ns': lambda: int((clock() + shift) * 1e9)})
            with mock.patch.object(agent, 'time', stepped):
                part = self.snapshot(part.after, 5, backlog)
                self.assertAlmostEqual(part.message.timestamp, clock() + shift, delta=5)
                self.assertEqual((len(part.message.pod_metrics), agent.add_snapshot(backlog, b'x')), (1, {}))
                self.assertEqual({subject for subject in part.failures if 'container' in subject}, set())
            self.assertTrue(0 < self.run_state.collection_seconds < 5)
            self.assertTrue(0 < part.message.agent_metrics.uptime_seconds < 60)
        self.assertEqual((len(backlog.snapshots), backlog.dropped), (2, {}))

    def test_a_trouble_is_logged_when_it_begins_and_when_it_ends(self) -> None:
        with self.assertLogs('kubensage-agent') as logged:
            for before, now in (({}, {'cpu': 'x'}), ({'cpu': 'x'}, {'cpu': 'y'}), ({'cpu': 'y'}, {})):
                agent.log_changes(before, now)
        self.assertEqual([(record.levelname, record.getMessage()) for record in logged.records],
                         [('WARNING', 'cpu: x'), ('INFO', 'cpu: well again')])


# --- spool

class SpoolTest(ServerTest):
    def setUp(self) -> None:
        super().setUp()
        self.spool = f'{self.directory}/spool'

    def open(self, directory: Optional[str] = None, **settings: Any) -> agent.Backlog:
        """The backlog of an agent that has just been started; `end` is its SIGKILL."""
        directory = directory or self.spool
        self.lock = agent.open_spool(directory)
        self.addCleanup(self.end, self.lock)
        backlog = agent.Backlog(settings.pop('retention_seconds', 600), spool=directory, **settings)
        agent.load_spool(backlog)
        return backlog

    def end(self, lock: Optional[int] = None) -> None:
        with contextlib.suppress(OSError):
            os.close(self.lock if lock is None else lock)

    def add(self, backlog: agent.Backlog, *texts: bytes) -> None:
        for text in texts:
            self.assertEqual(agent.add_snapshot(backlog, text), {})

    def waiting(self, backlog: agent.Backlog) -> List[bytes]:
        return [agent.load_snapshot(backlog, snapshot) for snapshot in list(backlog.snapshots)]

    def damage(self, number: int, change: Callable[[bytes], bytes]) -> None:
        path = agent.record_path(self.spool, number)
        with open(path, 'rb') as file:
            data = change(file.read())
        with open(path, 'wb') as file:
            file.write(data)

    def test_what_was_not_acknowledged_is_there_after_a_restart_in_order_and_once(self) -> None:
        backlog, texts = self.open(), [b'%d' % number * number for number in range(1, 21)]
        self.add(backlog, *texts[:12])
        agent.forget_snapshots(backlog, list(backlog.snapshots)[:5])
        self.end()
        backlog = self.open()
        self.assertEqual(self.waiting(backlog), texts[5:12])
        self.add(backlog, *texts[12:])
        self.end()
        backlog = self.open()
        self.assertEqual((self.waiting(backlog), backlog.dropped, backlog.memory_bytes), (texts[5:], {}, 0))
        agent.forget_snapshots(backlog, list(backlog.snapshots))
        self.assertEqual((os.listdir(self.spool), backlog.spool_bytes), ([], 0))

    def test_damaged_records_are_skipped_and_counted_and_the_rest_is_used(self) -> None:
        self.add(self.open(), *(b'%d' % number * 100 for number in range(7)))
        self.end()
        self.damage(1, lambda data: data[:-50])
        self.damage(2, lambda data: data[:20])
        self.damage(3, lambda data: b'')
        self.damage(4, lambda data: data[:-10] + b'?' + data[-9:])
        self.damage(5, lambda data: data[:20] + b'?' + data[21:])
        os.unlink(agent.record_path(self.spool, 6))
        os.mkdir(agent.record_path(self.spool, 6))
        with self.assertLogs('kubensage-agent', 'WARNING') as logged:
            backlog = self.open()
        self.assertEqual((self.waiting(backlog), backlog.dropped), ([b'6' * 100], {'damaged': 6}))
        self.assertEqual(len(logged.output), 1)
        self.assertIn('0000000000000001.snapshot: record: torn: ', logged.output[0])

    def test_a_record_spoiled_while_it_waits_is_dropped_and_counted_once(self) -> None:
        backlog = self.open()
        self.add(backlog, b'1' * 100, b'2' * 100, b'3' * 100)
        self.damage(1, lambda data: data[:-1])
        os.unlink(agent.record_path(self.spool, 3))
        with self.assertLogs('kubensage-agent', 'WARNING') as logged:
            self.assertEqual(self.waiting(backlog), [None, b'2' * 100, None])
        self.assertEqual((self.waiting(backlog), backlog.dropped, len(logged.output)), ([b'2' * 100], {'damaged': 2}, 2))
        self.assertEqual(backlog.spool_bytes, agent.BLOCK_BYTES)

    def test_foreign_files_stay_and_are_not_read(self) -> None:
        names = ['note.txt', '1.snapshot', '00000000000000\u0661\u0661.snapshot', '0000000000000009.snapshot~']
        os.mkdir(self.spool)
        for name in names:
            with open(f'{self.spool}/{name}', 'w', encoding='utf-8') as file:
                file.write('mine')
        backlog = self.open()
        self.add(backlog, b'x')
        agent.forget_snapshots(backlog, list(backlog.snapshots))
        self.assertEqual(sorted(os.listdir(self.spool)), sorted(names))

    def test_age_is_of_the_monotonic_clock_and_of_the_wall_clock_after_another_boot(self) -> None:
        header = agent.Record(b'KSR1', 0, 0, monotonic=1000, wall=5000, boot_id=b'this')
        for boot_id, monotonic, wall, age in ((b'this', 1060, 9e9, 60), (b'this', 1060, 0, 60), (b'other', 7, 5090, 90),
                                              (b'other', 7, 0, 0), (b'this', 900, 5000, 0)):
            with self.subTest(boot_id=boot_id, wall=wall):
                self.assertEqual(agent.record_age(header, boot_id, monotonic, wall), age)

    def test_records_of_another_boot_wait_as_long_as_the_wall_clock_says(self) -> None:
        os.mkdir(self.spool)
        for number, age in ((1, 700), (2, 500)):
            header = agent.Record(b'KSR1', 3, 3, 10**9, time.time() - age, b'another'.ljust(36))
            agent.write_record(self.spool, number, header, b'%3d' % age)
        backlog = self.open(retention_seconds=600)
        self.assertEqual(list(agent.drop_excess(backlog, time.monotonic())), ['backlog'])
        self.assertEqual((self.waiting(backlog), backlog.dropped), ([b'500'], {'retention': 1}))
        self.assertEqual(os.listdir(self.spool), [agent.record_name(2)])

    def test_bytes_on_disk_are_bounded_and_the_oldest_go(self) -> None:
        backlog, data = self.open(spool_max_bytes=5 * agent.BLOCK_BYTES), random.Random(1)
        texts = [bytes([number]) + data.getrandbits(8 * 4000).to_bytes(4000, 'big') for number in range(12)]
        failures = [agent.add_snapshot(backlog, text) for text in texts]
        self.assertEqual(failures[:5] + [list(failure) for failure in failures[5:]], [{}] * 5 + [['backlog size']] * 7)
        self.assertEqual((self.waiting(backlog), backlog.dropped), (texts[7:], {'size': 7}))
        self.assertEqual(sum(os.stat(f'{self.spool}/{name}').st_blocks for name in os.listdir(self.spool)) * 512,
                         backlog.spool_bytes)

    def test_what_waits_in_the_spool_takes_no_memory(self) -> None:
        backlog = self.open()
        self.add(backlog, *(b'%d' % number * 1000 for number in range(20)))
        self.assertEqual((backlog.memory_bytes, backlog.reference, {snapshot.stored for snapshot in backlog.snapshots}),
                         (0, None, {None}))

    @unittest.skipUnless(os.geteuid() == 0, 'a full file system is one that is mounted for the test')
    def test_a_full_disk_falls_back_to_memory_with_one_warning_and_recovers(self) -> None:
        os.mkdir(f'{self.directory}/disk')
        subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'full', f'{self.directory}/disk'], check=True)
        self.addCleanup(subprocess.run, ['umount', f'{self.directory}/disk'], check=True)
        backlog, chance = self.open(f'{self.directory}/disk/spool'), random.Random(1)
        texts = [chance.getrandbits(8 * 12_000).to_bytes(12_000, 'big') for _ in range(12)]
        troubles: Dict[str, str] = {}
        with self.assertLogs('kubensage-agent') as logged:
            for number, text in enumerate(texts):
                if number == 9:
                    agent.forget_snapshots(backlog, list(backlog.snapshots)[:3])
                failures = agent.add_snapshot(backlog, text)
                agent.log_changes(troubles, failures)
                troubles = failures
        self.assertEqual([record.levelname for record in logged.records], ['WARNING', 'INFO'])
        self.assertRegex(logged.output[0], 'spool: .*/disk/spool cannot be written .No space left on device.: keeping')
        self.assertEqual(self.waiting(backlog), texts[3:])
        self.assertTrue(backlog.memory_bytes and backlog.spool_bytes)
        self.assertEqual(backlog.snapshots[-1].stored, None)
        self.end()

    def test_memory_that_is_full_does_not_cost_what_is_in_the_spool(self) -> None:
        backlog = self.open(max_bytes=2500)
        self.add(backlog, b'1', b'2')
        with mock.patch.object(agent, 'write_record', mock.Mock(side_effect=OSError(errno.EIO, 'bad'))):
            chance = random.Random(1)
            texts = [chance.getrandbits(8 * 1000).to_bytes(1000, 'big') for _ in range(5)]
            for text in texts:
                self.assertIn('spool', agent.add_snapshot(backlog, text))
        self.assertEqual((self.waiting(backlog), backlog.dropped), ([b'1', b'2', *texts[3:]], {'size': 3}))

    def test_directory_is_this_users_alone(self) -> None:
        os.mkdir(self.spool, 0o755)
        self.add(self.open(), b'x')
        self.assertEqual(stat.S_IMODE(os.stat(self.spool).st_mode), 0o700)
        self.assertEqual(stat.S_IMODE(os.stat(agent.record_path(self.spool, 1)).st_mode), 0o600)

    def refusal(self, directory: str) -> str:
        """The one line in which a spool is refused; the backlog is then in memory."""
        options = agent.parse_options(['--spool-dir', directory], {})
        with self.assertLogs('kubensage-agent') as logged, mock.patch.object(agent, 'SPOOL_PATIENCE_SECONDS', 0):
            self.assertIsNone(agent.backlog_from(options).spool)
        self.assertEqual(len(logged.output), 1)
        self.assertIn('keeping snapshots in memory', logged.output[0])
        return logged.output[0]

    def test_a_directory_that_others_could_exchange_is_refused(self) -> None:
        for name in ('mine', 'open', 'theirs'):
            os.mkdir(f'{self.directory}/{name}')
        os.symlink(f'{self.directory}/mine', f'{self.directory}/link')
        os.chmod(f'{self.directory}/open', 0o777)
        self.assertIn('/link is a symbolic link', self.refusal(f'{self.directory}/link'))
        self.assertIn('/link is a symbolic link', self.refusal(f'{self.directory}/link/below'))
        self.assertIn('/open is writable by others', self.refusal(f'{self.directory}/open/below'))
        self.assertIn('Not a directory', self.refusal(f'{self.roots({"file": ""}).rootfs}/file/below'))
        if os.geteuid() == 0:
            os.chown(f'{self.directory}/theirs', 12345, 0)
            self.assertIn('/theirs belongs to user 12345', self.refusal(f'{self.directory}/theirs'))

    def test_two_agents_do_not_share_a_spool(self) -> None:
        self.open()
        self.assertIn('/spool is in use by another agent', self.refusal(self.spool))
        self.end()
        self.open()


# --- backlog in memory

class MemoryBacklogTest(unittest.TestCase):
    def snapshots(self, count: int) -> List[bytes]:
        """Of a node of 100 containers: random ids that stay, among counters that grow."""
        chance = random.Random(1)
        ids = [f'{chance.getrandbits(256):064x}' for _ in range(100)]
        return [wire.Metrics(timestamp=number, pod_metrics=[wire.PodMetrics(id='pod', container_metrics=[
            wire.ContainerMetrics(id=name, name='app', image=f'registry/{name[:20]}', created_at=int(name[:15], 16),
                                  memory_metrics=wire.MemoryMetrics(timestamp=number * 10**9 + chance.getrandbits(27)))
            for name in ids[number % 3:]])]).SerializeToString() for number in range(count)]

    def test_what_is_compressed_is_given_back_as_it_was(self) -> None:
        chance = random.Random(2)
        base = chance.getrandbits(8 * 100_000).to_bytes(100_000, 'big')
        texts = self.snapshots(100) + [b''] + [base[chance.randrange(5):chance.choice((3, 16_384, 16_385, 90_000))]
                                               for _ in range(99)]
        backlog = agent.Backlog(600)
        for text in texts:
            self.assertEqual(agent.add_snapshot(backlog, text), {})
        while len(backlog.snapshots) > 1:
            loaded = [agent.load_snapshot(backlog, snapshot) for snapshot in backlog.snapshots]
            self.assertEqual(loaded, texts[-len(loaded):])
            agent.forget_snapshots(backlog, list(backlog.snapshots)[:19])

    def test_what_does_not_get_shorter_is_stored_as_it_is(self) -> None:
        """Of these, one has exactly as many bytes as zlib makes of it."""
        texts = [b'first', *(random.Random(1).getrandbits(8 * 60).to_bytes(60, 'big') + bytes(zeros) for zeros in range(5, 60))]
        self.assertIn(0, [len(text) - len(zlib.compress(text, agent.COMPRESSION_LEVEL)) for text in texts])
        for text in texts:
            backlog = agent.Backlog(600)
            agent.add_snapshot(backlog, b'another')
            agent.add_snapshot(backlog, text)
            self.assertEqual(agent.load_snapshot(backlog, backlog.snapshots[1]), text)
            self.assertLessEqual(backlog.snapshots[1].stored_bytes, len(text))

    def test_what_is_the_same_in_each_snapshot_is_stored_once_in_a_while(self) -> None:
        backlog, texts = agent.Backlog(600), self.snapshots(96)
        for text in texts:
            agent.add_snapshot(backlog, text)
        self.assertLess(backlog.memory_bytes, sum(map(len, texts)) / 9)
        self.assertEqual(backlog.memory_bytes, sum(len(snapshot.stored) for snapshot in backlog.snapshots))
        self.assertLess(backlog.memory_bytes, sum(len(zlib.compress(text)) for text in texts) / 3)

    def test_bytes_in_memory_are_bounded_and_the_oldest_go(self) -> None:
        backlog, texts = agent.Backlog(600, max_bytes=50_000), self.snapshots(80)
        failures = [agent.add_snapshot(backlog, text) for text in texts]
        self.assertEqual(failures[0], {})
        self.assertEqual(list(failures[-1]), ['backlog size'])
        self.assertLessEqual(backlog.memory_bytes, 50_000)
        kept = [agent.load_snapshot(backlog, snapshot) for snapshot in backlog.snapshots]
        self.assertGreater(len(kept), 10)
        self.assertEqual((kept, backlog.dropped), (texts[-len(kept):], {'size': 80 - len(kept)}))
        # Beside what is waiting, at most one reference is held for those that wait.
        held = {id(snapshot.reference): snapshot.reference for snapshot in backlog.snapshots if snapshot.reference}
        self.assertLessEqual(sum(reference not in backlog.snapshots for reference in held.values()), 1)

    def test_a_snapshot_larger_than_the_backlog_is_dropped_alone(self) -> None:
        backlog = agent.Backlog(600, max_bytes=100)
        self.assertEqual(list(agent.add_snapshot(backlog, os.urandom(1000))), ['backlog size'])
        self.assertEqual((agent.add_snapshot(backlog, b'x'), len(backlog.snapshots)), ({}, 1))

    def test_spoiled_bytes_are_an_error_and_not_a_wrong_snapshot(self) -> None:
        backlog = agent.Backlog(600)
        for text in self.snapshots(3):
            agent.add_snapshot(backlog, text)
        for snapshot in list(backlog.snapshots)[1:]:
            with self.assertRaises(ValueError):
                agent.plain(b'garbage', snapshot)


# --- backlog and relay

class RelayTest(ServerTest):
    def setUp(self) -> None:
        """A pause after a failure is announced in `pauses`, and very short."""
        super().setUp()
        self.pauses: queue.Queue[int] = queue.Queue()
        pause = mock.patch.object(agent, 'backoff_seconds', lambda failures: self.pauses.put(failures) or 0.01)
        pause.start()
        self.addCleanup(pause.stop)

    def backlog(self, *timestamps: int, retention_seconds: float = 600) -> agent.Backlog:
        backlog = agent.Backlog(retention_seconds)
        self.add(backlog, *timestamps)
        return backlog

    def add(self, backlog: agent.Backlog, *timestamps: int) -> None:
        for timestamp in timestamps:
            self.assertEqual(agent.add_snapshot(backlog, wire.Metrics(timestamp=timestamp).SerializeToString()), {})

    def deliver(self, backlog: agent.Backlog, address: str, **settings: Any) -> threading.Thread:
        sender = agent.start_delivery(backlog, agent.Relay(address, **settings))
        self.addCleanup(agent.close_backlog, backlog, sender, 0.1)
        return sender

    def drain(self, backlog: agent.Backlog, sender: threading.Thread) -> int:
        """Close the backlog; how much is left."""
        left = agent.close_backlog(backlog, sender, PATIENCE_SECONDS)
        self.assertFalse(sender.is_alive())
        return left


class DeliveryTest(RelayTest):
    def test_what_is_acknowledged_is_sent_once_and_in_order(self) -> None:
        relay, backlog = FakeRelay(self), self.backlog(1, 2, 3)
        sender = self.deliver(backlog, relay.address)
        self.assertEqual(relay.next_streams(1), [[1, 2, 3]])
        self.add(backlog, 4)
        self.assertEqual(relay.next_streams(1), [[4]])
        self.assertEqual(self.drain(backlog, sender), 0)
        self.assertTrue(relay.streams.empty())

    def test_a_relay_that_comes_up_late_gets_everything_in_order(self) -> None:
        with contextlib.closing(socket.socket()) as reserved:
            # Bound but not listening: connections are refused, and the server may bind it too.
            reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            reserved.bind(('127.0.0.1', 0))
            port = reserved.getsockname()[1]
            backlog = self.backlog(1, 2)
            self.deliver(backlog, f'127.0.0.1:{port}')
            self.pauses.get(timeout=PATIENCE_SECONDS)
            self.add(backlog, 3, 4)
            self.pauses.get(timeout=PATIENCE_SECONDS)
            relay = FakeRelay(self, port=port)
            self.assertEqual([metrics.timestamp for metrics in relay.next_arrived(4)], [1, 2, 3, 4])
            self.add(backlog, 5)
            self.assertEqual(relay.next_arrived(1)[0].timestamp, 5)

    def test_only_the_answer_acknowledges(self) -> None:
        """Whatever else ends a stream, all of its batch is sent again, oldest first, what is new behind it."""
        for behaviour, arrived in ((cut_after_two, [1, 2]), (refuse, []), (fail_at_the_end, [1, 2, 3]),
                                   (end_without_answer, [1, 2, 3])):
            with self.subTest(behaviour.__name__):
                relay, backlog = FakeRelay(self, behaviour, behaviour), self.backlog(1, 2, 3)
                sender = self.deliver(backlog, relay.address)
                self.assertEqual(relay.next_streams(3), [arrived, arrived, [1, 2, 3]])
                self.assertEqual((self.drain(backlog, sender), backlog.dropped), (0, {}))

    def test_an_answer_before_the_end_of_the_stream_acknowledges_nothing(self) -> None:
        """Of snapshots so large that the relay's window holds but one."""
        relay, backlog = FakeRelay(self, answer_early), agent.Backlog(600)
        for number in range(1, 4):
            pod = wire.PodMetrics(id=f'{number}' * (2 << 20))
            agent.add_snapshot(backlog, wire.Metrics(timestamp=number, pod_metrics=[pod]).SerializeToString())
        with mock.patch.object(agent, 'MAX_STREAM_BYTES', 1 << 30):
            sender = self.deliver(backlog, relay.address)
            self.assertEqual(relay.next_streams(2), [[1], [1, 2, 3]])
            self.assertEqual(self.drain(backlog, sender), 0)
        self.assertEqual((backlog.acknowledged, backlog.dropped), (3, {}))

    def test_a_relay_that_hangs_is_left_at_the_deadline_and_gets_less_at_once(self) -> None:
        relay, backlog = FakeRelay(self), self.backlog(*range(1, 121))
        relay.script.extend([relay.hold, relay.hold])
        with mock.patch.object(agent, 'SEND_TIMEOUT_SECONDS', 0.3):
            self.deliver(backlog, relay.address)
            streams = relay.next_streams(2)
        self.assertEqual([len(stream) for stream in streams], [50, 25])
        everything = sum(relay.next_streams(4), [])
        self.assertEqual(everything, list(range(1, 121)))

    def test_a_connection_to_a_relay_that_hangs_is_closed_and_made_anew(self) -> None:
        with contextlib.closing(socket.create_server(('127.0.0.1', 0))) as listener:
            with mock.patch.object(agent, 'SEND_TIMEOUT_SECONDS', 0.2):
                self.deliver(self.backlog(1), '{}:{}'.format(*listener.getsockname()))
                for _ in range(3):
                    wait_for_end(accept_silently(listener))

    def test_a_stream_has_at_most_fifty_snapshots(self) -> None:
        relay = FakeRelay(self)
        self.deliver(self.backlog(*range(120)), relay.address)
        self.assertEqual(relay.next_streams(3), [list(range(50)), list(range(50, 100)), list(range(100, 120))])

    def test_collection_does_not_wait_for_a_relay_that_answers_late(self) -> None:
        relay = FakeRelay(self)
        relay.script.append(relay.hold)
        backlog = self.backlog(1)
        sender = self.deliver(backlog, relay.address)
        relay.next_arrived(1)
        start = time.monotonic()
        self.add(backlog, *range(2, 1002))
        self.assertLess(time.monotonic() - start, 1)
        relay.release()
        self.assertEqual([metrics.timestamp for metrics in relay.next_arrived(1000)], list(range(2, 1002)))
        self.assertEqual(self.drain(backlog, sender), 0)

    def test_retention_drops_the_oldest_and_counts_them(self) -> None:
        backlog = self.backlog(1, 2, 3, retention_seconds=60)
        first, second, third = backlog.snapshots
        self.assertEqual(agent.drop_excess(backlog, first.taken + 60), {})
        self.assertEqual(list(agent.drop_excess(backlog, (second.taken + third.taken) / 2 + 60)), ['backlog'])
        self.assertEqual((list(backlog.snapshots), backlog.dropped), ([third], {'retention': 2}))

    def test_what_expires_under_way_does_not_take_its_successors_with_it(self) -> None:
        relay = FakeRelay(self)
        relay.script.append(relay.hold)
        backlog = self.backlog(1)
        sender = self.deliver(backlog, relay.address)
        relay.next_arrived(1)
        backlog.snapshots[0] = backlog.snapshots[0]._replace(taken=-math.inf)
        failures = agent.add_snapshot(backlog, wire.Metrics(timestamp=2).SerializeToString())
        self.assertEqual((list(failures), backlog.dropped), (['backlog'], {'retention': 1}))
        relay.release()
        self.assertEqual(relay.next_arrived(1)[0].timestamp, 2)
        self.assertEqual(self.drain(backlog, sender), 0)

    def test_a_snapshot_that_no_relay_accepts_is_dropped_with_one_line_and_blocks_nothing(self) -> None:
        relay, backlog = FakeRelay(self), self.backlog(1)
        troubles: Dict[str, str] = {}
        with self.assertLogs('kubensage-agent') as logged:
            for size in (agent.MAX_SNAPSHOT_BYTES + 1, agent.MAX_SNAPSHOT_BYTES + 2):
                failures = agent.add_snapshot(backlog, bytes(size))
                agent.log_changes(troubles, failures)
                troubles = failures
        self.assertEqual((len(logged.output), backlog.dropped), (1, {'too large': 2}))
        self.assertIn(str(agent.MAX_SNAPSHOT_BYTES + 1), logged.output[0])
        self.add(backlog, 2)
        self.deliver(backlog, relay.address)
        self.assertEqual(relay.next_streams(1), [[1, 2]])

    def test_the_largest_snapshot_is_accepted(self) -> None:
        relay, backlog = FakeRelay(self), self.backlog(1)
        # Each of the two nested fields has a tag of one byte and a length of four.
        largest = wire.Metrics(pod_metrics=[wire.PodMetrics(id='x' * (agent.MAX_SNAPSHOT_BYTES - 10))]).SerializeToString()
        self.assertEqual((len(largest), agent.add_snapshot(backlog, largest)), (agent.MAX_SNAPSHOT_BYTES, {}))
        self.deliver(backlog, relay.address)
        self.assertEqual(relay.next_streams(1), [[1, 0]])

    def test_what_a_relay_with_a_smaller_limit_refuses_is_dropped_alone(self) -> None:
        relay, backlog = FakeRelay(self, limit_bytes=1000), self.backlog(1, 2)
        for name_length in (2000, 3000):
            agent.add_snapshot(backlog, wire.Metrics(pod_metrics=[wire.PodMetrics(id='x' * name_length)]).SerializeToString())
            self.add(backlog, 3)
        with self.assertLogs('kubensage-agent', 'ERROR') as logged:
            sender = self.deliver(backlog, relay.address)
            self.assertEqual([relay.acknowledged.get(timeout=PATIENCE_SECONDS) for _ in range(4)], [1, 2, 3, 3])
            self.assertEqual(self.drain(backlog, sender), 0)
        self.assertEqual((len(logged.output), backlog.dropped), (2, {'too large': 2}))

    def test_other_shortages_of_the_relay_drop_nothing(self) -> None:
        def exhausted(messages: Iterator[wire.Metrics], context: grpc.ServicerContext) -> Iterator[bytes]:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, 'too many streams')
            yield b''

        relay, backlog = FakeRelay(self, exhausted, exhausted), self.backlog(1)
        self.deliver(backlog, relay.address)
        self.assertEqual(relay.next_streams(3), [[], [], [1]])
        self.assertEqual(backlog.dropped, {})

    def test_an_outage_is_logged_when_it_begins_and_when_it_ends(self) -> None:
        relay, backlog = FakeRelay(self, refuse, refuse, refuse), self.backlog(1)
        with self.assertLogs('kubensage-agent') as logged:
            sender = self.deliver(backlog, relay.address)
            relay.next_arrived(1)
            self.drain(backlog, sender)
        self.assertEqual([record.levelname for record in logged.records], ['WARNING', 'INFO'])
        self.assertIn('PERMISSION_DENIED: not you', logged.output[0])

    def test_failures_in_a_row_are_counted_anew_after_an_acknowledgement(self) -> None:
        relay, backlog = FakeRelay(self, refuse, refuse, acknowledge, refuse), self.backlog(1)
        self.deliver(backlog, relay.address)
        relay.next_arrived(1)
        self.add(backlog, 2)
        relay.next_arrived(1)
        self.assertEqual([self.pauses.get(timeout=PATIENCE_SECONDS) for _ in range(3)], [1, 2, 1])

    def test_closing_delivers_what_is_left(self) -> None:
        """Through as many streams as it takes, and from the middle of a pause."""
        relay = FakeRelay(self, refuse)
        with mock.patch.object(agent, 'backoff_seconds', lambda failures: self.pauses.put(failures) or 1000):
            backlog = self.backlog(*range(60))
            sender = self.deliver(backlog, relay.address)
            self.pauses.get(timeout=PATIENCE_SECONDS)
            self.assertEqual(self.drain(backlog, sender), 0)
        self.assertEqual([metrics.timestamp for metrics in relay.next_arrived(60)], list(range(60)))

    def test_closing_makes_one_attempt_that_may_fail(self) -> None:
        relay = FakeRelay(self, usual=refuse)
        with mock.patch.object(agent, 'backoff_seconds', lambda failures: self.pauses.put(failures) or 1000):
            backlog = self.backlog(1, 2)
            sender = self.deliver(backlog, relay.address)
            self.pauses.get(timeout=PATIENCE_SECONDS)
            self.assertEqual(self.drain(backlog, sender), 2)
        self.assertEqual(relay.next_streams(2), [[], []])
        self.assertTrue(relay.streams.empty())

    def test_closing_during_an_attempt_that_fails_makes_another(self) -> None:
        relay, backlog = FakeRelay(self), self.backlog(1)

        def fail_late(messages: Iterator[wire.Metrics], context: grpc.ServicerContext) -> Iterator[bytes]:
            backlog.closing.wait(PATIENCE_SECONDS)
            return refuse(messages, context)

        relay.script.append(fail_late)
        self.assertEqual(self.drain(backlog, self.deliver(backlog, relay.address)), 0)

    def test_closing_gives_up_on_a_relay_that_hangs(self) -> None:
        """Nothing is begun after that: the sending thread has ended."""
        relay, backlog = FakeRelay(self), self.backlog(1)
        relay.usual = relay.hold
        sender = self.deliver(backlog, relay.address)
        relay.next_arrived(1)
        self.assertEqual(agent.close_backlog(backlog, sender, 0.2), 1)
        self.assertFalse(sender.is_alive())

    def test_closing_an_empty_backlog_ends_the_sender(self) -> None:
        backlog = self.backlog()
        self.assertEqual(self.drain(backlog, self.deliver(backlog, '127.0.0.1:1')), 0)


class BackoffTest(unittest.TestCase):
    def test_pauses_grow_up_to_a_bound_with_full_jitter(self) -> None:
        for failures in (1, 2, 3, 5, 8, 100, 10**6):
            with self.subTest(failures=failures):
                longest = min(agent.BACKOFF_LONGEST_SECONDS, agent.BACKOFF_FIRST_SECONDS * 2 ** min(failures - 1, 20))
                pauses = [agent.backoff_seconds(failures) for _ in range(500)]
                self.assertTrue(0 <= min(pauses) < longest / 10)
                self.assertTrue(longest * 0.4 < max(pauses) <= longest)


# --- TLS

def openssl(directory: str, *arguments: str) -> None:
    subprocess.run(['openssl', *arguments], cwd=directory, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                   stderr=subprocess.DEVNULL)


def make_certificate(directory: str, name: str, issuer: str = '', names: str = '', days: int = 2) -> None:
    """NAME.pem and NAME.key; without an issuer, its own."""
    key = ('-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-keyout', f'{name}.key', '-subj', f'/CN={name}')
    if not issuer:
        return openssl(directory, 'req', '-x509', *key, '-days', str(days), '-out', f'{name}.pem')
    openssl(directory, 'req', '-new', *key, '-out', f'{name}.csr')
    with open(f'{directory}/{name}.ext', 'w', encoding='utf-8') as file:
        file.write(f'subjectAltName={names}\n' if names else '')
    return openssl(directory, 'x509', '-req', '-in', f'{name}.csr', '-CA', f'{issuer}.pem', '-CAkey', f'{issuer}.key',
                   '-set_serial', str(hash(name) % 10**9), '-days', str(days), '-extfile', f'{name}.ext', '-out', f'{name}.pem')


class TlsTest(RelayTest):
    @classmethod
    def setUpClass(cls) -> None:
        cls.certificates = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, cls.certificates)
        for name in ('ca', 'other-ca'):
            make_certificate(cls.certificates, name)
        for name, issuer, names, days in (
                ('relay', 'ca', 'IP:127.0.0.1,DNS:localhost', 2), ('named', 'ca', 'DNS:relay.example', 2),
                ('expired', 'ca', 'IP:127.0.0.1', -1), ('agent', 'ca', '', 2), ('agent-2', 'ca', '', 2),
                ('stranger', 'other-ca', '', 2), ('expired-agent', 'ca', '', -1)):
            make_certificate(cls.certificates, name, issuer, names, days)
        with open(f'{cls.certificates}/garbage', 'w', encoding='utf-8') as file:
            file.write('garbage')

    def path(self, name: str) -> str:
        return f'{self.certificates}/{name}'

    def read(self, name: str) -> bytes:
        with open(self.path(name), 'rb') as file:
            return file.read()

    def relay(self, name: str = 'relay', mutual: bool = False, **settings: Any) -> FakeRelay:
        """A relay with this certificate; it tells in `peers` who has spoken to it, and with which token."""
        credentials = grpc.ssl_server_credentials([(self.read(f'{name}.key'), self.read(f'{name}.pem'))],
                                                  self.read('ca.pem') if mutual else None, mutual)
        relay = FakeRelay(self, credentials=credentials, usual=self.note_and_acknowledge, **settings)
        return relay

    def note_and_acknowledge(self, messages: Iterator[wire.Metrics], context: grpc.ServicerContext) -> Iterator[bytes]:
        self.peers.put((context.auth_context().get('x509_common_name', [b''])[0].decode(),
                        dict(context.invocation_metadata()).get('authorization')))
        return acknowledge(messages, context)

    def setUp(self) -> None:
        super().setUp()
        self.peers: queue.Queue[Tuple[str, Optional[str]]] = queue.Queue()

    def copy(self, name: str, to: str) -> str:
        """A file of its own, put in place as a whole."""
        path = f'{self.directory}/{to}'
        shutil.copy(self.path(name), f'{path}.new')
        os.chmod(f'{path}.new', 0o600)
        os.rename(f'{path}.new', path)
        return path

    def trouble(self, address: str, **settings: Any) -> str:
        """The one warning about a relay to which nothing gets through."""
        backlog = self.backlog(1)
        with self.assertLogs('kubensage-agent') as logged:
            sender = self.deliver(backlog, address, tls=True, **settings)
            for _ in range(3):
                self.pauses.get(timeout=PATIENCE_SECONDS)
            self.assertEqual(self.drain(backlog, sender), 1)
        self.assertEqual(len(logged.output), 1, logged.output)
        self.assertNotIn('PRIVATE KEY', logged.output[0])
        return logged.output[0]

    def test_both_sides_show_certificates_and_the_agent_a_token(self) -> None:
        self.roots({'token': 's3cret\n'})
        relay, backlog = self.relay(mutual=True), self.backlog(1, 2)
        sender = self.deliver(backlog, relay.address, tls=True, ca=self.path('ca.pem'), cert=self.path('agent.pem'),
                              key=self.path('agent.key'), token_file=f'{self.directory}/token')
        self.assertEqual(relay.next_streams(1), [[1, 2]])
        self.assertEqual(self.peers.get(timeout=PATIENCE_SECONDS), ('agent', 'Bearer s3cret'))
        self.assertEqual(self.drain(backlog, sender), 0)

    def test_another_name_in_the_certificate_may_be_given(self) -> None:
        relay, backlog = self.relay('named'), self.backlog(1)
        self.deliver(backlog, relay.address, tls=True, ca=self.path('ca.pem'), server_name='relay.example')
        self.assertEqual(relay.next_streams(1), [[1]])

    def test_the_roots_of_the_system_are_trusted_without_a_ca(self) -> None:
        with mock.patch.dict(os.environ, SSL_CERT_FILE=self.path('ca.pem')):
            relay, backlog = self.relay(), self.backlog(1)
            self.deliver(backlog, relay.address, tls=True)
            self.assertEqual(relay.next_streams(1), [[1]])
        with mock.patch.dict(os.environ, SSL_CERT_FILE=self.path('other-ca.pem')):
            self.assertIn(f'checked against --relay-tls {self.path("other-ca.pem")}: ', self.trouble(relay.address))
        with mock.patch.object(agent, 'SYSTEM_ROOTS', ('/no/roots.pem',)), mock.patch.dict(os.environ, SSL_CERT_FILE=''):
            self.assertIn('--relay-tls: no roots of the system at /no/roots.pem', self.trouble(relay.address))

    def test_a_certificate_that_is_not_to_be_trusted_is_one_line_with_file_and_reason(self) -> None:
        checked = f"the relay's certificate, checked against --relay-ca {self.path('ca.pem')}: "
        for what, name, ca, expected in (
                ('wrong CA', 'relay', 'other-ca.pem',
                 f'--relay-ca {self.path("other-ca.pem")}: unable to get local issuer certificate'),
                ('wrong name', 'named', 'ca.pem', checked + "IP address mismatch, certificate is not valid for '127.0.0.1'"),
                ('expired', 'expired', 'ca.pem', checked + 'certificate has expired')):
            with self.subTest(what):
                self.assertIn(expected, self.trouble(self.relay(name).address, ca=self.path(ca)))

    def test_a_file_that_does_not_do_is_one_line_with_file_and_reason(self) -> None:
        relay, path = self.relay(), self.path
        good = dict(ca=path('ca.pem'), cert=path('agent.pem'), key=path('agent.key'))
        self.roots({'token': 'two\nlines', 'empty': ''})
        none, garbage = path('none'), path('garbage')
        for what, files, expected in (
                ('missing CA', {'ca': none}, f'--relay-ca {none}: No such file or directory'),
                ('missing certificate', {'cert': none}, f'--relay-cert {none}: No such file or directory'),
                ('missing key', {'key': none}, f'--relay-key {none}: No such file or directory'),
                ('CA is no certificate', {'ca': garbage}, f'--relay-ca {garbage}: holds no certificate in PEM format'),
                ('certificate is none', {'cert': garbage}, f'--relay-cert {garbage}, --relay-key {path("agent.key")}: not a'),
                ('key of another', {'key': path('agent-2.key')}, f'--relay-key {path("agent-2.key")}: the key is not that'),
                ('missing token', {'token_file': none}, f'--relay-token-file {none}: No such file or directory'),
                ('no token', {'token_file': f'{self.directory}/empty'}, '/empty: holds no token'),
                ('two tokens', {'token_file': f'{self.directory}/token'}, '/token: holds no token')):
            with self.subTest(what):
                line = self.trouble(relay.address, **{**good, **files})
                self.assertIn(f'relay {relay.address}: not connected: --relay-', line)
                self.assertIn(expected, line)

    def test_a_relay_that_hangs_up_on_our_certificate_is_one_line(self) -> None:
        """As gRPC's C core does."""
        relay = self.relay(mutual=True)
        for name in ('', 'stranger', 'expired-agent'):
            with self.subTest(name):
                files = dict(cert=self.path(f'{name}.pem'), key=self.path(f'{name}.key')) if name else {}
                about = f' (--relay-cert {self.path(name)}.pem)' if name else ' (no --relay-cert was given)'
                self.assertIn(f'the relay hangs up after the TLS handshake{about}', self.trouble(
                    relay.address, ca=self.path('ca.pem'), **files))

    def test_what_the_relay_says_of_our_certificate_is_the_reason(self) -> None:
        """As Go does, and OpenSSL."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(self.path('ca.pem'))
        context.load_cert_chain(self.path('relay.pem'), self.path('relay.key'))

        def answer_once(listener: socket.socket) -> None:
            with contextlib.suppress(OSError), context.wrap_socket(listener.accept()[0], server_side=True) as connection:
                connection.recv(1)

        for name, expected in (('', r'certificate required \(no --relay-cert was given\)'),
                               ('stranger', r'unknown ca \(--relay-cert .*/stranger.pem\)'),
                               ('expired-agent', r'certificate expired \(--relay-cert .*/expired-agent.pem\)')):
            with self.subTest(name), contextlib.closing(socket.create_server(('127.0.0.1', 0))) as listener:
                files = dict(cert=self.path(f'{name}.pem'), key=self.path(f'{name}.key')) if name else {}
                thread = threading.Thread(target=answer_once, args=(listener,))
                thread.start()
                self.assertRegex(agent.explain_tls(agent.Relay('{}:{}'.format(*listener.getsockname()), True,
                                                               ca=self.path('ca.pem'), **files)) or '', expected)
                thread.join(PATIENCE_SECONDS)

    def test_a_relay_that_speaks_no_tls_is_one_line(self) -> None:
        self.assertIn('it does not seem to speak TLS', self.trouble(FakeRelay(self).address, ca=self.path('ca.pem')))

    def test_certificate_and_token_are_rotated_without_a_restart(self) -> None:
        self.roots({'token': 'one\n'})
        files = dict(cert=self.copy('stranger.pem', 'cert'), key=self.copy('stranger.key', 'key'))
        relay, backlog = self.relay(mutual=True), self.backlog(1)
        sender = self.deliver(backlog, relay.address, tls=True, ca=self.path('ca.pem'),
                              token_file=f'{self.directory}/token', **files)
        self.pauses.get(timeout=PATIENCE_SECONDS)
        for number, (name, token) in enumerate((('agent', 'one'), ('agent-2', 'one'), ('agent-2', 'two'))):
            self.copy(f'{name}.key', 'key')
            self.copy(f'{name}.pem', 'cert')
            self.roots({'token': f'{token}\n'})
            if number:
                self.add(backlog, number + 1)
            self.assertEqual(self.peers.get(timeout=PATIENCE_SECONDS), (name, f'Bearer {token}'))
            self.assertEqual(relay.next_streams(1), [[number + 1]])
        connections = backlog.connections
        self.add(backlog, 4)
        relay.next_streams(1)
        self.assertEqual((self.drain(backlog, sender), backlog.connections), (0, connections))

    def test_another_trouble_during_an_outage_is_told_as_well(self) -> None:
        backlog, path = self.backlog(1), f'{self.directory}/ca'
        with self.assertLogs('kubensage-agent') as logged:
            sender = self.deliver(backlog, self.relay().address, tls=True, ca=path)
            self.pauses.get(timeout=PATIENCE_SECONDS)
            self.copy('other-ca.pem', 'ca')
            wait_for('the second warning', lambda: len(logged.output) == 2)
            self.copy('ca.pem', 'ca')
            wait_for('the delivery', lambda: not backlog.snapshots)
            self.drain(backlog, sender)
        self.assertEqual([record.levelname for record in logged.records], ['WARNING', 'WARNING', 'INFO'])
        self.assertIn('No such file', logged.output[0])
        self.assertIn('unable to get local issuer', logged.output[1])

    def test_options_that_do_not_go_together_end_it_with_2(self) -> None:
        for arguments, expected in (
                (['--relay-token-file', '/t'], '--relay-token-file needs TLS: --relay-tls, or --relay-ca FILE'),
                (['--relay-server-name', 'x'], '--relay-server-name needs TLS'),
                (['--relay-cert', '/c', '--relay-tls'], '--relay-cert and --relay-key go together'),
                (['--relay-key', '/k'], '--relay-cert and --relay-key go together')):
            with self.subTest(arguments), self.assertRaises(SystemExit) as ended, \
                    contextlib.redirect_stderr(io.StringIO()) as err:
                agent.parse_options(['--relay-address', 'relay:1', *arguments], {})
            self.assertEqual(ended.exception.code, 2)
            self.assertIn(expected, err.getvalue())
        for arguments, expected in (([], False), (['--relay-tls'], True), (['--relay-ca', '/c'], True),
                                    (['--relay-cert', '/c', '--relay-key', '/k'], True)):
            self.assertEqual(agent.parse_options(arguments, {}).relay_tls, expected)

    def exposure(self, relay: agent.Relay) -> List[str]:
        log = logging.getLogger('kubensage-agent')
        with self.assertLogs(log) as logged:
            log.info('at least one line')
            agent.log_exposure(relay)
        return logged.output[1:]

    def test_a_secret_that_others_can_read_is_a_warning(self) -> None:
        key, token = self.copy('agent.key', 'key'), self.copy('garbage', 'token')
        relay = agent.Relay('192.0.2.1:1', True, key=key, token_file=token)
        self.assertEqual(self.exposure(relay), [])
        for path in (key, token):
            os.chmod(path, 0o640)
        self.assertEqual(self.exposure(relay), [
            f'WARNING:kubensage-agent:{path} can be read by other users: `chmod go-r {path}` mends it' for path in (key, token)])

    def test_plain_text_is_a_warning_unless_it_stays_on_the_machine(self) -> None:
        for address, warned in (('127.0.0.1:1', False), ('localhost:1', False), ('[::1]:1', False), ('10.0.0.1:1', True),
                                ('relay:1', True), ('localhost.example:1', True), ('127.0.0.1.example:1', True)):
            with self.subTest(address):
                lines = self.exposure(agent.Relay(address))
                self.assertEqual(len(lines), warned, lines)
                self.assertEqual(self.exposure(agent.Relay(address, tls=True)), [])

    def test_nothing_secret_is_logged_or_in_a_snapshot(self) -> None:
        self.roots({'token': 's3cret-token\n'})
        relay = self.relay(mutual=True)
        relay.script.append(refuse)
        process = self.start_agent(
            '--relay-address', relay.address, '--relay-ca', self.path('ca.pem'), '--relay-cert', self.path('agent.pem'),
            '--relay-key', self.copy('agent.key', 'key'), '--relay-token-file', f'{self.directory}/token', '--once',
            '--log-level', 'debug', '--cri-socket', self.socket)
        out, troubles = self.troubles(process)
        snapshot = relay.next_arrived(1)[0] if not relay.arrived.empty() else wire.Metrics()
        key = self.read('agent.key').split(b'\n')[1].decode()
        with open(f'{self.directory}/log', encoding='utf-8') as file:
            everything = file.read() + out + ''.join(troubles) + str(snapshot)
        self.assertIn('PERMISSION_DENIED', everything)
        for secret in ('s3cret-token', key):
            self.assertNotIn(secret, everything)


# --- main loop

class MainLoopTest(ServerTest):
    def setUp(self) -> None:
        super().setUp()
        self.runtime = FakeRuntime(self, self.socket)

    def start_loop(self, *arguments: str, **settings: Any) -> subprocess.Popen:
        return self.start_agent('--cri-socket', self.socket, '--main-loop-duration', '0.1', *arguments, **settings)

    def wait_for_cycles(self, count: int) -> None:
        while count:
            count -= self.runtime.asked_queue.get(timeout=PATIENCE_SECONDS) == 'ListPodSandbox'

    def test_ticks_stay_on_their_grid_and_late_ones_are_skipped(self) -> None:
        for start, interval, now, expected in (
                (100, 5, 100, 105), (100, 5, 104.9, 105), (100, 5, 105, 110), (100, 5, 117, 120), (0.5, 0.25, 0.6, 0.75)):
            with self.subTest(now=now):
                self.assertEqual(agent.next_tick(start, interval, now), expected)

    def test_snapshots_follow_their_interval(self) -> None:
        relay = FakeRelay(self)
        process = self.start_agent('--cri-socket', self.socket, '--main-loop-duration', '0.2', '--relay-address', relay.address)
        relay.next_arrived(1)
        start = time.monotonic()
        relay.next_arrived(5)
        self.assertTrue(0.7 < time.monotonic() - start < 2)
        self.assertIsNone(process.poll())

    def test_without_a_relay_snapshots_are_lines_of_json(self) -> None:
        process = self.start_loop()
        for _ in range(3):
            snapshot = json.loads(process.stdout.readline())
            self.assertEqual((snapshot['node_metrics']['hostname'], snapshot['pod_metrics'][0]['id']), ('node', 'pod'))
        process.send_signal(signal.SIGTERM)
        _, troubles = self.troubles(process)
        self.assertEqual((process.returncode, [line for line in troubles if 'Traceback' in line]), (0, []))

    def test_a_reader_that_leaves_ends_it_quietly(self) -> None:
        process = self.start_loop()
        process.stdout.readline()
        process.stdout.close()
        self.assertEqual(process.wait(PATIENCE_SECONDS), 1)
        self.assertEqual([line for line in process.stderr.read().splitlines() if ' INFO ' not in line and 'root:' not in line
                          and 'cpu' not in line and 'runtime health' not in line], [])

    def test_a_relay_is_served_without_stdout(self) -> None:
        relay = FakeRelay(self)
        self.start_loop('--relay-address', relay.address, prefix=('sh', '-c', 'exec "$@" >&-', 'sh'))
        self.assertEqual(relay.next_arrived(1)[0].node_metrics.hostname, 'node')

    def test_a_full_disk_behind_stdout_costs_snapshots_and_no_connections(self) -> None:
        with open('/dev/full', 'w', encoding='utf-8') as full:
            self.start_loop(stdout=full)
            self.wait_for_cycles(4)
        self.assertEqual(self.runtime.asked.count('Version'), 1)

    def test_a_signal_ends_it_after_everything_is_delivered(self) -> None:
        """The relay holds the first stream back until after the signal: what has gathered behind it is delivered then."""
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number):
                self.runtime.asked.clear()
                relay = FakeRelay(self)
                relay.script.append(relay.hold)
                process = self.start_loop('--relay-address', relay.address)
                relay.next_arrived(1)
                self.wait_for_cycles(5)
                process.send_signal(number)
                with self.assertRaises(subprocess.TimeoutExpired):
                    process.wait(0.5)
                relay.release()
                self.assertEqual(process.wait(PATIENCE_SECONDS), 0)
                sent = sum(relay.next_streams(2), [])
                self.assertEqual(len(sent), self.runtime.asked.count('ListPodSandbox'))
                self.assertEqual(sent, sorted(sent))

    def test_a_relay_that_hangs_delays_neither_collection_nor_for_long_the_end(self) -> None:
        relay = FakeRelay(self)
        relay.usual = relay.hold
        process, other = (self.start_loop('--relay-address', relay.address, constants={'LAST_ATTEMPT_SECONDS': 1.5})
                          for _ in range(2))
        relay.next_arrived(2)
        self.wait_for_cycles(10)
        start = time.monotonic()
        for running in (process, other):
            running.send_signal(signal.SIGTERM)
        with self.assertRaises(subprocess.TimeoutExpired):
            other.wait(0.5)
        other.send_signal(signal.SIGTERM)
        self.assertEqual(other.wait(2), -signal.SIGTERM)
        self.assertEqual(process.wait(PATIENCE_SECONDS), 0)
        self.assertTrue(1.4 < time.monotonic() - start < 1.5 + 2)
        self.assertIn('were not acknowledged', self.troubles(process)[1][-1])

    def test_once_tells_by_its_exit_code_whether_the_relay_has_acknowledged(self) -> None:
        """Silent when it has, also on its way in plain text (0.0.0.0 is no loopback address, and leads here all the same);
        one line when it has not, be it refused, down, or the snapshot too large for any relay."""
        relays = [FakeRelay(self), FakeRelay(self, usual=refuse), FakeRelay(self, usual=end_without_answer), FakeRelay(self)]
        huge = f'{self.directory}/run/huge.sock'
        FakeRuntime(self, huge, ListPodSandbox=cri.ListPodSandboxResponse(items=[sandbox('x' * (5 << 20))]))
        with contextlib.closing(socket.socket()) as silent:
            silent.bind(('127.0.0.1', 0))
            cases = [(f'0.0.0.0:{relays[0].port}', self.socket, 0, None), (relays[1].address, self.socket, 1, 'PERMISSION_DENIED: not you'),
                     ('127.0.0.1:{1}'.format(*silent.getsockname()), self.socket, 1, 'UNAVAILABLE'),
                     (relays[3].address, huge, 1, 'exceed')]
            processes = [self.start_agent('--once', '--cri-socket', path, '--relay-address', address)
                         for address, path, _, _ in cases]
            for process, (_, _, code, expected) in zip(processes, cases):
                with self.subTest(expected=expected):
                    out, troubles = self.troubles(process)
                    self.assertEqual((out, process.returncode, len(troubles)), ('', code, 1 if expected else 0), troubles)
                    self.assertIn(expected or '', ''.join(troubles))
        self.assertEqual(len(relays[0].next_arrived(1)[0].pod_metrics), 1)

    def test_once_gives_up_on_a_relay_that_hangs(self) -> None:
        relay = FakeRelay(self)
        relay.usual = relay.hold
        options = agent.parse_options(['--once', '--cri-socket', self.socket, '--relay-address', relay.address], {})
        with mock.patch.multiple(agent, ONCE_PAUSE_SECONDS=0, ONCE_INTERVAL_SECONDS=0, ONCE_DELIVERY_SECONDS=0.5), \
                self.assertLogs('kubensage-agent', 'WARNING'):
            start = time.monotonic()
            self.assertEqual(agent.run_once(self.roots({}), options), 1)
            self.assertLess(time.monotonic() - start, 5)

    def test_once_without_a_relay_shows_one_snapshot_with_rates(self) -> None:
        self.runtime.answers['ListContainerStats'] = [list_stats(stats('app', 10**9, 0)), list_stats(stats('app', 2 * 10**9, 6))]
        out, _ = self.troubles(self.start_agent('--once', '--cri-socket', self.socket))
        snapshot, = map(json.loads, out.splitlines())
        cpu = snapshot['pod_metrics'][0]['container_metrics'][0]['cpu_metrics']
        self.assertEqual(int(cpu['usage_nano_cores']), 6)


class PaceTest(unittest.TestCase):
    """The loop with a clock of its own: a cycle takes as long as the test says, and waiting takes no time."""

    def run_loop(self, durations: Sequence[float]) -> Tuple[List[float], agent.Run, List[str]]:
        """When each cycle began, in intervals; what the run counted; and the log."""
        self.now, begun, runs, left = 100.0, [], [], collections.deque(durations)
        under_way = []

        def run_cycle(roots: Any, options: Any, memory: Any, thread: Any, run: agent.Run, outlets: Any) -> Any:
            self.assertEqual(under_way, [])
            under_way.append(run)
            begun.append((self.now - 100) / 5)
            runs.append(run)
            self.now += left.popleft()
            under_way.clear()
            if self.now > 1000:
                raise ZeroDivisionError
            return memory, {}

        def stopped_within(descriptor: int, until: float, live: Any) -> bool:
            self.now = max(self.now, until)
            return not left

        options = agent.parse_options([], {})
        clock = types.SimpleNamespace(**{**vars(time), 'monotonic': lambda: self.now})
        with self.assertLogs('kubensage-agent', 'DEBUG') as logged, mock.patch.multiple(
                agent, run_cycle=run_cycle, stopped_within=stopped_within, time=clock, install_signals=lambda live: 0):
            logging.getLogger('kubensage-agent').debug('at least one line')
            self.assertEqual(agent.run_loop(LIVE, options), 0)
        return begun, runs[-1], logged.output[1:]

    def test_cycles_that_take_long_skip_ticks_and_it_is_said_when_that_begins_and_ends(self) -> None:
        begun, run, log = self.run_loop([1, 4.9, 6, 12, 17, 1, 1, 1])
        self.assertEqual([round(tick) for tick in begun], [0, 1, 2, 4, 7, 11, 12, 13])
        self.assertEqual(run.skipped_ticks, 1 + 2 + 3)
        self.assertEqual(log, ['WARNING:kubensage-agent:pace: a cycle takes longer than 5 s: ticks are skipped',
                               'INFO:kubensage-agent:pace: well again'])

    def test_a_bug_costs_one_snapshot_and_is_logged_with_its_traceback(self) -> None:
        begun, run, log = self.run_loop([1, 950, 1])
        self.assertEqual((len(begun), run.failures['bug']), (3, 2))
        self.assertIn('Traceback', log[0])


class WatchdogTest(ServerTest):
    def notify_socket(self, address: str) -> socket.socket:
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(notify.close)
        notify.bind(address)
        notify.settimeout(PATIENCE_SECONDS)
        return notify

    def test_systemd_hears_of_each_cycle_and_of_the_end(self) -> None:
        FakeRuntime(self, self.socket)
        path = f'{self.directory}/notify'
        notify, relay = self.notify_socket(path), FakeRelay(self)
        process = self.start_agent('--cri-socket', self.socket, '--main-loop-duration', '0.1', '--relay-address', relay.address,
                                   environment={'NOTIFY_SOCKET': path})
        heard = [notify.recv(4096).decode() for _ in range(4)]
        for number, message in enumerate(heard):
            self.assertRegex(message, ('READY=1\n' if number == 0 else '^') +
                             r'WATCHDOG=1\nSTATUS=1 pods, 1 containers, \d+ snapshots wait for the relay')
        process.terminate()
        while 'WATCHDOG' in heard[-1]:
            heard.append(notify.recv(4096).decode())
        self.assertEqual((heard[-1], sum('READY' in message for message in heard)), ('STOPPING=1', 1))
        self.assertEqual(process.wait(PATIENCE_SECONDS), 0)

    def test_the_watchdog_hears_nothing_of_cycles_that_do_not_complete(self) -> None:
        path = f'{self.directory}/notify'
        notify = self.notify_socket(path)
        notify.setblocking(False)
        arguments = LIVE, agent.parse_options([], {}), agent.Memory(), None, agent.Run(), agent.Outlets()
        with mock.patch.dict(os.environ, NOTIFY_SOCKET=path):
            for broken in ('collect_snapshot', 'hand_over'):
                with mock.patch.object(agent, 'collect_snapshot', lambda *arguments: agent.Part(b'', None, {})), \
                        mock.patch.object(agent, broken, mock.Mock(side_effect=ZeroDivisionError)), \
                        self.assertRaises(ZeroDivisionError):
                    agent.run_cycle(*arguments)
                self.assertRaises(BlockingIOError, notify.recv, 4096)

    def test_an_abstract_socket_is_one_that_begins_with_an_at(self) -> None:
        name = f'kubensage-{uuid.uuid4()}'
        notify = self.notify_socket(f'\0{name}')
        with mock.patch.dict(os.environ, NOTIFY_SOCKET=f'@{name}'):
            agent.notify_systemd('WATCHDOG=1')
        self.assertEqual(notify.recv(100), b'WATCHDOG=1')

    def test_without_systemd_or_with_a_full_socket_nothing_happens(self) -> None:
        path = f'{self.directory}/notify'
        self.notify_socket(path)
        for address, count in (('', 1), (f'{self.directory}/none', 1), (path, 2000)):
            with mock.patch.dict(os.environ, NOTIFY_SOCKET=address):
                for _ in range(count):
                    agent.notify_systemd('WATCHDOG=1')

    def test_the_status_is_one_line_whatever_the_troubles_are_called(self) -> None:
        line = agent.status_line(b'', None, {'mount /a\nREADY=1': 'x', 'cpu': 'y'})
        self.assertEqual(line, '0 pods, 0 containers; in trouble: cpu, mount /a?READY=1')


# --- nothing too much

class FrugalTest(unittest.TestCase):
    def run_python(self, program: str) -> List[str]:
        directory = os.path.dirname(os.path.abspath(agent.__file__))
        done = subprocess.run([sys.executable, '-c', f'import sys; sys.path.insert(0, {directory!r}); import agent\n{program}'],
                              stdout=subprocess.PIPE, check=True, text=True, timeout=PATIENCE_SECONDS)
        return done.stdout.split()

    def test_what_only_some_need_is_imported_only_then(self) -> None:
        names = ('_ssl', 'ssl', '_hashlib', 'html', 'difflib', 'gzip', 'google.protobuf.json_format', 'grpc.aio', 'http.server')
        self.assertEqual([], self.run_python(f'print(*(name for name in {names} if name in sys.modules))'))

    def test_a_server_without_tls_needs_no_ssl(self) -> None:
        self.assertEqual(['True', 'False'], self.run_python(
            'agent.http_handler(agent.Published(5)); print("http.server" in sys.modules, "ssl" in sys.modules)'))

    def test_ssl_can_be_imported_later(self) -> None:
        self.assertEqual(['True'], self.run_python('import ssl; print(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).check_hostname)'))

    def test_the_memory_of_the_start_is_settled(self) -> None:
        frozen, = self.run_python('import gc; agent.settle_memory(); print(gc.get_freeze_count())')
        self.assertGreater(int(frozen), 10_000)
        self.run_python('import types; agent.libc = types.SimpleNamespace; agent.settle_memory()')


# --- nothing grows

class LeakTest(ServerTest):
    """Many cycles in this process: the agent's threads and open files stay as many as they were."""

    def used(self) -> Tuple[int, int]:
        threads = [thread for thread in threading.enumerate() if not thread.name.startswith('ThreadPoolExecutor')]
        return len(threads), len(os.listdir('/proc/self/fd'))

    def check(self, relay: agent.Relay, backlog: agent.Backlog, cycles: int = 60, warm: int = 15) -> None:
        FakeRuntime(self, self.socket)
        options = agent.parse_options(['--cri-socket', self.socket], {})
        memory, run, used = agent.Memory(), agent.Run(), []
        with mock.patch.object(agent, 'backoff_seconds', lambda failures: 0.001), \
                concurrent.futures.ThreadPoolExecutor(1, 'pods') as pods_thread:
            sender = agent.start_delivery(backlog, relay)
            for number in range(cycles):
                memory, _ = agent.run_cycle(LIVE, options, memory, pods_thread, run, agent.Outlets(backlog=backlog))
                # The asking thread of statvfs and a stream may be under way: what counts is what stays.
                used += [self.used()] * (number >= warm)
            agent.close_backlog(backlog, sender, PATIENCE_SECONDS)
        memory.pods.runtime.channel.close()
        quarter = len(used) // 4
        for which in (0, 1):
            self.assertLessEqual(min(row[which] for row in used[-quarter:]), max(row[which] for row in used[:quarter]))

    def test_cycles_with_a_relay(self) -> None:
        backlog = agent.Backlog(600)
        self.check(agent.Relay(FakeRelay(self).address), backlog)
        self.assertEqual(len(backlog.snapshots), 0)

    def test_cycles_while_the_relay_is_down_with_a_spool(self) -> None:
        os.mkdir(f'{self.directory}/spool')
        with contextlib.closing(socket.socket()) as silent:
            silent.bind(('127.0.0.1', 0))
            backlog = agent.Backlog(600, spool=f'{self.directory}/spool')
            self.check(agent.Relay('127.0.0.1:{1}'.format(*silent.getsockname())), backlog)
        self.assertEqual((len(backlog.snapshots), backlog.memory_bytes), (60, 0))
        self.assertGreater(backlog.connections, 20)


# --- faults, all of them at once

FAULT_SEED = 1


def hold(file: int, messages: Iterable[wire.Metrics]) -> None:
    """Write down a whole stream at once: a relay that is killed holds all of it or nothing."""
    lines = [f'{metrics.agent_metrics.run_id} {metrics.agent_metrics.sequence} {metrics.agent_metrics.timestamp_ns}\n'
             for metrics in messages]
    os.write(file, ''.join(lines).encode())


def play_relay(port: int, path: str, seed: Optional[int]) -> None:
    """A relay, as a process to be killed. It holds what it has written to the file before it answered; with a seed,
    it refuses, hesitates, cuts streams, and loses answers."""
    chance, file = random.Random(seed), os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    troubles = ('none', 'none', 'none', 'refuse', 'cut', 'slow', 'answer lost', 'no answer') if seed else ('none',)

    def behave(messages: Iterator[wire.Metrics], context: grpc.ServicerContext) -> Iterator[bytes]:
        trouble = chance.choice(troubles)
        if trouble == 'refuse':
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, 'too many streams')
        if trouble == 'cut':
            collections.deque(itertools.islice(messages, chance.randrange(5)), 0)
            context.abort(grpc.StatusCode.UNAVAILABLE, 'cut')
        arrived = list(messages)
        if trouble == 'slow':
            threading.Event().wait(chance.uniform(0, 1))
        hold(file, arrived)
        if trouble == 'answer lost':
            context.abort(grpc.StatusCode.UNAVAILABLE, 'the answer is lost')
        yield from () if trouble == 'no answer' else [b'']

    FakeRelay(unittest.TestCase(), usual=behave, port=port).server.wait_for_termination()


def play_runtime(path: str, seed: int) -> None:
    """A runtime, as a process to be killed, which now and then is slow, fails, or talks nonsense."""
    chance, runtime = random.Random(seed), FakeRuntime(unittest.TestCase(), path)
    usual = runtime.answer

    def answer(method: str, context: grpc.ServicerContext) -> bytes:
        trouble = chance.random()
        if trouble < 0.05:
            threading.Event().wait(chance.uniform(0, 1))
        elif trouble < 0.1:
            context.abort(grpc.StatusCode.INTERNAL, 'bad luck')
        return b'\xff\xff' if 0.1 < trouble < 0.12 else usual(method, context)

    runtime.answer = answer
    runtime.server.wait_for_termination()


class FaultTest(ServerTest):
    """What was taken, the agent tells on the watchdog's socket, a datagram a cycle; what arrived, the relay's file tells."""

    def setUp(self) -> None:
        super().setUp()
        self.chance, self.held, self.taken = random.Random(FAULT_SEED), f'{self.directory}/held', collections.Counter()
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(self.notify.close)
        self.notify.bind(f'{self.directory}/notify')
        # Each datagram then comes with the process id of its sender.
        self.notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        reserved = socket.socket()
        self.addCleanup(reserved.close)
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        reserved.bind(('127.0.0.1', 0))
        self.port = reserved.getsockname()[1]
        self.log = self.enter(open(f'{self.directory}/stderr', 'w+', encoding='utf-8'))
        # When each agent was started, by the clock of its snapshots, and its process id.
        self.starts: List[Tuple[int, int]] = []

    def enter(self, file: Any) -> Any:
        self.addCleanup(file.close)
        return file

    def play(self, code: str) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, '-c', f'import test_agent; test_agent.{code}'],
                                   cwd=os.path.dirname(os.path.abspath(__file__)), stdin=subprocess.DEVNULL)
        self.addCleanup(self.end, process)
        return process

    def start_relay(self, reliable: bool = False) -> subprocess.Popen:
        return self.play(f'play_relay({self.port}, {self.held!r}, {None if reliable else self.chance.randrange(1, 10**6)})')

    def start_runtime(self) -> subprocess.Popen:
        return self.play(f'play_runtime({self.socket!r}, {self.chance.randrange(10**6)})')

    def start_spooling_agent(self) -> subprocess.Popen:
        started = time.time_ns()
        process = self.start_agent(
            '--cri-socket', self.socket, '--relay-address', f'127.0.0.1:{self.port}', '--main-loop-duration', '0.2',
            '--spool-dir', f'{self.directory}/spool', stdout=subprocess.DEVNULL, stderr=self.log,
            environment={'NOTIFY_SOCKET': f'{self.directory}/notify'})
        self.starts.append((started, process.pid))
        return process

    def watch(self, seconds: float, enough: Callable[[], bool] = lambda: False) -> None:
        """Count the snapshots taken, by process, for so long or until it is enough."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not enough():
            self.notify.settimeout(max(0.001, min(0.2, end - time.monotonic())))
            with contextlib.suppress(socket.timeout):
                text, ancillary, _, _ = self.notify.recvmsg(4096, socket.CMSG_SPACE(12))
                pid, _, _ = struct.unpack('iii', ancillary[0][2])
                self.taken[pid] += b'WATCHDOG=1' in text

    def pause(self, process: subprocess.Popen) -> None:
        process.send_signal(signal.SIGSTOP)
        self.watch(self.chance.uniform(0.1, 1))
        process.send_signal(signal.SIGCONT)

    def make_trouble(self, seconds: float) -> Dict[str, subprocess.Popen]:
        """All kinds of it in turns, in another order each turn; the processes that run at the end."""
        start = {'relay': self.start_relay, 'runtime': self.start_runtime, 'agent': self.start_spooling_agent}
        running = {name: start[name]() for name in start}
        turn, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            turn = turn or self.chance.sample(['relay stops', 'runtime stops', 'relay dies', 'runtime dies', 'agent dies'], 5)
            name, what = turn.pop().split()
            self.watch(self.chance.uniform(0.1, 0.8))
            if what == 'stops':
                self.pause(running[name])
                continue
            self.end(running[name])
            self.watch(self.chance.uniform(0, 0.5))
            running[name] = start[name]()
        return running

    def calm_down(self, running: Dict[str, subprocess.Popen]) -> None:
        """A relay that does its duty; the agent ends once it has taken one more snapshot, and delivers everything."""
        self.end(running['relay'])
        self.start_relay(reliable=True)
        with contextlib.closing(socket.socket()) as probe:
            wait_for('the relay', lambda: probe.connect_ex(('127.0.0.1', self.port)) == 0)
        pid = running['agent'].pid
        self.watch(PATIENCE_SECONDS, lambda: self.taken[pid] > 0)
        running['agent'].terminate()
        self.watch(PATIENCE_SECONDS, lambda: running['agent'].poll() is not None)
        self.assertEqual(running['agent'].wait(PATIENCE_SECONDS), 0)
        self.watch(0.1)

    def read_held(self) -> Dict[str, Tuple[int, 'collections.Counter[int]']]:
        """By run id: the time of its first snapshot, and how often the relay holds each sequence number."""
        runs: Dict[str, Tuple[int, 'collections.Counter[int]']] = {}
        with open(self.held, encoding='utf-8') as file:
            for line in file:
                run_id, sequence, timestamp_ns = line.split()
                first, sequences = runs.get(run_id, (int(timestamp_ns), collections.Counter()))
                sequences[int(sequence)] += 1
                runs[run_id] = min(first, int(timestamp_ns)), sequences
        return runs

    def test_every_snapshot_taken_arrives_whatever_happens(self) -> None:
        seconds = 120 if os.environ.get('KUBENSAGE_TEST_LONG') else 4
        self.calm_down(self.make_trouble(seconds))
        runs, missing, duplicates = self.read_held(), [], 0
        for (started, pid), (next_start, _) in zip(self.starts, [*self.starts[1:], (time.time_ns(), 0)]):
            of_this_start = [sequences for first, sequences in runs.values() if started <= first < next_start]
            self.assertLessEqual(len(of_this_start), 1)
            sequences = of_this_start[0] if of_this_start else collections.Counter()
            missing += [(pid, sequence) for sequence in range(1, self.taken[pid] + 1) if not sequences[sequence]]
            duplicates += sum(sequences.values()) - len(sequences)
        sys.stderr.write(f'[{seconds} s of faults: {sum(self.taken.values())} snapshots by {len(self.starts)} agents, '
                         f'{len(missing)} missing, {duplicates} came twice: the relay had them and did not say so] ')
        self.assertEqual(missing, [])
        self.assertGreater(sum(self.taken.values()), len(self.starts))
        self.assertEqual(os.listdir(f'{self.directory}/spool'), [])
        self.log.seek(0)
        self.assertNotIn('Traceback', self.log.read())


# --- a real runtime

RUNTIME_TOOLS = ('containerd', 'containerd-shim-runc-v2', 'runc', 'ctr', 'gcc', 'unshare', 'setpriv')
IMAGE = 'localhost/kubensage-test:1'
MIB = 1 << 20

# What runs in the containers, and as their pause: `load pause`, `load spin PERCENT` of one CPU, `load alloc MIB`,
# `load write MIB` into the writable layer, `load cache MIB` (written to a file on disk), `load direct MIB` (past the page
# cache), `load child MIB` (allocated by a child), `load send COUNT` datagrams of 1,000 bytes to all, `load exit CODE`.
LOAD_C = r'''
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static double seconds(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec + now.tv_nsec / 1e9;
}

int main(int argc, char **argv) {
    const char *mode = argc > 1 ? argv[1] : "pause";
    long number = argc > 2 ? atol(argv[2]) : 0;
    if (!strcmp(mode, "exit")) return number;
    if (!strcmp(mode, "child") && fork()) for (;;) pause();
    if (!strcmp(mode, "alloc") || !strcmp(mode, "child")) memset(malloc(number << 20), 1, number << 20);
    if (!strcmp(mode, "write") || !strcmp(mode, "cache")) {
        int file = creat(*mode == 'w' ? "/written" : "/etc/hosts", 0600);
        char *block = calloc(1, 1 << 20);
        while (number-- > 0) if (write(file, block, 1 << 20) < 0) return 1;
        close(file);
    }
    if (!strcmp(mode, "direct")) {
        static char block[1 << 20] __attribute__((aligned(4096)));
        int file = open("/etc/hosts", O_WRONLY | O_DIRECT);
        while (number-- > 0) if (write(file, block, sizeof block) < 0) return 1;
    }
    if (!strcmp(mode, "send")) {
        struct sockaddr_in everybody = {AF_INET, htons(9), {inet_addr("198.18.77.255")}};
        int udp = socket(AF_INET, SOCK_DGRAM, 0), yes = 1;
        char text[1000] = "";
        setsockopt(udp, SOL_SOCKET, SO_BROADCAST, &yes, sizeof yes);
        while (number-- > 0) if (sendto(udp, text, sizeof text, 0, (void *) &everybody, sizeof everybody) < 0) return 1;
    }
    if (!strcmp(mode, "spin"))
        for (double start = seconds(CLOCK_MONOTONIC); ;)
            if (seconds(CLOCK_PROCESS_CPUTIME_ID) > (seconds(CLOCK_MONOTONIC) - start) * number / 100) usleep(10000);
    for (;;) pause();
}
'''

# containerd as the init of its own PID namespace, with its own mounts: when it is killed, the kernel ends its shims and
# containers with it, and forgets the mounts; setpriv and unshare have it killed should this process be killed.
# The tmpfs makes overlayfs work wherever the directory is; the sandboxes' files, /etc/hosts among them, stay on disk,
# since only a file on disk has pages that are not in the working set. /run: shims put their sockets into /run/containerd,
# whatever `state` says; the CNI library makes its notes in /var/lib. mounts/proc is the outer /proc, for an agent that is
# to see the pods' mounts (nsenter --mount).
CONTAINERD = ('setpriv', '--pdeathsig', 'KILL', 'unshare', '--mount', '--pid', '--fork', '--kill-child', 'sh', '-euc', '''
mount -t tmpfs tmpfs "$0/mounts"
mkdir -p "$0/mounts/proc" "$0/mounts/root/io.containerd.grpc.v1.cri/sandboxes"
mount --bind "$0/sandboxes" "$0/mounts/root/io.containerd.grpc.v1.cri/sandboxes"
mount --bind /proc "$0/mounts/proc"
mount -t proc proc /proc
for directory in run var/lib; do
    mkdir -p "$0/mounts/upper/$directory" "$0/mounts/work/$directory"
    mount -t overlay -o "lowerdir=/$directory,upperdir=$0/mounts/upper/$directory,workdir=$0/mounts/work/$directory" overlay "/$directory"
done
exec containerd --config "$0/config.toml"
''')

# restrict_oom_score_adj: without CAP_SYS_RESOURCE runc dies on the negative value of a sandbox. opt, conf_dir: containerd
# would make /opt/containerd and /etc/cni/net.d. Layers are measured every stats_collect_period, 10 s by default.
CONTAINERD_CONFIG = '''
version = 2
root = "{directory}/mounts/root"
state = "{directory}/mounts/state"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
                    "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[grpc]
  address = "{directory}/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
  path = "{directory}/mounts/opt"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{image}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  stats_collect_period = {layers_seconds}
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{directory}/cni"
  [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      Root = "{directory}/mounts/runc"
'''


# A bridge without an address of its own: nothing is routed, and what a pod sends to all reaches nobody else.
CNI_PLUGINS = next((path for path in ('/usr/lib/cni', '/opt/cni/bin') if os.path.exists(f'{path}/bridge')), None)
CNI_CONFIG = '''
{{"cniVersion": "0.4.0", "name": "test", "plugins": [{{"type": "bridge", "bridge": "{bridge}", "ipam": {{
  "type": "host-local", "dataDir": "{directory}/mounts/ipam", "ranges": [[{{"subnet": "198.18.77.0/24"}}]]}}}}]}}
'''


class Load(NamedTuple):
    """A container to be made: the arguments of its program, whether it is started, and its LinuxContainerResources."""
    name: str
    arguments: Tuple[str, ...] = ('pause',)
    attempt: int = 0
    started: bool = True
    resources: Dict[str, int] = {}


class Pod(NamedTuple):
    """A pod that was made; its containers' ids by their names."""
    id: str
    metadata: cri.PodSandboxMetadata
    containers: Dict[str, str]
    cgroup: str


class RealRuntime(NamedTuple):
    directory: str
    socket: str
    pid: int
    channel: grpc.Channel
    # Below each controller of cgroup v1; below the mount point with v2.
    cgroup: str


def why_no_runtime() -> Optional[str]:
    """The reason to skip."""
    missing = [tool for tool in RUNTIME_TOOLS if not shutil.which(tool)]
    if missing:
        return f'not installed: {", ".join(missing)}'
    if os.geteuid() != 0:
        return 'not root'
    allowed = subprocess.run(['unshare', '--mount', '--pid', '--fork', 'true'], stderr=subprocess.PIPE, text=True)
    return allowed.stderr.strip() or None


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 15) -> Any:
    """The first true value of condition; it is asked again until then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise TimeoutError(f'{what}: not within {seconds} s')


def add_file(archive: tarfile.TarFile, name: str, data: bytes, mode: int = 0o644) -> None:
    header = tarfile.TarInfo(name)
    header.size, header.mode = len(data), mode
    archive.addfile(header, io.BytesIO(data))


def build_tar(files: Sequence[Tuple[str, bytes, int]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as archive:
        for name, data, mode in files:
            add_file(archive, name, data, mode)
    return buffer.getvalue()


def build_image(program: bytes) -> bytes:
    """The archive `docker save` would write for an image of one file."""
    architecture = {'x86_64': 'amd64', 'aarch64': 'arm64'}.get(os.uname().machine, os.uname().machine)
    layer = build_tar([('load', program, 0o755)])
    config = json.dumps({'architecture': architecture, 'os': 'linux', 'config': {'Entrypoint': ['/load']}, 'rootfs': {
        'type': 'layers', 'diff_ids': [f'sha256:{hashlib.sha256(layer).hexdigest()}']}}).encode()
    manifest = json.dumps([{'Config': 'config.json', 'RepoTags': [IMAGE], 'Layers': ['layer.tar']}]).encode()
    return build_tar([('manifest.json', manifest, 0o644), ('config.json', config, 0o644), ('layer.tar', layer, 0o644)])


def import_image(runtime: RealRuntime) -> None:
    """Build it, hand it to containerd, and wait until the CRI plugin, which hears of it by an event, has it too."""
    program, archive = f'{runtime.directory}/load', f'{runtime.directory}/image.tar'
    subprocess.run(['gcc', '-static', '-x', 'c', '-o', program, '-'], input=LOAD_C, text=True, check=True)
    with open(program, 'rb') as source, open(archive, 'wb') as target:
        target.write(build_image(source.read()))
    subprocess.run(['ctr', '-a', runtime.socket, '-n', 'k8s.io', 'images', 'import', archive], stdout=subprocess.DEVNULL,
                   check=True)
    list_images = runtime.channel.unary_unary('/runtime.v1.ImageService/ListImages')
    wait_for('image in the CRI plugin', lambda: IMAGE.encode() in list_images(b'', timeout=10))


def call_runtime(runtime: RealRuntime, method: str, **fields: Any) -> Any:
    """`ListContainers` with the fields of ListContainersRequest gives a ListContainersResponse."""
    request, answer = getattr(cri, f'{method}Request'), getattr(cri, f'{method}Response')
    return runtime.channel.unary_unary(
        f'/runtime.v1.RuntimeService/{method}', request_serializer=request.SerializeToString,
        response_deserializer=answer.FromString)(request(**fields), timeout=60)


def make_container(runtime: RealRuntime, sandbox_id: str, sandbox: cri.PodSandboxConfig, load: Load) -> str:
    config = cri.ContainerConfig(
        metadata=cri.ContainerMetadata(name=load.name, attempt=load.attempt), image=cri.ImageSpec(image=IMAGE),
        args=load.arguments, labels={**sandbox.labels, 'io.kubernetes.container.name': load.name},
        annotations={'io.kubernetes.container.restartCount': str(load.attempt)},
        linux=cri.LinuxContainerConfig(resources=cri.LinuxContainerResources(**load.resources)))
    container_id = call_runtime(runtime, 'CreateContainer', pod_sandbox_id=sandbox_id, config=config,
                                sandbox_config=sandbox).container_id
    if load.started:
        call_runtime(runtime, 'StartContainer', container_id=container_id)
    return container_id


def make_pod(runtime: RealRuntime, namespace: str, name: str, loads: Sequence[Load], attempt: int = 0, network: int = cri.NODE) -> Pod:
    """A pod as the kubelet makes it, usually in the host's network, which needs no CNI plugin."""
    uid = str(uuid.uuid5(uuid.NAMESPACE_DNS, f'{name}.{namespace}'))
    metadata = cri.PodSandboxMetadata(name=name, uid=uid, namespace=namespace, attempt=attempt)
    cgroup = f'{runtime.cgroup}/kubepods/burstable/pod{uid}'
    options = cri.NamespaceOption(network=network, pid=cri.CONTAINER, ipc=cri.POD)
    config = cri.PodSandboxConfig(
        metadata=metadata, labels={'io.kubernetes.pod.name': name, 'io.kubernetes.pod.namespace': namespace,
                                   'io.kubernetes.pod.uid': uid},
        annotations={'kubernetes.io/config.source': 'api'},
        linux=cri.LinuxPodSandboxConfig(cgroup_parent=f'/{cgroup}', security_context=cri.LinuxSandboxSecurityContext(
            namespace_options=options)))
    sandbox_id = call_runtime(runtime, 'RunPodSandbox', config=config).pod_sandbox_id
    return Pod(sandbox_id, metadata, {load.name: make_container(runtime, sandbox_id, config, load) for load in loads}, cgroup)


def child_pid(process: subprocess.Popen) -> int:
    """The process that unshare has started and waits for. ProcessLookupError: there is none."""
    if process.poll() is None:
        with open(f'/proc/{process.pid}/task/{process.pid}/children') as children:
            for pid in children.read().split():
                return int(pid)
    raise ProcessLookupError('containerd has ended')


def end_containerd(process: subprocess.Popen) -> None:
    """Kill the init of the namespace, which is gone once all that ran below it is gone, and unshare after it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child_pid(process), signal.SIGKILL)
        process.wait(30)
    process.kill()
    process.wait(30)


def remove_cgroups(name: str) -> None:
    for top in glob.glob(f'/sys/fs/cgroup/{name}') + glob.glob(f'/sys/fs/cgroup/*/{name}'):
        for directory, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(directory)


def bridge_of(mark: str) -> str:
    """Interfaces have names of 15 characters at most."""
    return mark.replace('kubensage-', 'ks')[:15]


def remove_bridge(mark: str) -> None:
    if os.path.exists(f'/sys/class/net/{bridge_of(mark)}'):
        subprocess.run(['ip', 'link', 'del', bridge_of(mark)], check=True)


def leftovers(mark: str) -> List[str]:
    """Processes and mounts that mention the mark, which is in a runtime's directory and in its cgroup; its cgroups and its
    bridge; and what the CNI library may have noted."""
    found = glob.glob(f'/sys/fs/cgroup/{mark}') + glob.glob(f'/sys/fs/cgroup/*/{mark}')
    found += glob.glob(f'/sys/class/net/{bridge_of(mark)}') + glob.glob(f'/var/lib/cni/**/*{mark}*', recursive=True)
    for path in glob.glob('/proc/[0-9]*/cmdline') + glob.glob('/proc/[0-9]*/cgroup') + glob.glob('/proc/[0-9]*/mountinfo'):
        with contextlib.suppress(OSError):
            with open(path, errors='replace') as file:
                found += [path] if mark in file.read() else []
    return found


@contextlib.contextmanager
def real_runtime(layers_seconds: int = 1) -> Iterator[RealRuntime]:
    """A containerd of our own with an image and no pods; nothing of it is left afterwards."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix='kubensage-'))
        cgroup = os.path.basename(directory)
        os.mkdir(f'{directory}/mounts')
        os.mkdir(f'{directory}/sandboxes')
        with open(f'{directory}/config.toml', 'w') as config:
            config.write(CONTAINERD_CONFIG.format(directory=directory, image=IMAGE, plugins=CNI_PLUGINS,
                                                  layers_seconds=layers_seconds))
        os.mkdir(f'{directory}/cni')
        if CNI_PLUGINS:
            with open(f'{directory}/cni/1.conflist', 'w') as config:
                config.write(CNI_CONFIG.format(directory=directory, bridge=bridge_of(cgroup)))
        log = stack.enter_context(open(f'{directory}/containerd.log', 'w+'))
        stack.callback(remove_cgroups, cgroup)
        stack.callback(remove_bridge, cgroup)
        process = subprocess.Popen([*CONTAINERD, directory], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        stack.callback(end_containerd, process)
        socket = f'{directory}/containerd.sock'
        try:
            wait_for('socket of containerd', lambda: os.path.exists(socket) or process.poll() is not None)
            channel = stack.enter_context(grpc.insecure_channel(f'unix:{socket}', agent.CRI_CHANNEL_OPTIONS))
            runtime = RealRuntime(directory, socket, child_pid(process), channel, cgroup)
            channel.unary_unary('/runtime.v1.RuntimeService/Version')(b'', timeout=15, wait_for_ready=True)
            import_image(runtime)
        except Exception:
            log.seek(0)
            sys.stderr.write(log.read())
            raise
        yield runtime


# --- the agent on the real runtime

class Cgroup(NamedTuple):
    """What the kernel says of one container."""
    usage_ns: int
    memory_bytes: int
    working_set_bytes: int
    rss_bytes: int
    page_faults: int
    major_page_faults: int


def read_cgroup_file(cgroup: str, v1: str, v2: str) -> str:
    """cpuacct.usage below any controller of v1 ("cpu,cpuacct" is one on most machines), or cpu.stat of v2."""
    with open((glob.glob(f'/sys/fs/cgroup/*/{cgroup}/{v1}') + [f'/sys/fs/cgroup/{cgroup}/{v2}'])[0]) as file:
        return file.read()


def read_cgroup(cgroup: str) -> Cgroup:
    cpu = read_cgroup_file(cgroup, 'cpuacct.usage', 'cpu.stat').split()
    memory = int(read_cgroup_file(cgroup, 'memory.usage_in_bytes', 'memory.current'))
    stat = dict(line.split() for line in read_cgroup_file(cgroup, 'memory.stat', 'memory.stat').splitlines())
    inactive, rss, faults, major = (int(stat.get(f'total_{v1}', stat.get(v2, 0))) for v1, v2 in (
        ('inactive_file', 'inactive_file'), ('rss', 'anon'), ('pgfault', 'pgfault'), ('pgmajfault', 'pgmajfault')))
    return Cgroup(int(cpu[0]) if len(cpu) == 1 else int(cpu[1]) * 1000, memory, memory - inactive, rss, faults, major)


def agent_command(runtime: RealRuntime, *arguments: str) -> List[str]:
    return [sys.executable, agent.__file__, '--output', 'json', '--cri-socket', runtime.socket, *arguments]


def run_agent_once(runtime: RealRuntime, *arguments: str) -> wire.Metrics:
    run = subprocess.run(agent_command(runtime, '--once', *arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                         check=True, timeout=30)
    if run.stderr:
        raise AssertionError(run.stderr)
    return json_format.Parse(run.stdout, wire.Metrics())


def containers_by_id(metrics: wire.Metrics) -> Dict[str, wire.ContainerMetrics]:
    return {container.id: container for pod in metrics.pod_metrics for container in pod.container_metrics}


def set_cgroup_fields(container: wire.ContainerMetrics) -> Cgroup:
    cpu, memory = container.cpu_metrics, container.memory_metrics
    return Cgroup(cpu.usage_core_nano_seconds.value, memory.usage_bytes.value, memory.working_set_bytes.value,
                  memory.rss_bytes.value, memory.page_faults.value, memory.major_page_faults.value)


class AgentLoop:
    """The agent as a process with a cycle of one second; its snapshots are read as they come."""

    def __init__(self, runtime: RealRuntime, *arguments: str):
        self.stderr = tempfile.TemporaryFile('w+')
        self.process = subprocess.Popen(agent_command(runtime, '--main-loop-duration', '1', *arguments), text=True,
                                        stdout=subprocess.PIPE, stderr=self.stderr)
        self.queue: 'queue.Queue[Tuple[float, str]]' = queue.Queue()
        self.reader = threading.Thread(target=self.read)
        self.reader.start()

    def read(self) -> None:
        for line in self.process.stdout:
            self.queue.put((time.monotonic(), line))

    def next_line(self) -> Tuple[float, wire.Metrics]:
        """The next snapshot, with the instant of the monotonic clock at which it came."""
        instant, line = self.queue.get(timeout=10)
        return instant, json_format.Parse(line, wire.Metrics())

    def next_lines(self, number: int) -> List[Tuple[float, wire.Metrics]]:
        return [self.next_line() for _ in range(number)]

    def log(self) -> str:
        self.stderr.seek(0)
        return self.stderr.read()

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        finally:
            self.process.kill()
            self.reader.join(10)
            self.process.stdout.close()
            self.stderr.close()


class RealRuntimeTest(unittest.TestCase):
    """One containerd for all; its bridge and its groups are gone when it is."""

    @classmethod
    def setUpClass(cls):
        reason = why_no_runtime()
        if reason:
            raise unittest.SkipTest(reason)
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        cls.runtime = stack.enter_context(real_runtime())
        cls.count_io()
        limited = {'memory_limit_in_bytes': 32 * MIB}
        wanted = [
            ('default', 'web', (Load('half', ('spin', '50')), Load('memory', ('alloc', '20'))), 1),
            ('batch', 'job', (Load('failed', ('exit', '3'), attempt=2), Load('side', ('cache', '2'))), 0),
            ('default', 'fresh', (Load('waiting', started=False),), 0),
            ('kube-system', 'store', (Load('writer', ('write', '3')),), 0),
            ('limits', 'busy', (Load('tenth', ('spin', '100'), resources={'cpu_period': 100_000, 'cpu_quota': 10_000, 'cpu_shares': 102}),
                                Load('disk', ('direct', '8'))), 0),
            ('limits', 'oom', (Load('hog', ('alloc', '64'), resources=limited), Load('again', ('alloc', '4'), 1, resources=limited),
                               Load('survivor', ('child', '64'), resources=limited)), 0),
            ('default', 'web', (Load('half', attempt=7),), 0),
        ]
        if CNI_PLUGINS:
            wanted.insert(0, ('limits', 'bridged', (Load('sender', ('send', '200')), Load('silent')), 0, cri.POD))
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            cls.pods = list(pool.map(lambda pod: make_pod(cls.runtime, *pod), wanted))
        # The sandbox of the web pod before it was made anew.
        call_runtime(cls.runtime, 'StopPodSandbox', pod_sandbox_id=cls.pods.pop().id)
        cls.ids = {name: container for pod in cls.pods for name, container in pod.containers.items()}
        cls.cgroups = {name: f'{pod.cgroup}/{container}' for pod in cls.pods for name, container in pod.containers.items()}
        for name, reason in (('failed', 'Error'), ('hog', 'OOMKilled')):
            wait_for(f'end of {name}', lambda: call_runtime(
                cls.runtime, 'ContainerStatus', container_id=cls.ids[name]).status.reason == reason)

    @classmethod
    def count_io(cls) -> None:
        """Since Linux 6.10, blkio.throttle.* of cgroup v1 counts nothing before the disk has had some limit, be it this one."""
        cls.counts_io = not os.path.isdir('/sys/fs/cgroup/blkio')
        number = os.stat(cls.runtime.directory).st_dev
        sysfs = os.path.realpath(f'/sys/dev/block/{os.major(number)}:{os.minor(number)}')
        disk = os.path.dirname(sysfs) if os.path.exists(f'{sysfs}/partition') else sysfs
        if not cls.counts_io and os.path.exists(f'{disk}/dev'):
            os.makedirs(f'/sys/fs/cgroup/blkio/{cls.runtime.cgroup}', exist_ok=True)
            with open(f'{disk}/dev') as device, open(
                    f'/sys/fs/cgroup/blkio/{cls.runtime.cgroup}/blkio.throttle.write_bps_device', 'w') as limit:
                limit.write(f'{device.read().strip()} {1 << 40}\n')
            cls.counts_io = True

    @classmethod
    @functools.lru_cache(None)
    def snapshot(cls) -> wire.Metrics:
        """One run for all tests of what stays as it is."""
        return run_agent_once(cls.runtime)

    @classmethod
    @functools.lru_cache(None)
    def three_cycles(cls) -> List[wire.Metrics]:
        loop = AgentLoop(cls.runtime)
        try:
            return [metrics for _, metrics in loop.next_lines(3)]
        finally:
            loop.close()

    def compare_with_cgroups(self, source: str, *names: str) -> None:
        """Containers at rest: every number is the kernel's. What moved between two readings is read again."""
        for _ in range(5):
            before = {name: read_cgroup(self.cgroups[name]) for name in names}
            containers = containers_by_id(run_agent_once(self.runtime, '--container-stats', source))
            if before == {name: read_cgroup(self.cgroups[name]) for name in names}:
                break
        self.assertEqual({source}, {containers[self.ids[name]].stats_source for name in names})
        if source == 'cgroup':
            # v2's own unit, in which v1's is sent too.
            before = {name: cgroup._replace(usage_ns=cgroup.usage_ns // 1000 * 1000) for name, cgroup in before.items()}
        self.assertEqual({name: set_cgroup_fields(containers[self.ids[name]]) for name in names}, before)

    def test_pods_and_containers(self):
        """All READY pods with what they were made with, in the agent's order; the stopped sandbox is not one of them."""
        start = time.time_ns()
        pods = self.snapshot().pod_metrics
        expected = sorted(self.pods, key=lambda pod: (pod.metadata.namespace, pod.metadata.name))
        self.assertEqual(
            [(pod.id, pod.namespace, pod.name, pod.uid, pod.attempt, pod.state) for pod in pods],
            [(pod.id, pod.metadata.namespace, pod.metadata.name, pod.metadata.uid, pod.metadata.attempt, 'SANDBOX_READY')
             for pod in expected])
        self.assertEqual(
            [[(container.id, container.name) for container in pod.container_metrics] for pod in pods],
            [[(container, name) for name, container in pod.containers.items()] for pod in expected])
        states = {container.name: (container.state, container.attempt, container.image)
                  for pod in pods if pod.namespace != 'limits' for container in pod.container_metrics}
        self.assertEqual(states, {
            'half': ('CONTAINER_RUNNING', 0, IMAGE), 'memory': ('CONTAINER_RUNNING', 0, IMAGE),
            'failed': ('CONTAINER_EXITED', 2, IMAGE), 'side': ('CONTAINER_RUNNING', 0, IMAGE),
            'waiting': ('CONTAINER_CREATED', 0, IMAGE), 'writer': ('CONTAINER_RUNNING', 0, IMAGE)})
        for pod in pods:
            for container in pod.container_metrics:
                self.assertTrue(start - 600 * 10**9 < pod.created_at < container.created_at < start)

    def test_containers_at_rest_equal_their_cgroups(self):
        for source in ('cgroup', 'cri'):
            with self.subTest(source):
                self.compare_with_cgroups(source, 'memory', 'side', 'writer')

    def test_both_sources_say_the_same(self):
        """What is counted lies between two answers of the runtime; what is measured differs by what moves meanwhile."""
        before, ours, after = (containers_by_id(run_agent_once(self.runtime, '--container-stats', source))
                               for source in ('cri', 'cgroup', 'cri'))
        compared = 0
        for name, number in self.ids.items():
            if before[number].HasField('cpu_metrics'):
                compared += 1
                with self.subTest(name):
                    found = [set_cgroup_fields(container[number]) for container in (before, ours, after)]
                    self.assertEqual(['cri', 'cgroup', 'cri'], [container[number].stats_source for container in (before, ours, after)])
                    for field in ('usage_ns', 'page_faults', 'major_page_faults'):
                        low, value, high = (getattr(cgroup, field) for cgroup in found)
                        self.assertTrue(low - 1000 < value <= high, (field, low, value, high))
                    for field in ('memory_bytes', 'working_set_bytes', 'rss_bytes'):
                        low, value, _ = (getattr(cgroup, field) for cgroup in found)
                        self.assertAlmostEqual(low, value, delta=MIB, msg=field)
                    limit = ours[number].memory_metrics.available_bytes.value
                    self.assertAlmostEqual(before[number].memory_metrics.available_bytes.value, limit, delta=MIB)
                    self.assertEqual(name in ('again', 'survivor'), limit > 0)
        self.assertEqual(10 if CNI_PLUGINS else 8, compared)

    def test_a_tenth_of_a_cpu(self):
        tenth = [containers_by_id(metrics)[self.ids['tenth']] for metrics in self.three_cycles()]
        # On a crowded machine the container does not get its tenth.
        crowded = os.getloadavg()[0] > os.cpu_count()
        for container in tenth[1:]:
            self.assertAlmostEqual(100e6, container.cpu_metrics.usage_nano_cores.value, delta=90e6 if crowded else 20e6)
        first, last = tenth[0].cgroup.cpu, tenth[-1].cgroup.cpu
        self.assertTrue(first.nr_throttled + (0 if crowded else 10) <= last.nr_throttled <= last.nr_periods, (first, last))
        # In each period it waits for what is left of 100 ms, on more CPUs at once than one.
        self.assertTrue(last.nr_throttled * 10_000 < last.throttled_usec < last.nr_throttled * 100_000 * os.cpu_count(), last)
        self.assertEqual((10_000, 100_000), (last.quota_usec, last.period_usec))
        self.assertIn((last.shares, last.weight), ((102, 0), (0, 4)))

    def test_a_kill_for_want_of_memory(self):
        """On cgroup v1 a kill counts in the container's own group alone, which goes with the container."""
        metrics = self.snapshot()
        containers = containers_by_id(metrics)
        hog, again, survivor = (containers[self.ids[name]] for name in ('hog', 'again', 'survivor'))
        self.assertEqual((137, 'OOMKilled', 0, 1), (hog.status.exit_code, hog.status.reason, hog.restart_count, again.restart_count))
        self.assertTrue(hog.created_at < hog.status.started_at_ns < hog.status.finished_at_ns < time.time_ns())
        self.assertEqual((True, False), (hog.status.HasField('exit_code'), again.status.HasField('exit_code')))
        self.assertEqual((0, 1), (again.cgroup.memory.events_oom_kill, survivor.cgroup.memory.events_oom_kill))
        self.assertEqual([32 * MIB] * 2, [container.cgroup.memory.max_bytes for container in (again, survivor)])
        pod = next(pod for pod in metrics.pod_metrics if pod.name == 'oom')
        self.assertEqual(('Burstable', next(made.cgroup for made in self.pods if made.id == pod.id)), (pod.qos_class, pod.cgroup.path))
        self.assertEqual(0 if os.path.isdir('/sys/fs/cgroup/memory') else 2, pod.cgroup.memory.events_oom_kill)

    def test_block_io(self):
        if not self.counts_io:
            self.skipTest('the directory is on no disk of its own')
        def written() -> List[wire.CgroupIo]:
            devices = containers_by_id(run_agent_once(self.runtime))[self.ids['disk']].cgroup.io
            return [device for device in devices if device.wbytes >= 8 * MIB]
        io = wait_for('8 MiB', written)
        # And whatever the file system notes meanwhile.
        self.assertTrue(8 * MIB <= io[0].wbytes < 9 * MIB and 8 <= io[0].wios < 100, io)

    @unittest.skipUnless(CNI_PLUGINS, 'not installed: the CNI plugins (containernetworking-plugins)')
    def test_traffic_of_a_pod_is_its_own(self):
        pods = {pod.name: pod for pod in self.snapshot().pod_metrics}
        bridged = pods.pop('bridged')
        self.assertEqual((False, ['eth0']), (bridged.host_network, [link.name for link in bridged.network_interfaces]))
        counters, frame = bridged.network_interfaces[0].counters, 14 + 20 + 8 + 1000
        # The kernel itself sends some to find IPv6 neighbours.
        self.assertTrue(200 <= counters.tx_packets < 230, counters)
        self.assertTrue(200 * frame <= counters.tx_bytes < 200 * frame + 30 * 100, counters)
        self.assertLess(counters.rx_packets, 100)
        self.assertEqual({(True, 0)}, {(pod.host_network, len(pod.network_interfaces)) for pod in pods.values()})

    def test_states_are_counted(self):
        runtime = self.snapshot().node_metrics.container_runtime
        self.assertEqual({'SANDBOX_READY': len(self.pods), 'SANDBOX_NOTREADY': 1}, dict(runtime.sandboxes))
        self.assertEqual(('containerd', True), (runtime.name, runtime.conditions['RuntimeReady']))
        self.assertEqual((3, 1), (runtime.containers['CONTAINER_EXITED'], runtime.containers['CONTAINER_CREATED']))

    def test_statistics_are_left_to_the_cgroups(self):
        """One call for the writable layers; in all others a minute and more goes by without one."""
        methods = {method.method: method.calls_total for method in self.three_cycles()[-1].agent_metrics.cri_methods}
        self.assertEqual((1, 3), (methods['ListContainerStats'], methods['ListContainers']))

    def test_memory_of_20_mib(self):
        memory = containers_by_id(self.snapshot())[self.ids['memory']].memory_metrics
        for field in ('usage_bytes', 'working_set_bytes', 'rss_bytes'):
            self.assertTrue(20 * MIB <= getattr(memory, field).value < 24 * MIB, f'{field}: {memory}')

    def test_half_a_cpu(self):
        """The first rate comes from the runtime or is absent, the others are the difference of the agent's two samples."""
        cgroup = self.cgroups['half']
        loop = AgentLoop(self.runtime, '--container-stats', 'cri')
        self.addCleanup(loop.close)
        samples, kernel, before, start = [], [], read_cgroup(cgroup), time.time_ns()
        for _ in range(4):
            metrics = loop.next_line()[1]
            after, end = read_cgroup(cgroup), time.time_ns()
            cpu = containers_by_id(metrics)[self.ids['half']].cpu_metrics
            usage, instant = cpu.usage_core_nano_seconds.value, cpu.timestamp
            self.assertTrue(before.usage_ns <= usage <= after.usage_ns, (before.usage_ns, usage, after.usage_ns))
            self.assertTrue(start <= instant <= end, (start, instant, end))
            samples.append((instant, usage, cpu.usage_nano_cores.value))
            kernel.append((end, after.usage_ns))
            before, start = after, instant
            # A second poller, which spoils the rate that containerd itself computes.
            call_runtime(self.runtime, 'ListContainerStats')
        for (instant, usage, _), (later, more, rate) in zip(samples, samples[1:]):
            self.assertEqual(rate, (more - usage) * 10**9 // (later - instant))
        mean = sum(rate for _, _, rate in samples[1:]) / 3
        self.assertAlmostEqual(mean, (kernel[-1][1] - kernel[0][1]) * 1e9 / (kernel[-1][0] - kernel[0][0]), delta=50e6)
        # On a crowded machine the container does not get its half.
        self.assertAlmostEqual(mean, 500e6, delta=50e6 if os.getloadavg()[0] < os.cpu_count() else 400e6)

    def test_not_running_have_no_cpu_and_no_memory(self):
        containers = containers_by_id(self.snapshot())
        known = {name: (containers[number].HasField('cpu_metrics'), containers[number].HasField('memory_metrics'))
                 for name, number in self.ids.items()}
        self.assertEqual(known, {name: (False, False) if name in ('failed', 'waiting', 'hog') else (True, True) for name in self.ids})

    def test_writable_layer_of_3_mib(self):
        """containerd measures layers in the background, here once a second; the directory is the snapshotter's."""
        def measured() -> List[wire.FileSystemMetrics]:
            layers = [containers_by_id(run_agent_once(self.runtime))[self.ids[name]] for name in ('writer', 'failed')]
            return all(layer.HasField('file_system_metrics') for layer in layers) and [
                layer.file_system_metrics for layer in layers]
        full, empty = wait_for('writable layer', measured)
        self.assertTrue(3 * MIB <= full.used_bytes.value < 3 * MIB + 65536, full)
        self.assertTrue(empty.used_bytes.value < 65536, empty)
        self.assertEqual(full.mountpoint, f'{self.runtime.directory}/mounts/root/io.containerd.snapshotter.v1.overlayfs')
        # The file, the directory, and the mount points runc makes for /dev, /etc, /proc and /sys.
        self.assertEqual(full.inodes_used.value, empty.inodes_used.value + 1)
        self.assertTrue(abs(full.timestamp - time.time_ns()) < 10 * 10**9)

    def test_stopped_containerd(self):
        """The node's snapshots keep their pace without pods; the pods are back by the second cycle after."""
        loop = AgentLoop(self.runtime)
        self.addCleanup(loop.close)
        self.addCleanup(os.kill, self.runtime.pid, signal.SIGCONT)
        self.assertEqual([len(metrics.pod_metrics) for _, metrics in loop.next_lines(1)], [len(self.pods)])
        os.kill(self.runtime.pid, signal.SIGSTOP)
        stopped = loop.next_lines(3)[1:]
        os.kill(self.runtime.pid, signal.SIGCONT)
        again = loop.next_lines(3)[1:]
        for (instant, metrics), (later, _) in zip(stopped, stopped[1:]):
            self.assertAlmostEqual(later - instant, 1, delta=0.3)
        self.assertEqual([len(metrics.pod_metrics) for _, metrics in stopped], [0, 0])
        self.assertTrue(all(metrics.node_metrics.HasField('total_memory') for _, metrics in stopped))
        self.assertEqual([len(metrics.pod_metrics) for _, metrics in again], [len(self.pods)] * 2)
        for _, metrics in again:
            self.assertTrue(containers_by_id(metrics)[self.ids['half']].cpu_metrics.HasField('usage_nano_cores'))
        loop.process.terminate()
        self.assertEqual(loop.process.wait(10), 0)
        self.assertEqual(loop.log().count('WARNING container runtime:'), 1, loop.log())
        self.assertEqual(loop.log().count('container runtime: well again'), 1, loop.log())

    def test_nothing_stays_behind(self):
        """What real_runtime starts ends with it, also when what it is used for fails."""
        with self.assertRaises(ZeroDivisionError), real_runtime() as runtime:
            make_pod(runtime, 'default', 'short', (Load('running'), Load('waiting', started=False)))
            self.assertTrue(leftovers(runtime.cgroup))
            raise ZeroDivisionError
        self.assertEqual(leftovers(runtime.cgroup), [])
        self.assertFalse(os.path.exists(runtime.directory))


# --- README

README = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'README.md')
# Of other programs: build_zipapp.sh, systemctl, protoc, .ci/bench.
FOREIGN_FLAGS = {'--native', '--now', '--proto_path', '--python_out', '--short'}
PROMISE = ("every snapshot taken is delivered at least once while it is younger than the retention, whatever the relay, the runtime, "
           "the kernel's files or the disk do; the agent neither hangs nor grows nor needs a restart")


class ReadmeTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        with open(README, encoding='utf-8') as file:
            cls.readme = file.read()

    def section(self, title):
        return re.search(rf'^## {re.escape(title)}\n(.*?)(?=^## |\Z)', self.readme, re.MULTILINE | re.DOTALL).group(1)

    def rows(self, title):
        """The cells of the section's table, without its header."""
        lines = [line.strip('| ').split(' | ') for line in self.section(title).splitlines() if line.startswith('|')]
        return lines[2:]

    def test_help_is_the_one_that_the_agent_prints(self):
        """But for white space: argparse breaks lines otherwise, and called the options optional arguments before Python 3.10.
        Remake with `COLUMNS=100 python3 kubensage-agent.pyz --help`."""
        pasted = re.search(r'^\$ python3 kubensage-agent\.pyz --help\n(.*?)^```', self.readme, re.MULTILINE | re.DOTALL).group(1)
        with mock.patch.dict(os.environ, {'COLUMNS': '100', 'NO_COLOR': '1'}):
            printed = agent.argument_parser().format_help()
        self.assertEqual(''.join(pasted.split()), ''.join(printed.replace('optional arguments:', 'options:').split()))

    def test_every_flag_of_the_agent_and_no_other(self):
        named = set(re.findall(r'(?<![\w-])--[a-z][\w-]*', self.readme))
        self.assertEqual(named - FOREIGN_FLAGS, {*agent.FLAGS, '--help', '--version'})

    def test_every_field_of_the_proto_and_no_other(self):
        named = {(message.strip('`'), field) for _, message, fields in self.rows('What it collects')
                 for field in re.findall(r'`(\w+)`', fields)}
        known = {(name, field.name) for name, message in wire.DESCRIPTOR.message_types_by_name.items()
                 for field in message.fields if not name.startswith('Serialized')}
        self.assertEqual(named, known)

    def test_every_file_named_is_there(self):
        paths = [path for files, _ in self.rows('Files') for path in re.findall(r'`([^`]+)`', files)]
        self.assertIn('agent.py', paths)
        for path in paths:
            with self.subTest(path):
                self.assertTrue(os.path.isfile(os.path.join(os.path.dirname(README), path)))

    def test_the_promise(self):
        self.assertIn(f'> {PROMISE}\n', self.readme)

    def test_every_method_of_the_runtime_that_is_called(self):
        for method in agent.CRI_ANSWERS:
            with self.subTest(method):
                self.assertIn(method, self.section('What it collects'))

    def test_versions_to_install_are_those_of_the_archive(self):
        with open(os.path.join(os.path.dirname(README), 'build_zipapp.sh'), encoding='utf-8') as file:
            pinned = dict(re.findall(r' (grpcio|protobuf)-([\d.]+)-', file.read()))
        installed = dict(re.findall(r'\b(grpcio|protobuf)==([\d.]+)', self.readme))
        self.assertEqual(installed, pinned)


if __name__ == '__main__':
    unittest.main()
