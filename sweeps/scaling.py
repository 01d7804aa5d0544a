"""IsoFLOP runs of a small model on bytes: three sizes at each of three budgets.

python -m sweeps.run --sweep=sweeps/scaling.py --jobs=2 --workdir=runs/sweeps/scaling

notebooks/04_scaling_laws.py fits and draws a law of such runs.
"""

from collections.abc import Iterator

from sweeps import space
from sweeps.budget import isoflop

CONFIG = 'experiments/configs/small.py:bytes'
BUDGETS = (1e10, 3e10, 9e10)  # FLOPs
WIDTHS = (8, 16, 32)


def sizes() -> Iterator[space.Overrides]:
  """Everything grows with the width; the learning rate falls with its root."""
  for width in WIDTHS:
    yield {
      'model.d_model': width,
      'model.mla.num_heads': max(1, width // 16),
      'model.mla.q_rank': 3 * width // 4,
      'model.mla.kv_rank': width // 2,
      'model.moe.d_expert': width // 2,
      'optim.lr_peak': round(4e-3 * (64 / width) ** 0.5, 6),
    }


def sweep() -> Iterator[space.Overrides]:
  for row in isoflop(CONFIG, BUDGETS, list(sizes()), tokens_per_parameter=(0.2, 400)):
    # the schedule belongs to the number of steps; nothing is looked at before the end
    end = {'eval.interval_steps': row['steps'], 'checkpoint.interval_steps': row['steps']}
    yield {**row, 'optim.warmup_steps': max(4, row['steps'] // 8), **end}
