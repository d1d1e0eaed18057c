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
import calendar
import contextlib
import ctypes
import errno
import fcntl
import gc
import glob
import gzip
import hashlib
import http.client
import importlib.machinery
import importlib.util
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
import shlex
import shutil
import signal
import socket
import ssl
import stat
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import termios
import textwrap
import threading
import time
import tracemalloc
import types
import unittest
import urllib.parse
import uuid
import zipfile
import zlib
from typing import Dict, List, NamedTuple, Tuple
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
# kernel 6.12, Debian 13, x86_64; some interfaces, padding shortened
NET_DEV = '''\
Inter-|   Receive                                                |  Transmit
 face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed
    lo:     0     0  0  0  0   0        0       0      0     0  0  0  0   0     0        0
enp0s3:   50152   196  0  0  0   0        0       0  29478   145  0  0  0   0     0        0
  cni0:  324400  5942  0  0  0   0        0      54 169286850  6438  0  2  0   0     0        0
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
Tcp: RtoAlgorithm RtoMin RtoMax MaxConn ActiveOpens PassiveOpens AttemptFails EstabResets CurrEstab \
InSegs OutSegs RetransSegs InErrs
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
# kernel 6.12, Debian 13, x86_64: two CPUs
ZERO_COLUMNS = ' 00000000' * 9
SOFTNET_STAT = f'''\
000021d7 00000000 0000001c{ZERO_COLUMNS} 00000000 00000000 00000000
00002760 00000000 0000001c{ZERO_COLUMNS} 00000001 00000000 00000000
'''
# kernel 6.12, Debian 13, x86_64; padding shortened, and of the sockets some, without the last columns
ARP = '''\
IP address       HW type     Flags       HW address            Mask     Device
10.88.0.2        0x1         0x2         a2:8f:a8:88:d3:f5     *        cni0
10.0.2.2         0x1         0x2         52:55:0a:00:02:02     *        enp0s3
'''
TCP = '''\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 3414 1
   1: 0100007F:A921 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 3683 1
   2: 0F02000A:0016 0202000A:87D8 01 00000000:00000000 02:000AAB8C 00000000     0        0 3556 2
'''
UDP = '''\
   sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref
 1836: 0F02000A:0044 00000000:0000 07 00000000:00000000 00:00000000 00000000   998        0 3345 2
'''
# scheduler/sched-stats.rst, version 15
SCHEDSTAT = '''\
version 15
timestamp 4294937241
cpu0 1 2 3 4 5 6 7000000007 8000000008 9
domain0 3 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31 32 33 34 35 36
cpu1 11 12 13 14 15 16 17000000017 18000000018 19
'''
# net/sunrpc/stats.c, fs/nfs; the counts of the procedures shortened
RPC_NFS = '''\
net 1 2 3 4
rpc 5 6 7
proc4 3 1 2 3
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
    'proc/pressure/memory': 'some avg10=1.50 avg60=2.50 avg300=3.50 total=4\n'
                            'full avg10=5.50 avg60=6.50 avg300=7.50 total=8\n',
    'proc/pressure/io': 'some avg10=0.01 avg60=0.02 avg300=0.03 total=9\n',
    'proc/pressure/irq': 'full avg10=0.04 avg60=0.05 avg300=0.06 total=10\n',
    'proc/loadavg': LOADAVG,
    'proc/vmstat': VMSTAT,
    'proc/sys/fs/file-nr': FILE_NR,
    'proc/sys/kernel/threads-max': '31175\n',
    'proc/sys/kernel/pid_max': '4194304\n',
    'proc/sys/kernel/random/entropy_avail': '255\n', 'proc/sys/kernel/random/poolsize': '256\n',
    'proc/sys/kernel/hung_task_detect_count': '1\n',
    'proc/sys/net/netfilter/nf_conntrack_count': '129\n',
    'proc/sys/net/netfilter/nf_conntrack_max': '65536\n',
    'proc/1/net/snmp': SNMP, 'proc/1/net/netstat': NETSTAT, 'proc/1/net/sockstat': SOCKSTAT,
    'proc/1/net/softnet_stat': SOFTNET_STAT, 'proc/1/net/arp': ARP, 'proc/1/net/tcp': TCP, 'proc/1/net/udp': UDP,
    'proc/1/net/rpc/nfs': RPC_NFS,
    'proc/schedstat': SCHEDSTAT,
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
    'sys/class/net/enp0s3/ifindex': '2\n', 'sys/class/net/enp0s3/mtu': '1500\n',
    'sys/class/net/enp0s3/flags': '0x1003\n', 'sys/class/net/enp0s3/address': '52:54:00:d1:3d:13\n',
    'sys/class/net/enp0s3/operstate': 'up\n', 'sys/class/net/enp0s3/carrier': '1\n',
    'sys/class/net/enp0s3/speed': '-1\n', 'sys/class/net/enp0s3/statistics/rx_nohandler': '21\n',
    'sys/fs/cgroup/cgroup.controllers': 'cpu io memory pids\n',
    'sys/fs/cgroup/cpu.stat': 'usage_usec 277710\nuser_usec 113250\nsystem_usec 164460\n',
    'sys/fs/cgroup/cpu.pressure': PRESSURE_CPU,
    'sys/fs/cgroup/system.slice/kubelet.service/cpu.stat': CPU_STAT,
    'sys/fs/cgroup/system.slice/kubelet.service/memory.current': '7258112\n',
    'sys/fs/cgroup/system.slice/ssh.service/cpu.stat': CPU_STAT,
    'etc/os-release': OS_RELEASE,
    'etc/debian_version': '13.7\n',
    'etc/machine-id': 'D249C0486159F80557CE12D99828162B\n',
    'data/empty': '',
}


# --- what every test has

LIVE = agent.Roots('/proc', '/sys', '/')
HERE = os.path.dirname(os.path.abspath(agent.__file__))
SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]
NOBODY = 65534
# Longer than anything takes; nothing waits that long unless it fails.
PATIENCE_SECONDS = 30
# More rounds of what goes by chance.
LONG = bool(os.environ.get('KUBENSAGE_TEST_LONG'))
# For a process that the tests start: no settings of the person who runs them, and no home.
ENVIRONMENT = {name: os.environ[name] for name in ('PATH', 'PYTHONPATH', 'LD_LIBRARY_PATH') if name in os.environ}
# Where grpc comes from the archive, the archive is unpacked already.
SITE = os.path.dirname(os.path.dirname(grpc.__file__))
if SITE.endswith(SUFFIX[:-len('.so')]):
    ENVIRONMENT['KUBENSAGE_CACHE'] = os.path.dirname(SITE)
IMPORT_AGENT = f'import sys; sys.path.insert(0, {HERE!r}); import agent'
needs_root = unittest.skipIf(os.geteuid(), 'needs root')


def setUpModule():
    logging.getLogger('kubensage-agent').addHandler(logging.NullHandler())
    logging.getLogger('grpc').setLevel(logging.CRITICAL)


def write_tree(root, files):
    """A node's files by their paths below its root: proc/..., sys/... and the rest."""
    for path, content in files.items():
        os.makedirs(os.path.dirname(os.path.join(root, path)), exist_ok=True)
        with open(os.path.join(root, path), 'wb') as file:
            file.write(content if isinstance(content, bytes) else content.encode())
    return agent.Roots(f'{root}/proc', f'{root}/sys', root)


def read_binary(path):
    with open(path, 'rb') as file:
        return file.read()


def read_text(path):
    return read_binary(path).decode(errors='replace')


def mode_of(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def present(message):
    """The names of the fields that are set, in the order of their numbers."""
    return [field.name for field, _ in message.ListFields()]


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


class Result(NamedTuple):
    """How a run of the agent ended, and what it said."""
    code: int
    out: str
    err: str

    @property
    def troubles(self):
        """The lines of stderr; being no root is no trouble here."""
        return [line for line in self.err.splitlines() if 'not root:' not in line]


class Process(subprocess.Popen):
    def result(self):
        out, err = self.communicate(timeout=PATIENCE_SECONDS)
        return Result(self.returncode, out, err)

    def next_snapshot(self):
        """The next line of its output. A process that says nothing is killed, and this is an error."""
        impatience = threading.Timer(PATIENCE_SECONDS, self.kill)
        impatience.start()
        try:
            return json_format.Parse(self.stdout.readline(), wire.Metrics())
        finally:
            impatience.cancel()
            impatience.join()

    def end(self):
        self.kill()
        with self:
            self.wait()


class Case(unittest.TestCase):
    """A directory of its own, which may be the root of a node; no thread and no process stays behind."""
    maxDiff = None

    def setUp(self):
        self.addCleanup(self.check_threads, set(threading.enumerate()))
        self.directory = self.new_directory()
        self.socket = f'{self.directory}/run/cri.sock'
        # Arguments for an agent on that node.
        self.node = ['--procfs', f'{self.directory}/proc', '--sysfs', f'{self.directory}/sys', '--rootfs',
                     self.directory, '--cri-socket', self.socket, '--log-file', f'{self.directory}/log']
        for directory in 'proc', 'sys':
            os.mkdir(f'{self.directory}/{directory}')

    def check_threads(self, before):
        for state in gc.get_objects():
            if type(state) is agent.RuntimeState:
                # Whoever still holds it: the thread of its statistics ends.
                state.stats_calls.put(None)
        for thread in set(threading.enumerate()) - before:
            thread.join(PATIENCE_SECONDS)
            self.assertFalse(thread.is_alive(), f'{thread} has stayed behind')

    def new_directory(self):
        directory = tempfile.TemporaryDirectory()
        self.addCleanup(directory.cleanup)
        return os.path.realpath(directory.name)

    def write(self, files):
        """These files in the directory of the test."""
        return write_tree(self.directory, files)

    def tree(self, files):
        """A node that has these files and no others."""
        return write_tree(self.new_directory(), files)

    def spawn(self, command, environment=ENVIRONMENT, **settings):
        """A process that ends with the test at the latest."""
        usual = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                     cwd=self.directory)
        process = Process(command, env=environment, **{**usual, **settings})
        self.addCleanup(process.end)
        return process

    def start(self, *arguments, environment={}, change='', prefix=(), **settings):
        """The agent in a process of its own, on the node of the test; with a change, made before its main() runs."""
        program = ('-c', f'{IMPORT_AGENT}; {change}; sys.exit(agent.main())') if change else (agent.__file__,)
        command = [*prefix, sys.executable, *program, *self.node, *arguments]
        return self.spawn(command, {**ENVIRONMENT, **environment}, **settings)

    def main(self, *arguments, environment={}, encoding='utf-8'):
        """The agent in this process, with no arguments but these."""
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) for _ in range(2))
        root, log = logging.getLogger(), logging.getLogger('kubensage-agent')
        self.addCleanup(os.umask, os.umask(0o022))
        self.addCleanup(gc.unfreeze)
        with mock.patch.dict(os.environ, {**ENVIRONMENT, **environment}, clear=True), \
                mock.patch.multiple(agent, ONCE_PAUSE_SECONDS=0, ONCE_INTERVAL_SECONDS=0), \
                mock.patch.multiple(root, handlers=[], level=root.level), mock.patch.object(log, 'filters', []), \
                mock.patch.object(logging, 'raiseExceptions', True), \
                contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = agent.main(arguments)
            except SystemExit as end:
                code = end.code or 0
            for handler in root.handlers:
                handler.close()
        return Result(code, *(file.buffer.getvalue().decode() for file in (out, err)))

    def patch(self, **values):
        """Names of agent.py have these values until the end of the test."""
        patch = mock.patch.multiple(agent, **values)
        patch.start()
        self.addCleanup(patch.stop)

    def tool(self, *command):
        """What a program of this machine prints; skips where it is absent or refuses."""
        try:
            return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True,
                                  encoding='utf-8', env={**os.environ, 'LC_ALL': 'C'}).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            self.skipTest(f'{command[0]}: {error}')

    def complaints(self, text):
        """What promtool says of an exposition, but of names that are node_exporter's."""
        self.tool('promtool', '--version')
        run = self.spawn(['promtool', 'check', 'metrics'], stdin=subprocess.PIPE, stderr=subprocess.STDOUT)
        said, _ = run.communicate(text, PATIENCE_SECONDS)
        return [line for line in said.splitlines() if not re.fullmatch(
            r"node_\w+ (metric names should be written in 'snake_case' not 'camelCase'|"
            r'use base unit "bytes" instead of "bits"|'
            r'non-histogram and non-summary metrics should not have "_count" suffix)', line)]

    def check_parse(self, parse, accepted, malformed):
        """accepted: what it is → (text, value); malformed: what it is → (text, the part that the error names), and of
        a file of lines what the others say."""
        for what, (text, value) in accepted.items():
            with self.subTest(what):
                self.assertEqual(value, parse(text))
        for what, (text, named, *rest) in malformed.items():
            with self.subTest(what):
                with self.assertRaises(agent.MALFORMED) as raised:
                    parse(text)
                self.assertIn(named, str(raised.exception))
                if rest:
                    self.assertEqual(rest, [raised.exception.rest])

    def check_table(self, function, table):
        """(arguments, result) of a function without side effects; one argument needs no tuple."""
        for arguments, result in table:
            with self.subTest(arguments=arguments):
                self.assertEqual(result, function(*arguments if isinstance(arguments, tuple) else (arguments,)))

    def check_close(self, listed, ours, deltas):
        """Numbers that move between an oracle's look and ours: by no more than these."""
        for number, value, delta in zip(listed, ours, deltas):
            self.assertAlmostEqual(number, value, delta=delta)

    def settled(self, oracle, ours):
        """What both say while nothing moves: read again until the oracle says the same before and after."""
        for _ in range(20):
            before, value = oracle(), ours()
            if before == oracle():
                break
        return before, value


# --- private paths

def replace_by_link(path):
    os.rename(path, f'{path}.real')
    os.symlink(f'{path}.real', path)


class PrivatePathsTest(Case):
    def test_directory_that_others_could_exchange_is_refused_with_all_below(self):
        writable = 'is writable by others'
        for number, (reason, change, *arguments) in enumerate((
                ('is a symbolic link', replace_by_link), (writable, os.chmod, 0o775), (writable, os.chmod, 0o707),
                ('belongs to user 65534', os.chown, NOBODY, 0))):
            if change is os.chown and os.geteuid():
                continue
            path = f'{self.directory}/{number}'
            self.write({f'{number}/below/file': ''})
            self.assertIsNone(agent.check_path(f'{path}/below'))
            change(path, *arguments)
            for refused in path, f'{path}/below':
                with self.subTest(refused, reason=reason), \
                        self.assertRaisesRegex(agent.UnsafePath, f'^{path} {reason}'):
                    agent.check_path(refused)

    def test_what_is_no_directory_is_refused(self):
        self.write({'file': ''})
        with self.assertRaisesRegex(agent.UnsafePath, 'file is not a directory$'):
            agent.check_component(f'{self.directory}/file')

    def test_what_is_ours_in_a_sticky_directory_is_fine_and_so_is_what_is_roots(self):
        os.mkdir(f'{self.directory}/own')
        os.chmod(self.directory, 0o1777)
        self.assertIsNone(agent.check_path(f'{self.directory}/own'))
        with as_nobody():
            self.assertIsNone(agent.check_path('/proc/sys'))

    def test_lock_of_a_directory_ends_with_its_descriptor(self):
        at_once = fcntl.LOCK_EX | fcntl.LOCK_NB
        shared = [agent.lock_directory(self.directory, fcntl.LOCK_SH) for _ in range(2)]
        for descriptor in shared:
            opened = os.listdir('/proc/self/fd')
            self.assertIsNone(agent.lock_directory(self.directory, at_once))
            self.assertEqual(os.listdir('/proc/self/fd'), opened)
            os.close(descriptor)
        os.close(agent.lock_directory(self.directory, at_once))
        os.symlink(self.directory, f'{self.directory}/link')
        with self.assertRaises(OSError):
            agent.lock_directory(f'{self.directory}/link', at_once)


# --- the bundle

REAL_ARCHIVE = os.path.join(HERE, agent.ARCHIVE_NAME)
OTHER_SUFFIX = '.cpython-300-pdp11-linux-gnu.so'
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
        'sys.stdin.read()\nimport agent\nsys.exit(agent.main())\n')


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


def targets_of(archive):
    """The member for each suffix."""
    return dict(line.split() for line in archive.read('bundle.txt').decode().splitlines())


def files_of(directory):
    """Every file below, by relative path, with what would tell that it was written again."""
    found = {}
    for parent, _, names in os.walk(directory):
        for path in (os.path.join(parent, name) for name in names):
            status = os.lstat(path)
            found[os.path.relpath(path, directory)] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


class BundleCase(Case):
    """An archive of the real agent.py with a bundle that a few bytes make up, and an empty cache."""

    @classmethod
    def setUpClass(cls):
        with tempfile.TemporaryDirectory() as directory:
            compiled = py_compile.compile(f'{HERE}/agent.py', f'{directory}/agent.pyc', doraise=True,
                                          invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
            cls.compiled_agent = read_binary(compiled)

    def setUp(self):
        super().setUp()
        self.cache = f'{self.directory}/cache'
        self.archive, self.member = self.build_archive(PACKED)
        self.unpacked = self.tree_of(self.member)

    def build_archive(self, packed, bundle=None, name=None):
        digest = hashlib.sha256(packed).hexdigest()[:16]
        member, path = f'x86_64-{digest}.tar.xz', f'{self.directory}/{name or digest}.pyz'
        with zipfile.ZipFile(path, 'w') as archive:
            for entry, data in {'__main__.py': MAIN, 'agent.pyc': self.compiled_agent, 'cri_pb2.py': '',
                                'kubensage_pb2.py': '', 'bundle.txt': f'{SUFFIX} {member}\n' if bundle is None
                                else bundle, member: packed}.items():
                if data != 'absent':
                    archive.writestr(entry, data)
        return path, member

    def use_archive(self, *members):
        """One with these members before those that it usually has."""
        self.archive, self.member = self.build_archive(pack_tar([*members, *WANTED.items()]))
        self.unpacked = self.tree_of(self.member)

    def tree_of(self, member):
        return os.path.join(self.cache, member.partition('.')[0] + SUFFIX[:-len('.so')])

    def start_archive(self, *options, archive=None, environment={}, **settings):
        environment = {'PATH': os.environ['PATH'], 'KUBENSAGE_CACHE': self.cache, **environment}
        return self.spawn([sys.executable, *options, archive or self.archive], environment, **settings)

    def run_archive(self, *options, **settings):
        return self.start_archive(*options, **settings).result()

    def ready(self):
        return agent.ready_tree(self.archive, self.member, SUFFIX, self.cache)

    def assert_runs(self, result, tree=None):
        tree = tree or self.unpacked
        self.assertEqual(result, Result(0, f'{tree}/grpc/__init__.py\n{tree}/google/__init__.py\n', ''))

    def assert_one_line(self, result, pattern):
        self.assertRegex(result.err, rf'\Akubensage-agent: .*(?:{pattern}).*\n\Z')
        self.assertEqual((result.out, result.code), ('', 1))

    def mount(self, options):
        """A tmpfs as the cache."""
        os.mkdir(self.cache)
        command = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', self.cache]
        if os.geteuid() or not shutil.which('mount') or subprocess.run(command, stderr=subprocess.DEVNULL).returncode:
            self.skipTest('needs a mount(2) that is permitted')
        self.addCleanup(subprocess.run, ['umount', '-l', self.cache], check=True)


class CachePlace(BundleCase):
    def test_cache_is_where_the_environment_says(self):
        for expected, environment in (
                ('/c', {'KUBENSAGE_CACHE': '/c', 'XDG_CACHE_HOME': '/x', 'HOME': '/h'}),
                (os.path.abspath('c'), {'KUBENSAGE_CACHE': 'c'}),
                ('/c', {'KUBENSAGE_CACHE': '/b/../c/'}),
                ('/x/kubensage-agent', {'XDG_CACHE_HOME': '/x', 'HOME': '/h'}),
                ('/h/.cache/kubensage-agent', {'KUBENSAGE_CACHE': '', 'XDG_CACHE_HOME': '', 'HOME': '/h/'}),
                (None, {'HOME': ''}),
                (None, {})):
            with self.subTest(environment), as_nobody():
                self.assertEqual(agent.cache_directory(environment), expected)

    @needs_root
    def test_cache_of_root_is_not_below_a_home(self):
        home = {'XDG_CACHE_HOME': '/x', 'HOME': '/h'}
        self.assertEqual(agent.cache_directory(home), '/var/cache/kubensage-agent')
        self.assertEqual(agent.cache_directory({**home, 'KUBENSAGE_CACHE': '/c'}), '/c')

    def test_unwritable_cache_gives_way_to_a_temporary_one_with_one_warning(self):
        temporary = f'{self.directory}/tmp'
        os.mkdir(temporary)
        result = self.run_archive(environment={'KUBENSAGE_CACHE': '/sys/kubensage-agent', 'TMPDIR': temporary})
        self.assertRegex(result.out, rf'\A{temporary}/kubensage-agent-\w+/x86_64-')
        self.assertRegex(result.err, r'\Akubensage-agent: /sys/kubensage-agent: '
                                     rf'.*{temporary}/kubensage-agent-.*KUBENSAGE_CACHE.*\n\Z')
        self.assertEqual((result.code, os.listdir(temporary)), (0, []))

    def test_user_without_home_gets_a_temporary_cache(self):
        temporary = f'{self.directory}/tmp'
        os.mkdir(temporary)
        os.chmod(temporary, 0o1777)
        os.chmod(self.directory, 0o755)
        for environment in {}, {'HOME': '/dev/null'}, {'HOME': '/sys'}, {'HOME': '', 'XDG_CACHE_HOME': '/sys/x'}:
            with self.subTest(environment), as_nobody(), mock.patch.object(tempfile, 'tempdir', temporary), \
                    contextlib.redirect_stderr(io.StringIO()) as stderr:
                tree = agent.find_tree(self.archive, self.member, SUFFIX, environment)
                self.assertEqual(os.path.dirname(os.path.dirname(tree)), temporary)
                self.assertEqual(mode_of(os.path.dirname(tree)), 0o700)
                self.assertRegex(stderr.getvalue(), r'\Akubensage-agent: .*for this run alone.*\n\Z')

    def test_archive_and_cache_may_be_anywhere_and_written_in_odd_ways(self):
        odd = f"{self.directory}/a %20%s 'b\u00e9"
        os.mkdir(odd)
        shutil.copy(self.archive, f'{odd}/agent.pyz')
        os.symlink(odd, f'{self.directory}/link')
        for archive, cache, cwd in (
                ('agent.pyz', f'/{self.cache}', odd), (f'{odd}/agent.pyz', f'{self.cache}//', '/'),
                ('link/agent.pyz', 'cache', self.directory), ('../link/agent.pyz', './x/../../cache', odd)):
            with self.subTest(archive=archive, cache=cache):
                result = self.run_archive(archive=archive, environment={'KUBENSAGE_CACHE': cache}, cwd=cwd)
                self.assert_runs(result._replace(out=result.out.replace('//', '/')))

    def test_files_are_unpacked_as_they_are(self):
        tree = self.ready()
        for path, text in WANTED.items():
            self.assertEqual(read_text(f'{tree}/{path}'), text)

    def test_nobody_else_may_enter_whatever_the_umask(self):
        for umask in 0, 0o022, 0o777:
            with self.subTest(oct(umask)):
                top = f'{self.directory}/{umask}'
                self.cache = f'{top}/new/cache'
                self.assert_runs(self.run_archive(umask=umask), self.tree_of(self.member))
                self.assertEqual({mode_of(parent) for parent, _, _ in os.walk(top)}, {0o700})
                self.assertEqual({mode_of(f'{top}/{name}') for name in files_of(top)}, {0o600})


class CacheRaces(BundleCase):
    def use_slow_archive(self, lines):
        """One that takes a while to unpack: a module of many lines is compiled."""
        slow = '\n'.join(f'x{number} = [{number}, "a"]' for number in range(lines))
        self.use_archive(('grpc/slow.py', slow))

    def test_ten_starts_at_once_all_succeed_and_leave_the_present_version_alone(self):
        self.write({'cache/a-1.cpython-39-x/file': ''})
        self.use_slow_archive(4000)
        # Imported all it can, each waits for the end of its stdin.
        runs = [self.start_archive(stdin=subprocess.PIPE) for _ in range(10)]
        for run in runs:
            run.stdin.close()
            run.stdin = None
        for run in runs:
            self.assert_runs(run.result())
        self.assertEqual(os.listdir(self.cache), [os.path.basename(self.unpacked)])
        self.assertLessEqual({*WANTED, *BYTE_CODE}, set(files_of(self.unpacked)))

    def test_start_killed_while_unpacking_is_made_good_by_the_next(self):
        self.use_slow_archive(20000)
        run = self.start_archive()
        wait_for('the unpacking', lambda: glob.glob(f'{self.cache}/{agent.UNPACKING}*/grpc'))
        run.kill()
        self.assertEqual(run.wait(), -signal.SIGKILL)
        self.assertRegex(' '.join(os.listdir(self.cache)), rf'\A{agent.UNPACKING}\S+\Z')
        self.assert_runs(self.run_archive())
        self.assertEqual(os.listdir(self.cache), [os.path.basename(self.unpacked)])

    def test_leftovers_do_not_keep_the_next_start_from_its_room(self):
        self.mount('size=1m,mode=0700')
        self.write({f'cache/{agent.UNPACKING}killed/half': 'x' * 900_000})
        self.use_archive(('grpc/big.pem', 'x' * 500_000))
        self.assert_runs(self.run_archive())

    def test_later_runs_write_nothing_whatever_the_options(self):
        prefix = f'{self.directory}/prefix'
        for given in ('', '-I', '-B', '-O', '-S -E', '-s -OO', f'PYTHONPYCACHEPREFIX={prefix}', 'PYTHONSAFEPATH=1',
                      'PYTHONDONTWRITEBYTECODE=1'):
            environment = dict(re.findall('(.+)=(.+)', given))
            options = [] if environment else given.split()
            with self.subTest(given):
                shutil.rmtree(self.cache, ignore_errors=True)
                self.assert_runs(self.run_archive(*options, environment=environment))
                before = files_of(self.unpacked)
                self.assertEqual(set(before), {*WANTED, *BYTE_CODE})
                self.assert_runs(self.run_archive(*options, environment=environment))
                self.assertEqual((files_of(self.unpacked), len(os.listdir(self.cache))), (before, 1))
                self.assertFalse(os.path.exists(f'{prefix}{self.directory}'))

    def test_of_other_versions_only_what_a_process_holds_stays(self):
        names = 'a-1.cpython-39-x', 'a-1.cpython-311-x', 'a-2.cpython-39-x', 'a-3.cpython-39-x', 'foreign'
        self.write({f'cache/{name}/file': '' for name in names})
        holder = agent.lock_directory(f'{self.cache}/a-2.cpython-39-x', fcntl.LOCK_SH)
        agent.clean_cache(self.cache, 'a-1')
        self.assertEqual({*names} - {*os.listdir(self.cache)}, {'a-3.cpython-39-x'})
        os.close(holder)
        agent.clean_cache(self.cache, 'a-1')
        self.assertEqual({*os.listdir(self.cache)}, {*names[:2], 'foreign'})

    def test_running_process_holds_its_tree(self):
        self.assertTrue(agent.hold_tree(self.ready()))
        self.assertIsNone(agent.lock_directory(self.unpacked, fcntl.LOCK_EX | fcntl.LOCK_NB))


class CacheAttacks(BundleCase):
    def setUp(self):
        super().setUp()
        self.marker = f'{self.directory}/marker'
        self.evil = f'open({self.marker!r}, "w")\n{FAKE_GRPC}'

    def assert_runs(self, result, tree=None):
        super().assert_runs(result, tree)
        self.assertFalse(os.path.exists(self.marker), 'code that is not from the archive was run')

    def test_path_that_others_could_exchange_ends_the_run(self):
        """Even a whole tree in such a place is not used."""
        self.cache = f'{self.directory}/parent/cache'
        self.assertEqual(self.ready(), self.tree_of(self.member))
        for path in os.path.dirname(self.cache), self.cache:
            os.chmod(path, 0o777)
            self.assert_one_line(self.run_archive(), f'not unpacking into {self.cache}: {path} is writable by others')

    def test_tree_that_others_could_exchange_is_replaced(self):
        for attack, *arguments in (os.chmod, 0o777), (replace_by_link,):
            with self.subTest(attack.__name__):
                attack(self.ready(), *arguments)
                write_tree(self.unpacked, {'grpc/__init__.py': self.evil})
                self.assertEqual(read_text(f'{self.ready()}/grpc/__init__.py'), FAKE_GRPC)
                self.assertFalse(os.path.islink(self.unpacked))

    def test_cache_that_is_no_directory_ends_the_run(self):
        self.write({'cache': ''})
        self.assert_one_line(self.run_archive(), 'cannot unpack into .*cache')

    def test_what_else_is_in_the_cache_is_not_used_and_no_trouble(self):
        self.write({'cache/a-1.cpython-39-x': 'a file', f'cache/{agent.UNPACKING}file': 'a file',
                    f'cache/{agent.UNPACKING}x/grpc/__init__.py': self.evil})
        os.symlink('/', f'{self.cache}/a-2.cpython-39-x')
        self.assert_runs(self.run_archive())

    def test_byte_code_of_another_cache_prefix_is_not_imported(self):
        prefix = f'{self.directory}/prefix'
        self.assert_runs(self.run_archive(environment={'PYTHONPYCACHEPREFIX': prefix}))
        self.write({'evil.py': self.evil})
        for path in BYTE_CODE:
            py_compile.compile(f'{self.directory}/evil.py',
                               f'{prefix}{self.unpacked}/{path.replace("__pycache__/", "")}',
                               invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
        self.assert_runs(self.run_archive(environment={'PYTHONPYCACHEPREFIX': prefix}))

    def test_hostile_member_ends_the_run(self):
        for number, member in enumerate((
                f'{self.directory}/outside.py', '../outside.py', '../../outside.py', 'grpc/../../../outside.py', '..',
                *(tar_member('odd.py', type=kind, linkname='grpc/__init__.py') for kind in (
                    tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, b'\xfe')),
                # There is another one.
                'grpc/__init__.py')):
            with self.subTest(str(member), number=number):
                self.use_archive((member, self.evil))
                with self.assertRaisesRegex(agent.BundleError, 'not to be trusted|cannot unpack .*: File exists'):
                    agent.find_tree(self.archive, self.member, SUFFIX, {'KUBENSAGE_CACHE': self.cache})
                self.assertEqual((os.listdir(self.cache), glob.glob(f'{self.directory}/out*')), ([], []))
        self.assert_one_line(self.run_archive(), 'File exists')

    def test_grpc_that_lies_around_is_not_imported(self):
        around, site = f'{self.directory}/around', f'{self.directory}/site'
        self.write({f'{place}/{name}/__init__.py': self.evil for place in ('around', 'site')
                    for name in ('grpc', 'google', 'google/protobuf', 'typing_extensions')})
        self.write({
            'site/grpcio-9.9.9.dist-info/METADATA': 'Name: grpcio\nVersion: 9.9.9\n',
            # What the .pth file of a namespace package does, before the agent starts.
            'site/google-nspkg.pth': 'import sys, types; sys.modules.update(google=types.ModuleType("google"), '
                                     'grpc=types.ModuleType("grpc"), **{"google.protobuf": types.ModuleType("x")})\n',
            'custom/sitecustomize.py': f'import site\nsite.addsitedir({site!r})\n'})
        for options, path in (((), ''), ((), around), ((), f':{around}:{self.directory}/custom'), (('-I',), around)):
            with self.subTest(options=options, path=path):
                self.assert_runs(self.run_archive(*options, cwd=around, environment={'PYTHONPATH': path}))


class BundleTroubles(BundleCase):
    def test_no_target_leaves_it_to_an_installed_grpcio_and_without_one_is_one_line(self):
        archive, _ = self.build_archive(
            PACKED, f'{OTHER_SUFFIX} a.tar.xz\n.cpython-301-vax-linux-gnu.so a.tar.xz\n', 'other')
        self.assert_one_line(self.run_archive('-I', '-S', archive=archive), f'{SUFFIX[1:-3]}: other.pyz has it for '
                             'cpython-300-pdp11-linux-gnu, cpython-301-vax-linux-gnu; .*build_zipapp.sh --native')
        installed = f'{self.directory}/installed'
        write_tree(installed, {path: text for path, text in WANTED.items() if path.endswith('.py')})
        self.assert_runs(self.run_archive(archive=archive, environment={'PYTHONPATH': installed}), installed)
        self.assertFalse(os.path.exists(self.cache))

    def test_damaged_archive_is_one_line_and_leaves_no_tree(self):
        # xz stores what it cannot compress, and its check comes last: a flipped bit of the first noise is not noticed
        # by it.
        noise = random.Random(1).randbytes(192_000).decode('latin-1')
        large = pack_tar([*list(WANTED.items())[:-1], ('grpc/_cython/cygrpc' + SUFFIX, noise),
                          ('after' + OTHER_SUFFIX, noise)])
        middle, member = len(large) // 3, f'x86_64-{hashlib.sha256(large).hexdigest()[:16]}.tar.xz'
        self.ready()
        for name, packed, *bundle in (
                ('flipped bit', large[:middle] + bytes([large[middle] ^ 1]) + large[middle + 1:], f'{SUFFIX} {member}'),
                ('truncated', large[:middle]), ('empty', b''), ('no xz', b'not xz at all'),
                ('no tar', lzma.compress(b'not a tar at all' * 100)),
                ('no module for it', pack_tar(UNWANTED.items())),
                ('no such member', large, f'{SUFFIX} absent.tar.xz'), ('no bundle.txt', large, 'absent'),
                ('bundle.txt is garbage', large, 'a b c\n'), ('bundle.txt is binary', large, b'\xff\xfe')):
            with self.subTest(name):
                archive, _ = self.build_archive(packed, *bundle)
                if name == 'flipped bit':
                    with zipfile.ZipFile(archive, 'a') as file:
                        file.writestr(member, packed)
                self.assert_one_line(self.run_archive('-I', '-S', archive=archive),
                                     'damaged|not to be trusted|no bundle')
                self.assertEqual(os.listdir(self.cache), [os.path.basename(self.unpacked)])

    def check_another_place(self, options, reason):
        self.mount(options)
        self.use_archive(('grpc/big.pem', 'x' * 1_000_000))
        run = self.run_archive()
        self.assertEqual((0, []), (run.code, os.listdir(self.cache)), run.err)
        self.assertRegex(run.err, rf'\Akubensage-agent: .*{reason}.*unpacking into .* for this run alone.*\n\Z')

    def test_full_cache_has_another_place(self):
        self.check_another_place('size=200k,mode=0700', 'No space left on device')

    def test_cache_without_exec_has_another_place(self):
        self.check_another_place('noexec,mode=0700', 'noexec')

    def test_cache_that_is_read_only_serves_what_is_there(self):
        self.mount('mode=0700')
        self.assert_runs(self.run_archive())
        subprocess.run(['mount', '-o', 'remount,ro', self.cache], check=True)
        self.assert_runs(self.run_archive())
        self.use_archive(('other.pem', ''))
        self.assertRegex(self.run_archive().err,
                         r'\Akubensage-agent: .*Read-only file system.*for this run alone.*\n\Z')

    def test_module_outside_an_archive_unpacks_nothing_if_grpcio_is_there(self):
        with_grpcio = importlib.util.find_spec('grpc') is not None
        self.assertEqual(agent.find_archive(), None if with_grpcio else REAL_ARCHIVE)


@unittest.skipUnless(os.path.exists(REAL_ARCHIVE), 'kubensage-agent.pyz has not been built: ./build_zipapp.sh')
class RealArchive(Case):
    @classmethod
    def setUpClass(cls):
        directory = tempfile.TemporaryDirectory()
        cls.addClassCleanup(directory.cleanup)
        cls.cache, cls.home = f'{directory.name}/cache', f'{directory.name}/home'
        os.mkdir(cls.home)
        with zipfile.ZipFile(REAL_ARCHIVE) as archive:
            cls.targets = targets_of(archive)

    def run_python(self, *arguments):
        environment = {'PATH': os.environ['PATH'], 'KUBENSAGE_CACHE': self.cache, 'HOME': self.home}
        result = self.spawn([sys.executable, *arguments], environment).result()
        self.assertEqual(result.code, 0, result.err)
        return result.out

    def test_archive_runs_with_this_interpreter(self):
        for options in (), ('-I',):
            with self.subTest(options):
                self.assertEqual(self.run_python(*options, REAL_ARCHIVE, '--version'),
                                 f'kubensage-agent {agent.__version__}\n')
                snapshot = self.run_python(*options, REAL_ARCHIVE, '--once', '--output', 'json')
                self.assertIn('node_metrics', json.loads(snapshot))
        self.assertEqual(os.listdir(self.home), [])

    def test_archive_wins_over_what_is_installed(self):
        code = (f'import sys; sys.path.insert(0, {REAL_ARCHIVE!r}); import agent, google.protobuf; '
                'print(agent.grpc, google.protobuf)')
        self.assertEqual(self.run_python('-c', code).count(self.cache), 2)

    def test_archive_has_every_python_on_both_processors_within_its_size(self):
        if len(self.targets) == 1:
            self.skipTest('built with --native')
        self.assertEqual(set(self.targets), {f'.cpython-3{minor}-{processor}-linux-gnu.so' for minor in range(9, 15)
                                             for processor in ('x86_64', 'aarch64')})
        self.assertLessEqual(os.path.getsize(REAL_ARCHIVE), 24_000_000)


class Build(Case):
    """build_zipapp.sh in a copy, among the commands that we let it see."""
    COMMANDS = ('bash cat chmod cp cut dirname find grep head mkdir mv rm sed sha256sum sort tail tar touch uname wc '
                'xz').split()
    SCRIPT = read_text(f'{HERE}/build_zipapp.sh')
    PINS = re.search(r"^WHEELS='\n(.*?)^'", SCRIPT, re.S | re.M).group(1)

    def setUp(self):
        super().setUp()
        self.copy, self.commands = f'{self.directory}/copy', f'{self.directory}/bin'
        for directory in self.copy, self.commands:
            os.mkdir(directory)
        for name in 'agent.py', 'cri_pb2.py', 'kubensage_pb2.py', 'build_zipapp.sh':
            shutil.copy(f'{HERE}/{name}', self.copy)
        for name in self.COMMANDS:
            os.symlink(shutil.which(name) or self.skipTest(f'needs {name}'), f'{self.commands}/{name}')
        self.stub('python3', f'exec {sys.executable} "$@"')

    def stub(self, name, script):
        self.write({f'bin/{name}': f'#!{shutil.which("bash")}\n{script}\n'})
        os.chmod(f'{self.commands}/{name}', 0o755)

    def build(self, *arguments, script='./build_zipapp.sh', cwd=None):
        return self.spawn(['bash', script, *arguments], {'PATH': self.commands}, cwd=cwd or self.copy).result()

    def test_pins_are_fifteen_wheels_with_their_hashes(self):
        digests, names = zip(*re.findall('^([0-9a-f]{64})  (.+)$', self.PINS, re.M))
        self.assertEqual((len(self.PINS.splitlines()), len(set(names)), len(set(digests))), (15, 15, 15))
        projects = re.findall(r'^(grpcio|protobuf)-.*(x86_64|aarch64)', '\n'.join(names), re.M)
        for processor in 'x86_64', 'aarch64':
            self.assertEqual([projects.count((project, processor)) for project in ('grpcio', 'protobuf')], [6, 1])

    def test_what_is_missing_is_said_in_one_line(self):
        no_pip = f'case "$*" in *pip*) exit 1; esac; exec {sys.executable} "$@"'
        offline = ('case "$*" in *pip\\ --version*) exit; esac; '
                   'case "$*" in *pip\\ download*) echo "WARNING: Retrying" >&2; '
                   'echo "ERROR: no route to host" >&2; exit 1; esac; '
                   f'exec {sys.executable} "$@"')
        for pattern, command, script, *arguments in (
                ('unknown argument --nativ; --native', 'wc', '', '--nativ'),
                ('xz is missing .*xz-utils', 'xz', ''), ('python3 is missing', 'python3', ''),
                ('has no pip .*python3-pip', 'python3', no_pip),
                ('cannot download grpcio-.*ERROR: no route to host', 'python3', offline),
                ('no grpcio wheel for cp\\d+ on pdp11', 'uname', 'echo pdp11', '--native')):
            with self.subTest(pattern):
                kept = f'{self.directory}/kept'
                os.rename(f'{self.commands}/{command}', kept)
                if script:
                    self.stub(command, script)
                result = self.build(*arguments)
                self.assertRegex(result.err, rf'\Abuild_zipapp.sh: .*{pattern}.*\n\Z')
                self.assertEqual((result.code, result.out, glob.glob(f'{self.copy}/*.pyz')), (1, '', []))
                os.replace(kept, f'{self.commands}/{command}')

    def test_wheel_with_another_hash_is_refused(self):
        _, _, digest, name, *_ = self.PINS.split()
        self.write({f'copy/.build/{name}': 'other',
                    'copy/build_zipapp.sh': self.SCRIPT.replace(self.PINS, f'{digest}  {name}\n')})
        self.assertRegex(self.build().err, r'\Abuild_zipapp.sh: \S+whl has another hash than the pinned one.*\n\Z')

    def test_archive_of_small_wheels_is_the_same_from_anywhere_and_runs(self):
        """The pins of the copy are those of wheels of a few bytes, for this interpreter."""
        python, processor = f'cp3{sys.version_info.minor}', os.uname().machine
        pins = ''
        os.mkdir(f'{self.copy}/.build')
        for name, *members in (
                (f'grpcio-1-{python}-{python}-manylinux_{processor}.whl',
                 'grpc/__init__.py', 'grpc/_cython/cygrpc' + SUFFIX),
                (f'protobuf-6-cp39-abi3-manylinux_{processor}.whl',
                 'google/_upb/_message.abi3.so', 'protobuf-6.dist-info/METADATA')):
            with zipfile.ZipFile(f'{self.copy}/.build/{name}', 'w') as wheel:
                for member in members:
                    wheel.writestr(member, WANTED[member])
            pins += f'{hashlib.sha256(read_binary(wheel.filename)).hexdigest()}  {name}\n'
        self.write({'copy/build_zipapp.sh': self.SCRIPT.replace(self.PINS, pins)})
        archive, seen = f'{self.copy}/kubensage-agent.pyz', []
        for script, cwd in (('./build_zipapp.sh', self.copy), ('copy/build_zipapp.sh', self.directory)):
            result = self.build('--native', script=script, cwd=cwd)
            self.assertEqual((result.err, result.code), ('', 0))
            seen.append(read_binary(archive))
        self.assertEqual(*seen)
        with zipfile.ZipFile(archive) as file:
            self.assertEqual({info.date_time for info in file.infolist()}, {(1980, 1, 1, 0, 0, 0)})
            self.assertEqual(file.namelist(), sorted(file.namelist()))
            [(suffix, member)] = targets_of(file).items()
            digest = hashlib.sha256(file.read(member)).hexdigest()[:16]
            self.assertEqual((suffix, member), (SUFFIX, f'{processor}-{digest}.tar.xz'))
        cache = f'{self.directory}/cache'
        environment = {'PATH': f'{self.commands}:{os.environ["PATH"]}', 'KUBENSAGE_CACHE': cache}
        result = self.spawn([archive], environment).result()
        self.assertRegex(result.out, f'{cache}/.*/grpc/__init__.py\n{cache}/.*/google/__init__.py\n')
        self.assertEqual((result.err, result.code), ('', 0))


# --- files

class FilesTest(Case):
    def test_what_is_absent_is_none(self):
        cycle = agent.Cycle(self.write({'etc/file': 'x'}), 5, {})
        for path in '/etc/none', '/etc/no/directory', '/etc/file/below':
            for read in agent.read_bytes, agent.read_small, agent.read_text, agent.read_line, agent.read_int:
                with self.subTest(read=read.__name__, path=path):
                    self.assertIsNone(cycle.read(path, len, read))
            self.assertEqual([], cycle.names(path))
        self.assertEqual(([], {}), (cycle.names('/etc/file'), cycle.failures))

    def test_what_this_user_may_not_read_is_none(self):
        cycle = agent.Cycle(self.write({'etc/file': 'x', 'etc/directory/x': ''}), 5, {})
        for name in 'file', 'directory':
            os.chmod(f'{self.directory}/etc/{name}', 0)
            self.addCleanup(os.chmod, f'{self.directory}/etc/{name}', 0o700)
        os.chmod(self.directory, 0o755)
        with as_nobody():
            self.assertIsNone(cycle.read('/etc/file'))
            self.assertEqual([], cycle.names('/etc/directory'))
        self.assertEqual({}, cycle.failures)

    def test_other_errors_are_the_callers(self):
        """/proc/PID/mem opens, and has nothing at address 0: EIO."""
        for read in agent.read_small, agent.read_bytes:
            with self.assertRaises(OSError) as raised:
                read('/proc/self/mem')
            self.assertEqual(errno.EIO, raised.exception.errno)

    def test_speed_of_loopback_is_none(self):
        if not os.access('/sys/class/net/lo/speed', os.R_OK):
            self.skipTest('this kernel has no /sys/class/net/lo/speed')
        self.assertIsNone(agent.read_int('/sys/class/net/lo/speed'))
        with self.assertRaisesRegex(OSError, 'Invalid argument'):
            agent.read_text('/sys/class/net/lo/speed')

    def test_long_file_and_text_that_is_not_utf8(self):
        data = bytes(range(256)) * 1024
        self.write({'long': data, 'comm': b'a\xff\xfe\n'})
        self.assertEqual(data, agent.read_bytes(f'{self.directory}/long'))
        self.assertEqual('a\ufffd\ufffd\n', agent.read_text(f'{self.directory}/comm'))

    def test_line_is_without_white_space_and_empty_is_none(self):
        self.write({'a': ' one two \n', 'empty': '', 'blank': ' \n'})
        self.assertEqual(['one two', None, None],
                         [agent.read_line(f'{self.directory}/{name}') for name in ('a', 'empty', 'blank')])

    def test_numbers(self):
        for text, number in ('12\n', 12), ('0x1003\n', 0x1003), ('-1\n', -1), ('\n', None):
            self.write({'number': text})
            self.assertEqual(number, agent.read_int(f'{self.directory}/number'))
        # Python takes the last two.
        for text in 'up', '1_000', '\u0663':
            self.write({'word': text})
            with self.assertRaisesRegex(ValueError, repr(text)):
                agent.read_int(f'{self.directory}/word')

    def test_malformed_line_costs_itself_and_is_named_and_shortened(self):
        for error in agent.MALFORMED:
            def parse(line):
                if line[0] == 'x':
                    raise error(line)
                return line
            with self.subTest(error=error.__name__), \
                    self.assertRaisesRegex(agent.Malformed, "^malformed line: 'x{200}'$") as raised:
                agent.parse_lines(f'1\n\n{"x" * 999}\n \nx\n2\f\u2028', parse)
            self.assertEqual(['1', '2\f\u2028'], raised.exception.rest)

    def test_numbers_are_those_that_a_kernel_writes(self):
        for text in '1_000', '\u0661', 'x', '':
            with self.subTest(text):
                self.assertRaises(ValueError, agent.parse_number, text)
                self.assertRaises(ValueError, agent.parse_numbers, f'1 {text or "x"}')
                self.assertRaises(ValueError, agent.parse_flat_keyed, f'a 1\nb {text}\n')
        self.assertEqual((-7, 0.5, [1, 22]), (
            agent.parse_number('-7'), agent.parse_number('0.5', float), agent.parse_numbers(' 1  22\n')))


# --- files that stay open

class OpenFilesTest(Case):
    def open(self, *paths):
        files = agent.OpenFiles(len(paths))
        files.descriptors[:] = [
            os.open(path, os.O_RDONLY | os.O_CLOEXEC) if os.path.exists(path) else None for path in paths]
        return files

    def test_what_they_say_is_read_from_their_beginning_each_time(self):
        self.write({'a': '1\n', 'b': ''})
        files = self.open(*(f'{self.directory}/{name}' for name in ('a', 'none', 'b')))
        self.assertEqual([b'1\n', None, b''], agent.read_open_files(files.descriptors))
        self.write({'a': '22\n'})
        self.assertEqual([b'22\n', None, b''], agent.read_open_files(files.descriptors))

    def test_one_that_has_gone_is_none_one_that_fails_its_errno_and_the_others_are_read(self):
        """As a control group's, whose files answer ENODEV then; a process's answer ESRCH."""
        with subprocess.Popen(['sleep', '60']) as process:
            files = self.open(f'/proc/{process.pid}/statm', '/proc/self/statm')
            self.assertTrue(all(agent.read_open_files(files.descriptors)))
            process.kill()
        failing = self.open('/proc/self/mem')
        gone, error, own = agent.read_open_files([files.descriptors[0], failing.descriptors[0], files.descriptors[1]])
        self.assertEqual((None, errno.EIO, bytes), (gone, error, type(own)))

    def test_the_limit_is_raised_as_far_as_that_is_granted(self):
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (300, hard))
        agent.raise_open_files_limit()
        expected = min(hard, agent.MAX_OPEN_FILES) if hard > 0 else agent.MAX_OPEN_FILES
        self.assertEqual((expected, hard), resource.getrlimit(resource.RLIMIT_NOFILE))
        agent.raise_open_files_limit()
        self.assertEqual(expected, agent.open_files_limit())
        with mock.patch.object(resource, 'setrlimit', side_effect=PermissionError):
            resource.prlimit(0, resource.RLIMIT_NOFILE, (300, hard))
            agent.raise_open_files_limit()
        self.assertEqual(300, agent.open_files_limit())


# --- messages

class MessagesTest(unittest.TestCase):
    def test_fill_leaves_nothing_older(self):
        message = wire.Stat(procs_running=1, procs_blocked=2, intr=3)
        agent.fill(message, {'procs_running': 0, 'intr': None, 'softirq': 4})
        self.assertEqual(message, wire.Stat(procs_running=0))

    def test_fill_known_leaves_the_rest_and_known_tells_absent_from_0(self):
        message = wire.Stat(procs_running=1, procs_blocked=2)
        agent.fill_known(message, procs_running=0, procs_blocked=None, intr=3)
        self.assertEqual(message, wire.Stat(procs_running=0, procs_blocked=2, intr=3))
        self.assertEqual([agent.known(message, name) for name in ('procs_running', 'ctxt')], [0, None])

    def test_fill_wrapped_clears_what_has_no_value_and_0_is_one(self):
        message = wire.MemoryMetrics(timestamp=1, usage_bytes=UInt64Value(value=2), page_faults=UInt64Value(value=3))
        agent.fill_wrapped(message, {'usage_bytes': None, 'rss_bytes': 0, 'page_faults': 4})
        self.assertEqual(message, wire.MemoryMetrics(timestamp=1, rss_bytes=UInt64Value(),
                                                     page_faults=UInt64Value(value=4)))

    def test_fill_list_lengthens_and_shortens_in_place(self):
        messages = wire.NodeMetrics().diskstats
        first = messages.add()
        for rows in (1, 2, 3), (4, 5), (6,), (7, 8):
            agent.fill_list(messages, rows, lambda message, row: agent.fill(message, {'in_flight': row}))
            self.assertEqual([message.in_flight for message in messages], list(rows))
            self.assertEqual(first.in_flight, rows[0])
        agent.fill_list(messages, (), agent.fill)
        self.assertEqual(len(messages), 0)

    def test_message_that_is_filled_again_and_again_does_not_grow(self):
        """One whose wrappers are cleared each time takes 6 MB after these."""
        message, psi, resident = wire.CgroupCpu(), wire.PsiMetrics(), []
        for count in 1000, 100_000:
            for number in range(count):
                agent.fill(message.stat, {'usage_usec': number, 'nr_periods': None if number % 2 else 1})
                agent.fill_wrapped(psi.some, {'total': number, 'avg10': 2, 'avg60': 3, 'avg300': 4})
            # Otherwise growth could take place in what was freed before.
            agent.libc().malloc_trim(0)
            resident.append(int(read_text('/proc/self/statm').split()[1]) * agent.PAGE_SIZE_BYTES)
        self.assertLess(resident[1] - resident[0], 2e6)


# --- cycle

class CycleTest(Case):
    def test_paths_are_those_of_the_node(self):
        def paths(*roots):
            return [agent.Cycle(agent.Roots(*roots), 5, {}).path(path) for path in ('/proc/x/y', '/sys/x', '/etc/x')]
        self.assertEqual(['/proc/x/y', '/sys/x', '/etc/x'], paths(*LIVE))
        self.assertEqual(['/p/x/y', '/s/x', '/r/etc/x'], paths('/p', '/s', '/r'))

    def test_file_that_fails_or_is_malformed_is_named_and_costs_what_comes_from_it(self):
        cycle = agent.Cycle(self.write({'etc/a': 'x 1\ny\n', 'etc/b': 'word\n', 'etc/c': 'a' * 999}), 5, {})
        os.symlink('/proc/self/mem', f'{self.directory}/etc/d')
        cycle.current = 's'
        self.assertEqual([{'x': 1}, None, None, None, None, 4], [
            cycle.read('/etc/a', agent.parse_flat_keyed), cycle.read_int('/etc/b'), cycle.read('/etc/d'),
            cycle.read('/etc/none', int), cycle.read_line('/etc/c', lambda text: [][0]),
            cycle.read_line('/etc/b', len)])
        self.assertEqual({
            's: a': "/etc/a: malformed line: 'y'", 's: b': "/etc/b: invalid literal for int() with base 0: 'word'",
            's: c': f'/etc/c: malformed: {"a" * 200!r}', 's: d': '/etc/d: Input/output error'}, cycle.failures)
        self.assertEqual(4, cycle.failed_reads)

    def test_the_runtime_has_a_share_of_the_interval(self):
        for interval, share in (0.5, 0.4), (5, 4), (3600, 4):
            before = time.monotonic()
            cycle = agent.Cycle(LIVE, interval, {})
            self.assertTrue(before <= cycle.now <= time.monotonic())
            self.assertTrue(before + share <= cycle.deadline <= time.monotonic() + share)
        for cycle.deadline, left in (before, 0.1), (math.inf, math.inf):
            self.assertEqual(cycle.seconds_left(), left)


# --- CPU

def collected(collect, roots, state=None, cycle=None):
    """What a collect_ of the node writes into an empty message."""
    node = wire.NodeMetrics()
    collect(node, state or agent.NodeState(10), cycle or agent.Cycle(roots, 5, {}))
    return node


def collected_node(roots, state=None):
    """All subjects of the node, and what failed, by subject or by subject and file."""
    cycle = agent.Cycle(roots, 5, {})
    return collected(agent.collect_node, roots, state, cycle), cycle.failures


def columns(first, count):
    """`1 2 3 ...`: each column another number."""
    return ' '.join(map(str, range(first, first + count)))


CpuTimes = agent.CpuTimes
# `cpu 1 2 3 4`
FOUR = wire.CpuSeconds(user=0.01, nice=0.02, system=0.03, idle=0.04)


class CpuTest(Case):
    def test_stat(self):
        self.check_parse(agent.parse_stat, {
            'columns in order': (f'cpu {columns(1, 10)}', ({'cpu': CpuTimes(
                user=1, nice=2, system=3, idle=4, iowait=5, irq=6, softirq=7, steal=8, guest=9, guest_nice=10)}, {})),
            'oldest': ('cpu0 1 2 3 4', ({'cpu0': CpuTimes(1, 2, 3, 4, 0, 0, 0, 0, 0, 0)}, {})),
            'extra column': (f'cpu {columns(1, 11)}', ({'cpu': CpuTimes(*range(1, 11))}, {})),
            'no number of a CPU': ('cpu05 1 2 3 4', ({}, {'cpu05': 1})),
            'empty': ('', ({}, {})),
        }, {
            'too few columns': ('cpu 1 2 3\n', "malformed line: 'cpu 1 2 3'", ({}, {})),
            'not a number': ('btime 1\ncpu 1 2 x 4\ncpu0 1 2 3 4', "'cpu 1 2 x 4'",
                             ({'cpu0': CpuTimes(1, 2, 3, 4)}, {'btime': 1})),
            'no number': ('ctxt\n', "'ctxt'", ({}, {})),
        })

    def test_cpuinfo(self):
        self.check_parse(agent.parse_cpuinfo, {
            'a last block that is no CPU': ('processor: 3\n\nHardware: BCM2835\n',
                                            {3: {'processor': '3', 'Hardware': 'BCM2835'}}),
            'value with a colon': ('processor: 0\nisa: a:b\n', {0: {'processor': '0', 'isa': 'a:b'}}),
            'empty': ('', {}),
        }, {
            'no colon': ('processor: 0\nmodel\n', "malformed line: 'model'", {0: {'processor': '0'}}),
            'processor is no number': ('processor: first\n', 'first', {}),
        })

    def test_schedstat(self):
        """Lines of another form are skipped, as those of the domains are."""
        def times(*numbers):
            return dict(zip(('run_ns', 'wait_ns', 'timeslices'), numbers))
        self.check_parse(agent.parse_schedstat, {
            'columns in order': (SCHEDSTAT, {0: times(7000000007, 8000000008, 9),
                                             1: times(17000000017, 18000000018, 19)}),
            'cut': (f'cpu0 {columns(1, 8)}\ncpu1 {columns(1, 9)}\n', {1: times(7, 8, 9)}),
            'not a number': (f'cpu0 {columns(1, 8)} x\n', {}), 'empty': ('', {}),
        }, {})

    def test_time_that_tasks_ran_and_waited_is_that_of_their_cpu(self):
        stat = f'cpu0 {columns(1, 10)}\ncpu1 {columns(1, 10)}\ncpu2 {columns(1, 10)}\n'
        node = self.collect({'proc/stat': stat, 'proc/schedstat': SCHEDSTAT})
        names = 'cpu', 'run_ns', 'wait_ns', 'timeslices'
        self.assertEqual([(0, 7000000007, 8000000008, 9), (1, 17000000017, 18000000018, 19), (2, None, None, None)],
                         [tuple(agent.known(cpu, name) for name in names) for cpu in node.cpu_infos])

    def test_percent_is_busy_of_elapsed_time(self):
        zero = CpuTimes(0, 0, 0, 0)
        self.check_table(agent.cpu_percent, [
            ((zero, CpuTimes(*range(1, 11))),
             75.0),    # of 1 + ... + 8, without idle 4 and iowait 5; guest is in user
            ((zero, CpuTimes(0, 0, 0, 7, 3)), 0.0),
            ((CpuTimes(1, 0, 0, 50), CpuTimes(6, 0, 0, 40)), 100.0),              # idle went backwards
            ((CpuTimes(1, 0, 0, 1, 50), CpuTimes(2, 0, 0, 2, 40)), 50.0),         # iowait went backwards
            ((CpuTimes(*range(1, 11)), CpuTimes(*range(1, 11))), None),
            ((CpuTimes(1, 0, 0, 301), CpuTimes(6, 0, 0, 1)), None),               # it was offline meanwhile
            ((zero, CpuTimes(1, 0, 0, 8_640_001)), None), ((zero, CpuTimes(0, 0, 0, 8_640_001), 2), 0.0),
        ])

    def collect(self, files, state=None):
        return collected(agent.collect_cpu, self.tree(files), state)

    def test_arm_names_are_those_of_lscpu_and_else_the_numbers(self):
        def names(implementer, part):
            info, _ = agent.collect_cpu_info(0, {'CPU implementer': implementer, 'CPU part': part},
                                             agent.Cycle(self.tree({}), 5, {}))
            return info.vendor_id, info.model
        self.check_table(names, [
            (('0x41', '0xd0c'), ('ARM', 'Neoverse-N1')), (('0xc0', '0xac4'), ('Ampere', 'Ampere-1a')),
            (('0x41', '0xfff'), ('ARM', '0x41/0xfff')), (('0x7f', '0xd0c'), ('0x7f', '0x7f/0xd0c'))])

    def test_cores_of_a_package_are_distinct_lists_of_siblings_or_else_core_ids(self):
        """core_id is unique within a cluster alone, as on ARM. -1 is not known."""
        for what, files, columns, cores in (
                ('ids', 'physical_package_id core_id', '0 0, 0 0, 0 1, 1 0, 1 -1', [2, 2, 2, 1, 1, 0]),
                ('lists', 'physical_package_id core_id core_cpus_list', '0 0 0, 0 0 1, 0 1 2-3, 0 1 2-3, 1 0 4',
                 [3, 3, 3, 3, 1, 0]),
                ('old lists', 'physical_package_id core_id thread_siblings_list', '0 0 0, 0 0 1', [2, 2, 0])):
            with self.subTest(what):
                rows = columns.split(', ')
                roots = self.tree({f'sys/devices/system/cpu/cpu{number}/topology/{file}': id
                                   for number, ids in enumerate(rows) for file, id in zip(files.split(), ids.split())})
                infos = agent.collect_cpu_infos(range(len(rows) + 1), agent.Cycle(roots, 5, {}))
                self.assertEqual(cores, [info.cores for info in infos.values()])

    def test_identity_is_of_sysfs_and_else_of_cpuinfo(self):
        x86 = dict(model='QEMU TCG CPU version 2.5+', vendor_id='AuthenticAMD', seconds=FOUR)
        cpu = 'sys/devices/system/cpu'
        for what, files, infos in (
                ('sysfs', {
                    'proc/stat': 'cpu0 1 2 3 4\ncpu3 1 2 3 4\n', 'proc/cpuinfo': CPUINFO_X86,
                    f'{cpu}/cpu0/topology/physical_package_id': '7\n', f'{cpu}/cpu0/topology/core_id': '8\n',
                    f'{cpu}/cpu0/cpufreq/cpuinfo_max_freq': '3500999\n',
                }, [wire.CpuInfo(cpu=0, cores=1, mhz=3500, physical_id='7', core_id='8', **x86),
                    wire.CpuInfo(cpu=3, seconds=FOUR)]),
                ('cpuinfo', {'proc/stat': 'cpu1 1 2 3 4\n', 'proc/cpuinfo': CPUINFO_X86},
                 [wire.CpuInfo(cpu=1, cores=1, mhz=2596, physical_id='0', core_id='1', **x86)]),
                ('ARM, and -1, which is none', {
                    'proc/stat': 'cpu0 1 2 3 4\n', 'proc/cpuinfo': CPUINFO_ARM,
                    f'{cpu}/cpu0/topology/physical_package_id': '-1\n', f'{cpu}/cpu0/topology/core_id': '-1\n',
                }, [wire.CpuInfo(cpu=0, model='Neoverse-N1', vendor_id='ARM', seconds=FOUR)])):
            with self.subTest(what):
                self.assertEqual(infos, list(self.collect(files).cpu_infos))

    def test_identities_are_read_again_when_other_cpus_are_online_or_a_file_had_failed(self):
        state, x86 = agent.NodeState(1), 'QEMU TCG CPU version 2.5+'
        for online, cpuinfo, models in (
                ('cpu0 1 2 3 4\n', CPUINFO_X86 + 'malformed\n', [x86]),
                ('cpu0 1 2 3 4\n', CPUINFO_X86.replace('2.5', '2.6'), ['QEMU TCG CPU version 2.6+']),
                ('cpu0 1 2 3 4\n', CPUINFO_ARM, ['QEMU TCG CPU version 2.6+']),
                ('cpu0 1 2 3 4\ncpu1 1 2 3 4\n', CPUINFO_ARM, ['Neoverse-N1', ''])):
            node = self.collect({'proc/stat': online, 'proc/cpuinfo': cpuinfo}, state)
            self.assertEqual(models, [cpu.model for cpu in node.cpu_infos])

    def test_seconds_are_hundredths_in_the_order_of_the_columns(self):
        node = self.collect({'proc/stat': 'cpu 100 200 300 400 500 600 700 800 900 1000\n'})
        self.assertEqual(wire.CpuSeconds(**dict(zip(CpuTimes._fields, range(1, 11)))), node.cpu_seconds)

    def test_idle_and_iowait_never_go_back_by_a_little(self):
        """By more than three seconds, the CPU was offline meanwhile."""
        previous, without = CpuTimes(1, 1, 1, 1000, 1000), agent.without_steps_back
        self.check_table(lambda idle, iowait: without(previous, CpuTimes(2, 2, 2, idle, iowait))[3:5], [
            ((1001, 1002), (1001, 1002)), ((701, 1002), (1000, 1002)), ((700, 999), (700, 1000)), ((0, 0), (0, 0))])
        state = agent.NodeState(1)
        for text in 'cpu 1 1 1 50 60\n', 'cpu 2 3 4 40 50\n':
            node = self.collect({'proc/stat': text}, state)
        self.assertEqual((0.5, 0.6), (node.cpu_seconds.idle, node.cpu_seconds.iowait))
        self.assertEqual((2, 3, 4, 50, 60), state.cpu_times['cpu'][:5])

    def test_usage_is_since_the_previous_sample(self):
        state = agent.NodeState(1)
        first = self.collect({'proc/stat': 'cpu 10 0 0 10\ncpu0 5 0 0 5\ncpu1 5 0 0 5\n'}, state)
        node = self.collect({'proc/stat': 'cpu 19 0 0 11\ncpu0 8 0 0 6\ncpu1 5 0 0 5\ncpu2 1 0 0 1\n'}, state)
        self.assertEqual((None, 90.0), tuple(agent.known(part, 'total_cpu_percentage') for part in (first, node)))
        self.assertEqual([(0, 75.0), (1, None), (2, None)],
                         [(cpu.cpu, agent.known(cpu, 'usage')) for cpu in node.cpu_infos])

    def test_counters_are_those_of_vmstat(self):
        def oracle():
            listed = self.tool('vmstat', '-s')
            return [int(re.search(rf'(\d+) {name}', listed)[1])
                    for name in ('interrupts', 'CPU context switches', 'forks')]
        before, stat, after = oracle(), collected(agent.collect_cpu, LIVE).stat, oracle()
        for first, number, last in zip(before, (stat.intr, stat.ctxt, stat.processes), after):
            self.assertTrue(first <= number <= last, stat)

    def test_cpus_are_those_that_getconf_and_for_this_process_nproc_count(self):
        numbers = {cpu.cpu for cpu in collected(agent.collect_cpu, LIVE).cpu_infos}
        self.assertEqual(int(self.tool('getconf', '_NPROCESSORS_ONLN')), len(numbers))
        mine = int(self.tool('env', '-u', 'OMP_NUM_THREADS', '-u', 'OMP_THREAD_LIMIT', 'nproc'))
        self.assertEqual(mine, len(numbers & os.sched_getaffinity(0)))

    def test_use_is_unknown_where_a_counter_jumps_or_begins_anew(self):
        """Steal under Xen; idle of a CPU that was off. The next sample but one is usable again."""
        for what, texts in {
                'jump': ('1 0 0 99 0 0 0 500', '2 0 0 198 0 0 0 1844674407370', '3 0 0 297 0 0 0 1844674407370'),
                'anew': ('9 0 0 99999 0 0 0 0', '10 0 0 5 0 0 0 0', '11 0 0 104 0 0 0 0')}.items():
            with self.subTest(what):
                state = agent.NodeState(10)
                nodes = [collected(agent.collect_cpu, self.write({'proc/stat': f'cpu {text}\ncpu0 {text}\n'}), state)
                         for text in texts]
                self.assertEqual([(None, None), (None, None), (1.0, 1.0)], [
                    (agent.known(node, 'total_cpu_percentage'), agent.known(node.cpu_infos[0], 'usage'))
                    for node in nodes])


# --- load and limits

class LoadAndLimitsTest(Case):
    def test_loadavg(self):
        def load(*values):
            return dict(zip(('load1', 'load5', 'load15', 'runnable_threads', 'threads'), values))
        self.check_parse(agent.parse_loadavg, {
            'counting': ('1.5 2.5 3.5 4/5 6\n', load(1.5, 2.5, 3.5, 4, 5)),
            'extra column and line': ('1 2 3 4/5 6 7\nx\n', load(1, 2, 3, 4, 5)),
        }, {
            'cut': ('1 2 3\n', ''), 'no slash': ('1 2 3 4 5\n', ''), 'not a number': ('1 x 3 4/5 6\n', ''),
            'empty': ('', ''),
        })

    def test_file_nr(self):
        self.check_parse(agent.parse_file_nr, {
            'counting': ('1 2 3\n', {'file_nr_allocated': 1, 'file_nr_max': 3}),
        }, {'cut': ('1 2\n', ''), 'not a number': ('x 0 3\n', ''), 'empty': ('', '')})

    def test_conntrack_is_absent_until_its_module_is_loaded(self):
        roots = self.tree({path: text for path, text in NODE.items() if 'conntrack' not in path})
        self.assertEqual(['file_nr_allocated', 'file_nr_max', 'threads_max', 'pid_max', 'entropy_avail', 'poolsize',
                          'hung_task_detect_count'], present(collected(agent.collect_limits, roots).kernel_limits))

    def test_each_limit_is_in_its_field(self):
        paths = {path for path in NODE if path.startswith('proc/sys/') and NODE[path].strip().isdigit()}
        roots = self.tree({path: f'{number}\n' for number, path in enumerate(sorted(paths), 1)})
        self.assertEqual(wire.KernelLimits(
            hung_task_detect_count=1, pid_max=2, entropy_avail=3, poolsize=4, threads_max=5, nf_conntrack_count=6,
            nf_conntrack_max=7), collected(agent.collect_limits, roots).kernel_limits)

    def test_load_and_limits_are_those_of_uptime_and_sysctl(self):
        def oracle():
            load = self.tool('uptime').partition('load average:')[2]
            limits = self.tool('sysctl', '-n', 'fs.file-nr', 'kernel.threads-max', 'kernel.pid_max')
            return [*map(float, re.findall(r'[\d.]+', load)), *map(int, limits.split())]
        def ours():
            load = collected(agent.collect_load, LIVE).load_average
            limits = collected(agent.collect_limits, LIVE).kernel_limits
            return (load.load1, load.load5, load.load15,
                    limits.file_nr_allocated, 0, limits.file_nr_max, limits.threads_max, limits.pid_max)
        self.check_close(*self.settled(oracle, ours), (0.5, 0.5, 0.5, 500, 0, 0, 0, 0))


# --- memory

class MemoryTest(Case):
    def test_meminfo(self):
        self.check_parse(agent.parse_meminfo, {
            'without a unit': ('HugePages_Total:       3\n', {'HugePages_Total': 3}),
            'empty': ('', {}),
        }, {
            'no colon': ('MemTotal 1 kB\n', "malformed line: 'MemTotal 1 kB'", {}),
            'no number': ('MemTotal: 1 kB\nMemFree:\n', "'MemFree:'", {'MemTotal': 1024}),
            'not a number': ('MemTotal: many kB\n', "'MemTotal: many kB'", {}),
        })

    def test_vmstat(self):
        self.check_parse(agent.parse_flat_keyed, {
            'no line feed at the end': ('a 1\nb -2', {'a': 1, 'b': -2}), 'empty': ('', {}),
            'blank line': ('a 1\n\nb 2\n', {'a': 1, 'b': 2}),
        }, {
            'no number': ('a 1\noom_kill\n', "malformed line: 'oom_kill'", {'a': 1}),
            'not a number': ('a x\nb 1\n', "'a x'", {'b': 1}), 'three words': ('a 1 2\n', "'a 1 2'", {}),
            'a number of Python alone': ('a 1_0\nb 1\n', "'a 1_0'", {'b': 1}),
            'one word, then three': ('a\nb c 1\nd 2\n', "'a'", {'d': 2}),
        })

    def collect(self, meminfo, vmstat=''):
        return collected(agent.collect_memory, self.tree({'proc/meminfo': meminfo, 'proc/vmstat': vmstat}))

    def test_of_vmstat_is_what_its_pattern_matches(self):
        names = ('oom_kill pgpgin pgpgout pswpin pswpout pgfault pgmajfault '
                 'nr_free_pages oom_kill_x drop_pagecache')
        node = self.collect('', counting_lines(names))
        self.assertEqual(dict(zip(names.split(), range(1, 8))), node.vmstat)

    def test_used_is_what_is_not_available(self):
        names = 'total_memory', 'available_memory', 'used_memory', 'memory_used_perc'
        self.check_table(lambda text: tuple(agent.known(self.collect(text), name) for name in names), [
            ('MemTotal: 400 kB\nMemFree: 1 kB\nMemAvailable: 300 kB\n', (409600, 307200, 102400, 25.0)),
            ('MemTotal: 400 kB\nMemFree: 1 kB\n', (409600, None, None, None)),      # before Linux 3.14
            # lxcfs may say so.
            ('MemTotal: 1 kB\nMemAvailable: 2 kB\n', (1024, None, None, None)),
            ('MemTotal: 4 kB\nMemAvailable: 5 kB\nMemFree: 1 kB\nCached: 2 kB\n', (4096, 3072, 1024, 25.0)),
            ('MemTotal: 0 kB\nMemAvailable: 0 kB\n', (0, 0, 0, None)), ('', (None,) * 4)])
        self.assertEqual({'MemTotal': 1024}, self.collect('MemTotal: 1 kB\nMemAvailable: 2 kB\n').meminfo)

    def test_memory_and_swap_are_those_of_free(self):
        memory, swap = (list(map(int, line.split()[1:])) for line in self.tool('free', '-bw').splitlines()[1:])
        node = collected(agent.collect_memory, LIVE)
        ours = node.meminfo
        self.assertEqual((memory[0], swap[0]), (node.total_memory, ours['SwapTotal']))
        self.check_close([memory[2], *memory[4:], swap[2]], (
            ours['MemFree'], ours['Buffers'], ours['Cached'] + ours['SReclaimable'], node.available_memory,
            ours['SwapFree']), [1 << 28] * 5)


# --- pressure

class PressureTest(Case):
    def test_pressure(self):
        counting = {'avg10': 1.0, 'avg60': 2.0, 'avg300': 3.0, 'total': 4}
        line = 'avg10=1.0 avg60=2.00 avg300=3.0 total=4\n'
        self.check_parse(agent.parse_pressure, {
            'oldest: cpu without full': (f'some {line}', {'some': counting}),
            'irq has full alone': (f'full {line}', {'full': counting}),
            'all of the time': (f'some {line.replace("2.00", "100.00")}', {'some': {**counting, 'avg60': 100.0}}),
            'empty': ('', {}),
        }, {
            'cut': ('some avg10=1.0 avg60\n', "malformed line: 'some avg10=1.0 avg60", {}),
            'not a number': (f'some {line.replace("1.0", "x")}full {line}', "avg10=x avg60=2", {'full': counting}),
            'total is a fraction': (f'some {line.replace("4", "4.5")}', 'total=4.5', {}),
            'total is infinite': (f'some {line.replace("4", "inf")}', 'total=inf', {}),
            'total is missing': (f'some {line.replace(" total=4", "")}', 'malformed', {}),
            'one more kind': (f'some {line}all {line}', 'all', {'some': counting}),
            'more than all of the time': (f'some {line.replace("2.00", "100.01")}', 'avg60=100.01', {}),
        })

    def test_absent_line_is_cleared_and_zero_is_a_value(self):
        node = wire.NodeMetrics(psi_cpu_metrics=wire.PsiMetrics(some=wire.PsiData()))
        roots = self.write({
            'proc/pressure/cpu': 'full avg10=0.00 avg60=0.00 avg300=0.00 total=0\n', 'proc/pressure/io': ''})
        agent.collect_pressure(node, None, agent.Cycle(roots, 5, {}))
        cpu = node.psi_cpu_metrics
        self.assertEqual((['psi_cpu_metrics'], ['full']), (present(node), present(cpu)))
        self.assertTrue(cpu.full.HasField('total'))


# --- processes

class ProcessesTest(Case):
    def test_statm(self):
        self.check_parse(agent.parse_statm, {
            'real': (STATM, 15654), 'counting': (b'1 2 3 4 5 6 7\n', 2), 'extra': (b'1 2 3 4 5 6 7 8\n', 2),
            'zombie': (b'0 0 0 0 0 0 0\n', 0),
        }, {'empty': (b'', ''), 'one column': (b'11\n', ''), 'no number': (b'1 x 3\n', '')})

    def test_largest_come_first_and_without_memory_never(self):
        sizes = {4: 10, 2: 30, 3: 0, 9: 20, 7: 20}
        self.check_table(agent.largest_processes, [
            ((sizes, 3), [(2, 30), (7, 20), (9, 20)]), ((sizes, 99), [(2, 30), (7, 20), (9, 20), (4, 10)]),
            ((sizes, 0), []),
        ])

    def collect(self, files):
        return collected(agent.collect_processes, self.tree(files), agent.NodeState(2))

    def test_name_may_hold_anything(self):
        for comm, name in {
                b'a) b (c\n': 'a) b (c', b'new\nline) R 1\n': 'new\nline) R 1', b'\n': '', b'two\n\n': 'two\n',
                b' x \n': ' x ', b'\xff\xfe\\x\n': '\ufffd\ufffd\\x',
                b'kworker/u9:0-writeback\n': 'kworker/u9:0-writeback'}.items():
            with self.subTest(comm=comm):
                node = self.collect({'proc/7/statm': '1 2 3\n', 'proc/7/comm': comm})
                self.assertEqual([wire.ProcessMemInfo(pid=7, name=name, memory=2 * agent.PAGE_SIZE_BYTES)],
                                 list(node.processes_mem_info))

    def test_name_that_the_kernel_has_cut_is_that_of_the_program_where_it_begins_so(self):
        whole = '/usr/bin/kube-controller-manager\0--kube-controller\0'
        for comm, arguments, name in (
                ('kube-controller', whole, 'kube-controller-manager'), ('kube-controlle', whole, 'kube-controlle'),
                ('kube-controller', '/bin/sh\0', 'kube-controller'), ('kube-controller', '', 'kube-controller')):
            with self.subTest(comm=comm, arguments=arguments):
                node = self.collect({'proc/7/statm': '1 2 3\n', 'proc/7/comm': f'{comm}\n',
                                     'proc/7/cmdline': arguments})
                self.assertEqual([name], [process.name for process in node.processes_mem_info])

    def test_process_that_has_gone_is_absent_and_of_the_others_the_largest_are_named(self):
        node = self.collect({'proc/7/statm': '1 3 3\n', 'proc/8/comm': 'no statm\n', 'proc/9/statm': '',
                             'proc/10/statm': '1 2 3\n', 'proc/10/comm': 'whole\n', 'proc/1x/statm': 'no process',
                             'proc/11/statm': '3 1 3\n', 'proc/11/comm': 'small\n'})
        self.assertEqual((5, ['whole']), (node.procs, [process.name for process in node.processes_mem_info]))

    def test_resident_set_is_that_of_ps(self):
        cat = self.spawn(['cat', '/dev/zero'])
        # From now on it waits for a reader.
        cat.stdout.read(1)
        listed = int(self.tool('ps', '-o', 'rss=', '-p', str(cat.pid))) * 1024
        node = collected(agent.collect_processes, LIVE, agent.NodeState(sys.maxsize))
        ours = {process.pid: process.memory for process in node.processes_mem_info}
        self.assertAlmostEqual(listed, ours[cat.pid], delta=1 << 18)


# --- file systems

def mount(device_number, mountpoint, fstype='ext4', source='/dev/vda', root='/', read_only=False):
    return agent.Mount(device_number, root, mountpoint, read_only, fstype, source)


def mounts(text):
    """`8:1 /, 0:5 /run tmpfs tmpfs`"""
    return [mount(*line.split()) for line in text.split(', ') if line]


# f_bsize, f_frsize, f_blocks, f_bfree, f_bavail, f_files, f_ffree, f_favail, f_flag, f_namemax
def space(blocks, free, available, files=6, inodes_free=8):
    return os.statvfs_result((4096, 512, blocks, free, available, files, 7, inodes_free, 0, 255))


class FileSystemsTest(Case):
    def test_mountinfo(self):
        self.check_parse(lambda text: agent.parse_mountinfo(text.encode(errors='surrogateescape')), {
            'real': (MOUNTINFO, mounts('0:22 /sys sysfs sysfs, 254:1 / ext4 /dev/vda1, 0:33 /tmp tmpfs tmpfs, 254:16 '
                                       '/data ext4 /dev/vdb, 0:4 /run/netns/cni-d4ba223f nsfs nsfs net:[4026532469]')),
            'no optional field': (MOUNTINFO_ARM, mounts('0:2 / rootfs rootfs, 254:16 /data ext4 /dev/vdb')),
            'read-only': (
                '1 2 8:1 / /a ro,nodev - ext4 /dev/vda rw\n1 2 8:1 / /b rw - ext4 /dev/vda ro\n'
                '1 2 8:1 / /c rw - ext4 /dev/vda rw,emergency_ro\n1 2 8:1 / /d rw,errors=ro - ext4 /dev/vda rw\n',
                [mount('8:1', f'/{name}', read_only=name != 'd') for name in 'abcd']),
            'not UTF-8': ('1 2 8:1 / /a\udcff rw - ext4 /dev/vda rw\n', [mount('8:1', '/a\udcff')]),
            'two optional fields': (
                '1 2 8:1 / /a rw shared:1 master:2 - xfs /dev/sda1 rw\n', mounts('8:1 /a xfs /dev/sda1')),
            'escapes': (
                r'1 2 8:1 / /a\040b\011c\134d\012e rw - ext4 /dev/\043x rw',
                [mount('8:1', '/a b\tc\\d\ne', source='/dev/#x')]),
            'empty source': ('1 2 0:9 / /a rw - fuse.x  rw\n', [mount('0:9', '/a', 'fuse.x', '')]),
            'dash as a mount point': ('1 2 8:1 / - rw - ext4 /dev/vda rw\n', [mount('8:1', '-')]),
            'form feed and line separator are not escaped': (
                '1 2 8:1 / /a\fb\u2028c rw - ext4 /dev/vda rw\n', [mount('8:1', '/a\fb\u2028c')]),
            'empty': ('', []),
        }, {
            'no dash': ('1 2 8:1 / /a rw shared:1 ext4 /dev/sda1 rw\n1 2 8:1 / /b rw - ext4 /dev/vda rw\n',
                        "malformed line: '1 2 8:1 / /a rw shared:1", [mount('8:1', '/b')]),
            'cut after the dash': ('1 2 8:1 / /a rw - ext4\n', "'1 2 8:1 / /a rw - ext4'", []),
        })

    def test_real_file_systems_once_each(self):
        for what, text, real in (
                ('bind mounts', '8:1 /var/lib/kubelet/x, 8:1 /, 8:1 /a, 8:2 /data', '8:1 /, 8:2 /data'),
                ('bind mount of a directory', '8:1 /x ext4 /dev/vda /sub, 8:1 /long/path', '8:1 /long/path'),
                ('without storage', '0:5 /run tmpfs tmpfs, 0:6 /o overlay overlay, 8:2 /data', '8:2 /data'),
                ('hidden by a later mount', '8:1 /, 8:3 /data ext4 /dev/vdc, 8:2 /data', '8:1 /, 8:2 /data'),
                ('hidden by one without storage', '8:1 /, 8:2 /data, 0:9 /data tmpfs tmpfs', '8:1 /'),
                ('rootfs below the real root', '0:2 / rootfs rootfs, 8:1 /', '8:1 /'),
                ('two network file systems', '0:50 /n nfs4 s:/n, 0:51 /m nfs4 s:/m',
                 '0:50 /n nfs4 s:/n, 0:51 /m nfs4 s:/m'),
                ('subvolumes of btrfs', '0:31 /home btrfs, 0:30 / btrfs', '0:30 / btrfs'),
                ('two names of one device', '253:0 / ext4 /dev/dm-0, 253:0 /b ext4 /dev/mapper/x',
                 '253:0 / ext4 /dev/dm-0'),
                ('two of one name', '0:60 /f fuse.a /dev/fuse, 0:61 /g fuse.b /dev/fuse',
                 '0:60 /f fuse.a /dev/fuse, 0:61 /g fuse.b /dev/fuse'),
                ('none', '', '')):
            with self.subTest(what):
                self.assertEqual(mounts(real), agent.real_mounts(mounts(text)))

    def test_usage_is_in_fragments_and_free_is_for_unprivileged_users(self):
        def usage(*numbers):
            message = wire.DiskUsage()
            agent.fill_disk_usage(message, space(*numbers))
            return message
        counted = dict(total=51200, inodes=6, inodes_free=8)
        self.check_table(usage, [
            ((100, 70, 30, 6), wire.DiskUsage(used=15360, free=15360, used_percent=50.0, bytes_free=35840, **counted)),
            ((100, 0, 0), wire.DiskUsage(used=51200, free=0, used_percent=100.0, bytes_free=0, **counted)),
            # As a server may say that has more free blocks than blocks.
            ((100, 101, 0, 0), wire.DiskUsage(total=51200, used=0, free=0, bytes_free=51712)),
        ])

    def test_device_is_named_as_the_kernel_names_it(self):
        roots = self.write({'dev/mapper/none': ''})
        for link, target in (('dev/mapper/vg-data', '../dm-1'), ('sys/dev/block/253:0', '../../devices/dm-0'),
                             ('sys/dev/block/8:1', '../../devices/sda/sda1')):
            os.makedirs(os.path.dirname(f'{self.directory}/{link}'), exist_ok=True)
            os.symlink(target, f'{self.directory}/{link}')
        cycle = agent.Cycle(roots, 5, {})
        self.check_table(lambda number, source: agent.device_name(mount(number, '/', source=source), cycle), [
            (('8:1', '/dev/root'), '/dev/sda1'), (('253:0', '/dev/mapper/x'), '/dev/dm-0'),
            (('9:9', '/dev/mapper/vg-data'), '/dev/dm-1'), (('9:9', '/dev/mapper/none'), '/dev/mapper/none'),
            (('8:1', 'server:/x'), 'server:/x')])

    def collect(self, files):
        return [(disk.mountpoint, disk.HasField('total'))
                for disk in collected(agent.collect_disk_usages, self.tree(files)).disk_usages]

    def test_mounts_are_those_of_process_1_or_else_the_agents_own(self):
        line = '1 2 8:{0} / /{0} rw - ext4 /dev/{0} rw\n'
        one, own = {'proc/1/mountinfo': line.format(1), '1/x': ''}, {'proc/self/mountinfo': line.format(2), '2/x': ''}
        self.check_table(self.collect, [({**one, **own}, [('/1', True)]), (own, [('/2', True)]), ({}, [])])

    def test_mount_that_is_not_there_is_left_out(self):
        self.assertEqual([('/', True)], self.collect({'proc/1/mountinfo': MOUNTINFO}))

    def test_usage_is_that_of_df(self):
        disks = collected(agent.collect_disk_usages, LIVE).disk_usages
        for disk in disks:
            listed = self.tool('df', '-B1', '--output=size,used,avail,pcent,itotal,iavail', disk.mountpoint)
            with self.subTest(disk.mountpoint):
                self.check_close([int(word.strip('%-') or 0) for word in listed.splitlines()[1].split()], (
                    disk.total, disk.used, disk.free, math.ceil(disk.used_percent), disk.inodes, disk.inodes_free),
                    (0, 1 << 28, 1 << 28, 1, 0, 5000))
        if not disks:
            self.skipTest('no file system of its own here')


# --- file systems that do not answer

# blocks, bfree, bavail, files, ffree, bsize, namelen, frsize; a FAT has no number of free inodes.
FUSE_SPACE = 100, 50, 40, 6, 2**64 - 1, 4096, 255, 512


class FuseServer:
    """A mounted file system that has a root and nothing else, by the protocol of uapi/linux/fuse.h. statvfs(2) gets
    `answer`, FUSE_SPACE or an errno; while it is None, it waits."""
    FORGET, GETATTR, STATFS, INIT, BATCH_FORGET = 2, 3, 17, 26, 42
    FORCE, DETACH = 1, 2

    def __init__(self, test, path, answer):
        # By request the thread that asks.
        self.path, self.answer, self.waiting, self.libc = path, answer, {}, ctypes.CDLL(None, use_errno=True)
        os.makedirs(path)
        try:
            self.device = os.open('/dev/fuse', os.O_RDWR)
        except OSError as error:
            test.skipTest(f'/dev/fuse: {error}')
        test.addCleanup(os.close, self.device)
        options = f'fd={self.device},rootmode=40000,user_id=0,group_id=0'.encode()
        if self.libc.mount(b'kubensage-test', path.encode(), b'fuse', ctypes.c_ulong(0), options):
            test.skipTest(f'mounting FUSE: {os.strerror(ctypes.get_errno())}')
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()
        test.addCleanup(self.close)

    def close(self):
        """Whoever waits gets an error."""
        self.libc.umount2(self.path.encode(), self.FORCE | self.DETACH)
        self.thread.join(PATIENCE_SECONDS)

    def serve(self):
        while True:
            try:
                opcode, unique, thread = struct.unpack_from('=4xIQ16xI', os.read(self.device, 1 << 18))
            except OSError as error:
                # Whoever asked has given up.
                if error.errno == errno.ENOENT:
                    continue
                return
            if opcode == self.INIT:
                self.reply(unique, 0, struct.pack('=2I12xI40x', 7, 23, 4096))
            elif opcode == self.GETATTR:
                self.reply(unique, 0, struct.pack('=16xQ52x2I20x', 1, stat.S_IFDIR | 0o755, 2))
            elif opcode == self.STATFS:
                self.waiting[unique] = thread
                if self.answer is not None:
                    self.answer_all(self.answer)
            elif opcode not in (self.FORGET, self.BATCH_FORGET):
                self.reply(unique, errno.ENOSYS)

    def reply(self, unique, error, body=b''):
        os.write(self.device, struct.pack('=IiQ', 16 + len(body), -error, unique) + body)

    def answer_all(self, answer):
        self.answer = answer
        while self.waiting:
            unique, _ = self.waiting.popitem()
            if isinstance(answer, int):
                self.reply(unique, answer)
            else:
                self.reply(unique, 0, struct.pack('=5Q3I28x', *answer))


class StuckMountTest(Case):
    """Two file servers that are gone: statvfs(2) of their mounts does not return."""

    def setUp(self):
        super().setUp()
        self.state = agent.NodeState(1)
        self.servers = {name: FuseServer(self, f'{self.directory}/{name}', answer) for name, answer in (
            ('good', FUSE_SPACE), ('nfs', None), ('bad', errno.EIO), ('smb', None))}
        self.mountinfo = ''.join(f'1 0 0:{number} / /{name} ro - {name} {name} rw\n'
                                 for number, name in enumerate(self.servers, 50))
        self.write({'proc/1/mountinfo': self.mountinfo})

    def collect(self, mountinfo=None):
        """By name what is known of each mount, what failed, and how long it took."""
        began = time.monotonic()
        node, failures = collected_node(self.write({'proc/1/mountinfo': mountinfo or self.mountinfo}), self.state)
        return {disk.mountpoint[1:]: present(disk)[3:] for disk in node.disk_usages}, {*failures}, (
            time.monotonic() - began)

    def test_they_are_waited_for_once_and_reported_until_they_are_back(self):
        self.patch(LONGEST_PATIENCE_SECONDS=0.5)
        known = ['total', 'used', 'free', 'used_percent', 'inodes', 'read_only', 'bytes_free']
        expected = {'good': known, 'nfs': ['stuck'], 'bad': ['error'], 'smb': ['stuck']}
        failed = {f'mount /{name}' for name in ('nfs', 'bad', 'smb')}
        for waits in True, False, False:
            disks, failures, took = self.collect()
            self.assertEqual((expected, failed, waits), (disks, failures, took >= 0.5))
        self.assertEqual(({}, {'file systems: mountinfo'}), self.collect('malformed\n')[:2])
        disks, failures, took = self.collect()
        self.assertEqual((expected, failed, False), (disks, failures, took >= 0.5))
        # Others on this machine may ask as well.
        threads = {int(name) for name in os.listdir(f'/proc/{self.state.helper.process.pid}/task')}
        self.assertEqual([1, 1], [len(threads & {*self.servers[name].waiting.values()}) for name in ('nfs', 'smb')])
        self.servers['nfs'].answer_all(FUSE_SPACE)
        wait_for('the mount to be back', lambda: self.collect()[0]['nfs'] == known)
        self.assertEqual((known, {'mount /bad', 'mount /smb'}), (self.collect()[0]['nfs'], self.collect()[1]))

    def test_they_do_not_keep_the_agent_from_its_end(self):
        began = time.monotonic()
        run = self.start('--once', '--output=json').result()
        self.assertEqual((0, True), (run.code, time.monotonic() - began < 3 + PATIENCE_SECONDS * LONG))
        process = self.start('--main-loop-duration=0.2')
        disks = process.next_snapshot().node_metrics.disk_usages
        self.assertEqual([False, True, False, True], [disk.stuck for disk in disks])
        began = time.monotonic()
        process.terminate()
        self.assertEqual((0, True), (process.result().code, time.monotonic() - began < 3 + PATIENCE_SECONDS * LONG))


class HelperTest(Case):
    def test_so_many_questions_wait_and_what_was_answered_before_is_asked_all_the_same(self):
        """Each that waits costs a thread: here twice as many as may, of pipes that nobody opens for writing."""
        hung, fine = [f'{self.directory}/{number:03}' for number in range(2 * agent.MAX_WAITING)], ['/proc/version']
        for path in hung:
            os.mkfifo(path)
        helper, cycle = agent.Helper(), agent.Cycle(LIVE, 1, {})
        for paths, answered in ((fine, fine), (hung, []), (hung + fine, fine), (hung + ['/proc/uptime'], [])):
            self.assertEqual(answered, [*agent.ask_helper(helper, agent.READ, paths, cycle)])
        self.assertEqual(agent.MAX_WAITING, len(helper.waiting))
        self.assertRegex(cycle.failures[': helper'], 'questions wait')
        self.assertLess(len(os.listdir(f'/proc/{helper.process.pid}/task')), agent.MAX_WAITING + 4)

    def test_one_that_was_killed_is_started_again_at_once_and_it_ends_with_its_owner(self):
        state, roots = agent.NodeState(1), self.write(NODE)
        first, _ = collected_node(roots, state)
        killed = state.helper.process
        killed.kill()
        second, failures = collected_node(roots, state)
        self.assertEqual([disk.mountpoint for disk in first.disk_usages],
                         [disk.mountpoint for disk in second.disk_usages])
        self.assertEqual(['file systems: helper'], list(failures))
        self.assertEqual(-signal.SIGKILL, killed.wait(PATIENCE_SECONDS))
        process = state.helper.process
        self.assertNotEqual(killed.pid, process.pid)
        self.assertEqual({}, collected_node(roots, state)[1])
        del state
        self.assertEqual(0, process.wait(PATIENCE_SECONDS))


# --- disk I/O

# block/stat.rst
DISK_COLUMNS = ('read_ios read_merges read_sectors read_ticks write_ios write_merges write_sectors write_ticks '
                'in_flight io_ticks time_in_queue discard_ios discard_merges discard_sectors discard_ticks flush_ios '
                'flush_ticks').split()


def disk_columns(first, count, device_number='8:0'):
    return {**dict(zip(DISK_COLUMNS[:count], range(first, first + count))), 'device_number': device_number}


class DiskIoTest(Case):
    def test_diskstats(self):
        self.check_parse(agent.parse_diskstats, {
            **{what: (f' 254      16 sda {columns(1, count)}', {'sda': disk_columns(1, count, '254:16')})
               for what, count in (('oldest', 11), ('since 4.18', 15), ('since 5.5', 17), ('extra column', 18))},
            'empty': ('', {}),
        }, {
            'cut': (f'8 0 sda 1 2 3\n8 0 sdb {columns(1, 11)}', "malformed line: '8 0 sda 1 2 3'",
                    {'sdb': disk_columns(1, 11)}),
            'not a number': ('8 0 sda 1 2 x 4 5 6 7 8 9 10 11\n', "'8 0 sda 1 2 x 4 5", {}),
        })

    def collect(self, *lines):
        """These disks, each a whole one."""
        return collected(agent.collect_disk_io, self.tree({
            'proc/diskstats': ''.join(f'8 0 {line}\n' for line in lines),
            **{f'sys/block/{line.split()[0]}/size': '1\n' for line in lines}}))

    def test_each_column_has_its_field_and_sectors_are_512_bytes_in_the_sum(self):
        node = self.collect(f'sda {columns(1, 17)}', f'sdb {columns(101, 11)}')
        self.assertEqual([wire.DiskStats(device='sda', **disk_columns(1, 17)),
                          wire.DiskStats(device='sdb', **disk_columns(101, 11))], list(node.diskstats))
        self.assertEqual(wire.DiskIOSummary(total_read_bytes=512 * (3 + 103), total_write_bytes=512 * (7 + 107),
                                            total_read_ops=1 + 101, total_write_ops=5 + 105), node.disk_io_summary)

    def test_namespace_counts_what_its_paths_do_not(self):
        """Of NVMe with several paths: one that has done nothing since boot has a number of its own none the less."""
        node = collected(agent.collect_disk_io, self.write({
            'proc/diskstats': f'259 0 nvme0n1 {"0 " * 11}\n259 1 nvme0c0n1 {columns(1, 11)}\n',
            'sys/block/nvme0n1/size': '1\n', 'sys/block/nvme0c0n1/size': '1\n',
            'sys/block/nvme0c0n1/hidden': '1\n'}))
        self.assertEqual((['259:0', '259:1'], 1), ([disk.device_number for disk in node.diskstats],
                                                   node.disk_io_summary.total_read_ops))

    def test_only_whole_disks_count(self):
        whole = 'vda nvme0n1 cciss!c0d0 mmcblk0 nbd0 rbd0'.split()
        made_of_disks = 'dm-0 md127 md_d0 md_home drbd1 bcache0 zd16'.split()
        others = 'loop0 ram0 zram0 sr0 fd0'.split()
        partitions = 'vda1 nvme0n1p1 cciss/c0d0p1 mmcblk0p1'.split()
        listed = [name.replace('!', '/') for name in whole + made_of_disks]
        node = collected(agent.collect_disk_io, self.write({
            'proc/diskstats': ''.join(f'8 0 {name} {columns(1, 11)}\n' for name in listed + others + partitions),
            **{f'sys/block/{name}/size': '1\n' for name in whole + made_of_disks + others}}))
        self.assertEqual(len(whole), node.disk_io_summary.total_read_ops)
        self.assertEqual(listed, [disk.device for disk in node.diskstats])

    def test_disk_above_others_counts_once(self):
        """Of NVMe with several paths the paths count, and since Linux 6.4 the namespace."""
        zeros = '0 ' * 11
        for what, disks, files, total in (
                ('by its slaves', {'sda': '1 ' * 11, 'vda': '2 ' * 11}, {'vda/slaves/sda/x': ''}, 1),
                ('old NVMe', {'nvme0n1': zeros, 'nvme0c0n1': '1 ' * 11, 'nvme0c1n1': '2 ' * 11},
                 {'nvme0c0n1/hidden': '1', 'nvme0c1n1/hidden': '1'}, 3),
                ('new NVMe', {'nvme0n1': '3 ' * 11, 'nvme0c0n1': '1 ' * 11}, {'nvme0c0n1/hidden': '1'}, 3)):
            with self.subTest(what):
                node = collected(agent.collect_disk_io, self.tree({
                    'proc/diskstats': ''.join(f'8 0 {name} {numbers}\n' for name, numbers in disks.items()),
                    **{f'sys/block/{name}/size': '1\n' for name in disks}, **below('sys/block', files)}))
                self.assertEqual(total, node.disk_io_summary.total_read_ops)

    def test_without_disks_the_summary_is_unset(self):
        for files in {}, {'proc/diskstats': DISKSTATS}, {'sys/block/vda/size': '1\n'}:
            self.assertEqual(wire.NodeMetrics(), collected(agent.collect_disk_io, self.tree(files)))


# --- network

# proc_net(5)
NET_COLUMNS = ('rx_bytes rx_packets rx_errs rx_drop rx_fifo rx_frame rx_compressed rx_multicast '
               'tx_bytes tx_packets tx_errs tx_drop tx_fifo tx_colls tx_carrier tx_compressed').split()
NET_COUNTING = dict(zip(NET_COLUMNS, range(1, 17)))


class NetworkTest(Case):
    def test_net_dev(self):
        counting = {'eth0': NET_COUNTING}
        self.check_parse(agent.parse_net_dev, {
            'oldest: no space after the colon': (f'  eth0:{columns(1, 16)}\n', counting),
            'extra column': (f'eth0: {columns(1, 17)}\n', counting),
            'empty': ('', {}),
        }, {
            'cut': ('eth0: 1 2 3\n', "malformed line: 'eth0: 1 2 3'", {}),
            'not a number': (f'eth0: {columns(1, 16)}\neth1: x {columns(1, 16)}\n', "'eth1: x 1 2", counting),
        })

    def collect(self, roots, state=None, now=None):
        return collected(agent.collect_network, roots, state, agent.Cycle(roots, 5, {}, now))

    def links(self, dev, **files):
        """eth0, and others that net/dev may have; by its name what sysfs says of eth0."""
        node = self.collect(self.tree({'proc/net/dev': dev, **{
            f'sys/class/net/eth0/{name}': f'{text}\n' for name, text in files.items()}}))
        return node, node.network_interfaces[0]

    def test_each_column_has_its_field_and_usage_sums_all_interfaces(self):
        node, link = self.links(f'eth0: {columns(1, 16)}\nveth1: {columns(101, 16)}\n')
        self.assertEqual(wire.InterfaceCounters(**NET_COUNTING), link.counters)
        self.assertEqual(wire.NetUsage(
            total_bytes_sent=9 + 109, total_bytes_received=1 + 101, total_packets_sent=10 + 110,
            total_packets_received=2 + 102, total_err_in=3 + 103, total_err_out=11 + 111, total_drop_in=4 + 104,
            total_drop_out=12 + 112, total_fifo_err_in=5 + 105, total_fifo_err_out=13 + 113), node.net_usage)

    def test_flags_are_those_of_the_contract(self):
        self.check_table(lambda flags: list(self.links(NET_DEV.replace('lo:', 'eth0:'), flags=flags)[1].flags), [
            ('0x9', ['up', 'loopback']), ('0x1003', ['up', 'broadcast', 'multicast']),
            ('0x10d1', ['up', 'pointtopoint', 'multicast']),
            ('0xffff', ['up', 'broadcast', 'loopback', 'pointtopoint', 'multicast']), ('0x0', [])])

    def test_packets_that_nobody_took_are_those_of_the_statistics(self):
        def not_taken(**files):
            return agent.known(self.links(f'eth0: {columns(1, 16)}\n', **files)[1], 'rx_nohandler')
        self.assertEqual([7, 0, None], [not_taken(**{'statistics/rx_nohandler': 7}),
                                        not_taken(**{'statistics/rx_nohandler': 0}), not_taken()])

    def test_link_that_is_down_has_no_speed(self):
        names = 'operstate', 'carrier', 'speed'
        def state(text):
            _, link = self.links(f'eth0: {columns(1, 16)}\n', **dict(zip(names, text.split())))
            return [agent.known(link, name) for name in ('operstate', 'carrier', 'speed_mbits')]
        self.check_table(state, [('up 1 10000', ['up', True, 10000]), ('down 0 -1', ['down', False, None]),
                                 *((f'up 1 {unknown}', ['up', True, None]) for unknown in (0, 65535, 2**32 - 1))])

    def test_pods_ends_have_no_counters(self):
        pods_ends = 'veth9e351196 cali1a2b3c lxc12ab eni0123456789a gke12 azv1 tap0'.split()
        nodes_own = 'eth0 ens5 eni0 cni0 lo bond0.5 wlan0 docker0 cilium_host'.split()
        node = self.collect(self.write({
            'proc/net/dev': ''.join(f'{name}: {"1 " * 16}\n' for name in pods_ends + nodes_own)}))
        self.assertEqual({**dict.fromkeys(pods_ends, False), **dict.fromkeys(nodes_own, True)},
                         {link.name: link.HasField('counters') for link in node.network_interfaces})
        self.assertEqual(len(pods_ends + nodes_own), node.net_usage.total_packets_sent)

    def test_pods_ends_are_read_again_when_they_count_anew_or_after_a_minute(self):
        state, roots, names = agent.NodeState(1), self.write({}), ('veth1', 'eth0')
        for now, packets, mtu, veths_mtu in ((100, 7, 1500, 1500), (100, 8, 9000, 1500), (100, 7, 9001, 9001),
                                             (100, 8, 9002, 9001), (159, 9, 9003, 9001), (160, 9, 9004, 9004)):
            with self.subTest(mtu=mtu):
                self.write({'proc/net/dev': ''.join(f'{name}: {f"{packets} " * 16}\n' for name in names),
                            **{f'sys/class/net/{name}/mtu': str(mtu) for name in names}})
                if mtu == 9000:
                    state.links['veth1'].due = 160
                self.assertEqual([veths_mtu, mtu],
                                 [link.mtu for link in self.collect(roots, state, now).network_interfaces])
        self.write({'proc/net/dev': ''})
        self.collect(roots, state)
        self.assertEqual({}, state.links)

    def test_pods_ends_that_came_together_are_read_again_spread_over_a_minute(self):
        names, state, read = [f'veth{number}' for number in range(200)], agent.NodeState(1), []
        roots = self.write({'proc/net/dev': ''.join(f'{name}: {"1 " * 16}\n' for name in names)})
        for now in range(1000, 1061, 5):
            self.write({f'sys/class/net/{name}/mtu': str(now) for name in names})
            node = self.collect(roots, state, now)
            read.append(sum(link.mtu == now for link in node.network_interfaces))
        self.assertEqual(200, read[0])
        self.assertGreaterEqual(sum(read[1:]), 200)
        self.assertLess(max(read[1:]), 100)

    def test_network_of_another_procfs_is_that_of_process_1(self):
        roots = self.write({'proc/1/net/dev': NET_DEV, 'proc/net/dev': 'other0: ' + '1 ' * 16})
        self.assertEqual(['lo', 'enp0s3', 'cni0'], [link.name for link in self.collect(roots).network_interfaces])

    def test_counters_are_those_of_ip(self):
        def oracle():
            return {link['ifname']: link for link in json.loads(self.tool('ip', '-s', '-j', 'link'))}
        before, node, after = oracle(), self.collect(LIVE), oracle()
        names = {'bytes': 'bytes', 'packets': 'packets', 'errors': 'errs', 'dropped': 'drop'}
        for link in node.network_interfaces:
            first, last = before[link.name], after[link.name]
            self.assertIn(link.operstate, ('', last['operstate'].lower()))
            for way, ip in itertools.product(('rx', 'tx'), names) if link.HasField('counters') else ():
                with self.subTest(link.name, way=way, ip=ip):
                    number = getattr(link.counters, f'{way}_{names[ip]}')
                    self.assertTrue(first['stats64'][way][ip] <= number <= last['stats64'][way][ip], number)

    def test_speed_that_is_not_known_is_absent(self):
        """ethtool.h; what virtual links say."""
        for speed in '0', '65535', '4294967295', '-1', 'x':
            with self.subTest(speed):
                node = collected(agent.collect_network, self.write({
                    'proc/net/dev': net_dev(1), 'sys/class/net/eth0/speed': f'{speed}\n',
                    'sys/class/net/eth0/mtu': '1500\n'}))
                self.assertEqual([(None, 1500)], [(agent.known(link, 'speed_mbits'), link.mtu)
                                                  for link in node.network_interfaces])

    def test_name_may_have_what_python_calls_white_space(self):
        numbers = '1 ' * 16
        text = f'Inter-|  x\n face |x\n a\x1cb: {numbers}\n\u2028:{numbers}\nc\u2003\x85d: {numbers}\n'
        self.assertEqual(['a\x1cb', '\u2028', 'c\u2003\x85d'], list(agent.parse_net_dev(text)))
        route = 'Iface\tx\na\x1cb\t00000000\t0\t0003\t0\t0\t5\t00000000\t0\n'
        self.assertEqual([agent.Route('a\x1cb', 5, True)], agent.parse_route(route))
        self.assertEqual([agent.Route('a\u2028b', 9, True)], agent.parse_ipv6_route(
            f'{ZEROS} 00 {ZEROS} 00 {ZEROS} 00000009 00000001 00000000 00000003   a\u2028b\n'))

    def test_counter_that_has_gone_below_0_costs_its_sum(self):
        below_0 = ' '.join(['1', '2', '3', str(2**64 - 5)] + ['4'] * 12)
        node = collected(agent.collect_network, self.write({'proc/net/dev': net_dev(7) + f'eth1: {below_0}\n'}))
        self.assertEqual([True, False], [link.counters.HasField('rx_drop') for link in node.network_interfaces])
        self.assertEqual((8, 11, False), (node.net_usage.total_bytes_received, node.net_usage.total_bytes_sent,
                                          node.net_usage.HasField('total_drop_in')))


# --- addresses

def netlink_address(family, prefix_length, scope, index, *attributes):
    """An RTM_NEWADDR message."""
    payload = agent.IFADDRMSG.pack(family, prefix_length, 0x80, scope, index)
    for kind, data in attributes:
        payload += agent.RTATTR.pack(4 + len(data), kind) + data + bytes(-len(data) % 4)
    return agent.NLMSGHDR.pack(agent.NLMSGHDR.size + len(payload), agent.RTM_NEWADDR, 2, 1, 0) + payload


Address, Route = agent.Address, agent.Route
INET, INET6 = socket.AF_INET, socket.AF_INET6


class AddressesTest(Case):
    def test_addresses(self):
        own, peer = socket.inet_aton('192.0.2.1'), socket.inet_aton('192.0.2.2')
        six = socket.inet_pton(INET6, '2001:db8::1')
        self.check_parse(agent.parse_addresses, {
            'real': (ADDRESSES, [Address(1, INET, '127.0.0.1', 8, 254),
                                 Address(1, INET6, '::1', 128, 254)]),
            'peer': (netlink_address(INET, 32, 0, 3, (agent.IFA_ADDRESS, peer), (agent.IFA_LOCAL, own)),
                     [Address(index=3, family=INET, address='192.0.2.1', prefix_length=32, scope=0)]),
            'label of odd length': (netlink_address(INET6, 64, 253, 4, (3, b'eth\0x'), (agent.IFA_ADDRESS, six)),
                                    [Address(4, INET6, '2001:db8::1', 64, 253)]),
            'another family': (netlink_address(7, 32, 0, 3, (agent.IFA_ADDRESS, own)), []),
            'no address': (netlink_address(INET, 32, 0, 3), []),
            'wrong size': (netlink_address(INET, 32, 0, 3, (agent.IFA_ADDRESS, six)), []),
            # NLMSG_ERROR
            'refused': (agent.NLMSGHDR.pack(20, 2, 0, 1, 0) + b'\xff\xff\xff\xff', []),
            'empty': (b'', []),
        }, {
            'cut': (ADDRESSES[:100], 'malformed length 80 at byte 76 of 100'),
            'length 0': (bytes(16), 'malformed length 0 at byte 0 of 16'),
            'short message': (agent.NLMSGHDR.pack(18, agent.RTM_NEWADDR, 0, 1, 0) + b'\x02\x08',
                              'address message: 0208'),
        })

    def test_ipv4_routes(self):
        def line(interface, destination, flags, mask='00000000'):
            return f'Iface ...\n{interface}\t{destination}\t0\t{flags}\t0\t0\t5\t{mask}\t0\t0\t0\n'
        zero = '00000000'
        self.check_parse(agent.parse_route, {
            'real': (ROUTE, [Route('enp0s3', 1024, True), Route('enp0s3', 1024, False),
                             Route('cni0', 0, False)]),
            'half of everything': (line('tun0', zero, '0003', '00000080'), [Route('tun0', 5, False)]),
            'down': (line('eth0', zero, '0002'), [Route('eth0', 5, False)]),
            'reject': (line('*', zero, '0201'), [Route('*', 5, False)]),
            'heading alone': ('Iface ...\n', []),
            'empty': ('', []),
        }, {
            'cut': (line('tun0', zero, '0003') + 'eth0\t00000000\n', r"malformed line: 'eth0\t00000000'",
                    [Route('tun0', 5, True)]),
            'not hex': (line('eth0', 'default', '0003'), 'default', []),
        })

    def test_ipv6_routes(self):
        def line(prefix, flags):
            return f'{ZEROS} {prefix} {ZEROS} 00 {ZEROS} 00000010 00000001 00000000 {flags} eth1\n'
        self.check_parse(agent.parse_ipv6_route, {
            'real': (IPV6_ROUTE, [Route('eth0', 0x100, False), Route('eth0', 0x400, True),
                                  Route('lo', 0xffffffff, False)]),
            'half of everything': (line('01', '00000003'), [Route('eth1', 16, False)]),
            'down': (line('00', '00000002'), [Route('eth1', 16, False)]),
            'reject': (line('00', '00000201'), [Route('eth1', 16, False)]),
            'empty': ('', []),
        }, {
            'cut': (f'{ZEROS} 00\n' + line('00', '00000003'), f"malformed line: '{ZEROS} 00'",
                    [Route('eth1', 16, True)]),
            'not hex': (line('xy', '00000003'), ' xy ', []),
        })

    def test_primary_address_is_the_first_global_one_of_the_default_route_with_the_lowest_metric(self):
        addresses = [Address(*row) for row in (
            (1, INET, '127.0.0.1', 8, 254), (2, INET6, 'fe80::1', 64, 253), (2, INET, '192.0.2.1', 24, 0),
            (2, INET, '192.0.2.9', 24, 0), (3, INET, '198.51.100.1', 24, 0), (2, INET6, '2001:db8::1', 64, 0))]
        indexes = {'lo': 1, 'two': 2, 'three': 3}

        def primary(family, *routes):
            return agent.primary_address(addresses, [Route(*route) for route in routes], indexes, family)

        two, three = ('two', 100, True), ('three', 200, True)
        self.check_table(primary, [
            ((INET, three, two, ('lo', 1, False)), '192.0.2.1'), ((INET6, two), '2001:db8::1'),
            ((INET, three, ('lo', 200, True)), '198.51.100.1'), ((INET6, three), None), ((INET, ('lo', 1, True)), None),
            ((INET, ('gone', 1, True)), None), ((INET, ('two', 1, False)), None), ((INET,), None)])
        # The one from which the kernel sends, if it is on that interface.
        self.check_table(lambda preferred: agent.primary_address(addresses, [Route(*two)], indexes, INET, preferred), [
            ('192.0.2.9', '192.0.2.9'), ('198.51.100.1', '192.0.2.1')])

    def test_they_are_asked_for_when_an_interface_has_come_and_now_and_then(self):
        state, asked, told = agent.NodeState(1), [], []
        self.patch(ask_addresses=lambda state, cycle: asked.append(cycle.now) or ADDRESSES)
        for now, names in (1, 'a'), (5, 'a'), (6, 'ab'), (20, 'ab'), (21, 'ab'):
            node = wire.NodeMetrics(network_interfaces=[dict(name=name, index=1) for name in names])
            agent.collect_addresses(node, state, agent.Cycle(LIVE, 5, {}, now))
            told.append(len(node.network_interfaces[-1].addrs))
        self.assertEqual(([1, 6, 21], [2] * 5), (asked, told))

    def test_another_machines_tree_has_no_addresses(self):
        self.assertEqual(b'', agent.ask_addresses(agent.NodeState(1), agent.Cycle(self.tree(NODE), 5, {})))

    # A second procfs of this machine at $0, and a program that may not trace process 1, so that its ns/net is closed.
    ANOTHER_PROCFS = '''
mount -t proc proc "$0"
if setpriv --bounding-set -sys_ptrace --inh-caps -sys_ptrace readlink "$0/1/ns/net" 2>&1; then exit 99; fi
exec setpriv --bounding-set -sys_ptrace --inh-caps -sys_ptrace "$@"'''

    @needs_root
    def test_another_procfs_of_this_machine_has_its_addresses(self):
        """As in a pod whose /host/proc is the node's: the inode of net/dev is the same, the device is not.
        That of another network namespace is another."""
        expected, other = self.live(), f'{self.directory}/other'
        os.mkdir(other)
        for unshared, same in (('--mount',), True), (('--mount', '--net'), False):
            with self.subTest(unshared):
                run = self.spawn([
                    'unshare', *unshared, 'sh', '-ec', self.ANOTHER_PROCFS, other, sys.executable, agent.__file__,
                    '--once', '--output=json', '--procfs', other, '--cri-socket', self.socket]).result()
                if run.code == 99:
                    self.skipTest('ns/net of process 1 can be read without the right to trace it')
                self.assertEqual(0, run.code, run.err)
                node = json_format.Parse(run.out, wire.Metrics()).node_metrics
                wanted, addresses = ({link.name: list(link.addrs) for link in links}
                                     for links in (expected.network_interfaces, node.network_interfaces))
                # Others may come and go meanwhile.
                for name in {'lo'} | wanted.keys() & addresses.keys():
                    self.assertEqual(wanted[name] if same else [], addresses[name])
                self.assertEqual((expected.primary_ipv4.value, expected.primary_ipv6.value) if same else ('', ''),
                                 (node.primary_ipv4.value, node.primary_ipv6.value))

    def test_two_processes_are_in_one_network_where_one_of_two_signs_says_so(self):
        """The number of the namespace, else the inode."""
        paths = self.write({'a/7/net/dev': '', 'b/8/net/dev': '', 'c/9/x': ''}).rootfs
        a, b, c = f'{paths}/a/7', f'{paths}/b/8', f'{paths}/c/9'
        self.check_table(agent.same_network, [((a, b), False), ((a, c), None), ((a, a), True)])
        os.remove(f'{b}/net/dev')
        os.link(f'{a}/net/dev', f'{b}/net/dev')
        self.assertTrue(agent.same_network(a, b))
        for directory, number in (a, 1), (b, 2):
            os.mkdir(f'{directory}/ns')
            os.symlink(f'net:[{number}]', f'{directory}/ns/net')
        # The namespace is what counts.
        self.assertFalse(agent.same_network(a, b))

    def test_rtnetlink_that_is_refused_costs_the_addresses_alone(self):
        roots = self.write(NODE)
        os.makedirs(f'{self.directory}/proc/1/ns')
        os.symlink(os.readlink('/proc/self/ns/net'), f'{self.directory}/proc/1/ns/net')
        # A family of sockets that there is not: EAFNOSUPPORT.
        self.patch(HELPER=agent.HELPER.replace('_socket.AF_NETLINK', '4711'))
        node, failures = collected_node(roots)
        self.assertEqual(['lo', 'enp0s3', 'cni0'], [link.name for link in node.network_interfaces])
        (subject, error), = failures.items()
        self.assertRegex(f'{subject} {error}', 'addresses: .*Address family not supported')
        self.assertTrue(node.HasField('net_usage'))

    def live(self):
        node = collected(agent.collect_network, LIVE)
        agent.collect_addresses(node, agent.NodeState(1), agent.Cycle(LIVE, 5, {}))
        return node

    def test_interfaces_and_addresses_are_those_of_ip(self):
        listed = json.loads(self.tool('ip', '-j', 'addr'))
        links = self.live().network_interfaces
        names = ('up', 'broadcast', 'loopback', 'pointtopoint', 'multicast')
        self.assertEqual(
            {link['ifname']: (link['ifindex'], link['mtu'], [name for name in names if name.upper() in link['flags']],
                              sorted(f'{address["local"]}/{address["prefixlen"]}' for address in link['addr_info']))
             for link in listed},
            {link.name: (link.index, link.mtu, list(link.flags), sorted(link.addrs)) for link in links})
        self.assertLessEqual({link['address'] for link in listed if link['link_type'] == 'ether'},
                             {link.hardwareAddr for link in links})
        scopes = {'host': 254, 'link': 253, 'site': 200, 'global': 0}
        self.assertEqual(
            sorted((link['ifindex'], address['local'], scopes[address['scope']])
                   for link in listed for address in link['addr_info']),
            sorted((address.index, address.address, address.scope)
                   for address in agent.parse_addresses(
                       agent.ask_addresses(agent.NodeState(1), agent.Cycle(LIVE, 5, {})))))

    def test_primary_address_is_on_the_default_route_of_ip(self):
        routes = json.loads(self.tool('ip', '-j', '-4', 'route', 'show', 'default'))
        first = min(routes, key=lambda route: route.get('metric', 0), default={})
        links = json.loads(self.tool('ip', '-j', '-4', 'addr'))
        usable = [entry['local'] for link in links if link['ifname'] == first.get('dev')
                  for entry in link['addr_info'] if entry['scope'] == 'global']
        self.assertIn(self.live().primary_ipv4.value, usable or [''])


# --- hardware

# A machine after the kernel's documents: by directory below /sys its files and what they say.
HARDWARE_TEXTS = {
    # hwmon/sysfs-interface.rst, hwmon/coretemp.rst
    'class/hwmon/hwmon0': 'name coretemp, temp1_label Package id 0, temp1_input 41000, temp1_max 84000, '
                          'temp1_crit 100000, temp1_crit_hyst 90000, temp1_crit_alarm 1000, temp2_input -1500',
    'class/hwmon/hwmon1': 'name nct6775, temp1_input 33500, temp1_alarm 1, fan1_input 2100, fan1_label 1, '
                          'fan1_min 600, fan1_alarm 0, in0_input 1224, in0_min 1100, curr1_input 1500, '
                          'energy1_input 7000000, power1_average 31000000, humidity1_input 45000',
    # ABI/testing/sysfs-class-thermal
    'class/thermal/thermal_zone0': 'type x86_pkg_temp, temp 42500, policy step_wise, mode enabled',
    'class/thermal/cooling_device3': 'type Processor, cur_state 2, max_state 10',
    # ABI/testing/sysfs-class-power
    'class/power_supply/AC': 'type Mains, online 1',
    'class/power_supply/BAT0': 'type Battery, capacity 87, voltage_now 12100000, current_now 1300000, '
                               'power_now 15700000, energy_now 41000000',
    # admin-guide/md.rst
    'block/md0/md': 'raid_disks 3, array_state clean, level raid5',
    'block/md0/md/dev-sda1': 'state in_sync', 'block/md0/md/dev-sdb1': 'state in_sync;write_mostly',
    'block/md0/md/dev-sdc1': 'state faulty', 'block/md0/md/dev-sdd1': 'state write_mostly;spare',
    'block/md0/md/dev-sde1': 'state journal',
    # networking/bonding.rst
    'class/net/bond0/bonding': 'slaves eth1 eth2, mii_status up, active_slave eth1',
    'class/net/bond0/lower_eth1/bonding_slave': 'mii_status up',
    'class/net/bond0/lower_eth2/bonding_slave': 'mii_status down',
    # ABI/testing/sysfs-devices-edac
    'devices/system/edac/mc/mc0': 'ce_count 3, ue_count 1, ce_noinfo_count 0, ue_noinfo_count 0',
    'devices/system/edac/mc/mc0/csrow0': 'ce_count 4, ue_count 5',
    # admin-guide/pm/cpufreq.rst, ABI/testing/sysfs-devices-system-cpu
    **{f'devices/system/cpu/cpu{cpu}/cpufreq': (
        f'scaling_cur_freq {1200000 + cpu}, scaling_min_freq {900000 + cpu}, scaling_max_freq {3400000 + cpu}, '
        f'cpuinfo_min_freq {800000 + cpu}, cpuinfo_max_freq {3500000 + cpu}, scaling_governor powersave, '
        'scaling_available_governors performance powersave, scaling_driver intel_pstate') for cpu in (0, 1)},
    **{f'devices/system/cpu/cpu{cpu}/thermal_throttle': f'core_throttle_count {cpu + 5}, package_throttle_count 7'
       for cpu in (0, 1)},
    # ABI/testing/sysfs-firmware-dmi-entries; kernel 6.12, Debian 13, x86_64
    'class/dmi/id': 'bios_date 04/01/2014, bios_vendor SeaBIOS, bios_version 1.16.2-debian-1.16.2-1, product_name d13, '
                    'sys_vendor QEMU, product_version pc-q35-7.2, chassis_vendor QEMU, chassis_version 7, '
                    'product_serial cap-d13',
}
HARDWARE_FILES = {directory: {name: text.replace(';', ',') for name, text in (
    file.split(' ', 1) for file in files.split(', '))} for directory, files in HARDWARE_TEXTS.items()}
HARDWARE = {f'sys/{directory}/{name}': f'{text}\n' for directory, files in HARDWARE_FILES.items()
            for name, text in files.items()}
# What is not of interest, or not for every reader.
HARDWARE_UNREAD = re.compile('/(policy|mode|level|active_slave|bonding/mii_status|scaling_[agd].*|product_serial)$')
HARDWARE_SAMPLES = '''\
node_bonding_active{master="bond0"} 1
node_bonding_slaves{master="bond0"} 2
node_cooling_device_cur_state{name="3",type="Processor"} 2
node_cooling_device_max_state{name="3",type="Processor"} 10
node_cpu_frequency_max_hertz{cpu="0"} 3500000000
node_cpu_frequency_max_hertz{cpu="1"} 3500001000
node_cpu_frequency_min_hertz{cpu="0"} 800000000
node_cpu_frequency_min_hertz{cpu="1"} 800001000
node_cpu_scaling_frequency_hertz{cpu="0"} 1200000000
node_cpu_scaling_frequency_hertz{cpu="1"} 1200001000
node_cpu_scaling_frequency_max_hertz{cpu="0"} 3400000000
node_cpu_scaling_frequency_max_hertz{cpu="1"} 3400001000
node_cpu_scaling_frequency_min_hertz{cpu="0"} 900000000
node_cpu_scaling_frequency_min_hertz{cpu="1"} 900001000
node_dmi_info{bios_date="04/01/2014",bios_vendor="SeaBIOS",bios_version="1.16.2-debian-1.16.2-1",chassis_vendor="QEMU",\
chassis_version="7",product_name="d13",product_version="pc-q35-7.2",system_vendor="QEMU"} 1
node_edac_correctable_errors_total{controller="0"} 3
node_edac_csrow_correctable_errors_total{controller="0",csrow="0"} 4
node_edac_csrow_uncorrectable_errors_total{controller="0",csrow="0"} 5
node_edac_uncorrectable_errors_total{controller="0"} 1
node_hwmon_chip_names{chip="coretemp",chip_name="coretemp"} 1
node_hwmon_chip_names{chip="nct6775",chip_name="nct6775"} 1
node_hwmon_curr_amps{chip="nct6775",sensor="curr1"} 1.5
node_hwmon_energy_joule_total{chip="nct6775",sensor="energy1"} 7
node_hwmon_fan_alarm{chip="nct6775",sensor="fan1"} 0
node_hwmon_fan_min_rpm{chip="nct6775",sensor="fan1"} 600
node_hwmon_fan_rpm{chip="nct6775",sensor="fan1"} 2100
node_hwmon_humidity{chip="nct6775",sensor="humidity1"} 0.045
node_hwmon_in_min_volts{chip="nct6775",sensor="in0"} 1.1
node_hwmon_in_volts{chip="nct6775",sensor="in0"} 1.224
node_hwmon_power_average_watt{chip="nct6775",sensor="power1"} 31
node_hwmon_sensor_label{chip="coretemp",sensor="temp1",label="Package id 0"} 1
node_hwmon_sensor_label{chip="nct6775",sensor="fan1",label="1"} 1
node_hwmon_temp_alarm{chip="nct6775",sensor="temp1"} 1
node_hwmon_temp_celsius{chip="coretemp",sensor="temp1"} 41
node_hwmon_temp_celsius{chip="coretemp",sensor="temp2"} -1.5
node_hwmon_temp_celsius{chip="nct6775",sensor="temp1"} 33.5
node_hwmon_temp_crit_alarm_celsius{chip="coretemp",sensor="temp1"} 1
node_hwmon_temp_crit_celsius{chip="coretemp",sensor="temp1"} 100
node_hwmon_temp_crit_hyst_celsius{chip="coretemp",sensor="temp1"} 90
node_hwmon_temp_max_celsius{chip="coretemp",sensor="temp1"} 84
node_md_disks_required{device="md0"} 3
node_md_disks{device="md0",state="active"} 2
node_md_disks{device="md0",state="failed"} 1
node_md_disks{device="md0",state="spare"} 1
node_power_supply_capacity{power_supply="BAT0"} 87
node_power_supply_current_ampere{power_supply="BAT0"} 1.3
node_power_supply_energy_watthour{power_supply="BAT0"} 41
node_power_supply_online{power_supply="AC"} 1
node_power_supply_power_watt{power_supply="BAT0"} 15.7
node_power_supply_voltage_volt{power_supply="BAT0"} 12.1
node_thermal_zone_temp{zone="0",type="x86_pkg_temp"} 42.5
'''


class HardwareTest(Case):
    def setUp(self):
        super().setUp()
        self.state = agent.NodeState(1)

    def collect(self, files=HARDWARE, now=None, **patience):
        """By its path what is said of each device; what failed is in `failures`."""
        self.patch(LONGEST_PATIENCE_SECONDS=patience.get('patience', PATIENCE_SECONDS))
        roots = self.write(files)
        cycle = agent.Cycle(roots, 5, {}, now)
        self.devices = collected(agent.collect_node, roots, self.state, cycle).devices
        self.failures = cycle.failures
        return {device.path: {**device.numbers, **device.texts} for device in self.devices}

    def test_each_file_is_a_number_or_a_text_of_its_device(self):
        # A label, and what a manufacturer writes, is a text, also where that has digits alone.
        expected = {directory: {name: int(text) if re.fullmatch(r'-?\d+', text) and not re.search(
                                    '_label|_version', name) else text for name, text in files.items()
                                if not HARDWARE_UNREAD.search(f'{directory}/{name}')}
                    for directory, files in HARDWARE_FILES.items()}
        self.assertEqual((expected, {}), (self.collect(), self.failures))

    def test_samples_are_those_of_node_exporter(self):
        self.collect()
        text = agent.render_part(wire.Metrics(node_metrics=dict(devices=self.devices)), agent.NODE, False)
        names = {line.partition('{')[0] for line in HARDWARE_SAMPLES.splitlines()}
        self.assertEqual(HARDWARE_SAMPLES.splitlines(), sorted(
            line for line in text.splitlines() if line.partition('{')[0] in names or '_hwmon_' in line[:16]))

    def test_what_varies_is_read_each_time_and_the_rest_and_new_devices_once_a_minute(self):
        chip, zone = 'class/hwmon/hwmon0', 'class/thermal/thermal_zone9'
        files = below(f'sys/{chip}', HARDWARE_FILES[chip])
        self.collect(files, 100)
        files.update({f'sys/{chip}/temp1_input': '42000\n', f'sys/{chip}/temp1_max': '85000\n',
                      f'sys/{zone}/temp': '5000\n', f'sys/{zone}/type': 'new\n'})
        for now, maximum, new in (105, 84000, None), (159, 84000, None), (160, 85000, {'temp': 5000, 'type': 'new'}):
            devices = self.collect(files, now)
            self.assertEqual((42000, maximum, new), (devices[chip]['temp1_input'], devices[chip]['temp1_max'],
                                                     devices.get(zone)))
        shutil.rmtree(f'{self.directory}/sys/{zone}')
        files = {path: text for path, text in files.items() if zone not in path}
        self.assertEqual({'type': 'new'}, self.collect(files, 165)[zone])
        self.assertNotIn(zone, self.collect(files, 220))

    def test_file_that_fails_or_is_odd_costs_itself_and_is_no_failure(self):
        chip = 'class/hwmon/hwmon0'
        whole = self.collect(below(f'sys/{chip}', HARDWARE_FILES[chip]), 100)[chip]
        for what, content, value in (('empty', b'', None), ('blank', b' \n', None), ('a word', b'n/a\n', 'n/a'),
                                     ('a NUL', b'41\x0000\n', ...), ('not UTF-8', b'\xff\n', '\ufffd'),
                                     ('a long text', b'x' * 5000, 'x' * agent.MAX_TEXT), ('EIO', None, None),
                                     ('a huge number', b'9' * 30, '9' * 30), ('a fraction', b'1.5\n', '1.5')):
            with self.subTest(what):
                path = f'{self.directory}/sys/{chip}/temp1_input'
                os.remove(path)
                self.write({path: content}) if content is not None else os.symlink('/proc/self/mem', path)
                found = self.collect({}, 105)[chip]
                self.assertEqual({}, self.failures)
                value = found.get('temp1_input') if value is ... else value
                rest = {name: number for name, number in whole.items() if name != 'temp1_input'}
                self.assertEqual({**rest, 'temp1_input': value} if value is not None else rest, found)
                # Whatever it says, it can be shown.
                renderings(wire.Metrics(node_metrics=dict(devices=self.devices)))

    def test_sensor_that_does_not_answer_delays_nothing_and_what_was_known_stays(self):
        chip = 'class/hwmon/hwmon0'
        whole = self.collect(now=100)
        path = f'{self.directory}/sys/{chip}/temp1_input'
        os.remove(path)
        os.mkfifo(path)
        # At 165 everything is asked anew.
        for now in 105, 110, 165:
            began = time.monotonic()
            found = self.collect({'proc/uptime': '7.0 8.0\n'}, now, patience=0.1)
            self.assertEqual((whole, {'hardware: kernel'}), (found, {*self.failures}))
            self.assertLess(time.monotonic() - began, 5)
        with open(path, 'w') as sensor:
            sensor.write('43000\n')
        os.remove(path)
        self.write({path: '44000\n'})
        wait_for('the sensor', lambda: self.collect({}, 170)[chip].get('temp1_input') == 44000)
        self.assertEqual({}, self.failures)

    def test_machine_of_many_cpus_has_its_disks_and_sensors_all_the_same(self):
        files = {f'sys/devices/system/cpu/cpu{cpu}/{directory}/{file}': f'{cpu}\n' for cpu in range(256)
                 for directory, names in (('cpufreq', 'scaling_cur_freq scaling_min_freq scaling_max_freq '
                                                      'cpuinfo_min_freq cpuinfo_max_freq'),
                                          ('thermal_throttle', 'core_throttle_count package_throttle_count'))
                 for file in names.split()}
        devices = self.collect({**HARDWARE, **files})
        self.assertEqual(set(), {path for path in HARDWARE_FILES if 'system/cpu' not in path} - devices.keys())

    def test_machine_without_sensors_has_none(self):
        self.assertEqual(({}, {}), (self.collect(NODE), self.failures))


# --- network protocols

# kernel 6.12, Debian 13, x86_64; some lines
SNMP6 = '''\
Ip6InReceives                   \t40
Icmp6OutType133                 \t8
Udp6InDatagrams                 \t12
'''


class NetworkProtocolsTest(Case):
    def test_snmp(self):
        self.check_parse(agent.parse_snmp, {
            'no limit, another order of columns': ('Tcp: B C A\nTcp: 1 -1 -2\n', {'Tcp_B': 1, 'Tcp_A': -2}),
            'names alone': ('Tcp: A\n\n', {}), 'empty': ('', {}),
        }, {
            'fewer numbers than names': ('Tcp: A B\nTcp: 1\nUdp: A\nUdp: 2\n', "malformed line: 'Tcp: 1'",
                                         {'Udp_A': 2}),
            'not a number': ('Tcp: A\nTcp: x\n', "'Tcp: x'", {}),
        })

    def test_sockstat(self):
        self.check_parse(agent.parse_sockstat, {
            'IPv6': ('TCP6: inuse 4\nUDP6: inuse 2\nFRAG6: inuse 0 memory 1\n', {
                'TCP6_inuse': 4, 'UDP6_inuse': 2, 'FRAG6_inuse': 0, 'FRAG6_memory': 1}),
            'mem is in pages': ('UDP: mem 3 memory 4\n', {
                'UDP_mem': 3, 'UDP_mem_bytes': 3 * os.sysconf('SC_PAGE_SIZE'), 'UDP_memory': 4}),
            'empty': ('', {}),
        }, {'not a number': ('TCP: inuse x\nRAW: inuse 1\n', "malformed line: 'TCP: inuse x'", {'RAW_inuse': 1})})

    def test_softnet_stat(self):
        def softnet(text):
            """The numbers by the names that a SoftnetStat has; no other name has a field."""
            return [{name: row[name] for name in agent.field_names(wire.SoftnetStat) if name in row}
                    for row in agent.parse_softnet_stat(text)]

        oldest = dict(processed=1, dropped=2, time_squeeze=3)
        newest = dict(received_rps=10, flow_limit_count=11, backlog_len=12)
        self.check_parse(softnet, {
            'columns in order, hexadecimal': ('1 2 3 4 5 6 7 8 9 a b c d e f\n', [dict(cpu=13, **oldest, **newest)]),
            'a CPU that is offline has no line': (SOFTNET_STAT.partition('\n')[2], [dict(
                cpu=1, processed=0x2760, dropped=0, time_squeeze=0x1c, received_rps=0, flow_limit_count=0,
                backlog_len=0)]),
            'oldest: CPUs in order': ('1 2 3\n1 2 3\n', [dict(cpu=0, **oldest), dict(cpu=1, **oldest)]),
            'empty': ('', []),
        }, {'cut': ('1 2\n', "malformed line: '1 2'"), 'not hexadecimal': ('1 x 3\n', "'1 x 3'")})

    def test_arp(self):
        self.check_parse(agent.parse_arp, {
            'real': (ARP, {'cni0': 1, 'enp0s3': 1}),
            'two of one': (ARP + ARP.splitlines()[1], {'cni0': 2, 'enp0s3': 1}),
            'heading alone': ('IP address ...\n', {}), 'empty': ('', {}),
        }, {'cut': (ARP + '10.88.0.3 0x1\n', "malformed line: '10.88.0.3 0x1'", {'cni0': 1, 'enp0s3': 1})})

    def test_tcp(self):
        def lines(*states):
            return 'sl ...\n' + ''.join(f'0: 0100007F:A921 00000000:0000 {state} 0:0\n' for state in states)
        # include/net/tcp_states.h
        states = ('established syn_sent syn_recv fin_wait1 fin_wait2 time_wait close close_wait last_ack listen '
                  'closing new_syn_recv').split()
        self.check_parse(agent.parse_tcp, {
            'real': (TCP, {'listen': 2, 'established': 1}),
            'each state, as often as its number': (
                lines(*(f'{state:02X}' for state in range(1, 13) for _ in range(state))),
                dict(zip(states, range(1, 13)))),
            'heading alone': (lines(), {}), 'empty': ('', {}),
        }, {
            'cut': (TCP + '3: 0100007F:A921\n', "malformed line: '3: 0100007F:A921'", {'listen': 2, 'established': 1}),
            'a state that there is not': (lines('01', '7F'), '0000 7F 0:0', {'established': 1}),
            'not hexadecimal': (lines('x', '06'), '0000 x 0:0', {'time_wait': 1}),
        })

    def test_udp(self):
        def lines(*queues):
            return 'sl ...\n' + ''.join(f'0: 0100007F:0035 00000000:0000 07 {queue} 0:0\n' for queue in queues)
        self.check_parse(agent.parse_udp, {
            'real': (UDP, {'tx': 0, 'rx': 0}), 'sums, hexadecimal': (lines('1:10', '2:20'), {'tx': 3, 'rx': 48}),
            'heading alone': (lines(), {'tx': 0, 'rx': 0}), 'empty': ('', {'tx': 0, 'rx': 0}),
        }, {
            'cut': (UDP + '1: 0F02000A:0044 07\n', "malformed line: '1: 0F02000A:0044 07'", {'tx': 0, 'rx': 0}),
            'no colon': (lines('1', '2:3'), '07 1 0:0', {'tx': 2, 'rx': 3}),
            'not hexadecimal': (lines('x:1'), '07 x:1 0:0', {'tx': 0, 'rx': 0}),
        })

    def test_nfs(self):
        self.check_parse(agent.parse_nfs, {
            'columns in order': (RPC_NFS, dict(net_packets=1, net_udp=2, net_tcp=3, net_connections=4, rpc_calls=5,
                                               rpc_retrans=6, rpc_authrefrsh=7)),
            'fewer columns, and no procedures': ('rpc 5 6\n', dict(rpc_calls=5, rpc_retrans=6)), 'empty': ('', {}),
        }, {'not a number': ('net 1 x\nrpc 5\n', "malformed line: 'net 1 x'", {'rpc_calls': 5})})

    def test_one_file_alone_gives_its_field(self):
        for file, text, value in (
                ('snmp', 'Udp: A\nUdp: 1\n', {'Udp_A': 1}),
                ('snmp6', SNMP6 + 'UdpLite6In6 3\n', {
                    'Ip6_InReceives': 40, 'Icmp6_OutType133': 8, 'Udp6_InDatagrams': 12, 'UdpLite6_In6': 3}),
                ('netstat', 'IpExt: InOctets\nIpExt: 3\n', {'IpExt_InOctets': 3}),
                ('sockstat', 'TCP: tw 4\n', {'TCP_tw': 4}), ('sockstat6', 'TCP6: inuse 5\n', {'TCP6_inuse': 5}),
                ('softnet_stat', '1 2 3\n', [wire.SoftnetStat(cpu=0, processed=1, dropped=2, time_squeeze=3)]),
                ('arp', ARP, {'cni0': 1, 'enp0s3': 1}), ('tcp', TCP, {'listen': 2, 'established': 1}),
                ('tcp6', TCP, {'listen': 2, 'established': 1}), ('udp', UDP, {'rx_v4': 0, 'tx_v4': 0}),
                ('udp6', UDP.replace('07 00000000:00000000', '07 1:2'), {'rx_v6': 2, 'tx_v6': 1}),
                ('rpc/nfs', 'rpc 5\n', {'rpc_calls': 5})):
            with self.subTest(file):
                node = collected(agent.collect_protocols, self.tree({f'proc/net/{file}': text}))
                field = {'arp': 'arp_entries', 'tcp': 'tcp_states', 'tcp6': 'tcp_states', 'udp': 'udp_queues',
                         'udp6': 'udp_queues', 'rpc/nfs': 'nfs'}.get(file, file)
                self.assertEqual({field: value}, {field.name: value for field, value in node.ListFields()})

    def test_sockets_are_counted_now_and_then_and_those_of_both_protocols_together(self):
        state, seen = agent.NodeState(1), []
        for now, lines in (100, 3), (114.9, 2), (115, 2), (129, 0), (130, 0):
            roots = self.write({f'proc/net/{file}': ''.join(TCP.splitlines(True)[:1 + lines])
                                for file in ('tcp', 'tcp6')})
            node = collected(agent.collect_node, roots, state, agent.Cycle(roots, 5, {}, now))
            seen.append(dict(node.tcp_states))
        both = {'listen': 4, 'established': 2}
        self.assertEqual([both, both, {'listen': 4}, {'listen': 4}, {}], seen)

    def test_of_more_sockets_than_fit_those_that_do_are_counted(self):
        roots = self.write({'proc/net/tcp': TCP + TCP.splitlines(True)[-1] * 20_000})
        cycle = agent.Cycle(roots, 5, {})
        states = collected(agent.collect_protocols, roots, None, cycle).tcp_states
        self.assertEqual(({}, 2), (cycle.failures, states['listen']))
        self.assertTrue(7000 < states['established'] < 20_000, states)

    def test_sockets_are_those_of_ss(self):
        def oracle():
            found = re.search(r'Total: (\d+).*orphaned (\d+)', self.tool('ss', '-s'), re.DOTALL)
            return [int(number) for number in found.groups()]
        def ours():
            sockets = collected(agent.collect_protocols, LIVE).sockstat
            return sockets['sockets_used'], sockets['TCP_orphan']
        self.check_close(*self.settled(oracle, ours), (20, 5))


# --- clock

# uapi/linux/timex.h, struct timex
TIMEX = ('modes offset freq maxerror esterror status constant precision tolerance seconds useconds tick ppsfreq jitter '
         'shift stabil jitcnt calcnt errcnt stbcnt tai').split()


def timex(**numbers):
    """What adjtimex(2) writes on the 64-bit architectures: an int has 4 bytes, and long ones are at multiples of 8."""
    formats = {'modes': 'I4x', 'status': 'i4x', 'shift': 'i4x', 'tai': 'i'}
    return b''.join(struct.pack('<' + formats.get(name, 'q'), numbers.get(name, 0) if name != 'modes' else 0)
                    for name in TIMEX).ljust(208, b'\xff')


class ClockTest(Case):
    def test_status_tells_synchronised_and_the_unit_of_the_offset(self):
        def clock(status, offset):
            said = agent.parse_timex(timex(offset=offset, maxerror=4_000_000, status=status))
            return said['synchronized'], said['offset_seconds'], said['max_error_seconds']
        unsynchronised, nanoseconds = 0x0040, 0x2000    # uapi/linux/timex.h: STA_UNSYNC, STA_NANO
        self.check_table(clock, [
            ((1, 2_000_000), (True, 2.0, 4.0)), ((unsynchronised, -500_000), (False, -0.5, 4.0)),
            ((nanoseconds, 2_000_000), (True, 0.002, 4.0))])

    def test_each_number_has_its_field_and_may_be_below_0(self):
        names = [name for name in agent.field_names(wire.ClockMetrics) if name in TIMEX]
        self.assertEqual(14, len(names))
        self.patch(read_timex=lambda: timex(**{name: -number for number, name in enumerate(TIMEX)}))
        clock = collected(agent.collect_clock, LIVE).clock
        self.assertEqual({name: -TIMEX.index(name) for name in names}, {name: getattr(clock, name) for name in names})

    def test_jitter_is_in_the_unit_that_the_status_says(self):
        def jitter(status):
            clock = wire.NodeMetrics(clock=dict(jitter=5000, status=status))
            text = agent.render_part(wire.Metrics(node_metrics=clock), agent.NODE, False)
            return float(re.search('^node_timex_pps_jitter_seconds (.*)', text, re.M)[1])
        self.check_table(jitter, [(0x2000, 5e-6), (0x2040, 5e-6), (0, 5e-3), (0x0040, 5e-3)])

    def test_clock_is_this_machines_alone(self):
        self.assertFalse(collected(agent.collect_clock, self.tree(NODE)).HasField('clock'))
        node = collected(agent.collect_clock, LIVE)
        self.assertTrue(node.HasField('clock'))
        self.assertTrue(-0.6 < node.clock.offset_seconds < 0.6 and 0 <= node.clock.max_error_seconds <= 1e5, node)


# --- operating system

# Platform, family and version as gopsutil 3.24.5 has them; what it looks at in os-release, and other files of /etc.
PLATFORMS = '''
ubuntu debian 22.04; ID=ubuntu VERSION_ID="22.04"; debian_version: bookworm/sid; \
lsb-release: DISTRIB_ID=Ubuntu,DISTRIB_RELEASE=22.04
debian debian 12.11; ID=debian VERSION_ID="12"; debian_version: 12.11
debian debian forky/sid; ID=debian; debian_version: forky/sid
debian debian 11.9; ID=raspbian VERSION_ID="11"; debian_version: 11.9
raspbian debian 12.9; ID=debian VERSION_ID="12"; debian_version: 12.9; ../usr/bin/raspi-config: #!/bin/sh
linuxmint debian 21.3; ID=linuxmint VERSION_ID="21.3"; debian_version: bookworm/sid; \
lsb-release: DISTRIB_ID=LinuxMint,DISTRIB_RELEASE=21.3
almalinux rhel 9.4; ID="almalinux" VERSION_ID="9.4"; redhat-release: AlmaLinux release 9.4 (Seafoam Ocelot)
rocky rhel 9.4; ID="rocky" VERSION_ID="9.4"; redhat-release: Rocky Linux release 9.4 (Blue Onyx)
centos rhel 9; ID="centos" VERSION_ID="9"; redhat-release: CentOS Stream release 9
centos rhel 7.9.2009; ID="centos" VERSION_ID="7"; redhat-release: CentOS Linux release 7.9.2009 (Core)
redhat rhel 9.4; ID="rhel" VERSION_ID="9.4"; redhat-release: Red Hat Enterprise Linux release 9.4 (Plow)
redhat rhel 4.14; ID="rhcos" VERSION_ID="4.14"; redhat-release: Red Hat Enterprise Linux CoreOS release 4.14
oracle rhel 9.4; ID="ol" VERSION_ID="9.4"; oracle-release: Oracle Linux Server release 9.4; \
redhat-release: Red Hat Enterprise Linux release 9.4 (Plow)
fedora fedora 40; ID=fedora VERSION_ID=40; redhat-release: Fedora release 40 (Forty)
amazon rhel 2; ID="amzn" VERSION_ID="2"; system-release: Amazon Linux release 2 (Karoo)
amazon rhel 2023.6.20241031; ID="amzn" VERSION_ID="2023"; \
system-release: Amazon Linux release 2023.6.20241031 (Amazon Linux)
sles suse 15.5; ID="sles" VERSION_ID="15.5"
opensuse-leap suse 15.5; ID="opensuse-leap" VERSION_ID="15.5"
opensuse-tumbleweed suse 20241120; ID="opensuse-tumbleweed" VERSION_ID="20241120"
sle-micro - 5.5; ID="sle-micro" VERSION_ID="5.5"
arch arch -; ID=arch
alpine alpine 3.20.3; ID=alpine VERSION_ID=3.20.3; alpine-release: 3.20.3
gentoo gentoo 2.15; ID=gentoo VERSION_ID="2.15"; gentoo-release: Gentoo Base System release 2.15
flatcar - 3815.2.5; ID=flatcar VERSION_ID=3815.2.5; \
lsb-release: DISTRIB_ID="Flatcar Container Linux by Kinvolk",DISTRIB_RELEASE=3815.2.5
bottlerocket - 1.20.5; ID=bottlerocket VERSION_ID=1.20.5
cos - 113; ID=cos VERSION_ID=113
talos - v1.8.1; ID=talos VERSION_ID=v1.8.1
azurelinux - 3.0; ID=azurelinux VERSION_ID="3.0"; lsb-release: DISTRIB_ID="azurelinux",DISTRIB_RELEASE="3.0.20241101"
mariner - 2.0; ID=mariner VERSION_ID="2.0"; lsb-release: DISTRIB_ID="Mariner",DISTRIB_RELEASE="2.0.20241029"
nixos - 24.05; ID=nixos VERSION_ID="24.05"; lsb-release: DISTRIB_ID=nixos,DISTRIB_RELEASE="24.05"
'''


class OperatingSystemTest(Case):
    def test_os_release(self):
        self.check_parse(agent.parse_os_release, {
            'quotes': ('''A='two (words)'\nB="dou\\"ble \\$x"\nC=plain\nD=""\nE=\n''',
                       {'A': 'two (words)', 'B': 'dou"ble $x', 'C': 'plain', 'D': '', 'E': ''}),
            'comments, blanks, an equals sign': ('# A=1\n\n  B=2  \nC=x=y\nno assignment\n', {'B': '2', 'C': 'x=y'}),
            'empty': ('', {}),
        }, {})

    def test_platform_family_and_version_are_those_of_gopsutil(self):
        for line in PLATFORMS.strip().splitlines():
            with self.subTest(line):
                expected, release, *others = line.split('; ')
                files = {'etc/os-release': release.replace(' ', '\n')}
                files.update({f'etc/{name}': content.replace(',', '\n')
                              for name, content in (other.split(': ') for other in others)})
                node = collected(agent.collect_system, self.tree(files))
                self.assertEqual(expected.split(), [agent.known(node, f'platform{part}') or '-'
                                                    for part in ('', '_family', '_version')])

    def test_uptime(self):
        self.check_parse(agent.parse_uptime, {
            'one column': ('7.99\n', 7), 'extra column': ('1.5 2.5 3.5\n', 1),
        }, {'not a number': ('long 2.0', ''), 'infinite': ('inf 1', ''), 'empty': ('', '')})

    def test_host_id_is_of_the_machine_or_the_installation_or_the_boot(self):
        """What a board's maker has left, and the machine-id of a first boot, are none."""
        uuid, machine, boot = '5f0c1b1e-3f5a-4f7c-9d8b-0c4a6b1e2f30', 'd249c0486159f80557ce12d99828162b', (
            '06f83538-a376-46cd-8a8f-81923a2e4bbd')
        def host_id(product, installation=machine):
            return collected(agent.collect_system, self.tree({
                'sys/class/dmi/id/product_uuid': f'{product}\n', 'etc/machine-id': f'{installation}\n',
                'proc/sys/kernel/random/boot_id': f'{boot}\n'})).host_id
        dashed = 'd249c048-6159-f805-57ce-12d99828162b'
        self.check_table(host_id, [
            (uuid, uuid), (uuid.upper(), uuid), ('', dashed), (('', ''), boot), (('', 'uninitialized'), boot),
            (('', 'D249C0486159F80557CE12D99828162B'), dashed),
            *((placeholder, dashed) for placeholder in (
                'Not Settable', '5F0C1B1E-3F5A', '00000000-0000-0000-0000-000000000000',
                'FFFFFFFF-FFFF-FFFF-FFFF-FFFFFFFFFFFF', '03000200-0400-0500-0006-000700080009',
                '12345678-1234-5678-90AB-CDDEEFAABBCC', '00020003-0004-0005-0006-000700080009'))])
        self.assertEqual('', collected(agent.collect_system, self.tree({})).host_id)

    def test_what_is_known_of_the_system_stays_and_what_is_not_is_read_again(self):
        state, seen = agent.NodeState(1), []
        for files in {'proc/uptime': 'x'}, {'usr/lib/os-release': 'ID=arch\n'}, {'etc/os-release': 'ID=nixos\n'}:
            seen.append(agent.known(collected(agent.collect_system, self.tree(files), state), 'platform'))
        self.assertEqual([None, 'arch', 'arch'], seen)

    def test_system_is_that_of_uname(self):
        node = collected(agent.collect_system, LIVE)
        self.assertEqual([self.tool('uname', flag).strip() for flag in ('-n', '-r', '-m')],
                         [node.hostname, node.kernel_version, node.kernel_arch])

    def test_boot_was_uptime_ago(self):
        node, _ = collected_node(LIVE)
        self.assertAlmostEqual(time.time(), node.boot_time + node.uptime, delta=5)


# --- cgroup files

def below(directory, files):
    """The files of one directory, for a tree."""
    return {f'{directory}/{name}': text for name, text in files.items()}


def counting_lines(names, first=1):
    """`name number` lines that count on from first, and a line of a later kernel."""
    return ''.join(f'{name} {number}\n' for number, name in enumerate(names.split(), first)) + 'later 99\n'


V2 = {'sys/fs/cgroup/cgroup.controllers': 'cpuset cpu io memory hugetlb pids rdma misc\n'}
# A group, each number another.
GROUP_V2 = {
    'cpu.stat': counting_lines('usage_usec user_usec system_usec nr_periods nr_throttled throttled_usec'),
    'cpu.max': '7 8\n', 'cpu.weight': '9\n', 'memory.current': '11\n', 'memory.peak': '12\n', 'memory.max': '13\n',
    'memory.high': '14\n', 'memory.swap.current': '15\n', 'memory.swap.max': '16\n',
    'memory.stat': counting_lines(
        'anon file inactive_file active_file slab kernel shmem file_mapped sock pgfault pgmajfault', 17),
    'memory.events': counting_lines('max oom oom_kill', 28),
    'io.stat': '8:16 rbytes=1 wbytes=2 rios=3 wios=4\n' + IO_STAT,
    'pids.current': '31\n', 'pids.max': '32\n', 'cgroup.procs': '81\n82\n',
    **{f'{name}.pressure': f'some avg10=1.0 avg60=2.0 avg300=3.0 total={number}\n'
                           f'full avg10=4.0 avg60=5.0 avg300=6.0 total={number + 3}\n'
       for number, name in enumerate(('cpu', 'memory', 'io'), 33)}}
CPU_V2 = dict(
    stat=dict(usage_usec=1, user_usec=2, system_usec=3, nr_periods=4, nr_throttled=5, throttled_usec=6),
    max=dict(quota_usec=7, period_usec=8))
MEMORY_V2 = dict(
    current=11, peak=12, max=13, swap=dict(current=15, max=16), events=dict(oom_kill=30), stat=dict(
        anon=17, file=18, inactive_file=19, active_file=20, kernel=22, shmem=23, file_mapped=24, sock=25, pgfault=26,
        pgmajfault=27))
# The same numbers in the units and under the names of v1, by controller; without total_ the numbers are the group's
# alone.
GROUP_V1 = {
    'cpuacct': {'cpuacct.usage': '1999\n', 'cpuacct.stat': 'user 3\nsystem 5\n'},
    'cpu': {'cpu.stat': 'nr_periods 4\nnr_throttled 5\nthrottled_time 6999\n', 'cpu.cfs_quota_us': '7\n',
            'cpu.cfs_period_us': '8\n', 'cpu.shares': '10\n'},
    'memory': {
        'memory.usage_in_bytes': '11\n', 'memory.max_usage_in_bytes': '12\n', 'memory.limit_in_bytes': '13\n',
        'memory.memsw.limit_in_bytes': '29\n',
        'memory.stat': 'rss 1\ncache 2\ninactive_file 3\npgfault 4\nswap 5\ntotal_swap 15\n' + counting_lines(
            'total_rss total_cache total_inactive_file total_active_file slab kernel total_shmem total_mapped_file '
            'sock total_pgfault total_pgmajfault', 17),
        'memory.kmem.usage_in_bytes': '22\n', 'memory.kmem.tcp.usage_in_bytes': '25\n',
        'memory.oom_control': 'oom_kill_disable 0\nunder_oom 0\noom_kill 30\n', 'cgroup.procs': '81\n82\n'},
    'blkio': {'blkio.throttle.io_service_bytes': BLKIO,
              'blkio.throttle.io_serviced': '254:0 Read 8\n254:0 Write 4\n254:0 Total 12\nTotal 12\n'},
    'pids': {'pids.current': '31\n', 'pids.max': '32\n'}}


def group_v1(path, shared='cpu,cpuacct', group=GROUP_V1):
    files = {}
    for controller, texts in group.items():
        directory = shared if shared and controller.startswith('cpu') else controller
        files.update(below(f'sys/fs/cgroup/{directory}/{path}', texts))
    return files


def group_of(version, path):
    """All files of a group by their paths in a tree."""
    return group_v1(path) if version == 1 else {**V2, **below(f'sys/fs/cgroup/{path}', GROUP_V2)}


def take_away(path):
    """A file or directory of the kernel's: whoever has it open gets an error from now on. tmpfs would go on to tell."""
    with subprocess.Popen(['sleep', '60']) as process:
        gone = os.open(f'/proc/{process.pid}/statm', os.O_RDONLY)
        process.kill()
    for name in os.listdir('/proc/self/fd'):
        with contextlib.suppress(OSError):
            if f'{os.readlink(f"/proc/self/fd/{name}")}/'.startswith(f'{path}/'):
                os.dup2(gone, int(name), inheritable=False)
    os.close(gone)
    shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def known_values(message):
    """All that a message says, but for what differs from reading to reading; parts that say nothing are left out."""
    return json.loads(
        json_format.MessageToJson(message, preserving_proto_field_name=True), object_pairs_hook=lambda pairs: {
            name: value for name, value in pairs
            if name not in ('timestamp', 'timestamp_ns', 'usage_nano_cores') and value not in ({}, [])})


def count_open_files():
    return len(os.listdir('/proc/self/fd'))


class CgroupFilesTest(Case):
    def test_cpu_max(self):
        self.check_parse(agent.parse_cpu_max, {
            'real': (CPU_MAX, {'quota_usec': 10000, 'period_usec': 100000}), 'no limit': ('max 100000\n', None),
        }, {'cut': ('10000\n', ''), 'not a number': ('x 100000\n', ''), 'empty': ('', '')})

    def test_single(self):
        self.check_parse(agent.parse_single, {
            'real': ('4676\n', 4676), 'no limit': ('max\n', None), 'zero': ('0\n', 0),
        }, {'a word': ('none\n', ''), 'empty': ('', '')})

    def test_procs(self):
        self.check_parse(agent.parse_procs, {
            'real': ('1311\n', 1), 'two': ('81\n82\n', 2), 'of another PID namespace': ('0\n0\n', 2), 'empty': ('', 0),
        }, {'a word': ('81\nx\n', "'x'")})

    def test_io_stat(self):
        one = dict(rbytes=1, wbytes=2, rios=3, wios=4)
        line = '8:0 rbytes=1 wbytes=2 rios=3 wios=4'
        self.check_parse(agent.parse_io_stat, {
            'real': (IO_STAT, {'254:0': dict(rbytes=629145600, wbytes=629145600, rios=688, wios=903)}),
            'oldest: no discards': (line, {'8:0': one}),
            'two devices': (f'{line}\n8:16 rbytes=5\n', {'8:0': one, '8:16': {'rbytes': 5}}),
            'a device without statistics': (f'7:0\n{line}\n', {'8:0': one}),
            'in one line, as Linux 5.15 has it': (f'7:1 7:0 {line}\n', {'8:0': one}),
            'of io.latency and io.cost': (f'{line} cost.vrate=100.00 depth=max\n', {'8:0': one}),
            'of io.cost alone': ('8:0 cost.vrate=100.00\n', {}),
            "without names, as QEMU's floppy disks": (f'(unknown) \n(unknown) rbytes=9 wios=9\n{line}\n', {'8:0': one}),
            'empty': ('', {}),
        }, {
            'not a number': ('8:0 rbytes=x\n', "malformed line: '8:0 rbytes=x'", {}),
            'no device': ('rbytes=1\n', "'rbytes=1'", {}),
            'the second of two': (f'{line}\n8:16 rbytes=5 wbytes=6 rios=7 wios=8x\n', "'8:16 rbytes=5", {'8:0': one}),
        })

    def test_blkio(self):
        self.check_parse(agent.parse_blkio, {
            'real': (BLKIO, {'254:0': {'Read': 4194304, 'Write': 2097152, 'Sync': 6291456, 'Async': 0, 'Discard': 0,
                                       'Total': 6291456}}),
            'two devices': ('8:0 Read 1\n8:16 Read 2\nTotal 3\n', {'8:0': {'Read': 1}, '8:16': {'Read': 2}}),
            'nothing was counted': ('Total 0\n', {}), 'empty': ('', {}),
        }, {'cut': ('8:0\n8:1 Read 1\n', "malformed line: '8:0'", {'8:1': {'Read': 1}}),
            'not a number': ('8:0 Read x\n', "'8:0 Read x'", {})})

    def test_memory_stat(self):
        names = ('anon', 'file', 'pgfault')
        self.check_parse(lambda text: agent.parse_memory_stat(text, names), {
            'all': ('anon 1\nfile 2\npgfault 3\n', {'anon': 1, 'file': 2, 'pgfault': 3}),
            'another order': ('pgfault 3\nfile 2\nanon 1\n', {'anon': 1, 'file': 2, 'pgfault': 3}),
            'names within names': ('inactive_anon 7\nanon_thp 8\nanon 1\nfile_dirty 9\n', {'anon': 1}),
            'no line feed at the end': ('later 9\nfile 22', {'file': 22}), 'empty': ('', {}),
        }, {'not a number': ('anon x\nfile 1\n', "malformed line: 'anon x'", {'file': 1}),
            'two numbers': ('file 1 2\n', "'file 1 2'", {}), 'something else': ('x\n', "'x", {})})

    def new_group(self, files, path='a'):
        """A group that is not read yet, on a node with these files."""
        self.directory, self.now = self.new_directory(), 0.0
        self.roots = self.write(files)
        self.cgroups = agent.read_cgroup_tree(self.roots.sysfs)
        self.group, self.message = agent.Group(path), wire.CgroupMetrics()

    def collect(self, later=0.0):
        """What the message says so many seconds later, None where the group is gone; what failed is in `failures`."""
        self.now += later
        cycle = agent.Cycle(self.roots, 5, {}, self.now)
        there, self.failures = agent.collect_cgroup(self.message, self.cgroups, self.group, cycle), cycle.failures
        return known_values(self.message) if there else None

    def collect_first(self, files, path='a'):
        self.new_group(files, path)
        return self.collect()

    def afresh(self):
        message = wire.CgroupMetrics()
        agent.collect_cgroup(message, self.cgroups, agent.Group(self.group.path), agent.Cycle(self.roots, 5, {}))
        return known_values(message)

    def rewrite(self, **texts):
        """Files of v2's group, with _ for the dot of their names."""
        self.write(below('sys/fs/cgroup/a', {name.replace('_', '.'): text for name, text in texts.items()}))

    def test_v2_has_every_number_in_its_field(self):
        def pressure(total):
            return {kind: {field: number for field, number in zip(
                ('avg10', 'avg60', 'avg300', 'total'), numbers)}
                for kind, numbers in (('some', (1, 2, 3, total)), ('full', (4, 5, 6, total + 3)))}

        self.assertEqual(known_values(wire.CgroupMetrics(
            path='a/b', cpu=dict(CPU_V2, weight=9, pressure=pressure(33)),
            memory=dict(MEMORY_V2, high=14, pressure=pressure(34), stat=dict(MEMORY_V2['stat'], slab=21),
                        events=dict(max=28, oom=29, oom_kill=30)),
            io=dict(pressure=pressure(35), stat=[
                dict(device='254:0', rbytes=629145600, wbytes=629145600, rios=688, wios=903),
                dict(device='8:16', rbytes=1, wbytes=2, rios=3, wios=4)]),
            pids=dict(current=31, max=32), cgroup=dict(procs=2))), self.collect_first(group_of(2, 'a/b'), 'a/b'))

    def test_throttling_and_swap_limit_of_crun_are_those_of_the_inner_group_and_nothing_else_is(self):
        """cri-containerd-: a container may make a group of that name itself."""
        outer = {'cpu.stat': 'usage_usec 9\nnr_periods 1\nnr_throttled 2\nthrottled_usec 3\n', 'memory.current': '4\n',
                 'memory.swap.max': 'max\n'}
        inner = {'cpu.stat': 'usage_usec 0\nnr_periods 5\nnr_throttled 6\nthrottled_usec 7\n', 'memory.current': '0\n',
                 'memory.swap.max': '8\n'}
        for name, expected in ((f'crio-{APP}.scope', (9, 5, 6, 7, 4, 8)),
                               (f'cri-containerd-{APP}.scope', (9, 1, 2, 3, 4, None))):
            with self.subTest(name):
                path = f'kubepods.slice/{name}'
                self.collect_first({**V2, **below(f'sys/fs/cgroup/{path}', outer),
                                    **below(f'sys/fs/cgroup/{path}/container', inner)}, path)
                stat, memory = self.message.cpu.stat, self.message.memory
                self.assertEqual(expected, (stat.usage_usec, stat.nr_periods, stat.nr_throttled, stat.throttled_usec,
                                            memory.current, agent.known(memory.swap, 'max')))

    def test_v1_has_the_same_numbers_in_the_same_fields(self):
        """Whether cpu and cpuacct share a directory or not, and through the links to it that systemd makes."""
        expected = known_values(wire.CgroupMetrics(
            path='a/b', cpu=dict(CPU_V2, shares=10, stat=dict(CPU_V2['stat'], user_usec=30_000, system_usec=50_000)),
            memory=MEMORY_V2, io=dict(stat=[dict(device='254:0', rbytes=4194304, wbytes=2097152, rios=8, wios=4)]),
            pids=dict(current=31, max=32), cgroup=dict(procs=2)))
        hybrid = {'sys/fs/cgroup/unified/cgroup.controllers': '\n',
                  'sys/fs/cgroup/unified/a/b/cpu.stat': 'usage_usec 77\n'}
        recursive = {**GROUP_V1, 'blkio': {**dict.fromkeys(GROUP_V1['blkio'], 'Total 0\n'), **{
            f'{name}_recursive': text for name, text in GROUP_V1['blkio'].items()}}}
        for layout, (what, files, extra) in itertools.product(('', 'cpuacct,cpu', 'cpu,cpuacct'), (
                ('hybrid', GROUP_V1, hybrid), ('recursive', recursive, {}), ('plain', GROUP_V1, {}))):
            with self.subTest(what, layout=layout):
                self.assertEqual(expected, self.collect_first({**group_v1('a/b', layout, files), **extra}, 'a/b'))
        for name in ('cpu', 'cpuacct'):
            os.symlink('cpu,cpuacct', f'{self.directory}/sys/fs/cgroup/{name}')
        self.cgroups = agent.read_cgroup_tree(self.roots.sysfs)
        self.assertEqual(expected, self.afresh())

    def test_files_that_are_absent_are_fields_that_are_absent(self):
        """The root group of v2, and a kernel without swap, pressure, and pids."""
        for files, expected in (
                ({**V2, 'sys/fs/cgroup/a/cpu.stat': 'usage_usec 0\n'}, {'cpu': {'stat': {'usage_usec': '0'}}}),
                ({'sys/fs/cgroup/memory/a/memory.usage_in_bytes': '5\n'}, {'memory': {'current': '5'}})):
            self.assertEqual({'path': 'a', **expected}, self.collect_first(files))

    def test_group_that_is_gone_is_none(self):
        for files in (V2, {'sys/fs/cgroup/memory/x': ''}):
            self.assertIsNone(self.collect_first(files))
        self.assertIsNone(agent.read_cgroup_tree(self.tree({'sys/fs/cgroup/unified/x': ''}).sysfs))
        self.assertIsNone(agent.read_cgroup_tree(self.tree({}).sysfs))

    def test_a_limit_that_is_taken_back_is_absent_once_it_is_due(self):
        no_limit = '9223372036854771712\n'
        v1 = {'memory/a/memory.limit_in_bytes': no_limit, 'memory/a/memory.memsw.limit_in_bytes': no_limit,
              'cpu,cpuacct/a/cpu.cfs_quota_us': '-1\n', 'pids/a/pids.max': 'max\n'}
        v2 = {'a/cpu.max': 'max 100000\n',
              **{f'a/{name}': 'max\n' for name in ('memory.max', 'memory.high', 'memory.swap.max', 'pids.max')}}
        for version, unlimited in ((1, v1), (2, v2)):
            self.collect_first(group_of(version, 'a'))
            limited = self.collect(later=agent.LIMITS_SECONDS)
            self.write(below('sys/fs/cgroup', unlimited))
            self.assertEqual(limited, self.collect(later=agent.LIMITS_SECONDS - 1))
            self.collect(later=1)
            cpu, memory = self.message.cpu, self.message.memory
            self.assertFalse(cpu.HasField('max') or memory.HasField('max') or memory.HasField('high') or
                             memory.swap.HasField('max') or self.message.pids.HasField('max'))
            self.assertTrue(cpu.HasField('weight') or cpu.HasField('shares'))
        for text, limit in ((str(2 ** 63 - 65536), None), ('0', 0), (str(2 ** 40), 2 ** 40)):
            self.collect_first({**group_v1('a'), 'sys/fs/cgroup/memory/a/memory.limit_in_bytes': text})
            self.assertEqual(limit, agent.known(self.message.memory, 'max'))

    def test_a_file_that_goes_leaves_no_value_behind(self):
        """As those of a controller that is taken from a group; and it is there again when it is given back."""
        for version in (2, 1):
            files = group_of(version, 'a')
            for path in sorted(files.keys() - V2.keys()):
                with self.subTest(path):
                    whole = self.collect_first(files)
                    take_away(f'{self.directory}/{path}')
                    # A marker that tells: without one, it is noticed when the group is due.
                    without = self.collect(later=agent.LIMITS_SECONDS)
                    self.assertEqual((True, self.afresh()), (without != whole, without))
                    self.write(files)
                    self.assertEqual(whole, self.collect(later=agent.LIMITS_SECONDS))

    def test_limits_are_read_again_when_they_are_due(self):
        files = group_of(2, 'a')
        del files['sys/fs/cgroup/a/pids.current']
        self.collect_first(files)
        first, memory = self.group.due, self.message.memory
        self.assertTrue(0 <= first <= agent.LIMITS_SECONDS)
        self.rewrite(memory_high='99\n', memory_current='98\n', pids_current='31\n')
        for later, expected in ((first / 2, (98, 14, 0)), (first / 2, (98, 99, 31))):
            self.collect(later)
            self.assertEqual(expected, (memory.current, memory.high, self.message.pids.current))
        self.assertEqual(first + agent.LIMITS_SECONDS, self.group.due)

    def test_limits_of_many_groups_do_not_fall_due_together(self):
        self.new_group(group_of(2, 'a'))
        random.seed(1)
        quarters = collections.Counter()
        for _ in range(100):
            self.group = agent.Group('a')
            self.collect()
            quarters[int(self.group.due / (agent.LIMITS_SECONDS / 4))] += 1
        self.assertEqual({0, 1, 2, 3}, set(quarters))
        self.assertLess(max(quarters.values()), 50)

    def test_group_is_read_whole_after_a_first_reading_that_failed_and_not_to_its_end_at_rest(self):
        for version, untold in ((2, 'sys/fs/cgroup/a/memory.stat'), (1, 'sys/fs/cgroup/memory/a/memory.stat')):
            files, malformed = group_of(version, 'a'), {untold: 'x\n'}
            self.new_group({**files, **malformed})
            self.collect()
            self.assertEqual([': memory.stat'], [*self.failures])
            self.write(files)
            known = self.collect(later=1)
            self.assertEqual(self.afresh(), known)
            self.write(malformed)
            self.assertEqual((known, False), (self.collect(), self.group.changed))

    def test_each_marker_alone_tells_that_something_has_happened(self):
        for version in (1, 2):
            for file in agent.GROUP_FILES[version][:agent.MARKERS[version]]:
                with self.subTest(file.name):
                    files = group_of(version, 'a')
                    self.new_group(files)
                    path = os.path.relpath(self.cgroups.file_path('a', file.name), self.directory)
                    text = files[path.replace('_recursive', '')]
                    self.write({path: text})
                    known = self.collect()
                    self.write({path: re.sub(r'\d(?=\d*\n)', '7', text)})
                    self.assertEqual((False, True), (known == self.collect(), self.group.changed))

    def test_group_that_was_made_anew_under_the_same_path_is_read_anew(self):
        directory = f'{self.collect_first(group_of(2, "a")) and self.directory}/sys/fs/cgroup/a'
        for usage in 77, 78:
            take_away(directory)
            if usage == 77:
                self.assertIsNone(self.collect())
            self.rewrite(cpu_stat=f'usage_usec {usage}\n')
            self.assertEqual({'path': 'a', 'cpu': {'stat': {'usage_usec': str(usage)}}}, self.collect())

    def test_files_of_a_group_are_closed_with_it(self):
        before = count_open_files()
        self.new_group(group_of(2, 'a'))
        for _ in range(2):
            self.collect(later=agent.SELDOM_SECONDS)
            self.assertEqual(before + len(agent.GROUP_FILES[2]), count_open_files())
        self.group = None
        self.assertEqual(before, count_open_files())

    def test_with_few_descriptors_left_files_are_opened_each_time(self):
        before = count_open_files()
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        self.addCleanup(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
        resource.setrlimit(resource.RLIMIT_NOFILE, (agent.SPARE_DESCRIPTORS, limits[1]))
        self.collect_first(group_of(2, 'a'))
        for number in 98, 99:
            self.rewrite(memory_current=f'{number}\n')
            self.collect()
            self.assertEqual((number, before), (self.message.memory.current, count_open_files()))

    def test_malformed_file_is_named_and_costs_what_its_absence_would(self):
        for files in group_of(1, 'a'), group_of(2, 'a'):
            for path in files.keys() - V2.keys():
                with self.subTest(path):
                    without = self.collect_first({name: text for name, text in files.items() if name != path})
                    self.assertEqual((without, {}), (without, self.failures))
                    self.assertEqual(without, self.collect_first({**files, path: 'x y z rbytes=w\n'}))
                    self.assertEqual([f': {os.path.basename(path)}'], [*self.failures])

    def test_file_that_fails_is_named_and_read_again(self):
        whole = self.collect_first(group_of(2, 'a'))
        for name in 'memory.stat', 'memory.current', 'pids.max':
            with self.subTest(name):
                self.new_group(group_of(2, 'a'))
                path = f'{self.directory}/sys/fs/cgroup/a/{name}'
                os.remove(path)
                os.symlink('/proc/self/mem', path)
                self.collect()
                self.assertEqual({f': {name}': f'a/{name}: Input/output error'}, self.failures)
                os.remove(path)
                self.rewrite(**{name: GROUP_V2[name]})
                self.group.files = agent.OpenFiles(0)
                self.assertEqual((whole, {}), (self.collect(later=1), self.failures))


class RealGroupTest(Case):
    """cgroup v2 of this machine's kernel, whatever controllers it has there: open files tell what happens, and when it
    is over."""

    def setUp(self):
        super().setUp()
        mounts = [mount for mount in agent.parse_mountinfo(agent.read_bytes('/proc/self/mountinfo'))
                  if mount.fstype == 'cgroup2']
        if os.geteuid() or not mounts:
            self.skipTest('needs root and a mounted cgroup v2')
        self.name = f'kubensage-test-{uuid.uuid4()}'
        self.top = f'{mounts[0].mountpoint}/{self.name}'
        os.makedirs(f'{self.directory}/fs')
        os.symlink(mounts[0].mountpoint, f'{self.directory}/fs/cgroup')
        self.roots = agent.Roots('/proc', self.directory, '/')
        self.groups = {path: agent.Group(self.name + path) for path in ('/rest', '/busy')}
        self.messages = [wire.CgroupMetrics() for _ in self.groups]
        for path in ('', *self.groups):
            self.make(path)

    def make(self, path):
        os.mkdir(f'{self.top}{path}')
        self.addCleanup(self.remove, path)

    def remove(self, path):
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(f'{self.top}{path}')

    def start(self, path, program):
        """A shell in the group, once it has said a line."""
        process = self.spawn(['sh', '-c', f'echo $$ >{self.top}{path}/cgroup.procs; echo; {program}'],
                             stdin=subprocess.PIPE)
        process.stdout.readline()
        return process

    def usage(self):
        """CPU time by group, None for one that is gone."""
        tree = agent.read_cgroup_tree(self.roots.sysfs)
        return [message.cpu.stat.usage_usec if agent.collect_cgroup(
            message, tree, group, agent.Cycle(self.roots, 5, {})) else None
            for group, message in zip(self.groups.values(), self.messages)]

    def test_what_has_run_has_used_time_and_what_is_gone_is_none(self):
        sleeper, spinner = self.start('/rest', 'read line'), self.start('/busy', 'while :; do :; done')
        wait_for('a process at rest', lambda: b') S ' in read_binary(f'/proc/{sleeper.pid}/stat'))
        rest, busy = self.usage()
        files = [group.files for group in self.groups.values()]
        wait_for('time used', lambda: self.usage()[1] > busy)
        self.assertEqual((rest, files), (self.usage()[0], [group.files for group in self.groups.values()]))
        spinner.end()
        ended = self.usage()
        self.assertGreater(ended[1], busy)
        self.assertEqual(ended, self.usage())
        self.remove('/busy')
        self.assertEqual([rest, None], self.usage())
        for _ in range(2):
            self.make('/busy')
            self.assertEqual([rest, 0], self.usage())
            self.assertTrue(self.groups['/busy'].files.descriptors)
            self.remove('/busy')


# --- services

class ServicesTest(Case):
    PLACES = ('docker/0/kubelet.slice/kubelet.service', 'k3s.service', 'runtime.slice/containerd.service',
              'system.slice/snap.microk8s.daemon-kubelite.service')
    OTHERS = ('system.slice/ssh.service', 'user.slice/docker.service', 'kubepods.slice/x/kubelet.service',
              'a.scope/kubelet.service')

    def collect(self, state, roots, now=0.0):
        node = collected(agent.collect_services, roots, state, agent.Cycle(roots, 5, {}, now))
        return {service.cgroup.path: (service.name, service.cgroup.cpu.stat.usage_usec, service.cgroup.memory.current,
                                      service.cgroup.cpu.stat.nr_throttled) for service in node.services}

    def test_daemons_of_the_node_by_their_units_wherever_these_are(self):
        for version in 1, 2:
            with self.subTest(version=version):
                state, roots = agent.NodeState(1), self.tree({path: text for place in (*self.PLACES, *self.OTHERS)
                                                              for path, text in group_of(version, place).items()})
                for _ in range(2):
                    found = self.collect(state, roots)
                    self.assertEqual({place: (os.path.basename(place), 1, 11, 5) for place in self.PLACES}, found)
                    self.assertEqual([*self.PLACES], [*found])
                self.assertEqual([{}, {}], [self.collect(state, self.tree(files)) for files in ({}, V2)])
                self.assertEqual({}, state.services)

    def test_the_root_of_all_groups_is_the_nodes(self):
        for version in 1, 2:
            with self.subTest(version=version):
                roots = self.tree(group_of(version, ''))
                node = collected(agent.collect_services, roots)
                self.assertEqual(('', 1, 11, 2), (node.cgroup.path, node.cgroup.cpu.stat.usage_usec,
                                                  node.cgroup.memory.current, node.cgroup.cgroup.procs))
        # On v2 it has these files alone.
        node = collected(agent.collect_services, self.tree({**V2, **below('sys/fs/cgroup', {
            name: GROUP_V2[name] for name in ('cpu.stat', 'memory.stat', 'io.stat', 'cpu.pressure', 'cgroup.procs')})}))
        self.assertEqual(['timestamp_ns', 'cpu', 'memory', 'io', 'cgroup'], present(node.cgroup))
        self.assertFalse(collected(agent.collect_services, self.tree({})).HasField('cgroup'))

    def test_they_are_looked_for_again_once_a_minute_and_when_one_has_gone(self):
        state, roots, seen = agent.NodeState(1), self.write(group_of(2, 'kubelet.service')), []
        for now in 0, 59, 60, 61, 62, 63:
            seen.append(len(self.collect(state, roots, now)))
            if now in (0, 60):
                self.write(group_of(2, f'{"crio" if now else "k3s"}.service'))
            if now == 61:
                take_away(f'{self.directory}/sys/fs/cgroup/k3s.service')
        self.assertEqual([1, 1, 2, 2, 1, 2], seen)


# --- node

def renderings(metrics):
    """Every way to show a snapshot."""
    view = agent.View(80, 24)
    return agent.render_view(None, metrics, view), agent.render_json(metrics), agent.render_prometheus(metrics)


class NodeTest(Case):
    def test_empty_root_gives_a_valid_snapshot_with_everything_unset(self):
        node, failures = collected_node(self.tree({}))
        self.assertEqual({}, failures)
        self.assertLessEqual({*present(node)}, {'os', 'kernel_arch'})
        metrics = wire.Metrics.FromString(wire.Metrics(node_metrics=node).SerializeToString())
        self.assertEqual(node, metrics.node_metrics)
        for text in renderings(metrics):
            self.assertTrue(text)

    def test_malformed_file_costs_what_comes_from_it_and_the_rest_goes_out(self):
        def fields():
            node, failures = collected_node(roots)
            return list(failures), {*present(node)}

        roots = self.write(NODE)
        _, whole = fields()
        memory = 'total_memory available_memory used_memory memory_used_perc meminfo'
        for path, text, subject, missing in (
                ('proc/stat', 'cpu x', 'cpu', 'boot_time cpu_infos cpu_seconds stat'),
                ('proc/cpuinfo', 'processor', 'cpu', ''),
                ('proc/meminfo', 'MemTotal', 'memory', memory),
                ('proc/vmstat', 'oom_kill', 'memory', 'vmstat'),
                ('proc/pressure/io', 'some avg10=1', 'pressure', 'psi_io_metrics'),
                ('proc/loadavg', '1', 'load', 'load_average'),
                ('proc/sys/fs/file-nr', '1', 'kernel limits', ''),
                ('proc/sys/kernel/pid_max', 'x', 'kernel limits', ''),
                ('proc/1/net/sockstat', 'TCP: x y', 'network protocols', 'sockstat'),
                ('proc/1/net/softnet_stat', 'x', 'network protocols', 'softnet_stat'),
                ('sys/fs/cgroup/system.slice/kubelet.service/cpu.stat', 'x', 'services', ''),
                ('proc/1/statm', 'x y', 'processes', ''),
                ('proc/1/mountinfo', 'x', 'file systems', 'disk_usages'),
                ('proc/diskstats', 'x', 'disk I/O', 'disk_io_summary diskstats'),
                ('proc/1/net/dev', 'lo: 1', 'network', 'net_usage network_interfaces'),
                ('sys/class/net/lo/mtu', 'wide', 'network', ''),
                ('proc/1/net/route', 'Iface\nx', 'addresses', ''),
                ('proc/uptime', 'x', 'system', 'uptime')):
            with self.subTest(path=path, text=text):
                self.write({path: text})
                failed, rest = fields()
                self.write({path: NODE[path]})
                self.assertEqual(([f'{subject}: {os.path.basename(path)}'], {*missing.split()}), (failed, whole - rest))
        # A number that is out of range is absent, and no failure.
        self.write({'proc/meminfo': f'MemTotal: {2 ** 64}\n'})
        self.assertEqual(([], whole - {*memory.split()}), fields())

    def test_other_read_errors_are_a_failure_of_their_file(self):
        roots = self.write(NODE)
        os.remove(f'{self.directory}/proc/meminfo')
        os.symlink('/proc/self/mem', f'{self.directory}/proc/meminfo')
        self.assertEqual({'memory: meminfo': '/proc/meminfo: Input/output error'}, collected_node(roots)[1])

    def test_what_fails_beyond_a_file_costs_its_subject_and_so_does_a_bug(self):
        def failing_with(error):
            return mock.Mock(side_effect=error)
        self.patch(NODE_SUBJECTS={'file': failing_with(ValueError('f: bad')), 'disk': failing_with(OSError('EIO')),
                                  'rate': failing_with(OverflowError('big')), 'fine': mock.Mock()})
        self.assertEqual({'file': 'f: bad', 'disk': 'EIO', 'rate': 'big'}, collected_node(LIVE)[1])
        agent.NODE_SUBJECTS['fine'].assert_called_once()
        self.patch(NODE_SUBJECTS={'odd': failing_with(KeyError('x')), 'fine': mock.Mock()})
        failures = collected_node(LIVE)[1]
        self.assertRegex(failures['odd'], r"\AKeyError\('x'\) in \w+, line \d+\Z")
        self.assertEqual(failures['bug'], failures['odd'])
        agent.NODE_SUBJECTS['fine'].assert_called_once()

    def test_state_lives_on_also_across_a_cycle_that_failed(self):
        state, seen = agent.NodeState(1), []
        for text in 'cpu 0 0 0 0\n', 'cpu x\n', 'cpu 1 0 0 3\n':
            node, _ = collected_node(self.write({'proc/stat': text}), state)
            seen.append(agent.known(node, 'total_cpu_percentage'))
        self.assertEqual([None, None, 25.0], seen)


# --- output

class OutputTest(Case):
    def test_sizes_and_times_for_people(self):
        self.check_table(agent.human_bytes, [
            (0, '0 B'), (1023, '1023 B'), (1024, '1.0 KiB'), (1536 * 1024, '1.5 MiB'), (2 ** 30, '1.0 GiB'),
            (5000 * 2 ** 40, '5000.0 TiB')])
        self.check_table(agent.human_seconds, [
            (59, '0 min'), (3599, '59 min'), (3600, '1 h 0 min'), (172799, '47 h 59 min'), (172800, '2 d 0 h'),
            (180000, '2 d 2 h')])
        self.check_table(agent.human_short, [
            (None, '-'), (0, '0'), (998, '998'), (1023, '1.0K'), (34 * 2**20, '34M'),
            (1.1 * 2**30, '1.1G'), (5 * 2**50, '5P')])
        self.assertLessEqual(max(len(agent.human_short(1.07 ** n)) for n in range(500)), 5)

    def test_json_is_one_line_of_ascii_and_leaves_out_what_is_absent(self):
        name = 'new\nline \x9b \u2028 \u20ac'
        metrics = wire.Metrics(timestamp=1, node_metrics=wire.NodeMetrics(hostname=name, uptime=0))
        line = agent.render_json(metrics)
        self.assertTrue(line.isascii() and line.isprintable(), line)
        node = json.loads(line)['node_metrics']
        self.assertEqual((name, '0'), (node['hostname'], node['uptime']))
        self.assertFalse({'boot_time', 'primary_ipv4', 'psi_io_metrics', 'net_usage'} & node.keys())

    def test_terminal_of_another_encoding_gets_question_marks(self):
        self.write({'proc/7/statm': '1 2 3\n', 'proc/7/comm': 'na\u20acme\n'})
        for output, begin in ('table', 'n'), ('json', '{'), ('prometheus', '#'):
            with self.subTest(output):
                run = self.main(*self.node, '--once', '--output', output, encoding='ascii')
                self.assertEqual((0, 1, begin), (run.code, len(run.troubles), run.out[0]), run.err)


# --- live view

def sample(seconds, pods=(), **node):
    """A node after so many seconds of the agent: every counter has gone on by 1000 a second."""
    count = round(1000 * seconds)
    defaults = dict(
        hostname='node-a', platform='debian', platform_version='13', kernel_version='6.12.1', uptime=7200,
        total_cpu_percentage=75.0, cpu_infos=[dict(cpu=0), dict(cpu=1)],
        cpu_seconds=dict(user=3 * seconds, system=2 * seconds, idle=5 * seconds), total_memory=2**30,
        memory_used_perc=50.0, meminfo={'SwapTotal': 2**30, 'SwapFree': 2**28},
        load_average=dict(load1=1.5, load5=2.5, load15=3.5), procs=99,
        net_usage=dict(total_bytes_received=count, total_bytes_sent=2 * count),
        disk_io_summary=dict(total_read_bytes=3 * count, total_write_bytes=4 * count),
        disk_usages=[dict(mountpoint='/', used_percent=20), dict(mountpoint='/data', used_percent=85),
                     dict(mountpoint='/nfs', stuck=True)],
        container_runtime=dict(name='containerd', version='2.0', conditions={'RuntimeReady': True}))
    return wire.Metrics(node_metrics={**defaults, **node}, pod_metrics=pods, agent_metrics=dict(
        sequence=count, uptime_seconds=seconds, cpu_seconds_total=seconds / 50, resident_bytes=2**25))


def shown_container(container_id, seconds, cores=0, memory=0, **others):
    """Throttled in one period of four, where its limit is 2 cores."""
    periods = round(10 * seconds)
    cgroup = dict(
        path=f'kubepods/{container_id}',
        cpu=dict(max=dict(quota_usec=200000, period_usec=100000),
                 stat=dict(nr_periods=periods, nr_throttled=periods // 4)),
        memory=dict(max=2**30),
        io=dict(stat=[dict(device='8:0', rbytes=round(2048 * seconds)),
                      dict(device='8:1', wbytes=round(4096 * seconds))]))
    return {**dict(
        id=container_id, name=container_id, state='CONTAINER_RUNNING', image=f'registry/{container_id}:1',
        cgroup=cgroup, cpu_metrics=dict(usage_nano_cores=dict(value=round(cores * 1e9))),
        memory_metrics=dict(working_set_bytes=dict(value=memory))), **others}


def shown_pods(seconds):
    interfaces = [dict(name=name, counters=dict(rx_bytes=round(512 * seconds), tx_bytes=round(256 * seconds)))
                  for name in ('eth0', 'eth1')]
    return [
        dict(id='1', namespace='shop', name='web', network_interfaces=interfaces, container_metrics=[
            shown_container('nginx', seconds, 1.9, 2**28, restart_count=3)]),
        dict(id='2', namespace='kube-system', name='dns', container_metrics=[
            shown_container('coredns', seconds, 0.25, 2**29, restart_count=7)]),
        dict(id='3', namespace='shop', name='job', container_metrics=[
            shown_container('old', 0, state='CONTAINER_EXITED', status=dict(reason='OOMKilled', exit_code=137))])]


def without_colors(text):
    return re.sub(r'\x1b\[\d*m', '', text)


class LiveViewTest(Case):
    def view(self, width=80, height=24, color=False, **others):
        before, after = (sample(seconds, shown_pods(seconds)) for seconds in (10, 12))
        return agent.render_view(before, after, chosen_view(width, height, color, **others))

    def test_eighty_columns(self):
        """This node's CPUs take five times what they have: each part of their time is a number of its own."""
        self.assertEqual(self.view().splitlines(), [
            'node-a  debian 13  Linux 6.12.1  up 2 h 0 min',
            'cpu   75.0% [||||||||||    ] of 2 CPUs  us 150 sy 100 ni 0 io 0 si 0 st 0',
            'mem   50.0% [|||||||       ] of 1.0 GiB  swap  75.0% [||||||||||    ] of 1.0 GiB',
            'load 1.50 2.50 3.50  99 processes  pressure not known',
            'disk /nfs STUCK  /data 85%  / 20%',
            'cri  containerd 2.0 ready   agent 2.0% cpu 32.0 MiB',
            '3 pods, 2/3 containers running, by trouble   ? help, / filter, q quit',
            ' NAMESPACE   POD CONTAINER   CPU %LIM   MEM %LIM  RST WHY',
            '>shop        job old        0.00   0%     0   0%    - OOM killed',
            ' shop        web nginx      1.90  95%  256M  25%    3 throttled',
            ' kube-system dns coredns    0.25  12%  512M  50%    7 throttled'])

    def test_the_wider_the_view_the_more_columns(self):
        for width, end in ((109, '%LIM  RST WHY'), (110, 'READ/s WRITE/s  RST STATE      WHY'), (159, ' WHY'),
                           (160, ' WHY        IMAGE')):
            self.assertRegex(self.view(width).splitlines()[7], f'{end}$')
        lines = self.view(200).splitlines()
        self.assertEqual(lines[7:11:2], [
            ' NAMESPACE   POD CONTAINER   CPU %LIM  THR   MEM %LIM  RX/s  TX/s READ/s WRITE/s  RST STATE      '
            'WHY        IMAGE',
            ' shop        web nginx      1.90  95%  25%  256M  25%  1.0K   512   2.0K    4.0K    3 running    '
            'throttled  registry/nginx:1'])

    def test_the_taller_the_view_the_longer_the_header(self):
        for height, words in ((5, 'cpu mem 3 NA~CE >shop'), (12, 'node-a cpu mem cri 3 NA~CE'),
                              (24, 'node-a cpu mem load disk cri 3 NA~CE'),
                              (30, 'node-a cpu mem load i/o disk cri  3 NA~CE')):
            with self.subTest(height):
                lines = self.view(20, height).split('\n')
                self.assertLessEqual(max(map(len, lines)), 20)
                self.assertEqual([line.split() and line.split()[0] or '' for line in lines][:len(words.split(' '))],
                                 words.split(' '))

    def test_columns_of_which_nothing_is_known_are_left_out(self):
        bare = dict(id='1', name='bare', state='CONTAINER_RUNNING')
        pod = dict(id='p', namespace='n', name='p', container_metrics=[bare])
        usages = [dict(kind='layer', bytes=2048), dict(kind='logs', bytes=1024), dict(kind='memory', bytes=2**30), {}]
        for others, titles in (({}, 'WHY'), (dict(ephemeral_storage=dict(usages=usages)), 'DISK WHY'),
                               (dict(ephemeral_storage=dict(usages=usages[2:])), 'WHY')):
            lines = agent.render_view(None, sample(1, [{**pod, **others}]), agent.View(109)).splitlines()[-2:]
            self.assertEqual(lines[0].split()[3:], titles.split())
        self.assertRegex(agent.render_view(None, sample(1, [
            {**pod, 'ephemeral_storage': dict(usages=usages)}]), agent.View(80)), r'bare +3\.0K$')

    def test_what_is_in_trouble(self):
        """The worst counts; what has completed, and what was long ago, is none."""
        now = 10**9

        def ago(seconds):
            return (now - seconds) * 10**9

        def group(**others):
            return dict(memory=dict(max=1000), cpu=dict(max=dict(quota_usec=100000, period_usec=100000)), **others)

        running, exited = 'CONTAINER_RUNNING', 'CONTAINER_EXITED'
        for word, state, others in (
                ('', running, {}),
                ('OOM 12s', running, dict(last_oom_kill_ns=ago(12), oom_kills=1)),
                ('OOM 9 min', running, dict(last_oom_kill_ns=ago(599), restart_count=1,
                                            status=dict(started_at_ns=ago(9)))),
                ('', running, dict(last_oom_kill_ns=ago(601), oom_kills=1)),
                ('', running, dict(oom_kills=3)),
                ('restarted', running, dict(restart_count=1, last_exit=dict(finished_at_ns=ago(599), exit_code=0))),
                ('restarted', running, dict(restart_count=1, status=dict(started_at_ns=ago(5)))),
                ('', running, dict(restart_count=0, status=dict(started_at_ns=ago(5)))),
                ('', running, dict(restart_count=1, last_exit=dict(finished_at_ns=ago(601), exit_code=3))),
                ('exit 3', exited, dict(status=dict(exit_code=3, reason='Error', finished_at_ns=ago(9999)))),
                ('OOM killed', exited, dict(status=dict(exit_code=137, reason='OOMKilled'))),
                ('created', 'CONTAINER_CREATED', dict(created_at=ago(61))),
                ('mem 97%', running, dict(memory_metrics=dict(working_set_bytes=dict(value=970)), cgroup=group())),
                ('cpu 98%', running, dict(cpu_metrics=dict(usage_nano_cores=dict(value=980000000)), cgroup=group())),
                ('pressure', running, dict(cgroup=group(io=dict(pressure=dict(some=dict(avg10=20)))))),
                ('', running, dict(cgroup=group(io=dict(pressure=dict(some=dict(avg10=19.9))))))):
            metrics = wire.Metrics(timestamp=now, pod_metrics=[dict(container_metrics=[
                dict(id='1', name='app', state=state, **others)])])
            with self.subTest(word, **others):
                row = self.row(metrics)
                self.assertEqual((row.why, bool(row.score)), (word, bool(word)))
        for word, state, others in (
                ('completed', exited, dict(status=dict(exit_code=0, reason='Completed', finished_at_ns=ago(5)),
                                           restart_count=2, last_exit=dict(finished_at_ns=ago(5), exit_code=0))),
                ('created', 'CONTAINER_CREATED', dict(created_at=ago(59))), ('exited', exited, {})):
            metrics = wire.Metrics(timestamp=now, pod_metrics=[dict(container_metrics=[dict(state=state, **others)])])
            with self.subTest(word, **others):
                self.assertEqual((self.row(metrics).score, self.row(metrics).why), (0, word))

    def row(self, metrics):
        view = agent.View(80)
        agent.render_view(None, metrics, view)
        return view.rows[0]

    def test_orders(self):
        pods = shown_pods(12)
        pods[0]['ephemeral_storage'] = dict(usages=[dict(kind='layer', bytes=5)])
        before, after = sample(10, shown_pods(10)), sample(12, pods)
        for order, names in dict(
                trouble='old nginx coredns', cpu='nginx coredns old', memory='coredns nginx old',
                throttling='nginx coredns old', restarts='coredns nginx old', network='nginx coredns old',
                disk='nginx coredns old', **{'%limit': 'nginx coredns old', 'I/O': 'nginx coredns old'}).items():
            with self.subTest(order):
                view = chosen_view(80, order=order)
                agent.render_view(before, after, view)
                self.assertEqual([row.names[2] for row in view.rows], names.split())
        self.assertEqual(9, len(agent.ORDERS))

    def test_names_are_cut_in_the_middle(self):
        self.check_table(agent.fit, [
            (('frontend-6d4b9c7b8-x2x4q', -18), 'frontend~b8-x2x4q'[:8] + '~7b8-x2x4q'[:10]),
            (('ab', 5), '   ab'), (('ab', -5), 'ab   '), (('abc', 0), 'abc'),
            (('\u4f60\u597d\u4f60\u597d', -5), '\u4f60~\u597d'), (('\u4f60\u597d', -6), '\u4f60\u597d  ')])
        self.check_table(agent.cells, [('abc', 3), ('\u4f60\u597d', 4), ('e\u0301', 1), ('\uff21', 2), ('', 0)])
        self.check_table(agent.clip, [(('\u4f60\u597d', 3), '\u4f60'), ((f'{agent.RED}abc{agent.PLAIN}d', 2),
                                                                     f'{agent.RED}ab{agent.PLAIN}')])

    def test_pods_are_told_apart_at_eighty_by_twenty_four(self):
        lines = agent.render_view(None, sample(1, many_pods(1)), agent.View(80, 24)).splitlines()
        self.assertEqual((24, 16), (len(lines), len({tuple(line.split()[1:3]) for line in lines[8:]})))

    def test_never_wider_or_higher_than_the_view(self):
        pods = [dict(namespace=f'{"n" * 30}{n}', name='p' * 100 + '\u4f60' * 50, container_metrics=[
            shown_container('c' * 99, 1, 300, 2**55, id=str(n), restart_count=12345)]) for n in range(300)]
        after = sample(1, pods, disk_usages=[dict(mountpoint='/' + 'm' * 50, used_percent=99)] * 20)
        sizes = (1, 20, 80, 109, 110, 160, 200), (1, 5, 9, 50, 1000)
        for width, height, color in itertools.product(*sizes, (False, True)):
            with self.subTest(width=width, height=height, color=color):
                lines = without_colors(agent.render_view(None, after, agent.View(width, height, color))).split('\n')
                self.assertLessEqual(max(map(agent.cells, lines)), width)
                self.assertEqual(len(lines), min(height, 310))
        self.assertEqual(agent.render_view(None, after, agent.View(200)).count('\n'), 309)

    def test_colours_tell_what_is_wrong_and_nothing_else_is_a_control_code(self):
        self.assertNotIn('\x1b', self.view(200))
        text = self.view(200, color=True)
        for color, marked in ((agent.RED, '/nfs STUCK'), (agent.YELLOW, '/data 85%'), (agent.RED, ' 95%'),
                              (agent.REVERSE, '>shop'), (agent.BOLD, 'node-a'), (agent.YELLOW, '|||||||||||||||'),
                              (agent.YELLOW, 'throttled')):
            with self.subTest(marked):
                self.assertIn(color + marked, text)
        self.assertNotIn(agent.YELLOW + '/ 20%', text)
        self.assertEqual([line.rstrip() for line in without_colors(text).split('\n')], self.view(200).split('\n'))

    def test_a_pipe_gets_every_row_and_no_cursor(self):
        lines = agent.render_view(None, sample(1, many_pods(1)), agent.View(agent.TABLE_WIDTH)).split('\n')
        self.assertEqual(10 + 330, len(lines))
        self.assertEqual({' '}, {line[0] for line in lines[9:]})

    def test_a_runtime_in_trouble_is_named(self):
        for runtime, expected in (
                (dict(name='cri-o', version='1', conditions={'RuntimeReady': True, 'NetworkReady': False}),
                 'cri  cri-o 1 NOT READY (NetworkReady)'),
                (dict(name='cri-o', version='1'), 'cri  cri-o 1 '), ({}, 'cri  no container runtime found'),
                (dict(name='cri-o'), '0 pods, 0/0 containers running'), ({}, '\nno container runtime found')):
            with self.subTest(expected):
                text = agent.render_view(None, sample(1, container_runtime=runtime), agent.View(80))
                self.assertIn(expected, text)
                self.assertEqual(bool(runtime), '0 pods' in text)
        after = sample(2)
        after.agent_metrics.failing_subjects.append('memory')
        self.assertIn('   in trouble: memory   agent 2.0%', agent.render_view(sample(1), after, agent.View(80)))

    def test_names_are_not_control_codes(self):
        evil = 'a\x1b[31m\x9bm\x07\r\n\u202eb'
        pod = dict(name=evil, namespace=evil, uid=evil, runtime_handler=evil, qos_class=evil, container_metrics=[
            dict(id='1', name=evil, state=evil, image=evil, image_ref=evil, labels={evil: evil},
                 status=dict(reason=evil))],
            volumes=[dict(name=evil, plugin=evil, usage=dict(error=evil))])
        metrics = sample(1, [pod], hostname=evil, platform=evil,
                         disk_usages=[dict(mountpoint=evil), dict(mountpoint=evil, stuck=True, error=evil)],
                         container_runtime=dict(name=evil, version=evil, conditions={evil: False}),
                         processes_mem_info=[dict(name=evil)])
        metrics.agent_metrics.failing_subjects.append(evil)
        for namespace in '', evil:
            text = agent.render_view(None, metrics, chosen_view(400, namespace=namespace))
            self.assertEqual({char for char in text if not char.isprintable()}, {'\n'})
            self.assertGreaterEqual(text.count(r'a\x1b[31m\x9bm\x07\r\n\u202eb'), 9)
        live = live_on([metrics], 400)
        live.failures = {evil: evil}
        for page in agent.PAGES:
            live.page = page
            with self.subTest(page):
                for line in agent.page_lines(live):
                    self.assertTrue(without_colors(line).isprintable(), line)

    def test_unknown_values_are_not_shown_as_zero(self):
        for pods in [], [dict(container_metrics=[{}])]:
            text = agent.render_view(None, wire.Metrics(pod_metrics=pods), agent.View(200))
            self.assertNotIn('0', ''.join(text.splitlines()[:6]))

    def test_rates_need_two_samples_of_one_counter(self):
        self.check_table(agent.per_second, [
            ((None, 1, 1), None), ((1, None, 1), None), ((1, 2, 0), None), ((2, 1, 1), None), ((10, 30, 4), 5.0),
            ((0, 0, 2), 0.0)])


def chosen_view(width, height=None, color=False, **others):
    view = agent.View(width, height, color)
    vars(view).update(others)
    return view


def many_pods(seconds, pods=110, containers=3):
    """Pods whose names differ at their ends alone."""
    return [dict(id=f'pod{number}', namespace=('default', 'kube-system', 'shop')[number % 3],
                 name=f'frontend-deployment-6d4b9c7b8-{number:05x}', container_metrics=[
                     shown_container(f'c{index}', seconds, (number * 7919 % 997) / 1000, 2**27, id=f'{number}.{index}')
                     for index in range(containers)]) for number in range(pods)]


def live_on(snapshots, width=80, height=24):
    """A live view that has been given these snapshots, without a terminal."""
    live = agent.Live()
    live.width, live.height, live.color = width, height, False
    for previous, metrics in zip([None, *snapshots], snapshots):
        agent.take_snapshot(live, previous, metrics)
    agent.list_lines(live)
    return live


class LiveKeysViewTest(Case):
    """What keys do, without a terminal."""

    def setUp(self):
        super().setUp()
        self.live = live_on([sample(10, many_pods(10)), sample(12, many_pods(12))])
        self.live.utf8 = False

    def press(self, *keys):
        """The screen after these keys."""
        for key in keys:
            agent.press_key(self.live, key)
            lines = agent.page_lines(self.live) if self.live.page else agent.list_lines(self.live)
        return '\n'.join(lines)

    def test_keys_before_the_first_snapshot(self):
        self.live = agent.Live()
        for text, *_ in agent.KEYS:
            for key in text[:10].split():
                self.press(key)
        self.assertTrue(self.live.ended)

    def at(self):
        """Where the cursor is, and that its row is on the screen."""
        row = [line for line in agent.list_lines(self.live) if line.startswith('>')]
        self.assertEqual(1, len(row))
        return self.live.at['']

    def test_the_cursor_reaches_every_container(self):
        for key, place in (('Down', 1), ('j', 2), ('Up', 1), ('k', 0), ('k', 0), ('PgDn', 16), ('PgUp', 0),
                           ('End', 329), ('j', 329), ('Home', 0), ('G', 329), ('g', 0)):
            self.press(key)
            self.assertEqual(place, self.at(), key)

    def test_the_cursor_follows_its_container_and_stays_in_its_place_without_it(self):
        self.press('c', 'G')
        chosen = self.live.chosen
        self.press('m')
        self.assertEqual(0, self.at())
        self.live.chosen = chosen
        self.assertEqual(chosen, self.live.rows[self.at()].id)
        self.press('G')
        self.live.metrics.pod_metrics.pop()
        agent.list_lines(self.live)
        self.assertLess(self.at(), 327)

    def test_filter(self):
        self.assertIn('/00_', self.press('/', '0', '0'))
        self.press('0', '6', 'b', 'x', 'Backspace')
        self.assertEqual(3, len(self.live.rows))
        self.assertIn('/0006b  1 pod', self.press('Enter'))
        self.press('Esc')
        self.assertEqual(330, len(self.live.rows))
        self.press('/', 'C', '2')
        self.assertEqual({'c2'}, {row.names[2] for row in self.live.rows})
        self.press('Down', 'Space', 'q', 'Esc')
        self.assertEqual(('', False, False, 330), (self.live.search, self.live.paused, self.live.ended,
                                                   len(self.live.rows)))
        self.assertIn('0 pods, 0/0', self.press('/', 'Q', 'Q', 'Enter', 'j', 'G', 'k'))
        self.assertIn('No such container', self.press('Enter'))

    def test_orders_and_namespaces_go_round(self):
        seen = [(self.press(key), self.live.order)[1] for key in 's>s<Scmr']
        self.assertEqual(seen, ['cpu', 'memory', '%limit', 'memory', 'cpu', 'cpu', 'memory', 'restarts'])
        self.press('c', 'S', 'S')
        self.assertEqual('disk', self.live.order)
        seen = [(self.press(key), self.live.namespace)[1] for key in 'nnnnN']
        self.assertEqual(seen, ['default', 'kube-system', 'shop', '', 'shop'])
        self.live.namespace = 'gone'
        self.press('n')
        self.assertEqual('', self.live.namespace)

    def test_a_page_opens_scrolls_and_closes(self):
        self.live.height = 9
        first = self.press('?')
        self.assertIn('keys, lines 1 to 7 of ', first)
        self.assertIn('lines 2 to 8 of', self.press('j'))
        self.assertIn('quit', self.press('G'))
        self.assertEqual(first, self.press('g'))
        for close in '?', 'Esc':
            self.press(close)
            self.assertEqual('', self.live.page)
            self.press('?')
        for text, *_ in agent.KEYS:
            self.assertIn(text, agent.help_lines(self.live))

    def test_what_is_too_wide_for_a_page_goes_on_in_the_next_line(self):
        self.live.failures, self.live.width = {'memory': 'x' * 99 + 'end'}, 40
        self.assertEqual(['memory: ' + 'x' * 32, 'x' * 40, 'x' * 27 + 'end'], self.press('t').split('\n')[2:])
        self.live.failures = {}
        self.assertEqual('none', self.press('t', 't').split('\n')[2])

    def test_pause(self):
        drawn = self.drawn()
        self.press('Space')
        self.assertIn('PAUSED', self.drawn())
        agent.take_snapshot(self.live, None, sample(14, hostname='other'))
        self.assertNotIn('other', self.drawn())
        self.press('Space')
        agent.take_snapshot(self.live, None, sample(14, hostname='other'))
        self.assertIn('other', self.drawn())
        self.assertNotIn('PAUSED', drawn)

    def drawn(self):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            agent.draw(self.live)
        return out.getvalue()

    def test_without_utf8_only_ascii_is_drawn(self):
        agent.take_snapshot(self.live, None, sample(14, hostname='n\u00f6de'))
        for utf8, name in (True, 'n\u00f6de'), (False, 'n?de'):
            self.live.utf8 = utf8
            self.assertIn(name, self.drawn())
            self.assertEqual(utf8, not self.drawn().isascii())

    def test_the_history_is_bounded_and_told_in_bars(self):
        self.check_table(agent.spark, [
            (([0, 1, 7, None], True), '\u2581\u2582\u2588 '), (([0, 1, 7, None], False), '_.# '), (([0], True),
             '\u2581'), (([None], False), ' ')])
        for _ in range(99):
            agent.take_snapshot(self.live, None, sample(1))
        self.assertEqual([{}] * 60, list(self.live.history))

    def test_pages_of_the_node(self):
        node = dict(
            processes_mem_info=[dict(pid=4711, name='etcd', memory=2**30)],
            disk_usages=[dict(mountpoint='/', fstype='ext4', total=2**40, used=2**39, used_percent=50, inodes=1024,
                              inodes_free=512), dict(mountpoint='/nfs', stuck=True)])
        pair = []
        for count in 0, 2000:
            pair.append(sample(10 + count / 1000, **node, diskstats=[dict(
                device='sda', read_ios=count, write_ios=2 * count, read_sectors=4 * count, write_sectors=8 * count,
                io_ticks=count // 2, in_flight=3, device_number='8:0')],
                network_interfaces=[dict(name='eth0', operstate='up', counters=dict(
                    rx_bytes=count, tx_bytes=3 * count))]))
        self.live = live_on(pair, 120)
        self.assertRegex(self.press('p'), r'4711 +1\.0G  etcd')
        text = self.press('d')
        for line in (r'sda +1\.0K +2\.0K +2\.0M +3\.9M +50% +3 +8:0', r'/ +1\.0T +512G +50% +1\.0K +50% ',
                     r'/nfs .*True', r'eth0 +1\.0K +2\.9K +up', r'i/o  network in '):
            self.assertRegex(text, line)

    def test_the_page_of_a_container(self):
        now = 10**9
        group = dict(cpu=dict(max=dict(quota_usec=200000, period_usec=100000),
                              pressure=dict(some=dict(avg10=1, avg60=2, avg300=3), full=dict(avg10=4))),
                     memory=dict(max=2**30, swap=dict(current=2**20, max=2**21)), pids=dict(current=7, max=100))
        pair = []
        for seconds in 10, 12:
            io_stat = [dict(device='8:0', rbytes=seconds * 1024, wbytes=0, rios=seconds * 5, wios=0)]
            pod = dict(
                id='p', uid='uid-1', namespace='shop', name='web', qos_class='Burstable', host_network=False,
                runtime_handler='kata', network_interfaces=[dict(name='eth0', counters=dict(
                    rx_bytes=seconds * 512, tx_bytes=seconds * 256))],
                ephemeral_storage=dict(usages=[dict(kind='layer', name='app', bytes=4096, inodes=3)]),
                volumes=[dict(name='data', plugin='kubernetes.io~csi', usage=dict(
                    total=2**30, used=2**29, used_percent=50)),
                         dict(name='nfs', usage=dict(stuck=True))],
                container_metrics=[shown_container(
                    'app', seconds, 1.5, 2**29, cgroup={**group, 'io': dict(stat=io_stat)}, labels={'team': 'a'},
                    image_ref='sha256:1', oom_kills=2, last_oom_kill_ns=(now - 30) * 10**9, restart_count=4,
                    status=dict(started_at_ns=(now - 7200) * 10**9),
                    last_exit=dict(exit_code=137, reason='OOMKilled', finished_at_ns=(now - 60) * 10**9))])
            pair.append(sample(seconds, [pod]))
            pair[-1].timestamp = now
        self.live = live_on(pair, 120, 99)
        self.live.utf8 = False
        text = self.press('Enter')
        for line in ('container  app', 'pod        shop/web, Burstable, runtime kata', 'uid        uid-1',
                     'network    of its own', 'trouble    OOM 30s', 'state      running .*started 2 h 0 min ago',
                     'restarts   4', 'last exit  137 OOMKilled, 1 min ago', 'OOM kills  2, last 30s ago',
                     'cpu        1.50 of 2.00 75%', '           ##', 'memory     512M of 1.0G 50%',
                     'swap       1.0M of 2.0M 50%', 'pids       7 of 100 7%',
                     r'stalled    cpu     some 1.0% 2.0% 3.0%  full 4.0% 0.0% 0.0%', 'memory  -', 'image_ref  sha256:1',
                     'image      registry/app:1', 'labels     team=a', r'eth0 +512 +256', r'8:0 +1.0K +0 +5 +0',
                     r'layer +app +4.0K +3', r'data +512M +1.0G +50% .*kubernetes.io~csi', r'nfs .*True'):
            with self.subTest(line):
                self.assertRegex(text, line)
        del self.live.metrics.pod_metrics[:]
        self.assertIn('No such container', '\n'.join(agent.page_lines(self.live)))
        self.assertEqual('', self.press('Enter') and self.live.page)

    def test_a_frame_of_330_containers_is_cheap(self):
        """10 ms on one core that is ours; here the best of five may take three times as long."""
        best = math.inf
        for _ in range(5):
            began = time.process_time()
            self.drawn()
            best = min(best, time.process_time() - began)
        self.assertLess(best, 0.030)


class Terminal:
    """The agent on a terminal of its own."""

    def __init__(self, test, environment={}, **settings):
        self.master, self.slave = pty.openpty()
        test.addCleanup(self.close)
        self.text = ''
        self.resize(24, 80)
        self.before = termios.tcgetattr(self.slave)
        test.write({'proc/sys/kernel/hostname': 'node-pty\n', 'proc/loadavg': '0.01 0.02 0.03 1/2 3\n'})
        usual = dict(stdin=self.slave, stdout=self.slave, stderr=self.slave)
        self.process = test.start(
            '--main-loop-duration', '60', start_new_session=True, environment={'TERM': 'xterm', **environment},
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0), **{**usual, **settings})

    def close(self):
        for descriptor in filter(None, (self.master, self.slave)):
            os.close(descriptor)

    def resize(self, rows, columns):
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack('HHHH', rows, columns, 0, 0))

    def wait_for(self, text):
        """What is written up to and with this text, from where the last wait ended."""
        until = time.monotonic() + PATIENCE_SECONDS
        while text not in self.text:
            if not select.select([self.master], [], [], max(0, until - time.monotonic()))[0]:
                raise AssertionError(f'{text!r} is not in {self.text!r}')
            self.text += os.read(self.master, 65536).decode()
        seen, _, self.text = self.text.partition(text)
        return seen + text

    def press(self, keys):
        os.write(self.master, keys.encode())


class TerminalViewTest(Case):
    def check_left(self, terminal, code):
        """The screen and the terminal's attributes are as they were."""
        terminal.wait_for(agent.PLAIN + agent.LEAVE_SCREEN)
        self.assertEqual(terminal.process.wait(PATIENCE_SECONDS), code)
        self.assertEqual(termios.tcgetattr(terminal.slave), terminal.before)

    def test_keys_and_a_new_size_redraw_at_once_and_q_ends_it(self):
        terminal = Terminal(self)
        drawn = terminal.wait_for('no container runtime found   ? help, / filter, q quit')
        self.assertIn(agent.ENTER_SCREEN + agent.HOME + agent.CLEAR_LINE + agent.BOLD + 'node-pty', drawn)
        # Each line clears what was there before. The terminal makes \r\n of \n.
        self.assertEqual(drawn.count('\n'), drawn.count('\r\r\n' + agent.CLEAR_LINE))
        self.assertFalse(termios.tcgetattr(terminal.slave)[3] & (termios.ECHO | termios.ICANON))
        terminal.press('?')
        terminal.wait_for('keys, lines 1 to ')
        terminal.press('?')
        terminal.wait_for('q quit')
        terminal.resize(24, 40)
        terminal.wait_for('no container runtime found   ? help, / f\r')
        terminal.press('rq')
        self.check_left(terminal, 0)

    def test_what_is_in_trouble_is_on_stderr_after_the_screen(self):
        self.write({'proc/meminfo': 'MemTotal: \x1b kB\n'})
        terminal = Terminal(self)
        terminal.wait_for('q quit')
        terminal.press('t')
        terminal.wait_for('in trouble, lines')
        terminal.wait_for('memory: ')
        reason = terminal.wait_for('malformed')
        terminal.press('q')
        self.check_left(terminal, 0)
        terminal.wait_for('kubensage-agent: memory: ')
        self.assertEqual(reason, terminal.wait_for('malformed'))

    def test_keys_that_arrive_in_parts(self):
        """A sequence in two reads is one key; ESC alone is Esc."""
        terminal = Terminal(self)
        terminal.wait_for('q quit')
        terminal.press('?')
        terminal.wait_for('keys, lines 1 ')
        for parts in ('\x1b', '[B'), ('\x1b[', 'B'), ('\x1bOB', ''):
            for part in parts:
                terminal.press(part)
        terminal.wait_for('keys, lines 3 ')
        terminal.press('\x1b')
        terminal.wait_for('no container runtime found')
        terminal.press('q')
        self.check_left(terminal, 0)

    def test_signals_leave_the_terminal_as_it_was(self):
        for colored, end in (True, lambda: terminal.press('\x03')), (False, lambda: terminal.process.terminate()):
            terminal = Terminal(self, environment={} if colored else {'NO_COLOR': '1'})
            self.assertEqual(agent.BOLD in terminal.wait_for('q quit'), colored)
            end()
            self.check_left(terminal, 0)

    def test_a_suspended_view_gives_the_terminal_back_and_returns(self):
        terminal = Terminal(self)
        terminal.wait_for('q quit')
        terminal.press('\x1a')
        terminal.wait_for(agent.LEAVE_SCREEN)
        wait_for('the stop', lambda: re.search(
            r'State:\s+T', read_text(f'/proc/{terminal.process.pid}/status')))
        self.assertEqual(termios.tcgetattr(terminal.slave), terminal.before)
        terminal.process.send_signal(signal.SIGCONT)
        terminal.wait_for(agent.ENTER_SCREEN)
        terminal.wait_for('q quit')
        terminal.press('q')
        self.check_left(terminal, 0)

    def test_a_terminal_that_goes_away_ends_it_quietly(self):
        """SIGHUP, and where that is blocked, EIO."""
        for change in '', 'import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])':
            with self.subTest(change), open(f'{self.directory}/err', 'w+', encoding='utf-8') as errors:
                terminal = Terminal(self, stderr=errors, change=change)
                terminal.wait_for('q quit')
                terminal.close()
                terminal.master = terminal.slave = None
                self.assertIn(terminal.process.wait(PATIENCE_SECONDS), (0, 128 + signal.SIGPIPE))
                self.assertNotRegex(read_text(errors.name), '(?i)traceback|exception|errno')

    def test_a_dumb_terminal_gets_plain_tables(self):
        for name in 'dumb', '':
            terminal = Terminal(self, environment={'TERM': name})
            text = terminal.wait_for('no container runtime found')
            self.assertNotIn('\x1b', text)
            self.assertNotIn('quit', text)
            terminal.press('\x03')
            self.assertEqual(0, terminal.process.wait(PATIENCE_SECONDS))
            self.assertEqual(termios.tcgetattr(terminal.slave), terminal.before)

    def test_a_crash_and_a_second_interrupt_leave_the_terminal_as_it_was(self):
        """A crash that the loop does not survive, and a cycle that hangs while Ctrl-C is pressed twice."""
        crashed = Terminal(self, change='agent.stopped_within = lambda *arguments: 1 / 0')
        hung = Terminal(self, change='import signal, time; agent.run_cycle = lambda *arguments: '
                                     '(print("hung", flush=True), [time.sleep(0.01) for _ in iter(lambda: signal'
                                     '.getsignal(2) is signal.default_int_handler, True)], print("warned", flush=True)'
                                     ', time.sleep(60))')
        self.check_left(crashed, 1)
        crashed.wait_for('ZeroDivisionError')
        for text in 'hung', 'warned':
            hung.wait_for(text)
            hung.press('\x03')
        self.check_left(hung, 130)


class Tmux:
    """The agent in a window of tmux, which understands its sequences: what a person sees."""

    def tmux(self, *arguments):
        return subprocess.run(['tmux', '-L', self.name, '-f', '/dev/null', *arguments], check=True, text=True,
                              stdout=subprocess.PIPE, env=self.surroundings).stdout

    def open(self, width=80, height=24, environment='LANG=C.UTF-8'):
        self.tool('tmux', '-V')
        # Not the user's shell, which may be nologin.
        self.surroundings = {**ENVIRONMENT, 'LANG': 'C.UTF-8', 'TERM': 'xterm', 'SHELL': '/bin/sh',
                             'TMUX_TMPDIR': self.directory}
        self.name = f'{os.path.basename(self.directory)}-{width}'
        self.addCleanup(subprocess.run, ['tmux', '-L', self.name, 'kill-server'], env=self.surroundings,
                        stderr=subprocess.DEVNULL)
        command = ['env', environment, sys.executable, agent.__file__, *self.node, '--main-loop-duration', '1']
        self.tmux('new-session', '-d', '-x', str(width), '-y', str(height), f'{shlex.join(command)}; sleep 60')

    def press(self, *keys):
        self.tmux('send-keys', *keys)

    def screen(self):
        return self.tmux('capture-pane', '-p')

    def see(self, pattern):
        """The screen, as soon as it has this."""
        seen = ['']

        def there():
            seen[0] = self.screen()
            return re.search(pattern, seen[0], re.MULTILINE)

        wait_for(f'{pattern!r} on the screen', there)
        return seen[0].splitlines()


class TmuxTest(Tmux, Case):

    def setUp(self):
        super().setUp()
        self.write({'proc/sys/kernel/hostname': 'node-tmux\n', 'proc/loadavg': '0.01 0.02 0.03 1/2 3\n'})
        pods, containers = [f'{number:03}' for number in range(110)], []
        for index in range(3):
            containers += [container(f'c{index}-{name}', name) for name in pods]
        containers[7].state = cri.CONTAINER_EXITED
        exited = status_of(state=cri.CONTAINER_EXITED, exit_code=3, finished_at=1, reason='Error')
        FakeRuntime(self, ListPodSandbox=list_pods(*map(sandbox, pods)), ListContainers=list_containers(*containers),
                    ListContainerStats=list_stats(*(stats(item.id, 10**9, 500) for item in containers)),
                    ContainerStatus=lambda request: exited if b'c0-007' in request else b'')

    def test_eighty_by_twenty_four(self):
        self.open()
        lines = self.see(r'^110 pods, 329/330 containers running, by trouble .* q quit$')
        lines = self.see(r'^>default +007-name +c0-007-name .*exit 3')
        self.assertEqual((24, 16), (len(lines), sum('-name' in line for line in lines)))
        self.press('G')
        self.see(r'^>default +109-name +c2-109-name')
        self.press('PgUp', 'Home', 'Down', 'Down')
        self.see(r'^>default +000-name +c1-000-name')
        self.press('Enter')
        self.see(r'^container  c1-000-name')
        self.press('End')
        self.see(r'^image_ref')
        self.press('Escape')
        self.see(r'^>default +000-name +c1-000-name')
        self.press('/', '1', '0', '9', 'Enter')
        self.see(r'^/109  1 pod, 3/3 containers running')
        self.press('Escape')
        self.see(r'^110 pods')
        self.press('s')
        self.see(r'by cpu')
        self.press('Space')
        self.see(r'^PAUSED')
        self.press('q')
        wait_for('the end of the screen', lambda: 'PAUSED' not in self.screen())

    def test_other_sizes(self):
        for width, height, rows in (200, 50, 40), (20, 5, 1):
            with self.subTest(width=width):
                self.open(width, height)
                lines = self.see('^>def' if width > 20 else '^>')
                self.assertLessEqual(max(map(len, lines)), width)
                self.assertEqual((True, True), (any(line.startswith('cpu ') for line in lines[:2]),
                                                any(line.startswith('mem ') for line in lines[:3])))
                self.assertEqual(rows, sum('-name' in line or line[:1] == '>' for line in lines))
                self.press('G')
                self.see('^>default +109-name' if width > 20 else '^>d')

    def test_a_dumb_terminal(self):
        self.open(environment='TERM=dumb')
        lines = self.see('^ default +109-name')
        self.assertNotIn('>', ''.join(lines))


# --- Prometheus

def exposed_metrics():
    time_spent = 3815668
    metrics = sample(
        10, shown_pods(10), boot_time=1700000000,
        disk_usages=[dict(device='/dev/a', fstype='ext4', mountpoint='/', total=100, free=40, read_only=False),
                     dict(device='nas:/', fstype='nfs', mountpoint='/nfs', stuck=True),
                     dict(device='/dev/b', fstype='xfs', mountpoint='/b', error='EIO')],
        network_interfaces=[dict(name=f'eth{n}', operstate='up', speed_mbits=1000, counters=dict(rx_bytes=11 + n))
                            for n in (0, 1)],
        services=[dict(name='kubelet.service', cgroup=dict(path='system.slice/kubelet.service', cpu=dict(
            stat=dict(usage_usec=time_spent))))],
        cgroup=dict(memory=dict(stat=dict(anon=6))),
        diskstats=[dict(device='vda', device_number='8:0', read_sectors=3, read_ticks=4249, discard_sectors=5)],
        softnet_stat=[dict(cpu=1, time_squeeze=8)], arp_entries={'eth0': 9}, tcp_states={'time_wait': 10},
        udp_queues={'rx_v6': 11}, nfs={'rpc_retrans': 12}, os_release={'ID': 'debian', 'HOME_URL': 'x'},
        clock=dict(freq=65536, ppsfreq=-131072 * 10**6, jitter=5, tick=10000),
        meminfo={'MemTotal': 2**30, 'Active(anon)': 4096, 'HugePages_Total': 1, 'Hugepagesize': 2**21},
        vmstat={'oom_kill': 2}, snmp={'Tcp_RetransSegs': 3}, netstat={'TcpExt_ListenDrops': 4},
        snmp6={'Udp6_InDatagrams': 5}, sockstat={'TCP_mem_bytes': 6}, sockstat6={'TCP6_inuse': 7},
        psi_cpu_metrics=dict(some=dict(total=dict(value=time_spent))))
    metrics.timestamp = 1700000123
    web, dns, _ = (pod.container_metrics for pod in metrics.pod_metrics)
    dns[0].status.started_at_ns = 1700094048904012383
    # The same container before its restart, and the same pod with a sandbox before this one.
    web[0].created_at = 2
    web.add(**shown_container('before', 10, state='CONTAINER_EXITED', name='nginx', created_at=1,
                              status=dict(exit_code=1)))
    metrics.pod_metrics.add(id='0', namespace='shop', name='web', created_at=-1,
                            container_metrics=[shown_container('nginx', 1)])
    dns[0].user_specified_image = 'registry/dns:2'
    web[0].cgroup.MergeFrom(wire.CgroupMetrics(
        cpu=dict(weight=100), memory=dict(current=2**28 + 4096, stat=dict(inactive_file=4096, pgmajfault=2)),
        cgroup=dict(procs=3), pids=dict(current=7)))
    web[0].file_system_metrics.MergeFrom(wire.FileSystemMetrics(mountpoint='/b/c', used_bytes=UInt64Value(value=14)))
    metrics.pod_metrics[0].cgroup.MergeFrom(wire.CgroupMetrics(path='kubepods/web', cpu=dict(
        stat=dict(usage_usec=time_spent))))
    metrics.agent_metrics.subject_seconds.update({'memory': 0.25, 'cpu': 0.5})
    metrics.agent_metrics.failing_subjects.append('memory: vmstat')
    metrics.agent_metrics.failures_total.update({'memory': 3, 'memory: vmstat': 4})
    metrics.agent_metrics.cri_methods.add(method='Version', calls_total=4, seconds_total=0.25)
    return metrics


# What cAdvisor says of a container, for the words WEB, DNS, JOB below.
CADVISOR_LABELS = {
    'WEB': 'container="nginx",id="/kubepods/nginx",image="registry/nginx:1",name="nginx",namespace="shop",pod="web"',
    'DNS': 'container="coredns",id="/kubepods/coredns",image="registry/dns:2",name="coredns",namespace="kube-system",'
           'pod="dns"',
    'JOB': 'container="old",id="/kubepods/old",image="registry/old:1",name="old",namespace="shop",pod="job"'}
GOLDEN_EXPOSITION = '''\
node_network_up{device="eth1"} 1
# HELP node_boot_time_seconds When the node was booted, in Unix seconds.
# TYPE node_boot_time_seconds gauge
node_boot_time_seconds 1700000000
# HELP node_load1 Load average over 1 minute.
# TYPE node_load1 gauge
node_load1 1.5
node_pressure_cpu_waiting_seconds_total 3.815668
node_memory_Active_anon_bytes 4096
# TYPE node_memory_HugePages_Total gauge
node_memory_HugePages_Total 1
node_memory_Hugepagesize_bytes 2097152
node_memory_MemTotal_bytes 1073741824
# TYPE node_vmstat_oom_kill untyped
node_vmstat_oom_kill 2
# TYPE node_netstat_TcpExt_ListenDrops untyped
node_netstat_TcpExt_ListenDrops 4
node_netstat_Tcp_RetransSegs 3
node_netstat_Udp6_InDatagrams 5
node_sockstat_TCP_mem_bytes 6
node_sockstat_TCP6_inuse 7
node_disk_read_bytes_total{device="vda"} 1536
node_disk_read_time_seconds_total{device="vda"} 4.249
node_disk_discarded_sectors_total{device="vda"} 5
node_filesystem_size_bytes{device="/dev/a",fstype="ext4",mountpoint="/"} 100
node_filesystem_avail_bytes{device="/dev/a",fstype="ext4",mountpoint="/"} 40
node_filesystem_readonly{device="/dev/a",fstype="ext4",mountpoint="/"} 0
node_filesystem_device_error{device="/dev/a",fstype="ext4",mountpoint="/"} 0
node_filesystem_device_error{device="nas:/",fstype="nfs",mountpoint="/nfs"} 1
node_filesystem_device_error{device="/dev/b",fstype="xfs",mountpoint="/b"} 1
node_network_speed_bytes{device="eth1"} 125000000
# TYPE node_network_receive_bytes_total counter
node_network_receive_bytes_total{device="eth0"} 11
node_network_receive_bytes_total{device="eth1"} 12
node_softnet_times_squeezed_total{cpu="1"} 8
node_arp_entries{device="eth0"} 9
node_tcp_connection_states{state="time_wait"} 10
node_udp_queues{queue="rx",ip="v6"} 11
node_nfs_rpc_retransmissions_total 12
node_os_info{id="debian"} 1
kubensage_agent_failures_total{subject="memory",file=""} 3
kubensage_agent_failures_total{subject="memory",file="vmstat"} 4
node_scrape_collector_duration_seconds{collector="memory"} 0.25
node_scrape_collector_success{collector="cpu"} 1
node_scrape_collector_success{collector="memory"} 0
kubensage_snapshot_timestamp_seconds 1700000123
kubensage_runtime_condition{condition="RuntimeReady"} 1
process_resident_memory_bytes 33554432
kubensage_cri_seconds_total{method="Version"} 0.25
machine_cpu_cores 2
machine_memory_bytes 1073741824
kubensage_pod_info{namespace="shop",pod="web",qos_class="",host_network="false"} 1
kubensage_container_info{WEB,state="CONTAINER_RUNNING",reason=""} 1
kubensage_container_info{DNS,state="CONTAINER_RUNNING",reason=""} 1
# TYPE container_cpu_usage_seconds_total counter
container_cpu_usage_seconds_total{id="/kubepods/web",namespace="shop",pod="web",cpu="total"} 3.815668
container_cpu_usage_seconds_total{id="/system.slice/kubelet.service",cpu="total"} 3.815668
container_memory_working_set_bytes{WEB} 268435456
container_memory_failures_total{WEB,failure_type="pgmajfault",scope="hierarchy"} 2
container_spec_cpu_shares{WEB} 2597
container_cpu_cfs_throttled_periods_total{WEB} 25
container_memory_usage_bytes{WEB} 268439552
container_memory_rss{id="/"} 6
container_spec_memory_limit_bytes{WEB} 1073741824
container_processes{WEB} 3
container_threads{WEB} 7
kubensage_container_restarts{container="coredns",namespace="kube-system",pod="dns"} 7
container_start_time_seconds{DNS} 1700094048.9040124
kubensage_container_exit_code{JOB} 137
container_fs_usage_bytes{WEB,device="/dev/b"} 14
container_fs_reads_bytes_total{WEB,device="/dev/vda"} 20480
container_fs_writes_bytes_total{WEB,device="8:1"} 40960
container_network_receive_bytes_total{namespace="shop",pod="web",interface="eth1"} 5120
'''


class PrometheusTest(Case):
    def test_golden_lines_in_order(self):
        lines = iter(agent.render_prometheus(exposed_metrics()).splitlines())
        for line in GOLDEN_EXPOSITION.splitlines():
            self.assertIn(re.sub('WEB|DNS|JOB', lambda word: CADVISOR_LABELS[word[0]], line), lines)

    def test_promtool_has_nothing_to_say_but_of_the_spelling_of_node_exporters_names(self):
        for part in agent.NODE, agent.CADVISOR:
            with self.subTest(part):
                self.assertEqual([], self.complaints(agent.render_part(exposed_metrics(), part, False)))

    def test_each_family_is_named_and_typed_once_and_no_series_is_there_twice(self):
        for openmetrics in (False, True):
            text = agent.render_prometheus(exposed_metrics(), openmetrics)
            helps, types = (re.findall(f'^# {word} (\\S+) .', text, re.M) for word in ('HELP', 'TYPE'))
            self.assertEqual(helps, types)
            kinds = dict(re.findall('^# TYPE (\\S+) (\\S+)$', text, re.M))
            series = re.findall('^([^#].*) ', text, re.M)
            for names in types, series:
                self.assertEqual([name for name, count in collections.Counter(names).items() if count > 1], [])
            for name in {line.partition('{')[0] for line in series}:
                counts = name.endswith('_total')
                family = name[:-6] if openmetrics and counts else name
                self.assertEqual(kinds[family] == 'counter', counts, name)
            self.assertEqual(set(kinds.values()), {'counter', 'gauge', 'unknown' if openmetrics else 'untyped'})

    def test_every_sample_has_a_grammar_and_no_label_that_explodes(self):
        for part, ours in (agent.NODE, set()), (agent.CADVISOR, {'id'}):
            labels = set()
            for line in agent.render_part(exposed_metrics(), part, False).splitlines():
                if not line.startswith(('#', 'node_os_info')):
                    self.assertRegex(line, r'\A[a-z_A-Z]\w*(\{([a-z_]+="([^"\\\n]|\\.)*",?)+\})? -?[0-9.e+-]+\Z')
                    labels.update(re.findall(r'[{,]([a-z_]+)="', line))
            self.assertEqual(labels & {'pid', 'id', 'uid', 'container_id', 'pod_uid', 'path', 'run_id'}, ours)
    def test_label_values_are_escaped(self):
        labels = agent.label_text({'l': 'x"\\{},=€', 'm': '\n\x1b\u202e'}, 'k="v"')
        self.assertEqual(labels, r'k="v",l="x\"\\{},=€",m="\\n\\x1b\\u202e"')
        self.assertIn(f'\na{{{labels}}} 1\n', agent.render_family(agent.Family('a', '', [(labels, 1)]), False))
        self.assertEqual((agent.label_text({}), agent.label_text({}, 'k="v"')), ('', 'k="v"'))

    def test_rendering_changes_nothing_of_the_snapshot(self):
        """Another thread sends it meanwhile. Also where a file of a device is missing."""
        metrics = exposed_metrics()
        for directory, files in HARDWARE_FILES.items():
            for left_out in files:
                metrics.node_metrics.devices.add(
                    path=directory, texts={name: text for name, text in files.items() if name != left_out},
                    numbers={name: 1 for name in files if name != left_out})
        before = metrics.SerializeToString(deterministic=True)
        agent.render_prometheus(metrics)
        self.assertEqual(before, metrics.SerializeToString(deterministic=True))

    def test_numbers(self):
        for value, text in ((0, '0'), (True, '1'), (0.1, '0.1'), (2**64 - 1, '18446744073709551615'),
                            (1e-6, '1e-06'), (math.nan, 'nan'), (math.inf, 'inf')):
            self.assertIn(f'\na {text}\n', agent.render_family(agent.Family('a', '', [('', value)]), False))

    def test_the_container_that_runs_and_the_last_sandbox_count(self):
        text = agent.render_prometheus(exposed_metrics())
        self.assertEqual([('nginx', '100')], re.findall(
            r'^container_cpu_cfs_periods_total\{.*name="([^"]*)".*,pod="web"\} (.*)', text, re.M))
        self.assertEqual(['old'], re.findall(r'^kubensage_container_exit_code\{.*,name="([^"]*)"', text, re.M))

    def test_every_row_names_a_field(self):
        """A path that no message has would be an error at the first scrape of a node that has the message."""
        for rows, message in (
                (agent.NODE_SAMPLES, wire.NodeMetrics), (agent.DISK_SAMPLES, wire.DiskStats),
                (agent.CGROUP_SAMPLES, wire.CgroupMetrics), (agent.FILE_SYSTEM_SAMPLES, wire.DiskUsage),
                (agent.INTERFACE_SAMPLES, wire.InterfaceStat), (agent.POD_INTERFACE_SAMPLES, wire.PodInterface),
                (agent.CONTAINER_SAMPLES, wire.ContainerMetrics), (agent.IO_SAMPLES, wire.CgroupIoStat),
                (agent.LAYER_SAMPLES, wire.FileSystemMetrics), (agent.LAYER_DISK_SAMPLES, wire.DiskUsage),
                (agent.SOFTNET_SAMPLES, wire.SoftnetStat), (agent.SCHEDSTAT_SAMPLES, wire.CpuInfo),
                (agent.AGENT_SAMPLES, wire.AgentMetrics), (agent.CRI_SAMPLES, wire.CriMethodMetrics)):
            for name, text, path, *_ in rows:
                with self.subTest(name):
                    self.assertRegex(text, r'\A[^\n\\]+\.\Z')
                    descriptor = message.DESCRIPTOR
                    for part in path.split('.'):
                        self.assertIn(part, descriptor.fields_by_name)
                        descriptor = descriptor.fields_by_name[part].message_type

    def test_an_empty_snapshot_has_no_node_metrics(self):
        names = [re.findall(r'^(?!kubensage_)\w+', agent.render_part(wire.Metrics(), part, False), re.M)
                 for part in (agent.NODE, agent.CADVISOR)]
        self.assertEqual(names, [[
            'node_uname_info', 'node_exporter_build_info', 'node_textfile_scrape_error', 'node_time_seconds',
            'process_cpu_seconds_total', 'process_start_time_seconds'], ['machine_cpu_cores', 'machine_scrape_error']])

    def test_every_count_begins_with_0_in_the_first_snapshot(self):
        """A counter that begins with 1 has no rate: the first failure would be no failure."""
        roots = self.tree({'proc/meminfo': 'MemTotal'})
        options, stats = agent.parse_options(['--cri-socket', self.socket], {}), agent.AgentStats()
        metrics, failures = agent.collect_snapshot(roots, options, agent.State(1), stats, agent.Backlog(60, 1e6))
        self.assertIn('memory: meminfo', failures)
        counts = re.findall(r'^kubensage_(?:agent_failures|backlog_dropped)_total\{(.*)\} (.*)$',
                            agent.render_prometheus(metrics), re.M)
        self.assertLessEqual({*(f'cause="{cause}"' for cause in agent.DROP_CAUSES), *(
            f'subject="{subject}",file=""' for subject in (*agent.RUNTIME_SUBJECTS, 'memory', 'cpu', 'services')),
            'subject="memory",file="meminfo"'}, dict(counts).keys())
        self.assertEqual({count for _, count in counts}, {'0'})


# --- HTTP

class HttpTest(Case):
    def serve(self, metrics=None, host='127.0.0.1', timeout=PATIENCE_SECONDS):
        self.patch(HTTP_TIMEOUT_SECONDS=timeout)
        self.published = agent.Published(f'{host}:0', 5)
        server = agent.http_server(self.published)
        self.address = server.server_address[:2]
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        self.threads = threading.active_count()
        for close in thread.join, server.server_close, server.shutdown:
            self.addCleanup(close)
        if metrics:
            self.publish(metrics)

    def publish(self, metrics):
        self.assertEqual(agent.hand_over(None, metrics, agent.Sinks(published=self.published)), {})

    def connect(self):
        connection = socket.create_connection(self.address, PATIENCE_SECONDS)
        self.addCleanup(connection.close)
        return connection

    def ask(self, request):
        """Status, headers and body, which is unpacked, of the answer to these bytes."""
        connection = self.connect()
        connection.sendall(request.encode())
        with connection.makefile('rb') as file:
            head, _, body = file.read().partition(b'\r\n\r\n')
        status, *headers = head.decode().split('\r\n')
        headers = dict(header.split(': ', 1) for header in headers)
        self.assertIn(len(body), (0, int(headers.get('Content-Length', len(body)))))
        body = gzip.decompress(body) if 'Content-Encoding' in headers else body
        return int(status.split()[1]), headers, body.decode()

    def get(self, path, accept='*/*', method='GET', packing='identity'):
        return self.ask(f'{method} {path} HTTP/1.1\r\nHost: node\r\nAccept: {accept}\r\n'
                        f'Accept-Encoding: {packing}\r\n\r\n')

    def test_metrics_in_the_format_that_is_asked_for(self):
        self.serve(exposed_metrics())
        for accept, content_type, end in (
                ('text/plain;version=0.0.4', agent.TEXT_TYPE, ''),
                ('application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.3', agent.OPENMETRICS_TYPE,
                 '# EOF\n')):
            status, headers, body = self.get('/metrics?collect[]=x', accept)
            self.assertEqual((status, headers['Content-Type']), (200, content_type))
            self.assertNotIn('Content-Encoding', headers)
            self.assertRegex(body, rf'\A((?!# EOF).*\n)+kubensage_snapshot_age_seconds \d\S*\n{end}\Z')

    def test_containers_are_apart_and_no_name_is_in_both(self):
        self.serve(exposed_metrics())
        for accept, end in ('text/plain', ''), ('application/openmetrics-text', '# EOF\n'):
            node, containers = (self.get(path, accept)[2] for path in ('/metrics', '/metrics/cadvisor?x=y'))
            self.assertEqual(agent.render_part(exposed_metrics(), agent.CADVISOR, bool(end)) + end, containers)
            node, containers = ({*re.findall(r'^# TYPE (\w+)', text, re.M)} for text in (node, containers))
            self.assertEqual(set(), node & containers)
            self.assertEqual({'node', 'process', 'kubensage'}, {name.partition('_')[0] for name in node})
            self.assertEqual({'container', 'machine', 'kubensage_pod', 'kubensage_container'}, {
                re.match('kubensage_[a-z]+|[a-z]+', name)[0] for name in containers})

    def test_gzip_is_for_those_who_take_it_and_is_the_same(self):
        self.serve(exposed_metrics())
        for packing, packed in {
                'gzip': True, 'deflate, gzip;q=0.5': True, 'gzip;q=0.001, br': True,
                'br\r\nAccept-Encoding: gzip': True, 'gzip;q=0': False, 'deflate, gzip; q=0.000': False,
                'gzip;q=0, br': False, 'br': False, '': False}.items():
            for path, accept in itertools.product(('/metrics', '/metrics/cadvisor'), ('text/plain', agent.OPENMETRICS)):
                with self.subTest(packing, path=path, accept=accept):
                    plain, (_, headers, text) = self.get(path, accept), self.get(path, accept, packing=packing)
                    age = r'(?<=^kubensage_snapshot_age_seconds )\S+'
                    self.assertEqual(*(re.sub(age, '', text, flags=re.M) for text in (plain[2], text)))
                    self.assertEqual((packed, plain[1]['Content-Type']),
                                     (headers.get('Content-Encoding') == 'gzip', headers['Content-Type']))
                    self.assertEqual(packed, int(headers['Content-Length']) < int(plain[1]['Content-Length']) / 2)
        for path in '/healthz', '/etc/passwd':
            self.assertNotIn('Content-Encoding', self.get(path, packing='gzip')[1])

    def test_each_snapshot_is_rendered_and_packed_once_a_format_and_nobody_waits_for_that(self):
        self.serve(sample(1))
        made = []

        def render(metrics, part, openmetrics):
            made.append((metrics.agent_metrics.uptime_seconds, part, openmetrics))
            if len(made) == 1:
                self.publish(sample(2))
                self.assertEqual(self.get('/healthz')[0], 200)
            return real(metrics, part, openmetrics)

        def pack(texts):
            texts = list(texts)
            # The age of the snapshot is not.
            if len(texts) > 1:
                made.append('packed')
            return [gzip.compress(b''.join(texts))]

        real = agent.render_families
        self.patch(render_families=render, gzip_member=pack)
        for seconds in 1, 2, 2:
            self.assertIn(f'kubensage_agent_uptime_seconds {seconds}\n', self.get('/metrics')[2])
        for _ in range(2):
            self.get('/metrics', agent.OPENMETRICS)
            self.get('/metrics', packing='gzip')
            self.get('/metrics/cadvisor', packing='gzip')
        node, containers = '/metrics', '/metrics/cadvisor'
        self.assertEqual(made, [(1, node, False), (2, node, False), (2, node, True), (2, node, False), 'packed',
                                (2, containers, False), 'packed'])

    def test_health(self):
        self.serve()
        for path in '/healthz', '/metrics', '/metrics/cadvisor':
            self.assertEqual(self.get(path)[::2], (503, 'no snapshot yet\n'))
        for interval, age, answer in ((1, 4, '200 ok'), (5, 20, '503 no snapshot for 2. s'), (60, 100, '200 ok'),
                                      (60, 200, '503 no snapshot for 2.. s')):
            self.publish(sample(1))
            self.published.interval, self.published.taken = interval, self.published.taken - age
            self.assertRegex('{0} {2}'.format(*self.get('/healthz')), rf'\A{answer}\n\Z')

    def test_no_path_leads_to_files_and_nothing_but_get_is_answered(self):
        self.serve(sample(1))
        for path in ('/ /../etc/passwd /%2e%2e/etc/passwd /metrics/ /metrics/x /metrics/cadvisor/ /etc/passwd '
                     '//etc/passwd /healthz/../metrics * http://node/etc/passwd').split():
            with self.subTest(path):
                self.assertEqual(self.get(path)[::2], (
                    404, '404: only /metrics, /metrics/cadvisor and /healthz are served\n'))
        for method in 'POST PUT DELETE OPTIONS TRACE CONNECT'.split():
            with self.subTest(method):
                self.assertIn(self.get('/metrics', method=method)[0], (405, 501))

    def test_head_is_answered_without_the_body(self):
        self.serve(sample(1))
        status, headers, body = self.get('/metrics', method='HEAD')
        self.assertEqual((200, agent.TEXT_TYPE, ''), (status, headers['Content-Type'], body))
        self.assertGreater(int(headers['Content-Length']), 100)

    def test_requests_that_are_too_long_or_nonsense_are_refused(self):
        self.serve(sample(1))
        self.assertEqual(self.get('/' + 'a' * agent.MAX_REQUEST_BYTES)[0], 431)
        self.assertEqual(self.ask('GET / HTTP/1.1\r\n' + 'A: b\r\n' * 200 + '\r\n')[0], 431)
        self.assertEqual(self.get('/healthz')[0], 200)

    def test_half_open_connections_keep_no_one_out_and_the_oldest_makes_room(self):
        self.serve(sample(1))
        half_open = [self.connect() for _ in range(50)]
        for connection in half_open:
            connection.sendall(b'GET /metrics HT')
        self.assertEqual(self.get('/metrics')[0], 200)
        # Closed, or reset where what it has sent was not read yet.
        with contextlib.suppress(ConnectionResetError):
            self.assertEqual(half_open[0].recv(1), b'')
        wait_for('room', lambda: threading.active_count() - self.threads <= agent.MAX_CONNECTIONS)
        half_open[-1].sendall(b'TP/1.0\r\n\r\n')
        self.assertEqual(half_open[-1].recv(12), b'HTTP/1.0 200')

    def test_a_connection_that_says_nothing_is_dropped(self):
        self.serve(timeout=0.1)
        self.assertEqual(self.connect().recv(1), b'')

    def test_a_client_that_reads_slowly_delays_no_other(self):
        self.serve(timeout=2 * PATIENCE_SECONDS)
        self.publish(sample(1, [dict(namespace='n' * 200, name=f'{n}' * 50) for n in range(5000)]))
        slow = socket.socket()
        self.addCleanup(slow.close)
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        slow.connect(self.address)
        slow.sendall(b'GET /metrics HTTP/1.0\r\n\r\n')
        self.assertEqual(slow.recv(12), b'HTTP/1.0 200')
        self.publish(sample(2))
        self.assertIn('kubensage_agent_uptime_seconds 2\n', self.get('/metrics')[2])

    def test_many_at_once_get_the_same(self):
        self.serve(exposed_metrics())
        with concurrent.futures.ThreadPoolExecutor(16) as pool:
            answers = pool.map(self.get, ['/metrics'] * 100)
        (status, _), = {(status, body.rpartition('kubensage_snapshot_age')[0]) for status, _, body in answers}
        self.assertEqual(status, 200)

    def test_ipv6(self):
        try:
            with socket.socket(socket.AF_INET6) as probe:
                probe.bind(('::1', 0))
        except OSError as error:
            self.skipTest(f'no IPv6 here: {error}')
        self.serve(sample(1), '[::1]')
        self.assertEqual(self.get('/healthz')[0], 200)

    def test_an_address_that_cannot_be_had_is_one_line_and_1(self):
        with contextlib.closing(socket.create_server(('127.0.0.1', 0))) as taken:
            port = taken.getsockname()[1]
            for address, reason in ((f'127.0.0.1:{port}', 'Address already in use'),
                                    ('203.0.113.1:1', 'Cannot assign')):
                run = self.start('--listen', address).result()
                self.assertEqual((run.code, run.out, 'Traceback' in run.err), (1, '', False), run.err)
                self.assertRegex(run.troubles[-1], f'ERROR --listen {re.escape(address)}: .*({reason})')

    def test_the_agent_serves_without_a_relay_and_ends_at_once(self):
        with contextlib.closing(socket.socket()) as free:
            free.bind(('127.0.0.1', 0))
            self.address = free.getsockname()
        self.write(NODE)
        process = self.start('--main-loop-duration', '0.1', '--listen', str(self.address[1]))

        def is_healthy():
            with contextlib.suppress(OSError):
                return self.get('/healthz')[0] == 200

        wait_for('a snapshot', is_healthy)
        self.assertIn('\nnode_memory_MemTotal_bytes 4111904768\n', self.get('/metrics')[2])
        process.terminate()
        self.assertEqual(process.result()[:2], (0, ''))

class AcceptTest(Case):
    def test_openmetrics_is_weighed(self):
        self.check_table(agent.prefers_openmetrics, [
            ('', False), ('*/*', False), ('application/openmetrics-text;q=0', False),
            ('text/plain;version=0.0.4;q=1,application/openmetrics-text;q=0.5', False),
            ('application/openmetrics-text;version=1.0.0,text/plain;q=0.5', True),
            ('Application/OpenMetrics-Text; q=0.9 , text/plain; q=0.3', True),
            ('application/openmetrics-text;q=x', True)])


# --- log

class LogTest(Case):
    def write_log(self, path, *arguments, lines=40):
        """That many lines of 100 bytes, to a log that is rotated at 1,000."""
        options = agent.parse_options(['--log-file', path, '--log-max-size', '0.001', *arguments], {})
        handler = agent.log_file_handler(options, path)
        logger = logging.Logger('rotation')
        logger.addHandler(handler)
        with contextlib.closing(handler):
            for number in range(lines):
                logger.info('%-99d', number)

    def numbers(self, path):
        with (gzip.open if path.endswith('.gz') else open)(path, 'rt') as file:
            return list(map(int, file))

    def test_rotated_files(self):
        for arguments, names in (
                (['--log-max-backups=2', '--log-compress=false'], ['a.log', 'a.log.1', 'a.log.2']),
                (['--log-max-backups=1'], ['a.log', 'a.log.1.gz']),
                (['--log-max-backups=0'], ['a.log'] + [f'a.log.{number}.gz' for number in range(1, 5)])):
            with self.subTest(arguments):
                root = self.tree({}).rootfs
                self.write_log(f'{root}/new/a.log', *arguments)
                self.assertEqual(names, sorted(os.listdir(f'{root}/new')))
                newest_first = [self.numbers(f'{root}/new/{name}') for name in names]
                self.assertEqual(list(range(40))[-sum(map(len, newest_first)):],
                                 [number for part in reversed(newest_first) for number in part])
                self.assertLessEqual(max(map(len, newest_first)), 10)

    def test_rotation_removes_what_is_too_old_and_nothing_else(self):
        days = {'a.log.7.gz': 31, 'a.log.8': 29, 'a.log.9': 31, 'a.log.conf': 31, 'b.log.9': 31}
        for age, removed in ('30', {'a.log.7.gz', 'a.log.9'}), ('0', set()):
            with self.subTest(age=age):
                root = self.tree(dict.fromkeys(days, 'x')).rootfs
                for name, old in days.items():
                    os.utime(f'{root}/{name}', (time.time() - old * 86400,) * 2)
                self.write_log(f'{root}/a.log', '--log-max-age', age, lines=11)
                self.assertEqual({'a.log', 'a.log.1.gz', *days} - removed, set(os.listdir(root)))

    def test_log_is_appended_to(self):
        path = f'{self.directory}/a.log'
        for _ in range(2):
            self.write_log(path, lines=3)
        self.assertEqual([0, 1, 2] * 2, self.numbers(path))

    def test_file_that_cannot_be_written_is_one_warning(self):
        self.write(NODE)
        run = self.main(*self.node, '--once', '--log-file', f'{self.directory}/etc')
        self.assertEqual((0, 2), (run.code, len(run.troubles)), run.err)
        self.assertRegex(
            run.troubles[0],
            r'^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ WARNING log file .*/etc cannot be written \(Is a directory\)')

    def test_malformed_file_is_a_warning_in_the_log_and_the_snapshot_goes_out(self):
        self.write({**NODE, 'proc/meminfo': 'MemTotal'})
        run = self.main(*self.node, '--once', '--output', 'json', '--cri-socket', '/no\nINFO \x1b[2Jsuch')
        self.assertIn(r'no\nINFO \x1b[2Jsuch' + '\n', run.err)
        self.assertEqual(run.err, read_text(f'{self.directory}/log'))
        self.assertIn("WARNING memory: meminfo: /proc/meminfo: malformed line: 'MemTotal'\n", run.err)
        self.assertEqual('node-d13', json.loads(run.out)['node_metrics']['hostname'])
        self.assertEqual(0, mode_of(f'{self.directory}/log') & 0o027)

    def test_file_and_its_directory_are_not_for_others(self):
        self.addCleanup(os.umask, os.umask(0))
        new = f'{self.directory}/new'
        self.write_log(f'{new}/a.log', '--log-compress=false', lines=15)
        self.write_log(f'{new}/b.log', lines=15)
        modes = {name: mode_of(f'{new}/{name}') for name in os.listdir(new)}
        self.assertEqual(dict.fromkeys(('a.log', 'a.log.1', 'b.log', 'b.log.1.gz'), 0o640), modes)
        self.assertEqual(0o750, mode_of(new))

    def refusal(self, path):
        with self.assertRaises(OSError) as raised:
            agent.log_file_handler(agent.parse_options([], {}), path)
        return raised.exception.strerror

    def test_no_link_of_another_user_is_followed(self):
        root = self.write({'victim': 'mine\n', 'real/x': ''}).rootfs
        for name, target in (('a.log', 'victim'), ('b.log', 'nowhere'), ('ours', 'real'), ('theirs', 'real'),
                             ('real/a.log.1.gz', 'nowhere')):
            os.symlink(f'{root}/{target}', f'{root}/{name}')
        for name in 'a.log', 'b.log':
            self.assertEqual('Too many levels of symbolic links', self.refusal(f'{root}/{name}'))
        # It is rotated, too.
        with mock.patch.object(logging, 'raiseExceptions', False):
            self.write_log(f'{root}/ours/a.log', lines=25)
        if os.geteuid() == 0:
            os.lchown(f'{root}/theirs', 12345, 0)
            os.chown(f'{root}/real/x', 12345, 0)
            for path, refused in ('theirs/c.log', 'theirs'), ('real/x', 'real/x'):
                self.assertEqual(f'{root}/{refused} belongs to user 12345', self.refusal(f'{root}/{path}'))
        self.assertEqual('mine\n', read_text(f'{root}/victim'))
        self.assertFalse(os.path.exists(f'{root}/nowhere') or os.path.exists(f'{root}/real/c.log'))


# --- command line

class CommandLineTest(Case):
    def failure(self, arguments, environment={}):
        """The one line that a wrong command line gives."""
        run = self.main(*arguments, environment=environment)
        self.assertEqual((2, ''), (run.code, run.out))
        self.assertRegex(run.err, r'\Akubensage-agent: [^\n]+\n\Z')
        return run.err

    def test_defaults(self):
        """Those that are neither None nor False; no flag was given."""
        self.assertEqual(
            {'main_loop_duration': 5, 'buffer_retention': 10, 'buffer_max_size': 64, 'spool_max_size': 512, 'top_n': 10,
             'output': 'json', 'container_stats': 'cgroup', 'fs_stats_interval': 60, 'procfs': '/proc',
             'sysfs': '/sys', 'rootfs': '/', 'log_level': 'info', 'log_max_size': 10, 'log_max_backups': 5,
             'log_max_age': 30, 'log_compress': True, 'volume_stats_interval': 60},
            {name: value for name, value in vars(agent.parse_options([], {})).items()
             if value not in (None, False, [])})

    def test_values(self):
        for argument, value in {
                '--relay-address=relay.example:50051': 'relay.example:50051',
                '--relay-address=[2001:db8::1]:1': '[2001:db8::1]:1',
                '--relay-address=192.0.2.1:65535': '192.0.2.1:65535',
                '--main-loop-duration=0.1': 0.1, '--buffer-retention=0.5': 0.5, '--top-n=0': 0,
                '--once': True, '--once=false': False, '--once=1': True, '--output=prometheus': 'prometheus',
                '--listen=[::1]:9551': '[::1]:9551', '--listen=9551': '0.0.0.0:9551', '--listen=:1': '0.0.0.0:1',
                '--receive=localhost:65535': 'localhost:65535', '--receive=50051': '0.0.0.0:50051',
                '--container-stats=cri': 'cri',
                '--fs-stats-interval=1': 1, '--fs-stats-interval=0.5e2': 50, '--log-level=debug': 'debug',
                '--log-max-size=0.5': 0.5, '--log-max-backups=0': 0, '--log-max-age=0': 0, '--log-compress=F': False,
                '--log-compress=0': False, '--log-compress=TRUE': True, '--log-compress': True}.items():
            with self.subTest(argument):
                flag, equals, text = argument.partition('=')
                name = flag[2:].replace('-', '_')
                beside = ['--relay-address=r:1'] * any(flag in flags for flags, _ in agent.NEEDS)
                self.assertEqual(value, getattr(agent.parse_options([*beside, argument], {}), name))
                if equals:
                    self.assertEqual(value, getattr(agent.parse_options([*beside, flag, text], {}), name))
                    variable = f'KUBENSAGE_{name.upper()}'
                    self.assertEqual(value, getattr(agent.parse_options(beside, {variable: text}), name))

    def test_wrong_value_is_one_line_that_names_flag_and_value(self):
        wrong = {
            '--relay-address': 'relay|relay:|:50051|relay:0|relay:65536|http://relay:1|2001:db8::1:1|a b:1|',
            '--listen': '0|:0|65536|:|x|::1:9551|localhost:x|95 51|',
            '--receive': ':65536|[]:1|-1|http://h:1|',
            '--main-loop-duration': '0.09|-1|nan|inf|5s||1e10',
            '--buffer-retention': '0|-1|x',
            '--buffer-max-size': '0',
            '--spool-max-size': '0',
            '--top-n': '-1|1.5|x|NaN|',
            '--once': 'yes|2|',
            '--fs-stats-interval': '0|0.9|-1|x|nan',
            '--log-max-size': '0|-1|x',
            '--log-max-backups': '-1|0.5',
            '--log-max-age': '-1|x',
            '--log-compress': 'no|off',
            '--output': 'xml|JSON|a\nb',
            '--container-stats': 'none|CRI',
            '--log-level': 'trace|INFO',
        }
        for flag, values in wrong.items():
            for value in values.split('|'):
                reason = f'(invalid choice: )?{re.escape(repr(value))} (is n|.choose from )'
                with self.subTest(flag=flag, value=value):
                    self.assertRegex(self.failure([f'{flag}={value}']), f'^kubensage-agent: {flag}: {reason}')
                    variable = agent.variable_of(flag)
                    if value:
                        self.assertRegex(self.failure([], {variable: value}), f'^kubensage-agent: {variable}: {reason}')

    def test_unknown_argument_gets_a_hint(self):
        self.check_table(self.failure, [
            (['--topn'], 'kubensage-agent: unknown argument --topn; did you mean --top-n?\n'),
            (['--relay', 'r:1'], 'kubensage-agent: unknown argument --relay; --help lists them all\n'),
            (['--relay-adress=a:1'],
             'kubensage-agent: unknown argument --relay-adress=a:1; did you mean --relay-address?\n'),
            (['--zzz', '--top-n', '1'], 'kubensage-agent: unknown argument --zzz; --help lists them all\n'),
            (['word'], 'kubensage-agent: unknown argument word; --help lists them all\n'),
            (['--vresion'], 'kubensage-agent: unknown argument --vresion; did you mean --version?\n'),
            (['--json'], 'kubensage-agent: unknown argument --json; --help lists them all\n'),
            (['-o', 'json'], 'kubensage-agent: unknown argument -o; --help lists them all\n'),
            (['--top-n'], 'kubensage-agent: --top-n: expected one argument\n')])

    def test_environment_counts_and_the_command_line_wins(self):
        environment = {'KUBENSAGE_TOP_N': '3', 'KUBENSAGE_ONCE': 'true', 'KUBENSAGE_LOG_LEVEL': '', 'TOP_N': '9'}
        options = agent.parse_options([], environment)
        self.assertEqual((3, True, 'info', 5),
                         (options.top_n, options.once, options.log_level, options.main_loop_duration))
        options = agent.parse_options(['--top-n', '4', '--once=false'], environment)
        self.assertEqual((4, False), (options.top_n, options.once))

    def test_version_and_help(self):
        for flag in '--version', '-V':
            self.assertEqual(Result(0, f'kubensage-agent {agent.__version__}\n', ''), self.main(flag))
        shown = self.main('--help')
        self.assertEqual((0, ''), (shown.code, shown.err))
        for flag in agent.FLAGS:
            self.assertEqual(1, shown.out.count(f'\n  {flag} '), flag)

    def test_help_is_in_groups_with_examples_that_are_right_and_exit_codes(self):
        shown = self.main('-h').out
        order = [shown.index(f'\n{title}:\n') for title in (*agent.FLAG_GROUPS, 'examples', 'exit codes')]
        self.assertEqual(sorted(order), order)
        for code in 0, 1, 2, agent.STUCK_STATUS, 130, 141:
            self.assertRegex(shown[order[-1]:], rf'\s{code} +\w')
        examples = re.findall(r'^  kubensage-agent(.*?)(?:   |$)', shown[order[-2]:], re.M)
        self.assertGreaterEqual(len(examples), 5)
        for example in examples:
            with self.subTest(example):
                agent.parse_options(example.split(), {})

    # Imports what agent.py imports, then agent.py under an audit hook that reports what it touches.
    IMPORT = '''if True:
        import ast, grpc, sys, threading
        from google.protobuf import empty_pb2, json_format, wrappers_pb2
        path = sys.argv[1]
        watched = 'open', 'socket', 'subprocess', 'signal', 'os.mkdir', 'os.remove', 'os.rename', 'os.system'
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
        path = os.pathsep.join([HERE, *sys.path])
        command = [sys.executable, '-B', '-c', self.IMPORT, os.path.abspath(agent.__file__)]
        self.assertEqual(Result(0, '[] 0\n', ''), self.spawn(command, {**ENVIRONMENT, 'PYTHONPATH': path}).result())


# --- what has no effect

class RefusalsTest(Case):
    RELAY, LISTEN, ROOT = '--relay-address=r:1', '--listen=9551', '--rootfs=/'
    # What is right for each flag, where it takes no number.
    VALUES = {'--relay-address': 'r:1', '--listen': '1', '--receive': '1', '--output': 'json', '--log-level': 'debug',
              '--container-stats': 'cri', '--procfs': '/', '--sysfs': '/', '--rootfs': '/', '--cri-socket': '/s',
              '--spool-dir': '/s', '--log-file': '/l', '--kubelet-root': '/', '--relay-ca': '/ca',
              '--relay-cert': '/c', '--relay-key': '/k', '--relay-server-name': 'r', '--relay-token-file': '/t'}

    def argument(self, flag):
        boolean = agent.FLAGS[flag].get('type') is agent.argument_boolean
        return f'{flag}={self.VALUES.get(flag) or ("true" if boolean else "7")}'

    def split(self, *arguments):
        """The same as variables of the environment."""
        parts = (argument.partition('=') for argument in arguments)
        return {agent.variable_of(flag): value for flag, _, value in parts}

    def parse(self, arguments, environment={}):
        """The options, or the line that refuses them."""
        with contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                return agent.parse_options(arguments, environment)
            except SystemExit as end:
                self.assertEqual(2, end.code)
        self.assertRegex(said.getvalue(), r'\Akubensage-agent: [^\n]+\n\Z')
        return said.getvalue()[len('kubensage-agent: '):-1]

    def check_refused(self, expected, arguments):
        """Wherever its flags come from: the command line, the environment, or some from here and some from there."""
        for count in range(len(arguments) + 1):
            with self.subTest(arguments, of_the_environment=count):
                self.assertEqual(expected, self.parse(arguments[count:], self.split(*arguments[:count])))

    # What is needed in turn, and has nothing to do with the row in question.
    IN_TURN = {'--relay-cert': ['--relay-key'], '--relay-key': ['--relay-cert'], '--relay-server-name': ['--relay-tls'],
               '--relay-token-file': ['--relay-tls'], '--spool-max-size': ['--spool-dir'],
               '--spool-dir': ['--relay-address'], '--print-unit': ['--relay-address'],
               '--print-daemonset': ['--relay-address']}

    def beside(self, *flags):
        """These flags and those that they need beside each other, as arguments."""
        wanted = list(flags)
        for flag in wanted:
            wanted += [need for need in self.IN_TURN.get(flag, []) if need not in wanted]
            if flag in self.of_a_relay and '--relay-address' not in wanted:
                wanted.append('--relay-address')
        return [self.argument(flag) for flag in wanted]

    def setUp(self):
        super().setUp()
        self.of_a_relay = {flag for flags, needs in agent.NEEDS if needs == ('--relay-address',) for flag in flags}

    def test_of_each_flag_that_needs_another(self):
        for flags, needs in agent.NEEDS:
            for flag in flags:
                line = f'{flag} has no effect without {" or ".join(needs)}'
                # Of several rows the first that is not fulfilled is named.
                first = next(needs for flags, needs in agent.NEEDS if flag in flags)
                if needs == first:
                    self.check_refused(line, [self.argument(flag)])
                for other in needs:
                    arguments = self.beside(flag, other)
                    if flag == '--spool-max-size' and other.startswith('--print'):
                        arguments.remove(self.argument('--spool-dir'))
                    with self.subTest(arguments):
                        self.assertIsInstance(self.parse(arguments), argparse.Namespace)

    def test_of_each_flag_that_another_leaves_without_effect(self):
        for flag, excluded in agent.EXCLUDES.items():
            for other in sorted(excluded):
                with self.subTest(flag, other=other):
                    said = self.parse(self.beside(flag, other))
                    # Where more than one is in the way one of them is named.
                    self.assertIsInstance(said, str)
                    self.assertRegex(said, r'^--\S+ has no effect with --\S+$')
                    if len(self.beside(flag, other)) == 2:
                        self.check_refused(f'{other} has no effect with {flag}', self.beside(flag, other))

    def test_table(self):
        directory = self.directory
        self.write({'file': ''})
        for expected, *arguments in (
                ('--buffer-retention has no effect without --relay-address', '--buffer-retention=5'),
                ('--buffer-retention has no effect without --relay-address', '--buffer-retention=5', self.LISTEN),
                ('--spool-dir has no effect without --relay-address', '--spool-dir=/s', '--once'),
                ('--spool-max-size has no effect without --spool-dir or --print-unit or --print-daemonset',
                 '--spool-max-size=9', self.RELAY),
                ('--spool-max-size has no effect without --relay-address', '--spool-max-size=9', '--print-daemonset'),
                ('--relay-tls has no effect without --relay-address', '--relay-tls'),
                ('--log-max-age has no effect without --log-file or --relay-address', '--log-max-age=0'),
                ('--log-compress has no effect without --log-file or --relay-address', '--log-compress=true'),
                ('--print-unit has no effect without --relay-address or --listen', '--print-unit'),
                ('--listen has no effect with --once', '--once', self.LISTEN),
                ('--volume-stats-interval has no effect with --once', '--once', '--volume-stats-interval=0'),
                ('--print-daemonset has no effect with --once', '--once', '--print-daemonset'),
                ('--output has no effect with --print-unit', '--print-unit', self.RELAY, '--output=json'),
                ('--print-daemonset has no effect with --print-unit', '--print-unit', self.RELAY, '--print-daemonset'),
                ('--rootfs has no effect with --print-daemonset', '--print-daemonset', self.ROOT),
                ('--log-file has no effect with --print-daemonset', '--print-daemonset', '--log-file=/l'),
                ('--top-n has no effect with --receive', '--receive=0.0.0.0:1', '--top-n', '3'),
                ('--relay-address has no effect with --receive', '--receive=1', self.RELAY),
                ('--once has no effect with --receive', '--receive=1', '--once'),
                (f'--procfs {directory}/no: there is no such directory', f'--procfs={directory}/no'),
                (f'--sysfs {directory}/file: there is no such directory', f'--sysfs={directory}/file'),
                (f'--rootfs {directory}/no: there is no such directory', self.RELAY, f'--rootfs={directory}/no'),
                ('--procfs : there is no such directory', '--procfs='),
                ('--kubelet-root /usr: there is no such directory', '--kubelet-root=/usr', f'--rootfs={directory}'),
                ('--relay-cert and --relay-key go together', self.RELAY, '--relay-key=/k'),
                ('--relay-token-file needs TLS: --relay-tls, or --relay-ca FILE', self.RELAY, '--relay-token-file=/t')):
            with self.subTest(arguments):
                self.assertEqual(expected, self.parse(arguments))
                # As the user sees it.
                self.assertEqual((2, '', f'kubensage-agent: {expected}\n'), self.main(*arguments))

    def test_it_is_the_same_from_the_environment(self):
        for expected, variables, *arguments in (
                ('--listen has no effect with --once', 'ONCE=true', '--listen=1'),
                ('--spool-dir has no effect without --relay-address', 'SPOOL_DIR=/s'),
                ('--procfs /no: there is no such directory', 'PROCFS=/no')):
            environment = dict(f'KUBENSAGE_{variable}'.split('=') for variable in variables.split())
            with self.subTest(environment, arguments=arguments):
                self.assertEqual(expected, self.parse(arguments, environment))

    def test_the_command_line_wins_over_the_environment(self):
        """As in the pod of a DaemonSet."""
        for argument, variables in (('--once', 'LISTEN=1'), ('--receive=1', 'RELAY_ADDRESS=r:1'),
                                    ('--print-daemonset', 'ROOTFS=/host/root')):
            environment = dict([f'KUBENSAGE_{variables}'.split('=')])
            with self.subTest(environment, argument=argument):
                self.assertTrue(agent.value_of(self.parse([argument], environment), argument.partition('=')[0]))

    def test_what_is_accepted(self):
        for arguments, variables in (
                ('', ''), ('--once', ''), ('--once --output=table', ''), ('--once=false --listen=1', ''),
                (f'--once {self.RELAY} --spool-dir=/s', ''), (f'--once {self.RELAY} --output=json', ''),
                (f'{self.RELAY} {self.LISTEN} --output=json', ''), ('--listen=:1 --output=table', ''),
                (f'{self.RELAY} --spool-dir=/s --spool-max-size=1', ''), (f'{self.RELAY} --log-max-size=1', ''),
                ('--log-file=/l --log-max-size=1', ''), ('--relay-tls=false', ''), ('--log-compress=false', ''),
                ('--print-unit=false', ''), ('--print-unit=false --once', ''), ('--print-unit --listen=1', ''),
                (f'--print-unit {self.RELAY} --spool-dir=/s --log-file=/l --procfs=/ --sysfs=/ --rootfs=/', ''),
                ('--print-daemonset', ''), (f'--print-daemonset {self.RELAY} --spool-max-size=9', ''),
                ('--print-daemonset=false --rootfs=/', ''), ('--receive=1', ''),
                ('--receive=1 --output=table --log-file=/l --log-max-age=1', ''),
                ('--receive=1 --once=false --log-level=debug', ''), ('--procfs=/ --sysfs=/', ''),
                ('--listen=1 --volume-stats-interval=0', ''), ('--spool-dir=/s', 'RELAY_ADDRESS=r:1'),
                # An empty variable is none, and the command line wins.
                ('--once', 'LISTEN= SPOOL_DIR='), ('--once=false', 'LISTEN=1 ONCE=1')):
            with self.subTest(arguments, variables=variables):
                environment = dict(f'KUBENSAGE_{variable}'.split('=') for variable in variables.split())
                self.assertIsInstance(self.parse(arguments.split(), environment), argparse.Namespace)

    def test_a_variable_that_is_none_of_the_agents_is_a_warning(self):
        """Kubernetes makes some of Services that are called kubensage-relay, kubensage, kubensage-agent, ..."""
        address = 'tcp://10.96.0.7:50051'
        of_one = {
            'SERVICE_HOST': '10.96.0.7', 'SERVICE_PORT': '50051', 'SERVICE_PORT_GRPC': '50051', 'PORT': address,
            'PORT_50051_TCP': address, 'PORT_50051_TCP_PROTO': 'tcp', 'PORT_50051_TCP_PORT': '50051',
            'PORT_50051_TCP_ADDR': '10.96.0.7', 'PORT_53_UDP_ADDR': '10.96.0.7'}
        services = {f'KUBENSAGE_{service}_{name}': value
                    for service in ('RELAY', 'AGENT', 'A_B') for name, value in of_one.items()}
        known = {**dict.fromkeys(map(agent.variable_of, agent.FLAGS), ''), 'KUBENSAGE_CACHE': '/c'}
        self.assertEqual([], agent.unknown_variables({**services, **known, 'TOP_N': '', 'PATH': ''}))
        for name, hint in (('RELAY_ADRESS', '; did you mean KUBENSAGE_RELAY_ADDRESS?'),
                           ('TOPN', '; did you mean KUBENSAGE_TOP_N?'), ('TOKEN', '')):
            self.assertEqual([f'KUBENSAGE_{name} is no variable of the agent{hint}'],
                             agent.unknown_variables({**known, f'KUBENSAGE_{name}': 'x'}))
        self.write(NODE)
        run = self.main(*self.node, '--once', environment={**services, 'KUBENSAGE_TOPN': 'secret'})
        line, = (line for line in run.err.splitlines() if 'KUBENSAGE_' in line)
        self.assertTrue(line.endswith(
            ' WARNING KUBENSAGE_TOPN is no variable of the agent; did you mean KUBENSAGE_TOP_N?'), line)
        self.assertEqual((0, False), (run.code, 'secret' in run.err))

    def test_nothing_is_begun_for_a_command_line_that_is_refused(self):
        run = self.main('--once', '--listen=1', '--relay-address=r:1', f'--log-file={self.directory}/new/log',
                        f'--spool-dir={self.directory}/spool')
        self.assertEqual((2, {'proc', 'sys'}), (run.code, set(os.listdir(self.directory))))


# --- where snapshots go

class ChooseOutputTest(Case):
    def test_table(self):
        relay, listen = '--relay-address=r:1', '--listen=127.0.0.1:1'
        for expected, on_a_terminal, elsewhere in (
                ((None, True, 2), ['', '--once=false'], []),
                ((None, True, 7), ['--main-loop-duration=7', '--main-loop-duration 7'], []),
                ((None, False, 5), [relay, listen, f'--once {relay}'], [relay, listen, f'--once {relay}']),
                (('table', False, 5), ['--once', '--output=table', '--receive=1 --output=table'], []),
                (('json', False, 5), [f'{relay} --output=json', '--receive=1'], ['', '--once', '--receive=1']),
                (('prometheus', False, 5), [f'{listen} --output=prometheus'], ['--once --output=prometheus'])):
            for terminal, arguments in [(True, each) for each in on_a_terminal] + [(False, each) for each in elsewhere]:
                with self.subTest(arguments, terminal=terminal):
                    options = agent.parse_options(arguments.split(), {}, terminal)
                    self.assertEqual((options.output, options.live, options.main_loop_duration), expected)
        self.assertEqual(agent.parse_options([], {'KUBENSAGE_MAIN_LOOP_DURATION': '9'}, True).main_loop_duration, 9)


# --- service

class ServiceTest(Case):
    def unit(self, *arguments):
        """The settings of the unit, each with all its values."""
        self.text = agent.render_unit(agent.parse_options(arguments, {}), '/usr/bin/python3', '/opt/agent.pyz')
        settings = collections.defaultdict(list)
        for line in self.text.splitlines():
            name, equals, value = line.partition('=')
            if equals:
                settings[name].append(value)
        return settings

    def test_flags_are_kept_but_for_those_of_this_call(self):
        for arguments, expected in (
                (('--print-unit', '--listen=1', '--top-n', '3'), ' --listen=0.0.0.0:1 --top-n=3'),
                (('--print-unit=true', '--once=false', '--listen', '[::]:1'), ' --listen=[::]:1 --once=false'),
                (('--print-unit', 'true', '--listen=1', '--log-file=/l', '--log-compress', '--relay-tls=false'),
                 ' --listen=0.0.0.0:1 --log-compress=true --log-file=/l --relay-tls=false'),
                (('--relay-address=r:1', '--main-loop-duration=10', '--buffer-retention', '0.5'),
                 ' --buffer-retention=0.5 --main-loop-duration=10 --relay-address=r:1 '
                 '--spool-dir=/var/lib/kubensage-agent'),
                (('--relay-address=r:1',), ' --relay-address=r:1 --spool-dir=/var/lib/kubensage-agent'),
                (('--relay-address=r:1', '--spool-dir', '/s'), ' --relay-address=r:1 --spool-dir=/s'),
                (('--relay-address=r:1', '--relay-ca', 'ca.pem'),
                 f' --relay-address=r:1 --relay-ca={os.getcwd()}/ca.pem --spool-dir=/var/lib/kubensage-agent')):
            with self.subTest(arguments):
                self.assertEqual(self.unit(*arguments)['ExecStart'], ['/usr/bin/python3 -I /opt/agent.pyz' + expected])

    def test_quoting(self):
        self.check_table(agent.systemd_quote, [
            ('--a=b', '--a=b'), ('a b', '"a b"'), ('50%', '50%%'), ('$HOME', '$$HOME'), ('a"b', '"a\\"b"'),
            ('a\\b', 'a\\\\b'), ("it's", '"it\'s"'), ('a;b', '"a;b"'), ('', '""'), ('a\nb', 'a\\nb')])

    def test_it_is_watched_and_may_write_where_it_must(self):
        unit = self.unit('--relay-address=r:1', '--main-loop-duration', '30', '--spool-dir', '/data/my spool',
                         '--log-file', '/logs/a.log')
        self.assertEqual((unit['Type'], unit['Restart'], unit['WatchdogSec']), (['notify'], ['always'], ['300']))
        self.assertEqual(unit['ReadWritePaths'], ['"-/data/my spool"', '-/logs'])
        self.assertEqual(self.unit()['WatchdogSec'], ['60'])
        for directory in ('StateDirectory', 'CacheDirectory', 'LogsDirectory'):
            self.assertEqual(len(unit[directory]), 1)
        self.assertEqual(f'/var/lib/{unit["StateDirectory"][0]}', agent.STATE_DIRECTORY)
        self.assertEqual(f'/var/log/{unit["LogsDirectory"][0]}', os.path.dirname(agent.DEFAULT_LOG_FILE))

    def test_nothing_blinds_it(self):
        unit = self.unit()
        for setting in ('ProcSubset ProtectProc PrivateNetwork PrivateUsers ProtectClock User DynamicUser '
                        'RootDirectory InaccessiblePaths PrivatePIDs IPAddressDeny').split():
            self.assertNotIn(setting, unit)
        self.assertEqual(set(unit['CapabilityBoundingSet'][0].split()), {'CAP_DAC_READ_SEARCH', 'CAP_SYS_PTRACE'})
        self.assertLessEqual({'AF_UNIX', 'AF_INET', 'AF_INET6', 'AF_NETLINK'},
                             set(unit['RestrictAddressFamilies'][0].split()))
        self.assertIn('adjtimex', unit['SystemCallFilter'][0].split())

    def test_systemd_accepts_it_and_finds_it_hardened(self):
        options = ('--print-unit', '--relay-address=r:1', '--top-n=3', '--relay-token-file=/etc/a b%c"d')
        # These tests may be in /tmp themselves.
        self.patch(PRIVATE_DIRECTORIES=())
        run = self.main(*options, '--relay-tls')
        self.assertEqual((run.code, run.err), (0, ''))
        self.assertIn(f'{sys.executable} -I {os.path.abspath(agent.__file__)} --relay-address=r:1', run.out)
        path = f'{self.write({"kubensage-agent.service": run.out}).rootfs}/kubensage-agent.service'
        self.tool('systemd-analyze', '--version')
        checked = subprocess.run(['systemd-analyze', 'verify', '--man=no', path], stdout=subprocess.PIPE,
                                 stderr=subprocess.STDOUT, encoding='utf-8')
        self.assertEqual([line for line in checked.stdout.splitlines() if 'kubensage' in line], [])
        rated = self.tool('systemd-analyze', 'security', '--offline=yes', '--no-pager', path)
        self.assertLessEqual(float(re.search(r'exposure level.*?: ([\d.]+)', rated).group(1)), 3.0)

    def test_a_program_that_the_unit_would_not_see_is_refused(self):
        for directory, refused in (('/tmp', True), ('/var/tmp/x', True), ('/tmpfiles', False), ('/opt/tmp', False)):
            with self.subTest(directory):
                self.patch(__file__=f'{directory}/agent.py')
                run = self.main('--print-unit', '--listen=9551')
                if refused:
                    self.assertEqual(run, (2, '', 'kubensage-agent: --print-unit: the unit does not see '
                                           f'{directory}/agent.py: copy it to /usr/local/lib\n'))
                else:
                    self.assertEqual((run.code, run.err), (0, ''))
                    self.assertIn(f' -I {directory}/agent.py --listen=0.0.0.0:9551\n', run.out)

    def variables(self, *arguments, environment={}):
        """Those of the manifest for a command line; the agent in the pod takes them."""
        run = self.main('--print-daemonset', *arguments, environment=environment)
        self.assertEqual((run.code, run.err), (0, ''))
        self.manifest = run.out
        values = {name: json.loads(value)
                  for name, value in re.findall(r'- name: (KUBENSAGE_\w+)\n +value: (".*")$', run.out, re.M)}
        root = self.new_directory()
        in_the_pod = {name: value.replace('/host/', f'{root}/') for name, value in values.items()}
        for name in 'proc', 'sys', 'root':
            os.mkdir(f'{root}/{name}')
        self.assertEqual([], agent.unknown_variables(values))
        self.options = agent.parse_options([], in_the_pod)
        return values

    # Of every manifest.
    OWN = {'KUBENSAGE_PROCFS': '/host/proc', 'KUBENSAGE_SYSFS': '/host/sys', 'KUBENSAGE_ROOTFS': '/host/root'}
    OF_A_RELAY = {'KUBENSAGE_SPOOL_DIR': '/var/lib/kubensage-agent',
                  'KUBENSAGE_LOG_FILE': '/var/lib/kubensage-agent/kubensage-agent.log'}

    def test_daemonset(self):
        values = self.variables('--relay-address', 'r:1', '--listen=9000', '--cri-socket', '/run/k3s/cri.sock',
                                '--top-n=3', '--log-compress=false')
        self.assertEqual(values, {
            **self.OWN, **self.OF_A_RELAY, 'KUBENSAGE_RELAY_ADDRESS': 'r:1', 'KUBENSAGE_LISTEN': '0.0.0.0:9000',
            'KUBENSAGE_CRI_SOCKET': '/host/root/run/k3s/cri.sock', 'KUBENSAGE_TOP_N': '3',
            'KUBENSAGE_LOG_COMPRESS': 'false'})
        self.assertFalse(self.options.log_compress)
        documents = self.manifest.split('\n---\n')
        self.assertEqual([re.search('^kind: (.*)$', text, re.M).group(1) for text in documents],
                         ['Namespace', 'ServiceAccount', 'DaemonSet'])
        self.assertIn('\n  labels:\n    pod-security.kubernetes.io/enforce: privileged', documents[0])
        for text in ('hostNetwork: true', 'hostPID: true', 'automountServiceAccountToken: false',
                     'enableServiceLinks: false', 'image: python:3.14-slim', 'path: /healthz', 'containerPort: 9000',
                     '- operator: Exists'):
            self.assertIn(text, documents[2])
        self.assertNotIn('NODE_NAME', self.manifest)
        for name in ('proc', 'sys', 'root', 'archive'):
            self.assertRegex(documents[2], rf'- name: {name}\n +mountPath: \S+\n +readOnly: true')
        volumes, mounts = (set(re.findall(pattern, documents[2])) for pattern in (
            r'- name: (\w+)\n +(?:hostPath|emptyDir):', r'- name: (\w+)\n +mountPath:'))
        self.assertEqual((volumes, volumes), (mounts, {'archive', 'proc', 'sys', 'root', 'cache', 'state'}))

    def test_a_manifest_has_nothing_of_the_machine_that_it_is_printed_on(self):
        """Its sockets least of all: the agent finds the node's below the node's root."""
        bound_socket(self, self.socket)
        for environment in {}, {'CONTAINER_RUNTIME_ENDPOINT': f'unix://{self.socket}'}:
            values = self.variables(environment=environment)
            self.assertEqual({**self.OWN, 'KUBENSAGE_LISTEN': agent.DAEMONSET_LISTEN}, values)
            self.assertNotIn(self.directory, self.manifest)
            self.assertNotIn('/run', self.manifest)

    def test_a_socket_is_named_as_the_node_has_it(self):
        for socket_ in '/run/x y.sock', 'unix:///run/x y.sock', 'unix:/run/x y.sock':
            self.assertEqual('/host/root/run/x y.sock', self.variables('--cri-socket', socket_)['KUBENSAGE_CRI_SOCKET'])
        run = self.main('--print-daemonset', '--cri-socket', 'npipe:x')
        self.assertEqual((2, '', 1), (run.code, run.out, run.err.count('\n')), run.err)

    def test_what_is_printed_starts_whatever_the_command_line(self):
        """Also where a flag came from the environment: either it is in what is printed, or it does not count."""
        for arguments, environment in (
                ('', {}), ('--listen=1', {}), ('--relay-address=r:1', {}),
                ('', {'KUBENSAGE_RELAY_ADDRESS': 'r:1'}), ('', {'KUBENSAGE_LISTEN': '1'}),
                ('--listen=1', {'KUBENSAGE_RELAY_ADDRESS': 'r:1'}), ('--top-n=3', {'KUBENSAGE_RELAY_ADDRESS': 'r:1'}),
                ('--listen=1 --spool-max-size=5', {}), ('--relay-address=r:1 --spool-max-size=5', {}),
                ('--relay-address=r:1 --log-max-size=5', {}),
                ('--spool-max-size=5', {'KUBENSAGE_RELAY_ADDRESS': 'r:1'})):
            for what in '--print-daemonset', '--print-unit':
                with self.subTest(arguments, environment=environment, what=what):
                    self.patch(PRIVATE_DIRECTORIES=())
                    run = self.main(what, *arguments.split(), environment=environment)
                    if run.code == 2:
                        # Refused at once.
                        self.assertRegex(run.err, r'\Akubensage-agent: --[^\n]+ has no effect without [^\n]+\n\Z')
                    elif what == '--print-daemonset':
                        self.variables(*arguments.split(), environment=environment)
                    else:
                        command = re.search('^ExecStart=(.*)$', run.out, re.M).group(1).split()[3:]
                        options = agent.parse_options(command, {})
                        self.assertTrue(options.relay_address or options.listen, command)


# --- golden run

# The node above as --once --output json gives it, a field or an item a line, without the time and without the sizes of
# this machine's file system. Made anew by: KUBENSAGE_TEST_GOLDEN=1 python3 -m unittest test_agent.GoldenTest
GOLDEN = r'''
arp_entries: {"cni0": "1", "enp0s3": "1"}
available_memory: "3637047296"
boot_time: "1795425261"
cgroup: {"cpu": {"pressure": {"full": {"avg10": 0.0, "avg300": 0.0, "avg60": 0.0, "total": "0"}, "some": {"avg10":
  70.95, "avg300": 38.9, "avg60": 69.15, "total": "169091998"}}, "stat": {"system_usec": "164460", "usage_usec":
  "277710", "user_usec": "113250"}}, "io": {"stat": []}, "path": ""}
cpu_infos: {"core_id": "0", "cores": 1, "cpu": 0, "mhz": 2596, "model": "QEMU TCG CPU version 2.5+", "physical_id": "0",
  "run_ns": "7000000007", "seconds": {"guest": 0.0, "guest_nice": 0.0, "idle": 101.88, "iowait": 0.73, "irq": 0.0,
  "nice": 0.0, "softirq": 2.41, "steal": 0.0, "system": 80.92, "user": 57.28}, "timeslices": "9", "vendor_id":
  "AuthenticAMD", "wait_ns": "8000000008"}
cpu_seconds: {"guest": 0.0, "guest_nice": 0.0, "idle": 208.95, "iowait": 1.13, "irq": 0.0, "nice": 0.0, "softirq": 4.87,
  "steal": 0.0, "system": 159.23, "user": 113.25}
devices: []
disk_io_summary: {"total_read_bytes": "836249600", "total_read_ops": "3874", "total_write_bytes": "670199808",
  "total_write_ops": "3589"}
disk_usages: {"device": "/dev/vda1", "fstype": "ext4", "mountpoint": "/", "read_only": false}
disk_usages: {"device": "/dev/vdb", "fstype": "ext4", "mountpoint": "/data", "read_only": false}
diskstats: {"device": "vda", "device_number": "254:0", "discard_ios": "0", "discard_merges": "0", "discard_sectors":
  "0", "discard_ticks": "0", "flush_ios": "801", "flush_ticks": "479", "in_flight": "0", "io_ticks": "6104", "read_ios":
  "3739", "read_merges": "488", "read_sectors": "1629322", "read_ticks": "4249", "time_in_queue": "19638", "write_ios":
  "3588", "write_merges": "3074", "write_sectors": "1308976", "write_ticks": "14908"}
diskstats: {"device": "vdb", "device_number": "254:16", "discard_ios": "0", "discard_merges": "0", "discard_sectors":
  "0", "discard_ticks": "0", "flush_ios": "1", "flush_ticks": "0", "in_flight": "0", "io_ticks": "108", "read_ios":
  "135", "read_merges": "0", "read_sectors": "3978", "read_ticks": "108", "time_in_queue": "112", "write_ios": "1",
  "write_merges": "0", "write_sectors": "8", "write_ticks": "3"}
host_id: "d249c048-6159-f805-57ce-12d99828162b"
hostname: "node-d13"
kernel_arch: "x86_64"
kernel_limits: {"entropy_avail": "255", "file_nr_allocated": "832", "file_nr_max": "9223372036854775807",
  "hung_task_detect_count": "1", "nf_conntrack_count": "129", "nf_conntrack_max": "65536", "pid_max": "4194304",
  "poolsize": "256", "threads_max": "31175"}
kernel_version: "6.12.107+deb13-cloud-amd64"
load_average: {"load1": 1.38, "load15": 0.83, "load5": 1.73, "runnable_threads": "2", "threads": "229"}
meminfo: {"Active(anon)": "159539200", "Buffers": "8019968", "HugePages_Total": "0", "Hugepagesize": "2097152",
  "MemAvailable": "3637047296", "MemFree": "3614240768", "MemTotal": "4111904768"}
memory_used_perc: 11.548357726946268
net_usage: {"total_bytes_received": "374552", "total_bytes_sent": "169316328", "total_drop_in": "0", "total_drop_out":
  "2", "total_err_in": "0", "total_err_out": "0", "total_fifo_err_in": "0", "total_fifo_err_out": "0",
  "total_packets_received": "6138", "total_packets_sent": "6583"}
netstat: {"IpExt_InOctets": "366352", "IpExt_OutOctets": "169221348", "TcpExt_ListenDrops": "0",
  "TcpExt_ListenOverflows": "0", "TcpExt_SyncookiesSent": "0", "TcpExt_TCPSynRetrans": "0"}
network_interfaces: {"addrs": [], "counters": {"rx_bytes": "0", "rx_compressed": "0", "rx_drop": "0", "rx_errs": "0",
  "rx_fifo": "0", "rx_frame": "0", "rx_multicast": "0", "rx_packets": "0", "tx_bytes": "0", "tx_carrier": "0",
  "tx_colls": "0", "tx_compressed": "0", "tx_drop": "0", "tx_errs": "0", "tx_fifo": "0", "tx_packets": "0"}, "flags":
  ["up", "loopback"], "index": 1, "mtu": 65536, "name": "lo"}
network_interfaces: {"addrs": [], "carrier": true, "counters": {"rx_bytes": "50152", "rx_compressed": "0", "rx_drop":
  "0", "rx_errs": "0", "rx_fifo": "0", "rx_frame": "0", "rx_multicast": "0", "rx_packets": "196", "tx_bytes": "29478",
  "tx_carrier": "0", "tx_colls": "0", "tx_compressed": "0", "tx_drop": "0", "tx_errs": "0", "tx_fifo": "0",
  "tx_packets": "145"}, "flags": ["up", "broadcast", "multicast"], "hardwareAddr": "52:54:00:d1:3d:13", "index": 2,
  "mtu": 1500, "name": "enp0s3", "operstate": "up", "rx_nohandler": "21"}
network_interfaces: {"addrs": [], "counters": {"rx_bytes": "324400", "rx_compressed": "0", "rx_drop": "0", "rx_errs":
  "0", "rx_fifo": "0", "rx_frame": "0", "rx_multicast": "54", "rx_packets": "5942", "tx_bytes": "169286850",
  "tx_carrier": "0", "tx_colls": "0", "tx_compressed": "0", "tx_drop": "2", "tx_errs": "0", "tx_fifo": "0",
  "tx_packets": "6438"}, "flags": [], "name": "cni0"}
nfs: {"net_connections": "4", "net_packets": "1", "net_tcp": "3", "net_udp": "2", "rpc_authrefrsh": "7", "rpc_calls":
  "5", "rpc_retrans": "6"}
os: "linux"
os_release: {"DEBIAN_VERSION_FULL": "13.7", "ID": "debian", "NAME": "Debian GNU/Linux", "PRETTY_NAME": "Debian GNU/Linux
  13 (trixie)", "VERSION": "13 (trixie)", "VERSION_CODENAME": "trixie", "VERSION_ID": "13"}
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
services: {"cgroup": {"cpu": {"stat": {"nr_periods": "1764", "nr_throttled": "1762", "system_usec": "2384613",
  "throttled_usec": "155951645", "usage_usec": "18820166", "user_usec": "16435552"}}, "io": {"stat": []}, "memory":
  {"current": "7258112"}, "path": "system.slice/kubelet.service"}, "name": "kubelet.service"}
snmp: {"Tcp_ActiveOpens": "0", "Tcp_AttemptFails": "0", "Tcp_CurrEstab": "1", "Tcp_EstabResets": "7", "Tcp_InErrs": "0",
  "Tcp_InSegs": "6042", "Tcp_OutSegs": "118723", "Tcp_PassiveOpens": "171", "Tcp_RetransSegs": "9", "Tcp_RtoAlgorithm":
  "1", "Tcp_RtoMax": "120000", "Tcp_RtoMin": "200", "Udp_IgnoredMulti": "2", "Udp_InCsumErrors": "0", "Udp_InDatagrams":
  "0", "Udp_InErrors": "0", "Udp_MemErrors": "0", "Udp_NoPorts": "0", "Udp_OutDatagrams": "0", "Udp_RcvbufErrors": "0",
  "Udp_SndbufErrors": "0"}
snmp6: {}
sockstat: {"FRAG_inuse": "0", "FRAG_memory": "0", "RAW_inuse": "0", "TCP_alloc": "5", "TCP_inuse": "3", "TCP_mem": "0",
  "TCP_mem_bytes": "0", "TCP_orphan": "0", "TCP_tw": "50", "UDPLITE_inuse": "0", "UDP_inuse": "1", "UDP_mem": "0",
  "UDP_mem_bytes": "0", "sockets_used": "134"}
sockstat6: {}
softnet_stat: {"backlog_len": "0", "cpu": 0, "dropped": "0", "flow_limit_count": "0", "processed": "8663",
  "received_rps": "0", "time_squeeze": "28"}
softnet_stat: {"backlog_len": "0", "cpu": 1, "dropped": "0", "flow_limit_count": "0", "processed": "10080",
  "received_rps": "0", "time_squeeze": "28"}
stat: {"ctxt": "297051", "intr": "223011", "processes": "2860", "procs_blocked": "0", "procs_running": "2"}
tcp_states: {"established": "1", "listen": "2"}
total_memory: "4111904768"
udp_queues: {"rx_v4": "0", "tx_v4": "0"}
uptime: "261"
used_memory: "474857472"
vmstat: {"oom_kill": "4", "pgfault": "362743", "pgmajfault": "1683", "pgpgin": "816650", "pswpin": "0"}
'''


class GoldenTest(Case):
    def test_node_gives_the_golden_text(self):
        self.write(NODE)
        document = json.loads(self.main(*self.node, '--once', '--output', 'json').out)
        lines = [f'{name}: {json.dumps(item, sort_keys=True)}'
                 for name, value in sorted({**document.pop('node_metrics'), **document}.items())
                 if name not in ('timestamp', 'agent_metrics')
                 for item in (value if value and isinstance(value, list) else [value])]
        sizes = r'"bytes_free": [^,}]+, |, "(total|used|free|used_percent|inodes|inodes_free)": [^,}]+'
        lines = [re.sub(sizes, '', line) if line.startswith('disk_usages') else line for line in lines]
        lines = [re.sub(r', "timestamp_ns": "\d+"', '', line) for line in lines]
        text = '\n' + ''.join(textwrap.fill(line, 120, subsequent_indent='  ', break_long_words=False) + '\n'
                              for line in lines)
        if 'KUBENSAGE_TEST_GOLDEN' in os.environ:
            print(text)
        self.assertEqual(GOLDEN, text)


# --- malformed input

RECORD = agent.RECORD.pack(b'KSR1', 3, 3, 1.5, 2.5, b'6' * 36) + b'abc'

# parse_ function → texts of real systems.
FUZZED = {
    'parse_stat': STAT, 'parse_cpuinfo': CPUINFO_X86.partition('\n\n')[0] + '\n\n' + CPUINFO_ARM,
    'parse_meminfo': MEMINFO, 'parse_statm': STATM, 'parse_mountinfo': MOUNTINFO.encode(),
    'parse_diskstats': DISKSTATS, 'parse_addresses': ADDRESSES, 'parse_net_dev': NET_DEV, 'parse_route': ROUTE,
    'parse_ipv6_route': IPV6_ROUTE, 'parse_os_release': OS_RELEASE, 'parse_uptime': UPTIME, 'parse_loadavg': LOADAVG,
    'parse_file_nr': FILE_NR, 'parse_softnet_stat': SOFTNET_STAT, 'parse_flat_keyed': VMSTAT,
    'parse_io_stat': IO_STAT + IO_STAT, 'parse_pressure': PRESSURE_CPU, 'parse_snmp': SNMP + NETSTAT,
    'parse_sockstat': SOCKSTAT, 'parse_schedstat': SCHEDSTAT, 'parse_arp': ARP, 'parse_tcp': TCP, 'parse_udp': UDP,
    'parse_nfs': RPC_NFS, 'parse_procs': '81\n82\n', 'parse_single': '100\n', 'parse_cpu_max': CPU_MAX,
    'parse_memory_stat': GROUP_V2['memory.stat'], 'parse_blkio': BLKIO, 'parse_number': '100', 'parse_numbers': '1 2 3',
    'parse_uuid': '06f83538-a376-46cd-8a8f-81923a2e4bbd',
    'parse_record': RECORD + agent.RECORD_CRC.pack(zlib.crc32(RECORD))}
ODD_NUMBERS = (b'', b'-1', b'-0', b'0x1f', b'1.5', b'1e999', b'NaN', b'inf', b'18446744073709551616', b'9' * 400,
               b'9' * 5000, '\u0663'.encode(), b'\0', b'\x85')


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
            number = re.compile(rb'\d+').search(data, at)
            if number:
                data = data[:number.start()] + chance.choice(ODD_NUMBERS) + data[number.end():]
    return data


class MalformedInputTest(Case):
    SEED, ROUNDS = 1, 10_000 if LONG else 1000

    def fuzz(self, parse, sample):
        """How many of the accidents are refused."""
        chance, is_text, refused = random.Random(self.SEED), isinstance(sample, str), 0
        original = sample.encode() if is_text else sample
        parse(sample)
        for _ in range(self.ROUNDS):
            data = mutated(original, chance)
            data = data.decode(errors='replace') if is_text else data
            try:
                parse(data)
            except agent.MALFORMED:
                refused += 1
            except Exception as error:
                self.fail(f'{error!r} for {data!r}')
        return refused

    def test_parsers_give_a_value_or_say_that_it_is_malformed(self):
        names = {'parse_memory_stat': [agent.field_names(wire.CgroupMemoryStat)]}
        for name, sample in FUZZED.items():
            parse = getattr(agent, name)
            with self.subTest(name):
                refused = self.fuzz(lambda text: parse(text, *names.get(name, [])), sample)
                # None refused would mean that the accidents are too tame; these may be written by a person.
                self.assertEqual(name in ('parse_os_release', 'parse_uuid'), refused == 0)

    def test_every_parser_is_among_them(self):
        # parse_lines takes other parsers, parse_options argv, and parse_timex a struct that always has its size.
        others = {'parse_lines', 'parse_options', 'parse_timex'}
        self.assertEqual({name for name in dir(agent) if name.startswith('parse_')} - others, {*FUZZED})

    def test_endpoints_with_accidents_are_paths(self):
        roots = self.write({'proc/7/comm': 'kubelet\n'})
        for path, text in {
                # kubelet 1.31, shortened
                'proc/7/cmdline': '/usr/bin/kubelet\0--config=/x.yaml\0'
                                  '--container-runtime-endpoint=unix:///run/x.sock\0',
                'etc/crictl.yaml': 'runtime-endpoint: unix:///run/k3s/containerd/containerd.sock\nimage-endpoint: ""\n'
                                   'timeout: 2\n'}.items():
            def endpoints(text):
                self.write({path: text})
                found, _ = agent.collect_endpoints(None, agent.Cycle(roots, 5, {}))
                self.assertTrue(all(map(os.path.isabs, found)), found)
            with self.subTest(path):
                self.assertEqual(0, self.fuzz(endpoints, text))

    def test_node_with_accidents_is_a_message_and_failures(self):
        roots, chance, state = self.write(NODE), random.Random(self.SEED), agent.NodeState(10)
        paths = [path for path in NODE if path.startswith(('proc/', 'sys/', 'etc/os'))]
        whole, _ = collected_node(roots, state)
        for _ in range(150):
            path = chance.choice(paths)
            content = mutated(NODE[path].encode(), chance)
            self.write({path: content})
            with self.subTest(path=path, content=content):
                node, _ = collected_node(roots, state)
                renderings(wire.Metrics.FromString(wire.Metrics(node_metrics=node).SerializeToString()))
            self.write({path: NODE[path]})
        self.assertLessEqual({*present(whole)}, {*present(collected_node(roots, state)[0])})

    def test_huge_files(self):
        """1,024 CPUs, 5,000 interfaces, 100,000 lines of mounts: as many as the largest machines have, and more."""
        node, failures = collected_node(self.write({
            'proc/stat': ''.join(f'cpu{number} {number} 2 3 4\n' for number in range(1024)),
            'proc/cpuinfo': ''.join(f'processor: {number}\ncore id: {number}\n\n' for number in range(1024)),
            'proc/net/dev': ''.join(f'eth{number}: {number} {columns(2, 15)}\n' for number in range(5000))}))
        self.assertEqual({}, failures)
        self.assertEqual([(number / 100, str(number)) for number in range(1024)],
                         [(cpu.seconds.user, cpu.core_id) for cpu in node.cpu_infos])
        self.assertEqual((sum(range(5000)), 5000 * 9),
                         (node.net_usage.total_bytes_received, node.net_usage.total_bytes_sent))
        mounts = ''.join(f'{number} 1 8:{number % 50} / /{number} rw - ext4 /dev/sda rw\n' for number in range(20_000))
        self.assertEqual(50, len(agent.real_mounts(agent.parse_mountinfo(mounts.encode()))))

    def test_file_missing_empty_truncated_binary_or_with_an_absurd_number_costs_at_most_its_subject(self):
        for path, number in {
                'proc/stat': '1795425261', 'proc/meminfo': '4015532', 'proc/diskstats': '1629322',
                'proc/1/net/dev': '324400', 'proc/1/mountinfo': '254', 'proc/uptime': '261',
                'proc/pressure/cpu': '169091998', 'proc/1/statm': '256', 'sys/class/net/lo/mtu': '65536'}.items():
            text = NODE[path]
            self.assertIn(number, text)
            absurd = ('-1', '-9223372036854775809', '18446744073709551616', '9' * 100)
            for content in (None, '', text[:len(text) * 2 // 3], b'\xff\xfe\0' * 9,
                            *(text.replace(number, other) for other in absurd)):
                with self.subTest(path, content=content):
                    files = {**NODE, path: content}
                    if content is None:
                        del files[path]
                    node, failures = collected_node(self.tree(files))
                    wire.NodeMetrics.FromString(node.SerializeToString())
                    self.assertGreater(len(present(node)), 10)
                    self.assertLessEqual(len(failures), 1, failures)

    def test_cgroups_with_accidents_cost_their_group_alone(self):
        roots, chance, state = self.write(OOM_FILES), random.Random(self.SEED), agent.RuntimeState()
        agent.update_pods(state.pods, [sandbox('pod', uid=UID)], [container(name, 'pod') for name in OOM_STATS],
                          agent.Cycle(roots, 5, {}))
        clock = itertools.count(1000, agent.SELDOM_SECONDS)

        def collect():
            """Of each container that has a group, what it says, without the time."""
            agent.collect_groups(state, agent.Cycle(roots, 5, {}, next(clock)))
            groups = {}
            for found in state.pods['pod'].containers.values():
                if found.group:
                    agent.fill_usage_from_cgroup(found)
                    group = wire.CgroupMetrics.FromString(found.message.cgroup.SerializeToString())
                    group.timestamp_ns = 0
                    groups[found.message.id] = group
            return groups

        whole = collect()
        paths = [path for path in OOM_FILES if 'kubepods' in path]
        for _ in range(600):
            path = chance.choice(paths)
            content = mutated(OOM_FILES[path].encode(), chance)
            self.write({path: content})
            with self.subTest(path=path, content=content):
                self.assertLessEqual({name for name in OOM_STATS if name not in path}, collect().keys())
                self.write({path: OOM_FILES[path]})
                self.assertEqual(whole, collect())


V1, V1ALPHA2 = 'runtime.v1.RuntimeService', 'runtime.v1alpha2.RuntimeService'


# --- the fakes

class FakeServer:
    """A gRPC server whose methods are looked up by `find`; it and its threads end with the test."""

    def __init__(self, test, address, options=(), credentials=None):
        self.pool = concurrent.futures.ThreadPoolExecutor(16)
        self.server = grpc.server(self.pool, options=[('grpc.max_send_message_length', -1), *options])
        self.server.add_generic_rpc_handlers((self,))
        self.changed, self.released = threading.Condition(), False
        self.port = (self.server.add_secure_port(address, credentials) if credentials else
                     self.server.add_insecure_port(address))
        self.server.start()
        test.addCleanup(self.close)

    def service(self, details):
        service, method = details.method[1:].split('/')
        return self.find(service, method)

    def wait(self, context):
        """Until `release`, or until the caller has given up."""
        context.add_callback(self.wake)
        with self.changed:
            self.changed.wait_for(lambda: self.released or not context.is_active(), 3 * PATIENCE_SECONDS)

    def wake(self):
        with self.changed:
            self.changed.notify_all()

    def release(self):
        self.released = True
        self.wake()

    def close(self):
        self.release()
        self.server.stop(0).wait()
        self.pool.shutdown()


class FakeRuntime(FakeServer):
    """A container runtime on a unix socket. For each method `answers` has a message, bytes to send as they are, or a
    status code to fail with, or a function that makes one of them from the request's bytes; of a list, one after the
    other, and the last for good. Methods in `hanging` give no answer before `release`."""

    def __init__(self, test, path=None, services=(V1,), **answers):
        path = path or test.socket
        self.services = services
        self.answers = {
            'Version': cri.VersionResponse(runtime_name='fake', runtime_version='1.0'),
            'ListPodSandbox': list_pods(sandbox('pod')),
            'ListContainers': list_containers(container('app', 'pod')),
            'ListContainerStats': list_stats(stats('app', 10**9, 500)),
            'ContainerStatus': b'', 'Status': b'', 'ImageFsInfo': b'',
            **answers}
        self.hanging = set()
        self.asked = []
        self.asked_queue = queue.Queue()
        self.stats_under_way = set()
        self.most_stats_under_way = 0
        os.makedirs(os.path.dirname(path), exist_ok=True)
        super().__init__(test, f'unix:{path}')

    def find(self, service, method):
        if service.replace('ImageService', 'RuntimeService') not in self.services:
            return None
        return grpc.unary_unary_rpc_method_handler(lambda request, context: self.answer(method, request, context))

    def answer(self, method, request, context):
        if method == 'ListContainerStats':
            self.stats_under_way.add(context)
            self.most_stats_under_way = max(self.most_stats_under_way, len(self.stats_under_way))
            context.add_callback(lambda: self.stats_under_way.discard(context))
        self.asked.append(method)
        self.asked_queue.put(method)
        if method in self.hanging:
            self.wait(context)
        answer = self.answers[method]
        if isinstance(answer, list):
            answer = answer.pop(0) if len(answer) > 1 else answer[0]
        if callable(answer):
            answer = answer(request)
        self.stats_under_way.discard(context)
        if isinstance(answer, grpc.StatusCode):
            context.abort(answer, 'as the test wishes')
        return answer if isinstance(answer, bytes) else answer.SerializeToString()


# What a relay does with one stream, given its messages and its context: consume them, and give the serialised Empty, or
# not.


def acknowledge(messages, context):
    collections.deque(messages, 0)
    yield b''


def end_without_answer(messages, context):
    collections.deque(messages, 0)
    yield from ()


def answer_early(messages, context):
    next(messages)
    yield b''


def failing(code, text, after=None):
    """Fail after so many messages, or after all."""
    def behave(messages, context):
        collections.deque(itertools.islice(messages, after), 0)
        context.abort(getattr(grpc.StatusCode, code), text)
        yield b''
    return behave


cut_after_two = failing('UNAVAILABLE', 'cut', 2)
refuse = failing('PERMISSION_DENIED', 'not you', 0)
fail_at_the_end = failing('INTERNAL', 'too bad')
exhausted = failing('RESOURCE_EXHAUSTED', 'too many streams', 0)


class FakeRelay(FakeServer):
    """A relay on TCP. Each stream is treated by the next behaviour of `script`, those after them by `usual`. Metrics
    arrive in `arrived`; when a stream has ended, the timestamps it brought are put into `streams`."""

    def __init__(self, test, *script, usual=acknowledge, port=0, limit_bytes=4 << 20, credentials=None):
        self.script = collections.deque(script)
        self.usual = usual
        self.arrived = queue.Queue()
        self.streams = queue.Queue()
        self.begun = itertools.count()
        super().__init__(test, f'127.0.0.1:{port}',
                         [('grpc.max_receive_message_length', limit_bytes), ('grpc.http2.bdp_probe', 0)], credentials)
        self.address = f'127.0.0.1:{self.port}'

    def find(self, service, method):
        if (service, method) != ('metrics.MetricsService', 'SendMetrics'):
            return None
        return grpc.stream_stream_rpc_method_handler(self.send_metrics)

    def send_metrics(self, requests, context):
        behave, timestamps = self.script.popleft() if self.script else self.usual, []
        number = next(self.begun)

        def messages():
            for data in requests:
                metrics = wire.Metrics.FromString(data)
                timestamps.append(metrics.timestamp)
                self.arrived.put(metrics)
                yield metrics

        try:
            yield from behave(messages(), context)
        finally:
            self.streams.put((number, timestamps))

    def hold(self, messages, context):
        """Acknowledge late: when `release` says so."""
        collections.deque(messages, 0)
        self.wait(context)
        yield b''

    def next_streams(self, count):
        """Of streams that have ended, in the order in which they began: one that was given up may end late."""
        ended = [self.streams.get(timeout=PATIENCE_SECONDS) for _ in range(count)]
        return [timestamps for _, timestamps in sorted(ended)]

    def next_arrived(self, count):
        return [self.arrived.get(timeout=PATIENCE_SECONDS) for _ in range(count)]


def closed_address(test):
    """Bound but not listening until the test ends: connections are refused, and a FakeRelay may bind it too."""
    reserved = socket.socket()
    test.addCleanup(reserved.close)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    reserved.bind(('127.0.0.1', 0))
    return '{}:{}'.format(*reserved.getsockname())


def bound_socket(test, path):
    """Of a server that does not listen, until the test ends."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    bound = socket.socket(socket.AF_UNIX)
    test.addCleanup(bound.close)
    bound.bind(path)
    return bound


def accept_silently(listener):
    """A connection to a server that has begun to speak HTTP/2, with an empty SETTINGS frame, and says nothing more."""
    listener.settimeout(PATIENCE_SECONDS)
    connection = listener.accept()[0]
    connection.settimeout(PATIENCE_SECONDS)
    connection.sendall(b'\0\0\0\x04\0\0\0\0\0')
    return connection


def dropped(backlog):
    """How many snapshots, by cause; causes that there were."""
    return +collections.Counter(backlog.dropped)


def wait_for_end(connection):
    deadline = time.monotonic() + PATIENCE_SECONDS
    with contextlib.closing(connection):
        while connection.recv(4096):
            if time.monotonic() > deadline:
                raise TimeoutError('the connection is still in use')


# --- what a runtime says

def annotations(key, value):
    """An entry of the map, which the agent does not parse."""
    entry = cri.PodSandboxConfig(annotations={key: value}).SerializeToString()
    return [entry[-(len(key) + len(value) + 4):]]


def sandbox(name, state=cri.SANDBOX_READY, created_at=1, uid=''):
    return cri.PodSandbox(id=name, state=state, created_at=created_at, metadata={
        'name': f'{name}-name', 'uid': uid or f'{name}-uid', 'namespace': 'default', 'attempt': 2})


def container(name, pod, state=cri.CONTAINER_RUNNING, created_at=3, **image):
    return cri.Container(id=name, pod_sandbox_id=pod, state=state, created_at=created_at, image=image,
                         metadata={'name': f'{name}-name', 'attempt': 4})


def stats(name, timestamp_ns, usage_ns, rate=None, **others):
    return cri.ContainerStats(attributes={'id': name}, cpu={
        'timestamp': timestamp_ns, 'usage_core_nano_seconds': value(usage_ns), 'usage_nano_cores': value(rate)},
        **others)


def layer(timestamp_ns, used_bytes, **others):
    """A file system: a writable layer, or that of the images."""
    return cri.FilesystemUsage(timestamp=timestamp_ns, fs_id={'mountpoint': '/x'}, used_bytes=value(used_bytes),
                               **others)


def status_of(**fields):
    return cri.ContainerStatusResponse(status=fields)


def varint(number):
    return bytes([number & 0x7f | 0x80]) + varint(number >> 7) if number > 0x7f else bytes([number])


def value(number):
    return None if number is None else cri.UInt64Value(value=number)


def list_stats(*entries):
    return cri.ListContainerStatsResponse(stats=entries)


def list_pods(*pods):
    return cri.ListPodSandboxResponse(items=pods)


def list_containers(*containers):
    return cri.ListContainersResponse(containers=containers)


# --- container runtime

class Part(NamedTuple):
    """What a cycle has made of the pods' side."""
    pods: List[wire.PodMetrics]
    runtime: wire.RuntimeMetrics
    failures: Dict[str, str]

    @property
    def containers(self):
        """Those of the first pod."""
        return self.pods[0].container_metrics


class RuntimeCase(Case):
    """The pods' side of the agent. Its state is the test's, and so is `now`, the clock by which things are due."""
    STATS = 'cri'
    LAYERS_SECONDS = 60

    def setUp(self):
        super().setUp()
        self.calls, self.endpoint, self.now = {}, self.socket, 0.0
        self.new_state()

    def new_state(self):
        self.state = agent.RuntimeState()
        # Whatever connection it has by then.
        self.addCleanup(agent.forget_runtime, self.state)

    def cycle(self, seconds=3, times=1, later=0):
        """The last of so many cycles at a moment so much later, each with so much time for the runtime."""
        options = argparse.Namespace(cri_socket=self.endpoint, cri_socket_uid=0, container_stats=self.STATS,
                                     fs_stats_interval=self.LAYERS_SECONDS, kubelet_root=None)
        self.now += later
        for _ in range(times):
            metrics, cycle = wire.Metrics(), agent.Cycle(self.write({}), 5, self.calls, self.now)
            cycle.deadline = time.monotonic() + seconds
            agent.collect_pods(metrics, options, self.state, cycle)
        return Part(metrics.pod_metrics, metrics.node_metrics.container_runtime, cycle.failures)


class RuntimeDiscoveryTest(RuntimeCase):
    KUBELET = {'proc/1/comm': 'systemd\n', 'proc/1/cmdline': 'init\0--container-runtime-endpoint=/not/this.sock\0',
               'proc/77/comm': 'kubelet\n'}
    COMMAND_LINE = {**KUBELET,
                    'proc/77/cmdline': 'kubelet\0--v=2\0--container-runtime-endpoint=unix:///run/cmd.sock\0--x\0'}
    CRICTL = {'etc/crictl.yaml': 'runtime-endpoint: unix:///run/crictl.sock\nimage-endpoint: unix:///run/image.sock\n'}

    def setUp(self):
        super().setUp()
        self.endpoint = None

    def endpoints(self, files, explicit=None):
        return [path.replace(os.path.realpath(self.directory), '', 1)
                for path in agent.collect_endpoints(explicit, agent.Cycle(self.write(files), 5, {}))[0]]

    def taken(self, seconds=3):
        """Of the runtime that a cycle has taken, its socket and what it speaks, and how many pods there are."""
        part, runtime = self.cycle(seconds), self.state.runtime
        return os.path.basename(runtime.socket), runtime.service, len(part.pods)

    def test_endpoints_are_ordered_from_the_most_deliberate_to_the_usual(self):
        expected = list(agent.CRI_SOCKETS)
        self.assertEqual(self.endpoints({}), expected)
        for name, files in (
                ('crictl', self.CRICTL),
                ('kubeadm', {
                    'var/lib/kubelet/kubeadm-flags.env':
                    'KUBELET_KUBEADM_ARGS="--pod-x=y --container-runtime-endpoint=unix:///run/kubeadm.sock"\n'}),
                ('config', {
                    'var/lib/kubelet/config.yaml': 'kind: KubeletConfiguration\n'
                    'containerRuntimeEndpoint: "unix:///run/config.sock"\nclusterDNS: []\n'}),
                ('cmd', self.COMMAND_LINE)):
            expected.insert(0, f'/run/{name}.sock')
            self.assertEqual(self.endpoints(files), expected)

    def test_the_flag_excludes_every_other_endpoint(self):
        for explicit in ('/run/x.sock', 'unix:///run/x.sock'):
            self.assertEqual(self.endpoints({**self.COMMAND_LINE, **self.CRICTL}, explicit), ['/run/x.sock'])

    def test_forms_of_the_endpoint_that_are_read(self):
        for path, text, found in (
                ('proc/77/cmdline', 'kubelet\0--container-runtime-endpoint\0/run/a.sock\0', True),
                ('proc/77/cmdline', 'X="--container-runtime-endpoint=unix:///run/a.sock"', True),
                ('proc/77/cmdline', 'kubelet\0--v=2\0', False), ('proc/77/cmdline', '', False),
                ('etc/crictl.yaml', "runtime-endpoint: '/run/a.sock' # here", True),
                ('etc/crictl.yaml', '{"timeout": 2, "runtime-endpoint": "unix:/run/a.sock"}', True),
                ('var/lib/kubelet/config.yaml', 'a: 1\ncontainerRuntimeEndpoint: >-\n  unix:///run/a.sock\n', True),
                ('var/lib/kubelet/config.yaml', 'containerRuntimeEndpoint:\n  "/run/a.sock"\n', True),
                ('var/lib/kubelet/config.yaml', 'containerRuntimeEndpoint:\nother: /run/a.sock\n', False),
                ('etc/crictl.yaml', 'runtime-endpoint: npipe:////run/a.sock', False),
                ('etc/crictl.yaml', 'runtime-endpoint: ""\ndebug: false\n', False),
                ('etc/crictl.yaml', '#runtime-endpoint: /run/a.sock\n', False),
                ('etc/crictl.yaml', 'image-endpoint: /run/a.sock\nother: 1\n', False)):
            with self.subTest(text):
                self.directory = self.new_directory()
                configured = ['/run/a.sock'] * found
                self.assertEqual(configured + list(agent.CRI_SOCKETS), self.endpoints({**self.KUBELET, path: text}))

    def test_one_socket_under_two_names_counts_once(self):
        os.makedirs(f'{self.directory}/var')
        os.symlink('../run', f'{self.directory}/var/run')
        files = {'etc/crictl.yaml': 'runtime-endpoint: unix:///var/run/crio/crio.sock\n'}
        self.assertEqual(self.endpoints(files).count('/run/crio/crio.sock'), 1)

    def test_an_endpoint_through_an_absolute_link_stays_in_the_mounted_root(self):
        """/var/run -> /run on Debian: in a container that sees the node's / elsewhere, /run is the container's own."""
        os.makedirs(f'{self.directory}/var')
        os.symlink('/run', f'{self.directory}/var/run')
        FakeRuntime(self, f'{self.directory}/run/own.sock')
        self.write({'etc/crictl.yaml': 'runtime-endpoint: unix:///var/run/own.sock\n'})
        self.assertEqual(len(self.cycle().pods), 1)

    def test_environment_names_the_runtime_and_the_flag_wins(self):
        for name in ('by-flag', 'by-environment'):
            FakeRuntime(self, f'{self.directory}/{name}.sock', ListPodSandbox=list_pods(sandbox(name)),
                        ListContainers=b'')
        for name, flag in (('by-flag', f'{self.directory}/by-flag.sock'), ('by-environment', '')):
            with self.subTest(name):
                run = self.main(*self.node, '--once', '--output=json', '--cri-socket', flag, environment={
                    'CONTAINER_RUNTIME_ENDPOINT': f'unix://{self.directory}/by-environment.sock'})
                self.assertEqual([pod['id'] for pod in json.loads(run.out)['pod_metrics']], [name])

    def test_the_likeliest_candidate_with_sandboxes_is_taken_and_v1_is_preferred_of_its_versions(self):
        """A containerd whose CRI plugin is disabled says UNIMPLEMENTED to both versions."""
        for what, first, services, expected in (
                ('older version', {'services': (V1ALPHA2,)}, (V1,), ('containerd.sock', V1ALPHA2, 1)),
                ('both versions', {'services': (V1ALPHA2, V1)}, (V1,), ('containerd.sock', V1, 1)),
                ('no runtime', {'services': ()}, (V1,), ('crio.sock', V1, 1)),
                ('nonsense', {'Version': b'\xff\xff'}, (V1,), ('crio.sock', V1, 1)),
                ('no sandboxes', {'ListPodSandbox': b''}, (V1ALPHA2,), ('crio.sock', V1ALPHA2, 1))):
            with self.subTest(what):
                self.setUp()
                FakeRuntime(self, f'{self.directory}/run/containerd/containerd.sock', **first)
                FakeRuntime(self, f'{self.directory}/run/crio/crio.sock', services)
                self.assertEqual(expected, self.taken())

    def test_a_candidate_that_hangs_or_is_deserted_gives_way_to_the_next(self):
        FakeRuntime(self, f'{self.directory}/run/containerd/containerd.sock').hanging.add('Version')
        bound_socket(self, f'{self.directory}/run/k3s/containerd/containerd.sock')
        FakeRuntime(self, f'{self.directory}/run/dockershim.sock')
        self.assertEqual(('dockershim.sock', V1, 1), self.taken(1))

    def test_a_runtime_without_sandboxes_gives_way_once_another_has_some(self):
        """Docker's containerd is up before that of k3s."""
        FakeRuntime(self, f'{self.directory}/run/containerd/containerd.sock', ListPodSandbox=b'')
        self.cycle()
        FakeRuntime(self, f'{self.directory}/run/k3s/containerd/containerd.sock')
        self.assertEqual(len(self.cycle(times=3).pods), 1)

    def test_the_agent_only_reads(self):
        reading = {'Version', 'Status', 'ImageFsInfo', 'ListPodSandbox', 'ListContainers', 'ListContainerStats',
                   'ContainerStatus'}
        named = re.findall(r"(?:runtime|images), '([A-Z]\w+)'", read_text(agent.__file__))
        self.endpoint, runtime = self.socket, FakeRuntime(self, ListContainerStats=[grpc.StatusCode.UNKNOWN, b''])
        self.cycle(times=2)
        self.assertEqual((reading, reading), (set(named), set(runtime.asked)))

    def test_no_runtime_is_a_failure_that_names_what_was_tried(self):
        bound_socket(self, f'{self.directory}/run/deserted.sock')
        FakeRuntime(self, f'{self.directory}/run/other.sock', services=())
        self.write({'run/file.sock': ''})
        for name, expected in (('absent', 'no socket at.*%s'), ('file', 'no socket at.*%s'),
                               ('deserted', '%s.*Connection refused'), ('other', '%s.*UNIMPLEMENTED')):
            with self.subTest(name):
                self.endpoint = f'{self.directory}/run/{name}.sock'
                part = self.cycle()
                self.assertEqual((list(part.pods), self.state.runtime), ([], None))
                self.assertRegex(part.failures['container runtime'], expected % self.endpoint)
        self.endpoint = None
        self.write({'etc/crictl.yaml': 'runtime-endpoint: npipe:x\n'})
        self.assertRegex(self.cycle().failures['container runtime'],
                         "no socket at any of the usual paths.*/etc/crictl.yaml names 'npipe:x'")

    def test_a_socket_that_this_user_cannot_reach_is_named_with_the_reason(self):
        """Be it the one that was named, or one that was found; and another one is taken."""
        usual = [f'{self.directory}{path}' for path in agent.CRI_SOCKETS[:2]]
        for path in usual:
            FakeRuntime(self, path)
        os.chmod(self.directory, 0o755)
        for path in usual:
            closed = os.path.dirname(path)
            self.addCleanup(os.chmod, closed, 0o700)
            os.chmod(closed, 0)
        for endpoint, expected in (usual[0], usual[:1]), (None, usual):
            self.endpoint = endpoint
            with self.subTest(endpoint), as_nobody():
                said = self.cycle().failures['container runtime']
                self.assertEqual('none answers: ' + '; '.join(f'{path}: Permission denied' for path in expected), said)
        os.chmod(os.path.dirname(usual[1]), 0o755)
        os.chmod(usual[1], 0o777)
        with as_nobody():
            self.assertEqual(os.path.basename(usual[1]), self.taken()[0])

    def test_a_connection_that_led_nowhere_is_closed(self):
        self.endpoint, listener = self.socket, bound_socket(self, self.socket)
        listener.listen()
        for _ in range(3):
            with concurrent.futures.ThreadPoolExecutor(1) as thread:
                thread.submit(self.cycle, 0.3)
                # The first connection asks whose the server is.
                listener.settimeout(PATIENCE_SECONDS)
                listener.accept()[0].close()
                connection = accept_silently(listener)
            wait_for_end(connection)

    def test_settings_that_cannot_be_read_cost_nothing_else(self):
        """A hostPath mount of a file that is absent makes a directory of that name."""
        for path in ('etc/crictl.yaml', 'var/lib/kubelet/config.yaml'):
            os.makedirs(f'{self.directory}/{path}')
        FakeRuntime(self, f'{self.directory}/run/containerd/containerd.sock')
        self.assertEqual(len(self.cycle().pods), 1)


# --- cgroups of containers

APP, SIDE, POD = 'a1' * 32, 'c3' * 32, 'b2' * 32
UID = '4d8d4687-e257-4652-97a9-ce84cd75ce32'
UID_ = UID.replace('-', '_')
STATIC_UID = '9f2da7f050544b2531a4f56805647174'
# By layout: the pod's group, the container's below it, the pod's uid, its class.
SYSTEMD = 'kubepods.slice/kubepods-{0}.slice/kubepods-{0}-pod%s.slice' % UID_
LAYOUTS = {
    'systemd, containerd': (SYSTEMD.format('burstable'), f'cri-containerd-{APP}.scope', UID, 'Burstable'),
    'systemd, Guaranteed': (f'kubepods.slice/kubepods-pod{UID_}.slice', f'cri-containerd-{APP}.scope', UID,
                            'Guaranteed'),
    'systemd, CRI-O with runc': (SYSTEMD.format('besteffort'), f'crio-{APP}.scope', UID, 'BestEffort'),
    'systemd, CRI-O with crun': (SYSTEMD.format('burstable'), f'crio-{APP}.scope', UID, 'Burstable'),
    'systemd, cri-dockerd': (SYSTEMD.format('burstable'), f'docker-{APP}.scope', UID, 'Burstable'),
    'systemd, static pod': (f'kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{STATIC_UID}.slice',
                            f'cri-containerd-{APP}.scope', STATIC_UID, 'BestEffort'),
    'cgroupfs': (f'kubepods/burstable/pod{UID}', APP, UID, 'Burstable'),
    'cgroupfs, Guaranteed': (f'kubepods/pod{UID}', APP, UID, 'Guaranteed'),
    'cgroupfs, CRI-O': (f'kubepods/besteffort/pod{UID}', f'crio-{APP}', UID, 'BestEffort'),
    'cgroupfs, static pod': (f'kubepods/burstable/pod{STATIC_UID}', APP, STATIC_UID, 'Burstable'),
    'kind': (
        f'kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/'
        f'kubelet-kubepods-burstable-pod{UID_}.slice',
             f'cri-containerd-{APP}.scope', UID, 'Burstable'),
    'kind, cgroupfs': (f'kubelet/kubepods/besteffort/pod{UID}', APP, UID, 'BestEffort'),
}


def net_dev(*numbers):
    """Of interfaces eth0, eth1, ..., each with one number in all columns."""
    return ''.join(f'eth{index}: {f"{number} " * 16}\n' for index, number in enumerate(numbers))


class CgroupsTest(Case):
    def container_cgroups(self, roots):
        return agent.read_container_cgroups(agent.read_cgroup_tree(roots.sysfs), agent.Cycle(roots, 5, {}))

    def test_container_and_pod_are_found_in_every_layout(self):
        for version, (controller, extra) in {
                'v2': ('', V2), 'v1': ('memory/', {}),
                'hybrid': ('memory/', {'sys/fs/cgroup/unified/cgroup.controllers': '\n'})}.items():
            for what, (pod, container_below, uid, qos) in LAYOUTS.items():
                with self.subTest(what, version=version):
                    top, path = f'sys/fs/cgroup/{controller}', f'{pod}/{container_below}'
                    others = (pod, f'{pod}/crio-conmon-{APP}.scope', f'{pod}/crio-{POD}', '0' * 63, 'A1' * 32,
                              f'a{APP}', f'{APP}.mount', f'{path}/container')
                    roots = self.tree({**{f'{top}{name}/cgroup.procs': '' for name in (path, *others)}, **extra})
                    self.assertEqual({APP: [path], POD: [f'{pod}/crio-{POD}']}, self.container_cgroups(roots))
                    self.assertEqual((pod, qos), (agent.pod_cgroup_path(path, uid), agent.qos_class(pod)))

    def test_container_without_a_kubelet_has_no_pod_and_no_class(self):
        path = f'k8s.io/{APP}'
        roots = self.tree({**V2, f'sys/fs/cgroup/{path}/cpu.stat': ''})
        self.assertEqual(({APP: [path]}, None, None), (
            self.container_cgroups(roots), agent.pod_cgroup_path(path, UID), agent.qos_class(path)))

    def test_node_in_a_container_is_none_of_the_containers(self):
        """As in kind: process 1 is below Docker's group. A container that makes such groups of its own is none."""
        path = f'docker/{POD}/kubelet/kubepods/pod{UID}/{APP}'
        files = {**V2, f'sys/fs/cgroup/{path}/cpu.stat': ''}
        for inside, found in (('system.slice/x.service', {}), (f'docker/{POD}/init.scope', {APP: [path]})):
            roots = self.tree({**files, 'proc/1/cgroup': f'0::/{inside}\n'})
            self.assertEqual({POD: [f'docker/{POD}'], **found}, self.container_cgroups(roots))

    def test_pod_of_another_uid_or_of_none_is_not_taken(self):
        path = f'kubepods/pod{UID}/{APP}'
        self.check_table(agent.pod_cgroup_path,
                         [((path, UID), f'kubepods/pod{UID}'), ((path, STATIC_UID), None), ((path, ''), None)])

    def network(self, pod, roots, *paths):
        """Whether the pod is in the node's network, None where that cannot be told; the first number of each of its
        interfaces."""
        cycle = agent.Cycle(roots, 5, {})
        agent.collect_pod_network(pod, f'{roots.sysfs}/fs/cgroup', paths, cycle)
        self.failures = cycle.failures
        return agent.known(pod.message, 'host_network'), {
            link.name: link.counters.rx_bytes for link in pod.message.network_interfaces}

    def test_host_network_is_known_by_the_namespace_or_by_the_file(self):
        """Where ns/net may not be read, net/dev of one namespace is one file."""
        dev = f'lo: {columns(1, 16)}\neth0: {columns(1, 16)}\n'
        for link, same in itertools.product((True, False), (True, False)):
            with self.subTest(link=link, same=same):
                roots = self.tree({'sys/fs/cgroup/a/cgroup.procs': '7\n8\n', 'proc/1/net/dev': dev,
                                   'proc/7/net/dev': dev})
                for pid, inode in ((1, 1), (7, 1 if same else 2)):
                    os.makedirs(f'{roots.procfs}/{pid}/ns')
                    if link:
                        os.symlink(f'net:[{inode}]', f'{roots.procfs}/{pid}/ns/net')
                if same and not link:
                    os.unlink(f'{roots.procfs}/7/net/dev')
                    os.link(f'{roots.procfs}/1/net/dev', f'{roots.procfs}/7/net/dev')
                pod = agent.Pod(wire.PodMetrics())
                for _ in range(2):
                    self.assertEqual((same, {} if same else {'eth0': 1}), self.network(pod, roots, 'a'))
                self.assertEqual([] if same else [list(range(1, 17))], [
                    [value for _, value in interface.counters.ListFields()]
                    for interface in pod.message.network_interfaces])

    def test_counters_of_a_pod_are_those_of_now_and_of_the_process_of_now(self):
        """A zombie has no net/dev; another procfs may not have the process at all. What is gone leaves nothing."""
        roots, pod = self.write({'proc/1/net/dev': NET_DEV, 'proc/6/net/x': '', 'proc/8/net/dev': net_dev(9)}), (
            agent.Pod(wire.PodMetrics()))
        for pid, numbers, expected in (
                ('7', [1], {'eth0': 1}), ('7', [2], {'eth0': 2}), ('7', [2], {'eth0': 2}),
                ('7', [3, 4], {'eth0': 3, 'eth1': 4}), ('7', [5], {'eth0': 5}), ('8', [5], {'eth0': 9}),
                ('6', [5], None), ('7', [5], {'eth0': 5}), ('0', [5], None), ('7', ['x', 5], {'eth1': 5}),
                ('7', [6], {'eth0': 6}), ('', [6], None)):
            with self.subTest(pid=pid, numbers=numbers):
                self.write({'sys/fs/cgroup/a/cgroup.procs': pid, 'proc/7/net/dev': net_dev(*numbers)})
                self.assertEqual((None, {}) if expected is None else (False, expected), self.network(pod, roots, 'a'))
                self.assertEqual([': dev'] * ('x' in numbers), list(self.failures))

    def test_network_is_that_of_the_first_process_that_has_one(self):
        roots = self.write({
            'proc/1/net/dev': NET_DEV,
            'sys/fs/cgroup/empty/cgroup.procs': '', 'sys/fs/cgroup/zombie/cgroup.procs': '6\n', 'proc/6/net/x': '',
            'sys/fs/cgroup/foreign/cgroup.procs': '0\n', 'sys/fs/cgroup/well/cgroup.procs': '7\n',
            'sys/fs/cgroup/next/cgroup.procs': '8\n', 'proc/7/net/dev': net_dev(1), 'proc/8/net/dev': net_dev(2)})
        self.assertEqual((False, {'eth0': 1}), self.network(
            agent.Pod(wire.PodMetrics()), roots, 'empty', 'zombie', 'foreign', 'gone', 'well', 'next'))
        # systemd in a container has all processes in groups below its own.
        self.write({'sys/fs/cgroup/empty/init.scope/cgroup.procs': '7\n'})
        self.assertEqual((False, {'eth0': 1}), self.network(agent.Pod(wire.PodMetrics()), roots, 'empty', 'next'))


# --- pods and containers

# kernel 6.12, Debian 13, x86_64, cgroup v2, systemd driver, containerd 1.7.24: a pod whose container with a limit of 32
# MiB was killed and started again; and what the runtime said of the two containers 10 s later (only the first is not at
# rest).
HOG = '1000c6a8357e047d5b0156383d6c481b3d949312e704f801b4a23ea160f984cb'
REST = '36bd6846d1957724bc0c237fbf562bee42da4d3a6553a469e1ba04a2e79db55a'
OOM_POD = SYSTEMD.format('burstable')
OOM_FILES = {
    **V2,
    **below(f'sys/fs/cgroup/{OOM_POD}', {
        'cpu.stat': 'usage_usec 6858104\nuser_usec 1468689\nsystem_usec 5389415\n', 'memory.current': '21848064\n',
        'memory.events': MEMORY_EVENTS}),
    **below(f'sys/fs/cgroup/{OOM_POD}/cri-containerd-{HOG}.scope', {
        'cpu.stat': 'usage_usec 1287923\nuser_usec 439064\nsystem_usec 848858\n', 'memory.current': '21278720\n',
        'memory.max': '33554432\n', 'memory.events': re.sub(r'\d+', '0', MEMORY_EVENTS),
        'memory.stat': 'anon 21037056\nfile 24576\ninactive_file 24576\nactive_file 0\npgfault 1111\npgmajfault 0\n',
        'memory.swap.current': '0\n', 'memory.swap.max': '0\n', 'cgroup.procs': '1311\n'}),
    **below(f'sys/fs/cgroup/{OOM_POD}/cri-containerd-{REST}.scope', {
        'cpu.stat': 'usage_usec 683889\nuser_usec 225183\nsystem_usec 458706\n', 'memory.current': '258048\n',
        'memory.max': 'max\n',
        'memory.stat': 'anon 57344\nfile 24576\ninactive_file 24576\nactive_file 0\npgfault 595\npgmajfault 0\n',
        'memory.swap.current': '0\n', 'memory.swap.max': 'max\n', 'cgroup.procs': '1100\n'}),
    'proc/1/net/dev': NET_DEV,
    'proc/1311/net/dev': NET_DEV.replace('enp0s3:   50152', '  eth0:    4836').partition('  cni0')[0]}
# working set, available, usage, resident, faults, major faults
OOM_STATS = {HOG: (1297955000, (21254144, 12300288, 21278720, 21037056, 1111, 0)),
             REST: (683889000, (233472, 0, 258048, 57344, 595, 0))}
MEMORY_FIELDS = ('working_set_bytes', 'available_bytes', 'usage_bytes', 'rss_bytes', 'page_faults', 'major_page_faults')


def memory_stats(numbers, timestamp=1):
    return cri.MemoryUsage(timestamp=timestamp, **{
        name: value(number) for name, number in zip(MEMORY_FIELDS, numbers)})


def group(cpu_usec, memory_bytes):
    return {'cpu.stat': f'usage_usec {cpu_usec}\n', 'memory.current': f'{memory_bytes}\n',
            'memory.stat': 'inactive_file 1\n'}


class KernelCase(RuntimeCase):
    """Pods whose containers are cgroups, by default one pod with APP and SIDE; `groups` has the files of each id's
    group."""
    STATS = 'cgroup'

    def setUp(self):
        super().setUp()
        self.groups = {name: group(1000, 500) for name in (POD, APP, SIDE)}
        self.pod_usec = 2000

    def start(self, **answers):
        self.write(V2)
        self.write_groups()
        return FakeRuntime(self, **{
            'ListPodSandbox': list_pods(sandbox(POD, uid=UID)),
            'ListContainers': list_containers(container(APP, POD), container(SIDE, POD)),
            'ListContainerStats': list_stats(*(stats(name, 10**9, 5_000_000, memory=memory_stats(range(1, 7)))
                                               for name in (APP, SIDE))),
            **answers})

    def write_groups(self):
        """As if something had run: then the pod's group has run as well."""
        self.pod_usec += 1
        for name, files in {'': group(self.pod_usec, 1000), **self.groups}.items():
            self.write(below(f'sys/fs/cgroup/kubepods/pod{UID}/{name}', files))

    def remove_group(self, name):
        take_away(f'{self.directory}/sys/fs/cgroup/kubepods/pod{UID}/{name}')
        del self.groups[name]

    def sources(self, part):
        """By container, where its numbers come from, and its CPU time in µs."""
        return {found.id: (found.stats_source, found.cpu_metrics.usage_core_nano_seconds.value // 1000)
                for pod in part.pods for found in pod.container_metrics}


class KernelSideTest(KernelCase):
    def test_capture_is_what_its_runtime_said(self):
        self.write(OOM_FILES)
        FakeRuntime(self, ListPodSandbox=list_pods(sandbox('oom-0', uid=UID)),
                    ListContainers=list_containers(*(container(name, 'oom-0') for name in OOM_STATS)))
        part = self.cycle()
        self.assertEqual({}, part.failures)
        for found in part.containers:
            usage_ns, numbers = OOM_STATS[found.id]
            self.assertEqual(('cgroup', 0), (found.stats_source, found.cgroup.memory.events.oom_kill))
            self.assertTrue(usage_ns - 11_000_000 < found.cpu_metrics.usage_core_nano_seconds.value <= usage_ns)
            self.assertEqual(numbers, tuple(getattr(found.memory_metrics, name).value for name in MEMORY_FIELDS))
            # Without a limit the runtime says 0, and the agent nothing.
            self.assertEqual([found.id == HOG] * 2 + [True], [
                found.memory_metrics.HasField('available_bytes'), found.swap_metrics.HasField('available_bytes'),
                found.swap_metrics.HasField('usage_bytes')])
        pod, = part.pods
        self.assertEqual((OOM_POD, 6858104, {'oom_kill': '2', 'oom': '1', 'max': '48', 'oom_group_kill': '1'}), (
            pod.cgroup.path, pod.cgroup.cpu.stat.usage_usec, known_values(pod.cgroup.memory.events)))
        self.assertEqual(('Burstable', False, [('eth0', 4836, 145)]), (pod.qos_class, pod.host_network, [
            (link.name, link.counters.rx_bytes, link.counters.tx_packets) for link in pod.network_interfaces]))

    def test_v1_gives_the_contracts_fields(self):
        FakeRuntime(self, ListPodSandbox=list_pods(sandbox(POD, uid=UID)),
                    ListContainers=list_containers(container(APP, POD)))
        for name in (f'pod{UID}', f'pod{UID}/{APP}'):
            self.write(group_v1(f'kubepods/besteffort/{name}'))
        pod, = self.cycle().pods
        found, = pod.container_metrics
        self.assertEqual(('cgroup', 1999, 'BestEffort', 30), (
            found.stats_source, found.cpu_metrics.usage_core_nano_seconds.value, pod.qos_class,
            pod.cgroup.memory.events.oom_kill))
        # 11 - 19 and 13 - 0: what is below zero is zero.
        self.assertEqual((0, 13, 11, 17, 26, 27),
                         tuple(getattr(found.memory_metrics, name).value for name in MEMORY_FIELDS))
        self.assertEqual((15, 1), (found.swap_metrics.usage_bytes.value, found.swap_metrics.available_bytes.value))

    def test_open_files_do_not_add_up(self):
        """Pods and containers come and go, one cannot be understood, and the runtime is away for a while."""
        runtime = self.start()
        for number in range(12):
            pod, app = sandbox(f'{number:064x}', uid=UID), container(f'{1 << 200 | number:064x}', f'{number:064x}')
            self.groups = {pod.id: group(number, 500), app.id: group(number, 500),
                           SIDE: {**group(number, 1), 'io.stat': '8:0 rbytes=x\n'}}
            self.write_groups()
            runtime.answers['ListPodSandbox'] = list_pods(pod)
            runtime.answers['ListContainers'] = list_containers(app, container(SIDE, pod.id))
            self.cycle()
            # Of the pod's group and of the containers'.
            self.assertEqual(3 + 3 + 4, sum(
                os.path.realpath(f'/proc/self/fd/{name}').startswith(f'{self.directory}/sys/fs/cgroup/')
                for name in os.listdir('/proc/self/fd')))
            self.remove_group(app.id)
            if number in (2, 4, 6):
                runtime.answers['ListPodSandbox'] = grpc.StatusCode.INTERNAL
                self.cycle()

    def test_each_part_has_the_moment_at_which_the_group_was_read(self):
        self.groups[APP]['memory.swap.current'] = '5\n'
        self.start()
        before = time.time_ns()
        app = self.cycle(times=2).containers[0]
        self.assertEqual({app.cgroup.timestamp_ns},
                         {app.cpu_metrics.timestamp, app.memory_metrics.timestamp, app.swap_metrics.timestamp})
        self.assertTrue(before < app.cgroup.timestamp_ns <= time.time_ns())

    def test_rate_is_of_two_reads_by_our_own_clock(self):
        self.start()
        instants = [time.monotonic_ns()]
        first = self.cycle()
        instants.append(time.monotonic_ns())
        self.groups[APP] = group(901_000, 500)
        self.write_groups()
        instants.append(time.monotonic_ns())
        app, side = self.cycle().containers
        instants.append(time.monotonic_ns())
        rate = app.cpu_metrics.usage_nano_cores.value
        lowest, highest = (900_000_000 * 10**9 // (instants[end] - instants[start]) for start, end in ((0, 3), (1, 2)))
        self.assertTrue(lowest <= rate <= highest, (lowest, rate, highest))
        self.assertEqual(UInt64Value(), agent.known(side.cpu_metrics, 'usage_nano_cores'))
        self.assertFalse(first.containers[0].cpu_metrics.HasField('usage_nano_cores'))

    def test_container_without_a_group_gets_what_the_runtime_says(self):
        """A VM's: the statistics are asked for each cycle, and those of a group come from the group. CPU time of one
        source is not compared with that of the other."""
        del self.groups[SIDE]
        runtime = self.start()
        for _ in range(3):
            part = self.cycle()
            self.assertEqual({APP: ('cgroup', 1000), SIDE: ('cri', 5000)}, self.sources(part))
        side = part.containers[1]
        self.assertEqual((False, 3), (side.HasField('cgroup'), side.memory_metrics.usage_bytes.value))
        self.assertEqual(3, runtime.asked.count('ListContainerStats'))
        self.groups[SIDE] = group(1000, 500)
        self.write_groups()
        for rate in (False, True):
            part = self.cycle(later=agent.SELDOM_SECONDS)
            self.assertEqual(('cgroup', 1000), self.sources(part)[SIDE])
            self.assertEqual(rate, part.containers[1].cpu_metrics.HasField('usage_nano_cores'))

    def test_flag_keeps_the_cgroups_unread(self):
        self.start()
        self.STATS = 'cri'
        part = self.cycle()
        self.assertEqual({APP: ('cri', 5000), SIDE: ('cri', 5000)}, self.sources(part))
        self.assertFalse(part.pods[0].HasField('cgroup') or part.containers[0].HasField('cgroup'))

    def test_tree_is_walked_only_for_running_containers_without_a_group(self):
        runtime = self.start()
        with mock.patch.object(agent, 'read_container_cgroups', wraps=agent.read_container_cgroups) as walk:
            self.cycle(times=4)
            self.assertEqual(1, walk.call_count)
            new, vm = 'd4' * 32, 'e5' * 32
            self.groups[new] = group(3000, 500)
            self.write_groups()
            runtime.answers['ListContainers'] = list_containers(
                container(APP, POD), container(new, POD), container('f6' * 32, POD, cri.CONTAINER_EXITED))
            part = self.cycle(times=2)
            self.assertEqual((2, ('cgroup', 3000)), (walk.call_count, self.sources(part)[new]))
            runtime.answers['ListContainers'] = list_containers(container(APP, POD), container(vm, POD))
            self.cycle(times=3)
            self.assertEqual(3, walk.call_count)
            self.cycle(times=2, later=agent.SELDOM_SECONDS)
            self.assertEqual(4, walk.call_count)

    def test_group_that_vanishes_is_looked_for_again(self):
        self.start()
        self.cycle()
        self.remove_group(SIDE)
        self.write_groups()
        part = self.cycle()
        self.assertEqual(({APP: ('cgroup', 1000), SIDE: ('cri', 5000)}, {}), (self.sources(part), part.failures))
        self.write(below(f'sys/fs/cgroup/elsewhere/cri-containerd-{SIDE}.scope', group(6000, 500)))
        self.assertEqual(('cgroup', 6000), self.sources(self.cycle())[SIDE])

    def test_malformed_file_of_a_group_costs_what_comes_from_it(self):
        most = 2**64
        for name, text in (('cpu.stat', 'usage_usec x\n'), ('cpu.stat', f'usage_usec {most}\n'),
                           ('cpu.stat', f'usage_usec {most - 1}\n'), ('cpu.stat', f'usage_usec {most // 1000 + 1}\n'),
                           ('cpu.stat', 'usage_usec -1\n'), ('memory.current', '1e9\n'),
                           ('memory.stat', f'inactive_file {most - 1}\n'), ('memory.max', '-5\n'),
                           ('cpu.pressure', 'some total=1\n'), ('io.stat', '8:0 rbytes=-1\n'),
                           ('memory.swap.current', f'{most - 1}\n')):
            with self.subTest(name, text=text):
                self.setUp()
                self.groups[SIDE][name] = text
                self.start()
                part = self.cycle()
                usec = 0 if name == 'cpu.stat' else 1000
                self.assertEqual({APP: ('cgroup', 1000), SIDE: ('cgroup', usec)}, self.sources(part))
                self.assertLessEqual(part.failures.keys(), {f'cgroups: {name}'})
                self.assertTrue(part.pods[0].HasField('cgroup'))
                memory, told = part.containers[1].memory_metrics, name not in ('memory.current', 'memory.stat')
                self.assertEqual((name != 'memory.current', told),
                                 (memory.HasField('usage_bytes'), memory.HasField('working_set_bytes')))

    def test_malformed_file_of_a_pod_costs_the_pods_group_alone(self):
        self.start()
        self.write(below(f'sys/fs/cgroup/kubepods/pod{UID}', {'memory.current': 'x\n'}))
        part = self.cycle()
        self.assertEqual({APP: ('cgroup', 1000), SIDE: ('cgroup', 1000)}, self.sources(part))
        self.assertEqual(['pod cgroups: memory.current'], list(part.failures))
        self.assertEqual((self.pod_usec, None), (part.pods[0].cgroup.cpu.stat.usage_usec,
                                                 agent.known(part.pods[0].cgroup.memory, 'current')))

    def test_restart_count_is_a_number_or_absent(self):
        for text, expected in (('0', 0), ('17', 17), ('', None), ('many', None), ('-1', None), ('9' * 30, None)):
            message = wire.ContainerMetrics()
            agent.fill_listed_container(message, cri.Container(
                annotations=annotations('io.kubernetes.container.restartCount', text)), {})
            self.assertEqual(expected, agent.known(message, 'restart_count'))

    def test_cost_grows_in_step_with_the_pods(self):
        """Opened files and directories of a cycle: as many more from 4 pods to 8 as from 8 to 12."""
        opened = []
        for count in (4, 8, 12):
            self.setUp()
            self.write(V2)
            pods, containers = [], []
            for number in range(count):
                pod, app, uid = f'{count + number:064x}', f'{1 << 200 | number:064x}', f'uid{number:09}'
                pods.append(sandbox(pod, uid=uid))
                containers.append(container(app, pod))
                self.write({f'proc/{number}/net/dev': NET_DEV})
                for name, process in (('', ''), (pod, number), (app, number)):
                    self.write(below(f'sys/fs/cgroup/kubepods/pod{uid}/{name}', {
                        **group(1, 2), 'cgroup.procs': f'{process}\n'}))
            FakeRuntime(self, ListPodSandbox=list_pods(*pods), ListContainers=list_containers(*containers))
            self.cycle()
            with mock.patch.object(agent.os, 'open', wraps=os.open) as read, \
                    mock.patch.object(agent, 'read_container_cgroups', wraps=agent.read_container_cgroups) as walk:
                part = self.cycle()
            self.assertEqual(({'cgroup'}, False, 0), (
                {source for source, _ in self.sources(part).values()}, part.pods[0].host_network, walk.call_count))
            opened.append(read.call_count)
        self.assertEqual(opened[1] - opened[0], opened[2] - opened[1])
        self.assertLess(opened[0], 4 * 4)


class LivingMessageTest(RuntimeCase):
    """After whatever changes, the message that lives says what one says that is filled afresh."""
    STATS, LAYERS_SECONDS = 'cgroup', 0
    NUMBER = re.compile(r'(?<![\w:])\d+(?![\w:])')

    def test_living_messages_equal_those_filled_afresh(self):
        self.patch(STORAGE_SECONDS=0)
        for version in (2, 1):
            self.setUp()
            self.version, self.random, self.numbers = version, random.Random(version), itertools.count(10**6, 1000)
            self.runtime, self.pods, sources = FakeRuntime(self, ContainerStatus=self.status), {}, set()
            self.processes = {}
            self.cgroups = agent.read_cgroup_tree(
                self.write({**group_of(version, 'other'), 'proc/1/net/dev': NET_DEV}).sysfs)
            for step in range(40):
                # What is read seldom changes when it is due, and not in between.
                later = self.random.choice((0, 0, agent.SELDOM_SECONDS))
                self.change(later > 0)
                living, failures = self.said(later)
                state, self.state = self.state, agent.RuntimeState()
                self.state.runtime = state.runtime
                with self.subTest(version=version, step=step):
                    self.assertEqual(self.said(0), (living, failures))
                self.state = state
                sources.update(c.get('stats_source') for pod in living for c in pod.get('container_metrics', ()))
            self.assertEqual({'cgroup', 'cri', None}, sources)

    def said(self, later):
        part = self.cycle(later=later)
        for pod in part.pods:
            for container in pod.container_metrics:
                # What is known of the past is not there afresh.
                for field in 'oom_kills', 'last_oom_kill_ns', 'last_exit':
                    container.ClearField(field)
        return [known_values(pod) for pod in part.pods], set(part.failures)

    def chance(self, share):
        return self.random.random() < share

    def status(self, request):
        id = cri.ContainerStatusRequest.FromString(request).container_id
        state, = (containers[id] for containers in self.pods.values() if id in containers)
        return status_of(state=state, started_at=5, exit_code=3,
                         reason='Error' if state == cri.CONTAINER_EXITED else '')

    def change(self, due):
        """Pods, containers, groups and their files come and go."""
        for pod in list(self.pods):
            if self.chance(0.05):
                self.remove_group(pod)
                del self.pods[pod]
        if len(self.pods) < 4 and self.chance(0.5):
            self.pods[self.new_id()] = {}
        for pod, containers in self.pods.items():
            self.write_group(due, pod)
            for id in list(containers):
                self.change_container(pod, id, due)
            if len(containers) < 3 and self.chance(0.5):
                id = self.new_id()
                containers[id] = self.random.choice((cri.CONTAINER_CREATED, cri.CONTAINER_RUNNING))
                self.write_group(due, pod, id)
        self.runtime.answers.update(
            ListPodSandbox=list_pods(*(sandbox(pod, uid=f'uid{pod}') for pod in self.pods)),
            ListContainers=list_containers(*(container(id, pod, state) for pod, containers in self.pods.items()
                                             for id, state in containers.items())),
            ListContainerStats=list_stats(*(self.stats(id) for containers in self.pods.values() for id in containers
                                            if self.chance(0.8))))

    def change_container(self, pod, id, due):
        if self.chance(0.15):
            self.pods[pod][id] += 1
        if self.chance(0.1) or self.pods[pod][id] > cri.CONTAINER_RUNNING:
            self.remove_group(pod, id)
        elif due or self.has_group(pod, id):
            self.write_group(due, pod, id)
        if self.chance(0.1):
            self.remove_group(pod, id)
            del self.pods[pod][id]

    def new_id(self):
        return f'{next(self.numbers):064x}'

    def stats(self, id):
        moment, *numbers = itertools.islice(self.numbers, 8)
        if self.chance(0.3):
            # That of available_bytes.
            numbers[1] = None
        swap = {'timestamp': moment, 'swap_usage_bytes': value(moment)} if self.chance(0.7) else None
        return stats(id, moment, moment, memory=memory_stats(numbers, moment), swap=swap)

    def path(self, *ids):
        return '/'.join((f'kubepods/poduid{ids[0]}', *ids[1:]))

    def has_group(self, *ids):
        return os.path.exists(f'{self.cgroups.top}/{self.path(*ids)}')

    def remove_group(self, *ids):
        for directory in {*self.cgroups.directories.values()}:
            if os.path.exists(f'{directory}/{self.path(*ids)}'):
                take_away(f'{directory}/{self.path(*ids)}')

    def write_group(self, due, *ids):
        """Its files anew: some are taken away, some lack a line, and now and then one is malformed."""
        path, pid, everything = self.path(*ids), int(ids[0], 16), due or not self.has_group(*ids)
        files = {os.path.relpath(self.cgroups.file_path(path, file.name), self.directory): file.when
                 for file in agent.GROUP_FILES[self.version]}
        if everything:
            self.processes[path] = f'{pid}\n' * self.random.choice((1, 2, 3))
        texts = {f'{self.cgroups.top}/{self.path(ids[0], ids[0])}/cgroup.procs': f'{pid}\n',
                 f'{self.cgroups.top}/{path}/cgroup.procs': self.processes[path]}
        for name, text in group_of(self.version, path).items():
            there, when = os.path.exists(f'{self.directory}/{name}'), files.get(name)
            if name.endswith('.procs') or when is None or not everything and (not there or when >= agent.LIMIT):
                continue
            if there and self.chance(0.05):
                take_away(f'{self.directory}/{name}')
            else:
                texts[name] = self.new_text(text)
        self.write({**texts, f'proc/{pid}/net/dev': self.new_text(net_dev(1, 1, 1))})

    def new_text(self, text):
        text = self.NUMBER.sub(lambda match: str(next(self.numbers)), text)
        lines = text.splitlines(True)
        if len(lines) == 1:
            return 'malformed' if self.chance(0.01) else re.sub(r'\d+', 'max', text, 1) if self.chance(0.1) else text
        return ''.join(line for line in lines if self.chance(0.9))


class PodsTest(RuntimeCase):
    def cycles(self, runtime, answers):
        """The one container of the one pod, in a cycle for each of these answers to ListContainerStats; a tuple is a
        sample: timestamp, usage, the runtime's rate."""
        metrics = []
        self.new_state()
        for answer in answers:
            runtime.answers['ListContainerStats'] = (
                list_stats(stats('app', *answer)) if isinstance(answer, tuple) else answer)
            metrics.append(self.cycle().containers[0])
        return metrics

    def test_every_field_has_its_place(self):
        pod, app = sandbox('pod'), container('app', 'pod', image='sha256:5', user_specified_image='registry/app:5')
        pod.labels['tier'], pod.runtime_handler = 'web', 'kata'
        app.labels['part'], app.image_ref = 'x', 'sha256:7'
        app.annotations.extend(annotations('io.kubernetes.container.restartCount', '6'))
        FakeRuntime(
            self, ListPodSandbox=list_pods(pod), ListContainers=list_containers(app),
            ContainerStatus=status_of(state=cri.CONTAINER_RUNNING, started_at=51, finished_at=52, reason='Error'),
            ListContainerStats=list_stats(stats(
                'app', 11, 12, 13, memory=memory_stats((22, 0, 24, 25, 26, 27), 21),
                writable_layer=layer(31, 0, inodes_used=value(34)),
                swap={'timestamp': 41, 'swap_available_bytes': value(42), 'swap_usage_bytes': value(43)})))
        part = self.cycle()
        self.assertEqual(part.failures, {})
        self.assertEqual(json_format.MessageToDict(part.pods[0], preserving_proto_field_name=True), {
            'id': 'pod', 'uid': 'pod-uid', 'name': 'pod-name', 'namespace': 'default', 'created_at': '1',
            'state': 'SANDBOX_READY', 'attempt': 2, 'labels': {'tier': 'web'}, 'runtime_handler': 'kata',
            'container_metrics': [{
                'id': 'app', 'name': 'app-name', 'image': 'sha256:5', 'created_at': '3', 'oom_kills': '0',
                'state': 'CONTAINER_RUNNING', 'attempt': 4,
                'cpu_metrics': {'timestamp': '11', 'usage_nano_cores': '13', 'usage_core_nano_seconds': '12'},
                'memory_metrics': {'timestamp': '21', 'working_set_bytes': '22', 'available_bytes': '0',
                                   'usage_bytes': '24', 'rss_bytes': '25', 'page_faults': '26',
                                   'major_page_faults': '27'},
                'file_system_metrics': {'timestamp': '31', 'mountpoint': '/x', 'used_bytes': '0',
                                        'inodes_used': '34'},
                'swap_metrics': {'timestamp': '41', 'available_bytes': '42', 'usage_bytes': '43'},
                'stats_source': 'cri', 'restart_count': 6, 'labels': {'part': 'x'}, 'image_ref': 'sha256:7',
                'user_specified_image': 'registry/app:5',
                'status': {'started_at_ns': '51', 'finished_at_ns': '52', 'reason': 'Error'}}],
            'ephemeral_storage': {'usages': [
                {'kind': 'layer', 'name': 'app-name', 'bytes': '0', 'inodes': '34', 'timestamp_ns': '31'}]}})

    def test_containers_are_listed_in_every_state_with_their_pod_if_its_sandbox_is_ready_or_one_of_them_runs(self):
        stray = container('stray', 'nowhere')
        stray.labels.update({f'io.kubernetes.pod.{name}': name for name in ('name', 'namespace', 'uid')})
        FakeRuntime(
            self, ListPodSandbox=list_pods(sandbox('one'), sandbox('two'), sandbox('none'), sandbox('unknown', 7),
                                           sandbox('dead', cri.SANDBOX_NOTREADY), sandbox('old', cri.SANDBOX_NOTREADY)),
            ListContainers=list_containers(
                container('odd', 'one', 9, 5), container('created', 'one', cri.CONTAINER_CREATED, 4),
                container('exited', 'one', cri.CONTAINER_EXITED), container('running', 'two', image='nginx'),
                container('orphan', 'dead'), container('ended', 'old', cri.CONTAINER_EXITED), stray),
            ListContainerStats=list_stats(
                {'attributes': {'id': 'exited'}, 'writable_layer': layer(6, 0)},
                stats('running', 1, 2, writable_layer=layer(0, 0)), stats('unknown', 1, 2)))
        pods = self.cycle().pods
        self.assertEqual([(pod.id, [(c.id, c.state, c.image, [
            field.name for field, _ in c.ListFields() if field.name.endswith('_metrics')])
            for c in pod.container_metrics]) for pod in pods], [
            ('dead', [('orphan', 'CONTAINER_RUNNING', '', [])]),
            ('none', []),
            ('one', [('exited', 'CONTAINER_EXITED', '', ['file_system_metrics']),
                     ('created', 'CONTAINER_CREATED', '', []), ('odd', '9', '', [])]),
            # A layer that was never measured is absent.
            ('two', [('running', 'CONTAINER_RUNNING', 'nginx', ['cpu_metrics'])]),
            ('nowhere', [('stray', 'CONTAINER_RUNNING', '', [])])])
        self.assertEqual([('SANDBOX_NOTREADY', 'dead-name', 'default', 'dead-uid'),
                          ('SANDBOX_NOTREADY', 'name', 'namespace', 'uid')],
                         [(pod.state, pod.name, pod.namespace, pod.uid) for pod in (pods[0], pods[-1])])

    def test_text_that_is_not_utf8_costs_its_bytes_alone(self):
        runtime = FakeRuntime(self, ContainerStatus=status_of(reason='abc', state=cri.CONTAINER_RUNNING))
        for method in 'ListPodSandbox', 'ListContainers', 'ListContainerStats', 'ContainerStatus', 'Version':
            runtime.answers[method] = re.sub(b'(fak|1[.]|po|defaul|ap|ab)[e0dtpc]', rb'\1' + b'\xff',
                                             runtime.answers[method].SerializeToString())
        part = self.cycle()
        pod, app = part.pods[0], part.containers[0]
        self.assertEqual('fak? 1.? po? po?-name defaul? ap? ab?'.replace('?', '\ufffd').split(), [
            part.runtime.name, part.runtime.version, pod.id, pod.name, pod.namespace, app.id, app.status.reason])
        self.assertEqual(({}, 500), (part.failures, app.cpu_metrics.usage_core_nano_seconds.value))
        wire.Metrics.FromString(wire.Metrics(pod_metrics=part.pods).SerializeToString())

    def test_usage_nano_cores_is_of_our_own_two_samples(self):
        """Each case: samples (timestamp, usage, the runtime's rate), and the rate after the last of them."""
        runtime = FakeRuntime(self)
        for what, samples, expected in (
                ('half a core', [(1_000_000_000, 0, None), (3_000_000_000, 1_000_000_000, None)], 500_000_000),
                ('idle', [(1_000_000_000, 7, None), (2_000_000_000, 7, 99)], 0),
                ("not the runtime's", [(1_000_000_000, 0, 77), (2_000_000_000, 5, 77)], 5),
                ('from the last one', [(1_000_000_000, 0), (2_000_000_000, 100), (3_000_000_000, 103)], 3),
                ('a cycle without statistics', [(1_000_000_000, 0), grpc.StatusCode.UNKNOWN, (3_000_000_000, 10)], 5),
                ('no time has passed', [(5, 0, 77), (5, 9, 77)], None),
                ('time went back', [(5, 0, 77), (4, 9, 77)], None),
                ('counter went back', [(5, 9, 77), (6, 8, 77)], None),
                ('after a sample that went back', [(1_000_000_000, 100, 77), (2_000_000_000, 0, 77),
                                                   (3_000_000_000, 4, 77)], 4),
                ("first: the runtime's", [(1, 2, 77)], 77),
                ("first: the runtime's largest", [(1, 2, agent.SANE_NANO_CORES - 1)], agent.SANE_NANO_CORES - 1),
                ('first: 0 may mean none', [(1, 2, 0)], None),
                ('first: containerd 1.6 tearing down', [(1, 2, 2**63)], None),
                ('first: more than any machine', [(1, 2, agent.SANE_NANO_CORES)], None),
                ('first: none', [(1, 2)], None)):
            with self.subTest(what):
                metrics = self.cycles(runtime, samples)[-1]
                rate = agent.known(metrics.cpu_metrics, 'usage_nano_cores')
                self.assertEqual(expected, rate and rate.value)
                # A counter that went back is no measurement.
                self.assertEqual('counter' not in what, metrics.HasField('cpu_metrics'))

    def test_nonsense_numbers_cost_no_more_than_themselves(self):
        """Largest and smallest of every type; the rate between these two samples does not fit into 64 bits."""
        most, least = 2**63 - 1, -2**63
        self.assertEqual(len(self.cycles(FakeRuntime(
            self, ListPodSandbox=list_pods(cri.PodSandbox(id='pod', created_at=least)),
            ListContainers=list_containers(
                cri.Container(id='app', pod_sandbox_id='pod', created_at=most, state=2**31 - 1))), [
            (1, 0), (2, 2**64 - 1), (least, 0), (most, 2**64 - 1),
            list_stats(stats('', 0, 0), stats('app', 0, 0))])), 5)

    def test_what_a_later_runtime_says_of_memory_does_not_get_into_the_relays_contract(self):
        """containerd 2.3 has the pressure there, as field 8."""
        usual = cri.MemoryUsage(timestamp=4, usage_bytes=value(3)).SerializeToString()
        later = cri.MemoryUsage.FromString(usual + b'\x42\x02\x0a\x00')
        FakeRuntime(self, ListContainerStats=list_stats(stats('app', 1, 2, memory=later)))
        self.assertEqual(usual, self.cycle().containers[0].memory_metrics.SerializeToString())

    def test_time_before_1970_is_none(self):
        """Go's zero time."""
        zero = -6795364578871345152
        FakeRuntime(self, ListPodSandbox=list_pods(sandbox('pod', created_at=zero)),
                    ListContainers=list_containers(container('app', 'pod', cri.CONTAINER_EXITED, zero)),
                    ContainerStatus=status_of(state=cri.CONTAINER_EXITED, started_at=5, finished_at=zero, exit_code=-1))
        pod = self.cycle().pods[0]
        app = pod.container_metrics[0]
        self.assertEqual((0, 0, 5, None, -1), (pod.created_at, app.created_at, app.status.started_at_ns,
                                               agent.known(app.status, 'finished_at_ns'), app.status.exit_code))


# --- what the runtime is asked

class QuestionsTest(KernelCase):
    def test_statistics_are_asked_for_only_for_the_writable_layers(self):
        runtime = self.start(ListContainerStats=list_stats(
            stats(APP, 1, 2, writable_layer=layer(31, 33)), stats(SIDE, 1, 2)))
        for _ in range(6):
            self.assertEqual([33, 0], [found.file_system_metrics.used_bytes.value for found in self.cycle().containers])
        runtime.answers['ListContainerStats'] = list_stats(stats(APP, 1, 2, writable_layer=layer(32, 44)))
        # What is due is asked once.
        methods = ('ListContainerStats', 'ImageFsInfo', 'Status')
        for later, used, counts in ((14, 33, (1, 1, 1)), (1, 33, (1, 1, 2)), (44, 33, (1, 1, 3)), (1, 44, (2, 2, 3))):
            part = self.cycle(times=2, later=later)
            self.assertEqual((used, counts), (part.containers[0].file_system_metrics.used_bytes.value,
                                              tuple(map(runtime.asked.count, methods))))

    def test_hung_statistics_cost_nothing_but_the_layers_and_are_hardly_waited_for(self):
        self.start().hanging.add('ListContainerStats')
        for patience, failures in (agent.CRI_LONGEST_SECONDS, []), (0, ['container statistics']):
            self.patch(CRI_LONGEST_SECONDS=patience)
            began = time.monotonic()
            part = self.cycle(seconds=PATIENCE_SECONDS)
            self.assertLess(time.monotonic() - began, PATIENCE_SECONDS / 2)
            self.assertEqual({APP: ('cgroup', 1000), SIDE: ('cgroup', 1000)}, self.sources(part))
            self.assertEqual(failures, [*part.failures])

    def test_status_is_asked_for_once_after_each_change_of_state(self):
        ids = []

        def status(request):
            ids.append(cri.ContainerStatusRequest.FromString(request).container_id)
            return status_of(state=cri.CONTAINER_RUNNING, started_at=8) if len(ids) < 3 else status_of(
                state=cri.CONTAINER_EXITED, started_at=8, finished_at=9, exit_code=137, reason='OOMKilled')

        def told(times):
            return known_values(self.cycle(times=times).containers[0].status)

        runtime = self.start(ContainerStatus=status)
        self.assertEqual(({'started_at_ns': '8'}, [APP, SIDE]), (told(4), sorted(ids)))
        runtime.answers['ListContainers'] = list_containers(
            container(APP, POD, cri.CONTAINER_EXITED), container(SIDE, POD))
        for times in (1, 2):
            self.assertEqual({'started_at_ns': '8', 'finished_at_ns': '9', 'exit_code': 137, 'reason': 'OOMKilled'},
                             told(times))
        self.assertEqual([APP], ids[2:])

    def test_a_kill_is_asked_about_again_and_what_is_known_of_it_stays(self):
        """containerd may learn only after the exit that it was for want of memory; and may not answer just then."""
        def told(reason):
            return status_of(state=cri.CONTAINER_EXITED, finished_at=time.time_ns(), exit_code=137, reason=reason)

        runtime = self.start(ContainerStatus=[told('Error'), grpc.StatusCode.INTERNAL, told('OOMKilled'),
                                              told('too late')],
                             ListContainers=list_containers(container(APP, POD, cri.CONTAINER_EXITED)))
        for reason in ('Error', 'Error', 'OOMKilled', 'OOMKilled'):
            status = self.cycle(later=agent.CONDITIONS_SECONDS).containers[0].status
            self.assertEqual((137, reason), (status.exit_code, status.reason))
        self.assertEqual(3, runtime.asked.count('ContainerStatus'))

    def test_statuses_are_asked_for_by_and_by_and_of_those_that_have_ended_first(self):
        bound, told = agent.STATUSES_PER_CYCLE, []
        names = [f'{number:064x}' for number in range(bound * 2 + 3)]
        ended = names[-bound:]
        runtime = self.start(ListPodSandbox=list_pods(sandbox('a'), sandbox('b')), ListContainers=list_containers(*(
            container(name, 'ab'[number % 2], cri.CONTAINER_EXITED if name in ended else cri.CONTAINER_RUNNING)
            for number, name in enumerate(names))))
        for asked in (bound, 2 * bound, 2 * bound + 3, 2 * bound + 3):
            told.append([found.id for pod in self.cycle().pods for found in pod.container_metrics
                         if found.HasField('status')])
            self.assertEqual(asked, runtime.asked.count('ContainerStatus'))
        self.assertEqual((ended, names), (sorted(told[0]), sorted(told[-1])))

    def test_status_that_fails_is_a_failure_and_not_asked_for_each_cycle(self):
        runtime = self.start(ContainerStatus=grpc.StatusCode.INTERNAL)
        part = self.cycle()
        self.assertIn('INTERNAL', part.failures['container status'])
        self.cycle(times=3)
        self.assertEqual(2, runtime.asked.count('ContainerStatus'))
        runtime.answers['ContainerStatus'] = grpc.StatusCode.NOT_FOUND
        self.new_state()
        self.assertNotIn('container status', self.cycle().failures)

    def test_states_are_counted_and_the_runtime_is_described(self):
        self.start(
            ListPodSandbox=list_pods(*(sandbox(f'pod {number}', state) for number, state in enumerate((0, 1, 1)))),
            ListContainers=list_containers(*(
                container(str(number), 'pod 1', state) for number, state in enumerate((0, 1, 1, 2, 2, 2, 3)))),
            Status=cri.StatusResponse(status={'conditions': [
                {'type': 'RuntimeReady', 'status': True}, {'type': 'NetworkReady'}]}),
            ImageFsInfo=cri.ImageFsInfoResponse(image_filesystems=[layer(1, 2, inodes_used=value(3))]))
        before, said = time.time_ns(), json_format.MessageToDict(self.cycle().runtime, preserving_proto_field_name=True)
        self.assertTrue(before < int(said.pop('listed_at_ns')) < time.time_ns())
        self.assertEqual(said, {
            'name': 'fake', 'version': '1.0', 'socket': self.socket, 'service': V1,
            'conditions': {'RuntimeReady': True, 'NetworkReady': False},
            'sandboxes': {'SANDBOX_READY': '1', 'SANDBOX_NOTREADY': '2'},
            'containers': {'CONTAINER_CREATED': '1', 'CONTAINER_RUNNING': '2', 'CONTAINER_EXITED': '3',
                           'CONTAINER_UNKNOWN': '1'},
            'image_file_systems': [{'timestamp': '1', 'mountpoint': '/x', 'used_bytes': '2', 'inodes_used': '3'}]})

    def test_an_old_answer_about_the_runtime_stays_until_there_is_a_new_one(self):
        runtime = self.start(
            Status=[cri.StatusResponse(status={'conditions': [{'type': 'RuntimeReady'}]}), grpc.StatusCode.INTERNAL],
            ImageFsInfo=[cri.ImageFsInfoResponse(image_filesystems=[layer(0, number)])
                         for number in (1, 2)])
        # It has not recovered before it is asked again.
        for later, failed, used in ((0, [], 1), (15, ['runtime health: Status'], 1), (1, ['runtime health: Status'], 1),
                                    (44, ['runtime health: Status'], 2)):
            part = self.cycle(later=later)
            self.assertEqual(({'RuntimeReady': False}, failed, used), (
                dict(part.runtime.conditions), list(part.failures),
                part.runtime.image_file_systems[0].used_bytes.value))
        self.assertEqual(3, runtime.asked.count('Status'))


class AnswersTest(RuntimeCase):
    def test_statistics_that_fail_once_are_asked_for_again_at_once(self):
        runtime = FakeRuntime(self, ListContainerStats=[grpc.StatusCode.NOT_FOUND, list_stats(stats('app', 1, 2))])
        part = self.cycle()
        self.assertEqual((True, {}, 2), (part.containers[0].HasField('cpu_metrics'), part.failures,
                                         runtime.asked.count('ListContainerStats')))

    def test_statistics_that_always_fail_leave_the_lists(self):
        for answer in (grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED, b'\xff\xff garbage'):
            with self.subTest(answer=answer):
                self.setUp()
                runtime = FakeRuntime(self, ListContainerStats=answer)
                part = self.cycle(times=3)
                metrics = part.containers[0]
                self.assertEqual((metrics.id, metrics.HasField('cpu_metrics')), ('app', False))
                self.assertIn('ListContainerStats', part.failures['container statistics'])
                self.assertEqual((runtime.asked.count('Version'), runtime.asked.count('ListContainerStats')), (1, 6))

    def test_statistics_that_hang_leave_the_lists_and_have_one_call_under_way(self):
        runtime = FakeRuntime(self)
        runtime.hanging.add('ListContainerStats')
        part = self.cycle(seconds=0.3)
        for _ in range(4):
            self.assertEqual('app', part.containers[0].id)
            self.assertIn('container statistics', part.failures)
            part = self.cycle(seconds=0.1)
        self.assertEqual((runtime.asked.count('ListContainerStats'), runtime.asked.count('Version')), (1, 1))
        runtime.release()
        part = self.cycle()
        self.assertEqual(part.containers[0].cpu_metrics.usage_core_nano_seconds.value, 500)
        self.assertEqual((part.failures, runtime.most_stats_under_way), ({}, 1))

    def test_statistics_that_hang_for_long_are_asked_for_anew_but_never_twice_at_a_time(self):
        runtime = FakeRuntime(self)
        runtime.hanging.add('ListContainerStats')
        self.patch(STATS_TIMEOUT_SECONDS=0.15)
        for seconds in (0.3, 0.1, 0.1, 0.1, 0.1, 0.1):
            self.assertEqual(len(self.cycle(seconds).pods), 1)
        self.assertGreater(runtime.asked.count('ListContainerStats'), 1)
        self.assertEqual(runtime.most_stats_under_way, 1)

    def test_the_pause_after_repeated_timeouts_grows_and_the_lists_go_on(self):
        runtime = FakeRuntime(self)
        usual, runtime.answers['ListContainerStats'] = (runtime.answers['ListContainerStats'],
                                                        grpc.StatusCode.DEADLINE_EXCEEDED)
        for timeouts, pause in enumerate((0, 10, 20, 40, 80, 160, 300, 300), 1):
            part = self.cycle()
            self.assertIn('DEADLINE_EXCEEDED', part.failures['container statistics'])
            if pause:
                part = self.cycle(times=2, later=pause - 1)
                self.assertEqual((1, {
                    'container statistics': f'ListContainerStats: paused after {timeouts} time-outs'}),
                    (len(part.pods), part.failures))
                self.now += 1
            self.assertEqual(timeouts, runtime.asked.count('ListContainerStats'))
        # An answer ends it: the next time-out is the first.
        runtime.answers['ListContainerStats'] = [usual, grpc.StatusCode.DEADLINE_EXCEEDED]
        self.assertEqual({}, self.cycle().failures)
        self.cycle(times=2)
        self.assertEqual(timeouts + 3, runtime.asked.count('ListContainerStats'))

    def test_a_step_of_the_wall_clock_does_not_lengthen_the_wait_for_statistics(self):
        runtime, clock = FakeRuntime(self), time.time
        runtime.hanging.add('ListContainerStats')
        start = time.monotonic()
        stepped = threading.Timer(0.1, lambda: setattr(time, 'time', lambda: clock() - 86400))
        with mock.patch.object(time, 'time', clock):
            stepped.start()
            part = self.cycle(seconds=0.3)
            took = time.monotonic() - start
            stepped.join()
        self.assertIn('container statistics', part.failures)
        self.assertLess(took, 1)

    def test_an_answer_of_32_mib_is_accepted_and_a_larger_one_is_a_failure(self):
        """The first 30 of them are an unknown field, which costs the parser nothing."""
        runtime = FakeRuntime(self)
        usual = runtime.answers['ListContainers'].SerializeToString()
        for size, failed in ((30 << 20, []), (32 << 20, ['container runtime'])):
            with self.subTest(size=size):
                runtime.answers['ListContainers'] = usual + b'\xfa\x3f' + varint(size) + bytes(size)
                part = self.cycle(seconds=PATIENCE_SECONDS)
                self.assertEqual((1, failed), (len(part.containers), [*part.failures]))
        self.assertIn('ListContainers: RESOURCE_EXHAUSTED', part.failures['container runtime'])

    def test_garbage_and_errors_in_the_lists_are_failures_that_pass(self):
        for method, answer in itertools.product(
                ('ListPodSandbox', 'ListContainers'),
                (b'\xff\xff', b'\x0a\x7f', b'\x0a\x01\xff', grpc.StatusCode.INTERNAL)):
            with self.subTest(method=method, answer=answer):
                self.setUp()
                runtime = FakeRuntime(self)
                runtime.answers[method] = [answer, runtime.answers[method]]
                part = self.cycle()
                self.assertFalse(part.pods or part.runtime.ListFields())
                self.assertIn(method, part.failures['container runtime'])
                part = self.cycle()
                self.assertEqual((len(part.pods), part.failures), (1, {}))

    def test_a_runtime_restarted_under_the_same_path_is_found_again(self):
        before = FakeRuntime(self)
        self.cycle()
        before.close()
        gone, state = self.cycle(), self.state.pods['pod']
        self.assertEqual((['pod'], ['container runtime'], 'fake'), (
            [pod.id for pod in gone.pods], list(gone.failures), gone.runtime.name))
        FakeRuntime(self, services=(V1ALPHA2,), ListContainerStats=list_stats(stats('app', 2 * 10**9, 507)))
        back = self.cycle()
        self.assertEqual((back.failures, back.containers[0].cpu_metrics.usage_nano_cores.value), ({}, 7))
        self.assertIs(state, self.state.pods['pod'])

    def test_a_runtime_replaced_between_two_cycles_is_not_missed_for_one(self):
        before = FakeRuntime(self)
        self.cycle()
        os.rename(self.socket, f'{self.socket}.old')
        after = FakeRuntime(self)
        self.assertEqual(len(self.cycle().pods), 1)
        self.assertEqual((before.asked.count('ListPodSandbox'), after.asked.count('ListPodSandbox')), (1, 1))

    def test_setting_that_cannot_be_read_is_a_failure_of_its_own(self):
        """As of a broken disk."""
        FakeRuntime(self, f'{self.directory}/run/containerd/containerd.sock')
        self.write({'var/lib/kubelet/none': ''})
        os.symlink('config.yaml', f'{self.directory}/var/lib/kubelet/config.yaml')
        self.endpoint = None
        part = self.cycle()
        self.assertEqual((1, ['container runtime: config.yaml']), (len(part.pods), [*part.failures]))

    def test_what_cannot_be_understood_starts_this_side_afresh(self):
        runtime, update_pods = FakeRuntime(self), agent.update_pods
        options, stats = agent.parse_options(['--cri-socket', self.socket], {}), agent.AgentStats()
        state = agent.State(1)
        self.addCleanup(lambda: agent.forget_runtime(state.runtime))
        for failed in False, True, False:
            before = state.runtime
            connected = before.runtime
            self.patch(update_pods=mock.Mock(side_effect=ValueError('odd') if failed else update_pods))
            metrics, failures = agent.collect_snapshot(self.write({}), options, state, stats)
            self.assertEqual((failed, not failed, failed), (
                'odd' in failures.get('container runtime', ''),
                metrics.node_metrics.HasField('container_runtime'), state.runtime is not before))
            if failed:
                self.assertRaises(ValueError, agent.cri_method(connected, 'Version'), b'')
        self.assertEqual(2, runtime.asked.count('Version'))


class RuntimeAwayTest(KernelCase):
    """The pods are those that it listed last, with what the kernel says of them now."""

    def setUp(self):
        super().setUp()
        self.runtime = self.start()
        self.listed = self.cycle()
        self.runtime.close()

    def shown(self, later=0):
        """When the runtime has listed what a cycle shows; of each pod the containers, and their CPU time in µs."""
        part = self.cycle(later=later)
        self.assertEqual(['container runtime'], [*part.failures])
        return part.runtime.listed_at_ns, *(
            {found.id: found.cpu_metrics.usage_core_nano_seconds.value // 1000 for found in pod.container_metrics}
            for pod in part.pods)

    def test_numbers_are_fresh_and_a_container_or_pod_whose_group_has_gone_is_left_out(self):
        self.groups[APP], listed_at_ns = group(2000, 600), self.listed.runtime.listed_at_ns
        self.write_groups()
        self.assertEqual((listed_at_ns, {APP: 2000, SIDE: 1000}), self.shown())
        self.remove_group(SIDE)
        for _ in range(2):
            self.assertEqual((listed_at_ns, {APP: 2000}), self.shown())
        take_away(f'{self.directory}/sys/fs/cgroup/kubepods/pod{UID}')
        self.assertEqual((listed_at_ns,), self.shown())

    def test_pods_go_after_a_while_and_are_back_with_the_runtime(self):
        self.assertEqual((self.listed.runtime.listed_at_ns, {APP: 1000, SIDE: 1000}),
                         self.shown(agent.LIST_VALID_SECONDS - 1))
        self.assertEqual((0,), self.shown(1))
        self.start()
        part = self.cycle()
        self.assertEqual(({}, 1), (part.failures, len(part.pods)))
        self.assertGreater(part.runtime.listed_at_ns, self.listed.runtime.listed_at_ns)


# --- each file, each number

# By the path of a file in a tree what may come from it: fields of the snapshot, dotted, without the keys of lists.
CONTAINER_GROUP, POD_GROUP = rf'sys/fs/cgroup/kubepods/pod{UID}/{APP}', rf'sys/fs/cgroup/kubepods/pod{UID}'
CONTAINER_FIELDS = r'pod_metrics\.container_metrics\.'
OWN_FIELDS = {
    'proc/stat': 'cpu_infos.*|cpu_seconds.*|stat.*|boot_time',
    'proc/cpuinfo|sys/devices/system/cpu/.*': r'cpu_infos\.(model|vendor_id|mhz|cores|physical_id|core_id)',
    'proc/loadavg': 'load_average.*',
    'proc/meminfo': r'(total|available|used)_memory|memory_used_perc|meminfo.*',
    'proc/vmstat': 'vmstat.*',
    'proc/schedstat': r'cpu_infos\.(run_ns|wait_ns|timeslices)',
    'proc/pressure/(.*)': r'psi_\1_metrics.*',
    r'proc/\d+/(statm|comm)': 'processes_mem_info.*',
    'proc/1/mountinfo': 'disk_usages.*',
    'proc/diskstats': 'diskstats.*|disk_io_summary.*',
    # Whether the pod has a network of its own is told by the two files.
    'proc/1/net/dev': r'net_usage.*|network_interfaces.*|pod_metrics\.(network_interfaces.*|host_network)',
    'proc/77/net/dev': r'pod_metrics\.(network_interfaces.*|host_network)',
    'sys/class/net/.*/speed': r'network_interfaces\.speed_mbits',
    'sys/class/net/.*/address': r'network_interfaces\.hardwareAddr',
    'sys/class/net/.*/ifindex': r'network_interfaces\.index',
    'sys/class/net/.*/(mtu|flags|operstate|carrier)': r'network_interfaces\.\1',
    'proc/1/net/(ipv6_)?route|etc/crictl.yaml|etc/lsb-release': '',
    'proc/1/net/(snmp|snmp6|netstat|sockstat|sockstat6|softnet_stat)': r'\1\..*|\1',
    'proc/1/net/arp': 'arp_entries.*',
    'proc/1/net/tcp': 'tcp_states.*',
    'proc/1/net/udp': 'udp_queues.*',
    'proc/1/net/rpc/nfs': 'nfs.*',
    'sys/class/net/.*/statistics/rx_nohandler': r'network_interfaces\.rx_nohandler',
    'proc/sys/fs/file-nr': r'kernel_limits\.file_nr_.*',
    'proc/sys/kernel/(threads|pid).max': r'kernel_limits\.\1_max',
    'proc/sys/kernel/(random/)?(entropy_avail|poolsize|hung_task_detect_count)': r'kernel_limits\.\2',
    'proc/sys/net/netfilter/(.*)': r'kernel_limits\.\1',
    'proc/sys/kernel/hostname': 'hostname',
    'proc/sys/kernel/osrelease': 'kernel_version',
    'proc/sys/kernel/arch': 'kernel_arch',
    'proc/sys/kernel/random/boot_id|etc/machine-id|sys/class/dmi/id/product_uuid': 'host_id|clock.*',
    'proc/uptime': 'uptime',
    'etc/os-release|etc/debian_version': 'platform.*|os_release.*',
    r'sys/fs/cgroup/(cpu|memory|io|pids|cgroup)\..*': r'cgroup\.\1.*',
    r'sys/fs/cgroup/system.slice/kubelet.service/(cpu|memory|io|pids|cgroup)\..*': r'services\.cgroup\.\1.*',
    # The first process of a container tells where its pod's network is; what a group of a sandbox has is nobody's.
    r'sys/fs/cgroup/kubepods/.*/(b2){32}/cgroup\.procs': r'pod_metrics\.(network_interfaces.*|host_network)',
    r'sys/fs/cgroup/kubepods/.*/cgroup\.procs': (
        r'pod_metrics\.(network_interfaces.*|host_network|container_metrics\.cgroup\.cgroup.*|cgroup\.cgroup.*)'),
    CONTAINER_GROUP + r'/cpu\..*': CONTAINER_FIELDS + r'(cgroup\.cpu|cpu_metrics).*',
    CONTAINER_GROUP + r'/memory\.swap\..*': CONTAINER_FIELDS + r'(cgroup\.memory\.swap|swap_metrics).*',
    CONTAINER_GROUP + r'/memory\..*': CONTAINER_FIELDS + r'(cgroup\.memory|memory_metrics).*',
    CONTAINER_GROUP + r'/(io|pids)\..*': CONTAINER_FIELDS + r'cgroup\.\1.*',
    POD_GROUP + r'/(cpu|memory|io|pids)\..*': r'pod_metrics\.cgroup\.\1.*'}
# What differs from reading to reading, and the numbers of this machine's file system.
RESTLESS = re.compile(r'.*timestamp(_ns)?|.*listed_at_ns|disk_usages\.(total|used|free|used_percent|'
                      r'bytes_free|inodes(_free)?)')
NO_NUMBER = re.compile(r'-.*|nan|inf.*|\d{19,}', re.IGNORECASE)
# Sets of the paths that are opened meanwhile. An audit hook stays for good.
OPENED = []
sys.addaudithook(lambda event, arguments: [paths.add(arguments[0]) for paths in OPENED] if event == 'open' else None)


def flat(document, path=()):
    """A JSON document by path; what is in a list is known by its name, number or id, if it has one."""
    if isinstance(document, dict):
        return {key: value for name, part in document.items() for key, value in flat(part, (*path, name)).items()}
    if isinstance(document, list) and all(isinstance(item, dict) for item in document):
        names = ('id', 'name', 'device', 'mountpoint', 'pid', 'cpu')
        return {key: value for item in document for key, value in flat(
            item, (*path, f'={next((item[name] for name in names if name in item), None)}')).items()}
    return {path: document}


def field_of(path):
    return '.'.join(part for part in path if not part.startswith('='))


class EachFileTest(KernelCase):
    """Of a node with a pod, each file that a snapshot opens is broken, one at a time."""

    def setUp(self):
        super().setUp()
        self.write({
            **NODE, **V2, 'proc/77/net/dev': NET_DEV, 'etc/crictl.yaml': '\n', 'etc/lsb-release': '\n',
            'sys/class/dmi/id/product_uuid': 'd249c048-6159-f805-57ce-12d99828162b\n',
            'proc/1/net/snmp6': 'Ip6InReceives 5\nUdp6InDatagrams 6\n', 'proc/1/net/sockstat6': 'TCP6: inuse 2\n',
            'sys/class/net/enp0s3/carrier': '1\n', 'sys/class/net/enp0s3/speed': '1000\n',
            **below('sys/fs/cgroup/system.slice/kubelet.service', GROUP_V2),
            **{path: text for name in ('', APP) for path, text in below(
                f'sys/fs/cgroup/kubepods/pod{UID}/{name}'.rstrip('/'), GROUP_V2).items()},
            **{f'sys/fs/cgroup/kubepods/pod{UID}/{name}/cgroup.procs': '77\n' for name in (POD, APP)}})
        FakeRuntime(self, **{'ListPodSandbox': list_pods(sandbox(POD, uid=UID)),
                             'ListContainers': list_containers(container(APP, POD))})
        self.node_state = agent.NodeState(10)
        self.whole = self.fields()[0]

    def fields(self):
        """What a snapshot says of a node that was never seen, by path; and what has failed."""
        helper, runtime = self.node_state.helper, self.state.runtime
        self.node_state, self.state = agent.NodeState(10), agent.RuntimeState()
        self.node_state.helper, self.state.runtime = helper, runtime
        self.addCleanup(agent.forget_runtime, self.state)
        options = argparse.Namespace(cri_socket=self.socket, cri_socket_uid=0, container_stats='cgroup',
                                     fs_stats_interval=60, kubelet_root=None)
        metrics, cycle = wire.Metrics(), agent.Cycle(self.write({}), 60, {})
        agent.collect_node(metrics.node_metrics, self.node_state, cycle)
        agent.collect_pods(metrics, options, self.state, cycle)
        document = json.loads(agent.render_json(metrics))
        return flat({**document['node_metrics'], 'pod_metrics': document['pod_metrics']}), cycle.failures

    def files(self):
        """The files that a snapshot opens, and a pattern of the fields that each may cost."""
        opened = set()
        OPENED.append(opened)
        self.fields()
        OPENED.remove(opened)
        for path in sorted(path for path in opened if isinstance(path, str) and os.path.isfile(path)):
            file = os.path.relpath(path, self.directory)
            if not file.startswith('../'):
                match, own = next((re.fullmatch(pattern, file), own) for pattern, own in OWN_FIELDS.items()
                                  if re.fullmatch(pattern, file))
                yield path, match.expand(own)

    def check(self, path, what, own, change):
        """The file is changed, read, and put back: nothing differs but its own fields, and no number is none."""
        with open(path, 'rb') as file:
            content = file.read()
        os.remove(path)
        change(content)
        fields, failures = self.fields()
        if os.path.lexists(path):
            os.remove(path)
        write_tree('/', {path: content})
        with self.subTest(os.path.relpath(path, self.directory), what=what):
            different = {field_of(name) for name in self.whole.keys() | fields.keys()
                         if self.whole.get(name, ()) != fields.get(name, ())}
            self.assertEqual(set(), {name for name in different
                                     if not RESTLESS.fullmatch(name) and not re.fullmatch(own, name)})
            numbers = (str(value) for name, value in fields.items()
                       if self.whole.get(name) != value and not field_of(name).startswith(('platform', 'os_release')))
            self.assertEqual([], [number for number in numbers if re.fullmatch(r'-?[\d.e+]+|nan|inf', number)
                                  and NO_NUMBER.fullmatch(number) and not number.startswith('179')])
        return failures

    def test_file_that_is_malformed_fails_is_absent_or_is_empty_costs_its_own_fields(self):
        count = 0
        for path, own in self.files():
            # What may be any text is not malformed.
            any_text = re.search('comm$|etc/|hostname|osrelease|arch$|boot_id|uuid|address|operstate|'
                                 f'schedstat$|nfs$|{POD}/cgroup.procs$', path)
            failures = self.check(path, 'malformed', own, lambda content: write_tree('/', {path: b'x y\xff z\nx\n'}))
            self.assertEqual(bool(any_text), not failures, path)
            failures = self.check(path, 'a loop', own, lambda content: os.symlink(path, path))
            self.assertEqual({os.path.basename(path)}, {name.rpartition(': ')[2] for name in failures})
            self.check(path, 'absent', own, lambda content: None)
            self.check(path, 'empty', own, lambda content: write_tree('/', {path: b''}))
            self.assertEqual({}, self.check(path, 'a blank line', own, lambda content: write_tree(
                '/', {path: content if re.search('comm$|statm$', path) else content + b'\n'})))
            count += 1
        self.assertLess(80, count)

    def test_number_that_is_none_costs_its_own_fields(self):
        numbers = re.compile(rb'(?<![\w.:/-])\d+(\.\d+)?(?![\w.:/])')
        for path, own in self.files():
            for number in b'-1', b'18446744073709551615', b'9223372036854775808', b'nan', b'1_0':
                self.check(path, number, own, lambda content: write_tree('/', {path: numbers.sub(number, content)}))


# --- stock dashboards

# What the dashboards and rules of node_exporter's and Kubernetes' mixins and the dashboard 1860 of grafana.com ask for
# by name, without what their own rules record.
ASKED = '''
container_cpu_cfs_periods_total container_cpu_cfs_throttled_periods_total container_cpu_usage_seconds_total
container_fs_reads_bytes_total container_fs_reads_total container_fs_writes_bytes_total container_fs_writes_total
container_memory_cache container_memory_rss container_memory_swap container_memory_working_set_bytes
container_network_receive_bytes_total container_network_receive_packets_dropped_total
container_network_receive_packets_total container_network_transmit_bytes_total
container_network_transmit_packets_dropped_total container_network_transmit_packets_total node_arp_entries
node_bonding_active node_bonding_slaves node_boot_time_seconds node_context_switches_total node_cooling_device_cur_state
node_cooling_device_max_state node_cpu_guest_seconds_total node_cpu_scaling_frequency_hertz
node_cpu_scaling_frequency_max_hertz node_cpu_scaling_frequency_min_hertz node_cpu_seconds_total
node_disk_discard_time_seconds_total node_disk_discarded_sectors_total node_disk_discards_completed_total
node_disk_discards_merged_total node_disk_flush_requests_time_seconds_total node_disk_flush_requests_total
node_disk_io_now node_disk_io_time_seconds_total node_disk_io_time_weighted_seconds_total node_disk_read_bytes_total
node_disk_read_time_seconds_total node_disk_reads_completed_total node_disk_reads_merged_total
node_disk_write_time_seconds_total node_disk_writes_completed_total node_disk_writes_merged_total
node_disk_written_bytes_total node_entropy_available_bits node_entropy_pool_size_bits node_exporter_build_info
node_filefd_allocated node_filefd_maximum node_filesystem_avail_bytes node_filesystem_device_error node_filesystem_files
node_filesystem_files_free node_filesystem_free_bytes node_filesystem_readonly node_filesystem_size_bytes
node_forks_total node_hwmon_chip_names node_hwmon_fan_min_rpm node_hwmon_fan_rpm node_hwmon_temp_celsius
node_hwmon_temp_crit_alarm_celsius node_hwmon_temp_crit_celsius node_hwmon_temp_crit_hyst_celsius
node_hwmon_temp_max_celsius node_interrupts_total node_intr_total node_kernel_hung_tasks_total node_load1 node_load15
node_load5 node_md_disks node_md_disks_required node_memory_Active_anon_bytes node_memory_Active_bytes
node_memory_Active_file_bytes node_memory_AnonHugePages_bytes node_memory_AnonPages_bytes node_memory_Buffers_bytes
node_memory_Cached_bytes node_memory_CommitLimit_bytes node_memory_Committed_AS_bytes node_memory_DirectMap1G_bytes
node_memory_DirectMap2M_bytes node_memory_DirectMap4k_bytes node_memory_Dirty_bytes node_memory_HardwareCorrupted_bytes
node_memory_HugePages_Free node_memory_HugePages_Rsvd node_memory_HugePages_Surp node_memory_HugePages_Total
node_memory_Hugepagesize_bytes node_memory_Inactive_anon_bytes node_memory_Inactive_bytes
node_memory_Inactive_file_bytes node_memory_KernelStack_bytes node_memory_Mapped_bytes node_memory_MemAvailable_bytes
node_memory_MemFree_bytes node_memory_MemTotal_bytes node_memory_Mlocked_bytes node_memory_NFS_Unstable_bytes
node_memory_PageTables_bytes node_memory_Percpu_bytes node_memory_SReclaimable_bytes node_memory_SUnreclaim_bytes
node_memory_ShmemHugePages_bytes node_memory_ShmemPmdMapped_bytes node_memory_Shmem_bytes node_memory_Slab_bytes
node_memory_SwapCached_bytes node_memory_SwapFree_bytes node_memory_SwapTotal_bytes node_memory_Unevictable_bytes
node_memory_VmallocChunk_bytes node_memory_VmallocTotal_bytes node_memory_VmallocUsed_bytes
node_memory_WritebackTmp_bytes node_memory_Writeback_bytes node_memory_Zswap_bytes node_memory_Zswapped_bytes
node_netstat_Icmp_InErrors node_netstat_Icmp_InMsgs node_netstat_Icmp_OutMsgs node_netstat_IpExt_InOctets
node_netstat_IpExt_OutOctets node_netstat_TcpExt_ListenDrops node_netstat_TcpExt_ListenOverflows
node_netstat_TcpExt_SyncookiesFailed node_netstat_TcpExt_SyncookiesRecv node_netstat_TcpExt_SyncookiesSent
node_netstat_TcpExt_TCPOFOQueue node_netstat_TcpExt_TCPRcvQDrop node_netstat_TcpExt_TCPSynRetrans
node_netstat_TcpExt_TCPTimeouts node_netstat_Tcp_ActiveOpens node_netstat_Tcp_CurrEstab node_netstat_Tcp_InErrs
node_netstat_Tcp_InSegs node_netstat_Tcp_MaxConn node_netstat_Tcp_OutRsts node_netstat_Tcp_OutSegs
node_netstat_Tcp_PassiveOpens node_netstat_Tcp_RetransSegs node_netstat_UdpLite_InErrors node_netstat_Udp_InDatagrams
node_netstat_Udp_InErrors node_netstat_Udp_NoPorts node_netstat_Udp_OutDatagrams node_netstat_Udp_RcvbufErrors
node_netstat_Udp_SndbufErrors node_network_carrier node_network_mtu_bytes node_network_receive_bytes_total
node_network_receive_compressed_total node_network_receive_drop_total node_network_receive_errs_total
node_network_receive_fifo_total node_network_receive_frame_total node_network_receive_multicast_total
node_network_receive_nohandler_total node_network_receive_packets_total node_network_speed_bytes
node_network_transmit_bytes_total node_network_transmit_carrier_total node_network_transmit_colls_total
node_network_transmit_compressed_total node_network_transmit_drop_total node_network_transmit_errs_total
node_network_transmit_fifo_total node_network_transmit_packets_total node_network_up node_nf_conntrack_entries
node_nf_conntrack_entries_limit node_power_supply_online node_pressure_cpu_waiting_seconds_total
node_pressure_io_stalled_seconds_total node_pressure_io_waiting_seconds_total node_pressure_irq_stalled_seconds_total
node_pressure_memory_stalled_seconds_total node_pressure_memory_waiting_seconds_total node_processes_max_processes
node_processes_max_threads node_processes_pids node_processes_state node_processes_threads node_procs_blocked
node_procs_running node_schedstat_running_seconds_total node_schedstat_timeslices_total
node_schedstat_waiting_seconds_total node_scrape_collector_duration_seconds node_scrape_collector_success
node_sockstat_FRAG_inuse node_sockstat_FRAG_memory node_sockstat_RAW_inuse node_sockstat_TCP_alloc
node_sockstat_TCP_inuse node_sockstat_TCP_mem node_sockstat_TCP_mem_bytes node_sockstat_TCP_orphan node_sockstat_TCP_tw
node_sockstat_UDPLITE_inuse node_sockstat_UDP_inuse node_sockstat_UDP_mem node_sockstat_UDP_mem_bytes
node_sockstat_sockets_used node_softnet_dropped_total node_softnet_flow_limit_count_total node_softnet_processed_total
node_softnet_received_rps_total node_softnet_times_squeezed_total node_systemd_service_restart_total
node_systemd_socket_accepted_connections_total node_systemd_socket_current_connections
node_systemd_socket_refused_connections_total node_systemd_unit_state node_systemd_units node_tcp_connection_states
node_textfile_scrape_error node_time_seconds node_timex_estimated_error_seconds node_timex_frequency_adjustment_ratio
node_timex_loop_time_constant node_timex_maxerror_seconds node_timex_offset_seconds node_timex_pps_calibration_total
node_timex_pps_error_total node_timex_pps_frequency_hertz node_timex_pps_jitter_seconds node_timex_pps_jitter_total
node_timex_pps_shift_seconds node_timex_pps_stability_exceeded_total node_timex_pps_stability_hertz
node_timex_sync_status node_timex_tai_offset_seconds node_timex_tick_seconds node_udp_queues node_uname_info
node_vmstat_oom_kill node_vmstat_pgfault node_vmstat_pgmajfault node_vmstat_pgpgin node_vmstat_pgpgout
node_vmstat_pswpin node_vmstat_pswpout process_cpu_seconds_total process_max_fds process_open_fds
process_virtual_memory_bytes process_virtual_memory_max_bytes
'''.split()
# Those that are not there.
NOT_THERE = {
    # systemd tells these over D-Bus; node_exporter leaves them out by default.
    *'''node_systemd_service_restart_total node_systemd_socket_accepted_connections_total
        node_systemd_socket_current_connections node_systemd_socket_refused_connections_total node_systemd_unit_state
        node_systemd_units'''.split(),
    # A file of each process; a line of each interrupt with a column of each CPU. Neither is read.
    'node_processes_state', 'node_interrupts_total'}
# Of the kernel's files all names, of netstat some; kernel 6.12, Debian 13, x86_64, and Zswap.
MEMINFO_NAMES = '''
MemTotal MemFree MemAvailable Buffers Cached SwapCached Active Inactive Active(anon) Inactive(anon) Active(file)
Inactive(file) Unevictable Mlocked SwapTotal SwapFree Zswap Zswapped Dirty Writeback AnonPages Mapped Shmem KReclaimable
Slab SReclaimable SUnreclaim KernelStack PageTables SecPageTables NFS_Unstable Bounce WritebackTmp CommitLimit
Committed_AS VmallocTotal VmallocUsed VmallocChunk Percpu HardwareCorrupted AnonHugePages ShmemHugePages ShmemPmdMapped
FileHugePages FilePmdMapped Unaccepted HugePages_Total HugePages_Free HugePages_Rsvd HugePages_Surp Hugepagesize Hugetlb
DirectMap4k DirectMap2M DirectMap1G
'''.split()
UDP_NAMES = 'InDatagrams NoPorts InErrors OutDatagrams RcvbufErrors SndbufErrors InCsumErrors IgnoredMulti MemErrors'
SNMP_NAMES = {
    'Ip': 'Forwarding DefaultTTL InReceives InHdrErrors InAddrErrors ForwDatagrams InUnknownProtos InDiscards '
          'InDelivers OutRequests OutDiscards OutNoRoutes ReasmTimeout ReasmReqds ReasmOKs ReasmFails FragOKs',
    'Icmp': 'InMsgs InErrors InCsumErrors InDestUnreachs InTimeExcds InEchos InEchoReps OutMsgs OutErrors OutEchos',
    'Tcp': 'RtoAlgorithm RtoMin RtoMax MaxConn ActiveOpens PassiveOpens AttemptFails EstabResets CurrEstab InSegs '
           'OutSegs RetransSegs InErrs OutRsts InCsumErrors', 'Udp': UDP_NAMES, 'UdpLite': UDP_NAMES}
NETSTAT_NAMES = {
    'TcpExt': 'SyncookiesSent SyncookiesRecv SyncookiesFailed EmbryonicRsts TW DelayedACKs ListenOverflows ListenDrops '
              'TCPTimeouts TCPBacklogDrop TCPOFOQueue TCPSynRetrans TCPOrigDataSent TCPRcvQDrop',
    'IpExt': 'InNoRoutes InOctets OutOctets InMcastOctets'}


def two_lines(names):
    """As in snmp, of each protocol a line of names and one of numbers, which count; MaxConn has no limit."""
    text, count = '', itertools.count(1)
    for protocol, words in names.items():
        numbers = ' '.join('-1' if word == 'MaxConn' else str(next(count)) for word in words.split())
        text += f'{protocol}: {words}\n{protocol}: {numbers}\n'
    return text


# A node of two CPUs with the hardware; of each file all that dashboards ask for.
STOCK_NODE = {
    **NODE, **HARDWARE, 'proc/stat': STAT, 'proc/cpuinfo': CPUINFO_X86,
    'proc/meminfo': ''.join(f'{name}: {number}{"" if name.startswith("HugePages_") else " kB"}\n'
                            for number, name in enumerate(MEMINFO_NAMES, 101)).replace('MemTotal: ', 'MemTotal: 9'),
    'proc/vmstat': counting_lines('nr_free_pages pgpgin pgpgout pswpin pswpout pgfault pgmajfault oom_kill'),
    'proc/pressure/io': 'some avg10=1.0 avg60=2.0 avg300=3.0 total=4\nfull avg10=5.0 avg60=6.0 avg300=7.0 total=8\n',
    'proc/1/net/snmp': two_lines(SNMP_NAMES), 'proc/1/net/netstat': two_lines(NETSTAT_NAMES),
    'proc/1/net/snmp6': counting_lines('Ip6InReceives Icmp6InMsgs Icmp6OutMsgs Udp6InErrors'),
    'proc/1/net/sockstat6': 'TCP6: inuse 2\nUDP6: inuse 3\nRAW6: inuse 1\nFRAG6: inuse 0 memory 0\n',
    'proc/sys/kernel/random/boot_id': read_text('/proc/sys/kernel/random/boot_id'),
    'proc/1/net/tcp6': TCP, 'proc/1/net/udp6': UDP.replace('07 00000000:00000000', '07 00000003:0000000A'),
    'proc/77/net/dev': NET_DEV.replace('enp0s3', '  eth0'), 'sys/class/net/enp0s3/speed': '1000\n',
    'sys/devices/system/cpu/cpu1/topology/physical_package_id': '0\n',
    'sys/devices/system/cpu/cpu1/topology/core_id': '1\n',
    **V2, **below('sys/fs/cgroup', {name: GROUP_V2[name] for name in (
        'cpu.stat', 'memory.stat', 'io.stat', 'cpu.pressure', 'memory.pressure', 'io.pressure', 'cgroup.procs')}),
    **below('sys/fs/cgroup/system.slice/kubelet.service', GROUP_V2)}


class Labels(Dict[str, str]):
    """Of a sample. What says nothing is as good as absent."""

    def __hash__(self):
        return hash(frozenset(self.items()))


def samples_of(text):
    """By name and labels the values of an exposition; there is none twice."""
    samples = collections.defaultdict(dict)
    for line in text.splitlines():
        if line[:1] != '#':
            name, labels, number = re.fullmatch(r'(\w+)(?:\{(.*)\})? (\S+)', line).groups()
            labels = Labels(re.findall(r'(\w+)="((?:[^"\\]|\\.)+)"', labels or ''))
            if labels in samples[name]:
                raise ValueError(f'twice: {line}')
            samples[name][labels] = float(number)
    return dict(samples)


class StockCase(KernelCase):
    """A node with the hardware, and a pod of two containers."""

    def setUp(self):
        super().setUp()
        self.groups = {name: {**GROUP_V2, 'cpu.weight': '100\n', 'memory.current': '50\n', 'cgroup.procs': '77\n'}
                       for name in (POD, APP, SIDE)}
        self.write(STOCK_NODE)
        self.snapshots, self.agent = agent.State(10), agent.AgentStats()
        self.snapshots.runtime = self.state

    def start(self, **answers):
        self.patch(read_timex=lambda: timex(**{name: number for number, name in enumerate(TIMEX, 1)}))
        writable = dict(writable_layer=cri.FilesystemUsage(
            timestamp=1, fs_id={'mountpoint': '/data/x'}, used_bytes=value(14)))
        return super().start(**{
            'ListContainers': list_containers(*(container(name, POD, image=f'registry/{name[:2]}:1')
                                                for name in (APP, SIDE))),
            'ListContainerStats': list_stats(*(
                stats(name, 10**9, 5_000_000_000, memory=memory_stats(range(1, 7)), **writable)
                for name in (APP, SIDE))),
            'ContainerStatus': status_of(state=cri.CONTAINER_RUNNING, started_at=10**18), **answers})

    def snapshot(self, roots=None, source='cgroup'):
        """One in which the layers are known."""
        options = agent.parse_options(['--cri-socket', self.socket, '--container-stats', source], {})
        self.failures = {}

        def taken():
            metrics, self.failures = agent.collect_snapshot(
                roots or self.write({}), options, self.snapshots, self.agent)
            layers = [container.HasField('file_system_metrics') for pod in metrics.pod_metrics
                      for container in pod.container_metrics]
            return metrics if all(layers) else None

        return wait_for('the layers', taken)

    def parts(self, **arguments):
        """The samples of both paths."""
        metrics = self.snapshot(**arguments)
        return [samples_of(agent.render_part(metrics, part, False)) for part in (agent.NODE, agent.CADVISOR)]


class StockTest(StockCase):
    def test_names_that_dashboards_ask_for_are_there_but_for_these(self):
        self.start()
        node, containers = self.parts()
        self.assertEqual({}, self.failures)
        self.assertEqual(NOT_THERE, {*ASKED} - node.keys() - containers.keys())
        self.assertEqual(set(), node.keys() & containers.keys())

    def test_promtool_has_nothing_to_say_of_all_of_them(self):
        self.start()
        metrics = self.snapshot()
        for part in agent.NODE, agent.CADVISOR:
            self.assertEqual([], self.complaints(agent.render_part(metrics, part, False)))

    def test_container_pod_service_and_root_have_cadvisors_labels(self):
        """https://github.com/google/cadvisor/blob/master/docs/storage/prometheus.md; those of the kubelet's."""
        self.start()
        _, containers = self.parts()
        usage = containers['container_cpu_usage_seconds_total']
        pod = {'id': f'/kubepods/pod{UID}', 'namespace': 'default', 'pod': f'{POD}-name'}
        of_containers = [{**pod, 'id': f'{pod["id"]}/{name}', 'container': f'{name}-name', 'name': name,
                          'image': f'registry/{name[:2]}:1'} for name in (APP, SIDE)]
        others = {'id': '/'}, {'id': '/system.slice/kubelet.service'}
        self.assertEqual({Labels(labels, cpu='total') for labels in (pod, *of_containers, *others)}, {*usage})
        self.assertEqual([1e-6, 1e-6, 0.002001], [usage[Labels(labels, cpu='total')]
                                                  for labels in (others[0], of_containers[0], pod)])
        # Whatever else a series has: a container has all of these, and nothing else has one of them.
        for name, samples in containers.items():
            for labels in samples if name.startswith('container_') else ():
                with self.subTest(name, labels=labels):
                    if 'interface' in labels:
                        self.assertEqual({'interface', 'namespace', 'pod'}, {*labels})
                        continue
                    if name == 'container_oom_events_total':
                        # Nothing that a restart changes.
                        self.assertIn({*labels}, ({'container', 'namespace', 'pod'}, {'id'}))
                        continue
                    whole = next(whole for whole in (*of_containers, pod, *others) if whole.items() <= labels.items())
                    self.assertLessEqual({*labels} - {*whole}, {'cpu', 'device', 'failure_type', 'scope'})

    def test_devices_have_the_names_that_dashboards_match(self):
        self.start()
        node, containers = self.parts()
        match = re.compile('(/dev/)?(mmcblk.p.+|nvme.+|rbd.+|sd.+|vd.+|xvd.+|dm-.+|md.+|dasd.+)')
        for name, number in (('reads_bytes', 629145600), ('writes_bytes', 629145600), ('reads', 688), ('writes', 903)):
            samples = {labels['device']: value for labels, value in containers[f'container_fs_{name}_total'].items()
                       if labels.get('name') == APP}
            # 8:16 is no disk of /proc/diskstats.
            self.assertEqual(({'/dev/vda', '8:16'}, number), ({*samples}, samples['/dev/vda']))
            self.assertTrue(match.fullmatch('/dev/vda'))
        disk, = {labels['device'] for labels in containers['container_fs_usage_bytes']}
        self.assertIn(disk, {labels['device'] for labels in node['node_filesystem_size_bytes']})
        for name, of_node in (('limit_bytes', 'size_bytes'), ('inodes_total', 'files'), ('inodes_free', 'files_free')):
            self.assertEqual({*containers[f'container_fs_{name}'].values()}, {
                value for labels, value in node[f'node_filesystem_{of_node}'].items() if labels['device'] == disk})

    def test_shares_are_those_of_v1(self):
        """kubelet: weight = 1 + (shares - 2) * 9999 / 262142."""
        self.check_table(agent.shares_of, [(1, 2), (39, 998), (100, 2597), (10000, 262144)])
        for shares in 2, 102, 1024, 262144:
            self.assertAlmostEqual(shares, agent.shares_of(1 + (shares - 2) * 9999 // 262142), delta=27)
        self.start()
        _, containers = self.parts()
        self.assertEqual([2597, 2597], [value for labels, value in containers['container_spec_cpu_shares'].items()
                                        if 'name' in labels])

    def test_numbers_of_the_runtime_are_under_the_same_names(self):
        """They have no cgroup, and so no id."""
        self.start()
        _, containers = self.parts(source='cri')
        labels = {'container': f'{APP}-name', 'name': APP, 'image': 'registry/a1:1', 'namespace': 'default',
                  'pod': f'{POD}-name'}
        found = {name: value for name, samples in containers.items() for series, value in samples.items()
                 if series.get('name') == APP and labels.items() <= series.items() and 'id' not in series}
        self.assertEqual({'container_cpu_usage_seconds_total': 5.0, 'container_memory_working_set_bytes': 1,
                          'container_memory_usage_bytes': 3, 'container_memory_rss': 4, 'container_fs_usage_bytes': 14,
                          'container_start_time_seconds': 10**9}, {
            name: value for name, value in found.items()
            if not re.match('kubensage_|container_fs_(limit|inodes)|container_last_seen', name)})
        # Whoever asks for the root gets the root alone.
        self.assertEqual([], [(name, series) for name, samples in containers.items() for series in samples
                              if series.get('id') == '/' and 'name' in series])

    def test_container_that_was_restarted_or_has_ended_is_there_once(self):
        del self.groups[SIDE]
        self.start(ListContainers=list_containers(
            container(APP, POD), container('ended', POD, cri.CONTAINER_EXITED),
            *(cri.Container(id=f'old{number}', pod_sandbox_id=POD, state=cri.CONTAINER_EXITED, created_at=1,
                            metadata={'name': f'{APP}-name'}) for number in (1, 2))),
                   ContainerStatus=status_of(state=cri.CONTAINER_EXITED, started_at=10**18, exit_code=3),
                   ListContainerStats=list_stats(*(stats(name, 1, 2, writable_layer=layer(1, 2))
                                                   for name in (APP, 'ended', 'old1', 'old2'))))
        _, containers = self.parts()
        by_container = collections.defaultdict(set)
        for name, samples in containers.items():
            for labels in samples:
                if 'name' in labels and 'kind' not in labels:
                    by_container[labels['name']].add(name)
        self.assertEqual({APP, 'ended'}, by_container.keys())
        self.assertEqual(1, len([labels for labels in containers['container_memory_rss'] if 'name' in labels]))
        # It uses nothing and nobody sees it; what is known of its end stays.
        self.assertEqual({'kubensage_container_info', 'kubensage_container_exit_code', 'container_start_time_seconds'},
                         {name for name in by_container['ended'] if not name.startswith('container_fs_')})
        now = time.time()
        self.assertEqual([], [labels for labels, value in containers['container_last_seen'].items()
                              if not now - 60 < value < now + 60])

    def test_collector_has_success_but_where_a_file_of_its_is_malformed(self):
        self.start()
        self.write({'proc/diskstats': 'x\n', 'proc/vmstat': 'oom_kill\n'})
        node, _ = self.parts()
        self.assertEqual({*self.failures}, {'disk I/O: diskstats', 'memory: vmstat'})
        success, seconds = (
            {labels['collector']: value for labels, value in node[f'node_scrape_collector_{name}'].items()}
            for name in ('success', 'duration_seconds'))
        self.assertEqual(dict.fromkeys(agent.NODE_SUBJECTS, 1) | {'disk I/O': 0, 'memory': 0}, success)
        self.assertEqual(success.keys(), seconds.keys())
        self.assertTrue(all(0 < value < 5 for value in seconds.values()), seconds)


# --- beside node_exporter

# Names that node_exporter 1.5 serves and the agent does not.
THEIRS_ALONE = re.compile('|'.join((
    # Of netstat's 150 names the agent takes those that tell of trouble or of load.
    r'node_netstat_(TcpExt|IpExt|MPTcpExt)_\w+',
    # What an interface is: nobody asks; carriers that come and go show in node_network_up.
    'node_network_(address_assign_type|carrier_(up_|down_)?changes_total|device_id|dormant|flags|iface_id|iface_link|'
    'iface_link_mode|info|name_assign_type|net_dev_group|protocol_type|transmit_queue_length)',
    # -125000 where it is not known.
    'node_network_speed_bytes',
    # A file of each process and thread; a line of each CPU.
    r'node_processes_(state|threads_state)|node_nf_conntrack_stat_\w+',
    # What does not change and is in no expression.
    'node_(disk_info|os_version|power_supply_info|selinux_(enabled|config_mode|current_mode)|cpu_info|nvme_info)',
    r'node_time_(clocksource_(available|current)_info|zone_offset_seconds)',
    # Of an array, its disks are enough.
    r'node_md_(blocks(_synced)?|state)',
    # Other systems of files and networks, and what the CPU takes.
    r'node_(xfs|btrfs|zfs|bcache|infiniband|fibrechannel|ipvs|tape|rapl|nfs|nfsd)_\w+', r'promhttp_\w+')))
# What node_exporter asks the kernel for, or reads of this machine, whatever its --path.* say.
NOT_OF_A_TREE = re.compile(r'node_(uname|os|time|timex|network_(receive|transmit)|filesystem|processes|tcp)_\w+|'
                           'node_network_(up|carrier|mtu_bytes)')


class NodeExporterTest(StockCase):
    """Debian's prometheus-node-exporter, version 1.5, sees the same."""
    PROGRAM = 'prometheus-node-exporter'
    # The same disks and interfaces as ours, and what it leaves out by default.
    ARGUMENTS = ('--collector.netstat.fields=.*', '--collector.processes', '--collector.tcpstat',
                 '--no-collector.systemd', '--web.disable-exporter-metrics', '--collector.netdev.device-exclude=',
                 r'--collector.diskstats.device-exclude=^((z?ram|loop|fd|sr)\d+|(h|s|v|xv)d[a-z]+\d+|nvme\d+n\d+p\d+)$')
    # Their labels say more; their collectors have other names.
    OTHER_LABELS = re.compile('node_(exporter_build_info|scrape_collector_.*)')
    # Of the tree that both read: what the kernel has beside, without which node_exporter reads none of it.
    BESIDE = {
        'proc/stat': STAT.replace('softirq 123636 0 22132 8 7522', 'softirq 0 0 0 0 0 0 0 0 0 0 0'),
        'proc/mdstat': 'Personalities : [raid5]\nmd0 : active raid5 sda1[0] sdb1[1](W) sdc1[2](F) sdd1[3](S)\n'
                       '      2093056 blocks super 1.2 level 5, 512k chunk, algorithm 2 [3/2] [UU_]\n\n'
                       'unused devices: <none>\n',
        'sys/class/net/bonding_masters': 'bond0\n',
        'sys/class/net/bond0/bonding/mode': 'balance-rr 0\n',
        'proc/net/stat/nf_conntrack': f'entries ...\n{"00000001 " * 17}\n',
        **{f'sys/devices/system/cpu/cpu{cpu}/cpufreq/related_cpus': '0 1\n' for cpu in (0, 1)},
        **{f'sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_setspeed': '<unsupported>\n' for cpu in (0, 1)}}
    # Values that a look changes, by how much at most.
    RESTLESS = {'node_procs_running': 20, 'node_procs_blocked': 20, 'node_filefd_allocated': 200,
                'node_entropy_available_bits': 256, 'node_time_seconds': 1, 'node_processes_pids': 20,
                'node_processes_threads': 50, 'node_sockstat_sockets_used': 20}

    def start_exporter(self, *arguments):
        """A connection to one that answers. It stays open: it is one of the sockets that both count."""
        self.tool(self.PROGRAM, '--version')
        with contextlib.closing(socket.socket()) as free:
            free.bind(('127.0.0.1', 0))
            address = free.getsockname()
        self.spawn([self.PROGRAM, '--web.listen-address={}:{}'.format(*address), *self.ARGUMENTS, *arguments],
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        connection = http.client.HTTPConnection(*address, timeout=PATIENCE_SECONDS)
        self.addCleanup(connection.close)

        def answers():
            with contextlib.suppress(OSError):
                connection.connect()
                return True

        wait_for(self.PROGRAM, answers)
        return connection

    def scrape(self, connection):
        connection.request('GET', '/metrics')
        return samples_of(connection.getresponse().read().decode())

    def check_names(self, ours, theirs, others=''):
        """Returned are those that both have, and mean the same by."""
        self.assertEqual([], sorted(name for name in theirs.keys() - ours.keys()
                                    if not (THEIRS_ALONE.fullmatch(name) or re.match(f'({others})$', name))))
        return {name for name in ours.keys() & theirs.keys()
                if not (self.OTHER_LABELS.fullmatch(name) or re.match(f'({others})$', name))}

    def test_of_a_tree_both_say_the_same(self):
        """But: serial numbers are not for every reader; errors of no known row are in the sum."""
        roots = self.write({**STOCK_NODE, **self.BESIDE, **{
            path.replace('/1/', '/'): text for path, text in STOCK_NODE.items() if path.startswith('proc/1/net/')}})
        theirs = self.scrape(self.start_exporter(f'--path.procfs={roots.procfs}', f'--path.sysfs={roots.sysfs}'))
        self.start()
        ours, _ = self.parts()
        names = {name for name in self.check_names(ours, theirs) if not NOT_OF_A_TREE.fullmatch(name)}
        for name in sorted(names):
            said = {Labels({key: label for key, label in labels.items() if key != 'product_serial'}): value
                    for labels, value in theirs[name].items() if labels.get('csrow') != 'unknown'}
            with self.subTest(name):
                self.assertEqual(said.keys(), ours[name].keys())
                for labels, value in said.items():
                    self.assertAlmostEqual(value, ours[name][labels], delta=1e-12 * abs(value), msg=labels)
        # Of each kind there was something to compare.
        self.assertEqual({name.split('_')[1] for name in names}, {
            *'arp bonding boot context cooling cpu disk dmi edac entropy filefd forks hwmon intr load1 load15 load5 md '
             'memory netstat network nf nfs power pressure procs schedstat sockstat softnet textfile thermal udp '
             'vmstat'.split()})
        self.assertLess(200, len(names))

    def test_of_this_machine_both_say_the_same(self):
        """What moves is between what node_exporter says before and after, at least now and then. Hardware is compared
        above; the agent knows the devices of file systems by the kernel's names."""
        def without_device(samples):
            return {name: {Labels({key: label for key, label in labels.items() if key != 'device'}): value
                           for labels, value in values.items()} if name.startswith('node_filesystem_') else values
                    for name, values in samples.items()}

        connection = self.start_exporter()
        # Of pods' interfaces and of file systems without storage the agent has none, and no queues of TCP.
        fewer, left = re.compile('node_(network|filesystem|disk)_.*|node_tcp_connection_states'), None
        for _ in range(50):
            self.snapshots.node.sockets_due = self.snapshots.node.hardware_due = 0.0
            before, ours, after = map(without_device, (
                self.scrape(connection), self.parts(roots=LIVE)[0], self.scrape(connection)))
            names, wrong = self.check_names(ours, before, r'node_(hwmon|power_supply|dmi|edac)_\w+'), set()
            for name in names & after.keys():
                known = before[name].keys() & after[name].keys()
                wrong |= {(name, labels) for labels in ours[name].keys() - before[name].keys() - after[name].keys()}
                wrong |= {(name, labels) for labels in known - ours[name].keys() if not fewer.fullmatch(name)}
                for labels in known & ours[name].keys():
                    low, high = sorted((before[name][labels], after[name][labels]))
                    slack = self.RESTLESS.get(name, 0) + 1e-12 * abs(high)
                    if not low - slack <= ours[name][labels] <= high + slack:
                        wrong.add((name, labels))
            left = wrong if left is None else left & wrong
            if not left:
                break
        self.assertEqual(set(), left, [(ours[name].get(labels), after[name].get(labels)) for name, labels in left])
        self.assertLess(200, len(names))


# --- snapshot

class SnapshotTest(Case):
    def setUp(self):
        super().setUp()
        self.roots = self.write({'proc/sys/kernel/hostname': 'node\n'})
        self.state, self.stats = agent.State(1), agent.AgentStats()

    def snapshot(self, seconds=5, backlog=None):
        """The snapshot; what has failed is in `failures`."""
        options = argparse.Namespace(main_loop_duration=seconds, top_n=1, cri_socket=self.socket, cri_socket_uid=0,
                                     container_stats='cri', fs_stats_interval=60, kubelet_root=None)
        metrics, self.failures = agent.collect_snapshot(self.roots, options, self.state, self.stats, backlog)
        if self.state.runtime.runtime:
            self.addCleanup(self.state.runtime.runtime.channel.close)
        return metrics

    def test_a_snapshot_has_the_node_the_pods_and_the_start_of_its_collection(self):
        """And stays as it was when the next one is taken."""
        FakeRuntime(self, ListContainerStats=[list_stats(stats('app', second * 10**9, second)) for second in (1, 2)])
        before = int(time.time())
        metrics = self.snapshot()
        self.assertTrue(before <= metrics.timestamp <= time.time())
        self.assertEqual((metrics.node_metrics.hostname, [pod.id for pod in metrics.pod_metrics]), ('node', ['pod']))
        copy = wire.Metrics.FromString(metrics.SerializeToString())
        self.assertNotEqual(self.snapshot().pod_metrics, copy.pod_metrics)
        self.assertEqual(metrics, copy)

    def check_delay(self):
        """Of a snapshot whose runtime is silent; the bound is less than any time-out but the share of the cycle."""
        start = time.monotonic()
        metrics = self.snapshot(0.5)
        self.assertLess(time.monotonic() - start, 3)
        self.assertEqual(metrics.node_metrics.hostname, 'node')
        self.assertTrue(self.failures)
        return metrics

    def test_a_hung_runtime_delays_the_node_no_longer_than_its_share_and_comes_back_on_one_connection(self):
        for method in ('Version', 'ListPodSandbox', 'ListContainers', 'ListContainerStats', 'ContainerStatus', 'Status',
                       'ImageFsInfo'):
            with self.subTest(method):
                self.socket = f'{self.directory}/run/{method}.sock'
                runtime = FakeRuntime(self)
                runtime.hanging.add(method)
                self.state = agent.State(1)
                self.check_delay()
                self.snapshot(0.2)
                runtime.release()
                metrics = self.snapshot()
                self.assertTrue(metrics.pod_metrics[0].container_metrics[0].HasField('cpu_metrics'))
                self.assertNotIn('container', ' '.join(self.failures))
                self.assertTrue(method == 'Version' or runtime.asked.count('Version') == 1)

    def test_a_runtime_that_does_not_even_accept_delays_the_node_no_longer_than_its_share(self):
        bound_socket(self, self.socket).listen()
        self.assertEqual(len(self.check_delay().pod_metrics), 0)
        os.unlink(self.socket)
        FakeRuntime(self)
        self.assertEqual(len(self.snapshot().pod_metrics), 1)

    def test_the_agent_tells_of_itself(self):
        """Also of what has not happened yet: every subject and every cause is there from the start, with 0."""
        FakeRuntime(self, ListContainerStats=grpc.StatusCode.UNKNOWN)
        self.write({'proc/meminfo': 'MemTotal'})
        backlog, before = agent.Backlog(600), time.time_ns()
        one = self.snapshot().agent_metrics
        agent.add_snapshot(backlog, b'12345')
        backlog.dropped['size'], backlog.connections, backlog.sent, backlog.acknowledged = 3, 5, 6, 7
        backlog.last_acknowledged = time.monotonic() - 60
        second = self.snapshot(backlog=backlog).agent_metrics
        self.assertTrue(before <= one.timestamp_ns < second.timestamp_ns <= time.time_ns())
        self.assertRegex(one.run_id, '^[0-9a-f]{16}$')
        self.assertNotEqual(agent.AgentStats().run_id, one.run_id)
        self.assertEqual((one.sequence, one.cycles_total, one.HasField('collection_seconds'), one.HasField('backlog')),
                         (1, 0, False, False))
        self.assertEqual((second.sequence, second.run_id, second.version, second.cycles_total,
                          second.skipped_ticks_total), (2, one.run_id, agent.__version__, 1, 0))
        self.assertLess({'bug', 'memory', 'addresses', *agent.RUNTIME_SUBJECTS}, set(one.failures_total))
        self.assertEqual(set(one.failures_total.values()), {0})
        self.assertEqual(dict(second.failures_total), {
            **one.failures_total, 'memory: meminfo': 1, 'container statistics': 1})
        self.assertTrue(0 < second.collection_seconds < 5 and 0 < second.uptime_seconds < 60)
        self.assertAlmostEqual(second.cpu_seconds_total, time.process_time(), delta=5)
        self.assertAlmostEqual(second.threads, len(os.listdir('/proc/self/task')), delta=3)
        self.assertAlmostEqual(second.open_files, len(os.listdir('/proc/self/fd')), delta=3)
        self.assertTrue(1 << 20 < second.resident_bytes < 1 << 30)
        self.assertEqual(['container statistics', 'memory: meminfo'], list(second.failing_subjects))
        self.assertEqual(agent.NODE_SUBJECTS.keys(), {*second.subject_seconds})
        self.assertTrue(0 < sum(second.subject_seconds.values()) < 5, second.subject_seconds)
        calls = second.cri_methods
        self.assertEqual({call.method: (call.calls_total, call.failures_total) for call in calls}, {
            'Version': (1, 0), 'ListPodSandbox': (2, 0), 'ListContainers': (2, 0), 'ListContainerStats': (4, 4),
            'ContainerStatus': (1, 0), 'Status': (1, 0), 'ImageFsInfo': (1, 0)})
        self.assertTrue(all(0 < call.last_seconds <= call.seconds_total for call in calls))
        queue = known_values(second.backlog)
        self.assertAlmostEqual(queue.pop('seconds_since_acknowledgement'), 60, delta=5)
        self.assertEqual(queue, {
            'snapshots': '1', 'memory_bytes': '5', 'sent_total': '6', 'acknowledged_total': '7',
            'reconnects_total': '4',
            'dropped_total': {'size': '3', 'retention': '0', 'too large': '0', 'damaged': '0', 'refused': '0'}})

    def test_numbers_of_the_process_are_those_of_its_own_proc(self):
        process = self.start('--main-loop-duration', '0.2', change=(
            'import resource; resource.setrlimit(resource.RLIMIT_AS, (1 << 36, resource.RLIM_INFINITY)); '
            'resource.setrlimit(resource.RLIMIT_NOFILE, (2000, 3000))'))
        ours = [process.next_snapshot() for _ in range(2)][1].agent_metrics
        status = dict(re.findall(r'^(\w+):\s+(\d+)', read_text(f'/proc/{process.pid}/status'), re.M))
        ticks = read_text(f'/proc/{process.pid}/stat').rpartition(')')[2].split()
        size, resident = (int(status[name]) << 10 for name in ('VmSize', 'VmRSS'))
        self.check_close((size, resident, int(status['Threads']),
                          (int(ticks[11]) + int(ticks[12])) / os.sysconf('SC_CLK_TCK'),
                          len(os.listdir(f'/proc/{process.pid}/fd'))),
                         (ours.virtual_bytes, ours.resident_bytes, ours.threads, ours.cpu_seconds_total,
                          ours.open_files), (1 << 27, 1 << 26, 10, 2, 20))
        self.assertLess(abs(size - ours.virtual_bytes), abs(resident - ours.virtual_bytes))
        self.assertLess(abs(resident - ours.resident_bytes), abs(size - ours.resident_bytes))
        limits = dict(re.findall(r'^Max (open files|address space) +(\d+)', read_text(f'/proc/{process.pid}/limits'),
                                 re.MULTILINE))
        self.assertEqual((int(limits['open files']), 1 << 36), (ours.max_open_files, ours.max_virtual_bytes))
        self.assertIn(ours.max_open_files, (2000, 3000))
        booted = int(re.search(r'btime (\d+)', read_text('/proc/stat'))[1])
        self.assertAlmostEqual(booted + int(ticks[19]) / os.sysconf('SC_CLK_TCK'), ours.start_time_seconds, delta=10)
        # Without a limit, what node_exporter says then: 2^64-1.
        self.assertEqual(resource.getrlimit(resource.RLIMIT_AS)[0] % 2**64,
                         self.snapshot().agent_metrics.max_virtual_bytes)

    def test_open_files_are_listed_once_a_minute(self):
        stats, seen = self.stats, []
        for due in 0.0, math.inf, 0.0:
            stats.open_files_due, message = due, wire.AgentMetrics()
            agent.collect_agent(message, stats, None, 1, agent.Cycle(LIVE, 5, {}))
            seen.append(message.open_files)
            self.addCleanup(os.close, os.open('/', os.O_RDONLY))
        self.assertEqual(seen, [seen[0], seen[0], seen[0] + 2])

    def test_clock_steps_change_nothing_but_the_timestamp(self):
        """A year back, then 30 years on: the snapshots come, the backlog keeps them, and their durations are real."""
        FakeRuntime(self)
        self.snapshot()
        backlog, clock = agent.Backlog(600), time.time
        for years in (-1, 30):
            shift = years * 365 * 86400
            # The agent's clock alone: grpc's would not agree with the one of its core.
            stepped = types.SimpleNamespace(**{**vars(time), 'time': lambda: clock() + shift,
                                               'time_ns': lambda: int((clock() + shift) * 1e9)})
            with mock.patch.object(agent, 'time', stepped):
                metrics = self.snapshot(backlog=backlog)
                self.assertEqual((len(metrics.pod_metrics), agent.add_snapshot(backlog, b'x')), (1, {}))
            self.assertAlmostEqual(metrics.timestamp, clock() + shift, delta=5)
            self.assertNotIn('container', ' '.join(self.failures))
            self.assertTrue(0 < self.stats.collection_seconds < 5)
            self.assertTrue(0 < metrics.agent_metrics.uptime_seconds < 60)
        self.assertEqual((len(backlog.snapshots), dropped(backlog)), (2, {}))

    def test_a_trouble_is_logged_when_it_begins_and_when_it_ends(self):
        states = [{}, {'cpu': 'x'}, {'cpu': 'y'}, {}]
        with self.assertLogs('kubensage-agent') as logged:
            for previous, now in zip(states, states[1:]):
                agent.log_changes(previous, now)
        self.assertEqual(logged.output, ['WARNING:kubensage-agent:cpu: x', 'INFO:kubensage-agent:cpu: recovered'])

# --- a snapshot that is too large

class TooLargeTest(Case):
    def metrics(self):
        labels, status = {'a': 'x' * 100}, wire.ContainerStatus(reason='y' * 100)
        def container(state):
            return wire.ContainerMetrics(id='i' * 100, state=state, labels=labels, image_ref='z' * 100, status=status,
                                         cgroup=wire.CgroupMetrics(path='p' * 100))
        metrics = wire.Metrics(timestamp=1, pod_metrics=[wire.PodMetrics(
            name='pod', labels=labels, qos_class='Burstable', cgroup=wire.CgroupMetrics(path='p' * 100),
            container_metrics=[container('CONTAINER_RUNNING'), container('CONTAINER_EXITED')])])
        metrics.node_metrics.hostname = 'node'
        return metrics

    def test_it_has_less_and_less_until_it_fits(self):
        metrics = self.metrics()
        whole, limit, seen = metrics.SerializeToString(), math.inf, []
        while True:
            data, failures = agent.serialize(metrics, limit)
            less = wire.Metrics.FromString(data)
            containers = [set(present(container)) - {'id', 'state'} for pod in less.pod_metrics
                          for container in pod.container_metrics]
            seen.append((less.agent_metrics.left_out, containers, [present(pod) for pod in less.pod_metrics]))
            if not containers:
                break
            self.assertEqual(limit == math.inf, not failures)
            limit = len(data) - 1
        own, kept = {'labels', 'image_ref', 'status', 'cgroup'}, {'image_ref', 'status'}
        pod = ['name', 'container_metrics', 'labels', 'qos_class', 'cgroup']
        self.assertEqual([
            ('', [own, own], [pod]), (agent.LEFT_OUT[0][0], [own, set()], [pod]),
            (agent.LEFT_OUT[1][0], [kept | {'labels'}, set()], [pod]),
            (agent.LEFT_OUT[2][0], [kept, set()], [[name for name in pod if name != 'labels']]),
            (agent.LEFT_OUT[3][0], [set(), set()], [['name', 'container_metrics']]), ('pods', [], [])], seen)
        # Those who show it have it whole.
        self.assertEqual(whole, metrics.SerializeToString())
        self.assertEqual('node', less.node_metrics.hostname)

    def test_what_is_no_snapshot_stays_as_it_is(self):
        self.assertEqual(b'\xff' * 9, agent.shrunk(b'\xff' * 9, 5))


# --- spool

def noise(length, count):
    """So many texts of this length that nothing compresses."""
    chance = random.Random(1)
    return [chance.getrandbits(8 * length).to_bytes(length, 'big') for _ in range(count)]


class SpoolTest(Case):
    def setUp(self):
        super().setUp()
        self.spool = f'{self.directory}/spool'

    def open(self, directory=None, **settings):
        """The backlog of an agent that has just been started; `end` is its SIGKILL."""
        directory = directory or self.spool
        self.lock = agent.open_spool(directory)
        self.addCleanup(self.end, self.lock)
        backlog = agent.Backlog(600, spool=directory, **settings)
        agent.load_spool(backlog)
        return backlog

    def end(self, lock=None):
        with contextlib.suppress(OSError):
            os.close(self.lock if lock is None else lock)

    def add(self, backlog, *texts):
        for text in texts:
            self.assertEqual(agent.add_snapshot(backlog, text), {})

    def waiting(self, backlog):
        return [agent.load_snapshot(backlog, snapshot) for snapshot in list(backlog.snapshots)]

    def damage(self, number, change):
        path = agent.record_path(self.spool, number)
        write_tree('/', {path: change(read_binary(path))})

    def test_what_was_not_acknowledged_is_there_after_a_restart_in_order_and_once(self):
        backlog, texts = self.open(), [b'%d' % number * number for number in range(1, 21)]
        self.add(backlog, *texts[:12])
        agent.forget_snapshots(backlog, list(backlog.snapshots)[:5])
        for waiting, new in (texts[5:12], texts[12:]), (texts[5:], ()):
            self.end()
            backlog = self.open()
            self.assertEqual((self.waiting(backlog), dropped(backlog), backlog.memory_bytes), (waiting, {}, 0))
            self.add(backlog, *new)
        self.assertEqual({snapshot.stored for snapshot in backlog.snapshots}, {None})
        agent.forget_snapshots(backlog, list(backlog.snapshots))
        self.assertEqual((os.listdir(self.spool), backlog.spool_bytes), ([], 0))

    def test_damaged_records_are_skipped_and_counted_and_the_rest_is_used(self):
        self.add(self.open(), *(b'%d' % number * 100 for number in range(7)))
        self.end()
        for number, change in enumerate((
                lambda data: data[:-50], lambda data: data[:20], lambda data: b'',
                lambda data: data[:-10] + b'?' + data[-9:], lambda data: data[:20] + b'?' + data[21:]), 1):
            self.damage(number, change)
        os.unlink(agent.record_path(self.spool, 6))
        os.mkdir(agent.record_path(self.spool, 6))
        with self.assertLogs('kubensage-agent', 'WARNING') as logged:
            backlog = self.open()
        self.assertEqual((self.waiting(backlog), dropped(backlog)), ([b'6' * 100], {'damaged': 6}))
        line, = logged.output
        self.assertIn('0000000000000001.snapshot: record: torn: ', line)

    def test_a_record_spoiled_while_it_waits_is_dropped_and_counted_once(self):
        backlog = self.open()
        self.add(backlog, b'1' * 100, b'2' * 100, b'3' * 100, b'4' * 100)
        self.damage(1, lambda data: data[:-1])
        os.unlink(agent.record_path(self.spool, 3))
        header = agent.read_record(self.spool, 4)[0]
        os.unlink(agent.record_path(self.spool, 4))
        # Intact, and yet nothing that zlib has made.
        agent.write_record(self.spool, 4, header, bytes(header.stored_bytes))
        with self.assertLogs('kubensage-agent', 'WARNING') as logged:
            self.assertEqual(self.waiting(backlog), [None, b'2' * 100, None, None])
        self.assertEqual((self.waiting(backlog), dropped(backlog), len(logged.output)),
                         ([b'2' * 100], {'damaged': 3}, 3))
        self.assertEqual(backlog.spool_bytes, agent.BLOCK_BYTES)

    def test_foreign_files_stay_and_are_not_read(self):
        names = ['note.txt', '1.snapshot', '00000000000000\u0661\u0661.snapshot', '0000000000000009.snapshot~']
        os.mkdir(self.spool, 0o700)
        write_tree(self.spool, dict.fromkeys(names, 'mine'))
        backlog = self.open()
        self.add(backlog, b'x')
        agent.forget_snapshots(backlog, list(backlog.snapshots))
        self.assertEqual(sorted(os.listdir(self.spool)), sorted(names))

    def test_age_is_of_the_monotonic_clock_and_of_the_wall_clock_after_another_boot(self):
        header = agent.Record(b'KSR1', 0, 0, monotonic=1000, wall=5000, boot_id=b'this')
        self.check_table(agent.record_age, [
            ((header, b'this', 1060, 9e9), 60), ((header, b'other', 7, 5090), 90),
            ((header, b'other', 7, 0), 0), ((header, b'this', 900, 5000), 0)])

    def test_records_of_another_boot_wait_as_long_as_the_wall_clock_says(self):
        os.mkdir(self.spool)
        for number, age in ((1, 700), (2, 500)):
            header = agent.Record(b'KSR1', 3, 3, 10**9, time.time() - age, b'another'.ljust(36))
            agent.write_record(self.spool, number, header, b'%3d' % age)
        backlog = self.open()
        agent.drop_excess(backlog, time.monotonic())
        self.assertEqual(['backlog'], list(backlog.failures))
        self.assertEqual((self.waiting(backlog), dropped(backlog)), ([b'500'], {'retention': 1}))
        self.assertEqual(os.listdir(self.spool), ['0000000000000002.snapshot'])

    def test_bytes_on_disk_are_bounded_and_the_oldest_go(self):
        backlog, texts = self.open(spool_max_bytes=5 * agent.BLOCK_BYTES), noise(4000, 12)
        failures = [list(agent.add_snapshot(backlog, text)) for text in texts]
        self.assertEqual(failures, [[]] * 5 + [['backlog size']] * 7)
        self.assertEqual((self.waiting(backlog), dropped(backlog)), (texts[7:], {'size': 7}))
        self.assertEqual(sum(os.stat(f'{self.spool}/{name}').st_blocks for name in os.listdir(self.spool)) * 512,
                         backlog.spool_bytes)

    @unittest.skipUnless(os.geteuid() == 0, 'a full file system is one that is mounted for the test')
    def test_a_full_disk_falls_back_to_memory_with_one_warning_and_recovers(self):
        disk = self.new_directory()
        subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=64k', 'full', disk], check=True)
        self.addCleanup(subprocess.run, ['umount', disk], check=True)
        backlog, texts, troubles = self.open(f'{disk}/spool'), noise(12_000, 12), {}
        with self.assertLogs('kubensage-agent') as logged:
            for number, text in enumerate(texts):
                if number == 9:
                    agent.forget_snapshots(backlog, list(backlog.snapshots)[:3])
                failures = agent.add_snapshot(backlog, text)
                agent.log_changes(troubles, failures)
                troubles = failures
        self.assertEqual([record.levelname for record in logged.records], ['WARNING', 'INFO'])
        self.assertIn(f'spool: {disk}/spool cannot be written (No space left on device): keeping', logged.output[0])
        self.assertEqual(self.waiting(backlog), texts[3:])
        self.assertTrue(backlog.memory_bytes and backlog.spool_bytes)
        self.assertIsNone(backlog.snapshots[-1].stored)
        self.end()

    def test_memory_that_is_full_does_not_cost_what_is_in_the_spool(self):
        backlog, texts = self.open(max_bytes=2500), noise(1000, 5)
        self.add(backlog, b'1', b'2')
        os.rename(self.spool, f'{self.spool}.away')
        for text in texts:
            self.assertIn('spool', agent.add_snapshot(backlog, text))
        os.rename(f'{self.spool}.away', self.spool)
        self.assertEqual((self.waiting(backlog), dropped(backlog)), ([b'1', b'2', *texts[3:]], {'size': 3}))

    def test_an_empty_directory_and_one_of_our_own_become_this_users_alone(self):
        os.mkdir(self.spool, 0o755)
        for text in (b'x', b'y'):
            backlog = self.open()
            self.assertEqual(mode_of(self.spool), 0o700)
            self.add(backlog, text)
            self.end()
            os.chmod(self.spool, 0o755)
        self.assertEqual((self.waiting(backlog), mode_of(agent.record_path(self.spool, 1))), ([b'x', b'y'], 0o600))

    def check_refusal(self, directory, expected):
        """In one line; the backlog is then in memory."""
        options = agent.parse_options(['--relay-address=r:1', '--spool-dir', directory], {})
        self.patch(SPOOL_PATIENCE_SECONDS=0)
        with self.subTest(directory), self.assertLogs('kubensage-agent') as logged:
            self.assertIsNone(agent.open_backlog(options).spool)
        line, = logged.output
        self.assertIn(expected, line)
        self.assertIn('keeping snapshots in memory', line)

    def test_a_directory_that_others_could_exchange_is_refused(self):
        self.write({'file': '', 'open/file': ''})
        os.symlink(f'{self.directory}/open', f'{self.directory}/link')
        os.chmod(f'{self.directory}/open', 0o777)
        for path, expected in (('link', '/link is a symbolic link'), ('open/below', '/open is writable by others'),
                               ('file/below', 'Not a directory')):
            self.check_refusal(f'{self.directory}/{path}', expected)

    def test_a_directory_that_is_shared_with_others_is_refused_and_stays_as_it_is(self):
        os.mkdir(self.spool)
        for mode, files in ((0o1777, {}), (0o1777, {'foreign': ''}), (0o755, {'foreign': ''})):
            write_tree(self.spool, files)
            os.chmod(self.spool, mode)
            self.check_refusal(self.spool, f'/spool is shared with others (mode {mode:o})')
            self.assertEqual(mode_of(self.spool), mode)

    def test_two_agents_do_not_share_a_spool(self):
        self.open()
        self.check_refusal(self.spool, '/spool is in use by another agent')
        self.end()
        self.open()


# --- backlog in memory

class MemoryBacklogTest(unittest.TestCase):
    def snapshots(self, count):
        """Of a node of 100 containers: random ids that stay, among counters that grow."""
        chance = random.Random(1)
        ids = [f'{chance.getrandbits(256):064x}' for _ in range(100)]
        return [wire.Metrics(timestamp=number, pod_metrics=[wire.PodMetrics(container_metrics=[
            wire.ContainerMetrics(id=name, image=f'registry/{name[:20]}', created_at=chance.getrandbits(27))
            for name in ids])]).SerializeToString() for number in range(count)]

    def test_what_waits_is_given_back_as_it_was_and_is_never_longer(self):
        """Of the noise with zeros behind it, one has exactly as many bytes as zlib makes of it."""
        backlog, noises = agent.Backlog(600), [noise(60, 1)[0] + bytes(zeros) for zeros in range(60)]
        self.assertIn(0, [len(text) - len(zlib.compress(text, agent.COMPRESSION_LEVEL)) for text in noises])
        texts = [*self.snapshots(50), b'', *noises]
        for text in texts:
            self.assertEqual(agent.add_snapshot(backlog, text), {})
        self.assertEqual([agent.load_snapshot(backlog, snapshot) for snapshot in backlog.snapshots], texts)
        lengths = [len(snapshot.stored) for snapshot in backlog.snapshots]
        self.assertTrue(all(stored <= len(text) for stored, text in zip(lengths, texts)))
        self.assertEqual(backlog.memory_bytes, sum(lengths))
        self.assertLess(backlog.memory_bytes, sum(map(len, texts)) * 0.8)

    def test_bytes_in_memory_are_bounded_and_the_oldest_go(self):
        backlog, texts = agent.Backlog(600, max_bytes=50_000), self.snapshots(80)
        failures = [agent.add_snapshot(backlog, text) for text in texts]
        self.assertEqual((failures[0], list(failures[-1])), ({}, ['backlog size']))
        self.assertLessEqual(backlog.memory_bytes, 50_000)
        kept = [agent.load_snapshot(backlog, snapshot) for snapshot in backlog.snapshots]
        self.assertEqual((kept, dropped(backlog)), (texts[-len(kept):], {'size': 80 - len(kept)}))
        self.assertGreater(len(kept), 1)

    def test_a_snapshot_larger_than_the_backlog_is_dropped_alone(self):
        backlog = agent.Backlog(600, max_bytes=100)
        self.assertEqual(list(agent.add_snapshot(backlog, os.urandom(1000))), ['backlog size'])
        self.assertEqual((agent.add_snapshot(backlog, b'x'), len(backlog.snapshots)), ({}, 1))


# --- backlog and relay

class RelayTest(Case):
    def setUp(self):
        """A pause after a failure is announced in `pauses`, and very short, unless the test says otherwise."""
        super().setUp()
        self.pauses, self.resumed, self.pause_seconds = queue.Queue(), queue.Queue(), 0.01
        self.patch(backoff_seconds=lambda failures: self.pauses.put(failures) or self.pause_seconds)

    def hold_pauses(self):
        """Each pause begins only after `resumed` has said for how long."""
        self.patch(backoff_seconds=lambda failures: self.pauses.put(failures) or self.resumed.get())

    def backlog(self, *timestamps):
        backlog = agent.Backlog(600)
        self.add(backlog, *timestamps)
        return backlog

    def add(self, backlog, *timestamps, **others):
        for timestamp in timestamps:
            text = wire.Metrics(timestamp=timestamp, **others).SerializeToString()
            self.assertEqual(agent.add_snapshot(backlog, text), {})

    def deliver(self, backlog, address, **settings):
        self.sender = agent.start_delivery(backlog, agent.Relay(address, **settings))
        self.addCleanup(agent.close_backlog, backlog, self.sender, 0.1)

    def next_pause(self):
        return self.pauses.get(timeout=PATIENCE_SECONDS)

    def drain(self, backlog, left=0, seconds=PATIENCE_SECONDS):
        """Close the backlog, in which so many are left."""
        self.assertEqual(agent.close_backlog(backlog, self.sender, seconds), left)
        self.assertFalse(self.sender.is_alive())


class DeliveryTest(RelayTest):
    def hold_one(self):
        """A relay that does not answer before `release`, and a backlog of which one is under way to it."""
        relay, backlog = FakeRelay(self), self.backlog(1)
        relay.script.append(relay.hold)
        self.deliver(backlog, relay.address)
        relay.next_arrived(1)
        return relay, backlog

    def check_arrival(self, relay, *timestamps):
        arrived = relay.next_arrived(len(timestamps))
        self.assertEqual([metrics.timestamp for metrics in arrived], list(timestamps))

    def test_what_is_acknowledged_is_sent_once_and_in_order(self):
        relay, backlog = FakeRelay(self), self.backlog(1, 2, 3)
        self.deliver(backlog, relay.address)
        self.assertEqual(relay.next_streams(1), [[1, 2, 3]])
        self.add(backlog, 4)
        self.assertEqual(relay.next_streams(1), [[4]])
        self.drain(backlog)
        self.assertTrue(relay.streams.empty())

    def test_only_the_answer_acknowledges(self):
        """Whatever else ends a stream, all of its batch is sent again, oldest first, less at once."""
        for behaviour, arrived in ((cut_after_two, [1, 2]), (refuse, []), (exhausted, []),
                                   (fail_at_the_end, [1, 2, 3]), (end_without_answer, [1, 2, 3])):
            with self.subTest(arrived=arrived):
                relay, backlog = FakeRelay(self, behaviour), self.backlog(1, 2, 3)
                self.deliver(backlog, relay.address)
                self.assertEqual(relay.next_streams(3), [arrived, [1], [2, 3]])
                self.drain(backlog)
                self.assertEqual(dropped(backlog), {})

    def test_an_answer_before_the_end_of_the_stream_acknowledges_nothing(self):
        """Of snapshots so large that the relay's window of 64 KiB holds but a part of one; without bdp_probe, it does
        not grow."""
        relay, backlog = FakeRelay(self, answer_early), self.backlog()
        self.add(backlog, 1, 2, 3, pod_metrics=[dict(id='x' * (1 << 20))])
        self.deliver(backlog, relay.address)
        self.assertEqual(relay.next_streams(3), [[1], [1], [2, 3]])
        self.drain(backlog)
        self.assertEqual((backlog.acknowledged, dropped(backlog)), (3, {}))

    def test_a_stream_has_at_most_fifty_snapshots_and_less_after_a_relay_has_hung(self):
        relay, backlog = FakeRelay(self), self.backlog(*range(1, 121))
        relay.script.extend([relay.hold, relay.hold])
        self.hold_pauses()
        self.patch(SEND_TIMEOUT_SECONDS=0.5)
        self.deliver(backlog, relay.address)
        for timeout in (0.5, PATIENCE_SECONDS):
            self.next_pause()
            self.patch(SEND_TIMEOUT_SECONDS=timeout)
            self.resumed.put(0)
        streams = relay.next_streams(6)
        # 25 were too many: so many are not tried again soon.
        self.assertEqual([len(stream) for stream in streams], [50, 25, 12, 24, 24, 24])
        self.assertEqual(sum(streams[2:], []), list(range(1, 85)))

    def test_a_connection_to_a_relay_that_hangs_is_closed_and_made_anew(self):
        with contextlib.closing(socket.create_server(('127.0.0.1', 0))) as listener:
            self.patch(SEND_TIMEOUT_SECONDS=0.2)
            self.deliver(self.backlog(1), '{}:{}'.format(*listener.getsockname()))
            for _ in range(3):
                wait_for_end(accept_silently(listener))

    def test_collection_does_not_wait_for_a_relay_that_answers_late(self):
        relay, backlog = self.hold_one()
        self.add(backlog, *range(2, 1002))
        self.assertTrue(relay.streams.empty())
        relay.release()
        self.check_arrival(relay, *range(2, 1002))
        self.drain(backlog)

    def test_retention_drops_the_oldest_and_counts_them(self):
        backlog = self.backlog(1, 2, 3)
        first, second, third = backlog.snapshots
        for now, failed in (first.taken + 599, []), ((second.taken + third.taken) / 2 + 600, ['backlog']):
            agent.drop_excess(backlog, now)
            self.assertEqual(failed, list(backlog.failures))
        self.assertEqual((list(backlog.snapshots), dropped(backlog)), ([third], {'retention': 2}))

    def test_what_expires_under_way_does_not_take_its_successors_with_it(self):
        relay, backlog = self.hold_one()
        backlog.snapshots[0] = backlog.snapshots[0]._replace(taken=-math.inf)
        failures = agent.add_snapshot(backlog, wire.Metrics(timestamp=2).SerializeToString())
        self.assertEqual((list(failures), dropped(backlog)), (['backlog'], {'retention': 1}))
        relay.release()
        self.check_arrival(relay, 2)
        self.drain(backlog)

    def test_the_largest_snapshot_is_accepted_and_a_larger_one_is_dropped_with_one_line_and_blocks_nothing(self):
        relay, backlog, troubles = FakeRelay(self), self.backlog(1), {}
        # Each of the two nested fields has a tag of one byte and a length of four.
        self.add(backlog, 0, pod_metrics=[dict(id='x' * (agent.MAX_SNAPSHOT_BYTES - 10))])
        self.assertEqual(backlog.snapshots[-1].plain_bytes, agent.MAX_SNAPSHOT_BYTES)
        with self.assertLogs('kubensage-agent') as logged:
            for size in (agent.MAX_SNAPSHOT_BYTES + 1, agent.MAX_SNAPSHOT_BYTES + 2):
                failures = agent.add_snapshot(backlog, bytes(size))
                agent.log_changes(troubles, failures)
                troubles = failures
        self.assertEqual((len(logged.output), dropped(backlog)), (1, {'too large': 2}))
        self.assertIn(str(agent.MAX_SNAPSHOT_BYTES + 1), logged.output[0])
        self.add(backlog, 2)
        self.deliver(backlog, relay.address)
        self.assertEqual(relay.next_streams(1), [[1, 0, 2]])

    def test_what_a_relay_with_a_smaller_limit_refuses_goes_with_less_or_is_dropped_alone(self):
        relay, backlog = FakeRelay(self, limit_bytes=1000), self.backlog(1, 2)
        self.add(backlog, 3, pod_metrics=[dict(id='x' * 2000)])
        self.add(backlog, 4)
        self.add(backlog, 5, node_metrics=dict(hostname='x' * 3000))
        self.add(backlog, 6)
        with self.assertLogs('kubensage-agent', 'ERROR') as logged:
            self.deliver(backlog, relay.address)
            wait_for('everything', lambda: not backlog.snapshots)
        self.assertEqual((len(logged.output), backlog.acknowledged, dropped(backlog)), (1, 5, {'too large': 1}))
        # What went before the refused one in its stream may come again.
        arrived = {metrics.timestamp: metrics for metrics in relay.next_arrived(relay.arrived.qsize())}
        self.assertEqual({1: '', 2: '', 3: 'pods', 4: '', 6: ''},
                         {number: metrics.agent_metrics.left_out for number, metrics in arrived.items()})

    def test_an_outage_is_logged_when_it_begins_and_when_it_ends_and_its_failures_are_counted(self):
        relay, backlog = FakeRelay(self, refuse, refuse, acknowledge, refuse), self.backlog(1)
        with self.assertLogs('kubensage-agent') as logged:
            self.deliver(backlog, relay.address)
            relay.next_arrived(1)
            self.add(backlog, 2)
            relay.next_arrived(1)
            self.drain(backlog)
        self.assertEqual([record.levelname for record in logged.records], ['WARNING', 'INFO'] * 2)
        self.assertIn('PERMISSION_DENIED: not you', logged.output[0])
        self.assertEqual([self.next_pause() for _ in range(3)], [1, 2, 1])

    def test_closing_delivers_what_is_left(self):
        """Through as many streams as it takes, and from the middle of a pause."""
        relay = FakeRelay(self, refuse)
        self.pause_seconds, backlog = 1000, self.backlog(*range(60))
        self.deliver(backlog, relay.address)
        self.next_pause()
        self.drain(backlog)
        self.check_arrival(relay, *range(60))

    def test_closing_makes_one_attempt_that_may_fail(self):
        relay = FakeRelay(self, usual=refuse)
        self.pause_seconds, backlog = 1000, self.backlog(1, 2)
        self.deliver(backlog, relay.address)
        self.next_pause()
        self.drain(backlog, 2)
        self.assertEqual(relay.next_streams(2), [[], []])
        self.assertTrue(relay.streams.empty())

    def test_closing_during_an_attempt_that_fails_makes_another(self):
        relay, backlog = FakeRelay(self), self.backlog(1)

        def fail_late(messages, context):
            backlog.closing.wait(PATIENCE_SECONDS)
            return refuse(messages, context)

        relay.script.append(fail_late)
        self.deliver(backlog, relay.address)
        self.drain(backlog)

    def test_closing_gives_up_on_a_relay_that_hangs(self):
        """Nothing is begun after that: the sending thread has ended."""
        _, backlog = self.hold_one()
        self.drain(backlog, 1, seconds=0.2)


# --- whoever stands on the way

# As Debian 12 has it, 1.22, but for what it would write elsewhere. `reuseport`, for the test has reserved the port.
NGINX_CONFIGURATION = """\
daemon off;
master_process off;
pid nginx.pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
    server {{
        listen {address} reuseport http2;
        location / {{
            grpc_pass grpc://{relay};
        }}
    }}
}}
"""


class CuttingProxy:
    """On TCP, between a client and the server at this address; it cuts a connection that has brought so many bytes."""

    def __init__(self, test, target, limit_bytes):
        self.target, self.limit_bytes, self.cuts = target.split(':'), limit_bytes, 0
        self.listener = socket.create_server(('127.0.0.1', 0))
        self.address = '{}:{}'.format(*self.listener.getsockname())
        threading.Thread(target=self.serve).start()
        # Wakes accept().
        test.addCleanup(self.listener.shutdown, socket.SHUT_RDWR)

    def serve(self):
        with self.listener, contextlib.suppress(OSError):
            while True:
                threading.Thread(target=self.pass_on, args=(self.listener.accept()[0],)).start()

    def pass_on(self, client):
        left = self.limit_bytes
        with client, contextlib.suppress(OSError), socket.create_connection(self.target) as server:
            while left:
                for source in select.select([client, server], [], [])[0]:
                    data = source.recv(left if source is client else 1 << 16)
                    if not data:
                        return
                    left -= len(data) if source is client else 0
                    (server if source is client else client).sendall(data)
            self.cuts += 1


class WayTest(RelayTest):
    """Not all that is sent arrives: who stands on the way takes only so much, and the relay not everything."""

    def setUp(self):
        super().setUp()
        # The timestamps that the relay has acknowledged; and how often it has seen each.
        self.taken, self.seen = [], collections.Counter()

    def take_but(self, *poison, code='INVALID_ARGUMENT', text='not this one'):
        """A relay that refuses each stream that has one of these."""
        def behave(messages, context):
            timestamps = []
            for metrics in messages:
                self.seen[metrics.timestamp] += 1
                if metrics.timestamp in poison:
                    context.abort(getattr(grpc.StatusCode, code), text)
                timestamps.append(metrics.timestamp)
            self.taken += timestamps
            yield b''
        return behave

    def add_large(self, backlog, *timestamps, size=335_000):
        """Snapshots of so many bytes that nothing compresses much."""
        for timestamp in timestamps:
            self.add(backlog, timestamp, pod_metrics=[dict(id=os.urandom(size // 2).hex())])

    def open(self, spool):
        backlog = agent.Backlog(600, spool=spool)
        if spool:
            agent.load_spool(backlog)
        return backlog

    def emptied(self, backlog, left=0):
        """Until so few are left."""
        wait_for('the delivery', lambda: len(backlog.snapshots) <= left)

    def proven(self, backlog):
        """Until none is left. A refusal is proven right after another snapshot was taken: where that attempt fails by
        chance, as on a machine that is busy, the next snapshot has to come; which ones came."""
        added, since = [], [time.monotonic()]

        def empty():
            if backlog.snapshots and time.monotonic() > since[0] + 3:
                added.append(1000 + len(added))
                self.add(backlog, added[-1])
                since[0] = time.monotonic()
            return not backlog.snapshots

        wait_for('the delivery', empty)
        return added

    def nginx(self, relay):
        """A real one, between the agent and the relay; its address. Now and then it leaves a stream without an answer
        that it has refused: the deadline ends that."""
        self.patch(SEND_TIMEOUT_SECONDS=5)
        address, directory = closed_address(self), self.new_directory()
        write_tree(directory, {'nginx.conf': NGINX_CONFIGURATION.format(address=address, relay=relay)})
        self.spawn(['nginx', '-p', directory, '-e', 'error.log', '-c', 'nginx.conf'])

        def answers():
            with contextlib.suppress(OSError), socket.create_connection(address.split(':')):
                return True
        wait_for('nginx', answers)
        self.nginx_log = f'{directory}/error.log'
        return address

    def check_outage_on(self, way, spool, *signs):
        """Twenty snapshots are taken while the relay is away; then it is there, behind what `way` makes for its
        address, and with a spool another agent. What the log said of the outage."""
        relay_address = closed_address(self)
        address, backlog, count = way(relay_address), self.open(spool), 20
        self.taken, self.pause_seconds = [], 0.02
        with self.assertLogs('kubensage-agent', 'WARNING') as logged:
            self.deliver(backlog, address)
            for timestamp in range(1, count + 1):
                self.add_large(backlog, timestamp)
            for _ in range(self.pauses.qsize() + 4):
                self.next_pause()
            if spool:
                self.drain(backlog, count, seconds=0.3)
                backlog = self.open(spool)
                self.assertEqual(len(backlog.snapshots), count)
            FakeRelay(self, usual=self.take_but(), port=int(relay_address.split(':')[1]))
            if spool:
                self.deliver(backlog, address)
            self.emptied(backlog)
            self.drain(backlog)
        self.assertEqual((backlog.acknowledged, dropped(backlog)), (count, {}))
        self.assertEqual(spool and os.listdir(spool), spool and [])
        # A stream that is cut ends for this relay as any other does; its answer does not arrive then: all comes again.
        self.assertEqual(list(dict.fromkeys(self.taken)), list(range(1, count + 1)))
        self.assertLess(max(self.seen.values()), 8)
        self.seen.clear()
        return '\n'.join(logged.output)

    @unittest.skipUnless(shutil.which('nginx'), 'nginx is not installed')
    def test_an_outage_is_made_up_for_through_an_nginx_that_takes_a_mebibyte_a_stream(self):
        for spool in None, f'{self.directory}/spool':
            with self.subTest(spool=spool):
                if spool:
                    os.mkdir(spool)
                said = self.check_outage_on(self.nginx, spool)
                self.assertIn('UNAVAILABLE: Received http2 header with status: 502', said)
                # The next agent begins with all of them; the other one has learned during the outage to send few.
                if spool:
                    self.assertIn('client intended to send too large chunked body', read_text(self.nginx_log))

    def test_an_outage_is_made_up_for_through_what_cuts_each_connection_after_a_mebibyte(self):
        for spool in None, f'{self.directory}/spool':
            with self.subTest(spool=spool):
                if spool:
                    os.mkdir(spool)
                proxies = []
                self.check_outage_on(lambda relay: proxies.append(CuttingProxy(self, relay, 1 << 20)) or
                                     proxies[0].address, spool)
                # Of twenty, six times three go over one connection.
                self.assertGreaterEqual(proxies[0].cuts, 6)

    @unittest.skipUnless(shutil.which('nginx'), 'nginx is not installed')
    def test_a_snapshot_that_nginx_never_takes_goes_with_less_or_is_dropped_and_blocks_nothing(self):
        relay, backlog = FakeRelay(self, usual=self.take_but()), self.backlog(1)
        self.add_large(backlog, 0, size=1_100_000)
        self.add(backlog, 2)
        noise = b'\xff' * 1_100_000
        with backlog.changed:
            agent.append_snapshot(backlog, agent.Snapshot(9, time.monotonic(), len(noise), len(noise), noise))
        backlog.next_number = 10
        # What nginx answers may reach the agent as a stream that was reset: then one proof is not enough.
        self.add(backlog, 3, 4, 5, 6, 7, 8)
        with self.assertLogs('kubensage-agent', 'ERROR') as logged:
            self.deliver(backlog, self.nginx(relay.address))
            added = self.proven(backlog)
        self.assertEqual(({*range(9), *added}, {'refused': 1}, 1),
                         ({*self.taken}, dropped(backlog), len(logged.output)))

    def check_poison(self, poison, count, *, left=()):
        """Of so many snapshots, all arrive in order but those that the relay refuses; of which these are left."""
        self.taken, self.pauses = [], queue.Queue()
        self.seen.clear()
        relay, backlog = FakeRelay(self, usual=self.take_but(*poison)), self.backlog(*range(1, count + 1))
        gone, good = len(poison) - len(left), [number for number in range(1, count + 1) if number not in poison]
        with self.assertLogs('kubensage-agent', 'INFO') as logged:
            self.deliver(backlog, relay.address)
            good += [] if left else self.proven(backlog)
            if left:
                self.emptied(backlog, len(left))
                # A dozen more refusals change nothing.
                for _ in range(self.pauses.qsize() + 12):
                    self.next_pause()
                self.assertEqual([snapshot.number for snapshot in backlog.snapshots], list(left))
        self.assertEqual(self.taken, good)
        self.assertEqual(dropped(backlog), {'refused': gone} if gone else {})
        errors = [record.getMessage() for record in logged.records if record.levelname == 'ERROR']
        self.assertEqual(len(errors), gone, errors)
        self.assertTrue(all('is dropped: INVALID_ARGUMENT: not this one' in error for error in errors), errors)
        # Halved from 28 on, then alone.
        self.assertLess(max((self.seen[number] for number in range(1, count + 1) if number not in left), default=0), 16)
        return backlog

    def test_a_snapshot_that_the_relay_refuses_is_dropped_once_others_were_taken(self):
        for poison in (13,), (1,), (27,), (13, 14), (1, 2), (5, 20), (5, 6, 7, 8, 26):
            with self.subTest(poison=poison):
                self.drain(self.check_poison(poison, 28))

    def test_refused_snapshots_behind_which_nothing_is_taken_wait(self):
        """Until one is taken after they were refused."""
        for poison, count in ((28,), 28), ((1,), 1), ((1, 2), 2), ((27, 28), 28):
            with self.subTest(poison=poison):
                backlog = self.check_poison(poison, count, left=poison)
                with self.assertLogs('kubensage-agent', 'ERROR') as logged:
                    # One each: a refused one is tried after another was taken.
                    for number in range(count + 1, count + 1 + len(poison)):
                        self.add(backlog, number)
                        self.emptied(backlog, len(poison) - (number - count))
                self.assertEqual((dropped(backlog), len(logged.output)), ({'refused': len(poison)}, len(poison)))
                self.assertEqual(self.taken[-len(poison):], list(range(count + 1, count + 1 + len(poison))))
                self.drain(backlog)

    def test_a_refused_snapshot_is_given_up_neither_by_the_close_nor_by_the_next_agent(self):
        spool = f'{self.directory}/spool'
        os.mkdir(spool)
        relay, backlog = FakeRelay(self, usual=self.take_but(1)), self.open(spool)
        self.add(backlog, 1)
        for _ in range(2):
            self.deliver(backlog, relay.address)
            for _ in range(6):
                self.next_pause()
            self.drain(backlog, 1, seconds=0.3)
            self.assertEqual(dropped(backlog), {})
            backlog = self.open(spool)

    def test_an_outage_in_which_everything_is_refused_drops_nothing(self):
        """Whether the relay reads or not, with codes that may be about the message."""
        behaviours = [failing(code, 'an outage', after) for code in ('RESOURCE_EXHAUSTED', 'INTERNAL', 'UNKNOWN')
                      for after in (None, 1, 0)]
        for count, refusals in (20, 9), (20, 50), (1, 10), (3, 40):
            with self.subTest(count=count, refusals=refusals):
                self.taken = []
                relay = FakeRelay(self, *itertools.islice(itertools.cycle(behaviours), refusals), usual=self.take_but())
                backlog = self.backlog(*range(1, count + 1))
                self.deliver(backlog, relay.address)
                self.emptied(backlog)
                self.drain(backlog)
                self.assertEqual((sorted(self.taken), dropped(backlog)), (list(range(1, count + 1)), {}))

    def test_an_outage_that_pauses_for_one_stream_costs_at_most_one_snapshot(self):
        """The one that is tried right after another was taken; not all that are set aside."""
        for code in 'INTERNAL', 'RESOURCE_EXHAUSTED':
            with self.subTest(code):
                self.taken, outage = [], [failing(code, 'an outage')] * 40
                relay = FakeRelay(self, *outage, self.take_but(), *outage, usual=self.take_but())
                backlog = self.backlog(*range(1, 21))
                self.deliver(backlog, relay.address)
                self.emptied(backlog)
                self.drain(backlog)
                self.assertLessEqual(sum(dropped(backlog).values()), 1, dropped(backlog))
                self.assertGreaterEqual(len(self.taken), 19)

    def large_node(self, timestamp):
        """1.5 MB, of which what this agent adds on containers is the most."""
        return dict(pod_metrics=[wire.PodMetrics(id=f'pod{pod}', container_metrics=[
            wire.ContainerMetrics(id=f'{timestamp}-{pod}-{number}', state='CONTAINER_RUNNING', image='registry/image:1',
                                  image_ref=os.urandom(60).hex(), labels={'key': os.urandom(150).hex()})
            for number in range(30)]) for pod in range(100)])

    def test_what_is_larger_than_the_relay_accepts_goes_again_reduced(self):
        """As grpc-go says it, and as the C core does."""
        said = failing('RESOURCE_EXHAUSTED', 'grpc: received message larger than max (5242880 vs. 1000000)', 0)
        for script in (said, said), ():
            with self.subTest(said=bool(script)):
                relay, backlog = FakeRelay(self, *script, limit_bytes=1_000_000), self.backlog()
                for timestamp in 1, 2, 3:
                    self.add(backlog, timestamp, **self.large_node(timestamp))
                self.assertGreater(min(snapshot.plain_bytes for snapshot in backlog.snapshots), 1_000_000)
                self.deliver(backlog, relay.address)
                self.emptied(backlog)
                self.drain(backlog)
                self.assertEqual((dropped(backlog), backlog.max_snapshot_bytes), ({}, 1_000_000))
                arrived = relay.next_arrived(3)
                self.assertEqual([metrics.timestamp for metrics in arrived], [1, 2, 3])
                self.assertTrue(relay.arrived.empty())
                for metrics in arrived:
                    self.assertIn(metrics.agent_metrics.left_out, [what for what, *_ in agent.LEFT_OUT])
                    self.assertEqual(len(metrics.pod_metrics), 100)
                    self.assertLessEqual(metrics.ByteSize(), 1_000_000)
                # What comes from now on is reduced before it waits.
                self.assertEqual(agent.serialize(wire.Metrics(**self.large_node(4)), backlog.max_snapshot_bytes)[1]
                                 .keys(), {'snapshot'})

    def test_what_cannot_be_reduced_any_further_is_dropped_as_too_large_and_blocks_nothing(self):
        relay, backlog = FakeRelay(self, limit_bytes=1_000_000), self.backlog(1)
        self.add(backlog, 0, node_metrics=dict(hostname='x' * 1_200_000))
        self.add(backlog, 2)
        with self.assertLogs('kubensage-agent', 'ERROR') as logged:
            self.deliver(backlog, relay.address)
            self.emptied(backlog)
        self.assertEqual((dropped(backlog), len(logged.output)), ({'too large': 1}, 1))
        self.assertEqual(sorted({metrics.timestamp for metrics in relay.next_arrived(relay.arrived.qsize())}), [1, 2])

    def test_closing_goes_on_with_fewer_where_the_way_does_not_take_all(self):
        """In its time; a poisoned one does not take the others with it."""
        backlog = self.backlog(*range(1, 29))
        relay = FakeRelay(self, usual=self.take_but(5))
        backlog.closing.set()
        self.deliver(backlog, relay.address)
        self.drain(backlog)
        self.assertEqual((self.taken, dropped(backlog)), ([*range(1, 5), *range(6, 29)], {'refused': 1}))

    def test_the_number_acknowledged_last_is_the_largest_whatever_goes_first(self):
        """--once looks at it: its own snapshot is the newest."""
        refused = failing('INTERNAL', 'an outage')
        relay, backlog = FakeRelay(self, *[refused] * 4, usual=self.take_but()), self.backlog(1, 2)
        self.deliver(backlog, relay.address)
        self.emptied(backlog)
        self.drain(backlog)
        self.assertEqual((self.taken, backlog.acknowledged_number), ([2, 1], 2))

    def test_refusals_of_what_is_gone_are_forgotten(self):
        way, outage = agent.Way(), [failing('INTERNAL', 'an outage')] * 40
        self.patch(Way=lambda: way)
        relay, backlog = FakeRelay(self, *outage, usual=self.take_but()), self.backlog(*range(1, 21))
        self.deliver(backlog, relay.address)
        self.emptied(backlog)
        self.drain(backlog)
        self.assertEqual((dict(way.refusals), way.aside), ({}, set()))

    def test_a_pause_of_the_last_attempt_ends_when_time_is_up(self):
        relay, backlog = FakeRelay(self, usual=failing('INTERNAL', 'an outage')), self.backlog(1)
        self.pause_seconds = 2
        self.deliver(backlog, relay.address)
        self.next_pause()
        self.drain(backlog, 1, seconds=0.2)

    def test_a_catch_up_is_paced(self):
        """A second's worth at once, and never so many that nothing else gets through."""
        relay, backlog = FakeRelay(self, usual=self.take_but()), self.backlog(*range(1, 21))
        backlog.pace_seconds, began = 0.1, time.monotonic()
        self.deliver(backlog, relay.address)
        self.emptied(backlog)
        self.assertGreaterEqual(time.monotonic() - began, 1)
        self.assertEqual([len(stream) for stream in relay.next_streams(2)], [10, 10])
        # When it closes it hurries.
        self.add(backlog, *range(21, 61))
        began = time.monotonic()
        self.drain(backlog)
        self.assertLess(time.monotonic() - began, 3)
        self.assertEqual(self.taken, list(range(1, 61)))


class BackoffTest(unittest.TestCase):
    def test_pauses_grow_up_to_a_bound_with_full_jitter(self):
        for failures in (1, 2, 3, 5, 8, 100, 10**6):
            with self.subTest(failures=failures):
                longest = min(agent.BACKOFF_LONGEST_SECONDS, agent.BACKOFF_FIRST_SECONDS * 2 ** min(failures - 1, 20))
                pauses = [agent.backoff_seconds(failures) for _ in range(500)]
                self.assertTrue(0 <= min(pauses) < longest / 10)
                self.assertTrue(longest * 0.4 < max(pauses) <= longest)

class DirectTest(Case):
    def test_a_proxy_is_asked_as_by_curl(self):
        self.check_table(agent.is_direct, [
            *(((address, ''), True) for address in (
                'localhost:5', 'LOCALHOST.:5', '127.9.9.9:5', '127.1:5', '[::1]:5', '[::ffff:127.0.0.1]:5',
                '[0:0:0:0:0:0:0:1]:5')),
            (('relay:5', ''), False), (('relay:5', '*'), True), (('RELAY:5', 'a, relay'), True),
            (('relay:5', 'relay:5'), True), (('relay:5', 'relay:6'), False), (('a.relay.x:5', '.relay.x'), True),
            (('a.relay.x:5', 'relay.x'), True), (('arelay.x:5', 'relay.x'), False),
            (('10.1.2.3:5', '10.0.0.0/8'), True),
            (('10.1.2.3:5', '11.0.0.0/8'), False), (('[2001:db8::1]:5', '2001:db8::/32'), True),
            (('[2001:db8::1]:5', '[2001:db8::1]:5'), True), (('[2001:db8::1]:5', '2001:db8::1'), True)])

    def test_what_is_meant_for_other_programs_does_not_move_the_agent(self):
        run = self.start('--version', environment={
            'PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION': 'cpp', 'GRPC_POLL_STRATEGY': 'none', 'GRPC_VERBOSITY': 'DEBUG',
            'GRPC_TRACE': 'all', 'GRPC_DNS_RESOLVER': 'ares'}).result()
        self.assertEqual((0, f'kubensage-agent {agent.__version__}\n', ''), run)


class PaceOfCatchUpTest(RelayTest):
    def test_a_catch_up_goes_at_ten_times_the_pace_and_at_one_a_second_at_least(self):
        relay, backlog = FakeRelay(self), self.backlog(*range(1, 16))
        backlog.pace_seconds = 0.1
        began = time.monotonic()
        self.deliver(backlog, relay.address)
        wait_for('everything', lambda: not backlog.snapshots)
        # Ten at once, then a second later the rest.
        self.assertEqual([10, 5], [len(stream) for stream in relay.next_streams(2)])
        self.assertGreater(time.monotonic() - began, 0.9)
        for seconds, pace in (1, 0.1), (5, 0.5), (60, 1):
            options = agent.parse_options(['--relay-address', relay.address, f'--main-loop-duration={seconds}'], {})
            with contextlib.ExitStack() as closing:
                self.assertEqual(pace, agent.open_sinks(options, closing).backlog.pace_seconds)


# --- TLS

def openssl(directory, *arguments):
    subprocess.run(['openssl', *arguments], cwd=directory, check=True, stdin=subprocess.DEVNULL,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def make_certificate(directory, name, issuer='', names='', days=2):
    """NAME.pem and NAME.key; without an issuer, its own."""
    key = ('-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:P-256', '-nodes', '-keyout', f'{name}.key', '-subj',
           f'/CN={name}')
    if not issuer:
        return openssl(directory, 'req', '-x509', *key, '-days', str(days), '-out', f'{name}.pem')
    openssl(directory, 'req', '-new', *key, '-out', f'{name}.csr')
    write_tree(directory, {f'{name}.ext': names and f'subjectAltName={names}\n'})
    return openssl(directory, 'x509', '-req', '-in', f'{name}.csr', '-CA', f'{issuer}.pem', '-CAkey', f'{issuer}.key',
                   '-set_serial', str(hash(name) % 10**9), '-days', str(days), '-extfile', f'{name}.ext', '-out',
                   f'{name}.pem')


class TlsTest(RelayTest):
    @classmethod
    def setUpClass(cls):
        cls.certificates = tempfile.mkdtemp()
        cls.addClassCleanup(shutil.rmtree, cls.certificates)
        for arguments in (
                ('ca',), ('other-ca',), ('relay', 'ca', 'IP:127.0.0.1,DNS:localhost'),
                ('named', 'ca', 'DNS:relay.example'), ('expired', 'ca', 'IP:127.0.0.1', -1), ('agent', 'ca'),
                ('agent-2', 'ca'), ('stranger', 'other-ca'), ('expired-agent', 'ca', '', -1)):
            make_certificate(cls.certificates, *arguments)
        write_tree(cls.certificates, {'garbage': 'garbage'})

    def path(self, name):
        return f'{self.certificates}/{name}'

    def deliver(self, backlog, address, ca='ca.pem', **settings):
        super().deliver(backlog, address, tls=True, ca=ca and self.path(ca), **settings)

    def read(self, name):
        return read_binary(self.path(name))

    def relay(self, name='relay', mutual=False):
        """A relay with this certificate; it tells in `peers` who has spoken to it, and with which token."""
        credentials = grpc.ssl_server_credentials([(self.read(f'{name}.key'), self.read(f'{name}.pem'))],
                                                  self.read('ca.pem') if mutual else None, mutual)
        return FakeRelay(self, credentials=credentials, usual=self.note_and_acknowledge)

    def note_and_acknowledge(self, messages, context):
        self.peers.put((context.auth_context().get('x509_common_name', [b''])[0].decode(),
                        dict(context.invocation_metadata()).get('authorization')))
        return acknowledge(messages, context)

    def setUp(self):
        super().setUp()
        self.peers = queue.Queue()

    def copy(self, name, to):
        """A file of its own, put in place as a whole."""
        path = f'{self.directory}/{to}'
        shutil.copy(self.path(name), f'{path}.new')
        os.chmod(f'{path}.new', 0o600)
        os.rename(f'{path}.new', path)
        return path

    def shown(self, name):
        """What the agent shows to the relay, which may be nothing."""
        return dict(cert=self.path(f'{name}.pem'), key=self.path(f'{name}.key')) if name else {}

    def trouble(self, address, **settings):
        """The one warning about a relay to which nothing gets through."""
        backlog = self.backlog(1)
        with self.assertLogs('kubensage-agent', 'WARNING') as logged:
            self.deliver(backlog, address, **settings)
            for _ in range(3):
                self.next_pause()
            self.drain(backlog, 1)
        line, = logged.output
        self.assertNotIn('PRIVATE KEY', line)
        return line

    def test_the_roots_of_the_system_are_trusted_without_a_ca(self):
        self.patch(SYSTEM_ROOTS=('/no/roots.pem',))
        with mock.patch.dict(os.environ, SSL_CERT_FILE=self.path('ca.pem')):
            relay = self.relay()
            self.deliver(self.backlog(1), relay.address, ca=None)
            self.assertEqual(relay.next_streams(1), [[1]])
        other = self.path('other-ca.pem')
        for path, expected in ((other, f'checked against --relay-tls {other}: '),
                               ('', '--relay-tls: no system roots at /no/roots.pem')):
            with mock.patch.dict(os.environ, SSL_CERT_FILE=path):
                self.assertIn(expected, self.trouble(relay.address, ca=None))

    def test_a_certificate_that_is_not_to_be_trusted_is_one_line_with_file_and_reason(self):
        for name, ca, reason in (
                ('relay', 'other-ca.pem', 'unable to get local issuer certificate'),
                ('named', 'ca.pem', "IP address mismatch, certificate is not valid for '127.0.0.1'"),
                ('expired', 'ca.pem', 'certificate has expired')):
            with self.subTest(reason):
                self.assertIn(f"the relay's certificate, checked against --relay-ca {self.path(ca)}: {reason}",
                              self.trouble(self.relay(name).address, ca=ca))

    def test_a_file_that_does_not_do_is_one_line_with_file_and_reason(self):
        relay, key = self.relay(), self.path('agent.key')
        write_tree(self.certificates, {'token': 'two\nlines', 'empty': ''})
        for flag, name, reason in (
                ('ca', 'none', 'No such file or directory'), ('cert', 'none', 'No such file or directory'),
                ('key', 'none', 'No such file or directory'), ('token_file', 'none', 'No such file or directory'),
                ('ca', 'garbage', 'has no certificate in PEM format'), ('cert', 'garbage', 'not a'),
                ('key', 'agent-2.key', 'the key is not that'),
                ('token_file', 'empty', 'has no token'), ('token_file', 'token', 'has no token')):
            path = name if flag == 'ca' else self.path(name)
            with self.subTest(flag, name=name):
                line = self.trouble(relay.address, **{**self.shown('agent'), flag: path})
                self.assertRegex(line, f'relay {relay.address}: not connected: --relay-(cert .*, --relay-)?'
                                 f'{flag.replace("_", "-")} {self.path(name)}(, --relay-key {key})?: {reason}')

    def test_a_relay_that_hangs_up_on_our_certificate_is_one_line(self):
        """As gRPC's C core does."""
        relay = self.relay(mutual=True)
        for name in ('', 'stranger', 'expired-agent'):
            with self.subTest(name):
                about = f' (--relay-cert {self.path(name)}.pem)' if name else ' (no --relay-cert was given)'
                self.assertIn(f'the relay hangs up after the TLS handshake{about}',
                              self.trouble(relay.address, **self.shown(name)))

    def test_what_the_relay_says_of_our_certificate_is_the_reason(self):
        """As Go does, and OpenSSL."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(self.path('ca.pem'))
        context.load_cert_chain(self.path('relay.pem'), self.path('relay.key'))

        def answer_once(listener):
            with contextlib.suppress(OSError), \
                    context.wrap_socket(listener.accept()[0], server_side=True) as connection:
                connection.recv(1)

        for name, expected in (('', r'certificate required \(no --relay-cert was given\)'),
                               ('stranger', r'unknown ca \(--relay-cert .*/stranger.pem\)'),
                               ('expired-agent', r'certificate expired \(--relay-cert .*/expired-agent.pem\)')):
            with self.subTest(name), contextlib.closing(socket.create_server(('127.0.0.1', 0))) as listener:
                thread = threading.Thread(target=answer_once, args=(listener,))
                thread.start()
                address = '{}:{}'.format(*listener.getsockname())
                told = agent.explain_tls(agent.Relay(address, True, ca=self.path('ca.pem'), **self.shown(name)))
                self.assertRegex(told or '', expected)
                thread.join(PATIENCE_SECONDS)

    def test_a_relay_that_speaks_no_tls_is_one_line(self):
        self.assertIn('it does not seem to speak TLS', self.trouble(FakeRelay(self).address))

    def test_both_sides_show_certificates_and_the_agent_a_token_which_are_rotated_without_a_restart(self):
        """Another name in the relay's certificate may be given."""
        self.write({'token': 'one\n'})
        files = dict(cert=self.copy('stranger.pem', 'cert'), key=self.copy('stranger.key', 'key'))
        relay, backlog = self.relay('named', mutual=True), self.backlog(1)
        self.deliver(backlog, relay.address, token_file=f'{self.directory}/token', server_name='relay.example', **files)
        self.next_pause()
        for number, name, token in (1, 'agent', 'one'), (2, 'agent-2', 'one'), (3, 'agent-2', 'two'):
            self.copy(f'{name}.key', 'key')
            self.copy(f'{name}.pem', 'cert')
            self.write({'token': f'{token}\n'})
            if number > 1:
                self.add(backlog, number)
            self.assertEqual(self.peers.get(timeout=PATIENCE_SECONDS), (name, f'Bearer {token}'))
            self.assertEqual(relay.next_streams(1), [[number]])
        connections = backlog.connections
        self.add(backlog, 4)
        relay.next_streams(1)
        self.drain(backlog)
        self.assertEqual(backlog.connections, connections)

    def test_another_trouble_during_an_outage_is_told_as_well(self):
        backlog = self.backlog(1)
        self.hold_pauses()
        with self.assertLogs('kubensage-agent') as logged:
            super().deliver(backlog, self.relay().address, tls=True, ca=f'{self.directory}/ca')
            for name in ('other-ca.pem', 'ca.pem'):
                self.next_pause()
                self.copy(name, 'ca')
                self.resumed.put(0)
            self.drain(backlog)
        self.assertEqual([record.levelname for record in logged.records], ['WARNING', 'WARNING', 'INFO'])
        self.assertIn('No such file', logged.output[0])
        self.assertIn('unable to get local issuer', logged.output[1])

    def test_options_that_do_not_go_together_end_it_with_2(self):
        for arguments, expected in (
                (['--relay-token-file', '/t'], '--relay-token-file needs TLS: --relay-tls, or --relay-ca FILE'),
                (['--relay-server-name', 'x'], '--relay-server-name needs TLS'),
                (['--relay-cert', '/c', '--relay-tls'], '--relay-cert and --relay-key go together'),
                (['--relay-key', '/k'], '--relay-cert and --relay-key go together')):
            with self.subTest(arguments):
                run = self.main(*self.node, '--once', '--relay-address', 'relay:1', *arguments)
                self.assertEqual((run.code, expected in run.err), (2, True), run.err)
        for arguments, expected in (([], False), (['--relay-tls'], True), (['--relay-ca', '/c'], True),
                                    (['--relay-cert', '/c', '--relay-key', '/k'], True)):
            self.assertEqual(agent.parse_options(['--relay-address=r:1', *arguments], {}).relay_tls, expected)

    def exposure(self, relay):
        log = logging.getLogger('kubensage-agent')
        with self.assertLogs(log) as logged:
            log.info('at least one line')
            agent.log_exposure(relay)
        return logged.output[1:]

    def test_a_secret_that_others_can_read_is_a_warning(self):
        key, token = self.copy('agent.key', 'key'), self.copy('garbage', 'token')
        relay = agent.Relay('192.0.2.1:1', True, key=key, token_file=token)
        self.assertEqual(self.exposure(relay), [])
        for path in (key, token):
            os.chmod(path, 0o640)
        self.assertEqual(self.exposure(relay), [
            f'WARNING:kubensage-agent:{path} can be read by other users: `chmod go-r {path}` fixes it'
            for path in (key, token)])

    def test_plain_text_is_a_warning_unless_it_stays_on_the_machine(self):
        loopback = '127.0.0.1:1', 'localhost:1', '[::1]:1'
        for address in (*loopback, '10.0.0.1:1', 'relay:1', 'localhost.example:1', '127.0.0.1.example:1'):
            with self.subTest(address):
                lines = self.exposure(agent.Relay(address))
                self.assertEqual(len(lines), address not in loopback, lines)
                self.assertEqual(self.exposure(agent.Relay(address, tls=True)), [])

    def test_nothing_secret_is_logged_or_in_a_snapshot(self):
        self.write({'token': 's3cret-token\n'})
        relay = self.relay(mutual=True)
        relay.script.append(fail_at_the_end)
        run = self.main(
            *self.node, '--relay-address', relay.address, '--relay-ca', self.path('ca.pem'), '--relay-cert',
            self.path('agent.pem'), '--relay-key', self.copy('agent.key', 'key'), '--relay-token-file',
            f'{self.directory}/token', '--once', '--log-level', 'debug')
        everything = f'{read_text(f"{self.directory}/log")} {run} {relay.next_arrived(1)}'
        self.assertIn('INTERNAL: too bad', everything)
        for secret in 's3cret-token', read_text(self.path('agent.key')).splitlines()[1]:
            self.assertNotIn(secret, everything)


# --- main loop

def interrupted(process, milliseconds):
    """What comes of Ctrl-C so long after the first line of agent.py: it gives SIGINT, which Python has caught, its
    usual action back, and ctypes is among what is imported next."""
    seen = set()

    def has_begun():
        status, maps = (read_text(f'/proc/{process.pid}/{name}') for name in ('status', 'maps'))
        caught = int(re.search(r'^SigCgt:\s*(\w+)$', status, re.M).group(1), 16) >> (signal.SIGINT - 1) & 1
        seen.add(caught)
        return 'ctypes' in maps or 1 in seen and not caught

    wait_for('agent.py', has_begun)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(milliseconds / 1000)
    process.send_signal(signal.SIGINT)
    return process.result()


class MainLoopTest(Case):
    def setUp(self):
        super().setUp()
        self.runtime = FakeRuntime(self)
        self.write({'proc/sys/kernel/hostname': 'node\n'})

    def start_loop(self, *arguments, **settings):
        return self.start('--main-loop-duration', '0.1', *arguments, **settings)

    def once(self, address, *arguments):
        return self.main(*self.node, '--once', '--relay-address', address, *arguments)

    def wait_for_cycles(self, count):
        while count:
            count -= self.runtime.asked_queue.get(timeout=PATIENCE_SECONDS) == 'ListPodSandbox'

    def test_ticks_stay_on_their_grid_and_late_ones_are_skipped(self):
        self.check_table(agent.next_tick, [
            ((100, 5, 100), 105), ((100, 5, 104.9), 105), ((100, 5, 105), 110), ((100, 5, 117), 120),
            ((0.5, 0.25, 0.6), 0.75)])

    def test_without_a_relay_snapshots_are_lines_of_json_at_their_interval(self):
        """None comes before its tick; how late one may be depends on the machine."""
        process = self.start('--main-loop-duration', '0.2')
        for number in range(5):
            snapshot = process.next_snapshot()
            told = snapshot.agent_metrics
            self.assertEqual((snapshot.node_metrics.hostname, snapshot.pod_metrics[0].id, told.cycles_total),
                             ('node', 'pod', number))
            self.assertGreaterEqual(told.uptime_seconds, (number + told.skipped_ticks_total) * 0.2)
        process.terminate()
        ended = process.result()
        self.assertEqual((0, False), (ended.code, 'Traceback' in ended.err))

    def test_a_bug_costs_one_snapshot_and_the_state_starts_afresh(self):
        """Of the pods' side; half of the second cycle is done when it comes to the bug."""
        process = self.start_loop(change=textwrap.dedent("""
            usual, turns = agent.fetch_health, iter(range(1000))
            def fetch_health(*arguments):
                usual(*arguments)
                if next(turns) == 1:
                    raise RuntimeError
            agent.fetch_health = fetch_health"""))
        first, second, third = (process.next_snapshot() for _ in range(3))
        told = [(metrics.agent_metrics.sequence, metrics.agent_metrics.failures_total['bug'], len(metrics.pod_metrics),
                 metrics.node_metrics.HasField('hostname')) for metrics in (first, second, third)]
        self.assertEqual(told, [(1, 0, 1, True), (2, 0, 0, True), (3, 1, 1, True)])
        for metrics in first, third:
            metrics.node_metrics.container_runtime.ClearField('listed_at_ns')
        self.assertEqual(third.node_metrics.container_runtime, first.node_metrics.container_runtime)
        self.assertEqual(third.pod_metrics, first.pod_metrics)
        # What is asked once is asked anew.
        self.assertEqual([2, 2], [self.runtime.asked.count(method) for method in ('Version', 'ContainerStatus')])
        process.terminate()
        self.assertIn('WARNING bug: RuntimeError() in fetch_health, line ', process.result().err)

    def test_a_snapshot_is_kept_only_where_the_next_is_compared_with_it(self):
        metrics, live = wire.Metrics(), agent.Live()
        self.patch(collect_snapshot=lambda *arguments: (metrics, {}))
        for output, view, kept in ((None, None, None), ('json', None, None), ('table', None, metrics),
                                   (None, live, metrics)):
            with self.subTest(output=output, live=view), contextlib.redirect_stdout(io.StringIO()):
                sinks = agent.Sinks(output, live=view)
                self.assertIs(agent.run_cycle(LIVE, None, None, None, sinks, None)[0], kept)

    def test_a_reader_that_leaves_ends_it_quietly(self):
        for output in 'json', 'table', 'prometheus':
            with self.subTest(output):
                process = self.start_loop('--output', output)
                self.assertTrue(process.stdout.readline())
                process.stdout.close()
                self.assertEqual(process.wait(PATIENCE_SECONDS), 141)
                self.check_only_log(process.stderr.read())
        readable, writable = os.pipe()
        os.close(readable)
        with open(writable, 'w', encoding='utf-8') as pipe:
            run = self.start('--once', '--output=json', stdout=pipe, stderr=subprocess.PIPE).result()
        self.assertEqual(141, run.code)
        self.check_only_log(run.err)

    def check_only_log(self, text, error=None):
        """Nothing but lines of the log, and of those that are errors this one alone."""
        levels = re.findall(r'^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (INFO|WARNING|ERROR) (.+)$', text, re.M)
        self.assertEqual(len(text.splitlines()), len(levels), text)
        self.assertEqual([error] if error else [], [said for level, said in levels if level == 'ERROR'])

    def test_output_that_takes_nothing_ends_a_single_run_with_1_and_one_line(self):
        closed = ('sh', '-c', 'exec "$@" >&-', 'sh')
        for output in 'json', 'table', 'prometheus':
            with self.subTest(output), open('/dev/full', 'w', encoding='utf-8') as full:
                run = self.start('--once', '--output', output, stdout=full).result()
                self.assertEqual(1, run.code, run.err)
                self.check_only_log(run.err, 'stdout: No space left on device')
        run = self.start('--once', prefix=closed).result()
        self.assertEqual((1, ''), run[:2])
        self.check_only_log(run.err, 'stdout is closed')
        # What is printed is no snapshot, and there is no log yet.
        with open('/dev/full', 'w', encoding='utf-8') as full:
            for prefix, stdout, line in (((), full, 'stdout: No space left on device\n'),
                                         (closed, None, 'stdout is closed\n')):
                command = [*prefix, sys.executable, agent.__file__, '--print-daemonset']
                self.assertEqual((1, line), self.spawn(command, stdout=stdout).result()[::2])

    def test_a_relay_is_served_without_stdout(self):
        relay = FakeRelay(self)
        self.start_loop('--relay-address', relay.address, prefix=('sh', '-c', 'exec "$@" >&-', 'sh'))
        self.assertEqual(relay.next_arrived(1)[0].node_metrics.hostname, 'node')

    def test_a_full_disk_behind_stdout_costs_snapshots_and_no_connections(self):
        """It is said once, and again by nothing: not by Python either, at the end."""
        with open('/dev/full', 'w', encoding='utf-8') as full:
            process = self.start_loop(stdout=full)
            self.wait_for_cycles(4)
        process.terminate()
        ended = process.result()
        self.assertEqual(0, ended.code, ended.err)
        self.check_only_log(ended.err)
        self.assertEqual(1, ended.err.count('No space left'), ended.err)
        self.assertIn(' WARNING output: stdout: No space left on device\n', ended.err)
        self.assertEqual(self.runtime.asked.count('Version'), 1)

    def test_ctrl_c_leaves_no_traceback_at_any_moment(self):
        """A loop that has begun ends as by SIGTERM."""
        relay = FakeRelay(self)
        for arguments, moments in ((['--once', '--relay-address', closed_address(self)], (0, 20, 50, 100, 200)),
                                   (['--output=json'], (0, 20, 50, 100, 200)),
                                   (['--relay-address', relay.address, '--listen=127.0.0.1:1'], (0, 150))):
            for milliseconds in moments:
                with self.subTest(arguments, milliseconds=milliseconds):
                    run = interrupted(self.start_loop(*arguments), milliseconds)
                    self.assertNotRegex(run.err, 'Traceback|KeyboardInterrupt|Exception ignored')
                    self.assertIn(run.code, (-signal.SIGINT, 130) if '--once' in arguments else
                                  (-signal.SIGINT, 130, 0, 1))

    def first_line(self):
        """Of the log, as it begins."""
        return (f'INFO kubensage-agent {agent.__version__}, reads {self.directory}/proc, {self.directory}/sys and '
                f'{self.directory}')

    def test_the_log_says_what_it_does_and_nothing_of_each_cycle(self):
        relay, port = FakeRelay(self), free_port()
        process = self.start_loop('--relay-address', relay.address, f'--listen=127.0.0.1:{port}')
        relay.next_arrived(1)
        self.wait_for_cycles(10)
        process.terminate()
        ended = process.result()
        self.assertEqual(0, ended.code)
        lines = [line.partition(' ')[2] for line in ended.troubles if 'plain text' not in line]
        self.assertEqual(f'{self.first_line()}, delivers to {relay.address}, '
                         f'serves http://127.0.0.1:{port}/metrics and /metrics/cadvisor', lines[0])
        self.assertIn('INFO container runtime: fake 1.0 at ', lines[1])
        self.assertRegex(lines[2], f'^INFO relay {relay.address}: reached')
        self.assertEqual(['INFO stopping: SIGTERM'], lines[3:])
        self.assertEqual(ended.err, read_text(f'{self.directory}/log'))

    def test_the_log_tells_by_what_it_was_stopped_and_only_what_there_is(self):
        process = self.start_loop()
        process.next_snapshot()
        process.send_signal(signal.SIGINT)
        lines = [line.partition(' ')[2] for line in process.result().troubles]
        self.assertIn('INFO container runtime: fake 1.0 at ', lines.pop(1))
        self.assertEqual([self.first_line(), 'INFO stopping: SIGINT'], lines)

    def test_a_signal_ends_it_after_everything_is_delivered(self):
        """The relay holds the first stream back until after the signal: what has gathered behind it is delivered
        then."""
        for number in (signal.SIGTERM, signal.SIGINT):
            with self.subTest(number):
                relay = FakeRelay(self)
                relay.script.append(relay.hold)
                process = self.start_loop('--relay-address', relay.address)
                first = relay.next_arrived(1)
                self.wait_for_cycles(5)
                process.send_signal(number)
                with self.assertRaises(subprocess.TimeoutExpired):
                    process.wait(0.2)
                relay.release()
                self.assertEqual(process.wait(PATIENCE_SECONDS), 0)
                sequence = [metrics.agent_metrics.sequence
                            for metrics in first + relay.next_arrived(relay.arrived.qsize())]
                self.assertGreaterEqual(len(sequence), 5)
                self.assertEqual(sequence, list(range(1, len(sequence) + 1)))

    def test_a_relay_that_hangs_delays_neither_collection_nor_for_long_the_end(self):
        """At a signal the agent makes its last attempt, and at the next it ends at once."""
        relay = FakeRelay(self)
        relay.usual = relay.hold
        attempts, twice = (self.start_loop('--relay-address', relay.address,
                                           change=f'agent.LAST_ATTEMPT_SECONDS = {seconds}')
                           for seconds in (0.5, 1000))
        relay.next_arrived(2)
        self.wait_for_cycles(10)
        start = time.monotonic()
        attempts.terminate()
        ended = attempts.result()
        self.assertGreater(time.monotonic() - start, 0.4)
        self.assertEqual(ended.code, 0)
        self.assertIn('stopped: snapshots not acknowledged: ', ended.troubles[-1])
        wait_for('the end', lambda: twice.terminate() or twice.poll())
        self.assertEqual(twice.returncode, -signal.SIGTERM)

    def test_once_tells_by_its_exit_code_whether_the_relay_has_acknowledged(self):
        """Silent when it has, also on its way in plain text (0.0.0.0 is no loopback address, and leads here all the
        same); one line when it has not, be it refused or down. One that is too large for any relay goes with less."""
        relay, refusing, silent = (FakeRelay(self, usual=usual) for usual in (acknowledge, refuse, end_without_answer))
        huge = f'{self.directory}/run/huge.sock'
        FakeRuntime(self, huge, ListPodSandbox=list_pods(*(sandbox(f'{number:01000}') for number in range(2000))))
        for expected, address, *arguments in (
                ('', f'0.0.0.0:{relay.port}'), ('PERMISSION_DENIED: not you', refusing.address),
                ('without', silent.address), ('UNAVAILABLE', closed_address(self))):
            with self.subTest(expected):
                run = self.once(address, *arguments)
                failed = bool(expected)
                self.assertEqual((run.out, run.code, len(run.troubles)), ('', failed, failed), run.err)
                self.assertIn(expected, run.err)
        self.assertEqual(len(relay.next_arrived(1)[0].pod_metrics), 1)
        run = self.once(relay.address, '--cri-socket', huge)
        self.assertEqual((0, 1), (run.code, len(run.troubles)), run.err)
        arrived = relay.next_arrived(1)[0]
        self.assertEqual((0, 'pods', 2000), (len(arrived.pod_metrics), arrived.agent_metrics.left_out,
                                          arrived.node_metrics.container_runtime.sandboxes['SANDBOX_READY']))

    def test_once_tells_of_its_own_snapshot_whatever_older_ones_have_come_to(self):
        header = agent.Record(b'KSR1', 9, 9, 0, time.time(), b'')
        for what, header in (('too old', header._replace(wall=0)), ('damaged', header._replace(stored_bytes=8)),
                             ('too large', header._replace(stored_bytes=60_000, plain_bytes=60_000))):
            spool = f'{self.directory}/{what}'
            os.mkdir(spool, 0o700)
            agent.write_record(spool, 1, header, bytes(header.plain_bytes))
            with self.subTest(what):
                relay = FakeRelay(self, limit_bytes=50_000)
                run = self.once(relay.address, '--spool-dir', spool)
                self.assertEqual((run.code, os.listdir(spool)), (0, []), run.err)
                self.assertEqual(relay.next_arrived(1)[0].node_metrics.hostname, 'node')
        self.runtime.answers['ListPodSandbox'] = list_pods(*(sandbox(f'{number:01000}') for number in range(20)))
        run = self.once(relay.address, '--buffer-max-size', '0.01')
        self.assertEqual((run.code, relay.arrived.qsize()), (1, 0), run.err)

    @needs_root
    def test_a_name_of_etc_hosts_is_known_whatever_the_dns_does(self):
        """A server that never answers."""
        relay, dns = FakeRelay(self), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.addCleanup(dns.close)
        dns.bind(('127.0.0.77', 53))
        self.write({'resolv.conf': 'nameserver 127.0.0.77\n', 'hosts': '127.0.0.1 relay.test\n'})
        mount = 'mount --bind "$0/resolv.conf" /etc/resolv.conf; mount --bind "$0/hosts" /etc/hosts; exec "$@"'
        began = time.monotonic()
        run = self.start('--once', '--relay-address', f'relay.test:{relay.port}',
                         prefix=('unshare', '--mount', 'sh', '-ec', mount, self.directory)).result()
        self.assertEqual(0, run.code, run.err)
        self.assertLess(time.monotonic() - began, 6)

    def test_once_gives_up_on_a_relay_that_hangs(self):
        relay = FakeRelay(self)
        relay.usual = relay.hold
        self.patch(ONCE_DELIVERY_SECONDS=0.3)
        self.assertEqual(self.once(relay.address).code, 1)

    def test_once_without_a_relay_shows_one_snapshot_with_rates(self):
        self.runtime.answers['ListContainerStats'] = [list_stats(stats('app', 10**9, 0)),
                                                      list_stats(stats('app', 2 * 10**9, 6))]
        snapshot, = map(json.loads, self.main(*self.node, '--once').out.splitlines())
        cpu = snapshot['pod_metrics'][0]['container_metrics'][0]['cpu_metrics']
        self.assertEqual(int(cpu['usage_nano_cores']), 6)


class PaceTest(unittest.TestCase):
    """The loop with a clock of its own: a cycle takes as long as the test says, and waiting takes no time."""

    def test_cycles_that_take_long_skip_ticks_and_it_is_said_when_that_begins_and_ends(self):
        self.now, begun, left = 100.0, [], collections.deque([1, 4.9, 6, 12, 17, 1, 1, 1])

        def run_cycle(roots, options, state, stats, sinks, previous):
            self.stats = stats
            begun.append(round((self.now - 100) / 5))
            self.now += left.popleft()
            return None, {}

        def stopped_within(descriptor, until, live):
            self.now = max(self.now, until)
            return not left

        options = agent.parse_options([], {})
        clock = types.SimpleNamespace(**{**vars(time), 'monotonic': lambda: self.now})
        with self.assertLogs('kubensage-agent', 'DEBUG') as logged, mock.patch.multiple(
                agent, run_cycle=run_cycle, stopped_within=stopped_within, time=clock, install_signals=lambda live: 0):
            self.assertEqual(agent.run_loop(LIVE, options), 0)
        self.assertEqual(begun, [0, 1, 2, 4, 7, 11, 12, 13])
        self.assertEqual(self.stats.skipped_ticks, 1 + 2 + 3)
        self.assertEqual(logged.output[1:], [
            'WARNING:kubensage-agent:pace: a cycle takes longer than 5 s: ticks are skipped',
            'INFO:kubensage-agent:pace: recovered'])


class WatchdogTest(Case):
    def notify_socket(self, address):
        notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(notify.close)
        notify.bind(address)
        notify.settimeout(PATIENCE_SECONDS)
        return notify

    def test_systemd_hears_of_each_cycle_and_of_the_end(self):
        """On an abstract socket, whose name begins with an @."""
        FakeRuntime(self)
        self.write({'proc/meminfo': 'MemTotal'})
        name = f'kubensage-{uuid.uuid4()}'
        notify, relay = self.notify_socket(f'\0{name}'), FakeRelay(self)
        process = self.start('--main-loop-duration', '0.1', '--relay-address', relay.address,
                             environment={'NOTIFY_SOCKET': f'@{name}'})
        heard = [notify.recv(4096).decode() for _ in range(4)]
        for message in heard:
            self.assertRegex(message, '^READY=1\nWATCHDOG=1\nSTATUS=1 pod, 1 container, '
                             r'(1 snapshot|\d+ snapshots) waiting for the relay; in trouble: memory: meminfo$')
        process.terminate()
        while 'WATCHDOG' in heard[-1]:
            heard.append(notify.recv(4096).decode())
        self.assertEqual((heard[-1], process.wait(PATIENCE_SECONDS)), ('STOPPING=1', 0))

    def test_a_cycle_that_does_not_end_ends_the_agent_and_its_log_tells_where_it_stands(self):
        """One that is slow does not: nor does a process that was stopped."""
        change = ('agent.STUCK_SECONDS, agent.STUCK_INTERVALS = 0.5, 1; import time; '
                  'agent.NODE_SUBJECTS = {"cpu": lambda node, state, cycle: time.sleep(%s)}')
        run = self.start('--main-loop-duration', '0.1', change=change % 60).result()
        self.assertEqual((agent.STUCK_STATUS, 1), (run.code, run.err.count('a cycle does not end')), run.err)
        for text in (run.err, read_text(f'{self.directory}/log')):
            self.assertRegex(text, r'(?s)most recent call first.*in collect_node\n.*in run_loop\n')
        process = self.start('--main-loop-duration', '0.1', '--output', 'json', change=change % 0.2)
        process.next_snapshot()
        process.send_signal(signal.SIGSTOP)
        time.sleep(1)
        process.send_signal(signal.SIGCONT)
        process.next_snapshot()
        process.terminate()
        self.assertEqual(0, process.result().code)

    def test_the_watchdog_hears_nothing_of_cycles_that_do_not_complete(self):
        path = f'{self.directory}/notify'
        notify = self.notify_socket(path)
        notify.setblocking(False)
        with mock.patch.dict(os.environ, NOTIFY_SOCKET=path):
            for broken in ('collect_snapshot', 'hand_over'):
                with mock.patch.object(agent, 'collect_snapshot', lambda *arguments: (wire.Metrics(), {})), \
                        mock.patch.object(agent, broken, mock.Mock(side_effect=ZeroDivisionError)), \
                        self.assertRaises(ZeroDivisionError):
                    agent.run_cycle(LIVE, None, None, None, agent.Sinks(), None)
                self.assertRaises(BlockingIOError, notify.recv, 4096)

    def test_without_systemd_or_with_a_full_socket_nothing_happens(self):
        path = f'{self.directory}/notify'
        self.notify_socket(path)
        for address, count in (('', 1), (f'{self.directory}/none', 1), (path, 2000)):
            with mock.patch.dict(os.environ, NOTIFY_SOCKET=address):
                for _ in range(count):
                    agent.notify_systemd('WATCHDOG=1')

    def test_the_status_is_one_line_whatever_the_troubles_are_called(self):
        line = agent.status_line(wire.Metrics(), None, ('mount /a\nREADY=1', 'cpu'))
        self.assertEqual(line, '0 pods, 0 containers; in trouble: cpu, mount /a\\nREADY=1')
        backlog = agent.Backlog(60)
        for waiting in '1 snapshot', '2 snapshots':
            agent.add_snapshot(backlog, b'')
            self.assertIn(f' {waiting} waiting', agent.status_line(wire.Metrics(), backlog, ()))


# --- receiver

class CountTest(unittest.TestCase):
    """What has come of one run of an agent."""

    def counted(self, first, *numbers):
        """How many came, are missing, came twice; and which were shown."""
        received = agent.Received('node', first)
        shown = [number for number in numbers if agent.count_received(received, number)]
        self.missing = received.missing
        self.assertEqual(f'node: {agent.plural(received.count, "snapshot")} received, {len(received.missing)} missing, '
                         f'{received.twice} twice', agent.describe_received(received))
        return received.count, len(received.missing), received.twice, shown

    def test_table(self):
        for what, first, numbers, expected in (
                ('in order', 1, [1, 2, 3], (3, 0, 0, [1, 2, 3])),
                ('none', 1, [], (0, 0, 0, [])),
                ('a gap', 1, [1, 2, 5], (3, 2, 0, [1, 2, 5])),
                ('the first are missing', 1, [4], (1, 3, 0, [4])),
                ('the run began before the receiver', 4, [4, 5], (2, 0, 0, [4, 5])),
                ('and an older one comes late', 4, [4, 5, 2], (3, 1, 0, [4, 5, 2])),
                ('and all of them', 4, [4, 5, 2, 1, 3], (5, 0, 0, [4, 5, 2, 1, 3])),
                ('late ones', 1, [1, 4, 2, 3], (4, 0, 0, [1, 4, 2, 3])),
                ('from the last to the first', 5, [5, 4, 3, 2, 1], (5, 0, 0, [5, 4, 3, 2, 1])),
                ('twice', 1, [1, 1, 2, 2, 2], (5, 0, 3, [1, 2])),
                ('a whole stream again', 1, [1, 2, 3, 1, 2, 3, 4], (7, 0, 3, [1, 2, 3, 4])),
                ('twice, and late, with a gap', 1, [1, 5, 3, 3, 5, 7], (6, 3, 2, [1, 5, 3, 7]))):
            with self.subTest(what):
                self.assertEqual(expected, self.counted(first, *numbers))
                expected_missing = set(range(min((first, *numbers)), max(numbers, default=0) + 1)) - set(numbers)
                self.assertEqual(expected_missing, self.missing)

    def test_chance(self):
        """Against a set of all that came."""
        chance = random.Random(3)
        for _ in range(300):
            numbers = [chance.randrange(1, 20) for _ in range(chance.randrange(1, 40))]
            first = chance.choice([1, numbers[0]])
            counted = self.counted(first, *numbers)
            self.assertEqual((len(numbers), len(numbers) - len(set(numbers)), list(dict.fromkeys(numbers))),
                             (counted[0], *counted[2:]), numbers)
            self.assertEqual(set(range(min((first, *numbers)), max(numbers))) - set(numbers), self.missing, numbers)

    def test_a_jump_is_bounded(self):
        """Any number may come from the network; 2^64 of them would take all memory."""
        began = time.monotonic()
        for numbers in [1, 2 ** 64 - 1], [2 ** 64 - 1, 1], [1, 2 ** 40, 2 ** 40 + 1, 2]:
            with self.subTest(numbers):
                counted = self.counted(1, *numbers)
                self.assertEqual(len(numbers), counted[0])
                self.assertTrue(0 < counted[1] <= 1_000_000, counted)
        self.assertLess(time.monotonic() - began, PATIENCE_SECONDS)


class ReceiverTest(Case):
    """A real receiver against real agents, each a process of its own."""

    def setUp(self):
        super().setUp()
        self.write({'proc/sys/kernel/hostname': 'node\n'})
        # No other connection begins or ends there.
        self.host = '127.{}.{}.{}'.format(*(random.SystemRandom().randrange(1, 255) for _ in range(3)))
        self.address, self.count = f'{self.host}:{free_port()}', itertools.count()

    def receiver(self, *arguments, wait=True, prefix=(), **settings):
        """Its log is in the file of its name."""
        name = f'{self.directory}/receiver{next(self.count)}'
        with open(f'{name}.log', 'w', encoding='utf-8') as log:
            process = self.spawn([*prefix, sys.executable, agent.__file__, '--receive', self.address, *arguments],
                                 **{'stderr': log, **settings})
        process.log = f'{name}.log'
        if wait:
            self.wait_for_log(process, 'receives snapshots at ')
        return process

    def wait_for_log(self, process, text):
        wait_for(text, lambda: text in read_text(process.log) or process.poll() is not None)
        self.assertIn(text, read_text(process.log))

    def start_agent(self, *arguments, **settings):
        return self.start('--main-loop-duration', '0.1', '--relay-address', self.address, *arguments,
                          **{'stdout': subprocess.DEVNULL, 'stderr': subprocess.DEVNULL, **settings})

    def end(self, process, number=signal.SIGTERM):
        """Its end by a signal, and the log."""
        process.send_signal(number)
        out, _ = process.communicate(timeout=PATIENCE_SECONDS)
        text = read_text(process.log)
        self.assertEqual((0, False), (process.returncode, 'Traceback' in text), text)
        return out, [line.partition(' ')[2] for line in text.splitlines()]

    def snapshot(self, sequence, run_id='r', hostname='h', began=2e9):
        """Of a run that began long after the receiver."""
        return wire.Metrics(node_metrics=dict(hostname=hostname), agent_metrics=dict(
            sequence=sequence, run_id=run_id, version='2', start_time_seconds=began))

    def send(self, *messages, method=agent.SEND_METRICS):
        """As an agent does; each is a message or its bytes."""
        data = [message if isinstance(message, bytes) else message.SerializeToString() for message in messages]
        with grpc.insecure_channel(self.address) as channel:
            channel.stream_unary(method)(iter(data), timeout=PATIENCE_SECONDS)

    def test_each_snapshot_is_a_line_and_at_the_end_they_are_counted(self):
        receiver = self.receiver()
        sender = self.start_agent()
        snapshots = [receiver.next_snapshot() for _ in range(5)]
        sender.terminate()
        self.assertEqual(0, sender.wait(PATIENCE_SECONDS))
        out, log = self.end(receiver)
        snapshots += [json_format.Parse(line, wire.Metrics()) for line in out.splitlines()]
        self.assertEqual(list(range(1, len(snapshots) + 1)), [each.agent_metrics.sequence for each in snapshots])
        self.assertEqual({'node'}, {each.node_metrics.hostname for each in snapshots})
        run_id, = {each.agent_metrics.run_id for each in snapshots}
        self.assertEqual(log, [
            f'INFO receives snapshots at {self.address} and stores nothing: --relay-address={self.address} sends them '
            'here',
            f'INFO node: agent {agent.__version__}, run {run_id}', 'INFO stopping: SIGTERM',
            f'INFO node: {len(snapshots)} snapshots received, 0 missing, 0 twice'])

    def test_what_the_agent_sent_once_is_one_snapshot(self):
        receiver = self.receiver()
        self.assertEqual(0, self.start('--once', '--relay-address', self.address).result().code)
        out, log = self.end(receiver, signal.SIGINT)
        self.assertEqual('node', json.loads(out)['node_metrics']['hostname'])
        self.assertEqual('INFO node: 1 snapshot received, 0 missing, 0 twice', log[-1])

    def test_gaps_and_repetitions_are_said_and_shown_once(self):
        receiver = self.receiver()
        self.send(*map(self.snapshot, (1, 2)))
        self.send(*map(self.snapshot, (2, 5)))
        self.send(*(self.snapshot(number, 'before', 'other', 1) for number in (7, 8)))
        # The Go agent numbers nothing.
        self.send(*[wire.Metrics(node_metrics=dict(hostname='go'))] * 3)
        self.send(self.snapshot(3))
        out, log = self.end(receiver)
        shown = [json_format.Parse(line, wire.Metrics()) for line in out.splitlines()]
        self.assertEqual('h 1, h 2, h 5, other 7, other 8, go 0, go 0, go 0, h 3', ', '.join(
            f'{metrics.node_metrics.hostname} {metrics.agent_metrics.sequence}' for metrics in shown))
        self.assertEqual([line for line in log if ' received, ' in line], [
            'WARNING h: 4 snapshots received, 2 missing, 1 twice',
            'WARNING h: 5 snapshots received, 1 missing, 1 twice',
            # At the end.
            'INFO h: 5 snapshots received, 1 missing, 1 twice',
            'INFO other: 2 snapshots received, 0 missing, 0 twice',
            'INFO go: 3 snapshots received, 0 missing, 0 twice'])

    def test_a_second_receiver_at_one_port_is_one_line_and_1(self):
        first = self.receiver()
        second = self.receiver(wait=False)
        self.assertEqual(1, second.wait(PATIENCE_SECONDS))
        line, = read_text(second.log).splitlines()
        self.assertRegex(line, f'ERROR --receive {self.address}: .*not available')
        # Nor beside an address that is of the whole machine.
        everywhere = self.spawn([sys.executable, agent.__file__, '--receive', self.address.rpartition(':')[2]]).result()
        self.assertEqual((1, 1), (everywhere.code, len(everywhere.troubles)), everywhere.err)
        self.end(first)

    def test_a_table_for_people(self):
        receiver = self.receiver('--output=table')
        sender = self.start_agent()
        text = ''
        while 'node' not in text:
            line = receiver.stdout.readline()
            self.assertTrue(line)
            text += line
        sender.terminate()
        out, _ = self.end(receiver)
        self.assertNotIn('{', text + out)
        self.assertNotIn('\x1b', text + out)

    def test_its_end_when_its_reader_has_what_it_wanted(self):
        """As `| head -1`. What it cannot show it does not acknowledge."""
        receiver = self.receiver()
        self.send(self.snapshot(1))
        self.assertEqual(1, receiver.next_snapshot().agent_metrics.sequence)
        receiver.stdout.close()
        for _ in range(3):
            self.assertRaises(grpc.RpcError, self.send, self.snapshot(2))
        self.assertEqual(141, receiver.wait(PATIENCE_SECONDS))
        self.assertNotRegex(read_text(receiver.log), 'Traceback|Exception|ERROR')

    def test_where_it_cannot_write_it_acknowledges_nothing_and_ends_with_1(self):
        """Not the same snapshot either, which comes again at once."""
        with open('/dev/full', 'w', encoding='utf-8') as full:
            for line, settings in (('ERROR stdout is closed', dict(prefix=('sh', '-c', 'exec "$@" >&-', 'sh'))),
                                   ('ERROR stdout: No space left on device', dict(stdout=full))):
                with self.subTest(line):
                    receiver = self.receiver(**settings)
                    for _ in range(3):
                        self.assertRaises(grpc.RpcError, self.send, self.snapshot(1))
                    self.assertEqual(1, receiver.wait(PATIENCE_SECONDS), read_text(receiver.log))
                    text = read_text(receiver.log)
                    self.assertTrue(text.endswith(f'{line}\n'), text)
                    self.assertNotRegex(text, 'Traceback|Exception')

    def test_what_is_no_snapshot_costs_its_stream_alone(self):
        receiver = self.receiver()
        good = wire.Metrics(node_metrics=dict(hostname='good'))
        for message in (b'\xff\xff\xff', b'\x0a\x7f') * 4:
            with self.assertRaises(grpc.RpcError) as raised:
                self.send(good, message)
            self.assertIn(raised.exception.code(), (grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT))
            self.send(good)
        # Nobody else's method is there, and an empty stream is none that does harm.
        with self.assertRaises(grpc.RpcError) as raised:
            self.send(b'', method='/metrics.MetricsService/Other')
        self.assertEqual(grpc.StatusCode.UNIMPLEMENTED, raised.exception.code())
        self.send()
        out, log = self.end(receiver)
        self.assertLessEqual(8, out.count('\n'))
        self.assertEqual([], [line for line in log if not line.startswith('INFO')])

    def test_ctrl_c_leaves_no_traceback_at_any_moment(self):
        for milliseconds in 0, 50, 150:
            with self.subTest(milliseconds=milliseconds):
                run = interrupted(self.receiver(wait=False, stderr=subprocess.PIPE), milliseconds)
                self.assertNotRegex(run.err, 'Traceback|KeyboardInterrupt|Exception ignored')
                self.assertIn(run.code, (-signal.SIGINT, 130, 0))

    def test_its_end_does_not_wait_for_streams_that_go_on(self):
        receiver, done = self.receiver(), threading.Event()
        self.addCleanup(done.set)

        def messages():
            yield self.snapshot(1).SerializeToString()
            done.wait(PATIENCE_SECONDS)

        with grpc.insecure_channel(self.address) as channel:
            call = channel.stream_unary(agent.SEND_METRICS).future(messages(), timeout=3 * PATIENCE_SECONDS)
            self.assertEqual(1, receiver.next_snapshot().agent_metrics.sequence)
            _, log = self.end(receiver)
            # It was not acknowledged, and the agent sends it again.
            self.assertIsInstance(call.exception(PATIENCE_SECONDS), grpc.RpcError)
            done.set()
        self.assertEqual('INFO h: 1 snapshot received, 0 missing, 0 twice', log[-1])

    def test_a_name_of_the_host_is_no_command_of_the_terminal(self):
        receiver = self.receiver()
        self.send(self.snapshot(1, '\x1b]0;x\x07', 'a\n\x1b[2Jb'))
        _, log = self.end(receiver)
        self.assertNotRegex('\n'.join(log), '[\x1b\x07]|^b')
        self.assertIn('a\\n\\x1b[2Jb: 1 snapshot received, 0 missing, 0 twice', log[-1])

    def printed(self, processes):
        """Of each run the numbers that receivers have printed, whole lines alone."""
        numbers = collections.defaultdict(set)
        for process in processes:
            for line in read_text(process.output).splitlines(keepends=True):
                if line.endswith('\n'):
                    told = json.loads(line)['agent_metrics']
                    numbers[told['run_id']].add(int(told['sequence']))
        return numbers

    def test_nothing_is_lost_whoever_is_killed(self):
        """Each snapshot that an agent has shown is in its spool by then."""
        receivers, agents = [], []

        def next_receiver():
            path = f'{self.directory}/out{len(receivers)}'
            with open(path, 'w', encoding='utf-8') as out:
                receivers.append(self.receiver(wait=False, stdout=out))
            receivers[-1].output = path

        def next_agent():
            path = f'{self.directory}/taken{len(agents)}'
            with open(path, 'w', encoding='utf-8') as out:
                agents.append(self.start_agent('--spool-dir', f'{self.directory}/spool', '--output=json', stdout=out))
            agents[-1].output = path

        def wait_for_more(what, processes):
            before = self.printed(processes)
            wait_for(what, lambda: self.printed(processes) != before)

        next_receiver()
        next_agent()
        chance = random.Random(4)
        for turn in range(30 if LONG else 5):
            wait_for_more('another snapshot to arrive', receivers)
            # The kill comes at any moment of a cycle.
            with contextlib.suppress(subprocess.TimeoutExpired):
                receivers[-1].wait(chance.uniform(0, 0.2))
            if turn % 3 != 1:
                receivers[-1].end()
            if turn % 3 == 2:
                # What it has taken meanwhile is in the spool alone.
                wait_for_more('another snapshot to be taken', agents)
            if turn % 3:
                agents[-1].end()
                next_agent()
            if turn % 3 != 1:
                next_receiver()
        agents[-1].terminate()
        self.assertIn(agents[-1].wait(PATIENCE_SECONDS), (0, -signal.SIGTERM))
        wait_for('an empty spool', lambda: not self.start(
            '--once', '--relay-address', self.address, '--spool-dir', f'{self.directory}/spool').wait(PATIENCE_SECONDS)
            and not glob.glob(f'{self.directory}/spool/*'), 3 * PATIENCE_SECONDS)
        receivers[-1].terminate()
        self.assertEqual(0, receivers[-1].wait(PATIENCE_SECONDS))
        taken, printed = self.printed(agents), self.printed(receivers)
        self.assertLessEqual(set(taken), set(printed))
        for number, (run_id, numbers) in enumerate(printed.items()):
            with self.subTest(number):
                self.assertEqual(set(range(1, max(numbers) + 1)), numbers)
                self.assertLessEqual(taken[run_id], numbers)


# --- too few threads

def free_port():
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return probe.getsockname()[1]


class ThreadShortageTest(Case):
    """The agent and its helper in a cgroup with a limit of threads. grpc's C core goes on without threads that it
    cannot start, and then waits forever."""
    SECONDS = 5 if LONG else 3

    def setUp(self):
        super().setUp()
        self.group, self.renewals = self.new_group(), itertools.count()
        self.write({'proc/sys/kernel/hostname': 'node\n', 'proc/1/mountinfo': '1 0 8:1 / / rw - ext4 /dev/vda rw\n'})

    def new_group(self):
        """Of cgroup v1 or v2; it is gone when all that ran in it is."""
        reasons = []
        for top in '/sys/fs/cgroup/pids', '/sys/fs/cgroup':
            group = f'{top}/kubensage-test-{uuid.uuid4()}'
            try:
                os.mkdir(group)
                self.addCleanup(wait_for, 'the end of the group', lambda: self.remove_group(group))
                if os.path.exists(f'{group}/pids.max'):
                    return group
                reasons.append(f'{top} has no pids controller')
            except OSError as error:
                reasons.append(f'{top}: {error.strerror}')
        self.skipTest('; '.join(reasons))

    @staticmethod
    def remove_group(group):
        with contextlib.suppress(OSError):
            os.rmdir(group)
        return not os.path.exists(group)

    def limit(self, count):
        with open(f'{self.group}/pids.max', 'w', encoding='ascii') as file:
            file.write(str(count))

    def present_threads(self):
        """The fewest within a second: a stream to the relay has a thread as long as it lasts."""
        end, seen = time.monotonic() + 1, set()
        while time.monotonic() < end:
            seen.add(int(read_text(f'{self.group}/pids.current')))
            time.sleep(0.005)
        return min(seen)

    def start_in_group(self, *arguments, **settings):
        """Its errors go into a file."""
        self.errors = open(f'{self.directory}/errors', 'w', encoding='utf-8')
        self.addCleanup(self.errors.close)
        return self.start('--main-loop-duration=0.5', *arguments, stdout=subprocess.DEVNULL, stderr=self.errors,
                          prefix=('sh', '-c', f'echo $$ >{self.group}/cgroup.procs && exec "$@"', 'sh'), **settings)

    def said(self):
        return read_text(self.errors.name)

    def churn(self):
        """Each list has three pods, one of them new, with two containers each."""
        def names(turn):
            return [f'pod{number}' for number in range(turn, turn + 3)]

        def pods(request):
            self.turn = next(self.renewals)
            return list_pods(*map(sandbox, names(self.turn)))

        def containers():
            return [(f'{pod}-{name}', pod) for pod in names(self.turn) for name in 'ab']

        return FakeRuntime(
            self, ListPodSandbox=pods,
            ListContainers=lambda request: list_containers(*(container(*both) for both in containers())),
            ListContainerStats=lambda request: list_stats(*(
                stats(name, (1 + self.turn) * 10**9, self.turn) for name, _ in containers())))

    def scrape(self, port):
        """The status, or None where the agent does not answer."""
        connection = http.client.HTTPConnection('127.0.0.1', port, timeout=2)
        with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
            connection.request('GET', '/metrics')
            answer = connection.getresponse()
            answer.read()
            return answer.status

    def drain(self):
        self.arrived += [self.relay.arrived.get_nowait() for _ in range(self.relay.arrived.qsize())]

    def wait_for_snapshot(self, seconds):
        """One that is taken from now on."""
        began, now_ns = time.monotonic(), time.time_ns()
        while True:
            try:
                self.arrived.append(self.relay.arrived.get(timeout=max(0, began + seconds - time.monotonic())))
            except queue.Empty:
                self.fail(f'no new snapshot within {seconds} s:\n{self.said()[-2000:]}')
            if self.arrived[-1].agent_metrics.timestamp_ns > now_ns:
                return

    def sequences(self):
        """Of each run in the order in which they began; what came twice counts once."""
        runs = {}
        for metrics in self.arrived:
            runs.setdefault(metrics.agent_metrics.run_id, set()).add(metrics.agent_metrics.sequence)
        return list(runs.values())

    def go_short(self, process, port, spare):
        """No more threads than there are, and so many, while Prometheus asks."""
        self.limit(self.present_threads() + spare)
        end = time.monotonic() + self.SECONDS
        while time.monotonic() < end:
            self.assertIn(self.scrape(port), (200, None))
            self.assertIsNone(process.poll(), self.said())
            time.sleep(0.1)
        self.drain()
        self.limit('max')
        self.wait_for_snapshot(3)
        self.assertEqual(200, self.scrape(port))

    def test_a_shortage_costs_no_snapshot_and_does_not_delay_the_end(self):
        runtime, port = self.churn(), free_port()
        for spool in (True, False) if LONG else (True,):
            with self.subTest(spool=spool):
                self.relay, self.arrived, arguments = FakeRelay(self), [], []
                if spool:
                    arguments = ['--spool-dir', f'{self.directory}/spool']
                process = self.start_in_group('--relay-address', self.relay.address, f'--listen=127.0.0.1:{port}',
                                              *arguments)
                self.wait_for_snapshot(PATIENCE_SECONDS)
                wait_for('the statistics', lambda: 'ListContainerStats' in runtime.asked)
                for spare in range(3):
                    self.go_short(process, port, spare)
                self.limit(self.present_threads())
                time.sleep(1)
                began = time.monotonic()
                process.terminate()
                self.assertEqual(0, process.wait(PATIENCE_SECONDS), self.said())
                self.assertLess(time.monotonic() - began, 5)
                self.limit('max')
                if spool:
                    self.assertEqual(0, self.start('--once', '--relay-address', self.relay.address, *arguments)
                                     .result().code)
                    self.assertEqual([], os.listdir(f'{self.directory}/spool'))
                self.drain()
                first = self.sequences()[0]
                self.assertEqual(set(range(1, max(first) + 1)), first)
                for trouble in 'Traceback', 'a bug', 'dropp':
                    self.assertNotIn(trouble, re.sub('dropped so far: 0', '', self.said()))

    def test_a_relay_that_comes_back_in_a_shortage_is_found_after_it(self):
        """There is no runtime whose connection would keep grpc's threads: without a connection they may have ended."""
        def grpc_threads(process):
            with contextlib.suppress(OSError):
                return [name for name in os.listdir(f'/proc/{process.pid}/task')
                        if read_text(f'/proc/{process.pid}/task/{name}/comm') == 'event_engine\n']

        for spare in range(5) if LONG else (2,):
            with self.subTest(spare=spare):
                address = closed_address(self)
                process = self.start_in_group('--relay-address', address,
                                              change='agent.backoff_seconds = lambda failures: 3')
                wait_for('an attempt', lambda: 'UNAVAILABLE' in self.said())
                with contextlib.suppress(TimeoutError):
                    wait_for('the end of the threads', lambda: grpc_threads(process) == [], 5)
                self.limit(int(read_text(f'{self.group}/pids.current')) + spare)
                self.relay, self.arrived = FakeRelay(self, port=int(address.rpartition(':')[2])), []
                time.sleep(4)
                self.limit('max')
                self.wait_for_snapshot(5)
                process.terminate()
                self.assertEqual(0, process.wait(7), self.said())

    def test_at_the_start_it_ends_with_one_line_or_works(self):
        """grpc has 4 to 16 threads for its events."""
        self.churn()
        self.relay = FakeRelay(self)
        for count in itertools.count(1, 1 if LONG else 4):
            self.limit(count)
            process = self.start_in_group('--relay-address', self.relay.address)
            wait_for(f'an end or a snapshot with {count} threads',
                     lambda: process.poll() is not None or self.relay.arrived.qsize())
            if process.poll() is None:
                break
            self.assertEqual((1, 1), (process.returncode, len(self.said().splitlines())), (count, self.said()))
            self.assertIn('pids.max', self.said())
        self.assertIn(count, range(10, 50))
        self.assertEqual([], [line for line in self.said().splitlines() if 'thread' in line])
        process.terminate()
        self.assertEqual(0, process.wait(PATIENCE_SECONDS))


# --- nothing too much

class FrugalTest(Case):
    def run_python(self, program):
        run = self.spawn([sys.executable, '-c', f'{IMPORT_AGENT}\n{program}']).result()
        self.assertEqual(run.code, 0, run.err)
        return run.out.split()

    def test_what_only_some_need_is_imported_only_then(self):
        names = ('_ssl', 'ssl', '_hashlib', 'html', 'difflib', 'gzip', 'google.protobuf.json_format', 'grpc.aio',
                 'http.server')
        self.assertEqual([], self.run_python(f'print(*(name for name in {names} if name in sys.modules))'))

    def test_ssl_is_not_imported_for_a_server_without_tls_and_can_be_later(self):
        self.assertEqual(['True', 'False', 'True'], self.run_python(
            'agent.http_server(agent.Published("127.0.0.1:0", 5)).server_close()\n'
            'print("http.server" in sys.modules, "ssl" in sys.modules)\n'
            'import ssl; print(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).check_hostname)'))

    def test_the_garbage_collector_is_spared_what_the_start_has_left(self):
        frozen, = self.run_python('import gc; agent.spare_memory(); print(gc.get_freeze_count())')
        self.assertGreater(int(frozen), 10_000)

    def test_a_libc_without_mallopt_is_no_trouble(self):
        self.assertEqual([], self.run_python('import types; agent.libc = types.SimpleNamespace; agent.spare_memory()'))


# --- nothing grows

class LeakTest(Case):
    """Many cycles in this process: the agent's threads and open files stay as many as they were."""

    def used(self):
        threads = [thread for thread in threading.enumerate() if not thread.name.startswith('ThreadPoolExecutor')]
        return len(threads), count_open_files()

    def check(self, relay, backlog):
        FakeRuntime(self)
        options = agent.parse_options(['--cri-socket', self.socket], {})
        state, stats, sinks, used = agent.State(10), agent.AgentStats(), agent.Sinks(backlog=backlog), []
        with mock.patch.object(agent, 'backoff_seconds', lambda failures: 0.001):
            sender = agent.start_delivery(backlog, relay)
            for number in range(60):
                agent.run_cycle(LIVE, options, state, stats, sinks, None)
                # A stream may be under way: what counts is what stays.
                used += [self.used()] * (number >= 15)
            agent.close_backlog(backlog, sender, PATIENCE_SECONDS)
        agent.forget_runtime(state.runtime)
        for numbers in zip(*used):
            self.assertLessEqual(min(numbers[-11:]), max(numbers[:11]))

    def test_cycles_with_a_relay(self):
        backlog = agent.Backlog(600)
        self.check(agent.Relay(FakeRelay(self).address), backlog)
        self.assertEqual(len(backlog.snapshots), 0)

    def test_cycles_while_the_relay_is_down_with_a_spool(self):
        os.mkdir(f'{self.directory}/spool')
        backlog = agent.Backlog(600, spool=f'{self.directory}/spool')
        self.check(agent.Relay(closed_address(self)), backlog)
        self.assertEqual((len(backlog.snapshots), backlog.memory_bytes), (60, 0))
        self.assertGreater(backlog.connections, 20)

    def test_messages_of_pods_do_not_grow(self):
        """Whatever changes again and again; protobuf's memory is glibc's, Python's own is not. 24 kB is what less than
        a byte a container and cycle comes to, and the memory of a pod that is renewed moves by some kB."""
        class Mallinfo(ctypes.Structure):
            _fields_ = [(name, ctypes.c_size_t) for name in (
                'arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost').split()]

        mallinfo = getattr(agent.libc(), 'mallinfo2', None)
        if mallinfo is None:
            self.skipTest('needs mallinfo2 of glibc 2.33')
        mallinfo.restype = Mallinfo
        names, state, used, roots = [f'{number:064x}' for number in range(6)], agent.RuntimeState(), [], self.write(V2)
        for number in range(450):
            odd, cycle = number % 2, agent.Cycle(roots, 5, {}, number)
            self.write({'proc/7/net/dev': net_dev(*[number] * (1 + odd))})
            for name in '.', *names[:5]:
                self.write(below(f'sys/fs/cgroup/kubepods/pod{UID}/{name}', {
                    **group(number, 5), 'io.stat': odd * IO_STAT, 'cgroup.procs': '7\n'}))
            agent.update_pods(state.pods, [sandbox(POD, uid=UID)], [container(name, POD) for name in names], cycle)
            agent.collect_groups(state, cycle)
            for found in state.pods[POD].containers.values():
                if found.group:
                    agent.fill_usage_from_cgroup(found)
                else:
                    agent.fill_usage_from_cri(found, stats('', number, number) if odd else None)
            info = mallinfo()
            used.append(info.uordblks + info.hblkhd)
        self.assertLess(max(used[-100:]) - max(used[100:200]), 24_000)


# --- faults, all of them at once

def play_relay(port, path, seed):
    """A relay, as a process to be killed. It holds what it has written to the file before it answered; with a seed,
    it refuses, hesitates, cuts streams, and loses answers."""
    chance, file = random.Random(seed), os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    troubles = ('none', 'none', 'none', 'none', 'refuse', 'cut', 'reset', 'too large', 'slow', 'answer lost',
                'no answer') if seed else ('none',)

    def behave(messages, context):
        trouble = chance.choice(troubles)
        if trouble == 'refuse':
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, 'too many streams')
        if trouble == 'cut':
            collections.deque(itertools.islice(messages, chance.randrange(5)), 0)
            context.abort(grpc.StatusCode.UNAVAILABLE, 'cut')
        if trouble == 'reset':
            collections.deque(itertools.islice(messages, 1), 0)
            context.abort(grpc.StatusCode.INTERNAL, 'the stream was reset')
        arrived = list(messages)
        if trouble == 'too large' and len(arrived) > 2:
            # A proxy, in the C core's words.
            context.abort(grpc.StatusCode.UNKNOWN, 'Received http2 header with status: 413')
        if trouble == 'slow':
            threading.Event().wait(chance.uniform(0, 1))
        # A whole stream at once: a relay that is killed holds all of it or nothing.
        os.write(file, ''.join(f'{metrics.node_metrics.hostname} {metrics.agent_metrics.sequence} '
                               f'{len(metrics.pod_metrics)}\n' for metrics in arrived).encode())
        if trouble == 'answer lost':
            context.abort(grpc.StatusCode.UNAVAILABLE, 'the answer is lost')
        yield from () if trouble == 'no answer' else [b'']

    FakeRelay(unittest.TestCase(), usual=behave, port=port).server.wait_for_termination()


def play_runtime(path, seed):
    """A runtime, as a process to be killed, which with a seed now and then is slow, fails, or talks nonsense."""
    chance, runtime = random.Random(seed), FakeRuntime(unittest.TestCase(), path)
    usual = runtime.answer

    def answer(method, request, context):
        trouble = chance.random() if seed else 1
        if trouble < 0.05:
            threading.Event().wait(chance.uniform(0, 1))
        elif trouble < 0.1:
            context.abort(grpc.StatusCode.INTERNAL, 'bad luck')
        return b'\xff\xff' if 0.1 < trouble < 0.12 else usual(method, request, context)

    runtime.answer = answer
    runtime.server.wait_for_termination()


class FaultTest(Case):
    """What was taken, the agent tells on the watchdog's socket, a datagram a cycle; what arrived, the relay's file
    tells, where the host's name is the number of the agent."""

    def setUp(self):
        super().setUp()
        self.chance, self.held = random.Random(1), f'{self.directory}/held'
        self.taken, self.with_pods = collections.Counter(), collections.Counter()
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(self.notify.close)
        self.notify.bind(f'{self.directory}/notify')
        # Each datagram then comes with the process id of its sender.
        self.notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self.port = int(closed_address(self).rpartition(':')[2])
        self.log = open(f'{self.directory}/stderr', 'w+', encoding='utf-8')
        self.addCleanup(self.log.close)
        # Of each agent.
        self.process_ids = []

    def play(self, call, reliable):
        seed = None if reliable else self.chance.randrange(1, 10**6)
        return self.spawn([sys.executable, '-c', f'import test_agent; seed = {seed}; test_agent.{call}'], cwd=HERE,
                          stdout=None, stderr=None)

    def start_relay(self, reliable=False):
        return self.play(f'play_relay({self.port}, {self.held!r}, seed)', reliable)

    def start_runtime(self, reliable=False):
        return self.play(f'play_runtime({self.socket!r}, seed)', reliable)

    def start_spooling_agent(self):
        self.write({'proc/sys/kernel/hostname': f'{len(self.process_ids)}\n'})
        process = self.start('--relay-address', f'127.0.0.1:{self.port}', '--main-loop-duration', '0.2', '--spool-dir',
                             f'{self.directory}/spool', stdout=subprocess.DEVNULL, stderr=self.log,
                             environment={'NOTIFY_SOCKET': f'{self.directory}/notify'})
        self.process_ids.append(process.pid)
        return process

    def watch(self, seconds, enough=lambda: False):
        """Count the snapshots taken, by process, for so long or until it is enough; and those of them with pods."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and not enough():
            self.notify.settimeout(max(0.001, min(0.2, end - time.monotonic())))
            with contextlib.suppress(socket.timeout):
                text, ancillary, _, _ = self.notify.recvmsg(4096, socket.CMSG_SPACE(12))
                pid, _, _ = struct.unpack('iii', ancillary[0][2])
                self.taken[pid] += b'WATCHDOG=1' in text
                self.with_pods[pid] += b'STATUS=1 pod' in text

    def make_trouble(self, seconds):
        """All kinds of it in turns, in another order each turn; the processes that run at the end."""
        start = {'relay': self.start_relay, 'runtime': self.start_runtime, 'agent': self.start_spooling_agent}
        running = {name: start[name]() for name in start}
        turn, end = [], time.monotonic() + seconds
        while time.monotonic() < end:
            turn = turn or self.chance.sample(['relay stops', 'runtime stops', 'relay dies', 'runtime dies',
                                               'agent dies'], 5)
            name, what = turn.pop().split()
            self.watch(self.chance.uniform(0.1, 0.8))
            if what == 'stops':
                running[name].send_signal(signal.SIGSTOP)
                self.watch(self.chance.uniform(0.1, 1))
                running[name].send_signal(signal.SIGCONT)
                continue
            running[name].end()
            self.watch(self.chance.uniform(0, 0.5))
            running[name] = start[name]()
        return running

    def calm_down(self, running):
        """A relay and a runtime that do their duty; the agent ends once it sees the pod, and delivers everything."""
        for name, start in (('relay', self.start_relay), ('runtime', self.start_runtime)):
            running[name].end()
            start(reliable=True)
        with contextlib.closing(socket.socket()) as probe:
            wait_for('the relay', lambda: probe.connect_ex(('127.0.0.1', self.port)) == 0)
        pid = running['agent'].pid
        before = self.with_pods[pid]
        self.watch(PATIENCE_SECONDS, lambda: self.with_pods[pid] > before)
        running['agent'].terminate()
        self.watch(PATIENCE_SECONDS, lambda: running['agent'].poll() is not None)
        self.assertEqual(running['agent'].wait(PATIENCE_SECONDS), 0)
        self.watch(0.1)

    def test_every_snapshot_taken_arrives_whatever_happens(self):
        seconds = 120 if LONG else 4
        self.calm_down(self.make_trouble(seconds))
        lines = [tuple(map(int, line.split())) for line in read_text(self.held).splitlines()]
        held = {(number, sequence) for number, sequence, _ in lines}
        missing = [(number, sequence) for number, process_id in enumerate(self.process_ids)
                   for sequence in range(1, self.taken[process_id] + 1) if (number, sequence) not in held]
        taken, agents, with_pods = sum(self.taken.values()), len(self.process_ids), sum(self.with_pods.values())
        sys.stderr.write(f'[{seconds} s of faults: {taken} snapshots by {agents} agents, {len(missing)} missing, '
                         f'{len(lines) - len(held)} came twice: the relay had them and did not say so] ')
        self.assertEqual(missing, [])
        self.assertGreaterEqual(sum(pods for _, _, pods in lines), with_pods)
        self.assertGreater(with_pods, 0)
        self.assertGreater(taken, agents)
        self.assertEqual(os.listdir(f'{self.directory}/spool'), [])
        self.log.seek(0)
        self.assertNotIn('Traceback', self.log.read())


# --- a real runtime

RUNTIME_TOOLS = ('containerd', 'containerd-shim-runc-v2', 'runc', 'ctr', 'gcc', 'unshare', 'setpriv')
IMAGE = 'localhost/kubensage-test:1'
MIB = 1 << 20

# What runs in the containers, and as their pause: `load pause`, `load spin PERCENT` of one CPU, `load alloc MIB`,
# `load write MIB` into the writable layer, `load cache MIB` (written to a file on disk), `load direct MIB` (past the
# page cache), `load child MIB` (allocated by a child), `load await MIB` (allocated when SIGUSR1 has come), `load breed
# MIB` (allocated by a child, and again by another one, each time that SIGUSR1 has come), `load send COUNT` datagrams of
# 1,000 bytes to all, `load exit CODE`.
LOAD_C = r'''
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <signal.h>
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
    if (!strcmp(mode, "await") || !strcmp(mode, "breed")) {
        sigset_t signals;
        sigemptyset(&signals);
        sigaddset(&signals, SIGUSR1);
        sigprocmask(SIG_BLOCK, &signals, NULL);
        /* Never called: SigCgt in /proc/PID/status tells that it waits. */
        signal(SIGUSR1, exit);
        do sigwaitinfo(&signals, NULL); while (*mode == 'b' && fork());
        mode = "alloc";
    }
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

# containerd in a PID namespace of its own, with its own mounts: when the init is killed, which starts containerd again
# when that is killed, the kernel ends all shims and containers, and forgets the mounts; setpriv and unshare have it
# killed should this process be killed.
# The tmpfs makes overlayfs work wherever the directory is; the sandboxes' files, /etc/hosts among them, stay on disk,
# since only a file on disk has pages that are not in the working set. /run: shims put their sockets into
# /run/containerd, whatever `state` says; the CNI library makes its notes in /var/lib. mounts/proc is the outer /proc,
# for an agent that is to see the pods' mounts (nsenter --mount).
CONTAINERD = ('setpriv', '--pdeathsig', 'KILL', 'unshare', '--mount', '--pid', '--fork', '--kill-child',
              'sh', '-euc', '''
mount -t tmpfs tmpfs "$0/mounts"
mkdir -p "$0/mounts/proc" "$0/mounts/root/io.containerd.grpc.v1.cri/sandboxes"
mount --bind "$0/sandboxes" "$0/mounts/root/io.containerd.grpc.v1.cri/sandboxes"
mount --bind /proc "$0/mounts/proc"
mount -t proc proc /proc
for directory in run var/lib; do
    mkdir -p "$0/mounts/upper/$directory" "$0/mounts/work/$directory"
    mount -t overlay -o "lowerdir=/$directory,upperdir=$0/mounts/upper/$directory,workdir=$0/mounts/work/$directory" \\
        overlay "/$directory"
done
while :; do containerd --config "$0/config.toml" || sleep 1; done
''')

# restrict_oom_score_adj: without CAP_SYS_RESOURCE runc dies on the negative value of a sandbox. opt, conf_dir:
# containerd would make /opt/containerd and /etc/cni/net.d. Layers are measured every stats_collect_period, 10 s by
# default.
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
    config: cri.PodSandboxConfig


class RealRuntime(NamedTuple):
    directory: str
    socket: str
    # The init of its namespace.
    init: int
    channel: grpc.Channel
    # Below each controller of cgroup v1; below the mount point with v2.
    cgroup: str


def why_no_runtime():
    """The reason to skip."""
    missing = [tool for tool in RUNTIME_TOOLS if not shutil.which(tool)]
    if missing:
        return f'not installed: {", ".join(missing)}'
    if os.geteuid() != 0:
        return 'not root'
    allowed = subprocess.run(['unshare', '--mount', '--pid', '--fork', 'true'], stderr=subprocess.PIPE, text=True)
    return allowed.stderr.strip() or None


def wait_for(what, condition, seconds=PATIENCE_SECONDS):
    """The first true value of condition; it is asked again until then."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise TimeoutError(f'{what}: not within {seconds} s')


def build_tar(**files):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as archive:
        for name, data in files.items():
            archive.addfile(tar_member(name, size=len(data), mode=0o755), io.BytesIO(data))
    return buffer.getvalue()


def build_image(program):
    """The archive `docker save` would write for an image of one file."""
    architecture = {'x86_64': 'amd64', 'aarch64': 'arm64'}.get(os.uname().machine, os.uname().machine)
    layer = build_tar(load=program)
    config = json.dumps({'architecture': architecture, 'os': 'linux', 'config': {'Entrypoint': ['/load']}, 'rootfs': {
        'type': 'layers', 'diff_ids': [f'sha256:{hashlib.sha256(layer).hexdigest()}']}}).encode()
    manifest = json.dumps([{'Config': 'config.json', 'RepoTags': [IMAGE], 'Layers': ['layer.tar']}]).encode()
    return build_tar(**{'manifest.json': manifest, 'config.json': config, 'layer.tar': layer})


def import_image(runtime):
    """Build it, hand it to containerd, and wait until the CRI plugin, which hears of it by an event, has it too."""
    program, archive = f'{runtime.directory}/load', f'{runtime.directory}/image.tar'
    subprocess.run(['gcc', '-static', '-x', 'c', '-o', program, '-'], input=LOAD_C, text=True, check=True)
    write_tree('/', {archive: build_image(read_binary(program))})
    subprocess.run(['ctr', '-a', runtime.socket, '-n', 'k8s.io', 'images', 'import', archive],
                   stdout=subprocess.DEVNULL, check=True)
    list_images = runtime.channel.unary_unary('/runtime.v1.ImageService/ListImages')
    wait_for('image in the CRI plugin', lambda: IMAGE.encode() in list_images(b'', timeout=10))


def call_runtime(runtime, method, **fields):
    """`ListContainers` with the fields of ListContainersRequest gives a ListContainersResponse."""
    request, answer = getattr(cri, f'{method}Request'), getattr(cri, f'{method}Response')
    return runtime.channel.unary_unary(
        f'/runtime.v1.RuntimeService/{method}', request_serializer=request.SerializeToString,
        response_deserializer=answer.FromString)(request(**fields), timeout=60)


def make_container(runtime, sandbox_id, sandbox, load):
    config = cri.ContainerConfig(
        metadata=dict(name=load.name, attempt=load.attempt), image=dict(image=IMAGE),
        args=load.arguments, labels={**sandbox.labels, 'io.kubernetes.container.name': load.name},
        annotations={'io.kubernetes.container.restartCount': str(load.attempt)},
        linux=dict(resources=load.resources,
                   security_context=dict(namespace_options=sandbox.linux.security_context.namespace_options)))
    container_id = call_runtime(runtime, 'CreateContainer', pod_sandbox_id=sandbox_id, config=config,
                                sandbox_config=sandbox).container_id
    if load.started:
        call_runtime(runtime, 'StartContainer', container_id=container_id)
    return container_id


def make_pod(runtime, namespace, name, loads, attempt=0, network=cri.NODE, life=''):
    """A pod as the kubelet makes it, usually in the host's network, which needs no CNI plugin. Each life has a uid of
    its own."""
    uid = str(uuid.uuid5(uuid.NAMESPACE_DNS, f'{life}{name}.{namespace}'))
    metadata = cri.PodSandboxMetadata(name=name, uid=uid, namespace=namespace, attempt=attempt)
    cgroup = f'{runtime.cgroup}/kubepods/burstable/pod{uid}'
    options = dict(network=network, pid=cri.CONTAINER, ipc=cri.POD)
    config = cri.PodSandboxConfig(
        metadata=metadata, labels={'io.kubernetes.pod.name': name, 'io.kubernetes.pod.namespace': namespace,
                                   'io.kubernetes.pod.uid': uid},
        annotations={'kubernetes.io/config.source': 'api'},
        linux=dict(cgroup_parent=f'/{cgroup}', security_context=dict(namespace_options=options)))
    sandbox_id = call_runtime(runtime, 'RunPodSandbox', config=config).pod_sandbox_id
    return Pod(sandbox_id, metadata, {load.name: make_container(runtime, sandbox_id, config, load) for load in loads},
               cgroup, config)


def child_pid(process):
    """The process that unshare has started and waits for. ProcessLookupError: there is none."""
    if process.poll() is None:
        for pid in read_text(f'/proc/{process.pid}/task/{process.pid}/children').split():
            return int(pid)
    raise ProcessLookupError('containerd has ended')


def containerd_pid(runtime):
    children = read_text(f'/proc/{runtime.init}/task/{runtime.init}/children').split()
    return next(int(pid) for pid in children if read_text(f'/proc/{pid}/comm') == 'containerd\n')


def end_containerd(process):
    """Kill the init of the namespace, which is gone once all that ran below it is gone, and unshare after it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(child_pid(process), signal.SIGKILL)
        process.wait(30)
    process.kill()
    process.wait(30)


def remove_cgroups(name):
    for top in glob.glob(f'/sys/fs/cgroup/{name}') + glob.glob(f'/sys/fs/cgroup/*/{name}'):
        for directory, _, _ in os.walk(top, topdown=False):
            with contextlib.suppress(FileNotFoundError):
                os.rmdir(directory)


def bridge_of(mark):
    """Interfaces have names of 15 characters at most."""
    return mark.replace('kubensage-', 'ks')[:15]


def leftovers(mark):
    """Processes and mounts that mention the mark, which is in a runtime's directory and in its cgroup; its cgroups and
    its bridge; and what the CNI library may have noted."""
    found = glob.glob(f'/sys/fs/cgroup/{mark}') + glob.glob(f'/sys/fs/cgroup/*/{mark}')
    found += glob.glob(f'/sys/class/net/{bridge_of(mark)}') + glob.glob(f'/var/lib/cni/**/*{mark}*', recursive=True)
    for path in sum((glob.glob(f'/proc/[0-9]*/{name}') for name in ('cmdline', 'cgroup', 'mountinfo')), []):
        with contextlib.suppress(OSError):
            found += [path] if mark in read_text(path) else []
    return found


@contextlib.contextmanager
def real_runtime(layers_seconds=1):
    """A containerd of our own with an image and no pods; nothing of it is left afterwards."""
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix='kubensage-'))
        cgroup = os.path.basename(directory)
        for name in 'mounts', 'sandboxes', 'cni':
            os.mkdir(f'{directory}/{name}')
        write_tree(directory, {'config.toml': CONTAINERD_CONFIG.format(
            directory=directory, image=IMAGE, plugins=CNI_PLUGINS, layers_seconds=layers_seconds)})
        if CNI_PLUGINS:
            bridge = bridge_of(cgroup)
            write_tree(directory, {'cni/1.conflist': CNI_CONFIG.format(directory=directory, bridge=bridge)})
            # There is none before the first pod.
            stack.callback(subprocess.run, ['ip', 'link', 'del', bridge], stderr=subprocess.DEVNULL)
        log = stack.enter_context(open(f'{directory}/containerd.log', 'w+'))
        stack.callback(remove_cgroups, cgroup)
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

# What the kernel says of one container.
Cgroup = collections.namedtuple(
    'Cgroup', 'usage_ns memory_bytes working_set_bytes rss_bytes page_faults major_page_faults')


def read_cgroup_file(cgroup, v1, v2):
    """cpuacct.usage below any controller of v1 ("cpu,cpuacct" is one on most machines), or cpu.stat of v2."""
    return read_text((glob.glob(f'/sys/fs/cgroup/*/{cgroup}/{v1}') + [f'/sys/fs/cgroup/{cgroup}/{v2}'])[0])


def read_cgroup(cgroup):
    cpu = read_cgroup_file(cgroup, 'cpuacct.usage', 'cpu.stat').split()
    memory = int(read_cgroup_file(cgroup, 'memory.usage_in_bytes', 'memory.current'))
    stat = dict(line.split() for line in read_cgroup_file(cgroup, 'memory.stat', 'memory.stat').splitlines())
    inactive, rss, faults, major = (int(stat.get(f'total_{v1}', stat.get(v2, 0))) for v1, v2 in (
        ('inactive_file', 'inactive_file'), ('rss', 'anon'), ('pgfault', 'pgfault'), ('pgmajfault', 'pgmajfault')))
    return Cgroup(int(cpu[0]) if len(cpu) == 1 else int(cpu[1]) * 1000, memory, memory - inactive, rss, faults, major)


def containers_by_id(metrics):
    return {container.id: container for pod in metrics.pod_metrics for container in pod.container_metrics}


def identity(pod):
    return pod.namespace, pod.name, pod.uid, pod.attempt


def set_cgroup_fields(container):
    cpu, memory = container.cpu_metrics, container.memory_metrics
    return Cgroup(cpu.usage_core_nano_seconds.value, memory.usage_bytes.value, memory.working_set_bytes.value,
                  memory.rss_bytes.value, memory.page_faults.value, memory.major_page_faults.value)


# The kubelet's cAdvisor, as rules select it.
CADVISOR = 'job="kubelet", metrics_path="/metrics/cadvisor", image!=""'
STOCK_RULES = (
    ('node_namespace_pod_container:container_cpu_usage_seconds_total:sum_irate',
     f'sum by (namespace, pod, container) (irate(container_cpu_usage_seconds_total{{{CADVISOR}}}[1m]))'),
    *((f'node_namespace_pod_container:{name}', f'{name}{{{CADVISOR}}}') for name in (
        'container_memory_working_set_bytes', 'container_memory_rss', 'container_memory_cache')),
    ('namespace_pod:network_receive:rate', 'sum by (namespace, pod) (rate(container_network_receive_bytes_total{'
     'job="kubelet", metrics_path="/metrics/cadvisor"}[1m]))'),
    ('instance:node_num_cpu:sum',
     'count without (cpu, mode) (node_cpu_seconds_total{job="node-exporter",mode="idle"})'),
    ('instance:node_cpu_utilisation:rate1m', '1 - avg without (cpu) (sum without (mode) (rate('
     'node_cpu_seconds_total{job="node-exporter", mode=~"idle|iowait|steal"}[1m])))'),
    ('instance:node_memory_utilisation:ratio', '1 - node_memory_MemAvailable_bytes{job="node-exporter"} / '
     'node_memory_MemTotal_bytes{job="node-exporter"}'),
    ('instance_device:node_disk_io_time_seconds:rate1m',
     'rate(node_disk_io_time_seconds_total{job="node-exporter", device!=""}[1m])'),
    ('instance:node_network_receive_bytes_excluding_lo:rate1m',
     'sum without (device) (rate(node_network_receive_bytes_total{job="node-exporter", device!="lo"}[1m]))'))


class Prometheus:
    """A real one that scrapes and evaluates each second, and ends with the test."""

    def __init__(self, test, jobs, rules):
        self.port = free_port()
        jobs, rules = (''.join(f'{indent}- {{{entry}}}\n' for entry in entries)
                       for indent, entries in (('  ', jobs), ('      ', rules)))
        test.write({
            'prometheus.yml': 'global: {scrape_interval: 1s, evaluation_interval: 1s}\nrule_files: [rules.yml]\n'
                              f'scrape_configs:\n{jobs}',
            'rules.yml': f'groups:\n  - name: test\n    rules:\n{rules}'})
        test.spawn(['prometheus', f'--config.file={test.directory}/prometheus.yml', '--log.level=error',
                    f'--storage.tsdb.path={test.directory}/tsdb', f'--web.listen-address=127.0.0.1:{self.port}'],
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def ask(self, path, **parameters):
        """The data of its answer, which is not there while it starts: it refuses, or says 503 in plain text."""
        asking = http.client.HTTPConnection('127.0.0.1', self.port, timeout=PATIENCE_SECONDS)
        with contextlib.closing(asking), contextlib.suppress(OSError, http.client.HTTPException):
            asking.request('GET', f'/api/v1/{path}?{urllib.parse.urlencode(parameters)}')
            answer = asking.getresponse()
            return json.load(answer)['data'] if answer.status == http.HTTPStatus.OK else {}
        return {}

    def query(self, expression):
        """Its samples, each with metric and value, or values."""
        return self.ask('query', query=expression).get('result', [])

    def values(self, expression):
        """By namespace, pod and container the numbers."""
        return {tuple(sample['metric'].get(name, '') for name in ('namespace', 'pod', 'container')):
                float(sample['value'][1]) for sample in self.query(expression)}


class RealRuntimeTest(Tmux, Case):
    """One containerd for all; its bridge and its groups are gone when it is."""
    not_running = {'failed', 'waiting', 'hog'}

    @classmethod
    def setUpClass(cls):
        reason = why_no_runtime()
        if reason:
            raise unittest.SkipTest(reason)
        stack = contextlib.ExitStack()
        cls.addClassCleanup(stack.close)
        cls.runtime, cls.known = stack.enter_context(real_runtime()), {}
        cls.count_io()
        limited = {'memory_limit_in_bytes': 32 * MIB}
        wanted = [
            ('default', 'web', (Load('half', ('spin', '50')), Load('memory', ('alloc', '20'))), 1),
            ('batch', 'job', (Load('failed', ('exit', '3'), attempt=2), Load('side', ('cache', '2'))), 0),
            ('default', 'fresh', (Load('waiting', started=False),), 0),
            ('kube-system', 'store', (Load('writer', ('write', '3')),), 0),
            ('limits', 'busy', (Load('tenth', ('spin', '100'),
                                     resources={'cpu_period': 100_000, 'cpu_quota': 10_000, 'cpu_shares': 102}),
                                Load('disk', ('direct', '8'))), 0),
            ('limits', 'oom', (Load('hog', ('alloc', '64'), resources=limited),
                               Load('again', ('alloc', '4'), 1, resources=limited),
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
        cls.cgroups = {name: f'{pod.cgroup}/{container}' for pod in cls.pods
                       for name, container in pod.containers.items()}
        for name, reason in (('failed', 'Error'), ('hog', 'OOMKilled')):
            wait_for(f'end of {name}', lambda: call_runtime(
                cls.runtime, 'ContainerStatus', container_id=cls.ids[name]).status.reason == reason)
        wait_for('the kill in survivor', lambda: 'oom_kill 1\n' in read_cgroup_file(
            cls.cgroups['survivor'], 'memory.oom_control', 'memory.events'))

    @classmethod
    def count_io(cls):
        """Since Linux 6.10, blkio.throttle.* of cgroup v1 counts nothing before the disk has had some limit, be it this
        one."""
        cls.counts_io = not os.path.isdir('/sys/fs/cgroup/blkio')
        number = os.stat(cls.runtime.directory).st_dev
        sysfs = os.path.realpath(f'/sys/dev/block/{os.major(number)}:{os.minor(number)}')
        disk = os.path.dirname(sysfs) if os.path.exists(f'{sysfs}/partition') else sysfs
        if not cls.counts_io and os.path.exists(f'{disk}/dev'):
            write_tree(f'/sys/fs/cgroup/blkio/{cls.runtime.cgroup}', {
                'blkio.throttle.write_bps_device': f'{read_text(f"{disk}/dev").strip()} {1 << 40}\n'})
            cls.counts_io = True

    def setUp(self):
        super().setUp()
        self.node = ['--cri-socket', self.runtime.socket, '--output', 'json']

    def once(self, *arguments):
        run = self.main(*self.node, '--once', *arguments)
        self.assertEqual((run.code, run.err), (0, ''))
        return json_format.Parse(run.out, wire.Metrics())

    def snapshot(self):
        """One run for all tests of what stays as it is."""
        self.known['snapshot'] = self.known.get('snapshot') or self.once()
        return self.known['snapshot']

    def record(self):
        """The snapshots of one agent while containerd runs, while it is stopped, and when it runs again; and its
        log."""
        if 'record' not in self.known:
            process = self.start('--main-loop-duration', '0.5')
            parts = []
            pid = containerd_pid(self.runtime)
            self.addCleanup(os.kill, pid, signal.SIGCONT)
            for number in (signal.SIGCONT, signal.SIGSTOP, signal.SIGCONT):
                os.kill(pid, number)
                parts.append([process.next_snapshot() for _ in range(5 if not parts else 3)])
            process.terminate()
            ended = process.result()
            self.assertEqual(ended.code, 0)
            self.known['record'] = (*parts, ended.err)
        return self.known['record']

    def test_prometheus_makes_of_it_what_rules_for_a_cluster_ask_for(self):
        """The rules are of the shapes that those of dashboards have: they match on job, metrics_path and image."""
        self.tool('prometheus', '--version')
        served = free_port()
        job = "job_name: {0}, honor_labels: true, static_configs: [{{targets: ['127.0.0.1:%d']}}]" % served
        path = 'metrics_path: /metrics/cadvisor, relabel_configs: [' \
               '{source_labels: [__metrics_path__], target_label: metrics_path}]'
        self.start('--listen', f'127.0.0.1:{served}', '--main-loop-duration', '0.5', stdout=subprocess.DEVNULL)
        query = Prometheus(
            self, [job.format('node-exporter'), f'{job.format("kubelet")}, {path}'],
            [f'record: {name}, expr: {json.dumps(expression)}' for name, expression in STOCK_RULES]).values
        half = ('default', 'web', 'half')
        cpu = wait_for('the rate', lambda: query(f'{STOCK_RULES[0][0]} > 0').get(half) and query(STOCK_RULES[0][0]))
        self.assertTrue(0.2 < cpu[half] < 0.8, cpu)
        for name, _ in STOCK_RULES[1:]:
            with self.subTest(name):
                self.assertTrue(wait_for(name, lambda: query(name)))
        memory = query('node_namespace_pod_container:container_memory_working_set_bytes')
        self.assertTrue(20 * MIB < memory['default', 'web', 'memory'] < 40 * MIB, memory)
        self.assertEqual({1.0}, {*query('up').values()})
        # Nothing was dropped as a duplicate or out of order.
        self.assertEqual({0.0}, {*query(
            'sum(increase(prometheus_target_scrapes_sample_duplicate_timestamp_total[1m])) or vector(0)').values()})

    def test_the_live_view_has_first_who_was_killed_who_crashed_and_who_is_throttled(self):
        self.node = self.node[:2]
        self.open(110, 40)
        # Periods are counted from the second snapshot on.
        lines = self.see('^ limits +busy +tenth .* throttled$')
        rows = [line[1:].split()[:3] for line in lines if re.match('[> ](batch|default|kube-system|limits) ', line)]
        self.assertEqual(['limits', 'oom', 'hog'], rows[0])
        self.assertRegex('\n'.join(lines), '(?m)^>limits +oom +hog .* OOM \\d+')
        ranks = [rows.index(row) for row in (
            ['limits', 'oom', 'hog'], ['batch', 'job', 'failed'], ['limits', 'busy', 'tenth'],
            ['batch', 'job', 'side'])]
        self.assertEqual(sorted(ranks), ranks)
        self.press('Enter')
        self.see('^last exit  137 OOMKilled|^last exit  0 OOMKilled')
        # Which pod fills the disk: two keys.
        self.press('Escape', '<')
        self.see('by disk')

    def test_pods_and_containers(self):
        """All READY pods with what they were made with, in the agent's order; the stopped sandbox is not one of
        them."""
        start = time.time_ns()
        pods = self.snapshot().pod_metrics
        expected = sorted(self.pods, key=lambda pod: (pod.metadata.namespace, pod.metadata.name))
        self.assertEqual(
            [(pod.id, *identity(pod), pod.state,
              [(container.name, container.id) for container in pod.container_metrics]) for pod in pods],
            [(pod.id, *identity(pod.metadata), 'SANDBOX_READY', list(pod.containers.items())) for pod in expected])
        states = dict.fromkeys(self.ids, ('CONTAINER_RUNNING', 0, IMAGE))
        states.update(failed=('CONTAINER_EXITED', 2, IMAGE), hog=('CONTAINER_EXITED', 0, IMAGE),
                      waiting=('CONTAINER_CREATED', 0, IMAGE), again=('CONTAINER_RUNNING', 1, IMAGE))
        for pod in pods:
            for container in pod.container_metrics:
                self.assertEqual((container.state, container.attempt, container.image), states[container.name])
                self.assertTrue(start - 600 * 10**9 < pod.created_at < container.created_at < start)

    def test_containers_at_rest_equal_their_cgroups(self):
        """Every number is the kernel's."""
        names = 'memory', 'side', 'writer'
        for source in ('cgroup', 'cri'):
            expected, containers = self.settled(
                lambda: [read_cgroup(self.cgroups[name]) for name in names],
                lambda: containers_by_id(self.once('--container-stats', source)))
            found = [containers[self.ids[name]] for name in names]
            with self.subTest(source):
                self.assertEqual([source] * 3, [container.stats_source for container in found])
                self.assertEqual(expected, list(map(set_cgroup_fields, found)))

    def test_both_sources_say_the_same(self):
        """What is counted lies between two answers of the runtime; what is measured differs by what moves meanwhile."""
        sources = ['cri', 'cgroup', 'cri']
        snapshots = [containers_by_id(self.once('--container-stats', source)) for source in sources]
        for name in self.ids.keys() - self.not_running:
            with self.subTest(name):
                found = [containers[self.ids[name]] for containers in snapshots]
                self.assertEqual(sources, [container.stats_source for container in found])
                counted, *measured = zip(Cgroup._fields, *map(set_cgroup_fields, found))
                for field, low, value, high in (counted, *measured[3:]):
                    self.assertTrue(low - 1000 < value <= high, (field, low, value, high))
                left, limit, _ = (container.memory_metrics.available_bytes.value for container in found)
                for field, low, value, _ in (('available_bytes', left, limit, 0), *measured[:3]):
                    self.assertAlmostEqual(low, value, delta=MIB, msg=field)
                self.assertEqual(name in ('again', 'survivor'), limit > 0)

    def test_a_tenth_of_a_cpu(self):
        """And not more; on a crowded machine the container gets less."""
        tenth = [containers_by_id(metrics)[self.ids['tenth']] for metrics in self.record()[0]]
        for before, after in zip(tenth, tenth[1:]):
            used_ns = after.cpu_metrics.usage_core_nano_seconds.value - before.cpu_metrics.usage_core_nano_seconds.value
            elapsed_seconds = (after.cgroup.timestamp_ns - before.cgroup.timestamp_ns) / 1e9
            self.assertAlmostEqual(used_ns / elapsed_seconds, after.cpu_metrics.usage_nano_cores.value, delta=1e6)
        first, last = tenth[0].cgroup, tenth[-1].cgroup
        spent_usec = last.cpu.stat.usage_usec - first.cpu.stat.usage_usec
        self.assertTrue(0.01 < spent_usec * 1000 / (last.timestamp_ns - first.timestamp_ns) < 0.12, (first, last))
        cpu, first, last = last.cpu, first.cpu.stat, last.cpu.stat
        self.assertTrue(0 < first.nr_throttled < last.nr_throttled <= last.nr_periods, (first, last))
        # In each period it waits for what is left of 100 ms, on more CPUs at once than one.
        self.assertTrue(last.nr_throttled * 10_000 < last.throttled_usec < last.nr_throttled * 100_000 * os.cpu_count(),
                        last)
        self.assertEqual((10_000, 100_000), (cpu.max.quota_usec, cpu.max.period_usec))
        self.assertIn((cpu.shares, cpu.weight), ((102, 0), (0, 4)))

    def test_a_kill_for_want_of_memory(self):
        """On cgroup v1 a kill counts in the container's own group alone, which goes with the container."""
        containers = containers_by_id(self.snapshot())
        hog, again, survivor = (containers[self.ids[name]] for name in ('hog', 'again', 'survivor'))
        self.assertEqual((137, 'OOMKilled', 0, 1),
                         (hog.status.exit_code, hog.status.reason, hog.restart_count, again.restart_count))
        self.assertTrue(hog.created_at < hog.status.started_at_ns < hog.status.finished_at_ns < time.time_ns())
        self.assertFalse(again.status.HasField('exit_code'))
        self.assertEqual((0, 1), (again.cgroup.memory.events.oom_kill, survivor.cgroup.memory.events.oom_kill))
        self.assertEqual([32 * MIB] * 2, [container.cgroup.memory.max for container in (again, survivor)])
        pod = next(pod for pod in self.snapshot().pod_metrics if pod.name == 'oom')
        self.assertEqual(('Burstable', os.path.dirname(self.cgroups['hog'])), (pod.qos_class, pod.cgroup.path))
        self.assertEqual(0 if os.path.isdir('/sys/fs/cgroup/memory') else 2, pod.cgroup.memory.events.oom_kill)

    def test_block_io(self):
        if not self.counts_io:
            self.skipTest('the directory is on no disk of its own')

        def written():
            devices = containers_by_id(self.once())[self.ids['disk']].cgroup.io.stat
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
        methods = {method.method: method.calls_total for method in self.record()[0][-1].agent_metrics.cri_methods}
        self.assertEqual((1, 5), (methods['ListContainerStats'], methods['ListContainers']))

    def test_half_a_cpu(self):
        """The first rate comes from the runtime or is absent, the others are the difference of the agent's two
        samples."""
        cgroup = self.cgroups['half']
        process = self.start('--main-loop-duration', '0.5', '--container-stats', 'cri')
        samples, before, start = [], read_cgroup(cgroup), time.time_ns()
        for _ in range(4):
            cpu = containers_by_id(process.next_snapshot())[self.ids['half']].cpu_metrics
            after, end = read_cgroup(cgroup), time.time_ns()
            usage, instant = cpu.usage_core_nano_seconds.value, cpu.timestamp
            self.assertTrue(before.usage_ns <= usage <= after.usage_ns, (before, usage, after))
            self.assertTrue(start <= instant <= end, (start, instant, end))
            samples.append((instant, usage, cpu.usage_nano_cores.value))
            before, start = after, instant
            # A second poller, which spoils the rate that containerd itself computes.
            call_runtime(self.runtime, 'ListContainerStats')
        for (instant, usage, _), (later, more, rate) in zip(samples, samples[1:]):
            self.assertEqual(rate, (more - usage) * 10**9 // (later - instant))
        # On a crowded machine the container gets less, and makes up for it later.
        self.assertTrue(0 < statistics.mean(rate for _, _, rate in samples[1:]) < 1.1e9, samples)

    def test_not_running_have_no_cpu_and_no_memory(self):
        for container in containers_by_id(self.snapshot()).values():
            known = [container.HasField(name) for name in ('cpu_metrics', 'memory_metrics')]
            self.assertEqual(known, [container.name not in self.not_running] * 2)

    def test_writable_layer_of_3_mib(self):
        """containerd measures layers in the background, here once a second; the directory is the snapshotter's."""
        def measured():
            layers = [containers_by_id(self.once())[self.ids[name]] for name in ('writer', 'failed')]
            return all(layer.HasField('file_system_metrics') for layer in layers) and [
                layer.file_system_metrics for layer in layers]
        full, empty = wait_for('writable layer', measured)
        self.assertTrue(3 * MIB <= full.used_bytes.value < 3 * MIB + 65536, full)
        self.assertTrue(empty.used_bytes.value < 65536, empty)
        self.assertEqual(full.mountpoint,
                         f'{self.runtime.directory}/mounts/root/io.containerd.snapshotter.v1.overlayfs')
        # The file, the directory, and the mount points runc makes for /dev, /etc, /proc and /sys.
        self.assertEqual(full.inodes_used.value, empty.inodes_used.value + 1)
        self.assertTrue(abs(full.timestamp - time.time_ns()) < 10 * 10**9)

    def test_stopped_containerd(self):
        """The snapshots keep their pace; the pods stay as they were listed, and their numbers are fresh."""
        running, stopped, again, log = self.record()
        for metrics in running + stopped + again:
            self.assertEqual(len(self.pods), len(metrics.pod_metrics))
        for metrics in stopped[1:]:
            self.assertTrue(metrics.node_metrics.HasField('total_memory'))
            self.assertLess(metrics.agent_metrics.collection_seconds, 3)
        listed = [metrics.node_metrics.container_runtime.listed_at_ns for metrics in (*stopped[1:], *again[1:])]
        self.assertEqual((1, len(again)), (len({*listed[:len(stopped) - 1]}), len({*listed})))
        for metrics in stopped[1:] + again[1:]:
            self.assertTrue(containers_by_id(metrics)[self.ids['half']].cpu_metrics.HasField('usage_nano_cores'))
        for said in ('WARNING container runtime:', 'container runtime: recovered'):
            self.assertEqual(1, log.count(said), log)

    def test_nothing_stays_behind(self):
        """What real_runtime starts ends with it, also when what it is used for fails."""
        with self.assertRaises(ZeroDivisionError), real_runtime() as runtime:
            make_pod(runtime, 'default', 'short', (Load('running'), Load('waiting', started=False)))
            self.assertTrue(leftovers(runtime.cgroup))
            raise ZeroDivisionError
        self.assertEqual(leftovers(runtime.cgroup), [])
        self.assertFalse(os.path.exists(runtime.directory))


class RealRuntimeAwayTest(Case):
    """A containerd that is stopped, killed, and started again; a pod without its pause process."""
    AWAY_SECONDS = 20 if LONG else 3

    def setUp(self):
        super().setUp()
        reason = why_no_runtime()
        if reason:
            self.skipTest(reason)
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.runtime = stack.enter_context(real_runtime())
        self.pods = [make_pod(self.runtime, 'default', name, (Load('busy', ('spin', '20')), Load('idle')))
                     for name in ('a', 'b')]
        self.node = ['--cri-socket', self.runtime.socket, '--output', 'json', '--main-loop-duration', '0.5']
        self.agent = self.start()
        self.used, self.listed = {}, []

    def snapshot(self):
        """The next one, which has all pods, and more CPU time of those that run; whether the list is a new one."""
        metrics = self.agent.next_snapshot()
        found = containers_by_id(metrics)
        self.assertEqual({id for pod in self.pods for id in pod.containers.values()}, {*found})
        for pod in self.pods:
            used = found[pod.containers['busy']].cpu_metrics.usage_core_nano_seconds.value
            self.assertGreater(used, self.used.get(pod.id, 0))
            self.used[pod.id] = used
        self.listed.append(metrics.node_metrics.container_runtime.listed_at_ns)
        return metrics

    def snapshots(self, seconds):
        """How many lists so many seconds of snapshots are from."""
        before = len(self.listed)
        for _ in range(int(seconds / 0.5)):
            self.snapshot()
        return len({*self.listed[before:]})

    def test_pods_stay_with_fresh_numbers(self):
        self.assertEqual(4, self.snapshots(2))
        pid = containerd_pid(self.runtime)
        os.kill(pid, signal.SIGSTOP)
        # The first may have been taken before.
        self.assertLessEqual(self.snapshots(self.AWAY_SECONDS), 2)
        os.kill(pid, signal.SIGCONT)
        self.assertGreaterEqual(self.snapshots(2), 3)
        os.kill(pid, signal.SIGKILL)
        # The init starts it again after a second, and its plugins take another one.
        self.assertLess(self.snapshots(1), 3)
        last = self.listed[-1]
        wait_for('lists of the new containerd', lambda: self.snapshot() and self.listed[-1] != last)
        self.assertGreaterEqual(self.snapshots(2), 3)

    def test_container_without_its_pause_process_stays(self):
        self.snapshot()
        pod = self.pods[0]
        os.kill(int(read_cgroup_file(f'{pod.cgroup}/{pod.id}', 'cgroup.procs', 'cgroup.procs')), signal.SIGKILL)
        wait_for('the sandbox to be not ready', lambda: {
            (found.id, found.state) for found in self.snapshot().pod_metrics} == {
                (pod.id, 'SANDBOX_NOTREADY'), (self.pods[1].id, 'SANDBOX_READY')})
        self.snapshots(1)


# --- OOM kills and exits

OTHER_UID = '0b7c51f2-3d8e-4a86-8b0b-54a4c9f6c0de'
SANDBOX = 'd4' * 32


def events(version, kills):
    """By file what a group's memory controller says of its kills."""
    if version == 1:
        return {'memory.oom_control': f'oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n'}
    return {'memory.events': f'low 0\nhigh 0\nmax 7\noom {kills + 1}\noom_kill {kills}\noom_group_kill 0\n'}


class KillCase(RuntimeCase):
    """Pods as the kernel, the runtime and the kubelet have them, change by change; the agent looks when it is asked
    what it has counted. Containers are known by their ids, which are told by whoever makes them."""
    STATS, VERSION = 'cgroup', 2
    # With memory_localevents a group counts its own tasks' kills alone, as it always does on v1.
    LOCAL_EVENTS = False

    def setUp(self):
        super().setUp()
        self.sandboxes, self.containers, self.statuses, self.kills = {}, {}, {}, {}
        self.numbers, self.usec, self.seen = itertools.count(1), itertools.count(10**6), {}
        self.write(group_of(self.VERSION, 'other'))
        self.runtime = FakeRuntime(
            self, ContainerStatus=self.status, ListContainerStats=list_stats(),
            ListPodSandbox=lambda request: list_pods(*self.sandboxes.values()),
            ListContainers=lambda request: list_containers(*self.containers.values()))
        self.make_sandbox()

    def status(self, request):
        return status_of(**self.statuses[cri.ContainerStatusRequest.FromString(request).container_id])

    def make_sandbox(self, id=SANDBOX, uid=UID, attempt=0):
        self.sandboxes[id] = cri.PodSandbox(id=id, state=cri.SANDBOX_READY, created_at=next(self.numbers), metadata={
            'name': 'pod', 'namespace': 'default', 'uid': uid, 'attempt': attempt})
        self.kills.setdefault(uid, 0)
        self.kills[id] = 0
        self.write_group(id)

    def make(self, name, restarts=0, sandbox=SANDBOX):
        """A container that runs: its id."""
        number = next(self.numbers)
        id = f'{number:064x}'
        self.containers[id] = cri.Container(
            id=id, pod_sandbox_id=sandbox, state=cri.CONTAINER_RUNNING, created_at=number,
            metadata={'name': name, 'attempt': restarts}, annotations=annotations(
                'io.kubernetes.container.restartCount', str(restarts)))
        self.statuses[id] = dict(state=cri.CONTAINER_RUNNING, started_at=number)
        self.kills[id] = 0
        self.write_group(id)
        return id

    def uid_of(self, id):
        return self.sandboxes[self.containers[id].pod_sandbox_id if id in self.containers else id].metadata.uid

    def write_group(self, id):
        """The files of a container's or a sandbox's group, and those of the pod's: something has run."""
        uid = self.uid_of(id)
        for path, kills in ((f'pod{uid}', self.kills[uid]), (f'pod{uid}/{id}', self.kills[id])):
            usec, said = next(self.usec), events(self.VERSION, kills)
            if self.VERSION == 1:
                self.write(group_v1(f'kubepods/{path}', group={
                    'cpuacct': {'cpuacct.usage': f'{usec}000\n'},
                    'memory': {'memory.usage_in_bytes': '500\n', 'cgroup.procs': '', **said}}))
            else:
                self.write(below(f'sys/fs/cgroup/kubepods/{path}', {**group(usec, 500), **said}))

    def take_group(self, uid, *ids):
        controllers = '*/' if self.VERSION == 1 else ''
        for path in glob.glob('/'.join((f'{self.directory}/sys/fs/cgroup/{controllers}kubepods/pod{uid}', *ids))):
            take_away(path)

    def kill(self, id, count=1):
        """The kernel kills so many of the container's processes."""
        self.kills[id] += count
        if self.VERSION == 2 and not self.LOCAL_EVENTS:
            self.kills[self.uid_of(id)] += count
        self.write_group(id)

    def end(self, id, reason='OOMKilled', exit_code=137, ago_seconds=3600):
        """The container has ended, and its group is gone."""
        self.containers[id].state = cri.CONTAINER_EXITED
        self.statuses[id].update(state=cri.CONTAINER_EXITED, reason=reason, exit_code=exit_code,
                                 finished_at=(int(time.time()) - ago_seconds) * 10**9 + next(self.numbers) * 10**6)
        self.take_group(self.uid_of(id), id)

    def remove(self, id):
        if self.containers[id].state == cri.CONTAINER_RUNNING:
            self.take_group(self.uid_of(id), id)
        del self.containers[id]

    def make_anew(self, id):
        """What ends and is removed before anybody has seen it, and its successor, which runs: its id."""
        old = self.containers[id]
        self.remove(id)
        return self.make(old.metadata.name, old.metadata.attempt + 1, old.pod_sandbox_id)

    def kill_and_make_anew(self, id):
        self.kill(id)
        return self.make_anew(id)

    def look(self, **settings):
        """What the agent says of each name: by pod and name its kills, which never go back, and which all containers
        of that name have."""
        part = self.cycle(**settings)
        self.assertEqual({}, part.failures)
        self.messages, counts = {}, {}
        for pod in part.pods:
            for message in pod.container_metrics:
                key = pod.uid, message.name
                self.assertTrue(message.HasField('oom_kills'), message)
                self.assertEqual(1, len({other.oom_kills for other in pod.container_metrics
                                         if other.name == message.name}), pod)
                self.assertGreaterEqual(message.oom_kills, self.seen.get(key, 0), key)
                # Of two sandboxes the first one may say what it knows a cycle late.
                self.messages[key], counts[key] = message, max(counts.get(key, 0), message.oom_kills)
        self.seen.update(counts)
        self.shown = samples_of(agent.render_part(wire.Metrics(pod_metrics=part.pods), agent.CADVISOR, False))
        return counts

    def check(self, *, uid=UID, cycles=2, later=0, **expected):
        """In this cycle and the next one these are the kills by name, of the message and for Prometheus."""
        for _ in range(cycles):
            counts = self.look(later=later)
            self.assertEqual(expected, {name: count for (pod, name), count in counts.items() if pod == uid})
            if {pod for pod, _ in counts} == {uid}:
                self.assertEqual(
                    {Labels(container=name, namespace='default', pod='pod'): count for name, count in expected.items()},
                    {labels: count for labels, count in self.shown['container_oom_events_total'].items()
                     if 'container' in labels})

    def last_exit(self, name='app', uid=UID):
        message = self.messages[uid, name]
        exited = message.last_exit
        return (exited.exit_code, exited.reason, exited.finished_at_ns) if message.HasField('last_exit') else None

    def finished(self, id):
        return self.statuses[id]['finished_at']

    def restart_agent(self):
        """Another one begins, with nothing but what it finds."""
        self.new_state()
        self.seen = {}


class OomKillTest(KillCase):
    """cgroup v2: the pod's group counts what happens in all groups below it, and lives longer than they do."""

    def test_without_a_kill_there_is_a_count_of_0(self):
        self.make('app'), self.make('side')
        self.check(app=0, side=0)
        for message in self.messages.values():
            self.assertEqual((False, False), (message.HasField('last_oom_kill_ns'), message.HasField('last_exit')))

    def test_a_kill_that_all_three_tell_of_counts_once(self):
        app, _ = self.make('app'), self.make('side')
        self.check(app=0, side=0)
        before = time.time_ns()
        self.kill(app)
        self.check(app=1, side=0)
        self.assertTrue(before < self.messages[UID, 'app'].last_oom_kill_ns <= time.time_ns())
        self.assertFalse(self.messages[UID, 'side'].HasField('last_oom_kill_ns'))
        self.end(app)
        self.check(app=1, side=0)
        self.make('app', 1)
        self.check(app=1, side=0)
        self.remove(app)
        self.check(app=1, side=0)
        self.assertEqual((137, 'OOMKilled', self.finished(app)), self.last_exit())

    def test_a_kill_of_which_the_pods_group_and_the_reason_tell_counts_once(self):
        _, side = self.make('app'), self.make('side')
        self.check(app=0, side=0)
        self.kill(side)
        self.end(side)
        self.check(app=0, side=1)
        # The one that was seen last may be the end of the container.
        self.assertEqual(self.finished(side), self.messages[UID, 'side'].last_oom_kill_ns)
        successor = self.make('side', 1)
        self.remove(side)
        self.check(app=0, side=1)
        self.kill(successor)
        self.end(successor)
        self.check(app=0, side=2)

    def test_a_kill_of_which_the_pods_group_alone_tells_is_that_of_the_container_made_anew(self):
        app, side = self.make('app'), self.make('side')
        self.check(app=0, side=0)
        side = self.kill_and_make_anew(side)
        before = time.time_ns()
        self.check(app=0, side=1)
        self.assertGreater(self.messages[UID, 'side'].last_oom_kill_ns, before - 10**9)
        app = self.kill_and_make_anew(app)
        self.check(app=1, side=1)
        app, side = self.kill_and_make_anew(app), self.kill_and_make_anew(side)
        counts = self.look()
        self.assertEqual(4, sum(counts.values()))

    def test_the_one_made_anew_is_taken_also_where_another_has_been_killed_before_or_more_often(self):
        app, side = self.make('app', 5), self.make('side')
        self.check(app=0, side=0)
        self.kill(app)
        self.end(app)
        successor = self.make('app', 6)
        self.check(app=1, side=0)
        # The runtime goes on to tell of the one that was killed.
        side = self.kill_and_make_anew(side)
        self.check(app=1, side=1)
        self.remove(app)
        self.kill_and_make_anew(side)
        self.check(app=1, side=2)
        self.kill_and_make_anew(successor)
        self.check(app=2, side=2)

    def test_one_that_ends_well_while_another_is_killed_has_no_kill(self):
        """The runtime does not know yet that it was for want of memory."""
        app, side = self.make('app', 3), self.make('side')
        self.check(app=0, side=0)
        self.kill(side)
        self.end(side, 'Error', ago_seconds=1)
        self.end(app, 'Completed', 0)
        self.check(app=0, side=1)
        self.statuses[side]['reason'] = 'OOMKilled'
        self.check(app=0, side=1, later=agent.CONDITIONS_SECONDS)

    def test_a_kill_of_a_child_counts_and_that_of_the_container_too(self):
        for seen_before_its_end in True, False:
            with self.subTest(seen_before_its_end=seen_before_its_end):
                self.setUp()
                app, _ = self.make('app'), self.make('side')
                self.check(app=0, side=0)
                for count in 1, 2:
                    self.kill(app)
                    self.check(app=count, side=0)
                self.kill(app)
                if seen_before_its_end:
                    self.check(app=3, side=0)
                self.end(app)
                self.check(app=3, side=0)
                self.make_anew(app)
                self.check(app=3, side=0)

    def test_two_containers_killed_in_one_cycle_count_one_each(self):
        for gone in 'nothing', 'their groups', 'they themselves':
            with self.subTest(gone=gone):
                self.setUp()
                app, side = self.make('app'), self.make('side')
                self.check(app=0, side=0)
                for id in app, side:
                    self.kill(id)
                    if gone == 'their groups':
                        self.end(id)
                    elif gone != 'nothing':
                        self.make_anew(id)
                self.check(app=1, side=1)

    def test_one_of_a_child_and_one_of_another_container_in_one_cycle(self):
        app, side = self.make('app'), self.make('side')
        self.check(app=0, side=0)
        self.kill(app)
        self.kill_and_make_anew(side)
        self.check(app=1, side=1)

    def test_several_processes_that_are_killed_one_after_the_other_are_as_many_kills(self):
        app, side = self.make('app'), self.make('side')
        self.check(app=0, side=0)
        self.kill(app, 5)
        self.end(app)
        self.check(app=5, side=0)
        self.make_anew(app)
        self.kill(side, 3)
        self.check(app=5, side=3)

    def test_all_processes_of_a_container_killed_at_once_are_one_kill(self):
        """memory.oom.group, which the kubelet sets since 1.28. As Linux 6.12 counts 1, 2 and 11 processes."""
        for count in 2, 3, 12:
            events = wire.CgroupMemoryEvents(oom=1, oom_kill=count, oom_group_kill=1)
            self.assertEqual(1, agent.oom_kills_of(wire.CgroupMetrics(memory=dict(events=events))))
        # Before Linux 5.17 there is no such count.
        for events, expected in (dict(oom_kill=2), 2), (dict(oom_kill=2, oom_group_kill=0), 2), ({}, None):
            self.assertEqual(expected, agent.oom_kills_of(wire.CgroupMetrics(memory=dict(events=events))))

    def test_container_is_killed_before_its_pods_group_is_read_and_after_it_was(self):
        """The pod's group is read a moment before those of its containers: it may lack what these have."""
        for kill, early, expected in (
                (lambda app, side: self.kill(side), (0, 1), (0, 1)),
                (lambda app, side: (self.kill(app), self.kill(side)), (1, 1), (1, 1)),
                (lambda app, side: (self.kill(side), self.make_anew(app)), (0, 1), (0, 1)),
                (lambda app, side: self.kill_and_make_anew(side), (0, 0), (0, 1)),
                (lambda app, side: (self.kill(app), self.kill_and_make_anew(side)), (1, 0), (1, 1))):
            with self.subTest(early=early, expected=expected):
                self.setUp()
                app, side = self.make('app', 3), self.make('side')
                self.check(app=0, side=0)
                kill(app, side)
                late, self.kills[UID] = self.kills[UID], 0
                self.write_group(SANDBOX)
                self.check(app=early[0], side=early[1], cycles=1)
                self.kills[UID] = late
                self.write_group(SANDBOX)
                self.check(app=expected[0], side=expected[1])

    def test_the_end_of_a_container_between_the_list_and_the_groups(self):
        """The runtime's list has it running, and its group is gone."""
        _, side = self.make('app', 3), self.make('side')
        self.check(app=0, side=0)
        self.kill(side)
        self.take_group(UID, side)
        self.assertEqual(0, self.look()[UID, 'app'])
        self.end(side)
        self.check(app=0, side=1)

    def test_the_reason_before_the_group(self):
        """The pod's file cannot be read just then."""
        for kills_before in 0, 1:
            with self.subTest(kills_before=kills_before):
                self.setUp()
                app, side = self.make('app'), self.make('side')
                self.check(app=0, side=0)
                if kills_before:
                    self.kill(app)
                    self.check(app=1, side=0)
                self.kill(side)
                self.end(side)
                name = f'{self.directory}/sys/fs/cgroup/kubepods/pod{UID}/memory.events'
                text = read_text(name)
                self.write({f'sys/fs/cgroup/kubepods/pod{UID}/cpu.stat': f'usage_usec {next(self.usec)}\n',
                            f'sys/fs/cgroup/kubepods/pod{UID}/memory.events': 'low 0\noom_kill x\n'})
                self.cycle()
                self.write({os.path.relpath(name, self.directory): text})
                self.write_group(SANDBOX)
                self.check(app=kills_before, side=1)

    def test_a_reason_that_the_runtime_learns_late_counts_once(self):
        for told_of_by, early in (('the group', 1), ('the pod', 1), ('nobody', 0)):
            with self.subTest(told_of_by=told_of_by):
                self.setUp()
                app, _ = self.make('app'), self.make('side', 7)
                self.check(app=0, side=0)
                if told_of_by == 'nobody':
                    self.kills[UID] -= 1
                self.kill(app)
                if told_of_by == 'the group':
                    self.check(app=1, side=0)
                self.end(app, 'Error', ago_seconds=1)
                # What the kernel has told is not waited for: an alert would come up to a minute late.
                self.check(app=early, side=0)
                self.make('app', 1)
                self.statuses[app]['reason'] = 'OOMKilled'
                self.check(app=1, side=0, later=agent.CONDITIONS_SECONDS, cycles=4)
                self.remove(app)
                self.check(app=1, side=0)
                self.assertEqual('OOMKilled', self.last_exit()[1])

    def test_a_kill_of_which_the_runtime_never_learns_counts(self):
        """It says Error for good, or is asked in vain: then what the pod's group has counted is told without it."""
        app, _ = self.make('app'), self.make('side')
        self.check(app=0, side=0)
        self.kill(app)
        self.end(app, 'Error')
        self.make('app', 1)
        self.check(app=1, side=0)

    def test_other_ends_are_no_kills(self):
        app, _ = self.make('app'), self.make('side')
        self.check(app=0, side=0)
        for number, (code, reason) in enumerate(((137, 'Error'), (1, 'Error'), (0, 'Completed')), 1):
            self.end(app, reason, code)
            self.check(app=0, side=0)
            self.assertEqual((code, reason, self.finished(app)), self.last_exit())
            old, app = app, self.make('app', number)
            self.remove(old)
            self.check(app=0, side=0)
            self.assertEqual((code, reason), self.last_exit()[:2])
        self.assertIsNone(self.last_exit('side'))

    def test_the_reason_of_a_container_that_runs_on_is_that_of_its_child(self):
        """containerd says OOMKilled as soon as something in it was killed, and later of whatever end."""
        app = self.make('app')
        self.check(app=0)
        self.kill(app)
        self.statuses[app]['reason'] = 'OOMKilled'
        self.check(app=1, later=agent.CONDITIONS_SECONDS)
        self.end(app, 'OOMKilled', 0)
        self.check(app=1)
        self.make_anew(app)
        self.check(app=1)

    def test_pod_that_is_found_has_the_kills_that_its_group_has_counted(self):
        """Of the container that the runtime says was killed, else of the one that was restarted most."""
        def killed(name, restarts):
            ended = self.make(name, restarts - 1)
            self.end(ended)
            return self.make(name, restarts)

        for expected, make in (
                ((3, 0), lambda: (self.make('app', 2), self.make('side', 1))),
                ((0, 3), lambda: (self.make('app', 1), self.make('side', 2))),
                ((3, 0), lambda: (killed('app', 1), self.make('side', 2))),
                ((0, 3), lambda: (self.make('app', 2), killed('side', 1)))):
            with self.subTest(expected=expected):
                self.setUp()
                make()
                self.kills[UID] = 3
                self.write_group(SANDBOX)
                self.check(app=expected[0], side=expected[1])
                # And what comes later is its own.
                self.kill(max(self.containers))
                self.assertEqual(4, sum(self.look().values()))

    def test_pod_that_is_found_while_the_runtime_does_not_know_yet_of_the_kill(self):
        app, _ = self.make('app'), self.make('side', 2)
        self.end(app, 'Error', ago_seconds=1)
        self.make('app', 1)
        self.kills[UID] = 3
        self.write_group(SANDBOX)
        self.look()
        self.statuses[app]['reason'] = 'OOMKilled'
        self.look(later=agent.CONDITIONS_SECONDS)
        self.check(app=3, side=0)

    def test_kills_that_were_there_before_the_agent_have_no_time(self):
        app, side = self.make('app', 1), self.make('side')
        self.kills[UID] = 3
        self.kill(side)
        self.check(app=3, side=1)
        self.assertEqual([False] * 2, [message.HasField('last_oom_kill_ns') for message in self.messages.values()])
        self.kill(app)
        self.check(app=4, side=1)
        self.assertEqual([True, False], [self.messages[UID, name].HasField('last_oom_kill_ns')
                                         for name in ('app', 'side')])

    def test_another_agent_says_what_the_pods_group_says(self):
        app, _ = self.make('app'), self.make('side')
        self.check(app=0, side=0)
        for number in range(4):
            self.kill(app)
            self.end(app)
            self.check(app=number + 1, side=0)
            old, app = app, self.make('app', number + 1)
            self.check(app=number + 1, side=0)
            if number < 3:
                self.remove(old)
        self.restart_agent()
        self.check(app=4, side=0)
        self.assertEqual((137, 'OOMKilled', self.finished(old)), self.last_exit())
        self.kill(app)
        self.check(app=5, side=0)

    def test_group_that_is_made_anew_counts_on(self):
        app, _ = self.make('app'), self.make('side')
        for count in 1, 2, 3:
            self.kill(app)
            self.check(app=count, side=0)
        self.end(app)
        self.take_group(UID)
        self.kills[UID] = 0
        self.write_group(SANDBOX)
        self.check(app=3, side=0)
        app = self.make('app', 1)
        self.check(app=3, side=0)
        self.kill(app)
        self.check(app=4, side=0)
        self.kill_and_make_anew(app)
        self.check(app=5, side=0)

    def test_group_that_is_made_anew_and_has_counted_already_counts_on(self):
        app, _ = self.make('app'), self.make('side')
        for _ in range(3):
            self.kill(app)
        self.check(app=3, side=0)
        self.make_anew(app)
        self.take_group(UID)
        app = max(self.containers)
        self.kills[UID] = 0
        self.kill(app)
        self.check(app=4, side=0)

    def test_group_that_was_seen_to_be_gone_may_count_anew_up_to_where_the_old_one_was(self):
        """A static pod that was taken away and put back has the same uid."""
        app, _ = self.make('app'), self.make('side')
        self.kill(app)
        self.check(app=1, side=0)
        self.take_group(UID)
        self.look()
        self.kills.update({UID: 0, app: 0, SANDBOX: 0})
        app = self.make_anew(app)
        self.kill(app)
        for id in self.containers:
            self.write_group(id)
        self.check(app=2, side=0)
        self.kill(app)
        self.end(app)
        self.check(app=3, side=0)

    def test_two_sandboxes_of_one_uid_have_one_count(self):
        """The old one's container has not ended yet."""
        old = self.make('app')
        self.kill(old)
        self.sandboxes[SANDBOX].state = cri.SANDBOX_NOTREADY
        self.make_sandbox('e5' * 32, attempt=1)
        self.check(app=1)
        again = self.make('app', 1, 'e5' * 32)
        self.check(app=1)
        self.kill(again)
        self.check(app=2)
        self.kill(old)
        self.kill(again)
        self.check(app=4)
        self.end(old)
        self.check(app=4)

    def test_sandbox_that_the_runtime_does_not_list_keeps_the_counts(self):
        """The kubelet's labels of a container tell whose it is."""
        app = self.make('app')
        self.containers[app].labels.update({
            'io.kubernetes.pod.uid': UID, 'io.kubernetes.pod.name': 'pod', 'io.kubernetes.pod.namespace': 'default'})
        del self.sandboxes[SANDBOX]
        self.check(app=0)
        self.kills[app] += 1
        self.write(below(f'sys/fs/cgroup/kubepods/pod{UID}/{app}', {**group(next(self.usec), 500), **events(2, 1)}))
        self.check(app=1)
        self.write(below(f'sys/fs/cgroup/kubepods/pod{UID}/{app}', {**group(next(self.usec), 500), **events(2, 0)}))
        self.check(app=1)

    def test_sandbox_that_is_replaced_under_the_same_uid_keeps_the_counts(self):
        """Also where in between no sandbox of the pod is there to be shown, and where the pod's group is made anew."""
        for cycles_between, group_anew in itertools.product((0, 1, 3), (False, True)):
            with self.subTest(cycles_between=cycles_between, group_anew=group_anew):
                self.setUp()
                app, side = self.make('app'), self.make('side')
                self.check(app=0, side=0)
                self.kill(app)
                self.check(app=1, side=0)
                for id in app, side:
                    self.end(id)
                self.sandboxes[SANDBOX].state = cri.SANDBOX_NOTREADY
                for _ in range(cycles_between):
                    self.look()
                if group_anew:
                    self.take_group(UID)
                    self.kills[UID] = 0
                self.make_sandbox('e5' * 32, attempt=1)
                for id in app, side:
                    self.remove(id)
                app, side = self.make('app', 1, 'e5' * 32), self.make('side', 1, 'e5' * 32)
                del self.sandboxes[SANDBOX]
                self.assertEqual(1, self.look()[UID, 'app'])
                self.kill(app)
                self.assertEqual(2, self.look()[UID, 'app'])

    def test_pod_that_is_made_anew_under_its_name_begins_at_0(self):
        app = self.make('app')
        self.kill(app)
        self.end(app)
        self.check(app=1)
        for between in range(2):
            if between:
                self.sandboxes[SANDBOX].state = cri.SANDBOX_NOTREADY
                self.look()
            self.make_sandbox('f6' * 32, OTHER_UID)
            again = self.make('app', sandbox='f6' * 32)
            self.check(uid=OTHER_UID, app=0)
            self.assertIsNone(self.last_exit(uid=OTHER_UID))
            self.assertFalse(self.messages[OTHER_UID, 'app'].HasField('last_oom_kill_ns'))
            self.assertEqual({0}, {count for labels, count in self.shown['container_oom_events_total'].items()
                                   if 'container' in labels})
            self.kill(again)
            self.check(uid=OTHER_UID, app=1)
            self.remove(again)
            del self.sandboxes['f6' * 32]
            self.take_group(OTHER_UID)
            self.kills[OTHER_UID] = 0
            self.look()
            self.seen.pop((OTHER_UID, 'app'))

    def test_pods_with_the_same_names_have_their_own_counts(self):
        self.make_sandbox('f6' * 32, OTHER_UID)
        one, other = self.make('app'), self.make('app', sandbox='f6' * 32)
        self.kill(one, 2)
        self.kill(other)
        for _ in range(2):
            self.assertEqual({(UID, 'app'): 2, (OTHER_UID, 'app'): 1}, self.look())
        self.kill_and_make_anew(other)
        self.assertEqual({(UID, 'app'): 2, (OTHER_UID, 'app'): 2}, self.look())

    def test_kills_are_counted_while_the_runtime_is_away(self):
        app, side = self.make('app'), self.make('side')
        self.check(app=0, side=0)
        lists = self.runtime.answers['ListContainers']
        self.runtime.answers['ListContainers'] = grpc.StatusCode.UNAVAILABLE
        self.kill(app)
        part = self.cycle()
        self.assertEqual([1, 0], [message.oom_kills for message in part.containers])
        self.kill(side)
        self.end(side)
        self.cycle(times=2)
        self.runtime.answers['ListContainers'] = lists
        self.check(app=1, side=1)

    def test_runtime_that_is_asked_for_statuses_in_vain(self):
        _, side = self.make('app'), self.make('side')
        self.check(app=0, side=0)
        self.runtime.answers['ContainerStatus'] = [grpc.StatusCode.INTERNAL, self.status]
        self.kill(side)
        self.end(side)
        self.assertEqual({'container status'}, {*self.cycle().failures})
        self.check(app=0, side=1, later=agent.CONDITIONS_SECONDS)

    def test_last_exit_is_the_last_one_whatever_the_order_of_the_answers(self):
        """Nor does it matter which of them was made first."""
        names = [self.make('app', number) for number in range(3)]
        for number, id in enumerate(reversed(names)):
            self.end(id, 'Error', number + 1)
        names.reverse()
        self.make('app', 3)
        asked = []

        def status(request):
            id = cri.ContainerStatusRequest.FromString(request).container_id
            asked.append(id)
            # In the first cycle the last one alone is told of, and in the next one the others are.
            return self.status(request) if id == names[-1] or len(asked) > 4 else grpc.StatusCode.INTERNAL

        self.runtime.answers['ContainerStatus'] = status
        self.cycle()
        self.check(app=0, later=agent.CONDITIONS_SECONDS)
        self.assertEqual({*names}, {*asked[4:]} & {*names} | {names[-1]})
        self.assertEqual((3, 'Error', self.finished(names[-1])), self.last_exit())
        for id in names:
            self.remove(id)
        self.check(app=0)
        self.assertEqual((3, 'Error', self.finished(names[-1])), self.last_exit())

    def test_whatever_happens_the_kills_of_a_pod_are_as_many_as_there_were(self):
        """By name where there is a trace of each."""
        for seed in range(20 if LONG else 4):
            self.setUp()
            self.random, true = random.Random(seed), dict.fromkeys(('app', 'side', 'more'), 0)
            running = {name: self.make(name) for name in true}
            for _ in range(30):
                traceless = 0
                for name in true:
                    id, luck = running[name], self.random.random()
                    if luck < 0.5:
                        self.kill(id) if luck < 0.2 else None
                        true[name] += luck < 0.2
                    elif luck < 0.65:
                        # It ends, and what ended before it is removed.
                        self.kill(id)
                        true[name] += 1
                        self.end(id)
                        for old in [old for old, container in self.containers.items() if old != id
                                    and container.metadata.name == name]:
                            self.remove(old)
                        running[name] = self.make(name, self.containers[id].metadata.attempt + 1)
                    elif luck < 0.72 and not traceless:
                        traceless += 1
                        true[name] += 1
                        running[name] = self.kill_and_make_anew(id)
                    elif luck < 0.76:
                        running[name] = self.make_anew(id)
                with self.subTest(seed=seed):
                    self.assertEqual(sum(true.values()), sum(self.look().values()))

    def test_nothing_grows(self):
        """A crash loop, and pods that come and go."""
        app = self.make('app')

        def entries():
            return sum(len(found) for history in self.state.histories.values() for found in vars(history).values()
                       if isinstance(found, (dict, set, list)))

        sizes = []
        for number in range(60):
            self.kill(app)
            self.end(app)
            self.look()
            old, app = app, self.make('app', number + 1)
            self.look()
            self.remove(old)
            if number in (20, 59):
                sizes.append(entries())
        self.assertGreater(sizes[0], 0)
        self.assertEqual(60, self.look()[UID, 'app'])
        self.assertEqual(sizes[0], sizes[1])
        for number in range(5):
            id = f'{number:x}' * 64
            self.make_sandbox(id, str(uuid.UUID(int=number)))
            self.kill(self.make('app', sandbox=id))
            self.look()
            self.remove(max(self.containers))
            del self.sandboxes[id]
        self.look()
        self.assertEqual({UID}, {*self.state.histories})


class LocalEventsTest(KillCase):
    """cgroup v2 mounted with memory_localevents: the pod's group says 0 of what happens below it."""
    LOCAL_EVENTS = True

    def test_kills_are_those_of_the_containers_groups_and_one_of_each_that_the_runtime_tells_of(self):
        app, side = self.make('app'), self.make('side')
        self.check(app=0, side=0)
        self.kill(app)
        self.check(app=1, side=0)
        self.end(app)
        self.check(app=1, side=0)
        again = self.make('app', 1)
        self.remove(app)
        self.check(app=1, side=0)
        # Its group never shows it.
        self.kill(again)
        self.end(again)
        self.check(app=2, side=0)
        self.end(side, 'Error', ago_seconds=1)
        self.check(app=2, side=0)
        self.statuses[side]['reason'] = 'OOMKilled'
        self.check(app=2, side=1, later=agent.CONDITIONS_SECONDS)
        self.make_anew(side)
        self.check(app=2, side=1)

    def test_two_in_one_cycle(self):
        app, side = self.make('app'), self.make('side')
        self.check(app=0, side=0)
        for id in app, side:
            self.kill(id)
            self.end(id)
        self.check(app=1, side=1)
        self.assertEqual(self.finished(app), self.messages[UID, 'app'].last_oom_kill_ns)


class OldKillTest(LocalEventsTest):
    """cgroup v1: memory.oom_control counts the kills of its own group alone."""
    VERSION, LOCAL_EVENTS = 1, False

    def test_a_crash_loop_counts_one_each_time(self):
        app = self.make('app')
        self.check(app=0)
        for number in range(1, 6):
            self.kill(app)
            if number % 2:
                self.check(app=number)
            self.end(app)
            self.check(app=number)
            old, app = app, self.make('app', number)
            self.check(app=number)
            self.remove(old)
        self.check(app=5)

    def test_a_child_and_then_the_container_itself(self):
        app = self.make('app')
        self.check(app=0)
        for count in 1, 2, 3:
            self.kill(app)
            self.check(app=count)
        self.end(app)
        self.check(app=3)

    def test_pod_that_is_found_has_what_is_still_told_of(self):
        app, side = self.make('app'), self.make('side')
        self.end(side)
        self.make('side', 1)
        self.kill(app, 2)
        self.check(app=2, side=1)

    def test_sandbox_that_is_replaced_under_the_same_uid_keeps_the_counts(self):
        app = self.make('app')
        self.check(app=0)
        self.kill(app)
        self.check(app=1)
        self.end(app)
        self.sandboxes[SANDBOX].state = cri.SANDBOX_NOTREADY
        self.look()
        self.make_sandbox('e5' * 32, attempt=1)
        self.make('app', 1, 'e5' * 32)
        self.assertEqual(1, self.look()[UID, 'app'])
        self.remove(app)
        del self.sandboxes[SANDBOX]
        self.check(app=1)


class WithoutGroupsTest(KillCase):
    """--container-stats cri: the runtime alone tells."""
    STATS = 'cri'

    def test_a_reason_counts_once(self):
        app, _ = self.make('app'), self.make('side')
        self.check(app=0, side=0)
        for number in 1, 2:
            self.end(app)
            self.check(app=number, side=0)
            old, app = app, self.make('app', number)
            self.check(app=number, side=0)
            self.remove(old)

    def test_pods_without_a_uid_are_different_pods(self):
        """Those that crictl has made of a configuration without one."""
        for id in 'e5' * 32, 'f6' * 32:
            self.make_sandbox(id, '')
            app = self.make('app', sandbox=id)
        self.cycle()
        self.end(app)
        for _ in range(2):
            part = self.cycle()
            self.assertEqual({'e5' * 32: [0], 'f6' * 32: [1]}, {
                pod.id: [message.oom_kills for message in pod.container_metrics] for pod in part.pods
                if pod.container_metrics})


class OomMetricsTest(KillCase):
    """/metrics/cadvisor."""

    def of(self, name):
        return {labels: value for labels, value in self.shown.get(name, {}).items() if labels.get('container') == 'app'}

    def test_no_label_is_of_one_life_of_the_container(self):
        app, labels = self.make('app', 4), Labels(container='app', namespace='default', pod='pod')
        names = ['container_oom_events_total', 'kubensage_container_restarts']
        of_exits = ['kubensage_container_last_oom_timestamp_seconds', 'kubensage_container_last_exit_code',
                    'kubensage_container_last_exit_timestamp_seconds', 'kubensage_container_last_exit_info']
        self.check(app=0)
        self.assertEqual([{labels: 0}, {labels: 4}] + [{}] * 4, [self.of(name) for name in names + of_exits])
        self.kill(app)
        self.end(app)
        for again in False, True:
            if again:
                self.make('app', 5)
                self.remove(app)
            self.check(app=1)
            seconds = self.finished(app) / 1e9
            self.assertEqual([{labels: 1}, {labels: 4 + again}, {labels: seconds}, {labels: 137}, {labels: seconds},
                              {Labels(labels, reason='OOMKilled'): 1}], [self.of(name) for name in names + of_exits])

    def test_an_exit_code_of_0_and_no_reason(self):
        app = self.make('app')
        self.end(app, '', 0)
        self.check(app=0)
        self.assertEqual([0], [*self.of('kubensage_container_last_exit_code').values()])

    def test_services_and_the_root_keep_their_own(self):
        self.write({**STOCK_NODE, **below('sys/fs/cgroup/system.slice/kubelet.service', events(2, 6))})
        self.make('app')
        options = agent.parse_options(['--cri-socket', self.socket], {})
        state = agent.State(10)
        self.addCleanup(agent.forget_runtime, state.runtime)
        metrics, _ = agent.collect_snapshot(self.write({}), options, state, agent.AgentStats())
        samples = samples_of(agent.render_part(metrics, agent.CADVISOR, False))['container_oom_events_total']
        self.assertEqual(6, samples[Labels(id='/system.slice/kubelet.service')])
        self.assertEqual([Labels(container='app', namespace='default', pod='pod')],
                         [labels for labels in samples if 'pod' in labels])
        self.assertEqual([], self.complaints(agent.render_part(metrics, agent.CADVISOR, False)))


# --- OOM kills of a real runtime

LIMITED = {'memory_limit_in_bytes': 32 * MIB}
OOM_ALERT = ('alert: OomKilled, expr: "increase(container_oom_events_total{container!=\'\'}[5m]) > 0"')


class RealKillsTest(Case):
    """containerd's pods, the agent with its server, and a Prometheus with an alert."""

    def setUp(self):
        super().setUp()
        reason = why_no_runtime()
        if reason:
            self.skipTest(reason)
        self.tool('prometheus', '--version')
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.runtime = stack.enter_context(real_runtime())
        # Snapshots that were read, by uid and name what they say last, and by container the kills that were seen.
        self.read, self.last, self.figures = [], {}, {}

    def start_agent(self):
        self.node, self.port = ['--cri-socket', self.runtime.socket, '--output', 'json'], free_port()
        with open(f'{self.directory}/out', 'w') as out, open(f'{self.directory}/err', 'w') as err:
            self.agent = self.start('--listen', f'127.0.0.1:{self.port}', '--main-loop-duration', '0.5',
                                    stdout=out, stderr=err)
        self.out = open(f'{self.directory}/out')
        self.addCleanup(self.out.close)
        self.prometheus = Prometheus(self, [
            f"job_name: a, metrics_path: /metrics/cadvisor, static_configs: [{{targets: ['127.0.0.1:{self.port}']}}]"
        ], [OOM_ALERT])

    def read_on(self):
        """The snapshots since: the kills of a name never go back, and all its containers have them."""
        while True:
            place, line = self.out.tell(), self.out.readline()
            if not line.endswith('\n'):
                self.out.seek(place)
                return self.last
            metrics, previous = json_format.Parse(line, wire.Metrics()), self.last
            self.read.append(metrics)
            self.last = {}
            for pod in metrics.pod_metrics:
                for message in pod.container_metrics:
                    self.assertTrue(message.HasField('oom_kills'), message)
                    key = pod.uid, message.name
                    self.assertEqual(message.oom_kills, self.last.get(key, message).oom_kills, key)
                    self.assertGreaterEqual(message.oom_kills, previous.get(key, message).oom_kills, key)
                    self.last[key] = message

    def wait_for_kills(self, pod, name, count, id=None, state='CONTAINER_RUNNING'):
        """The message, as soon as it says so many, of that container if need be."""
        def said():
            message = self.read_on().get((pod.metadata.uid, name))
            return message if message is not None and message.oom_kills >= count and (
                id is None or (message.id, message.state) == (id, state)) else None

        message = wait_for(f'kill {count} of {name}', said)
        self.assertEqual(count, message.oom_kills)
        return message

    def scraped(self):
        """What the agent says to a scrape, by name of the sample; no series is there twice."""
        asking = http.client.HTTPConnection('127.0.0.1', self.port, timeout=PATIENCE_SECONDS)
        with contextlib.closing(asking):
            asking.request('GET', '/metrics/cadvisor')
            answer = asking.getresponse()
            self.assertEqual(http.HTTPStatus.OK, answer.status)
            return samples_of(answer.read().decode())

    def check_scrape(self, pod, name, **expected):
        """Of this container, under labels that outlive it."""
        samples, labels = self.scraped(), Labels(
            namespace=pod.metadata.namespace, pod=pod.metadata.name, container=name)
        for sample, value in expected.items():
            self.assertAlmostEqual(value, samples[sample].get(labels, math.nan), 3, (sample, samples[sample]))
        self.assertEqual([labels], [found for found in samples['container_oom_events_total']
                                    if labels.items() <= found.items()])
        return samples

    def group(self, pod, name):
        return f'{pod.cgroup}/{pod.containers[name]}'

    def trigger(self, pod, name):
        """Have the first process of the container take its memory, or a child of it: as soon as it waits for that."""
        def waiting():
            for pid in read_cgroup_file(self.group(pod, name), 'cgroup.procs', 'cgroup.procs').split():
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                    status = dict(line.split(':\t', 1) for line in read_text(f'/proc/{pid}/status').splitlines())
                    if status['NSpid'].split()[-1] == '1' and int(status['SigCgt'], 16) >> signal.SIGUSR1 - 1 & 1:
                        return int(pid)
            return None

        pid = wait_for(f'{name} to wait', waiting)
        began = time.time()
        os.kill(pid, signal.SIGUSR1)
        return began

    def wait_for_alert(self, pod, name, began):
        """It fires within two scrapes, or three where everything is slow."""
        labels = {'container': name, 'pod': pod.metadata.name}

        def firing():
            return next((alert for alert in self.prometheus.ask('alerts').get('alerts', ())
                         if labels.items() <= alert['labels'].items() and alert['state'] == 'firing'), None)

        alert = wait_for(f'the alert for {name}', firing)
        self.figures[name] = time.time() - began
        # RFC 3339, in nanoseconds.
        seconds, fraction = re.fullmatch(r'(.*?)(\.\d+)?Z', alert['activeAt']).groups()
        active = calendar.timegm(time.strptime(seconds, '%Y-%m-%dT%H:%M:%S')) + float(fraction or 0)
        series, = self.prometheus.query(f'container_oom_events_total{{container="{name}"}}[5m]')
        told = [float(moment) for moment, count in series['values'] if count != '0']
        self.figures[f'{name}: scraped'] = told[0] - began
        self.assertIn(sum(moment <= active for moment in told), (1, 2, 3), (alert, series))
        return alert

    def wait_for_value(self, expression, value):
        wait_for(f'{expression} {value}', lambda: [*self.prometheus.values(expression).values()] == [value])

    def restart(self, pod, name, attempt):
        """As the kubelet does: it keeps the last one that has ended."""
        old = pod.containers[name]
        pod.containers[name] = make_container(
            self.runtime, pod.id, pod.config, Load(name, ('await', '64'), attempt, resources=LIMITED))
        for container in call_runtime(self.runtime, 'ListContainers').containers:
            if (container.pod_sandbox_id, container.metadata.name) == (pod.id, name) and \
                    container.id not in (old, pod.containers[name]):
                # The request is the same.
                self.runtime.channel.unary_unary('/runtime.v1.RuntimeService/RemoveContainer')(
                    cri.ContainerStatusRequest(container_id=container.id).SerializeToString(), timeout=60)

    def test_kills_are_counted_and_alert(self):
        wanted = [('oom', 'loop', (Load('hog', ('await', '64'), resources=LIMITED), Load('calm'))),
                  ('oom', 'family', (Load('parent', ('breed', '64'), resources=LIMITED),))]
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            loop, family = pool.map(lambda pod: make_pod(self.runtime, *pod), wanted)
        self.start_agent()
        series = 'container_oom_events_total{container="%s"}'
        for pod, name in (loop, 'hog'), (loop, 'calm'), (family, 'parent'):
            self.wait_for_kills(pod, name, 0, pod.containers[name])
            self.wait_for_value(series % name, 0)
        self.assertEqual({'alerts': []}, self.prometheus.ask('alerts'))
        self.check_children(family)
        self.check_loop(loop)
        self.check_scrape(loop, 'calm', container_oom_events_total=0)
        self.assertEqual({('oom', 'loop', 'hog'), ('oom', 'family', 'parent')}, {
            tuple(alert['labels'][name] for name in ('namespace', 'pod', 'container'))
            for alert in self.prometheus.ask('alerts')['alerts']})
        self.check_another_life(loop, wanted[0])
        # It takes what it is given.
        self.wait_for_value('up', 1)

    def check_children(self, pod):
        """A child is killed and the container goes on: its group tells at once."""
        for count in 1, 2:
            began = self.trigger(pod, 'parent')
            wait_for('the kill', lambda: f'oom_kill {count}\n' in read_cgroup_file(
                self.group(pod, 'parent'), 'memory.oom_control', 'memory.events'))
            killed_ns = time.time_ns()
            self.wait_for_kills(pod, 'parent', count, pod.containers['parent'])
            for metrics in self.read:
                if metrics.agent_metrics.timestamp_ns > killed_ns:
                    self.assertEqual(count, containers_by_id(metrics)[pod.containers['parent']].oom_kills)
            if count == 1:
                self.wait_for_alert(pod, 'parent', began)
        message = self.last[pod.metadata.uid, 'parent']
        self.assertTrue(began - 1 < message.last_oom_kill_ns / 1e9 < time.time())
        self.assertFalse(message.HasField('last_exit'))
        self.check_scrape(pod, 'parent', container_oom_events_total=2, kubensage_container_restarts=0,
                          kubensage_container_last_oom_timestamp_seconds=message.last_oom_kill_ns / 1e9)

    def check_loop(self, pod):
        """Killed five times, and made anew each time."""
        for count in range(1, 6):
            began = self.trigger(pod, 'hog')
            self.wait_for_kills(pod, 'hog', count, pod.containers['hog'], 'CONTAINER_EXITED')
            # On v2 the group may tell before the runtime does.
            exited = wait_for('the exit', lambda: self.exit_since(pod, began))
            self.assertEqual(137, exited.exit_code)
            if count == 1:
                self.wait_for_alert(pod, 'hog', began)
            self.restart(pod, 'hog', count)
            again = self.wait_for_kills(pod, 'hog', count, pod.containers['hog'])
            self.assertEqual((exited.finished_at_ns, count), (again.last_exit.finished_at_ns, again.restart_count))
            self.assertTrue(began < again.last_oom_kill_ns / 1e9 < time.time())
        wait_for('the reason', lambda: self.exit_since(pod, began).reason == 'OOMKilled')
        samples = self.check_scrape(
            pod, 'hog', container_oom_events_total=5, kubensage_container_restarts=5,
            kubensage_container_last_exit_code=137,
            kubensage_container_last_exit_timestamp_seconds=again.last_exit.finished_at_ns / 1e9)
        self.assertEqual(['OOMKilled'], [labels['reason'] for labels in samples['kubensage_container_last_exit_info']
                                         if labels['container'] == 'hog'])
        self.wait_for_value('container_oom_events_total{container="hog"}', 5)
        self.check_increase(5, 0)

    def exit_since(self, pod, began):
        exited = self.read_on()[pod.metadata.uid, 'hog'].last_exit
        return exited if exited.finished_at_ns / 1e9 > began else None

    def check_increase(self, kills, resets):
        """Of one series, whatever the containers: a little is added for the time before and after its samples."""
        hog = '(container_oom_events_total{container="hog"}[5m])'
        self.figures['increase'], = self.prometheus.values(f'increase{hog}').values()
        self.assertTrue(kills <= self.figures['increase'] < kills + 2, self.figures)
        self.assertEqual([resets], [*self.prometheus.values(f'resets{hog}').values()])

    def check_another_life(self, old, wanted):
        """Deleted, and made anew under the same name: it begins at 0, which is a reset of the same series."""
        for method in 'StopPodSandbox', 'RemovePodSandbox':
            call_runtime(self.runtime, method, pod_sandbox_id=old.id)
        pod = make_pod(self.runtime, *wanted, life='second')
        begun = self.wait_for_kills(pod, 'hog', 0, pod.containers['hog'])
        self.assertEqual((False, False), (begun.HasField('last_exit'), begun.HasField('last_oom_kill_ns')))
        self.assertNotIn((old.metadata.uid, 'hog'), self.last)
        samples = self.check_scrape(pod, 'hog', container_oom_events_total=0)
        self.assertNotIn('kubensage_container_last_exit_info', samples)
        self.wait_for_value('container_oom_events_total{container="hog"}', 0)
        self.trigger(pod, 'hog')
        self.wait_for_kills(pod, 'hog', 1)
        self.wait_for_value('container_oom_events_total{container="hog"}', 1)
        self.check_increase(6, 1)


# --- ephemeral storage

MS_BIND = 4096


def du(path):
    """Bytes and inodes as du(1) counts them, of this file system alone; what it may not read it leaves out."""
    numbers = []
    for unit in '--block-size=1', '--inodes':
        run = subprocess.run(['du', '-s', '-x', unit, '--', path], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if not run.stdout:
            raise unittest.SkipTest(f'du {unit}: nothing said')
        numbers.append(int(run.stdout.split()[0]))
    return tuple(numbers)


def df(path):
    """Total, used, free, inodes, inodes_free."""
    listed = subprocess.run(['df', '-B1', '--output=size,used,avail,itotal,iavail', '--', path],
                            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.splitlines()
    if not listed:
        raise unittest.SkipTest('df --output: nothing said')
    return tuple(int(word.strip(b'-') or 0) for word in listed[1].split())


def make_file(path, size=0, at=0):
    with open(path, 'wb') as file:
        file.seek(at)
        file.write(os.urandom(size))
    return path


def make_nested(directory, count):
    """Directories, one in the other, with a file in each."""
    for _ in range(count):
        make_file(f'{directory}/file', 5)
        directory += '/n'
        os.mkdir(directory)


def make_files(directory):
    """Of all that there may be in a volume."""
    os.makedirs(directory, exist_ok=True)
    for size in 0, 1, 511, 4096, 4097, 70_001, 1 << 20 | 1:
        make_file(f'{directory}/{size}', size)
    make_file(f'{directory}/sparse', 1, 1 << 29)
    os.truncate(f'{directory}/sparse', 1 << 40)
    for name in b'line\nfeed', b'not UTF-8 \xff', b'-rf', b' ', b'\x1b[31m', b'n' * 255:
        os.mkdir(os.fsencode(directory) + b'/' + name)
        make_file(os.fsencode(directory) + b'/' + name + b'/' + name, 9000)
    for name, target in (('all', '/'), ('proc', '/proc'), ('file', '70001'), ('up', '..'), ('self', 'self'),
                         ('none', 'nothing'), ('long', 'x' * 200)):
        os.symlink(target, f'{directory}/{name}')
    os.mkdir(f'{directory}/links')
    for number in range(5):
        os.link(f'{directory}/70001', f'{directory}/links/{number}')
    os.mkfifo(f'{directory}/fifo')
    with socket.socket(socket.AF_UNIX) as bound:
        # A path of a socket has 107 bytes.
        place = os.open(directory, os.O_RDONLY)
        bound.bind(f'/proc/self/fd/{place}/socket')
        os.close(place)
    os.mkdir(f'{directory}/closed')
    make_file(f'{directory}/closed/file', 5000)
    make_nested(f'{directory}/links', 30)
    os.chmod(f'{directory}/closed', 0)


def mount_tmpfs(test, path, size='1m'):
    os.makedirs(path, exist_ok=True)
    mount_there(test, ['-t', 'tmpfs', '-o', f'size={size}', 'kubensage-test', path])


def mount_there(test, arguments):
    """Until the end of the test."""
    run = subprocess.run(['mount', *arguments], stderr=subprocess.PIPE, text=True)
    if run.returncode:
        test.skipTest(f'mount: {run.stderr}')
    test.addCleanup(subprocess.run, ['umount', '--lazy', arguments[-1]], check=True)


class StorageCase(Case):
    """A node whose kubelet keeps volumes and logs; the runtime, which the test plays, lists the pods."""
    INTERVAL = '0.1'

    def setUp(self):
        super().setUp()
        self.kubelet, self.sandboxes, self.containers, self.layers = f'{self.directory}/var/lib/kubelet', {}, {}, []
        os.makedirs(self.kubelet)
        self.write({'proc/1/mountinfo': '', 'sys/empty': ''})
        self.runtime = FakeRuntime(
            self, ListPodSandbox=lambda request: list_pods(*self.sandboxes.values()),
            ListContainers=lambda request: list_containers(*self.containers.values()),
            ListContainerStats=lambda request: list_stats(*self.layers))
        self.patch(STORAGE_SECONDS=0, NEW_PODS_SECONDS=0.01, WALK_SHARE=0.5)
        self.walk()
        self.addCleanup(self.stop)

    def walk(self):
        """An agent that knows nothing yet, and its thread."""
        self.state, self.stats, self.failures = agent.State(10), agent.AgentStats(), {}
        self.stopped = threading.Event()
        self.walking = agent.start_thread(agent.walk_directories, self.state.runtime.walker,
                                          float(self.INTERVAL), self.stopped)

    def stop(self):
        self.stopped.set()
        self.walking.join(PATIENCE_SECONDS)
        self.assertFalse(self.walking.is_alive())
        agent.forget_runtime(self.state.runtime)

    def add_pod(self, name, *containers):
        """Its uid, and its directory of volumes, which is there."""
        pod = self.sandboxes[name] = sandbox(name)
        for app in containers:
            self.containers[f'{name}-{app}'] = container(f'{name}-{app}', name)
            self.containers[f'{name}-{app}'].metadata.name = app
        os.makedirs(self.volume(name, ''))
        return pod.metadata.uid

    def volume(self, pod, name, plugin='empty-dir'):
        return f'{self.kubelet}/pods/{pod}-uid/volumes/kubernetes.io~{plugin}/{name}'

    def logs(self, pod, name):
        return f'{self.directory}/var/log/pods/default_{pod}-name_{pod}-uid/{name}'

    def remove_pod(self, name):
        del self.sandboxes[name]
        for id in [id for id, app in self.containers.items() if app.pod_sandbox_id == name]:
            del self.containers[id]

    def write_mounts(self, text='', fstype='tmpfs'):
        """The mountinfo of the node: what is mounted in its tree, and this; what is a tmpfs may be called otherwise."""
        prefix = f' {self.directory}/'
        lines = [line.replace(prefix, ' /', 1).replace(' - tmpfs ', f' - {fstype} ')
                 for line in read_text('/proc/self/mountinfo').splitlines(True)
                 if prefix in line]
        self.write({'proc/1/mountinfo': ''.join(lines) + text})

    def look(self, *arguments):
        """A snapshot."""
        options = agent.parse_options(['--cri-socket', self.socket, '--volume-stats-interval', self.INTERVAL,
                                       '--fs-stats-interval=1', f'--rootfs={self.directory}', *arguments], {})
        roots = agent.Roots(f'{self.directory}/proc', f'{self.directory}/sys', self.directory)
        metrics, self.failures = agent.collect_snapshot(roots, options, self.state, self.stats)
        return metrics

    def pods(self, *arguments):
        """By name the pods of a snapshot."""
        return {pod.id: pod for pod in self.look(*arguments).pod_metrics}

    def usages(self, *arguments):
        """By pod, kind and name what a snapshot says."""
        return {(pod.id, usage.kind, usage.name): (usage.bytes, usage.inodes) for pod in self.pods(*arguments).values()
                for usage in pod.ephemeral_storage.usages}

    def directories(self):
        """What there is to measure, by pod, kind and name."""
        found = {}
        for pod in self.sandboxes:
            for kind, top in ('emptyDir', self.volume(pod, '')), ('logs', self.logs(pod, '')):
                if os.path.isdir(top):
                    found.update({(pod, kind, name): top + name for name in os.listdir(top)})
        return found

    def measure_again(self):
        """Until each directory was measured by a walk that has begun since."""
        for _ in range(2):
            since = time.time_ns()
            wait_for('measurements', lambda: all(
                usage.timestamp_ns > since for pod in self.pods().values() for usage in pod.ephemeral_storage.usages
                if usage.kind in ('emptyDir', 'logs')))

    def check(self, more={}):
        """All is as du says, and there is nothing else but more."""
        expected = {**{key: du(path) for key, path in self.directories().items()}, **more}
        with contextlib.suppress(TimeoutError):
            self.measure_again()
            wait_for('du', lambda: self.usages() == expected)
        self.assertEqual(expected, self.usages())


class StorageTest(StorageCase):
    def test_directories_are_as_large_as_du_says(self):
        self.add_pod('web', 'app', 'side')
        self.add_pod('db', 'app')
        for name in 'data', 'cache', 'empty':
            os.mkdir(self.volume('web', name))
        make_files(self.volume('web', 'data'))
        make_file(self.volume('web', 'cache/file'), 123_456)
        # One file in two volumes counts in each.
        os.link(self.volume('web', 'data/4097'), self.volume('web', 'cache/link'))
        make_files(self.volume('db', 'data'))
        for pod, app in ('web', 'app'), ('web', 'side'), ('db', 'app'):
            os.makedirs(self.logs(pod, app))
            for name in '0.log', '0.log.20261127-190000', '0.log.20261127-180000.gz', '1.log':
                make_file(self.logs(pod, f'{app}/{name}'), random.randrange(100_000))
        os.symlink('/var/lib/docker/containers/1/1-json.log', self.logs('db', 'app/2.log'))
        self.check()
        # Somebody who is not root cannot read the closed directory.
        self.assertEqual({('web', 'data'), ('db', 'data')} if os.geteuid() else set(), {
            (pod.id, usage.name) for pod in self.pods().values() for usage in pod.ephemeral_storage.usages
            if usage.incomplete})

    def test_layers_are_those_that_the_runtime_tells(self):
        self.add_pod('web', 'app', 'side')
        self.layers = [stats('web-app', 1, 1, writable_layer=layer(77, 4096, inodes_used=value(9))),
                       stats('web-side', 1, 1, writable_layer=layer(77, 0, inodes_used=value(0)))]
        self.check({('web', 'layer', 'app'): (4096, 9), ('web', 'layer', 'side'): (0, 0)})
        self.assertEqual([77, 77], [usage.timestamp_ns for usage in self.pods()['web'].ephemeral_storage.usages])

    def test_each_row_says_when_it_was_measured_and_is_measured_again(self):
        began = time.time_ns()
        self.add_pod('web')
        os.mkdir(self.volume('web', 'data'))
        self.check()

        def measured():
            usage, = self.pods()['web'].ephemeral_storage.usages
            self.assertLessEqual(usage.timestamp_ns, time.time_ns())
            return usage.timestamp_ns

        first = measured()
        self.assertGreaterEqual(first, began)
        wait_for('the next measurement', lambda: measured() > first)

    def test_what_comes_goes_grows_and_shrinks_is_followed(self):
        self.add_pod('web', 'app')
        self.check()
        for name in 'one', 'two':
            os.mkdir(self.volume('web', name))
            make_file(self.volume('web', f'{name}/file'), 50_000)
        self.check()
        make_file(self.volume('web', 'one/more'), 5_000_000)
        os.makedirs(self.logs('web', 'app'))
        self.check()
        os.truncate(self.volume('web', 'one/more'), 0)
        shutil.rmtree(self.volume('web', 'two'))
        self.check()
        self.add_pod('db')
        os.mkdir(self.volume('db', 'two'))
        self.check()
        # The kubelet removes the directories later.
        self.remove_pod('web')
        wait_for('the end of the pod', lambda: {pod for pod, _, _ in self.usages()} == {'db'})
        self.assertEqual({('db', 'emptyDir', 'two'): du(self.volume('db', 'two'))}, self.usages())

    def test_directories_that_others_change_all_the_time_are_measured_and_cost_the_others_nothing(self):
        """Of a file that grows it is what it was at some moment; of directories that come and go, what was there."""
        self.add_pod('web')
        for name in 'grows', 'goes', 'rests':
            os.mkdir(self.volume('web', name))
        make_files(self.volume('web', 'rests'))
        rests, ended = du(self.volume('web', 'rests')), threading.Event()
        grown, low = make_file(self.volume('web', 'grows/file'), 4096), du(self.volume('web', 'grows'))

        def change():
            while not ended.is_set():
                for number in range(20):
                    make_nested(self.new_place(number), 3)
                    with open(grown, 'ab') as file:
                        file.write(bytes(4096))
                for number in range(20):
                    shutil.rmtree(self.new_place(number))

        thread = threading.Thread(target=change)
        self.addCleanup(thread.join)
        self.addCleanup(ended.set)
        thread.start()
        seen = set()

        def measured():
            usages = self.usages()
            if len(usages) == 3:
                self.assertEqual(rests, usages['web', 'emptyDir', 'rests'])
                self.assertLessEqual(low[0], usages['web', 'emptyDir', 'grows'][0])
                self.assertLessEqual(1, usages['web', 'emptyDir', 'goes'][1])
                self.assertLessEqual(usages['web', 'emptyDir', 'goes'][1], 1 + 20 * 7)
                seen.add(usages['web', 'emptyDir', 'grows'])
            return len(seen) > 3

        wait_for('measurements', measured)
        ended.set()
        thread.join()
        self.check()

    def new_place(self, number):
        path = self.volume('web', f'goes/{number}')
        os.makedirs(path, exist_ok=True)
        return path

    def test_names_that_only_the_disk_knows_do_no_harm(self):
        """A directory that no kubelet makes; a pod whose uid is a way to elsewhere."""
        self.add_pod('web')
        os.mkdir(self.volume('web', 'data'))
        make_file(self.volume('web', 'file'), 5)
        os.symlink('/usr', self.volume('web', 'link'))
        os.mkdir(os.fsencode(self.volume('web', 'not UTF-8 ')) + b'\xff')
        os.makedirs(f'{self.directory}/secret/volumes/kubernetes.io~empty-dir/data')
        for number, uid in enumerate(('../../../../secret', '..', '.', '/', '', 'a\0b', 'x' * 5000, '\ud7ff\n')):
            self.sandboxes[f'bad{number}'] = sandbox(f'bad{number}', uid=uid)
            self.sandboxes[f'bad{number}'].metadata.uid = uid
            self.sandboxes[f'bad{number}'].metadata.namespace = '../..'
            self.sandboxes[f'bad{number}'].metadata.name = uid
        data = du(self.volume('web', 'data'))
        usages = wait_for('the volume', lambda: (
            self.usages().get(('web', 'emptyDir', 'data')) == data) and self.usages())
        self.assertEqual([], [key for key in usages if key[0] != 'web' or key[2] in ('file', 'link')])
        self.assertNotIn('bug', self.failures)

    def test_a_directory_that_is_no_directory_any_more_has_no_row(self):
        """Neither volumes nor logs are behind a link, whoever has made it."""
        self.add_pod('web', 'app')
        os.makedirs(f'{self.directory}/elsewhere/data')
        os.rmdir(self.volume('web', ''))
        os.symlink(f'{self.directory}/elsewhere', self.volume('web', '')[:-1])
        os.makedirs(self.logs('web', ''))
        os.symlink(f'{self.directory}/elsewhere', self.logs('web', 'app'))
        self.add_pod('db')
        os.mkdir(self.volume('db', 'data'))
        data = du(self.volume('db', 'data'))
        wait_for('the other pod', lambda: self.usages().get(('db', 'emptyDir', 'data')) == data)
        self.assertEqual({('db', 'emptyDir', 'data'): data}, self.usages())

    @needs_root
    def test_other_file_systems_are_not_counted(self):
        self.add_pod('web')
        data = self.volume('web', 'data')
        os.makedirs(f'{data}/below')
        make_file(f'{data}/file', 5000)
        before = du(data)
        mount_tmpfs(self, f'{data}/below')
        make_file(f'{data}/below/file', 100_000)
        # A file of another file system, as a mount point.
        self.assertEqual(before[1] - 1, du(data)[1])
        make_file(f'{data}/point')
        mount_there(self, ['--bind', f'{data}/below/file', f'{data}/point'])
        for mounts in self.write_mounts, lambda: self.write({'proc/1/mountinfo': ''}):
            mounts()
            self.check()

    @needs_root
    def test_a_volume_in_memory_is_as_large_as_its_file_system(self):
        self.add_pod('web')
        for name in 'disk', 'memory':
            os.mkdir(self.volume('web', name))
        mount_tmpfs(self, self.volume('web', 'memory'), '4m')
        make_file(self.volume('web', 'memory/file'), 300_000)
        self.write_mounts()
        total, used, free, inodes, inodes_free = df(self.volume('web', 'memory'))
        self.assertEqual(303_104, used)
        expected = {('web', 'emptyDir', 'disk'): du(self.volume('web', 'disk')),
                    ('web', 'memory', 'memory'): (used, inodes - inodes_free)}
        with contextlib.suppress(TimeoutError):
            wait_for('both', lambda: self.usages() == expected)
        self.measure_again()
        self.assertEqual((expected, []), (self.usages(), [*self.pods()['web'].volumes]))
        # One that mountinfo does not tell of, as in a container without the node's mounts, is not measured as a disk.
        self.write({'proc/1/mountinfo': ''})
        del expected['web', 'memory', 'memory']
        self.measure_again()
        self.assertEqual(expected, self.usages())

    def test_samples_have_pod_kind_and_name(self):
        self.add_pod('web', 'app')
        self.layers = [stats('web-app', 1, 1, writable_layer=layer(77, 4096, inodes_used=value(9)))]
        os.makedirs(self.logs('web', 'app'))
        os.mkdir(self.volume('web', 'data'))
        make_file(self.volume('web', 'data/file'), 5000)
        os.makedirs(self.volume('web', 'pvc-1/mount', 'csi'))
        self.write({'proc/1/mountinfo': VOLUMES.format('/var/lib/kubelet/pods/web-uid/volumes')})
        self.check({('web', 'layer', 'app'): (4096, 9)})
        metrics = self.look()
        samples = samples_of(agent.render_part(metrics, agent.CADVISOR, False))
        pod, = metrics.pod_metrics
        volume, = pod.volumes
        of_pod = {'namespace': 'default', 'pod': 'web-name'}

        def of_usages(field):
            return {Labels({**of_pod, 'kind': usage.kind, 'name': usage.name}): getattr(usage, field)
                    for usage in pod.ephemeral_storage.usages}

        of_volume = Labels({**of_pod, 'plugin': 'kubernetes.io~csi', 'name': 'pvc-1'})
        usage = volume.usage
        for name, expected in {
                'ephemeral_storage_bytes': of_usages('bytes'), 'ephemeral_storage_inodes': of_usages('inodes'),
                'volume_size_bytes': {of_volume: usage.total}, 'volume_used_bytes': {of_volume: usage.used},
                'volume_available_bytes': {of_volume: usage.free}, 'volume_inodes': {of_volume: usage.inodes},
                'volume_inodes_free': {of_volume: usage.inodes_free},
                'volume_inodes_used': {of_volume: usage.inodes - usage.inodes_free}}.items():
            with self.subTest(name):
                self.assertEqual(expected, samples[f'kubensage_pod_{name}'])
        self.assertEqual(3, len(pod.ephemeral_storage.usages))

    def test_an_interval_of_0_measures_no_directory(self):
        self.add_pod('web', 'app')
        os.mkdir(self.volume('web', 'data'))
        self.layers = [stats('web-app', 1, 1, writable_layer=layer(77, 4096))]
        change = 'agent.STORAGE_SECONDS = agent.NEW_PODS_SECONDS = 0'
        for interval, kinds in ('0', {'layer'}), ('0.1', {'layer', 'emptyDir'}):
            process = self.start('--main-loop-duration=0.5', '--output=json', f'--volume-stats-interval={interval}',
                                 '--fs-stats-interval=1', change=change)

            def seen():
                return {usage.kind for pod in process.next_snapshot().pod_metrics
                        for usage in pod.ephemeral_storage.usages}

            wait_for(kinds, lambda: seen() == kinds)
            for _ in range(3):
                self.assertLessEqual(seen(), kinds)
            process.terminate()
            run = process.result()
            self.assertEqual((0, False), (run.code, 'Traceback' in run.err), run.err)

    def test_as_an_ordinary_user_it_is_what_du_says_to_them(self):
        """In a process of theirs: where we are root, as user 65534."""
        self.add_pod('web')
        make_files(self.volume('web', 'data'))
        make_file(self.volume('web', 'data/file'), 5000)
        os.chmod(self.directory, 0o755)
        os.chmod(self.socket, 0o666)
        prefix = () if os.geteuid() else NOBODYS
        expected = [str(int(subprocess.run([*prefix, 'du', '-sx', unit, self.volume('web', 'data')],
                                           stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout.split()[0]))
                    for unit in ('--block-size=1', '--inodes')]
        if not os.geteuid():
            # du(1) itself says less than to root.
            self.assertLess(int(expected[1]), du(self.volume('web', 'data'))[1])
        process = self.start('--main-loop-duration=0.1', '--output=json', '--cri-socket-uid=0',
                             f'--volume-stats-interval={self.INTERVAL}', prefix=prefix)
        seen = None
        deadline = time.monotonic() + PATIENCE_SECONDS
        while seen != expected and time.monotonic() < deadline:
            pods = process.next_snapshot().pod_metrics
            seen = next(([str(usage.bytes), str(usage.inodes)] for pod in pods
                         for usage in pod.ephemeral_storage.usages if usage.incomplete), None)
        self.assertEqual(expected, seen)


# mountinfo of a node: what is mounted for a pod, in the forms that kubelets have had. {0} is the kubelet's root and the
# pod's volumes.
VOLUMES = '''\
1 0 8:16 / {0}/kubernetes.io~csi/pvc-1/mount rw,relatime - ext4 /dev/sdb rw
1 0 0:60 / {0}/kubernetes.io~nfs/shared rw - nfs4 server:/export rw
1 0 8:32 / {0}/kubernetes.io~iscsi/disk rw - xfs /dev/sdc rw
1 0 8:48 /dir {0}/kubernetes.io~local-volume/local rw - ext4 /dev/sdd rw
1 0 8:64 / {0}/kubernetes.io~csi/with\\040space/mount rw - ext4 /dev/sde rw
1 0 0:70 / {0}/kubernetes.io~projected/kube-api-access rw - tmpfs tmpfs rw
1 0 0:71 / {0}/kubernetes.io~secret/token rw - tmpfs tmpfs rw
1 0 8:128 / {0}/kubernetes.io~configmap/settings rw - ext4 /dev/sdi rw
1 0 0:73 / {0}/kubernetes.io~downward-api/info rw - tmpfs tmpfs rw
1 0 8:80 / {0}/kubernetes.io~csi/pvc-2/mount/deeper rw - ext4 /dev/sdf rw
1 0 8:96 / {0}/kubernetes.io~csi rw - ext4 /dev/sdg rw
1 0 8:112 / {0}/pvc-3 rw - ext4 /dev/sdh rw
'''


class VolumesCase(StorageCase):
    """What is mounted for a pod."""

    def volumes(self, *arguments):
        """By pod and name what a snapshot says."""
        return {(pod.id, volume.name): volume for pod in self.pods(*arguments).values() for volume in pod.volumes}

    def numbers(self, volume):
        usage = volume.usage
        return usage.total, usage.used, usage.free, usage.inodes, usage.inodes_free

    def mounted(self, pod, plugin, name, below=''):
        """Where it is to be mounted."""
        path = self.volume(pod, f'{name}{below}', plugin)
        os.makedirs(path, exist_ok=True)
        return path


class VolumesTest(VolumesCase):
    def test_volumes_are_those_that_are_mounted_for_the_pod(self):
        self.add_pod('web')
        self.add_pod('db')
        text = VOLUMES.format('/var/lib/kubelet/pods/web-uid/volumes')
        # Of a pod that the runtime does not know, and of a place that is none.
        others = re.sub('^1 0 ', '1 0 1', text, flags=re.M)
        text += others.replace('web-uid', 'old-uid') + others.replace('/volumes/', '/volume-subpaths/')
        for line in text.splitlines():
            os.makedirs(self.directory + agent.unescape(line.split()[4]), exist_ok=True)
        self.write({'proc/1/mountinfo': text})
        found = self.volumes()
        self.assertEqual({
            ('web', 'pvc-1'): ('kubernetes.io~csi', '/dev/sdb', 'ext4'),
            ('web', 'shared'): ('kubernetes.io~nfs', 'server:/export', 'nfs4'),
            ('web', 'disk'): ('kubernetes.io~iscsi', '/dev/sdc', 'xfs'),
            ('web', 'local'): ('kubernetes.io~local-volume', '/dev/sdd', 'ext4'),
            ('web', 'with space'): ('kubernetes.io~csi', '/dev/sde', 'ext4'),
        }, {key: (volume.plugin, volume.usage.device, volume.usage.fstype) for key, volume in found.items()})
        self.assertEqual('/var/lib/kubelet/pods/web-uid/volumes/kubernetes.io~csi/pvc-1/mount',
                         found['web', 'pvc-1'].usage.mountpoint)
        listed = df(self.directory)
        for volume in found.values():
            self.check_close(listed, self.numbers(volume), (0, 1 << 28, 1 << 28, 0, 5000))

    def test_usage_is_that_of_df(self):
        if os.geteuid():
            self.skipTest('needs root')
        self.add_pod('web')
        expected = {}
        for plugin, name, below in (('csi', 'pvc-1', '/mount'), ('nfs', 'shared', ''), ('iscsi', 'disk', ''),
                                    ('local-volume', 'local', '')):
            path = self.mounted('web', plugin, name, below)
            mount_tmpfs(self, path, f'{len(expected) + 1}m')
            make_file(f'{path}/file', 10_000 * (len(expected) + 1))
            expected['web', name] = df(path)
        self.assertEqual(4, len({*expected.values()}))
        self.write_mounts(fstype='ext4')
        self.assertEqual(expected, {key: self.numbers(volume) for key, volume in self.volumes().items()})
        # On one place the last counts.
        mount_tmpfs(self, self.volume('web', 'pvc-1/mount', 'csi'), '9m')
        self.write_mounts(fstype='ext4')
        self.assertEqual(9 << 20, self.volumes()['web', 'pvc-1'].usage.total)
        self.write({'proc/1/mountinfo': ''})
        self.assertEqual({}, self.volumes())

    def test_what_is_mounted_last_on_one_place_counts_once(self):
        self.add_pod('web')
        self.mounted('web', 'csi', 'pvc-1', '/mount')
        self.write({'proc/1/mountinfo': ''.join(
            f'1 0 8:{number} / /var/lib/kubelet/pods/web-uid/volumes/kubernetes.io~csi/pvc-1/mount rw - ext4 '
            f'/dev/{number} rw\n' for number in range(3))})
        volume, = self.pods()['web'].volumes
        self.assertEqual('/dev/2', volume.usage.device)

    def test_once_there_are_volumes_and_layers_and_no_directories(self):
        self.add_pod('web', 'app')
        self.layers = [stats('web-app', 1, 1, writable_layer=layer(77, 4096))]
        os.mkdir(self.volume('web', 'data'))
        os.makedirs(self.logs('web', 'app'))
        self.mounted('web', 'csi', 'pvc-1', '/mount')
        self.write({'proc/1/mountinfo': VOLUMES.format('/var/lib/kubelet/pods/web-uid/volumes')})
        run = self.main(*self.node, '--once', '--output=json')
        self.assertEqual((0, []), (run.code, run.troubles))
        pod, = json.loads(run.out)['pod_metrics']
        self.assertEqual((['layer'], ['pvc-1']), ([usage['kind'] for usage in pod['ephemeral_storage']['usages']],
                                                  [volume['name'] for volume in pod['volumes']]))

    def test_a_root_elsewhere_is_found(self):
        """By the flag, by what is mounted, by the kubelet's own flag."""
        line = '1 0 8:0 / {0}/pods/web-uid/volumes/kubernetes.io~csi/pvc-1/mount rw - ext4 /dev/sda rw\n'
        self.add_pod('web')
        for root in '/var/lib/kubelet', '/data/kubelet':
            os.makedirs(f'{self.directory}{root}/pods/web-uid/volumes/kubernetes.io~csi/pvc-1/mount')
            os.makedirs(f'{self.directory}{root}/pods/web-uid/volumes/kubernetes.io~empty-dir/{root[1:4]}')
        for what, files, arguments, expected in (
                ('the usual', {}, (), 'var'),
                ('flag', {}, ('--kubelet-root=/data/kubelet',), 'dat'),
                ('flag with a slash at its end', {'proc/1/mountinfo': line.format('/data/kubelet')},
                 ('--kubelet-root=/data/kubelet/',), 'dat'),
                ('mountinfo', {'proc/1/mountinfo': line.format('/data/kubelet')}, (), 'dat'),
                ('flag before mountinfo', {'proc/1/mountinfo': line.format('/var/lib/kubelet')},
                 ('--kubelet-root=/data/kubelet',), 'dat'),
                ('kubelet', {'proc/77/comm': 'kubelet\n',
                             'proc/77/cmdline': 'kubelet\0--root-dir=/data/kubelet\0'}, (), 'dat')):
            with self.subTest(what):
                self.stop()
                self.walk()
                self.write({'proc/1/mountinfo': '', **files})
                usages = wait_for('the volume', lambda: self.usages(*arguments))
                self.assertEqual([('web', 'emptyDir', expected)], [*usages])
                shown = expected in files.get('proc/1/mountinfo', '')
                self.assertEqual([('web', 'pvc-1')] * shown, [*self.volumes(*arguments)])


class CountingServer(FuseServer):
    """It remembers which threads have asked for its space; while it is dead, nothing at all is answered."""
    dead = False

    def __init__(self, test, path, answer):
        self.asked = []
        super().__init__(test, path, answer)

    def answer_all(self, answer):
        self.asked += self.waiting.values()
        super().answer_all(answer)

    def reply(self, unique, error, body=b''):
        if not self.dead:
            super().reply(unique, error, body)


class StuckVolumeTest(VolumesCase):
    """Volumes of a file server."""

    def server(self, pod, name, answer=FUSE_SPACE):
        return CountingServer(self, self.volume(pod, name, 'nfs'), answer)

    def questions(self, threads):
        """How many of these the agent has asked; others on this machine may ask as well."""
        own = {int(name) for name in os.listdir(f'/proc/{self.state.node.helper.process.pid}/task')}
        return sum(thread in own for thread in threads)

    def test_one_file_system_is_asked_once_for_all_its_mounts(self):
        """A volume that pods share: its file system by two more mounts, of which one has a directory of it."""
        self.add_pod('web')
        self.add_pod('db')
        server = self.server('web', 'shared')
        for pod, name in ('web', 'again'), ('db', 'shared'):
            mount_there(self, ['--bind', server.path, self.mounted(pod, 'nfs', name)])
        self.write_mounts()
        expected = df(server.path)
        self.assertEqual((51_200, 20_480), (expected[0], expected[2]))
        for number in range(1, 4):
            self.assertEqual({('web', 'shared'): expected, ('web', 'again'): expected, ('db', 'shared'): expected}, {
                key: self.numbers(volume)[:3] + expected[3:] for key, volume in self.volumes().items()})
            self.assertEqual(number, self.questions(server.asked))

    def test_a_dead_server_is_said_to_be_stuck_and_nothing_waits_for_it(self):
        self.patch(LONGEST_PATIENCE_SECONDS=0.5)
        self.add_pod('web')
        self.add_pod('db')
        os.mkdir(self.volume('web', 'data'))
        dead, good = self.server('web', 'dead', None), self.server('db', 'good')
        mount_there(self, ['--bind', dead.path, self.mounted('db', 'nfs', 'dead')])
        self.write_mounts()
        data, known = du(self.volume('web', 'data')), df(good.path)
        wait_for('what answers', lambda: self.usages().get(('web', 'emptyDir', 'data')) == data)

        def said():
            return {key: (volume.usage.stuck, self.numbers(volume)[:3]) for key, volume in self.volumes().items()}

        stuck = (True, (0, 0, 0))
        expected = {('web', 'dead'): stuck, ('db', 'dead'): stuck, ('db', 'good'): (False, known[:3])}
        for _ in range(3):
            # On a busy machine the one that is well may be late as well.
            wait_for('what is stuck', lambda: said() == expected)
            self.assertEqual([False] * 5, [self.volumes()['web', 'dead'].usage.HasField(name) for name in (
                'total', 'used', 'free', 'inodes', 'inodes_free')])
        self.assertEqual(1, self.questions([*dead.waiting.values()]))
        # What it does not say has no sample.
        text = agent.render_part(self.look(), agent.CADVISOR, False)
        self.assertNotIn('name="dead"', text)
        # It was measured all the while.
        make_file(self.volume('web', 'data/file'), 5000)
        data = du(self.volume('web', 'data'))
        wait_for('the growth', lambda: self.usages().get(('web', 'emptyDir', 'data')) == data)
        dead.answer_all(FUSE_SPACE)
        wait_for('the server', lambda: said() == dict.fromkeys(said(), (False, known[:3])))

    def test_what_is_mounted_in_a_volume_and_is_dead_costs_no_other_pod_its_row(self):
        """As a sidecar mounts it that shows an object store as files, with mountPropagation: Bidirectional."""
        self.add_pod('web')
        self.add_pod('db')
        for pod in 'web', 'db':
            os.mkdir(self.volume(pod, 'data'))
            make_file(self.volume(pod, 'data/file'), 5000)
        server = CountingServer(self, self.volume('web', 'data/store'), FUSE_SPACE)
        # What the kernel knows of its root it believes for no time.
        server.dead = True
        # A thread that waits for it ends only then.
        self.addCleanup(server.close)
        self.write_mounts()
        for size in 10_000, 20_000:
            make_file(self.volume('db', 'data/more'), size)
            data = du(self.volume('db', 'data'))
            wait_for('the other pod', lambda: self.usages().get(('db', 'emptyDir', 'data')) == data)

    def test_what_is_dead_below_a_volume_does_not_keep_the_agent_from_its_end(self):
        """A thread that asks it cannot be killed, as the server has taken the question."""
        self.add_pod('web')
        self.add_pod('db')
        for pod in 'web', 'db':
            os.mkdir(self.volume(pod, 'data'))
        server = CountingServer(self, self.volume('web', 'data/store'), FUSE_SPACE)
        server.dead = True
        self.write_mounts()
        process = self.start('--main-loop-duration=0.1', '--output=json', '--volume-stats-interval=0.1',
                             change='agent.STORAGE_SECONDS = agent.NEW_PODS_SECONDS = 0')
        # Before it is killed.
        self.addCleanup(server.close)
        moments = set()

        def measured():
            moments.update(usage.timestamp_ns for pod in process.next_snapshot().pod_metrics if pod.id == 'db'
                           for usage in pod.ephemeral_storage.usages)
            return len(moments) > 2

        wait_for('measurements of the other pod', measured)
        process.terminate()
        self.assertEqual(0, process.result().code)


class WalkTest(Case):
    """The walk through one directory, turn by turn."""

    def setUp(self):
        super().setUp()
        # A directory in another one.
        self.top = f'{self.directory}/top'
        os.mkdir(self.top)
        self.above = os.open(self.directory, os.O_RDONLY)
        self.addCleanup(os.close, self.above)

    def begin(self):
        return agent.measure_directory(self.top, self.above, set())

    def walk(self):
        """What it has measured, and how many turns it took before the last."""
        walk = self.begin()
        for turns in itertools.count():
            try:
                next(walk)
            except StopIteration as end:
                return end.value, turns

    def check(self, measured):
        self.assertEqual((du(self.top), False), (measured[:2], measured.incomplete))

    def make_many(self, count, below='many'):
        os.mkdir(f'{self.top}/{below}')
        place = os.open(f'{self.top}/{below}', os.O_RDONLY)
        for number in range(count):
            os.close(os.open(f'{number}', os.O_CREAT | os.O_WRONLY, dir_fd=place))
        os.close(place)

    def test_turns_are_short_memory_is_bounded_and_no_file_stays_open(self):
        for name in range(4):
            self.make_many(5000, name)
        before = count_open_files()
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        measured, turns = self.walk()
        _, peak = tracemalloc.get_traced_memory()
        self.check(measured)
        self.assertLessEqual(20_004 // agent.ENTRIES_A_TURN, turns)
        self.assertLess(peak, 200_000)
        self.assertEqual(before, count_open_files())
        walk = self.begin()
        next(walk)
        self.assertLess(before, count_open_files())
        del walk
        self.assertEqual(before, count_open_files())

    def test_depth_is_bounded_and_what_is_deeper_is_said_to_be_missing(self):
        make_nested(self.top, agent.MAX_DEPTH - 1)
        self.check(self.walk()[0])
        bottom = self.top + '/n' * (agent.MAX_DEPTH - 1)
        os.mkdir(f'{bottom}/last')
        shallow = du(self.top)
        make_nested(f'{bottom}/last', 200)
        before, most = count_open_files(), 0
        self.patch(ENTRIES_A_TURN=1)
        walk = self.begin()
        while True:
            try:
                next(walk)
            except StopIteration as end:
                measured = end.value
                break
            most = max(most, count_open_files())
        self.assertEqual((shallow, True), (measured[:2], measured.incomplete))
        self.assertLessEqual(most - before, 2 * agent.MAX_DEPTH + 2)
        self.assertEqual(before, count_open_files())

    def test_hard_links_beyond_what_is_remembered_count_their_share(self):
        self.patch(MAX_LINKS=10)
        for name in 'files', 'links', 'more':
            os.mkdir(f'{self.top}/{name}')
        for number in range(50):
            make_file(f'{self.top}/files/{number}', 5000)
            for name in 'links', 'more':
                os.link(f'{self.top}/files/{number}', f'{self.top}/{name}/{number}')
        self.check(self.walk()[0])
        # Of a file that has a name elsewhere that share is not in it.
        os.rename(f'{self.top}/more', f'{self.directory}/more')
        measured, (size, inodes) = self.walk()[0], du(self.top)
        self.assertTrue(inodes - 50 <= measured.inodes <= inodes, measured)
        self.assertTrue(2 / 3 * size <= measured.bytes <= size, measured)

    def test_a_million_names_of_files_with_many_do_not_fill_the_memory(self):
        self.patch(MAX_LINKS=100)
        self.make_many(4000)
        os.mkdir(f'{self.top}/links')
        for number in range(4000):
            os.link(f'{self.top}/many/{number}', f'{self.top}/links/{number}')
        tracemalloc.start()
        self.addCleanup(tracemalloc.stop)
        measured, _ = self.walk()
        _, peak = tracemalloc.get_traced_memory()
        self.check(measured)
        self.assertLess(peak, 150_000)

    def test_a_link_that_takes_the_place_of_a_directory_leads_nowhere(self):
        """Names that were read before, as the kernel tells many at once; and a directory that is moved away while the
        walk is in it."""
        secret = f'{self.directory}/secret'
        os.mkdir(secret)
        for number in range(50):
            make_file(f'{secret}/{number}', 100_000)
        for number in range(1000):
            os.makedirs(f'{self.top}/{number}/below')
        walk = self.begin()
        next(walk)
        os.mkdir(f'{self.directory}/moved')
        for number in range(1000):
            os.rename(f'{self.top}/{number}', f'{self.directory}/moved/{number}')
            os.symlink(secret, f'{self.top}/{number}')
        with self.assertRaises(StopIteration) as end:
            while True:
                next(walk)
        measured = end.exception.value
        self.assertLessEqual(measured.bytes, du(self.top)[0] + du(f'{self.directory}/moved')[0])
        self.assertLessEqual(measured.inodes, 2001)

    def test_a_directory_whose_way_up_leads_elsewhere_is_left_as_it_was_entered(self):
        """The directory in which the walk is goes to another place: what is above it is still the volume."""
        os.makedirs(f'{self.top}/a/b/c')
        for number in range(20):
            make_file(f'{self.top}/a/b/c/{number}', 100)
            make_file(f'{self.top}/a/{number}', 100)
        expected = du(self.top)
        self.patch(ENTRIES_A_TURN=1)
        walk = self.begin()
        place = f'{self.top}/a/b'

        def is_open():
            return any(os.readlink(f'/proc/self/fd/{name}') == place for name in os.listdir('/proc/self/fd')
                       if os.path.islink(f'/proc/self/fd/{name}'))

        while not is_open():
            next(walk)
        os.makedirs(f'{self.directory}/other/100')
        os.rename(place, f'{self.directory}/other/b')
        with self.assertRaises(StopIteration) as end:
            while True:
                next(walk)
        self.assertEqual(expected, end.exception.value[:2])

    def test_what_is_no_directory_of_this_file_system_is_not_measured(self):
        os.rmdir(self.top)
        for make in (lambda: None, lambda: os.symlink('/usr', self.top), lambda: make_file(self.top, 5),
                     lambda: os.mkfifo(self.top)):
            make()
            with self.assertRaises(OSError):
                self.walk()
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.top)

    def test_a_directory_that_goes_while_it_is_walked_is_what_was_there(self):
        for name in range(20):
            self.make_many(100, name)
        walk, before = self.begin(), du(self.top)
        next(walk)
        shutil.rmtree(self.top)
        with self.assertRaises(StopIteration) as end:
            while True:
                next(walk)
        measured = end.exception.value
        self.assertFalse(measured.incomplete)
        self.assertLess(measured.inodes, before[1])


class TurnsTest(Case):
    def test_a_small_directory_is_measured_while_a_large_one_is_under_way(self):
        """20,000 files; whichever pod comes first, and however the small one's directories are spread."""
        walker = agent.Walker()
        for pod, count in ('large', 20_000), ('small', 10):
            os.makedirs(f'{self.directory}/{pod}/data')
            for number in range(count):
                os.close(os.open(f'{self.directory}/{pod}/data/{number}', os.O_CREAT | os.O_WRONLY))
        for pods in ('large', 'small'), ('small', 'large'):
            walker = agent.Walker()
            walker.pods = {pod: {'emptyDir': f'{self.directory}/{pod}'} for pod in pods}
            agent.begin_walks(walker, 60, 1000)
            turns = 0
            while walker.walks:
                agent.take_turn(walker)
                turns += 1
                if turns == 4:
                    self.assertEqual(du(f'{self.directory}/small/data'),
                                     walker.measured['small']['emptyDir', 'data'][:2])
                    self.assertEqual({}, walker.measured['large'])
            self.assertEqual(du(f'{self.directory}/large/data'), walker.measured['large']['emptyDir', 'data'][:2])
            self.assertLessEqual(20_000 // agent.ENTRIES_A_TURN, turns)

    def test_many_directories_are_many_turns_as_well(self):
        """3,000 volumes with a file each."""
        for number in range(3000):
            os.makedirs(f'{self.directory}/pod/{number}')
            os.close(os.open(f'{self.directory}/pod/{number}/file', os.O_CREAT | os.O_WRONLY))
        walker, turns = agent.Walker(), 0
        walker.pods = {'pod': {'emptyDir': f'{self.directory}/pod'}}
        agent.begin_walks(walker, 60, 1000)
        while walker.walks:
            agent.take_turn(walker)
            turns += 1
        self.assertEqual(3000, len(walker.measured['pod']))
        self.assertLessEqual(6000 // agent.ENTRIES_A_TURN, turns)

    def test_a_pod_is_measured_again_after_the_interval_and_forgotten_with_its_directories_closed(self):
        os.makedirs(f'{self.directory}/pod/data')
        for number in range(1000):
            os.close(os.open(f'{self.directory}/pod/data/{number}', os.O_CREAT | os.O_WRONLY))
        walker, before = agent.Walker(), count_open_files()
        walker.pods = {'pod': {'emptyDir': f'{self.directory}/pod'}}
        agent.begin_walks(walker, 60, 1000)
        while walker.walks:
            agent.take_turn(walker)
        agent.begin_walks(walker, 60, 1059)
        self.assertEqual({}, walker.walks)
        agent.begin_walks(walker, 60, 1060)
        agent.take_turn(walker)
        self.assertLess(before, count_open_files())
        walker.pods = {}
        agent.begin_walks(walker, 60, 1061)
        self.assertEqual(({}, {}, {}, before), (walker.walks, walker.measured, walker.due, count_open_files()))


class TenantStorageTest(VolumesCase):
    """What others do to be in the way."""

    def series_twice(self, metrics):
        series = re.findall('^([^#].*) ', agent.render_part(metrics, agent.CADVISOR, False), re.M)
        return [name for name, count in collections.Counter(series).items() if count > 1]

    def forge(self, mountpoint, number):
        """What mountinfo says of a FUSE mount of a user, who may choose the place and the source."""
        os.makedirs(os.fsencode(self.directory + mountpoint), exist_ok=True)
        escaped = ''.join(f'\\{ord(letter):03o}' if letter in ' \t\n\\#' else letter for letter in mountpoint)
        return f'1 0 0:{number} / {escaped} rw,nosuid,nodev - fuse.sshfs /dev/sdb rw,user_id=1000\n'

    def write_forged(self, *mountpoints):
        text = '1 0 8:16 / /var/lib/kubelet/pods/web-uid/volumes/kubernetes.io~csi/pvc-1/mount rw - ext4 /dev/sdb rw\n'
        text += ''.join(self.forge(mountpoint, number) for number, mountpoint in enumerate(mountpoints, 100))
        self.write({'proc/1/mountinfo': text.encode(errors='surrogateescape')})

    def test_a_mount_elsewhere_that_looks_like_a_volume_is_none_and_its_place_is_not_the_kubelets(self):
        """Any user can mount FUSE below a directory of theirs, under any name."""
        self.add_pod('web')
        self.mounted('web', 'csi', 'pvc-1', '/mount')
        os.mkdir(self.volume('web', 'data'))
        user = '/home/user/pods/web-uid/volumes'
        self.write_forged(f'{user}/kubernetes.io~csi/forged', f'{user}/kubernetes.io~csi/pvc-1/mount',
                          *(f'{user}/kubernetes.io~nfs/{number}' for number in range(40)))
        os.makedirs(f'{self.directory}{user}/kubernetes.io~empty-dir/forged')
        data = du(self.volume('web', 'data'))
        wait_for('the volume', lambda: self.usages() == {('web', 'emptyDir', 'data'): data})
        pod = self.pods()['web']
        self.assertEqual([('kubernetes.io~csi', 'pvc-1', '/dev/sdb', 'ext4')], [
            (volume.plugin, volume.name, volume.usage.device, volume.usage.fstype) for volume in pod.volumes])
        self.assertEqual({}, dict(pod.left_out))

    def test_names_of_mounts_that_are_no_utf_8_or_hold_control_characters_cost_nothing_else(self):
        self.add_pod('web')
        self.add_pod('db')
        self.mounted('web', 'csi', 'pvc-1', '/mount')
        top = '/var/lib/kubelet/pods/web-uid/volumes/kubernetes.io~csi'
        self.write_forged(*(f'{top}/{name}' for name in ('a\udcff', 'a\udcfe', 'a\x01', 'a\x02', 'line\nfeed', 'a b',
                                                        EVIL.replace('/', ''))), f'{top}\udcff/a')
        for _ in range(2):
            metrics = self.look()
            self.assertEqual({'web', 'db'}, {pod.id for pod in metrics.pod_metrics})
            self.assertEqual([], [name for name in self.failures if not name.startswith('mount')])
            self.assertIn('pvc-1', [volume.name for pod in metrics.pod_metrics for volume in pod.volumes])
            self.assertEqual([], self.series_twice(metrics))
            text = agent.render_part(metrics, agent.CADVISOR, False)
            self.assertIsNone(NOT_PRINTABLE.search(text))

    def test_names_that_look_alike_are_not_one_series_twice(self):
        """One name by two plugins, as a PersistentVolume and an inline volume may have it; a mount within a volume that
        is called as CSI calls the volume; directories whose names are no UTF-8."""
        self.add_pod('web')
        top = '/var/lib/kubelet/pods/web-uid/volumes/kubernetes.io~'
        self.write({'proc/1/mountinfo': ''.join(
            f'1 0 8:{number} / {top}{place} rw - ext4 /dev/{number} rw\n' for number, place in enumerate((
                'csi/data/mount', 'nfs/data', 'iscsi/disk', 'iscsi/disk/mount', 'local-volume/data')))})
        for place in 'csi/data/mount', 'nfs/data', 'iscsi/disk/mount', 'local-volume/data':
            os.makedirs(f'{self.directory}{top}{place}')
        for name in b'\xff', b'\xfe':
            os.mkdir(os.fsencode(self.volume('web', '')) + name)
        wait_for('the directories', lambda: self.pods()['web'].ephemeral_storage.usages)
        self.assertEqual([], self.series_twice(self.look()))

    def test_pods_of_one_name_are_not_one_series_twice(self):
        """As of a StatefulSet: the old one is still there."""
        for name in 'old', 'new':
            self.add_pod(name)
            self.sandboxes[name].metadata.name = 'web'
            os.mkdir(self.volume(name, 'data'))
        wait_for('both', lambda: len(self.usages()) == 2)
        self.assertEqual([], self.series_twice(self.look()))

    def test_a_sandbox_that_was_made_anew_has_the_volumes_of_its_pod(self):
        """Two sandboxes of one uid: the old one has a container that runs."""
        self.add_pod('web', 'app')
        os.mkdir(self.volume('web', 'data'))
        self.sandboxes['again'] = sandbox('again', uid='web-uid')
        self.sandboxes['again'].metadata.name = 'web-name'
        self.sandboxes['again'].metadata.attempt = 3
        wait_for('the volume', self.usages)
        wait_for('the volume', self.usages)
        self.assertEqual([], self.series_twice(self.look()))

    def test_a_link_in_the_place_of_a_pods_logs_leads_nowhere(self):
        """A pod with a hostPath of /var/log, while it is measured again and again."""
        self.add_pod('web', 'app')
        self.add_pod('db')
        os.mkdir(self.volume('db', 'data'))
        os.makedirs(f'{self.directory}/secret/treasure')
        make_file(f'{self.directory}/secret/treasure/file', 5000)
        os.makedirs(self.logs('web', 'app'))
        logs, ended = self.logs('web', '')[:-1], threading.Event()

        def exchange():
            """Directory, link, directory, ..."""
            while not ended.is_set():
                os.rename(logs, f'{logs}.away')
                os.symlink(f'{self.directory}/secret', logs)
                os.unlink(logs)
                os.rename(f'{logs}.away', logs)

        thread = threading.Thread(target=exchange)
        self.addCleanup(thread.join)
        self.addCleanup(ended.set)
        thread.start()
        moments = set()

        def measured():
            pods = self.pods()
            self.assertNotIn('treasure', [usage.name for usage in pods['web'].ephemeral_storage.usages])
            moments.update(usage.timestamp_ns for usage in pods['db'].ephemeral_storage.usages)
            return len(moments) > 10

        wait_for('ten measurements', measured)

    def test_directories_that_are_swapped_for_links_all_the_time_are_measured_without_what_the_links_lead_to(self):
        self.add_pod('web')
        os.makedirs(self.volume('web', 'data/0'))
        secret, ended = f'{self.directory}/secret', threading.Event()
        os.mkdir(secret)
        for number in range(300):
            os.close(os.open(f'{secret}/{number}', os.O_CREAT | os.O_WRONLY))

        def exchange():
            place = self.volume('web', 'data/0')
            while not ended.is_set():
                os.rmdir(place)
                os.symlink(secret, place)
                os.unlink(place)
                os.mkdir(place)

        thread = threading.Thread(target=exchange)
        self.addCleanup(thread.join)
        self.addCleanup(ended.set)
        thread.start()
        moments = set()

        def measured():
            for usage in self.pods()['web'].ephemeral_storage.usages:
                self.assertLessEqual(usage.inodes, 2)
                moments.add(usage.timestamp_ns)
            return len(moments) > 10

        wait_for('ten measurements', measured)

    def test_a_million_volumes_of_one_pod_are_cut_and_said_to_be(self):
        self.add_pod('web')
        self.add_pod('db')
        for number in range(3 * agent.MAX_ROWS):
            os.mkdir(self.volume('web', f'{number:03}'))
        os.mkdir(self.volume('db', 'data'))
        wait_for('the directories', lambda: self.pods()['web'].left_out['storage'] == 2 * agent.MAX_ROWS)
        self.measure_again()
        pods = self.pods()
        self.assertEqual((2 * agent.MAX_ROWS, agent.MAX_ROWS, {}, 1), (
            pods['web'].left_out['storage'], len(pods['web'].ephemeral_storage.usages), dict(pods['db'].left_out),
            len(pods['db'].ephemeral_storage.usages)))

    def test_where_open_files_are_few_directories_are_measured_all_the_same(self):
        """The files of the cgroups take all that the limit allows but a reserve, which is for this as well."""
        self.add_pod('web')
        make_files(self.volume('web', 'data'))
        self.patch(MAX_OPEN_FILES=agent.SPARE_DESCRIPTORS + 50)
        taken = [os.open('/dev/null', os.O_RDONLY) for _ in range(100)]
        for number in taken:
            self.addCleanup(os.close, number)
        self.check()


# --- README

PROMISE = ("every snapshot taken is delivered at least once while it is younger than the retention, whatever the "
           "relay, the runtime, the kernel's files or the disk do; the agent neither hangs nor grows nor needs a "
           "restart")


class ReadmeRulesTest(Case):
    def test_rules_and_scrape_jobs_are_those_that_prometheus_takes(self):
        """But for the service discovery, which Debian's promtool does not know."""
        self.tool('promtool', '--version')
        readme = read_text(f'{HERE}/README.md')
        blocks = {block.partition(':')[0]: block for block in re.findall(r'```\n(.*?)```', readme, re.DOTALL)}
        scrape = re.sub(r'kubernetes_sd_configs: .*', 'static_configs: [{targets: [node]}]', blocks['scrape_configs'])
        query = re.search(r'^    (topk.*)', readme, re.MULTILINE).group(1)
        rules = blocks['groups'] + f"      - {{record: largest, expr: '{query}'}}\n"
        self.write({'rules.yml': rules, 'scrape.yml': scrape})
        for what, file, said in ('rules', 'rules.yml', '5 rules found'), ('config', 'scrape.yml', 'SUCCESS'):
            self.assertIn(said, self.tool('promtool', 'check', what, f'{self.directory}/{file}'))
        names = {*re.findall(r'(?:kubensage|container)_\w+', rules)}
        metrics = exposed_metrics()
        metrics.agent_metrics.backlog.dropped_total['size'] = 1
        metrics.pod_metrics[0].container_metrics[0].oom_kills = 1
        metrics.pod_metrics[0].ephemeral_storage.usages.add(kind='logs', name='app', bytes=1)
        served = agent.render_prometheus(metrics) + 'kubensage_snapshot_age_seconds '
        self.assertEqual(set(), {name for name in names if name not in served})


class ReadmeTest(Case):
    readme = read_text(f'{HERE}/README.md')
    MAX_BYTES = 17_000
    # In the place of the archive. The unit does not see what is below /tmp.
    PROGRAM = f'''
import sys
sys.path[:0] = {sys.path!r}
import agent
if '--print-unit' in sys.argv:
    agent.__file__ = '/usr/local/lib/kubensage-agent.pyz'
sys.exit(agent.main())
'''
    # What not every machine has, and what a test had better not do.
    COMMANDS = {'python3': f'exec {sys.executable} "$@"', 'sudo': 'exec "$@"', 'kubectl': 'exec cat',
                'systemctl': 'echo "$@"', 'sleep': ''}

    def section(self, title):
        return re.search(rf'^## {re.escape(title)}\n(.*?)(?=^## |\Z)', self.readme, re.MULTILINE | re.DOTALL).group(1)

    def column(self, title, number):
        """What the cells of a column of the section's last table have in back quotes."""
        table = re.findall(r'(?:^\|.*\n)+', self.section(title), re.MULTILINE)[-1]
        rows = [line.strip('| ').split(' | ') for line in table.splitlines() if line.startswith('| ')]
        return [name for row in rows[1:] for name in re.findall(r'`([^`]+)`', row[number])]

    def command(self, pattern):
        """The lines of code that match, without their margin."""
        found = re.search(rf'^ *{pattern}', self.readme, re.MULTILINE)
        return textwrap.dedent(found.group()).strip()

    def run_readme(self, text, other={}, environment={}):
        """A command of the README, in the directory of the test; also what lies elsewhere is there, and `other` goes in
        the place of what the README names."""
        for name, script in self.COMMANDS.items():
            self.write({f'bin/{name}': f'#!/bin/sh\n{script}\n'})
            os.chmod(f'{self.directory}/bin/{name}', 0o755)
        for directory in '/etc/systemd/system', '/usr/local/lib', '':
            os.makedirs(self.directory + directory, exist_ok=True)
            with zipfile.ZipFile(f'{self.directory}{directory}/kubensage-agent.pyz', 'w') as archive:
                archive.writestr('__main__.py', self.PROGRAM)
        for name, value in {'/usr/': f'{self.directory}/usr/', '/etc/': f'{self.directory}/etc/', **other}.items():
            text = text.replace(name, value)
        return self.spawn(['bash', '-ec', text], {
            **ENVIRONMENT, **environment, 'PATH': f'{self.directory}/bin:{ENVIRONMENT["PATH"]}'})

    def of_this_node(self):
        """The environment of an agent that is to read it."""
        return {'KUBENSAGE_CRI_SOCKET': self.socket, 'KUBENSAGE_LOG_FILE': f'{self.directory}/log'}

    def free_port(self):
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            return probe.getsockname()[1]

    def test_it_is_short(self):
        self.assertLessEqual(len(self.readme.encode()), self.MAX_BYTES)

    def test_what_it_says_of_messages_is_what_the_agent_says(self):
        """Word by word, but for what depends."""
        program = read_text(f'{HERE}/agent.py')
        said = self.column('Running it', 0)
        self.assertGreater(len(said), 3)
        for message in said:
            self.assertEqual([], [part for part in message.split('…') if part.strip(' :') not in program], message)

    def test_the_relay_to_try_takes_what_the_agent_sends(self):
        """The first command, and the second beside it."""
        first, second = self.command('.*--receive.*'), self.command('.*--relay-address 127.*')
        other = {'127.0.0.1:50051': f'127.0.0.1:{self.free_port()}'}
        relay = self.run_readme(f'exec {first}', other)
        self.assertIn('stores nothing', relay.stderr.readline())
        sender = self.run_readme(f'exec {second}', other, self.of_this_node())
        self.assertEqual(1, relay.next_snapshot().agent_metrics.sequence)
        for process in sender, relay:
            process.terminate()
        self.assertRegex(relay.result().err, r'[1-9]\d* snapshots? received, 0 missing, 0 twice')
        self.assertEqual(0, sender.result().code)

    def test_what_is_served_to_prometheus(self):
        port = self.free_port()
        self.run_readme('exec ' + self.command('.*--listen 9551'), {'9551': str(port)}, self.of_this_node())

        def answer():
            with contextlib.suppress(OSError), contextlib.closing(
                    http.client.HTTPConnection('127.0.0.1', port, timeout=PATIENCE_SECONDS)) as connection:
                connection.request('GET', '/metrics')
                response = connection.getresponse()
                return response.status == 200 and response.read()

        self.assertIn(b'\nnode_load1 ', wait_for('/metrics', answer))

    def test_the_units_commands(self):
        run = self.run_readme(self.command(r'sudo cp .*\n.*--print-unit.*\n.*')).result()
        self.assertEqual((0, ''), (run.code, run.err))
        unit = read_text(f'{self.directory}/etc/systemd/system/kubensage-agent.service')
        self.assertIn('-I /usr/local/lib/kubensage-agent.pyz --relay-address=relay.example:50051', unit)
        self.assertTrue(run.out.endswith('\nenable --now kubensage-agent\n'))

    def test_the_line_for_cron(self):
        relay = FakeRelay(self)
        line = self.command(r'\* \* \* \* \* root .*').partition(' root ')[2]
        other = {'relay.example:50051': relay.address, '/var/lib': self.directory}
        run = self.run_readme(line, other, self.of_this_node()).result()
        self.assertEqual((0, ''), (run.code, run.out), run.err)
        self.assertEqual(1, relay.next_arrived(1)[0].agent_metrics.sequence)

    def test_the_manifest_for_an_image(self):
        """The image takes the place of the volume, and all else is as it is printed."""
        printed = self.main('--print-daemonset', '--relay-address', 'relay.example:50051').out
        for part in ('''            - name: archive
              mountPath: /opt/kubensage-agent
              readOnly: true
''', '''        - name: archive
          hostPath:
            path: /opt/kubensage-agent
            type: Directory
'''):
            self.assertEqual(1, printed.count(part))
            printed = printed.replace(part, '')
        run = self.run_readme(self.command(r'.*--print-daemonset.*\n.*\n.*')).result()
        self.assertEqual((0, ''), (run.code, run.err))
        self.assertEqual(re.sub('image: .*', 'image: registry.example/agent:1', printed), run.out)
        self.assertIn('\nCOPY kubensage-agent.pyz /opt/kubensage-agent/\n', self.readme)
        self.assertIn('"/opt/kubensage-agent/kubensage-agent.pyz"', run.out)

    def test_help_is_the_one_that_the_agent_prints(self):
        """But for white space: argparse breaks lines otherwise, and called the options optional arguments before Python
        3.10; tabs are fewer bytes. Remake with `COLUMNS=100 python3 kubensage-agent.pyz --help | unexpand
        --first-only`."""
        pasted = re.search(r'^\$ python3 kubensage-agent\.pyz --help\n(.*?)^```', self.readme,
                           re.MULTILINE | re.DOTALL).group(1)
        with mock.patch.dict(os.environ, {'COLUMNS': '100', 'NO_COLOR': '1'}):
            printed = agent.argument_parser().format_help()
        self.assertEqual(''.join(pasted.split()), ''.join(printed.replace('optional arguments:', 'options:').split()))

    def test_every_flag_of_the_agent_and_no_other(self):
        named = set(re.findall(r'(?<![\w-])--[a-z][\w-]*', self.readme))
        # Of build_zipapp.sh, systemctl, protoc, the kubelet.
        others = {'--native', '--now', '--proto_path', '--python_out', '--root-dir'}
        self.assertEqual(named - others, {*agent.FLAGS, '--help', '--version'})

    def test_messages_named_are_in_the_proto_and_every_field_of_ours_for_the_node_is_named(self):
        messages = {name for name in self.column('What it collects', 1) if name[0].isupper()}
        self.assertIn('PodMetrics', messages)
        self.assertEqual(messages - set(wire.DESCRIPTOR.message_types_by_name), set())
        ours = {field.name for field in wire.NodeMetrics.DESCRIPTOR.fields if field.number >= 100}
        self.assertEqual(ours - set(re.findall(r'\w+', self.readme)), set())

    def test_every_file_named_is_there(self):
        paths = re.findall(r'`([\w./]+)`', self.section('Files and tests'))
        self.assertIn('agent.py', paths)
        self.assertEqual([path for path in paths if not os.path.isfile(f'{HERE}/{path}')], [])

    def test_the_promise(self):
        self.assertIn(f'> {PROMISE}\n', self.readme)

    def test_every_method_of_the_runtime_that_is_called(self):
        called = {name for name in re.findall(r"'([A-Z]\w+)'", read_text(f'{HERE}/agent.py'))
                  if hasattr(cri, f'{name}Response')}
        self.assertIn('ListContainers', called)
        self.assertEqual(called - set(re.findall(r'\w+', self.section('What it collects'))), set())

    def test_versions_to_install_are_those_of_the_archive(self):
        pinned = dict(re.findall(r' (grpcio|protobuf)-([\d.]+)-', Build.SCRIPT))
        installed = dict(re.findall(r'\b(grpcio|protobuf)==([\d.]+)', self.readme))
        self.assertEqual(installed, pinned)


class ProtoTest(unittest.TestCase):
    # A file of the kernel or of a cgroup, a call, the runtime, the agent.
    SOURCE = re.compile(r'/(proc|sys|etc)/|\bsysfs\b|\bfiles below|\b(cpu|memory|io|pids)\.[a-z*]|\bcgroup\b|\bCRI\b|'
                        r'\w\([1-9]\)|\bagent\b')
    NUMBER = r'[\w.<>, ]*(?:double|float|(?:Double|Float)Value)>?'
    UNIT = r'((milli|micro|nano)?seconds|percent|threads|_percentage)(_total)?\b'
    # The unit is in the comment above the field before it.
    NEIGHBOURS = {'avg60', 'avg300', 'load5', 'load15'}
    messages = re.findall(r'((?:^//.*\n)*)^message (\w+) {\n((?:.*\n)*?)}', read_text(f'{HERE}/proto/kubensage.proto'),
                          re.MULTILINE)

    def test_every_message_says_where_it_comes_from(self):
        self.assertEqual({name for _, name, _ in self.messages}, set(wire.DESCRIPTOR.message_types_by_name))
        self.assertEqual([name for comment, name, _ in self.messages if not self.SOURCE.search(comment)], [])

    def test_every_number_that_is_not_whole_has_a_unit(self):
        """In its name or in the comment right above it; or a clause of the message's comment begins with it. A whole
        number without a unit is a count."""
        bare = set()
        for above, _, fields in self.messages:
            if re.search(rf'[.,:]\s(// )?{self.UNIT}', above, re.IGNORECASE):
                continue
            for comment, name in re.findall(rf'((?:^  //.*\n)*)^  {self.NUMBER} (\w+) =', fields, re.MULTILINE):
                if not re.search(self.UNIT, comment + name, re.IGNORECASE):
                    bare.add(name)
        self.assertEqual(bare, self.NEIGHBOURS)


# --- what a tenant of the node can do

# By how much memory may grow while one attacks.
GROWTH_BYTES = 20_000_000
# Of cgroup v1 those with numbers that are read.
CONTROLLERS = ('cpu', 'cpuacct', 'memory', 'blkio', 'pids')
NOBODYS = ('setpriv', f'--reuid={NOBODY}', f'--regid={NOBODY}', '--clear-groups')
# What a terminal, a log or a scraper takes for more than a character.
EVIL = 'a\x1b[31m\x9b2J\x07\b\r\nREADY=1\x7f\x85\u2028\u202e\u2066z'
NOT_PRINTABLE = re.compile('[\0-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e\u2066]')


def remove_groups(top):
    """A cgroup and all below it, however deep, once the last process has left it."""
    found, waiting = [], [top]
    while waiting:
        found.append(waiting.pop())
        with contextlib.suppress(FileNotFoundError), os.scandir(found[-1]) as entries:
            waiting += [entry.path for entry in entries if entry.is_dir()]
    for path in reversed(found):
        def is_gone():
            try:
                os.rmdir(path)
            except FileNotFoundError:
                pass
            except OSError:
                return False
            return True
        wait_for(f'the end of {path[-200:]}', is_gone)


def remove_group_if_empty(path):
    """One that others may use as well, as kubepods."""
    with contextlib.suppress(OSError):
        os.rmdir(path)


def make_groups(test, path, user=0):
    """A cgroup and those above it, in each hierarchy with numbers, until the test ends; it is given to a user, as
    systemd does where a unit has Delegate=yes."""
    tree = agent.read_cgroup_tree(LIVE.sysfs)
    for top in {tree.directories[name] for name in CONTROLLERS if name in tree.directories} or {tree.top}:
        above = top
        for name in path.split('/'):
            with contextlib.suppress(OSError):
                # Of v2, those with numbers in what is below.
                write_tree(above, {'cgroup.subtree_control': '+cpu +memory +io +pids'} if tree.version == 2 else {})
            above = f'{above}/{name}'
            with contextlib.suppress(FileExistsError):
                os.mkdir(above)
                test.addCleanup(remove_group_if_empty, above)
        test.addCleanup(remove_groups, above)
        for name in ('', 'cgroup.procs'):
            os.chown(f'{above}/{name}', user, user)


def join_groups(path):
    """The command that takes a shell into a group, in each hierarchy."""
    tree = agent.read_cgroup_tree(LIVE.sysfs)
    tops = {tree.directories[name] for name in CONTROLLERS if name in tree.directories} or {tree.top}
    return ''.join(f'echo $$ >{top}/{path}/cgroup.procs; ' for top in sorted(tops))


@needs_root
class ForgedRuntimeTest(RuntimeCase):
    """A node whose processes are some of this machine's. Its process 1 is in the namespaces of the test: those of the
    machine's may be secret, as they are in a sandbox."""

    def setUp(self):
        super().setUp()
        self.endpoint = None
        os.chmod(self.directory, 0o755)
        self.runtime('run/containerd/containerd.sock', 'real')
        os.makedirs(f'{self.directory}/proc/1/ns')
        for kind in 'pid', 'mnt':
            os.symlink(os.readlink(f'/proc/self/ns/{kind}'), f'{self.directory}/proc/1/ns/{kind}')

    def runtime(self, path, pod):
        return FakeRuntime(self, f'{self.directory}/{path}', ListPodSandbox=list_pods(sandbox(pod)), ListContainers=b'')

    def make_directory(self, name, user=0, mode=0o755):
        os.makedirs(f'{self.directory}/{name}')
        os.chown(f'{self.directory}/{name}', user, user)
        os.chmod(f'{self.directory}/{name}', mode)

    def name_socket(self, path):
        """In a setting of root's."""
        self.write({'etc/crictl.yaml': f'runtime-endpoint: unix:///{path}\n'})

    def listed(self):
        """The pods that a fresh agent shows, and why it does without a runtime."""
        self.new_state()
        part = self.cycle()
        return [pod.id for pod in part.pods], part.failures.get('container runtime', '')

    def start_kubelet(self, *prefix):
        """A process that calls itself kubelet and names the other runtime, once it runs."""
        program = f'{self.directory}/kubelet'
        if not os.path.exists(program):
            # It keeps what user ids it has.
            self.write({'kubelet': '#!/bin/sh -p\necho $$\nread line\n'})
            os.chmod(program, 0o755)
        process = self.spawn([*prefix, program, '--container-runtime-endpoint=unix:///other/s'], stdin=subprocess.PIPE)
        pid = int(process.stdout.readline())
        if '--pid' in prefix:
            # It has said what it is called there.
            pid = child_pid(process)
        os.symlink(f'/proc/{pid}', f'{self.directory}/proc/{pid}')
        self.assertEqual('kubelet\n', read_text(f'{self.directory}/proc/{pid}/comm'))
        return process

    def test_the_command_line_of_a_process_that_calls_itself_kubelet_is_believed_of_the_nodes_alone(self):
        """What each of them names would do as a runtime. A process of a pod can be root's and see the node's
        processes; one that a user has started from a program with the set-user-ID bit is the user's as well."""
        self.make_directory('other')
        self.runtime('other/s', 'other')
        pod = f'kubepods/pod{uuid.uuid4()}'
        make_groups(self, pod)
        for what, prefix in {
                'another user': NOBODYS, 'set-user-ID': ('setpriv', f'--ruid={NOBODY}'),
                'other mounts': ('unshare', '--mount'),
                'other processes': ('unshare', '--pid', '--fork', '--kill-child'),
                'a pod': ('sh', '-ec', join_groups(pod) + 'exec "$@"', 'sh')}.items():
            with self.subTest(what):
                process = self.start_kubelet(*prefix)
                self.assertEqual((['real'], ''), self.listed())
                process.end()
        self.start_kubelet()
        self.assertEqual((['other'], ''), self.listed())

    def test_a_process_of_another_user_does_not_hide_the_kubelet(self):
        """Whose process id is the lowest, is of no importance."""
        self.make_directory('other')
        self.runtime('other/s', 'other')
        self.start_kubelet(*NOBODYS)
        self.start_kubelet()
        self.start_kubelet(*NOBODYS)
        self.assertEqual((['other'], ''), self.listed())

    def test_a_tenant_that_forges_kubelet_and_runtime_is_not_heard(self):
        """As a whole: in an empty directory of a pod, named by a process of the pod; the agent has no runtime
        yet."""
        volume = 'var/lib/kubelet/pods/1/volumes/kubernetes.io~empty-dir/x'
        self.make_directory(volume, NOBODY, 0o777)
        with as_nobody():
            forged = self.runtime(f'{volume}/s', 'forged')
        os.symlink(f'{self.directory}/{volume}', f'{self.directory}/other')
        self.start_kubelet(*NOBODYS)
        self.assertEqual((['real'], ''), self.listed())
        os.unlink(f'{self.directory}/run/containerd/containerd.sock')
        pods, trouble = self.listed()
        self.assertEqual(([], []), (pods, forged.asked))
        self.assertIn('no', trouble)

    def test_a_socket_that_another_user_could_have_made_is_refused_by_name_and_the_next_is_taken(self):
        """Wherever it was found; where it is all there is, the trouble says what is wrong. In a sticky directory
        the name is anybody's as soon as the runtime is stopped."""
        self.make_directory('theirs', NOBODY)
        self.make_directory('theirs/below')
        self.make_directory('open', mode=0o777)
        self.make_directory('group', mode=0o775)
        self.make_directory('sticky', mode=0o1777)
        self.make_directory('sticky/fine')
        self.make_directory('fine')
        for path in ('theirs/s', 'theirs/below/s', 'open/s', 'group/s', 'sticky/s', 'sticky/fine/s', 'fine/s',
                     'fine/given'):
            self.runtime(path, 'other')
        os.chown(f'{self.directory}/fine/given', NOBODY, NOBODY)
        with as_nobody():
            self.runtime('theirs/claimed', 'other')
        os.rename(f'{self.directory}/theirs/claimed', f'{self.directory}/fine/claimed')
        os.chown(f'{self.directory}/fine/claimed', 0, 0)
        os.symlink(f'{self.directory}/theirs/s', f'{self.directory}/fine/link')
        for path, reason in (
                ('theirs/s', f'theirs belongs to user {NOBODY}'),
                ('theirs/below/s', f'theirs belongs to user {NOBODY}'),
                ('fine/link', f'theirs belongs to user {NOBODY}'),
                ('open/s', 'open is writable by others'), ('group/s', 'group is writable by others'),
                ('sticky/s', 'sticky is writable by others'),
                ('fine/given', f'fine/given belongs to user {NOBODY}'),
                ('fine/claimed', f'user {NOBODY}'), ('sticky/fine/s', ''), ('fine/s', '')):
            with self.subTest(path):
                self.name_socket(path)
                self.endpoint = None
                self.assertEqual(([['real'], ['other']][not reason], ''), self.listed())
                self.endpoint = f'{self.directory}/{path}'
                pods, trouble = self.listed()
                self.assertEqual(['other'] * (not reason), pods)
                self.assertIn(reason, trouble)
                self.assertIn(os.path.realpath(f'{self.directory}/{path}') if reason else '', trouble)

    def test_a_socket_at_a_usual_path_is_none_of_a_tenant_either(self):
        """/run/k3s of a node that has no k3s, in a directory that root has given away."""
        os.unlink(f'{self.directory}/run/containerd/containerd.sock')
        self.make_directory('run/crio', NOBODY)
        with as_nobody():
            forged = self.runtime('run/crio/crio.sock', 'forged')
        pods, trouble = self.listed()
        self.assertEqual(([], []), (pods, forged.asked))
        self.assertIn(f'{self.directory}/run/crio belongs to user {NOBODY}', trouble)

    def test_a_flag_names_one_more_user_to_believe_and_that_is_a_warning(self):
        """A runtime without root."""
        self.write({})
        self.make_directory('home', NOBODY)
        with as_nobody():
            self.runtime('home/s', 'rootless')
        for user, pods in (NOBODY, ['rootless']), (NOBODY - 1, []):
            run = self.main(*self.node, '--cri-socket', f'{self.directory}/home/s', f'--cri-socket-uid={user}',
                            '--once', '--output=json')
            self.assertEqual((0, pods), (run.code, [pod['id'] for pod in json.loads(run.out).get('pod_metrics', ())]))
            self.assertRegex(run.err, rf'WARNING [^\n]*\b{user}\b')


def make_deep(directory):
    """1,500 directories, one in the other."""
    parent = os.open(directory, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir('n', dir_fd=parent)
        child = os.open('n', os.O_RDONLY, dir_fd=parent)
        os.close(parent)
        parent = child
    os.close(parent)


class TenantPod(NamedTuple):
    """A pod with one container: what the runtime lists, the container's group, and the process in it."""
    sandbox: cri.PodSandbox
    container: cri.Container
    group: str
    process: Process


@needs_root
class TenantCase(Case):
    """An agent that watches this machine, and delivers to a relay. The runtime, which the test plays, lists pods that
    have groups and networks of this kernel's. What the victims' kernel files say is what has to be in each snapshot."""

    SECONDS = 1

    def setUp(self):
        super().setUp()
        self.node = ['--cri-socket', self.socket, '--log-file', f'{self.directory}/log']
        self.top = agent.read_cgroup_tree(LIVE.sysfs).top
        self.victims, self.others = [], []
        self.runtime = FakeRuntime(self, ListPodSandbox=lambda request: list_pods(
            *(pod.sandbox for pod in self.victims + self.others)), ListContainers=lambda request: list_containers(
                *(pod.container for pod in self.victims + self.others)))

    def make_pod(self, program='', name=None, uid=None):
        """Its process has a network of its own with eth0, 4 MB of memory, and then rests, after it has run a program
        of shell."""
        uid = uid or str(uuid.uuid4())
        pod, app = sandbox(os.urandom(32).hex(), uid=uid), container(os.urandom(32).hex(), '')
        app.pod_sandbox_id, pod.metadata.name = pod.id, name or f'pod-{len(self.victims + self.others)}'
        path = f'kubepods/pod{uid}'
        for id in pod.id, app.id:
            make_groups(self, f'{path}/{id}')
        process = self.spawn(['unshare', '--net', 'sh', '-ec', f"{join_groups(f'{path}/{app.id}')} "
                              'ip link add eth0 type veth peer name eth1; '
                              f'x=$(head -c 4000000 /dev/zero | tr "\\0" x); {program}\n echo; read line; exit'],
                             stdin=subprocess.PIPE)
        self.assertEqual('\n', process.stdout.readline(), process.poll() and process.stderr.read())
        wait_for('rest', lambda: ') S ' in read_text(f'/proc/{process.pid}/stat'))
        return TenantPod(pod, app, f'{path}/{app.id}', process)

    def make_victims(self, count=2):
        self.victims += [self.make_pod(name=f'victim-{number}') for number in range(count)]

    def look(self):
        """A snapshot that an agent in this process takes, which knows nothing yet."""
        state, options = agent.State(10), agent.parse_options(['--cri-socket', self.socket], {})
        self.addCleanup(lambda: agent.forget_runtime(state.runtime))
        metrics, _ = agent.collect_snapshot(LIVE, options, state, agent.AgentStats())
        self.check_victims(metrics)
        return metrics

    def start_agent(self, *arguments, **settings):
        """A process that delivers to a relay, and sees the victims, while nobody attacks."""
        self.relay = FakeRelay(self)
        self.agent = self.start('--relay-address', self.relay.address, '--main-loop-duration', str(self.SECONDS),
                                *arguments, **settings)
        victims = {victim.container.id for victim in self.victims}
        while True:
            self.last, = self.relay.next_arrived(1)
            if self.last.agent_metrics.sequence > 1 and victims <= containers_by_id(self.last).keys():
                break
        self.calm = self.last.agent_metrics
        return self.last

    def watch(self, cycles=2):
        """So many snapshots that are begun from now on, and the last of them. Whatever happens: none is missing, no
        tick was lost, the memory is as before, and the victims have the kernel's numbers."""
        since = time.time_ns()
        while cycles:
            before, (self.last,) = self.last.agent_metrics, self.relay.next_arrived(1)
            told = self.last.agent_metrics
            self.assertEqual((before.sequence + 1, self.calm.skipped_ticks_total),
                             (told.sequence, told.skipped_ticks_total))
            self.assertLess(told.resident_bytes - self.calm.resident_bytes, GROWTH_BYTES)
            self.check_victims(self.last)
            cycles -= told.timestamp_ns > since
        return self.last

    def check_victims(self, metrics):
        containers, pods = containers_by_id(metrics), {pod.id: pod for pod in metrics.pod_metrics}
        for victim in self.victims:
            found, pod, group = containers[victim.container.id], pods[victim.sandbox.id], read_cgroup(victim.group)
            numbers = set_cgroup_fields(found)
            self.assertEqual(
                (victim.sandbox.metadata.uid, victim.group, 'cgroup', 'CONTAINER_RUNNING', group.usage_ns, False,
                 ['eth0', 'eth1']),
                (pod.uid, found.cgroup.path, found.stats_source, found.state, numbers.usage_ns, pod.host_network,
                 sorted(interface.name for interface in pod.network_interfaces)))
            # What the kernel counts by CPU moves a little.
            self.assertAlmostEqual(group.memory_bytes, numbers.memory_bytes, delta=1 << 20)
            self.assertGreater(numbers.memory_bytes, 4_000_000)

    def end_agent(self):
        """It ends as it should, and what it has to say is no bug."""
        self.agent.terminate()
        ended = self.agent.result()
        self.assertEqual((0, False), (ended.code, 'Traceback' in ended.err), ended.err)
        return ended

    def links(self, count, kind=None):
        """The command of a shell that makes so many interfaces, of the cheapest kind that there is."""
        kind = kind or next(kind for kind in ('dummy', 'ifb', 'bridge') if not subprocess.run(
            ['unshare', '--net', 'ip', 'link', 'add', 'x0', 'type', kind], stderr=subprocess.DEVNULL).returncode)
        path = f'{self.directory}/{count}-{kind}'
        write_tree('/', {path: ''.join(f'link add x{number} type {kind}\n' for number in range(count))})
        return f'ip -batch {path}'

    def shown(self, metrics, pod):
        return next(message for message in metrics.pod_metrics if message.id == pod.sandbox.id)


class TenantGroupsTest(TenantCase):
    def given_group(self):
        """As a session of a user has it."""
        path = f'user.slice/user-{NOBODY}.slice/kubensage-{uuid.uuid4()}'
        make_groups(self, path, NOBODY)
        return f'{self.top}/{path}'

    def test_groups_one_in_the_other_are_not_walked(self):
        """1,500 of them, in a group that is given to a user; the agent looks for a container that is new."""
        given = self.given_group()
        with as_nobody():
            make_deep(given)
        self.make_victims()
        self.start_agent()
        self.victims.append(self.make_pod())
        self.watch()
        self.end_agent()
        run = self.start('--once', '--output=json').result()
        self.assertEqual((0, 3), (run.code, len(json.loads(run.out)['pod_metrics'])), run.err)

    def test_groups_one_in_the_other_below_a_containers_own_are_not_walked(self):
        """Root of a container whose cgroups are writable owns what is below its own."""
        self.make_victims()
        self.others.append(self.make_pod())
        make_deep(f'{self.top}/{self.others[0].group}')
        found = containers_by_id(self.look())[self.others[0].container.id]
        self.assertEqual(self.others[0].group, found.cgroup.path)

    def test_groups_beside_each_other_cost_nothing(self):
        """5,000 of them take 150 ms a walk, and an id that is new each time, and has no group, makes the agent
        walk each time."""
        given = self.given_group()
        with as_nobody():
            for number in range(5000):
                os.mkdir(f'{given}/{number}')
        self.make_victims()
        self.look()
        began = time.process_time()
        for _ in range(5):
            self.look()
        self.assertLess((time.process_time() - began) / 5, 0.1)

    def test_a_walk_is_bounded(self):
        """Of whoever may make groups where they are looked for."""
        state, roots = agent.NodeState(1), self.tree(group_v1('kubelet.service'))
        self.patch(MAX_GROUPS=100)
        for number in range(300):
            os.makedirs(f'{roots.sysfs}/fs/cgroup/memory/a.slice/{number}.slice/kubelet.service')
        with mock.patch.object(agent.os, 'scandir', wraps=os.scandir) as scanned:
            agent.collect_services(wire.NodeMetrics(), state, agent.Cycle(roots, 5, {}))
        self.assertLess(scanned.call_count, 102)
        self.assertEqual(['kubelet.service'], [*state.services])

    def test_a_group_with_the_id_of_anothers_container_is_not_taken(self):
        """It is empty, and would show no CPU and no memory. One is in a group given to a user, one below the
        attacker's own container, where root has made it; the others, at places that only root has, are no pod's."""
        self.make_victims(3)
        self.others.append(self.make_pod())
        given = self.given_group()
        for number, victim in enumerate(self.victims):
            uid, id = victim.sandbox.metadata.uid, victim.container.id
            with as_nobody():
                os.makedirs(f'{given}/{number}/{id}')
                os.makedirs(f'{given}/kubepods/pod{uid}/{id}')
            for name in id, f'cri-containerd-{id}.scope', f'kubepods/pod{uid}/{id}', f'zz/pod{uid}/{id}':
                os.makedirs(f'{self.top}/{self.others[0].group}/{name}')
            attackers = self.others[0].sandbox.metadata.uid
            for path in f'machine.slice/{id}', f'kubepods/pod{attackers}/{id}', f'zz-{id}/{id}':
                make_groups(self, path)
        self.look()

    def test_of_two_groups_with_one_id_below_the_pods_own_it_is_that_of_its_process(self):
        """The runtime knows the process."""
        self.make_victims(1)
        victim, = self.victims
        for other in 'besteffort', 'zz':
            make_groups(self, f'kubepods/{other}/pod{victim.sandbox.metadata.uid}/{victim.container.id}')
        self.runtime.answers['ContainerStatus'] = lambda request: cri.ContainerStatusResponse(
            status=dict(state=cri.CONTAINER_RUNNING), info={'info': json.dumps({'pid': victim.process.pid})})
        self.look()

    def test_an_empty_group_called_container_hides_nothing(self):
        """In one's own, whose numbers count all that is below."""
        self.make_victims(1)
        os.mkdir(f'{self.top}/{self.victims[0].group}/container')
        self.look()

    def test_units_that_others_have_forged_are_not_shown(self):
        """A group given to a user below system.slice; below a user's; below a container's own."""
        genuine, delegated = f'kubensage-{uuid.uuid4()}.slice', f'system.slice/kubensage-{uuid.uuid4()}.slice'
        make_groups(self, f'{genuine}/kubelet.service')
        make_groups(self, delegated, NOBODY)
        given = self.given_group()
        with as_nobody():
            for directory in f'{self.top}/{delegated}', given:
                os.makedirs(f'{directory}/runtime.slice/kubelet.service')
                os.makedirs(f'{directory}/containerd.service')
        self.others.append(self.make_pod())
        for name in 'system.slice/kubelet.service', 'docker.service':
            os.makedirs(f'{self.top}/{self.others[0].group}/{name}')
        marks = genuine, delegated, os.path.basename(given), self.others[0].container.id
        self.assertEqual([f'{genuine}/kubelet.service'], [
            service.cgroup.path for service in self.look().node_metrics.services
            if any(mark in service.cgroup.path for mark in marks)])


class TenantNetworkTest(TenantCase):
    def test_thousands_of_interfaces_in_a_pod_are_33_rows(self):
        """It has made 8,000, and eight scrapers ask all the time."""
        self.make_victims()
        attacker = self.make_pod(self.links(8000))
        port = free_port()
        self.start_agent('--listen', f'127.0.0.1:{port}')
        length = self.scrape(port)
        self.others.append(attacker)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            scrapers = [pool.submit(self.scrape, port, 10) for _ in range(8)]
            metrics = self.watch()
            longest = max(scraper.result() for scraper in scrapers)
        pod = self.shown(metrics, attacker)
        self.assertEqual((agent.MAX_ROWS + 1, agent.OTHERS),
                         (len(pod.network_interfaces), pod.network_interfaces[-1].name))
        self.assertGreater(pod.left_out['interfaces'], 500)
        self.assertLess(longest - length, 100_000)

    def scrape(self, port, times=1):
        """The length of the longest answer."""
        lengths = []
        for _ in range(times):
            with contextlib.closing(http.client.HTTPConnection('127.0.0.1', port, PATIENCE_SECONDS)) as connection:
                connection.request('GET', '/metrics')
                answer = connection.getresponse()
                lengths.append(len(answer.read()))
                self.assertEqual(200, answer.status)
        return max(lengths)

    def test_names_of_interfaces_that_change_all_the_time_leave_nothing_behind(self):
        """Hundreds of new names in each cycle."""
        self.make_victims()
        attacker = self.make_pod()
        self.start_agent()
        self.others.append(attacker)
        change = ('n=0; while :; do n=$((n + 1)); echo link add r$n type veth peer name s$n; '
                  '[ $n -lt 100 ] || echo link del r$((n - 99)); done')
        changing = self.spawn(['nsenter', f'--net=/proc/{attacker.process.pid}/ns/net', 'sh', '-c',
                               f'({change}) | ip -force -batch -'], stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, start_new_session=True)
        try:
            names = set()
            for _ in range(3):
                pod = self.shown(self.watch(1), attacker)
                self.assertLessEqual(len(pod.network_interfaces), agent.MAX_ROWS + 1)
                names.update(interface.name for interface in pod.network_interfaces)
            self.assertGreater(len(names), 2 * agent.MAX_ROWS)
        finally:
            os.killpg(changing.pid, signal.SIGKILL)

    def test_a_network_that_ends_delays_no_snapshot_hides_no_address_and_not_the_end(self):
        """Each bridge takes the kernel some 15 ms, in which it holds a lock that many questions take; `ip` asks
        one of them."""
        doomed = self.spawn(['unshare', '--net', 'sh', '-ec', f'{self.links(240, "bridge")}; echo; read line'],
                            stdin=subprocess.PIPE)
        doomed.stdout.readline()
        self.make_victims(1)
        addresses = self.addresses(self.start_agent())
        doomed.end()
        # It begins when the kernel's thread for it has its turn, and takes some 3.6 s.
        wait_for('the lock', self.is_locked)
        began = time.monotonic()
        metrics = self.watch(1)
        # An interval, and what one may wait.
        self.assertLess(time.monotonic() - began, self.SECONDS + 1)
        self.assertEqual(addresses, self.addresses(metrics))
        self.assertIn('lo', addresses[1])
        self.end_agent()
        self.assertLess(time.monotonic() - began, 4)

    def is_locked(self):
        asking = subprocess.Popen(['ip', 'link', 'show', 'lo'], stdout=subprocess.DEVNULL)
        self.addCleanup(asking.wait)
        with contextlib.suppress(subprocess.TimeoutExpired):
            asking.wait(0.2)
        return asking.returncode is None

    def addresses(self, metrics):
        return metrics.node_metrics.primary_ipv4.value, {
            interface.name: sorted(interface.addrs) for interface in metrics.node_metrics.network_interfaces}


class TenantListenTest(TenantCase):
    def test_headers_without_an_end_take_no_memory(self):
        """6 MB on each of 40 connections, held open as long as they are let."""
        self.make_victims()
        address = '127.0.0.1', free_port()
        self.start_agent('--listen', '{}:{}'.format(*address))
        data = b'GET /metrics HTTP/1.1\r\n' + b''.join(b'A: %s\r\n' % (b'x' * 65000) for _ in range(95))

        def flood():
            """The beginning of the answer; where the server has not read all, it may be lost."""
            with socket.create_connection(address, PATIENCE_SECONDS) as connection:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(data)
                with contextlib.suppress(ConnectionError):
                    return connection.recv(12)
            return b''

        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            floods = [pool.submit(flood) for _ in range(40)]
            self.watch()
            self.assertLessEqual({flood.result() for flood in floods}, {b'', b'HTTP/1.0 431'})

    def test_a_port_that_is_taken_costs_no_snapshot_and_is_had_as_soon_as_it_is_free(self):
        """By another user of the node, while the agent starts."""
        self.make_victims(1)
        with as_nobody():
            taken = socket.create_server(('127.0.0.1', 0))
        address = taken.getsockname()
        with contextlib.closing(taken):
            self.start_agent('--listen', '{}:{}'.format(*address))

        def is_served():
            with contextlib.suppress(ConnectionError), socket.create_connection(address) as connection:
                connection.sendall(b'GET /metrics HTTP/1.0\r\n\r\n')
                return connection.recv(12) == b'HTTP/1.0 200'

        wait_for('the port', is_served)
        self.watch(1)
        self.assertRegex(self.end_agent().err, rf'WARNING [^\n]*127.0.0.1:{address[1]}[^\n]*Address already in use')


class TenantRequestsTest(Case):
    serve, publish, connect = HttpTest.serve, HttpTest.publish, HttpTest.connect

    def send(self, data):
        """All that is answered to these bytes; the rest of what is too much may not be read."""
        connection, said = self.connect(), []
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        with contextlib.suppress(ConnectionError):
            said += iter(lambda: connection.recv(1 << 16), b'')
        return b''.join(said)

    def test_a_head_of_8_kib_is_taken_and_a_longer_one_is_not(self):
        self.serve(sample(1))
        for length, status in (agent.MAX_REQUEST_BYTES, b'200'), (agent.MAX_REQUEST_BYTES + 1, b'431'):
            for begin in b'GET /healthz?', b'GET /healthz HTTP/1.1\r\nA: ':
                end = b' HTTP/1.1\r\n\r\n' if b'HTTP' not in begin else b'\r\n\r\n'
                with self.subTest(length=length, begin=begin):
                    answer = self.send(begin + b'x' * (length - len(begin) - len(end)) + end)
                    self.assertEqual(status, answer[9:12])

    def test_a_request_that_comes_byte_by_byte_has_one_deadline(self):
        """In 33 of them, which is more than may be open, nobody is kept out."""
        self.serve(sample(1), timeout=1)
        connections, began = [self.connect() for _ in range(33)], time.monotonic()
        ended = False
        while not ended and time.monotonic() - began < PATIENCE_SECONDS:
            for connection in connections:
                with contextlib.suppress(ConnectionError):
                    connection.sendall(b'G')
            ended = all(select.select([connection], [], [], 0)[0] for connection in connections)
            # The pace of the attack.
            time.sleep(0.1)
        self.assertTrue(ended and time.monotonic() - began < 5, time.monotonic() - began)
        self.assertIn(b' 200 ', self.send(b'GET /healthz HTTP/1.0\r\n\r\n'))

    def test_odd_requests_get_one_answer_or_none_and_do_no_harm(self):
        """Nor does any of it get into the log as it is."""
        log, told = logging.getLogger('kubensage-agent'), io.StringIO()
        for add, remove, what in ((log.addHandler, log.removeHandler, logging.StreamHandler(told)),
                                  (log.addFilter, log.removeFilter, agent.LogBudget())):
            add(what)
            self.addCleanup(remove, what)
        self.addCleanup(log.setLevel, log.level)
        log.setLevel(logging.DEBUG)
        self.serve(sample(1), timeout=1)
        get = b'GET /healthz HTTP/1.1\r\nHost: x\r\n'
        for data, statuses in (
                # Pipelined.
                (get + b'\r\n' + get + b'\r\n', ['200']),
                (get + b'Connection: keep-alive\r\n\r\n' + b'GET / HTTP/1.1\r\n\r\n', ['200']),
                # A body that never comes.
                (get + b'Content-Length: 999999999\r\n\r\nx', ['200']),
                (get + b'Transfer-Encoding: chunked\r\n\r\nffffffff\r\n', ['200']),
                (get + b'Expect: 100-continue\r\n\r\n', ['200']),
                (get + b'Upgrade: h2c\r\nConnection: Upgrade\r\n\r\n', ['200']),
                (get + b' folded: x\r\n: nameless\r\nno colon\r\n\r\n', ['200']),
                (b'get /healthz HTTP/1.1\r\n\r\n', ['501']), (b'G\0ET / HTTP/1.1\r\n\r\n', ['501']),
                (b'\x1b[2J\x1b]0;x\x07 / HTTP/1.1\r\n\r\n', ['501']), (b'__init__ / HTTP/1.1\r\n\r\n', ['501']),
                (b'GET /\x1b[31m%0a%00\xe2\x80\xae HTTP/1.1\r\n\r\n', ['404']), (b'GET /healthz\r\n\r\n', []),
                (b'GET /healthz HTTP/9.9\r\n\r\n', []), (b'GET /healthz HTTP/x\r\n\r\n', []),
                (b'GET /healthz HTTP/1.1 x\r\n\r\n', []), (b'\r\n\r\n', []),
                (b'\0' * 8000 + b'\r\n\r\n', []),
                (b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n', []),
                (b'GET / HTTP/1.1\r\n' + b'A:b\r\n' * 300 + b'\r\n', ['431']),
                # The begin of TLS, which has no end of a line.
                (b'\x16\x03\x01\x02\0\x01\0\x01\xfc\x03\x03' + b'x' * 500, [])):
            with self.subTest(data[:60]):
                answer = self.send(data)
                self.assertEqual(statuses, re.findall(r'^HTTP/\d\.\d (\d+)', answer.decode(errors='replace'), re.M))
                self.assertNotIn(b'\x1b', answer)
        self.assertIn(b' 200 ', self.send(b'GET /healthz HTTP/1.0\r\n\r\n'))
        self.assertIsNone(NOT_PRINTABLE.search(told.getvalue()), told.getvalue())
        self.assertGreater(told.getvalue().count('\n'), 10)



class TenantPodsTest(KernelCase):
    """What the runtime says of a tenant's pods. The victim is the pod of the case, with APP and SIDE."""

    def start(self, sandboxes=(), containers=(), **answers):
        """Beside the victim's, the attacker's."""
        self.sandboxes, self.containers = list(sandboxes), list(containers)
        self.victim = sandbox(POD, uid=UID)
        self.victim.labels['app'] = 'victim'
        self.listed = [container(APP, POD), container(SIDE, POD)]
        return super().start(**{
            'ListPodSandbox': lambda request: list_pods(self.victim, *self.sandboxes),
            'ListContainers': lambda request: list_containers(*self.listed, *self.containers),
            'ContainerStatus': self.status, **answers})

    def status(self, request):
        """Of what runs, when it was started; of what has ended, why."""
        id = cri.ContainerStatusRequest.FromString(request).container_id
        state = next(item.state for item in self.listed + self.containers if item.id == id)
        ended = dict(finished_at=2, exit_code=137, reason='OOMKilled') if state == cri.CONTAINER_EXITED else {}
        return status_of(state=state, started_at=1, **ended)

    def victim_of(self, part):
        """It is there with its numbers, and nothing is cut."""
        pod = next(pod for pod in part.pods if pod.id == POD)
        self.assertEqual(({APP: ('cgroup', 1000), SIDE: ('cgroup', 1000)}, {'app': 'victim'}, {}), (
            {id: numbers for id, numbers in self.sources(part).items() if id in (APP, SIDE)}, dict(pod.labels),
            dict(pod.left_out)))
        return pod

    def test_labels_have_a_budget_of_8_kb_a_pod_and_the_kubelets_come_first(self):
        """Five pods with 2,800 labels of the largest size that the API lets through, and as many on a container:
        10 MB."""
        kubelets = {f'io.kubernetes.pod.{name}': name for name in ('name', 'namespace', 'uid')}
        many = {f'{"d" * 249}.{number:03}/{"n" * 63}': 'v' * 63 for number in range(2800)}
        pods = [sandbox(f'{number:064x}') for number in range(5)]
        apps = [container(f'{1 << 200 | number:064x}', pod.id) for number, pod in enumerate(pods)]
        for item in pods + apps:
            item.labels.update({'a': 'b', **many, **kubelets})
        self.start(pods, apps)
        for _ in range(2):
            part = self.cycle()
            self.assertEqual({}, part.failures)
            self.victim_of(part)
            self.assertLess(sum(pod.ByteSize() for pod in part.pods), 6 * 10_000)
            for pod in part.pods:
                if pod.id != POD:
                    labels = [*pod.labels.items(), *pod.container_metrics[0].labels.items()]
                    self.assertTrue(6000 < sum(len(key) + len(value) for key, value in labels)
                                    <= agent.LABEL_BYTES)
                    self.assertEqual((kubelets, 2 * 2804 - len(labels)), (
                        {key: value for key, value in pod.labels.items() if key in kubelets}, pod.left_out['labels']))

    def test_labels_that_fit_are_all_there(self):
        labels = {f'{number:03}{"k" * 60}': 'v' * 37 for number in range(agent.LABEL_BYTES // 100)}
        pod = sandbox('f' * 64)
        pod.labels.update(labels)
        self.start([pod])
        shown = next(pod for pod in self.cycle().pods if pod.id != POD)
        self.assertEqual((labels, {}), (dict(shown.labels), dict(shown.left_out)))

    def test_exits_of_a_crash_loop_keep_nobody_waiting(self):
        """In each cycle four pods list 500 containers that have exited, all of them new. When the victim's exits,
        the reason is there with it, or in the next cycle; no status of another state ever is."""
        pods, numbers = [sandbox(f'{number:064x}') for number in range(4)], itertools.count(1 << 200)
        runtime = self.start(pods)
        victims = [container(f'{1 << 220 | number:064x}', POD) for number in range(3)]
        self.listed += victims
        for cycle in range(8):
            self.containers = [container(f'{next(numbers):064x}', pod.id, cri.CONTAINER_EXITED, created_at=number)
                               for pod in pods for number in range(500)]
            if 3 <= cycle < 6:
                victims[cycle - 3].state = cri.CONTAINER_EXITED
            runtime.asked.clear()
            part = self.cycle(later=5)
            self.assertLessEqual(runtime.asked.count('ContainerStatus'), agent.STATUSES_PER_CYCLE)
            for pod in part.pods:
                if pod.id == POD:
                    self.assertEqual([], [found.id for found in pod.container_metrics if not found.HasField('status')])
                else:
                    self.assertEqual((agent.MAX_EXITED, 500 - agent.MAX_EXITED, set(range(484, 500))), (
                        len(pod.container_metrics), pod.left_out['exited containers'],
                        {found.created_at for found in pod.container_metrics}))
                for found in pod.container_metrics:
                    if found.HasField('status'):
                        self.assertEqual(found.state == 'CONTAINER_EXITED', found.status.reason == 'OOMKilled')
        self.assertEqual({}, part.failures)

    def test_the_pod_that_was_served_longest_ago_is_served_first(self):
        """Of 100 pods with a new exit in each cycle each gets its turn."""
        pods, numbers, told = [sandbox(f'{number:064x}') for number in range(100)], itertools.count(1 << 200), set()
        self.start(pods)
        for _ in range(5):
            self.containers = [container(f'{next(numbers):064x}', pod.id, cri.CONTAINER_EXITED) for pod in pods]
            told |= {pod.id for pod in self.cycle(later=5).pods for found in pod.container_metrics
                     if found.HasField('status')}
        self.assertEqual({POD, *(pod.id for pod in pods)}, told)

    def test_a_status_goes_with_the_state_that_it_is_of(self):
        """Also while the runtime does not say more."""
        runtime = self.start()
        self.cycle()
        runtime.answers['ContainerStatus'] = grpc.StatusCode.INTERNAL
        self.listed[0].state = cri.CONTAINER_EXITED
        app, side = self.cycle(later=5).containers
        self.assertEqual(('CONTAINER_EXITED', False, True),
                         (app.state, app.HasField('status'), side.HasField('status')))

    def test_thousands_of_exits_in_one_pod_take_no_time(self):
        """As many as come between two rounds of the kubelet's collection of garbage, a minute, and some."""
        pod = sandbox('f' * 64)
        self.start([pod], [container(f'{1 << 200 | number:064x}', pod.id, cri.CONTAINER_EXITED, created_at=number)
                           for number in range(5000)])
        self.cycle()
        began = time.process_time()
        self.victim_of(self.cycle(seconds=PATIENCE_SECONDS))
        # The runtime that makes the list is in this process as well.
        self.assertLess(time.process_time() - began, 0.7)

    def test_io_of_many_devices_is_read_to_its_end_and_33_rows(self):
        """3,000 devices are 300 kB on v2; a malformed line costs itself."""
        lines = [f'7:{number} rbytes={number} wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n' for number in range(3000)]
        lines[2000] = '7:2000 rbytes=x\n'
        for version in 2, 1:
            with self.subTest(version=version):
                self.setUp()
                if version == 2:
                    self.groups[SIDE]['io.stat'] = ''.join(lines)
                    self.start()
                else:
                    FakeRuntime(self, ListPodSandbox=list_pods(sandbox(POD, uid=UID)), ListContainers=list_containers(
                        container(APP, POD), container(SIDE, POD)))
                    for path in '', APP, SIDE:
                        self.write(group_v1(f'kubepods/pod{UID}/{path}'))
                    name = 'blkio.throttle.io_service_bytes'
                    self.write({f'sys/fs/cgroup/blkio/kubepods/pod{UID}/{SIDE}/{name}': ''.join(
                        f'7:{number} Read {number}\n7:{number} Write {2 if number != 2000 else "x"}\n'
                        for number in range(3000))})
                for _ in range(2):
                    part = self.cycle()
                    app, side = sorted(part.containers, key=lambda found: found.id)
                    rows = side.cgroup.io.stat
                    self.assertEqual((agent.MAX_ROWS + 1, agent.OTHERS), (len(rows), rows[-1].device))
                    total = sum(range(3000)) - (2000 if version == 2 else 0)
                    self.assertEqual((total, 2 * 2999),
                                     (sum(row.rbytes for row in rows), sum(row.wbytes for row in rows)))
                    self.assertEqual({'cgroup'}, {app.stats_source, side.stats_source})
                    self.assertLess(len(app.cgroup.io.stat), 4)
                    missing = 3000 - (version == 2) - agent.MAX_ROWS
                    self.assertEqual({'devices': missing}, dict(part.pods[0].left_out))
                    self.assertEqual(1, len(part.failures), part.failures)

    def test_texts_are_cut(self):
        """All that the runtime passes on of what a tenant has chosen."""
        long, pod = 'x' * 5000, sandbox('f' * 64)
        pod.metadata.name = pod.metadata.namespace = pod.runtime_handler = long
        app = container('e' * 64, pod.id, image=long, user_specified_image=long + 'y')
        app.metadata.name = app.image_ref = long
        self.start([pod], [app], ContainerStatus=status_of(state=cri.CONTAINER_RUNNING, reason=long), Status=(
            cri.StatusResponse(status=dict(conditions=[dict(type=long)]))))
        part = self.cycle()
        shown = next(pod for pod in part.pods if pod.id != POD)
        longest = max(len(text) for message in (shown, shown.container_metrics[0], shown.container_metrics[0].status)
                      for _, text in message.ListFields() if isinstance(text, str))
        self.assertEqual(agent.MAX_TEXT, longest)
        self.assertLess(shown.ByteSize(), 9 * agent.MAX_TEXT)
        self.victim_of(part)


class TenantAnnotationsTest(TenantCase):
    """The API lets 256 kB through on each pod."""

    def setUp(self):
        super().setUp()
        self.annotated = 0
        annotations, restarts = annotation('a', 'x' * 256_000), annotation('io.kubernetes.container.restartCount', '7')
        pods, containers = (self.runtime.answers[method] for method in ('ListPodSandbox', 'ListContainers'))
        self.runtime.answers.update(
            ListPodSandbox=lambda request: pods(request).SerializeToString() + b''.join(
                member(1, sandbox(f'{number:064x}').SerializeToString() + member(6, annotations))
                for number in range(self.annotated)),
            ListContainers=lambda request: containers(request).SerializeToString() + b''.join(
                member(1, container(f'{1 << 200 | number:064x}', f'{number:064x}').SerializeToString()
                       + member(9, restarts)) for number in range(self.annotated)))

    def test_annotations_are_not_kept_but_for_the_count_of_restarts(self):
        """Of 110 pods they are 28 MB in each list."""
        self.make_victims()
        self.start_agent()
        self.annotated = 110
        restarts = [pod.container_metrics[0].restart_count for pod in self.watch().pod_metrics]
        self.assertEqual({0: len(self.victims), 7: 110}, collections.Counter(restarts))

    def test_what_a_list_takes_for_a_moment_fits_into_the_limit_of_the_daemonset(self):
        """Of 120 pods they are 31 MB, which are taken, of 250 they are 64. The limit is 256 MiB, with the helper."""
        self.make_victims()
        self.start_agent()
        for self.annotated in 250, 120:
            self.watch()
        peak, = re.findall(r'VmHWM:\s+(\d+) kB', read_text(f'/proc/{self.agent.pid}/status'))
        self.assertLess(int(peak) * 1024, 200 << 20)

    def test_a_list_that_is_too_large_leaves_the_last_one(self):
        """Of 300 pods it is larger than any message may be."""
        self.make_victims()
        self.start_agent()
        self.annotated = 300
        metrics = self.watch()
        self.assertEqual(len(self.victims), len(metrics.pod_metrics))
        self.assertGreater(metrics.agent_metrics.failures_total['container runtime'], 0)


def member(number, data):
    """A field of this number that has a length."""
    return varint(number << 3 | 2) + varint(len(data)) + data


def annotation(key, value):
    """An entry of a map of texts."""
    return member(1, key.encode()) + member(2, value.encode())


class FateTest(KernelCase):
    """C. What fails costs what it is about."""

    def snapshot(self):
        options = agent.parse_options(['--cri-socket', self.socket], {})
        roots = agent.Roots(f'{self.directory}/proc', f'{self.directory}/sys', self.directory)
        metrics, failures = agent.collect_snapshot(roots, options, self.whole, self.stats)
        return metrics, failures

    def setUp(self):
        super().setUp()
        self.write(NODE)
        self.start(ListPodSandbox=list_pods(sandbox(POD, uid=UID), sandbox('f' * 64)))
        self.whole, self.stats = agent.State(10), agent.AgentStats()
        self.addCleanup(lambda: agent.forget_runtime(self.whole.runtime))
        self.snapshot()

    def test_a_bug_in_a_subject_of_the_node_costs_that_subject(self):
        for error in RecursionError, MemoryError, KeyError, AssertionError:
            with self.subTest(error.__name__), mock.patch.dict(
                    agent.NODE_SUBJECTS, memory=mock.Mock(side_effect=error)):
                before = self.stats.failures['memory']
                metrics, failures = self.snapshot()
                self.assertFalse(metrics.node_metrics.meminfo)
                self.assertEqual((2, 'node-d13'), (len(metrics.pod_metrics), metrics.node_metrics.hostname))
                self.assertTrue(metrics.node_metrics.HasField('load_average') and metrics.node_metrics.vmstat == {})
                self.assertEqual(before + 1, self.stats.failures['memory'])
                self.assertIn('memory', failures)
        self.assertNotIn('memory', self.snapshot()[1])

    def test_a_bug_in_one_pod_costs_that_pod(self):
        usual = agent.collect_pod_network

        def collect_pod_network(pod, *arguments):
            if pod.message.id == POD:
                raise RecursionError('deep')
            return usual(pod, *arguments)

        with mock.patch.object(agent, 'collect_pod_network', collect_pod_network):
            for _ in range(3):
                metrics, failures = self.snapshot()
                self.assertEqual(['f' * 64], [pod.id for pod in metrics.pod_metrics])
                self.assertEqual('node-d13', metrics.node_metrics.hostname)
                self.assertIn('deep', ''.join(failures.values()))
        self.assertEqual({3}, {self.stats.failures[subject] for subject in failures})
        metrics, failures = self.snapshot()
        self.assertEqual((2, {}), (len(metrics.pod_metrics), failures))

    def test_a_bug_on_the_pods_side_costs_the_pods(self):
        with mock.patch.object(agent, 'find_cgroups', mock.Mock(side_effect=RecursionError('deep'))):
            self.whole.runtime.pods.clear()
            metrics, failures = self.snapshot()
        self.assertEqual(([], 'node-d13'), (list(metrics.pod_metrics), metrics.node_metrics.hostname))
        self.assertIn('deep', failures['container runtime'])
        self.assertEqual(1, self.stats.failures['container runtime'])
        metrics, failures = self.snapshot()
        self.assertEqual((2, {}), (len(metrics.pod_metrics), failures))


class TenantNamesTest(TenantCase):
    """Names that a tenant chooses, wherever they are shown."""

    def test_no_name_is_a_control_code_wherever_it_is_shown(self):
        """Of what the kernel lets through: an interface of a pod, a process, a mount point."""
        name = EVIL.replace('\r\n', '').replace('\u2028', '').replace('\x85', '')
        self.make_victims(1)
        attacker = self.make_pod('ip link add "$(printf "\\033[7m\\342\\200\\256")" type veth peer name "$(printf '
                                 '"\\001\\177")"')
        self.others.append(attacker)
        FuseServer(self, f'{self.directory}/{name}', errno.EIO)
        hog = f'{self.directory}/\x1b[2J\u202eh'
        shutil.copy(shutil.which('sleep'), hog)
        self.spawn([hog, '60'])
        metrics = self.look()
        pod = self.shown(metrics, attacker)
        self.assertIn('\x1b[7m\u202e', {interface.name for interface in pod.network_interfaces})
        self.assertIn(f'{self.directory}/{name}', {disk.mountpoint for disk in metrics.node_metrics.disk_usages})
        for text in renderings(metrics):
            self.assertIsNone(NOT_PRINTABLE.search(without_colors(text)), text)

    def test_names_that_look_alike_when_they_are_shown_are_not_one_series_twice(self):
        """A scraper refuses, or drops, what is there twice."""
        self.others.append(self.make_pod('for name in "\\001" "\\002" "\\003"; do '
                                         'ip link add "$(printf "x$name")" type ifb; done'))
        series = re.findall('^([^#].*) ', agent.render_prometheus(self.look()), re.M)
        self.assertEqual([], [name for name, count in collections.Counter(series).items() if count > 1])

    def test_what_the_runtime_passes_on_is_shown_in_no_other_way(self):
        """All texts of a pod are of this kind: the API would not let them through, a runtime might."""
        pod, app = sandbox('f' * 64), container('e' * 64, 'f' * 64, image=EVIL, user_specified_image=f'{EVIL}2')
        pod.metadata.name = pod.metadata.namespace = pod.metadata.uid = pod.runtime_handler = EVIL
        pod.labels[EVIL] = app.labels[EVIL] = app.metadata.name = app.image_ref = EVIL
        self.runtime.answers.update(
            ListPodSandbox=list_pods(pod), ListContainers=list_containers(app),
            Version=cri.VersionResponse(runtime_name=EVIL, runtime_version=EVIL),
            ContainerStatus=status_of(state=cri.CONTAINER_RUNNING, reason=EVIL), Status=cri.StatusResponse(
                status=dict(conditions=[dict(type=EVIL)])), ListContainerStats=grpc.StatusCode.INTERNAL)
        relay, notify = FakeRelay(self), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.addCleanup(notify.close)
        notify.bind(f'{self.directory}/notify')
        process = self.start('--relay-address', relay.address, '--main-loop-duration=0.2', '--log-level=debug',
                             environment={'NOTIFY_SOCKET': f'{self.directory}/notify'})
        while True:
            metrics, = relay.next_arrived(1)
            if metrics.pod_metrics and metrics.pod_metrics[0].container_metrics[0].HasField('status'):
                break
        self.assertEqual(EVIL, metrics.pod_metrics[0].name)
        process.terminate()
        log = process.result().err
        self.assertEqual(log, read_text(f'{self.directory}/log'))
        notify.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                status = notify.recv(4096).decode()
                status = status.replace('READY=1\nWATCHDOG=1\nSTATUS=', '').replace('STOPPING=1', '')
                self.assertNotIn('\n', status)
                self.assertIsNone(NOT_PRINTABLE.search(status), status)
        for text in (log, *renderings(metrics)):
            self.assertIsNone(NOT_PRINTABLE.search(without_colors(text)), text)
            self.assertNotIn('\nREADY=1', text)


@needs_root
class TenantMountsTest(Case):
    """File servers of users: any user can mount FUSE, with the name of any device as the source."""

    def mount(self, name, source, fstype='fuse', answer=FUSE_SPACE):
        """What mountinfo says of a mount of this source, whatever the kernel says of it."""
        server = FuseServer(self, f'{self.directory}/{name}', answer)
        device = os.stat(server.path).st_dev if answer == FUSE_SPACE else 0
        return f'1 0 {os.major(device)}:{os.minor(device)} / /{name} rw - {fstype} {source} rw\n'

    def test_a_source_that_is_forged_takes_nothing_from_the_device(self):
        """It is another row, with another mount point, and shows by its type what it is."""
        mountinfo = '1 0 8:1 / / rw - ext4 /dev/vda1 rw\n'
        self.write({'dev/mapper/x': ''})
        os.symlink('/root/secret', f'{self.directory}/link')
        for number, (source, fstype) in enumerate((
                ('/dev/vda1', 'fuse'), ('/dev/vda1', 'fuse.ext4'), ('/dev/vda1', 'fuse.btrfs'),
                ('/dev/root', 'fuse'), ('/dev/mapper/../../link', 'fuse.x'))):
            mountinfo += self.mount(f'{number}', source, fstype)
        node, failures = collected_node(self.write({'proc/1/mountinfo': mountinfo}))
        shown = {disk.mountpoint: (disk.device, disk.fstype) for disk in node.disk_usages}
        self.assertEqual((6, ('/dev/vda1', 'ext4'), []), (
            len(shown), shown['/'], [subject for subject in failures if subject.startswith('mount')]))
        self.assertNotIn('ext4', [fstype for mountpoint, (_, fstype) in shown.items() if mountpoint != '/'])
        # What a link of root's points to is none of a user's business.
        self.assertNotIn('secret', str(shown))

    def test_mount_points_that_look_alike_are_not_one_series_twice(self):
        """Two names that are no UTF-8, of which a user has as many as they like."""
        mountinfo = b''
        for number, name in enumerate((b'a\xff', b'a\xfe', b'a\x01', b'a\x02')):
            os.mkdir(os.fsencode(self.directory) + b'/' + name)
            mountinfo += b'1 0 0:%d / /%s rw - fuse x rw\n' % (1000 + number, name)
        node, _ = collected_node(self.write({'proc/1/mountinfo': mountinfo}))
        self.assertEqual(4, len(node.disk_usages))
        series = re.findall('^([^#].*) ', agent.render_prometheus(wire.Metrics(node_metrics=node)), re.M)
        self.assertEqual([], [name for name, count in collections.Counter(series).items() if count > 1])

    def test_mounts_that_come_and_go_under_new_names_leave_nothing_behind_and_do_not_fill_the_log(self):
        """A user who mounts and unmounts a file system that fails, hundreds of times a minute."""
        line, state, stats = self.mount('bad', 'x', answer=errno.EIO), agent.State(1), agent.AgentStats()
        options, troubles = agent.parse_options(['--cri-socket', self.socket], {}), {}
        log, told = logging.getLogger('kubensage-agent'), io.StringIO()
        for add, remove, what in ((log.addHandler, log.removeHandler, logging.StreamHandler(told)),
                                  (log.addFilter, log.removeFilter, agent.LogBudget())):
            add(what)
            self.addCleanup(remove, what)
        self.addCleanup(lambda: agent.forget_runtime(state.runtime))
        for number in range(100):
            os.symlink('bad', f'{self.directory}/bad{number}')
            roots = self.write({'proc/1/mountinfo': line.replace('/bad', f'/bad{number}')})
            metrics, failures = agent.collect_snapshot(roots, options, state, stats)
            agent.log_changes(troubles, failures)
            troubles = failures
        self.assertIn('mount /bad99', failures)
        self.assertLess(told.getvalue().count('\n'), 2 * agent.LOG_LINES_A_MINUTE + 5)
        self.assertLess(len(metrics.agent_metrics.failures_total), 50)
        self.assertLess(len(state.node.helper.waiting), 2)


class TenantLogTest(Case):
    def test_a_subject_has_its_lines_a_minute_and_the_last_says_so(self):
        """Whatever a tenant makes fail and recover in each cycle; others are heard all the while."""
        log, told = logging.Logger('flood'), io.StringIO()
        log.addHandler(logging.StreamHandler(told))
        log.addFilter(agent.LogBudget())
        with mock.patch.object(agent, 'log', log):
            for number in range(1000):
                agent.log_changes({'cgroups: io.stat': ''}, {f'mount /home/{number} /x': 'y', 'pods': f'{number}'})
                agent.log_changes({f'mount /home/{number} /x': 'y', 'pods': ''}, {})
            agent.log_changes({}, {'memory': 'heard'})
        lines = told.getvalue().splitlines()
        self.assertEqual('memory: heard', lines[-1])
        for subject in 'cgroups', 'mount', 'pods':
            of_subject = [line for line in lines if line.startswith(subject)]
            self.assertEqual(agent.LOG_LINES_A_MINUTE, len(of_subject))
            self.assertRegex(of_subject[-1], 'left out')
            self.assertNotRegex('\n'.join(of_subject[:-1]), 'left out')

    def test_a_line_has_an_end(self):
        log, told = logging.Logger('flood'), io.StringIO()
        log.addHandler(logging.StreamHandler(told))
        log.addFilter(agent.LogBudget())
        log.warning('%s: %s', 'x', 'y' * 100_000)
        self.assertLess(len(told.getvalue()), 5 * agent.MAX_TEXT)


@needs_root
class TenantPathsTest(Case):
    """Root runs the agent with a path in a directory where others were first."""

    def setUp(self):
        super().setUp()
        self.write(NODE)
        self.shared = f'{self.directory}/tmp'
        os.mkdir(self.shared)
        os.chmod(self.directory, 0o755)
        os.chmod(self.shared, 0o1777)
        self.secret = f'{self.directory}/secret'
        self.write({'secret': 'unchanged\n'})

    def plant(self, kind, name):
        """What user 65534 puts there first; a hard link where the kernel lets them (fs.protected_hardlinks)."""
        path = f'{self.shared}/{name}'
        if kind == 'hard link':
            os.link(self.secret, path)
            return path
        with as_nobody():
            if kind == 'fifo':
                os.mkfifo(path, 0o666)
            elif kind == 'link':
                os.symlink(self.secret, path)
            elif kind == 'dangling link':
                os.symlink(f'{self.directory}/new', path)
            elif kind == 'directory':
                os.mkdir(path, 0o777)
            elif kind == 'file':
                with open(path, 'w', encoding='utf-8'):
                    pass
            elif kind == 'socket':
                bound_socket(self, path)
        return path

    def check_untouched(self):
        self.assertEqual('unchanged\n', read_text(self.secret))
        self.assertFalse(os.path.exists(f'{self.directory}/new'))

    def test_a_log_file_that_others_have_made_is_not_written_and_not_waited_for(self):
        for kind in 'fifo', 'link', 'dangling link', 'hard link', 'directory', 'file', 'socket':
            with self.subTest(kind):
                path = self.plant(kind, f'log {kind}')
                # What may hang is a process.
                run = (self.start('--once', '--log-file', path).result() if kind == 'fifo' else
                       self.main(*self.node, '--once', '--log-file', path))
                self.assertEqual((0, False), (run.code, 'Traceback' in run.err), run.err)
                self.assertRegex(run.troubles[0], f'WARNING log file {path} cannot be written')
                self.check_untouched()

    def test_a_spool_that_others_have_made_is_not_used(self):
        relay = FakeRelay(self)
        for kind in 'fifo', 'link', 'dangling link', 'directory', 'file':
            with self.subTest(kind):
                path = self.plant(kind, f'spool {kind}')
                run = self.main(*self.node, '--once', '--relay-address', relay.address, '--spool-dir', path)
                self.assertEqual(0, run.code, run.err)
                self.assertRegex(run.err, f'WARNING spool: .*{path}.*keeping snapshots in memory')
                self.check_untouched()
        self.assertEqual([1] * 5, [metrics.agent_metrics.sequence for metrics in relay.next_arrived(5)])

    def test_a_token_or_a_certificate_that_is_a_fifo_is_not_waited_for_without_an_end(self):
        """As any user could make one, where the file of root's is not there yet."""
        make_certificate(self.directory, 'ca')
        relay, ca = FakeRelay(self), f'{self.directory}/ca.pem'
        fifo = self.plant('fifo', 'token')
        for arguments in ('--relay-ca', ca, '--relay-token-file', fifo), ('--relay-ca', fifo):
            with self.subTest(arguments):
                process = self.start('--main-loop-duration=0.2', '--output=json', '--relay-tls', '--relay-address',
                                     relay.address, *arguments, change='agent.LAST_ATTEMPT_SECONDS = 0.2')
                for _ in range(3):
                    process.next_snapshot()
                process.terminate()
                run = process.result()
                self.assertEqual((0, False), (run.code, 'Traceback' in run.err), run.err)
                self.assertIn(f'{fifo}: is not a file', run.err)


@needs_root
class TenantEnvironmentTest(Case):
    """Root runs the agent by a sudo that keeps the environment of user 65534 (env_keep, -E)."""

    def setUp(self):
        super().setUp()
        self.write(NODE)
        os.chmod(self.directory, 0o755)
        FakeRuntime(self)
        self.home = f'{self.directory}/home'
        os.mkdir(self.home)
        os.chown(self.home, NOBODY, NOBODY)

    def test_nothing_is_written_to_a_home_of_another_user(self):
        run = self.start('--once', environment={
            'HOME': self.home, **{f'XDG_{name}_HOME': f'{self.home}/{name}' for name in (
                'CACHE', 'CONFIG', 'STATE', 'DATA')}, 'XDG_RUNTIME_DIR': f'{self.home}/run'}).result()
        self.assertEqual((0, [], []), (run.code, run.troubles, os.listdir(self.home)))

    def test_what_grpc_would_write_and_load_by_its_environment_is_not(self):
        """A trace of all that is sent, a key log, a configuration of the channel."""
        relay = FakeRelay(self)
        run = self.start('--once', '--relay-address', relay.address, environment={
            'GRPC_TRACE': 'all', 'GRPC_VERBOSITY': 'DEBUG', 'SSLKEYLOGFILE': f'{self.home}/keys',
            'GRPC_XDS_BOOTSTRAP': f'{self.home}/xds', 'GRPC_CONFIG_FILE': f'{self.home}/config',
            'GRPC_DEFAULT_SSL_ROOTS_FILE_PATH': f'{self.home}/ca.pem'}).result()
        self.assertEqual((0, []), (run.code, os.listdir(self.home)), run.err[-500:])
        self.assertLess(len(run.err), 10_000)

    def test_certificates_that_another_user_names_are_not_trusted(self):
        """SSL_CERT_FILE for OpenSSL, GRPC_DEFAULT_SSL_ROOTS_FILE_PATH for grpc."""
        make_certificate(self.home, 'ca')
        make_certificate(self.home, 'relay', 'ca', 'IP:127.0.0.1,DNS:localhost')
        ca = f'{self.home}/ca.pem'
        for name in os.listdir(self.home):
            os.chown(f'{self.home}/{name}', NOBODY, NOBODY)
        relay = FakeRelay(self, credentials=grpc.ssl_server_credentials(
            [(read_binary(f'{self.home}/relay.key'), read_binary(f'{self.home}/relay.pem'))]))
        for environment in {'SSL_CERT_FILE': ca}, {'GRPC_DEFAULT_SSL_ROOTS_FILE_PATH': ca, 'SSL_CERT_DIR': self.home}:
            with self.subTest(environment):
                run = self.start('--once', '--relay-tls', '--relay-address', relay.address,
                                 environment=environment).result()
                self.assertEqual((1, True), (run.code, relay.arrived.empty()), run.err)
        # Whoever is root may say so.
        run = self.main(*self.node, '--once', '--relay-tls', '--relay-address', relay.address, '--relay-ca', ca)
        self.assertEqual((0, False), (run.code, relay.arrived.empty()), run.err)

    def test_a_runtime_that_the_environment_names_is_none_of_the_users(self):
        with as_nobody():
            forged = FakeRuntime(self, f'{self.home}/s')
        self.node = [item for item in self.node if item not in ('--cri-socket', self.socket)]
        for name in 'CONTAINER_RUNTIME_ENDPOINT', 'KUBENSAGE_CRI_SOCKET':
            run = self.start('--once', '--output=json', environment={name: f'unix://{self.home}/s'}).result()
            self.assertEqual((0, []), (run.code, forged.asked), run.err)
            self.assertNotIn('pod_metrics', run.out.replace('"pod_metrics": []', ''))


if __name__ == '__main__':
    unittest.main()
