"""Free host memory: a container's limit counts, not what the machine has."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from offload_triforce.machine import memory as host_memory
from offload_triforce.machine.memory import free_on_host

GB = 10**9


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A system of files in which 90 GB are free."""
    monkeypatch.setattr(host_memory.psutil, "virtual_memory", lambda: SimpleNamespace(available=90 * GB))
    return tmp_path


def write(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(text))


def test_no_groups_at_all(root):
    assert free_on_host(root) == 90 * GB


def test_version_2_in_a_container(root):
    """Of 16 GB, 10 are used, 3 of them by files that can be dropped."""
    write(root, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": 16 * GB})
    stat = f"anon 5\ninactive_file {3 * GB}\nactive_file 7\n"
    write(root, {"sys/fs/cgroup/memory.current": 10 * GB, "sys/fs/cgroup/memory.stat": stat})
    assert free_on_host(root) == 9 * GB


def test_the_tightest_of_the_groups_above_counts(root):
    group = "sys/fs/cgroup/user.slice/a.scope"
    write(root, {"proc/self/cgroup": "0::/user.slice/a.scope\n", f"{group}/memory.max": "max\n"})
    write(root, {f"{group}/memory.current": 4 * GB, "sys/fs/cgroup/user.slice/memory.max": 8 * GB})
    assert free_on_host(root) == 90 * GB, "nobody says how much of it is used"
    write(root, {"sys/fs/cgroup/user.slice/memory.current": 5 * GB})
    assert free_on_host(root) == 3 * GB
    write(root, {"sys/fs/cgroup/user.slice/memory.current": 9 * GB})
    assert free_on_host(root) == 0


def test_version_1_whose_path_is_the_hosts(root):
    """As in a container of Docker's without a name space of groups."""
    mount = "sys/fs/cgroup/memory"
    write(root, {"proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/docker/abc\n0::/docker/abc\n"})
    write(root, {f"{mount}/memory.limit_in_bytes": 20 * GB, f"{mount}/memory.usage_in_bytes": 12 * GB})
    write(root, {f"{mount}/memory.stat": f"cache 1\ntotal_inactive_file {GB}\n"})
    assert free_on_host(root) == 9 * GB
    write(root, {f"{mount}/memory.limit_in_bytes": 9223372036854771712})  # what stands there without a limit
    assert free_on_host(root) == 90 * GB


def test_here():
    assert free_on_host() > 10**8
