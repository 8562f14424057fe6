"""The doctor: sound here, and its findings change where the machine's state does."""

import base64
import json
import os
import resource
import shutil
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from launch import cli, doctor, probes
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
    """Everything is really tried, two processes and a disk too."""
    assert doctor.examine() == 0
    lines = capsys.readouterr().out.splitlines()
    checks = doctor.checks((Path(),))
    assert len(lines) == len(checks) + 1 and " 0 failed" in lines[-1]
    for line, check in zip(lines, checks, strict=False):
        assert line[:6].strip() in ("ok", "warn") and line[6:18].strip() == check.name and line[18] != " "
    assert any("GB/s over" in line for line in lines) and any("MB/s" in line for line in lines)


def broken() -> Finding:
    """A look that ends in an error."""
    raise OSError("libcuda.so.1:\n cannot open")


THREE = [
    Check("first", lambda: Finding("warn", "little", "get more")),
    Check("second", broken, "install it"),
    Check("third", lambda: Finding("ok", "fine")),
]


def test_a_failure_is_a_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "checks", lambda folders: THREE)
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor"])
    assert ended.value.code == 1
    assert capsys.readouterr().out.splitlines() == [
        "warn  first       little → get more",
        "fail  second      OSError: libcuda.so.1: cannot open → install it",
        "ok    third       fine",
        "3 checks: 1 failed, 1 with a warning",
    ]
    monkeypatch.setattr(doctor, "checks", lambda folders: THREE[:1])
    assert doctor.examine() == 0


def test_findings_for_machines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[Path] = []
    monkeypatch.setattr(doctor, "checks", lambda folders: seen.extend(folders) or THREE)
    with pytest.raises(SystemExit) as ended:
        cli.main(["doctor", str(cli.DEMO), "--json", "run.folder=elsewhere"])
    found = json.loads(capsys.readouterr().out)
    assert (ended.value.code, found["failed"], found["warned"]) == (1, 1, 1)
    assert found["checks"][0] == {"check": "first", "state": "warn", "found": "little", "remedy": "get more"}
    assert seen == [Path("data/demo/shards"), Path("elsewhere")]


def test_the_driver_must_suit_torch_and_dali(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.version.cuda", "12.8")
    monkeypatch.setattr(probes, "dali_cuda", lambda: "13.0")
    states = {}
    for driver in ("470.57.02", "535.104.05", "580.65.06", "581.1"):
        monkeypatch.setattr(doctor, "_driver", lambda driver=driver: driver)
        finding = doctor._cuda_driver()
        states[driver] = finding.state
        assert "torch (CUDA 12.8) needs 525.60, DALI (CUDA 13.0) needs 580.65" in finding.found
        assert bool(finding.remedy) == (finding.state == "fail")
    assert list(states.values()) == ["fail", "fail", "ok", "ok"]
    assert probes.version("525.60.13") >= probes.version("525.60") > probes.version("515.105")


def test_a_slow_or_hanging_exchange_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {"gigabytes_per_second": 0.01, "ranks": 2, "backend": "gloo"}
    monkeypatch.setattr(probes, "all_reduce", lambda processes: slow)
    finding = doctor._all_reduce()
    assert finding.state == "warn" and finding.found.startswith("0.0 GB/s over 2 processes by gloo")
    monkeypatch.undo()
    monkeypatch.setattr(probes, "SECONDS", 0.01)
    (check,) = [c for c in doctor.checks((Path(),)) if c.name == "all-reduce"]
    finding = doctor._look(check)
    assert finding.state == "fail" and "timed out" in finding.found and "NCCL_DEBUG" in finding.remedy


def test_a_disk_is_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert doctor._there(tmp_path / "not" / "yet") == tmp_path
    assert min(probes.disk_speed(tmp_path)) > 1 and not list(tmp_path.iterdir())
    for speeds, state in (((400, 90), "warn"), ((40, 900), "warn"), ((400, 900), "ok")):
        monkeypatch.setattr(probes, "disk_speed", lambda folder, speeds=speeds: speeds)
        finding = doctor._disk(tmp_path)
        assert finding.state == state and ("loader.stage" in finding.remedy) == (state == "warn")

    def refused(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(probes, "disk_speed", refused)
    (check,) = [c for c in doctor.checks((tmp_path,)) if c.name == "disk"]
    assert doctor._look(check).state == "fail" and "right to write" in doctor._look(check).remedy


def test_a_clock_that_is_wrong_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert abs(probes.clock_ahead(tmp_path)) < 1 and probes.newest_install() < time.time()
    monkeypatch.setattr(probes, "clock_synchronised", lambda: True)
    assert doctor._clock(tmp_path).state == "ok"
    monkeypatch.setattr(probes, "clock_ahead", lambda folder: -30.0)
    behind = doctor._clock(tmp_path)
    assert behind.state == "warn" and "30.0 s behind the clock that stamps files" in behind.found
    monkeypatch.undo()
    monkeypatch.setattr(probes, "clock_synchronised", lambda: False)
    assert "chrony" in doctor._clock(tmp_path).remedy
    monkeypatch.setattr(probes, "newest_install", lambda: time.time() + 7200)
    assert doctor._clock(tmp_path).state == "fail" and "2.0 hours" in doctor._clock(tmp_path).found


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
        assert doctor._disk(Path()).state == doctor._shared_memory().state == state


def test_a_containers_limits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"/sys/fs/cgroup/cpu.max": "50000 100000", "/sys/fs/cgroup/memory.max": str(2 << 30)}
    monkeypatch.setattr(doctor, "_first_line", lambda path, otherwise: limits[path])
    cores, memory = doctor._cores(), doctor._memory()
    assert cores.state == "warn" and "0.5 is allowed" in cores.found and "loader.threads=1" in cores.remedy
    assert memory.state == "warn" and memory.found.endswith("of 2.0")


class Server(BaseHTTPRequestHandler):
    """W&B's, as far as a login goes: it knows one key."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        known = base64.b64decode(self.headers["Authorization"].split()[1]) == b"api:secret"
        self.send_response(200 if known else 401)
        self.end_headers()
        self.wfile.write(json.dumps({"data": {"viewer": {"id": "me"} if known else None}}).encode())

    def log_message(self, *words: object) -> None:
        """Nothing."""


def test_wandb_is_looked_for_where_it_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "no key" in doctor._wandb().found
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"127.0.0.1:{server.server_port}"
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{place}")
    assert "no key" in doctor._wandb().found
    (tmp_path / "netrc").write_text(f"machine {place} login user password secret\n")
    taken = doctor._wandb()
    assert taken.state == "ok" and "takes it" in taken.found and "secret" not in taken.found
    monkeypatch.setenv("WANDB_API_KEY", "wrong")
    refused = doctor._wandb()
    assert refused.state == "warn" and "refuses it" in refused.found and "wandb login" in refused.remedy
    server.shutdown()
    server.server_close()
    gone = doctor._wandb()
    assert gone.state == "warn" and "cannot be reached" in gone.found and "wandb sync" in gone.remedy
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert doctor._wandb().found.endswith("WANDB_MODE=offline")
