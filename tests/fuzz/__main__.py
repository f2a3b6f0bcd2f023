"""Coverage-guided fuzzing with atheris: ``python -m tests.fuzz [SECONDS [TARGET...]]``.

Each target begins with what real servers wrote, and runs for SECONDS in a process of its own, whose last
words are libFuzzer's statistics. An input that breaks a check is kept in build/fuzz, and ends this with 1.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fuzz.seeds import SEEDS

TOP = Path(__file__).resolve().parents[2]
# What one input may take, in MiB and in seconds.
MEMORY, SECONDS = 512, 20


def fuzz(name: str, seconds: int) -> bool:
    found = TOP / "build" / "fuzz"
    found.mkdir(parents=True, exist_ok=True)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    # A fuzzer that ends does not clean up.
    with tempfile.TemporaryDirectory(dir=memory) as scratch, tempfile.TemporaryDirectory() as corpus:
        for number, seed in enumerate(SEEDS[name]()):
            (Path(corpus) / str(number)).write_bytes(seed)
        command = [sys.executable, "-m", f"tests.fuzz.{name}", corpus, f"-artifact_prefix={found}/{name}-"]
        limits = [f"-rss_limit_mb={MEMORY}", f"-timeout={SECONDS}", f"-max_total_time={seconds}"]
        print(f"{name}: {seconds} s", flush=True)
        options = [*limits, "-max_len=40000", "-print_final_stats=1", "-verbosity=0"]
        environment = {**os.environ, "TMPDIR": scratch}
        return subprocess.run([*command, *options], cwd=TOP, env=environment, check=False).returncode == 0


def main(arguments: list[str]) -> int:
    seconds, names = int((arguments or ["60"])[0]), arguments[1:] or list(SEEDS)
    broken = [name for name in names if not fuzz(name, seconds)]
    print(f"failed: {', '.join(broken)}" if broken else "nothing found")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
