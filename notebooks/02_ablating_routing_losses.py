# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 2. Ablating routing losses
#
# Without help a router collapses: a few experts take most tokens. A loss that punishes this
# disturbs the language model; a bias in the selection does not, at least not by a gradient. Which
# is better, and is the difference more than luck? A sweep tells: the same model, weights at the
# start, and order of data under each method, for three seeds.

# %%
import json
import subprocess
import sys
import time

import pandas as pd

from experiments.notebook import ROOT, program, runs, show
from moe_jax.analysis import compare
from moe_jax.train.metrics import read_metrics

print((ROOT / 'sweeps' / 'small_balance.py').read_text())
folder = runs() / 'small_balance'
flags = ['--sweep=sweeps/small_balance.py', f'--workdir={folder}', '--jobs=2']

# %% [markdown]
# ## Killed in the middle
#
# The sweep is started, and killed with `kill -9` as soon as two rows are training. (Where it has
# been run before there is nothing to kill.)

# %%


def rows_begun() -> int:
  return sum(path.stat().st_size > 0 for path in folder.glob('rows/*/metrics.jsonl'))


command = [sys.executable, '-m', 'sweeps.run', *flags]
process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
while rows_begun() < 2 and process.poll() is None:
  time.sleep(0.1)
process.kill()
print('exit code', process.wait(), 'with', rows_begun(), 'rows begun')

# %% [markdown]
# ## Resumed
#
# The same command goes on: finished rows are left alone, the two half-done ones continue from
# their checkpoints, and the others follow.

# %%
program('sweeps.run', *flags, show_lines=30)

# %% [markdown]
# No row is lost, none repeated: every one has each of its steps exactly once.

# %%
records = [json.loads(p.read_text()) for p in sorted(folder.glob('rows/*/row.json'))]
for record, path in zip(records, sorted(folder.glob('rows/*')), strict=True):
  steps = [row['step'] for row in read_metrics(path).rows if 'train/loss' in row]
  assert steps == list(range(1, 81)), path
  assert record['state'] == 'done'
print(f'{len(records)} rows, 80 steps each; resumed:', sum(r['starts'] > 1 for r in records))

# %% [markdown]
# ## The table
#
# `results.parquet` has a line for each row, `steps.parquet` one for each step, metric and layer.

# %%
results = pd.read_parquet(folder / 'results.parquet')
vio, dead = 'router/max_vio_global.max', 'router/dead_global.max'
results.pivot_table(
  index='balance', values=['eval/loss', vio, dead], aggfunc=['mean', 'std']
).round(3)

# %% [markdown]
# ## The paired comparison
#
# Seeds differ from each other more than methods do; within a seed, all else is equal. So each dot
# is one seed's loss less that of no balancing with the same seed, and the interval is Student's t
# over these differences. MaxVio is that of the worst layer over the whole evaluation.

# %%
loss = compare.by_method(results['balance'], results['seed'], results['eval/loss'])
balance = compare.by_method(results['balance'], results['seed'], results[vio])
show(compare.paired_figure(loss, balance, baseline='none', measure='MaxVio'))

# %% [markdown]
# ## On the way

# %%
steps = pd.read_parquet(folder / 'steps.parquet').merge(
  results[['row', 'balance', 'seed']], on='row'
)


def curves(metric: str) -> tuple:
  """The metric of the worst layer: steps, and {method: {seed: values}}."""
  worst = steps[steps['metric'] == metric].groupby(['balance', 'seed', 'step'])['value'].max()
  table = worst.unstack('step')
  methods = {
    method: {seed: row.to_numpy() for seed, row in rows.droplevel(0).iterrows()}
    for method, rows in table.groupby(level='balance')
  }
  return table.columns.to_numpy(), methods


show(compare.curves_figure(*curves('router/max_vio'), 'MaxVio of the worst layer', baseline='none'))

# %%
show(compare.curves_figure(*curves('train/lm_loss'), 'training loss', baseline='none'))

# %% [markdown]
# Eighty steps of a tiny model show how to compare, not which method to use: the biases of
# `loss_free` have hardly found their place, and differences in loss are small beside what longer
# training would make of them. To add a method of your own, see
# [05](05_your_own_balancing_loss.ipynb).
