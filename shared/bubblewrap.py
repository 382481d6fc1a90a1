"""bubblewrap, which shuts programs in: is it here and does it work? -> None, or what is wrong and what cures it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

NOBODY: dict[str, Any] = {"user": 65534, "group": 65534, "extra_groups": ()}
"""Whom root becomes (arguments of Popen): limits on processes do not hold for root, nor do modes of files."""
NAMESPACES = (
    "--unshare-user", "--disable-userns", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts",
    "--unshare-cgroup-try", "--hostname", "sandbox", "--die-with-parent", "--new-session", "--cap-drop", "ALL",
)  # fmt: skip
_OLDEST = (0, 8)
"""First version that can forbid namespaces inside its own (--disable-userns)."""
_TRIAL_S = 20.0
_INSTALL = (
    "apt-get install bubblewrap (Debian, Ubuntu), dnf install bubblewrap (Fedora, RHEL), pacman -S bubblewrap (Arch), "
    "zypper install bubblewrap (openSUSE) or apk add bubblewrap (Alpine)"
)
_SWITCHES = {
    "/proc/sys/kernel/apparmor_restrict_unprivileged_userns": (
        "1", "AppArmor forbids user namespaces (Ubuntu 23.10 and later): as root, "
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or a profile for bwrap alone (docs/evaluation.md)",
    ),
    "/proc/sys/kernel/unprivileged_userns_clone": (
        "0", "user namespaces are for root alone here: as root, sysctl -w kernel.unprivileged_userns_clone=1",
    ),
    "/proc/sys/user/max_user_namespaces": (
        "0", "user namespaces are switched off here: as root, sysctl -w user.max_user_namespaces=15000",
    ),
}  # fmt: skip


def trouble() -> str | None:
    """Why bubblewrap cannot be used on this machine, with the cure; None: it can."""
    if sys.platform != "linux":
        return f"this is {sys.platform}, and bubblewrap is for Linux: evaluate there what runs code"
    program = shutil.which("bwrap")
    if program is None:
        return f"bubblewrap is not installed: {_INSTALL}"
    try:
        said = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=_TRIAL_S, check=False)
        version = re.search(r"(\d+)\.(\d+)", said.stdout)
        if version is None or (int(version[1]), int(version[2])) < _OLDEST:
            return (
                f"bubblewrap 0.8 or newer is needed, and {program} is {said.stdout.strip() or 'of no known version'}: "
                "Debian 12, Ubuntu 24.04, Fedora 38 and later carry it"
            )
        command = [program, *NAMESPACES, "--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "true"]
        as_whom = NOBODY if os.geteuid() == 0 else {}
        tried = subprocess.run(command, capture_output=True, text=True, timeout=_TRIAL_S, check=False, **as_whom)
    except (OSError, subprocess.SubprocessError) as error:
        return f"bubblewrap does not start ({error})"
    return None if tried.returncode == 0 else f"bubblewrap fails ({tried.stderr.strip()[:300]}): {cure()}"


def cure() -> str:
    """What lets namespaces be made here, as far as the machine shows what forbids them."""
    for switch, (forbidding, said) in _SWITCHES.items():
        try:
            if Path(switch).read_text().strip() == forbidding:
                return said
        except OSError:
            continue
    return (
        "this machine, or the container around it, forbids namespaces or a /proc of their own; a container may need "
        "--security-opt seccomp=unconfined --security-opt systempaths=unconfined"
    )
