"""What a host has, and the settings that ranks on it run well with, each with its reason."""

import fcntl
import os
import re
import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from launch.cluster import first_node

PORT = 29400
"""Where hosts meet unless an address names another: torchrun's own default."""
PATIENCE = 120.0
"""Seconds to wait for the first host's name: a cluster may start the others before it."""
_SIOCGIFADDR = 0x8915  # linux/sockios.h


@dataclass(frozen=True)
class Host:
    """This machine, as far as a launcher asks."""

    cores: int = 1
    """That this process may run on."""
    gpus: int = 0
    numa_nodes: int = 1

    @classmethod
    def this(cls) -> "Host":
        """The machine that this runs on."""
        import torch

        online = Path("/sys/devices/system/node/online")
        nodes = _count(online.read_text()) if online.exists() else 1
        return cls(len(os.sched_getaffinity(0)), torch.cuda.device_count(), nodes)


@dataclass(frozen=True)
class Route:
    """How this host reaches the one where all meet."""

    address: str
    """This host's own, as the others see it."""
    interface: str
    """Of that address; empty if it cannot be told."""
    is_host: bool
    """Whether it is the one where all meet."""


@dataclass(frozen=True)
class Setting:
    """An environment variable, or an option of torchrun if its name begins with `--`."""

    name: str
    value: str
    why: str

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


def settings(
    host: Host, ranks: int, route: Route | None, environment: Mapping[str, str] = os.environ
) -> list[Setting]:
    """What `ranks` processes on a host are started with. What the user has set stays, and is said to."""
    threads = max(1, host.cores // ranks)
    chosen = [
        Setting(
            "OMP_NUM_THREADS",
            str(threads),
            f"{ranks} ranks share {host.cores} cores; torch would give each rank all of them"
            if ranks > 1
            else "one rank has all cores",
        ),
        Setting("PYTHONSAFEPATH", "1", "a train.py in the folder you are in is not taken for moleprint's"),
    ]
    if host.gpus:
        chosen.append(Setting("NCCL_DEBUG", "WARN", "NCCL says why, if it fails"))
        if host.numa_nodes > 1:
            why = f"{host.numa_nodes} NUMA nodes: a rank stays on the cores and memory beside its GPU"
            chosen.append(Setting("--numa-binding", "node", why))
    if route:
        chosen += _network(host, route)
    return [_kept(setting, environment) for setting in chosen]


def _network(host: Host, route: Route) -> list[Setting]:
    chosen = [
        Setting(
            "--local-addr", route.address, "other hosts reach this one here, whatever its name resolves to"
        ),
        Setting(
            "--rdzv-conf",
            f"is_host={int(route.is_host)},join_timeout=600,last_call_timeout=15,read_timeout=300",
            _meeting(route),
        ),
        # torch's store, shared over restarts, is announced in the first round only (pytorch #135712).
        Setting("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1", "a host that comes back finds the others"),
    ]
    if route.interface:
        why = f"the interface that leads to the other hosts; {{}} would guess among {_interfaces()}"
        chosen.append(Setting("GLOO_SOCKET_IFNAME", route.interface, why.format("gloo")))
        if host.gpus:
            why = f"{why.format('NCCL')}; InfiniBand, where there is any, NCCL finds by itself"
            chosen.append(Setting("NCCL_SOCKET_IFNAME", route.interface, why))
    return chosen


def _meeting(route: Route) -> str:
    where = "all meet at this host" if route.is_host else "all meet at another host, there in 300 s"
    return f"{where}; 600 s for enough of them, then 15 s for more"


def _kept(setting: Setting, environment: Mapping[str, str]) -> Setting:
    own = environment.get(setting.name)
    return Setting(setting.name, own, "as you have set it") if own is not None else setting


def route_to(endpoint: str, *, patience: float = PATIENCE) -> Route:
    """The way to the host where all meet.

    Args:
        endpoint: `HOST` or `HOST:PORT`.
        patience: seconds to try again where the name is not known yet.

    Raises:
        UserError: if its name is not known, or no way leads there.
    """
    name, port = split(endpoint)
    deadline = time.monotonic() + patience
    while True:
        try:
            theirs = socket.gethostbyname(name)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((theirs, port))  # sends nothing: the kernel only chooses the way
                mine = str(probe.getsockname()[0])
            return Route(mine, _interface_of(mine), mine == theirs and first_node())
        except OSError as error:
            if time.monotonic() >= deadline:
                raise UserError(
                    f"{endpoint}: the host where all meet cannot be reached ({error.strerror or error}); "
                    "give a name or address that every host knows as --rendezvous HOST:PORT"
                ) from None
            time.sleep(min(2.0, patience))


def split(endpoint: str) -> tuple[str, int]:
    """Host and port of `HOST` or `HOST:PORT`; raises UserError."""
    name, _, port = endpoint.partition(":")
    if not name or (port and not (port.isdigit() and 0 < int(port) < 1 << 16)):
        raise UserError(f"'{endpoint}': expected HOST:PORT, such as node01:{PORT}")
    return name, int(port or PORT)


def _interface_of(address: str) -> str:
    return next((name for name in _interfaces() if _address_of(name) == address), "")


def _interfaces() -> list[str]:
    return [name for _, name in socket.if_nameindex()]


def _address_of(interface: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError:  # it has none
            return ""
    return socket.inet_ntoa(answer[20:24])


def _count(listing: str) -> int:
    """How many the kernel lists: `0-1,4` is three."""
    ranges = re.findall(r"(\d+)(?:-(\d+))?", listing)
    return sum(int(last or first) - int(first) + 1 for first, last in ranges) or 1
