"""DeepSpeed hostfiles and names of hosts: the rule for both `maskvr train` and `python -m cluster`. Loads no torch.

If the file passed to `deepspeed --hostfile` does not exist, DeepSpeed trains on the local machine only and reports
success; on a malformed line it fails with a traceback; a name that starts with "-" becomes an option of ssh, which may
run a command. Reading the file here first turns all of them into an error message.
"""

import re
from pathlib import Path

from maskvr_ds.runtime.numbers import MAX_NODES, MAX_SLOTS, shortened

# Neither the user nor the host starts with "-": that would be an option of ssh.
_PART = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
_HOST = re.compile(rf"(?:{_PART}@)?{_PART}", re.ASCII)
_IPV6 = re.compile(rf"(?:{_PART}@)?[A-Fa-f0-9:][A-Fa-f0-9:.]*(?:%{_PART})?", re.ASCII)
_LINE = re.compile(r"(?P<host>\S+)\s+slots=(?P<slots>[0-9]{1,9})", re.ASCII)
# A hostfile of MAX_NODES lines has far less.
_MAX_BYTES = 4 << 20


class HostfileError(ValueError):
    """An invalid hostfile, host name or number of slots."""


def is_host(name: str) -> bool:
    """Whether `name` is a host name or an address, with or without USER@, that no program reads as an option."""
    return bool(_HOST.fullmatch(name) or (":" in name and _IPV6.fullmatch(name)))


def read_hostfile(path: str | Path) -> dict[str, int]:
    """Host -> slots (number of ranks), in the order of the file; the first host is the master.

    Raises HostfileError, with the line number, if a line is not `host slots=N`, its host is not a host name, repeats a
    host (with another USER@, too), or its slots are 0 or more than MAX_SLOTS; and if the file names no host, or more
    than MAX_NODES.
    """
    path = Path(path)
    if not path.is_file():
        raise HostfileError(f"{path}: no such file; DeepSpeed would train on this machine only")
    if (size := path.stat().st_size) > _MAX_BYTES:
        raise HostfileError(f"{path}: {size:,} bytes; expected a hostfile, one `host slots=N` per line")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HostfileError(f"{path}: not UTF-8 text ({error}); expected one `host slots=N` per line") from None
    hosts: dict[str, int] = {}
    machines: dict[str, str] = {}
    # Lines as DeepSpeed reads them: str.splitlines would also split at form feeds and others.
    for number, raw in enumerate(text.split("\n"), 1):
        line = raw.split("#", 1)[0].strip()
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            raise HostfileError(f"{path}:{number}: {shortened(line)} is not `host slots=N`")
        host, slots = match["host"], int(match["slots"])
        if not is_host(host):
            raise HostfileError(
                f"{path}:{number}: {shortened(host)} is not a host name; expected letters, digits and _.-, or "
                "USER@HOST, and no leading '-'"
            )
        if host in hosts:
            raise HostfileError(f"{path}:{number}: {host} is listed twice; give it one line with all its slots")
        # Ranks of both would share its GPUs.
        if (other := machines.setdefault(host.rpartition("@")[2], host)) != host:
            raise HostfileError(f"{path}:{number}: {host} is the same machine as {other}; give it one line")
        if not slots:
            raise HostfileError(f"{path}:{number}: {host} has no slots; remove the line")
        if slots > MAX_SLOTS:
            raise HostfileError(f"{path}:{number}: {host} has {slots:,} slots; at most {MAX_SLOTS:,} expected")
        hosts[host] = slots
    if not hosts:
        raise HostfileError(f"{path}: names no host; expected one `host slots=N` per line")
    if len(hosts) > MAX_NODES:
        raise HostfileError(f"{path}: names {len(hosts):,} hosts; at most {MAX_NODES:,} expected")
    return hosts
