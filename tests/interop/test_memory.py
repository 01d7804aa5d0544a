"""A conversion needs the memory of a few blocks, however large the checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import V3, contents, make

SHARD = 50 * 10**6

# the peak of a process' own pages; getrusage would start from its parent's
PROGRAM = """
import sys
from moe_jax.interop.export_hf import export_hf
from moe_jax.interop.import_hf import import_hf

def peak():
  status = dict(line.split(':', 1) for line in open('/proc/self/status'))
  return int(status['VmHWM'].split()[0]) * 1024

small, large, out = sys.argv[1:]
import_hf(small, out + '/small')
export_hf(out + '/small', out + '/small_back')
before = peak()
import_hf(large, out + '/ours')
imported = peak()
export_hf(out + '/ours', out + '/back')
print(imported - before, peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads /proc')
def test_400_megabytes_convert_both_ways_within_two_shards(tmp_path):
  large = V3 | dict(hidden_size=512, moe_intermediate_size=256, n_routed_experts=64, n_group=8,
                    topk_group=4, num_hidden_layers=5)  # fmt: skip
  small, large = make(tmp_path / 's', V3), make(tmp_path / 'l', large, shard_bytes=SHARD)
  size = sum(f.stat().st_size for f in large.glob('*.safetensors'))
  assert size > 400e6
  root = Path(__file__).parents[2]
  run = subprocess.run(
    [sys.executable, '-c', PROGRAM, small, large, tmp_path],
    env=os.environ | {'PYTHONPATH': str(root), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
    check=True,
  )
  imported, exported = map(int, run.stdout.split())
  assert max(imported, exported) < 2 * SHARD, (imported, exported)
  assert contents(tmp_path / 'back') == contents(large)
