"""What the kernel counts for this container, read by the trainer's launcher and by `finetune run`."""

from __future__ import annotations

from pathlib import Path


def oom_kills() -> int:
    """Processes killed so far for lack of memory: in this cgroup (v2, v1) if it counts them, else on the machine."""
    for name in ("/sys/fs/cgroup/memory.events", "/sys/fs/cgroup/memory/memory.oom_control", "/proc/vmstat"):
        try:
            words = Path(name).read_text().split()
            return int(words[words.index("oom_kill") + 1])
        except (OSError, ValueError, IndexError):
            continue
    return 0
