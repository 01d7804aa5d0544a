"""Replaces itself by a command that gets SIGTERM when its launcher dies, however it dies.

  python leash.py LAUNCHER_PID COMMAND...

A run then saves a checkpoint and stops, instead of going on where nobody waits for it. Imports
nothing of the project: it must be gone in a few milliseconds.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h; survives execve


def main() -> None:
  launcher, command = int(sys.argv[1]), sys.argv[2:]
  if sys.platform == 'linux':
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != launcher:  # it died before we could ask to be told
      sys.exit(128 + signal.SIGTERM)
  os.execvp(command[0], command)


if __name__ == '__main__':
  main()
