"""The doctor: sound here, and its findings change where the machine's state does."""

import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import doctor
from launch.doctor import Check, Finding
from pipeline import graph


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No W&B account, whoever runs the tests."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))


@pytest.fixture
def open_files() -> Iterator[None]:
    """Lets a test lower the limit."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_this_machine_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.examine() == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(doctor.CHECKS) + 1 and " 0 failed" in lines[-1]
    for line, check in zip(lines, doctor.CHECKS, strict=False):
        assert line[:6].strip() in ("ok", "warn") and line[6:18].strip() == check.name and line[18] != " "


def test_a_failure_is_a_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Finding:
        raise OSError("libcuda.so.1:\n cannot open")

    checks = (
        Check("first", lambda: Finding("warn", "little", "get more")),
        Check("second", broken, "install it"),
        Check("third", lambda: Finding("ok", "fine")),
    )
    monkeypatch.setattr(doctor, "CHECKS", checks)
    assert doctor.examine() == 1
    assert capsys.readouterr().out.splitlines() == [
        "warn  first       little → get more",
        "fail  second      OSError: libcuda.so.1: cannot open → install it",
        "ok    third       fine",
        "3 checks: 1 failed, 1 with a warning",
    ]
    monkeypatch.setattr(doctor, "CHECKS", checks[:1])
    assert doctor.examine() == 0


def test_decoding_is_really_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._decoding_error(None) < 0.01
    build = graph.build
    monkeypatch.setattr(graph, "build", lambda source, **how: build(source, **{**how, "mean": (0.1, 0, 0)}))
    finding = doctor._dali()
    assert finding.state == "fail" and "8 grey levels off" in finding.found  # 0.1 × 255 in one of 3 channels


def test_a_driver_that_torch_cannot_use_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 470.57\necho 470.57\n")
    smi.chmod(0o755)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    finding = doctor._gpus()
    assert finding.state == "warn" and "driver 470.57," in finding.found and finding.remedy
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert doctor._gpus() == Finding("ok", "none: everything runs on the CPU")


def test_short_supplies_are_warnings(monkeypatch: pytest.MonkeyPatch, open_files: None) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    assert doctor._open_files().found == "512 at most" and doctor._open_files().state == "warn"
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    for free, state in ((64 << 20, "warn"), (64 << 30, "ok")):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        assert doctor._disk().state == doctor._shared_memory().state == state


def test_a_containers_limits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"/sys/fs/cgroup/cpu.max": "50000 100000", "/sys/fs/cgroup/memory.max": str(2 << 30)}
    monkeypatch.setattr(doctor, "_first_line", lambda path, otherwise: limits[path])
    cores, memory = doctor._cores(), doctor._memory()
    assert cores.state == "warn" and "0.5 is allowed" in cores.found and "loader.threads=1" in cores.remedy
    assert memory.state == "warn" and memory.found.endswith("of 2.0")


def test_wandb_is_looked_for_where_it_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "no key" in doctor._wandb().found
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    assert "a key is configured" in doctor._wandb().found
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.clinic.example")
    assert "no key" in doctor._wandb().found
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    found = doctor._wandb().found
    assert "a key is configured" in found and "secret" not in found
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert doctor._wandb().found.endswith("WANDB_MODE=offline")
