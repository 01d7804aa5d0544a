"""A Slurm cluster of one node, this machine, for as long as a test needs it.

Debian has it: `apt-get install slurm-wlm munge`. Nothing of the installation is used but the
programs: keys, sockets, ports, configuration and state are the test's own, and so are the daemons
munged, slurmctld and slurmd, which run as the user who tests (for slurmd that must be root).
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'squeue', 'scancel', 'sinfo')
CONFIG = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SchedulerParameters=sched_interval=1
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=debug Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
  """Why there can be no cluster here; empty where there can."""
  absent = [name for name in PROGRAMS if not _which(name)]
  if absent:
    return f'no {", ".join(absent)}: apt-get install slurm-wlm munge'
  return '' if os.getuid() == 0 else 'slurmd must be started by root'


@contextlib.contextmanager
def cluster(folder: Path, *, cpus: int = 2) -> Iterator[dict[str, str]]:
  """Starts the daemons, waits until the node is idle, and yields the environment of its users."""
  for name in ('state', 'spool'):
    (folder / name).mkdir()
  key = folder / 'munge.key'
  key.write_bytes(os.urandom(128))
  key.chmod(0o600)
  config = folder / 'slurm.conf'
  config.write_text(
    CONFIG.format(
      host=socket.gethostname(), ports=_free_ports(2), user='root', folder=folder, cpus=cpus
    )
  )
  env = os.environ | {'SLURM_CONF': str(config), 'PATH': f'{os.environ["PATH"]}:/usr/sbin:/sbin'}
  own = {n: f'{folder}/munge.{n}' for n in ('socket', 'pid', 'log', 'seed')}
  flags = {
    'socket': own['socket'],
    'pid-file': own['pid'],
    'log-file': own['log'],
    'seed-file': own['seed'],
    'key-file': str(key),
  }
  munged = ['munged', '--foreground', '--force', *(f'--{n}={v}' for n, v in flags.items())]
  daemons = [munged, ['slurmctld', '-D'], ['slurmd', '-D']]
  with contextlib.ExitStack() as stack:
    for command in daemons:
      log = stack.enter_context((folder / f'{command[0]}.out').open('wb'))
      process = subprocess.Popen(command, env=env, stdout=log, stderr=log)
      stack.callback(_end, process)
      if command is munged:
        _wait_for(Path(own['socket']).exists, folder)
    _wait_for(lambda: _idle(env), folder)
    yield env


def _idle(env: dict[str, str]) -> bool:
  answer = subprocess.run(['sinfo', '-h', '-o', '%T'], env=env, capture_output=True, text=True)
  return answer.stdout.strip() == 'idle'


def _end(process: subprocess.Popen) -> None:
  process.terminate()
  try:
    process.wait(timeout=20)
  except subprocess.TimeoutExpired:
    process.kill()
    process.wait()


def _wait_for(claim, folder: Path, *, timeout_s: float = 60) -> None:
  until = time.monotonic() + timeout_s
  while not claim():
    if time.monotonic() > until:
      logs = [f'{p.name}: {p.read_text(errors="replace")[-2000:]}' for p in folder.glob('*.[lo]*')]
      raise AssertionError('the cluster does not come up: ' + '\n'.join(logs))
    time.sleep(0.2)


def _which(name: str) -> str | None:
  return shutil.which(name, path=f'{os.environ["PATH"]}:/usr/sbin:/sbin')


def _free_ports(number: int) -> list[int]:
  with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
    for s in sockets:
      s.bind(('127.0.0.1', 0))
    return [s.getsockname()[1] for s in sockets]
