"""Processors that may be used: affinity, and the quotas of control groups of both versions at any level."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from inward.backbones import device
from inward.backbones.cpus import CHOSEN, available_cpus, cpu_quota


def machine(root: Path, cgroup: str, files: dict[str, str]) -> Path:
    for name, content in {"proc/self/cgroup": cgroup, **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ("0::/pod/box\n", {"sys/fs/cgroup/pod/cpu.max": "400000 100000\n"}, 4.0),
        (
            "0::/pod/box\n",
            {"sys/fs/cgroup/pod/cpu.max": "400000 100000", "sys/fs/cgroup/pod/box/cpu.max": "50000 100000"},
            0.5,
        ),
        (
            "5:cpu,cpuacct:/docker/a\n4:memory:/docker/a\n",
            {
                "sys/fs/cgroup/cpu/docker/a/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu/docker/a/cpu.cfs_period_us": "100000\n",
            },
            2.5,
        ),
        (
            "5:cpu,cpuacct:/unseen/path\n",  # the container's own group is mounted at the top
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            3.0,
        ),
        (
            "5:cpu:/\n",
            {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"},
            None,
        ),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "what\n"}, None),
    ],
)
def test_the_tightest_quota_counts(cgroup: str, files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup, files)
    assert cpu_quota(root) == quota
    allowed = len(os.sched_getaffinity(0))
    assert available_cpus(root) == (allowed if quota is None else max(1, min(allowed, int(quota))))


def test_without_control_groups_affinity_counts(tmp_path: Path) -> None:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        assert available_cpus(tmp_path) == 1
    finally:
        os.sched_setaffinity(0, before)


def test_torch_uses_no_more_threads_than_that_unless_somebody_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(device, "available_cpus", lambda: before + 3)
    try:
        monkeypatch.setenv(CHOSEN, str(before))
        assert device.use_available_cpus() == before
        monkeypatch.delenv(CHOSEN)
        assert device.use_available_cpus() == before + 3
    finally:
        torch.set_num_threads(before)
