"""Two hosts, for real but for the hardware: see two_hosts.py."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from two_hosts import story, two_hosts

from shards.shardset import ShardSet


def _able() -> bool:
    if os.geteuid() or not shutil.which("ip"):
        return False
    made = subprocess.run(["ip", "netns", "add", "mole-try"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", "mole-try"], capture_output=True, check=False)
    return made.returncode == 0


pytestmark = pytest.mark.skipif(not _able(), reason="needs root and network namespaces")


@pytest.mark.slow
def test_two_hosts_train_one_is_lost_and_comes_back(tiny_shards: ShardSet, tmp_path: Path) -> None:
    for line in story(tiny_shards.folder, tmp_path):
        print(line)


def test_hosts_see_each_other_alone() -> None:
    with two_hosts() as (first, second):
        for here, there in ((first, second), (second, first)):
            found = subprocess.run(
                ["ip", "-n", here.name, "route", "get", there.address],
                capture_output=True,
                text=True,
                check=True,
            )
            assert f"dev cable src {here.address}" in found.stdout
    assert not {first.name, second.name} & set(
        subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout.split()
    )
